"""Decode of any size, built and answered on the device that runs it: dense decode, and what sparse
decode (device_sparse_decode.py) shares with it.

cases.dense_decode and float64_reference go through keys one by one on the CPU, which takes minutes
for thousands of requests or a million keys. Here both are done for many requests at once; on small
cases test_reference.py holds the answers to those of float64_reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import kv_cache_bytes
import pytest
import torch
from cases import GARBAGE_PAGES, KV_STD, Q_STD, Decode, padded_rows, poison, swapped
from kv_cache_bytes import PACKED, PLAIN, POISON_BYTE, V4_PAGE_ALIGN_BYTES
from tolerances import (
    DECODE_ROUNDED_K,
    Tolerance,
    assert_lse_close,
    assert_out_close,
    decode_with_logits_of,
)
from torch import Tensor

D_V = 512
# What the keys and logits of one step of the answer take at most, in float64.
STEP_BYTES = 2**30
KEYS_A_STEP = 2**16

AnyDecode = TypeVar("AnyDecode", bound="DeviceDecode")
Edit = Callable[[Tensor], Any]
KeyEdit = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Format:
    """A kv_format with the choices that come with it. A name to read in a test's id."""

    name: str
    kv_format: str
    scales: str = "power_of_two"

    def __str__(self) -> str:
        return self.name

    def build(self) -> dict[str, Any]:
        """Arguments of dense_decode or sparse_decode: every field but the name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}

    def tolerance(self, logits: float = 0.0) -> Tolerance:
        """Of a result whose logits are up to `logits`; 0 is for those of random data."""
        sharp = decode_with_logits_of(logits)
        return replace(sharp, lse_abs=DECODE_ROUNDED_K.lse_abs) if self.scales == "any" else sharp


@dataclass(frozen=True)
class DenseFormat(Format):
    fp8_q: bool = False
    descales: str = "none"


ALL_FORMATS = [
    DenseFormat("bf16", "bf16"),
    DenseFormat("fp16", "fp16"),
    DenseFormat("fp8", "fp8"),
    DenseFormat("fp8+k", "fp8", descales="one"),
    DenseFormat("fp8+k[b]", "fp8", descales="per_request"),
    DenseFormat("fp8,q8", "fp8", fp8_q=True),
    DenseFormat("fp8+k,q8+q", "fp8", fp8_q=True, descales="one"),
    DenseFormat("fp8+k[b],q8+q[b]", "fp8", fp8_q=True, descales="per_request"),
    DenseFormat("v32_fp8", "v32_fp8"),
    DenseFormat("v32_fp8*any", "v32_fp8", scales="any"),
]
# One for each combination of dtypes, hence one for each kernel that a head count can have.
FORMATS = [f for f in ALL_FORMATS if f.name in ("bf16", "fp16", "fp8+k", "fp8,q8", "v32_fp8")]


@dataclass
class DeviceDecode(Decode):
    """A call whose answer can be had again for other lengths, tables, indices or queries."""

    kv_format: str = "bf16"

    def answer(self) -> tuple[Tensor, Tensor]:
        """(out [b, s_q, h_q, 512], lse [b, h_q, s_q]) of the inputs, float64."""
        raise NotImplementedError

    def changed(self: AnyDecode, **inputs: Tensor) -> AnyDecode:
        """The call with some inputs replaced, and its own answer."""
        other = replace(self, inputs=self.inputs | inputs)
        other.expected_out, other.expected_lse = other.answer()
        return other

    def with_options(self: AnyDecode, **options: Any) -> AnyDecode:
        """The call with another softmax_scale or causal, and its own answer."""
        return replace(self, options=self.options | options).changed()

    def per_request(self) -> dict[str, Tensor]:
        """The inputs whose first dimension is the batch."""
        shared = ("k_cache", "extra_k_cache", "attn_sink")
        return {
            name: x
            for name, x in self.inputs.items()
            if name not in shared and not (name.startswith("descale") and x.numel() == 1)
        }

    def requests(self: AnyDecode, which: Sequence[int] | Tensor) -> AnyDecode:
        """Some of the requests, in this order, over the same cache; the answer is theirs."""
        rows = torch.as_tensor(which, device=self.inputs["q"].device, dtype=torch.long)
        return replace(
            self,
            inputs=self.inputs | {name: take(x, rows) for name, x in self.per_request().items()},
            expected_out=self.expected_out[rows],
            expected_lse=self.expected_lse[rows],
        )

    def poisoned_out(self) -> Tensor:
        q = self.inputs["q"]
        return poison(*q.shape[:3], D_V, dtype=self.out_dtype, device=str(q.device))


@dataclass
class DenseDecode(DeviceDecode):
    def answer(self) -> tuple[Tensor, Tensor]:
        return answer(self.inputs, self.kv_format, **self.options)


def check(
    inputs: DeviceDecode, fmt: Format, logits: float = 0.0, **changes: Any
) -> tuple[Tensor, Tensor]:
    """Calls and compares. logits: how large they are, where that decides what fp32 can hold."""
    out, lse = inputs.run(**changes)
    assert_out_close(out, inputs.expected_out, fmt.tolerance(logits))
    assert_lse_close(lse, inputs.expected_lse, fmt.tolerance(logits))
    return out, lse


def check_copies(few: DeviceDecode, fmt: Format) -> None:
    """A result of more than 2^31 elements: the requests over and over. In batch-invariant mode each
    copy has the same bits.
    """
    needs_memory(24)
    b = few.expected_out.shape[0]
    copies = 2**31 // few.expected_out.numel() + 8
    rows = torch.arange(b, device=few.expected_out.device).repeat(copies)
    many = {name: take(x, rows) for name, x in few.per_request().items()}
    wanted_out, wanted_lse = check(few, fmt, batch_invariant=True)
    for batch_invariant in (True, False):
        out, lse = few.run(**many, out=None, batch_invariant=batch_invariant)
        assert out.numel() > 2**31
        for i in range(0, copies, 64):
            here = slice(b * i, b * min(i + 64, copies))
            size = (here.stop - here.start) // b
            if batch_invariant:
                assert torch.equal(out[here], wanted_out.repeat(size, 1, 1, 1))
                assert torch.equal(lse[here], wanted_lse.repeat(size, 1, 1))
            elif i % 512 == 0 or here.stop == b * copies:
                expected = few.expected_out.repeat(size, 1, 1, 1)
                assert_out_close(out[here], expected, fmt.tolerance())
                expected = few.expected_lse.repeat(size, 1, 1)
                assert_lse_close(lse[here], expected, fmt.tolerance())
        del out, lse


def chosen_variants(
    inputs: DeviceDecode,
    operator: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """The kernels that a call says it takes."""
    monkeypatch.setenv("FLASH_MLA_LOG", "select")
    capfd.readouterr()
    inputs.run()
    logged = capfd.readouterr()
    chosen = [
        line.partition("->")[2].split(";")[0].strip()
        for line in (logged.err + logged.out).splitlines()
        if operator in line and "->" in line
    ]
    assert chosen, "FLASH_MLA_LOG=select printed no choice"
    return chosen


def needs_memory(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    free -= torch.cuda.memory_allocated()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free / 2**30:.1f} are free")


def randn_on(device: str, gen: torch.Generator) -> Callable[..., Tensor]:
    """randn(*shape) of a generator on the device, which `gen` seeds."""
    local = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=gen)))
    return lambda *shape: torch.randn(*shape, generator=local, device=device)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], also for float8."""
    return x.view(torch.uint8)[rows].view(x.dtype) if x.dtype.itemsize == 1 else x[rows]


