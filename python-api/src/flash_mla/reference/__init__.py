"""The written definition of each operator, in plain PyTorch.

These functions say what the kernels must compute. They run on any device, need nothing but torch,
take the same inputs as the operators and return results in `dtype` (default float64). They are
written to be read and to be compared with, not to be fast: requests, and where it is simpler
queries, are looped over.

Attention over latent vectors. For one query head q and the key vectors k_j that it attends, with
v_j the first 512 columns of k_j (multi-head attention has a v of its own):

    logit_j = softmax_scale * (q . k_j)
    lse     = ln sum_j exp(logit_j)
    out     = sum_j exp(logit_j - lse) v_j

MLA with absorbed weights is multi-query attention over the cached latent: q and k_j have 576
columns, 512 of them without position (NoPE) and 64 with rotary embedding (RoPE).
Source: DeepSeek-V2, arXiv:2405.04434, section 2.1. Attending chosen tokens only is DeepSeek Sparse
Attention; source: DeepSeek-V3.2 technical report, arXiv:2512.02556.

Rules that hold everywhere:

- Logits, `lse` and `max_logits` are natural-log quantities of the scaled logits.
- A row without keys has out = 0, lse = +inf and max_logits = -inf.
- Data that is masked, past the end, on an unused page or behind an invalid index is never read, so
  NaN or Inf there reaches no result: keys are selected first and multiplied afterwards.
- A query may name a token twice; it then counts twice.
- Query head h reads key head h // (h_q / h_kv).

Results are differentiable with respect to floating-point q, k, v and unquantised caches.
"""

from flash_mla.reference.attention import (
    merge_attn_states,
    mha_prefill_dense,
    mla_decode_dense,
    mla_decode_sparse,
    mla_prefill_sparse,
)
from flash_mla.reference.kv_cache import kv_cache_format, kv_cache_pack, kv_cache_unpack

__all__ = [
    "kv_cache_format",
    "kv_cache_pack",
    "kv_cache_unpack",
    "merge_attn_states",
    "mha_prefill_dense",
    "mla_decode_dense",
    "mla_decode_sparse",
    "mla_prefill_sparse",
]
