// Tensor maps: what the copy engine of sm_90 and later needs to know of a tensor. Host only.
#pragma once

#include <cuda.h>

#include "runtime/status.h"

namespace flash_mla {

inline constexpr int kTensorMapRank = 5;

// A 16-bit tensor as the copy engine walks it, innermost dimension first; that one is contiguous.
struct TensorMapShape {
  const void* data;
  DType dtype;
  int64_t size[kTensorMapRank];
  int64_t stride_bytes[kTensorMapRank];  // [0] is not read; multiples of 16
  int32_t box[kTensorMapRank];           // of one copy
};

// Copies by this map write boxes with the 128-byte swizzle; elements outside the tensor are zero.
Status make_tensor_map(const TensorMapShape& shape, CUtensorMap* map);

}  // namespace flash_mla
