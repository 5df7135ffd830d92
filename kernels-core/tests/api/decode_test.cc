// A C++ engine's view of the library: the public headers, plain pointers, one call.
#include <cmath>
#include <cstring>
#include <vector>

#include "flash_mla/flash_mla.h"
#include "support.h"

namespace {

using flash_mla::DType;
using flash_mla::TensorView;

constexpr int kDim = 576, kDimV = 512, kHeads = 3, kKeys = 70, kPageSize = 64;

TensorView view(void* data, DType dtype, std::initializer_list<int64_t> shape) {
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  view.rank = static_cast<int32_t>(shape.size());
  int64_t stride = 1;
  for (int32_t i = view.rank - 1; i >= 0; --i) {
    view.shape[i] = shape.begin()[i];
    view.stride[i] = stride;
    stride *= view.shape[i];
  }
  return view;
}

// bfloat16 by truncation: every value here is a multiple of 1/8 below 4, hence exact.
uint16_t bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

float value_of(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

struct Decode {
  std::vector<uint16_t> q = std::vector<uint16_t>(kHeads * kDim);
  std::vector<uint16_t> cache = std::vector<uint16_t>(3 * kPageSize * kDim);
  std::vector<uint16_t> out = std::vector<uint16_t>(kHeads * kDimV, 0x7fc0);
  std::vector<float> lse = std::vector<float>(kHeads, NAN);
  std::vector<char> scratch;
  int32_t block_table[2] = {2, 0};
  int32_t cache_seqlens[1] = {kKeys};
  flash_mla::MlaDecodeDenseArgs args;

  Decode() {
    for (size_t i = 0; i < q.size(); ++i) q[i] = bf16(static_cast<float>(i % 5) / 8);
    for (size_t i = 0; i < cache.size(); ++i) cache[i] = bf16(static_cast<float>(i * 7 % 31) / 8);
    args.q = view(q.data(), DType::kBFloat16, {1, 1, kHeads, kDim});
    args.kv_cache = view(cache.data(), DType::kBFloat16, {3, kPageSize, 1, kDim});
    args.block_table = view(block_table, DType::kInt32, {1, 2});
    args.cache_seqlens = view(cache_seqlens, DType::kInt32, {1});
    args.out = view(out.data(), DType::kBFloat16, {1, 1, kHeads, kDimV});
    args.lse = view(lse.data(), DType::kFloat32, {1, kHeads, 1});
    args.softmax_scale = 0.05f;
  }

  flash_mla::Status run() {
    flash_mla::WorkspaceSize size;
    if (flash_mla::Status status = flash_mla::mla_decode_dense_workspace(args, &size);
        !status.ok()) {
      return status;
    }
    scratch.resize(size.scratch_bytes);
    args.workspace = {scratch.data(), size.scratch_bytes, nullptr, 0};
    return flash_mla::mla_decode_dense(args, nullptr);
  }

  const uint16_t* key(int j) const {
    return &cache[(block_table[j / kPageSize] * kPageSize + j % kPageSize) * kDim];
  }
};

}  // namespace

TEST(a_decode_call_agrees_with_a_double_loop) {
  Decode decode;
  EXPECT(decode.run().ok());
  for (int h = 0; h < kHeads; ++h) {
    double sum = 0;
    std::vector<double> weighted(kDimV);
    for (int j = 0; j < kKeys; ++j) {
      double logit = 0;
      for (int c = 0; c < kDim; ++c) {
        logit += double{value_of(decode.q[h * kDim + c])} * value_of(decode.key(j)[c]);
      }
      const double weight = std::exp(logit * double{decode.args.softmax_scale});
      sum += weight;
      for (int c = 0; c < kDimV; ++c) weighted[c] += weight * value_of(decode.key(j)[c]);
    }
    EXPECT(std::fabs(decode.lse[h] - std::log(sum)) < 1e-4 * std::log(sum));
    for (int c = 0; c < kDimV; ++c) {
      const double expected = weighted[c] / sum;
      EXPECT(std::fabs(value_of(decode.out[h * kDimV + c]) - expected) < 8e-4 + expected / 64);
    }
  }
}

TEST(a_bad_argument_is_named_and_nothing_is_written) {
  Decode decode;
  decode.args.block_table.dtype = DType::kInt64;
  const flash_mla::Status status = decode.run();
  EXPECT(status.code == flash_mla::StatusCode::kInvalidArgument);
  EXPECT(std::strstr(status.message, "mla_decode_dense: block_table must have dtype int32") !=
         nullptr);
  EXPECT(decode.out[0] == 0x7fc0 && std::isnan(decode.lse[0]));
}

TEST(a_missing_workspace_is_refused) {
  Decode decode;
  flash_mla::set_num_threads(4);  // one tile for four workers: the keys are split
  int32_t wide_table[64] = {2};
  decode.args.block_table = view(wide_table, DType::kInt32, {1, 64});
  const flash_mla::Status status = flash_mla::mla_decode_dense(decode.args, nullptr);
  flash_mla::set_num_threads(0);
  EXPECT(status.code == flash_mla::StatusCode::kInvalidArgument);
  EXPECT(std::strstr(status.message, "ask mla_decode_dense_workspace") != nullptr);
}

TEST(the_version_is_that_of_the_build) { EXPECT(std::strlen(flash_mla::version()) >= 5); }

TEST_MAIN()
