"""Dense MLA decode on one GPU: speed against the machine's ceilings, and against our bars.

    python mla_decode_dense.py [--cases REGEX] [--quick] [--no-json] [--[no-]batch-invariant]
    python mla_decode_dense.py --plot-only [JSON]

A time is that of the whole Python call `flash_mla_with_kvcache`: bf16, causal, one query token,
pages of 64 tokens at random places and requests of one length, unless a case's name says otherwise.
GB/s counts q, the keys and values attended and out once; TFLOP/s counts
2 * s_q * h_q * (d_qk + 512) for each key of each request.

A bar is what a case must reach, an aim what we hope for: a fraction of G (the bf16 GEMM) or of R
(reading memory), microseconds by graph replay, or a ratio to another case. Fractions in the last
table are of the whole run's median ceilings, the earlier ones of those so far. A few rows of each
case's results are checked against float64. A wrong result or a missed bar makes the exit status 1.
A complete run writes results/<gpu>/mla_decode_dense.json and .png.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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

OPERATOR = "mla_decode_dense"
D_V = 512
HOST_BAR_US = 12.0
HOST_CASE = "host us a call"
BATCH_INVARIANT_BAR = 1.15  # of the time without it
PAGE_SIZE_BAR = 1.10  # of the time with pages of 64


# --------------------------------------------------------------------------------------------------
# Cases
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


@dataclass(frozen=True)
class Case:
    h_q: int
    b: int
    s_k: int
    s_q: int = 1
    varlen: bool = False
    kv_format: str = "bf16"
    d_qk: int = 576
    page_size: int = 64
    shorter: tuple[int, int] | None = None  # how many further requests of which length
    kernel: str | None = None  # FLASH_MLA_KERNEL
    bar: Bar | None = None
    cost_of_batch_invariant: bool = False

    @property
    def name(self) -> str:
        words = [] if self.kv_format == "bf16" else [self.kv_format]
        words += [f"h={self.h_q}", f"b={self.b}"]
        words += [f"s_q={self.s_q}"] if self.s_q > 1 else []
        words += [f"s_k={self.s_k}"]
        words += ["varlen"] if self.varlen else []
        words += ["and {} x {}".format(*self.shorter)] if self.shorter else []
        words += [f"d_qk={self.d_qk}"] if self.d_qk != 576 else []
        words += [f"page={self.page_size}"] if self.page_size != 64 else []
        words += [self.kernel] if self.kernel else []
        return " ".join(words)

    def lengths(self) -> list[int]:
        if self.shorter:
            return [self.s_k] + [self.shorter[1]] * self.shorter[0]
        if self.varlen:
            rng = random.Random(0)
            draws = (rng.normalvariate(self.s_k, self.s_k / 2) for _ in range(self.b))
            return [max(int(draw), self.s_q) for draw in draws]
        return [self.s_k] * self.b


def all_cases() -> list[Case]:
    # Throughput: many heads are bound by the tensor cores, few by memory.
    of_g, of_r = Bar("G", 0.98, 1.12), Bar("R", 0.95, 0.98)
    throughput = [
        Case(128, 128, 4096, varlen=True, bar=of_g),
        Case(128, 128, 16384, varlen=True, bar=of_g),
        Case(128, 128, 8192, s_q=2, bar=Bar("G", 1.03, 1.16)),
        Case(16, 128, 4096, bar=of_r),
        Case(32, 128, 4096, bar=of_r),
        Case(16, 128, 16384, bar=Bar("R", 0.97, 1.01)),
        Case(32, 128, 16384, bar=Bar("R", 0.97, 1.01)),
        Case(64, 128, 4096, bar=Bar("R", 0.92, 0.98)),
        Case(64, 128, 16384, bar=Bar("R", 0.96, 0.98)),
    ]
    # Latency: few requests, or short ones, as in a graph that an engine replays.
    latency = [
        Case(16, 128, 1024, bar=Bar("graph us", 36, 33)),
        Case(16, 16, 1024, s_q=16, bar=Bar("graph us", 22, 16)),
        Case(16, 1, 4096, bar=Bar("graph us", 9, 6)),
        Case(16, 1, 65536, bar=Bar("graph us", 26, 21)),
        Case(128, 1, 4096, bar=Bar("graph us", 11, 7)),
        Case(128, 1, 16384, bar=Bar("graph us", 17, 12)),
        Case(128, 4, 8192, bar=Bar("graph us", 22, 16)),
        Case(128, 16, 8192, bar=Bar("graph us", 58, 51)),
        Case(128, 1, 131072, bar=Bar("graph us", 60, 52)),
    ]
    float8 = [
        Case(16, 128, 16384, kv_format="fp8", bar=Bar("R", 0.85)),
        Case(16, 128, 16384, kv_format="v32_fp8", bar=Bar("R", 0.80)),
        Case(128, 128, 16384, kv_format="fp8", bar=Bar("G", 0.90)),
        Case(128, 128, 16384, kv_format="v32_fp8", bar=Bar("G", 0.85)),
    ]
    portable = [Case(16, 128, s_k, kernel="portable", bar=Bar("R", 0.80)) for s_k in (4096, 16384)]
    small_pages = [
        replace(case, page_size=page_size, bar=Bar(case.name, PAGE_SIZE_BAR))
        for case in (Case(128, 128, 4096, varlen=True), Case(16, 128, 4096))
        for page_size in (32, 16)
    ]
    others = [
        Case(128, 128, 4096, d_qk=512),
        Case(16, 128, 4096, d_qk=512),
        Case(128, 128, 4096, kv_format="fp16"),
        Case(16, 128, 4096, kv_format="fp16"),
        Case(16, 4096, 512),
        Case(16, 64, 1 << 20, shorter=(63, 1024)),
        Case(128, 1, 8192, s_q=128),
    ]
    throughput = [replace(case, cost_of_batch_invariant=True) for case in throughput]
    return throughput + latency + float8 + portable + small_pages + others


# --------------------------------------------------------------------------------------------------
# Inputs
# --------------------------------------------------------------------------------------------------


class Inputs:
    """Random inputs of a case; the cache has as many pages as the requests use."""

    def __init__(self, case: Case, device: str = "cuda") -> None:
        self.case = case
        self.device = device
        self.lengths = case.lengths()
        dtype = torch.float16 if case.kv_format == "fp16" else torch.bfloat16
        self.q = torch.randn(case.b, case.s_q, case.h_q, case.d_qk, dtype=dtype, device=self.device)
        self.cache_seqlens = torch.tensor(self.lengths, dtype=torch.int32, device=self.device)
        self.softmax_scale = case.d_qk**-0.5
        self.descale_k: Tensor | None = None

        pages = (self.cache_seqlens + case.page_size - 1) // case.page_size
        num_pages, most = int(pages.sum()), int(pages.max())
        self.block_table = torch.full((case.b, most), -1, dtype=torch.int32, device=self.device)
        used = torch.arange(most, device=self.device) < pages[:, None]
        self.block_table[used] = torch.randperm(num_pages, dtype=torch.int32, device=self.device)
        self.cache = self._random_cache((num_pages, case.page_size, 1), dtype)
        self.metadata, _ = flash_mla.get_mla_metadata()

    def _random_cache(self, tokens: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        def normal(columns: int) -> Tensor:
            return torch.randn(*tokens, columns, dtype=dtype, device=self.device)

        def e4m3(columns: int) -> Tensor:  # of a standard deviation that uses its range
            return normal(columns).mul_(16).to(torch.float8_e4m3fn)

        if self.case.kv_format == "fp8":
            self.descale_k = torch.tensor([1 / 16], device=self.device)
            return e4m3(self.case.d_qk)
        if self.case.kv_format == "v32_fp8":
            scales = (torch.rand(*tokens, 4, device=self.device) + 0.5) / 16
            parts = (e4m3(512), scales, normal(64))
            return torch.cat([part.view(torch.uint8) for part in parts], dim=-1)
        return normal(self.case.d_qk)

    def call(self, *, batch_invariant: bool = False) -> tuple[Tensor, Tensor]:
        return flash_mla.flash_mla_with_kvcache(
            self.q,
            self.cache,
            self.block_table,
            self.cache_seqlens,
            D_V,
            self.metadata,
            softmax_scale=self.softmax_scale,
            causal=True,
            descale_k=self.descale_k,
            batch_invariant=batch_invariant,
        )

    @property
    def flops(self) -> float:
        return 2.0 * self.case.s_q * self.case.h_q * sum(self.lengths) * (self.case.d_qk + D_V)

    @property
    def bytes(self) -> float:
        per_token = self.cache.shape[-1] * self.cache.element_size()
        out_bytes = self.q.nbytes / self.case.d_qk * D_V
        return float(self.q.nbytes + sum(self.lengths) * per_token + out_bytes)

    @property
    def blocks(self) -> int:
        """Tiles of 64 query rows by 64 keys."""
        tiles = -(-self.case.s_q * self.case.h_q // 64)
        return tiles * sum(-(-length // 64) for length in self.lengths)

    def keys(self, request: int) -> Tensor:
        """float64 [s_k, d_qk], dequantised."""
        length = self.lengths[request]
        pages = self.block_table[request, : -(-length // self.case.page_size)]
        tokens = self.cache[pages].flatten(0, 2)[:length]
        if self.descale_k is not None:
            return tokens.double() * self.descale_k.double()
        if self.case.kv_format == "v32_fp8":
            nope, scales, rope = tokens.split([512, 16, 128], dim=-1)
            tiles = nope.view(torch.float8_e4m3fn).double().unflatten(-1, (4, 128))
            tiles *= scales.view(torch.float32).double()[..., None]
            return torch.cat([tiles.flatten(1), rope.view(torch.bfloat16).double()], dim=-1)
        return tokens.double()

    def error(self, out: Tensor, lse: Tensor) -> str:
        """What is wrong with a result, empty when nothing: the accuracy that the project promises,
        for a few rows of the longest and of the shortest request."""
        case = self.case
        if not (out.isfinite().all() and lse.isfinite().all()):
            return "NaN or Inf in the result"
        by_length = sorted(range(case.b), key=self.lengths.__getitem__)
        queries = torch.tensor(sorted({0, case.s_q - 1}), device=self.device)
        heads = torch.tensor(sorted({0, case.h_q // 2, case.h_q - 1}), device=self.device)
        for request in {by_length[0], by_length[-1]}:
            length = self.lengths[request]
            keys = self.keys(request)
            q = self.q[request][queries][:, heads].double()  # [queries, heads, d_qk]
            logits = q @ keys.T * self.softmax_scale
            last_visible = length - case.s_q + queries
            hidden = torch.arange(length, device=self.device) > last_visible[:, None]
            logits.masked_fill_(hidden[:, None], -torch.inf)
            want_lse = logits.logsumexp(-1)
            want = torch.softmax(logits, -1) @ keys[:, :D_V]
            got = out[request][queries][:, heads].double()
            got_lse = lse[request][heads][:, queries].T.double()
            excess = (got - want).abs() - (8e-4 + 2.01 / 128 * want.abs())
            cosine = torch.nn.functional.cosine_similarity(
                got.flatten(), want.flatten(), dim=0, eps=1e-30
            )
            # v32_fp8 rounds keys to bf16 after scaling them by what is no power of two.
            slack = 1e-2 if case.kv_format == "v32_fp8" else 1e-6
            excess_lse = (got_lse - want_lse).abs() - (slack + 8 / 65536 * want_lse.abs())
            if excess.max() > 0 or 1 - cosine > 5e-6 or excess_lse.max() > 0:
                return (
                    f"request {request} of {length} keys: out beyond its tolerance by "
                    f"{excess.max():.1e}, 1 - cosine {1 - cosine:.1e}, lse beyond by "
                    f"{excess_lse.max():.1e} (below 0: within)"
                )
        return ""


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


def row_of(case: Case) -> dict[str, Any]:
    bar = case.bar
    return result_row(
        case=case.name,
        b=case.b,
        s_q=case.s_q,
        s_k=case.s_k,
        h_q=case.h_q,
        d_qk=case.d_qk,
        q_dtype="fp16" if case.kv_format == "fp16" else "bf16",
        kv_format=case.kv_format,
        page_size=case.page_size,
        varlen=case.varlen,
        causal=True,
        bar_of=bar.of if bar else None,
        bar=bar.bar if bar else None,
        aim=bar.aim if bar else None,
        error="",
    )


def measure(case: Case, effort: Effort, clock: SmClock, batch_invariant: bool) -> dict[str, Any]:
    """A row of the result file; what depends on the ceilings is `judge`'s."""
    row = row_of(case)
    with environment("FLASH_MLA_KERNEL", case.kernel):
        inputs = Inputs(case)
        row |= {"flops": inputs.flops, "bytes": inputs.bytes}
        try:
            row["variant"] = variant_of(OPERATOR, inputs.call)
        except NotImplementedError as error:
            return row | {"error": str(error)}
        row["error"] = inputs.error(*inputs.call())
        with clock.sampled() as mhz:
            us = time_cuda(inputs.call, warmup_ms=effort.warmup_ms, rep_ms=effort.rep_ms)
        graph_us, result = time_cuda_graph(inputs.call, budget_ms=effort.graph_ms)
        row["error"] = row["error"] or prefixed("graph: ", inputs.error(*result))
        row |= {
            "us": round(us, 2),
            "graph_us": round(graph_us, 2),
            "tflops": round(inputs.flops / us * 1e-6, 2),
            "gbps": round(inputs.bytes / us * 1e-3, 1),
            "sm_mhz": mhz(),
        }
        if case.s_q * case.h_q >= 64 and row["sm_mhz"]:
            sms = torch.cuda.get_device_properties().multi_processor_count
            row["cycles_per_block"] = round(us * row["sm_mhz"] * sms / inputs.blocks)
        if batch_invariant:

            def invariant() -> Any:
                return inputs.call(batch_invariant=True)

            row["error"] = row["error"] or prefixed("batch_invariant: ", inputs.error(*invariant()))
            us = time_cuda(invariant, warmup_ms=effort.warmup_ms, rep_ms=effort.rep_ms)
            row["batch_invariant_us"] = round(us, 2)
            row["batch_invariant_cost"] = round(us / row["us"], 3)
    return row


