"""Sparse prefill: lists of tokens over an unpaged bf16 latent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import float64_reference
import pytest
import torch
from backends import Backend
from cases import (
    KV_STD,
    Q_STD,
    case_id,
    every_second,
    index_lists,
    normal,
    padded_rows,
    pairwise,
    poison,
    randint,
    swapped,
)
from tolerances import PREFILL, assert_bitwise_equal, assert_lse_close, assert_out_close
from torch import Tensor

import flash_mla

INF = float("inf")


@dataclass
class Prefill:
    """One call of flash_mla_sparse_fwd, and its answer in float64."""

    inputs: dict[str, Any]
    expected: tuple[Tensor, Tensor, Tensor]

    def run(self, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
        arguments = self.inputs | changes
        if "out" not in changes:
            q = arguments["q"]
            out = poison(*q.shape[:2], 512, dtype=q.dtype, device=str(q.device))
            arguments["out"] = out
        result: tuple[Tensor, Tensor, Tensor] = flash_mla.flash_mla_sparse_fwd(**arguments)
        return result

    def check(self) -> None:
        out, max_logits, lse = self.run()
        assert out.dtype == torch.bfloat16
        assert max_logits.dtype == lse.dtype == torch.float32
        assert_out_close(out, self.expected[0], PREFILL)
        assert_lse_close(max_logits, self.expected[1], PREFILL)
        assert_lse_close(lse, self.expected[2], PREFILL)


def sparse_prefill(
    gen: torch.Generator,
    device: str,
    *,
    s_q: int = 5,
    s_kv: int = 100,
    h_q: int = 16,
    d_qk: int = 576,
    topk: int = 64,
    invalid: str = "some",
    topk_length: Sequence[int] | None = None,
    attn_sink: Sequence[float] | None = None,
    layout: str = "contiguous",
    sm_scale: float = 0.05,
    q_std: float = Q_STD,
) -> Prefill:
    lists, used = index_lists(gen, s_q, 1, s_kv, topk, invalid, topk_length)
    q = normal(gen, s_q, h_q, d_qk, std=q_std).bfloat16()
    kv = normal(gen, s_kv, 1, d_qk, std=KV_STD).bfloat16()
    kv[~used] = torch.nan
    lengths = None if topk_length is None else torch.tensor(topk_length, dtype=torch.int32)
    sink = None
    if attn_sink is not None:
        sink = torch.tensor([attn_sink[h % len(attn_sink)] for h in range(h_q)])
    expected = float64_reference.mla_prefill_sparse(
        q.double(),
        kv.double(),
        lists,
        sm_scale,
        lengths,
        None if sink is None else sink.double(),
    )
    q, kv, lists = q.to(device), kv.to(device), lists.to(device)
    if layout == "strided":
        q, kv, lists = padded_rows(q), padded_rows(kv), padded_rows(lists, 3)
    elif layout == "transposed":
        q, kv = swapped(q.unsqueeze(0))[0], every_second(kv)
        q = q.transpose(0, 1).contiguous().transpose(0, 1)
    inputs: dict[str, Any] = {"q": q, "kv": kv, "indices": lists, "sm_scale": sm_scale}
    if lengths is not None:
        inputs["topk_length"] = lengths.to(device)
    if sink is not None:
        inputs["attn_sink"] = sink.to(device)
    return Prefill(inputs, expected)


MATRIX = pairwise(
    s_q=[1, 2, 7],
    s_kv=[1, 3, 100, 513],
    h_q=[1, 3, 9, 63, 64, 126, 128],
    d_qk=[576, 512],
    topk=[1, 7, 64, 128, 200],
    invalid=["none", "some", "all"],
    topk_length=["absent", "mixed", "zero"],
    attn_sink=[None, (0.5,), (-INF, 1.0, INF)],
    layout=["contiguous", "strided", "transposed"],
)


@pytest.mark.parametrize("case", MATRIX, ids=case_id)
def test_agrees_with_float64(backend: Backend, gen: torch.Generator, case: dict[str, Any]) -> None:
    s_q, topk = case["s_q"], case["topk"]
    lengths = {
        "absent": None,
        "mixed": [[topk // 2, 0, topk, topk + 9][i % 4] for i in range(s_q)],
        "zero": [0] * s_q,
    }[case["topk_length"]]
    sparse_prefill(gen, backend.device, **(case | {"topk_length": lengths})).check()


def test_many_queries_and_long_lists(backend: Backend, gen: torch.Generator) -> None:
    sparse_prefill(gen, backend.device, s_q=130, s_kv=3000, h_q=8, topk=512).check()
    sparse_prefill(gen, backend.device, s_q=2, s_kv=5000, topk=2048, topk_length=[2048, 7]).check()


def test_sharp_softmax(backend: Backend, gen: torch.Generator) -> None:
    sparse_prefill(gen, backend.device, topk=300, q_std=80, invalid="none").check()


def test_more_queries_than_a_grid_dimension_holds(backend: Backend, gen: torch.Generator) -> None:
    """One key each, so a row of out is that key, and logits are plain dot products."""
    s_q, s_kv = 70_000, 50
    q = normal(gen, s_q, 1, 512, std=1.0).bfloat16()
    kv = normal(gen, s_kv, 1, 512, std=KV_STD).bfloat16()
    indices = randint(gen, 0, s_kv, (s_q, 1, 1)).int()
    named = kv[indices[:, 0, 0].long()]
    on_device = [x.to(backend.device) for x in (q, kv, indices)]
    out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(*on_device, 0.05)
    assert_bitwise_equal(out.cpu(), named)
    expected = (q.double() * named.double()).sum(-1) * 0.05
    # Sums of 512 products can cancel, so the bound is fp32 rounding of their magnitudes.
    assert (lse.cpu().double() - expected).abs().amax() <= 1e-5
    assert_bitwise_equal(max_logits, lse)


def test_rows_without_keys(backend: Backend, gen: torch.Generator) -> None:
    for attn_sink in (None, (0.0, INF, -INF)):
        inputs = sparse_prefill(gen, backend.device, invalid="all", attn_sink=attn_sink)
        out, max_logits, lse = inputs.run()
        assert (out == 0).all()
        assert (max_logits == -INF).all()
        assert (lse == INF).all()


def test_no_keys_at_all(backend: Backend, gen: torch.Generator) -> None:
    """An empty list, and an empty latent that every index misses."""
    q = normal(gen, 3, 4, 576, std=1.0).bfloat16().to(backend.device)
    for s_kv, topk in ((5, 0), (0, 4)):
        kv = torch.zeros(s_kv, 1, 576, dtype=torch.bfloat16, device=backend.device)
        indices = torch.zeros(3, 1, topk, dtype=torch.int32, device=backend.device)
        out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.05)
        assert (out == 0).all()
        assert (max_logits == -INF).all()
        assert (lse == INF).all()


def test_no_queries_give_empty_results(backend: Backend) -> None:
    q = torch.zeros(0, 16, 576, dtype=torch.bfloat16, device=backend.device)
    kv = torch.zeros(9, 1, 576, dtype=torch.bfloat16, device=backend.device)
    indices = torch.zeros(0, 1, 4, dtype=torch.int32, device=backend.device)
    out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.05)
    assert out.shape == (0, 16, 512)
    assert max_logits.shape == lse.shape == (0, 16)


def test_sinks_leave_lse_and_max_logits_alone(backend: Backend, gen: torch.Generator) -> None:
    inputs = sparse_prefill(gen, backend.device)
    out, max_logits, lse = inputs.run()
    for value, factor in ((-INF, 1), (INF, 0)):
        sink = torch.full((16,), value, device=backend.device)
        sink_out, sink_max, sink_lse = inputs.run(attn_sink=sink)
        # == rather than bitwise: a negative zero is a zero
        assert (sink_out == out * factor).all()
        assert_bitwise_equal(sink_max, max_logits)
        assert_bitwise_equal(sink_lse, lse)


def test_nan_of_one_list_stays_there(backend: Backend, gen: torch.Generator) -> None:
    """The last token is poisoned, and named by the third query alone."""
    inputs = sparse_prefill(gen, backend.device, invalid="none")
    inputs.inputs["indices"][2, 0, 3] = 99
    out, _, lse = inputs.run()
    assert out[2].isnan().all()
    rest = [0, 1, 3, 4]
    assert_out_close(out[rest], inputs.expected[0][rest], PREFILL)
    assert_lse_close(lse[rest], inputs.expected[2][rest], PREFILL)


def test_results_are_bitwise_the_same_from_run_to_run(
    backend: Backend, gen: torch.Generator
) -> None:
    inputs = sparse_prefill(gen, backend.device, s_q=40, h_q=64, topk=200, s_kv=400)
    first = inputs.run()
    for _ in range(3):
        for again, before in zip(inputs.run(), first, strict=True):
            assert_bitwise_equal(again, before)


def test_a_query_does_not_depend_on_the_others(backend: Backend, gen: torch.Generator) -> None:
    inputs = sparse_prefill(gen, backend.device, s_q=6, topk_length=[64, 0, 30, 64, 1, 64])
    whole = inputs.run()
    for i in range(6):
        part = {name: inputs.inputs[name][i : i + 1] for name in ("q", "indices", "topk_length")}
        for row, full in zip(inputs.run(**part, out=None), whole, strict=True):
            assert_bitwise_equal(row, full[i : i + 1])
