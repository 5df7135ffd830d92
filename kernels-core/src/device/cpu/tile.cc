// Compiled once per instruction set, as FLASH_MLA_ISA. Only compiler built-ins and vector
// extensions: an inline function of another header could be kept by the linker in the copy of an
// instruction set that the machine lacks.

#include "device/cpu/tile.h"

namespace flash_mla::cpu::FLASH_MLA_ISA {

namespace {

// kWidth: floats of a register. A kRows x kCols tile of sums, the rows' and columns' operands fit
// the register file: 32 registers with AVX-512 and on aarch64, 16 with AVX2 and SSE.
#if defined(__AVX512F__)
constexpr int kWidth = 16;
constexpr int kRows = 6;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kRows = 3;
#elif defined(__aarch64__)
constexpr int kWidth = 4;
constexpr int kRows = 6;
#else
constexpr int kWidth = 4;
constexpr int kRows = 3;
#endif
constexpr int kCols = 4;
static_assert(kColumnStep % (kWidth * kCols) == 0);

using Vec = float __attribute__((vector_size(kWidth * 4)));
using IntVec = int32_t __attribute__((vector_size(kWidth * 4)));
using HalfVec = uint16_t __attribute__((vector_size(kWidth * 2)));
using ByteVec = uint8_t __attribute__((vector_size(kWidth)));

#define INLINE [[gnu::always_inline]] inline

template <class V, class T>
INLINE V load(const T* source) {
  V value;
  __builtin_memcpy(&value, source, sizeof(V));
  return value;
}

template <class V, class T>
INLINE void store(T* target, V value) {
  __builtin_memcpy(target, &value, sizeof(V));
}

INLINE Vec splat(float value) { return Vec{} + value; }

// Bits of a as float, and back.
INLINE Vec as_float(IntVec a) { return (Vec)a; }
INLINE IntVec as_int(Vec a) { return (IntVec)a; }

using Vec4 = float __attribute__((vector_size(16)));
using Vec8 = float __attribute__((vector_size(32)));
using Vec16 = float __attribute__((vector_size(64)));

#define SHUFFLE __builtin_shufflevector

// The sums of four registers. Each step adds the halves of two registers (or of groups of lanes)
// and packs the results into one, so that the four reductions share their additions.
INLINE Vec4 sum4(Vec4 a, Vec4 b, Vec4 c, Vec4 d) {
  const Vec4 ab = SHUFFLE(a, b, 0, 1, 4, 5) + SHUFFLE(a, b, 2, 3, 6, 7);
  const Vec4 cd = SHUFFLE(c, d, 0, 1, 4, 5) + SHUFFLE(c, d, 2, 3, 6, 7);
  return SHUFFLE(ab, cd, 0, 2, 4, 6) + SHUFFLE(ab, cd, 1, 3, 5, 7);
}

INLINE Vec4 sum4(Vec8 a, Vec8 b, Vec8 c, Vec8 d) {
  const Vec8 ab =
      SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  const Vec8 cd =
      SHUFFLE(c, d, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(c, d, 4, 5, 6, 7, 12, 13, 14, 15);
  const Vec8 pairs =
      SHUFFLE(ab, cd, 0, 1, 4, 5, 8, 9, 12, 13) + SHUFFLE(ab, cd, 2, 3, 6, 7, 10, 11, 14, 15);
  return SHUFFLE(pairs, pairs, 0, 2, 4, 6) + SHUFFLE(pairs, pairs, 1, 3, 5, 7);
}

INLINE Vec4 sum4(Vec16 a, Vec16 b, Vec16 c, Vec16 d) {
  const auto fold = [](Vec16 x) {
    return SHUFFLE(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  };
  return sum4(fold(a), fold(b), fold(c), fold(d));
}

INLINE float sum(Vec value) { return sum4(value, value, value, value)[0]; }

// Not inlined, as accumulate_panel: on their own, GCC keeps all of the tile in registers.
template <int kM, int kN>
[[gnu::noinline]] void dot_tile(const float* a, int64_t lda, const float* b, int64_t ldb, int d,
                                float* s, int64_t lds) {
  Vec sums[kM][kN] = {};
  for (int c = 0; c < d; c += kWidth) {
    Vec column[kN];
    for (int j = 0; j < kN; ++j) column[j] = load<Vec>(b + j * ldb + c);
    for (int i = 0; i < kM; ++i) {
      const Vec row = load<Vec>(a + i * lda + c);
      for (int j = 0; j < kN; ++j) sums[i][j] += row * column[j];
    }
  }
  for (int i = 0; i < kM; ++i) {
    if constexpr (kN == 4) {
      store(s + i * lds, sum4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]));
    } else {
      for (int j = 0; j < kN; ++j) s[i * lds + j] = sum(sums[i][j]);
    }
  }
}

template <int kM>
INLINE void dot_panel(const float* a, int64_t lda, const float* b, int64_t ldb, int n, int d,
                      float* s, int64_t lds) {
  int j = 0;
  for (; j + kCols <= n; j += kCols) {
    dot_tile<kM, kCols>(a, lda, b + j * ldb, ldb, d, s + j, lds);
  }
  for (; j < n; ++j) dot_tile<kM, 1>(a, lda, b + j * ldb, ldb, d, s + j, lds);
}

void dot_rows(const float* a, int64_t lda, int m, const float* b, int64_t ldb, int n, int d,
              float* s, int64_t lds) {
  int i = 0;
  for (; i + kRows <= m; i += kRows) {
    dot_panel<kRows>(a + i * lda, lda, b, ldb, n, d, s + i * lds, lds);
  }
  for (; i < m; ++i) dot_panel<1>(a + i * lda, lda, b, ldb, n, d, s + i * lds, lds);
}

template <int kM>
[[gnu::noinline]] void accumulate_panel(const float* p, int64_t ldp, Span span, const float* v,
                                        int64_t ldv, int d, float* o, int64_t ldo) {
  if (span.begin >= span.end) return;
  for (int c = 0; c < d; c += kWidth * kCols) {
    Vec sum[kM][kCols];
    for (int i = 0; i < kM; ++i) {
      for (int x = 0; x < kCols; ++x) sum[i][x] = load<Vec>(o + i * ldo + c + x * kWidth);
    }
    for (int j = span.begin; j < span.end; ++j) {
      Vec column[kCols];
      for (int x = 0; x < kCols; ++x) column[x] = load<Vec>(v + j * ldv + c + x * kWidth);
      for (int i = 0; i < kM; ++i) {
        const Vec weight = splat(p[i * ldp + j]);
        for (int x = 0; x < kCols; ++x) sum[i][x] += weight * column[x];
      }
    }
    for (int i = 0; i < kM; ++i) {
      for (int x = 0; x < kCols; ++x) store(o + i * ldo + c + x * kWidth, sum[i][x]);
    }
  }
}

INLINE int min(int a, int b) { return a < b ? a : b; }
INLINE int max(int a, int b) { return a > b ? a : b; }

void accumulate(const float* p, int64_t ldp, const Span* spans, int m, const float* v, int64_t ldv,
                int d, float* o, int64_t ldo) {
  int i = 0;
  for (; i + kRows <= m; i += kRows) {
    // The columns that all rows of the panel share go together, each row's rest on its own.
    Span shared = spans[i];
    for (int r = 1; r < kRows; ++r) {
      shared = {max(shared.begin, spans[i + r].begin), min(shared.end, spans[i + r].end)};
    }
    accumulate_panel<kRows>(p + i * ldp, ldp, shared, v, ldv, d, o + i * ldo, ldo);
    const bool none_shared = shared.begin >= shared.end;
    for (int r = i; r < i + kRows; ++r) {
      const Span before = {spans[r].begin, none_shared ? spans[r].end : shared.begin};
      const Span after = {none_shared ? spans[r].end : shared.end, spans[r].end};
      accumulate_panel<1>(p + r * ldp, ldp, before, v, ldv, d, o + r * ldo, ldo);
      accumulate_panel<1>(p + r * ldp, ldp, after, v, ldv, d, o + r * ldo, ldo);
    }
  }
  for (; i < m; ++i) {
    accumulate_panel<1>(p + i * ldp, ldp, spans[i], v, ldv, d, o + i * ldo, ldo);
  }
}

float row_max(const float* x, int n) {
  constexpr float kLowest = -__builtin_inff();
  Vec best = splat(kLowest);
  int j = 0;
  for (; j + kWidth <= n; j += kWidth) {
    const Vec value = load<Vec>(x + j);
    best = value > best ? value : best;
  }
  float result = kLowest;
  for (int lane = 0; lane < kWidth; ++lane) result = best[lane] > result ? best[lane] : result;
  for (; j < n; ++j) result = x[j] > result ? x[j] : result;
  return result;
}

// 2^x: x = n + f with |f| <= 1/2, 2^f by the first eight terms of exp(f ln 2), whose ninth is
// below 6e-9. Zero below -126; NaN stays NaN.
INLINE Vec exp2(Vec x) {
  const Vec clamped = x < -126.0f ? splat(-126.0f) : (x > 127.0f ? splat(127.0f) : x);
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = clamped + magic;
  const Vec f = clamped - (shifted - magic);
  Vec y = splat(1.5252734e-5f);  // ln(2)^k / k!, k = 7 .. 0
  y = y * f + 1.5403530e-4f;
  y = y * f + 1.3333558e-3f;
  y = y * f + 9.6181291e-3f;
  y = y * f + 5.5504109e-2f;
  y = y * f + 2.4022651e-1f;
  y = y * f + 6.9314718e-1f;
  y = y * f + 1.0f;
  const Vec scaled = as_float(as_int(y) + (as_int(shifted) << 23));
  const Vec finite = x < -126.0f ? Vec{} : scaled;
  return x == x ? finite : x;
}

float exp2_row(float* x, int n, float scale, float shift) {
  Vec sums = {};
  int j = 0;
  for (; j + kWidth <= n; j += kWidth) {
    const Vec value = exp2(load<Vec>(x + j) * scale - shift);
    store(x + j, value);
    sums += value;
  }
  if (j < n) {  // the last part of a register, padded with zeros of the sum
    const int rest = n - j;
    float part[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) part[lane] = lane < rest ? x[j + lane] : 0.0f;
    const Vec value = exp2(load<Vec>(part) * scale - shift);
    store(part, value);
    for (int lane = 0; lane < rest; ++lane) x[j + lane] = part[lane];
    for (int lane = rest; lane < kWidth; ++lane) part[lane] = 0.0f;
    sums += load<Vec>(part);
  }
  return sum(sums);
}

void scale_row(float* x, int n, float factor) {
  for (int j = 0; j < n; j += kWidth) store(x + j, load<Vec>(x + j) * factor);
}

void load_bf16(const void* source, int n, float* target) {
  const uint16_t* from = static_cast<const uint16_t*>(source);
  for (int j = 0; j < n; j += kWidth) {
    const IntVec bits = __builtin_convertvector(load<HalfVec>(from + j), IntVec);
    store(target + j, as_float(bits << 16));
  }
}

void load_fp16(const void* source, int n, float* target) {
  // Exponent and mantissa moved into place are 2^112 too small, subnormals included; infinity and
  // NaN have their exponent filled up.
  const uint16_t* from = static_cast<const uint16_t*>(source);
  for (int j = 0; j < n; j += kWidth) {
    const IntVec bits = __builtin_convertvector(load<HalfVec>(from + j), IntVec);
    const IntVec magnitude = (bits & 0x7fff) << 13;
    const IntVec finite = as_int(as_float(magnitude) * 0x1p112f);
    const IntVec special = magnitude | 0x7f800000;
    const IntVec value = magnitude >= 0x0f800000 ? special : finite;
    store(target + j, as_float(value | ((bits & 0x8000) << 16)));
  }
}

void load_e4m3(const void* source, int n, float scale, float* target) {
  // As fp16, 2^120 too small; the only special code is NaN.
  const uint8_t* from = static_cast<const uint8_t*>(source);
  for (int j = 0; j < n; j += kWidth) {
    const IntVec bits = __builtin_convertvector(load<ByteVec>(from + j), IntVec);
    const IntVec magnitude = bits & 0x7f;
    const IntVec finite = as_int(as_float(magnitude << 20) * 0x1p120f);
    const IntVec value = magnitude == 0x7f ? IntVec{} + 0x7fc00000 : finite;
    store(target + j, as_float(value | ((bits & 0x80) << 24)) * scale);
  }
}

void store_bf16(const float* source, int n, float factor, void* target) {
  uint16_t* to = static_cast<uint16_t*>(target);
  for (int j = 0; j < n; j += kWidth) {
    const Vec value = load<Vec>(source + j) * factor;
    const IntVec bits = as_int(value);
    const IntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const IntVec quiet_nan = (bits >> 16) | 0x40;
    store(to + j, __builtin_convertvector(value == value ? rounded : quiet_nan, HalfVec));
  }
}

void store_fp16(const float* source, int n, float factor, void* target) {
  // Normal numbers round at bit 13. Below 2^-14, adding 0.5 leaves the multiples of 2^-24 in the
  // low bits, rounded by the addition.
  uint16_t* to = static_cast<uint16_t*>(target);
  for (int j = 0; j < n; j += kWidth) {
    const Vec value = load<Vec>(source + j) * factor;
    const IntVec bits = as_int(value);
    const IntVec magnitude = bits & 0x7fffffff;
    const IntVec normal = ((magnitude + 0xfff + ((magnitude >> 13) & 1)) >> 13) - (112 << 10);
    const IntVec tiny = as_int(as_float(magnitude) + 0.5f) - 0x3f000000;
    IntVec half = magnitude < 0x38800000 ? tiny : normal;       // 2^-14
    half = magnitude >= 0x477ff000 ? IntVec{} + 0x7c00 : half;  // 65520 and above: infinity
    half = magnitude > 0x7f800000 ? IntVec{} + 0x7e00 : half;   // NaN
    store(to + j, __builtin_convertvector(half | ((bits >> 16) & 0x8000), HalfVec));
  }
}

#define STRING_OF(x) #x
#define STRING(x) STRING_OF(x)

}  // namespace

extern const Ops kOps;
constinit const Ops kOps = {
    STRING(FLASH_MLA_ISA),
    dot_rows,
    accumulate,
    row_max,
    exp2_row,
    scale_row,
    load_bf16,
    load_fp16,
    load_e4m3,
    store_bf16,
    store_fp16,
};

}  // namespace flash_mla::cpu::FLASH_MLA_ISA
