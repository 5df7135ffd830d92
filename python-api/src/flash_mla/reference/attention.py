"""Attention over latent vectors and over heads, and its merge."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flash_mla.reference.kv_cache import gather_tokens

_D_V = 512  # columns of a latent vector that are its value

# --------------------------------------------------------------------------------------------------
# Attention of a group of query heads that share one key head
# --------------------------------------------------------------------------------------------------


class _Attended(NamedTuple):
    out: Tensor  # [n_q, g, d_v]
    lse: Tensor  # [n_q, g]
    max_logits: Tensor  # [n_q, g]


def _attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, mask: Tensor) -> _Attended:
    """Attention of n_q queries with g heads each over n_k keys; the equation of this module.

    Args:
        q: [n_q, g, d_qk].
        k: [n_k, d_qk].
        v: [n_k, d_v].
        mask: [n_q, n_k] bool; True where the query attends the key.
    """
    n_q, g, _ = q.shape
    finite = q.isfinite().all() and k.isfinite().all() and v.isfinite().all()
    if not finite and not mask.all():
        # 0 * NaN is NaN: with such data around, give every query the keys it attends and no others.
        rows = []
        for i in range(n_q):
            kept = mask[i].nonzero().squeeze(-1)
            rows.append(
                _attend(q[i : i + 1], k[kept], v[kept], softmax_scale, mask[i : i + 1, kept])
            )
        return _Attended(*(torch.cat(parts) for parts in zip(*rows, strict=True)))

    if n_q == 0 or k.shape[0] == 0:
        return _Attended(
            q.new_zeros(n_q, g, v.shape[-1]),
            q.new_full((n_q, g), math.inf),
            q.new_full((n_q, g), -math.inf),
        )

    logits = softmax_scale * torch.einsum("igd,jd->igj", q, k)
    logits = torch.where(mask[:, None, :], logits, -math.inf)
    max_logits = logits.amax(dim=-1)
    has_keys = mask.any(dim=-1)[:, None]
    # Rows without keys take part with logits of 0, so that neither value nor gradient is inf - inf.
    logits = torch.where(has_keys[..., None], logits, 0.0)
    lse = torch.logsumexp(logits, dim=-1)
    # softmax is exp(logits - lse), without the rounding of a large lse.
    weights = torch.where(mask[:, None, :], torch.softmax(logits, dim=-1), 0.0)
    out = torch.einsum("igj,jd->igd", weights, v)
    return _Attended(out, torch.where(has_keys, lse, math.inf), max_logits)


def _apply_sink(out: Tensor, lse: Tensor, attn_sink: Tensor | None) -> Tensor:
    """out * exp(lse) / (exp(lse) + exp(sink)): a key of zero value whose logit is the sink.

    -inf has no effect, +inf gives 0, and a row without keys stays 0.

    Args:
        out: [n_q, h_q, d_v].
        lse: [n_q, h_q].
        attn_sink: [h_q].
    """
    if attn_sink is None:
        return out
    has_keys = lse != math.inf
    # exp(lse) / (exp(lse) + exp(sink)) = sigmoid(lse - sink), which no finite lse overflows.
    factor = torch.sigmoid(torch.where(has_keys, lse, 0.0) - attn_sink.to(lse))
    return torch.where(has_keys[..., None], out * factor[..., None], 0.0)


def _per_request(descale: Tensor | None, request: int) -> Tensor | float:
    """The factor of one request from a tensor [1] or [b]; None is 1."""
    if descale is None:
        return 1.0
    return descale[0 if descale.numel() == 1 else request].double()


# --------------------------------------------------------------------------------------------------
# Decode
# --------------------------------------------------------------------------------------------------


def mla_decode_dense(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    descale_q: Tensor | None = None,
    descale_k: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Decode attention over a paged latent cache.

    Key j of request b is the vector at offset j % page_size of page block_table[b, j // page_size].
    Query i attends keys j < s_k = cache_seqlens[b] and, when causal, j <= s_k - s_q + i. The tokens
    of a page whose number is negative or >= num_pages are masked. Entries of block_table past the
    last used page are not read.

    Args:
        q: [b, s_q, h_q, d_qk], any floating dtype; d_qk 576 or 512.
        kv_cache: [num_pages, page_size, h_kv, d_qk] bf16, fp16 or float8_e4m3fn (also float32 and
            float64), or [num_pages, page_size, 1, 656] bytes (`v32_fp8`).
        block_table: [b, max_pages] int32.
        cache_seqlens: [b] int32, keys of each request; may be 0.
        softmax_scale: multiplies q . k; d_qk ** -0.5 if None.
        causal: mask as above.
        descale_q: [1] or [b] float32, multiplies q; None is 1.
        descale_k: [1] or [b] float32, multiplies the cache's values; None is 1.
        dtype: of the computation and the results.

    Returns:
        out [b, s_q, h_q, 512] and lse [b, h_q, s_q].
    """
    b, s_q, h_q, d_qk = q.shape
    num_pages, page_size, h_kv = kv_cache.shape[:3]
    scale = d_qk**-0.5 if softmax_scale is None else softmax_scale
    outs, lses = [], []
    for request, s_k in enumerate(cache_seqlens.tolist()):
        key = torch.arange(min(s_k, block_table.shape[1] * page_size), device=kv_cache.device)
        page = block_table[request].to(key)[key // page_size]
        kept = (page >= 0) & (page < num_pages)
        key, page = key[kept], page[kept]
        k = gather_tokens(kv_cache, page, key % page_size, dtype)  # [n_k, h_kv, d_qk]
        k = k * _per_request(descale_k, request)
        queries = q[request].to(dtype) * _per_request(descale_q, request)

        query = torch.arange(s_q, device=key.device)
        mask = (key < s_k).expand(s_q, -1)
        if causal:
            mask = key[None, :] <= s_k - s_q + query[:, None]
        heads = [
            _attend(group, k[:, head], k[:, head, :_D_V], scale, mask)
            for head, group in enumerate(queries.chunk(h_kv, dim=1))
        ]
        outs.append(torch.cat([part.out for part in heads], dim=1))
        lses.append(torch.cat([part.lse for part in heads], dim=1).transpose(0, 1))
    if b == 0:
        return q.new_zeros(0, s_q, h_q, _D_V, dtype=dtype), q.new_zeros(0, h_q, s_q, dtype=dtype)
    return torch.stack(outs), torch.stack(lses)


def mla_decode_sparse(
    q: Tensor,
    kv_cache: Tensor,
    indices: Tensor,
    *,
    softmax_scale: float | None = None,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Decode attention over chosen tokens of a paged cache, and of a second one if given.

    Query i of request b attends the tokens indices[b, i, :topk_length[b]] of the flat cache (page *
    page_size + offset) and extra_indices[b, i, :extra_topk_length[b]] of the extra cache, all in
    one softmax. An index that is negative or not below num_pages * page_size is skipped.

    Args:
        q: [b, s_q, h_q, d_qk], any floating dtype; d_qk 576 or 512.
        kv_cache: [num_pages, page_size, 1, bytes_per_token] of a packed format as uint8, int8 or
            float8_e4m3fn, or [num_pages, page_size, 1, d_qk] bf16, fp16.
        indices: [b, s_q, topk] int32.
        softmax_scale: multiplies q . k; d_qk ** -0.5 if None.
        attn_sink: [h_q] float32; out *= exp(lse) / (exp(lse) + exp(attn_sink)).
        topk_length: [b] int32; only so many leftmost entries count.
        extra_k_cache: as kv_cache, with a page size of its own.
        extra_indices: [b, s_q, extra_topk] int32.
        extra_topk_length: [b] int32.
        dtype: of the computation and the results.

    Returns:
        out [b, s_q, h_q, 512] and lse [b, h_q, s_q]; the sink is not part of lse.
    """
    b, s_q, h_q, d_qk = q.shape
    scale = d_qk**-0.5 if softmax_scale is None else softmax_scale
    sources = [(kv_cache, indices, topk_length)]
    if extra_k_cache is not None:
        assert extra_indices is not None, "extra_k_cache needs extra_indices"
        sources.append((extra_k_cache, extra_indices, extra_topk_length))
    out = q.new_zeros(b, s_q, h_q, _D_V, dtype=dtype)
    lse = q.new_zeros(b, h_q, s_q, dtype=dtype)
    for request in range(b):
        for query in range(s_q):
            parts = []
            for cache, chosen, length in sources:
                num_pages, page_size = cache.shape[:2]
                index = _valid_indices(
                    chosen[request, query],
                    None if length is None else int(length[request]),
                    num_pages * page_size,
                )
                page, offset = index // page_size, index % page_size
                parts.append(gather_tokens(cache, page, offset, dtype)[:, 0])
            k = torch.cat(parts)
            row = q[request, query : query + 1].to(dtype)
            mask = torch.ones(1, k.shape[0], dtype=torch.bool, device=k.device)
            result = _attend(row, k, k[:, :_D_V], scale, mask)
            out[request, query] = _apply_sink(result.out, result.lse, attn_sink)[0]
            lse[request, :, query] = result.lse[0]
    return out, lse


def _valid_indices(indices: Tensor, length: int | None, bound: int) -> Tensor:
    """The leftmost `length` entries of indices [topk] that lie in [0, bound), as int64."""
    if length is not None:
        indices = indices[: max(length, 0)]
    return indices[(indices >= 0) & (indices < bound)].long()


# --------------------------------------------------------------------------------------------------
# Prefill
# --------------------------------------------------------------------------------------------------


def mla_prefill_sparse(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    *,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each query over its own choice of latent vectors.

    Query i attends kv[indices[i, 0, :topk_length[i]]]; an index that is negative or >= s_kv is
    skipped. Causality is a matter of the indices.

    Args:
        q: [s_q, h_q, d_qk], any floating dtype; d_qk 576 or 512.
        kv: [s_kv, 1, d_qk].
        indices: [s_q, 1, topk] int32.
        sm_scale: multiplies q . k.
        attn_sink: [h_q] float32; out *= exp(lse) / (exp(lse) + exp(attn_sink)).
        topk_length: [s_q] int32; only so many leftmost entries count.
        dtype: of the computation and the results.

    Returns:
        out [s_q, h_q, 512], max_logits [s_q, h_q] (largest scaled logit), lse [s_q, h_q]; the sink
        is part of neither max_logits nor lse.
    """
    s_q, h_q, _ = q.shape
    out = q.new_zeros(s_q, h_q, _D_V, dtype=dtype)
    max_logits = q.new_zeros(s_q, h_q, dtype=dtype)
    lse = q.new_zeros(s_q, h_q, dtype=dtype)
    for query in range(s_q):
        length = None if topk_length is None else int(topk_length[query])
        k = kv[_valid_indices(indices[query, 0], length, kv.shape[0]), 0].to(dtype)
        mask = torch.ones(1, k.shape[0], dtype=torch.bool, device=k.device)
        result = _attend(q[query : query + 1].to(dtype), k, k[:, :_D_V], sm_scale, mask)
        out[query] = _apply_sink(result.out, result.lse, attn_sink)[0]
        max_logits[query] = result.max_logits[0]
        lse[query] = result.lse[0]
    return out, max_logits, lse


def mha_prefill_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Multi-head attention over sequences of different lengths, stored one after the other.

    Sequence n owns rows cu_seqlens_qo[n] to cu_seqlens_qo[n + 1] of q and, by cu_seqlens_kv, its
    rows of k and v. Query i of len_q attends key j of len_k when not causal, or when
    j <= len_k - len_q + i (the last query attends all keys). Gradients come from autograd.

    Args:
        q: [t_q, h_q, d_qk], any floating dtype.
        k: [t_k, h_kv, d_qk].
        v: [t_k, h_kv, d_v].
        cu_seqlens_qo: [n + 1] int32, starts with 0, never falls, ends with t_q.
        cu_seqlens_kv: [n + 1] int32.
        softmax_scale: multiplies q . k; d_qk ** -0.5 if None.
        causal: mask as above.
        dtype: of the computation and the results.

    Returns:
        out [t_q, h_q, d_v] and lse [t_q, h_q].
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    h_kv = k.shape[1]
    bounds_q, bounds_kv = cu_seqlens_qo.tolist(), cu_seqlens_kv.tolist()
    outs = [q.new_zeros(0, q.shape[1], v.shape[-1], dtype=dtype)]
    lses = [q.new_zeros(0, q.shape[1], dtype=dtype)]
    for n in range(len(bounds_q) - 1):
        q_n = q[bounds_q[n] : bounds_q[n + 1]].to(dtype)
        k_n = k[bounds_kv[n] : bounds_kv[n + 1]].to(dtype)
        v_n = v[bounds_kv[n] : bounds_kv[n + 1]].to(dtype)
        len_q, len_k = q_n.shape[0], k_n.shape[0]
        mask = torch.ones(len_q, len_k, dtype=torch.bool, device=q.device)
        if causal:
            mask = mask.tril(diagonal=len_k - len_q)
        # One key head at a time: the logits of all heads at once would not fit for long sequences.
        heads = [
            _attend(group, k_n[:, head], v_n[:, head], scale, mask)
            for head, group in enumerate(q_n.chunk(h_kv, dim=1))
        ]
        outs.append(torch.cat([part.out for part in heads], dim=1))
        lses.append(torch.cat([part.lse for part in heads], dim=1))
    return torch.cat(outs), torch.cat(lses)


# --------------------------------------------------------------------------------------------------
# Merging
# --------------------------------------------------------------------------------------------------


def merge_attn_states(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the results over each.

        lse = ln(exp(lse_a) + exp(lse_b))
        out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

    A part whose lse is +inf or -inf is empty and its out is not read. Two empty parts give out = 0
    and lse = +inf.

    Args:
        out_a, out_b: [..., d], any floating dtype.
        lse_a, lse_b: the shape of out without its last dimension; natural log.
        dtype: of the computation and the results.

    Returns:
        out [..., d] and lse [...].
    """
    lse_a, lse_b = lse_a.to(dtype), lse_b.to(dtype)
    empty_a, empty_b = lse_a.isinf(), lse_b.isinf()
    # An empty part takes part with an lse of 0 and is then not chosen: no inf - inf, no NaN
    # gradient.
    lse_a, lse_b = torch.where(empty_a, 0.0, lse_a), torch.where(empty_b, 0.0, lse_b)
    lse = torch.logaddexp(lse_a, lse_b)
    lse = torch.where(empty_a, lse_b, torch.where(empty_b, lse_a, lse))
    # exp(lse_a - lse) = sigmoid(lse_a - lse_b), without the rounding of a large lse.
    weight_a = torch.where(empty_b, 1.0, torch.sigmoid(lse_a - lse_b))
    weight_b = torch.where(empty_a, 1.0, torch.sigmoid(lse_b - lse_a))
    part_a = weight_a[..., None] * torch.where(empty_a[..., None], 0.0, out_a.to(dtype))
    part_b = weight_b[..., None] * torch.where(empty_b[..., None], 0.0, out_b.to(dtype))
    return part_a + part_b, torch.where(empty_a & empty_b, math.inf, lse)
