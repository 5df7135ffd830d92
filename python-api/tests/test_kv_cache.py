"""Packing, unpacking, appending and gathering, against the formats byte by byte."""

from __future__ import annotations

import kv_cache_bytes
import pytest
import torch
from backends import Backend
from cases import normal
from kv_cache_bytes import E2M1, E4M3, PACKED, PLAIN, round_up
from tolerances import assert_bitwise_equal
from torch import Tensor

import flash_mla

FORMATS = [*PLAIN, *PACKED]


def latent(
    gen: torch.Generator, name: str, pages: int, page: int, h_kv: int = 1, d_qk: int = 576
) -> Tensor:
    """[P, page, h_kv, d_qk] bf16 of very different magnitudes from tile to tile, some of them 0."""
    d_qk = PACKED[name].d_qk if name in PACKED else d_qk
    kv = normal(gen, pages, page, h_kv, d_qk, std=1.0).unflatten(-1, (-1, 16))
    kv = kv * 2.0 ** torch.randint(-20, 6, kv.shape[:-1], generator=gen)[..., None]
    kv[torch.rand(kv.shape[:-1], generator=gen) < 0.05] = 0
    return kv.flatten(-2).bfloat16()


def scale_for(name: str, backend: Backend) -> Tensor | None:
    return torch.tensor([0.37], device=backend.device) if name == "fp8" else None


def assert_nearest(found: Tensor, wanted: Tensor, table: Tensor, scale: Tensor) -> None:
    """found is `scale` times the value of `table` nearest to wanted / scale.

    Dividing in fp32 may move a number across the middle between two values: hence 2^-20.
    """
    positive = table[table.isfinite() & (table >= 0)].unique()
    x = (wanted / scale).abs().clamp_max(float(positive[-1]))
    above = torch.searchsorted(positive, x.contiguous()).clamp(1, len(positive) - 1)
    best = torch.minimum((positive[above] - x).abs(), (x - positive[above - 1]).abs())
    error = (found.abs() / scale - x).abs()
    assert (error <= best + 2.0**-20 * (x + positive[1])).all()
    assert ((found == 0) | (found.sign() == wanted.sign())).all()


@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_cache_is_zero_and_has_the_layout_of_its_format(
    backend: Backend, name: str, page_size: int
) -> None:
    cache = flash_mla.kv_cache_empty(name, 5, page_size, device=backend.device)
    assert cache.device.type == backend.device
    assert (kv_cache_bytes.as_bytes(cache) == 0).all()
    if name in PLAIN:
        assert cache.shape == (5, page_size, 1, 576)
        assert cache.dtype == PLAIN[name]
        return
    width = PACKED[name].bytes_per_token
    assert cache.shape == (5, page_size, 1, width)
    assert cache.dtype == torch.uint8
    align = 576 if name == "v4_fp8" else 1
    assert cache.stride(0) == round_up(page_size * width, align)


@pytest.mark.parametrize("name", PLAIN)
def test_an_empty_plain_cache_has_the_heads_and_columns_that_were_asked_for(
    backend: Backend, name: str
) -> None:
    cache = flash_mla.kv_cache_empty(name, 3, 16, num_heads_k=2, d_qk=512, device=backend.device)
    assert cache.shape == (3, 16, 2, 512)


@pytest.mark.parametrize("name", FORMATS)
def test_kv_format_describes_the_layout(backend: Backend, name: str) -> None:
    cache = flash_mla.kv_cache_empty(name, 2, 4, device=backend.device)
    for found in (flash_mla.kv_format(name), flash_mla.kv_format(cache)):
        assert found.name == name
        if name in PACKED:
            fmt = PACKED[name]
            assert found.d_qk == fmt.d_qk
            assert found.d_nope == fmt.d_nope
            assert found.bytes_per_token == fmt.bytes_per_token
            assert found.scale_tile == fmt.tile
            assert found.page_align_bytes == (576 if name == "v4_fp8" else 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["v32_fp8", "v4_fp8", "v41_fp8", "v41_fp4"])
