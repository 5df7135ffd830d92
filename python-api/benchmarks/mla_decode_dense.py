"""Dense MLA decode on one GPU: speed against the machine's ceilings, and against our bars.

    python mla_decode_dense.py [--cases REGEX] [--quick] [--no-json] [--[no-]batch-invariant]
    python mla_decode_dense.py --plot-only [JSON]

A time is that of the whole Python call `flash_mla_with_kvcache`: bf16, causal, one query token,
pages of 64 tokens at random places and requests of one length, unless a case's name says otherwise.
GB/s counts q, the keys and values attended and out once; TFLOP/s counts
2 * s_q * h_q * (d_qk + 512) for each key of each request.

Bars, aims and verdicts are decode_benchmark.py's. A few rows of each case's results are checked
against float64.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from decode_benchmark import D_V, Bar, Benchmark, disagreement, run
from torch import Tensor

import flash_mla

PAGE_SIZE_BAR = 1.10  # of the time with pages of 64


# --------------------------------------------------------------------------------------------------
# Cases
# --------------------------------------------------------------------------------------------------


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

    @property
    def fields(self) -> dict[str, Any]:
        same = ("b", "s_q", "s_k", "h_q", "d_qk", "kv_format", "page_size", "varlen")
        q_dtype = "fp16" if self.kv_format == "fp16" else "bf16"
        return {name: getattr(self, name) for name in same} | {"q_dtype": q_dtype, "causal": True}

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
    def blocks(self) -> int | None:
        rows = self.case.s_q * self.case.h_q
        if rows < 64:
            return None
        return -(-rows // 64) * sum(-(-length // 64) for length in self.lengths)

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
        """Of a few rows of the longest and of the shortest request."""
        case = self.case
        by_length = sorted(range(case.b), key=self.lengths.__getitem__)
        queries = torch.tensor(sorted({0, case.s_q - 1}), device=self.device)
        heads = torch.tensor(sorted({0, case.h_q // 2, case.h_q - 1}), device=self.device)
        for request in {by_length[0], by_length[-1]}:
            length = self.lengths[request]
            last_visible = length - case.s_q + queries
            if error := disagreement(
                self.q[request][queries][:, heads],
                self.keys(request),
                self.softmax_scale,
                out[request][queries][:, heads],
                lse[request][heads][:, queries].T,
                hidden=torch.arange(length, device=self.device) > last_visible[:, None],
                rounded_k=case.kv_format == "v32_fp8",  # Inputs gives it such scales
            ):
                return f"request {request} of {error}"
        return ""


if __name__ == "__main__":
    benchmark = Benchmark(
        operator="mla_decode_dense",
        title="Dense MLA decode, L2 flushed",
        description=__doc__,
        cases=all_cases(),
        inputs=Inputs,
        host_case=Case(16, 1, 64),
        host_bar_us=12.0,
    )
    sys.exit(run(benchmark))
