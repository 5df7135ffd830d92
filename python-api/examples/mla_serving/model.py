"""A DeepSeek-V3 forward pass on flash_mla, over the modules of a transformers model.

Multi-head Latent Attention caches, per token and layer, one latent c (kv_lora_rank = 512 columns,
after its RMSNorm) and one rotated RoPE key r (64 columns) that all heads share. Head h has

    key_h   = [W_UK_h c | r]     192 columns        value_h = W_UV_h c     128 columns

Prefill expands c into these keys and values and runs ordinary attention (192, 128): its tokens
attend each other, so the expansion is paid once per token.

Decode would expand the whole context for every new token. It moves the weights instead:

    q_nope_h . (W_UK_h c)    =  (W_UK_h^T q_nope_h) . c           the query, absorbed: 512 columns
    sum_j p_j (W_UV_h c_j)   =  W_UV_h (sum_j p_j c_j)            attend first, then project

so that all heads attend one shared key [c | r] of 576 columns whose first 512 are the value: this
is what `flash_mla.flash_mla_with_kvcache` computes, right on the paged cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flash_mla


@dataclass
class PrefillBatch:
    """Whole prompts, one after another.

    Attributes:
        tokens: int64 [t], all prompts concatenated.
        positions: int64 [t], each token's position in its own prompt.
        slot_mapping: int64 [t], where each token's latent goes in the cache.
        cu_seqlens: int32 [b + 1], prompt i is rows cu_seqlens[i] .. cu_seqlens[i + 1].
        max_seqlen: the longest prompt.
    """

    tokens: Tensor
    positions: Tensor
    slot_mapping: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


@dataclass
class DecodeBatch:
    """One new token for each running request.

    Attributes:
        tokens: int64 [b].
        positions: int64 [b].
        slot_mapping: int64 [b], where the new token's latent goes in the cache.
        block_table: int32 [b, max_pages], the pages of each request.
        cache_seqlens: int32 [b], keys of each request, the new token included.
        sched_meta: from `flash_mla.get_mla_metadata()`, made once per step for all layers.
    """

    tokens: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    sched_meta: Any


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary position embedding of x [t, heads, d], with cos and sin [t, d / 2] in float32.

    Rotates the pairs (x[2i], x[2i + 1]) when interleaved, as DeepSeek's checkpoints have them,
    else (x[i], x[i + d / 2]). The result is stored as two halves either way: q and k agree on the
    order of their columns, so their product does not see it.
    """
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    first, second = first.float(), second.float()
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)


