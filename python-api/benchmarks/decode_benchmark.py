"""What the benchmarks of the decode operators share: cases with bars, measuring, judging, the run.

A bar is what a case must reach, an aim what we hope for: a fraction of G (the bf16 GEMM) or of R
(reading memory), microseconds plain or by graph replay, or a ratio to another case. Fractions in
the last table are of the whole run's median ceilings, the earlier ones of those so far. A wrong
result, a kernel of another row than the case's, and on an H200 a missed bar make the exit status 1.
A complete run writes results/<gpu>/<operator>.json and .png.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import roofline
import torch
from measure import (
    MIN_CEILING_SAMPLES,
    QUICK,
    RESULTS,
    Ceilings,
    Effort,
    SmClock,
    Table,
    argument_parser,
    bars_bind,
    cell,
    chosen_cases,
    environment,
    machine_facts,
    result_row,
    results_folder,
    time_cuda,
    time_cuda_graph,
    time_cuda_host,
    variant_of,
    write_json,
)
from torch import Tensor

D_V = 512
HOST_CASE = "host us a call"
BATCH_INVARIANT_BAR = 1.15  # of the time without it


# --------------------------------------------------------------------------------------------------
# What an operator brings along
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """What a case must reach: at least a fraction of G or R, or at most a time or a ratio."""

    of: str  # "G", "R", "graph us", "us", or the case whose time is the measure
    bar: float
    aim: float | None = None

    @property
    def higher_is_better(self) -> bool:
        return self.of in ("G", "R")

    def text(self) -> str:
        unit = self.of if self.of in ("G", "R") else "us" if self.of.endswith("us") else "x"
        return f"{self.bar:g} {unit}"


class Case(Protocol):
    """A shape. `fields` are its own of a result row (measure.result_row); kernel is
    FLASH_MLA_KERNEL."""

    @property
    def name(self) -> str: ...
    @property
    def kernel(self) -> str | None: ...
    @property
    def bar(self) -> Bar | None: ...
    @property
    def cost_of_batch_invariant(self) -> bool: ...
    @property
    def fields(self) -> dict[str, Any]: ...


class Inputs(Protocol):
    """Random inputs of a case, and what is known about them."""

    def call(self, *, batch_invariant: bool = False) -> tuple[Tensor, Tensor]: ...
    @property
    def flops(self) -> float: ...
    @property
    def bytes(self) -> float: ...
    @property
    def blocks(self) -> int | None:
        """Tiles of 64 query rows by 64 keys; None where the rows do not fill one."""

    def error(self, out: Tensor, lse: Tensor) -> str:
        """What is wrong with a result without NaN and Inf, empty when nothing (`disagreement`)."""


@dataclass(frozen=True)
class Benchmark:
    operator: str
    title: str  # of the picture
    description: str | None  # the script's docstring
    cases: Sequence[Case]
    inputs: Callable[[Any], Inputs]
    host_case: Case  # so small that the GPU is not what takes the time
    host_bar_us: float | None = None


def disagreement(
    q: Tensor,
    keys: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    *,
    hidden: Tensor | None = None,
    rounded_k: bool = False,
) -> str:
    """By how much results leave the accuracy that the project promises, empty if they do not.

    Args:
        q: [n, heads, d_qk] of queries that share keys.
        keys: [s_k, d_qk] float64, dequantised.
        out, lse: [n, heads, 512] and [n, heads].
        hidden: [n, s_k], the keys that a query does not attend.
        rounded_k: keys are rounded to bf16 after scaling them by what is no power of two.
    """
    logits = q.double() @ keys.T * scale
    if hidden is not None:
        logits.masked_fill_(hidden[:, None], -torch.inf)
    want, want_lse = torch.softmax(logits, -1) @ keys[:, :D_V], logits.logsumexp(-1)
    got, got_lse = out.double(), lse.double()
    excess = (got - want).abs() - (8e-4 + 2.01 / 128 * want.abs())
    cosine = torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0, eps=1e-30)
    slack = 1e-2 if rounded_k else 1e-6
    excess_lse = (got_lse - want_lse).abs() - (slack + 8 / 65536 * want_lse.abs())
    if excess.max() <= 0 and 1 - cosine <= 5e-6 and excess_lse.max() <= 0:
        return ""
    return (
        f"{len(keys)} keys: out beyond its tolerance by {excess.max():.1e}, 1 - cosine "
        f"{1 - cosine:.1e}, lse beyond by {excess_lse.max():.1e} (below 0: within)"
    )


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


def measure(
    benchmark: Benchmark, case: Case, effort: Effort, clock: SmClock, batch_invariant: bool
) -> dict[str, Any]:
    """A row of the result file; what depends on the ceilings is `judge`'s."""
    bar = case.bar
    row = result_row(
        case=case.name,
        bar_of=bar.of if bar else None,
        bar=bar.bar if bar else None,
        aim=bar.aim if bar else None,
        error="",
        **case.fields,
    )
    inputs = benchmark.inputs(case)
    row |= {"flops": inputs.flops, "bytes": inputs.bytes}
    with environment("FLASH_MLA_KERNEL", case.kernel):
        try:
            row["variant"] = variant_of(benchmark.operator, inputs.call)
        except NotImplementedError as refusal:
            return row | {"error": str(refusal)}
        row["error"] = wrong_row(row["variant"], case.kernel) or error_of(inputs, inputs.call())
        with clock.sampled() as mhz:
            us = time_cuda(inputs.call, warmup_ms=effort.warmup_ms, rep_ms=effort.rep_ms)
        graph_us, result = time_cuda_graph(inputs.call, budget_ms=effort.graph_ms)
        row["error"] = row["error"] or prefixed("graph: ", error_of(inputs, result))
        row |= {
            "us": round(us, 2),
            "graph_us": round(graph_us, 2),
            "tflops": round(inputs.flops / us * 1e-6, 2),
            "gbps": round(inputs.bytes / us * 1e-3, 1),
            "sm_mhz": mhz(),
        }
        if inputs.blocks and row["sm_mhz"]:
            sms = torch.cuda.get_device_properties().multi_processor_count
            row["cycles_per_block"] = round(us * row["sm_mhz"] * sms / inputs.blocks)
        if batch_invariant:

            def invariant() -> Any:
                return inputs.call(batch_invariant=True)

            error = error_of(inputs, invariant())
            row["error"] = row["error"] or prefixed("batch_invariant: ", error)
            us = time_cuda(invariant, warmup_ms=effort.warmup_ms, rep_ms=effort.rep_ms)
            row["batch_invariant_us"] = round(us, 2)
            row["batch_invariant_cost"] = round(us / row["us"], 3)
    return row


