// The role of a warpgroup of values: P V of all tiles for half of the columns.
//
//   O^T[256 columns][rows] += V^T P^T      A: V^T, in registers;  B: P, in shared memory
//
// With warp w, g = lane / 4, t = lane % 4, a thread has columns 64 w + 8 g to 8 g + 7, two in each
// of four products, and of a step of 16 keys those at places 2 t, 2 t + 1 and 8 on. So has it these
// columns of O for query rows 8 j + 2 t and one on.
#pragma once

#include "device/sm90/wgmma.cuh"
#include "mla_decode_sparse/sm90/convert.cuh"

namespace flash_mla::mla_decode_sparse::sm90 {

template <class Cfg>
class Values {
  using C = Config<Cfg>;
  using Operand = flash_mla::sm90::Operand;
  using Mma = flash_mla::sm90::Wgmma<C::kType>;
  static constexpr int kN = C::kRows;
  static constexpr int kSteps = kTileKeys / kDepth;
  // Products are issued in groups, of which one is under way while the next is converted, if there
  // are registers for that.
  static constexpr int kColumnGroup = 64 / kN;

 public:
  static constexpr int kProducts = 4;
  float o[kProducts][kN / 2];

  __device__ __forceinline__ Values(SharedStorage<Cfg>& smem, int wg) : smem_(smem), wg_(wg) {
    const Place at;
    for (int i = 0; i < 2; ++i) {
      offset_[i] = token_at(2 * at.t + i) * C::kTokenBytes + first_column(at) * (C::kCodes ? 1 : 2);
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
#pragma unroll
      for (float& x : o[i]) x = 0.0f;
    }
  }

  // `tile`: counted over all items.
  __device__ __forceinline__ void add(uint32_t tile, bool fp4) {
    const uint32_t parity = tile % 2, stage = ring_.stage;
    flash_mla::sm90::wait(smem_.kv_full[stage], ring_.phase);
    ring_.advance();
    flash_mla::sm90::wait(smem_.p_full[parity], tile / 2 % 2);
    if (uniform(*static_cast<volatile uint32_t*>(&smem_.grown[parity])) != 0) {
      rescale(smem_.row_factor[parity]);
    }
    pin();
    if constexpr (!C::kCodes) {
      multiply<Codes::kNone>(parity, stage);
    } else if (C::kFp4Extra && fp4) {
      multiply<Codes::kE2m1>(parity, stage);
    } else if (C::kRopeInValues && wg_ == kValueGroups - 1) {
      multiply<Codes::kE4m3AndRope>(parity, stage);
    } else {
      multiply<Codes::kE4m3>(parity, stage);
    }
    flash_mla::sm90::arrive_warp(smem_.kv_empty[stage]);  // its codes are in registers
    flash_mla::sm90::wgmma_wait<0>();
    pin();
    flash_mla::sm90::arrive_warp(smem_.p_empty[parity]);
  }

 private:
  // kNone: tokens are bf16. kE4m3AndRope: the last warp has RoPE, in fp16.
  enum class Codes { kNone, kE4m3, kE2m1, kE4m3AndRope };

