// The role of the warpgroup of keys: queries, Q K^T and softmax of each tile.
//
//   S^T[64 keys][rows] = K Q^T      A: K, in registers;   B: Q, in shared memory
//
// With warp w, g = lane / 4, t = lane % 4, a thread has the keys at places 16 w + g and 8 on, and
// of a block of 64 columns 16 t to 16 t + 15, four in each of four products; of a block in bf16 8 t
// to 8 t + 7, and as many half a block on. Queries lie in that order.
//
// The standing maximum of a row moves only when a logit exceeds it by kRescaleThresholdLog2; an
// item's first keys set it.
#pragma once

#include "device/sm90/wgmma.cuh"
#include "mla_decode_sparse/sm90/convert.cuh"

namespace flash_mla::mla_decode_sparse::sm90 {

template <class Cfg>
class Keys {
  using C = Config<Cfg>;
  using Operand = flash_mla::sm90::Operand;
  static constexpr int kN = C::kRows;
  // Products are issued in groups of two, of which one is under way while the next is converted.
  static constexpr int kGroupSteps = 2;
  static constexpr int kBlockGroups = kColumns / kDepth / kGroupSteps;
  static constexpr int kAhead = 2;  // blocks whose codes are on their way
  // RoPE that is no part of V stays bf16, in products of its own.
  static constexpr bool kBf16Rope = C::kRope && !C::kRopeInValues;
  static constexpr int kCodeBlocks = kBlocks - (C::kRopeInValues ? 1 : 0);
  static constexpr int kBf16Blocks = !C::kCodes ? C::kQueryBlocks : kBf16Rope ? 1 : 0;

 public:
  __device__ __forceinline__ explicit Keys(SharedStorage<Cfg>& smem) : smem_(smem) {}

  // The queries of an item, in the place of the one before.
  __device__ __forceinline__ void load_queries(const GpuParams& p, const TileRows& rows) {
    sync();  // no product reads those of the item before
    const int thread = threadIdx.x % kWarpgroup;
    constexpr int kAtOnce = C::kQueryBlocks % 3 == 0 ? 3 : 4;
    flash_mla::sm90::load_query_rows<kN, kWarpgroup, C::kQueryBlocks, kBf16Blocks, kAtOnce>(
        smem_.q, thread, p.softmax_scale * kLog2e,
        [&](int row) {
          return rows.valid(p, row) ? reinterpret_cast<const uint8_t*>(rows.query(p, row))
                                    : nullptr;
        },
        [&](int row) -> float& { return smem_.rows[row].factor; });
    if (thread < kN) smem_.rows[thread].max = 0.0f;
    if (thread == 0) smem_.started = false;
    flash_mla::sm90::fence_async_proxy();
    sync();
  }

  // The keys of an item. `first`: its first tile, counted over all items.
  __device__ __forceinline__ void attend(uint32_t slot, uint32_t first, int32_t tiles) {
    const uint32_t fp4_from = first + e4m3_tiles<Cfg>(smem_.slots[slot], tiles);
#pragma unroll
    for (float& sum : sums_) sum = 0.0f;
#pragma unroll 1
    for (uint32_t tile = first; tile < first + tiles; ++tile) {
      flash_mla::sm90::wait(smem_.kv_full[ring_.stage], ring_.phase);
      if constexpr (!C::kCodes) {
        query_bf16_keys(ring_.stage);
      } else if (C::kFp4Extra && tile >= fp4_from) {
        query_keys<true>(ring_.stage);
      } else {
        query_keys<false>(ring_.stage);
      }
      ring_.advance();
      softmax(tile);
    }
    add_up_sums();
  }

  // The item's softmax is done: what values multiply rows with, and what is known of them.
  __device__ __forceinline__ void finish(const GpuParams& p, const TileRows& rows,
                                         const WorkItem& item, int32_t member, uint32_t slot) {
    const int row = threadIdx.x % kWarpgroup;
    if (row < kN) {
      const float max = smem_.started ? smem_.rows[row].max : -kInfinity;
      const SoftmaxRow softmax = {max, smem_.row_sum[row]};
      const bool valid = rows.valid(p, row);
      float scale = 1.0f;
      if (item.num_parts > 1) {
        const int64_t tile = partial_tile(p.grid, item, member, item.part);
        if (valid) *p.partials.header(tile, row) = {softmax.max_log2, softmax.sum, 0.0f, 0.0f};
      } else if (valid) {
        const float lse = softmax.lse();
        scale = softmax.empty() ? 0.0f : 1.0f / softmax.sum;
        if (const float* const sink = rows.sink(p, row)) scale *= sink_factor(lse, *sink);
        *rows.lse(p, row) = lse;
      }
      smem_.row_scale[slot][row] = scale;
    }
    flash_mla::sm90::arrive_warp(smem_.rows_done[slot]);
    flash_mla::sm90::arrive_warp(smem_.item_empty[slot]);
  }

