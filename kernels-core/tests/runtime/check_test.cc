#include "runtime/check.h"

#include <cstring>

#include "flash_mla/mla_decode_dense.h"
#include "runtime/args.h"
#include "support.h"

using namespace flash_mla;

namespace {

TensorView matrix(int64_t rows, int64_t columns, int64_t row_stride) {
  alignas(16) static float data[1];
  TensorView view;
  view.data = data;
  view.dtype = DType::kFloat32;
  view.rank = 2;
  view.shape[0] = rows;
  view.shape[1] = columns;
  view.stride[0] = row_stride;
  view.stride[1] = 1;
  return view;
}

}  // namespace

TEST(the_first_broken_rule_is_kept) {
  Check check("op");
  check.tensor(matrix(2, 4, 4), "good", "[a, b]", 2, {DType::kFloat32});
  EXPECT(check.ok());
  check.size(matrix(2, 4, 4), "first", 0, 3, "a").size(matrix(2, 4, 4), "second", 0, 4, "a");
  EXPECT(!check.ok());
  EXPECT(check.status().code == StatusCode::kInvalidArgument);
  EXPECT(std::strstr(check.status().message, "op: first must have 3 (a)") != nullptr);
}

TEST(overlapping_outputs_are_found) {
  const auto overlaps = [](const TensorView& view) {
    Check check("op");
    check.no_overlap(view, "out");
    return !check.ok();
  };
  EXPECT(!overlaps(matrix(2, 4, 4)));
  EXPECT(!overlaps(matrix(2, 4, 7)));
  EXPECT(overlaps(matrix(2, 4, 3)));
  EXPECT(overlaps(matrix(2, 4, 0)));
  EXPECT(!overlaps(matrix(1, 4, 0)));
  TensorView transposed = matrix(4, 2, 1);
  transposed.stride[1] = 4;
  EXPECT(!overlaps(transposed));
}

TEST(rows_must_be_aligned) {
  Check odd("op");
  odd.aligned_rows(matrix(2, 4, 5), "x");
  EXPECT(!odd.ok());
  Check single("op");
  single.aligned_rows(matrix(1, 4, 5), "x");
  EXPECT(single.ok());
}

TEST(args_of_an_older_caller_keep_the_new_fields_defaults) {
  MlaDecodeDenseArgs caller;
  caller.softmax_scale = 2.0f;
  caller.causal = true;
  caller.struct_size = offsetof(MlaDecodeDenseArgs, causal);  // a version without `causal`
  MlaDecodeDenseArgs args;
  EXPECT(read_args("op", caller, &args).ok());
  EXPECT(args.softmax_scale == 2.0f);
  EXPECT(!args.causal);
}

TEST(args_of_a_newer_caller_are_refused) {
  MlaDecodeDenseArgs caller;
  caller.struct_size += 8;
  MlaDecodeDenseArgs args;
  EXPECT(read_args("op", caller, &args).code == StatusCode::kInvalidArgument);
}

TEST_MAIN()
