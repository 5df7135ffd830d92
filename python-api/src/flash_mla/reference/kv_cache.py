"""The byte layouts of KV caches: packing into them, and reading them back.

name       d_qk       bytes of a token, in order
bf16       576, 512   d_qk bfloat16
fp16       576, 512   d_qk float16
fp8        576, 512   d_qk e4m3; one scale for the whole cache, kept outside of it
v32_fp8    576        512 e4m3 NoPE | 4 float32 scales, one per 128 | 64 bfloat16 RoPE   = 656
v4_fp8     512        448 e4m3 NoPE | 64 bfloat16 RoPE                                   = 576
                      and, behind all tokens of the page, 7 ue8m0 scales, one per 64 | 1 pad
v41_fp8    512        512 e4m3 | 16 ue8m0 scales, one per 32                             = 528
v41_fp4    512        512 e2m1, the even-indexed one of two in the low nibble
                      | 32 e4m3 scales, one per 16                                       = 288

value = stored value * scale. e4m3 is OCP float8_e4m3fn, ue8m0 is 2^(byte - 127).
A v4_fp8 cache has the shape [num_pages, page_size, 1, 584] and stride(0) a multiple of 576 bytes;
what a page holds is the 584 * page_size bytes at its start, so [..., 584] is no token.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

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


def gather_tokens(cache: Tensor, page: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
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