 private:
  static __device__ __forceinline__ void sync() {
    flash_mla::sm90::named_barrier_sync(kKeysSync, kWarpgroup);
  }

  // S^T (+)= of 32 columns of a block: `of` both keys, a group.
  template <DType kType>
  __device__ __forceinline__ void multiply(const Columns (&of)[2], const Operand& q, int block,
                                           int group, bool first) {
    using Mma = flash_mla::sm90::Wgmma<kType>;
    flash_mla::sm90::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kGroupSteps; ++i) {
      const uint32_t a[4] = {of[0][2 * i], of[1][2 * i], of[0][2 * i + 1], of[1][2 * i + 1]};
      const uint64_t b = q.at(block * C::kQueryBlockBytes + (group * kGroupSteps + i) * 32);
      if (first && i == 0) {
        Mma::template product<false, kN>(s_, a, b);
      } else {
        Mma::template product<true, kN>(s_, a, b);
      }
    }
    flash_mla::sm90::wgmma_commit();
  }

  // S^T = K Q^T of a tile in bf16.
  __device__ __forceinline__ void query_bf16_keys(uint32_t stage) {
    const Place at;
    const uint32_t key = kWarpKeys * at.warp + token_at(at.g);  // and 8 on
    const uint8_t* const token = smem_.tokens[stage] + key * C::kTokenBytes + at.t * 16;
    find_existing(at, stage);
    const Operand q(smem_.q, flash_mla::sm90::kKMajorLeading);
    constexpr int kGroups = C::kQueryBlocks * kBlockGroups;
    constexpr int kBuffers = kAhead * kBlockGroups;
    Columns columns[kBuffers][2];
    const auto load = [&](int group) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 v =
            *reinterpret_cast<const uint4*>(token + half * 8 * C::kTokenBytes + group * 64);
        Columns& of = columns[group % kBuffers][half];
        of[0] = v.x;
        of[1] = v.y;
        of[2] = v.z;
        of[3] = v.w;
      }
    };
#pragma unroll
    for (int group = 0; group < kBuffers - 1; ++group) load(group);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      multiply<DType::kBFloat16>(columns[group % kBuffers], q, group / kBlockGroups,
                                 group % kBlockGroups, group == 0);
      flash_mla::sm90::wgmma_wait<1>();  // the products before have read what comes next
      if (group + kBuffers - 1 < kGroups) load(group + kBuffers - 1);
    }
    flash_mla::sm90::arrive_warp(smem_.kv_empty[stage]);  // what was read of it is in registers
  }

  __device__ __forceinline__ void find_existing(const Place& at, uint32_t stage) {
    const uint32_t exists = smem_.exists[stage][at.warp];
    all_exist_ = exists == kAllWarpKeys;
    exists_ = exists >> token_at(at.g);
  }

  // S^T = K Q^T of a tile.
  template <bool kFp4>
  __device__ __forceinline__ void query_keys(uint32_t stage) {
    const Place at;
    constexpr int kTokenBytes = kFp4 ? C::kFp4TokenBytes : C::kTokenBytes;
    const uint32_t key = kWarpKeys * at.warp + token_at(at.g);  // and 8 on
    uint8_t* const token = smem_.tokens[stage] + key * kTokenBytes;
    constexpr int kNextToken = 8 * kTokenBytes;
    const auto scales_of = [&](int half) {
      if constexpr (C::kPageScales) {
        return reinterpret_cast<const uint8_t*>(&smem_.scales[stage][key + 8 * half]);
      } else {
        return token + half * kNextToken + C::kLayout.scales_offset_bytes;
      }
    };
    find_existing(at, stage);
    fp4_ = kFp4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kFp4) {
        scales_[half].load_fp4(token + half * kNextToken, at.t);
        exponent_[half] = 0;
      } else {
        exponent_[half] = scales_[half].load(scales_of(half), at.t);
      }
    }
    uint4 rope[2][2];
    const auto rope_at = [&](int half, int i) {
      return reinterpret_cast<uint4*>(token + half * kNextToken + C::kLayout.rope_offset_bytes +
                                      (kBf16Rope ? at.t * 16 + i * 64 : at.t * 32 + i * 16));
    };
    if constexpr (C::kRope) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) rope[half][i] = *rope_at(half, i);
        if constexpr (C::kRopeInValues) {
          exponent_[half] = max(exponent_[half], rope_exponent(rope[half]));
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      exponent_[half] = max(kLeastExponent, min(kMostExponent, exponent_[half]));
      if constexpr (!kFp4) scales_[half].apply(scales_of(half), exponent_[half]);
    }

    const Operand q(smem_.q, flash_mla::sm90::kKMajorLeading);
    Columns columns[kBlockGroups][2];
    // Codes of block c for both keys.
    uint4 codes[kAhead + 1][2];
    const auto load = [&](int c) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint8_t* const row = token + half * kNextToken;
        if constexpr (kFp4) {
          const uint2 v = *reinterpret_cast<const uint2*>(row + c * 32 + at.t * 8);
          codes[c % (kAhead + 1)][half] = make_uint4(v.x, 0, v.y, 0);
        } else {
          codes[c % (kAhead + 1)][half] = *reinterpret_cast<const uint4*>(row + c * 64 + at.t * 16);
        }
      }
    };
