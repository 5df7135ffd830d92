// kv_cache, row sm100.
#pragma once

#include "kv_cache/gpu.cuh"

namespace flash_mla::kv_cache::sm100 {

inline constexpr Row kRow = Row::kSm100;

using kv_cache::supports;
using kv_cache::workspace;

template <class Cfg>
Status launch(const Problem& p, const Workspace&, Stream stream) {
  return launch_move<Cfg, /*kProgrammatic=*/true>(p, stream);
}

}  // namespace flash_mla::kv_cache::sm100
