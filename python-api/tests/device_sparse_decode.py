"""Sparse decode of any size, built and answered on the device that runs it, as device_decode.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import KV_STD, Q_STD, counted, index_lists, padded_rows, swapped
from device_decode import (
    D_V,
    DeviceDecode,
    Edit,
    Format,
    KeyEdit,
    dense_decode,
    empty_cache,
    groups_of,
    randn_on,
)
from kv_cache_bytes import decode_tokens, encode_tokens
from torch import Tensor

TOKENS_A_STEP = 2**14  # float64, and for v41_fp4 its eight candidates of each value
SETS = (
    ("k_cache", "indices", "topk_length"),
    ("extra_k_cache", "extra_indices_in_kvcache", "extra_topk_length"),
)


@dataclass(frozen=True)
class SparseFormat(Format):
    """extra_format: of a second cache that every call has; else it has the first one's format."""

    d_qk: int = 512
    extra_format: str | None = None


ALL_SPARSE_FORMATS = [
    SparseFormat("v32_fp8", "v32_fp8", d_qk=576),
    SparseFormat("v32_fp8*any", "v32_fp8", scales="any", d_qk=576),
    SparseFormat("v4_fp8", "v4_fp8"),
    SparseFormat("v41_fp8", "v41_fp8"),
    SparseFormat("v41_fp8+fp4", "v41_fp8", extra_format="v41_fp4"),
    SparseFormat("bf16", "bf16", d_qk=576),
    SparseFormat("bf16,512", "bf16"),
]
# One for each combination of caches. Rounding K of any scale moves large logits by more than any
# tolerance could tell from a bug: tests of sharp softmaxes take these too.
SPARSE_FORMATS = [f for f in ALL_SPARSE_FORMATS if f.scales != "any"]
# One for each way of dequantising.
FEW_SPARSE_FORMATS = [
    f for f in SPARSE_FORMATS if f.name in ("v32_fp8", "v4_fp8", "v41_fp8+fp4", "bf16")
]


@dataclass(frozen=True)
class Lists:
    """A cache, and the indices into it.

    topk, lengths: of each query; lengths is topk_length, None is the argument left out.
    invalid: "none", "some" or "all" of the entries, as cases.index_lists.
    slots: the entries instead of random ones, as far as they broadcast to [b, s_q, topk].
    num_pages: by default enough that an index is seldom drawn twice.
    cache: to write into, instead of a new one.
    """

    topk: int = 64
    lengths: Sequence[int] | None = None
    invalid: str = "some"
    page_size: int = 64
    num_pages: int = 0
    slots: Tensor | None = None
    cache: Tensor | None = None


SOME_LISTS = Lists()


@dataclass
class SparseDecode(DeviceDecode):
    extra_format: str = "v32_fp8"

    def answer(self) -> tuple[Tensor, Tensor]:
        return answer(self.inputs, (self.kv_format, self.extra_format), **self.options)


