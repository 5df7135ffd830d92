// Tokens on their way to shared memory, row by row by the copy engine. By the warps of values,
// which have little else to do; a warp brings eight of a tile's.
#pragma once

#include "device/sm80/cp_async.cuh"
#include "device/sm90/bulk.cuh"
#include "mla_decode_sparse/sm90/config.h"

namespace flash_mla::mla_decode_sparse::sm90 {

template <class Cfg>
class TokenLoader {
  using C = Config<Cfg>;
  static constexpr uint32_t kWarpTokens = kTileKeys / kRoleWarps;

 public:
  __device__ __forceinline__ TokenLoader(const GpuParams& p, SharedStorage<Cfg>& smem)
      : p_(p), smem_(smem) {}

  // Asks for tiles up to `end`, counted over all items, as far as item `item` and the one after it
  // have them.
  __device__ __forceinline__ void fill(uint32_t end, uint32_t item) {
#pragma unroll 1
    while (fill_ < end) {
      if (next_ == slot().num_tiles) {
        if (item_ > item) return;
        const uint32_t after = item_ + 1;
        flash_mla::sm90::wait(smem_.item_full[after % 2], after / 2 % 2);
        if (smem_.slots[after % 2].item.request < 0) return;
        start(after);
        continue;
      }
      load_next();
    }
  }
  // All tiles of items before this one have been asked for.
  __device__ __forceinline__ void catch_up(uint32_t item) {
    if (item == 0 || item_ < item) start(item);
  }

 private:
  __device__ __forceinline__ void start(uint32_t item) {
    item_ = item;
    next_ = 0;
    entry_ = fetch(0);
  }
  __device__ __forceinline__ void load_next() {
    const uint32_t tile = fill_++, stage = tile % C::kStages;
    const bool extra = is_extra(next_);
    const PagedKv& kv = extra ? p_.extra.kv : p_.main.kv;
    const int32_t entry = entry_;
    entry_ = fetch(++next_);

    const bool fp4 = C::kFp4Extra && extra && kv.format == KvFormat::kV41Fp4;
    const uint32_t bytes = fp4 ? kv_layout(KvFormat::kV41Fp4).row_bytes : C::kLayout.row_bytes;
    const bool valid = kv.has_slot(entry);
    const uint32_t all_valid = __ballot_sync(kAllLanes, valid);
    Barrier& full = smem_.kv_full[stage];
    flash_mla::sm90::wait(smem_.kv_empty[stage], (tile / C::kStages & 1) ^ 1);
    if (lane() == 0) {
      smem_.valid[stage][warp()] = static_cast<uint8_t>(all_valid);
      flash_mla::sm90::expect(full, __popc(all_valid) * bytes);
    }
    __syncwarp();
    if (lane() < kWarpTokens) {
      constexpr KvLayout layout = C::kLayout;
      const uint32_t token = warp() * kWarpTokens + lane();
      uint8_t* const to = smem_.tokens[stage] + token * (fp4 ? C::kFp4TokenBytes : C::kTokenBytes);
      if (valid) {
        const uint32_t page = p_.pages[extra].divide(entry);
        const uint32_t offset = entry - page * static_cast<uint32_t>(kv.page_size);
        flash_mla::sm90::copy_bulk(to, kv.row(layout, page, offset, 0), bytes, full);
        if constexpr (C::kPageScales) {
          flash_mla::sm80::copy_8(flash_mla::sm80::smem_address(&smem_.scales[stage][token]),
                                  kv.scales(layout, page, offset), true);
        }
      } else {
        // Their P is 0, and the products' other operand must be finite.
#pragma unroll 1
        for (uint32_t i = 0; i < bytes; i += 16) {
          *reinterpret_cast<uint4*>(to + i) = make_uint4(0, 0, 0, 0);
        }
        if constexpr (C::kPageScales) smem_.scales[stage][token] = make_uint2(0, 0);
        flash_mla::sm90::fence_async_proxy();  // the copy engine will write there
      }
      if constexpr (C::kPageScales) {
        flash_mla::sm80::arrive_when_copied(flash_mla::sm80::smem_address(&full));
      }
    }
    __syncwarp();
    if (lane() == 0) flash_mla::sm90::arrive(full);
    __syncwarp();
  }

  static __device__ __forceinline__ uint32_t lane() {
    return static_cast<uint32_t>(flash_mla::sm90::this_thread()) % kLanes;
  }
  static __device__ __forceinline__ uint32_t warp() {
    return static_cast<uint32_t>(flash_mla::sm90::this_thread()) / kLanes;
  }
  __device__ __forceinline__ const volatile ItemSlot& slot() const {
    return smem_.slots[item_ % 2];
  }
  __device__ __forceinline__ bool is_extra(int32_t tile) const {
    return slot().item.block_begin + tile >= slot().main_blocks;
  }

  // What the lane's token of a tile is called, -1 past the last one.
  __device__ __forceinline__ int32_t fetch(int32_t tile) const {
    if (tile >= slot().num_tiles || lane() >= kWarpTokens) return -1;
    const bool extra = is_extra(tile);
    const int32_t block = slot().item.block_begin + tile - (extra ? slot().main_blocks : 0);
    const int32_t i = block * kTileKeys + static_cast<int32_t>(warp() * kWarpTokens + lane());
    if (i >= slot().num_tokens[extra]) return -1;
    return __ldg(slot().entries[extra] +
                 i * (extra ? p_.extra.indices_stride_k : p_.main.indices_stride_k));
  }

  const GpuParams& p_;
  SharedStorage<Cfg>& smem_;
  uint32_t fill_ = 0;   // tiles asked for
  uint32_t item_ = 0;   // of the next one
  int32_t next_ = 0;    // its number there
  int32_t entry_ = -1;  // the lane's index in it
};

}  // namespace flash_mla::mla_decode_sparse::sm90
