#if FLASH_MLA_WITH_CUDA
#include "runtime/tensor_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

namespace flash_mla {

namespace {

// The driver's function, found at run time: the library does not link libcuda.
PFN_cuTensorMapEncodeTiled_v12000 encode_function() {
  static const PFN_cuTensorMapEncodeTiled_v12000 kFunction = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return kFunction;
}

CUtensorMapDataType data_type(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DType::kFloat16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    default: return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  }
}

CUtensorMapSwizzle swizzle(int32_t bytes) {
  return bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
         : bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                       : CU_TENSOR_MAP_SWIZZLE_NONE;
}

}  // namespace

Status make_tensor_map(const TensorMapShape& shape, CUtensorMap* map) {
  const PFN_cuTensorMapEncodeTiled_v12000 encode = encode_function();
  if (encode == nullptr) {
    return make_status(
        StatusCode::kRuntimeError,
        "the driver has no cuTensorMapEncodeTiled; install one for CUDA 12 or later");
  }
  cuuint64_t size[kTensorMapRank], stride[kTensorMapRank - 1];
  cuuint32_t box[kTensorMapRank], step[kTensorMapRank];
  for (int i = 0; i < kTensorMapRank; ++i) {
    size[i] = static_cast<cuuint64_t>(shape.size[i]);
    box[i] = static_cast<cuuint32_t>(shape.box[i]);
    step[i] = 1;
    // A dimension of one element may have any stride, also one that the driver would refuse.
    if (i > 0) stride[i - 1] = shape.size[i] == 1 ? 16 : shape.stride_bytes[i];
  }
  const auto encode_here = [&] {
    return encode(map, data_type(shape.dtype), kTensorMapRank, const_cast<void*>(shape.data), size,
                  stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle(shape.swizzle_bytes),
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = encode_here();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {
    // The first call of a thread: the runtime binds the device's context to it when asked to.
    int device = 0;
    if (cudaGetDevice(&device) == cudaSuccess) (void)cudaSetDevice(device);
    result = encode_here();
  }
  if (result == CUDA_SUCCESS) return {};
  return make_status(StatusCode::kRuntimeError, "cuTensorMapEncodeTiled failed with error %d",
                     static_cast<int>(result));
}

}  // namespace flash_mla
#endif
