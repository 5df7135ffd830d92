"""The native library: loading it, its fake kernels, and the errors it raises.

`torch.ops.flash_mla.*` are the operators. Public functions add defaults and call forms; each then
makes one call, through `call` where a fraction of a microsecond does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def _distribution_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


__version__ = _distribution_version("flash-mla")


def _refuse_core(found: str, why: str = "") -> ImportError:
    return ImportError(
        f"flash_mla {__version__} needs libflash-mla of the same minor version, found {found}{why}"
        f"; pip install 'libflash-mla=={__version__}', or conda install libflash-mla={__version__}"
    )


def _load() -> dict[str, str]:
    """Loads the library, and returns what it and the core in it say of their build.

    The core must be of this package's minor version: its ABI may change with the next.
    """
    library = Path(__file__).parent / "libflash_mla_torch.so"
    if not library.exists():
        raise ImportError(
            f"flash_mla: {library} is missing; install the package (`pip install ./python-api`) "
            "instead of importing its source folder"
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:  # no core, or one without symbols that this library needs
        why = f" ({error.__cause__ or error})"
        raise _refuse_core(_distribution_version("libflash-mla"), why) from error
    lines = (line.partition("=") for line in torch.ops.flash_mla.build_info())
    info = {key: value for key, _, value in lines if key != "kv_format"}
    if __version__ != "unknown" and info["version"].split(".")[:2] != __version__.split(".")[:2]:
        raise _refuse_core(info["version"])
    return info


build_info = _load()
ops = torch.ops.flash_mla


def call(op: Callable[..., Any], *args: Any) -> Any:
    """Calls an operator; its errors have the classes that they stand for."""
    try:
        return op(*args)
    except RuntimeError as error:
        raise_tagged(error)
        raise


def raise_tagged(error: RuntimeError) -> None:
    """Raises ValueError or NotImplementedError in place of an operator's error that stands for it.

    The stable ABI has no way to raise those classes, so the native library tags the message.
    """
    for error_class in (ValueError, NotImplementedError):
        _, tag, message = str(error).partition(f"[{error_class.__name__}] ")
        if tag:
            raise error_class(message.splitlines()[0]) from None


def refuse_grad(function: str, *tensors: Tensor | None) -> None:
    """Inference operators have no backward: silence would give wrong gradients."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{function}: an input requires grad, but this operator has no backward; "
                    "call it under torch.no_grad() or torch.inference_mode()"
                )


def _decode_lse(q: Tensor) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def _out(q: Tensor, d_v: int) -> Tensor:
    dtype = torch.float16 if q.dtype == torch.float16 else torch.bfloat16
    return q.new_empty((*q.shape[:-1], d_v), dtype=dtype)


@torch.library.register_fake("flash_mla::mla_decode_dense")
def _(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    descale_q: Tensor | None,
    descale_k: Tensor | None,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor]:
    return _out(q, head_dim_v), _decode_lse(q)


@torch.library.register_fake("flash_mla::mla_decode_dense_out")
def _(q: Tensor, *_: Any) -> Tensor:
    return _decode_lse(q)


@torch.library.register_fake("flash_mla::mla_decode_sparse")
def _(
    q: Tensor,
    kv_cache: Tensor,
    indices: Tensor,
    topk_length: Tensor | None,
    attn_sink: Tensor | None,
    extra_kv_cache: Tensor | None,
    extra_indices: Tensor | None,
    extra_topk_length: Tensor | None,
    head_dim_v: int,
    softmax_scale: float,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor]:
    return _out(q, head_dim_v), _decode_lse(q)


@torch.library.register_fake("flash_mla::mla_decode_sparse_out")
def _(q: Tensor, *_: Any) -> Tensor:
    return _decode_lse(q)


def _prefill_rows(q: Tensor) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1]), dtype=torch.float32)


@torch.library.register_fake("flash_mla::mla_prefill_sparse")
def _(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    topk_length: Tensor | None,
    attn_sink: Tensor | None,
    d_v: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _out(q, d_v), _prefill_rows(q), _prefill_rows(q)


@torch.library.register_fake("flash_mla::mla_prefill_sparse_out")
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _prefill_rows(q), _prefill_rows(q)


def _head_major_lse(q: Tensor) -> Tensor:
    return q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32).t()


@torch.library.register_fake("flash_mla::mha_prefill_dense")
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _out(q, v.shape[-1]), _head_major_lse(q)


@torch.library.register_fake("flash_mla::mha_prefill_dense_out")
def _(q: Tensor, *_: Any) -> Tensor:
    return _head_major_lse(q)


@torch.library.register_fake("flash_mla::mha_prefill_dense_train")
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _out(q, v.shape[-1]), _head_major_lse(q)


@torch.library.register_fake("flash_mla::mha_prefill_dense_backward")
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake("flash_mla::merge_attn_states")
def _(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


@torch.library.register_fake("flash_mla::merge_attn_states_out")
def _(out_a: Tensor, lse_a: Tensor, *_: Any) -> Tensor:
    return lse_a.new_empty(lse_a.shape)


@torch.library.register_fake("flash_mla::kv_cache_append_")
def _(*_: Any) -> None:
    return None


@torch.library.register_fake("flash_mla::kv_cache_gather")
def _(
    cache: Tensor,
    slot_mapping: Tensor,
    format: str,
    scale: Tensor | None,
    d_qk: int,
    dtype: torch.dtype,
) -> Tensor:
    return cache.new_empty((slot_mapping.shape[0], cache.shape[2], d_qk), dtype=dtype)


@torch.library.register_fake("flash_mla::kv_cache_gather_out")
def _(*_: Any) -> None:
    return None
