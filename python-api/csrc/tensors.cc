#include "tensors.h"

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "flash_mla/cuda_stream.h"
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

int32_t device_type(const Tensor& tensor) {
  int32_t type = 0;
  check(aoti_torch_get_device_type(tensor.get(), &type), "device type");
  return type;
}

bool is_cuda(const Tensor& tensor) {
  static const int32_t kCuda = aoti_torch_device_type_cuda();
  return device_type(tensor) == kCuda;
}

int32_t device_index(const Tensor& tensor) {
  int32_t index = 0;
  check(aoti_torch_get_device_index(tensor.get(), &index), "device index");
  return index;
}

Tensor allocate(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                int32_t dtype, const Tensor& like) {
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                 dtype, device_type(like), device_index(like), &handle),
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

// The most that the core asks for: a block of this size serves every later call.
constexpr int64_t kSyncBlockBytes = 64 * 1024;

struct SyncBlock {
  std::optional<Tensor> tensor;
  int64_t bytes = 0;
  uint64_t capture = 0;
};

// The sync block of the stream, which is the current one of `like`'s device: inside a capture that
// capture's own, else the stream's.
SyncBlock sync_block(int64_t bytes, const Tensor& like, flash_mla::Stream stream) {
  struct StreamBlocks {
    SyncBlock eager;
    // Of the latest capture only: memory of earlier ones stays in the pools of their graphs, where
    // it is theirs during a replay like any other intermediate result.
    SyncBlock captured;
  };
  static std::mutex mutex;
  // Never destroyed: at exit torch may be gone before this library.
  static auto& streams = *new std::map<std::pair<int32_t, flash_mla::Stream>, StreamBlocks>;

  uint64_t capture = 0;
  throw_if_error(flash_mla::stream_capture_id(stream, &capture));
  const std::lock_guard lock(mutex);
  StreamBlocks& blocks = streams[{device_index(like), stream}];
  SyncBlock& block = capture != 0 ? blocks.captured : blocks.eager;
  if (block.capture != capture || block.bytes < bytes) {
    const int64_t new_bytes = std::max(bytes, kSyncBlockBytes);
    Tensor zeros = empty({new_bytes}, DType::kUInt8, like);
    // A capture has this node once, before the first of its launches: between two of them it would
    // break the programmatic edge by which they overlap.
    check(aoti_torch_zero_(zeros.get()), "flash_mla: the sync block could not be zeroed");
    block = {std::move(zeros), new_bytes, capture};
  }
  return block;
}

void* data_ptr(const Tensor& tensor) {
  void* data = nullptr;
  check(aoti_torch_get_data_ptr(tensor.get(), &data), "data_ptr");
  return data;
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
  view.data = data_ptr(tensor);
  view.dtype = core_dtype(dtype);
  if (is_cuda(tensor)) view.device = {flash_mla::DeviceType::kCuda, device_index(tensor)};
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
  int64_t rank = 0;
  int64_t* sizes = nullptr;
  check(aoti_torch_get_dim(tensor.get(), &rank), "rank");
  check(aoti_torch_get_sizes(tensor.get(), &sizes), "sizes");
  return dim < rank ? sizes[dim] : 0;
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

CallWorkspace::CallWorkspace(const flash_mla::WorkspaceSize& size, const Tensor& like,
                             flash_mla::Stream stream) {
  if (size.scratch_bytes > 0) {
    scratch_ = empty({size.scratch_bytes}, DType::kUInt8, like);
    workspace_.scratch = data_ptr(*scratch_);
    workspace_.scratch_bytes = size.scratch_bytes;
  }
  if (size.sync_bytes > 0) {
    SyncBlock block = sync_block(size.sync_bytes, like, stream);
    sync_ = std::move(block.tensor);
    workspace_.sync = data_ptr(*sync_);
    workspace_.sync_bytes = block.bytes;
  }
}

}  // namespace flash_mla_torch
