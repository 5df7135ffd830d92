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

int32_t dtype_code(const Tensor& tensor) {
  int32_t dtype = 0;
  check(aoti_torch_get_dtype(tensor.get(), &dtype), "dtype");
  return dtype;
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

void* data_ptr(const Tensor& tensor) {
  void* data = nullptr;
  check(aoti_torch_get_data_ptr(tensor.get(), &data), "data_ptr");
  return data;
}

Tensor allocate(std::span<const int64_t> sizes, const int64_t* strides, int32_t dtype,
                const Tensor& like) {
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides, dtype,
                                 device_type(like), device_index(like), &handle),
        "flash_mla: an output or the workspace could not be allocated");
  return Tensor(handle);
}

Tensor allocate(std::span<const int64_t> sizes, int32_t dtype, const Tensor& like) {
  sizes = sizes.first(std::min<size_t>(sizes.size(), flash_mla::kMaxRank));
  int64_t strides[flash_mla::kMaxRank];
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return allocate(sizes, strides, dtype, like);
}

Block allocate_block(int64_t bytes, const Tensor& like) {
  Block block = {empty({bytes}, DType::kUInt8, like), nullptr, bytes};
  block.data = data_ptr(*block.tensor);
  return block;
}

// The most that the core asks for: a block of this size serves every later call.
constexpr int64_t kSyncBlockBytes = 64 * 1024;

// Scratch beyond this is not left to later calls. Splits that depend on the number of SMs alone
// take at most 20 MB: two partial tiles of 66 KB for each of 148 SMs.
constexpr int64_t kMaxLeftScratchBytes = 32 << 20;

// What calls leave to later ones.
struct KeptBlocks {
  struct SyncBlocks {
    Block eager;
    // Of the latest capture only: memory of earlier ones stays in the pools of their graphs, where
    // it is theirs during a replay like any other intermediate result.
    Block captured;
    uint64_t capture = 0;
  };
  struct Scratch {
    Block block;
    flash_mla::Stream stream = nullptr;
  };

  std::mutex mutex;
  std::map<std::pair<int32_t, flash_mla::Stream>, SyncBlocks> sync;
  std::map<int32_t, Scratch> scratch;  // of a device's latest call
};

KeptBlocks& kept_blocks() {
  // Never destroyed: at exit torch may be gone before this library.
  static auto& blocks = *new KeptBlocks;
  return blocks;
}

// The sync block of the stream, which is the current one of `like`'s device: inside a capture that
// capture's own, else the stream's.
Block sync_block(int64_t bytes, const Tensor& like, int32_t device_index, flash_mla::Stream stream,
                 uint64_t capture) {
  KeptBlocks& kept = kept_blocks();
  const std::lock_guard lock(kept.mutex);
  KeptBlocks::SyncBlocks& blocks = kept.sync[{device_index, stream}];
  Block& block = capture != 0 ? blocks.captured : blocks.eager;
  const bool of_another_capture = capture != 0 && capture != blocks.capture;
  if (of_another_capture || block.bytes < bytes) {
    Block zeros = allocate_block(std::max(bytes, kSyncBlockBytes), like);
    // A capture has this node once, before the first of its launches: between two of them it would
    // break the programmatic edge by which they overlap.
    check(aoti_torch_zero_(zeros.tensor->get()), "flash_mla: the sync block could not be zeroed");
    block = std::move(zeros);
    if (capture != 0) blocks.capture = capture;
  }
  return block;
}

// The scratch that an earlier call in the stream has left, if it is large enough. Nobody else gets
// it before leave_scratch(): between the launches of a call there may be those of another thread.
Block take_scratch(int64_t bytes, int32_t device_index, flash_mla::Stream stream) {
  KeptBlocks& kept = kept_blocks();
  const std::lock_guard lock(kept.mutex);
  KeptBlocks::Scratch& scratch = kept.scratch[device_index];
  if (scratch.stream != stream || scratch.block.bytes < bytes) return {};
  return std::exchange(scratch.block, {});
}

