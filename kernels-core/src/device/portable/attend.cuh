// The role of attending: logits of 32 keys, softmax, and P V for a warp's 128 columns.
//
// Of a tile, the warp of slab s computes the part of the logits that its columns of Q and K make.
// The warps of a group exchange these parts; then each of them has all logits of its 16 rows, does
// the same softmax, and multiplies P with its own columns of V. Nothing else passes between warps.
#pragma once

#include <cstdint>

#include "device/online_softmax.h"
#include "device/portable/config.h"
#include "device/portable/smem.h"
#include "device/sm80/barrier.cuh"
#include "device/sm80/cp_async.cuh"
#include "device/sm80/e4m3.cuh"
#include "device/sm80/exp2.cuh"
#include "device/sm80/ldmatrix.cuh"
#include "device/sm80/mma.cuh"
#include "device/split_reduce.cuh"

namespace flash_mla::portable {

// All keys of a tile.
inline constexpr uint32_t kAllKeys = 0xffffffffu;

// D: the operator's types and functions (kernel.cuh). Rows are those at lane / 4 and 8 below of the
// warp's 16; [r] says which.
template <class D>
class Attend {
  using C = typename D::Config;
  using Params = typename D::Params;
  using Rows = typename D::Rows;

 public:
  // Of columns 128 slab + [0, 128). 16-bit caches: o[t] has columns 8 t + 2 (lane % 4) + {0, 1} of
  // the first row, then of the second. e4m3: o[2 t] has columns 16 t + 4 (lane % 4) + {0, 2}, and
  // o[2 t + 1] those + {1, 3}.
  float o[kColumnTiles][4];
  SoftmaxRow softmax[2];  // once finish() has run

  __device__ __forceinline__ explicit Attend(SharedStorage<C>& smem)
      : smem_(smem),
        warp_(static_cast<int>(threadIdx.x) / kLanes),
        lane_(static_cast<int>(threadIdx.x) % kLanes),
        tiles_(flash_mla::sm80::smem_address(smem.slabs[slab()])) {}

  __device__ __forceinline__ int slab() const { return warp_ % kSlabs; }
  __device__ __forceinline__ int lane() const { return lane_; }
  __device__ __forceinline__ int32_t row(int r) const {
    return warp_ / kSlabs * kMmaRows + lane_ / 4 + 8 * r;
  }

  // Returns the number of tiles.
  __device__ __forceinline__ int32_t start(const Params& p, const WorkItem& item) {
    const Rows rows = D::rows(p, item);
    const typename D::ItemKeys keys(p, item, rows);
    load_queries(p, rows);
    scale_log2_ = D::logit_scale_log2(p, item.request);
    key_ = keys.begin;
    const int32_t numbers[2] = {row(0), row(1)};
    mask_.start(p, rows, keys, numbers);
#pragma unroll
    for (int r = 0; r < 2; ++r) softmax[r] = {};
#pragma unroll
    for (int i = 0; i < kColumnTiles * 4; ++i) o[i / 4][i % 4] = 0.0f;
    return keys.num_tiles();
  }

