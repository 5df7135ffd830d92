"""flash_mla_with_kvcache refuses what breaks a rule, says how to mend it, and writes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import Backend
from bad_arguments import DECODE_FUNCTION, Bad, assert_refused, cuts, ids, misaligned, wider
from cases import dense_decode, sparse_decode

UNSERVED = (ValueError, NotImplementedError)  # which of them is up to the variant table

DENSE = [
    Bad("q has rank 3", lambda x: {"q": x["q"][0]}, r"\bq\b", "2, 16, 576"),
    Bad("q has 560 columns", lambda x: {"q": x["q"][..., :560]}, r"\bq\b", "560"),
    Bad("q is float32", lambda x: {"q": x["q"].float()}, r"\bq\b", "float32"),
    Bad("q is fp16, cache bf16", lambda x: {"q": x["q"].half()}, r"\bq\b", "float16|fp16"),
    Bad(
        "q is float8, cache bf16",
        lambda x: {"q": x["q"].to(torch.float8_e4m3fn)},
        r"\bq\b",
        r"float8\w*|e4m3",
    ),
    Bad("q skips columns", lambda x: {"q": wider(x["q"], 576)[..., ::2]}, r"\bq\b", "2"),
    Bad("rows of q are misaligned", lambda x: {"q": misaligned(x["q"])}, r"\bq\b", "577|1154"),
    Bad("q has another batch", lambda x: {"q": x["q"][:1]}, "q|block_table|cache_seqlens", "1"),
    Bad("cache is float32", lambda x: {"k_cache": x["k_cache"].float()}, "cache", "float32"),
    Bad("cache has rank 3", lambda x: {"k_cache": x["k_cache"][0]}, "cache", "64, 1, 576"),
    Bad("cache has 512 columns", lambda x: {"k_cache": x["k_cache"][..., :512]}, "q|cache", "512"),
    Bad(
        "rows of the cache are misaligned",
        lambda x: {"k_cache": misaligned(x["k_cache"])},
        "cache",
        "577|1154",
    ),
    Bad("page size 48", lambda x: {"k_cache": x["k_cache"][:, :48]}, "cache|page", "48"),
    Bad("page size 96", lambda x: {"k_cache": cuts(x["k_cache"], 1, 96)}, "cache|page", "96"),
    Bad(
        "three key heads, 16 query heads",
        lambda x: {"k_cache": cuts(x["k_cache"], 2, 3)},
        "h_q|h_kv|heads",
        "3",
    ),
    Bad(
        "unknown packed width",
        lambda x: {"k_cache": torch.zeros(3, 64, 1, 600, dtype=torch.uint8).to(x["q"].device)},
        "cache",
        "600",
    ),
    Bad(
        "v32_fp8 with two heads",
        lambda x: {"k_cache": torch.zeros(3, 64, 2, 656, dtype=torch.uint8).to(x["q"].device)},
        "cache",
        "2",
    ),
    Bad(
        "a format of sparse decode alone",
        lambda x: {"k_cache": torch.zeros(3, 72, 1, 584, dtype=torch.uint8).to(x["q"].device)},
        "cache",
        "584|v4_fp8",
        UNSERVED,
    ),
    Bad(
        "table is int64", lambda x: {"block_table": x["block_table"].long()}, "block_table", "int64"
    ),
    Bad(
        "table has rank 1",
        lambda x: {"block_table": x["block_table"][0]},
        "block_table",
        r"[\[(]\d+,?[\])]",
    ),
    Bad(
        "table has another batch",
        lambda x: {"block_table": x["block_table"].repeat(2, 1)},
        "block_table",
        "4",
    ),
    Bad("table is missing", lambda x: {"block_table": None}, "block_table", "None|absent|missing"),
    Bad(
        "lengths are int64",
        lambda x: {"cache_seqlens": x["cache_seqlens"].long()},
        "cache_seqlens",
        "int64",
    ),
    Bad(
        "lengths of another batch",
        lambda x: {"cache_seqlens": x["cache_seqlens"].repeat(2)},
        "cache_seqlens",
        "4",
    ),
    Bad(
        "lengths have rank 2",
        lambda x: {"cache_seqlens": x["cache_seqlens"][None]},
        "cache_seqlens",
        "1, 2",
    ),
    Bad(
        "lengths are missing",
        lambda x: {"cache_seqlens": None},
        "cache_seqlens",
        "None|absent|missing",
    ),
    Bad("head_dim_v is 576", lambda x: {"head_dim_v": 576}, "head_dim_v", "576"),
    Bad(
        "attn_sink without indices",
        lambda x: {"attn_sink": torch.ones(16, device=x["q"].device)},
        "attn_sink",
        "indices",
    ),
    Bad(
        "topk_length without indices",
        lambda x: {"topk_length": x["cache_seqlens"]},
        "topk_length",
        "indices",
    ),
    Bad(
        "extra cache without indices",
        lambda x: {"extra_k_cache": x["k_cache"]},
        "extra_k(v)?_cache",
        "indices",
    ),
    Bad("out has 576 columns", lambda x: {"out": wider(x["out"], 64)}, "out", "576"),
    Bad("out is float32", lambda x: {"out": x["out"].float()}, "out", "float32"),
    Bad("out has another batch", lambda x: {"out": x["out"][:1]}, "out", "1"),
    Bad("out skips columns", lambda x: {"out": wider(x["out"], 512)[..., ::2]}, "out", "2"),
]


@pytest.mark.parametrize("bad", DENSE, ids=ids)
def test_dense_decode_refuses(backend: Backend, gen: torch.Generator, bad: Bad) -> None:
    case = dense_decode(gen, backend.device, lengths=[70, 3], s_q=2)
    assert_refused(bad, case, f"mla_decode_dense|{DECODE_FUNCTION}")


FP8 = [
    Bad(
        "descale_k is float64",
        lambda x: {"descale_k": x["descale_k"].double()},
        "descale_k",
        "float64",
    ),
    Bad(
        "descale_k has 3 entries",
        lambda x: {"descale_k": x["descale_k"].repeat(3)},
        "descale_k",
        "3",
    ),
    Bad(
        "descale_q has 3 entries",
        lambda x: {"descale_q": x["descale_q"].repeat(3)},
        "descale_q",
        "3",
    ),
    Bad("out is fp16", lambda x: {"out": x["out"].half()}, "out", "float16|fp16"),
    Bad("q is fp16", lambda x: {"q": x["q"].half(), "descale_q": None}, r"\bq\b", "float16|fp16"),
]


@pytest.mark.parametrize("bad", FP8, ids=ids)
def test_fp8_decode_refuses(backend: Backend, gen: torch.Generator, bad: Bad) -> None:
    case = dense_decode(
        gen, backend.device, lengths=[70, 3], kv_format="fp8", fp8_q=True, descales="one"
    )
    assert_refused(bad, case, f"mla_decode_dense|{DECODE_FUNCTION}")


def bf16_cache(x: dict[str, Any]) -> torch.Tensor:
    return torch.zeros(3, 64, 1, 576, dtype=torch.bfloat16, device=x["q"].device)


SPARSE = [
    Bad("q has 512 columns", lambda x: {"q": x["q"][..., :512]}, "q|cache", "512"),
    Bad("q is float32", lambda x: {"q": x["q"].float()}, r"\bq\b", "float32"),
    Bad("q is fp16", lambda x: {"q": x["q"].half()}, r"\bq\b", "float16|fp16"),
    Bad("q skips columns", lambda x: {"q": wider(x["q"], 576)[..., ::2]}, r"\bq\b", "2"),
    Bad("rows of q are misaligned", lambda x: {"q": misaligned(x["q"])}, r"\bq\b", "577|1154"),
    Bad("indices are int64", lambda x: {"indices": x["indices"].long()}, "indices", "int64"),
    Bad("indices have rank 2", lambda x: {"indices": x["indices"][:, 0]}, "indices", "2, 64"),
    Bad("indices of another batch", lambda x: {"indices": x["indices"][:1]}, "indices", "1"),
    Bad("indices of one query", lambda x: {"indices": x["indices"][:, :1]}, "indices", "1"),
    Bad(
        "topk_length is int64",
        lambda x: {"topk_length": x["topk_length"].long()},
        "topk_length",
        "int64",
    ),
    Bad(
        "topk_length of another batch",
        lambda x: {"topk_length": x["topk_length"].repeat(2)},
        "topk_length",
        "4",
    ),
    Bad(
        "sink is bf16", lambda x: {"attn_sink": x["attn_sink"].bfloat16()}, "attn_sink", "bfloat16"
    ),
    Bad("sink has 15 heads", lambda x: {"attn_sink": x["attn_sink"][:15]}, "attn_sink", "15"),
    Bad("causal", lambda x: {"causal": True}, "causal", "True|true|indices"),
    Bad(
        "extra cache without its indices",
        lambda x: {"extra_indices_in_kvcache": None, "extra_topk_length": None},
        "extra_indices",
        "none|None|extra_k(v)?_cache",
    ),
    Bad(
        "extra indices without their cache",
        lambda x: {"extra_k_cache": None, "extra_topk_length": None},
        "extra_k(v)?_cache",
        "none|None|extra_indices(_in_kvcache)?",
    ),
    Bad(
        "extra lengths without their cache",
        lambda x: {"extra_k_cache": None, "extra_indices_in_kvcache": None},
        "extra_topk_length",
        "none|None|extra_k(v)?_cache",
    ),
    Bad(
        "extra indices are int64",
        lambda x: {"extra_indices_in_kvcache": x["extra_indices_in_kvcache"].long()},
        "extra_indices",
        "int64",
    ),
    Bad(
        "extra indices of another batch",
        lambda x: {"extra_indices_in_kvcache": x["extra_indices_in_kvcache"][:1]},
        "extra_indices",
        "1",
    ),
    Bad(
        "extra lengths of another batch",
        lambda x: {"extra_topk_length": x["extra_topk_length"].repeat(2)},
        "extra_topk_length",
        "4",
    ),
    Bad(
        "extra cache of another format",
        lambda x: {"extra_k_cache": bf16_cache(x)},
        "extra_k(v)?_cache",
        "bf16|bfloat16",
    ),
    Bad(
        "rows of the cache are misaligned",
        lambda x: {"k_cache": misaligned(x["k_cache"])},
        "cache",
        "657",
    ),
    Bad(
        "rows of the extra cache are misaligned",
        lambda x: {"extra_k_cache": misaligned(x["extra_k_cache"])},
        "extra_k(v)?_cache",
        "657",
    ),
    Bad(
        "a format of dense decode alone",
        lambda x: {"k_cache": bf16_cache(x).to(torch.float8_e4m3fn)},
        "cache",
        "fp8",
        UNSERVED,
    ),
    Bad(
        "extra cache is v41_fp4 beside v32_fp8",
        lambda x: {"extra_k_cache": x["extra_k_cache"][..., :288].contiguous()},
        "q|extra_k(v)?_cache",
        "288|v41_fp4|576",
    ),
    Bad("cache has two heads", lambda x: {"k_cache": cuts(x["k_cache"], 2, 2)}, "cache", "2"),
    Bad("cache has rank 3", lambda x: {"k_cache": x["k_cache"][:, :, 0]}, "cache", "3, 64, 656"),
    Bad(
        "cache is v41_fp4",
        lambda x: {
            "q": x["q"][..., :512],
            "k_cache": torch.zeros(3, 64, 1, 288, dtype=torch.uint8, device=x["q"].device),
        },
        "cache",
        "v41_fp4|288",
        UNSERVED,
    ),
    Bad(
        "descale_k with packed cache",
        lambda x: {"descale_k": torch.ones(1, device=x["q"].device)},
        "descale_k",
        "indices|v32_fp8|sparse",
    ),
    Bad("head_dim_v is 576", lambda x: {"head_dim_v": 576}, "head_dim_v", "576"),
    Bad("out is float32", lambda x: {"out": x["out"].float()}, "out", "float32"),
    Bad("out has another batch", lambda x: {"out": x["out"][:1]}, "out", "1"),
    Bad("out skips columns", lambda x: {"out": wider(x["out"], 512)[..., ::2]}, "out", "2"),
]


@pytest.mark.parametrize("bad", SPARSE, ids=ids)
def test_sparse_decode_refuses(backend: Backend, gen: torch.Generator, bad: Bad) -> None:
    case = sparse_decode(
        gen, backend.device, s_q=2, topk_length=[5, 9], attn_sink=(0.5,),
        extra=("v32_fp8", 2, 9), extra_topk_length=[1, 9],
    )  # fmt: skip
    assert_refused(bad, case, f"mla_decode_sparse|{DECODE_FUNCTION}")


def test_tokens_of_v4_fp8_lie_close_in_their_page(backend: Backend, gen: torch.Generator) -> None:
    """Only the stride between pages is free: scales stand behind all tokens of a page."""
    case = sparse_decode(gen, backend.device, kv_format="v4_fp8", page_size=64)
    bad = Bad("inner stride", lambda x: {"k_cache": x["k_cache"][:, ::2]}, "cache", "1168")
    assert_refused(bad, case, f"mla_decode_sparse|{DECODE_FUNCTION}")


def test_tensors_of_another_device_are_refused(backend: Backend, gen: torch.Generator) -> None:
    if backend.device == "cpu":
        pytest.skip("needs a second device")
    case = dense_decode(gen, backend.device, lengths=[70, 3])
    for name in ("k_cache", "block_table", "cache_seqlens"):
        with pytest.raises(ValueError, match="device"):
            case.run(**{name: case.inputs[name].cpu()})
    case = sparse_decode(
        gen, backend.device, topk_length=[5, 9], attn_sink=(0.5,), extra=("v32_fp8", 2, 9),
        extra_topk_length=[1, 9],
    )  # fmt: skip
    for name in case.inputs.keys() - {"q"}:
        with pytest.raises(ValueError, match="device"):
            case.run(**{name: case.inputs[name].cpu()})