def _pages(
    gen: torch.Generator, device: str, counts: Tensor, num_pages: int, pages: Sequence[int] | None
) -> Tensor:
    """block_table [b, most pages + 2]: every request has its own; the rest of a row is garbage."""
    total = int(counts.sum())
    order = torch.randperm(num_pages, generator=gen)[:total] if pages is None else None
    order = torch.as_tensor(pages) if order is None else order
    assert len(order) == total, f"{len(order)} pages were given, the requests have {total}"
    columns = int(counts.max()) + 2 if len(counts) else 2
    garbage = torch.randint(0, len(GARBAGE_PAGES), (len(counts), columns), generator=gen)
    table = torch.tensor(GARBAGE_PAGES)[garbage]
    table[torch.arange(columns) < counts[:, None]] = order
    return table.int().to(device)


def empty_cache(
    device: str,
    num_pages: int,
    page_size: int = 64,
    h_kv: int = 1,
    d_qk: int = 576,
    kv_format: str = "bf16",
    layout: str = "contiguous",
) -> Tensor:
    """A poisoned cache.

    layout "strided": rows with a gap, pages with a gap, and it begins 16 bytes into its storage;
    "transposed": heads before tokens, and every second page of its storage. Of v4_fp8 only pages
    can lie apart.
    """
    dtype = PLAIN.get(kv_format, torch.uint8)
    width = PACKED[kv_format].bytes_per_token if kv_format in PACKED else d_qk * dtype.itemsize
    start = row_gap = page_gap = 0
    if layout == "strided":
        start, row_gap, page_gap = 16, 64, 112
    row = width + row_gap
    page = page_size * h_kv * row + page_gap
    if kv_format in PACKED and PACKED[kv_format].scales_after_page:
        row = width
        page = kv_cache_bytes.round_up(page_size * width, V4_PAGE_ALIGN_BYTES) + page_gap
    strides = (page, h_kv * row, row, 1)
    if layout == "transposed":
        strides = (2 * page, row, page_size * row, 1)
    size = start + num_pages * strides[0]
    storage = torch.full((size,), POISON_BYTE, dtype=torch.uint8, device=device)
    shape = (num_pages, page_size, h_kv, width)
    return storage.as_strided(shape, strides, start).view(dtype)


