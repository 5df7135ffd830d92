// Sparse MLA decode for every NVIDIA GPU since sm_80: the loop of device/portable/kernel.cuh over
// the tokens that a query's indices name.
#pragma once

#include <cstdint>

#include "device/portable/kernel.cuh"
#include "mla_decode_sparse/gpu.cuh"
#include "mla_decode_sparse/portable/config.h"
#include "mla_decode_sparse/portable/load.cuh"

namespace flash_mla::mla_decode_sparse::portable {

// All rows are of one query token and attend the same keys.
struct Mask {
  static constexpr bool kRowsDiffer = false;

  __device__ void start(const GpuParams&, const TileRows&, const ItemKeys&, const int32_t (&)[2]) {}
  __device__ bool cuts(uint32_t) const { return false; }
  __device__ bool hides(int, uint32_t) const { return false; }
};

// What device/portable/kernel.cuh asks for.
template <class Cfg>
struct Decode {
  using Op = mla_decode_sparse::Op;
  using Params = GpuParams;
  using Config = typename Shape<Cfg>::Config;
  using SharedStorage = typename Shape<Cfg>::SharedStorage;
  using Rows = TileRows;
  using ItemKeys = portable::ItemKeys;
  using Mask = portable::Mask;
  using Loader = portable::Loader<Cfg>;

  static __device__ __forceinline__ Rows rows(const GpuParams& p, const WorkItem& item) {
    return {p, item, /*member=*/0};
  }
  static __device__ __forceinline__ const uint8_t* query(const GpuParams& p, const Rows& rows,
                                                         int32_t row) {
    return reinterpret_cast<const uint8_t*>(rows.query(p, row));
  }
  static __device__ __forceinline__ float logit_scale_log2(const GpuParams& p, int32_t) {
    return p.softmax_scale * kLog2e;
  }
  static __device__ __forceinline__ float item_factor(const GpuParams&, int32_t) { return 1.0f; }
  static __device__ __forceinline__ float row_factor(const GpuParams& p, const Rows& rows,
                                                     int32_t row, const SoftmaxRow& softmax) {
    const float* const sink = rows.sink(p, row);
    return sink == nullptr ? 1.0f : sink_factor(softmax.lse(), *sink);
  }
};

}  // namespace flash_mla::mla_decode_sparse::portable
