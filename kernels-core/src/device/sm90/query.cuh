// Queries for products with codes that are converted to fp16.
//
// Lane t of four has 16 neighbouring columns of a token's 64, as its operand of four products, four
// columns each; the columns of queries lie in that order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "device/online_softmax.h"
#include "device/scalar.h"
#include "device/sm89/e4m3.cuh"
#include "device/split_reduce.cuh"

namespace flash_mla::sm90 {

__device__ __forceinline__ uint32_t halves_of_codes(uint32_t two) {
  const __half2 halves = sm89::e4m3x2_to_halves(static_cast<uint16_t>(two));
  return reinterpret_cast<const uint32_t&>(halves);
}

// Two 16-bit values times two others of their type.
template <class Pair>
__device__ __forceinline__ uint32_t times(uint32_t values, Pair multiplier) {
  const Pair product = __hmul2(reinterpret_cast<const Pair&>(values), multiplier);
  return reinterpret_cast<const uint32_t&>(product);
}

// Writes 16 columns of a query row, words[2 s] and words[2 s + 1] where thread t of four reads step
// s of its 16 codes.
__device__ __forceinline__ void write_query(uint8_t* block, int32_t row, int32_t t,
                                            const uint32_t (&words)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    *reinterpret_cast<uint32_t*>(block + row * 128 + ((i ^ row % 8) << 4) + t * 4) = words[i];
  }
}

// A bf16 row times a power of two, so that its largest value is below 2^15: then fp16 holds all
// that matters of it. Returns the factor that gives its logits, whose magnitude is `scale`
// otherwise; a negative scale turns the row's sign, so that factors are positive. By four lanes t;
// `from` null: a row of zeros. kBf16Rope: the last 64 columns stay bf16, in the order of a bf16
// token's 16 bytes. kAtOnce: blocks whose loads are under way together.
template <int kBlocks, bool kBf16Rope, int kAtOnce = 1>
__device__ __forceinline__ float load_query_row(const uint8_t* from, uint8_t* q,
                                                int32_t block_bytes, int32_t row, int32_t t,
                                                float scale) {
  float sign = scale < 0.0f ? -1.0f : scale == 0.0f ? 0.0f : 1.0f;
  // Columns of this thread: 16 neighbours; in a bf16 RoPE block 8, and 8 half a block on.
  const auto columns = [&](int c, uint32_t (&words)[8]) {
    const bool rope = kBf16Rope && c == kBlocks - 1;
    const uint4* const at = reinterpret_cast<const uint4*>(from + c * 128 + t * (rope ? 16 : 32));
    const uint4 v[2] = {from != nullptr ? at[0] : make_uint4(0, 0, 0, 0),
                        from != nullptr ? at[rope ? 4 : 1] : make_uint4(0, 0, 0, 0)};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      words[4 * i] = v[i].x;
      words[4 * i + 1] = v[i].y;
      words[4 * i + 2] = v[i].z;
      words[4 * i + 3] = v[i].w;
    }
  };
  __nv_bfloat162 most = __float2bfloat162_rn(0.0f);
  constexpr bool kKeeps = kAtOnce == kBlocks;
  uint32_t kept[kKeeps ? kBlocks : 1][8];
#pragma unroll kAtOnce
  for (int c = 0; c < kBlocks; ++c) {
    uint32_t (&words)[8] = kept[kKeeps ? c : 0];
    columns(c, words);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      most = __hmax2(most, __habs2(reinterpret_cast<const __nv_bfloat162&>(words[i])));
    }
  }
  float largest = fmaxf(__low2float(most), __high2float(most));
  largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
  const bool ordinary = largest > 0.0f && largest < kInfinity;
  const int exponent = ordinary ? max(floor_log2(largest) - 14, -120) : 0;
  sign *= pow2(-exponent);
#pragma unroll kAtOnce
  for (int c = 0; c < kBlocks; ++c) {
    const bool rope = kBf16Rope && c == kBlocks - 1;
    uint32_t (&words)[8] = kept[kKeeps ? c : 0];
    if constexpr (!kKeeps) columns(c, words);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 values = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(words[i]));
      const float a = values.x * sign, b = values.y * sign;
      words[i] = rope ? pack_out<DType::kBFloat16>(a, b) : pack_out<DType::kFloat16>(a, b);
    }
    write_query(q + c * block_bytes, row, t, words);
  }
  return scale == 0.0f ? 1.0f : fabsf(scale) * pow2(exponent);
}

}  // namespace flash_mla::sm90
