"""Served logits and tokens against the reference's, by a rule that does not flicker.

Both sides see the same tokens (the served model is teacher-forced on the reference's), the same
weights and the same rounded cache. What is left is rounding to bfloat16 on the way, and a bound on
what it can do to a logit. A token counts only where the reference prefers it so clearly that two
errors of that size could not change the choice, with a factor of two to spare: its best logit
leads the second by more than 4 bounds. The other tokens are printed as undecided.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .scheduler import Request

# Relative root-mean-square error of one rounding to bfloat16 (8 significant bits): the error is
# uniform over one unit in the last place, 2^-7 of the power of two below the value, and
# mantissas are distributed like 1/m on [1, 2):  2^-7 / sqrt(12) / sqrt(3 / (2 ln 2)).
BF16_ROUNDING = 2**-7 / 12**0.5 / 1.47

# Roundings to bfloat16 per layer that the reference does not make, by the dtype of the rest of
# the model. float32: q, k, v, the softmax weights inside the kernel and the output in prefill;
# the absorbed q, the softmax weights and the output in decode. bfloat16: besides these the result
# of every module: norms (twice each), projections, RoPE, MLP, residual sums.
ROUNDINGS_PER_LAYER = {torch.float32: 4, torch.bfloat16: 32}

# The bound in standard deviations of the noise that the roundings predict. The largest of 10^5
# normally distributed errors is about 4.4 of them. Measured over 20 seeds of the model's weights:
# the error's standard deviation is 0.74 to 0.93 of the prediction, the largest error 3.6 to 4.3
# of them in float32 and 3.8 to 5.4 in bfloat16. Mistakes in attention (see this example's test)
# move the logits of a request that they touch by 10 to 400.
BOUND_SIGMAS = 8.0


def logit_bound(reference_logits: Tensor, num_layers: int, dtype: torch.dtype) -> float:
    """How far a served logit may be from the reference's.

    Roundings are independent, so their relative errors add in squares, and each layer's share of
    the final hidden state is at most the whole: a logit's noise has a standard deviation of about
    BF16_ROUNDING * sqrt(number of roundings), relative to that of the logits themselves.

    Args:
        reference_logits: [tokens, vocab_size].
        num_layers: Layers of the model.
        dtype: Of weights and activations outside attention.
    """
    relative_noise = BF16_ROUNDING * (ROUNDINGS_PER_LAYER[dtype] * num_layers) ** 0.5
    return BOUND_SIGMAS * relative_noise * float(reference_logits.std())


@dataclass
class Comparison:
    """One request's served logits against the reference's.

    Attributes:
        name: The request.
        prompt_tokens: Length of its prompt.
        generated_tokens: Tokens compared.
        max_logit_diff: Largest |served - reference| of all its logits; NaN if any is.
        within_bound: max_logit_diff is at most the bound (and not NaN).
        decided: How many tokens count.
        wrong: Tokens that count and differ, each as text.
        undecided: Tokens that do not count, each as text.
    """

    name: str
    prompt_tokens: int
    generated_tokens: int
    max_logit_diff: float
    within_bound: bool
    decided: int = 0
    wrong: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.within_bound and not self.wrong


def compare(request: Request, reference_logits: Tensor, bound: float) -> Comparison:
    """Compares a finished request, teacher-forced on the reference's tokens.

    Args:
        request: Its logits are [vocab_size] per generated token.
        reference_logits: [generated tokens, vocab_size].
        bound: From `logit_bound`.
    """
    served_logits = torch.stack(request.logits)
    max_diff = float((served_logits - reference_logits).abs().max())
    result = Comparison(
        name=request.name,
        prompt_tokens=len(request.prompt),
        generated_tokens=request.num_generated,
        max_logit_diff=max_diff,
        within_bound=max_diff <= bound,
    )
    top_logits, top_tokens = reference_logits.topk(2, dim=-1)
    gaps = (top_logits[:, 0] - top_logits[:, 1]).tolist()
    expected = top_tokens[:, 0].tolist()
    served = served_logits.argmax(dim=-1).tolist()
    for i, (gap, want, got) in enumerate(zip(gaps, expected, served, strict=True)):
        choice = f"{i}" if got == want else f"{i} (reference {want}, served {got})"
        if gap <= 4 * bound:
            result.undecided.append(choice)
            continue
        result.decided += 1
        if got != want:
            result.wrong.append(choice)
    return result


def format_table(results: list[Comparison]) -> str:
    header = ("request", "prompt tokens", "generated tokens", "max logit diff", "decided", "same")
    rows = [
        (
            result.name,
            str(result.prompt_tokens),
            str(result.generated_tokens),
            f"{result.max_logit_diff:.4f}" + ("" if result.within_bound else " > bound"),
            str(result.decided),
            "NO" if result.wrong else "yes",
        )
        for result in results
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
