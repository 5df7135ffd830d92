"""MLA decode over a paged KV cache, dense and token-sparse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_mla._ops import ops, raise_tagged, refuse_grad

# Looked up once: at each call it would take half a microsecond.
_DENSE, _DENSE_OUT = ops.mla_decode_dense.default, ops.mla_decode_dense_out.default
_SPARSE, _SPARSE_OUT = ops.mla_decode_sparse.default, ops.mla_decode_sparse_out.default

# Metadata tensors have this many int32 a row, as engines expect.
_METADATA_COLUMNS = 8
# Rows of ours: never 1, which asks for batch invariance.
_MIN_METADATA_ROWS = 2
# Query heads of a CTA, for the number of rows on a GPU.
_HEADS_PER_CTA = 64


@dataclass
class FlashMLASchedMeta:
    """Scheduling metadata of a decode call. Engines hold one for each shape and may read or assign
    its tensors; the kernels plan on the device at each launch and need nothing of it.
    """

    @dataclass
    class Config:
        """The shapes of the first call that this metadata was passed to."""

        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool
        is_fp8_kvcache: bool
        topk: int | None
        extra_page_block_size: int | None
        extra_topk: int | None

    tile_scheduler_metadata: Tensor | None = None
    num_splits: Tensor | None = None
    have_initialized: bool = False
    config: Config | None = None


def _metadata_tensors(
    b: int, num_q_tokens_per_head_k: int, num_heads_k: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Tensors of the shapes that engines allocate for: the first does not depend on the batch."""
    rows = _MIN_METADATA_ROWS
    if device.type == "cuda":
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        ctas_per_request = num_heads_k * -(-num_q_tokens_per_head_k // _HEADS_PER_CTA)
        rows = max(rows, sms // ctas_per_request)
    metadata = torch.zeros((rows, _METADATA_COLUMNS), dtype=torch.int32, device=device)
    # One split each: a valid plan, which the kernels replace by a better one at each launch.
    splits = torch.arange(b + 1, dtype=torch.int32, device=device)
    return metadata, splits


def get_mla_metadata(
    cache_seqlens: Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[Any, Tensor | None]:
    """Scheduling metadata for `flash_mla_with_kvcache`, in each form that engines call.

    Args:
        cache_seqlens: int32 [b], keys of each request. Left out (the newest form): the result is
            `(FlashMLASchedMeta(), None)`.
        num_q_tokens_per_head_k: s_q * h_q // h_kv.
        num_heads_k: h_kv.
        num_heads_q, is_fp8_kvcache, topk: of the call that follows; they change nothing, since
            scheduling is done on the device at each launch.

    Returns:
        (int32 [num_sm_parts, 8], int32 [b + 1]). The first shape depends on the device, on
        num_q_tokens_per_head_k and num_heads_k, not on b. The contents are opaque.

    Raises:
        ValueError: cache_seqlens without the two counts, or counts below 1.
    """
    if cache_seqlens is None:
        return FlashMLASchedMeta(), None
    if (
        not num_q_tokens_per_head_k
        or not num_heads_k
        or min(num_q_tokens_per_head_k, num_heads_k) < 1
    ):
        raise ValueError(
            "get_mla_metadata: num_q_tokens_per_head_k and num_heads_k must be at least 1, got "
            f"{num_q_tokens_per_head_k} and {num_heads_k}; pass both counts with cache_seqlens, or "
            "call it without arguments"
        )
    return _metadata_tensors(
        cache_seqlens.shape[0], num_q_tokens_per_head_k, num_heads_k, cache_seqlens.device
    )


def _initialize(meta: FlashMLASchedMeta, config: FlashMLASchedMeta.Config, q: Tensor) -> None:
    """Fills what the caller has not assigned, at the first call."""
    heads_k = max(config.h_k, 1)
    q_tokens = max(config.s_q * config.h_q // heads_k, 1)
    metadata, splits = _metadata_tensors(config.b, q_tokens, heads_k, q.device)
    if meta.tile_scheduler_metadata is None:
        meta.tile_scheduler_metadata = metadata
    if meta.num_splits is None:
        meta.num_splits = splits
    meta.config = config
    meta.have_initialized = True


def _require_absent(rule: str, **arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ValueError(
                f"flash_mla_with_kvcache: {name} must be left out {rule}, "
                f"got {type(value).__name__}; see the docstring for the two kinds of call"
            )


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | Tensor | None,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    *,
    descale_q: Tensor | None = None,
    descale_k: Tensor | None = None,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """MLA decode: softmax(softmax_scale * q k^T) v over a paged cache whose tokens hold K, and V
    in K's first 512 columns (DeepSeek-V2, arXiv:2405.04434, with absorbed projections). With
    `indices`, each query attends the tokens it names (DeepSeek Sparse Attention).

    Args:
        q: [b, s_q, h_q, d_qk], d_qk 576 or 512. bfloat16; float16 with a float16 cache;
            float8_e4m3fn with an fp8 cache. Strides are free but for the last; rows are 16-byte
            aligned.
        k_cache: [num_pages, page_size, h_kv, d_qk], or [num_pages, page_size, 1, bytes_per_token]
            for packed formats. Its dtype and last dimension tell the format (`kv_format`).
        block_table: int32 [b, max_pages], the pages of each request; entries past its last page
            may be anything. Not used, and may be None, with `indices`.
        cache_seqlens: int32 [b], keys of each request, 0 included. Not used, and may be None, with
            `indices`.
        head_dim_v: 512.
        tile_scheduler_metadata, num_splits: from `get_mla_metadata`, in any of its forms, or None.
            Only the first dimension of the metadata has a meaning: 1 asks for batch_invariant.
        softmax_scale: multiplies q k^T; default d_qk ** -0.5.
        causal: query i of s_q attends keys j <= cache_seqlens - s_q + i. Dense only.
        is_fp8_kvcache: may be True with a float8 or packed cache; the cache's dtype decides.
        indices: int32 [b, s_q, topk], flat positions page * page_size + offset; -1 or anything
            outside the cache is skipped.
        attn_sink: float32 [h_q], sparse only: out is multiplied by
            exp(lse) / (exp(lse) + exp(sink)); lse leaves it out.
        extra_k_cache, extra_indices_in_kvcache: a second cache and its indices
            [b, s_q, extra_topk], attended in the same softmax. Sparse only.
        topk_length, extra_topk_length: int32 [b], only the leftmost entries of the indices count.
        descale_q, descale_k: float32 [1] or [b], dense only: the values of q and of the cache are
            their elements times this; None is 1.
        out: [b, s_q, h_q, 512], written instead of a new tensor.
        batch_invariant: a request's result is bitwise the same whatever else is in the batch.

    Returns:
        out [b, s_q, h_q, 512], float16 for float16 caches and else bfloat16; lse float32
        [b, h_q, s_q], natural log. A row without keys has out 0 and lse +inf.

    Raises:
        ValueError: an argument breaks one of these rules; nothing is written then.
        NotImplementedError: no kernel of this build serves the call on this device.
        RuntimeError: an input requires grad while grad mode is on.
    """
    refuse_grad(
        "flash_mla_with_kvcache", q, k_cache, extra_k_cache, attn_sink, descale_q, descale_k
    )
    if is_fp8_kvcache and k_cache.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            "flash_mla_with_kvcache: is_fp8_kvcache must be False with this k_cache, got True and "
            f"{k_cache.dtype}; the cache's dtype decides its format"
        )
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5

    metadata = tile_scheduler_metadata
    if isinstance(metadata, FlashMLASchedMeta):
        if not metadata.have_initialized and q.dim() == 4 and k_cache.dim() == 4:
            config = FlashMLASchedMeta.Config(
                b=q.shape[0],
                s_q=q.shape[1],
                h_q=q.shape[2],
                page_block_size=k_cache.shape[1],
                h_k=k_cache.shape[2],
                causal=causal,
                is_fp8_kvcache=k_cache.dtype not in (torch.bfloat16, torch.float16),
                topk=None if indices is None else indices.shape[-1],
                extra_page_block_size=None if extra_k_cache is None else extra_k_cache.shape[1],
                extra_topk=None
                if extra_indices_in_kvcache is None
                else extra_indices_in_kvcache.shape[-1],
            )
            _initialize(metadata, config, q)
        metadata = metadata.tile_scheduler_metadata
    if metadata is not None and metadata.shape[0] == 1:
        batch_invariant = True

    args: tuple[Any, ...]
    if indices is None:
        if (
            attn_sink is not None
            or extra_k_cache is not None
            or extra_indices_in_kvcache is not None
            or topk_length is not None
            or extra_topk_length is not None
        ):
            _require_absent(
                "without indices",
                attn_sink=attn_sink,
                extra_k_cache=extra_k_cache,
                extra_indices_in_kvcache=extra_indices_in_kvcache,
                topk_length=topk_length,
                extra_topk_length=extra_topk_length,
            )
        if block_table is None or cache_seqlens is None:
            name = "block_table" if block_table is None else "cache_seqlens"
            raise ValueError(
                f"flash_mla_with_kvcache: {name} must be an int32 tensor without indices, got "
                "None; pass it, or pass indices for sparse attention"
            )
        op, op_out = _DENSE, _DENSE_OUT
        args = (
            q, k_cache, block_table, cache_seqlens, descale_q, descale_k,
            head_dim_v, softmax_scale, causal, batch_invariant,
        )  # fmt: skip
    else:
        if causal or descale_q is not None or descale_k is not None:
            _require_absent("with indices", causal=causal, descale_q=descale_q, descale_k=descale_k)
        op, op_out = _SPARSE, _SPARSE_OUT
        args = (
            q, k_cache, indices, topk_length, attn_sink,
            extra_k_cache, extra_indices_in_kvcache, extra_topk_length,
            head_dim_v, softmax_scale, batch_invariant,
        )  # fmt: skip
    try:
        if out is None:
            return op(*args)
        return out, op_out(*args, out)
    except RuntimeError as error:
        raise_tagged(error)
        raise
