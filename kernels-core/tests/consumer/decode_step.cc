// Dense decode steps as a C++ engine runs them: `decode_step cpu` or `decode_step cuda`.
//
// One workspace for the life of the stream, two steps in a row through it, results compared with a
// double loop, and an error read as an engine would. Exit codes: 0, 1 for a wrong result, 77 when
// there is no GPU, or no kernel in the library.
#include <flash_mla/flash_mla.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

#ifdef WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace {

using flash_mla::DeviceType;
using flash_mla::DType;
using flash_mla::Status;

constexpr int kBatch = 2, kHeads = 16, kDim = 576, kDimV = 512;
constexpr int kPages = 5, kPageSize = 64, kMaxPages = 3;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "decode_step: %s\n", what.c_str());
  std::exit(1);
}

void check(const Status& status) {
  if (!status.ok()) fail(status.message);
}

// --- Memory and streams of the two kinds of device: an engine has its own. ---

#ifdef WITH_CUDA
void check(cudaError_t error) {
  if (error != cudaSuccess) fail(cudaGetErrorString(error));
}
#endif

struct Engine {
  DeviceType type;
  flash_mla::Stream stream = nullptr;

  explicit Engine(DeviceType device_type) : type(device_type) {
#ifdef WITH_CUDA
    if (type == DeviceType::kCuda) {
      cudaStream_t created;
      check(cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking));
      stream = created;
    }
#endif
  }

  // Bytes on the device, zeroed. They live as long as the process.
  void* allocate(size_t bytes) const {
    if (bytes == 0) return nullptr;
#ifdef WITH_CUDA
    if (type == DeviceType::kCuda) {
      void* data;
      check(cudaMalloc(&data, bytes));
      check(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)));
      return data;
    }
#endif
    return std::calloc(bytes, 1);
  }

  // Stream-ordered; the destination may be read after synchronize().
  void copy(void* to, const void* from, size_t bytes) const {
#ifdef WITH_CUDA
    if (type == DeviceType::kCuda) {
      check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)));
      return;
    }
#endif
    std::memcpy(to, from, bytes);
  }

  void synchronize() const {
#ifdef WITH_CUDA
    if (type == DeviceType::kCuda) check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
#endif
  }

  // A contiguous tensor with the elements of `host`.
  template <class T>
  flash_mla::TensorView tensor(const std::vector<T>& host, DType dtype,
                               std::initializer_list<int64_t> shape) const {
    flash_mla::TensorView view;
    view.data = allocate(host.size() * sizeof(T));
    copy(view.data, host.data(), host.size() * sizeof(T));
    view.dtype = dtype;
    view.device = {type, 0};
    view.rank = static_cast<int32_t>(shape.size());
    int64_t stride = 1;
    for (int i = view.rank - 1; i >= 0; --i) {
      view.shape[i] = shape.begin()[i];
      view.stride[i] = stride;
      stride *= view.shape[i];
    }
    return view;
  }

  template <class T>
  std::vector<T> elements(const flash_mla::TensorView& view, size_t count) const {
    std::vector<T> host(count);
    copy(host.data(), view.data, count * sizeof(T));
    synchronize();
    return host;
  }
};

// bfloat16 by truncation: exact for the inputs here, multiples of 1/8 below 4.
uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

struct Problem {
  std::vector<uint16_t> q = std::vector<uint16_t>(kBatch * kHeads * kDim);
  std::vector<uint16_t> cache = std::vector<uint16_t>(kPages * kPageSize * kDim);
  std::vector<int32_t> block_table = {4, 1, 0, 2, 3, 0};
  std::vector<int32_t> cache_seqlens = {170, 67};
  float softmax_scale = 0.05f;

  Problem() {
    for (size_t i = 0; i < q.size(); ++i) q[i] = to_bf16(static_cast<float>(i % 5) / 8);
    for (size_t i = 0; i < cache.size(); ++i)
      cache[i] = to_bf16(static_cast<float>(i * 7 % 31) / 8);
  }

  const uint16_t* key(int request, int j) const {
    const int page = block_table[request * kMaxPages + j / kPageSize];
    return &cache[(page * kPageSize + j % kPageSize) * kDim];
  }
};

