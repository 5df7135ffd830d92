"""The package itself: import, version, configuration, and the variables of the environment."""

from __future__ import annotations

import importlib.resources
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import flash_mla

README = Path(__file__).resolve().parents[2] / "README.md"

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


@pytest.mark.skipif(not README.exists(), reason="the tests run without the repository")
def test_the_readmes_example_runs() -> None:
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code.group(1), names)
    assert names["out"].shape == (2, 1, 16, 512)
    assert names["out"].isfinite().all()