  template <Codes kCodes>
  __device__ __forceinline__ void multiply(uint32_t parity, uint32_t stage) {
    constexpr bool kFp4 = kCodes == Codes::kE2m1;
    // 16-bit values are there as they are.
    constexpr bool kMayBe16Bit = kCodes == Codes::kE4m3AndRope || kCodes == Codes::kNone;
    constexpr int kFlights = kN == 64 && (C::kWideValues || C::kFp4Extra) ? 1 : 2;
    constexpr int kTokenBytes = kFp4 ? C::kFp4TokenBytes : C::kTokenBytes;
    const Place at;
    const bool rope = kCodes == Codes::kE4m3AndRope && at.warp == kWarpgroupWarps - 1;
    const bool is_16_bit = rope || kCodes == Codes::kNone;
    const int32_t column = first_column(at);
    const auto key = [&](int i) {
      const uint8_t* const tokens = smem_.tokens[stage];
      if constexpr (kFp4) return tokens + token_at(2 * at.t + i) * kTokenBytes + column / 2;
      constexpr int32_t kToRope = C::kLayout.rope_offset_bytes - C::kLayout.d_nope;
      return tokens + offset_[i] + (rope ? kToRope + (column - C::kLayout.d_nope) : 0);
    };
    const uint8_t* const v[2] = {key(0), key(1)};
    constexpr int kTile = kFp4        ? kv_layout(KvFormat::kV41Fp4).scale_tile
                          : C::kCodes ? C::kLayout.scale_tile
                                      : kLatentDim;
    const __half* const multipliers_at =
        smem_.multiplier[parity][rope ? 0 : column / kTile] + 2 * at.t;
    const Operand p(smem_.p[parity], flash_mla::sm90::kKMajorLeading);

    // Of a step's keys, by half and key of a pair: eight codes, or 16-bit values.
    using Eight = std::conditional_t<kMayBe16Bit, uint4, uint2>;
    Eight codes[2][2];
    __half2 multipliers[2];
    const auto load = [&](int step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int first = 16 * step + 8 * half;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint8_t* const from = v[i] + first * kTokenBytes;
          Eight& to = codes[half][i];
          if constexpr (kCodes == Codes::kNone) {
            to = *reinterpret_cast<const uint4*>(from);
          } else if constexpr (kFp4) {
            to.x = *reinterpret_cast<const uint32_t*>(from);
          } else {
            const uint2 two = *reinterpret_cast<const uint2*>(from);
            to.x = two.x;
            to.y = two.y;
          }
          if constexpr (kCodes == Codes::kE4m3AndRope) {
            if (rope) {
              const uint2 two = *reinterpret_cast<const uint2*>(from + 8);
              to.z = two.x;
              to.w = two.y;
            }
          }
        }
        if constexpr (C::kCodes) {
          multipliers[half] = *reinterpret_cast<const __half2*>(multipliers_at + first);
        }
      }
    };
    uint32_t a[kFlights][kColumnGroup][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      load(step);
#pragma unroll
      for (int first = 0; first < kProducts; first += kColumnGroup) {
        const int group = (step * kProducts + first) / kColumnGroup;
        uint32_t (&columns)[kColumnGroup][4] = a[group % kFlights];
        if (group >= kFlights) flash_mla::sm90::wgmma_wait<kFlights - 1>();
#pragma unroll
        for (int i = 0; i < kColumnGroup; ++i) {
          const int product = first + i;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint32_t &low = columns[i][2 * half], &high = columns[i][2 * half + 1];
            if constexpr (kFp4) {
              const uint32_t select = product | (product + 4) << 4;
              value_columns_of_e2m1(__byte_perm(codes[half][0].x, codes[half][1].x, select),
                                    multipliers[half], low, high);
            } else if constexpr (kCodes != Codes::kNone) {
              const uint32_t x = product < 2 ? codes[half][0].x : codes[half][0].y;
              const uint32_t y = product < 2 ? codes[half][1].x : codes[half][1].y;
              halves_of_e4m3x4(__byte_perm(x, y, product % 2 == 0 ? 0x5140 : 0x7362),
                               multipliers[half], low, high);
            }
            if constexpr (kMayBe16Bit) {
              if (is_16_bit) {
                const uint32_t first = word(codes[half][0], product);
                const uint32_t second = word(codes[half][1], product);
                low = __byte_perm(first, second, 0x5410);
                high = __byte_perm(first, second, 0x7632);
              }
            }
          }
        }
        flash_mla::sm90::wgmma_fence();
#pragma unroll
        for (int i = 0; i < kColumnGroup; ++i) {
          Mma::template product<true, kN>(o[first + i], columns[i], p.at(step * 32));
        }
        flash_mla::sm90::wgmma_commit();
      }
    }
  }
  static __device__ __forceinline__ uint32_t word(const uint4& of, int i) {
    return i == 0 ? of.x : i == 1 ? of.y : i == 2 ? of.z : of.w;
  }
  __device__ __forceinline__ int32_t first_column(const Place& at) const {
    return 256 * wg_ + 64 * at.warp + 8 * at.g;
  }
  __device__ __forceinline__ void pin() {
#pragma unroll
    for (int i = 0; i < kProducts; ++i) flash_mla::sm90::pin(o[i]);
  }
  __device__ __forceinline__ void rescale(const float (&factors)[kN]) {
    const Place at;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {  // rows 8 j + 2 t and one on
      const float2 factor = *reinterpret_cast<const float2*>(&factors[8 * j + 2 * at.t]);
#pragma unroll
      for (int i = 0; i < kProducts; ++i) {
        o[i][4 * j] *= factor.x;
        o[i][4 * j + 1] *= factor.y;
        o[i][4 * j + 2] *= factor.x;
        o[i][4 * j + 3] *= factor.y;
      }
    }
  }

  SharedStorage<Cfg>& smem_;
  const int wg_;
  Ring<C::kStages> ring_;  // of the next tile
  int32_t offset_[2];      // of the thread's first column of its keys of eight, in a stage
};

}  // namespace flash_mla::mla_decode_sparse::sm90
