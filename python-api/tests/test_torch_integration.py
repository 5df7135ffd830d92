"""The operators as citizens of PyTorch: opcheck, torch.compile, fake tensors, threads, autograd."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from backends import Backend
from cases import Decode, dense_decode, normal, sparse_decode
from mha_cases import varlen
from op_cases import FUNCTIONAL, MUTATING, op_arguments
from tolerances import (
    DECODE,
    PREFILL,
    assert_bitwise_equal,
    assert_gradient_close,
    assert_lse_close,
    assert_out_close,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_mla


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    """A graph compiled for one test, or its guards, must not serve another."""
    torch._dynamo.reset()


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", FUNCTIONAL + MUTATING)
def test_opcheck(backend: Backend, gen: torch.Generator, name: str) -> None:
    op, arguments = op_arguments(name, gen, backend.device)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks.append("test_aot_dispatch_dynamic")
    if "fp8" in name.split():  # it compares inputs with allclose, which torch lacks for float8
        checks.remove("test_schema")
    torch.library.opcheck(op, arguments, test_utils=checks)


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional_ops_are_compiled_without_graph_breaks(
    backend: Backend, gen: torch.Generator, name: str
) -> None:
    op, arguments = op_arguments(name, gen, backend.device)
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    found, wanted = tensors_of(compiled(*arguments)), tensors_of(op(*arguments))
    for x, y in zip(found, wanted, strict=True):
        assert_bitwise_equal(x, y)


@pytest.mark.parametrize("name", MUTATING)
def test_mutating_ops_are_compiled_without_graph_breaks(
    backend: Backend, gen: torch.Generator, name: str
) -> None:
    op, arguments = op_arguments(name, gen, backend.device)
    written = 1 if name == "kv_cache_append_" else -1

    def with_copy() -> tuple[Any, ...]:
        copies = list(arguments)
        copies[written] = arguments[written].clone()
        return tuple(copies)

    eager, traced = with_copy(), with_copy()
    op(*eager)
    torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")(*traced)
    assert_bitwise_equal(traced[written], eager[written])
    assert not torch.equal(traced[written], arguments[written]), "something was written"


@pytest.mark.parametrize("name", ["mla_decode_dense", "mla_decode_sparse", "mla_prefill_sparse"])
def test_out_forms_equal_functional_forms(
    backend: Backend, gen: torch.Generator, name: str
) -> None:
    """The out form gives everything but out."""
    op, arguments = op_arguments(name, gen, backend.device)
    wanted = tensors_of(op(*arguments))
    out = torch.full_like(wanted[0], torch.nan)
    rest = tensors_of(getattr(torch.ops.flash_mla, name + "_out")(*arguments, out))
    for x, y in zip((out, *rest), wanted, strict=True):
        assert_bitwise_equal(x, y)


def decode_calls(gen: torch.Generator, device: str) -> list[tuple[Decode, dict[str, Any]]]:
    dense = dense_decode(gen, device, lengths=[70, 3], s_q=2, causal=True)
    seqlens = dense.inputs["cache_seqlens"]
    metadata, num_splits = flash_mla.get_mla_metadata(seqlens, 32, 1)
    tensors = {"tile_scheduler_metadata": metadata, "num_splits": num_splits}
    sparse = sparse_decode(gen, device, attn_sink=(0.1,), extra=("v32_fp8", 2, 9))
    whole = {"tile_scheduler_metadata": flash_mla.get_mla_metadata()[0]}
    return [(dense, tensors), (dense, whole), (sparse, tensors), (sparse, whole)]


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("with_out", [False, True])
def test_decode_is_compiled_without_graph_breaks(
    backend: Backend, gen: torch.Generator, call: int, with_out: bool
) -> None:
    inputs, metadata = decode_calls(gen, backend.device)[call]
    arguments: dict[str, Any] = {"block_table": None, "cache_seqlens": None, "head_dim_v": 512}
    arguments |= inputs.inputs | inputs.options | metadata
    if with_out:
        shape = (*inputs.inputs["q"].shape[:3], 512)
        arguments["out"] = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=backend.device)

    def twice(**kwargs: Any) -> tuple[Tensor, Tensor]:
        out, lse = flash_mla.flash_mla_with_kvcache(**kwargs)
        return out * 2, lse  # exact in bf16

    out, lse = torch.compile(twice, fullgraph=True, backend="aot_eager")(**arguments)
    assert_out_close(out / 2, inputs.expected_out, DECODE)
    assert_lse_close(lse, inputs.expected_lse, DECODE)


def test_one_compiled_decode_serves_many_shapes(backend: Backend, gen: torch.Generator) -> None:
    metadata = flash_mla.get_mla_metadata()[0]
    compiled = torch.compile(
        lambda q, cache, table, seqlens: flash_mla.flash_mla_with_kvcache(
            q, cache, table, seqlens, 512, metadata
        ),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for lengths in ([70, 3], [5, 0, 130, 64], [9, 9, 300]):
        inputs = dense_decode(gen, backend.device, lengths=lengths, s_q=2)
        names = ("q", "k_cache", "block_table", "cache_seqlens")
        out, lse = compiled(*(inputs.inputs[name] for name in names))
        assert_out_close(out, inputs.expected_out, DECODE)
        assert_lse_close(lse, inputs.expected_lse, DECODE)


def test_prefill_and_merging_are_compiled_without_graph_breaks(
    backend: Backend, gen: torch.Generator
) -> None:
    q = normal(gen, 5, 4, 576, std=1.0).bfloat16().to(backend.device)
    kv = normal(gen, 20, 1, 576, std=0.1).bfloat16().to(backend.device)
    indices = torch.arange(20, dtype=torch.int32, device=backend.device).expand(5, 1, 20)
    indices = indices.contiguous()

    def halves(q: Tensor, kv: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        first = flash_mla.flash_mla_sparse_fwd(q, kv, indices[..., :8], 0.05)
        second = flash_mla.flash_mla_sparse_fwd(q, kv, indices[..., 8:], 0.05)
        return flash_mla.merge_attn_states(first[0], first[2], second[0], second[2])

    compiled = torch.compile(halves, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(q, kv, indices), halves(q, kv, indices), strict=True):
        assert_bitwise_equal(x, y)


@pytest.mark.parametrize("training", [False, True])
def test_varlen_attention_is_compiled_without_graph_breaks(
    backend: Backend, gen: torch.Generator, training: bool
) -> None:
    case = varlen(gen, backend.device, q_lengths=[9, 5], kv_lengths=[9, 20], causal=True)
    inputs = [x.detach().requires_grad_(training) for x in (case.q, case.k, case.v)]
    compiled = torch.compile(flash_mla.flash_attn_varlen_func, fullgraph=True, backend="aot_eager")
    out, lse = compiled(*inputs, *case.lengths, causal=True)
    expected_out, expected_lse = case.expected()
    assert_out_close(out, expected_out, PREFILL)
    assert_lse_close(lse, expected_lse, PREFILL)
    if training:
        d_out = normal(gen, *out.shape, std=1.0).to(out.dtype).to(out.device)
        found = torch.autograd.grad(out, inputs, d_out)
        for gradient, expected in zip(found, case.expected_gradients(d_out), strict=True):
            assert_gradient_close(gradient, expected)


def test_fake_tensors_give_shapes_without_computing() -> None:
    with FakeTensorMode():
        q = torch.empty(3, 2, 16, 576, dtype=torch.bfloat16)
        cache = torch.empty(1_000_000, 64, 1, 576, dtype=torch.bfloat16)
        table = torch.empty(3, 1_000, dtype=torch.int32)
        seqlens = torch.empty(3, dtype=torch.int32)
        metadata = flash_mla.get_mla_metadata()[0]
        out, lse = flash_mla.flash_mla_with_kvcache(q, cache, table, seqlens, 512, metadata)
        assert (out.shape, out.dtype) == ((3, 2, 16, 512), torch.bfloat16)
        assert (lse.shape, lse.dtype) == ((3, 16, 2), torch.float32)

        packed = torch.empty(1_000_000, 64, 1, 656, dtype=torch.uint8)
        indices = torch.empty(3, 2, 2048, dtype=torch.int32)
        out, lse = flash_mla.flash_mla_with_kvcache(
            q, packed, None, None, 512, metadata, is_fp8_kvcache=True, indices=indices
        )
        assert (out.shape, lse.shape) == ((3, 2, 16, 512), (3, 16, 2))

        latent = torch.empty(50, 1, 576, dtype=torch.bfloat16)
        listed = torch.empty(6, 1, 7, dtype=torch.int32)
        out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(q.flatten(0, 1), latent, listed, 0.05)
        assert (out.shape, max_logits.shape, lse.shape) == ((6, 16, 512), (6, 16), (6, 16))

        k, v = torch.empty(9, 4, 192).bfloat16(), torch.empty(9, 4, 128).bfloat16()
        cu_seqlens = torch.empty(3, dtype=torch.int32)
        out, lse = flash_mla.flash_attn_varlen_func(k, k, v, cu_seqlens, cu_seqlens, 9, 9)
        assert (out.shape, lse.shape, lse.stride()) == ((9, 4, 128), (9, 4), (1, 9))


def test_threads_do_not_disturb_each_other(backend: Backend, gen: torch.Generator) -> None:
    cases = [
        dense_decode(gen, backend.device, lengths=[130 + 40 * i, i], s_q=2) for i in range(3)
    ] + [sparse_decode(gen, backend.device, h_q=9 + i, topk=100) for i in range(3)]
    wanted = [case.run() for case in cases]

    def repeatedly(which: int) -> list[tuple[Tensor, Tensor]]:
        return [cases[which].run() for _ in range(8)]

    with ThreadPoolExecutor(len(cases)) as pool:
        for results, (out, lse) in zip(
            pool.map(repeatedly, range(len(cases))), wanted, strict=True
        ):
            for found_out, found_lse in results:
                assert_bitwise_equal(found_out, out)
                assert_bitwise_equal(found_lse, lse)


def inference_calls(gen: torch.Generator, device: str) -> dict[str, tuple[list[Tensor], Any]]:
    """name: (the tensors that could require grad, a call of them)"""
    dense = dense_decode(gen, device, lengths=[70, 3])
    sparse = sparse_decode(gen, device, attn_sink=(0.1,))
    q = normal(gen, 3, 4, 576, std=1.0).bfloat16().to(device)
    kv = normal(gen, 9, 1, 576, std=1.0).bfloat16().to(device)
    indices = torch.arange(9, dtype=torch.int32, device=device).repeat(3, 1, 1)
    halves = op_arguments("merge_attn_states", gen, device)[1]
    calls: dict[str, tuple[list[Tensor], Callable[[], Any]]] = {
        "dense": ([dense.inputs["q"], dense.inputs["k_cache"]], lambda: dense.run(out=None)),
        "dense with out": ([dense.inputs["q"]], dense.run),
        "sparse": ([sparse.inputs["q"]], lambda: sparse.run(out=None)),
        "sparse sink": ([sparse.inputs["attn_sink"]], lambda: sparse.run(out=None)),
        "prefill": ([q, kv], lambda: flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.05)),
        "merge": (list(halves), lambda: flash_mla.merge_attn_states(*halves)),
    }
    return calls


@pytest.mark.parametrize(
    "name", ["dense", "dense with out", "sparse", "sparse sink", "prefill", "merge"]
)
def test_inference_ops_refuse_inputs_that_require_grad(
    backend: Backend, gen: torch.Generator, name: str
) -> None:
    """Silently cutting the graph would train nothing; the remedy is named."""
    tensors, call = inference_calls(gen, backend.device)[name]
    for x in tensors:
        x.requires_grad_()
        with pytest.raises(RuntimeError, match=r"no_grad|inference_mode|detach"):
            call()
        with torch.no_grad():
            call()
        x.requires_grad_(False)
    call()
