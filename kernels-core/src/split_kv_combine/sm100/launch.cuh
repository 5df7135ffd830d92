// merge_attn_states, row sm100.
#pragma once

#include "split_kv_combine/merge.cuh"

namespace flash_mla::split_kv_combine::sm100 {

inline constexpr Row kRow = Row::kSm100;

using split_kv_combine::supports;
using split_kv_combine::workspace;

template <class Cfg>
Status launch(const Problem& p, const Workspace&, Stream stream) {
  return launch_merge<Cfg, /*kProgrammatic=*/true>(p, stream);
}

}  // namespace flash_mla::split_kv_combine::sm100
