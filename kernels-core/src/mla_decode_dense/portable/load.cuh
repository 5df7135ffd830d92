// The role of loading: a warp copies its slab of K, 32 keys at a time, beside its other work.
#pragma once

#include <cstdint>

#include "device/portable/copy.cuh"
#include "device/portable/smem.h"
#include "mla_decode_dense/gpu.cuh"

namespace flash_mla::mla_decode_dense::portable {

using flash_mla::portable::kSlabs;
using flash_mla::portable::kTileKeys;

// The keys of an item that any row of the CTA's tile attends.
struct ItemKeys {
  uint32_t begin;
  uint32_t end;           // keys past it are masked for all rows
  int32_t first_row_end;  // what the tile's first query token attends; no row attends less

  __device__ ItemKeys(const GpuParams& p, const WorkItem& item, const TileRows& rows) {
    const int64_t tokens = min_of(p.grid.tiles.tokens_per_tile, p.s_q - rows.first_token);
    const int64_t limit = int64_t{item.block_end} * kBlockKeys;
    begin = static_cast<uint32_t>(item.block_begin) * kBlockKeys;
    first_row_end = rows.visible(p, 0);
    end = static_cast<uint32_t>(min_of(
        limit, rows.visible(p, static_cast<int32_t>(tokens - 1) * p.grid.tiles.heads_per_tile)));
  }
  __device__ int32_t num_tiles() const {
    return end > begin ? static_cast<int32_t>((end - begin + kTileKeys - 1) / kTileKeys) : 0;
  }
};

// Walks the tiles of one item after the other. Lane k looks up key k of a tile: it reads the block
// table one tile ahead and hands the token's address to the lanes that copy it.
template <class C>
class Loader {
 public:
  static constexpr bool kPrepares = false;

  __device__ __forceinline__ Loader(const GpuParams& p, flash_mla::portable::SharedStorage<C>& smem)
      : p_(p),
        lane_(static_cast<int>(threadIdx.x) % kLanes),
        slab_(static_cast<int>(threadIdx.x) / kLanes % kSlabs),
        group_(static_cast<int>(threadIdx.x) / (kLanes * kSlabs)),
        valid_keys_(smem.valid_keys[threadIdx.x / kLanes]),
        tiles_(flash_mla::sm80::smem_address(smem.slabs[slab_])) {}

  // The item's tiles are all under way.
  __device__ __forceinline__ bool done() const { return key_ - lane_ >= end_; }

  __device__ __forceinline__ void start(const WorkItem& item) {
    const TileRows rows(p_, item, /*member=*/0, request_length(p_, item.request));
    const ItemKeys keys(p_, item, rows);
    request_ = item.request;
    kv_head_ = rows.kv_head;
    end_ = keys.end;
    key_ = keys.begin + lane_;
    column_ = key_ / page_size();
    offset_ = key_ % page_size();
    look_up();
  }

  // Copies the next tile to stage `stage`, as one group of this thread's copies.
  __device__ __forceinline__ void issue(int stage) {
    const bool valid = p_.kv.has_page(page_);
    const uint32_t valid_keys = __ballot_sync(kAllLanes, valid);
    if (lane_ == 0) valid_keys_[stage] = valid_keys;
    const uint8_t* token = p_.kv.data;
    if (valid) {
      token += page_ * p_.kv.page_stride_bytes + int64_t{offset_} * p_.kv.token_stride_bytes +
               kv_head_ * p_.kv.head_stride_bytes;
    }
    flash_mla::portable::copy_slab<C>(token, valid_keys, tiles_ + stage * C::kSlabTileBytes, lane_,
                                      slab_, group_);
    flash_mla::sm80::commit_copies();

    key_ += kTileKeys;
    if (page_size() > kTileKeys) {
      offset_ += kTileKeys;
      if (offset_ >= page_size()) {
        offset_ -= page_size();
        ++column_;
      }
    } else {
      column_ += kTileKeys >> (31 - __clz(page_size()));  // a tile is whole pages
    }
    look_up();
  }

 private:
  // No key lies beyond a page of 2^31.
  __device__ __forceinline__ uint32_t page_size() const {
    return static_cast<uint32_t>(min_of(p_.kv.page_size, int64_t{1} << 31));
  }

  __device__ __forceinline__ void look_up() {
    page_ = -1;
    if (key_ < end_) {
      page_ = __ldg(p_.block_table + request_ * p_.block_table_stride_b +
                    column_ * p_.block_table_stride_p);
    }
  }

  const GpuParams& p_;
  const int lane_, slab_, group_;
  uint32_t* const valid_keys_;
  const uint32_t tiles_;

  int32_t request_ = 0;
  int32_t kv_head_ = 0;
  uint32_t end_ = 0;
  // This lane's key of the next tile: position, column of the table, offset in the page, page.
  uint32_t key_ = 0;
  uint32_t column_ = 0;
  uint32_t offset_ = 0;
  int32_t page_ = -1;
};

}  // namespace flash_mla::mla_decode_dense::portable
