// KV-cache formats, and packing latent vectors into them.
#pragma once

#include "flash_mla/types.h"

namespace flash_mla {
inline namespace v0 {

enum class KvFormat : int32_t {
  kBf16 = 0,
  kFp16 = 1,
  kFp8 = 2,     // e4m3, one float32 scale for the whole cache
  kV32Fp8 = 3,  // DeepSeek-V3.2: 656 bytes a token
  kV4Fp8 = 4,   // DeepSeek-V4: 584 bytes a token, scales at the end of the page
  kV41Fp8 = 5,  // DeepSeek-V4.1: 528 bytes a token
  kV41Fp4 = 6,  // DeepSeek-V4.1, extra cache: 288 bytes a token
};
inline constexpr int32_t kNumKvFormats = 7;

// The layout of a format, for callers that allocate caches. The definition is kv_format.h.
struct KvFormatInfo {
  const char* name = nullptr;
  int32_t d_qk = 0;              // columns of a token; 0: 576 or 512, as the cache's last dimension
  int32_t d_nope = 0;            // quantised columns; the rest is RoPE in bf16
  int32_t bytes_per_token = 0;   // all of it, page-level scales included; 0: d_qk * element size
  int32_t scale_tile = 0;        // columns that share a scale; 0: no scales in the cache
  int32_t page_align_bytes = 1;  // a page's bytes are rounded up to a multiple of this
};

FLASH_MLA_API Status kv_format_info(KvFormat format, KvFormatInfo* info);
// The format of a cache tensor, told by its dtype and last dimension.
FLASH_MLA_API Status kv_format_of(const TensorView& cache, KvFormat* format);

// cache[slot] = quantise(kv[token]) for each token; a slot that is negative or outside the cache
// is skipped. slot = page * page_size + offset. NaN becomes one bit pattern of its dtype (+-6 in
// e2m1) unless kv and cache have the same dtype.
struct KvCacheAppendArgs {
  uint32_t struct_size = sizeof(KvCacheAppendArgs);

  TensorView kv;            // [n, h_kv, d_qk] bf16, fp16 or float32
  TensorView slot_mapping;  // [n] int64 or int32; distinct
  TensorView cache;         // [num_pages, page_size, h_kv, d_qk or bytes_per_token]
  TensorView scale;         // optional, float32 [1]: the scale of an fp8 cache (its descale_k)
  KvFormat format = KvFormat::kBf16;
};

// kv[token] = dequantise(cache[slot]); a slot that is negative or outside the cache gives zeros.
struct KvCacheGatherArgs {
  uint32_t struct_size = sizeof(KvCacheGatherArgs);

  TensorView cache;
  TensorView slot_mapping;  // [n] int64 or int32
  TensorView kv;            // [n, h_kv, d_qk] bf16, fp16 or float32
  TensorView scale;         // optional, float32 [1], for an fp8 cache
  KvFormat format = KvFormat::kBf16;
};

FLASH_MLA_API Status kv_cache_append(const KvCacheAppendArgs& args, Stream stream);
FLASH_MLA_API Status kv_cache_gather(const KvCacheGatherArgs& args, Stream stream);

}  // namespace v0
}  // namespace flash_mla
