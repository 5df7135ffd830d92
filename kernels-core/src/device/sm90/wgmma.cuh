// Matrix products of a warpgroup (PTX wgmma), M = 64, K = 16, 16-bit operands, float32
// accumulators.
//
// Accumulator element i of a thread, for N columns: row 16 * warp + lane / 4 + 8 * (i / 2 % 2),
// column 8 * (i / 4) + 2 * (lane % 4) + i % 2.
#pragma once

#include <cstdint>
#include <utility>

#include <cute/arch/mma_sm90_gmma.hpp>

#include "flash_mla/types.h"

namespace flash_mla::sm90 {

// An operand in shared memory: tiles of 128-byte rows with the 128-byte swizzle, 8 rows 1 KB apart
// from the next 8. A descriptor's upper half says that and is the same for all; kept apart, what
// changes between products is one 32-bit sum each.
//
// K-major: the rows are those of the operand, and `leading` is not used. MN-major: the rows go
// along K, and `leading` is the distance of the next 64 values of the other dimension.
struct Operand {
  uint32_t low;

  __device__ __forceinline__ Operand(const void* smem, uint32_t leading_bytes) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
    // All lanes have the same: the reduction puts it into a uniform register, where the instruction
    // wants it. ptxas itself keeps nothing there across a loop that waits for a barrier, and moves
    // four words for each product.
    low = __reduce_max_sync(0xffffffffu, (address & 0x3ffffu) >> 4 | leading_bytes >> 4 << 16);
  }

  __device__ __forceinline__ uint64_t at(uint32_t offset_bytes) const {
    constexpr uint32_t kHigh = 1024 >> 4 | 1u << 30;  // stride; swizzle
    return (uint64_t{kHigh} << 32 | low) + (offset_bytes >> 4);
  }
};
inline constexpr uint32_t kKMajorLeading = 16;

template <DType kType>
struct Wgmma {
  static constexpr auto kKMajor = cute::SM90::GMMA::Major::K;
  static constexpr auto kMnMajor = cute::SM90::GMMA::Major::MN;
  static constexpr bool kBf16 = kType == DType::kBFloat16;

  // D[64][128] += A[64][16] B[16][128], A K-major and B MN-major in shared memory.
  static __device__ __forceinline__ void product_n128(float (&d)[64], uint64_t a, uint64_t b) {
    using namespace cute::SM90::GMMA;
    using Op = std::conditional_t<kBf16, MMA_64x128x16_F32BF16BF16_SS<kKMajor, kMnMajor>,
                                  MMA_64x128x16_F32F16F16_SS<kKMajor, kMnMajor>>;
    call<Op>(d, ScaleOut::One, std::make_index_sequence<64>(), a, b);
  }

  // The same with A in registers: its rows as the accumulators have them, pairs of columns packed.
  static __device__ __forceinline__ void product_n128(float (&d)[64], const uint32_t (&a)[4],
                                                      uint64_t b) {
    using namespace cute::SM90::GMMA;
    using Op = std::conditional_t<kBf16, MMA_64x128x16_F32BF16BF16_RS<kKMajor, kMnMajor>,
                                  MMA_64x128x16_F32F16F16_RS<kKMajor, kMnMajor>>;
    call<Op>(d, ScaleOut::One, std::make_index_sequence<64>(), a[0], a[1], a[2], a[3], b);
  }

  // D[64][N] (+)= A[64][16] B[N][16]^T, B K-major, A K-major or MN-major, both in shared memory.
  template <bool kAccumulate, int kN, cute::SM90::GMMA::Major kMajorA>
  static __device__ __forceinline__ void product(float (&d)[kN / 2], uint64_t a, uint64_t b) {
    using namespace cute::SM90::GMMA;
    using Op = decltype(from_smem<kN, kMajorA>());
    call<Op>(d, kAccumulate ? ScaleOut::One : ScaleOut::Zero, std::make_index_sequence<kN / 2>(), a,
             b);
  }

  // D[64][N] (+)= A[64][16] B[N][16]^T, A in registers, B K-major in shared memory.
  template <bool kAccumulate, int kN>
  static __device__ __forceinline__ void product(float (&d)[kN / 2], const uint32_t (&a)[4],
                                                 uint64_t b) {
    using namespace cute::SM90::GMMA;
    using Op = decltype(from_registers<kN>());
    call<Op>(d, kAccumulate ? ScaleOut::One : ScaleOut::Zero, std::make_index_sequence<kN / 2>(),
             a[0], a[1], a[2], a[3], b);
  }

 private:
  template <class Bf16, class Fp16>
  using Typed = std::conditional_t<kBf16, Bf16, Fp16>;
  template <int kN>
  static auto from_registers() {
    using namespace cute::SM90::GMMA;
    constexpr auto K = kKMajor;
    if constexpr (kN == 64) {
      return Typed<MMA_64x64x16_F32BF16BF16_RS<K, K>, MMA_64x64x16_F32F16F16_RS<K, K>>{};
    } else if constexpr (kN == 32) {
      return Typed<MMA_64x32x16_F32BF16BF16_RS<K, K>, MMA_64x32x16_F32F16F16_RS<K, K>>{};
    } else {
      static_assert(kN == 16);
      return Typed<MMA_64x16x16_F32BF16BF16_RS<K, K>, MMA_64x16x16_F32F16F16_RS<K, K>>{};
    }
  }
  template <int kN, cute::SM90::GMMA::Major A>
  static auto from_smem() {
    using namespace cute::SM90::GMMA;
    constexpr auto K = kKMajor;
    if constexpr (kN == 64) {
      return Typed<MMA_64x64x16_F32BF16BF16_SS<A, K>, MMA_64x64x16_F32F16F16_SS<A, K>>{};
    } else if constexpr (kN == 32) {
      return Typed<MMA_64x32x16_F32BF16BF16_SS<A, K>, MMA_64x32x16_F32F16F16_SS<A, K>>{};
    } else {
      static_assert(kN == 16);
      return Typed<MMA_64x16x16_F32BF16BF16_SS<A, K>, MMA_64x16x16_F32F16F16_SS<A, K>>{};
    }
  }
  template <class Op, int N, size_t... kIndex, class... Operands>
  static __device__ __forceinline__ void call(float (&d)[N], cute::SM90::GMMA::ScaleOut scale,
                                              std::index_sequence<kIndex...>,
                                              const Operands&... operands) {
    Op::fma(operands..., d[kIndex]..., scale);
  }
};

// Before the first product that reads registers or accumulators which other instructions wrote.
__device__ __forceinline__ void wgmma_fence() { cute::warpgroup_arrive(); }
__device__ __forceinline__ void wgmma_commit() { cute::warpgroup_commit_batch(); }
// Until at most kPending committed groups of products are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  cute::warpgroup_wait<kPending>();
}

// Keeps the compiler from moving accesses of accumulators across this point.
template <int N>
__device__ __forceinline__ void pin(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) cute::warpgroup_fence_operand(registers[i]);
}

}  // namespace flash_mla::sm90
