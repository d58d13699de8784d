// Tensor-level implementations of the schemas in bindings.cpp: cpu/ops.cpp and cuda/ops.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace opd {

using torch::stable::Tensor;

namespace cpu {
#include "op_list.inl"
}
namespace cuda {
#include "op_list.inl"
}

}  // namespace opd
