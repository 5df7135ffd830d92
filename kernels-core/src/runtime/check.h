// Checks of arguments. The first one that fails is kept, the later ones do nothing, so a validate
// function reads as the list of the operator's rules. A check that passes builds no text: it is on
// the path of every call.
#pragma once

#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "flash_mla/types.h"

namespace flash_mla {

const char* dtype_name(DType dtype);
int64_t dtype_bytes(DType dtype);
std::string shape_string(const TensorView& tensor);

// Whether a validation demands the outputs: the _workspace functions run before they exist.
enum class Outputs { kRequired, kAbsent };

// The names of a tensor's dimensions, "[b, s_q]", counted by the compiler.
struct Dims {
  const char* text;
  int32_t rank = 1;

  consteval Dims(const char* text) : text(text) {
    for (const char* c = text; *c != '\0'; ++c) rank += *c == ',';
  }
};

// A piece of a message as `require` takes it: text, a number, or a function that makes the text.
inline std::string check_text(std::string text) { return text; }
inline std::string check_text(std::integral auto number) { return std::to_string(number); }
inline std::string check_text(const std::invocable auto& make_text) { return make_text(); }

class Check {
 public:
  explicit Check(const char* operator_name) : operator_name_(operator_name) {}

  bool ok() const { return status_.ok(); }
  const Status& status() const { return status_; }

  // The general form: "<operator>: <argument> must <rule>, got <value>; <remedy>". A rule or a
  // value that takes work to put together is a function.
  template <class Rule, class Value>
  Check& require(bool condition, const char* argument, const Rule& rule, const Value& value,
                 const char* remedy) {
    if (!condition && ok()) fail(argument, check_text(rule), check_text(value), remedy);
    return *this;
  }

  // The tensor is there, has this rank and one of these dtypes, its last dimension is contiguous,
  // and its data pointer is aligned to its elements. `dims` names the dimensions: "[b, s_q]".
  Check& tensor(const TensorView& tensor, const char* argument, const char* dims, int rank,
                std::initializer_list<DType> dtypes);
  // As above but for small integer or float vectors, whose stride is free.
  Check& vector(const TensorView& tensor, const char* argument, Dims dims,
                std::initializer_list<DType> dtypes) {
    return shape_and_dtype(tensor, argument, dims.text, dims.rank, dtypes);
  }
  Check& size(const TensorView& tensor, const char* argument, int dim, int64_t expected,
              const char* meaning);
  Check& same_device(const TensorView& tensor, const char* argument, Device device,
                     const char* as_argument);
  // Rows of `row_bytes`-byte granularity: strides of all but the last dimension and the base
  // address are multiples of 16 bytes, which vector loads and TMA need.
  Check& aligned_rows(const TensorView& tensor, const char* argument);
  // Each element has an address of its own: needed of outputs.
  Check& no_overlap(const TensorView& tensor, const char* argument);

 private:
  Check& shape_and_dtype(const TensorView& tensor, const char* argument, const char* dims, int rank,
                         std::initializer_list<DType> dtypes);
  void fail(const char* argument, const std::string& rule, const std::string& value,
            const char* remedy);

  const char* operator_name_;
  Status status_;
};

}  // namespace flash_mla
