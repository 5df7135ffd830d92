"""What the benchmarks share: timing, ceilings, machine facts, the table and the JSON file.

Times are medians in microseconds. On a GPU a plain time starts with a flushed L2 (that is what
triton's do_bench does); a graph time is one call's share of a replayed CUDA graph of many calls, so
it has a warm L2 and no launch cost of the host.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

RESULTS = Path(__file__).resolve().parent / "results"

# Calls in a graph, within these bounds as many as fill GRAPH_US: launching it must not show.
GRAPH_CALLS = (20, 100)
GRAPH_US = 2000.0

MIN_CEILING_SAMPLES = 5  # of a run


# --------------------------------------------------------------------------------------------------
# Choosing
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effort:
    warmup_ms: int = 25
    rep_ms: int = 100
    graph_ms: float = 100.0


QUICK = Effort(warmup_ms=10, rep_ms=30, graph_ms=30.0)


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark takes; the description is the first line of its docstring."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--cases", metavar="REGEX", help="only cases whose name it is found in")
    parser.add_argument(
        "--quick", action="store_true", help="shorter times, only cases with a bar; writes no JSON"
    )
    parser.add_argument("--no-json", action="store_true", help="print only")
    return parser


class NamedCase(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def bar(self) -> object | None: ...


AnyCase = TypeVar("AnyCase", bound=NamedCase)


def chosen_cases(cases: Sequence[AnyCase], args: argparse.Namespace) -> list[AnyCase]:
    """The cases that the arguments of `argument_parser` leave."""
    cases = [case for case in cases if case.bar or not args.quick]
    return [case for case in cases if args.cases is None or re.search(args.cases, case.name)]


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


def time_cuda(call: Callable[[], Any], *, warmup_ms: int = 25, rep_ms: int = 100) -> float:
    """Median microseconds of a call that starts with a flushed L2."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=warmup_ms, rep=rep_ms, return_mode="median")) * 1e3


def time_cuda_graph(call: Callable[[], Any], *, budget_ms: float = 100.0) -> tuple[float, Any]:
    """Median microseconds of a call inside a replayed graph of at least 20, and what the last of
    them returned at the last replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # outside the capture: the first call may load modules
        call_us = _events_us(lambda: [call() for _ in range(5)]) / 5
    torch.cuda.current_stream().wait_stream(stream)
    fewest, most = GRAPH_CALLS
    calls = min(max(int(GRAPH_US / call_us), fewest), most)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            result = call()
    graph_us = _events_us(graph.replay)
    replays = min(max(int(budget_ms * 1e3 / graph_us), 5), 50)
    # Each measured replay follows another one, which hides the time that the host takes to launch.
    samples = [_events_us(graph.replay, lead_in=graph.replay) for _ in range(replays)]
    return statistics.median(samples) / calls, result


def _events_us(work: Callable[[], Any], lead_in: Callable[[], Any] | None = None) -> float:
    """Microseconds of the current stream's time between the events around `work`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if lead_in is not None:
        lead_in()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def time_cuda_host(call: Callable[[], Any], *, calls: int = 1000, rounds: int = 5) -> float:
    """Mean microseconds that the host takes to enqueue a call, the median of some rounds. The call
    must take the GPU less time than the host, or the stream's queue fills up and is timed too."""
    samples = []
    for _ in range(rounds):
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) * 1e6 / calls)
        torch.cuda.synchronize()
    return statistics.median(samples)


