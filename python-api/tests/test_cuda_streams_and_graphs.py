"""What only a GPU has: streams, CUDA graphs, several devices."""

from __future__ import annotations

import pytest
import torch
from backends import Backend
from cases import Decode, dense_decode, sparse_decode
from tolerances import DECODE, assert_lse_close, assert_out_close
from torch import Tensor


@pytest.fixture(autouse=True)
def _needs_cuda(backend: Backend) -> None:
    if backend.device != "cuda":
        pytest.skip(f"{backend.name} has no streams")


def check(inputs: Decode, out: Tensor, lse: Tensor) -> None:
    assert_out_close(out, inputs.expected_out, DECODE)
    assert_lse_close(lse, inputs.expected_lse, DECODE)


def test_a_graph_is_replayed_with_other_contents(backend: Backend, gen: torch.Generator) -> None:
    """Captured on the first call of these shapes; then lengths, tables and cache change."""
    first, second = (
        dense_decode(gen, backend.device, lengths=lengths, s_q=2, causal=True)
        for lengths in ([64, 130, 5], [1, 190, 0])
    )
    pages = max(x.inputs["k_cache"].shape[0] for x in (first, second))
    columns = max(x.inputs["block_table"].shape[1] for x in (first, second))

    def padded(inputs: Decode) -> dict[str, Tensor]:
        """Pages beyond the pool stay poisoned, columns beyond the table stay garbage."""
        cache, table = inputs.inputs["k_cache"], inputs.inputs["block_table"]
        wide = torch.full((pages, *cache.shape[1:]), torch.nan).to(cache)
        wide[: cache.shape[0]] = cache
        wide_table = torch.full((table.shape[0], columns), -1).to(table)
        wide_table[:, : table.shape[1]] = table
        return inputs.inputs | {"k_cache": wide, "block_table": wide_table}

    fixed = {name: x.clone() for name, x in padded(first).items()}
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out, lse = first.run(**fixed)
    for inputs in (first, second, first):
        for name, x in padded(inputs).items():
            fixed[name].copy_(x)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        check(inputs, out, lse)


def test_a_sparse_graph_is_replayed_with_other_contents(
    backend: Backend, gen: torch.Generator
) -> None:
    first, second = (
        sparse_decode(gen, backend.device, topk=200, topk_length=lengths, attn_sink=(0.2,))
        for lengths in ([200, 3], [0, 77])
    )
    fixed = {name: x.clone() for name, x in first.inputs.items()}
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out, lse = first.run(**fixed)
    for inputs in (first, second, first):
        for name, x in inputs.inputs.items():
            fixed[name].copy_(x)
        out.fill_(torch.nan)
        graph.replay()
        check(inputs, out, lse)


def test_calls_follow_the_current_stream(backend: Backend, gen: torch.Generator) -> None:
    """The query becomes right late in the side stream; the default stream would read it early."""
    inputs = dense_decode(gen, backend.device, lengths=[300, 64])
    late = torch.full_like(inputs.inputs["q"], torch.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds
        late.copy_(inputs.inputs["q"])
        out, lse = inputs.run(q=late)
    stream.synchronize()
    check(inputs, out, lse)


def test_two_streams_at_once(backend: Backend, gen: torch.Generator) -> None:
    cases = [dense_decode(gen, backend.device, lengths=[2000, 64 + i]) for i in range(2)]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for inputs, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append((inputs, *inputs.run()))
    torch.cuda.synchronize()
    for result in results:
        check(*result)


def test_a_device_that_is_not_the_current_one(backend: Backend, gen: torch.Generator) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    inputs = dense_decode(gen, "cuda:1", lengths=[300, 64])
    with torch.cuda.device(0):
        check(inputs, *inputs.run())
        assert torch.cuda.current_device() == 0
