// Moving registers between the warpgroups of a CTA (PTX setmaxnreg). By all warps of a warpgroup;
// the kernel needs __launch_bounds__, and no trap, exit or call in the roles, or ptxas ignores it.
#pragma once

namespace flash_mla::sm90 {

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace flash_mla::sm90
