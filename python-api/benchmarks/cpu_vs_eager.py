"""The CPU backend against eager PyTorch, on the same inputs and threads.

    python cpu_vs_eager.py [--operator NAME ...] [--no-json]

Eager is what a user would write with PyTorch alone, and the fastest of its natural formulations:
matmul in the inputs' dtype, matmul in float32, or scaled_dot_product_attention with the latent as K
and its slice as V. It gathers pages or tokens and dequantises them, and returns no lse.

Limits: decode is not slower than eager, prefill takes at most 5 times as long. A broken limit makes
the exit status 1. Results go to results/cpu/<operator>.json. Run it on an idle machine: on a busy
one the threads of both sides wait for cores, and ratios mean little.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measure import Ceilings, Table, machine_facts, result_row, time_cpu, write_json
from torch import Tensor

import flash_mla

DECODE_LIMIT = 1.0  # ours / eager
PREFILL_LIMIT = 5.0
D_V = 512
PAGE_SIZE = 64
BYTES_PER_TOKEN = {"bf16": 1152, "fp16": 1152, "fp8": 576, "v32_fp8": 656, "v4_fp8": 584}

Gather = Callable[[torch.dtype], Tensor]  # latent vectors [b, s_k, d_qk] in a dtype


@dataclass
class Case:
    name: str
    limit: float
    row: dict[str, Any]  # of the result file
    flops: float
    bytes: float
    ours: Callable[[], Any]
    eager: dict[str, Callable[[], Any]]  # by formulation


# --------------------------------------------------------------------------------------------------
# Eager PyTorch
# --------------------------------------------------------------------------------------------------


def eager_mla(q: Tensor, gather: Gather, scale: float) -> dict[str, Callable[[], Tensor]]:
    """Formulations of attention of q [b, h_q, d_qk] over the latent: out [b, h_q, 512]."""

    def matmul(dtype: torch.dtype) -> Tensor:
        kv = gather(dtype)
        logits = q.to(dtype) @ kv.mT * scale
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(dtype)
        return (weights @ kv[..., :D_V]).to(q.dtype)

    def sdpa() -> Tensor:
        # Heads stand where queries usually do: all of them read the one latent, unexpanded.
        kv = gather(q.dtype)[:, None]
        out = F.scaled_dot_product_attention(q[:, None], kv, kv[..., :D_V], scale=scale)
        return out[:, 0]

    return {
        "matmul": lambda: matmul(q.dtype),
        "matmul f32": lambda: matmul(torch.float32),
        "sdpa": sdpa,
    }


def eager_mha(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """Formulations of causal attention, q, k, v [b, h, s, d]; mask [s, s] is -inf where masked."""

    def matmul(dtype: torch.dtype) -> Tensor:
        logits = q.to(dtype) @ k.to(dtype).mT * scale + mask.to(dtype)
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(dtype)
        return (weights @ v.to(dtype)).to(q.dtype)

    return {
        "matmul": lambda: matmul(q.dtype),
        "matmul f32": lambda: matmul(torch.float32),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale),
    }


def dequantise(nope: Tensor, scales: Tensor, rope: Tensor, dtype: torch.dtype) -> Tensor:
    """Latent vectors from e4m3 [.., d], a scale per tile [.., d / tile] and bf16 RoPE [.., 64]."""
    tiles = nope.to(dtype).unflatten(-1, (scales.shape[-1], -1)) * scales.to(dtype)[..., None]
    return torch.cat([tiles.flatten(-2), rope.to(dtype)], dim=-1)


def dequantise_v32(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    nope, scales, rope = tokens.split([512, 16, 128], dim=-1)
    return dequantise(
        nope.view(torch.float8_e4m3fn),
        scales.view(torch.float32),
        rope.view(torch.bfloat16),
        dtype,
    )


# --------------------------------------------------------------------------------------------------
# Cases
# --------------------------------------------------------------------------------------------------


def mla_decode_dense() -> Iterator[Case]:
    for kv_format in ("bf16", "fp16", "fp8", "v32_fp8"):
        for b in (1, 8):
            for s_k in (1024, 4096):
                for h_q in (16, 128):
                    yield _mla_decode_dense_case(kv_format, b, s_k, h_q)


def _mla_decode_dense_case(kv_format: str, b: int, s_k: int, h_q: int) -> Case:
    d_qk = 576
    pages = s_k // PAGE_SIZE
    dtype = torch.float16 if kv_format == "fp16" else torch.bfloat16
    q = torch.randn(b, 1, h_q, d_qk).to(dtype)
    kv = torch.randn(b * pages, PAGE_SIZE, 1, d_qk).to(dtype)
    descale_k = torch.tensor([0.0625]) if kv_format == "fp8" else None
    cache = flash_mla.kv_cache_pack(kv, kv_format, scale=descale_k)
    block_table = torch.randperm(b * pages, dtype=torch.int32).view(b, pages)
    cache_seqlens = torch.full((b,), s_k, dtype=torch.int32)
    metadata, _ = flash_mla.get_mla_metadata()
    scale = d_qk**-0.5

    def gather(dtype: torch.dtype) -> Tensor:
        if kv_format in ("bf16", "fp16"):
            return cache[block_table].flatten(1, 3).to(dtype)
        tokens = cache.view(torch.uint8)[block_table].flatten(1, 3)
        if descale_k is not None:
            return tokens.view(torch.float8_e4m3fn).to(dtype) * descale_k.to(dtype)
        return dequantise_v32(tokens, dtype)

    def ours() -> Any:
        return flash_mla.flash_mla_with_kvcache(
            q,
            cache,
            block_table,
            cache_seqlens,
            D_V,
            metadata,
            softmax_scale=scale,
            causal=True,
            descale_k=descale_k,
        )

    return Case(
        name=f"{kv_format} b={b} s_k={s_k} h_q={h_q}",
        limit=DECODE_LIMIT,
        row=result_row(
            b=b,
            s_q=1,
            s_k=s_k,
            h_q=h_q,
            d_qk=d_qk,
            causal=True,
            q_dtype="fp16" if kv_format == "fp16" else "bf16",
            kv_format=kv_format,
            page_size=PAGE_SIZE,
        ),
        flops=2.0 * b * h_q * s_k * (d_qk + D_V),
        bytes=b * (s_k * BYTES_PER_TOKEN[kv_format] + 2.0 * h_q * (d_qk + D_V)),
        ours=ours,
        eager=eager_mla(q[:, 0], gather, scale),
    )


def mla_decode_sparse() -> Iterator[Case]:
    for kv_format, d_qk, topk in (("v32_fp8", 576, 2048), ("v4_fp8", 512, 640)):
        for b in (1, 8):
            for h_q in (16, 128):
                yield _mla_decode_sparse_case(kv_format, d_qk, topk, b, h_q)


def _mla_decode_sparse_case(kv_format: str, d_qk: int, topk: int, b: int, h_q: int) -> Case:
    s_k = 4096
    pages = b * s_k // PAGE_SIZE
    q = torch.randn(b, 1, h_q, d_qk, dtype=torch.bfloat16)
    kv = torch.randn(pages, PAGE_SIZE, 1, d_qk, dtype=torch.bfloat16)
    cache = flash_mla.kv_cache_pack(kv, kv_format)
    indices = torch.randint(b * s_k, (b, 1, topk), dtype=torch.int32)
    metadata, _ = flash_mla.get_mla_metadata()
    scale = d_qk**-0.5

    def gather(dtype: torch.dtype) -> Tensor:
        index = indices[:, 0]
        page, offset = index // PAGE_SIZE, index % PAGE_SIZE
        raw = cache.view(torch.uint8)
        if kv_format == "v32_fp8":
            return dequantise_v32(raw[page, offset, 0], dtype)
        flat = raw.flatten(1)  # a v4_fp8 page: all tokens, then all scales
        tokens, scales = flat.split([PAGE_SIZE * 576, PAGE_SIZE * 8], dim=1)
        nope, rope = tokens.unflatten(1, (PAGE_SIZE, 576))[page, offset].split([448, 128], dim=-1)
        exponents = scales.unflatten(1, (PAGE_SIZE, 8))[page, offset, :7]
        return dequantise(
            nope.view(torch.float8_e4m3fn),
            exponents.view(torch.float8_e8m0fnu),
            rope.view(torch.bfloat16),
            dtype,
        )

    def ours() -> Any:
        return flash_mla.flash_mla_with_kvcache(
            q,
            cache,
            None,
            None,
            D_V,
            metadata,
            softmax_scale=scale,
            is_fp8_kvcache=True,
            indices=indices,
        )

    return Case(
        name=f"{kv_format} b={b} topk={topk} h_q={h_q}",
        limit=DECODE_LIMIT,
        row=result_row(
            b=b,
            s_q=1,
            s_k=s_k,
            h_q=h_q,
            d_qk=d_qk,
            topk=topk,
            kv_format=kv_format,
            page_size=PAGE_SIZE,
        ),
        flops=2.0 * b * h_q * topk * (d_qk + D_V),
        bytes=b * (topk * BYTES_PER_TOKEN[kv_format] + 2.0 * h_q * (d_qk + D_V)),
        ours=ours,
        eager=eager_mla(q[:, 0], gather, scale),
    )


def mla_prefill_sparse() -> Iterator[Case]:
    for s_q, h_q in ((128, 16), (32, 128)):
        yield _mla_prefill_sparse_case(s_q, h_q, s_kv=4096, topk=512)


def _mla_prefill_sparse_case(s_q: int, h_q: int, s_kv: int, topk: int) -> Case:
    d_qk = 576
    q = torch.randn(s_q, h_q, d_qk, dtype=torch.bfloat16)
    kv = torch.randn(s_kv, 1, d_qk, dtype=torch.bfloat16)
    indices = torch.randint(s_kv, (s_q, 1, topk), dtype=torch.int32)
    scale = d_qk**-0.5
    return Case(
        name=f"bf16 s_q={s_q} s_kv={s_kv} topk={topk} h_q={h_q}",
        limit=PREFILL_LIMIT,
        row=result_row(b=1, s_q=s_q, s_k=s_kv, h_q=h_q, d_qk=d_qk, topk=topk),
        flops=2.0 * s_q * h_q * topk * (d_qk + D_V),
        bytes=2.0 * (s_q * topk * d_qk + s_q * h_q * (d_qk + D_V)),
        ours=lambda: flash_mla.flash_mla_sparse_fwd(q, kv, indices, scale),
        eager=eager_mla(q, lambda dtype: kv[indices[:, 0], 0].to(dtype), scale),
    )


def mha_prefill_dense() -> Iterator[Case]:
    for d_qk, d_v in ((192, 128), (128, 128)):
        for backward in (False, True):
            yield _mha_prefill_dense_case(2, 512, 16, d_qk, d_v, backward)


def _mha_prefill_dense_case(b: int, s: int, h: int, d_qk: int, d_v: int, backward: bool) -> Case:
    q, k, v = (
        torch.randn(b * s, h, d, dtype=torch.bfloat16, requires_grad=backward)
        for d in (d_qk, d_qk, d_v)
    )
    cu_seqlens = torch.arange(0, b * s + 1, s, dtype=torch.int32)
    scale = d_qk**-0.5

    def ours() -> Tensor:
        out, _ = flash_mla.flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, s, s, softmax_scale=scale, causal=True
        )
        return out

    def batched(x: Tensor) -> Tensor:
        return x.unflatten(0, (b, s)).transpose(1, 2)

    mask = torch.full((s, s), -torch.inf).triu(1)
    eager = eager_mha(batched(q), batched(k), batched(v), scale, mask)
    pairs = b * h * s * s / 2  # of a query and a key that it attends
    return Case(
        name=f"{'backward' if backward else 'forward'} ({d_qk}, {d_v}) b={b} s={s} h={h}",
        limit=PREFILL_LIMIT,
        row=result_row(
            b=b, s_q=s, s_k=s, h_q=h, d_qk=d_qk, d_v=d_v, causal=True, backward=backward
        ),
        # Forward: q k^T and p v. Backward: q k^T, dq, dk over d_qk and dp, dv over d_v.
        flops=2.0 * pairs * (3 * d_qk + 2 * d_v if backward else d_qk + d_v),
        bytes=2.0 * b * s * h * 2 * (d_qk + d_v) * (2 if backward else 1),
        ours=_backward_of(ours, q, k, v) if backward else ours,
        eager={n: _backward_of(call, q, k, v) for n, call in eager.items()} if backward else eager,
    )


def _backward_of(forward: Callable[[], Tensor], *inputs: Tensor) -> Callable[[], Any]:
    """The backward pass alone, of one forward pass done here."""
    out = forward()
    d_out = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True)


OPERATORS: dict[str, Callable[[], Iterator[Case]]] = {
    "mla_decode_dense": mla_decode_dense,
    "mla_decode_sparse": mla_decode_sparse,
    "mla_prefill_sparse": mla_prefill_sparse,
    "mha_prefill_dense": mha_prefill_dense,
}


# --------------------------------------------------------------------------------------------------
# Run
# --------------------------------------------------------------------------------------------------


def measure(case: Case, budget_s: float) -> tuple[float, float, str]:
    """Microseconds of ours and of the fastest eager formulation, and the latter's name."""
    names = list(case.eager)
    # A short look drops the formulations that cannot win; on few cores some are many times slower.
    first = time_cpu([case.eager[n] for n in names], budget_s=0.0, min_rounds=1)
    names = [n for n, us in zip(names, first, strict=True) if us < 1.5 * min(first)]
    ours_us, *eager_us = time_cpu([case.ours, *(case.eager[n] for n in names)], budget_s=budget_s)
    best = min(range(len(names)), key=eager_us.__getitem__)
    return ours_us, eager_us[best], names[best]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--operator", choices=OPERATORS, nargs="+", default=list(OPERATORS))
    parser.add_argument("--no-json", action="store_true", help="print only")
    args = parser.parse_args()

    torch.manual_seed(0)
    facts = machine_facts("cpu")
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None))
    ceilings = Ceilings("cpu")
    table = Table(case=50, ours_us=12, eager_us=12, eager_is=12, ratio=8, limit=8, verdict=8)
    broken = 0
    results: dict[str, list[dict[str, Any]]] = {}
    for operator in args.operator:
        print(operator)
        for n, case in enumerate(OPERATORS[operator]()):
            if n % 8 == 0:
                ceilings.sample()
            ours_us, eager_us, formulation = measure(case, budget_s=0.2)
            if ours_us > case.limit * eager_us:
                # A longer second look decides: a neighbour's burst is no regression.
                ours_us, eager_us, formulation = measure(case, budget_s=1.0)
            ratio = ours_us / eager_us
            broken += ratio > case.limit
            verdict = "ok" if ratio <= case.limit else "SLOW"
            table.print(
                f"  {case.name}", ours_us, eager_us, formulation, ratio, case.limit, verdict
            )
            measured = {
                "variant": "cpu",
                "us": round(ours_us, 1),
                "tflops": round(case.flops / ours_us * 1e-6, 4),
                "gbps": round(case.bytes / ours_us * 1e-3, 2),
                "eager_us": round(eager_us, 1),
                "eager": formulation,
                "ratio_limit": case.limit,
            }
            results.setdefault(operator, []).append({**case.row, **measured})
    ceilings.sample()
    medians = ceilings.medians()
    print(f"ceilings: read {medians['read_gbps']} GB/s, f32 gemm {medians['gemm_tflops']} TFLOP/s")
    if not args.no_json:
        for operator, rows in results.items():
            print("wrote", write_json("cpu", operator, facts, medians, rows))
    print(f"{broken} of {sum(map(len, results.values()))} cases break their limit")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
