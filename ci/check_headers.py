#!/usr/bin/env python3
"""Compiles each header of the core alone: it must include what it uses.

    check_headers.py [-I FOLDER]...

Headers go through the C++ compiler (CXX, or g++), but .cuh files, those that include CUDA's own and
all in the folder of an architecture through nvcc; without nvcc they are counted as skipped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CORE = Path(__file__).resolve().parent.parent / "kernels-core"
ROOTS = [CORE / "include", CORE / "src"]
NVCC_ARCH = {
    "portable": "sm_80",
    "sm80": "sm_80",
    "sm89": "sm_89",
    "sm90": "sm_90a",
    "sm100": "sm_100f",
}
CXX = [os.environ.get("CXX", "g++"), "-x", "c++", "-fsyntax-only", "-fopenmp"]
NVCC = ["nvcc", "-x", "cu", "-ptx", "-o", os.devnull, "--expt-relaxed-constexpr"]


def compiler(header: Path) -> list[str]:
    """The compiler and its options, but for what all headers have in common."""
    arch = [NVCC_ARCH[part] for part in header.parts if part in NVCC_ARCH]
    if header.suffix == ".h" and not arch and "#include <cuda" not in header.read_text():
        return [*CXX, "-Wall", "-Wextra", "-Werror", "-DFLASH_MLA_WITH_CUDA=0"]
    return [*NVCC, f"-arch={arch[0] if arch else 'sm_80'}", "-DFLASH_MLA_WITH_CUDA=1"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-I", dest="folders", action="append", default=[], help="include folder")
    common = ["-std=c++20", *(f"-I{f}" for f in [*ROOTS, *parser.parse_args().folders])]

    headers = [h for root in ROOTS for h in sorted(root.rglob("*")) if h.suffix in (".h", ".cuh")]
    asked = [h for h in headers if shutil.which(compiler(h)[0])]

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compile_alone(header: Path) -> subprocess.CompletedProcess[str]:
            source = Path(scratch, "_".join(header.relative_to(CORE).parts) + ".cc")
            source.write_text(f'#include "{header}"\n' * 2)  # the second must add nothing
            argv = [*compiler(header), *common, str(source)]
            return subprocess.run(argv, capture_output=True, text=True)

        results = dict(zip(asked, pool.map(compile_alone, asked), strict=True))

    failed = {header: result for header, result in results.items() if result.returncode}
    for header, result in failed.items():
        print(f"--- {header.relative_to(CORE.parent)}\n{result.stderr}")
    print(f"{len(asked) - len(failed)} headers compile alone, {len(failed)} do not")
    if len(asked) < len(headers):
        print(f"{len(headers) - len(asked)} skipped, of CUDA: there is no nvcc")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
