// The warpgroup that loads: the tokens of the CTA's items, row by row by the copy engine. (Copies
// of 16 bytes by all lanes take fewer instructions, but keys and values wait behind them for their
// own reads of shared memory.)
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "device/sm80/cp_async.cuh"
#include "device/sm90/bulk.cuh"
#include "mla_decode_sparse/sm90/config.h"

namespace flash_mla::mla_decode_sparse::sm90 {

// In a warp: 16 tokens of each tile, which the first 16 lanes find.
template <class Cfg>
class TokenLoader {
  using C = Config<Cfg>;

 public:
  // Arrivals at kv_full beside the bytes of rows.
  static constexpr uint32_t kArrivals = kWarpgroupWarps + (C::kPageScales ? kTileKeys : 0);

  __device__ __forceinline__ TokenLoader(const GpuParams& p, SharedStorage<Cfg>& smem)
      : p_(p), smem_(smem) {}

  // Asks for the tokens of an item, each tile when there is a place for it.
  __device__ __forceinline__ void load(const volatile ItemSlot& slot) {
    const int32_t tiles = slot.num_tiles, main_tiles = slot.main_tiles;
    load_set(p_.main, p_.pages[0], p_.num_slots[0], slot.entries[0], slot.first_token[0],
             slot.num_tokens[0], main_tiles);
    load_set(p_.extra, p_.pages[1], p_.num_slots[1], slot.entries[1],
             slot.first_token[1] + main_tiles * kTileKeys, slot.num_tokens[1], tiles - main_tiles);
  }

 private:
  // `entries`: what the tokens are called; `tiles`, from token `first` on.
  __device__ __forceinline__ void load_set(const TokenSet& set, const PageDivisor& pages,
                                           uint32_t num_slots, const int32_t* entries,
                                           int32_t first, int32_t num_tokens, int32_t tiles) {
    if (tiles <= 0) return;
    const Place at;
    const PagedKv& kv = set.kv;
    const bool fp4 = C::kFp4Extra && kv.format == KvFormat::kV41Fp4;
    const int32_t token = first + at.warp * kWarpKeys + at.lane;
    const int32_t* from = entries + token * set.indices_stride_k;
    int32_t left = at.lane < kWarpKeys ? num_tokens - token : 0;
    // The lane's of the next tile, -1 past the last one.
    const auto fetch = [&] {
      const int32_t entry = left > 0 ? __ldg(from) : -1;
      from += kTileKeys * set.indices_stride_k;
      left -= kTileKeys;
      return static_cast<uint32_t>(entry);
    };
    uint32_t next = fetch();
#pragma unroll 1
    for (int32_t tile = 0; tile < tiles; ++tile) {
      const uint32_t now = next;
      next = fetch();  // it comes while this one is loaded
      load_tile(kv, pages, now, num_slots, fp4);
    }
  }

  __device__ __forceinline__ void load_tile(const PagedKv& kv, const PageDivisor& pages,
                                            uint32_t entry, uint32_t num_slots, bool fp4) {
    constexpr KvLayout layout = C::kLayout;
    const Place at;
    const bool exists = entry < num_slots;
    const uint32_t existing = __ballot_sync(kAllLanes, exists);
    const uint32_t page = pages.divide(entry);
    const uint32_t offset = entry - page * static_cast<uint32_t>(kv.page_size);
    const uint8_t*(&rows)[kWarpKeys] = smem_.rows_to_load[at.warp];
    if (exists) rows[at.lane] = kv.row(layout, page, offset, 0);
    __syncwarp();

    const uint32_t stage = ring_.stage;
    Barrier& full = smem_.kv_full[stage];
    flash_mla::sm90::wait(smem_.kv_empty[stage], ring_.phase ^ 1);
    ring_.advance();
    if (C::kFp4Extra && fp4) {
      copy<kv_layout(KvFormat::kV41Fp4).row_bytes, C::kFp4TokenBytes>(stage, rows, existing);
    } else {
      copy<C::kRowBytes, C::kTokenBytes>(stage, rows, existing);
    }
    if constexpr (C::kPageScales) {
      if (at.lane < kWarpKeys) {
        flash_mla::sm80::copy_8(smem_address(&smem_.scales[stage][at.warp * kWarpKeys + at.lane]),
                                exists ? kv.scales(layout, page, offset) : kv.data, exists);
        flash_mla::sm80::arrive_when_copied(smem_address(&full));
      }
    }
    flash_mla::sm90::arrive_warp(full);
  }

  // The warp's tokens of a tile.
  template <uint32_t kBytes, uint32_t kPitch>
  __device__ __forceinline__ void copy(uint32_t stage, const uint8_t* const (&rows)[kWarpKeys],
                                       uint32_t existing) {
    const Place at;
    uint8_t* const to = smem_.tokens[stage] + at.warp * kWarpKeys * kPitch;
    Barrier& full = smem_.kv_full[stage];
    if (at.lane == 0) {
      smem_.exists[stage][at.warp] = existing;
      flash_mla::sm90::expect(full, __popc(existing) * kBytes);
    }
    __syncwarp();
    if (existing == kAllWarpKeys) {
      if (cute::elect_one_sync()) {
#pragma unroll
        for (int i = 0; i < kWarpKeys; i += 2) {
          const auto two = *reinterpret_cast<const ulonglong2*>(&rows[i]);
          flash_mla::sm90::copy_bulk(to + i * kPitch, reinterpret_cast<const void*>(two.x), kBytes,
                                     full);
          flash_mla::sm90::copy_bulk(to + (i + 1) * kPitch, reinterpret_cast<const void*>(two.y),
                                     kBytes, full);
        }
      }
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kWarpKeys; ++i) {
      if ((existing >> i & 1) != 0) {
        if (cute::elect_one_sync()) {
          flash_mla::sm90::copy_bulk(to + i * kPitch, rows[i], kBytes, full);
        }
      } else {
        // Its P is 0, and the products' other operand must be finite.
        uint4* const row = reinterpret_cast<uint4*>(to + i * kPitch);
        for (uint32_t c = at.lane; c < kBytes / 16; c += kLanes) row[c] = make_uint4(0, 0, 0, 0);
      }
    }
    flash_mla::sm90::fence_async_proxy();  // the copy engine will write there
  }
  static __device__ __forceinline__ uint32_t smem_address(const void* pointer) {
    return flash_mla::sm90::smem_address(pointer);
  }

  const GpuParams& p_;
  SharedStorage<Cfg>& smem_;
  Ring<C::kStages> ring_;  // of the next tile
};

}  // namespace flash_mla::mla_decode_sparse::sm90
