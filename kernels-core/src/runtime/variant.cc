#include "runtime/variant.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include "runtime/device_caps.h"
#include "runtime/log.h"
#include "runtime/status.h"

namespace flash_mla {

const char* row_name(Row row) {
  switch (row) {
    case Row::kCpu: return "cpu";
    case Row::kPortable: return "portable";
    case Row::kSm90: return "sm90";
    case Row::kSm100: return "sm100";
  }
  return "?";
}

Status row_runs_on(Row row, Device device) {
  if (row == Row::kCpu) {
    if (device.type == DeviceType::kCpu) return {};
    return make_status(StatusCode::kUnsupported, "serves host tensors only");
  }
  if (device.type == DeviceType::kCpu) {
    return make_status(StatusCode::kUnsupported, "serves CUDA tensors only");
  }
  const DeviceCaps* caps = nullptr;
  FLASH_MLA_RETURN_IF_ERROR(device_caps(device, &caps));
  const int cc = caps->compute_capability;
  const bool runs = row == Row::kPortable ? cc >= 80
                    : row == Row::kSm90   ? cc == 90        // sm_90a: no other chip runs it
                                          : cc / 10 == 10;  // sm_100f: the family 10.x
  if (runs) return {};
  return make_status(StatusCode::kUnsupported, "needs compute capability %s, the device has %d.%d",
                     row == Row::kPortable ? "8.0 or later"
                     : row == Row::kSm90   ? "9.0"
                                           : "10.x",
                     cc / 10, cc % 10);
}

namespace detail {

Status select(const char* operator_name, Device device, const Candidate* candidates, int count,
              bool log, int* chosen) {
  const char* forced = std::getenv("FLASH_MLA_KERNEL");
  if (forced != nullptr && *forced == '\0') forced = nullptr;
  log = log && log_enabled("select");
  std::string refusals;
  int found = -1;
  for (int i = 0; i < count && (found < 0 || log); ++i) {
    const Candidate& candidate = candidates[i];
    std::string refusal;
    // A forced name may be a row's: all of its variants then stay in the running.
    if (forced != nullptr && std::strcmp(forced, candidate.name) != 0 &&
        std::strcmp(forced, row_name(candidate.row)) != 0) {
      refusal = std::string("FLASH_MLA_KERNEL=") + forced;
    } else if (Status status = row_runs_on(candidate.row, device); !status.ok()) {
      refusal = status.message;
    } else if (candidate.refusal != nullptr) {
      refusal = candidate.refusal;
    } else if (found >= 0) {
      refusal = "an earlier variant is preferred";
    }
    if (refusal.empty()) {
      found = i;
    } else {
      refusals += std::string(refusals.empty() ? "" : "; ") + candidate.name + ": " + refusal;
    }
  }
  if (log) {
    log_line("%s -> %s%s%s", operator_name, found < 0 ? "none" : candidates[found].name,
             refusals.empty() ? "" : "; ", refusals.c_str());
  }
  if (found < 0) {
    return make_status(StatusCode::kUnsupported,
                       "%s: no kernel of this build serves the call (%s); `python -m flash_mla` "
                       "lists what serves what",
                       operator_name, refusals.c_str());
  }
  *chosen = found;
  return {};
}

Status check_workspace(const char* operator_name, const WorkspaceSize& needed,
                       const Workspace& given) {
  const bool scratch_fits =
      needed.scratch_bytes == 0 ||
      (given.scratch != nullptr && given.scratch_bytes >= needed.scratch_bytes);
  const bool sync_fits =
      needed.sync_bytes == 0 || (given.sync != nullptr && given.sync_bytes >= needed.sync_bytes);
  if (scratch_fits && sync_fits) return {};
  return make_status(StatusCode::kInvalidArgument,
                     "%s: workspace must hold %lld scratch and %lld sync bytes, got %lld and %lld; "
                     "ask %s_workspace for the same arguments",
                     operator_name, static_cast<long long>(needed.scratch_bytes),
                     static_cast<long long>(needed.sync_bytes),
                     static_cast<long long>(given.scratch_bytes),
                     static_cast<long long>(given.sync_bytes), operator_name);
}

}  // namespace detail
}  // namespace flash_mla
