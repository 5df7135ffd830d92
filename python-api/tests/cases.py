"""Inputs for the operators, poisoned wherever the contract says that nothing is read."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import float64_reference
import kv_cache_bytes
import torch
from torch import Tensor

import flash_mla

# Logits get a standard deviation of 0.3, so the softmax is not flat and no key dominates. The
# absolute bounds of tolerances.py assume values of size 0.1.
Q_STD, KV_STD = 3.0, 0.1
PAGE_GAP_BYTES = 576  # unused bytes after each page of a strided packed cache
GARBAGE_PAGES = (-1, -(2**31), 2**31 - 1, 1_000_000)


def pairwise(
    valid: Callable[[dict[str, Any]], bool] = lambda case: True, **axes: Sequence[Any]
) -> list[dict[str, Any]]:
    """Few cases in which every two values of different axes meet. The same list in every run."""
    rng = random.Random(0)
    names = list(axes)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in range(len(axes[a]))
        for y in range(len(axes[b]))
    }
    cases: list[dict[str, Any]] = []
    while missing:
        seed = min(missing)
        best: tuple[int, dict[str, int]] = (0, {})
        for _ in range(40):
            pick = {name: rng.randrange(len(axes[name])) for name in names} | dict(seed)
            if valid({name: axes[name][i] for name, i in pick.items()}):
                gain = sum(pair in missing for pair in itertools.combinations(pick.items(), 2))
                best = max(best, (gain, pick), key=lambda scored: scored[0])
        if best[0] == 0:
            missing.discard(seed)  # no valid case has this pair
            continue
        missing.difference_update(itertools.combinations(best[1].items(), 2))
        cases.append({name: axes[name][i] for name, i in best[1].items()})
    return cases


def case_id(case: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in case.items()).replace(" ", "")


def poison(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """An output that shows what was left unwritten."""
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def normal(gen: torch.Generator, *shape: int, std: float) -> Tensor:
    return torch.randn(*shape, generator=gen) * std


def randint(gen: torch.Generator, low: int, high: int, shape: Sequence[int]) -> Tensor:
    return torch.randint(low, high, list(shape), generator=gen)


def padded_rows(x: Tensor, columns: int = 64) -> Tensor:
    """The same values as a slice of wider rows, the rest NaN (or its bytes)."""
    wide = torch.empty(*x.shape[:-1], x.shape[-1] + columns, dtype=x.dtype, device=x.device)
    wide.view(torch.uint8).fill_(0xFF)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def every_second(x: Tensor) -> Tensor:
    """The same values as every second entry of the first dimension."""
    wide = torch.empty(2 * x.shape[0], *x.shape[1:], dtype=x.dtype, device=x.device)
    wide.view(torch.uint8).fill_(0xFF)
    wide[::2] = x
    return wide[::2]


def swapped(x: Tensor) -> Tensor:
    """The same values stored with dimensions 1 and 2 exchanged: heads before queries."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def to_device(cache: Tensor, device: str) -> Tensor:
    """The cache with its own strides: Tensor.to() may close the gaps between pages."""
    flat = torch.empty(0, dtype=cache.dtype, device=cache.device).set_(cache.untyped_storage())
    return flat.to(device).as_strided(cache.shape, cache.stride(), cache.storage_offset())


@dataclass
class Decode:
    """One call of flash_mla_with_kvcache, and its answer in float64."""

    inputs: dict[str, Tensor]
    options: dict[str, Any]
    expected_out: Tensor
    expected_lse: Tensor
    out_dtype: torch.dtype = torch.bfloat16

    def run(self, **changes: Any) -> tuple[Tensor, Tensor]:
        """Calls with poisoned `out`, and with the metadata of get_mla_metadata()."""
        arguments: dict[str, Any] = {"block_table": None, "cache_seqlens": None}
        arguments |= {"tile_scheduler_metadata": flash_mla.get_mla_metadata()[0]}
        arguments |= {"head_dim_v": 512} | self.inputs | self.options | changes
        if "out" not in changes:
            q = arguments["q"]
            shape = (*q.shape[:3], 512)
            arguments["out"] = poison(*shape, dtype=self.out_dtype, device=str(q.device))
        out, lse = flash_mla.flash_mla_with_kvcache(**arguments)
        return out, lse