void leave_scratch(Block block, int32_t device_index, flash_mla::Stream stream) {
  KeptBlocks& kept = kept_blocks();
  const std::lock_guard lock(kept.mutex);
  kept.scratch[device_index] = {std::move(block), stream};
}

}  // namespace

TensorView view(const Tensor& tensor) {
  TensorView view;
  const std::span<const int64_t> shape = sizes(tensor);
  int64_t* strides = nullptr;
  check(aoti_torch_get_strides(tensor.get(), &strides), "strides");
  view.data = data_ptr(tensor);
  view.dtype = dtype_of(tensor);
  if (is_cuda(tensor)) view.device = {flash_mla::DeviceType::kCuda, device_index(tensor)};
  // A rank beyond the view's is reported as such: the core refuses it by its rank alone.
  view.rank = static_cast<int32_t>(shape.size());
  const size_t kept = std::min<size_t>(shape.size(), flash_mla::kMaxRank);
  std::copy_n(shape.data(), kept, view.shape);
  std::copy_n(strides, kept, view.stride);
  return view;
}

TensorView view(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? view(*tensor) : TensorView{};
}

DType dtype_of(const Tensor& tensor) { return core_dtype(dtype_code(tensor)); }

std::span<const int64_t> sizes(const Tensor& tensor) {
  int64_t rank = 0;
  int64_t* sizes = nullptr;
  check(aoti_torch_get_dim(tensor.get(), &rank), "rank");
  check(aoti_torch_get_sizes(tensor.get(), &sizes), "sizes");
  return {sizes, static_cast<size_t>(rank)};
}

int64_t size_or_zero(const Tensor& tensor, size_t dim) {
  const std::span<const int64_t> all = sizes(tensor);
  return dim < all.size() ? all[dim] : 0;
}

Tensor empty(std::span<const int64_t> sizes, DType dtype, const Tensor& like) {
  return allocate(sizes, torch_dtype(dtype), like);
}

Tensor empty(std::initializer_list<int64_t> sizes, DType dtype, const Tensor& like) {
  return empty(std::span(sizes.begin(), sizes.size()), dtype, like);
}

Tensor empty_column_major(int64_t rows, int64_t columns, const Tensor& like) {
  const int64_t sizes[] = {rows, columns};
  const int64_t strides[] = {1, std::max<int64_t>(rows, 1)};
  return allocate(sizes, strides, torch_dtype(DType::kFloat32), like);
}

Tensor empty_as(const Tensor& like) { return allocate(sizes(like), dtype_code(like), like); }

void throw_value_error(const std::string& message) {
  throw std::runtime_error("[ValueError] " + message);
}

void throw_if_error(const flash_mla::Status& status) {
  switch (status.code) {
    case flash_mla::StatusCode::kOk: return;
    case flash_mla::StatusCode::kInvalidArgument: throw_value_error(status.message);
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
                             flash_mla::Stream stream)
    : stream_(stream) {
  uint64_t capture = 0;
  if (is_cuda(like)) {
    device_index_ = device_index(like);
    throw_if_error(flash_mla::stream_capture_id(stream, &capture));
    leaves_scratch_ =
        capture == 0 && 0 < size.scratch_bytes && size.scratch_bytes <= kMaxLeftScratchBytes;
  }
  if (leaves_scratch_) scratch_ = take_scratch(size.scratch_bytes, device_index_, stream);
  if (scratch_.bytes < size.scratch_bytes) scratch_ = allocate_block(size.scratch_bytes, like);
  if (size.sync_bytes > 0) {
    sync_ = sync_block(size.sync_bytes, like, device_index_, stream, capture);
  }
}

CallWorkspace::~CallWorkspace() {
  if (leaves_scratch_) leave_scratch(std::move(scratch_), device_index_, stream_);
}

}  // namespace flash_mla_torch
