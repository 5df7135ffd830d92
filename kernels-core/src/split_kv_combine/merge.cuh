// Device code of merge_attn_states, the same on every architecture: one warp a row, bound by
// memory (three rows of traffic for two flops an element). The rows of the variant table differ in
// how the kernel is launched.
#pragma once

#include "device/scalar.h"
#include "device/sm90/programmatic_launch.cuh"
#include "device/warp.cuh"
#include "runtime/launch.h"
#include "runtime/variant.h"
#include "split_kv_combine/problem.h"

namespace flash_mla::split_kv_combine {

inline constexpr int kWarpsPerBlock = 8;
inline constexpr int kVectorBytes = 16;

template <DType kDType>
struct Element {
  using Bits = uint16_t;
  static __device__ float load(Bits bits) {
    return kDType == DType::kBFloat16 ? bf16_to_float(bits) : fp16_to_float(bits);
  }
  static __device__ Bits store(float value) {
    return kDType == DType::kBFloat16 ? float_to_bf16(value) : float_to_fp16(value);
  }
};

template <>
struct Element<DType::kFloat32> {
  using Bits = float;
  static __device__ float load(float value) { return value; }
  static __device__ float store(float value) { return value; }
};

template <DType kDType>
struct alignas(kVectorBytes) Vector {
  static constexpr int kSize = kVectorBytes / sizeof(typename Element<kDType>::Bits);
  typename Element<kDType>::Bits bits[kSize];
};

// weight * part; a part of weight 0 counts as zeros: it may hold anything, NaN included.
__device__ __forceinline__ float weighted(float weight, float part) {
  return weight == 0.0f ? 0.0f : weight * part;
}

// Merges row (n, h) with the lanes of one warp.
template <DType kDType>
__device__ __forceinline__ void merge_row(const Params& p, int64_t n, int64_t h, int lane) {
  using Bits = typename Element<kDType>::Bits;
  using V = Vector<kDType>;
  const MergeWeights weights = merge_weights(p.a.lse[n * p.a.lse_stride_n + h * p.a.lse_stride_h],
                                             p.b.lse[n * p.b.lse_stride_n + h * p.b.lse_stride_h]);
  const auto* a = static_cast<const Bits*>(p.a.out) + n * p.a.out_stride_n + h * p.a.out_stride_h;
  const auto* b = static_cast<const Bits*>(p.b.out) + n * p.b.out_stride_n + h * p.b.out_stride_h;
  auto* merged =
      static_cast<Bits*>(p.merged.out) + n * p.merged.out_stride_n + h * p.merged.out_stride_h;

  // The loads of both parts do not wait for the weights.
  const int64_t vectors = p.d / V::kSize;
#pragma unroll 2
  for (int64_t i = lane; i < vectors; i += kLanes) {
    const V part_a = reinterpret_cast<const V*>(a)[i];
    const V part_b = reinterpret_cast<const V*>(b)[i];
    V result;
#pragma unroll
    for (int e = 0; e < V::kSize; ++e) {
      result.bits[e] =
          Element<kDType>::store(weighted(weights.a, Element<kDType>::load(part_a.bits[e])) +
                                 weighted(weights.b, Element<kDType>::load(part_b.bits[e])));
    }
    reinterpret_cast<V*>(merged)[i] = result;
  }
  for (int64_t c = vectors * V::kSize + lane; c < p.d; c += kLanes) {
    merged[c] = Element<kDType>::store(weighted(weights.a, Element<kDType>::load(a[c])) +
                                       weighted(weights.b, Element<kDType>::load(b[c])));
  }
  if (lane == 0) {
    p.merged.lse[n * p.merged.lse_stride_n + h * p.merged.lse_stride_h] = weights.lse;
  }
}

// kProgrammatic: starts while the kernel that writes its input drains (sm_90 and later).
template <class Cfg, bool kProgrammatic>
__global__ void __launch_bounds__(kWarpsPerBlock* kLanes) merge_kernel(Params params) {
  if constexpr (kProgrammatic) flash_mla::sm90::wait_for_predecessor();
  const int lane = threadIdx.x % kLanes;
  const int64_t warp = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kLanes;
  const int64_t num_warps = int64_t{gridDim.x} * kWarpsPerBlock;
  for (int64_t row = warp; row < params.n * params.h; row += num_warps) {
    merge_row<Cfg::v.q>(params, row / params.h, row % params.h, lane);
  }
  if constexpr (kProgrammatic) flash_mla::sm90::launch_successor();
}

template <class Cfg>
const char* supports(const Problem& p) {
  return p.dtype == Cfg::v.q ? nullptr : "serves another dtype";
}

template <class Cfg>
WorkspaceSize workspace(const Problem&) {
  return {};
}

template <class Cfg, bool kProgrammatic>
Status launch_merge(const Problem& p, Stream stream) {
  constexpr int64_t kMaxBlocks = 1 << 20;  // rows beyond it are taken in a stride
  DeviceGuard guard(p.device);
  FLASH_MLA_RETURN_IF_ERROR(guard.status());
  const int64_t blocks = (p.n * p.h + kWarpsPerBlock - 1) / kWarpsPerBlock;
  const LaunchShape shape = {.grid = dim3(blocks < kMaxBlocks ? blocks : kMaxBlocks),
                             .block = dim3(kWarpsPerBlock * kLanes),
                             .programmatic = kProgrammatic};
  return launch_kernel(merge_kernel<Cfg, kProgrammatic>, shape, stream, kOperator,
                       static_cast<const Params&>(p));
}

}  // namespace flash_mla::split_kv_combine
