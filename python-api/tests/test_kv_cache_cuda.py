"""Packing, appending and gathering on GPUs: the bits of the CPU backend, for whatever numbers.

test_kv_cache.py holds every backend to the formats; here are the data, sizes and layouts that would
take too long elsewhere, and what only GPUs have.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from backends import GPU_BACKENDS, Backend, parameters
from cases import every_second, padded_rows
from kv_cache_bytes import E4M3, PACKED, PLAIN, round_up
from tolerances import assert_bitwise_equal
from torch import Tensor

import flash_mla

pytestmark = pytest.mark.parametrize(
    "backend", parameters(GPU_BACKENDS), indirect=True, scope="session"
)
FORMATS = [*PLAIN, *PACKED]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAYOUTS = ["contiguous", "strided", "transposed"]
# Any float32 is a scale: also those that division has trouble with.
CACHE_SCALES = [None, 1.0, 0.37, -0.5, 0.0, -0.0, torch.inf, torch.nan, 1e-30, 1e30, 1e-44, 448.0]

by_format = pytest.mark.parametrize("name", FORMATS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x).removeprefix("torch."))


@pytest.fixture(scope="module", autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    """The caches of several GiB that some tests make."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def needs_memory(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    free -= torch.cuda.memory_allocated()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free / 2**30:.1f} are free")


@contextmanager
def on_cpu() -> Iterator[None]:
    """The row that the backend under test forces has no kernels for a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLASH_MLA_KERNEL", raising=False)
        yield


def packed_on_cpu(kv: Tensor, name: str, page: int = 64) -> Tensor:
    """kv [n, 1, d_qk], n a multiple of page, as a cache."""
    with on_cpu():
        return flash_mla.kv_cache_pack(kv.cpu().view(-1, page, 1, kv.shape[-1]), name)


def unpacked_on_cpu(cache: Tensor, name: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[n, 1, d_qk]"""
    with on_cpu():
        return flash_mla.kv_cache_unpack(cache, name, dtype=dtype).flatten(0, 1)


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def columns_of(name: str) -> int:
    return PACKED[name].d_qk if name in PACKED else 576


