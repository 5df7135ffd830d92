#include "device/cpu/token.h"

#include <cstring>

#include "device/cpu/tile.h"
#include "device/scalar.h"

namespace flash_mla::cpu {

void load_row(DType dtype, const void* source, int count, float* target) {
  switch (dtype) {
    case DType::kBFloat16: return ops().load_bf16(source, count, target);
    case DType::kFloat16: return ops().load_fp16(source, count, target);
    case DType::kFloat8E4M3: return ops().load_e4m3(source, count, 1.0f, target);
    default: std::memcpy(target, source, count * sizeof(float));
  }
}

void store_row(DType dtype, const float* source, int count, float factor, void* target) {
  switch (dtype) {
    case DType::kBFloat16: return ops().store_bf16(source, count, factor, target);
    case DType::kFloat16: return ops().store_fp16(source, count, factor, target);
    default:
      for (int c = 0; c < count; ++c) static_cast<float*>(target)[c] = source[c] * factor;
  }
}

namespace {

float read_scale(KvScale kind, const uint8_t* scales, int tile) {
  switch (kind) {
    case KvScale::kFloat32: {
      float scale;
      std::memcpy(&scale, scales + tile * sizeof(float), sizeof(float));
      return scale;
    }
    case KvScale::kUe8m0: return ue8m0_to_float(scales[tile]);
    case KvScale::kE4m3: return e4m3_to_float(scales[tile]);
    default: return 1.0f;
  }
}

void load_e2m1(const uint8_t* source, int count, float scale, float* target) {
  for (int c = 0; c < count; ++c) {
    target[c] = e2m1_to_float((source[c / 2] >> (4 * (c % 2))) & 0xf) * scale;
  }
}

}  // namespace

void load_token(const PagedKv& kv, int64_t page, int64_t offset, int32_t head, float* target) {
  const KvLayout& layout = kv_layout(kv.format);
  const uint8_t* row = kv.row(page, offset, head);
  if (!layout.packed()) {
    const DType dtype = layout.value == KvValue::kBf16   ? DType::kBFloat16
                        : layout.value == KvValue::kFp16 ? DType::kFloat16
                                                         : DType::kFloat8E4M3;
    return load_row(dtype, row, kv.d_qk, target);
  }
  const uint8_t* scales = kv.scales(page, offset);
  for (int tile = 0, c = 0; c < layout.d_nope; ++tile, c += layout.scale_tile) {
    const float scale = read_scale(layout.scale, scales, tile);
    if (layout.value == KvValue::kE2m1) {
      load_e2m1(row + c / 2, layout.scale_tile, scale, target + c);
    } else {
      ops().load_e4m3(row + c, layout.scale_tile, scale, target + c);
    }
  }
  if (layout.d_rope() > 0) {
    ops().load_bf16(row + layout.rope_offset_bytes, layout.d_rope(), target + layout.d_nope);
  }
}

void load_query(const DecodeIo& io, int64_t request, int64_t i, int64_t head, float* target) {
  const int64_t element_bytes = io.q_dtype == DType::kFloat8E4M3 ? 1 : 2;
  const int64_t at = request * io.q_stride_b + i * io.q_stride_s + head * io.q_stride_h;
  load_row(io.q_dtype, static_cast<const uint8_t*>(io.q) + at * element_bytes, io.d_qk, target);
}

void store_result(const DecodeIo& io, int64_t request, int64_t i, int64_t head, const float* out,
                  float factor, float lse) {
  const int64_t at = request * io.out_stride_b + i * io.out_stride_s + head * io.out_stride_h;
  store_row(io.out_dtype, out, kLatentDim, factor, static_cast<uint16_t*>(io.out) + at);
  io.lse[request * io.lse_stride_b + head * io.lse_stride_h + i * io.lse_stride_s] = lse;
}

}  // namespace flash_mla::cpu
