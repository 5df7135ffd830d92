// Rows: the columns of one token and head. A warp moves one at a time; this is what its lanes do.
#pragma once

#include <cstdint>

#include "device/e2m1.cuh"
#include "device/e4m3.cuh"
#include "device/quant.h"
#include "device/warp.cuh"
#include "kv_cache/chunk.cuh"
#include "kv_cache/problem.h"
#include "runtime/variant.h"

namespace flash_mla::kv_cache {

struct RowAddress {
  uint8_t* kv;
  uint8_t* token;   // null: the slot is outside of the cache
  uint8_t* scales;  // of the token, where they are at the end of the page
};

// Lane l of a warp has chunks l, l + 32, ... of a row: 16 bytes of kv each, kColumns columns. Those
// before kNopeChunks are stored as `value` of the layout, the rest as bf16.
template <class Cfg, DType kType>
struct Shape {
  static constexpr KvLayout kLayout = kv_layout(Cfg::v.kv);
  static constexpr bool kPacked = kLayout.packed();
  static constexpr int kElementBytes = kv_cache::kElementBytes<kType>;
  static constexpr int kColumns = kChunkBytes / kElementBytes;
  static constexpr int kMaxColumns = kPacked ? kLayout.d_qk : kLatentDim + kRopeDim;
  static constexpr int kMaxChunks = kMaxColumns / kColumns;
  static constexpr int kRounds = (kMaxChunks + kLanes - 1) / kLanes;
  static constexpr int kNopeChunks = kPacked ? kLayout.d_nope / kColumns : kMaxChunks;
  static constexpr int kTileLanes = kPacked ? kLayout.scale_tile / kColumns : 1;
  static_assert(kTileLanes <= kLanes && (kTileLanes & (kTileLanes - 1)) == 0);
  static_assert(kNopeChunks % kTileLanes == 0);

  static constexpr bool kHalf = kLayout.value == KvValue::kBf16 || kLayout.value == KvValue::kFp16;
  static constexpr DType kHalfType =
      kLayout.value == KvValue::kFp16 ? DType::kFloat16 : DType::kBFloat16;
  // Of a chunk in the cache.
  static constexpr int kRopeBytes = 2 * kColumns;
  static constexpr int kCodeBytes = kHalf                             ? kRopeBytes
                                    : kLayout.value == KvValue::kE4m3 ? kColumns
                                                                      : kColumns / 2;
  static constexpr bool kFloatScales = kLayout.scale == KvScale::kFloat32;
  static constexpr int kScaleBytes = kFloatScales ? 4 : 1;
  static constexpr bool kPageScales = kLayout.scales_offset_bytes == flash_mla::kPageScales;
  // A pad byte belongs to the RoPE columns, as if they were a tile.
  static_assert(kLayout.page_scale_bytes == 0 ||
                kLayout.page_scale_bytes * kLayout.scale_tile == kLayout.d_qk);

  // Which chunks a round has; some rounds have both kinds.
  static constexpr bool has_nope(int round) { return round * kLanes < kNopeChunks; }
  static constexpr bool has_rope(int round) {
    return kPacked && (round + 1) * kLanes > kNopeChunks;
  }

  // Whether the lane has a chunk of one kind in a round.
  static __device__ __forceinline__ bool is_nope(const Params& p, int lane, int round) {
    const int end = kPacked ? kNopeChunks : p.cache.d_qk / kColumns;
    return has_nope(round) && round * kLanes + lane < end;
  }
  static __device__ __forceinline__ bool is_rope(int lane, int round) {
    return has_rope(round) && (!has_nope(round) || round * kLanes + lane >= kNopeChunks) &&
           round * kLanes + lane < kMaxChunks;
  }

  // Where the lane's chunk of a round is, by its offset from lane 0's of round 0.
  static __device__ __forceinline__ uint8_t* kv(const RowAddress& at, int lane, int round) {
    return at.kv + lane * kChunkBytes + round * kLanes * kChunkBytes;
  }
  static __device__ __forceinline__ uint8_t* codes(const RowAddress& at, int lane, int round) {
    return at.token + lane * kCodeBytes + round * kLanes * kCodeBytes;
  }
  static __device__ __forceinline__ uint8_t* rope(const RowAddress& at, int lane, int round) {
    return at.token + lane * kRopeBytes +
           (kLayout.rope_offset_bytes + (round * kLanes - kNopeChunks) * kRopeBytes);
  }
  static __device__ __forceinline__ uint8_t* scale(const RowAddress& at, int lane, int round) {
    uint8_t* scales = kPageScales ? at.scales : at.token + kLayout.scales_offset_bytes;
    return scales + lane / kTileLanes * kScaleBytes + round * (kLanes / kTileLanes) * kScaleBytes;
  }
};

// 16 bytes of kv to bf16 or fp16 of the cache, or back: the same bytes where the dtype stays.
template <DType kFrom, DType kTo, int kBytes>
__device__ __forceinline__ auto convert(const Bytes<kBytes>& bytes) {
  if constexpr (kFrom == kTo) {
    return bytes;
  } else {
    constexpr int kCount = kBytes / kElementBytes<kFrom>;
    float values[kCount];
    unpack<kFrom>(bytes, values);
    return pack<kTo, kCount>(values);
  }
}

// The scale of a whole fp8 cache.
struct CacheScale {
  float scale;
  float reciprocal;
  bool plain;  // neither 0, NaN nor so large or small that `divide` could leave the normal numbers

