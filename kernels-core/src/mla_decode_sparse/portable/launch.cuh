// mla_decode_sparse, row portable: what its variants serve, and their launch.
#pragma once

#include "device/portable/launch.cuh"
#include "mla_decode_sparse/gpu.cuh"
#include "mla_decode_sparse/portable/kernel.cuh"
#include "runtime/variant.h"

namespace flash_mla::mla_decode_sparse::portable {

inline constexpr Row kRow = Row::kPortable;

// The extra cache has a format that goes with the main one's: a rule of the operator.
template <class Cfg>
const char* supports(const Problem& p) {
  constexpr VariantSpec v = Cfg::v;
  if (p.main.kv.format != v.kv) return "serves another cache format";
  if (p.q_dtype != v.q) return "serves another dtype of q";
  if (p.d_qk != v.d_qk) return "serves another d_qk";
  return flash_mla::portable::refuses<Decode<Cfg>>(p.h_q, p.device);
}

// The same for workspace() and launch().
template <class Cfg>
DecodeGrid grid(const Problem& p) {
  return make_grid(p, Cfg::v.tile_m, /*max_team=*/1,
                   flash_mla::portable::resident_ctas<Decode<Cfg>>(p.device));
}

template <class Cfg>
WorkspaceSize workspace(const Problem& p) {
  return decode_workspace(grid<Cfg>(p));
}

template <class Cfg>
Status launch(const Problem& p, const Workspace& workspace, Stream stream) {
  DeviceGuard guard(p.device);
  FLASH_MLA_RETURN_IF_ERROR(guard.status());
  return flash_mla::portable::launch_decode<Decode<Cfg>>(gpu_params(p, grid<Cfg>(p), workspace),
                                                         stream);
}

}  // namespace flash_mla::mla_decode_sparse::portable
