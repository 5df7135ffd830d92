"""The backends under test. To run every test on another one, list it here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

OPERATORS = (
    "mla_decode_dense",
    "mla_decode_sparse",
    "mla_prefill_sparse",
    "mha_prefill_dense",
    "merge_attn_states",
    "kv_cache_append",
    "kv_cache_gather",
)
# As an error names the operator that it is about: "mla_decode_dense: no kernel ...".
_ABOUT = re.compile(rf"\b({'|'.join(OPERATORS)})\w*: ")


@dataclass(frozen=True)
class Backend:
    """Where a test runs: a device, and the row of kernels that must serve it.

    name: what a test's id shows.
    device: where the inputs are.
    kernel: FLASH_MLA_KERNEL for the tests of this backend; None leaves the choice to the library.
    unserved: operators without kernels here so far: NotImplementedError about one of them is a
        reason to skip, with the library's words. About any other operator it is a failure.
    skip_reason: why nothing can run here, None if it can.
    """

    name: str
    device: str
    kernel: str | None = None
    unserved: tuple[str, ...] = ()
    skip_reason: str | None = None

    @property
    def row(self) -> str:
        """The kernels that serve decode here, as far as the names of variants tell."""
        if self.device == "cpu":
            return "cpu"
        hopper = torch.cuda.get_device_capability()[0] == 9
        return "sm90" if hopper and self.kernel is None else "portable"

    def need_not_serve(self, error: Exception) -> bool:
        """Whether the error says that an operator has no kernel here, and it is in `unserved`."""
        # torch.ops, called without the package's functions, gives a RuntimeError with this tag.
        refused = isinstance(error, NotImplementedError) or "[NotImplementedError]" in str(error)
        about = _ABOUT.search(str(error))
        return refused and about is not None and about[1] in self.unserved


_NO_GPU = None if torch.cuda.is_available() else "no CUDA device"
_ON_GPUS = (
    "mla_decode_dense",
    "mla_decode_sparse",
    "merge_attn_states",
    "kv_cache_append",
    "kv_cache_gather",
)
_NOT_ON_GPUS = tuple(x for x in OPERATORS if x not in _ON_GPUS)

BACKENDS = [
    Backend("cpu", "cpu"),
    Backend("cuda", "cuda", unserved=_NOT_ON_GPUS, skip_reason=_NO_GPU),
    Backend("cuda_portable", "cuda", kernel="portable", unserved=_NOT_ON_GPUS, skip_reason=_NO_GPU),
]
GPU_BACKENDS = [b for b in BACKENDS if b.device == "cuda"]


def parameters(backends: Iterable[Backend]) -> list[Any]:
    """As pytest's parametrize and fixture take them."""
    return [
        pytest.param(
            b, id=b.name, marks=pytest.mark.skipif(bool(b.skip_reason), reason=str(b.skip_reason))
        )
        for b in backends
    ]
