// The validated problem of mla_decode_sparse, and the parameters its kernels take.
#pragma once

#include "device/paged_kv.h"
#include "flash_mla/mla_decode_sparse.h"
#include "runtime/check.h"

namespace flash_mla::mla_decode_sparse {

inline constexpr char kOperator[] = "mla_decode_sparse";

// A cache and the tokens of it that each query attends.
struct TokenSet {
  PagedKv kv;
  const int32_t* indices;  // [b, s_q, topk]: page * page_size + offset
  int64_t topk;            // 0: the set is absent
  int64_t indices_stride_b, indices_stride_s, indices_stride_k;
  const int32_t* topk_length;  // [b], null: topk
  int64_t topk_length_stride;
};

// Plain data, passed to kernels by value. Strides are in elements of their tensor.
struct Params {
  int64_t b;    // requests
  int64_t s_q;  // query tokens of each request
  int64_t h_q;  // query heads, all on one key head
  int32_t d_qk;

  const void* q;  // [b, s_q, h_q, d_qk]
  int64_t q_stride_b, q_stride_s, q_stride_h;
  TokenSet main;
  TokenSet extra;
  const float* attn_sink;  // [h_q], null: none
  int64_t attn_sink_stride;
  DType dtype;  // of q and out
  void* out;    // [b, s_q, h_q, 512]
  int64_t out_stride_b, out_stride_s, out_stride_h;
  float* lse;  // [b, h_q, s_q]
  int64_t lse_stride_b, lse_stride_h, lse_stride_s;

  float softmax_scale;
  bool batch_invariant;
};

// A Params that obeys every rule of the contract: only validate() makes one.
class Problem : public Params {
 public:
  Device device;

  bool empty() const { return b * s_q * h_q == 0; }  // there is no result to compute

  static Status validate(const MlaDecodeSparseArgs& args, Problem* problem,
                         Outputs outputs = Outputs::kRequired);
};

}  // namespace flash_mla::mla_decode_sparse
