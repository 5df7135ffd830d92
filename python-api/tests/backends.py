"""The backends under test. To run every test on another one, list it here."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Backend:
    """Where a test runs: a device, and the row of kernels that must serve it.

    name: what a test's id shows.
    device: where the inputs are.
    kernel: FLASH_MLA_KERNEL for the tests of this backend; None leaves the choice to the library.
    complete: every operator is there, so NotImplementedError is a failure. While a backend is
        being built it is False: what it does not serve yet is skipped with the library's reason.
    skip_reason: why nothing can run here, None if it can.
    """

    name: str
    device: str
    kernel: str | None = None
    complete: bool = True
    skip_reason: str | None = None


_NO_GPU = None if torch.cuda.is_available() else "no CUDA device"

BACKENDS = [
    Backend("cpu", "cpu"),
    Backend("cuda", "cuda", complete=False, skip_reason=_NO_GPU),
    Backend("cuda_portable", "cuda", kernel="portable", complete=False, skip_reason=_NO_GPU),
]
