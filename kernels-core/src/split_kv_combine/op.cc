// merge_attn_states: validate -> select -> launch.
#include "flash_mla/merge_attn_states.h"

#include "runtime/args.h"
#include "runtime/check.h"
#include "split_kv_combine/variants.h"

namespace flash_mla {

namespace split_kv_combine {

Status Problem::validate(const MergeAttnStatesArgs& caller, Problem* problem) {
  MergeAttnStatesArgs args;
  FLASH_MLA_RETURN_IF_ERROR(read_args(kOperator, caller, &args));
  Check check(kOperator);
  Problem p = {};

  check.tensor(args.out_a, "out_a", "[n, h, d]", 3,
               {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  if (!check.ok()) return check.status();
  p.device = args.out_a.device;
  p.n = args.out_a.shape[0];
  p.h = args.out_a.shape[1];
  p.d = args.out_a.shape[2];
  p.dtype = args.out_a.dtype;

  const auto state = [&](const TensorView& out, const char* out_name, const TensorView& lse,
                         const char* lse_name, auto* result) {
    check.tensor(out, out_name, "[n, h, d]", 3, {p.dtype}).aligned_rows(out, out_name);
    check.size(out, out_name, 0, p.n, "n, as out_a").size(out, out_name, 1, p.h, "h, as out_a");
    check.size(out, out_name, 2, p.d, "d, as out_a").same_device(out, out_name, p.device, "out_a");
    check.vector(lse, lse_name, "[n, h]", {DType::kFloat32});
    check.size(lse, lse_name, 0, p.n, "n, as out_a").size(lse, lse_name, 1, p.h, "h, as out_a");
    check.same_device(lse, lse_name, p.device, "out_a");
    *result = {out.data,      out.stride[0], out.stride[1], static_cast<float*>(lse.data),
               lse.stride[0], lse.stride[1]};
  };
  state(args.out_a, "out_a", args.lse_a, "lse_a", &p.a);
  state(args.out_b, "out_b", args.lse_b, "lse_b", &p.b);
  state(args.out, "out", args.lse, "lse", &p.merged);
  check.no_overlap(args.out, "out").no_overlap(args.lse, "lse");
  if (check.ok()) *problem = p;
  return check.status();
}

}  // namespace split_kv_combine

inline namespace v0 {

Status merge_attn_states(const MergeAttnStatesArgs& args, Stream stream) {
  return split_kv_combine::kVariants.run(args, Workspace{}, stream);
}

}  // namespace v0
}  // namespace flash_mla
