"""Attention kernels for models with Multi-head Latent Attention (MLA)."""

from flash_mla import reference
from flash_mla._ops import __version__
from flash_mla.config import show_config
from flash_mla.decode import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata
from flash_mla.kv_cache import (
    KvFormat,
    kv_cache_append,
    kv_cache_empty,
    kv_cache_pack,
    kv_cache_unpack,
    kv_format,
)
from flash_mla.merge import merge_attn_states
from flash_mla.prefill import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_mla_sparse_fwd,
)

__all__ = [
    "FlashMLASchedMeta",
    "KvFormat",
    "__version__",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "kv_cache_append",
    "kv_cache_empty",
    "kv_cache_pack",
    "kv_cache_unpack",
    "kv_format",
    "merge_attn_states",
    "reference",
    "show_config",
]
