// Tiles, roles and shared memory of the sm90 kernel of mla_decode_sparse.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "device/sm90/mbarrier.cuh"
#include "device/sm90/registers.cuh"
#include "device/sm90/row_softmax.cuh"
#include "device/sm90/warpgroup.cuh"
#include "mla_decode_sparse/gpu.cuh"
#include "runtime/variant.h"

namespace flash_mla::mla_decode_sparse::sm90 {

using flash_mla::sm90::Barrier;
using flash_mla::sm90::kWarpgroup;
using flash_mla::sm90::kWarpgroupWarps;
using flash_mla::sm90::Place;
using flash_mla::sm90::RowState;
using flash_mla::sm90::uniform;

inline constexpr int kTileKeys = kBlockKeys;
inline constexpr int kDepth = 16;    // K of a wgmma
inline constexpr int kColumns = 64;  // of a block of Q: 128 bytes
inline constexpr int kBlocks = kLatentDim / kColumns;
inline constexpr int kWarpKeys = kTileKeys / kWarpgroupWarps;
inline constexpr uint32_t kAllWarpKeys = (1u << kWarpKeys) - 1;

// Two warpgroups of values, one of keys, one that loads.
inline constexpr int kValueGroups = 2;
inline constexpr int kValueThreads = kValueGroups * kWarpgroup;
inline constexpr int kValueWarps = kValueGroups * kWarpgroupWarps;
inline constexpr int kThreads = kValueThreads + 2 * kWarpgroup;

enum HardwareBarrier : int {  // __syncthreads is 0
  kKeysSync = 1,
  kValuesSync = 2,
};

template <class Cfg>
struct Config {
  static constexpr KvLayout kLayout = kv_layout(Cfg::v.kv);
  static constexpr bool kCodes = kLayout.packed();  // the others are bf16 as they are
  static constexpr DType kType = kCodes ? DType::kFloat16 : DType::kBFloat16;  // of the products
  static constexpr int kRowBytes = kCodes ? kLayout.row_bytes : Cfg::v.d_qk * 2;
  static constexpr int kRows = Cfg::v.tile_m;  // query rows: N of a wgmma
  // With more of them two stages of tokens do not fit.
  static constexpr int kMostRows = kRowBytes > 1024 ? 32 : 64;
  static constexpr int kQueryBlocks = Cfg::v.d_qk / kColumns;
  static constexpr int kQueryBlockBytes = kRows * 128;
  static constexpr bool kRope = kLayout.d_rope() > 0;
  static constexpr bool kRopeInValues = kRope && Cfg::v.d_qk == kLatentDim;  // v4_fp8
  static constexpr bool kPageScales = kLayout.page_scale_bytes > 0;          // v4_fp8
  static constexpr bool kFp4Extra = Cfg::v.kv == KvFormat::kV41Fp8;          // may come beside it

  static constexpr bool kWideValues = kRopeInValues || !kCodes;  // 16 bits, not 8

  // A kernel of 512 threads starts with 128 registers for each: what some get, others give.
  static constexpr int kValueRegisters = kRows < 64 ? 152 : kWideValues ? 176 : 168;
  static constexpr int kKeyRegisters = kRows < 64 ? 144 : kWideValues ? 120 : 136;
  static constexpr int kLoadRegisters = kRows < 64 ? 56 : 40;
  static_assert(2 * kValueRegisters + kKeyRegisters + kLoadRegisters <= 4 * 128);

  // A token lies in shared memory as it does in the cache, 2 or 6 modulo 8 times 16 bytes from the
  // next: with token_at(), eight lanes that read 16 bytes meet all banks, and so do sixteen that
  // read 8 and 32 that read 4.
  static constexpr int token_bytes(int row_bytes) { return (row_bytes + 31) / 64 * 64 + 32; }
  static constexpr int kTokenBytes = token_bytes(kRowBytes);
  static constexpr int kFp4TokenBytes = token_bytes(kv_layout(KvFormat::kV41Fp4).row_bytes);
  static_assert(kTokenBytes >= kRowBytes && kFp4TokenBytes <= kTokenBytes);
  static constexpr int kStageBytes = kTileKeys * kTokenBytes;