  // Attends the item's next 32 keys, which lie in tile `tile`.
  __device__ __forceinline__ void attend(int tile) {
    const uint32_t keys = tiles_ + tile * C::kSlabTileBytes;
    const uint8_t* const key_bytes = smem_.slabs[slab()][tile];
    float s[kKeyTiles][4];
    query_keys(s, keys, key_bytes);
    exchange(s);

    const uint32_t valid_keys = smem_.valid_keys[warp_][tile];
    const bool masked = valid_keys != kAllKeys || mask_.cuts(key_ + kTileKeys);
    scale_and_mask(s, masked, valid_keys);
    raise_maximum(s);
    uint32_t a[kTileKeys / 16][4];
    exponentials(s, masked, key_bytes, a);
    if constexpr (D::Mask::kRowsDiffer && !C::kE4m3) {
      if (masked && holds_infinity(valid_keys, key_bytes)) {
        attend_values_apart(a, keys);
      } else {
        attend_values(a, keys);
      }
    } else {
      attend_values(a, keys);
    }
    key_ += kTileKeys;
  }

  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      softmax[r].sum += __shfl_xor_sync(kAllLanes, softmax[r].sum, 1);
      softmax[r].sum += __shfl_xor_sync(kAllLanes, softmax[r].sum, 2);
    }
  }

 private:
  static constexpr int kSteps = kSlabSteps + (C::kRope ? 1 : 0);
  static constexpr int kGroupThreads = kSlabs * kLanes;

  // Fragments of A: Q's 128 columns of the slab, then its 16 RoPE columns. Where the cache is e4m3
  // a lane's columns are neighbours, in the order in which e4m3_to_bf16 takes codes apart.
  __device__ __forceinline__ void load_queries(const Params& p, const Rows& rows) {
    constexpr int kElementBytes = C::v.q == DType::kFloat8E4M3 ? 1 : 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool valid = rows.valid(p, row(r));
      const auto* q = static_cast<const uint8_t*>(p.q);
      if (valid) q = D::query(p, rows, row(r));
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int column = step < kSlabSteps ? slab() * kSlabCols + step * 16
                                             : kLatentDim + slab() * C::kSlabRopeCols;
        const uint8_t* from = q + column * kElementBytes;
        uint32_t low = 0, high = 0;
        if (!(step < kSlabSteps ? C::kE4m3 : C::kE4m3Rope)) {
          from += lane_ % 4 * 4;
          if (valid) {
            low = __ldg(reinterpret_cast<const uint32_t*>(from));
            high = __ldg(reinterpret_cast<const uint32_t*>(from + 16));
          }
        } else if (kElementBytes == 2) {
          uint2 four = make_uint2(0, 0);
          if (valid) four = __ldg(reinterpret_cast<const uint2*>(from + lane_ % 4 * 8));
          low = __byte_perm(four.x, four.y, 0x5410);
          high = __byte_perm(four.x, four.y, 0x7632);
        } else {
          uint32_t codes = 0;
          if (valid) codes = __ldg(reinterpret_cast<const uint32_t*>(from + lane_ % 4 * 4));
          flash_mla::sm80::e4m3_to_bf16(codes, low, high);
        }
        q_[step][r] = low;
        q_[step][2 + r] = high;
      }
    }
  }

  // The slab's part of Q K^T, with its tokens' scales.
  __device__ __forceinline__ void query_keys(float (&s)[kKeyTiles][4], uint32_t keys,
                                             const uint8_t* key_bytes) {
#pragma unroll
    for (int i = 0; i < kKeyTiles * 4; ++i) s[i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int step = 0; step < kSlabSteps; ++step) {
      if constexpr (C::kE4m3) {
        query_keys_e4m3(s, q_[step], keys + step * 16);
      } else {
        query_keys_16bit(s, q_[step], keys + step * 32);
      }
    }
    if constexpr (C::kTokenScales) {
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float scale = token_scale(key_bytes, j, i);
          s[j][i] *= scale;
          s[j][2 + i] *= scale;
        }
      }
    }
    if constexpr (C::kRope) {
      if constexpr (C::kE4m3Rope) {
        query_keys_e4m3(s, q_[kSlabSteps], keys + C::kSlabBytes);
      } else {
        query_keys_16bit(s, q_[kSlabSteps], keys + C::kSlabBytes);
      }
    }
  }
  // Of the slab's columns of key 8 j + 2 (lane % 4) + i.
  __device__ __forceinline__ float token_scale(const uint8_t* key_bytes, int j, int i) const {
    return *reinterpret_cast<const float*>(key_bytes + (j * 8 + lane_ % 4 * 2 + i) * C::kRowBytes +
                                           C::kScaleOffsetBytes);
  }
  // 16 columns of 2 bytes. A load of matrices: 16 keys of 2 chunks of 8 columns.
  __device__ __forceinline__ void query_keys_16bit(float (&s)[kKeyTiles][4], const uint32_t (&q)[4],
                                                   uint32_t columns) {
    const uint32_t at = columns + (lane_ % 8 + lane_ / 16 * 8) * C::kRowBytes + lane_ / 8 % 2 * 16;
#pragma unroll
    for (int j = 0; j < kKeyTiles; j += 2) {
      uint32_t k[4];
      flash_mla::sm80::load_matrices(k, at + j * 8 * C::kRowBytes);
      flash_mla::sm80::mma<C::kType>(s[j], q, k[0], k[1]);
      flash_mla::sm80::mma<C::kType>(s[j + 1], q, k[2], k[3]);
    }
  }
  // 16 columns of a byte. A load of matrices: 32 keys of a chunk of 16 columns.
  __device__ __forceinline__ void query_keys_e4m3(float (&s)[kKeyTiles][4], const uint32_t (&q)[4],
                                                  uint32_t columns) {
    static_assert(kKeyTiles == 4);
    uint32_t codes[4];
    flash_mla::sm80::load_matrices(codes, columns + lane_ * C::kRowBytes);
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
      uint32_t even, odd;
      flash_mla::sm80::e4m3_to_bf16(codes[j], even, odd);
      flash_mla::sm80::mma<C::kType>(s[j], q, even, odd);
    }
  }

  // Sums the slabs' parts of the logits, in the order of the slabs.
  __device__ __forceinline__ void exchange(float (&s)[kKeyTiles][4]) {
    auto& parts = smem_.logits[key_ / kTileKeys % C::kLogitBuffers][warp_ / kSlabs];
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
      parts[slab()][j][lane_] = make_float4(s[j][0], s[j][1], s[j][2], s[j][3]);
    }
    if constexpr (C::kGroups == 1) {
      // Who is a tile ahead writes to the other buffer, or is past the barrier between items.
      __syncthreads();
    } else {
      flash_mla::sm80::sync_named_barrier(kGroupBarrier + warp_ / kSlabs, kGroupThreads);
    }
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
      static_assert(kSlabs == 4);
      const float4 s0 = parts[0][j][lane_], s1 = parts[1][j][lane_];
      const float4 s2 = parts[2][j][lane_], s3 = parts[3][j][lane_];
      s[j][0] = (s0.x + s1.x) + (s2.x + s3.x);
      s[j][1] = (s0.y + s1.y) + (s2.y + s3.y);
      s[j][2] = (s0.z + s1.z) + (s2.z + s3.z);
      s[j][3] = (s0.w + s1.w) + (s2.w + s3.w);
    }
  }

  // Logits in units of log2; -inf for keys that a row does not attend.
  __device__ __forceinline__ void scale_and_mask(float (&s)[kKeyTiles][4], bool masked,
                                                 uint32_t valid_keys) {
#pragma unroll
    for (int i = 0; i < kKeyTiles * 4; ++i) s[i / 4][i % 4] *= scale_log2_;
    if (!masked) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < kKeyTiles * 2; ++i) {
        const int key = i / 2 * 8 + lane_ % 4 * 2 + i % 2;
        if ((valid_keys >> key & 1) == 0 || mask_.hides(r, key_ + key)) {
          s[i / 2][2 * r + i % 2] = -kInfinity;
        }
      }
    }
  }

  // Every warp of the group sees the same logits and decides alike.
  __device__ __forceinline__ void raise_maximum(const float (&s)[kKeyTiles][4]) {
    float highest[2];
    bool raise = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      highest[r] = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
      for (int j = 1; j < kKeyTiles; ++j) {
        highest[r] = fmaxf(highest[r], fmaxf(s[j][2 * r], s[j][2 * r + 1]));
      }
      raise |= highest[r] > softmax[r].max_log2 + kRescaleThresholdLog2;
    }
    if (!__any_sync(kAllLanes, raise)) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      highest[r] = fmaxf(highest[r], __shfl_xor_sync(kAllLanes, highest[r], 1));
      highest[r] = fmaxf(highest[r], __shfl_xor_sync(kAllLanes, highest[r], 2));
      const float max = fmaxf(highest[r], softmax[r].max_log2);
      // 0 for a row's first keys; a row that still has none keeps what it has: nothing.
      const float factor =
          max == -kInfinity ? 1.0f : flash_mla::sm80::exp2_approx(softmax[r].max_log2 - max);
      softmax[r].max_log2 = max;
      softmax[r].sum *= factor;
