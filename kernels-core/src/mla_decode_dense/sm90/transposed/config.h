// Tile sizes, roles and shared memory of the sm90 kernel with transposed products.
#pragma once

#include "device/kv_format.h"
#include "mla_decode_dense/sm90/items.cuh"
#include "runtime/variant.h"

namespace flash_mla::mla_decode_dense::sm90::transposed {

using flash_mla::sm90::RowState;

inline constexpr int kCodeBlock = 128;      // codes of a token in a block: the swizzle's span
inline constexpr int kColumnsPerStep = 64;  // of Q: 128 bytes
inline constexpr int kDepth = 16;           // K of a wgmma

enum HardwareBarrier : int {  // __syncthreads is 0
  kItemDone = 1,
  kMerging = 2,
  kLoading = 3,
  kQueryWritten = 4,
  kWarpgroupSync = 5,  // and the next: one for each consumer warpgroup
};

template <class Cfg>
struct Config {
  static constexpr KvLayout kLayout = kv_layout(Cfg::v.kv);
  // Codes are converted where they are used, and multiplied as fp16; so is Q for them, when it is
  // loaded.
  static constexpr bool kCodes = kLayout.value == KvValue::kE4m3;
  static constexpr DType kMmaType =
      kLayout.value == KvValue::kBf16 ? DType::kBFloat16 : DType::kFloat16;
  static constexpr DType kOutType = kCodes ? DType::kBFloat16 : kMmaType;
  static constexpr int kRows = Cfg::v.tile_m;  // query rows of a tile: N of a wgmma
  static constexpr int kConsumerRegisters = kRows == 16 ? 208 : 216;
  // The consumers share O's columns, for which there are no registers otherwise. Else each has all
  // columns, for the tiles that it owns, and they add up in the end.
  static constexpr bool kShared = kRows == 64;
  static constexpr int kExchangeBytes = kShared ? 0 : 32768;
  static constexpr bool kRope = Cfg::v.d_qk > kLatentDim;
  // v32_fp8: scales per token and 128 columns, RoPE in bf16.
  static constexpr bool kScaled = kLayout.scale == KvScale::kFloat32;
  static constexpr bool kRopeCodes = kRope && kCodes && !kScaled;
  static constexpr bool kRopeBf16 = kRope && kScaled;
  static constexpr int kColumnBlocks = Cfg::v.d_qk / kColumnsPerStep;  // of Q
  static constexpr int kQueryBlockBytes = kRows * 128;
  static constexpr int kScales = 4;  // of a token

  // A stage of the ring holds 64 tokens as they are in the cache, in blocks of 128 bytes a token:
  // four of 128 codes, RoPE (64 codes or 64 bf16), scales; or blocks of 64 columns, RoPE the last.
  static constexpr int kBlockBytes = kTileKeys * 128;
  static constexpr int kLatentBytes = kTileKeys * kLatentDim * (kCodes ? 1 : 2);
  static constexpr int kRopeRowBytes = kRopeCodes ? 64 : 128;
  static constexpr int kRopeBytes = kRope ? kTileKeys * kRopeRowBytes : 0;
  static constexpr int kScaleBytes = kScaled ? kTileKeys * kScales * 4 : 0;
  static constexpr int kStageBytes = kLatentBytes + kRopeBytes + kScaleBytes;
  static_assert(kStageBytes % 1024 == 0);

  // A 16-bit tile arrives in pieces, so that Q K^T can begin: blocks that one box brings.
  static constexpr int kKeyBlocks = kCodes ? kLatentDim / kCodeBlock : kColumnBlocks;
  static constexpr int kPieces = kCodes ? 1 : kRope ? 3 : 4;
  static constexpr int kPieceBlocks = kKeyBlocks / kPieces;
  static_assert(kPieceBlocks * kPieces == kKeyBlocks);

  // Beside the stages: Q, P, and at most 7 KB for what else SharedStorage lists.
  static constexpr int kFixedBytes =
      kColumnBlocks * kQueryBlockBytes + kConsumers * kRows * 128 + kExchangeBytes + 7168;
  static constexpr int kMaxStages = (kMaxSmemBytes - kFixedBytes) / kStageBytes;
  static constexpr int kFewStages = kMaxStages < 4 ? kMaxStages : 4;
  // A stage must always be the same warpgroup's where each attends its own tiles: the parity of a
  // barrier means nothing to one that has not seen all of its phases.
  static constexpr int kStages = kShared ? kFewStages : kFewStages / kConsumers * kConsumers;
};

template <class Cfg>
struct alignas(1024) SharedStorage {
  using C = Config<Cfg>;
  uint8_t q[C::kColumnBlocks * C::kQueryBlockBytes];
  uint8_t k[C::kStages][C::kStageBytes];
  // P^T of the warpgroups' tiles: a row of 64 keys for each query row.
  uint8_t p[kConsumers][C::kRows * 128];

  // Of O, what the other warpgroup adds to its half of the columns.
  float4 exchange[kConsumers][C::kShared ? 1 : C::kExchangeBytes / kConsumers / sizeof(float4)];

  Barrier kv_full[C::kStages][C::kPieces];  // bytes of a piece
  Barrier kv_empty[C::kStages];             // its consumers' warps have read it
  Barrier max_full[kConsumers];             // 4 warps know the maxima of their tile
  Barrier p_full[kConsumers];               // 4 warps have written P of their tile
  Barrier p_empty[kConsumers];              // the other 4 have multiplied it

  alignas(16) RowState rows[C::kShared ? 1 : kConsumers][C::kRows];
  // Keys of the item that a row attends; not positive: none.
  alignas(16) int32_t visible[C::kRows];
  float query_factor[2][C::kRows];  // [pass % 2], from load
  // Of the last two tiles of a warpgroup: whether some row has a new maximum, and the factors of
  // what was summed before.
  uint32_t grown[kConsumers][2];
  alignas(16) float row_factor[kConsumers][2][C::kRows];
  float column_max[C::kShared ? 1 : kConsumers][kWarpgroupWarps][C::kRows];
  float row_sum[kConsumers * kWarpgroupWarps][C::kRows];
  // Of the warpgroups' tiles: what a token's codes are multiplied with, over the power of two that
  // P carries for it (v32_fp8).
  __half multiplier[kConsumers][C::kScaled ? C::kScales : 1][kTileKeys];

  uint64_t missing_keys[C::kStages];  // bit: the key lies on a page that does not exist
  ItemFeed feed;

  WorkItem split_items[2];  // the parts that this CTA has made
  int32_t num_split;
  uint32_t outcomes[2];  // of meeting the others that have some
};

}  // namespace flash_mla::mla_decode_dense::sm90::transposed
