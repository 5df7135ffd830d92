"""Each KV-cache format, byte by byte, in plain torch: what the tests hold the library to.

Nothing here calls the library, and no float8 arithmetic of torch takes part in decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """One packed format. Bytes of a token: codes, then RoPE in bf16, then scales and padding."""

    d_qk: int
    d_nope: int
    tile: int
    bytes_per_token: int
    scales_after_page: bool = False


PACKED = {
    # 512 e4m3, four float32 scales, 64 bf16: here alone the scales stand before the RoPE columns.
    "v32_fp8": Format(576, 512, 128, 656),
    # 448 e4m3 and 64 bf16; at the end of the page 8 bytes a token: 7 ue8m0 scales and a pad.
    "v4_fp8": Format(512, 448, 64, 584, scales_after_page=True),
    # 512 e4m3, 16 ue8m0 scales.
    "v41_fp8": Format(512, 512, 32, 528),
    # 256 bytes of two e2m1 each, the even column in the low nibble; 32 e4m3 scales.
    "v41_fp4": Format(512, 512, 16, 288),
}
PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
V4_PAGE_ALIGN_BYTES = 576
POISON_BYTE = 0xFF  # NaN as e4m3, as ue8m0, and in pairs or fours as bf16 and float32


def round_up(x: int, multiple: int) -> int:
    return (x + multiple - 1) // multiple * multiple


def _e4m3_values() -> Tensor:
    """OCP e4m3fn: exponent bias 7, no infinity, 0x7f and 0xff are NaN."""
    code = torch.arange(256)
    exponent, mantissa = (code >> 3) & 15, (code & 7).double()
    magnitude = torch.where(
        exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent.double() - 7)
    )
    magnitude[(code & 0x7F) == 0x7F] = torch.nan
    return torch.where(code >= 128, -magnitude, magnitude)


E4M3 = _e4m3_values()
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
E2M1 = torch.cat([E2M1, -E2M1])
UE8M0 = 2.0 ** (torch.arange(256).double() - 127)
UE8M0[255] = torch.nan


def _floats(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Little-endian bytes [.., n * size] as [.., n]."""
    return data.contiguous().view(dtype).double()


def as_bytes(cache: Tensor) -> Tensor:
    return cache.view(torch.uint8)


def page_bytes(cache: Tensor) -> Tensor:
    """A packed cache [P, page, 1, bytes] as [P, page * bytes], for any stride of the page."""
    data = as_bytes(cache)
    pages, page, _, width = data.shape
    return data.as_strided((pages, page * width), (data.stride(0), 1))


def split_packed(cache: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, rope) of a packed cache, as raw bytes, codes [P, page, ..]."""
    fmt = PACKED[name]
    pages, page = cache.shape[0], cache.shape[1]
    if fmt.scales_after_page:
        flat = page_bytes(cache)
        tokens = flat[:, : page * 576].reshape(pages, page, 576)
        scales = flat[:, page * 576 : page * 584].reshape(pages, page, 8)[..., :7]
        return tokens[..., :448], scales, tokens[..., 448:]
    data = as_bytes(cache)[:, :, 0]
    codes = fmt.d_nope // 2 if name == "v41_fp4" else fmt.d_nope
    scales = fmt.d_nope // fmt.tile * (4 if name == "v32_fp8" else 1)
    return data[..., :codes], data[..., codes : codes + scales], data[..., codes + scales :]


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """The values of byte codes, on the device where the codes are."""
    return table.to(codes.device)[codes.long()]


def tile_scales(cache: Tensor, name: str, device: torch.device | str = "cpu") -> Tensor:
    """The scales of a packed cache, float64 [P, page, tiles]."""
    return _scales(split_packed(cache.to(device), name)[1], name)


def _scales(raw: Tensor, name: str) -> Tensor:
    if name == "v32_fp8":
        return _floats(raw, torch.float32)
    return look_up(E4M3 if name == "v41_fp4" else UE8M0, raw)


def decode(
    cache: Tensor, name: str, scale: float = 1.0, device: torch.device | str = "cpu"
) -> Tensor:
    """What a cache holds, float64 [P, page, h_kv, d_qk] on `device`. `scale` is for fp8 caches."""
    cache = cache.to(device)
    if name == "fp8":
        return look_up(E4M3, as_bytes(cache)) * scale
    if name in PLAIN:
        return cache.double()
    return _values(split_packed(cache, name), name).unsqueeze(2)


def _values(parts: Sequence[Tensor], name: str) -> Tensor:
    """Codes, scales and RoPE [.., bytes] as float64 [.., d_qk]."""
    fmt = PACKED[name]
    codes, scales, rope = parts
    if name == "v41_fp4":
        values = look_up(E2M1, torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2))
    else:
        values = look_up(E4M3, codes)
    values = values * _scales(scales, name).repeat_interleave(fmt.tile, dim=-1)
    if fmt.d_nope < fmt.d_qk:
        values = torch.cat([values, _floats(rope, torch.bfloat16)], dim=-1)
    return values


def empty_packed(
    name: str,
    pages: int,
    page: int,
    extra_page_bytes: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A poisoned uint8 cache [P, page, 1, bytes]; extra_page_bytes lie between the pages."""
    width = PACKED[name].bytes_per_token
    align = V4_PAGE_ALIGN_BYTES if PACKED[name].scales_after_page else 1
    stride = round_up(page * width, align) + extra_page_bytes
    storage = torch.full((pages * stride,), POISON_BYTE, dtype=torch.uint8, device=device)
    return storage.as_strided((pages, page, 1, width), (stride, width, width, 1))


