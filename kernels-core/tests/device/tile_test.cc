// The CPU's vector forms against their written definitions, for each instruction set of this
// machine.
#include "device/cpu/tile.h"

#include <cmath>
#include <cstdlib>
#include <vector>

#include "device/scalar.h"
#include "support.h"

using namespace flash_mla;

namespace flash_mla::cpu {
namespace generic {
extern const Ops kOps;
}
#if FLASH_MLA_HAS_ISA_avx512
namespace avx2 {
extern const Ops kOps;
}
namespace avx512 {
extern const Ops kOps;
}
#endif
}  // namespace flash_mla::cpu

namespace {

using cpu::Ops;
using cpu::Span;

// Up to the best set of this machine: those before it run here too.
template <class Check>
void for_each_isa(const Check& check) {
  check(cpu::generic::kOps);
#if FLASH_MLA_HAS_ISA_avx512
  if (&cpu::ops() != &cpu::generic::kOps) check(cpu::avx2::kOps);
  if (&cpu::ops() == &cpu::avx512::kOps) check(cpu::avx512::kOps);
#endif
}

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

std::vector<float> random_floats(int count) {
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(std::rand()) / RAND_MAX - 0.5f;
  return values;
}

}  // namespace

TEST(loads_give_every_code_its_value) {
  for_each_isa([](const Ops& op) {
    std::vector<uint16_t> codes(65536);
    for (int i = 0; i < 65536; ++i) codes[i] = static_cast<uint16_t>(i);
    std::vector<float> half(65536), brain(65536);
    op.load_fp16(codes.data(), 65536, half.data());
    op.load_bf16(codes.data(), 65536, brain.data());
    std::vector<uint8_t> bytes(256);
    for (int i = 0; i < 256; ++i) bytes[i] = static_cast<uint8_t>(i);
    std::vector<float> e4m3(256);
    op.load_e4m3(bytes.data(), 256, 0.375f, e4m3.data());
    for (int i = 0; i < 65536; ++i) {
      EXPECT(same(half[i], fp16_to_float(codes[i])));
      EXPECT(same(brain[i], bf16_to_float(codes[i])));
    }
    for (int i = 0; i < 256; ++i) EXPECT(same(e4m3[i], e4m3_to_float(bytes[i]) * 0.375f));
  });
}

TEST(stores_round_as_the_definition) {
  for_each_isa([](const Ops& op) {
    std::vector<float> values;
    for (int exponent = -40; exponent <= 20; ++exponent) {
      for (int i = 0; i < 64; ++i) {
        values.push_back((1.0f + std::ldexp(static_cast<float>(std::rand()), -31)) *
                         std::ldexp(i % 2 ? 1.0f : -1.0f, exponent));
      }
    }
    for (int i = 0; i < 61; ++i) values.push_back(std::ldexp(1.0f + i, -26));  // ties of subnormals
    values.push_back(65520.0f);
    values.push_back(NAN);
    values.push_back(-INFINITY);
    const int count = static_cast<int>(values.size()) / 64 * 64;
    std::vector<uint16_t> half(count), brain(count);
    op.store_fp16(values.data(), count, 1.0f, half.data());
    op.store_bf16(values.data(), count, 1.0f, brain.data());
    for (int i = 0; i < count; ++i) {
      EXPECT(same(fp16_to_float(half[i]), fp16_to_float(float_to_fp16(values[i]))));
      EXPECT(same(bf16_to_float(brain[i]), bf16_to_float(float_to_bf16(values[i]))));
    }
  });
}

TEST(exp2_is_accurate_to_a_few_ulp) {
  for_each_isa([](const Ops& op) {
    std::vector<float> x(1000), y;
    for (int i = 0; i < 1000; ++i) x[i] = -0.125f * i - 0.01f;
    y = x;
    const float sum = op.exp2_row(y.data(), 999, 1.0f, 0.0f);  // an odd count: the padded tail
    double expected_sum = 0;
    for (int i = 0; i < 999; ++i) {
      const double expected = x[i] < -126 ? 0.0 : std::exp2(static_cast<double>(x[i]));
      EXPECT(std::fabs(y[i] - expected) <= 4e-7 * expected);
      expected_sum += expected;
    }
    EXPECT(std::fabs(sum - expected_sum) <= 1e-6 * expected_sum);
    EXPECT(y[999] == x[999]);
    float special[3] = {NAN, -INFINITY, 0.0f};
    op.exp2_row(special, 3, 1.0f, 0.0f);
    EXPECT(std::isnan(special[0]) && special[1] == 0.0f && special[2] == 1.0f);
  });
}

TEST(products_agree_with_double_for_every_remainder) {
  for_each_isa([](const Ops& op) {
    constexpr int kDim = 64;
    for (int m = 1; m <= 13; ++m) {
      for (int n = 1; n <= 9; ++n) {
        const std::vector<float> a = random_floats(m * kDim), b = random_floats(n * kDim);
        std::vector<float> s(m * n);
        op.dot_rows(a.data(), kDim, m, b.data(), kDim, n, kDim, s.data(), n);
        for (int i = 0; i < m; ++i) {
          for (int j = 0; j < n; ++j) {
            double expected = 0;
            for (int c = 0; c < kDim; ++c) expected += double{a[i * kDim + c]} * b[j * kDim + c];
            EXPECT(std::fabs(s[i * n + j] - expected) < 1e-5);
          }
        }
      }
    }
  });
}

TEST(accumulation_reads_nothing_outside_a_rows_span) {
  for_each_isa([](const Ops& op) {
    constexpr int kDim = 64, kRows = 13, kKeys = 8;
    for (int round = 0; round < 20; ++round) {
      std::vector<Span> spans(kRows);
      for (Span& span : spans) {
        span.begin = std::rand() % (kKeys + 1);
        span.end = round % 2 ? kKeys : std::rand() % (kKeys + 1);
      }
      const std::vector<float> p = random_floats(kRows * kKeys);
      const std::vector<float> v = random_floats(kKeys * kDim);
      for (int poisoned = 0; poisoned < kKeys; ++poisoned) {
        std::vector<float> values = v;
        for (int c = 0; c < kDim; ++c) values[poisoned * kDim + c] = NAN;
        std::vector<float> o(kRows * kDim, 1.0f);
        op.accumulate(p.data(), kKeys, spans.data(), kRows, values.data(), kDim, kDim, o.data(),
                      kDim);
        for (int i = 0; i < kRows; ++i) {
          const bool reads = spans[i].begin <= poisoned && poisoned < spans[i].end;
          double expected = 1;
          for (int j = spans[i].begin; j < spans[i].end; ++j) {
            expected += double{p[i * kKeys + j]} * v[j * kDim + 3];
          }
          EXPECT(reads ? std::isnan(o[i * kDim + 3])
                       : std::fabs(o[i * kDim + 3] - expected) < 1e-5);
        }
      }
    }
  });
}

TEST_MAIN()
