// Tokens of a cache as fp16 operands, by format.
//
// A token's values are fp16 numbers times 2^e; e is the token's own, so that its largest value
// fits. P carries 2^e and the logits' factor gives it back: any scale up to 2^14 works, with fp16's
// rounding.
#pragma once

#include <cuda_fp16.h>

#include "device/e2m1.cuh"
#include "device/sm90/query.cuh"
#include "mla_decode_sparse/sm90/config.h"

namespace flash_mla::mla_decode_sparse::sm90 {

using flash_mla::sm90::halves_of_codes;
using flash_mla::sm90::times;

// Of e: 2^e is a normal fp16 number, and P, up to 2^8, times 2^e is one. Of a token without values:
// any.
inline constexpr int kLeastExponent = -14, kMostExponent = 7;
// The largest scale over 2^e is about 2^-5, so that codes, up to 448, are as far from fp16's
// largest number as a token's smaller scales may be from its smallest, and P keeps its precision.
inline constexpr int kLargestScaleLog2 = -5;

// Of a thread's 16 columns of a token in a block, eight: for two products two words each.
using Columns = uint32_t[4];

__device__ __forceinline__ int largest_byte(uint32_t x) {
  x = __vmaxu4(x, x >> 16);
  return static_cast<int>(max(x & 0xffu, x >> 8 & 0xffu));
}

// The scales of a token, as far as thread t needs them: one for each of its blocks.
template <class Cfg>
struct TokenScales {
  using C = Config<Cfg>;
  static constexpr KvLayout kLayout = C::kLayout;
  static constexpr bool kFloat = kLayout.scale == KvScale::kFloat32;

  // Four fp16 multipliers, or a byte for each block.
  uint2 of_blocks;

  // Returns e, as far as the scales tell; then comes apply(e).
  __device__ __forceinline__ int load(const uint8_t* scales, int t) {
    if constexpr (kFloat) {
      const float4 v = *reinterpret_cast<const float4*>(scales);
      const float most = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
      return most > 0.0f && most < kInfinity ? floor_log2(most) - kLargestScaleLog2
                                             : kLeastExponent;
    } else if constexpr (kLayout.scale_tile == kColumns) {  // seven, and a pad
      of_blocks = *reinterpret_cast<const uint2*>(scales);
      return largest_byte(__vmaxu4(of_blocks.x, of_blocks.y & 0x00ffffffu)) - 127 -
             kLargestScaleLog2;
    } else {
      const uint4 v = *reinterpret_cast<const uint4*>(scales);
      const uint32_t half_of_block = t < 2 ? 0x6420 : 0x7531;
      of_blocks =
          make_uint2(__byte_perm(v.x, v.y, half_of_block), __byte_perm(v.z, v.w, half_of_block));
      return largest_byte(__vmaxu4(__vmaxu4(v.x, v.y), __vmaxu4(v.z, v.w))) - 127 -
             kLargestScaleLog2;
    }
  }
  __device__ __forceinline__ void apply(const uint8_t* scales, int e) {
    if constexpr (kFloat) {
      const float4 v = *reinterpret_cast<const float4*>(scales);
      const float unit = pow2(-e);
      of_blocks = make_uint2(pack_out<DType::kFloat16>(v.x * unit, v.y * unit),
                             pack_out<DType::kFloat16>(v.z * unit, v.w * unit));
    }
  }
  // What the codes of block c are multiplied with.
  __device__ __forceinline__ __half2 multiplier(int c, int e) const {
    if constexpr (kFloat) {
      const uint32_t both =
          __byte_perm(of_blocks.x, of_blocks.y, 0x1010u + static_cast<uint32_t>(c / 2) * 0x2222u);
      return reinterpret_cast<const __half2&>(both);
    } else {
      const uint32_t code = of_block(c);
      const int exponent = max(static_cast<int>(code) - e, 0);
      return __float2half2_rn(code == 255 ? bits_float(0x7fc00000u)
                                          : bits_float(static_cast<uint32_t>(exponent) << 23));
    }
  }

  // v41_fp4: e4m3 scales of 16 columns, and e is 0.
  __device__ __forceinline__ void load_fp4(const uint8_t* row, int t) {
    const uint4* const scales =
        reinterpret_cast<const uint4*>(row + kv_layout(KvFormat::kV41Fp4).scales_offset_bytes);
    const uint32_t byte_t = t | (t + 4) << 4;
    const auto of_four = [&](const uint4& v) {
      return __byte_perm(__byte_perm(v.x, v.y, byte_t), __byte_perm(v.z, v.w, byte_t), 0x5410);
    };
    of_blocks = make_uint2(of_four(scales[0]), of_four(scales[1]));
  }
  __device__ __forceinline__ __half2 fp4_multiplier(int c) const {
    const uint32_t both = halves_of_codes(of_block(c) * 0x0101u);
    return reinterpret_cast<const __half2&>(both);
  }

