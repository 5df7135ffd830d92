"""Merging attention over disjoint sets of keys."""

from __future__ import annotations

from torch import Tensor

from flash_mla._ops import call, ops, refuse_grad


def merge_attn_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the results over each:
    lse = ln(exp(lse_a) + exp(lse_b)), out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b.

    Args:
        out_a, out_b: [n, h, d], bfloat16, float16 or float32.
        lse_a, lse_b: float32 [n, h], natural log. +inf or -inf: an empty part, whose out may
            hold anything.

    Returns:
        out [n, h, d], lse [n, h]. Both parts empty: out 0, lse +inf.

    Raises:
        ValueError: an argument breaks one of these rules; nothing is written then.
        NotImplementedError: no kernel of this build serves the call on this device.
        RuntimeError: an input requires grad while grad mode is on.
    """
    refuse_grad("merge_attn_states", out_a, lse_a, out_b, lse_b)
    out, lse = call(ops.merge_attn_states.default, out_a, lse_a, out_b, lse_b)
    return out, lse
