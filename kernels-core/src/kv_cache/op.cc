// kv_cache_append and kv_cache_gather: validate -> select -> launch.
#include "flash_mla/kv_cache.h"

#include "kv_cache/variants.h"
#include "runtime/args.h"
#include "runtime/check.h"
#include "runtime/kv_view.h"

namespace flash_mla {

namespace kv_cache {

namespace {

// Both directions have the same arguments; what is written must not overlap itself.
template <class Args>
Status validate_args(const char* operator_name, const Args& caller, Direction direction,
                     Problem* problem) {
  Args args;
  FLASH_MLA_RETURN_IF_ERROR(read_args(operator_name, caller, &args));
  Check check(operator_name);
  Problem p = {};
  p.direction = direction;

  const auto format = static_cast<int32_t>(args.format);
  check.require(format >= 0 && format < kNumKvFormats, "format", "be one of the KvFormat values",
                std::to_string(format), "use one of them: kv_cache.h");
  if (!check.ok()) return check.status();
  parse_kv_cache_as(check, args.cache, "cache", args.format, &p.cache);
  if (!check.ok()) return check.status();
  p.device = args.cache.device;

  check.tensor(args.kv, "kv", "[num_tokens, h_kv, d_qk]", 3,
               {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  check.size(args.kv, "kv", 1, p.cache.h_kv, "h_kv, as cache");
  check.size(args.kv, "kv", 2, p.cache.d_qk, "d_qk of the cache's format");
  check.aligned_rows(args.kv, "kv").same_device(args.kv, "kv", p.device, "cache");
  p.num_tokens = args.kv.shape[0];
  p.kv = args.kv.data;
  p.kv_dtype = args.kv.dtype;
  p.kv_stride_t = args.kv.stride[0];
  p.kv_stride_h = args.kv.stride[1];
  direction == Direction::kAppend ? check.no_overlap(args.cache, "cache")
                                  : check.no_overlap(args.kv, "kv");

  check.vector(args.slot_mapping, "slot_mapping", "[num_tokens]", {DType::kInt64, DType::kInt32});
  check.size(args.slot_mapping, "slot_mapping", 0, p.num_tokens, "num_tokens, as kv");
  check.same_device(args.slot_mapping, "slot_mapping", p.device, "cache");
  p.slot_mapping = args.slot_mapping.data;
  p.slots_are_int64 = args.slot_mapping.dtype == DType::kInt64;
  p.slot_stride = args.slot_mapping.stride[0];

  if (args.scale.defined()) {
    check.vector(args.scale, "scale", "[1]", {DType::kFloat32});
    check.size(args.scale, "scale", 0, 1, "one scale for the whole cache");
    check.same_device(args.scale, "scale", p.device, "cache");
    check.require(args.format == KvFormat::kFp8, "scale", "come with format fp8",
                  kv_layout(args.format).name,
                  "leave it out: other formats have none, or their own");
    p.scale = static_cast<const float*>(args.scale.data);
  }
  if (check.ok()) *problem = p;
  return check.status();
}

}  // namespace

Status Problem::validate(const KvCacheAppendArgs& args, Problem* problem) {
  return validate_args("kv_cache_append", args, Direction::kAppend, problem);
}

Status Problem::validate(const KvCacheGatherArgs& args, Problem* problem) {
  return validate_args("kv_cache_gather", args, Direction::kGather, problem);
}

}  // namespace kv_cache

inline namespace v0 {

Status kv_format_info(KvFormat format, KvFormatInfo* info) {
  const auto index = static_cast<int32_t>(format);
  if (index < 0 || index >= kNumKvFormats) {
    return make_status(StatusCode::kInvalidArgument,
                       "kv_format_info: format must be one of the KvFormat values, got %d; see "
                       "kv_cache.h",
                       index);
  }
  const KvLayout& layout = kv_layout(format);
  *info = {layout.name,       layout.d_qk,
           layout.d_nope,     layout.bytes_per_token(),
           layout.scale_tile, layout.page_align_bytes};
  return {};
}

Status kv_format_of(const TensorView& cache, KvFormat* format) {
  Check check("kv_format_of");
  PagedKv kv;
  parse_kv_cache(check, cache, "cache", &kv);
  if (check.ok()) *format = kv.format;
  return check.status();
}

Status kv_cache_append(const KvCacheAppendArgs& args, Stream stream) {
  return kv_cache::kVariants.run(args, Workspace{}, stream);
}

Status kv_cache_gather(const KvCacheGatherArgs& args, Stream stream) {
  return kv_cache::kVariants.run(args, Workspace{}, stream);
}

}  // namespace v0
}  // namespace flash_mla