  // Scales of a token, as fp16 multipliers for values.
  static constexpr int kScales = kFp4Extra ? 32 : kCodes ? kLayout.d_nope / kLayout.scale_tile : 1;

  // Beside queries, P and tokens: barriers, rows, items and the plan; multipliers; the page's
  // scales.
  static constexpr int kOtherBytes =
      3584 + 2 * kScales * kTileKeys * 2 + (kPageScales ? 4 * kTileKeys * 8 + 512 : 0);
  static constexpr int kMaxStages =
      (flash_mla::sm90::kMaxSmemBytes - kQueryBlocks * kQueryBlockBytes - 2 * kRows * 128 -
       kOtherBytes) /
      kStageBytes;
  static constexpr int kStages = kMaxStages < 4 ? kMaxStages : 4;
  static_assert(kStages >= (kCodes ? 3 : 2));
};

// The stage of a role's next tile, and the phase of its barriers.
template <int kStages>
struct Ring {
  uint32_t stage = 0, phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The token at place g of eight, in the order in which the products take keys.
__device__ __forceinline__ constexpr uint32_t token_at(uint32_t g) {
  return (g >> 1 & 1) | ((g ^ g >> 2) & 1) << 1 | (g & 4);
}

// An item, as the warp that plans hands it to the others.
struct ItemSlot {
  WorkItem item;
  int32_t num_tiles;   // 0 where this CTA has no rows, or the query no tokens
  int32_t main_tiles;  // the first of them; the others are of the extra cache
  // Of the main set and the extra one: the query's tokens, and which of them would be the first of
  // the item's first tile.
  int32_t num_tokens[2];
  int32_t first_token[2];
  const int32_t* entries[2];
  bool fp4;  // the extra cache holds e2m1
};

// The first of an item's tiles, which are `tiles`, hold e4m3; the others e2m1.
template <class Cfg>
__device__ __forceinline__ int32_t e4m3_tiles(const volatile ItemSlot& slot, int32_t tiles) {
  return Config<Cfg>::kFp4Extra && slot.fp4 ? uniform(slot.main_tiles) : tiles;
}

template <class Cfg>
struct alignas(1024) SharedStorage {
  using C = Config<Cfg>;
  uint8_t q[C::kQueryBlocks * C::kQueryBlockBytes];
  uint8_t p[2][C::kRows * 128];  // [tile % 2]; P^T: a row of 64 keys for each query row
  alignas(128) uint8_t tokens[C::kStages][C::kStageBytes];
  // [tile % 2]: what a token's codes are multiplied with, over the power of two that P carries for
  // it.
  alignas(16) __half multiplier[2][C::kScales][kTileKeys];
  alignas(16) uint2 scales[C::kStages][C::kPageScales ? kTileKeys : 1];  // from the page's end
  uint32_t exists[C::kStages][kWarpgroupWarps];                          // bit i: token 16 w + i

  alignas(16) const uint8_t* rows_to_load[kWarpgroupWarps][kWarpKeys];  // of a tile's tokens

  Barrier kv_full[C::kStages];   // bytes of the tokens
  Barrier kv_empty[C::kStages];  // 4 warps of keys and 8 of values have read them
  // [tile % 2]
  Barrier p_full[2];   // 4 warps of keys have written P
  Barrier p_empty[2];  // 8 warps of values have multiplied it
  // [item % 2]
  Barrier item_full[2];   // the slot is there
  Barrier rows_done[2];   // 4 warps of keys: the item's softmax is done
  Barrier item_empty[2];  // all 16 warps are done with it

  alignas(16) RowState rows[C::kRows];
  bool started;  // the item has had keys: the rows have maxima
  // [tile % 2]: whether some row has a new maximum, and the factors of what was summed before.
  uint32_t grown[2];
  alignas(16) float row_factor[2][C::kRows];
  float row_sum[C::kRows];
  alignas(16) float row_scale[2][C::kRows];  // [item % 2]: O times it is the result

  ItemSlot slots[2];  // [item % 2]
  PlanStorage plan;
  WorkItem split_items[2];  // the parts that this CTA has made
  int32_t num_split;
  uint32_t outcomes[2];  // of meeting the others that have some
};

}  // namespace flash_mla::mla_decode_sparse::sm90
