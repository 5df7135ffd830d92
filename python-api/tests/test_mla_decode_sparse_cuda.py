"""Sparse decode on GPUs: shapes, data and sizes that would take too long elsewhere.

The answers are device_sparse_decode.answer's, in float64 on the GPU. What only GPUs have (streams,
graphs, several devices) is in test_cuda_streams_and_graphs.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import GPU_BACKENDS, Backend, parameters
from cases import case_id, padded_rows, pairwise, swapped
from device_decode import (
    Format,
    check,
    check_copies,
    chosen_variants,
    empty_cache,
    fill_cache,
    logits_in_one_column,
    needs_memory,
    ramp,
)
from device_sparse_decode import (
    ALL_SPARSE_FORMATS,
    FEW_SPARSE_FORMATS,
    SETS,
    SPARSE_FORMATS,
    Lists,
    SparseDecode,
    sparse_decode,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kv_cache_bytes import PACKED, encode_tokens, split_views
from tolerances import assert_bitwise_equal, assert_lse_close, assert_out_close
from torch import Tensor

pytestmark = [
    pytest.mark.parametrize("backend", parameters(GPU_BACKENDS), indirect=True, scope="session"),
    pytest.mark.usefixtures("gpu_memory_is_given_back"),
]
BY_NAME = {f.name: f for f in ALL_SPARSE_FORMATS}
by_format = pytest.mark.parametrize("fmt", SPARSE_FORMATS, ids=str)
by_few_formats = pytest.mark.parametrize("fmt", FEW_SPARSE_FORMATS, ids=str)

INF = math.inf
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
HEADS = [1, 3, 8, 16, 17, 32, 48, 64, 96, 128, 129]
TOPK = [0, 1, 63, 64, 65, 100, 512, 2048]
PAGE_SIZES = [1, 2, 3, 16, 64, 100, 256, 1000]
BATCHES = [(1, 1), (2, 1), (3, 2), (7, 3), (130, 1), (40, 5), (1, 64)]  # (b, s_q)
EXTRA = {
    "none": None,
    "empty": Lists(0, page_size=5),
    "one": Lists(1, page_size=3),
    "100": Lists(100, page_size=2),
    "700": Lists(700, page_size=256),
}
LAYOUTS = ["contiguous", "strided", "transposed"]


def lengths_for(kind: str, b: int, topk: int, gen: torch.Generator) -> list[int] | None:
    if kind == "absent":
        return None
    if kind == "mixed":
        return torch.randint(0, topk + 1, (b,), generator=gen).tolist()
    return [{"zero": 0, "full": topk, "past": INT_MAX}[kind]] * b


MATRIX = pairwise(
    fmt=ALL_SPARSE_FORMATS,
    h_q=HEADS,
    topk=TOPK,
    page_size=PAGE_SIZES,
    batch=BATCHES,
    lengths=["absent", "mixed", "zero", "full", "past"],
    invalid=["none", "some", "all"],
    extra=list(EXTRA),
    extra_lengths=["absent", "mixed", "zero", "past"],
    attn_sink=[None, (0.5,), (-INF, 1.0, INF)],
    softmax_scale=[None, 0.07],
    layout=LAYOUTS,
    batch_invariant=[False, True],
)


@pytest.mark.parametrize("case", MATRIX, ids=case_id)
def test_agrees_with_float64(backend: Backend, gen: torch.Generator, case: dict[str, Any]) -> None:
    """The layout is that of the inputs and of out."""
    (b, s_q), fmt, layout, topk = (case[x] for x in ("batch", "fmt", "layout", "topk"))
    lengths = lengths_for(case["lengths"], b, topk, gen)
    lists = Lists(topk, lengths, case["invalid"], case["page_size"])
    if extra := EXTRA[case["extra"]]:
        extra = replace(extra, lengths=lengths_for(case["extra_lengths"], b, extra.topk, gen))
    shapes = {x: case[x] for x in ("h_q", "attn_sink", "softmax_scale", "layout")}
    inputs = sparse_decode(
        gen, backend.device, b=b, s_q=s_q, lists=lists, extra=extra, **shapes, **fmt.build()
    )
    out = inputs.poisoned_out()
    out = {"contiguous": lambda x: x, "strided": padded_rows, "transposed": swapped}[layout](out)
    beside = out.as_strided((*out.shape[:3], 576), out.stride()) if layout == "strided" else None
    _, lse = check(inputs, fmt, out=out, batch_invariant=case["batch_invariant"])
    assert lse.dtype == torch.float32
    if beside is not None:
        assert (beside[..., 512:].contiguous().view(torch.uint8) == 0xFF).all()


@by_format
@pytest.mark.parametrize("b, h_q", [(3, 128), (130, 16), (1000, 64), (4096, 16)])
def test_batches_of_any_size(
    backend: Backend, gen: torch.Generator, fmt: Format, b: int, h_q: int
) -> None:
    lengths = torch.randint(0, 131, (b,), generator=gen)
    lengths[torch.rand(b, generator=gen) < 0.1] = 0
    lists = Lists(130, lengths.tolist())
    check(sparse_decode(gen, backend.device, b=b, h_q=h_q, lists=lists, **fmt.build()), fmt)


@by_few_formats
@pytest.mark.parametrize(
    "b, s_q, h_q, topk",
    [(1, 3000, 128, 65), (1, 4096, 16, 512), (2, 1500, 64, 130), (1, 70_000, 2, 9),
     (70_000, 1, 1, 9)],
)  # fmt: skip
def test_thousands_of_query_tokens(
    backend: Backend, gen: torch.Generator, fmt: Format, b: int, s_q: int, h_q: int, topk: int
) -> None:
    lists = Lists(topk)
    check(
        sparse_decode(gen, backend.device, b=b, s_q=s_q, h_q=h_q, lists=lists, **fmt.build()), fmt
    )


@by_few_formats
def test_one_long_list_among_many_short_ones(
    backend: Backend, gen: torch.Generator, fmt: Format
) -> None:
    lengths = torch.randint(1, 200, (300,), generator=gen).tolist()
    lengths[int(torch.randint(0, 300, (), generator=gen))] = 30_000
    check(
        sparse_decode(gen, backend.device, b=300, lists=Lists(30_000, lengths), **fmt.build()), fmt
    )


@by_format
@pytest.mark.parametrize("h_q, s_q", [(16, 1), (128, 2)], ids=["16", "128x2"])
def test_a_hundred_thousand_entries(
    backend: Backend, gen: torch.Generator, fmt: Format, h_q: int, s_q: int
) -> None:
    lists = Lists(100_000, [3, 100_000, 0, 257, 64])
    inputs = sparse_decode(
        gen, backend.device, b=5, s_q=s_q, h_q=h_q, lists=lists, attn_sink=(5.0, -INF, INF),
        **fmt.build(),
    )  # fmt: skip
    for batch_invariant in (False, True):
        check(inputs, fmt, batch_invariant=batch_invariant)


# ---- offsets ----


@by_format
def test_caches_beyond_2_to_the_32_elements(
    backend: Backend, gen: torch.Generator, fmt: Format
) -> None:
    """Tokens at their start, their end, and at each size where a narrow offset would wrap."""

    def huge(kv_format: str) -> Lists:
        width = PACKED[kv_format].bytes_per_token if kv_format in PACKED else fmt.d_qk
        num_pages = 2**32 // (64 * width) + 3
        needs_memory(2**32 * (1 if kv_format in PACKED else 2) / 2**30 + 4)
        cache = empty_cache(backend.device, num_pages, 64, 1, fmt.d_qk, kv_format)
        stride = cache.stride(0)
        wraps = {2**n // size for n in (31, 32) for size in (stride, stride * cache.itemsize)}
        pages = torch.tensor(sorted({0, 1, num_pages - 1, *wraps, *(w - 1 for w in wraps)}))
        pages = pages[pages < num_pages]
        slots = (pages[:, None] * 64 + torch.arange(64)).flatten()
        slots = slots[slots <= INT_MAX]
        slots = slots[torch.randperm(len(slots), generator=gen)]
        return Lists(len(slots), slots=slots, cache=cache)

    inputs = sparse_decode(
        gen, backend.device, lists=huge(fmt.kv_format),
        extra=huge(fmt.extra_format) if fmt.extra_format else None, **fmt.build(),
    )  # fmt: skip
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    check(inputs, fmt)
    assert torch.cuda.max_memory_allocated() - before < 2**30, "a cache was copied"


@pytest.mark.parametrize("page_size", [1, 3, 64, 100, 4096, 100_003])
@pytest.mark.parametrize("name", ["v32_fp8", "v41_fp8+fp4", "bf16"])
def test_indices_up_to_the_largest(
    backend: Backend, gen: torch.Generator, name: str, page_size: int
) -> None:
    """2^31 tokens. All pages are the same one: a stride of 0, which v4_fp8 does not allow."""
    fmt, num_pages = BY_NAME[name], -(-(2**31) // page_size)
    page = Lists(page_size, slots=torch.arange(page_size), page_size=page_size, num_pages=1)
    written = sparse_decode(gen, backend.device, lists=page, extra=page, **fmt.build())
    changes = {}
    for cache_name, list_name, _ in SETS:
        cache = written.inputs[cache_name]
        changes[cache_name] = cache.expand(num_pages, *cache.shape[1:])
        slots = torch.randint(0, 2**31, (2, 1, 200), generator=gen)
        slots[..., :3] = torch.tensor([0, page_size - 1, INT_MAX])
        changes[list_name] = slots.int().to(cache.device)
    check(written.changed(**changes), fmt)


def test_a_result_beyond_2_to_the_31_elements(backend: Backend, gen: torch.Generator) -> None:
    lists = Lists(130, [5, 64, 0, 1, 130, 17, 3, 65])
    check_copies(sparse_decode(gen, backend.device, b=8, s_q=2, h_q=128, lists=lists),
                 SPARSE_FORMATS[0])  # fmt: skip


@pytest.mark.parametrize("h_q", [16, 128])
def test_requests_2_to_the_31_elements_apart(
    backend: Backend, gen: torch.Generator, h_q: int
) -> None:
    """q, indices and out; what lies between is never touched."""
    needs_memory(30)
    inputs = sparse_decode(gen, backend.device, h_q=h_q, s_q=2, lists=Lists(700),
                           extra=Lists(65, page_size=2))  # fmt: skip

    def apart(x: Tensor) -> Tensor:
        storage = torch.empty(2**31 + x[0].numel(), dtype=x.dtype, device=x.device)
        far = storage.as_strided(x.shape, (2**31, *x.stride()[1:]))
        return far.copy_(x)

    names = ("q", "indices", "extra_indices_in_kvcache")
    far = {name: apart(inputs.inputs[name]) for name in names}
    check(inputs, SPARSE_FORMATS[0], **far, out=apart(inputs.poisoned_out()))


# ---- data ----


@by_format
def test_one_key_dominates(backend: Backend, gen: torch.Generator, fmt: Format) -> None:
    """Logits of standard deviation 9."""
    for h_q in (16, 64, 128):
        inputs = sparse_decode(
            gen, backend.device, b=3, s_q=2, h_q=h_q, lists=Lists(2500, [700, 64, 2500]),
            q_std=90.0, **fmt.build(),
        )  # fmt: skip
        check(inputs, fmt, logits=60.0)


def in_one_column(levels: Tensor, fmt: Format) -> dict[str, Any]:
    """logits_in_one_column for sparse_decode; without a RoPE column of its own V has it too."""
    largest = 0.9 * 448 if fmt.d_qk == 576 else 0.25
    edits = logits_in_one_column(levels, fmt.d_qk**-0.5, largest=largest)
    return dict(zip(("edit_queries", "edit_keys"), edits, strict=True))


@pytest.mark.parametrize("rise", [8.0, 600.0])
@pytest.mark.parametrize("shape", ["rising", "falling", "peak", "valley", "steps", "spikes"])
@by_few_formats
def test_the_maximum_moves_along_the_list(
    backend: Backend, gen: torch.Generator, fmt: Format, shape: str, rise: float
) -> None:
    """In steps below and above 2^8 in exp(): with 600, by 2^37 from one block of 64 keys to the
    next, so what a lazy rescale keeps and what it must not is both there. A second cache repeats
    the course of the first."""
    h_q = [8, 64, 128][int(torch.randint(0, 3, (), generator=gen))]
    inputs = sparse_decode(
        gen, backend.device, b=3, s_q=2, h_q=h_q,
        lists=Lists(1500, [1500, 333, 64], slots=torch.arange(1500)),
        **in_one_column(ramp(shape, 1500, rise=rise), fmt), **fmt.build(),
    )  # fmt: skip
    for batch_invariant in (False, True):
        check(inputs, fmt, logits=rise / 2 + 3, batch_invariant=batch_invariant)


@pytest.mark.parametrize("level", [-1000.0, 1000.0])
@by_format
def test_logits_far_from_zero(
    backend: Backend, gen: torch.Generator, fmt: Format, level: float
) -> None:
    """exp() of any of them vanishes or overflows; masked keys must not count as 0 instead."""
    inputs = sparse_decode(
        gen, backend.device, b=5, s_q=2, lists=Lists(5000, [1, 70, 700, 0, 5000]),
        **in_one_column(torch.tensor([level]), fmt), **fmt.build(),
    )  # fmt: skip
    # Rounding to e2m1 makes up to a third more of a key's column.
    check(inputs, fmt, logits=abs(level) * (4 / 3 if fmt.extra_format else 1))


@by_format
def test_constant_data(backend: Backend, gen: torch.Generator, fmt: Format) -> None:
    inputs = sparse_decode(
        gen, backend.device, b=6, h_q=64, lists=Lists(20_000, [1, 64, 65, 1000, 0, 20_000]),
        edit_queries=lambda q: q.fill_(1.0), edit_keys=lambda kv, _: kv.fill_(0.125),
        **fmt.build(),
    )  # fmt: skip
    out, _ = check(inputs, fmt, logits=3.0)
    assert (out[4] == 0).all()


@pytest.mark.parametrize("scale", [0.0, -0.05, 1.0, 1e-20])
@by_format
def test_any_softmax_scale(
    backend: Backend, gen: torch.Generator, fmt: Format, scale: float
) -> None:
    """0 makes the mean of V, also a negative one is a factor like others."""
    inputs = sparse_decode(
        gen, backend.device, b=5, s_q=2, lists=Lists(9000, [1, 64, 0, 700, 9000]),
        softmax_scale=scale, **fmt.build(),
    )  # fmt: skip
    check(inputs, fmt, logits=40 * abs(scale))


@pytest.mark.parametrize("value", [INF, -INF])
@by_format
def test_infinity_in_unused_cache_never_reaches_a_result(
    backend: Backend, gen: torch.Generator, fmt: Format, value: float
) -> None:
    """NaN is what every other test has there."""

    def filled(kv_format: str, page_size: int) -> Lists:
        cache = empty_cache(backend.device, 7, page_size, 1, fmt.d_qk, kv_format)
        fill_cache(cache, kv_format, value)
        return Lists(200, [65, 1, 0, 63, 200], cache=cache)

    inputs = sparse_decode(
        gen, backend.device, b=5, s_q=3, lists=filled(fmt.kv_format, 64),
        extra=filled(fmt.extra_format or fmt.kv_format, 9), **fmt.build(),
    )  # fmt: skip
    check(inputs, fmt)


@pytest.mark.parametrize("spread", [0, 3])
@pytest.mark.parametrize("shift", [-8, 8, 18])
@by_format
def test_scales_of_any_size(
    backend: Backend, gen: torch.Generator, fmt: Format, shift: int, spread: int
) -> None:
    """Columns of K times powers of two that those of q take back: logits stay, out changes alike.

    The powers are those of `shift`, and up to 2^+-spread in each tile that has a scale. Otherwise
    nearly all scales of random data are the same two. v41_fp4 has scales from 2^-6 to 448 only.
    """
    shift = min(max(shift, 3), 9) if fmt.extra_format else shift
    tile = PACKED[fmt.kv_format].tile if fmt.kv_format in PACKED else 64
    tiles = torch.randint(-spread, spread + 1, (fmt.d_qk // tile + 1,), generator=gen) + shift
    exponents = tiles.repeat_interleave(tile)[: fmt.d_qk].to(backend.device)
    inputs = sparse_decode(gen, backend.device, h_q=64, lists=Lists(200), **fmt.build())
    for kv_format, (cache_name, _, _) in zip(
        (inputs.kv_format, inputs.extra_format), SETS, strict=True
    ):
        if cache_name in inputs.inputs:
            multiply(inputs.inputs[cache_name], kv_format, exponents)
    q = inputs.inputs["q"]
    out, lse = inputs.run(q=(q.double() * 2.0**-exponents).bfloat16())
    out = out.double() * 2.0 ** -exponents[:512]
    assert_out_close(out, inputs.expected_out, fmt.tolerance())
    assert_lse_close(lse, inputs.expected_lse, fmt.tolerance())


def multiply(cache: Tensor, kv_format: str, exponents: Tensor) -> None:
    """Each column times 2^exponent, exactly, by the scales where the format has them."""
    if kv_format not in PACKED:
        cache.mul_(2.0**exponents)
        return
    layout = PACKED[kv_format]
    _, scales, rope = split_views(cache, kv_format)
    by_tile = exponents[: layout.d_nope : layout.tile]
    if kv_format == "v32_fp8":
        scales.view(torch.float32).mul_(2.0**by_tile)
    else:
        codes_of_a_power = 8 if kv_format == "v41_fp4" else 1  # e4m3 has three bits of mantissa
        used = scales != 0xFF
        scales += (used * by_tile * codes_of_a_power).to(torch.uint8)
    rope.view(torch.bfloat16).mul_(2.0 ** exponents[layout.d_nope :])


@pytest.mark.parametrize("where", ["token", "code", "scale", "rope"])
@by_format
def test_nan_of_one_list_stays_there(
    backend: Backend, gen: torch.Generator, fmt: Format, where: str
) -> None:
    """The last token has a NaN somewhere or all over, and is named by the second query of the first
    request alone; one head of the last query is NaN itself."""
    h_q = [16, 128][int(torch.randint(0, 2, (), generator=gen))]
    inputs = sparse_decode(
        gen, backend.device, b=3, s_q=2, h_q=h_q, lists=Lists(200), **fmt.build()
    )
    cache, indices, q = (inputs.inputs[x] for x in ("k_cache", "indices", "q"))
    last = cache.shape[0] * cache.shape[1] - 1
    indices[0, 1, 70] = last
    if where != "token":
        kv = torch.full((1, 1, fmt.d_qk), 0.1, device=cache.device)
        encode_tokens(kv, cache, fmt.kv_format, torch.tensor([last], device=cache.device))
        if fmt.kv_format in PACKED:
            part = split_views(cache, fmt.kv_format)[("code", "scale", "rope").index(where)]
            # A float32, two bf16, or four of what has a byte. v41_fp8 has no RoPE of its own.
            (part if part.shape[-1] else split_views(cache, fmt.kv_format)[0])[-1, -1, 4:8] = 0xFF
        else:
            cache[-1, -1, 0, 4] = torch.nan
    q[2, 1, 5] = torch.nan
    out, lse = inputs.run()
    assert out[0, 1].isnan().all()
    assert lse[0, :, 1].isnan().all()
    assert out[2, 1, 5].isnan().all()
    assert lse[2, 5, 1].isnan()
    rest = torch.ones(3, 2, h_q, dtype=torch.bool, device=out.device)
    rest[0, 1], rest[2, 1, 5] = False, False
    assert_out_close(out[rest], inputs.expected_out[rest], fmt.tolerance())
    lse, expected_lse = (x.transpose(1, 2)[rest] for x in (lse, inputs.expected_lse))
    assert_lse_close(lse, expected_lse, fmt.tolerance())


# ---- indices and lengths ----


@pytest.mark.parametrize("h_q", [3, 128])
@by_format
def test_a_single_valid_entry_anywhere(
    backend: Backend, gen: torch.Generator, fmt: Format, h_q: int
) -> None:
    """Request n has entry n of 200 alone: of the list, then of the one of the second cache."""
    only = torch.arange(200)
    garbage = torch.tensor([-1, INT_MIN, INT_MAX, 10_000])
    lists = garbage[torch.randint(0, 4, (200, 1, 200), generator=gen)]
    lists[only, 0, only] = torch.randint(0, 300, (200,), generator=gen)
    inputs = sparse_decode(
        gen, backend.device, b=200, h_q=h_q,
        lists=Lists(130, page_size=3, num_pages=100, slots=lists[..., :130]),
        extra=Lists(70, page_size=100, num_pages=3, slots=lists[..., 130:]), **fmt.build(),
    )  # fmt: skip
    check(inputs, fmt, logits=1.0)  # which are the lse, and some of them nearly 0


@pytest.mark.parametrize("places", [(), (0,), (19_999,), (64, 7_000, 15_001)], ids=str)
@by_few_formats
def test_long_lists_with_hardly_an_entry(
    backend: Backend, gen: torch.Generator, fmt: Format, places: tuple[int, ...]
) -> None:
    """Parts of a list, and whole blocks of it, without a single key."""
    slots = torch.full((20_000,), -1)
    slots[list(places)] = torch.arange(len(places))
    lists = Lists(20_000, slots=slots)
    for h_q, sink in ((16, None), (128, (0.5, INF, -INF))):
        inputs = sparse_decode(
            gen, backend.device, b=2, h_q=h_q, lists=lists, attn_sink=sink, **fmt.build()
        )
        for batch_invariant in (False, True):
            check(inputs, fmt, logits=1.0, batch_invariant=batch_invariant)


@by_format
def test_indices_just_outside_a_slice_of_a_larger_pool(
    backend: Backend, gen: torch.Generator, fmt: Format
) -> None:
    """On both sides of the slice lie NaN tokens."""

    def sliced(kv_format: str) -> Lists:
        pool = empty_cache(backend.device, 9, 16, 1, fmt.d_qk, kv_format)
        slots = torch.tensor([0, 47, 48, 49, 63, 64, -1, -2, -16, -17, INT_MIN, INT_MAX, 1, 95])
        slots = slots[torch.randint(0, len(slots), (40, 1, 70), generator=gen)]
        return Lists(70, slots=slots, cache=pool[3:6])

    caches = {"lists": sliced(fmt.kv_format), "extra": sliced(fmt.extra_format or fmt.kv_format)}
    check(sparse_decode(gen, backend.device, b=40, **caches, **fmt.build()), fmt)


@by_few_formats
def test_a_key_listed_many_times_counts_as_often(
    backend: Backend, gen: torch.Generator, fmt: Format
) -> None:
    slots = torch.randint(0, 7, (3, 2, 1000), generator=gen)
    slots[1] = 3
    inputs = sparse_decode(
        gen, backend.device, b=3, s_q=2, h_q=64, lists=Lists(1000, slots=slots), **fmt.build()
    )
    _, lse = check(inputs, fmt)
    if fmt.extra_format is None:
        _, once = inputs.run(indices=inputs.inputs["indices"][..., :1].contiguous())
        torch.testing.assert_close(lse[1], once[1] + math.log(1000), atol=1e-3, rtol=0)


@by_format
def test_one_cache_of_two_may_give_no_key(
    backend: Backend, gen: torch.Generator, fmt: Format
) -> None:
    """By a list without entries, by a length of 0, by indices outside, and by a cache of no pages;
    a cache that holds nothing but NaN shows what is read of it all the same."""

    def sets(topk: int, extra_topk: int, **lengths: list[int]) -> SparseDecode:
        return sparse_decode(
            gen, backend.device, b=2, s_q=2, h_q=32, attn_sink=(0.3, -INF),
            lists=Lists(topk, lengths.get("main")),
            extra=Lists(extra_topk, lengths.get("extra"), page_size=7), **fmt.build(),
        )  # fmt: skip

    for inputs in (
        sets(0, 100),
        sets(100, 0),
        sets(0, 0),
        sets(300, 100, main=[0, 0]),
        sets(300, 100, extra=[0, 0]),
        sets(300, 100, main=[0, 300], extra=[100, 0]),
        sets(300, 100, main=[0, 0], extra=[0, 0]),
    ):
        check(inputs, fmt)
    both = sets(300, 100)
    for cache_name, list_name, _ in SETS:
        outside = torch.full_like(both.inputs[list_name], INT_MIN)
        check(both.changed(**{list_name: outside}), fmt)
        check(both.changed(**{cache_name: both.inputs[cache_name][:0]}), fmt)


@pytest.mark.parametrize("b, topk", [(1, 9000), (200, 130)])
@by_few_formats
def test_sinks_change_out_alone(
    backend: Backend, gen: torch.Generator, fmt: Format, b: int, topk: int
) -> None:
    """Where a list is cut into parts, and where it is not."""
    lengths = [topk, 0, 1, 70][:b] + [topk] * (b - 4)
    plain = sparse_decode(
        gen, backend.device, b=b, h_q=20, lists=Lists(topk, lengths), **fmt.build()
    )
    out, lse = check(plain, fmt)
    for values in ([-INF], [INF], [0.0], [9.0, -9.0, 1e4, -1e4, INF, -INF, 88.0]):
        sink = torch.tensor([values[h % len(values)] for h in range(20)], device=out.device)
        with_sink = plain.changed(attn_sink=sink)
        found, found_lse = check(with_sink, fmt)
        assert_bitwise_equal(found_lse, lse)
        assert_bitwise_equal(found[:, :, sink == -INF], out[:, :, sink == -INF])
        assert (found[:, :, sink == INF] == 0).all()


@by_few_formats
def test_requests_may_share_a_list_and_a_query(
    backend: Backend, gen: torch.Generator, fmt: Format
) -> None:
    """Strides of 0."""
    one = sparse_decode(gen, backend.device, b=1, lists=Lists(900, invalid="none"), **fmt.build())
    shared = {name: x.expand(4, *x.shape[1:]) for name, x in one.per_request().items()}
    shared["topk_length"] = torch.tensor([900, 3, 0, 64], dtype=torch.int32).to(backend.device)
    check(one.changed(**shared), fmt)


def spread(x: Tensor) -> Tensor:
    """The same values from an odd place on, with a stride of 3 in the last dimension."""
    wide = torch.full((*x.shape[:-1], 3 * x.shape[-1] + 1), -(2**31)).to(x)
    wide[..., 1::3] = x
    return wide[..., 1::3]


@by_few_formats
def test_small_tensors_may_have_any_stride(
    backend: Backend, gen: torch.Generator, fmt: Format
) -> None:
    inputs = sparse_decode(
        gen, backend.device, b=3, s_q=2, h_q=20, lists=Lists(300, [300, 7, 64]),
        extra=Lists(65, [1, 0, 65], page_size=5), attn_sink=(0.5, -1.0, 2.0), **fmt.build(),
    )  # fmt: skip
    names = ("indices", "extra_indices_in_kvcache", "topk_length", "extra_topk_length", "attn_sink")
    check(inputs, fmt, **{name: spread(inputs.inputs[name]) for name in names})
    for start in (1, 2, 3):  # no longer aligned to 16 bytes
        tails = {name: inputs.inputs[name][..., start:] for name in names[:2]}
        shorter = {name: (inputs.inputs[name] - start).clamp(min=0) for name in names[2:4]}
        check(inputs.changed(**tails, **shorter), fmt)


# ---- the same bits ----


@by_format
def test_inputs_are_left_as_they_were(backend: Backend, gen: torch.Generator, fmt: Format) -> None:
    inputs = sparse_decode(
        gen, backend.device, b=3, lists=Lists(500, [500, 0, 63]), attn_sink=(0.5,), **fmt.build()
    )
    before = {name: x.clone() for name, x in inputs.inputs.items()}
    for batch_invariant in (False, True):
        inputs.run(batch_invariant=batch_invariant)
    for name, x in before.items():
        assert_bitwise_equal(inputs.inputs[name], x)


@pytest.mark.parametrize("h_q", [16, 128])
@by_format
def test_results_are_bitwise_the_same_from_run_to_run(
    backend: Backend, gen: torch.Generator, fmt: Format, h_q: int
) -> None:
    inputs = sparse_decode(
        gen, backend.device, b=6, s_q=2, h_q=h_q, attn_sink=(0.5, 3.0),
        lists=Lists(10_000, [10_000, 1, 700, 0, 4097, 64]), **fmt.build(),
    )  # fmt: skip
    for batch_invariant in (False, True):
        out, lse = check(inputs, fmt, batch_invariant=batch_invariant)
        for _ in range(50):
            again, again_lse = inputs.run(batch_invariant=batch_invariant)
            assert_bitwise_equal(again, out)
            assert_bitwise_equal(again_lse, lse)


@pytest.mark.parametrize("h_q, s_q", [(16, 1), (20, 3), (64, 1), (128, 2)], ids=str)
@by_format
def test_batch_invariant_requests_do_not_depend_on_the_batch(
    backend: Backend, gen: torch.Generator, fmt: Format, h_q: int, s_q: int
) -> None:
    """Order, size and the other requests of the batch change, and the columns of its lists."""
    lengths = [1, 63, 64, 4096, 4097, 8193, 16384, 16385, 0, 20_000, 12_289]
    extra_lengths = [0, 1, 64, 0, 4096, 100, 0, 500, 65, 5000, 2]
    whole = sparse_decode(
        gen, backend.device, b=len(lengths), s_q=s_q, h_q=h_q, attn_sink=(0.5, -INF),
        lists=Lists(20_000, lengths, num_pages=80), extra=Lists(5000, extra_lengths, page_size=40),
        **fmt.build(),
    )  # fmt: skip
    out, lse = check(whole, fmt, batch_invariant=True)

    def assert_same(which: list[int], **changes: Any) -> None:
        part = whole.requests(which)
        columns = {"indices": lengths, "extra_indices_in_kvcache": extra_lengths}
        narrow = {
            name: part.inputs[name][..., : max(counts[n] for n in which)].contiguous()
            for name, counts in columns.items()
        }
        other = part.run(**({"batch_invariant": True} | changes), **narrow)
        rows = torch.tensor(which, device=out.device)
        assert_bitwise_equal(other[0], out[rows])
        assert_bitwise_equal(other[1], lse[rows])

    one_row = torch.zeros(1, 8, dtype=torch.int32, device=backend.device)
    for n in range(len(lengths)):
        assert_same([n])
        as_engines = {"tile_scheduler_metadata": one_row, "batch_invariant": False}
        assert_same([n], **as_engines, num_splits=one_row[0, :2])
    assert_same(list(reversed(range(len(lengths)))))
    for size in (2, 5, 60):
        assert_same(torch.randint(0, len(lengths), (size,), generator=gen).tolist())
    assert_same([9] * 3 + [0] * 300 + [7])


def test_each_row_has_kernels_for_every_format(
    backend: Backend,
    gen: torch.Generator,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without this, the tests above might pass on the portable row twice."""
    for fmt in ALL_SPARSE_FORMATS:
        for h_q in (16, 64, 128):
            inputs = sparse_decode(gen, backend.device, h_q=h_q, **fmt.build())
            chosen = chosen_variants(inputs, "mla_decode_sparse", capfd, monkeypatch)
            assert all(backend.row in name for name in chosen), (fmt, h_q, chosen)


