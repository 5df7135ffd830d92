// What every decode operator reads its queries from and writes its results to.
#pragma once

#include <cstdint>

#include "flash_mla/types.h"

namespace flash_mla {

// Plain data, part of the kernels' parameters. Strides are in elements of their tensor.
struct DecodeIo {
  int64_t b;    // requests
  int64_t s_q;  // query tokens of each request
  int64_t h_q;  // query heads
  int32_t d_qk;
  DType q_dtype;
  DType out_dtype;
  const void* q;  // [b, s_q, h_q, d_qk]
  int64_t q_stride_b, q_stride_s, q_stride_h;
  void* out;  // [b, s_q, h_q, 512]
  int64_t out_stride_b, out_stride_s, out_stride_h;
  float* lse;  // [b, h_q, s_q]
  int64_t lse_stride_b, lse_stride_h, lse_stride_s;
};

}  // namespace flash_mla
