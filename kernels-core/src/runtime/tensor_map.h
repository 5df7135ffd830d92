// Tensor maps: what the copy engine of sm_90 and later needs to know of a tensor. Host only.
#pragma once

#include <cuda.h>

#include "runtime/status.h"

namespace flash_mla {

inline constexpr int kTensorMapRank = 5;

// A tensor of bytes or 16-bit values as the copy engine walks it, innermost dimension first; that
// one is contiguous.
struct TensorMapShape {
  const void* data;
  DType dtype;
  int64_t size[kTensorMapRank];
  int64_t stride_bytes[kTensorMapRank];  // [0] is not read; multiples of 16
  int32_t box[kTensorMapRank];           // of one copy
  // Copies write boxes with this swizzle: 128, 64, or 0 for none. Elements outside the tensor are
  // zero.
  int32_t swizzle_bytes = 128;
};

Status make_tensor_map(const TensorMapShape& shape, CUtensorMap* map);

}  // namespace flash_mla
