// The role of a consumer warpgroup: Q K^T and softmax of every second tile, P V of all tiles for
// its half of the columns.
//
// Warpgroup w owns tiles w, w + 2, ... and columns [256 w, 256 w + 256) of O. Its turn for tile j,
// while the other one is half a turn behind:
//
//   Q K^T(j), columns 0-511 | P(j-1) is published: follow its maximum | P V(j-1) | Q K^T(j), the
//   rest | vote on growth, exp2 with the standing maximum, P V(j) 16 keys at a time, P(j) published
//
// The tensor cores always have the work of one of them queued. The standing maximum only moves when
// a row exceeds it by kRescaleThresholdLog2; then whoever sees it first tells the other, so both
// rescale alike.
#pragma once

#include "device/sm90/fragments.cuh"
#include "device/sm90/wgmma.cuh"
#include "mla_decode_dense/gpu.cuh"
#include "mla_decode_dense/sm90/config.h"

namespace flash_mla::mla_decode_dense::sm90 {

// A consumer warpgroup's accumulators of an item, and the softmax of two rows of each thread: those
// at 16 * warp + lane / 4, and 8 below.
struct Accumulators {
  float o[2][64];  // columns 256 w + 128 i
  float max[2];    // standing maximum of the logits, in units of log2
  float sum[2];    // of this thread's columns in the tiles that the warpgroup owns
};

template <class Cfg>
class Attend {
 public:
  __device__ __forceinline__ Attend(const GpuParams& p, SharedStorage<Cfg>& smem, int wg,
                                    int32_t member, Accumulators& acc)
      : p_(p),
        smem_(smem),
        member_(member),
        acc_(acc),
        wg_(wg),
        warp_(static_cast<int>(threadIdx.x) % kWarpgroup / kLanes),
        lane_(static_cast<int>(threadIdx.x) % kLanes),
        row_(warp_ * 16 + lane_ / 4) {}

  // Attends the tiles of item `index`. `own` and `other` count, over all items, the tiles of the
  // two warpgroups so far.
  __device__ __forceinline__ void item(uint32_t index, uint32_t& own, uint32_t& other) {
    slot_ = index % 2;
    const ItemSlot& slot = smem_.feed.slots[slot_];
    const int32_t tiles = uniform(slot.item.block_end - slot.item.block_begin);
    partial_from_ = uniform(slot.partial_from);
    // A factor that is not positive would turn maxima around: load marks all tiles then.
    scale_ = slot.scale_log2 > 0.0f ? slot.scale_log2 : 1.0f;
    acc_.max[0] = acc_.max[1] = kNoMaximum;
    acc_.sum[0] = acc_.sum[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < 128; ++i) acc_.o[i / 64][i % 64] = 0.0f;

    if (tiles <= wg_) {  // this warpgroup owns none of them
      release_query();
      if (wg_ == 0) wait_for_stored(index);
    }
    // ptxas serialises products that are issued in conditions, hence three pieces of code.
    int32_t tile = wg_;
    if (tile == 0 && tile < tiles) {
      query_keys<0, kBoxes>(own);
      flash_mla::sm90::wgmma_commit();
      wait_for_stored(index);
      wait_for_logits();
      attend_own(tile, tiles, other);
      ++own;
      tile += kConsumers;
    }
#pragma unroll 1
    for (; tile < tiles; tile += kConsumers) {
      query_keys<0, kEarlyBoxes>(own);
      follow(other);
      attend_other(tile - 1);
      query_keys<kEarlyBoxes, kBoxes>(own);
      flash_mla::sm90::wgmma_commit();
      // Two pieces of P V, then Q K^T, are under way.
      flash_mla::sm90::wgmma_wait<2>();
      release(wg_ ^ 1, 0);
      flash_mla::sm90::wgmma_wait<1>();
      release(wg_ ^ 1, 1);
      ++other;
      wait_for_logits();
      attend_own(tile, tiles, other);
      ++own;
    }
    if (tile == tiles && tiles > 0) {  // the other's last tile is the item's last
      follow(other);
      attend_other(tiles - 1);
      flash_mla::sm90::wgmma_wait<0>();
      pin_output();
      release(wg_ ^ 1, 0);
      release(wg_ ^ 1, 1);
      ++other;
    }
  }

