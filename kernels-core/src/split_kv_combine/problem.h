// The validated problem of merge_attn_states, and the parameters its kernels take.
#pragma once

#include "device/macros.h"
#include "device/online_softmax.h"
#include "flash_mla/merge_attn_states.h"

namespace flash_mla::split_kv_combine {

inline constexpr char kOperator[] = "merge_attn_states";

// One set of attention results: out [n, h, d] and lse [n, h]. Strides are in elements.
template <class Data, class Lse>
struct AttnState {
  Data* out;
  int64_t out_stride_n, out_stride_h;
  Lse* lse;
  int64_t lse_stride_n, lse_stride_h;
};

// Plain data, passed to kernels by value.
struct Params {
  int64_t n;  // tokens
  int64_t h;  // heads
  int64_t d;  // columns
  DType dtype;
  AttnState<const void, const float> a;
  AttnState<const void, const float> b;
  AttnState<void, float> merged;
};

// A Params that obeys every rule of the contract: only validate() makes one.
class Problem : public Params {
 public:
  Device device;

  bool empty() const { return n * h == 0; }  // there is no result to compute

  static Status validate(const MergeAttnStatesArgs& args, Problem* problem);
};

}  // namespace flash_mla::split_kv_combine
