// The validated problem of mla_decode_dense, and the parameters its kernels take.
#pragma once

#include "device/decode_io.h"
#include "device/paged_kv.h"
#include "runtime/check.h"

namespace flash_mla {

// From flash_mla/mla_decode_dense.h, which this header leaves out: it declares a function named as
// the namespace below, and what nvcc writes for the host then does not compile.
inline namespace v0 {
struct MlaDecodeDenseArgs;
}

namespace mla_decode_dense {

inline constexpr char kOperator[] = "mla_decode_dense";

// Plain data, passed to kernels by value. Strides are in elements of their tensor.
struct Params : DecodeIo {
  PagedKv kv;  // h_kv key heads, each shared by h_q / h_kv query heads

  const int32_t* block_table;  // [b, max_pages]
  int64_t max_pages;
  int64_t block_table_stride_b, block_table_stride_p;
  const int32_t* cache_seqlens;  // [b]
  int64_t cache_seqlens_stride;
  const float* descale_q;  // null: 1
  const float* descale_k;
  int64_t descale_q_stride, descale_k_stride;  // 0: one value for all requests

  float softmax_scale;
  bool causal;
  bool batch_invariant;
};

// A Params that obeys every rule of the contract: only validate() makes one.
class Problem : public Params {
 public:
  Device device;

  bool empty() const { return b * s_q == 0; }  // there is no result to compute

  static Status validate(const MlaDecodeDenseArgs& args, Problem* problem,
                         Outputs outputs = Outputs::kRequired);
};

}  // namespace mla_decode_dense
}  // namespace flash_mla