def block_tables(
    gen: torch.Generator, lengths: Sequence[int], page_size: int
) -> tuple[Tensor, int, Tensor]:
    """Pages in random order; (block_table [b, max_pages], num_pages, used [P, page])."""
    counts = [-(-n // page_size) for n in lengths]
    num_pages = sum(counts) + 2
    order = torch.randperm(num_pages, generator=gen)
    garbage = randint(gen, 0, len(GARBAGE_PAGES), (len(lengths), max(counts, default=0) + 2))
    table = torch.tensor(GARBAGE_PAGES)[garbage]
    used = torch.zeros(num_pages, page_size, dtype=torch.bool)
    start = 0
    for n, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        pages = order[start : start + count]
        start += count
        table[n, :count] = pages
        slots = torch.arange(length)
        used[pages[slots // page_size], slots % page_size] = True
    return table.int(), num_pages, used


def dense_decode(
    gen: torch.Generator,
    device: str,
    *,
    lengths: Sequence[int],
    s_q: int = 1,
    heads: tuple[int, int] = (16, 1),
    d_qk: int = 576,
    page_size: int = 64,
    kv_format: str = "bf16",
    causal: bool = False,
    softmax_scale: float | None = None,
    layout: str = "contiguous",
    q_std: float = Q_STD,
    fp8_q: bool = False,
    descales: str = "none",
    scales: str = "power_of_two",
    edit_table: Callable[[Tensor, int], None] | None = None,
    edit_cache: Callable[[Tensor, Tensor], None] | None = None,
    poison_value: float = torch.nan,
) -> Decode:
    """heads: (h_q, h_kv). descales: "none", "one" or "per_request", for fp8.

    edit_table(table, num_pages) and edit_cache(kv, table) change things in place, before the cache
    is packed and the reference computed.
    """
    b, (h_q, h_kv) = len(lengths), heads
    table, num_pages, used = block_tables(gen, lengths, page_size)
    kv = normal(gen, num_pages, page_size, h_kv, d_qk, std=KV_STD)
    if edit_cache is not None:
        edit_cache(kv, table)
    kv[~used] = poison_value
    if edit_table is not None:
        edit_table(table, num_pages)

    descale = {
        "none": None,
        "one": torch.tensor([0.0123]),
        "per_request": 0.01 * (1 + torch.rand(b, generator=gen)),
    }[descales]
    descale_k = descale if kv_format == "fp8" else None
    descale_q = descale if fp8_q else None
    q = normal(gen, b, s_q, h_q, d_qk, std=q_std)
    if descale_k is not None:
        kv = kv / descale_k[0]
    if descale_q is not None:
        q = q / descale_q[0]
    out_dtype = torch.float16 if kv_format == "fp16" else torch.bfloat16
    # Older releases of torch turn what is beyond the largest e4m3 value into NaN.
    q = q.clamp(-448, 448).to(torch.float8_e4m3fn) if fp8_q else q.to(out_dtype)
    gap = PAGE_GAP_BYTES if layout == "strided" else 0
    cache = kv_cache_bytes.encode(kv, kv_format, scales=scales, extra_page_bytes=gap)
    seqlens = torch.tensor(lengths, dtype=torch.int32)

    scale = softmax_scale if softmax_scale is not None else d_qk**-0.5
    expected = float64_reference.mla_decode_dense(
        kv_cache_bytes.E4M3[q.view(torch.uint8).long()] if fp8_q else q.double(),
        kv_cache_bytes.decode(cache, kv_format),
        table,
        seqlens,
        scale,
        causal,
        None if descale_q is None else descale_q.double().expand(b),
        None if descale_k is None else descale_k.double().expand(b),
    )

    q, table, cache = q.to(device), table.to(device), to_device(cache, device)
    if layout == "strided":
        q, table = padded_rows(q), padded_rows(table, 3)
        cache = padded_rows(cache) if kv_format in kv_cache_bytes.PLAIN else cache
    elif layout == "transposed":
        q, table, cache = swapped(q), every_second(table), swapped(every_second(cache))
    inputs: dict[str, Tensor] = {"q": q, "k_cache": cache, "block_table": table}
    inputs["cache_seqlens"] = seqlens.to(device)
    if descale_k is not None:
        inputs["descale_k"] = descale_k.to(device)
    if descale_q is not None:
        inputs["descale_q"] = descale_q.to(device)
    options = {"softmax_scale": softmax_scale, "causal": causal}
    return Decode(inputs, options, *expected, out_dtype)


def index_lists(
    gen: torch.Generator,
    b: int,
    s_q: int,
    num_tokens: int,
    topk: int,
    invalid: str,
    topk_length: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """(indices int32 [b, s_q, topk], used [num_tokens]).

    Entries past topk_length are inside the cache and name a poisoned token.
    invalid: "none", "some" (a quarter, anywhere in the list) or "all". The last fifth of the tokens
    is named by nothing that counts.
    """
    lists = randint(gen, 0, max(1, num_tokens * 4 // 5), (b, s_q, topk))
    outside = torch.tensor([-1, num_tokens, 2**31 - 1, -(2**31)])
    outside = outside[randint(gen, 0, 4, (b, s_q, topk))]
    share = {"none": 0.0, "some": 0.25, "all": 1.0}[invalid]
    lists = torch.where(torch.rand(b, s_q, topk, generator=gen) < share, outside, lists)
    if topk_length is not None:
        past = torch.arange(topk) >= torch.tensor(topk_length)[:, None, None]
        lists[past.expand_as(lists)] = num_tokens - 1
    used = torch.zeros(num_tokens, dtype=torch.bool)
    used[lists[counted(lists, topk_length, num_tokens)]] = True
    return lists.int(), used


def counted(lists: Tensor, topk_length: Tensor | Sequence[int] | None, num_tokens: int) -> Tensor:
    """Which entries of lists [b, s_q, topk] count: inside the cache, and left of topk_length."""
    inside = (lists >= 0) & (lists.long() < num_tokens)
    if topk_length is None:
        return inside
    length = torch.as_tensor(topk_length, device=lists.device)
    return inside & (torch.arange(lists.shape[-1], device=lists.device) < length[:, None, None])


def sparse_cache(
    gen: torch.Generator, used: Tensor, d_qk: int, kv_format: str, scales: str, layout: str
) -> Tensor:
    """A cache [P, page, 1, ..] in the format, with every token poisoned that `used` leaves out."""
    kv = normal(gen, *used.shape, 1, d_qk, std=KV_STD)
    kv[~used] = torch.nan
    gap = PAGE_GAP_BYTES if layout == "strided" else 0
    return kv_cache_bytes.encode(kv, kv_format, scales=scales, extra_page_bytes=gap)


def sparse_decode(
    gen: torch.Generator,
    device: str,
    *,
    b: int = 2,
    s_q: int = 1,
    h_q: int = 16,
    kv_format: str = "v32_fp8",
    d_qk: int | None = None,
    page_size: int = 64,
    num_pages: int = 3,
    topk: int = 64,
    invalid: str = "some",
    topk_length: Sequence[int] | None = None,
    attn_sink: Sequence[float] | None = None,
    extra: tuple[str, int, int] | None = None,
    extra_topk_length: Sequence[int] | None = None,
    softmax_scale: float | None = None,
    layout: str = "contiguous",
    scales: str = "power_of_two",
    q_std: float = Q_STD,
) -> Decode:
    """attn_sink: repeated over the heads. extra: (format, page_size, topk) of the second cache."""
    packed = kv_cache_bytes.PACKED.get(kv_format)
    d_qk = d_qk or (packed.d_qk if packed else 576)
    q = normal(gen, b, s_q, h_q, d_qk, std=q_std)
    q = q.to(torch.float16 if kv_format == "fp16" else torch.bfloat16)
    caches = [(kv_format, page_size, topk, topk_length)]
    if extra is not None:
        caches.append((*extra, extra_topk_length))

    inputs: dict[str, Tensor] = {}
    reference: list[Any] = []
    names = (
        ("k_cache", "indices", "topk_length"),
        ("extra_k_cache", "extra_indices_in_kvcache", "extra_topk_length"),
    )
    for (fmt, page, count, length), (cache_name, list_name, length_name) in zip(
        caches, names, strict=False
    ):
        lists, used = index_lists(gen, b, s_q, num_pages * page, count, invalid, length)
        cache = sparse_cache(gen, used.view(num_pages, page), d_qk, fmt, scales, layout)
        lengths = None if length is None else torch.tensor(length, dtype=torch.int32)
        reference += [kv_cache_bytes.decode(cache, fmt), lists, lengths]
        inputs[cache_name] = to_device(cache, device)
        lists = lists.to(device)
        inputs[list_name] = padded_rows(lists, 3) if layout == "strided" else lists
        if lengths is not None:
            inputs[length_name] = lengths.to(device)
    sink = None
    if attn_sink is not None:
        sink = torch.tensor([attn_sink[h % len(attn_sink)] for h in range(h_q)])
        inputs["attn_sink"] = sink.to(device)

    scale = softmax_scale if softmax_scale is not None else d_qk**-0.5
    expected = float64_reference.mla_decode_sparse(
        q.double(),
        *reference[:2],
        scale,
        reference[2],
        None if sink is None else sink.double(),
        *reference[3:],
    )
    q = q.to(device)
    inputs["q"] = padded_rows(q) if layout == "strided" else q
    options = {"softmax_scale": softmax_scale, "is_fp8_kvcache": packed is not None}
    return Decode(inputs, options, *expected, q.dtype)