  // Writes multipliers for values: those of the key at `place`, a part of them by each of four
  // lanes t. `to`: of the tile.
  template <int kScales>
  __device__ __forceinline__ void write(__half (&to)[kScales][kTileKeys], int place, int t, int e,
                                        bool fp4) const {
    if constexpr (kFloat) {
      const uint32_t both = __byte_perm(of_blocks.x, of_blocks.y, 0x1010u + t * 0x2222u);
      to[t][place] = __low2half(reinterpret_cast<const __half2&>(both));
    } else if constexpr (kLayout.scale_tile == kColumns) {
      to[t][place] = __low2half(multiplier(t, e));
      if (t < kScales - 4) to[t + 4][place] = __low2half(multiplier(t + 4, e));
    } else if (fp4) {
#pragma unroll
      for (int c = 0; c < kBlocks; ++c) to[4 * c + t][place] = __low2half(fp4_multiplier(c));
    } else {  // lanes 0 and 1 have the scales of the first halves of blocks, 2 and 3 the others
#pragma unroll
      for (int i = 0; i < kBlocks / 2; ++i) {
        const int c = t % 2 * (kBlocks / 2) + i;
        to[2 * c + t / 2][place] = __low2half(multiplier(c, e));
      }
    }
  }

 private:
  __device__ __forceinline__ uint32_t of_block(int c) const {
    return __byte_perm(of_blocks.x, of_blocks.y, 0x4440u + c) & 0xffu;
  }
};

// e that the magnitude of a token's RoPE needs. By the four lanes that have it.
__device__ __forceinline__ int rope_exponent(const uint4 (&rope)[2]) {
  __nv_bfloat162 most = __float2bfloat162_rn(0.0f);
#pragma unroll
  for (const uint4& v : rope) {
    for (const uint32_t word : {v.x, v.y, v.z, v.w}) {
      most = __hmax2(most, __habs2(reinterpret_cast<const __nv_bfloat162&>(word)));
    }
  }
  float largest = fmaxf(__low2float(most), __high2float(most));
  largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
  return largest > 0.0f && largest < kInfinity ? floor_log2(largest) - 14 : kLeastExponent;
}

// Eight bf16 values times 2^-e, as fp16.
__device__ __forceinline__ void halves_of_rope(const uint4& rope, float unit, Columns& words) {
  const uint32_t pairs[4] = {rope.x, rope.y, rope.z, rope.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 values = unpack<DType::kBFloat16>(pairs[i]);
    words[i] = pack_out<DType::kFloat16>(values.x * unit, values.y * unit);
  }
}
// And as bf16.
__device__ __forceinline__ void rope_of(const uint4& rope, __nv_bfloat162 unit, Columns& words) {
  words[0] = times(rope.x, unit);
  words[1] = times(rope.y, unit);
  words[2] = times(rope.z, unit);
  words[3] = times(rope.w, unit);
}

// Four e4m3 codes.
__device__ __forceinline__ void halves_of_e4m3x4(uint32_t codes, __half2 multiplier,
                                                 uint32_t& first, uint32_t& second) {
  uint32_t low, high;
  sm89::e4m3x4_to_halves(codes, low, high);
  first = times(low, multiplier);
  second = times(high, multiplier);
}
// Eight.
__device__ __forceinline__ void halves_of_e4m3(uint2 codes, __half2 multiplier, Columns& words) {
  halves_of_e4m3x4(codes.x, multiplier, words[0], words[1]);
  halves_of_e4m3x4(codes.y, multiplier, words[2], words[3]);
}

// The upper halves of four e2m1 codes as fp16, the first in the lowest nibble and byte; the lower
// halves are zero. Magnitudes are looked up.
__device__ __forceinline__ uint32_t halves_of_e2m1x4(uint32_t codes) {
  const uint32_t magnitudes = __byte_perm(0x3e3c3800u, 0x46444240u, codes & 0x7777u);
  const uint32_t signs = __byte_perm(codes << 4, codes, 0x5140) & 0x80808080u;
  return magnitudes | signs;
}

// Eight e2m1 codes.
__device__ __forceinline__ void halves_of_e2m1(uint32_t codes, __half2 multiplier, Columns& words) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t bytes = halves_of_e2m1x4(codes >> (16 * i));
    words[2 * i] = times(__byte_perm(bytes, 0, 0x1404), multiplier);
    words[2 * i + 1] = times(__byte_perm(bytes, 0, 0x3424), multiplier);
  }
}

// Two columns of values from codes of e2m1: the first key's byte of two columns, and the second
// key's. (Of e4m3, halves_of_e4m3x4() gives them: first key's first column, second key's, then the
// second column.)
__device__ __forceinline__ void value_columns_of_e2m1(uint32_t codes, __half2 multiplier,
                                                      uint32_t& first, uint32_t& second) {
  const uint32_t bytes = halves_of_e2m1x4(codes);
  first = times(__byte_perm(bytes, 0, 0x2404), multiplier);
  second = times(__byte_perm(bytes, 0, 0x3414), multiplier);
}

}  // namespace flash_mla::mla_decode_sparse::sm90