def fill_cache(cache: Tensor, kv_format: str, value: float) -> None:
    """Every token of a cache becomes +-Inf, or what comes nearest: e4m3 has NaN but no Inf."""
    if kv_format == "fp8":
        cache.view(torch.uint8).fill_(0x7F)
    elif kv_format in PLAIN:
        cache.fill_(value)
    else:
        codes, scales, rope = kv_cache_bytes.split_views(cache, kv_format)
        negative = 0x80 if value < 0 else 0
        if kv_format == "v32_fp8":
            codes.fill_(0x7E)  # 448: times Inf it is Inf
            scales.view(torch.float32).fill_(value)
        elif kv_format == "v41_fp4":  # 6 times 448
            codes.fill_(0xFF if negative else 0x77)
            scales.fill_(0x7E)
        else:  # 448 times 2^127, which is Inf in fp32
            codes.fill_(0x7E | negative)
            scales.fill_(0xFE)
        rope.view(torch.bfloat16).fill_(value)


def dense_decode(
    gen: torch.Generator,
    device: str,
    *,
    lengths: Sequence[int],
    s_q: int = 1,
    heads: tuple[int, int] = (16, 1),
    d_qk: int = 576,
    page_size: int = 64,
    kv_format: str = "bf16",
    causal: bool = False,
    softmax_scale: float | None = None,
    layout: str = "contiguous",
    q_std: float = Q_STD,
    fp8_q: bool = False,
    descales: str = "none",
    scales: str = "power_of_two",
    edit_queries: Edit | None = None,
    edit_keys: KeyEdit | None = None,
    invalid_pages: float = 0.0,
    num_pages: int | None = None,
    pages: Sequence[int] | None = None,
    cache: Tensor | None = None,
) -> DenseDecode:
    """As cases.dense_decode.

    edit_queries(q [b, s_q, h_q, d]) and edit_keys(kv [n, h_kv, d], positions [n]) change values in
    place, before they are rounded. invalid_pages: the share of the pages in use that are replaced
    by numbers outside the pool. pages: those of all requests, one after the other. cache: to write
    into, instead of a new one.
    """
    b, (h_q, h_kv) = len(lengths), heads
    length = torch.tensor(lengths, dtype=torch.long)
    counts = (length + page_size - 1) // page_size
    num_pages = int(counts.sum()) + 2 if num_pages is None else num_pages
    table = _pages(gen, device, counts, num_pages, pages)
    random = randn_on(device, gen)

    descale = {
        "none": None,
        "one": torch.tensor([0.0123]),
        "per_request": 0.01 * (1 + torch.rand(b, generator=gen)),
    }[descales]
    descale_k = descale if kv_format == "fp8" else None
    descale_q = descale if fp8_q else None
    out_dtype = torch.float16 if kv_format == "fp16" else torch.bfloat16
    q = random(b, s_q, h_q, d_qk) * q_std
    if edit_queries is not None:
        edit_queries(q)
    if descale_q is not None and b:
        q /= float(descale_q[0])
    # Older releases of torch turn what is beyond the largest e4m3 value into NaN.
    q = q.clamp(-448, 448).to(torch.float8_e4m3fn) if fp8_q else q.to(out_dtype)

    if cache is None:
        cache = empty_cache(device, num_pages, page_size, h_kv, d_qk, kv_format, layout)
    request = torch.arange(b).repeat_interleave(length).to(device)
    position = torch.cat([torch.arange(n) for n in lengths] or [length]).to(device)
    for start in range(0, len(position), KEYS_A_STEP):
        here = slice(start, start + KEYS_A_STEP)
        kv = random(len(position[here]), h_kv, d_qk) * KV_STD
        if edit_keys is not None:
            edit_keys(kv, position[here])
        if descale_k is not None:
            kv /= float(descale_k[0])
        if kv_format == "fp8":
            kv.clamp_(-448, 448)
        rows = kv_cache_bytes.encode(kv.unsqueeze(1), kv_format, scales=scales)
        page = table[request[here], position[here] // page_size].long()
        cache.view(torch.uint8)[page, position[here] % page_size] = rows.view(torch.uint8)[:, 0]
    if invalid_pages:
        outside = torch.tensor([-1, num_pages, 2**31 - 1, -(2**31)])
        outside = outside[torch.randint(0, 4, table.shape, generator=gen)].int().to(device)
        chosen = torch.rand(table.shape, generator=gen) < invalid_pages
        table = torch.where(chosen.to(device), outside, table)

    if layout == "strided":
        q, table = padded_rows(q), padded_rows(table, 3)
    elif layout == "transposed":
        q, table = swapped(q), padded_rows(table, 1)
    inputs = {"q": q, "k_cache": cache, "block_table": table}
    inputs["cache_seqlens"] = length.int().to(device)
    if descale_k is not None:
        inputs["descale_k"] = descale_k.to(device)
    if descale_q is not None:
        inputs["descale_q"] = descale_q.to(device)
    options: dict[str, Any] = {"softmax_scale": softmax_scale, "causal": causal}
    expected = answer(inputs, kv_format, **options)
    return DenseDecode(inputs, options, *expected, out_dtype, kv_format)


def answer(
    inputs: dict[str, Tensor], kv_format: str, *, softmax_scale: float | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """(out [b, s_q, h_q, 512], lse [b, h_q, s_q]) of the operator's inputs, float64."""
    q, cache = inputs["q"], inputs["k_cache"]
    b, s_q, h_q, d_qk = q.shape
    scale = d_qk**-0.5 if softmax_scale is None else softmax_scale
    if q.dtype.itemsize == 1:
        queries = kv_cache_bytes.look_up(kv_cache_bytes.E4M3, q.view(torch.uint8))
    else:
        queries = q.double()
    if "descale_q" in inputs:
        queries = queries * inputs["descale_q"].double().expand(b)[:, None, None, None]
    factor = inputs.get("descale_k")
    key_factor = q.new_ones(b, dtype=torch.float64) if factor is None else factor.double().expand(b)

    out = torch.zeros(b, s_q, h_q, D_V, dtype=torch.float64, device=q.device)
    lse = torch.full((b, h_q, s_q), math.inf, dtype=torch.float64, device=q.device)
    lengths = inputs["cache_seqlens"].tolist()
    for group in groups_of(lengths, bytes_a_key=8 * (cache.shape[2] * d_qk + s_q * h_q)):
        rows = torch.tensor(group, device=q.device)
        out[rows], lse[rows] = _attend(
            queries[rows],
            cache,
            kv_format,
            inputs["block_table"][rows],
            inputs["cache_seqlens"][rows].long(),
            key_factor[rows],
            scale,
            causal,
        )
    return out, lse


def groups_of(lengths: list[int], *, bytes_a_key: int) -> Iterator[list[int]]:
    """Requests of like length, the longest last; those without keys in none."""
    group: list[int] = []
    for n in sorted((n for n in range(len(lengths)) if lengths[n] > 0), key=lengths.__getitem__):
        if group and (len(group) + 1) * lengths[n] * bytes_a_key > STEP_BYTES:
            yield group
            group = []
        group.append(n)
    if group:
        yield group


def _attend(
    q: Tensor,
    cache: Tensor,
    kv_format: str,
    table: Tensor,
    lengths: Tensor,
    key_factor: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """As `answer`, for requests whose logits fit into memory: q [n, s_q, h_q, d] float64."""
    n, s_q = q.shape[:2]
    num_pages, page_size, h_kv, _ = cache.shape
    longest = int(lengths.amax())
    queries = torch.arange(s_q, device=q.device)
    last = lengths[:, None] - s_q + queries if causal else (lengths[:, None] - 1).expand(n, s_q)
    grouped = q.unflatten(2, (h_kv, -1))
    steps = [range(i, min(i + KEYS_A_STEP, longest)) for i in range(0, longest, KEYS_A_STEP)]

    def keys_of(step: range) -> tuple[Tensor, Tensor]:
        """(keys [n, c, h_kv, d], zero where masked for all; visible [n, s_q, c])."""
        position = torch.arange(step.start, step.stop, device=q.device)
        column = position // page_size
        in_table = column < table.shape[1]
        page = table[:, column[in_table]].long()
        page = torch.nn.functional.pad(page, (0, len(column) - page.shape[1]), value=-1)
        inside = (page >= 0) & (page < num_pages) & (position < lengths[:, None])
        offset = (position % page_size).expand_as(page)
        keys = torch.zeros(n, len(position), h_kv, q.shape[-1], dtype=q.dtype, device=q.device)
        raw = cache.view(torch.uint8)[page[inside], offset[inside]].view(cache.dtype)
        keys[inside] = kv_cache_bytes.decode(raw.unsqueeze(1), kv_format, device=q.device)[:, 0]
        keys *= key_factor[:, None, None, None]
        return keys, inside[:, None] & (position <= last[:, :, None])

    logits = []
    for step in steps:
        keys, visible = keys_of(step)
        part = torch.einsum("nqkgd,nckd->nkgqc", grouped, keys) * scale
        logits.append(part.masked_fill(~visible[:, None, None], -math.inf))
    weights = torch.cat(logits, dim=-1)
    top = weights.amax(-1, keepdim=True)
    empty = top == -math.inf
    weights = (weights - top.masked_fill(empty, 0)).exp()
    total = weights.sum(-1, keepdim=True)
    lse = torch.where(empty, math.inf, top + total.log())[..., 0].flatten(1, 2)
    weights /= total.masked_fill(empty, 1)
    out = torch.zeros(n, s_q, h_kv, grouped.shape[3], D_V, dtype=q.dtype, device=q.device)
    for step in steps:
        if len(steps) > 1:
            keys, _ = keys_of(step)
        part = weights[..., step.start : step.stop]
        out += torch.einsum("nkgqc,nckd->nqkgd", part, keys[..., :D_V])
    return out.flatten(2, 3), lse


def ramp(shape: str, length: int, *, rise: float) -> Tensor:
    """Logits [length] that lead an online softmax from one maximum to the next.

    "rising" by `rise` in all, "falling" likewise, "peak" in the middle, "valley" there, "steps" of
    random levels 16 keys wide, "spikes" of full height every 97 keys.
    """
    x = torch.linspace(0, 1, length)
    if shape == "steps":
        levels = torch.rand(length // 16 + 1, generator=torch.Generator().manual_seed(length))
        x = levels.repeat_interleave(16)[:length]
    elif shape == "spikes":
        x = torch.where(torch.arange(length) % 97 == 96, x, torch.zeros(()))
    else:
        distance = (2 * x - 1).abs()
        shapes = {"rising": x, "falling": 1 - x, "peak": 1 - distance, "valley": distance}
        x = shapes[shape]
    return (x - 0.5) * rise


def logits_in_one_column(
    levels: Tensor, scale: float, column: int = -1, largest: float = 0.9 * 448
) -> tuple[Edit, KeyEdit]:
    """Edits that add levels[j] to every query's logit of key j, through one column of q and K.

    The column is a RoPE column if d_qk is 576: V does not have it. |K| stays within e4m3's range.
    largest: of |K| there; where V has the column it must not be large beside the others.
    """
    size = max(float(levels.abs().max()), 1e-3)
    key = largest * levels / size
    factor = size / largest / scale

    def edit_queries(q: Tensor) -> None:
        q[..., column] = factor

    def edit_keys(kv: Tensor, positions: Tensor) -> None:
        kv[..., column] = key.to(kv.device)[positions % len(key)][:, None]

    return edit_queries, edit_keys
