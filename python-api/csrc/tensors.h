// Between torch tensors and the core's views: conversion, allocation, errors, streams. LibTorch's
// stable ABI only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "flash_mla/types.h"

namespace flash_mla_torch {

using flash_mla::DType;
using flash_mla::TensorView;
using torch::stable::Tensor;

TensorView view(const Tensor& tensor);
TensorView view(const std::optional<Tensor>& tensor);  // none: an absent argument

std::vector<int64_t> sizes(const Tensor& tensor);

// The tensor's size in a dimension, 0 where there is no such dimension: outputs are allocated
// before the core has judged the inputs.
int64_t size_or_zero(const Tensor& tensor, int dim);

// Uninitialised, contiguous, on the device of `like`.
Tensor empty(const std::vector<int64_t>& sizes, DType dtype, const Tensor& like);
// float32 [rows, columns], a column contiguous.
Tensor empty_column_major(int64_t rows, int64_t columns, const Tensor& like);
// As `like` in dtype and device.
Tensor empty_as(const std::vector<int64_t>& sizes, const Tensor& like);

// Throws what becomes ValueError, NotImplementedError (by its tag, in Python) or RuntimeError.
void throw_if_error(const flash_mla::Status& status);

// The current stream of the tensor's device; null on a CPU. On a CPU it also passes torch's number
// of threads on.
flash_mla::Stream prepare_call(const Tensor& tensor);

// Workspace for a call in a stream, the current one of `like`'s device; kept alive by this object.
//
// Scratch is the call's own. Sync blocks are kept: one for each device and stream and, since a
// replayed graph may overlap with the stream's other launches, one for each capture and stream.
class CallWorkspace {
 public:
  CallWorkspace(const flash_mla::WorkspaceSize& size, const Tensor& like, flash_mla::Stream stream);
  flash_mla::Workspace get() const { return workspace_; }

 private:
  std::optional<Tensor> scratch_;
  // Another thread may replace the kept block while this call is not yet enqueued.
  std::optional<Tensor> sync_;
  flash_mla::Workspace workspace_;
};

}  // namespace flash_mla_torch
