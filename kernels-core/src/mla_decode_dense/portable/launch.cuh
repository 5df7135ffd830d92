// mla_decode_dense, row portable: what its variants serve, and their launch.
#pragma once

#include "device/portable/launch.cuh"
#include "mla_decode_dense/gpu.cuh"
#include "mla_decode_dense/portable/kernel.cuh"
#include "runtime/variant.h"

namespace flash_mla::mla_decode_dense::portable {

inline constexpr Row kRow = Row::kPortable;

template <class Cfg>
const char* supports(const Problem& p) {
  constexpr VariantSpec v = Cfg::v;
  if (p.kv.format != v.kv) return "serves another cache format";
  if (p.q_dtype != v.q) return "serves another dtype of q";
  if (p.d_qk != v.d_qk) return "serves another d_qk";
  return flash_mla::portable::refuses<Decode<Cfg>>(p.s_q * (p.h_q / p.kv.h_kv), p.device);
}

// The same for workspace() and launch().
template <class Cfg>
DecodeGrid grid(const Problem& p) {
  return decode_grid(p.b, p.s_q, p.h_q / p.kv.h_kv, p.kv.h_kv, Cfg::v.tile_m, /*max_team=*/1,
                     flash_mla::portable::resident_ctas<Decode<Cfg>>(p.device), max_blocks(p),
                     p.batch_invariant);
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

}  // namespace flash_mla::mla_decode_dense::portable
