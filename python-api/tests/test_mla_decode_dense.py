"""Dense decode over bf16 and fp16 caches: results, masks, and what must never be read."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch
from backends import Backend
from cases import case_id, dense_decode, pairwise
from tolerances import DECODE, assert_bitwise_equal, assert_lse_close, assert_out_close
from torch import Tensor

import flash_mla

HEADS = [
    (1, 1), (3, 1), (9, 1), (16, 2), (20, 1), (48, 1), (63, 1), (9, 3), (64, 8), (8, 8), (126, 3),
    (128, 1), (128, 4), (129, 1),
]  # fmt: skip
PAGE_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 512]


def lengths_for(kind: str, page_size: int) -> list[int]:
    return {
        "none": [0],
        "one": [1],
        "below_page": [page_size - 1],
        "page": [page_size],
        "over_page": [page_size + 1],
        "mixed": [2 * page_size + 3, 0, 1, 130, page_size],
    }[kind]


MATRIX = pairwise(
    kv_format=["bf16", "fp16"],
    d_qk=[576, 512],
    heads=HEADS,
    page_size=PAGE_SIZES,
    s_q=[1, 2, 5, 16],
    lengths=["none", "one", "below_page", "page", "over_page", "mixed"],
    causal=[False, True],
    softmax_scale=[None, 0.07],
    layout=["contiguous", "strided", "transposed"],
)


@pytest.mark.parametrize("case", MATRIX, ids=case_id)
def test_agrees_with_float64(backend: Backend, gen: torch.Generator, case: dict[str, Any]) -> None:
    lengths = lengths_for(case["lengths"], case["page_size"])
    inputs = dense_decode(gen, backend.device, **(case | {"lengths": lengths}))
    out, lse = inputs.run()
    assert out.dtype == inputs.out_dtype
    assert lse.dtype == torch.float32
    assert_out_close(out, inputs.expected_out, DECODE)
    assert_lse_close(lse, inputs.expected_lse, DECODE)


@pytest.mark.parametrize("kv_format", ["bf16", "fp16"])
def test_long_sequences_and_uneven_batches(
    backend: Backend, gen: torch.Generator, kv_format: str
) -> None:
    inputs = dense_decode(
        gen, backend.device, lengths=[5000, 3, 0, 1025, 4096], s_q=2, heads=(8, 1),
        kv_format=kv_format, causal=True,
    )  # fmt: skip
    for batch_invariant in (False, True):
        out, lse = inputs.run(batch_invariant=batch_invariant)
        assert_out_close(out, inputs.expected_out, DECODE)
        assert_lse_close(lse, inputs.expected_lse, DECODE)


def test_sharp_softmax(backend: Backend, gen: torch.Generator) -> None:
    inputs = dense_decode(gen, backend.device, lengths=[700, 333], heads=(16, 1), q_std=80)
    out, lse = inputs.run()
    assert_out_close(out, inputs.expected_out, DECODE)
    assert_lse_close(lse, inputs.expected_lse, DECODE)


def test_huge_logits_do_not_overflow(backend: Backend, gen: torch.Generator) -> None:
    """Logits in the thousands: exp() of any but the largest overflows or vanishes in fp32."""
    inputs = dense_decode(gen, backend.device, lengths=[200], heads=(16, 1), q_std=20000)
    out, lse = inputs.run()
    assert out.isfinite().all()
    assert_lse_close(lse, inputs.expected_lse, DECODE)


def test_rows_without_keys_are_zero_with_infinite_lse(
    backend: Backend, gen: torch.Generator
) -> None:
    """Two keys and five causal queries: the first three end before the first key."""
    inputs = dense_decode(gen, backend.device, lengths=[2, 0], s_q=5, causal=True)
    out, lse = inputs.run()
    assert (out[0, :3] == 0).all()
    assert (lse[0, :, :3] == torch.inf).all()
    assert (out[1] == 0).all()
    assert (lse[1] == torch.inf).all()
    assert_out_close(out, inputs.expected_out, DECODE)


@pytest.mark.parametrize("page", [-1, -(2**31), 2**31 - 1, "num_pages"])
def test_a_page_outside_the_pool_masks_its_tokens(
    backend: Backend, gen: torch.Generator, page: int | str
) -> None:
    def edit(table: Tensor, num_pages: int) -> None:
        table[0, 1] = num_pages if page == "num_pages" else int(page)

    inputs = dense_decode(
        gen, backend.device, lengths=[70, 20], page_size=32, s_q=2, causal=True, edit_table=edit
    )
    out, lse = inputs.run()
    assert_out_close(out, inputs.expected_out, DECODE)
    assert_lse_close(lse, inputs.expected_lse, DECODE)


def test_a_request_whose_pages_are_all_outside_the_pool_has_no_keys(
    backend: Backend, gen: torch.Generator
) -> None:
    inputs = dense_decode(
        gen, backend.device, lengths=[70, 20], edit_table=lambda table, _: table[0].fill_(-1)
    )
    out, lse = inputs.run()
    assert (out[0] == 0).all()
    assert (lse[0] == torch.inf).all()
    assert_out_close(out, inputs.expected_out, DECODE)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("columns", [0, 1, 3])
def test_keys_past_the_last_column_of_the_table_are_masked(
    backend: Backend, gen: torch.Generator, columns: int, causal: bool
) -> None:
    """A causal query keeps its place: it is counted from the length, not from the table."""

    def edit(table: Tensor, num_pages: int) -> None:
        table[:, columns:] = -1

    inputs = dense_decode(
        gen, backend.device, lengths=[200, 49, 0, 1], s_q=5, causal=causal, page_size=16,
        edit_table=edit,
    )  # fmt: skip
    out, lse = inputs.run(block_table=inputs.inputs["block_table"][:, :columns])
    assert_out_close(out, inputs.expected_out, DECODE)
    assert_lse_close(lse, inputs.expected_lse, DECODE)


def test_a_pool_without_pages_masks_every_key(backend: Backend, gen: torch.Generator) -> None:
    inputs = dense_decode(gen, backend.device, lengths=[200, 0, 1], s_q=2)
    out, lse = inputs.run(k_cache=inputs.inputs["k_cache"][:0])
    assert (out == 0).all()
    assert (lse == torch.inf).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_unused_cache_never_reaches_a_result(
    backend: Backend, gen: torch.Generator, value: float
) -> None:
    inputs = dense_decode(
        gen, backend.device, lengths=[65, 1, 0, 63], s_q=3, causal=True, poison_value=value
    )
    out, lse = inputs.run()
    assert_out_close(out, inputs.expected_out, DECODE)
    assert_lse_close(lse, inputs.expected_lse, DECODE)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("length", [4, 64, 65, 200])
def test_a_key_of_later_queries_does_not_reach_earlier_ones(
    backend: Backend, gen: torch.Generator, length: int, value: float
) -> None:
    """The last key is seen by the last query alone."""

    def edit(kv: Tensor, table: Tensor) -> None:
        last = length - 1
        kv[int(table[0, last // 64]), last % 64] = value

    inputs = dense_decode(
        gen, backend.device, lengths=[length], s_q=3, causal=True, edit_cache=edit
    )
    out, lse = inputs.run()
    assert_out_close(out[:, :-1], inputs.expected_out[:, :-1], DECODE)
    assert_lse_close(lse[..., :-1], inputs.expected_lse[..., :-1], DECODE)


def test_nan_of_one_request_stays_there(backend: Backend, gen: torch.Generator) -> None:
    def edit(kv: Tensor, table: Tensor) -> None:
        kv[int(table[1, 0]), 3] = torch.nan

    inputs = dense_decode(gen, backend.device, lengths=[100, 100, 100], edit_cache=edit)
    out, lse = inputs.run()
    assert out[1].isnan().all()
    assert_out_close(out[::2], inputs.expected_out[::2], DECODE)
    assert_lse_close(lse[::2], inputs.expected_lse[::2], DECODE)


def test_nan_in_one_query_stays_there(backend: Backend, gen: torch.Generator) -> None:
    inputs = dense_decode(gen, backend.device, lengths=[100, 50], s_q=2, heads=(9, 1))
    q = inputs.inputs["q"]
    q[0, 1, 4] = torch.nan
    out, lse = inputs.run()
    assert out[0, 1, 4].isnan().all()
    assert lse[0, 4, 1].isnan()
    rest = torch.ones(2, 2, 9, dtype=torch.bool)
    rest[0, 1, 4] = False
    assert_out_close(out.cpu()[rest], inputs.expected_out[rest], DECODE)


def test_results_are_bitwise_the_same_from_run_to_run(
    backend: Backend, gen: torch.Generator
) -> None:
    inputs = dense_decode(gen, backend.device, lengths=[900, 1, 70], s_q=2, heads=(64, 1))
    first_out, first_lse = inputs.run()
    for _ in range(3):
        out, lse = inputs.run()
        assert_bitwise_equal(out, first_out)
        assert_bitwise_equal(lse, first_lse)


def test_inputs_are_left_as_they_were(backend: Backend, gen: torch.Generator) -> None:
    inputs = dense_decode(gen, backend.device, lengths=[65, 0], s_q=2, causal=True)
    before = {name: x.clone() for name, x in inputs.inputs.items()}
    inputs.run()
    for name, x in before.items():
        assert_bitwise_equal(inputs.inputs[name], x)


def every_other(x: Tensor) -> Tensor:
    """The same values with a stride of 2 in the last dimension, and poison between them."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), -(2**31)).to(x)
    wide[..., ::2] = x
    return wide[..., ::2]


