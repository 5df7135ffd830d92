// The validated problem of mla_prefill_sparse, and the parameters its kernels take.
#pragma once

#include "device/kv_format.h"
#include "flash_mla/mla_prefill_sparse.h"
#include "runtime/check.h"

namespace flash_mla::mla_prefill_sparse {

inline constexpr char kOperator[] = "mla_prefill_sparse";

// Plain data, passed to kernels by value. Strides are in elements of their tensor.
struct Params {
  int64_t s_q;   // query tokens
  int64_t h_q;   // query heads, all on one key head
  int64_t s_kv;  // tokens of kv
  int64_t topk;
  int32_t d_qk;

  const void* q;  // [s_q, h_q, d_qk]
  int64_t q_stride_s, q_stride_h;
  const void* kv;  // [s_kv, 1, d_qk]
  int64_t kv_stride_s;
  const int32_t* indices;  // [s_q, 1, topk]
  int64_t indices_stride_s, indices_stride_k;
  const int32_t* topk_length;  // [s_q], null: topk
  int64_t topk_length_stride;
  const float* attn_sink;  // [h_q], null: none
  int64_t attn_sink_stride;
  void* out;  // [s_q, h_q, 512]
  int64_t out_stride_s, out_stride_h;
  float* max_logits;  // [s_q, h_q]
  int64_t max_logits_stride_s, max_logits_stride_h;
  float* lse;  // [s_q, h_q]
  int64_t lse_stride_s, lse_stride_h;

  float softmax_scale;
};

// A Params that obeys every rule of the contract: only validate() makes one.
class Problem : public Params {
 public:
  Device device;

  bool empty() const { return s_q * h_q == 0; }  // there is no result to compute

  static Status validate(const MlaPrefillSparseArgs& args, Problem* problem,
                         Outputs outputs = Outputs::kRequired);
};

}  // namespace flash_mla::mla_prefill_sparse
