// Parsing what the forward and the backward pass take alike.
#pragma once

#include "mha_prefill_dense/problem.h"
#include "runtime/check.h"

namespace flash_mla::mha_prefill_dense {

// q, k, v, cu_seqlens, max_seqlen, softmax_scale and causal. The values of cu_seqlens are not read.
void parse_inputs(Check& check, const MhaPrefillDenseArgs& args, Params* p);

// A tensor [t, h, d] that must have the shape given and the dtype and device of q.
TokenRows parse_rows(Check& check, const TensorView& view, const char* argument, const char* dims,
                     const TensorView& q, int64_t tokens, int64_t heads, int64_t width);
// lse: [t_q, h_q] float32.
TokenValues parse_lse(Check& check, const TensorView& view, const TensorView& q);

// For host tensors, whose cu_seqlens can be read: the offsets start with 0, never fall and end with
// the number of tokens, and max_seqlen is at least the longest sequence.
void check_sequences(Check& check, Device device, Params* p);

}  // namespace flash_mla::mha_prefill_dense