  __device__ __forceinline__ int row() const { return row_; }
  __device__ __forceinline__ int lane() const { return lane_; }

 private:
  static constexpr int kBoxes = SharedStorage<Cfg>::kColumnBlocks;
  // Column blocks of Q K^T(j) that are issued before P V(j-1): all but the last piece.
  static constexpr int kEarlyBoxes = (kBoxes - 1) / kPieceBlocks * kPieceBlocks;
  static constexpr bool kRope = kBoxes > kVColumnBlocks;
  static constexpr DType kType = kMmaType<Cfg>;
  using Mma = flash_mla::sm90::Wgmma<kType>;
  using Operand = flash_mla::sm90::Operand;
  static constexpr int kSteps = kTileKeys / 16;  // K = 16 of P V

  __device__ __forceinline__ void pin_output() {
    flash_mla::sm90::pin(acc_.o[0]);
    flash_mla::sm90::pin(acc_.o[1]);
  }
  // First warpgroup: the second has stored the last item, for which it used P's place.
  __device__ __forceinline__ void wait_for_stored(uint32_t index) {
    if (index > 0) flash_mla::sm90::named_barrier_sync(kStored, kConsumerThreads);
  }
  __device__ __forceinline__ void wait_for_logits() {
    flash_mla::sm90::wgmma_wait<0>();
    flash_mla::sm90::pin(s_);
    pin_output();
  }

  // This warp is done with a piece of V's own half in a buffer.
  __device__ __forceinline__ void release(int buffer, int piece) {
    if (lane_ == 0) {
      flash_mla::sm90::arrive(smem_.kv_empty[buffer][wg_ * kHalfBlocks / kPieceBlocks + piece]);
    }
    __syncwarp();
  }
  __device__ __forceinline__ void release_query() {
    if (lane_ == 0) flash_mla::sm90::arrive(smem_.feed.q_empty);
    __syncwarp();
  }

  // S (+)= Q K^T of the own tile over column blocks [kFirst, kLast), the own half of V first: that
  // is the order in which they arrive.
  template <int kFirst, int kLast>
  __device__ __forceinline__ void query_keys(uint32_t own) {
    constexpr int kBlocksAtOnce = kPieceBlocks;
#pragma unroll
    for (int first = kFirst; first < kLast; first += kBlocksAtOnce) {
      static_assert(kFirst % kBlocksAtOnce == 0);
      const int piece = first / kPieceBlocks;
      // The halves change places in the second warpgroup.
      const int32_t swapped = piece < kRopePiece ? piece ^ (wg_ * kRopePiece / 2) : piece;
      flash_mla::sm90::wait(smem_.kv_full[wg_][swapped], own % 2);
      flash_mla::sm90::wgmma_fence();
      const int32_t at = swapped * kPieceBlocks * kColumnBlockBytes;
      const Operand q(smem_.q + at, flash_mla::sm90::kKMajorLeading);
      const Operand k(smem_.k[wg_] + at, flash_mla::sm90::kKMajorLeading);
#pragma unroll
      for (int i = first; i < first + kBlocksAtOnce && i < kLast; ++i) {
#pragma unroll
        for (int step = 0; step < kColumnsPerBlock / 16; ++step) {
          const uint32_t offset = (i - first) * kColumnBlockBytes + step * 32;
          if (i == 0 && step == 0) {
            Mma::template product<false, kTileKeys, Mma::kKMajor>(s_, q.at(offset), k.at(offset));
          } else {
            Mma::template product<true, kTileKeys, Mma::kKMajor>(s_, q.at(offset), k.at(offset));
          }
        }
      }
    }
  }

  // Waits for P of the other's tile and takes over its maximum.
  __device__ __forceinline__ void follow(uint32_t other) {
    flash_mla::sm90::wait(smem_.p_full[wg_ ^ 1], other % 2);
    if (uniform(*static_cast<volatile uint32_t*>(&smem_.grown[warp_]))) {
      flash_mla::sm90::wgmma_wait<0>();
      const volatile float* factor = smem_.row_factor;
      const volatile float* max = smem_.row_max;
      const float f0 = factor[row_], f1 = factor[row_ + 8];
      acc_.max[0] = max[row_];
      acc_.max[1] = max[row_ + 8];
      rescale(f0, f1);
    }
  }
  __device__ __forceinline__ void rescale(float f0, float f1) {
    acc_.sum[0] *= f0;
    acc_.sum[1] *= f1;
#pragma unroll
    for (int i = 0; i < 128; ++i) acc_.o[i / 64][i % 64] *= (i & 2) ? f1 : f0;
  }

