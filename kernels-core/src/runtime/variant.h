// The variant table: which kernels an operator has, and which one serves a problem.
//
// flash_mla_variants() (cmake/variants.cmake) writes the table of each operator at configure time:
// an array of pointers to `Variant<Problem>`, in order of preference.
#pragma once

#include "flash_mla/introspect.h"
#include "flash_mla/kv_cache.h"
#include "flash_mla/types.h"
#include "runtime/check.h"
#include "runtime/status.h"

namespace flash_mla {

enum class Row : int32_t { kCpu, kPortable, kSm90, kSm100 };

const char* row_name(Row row);
// Ok when kernels of this row run on the device; otherwise why not.
Status row_runs_on(Row row, Device device);

// The compile-time choices of a kernel: the axes that flash_mla_variants() takes. An axis that an
// operator does not have keeps its default.
struct VariantSpec {
  KvFormat kv = KvFormat::kBf16;
  DType q = DType::kBFloat16;
  int d_qk = 576;
  int tile_m = 64;
};

// `supports`: null when the variant serves the problem, else the reason why not.
// `workspace` and `launch` are only called with a problem that it supports.
template <class Problem>
struct Variant {
  const char* name;
  Row row;
  const char* (*supports)(const Problem&);
  WorkspaceSize (*workspace)(const Problem&);
  Status (*launch)(const Problem&, const Workspace&, Stream);
};

template <class Problem>
const char* supports_all(const Problem&) {
  return nullptr;
}

template <class Problem>
WorkspaceSize no_workspace(const Problem&) {
  return {};
}

namespace detail {

// The selection itself, free of the Problem's type.
struct Candidate {
  const char* name;
  Row row;
  const char* refusal;  // the variant's own reason, null when it serves the problem
};
Status select(const char* operator_name, Device device, const Candidate* candidates, int count,
              bool log, int* chosen);
Status check_workspace(const char* operator_name, const WorkspaceSize& needed,
                       const Workspace& given);

}  // namespace detail

// A table of one operator's variants.
template <class Problem, int kCount>
struct VariantTable {
  const char* operator_name;
  const Variant<Problem>* variants[kCount];

  // `log`: FLASH_MLA_LOG=select prints this choice; one of a call's two choices is enough.
  Status select(const Problem& problem, bool log, const Variant<Problem>** chosen) const {
    detail::Candidate candidates[kCount];
    for (int i = 0; i < kCount; ++i) {
      candidates[i] = {variants[i]->name, variants[i]->row, variants[i]->supports(problem)};
    }
    int index = 0;
    Status status = detail::select(operator_name, problem.device, candidates, kCount, log, &index);
    if (status.ok()) *chosen = variants[index];
    return status;
  }

  // An operator: validate -> select -> check the workspace -> launch.
  template <class Args>
  Status run(const Args& args, const Workspace& workspace, Stream stream) const {
    Problem problem;
    FLASH_MLA_RETURN_IF_ERROR(Problem::validate(args, &problem));
    if (problem.empty()) return {};
    const Variant<Problem>* variant = nullptr;
    FLASH_MLA_RETURN_IF_ERROR(select(problem, /*log=*/true, &variant));
    FLASH_MLA_RETURN_IF_ERROR(
        detail::check_workspace(operator_name, variant->workspace(problem), workspace));
    return variant->launch(problem, workspace, stream);
  }

  // An operator's _workspace function: outputs need not be there yet.
  template <class Args>
  Status workspace(const Args& args, WorkspaceSize* size) const {
    *size = {};
    Problem problem;
    FLASH_MLA_RETURN_IF_ERROR(Problem::validate(args, &problem, Outputs::kAbsent));
    if (problem.empty()) return {};
    const Variant<Problem>* variant = nullptr;
    FLASH_MLA_RETURN_IF_ERROR(select(problem, /*log=*/false, &variant));
    *size = variant->workspace(problem);
    return {};
  }
};

}  // namespace flash_mla
