#include "introspect.h"

#include "flash_mla/introspect.h"

namespace flash_mla_torch {

flash_mla::KvFormat format_of(const char* operator_name, const std::string& name) {
  std::string known;
  for (int32_t i = 0; i < flash_mla::kNumKvFormats; ++i) {
    flash_mla::KvFormatInfo info;
    throw_if_error(flash_mla::kv_format_info(static_cast<flash_mla::KvFormat>(i), &info));
    if (name == info.name) return static_cast<flash_mla::KvFormat>(i);
    known += std::string(i ? ", " : "") + info.name;
  }
  throw_value_error(std::string(operator_name) + ": format must be one of " + known + ", got '" +
                    name + "'; use one of them, or leave it out: the cache tells");
}

std::string kv_cache_format(const Tensor& cache) {
  flash_mla::KvFormat format;
  flash_mla::KvFormatInfo info;
  throw_if_error(flash_mla::kv_format_of(view(cache), &format));
  throw_if_error(flash_mla::kv_format_info(format, &info));
  return info.name;
}

std::vector<std::string> build_info() {
  std::vector<std::string> lines = {
      std::string("version=") + flash_mla::version(),
      std::string("cuda_architectures=") + flash_mla::cuda_architectures(),
      std::string("cpu_isa=") + flash_mla::cpu_isa(),
  };
  for (int32_t i = 0; i < flash_mla::kNumKvFormats; ++i) {
    flash_mla::KvFormatInfo info;
    throw_if_error(flash_mla::kv_format_info(static_cast<flash_mla::KvFormat>(i), &info));
    lines.push_back(std::string("kv_format=") + info.name + "," + std::to_string(info.d_qk) + "," +
                    std::to_string(info.d_nope) + "," + std::to_string(info.bytes_per_token) + "," +
                    std::to_string(info.scale_tile) + "," + std::to_string(info.page_align_bytes));
  }
  return lines;
}

std::vector<std::string> variants(bool cuda, int64_t index) {
  const flash_mla::Device device = {
      cuda ? flash_mla::DeviceType::kCuda : flash_mla::DeviceType::kCpu,
      static_cast<int32_t>(index)};
  std::vector<std::string> lines;
  for (int32_t i = 0; i < flash_mla::num_variants(); ++i) {
    flash_mla::VariantInfo info;
    throw_if_error(flash_mla::variant_info(i, &info));
    const flash_mla::Status status = flash_mla::variant_runs_on(i, device);
    lines.push_back(std::string(info.operator_name) + "," + info.name + "," + info.row + "," +
                    status.message);
  }
  return lines;
}

}  // namespace flash_mla_torch