#pragma unroll
    for (int c = 0; c < kAhead; ++c) load(c);
    if constexpr (C::kRope) {
#pragma unroll
      for (int group = 0; group < kBlockGroups; ++group) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Columns& of = columns[group][half];
          if constexpr (kBf16Rope) {
            rope_of(rope[half][group], __float2bfloat162_rn(pow2(-exponent_[half])), of);
          } else {  // in fp16, and so for values too, in its place
            halves_of_rope(rope[half][group], pow2(-exponent_[half]), of);
            *rope_at(half, group) = make_uint4(of[0], of[1], of[2], of[3]);
          }
        }
        constexpr DType kType = kBf16Rope ? DType::kBFloat16 : DType::kFloat16;
        multiply<kType>(columns[group], q, C::kQueryBlocks - 1, group, group == 0);
      }
    }
#pragma unroll
    for (int c = 0; c < kCodeBlocks; ++c) {
#pragma unroll
      for (int group = 0; group < kBlockGroups; ++group) {
        // The products that read these registers last are done.
        if (C::kRope || c > 0) flash_mla::sm90::wgmma_wait<kBlockGroups - 1>();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const __half2 multiplier =
              kFp4 ? scales_[half].fp4_multiplier(c) : scales_[half].multiplier(c, exponent_[half]);
          const uint4& of = codes[c % (kAhead + 1)][half];
          const uint2 eight = group == 0 ? make_uint2(of.x, of.y) : make_uint2(of.z, of.w);
          if constexpr (kFp4) {
            halves_of_e2m1(eight.x, multiplier, columns[group][half]);
          } else {
            halves_of_e4m3(eight, multiplier, columns[group][half]);
          }
        }
        multiply<DType::kFloat16>(columns[group], q, c, group, !C::kRope && c == 0 && group == 0);
        if (group == 0 && c + kAhead < kCodeBlocks) load(c + kAhead);
      }
    }
    flash_mla::sm90::arrive_warp(smem_.kv_empty[stage]);  // what was read of it is in registers
  }

  __device__ __forceinline__ void rescale_sums(const float (&factors)[kN]) {
    const Place at;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const float2 factor = *reinterpret_cast<const float2*>(&factors[8 * j + 2 * at.t]);
      sums_[2 * j] *= factor.x;
      sums_[2 * j + 1] *= factor.y;
    }
  }

  __device__ __forceinline__ void softmax(uint32_t tile) {
    const Place at;
    const uint32_t parity = tile % 2;
    const bool first = !*static_cast<volatile bool*>(&smem_.started);
    float scale[2] = {1.0f, 1.0f};
    if constexpr (C::kCodes) {
      scale[0] = pow2(exponent_[0]);
      scale[1] = pow2(exponent_[1]);
    }
    float4 rows[kN / 8];
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      rows[j] = *reinterpret_cast<const float4*>(&smem_.rows[8 * j + 2 * at.t]);
    }
    flash_mla::sm90::wgmma_wait<0>();
    flash_mla::sm90::pin(s_);
    if (!all_exist_) {
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) {
        if ((exists_ >> i / 2 % 2 * 8 & 1) == 0) s_[i] = -kInfinity;
      }
    }
    // Logits over the standing maxima. Does one exceed its row's by much?
    float high[2] = {-kInfinity, -kInfinity};
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& s = s_[4 * j + i];
        s = fmaf(s * scale[i / 2], i % 2 ? rows[j].w : rows[j].y, -(i % 2 ? rows[j].z : rows[j].x));
        high[i / 2] = fmaxf(high[i / 2], s);
      }
    }
    const bool grown = flash_mla::sm90::any_in_warpgroup(
        kKeysSync, first || fmaxf(high[0], high[1]) > kRescaleThresholdLog2);
    flash_mla::sm90::wait(smem_.p_empty[parity], tile / 2 % 2 ^ 1);
    if (grown) grow(parity, first);
    if (threadIdx.x % kWarpgroup == 0) smem_.grown[parity] = grown;