def test_small_tensors_may_have_any_stride(backend: Backend, gen: torch.Generator) -> None:
    inputs = dense_decode(
        gen, backend.device, lengths=[200, 200, 200], page_size=16, kv_format="fp8",
        descales="per_request", fp8_q=True,
    )  # fmt: skip
    out, lse = inputs.run()
    assert_out_close(out, inputs.expected_out, DECODE)
    names = ("block_table", "cache_seqlens", "descale_q", "descale_k")
    spread = {name: every_other(inputs.inputs[name]) for name in names}
    same = {"cache_seqlens": inputs.inputs["cache_seqlens"][:1].expand(3)}
    for changes in (spread, same):
        again, again_lse = inputs.run(**changes)
        assert_bitwise_equal(again, out)
        assert_bitwise_equal(again_lse, lse)


def test_an_empty_batch_gives_empty_results(backend: Backend) -> None:
    q = torch.zeros(0, 1, 16, 576, dtype=torch.bfloat16, device=backend.device)
    cache = torch.zeros(4, 64, 1, 576, dtype=torch.bfloat16, device=backend.device)
    table = torch.zeros(0, 4, dtype=torch.int32, device=backend.device)
    seqlens = torch.zeros(0, dtype=torch.int32, device=backend.device)
    metadata, _ = flash_mla.get_mla_metadata()
    out, lse = flash_mla.flash_mla_with_kvcache(q, cache, table, seqlens, 512, metadata)
    assert out.shape == (0, 1, 16, 512)
    assert lse.shape == (0, 16, 1)