def prefixed(prefix: str, text: str) -> str:
    return prefix + text if text else ""


def measure_host() -> float:
    """Microseconds to enqueue a call that is small: the GPU must not be what takes the time."""
    return time_cuda_host(Inputs(Case(16, 1, 64)).call)


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
        if bar.of == "G":
            value = row["gemm_fraction"]
        elif bar.of == "R":
            value = row["read_fraction"]
        elif bar.of == "graph us":
            value = row["graph_us"]
        elif times.get(bar.of) is not None:
            value = row["us"] / times[bar.of]
    failure = "" if not row["error"] else "NONE" if row["variant"] is None else "WRONG"
    verdict = Verdict(row["case"], bar, value, failure)
    row["passed"] = verdict.passed if row["bar"] is not None or row["error"] else None
    return verdict


def judge_all(
    rows: list[dict[str, Any]], ceilings: dict[str, float], host_us: float | None
) -> list[Verdict]:
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
    if host_us is not None:
        verdicts.append(Verdict(HOST_CASE, Bar("us", HOST_BAR_US), host_us))
    return verdicts


# --------------------------------------------------------------------------------------------------
# Output
# --------------------------------------------------------------------------------------------------


class CaseTable:
    def __init__(self) -> None:
        self._table = Table(
            case=40,
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
    table = Table(case=52, measured=10, bar=9, aim=7, verdict=8)
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


def draw(path: Path) -> Path:
    """The picture of a result file, beside it: the cases whose bar is a fraction of a ceiling."""
    results = json.loads(path.read_text())
    rows = [row for row in results["rows"] if row["us"] is not None and row["bar_of"] in ("G", "R")]
    picture = path.with_suffix(".png")
    roofline.draw(results, rows, "Dense MLA decode, L2 flushed", picture)
    return picture


# --------------------------------------------------------------------------------------------------
# Run
# --------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
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
        const=RESULTS / "h200" / f"{OPERATOR}.json",
        help="measure nothing, draw the picture of a result file (default: %(const)s)",
    )
    args = parser.parse_args(argv)
    if args.batch_invariant is None:
        args.batch_invariant = not args.quick
    return args


