"""The README's support matrix says which kernels serve a call on this machine.

That the table is the one that CMake's variants give is for ci/support_matrix.py; here each of its
lines is called.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import BACKENDS, Backend, parameters
from cases import dense_decode, normal, sparse_decode
from mha_cases import varlen

import flash_mla

README = Path(__file__).resolve().parents[2] / "README.md"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

pytestmark = [
    pytest.mark.skipif(not README.exists(), reason="the tests run without the repository"),
    pytest.mark.parametrize(
        "backend", parameters(b for b in BACKENDS if not b.kernel), indirect=True, scope="session"
    ),
]


def lines_of_the_readme() -> list[dict[str, str]]:
    """By column."""
    table = re.search(r"<!-- support matrix: .*?\n(.*?)<!--", README.read_text(), re.DOTALL)
    assert table is not None
    header, _, *lines = ([x.strip() for x in row.split("|")[1:-1]] for row in table[1].splitlines())
    return [dict(zip(header, line, strict=True)) for line in lines]


def combinations() -> list[tuple[str, str, str, str, dict[str, str]]]:
    """(operator, cache format, q, d_qk, the row by machine)."""
    return [
        (line["operator"], *axes, line)
        for line in (lines_of_the_readme() if README.exists() else [])
        for axes in itertools.product(*(line[x].split(", ") for x in ("cache format", "q", "d_qk")))
    ]


def machine(backend: Backend) -> str:
    if backend.device == "cpu":
        return "CPU"
    major = torch.cuda.get_device_capability()[0]
    return {9: "Hopper (9.0)", 10: "Blackwell (10.x)"}.get(major, "8.x, 12.x")


def prefill(gen: torch.Generator, device: str, dtype: torch.dtype, d_qk: int, grad: bool) -> None:
    case = varlen(gen, device, q_lengths=[3], kv_lengths=[5], dims=(d_qk, 128), dtype=dtype)
    case.q.requires_grad_(grad)
    out, _ = case.run()
    if grad:
        out.sum().backward()


def call(
    operator: str, kv_format: str, q: str, d_qk: int, gen: torch.Generator, device: str
) -> Callable[[], Any]:
    if operator == "dense decode":
        return dense_decode(
            gen, device, lengths=[70, 3], kv_format=kv_format, d_qk=d_qk, fp8_q=q == "e4m3"
        ).run
    if operator == "sparse decode":
        return sparse_decode(gen, device, kv_format=kv_format, d_qk=d_qk).run
    if operator == "sparse prefill":
        queries, kv = (normal(gen, 3, h, d_qk, std=0.1).bfloat16().to(device) for h in (16, 1))
        indices = torch.zeros(3, 1, 64, dtype=torch.int32, device=device)
        return lambda: flash_mla.flash_mla_sparse_fwd(queries, kv, indices, 0.05)
    if operator.startswith("dense prefill"):
        return lambda: prefill(gen, device, DTYPES[q], d_qk, "backward" in operator)
    if operator == "merge":
        out = normal(gen, 3, 4, 512, std=0.1).to(device, DTYPES[q])
        lse = normal(gen, 3, 4, std=1.0).to(device)
        return lambda: flash_mla.merge_attn_states(out, lse, out, lse)
    assert operator == "KV cache", operator
    cache = flash_mla.kv_cache_empty(kv_format, 2, 64, device=device)
    return lambda: flash_mla.kv_cache_unpack(cache, kv_format)


@pytest.mark.parametrize(
    "operator, kv_format, q, d_qk, rows",
    [pytest.param(*x, id=", ".join(filter(None, x[:4]))) for x in combinations()],
)
def test_the_row_of_the_table_serves(
    backend: Backend,
    operator: str,
    kv_format: str,
    q: str,
    d_qk: str,
    rows: dict[str, str],
    gen: torch.Generator,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = call(operator, kv_format, q, int(d_qk or 0), gen, backend.device)
    row = rows[machine(backend)]
    if row == "–":
        with pytest.raises(NotImplementedError, match="no kernel"):
            run()
        return
    monkeypatch.setenv("FLASH_MLA_LOG", "select")
    capfd.readouterr()
    run()
    chosen = re.findall(r"(\w+) -> ([a-z]+\d*)", capfd.readouterr().err)
    assert chosen
    assert {name for _, name in chosen} == {row}
