// The role of a warpgroup of keys: every second tile's Q K^T and softmax.
//
//   S^T[64 keys][rows] = K Q^T      A: K, in registers;   B: Q, in shared memory
//
// With warp w, g = lane / 4, t = lane % 4, a thread has the keys at places 16 w + g and 8 on, and
// of a block of 64 columns 16 t to 16 t + 15, four in each of four products; queries lie in that
// order.
//
// The standing maximum of a row moves only when a logit exceeds it by kRescaleThresholdLog2. It is
// common to both warpgroups, which follow one another in moving it.
#pragma once

#include "device/sm90/wgmma.cuh"
#include "mla_decode_sparse/sm90/convert.cuh"

namespace flash_mla::mla_decode_sparse::sm90 {

template <class Cfg>
class Keys {
  using C = Config<Cfg>;
  using Operand = flash_mla::sm90::Operand;
  using Mma = flash_mla::sm90::Wgmma<DType::kFloat16>;
  static constexpr int kN = C::kRows;
  static constexpr int kBlockSteps = kColumns / kDepth;
  static constexpr int kGroupSteps = 2;  // products that are issued at once
  static constexpr int kFlights = 2;     // such groups under way

 public:
  static constexpr int kSums = flash_mla::sm90::kRowSums<kN>;

  // `wg`: of keys.
  __device__ __forceinline__ Keys(SharedStorage<Cfg>& smem, int wg) : smem_(smem), wg_(wg) {}

  // The keys of an item, when its queries and rows are there.
  __device__ __forceinline__ void attend(uint32_t slot, uint32_t first, int32_t tiles) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum_[i] = 0.0f;
#pragma unroll 1
    for (int32_t tile = first_own(first); tile < tiles; tile += kGroups) {
      query_keys(first + tile, is_fp4(slot, tile));
      softmax(first + tile, tile > 0);
    }
    // The item's last tile may be the other's.
    if (tiles > 0 && (first + tiles - 1) % kGroups != static_cast<uint32_t>(wg_)) {
      follow_sums(first + tiles - 1);
    }
    publish_sums(slot);
  }

 private:
  __device__ __forceinline__ int32_t first_own(uint32_t first) const {
    return static_cast<int32_t>((first + wg_) % kGroups);
  }
  __device__ __forceinline__ void sync_warpgroup() {
    flash_mla::sm90::named_barrier_sync(kWarpgroupSync + wg_, kWarpgroup);
  }
  __device__ __forceinline__ bool is_fp4(uint32_t slot, int32_t tile) const {
    if constexpr (!C::kFp4Extra) return false;
    const volatile ItemSlot& item = smem_.slots[slot];
    return uniform(item.fp4 && item.item.block_begin + tile >= item.main_blocks);
  }

  static __device__ __forceinline__ int sum_row(const Place& at, int i) {
    return flash_mla::sm90::sum_row<kN>(at, i);
  }

