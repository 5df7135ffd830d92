// The items of a CTA, as the producer hands them to the consumers.
#pragma once

#include "device/scalar.h"
#include "mla_decode_dense/sm90/cta.cuh"

namespace flash_mla::mla_decode_dense::sm90 {

// One pass over an item, with what the producer works out for the consumers.
struct ItemSlot {
  WorkItem item;
  int32_t length;        // cache_seqlens of the request
  int32_t num_keys;      // that some row to be stored attends; there are pages for them
  int32_t partial_from;  // tiles from here on may hold keys that some row does not attend
  float scale_log2;      // logits in units of log2 are q.k times this
  int32_t only_token;    // the rows of this query token alone are stored; negative: all rows
  bool last;             // of the passes
};

struct ItemFeed {
  // load -> attend, and back; phase: the pass.
  Barrier q_full, q_empty;
  ItemSlot slots[2];  // [pass % 2]
  // The producer's own: the plan, the item, cache_seqlens of its request, how often its keys are
  // walked.
  PlanStorage plan;
  WorkItem item;
  int32_t length;
  int32_t passes;
};

// Whether one of 16 bytes' values, as V holds them, is not finite.
template <KvFormat kFormat>
__device__ __forceinline__ bool any_nonfinite(const uint4& v) {
  constexpr bool kCodes = kv_layout(kFormat).value == KvValue::kE4m3;
  bool found = false;
  for (const uint32_t word : {v.x, v.y, v.z, v.w}) {
    if constexpr (kCodes) {  // 0x7f without the sign
      for (int i = 0; i < 32; i += 8) found |= (word >> i & 0x7fu) == 0x7fu;
    } else {
      constexpr uint32_t kExponent = kFormat == KvFormat::kFp16 ? 0x7c00u : 0x7f80u;
      found |= (word & kExponent) == kExponent || (word >> 16 & kExponent) == kExponent;
    }
  }
  return found;
}

inline constexpr float kLargestBf16 = 0x1.fep127f;

// Whether some key that a later token of the tile attends and an earlier one does not has a value
// of V that is not finite. By a warp.
template <KvFormat kFormat>
__device__ __forceinline__ bool has_nonfinite_late_key(const GpuParams& p, const WorkItem& item,
                                                       const TileRows& rows) {
  constexpr KvLayout kLayout = kv_layout(kFormat);
  constexpr int kValueBytes = kLayout.value == KvValue::kE4m3 ? 1 : 2;
  constexpr int kLoadBytes = kLanes * sizeof(uint4);
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kLanes;
  const int32_t end = min(rows.num_keys(p), item.block_end * kTileKeys);
  bool found = false;
#pragma unroll 1
  for (int32_t key = max(rows.visible(p, 0), item.block_begin * kTileKeys); key < end; ++key) {
    const int32_t page_size = static_cast<int32_t>(p.kv.page_size);
    const int64_t page = p.block_table[item.request * p.block_table_stride_b +
                                       key / page_size * p.block_table_stride_p];
    if (!p.kv.has_page(page)) continue;
    const uint8_t* const token = p.kv.data + page * p.kv.page_stride_bytes +
                                 key % page_size * p.kv.token_stride_bytes +
                                 rows.kv_head * p.kv.head_stride_bytes;
#pragma unroll 1
    for (int at = 0; at < kLatentDim * kValueBytes; at += kLoadBytes) {
      const uint4 values = *reinterpret_cast<const uint4*>(token + at + lane * 16);
      found |= any_nonfinite<kFormat>(values);
    }
    if constexpr (kLayout.scale == KvScale::kFloat32) {
      const auto* scales = reinterpret_cast<const float*>(token + kLayout.scales_offset_bytes);
      // A product of finite values can be too large as well.
      found |=
          !(fabsf(scales[lane % (kLayout.d_nope / kLayout.scale_tile)]) * kE4m3Max < kLargestBf16);
    }
  }
  return __any_sync(kAllLanes, found);
}

// What load_keys() asks for first of all.
__device__ __forceinline__ void prefetch_page(const GpuParams& p, const WorkItem& item) {
  const int32_t entry = item.block_begin * kTileKeys / static_cast<int32_t>(p.kv.page_size);
  asm volatile("prefetch.global.L1 [%0];" ::"l"(
      p.block_table + item.request * p.block_table_stride_b + entry * p.block_table_stride_p));
}

// The keys that an item's pass walks.
struct ItemPass {
  const TileRows& rows;
  int32_t first_block;
  int32_t num_tiles;
  int32_t num_keys;  // of the request, that some row to be stored attends
  uint32_t index;    // of the pass, over all items
};

// Plans the CTA's items and hands them over, pass after pass. By the warps of the producer that
// sync() synchronises. The first one plans; the others call load_query(pass) when the consumers are
// done with the last one's, and publish the pass. Then all call load_keys(pass), which may run
// ahead of the consumers.
template <KvFormat kFormat, class Sync, class LoadQuery, class LoadKeys>
__device__ __forceinline__ void feed_items(const GpuParams& p, ItemFeed& feed,
                                           const RequestRuns<kThreads>& runs, int32_t team,
                                           int32_t member, const Sync& sync,
                                           const LoadQuery& load_query, const LoadKeys& load_keys) {
  const int32_t thread = static_cast<int32_t>(threadIdx.x) - kConsumerThreads;
  const bool plans = thread < kLanes;
  const RequestBlocks num_blocks{p};

  if (plans) make_plan(p.grid, team, num_blocks, runs, feed.plan);
  uint32_t index = 0;
#pragma unroll 1
  while (true) {
    if (plans) {
      if (thread == 0) {
        feed.item = next_item(p.grid, team, feed.plan, p.list, p.num_listed, num_blocks);
      }
      __syncwarp();
      const WorkItem item = feed.item;
      if (thread == 0 && item.block_begin < item.block_end) prefetch_page(p, item);
      const int32_t length = item.valid() ? request_length(p, item.request) : 0;
      const TileRows rows(p, item, member, length);
      int32_t passes = 1;
      if (item.valid() && !rows.any(p)) {
        passes = 0;  // the team has more CTAs than there are M tiles
      } else if (item.valid() && p.causal && rows.num_tokens(p) > 1 &&
                 has_nonfinite_late_key<kFormat>(p, item, rows)) {
        // P = 0 would not keep the value from the tokens that do not attend the key: each token is
        // a pass of its own, without the later keys.
        passes = rows.num_tokens(p);
      }
      if (thread == 0) {
        feed.length = length;
        feed.passes = passes;
      }
    }
    sync();

#pragma unroll 1
    for (int32_t i = 0; i < feed.passes; ++i) {
      // Read again for each pass: nothing of it shall be kept in registers during the loads.
      const WorkItem item = feed.item;
      const bool valid = item.valid();
      const TileRows rows(p, item, member, feed.length);
      const bool apart = feed.passes > 1;
      const int32_t num_keys =
          apart ? rows.visible(p, i * p.grid.tiles.heads_per_tile) : rows.num_keys(p);
      const int32_t block_end = min(item.block_end, ceil_div(num_keys, kTileKeys));
      const int32_t num_tiles = valid ? max(0, block_end - item.block_begin) : 0;
      const ItemPass pass = {rows, item.block_begin, num_tiles, num_keys, index};

      if (!plans) {
        if (index > 0) flash_mla::sm90::wait(feed.q_empty, (index - 1) % 2);
        if (num_tiles > 0) load_query(pass);
        if (thread == kLanes) {
          ItemSlot& slot = feed.slots[index % 2];
          slot.item = item;
          slot.item.block_end = item.block_begin + num_tiles;
          slot.length = rows.length;
          slot.num_keys = num_keys;
          slot.only_token = apart ? rows.first_token + i : -1;
          slot.last = i == feed.passes - 1;
          slot.scale_log2 = valid ? logit_scale_log2(p, item.request) : 0.0f;
          // The first row is that of the earliest token.
          const int32_t whole_keys = apart ? num_keys : rows.visible(p, 0);
          slot.partial_from =
              slot.scale_log2 > 0.0f ? whole_keys / kTileKeys - item.block_begin : 0;
          flash_mla::sm90::arrive(feed.q_full);
        }
        __syncwarp();
      }
      if (num_tiles > 0) load_keys(pass);
      ++index;
      if (!valid) return;
    }
    sync();  // all have read the item
  }
}

}  // namespace flash_mla::mla_decode_dense::sm90