def _power_of_two_at_least(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())


def expected_scales(kv: Tensor, name: str) -> Tensor:
    """The scale that packing gives each tile of kv [.., d_qk], float64 [.., tiles]."""
    fmt = PACKED[name]
    tiles = kv[..., : fmt.d_nope].double().unflatten(-1, (-1, fmt.tile))
    amax = tiles.abs().amax(-1)
    if name != "v41_fp4":
        return _power_of_two_at_least((amax / 448).clamp_min(1e-4))
    positive = E4M3[8:127].to(amax.device)  # the positive normal numbers, in rising order
    return positive[torch.searchsorted(positive, (amax / 6).contiguous())]


def encode(
    kv: Tensor, name: str, *, scales: str = "power_of_two", extra_page_bytes: int = 0
) -> Tensor:
    """kv [P, page, h_kv, d_qk] as a cache, on kv's device. A token that is NaN becomes POISON_BYTE
    throughout.

    scales: "power_of_two", or "any" for the float32 scales that v32_fp8 also allows.
    """
    if name in PLAIN:
        return kv.to(PLAIN[name])
    fmt = PACKED[name]
    cache = empty_packed(name, kv.shape[0], kv.shape[1], extra_page_bytes, kv.device)
    poisoned = kv[:, :, 0].isnan().any(-1)
    kv = kv[:, :, 0].float().masked_fill(poisoned[..., None], 0)

    scale = expected_scales(kv, name)
    if scales == "any":
        scale = (scale * 1.37).float().double()
    scaled = kv[..., : fmt.d_nope] / scale.repeat_interleave(fmt.tile, dim=-1)
    if name == "v41_fp4":
        magnitudes = E2M1[:8].to(kv.device)
        index = (scaled[..., None].abs() - magnitudes).abs().argmin(-1) | (scaled < 0).int() << 3
        codes = (index[..., 0::2] | index[..., 1::2] << 4).to(torch.uint8)
        scale_bytes = scale.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        codes = scaled.clamp(-448, 448).float().to(torch.float8_e4m3fn).view(torch.uint8)
        scale_bytes = (torch.log2(scale) + 127).to(torch.uint8)
    rope = kv[..., fmt.d_nope :].to(torch.bfloat16).contiguous().view(torch.uint8)
    if name == "v32_fp8":
        scale_bytes = scale.float().contiguous().view(torch.uint8)

    for part, values in zip(split_views(cache, name), (codes, scale_bytes, rope), strict=True):
        part.copy_(torch.where(poisoned[..., None], torch.full_like(values, POISON_BYTE), values))
    return cache


def split_views(cache: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """As split_packed, but views of the cache, to write through."""
    if not PACKED[name].scales_after_page:
        return split_packed(cache, name)
    pages, page = cache.shape[0], cache.shape[1]
    start, stride = cache.storage_offset(), cache.stride(0)
    tokens = cache.as_strided((pages, page, 576), (stride, 576, 1), start)
    scales = cache.as_strided((pages, page, 7), (stride, 8, 1), start + page * 576)
    return tokens[..., :448], scales, tokens[..., 448:]


def _place(cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    return slots // cache.shape[1], slots % cache.shape[1]


def decode_tokens(cache: Tensor, name: str, slots: Tensor) -> Tensor:
    """What the tokens at flat positions [n] hold, float64 [n, d_qk], where the cache is.

    Of a bf16, fp16 or packed cache of one head; no other token is read.
    """
    place = _place(cache, slots)
    if name in PLAIN:
        return cache[place][:, 0].double()
    return _values([part[place] for part in split_views(cache, name)], name)


def encode_tokens(
    kv: Tensor, cache: Tensor, name: str, slots: Tensor, *, scales: str = "power_of_two"
) -> None:
    """Writes kv [n, 1, d_qk] to flat positions [n] of such a cache."""
    place = _place(cache, slots)
    pages_of_one = encode(kv.unsqueeze(1), name, scales=scales)
    if name in PLAIN:
        cache[place] = pages_of_one[:, 0]
        return
    for part, values in zip(split_views(cache, name), split_views(pages_of_one, name), strict=True):
        part[place] = values[:, 0]
