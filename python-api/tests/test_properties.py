"""Laws that hold for any input: hypothesis draws shapes and seeds."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from backends import Backend
from cases import Decode, dense_decode, normal, sparse_decode
from hypothesis import given
from hypothesis import strategies as st
from tolerances import (
    DECODE,
    MERGED_DECODE,
    PREFILL,
    assert_bitwise_equal,
    assert_lse_close,
    assert_out_close,
)
from torch import Tensor

import flash_mla

seeds = st.integers(0, 2**31 - 1)
page_sizes = st.sampled_from([1, 2, 8, 16, 64, 128])
head_counts = st.sampled_from([(1, 1), (3, 1), (9, 3), (16, 1), (16, 8), (63, 1), (126, 2)])
dense_formats = st.sampled_from(["bf16", "fp16", "fp8", "v32_fp8"])
batches = st.lists(st.integers(0, 300), min_size=1, max_size=4)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_head_if_packed(heads: tuple[int, int], kv_format: str) -> tuple[int, int]:
    return (heads[0], 1) if kv_format == "v32_fp8" else heads


def check(inputs: Decode, **changes: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = inputs.run(**changes)
    assert_out_close(out, inputs.expected_out, DECODE)
    assert_lse_close(lse, inputs.expected_lse, DECODE)
    return out, lse


@given(seeds, batches, st.integers(1, 4), head_counts, page_sizes, dense_formats, st.booleans())
def test_where_pages_lie_does_not_matter(
    backend: Backend,
    seed: int,
    lengths: list[int],
    s_q: int,
    heads: tuple[int, int],
    page_size: int,
    kv_format: str,
    causal: bool,
) -> None:
    gen = generator(seed)
    inputs = dense_decode(
        gen, backend.device, lengths=lengths, s_q=s_q, heads=one_head_if_packed(heads, kv_format),
        page_size=page_size, kv_format=kv_format, causal=causal,
    )  # fmt: skip
    out, lse = check(inputs)
    cache, table = inputs.inputs["k_cache"], inputs.inputs["block_table"]
    order = torch.randperm(cache.shape[0], generator=gen).to(cache.device)
    moved = torch.empty_like(cache)
    moved.view(torch.uint8)[order] = cache.view(torch.uint8)
    inside = (table >= 0) & (table < cache.shape[0])
    new_table = torch.where(inside, order[table.clamp(0, cache.shape[0] - 1).long()], table).int()
    moved_out, moved_lse = inputs.run(k_cache=moved, block_table=new_table)
    assert_bitwise_equal(moved_out, out)
    assert_bitwise_equal(moved_lse, lse)


@given(seeds, st.lists(st.integers(0, 300), min_size=1, max_size=3), head_counts, page_sizes,
       dense_formats, st.integers(1, 3), st.data())  # fmt: skip
def test_merging_two_parts_of_the_keys_gives_the_whole(
    backend: Backend,
    seed: int,
    lengths: list[int],
    heads: tuple[int, int],
    page_size: int,
    kv_format: str,
    s_q: int,
    data: st.DataObject,
) -> None:
    inputs = dense_decode(
        generator(seed), backend.device, lengths=lengths, s_q=s_q, page_size=page_size,
        heads=one_head_if_packed(heads, kv_format), kv_format=kv_format,
    )  # fmt: skip
    table, seqlens = inputs.inputs["block_table"], inputs.inputs["cache_seqlens"]
    cut = data.draw(st.integers(0, table.shape[1] - 1), label="pages of the first part")
    first = inputs.run(cache_seqlens=seqlens.clamp(max=cut * page_size))
    second = inputs.run(
        cache_seqlens=(seqlens - cut * page_size).clamp(min=0), block_table=table[:, cut:]
    )
    rows = [
        x
        for out, lse in (first, second)
        for x in (out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1))
    ]
    out, lse = flash_mla.merge_attn_states(*rows)
    b, h_q = len(lengths), heads[0]
    assert_out_close(out.view(b, s_q, h_q, 512), inputs.expected_out, MERGED_DECODE)
    merged_lse = lse.view(b, s_q, h_q).transpose(1, 2)
    # Each part's lse is off by up to its own bound, and the whole may be nearer to 0 than either.
    bound = replace(MERGED_DECODE, lse_abs=1e-5, lse_rel=2 * DECODE.lse_rel)
    assert_lse_close(merged_lse, inputs.expected_lse, bound)


@given(seeds, st.lists(st.integers(0, 300), min_size=2, max_size=5), st.integers(1, 3), head_counts,
       dense_formats, st.booleans())  # fmt: skip
def test_batch_invariant_requests_do_not_depend_on_the_batch(
    backend: Backend,
    seed: int,
    lengths: list[int],
    s_q: int,
    heads: tuple[int, int],
    kv_format: str,
    causal: bool,
) -> None:
    gen = generator(seed)
    inputs = dense_decode(
        gen, backend.device, lengths=lengths, s_q=s_q, heads=one_head_if_packed(heads, kv_format),
        kv_format=kv_format, causal=causal,
    )  # fmt: skip
    out, lse = inputs.run(batch_invariant=True)
    order = torch.randperm(len(lengths), generator=gen).to(out.device)
    for which in (order, order[:1]):  # the batch in another order, and one request alone
        rows = {
            name: inputs.inputs[name].view(torch.uint8)[which].view(inputs.inputs[name].dtype)
            for name in ("q", "block_table")
        }
        rows["cache_seqlens"] = inputs.inputs["cache_seqlens"][which]
        other_out, other_lse = inputs.run(**rows, batch_invariant=True)
        assert_bitwise_equal(other_out, out[which])
        assert_bitwise_equal(other_lse, lse[which])


def test_batch_invariance_of_long_requests(backend: Backend, gen: torch.Generator) -> None:
    """Long enough to be split, beside short ones that leave cores idle."""
    inputs = dense_decode(gen, backend.device, lengths=[9000, 3, 4097, 0, 4096], heads=(4, 1))
    out, lse = inputs.run(batch_invariant=True)
    for n in range(5):
        rows = {name: inputs.inputs[name][n : n + 1] for name in ("q", "block_table")}
        rows["cache_seqlens"] = inputs.inputs["cache_seqlens"][n : n + 1]
        alone_out, alone_lse = inputs.run(**rows, batch_invariant=True)
        assert_bitwise_equal(alone_out, out[n : n + 1])
        assert_bitwise_equal(alone_lse, lse[n : n + 1])


@given(seeds, st.integers(2, 4), st.integers(1, 3), st.integers(1, 400),
       st.sampled_from([1, 9, 64]), st.sampled_from(["v32_fp8", "v4_fp8", "bf16"]))  # fmt: skip
def test_batch_invariant_lists_do_not_depend_on_the_batch(
    backend: Backend, seed: int, b: int, s_q: int, topk: int, h_q: int, kv_format: str
) -> None:
    gen = generator(seed)
    inputs = sparse_decode(
        gen, backend.device, b=b, s_q=s_q, topk=topk, h_q=h_q, kv_format=kv_format,
        topk_length=torch.randint(0, topk + 1, (b,), generator=gen).tolist(), attn_sink=(0.2,),
    )  # fmt: skip
    out, lse = inputs.run(batch_invariant=True)
    order = torch.randperm(b, generator=gen).to(out.device)
    for which in (order, order[:1]):
        names = ("q", "indices", "topk_length")
        rows = {name: inputs.inputs[name][which] for name in names}
        other_out, other_lse = inputs.run(**rows, batch_invariant=True)
        assert_bitwise_equal(other_out, out[which])
        assert_bitwise_equal(other_lse, lse[which])


def sink_as_a_key(q: Tensor, key: Tensor, sink: float, scale: float) -> Tensor:
    """The last RoPE column of q becomes 1; then key, zero elsewhere, has `sink` as its logit."""
    q[..., -1] = 1.0
    key.zero_()
    key[..., -1] = sink / scale
    return (key[..., -1].double() * scale).flatten()[:1].float()


@given(seeds, st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 9, 64]),
       st.integers(0, 100), st.floats(-4, 4))  # fmt: skip
def test_a_sink_is_one_more_key_of_zero_value_in_decode(
    backend: Backend, seed: int, b: int, s_q: int, h_q: int, topk: int, sink: float
) -> None:
    """The first token plays the sink; V is the first 512 columns, which are zero there."""
    inputs = sparse_decode(generator(seed), backend.device, b=b, s_q=s_q, h_q=h_q, topk=topk,
                           kv_format="bf16", softmax_scale=0.0625)  # fmt: skip
    indices, cache = inputs.inputs["indices"].clone(), inputs.inputs["k_cache"]
    indices[indices == 0] = -1
    cache.nan_to_num_()
    value = sink_as_a_key(inputs.inputs["q"], cache[0, 0, 0], sink, 0.0625)
    key = indices.new_zeros(b, s_q, 1)
    with_key, key_lse = inputs.run(indices=torch.cat([indices, key], dim=-1))
    with_sink, lse = inputs.run(indices=indices, attn_sink=value.repeat(h_q))
    # Two results that each obey the bound of one: twice the bound, and the angles' roots add up.
    twice = replace(DECODE, abs=2 * DECODE.abs, rel=2 * DECODE.rel, angle=4 * DECODE.angle)
    assert_out_close(with_sink, with_key.cpu().double(), twice)
    whole = torch.logaddexp(torch.where(lse == math.inf, -math.inf, lse), value)
    bound = replace(DECODE, lse_abs=1e-5, lse_rel=2 * DECODE.lse_rel)
    assert_lse_close(key_lse, whole.cpu().double(), bound)


@given(seeds, st.integers(1, 6), st.sampled_from([1, 9, 64]), st.integers(0, 60),
       st.floats(-4, 4))  # fmt: skip
def test_a_sink_is_one_more_key_of_zero_value_in_prefill(
    backend: Backend, seed: int, s_q: int, h_q: int, topk: int, sink: float
) -> None:
    gen = generator(seed)
    q = normal(gen, s_q, h_q, 576, std=3.0).bfloat16().to(backend.device)
    kv = normal(gen, 50, 1, 576, std=0.1).bfloat16().to(backend.device)
    indices = torch.randint(1, 50, (s_q, 1, topk), generator=gen).int().to(backend.device)
    value = sink_as_a_key(q, kv[0, 0], sink, 0.0625)
    key = torch.zeros(s_q, 1, 1, dtype=torch.int32, device=backend.device)
    with_key, _, _ = flash_mla.flash_mla_sparse_fwd(q, kv, torch.cat([indices, key], -1), 0.0625)
    with_sink, _, _ = flash_mla.flash_mla_sparse_fwd(
        q, kv, indices, 0.0625, attn_sink=value.repeat(h_q)
    )
    twice = replace(PREFILL, abs=2 * PREFILL.abs, rel=2 * PREFILL.rel, angle=4 * PREFILL.angle)
    assert_out_close(with_sink, with_key.cpu().double(), twice)


@given(seeds, st.integers(1, 60), st.sampled_from(["v32_fp8", "v4_fp8", "v41_fp8", "bf16"]))
def test_invalid_indices_can_be_left_out(
    backend: Backend, seed: int, topk: int, kv_format: str
) -> None:
    """A list with holes, and the list without them."""
    inputs = sparse_decode(generator(seed), backend.device, b=1, topk=topk, kv_format=kv_format)
    check(inputs)
    indices = inputs.inputs["indices"]
    valid = indices[(indices >= 0) & (indices < 3 * 64)].view(1, 1, -1)
    check(inputs, indices=valid)


@given(seeds, st.integers(1, 200), st.integers(1, 3))
def test_a_sparse_call_that_lists_every_key_equals_a_dense_call(
    backend: Backend, seed: int, length: int, s_q: int
) -> None:
    inputs = dense_decode(generator(seed), backend.device, lengths=[length], s_q=s_q)
    page = inputs.inputs["block_table"][0].repeat_interleave(64)[:length]
    offset = torch.arange(length, device=page.device) % 64
    indices = (page * 64 + offset).int().expand(1, s_q, length).contiguous()
    check(inputs, indices=indices)
