"""What the benchmarks share: timing, ceilings, machine facts, the table and the JSON file.

Times are medians in microseconds. On a GPU a plain time starts with a flushed L2 (that is what
triton's do_bench does); a graph time is one call's share of a replayed CUDA graph of many calls, so
it has a warm L2 and no launch cost of the host.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"

GRAPH_CALLS = 20


# --------------------------------------------------------------------------------------------------
# Timing
# --------------------------------------------------------------------------------------------------


def time_cpu(
    calls: Sequence[Callable[[], Any]],
    *,
    budget_s: float = 0.3,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> list[float]:
    """Median microseconds of each call.

    The calls take turns, so that what else the machine does, and the caches that each leaves to the
    next, weigh on all of them alike.

    Args:
        calls: what to time.
        budget_s: seconds that each call may take on average, warm-up left out.
        min_rounds, max_rounds: bounds of the number of turns.
    """
    for call in calls:  # the first call allocates, compiles and starts threads
        call()
    warm = [_elapsed_us(call) for call in calls]
    rounds = int(budget_s * 1e6 * len(calls) / sum(warm))
    rounds = min(max(rounds, min_rounds), max_rounds)
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, samples in zip(calls, times, strict=True):
            samples.append(_elapsed_us(call))
    return [statistics.median(samples) for samples in times]


def _elapsed_us(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def time_cuda(call: Callable[[], Any]) -> float:
    """Median microseconds of a call that starts with a flushed L2."""
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median")) * 1e3


def time_cuda_graph(call: Callable[[], Any], *, replays: int = 20) -> float:
    """Median microseconds of a call inside a replayed graph of GRAPH_CALLS calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # outside the capture: the first call may load modules
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            call()
    graph.replay()
    samples = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / GRAPH_CALLS)
    return statistics.median(samples)


class Ceilings:
    """What the machine reaches at best: reading memory, and multiplying matrices.

    Clocks and neighbours change during a run: call `sample` between the cases, at least 5 times;
    the medians count. On a GPU: torch.sum over 2^30 random float32, and a bf16 product of 8192^3.
    On a CPU: the sum over 2^26, and a float32 product of 2048^3.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        n, dim = (1 << 30, 8192) if self._cuda else (1 << 26, 2048)
        self._vector = torch.rand(n, device=device)
        dtype = torch.bfloat16 if self._cuda else torch.float32
        self._a, self._b = (torch.randn(dim, dim, device=device, dtype=dtype) for _ in range(2))
        self._read_gbps: list[float] = []
        self._gemm_tflops: list[float] = []

    def sample(self) -> None:
        read, gemm = self._vector.sum, lambda: self._a @ self._b
        if self._cuda:
            read_us, gemm_us = time_cuda(read), time_cuda(gemm)
        else:
            read_us, gemm_us = time_cpu([read, gemm], budget_s=0.05, min_rounds=3)
        self._read_gbps.append(self._vector.nbytes / read_us * 1e-3)
        self._gemm_tflops.append(2 * self._a.shape[0] ** 3 / gemm_us * 1e-6)

    def medians(self) -> dict[str, float]:
        return {
            "read_gbps": round(statistics.median(self._read_gbps), 1),
            "gemm_tflops": round(statistics.median(self._gemm_tflops), 3),
        }


# --------------------------------------------------------------------------------------------------
# Facts
# --------------------------------------------------------------------------------------------------


def machine_facts(device: str) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    cuda = device.startswith("cuda")
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "driver": _driver_version() if cuda else None,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.splitlines()[0].strip()


# --------------------------------------------------------------------------------------------------
# Output
# --------------------------------------------------------------------------------------------------


class Table:
    """Prints rows as they come. The first column is aligned left, the others right."""

    def __init__(self, **columns: int) -> None:
        """columns: title (underscores stand for blanks) and width in characters."""
        self._widths = list(columns.values())
        self.print(*(title.replace("_", " ") for title in columns))

    def print(self, *cells: str | float) -> None:
        texts = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
        first, *rest = zip(texts, self._widths, strict=True)
        print(first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest), flush=True)


def result_row(**fields: Any) -> dict[str, Any]:
    """One row of a result file: a case's shape and its measurements; a benchmark may add keys."""
    row: dict[str, Any] = dict.fromkeys(
        ["b", "s_q", "s_k", "h_q", "d_qk", "q_dtype", "kv_format", "page_size", "topk"]
    )
    row |= {"q_dtype": "bf16", "kv_format": "bf16", "varlen": False, "causal": False}
    row |= dict.fromkeys(["variant", "us", "graph_us", "tflops", "gbps"])
    return {**row, **fields}


def write_json(
    machine: str,
    operator: str,
    facts: dict[str, Any],
    ceilings: dict[str, float],
    rows: Sequence[dict[str, Any]],
) -> Path:
    """Writes results/<machine>/<operator>.json, one row a line, and returns its path."""
    path = RESULTS / machine / f"{operator}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({**facts, "ceilings": ceilings}, indent=1)[:-2]
    body = ",\n  ".join(json.dumps(row) for row in rows)
    path.write_text(f'{head},\n "rows": [\n  {body}\n ]\n}}\n')
    return path