def test_offsets_beyond_2_to_the_31_without_a_copy(backend: Backend, gen: torch.Generator) -> None:
    """The last page of a strided cache that spans more than 2^31 elements.

    The pages in between are never touched, so the operating system need not provide them: memory
    that grows by the size of the cache betrays a copy.
    """
    page_stride = 2 * 64 * 576
    num_pages = 2**31 // page_stride + 2
    try:
        storage = torch.empty(num_pages * page_stride, dtype=torch.bfloat16, device=backend.device)
    except RuntimeError as reason:
        pytest.skip(f"no address space for a cache of 4 GiB: {reason}")
    cache = storage.as_strided((num_pages, 64, 1, 576), (page_stride, 576, 576, 1))
    small = dense_decode(gen, backend.device, lengths=[64])
    small_cache, table = small.inputs["k_cache"], small.inputs["block_table"]
    cache[-1] = small_cache[int(table[0, 0])]
    table[0, 0] = num_pages - 1

    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out, lse = small.run(k_cache=cache)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before
    assert_out_close(out, small.expected_out, DECODE)
    assert_lse_close(lse, small.expected_lse, DECODE)
    assert grown_kib < 2**20, "the whole cache was read or copied"


def test_out_may_be_left_out(backend: Backend, gen: torch.Generator) -> None:
    inputs = dense_decode(gen, backend.device, lengths=[65, 3], s_q=2)
    given, given_lse = inputs.run()
    out, lse = inputs.run(out=None)
    assert out.is_contiguous()
    assert_bitwise_equal(out, given)
    assert_bitwise_equal(lse, given_lse)
