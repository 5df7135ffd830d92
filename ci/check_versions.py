#!/usr/bin/env python3
"""kernels-core/VERSION is the one source of the version; what cannot read it must agree with it.

check_versions.py [TAG]      TAG, as v1.2.3, must too, and CHANGELOG.md give its date
"""

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
    heading = rf"^## .*{re.escape(version)}"
    for tag in sys.argv[1:]:
        heading = rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$"
        if tag != f"v{version}":
            wrong.append(f"the tag v{version}, not {tag}")
    if not re.search(heading, (ROOT / "CHANGELOG.md").read_text(), re.M):
        wrong.append(f"CHANGELOG.md: a heading '## {version} (date)'")
    for line in wrong:
        print(f"kernels-core/VERSION is {version}, which asks for {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
