"""Inputs for dense prefill over sequences of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import float64_reference
import torch
from cases import normal
from torch import Tensor

import flash_mla


def cumulative(lengths: Sequence[int]) -> list[int]:
    total = [0]
    for n in lengths:
        total.append(total[-1] + n)
    return total


@dataclass
class Varlen:
    """One call of flash_attn_varlen_func; float64 results and gradients on demand."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_lengths: list[int]
    kv_lengths: list[int]
    causal: bool
    softmax_scale: float | None

    @property
    def lengths(self) -> tuple[Tensor, Tensor, int, int]:
        """cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv"""
        device = self.q.device
        return (
            torch.tensor(cumulative(self.q_lengths), dtype=torch.int32, device=device),
            torch.tensor(cumulative(self.kv_lengths), dtype=torch.int32, device=device),
            max(self.q_lengths, default=0),
            max(self.kv_lengths, default=0),
        )

    @property
    def options(self) -> dict[str, Any]:
        return {"causal": self.causal, "softmax_scale": self.softmax_scale}

    def run(self, **changes: Any) -> tuple[Tensor, Tensor]:
        out, lse = flash_mla.flash_attn_varlen_func(
            self.q, self.k, self.v, *self.lengths, **(self.options | changes)
        )
        return out, lse

    def expected(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """For other inputs than its own, give float64 q, k and v."""
        q, k, v = inputs or (x.detach().cpu().double() for x in (self.q, self.k, self.v))
        scale = self.softmax_scale if self.softmax_scale is not None else q.shape[-1] ** -0.5
        cu_q, cu_kv = cumulative(self.q_lengths), cumulative(self.kv_lengths)
        return float64_reference.mha_prefill_dense(q, k, v, cu_q, cu_kv, scale, self.causal)

    def expected_gradients(self, d_out: Tensor) -> tuple[Tensor, ...]:
        inputs = [x.detach().cpu().double().requires_grad_() for x in (self.q, self.k, self.v)]
        out, _ = self.expected(*inputs)
        found = torch.autograd.grad(out, inputs, d_out.cpu().double(), allow_unused=True)
        return tuple(
            torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)
        )


def varlen(
    gen: torch.Generator,
    device: str,
    *,
    q_lengths: Sequence[int],
    kv_lengths: Sequence[int],
    heads: tuple[int, int] = (4, 4),
    dims: tuple[int, int] = (192, 128),
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = False,
    softmax_scale: float | None = None,
    layout: str = "contiguous",
    q_std: float = 1.0,
) -> Varlen:
    """Logits of standard deviation q_std * 0.3; v of size 0.1, as tolerances.py assumes.

    layout: "contiguous"; "packed", where k and v are slices of one tensor; or "transposed", where
    heads are stored before tokens.
    """
    (h_q, h_kv), (d_qk, d_v) = heads, dims
    t_q, t_k = sum(q_lengths), sum(kv_lengths)
    q = normal(gen, t_q, h_q, d_qk, std=q_std).to(dtype).to(device)
    kv = normal(gen, t_k, h_kv, d_qk + d_v, std=0.3)
    kv[..., d_qk:] /= 3
    kv = kv.to(dtype).to(device)
    k, v = kv[..., :d_qk], kv[..., d_qk:]
    if layout == "contiguous":
        k, v = k.contiguous(), v.contiguous()
    elif layout == "transposed":
        q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    return Varlen(q, k, v, list(q_lengths), list(kv_lengths), causal, softmax_scale)