# ---- properties ----


@st.composite
def some_lists(draw: st.DrawFn, b: int) -> Lists:
    topk = draw(st.one_of(st.integers(0, 200), st.integers(0, 5000)))
    lengths = st.lists(st.integers(0, topk + 70), min_size=b, max_size=b)
    return Lists(
        topk,
        draw(st.one_of(st.none(), lengths)),
        draw(st.sampled_from(["none", "some", "some", "all"])),
        draw(st.sampled_from([*PAGE_SIZES, 7, 4096])),
    )


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    fmt = draw(st.sampled_from(ALL_SPARSE_FORMATS))
    b = draw(st.integers(1, 9))
    return {
        "fmt": fmt,
        "b": b,
        "s_q": draw(st.integers(1, 5)),
        "h_q": draw(st.integers(1, 130)),
        "lists": draw(some_lists(b)),
        "extra": draw(st.one_of(st.none(), some_lists(b))),
        "attn_sink": draw(st.sampled_from([None, (0.5,), (-INF, 1.0, INF)])),
        "softmax_scale": draw(st.sampled_from([None, 0.07, 0.0, -0.05])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "q_std": 3.0 if fmt.scales == "any" else draw(st.sampled_from([3.0, 3.0, 30.0])),
    }


def built(backend: Backend, seed: int, call: dict[str, Any]) -> SparseDecode:
    shapes = {name: x for name, x in call.items() if name != "fmt"}
    gen = torch.Generator().manual_seed(seed)
    return sparse_decode(gen, backend.device, **shapes, **call["fmt"].build())


@settings(max_examples=100)
@given(seed=st.integers(0, 2**31 - 1), call=calls(), batch_invariant=st.booleans())
@example(seed=0, call={"fmt": SPARSE_FORMATS[0], "lists": Lists(0)}, batch_invariant=True)
def test_any_call_agrees_with_float64(
    backend: Backend, seed: int, call: dict[str, Any], batch_invariant: bool
) -> None:
    # 576 columns of standard deviations q_std and 0.1, five of which no logit here exceeds.
    size = 5 * math.sqrt(576) * 0.1 * call.get("q_std", 3.0) * 0.07
    check(built(backend, seed, call), call["fmt"], logits=size, batch_invariant=batch_invariant)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31 - 1), call=calls(), data=st.data())
def test_any_batch_invariant_request_keeps_its_bits(
    backend: Backend, seed: int, call: dict[str, Any], data: st.DataObject
) -> None:
    whole = built(backend, seed, call)
    which = data.draw(
        st.lists(st.integers(0, call["b"] - 1), min_size=1, max_size=20), label="batch"
    )
    out, lse = whole.run(batch_invariant=True)
    other, other_lse = whole.requests(which).run(batch_invariant=True)
    rows = torch.tensor(which, device=out.device)
    assert_bitwise_equal(other, out[rows])
    assert_bitwise_equal(other_lse, lse[rows])
