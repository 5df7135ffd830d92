#!/usr/bin/env python3
"""Prints, as JSON, the GPU of this machine and the rows of kernels that the installed flash_mla has
for it. Fails when there is no GPU, or nothing was built for any."""

from __future__ import annotations

import json
import sys

import torch

import flash_mla
from flash_mla.config import variants


def main() -> str | None:
    """What is wrong."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU: these sessions are for a machine with one"
    if all(variant.row == "cpu" for variant in variants()):
        return f"{flash_mla.__file__} was built without CUDA; install wheels built with it"
    rows = {variant.row: None for variant in variants("cuda") if not variant.reason}
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    print(json.dumps({"name": name, "rows": list(rows)}))
    return None


if __name__ == "__main__":
    sys.exit(main())
