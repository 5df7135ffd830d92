// Loading fragments of mma from shared memory (PTX ldmatrix).
//
// A matrix is 8 rows of 16 bytes. Lane i gives the address of row i % 8 of matrix i / 8; with
// g = lane / 4 and c = lane % 4 it gets, of each matrix, bytes [4c, 4c + 4) of row g. Transposed,
// it gets the 16-bit values g of rows 2c and 2c + 1, the first in the low half.
#pragma once

#include <cstdint>

namespace flash_mla::sm80 {

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}

}  // namespace flash_mla::sm80
