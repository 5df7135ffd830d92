"""Dense decode over float8 caches: fp8 with one scale, and v32_fp8 with a scale for each tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import Backend
from cases import case_id, dense_decode, pairwise
from tolerances import (
    DECODE,
    DECODE_ROUNDED_K,
    assert_bitwise_equal,
    assert_lse_close,
    assert_out_close,
)
from torch import Tensor

LENGTHS = {
    "none": [0],
    "below_page": [31],
    "page": [32, 64],
    "over_page": [33, 65],
    "mixed": [200, 0, 1, 64],
}

FP8_MATRIX = pairwise(
    d_qk=[576, 512],
    heads=[(1, 1), (9, 1), (16, 2), (63, 3), (64, 8), (128, 1)],
    page_size=[1, 16, 32, 64, 256],
    s_q=[1, 3],
    lengths=list(LENGTHS),
    causal=[False, True],
    fp8_q=[False, True],
    descales=["none", "one", "per_request"],
    layout=["contiguous", "strided", "transposed"],
)


@pytest.mark.parametrize("case", FP8_MATRIX, ids=case_id)
def test_fp8_agrees_with_float64(
    backend: Backend, gen: torch.Generator, case: dict[str, Any]
) -> None:
    changes = {"lengths": LENGTHS[case["lengths"]], "kv_format": "fp8"}
    inputs = dense_decode(gen, backend.device, **(case | changes))
    out, lse = inputs.run()
    assert out.dtype == torch.bfloat16
    assert_out_close(out, inputs.expected_out, DECODE)
    assert_lse_close(lse, inputs.expected_lse, DECODE)


V32_MATRIX = pairwise(
    heads=[(1, 1), (3, 1), (9, 1), (63, 1), (126, 1), (128, 1)],
    page_size=[1, 2, 32, 64, 192],
    s_q=[1, 2, 5],
    lengths=list(LENGTHS),
    causal=[False, True],
    softmax_scale=[None, 0.07],
    scales=["power_of_two", "any"],
    layout=["contiguous", "strided", "transposed"],
)


@pytest.mark.parametrize("case", V32_MATRIX, ids=case_id)
def test_v32_fp8_agrees_with_float64(
    backend: Backend, gen: torch.Generator, case: dict[str, Any]
) -> None:
    changes = {"lengths": LENGTHS[case["lengths"]], "kv_format": "v32_fp8"}
    inputs = dense_decode(gen, backend.device, **(case | changes))
    out, lse = inputs.run(is_fp8_kvcache=True)
    tolerance = DECODE if case["scales"] == "power_of_two" else DECODE_ROUNDED_K
    assert out.dtype == torch.bfloat16
    assert_out_close(out, inputs.expected_out, tolerance)
    assert_lse_close(lse, inputs.expected_lse, tolerance)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_v32_fp8_comes_as_any_one_byte_dtype(
    backend: Backend, gen: torch.Generator, dtype: torch.dtype
) -> None:
    inputs = dense_decode(gen, backend.device, lengths=[70, 5], kv_format="v32_fp8")
    out, lse = inputs.run(k_cache=inputs.inputs["k_cache"].view(dtype))
    assert_out_close(out, inputs.expected_out, DECODE)
    assert_lse_close(lse, inputs.expected_lse, DECODE)


@pytest.mark.parametrize("kv_format", ["fp8", "v32_fp8"])
def test_long_sequences(backend: Backend, gen: torch.Generator, kv_format: str) -> None:
    inputs = dense_decode(
        gen, backend.device, lengths=[4500, 70], s_q=2, kv_format=kv_format, causal=True
    )
    for batch_invariant in (False, True):
        out, lse = inputs.run(batch_invariant=batch_invariant)
        assert_out_close(out, inputs.expected_out, DECODE)
        assert_lse_close(lse, inputs.expected_lse, DECODE)


@pytest.mark.parametrize("kv_format", ["fp8", "v32_fp8"])
def test_a_key_of_later_queries_does_not_reach_earlier_ones(
    backend: Backend, gen: torch.Generator, kv_format: str
) -> None:
    def edit(kv: Tensor, table: Tensor) -> None:
        kv[int(table[0, 1]), 9] = torch.nan  # key 73, the last one

    inputs = dense_decode(
        gen, backend.device, lengths=[74], s_q=3, causal=True, kv_format=kv_format, edit_cache=edit
    )
    out, lse = inputs.run()
    assert_out_close(out[:, :-1], inputs.expected_out[:, :-1], DECODE)
    assert_lse_close(lse[..., :-1], inputs.expected_lse[..., :-1], DECODE)


@pytest.mark.parametrize("kv_format", ["fp8", "v32_fp8"])
def test_a_page_outside_the_pool_masks_its_tokens(
    backend: Backend, gen: torch.Generator, kv_format: str
) -> None:
    def edit(table: Tensor, num_pages: int) -> None:
        table[0, 0], table[0, 1], table[1, 0] = num_pages, -1, 2**31 - 1

    inputs = dense_decode(
        gen, backend.device, lengths=[200, 60], s_q=2, kv_format=kv_format, edit_table=edit
    )
    out, lse = inputs.run()
    assert (out[1] == 0).all()
    assert (lse[1] == torch.inf).all()
    assert_out_close(out, inputs.expected_out, DECODE)
    assert_lse_close(lse, inputs.expected_lse, DECODE)


def test_a_descale_of_one_is_no_descale(backend: Backend, gen: torch.Generator) -> None:
    inputs = dense_decode(gen, backend.device, lengths=[70, 3], kv_format="fp8", fp8_q=True)
    out, lse = inputs.run()
    one = torch.ones(1, device=backend.device)
    again, again_lse = inputs.run(descale_q=one, descale_k=one)
    assert_bitwise_equal(again, out)
    assert_bitwise_equal(again_lse, lse)


@pytest.mark.parametrize("kv_format", ["bf16", "v32_fp8"])
def test_a_descale_is_a_factor_whatever_the_dtype(
    backend: Backend, gen: torch.Generator, kv_format: str
) -> None:
    """Halves are exact in bf16: logits as by half the softmax_scale, and V half as large."""
    inputs = dense_decode(gen, backend.device, lengths=[70, 3], kv_format=kv_format)
    half = torch.full((1,), 0.5, device=backend.device)
    wanted, wanted_lse = inputs.run(softmax_scale=0.5 * 576**-0.5)
    with_q, with_q_lse = inputs.run(descale_q=half)
    with_k, with_k_lse = inputs.run(descale_k=half)
    assert_bitwise_equal(with_q, wanted)
    assert_bitwise_equal(with_q_lse, wanted_lse)
    assert_bitwise_equal(with_k, wanted / 2)
    assert_bitwise_equal(with_k_lse, wanted_lse)


def test_float8_queries_are_not_rounded_further(backend: Backend, gen: torch.Generator) -> None:
    """The same values as bf16 queries: float8 is a subset of bf16, so only the dtype differs."""
    inputs = dense_decode(gen, backend.device, lengths=[300], kv_format="fp8", fp8_q=True)
    out, lse = inputs.run()
    wide, wide_lse = inputs.run(q=inputs.inputs["q"].to(torch.bfloat16))
    for result, row in ((out, lse), (wide, wide_lse)):
        assert_out_close(result, inputs.expected_out, DECODE)
        assert_lse_close(row, inputs.expected_lse, DECODE)
