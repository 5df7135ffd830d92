// The validated problem of mla_decode_sparse, and the parameters its kernels take.
#pragma once

#include "device/decode_io.h"
#include "device/paged_kv.h"
#include "runtime/check.h"

namespace flash_mla {

// From flash_mla/mla_decode_sparse.h, which this header leaves out: it declares a function named as
// the namespace below, and what nvcc writes for the host then does not compile.
inline namespace v0 {
struct MlaDecodeSparseArgs;
}

namespace mla_decode_sparse {

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
struct Params : DecodeIo {
  TokenSet main;
  TokenSet extra;
  const float* attn_sink;  // [h_q], null: none
  int64_t attn_sink_stride;

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

}  // namespace mla_decode_sparse
}  // namespace flash_mla
