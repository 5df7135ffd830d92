// KV-cache operators on the CPU: one token at a time.
#include <algorithm>
#include <cstring>

#include "device/cpu/token.h"
#include "device/quant.h"
#include "device/scalar.h"
#include "kv_cache/problem.h"
#include "runtime/threads.h"
#include "runtime/variant.h"

namespace flash_mla::kv_cache {

namespace {

constexpr int kMaxDim = kLatentDim + kRopeDim;

// Tokens of a unit of work.
constexpr int64_t kTokensPerUnit = 16;

// The columns that a format stores as bf16 or fp16, all of them or those of RoPE: from `begin` to
// d_qk, from byte `offset_bytes` of a token on.
struct HalfColumns {
  DType dtype;
  int begin;
  int offset_bytes;
};

HalfColumns half_columns(const PagedKv& cache) {
  const KvLayout& layout = kv_layout(cache.format);
  if (layout.packed()) return {DType::kBFloat16, layout.d_nope, layout.rope_offset_bytes};
  if (layout.value == KvValue::kE4m3) return {DType::kBFloat16, cache.d_qk, 0};
  return {layout.value == KvValue::kBf16 ? DType::kBFloat16 : DType::kFloat16, 0, 0};
}

void store_rounded(DType dtype, float* values, int count, void* target) {
  for (int c = 0; c < count; ++c) values[c] = canonical_nan(values[c]);
  cpu::store_row(dtype, values, count, 1.0f, target);
}

void store_tiles(const KvLayout& layout, const float* values, uint8_t* row, uint8_t* scales) {
  for (int tile = 0, c = 0; c < layout.d_nope; ++tile, c += layout.scale_tile) {
    float amax = 0.0f;  // of the values that are not NaN
    for (int x = 0; x < layout.scale_tile; ++x) {
      const float magnitude = abs_float(values[c + x]);
      if (magnitude > amax) amax = magnitude;
    }
    const TileScale scale = tile_scale(layout, amax);
    if (layout.scale == KvScale::kFloat32) {
      std::memcpy(scales + tile * sizeof(float), &scale.value, sizeof(float));
    } else {
      scales[tile] = scale.code;
    }
    for (int x = 0; x < layout.scale_tile; ++x) {
      const float value = values[c + x] / scale.value;
      if (layout.value == KvValue::kE4m3) {
        row[c + x] = float_to_e4m3(value);
      } else if (x % 2 == 0) {
        row[(c + x) / 2] = float_to_e2m1(value);
      } else {
        row[(c + x) / 2] |= static_cast<uint8_t>(float_to_e2m1(value) << 4);
      }
    }
  }
  // What lies behind the last scale (a pad byte) is zero, so that equal tokens have equal bytes.
  const int num_tiles = layout.d_nope / layout.scale_tile;
  for (int i = num_tiles; i < layout.page_scale_bytes; ++i) scales[i] = 0;
}

// kv [d_qk] into the token at `row`.
void append_token(const Params& p, const uint8_t* kv, uint8_t* row, uint8_t* scales) {
  const KvLayout& layout = kv_layout(p.cache.format);
  const HalfColumns half = half_columns(p.cache);
  const int count = p.cache.d_qk - half.begin;
  alignas(64) float values[kMaxDim];
  cpu::load_row(p.kv_dtype, kv, p.cache.d_qk, values);
  if (layout.packed()) {
    store_tiles(layout, values, row, scales);
  } else {
    const float scale = p.scale == nullptr ? 1.0f : *p.scale;
    for (int c = 0; c < half.begin; ++c) row[c] = float_to_e4m3(values[c] / scale);
  }
  if (half.dtype == p.kv_dtype) {
    std::memcpy(row + half.offset_bytes, kv + half.begin * sizeof(uint16_t),
                count * sizeof(uint16_t));
  } else {
    store_rounded(half.dtype, values + half.begin, count, row + half.offset_bytes);
  }
}

void gather_token(const Params& p, int64_t page, int64_t offset, int32_t head, uint8_t* kv) {
  const HalfColumns half = half_columns(p.cache);
  alignas(64) float values[kMaxDim];
  cpu::load_token(p.cache, page, offset, head, values);
  if (p.scale != nullptr) {
    for (int c = 0; c < p.cache.d_qk; ++c) values[c] *= *p.scale;
  }
  store_rounded(p.kv_dtype, values, p.cache.d_qk, kv);
  if (half.dtype == p.kv_dtype) {
    std::memcpy(kv + half.begin * sizeof(uint16_t),
                p.cache.row(page, offset, head) + half.offset_bytes,
                (p.cache.d_qk - half.begin) * sizeof(uint16_t));
  }
}

void copy_token(const Params& p, int64_t token, int32_t head) {
  const PagedKv& cache = p.cache;
  const int64_t element_bytes = p.kv_dtype == DType::kFloat32 ? 4 : 2;
  uint8_t* kv =
      static_cast<uint8_t*>(p.kv) + (token * p.kv_stride_t + head * p.kv_stride_h) * element_bytes;
  const int64_t slot = p.slot(token);
  if (!cache.has_slot(slot)) {
    if (p.direction == Direction::kGather) std::memset(kv, 0, cache.d_qk * element_bytes);
    return;
  }
  const int64_t page = slot / cache.page_size;
  const int64_t offset = slot % cache.page_size;
  if (p.direction == Direction::kGather) return gather_token(p, page, offset, head, kv);
  // The cache is this call's output: PagedKv points to it as const for the attention kernels.
  append_token(p, kv, const_cast<uint8_t*>(cache.row(page, offset, head)),
               const_cast<uint8_t*>(cache.scales(page, offset)));
}

Status launch(const Problem& p, const Workspace&, Stream) {
  const int64_t units = (p.num_tokens + kTokensPerUnit - 1) / kTokensPerUnit;
  parallel_for(units, [&](int64_t unit) {
    const int64_t end = std::min((unit + 1) * kTokensPerUnit, p.num_tokens);
    for (int64_t token = unit * kTokensPerUnit; token < end; ++token) {
      for (int32_t head = 0; head < p.cache.h_kv; ++head) copy_token(p, token, head);
    }
  });
  return {};
}

}  // namespace

extern constinit const Variant<Problem> variant_cpu = {"cpu", Row::kCpu, supports_all<Problem>,
                                                       no_workspace<Problem>, launch};

}  // namespace flash_mla::kv_cache