def error_of(inputs: Inputs, result: tuple[Tensor, Tensor]) -> str:
    if not all(x.isfinite().all() for x in result):
        return "NaN or Inf in the result"
    return inputs.error(*result)


def wrong_row(variant: str, kernel: str | None) -> str:
    """A time says nothing about a kernel that did not run: "?" is a library that named none."""
    served = variant not in ("cpu", "?") and (kernel is None or kernel in variant)
    return "" if served else f"served by {variant}, not by {kernel or 'a GPU'}"


def prefixed(prefix: str, text: str) -> str:
    return prefix + text if text else ""


# --------------------------------------------------------------------------------------------------
# Judging
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    case: str
    bar: Bar
    value: float | None  # None: nothing to compare, since another case did not run
    failure: str = ""  # "WRONG", or "NONE" where no kernel serves the case

    @property
    def passed(self) -> bool | None:
        if self.failure:
            return False
        if self.value is None:
            return None
        return (
            self.value >= self.bar.bar if self.bar.higher_is_better else self.value <= self.bar.bar
        )

    def text(self) -> str:
        if self.failure:
            return self.failure
        return {True: "pass", False: "FAIL", None: "-"}[self.passed]


def judge(row: dict[str, Any], rows: list[dict[str, Any]], ceilings: dict[str, float]) -> Verdict:
    """Adds the fractions of the ceilings and whether the bar is reached; `rows` are all so far."""
    bar = Bar(row["bar_of"] or "", row["bar"] or 0.0, row["aim"])
    value = None
    if row["us"] is not None:
        row["gemm_fraction"] = round(row["tflops"] / ceilings["gemm_tflops"], 3)
        row["read_fraction"] = round(row["gbps"] / ceilings["read_gbps"], 3)
        times = {other["case"]: other["us"] for other in rows}
        own = {"G": "gemm_fraction", "R": "read_fraction", "us": "us", "graph us": "graph_us"}
        if bar.of in own:
            value = row[own[bar.of]]
        elif times.get(bar.of) is not None:
            value = row["us"] / times[bar.of]
    failure = "" if not row["error"] else "NONE" if row["variant"] is None else "WRONG"
    verdict = Verdict(row["case"], bar, value, failure)
    row["passed"] = verdict.passed if row["bar"] is not None or row["error"] else None
    return verdict


