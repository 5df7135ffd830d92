"""Programs that a test runs in a process of its own: `python gpu_programs.py NAME SEED`.

For what only a new process has (the first call of all), and for what must not hang: the test gives
them a time limit. FLASH_MLA_KERNEL is inherited. They print nothing and end with 0 if all is well.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from device_decode import FORMATS, DeviceDecode, Format, check
from device_sparse_decode import FEW_SPARSE_FORMATS, SPARSE_FORMATS, decode_of
from kv_cache_bytes import PACKED, PLAIN
from tolerances import assert_bitwise_equal, assert_lse_close, assert_out_close
from torch import Tensor

import flash_mla

DEVICE = "cuda"


def first_call_under_capture(gen: torch.Generator) -> None:
    """Nothing of the library has run before; each format's first call is captured too."""
    formats = [*FORMATS, *SPARSE_FORMATS]
    cases = [decode_of(f, gen, DEVICE, [3000, 0, 65], s_q=2) for f in formats]
    for fmt, case in zip(formats, cases, strict=True):
        graph, out = torch.cuda.CUDAGraph(), case.poisoned_out()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            _, lse = case.run(out=out)
        for _ in range(3):
            out.fill_(torch.nan)
            lse.fill_(torch.nan)
            graph.replay()
            assert_out_close(out, case.expected_out, fmt.tolerance())
            assert_lse_close(lse, case.expected_lse, fmt.tolerance())
        eager_out, eager_lse = case.run()
        assert_bitwise_equal(eager_out, out)
        assert_bitwise_equal(eager_lse, lse)


def first_kv_cache_call_under_capture(gen: torch.Generator) -> None:
    for name in (*PLAIN, *PACKED):
        d_qk = PACKED[name].d_qk if name in PACKED else 576
        kv = torch.randn(100, 1, d_qk, generator=gen).to(DEVICE, torch.bfloat16)
        slots = torch.randperm(128, generator=gen)[:100].to(DEVICE)
        captured, eager = (flash_mla.kv_cache_empty(name, 2, 64, device=DEVICE) for _ in range(2))
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            flash_mla.kv_cache_append(kv, captured, slots, name)
            read = flash_mla.kv_cache_unpack(captured, name)
        graph.replay()
        flash_mla.kv_cache_append(kv, eager, slots, name)
        assert_bitwise_equal(captured, eager)
        assert_bitwise_equal(read, flash_mla.kv_cache_unpack(eager, name))
        assert read.any()


class Worker:
    """A call made again and again, its results compared on the device with those of before."""

    def __init__(self, case: DeviceDecode, fmt: Format, stream: torch.cuda.Stream) -> None:
        self.case, self.stream = case, stream
        self.wanted = check(case, fmt)
        self.out = case.poisoned_out()
        self.wrong = torch.zeros((), dtype=torch.long, device=DEVICE)
        torch.cuda.synchronize()

    def compare(self, lse: Tensor) -> None:
        for found, wanted in zip((self.out, lse), self.wanted, strict=True):
            self.wrong += (found.view(torch.uint8) != wanted.view(torch.uint8)).any()

    def step(self, check: bool) -> None:
        """check=False leaves nothing between this call and the stream's next one."""
        with torch.cuda.stream(self.stream):
            _, lse = self.case.run(out=self.out, tile_scheduler_metadata=None)
            if check:
                self.compare(lse)
                self.out.fill_(torch.nan)

    def capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for _ in range(3):
                _, lse = self.case.run(out=self.out, tile_scheduler_metadata=None)
            self.compare(lse)
        return graph


def workers(
    gen: torch.Generator, batches: Sequence[Sequence[int]], h_q: int, formats: Sequence[Format]
) -> list[Worker]:
    """The formats in turn."""
    return [
        Worker(decode_of(f, gen, DEVICE, lengths, h_q=h_q), f, torch.cuda.Stream())
        for lengths, f in zip(batches, itertools.cycle(formats), strict=False)
    ]


DENSE, SPARSE = [FORMATS[0], FORMATS[-1]], FEW_SPARSE_FORMATS[::2]
# Calls small enough to be on the GPU together; calls that each would take all of it.
TOGETHER = [
    [[70, 3], [64, 200]],
    [[100_000], [99_000]],
    [[100_000], [70, 3]],
    [[3000] * 40, [2000, 5] * 30, [100_000], [1]],
]


def concurrent_streams(gen: torch.Generator) -> None:
    """Eager calls on a stream each, then graphs."""
    for h_q, batches, formats in itertools.product((16, 128), TOGETHER, (DENSE, SPARSE)):
        group = workers(gen, batches, h_q, formats)
        for i in range(300):
            for worker in group:
                worker.step(check=i % 3 == 2)
        torch.cuda.synchronize()
        assert [int(w.wrong) for w in group] == [0] * len(group), ("eager", h_q, batches, formats)

        graphs = [worker.capture() for worker in group]
        torch.cuda.synchronize()
        for _ in range(100):
            for worker, graph in zip(group, graphs, strict=True):
                with torch.cuda.stream(worker.stream):
                    graph.replay()
        torch.cuda.synchronize()
        assert [int(w.wrong) for w in group] == [0] * len(group), ("graphs", h_q, batches, formats)


def concurrent_threads(gen: torch.Generator) -> None:
    """Threads with a stream each, and threads that share the default stream."""
    batches = [[700, 3], [64] * 50, [20_000], [0, 1, 2]]
    own = workers(gen, batches, 16, [*DENSE, *SPARSE])
    shared = workers(gen, batches, 16, [*SPARSE, *DENSE])
    for worker in shared:
        worker.stream = torch.cuda.default_stream()

    def many_steps(worker: Worker) -> None:
        for i in range(200):
            worker.step(check=i % 2 == 1)

    with ThreadPoolExecutor(len(own) + len(shared)) as pool:
        list(pool.map(many_steps, own + shared))
    torch.cuda.synchronize()
    assert [int(w.wrong) for w in own + shared] == [0] * (len(own) + len(shared))


PROGRAMS: dict[str, Callable[[torch.Generator], None]] = {
    f.__name__: f
    for f in (
        first_call_under_capture,
        first_kv_cache_call_under_capture,
        concurrent_streams,
        concurrent_threads,
    )
}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](torch.Generator().manual_seed(int(sys.argv[2])))
