// mha_prefill_dense: validate -> select -> launch.
#include "flash_mla/mha_prefill_dense.h"

#include "mha_prefill_dense/inputs.h"
#include "mha_prefill_dense/variants.h"
#include "runtime/args.h"

namespace flash_mla {

namespace mha_prefill_dense {

Status Problem::validate(const MhaPrefillDenseArgs& caller, Problem* problem, Outputs outputs) {
  MhaPrefillDenseArgs args;
  FLASH_MLA_RETURN_IF_ERROR(read_args(kOperator, caller, &args));
  Check check(kOperator);
  Problem p = {};

  parse_inputs(check, args, &p);
  if (!check.ok()) return check.status();
  p.device = args.q.device;

  if (outputs == Outputs::kRequired) {
    p.out = parse_rows(check, args.out, "out", "[t_q, h_q, d_v]", args.q, args.q.shape[0], p.h_q,
                       p.d_v);
    check.no_overlap(args.out, "out");
    p.lse = parse_lse(check, args.lse, args.q);
    check.no_overlap(args.lse, "lse");
    check_sequences(check, p.device, &p);
  }
  if (check.ok()) *problem = p;
  return check.status();
}

}  // namespace mha_prefill_dense

inline namespace v0 {

Status mha_prefill_dense(const MhaPrefillDenseArgs& args, Stream stream) {
  return mha_prefill_dense::kVariants.run(args, args.workspace, stream);
}

Status mha_prefill_dense_workspace(const MhaPrefillDenseArgs& args, WorkspaceSize* size) {
  return mha_prefill_dense::kVariants.workspace(args, size);
}

}  // namespace v0
}  // namespace flash_mla
