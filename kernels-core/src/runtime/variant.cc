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

namespace {

bool runs_on(Row row, const DeviceCaps& caps) {
  const int cc = caps.compute_capability;
  switch (row) {
    case Row::kCpu: return cc == 0;
    case Row::kPortable: return cc >= 80;
    case Row::kSm90: return cc == 90;        // sm_90a: no other chip runs it
    case Row::kSm100: return cc / 10 == 10;  // sm_100f: the family 10.x
  }
  return false;
}

}  // namespace

Status row_runs_on(Row row, Device device) {
  if ((row == Row::kCpu) != (device.type == DeviceType::kCpu)) {
    return make_status(StatusCode::kUnsupported, "serves %s tensors only",
                       row == Row::kCpu ? "host" : "CUDA");
  }
  const DeviceCaps* caps = nullptr;
  FLASH_MLA_RETURN_IF_ERROR(device_caps(device, &caps));
  if (runs_on(row, *caps)) return {};
  const int cc = caps->compute_capability;
  return make_status(StatusCode::kUnsupported, "needs compute capability %s, the device has %d.%d",
                     row == Row::kPortable ? "8.0 or later"
                     : row == Row::kSm90   ? "9.0"
                                           : "10.x",
                     cc / 10, cc % 10);
}

namespace detail {

namespace {

// A forced name may be a row's: all of its variants then stay in the running.
bool may_run(const char* forced, const Candidate& candidate) {
  return forced == nullptr || std::strcmp(forced, candidate.name) == 0 ||
         std::strcmp(forced, row_name(candidate.row)) == 0;
}

// Why a candidate that does not serve the call does not.
std::string refusal_of(const Candidate& candidate, Device device, const char* forced) {
  if (!may_run(forced, candidate)) return std::string("FLASH_MLA_KERNEL=") + forced;
  if (Status status = row_runs_on(candidate.row, device); !status.ok()) return status.message;
  if (candidate.refusal != nullptr) return candidate.refusal;
  return "an earlier variant is preferred";
}

}  // namespace

Status select(const char* operator_name, Device device, const Candidate* candidates, int count,
              bool log, int* chosen) {
  const char* forced = std::getenv("FLASH_MLA_KERNEL");
  if (forced != nullptr && *forced == '\0') forced = nullptr;
  int found = 0;
  const DeviceCaps* caps = nullptr;
  if (!device_caps(device, &caps).ok()) found = count;
  const auto serves = [&](const Candidate& candidate) {
    return candidate.refusal == nullptr && may_run(forced, candidate) &&
           runs_on(candidate.row, *caps);
  };
  while (found < count && !serves(candidates[found])) ++found;
  if (found < count) *chosen = found;
  // Texts are made only when somebody reads them: this is on the path of every call.
  log = log && log_enabled("select");
  if (found < count && !log) return {};
  std::string refusals;
  for (int i = 0; i < count; ++i) {
    if (i == found) continue;
    refusals += std::string(refusals.empty() ? "" : "; ") + candidates[i].name + ": " +
                refusal_of(candidates[i], device, forced);
  }
  if (log) {
    log_line("%s -> %s%s%s", operator_name, found == count ? "none" : candidates[found].name,
             refusals.empty() ? "" : "; ", refusals.c_str());
  }
  if (found < count) return {};
  return make_status(StatusCode::kUnsupported,
                     "%s: no kernel of this build serves the call (%s); `python -m flash_mla` "
                     "lists what serves what",
                     operator_name, refusals.c_str());
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
