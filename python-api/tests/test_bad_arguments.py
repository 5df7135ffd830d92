"""The other functions refuse what breaks a rule, say how to mend it, and write nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import Backend
from bad_arguments import Bad, assert_call_refused, cuts, ids, misaligned, wider
from cases import normal
from mha_cases import varlen

import flash_mla

UNSERVED = (ValueError, NotImplementedError)  # which of them is up to the variant table


def prefill_sparse_arguments(gen: torch.Generator, device: str) -> dict[str, Any]:
    tensors = {
        "q": normal(gen, 5, 16, 576, std=1.0).bfloat16(),
        "kv": normal(gen, 30, 1, 576, std=0.1).bfloat16(),
        "indices": torch.arange(8, dtype=torch.int32).repeat(5, 1, 1),
        "attn_sink": torch.zeros(16),
        "topk_length": torch.full((5,), 7, dtype=torch.int32),
        "out": torch.full((5, 16, 512), 7.0, dtype=torch.bfloat16),
    }
    return {name: x.to(device) for name, x in tensors.items()} | {"sm_scale": 0.05}


PREFILL_SPARSE = [
    Bad("q has rank 2", lambda x: {"q": x["q"][0]}, r"\bq\b", "16, 576"),
    Bad("q is float32", lambda x: {"q": x["q"].float()}, r"\bq\b", "float32"),
    Bad("q has 560 columns", lambda x: {"q": x["q"][..., :560]}, r"\bq\b", "560"),
    Bad("q skips columns", lambda x: {"q": wider(x["q"], 576)[..., ::2]}, r"\bq\b", "2"),
    Bad("rows of q are misaligned", lambda x: {"q": misaligned(x["q"])}, r"\bq\b", "577|1154"),
    Bad("kv is fp16", lambda x: {"kv": x["kv"].half()}, r"\bkv\b", "float16|fp16"),
    Bad("kv has 512 columns", lambda x: {"kv": x["kv"][..., :512]}, r"\bkv\b|\bq\b", "512"),
    Bad("kv has two heads", lambda x: {"kv": cuts(x["kv"], 1, 2)}, r"\bkv\b", "2"),
    Bad("kv has rank 2", lambda x: {"kv": x["kv"][:, 0]}, r"\bkv\b", "30, 576"),
    Bad("indices are int64", lambda x: {"indices": x["indices"].long()}, "indices", "int64"),
    Bad("indices have rank 2", lambda x: {"indices": x["indices"][:, 0]}, "indices", "5, 8"),
    Bad("indices of 4 queries", lambda x: {"indices": x["indices"][:4]}, "indices", "4"),
    Bad("d_v is 576", lambda x: {"d_v": 576}, "d_v", "576"),
    Bad("sink has 15 heads", lambda x: {"attn_sink": x["attn_sink"][:15]}, "attn_sink", "15"),
    Bad(
        "sink is float64", lambda x: {"attn_sink": x["attn_sink"].double()}, "attn_sink", "float64"
    ),
    Bad(
        "topk_length of 4 queries",
        lambda x: {"topk_length": x["topk_length"][:4]},
        "topk_length",
        "4",
    ),
    Bad(
        "topk_length is int64",
        lambda x: {"topk_length": x["topk_length"].long()},
        "topk_length",
        "int64",
    ),
    Bad("out has 576 columns", lambda x: {"out": wider(x["out"], 64)}, "out", "576"),
    Bad("out is float32", lambda x: {"out": x["out"].float()}, "out", "float32"),
]


@pytest.mark.parametrize("bad", PREFILL_SPARSE, ids=ids)
def test_sparse_prefill_refuses(backend: Backend, gen: torch.Generator, bad: Bad) -> None:
    assert_call_refused(
        bad,
        flash_mla.flash_mla_sparse_fwd,
        prefill_sparse_arguments(gen, backend.device),
        "mla_prefill_sparse|flash_mla_sparse_fwd",
        "out",
    )


VARLEN = [
    Bad("q is float32", lambda x: {"q": x["q"].float()}, r"\bq\b", "float32"),
    Bad("q has rank 4", lambda x: {"q": x["q"][None]}, r"\bq\b", "1, 29, 4, 192"),
    Bad("k is fp16, q bf16", lambda x: {"k": x["k"].half()}, r"\bk\b", "float16|fp16"),
    Bad("v is fp16, q bf16", lambda x: {"v": x["v"].half()}, r"\bv\b", "float16|fp16"),
    Bad("k has 128 columns", lambda x: {"k": x["k"][..., :128]}, r"\bk\b|\bq\b", "128"),
    Bad(
        "no such head dimensions",
        lambda x: {"q": x["q"][..., :64], "k": x["k"][..., :64], "v": x["v"][..., :64]},
        "q|d_qk|head",
        "64",
        UNSERVED,
    ),
    Bad("v has other tokens", lambda x: {"v": x["v"][:-1]}, r"\bv\b", "28"),
    Bad("v has other heads", lambda x: {"v": x["v"][:, :1]}, r"\bv\b", "1"),
    Bad(
        "three key heads, four query heads",
        lambda x: {"k": cuts(x["k"], 1, 3), "v": cuts(x["v"], 1, 3)},
        "h_q|h_kv|heads",
        "3",
    ),
    Bad("k skips columns", lambda x: {"k": wider(x["k"], 192)[..., ::2]}, r"\bk\b", "2"),
    Bad(
        "cu_seqlens_qo is int64",
        lambda x: {"cu_seqlens_qo": x["cu_seqlens_qo"].long()},
        "cu_seqlens_q",
        "int64",
    ),
    Bad(
        "cu_seqlens_kv is int64",
        lambda x: {"cu_seqlens_kv": x["cu_seqlens_kv"].long()},
        "cu_seqlens_kv",
        "int64",
    ),
    Bad(
        "another number of sequences",
        lambda x: {"cu_seqlens_kv": x["cu_seqlens_kv"][:2]},
        "cu_seqlens_kv",
        "2|1",
    ),
    Bad(
        "max_seqlen_qo is negative",
        lambda x: {"max_seqlen_qo": -1},
        "max_seqlen_q",
        "-1",
    ),
    Bad("dropout", lambda x: {"dropout_p": 0.1}, "dropout_p", r"0\.1", UNSERVED),
]


@pytest.mark.parametrize("bad", VARLEN, ids=ids)
@pytest.mark.parametrize("training", [False, True])
def test_varlen_attention_refuses(
    backend: Backend, gen: torch.Generator, bad: Bad, training: bool
) -> None:
    case = varlen(gen, backend.device, q_lengths=[9, 20], kv_lengths=[9, 20])
    names = ("cu_seqlens_qo", "cu_seqlens_kv", "max_seqlen_qo", "max_seqlen_kv")
    good: dict[str, Any] = dict(zip(names, case.lengths, strict=True))
    good |= {"q": case.q.requires_grad_(training), "k": case.k, "v": case.v}
    operators = "mha_prefill_dense|flash_attn_varlen_func"
    assert_call_refused(bad, flash_mla.flash_attn_varlen_func, good, operators, None)


MERGE = [
    Bad("out_a has rank 2", lambda x: {"out_a": x["out_a"][0]}, "out_a", "3, 512"),
    Bad("out_a is int32", lambda x: {"out_a": x["out_a"].int()}, "out_a", "int32"),
    Bad("out_b has other rows", lambda x: {"out_b": x["out_b"][:4]}, "out_b", "4"),
    Bad("out_b has other columns", lambda x: {"out_b": x["out_b"][..., :256]}, "out_b", "256"),
    Bad("out_b is fp16", lambda x: {"out_b": x["out_b"].half()}, "out_b", "float16|fp16"),
    Bad("lse_a is bf16", lambda x: {"lse_a": x["lse_a"].bfloat16()}, "lse_a", "bfloat16"),
    Bad("lse_b has other heads", lambda x: {"lse_b": x["lse_b"][:, :2]}, "lse_b", "2"),
    Bad("lse_a is transposed", lambda x: {"lse_a": x["lse_a"].t()}, "lse_a", "3"),
    Bad("out_a skips columns", lambda x: {"out_a": wider(x["out_a"], 512)[..., ::2]}, "out_a", "2"),
]


@pytest.mark.parametrize("bad", MERGE, ids=ids)
def test_merging_refuses(backend: Backend, gen: torch.Generator, bad: Bad) -> None:
    good = {
        "out_a": normal(gen, 5, 3, 512, std=1.0).bfloat16(),
        "lse_a": normal(gen, 5, 3, std=1.0),
        "out_b": normal(gen, 5, 3, 512, std=1.0).bfloat16(),
        "lse_b": normal(gen, 5, 3, std=1.0),
    }
    on_device = {name: x.to(backend.device) for name, x in good.items()}
    assert_call_refused(bad, flash_mla.merge_attn_states, on_device, "merge_attn_states", None)


APPEND = [
    Bad("format is unknown", lambda x: {"format": "v5_fp2"}, "format", "v5_fp2"),
    Bad("format of another width", lambda x: {"format": "v41_fp8"}, "cache", "656"),
    Bad("kv is int32", lambda x: {"kv": x["kv"].int()}, r"\bkv\b", "int32"),
    Bad("kv has 512 columns", lambda x: {"kv": x["kv"][..., :512]}, r"\bkv\b", "512"),
    Bad("kv has two heads", lambda x: {"kv": cuts(x["kv"], 1, 2)}, r"\bkv\b", "2"),
    Bad("kv has rank 2", lambda x: {"kv": x["kv"][:, 0]}, r"\bkv\b", "5, 576"),
    Bad(
        "slots are float", lambda x: {"slot_mapping": x["slot_mapping"].float()}, "slot", "float32"
    ),
    Bad("slots of 4 tokens", lambda x: {"slot_mapping": x["slot_mapping"][:4]}, "slot", "4"),
    Bad("slots have rank 2", lambda x: {"slot_mapping": x["slot_mapping"][None]}, "slot", "1, 5"),
    Bad("a scale", lambda x: {"scale": torch.ones(1, device=x["kv"].device)}, "scale", "v32_fp8"),
    Bad("cache has rank 3", lambda x: {"cache": x["cache"][:, :, 0]}, "cache", "2, 4, 656"),
    Bad("cache is bf16", lambda x: {"cache": x["cache"].bfloat16()}, "cache", "bfloat16|bf16"),
]


@pytest.mark.parametrize("bad", APPEND, ids=ids)
def test_appending_refuses(backend: Backend, gen: torch.Generator, bad: Bad) -> None:
    good = {
        "kv": normal(gen, 5, 1, 576, std=1.0).bfloat16().to(backend.device),
        "cache": flash_mla.kv_cache_empty("v32_fp8", 2, 4, device=backend.device),
        "slot_mapping": torch.arange(5, device=backend.device),
        "format": "v32_fp8",
    }
    operators = "kv_cache_append|kv_format"
    assert_call_refused(bad, flash_mla.kv_cache_append, good, operators, "cache")


def test_the_scale_of_an_fp8_cache_is_one_float32(backend: Backend) -> None:
    kv = torch.zeros(1, 4, 1, 576, dtype=torch.bfloat16, device=backend.device)
    for scale in (torch.ones(2), torch.ones(1).double()):
        with pytest.raises(ValueError, match="scale"):
            flash_mla.kv_cache_pack(kv, "fp8", scale=scale.to(backend.device))


@pytest.mark.parametrize("function", ["kv_cache_pack", "kv_cache_unpack", "kv_format"])
def test_unknown_formats_are_refused_with_the_list_of_known_ones(
    backend: Backend, function: str
) -> None:
    kv = torch.zeros(1, 4, 1, 576, dtype=torch.bfloat16, device=backend.device)
    arguments = ("nvfp4",) if function == "kv_format" else (kv, "nvfp4")
    with pytest.raises(ValueError, match="nvfp4") as raised:
        getattr(flash_mla, function)(*arguments)
    assert "v32_fp8" in str(raised.value)


def test_a_cache_of_unknown_width_is_refused(backend: Backend) -> None:
    cache = torch.zeros(1, 4, 1, 600, dtype=torch.uint8, device=backend.device)
    for function in (flash_mla.kv_cache_unpack, flash_mla.kv_format):
        with pytest.raises(ValueError, match="600"):
            function(cache)
