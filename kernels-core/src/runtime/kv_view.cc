#include "runtime/kv_view.h"

namespace flash_mla {

namespace {

constexpr std::initializer_list<DType> kCacheDtypes = {
    DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3, DType::kUInt8, DType::kInt8};

DType plain_dtype(KvFormat format) {
  return format == KvFormat::kBf16   ? DType::kBFloat16
         : format == KvFormat::kFp16 ? DType::kFloat16
                                     : DType::kFloat8E4M3;
}

bool holds(const TensorView& cache, KvFormat format) {
  const KvLayout& layout = kv_layout(format);
  const int64_t width = cache.shape[3];
  if (layout.packed()) return dtype_bytes(cache.dtype) == 1 && width == layout.bytes_per_token();
  return cache.dtype == plain_dtype(format) &&
         (width == kLatentDim || width == kLatentDim + kRopeDim);
}

// "bf16 [.., 576 or 512]" for each format.
std::string describe(KvFormat format) {
  const KvLayout& layout = kv_layout(format);
  const std::string name = layout.name;
  return layout.packed()
             ? name + " (1-byte dtype, " + std::to_string(layout.bytes_per_token()) + ")"
             : name + " (" + dtype_name(plain_dtype(format)) + ", 576 or 512)";
}

std::string dtype_and_width(const TensorView& cache) {
  return std::string(dtype_name(cache.dtype)) + ", " + std::to_string(cache.shape[3]);
}

void fill(Check& check, const TensorView& cache, const char* argument, KvFormat format,
          PagedKv* kv) {
  const KvLayout& layout = kv_layout(format);
  const int64_t element_bytes = dtype_bytes(cache.dtype);
  const int64_t page_size = cache.shape[1];
  check.require(page_size > 0, argument, "have a page_size (dimension 1) of at least 1", page_size,
                "allocate the cache with such pages");
  const int64_t h_kv = cache.shape[2];
  check.require(layout.packed() ? h_kv == 1 : h_kv >= 1, argument,
                layout.packed() ? "have 1 key head (dimension 2) in a packed format"
                                : "have at least 1 key head (dimension 2)",
                h_kv, "pass one head: MLA shares one latent among all query heads");
  if (layout.page_scale_bytes > 0) {
    const int64_t page_bytes = page_size * layout.bytes_per_token();
    check.require(
        (page_size == 1 || cache.stride[1] == layout.bytes_per_token()) &&
            (cache.shape[0] <= 1 || cache.stride[0] >= page_bytes),
        argument,
        [&] { return "have dense pages: only the page stride is free in " + describe(format); },
        [&] {
          return "strides " + std::to_string(cache.stride[0]) + ", " +
                 std::to_string(cache.stride[1]);
        },
        "slice the cache by pages only");
    check.require(
        reinterpret_cast<uintptr_t>(cache.data) % 16 == 0 &&
            (cache.shape[0] <= 1 || cache.stride[0] % 16 == 0),
        argument, "have 16-byte aligned pages",
        [&] { return "a page stride of " + std::to_string(cache.stride[0]) + " bytes"; },
        "pad the pages: a multiple of 576 bytes");
  } else {
    check.aligned_rows(cache, argument);
  }
  if (!check.ok()) return;
  *kv = {.data = static_cast<const uint8_t*>(cache.data),
         .format = format,
         .d_qk = layout.packed() ? layout.d_qk : static_cast<int32_t>(cache.shape[3]),
         .h_kv = static_cast<int32_t>(h_kv),
         .num_pages = cache.shape[0],
         .page_size = page_size,
         .page_stride_bytes = cache.stride[0] * element_bytes,
         .token_stride_bytes = cache.stride[1] * element_bytes,
         .head_stride_bytes = cache.stride[2] * element_bytes};
}

constexpr char kCacheDims[] = "[num_pages, page_size, h_kv, d_qk or bytes_per_token]";

}  // namespace

void parse_kv_cache(Check& check, const TensorView& cache, const char* argument, PagedKv* kv) {
  check.tensor(cache, argument, kCacheDims, 4, kCacheDtypes);
  if (!check.ok()) return;
  for (int32_t i = 0; i < kNumKvFormats; ++i) {
    const KvFormat format = static_cast<KvFormat>(i);
    if (holds(cache, format)) return fill(check, cache, argument, format, kv);
  }
  std::string known;
  for (int32_t i = 0; i < kNumKvFormats; ++i) {
    known += (i ? ", " : "") + describe(static_cast<KvFormat>(i));
  }
  check.require(false, argument, "have the dtype and last dimension of a cache format: " + known,
                dtype_and_width(cache), "pack it with kv_cache_pack, or view it as float8_e4m3fn");
}

void parse_kv_cache_as(Check& check, const TensorView& cache, const char* argument, KvFormat format,
                       PagedKv* kv) {
  check.tensor(cache, argument, kCacheDims, 4, kCacheDtypes);
  if (!check.ok()) return;
  check.require(
      holds(cache, format), argument,
      [&] { return "have the dtype and last dimension of format " + describe(format); },
      [&] { return dtype_and_width(cache); }, "allocate it with kv_cache_empty");
  if (check.ok()) fill(check, cache, argument, format, kv);
}

}  // namespace flash_mla
