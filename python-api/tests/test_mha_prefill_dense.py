"""Dense prefill over sequences of different lengths: the forward. Gradients: test_autograd.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import Backend
from cases import case_id, pairwise
from mha_cases import Varlen, varlen
from tolerances import PREFILL, assert_bitwise_equal, assert_lse_close, assert_out_close

import flash_mla

INF = float("inf")

LENGTHS = {
    "one": ([1], [1]),
    "square": ([17], [17]),
    "blocks": ([64, 128], [64, 128]),
    "over_blocks": ([65, 129], [65, 129]),
    "more_keys": ([5, 40], [70, 41]),
    "fewer_keys": ([40, 3], [7, 1]),
    "no_keys": ([3, 4], [0, 9]),
    "no_queries": ([0, 6], [5, 6]),
    "mixed": ([9, 0, 1, 33], [33, 0, 90, 2]),
}

MATRIX = pairwise(
    dims=[(192, 128), (128, 128)],
    dtype=[torch.bfloat16, torch.float16],
    heads=[(1, 1), (3, 1), (9, 3), (16, 16), (16, 2), (63, 9), (128, 8)],
    lengths=list(LENGTHS),
    causal=[False, True],
    softmax_scale=[None, 0.2],
    layout=["contiguous", "packed", "transposed"],
)


def assert_agrees(case: Varlen) -> None:
    out, lse = case.run()
    expected_out, expected_lse = case.expected()
    assert out.dtype == case.q.dtype
    assert lse.dtype == torch.float32
    assert_out_close(out, expected_out, PREFILL)
    assert_lse_close(lse, expected_lse, PREFILL)


@pytest.mark.parametrize("case", MATRIX, ids=case_id)
def test_agrees_with_float64(backend: Backend, gen: torch.Generator, case: dict[str, Any]) -> None:
    q_lengths, kv_lengths = LENGTHS[case["lengths"]]
    arguments = {name: value for name, value in case.items() if name != "lengths"}
    assert_agrees(
        varlen(gen, backend.device, q_lengths=q_lengths, kv_lengths=kv_lengths, **arguments)
    )


def test_longer_sequences(backend: Backend, gen: torch.Generator) -> None:
    for causal in (False, True):
        case = varlen(gen, backend.device, q_lengths=[300, 2], kv_lengths=[700, 513], causal=causal)
        assert_agrees(case)


def test_sharp_softmax(backend: Backend, gen: torch.Generator) -> None:
    case = varlen(gen, backend.device, q_lengths=[40], kv_lengths=[300], q_std=30.0)
    assert_agrees(case)


def test_causal_rows_before_the_first_key_are_zero_with_infinite_lse(
    backend: Backend, gen: torch.Generator
) -> None:
    """Five queries and two keys: the mask ends bottom right, so three rows see nothing."""
    case = varlen(gen, backend.device, q_lengths=[5], kv_lengths=[2], causal=True)
    out, lse = case.run()
    assert (out[:3] == 0).all()
    assert (lse[:3] == INF).all()
    assert lse[3:].isfinite().all()


def test_lse_is_stored_head_major(backend: Backend, gen: torch.Generator) -> None:
    _, lse = varlen(gen, backend.device, q_lengths=[7, 2], kv_lengths=[7, 2]).run()
    assert lse.shape == (9, 4)
    assert lse.stride() == (1, 9)


def test_a_key_of_later_queries_does_not_reach_earlier_ones(
    backend: Backend, gen: torch.Generator
) -> None:
    for length in (5, 64, 65, 130):
        case = varlen(gen, backend.device, q_lengths=[length], kv_lengths=[length], causal=True)
        expected_out, expected_lse = case.expected()
        case.k[-1], case.v[-1] = torch.nan, torch.nan
        out, lse = case.run()
        assert_out_close(out[:-1], expected_out[:-1], PREFILL)
        assert_lse_close(lse[:-1], expected_lse[:-1], PREFILL)


def test_nan_of_one_sequence_stays_there(backend: Backend, gen: torch.Generator) -> None:
    case = varlen(gen, backend.device, q_lengths=[3, 4, 5], kv_lengths=[9, 8, 7])
    expected_out, expected_lse = case.expected()
    case.k[9:17], case.v[9:17] = torch.nan, torch.nan
    out, lse = case.run()
    for rows in (slice(0, 3), slice(7, 12)):
        assert_out_close(out[rows], expected_out[rows], PREFILL)
        assert_lse_close(lse[rows], expected_lse[rows], PREFILL)


def test_packed_forms_equal_the_plain_one(backend: Backend, gen: torch.Generator) -> None:
    case = varlen(gen, backend.device, q_lengths=[9, 20], kv_lengths=[9, 20], causal=True)
    out, lse = case.run()
    cu_seqlens, _, longest, _ = case.lengths
    kv = torch.cat([case.k, case.v], dim=-1)
    kv_packed = flash_mla.flash_attn_varlen_kvpacked_func(
        case.q, kv, cu_seqlens, cu_seqlens, longest, longest, 192, causal=True
    )
    qkv = torch.cat([case.q, case.k, case.v], dim=-1)
    qkv_packed = flash_mla.flash_attn_varlen_qkvpacked_func(
        qkv, cu_seqlens, longest, 192, causal=True
    )
    for packed_out, packed_lse in (kv_packed, qkv_packed):
        assert_bitwise_equal(packed_out, out)
        assert_bitwise_equal(packed_lse, lse)


def test_equal_lengths_without_is_varlen(backend: Backend, gen: torch.Generator) -> None:
    case = varlen(gen, backend.device, q_lengths=[20, 20], kv_lengths=[30, 30])
    out, lse = case.run(is_varlen=False)
    expected_out, expected_lse = case.expected()
    assert_out_close(out, expected_out, PREFILL)
    assert_lse_close(lse, expected_lse, PREFILL)


def test_longest_lengths_may_be_overestimated(backend: Backend, gen: torch.Generator) -> None:
    case = varlen(gen, backend.device, q_lengths=[3, 40], kv_lengths=[9, 50], causal=True)
    cu_q, cu_kv, max_q, max_kv = case.lengths
    out, _ = flash_mla.flash_attn_varlen_func(
        case.q, case.k, case.v, cu_q, cu_kv, max_q + 100, max_kv + 1000, causal=True
    )
    assert_bitwise_equal(out, case.run()[0])


def test_no_queries_give_empty_results(backend: Backend, gen: torch.Generator) -> None:
    out, lse = varlen(gen, backend.device, q_lengths=[0, 0], kv_lengths=[3, 0]).run()
    assert out.shape == (0, 4, 128)
    assert lse.shape == (0, 4)


def test_results_are_bitwise_the_same_from_run_to_run(
    backend: Backend, gen: torch.Generator
) -> None:
    case = varlen(gen, backend.device, q_lengths=[90, 30], kv_lengths=[200, 30], heads=(16, 2))
    first_out, first_lse = case.run()
    for _ in range(3):
        out, lse = case.run()
        assert_bitwise_equal(out, first_out)
        assert_bitwise_equal(lse, first_lse)
