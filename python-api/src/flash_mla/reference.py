"""The written definition of each operator, in plain PyTorch.

These functions say what the kernels must compute. They run on any device, need nothing but torch,
take the same inputs as the operators and return results in `dtype` (default float64). They are
written to be read and to be compared with, not to be fast: requests, and where it is simpler
queries, are looped over.

Attention over latent vectors. For one query head q and the key vectors k_j that it attends, with
v_j the first 512 columns of k_j (multi-head attention has a v of its own):

    logit_j = softmax_scale * (q . k_j)
    lse     = ln sum_j exp(logit_j)
    out     = sum_j exp(logit_j - lse) v_j

MLA with absorbed weights is multi-query attention over the cached latent: q and k_j have 576
columns, 512 of them without position (NoPE) and 64 with rotary embedding (RoPE).
Source: DeepSeek-V2, arXiv:2405.04434, section 2.1. Attending chosen tokens only is DeepSeek Sparse
Attention; source: DeepSeek-V3.2 technical report, arXiv:2512.02556.

Rules that hold everywhere:

- Logits, `lse` and `max_logits` are natural-log quantities of the scaled logits.
- A row without keys has out = 0, lse = +inf and max_logits = -inf.
- Data that is masked, past the end, on an unused page or behind an invalid index is never read, so
  NaN or Inf there reaches no result: keys are selected first and multiplied afterwards.
- A query may name a token twice; it then counts twice.
- Query head h reads key head h // (h_q / h_kv).

Results are differentiable with respect to floating-point q, k, v and unquantised caches.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "kv_cache_format",
    "kv_cache_pack",
    "kv_cache_unpack",
    "merge_attn_states",
    "mha_prefill_dense",
    "mla_decode_dense",
    "mla_decode_sparse",
    "mla_prefill_sparse",
]

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
        k = _gather_tokens(kv_cache, page, key % page_size, dtype)  # [n_k, h_kv, d_qk]
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
                parts.append(_gather_tokens(cache, page, offset, dtype)[:, 0])
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


# --------------------------------------------------------------------------------------------------
# KV-cache formats
#
# name       d_qk       bytes of a token, in order
# bf16       576, 512   d_qk bfloat16
# fp16       576, 512   d_qk float16
# fp8        576, 512   d_qk e4m3; one scale for the whole cache, kept outside of it
# v32_fp8    576        512 e4m3 NoPE | 4 float32 scales, one per 128 | 64 bfloat16 RoPE   = 656
# v4_fp8     512        448 e4m3 NoPE | 64 bfloat16 RoPE                                   = 576
#                       and, behind all tokens of the page, 7 ue8m0 scales, one per 64 | 1 pad
# v41_fp8    512        512 e4m3 | 16 ue8m0 scales, one per 32                             = 528
# v41_fp4    512        512 e2m1, the even-indexed one of two in the low nibble
#                       | 32 e4m3 scales, one per 16                                       = 288
#
# value = stored value * scale. e4m3 is OCP float8_e4m3fn, ue8m0 is 2^(byte - 127).
# A v4_fp8 cache has the shape [num_pages, page_size, 1, 584] and stride(0) a multiple of 576 bytes;
# what a page holds is the 584 * page_size bytes at its start, so [..., 584] is no token.
# --------------------------------------------------------------------------------------------------

_E4M3 = torch.float8_e4m3fn
_E4M3_MAX = 448.0
_E2M1_MAX = 6.0
_MIN_E4M3_TILE_SCALE = 1e-4  # keeps the scale of an all-zero tile away from 0
_MIN_E2M1_TILE_SCALE = 2.0**-6  # the smallest normal e4m3

_PLAIN_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": _E4M3,
}
_BYTES_PER_TOKEN = {"v32_fp8": 656, "v4_fp8": 584, "v41_fp8": 528, "v41_fp4": 288}
_PACKED_D_QK = {"v32_fp8": 576, "v4_fp8": 512, "v41_fp8": 512, "v41_fp4": 512}
_V4_TOKEN_BYTES = 576  # of the 584: the part that is not scales
_V4_PAGE_ALIGN_BYTES = 576


def kv_cache_format(cache: Tensor) -> str:
    """The format of a cache, from its dtype and last dimension.

    Args:
        cache: [num_pages, page_size, h_kv, d_qk or bytes_per_token].

    Returns:
        One of bf16, fp16, fp8, v32_fp8, v4_fp8, v41_fp8, v41_fp4.

    Raises:
        ValueError: no format looks like that.
    """
    if cache.dtype in (torch.bfloat16, torch.float16):
        return "bf16" if cache.dtype == torch.bfloat16 else "fp16"
    if cache.dtype in (torch.uint8, torch.int8, _E4M3):
        for name, bytes_per_token in _BYTES_PER_TOKEN.items():
            if cache.shape[-1] == bytes_per_token:
                return name
        if cache.dtype == _E4M3 and cache.shape[-1] in (512, 576):
            return "fp8"
    raise ValueError(
        f"kv_cache_format: no format has dtype {cache.dtype} and last dimension {cache.shape[-1]}"
    )


def kv_cache_pack(kv: Tensor, format: str, *, scale: Tensor | float | None = None) -> Tensor:
    """Quantises latent vectors into a cache of the given format.

    The scale of a tile of e4m3 values is the smallest power of two >= max(amax / 448, 1e-4). The
    scale of a tile of e2m1 values is amax / 6 rounded up to e4m3, at least 2^-6 and at most 448.
    Values are divided by their scale, clamped to the range of the stored type and rounded to
    nearest, ties to even.

    Args:
        kv: [num_pages, page_size, h_kv, d_qk] bf16, fp16 or float32, finite; h_kv 1 in the packed
            formats; d_qk 576 for v32_fp8, 512 for v4_fp8, v41_fp8 and v41_fp4, either for the rest.
        format: bf16, fp16, fp8, v32_fp8, v4_fp8, v41_fp8 or v41_fp4.
        scale: of a cache in format fp8 (its descale_k), one number; None is 1.

    Returns:
        [num_pages, page_size, h_kv, d_qk] bfloat16, float16 or float8_e4m3fn, or
        [num_pages, page_size, 1, bytes_per_token] uint8.

    Raises:
        ValueError: unknown format, a shape that it does not have, or a scale that it does not take.
    """
    if scale is not None and format != "fp8":
        raise ValueError(f"kv_cache_pack: scale is for format fp8, not for {format}")
    if format in _PLAIN_DTYPES:
        if format == "fp8":
            return _to_e4m3(kv.float() / (1.0 if scale is None else scale))
        return kv.to(_PLAIN_DTYPES[format])
    if format not in _PACKED_D_QK:
        raise ValueError(f"kv_cache_pack: unknown format {format!r}")
    h_kv, d_qk = kv.shape[2:]
    if h_kv != 1 or d_qk != _PACKED_D_QK[format]:
        raise ValueError(
            f"kv_cache_pack: format {format} takes [num_pages, page_size, 1, "
            f"{_PACKED_D_QK[format]}], got {list(kv.shape)}"
        )
    if format == "v32_fp8":
        nope, rope = kv.split([512, 64], dim=-1)
        values, scales = _quantise_e4m3(nope, tile=128)
        fields = [values, scales.float().view(torch.uint8), _to_bf16_bytes(rope)]
    elif format == "v4_fp8":
        return _pack_v4(kv)
    elif format == "v41_fp8":
        values, scales = _quantise_e4m3(kv, tile=32)
        fields = [values, _to_ue8m0_bytes(scales)]
    else:
        fields = list(_quantise_e2m1(kv, tile=16))
    return torch.cat(fields, dim=-1)


def kv_cache_unpack(
    cache: Tensor,
    format: str | None = None,
    *,
    scale: Tensor | float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The latent vectors that a cache stands for.

    Args:
        cache: [num_pages, page_size, h_kv, d_qk or bytes_per_token]; packed formats as uint8, int8
            or float8_e4m3fn. The last dimension is contiguous, other strides are free (v4_fp8: only
            that of pages).
        format: bf16, fp16, fp8, v32_fp8, v4_fp8, v41_fp8 or v41_fp4; known from the cache if None.
        scale: of a cache in format fp8 (its descale_k), one number; None is 1.
        dtype: of the result. Products of values and scales are formed in float64 and rounded once.

    Returns:
        [num_pages, page_size, h_kv, d_qk].

    Raises:
        ValueError: unknown format, a shape that it does not have, or a scale that it does not take.
    """
    format = kv_cache_format(cache) if format is None else format
    if scale is not None and format != "fp8":
        raise ValueError(f"kv_cache_unpack: scale is for format fp8, not for {format}")
    if format in _PLAIN_DTYPES:
        values = cache.view(_PLAIN_DTYPES[format])
        return values.to(dtype) if scale is None else (values.double() * scale).to(dtype)
    if cache.shape[-1] != _BYTES_PER_TOKEN.get(format):
        raise ValueError(
            f"kv_cache_unpack: format {format} does not have {cache.shape[-1]} bytes a token"
        )
    return _dequantise(format, *_fields(cache, format), dtype)


