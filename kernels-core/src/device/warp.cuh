// The lanes of a warp.
#pragma once

namespace flash_mla {

inline constexpr int kLanes = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

}  // namespace flash_mla
