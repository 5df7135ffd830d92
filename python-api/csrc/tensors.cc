#include "tensors.h"

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "flash_mla/introspect.h"

// Absent from a CPU build of torch, where nothing calls it.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace flash_mla_torch {

namespace {

void check(AOTITorchError error, const char* what) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error(what);
}

// torch's codes of the dtypes, in the order of the core's.
struct DTypePair {
  DType core;
  int32_t torch;
};

const DTypePair kDTypes[] = {
    {DType::kFloat32, aoti_torch_dtype_float32()},
    {DType::kBFloat16, aoti_torch_dtype_bfloat16()},
    {DType::kFloat16, aoti_torch_dtype_float16()},
    {DType::kFloat8E4M3, aoti_torch_dtype_float8_e4m3fn()},
    {DType::kUInt8, aoti_torch_dtype_uint8()},
    {DType::kInt8, aoti_torch_dtype_int8()},
    {DType::kInt32, aoti_torch_dtype_int32()},
    {DType::kInt64, aoti_torch_dtype_int64()},
    {DType::kFloat64, aoti_torch_dtype_float64()},
    {DType::kFloat8E5M2, aoti_torch_dtype_float8_e5m2()},
    {DType::kInt16, aoti_torch_dtype_int16()},
    {DType::kBool, aoti_torch_dtype_bool()},
};

DType core_dtype(int32_t torch_dtype) {
  for (const DTypePair& pair : kDTypes) {
    if (pair.torch == torch_dtype) return pair.core;
  }
  return DType::kUnknown;
}

int32_t torch_dtype(DType dtype) {
  for (const DTypePair& pair : kDTypes) {
    if (pair.core == dtype) return pair.torch;
  }
  throw std::runtime_error("flash_mla: no torch dtype for a core dtype");
}

bool is_cuda(const Tensor& tensor) {
  int32_t type = 0;
  check(aoti_torch_get_device_type(tensor.get(), &type), "device type");
  return type == aoti_torch_device_type_cuda();
}

int32_t device_index(const Tensor& tensor) {
  int32_t index = 0;
  check(aoti_torch_get_device_index(tensor.get(), &index), "device index");
  return index;
}

Tensor allocate(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                int32_t dtype, const Tensor& like) {
  int32_t device_type = 0;
  check(aoti_torch_get_device_type(like.get(), &device_type), "device type");
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                 dtype, device_type, device_index(like), &handle),
        "flash_mla: an output or the workspace could not be allocated");
  return Tensor(handle);
}

Tensor allocate(const std::vector<int64_t>& sizes, int32_t dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  }
  return allocate(sizes, strides, dtype, like);
}

}  // namespace

TensorView view(const Tensor& tensor) {
  TensorView view;
  int64_t rank = 0;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  int32_t dtype = 0;
  check(aoti_torch_get_dim(tensor.get(), &rank), "rank");
  check(aoti_torch_get_sizes(tensor.get(), &sizes), "sizes");
  check(aoti_torch_get_strides(tensor.get(), &strides), "strides");
  check(aoti_torch_get_dtype(tensor.get(), &dtype), "dtype");
  check(aoti_torch_get_data_ptr(tensor.get(), &view.data), "data_ptr");
  view.dtype = core_dtype(dtype);
  view.device = {is_cuda(tensor) ? flash_mla::DeviceType::kCuda : flash_mla::DeviceType::kCpu,
                 is_cuda(tensor) ? device_index(tensor) : 0};
  // A rank beyond the view's is reported as such: the core refuses it by its rank alone.
  view.rank = static_cast<int32_t>(rank);
  const int64_t kept = std::min<int64_t>(rank, flash_mla::kMaxRank);
  std::copy_n(sizes, kept, view.shape);
  std::copy_n(strides, kept, view.stride);
  return view;
}

TensorView view(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? view(*tensor) : TensorView{};
}

std::vector<int64_t> sizes(const Tensor& tensor) {
  int64_t rank = 0;
  int64_t* sizes = nullptr;
  check(aoti_torch_get_dim(tensor.get(), &rank), "rank");
  check(aoti_torch_get_sizes(tensor.get(), &sizes), "sizes");
  return {sizes, sizes + rank};
}

int64_t size_or_zero(const Tensor& tensor, int dim) {
  const std::vector<int64_t> all = sizes(tensor);
  return dim < static_cast<int>(all.size()) ? all[dim] : 0;
}

Tensor empty(const std::vector<int64_t>& sizes, DType dtype, const Tensor& like) {
  return allocate(sizes, torch_dtype(dtype), like);
}

Tensor empty_column_major(int64_t rows, int64_t columns, const Tensor& like) {
  return allocate({rows, columns}, {1, std::max<int64_t>(rows, 1)}, torch_dtype(DType::kFloat32),
                  like);
}

Tensor empty_as(const std::vector<int64_t>& sizes, const Tensor& like) {
  int32_t dtype = 0;
  check(aoti_torch_get_dtype(like.get(), &dtype), "dtype");
  return allocate(sizes, dtype, like);
}

void throw_if_error(const flash_mla::Status& status) {
  switch (status.code) {
    case flash_mla::StatusCode::kOk: return;
    case flash_mla::StatusCode::kInvalidArgument: throw std::invalid_argument(status.message);
    case flash_mla::StatusCode::kUnsupported:
      throw std::runtime_error(std::string("[NotImplementedError] ") + status.message);
    default: throw std::runtime_error(status.message);
  }
}

flash_mla::Stream prepare_call(const Tensor& tensor) {
  if (!is_cuda(tensor)) {
    uint32_t threads = 0;
    check(torch_get_num_threads(&threads), "num_threads");
    flash_mla::set_num_threads(static_cast<int32_t>(threads));
    return nullptr;
  }
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("flash_mla: CUDA tensors in a torch build without CUDA");
  }
  check(aoti_torch_get_current_cuda_stream(device_index(tensor), &stream), "current stream");
  return stream;
}

CallWorkspace::CallWorkspace(const flash_mla::WorkspaceSize& size, const Tensor& like) {
  if (size.scratch_bytes > 0) {
    scratch_ = empty({size.scratch_bytes}, DType::kUInt8, like);
    check(aoti_torch_get_data_ptr(scratch_->get(), &workspace_.scratch), "data_ptr");
    workspace_.scratch_bytes = size.scratch_bytes;
  }
}

}  // namespace flash_mla_torch