  __device__ __forceinline__ explicit CacheScale(const float* source)
      : scale(source == nullptr ? 1.0f : *source), reciprocal(1.0f / scale) {
    plain = fabsf(scale) >= 0x1p-60f && fabsf(scale) <= 0x1p60f;
  }

  // values[i] /= scale, rounded as division does: one correction by the exact remainder, which
  // keeps every quotient that is not far below e4m3's least; what it cannot do is left to division.
  template <int kCount>
  __device__ __forceinline__ void divide(float* values) const {
    float quotients[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float estimate = values[i] * reciprocal;
      const float remainder = fmaf(-estimate, scale, values[i]);
      // The sign is the estimate's: a zero of the remainder takes that of a zero away.
      quotients[i] = copysignf(fmaf(remainder, reciprocal, estimate), estimate);
    }
    if (plain && !is_nan(nan_sum<kCount>(quotients))) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = quotients[i];
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] /= scale;
    }
  }
};

// Reading kv and writing the cache.
template <class Cfg, DType kType>
class Append {
 public:
  using S = Shape<Cfg, kType>;

  struct Row {
    Bytes<kChunkBytes> chunks[S::kRounds];
  };

  __device__ __forceinline__ Append(const Params& p, int lane)
      : p_(p), lane_(lane), cache_scale_(p.scale) {}

  // kv does not depend on the slot: its loads need not wait for the slot's.
  static constexpr bool kLoadNeedsSlot = false;

  __device__ __forceinline__ Row load(const RowAddress& at) const {
    Row row = {};
#pragma unroll
    for (int round = 0; round < S::kRounds; ++round) {
      if (S::is_nope(p_, lane_, round) || S::is_rope(lane_, round)) {
        row.chunks[round] = load_bytes<kChunkBytes>(S::kv(at, lane_, round));
      }
    }
    return row;
  }

  // All lanes of the warp together.
  __device__ __forceinline__ void store(const RowAddress& at, const Row& row) const {
    if (at.token == nullptr) return;
#pragma unroll
    for (int round = 0; round < S::kRounds; ++round) {
      const Bytes<kChunkBytes>& bytes = row.chunks[round];
      if (S::has_nope(round)) store_values(at, round, bytes, S::is_nope(p_, lane_, round));
      if (S::is_rope(lane_, round)) {
        store_bytes(S::rope(at, lane_, round), convert<kType, DType::kBFloat16>(bytes));
        if (S::kPageScales && lane_ % S::kTileLanes == 0) *S::scale(at, lane_, round) = 0;
      }
    }
  }

 private:
  static constexpr KvLayout kLayout = S::kLayout;
  static constexpr int kColumns = S::kColumns;

  __device__ __forceinline__ void store_values(const RowAddress& at, int round,
                                               const Bytes<kChunkBytes>& bytes, bool mine) const {
    if constexpr (S::kHalf) {
      if (mine) store_bytes(S::codes(at, lane_, round), convert<kType, S::kHalfType>(bytes));
    } else {
      float values[kColumns];
      unpack<kType>(bytes, values);
      Bytes<S::kCodeBytes> codes;
      if constexpr (!S::kPacked) {
        cache_scale_.template divide<kColumns>(values);
        quantise_e4m3(values, codes);
      } else {
        float amax = 0.0f;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) amax = fmaxf(amax, fabsf(values[i]));
#pragma unroll
        for (int step = 1; step < S::kTileLanes; step *= 2) {
          amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, step));
        }
        const bool writes_scale = mine && lane_ % S::kTileLanes == 0;
        if constexpr (kLayout.value == KvValue::kE4m3) {
          const int exponent = e4m3_tile_exponent(amax);
          // The scale's reciprocal; an infinite scale has 0: finite values become 0, infinite NaN.
          const float factor =
              exponent == 255 ? 0.0f : bits_float(static_cast<uint32_t>(254 - exponent) << 23);
#pragma unroll
          for (int i = 0; i < kColumns; ++i) values[i] *= factor;
          quantise_e4m3(values, codes);
          if (writes_scale) {
            if constexpr (S::kFloatScales) {
              *reinterpret_cast<uint32_t*>(S::scale(at, lane_, round)) =
                  static_cast<uint32_t>(exponent) << 23;
            } else {
              *S::scale(at, lane_, round) = static_cast<uint8_t>(exponent);
            }
          }
        } else {
          const uint8_t code = e2m1_tile_scale(amax);
          // A normal e4m3: its bits, moved, are those of a float32.
          const float scale = bits_float((uint32_t{code} << 20) + (120u << 23));
          if constexpr (kType == DType::kFloat32) {
            codes.words[0] = floats_to_e2m1x4(values, scale);
          } else {
            codes.words[0] = halves_to_e2m1x8(bytes.words, values, scale);
          }
          if (writes_scale) *S::scale(at, lane_, round) = code;
        }
      }
      if (mine) store_bytes(S::codes(at, lane_, round), codes);
    }
  }

  static __device__ __forceinline__ void quantise_e4m3(const float* values,
                                                       Bytes<S::kCodeBytes>& codes) {
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) codes.words[i] = floats_to_e4m3x4(values + 4 * i);
  }

  const Params& p_;
  const int lane_;
  const CacheScale cache_scale_;
};