class Ceilings:
    """What the machine reaches at best: reading memory, and multiplying matrices.

    Clocks and neighbours change during a run: call `sample` between the cases, at least 5 times;
    the medians count. On a GPU: torch.sum over 2^30 random float32, and a bf16 product of 8192^3.
    On a CPU: the sum over 2^26, and a float32 product of 2048^3. copy=True: also copying those
    float32, whose bytes count twice, read and written.
    """

    def __init__(self, device: str, *, copy: bool = False) -> None:
        self._cuda = device.startswith("cuda")
        n, dim = (1 << 30, 8192) if self._cuda else (1 << 26, 2048)
        self._vector = torch.rand(n, device=device)
        dtype = torch.bfloat16 if self._cuda else torch.float32
        self._a, self._b = (torch.randn(dim, dim, device=device, dtype=dtype) for _ in range(2))
        self._target = torch.empty_like(self._vector) if copy else None
        self._read_gbps: list[float] = []
        self._gemm_tflops: list[float] = []
        self._copy_gbps: list[float] = []

    def sample(self) -> None:
        calls = [self._vector.sum, lambda: self._a @ self._b]
        if self._target is not None:
            target = self._target
            calls.append(lambda: target.copy_(self._vector))
        if self._cuda:
            times = [time_cuda(call) for call in calls]
        else:
            times = time_cpu(calls, budget_s=0.05, min_rounds=3)
        self._read_gbps.append(self._vector.nbytes / times[0] * 1e-3)
        self._gemm_tflops.append(2 * self._a.shape[0] ** 3 / times[1] * 1e-6)
        if self._target is not None:
            self._copy_gbps.append(2 * self._vector.nbytes / times[2] * 1e-3)

    @property
    def samples(self) -> int:
        return len(self._read_gbps)

    def medians(self) -> dict[str, float]:
        medians = {
            "read_gbps": round(statistics.median(self._read_gbps), 1),
            "gemm_tflops": round(statistics.median(self._gemm_tflops), 3),
        }
        if self._copy_gbps:
            medians["copy_gbps"] = round(statistics.median(self._copy_gbps), 1)
        return medians


class SmClock:
    """The current GPU's SM clock as NVML, the driver's own library, tells it."""

    _SM = 1  # NVML_CLOCK_SM

    def __init__(self) -> None:
        self._nvml: ctypes.CDLL | None = None
        self._device = ctypes.c_void_p()
        uuid = f"GPU-{torch.cuda.get_device_properties().uuid}".encode()
        try:
            nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return  # no NVML here: no clocks
        failed = nvml.nvmlInit_v2()
        failed = failed or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(self._device))
        if not failed:
            self._nvml = nvml

    def mhz(self) -> float | None:
        clock = ctypes.c_uint()
        if self._nvml is None:
            return None
        failed = self._nvml.nvmlDeviceGetClockInfo(self._device, self._SM, ctypes.byref(clock))
        return None if failed else float(clock.value)

    @contextmanager
    def sampled(self, every_s: float = 0.01) -> Iterator[Callable[[], float | None]]:
        """Yields what tells, afterwards, the median clock of the time inside the `with` block."""
        samples: list[float] = []
        done = threading.Event()

        def sample() -> None:
            while not done.wait(every_s):
                if (mhz := self.mhz()) is not None:
                    samples.append(mhz)

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield lambda: statistics.median(samples) if samples else None
        finally:
            done.set()
            thread.join()


# --------------------------------------------------------------------------------------------------
# Which kernel
# --------------------------------------------------------------------------------------------------


@contextmanager
def environment(name: str, value: str | None) -> Iterator[None]:
    """A variable of the environment, which the library reads at each call; None changes nothing."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if value is not None:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before


def variant_of(operator: str, call: Callable[[], Any]) -> str:
    """The operator's kernel that a call runs, which the library says on stderr when asked to."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            with environment("FLASH_MLA_LOG", "select"):
                call()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        log.seek(0)
        lines = log.read().decode(errors="replace")
    chosen = re.search(rf"{operator} -> ([^;\s]+)", lines)
    return chosen[1] if chosen else "?"


# --------------------------------------------------------------------------------------------------
# Facts
# --------------------------------------------------------------------------------------------------


def bars_bind() -> bool:
    """Bars are those of an H200: elsewhere a missed one, or a case without a kernel, is a fact to
    read and no failure of the run. Wrong results always are."""
    return "H200" in torch.cuda.get_device_name()


def results_folder() -> str:
    """The current GPU's folder of results: "h200" of an "NVIDIA H200"."""
    return torch.cuda.get_device_name().lower().removeprefix("nvidia ").replace(" ", "_")


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


def cell(row: dict[str, Any], key: str, digits: int) -> str:
    """A number of a row as the table shows it."""
    value = row.get(key)
    return "-" if value is None else f"{value:.{digits}f}"


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
