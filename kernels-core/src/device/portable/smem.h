// Shared memory of a portable decode kernel.
#pragma once

#include <cstdint>

#include "device/decode_schedule.cuh"
#include "device/portable/config.h"

namespace flash_mla::portable {

template <class C>
struct SharedStorage {
  // A slab's tiles; before the first of them what making the plan takes, after the last what
  // merging does: barriers stand between.
  alignas(128) uint8_t slabs[kSlabs][C::kTiles][C::kSlabTileBytes];
  // Partial logits in the order of the accumulators, which is the same in all warps.
  float4 logits[C::kLogitBuffers][C::kGroups][kSlabs][kKeyTiles][kLanes];
  PlanStorage plan;
  // In turn: the one before the last may still be read when the next is written.
  WorkItem items[3];
  uint32_t valid_keys[C::kWarps][C::kTiles];  // bit k: there is a key k of the tile
  WorkItem split_items[2];                    // of this CTA, at most its first and its last
  uint32_t outcomes[2];                       // of meeting the others that have parts
  int32_t num_split_items;

  __device__ WorkItem& item(int number) { return items[number % 3]; }
};

}  // namespace flash_mla::portable
