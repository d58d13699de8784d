// The element types of logits, hidden states and heads.
#pragma once

namespace opd {

enum class DType : int { f32, bf16, f16, f64 };

}  // namespace opd
