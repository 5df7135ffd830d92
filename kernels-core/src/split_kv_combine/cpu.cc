// merge_attn_states on the CPU: one row at a time.
#include "device/cpu/attend.h"
#include "device/scalar.h"
#include "runtime/threads.h"
#include "runtime/variant.h"
#include "split_kv_combine/problem.h"

namespace flash_mla::split_kv_combine {

namespace {

float load(DType dtype, const void* row, int64_t c) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(row)[c];
  const uint16_t bits = static_cast<const uint16_t*>(row)[c];
  return dtype == DType::kBFloat16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

void store(DType dtype, void* row, int64_t c, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(row)[c] = value;
  } else {
    static_cast<uint16_t*>(row)[c] =
        dtype == DType::kBFloat16 ? float_to_bf16(value) : float_to_fp16(value);
  }
}

template <class Data, class Lse>
auto out_row(const Params& p, const AttnState<Data, Lse>& state, int64_t n, int64_t h) {
  using Byte = std::conditional_t<std::is_const_v<Data>, const uint8_t, uint8_t>;
  const int64_t element_bytes = p.dtype == DType::kFloat32 ? 4 : 2;
  return static_cast<Byte*>(state.out) +
         (n * state.out_stride_n + h * state.out_stride_h) * element_bytes;
}

void merge(const Params& p, int64_t n, int64_t h) {
  const float lse_a = p.a.lse[n * p.a.lse_stride_n + h * p.a.lse_stride_h];
  const float lse_b = p.b.lse[n * p.b.lse_stride_n + h * p.b.lse_stride_h];
  const MergeWeights weights = merge_weights(lse_a, lse_b);
  const void* out_a = out_row(p, p.a, n, h);
  const void* out_b = out_row(p, p.b, n, h);
  void* merged = out_row(p, p.merged, n, h);
  for (int64_t c = 0; c < p.d; ++c) {
    // A part of weight 0 is not read: it may hold anything.
    const float a = weights.a == 0.0f ? 0.0f : weights.a * load(p.dtype, out_a, c);
    const float b = weights.b == 0.0f ? 0.0f : weights.b * load(p.dtype, out_b, c);
    store(p.dtype, merged, c, a + b);
  }
  p.merged.lse[n * p.merged.lse_stride_n + h * p.merged.lse_stride_h] = weights.lse;
}

Status launch(const Problem& p, const Workspace&, Stream) {
  parallel_for(p.n, [&](int64_t n) {
    for (int64_t h = 0; h < p.h; ++h) merge(p, n, h);
  });
  return {};
}

}  // namespace

extern constinit const Variant<Problem> variant_cpu = {"cpu", Row::kCpu, supports_all<Problem>,
                                                       no_workspace<Problem>, launch};

}  // namespace flash_mla::split_kv_combine