def main() -> int:
    args = parse_arguments()
    if args.plot_only:
        print("wrote", draw(args.plot_only))
        return 0
    if not torch.cuda.is_available():
        raise SystemExit("mla_decode_dense.py: needs a GPU; cpu_vs_eager.py measures the CPU")
    started = time.perf_counter()
    cases = chosen_cases(all_cases(), args)
    torch.manual_seed(0)
    facts = machine_facts("cuda")
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None))
    ceilings, clock, table = Ceilings("cuda"), SmClock(), CaseTable()
    rows: list[dict[str, Any]] = []
    between = max(len(cases) // (2 * MIN_CEILING_SAMPLES), 1)
    for n, case in enumerate(cases):
        if n % between == 0:
            ceilings.sample()
        wants_cost = args.batch_invariant and case.cost_of_batch_invariant
        row = measure(case, QUICK if args.quick else Effort(), clock, wants_cost)
        rows.append(row)
        table.print(row, judge(row, rows, ceilings.medians()))
    host_us = None
    if args.cases is None or re.search(args.cases, HOST_CASE):
        host_us = round(measure_host(), 2)
        print(f"{HOST_CASE}: {host_us}")
    while ceilings.samples < MIN_CEILING_SAMPLES:
        ceilings.sample()

    medians = ceilings.medians()
    verdicts = judge_all(rows, medians, host_us)
    print(
        f"\nceilings (medians of {ceilings.samples}): G {medians['gemm_tflops']:.1f} TFLOP/s, "
        f"R {medians['read_gbps']:.0f} GB/s; {time.perf_counter() - started:.0f} s"
    )
    if args.cases is None and not args.quick and not args.no_json:
        facts |= {"host_us": host_us, "host_us_bar": HOST_BAR_US}
        path = write_json(results_folder(), OPERATOR, facts, medians, rows)
        print("wrote", path)
        print("wrote", draw(path))
    print_verdicts(verdicts)
    return 1 if any(verdict.passed is False for verdict in verdicts) else 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