// Reading the cache and writing kv.
template <class Cfg, DType kType>
class Gather {
 public:
  using S = Shape<Cfg, kType>;

  struct Row {
    Bytes<S::kCodeBytes> codes[S::kRounds];
    uint32_t scales[S::kRounds];
    Bytes<S::kRopeBytes> rope[S::kRounds];
  };

  __device__ __forceinline__ Gather(const Params& p, int lane)
      : p_(p), lane_(lane), cache_scale_(p.scale == nullptr ? 1.0f : *p.scale) {}

  static constexpr bool kLoadNeedsSlot = true;

  __device__ __forceinline__ Row load(const RowAddress& at) const {
    Row row = {};
    if (at.token == nullptr) return row;
#pragma unroll
    for (int round = 0; round < S::kRounds; ++round) {
      if (S::is_nope(p_, lane_, round)) {
        row.codes[round] = load_bytes<S::kCodeBytes>(S::codes(at, lane_, round));
        if constexpr (S::kFloatScales) {
          row.scales[round] = *reinterpret_cast<const uint32_t*>(S::scale(at, lane_, round));
        } else if constexpr (S::kPacked) {
          row.scales[round] = *S::scale(at, lane_, round);
        }
      }
      if (S::is_rope(lane_, round)) {
        row.rope[round] = load_bytes<S::kRopeBytes>(S::rope(at, lane_, round));
      }
    }
    return row;
  }

  __device__ __forceinline__ void store(const RowAddress& at, const Row& row) const {
#pragma unroll
    for (int round = 0; round < S::kRounds; ++round) {
      Bytes<kChunkBytes> bytes = {};  // zeros, for a slot outside of the cache
      if (S::is_nope(p_, lane_, round)) {
        if (at.token != nullptr) bytes = values_of(row.codes[round], row.scales[round]);
        store_bytes(S::kv(at, lane_, round), bytes);
      } else if (S::is_rope(lane_, round)) {
        if (at.token != nullptr) bytes = convert<DType::kBFloat16, kType>(row.rope[round]);
        store_bytes(S::kv(at, lane_, round), bytes);
      }
    }
  }

 private:
  static constexpr KvLayout kLayout = S::kLayout;
  static constexpr int kColumns = S::kColumns;

  __device__ __forceinline__ Bytes<kChunkBytes> values_of(const Bytes<S::kCodeBytes>& codes,
                                                          uint32_t scale_bits) const {
    if constexpr (S::kHalf) {
      return convert<S::kHalfType, kType>(codes);
    } else {
      float values[kColumns];
      float scale = cache_scale_;
      if constexpr (kLayout.scale == KvScale::kFloat32) {
        scale = bits_float(scale_bits);
      } else if constexpr (kLayout.scale == KvScale::kUe8m0) {
        scale = ue8m0_to_float(static_cast<uint8_t>(scale_bits));
      } else if constexpr (kLayout.scale == KvScale::kE4m3) {
        scale = e4m3_to_float(static_cast<uint8_t>(scale_bits));
      }
      if constexpr (kLayout.value == KvValue::kE4m3) {
#pragma unroll
        for (int i = 0; i < kColumns / 4; ++i) e4m3x4_to_floats(codes.words[i], values + 4 * i);
      } else {
#pragma unroll
        for (int i = 0; i < kColumns / 4; ++i) {
          e2m1x4_to_floats(uint32_t{codes.words[0]} >> (16 * i), values + 4 * i);
        }
      }
#pragma unroll
      for (int i = 0; i < kColumns; ++i) values[i] *= scale;
      return pack<kType, kColumns>(values);
    }
  }

  const Params& p_;
  const int lane_;
  const float cache_scale_;
};

}  // namespace flash_mla::kv_cache
