"""How close a result must be to float64, and why.

out: |out - ref| <= abs + rel |ref| for each element, and 1 - cosine(out, ref) <= angle for the
whole tensor. bf16 has 8 bits of significand, so rounding costs 2^-9 = 0.25/128 of a value. A tensor
core kernel rounds the probabilities to bf16, adds the products in fp32 and rounds the result to
bf16; splits add a rescaling. `rel` leaves room for these. Where values cancel, the error stays
while ref vanishes: `abs` is 1% of the size 0.1 that the inputs' values have. Neither sees a
softmax that is slightly wrong everywhere, which the angle does: 5e-6 allows an error of
sqrt(2 * 5e-6) = 0.3% of the norm, while rounding out to bf16 takes 0.1%.

lse: stays in fp32 throughout; 8/65536 is 2^-13, far above fp32 rounding and far below what the
loss of one key does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    abs: float
    rel: float
    angle: float
    lse_abs: float = 1e-6
    lse_rel: float = 8 / 65536


DECODE = Tolerance(abs=8e-4, rel=2.01 / 128, angle=5e-6)
PREFILL = Tolerance(abs=8e-4, rel=3.01 / 128, angle=7e-6)
# Any float32 scale: K is rounded to bf16 after scaling, so each logit moves by up to 2^-9 of the
# products that make it, and the lse with it.
DECODE_ROUNDED_K = replace(DECODE, lse_abs=1e-2)


# Logits of size `size` are sums of 36 MMA steps (576 columns, 16 a step), each of which may lose
# 2^-23 of the partial sum in fp32. The lse takes that over from its largest logits, and where it is
# itself near 0 a bound relative to it would leave no room: few keys, or a range from -x to x.
def decode_with_logits_of(size: float) -> Tolerance:
    return replace(DECODE, lse_abs=1e-6 + 36 * 2.0**-23 * size)


# Two decode results, each rounded to bf16, merged and rounded again.
MERGED_DECODE = replace(DECODE, rel=3.01 / 128, angle=7e-6)
# One rounding to the result's dtype after fp32 arithmetic of a few operations (2^-23 each).
MERGE_ROUNDING = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}
# Another float64 program that adds in another order: 2^-52 a step, a few hundred steps.
FLOAT64 = Tolerance(abs=1e-11, rel=1e-11, angle=1e-12, lse_abs=1e-11, lse_rel=1e-11)


def assert_out_close(actual: Tensor, expected: Tensor, tolerance: Tolerance) -> None:
    """Compares where `expected` is: large results need not leave the GPU."""
    got = actual.detach().to(expected.device).double()
    assert got.shape == expected.shape
    assert expected.isfinite().all(), "the reference itself must be finite"
    assert got.isfinite().all(), f"{int((~got.isfinite()).sum())} elements are NaN or Inf"
    error, allowed = (got - expected).abs(), tolerance.abs + tolerance.rel * expected.abs()
    worst = (error - allowed).amax() if error.numel() else torch.tensor(0.0)
    assert (error <= allowed).all(), (
        f"{int((error > allowed).sum())} of {error.numel()} elements are off, "
        f"the worst by {worst:.3g} beyond the bound"
    )
    norms = got.norm() * expected.norm()
    if expected.norm() == 0:
        assert got.norm() == 0, "rows without keys are exactly 0"
    else:
        angle = 1 - float((got * expected).sum() / norms)
        assert angle <= tolerance.angle, f"1 - cosine is {angle:.3g}"


def assert_gradient_close(actual: Tensor, expected: Tensor) -> None:
    """Gradients have no fixed size, so the bound follows their root mean square.

    delta = sum(d_out * out) takes the forward's out as it was rounded to bf16; its error is common
    to a row and meets probabilities of up to 1, so single elements are off by several percent of
    the root mean square even in fp32 (0.06 of it at most in 500 random cases); the norm is off by
    0.35% at most, and the angle's bound allows 0.63%. 1e-5 is fp32 rounding where all cancels: a
    row with a single key has no gradient for q and k.
    """
    got = actual.detach().cpu().double()
    assert got.shape == expected.shape
    assert got.isfinite().all(), f"{int((~got.isfinite()).sum())} elements are NaN or Inf"
    if not got.numel():
        return
    size = expected.square().mean().sqrt()
    error = (got - expected).abs()
    excess = error - (1e-5 + size / 8 + 3.01 / 128 * expected.abs())
    assert (excess <= 0).all(), (
        f"{int((excess > 0).sum())} of {error.numel()} elements are off, the worst by "
        f"{excess.amax():.3g} beyond the bound, at a root mean square of {size:.3g}"
    )
    if size > 1e-4:
        angle = 1 - float((got * expected).sum() / (got.norm() * expected.norm()))
        assert angle <= 2e-5, f"1 - cosine is {angle:.3g}"


def assert_lse_close(actual: Tensor, expected: Tensor, tolerance: Tolerance) -> None:
    got = actual.detach().to(expected.device).double()
    assert got.shape == expected.shape
    infinite = expected.isinf()
    assert torch.equal(got[infinite], expected[infinite]), "rows without keys"
    got, expected = got[~infinite], expected[~infinite]
    error, allowed = (got - expected).abs(), tolerance.lse_abs + tolerance.lse_rel * expected.abs()
    assert (error <= allowed).all(), (
        f"{int((~(error <= allowed)).sum())} of {error.numel()} are off, by up to {error.amax()}"
    )


def assert_bitwise_equal(actual: Tensor, expected: Tensor) -> None:
    """Also for NaN and for the sign of zero."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    same = actual.contiguous().view(torch.uint8) == expected.contiguous().view(torch.uint8)
    assert same.all(), f"{int((~same).sum())} of {same.numel()} bytes differ"
