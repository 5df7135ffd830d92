// The least that a test needs: TEST(name) { EXPECT(...); } and a main that runs them all.
#pragma once

#include <cstdio>
#include <vector>

namespace flash_mla::test {

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Register {
  Register(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

#define TEST(name)                                                       \
  static void name();                                                    \
  static const ::flash_mla::test::Register register_##name(#name, name); \
  static void name()

// A failed expectation is printed and counted; the test goes on.
#define EXPECT(condition)                                                  \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::printf("%s:%d: expected %s\n", __FILE__, __LINE__, #condition); \
      ++::flash_mla::test::failures();                                     \
    }                                                                      \
  } while (false)

#define TEST_MAIN()                                                    \
  int main() {                                                         \
    for (const auto& test : ::flash_mla::test::cases()) {              \
      const int before = ::flash_mla::test::failures();                \
      test.run();                                                      \
      const bool passed = ::flash_mla::test::failures() == before;     \
      std::printf("%s %s\n", passed ? "ok    " : "FAILED", test.name); \
    }                                                                  \
    return ::flash_mla::test::failures() == 0 ? 0 : 1;                 \
  }

// CTest's SKIP_RETURN_CODE: what the test needs is not on this machine.
inline constexpr int kSkipped = 77;

}  // namespace flash_mla::test
