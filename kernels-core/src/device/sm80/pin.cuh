// Where a value is computed.
#pragma once

#include <cstdint>

namespace flash_mla::sm80 {

// Here at the latest: the compiler would rather do it where the value is used, behind a barrier
// that leaves time for it.
__device__ __forceinline__ void pin(int32_t& value) { asm volatile("" : "+r"(value)); }
template <class T>
__device__ __forceinline__ void pin(T*& pointer) {
  asm volatile("" : "+l"(pointer));
}

}  // namespace flash_mla::sm80