def judge_all(rows: list[dict[str, Any]], ceilings: dict[str, float]) -> list[Verdict]:
    """Of every bar and every wrong result, by the ceilings of the whole run."""
    verdicts = []
    for row in rows:
        verdict = judge(row, rows, ceilings)
        if row["bar"] is not None or row["error"]:
            verdicts.append(verdict)
    for row in rows:
        if cost := row.get("batch_invariant_cost"):
            bar = Bar(row["case"], BATCH_INVARIANT_BAR)
            verdicts.append(Verdict(f"{row['case']} batch_invariant", bar, cost))
    return verdicts


# --------------------------------------------------------------------------------------------------
# Output
# --------------------------------------------------------------------------------------------------


class CaseTable:
    def __init__(self, cases: Sequence[Case]) -> None:
        self._table = Table(
            case=max([4, *(len(case.name) for case in cases)]),
            variant=34,
            us=9,
            graph_us=9,
            TFLOPs=7,
            GBps=7,
            of_G=6,
            of_R=6,
            cycles=7,
            MHz=6,
            bar=8,
            verdict=8,
        )

    def print(self, row: dict[str, Any], verdict: Verdict) -> None:
        self._table.print(
            row["case"],
            row["variant"] or "none",
            cell(row, "us", 1),
            cell(row, "graph_us", 1),
            cell(row, "tflops", 1),
            cell(row, "gbps", 0),
            cell(row, "gemm_fraction", 3),
            cell(row, "read_fraction", 3),
            cell(row, "cycles_per_block", 0),
            cell(row, "sm_mhz", 0),
            verdict.bar.text() if verdict.bar.of else "",
            verdict.text() if verdict.bar.of or verdict.failure else "",
        )
        if row["error"]:
            print(f"  {row['error']}")
        if cost := row.get("batch_invariant_cost"):
            passed = "pass" if cost <= BATCH_INVARIANT_BAR else "FAIL"
            us = row["batch_invariant_us"]
            print(
                f"  batch_invariant: {us:.1f} us, x {cost:.3f} (bar {BATCH_INVARIANT_BAR}) {passed}"
            )


def print_verdicts(verdicts: list[Verdict]) -> None:
    width = max([4, *(len(verdict.case) for verdict in verdicts)])
    table = Table(case=width, measured=10, bar=9, aim=7, verdict=8)
    for verdict in verdicts:
        table.print(
            verdict.case,
            "-" if verdict.value is None else f"{verdict.value:.3f}",
            verdict.bar.text() if verdict.bar.of else "",
            "" if verdict.bar.aim is None else f"{verdict.bar.aim:g}",
            verdict.text(),
        )
    passed, failed = (sum(v.passed is outcome for v in verdicts) for outcome in (True, False))
    wrong = sum(bool(v.failure) for v in verdicts)
    print(f"{passed} pass, {failed} FAIL, of which {wrong} are wrong or have no kernel")