def test_packing_follows_the_rules_of_the_format(
    backend: Backend, gen: torch.Generator, name: str, dtype: torch.dtype
) -> None:
    kv = latent(gen, name, 3, 5).to(dtype)
    cache = flash_mla.kv_cache_pack(kv.to(backend.device), name).cpu()
    exact, fmt = kv.double()[:, :, 0], PACKED[name]
    scales = kv_cache_bytes.tile_scales(cache, name)
    assert torch.equal(scales, kv_cache_bytes.expected_scales(exact, name))
    stored = kv_cache_bytes.decode(cache, name)[:, :, 0]
    nope = slice(0, fmt.d_nope)
    assert_nearest(
        stored[..., nope],
        exact[..., nope],
        E2M1 if name == "v41_fp4" else E4M3,
        scales.repeat_interleave(fmt.tile, dim=-1),
    )
    rope = slice(fmt.d_nope, None)
    assert torch.equal(stored[..., rope], kv[:, :, 0, rope].bfloat16().double())


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_packing_into_a_plain_cache_converts(
    backend: Backend, gen: torch.Generator, name: str, dtype: torch.dtype
) -> None:
    kv = latent(gen, name, 2, 3, h_kv=2, d_qk=512).to(dtype)
    cache = flash_mla.kv_cache_pack(kv.to(backend.device), name)
    assert_bitwise_equal(cache.cpu(), kv.to(PLAIN[name]))


def test_packing_fp8_divides_by_the_scale(backend: Backend, gen: torch.Generator) -> None:
    kv = latent(gen, "fp8", 2, 3, h_kv=3)
    scale = scale_for("fp8", backend)
    cache = flash_mla.kv_cache_pack(kv.to(backend.device), "fp8", scale=scale)
    assert cache.dtype == torch.float8_e4m3fn
    stored = kv_cache_bytes.decode(cache, "fp8", float(torch.tensor(0.37)))
    assert_nearest(stored, kv.double(), E4M3, torch.tensor(0.37).double())


def test_what_exceeds_an_fp8_cache_saturates(backend: Backend) -> None:
    """A NaN in the cache would spread into every later result."""
    kv = torch.full((1, 2, 1, 576), 1e4, dtype=torch.bfloat16, device=backend.device)
    kv[0, 1] *= -1
    cache = flash_mla.kv_cache_pack(kv, "fp8")
    stored = kv_cache_bytes.decode(cache, "fp8")
    assert (stored[0, 0] == 448).all()
    assert (stored[0, 1] == -448).all()


