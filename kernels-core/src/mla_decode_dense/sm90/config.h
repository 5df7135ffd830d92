// Tile sizes, barriers and shared memory of the sm90 kernel for 64 rows and 16-bit caches.
#pragma once

#include <cstdint>

#include "mla_decode_dense/sm90/items.cuh"
#include "runtime/variant.h"

namespace flash_mla::mla_decode_dense::sm90 {

inline constexpr int kTileRows = 64;                               // M of a wgmma
inline constexpr int kTokenBytes = 128;                            // of a row in a column block
inline constexpr int kColumnsPerBlock = 64;                        // 128 bytes: the swizzle's span
inline constexpr int kColumnBlockBytes = kTileKeys * kTokenBytes;  // 64 keys x 64 columns
static_assert(kTileRows == kTileKeys);  // the column blocks of Q and K are of one size

inline constexpr int kVColumnBlocks = 8;                // 512 columns
inline constexpr int kHalfBlocks = kVColumnBlocks / 2;  // of V: a consumer warpgroup's share of O
inline constexpr int kBuffers = 2;                      // one for each consumer warpgroup

// A K tile arrives, and is freed, in pieces: four of two column blocks, and the ninth block alone.
inline constexpr int kPieceBlocks = 2;
inline constexpr int kRopePiece = kVColumnBlocks / kPieceBlocks;
inline constexpr int kPieces = kRopePiece + 1;

// __syncthreads is 0.
enum HardwareBarrier : int {
  kItemDone = 1,
  kStored = 2,
  kMerging = 3,
  kTailZeroed = 4,  // and the next: one for each warpgroup
  kLoading = 6,
};

inline constexpr int kConsumerRegisters = 208;

// The type of Q, K, P and the result.
template <class Cfg>
inline constexpr DType kMmaType = Cfg::v.kv == KvFormat::kFp16 ? DType::kFloat16 : DType::kBFloat16;

template <class Cfg>
struct alignas(1024) SharedStorage {
  static constexpr int kColumnBlocks = Cfg::v.d_qk / kColumnsPerBlock;

  uint8_t q[kColumnBlocks * kColumnBlockBytes];
  uint8_t k[kBuffers][kColumnBlocks * kColumnBlockBytes];
  // One is enough: P of a tile is written after P V of the one before.
  uint8_t p[kColumnBlockBytes];

  // load -> attend, and back; phase: the fill of the buffer.
  Barrier kv_full[kBuffers][kPieces];
  Barrier kv_empty[kBuffers][kPieces];
  // attend -> attend: a warpgroup has published P of its tile.
  Barrier p_full[kConsumers];
  // Of the last tile: has some row of a warp a new maximum, which, and the factor of what was
  // summed before. The warp of the other warpgroup that has the same rows reads it before it writes
  // its own.
  uint32_t grown[kWarpgroupWarps];
  float row_factor[kTileRows];
  float row_max[kTileRows];
  float row_sum[2][kConsumers][kTileRows];  // [item % 2]

  uint64_t missing_keys[kBuffers];  // bit: the key lies on a page that does not exist
  ItemFeed feed;
  int32_t loaded;  // the tile that was loaded last, counted over all passes; for prefetches

  WorkItem split_items[2];  // the parts that this CTA has made
  int32_t num_split;
  uint32_t outcomes[2];  // of meeting the others that have some
};

}  // namespace flash_mla::mla_decode_dense::sm90
