"""The reference: transformers' own DeepseekV3ForCausalLM with eager attention, in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

BOS = 256  # after the 256 byte values


def encode(text: str) -> list[int]:
    """Tokens of a text: BOS, then its UTF-8 bytes."""
    return [BOS, *text.encode()]


def make_config(**changes: Any) -> DeepseekV3Config:
    """DeepSeek-V3's attention geometry and RoPE scaling; everything else small.

    All layers are dense: routing to experts is a discontinuous choice, and a rounding error that
    flips it would drown what is compared here.

    Args:
        changes: Fields of the config that shall be different.
    """
    num_layers, num_heads = 2, 16
    fields: dict[str, Any] = {
        "vocab_size": 257,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": num_layers,
        "first_k_dense_replace": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "q_lora_rank": 384,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_interleave": True,
        "max_position_embeddings": 163840,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "bos_token_id": BOS,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    return DeepseekV3Config(**(fields | changes))


@torch.no_grad()
def make_model(config: DeepseekV3Config, seed: int) -> DeepseekV3ForCausalLM:
    """A float32 model with random weights, every one of them representable in bfloat16.

    So a bfloat16 copy of the model has the same weights, and only its arithmetic differs.

    transformers' own initialisation (every weight N(0, 0.02^2)) gives uniform attention and flat
    logits, on which most errors would go unseen. Here each projection keeps the variance of its
    input (std = 1 / sqrt(fan_in)), so that softmax scores have a standard deviation near 2 and
    each head attends a handful of keys; `o_proj` is scaled up until attention, and not the
    embedding of the last token, decides the logits; norms get weights other than 1.
    """
    generator = torch.Generator().manual_seed(seed)
    model = DeepseekV3ForCausalLM._from_config(config, attn_implementation="eager").float().eval()
    for name, param in sorted(model.named_parameters()):
        noise = torch.randn(param.shape, generator=generator)
        if param.dim() == 1:  # a norm
            value = 1.0 + 0.1 * noise
        elif "embed_tokens" in name:
            value = noise
        else:
            gain = {"o_proj": 3.0, "lm_head": 4.0}.get(name.split(".")[-2], 1.0)
            value = gain * noise / param.shape[1] ** 0.5
        param.copy_(value.bfloat16().float())
    return model


class Bf16LatentCache(DynamicCache):
    """transformers' cache, holding the latent and the RoPE key with bfloat16's precision.

    Its attention layer hands the cache the normed latent [b, 1, t, 512] and the rotated RoPE key
    [b, 1, t, 64], and attends what comes back: the rounding happens where the paged cache has it.
    """

    def update(
        self, latent: Tensor, k_rope: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        if latent.shape[1] != 1 or k_rope.shape[1] != 1:
            raise NotImplementedError("this release of transformers caches expanded keys")
        latent = latent.bfloat16().to(latent.dtype)
        k_rope = k_rope.bfloat16().to(k_rope.dtype)
        return super().update(latent, k_rope, layer_idx, *args, **kwargs)


@torch.inference_mode()
def generate(model: nn.Module, prompt: list[int], num_tokens: int) -> tuple[list[int], Tensor]:
    """Greedy continuation of one prompt by transformers itself.

    Returns:
        The tokens, and the logits that chose them: float32 [num_tokens, vocab_size] on the CPU.
    """
    input_ids = torch.tensor([prompt], device=model.device)
    result = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        past_key_values=Bf16LatentCache(config=model.config),
        max_new_tokens=num_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = result.sequences[0, len(prompt) :].tolist()
    return tokens, torch.cat(result.logits).float().cpu()
