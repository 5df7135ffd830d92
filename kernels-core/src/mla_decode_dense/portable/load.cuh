// The role of loading: a warp copies its slab of K, 32 keys at a time, beside its other work.
#pragma once

#include <cstdint>

#include "device/sm80/cp_async.cuh"
#include "mla_decode_dense/gpu.cuh"
#include "mla_decode_dense/portable/smem.h"

namespace flash_mla::mla_decode_dense::portable {

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
template <class Cfg>
class Loader {
  using C = Config<Cfg>;

 public:
  __device__ __forceinline__ Loader(const GpuParams& p, SharedStorage<Cfg>& smem)
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
    copy(token, valid_keys, tiles_ + stage * C::kSlabTileBytes);
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

  // Of the 32 keys, a warp copies those of its group.
  __device__ __forceinline__ void copy(const uint8_t* token, uint32_t valid_keys, uint32_t tile) {
    using flash_mla::sm80::copy_16;
    constexpr int kGroupKeys = kTileKeys / C::kGroups;
    const auto address = [&](int key) {
      return reinterpret_cast<const uint8_t*>(
          __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(token), key));
    };
    const auto is_valid = [&](int key) { return (valid_keys >> key & 1) != 0; };
    const int first = group_ * kGroupKeys;

    {  // 8 lanes copy 128 bytes of a key
      constexpr int kLanesPerKey = 8;
      const int part = lane_ % kLanesPerKey * 16;
#pragma unroll
      for (int i = 0; i < kGroupKeys * kLanesPerKey / kLanes; ++i) {
        const int key = first + i * (kLanes / kLanesPerKey) + lane_ / kLanesPerKey;
        const uint8_t* from = address(key) + slab_ * C::kSlabBytes + part;
        const uint32_t to = tile + key * C::kRowBytes + part;
#pragma unroll
        for (int b = 0; b < C::kSlabBytes; b += kLanesPerKey * 16) {
          copy_16(to + b, from + b, is_valid(key));
        }
      }
    }
    if constexpr (C::kRope) {
      constexpr int kLanesPerKey = C::kSlabRopeBytes / 16;
      const int part = lane_ % kLanesPerKey * 16;
#pragma unroll
      for (int i = 0; i * kLanes < kGroupKeys * kLanesPerKey; ++i) {
        const int k = i * (kLanes / kLanesPerKey) + lane_ / kLanesPerKey;
        const int key = first + k % kGroupKeys;
        const uint8_t* from = address(key) + C::kTokenRopeBytes + slab_ * C::kSlabRopeBytes + part;
        if (k < kGroupKeys) {
          copy_16(tile + key * C::kRowBytes + C::kSlabBytes + part, from, is_valid(key));
        }
      }
    }
    if constexpr (C::kTokenScales) {
      if (lane_ / kGroupKeys == group_) {
        flash_mla::sm80::copy_4(tile + lane_ * C::kRowBytes + C::kScaleOffsetBytes,
                                token + C::kLayout.scales_offset_bytes + slab_ * 4,
                                is_valid(lane_));
      }
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