// Compares out [b, 1, h, 512] and lse [b, h, 1] with a double loop.
void compare(const Problem& problem, const std::vector<uint16_t>& out,
             const std::vector<float>& lse) {
  for (int row = 0; row < kBatch * kHeads; ++row) {
    const int request = row / kHeads;
    double sum = 0;
    std::vector<double> weighted(kDimV);
    for (int j = 0; j < problem.cache_seqlens[request]; ++j) {
      const uint16_t* key = problem.key(request, j);
      double logit = 0;
      for (int c = 0; c < kDim; ++c) {
        logit += double{from_bf16(problem.q[row * kDim + c])} * from_bf16(key[c]);
      }
      const double weight = std::exp(logit * double{problem.softmax_scale});
      sum += weight;
      for (int c = 0; c < kDimV; ++c) weighted[c] += weight * from_bf16(key[c]);
    }
    // Written so that NaN fails too.
    if (!(std::fabs(lse[row] - std::log(sum)) <= 1e-4 * std::log(sum))) {
      fail("lse of row " + std::to_string(row) + " is " + std::to_string(lse[row]) + ", not " +
           std::to_string(std::log(sum)));
    }
    for (int c = 0; c < kDimV; ++c) {
      const double expected = weighted[c] / sum;
      const float found = from_bf16(out[row * kDimV + c]);
      if (!(std::fabs(found - expected) <= 8e-4 + expected * 2.01 / 128)) {
        fail("out of row " + std::to_string(row) + ", column " + std::to_string(c) + " is " +
             std::to_string(found) + ", not " + std::to_string(expected));
      }
    }
  }
}

void run(DeviceType type) {
  const Engine engine(type);
  Problem problem;

  flash_mla::MlaDecodeDenseArgs args;
  args.q = engine.tensor(problem.q, DType::kBFloat16, {kBatch, 1, kHeads, kDim});
  args.kv_cache = engine.tensor(problem.cache, DType::kBFloat16, {kPages, kPageSize, 1, kDim});
  args.block_table = engine.tensor(problem.block_table, DType::kInt32, {kBatch, kMaxPages});
  args.cache_seqlens = engine.tensor(problem.cache_seqlens, DType::kInt32, {kBatch});
  args.softmax_scale = problem.softmax_scale;
  args.causal = true;

  // Scratch depends on shapes alone: ask once, for the largest batch and the widest block table.
  flash_mla::WorkspaceSize size;
  check(flash_mla::mla_decode_dense_workspace(args, &size));
  args.workspace = {engine.allocate(size.scratch_bytes), size.scratch_bytes,
                    engine.allocate(size.sync_bytes), size.sync_bytes};

  const std::vector<uint16_t> nan_out(kBatch * kHeads * kDimV, 0x7fc0);
  const std::vector<float> nan_lse(kBatch * kHeads, NAN);
  args.out = engine.tensor(nan_out, DType::kBFloat16, {kBatch, 1, kHeads, kDimV});
  args.lse = engine.tensor(nan_lse, DType::kFloat32, {kBatch, kHeads, 1});

  for (const std::vector<int32_t>& lengths : {problem.cache_seqlens, {3, 192}}) {
    problem.cache_seqlens = lengths;
    engine.copy(args.cache_seqlens.data, lengths.data(), lengths.size() * sizeof(int32_t));
    check(flash_mla::mla_decode_dense(args, engine.stream));  // has not run yet on a GPU
    compare(problem, engine.elements<uint16_t>(args.out, nan_out.size()),
            engine.elements<float>(args.lse, nan_lse.size()));
  }

  args.block_table.dtype = DType::kInt64;
  const Status refused = flash_mla::mla_decode_dense(args, engine.stream);
  if (refused.code != flash_mla::StatusCode::kInvalidArgument ||
      std::strstr(refused.message, "block_table must have dtype int32") == nullptr) {
    fail(std::string("a block_table of int64 was not refused: ") + refused.message);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string device = argc == 2 ? argv[1] : "";
  if (device != "cpu" && device != "cuda") fail("usage: decode_step cpu|cuda");
  if (device == "cuda") {
    int count = 0;
#ifdef WITH_CUDA
    if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
#endif
    const bool has_kernels = *flash_mla::cuda_architectures() != '\0';
    if (count == 0 || !has_kernels) {
      std::printf("cuda: skipped, %s\n", has_kernels ? "no GPU" : "this flash_mla has no kernels");
      return 77;
    }
  }
  run(device == "cpu" ? DeviceType::kCpu : DeviceType::kCuda);
  std::printf("%s: two decode steps are right, with flash_mla %s\n", device.c_str(),
              flash_mla::version());
}
