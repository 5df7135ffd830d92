// Dense MLA decode for every NVIDIA GPU since sm_80: the loop of device/portable/kernel.cuh over
// the pages of a request.
//
//   out[r] = descale_k * sum_j softmax_j(scale q[r].k[j]) k[j][0:512]   for the rows r of an M tile
//
// Shared memory, at most 99 KB (device/portable/config.h, smem.h):
//                      bf16, fp16 576 / 512   fp8 576, 512   v32_fp8
//   a token of a slab  19 / 17 x 16 bytes     9 x 16         11 x 16    odd: no bank conflicts
//   stages of 32 keys  2 x 38.0 / 34.0 KB     4 x 18.0 KB    3 x 22.0 KB
//   parts of logits    16 KB: two buffers for M = 16, one each for the two groups of M = 32
//   the rest           1 KB
//
// Bottleneck (a model, not measured): device memory up to 16 rows of a request, if a tile takes
// less than 4850 cycles at two CTAs an SM of an H200 (15 bytes a cycle and SM are 3.5 TB/s); the
// warp schedulers see about 520 instructions a tile and warp, 1050 with e4m3. One stage at least is
// under way all the time: 36 KB a CTA. With more rows, L2: each tile of rows reads all keys, so 32
// rows rather than 16 halve that, and on devices with room for one CTA an SM they double the warps.
// 64 rows were not built: Q would have to be in shared memory, the traffic there (2650 cycles for
// 32 keys, against 1710 of mma) would be the limit, and only sm_90 and sm_100 have room for it.
#pragma once

#include <cstdint>

#include "device/portable/kernel.cuh"
#include "mla_decode_dense/gpu.cuh"
#include "mla_decode_dense/portable/load.cuh"
#include "mla_decode_dense/portable/mask.cuh"

namespace flash_mla::mla_decode_dense::portable {

// What device/portable/kernel.cuh asks for.
template <class Cfg>
struct Decode {
  using Op = mla_decode_dense::Op;
  using Params = GpuParams;
  using Config = flash_mla::portable::Config<Cfg>;
  using SharedStorage = flash_mla::portable::SharedStorage<Config>;
  using Rows = TileRows;
  using ItemKeys = portable::ItemKeys;
  using Mask = portable::Mask;
  using Loader = portable::Loader<Config>;

  static __device__ __forceinline__ Rows rows(const GpuParams& p, const WorkItem& item) {
    return {p, item, /*member=*/0, request_length(p, item.request)};
  }
  static __device__ __forceinline__ const uint8_t* query(const GpuParams& p, const Rows& rows,
                                                         int32_t row) {
    constexpr int kElementBytes = Cfg::v.q == DType::kFloat8E4M3 ? 1 : 2;
    return static_cast<const uint8_t*>(p.q) +
           kElementBytes * (rows.request * p.q_stride_b + rows.token(p, row) * p.q_stride_s +
                            rows.head(p, row) * p.q_stride_h);
  }
  static __device__ __forceinline__ float logit_scale_log2(const GpuParams& p, int32_t request) {
    return mla_decode_dense::logit_scale_log2(p, request);
  }
  static __device__ __forceinline__ float item_factor(const GpuParams& p, int32_t request) {
    return descale(p.descale_k, p.descale_k_stride, request);
  }
  static __device__ __forceinline__ float row_factor(const GpuParams&, const Rows&, int32_t,
                                                     const SoftmaxRow&) {
    return 1.0f;
  }
};

}  // namespace flash_mla::mla_decode_dense::portable
