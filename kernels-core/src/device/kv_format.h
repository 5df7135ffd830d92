// Byte layouts of KV caches. This is where they are defined; nothing else quotes their numbers.
#pragma once

#include <cstdint>

#include "device/macros.h"
#include "flash_mla/kv_cache.h"

namespace flash_mla {

inline constexpr int kLatentDim = 512;  // d_v: V is these first columns of K
inline constexpr int kRopeDim = 64;

enum class KvValue : int32_t { kBf16, kFp16, kE4m3, kE2m1 };
enum class KvScale : int32_t { kNone, kWholeCache, kFloat32, kUe8m0, kE4m3 };

// One token: `d_nope` values from byte 0, their scales, and `d_rope` bf16 columns.
struct KvLayout {
  const char* name;
  KvValue value;
  KvScale scale;
  int32_t d_qk;                 // 0: the cache's last dimension tells, 576 or 512
  int32_t d_nope;               // columns stored as `value`; 0: all
  int32_t scale_tile;           // columns that share a scale
  int32_t scales_offset_bytes;  // within a token; kPageScales: after the page's tokens
  int32_t rope_offset_bytes;
  int32_t row_bytes;         // of a token, without page-level scales; 0: d_qk values
  int32_t page_scale_bytes;  // page-level scale bytes of a token
  int32_t page_align_bytes;

  FLASH_MLA_HD constexpr int32_t d_rope() const { return d_qk - d_nope; }
  FLASH_MLA_HD constexpr bool packed() const { return row_bytes != 0; }
  FLASH_MLA_HD constexpr int32_t bytes_per_token() const { return row_bytes + page_scale_bytes; }
};

inline constexpr int32_t kPageScales = -1;

inline constexpr KvLayout kKvLayouts[kNumKvFormats] = {
    {"bf16", KvValue::kBf16, KvScale::kNone, 0, 0, 0, 0, 0, 0, 0, 1},
    {"fp16", KvValue::kFp16, KvScale::kNone, 0, 0, 0, 0, 0, 0, 0, 1},
    {"fp8", KvValue::kE4m3, KvScale::kWholeCache, 0, 0, 0, 0, 0, 0, 0, 1},
    // 512 e4m3, 4 float32 scales, 64 bf16
    {"v32_fp8", KvValue::kE4m3, KvScale::kFloat32, 576, 512, 128, 512, 528, 656, 0, 1},
    // 448 e4m3, 64 bf16; at the end of the page 7 ue8m0 and a pad byte for each token
    {"v4_fp8", KvValue::kE4m3, KvScale::kUe8m0, 512, 448, 64, kPageScales, 448, 576, 8, 576},
    // 512 e4m3, 16 ue8m0
    {"v41_fp8", KvValue::kE4m3, KvScale::kUe8m0, 512, 512, 32, 512, 528, 528, 0, 1},
    // 512 e2m1 (the even-indexed value in the low nibble), 32 e4m3 scales
    {"v41_fp4", KvValue::kE2m1, KvScale::kE4m3, 512, 512, 16, 256, 288, 288, 0, 1},
};

FLASH_MLA_HD constexpr const KvLayout& kv_layout(KvFormat format) {
  return kKvLayouts[static_cast<int32_t>(format)];
}

static_assert(kv_layout(KvFormat::kV32Fp8).bytes_per_token() == 512 + 4 * 4 + 64 * 2);
static_assert(kv_layout(KvFormat::kV4Fp8).bytes_per_token() == 448 + 64 * 2 + 8);
static_assert(kv_layout(KvFormat::kV41Fp8).bytes_per_token() == 512 + 512 / 32);
static_assert(kv_layout(KvFormat::kV41Fp4).bytes_per_token() == 512 / 2 + 512 / 16);

// The smallest scale that packing gives an e4m3 tile, so that a tile of zeros has a scale.
inline constexpr float kMinTileScale = 1e-4f;

}  // namespace flash_mla
