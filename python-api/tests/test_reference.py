"""flash_mla.reference is the written definition: it agrees with these tests' own to rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cases
import device_decode
import device_sparse_decode
import float64_reference
import kv_cache_bytes
import pytest
import torch
from backends import Backend
from cases import Decode, case_id, dense_decode, index_lists, normal, pairwise, sparse_decode
from device_sparse_decode import Lists
from mha_cases import varlen
from tolerances import FLOAT64, assert_lse_close, assert_out_close
from torch import Tensor

from flash_mla import reference

INF = float("inf")

DENSE = pairwise(
    lambda case: case["kv_format"] != "v32_fp8" or (case["heads"][1] == 1 and case["d_qk"] == 576),
    kv_format=["bf16", "fp16", "fp8", "v32_fp8"],
    d_qk=[576, 512],
    heads=[(1, 1), (9, 3), (64, 1)],
    page_size=[1, 16, 64],
    lengths=[[0], [1, 40], [130, 0, 64]],
    s_q=[1, 3],
    causal=[False, True],
    softmax_scale=[None, 0.07],
    descales=["none", "one", "per_request"],
    fp8_q=[False, True],
)


def assert_same(found: tuple[Tensor, Tensor], inputs: Decode) -> None:
    assert found[0].dtype == found[1].dtype == torch.float64
    assert_out_close(found[0], inputs.expected_out, FLOAT64)
    assert_lse_close(found[1], inputs.expected_lse, FLOAT64)


@pytest.mark.parametrize("case", DENSE, ids=case_id)
def test_dense_decode(backend: Backend, gen: torch.Generator, case: dict[str, Any]) -> None:
    case = case | {"fp8_q": case["fp8_q"] and case["kv_format"] == "fp8"}
    inputs = dense_decode(gen, backend.device, **case)
    x = inputs.inputs
    found = reference.mla_decode_dense(
        x["q"],
        x["k_cache"],
        x["block_table"],
        x["cache_seqlens"],
        descale_q=x.get("descale_q"),
        descale_k=x.get("descale_k"),
        **inputs.options,
    )
    assert_same(found, inputs)


BATCHED = pairwise(
    lambda case: not case["fmt"].startswith("v32") or (case["h_kv"] == 1 and case["d_qk"] == 576),
    fmt=[f.name for f in device_decode.ALL_FORMATS],
    d_qk=[576, 512],
    h_kv=[1, 3],
    page_size=[1, 16, 64],
    lengths=[[0], [1, 40], [130, 0, 64, 2], [7] * 9],
    s_q=[1, 3],
    causal=[False, True],
    softmax_scale=[None, 0.07, 0.0, -0.03],
    layout=["contiguous", "strided", "transposed"],
    invalid_pages=[0.0, 0.3],
)


@pytest.mark.parametrize("case", BATCHED, ids=case_id)
def test_the_answer_to_many_requests_at_once_is_that_of_one_by_one(
    backend: Backend,
    gen: torch.Generator,
    case: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """device_decode.py, by which large cases are judged; here it takes many steps."""
    monkeypatch.setattr(device_decode, "KEYS_A_STEP", 50)
    monkeypatch.setattr(device_decode, "STEP_BYTES", 100 * 8 * 576)
    fmt = next(f for f in device_decode.ALL_FORMATS if f.name == case["fmt"])
    shapes = {name: x for name, x in case.items() if name not in ("fmt", "h_kv")}
    heads = (3, case["h_kv"])
    inputs = device_decode.dense_decode(gen, backend.device, heads=heads, **fmt.build(), **shapes)
    x = {name: t.cpu() for name, t in inputs.inputs.items()}
    b = len(case["lengths"])
    scale = case["softmax_scale"]
    expected = float64_reference.mla_decode_dense(
        kv_cache_bytes.decode(x["q"], "fp8" if fmt.fp8_q else "bf16"),
        kv_cache_bytes.decode(cases.to_device(inputs.inputs["k_cache"], "cpu"), fmt.kv_format),
        x["block_table"],
        x["cache_seqlens"],
        case["d_qk"] ** -0.5 if scale is None else scale,
        case["causal"],
        *(x[d].double().expand(b) if d in x else None for d in ("descale_q", "descale_k")),
    )
    assert_out_close(inputs.expected_out, expected[0], FLOAT64)
    assert_lse_close(inputs.expected_lse, expected[1], FLOAT64)


def test_dense_decode_masks_pages_outside_the_pool(backend: Backend, gen: torch.Generator) -> None:
    def edit(table: Tensor, num_pages: int) -> None:
        table[0, 0], table[0, 1], table[1, 0] = num_pages, -1, 2**31 - 1

    inputs = dense_decode(gen, backend.device, lengths=[200, 60], s_q=2, edit_table=edit)
    names = ("q", "k_cache", "block_table", "cache_seqlens")
    assert_same(reference.mla_decode_dense(*(inputs.inputs[name] for name in names)), inputs)


SPARSE = pairwise(
    kv_format=["v32_fp8", "v4_fp8", "v41_fp8", "bf16"],
    h_q=[1, 9, 64],
    page_size=[3, 64],
    topk=[0, 1, 70],
    invalid=["none", "some", "all"],
    topk_length=[None, [0, 1]],
    attn_sink=[None, (0.5, INF, -INF)],
    extra_topk=[None, 20],
    extra_topk_length=[None, [9, 0]],
    softmax_scale=[None, 0.07],
)


@pytest.mark.parametrize("case", SPARSE, ids=case_id)
def test_sparse_decode(backend: Backend, gen: torch.Generator, case: dict[str, Any]) -> None:
    options = dict(case)
    extra_topk = options.pop("extra_topk")
    if extra_topk is not None:
        fp4_beside_fp8 = case["kv_format"] == "v41_fp8" and case["h_q"] != 9
        extra_format = "v41_fp4" if fp4_beside_fp8 else case["kv_format"]
        options["extra"] = (extra_format, 2, extra_topk)
    inputs = sparse_decode(gen, backend.device, **options)
    x = inputs.inputs
    found = reference.mla_decode_sparse(
        x["q"],
        x["k_cache"],
        x["indices"],
        softmax_scale=case["softmax_scale"],
        attn_sink=x.get("attn_sink"),
        topk_length=x.get("topk_length"),
        extra_k_cache=x.get("extra_k_cache"),
        extra_indices=x.get("extra_indices_in_kvcache"),
        extra_topk_length=x.get("extra_topk_length"),
    )
    assert_same(found, inputs)


EXTRA = {
    "none": None,
    "few": Lists(5, page_size=2),
    "many": Lists(90, lengths=[60, 0, 1], page_size=100),
}
SPARSE_BATCHED = pairwise(
    fmt=[f.name for f in device_sparse_decode.ALL_SPARSE_FORMATS],
    b=[1, 3],
    s_q=[1, 2],
    topk=[0, 1, 70],
    page_size=[1, 3, 64],
    invalid=["none", "some", "all"],
    lengths=[None, [0, 1, 100]],
    extra=list(EXTRA),
    attn_sink=[None, (0.5, INF, -INF)],
    softmax_scale=[None, 0.07, 0.0, -0.03],
    layout=["contiguous", "strided", "transposed"],
)


@pytest.mark.parametrize("case", SPARSE_BATCHED, ids=case_id)
def test_the_answer_to_many_lists_at_once_is_that_of_one_by_one(
    backend: Backend,
    gen: torch.Generator,
    case: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """device_sparse_decode.py; a step takes two or three queries."""
    monkeypatch.setattr(device_decode, "STEP_BYTES", 200 * 8 * 576)
    fmt = next(f for f in device_sparse_decode.ALL_SPARSE_FORMATS if f.name == case["fmt"])
    b = case["b"]
    lists, extra = (
        one and replace(one, lengths=one.lengths and one.lengths[:b])
        for one in (
            Lists(case["topk"], case["lengths"], case["invalid"], case["page_size"]),
            EXTRA[case["extra"]],
        )
    )
    shapes = {x: case[x] for x in ("b", "s_q", "attn_sink", "softmax_scale", "layout")}
    inputs = device_sparse_decode.sparse_decode(
        gen, backend.device, h_q=3, lists=lists, extra=extra, **shapes, **fmt.build()
    )
    x = inputs.inputs
    sets: list[Any] = []
    for kv_format, names in zip(
        (inputs.kv_format, inputs.extra_format), device_sparse_decode.SETS, strict=True
    ):
        cache, indices, length = (x.get(name) for name in names)
        if cache is not None:
            cache = kv_cache_bytes.decode(cases.to_device(cache, "cpu"), kv_format)
        sets.append([cache, *(y if y is None else y.cpu() for y in (indices, length))])
    (cache, indices, length), second = sets
    scale = case["softmax_scale"]
    expected = float64_reference.mla_decode_sparse(
        x["q"].double().cpu(),
        cache,
        indices,
        fmt.d_qk**-0.5 if scale is None else scale,
        length,
        x["attn_sink"].double().cpu() if "attn_sink" in x else None,
        *second,
    )
    assert_out_close(inputs.expected_out, expected[0], FLOAT64)
    assert_lse_close(inputs.expected_lse, expected[1], FLOAT64)


@pytest.mark.parametrize("invalid", ["none", "some", "all"])
@pytest.mark.parametrize("with_options", [False, True])
def test_sparse_prefill(
    backend: Backend, gen: torch.Generator, invalid: str, with_options: bool
) -> None:
    lengths = [3, 0, 20, 9] if with_options else None
    lists, used = index_lists(gen, 4, 1, 50, 20, invalid, lengths)
    q = normal(gen, 4, 9, 576, std=3.0).bfloat16()
    kv = normal(gen, 50, 1, 576, std=0.1).bfloat16()
    kv[~used] = torch.nan
    options: dict[str, Tensor] = {}
    if lengths is not None:
        options["topk_length"] = torch.tensor(lengths, dtype=torch.int32)
        options["attn_sink"] = torch.tensor([0.5, INF, -INF]).repeat(3)
    expected = float64_reference.mla_prefill_sparse(
        q.double(), kv.double(), lists, 0.05, *(x.double() for x in options.values())
    )
    found = reference.mla_prefill_sparse(
        *(x.to(backend.device) for x in (q, kv, lists)),
        0.05,
        **{name: x.to(backend.device) for name, x in options.items()},
    )
    assert_out_close(found[0], expected[0], FLOAT64)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert_lse_close(one, other, FLOAT64)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(3, 1), (4, 4)])
@pytest.mark.parametrize("softmax_scale", [None, 0.2])
def test_dense_prefill(
    backend: Backend,
    gen: torch.Generator,
    heads: tuple[int, int],
    causal: bool,
    softmax_scale: float | None,
) -> None:
    case = varlen(
        gen, backend.device, q_lengths=[9, 0, 1, 20], kv_lengths=[33, 5, 0, 4], heads=heads,
        causal=causal, softmax_scale=softmax_scale,
    )  # fmt: skip
    cu_q, cu_kv, _, _ = case.lengths
    out, lse = reference.mha_prefill_dense(case.q, case.k, case.v, cu_q, cu_kv, **case.options)
    expected_out, expected_lse = case.expected()
    assert_out_close(out, expected_out, FLOAT64)
    assert_lse_close(lse, expected_lse, FLOAT64)


def test_merge_attn_states(backend: Backend, gen: torch.Generator) -> None:
    inputs = [normal(gen, 20, 9, *d, std=1.0) for d in ((64,), (), (64,), ())]
    inputs[1][:3], inputs[1][3:6], inputs[3][2:4] = INF, -INF, INF
    inputs[0][:6], inputs[2][2:4] = torch.nan, torch.nan
    expected = float64_reference.merge_attn_states(*(x.double() for x in inputs))
    out, lse = reference.merge_attn_states(*(x.double().to(backend.device) for x in inputs))
    assert_out_close(out, expected[0], FLOAT64)
    assert_lse_close(lse, expected[1], FLOAT64)


@pytest.mark.parametrize("name", [*kv_cache_bytes.PLAIN, *kv_cache_bytes.PACKED])
def test_kv_cache_unpack(backend: Backend, gen: torch.Generator, name: str) -> None:
    packed = kv_cache_bytes.PACKED.get(name)
    kv = normal(gen, 3, 5, 1, packed.d_qk if packed else 576, std=1.0)
    cache = kv_cache_bytes.encode(kv, name, scales="any" if name == "v32_fp8" else "power_of_two")
    found = reference.kv_cache_unpack(cache.to(backend.device), name, dtype=torch.float64)
    assert torch.equal(found.cpu(), kv_cache_bytes.decode(cache, name))
