"""The serving example agrees with transformers, and would say so if it did not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import flash_mla

EXAMPLES = Path(__file__).parents[1] / "examples"
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN_WITH_COSINE_SCALE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 128,
    "mscale": 0.5,
    "mscale_all_dim": 1.0,
}


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    pytest.importorskip("transformers", reason="examples/requirements.txt is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import serve_deepseek_v3

        yield serve_deepseek_v3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_served_tokens_and_logits_are_those_of_transformers(
    example: ModuleType, backend: Any, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main(["--quick", "--device", backend.device, "--dtype", dtype]) == 0
    assert "all 5 requests agree" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"rope_interleave": False}, id="rope_in_halves"),
        pytest.param({"q_lora_rank": None}, id="queries_without_lora"),
        pytest.param({"rope_parameters": DEFAULT_ROPE}, id="rope_without_yarn"),
        pytest.param({"rope_parameters": YARN_WITH_COSINE_SCALE}, id="yarn_scaling_cosines"),
    ],
)
def test_the_models_config_is_honoured(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    config = example.make_config(**changes)
    monkeypatch.setattr(example, "make_config", lambda: config)
    assert example.main(["--quick", "--device", "cpu"]) == 0


def hide_a_page(decode: Callable, q, cache, block_table, *args, **kwargs):
    block_table = block_table.clone()
    block_table[0, 0] = -1  # no page: its keys are masked
    return decode(q, cache, block_table, *args, **kwargs)


def hide_the_newest_key(decode: Callable, q, cache, block_table, cache_seqlens, *args, **kwargs):
    return decode(q, cache, block_table, cache_seqlens - 1, *args, **kwargs)


def leave_yarn_out_of_the_scale(attend: Callable, *args, **kwargs):
    return attend(*args, **{**kwargs, "softmax_scale": 192**-0.5})


def attend_the_future(prefill: Callable, *args, **kwargs):
    return prefill(*args, **{**kwargs, "causal": False})


def write_one_token_to_another_slot(append: Callable, kv, cache, slot_mapping):
    slot_mapping = slot_mapping.clone()
    slot_mapping[-1] ^= 1
    return append(kv, cache, slot_mapping)


@pytest.mark.parametrize(
    "function, mistake",
    [
        ("flash_mla_with_kvcache", hide_a_page),
        ("flash_mla_with_kvcache", hide_the_newest_key),
        ("flash_mla_with_kvcache", leave_yarn_out_of_the_scale),
        ("flash_attn_varlen_func", leave_yarn_out_of_the_scale),
        ("flash_attn_varlen_func", attend_the_future),
        ("kv_cache_append", write_one_token_to_another_slot),
    ],
)
def test_a_mistake_in_attention_is_a_mismatch(
    example: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    function: str,
    mistake: Callable,
) -> None:
    original = getattr(flash_mla, function)
    monkeypatch.setattr(flash_mla, function, lambda *a, **kw: mistake(original, *a, **kw))
    assert example.main(["--quick", "--device", "cpu"]) == 1
    assert "MISMATCH" in capsys.readouterr().out


def test_logits_that_are_nan_are_a_mismatch(example: ModuleType) -> None:
    from mla_serving.compare import compare
    from mla_serving.scheduler import Request

    reference = torch.tensor([[0.0, 5.0, 1.0]])
    request = Request("r", [1], 1, logits=[torch.tensor([float("nan"), 5.0, 1.0])])
    assert not compare(request, reference, bound=0.1).ok


def test_tokens_within_four_bounds_are_undecided(example: ModuleType) -> None:
    from mla_serving.compare import compare
    from mla_serving.scheduler import Request

    reference = torch.tensor([[0.0, 1.0, 1.3], [0.0, 1.0, 1.5]])
    request = Request("r", [1], 2, logits=list(torch.tensor([[0.0, 1.1, 1.0], [0.0, 1.0, 1.5]])))
    result = compare(request, reference, bound=0.1)
    assert result.decided == 1
    assert result.undecided == ["0 (reference 2, served 1)"]


def test_pages_of_finished_requests_are_handed_out_again(example: ModuleType) -> None:
    from mla_serving.paged_cache import PagedLatentCache

    cache = PagedLatentCache(1, 3, 64, 576, torch.device("cpu"))
    first = cache.allocate(2)
    assert not cache.can_allocate(2)
    cache.free(first)
    second = cache.allocate(3)
    assert sorted(second) == [0, 1, 2]
    assert cache.pages_reused == 2
    assert cache.slots(second, 63, 65) == [second[0] * 64 + 63, second[1] * 64]
