"""Arguments for every operator of torch.ops.flash_mla, small and free of NaN."""

from __future__ import annotations

from typing import Any

import torch
from cases import dense_decode, normal, randint
from kv_cache_bytes import encode
from mha_cases import varlen

SCALE = 0.05

FUNCTIONAL = [
    "mla_decode_dense",
    "mla_decode_dense fp8",
    "mla_decode_dense v32_fp8",
    "mla_decode_sparse",
    "mla_decode_sparse bf16",
    "mla_decode_sparse extra",
    "mla_prefill_sparse",
    "mha_prefill_dense",
    "merge_attn_states",
    "kv_cache_gather",
]
MUTATING = [
    "mla_decode_dense_out",
    "mla_decode_sparse_out",
    "mla_prefill_sparse_out",
    "kv_cache_append_",
]


def _decode_dense(gen: torch.Generator, device: str, kv_format: str) -> tuple[Any, ...]:
    case = dense_decode(
        gen, device, lengths=[5, 17], s_q=2, heads=(4, 1), page_size=16, kv_format=kv_format,
        poison_value=0.0, descales="one",
    )  # fmt: skip
    x = case.inputs
    names = ("q", "k_cache", "block_table", "cache_seqlens")
    return (*(x[n] for n in names), None, x.get("descale_k"), 512, SCALE, True, False)


def _decode_sparse(gen: torch.Generator, device: str, variant: str) -> tuple[Any, ...]:
    name = "v32_fp8" if variant == "extra" else variant
    q = normal(gen, 2, 2, 4, 576, std=1.0).bfloat16()
    caches = [encode(normal(gen, 3, 8, 1, 576, std=0.1), name) for _ in range(2)]
    indices = [randint(gen, -1, 24, (2, 2, n)).int() for n in (10, 6)]
    lengths = torch.tensor([10, 4], dtype=torch.int32)
    sink = torch.tensor([0.0, 0.5, -1.0, 2.0])
    extra: tuple[Any, ...] = (None, None, None)
    if variant == "extra":
        extra = (caches[1].to(device), indices[1].to(device), None)
    main = (x.to(device) for x in (q, caches[0], indices[0], lengths, sink))
    return (*main, *extra, 512, SCALE, False)


def op_arguments(name: str, gen: torch.Generator, device: str) -> tuple[Any, tuple[Any, ...]]:
    """(overload, its positional arguments) for an entry of FUNCTIONAL or MUTATING."""
    op_name, _, variant = name.partition(" ")
    overload = getattr(torch.ops.flash_mla, op_name).default
    base = op_name.removesuffix("_out")
    arguments: tuple[Any, ...]
    if base == "mla_decode_dense":
        arguments = _decode_dense(gen, device, variant or "bf16")
    elif base == "mla_decode_sparse":
        arguments = _decode_sparse(gen, device, variant or "v32_fp8")
    elif base == "mla_prefill_sparse":
        q, kv = normal(gen, 5, 4, 576, std=1.0), normal(gen, 9, 1, 576, std=0.1)
        indices = randint(gen, -1, 10, (5, 1, 6)).int()
        tensors = (q.bfloat16(), kv.bfloat16(), indices)
        arguments = (*(x.to(device) for x in tensors), None, None, 512, SCALE)
    elif base == "mha_prefill_dense":
        case = varlen(gen, device, q_lengths=[3, 9], kv_lengths=[7, 9])
        arguments = (case.q, case.k, case.v, *case.lengths, SCALE, True)
    elif base == "merge_attn_states":
        tensors = tuple(normal(gen, 6, 4, *d, std=1.0) for d in ((512,), (), (512,), ()))
        arguments = tuple((x.bfloat16() if x.dim() == 3 else x).to(device) for x in tensors)
    elif base == "kv_cache_gather":
        cache = encode(normal(gen, 3, 8, 1, 576, std=0.1), "v32_fp8").to(device)
        slots = randint(gen, -1, 25, (7,)).to(device)
        arguments = (cache, slots, "v32_fp8", None, 576, torch.bfloat16)
    else:
        cache = encode(normal(gen, 3, 8, 1, 576, std=0.1), "v32_fp8").to(device)
        kv = normal(gen, 7, 1, 576, std=0.1).bfloat16().to(device)
        slots = torch.randperm(24, generator=gen)[:7].to(device)
        arguments = (kv, cache, slots, "v32_fp8", None)
    if op_name.endswith("_out"):
        q = arguments[0]
        out = torch.zeros(*q.shape[:-1], 512, dtype=torch.bfloat16, device=device)
        arguments = (*arguments, out)
    return overload, arguments
