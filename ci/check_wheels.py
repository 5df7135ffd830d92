#!/usr/bin/env python3
"""What must be true of wheels before anybody else gets them.

    check_wheels.py [--manylinux] WHEEL...     --manylinux: built in an image of manylinux

Platform tag, needed libraries, RPATH, exported symbols, CUDA architectures, size, metadata,
licenses, software bills of materials, and that no path of the machine that built them is inside.
"""

from __future__ import annotations

import argparse
import email
import email.message
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from elftools.elf.elffile import ELFFile
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "kernels-core"
VERSION = (CORE / "VERSION").read_text().strip()

# Every Linux has them: what manylinux allows, and of that no more than a C++ library takes.
SYSTEM = ("libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-*.so.*")
SYSTEM_BEFORE_GLIBC_2_34 = ("libdl.so.2", "libpthread.so.0", "librt.so.1")
BUILD_PATHS = re.compile(rb"(?:/tmp|/root|/home|/project|%s)/[!-~]+" % re.escape(bytes(ROOT)))


@dataclass
class Expected:
    library: str
    needed: tuple[str, ...]  # beside those of the system
    rpath: str
    max_bytes: int
    exports: list[str] = field(default_factory=list)
    requires: set[str] = field(default_factory=set)
    licenses: set[str] = field(default_factory=lambda: {"LICENSE"})


EXPECTED = {
    "libflash-mla": Expected(
        library="libflash_mla/lib64/libflash_mla.so",
        needed=("libgomp-*.so.*",),  # a copy in the wheel, which auditwheel renames
        rpath="$ORIGIN/../../libflash_mla.libs",
        max_bytes=60_000_000,
        exports=(CORE / "tests/api/exported_symbols.txt").read_text().splitlines(),
        licenses={"LICENSE", "CUTLASS.txt", "CUDA-Toolkit.txt", "libgomp-GPL-3.0.txt"},
    ),
    "flash-mla": Expected(
        library="flash_mla/libflash_mla_torch.so",
        needed=("libflash_mla.so", "libtorch.so"),
        rpath="$ORIGIN/../libflash_mla/lib64",
        max_bytes=1_000_000,
        requires={"torch>=2.10", f"libflash-mla~={VERSION}"},
    ),
}


def problems(path: Path, manylinux: bool) -> Iterator[str]:
    """What is wrong with a wheel."""
    name, version, _, tags = parse_wheel_filename(path.name)
    expected = EXPECTED[name]
    wheel = zipfile.ZipFile(path)
    files = {entry: wheel.read(entry) for entry in wheel.namelist() if entry[-1] != "/"}
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    elf = ELFFile(io.BytesIO(files[expected.library]))
    with_cuda = elf.get_section_by_name(".nv_fatbin") is not None

    yield from wrong_tags({str(tag) for tag in tags}, manylinux)
    if path.stat().st_size > expected.max_bytes:
        yield f"{path.stat().st_size} bytes, {expected.max_bytes} allowed"

    dynamic = list(elf.get_section_by_name(".dynamic").iter_tags())
    needed = [tag.needed for tag in dynamic if tag.entry.d_tag == "DT_NEEDED"]
    allowed = (*SYSTEM, *SYSTEM_BEFORE_GLIBC_2_34, *expected.needed)
    for soname in needed:
        if not any(fnmatch(soname, pattern) for pattern in allowed):
            yield f"needs {soname}"
    for pattern in expected.needed:
        if not any(fnmatch(soname, pattern) for soname in needed):
            yield f"does not need {pattern}, but {needed}"
    rpaths = [
        getattr(tag, tag.entry.d_tag[3:].lower())
        for tag in dynamic
        if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")
    ]
    if rpaths != [expected.rpath]:
        yield f"has the RPATH {rpaths}, not {expected.rpath}"
    for symbol in sorted(exported(elf) ^ set(expected.exports)):
        yield f"{'lacks' if symbol in expected.exports else 'exports'} the symbol {symbol}"

    architectures = cuda_architectures(files[expected.library]) if with_cuda else set()
    asked = asked_architectures() if name == "libflash-mla" else set()
    if architectures != asked:
        yield f"holds CUDA architectures {sorted(architectures)}, not {sorted(asked)}"

    for filename, content in files.items():
        for found in set(BUILD_PATHS.findall(content)):
            yield f"{filename} holds a path of the build machine: {found.decode()}"

    yield from wrong_metadata(email.message_from_bytes(files[f"{info}/METADATA"]), expected)
    texts = {Path(filename).name for filename in files if f"{info}/licenses/" in filename}
    for text in expected.licenses - texts:
        yield f"lacks the license {text}"
    if name == "libflash-mla":
        components = {Path(file).name.split("-")[0] for file in files if ".libs/" in file}
        if with_cuda:
            components.add("cuda-toolkit")
        if "90a" in architectures:
            components.add("cutlass")
        sboms = [content for file, content in files.items() if file.endswith(".cdx.json")]
        yield from wrong_sboms(sboms, components)