#pragma unroll
      for (int t = 0; t < kColumnTiles; ++t) {
        o[t][2 * r] *= factor;
        o[t][2 * r + 1] *= factor;
      }
    }
  }

  // P as fragments of A; the scales of V's tokens, if there are any, go into it.
  __device__ __forceinline__ void exponentials(const float (&s)[kKeyTiles][4], bool masked,
                                               const uint8_t* key_bytes,
                                               uint32_t (&a)[kTileKeys / 16][4]) {
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
      float p[2][2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float max = softmax[r].max_log2 == -kInfinity ? 0.0f : softmax[r].max_log2;
        p[r][0] = flash_mla::sm80::exp2_approx(s[j][2 * r] - max);
        p[r][1] = flash_mla::sm80::exp2_approx(s[j][2 * r + 1] - max);
        softmax[r].sum += p[r][0] + p[r][1];
      }
      if constexpr (C::kTokenScales) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float scale = token_scale(key_bytes, j, i);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            // A key that one row attends and another does not may have any scale; that of a key
            // which is none is 0.
            const bool not_attended = D::Mask::kRowsDiffer && masked && p[r][i] == 0.0f;
            p[r][i] = not_attended ? 0.0f : p[r][i] * scale;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        a[j / 2][j % 2 * 2 + r] = pack_out<C::kType>(p[r][0], p[r][1]);
      }
    }
  }

  // O += P V.
  __device__ __forceinline__ void attend_values(const uint32_t (&a)[kTileKeys / 16][4],
                                                uint32_t keys) {
    using flash_mla::sm80::mma;
#pragma unroll
    for (int t = 0; t < kColumnTiles; t += 2) {
      if constexpr (C::kE4m3) {
        static_assert(kTileKeys == 32);
        uint32_t codes[4], even[4], odd[4];
        flash_mla::sm80::load_matrices_transposed(codes, keys + lane_ * C::kRowBytes + t * 8);
#pragma unroll
        for (int i = 0; i < 4; ++i) flash_mla::sm80::e4m3_to_bf16(codes[i], even[i], odd[i]);
        mma<C::kType>(o[t], a[0], even[0], even[1]);
        mma<C::kType>(o[t + 1], a[0], odd[0], odd[1]);
        mma<C::kType>(o[t], a[1], even[2], even[3]);
        mma<C::kType>(o[t + 1], a[1], odd[2], odd[3]);
      } else {
#pragma unroll
        for (int i = 0; i < kTileKeys / 16; ++i) {
          uint32_t v[4];
          load_values(v, keys, i, t);
          mma<C::kType>(o[t], a[i], v[0], v[1]);
          mma<C::kType>(o[t + 1], a[i], v[2], v[3]);
        }
      }
    }
  }
  // 16 keys of two chunks of 8 columns.
  __device__ __forceinline__ void load_values(uint32_t (&v)[4], uint32_t keys, int i, int t) {
    flash_mla::sm80::load_matrices_transposed(
        v, keys + (i * 16 + lane_ % 16) * C::kRowBytes + (t + lane_ / 16) * 16);
  }

  // Keys that a row does not attend, but a later query token does, have P = 0 there, and 0 times
  // infinity or NaN would be NaN. Whether this warp's V has such a key; of e4m3 none comes.
  __device__ __forceinline__ bool holds_infinity(uint32_t valid_keys,
                                                 const uint8_t* key_bytes) const {
    constexpr uint32_t kExponent = C::kType == DType::kBFloat16 ? 0x7f80u : 0x7c00u;
    const auto all_ones = [](uint32_t pair) {
      return (pair & kExponent) == kExponent || (pair >> 16 & kExponent) == kExponent;
    };
    const uint32_t first = mask_.first_row_end > key_ ? mask_.first_row_end - key_ : 0;
    bool found = false;
#pragma unroll 1
    for (uint32_t key = first; key < kTileKeys && valid_keys >> key != 0; ++key) {
      const uint2 four = *reinterpret_cast<const uint2*>(key_bytes + key * C::kRowBytes +
                                                         lane_ * (C::kSlabBytes / kLanes));
      found |= all_ones(four.x) || all_ones(four.y);
    }
    return __any_sync(kAllLanes, found);
  }

  // For each n: O += P V for the rows that attend n keys of the tile, with those keys of V alone.
  __device__ __forceinline__ void attend_values_apart(const uint32_t (&a)[kTileKeys / 16][4],
                                                      uint32_t keys) {
    uint32_t attended[2];  // of the tile's keys
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      attended[r] = mask_.row_end[r] <= key_ ? 0 : mask_.row_end[r] - key_;
      if (attended[r] > kTileKeys) attended[r] = kTileKeys;
    }
