#include "flash_mla/introspect.h"

#include "device/cpu/tile.h"
#include "kv_cache/variants.h"
#include "mha_prefill_dense/backward/variants.h"
#include "mha_prefill_dense/variants.h"
#include "mla_decode_dense/variants.h"
#include "mla_decode_sparse/variants.h"
#include "mla_prefill_sparse/variants.h"
#include "runtime/build_info.h"
#include "runtime/status.h"
#include "runtime/variant.h"
#include "split_kv_combine/variants.h"

namespace flash_mla {

namespace {

struct Entry {
  const char* operator_name;
  const char* name;
  Row row;
};

// Calls visit(entry) for each variant of each operator.
template <class Visit>
void for_each_variant(const Visit& visit) {
  const auto table = [&](const auto& variants) {
    for (const auto* variant : variants.variants) {
      visit(Entry{variants.operator_name, variant->name, variant->row});
    }
  };
  table(mla_decode_dense::kVariants);
  table(mla_decode_sparse::kVariants);
  table(mla_prefill_sparse::kVariants);
  table(mha_prefill_dense::kVariants);
  table(mha_prefill_dense_backward::kVariants);
  table(split_kv_combine::kVariants);
  table(kv_cache::kVariants);
}

Status find(int32_t index, Entry* found) {
  int32_t i = 0;
  for_each_variant([&](const Entry& entry) {
    if (i++ == index) *found = entry;
  });
  if (index >= 0 && index < i) return {};
  return make_status(StatusCode::kInvalidArgument, "variant index must be in [0, %d), got %d", i,
                     index);
}

}  // namespace

inline namespace v0 {

const char* version() { return kVersion; }

int32_t num_variants() {
  int32_t count = 0;
  for_each_variant([&](const Entry&) { ++count; });
  return count;
}

Status variant_info(int32_t index, VariantInfo* info) {
  Entry entry = {};
  FLASH_MLA_RETURN_IF_ERROR(find(index, &entry));
  *info = {entry.operator_name, entry.name, row_name(entry.row)};
  return {};
}

Status variant_runs_on(int32_t index, Device device) {
  Entry entry = {};
  FLASH_MLA_RETURN_IF_ERROR(find(index, &entry));
  return row_runs_on(entry.row, device);
}

const char* cuda_architectures() { return kCudaArchitectures; }

const char* cpu_isa() { return cpu::ops().isa; }

}  // namespace v0
}  // namespace flash_mla