def draw(path: Path, title: str) -> str:
    """The picture of a result file, beside it: the cases whose bar is a fraction of a ceiling.
    Returns what became of it."""
    results = json.loads(path.read_text())
    rows = [row for row in results["rows"] if row["us"] is not None and row["bar_of"] in ("G", "R")]
    picture = path.with_suffix(".png")
    try:
        roofline.draw(results, rows, title, picture)
    except ImportError as error:
        return f"no picture: {error}"
    return f"wrote {picture}"


# --------------------------------------------------------------------------------------------------
# Run
# --------------------------------------------------------------------------------------------------


def parse_arguments(benchmark: Benchmark) -> argparse.Namespace:
    parser = argument_parser(benchmark.description)
    if any(case.cost_of_batch_invariant for case in benchmark.cases):
        parser.add_argument(
            "--batch-invariant",
            action=argparse.BooleanOptionalAction,
            help="measure what batch_invariant=True costs (default: unless --quick)",
        )
    parser.add_argument(
        "--plot-only",
        metavar="JSON",
        nargs="?",
        type=Path,
        const=RESULTS / "h200" / f"{benchmark.operator}.json",
        help="measure nothing, draw the picture of a result file (default: %(const)s)",
    )
    args = parser.parse_args()
    if getattr(args, "batch_invariant", None) is None:
        args.batch_invariant = not args.quick
    return args


@torch.inference_mode()
def run(benchmark: Benchmark) -> int:
    """The whole script; returns its exit status."""
    args = parse_arguments(benchmark)
    if args.plot_only:
        print(draw(args.plot_only, benchmark.title))
        return 0
    if not torch.cuda.is_available():
        raise SystemExit(f"{benchmark.operator}.py: needs a GPU; cpu_vs_eager.py measures the CPU")
    started = time.perf_counter()
    cases = chosen_cases(benchmark.cases, args)
    torch.manual_seed(0)
    facts = machine_facts("cuda")
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None))
    ceilings, clock, table = Ceilings("cuda"), SmClock(), CaseTable(cases)
    rows: list[dict[str, Any]] = []
    between = max(len(cases) // (2 * MIN_CEILING_SAMPLES), 1)
    for n, case in enumerate(cases):
        if n % between == 0:
            ceilings.sample()
        wants_cost = args.batch_invariant and case.cost_of_batch_invariant
        effort = QUICK if args.quick else Effort()
        row = measure(benchmark, case, effort, clock, wants_cost)
        rows.append(row)
        table.print(row, judge(row, rows, ceilings.medians()))
    host_us = None
    if args.cases is None or re.search(args.cases, HOST_CASE):
        host_us = round(time_cuda_host(benchmark.inputs(benchmark.host_case).call), 2)
        print(f"{HOST_CASE}: {host_us}")
    while ceilings.samples < MIN_CEILING_SAMPLES:
        ceilings.sample()

    medians = ceilings.medians()
    verdicts = judge_all(rows, medians)
    if host_us is not None and benchmark.host_bar_us is not None:
        verdicts.append(Verdict(HOST_CASE, Bar("us", benchmark.host_bar_us), host_us))
    print(
        f"\nceilings (medians of {ceilings.samples}): G {medians['gemm_tflops']:.1f} TFLOP/s, "
        f"R {medians['read_gbps']:.0f} GB/s; {time.perf_counter() - started:.0f} s"
    )
    if args.cases is None and not args.quick and not args.no_json:
        facts |= {"host_us": host_us, "host_us_bar": benchmark.host_bar_us}
        path = write_json(results_folder(), benchmark.operator, facts, medians, rows)
        print("wrote", path)
        print(draw(path, benchmark.title))
    print_verdicts(verdicts)
    failed = [v for v in verdicts if v.passed is False and (v.failure == "WRONG" or bars_bind())]
    return 1 if failed else 0