#pragma unroll 1
    for (uint32_t n = 1; n <= kTileKeys; ++n) {
      if (!__any_sync(kAllLanes, attended[0] == n || attended[1] == n)) continue;
#pragma unroll
      for (int t = 0; t < kColumnTiles; t += 2) {
        float sum[2][4];
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i / 4][i % 4] = o[t + i / 4][i % 4];
#pragma unroll
        for (int i = 0; i < kTileKeys / 16; ++i) {
          uint32_t v[4];
          load_values(v, keys, i, t);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint32_t key = i * 16 + j % 2 * 8 + lane_ % 4 * 2;
            v[j] &= (key < n ? 0xffffu : 0u) | (key + 1 < n ? 0xffff0000u : 0u);
          }
          flash_mla::sm80::mma<C::kType>(sum[0], a[i], v[0], v[1]);
          flash_mla::sm80::mma<C::kType>(sum[1], a[i], v[2], v[3]);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (attended[i / 2 % 2] == n) o[t + i / 4][i % 4] = sum[i / 4][i % 4];
        }
      }
    }
  }

  SharedStorage<C>& smem_;
  const int warp_, lane_;
  const uint32_t tiles_;

  uint32_t q_[kSteps][4];
  typename D::Mask mask_;
  uint32_t key_;  // first of the next tile
  float scale_log2_;
};

}  // namespace flash_mla::portable
