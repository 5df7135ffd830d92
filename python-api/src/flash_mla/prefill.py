"""Prefill: token-sparse MLA, and dense multi-head attention over variable-length sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_mla._ops import call, ops, refuse_grad


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token-sparse MLA prefill: query i attends kv[indices[i]] (DeepSeek-V3.2's sparse attention).

    Args:
        q: bfloat16 [s_q, h_q, d_qk], d_qk 576 or 512.
        kv: bfloat16 [s_kv, 1, d_qk]; V is its first 512 columns.
        indices: int32 [s_q, 1, topk]; negative or >= s_kv is skipped.
        sm_scale: multiplies q k^T.
        d_v: 512.
        attn_sink: float32 [h_q]: out is multiplied by exp(lse) / (exp(lse) + exp(sink)).
        topk_length: int32 [s_q], only the leftmost entries of the indices count.
        out: [s_q, h_q, 512], written instead of a new tensor.

    Returns:
        out bfloat16 [s_q, h_q, 512]; max_logits float32 [s_q, h_q], the largest sm_scale * q k;
        lse float32 [s_q, h_q], natural log, without the sink. A row without keys: 0, -inf, +inf.

    Raises:
        ValueError: an argument breaks one of these rules; nothing is written then.
        NotImplementedError: no kernel of this build serves the call on this device.
        RuntimeError: an input requires grad while grad mode is on.
    """
    refuse_grad("flash_mla_sparse_fwd", q, kv, attn_sink)
    args = (q, kv, indices, topk_length, attn_sink, d_v, sm_scale)
    if out is None:
        result, max_logits, lse = call(ops.mla_prefill_sparse.default, *args)
        return result, max_logits, lse
    max_logits, lse = call(ops.mla_prefill_sparse_out.default, *args, out)
    return out, max_logits, lse


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """Dense attention of each sequence, out = softmax(softmax_scale * q k^T) v, with autograd.

    Args:
        q: bfloat16 or float16 [t_q, h_q, d_qk], the sequences one behind the other.
        k: [t_k, h_kv, d_qk]; h_kv divides h_q, query head h reads key head h // (h_q // h_kv).
        v: [t_k, h_kv, d_v]; (d_qk, d_v) is (192, 128) or (128, 128).
        cu_seqlens_qo, cu_seqlens_kv: int32 [n + 1], where the sequences begin and end.
        max_seqlen_qo, max_seqlen_kv: at least the longest sequence.
        dropout_p: 0.
        softmax_scale: default d_qk ** -0.5.
        causal: query i of len_q attends keys j <= len_k - len_q + i (bottom-right aligned).
        deterministic: gradients are bitwise the same from run to run.
        is_varlen: a hint of callers whose sequences all have one length; results are the same.

    Returns:
        out [t_q, h_q, d_v] as q; lse float32 [t_q, h_q] (stored head-major), natural log, not
        differentiable. A row without keys has out 0 and lse +inf.

    Raises:
        ValueError: an argument breaks one of these rules; nothing is written then.
        NotImplementedError: no kernel of this build serves the call on this device.
    """
    if dropout_p != 0.0:
        raise ValueError(
            f"flash_attn_varlen_func: dropout_p must be 0, got {dropout_p}; pass 0: dropout "
            "of attention weights is not offered"
        )
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    lengths = (cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv)
    args = (q, k, v, *lengths, softmax_scale, causal)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = call(ops.mha_prefill_dense_train.default, *args, deterministic)
    else:
        out, lse = call(ops.mha_prefill_dense.default, *args)
    return out, lse


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """`flash_attn_varlen_func` of one tensor [t, h, 2 * head_dim_qk + d_v]: q, k and v columns."""
    return flash_attn_varlen_func(
        qkv[..., :head_dim_qk],
        qkv[..., head_dim_qk : 2 * head_dim_qk],
        qkv[..., 2 * head_dim_qk :],
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        deterministic,
        is_varlen,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """`flash_attn_varlen_func` of q and one tensor [t_k, h_kv, head_dim_qk + d_v]: k, v columns."""
    return flash_attn_varlen_func(
        q,
        kv[..., :head_dim_qk],
        kv[..., head_dim_qk:],
        cu_seqlens_qo,
        cu_seqlens_kv,
        max_seqlen_qo,
        max_seqlen_kv,
        dropout_p,
        softmax_scale,
        causal,
        deterministic,
        is_varlen,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_qo, cu_seqlens_kv, *settings = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_qo, cu_seqlens_kv)
    ctx.settings = settings
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_out: Tensor, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    # Autograd may hand over an expanded gradient (of out.sum(), say): rows that are not contiguous.
    d_q, d_k, d_v = call(
        ops.mha_prefill_dense_backward.default,
        d_out.contiguous(),
        *ctx.saved_tensors,
        *ctx.settings,
    )
    return d_q, d_k, d_v, *(None for _ in range(2 + len(ctx.settings)))


torch.library.register_autograd(
    "flash_mla::mha_prefill_dense_train", _backward, setup_context=_setup_context
)
