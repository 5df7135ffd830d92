#include "device/cpu/tile.h"

namespace flash_mla::cpu {

namespace generic {
extern const Ops kOps;
}
#if FLASH_MLA_HAS_ISA_avx512
namespace avx2 {
extern const Ops kOps;
}
namespace avx512 {
extern const Ops kOps;
}
#endif

namespace {

const Ops& choose() {
#if FLASH_MLA_HAS_ISA_avx512
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return avx512::kOps;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return avx2::kOps;
  }
#endif
  return generic::kOps;
}

}  // namespace

const Ops& ops() {
  static const Ops& chosen = choose();
  return chosen;
}

}  // namespace flash_mla::cpu