#pragma unroll
    for (float& s : s_) s = flash_mla::sm90::fast_exp2(s);
    const __half2 carried[2] = {__float2half2_rn(scale[0]), __float2half2_rn(scale[1])};
    flash_mla::sm90::store_p<kN>(at, smem_.p[parity], [&](int i) {
      const uint32_t two = flash_mla::sm90::pack<C::kType>(s_[2 * i], s_[2 * i + 1]);
      return C::kCodes ? times(two, carried[i % 2]) : two;
    });
    if constexpr (C::kCodes) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place = kWarpKeys * at.warp + at.g + 8 * half;
        scales_[half].write(smem_.multiplier[parity], place, at.t, exponent_[half], fp4_);
      }
    }
    // While what was stored arrives.
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) sums_[i / 4 * 2 + i % 2] += s_[i];
    flash_mla::sm90::fence_async_proxy();
    flash_mla::sm90::arrive_warp(smem_.p_full[parity]);
  }

  // The standing maxima become those of the tile, where it has larger ones; before the item's first
  // key they are 0 and stand for nothing.
  __device__ __forceinline__ void grow(uint32_t parity, bool first) {
    // In P's place.
    using ColumnMax = float[kWarpgroupWarps][kN];
    static_assert(sizeof(ColumnMax) <= sizeof(smem_.p[0]));
    auto& column_max = reinterpret_cast<ColumnMax&>(smem_.p[parity]);
    float (&growth)[kN] = column_max[0];
    const Place at;
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) {  // row 8 j + 2 t + e, i = 2 j + e
      const int value = 4 * (i / 2) + i % 2;
      float most = fmaxf(s_[value], s_[value + 2]);
#pragma unroll
      for (int d = 4; d < kLanes; d *= 2) {
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, d));
      }
      if (at.g == 0) column_max[at.warp][i / 2 * 8 + 2 * at.t + i % 2] = most;
    }
    sync();
    const int row = at.warp * kLanes + at.lane;
    if (row < kN) {
      float most = first ? -kInfinity : 0.0f;
#pragma unroll
      for (int w = 0; w < kWarpgroupWarps; ++w) most = fmaxf(most, column_max[w][row]);
      const bool keys = most > -kInfinity;
      if (!keys) most = 0.0f;
      smem_.rows[row].max += most;
      smem_.row_factor[parity][row] = first ? 0.0f : flash_mla::sm90::fast_exp2(-most);
      growth[row] = most;
      if (keys) smem_.started = true;
    }
    sync();
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const float2 by = *reinterpret_cast<const float2*>(&growth[8 * j + 2 * at.t]);
#pragma unroll
      for (int i = 0; i < 4; ++i) s_[4 * j + i] -= i % 2 ? by.y : by.x;
    }
    rescale_sums(smem_.row_factor[parity]);
    sync();  // all have read what P will overwrite
  }

  // The warps of the warpgroup add their sums one after the other.
  __device__ __forceinline__ void add_up_sums() {
    const Place at;
    flash_mla::sm90::add_up_keys<kN / 4>(at, sums_);
#pragma unroll 1
    for (int w = 0; w < kWarpgroupWarps; ++w) {
      if (at.warp == w && (kN >= 32 || at.g % 2 == 0)) {
#pragma unroll
        for (int i = 0; i < flash_mla::sm90::kRowSums<kN>; ++i) {
          float& total = smem_.row_sum[flash_mla::sm90::sum_row<kN>(at, i)];
          total = (w == 0 ? 0.0f : total) + sums_[i];
        }
      }
      sync();
    }
  }

  SharedStorage<Cfg>& smem_;
  Ring<C::kStages> ring_;  // of the next tile
  float s_[kN / 2];        // logits: [4 j + 2 half + e] for row 8 j + 2 t + e
  float sums_[kN / 4];     // [2 j + e]: of this thread's keys of the item
  int exponent_[2];        // that P of this thread's keys carries
  uint32_t exists_;        // bits 0 and 8: these keys do
  bool all_exist_;         // the warp's
  TokenScales<Cfg> scales_[2];
  bool fp4_;  // the tile holds e2m1
};

}  // namespace flash_mla::mla_decode_sparse::sm90