def bits(gen: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bit pattern: every NaN, infinities, subnormal numbers."""
    count = shape[-1] * dtype.itemsize
    raw = torch.randint(0, 256, (*shape[:-1], count), generator=gen, dtype=torch.uint8)
    return raw.view(dtype)


def neighbour(x: Tensor, steps: Tensor) -> Tensor:
    """float32, so many steps further from 0."""
    return (x.view(torch.int32) + steps).view(torch.float32)


def every_kind(gen: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Tiles of 16 columns, each of one kind: random numbers of any magnitude, numbers in the middle
    between two codes and their neighbours, zeros, special values, and any bits."""
    tiles = (*shape[:-1], shape[-1] // 16, 16)
    power = torch.randint(-40, 30, (*tiles[:-1], 1), generator=gen)
    normal = torch.randn(tiles, generator=gen) * 2.0**power
    middle = torch.randint(-255, 256, tiles, generator=gen) / 16 * 2.0 ** (power // 4)
    near = neighbour(middle, torch.randint(-1, 2, tiles, generator=gen, dtype=torch.int32))
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, -6.0, 448.0, 464.0, 65504.0, 65520.0,
         3e38, -3e38, 1e-45, -6e-8, 1.2e-38, 2688.0, 2689.0]
    )  # fmt: skip
    special = special[torch.randint(0, len(special), tiles, generator=gen)]
    zeros = torch.where(torch.rand(tiles, generator=gen) < 0.5, 0.0, -0.0)
    kinds = [x.to(dtype) for x in (normal, middle, near, zeros, special)]
    kinds.append(bits(gen, tiles, dtype))
    chosen = torch.randint(0, len(kinds), (1, *tiles[:-1], 1), generator=gen)
    result = torch.stack(kinds).gather(0, chosen.expand(1, *tiles))[0]
    return result.flatten(-2)


def scale_tensor(scale: float | None, device: str = "cpu") -> Tensor | None:
    return None if scale is None else torch.tensor([scale], device=device)


def any_scale(gen: torch.Generator, name: str) -> float | None:
    if name != "fp8":
        return None
    return CACHE_SCALES[int(torch.randint(0, len(CACHE_SCALES), (), generator=gen))]


class Caches:
    """The same cache, storage and all, on the CPU and on the GPU."""

    def __init__(
        self,
        gen: torch.Generator,
        name: str,
        pages: int,
        page: int,
        h_kv: int = 1,
        d_qk: int = 576,
        layout: str = "contiguous",
    ) -> None:
        """layout "strided": gaps between rows and pages, and 16 bytes before the first;
        "transposed": heads before tokens, and every second page of the storage. In v4_fp8 pages
        alone have gaps.
        """
        self.name = name
        dtype = PLAIN.get(name, torch.uint8)
        dense = name == "v4_fp8"
        width = PACKED[name].bytes_per_token if name in PACKED else d_qk * dtype.itemsize
        start = row_gap = page_gap = 0
        if layout == "strided":
            start, row_gap, page_gap = 16, 0 if dense else 48, 112
        row = width + row_gap
        page_bytes = page * h_kv * row + page_gap
        if dense:
            page_bytes = round_up(page_bytes, 16)
        strides = (page_bytes, h_kv * row, row, 1)
        if layout == "transposed":
            strides = (2 * page_bytes, row if h_kv > 1 else h_kv * row, page * row, 1)
        self.view = ((pages, page, h_kv, width), strides, start)
        self.dtype = dtype
        size = start + pages * strides[0]
        self.cpu = torch.randint(0, 256, (size,), generator=gen, dtype=torch.uint8)
        self.gpu = self.cpu.clone()
        self.slots = pages * page

    def to(self, device: str) -> Caches:
        self.gpu = self.gpu.to(device)
        return self

    def cache(self, storage: Tensor) -> Tensor:
        shape, strides, start = self.view
        return storage.as_strided(shape, strides, start).view(self.dtype)

    def append(self, kv: Tensor, slots: Tensor, scale: float | None = None) -> None:
        """On both; kv and slots are on the GPU, with the strides to test."""
        scales = scale_tensor(scale, str(kv.device))
        flash_mla.kv_cache_append(kv, self.cache(self.gpu), slots, self.name, scale=scales)
        self.append_on_cpu(kv, slots, scale)

    def append_on_cpu(self, kv: Tensor, slots: Tensor, scale: float | None = None) -> None:
        with on_cpu():
            flash_mla.kv_cache_append(
                kv.cpu(), self.cache(self.cpu), slots.cpu(), self.name, scale=scale_tensor(scale)
            )

    def assert_equal(self) -> None:
        assert_bitwise_equal(self.gpu.cpu(), self.cpu)

    def gather(self, slots: Tensor, out: Tensor, scale: float | None = None) -> None:
        """Into `out`, which is on the GPU; what the CPU gives is compared."""
        scales = scale_tensor(scale, str(out.device))
        torch.ops.flash_mla.kv_cache_gather_out(self.cache(self.gpu), slots, self.name, scales, out)
        self.assert_gathered(slots, out, scale)

    def assert_gathered(self, slots: Tensor, out: Tensor, scale: float | None = None) -> None:
        with on_cpu():
            wanted = torch.ops.flash_mla.kv_cache_gather(
                self.cache(self.cpu), slots.cpu(), self.name, scale_tensor(scale), out.shape[-1],
                out.dtype,
            )  # fmt: skip
        assert_bitwise_equal(out.cpu(), wanted)


def random_slots(
    gen: torch.Generator, count: int, inside: int, dtype: torch.dtype, *, distinct: bool
) -> Tensor:
    """Some of them outside of the cache, by one or by much."""
    slots = (
        torch.randperm(max(inside, count), generator=gen)[:count]
        if distinct
        else torch.randint(0, max(inside, 1), (count,), generator=gen)
    )
    limit = torch.iinfo(dtype)
    outside = torch.tensor([-1, inside, limit.max, limit.min, -inside])
    if dtype == torch.int64:
        outside = torch.cat([outside, torch.tensor([2**31, 2**32, 2**32 + 1, -(2**32)])])
    wrong = outside[torch.randint(0, len(outside), (count,), generator=gen)]
    use_wrong = (torch.rand(count, generator=gen) < 0.2) | (slots >= inside)
    return torch.where(use_wrong, wrong, slots).to(dtype)


def in_layout(kv: Tensor, layout: str) -> Tensor:
    """[n, h_kv, d_qk]; "transposed": heads before tokens."""
    if layout == "transposed":
        return kv.transpose(0, 1).contiguous().transpose(0, 1)
    return padded_rows(kv) if layout == "strided" else kv


# --------------------------------------------------------------------------------------------------
# The bits of the CPU backend
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@by_dtype
@by_format
def test_appending_gives_the_bytes_of_the_cpu_and_touches_no_other(
    backend: Backend, gen: torch.Generator, name: str, dtype: torch.dtype, layout: str
) -> None:
    shapes = [(1, 7, 1), (5, 64, 1)] if name in PACKED else [(3, 16, 3), (5, 64, 1)]
    for pages, page, h_kv in shapes:
        for d_qk in {columns_of(name), 512 if name in PLAIN else columns_of(name)}:
            for slot_dtype in (torch.int32, torch.int64):
                caches = Caches(gen, name, pages, page, h_kv, d_qk, layout).to(backend.device)
                count = int(torch.randint(1, 300, (), generator=gen))
                kv = every_kind(gen, (count, h_kv, d_qk), dtype).to(backend.device)
                slots = random_slots(gen, count, caches.slots, slot_dtype, distinct=True)
                slots = slots.to(backend.device)
                if layout != "contiguous":
                    slots = every_second(slots)
                caches.append(in_layout(kv, layout), slots, any_scale(gen, name))
                caches.assert_equal()


@pytest.mark.parametrize("layout", LAYOUTS)
@by_dtype
@by_format
def test_gathering_any_bytes_gives_the_bits_of_the_cpu(
    backend: Backend, gen: torch.Generator, name: str, dtype: torch.dtype, layout: str
) -> None:
    """Codes and scales of all values, NaN included; slots may repeat."""
    h_kv = 1 if name in PACKED else 3
    for d_qk in {columns_of(name), 512 if name in PLAIN else columns_of(name)}:
        for slot_dtype in (torch.int32, torch.int64):
            caches = Caches(gen, name, 7, 16, h_kv, d_qk, layout).to(backend.device)
            count = int(torch.randint(1, 300, (), generator=gen))
            slots = random_slots(gen, count, caches.slots, slot_dtype, distinct=False)
            slots = slots.to(backend.device)
            out = torch.full((count, h_kv, d_qk), torch.nan, dtype=dtype, device=backend.device)
            out = in_layout(out, layout)
            beside = None
            if layout == "strided":
                beside = out.as_strided((*out.shape[:2], d_qk + 64), out.stride())[..., d_qk:]
            caches.gather(slots, out, any_scale(gen, name))
            if beside is not None:
                assert (beside.contiguous().view(torch.uint8) == 0xFF).all()


@pytest.mark.parametrize("scale", CACHE_SCALES, ids=str)
@by_dtype
def test_any_scale_of_an_fp8_cache(
    backend: Backend, gen: torch.Generator, dtype: torch.dtype, scale: float | None
) -> None:
    caches = Caches(gen, "fp8", 4, 64).to(backend.device)
    kv = every_kind(gen, (256, 1, 576), dtype)
    if scale is not None and 1e-3 < abs(scale) < 1e3:  # quotients in the middle between codes
        codes = E4M3[E4M3.isfinite()].float().unique()
        middles = (codes[1:] + codes[:-1]) / 2
        which = torch.randint(0, len(middles), (128, 1, 576), generator=gen)
        steps = torch.randint(-2, 3, which.shape, generator=gen, dtype=torch.int32)
        kv[:128] = neighbour(middles[which] * scale, steps).to(dtype)
    slots = torch.arange(256, device=backend.device)
    caches.append(kv.to(backend.device), slots, scale)
    caches.assert_equal()
    out = torch.empty(256, 1, 576, dtype=dtype, device=backend.device)
    caches.gather(slots, out, scale)


def every_number(dtype: torch.dtype) -> Tensor:
    """All of a 16-bit dtype; of float32, the first 20 bits in all ways, with what can follow that
    matters to a rounding at any of them."""
    if dtype.itemsize == 2:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    head = torch.arange(-(2**19), 2**19) << 12
    tails = torch.tensor([0x000, 0x001, 0x7FF, 0x800, 0x801, 0xFFF])
    return (head[:, None] + tails).flatten().to(torch.int32).view(torch.float32)


def as_rows(numbers: Tensor, columns: int) -> Tensor:
    """[n, 1, columns], the last row filled up with zeros."""
    missing = -len(numbers) % columns
    return torch.cat([numbers, numbers.new_zeros(missing)]).view(-1, 1, columns)


@by_dtype
@pytest.mark.parametrize("name", PLAIN)
def test_every_number_into_a_plain_cache(
    backend: Backend, gen: torch.Generator, name: str, dtype: torch.dtype
) -> None:
    kv = as_rows(every_number(dtype), 576)
    page = 64
    caches = Caches(gen, name, -(-len(kv) // page), page).to(backend.device)
    slots = torch.arange(len(kv), device=backend.device)
    caches.append(kv.to(backend.device), slots)
    caches.assert_equal()
    for out_dtype in DTYPES:
        out = torch.empty(kv.shape, dtype=out_dtype, device=backend.device)
        caches.gather(slots, out)


@by_dtype
def test_every_number_into_fp4_under_every_scale(
    backend: Backend, gen: torch.Generator, dtype: torch.dtype
) -> None:
    """A tile's first column, 6 times the scale, decides the scale; the other 15 are no larger."""
    scales = E4M3[8:127].float()  # the normal positive ones
    if dtype.itemsize == 2:
        numbers = every_number(dtype).float()
        numbers = numbers[numbers.isfinite()]
        numbers = numbers.expand(len(scales), -1)
    else:
        middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]) * scales[:, None]
        steps = torch.arange(-8, 9, dtype=torch.int32)
        near = neighbour(middles[..., None].expand(-1, -1, len(steps)).contiguous(), steps)
        near = near.flatten(1)
        spread = torch.rand(len(scales), 3000, generator=gen) * 6 * scales[:, None]
        numbers = torch.cat([near, -near, spread, -spread], dim=1)
    amax = 6 * scales[:, None]
    numbers = torch.minimum(torch.maximum(numbers, -amax), amax)
    numbers = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % 15))
    tiles = numbers.unflatten(1, (-1, 15))
    first = amax[..., None].expand(-1, tiles.shape[1], 1)
    kv = as_rows(torch.cat([first, tiles], dim=-1).flatten(), 512).to(dtype)
    caches = Caches(gen, "v41_fp4", -(-len(kv) // 64), 64).to(backend.device)
    caches.append(kv.to(backend.device), torch.arange(len(kv), device=backend.device))
    caches.assert_equal()


@by_dtype
@pytest.mark.parametrize("name", ["v32_fp8", "v4_fp8", "v41_fp8"])
def test_every_scale_of_e4m3_tiles(
    backend: Backend, gen: torch.Generator, name: str, dtype: torch.dtype
) -> None:
    """amax at 448 times each power of two, and next to it."""
    fmt = PACKED[name]
    limits = 448 * torch.ldexp(torch.ones(270), torch.arange(-145, 125))
    limits = limits[limits.isfinite()]
    steps = torch.tensor([-1, 0, 1], dtype=torch.int32)
    if dtype.itemsize == 4:
        amax = neighbour(limits[:, None].expand(-1, 3).contiguous(), steps).flatten()
    else:
        raw = limits.to(dtype).view(torch.int16)
        amax = (raw[:, None] + steps.to(torch.int16)).flatten().view(dtype).float()
    amax = amax[amax.isfinite()]
    tiles = torch.randn(len(amax), fmt.tile, generator=gen).clamp(-1, 1) * amax[:, None]
    tiles = tiles.to(dtype)
    tiles[torch.arange(len(amax)), torch.randint(0, fmt.tile, amax.shape, generator=gen)] = amax.to(
        dtype
    )
    nope = as_rows(tiles.flatten(), fmt.d_nope)
    rope = every_kind(gen, (len(nope), 1, 64), dtype)[..., : fmt.d_qk - fmt.d_nope]
    kv = torch.cat([nope, rope], dim=-1)
    caches = Caches(gen, name, -(-len(kv) // 16), 16).to(backend.device)
    caches.append(kv.to(backend.device), torch.arange(len(kv), device=backend.device))
    caches.assert_equal()


@by_dtype
@pytest.mark.parametrize("name", ["v4_fp8", "v41_fp8", "v41_fp4", "fp8"])
def test_every_code_under_every_scale(
    backend: Backend, gen: torch.Generator, name: str, dtype: torch.dtype
) -> None:
    """256 tokens; token t has scale byte t everywhere, and all codes."""
    caches = Caches(gen, name, 16, 16).to(backend.device)
    codes = torch.arange(256, dtype=torch.uint8)
    for storage in (caches.cpu, caches.gpu):
        cache = caches.cache(storage).view(torch.uint8)
        flat = cache.as_strided((16, 16 * cache.shape[-1]), (cache.stride(0), 1))
        width = 576 if name in ("v4_fp8", "fp8") else PACKED[name].bytes_per_token
        values = 448 if name == "v4_fp8" else {"v41_fp4": 256, "v41_fp8": 512, "fp8": 576}[name]
        rows = flat[:, : 16 * width].unflatten(1, (16, width))
        rows[..., :values] = codes.repeat(3)[:values].to(storage.device)
        scales = codes.view(16, 16, 1).to(storage.device)
        if name == "v4_fp8":
            flat[:, 16 * 576 :].unflatten(1, (16, 8)).copy_(scales.expand(-1, -1, 8))
        elif name != "fp8":
            rows[..., values:] = scales
    out = torch.empty(256, 1, columns_of(name), dtype=dtype, device=backend.device)
    caches.gather(torch.arange(256, device=backend.device), out)


def test_nan_and_infinity_are_what_the_formats_can_say(backend: Backend) -> None:
    """The rules in words: each NaN is e4m3's 0x7f and bf16's 0x7fc0, +-6 in e2m1; an infinite tile
    is NaN when read; fp8 saturates."""
    kv = torch.zeros(3, 1, 512, device=backend.device)
    kv[0, 0, ::64] = -torch.nan
    kv[1, 0, ::64] = torch.inf
    kv[2, 0, ::64] = -torch.inf
    slots = torch.arange(3, device=backend.device)

    fp8 = flash_mla.kv_cache_empty("fp8", 1, 3, d_qk=512, device=backend.device)
    flash_mla.kv_cache_append(kv, fp8, slots)
    assert fp8.view(torch.uint8)[0, :, 0, 0].tolist() == [0x7F, 0x7E, 0xFE]

    v41 = flash_mla.kv_cache_empty("v41_fp8", 1, 3, device=backend.device)
    flash_mla.kv_cache_append(kv, v41, slots)
    assert v41[0, 0, 0, :2].tolist() == [0x7F, 0]
    assert v41[0, 0, 0, 512] == 114  # 2^-13, the scale of zeros: NaN is not counted
    assert v41[0, 1, 0, 512] == 255
    read = flash_mla.kv_cache_unpack(v41, dtype=torch.bfloat16).view(torch.int16)
    assert read[0, 0, 0, :2].tolist() == [0x7FC0, 0]
    assert (read[0, 1, 0, :32] == 0x7FC0).all()
    assert (read[0, 1, 0, 32:64] == 0).all()

    fp4 = flash_mla.kv_cache_empty("v41_fp4", 1, 3, device=backend.device)
    flash_mla.kv_cache_append(kv, fp4, slots)
    values = flash_mla.kv_cache_unpack(fp4, dtype=torch.float32)[0, :, 0, 0]
    assert values.tolist() == [values[0].sign() * 6 / 64, 6 * 448, -6 * 448]


# --------------------------------------------------------------------------------------------------
# Sizes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 31, 32, 33, 127, 128, 129, 1000])
@by_format
def test_few_tokens(backend: Backend, gen: torch.Generator, name: str, count: int) -> None:
    caches = Caches(gen, name, 20, 64).to(backend.device)
    d_qk = columns_of(name)
    slots = torch.randperm(caches.slots, generator=gen)[:count].to(backend.device)
    kv = every_kind(gen, (count, 1, d_qk), torch.bfloat16).to(backend.device)
    caches.append(kv, slots, 0.37 if name == "fp8" else None)
    caches.assert_equal()
    out = torch.full((count, 1, d_qk), torch.nan, dtype=torch.bfloat16, device=backend.device)
    caches.gather(slots, out, 0.37 if name == "fp8" else None)


@by_dtype
@pytest.mark.parametrize("count", [70_001, 150_000, 700_003])
@by_format
def test_many_tokens(
    backend: Backend, gen: torch.Generator, name: str, count: int, dtype: torch.dtype
) -> None:
    """As many as make a warp take several: 512 tokens over and over, in any order."""
    if count > 200_000:
        if dtype == torch.float16:
            pytest.skip("as bfloat16, which is tested")
        needs_memory(12)
    d_qk, page = columns_of(name), 64
    few = every_kind(gen, (512, 1, d_qk), dtype)
    few_read = unpacked_on_cpu(packed_on_cpu(few, name), name, dtype)
    few, few_read = few.to(backend.device), few_read.to(backend.device)

    which = torch.randint(0, 512, (count,), generator=gen).to(backend.device)
    pages = -(-count // page)
    slots = torch.randperm(pages * page, generator=gen)[:count].to(backend.device)
    cache = flash_mla.kv_cache_empty(name, pages, page, d_qk=d_qk, device=backend.device)
    flash_mla.kv_cache_append(few[which], cache, slots, name)
    read = torch.ops.flash_mla.kv_cache_gather(cache, slots, name, None, d_qk, dtype)
    wanted = few_read[which]
    as_int = torch.int32 if dtype.itemsize == 4 else torch.int16
    assert torch.equal(read.view(as_int), wanted.view(as_int))

    whole = flash_mla.kv_cache_unpack(cache, name, dtype=dtype).flatten(0, 1)
    written = torch.zeros(pages * page, dtype=torch.bool, device=backend.device)
    written[slots] = True
    assert (whole[~written] == 0).all()
    del read, wanted
    whole_pages = count // page * page
    again = flash_mla.kv_cache_pack(few[which[:whole_pages]].view(-1, page, 1, d_qk), name)
    in_order = torch.arange(whole_pages, device=backend.device)
    read = torch.ops.flash_mla.kv_cache_gather(again, in_order, name, None, d_qk, dtype)
    assert torch.equal(read.view(as_int), few_read[which[:whole_pages]].view(as_int))


@by_format
def test_a_cache_beyond_2_to_the_32_bytes(
    backend: Backend, gen: torch.Generator, name: str
) -> None:
    """Tokens at its start, its end, and around each size where a narrow offset would wrap."""
    dtype = PLAIN.get(name, torch.uint8)
    width = PACKED[name].bytes_per_token if name in PACKED else 576
    page_bytes = 64 * width * dtype.itemsize
    pages = 2**32 * dtype.itemsize // page_bytes + 3
    needs_memory(pages * page_bytes / 2**30 + 3)
    storage = torch.full((pages, page_bytes), 0xFF, dtype=torch.uint8, device=backend.device)
    cache = storage.view(dtype).view(pages, 64, 1, width)
    wraps = [2**n * size // page_bytes for n in (31, 32) for size in {1, dtype.itemsize}]
    used = sorted({0, 1, pages - 1, *wraps, *(w + 1 for w in wraps), *(w - 1 for w in wraps)})
    first = torch.tensor(used) * 64
    slots = (first[:, None] + torch.arange(64)).flatten()
    d_qk = columns_of(name)
    kv = every_kind(gen, (len(slots), 1, d_qk), torch.bfloat16).to(backend.device)
    order = torch.randperm(len(slots), generator=gen)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flash_mla.kv_cache_append(kv[order], cache, slots[order].to(backend.device), name)
    assert torch.cuda.max_memory_allocated() - before < 2**29, "the cache was copied"

    wanted = packed_on_cpu(kv, name)
    raw = wanted.view(torch.uint8)
    raw = raw.as_strided((len(used), page_bytes), (raw.stride(0), 1))
    assert_bitwise_equal(storage[used].cpu(), raw)
    beside = sorted({u + x for u in used for x in (-1, 1)} & set(range(pages)) - set(used))
    assert (storage[beside] == 0xFF).all()

    whole = unpacked_on_cpu(wanted, name)
    read = torch.ops.flash_mla.kv_cache_gather(
        cache, slots[order].to(backend.device), name, None, d_qk, torch.bfloat16
    )
    assert_bitwise_equal(read.cpu(), whole[order])


@pytest.mark.parametrize("name", ["bf16", "v32_fp8", "v41_fp4"])
def test_more_than_2_to_the_31_columns(backend: Backend, gen: torch.Generator, name: str) -> None:
    needs_memory(24)
    d_qk = columns_of(name)
    few = every_kind(gen, (1024, 1, d_qk), torch.bfloat16)
    packed = packed_on_cpu(few, name)
    read = unpacked_on_cpu(packed, name).to(backend.device)
    few, packed = few.to(backend.device), packed.to(backend.device)
    count = (2**31 // d_qk // 1024 + 2) * 1024
    slots = torch.arange(1024, device=backend.device).repeat(count // 1024)
    out = torch.ops.flash_mla.kv_cache_gather(packed, slots, name, None, d_qk, torch.bfloat16)
    assert out.numel() > 2**31
    for part in out.view(-1, 1024, 1, d_qk):
        assert torch.equal(part.view(torch.int16), read.view(torch.int16))
    del out
    many = few.repeat(count // 1024, 1, 1)
    cache = flash_mla.kv_cache_pack(many.view(-1, 64, 1, d_qk), name)
    tokens = cache.view(torch.uint8).view(-1, packed.view(torch.uint8)[:16].numel())
    assert (tokens == packed.view(torch.uint8).flatten()).all()


# --------------------------------------------------------------------------------------------------
# Slots
# --------------------------------------------------------------------------------------------------


@by_format
def test_slots_outside_of_the_cache_write_nothing_and_read_zeros(
    backend: Backend, gen: torch.Generator, name: str
) -> None:
    caches = Caches(gen, name, 3, 8).to(backend.device)
    before = caches.gpu.clone()
    slots = torch.tensor(
        [-1, 24, 25, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**62, -(2**63), 2**63 - 1, -24, -(2**32)],
        device=backend.device,
    )
    d_qk = columns_of(name)
    for dtype in DTYPES:
        kv = every_kind(gen, (len(slots), 1, d_qk), dtype).to(backend.device)
        flash_mla.kv_cache_append(kv, caches.cache(caches.gpu), slots, name)
        assert_bitwise_equal(caches.gpu, before)
        out = torch.full(kv.shape, torch.nan, dtype=dtype, device=backend.device)
        caches.gather(slots, out)
        assert (out.view(torch.uint8) == 0).all()


def test_a_cache_without_pages_has_no_slots(backend: Backend, gen: torch.Generator) -> None:
    cache = flash_mla.kv_cache_empty("v32_fp8", 0, 64, device=backend.device)
    slots = torch.arange(5, device=backend.device)
    kv = every_kind(gen, (5, 1, 576), torch.bfloat16).to(backend.device)
    flash_mla.kv_cache_append(kv, cache, slots, "v32_fp8")
    out = torch.ops.flash_mla.kv_cache_gather(cache, slots, "v32_fp8", None, 576, torch.bfloat16)
    assert (out == 0).all()


def test_one_token_for_all_slots(backend: Backend, gen: torch.Generator) -> None:
    """kv with a stride of 0."""
    caches = Caches(gen, "v41_fp8", 2, 16).to(backend.device)
    kv = every_kind(gen, (1, 1, 512), torch.bfloat16).to(backend.device).expand(32, 1, 512)
    caches.append(kv, torch.arange(32, device=backend.device))
    caches.assert_equal()


# --------------------------------------------------------------------------------------------------
# Streams and graphs
# --------------------------------------------------------------------------------------------------


@by_format
def test_a_graph_is_replayed_with_other_contents(
    backend: Backend, gen: torch.Generator, name: str
) -> None:
    """Tokens, slots and the scale change; what a slot skips stays as the last replay left it."""
    d_qk, count = columns_of(name), 100
    caches = Caches(gen, name, 6, 32).to(backend.device)
    scale = torch.tensor([1.0], device=backend.device) if name == "fp8" else None
    kv = torch.zeros(count, 1, d_qk, dtype=torch.bfloat16, device=backend.device)
    slots = torch.full((count,), -1, device=backend.device)
    out = torch.empty_like(kv)
    cache = caches.cache(caches.gpu)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        flash_mla.kv_cache_append(kv, cache, slots, name, scale=scale)
        torch.ops.flash_mla.kv_cache_gather_out(cache, slots, name, scale, out)
    for factor in (1.0, 0.37, 3.0, 0.01):
        kv.copy_(every_kind(gen, (count, 1, d_qk), torch.bfloat16))
        slots.copy_(random_slots(gen, count, caches.slots, torch.int64, distinct=True))
        if scale is not None:
            scale.fill_(factor)
        out.fill_(torch.nan)
        graph.replay()
        caches.append_on_cpu(kv, slots, None if scale is None else factor)
        caches.assert_equal()
        caches.assert_gathered(slots, out, None if scale is None else factor)


@pytest.mark.parametrize("count", [1, 64, 5000])
def test_calls_that_follow_each_other_at_once_see_each_others_results(
    backend: Backend, gen: torch.Generator, count: int
) -> None:
    """Each appends what the one before it has gathered, through two caches in turn, with no other
    kernel between them; then the same in a graph."""
    pages = -(-count // 64)
    caches = [flash_mla.kv_cache_empty("v32_fp8", pages, 64, device=backend.device) for _ in "ab"]
    start = every_kind(gen, (count, 1, 576), torch.bfloat16).nan_to_num(0).clamp(-1e30, 1e30)
    rows = [start.to(backend.device), torch.empty_like(start, device=backend.device)]
    forward = torch.arange(count, device=backend.device)
    orders = [forward, forward.flip(0)]
    gather = torch.ops.flash_mla.kv_cache_gather_out

    def steps(number: int) -> None:
        for i in range(number):
            flash_mla.kv_cache_append(rows[i % 2], caches[i % 2], orders[0], "v32_fp8")
            gather(caches[i % 2], orders[1], "v32_fp8", None, rows[1 - i % 2])

    once = torch.nn.functional.pad(start, (0, 0, 0, 0, 0, -count % 64))
    once = unpacked_on_cpu(packed_on_cpu(once, "v32_fp8"), "v32_fp8")[:count]
    # What was rounded once stays as it is, so each step only reverses the order.
    steps(101)
    assert_bitwise_equal(rows[1].cpu(), once.flip(0))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        steps(20)
    for _ in range(10):
        rows[0].copy_(start)
        graph.replay()
        assert_bitwise_equal(rows[0].cpu(), once)


def test_calls_follow_the_current_stream(backend: Backend, gen: torch.Generator) -> None:
    """kv becomes right late in the side stream; the default stream would read it early."""
    caches = Caches(gen, "v41_fp8", 2, 64).to(backend.device)
    kv = every_kind(gen, (128, 1, 512), torch.bfloat16).to(backend.device)
    slots = torch.arange(128, device=backend.device)
    late = torch.zeros_like(kv)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds
        late.copy_(kv)
        flash_mla.kv_cache_append(late, caches.cache(caches.gpu), slots, "v41_fp8")
    stream.synchronize()
    caches.append_on_cpu(kv, slots)
    caches.assert_equal()


def test_the_device_of_the_cache_is_used_whichever_is_current(
    backend: Backend, gen: torch.Generator
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    kv = every_kind(gen, (64, 1, 576), torch.bfloat16)
    wanted = packed_on_cpu(kv, "v32_fp8")
    for current, device in itertools.product((0, 1), repeat=2):
        with torch.cuda.device(current):
            cache = flash_mla.kv_cache_pack(kv.view(1, 64, 1, 576).to(f"cuda:{device}"), "v32_fp8")
            assert torch.cuda.current_device() == current
        assert_bitwise_equal(cache.cpu(), wanted)
