"""Sparse MLA decode on one GPU: speed against the machine's ceilings, and against our bars.

    python mla_decode_sparse.py [--cases REGEX] [--quick] [--no-json]
    python mla_decode_sparse.py --plot-only [JSON]

A time is that of the whole Python call `flash_mla_with_kvcache(indices=...)`: a v32_fp8 cache, 2048
indices a query and one query token, unless a case's name says otherwise. Each query has indices of
its own, random and distinct, into the tokens of its request, whose pages of 64 lie at random places
of one cache. A request has 32768 tokens, as in upstream's benchmark: with 128 requests the cache is
2 to 5 GB, far beyond L2, and few of the tokens that a query reads are read by another one. GB/s
counts the bytes of the indexed tokens, once for each index; TFLOP/s counts 2 * h_q * (d_qk + 512)
for each index.

Bars, aims and verdicts are decode_benchmark.py's. A few rows of each case's results are checked
against float64.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from decode_benchmark import D_V, Bar, Benchmark, disagreement, run
from torch import Tensor

import flash_mla
from flash_mla.reference.kv_cache import gather_tokens

PAGE_SIZE = 64
TOKENS = 32768  # of a request
PACKED_AT_ONCE = 1 << 18  # tokens, so that making a cache takes little more memory than it


# --------------------------------------------------------------------------------------------------
# Cases
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    h_q: int
    b: int
    s_q: int = 1
    topk: int = 2048
    kv_format: str = "v32_fp8"
    extra: tuple[str, int] | None = None  # format and topk of the second cache
    kernel: str | None = None  # FLASH_MLA_KERNEL
    bar: Bar | None = None
    cost_of_batch_invariant = False  # is not measured here

    @property
    def name(self) -> str:
        words = [] if self.kv_format == "v32_fp8" else [self.kv_format]
        words += [f"h={self.h_q}", f"b={self.b}"]
        words += [f"s_q={self.s_q}"] if self.s_q > 1 else []
        words += [f"topk={self.topk}"] if self.topk != 2048 else []
        words += ["and {} topk={}".format(*self.extra)] if self.extra else []
        words += [self.kernel] if self.kernel else []
        words += ["in a graph"] if self.bar and self.bar.of == "graph us" else []
        return " ".join(words)

    @property
    def d_qk(self) -> int:
        return flash_mla.kv_format(self.kv_format).d_qk or 576

    @property
    def sets(self) -> list[tuple[str, int]]:
        """Format and topk of each cache."""
        return [(self.kv_format, self.topk)] + ([self.extra] if self.extra else [])

    @property
    def fields(self) -> dict[str, Any]:
        same = ("b", "s_q", "h_q", "d_qk", "kv_format", "topk")
        row = {name: getattr(self, name) for name in same}
        row |= {"s_k": TOKENS, "page_size": PAGE_SIZE}
        if self.extra:
            row |= dict(zip(("extra_kv_format", "extra_topk"), self.extra, strict=True))
        return row


def all_cases() -> list[Case]:
    v32 = [
        Case(128, 128, 2, bar=Bar("G", 0.85, 1.0)),
        Case(128, 128, bar=Bar("G", 0.82, 0.97)),
        Case(128, 16, bar=Bar("us", 26, 20)),
        Case(128, 1, bar=Bar("us", 13)),
        Case(128, 1, bar=Bar("graph us", 8.5, 6.5)),
        Case(64, 128, 2, bar=Bar("G", 0.72, 0.90)),
        Case(16, 128, bar=Bar("R", 0.75, 0.86)),
        Case(128, 148, 2, topk=16384, bar=Bar("G", 0.88, 1.02)),
    ]
    v4 = [
        Case(128, 128, 2, 1024, "v4_fp8", bar=Bar("G", 0.76, 0.90)),
        Case(64, 128, 2, 512, "v4_fp8", bar=Bar("G", 0.52, 0.65)),
    ]
    v41 = [
        Case(128, 128, 2, 512, "v41_fp8", extra=("v41_fp4", 512), bar=Bar("G", 0.65, 0.80)),
    ]
    others = [
        Case(16, 128, kernel="portable"),
        Case(128, 128, kernel="portable"),
        Case(128, 128, kv_format="bf16"),
        Case(16, 128, kv_format="bf16"),
        Case(128, 128, 2, 1024, "v41_fp8"),
        Case(128, 1, 4096),
    ]
    return v32 + v4 + v41 + others


# --------------------------------------------------------------------------------------------------
# Inputs
# --------------------------------------------------------------------------------------------------


class TokenSet:
    """A cache with the tokens of all requests, and the indices of the queries."""

    def __init__(self, case: Case, kv_format: str, topk: int, device: str) -> None:
        pages_a_request = TOKENS // PAGE_SIZE
        num_pages = case.b * pages_a_request
        self.cache = self._random_cache(kv_format, num_pages, case.d_qk, device)
        table = torch.randperm(num_pages, device=device).view(case.b, 1, pages_a_request)
        shape = (case.b, case.s_q, TOKENS)
        token = torch.rand(shape, device=device).argsort(-1)[..., :topk]
        page = table.expand(-1, case.s_q, -1).gather(2, token // PAGE_SIZE)
        self.indices = (page * PAGE_SIZE + token % PAGE_SIZE).int()

    @staticmethod
    def _random_cache(kv_format: str, num_pages: int, d_qk: int, device: str) -> Tensor:
        cache = flash_mla.kv_cache_empty(kv_format, num_pages, PAGE_SIZE, d_qk=d_qk, device=device)
        for slots in torch.arange(num_pages * PAGE_SIZE, device=device).split(PACKED_AT_ONCE):
            latents = torch.randn(len(slots), 1, d_qk, dtype=torch.bfloat16, device=device)
            flash_mla.kv_cache_append(latents, cache, slots, kv_format)
        if kv_format == "v32_fp8":  # engines' scales are amax / 448, no powers of two
            scales = cache[..., 512:528].view(torch.float32)
            scales.mul_(torch.rand_like(scales).add_(0.5))
        return cache

    @property
    def bytes(self) -> int:
        return self.indices.numel() * self.cache.shape[-1] * self.cache.element_size()

    def keys(self, request: int, query: int) -> Tensor:
        """float64 [topk, d_qk], dequantised by flash_mla.reference."""
        slots = self.indices[request, query].long()
        return gather_tokens(self.cache, slots // PAGE_SIZE, slots % PAGE_SIZE, torch.float64)[:, 0]


class Inputs:
    def __init__(self, case: Case, device: str = "cuda") -> None:
        self.case = case
        shape = (case.b, case.s_q, case.h_q, case.d_qk)
        self.q = torch.randn(shape, dtype=torch.bfloat16, device=device)
        self.sets = [TokenSet(case, *one, device) for one in case.sets]
        self.softmax_scale = case.d_qk**-0.5
        self.metadata, _ = flash_mla.get_mla_metadata()
        self.arguments: dict[str, Any] = {"indices": self.sets[0].indices}
        for extra in self.sets[1:]:
            self.arguments["extra_k_cache"] = extra.cache
            self.arguments["extra_indices_in_kvcache"] = extra.indices

    def call(self, *, batch_invariant: bool = False) -> tuple[Tensor, Tensor]:
        return flash_mla.flash_mla_with_kvcache(
            self.q,
            self.sets[0].cache,
            None,
            None,
            D_V,
            self.metadata,
            softmax_scale=self.softmax_scale,
            batch_invariant=batch_invariant,
            **self.arguments,
        )

    @property
    def flops(self) -> float:
        indices = sum(one.indices.numel() for one in self.sets)
        return 2.0 * self.case.h_q * indices * (self.case.d_qk + D_V)

    @property
    def bytes(self) -> float:
        return float(sum(one.bytes for one in self.sets))

    @property
    def blocks(self) -> int | None:
        case = self.case  # queries have no keys in common: a tile has rows of one
        if case.h_q < 64:
            return None
        return case.b * case.s_q * -(-case.h_q // 64) * sum(-(-topk // 64) for _, topk in case.sets)

    def error(self, out: Tensor, lse: Tensor) -> str:
        """Of a few heads of the first and of the last query."""
        case = self.case
        heads = torch.tensor(sorted({0, case.h_q // 2, case.h_q - 1}), device=self.q.device)
        for request, query in {(0, 0), (case.b - 1, case.s_q - 1)}:
            if error := disagreement(
                self.q[request, query, heads][None],
                torch.cat([one.keys(request, query) for one in self.sets]),
                self.softmax_scale,
                out[request, query, heads][None],
                lse[request, heads, query][None],
                rounded_k=case.kv_format == "v32_fp8",  # TokenSet gives it such scales
            ):
                return f"query {query} of request {request}: {error}"
        return ""


if __name__ == "__main__":
    benchmark = Benchmark(
        operator="mla_decode_sparse",
        title="Sparse MLA decode, L2 flushed",
        description=__doc__,
        cases=all_cases(),
        inputs=Inputs,
        host_case=Case(16, 1, topk=64),
    )
    sys.exit(run(benchmark))
