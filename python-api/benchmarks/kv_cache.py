"""Packing, unpacking, appending to and gathering from KV caches on one GPU: speed against copying.

    python kv_cache.py [--cases REGEX] [--quick] [--no-json]

A time is that of the whole Python call, bf16 tokens, pages of 64: `pack` and `unpack` go through a
cache in order and allocate their result; `append` and `gather` (by int64 slots, as engines have
them) have their pages, or, where the name says tokens, each token at a random place. GB/s counts
the tokens' columns and what the cache holds of them once each, one read and one written.

A bar is what a case must reach: a fraction of C (copying 2^30 float32, read and written), or
microseconds by graph replay, as in a decode step. An aim is what we hope for. Fractions in the last
table are of the whole run's median ceilings, the earlier ones of those so far. Some tokens of each
case are compared with the CPU backend bit by bit. A wrong result, or on an H200 a missed bar, makes
the exit status 1. A complete run writes results/<gpu>/kv_cache.json.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from measure import (
    MIN_CEILING_SAMPLES,
    QUICK,
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

import flash_mla

OPERATOR = "kv_cache"
PAGE_SIZE = 64
MANY = 1 << 20  # tokens
FORMATS = ("bf16", "fp16", "fp8", "v32_fp8", "v4_fp8", "v41_fp8", "v41_fp4")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHECKED_TOKENS = 256


# --------------------------------------------------------------------------------------------------
# Cases
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """What a case must reach: at least a fraction of C, or at most a time."""

    of: str  # "C" or "graph us"
    bar: float
    aim: float | None = None

    def passed(self, value: float) -> bool:
        return value >= self.bar if self.of == "C" else value <= self.bar

    def text(self) -> str:
        return f"{self.bar:g} {'C' if self.of == 'C' else 'us'}"


@dataclass(frozen=True)
class Case:
    what: str  # pack, unpack, append, gather
    kv_format: str
    tokens: int = MANY
    dtype: str = "bf16"  # of the tokens
    scattered: bool = False  # each token at a random place, not each page
    kernel: str | None = None  # FLASH_MLA_KERNEL
    bar: Bar | None = None

    @property
    def name(self) -> str:
        words = [self.what, self.kv_format, f"n={self.tokens}"]
        words += [self.dtype] if self.dtype != "bf16" else []
        words += ["tokens"] if self.scattered else []
        words += [self.kernel] if self.kernel else []
        return " ".join(words)


def all_cases() -> list[Case]:
    of_c = Bar("C", 0.80, 0.92)
    large = [
        Case(what, kv_format, bar=of_c)
        for kv_format in FORMATS
        for what in ("pack", "unpack", "append", "gather")
    ]
    portable = [Case(what, "v32_fp8", kernel="portable", bar=of_c) for what in ("append", "gather")]
    in_a_step = [
        Case("append", kv_format, tokens, bar=Bar("graph us", 3.0, 2.0))
        for kv_format in ("bf16", "v32_fp8", "v4_fp8", "v41_fp8", "v41_fp4")
        for tokens in (1, 16, 64, 256)
    ]
    scattered = [
        Case(what, kv_format, scattered=True)
        for kv_format in ("bf16", "v32_fp8", "v4_fp8", "v41_fp8", "v41_fp4")
        for what in ("append", "gather")
    ]
    other_dtypes = [
        Case(what, kv_format, dtype=dtype)
        for kv_format in ("bf16", "fp8", "v32_fp8", "v41_fp4")
        for dtype in ("fp16", "fp32")
        for what in ("append", "gather")
    ]
    medium = [
        Case(what, "v32_fp8", tokens)
        for tokens in (4096, 16384, 65536)
        for what in ("append", "gather")
    ]
    return large + portable + in_a_step + scattered + other_dtypes + medium


# --------------------------------------------------------------------------------------------------
# Inputs
# --------------------------------------------------------------------------------------------------


class Inputs:
    """Random tokens, a cache with room for just them, and their slots."""

    def __init__(self, case: Case, device: str = "cuda") -> None:
        self.case = case
        layout = flash_mla.kv_format(case.kv_format)
        self.d_qk = layout.d_qk or 576
        pages = -(-case.tokens // PAGE_SIZE)
        shape = (pages * PAGE_SIZE, 1, self.d_qk)
        kv = torch.randn(shape, dtype=torch.bfloat16, device=device).to(DTYPES[case.dtype])
        self.scale = torch.tensor([1 / 16], device=device) if case.kv_format == "fp8" else None
        self.paged_kv = kv.view(pages, PAGE_SIZE, 1, self.d_qk)
        self.kv = kv[: case.tokens]
        if case.what in ("unpack", "gather"):
            self.cache = self._pack()
        else:
            self.cache = flash_mla.kv_cache_empty(case.kv_format, pages, PAGE_SIZE, device=device)
        self.slots = torch.arange(pages * PAGE_SIZE, device=device)
        if case.what in ("append", "gather"):
            self.slots = self.slots.view(pages, PAGE_SIZE)
            self.slots = self.slots[torch.randperm(pages, device=device)].flatten()
            if case.scattered:
                self.slots = self.slots[torch.randperm(len(self.slots), device=device)]
        self.slots = self.slots[: case.tokens].contiguous()

    def _pack(self) -> Tensor:
        return flash_mla.kv_cache_pack(self.paged_kv, self.case.kv_format, scale=self.scale)

    def call(self) -> Tensor:
        """What the case is about; returns what was written."""
        case = self.case
        if case.what == "pack":
            return self._pack()
        if case.what == "unpack":
            return flash_mla.kv_cache_unpack(
                self.cache, case.kv_format, scale=self.scale, dtype=DTYPES[case.dtype]
            )
        if case.what == "gather":
            return torch.ops.flash_mla.kv_cache_gather.default(
                self.cache, self.slots, case.kv_format, self.scale, self.d_qk, DTYPES[case.dtype]
            )
        flash_mla.kv_cache_append(self.kv, self.cache, self.slots, case.kv_format, scale=self.scale)
        return self.cache

    @property
    def bytes(self) -> int:
        token_bytes = flash_mla.kv_format(self.case.kv_format).bytes_per_token
        token_bytes = token_bytes or self.d_qk * self.cache.element_size()
        return self.kv.nbytes + self.case.tokens * token_bytes

    def error(self, result: Tensor) -> str:
        """What is wrong with some tokens, empty when nothing."""
        case = self.case
        which = torch.randint(0, case.tokens, (CHECKED_TOKENS,), device=self.kv.device)
        if case.what in ("pack", "append"):
            slots = self.slots[which]
            found = torch.ops.flash_mla.kv_cache_gather.default(
                result, slots, case.kv_format, self.scale, self.d_qk, DTYPES[case.dtype]
            )
            source = which
        else:  # the cache was packed in order: slot s has token s
            found = result.flatten(0, 1)[which] if case.what == "unpack" else result[which]
            source = self.slots[which]
        kv = self.paged_kv.flatten(0, 1)[source].cpu().unsqueeze(1)
        scale = None if self.scale is None else self.scale.cpu()
        with environment("FLASH_MLA_KERNEL", ""):  # the CPU has its own
            wanted = flash_mla.kv_cache_unpack(
                flash_mla.kv_cache_pack(kv, case.kv_format, scale=scale),
                case.kv_format,
                scale=scale,
                dtype=DTYPES[case.dtype],
            )[:, 0]
        wrong = (found.cpu().view(torch.uint8) != wanted.view(torch.uint8)).flatten(1).any(1)
        return f"{int(wrong.sum())} of {CHECKED_TOKENS} tokens differ" if wrong.any() else ""


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


def row_of(case: Case) -> dict[str, Any]:
    return result_row(
        case=case.name,
        d_qk=flash_mla.kv_format(case.kv_format).d_qk or 576,
        q_dtype=None,
        kv_format=case.kv_format,
        page_size=PAGE_SIZE,
        what=case.what,
        tokens=case.tokens,
        kv_dtype=case.dtype,
        scattered=case.scattered,
        bar_of=case.bar.of if case.bar else None,
        bar=case.bar.bar if case.bar else None,
        aim=case.bar.aim if case.bar else None,
        error="",
    )


def measure(case: Case, effort: Effort, clock: SmClock) -> dict[str, Any]:
    row = row_of(case)
    with environment("FLASH_MLA_KERNEL", case.kernel):
        inputs = Inputs(case)
        row["bytes"] = inputs.bytes
        try:
            row["variant"] = variant_of(OPERATOR, inputs.call)
        except NotImplementedError as error:
            return row | {"error": str(error)}
        row["error"] = inputs.error(inputs.call())
        with clock.sampled() as mhz:
            us = time_cuda(inputs.call, warmup_ms=effort.warmup_ms, rep_ms=effort.rep_ms)
        graph_us, result = time_cuda_graph(inputs.call, budget_ms=effort.graph_ms)
        if not row["error"] and (error := inputs.error(result)):
            row["error"] = f"graph: {error}"
    return row | {
        "us": round(us, 2),
        "graph_us": round(graph_us, 2),
        "gbps": round(inputs.bytes / us * 1e-3, 1),
        "sm_mhz": mhz(),
    }


def measure_host() -> float:
    """Microseconds to enqueue an append of a decode step."""
    return time_cuda_host(Inputs(Case("append", "v32_fp8", 64)).call)


def judge(case: Case, row: dict[str, Any], ceilings: dict[str, float]) -> float | None:
    """Adds the fraction of C and whether the bar is reached; returns what is held to it."""
    value = None
    if row["us"] is not None:
        row["copy_fraction"] = round(row["gbps"] / ceilings["copy_gbps"], 3)
        if case.bar is not None:
            value = row["copy_fraction"] if case.bar.of == "C" else row["graph_us"]
    row["passed"] = None
    if row["error"]:
        row["passed"] = False
    elif case.bar is not None and value is not None:
        row["passed"] = case.bar.passed(value)
    return value


# --------------------------------------------------------------------------------------------------
# Output
# --------------------------------------------------------------------------------------------------


def verdict(row: dict[str, Any]) -> str:
    if row["error"]:
        return "NONE" if row["variant"] is None else "WRONG"
    return {True: "pass", False: "FAIL", None: ""}[row["passed"]]


class CaseTable:
    def __init__(self) -> None:
        self._table = Table(
            case=36, variant=18, us=9, graph_us=9, GBps=7, of_C=6, MHz=6, bar=8, verdict=8
        )

    def print(self, case: Case, row: dict[str, Any]) -> None:
        self._table.print(
            row["case"],
            row["variant"] or "none",
            cell(row, "us", 1),
            cell(row, "graph_us", 2),
            cell(row, "gbps", 0),
            cell(row, "copy_fraction", 3),
            cell(row, "sm_mhz", 0),
            case.bar.text() if case.bar else "",
            verdict(row),
        )
        if row["error"]:
            print(f"  {row['error']}")


def print_verdicts(judged: list[tuple[Case, dict[str, Any], float | None]]) -> None:
    table = Table(case=40, measured=10, bar=9, aim=7, verdict=8)
    held = [x for x in judged if x[0].bar is not None or x[1]["error"]]
    for case, row, value in held:
        table.print(
            case.name,
            "-" if value is None else f"{value:.3f}",
            case.bar.text() if case.bar else "",
            f"{case.bar.aim:g}" if case.bar and case.bar.aim else "",
            verdict(row),
        )
    outcomes = [row["passed"] for _, row, _ in held]
    wrong = sum(bool(row["error"]) for _, row, _ in held)
    print(
        f"{outcomes.count(True)} pass, {outcomes.count(False)} FAIL, of which {wrong} are wrong "
        "or have no kernel"
    )


# --------------------------------------------------------------------------------------------------
# Run
# --------------------------------------------------------------------------------------------------


def main() -> int:
    args = argument_parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kv_cache.py: needs a GPU")
    started = time.perf_counter()
    cases = chosen_cases(all_cases(), args)
    torch.manual_seed(0)
    facts = machine_facts("cuda")
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None))
    ceilings, clock, table = Ceilings("cuda", copy=True), SmClock(), CaseTable()
    rows: list[dict[str, Any]] = []
    between = max(len(cases) // (2 * MIN_CEILING_SAMPLES), 1)
    for n, case in enumerate(cases):
        if n % between == 0:
            ceilings.sample()
        row = measure(case, QUICK if args.quick else Effort(), clock)
        rows.append(row)
        judge(case, row, ceilings.medians())
        table.print(case, row)
    host_us = round(measure_host(), 2)
    print(f"host us a call: {host_us}")
    while ceilings.samples < MIN_CEILING_SAMPLES:
        ceilings.sample()

    medians = ceilings.medians()
    judged = [(case, row, judge(case, row, medians)) for case, row in zip(cases, rows, strict=True)]
    print(
        f"\nceilings (medians of {ceilings.samples}): C {medians['copy_gbps']:.0f} GB/s, "
        f"R {medians['read_gbps']:.0f} GB/s; {time.perf_counter() - started:.0f} s"
    )
    if args.cases is None and not args.quick and not args.no_json:
        path = write_json(results_folder(), OPERATOR, facts | {"host_us": host_us}, medians, rows)
        print("wrote", path)
    print_verdicts(judged)
    failed = [row for row in rows if row["passed"] is False]
    return 1 if any(verdict(row) == "WRONG" or bars_bind() for row in failed) else 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
