// Between torch tensors and the core's views: conversion, allocation, errors, streams. LibTorch's
// stable ABI only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <span>
#include <string>

#include "flash_mla/types.h"

namespace flash_mla_torch {

using flash_mla::DType;
using flash_mla::TensorView;
using torch::stable::Tensor;

TensorView view(const Tensor& tensor);
TensorView view(const std::optional<Tensor>& tensor);  // none: an absent argument

DType dtype_of(const Tensor& tensor);
// Borrowed from the tensor.
std::span<const int64_t> sizes(const Tensor& tensor);

// The tensor's size in a dimension, 0 where there is no such dimension: outputs are allocated
// before the core has judged the inputs.
int64_t size_or_zero(const Tensor& tensor, size_t dim);

// Uninitialised, contiguous, on the device of `like`. Dimensions from the sixth on are left out:
// the core refuses an input that has them.
Tensor empty(std::span<const int64_t> sizes, DType dtype, const Tensor& like);
Tensor empty(std::initializer_list<int64_t> sizes, DType dtype, const Tensor& like);
// float32 [rows, columns], a column contiguous.
Tensor empty_column_major(int64_t rows, int64_t columns, const Tensor& like);
// Of the shape, dtype and device of `like`.
Tensor empty_as(const Tensor& like);

// Throw what becomes ValueError, NotImplementedError or RuntimeError. A tag that _ops.py reads
// stands for the first two: torch makes them RuntimeErrors, from 2.15 on std::invalid_argument too.
[[noreturn]] void throw_value_error(const std::string& message);
void throw_if_error(const flash_mla::Status& status);

// The current stream of the tensor's device; null on a CPU. On a CPU it also passes torch's number
// of threads on.
flash_mla::Stream prepare_call(const Tensor& tensor);

// Memory of a workspace.
struct Block {
  std::optional<Tensor> tensor;
  void* data = nullptr;
  int64_t bytes = 0;
};

// Workspace for a call in a stream, the current one of `like`'s device; kept alive by this object.
//
// Scratch is the call's own, but outside of captures a call leaves it, unless it is large, to the
// next call in the same stream: the host need not allocate. Sync blocks are kept: one for each
// device and stream and, since a replayed graph may overlap with the stream's other launches, one
// for each capture and stream.
class CallWorkspace {
 public:
  CallWorkspace(const flash_mla::WorkspaceSize& size, const Tensor& like, flash_mla::Stream stream);
  ~CallWorkspace();
  CallWorkspace(const CallWorkspace&) = delete;
  CallWorkspace& operator=(const CallWorkspace&) = delete;

  flash_mla::Workspace get() const {
    return {scratch_.data, scratch_.bytes, sync_.data, sync_.bytes};
  }

 private:
  flash_mla::Stream stream_;
  int32_t device_index_ = 0;
  bool leaves_scratch_ = false;
  Block scratch_;
  // Another thread may replace the kept block while this call is not yet enqueued.
  Block sync_;
};

}  // namespace flash_mla_torch
