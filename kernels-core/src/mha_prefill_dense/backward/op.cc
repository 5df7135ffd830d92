// mha_prefill_dense_backward: validate -> select -> launch.
#include "flash_mla/mha_prefill_dense.h"
#include "mha_prefill_dense/backward/variants.h"
#include "mha_prefill_dense/inputs.h"
#include "runtime/args.h"

namespace flash_mla {

namespace mha_prefill_dense_backward {

using mha_prefill_dense::check_sequences;
using mha_prefill_dense::parse_inputs;
using mha_prefill_dense::parse_lse;
using mha_prefill_dense::parse_rows;

namespace {

// The forward call whose gradients are asked for.
MhaPrefillDenseArgs forward_args(const MhaPrefillDenseBackwardArgs& args) {
  MhaPrefillDenseArgs forward;
  forward.q = args.q;
  forward.k = args.k;
  forward.v = args.v;
  forward.cu_seqlens_q = args.cu_seqlens_q;
  forward.cu_seqlens_kv = args.cu_seqlens_kv;
  forward.max_seqlen_q = args.max_seqlen_q;
  forward.max_seqlen_kv = args.max_seqlen_kv;
  forward.softmax_scale = args.softmax_scale;
  forward.causal = args.causal;
  return forward;
}

}  // namespace

Status Problem::validate(const MhaPrefillDenseBackwardArgs& caller, Problem* problem,
                         Outputs outputs) {
  MhaPrefillDenseBackwardArgs args;
  FLASH_MLA_RETURN_IF_ERROR(read_args(kOperator, caller, &args));
  Check check(kOperator);
  Problem p = {};

  parse_inputs(check, forward_args(args), &p);
  if (!check.ok()) return check.status();
  p.device = args.q.device;
  p.deterministic = args.deterministic;
  const int64_t t_q = p.seqlens_q.tokens;
  const int64_t t_k = p.seqlens_kv.tokens;
  p.out = parse_rows(check, args.out, "out", "[t_q, h_q, d_v]", args.q, t_q, p.h_q, p.d_v);
  p.lse = parse_lse(check, args.lse, args.q);
  p.grad_out = parse_rows(check, args.d_out, "d_out", "[t_q, h_q, d_v]", args.q, t_q, p.h_q, p.d_v);

  if (outputs == Outputs::kRequired) {
    p.grad_q = parse_rows(check, args.d_q, "d_q", "[t_q, h_q, d_qk]", args.q, t_q, p.h_q, p.d_qk);
    p.grad_k = parse_rows(check, args.d_k, "d_k", "[t_k, h_kv, d_qk]", args.q, t_k, p.h_kv, p.d_qk);
    p.grad_v = parse_rows(check, args.d_v, "d_v", "[t_k, h_kv, d_v]", args.q, t_k, p.h_kv, p.d_v);
    check.no_overlap(args.d_q, "d_q").no_overlap(args.d_k, "d_k").no_overlap(args.d_v, "d_v");
    check_sequences(check, p.device, &p);
  }
  if (check.ok()) *problem = p;
  return check.status();
}

}  // namespace mha_prefill_dense_backward

inline namespace v0 {

Status mha_prefill_dense_backward(const MhaPrefillDenseBackwardArgs& args, Stream stream) {
  return mha_prefill_dense_backward::kVariants.run(args, args.workspace, stream);
}

Status mha_prefill_dense_backward_workspace(const MhaPrefillDenseBackwardArgs& args,
                                            WorkspaceSize* size) {
  return mha_prefill_dense_backward::kVariants.workspace(args, size);
}

}  // namespace v0
}  // namespace flash_mla