def wrong_tags(tags: set[str], manylinux: bool) -> Iterator[str]:
    """py3-none, and a manylinux that is old enough for where the wheel was built."""
    libc = tuple(int(number) for number in platform.libc_ver()[1].split("."))
    # Debian 11 has 2.31, and gives 2_28 as manylinux's images do.
    newest = (2, 28) if manylinux or libc <= (2, 31) else libc
    for tag in tags:
        found = re.fullmatch(r"py3-none-manylinux_(\d+)_(\d+)_(x86_64|aarch64)", tag)
        if not found and not tag.startswith("py3-none-manylinux2014_"):
            yield f"has the tag {tag}, not py3-none-manylinux_*"
        elif found and (int(found[1]), int(found[2])) > newest:
            yield f"has the tag {tag}, newer than {'.'.join(map(str, newest))}"


def exported(elf: ELFFile) -> set[str]:
    """The dynamic symbols that a library defines, demangled."""
    symbols = elf.get_section_by_name(".dynsym").iter_symbols()
    defined = [s.name for s in symbols if s.name and s.entry.st_shndx != "SHN_UNDEF"]
    argv = ["c++filt", "--", *defined] if defined else ["true"]
    return set(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines())


def cuda_architectures(library: bytes) -> set[str]:
    """What code a library holds: "90a" as machine code, "80-virtual" as PTX."""
    in_wheel = Path(sysconfig.get_path("purelib"), "nvidia/cu13/bin/cuobjdump")
    cuobjdump = shutil.which("cuobjdump") or str(in_wheel)
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(library)
        file.flush()
        argv = [cuobjdump, file.name]
        out = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    entries = re.findall(r"Fatbin (elf|ptx) code:\n=+\narch = sm_(\w+)", out)
    return {arch if kind == "elf" else f"{arch}-virtual" for kind, arch in entries}


def asked_architectures() -> set[str]:
    """Those of the environment, as for the build, or the default."""
    if os.environ.get("FLASH_MLA_CUDA") == "OFF":
        return set()
    line = r'set\(FLASH_MLA_CUDA_ARCHITECTURES "([^"]+)"'
    default = re.search(line, (CORE / "CMakeLists.txt").read_text())
    assert default
    return set((os.environ.get("FLASH_MLA_CUDA_ARCHITECTURES") or default[1]).split(";"))


def wrong_metadata(metadata: email.message.Message, expected: Expected) -> Iterator[str]:
    for key, value in {
        "Version": VERSION,
        "License-Expression": "MIT",
        "Requires-Python": ">=3.10",
        "Description-Content-Type": "text/markdown",
    }.items():
        if metadata[key] != value:
            yield f"METADATA: {key} is {metadata[key]}, not {value}"
    requires = set(metadata.get_all("Requires-Dist", []))
    if requires != expected.requires:
        yield f"METADATA: Requires-Dist is {requires}, not {expected.requires}"
    if not metadata["Summary"] or not metadata.get_payload():
        yield "METADATA: Summary or description is missing"


def wrong_sboms(sboms: list[bytes], components: set[str]) -> Iterator[str]:
    """Valid CycloneDX, and together they name what the wheel brings."""
    named = set()
    for content in sboms:
        document = json.loads(content)
        schema = SchemaVersion.from_version(document["specVersion"])
        if invalid := JsonStrictValidator(schema).validate_str(content.decode()):
            yield f"an SBOM is invalid: {invalid}"
        named |= {component["name"] for component in document.get("components", [])}
    for component in components:
        if not any(name.startswith(component) for name in named):
            yield f"no SBOM names {component}, but {sorted(named)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--manylinux", action="store_true")
    parser.add_argument("wheels", nargs="+", type=Path)
    arguments = parser.parse_args()
    failed = 0
    for path in arguments.wheels:
        found = list(problems(path, arguments.manylinux))
        failed += bool(found)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, {'WRONG' if found else 'right'}")
        for problem in found:
            print(f"    {problem}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
