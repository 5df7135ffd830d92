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
#include "device/sm80/cp_async.cuh"
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

// Factors of logits are positive: queries are turned by a negative scale, and cleared by 0.
__device__ __forceinline__ float query_sign(float scale) {
  return scale < 0.0f ? -1.0f : scale == 0.0f ? 0.0f : 1.0f;
}
// Of queries that were divided by `unit`.
__device__ __forceinline__ float logit_factor(float scale, float unit) {
  return scale == 0.0f ? 1.0f : fabsf(scale) * unit;
}

// Where 16 bytes of a block's row lie: they are swizzled.
__device__ __forceinline__ int32_t query_chunk(int32_t row, int32_t chunk) {
  return row * 128 + ((chunk ^ row % 8) << 4);
}

// Writes 16 columns of a query row, words[2 s] and words[2 s + 1] where thread t of four reads step
// s of its 16 codes.
__device__ __forceinline__ void write_query(uint8_t* block, int32_t row, int32_t t,
                                            const uint32_t (&words)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    *reinterpret_cast<uint32_t*>(block + query_chunk(row, i) + t * 4) = words[i];
  }
}

// A bf16 row as it is, to where it will be converted. By four lanes t; `from` null: zeros.
template <int kBlocks>
__device__ __forceinline__ void fetch_query_row(const uint8_t* from, uint8_t* q,
                                                int32_t block_bytes, int32_t row, int32_t t) {
  const uint32_t to = sm80::smem_address(q);
#pragma unroll 1
  for (int c = 0; c < kBlocks; ++c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t chunk = 4 * i + t;
      const void* const at = from == nullptr ? nullptr : from + c * 128 + chunk * 16;
      sm80::copy_16(to + c * block_bytes + query_chunk(row, chunk), at, from != nullptr);
    }
  }
}

// That row times a power of two, so that its largest value is below 2^15: then fp16 holds all that
// matters of it. Returns the factor that gives its logits, `scale` being that of the row as it was.
// By the warps of the lanes t that have fetched it. kBf16Blocks: so many of the last blocks stay
// bf16, in the order of a bf16 token's 16 bytes; a row of which all do is only turned. kAtOnce:
// blocks in registers together.
template <int kBlocks, int kBf16Blocks, int kAtOnce>
__device__ __forceinline__ float convert_query_row(uint8_t* q, int32_t block_bytes, int32_t row,
                                                   int32_t t, float scale) {
  static_assert(kBlocks % kAtOnce == 0);
  // Columns of this thread: 16 neighbours; in a block that stays bf16 8, and 8 half a block on.
  const auto columns = [&](int c, int i) {
    const int32_t chunk = c >= kBlocks - kBf16Blocks ? 4 * i + t : 2 * t + i;
    return *reinterpret_cast<const uint4*>(q + c * block_bytes + query_chunk(row, chunk));
  };
  __nv_bfloat162 most = __float2bfloat162_rn(0.0f);
#pragma unroll kAtOnce
  for (int c = 0; c < (kBf16Blocks < kBlocks ? kBlocks : 0); ++c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 v = columns(c, i);
      for (const uint32_t pair : {v.x, v.y, v.z, v.w}) {
        most = __hmax2(most, __habs2(reinterpret_cast<const __nv_bfloat162&>(pair)));
      }
    }
  }
  float largest = fmaxf(__low2float(most), __high2float(most));
  largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
  const bool ordinary = largest > 0.0f && largest < kInfinity;
  const int exponent = ordinary ? max(floor_log2(largest) - 14, -120) : 0;
  const __nv_bfloat162 unit = __float2bfloat162_rn(query_sign(scale) * pow2(-exponent));
#pragma unroll 1
  for (int first = 0; first < kBlocks; first += kAtOnce) {
    uint32_t words[kAtOnce][8];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 v = columns(first + n, i);
        words[n][4 * i] = times(v.x, unit);
        words[n][4 * i + 1] = times(v.y, unit);
        words[n][4 * i + 2] = times(v.z, unit);
        words[n][4 * i + 3] = times(v.w, unit);
      }
    }
    __syncwarp();  // the lanes write what others read
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      if (first + n < kBlocks - kBf16Blocks) {
#pragma unroll
        for (uint32_t& word : words[n]) {
          const float2 values = unpack<DType::kBFloat16>(word);
          word = pack_out<DType::kFloat16>(values.x, values.y);
        }
      }
      write_query(q + (first + n) * block_bytes, row, t, words[n]);
    }
  }
  return logit_factor(scale, pow2(exponent));
}

// The rows of a tile by kThreads threads, whole warps; `address_of(row)` as for fetch_query_row(),
// and the factor of a row's logits to `factor_of(row)`. For the products, a fence of the async
// proxy and a barrier must follow.
template <int kRows, int kThreads, int kBlocks, int kBf16Blocks, int kAtOnce, class Address,
          class Factor>
__device__ __forceinline__ void load_query_rows(uint8_t* q, int32_t thread, float scale,
                                                const Address& address_of,
                                                const Factor& factor_of) {
  constexpr int32_t kBlockBytes = kRows * 128;
  const int32_t t = thread % 4;
#pragma unroll 1
  for (int32_t row = thread / 4; row < kRows; row += kThreads / 4) {
    fetch_query_row<kBlocks>(address_of(row), q, kBlockBytes, row, t);
  }
  sm80::commit_copies();
  sm80::wait_copies<0>();
  __syncwarp();
#pragma unroll 1
  for (int32_t row = thread / 4; row < kRows; row += kThreads / 4) {
    const float factor =
        convert_query_row<kBlocks, kBf16Blocks, kAtOnce>(q, kBlockBytes, row, t, scale);
    if (t == 0) factor_of(row) = factor;
  }
}

}  // namespace flash_mla::sm90
