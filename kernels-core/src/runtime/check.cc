#include "runtime/check.h"

#include <algorithm>

#include "runtime/status.h"

namespace flash_mla {

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
    case DType::kFloat8E4M3: return "float8_e4m3fn";
    case DType::kUInt8: return "uint8";
    case DType::kInt8: return "int8";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    case DType::kFloat64: return "float64";
    case DType::kFloat8E5M2: return "float8_e5m2";
    case DType::kInt16: return "int16";
    case DType::kBool: return "bool";
    case DType::kUnknown: break;
  }
  return "an unsupported dtype";
}

int64_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kInt64:
    case DType::kFloat64: return 8;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
    case DType::kInt16: return 2;
    default: return 1;
  }
}

namespace {

std::string int_list(const int64_t* values, int32_t count) {
  std::string text = "[";
  for (int32_t i = 0; i < count; ++i) {
    text += (i ? ", " : "") + std::to_string(values[i]);
  }
  return text + "]";
}

std::string device_string(Device device) {
  return device.type == DeviceType::kCpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

int64_t num_elements(const TensorView& tensor) {
  int64_t n = 1;
  for (int32_t i = 0; i < tensor.rank; ++i) n *= tensor.shape[i];
  return n;
}

}  // namespace

std::string shape_string(const TensorView& tensor) { return int_list(tensor.shape, tensor.rank); }

void Check::fail(const char* argument, const std::string& rule, const std::string& value,
                 const char* remedy) {
  status_ = make_status(StatusCode::kInvalidArgument, "%s: %s must %s, got %s; %s", operator_name_,
                        argument, rule.c_str(), value.c_str(), remedy);
}

Check& Check::shape_and_dtype(const TensorView& tensor, const char* argument, const char* dims,
                              int rank, std::initializer_list<DType> dtypes) {
  if (!ok()) return *this;
  const bool known_dtype = std::find(dtypes.begin(), dtypes.end(), tensor.dtype) != dtypes.end();
  if (tensor.defined() && tensor.rank == rank && known_dtype) return *this;
  require(tensor.defined(), argument, std::string("be a tensor ") + dims, "none",
          "pass it: it is not optional");
  if (!ok()) return *this;
  require(tensor.rank == rank, argument, std::string("have shape ") + dims, shape_string(tensor),
          "reshape it");
  std::string names;
  for (DType dtype : dtypes)
    names += (names.empty() ? "" : " or ") + std::string(dtype_name(dtype));
  return require(known_dtype, argument, "have dtype " + names, dtype_name(tensor.dtype),
                 "convert it");
}

Check& Check::tensor(const TensorView& tensor, const char* argument, const char* dims, int rank,
                     std::initializer_list<DType> dtypes) {
  shape_and_dtype(tensor, argument, dims, rank, dtypes);
  if (!ok()) return *this;
  const int32_t last = rank - 1;
  if (tensor.stride[last] == 1 || tensor.shape[last] <= 1) return *this;
  return require(false, argument, "have a contiguous last dimension",
                 "stride " + std::to_string(tensor.stride[last]),
                 "all other strides are free; make the last one 1");
}

Check& Check::size(const TensorView& tensor, const char* argument, int dim, int64_t expected,
                   const char* meaning) {
  if (!ok() || tensor.shape[dim] == expected) return *this;
  return require(
      false, argument,
      "have " + std::to_string(expected) + " (" + meaning + ") in dimension " + std::to_string(dim),
      "shape " + shape_string(tensor), "pass tensors that belong to one call");
}

Check& Check::same_device(const TensorView& tensor, const char* argument, Device device,
                          const char* as_argument) {
  if (!ok() || !tensor.defined()) return *this;
  const bool same = tensor.device.type == device.type &&
                    (device.type == DeviceType::kCpu || tensor.device.index == device.index);
  if (same) return *this;
  return require(false, argument,
                 "be on the device of " + std::string(as_argument) + ", " + device_string(device),
                 device_string(tensor.device), "move it there");
}

Check& Check::aligned_rows(const TensorView& tensor, const char* argument) {
  if (!ok()) return *this;
  const int64_t bytes = dtype_bytes(tensor.dtype);
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0;
  for (int32_t i = 0; i + 1 < tensor.rank; ++i) {
    aligned &= tensor.shape[i] <= 1 || tensor.stride[i] * bytes % 16 == 0;
  }
  if (aligned) return *this;
  return require(false, argument, "have 16-byte aligned rows",
                 "strides " + int_list(tensor.stride, tensor.rank) + " of " +
                     std::to_string(bytes) + "-byte elements",
                 "allocate it aligned, or slice it on multiples of 16 bytes");
}

Check& Check::no_overlap(const TensorView& tensor, const char* argument) {
  if (!ok() || num_elements(tensor) == 0) return *this;
  // A dimension must step past everything that the dimensions of smaller stride reach.
  bool distinct = true;
  for (int32_t i = 0; i < tensor.rank; ++i) {
    if (tensor.shape[i] <= 1) continue;
    int64_t reach = 0;
    for (int32_t j = 0; j < tensor.rank; ++j) {
      const bool smaller =
          tensor.stride[j] < tensor.stride[i] || (tensor.stride[j] == tensor.stride[i] && j > i);
      if (j != i && smaller) reach += tensor.stride[j] * (tensor.shape[j] - 1);
    }
    distinct &= tensor.stride[i] > reach;
  }
  if (distinct) return *this;
  return require(
      false, argument, "have elements that do not overlap",
      "strides " + int_list(tensor.stride, tensor.rank) + " for shape " + shape_string(tensor),
      "do not pass an expanded tensor as an output");
}

}  // namespace flash_mla
