"""What only a GPU has: streams, CUDA graphs, several devices."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import gpu_programs
import pytest
import torch
from backends import GPU_BACKENDS, Backend, parameters
from cases import Decode, dense_decode, sparse_decode
from device_decode import FORMATS, DeviceDecode, Format
from device_sparse_decode import FEW_SPARSE_FORMATS, SETS, SparseDecode, decode_of
from tolerances import DECODE, assert_bitwise_equal, assert_lse_close, assert_out_close
from torch import Tensor

pytestmark = pytest.mark.parametrize(
    "backend", parameters(GPU_BACKENDS), indirect=True, scope="session"
)


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
    for inputs in (
        dense_decode(gen, backend.device, lengths=[300, 64]),
        sparse_decode(gen, backend.device, topk=300),
    ):
        late = torch.full_like(inputs.inputs["q"], torch.nan)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds
            late.copy_(inputs.inputs["q"])
            out, lse = inputs.run(q=late)
        stream.synchronize()
        check(inputs, out, lse)


def test_several_streams_at_once(backend: Backend, gen: torch.Generator) -> None:
    cases = [dense_decode(gen, backend.device, lengths=[2000, 64 + i]) for i in range(2)]
    cases += [sparse_decode(gen, backend.device, topk=2000 + i) for i in range(2)]
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


# ---- under load ----

by_dense_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
by_sparse_format = pytest.mark.parametrize("fmt", FEW_SPARSE_FORMATS, ids=lambda f: f"sparse,{f}")
by_format = pytest.mark.parametrize(
    "fmt",
    [pytest.param(f, id=str(f)) for f in FORMATS]
    + [pytest.param(f, id=f"sparse,{f}") for f in FEW_SPARSE_FORMATS],
)


def check_on_device(inputs: DeviceDecode, fmt: Format, out: Tensor, lse: Tensor) -> None:
    assert_out_close(out, inputs.expected_out, fmt.tolerance())
    assert_lse_close(lse, inputs.expected_lse, fmt.tolerance())


def other_lengths(gen: torch.Generator, b: int, longest: int, i: int) -> Tensor:
    lengths = torch.randint(0, longest + 1, (b,), generator=gen)
    if i in (1, 2):  # short ones; one of them as long as can be
        lengths //= 50
    if i == 2:
        lengths[int(torch.randint(0, b, (), generator=gen))] = longest
    return lengths.zero_() if i == 3 else lengths


def other_tables(
    case: DeviceDecode, gen: torch.Generator, longest: int, how_many: int
) -> list[DeviceDecode]:
    """The call with other lengths and with pages in other orders, garbage behind the last one."""
    device = case.inputs["block_table"].device
    table = case.inputs["block_table"].cpu()
    b, used = table.shape[0], longest // 64
    results = []
    for i in range(how_many):
        lengths = other_lengths(gen, b, longest, i)
        changed = torch.full_like(table, 2**31 - 1)
        for n in range(b):
            pages = -(-int(lengths[n]) // 64)
            order = torch.randperm(used, generator=gen)[:pages]
            changed[n, :pages] = table[int(torch.randint(0, b, (), generator=gen)), order]
        tensors = {"cache_seqlens": lengths.int(), "block_table": changed}
        results.append(case.changed(**{name: x.to(device) for name, x in tensors.items()}))
    return results


def other_lists(case: SparseDecode, gen: torch.Generator, how_many: int) -> list[SparseDecode]:
    """The call with other lengths and indices, some of them outside the cache; behind the last that
    counts is one of a NaN token."""
    results = []
    for i in range(how_many):
        changed = {}
        for cache_name, list_name, length_name in SETS:
            if cache_name not in case.inputs:
                continue
            cache, lists = case.inputs[cache_name], case.inputs[list_name].cpu()
            lengths = other_lengths(gen, lists.shape[0], lists.shape[2], i)
            num_tokens = cache.shape[0] * cache.shape[1]
            inside = lists[(lists >= 0) & (lists < num_tokens)]
            lists = inside[torch.randint(0, len(inside), lists.shape, generator=gen)]
            lists[torch.rand(lists.shape, generator=gen) < 0.2] = num_tokens
            lists[torch.arange(lists.shape[2]).expand_as(lists) >= lengths[:, None, None]] = (
                num_tokens - 1
            )
            changed |= {list_name: lists, length_name: lengths.int()}
        results.append(case.changed(**{name: x.to(cache.device) for name, x in changed.items()}))
    return results


@pytest.mark.parametrize("batch_invariant", [False, True])
@by_dense_format
def test_ten_thousand_replays_with_changing_lengths_and_tables(
    backend: Backend, gen: torch.Generator, fmt: Format, batch_invariant: bool
) -> None:
    case = decode_of(fmt, gen, backend.device, [20_032] * 6, s_q=2)
    contents = other_tables(case, gen, 20_032, 8)
    replay_by_turns(contents, fmt, gen, ("cache_seqlens", "block_table"), batch_invariant)


@pytest.mark.parametrize("batch_invariant", [False, True])
@by_sparse_format
def test_ten_thousand_replays_with_changing_lengths_and_indices(
    backend: Backend, gen: torch.Generator, fmt: Format, batch_invariant: bool
) -> None:
    case = decode_of(fmt, gen, backend.device, [9000] * 6, s_q=2)
    contents = other_lists(case, gen, 8)
    names = [x for one in SETS for x in one[1:] if x in case.inputs]
    replay_by_turns(contents, fmt, gen, names, batch_invariant)


def replay_by_turns(
    contents: Sequence[DeviceDecode],
    fmt: Format,
    gen: torch.Generator,
    names: Sequence[str],
    batch_invariant: bool,
) -> None:
    """One graph for calls that differ in the inputs `names` alone: each replay must have the bits
    of the eager call on the same contents."""
    case = contents[0]
    wanted = [x.run(batch_invariant=batch_invariant) for x in contents]
    for inputs, result in zip(contents, wanted, strict=True):
        check_on_device(inputs, fmt, *result)

    fixed = {name: contents[0].inputs[name].clone() for name in names}
    out, graph = case.poisoned_out(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        _, lse = case.run(**fixed, out=out, batch_invariant=batch_invariant)
    wrong = torch.zeros(len(contents), dtype=torch.long, device=out.device)
    for k in torch.randint(0, len(contents), (1_000 if batch_invariant else 10_000,),
                           generator=gen).tolist():  # fmt: skip
        for name in names:
            fixed[name].copy_(contents[k].inputs[name])
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        wrong[k] += (out.view(torch.int16) != wanted[k][0].view(torch.int16)).any()
        wrong[k] += (lse.view(torch.int32) != wanted[k][1].view(torch.int32)).any()
    assert wrong.tolist() == [0] * len(contents), "replays that differ, for each of the contents"


@by_format
def test_several_calls_in_one_graph(backend: Backend, gen: torch.Generator, fmt: Format) -> None:
    """Layers of a model: nothing lies between one call and the next, and their shapes differ."""
    cases = [
        decode_of(fmt, gen, backend.device, lengths, s_q=s_q, h_q=h_q)
        for lengths, s_q, h_q in (
            ([9000, 3], 1, 16), ([64] * 100, 2, 128), ([0], 1, 16), ([40_000], 1, 64),
            ([700, 0, 1], 3, 20),
        )
    ] * 3  # fmt: skip
    outs = [case.poisoned_out() for case in cases]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        lses = [
            case.run(out=out, tile_scheduler_metadata=None)[1]
            for case, out in zip(cases, outs, strict=True)
        ]
    for _ in range(20):
        for x in (*outs, *lses):
            x.fill_(torch.nan)
        graph.replay()
    for case, out, lse in zip(cases, outs, lses, strict=True):
        check_on_device(case, fmt, out, lse)
        eager_out, eager_lse = case.run()
        assert_bitwise_equal(out, eager_out)
        assert_bitwise_equal(lse, eager_lse)


def test_graphs_replayed_in_turn_and_eager_calls_between(
    backend: Backend, gen: torch.Generator
) -> None:
    """Of both operators: they have one sync block a stream, and here their calls alternate."""
    formats = [FORMATS[0], FEW_SPARSE_FORMATS[0]] * 2
    cases = [
        decode_of(fmt, gen, backend.device, lengths, h_q=h_q)
        for fmt, (lengths, h_q) in zip(
            formats, [([9000, 0, 70], 16)] * 2 + [([300] * 64, 128)] * 2, strict=True
        )
    ]
    wanted = [case.run() for case in cases]
    graphs, results = [], []
    for case in cases:
        graph, out = torch.cuda.CUDAGraph(), case.poisoned_out()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            results.append(case.run(out=out))
        graphs.append(graph)
    for i in range(400):
        which = i % 4
        for x in results[which]:
            x.fill_(torch.nan)
        graphs[which].replay()
        eager = cases[which].run() if i % 3 == 0 else wanted[which]
        for found in (results[which], eager):
            for x, y in zip(found, wanted[which], strict=True):
                assert_bitwise_equal(x, y)
    for case, fmt, result in zip(cases, formats, wanted, strict=True):
        check_on_device(case, fmt, *result)


@by_format
def test_calls_that_follow_each_other_at_once_do_not_meet(
    backend: Backend, gen: torch.Generator, fmt: Format
) -> None:
    """They reuse each other's workspace, and no other kernel is between them."""
    cases = [
        decode_of(fmt, gen, backend.device, lengths)
        for lengths in ([30_000, 5], [5, 30_000], [100, 100], [64_000, 0])
    ]
    wanted = [case.run() for case in cases]
    outs = [cases[i % 4].poisoned_out() for i in range(400)]
    torch.cuda.synchronize()
    lses = [cases[i % 4].run(out=outs[i], tile_scheduler_metadata=None)[1] for i in range(400)]
    for i in range(400):
        assert_bitwise_equal(outs[i], wanted[i % 4][0])
        assert_bitwise_equal(lses[i], wanted[i % 4][1])
    for case, result in zip(cases, wanted, strict=True):
        check_on_device(case, fmt, *result)


