"""Attention in float64, loop by loop: what every backend and flash_mla.reference must agree with.

All inputs are float64 tensors on the CPU (integers for tables and lengths); all results float64.
Written from the contract of the operators alone, and slow on purpose.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

D_V = 512


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """One query: q [h_q, d], k [n, h_kv, d], v [n, h_kv, d_v], every key visible.

    Returns out [h_q, d_v], lse [h_q], max_logits [h_q]. Differentiable.
    """
    h_q, h_kv = q.shape[0], k.shape[1]
    if k.shape[0] == 0:
        zero = q.new_zeros(h_q, v.shape[-1])
        return zero, q.new_full((h_q,), math.inf), q.new_full((h_q,), -math.inf)
    grouped = q.unflatten(0, (h_kv, h_q // h_kv))
    logits = torch.einsum("kgd,nkd->kgn", grouped, k) * scale
    out = torch.einsum("kgn,nkd->kgd", logits.softmax(-1), v)
    return out.flatten(0, 1), logits.logsumexp(-1).flatten(), logits.amax(-1).flatten()


def apply_sink(out: Tensor, lse: Tensor, attn_sink: Tensor | None) -> Tensor:
    """out [h, d] times exp(lse) / (exp(lse) + exp(sink)); a row without keys stays 0."""
    if attn_sink is None or torch.isposinf(lse).all():
        return out
    return out * torch.sigmoid(lse - attn_sink)[:, None]


def paged_keys(kv_cache: Tensor, table: list[int], length: int) -> tuple[Tensor, list[int]]:
    """The keys of one request and their positions; a page outside the pool masks its tokens, and so
    does the end of the table.
    """
    pages, page_size = kv_cache.shape[:2]
    held = range(min(length, len(table) * page_size))
    seen = [j for j in held if 0 <= table[j // page_size] < pages]
    page = torch.tensor([table[j // page_size] for j in seen], dtype=torch.long)
    offset = torch.tensor([j % page_size for j in seen], dtype=torch.long)
    return kv_cache[page, offset], seen


def mla_decode_dense(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    scale: float,
    causal: bool,
    descale_q: Tensor | None = None,
    descale_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [b, s_q, h_q, d], kv_cache [P, page, h_kv, d] -> out [b, s_q, h_q, 512], lse [b, h_q, s_q].

    descale_q and descale_k are [b] or None.
    """
    b, s_q, h_q, _ = q.shape
    out = q.new_zeros(b, s_q, h_q, D_V)
    lse = q.new_full((b, h_q, s_q), math.inf)
    for n in range(b):
        length = int(cache_seqlens[n])
        keys, positions = paged_keys(kv_cache, block_table[n].tolist(), length)
        keys = keys if descale_k is None else keys * descale_k[n]
        for i in range(s_q):
            last = length - s_q + i if causal else length - 1
            visible = keys[: sum(j <= last for j in positions)]
            query = q[n, i] if descale_q is None else q[n, i] * descale_q[n]
            out[n, i], lse[n, :, i], _ = attend(query, visible, visible[..., :D_V], scale)
    return out, lse


def listed_keys(kv: Tensor, indices: Tensor, topk_length: int | None) -> Tensor:
    """kv [N, 1, d] and the entries of one list that count: the leftmost, inside the cache."""
    listed = indices.long()[:topk_length] if topk_length is not None else indices.long()
    return kv[listed[(listed >= 0) & (listed < kv.shape[0])]]


def mla_decode_sparse(
    q: Tensor,
    kv_cache: Tensor,
    indices: Tensor,
    scale: float,
    topk_length: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_kv_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [b, s_q, h_q, d], kv_cache [P, page, 1, d] -> out [b, s_q, h_q, 512], lse [b, h_q, s_q]."""
    b, s_q, h_q, _ = q.shape
    out = q.new_zeros(b, s_q, h_q, D_V)
    lse = q.new_full((b, h_q, s_q), math.inf)
    parts = [(kv_cache, indices, topk_length), (extra_kv_cache, extra_indices, extra_topk_length)]
    for n in range(b):
        for i in range(s_q):
            keys = torch.cat(
                [
                    listed_keys(
                        cache.flatten(0, 1), lists[n, i], None if count is None else int(count[n])
                    )
                    for cache, lists, count in parts
                    if cache is not None and lists is not None
                ]
            )
            row, row_lse, _ = attend(q[n, i], keys, keys[..., :D_V], scale)
            out[n, i], lse[n, :, i] = apply_sink(row, row_lse, attn_sink), row_lse
    return out, lse


def mla_prefill_sparse(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    scale: float,
    topk_length: Tensor | None = None,
    attn_sink: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [s_q, h_q, d], kv [s_kv, 1, d], indices [s_q, 1, topk] -> out, max_logits, lse."""
    s_q, h_q, _ = q.shape
    out = q.new_zeros(s_q, h_q, D_V)
    max_logits, lse = q.new_zeros(s_q, h_q), q.new_zeros(s_q, h_q)
    for i in range(s_q):
        count = None if topk_length is None else int(topk_length[i])
        keys = listed_keys(kv, indices[i, 0], count)
        row, lse[i], max_logits[i] = attend(q[i], keys, keys[..., :D_V], scale)
        out[i] = apply_sink(row, lse[i], attn_sink)
    return out, max_logits, lse


def mha_prefill_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: list[int],
    cu_seqlens_kv: list[int],
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """q [t_q, h, d_qk], k [t_k, h_kv, d_qk], v [t_k, h_kv, d_v] -> out, lse [t_q, h].

    Differentiable: gradients of the operator are those that autograd finds here.
    """
    outs, lses = [], []
    for n in range(len(cu_seqlens_q) - 1):
        q_n = q[cu_seqlens_q[n] : cu_seqlens_q[n + 1]]
        k_n = k[cu_seqlens_kv[n] : cu_seqlens_kv[n + 1]]
        v_n = v[cu_seqlens_kv[n] : cu_seqlens_kv[n + 1]]
        for i in range(len(q_n)):
            seen = max(0, len(k_n) - len(q_n) + i + 1) if causal else len(k_n)
            out, lse, _ = attend(q_n[i], k_n[:seen], v_n[:seen], scale)
            outs.append(out)
            lses.append(lse)
    if not outs:
        return q.new_zeros(0, q.shape[1], v.shape[-1]), q.new_zeros(0, q.shape[1])
    return torch.stack(outs), torch.stack(lses)


def merge_attn_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """out [n, h, d], lse [n, h]; a part whose lse is infinite is empty, whatever its out holds."""
    out, lse = torch.zeros_like(out_a), torch.full_like(lse_a, math.inf)
    for row in range(out_a.shape[0]):
        for head in range(out_a.shape[1]):
            at = (row, head)
            parts = [
                (o[at], float(l[at]))
                for o, l in ((out_a, lse_a), (out_b, lse_b))
                if math.isfinite(l[at])
            ]
            if parts:
                top = max(weight for _, weight in parts)
                total = sum(math.exp(weight - top) for _, weight in parts)
                lse[at] = top + math.log(total)
                out[at] = sum(value * (math.exp(weight - top) / total) for value, weight in parts)
    return out, lse
