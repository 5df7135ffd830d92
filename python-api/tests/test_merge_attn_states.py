"""Merging attention over two disjoint sets of keys."""

from __future__ import annotations

import float64_reference
import pytest
import torch
from backends import Backend
from cases import normal
from tolerances import MERGE_ROUNDING, assert_bitwise_equal
from torch import Tensor

import flash_mla

INF = float("inf")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def parts(
    gen: torch.Generator, backend: Backend, n: int, h: int, d: int, dtype: torch.dtype
) -> list[Tensor]:
    return [
        x.to(backend.device)
        for _ in range(2)
        for x in (normal(gen, n, h, d, std=0.1).to(dtype), normal(gen, n, h, std=3.0))
    ]


def check(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    out, lse = flash_mla.merge_attn_states(*inputs)
    expected_out, expected_lse = float64_reference.merge_attn_states(
        *(x.cpu().double() for x in inputs)
    )
    assert out.dtype == inputs[0].dtype
    assert lse.dtype == torch.float32
    # The two weights add up to 1, so the error is that of values of size |out_a| + |out_b|.
    size = sum(x.cpu().double().nan_to_num().abs() for x in inputs[::2])
    error = (out.cpu().double() - expected_out).abs()
    allowed = MERGE_ROUNDING[out.dtype] * expected_out.abs() + 2.0**-20 * size
    allowed += 2.0**-25  # half of the smallest step of fp16
    assert (error <= allowed).all()
    infinite = expected_lse.isinf()
    assert torch.equal(lse.cpu()[infinite].double(), expected_lse[infinite])
    off = (lse.cpu().double() - expected_lse)[~infinite].abs()
    # fp32 rounding of numbers of size |lse_a| + |lse_b|; their logarithm may be close to 0
    assert (off <= 2.0**-20 * (1 + expected_lse[~infinite].abs())).all()
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 512), (5, 9, 512), (7, 128, 512), (3, 16, 128), (2, 3, 8)]
)
def test_agrees_with_float64(
    backend: Backend, gen: torch.Generator, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    check(parts(gen, backend, *shape, dtype))


@pytest.mark.parametrize("empty", [INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_part_leaves_the_other_as_it_is(
    backend: Backend, gen: torch.Generator, dtype: torch.dtype, empty: float
) -> None:
    """Its out is not read, be it NaN."""
    out_a, lse_a, out_b, lse_b = parts(gen, backend, 4, 3, 512, dtype)
    lse_b.fill_(empty)
    out_b.fill_(torch.nan)
    for inputs in ((out_a, lse_a, out_b, lse_b), (out_b, lse_b, out_a, lse_a)):
        out, lse = flash_mla.merge_attn_states(*inputs)
        assert_bitwise_equal(out, out_a)
        assert_bitwise_equal(lse, lse_a)


@pytest.mark.parametrize("first", [INF, -INF])
@pytest.mark.parametrize("second", [INF, -INF])
def test_two_empty_parts_give_zero_and_infinite_lse(
    backend: Backend, gen: torch.Generator, first: float, second: float
) -> None:
    out_a, lse_a, out_b, lse_b = parts(gen, backend, 2, 3, 64, torch.bfloat16)
    out, lse = flash_mla.merge_attn_states(
        out_a.fill_(torch.nan), lse_a.fill_(first), out_b.fill_(torch.nan), lse_b.fill_(second)
    )
    assert (out == 0).all()
    assert (lse == INF).all()


def test_empty_parts_anywhere(backend: Backend, gen: torch.Generator) -> None:
    inputs = parts(gen, backend, 50, 9, 512, torch.bfloat16)
    for lse in inputs[1::2]:
        which = torch.rand(lse.shape, generator=gen).to(lse.device)
        lse[which < 0.2] = INF
        lse[which > 0.8] = -INF
    check(inputs)


def test_far_apart_and_huge_lse_do_not_overflow(backend: Backend, gen: torch.Generator) -> None:
    out_a, lse_a, out_b, lse_b = parts(gen, backend, 3, 2, 512, torch.float32)
    for a, b in ((1e4, -1e4), (-1e4, 1e4), (3e4, 3e4), (-3e4, -3e4)):
        check([out_a, lse_a.fill_(a), out_b, lse_b.fill_(b)])


def test_lse_may_have_any_strides(backend: Backend, gen: torch.Generator) -> None:
    """As decode gives it: heads before tokens."""
    out_a, lse_a, out_b, lse_b = parts(gen, backend, 6, 5, 512, torch.bfloat16)
    out, lse = flash_mla.merge_attn_states(out_a, lse_a, out_b, lse_b)
    swapped = [x.t().contiguous().t() for x in (lse_a, lse_b)]
    again, again_lse = flash_mla.merge_attn_states(out_a, swapped[0], out_b, swapped[1])
    assert_bitwise_equal(again, out)
    assert torch.equal(again_lse, lse)


def test_out_may_be_a_slice_of_wider_rows(backend: Backend, gen: torch.Generator) -> None:
    inputs = parts(gen, backend, 6, 5, 576, torch.bfloat16)
    inputs[0], inputs[2] = inputs[0][..., :512], inputs[2][..., :512]
    check(inputs)


def test_the_order_of_the_parts_does_not_matter(backend: Backend, gen: torch.Generator) -> None:
    out_a, lse_a, out_b, lse_b = parts(gen, backend, 20, 9, 128, torch.float32)
    one = check([out_a, lse_a, out_b, lse_b])
    other = check([out_b, lse_b, out_a, lse_a])
    # Either order may contract one product and not the other into a fused multiply-add.
    assert (one[0] - other[0]).abs().amax() <= 2.0**-22
    assert (one[1] - other[1]).abs().amax() <= 2.0**-20


def test_no_rows_give_empty_results(backend: Backend, gen: torch.Generator) -> None:
    out, lse = flash_mla.merge_attn_states(*parts(gen, backend, 0, 5, 512, torch.bfloat16))
    assert out.shape == (0, 5, 512)
    assert lse.shape == (0, 5)


def test_more_rows_than_a_grid_has_in_y(backend: Backend, gen: torch.Generator) -> None:
    """70,000: beyond 65,535. Most weights are near one half, so a mixed-up row shows."""
    out_a, lse_a, out_b, lse_b = parts(gen, backend, 70_000, 3, 16, torch.float32)
    out, lse = flash_mla.merge_attn_states(out_a, lse_a, out_b, lse_b)
    both = torch.stack([lse_a, lse_b]).double()
    weights = both.softmax(0)[..., None]
    expected = weights[0] * out_a + weights[1] * out_b
    # The same bounds as in `check`; values are below 1, |lse| is below 32.
    assert (out - expected).abs().amax() <= 2.0**-20
    assert (lse - both.logsumexp(0)).abs().amax() <= 2.0**-20 * 33
