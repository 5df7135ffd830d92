// The CPU backends' instruction forms: products of small float32 tiles, the softmax of a row, and
// conversions. tile.cc is compiled once per instruction set; ops() is the table of the best one.
#pragma once

#include <cstdint>

namespace flash_mla::cpu {

// Columns [begin, end) of a row.
struct Span {
  int32_t begin;
  int32_t end;
};

// Widths (d, of every function below) are multiples of this many floats.
inline constexpr int kColumnStep = 64;

struct Ops {
  const char* isa;

  // s[i][j] = sum_c a[i][c] b[j][c]   for i < m, j < n, c < d
  void (*dot_rows)(const float* a, int64_t lda, int m, const float* b, int64_t ldb, int n, int d,
                   float* s, int64_t lds);

  // o[i][c] += sum_j p[i][j] v[j][c]   for i < m, c < d, j in spans[i] only: rows of v outside a
  // row's span are not read for it, so that NaN in masked data goes nowhere.
  void (*accumulate)(const float* p, int64_t ldp, const Span* spans, int m, const float* v,
                     int64_t ldv, int d, float* o, int64_t ldo);

  // The largest of x[0..n), -inf for n = 0.
  float (*row_max)(const float* x, int n);
  // x[j] = 2^(x[j] * scale - shift); returns the sum.
  float (*exp2_row)(float* x, int n, float scale, float shift);
  // x[j] *= factor
  void (*scale_row)(float* x, int n, float factor);

  void (*load_bf16)(const void* source, int n, float* target);
  void (*load_fp16)(const void* source, int n, float* target);
  void (*load_e4m3)(const void* source, int n, float scale, float* target);
  void (*store_bf16)(const float* source, int n, float factor, void* target);
  void (*store_fp16)(const float* source, int n, float factor, void* target);
};

const Ops& ops();

}  // namespace flash_mla::cpu