PROGRAM_SECONDS = 150  # a few times what one takes; a hang is what it is for


@pytest.mark.parametrize("name", sorted(gpu_programs.PROGRAMS))
def test_in_a_process_of_its_own(backend: Backend, gen: torch.Generator, name: str) -> None:
    seed = str(int(torch.randint(2**31, (), generator=gen)))
    try:
        done = subprocess.run(
            [sys.executable, gpu_programs.__file__, name, seed],
            capture_output=True,
            text=True,
            timeout=PROGRAM_SECONDS,
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"gpu_programs.py {name} {seed} was still running after {PROGRAM_SECONDS} s")
    assert done.returncode == 0, f"gpu_programs.py {name} {seed}:\n{done.stderr}"


@by_format
def test_each_device_gives_the_same_bits_whichever_is_current(
    backend: Backend, gen: torch.Generator, fmt: Format
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    here = decode_of(fmt, gen, "cuda:0", [20_000, 3, 0], s_q=2)
    there = replace(
        here,
        inputs={name: x.to("cuda:1") for name, x in here.inputs.items()},
        expected_out=here.expected_out.to("cuda:1"),
        expected_lse=here.expected_lse.to("cuda:1"),
    )
    results = []
    for current in (0, 1, 0):
        for case in (here, there, here):
            with torch.cuda.device(current):
                out, lse = case.run()
                assert torch.cuda.current_device() == current
            assert out.device == lse.device == case.inputs["q"].device
            check_on_device(case, fmt, out, lse)
            results.append((out.to("cuda:0"), lse.to("cuda:0")))
    with torch.cuda.device(1):
        out, graph = there.poisoned_out(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            _, lse = there.run(out=out)
        graph.replay()
        torch.cuda.synchronize()
    check_on_device(there, fmt, out, lse)
    results.append((out.to("cuda:0"), lse.to("cuda:0")))
    for result in results[1:]:
        for x, y in zip(result, results[0], strict=True):
            assert_bitwise_equal(x, y)


def test_a_device_that_is_not_the_current_one(backend: Backend, gen: torch.Generator) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    for inputs in (
        dense_decode(gen, "cuda:1", lengths=[300, 64]),
        sparse_decode(gen, "cuda:1", topk=300),
    ):
        with torch.cuda.device(0):
            check(inputs, *inputs.run())
            assert torch.cuda.current_device() == 0
