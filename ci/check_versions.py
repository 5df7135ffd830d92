#!/usr/bin/env python3
"""kernels-core/VERSION is the one source of the version; what cannot read it must agree with it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    version = (ROOT / "kernels-core/VERSION").read_text().strip()
    minor = ".".join(version.split(".")[:2])
    pyproject = (ROOT / "python-api/pyproject.toml").read_text()
    wrong = []
    if f'"libflash-mla~={minor}.0"' not in pyproject:
        wrong.append(f"python-api/pyproject.toml: build-system.requires: libflash-mla~={minor}.0")
    for recipe in sorted((ROOT / "recipes").glob("*/recipe.yaml")):
        if not re.search(rf'^  version: "{re.escape(version)}"', recipe.read_text(), re.M):
            wrong.append(f'{recipe.relative_to(ROOT)}: version: "{version}"')
    if not re.search(rf"^## .*{re.escape(version)}", (ROOT / "CHANGELOG.md").read_text(), re.M):
        wrong.append(f"CHANGELOG.md: a heading for {version}")
    for line in wrong:
        print(f"kernels-core/VERSION is {version}, which asks for {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
