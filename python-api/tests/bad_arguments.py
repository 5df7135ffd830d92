"""What a refusal must look like: the class of the error, its message, and outputs left alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import Decode
from torch import Tensor

DECODE_FUNCTION = "flash_mla_with_kvcache"
# A message ends with what to do: some imperative must be there.
REMEDY = (
    r"\b(pass|use|give|make|call|set|convert|cast|move|allocate|build|create|copy|slice|pad|drop|"
    r"remove|leave|repeat|expand|reshape|choose|pack|add|omit|clone|detach|install|split|store)\b"
    r"|\.(to|contiguous|float|int|view)\("
)


@dataclass(frozen=True)
class Bad:
    """One broken rule: what differs from a good call, and what the message must name.

    argument and value are regular expressions for whole words; value is what was seen.
    """

    name: str
    changes: Callable[[dict[str, Any]], dict[str, Any]]
    argument: str
    value: str
    error: type[Exception] | tuple[type[Exception], ...] = ValueError


def ids(bad: Bad) -> str:
    return bad.name.replace(" ", "_")


def wider(x: Tensor, columns: int) -> Tensor:
    return torch.cat([x, x[..., :columns]], dim=-1)


def misaligned(x: Tensor) -> Tensor:
    """The same values in rows that are one element longer, so that rows start anywhere."""
    return torch.nn.functional.pad(x, (0, 1))[..., :-1]


def cuts(x: Tensor, dim: int, size: int) -> Tensor:
    """x repeated along dim up to `size` entries."""
    repeats = [1] * x.dim()
    repeats[dim] = -(-size // x.shape[dim])
    return x.repeat(repeats).narrow(dim, 0, size).contiguous()


def assert_says(error: BaseException, bad: Bad, operators: str) -> None:
    message = str(error)
    for what, pattern in (
        ("the operator", operators),
        ("the argument", bad.argument),
        ("the value", rf"(?<![\w.])({bad.value})(?!\w)"),
    ):
        assert re.search(pattern, message), f"{what} ({pattern}) is not named in: {message}"
    assert re.search(REMEDY, message, re.IGNORECASE), f"no remedy in: {message}"


def assert_refused(bad: Bad, case: Decode, operators: str) -> None:
    """A call of the case with the bad argument; everything else about it is right."""
    q = case.inputs["q"]
    out = torch.full((*q.shape[:3], 512), 7.0, dtype=case.out_dtype, device=q.device)
    changes = bad.changes(case.inputs | {"out": out})
    given = changes.setdefault("out", out)
    before = given.clone()
    with pytest.raises(bad.error) as raised:
        case.run(**changes)
    assert_says(raised.value, bad, operators)
    assert torch.equal(given, before), "a refused call wrote to out"


def assert_call_refused(
    bad: Bad, call: Callable[..., Any], good: dict[str, Any], operators: str, output: str | None
) -> None:
    """The same for any function; `output` names the argument that would be written."""
    arguments = good | bad.changes(good)
    before = arguments[output].clone() if output is not None else None
    with pytest.raises(bad.error) as raised:
        call(**arguments)
    assert_says(raised.value, bad, operators)
    if output is not None and before is not None:
        now = arguments[output].contiguous().view(torch.uint8)
        assert torch.equal(now, before.contiguous().view(torch.uint8)), "it was written to"