def test_ties_of_fp4_go_to_even(backend: Backend) -> None:
    """amax 6 makes the scale 1, so these values lie in the middle between two codes."""
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    even = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    row = torch.tensor([6.0, *ties, -6.0, *(-x for x in ties)])
    kv = row.repeat(32).view(1, 1, 1, 512).to(backend.device)
    stored = kv_cache_bytes.decode(flash_mla.kv_cache_pack(kv, "v41_fp4"), "v41_fp4")
    expected = torch.tensor([6.0, *even, -6.0, *(-x for x in even)]).double().repeat(32)
    assert torch.equal(stored.flatten(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", FORMATS)
def test_unpacking_reads_what_is_stored(
    backend: Backend, gen: torch.Generator, name: str, dtype: torch.dtype
) -> None:
    # 8 tokens a page: moving a v4_fp8 cache to a device drops the padding behind its pages, and
    # only multiples of 16 bytes stay aligned without it.
    kv = normal(gen, 3, 8, 1, PACKED[name].d_qk if name in PACKED else 576, std=1.0)
    cache = kv_cache_bytes.encode(kv, name, scales="any" if name == "v32_fp8" else "power_of_two")
    scale = scale_for(name, backend)
    expected = kv_cache_bytes.decode(cache, name, 1.0 if scale is None else float(scale))
    found = flash_mla.kv_cache_unpack(cache.to(backend.device), name, scale=scale, dtype=dtype)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    # A product in fp32, then one rounding; fp16 adds its smallest step where it is subnormal.
    ulp = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 2.0**-23}[dtype]
    floor = 2.0**-24 if dtype == torch.float16 else 0.0
    assert ((found.cpu().double() - expected).abs() <= ulp * expected.abs() + floor).all()


@pytest.mark.parametrize("name", ["bf16", "fp16", "v32_fp8", "v4_fp8", "v41_fp8", "v41_fp4"])
def test_unpacking_detects_the_format(backend: Backend, gen: torch.Generator, name: str) -> None:
    kv = latent(gen, name, 2, 4).to(backend.device)
    cache = flash_mla.kv_cache_pack(kv, name)
    assert_bitwise_equal(flash_mla.kv_cache_unpack(cache), flash_mla.kv_cache_unpack(cache, name))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", FORMATS)
def test_appending_writes_what_packing_does_and_nothing_else(
    backend: Backend, gen: torch.Generator, name: str, dtype: torch.dtype
) -> None:
    """Slots that are negative or past the cache are skipped."""
    pages, page, scale = 4, 6, scale_for(name, backend)
    kv = latent(gen, name, pages, page).to(backend.device)
    whole = flash_mla.kv_cache_pack(kv, name, scale=scale)
    before = latent(gen, name, pages, page).to(backend.device)
    cache = flash_mla.kv_cache_pack(before, name, scale=scale)
    old = kv_cache_bytes.decode(cache, name)

    slots = torch.randperm(pages * page, generator=gen)[:9]
    rows = kv.flatten(0, 1)[slots.to(backend.device)]
    outside = torch.tensor([-1, pages * page, 2**31 - 1, -(2**31)])
    mapping = torch.cat([slots, outside]).to(dtype).to(backend.device)
    rows = torch.cat([rows, rows[:4]])
    assert flash_mla.kv_cache_append(rows, cache, mapping, name, scale=scale) is None

    now, packed = kv_cache_bytes.decode(cache, name), kv_cache_bytes.decode(whole, name)
    written = torch.zeros(pages * page, dtype=torch.bool)
    written[slots] = True
    written = written.view(pages, page)
    assert torch.equal(now[written], packed[written])
    assert torch.equal(now[~written], old[~written])


@pytest.mark.parametrize("name", ["v32_fp8", "v4_fp8", "v41_fp8", "bf16"])
def test_appending_to_a_slice_of_a_larger_cache(
    backend: Backend, gen: torch.Generator, name: str
) -> None:
    """Every second page of a cache: the page stride is the slice's own."""
    cache = flash_mla.kv_cache_empty(name, 6, 4, device=backend.device)
    kv = latent(gen, name, 1, 12).to(backend.device)[0]
    slots = torch.arange(12, device=backend.device)
    flash_mla.kv_cache_append(kv, cache[::2], slots, name)
    expected = kv_cache_bytes.decode(flash_mla.kv_cache_pack(kv.view(3, 4, 1, -1), name), name)
    assert torch.equal(kv_cache_bytes.decode(cache[::2], name), expected)
    untouched = kv_cache_bytes.split_packed if name in PACKED else None
    rest = untouched(cache[1::2].cpu(), name) if untouched else (cache[1::2].cpu(),)
    assert all((part == 0).all() for part in rest)


@pytest.mark.parametrize("name", FORMATS)
def test_gathering_reads_slots_and_gives_zeros_outside(
    backend: Backend, gen: torch.Generator, name: str
) -> None:
    scale = scale_for(name, backend)
    kv = latent(gen, name, 3, 5).to(backend.device)
    cache = flash_mla.kv_cache_pack(kv, name, scale=scale)
    slots = torch.tensor([7, 0, -1, 14, 15, 2**31, 3])
    d_qk = kv.shape[-1]
    found = torch.ops.flash_mla.kv_cache_gather(
        cache, slots.to(backend.device), name, scale, d_qk, torch.bfloat16
    )
    whole = flash_mla.kv_cache_unpack(cache, name, scale=scale).flatten(0, 1)
    inside = (slots >= 0) & (slots < 15)
    assert found.shape == (7, 1, d_qk)
    assert_bitwise_equal(found[inside], whole[slots[inside]])
    assert (found[~inside] == 0).all()


def test_packing_no_pages_and_appending_no_tokens(backend: Backend) -> None:
    kv = torch.zeros(0, 4, 1, 576, dtype=torch.bfloat16, device=backend.device)
    assert flash_mla.kv_cache_pack(kv, "v32_fp8").shape == (0, 4, 1, 656)
    cache = flash_mla.kv_cache_empty("v32_fp8", 2, 4, device=backend.device)
    slots = torch.zeros(0, dtype=torch.int64, device=backend.device)
    flash_mla.kv_cache_append(kv[:, 0], cache, slots)
    assert (cache == 0).all()
