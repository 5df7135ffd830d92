"""Sparse decode: every cache format, invalid indices, lengths, sinks, and the extra cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import Backend
from cases import Decode, case_id, pairwise, sparse_decode
from tolerances import (
    DECODE,
    DECODE_ROUNDED_K,
    Tolerance,
    assert_bitwise_equal,
    assert_lse_close,
    assert_out_close,
)

INF = float("inf")
FORMATS = ["v32_fp8", "v4_fp8", "v41_fp8", "bf16"]


def assert_agrees(inputs: Decode, tolerance: Tolerance = DECODE) -> None:
    out, lse = inputs.run()
    assert_out_close(out, inputs.expected_out, tolerance)
    assert_lse_close(lse, inputs.expected_lse, tolerance)


MATRIX = pairwise(
    lambda case: case["d_qk"] is None or case["kv_format"] == "bf16",
    kv_format=FORMATS,
    d_qk=[None, 512],
    b=[1, 3],
    s_q=[1, 2],
    h_q=[1, 3, 9, 63, 64, 126, 128],
    page_size=[1, 2, 3, 16, 64, 100, 256],
    topk=[1, 7, 64, 130],
    invalid=["none", "some", "all"],
    topk_length=["absent", "mixed", "zero", "full"],
    attn_sink=[None, (0.5,), (-INF, 1.0, INF)],
    layout=["contiguous", "strided"],
)


@pytest.mark.parametrize("case", MATRIX, ids=case_id)
def test_agrees_with_float64(backend: Backend, gen: torch.Generator, case: dict[str, Any]) -> None:
    topk, b = case["topk"], case["b"]
    lengths = {
        "absent": None,
        "mixed": [topk // 2, topk, 0][:b],
        "zero": [0] * b,
        "full": [topk] * b,
    }[case["topk_length"]]
    assert_agrees(sparse_decode(gen, backend.device, **(case | {"topk_length": lengths})))


EXTRA_MATRIX = pairwise(
    lambda case: case["extra_format"] != "v41_fp4" or case["kv_format"] == "v41_fp8",
    kv_format=FORMATS,
    extra_format=["same", "v41_fp4"],
    h_q=[1, 9, 64, 128],
    page_size=[2, 64],
    extra_page_size=[1, 3, 256],
    topk=[1, 64, 128],
    extra_topk=[5, 64, 200],
    invalid=["none", "some", "all"],
    lengths=["absent", "first", "extra", "both"],
    attn_sink=[None, (0.5, -INF, INF)],
    layout=["contiguous", "strided"],
)


@pytest.mark.parametrize("case", EXTRA_MATRIX, ids=case_id)
def test_an_extra_cache_joins_the_same_softmax(
    backend: Backend, gen: torch.Generator, case: dict[str, Any]
) -> None:
    extra_format = case["kv_format"] if case["extra_format"] == "same" else case["extra_format"]
    inputs = sparse_decode(
        gen,
        backend.device,
        b=2,
        s_q=2,
        h_q=case["h_q"],
        kv_format=case["kv_format"],
        page_size=case["page_size"],
        topk=case["topk"],
        invalid=case["invalid"],
        topk_length=[0, case["topk"]] if case["lengths"] in ("first", "both") else None,
        attn_sink=case["attn_sink"],
        extra=(extra_format, case["extra_page_size"], case["extra_topk"]),
        extra_topk_length=[3, 0] if case["lengths"] in ("extra", "both") else None,
        layout=case["layout"],
    )
    assert_agrees(inputs)


@pytest.mark.parametrize("kv_format", [*FORMATS, "v41_fp8 with v41_fp4"])
def test_long_lists(backend: Backend, gen: torch.Generator, kv_format: str) -> None:
    extra = ("v41_fp4", 2, 600) if "with" in kv_format else None
    inputs = sparse_decode(
        gen,
        backend.device,
        kv_format=kv_format.split()[0],
        num_pages=20,
        topk=2048,
        topk_length=[2048, 1500],
        extra=extra,
    )
    assert_agrees(inputs)
    out, lse = inputs.run(batch_invariant=True)
    assert_out_close(out, inputs.expected_out, DECODE)
    assert_lse_close(lse, inputs.expected_lse, DECODE)


@pytest.mark.parametrize("h_q", [1, 9, 128])
def test_v32_fp8_takes_any_float32_scale(backend: Backend, gen: torch.Generator, h_q: int) -> None:
    assert_agrees(
        sparse_decode(gen, backend.device, h_q=h_q, scales="any", topk=100), DECODE_ROUNDED_K
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("kv_format", ["v32_fp8", "v4_fp8", "v41_fp8"])
def test_a_packed_cache_comes_as_any_one_byte_dtype(
    backend: Backend, gen: torch.Generator, kv_format: str, dtype: torch.dtype
) -> None:
    inputs = sparse_decode(gen, backend.device, kv_format=kv_format)
    out, lse = inputs.run(k_cache=inputs.inputs["k_cache"].view(dtype))
    assert_out_close(out, inputs.expected_out, DECODE)
    assert_lse_close(lse, inputs.expected_lse, DECODE)


def test_sharp_softmax(backend: Backend, gen: torch.Generator) -> None:
    assert_agrees(sparse_decode(gen, backend.device, q_std=80, topk=300, invalid="none"))


def test_explicit_softmax_scale(backend: Backend, gen: torch.Generator) -> None:
    assert_agrees(sparse_decode(gen, backend.device, softmax_scale=0.11))


@pytest.mark.parametrize("kv_format", FORMATS)
def test_rows_without_keys_are_zero_with_infinite_lse(
    backend: Backend, gen: torch.Generator, kv_format: str
) -> None:
    for attn_sink in (None, (0.0, INF, -INF)):
        inputs = sparse_decode(
            gen, backend.device, kv_format=kv_format, invalid="all", attn_sink=attn_sink
        )
        out, lse = inputs.run()
        assert (out == 0).all()
        assert (lse == INF).all()


def test_an_empty_list_gives_rows_without_keys(backend: Backend, gen: torch.Generator) -> None:
    out, lse = sparse_decode(gen, backend.device, topk=0).run()
    assert (out == 0).all()
    assert (lse == INF).all()


def test_a_key_listed_twice_counts_twice(backend: Backend, gen: torch.Generator) -> None:
    inputs = sparse_decode(gen, backend.device, topk=8, invalid="none")
    once, _once_lse = inputs.run()
    indices = inputs.inputs["indices"]
    twice, twice_lse = inputs.run(indices=torch.cat([indices, indices], dim=-1))
    assert_out_close(twice, inputs.expected_out, DECODE)
    assert_lse_close(twice_lse, inputs.expected_lse + torch.tensor(2.0).log(), DECODE)
    assert_out_close(once, inputs.expected_out, DECODE)


def test_a_topk_length_beyond_the_list_is_the_whole_list(
    backend: Backend, gen: torch.Generator
) -> None:
    inputs = sparse_decode(gen, backend.device, topk=20, topk_length=[1000, 21])
    assert_agrees(inputs)


def test_a_sink_of_minus_infinity_changes_nothing(backend: Backend, gen: torch.Generator) -> None:
    inputs = sparse_decode(gen, backend.device)
    out, lse = inputs.run()
    sink = torch.full((16,), -INF, device=backend.device)
    with_sink, with_sink_lse = inputs.run(attn_sink=sink)
    assert_bitwise_equal(with_sink, out)
    assert_bitwise_equal(with_sink_lse, lse)


def test_a_sink_of_plus_infinity_zeroes_out_and_leaves_lse(
    backend: Backend, gen: torch.Generator
) -> None:
    inputs = sparse_decode(gen, backend.device)
    _, lse = inputs.run()
    sink = torch.full((16,), INF, device=backend.device)
    out, with_sink_lse = inputs.run(attn_sink=sink)
    assert (out == 0).all()
    assert_bitwise_equal(with_sink_lse, lse)


def test_a_huge_finite_sink_does_not_overflow(backend: Backend, gen: torch.Generator) -> None:
    """exp(sink) is not a float32 here."""
    assert_agrees(sparse_decode(gen, backend.device, attn_sink=(1e4, -1e4, 200.0)))


@pytest.mark.parametrize("kv_format", FORMATS)
def test_nan_of_one_list_stays_there(
    backend: Backend, gen: torch.Generator, kv_format: str
) -> None:
    """The last token is poisoned, and named by the second query of the first request alone."""
    inputs = sparse_decode(gen, backend.device, s_q=2, kv_format=kv_format, invalid="none")
    indices, cache = inputs.inputs["indices"], inputs.inputs["k_cache"]
    indices[0, 1, 5] = cache.shape[0] * cache.shape[1] - 1
    out, lse = inputs.run()
    assert out[0, 1].isnan().all()
    rest = [(0, 0), (1, 0), (1, 1)]
    for n, i in rest:
        assert_out_close(out[n, i], inputs.expected_out[n, i], DECODE)
        assert_lse_close(lse[n, :, i], inputs.expected_lse[n, :, i], DECODE)


def test_results_are_bitwise_the_same_from_run_to_run(
    backend: Backend, gen: torch.Generator
) -> None:
    inputs = sparse_decode(
        gen, backend.device, h_q=64, topk=300, attn_sink=(0.3,), extra=("v32_fp8", 2, 200)
    )
    first_out, first_lse = inputs.run()
    for _ in range(3):
        out, lse = inputs.run()
        assert_bitwise_equal(out, first_out)
        assert_bitwise_equal(lse, first_lse)


def test_offsets_beyond_2_to_the_31(backend: Backend, gen: torch.Generator) -> None:
    """A token whose first byte lies more than 2^31 bytes into the cache."""
    page_bytes = 64 * 656
    num_pages = 2**31 // page_bytes + 2
    try:
        storage = torch.empty(num_pages * page_bytes, dtype=torch.uint8, device=backend.device)
    except RuntimeError as reason:
        pytest.skip(f"no address space for a cache of 2 GiB: {reason}")
    cache = storage.view(num_pages, 64, 1, 656)
    inputs = sparse_decode(gen, backend.device, num_pages=1, topk=30, invalid="none")
    cache[-1] = inputs.inputs["k_cache"][0]
    out, lse = inputs.run(k_cache=cache, indices=inputs.inputs["indices"] + (num_pages - 1) * 64)
    assert_out_close(out, inputs.expected_out, DECODE)
    assert_lse_close(lse, inputs.expected_lse, DECODE)
