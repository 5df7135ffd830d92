// The compile-time shape of a portable decode kernel, from its variant.
#pragma once

#include <cstdint>

#include "device/decode_schedule.h"
#include "device/kv_format.h"
#include "runtime/variant.h"

namespace flash_mla::portable {

inline constexpr int kTileKeys = 32;  // keys of a pipeline stage: half a block of the schedule
static_assert(kBlockKeys % kTileKeys == 0);
inline constexpr int kSlabs = 4;                       // warps side by side over the columns
inline constexpr int kSlabCols = kLatentDim / kSlabs;  // of V, and of K as far as it is V
inline constexpr int kMmaRows = 16;                    // M of a warp's products
inline constexpr int kKeyTiles = kTileKeys / 8;        // N = 8 tiles of a warp's logits
inline constexpr int kSlabSteps = kSlabCols / 16;      // K = 16 steps of Q K^T over them
inline constexpr int kColumnTiles = kSlabCols / 8;     // N = 8 tiles of a warp's output

// Named barriers: this one and the next, for the warps of a group.
inline constexpr int kGroupBarrier = 1;

// What every device of the row has: 99 KB, the limit of sm_86, sm_89 and sm_120.
inline constexpr int kSmemLimitBytes = 99 * 1024;

constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Cfg::v.kv: the format of tiles in shared memory. kRawStageBytes: of a stage from which a tile is
// converted; 0: tiles are what the cache holds, and a stage is a tile.
template <class Cfg, int kRawStageBytes = 0>
struct Config {
  static constexpr VariantSpec v = Cfg::v;
  static constexpr KvLayout kLayout = kv_layout(v.kv);
  static constexpr bool kE4m3 = kLayout.value == KvValue::kE4m3;
  static constexpr bool kTokenScales = kLayout.scale == KvScale::kFloat32;
  // Of the operands of the tensor cores, and of the output.
  static constexpr DType kType = v.kv == KvFormat::kFp16 ? DType::kFloat16 : DType::kBFloat16;

  static_assert(v.tile_m == kMmaRows || v.tile_m == 2 * kMmaRows);
  static constexpr int kGroups = v.tile_m / kMmaRows;     // warps that share a slab, 16 rows each
  static constexpr int kGroupKeys = kTileKeys / kGroups;  // that a warp loads of a tile
  static constexpr int kWarps = kSlabs * kGroups;
  static constexpr int kThreads = kWarps * 32;

  // A slab's share of a token: 128 columns, then 16 of the RoPE columns, then its scale. An odd
  // number of 16-byte chunks puts the same chunk of 8 consecutive rows into 8 different banks.
  static constexpr int kSlabRopeCols = (v.d_qk - kLatentDim) / kSlabs;
  static constexpr bool kRope = kSlabRopeCols > 0;
  static constexpr bool kE4m3Rope = kE4m3 && !kLayout.packed();
  static_assert(!kRope || kSlabRopeCols == 16);
  static constexpr int kSlabBytes = kSlabCols * (kE4m3 ? 1 : 2);
  static constexpr int kSlabRopeBytes = kSlabRopeCols * (kE4m3Rope ? 1 : 2);
  static constexpr int kScaleOffsetBytes = kSlabBytes + kSlabRopeBytes;
  static constexpr int kRowBytes =
      (round_up(kScaleOffsetBytes + (kTokenScales ? 4 : 0), 16) / 16 | 1) * 16;
  // A token in the cache.
  static constexpr int kTokenRopeBytes =
      kLayout.packed() ? kLayout.rope_offset_bytes : kLatentDim * (kE4m3 ? 1 : 2);
  static_assert(!kTokenScales || kLayout.scale_tile == kSlabCols);  // a scale is a slab's

  static constexpr int kSlabTileBytes = kTileKeys * kRowBytes;
  static constexpr int kTileBytes = kSlabs * kSlabTileBytes;
  // Partial logits of all slabs. With one group the next tile's go to the other buffer; with two,
  // a barrier stands between the tiles anyway.
  static constexpr int kLogitBuffers = kGroups == 1 ? 2 : 1;
  static constexpr int kLogitBytes = kLogitBuffers * kWarps * kMmaRows * kTileKeys * 4;
  static constexpr int kCtasPerSm = 2 / kGroups;  // where shared memory allows
  static constexpr int kOtherBytes = 1024;        // plan, masks, items: asserted in launch.cuh
  static constexpr int kFreeBytes = kSmemLimitBytes - kLogitBytes - kOtherBytes;
  static constexpr bool kConverts = kRawStageBytes > 0;
  static constexpr int kStages = kConverts
                                     ? (kFreeBytes - kTileBytes) / (kConverts ? kRawStageBytes : 1)
                                     : kFreeBytes / kTileBytes;
  static constexpr int kTiles = kConverts ? 1 : kStages;
  static_assert(kStages >= 2);
};

}  // namespace flash_mla::portable