  // S^T = K Q^T of a tile.
  __device__ __forceinline__ void query_keys(uint32_t tile, bool fp4) {
    const Place at;
    const uint32_t stage = tile % C::kStages;
    flash_mla::sm90::wait(smem_.kv_full[stage], tile / C::kStages & 1);
    const uint32_t key = kWarpKeys * at.warp + token_at(at.g);  // and 8 on
    const uint8_t* const token =
        smem_.tokens[stage] + key * (fp4 ? C::kFp4TokenBytes : C::kTokenBytes);
    const int32_t next_token = 8 * (fp4 ? C::kFp4TokenBytes : C::kTokenBytes);
    TokenScales<Cfg>(&scales)[2] = scales_;
    fp4_ = fp4;
    const auto scales_of = [&](int half) {
      if constexpr (C::kPageScales) {
        return reinterpret_cast<const uint8_t*>(&smem_.scales[stage][key + 8 * half]);
      } else {
        return token + half * next_token + C::kLayout.scales_offset_bytes;
      }
    };
    valid_ = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t valid = smem_.valid[stage][2 * at.warp + half];
      valid_ |= (valid >> token_at(at.g) & 1) << half;
      if (fp4) {
        scales[half].load_fp4(token + half * next_token, at.t);
        exponent_[half] = 0;
      } else {
        exponent_[half] = scales[half].load(scales_of(half), at.t);
      }
    }
    uint4 rope[2][2];
    if constexpr (C::kRope) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          rope[half][i] = *reinterpret_cast<const uint4*>(
              token + half * next_token + C::kLayout.rope_offset_bytes + at.t * 32 + i * 16);
        }
        exponent_[half] = max(exponent_[half], rope_exponent(rope[half]));
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      exponent_[half] = max(kLeastExponent, min(kMostExponent, exponent_[half]));
      if (!fp4) scales[half].apply(scales_of(half), exponent_[half]);
    }

    // Products are issued in groups, of which some are under way while the next is converted.
    Columns columns[kFlights][2];
    const auto multiply = [&](auto accumulate, const Operand& q, int group) {
      Columns(&of)[2] = columns[group % kFlights];
      flash_mla::sm90::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kGroupSteps; ++i) {
        const uint32_t a[4] = {of[0][2 * i], of[1][2 * i], of[0][2 * i + 1], of[1][2 * i + 1]};
        const uint64_t b = q.at((group % kBlockGroups * kGroupSteps + i) * 32);
        if (i == 0) {
          Mma::template product<decltype(accumulate)::value, kN>(s_, a, b);
        } else {
          Mma::template product<true, kN>(s_, a, b);
        }
      }
      flash_mla::sm90::wgmma_commit();
    };
    using First = std::false_type;
    using Later = std::true_type;
    if constexpr (C::kRope) {
      constexpr int kBlock = C::kQueryBlocks - 1;
      const Operand q(smem_.q + kBlock * C::kQueryBlockBytes, flash_mla::sm90::kKMajorLeading);
#pragma unroll
      for (int group = 0; group < kBlockGroups; ++group) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          halves_of_rope(rope[half][group], pow2(-exponent_[half]), columns[group][half]);
        }
        if (group == 0) {
          multiply(First{}, q, group);
        } else {
          multiply(Later{}, q, group);
        }
      }
    } else {
#pragma unroll
      for (float& s : s_) s = 0.0f;
    }

    // Codes of block c for both keys; those of the next block are on their way while they are
    // converted.
    uint4 codes[2][2];
    const auto load = [&](int c, uint4(&to)[2]) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint8_t* const row = token + half * next_token;
        if (fp4) {
          const uint2 v = *reinterpret_cast<const uint2*>(row + c * 32 + at.t * 8);
          to[half] = make_uint4(v.x, 0, v.y, 0);
        } else {
          to[half] = *reinterpret_cast<const uint4*>(row + c * 64 + at.t * 16);
        }
      }
    };
    const auto block = [&](int c, const uint4(&of)[2]) {
      const Operand q(smem_.q + c * C::kQueryBlockBytes, flash_mla::sm90::kKMajorLeading);
      __half2 multiplier[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiplier[half] =
            fp4 ? scales[half].fp4_multiplier(c) : scales[half].multiplier(c, exponent_[half]);
      }
#pragma unroll
      for (int group = 0; group < kBlockGroups; ++group) {
        // The products that read these registers last are done.
        flash_mla::sm90::wgmma_wait<kFlights - 1>();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint2 eight =
              group == 0 ? make_uint2(of[half].x, of[half].y) : make_uint2(of[half].z, of[half].w);
          if (fp4) {
            halves_of_e2m1(eight.x, multiplier[half], columns[group][half]);
          } else {
            halves_of_e4m3(eight, multiplier[half], columns[group][half]);
          }
        }
        multiply(Later{}, q, group);
      }
    };
    if constexpr (kLoadsAhead) {
      load(0, codes[0]);
#pragma unroll 1
      for (int c = 0; c + 1 < kCodeBlocks; c += 2) {
        load(c + 1, codes[1]);
        block(c, codes[0]);
        if (c + 2 < kCodeBlocks) load(c + 2, codes[0]);
        block(c + 1, codes[1]);
      }
      if constexpr (kCodeBlocks % 2 != 0) block(kCodeBlocks - 1, codes[0]);
    } else {
#pragma unroll 1
      for (int c = 0; c < kCodeBlocks; ++c) {
        load(c, codes[0]);
        block(c, codes[0]);
      }
    }
    arrive(smem_.kv_empty[stage]);  // what was read of it is in registers
    flash_mla::sm90::wgmma_wait<0>();
    flash_mla::sm90::pin(s_);
  }
  static constexpr int kBlockGroups = kBlockSteps / kGroupSteps;
  static_assert(kBlockGroups == kFlights);
  static constexpr bool kLoadsAhead = kN < 64;
  static constexpr int kCodeBlocks = kBlocks - (C::kRopeInValues ? 1 : 0);

  // Whether a row's maximum grew in a tile.
  __device__ __forceinline__ bool has_grown(uint32_t tile) const {
    return uniform(*static_cast<volatile uint32_t*>(&smem_.grown[tile % 2][tile / 2 % 2])) != 0;
  }
  // The standing maxima of the other's tile are known: takes them over for the sums.
  __device__ __forceinline__ void follow_sums(uint32_t tile) {
    flash_mla::sm90::wait(smem_.max_full[tile % 2], tile / 2 % 2);
    if (has_grown(tile)) rescale_sums(tile);
  }
  __device__ __forceinline__ void rescale_sums(uint32_t tile) {
    const Place at;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      sum_[i] *= smem_.row_factor[tile % 2][tile / 2 % 2][sum_row(at, i)];
    }
  }

  // `follows`: another tile of the item came before.
  __device__ __forceinline__ void softmax(uint32_t tile, bool follows) {
    if (!__all_sync(kAllLanes, valid_ == 3)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if ((valid_ >> half & 1) != 0) continue;
#pragma unroll
        for (int j = 0; j < kN / 8; ++j) {
          s_[4 * j + 2 * half] = -kInfinity;
          s_[4 * j + 2 * half + 1] = -kInfinity;
        }
      }
    }
    // Each tile's maxima, in their order; those of an item before are of no use.
    if (follows) {
      follow_sums(tile - 1);
    } else if (tile > 0) {
      flash_mla::sm90::wait(smem_.max_full[(tile - 1) % 2], (tile - 1) / 2 % 2);
    }

    // Does a row exceed its standing maximum by much?
    const Place at;
    const auto state = [&](int j) {
      return *reinterpret_cast<const float4*>(&smem_.rows[8 * j + 2 * at.t]);
    };
    float high[2] = {-kInfinity, -kInfinity};  // of each key, without its 2^e
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const float4 rows = state(j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& s = s_[4 * j + i];
        s *= pow2(exponent_[i / 2]);
        high[i / 2] =
            fmaxf(high[i / 2], fmaf(s, i % 2 ? rows.w : rows.y, -(i % 2 ? rows.z : rows.x)));
      }
    }
    const float most = fmaxf(high[0] + static_cast<float>(exponent_[0]),
                             high[1] + static_cast<float>(exponent_[1]));
    const bool grown =
        flash_mla::sm90::any_in_warpgroup(kWarpgroupSync + wg_, most > kRescaleThresholdLog2);
    if (grown) grow(tile, follows);
    if (threadIdx.x % kWarpgroup == 0) smem_.grown[wg_][tile / 2 % 2] = grown;
    arrive(smem_.max_full[wg_]);

    float sums[kN / 4];  // [2 j + e]: of this thread's two keys, for row 8 j + 2 t + e
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const float4 rows = state(j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s_[4 * j + i];
        x = flash_mla::sm90::fast_exp2(
            fmaf(x, i % 2 ? rows.w : rows.y, -(i % 2 ? rows.z : rows.x)));
        if (i < 2) {
          sums[2 * j + i % 2] = x;
        } else {
          sums[2 * j + i % 2] += x;
        }
        x *= pow2(exponent_[i / 2]);
      }
    }
    flash_mla::sm90::add_up_keys<kN / 4>(at, sums);
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum_[i] += sums[i];

    wait_for_place_of_p(tile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = kWarpKeys * at.warp + at.g + 8 * half;
      scales_[half].write(smem_.multiplier[wg_], place, at.t, exponent_[half], fp4_);
      if constexpr (C::kRopeInValues) {
        if (at.t == 0) smem_.unit[wg_][place] = pow2(-exponent_[half]);
      }
    }
    flash_mla::sm90::store_p<DType::kFloat16>(at, smem_.p[wg_], s_);
    flash_mla::sm90::fence_async_proxy();
    arrive(smem_.p_full[wg_]);
  }

  static __device__ __forceinline__ void arrive(Barrier& barrier) {
    __syncwarp();
    if (threadIdx.x % kLanes == 0) flash_mla::sm90::arrive(barrier);
    __syncwarp();
  }

  // Values are done with P of the warpgroup's last tile.
  __device__ __forceinline__ void wait_for_place_of_p(uint32_t tile) {
    flash_mla::sm90::wait(smem_.p_empty[wg_], (tile / 2 & 1) ^ 1);
  }

  // The standing maxima become those of the tile, where it has larger ones.
  __device__ __forceinline__ void grow(uint32_t tile, bool follows) {
    // The other warpgroup's exponentials of the tile before are relative to those that stand.
    if (follows) flash_mla::sm90::wait(smem_.p_full[wg_ ^ 1], (tile - 1) / 2 % 2);
    // In P's place.
    wait_for_place_of_p(tile);
    using ColumnMax = float[kWarpgroupWarps][kN];
    static_assert(sizeof(ColumnMax) <= sizeof(smem_.p[0]));
    auto& column_max = reinterpret_cast<ColumnMax&>(smem_.p[wg_]);
    const Place at;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const float4 rows = *reinterpret_cast<const float4*>(&smem_.rows[8 * j + 2 * at.t]);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float factor = e == 0 ? rows.y : rows.w;
        float most = fmaxf(fmaf(s_[4 * j + e], factor, static_cast<float>(exponent_[0])),
                           fmaf(s_[4 * j + 2 + e], factor, static_cast<float>(exponent_[1])));
#pragma unroll
        for (int d = 4; d < kLanes; d *= 2) {
          most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, d));
        }
        if (at.g == 0) column_max[at.warp][8 * j + 2 * at.t + e] = most;
      }
    }
    sync_warpgroup();
    const int row = at.warp * kLanes + at.lane;
    if (row < kN) {
      RowState& state = smem_.rows[row];
      float most = state.max;
#pragma unroll
      for (int w = 0; w < kWarpgroupWarps; ++w) most = fmaxf(most, column_max[w][row]);
      smem_.row_factor[wg_][tile / 2 % 2][row] = flash_mla::sm90::fast_exp2(state.max - most);
      state.max = most;
    }
    sync_warpgroup();
    rescale_sums(tile);
  }

  // The warps of the warpgroup add their sums one after the other.
  __device__ __forceinline__ void publish_sums(uint32_t slot) {
    const Place at;
    float (&row_sum)[kN] = smem_.row_sum[slot][wg_];
#pragma unroll 1
    for (int w = 0; w < kWarpgroupWarps; ++w) {
      if (at.warp == w && (kN >= 32 || at.g % 2 == 0)) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          float& total = row_sum[sum_row(at, i)];
          total = (w == 0 ? 0.0f : total) + sum_[i];
        }
      }
      sync_warpgroup();
    }
    const int row = at.warp * kLanes + at.lane;
    if (wg_ == 0 && row < kN) smem_.row_max[slot][row] = smem_.rows[row].max;
    arrive(smem_.sums_full[slot]);
    arrive(smem_.item_empty[slot]);
  }

  SharedStorage<Cfg>& smem_;
  const int wg_;
  float s_[kN / 2];  // logits: [4 j + 2 half + e] for row 8 j + 2 t + e
  float sum_[kSums];
  int exponent_[2];  // that P of this thread's keys carries
  uint32_t valid_;   // bits 0 and 1: these keys exist
  TokenScales<Cfg> scales_[2];
  bool fp4_;  // the tile holds e2m1
};

}  // namespace flash_mla::mla_decode_sparse::sm90
