// Reading tensors and cache tokens as float32 rows.
#pragma once

#include "device/decode_io.h"
#include "device/paged_kv.h"
#include "flash_mla/types.h"

namespace flash_mla::cpu {

// target[c] = factor-free value of `count` contiguous elements of bf16, fp16 or e4m3.
void load_row(DType dtype, const void* source, int count, float* target);
// source[c] * factor, rounded to bf16 or fp16, or as float32.
void store_row(DType dtype, const float* source, int count, float factor, void* target);

// Dequantises the token at (page, offset) of head `head`: d_qk floats. The scale of a whole fp8
// cache (descale_k) is not applied.
void load_token(const PagedKv& kv, int64_t page, int64_t offset, int32_t head, float* target);

// The query of (request, query i, head) of a decode operator: d_qk floats.
void load_query(const DecodeIo& io, int64_t request, int64_t i, int64_t head, float* target);
// Its result: out * factor (512 floats), and lse.
void store_result(const DecodeIo& io, int64_t request, int64_t i, int64_t head, const float* out,
                  float factor, float lse);

}  // namespace flash_mla::cpu
