// mla_decode_sparse, row sm90: what the kernel serves, its grid and workspace.
#pragma once

#include "mla_decode_sparse/sm90/kernel.cuh"

namespace flash_mla::mla_decode_sparse::sm90 {

inline constexpr Row kRow = Row::kSm90;

template <class Cfg>
const char* supports(const Problem& p) {
  if (p.main.kv.format != Cfg::v.kv) return "serves another cache format";
  if (p.d_qk != Cfg::v.d_qk) return "serves another d_qk";
  if (Cfg::v.tile_m < Config<Cfg>::kMostRows && p.h_q > Cfg::v.tile_m) {
    return "serves fewer query heads";
  }
  return nullptr;
}

template <class Cfg>
DecodeGrid grid_of(const Problem& p) {
  const DeviceCaps* caps = nullptr;
  const Status status = device_caps(p.device, &caps);  // selection has asked before
  return make_grid(p, Cfg::v.tile_m, kMaxTeam, status.ok() ? caps->num_sms : 1);
}

template <class Cfg>
WorkspaceSize workspace(const Problem& p) {
  return decode_workspace(grid_of<Cfg>(p));
}

template <class Cfg>
Status launch(const Problem& p, const Workspace& workspace, Stream stream) {
  DeviceGuard guard(p.device);
  FLASH_MLA_RETURN_IF_ERROR(guard.status());
  const GpuParams params = gpu_params(p, grid_of<Cfg>(p), workspace);
  FLASH_MLA_RETURN_IF_ERROR(launch_list_fixed_parts<Op, /*kProgrammatic=*/true>(params, stream));
  static_assert(sizeof(SharedStorage<Cfg>) <= flash_mla::sm90::kMaxSmemBytes);
  const LaunchShape shape = {.grid = dim3(params.grid.num_ctas()),
                             .block = dim3(kThreads),
                             .smem_bytes = sizeof(SharedStorage<Cfg>),
                             .programmatic = true};
  FLASH_MLA_RETURN_IF_ERROR(launch_kernel(kernel<Cfg>, shape, stream, kOperator, params));
  return launch_merge_fixed_splits<Op, DType::kBFloat16, PartColumns::kInOrder,
                                   /*kProgrammatic=*/true>(params, stream);
}

}  // namespace flash_mla::mla_decode_sparse::sm90
