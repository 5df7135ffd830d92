"""The package itself: import, version, configuration, and the variables of the environment."""

from __future__ import annotations

import importlib.resources
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import flash_mla

README = Path(__file__).resolve().parents[2] / "README.md"
IN_REPOSITORY = (README.parent / "kernels-core").exists()  # some runners have the tests alone

DECODE = """
import torch, flash_mla
q = torch.ones(1, 1, 4, 576, dtype=torch.bfloat16)
cache = torch.ones(2, 64, 1, 576, dtype=torch.bfloat16)
table = torch.zeros(1, 2, dtype=torch.int32)
seqlens = torch.ones(1, dtype=torch.int32)
try:
    flash_mla.flash_mla_with_kvcache(q, cache, table, seqlens, 512, flash_mla.get_mla_metadata()[0])
except (ValueError, NotImplementedError) as error:
    print(type(error).__name__, error)
"""


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_version_is_a_release_number() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", flash_mla.__version__)


def test_type_hints_are_shipped() -> None:
    assert importlib.resources.files("flash_mla").joinpath("py.typed").is_file()


def test_every_public_name_has_a_docstring() -> None:
    for name in flash_mla.__all__:
        thing = getattr(flash_mla, name)
        assert name.startswith("__") or thing.__doc__, f"{name} has no docstring"


def test_the_command_prints_the_configuration() -> None:
    result = run_python("-m", "flash_mla")
    assert result.returncode == 0, result.stderr
    for word in (flash_mla.__version__, "torch", "cpu", "mla_decode_dense", "mha_prefill_dense"):
        assert word in result.stdout


def test_selection_is_logged_when_asked_for() -> None:
    result = run_python("-c", DECODE, FLASH_MLA_LOG="select")
    assert result.returncode == 0, result.stderr
    assert "mla_decode_dense" in result.stdout + result.stderr
    assert not run_python("-c", DECODE).stderr


def test_a_kernel_that_does_not_exist_cannot_be_forced() -> None:
    result = run_python("-c", DECODE, FLASH_MLA_KERNEL="no_such_kernel")
    assert "no_such_kernel" in result.stdout
    assert "Error" in result.stdout


def test_a_row_can_be_forced_by_its_name() -> None:
    result = run_python("-c", DECODE, FLASH_MLA_KERNEL="cpu")
    assert result.returncode == 0, result.stderr
    assert "Error" not in result.stdout


def test_import_needs_no_gpu() -> None:
    result = run_python("-c", "import flash_mla", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """A folder with copies of both packages, side by side as wheels lie, for a test to change."""
    core = pytest.importorskip("libflash_mla", reason="the core is not installed as a wheel")
    for module in (flash_mla, core):
        package = Path(module.__file__).parent
        vendored = package.with_name(f"{package.name}.libs")  # where auditwheel puts libgomp
        for folder in filter(Path.exists, (package, vendored)):
            shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path


def change_core_version(copies: Path, part: int) -> str:
    """Rewrites the version inside the core, one off in a part, and returns it."""
    library = copies / "libflash_mla/lib64/libflash_mla.so"
    numbers = [int(x) for x in flash_mla.__version__.split(".")]
    numbers[part] ^= 1  # of the same length
    other = ".".join(map(str, numbers))
    mine, others = (b"\0" + x.encode() + b"\0" for x in (flash_mla.__version__, other))
    content = library.read_bytes()
    assert content.count(mine) == 1
    library.write_bytes(content.replace(mine, others))
    return other


def test_a_core_of_another_minor_version_is_refused(copies: Path) -> None:
    other = change_core_version(copies, part=1)
    result = run_python("-c", "import flash_mla", PYTHONPATH=str(copies))
    assert result.returncode != 0
    assert f"ImportError: flash_mla {flash_mla.__version__} needs" in result.stderr
    assert f"found {other}" in result.stderr
    assert f"pip install 'libflash-mla=={flash_mla.__version__}'" in result.stderr


def test_a_core_of_another_patch_release_serves_and_is_shown(copies: Path) -> None:
    other = change_core_version(copies, part=2)
    result = run_python("-m", "flash_mla", PYTHONPATH=str(copies))
    assert result.returncode == 0, result.stderr
    assert re.search(rf"^flash_mla +{re.escape(flash_mla.__version__)}$", result.stdout, re.M)
    assert re.search(rf"^libflash_mla +{re.escape(other)}$", result.stdout, re.M)


def test_a_core_that_is_not_there_is_named(copies: Path) -> None:
    (copies / "libflash_mla/lib64/libflash_mla.so").unlink()
    result = run_python("-c", "import flash_mla", PYTHONPATH=str(copies))
    assert result.returncode != 0
    assert "ImportError: flash_mla" in result.stderr
    assert "libflash_mla.so: cannot open shared object file" in result.stderr
    assert "pip install 'libflash-mla==" in result.stderr


def test_a_core_without_a_function_that_is_needed_is_refused(copies: Path) -> None:
    library = copies / "libflash_mla/lib64/libflash_mla.so"
    content = library.read_bytes()
    assert b"7cpu_isaEv" in content
    library.write_bytes(content.replace(b"7cpu_isaEv", b"7cpu_isbEv"))
    result = run_python("-c", "import flash_mla", PYTHONPATH=str(copies))
    assert result.returncode != 0
    assert "ImportError: flash_mla" in result.stderr
    assert "undefined symbol: _ZN9flash_mla2v07cpu_isaEv" in result.stderr
    assert "pip install 'libflash-mla==" in result.stderr


@pytest.mark.skipif(not README.exists(), reason="the tests run without the repository")
def test_the_readmes_example_runs() -> None:
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code.group(1), names)
    assert names["out"].shape == (2, 1, 16, 512)
    assert names["out"].isfinite().all()


@pytest.mark.skipif(not IN_REPOSITORY, reason="the tests run without the repository")
def test_the_readmes_messages_are_those_of_the_sources() -> None:
    folders = ("kernels-core/src", "kernels-core/cmake", "python-api/src", "python-api/csrc")
    files = (path for name in folders for path in (README.parent / name).rglob("*.*"))
    text = "".join(path.read_text() for path in files if path.suffix != ".pyc" and path.is_file())
    text = re.sub(r'"\s*f?"', "", text)  # literals that go on in the next line
    section = README.read_text().partition("## Troubleshooting")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    assert len(rows) > 5
    for row in rows:
        for part in re.findall("[^`…]+", row.replace("`, `", "…")):
            assert part.strip() in text or row.endswith(("(pip)", "(CMake)")), row


@pytest.mark.skipif(not IN_REPOSITORY, reason="the tests run without the repository")
def test_the_readmes_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / link).exists(), link
