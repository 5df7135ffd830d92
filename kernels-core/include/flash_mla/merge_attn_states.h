// Merging attention over two disjoint sets of keys.
#pragma once

#include "flash_mla/types.h"

namespace flash_mla {
inline namespace v0 {

// out = (exp(lse_a) out_a + exp(lse_b) out_b) / (exp(lse_a) + exp(lse_b)),
// lse = ln(exp(lse_a) + exp(lse_b)).
// A part whose lse is +inf or -inf is empty: its out may hold anything. All empty: out 0, lse +inf.
struct MergeAttnStatesArgs {
  uint32_t struct_size = sizeof(MergeAttnStatesArgs);

  TensorView out_a;  // [n, h, d] bf16, fp16 or float32
  TensorView lse_a;  // [n, h] float32, natural log; any strides
  TensorView out_b;
  TensorView lse_b;
  TensorView out;  // as out_a
  TensorView lse;  // [n, h] float32
};

FLASH_MLA_API Status merge_attn_states(const MergeAttnStatesArgs& args, Stream stream);

}  // namespace v0
}  // namespace flash_mla
