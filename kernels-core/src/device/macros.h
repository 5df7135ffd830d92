// What lets one definition serve host and device code.
#pragma once

#if defined(__CUDACC__)
#define FLASH_MLA_HD __host__ __device__ __forceinline__
#else
#define FLASH_MLA_HD inline
#endif
