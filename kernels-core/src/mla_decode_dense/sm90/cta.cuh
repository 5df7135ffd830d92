// What the sm90 kernels have in common: warpgroups and their registers, the beginning of a CTA, its
// launch.
#pragma once

#include "device/sm90/mbarrier.cuh"
#include "device/sm90/registers.cuh"
#include "device/sm90/row_softmax.cuh"
#include "device/sm90/warpgroup.cuh"
#include "mla_decode_dense/gpu.cuh"

namespace flash_mla::mla_decode_dense::sm90 {

using flash_mla::sm90::Barrier;
using flash_mla::sm90::kMaxSmemBytes;
using flash_mla::sm90::kNoMaximum;
using flash_mla::sm90::kWarpgroup;
using flash_mla::sm90::kWarpgroupWarps;
using flash_mla::sm90::uniform;

inline constexpr int kTileKeys = kBlockKeys;
inline constexpr int kConsumers = 2;  // warpgroups
inline constexpr int kConsumerThreads = kConsumers * kWarpgroup;
inline constexpr int kThreads = kConsumerThreads + kWarpgroup;

// A kernel starts with 168 for each thread, the most that 384 threads can have: what consumers get,
// the producer must give. More would wait for ever.
inline constexpr int kRegisters = 65536 / kThreads / 8 * 8;
template <int kConsumerRegisters>
inline constexpr int kProducerRegisters =
    (kConsumers + 1) * kRegisters - kConsumers * kConsumerRegisters;

// In P's place: load is done with them before attend writes P. By all threads.
template <class PlaceOfP>
__device__ __forceinline__ RequestRuns<kThreads>& measure_after_predecessor(const GpuParams& p,
                                                                            PlaceOfP& place) {
  return flash_mla::sm90::measure_after_predecessor<kThreads>(p.grid, RequestBlocks{p}, place);
}

template <class SharedStorage, class Kernel, class TensorMaps>
Status launch_ctas(Kernel* kernel, const GpuParams& params, const TensorMaps& maps, Stream stream) {
  static_assert(sizeof(SharedStorage) <= kMaxSmemBytes);
  const LaunchShape shape = {.grid = dim3(params.grid.num_ctas()),
                             .block = dim3(kThreads),
                             .smem_bytes = sizeof(SharedStorage),
                             .programmatic = true};
  return launch_kernel(kernel, shape, stream, kOperator, params, maps);
}

}  // namespace flash_mla::mla_decode_dense::sm90
