#include "runtime/variant.h"

#include <cstdlib>
#include <cstring>

#include "support.h"

using namespace flash_mla;

namespace {

constexpr Device kCpu = {DeviceType::kCpu, 0};

int chosen(const detail::Candidate* candidates, int count, Status* status) {
  int index = -1;
  *status = detail::select("op", kCpu, candidates, count, /*log=*/false, &index);
  return index;
}

}  // namespace

TEST(the_first_variant_that_serves_is_chosen) {
  const detail::Candidate candidates[] = {{"sm90_bf16", Row::kSm90, nullptr},
                                          {"cpu_a", Row::kCpu, "serves another dtype"},
                                          {"cpu_b", Row::kCpu, nullptr},
                                          {"cpu_c", Row::kCpu, nullptr}};
  Status status;
  EXPECT(chosen(candidates, 4, &status) == 2);
  EXPECT(status.ok());
}

TEST(a_refusal_tells_each_variants_reason) {
  const detail::Candidate candidates[] = {{"sm90_bf16", Row::kSm90, nullptr},
                                          {"cpu", Row::kCpu, "serves another dtype"}};
  Status status;
  chosen(candidates, 2, &status);
  EXPECT(status.code == StatusCode::kUnsupported);
  EXPECT(std::strstr(status.message, "sm90_bf16: serves CUDA tensors only") != nullptr);
  EXPECT(std::strstr(status.message, "cpu: serves another dtype") != nullptr);
}

TEST(a_forced_variant_is_the_only_one) {
  const detail::Candidate candidates[] = {{"cpu_a", Row::kCpu, nullptr},
                                          {"cpu_b", Row::kCpu, nullptr}};
  Status status;
  setenv("FLASH_MLA_KERNEL", "cpu_b", 1);
  EXPECT(chosen(candidates, 2, &status) == 1);
  setenv("FLASH_MLA_KERNEL", "cpu_z", 1);
  chosen(candidates, 2, &status);
  EXPECT(status.code == StatusCode::kUnsupported);
  EXPECT(std::strstr(status.message, "FLASH_MLA_KERNEL=cpu_z") != nullptr);
  setenv("FLASH_MLA_KERNEL", "cpu", 1);  // a row
  EXPECT(chosen(candidates, 2, &status) == 0);
  setenv("FLASH_MLA_KERNEL", "", 1);
  EXPECT(chosen(candidates, 2, &status) == 0);
  unsetenv("FLASH_MLA_KERNEL");
}

TEST(a_workspace_that_is_too_small_is_refused) {
  char scratch[8];
  EXPECT(detail::check_workspace("op", {8, 0}, {scratch, 8, nullptr, 0}).ok());
  EXPECT(!detail::check_workspace("op", {9, 0}, {scratch, 8, nullptr, 0}).ok());
  EXPECT(!detail::check_workspace("op", {0, 4}, {scratch, 8, nullptr, 0}).ok());
  EXPECT(detail::check_workspace("op", {0, 0}, {}).ok());
}

TEST(every_variant_of_the_library_has_an_operator_and_a_row) {
  EXPECT(num_variants() > 0);
  for (int32_t i = 0; i < num_variants(); ++i) {
    VariantInfo info;
    EXPECT(variant_info(i, &info).ok());
    EXPECT(std::strncmp(info.name, info.row, std::strlen(info.row)) == 0);
    EXPECT(variant_runs_on(i, kCpu).ok() == (std::strcmp(info.row, "cpu") == 0));
  }
  VariantInfo info;
  EXPECT(!variant_info(num_variants(), &info).ok());
}

TEST_MAIN()
