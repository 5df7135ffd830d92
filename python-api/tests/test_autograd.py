"""Gradients of dense prefill, against float64 autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import Backend
from cases import case_id, pairwise
from mha_cases import Varlen, varlen
from tolerances import assert_bitwise_equal, assert_gradient_close
from torch import Tensor

import flash_mla

LENGTHS = {
    "one": ([1], [1]),
    "square": ([33], [33]),
    "over_block": ([65], [130]),
    "fewer_keys": ([40, 3], [7, 1]),
    "mixed": ([9, 0, 4, 20], [33, 5, 0, 2]),
}
MATRIX = pairwise(
    dims=[(192, 128), (128, 128)],
    dtype=[torch.bfloat16, torch.float16],
    heads=[(1, 1), (3, 3), (8, 2), (9, 1)],
    lengths=list(LENGTHS),
    causal=[False, True],
    deterministic=[False, True],
    softmax_scale=[None, 0.2],
    layout=["contiguous", "packed", "transposed"],
)


def gradients(case: Varlen, d_out: Tensor, **options: Any) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    out, _ = flash_mla.flash_attn_varlen_func(*inputs, *case.lengths, **(case.options | options))
    return torch.autograd.grad(out, inputs, d_out)


def random_d_out(case: Varlen, gen: torch.Generator) -> Tensor:
    shape = (*case.q.shape[:2], case.v.shape[-1])
    return torch.randn(shape, generator=gen).to(case.q.dtype).to(case.q.device)


@pytest.mark.parametrize("case", MATRIX, ids=case_id)
def test_gradients_agree_with_float64_autograd(
    backend: Backend, gen: torch.Generator, case: dict[str, Any]
) -> None:
    options = dict(case)
    q_lengths, kv_lengths = LENGTHS[options.pop("lengths")]
    deterministic = options.pop("deterministic")
    inputs = varlen(gen, backend.device, q_lengths=q_lengths, kv_lengths=kv_lengths, **options)
    d_out = random_d_out(inputs, gen)
    found = gradients(inputs, d_out, deterministic=deterministic)
    for gradient, expected, x in zip(
        found, inputs.expected_gradients(d_out), (inputs.q, inputs.k, inputs.v), strict=True
    ):
        assert gradient.dtype == x.dtype
        assert_gradient_close(gradient, expected)


def test_rows_without_keys_give_no_gradient(backend: Backend, gen: torch.Generator) -> None:
    case = varlen(gen, backend.device, q_lengths=[5, 3], kv_lengths=[2, 0], causal=True)
    d_q, d_k, d_v = gradients(case, random_d_out(case, gen))
    assert (d_q[:3] == 0).all()
    assert (d_q[5:] == 0).all()
    assert all(g.isfinite().all() for g in (d_q, d_k, d_v))


def test_keys_that_no_query_sees_get_zero(backend: Backend, gen: torch.Generator) -> None:
    case = varlen(gen, backend.device, q_lengths=[0, 2], kv_lengths=[6, 3])
    _, d_k, d_v = gradients(case, random_d_out(case, gen))
    assert (d_k[:6] == 0).all()
    assert (d_v[:6] == 0).all()


def test_deterministic_gradients_are_bitwise_the_same(
    backend: Backend, gen: torch.Generator
) -> None:
    case = varlen(gen, backend.device, q_lengths=[70, 9], kv_lengths=[140, 9], heads=(8, 2))
    d_out = random_d_out(case, gen)
    first = gradients(case, d_out, deterministic=True)
    for _ in range(3):
        for again, before in zip(gradients(case, d_out, deterministic=True), first, strict=True):
            assert_bitwise_equal(again, before)


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_one_input_alone_may_require_grad(
    backend: Backend, gen: torch.Generator, needed: int
) -> None:
    case = varlen(gen, backend.device, q_lengths=[9], kv_lengths=[12], causal=True)
    d_out = random_d_out(case, gen)
    inputs = [case.q, case.k, case.v]
    inputs[needed] = inputs[needed].detach().requires_grad_()
    out, _ = flash_mla.flash_attn_varlen_func(*inputs, *case.lengths, **case.options)
    (found,) = torch.autograd.grad(out, [inputs[needed]], d_out)
    assert_gradient_close(found, case.expected_gradients(d_out)[needed])


def test_packed_forms_give_the_gradients_of_their_parts(
    backend: Backend, gen: torch.Generator
) -> None:
    case = varlen(gen, backend.device, q_lengths=[9, 20], kv_lengths=[9, 20], causal=True)
    d_out = random_d_out(case, gen)
    expected = case.expected_gradients(d_out)
    cu_seqlens, _, longest, _ = case.lengths

    kv = torch.cat([case.k, case.v], dim=-1).requires_grad_()
    q = case.q.detach().requires_grad_()
    out, _ = flash_mla.flash_attn_varlen_kvpacked_func(
        q, kv, cu_seqlens, cu_seqlens, longest, longest, 192, causal=True
    )
    d_q, d_kv = torch.autograd.grad(out, [q, kv], d_out)
    assert_gradient_close(d_q, expected[0])
    assert_gradient_close(d_kv, torch.cat(expected[1:], dim=-1))

    qkv = torch.cat([case.q, case.k, case.v], dim=-1).requires_grad_()
    out, _ = flash_mla.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, longest, 192, causal=True)
    (d_qkv,) = torch.autograd.grad(out, [qkv], d_out)
    assert_gradient_close(d_qkv, torch.cat(expected, dim=-1))


def test_a_strided_gradient_of_out_is_taken(backend: Backend, gen: torch.Generator) -> None:
    """`out.sum()` sends back one number with all strides zero."""
    case = varlen(gen, backend.device, q_lengths=[6], kv_lengths=[6])
    ones = torch.ones(6, 4, 128, dtype=torch.bfloat16, device=backend.device)
    expanded = torch.ones((), dtype=torch.bfloat16, device=backend.device).expand(6, 4, 128)
    for found, expected in zip(gradients(case, expanded), gradients(case, ones), strict=True):
        assert_bitwise_equal(found, expected)


def test_without_grad_nothing_is_recorded(backend: Backend, gen: torch.Generator) -> None:
    case = varlen(gen, backend.device, q_lengths=[6], kv_lengths=[6])
    assert case.run()[0].grad_fn is None
    case.q.requires_grad_()
    with torch.no_grad():
        assert case.run()[0].grad_fn is None
    assert case.run()[0].grad_fn is not None
