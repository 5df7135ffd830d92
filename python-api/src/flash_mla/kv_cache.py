"""KV-cache formats: allocating caches, packing latents into them, reading them back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache as memoize

import torch
from torch import Tensor

from flash_mla._ops import call, ops, refuse_grad

_PLAIN_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class KvFormat:
    """The layout of a cache format, from the native library's definition (kv_format.h).

    d_qk, d_nope, bytes_per_token and scale_tile are 0 where the format does not fix them: plain
    formats hold d_qk values of the cache's dtype. A page's bytes are a multiple of
    page_align_bytes.
    """

    name: str
    d_qk: int
    d_nope: int
    bytes_per_token: int
    scale_tile: int
    page_align_bytes: int


@memoize
def _formats() -> dict[str, KvFormat]:
    formats = {}
    for line in ops.build_info():
        key, _, value = line.partition("=")
        if key == "kv_format":
            name, *numbers = value.split(",")
            formats[name] = KvFormat(name, *map(int, numbers))
    return formats


def kv_format(format: str | Tensor) -> KvFormat:
    """The format of that name, or of a cache tensor (told by its dtype and last dimension).

    Raises:
        ValueError: no such name, or a tensor that is no cache.
    """
    name = call(ops.kv_cache_format.default, format) if isinstance(format, Tensor) else format
    if name not in _formats():
        raise ValueError(
            f"kv_format: format must be one of {', '.join(_formats())}, got {name!r}; "
            "use one of them, or pass a cache"
        )
    return _formats()[name]


def kv_cache_empty(
    format: str,
    num_pages: int,
    page_size: int,
    *,
    num_heads_k: int = 1,
    d_qk: int = 576,
    device: torch.device | str | None = None,
) -> Tensor:
    """A cache of zeros in a format.

    Args:
        format: bf16, fp16, fp8, v32_fp8, v4_fp8, v41_fp8 or v41_fp4.
        num_heads_k, d_qk: of the plain formats (bf16, fp16, fp8); packed ones have one head and
            their own width.

    Returns:
        [num_pages, page_size, num_heads_k, d_qk] bfloat16, float16 or float8_e4m3fn, or
        [num_pages, page_size, 1, bytes_per_token] uint8, a page's bytes rounded up to
        page_align_bytes.
    """
    return _new_cache(format, num_pages, page_size, num_heads_k, d_qk, device, zeros=True)


def _new_cache(
    format: str,
    num_pages: int,
    page_size: int,
    num_heads_k: int,
    d_qk: int,
    device: torch.device | str | None,
    *,
    zeros: bool,
) -> Tensor:
    """Without `zeros` only what no token covers is 0: the padding of pages."""
    layout = kv_format(format)
    allocate = torch.zeros if zeros else torch.empty
    if format in _PLAIN_DTYPES:
        shape = (num_pages, page_size, num_heads_k, d_qk)
        return allocate(shape, dtype=_PLAIN_DTYPES[format], device=device)
    if num_heads_k != 1:
        raise ValueError(
            f"kv_cache_empty: num_heads_k must be 1 in format {format}, got {num_heads_k}; "
            "leave it out: MLA shares one latent among all query heads"
        )
    token_bytes = layout.bytes_per_token
    used_bytes = page_size * token_bytes
    page_bytes = -(-used_bytes // layout.page_align_bytes) * layout.page_align_bytes
    pages = allocate((num_pages, page_bytes), dtype=torch.uint8, device=device)
    if page_bytes > used_bytes and not zeros:
        pages[:, used_bytes:] = 0
    shape = (num_pages, page_size, 1, token_bytes)
    return pages.as_strided(shape, (page_bytes, token_bytes, token_bytes, 1))


def _all_slots(count: int, device: torch.device) -> Tensor:
    """0, 1, .. count - 1, in as few bytes as will do."""
    dtype = torch.int32 if count < 2**31 else torch.int64
    return torch.arange(count, dtype=dtype, device=device)


def kv_cache_append(
    kv: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    format: str | None = None,
    *,
    scale: Tensor | None = None,
) -> None:
    """Writes tokens into a cache: cache[slot_mapping[t]] = quantise(kv[t]).

    Scales of e4m3 tiles are the smallest power of two >= max(amax / 448, 1e-4); of e2m1 tiles,
    amax / 6 rounded up to e4m3 and at least 2^-6. RoPE columns are kept in bfloat16. A NaN counts
    for no amax; it stays NaN, without its sign and payload unless kv and cache have one dtype, and
    becomes +-6 in e2m1. An e4m3 tile with an infinity is read back as NaN.

    Args:
        kv: bfloat16, float16 or float32 [n, h_kv, d_qk].
        cache: as `kv_cache_empty` gives; changed in place.
        slot_mapping: int64 or int32 [n], page * page_size + offset, distinct; negative or past the
            cache: the token is skipped.
        format: default: that of `cache`.
        scale: float32 [1], for fp8: the cache holds kv / scale (its descale_k is `scale`).

    Raises:
        ValueError: an argument breaks one of these rules; nothing is written then.
        NotImplementedError: no kernel of this build serves the call on this device.
    """
    refuse_grad("kv_cache_append", kv)
    name = kv_format(cache).name if format is None else format
    call(ops.kv_cache_append_.default, kv, cache, slot_mapping, name, scale)


def kv_cache_pack(kv: Tensor, format: str, *, scale: Tensor | None = None) -> Tensor:
    """A new cache that holds kv: see `kv_cache_append` for the rounding.

    Args:
        kv: bfloat16, float16 or float32 [num_pages, page_size, h_kv, d_qk].
        format: bf16, fp16, fp8, v32_fp8, v4_fp8, v41_fp8 or v41_fp4.
        scale: float32 [1], for fp8: the cache holds kv / scale.

    Returns:
        The cache, as `kv_cache_empty` gives it.
    """
    if kv.dim() != 4:
        raise ValueError(
            "kv_cache_pack: kv must have shape [num_pages, page_size, h_kv, d_qk], "
            f"got {list(kv.shape)}; reshape it"
        )
    pages, page_size, heads, d_qk = kv.shape
    cache = _new_cache(format, pages, page_size, heads, d_qk, kv.device, zeros=False)
    slots = _all_slots(pages * page_size, kv.device)
    # A reshape that cannot be a view copies: packing is not a hot path, kv_cache_append is.
    kv_cache_append(kv.reshape(-1, heads, d_qk), cache, slots, format, scale=scale)
    return cache


def kv_cache_unpack(
    cache: Tensor,
    format: str | None = None,
    *,
    scale: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The dequantised contents of a cache.

    Args:
        cache: as `kv_cache_empty` gives.
        format: default: that of `cache`.
        scale: float32 [1], for fp8: multiplies the stored values.
        dtype: of the result: bfloat16, float16 or float32.

    Returns:
        [num_pages, page_size, h_kv, d_qk].
    """
    layout = kv_format(cache if format is None else format)
    if cache.dim() != 4:
        raise ValueError(
            "kv_cache_unpack: cache must have 4 dimensions [num_pages, page_size, h_kv, ..], "
            f"got {list(cache.shape)}; reshape it"
        )
    pages, page_size, heads, width = cache.shape
    d_qk = layout.d_qk or width
    slots = _all_slots(pages * page_size, cache.device)
    kv: Tensor = call(ops.kv_cache_gather.default, cache, slots, layout.name, scale, d_qk, dtype)
    return kv.view(pages, page_size, heads, d_qk)
