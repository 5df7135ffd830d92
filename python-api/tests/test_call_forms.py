"""The interface that serving engines call: every generation of it, and how outputs are given."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from backends import Backend
from cases import Decode, dense_decode, every_second, padded_rows, poison, sparse_decode
from tolerances import DECODE, assert_bitwise_equal, assert_lse_close, assert_out_close
from torch import Tensor

import flash_mla
from flash_mla import flash_mla_interface

UPSTREAM_NAMES = [
    "get_mla_metadata",
    "flash_mla_with_kvcache",
    "flash_mla_sparse_fwd",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_varlen_kvpacked_func",
    "FlashMLASchedMeta",
]


def metadata_of(generation: str, inputs: Decode, *, sparse: bool) -> tuple[Any, Any]:
    q = inputs.inputs["q"]
    b, s_q, h_q, _ = q.shape
    seqlens = inputs.inputs.get("cache_seqlens")
    if seqlens is None:
        seqlens = torch.full((b,), 64, dtype=torch.int32, device=q.device)
    if generation == "G1":
        return flash_mla.get_mla_metadata(seqlens, s_q * h_q, 1)
    if generation == "G2":
        topk = inputs.inputs["indices"].shape[-1] if sparse else None
        return flash_mla.get_mla_metadata(
            cache_seqlens=seqlens,
            num_q_tokens_per_head_k=s_q * h_q,
            num_heads_k=1,
            num_heads_q=h_q,
            is_fp8_kvcache=sparse,
            topk=topk,
        )
    return flash_mla.get_mla_metadata()


def assert_right(inputs: Decode, **changes: Any) -> tuple[Tensor, Tensor]:
    out, lse = inputs.run(**changes)
    assert_out_close(out, inputs.expected_out, DECODE)
    assert_lse_close(lse, inputs.expected_lse, DECODE)
    return out, lse


@pytest.mark.parametrize("name", UPSTREAM_NAMES)
def test_the_interface_module_has_the_names_of_the_package(name: str) -> None:
    assert getattr(flash_mla_interface, name) is getattr(flash_mla, name)


def test_parameters_keep_their_upstream_names_and_order() -> None:
    def names(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    decode = [
        *("q", "k_cache", "block_table", "cache_seqlens", "head_dim_v"),
        *("tile_scheduler_metadata", "num_splits", "softmax_scale", "causal", "is_fp8_kvcache"),
        *("indices", "attn_sink", "extra_k_cache", "extra_indices_in_kvcache"),
        *("topk_length", "extra_topk_length"),
    ]
    assert names(flash_mla.flash_mla_with_kvcache)[: len(decode)] == decode
    sparse = ["q", "kv", "indices", "sm_scale", "d_v", "attn_sink", "topk_length"]
    assert names(flash_mla.flash_mla_sparse_fwd)[: len(sparse)] == sparse
    tail = ["dropout_p", "softmax_scale", "causal", "deterministic", "is_varlen"]
    lengths = ["cu_seqlens_qo", "cu_seqlens_kv", "max_seqlen_qo", "max_seqlen_kv"]
    assert names(flash_mla.flash_attn_varlen_func) == ["q", "k", "v", *lengths, *tail]
    assert names(flash_mla.flash_attn_varlen_kvpacked_func) == [
        *("q", "kv"), *lengths, "head_dim_qk", *tail
    ]  # fmt: skip
    assert names(flash_mla.flash_attn_varlen_qkvpacked_func) == [
        *("qkv", "cu_seqlens", "max_seqlen", "head_dim_qk"), *tail
    ]  # fmt: skip


def test_tensor_metadata_has_the_shape_that_engines_copy(backend: Backend) -> None:
    """The first dimension must not depend on b; it is not 1, which asks for batch invariance."""
    rows = set()
    for b in (1, 3, 200):
        seqlens = torch.full((b,), 100, dtype=torch.int32, device=backend.device)
        metadata, num_splits = flash_mla.get_mla_metadata(seqlens, 32, 1)
        assert metadata.dtype == num_splits.dtype == torch.int32
        assert metadata.device.type == num_splits.device.type == backend.device
        assert metadata.shape[1:] == (8,)
        assert num_splits.shape == (b + 1,)
        rows.add(metadata.shape[0])
    assert len(rows) == 1
    assert min(rows) >= 2


def test_object_metadata_can_be_read_and_assigned() -> None:
    metadata, num_splits = flash_mla.get_mla_metadata()
    assert num_splits is None
    assert isinstance(metadata, flash_mla.FlashMLASchedMeta)
    assert isinstance(flash_mla.FlashMLASchedMeta.Config, type)
    assert not metadata.have_initialized
    for name in ("tile_scheduler_metadata", "num_splits", "config"):
        assert hasattr(metadata, name)
    given = torch.zeros(4, 8, dtype=torch.int32)
    metadata.tile_scheduler_metadata = given
    metadata.num_splits = given[0]
    assert metadata.tile_scheduler_metadata is given


@pytest.mark.parametrize("generation", ["G1", "G2", "G3"])
@pytest.mark.parametrize("kind", ["dense", "v32_fp8", "sparse"])
def test_metadata_of_every_generation_serves_every_call(
    backend: Backend, gen: torch.Generator, generation: str, kind: str
) -> None:
    if kind == "sparse":
        inputs = sparse_decode(gen, backend.device, attn_sink=(0.1,))
    else:
        kv_format = "bf16" if kind == "dense" else kind
        inputs = dense_decode(gen, backend.device, lengths=[70, 3], kv_format=kv_format)
    metadata, num_splits = metadata_of(generation, inputs, sparse=kind == "sparse")
    for _ in range(2):  # a decode loop reuses it, layer after layer
        assert_right(inputs, tile_scheduler_metadata=metadata, num_splits=num_splits)


def test_one_metadata_object_serves_calls_of_any_shape(
    backend: Backend, gen: torch.Generator
) -> None:
    metadata, _ = flash_mla.get_mla_metadata()
    for lengths, s_q, heads in (([70, 3], 1, (16, 1)), ([5, 0, 300], 2, (9, 3)), ([1], 1, (1, 1))):
        inputs = dense_decode(gen, backend.device, lengths=lengths, s_q=s_q, heads=heads)
        assert_right(inputs, tile_scheduler_metadata=metadata)
    assert_right(sparse_decode(gen, backend.device), tile_scheduler_metadata=metadata)


def test_tensors_assigned_to_a_metadata_object_are_accepted(
    backend: Backend, gen: torch.Generator
) -> None:
    inputs = dense_decode(gen, backend.device, lengths=[70, 3])
    metadata, _ = flash_mla.get_mla_metadata()
    pair = metadata_of("G1", inputs, sparse=False)
    metadata.tile_scheduler_metadata, metadata.num_splits = pair
    assert_right(inputs, tile_scheduler_metadata=metadata)


def test_stale_metadata_gives_the_right_answer(backend: Backend, gen: torch.Generator) -> None:
    """A CUDA graph is replayed with other lengths than its metadata was made for."""
    inputs = dense_decode(gen, backend.device, lengths=[700, 3, 0, 129])
    metadata, num_splits = metadata_of("G1", inputs, sparse=False)
    for fill in (0, -1, 2**31 - 1):
        changed = metadata.clone().fill_(fill), num_splits.clone().fill_(fill)
        assert_right(inputs, tile_scheduler_metadata=changed[0], num_splits=changed[1])
    other = flash_mla.get_mla_metadata(torch.ones_like(inputs.inputs["cache_seqlens"]), 16, 1)
    assert_right(inputs, tile_scheduler_metadata=other[0], num_splits=other[1])


@pytest.mark.parametrize("as_object", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_metadata_of_one_row_asks_for_batch_invariance(
    backend: Backend, gen: torch.Generator, sparse: bool, as_object: bool
) -> None:
    if sparse:
        inputs = sparse_decode(gen, backend.device, b=3, topk=500)
    else:
        inputs = dense_decode(gen, backend.device, lengths=[4500, 70, 900], heads=(8, 1))
    wanted_out, wanted_lse = assert_right(inputs, batch_invariant=True)
    row = torch.zeros(1, 8, dtype=torch.int32, device=backend.device)
    metadata: Any = row
    if as_object:
        metadata = flash_mla.get_mla_metadata()[0]
        metadata.tile_scheduler_metadata = row
    num_splits = torch.zeros(4, dtype=torch.int32, device=backend.device)
    out, lse = inputs.run(tile_scheduler_metadata=metadata, num_splits=num_splits)
    assert_bitwise_equal(out, wanted_out)
    assert_bitwise_equal(lse, wanted_lse)


@pytest.mark.parametrize("kv_format", ["fp8", "v32_fp8"])
def test_a_float8_cache_needs_no_flag(
    backend: Backend, gen: torch.Generator, kv_format: str
) -> None:
    inputs = dense_decode(gen, backend.device, lengths=[70, 3], kv_format=kv_format)
    plain = assert_right(inputs, is_fp8_kvcache=False)
    flagged = assert_right(inputs, is_fp8_kvcache=True)
    for one, other in zip(plain, flagged, strict=True):
        assert_bitwise_equal(one, other)


@pytest.mark.parametrize("kv_format", ["v32_fp8", "v4_fp8"])
def test_a_packed_cache_needs_no_flag_in_sparse_calls(
    backend: Backend, gen: torch.Generator, kv_format: str
) -> None:
    assert_right(sparse_decode(gen, backend.device, kv_format=kv_format), is_fp8_kvcache=False)


@pytest.mark.parametrize("kv_format", ["bf16", "fp16"])
def test_the_flag_with_a_cache_that_is_not_float8_is_an_error(
    backend: Backend, gen: torch.Generator, kv_format: str
) -> None:
    inputs = dense_decode(gen, backend.device, lengths=[70], kv_format=kv_format)
    with pytest.raises(ValueError, match="is_fp8_kvcache"):
        inputs.run(is_fp8_kvcache=True)


def test_sparse_calls_take_the_tables_that_engines_pass_along(
    backend: Backend, gen: torch.Generator
) -> None:
    """With `indices`, block_table and cache_seqlens say nothing; engines pass dummies."""
    inputs = sparse_decode(gen, backend.device)
    assert_right(
        inputs,
        block_table=torch.zeros(2, 1, dtype=torch.int32, device=backend.device),
        cache_seqlens=torch.zeros(2, dtype=torch.int32, device=backend.device),
    )


def test_positional_calls_as_engines_write_them(backend: Backend, gen: torch.Generator) -> None:
    inputs = dense_decode(gen, backend.device, lengths=[70, 3], softmax_scale=0.1, causal=True)
    x = inputs.inputs
    metadata, num_splits = metadata_of("G1", inputs, sparse=False)
    out, lse = flash_mla.flash_mla_with_kvcache(
        x["q"], x["k_cache"], x["block_table"], x["cache_seqlens"], 512, metadata, num_splits,
        0.1, True,
    )  # fmt: skip
    assert_out_close(out, inputs.expected_out, DECODE)
    assert_lse_close(lse, inputs.expected_lse, DECODE)


def out_layouts(b: int, s_q: int, h_q: int, device: str) -> dict[str, Tensor]:
    plain = poison(b, s_q, h_q, 512, dtype=torch.bfloat16, device=device)
    return {
        "contiguous": plain,
        "wider rows": padded_rows(plain),
        "heads first": plain.transpose(1, 2).contiguous().transpose(1, 2),
        "every second request": every_second(plain),
    }


@pytest.mark.parametrize(
    "layout", ["contiguous", "wider rows", "heads first", "every second request"]
)
@pytest.mark.parametrize("sparse", [False, True])
def test_out_is_written_where_it_lies(
    backend: Backend, gen: torch.Generator, layout: str, sparse: bool
) -> None:
    if sparse:
        inputs = sparse_decode(gen, backend.device, b=2, s_q=3)
    else:
        inputs = dense_decode(gen, backend.device, lengths=[70, 3], s_q=3)
    given = out_layouts(2, 3, 16, backend.device)[layout]
    out, _ = assert_right(inputs, out=given)
    assert out is given


def test_what_surrounds_a_strided_out_is_left_alone(backend: Backend, gen: torch.Generator) -> None:
    inputs = dense_decode(gen, backend.device, lengths=[70, 3])
    wide = torch.full((2, 1, 16, 640), 7.0, dtype=torch.bfloat16, device=backend.device)
    assert_right(inputs, out=wide[..., 64:576])
    assert (wide[..., :64] == 7).all()
    assert (wide[..., 576:] == 7).all()


def test_sparse_prefill_writes_to_out(backend: Backend, gen: torch.Generator) -> None:
    q = torch.randn(3, 4, 576, generator=gen).bfloat16().to(backend.device)
    kv = torch.randn(9, 1, 576, generator=gen).bfloat16().to(backend.device)
    indices = torch.arange(9, dtype=torch.int32, device=backend.device).repeat(3, 1, 1)
    plain, _, _ = flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.05)
    given = padded_rows(poison(3, 4, 512, dtype=torch.bfloat16, device=backend.device))
    out, _, _ = flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.05, out=given)
    assert out is given
    assert_bitwise_equal(out, plain)


def test_inference_mode(backend: Backend, gen: torch.Generator) -> None:
    dense = dense_decode(gen, backend.device, lengths=[70, 3])
    sparse = sparse_decode(gen, backend.device)
    with torch.inference_mode():
        for inputs in (dense, sparse):
            assert_right(inputs)
            assert_right(inputs, out=None)