  // O += P V of the other's tile, P from shared memory; two committed groups.
  __device__ __forceinline__ void attend_other(int32_t tile) {
    zero_tail(wg_ ^ 1, tile);
    pin_output();
    flash_mla::sm90::wgmma_fence();
    const Operand p(smem_.p, flash_mla::sm90::kKMajorLeading);
    const Operand v = value_operand(wg_ ^ 1);
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        Mma::product_n128(acc_.o[piece], p.at(step * 32), v.at(value_offset(piece, step)));
      }
      flash_mla::sm90::wgmma_commit();
    }
  }
  // V is the K tile read along the keys: 64 more columns are a column block on, 8 more keys 1 KB.
  __device__ __forceinline__ Operand value_operand(int buffer) const {
    return {smem_.k[buffer] + wg_ * kHalfBlocks * kColumnBlockBytes, kColumnBlockBytes};
  }
  static __device__ __forceinline__ constexpr uint32_t value_offset(int piece, int step) {
    return piece * kPieceBlocks * kColumnBlockBytes + step * 16 * kTokenBytes;
  }

  // For what is rare, and so shall keep nothing in registers between tiles.
  __device__ __forceinline__ const volatile ItemSlot& slot() const {
    return smem_.feed.slots[slot_];
  }

  // Keys past the cache's end: their P is 0, but their bytes may be NaN. Each warpgroup clears what
  // it multiplies; nobody else reads that any more.
  __device__ __forceinline__ void zero_tail(int buffer, int32_t tile) {
    if (tile < partial_from_) return;
    const int32_t valid = uniform(slot().num_keys - (slot().item.block_begin + tile) * kTileKeys);
    if (valid >= kTileKeys) return;
    uint8_t* half = smem_.k[buffer] + wg_ * kHalfBlocks * kColumnBlockBytes;
#pragma unroll 1  // rare: registers matter more
    for (int32_t i = warp_ * kLanes + lane_; i < (kTileKeys - valid) * kHalfBlocks * 8;
         i += kWarpgroup) {
      const int32_t chunk = i % 8, block = i / 8 % kHalfBlocks, key = valid + i / 8 / kHalfBlocks;
      *reinterpret_cast<uint4*>(half + block * kColumnBlockBytes + key * kTokenBytes + chunk * 16) =
          make_uint4(0, 0, 0, 0);
    }
    flash_mla::sm90::fence_async_proxy();
    flash_mla::sm90::named_barrier_sync(kTailZeroed + wg_, kWarpgroup);
  }

  // Logits of keys that a row does not attend become -inf.
  __device__ __forceinline__ void look_at_keys(int32_t tile, uint64_t missing) {
    const float scale = slot().scale_log2;
    if (!(scale > 0.0f)) {
#pragma unroll
      for (int i = 0; i < 32; ++i) s_[i] *= scale;
    }
    const int32_t column = 2 * (lane_ % 4);
    WorkItem item;
    item.unit = slot().item.unit;
    const TileRows rows(p_, item, member_, slot().length);
    const int32_t first = (slot().item.block_begin + tile) * kTileKeys + column;
    const int32_t visible[2] = {rows.visible(p_, row_) - first, rows.visible(p_, row_ + 8) - first};
    missing >>= column;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int32_t c = 8 * (i / 4) + i % 2;
      if (c >= visible[i / 2 % 2] || ((missing >> c) & 1)) s_[i] = -kInfinity;
    }
  }

  // Softmax and P V of the own tile, whose Q K^T is done.
  __device__ __forceinline__ void attend_own(int32_t tile, int32_t tiles, uint32_t other) {
    const uint64_t missing = *static_cast<volatile uint64_t*>(&smem_.missing_keys[wg_]);
    const bool complete = __all_sync(kAllLanes, missing == 0);
    if constexpr (kRope) {
      if (lane_ == 0) flash_mla::sm90::arrive(smem_.kv_empty[wg_][kRopePiece]);
      __syncwarp();
    }
    if (tile + kConsumers >= tiles) release_query();
    if (tile >= partial_from_ || !complete) look_at_keys(tile, missing);

    // Does a row of this warp exceed its standing maximum by much?
    float high[2] = {fmaxf(s_[0], s_[1]), fmaxf(s_[2], s_[3])};
#pragma unroll
    for (int i = 4; i < 32; i += 4) {
      high[0] = fmaxf(high[0], fmaxf(s_[i], s_[i + 1]));
      high[1] = fmaxf(high[1], fmaxf(s_[i + 2], s_[i + 3]));
    }
    const bool grown =
        __any_sync(kAllLanes, high[0] * scale_ > acc_.max[0] + kRescaleThresholdLog2 ||
                                  high[1] * scale_ > acc_.max[1] + kRescaleThresholdLog2);
    if (grown) {
      float factor[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        high[r] = fmaxf(high[r], __shfl_xor_sync(kAllLanes, high[r], 1));
        high[r] = fmaxf(high[r], __shfl_xor_sync(kAllLanes, high[r], 2));
        const float max = fmaxf(acc_.max[r], high[r] * scale_);
        factor[r] = flash_mla::sm90::fast_exp2(acc_.max[r] - max);
        acc_.max[r] = max;
        if (lane_ % 4 == 0) {
          smem_.row_factor[row_ + 8 * r] = factor[r];
          smem_.row_max[row_ + 8 * r] = max;
        }
      }
      rescale(factor[0], factor[1]);
    }
    if (lane_ == 0) smem_.grown[warp_] = grown;

    // All warps of this warpgroup have read the last P.
    if (tile > 0) {
      flash_mla::sm90::wait(smem_.kv_empty[wg_ ^ 1][wg_ * kHalfBlocks / kPieceBlocks + 1],
                            (other - 1) % 2);
    }
    zero_tail(wg_, tile);

    pin_output();
    const Operand v = value_operand(wg_);
    const uint32_t to = flash_mla::sm90::smem_address(smem_.p) +
                        (warp_ * 16 + lane_ % 16) * kTokenBytes +
                        (((lane_ / 16) ^ (lane_ % 8)) << 4);
    uint32_t p[kSteps][4];
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = i % 2;
        const float a =
            flash_mla::sm90::fast_exp2(fmaf(s_[step * 8 + i * 2], scale_, -acc_.max[r]));
        const float b =
            flash_mla::sm90::fast_exp2(fmaf(s_[step * 8 + i * 2 + 1], scale_, -acc_.max[r]));
        sum[r] += a + b;
        p[step][i] = flash_mla::sm90::pack<kType>(a, b);
      }
      flash_mla::sm90::store_matrices(to ^ (step << 5), p[step]);
      flash_mla::sm90::wgmma_fence();
      Mma::product_n128(acc_.o[0], p[step], v.at(value_offset(0, step)));
    }
    flash_mla::sm90::wgmma_commit();
    acc_.sum[0] += sum[0];
    acc_.sum[1] += sum[1];
    flash_mla::sm90::fence_async_proxy();
    __syncwarp();
    if (lane_ == 0) flash_mla::sm90::arrive(smem_.p_full[wg_]);
    __syncwarp();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Mma::product_n128(acc_.o[1], p[step], v.at(value_offset(1, step)));
    }
    flash_mla::sm90::wgmma_commit();
    flash_mla::sm90::wgmma_wait<1>();
    release(wg_, 0);
    flash_mla::sm90::wgmma_wait<0>();
    pin_output();
    release(wg_, 1);
  }

  const GpuParams& p_;
  SharedStorage<Cfg>& smem_;
  const int32_t member_;
  Accumulators& acc_;
  float s_[32];  // logits of the own tile, as wgmma leaves them
  const int wg_, warp_, lane_, row_;
  uint32_t slot_;         // of the item
  int32_t partial_from_;  // tiles from here on may hold keys that some row does not attend
  float scale_;           // of logits, to units of log2
};

}  // namespace flash_mla::mla_decode_dense::sm90