def sparse_decode(
    gen: torch.Generator,
    device: str,
    *,
    b: int = 2,
    s_q: int = 1,
    h_q: int = 16,
    lists: Lists = SOME_LISTS,
    extra: Lists | None = None,
    kv_format: str = "v32_fp8",
    scales: str = "power_of_two",
    d_qk: int = 576,
    extra_format: str | None = None,
    attn_sink: Sequence[float] | None = None,
    softmax_scale: float | None = None,
    layout: str = "contiguous",
    q_std: float = Q_STD,
    edit_queries: Edit | None = None,
    edit_keys: KeyEdit | None = None,
) -> SparseDecode:
    """As cases.sparse_decode. All tokens are poisoned but those that an entry which counts names.

    extra: of the second cache; by default there is one like the first if there must be one.
    edit_queries(q [b, s_q, h_q, d]) and edit_keys(kv [n, 1, d], slots [n]) change values in place,
    before they are rounded. layout: as device_decode.empty_cache; of indices "strided" means rows
    of 3 entries more, "transposed" queries before requests.
    """
    if extra_format is not None and extra is None:
        extra = replace(lists, page_size=24)
    random = randn_on(device, gen)
    q = random(b, s_q, h_q, d_qk) * q_std
    if edit_queries is not None:
        edit_queries(q)
    q = q.bfloat16()
    if layout == "strided":
        q = padded_rows(q)
    elif layout == "transposed":
        q = swapped(q)
    inputs = {"q": q}
    formats = (kv_format, extra_format or kv_format)

    sets = (lists,) if extra is None else (lists, extra)
    for fmt, one, (cache_name, list_name, length_name) in zip(formats, sets, SETS, strict=False):
        num_pages = one.num_pages or max(3, -(-2 * one.topk // one.page_size))
        cache = one.cache
        if cache is None:
            cache = empty_cache(device, num_pages, one.page_size, 1, d_qk, fmt, layout)
        num_tokens = cache.shape[0] * cache.shape[1]
        if one.slots is None:
            entries, used = index_lists(gen, b, s_q, num_tokens, one.topk, one.invalid, one.lengths)
            slots = used.nonzero()[:, 0]
        else:
            entries = one.slots.int().expand(b, s_q, one.topk)
            slots = entries[counted(entries, one.lengths, num_tokens)].unique().long()
        for some in slots.to(device).split(TOKENS_A_STEP):
            kv = random(len(some), 1, d_qk) * KV_STD
            if edit_keys is not None:
                edit_keys(kv, some)
            encode_tokens(kv, cache, fmt, some, scales=scales)
        entries = entries.to(device)
        if layout == "strided":
            entries = padded_rows(entries, 3)
        elif layout == "transposed":
            entries = entries.transpose(0, 1).contiguous().transpose(0, 1)
        inputs |= {cache_name: cache, list_name: entries}
        if one.lengths is not None:
            inputs[length_name] = torch.tensor(one.lengths, dtype=torch.int32, device=device)
    if attn_sink is not None:
        sink = torch.tensor([attn_sink[h % len(attn_sink)] for h in range(h_q)])
        inputs["attn_sink"] = sink.to(device)

    options: dict[str, Any] = {"softmax_scale": softmax_scale}
    expected = answer(inputs, formats, **options)
    return SparseDecode(inputs, options, *expected, torch.bfloat16, *formats)


def decode_of(
    fmt: Format,
    gen: torch.Generator,
    device: str,
    lengths: Sequence[int],
    *,
    s_q: int = 1,
    h_q: int = 16,
) -> DeviceDecode:
    """Causal dense decode of requests of these lengths, or sparse decode of lists of these lengths,
    as the format is one of the former or of the latter."""
    if not isinstance(fmt, SparseFormat):
        return dense_decode(
            gen, device, lengths=lengths, s_q=s_q, heads=(h_q, 1), causal=True, **fmt.build()
        )
    lists = Lists(max(lengths), lengths)
    return sparse_decode(gen, device, b=len(lengths), s_q=s_q, h_q=h_q, lists=lists, **fmt.build())


def answer(
    inputs: dict[str, Tensor], formats: Sequence[str], *, softmax_scale: float | None
) -> tuple[Tensor, Tensor]:
    """(out [b, s_q, h_q, 512], lse [b, h_q, s_q]) of the operator's inputs, float64."""
    q = inputs["q"]
    b, s_q, h_q, d_qk = q.shape
    scale = d_qk**-0.5 if softmax_scale is None else softmax_scale
    queries = q.double().flatten(0, 1)
    keys, entries = _listed(inputs, formats)

    out = torch.zeros(b * s_q, h_q, D_V, dtype=torch.float64, device=q.device)
    lse = torch.full((b * s_q, h_q), math.inf, dtype=torch.float64, device=q.device)
    lengths = (entries >= 0).sum(-1).tolist()
    for group in groups_of(lengths, bytes_a_key=8 * (d_qk + 2 * h_q)):
        rows = torch.tensor(group, device=q.device)
        listed = entries[rows, : lengths[group[-1]]]
        k = keys[listed]
        logits = torch.einsum("nhd,nkd->nhk", queries[rows], k) * scale
        logits.masked_fill_(listed[:, None] < 0, -math.inf)
        lse[rows] = logits.logsumexp(-1)
        out[rows] = torch.einsum("nhk,nkd->nhd", logits.softmax(-1), k[..., :D_V])
    if "attn_sink" in inputs:
        factor = torch.sigmoid(lse - inputs["attn_sink"].double())
        out *= torch.where(lse == math.inf, 0, factor)[..., None]  # inf - inf is NaN
    return out.unflatten(0, (b, s_q)), lse.unflatten(0, (b, s_q)).transpose(1, 2)


def _listed(inputs: dict[str, Tensor], formats: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(keys [n + 1, d_qk] float64, the last one 0; the entries of both lists of each query that
    count, as places in keys, before the -1 of the others: [b * s_q, topk + extra_topk])."""
    keys, places = [], []
    before = 0
    for fmt, (cache_name, list_name, length_name) in zip(formats, SETS, strict=True):
        if cache_name not in inputs:
            continue
        cache, lists = inputs[cache_name], inputs[list_name]
        counts = counted(lists, inputs.get(length_name), cache.shape[0] * cache.shape[1])
        slots, place = lists[counts].long().unique(return_inverse=True)
        keys.append(decode_tokens(cache, fmt, slots))
        places.append(torch.full(lists.shape, -1, device=lists.device))
        places[-1][counts] = place + before
        before += len(slots)
    keys.append(keys[0].new_zeros(1, keys[0].shape[1]))
    entries = torch.cat(places, dim=-1).flatten(0, 1).sort(-1, descending=True).values
    return torch.cat(keys), entries
