// The tensor cores' product of fragments (PTX mma.m16n8k16).
//
// With g = lane / 4 and c = lane % 4 a lane holds
//   A [16 x 16]: a[0] row g, columns 2c, 2c + 1; a[1] row g + 8; a[2], a[3] the same, columns + 8
//   B [16 x 8]:  b0 column g, rows 2c, 2c + 1; b1 rows + 8
//   D [16 x 8]:  d[0], d[1] row g, columns 2c, 2c + 1; d[2], d[3] row g + 8
#pragma once

#include <cstdint>

#include "flash_mla/types.h"

namespace flash_mla::sm80 {

// D += A B in float32.
template <DType kType>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  static_assert(kType == DType::kBFloat16 || kType == DType::kFloat16);
  if constexpr (kType == DType::kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace flash_mla::sm80