def _gather_tokens(cache: Tensor, page: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """Token vectors [n, h_kv, d_qk] at (page [n], offset [n]); reads no other token."""
    if cache.dtype in (torch.float32, torch.float64):
        return cache[page, offset].to(dtype)
    format = kv_cache_format(cache)
    if format == "fp8":
        return cache.view(torch.uint8)[page, offset].view(_E4M3).to(dtype)
    if format in _PLAIN_DTYPES:
        return cache[page, offset].to(dtype)
    tokens, scales = _fields(cache, format)
    return _dequantise(format, tokens[page, offset], scales[page, offset], dtype)


def _fields(cache: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Views of a packed cache as bytes: of tokens [P, page, 1, n] without scales, and of scales.

    For v32_fp8 the scales lie between NoPE and RoPE, and the token is all 656 bytes.
    """
    raw = cache.view(torch.uint8)
    if format == "v32_fp8":
        return raw, raw[..., 512:528]
    if format == "v41_fp8":
        return raw[..., :512], raw[..., 512:]
    if format == "v41_fp4":
        return raw[..., :256], raw[..., 256:]
    # v4_fp8: only stride(0) is free, so the page's bytes are its elements in order.
    page_size = raw.shape[1]
    pages = raw.flatten(1)
    tokens = pages[:, : page_size * _V4_TOKEN_BYTES].unflatten(1, (page_size, 1, _V4_TOKEN_BYTES))
    scales = pages[:, page_size * _V4_TOKEN_BYTES :].unflatten(1, (page_size, 1, 8))
    return tokens, scales[..., :7]


def _dequantise(format: str, tokens: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors [..., d_qk] from the bytes that _fields names."""
    if format == "v32_fp8":
        nope = _scaled(_from_bytes(tokens[..., :512], _E4M3), _from_bytes(scales, torch.float32))
        rope = _from_bytes(tokens[..., 528:], torch.bfloat16)
        return torch.cat([nope, rope], dim=-1).to(dtype)
    if format == "v4_fp8":
        nope = _scaled(_from_bytes(tokens[..., :448], _E4M3), _from_ue8m0_bytes(scales))
        rope = _from_bytes(tokens[..., 448:], torch.bfloat16)
        return torch.cat([nope, rope], dim=-1).to(dtype)
    if format == "v41_fp8":
        return _scaled(_from_bytes(tokens, _E4M3), _from_ue8m0_bytes(scales)).to(dtype)
    # v41_fp4
    nibbles = torch.stack([tokens & 0xF, tokens >> 4], dim=-1).flatten(-2)
    values = torch.tensor(_E2M1_VALUES, dtype=torch.float64, device=tokens.device)
    magnitude = values[(nibbles & 0x7).long()]
    signed = torch.where(nibbles >= 8, -magnitude, magnitude)
    return _scaled(signed, _from_bytes(scales, _E4M3)).to(dtype)


def _pack_v4(kv: Tensor) -> Tensor:
    num_pages, page_size = kv.shape[:2]
    nope, rope = kv.split([448, 64], dim=-1)
    values, scales = _quantise_e4m3(nope, tile=64)
    page_bytes = page_size * _BYTES_PER_TOKEN["v4_fp8"]
    padded_bytes = -(-page_bytes // _V4_PAGE_ALIGN_BYTES) * _V4_PAGE_ALIGN_BYTES
    pages = torch.zeros(num_pages, padded_bytes, dtype=torch.uint8, device=kv.device)
    cache = pages[:, :page_bytes].unflatten(1, (page_size, 1, _BYTES_PER_TOKEN["v4_fp8"]))
    tokens_view, scales_view = _fields(cache, "v4_fp8")
    tokens_view.copy_(torch.cat([values, _to_bf16_bytes(rope)], dim=-1))
    scales_view.copy_(_to_ue8m0_bytes(scales))
    return cache


def _scaled(values: Tensor, scales: Tensor) -> Tensor:
    """values [..., d] times scales [..., d / tile], each for its tile, exactly."""
    tile = values.shape[-1] // scales.shape[-1]
    return values * scales.repeat_interleave(tile, dim=-1)


def _from_bytes(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [..., n] read as dtype and widened to float64."""
    # Copied first: a view as a wider type needs an alignment that a slice of bytes may not have.
    return raw.clone(memory_format=torch.contiguous_format).view(dtype).to(torch.float64)


def _from_ue8m0_bytes(raw: Tensor) -> Tensor:
    return _from_bytes(raw, torch.float8_e8m0fnu)


def _to_ue8m0_bytes(scales: Tensor) -> Tensor:
    """Powers of two as exponent + 127."""
    exponent = torch.frexp(scales).exponent  # scale = 0.5 * 2^exponent
    return (exponent - 1 + 127).to(torch.uint8)


def _to_bf16_bytes(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).contiguous().view(torch.uint8)


def _to_e4m3(values: Tensor) -> Tensor:
    return values.clamp(-_E4M3_MAX, _E4M3_MAX).to(_E4M3)


def _quantise_e4m3(values: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Bytes of e4m3 values [..., d], and their scales [..., d / tile] as float64."""
    tiles = values.double().unflatten(-1, (-1, tile))
    least = (tiles.abs().amax(dim=-1) / _E4M3_MAX).clamp_min(_MIN_E4M3_TILE_SCALE)
    mantissa, exponent = torch.frexp(least)  # mantissa in [0.5, 1), 0.5 for a power of two
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    scales = torch.ldexp(torch.ones_like(least), exponent)
    quantised = _to_e4m3(tiles / scales[..., None])
    return quantised.flatten(-2).view(torch.uint8), scales


_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; bit 3 is the sign


def _quantise_e2m1(values: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Bytes of e2m1 values [..., d / 2], and bytes of their e4m3 scales [..., d / tile]."""
    tiles = values.double().unflatten(-1, (-1, tile))
    # Positive e4m3 numbers grow with their code; 0x7e is 448, 0x7f is NaN.
    e4m3 = torch.arange(0x7F, dtype=torch.uint8, device=values.device).view(_E4M3).double()
    least = (tiles.abs().amax(dim=-1) / _E2M1_MAX).clamp(_MIN_E2M1_TILE_SCALE, _E4M3_MAX)
    scale_codes = torch.searchsorted(e4m3, least)  # the first number >= least
    scaled = tiles / e4m3[scale_codes][..., None]

    # The code of a magnitude is how many midpoints between neighbours it has passed. A magnitude on
    # a midpoint goes to the even code, which is the upper one if the lower is odd.
    magnitude = scaled.abs()
    codes = torch.zeros_like(magnitude, dtype=torch.uint8)
    for lower, (a, b) in enumerate(itertools.pairwise(_E2M1_VALUES)):
        midpoint = (a + b) / 2
        codes += magnitude >= midpoint if lower % 2 else magnitude > midpoint
    codes = (codes + 8 * scaled.signbit().to(torch.uint8)).flatten(-2)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scale_codes.to(torch.uint8)