class LatentAttention:
    """Attention of one layer: MLA on one layer's paged cache.

    Args:
        attn: The layer's `DeepseekV3Attention`. Its weights are used in place.
        cache: bfloat16 [num_pages, page_size, 1, 576], written and read by both passes.
    """

    def __init__(self, attn: nn.Module, cache: Tensor) -> None:
        config = attn.config
        self.attn = attn
        self.cache = cache
        self.num_heads = config.num_attention_heads
        self.d_nope = config.qk_nope_head_dim
        self.d_rope = config.qk_rope_head_dim
        self.d_latent = config.kv_lora_rank
        self.d_v = config.v_head_dim
        self.interleaved = bool(config.rope_interleave)
        # 1 / sqrt(192), times YaRN's mscale squared when the config scales RoPE that way.
        self.softmax_scale = float(attn.scaling)
        # kv_b_proj stacks, head by head, the rows of W_UK on the rows of W_UV.
        w_ukv = attn.kv_b_proj.weight.view(self.num_heads, self.d_nope + self.d_v, self.d_latent)
        self.w_uk, self.w_uv = w_ukv.split([self.d_nope, self.d_v], dim=1)  # [h, 128, 512] each

    def project(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The projections that both passes share.

        Args:
            hidden: [t, hidden_size], normed.
            cos: float32 [t, 32].
            sin: float32 [t, 32].

        Returns:
            q_nope [t, h, 128], q_rope [t, h, 64] rotated, and the token's cache line
            [t, 1, 576] in bfloat16: normed latent, then rotated RoPE key.
        """
        attn = self.attn
        if attn.q_lora_rank is None:
            q = attn.q_proj(hidden)
        else:
            q = attn.q_b_proj(attn.q_a_layernorm(attn.q_a_proj(hidden)))
        q = q.view(-1, self.num_heads, self.d_nope + self.d_rope)
        q_nope, q_rope = q.split([self.d_nope, self.d_rope], dim=-1)
        q_rope = rotate(q_rope, cos, sin, self.interleaved)

        latent, k_rope = attn.kv_a_proj_with_mqa(hidden).split([self.d_latent, self.d_rope], dim=-1)
        latent = attn.kv_a_layernorm(latent)[:, None, :]
        k_rope = rotate(k_rope[:, None, :], cos, sin, self.interleaved)
        return q_nope, q_rope, torch.cat([latent, k_rope], dim=-1).bfloat16()

    def prefill(self, hidden: Tensor, cos: Tensor, sin: Tensor, batch: PrefillBatch) -> Tensor:
        """Attention of whole prompts among themselves: [t, hidden_size] -> [t, hidden_size]."""
        q_nope, q_rope, kv = self.project(hidden, cos, sin)
        flash_mla.kv_cache_append(kv, self.cache, batch.slot_mapping)

        # Expand what the cache holds, rounding included: decode will see the same keys.
        latent, k_rope = kv.split([self.d_latent, self.d_rope], dim=-1)
        expanded = self.attn.kv_b_proj(latent.to(hidden.dtype))
        expanded = expanded.view(-1, self.num_heads, self.d_nope + self.d_v)
        k_nope, v = expanded.bfloat16().split([self.d_nope, self.d_v], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(-1, self.num_heads, -1)], dim=-1)
        q = torch.cat([q_nope, q_rope], dim=-1).bfloat16()
        out, _lse = flash_mla.flash_attn_varlen_func(
            q,  # [t, h, 192]
            k,  # [t, h, 192]
            v,  # [t, h, 128], a strided view of `expanded`
            batch.cu_seqlens,
            batch.cu_seqlens,
            batch.max_seqlen,
            batch.max_seqlen,
            softmax_scale=self.softmax_scale,
            causal=True,
        )
        return self.attn.o_proj(out.to(hidden.dtype).flatten(1))

    def decode(self, hidden: Tensor, cos: Tensor, sin: Tensor, batch: DecodeBatch) -> Tensor:
        """Attention of one new token per request to its cache: [b, hidden_size] -> the same."""
        q_nope, q_rope, kv = self.project(hidden, cos, sin)
        flash_mla.kv_cache_append(kv, self.cache, batch.slot_mapping)

        # Absorb W_UK into the query: per head, [b, 128] @ [128, 512].
        q_latent = torch.bmm(q_nope.transpose(0, 1), self.w_uk).transpose(0, 1)
        q = torch.cat([q_latent, q_rope], dim=-1).bfloat16()
        out_latent, _lse = flash_mla.flash_mla_with_kvcache(
            q[:, None],  # [b, s_q = 1, h, 576]
            self.cache,
            batch.block_table,
            batch.cache_seqlens,
            self.d_latent,
            batch.sched_meta,
            None,
            softmax_scale=self.softmax_scale,
            causal=True,
        )
        # Project with W_UV what came out, still a latent: per head, [b, 512] @ [512, 128].
        out_latent = out_latent[:, 0].to(hidden.dtype)
        out = torch.bmm(out_latent.transpose(0, 1), self.w_uv.transpose(1, 2)).transpose(0, 1)
        return self.attn.o_proj(out.flatten(1))


class ServingModel:
    """A transformers DeepSeek-V3 model whose attention runs on flash_mla.

    Args:
        model: `DeepseekV3ForCausalLM`; its linear layers, norms and MLPs are used as they are.
        caches: One paged latent cache per layer.
    """

    def __init__(self, model: nn.Module, caches: list[Tensor]) -> None:
        self.model = model.model
        self.lm_head = model.lm_head
        self.attention = [
            LatentAttention(layer.self_attn, cache)
            for layer, cache in zip(self.model.layers, caches, strict=True)
        ]
        # Angles stay in float32 whatever the weights are. A fresh module: `.to(bfloat16)` would
        # have rounded the frequencies of the model's own.
        device = self.lm_head.weight.device
        self.rotary_emb = type(self.model.rotary_emb)(config=model.config).to(device)

    @torch.inference_mode()
    def prefill(self, batch: PrefillBatch) -> Tensor:
        """Fills the cache from whole prompts; returns the last token's logits, float32 [b, v]."""
        hidden = self._forward(batch)
        last_rows = batch.cu_seqlens[1:].long() - 1
        return self._logits(hidden[last_rows])

    @torch.inference_mode()
    def decode(self, batch: DecodeBatch) -> Tensor:
        """Advances each request by one token; returns its logits, float32 [b, vocab_size]."""
        return self._logits(self._forward(batch))

    def _forward(self, batch: PrefillBatch | DecodeBatch) -> Tensor:
        hidden = self.model.embed_tokens(batch.tokens)
        cos, sin = self.rotary_emb(hidden.new_empty(0, dtype=torch.float32), batch.positions[None])
        half = cos.shape[-1] // 2  # transformers repeats the angles for both halves
        cos, sin = cos[0, :, :half], sin[0, :, :half]
        for layer, attention in zip(self.model.layers, self.attention, strict=True):
            attend = attention.prefill if isinstance(batch, PrefillBatch) else attention.decode
            hidden = hidden + attend(layer.input_layernorm(hidden), cos, sin, batch)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.norm(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.lm_head.weight.float())
