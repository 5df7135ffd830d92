// What this build holds, and what of it serves a device.
#pragma once

#include "flash_mla/types.h"

namespace flash_mla {
inline namespace v0 {

// "0.1.0"; the version of the library that is loaded, not of the headers.
FLASH_MLA_API const char* version();

// The variant table: one row per kernel, in order of preference within an operator.
struct VariantInfo {
  const char* operator_name = nullptr;
  const char* name = nullptr;  // what FLASH_MLA_KERNEL and FLASH_MLA_LOG=select call it
  const char* row = nullptr;   // cpu, portable, sm90 or sm100
};

FLASH_MLA_API int32_t num_variants();
FLASH_MLA_API Status variant_info(int32_t index, VariantInfo* info);
// Ok when the variant's row runs on the device; otherwise the reason why not.
FLASH_MLA_API Status variant_runs_on(int32_t index, Device device);

// CUDA architectures in this binary ("90a 100f 80 ..."), empty for a build without CUDA.
FLASH_MLA_API const char* cuda_architectures();

// Threads that CPU backends use for calls from this thread; 0: as many as OpenMP would take.
FLASH_MLA_API void set_num_threads(int32_t num_threads);
// The instruction set that the CPU backend chose: "avx512", "avx2" or "generic".
FLASH_MLA_API const char* cpu_isa();

}  // namespace v0
}  // namespace flash_mla
