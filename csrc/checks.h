// Argument checks of the op library and small helpers, the same for every device. Kernels assume
// what is checked here.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtype.h"

namespace opd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream out;
  ((out << parts), ...);
  return out.str();
}

#define OPD_CHECK(condition, ...)                                     \
  do {                                                                \
    if (!(condition)) throw std::runtime_error(message(__VA_ARGS__)); \
  } while (false)

inline std::string shape(const Tensor& t) {
  std::ostringstream out;
  out << "[";
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << "]";
  return out.str();
}

inline DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      break;
  }
  throw std::runtime_error(
      message(name, ": expected float32, bfloat16, float16 or float64, got another type"));
}

// Results are float32, but float64 for float64.
inline ScalarType result_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The first tensor of an op chooses the device; the dispatcher does not look at all the others.
inline void check_device(const char* name, const Tensor& t, const Tensor& first) {
  OPD_CHECK(t.device() == first.device(), name,
            ": expected a tensor on the device of the first one");
}

// Rows without gaps inside: as given, or copied once.
inline Tensor with_dense_rows(const char* name, const Tensor& t, const Tensor& first) {
  check_device(name, t, first);
  OPD_CHECK(t.dim() == 2, name, ": expected [N, V], got shape ", shape(t));
  dtype_of(name, t);
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

inline Tensor with_dense_rows(const char* name, const Tensor& t) {
  return with_dense_rows(name, t, t);
}

// A contiguous tensor of this shape and type, on the device of `first`.
inline Tensor small(const Tensor& first, const char* name, const Tensor& t,
                    const std::vector<int64_t>& sizes, ScalarType type) {
  check_device(name, t, first);
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = t.size(i) == sizes[i];
  if (!same) {
    std::ostringstream wanted;
    for (size_t i = 0; i < sizes.size(); ++i) wanted << (i ? ", " : "") << sizes[i];
    throw std::runtime_error(
        message(name, ": expected shape [", wanted.str(), "], got ", shape(t)));
  }
  OPD_CHECK(t.scalar_type() == type, name, ": expected dtype number ", static_cast<int>(type),
            ", got ", static_cast<int>(t.scalar_type()));
  return torch::stable::contiguous(t);
}

inline Tensor id_rows(const Tensor& first, const char* name, const Tensor& ids, int64_t num_rows) {
  OPD_CHECK(ids.dim() == 2, name, ": expected [N, K], got shape ", shape(ids));
  return small(first, name, ids, {num_rows, ids.size(1)}, ScalarType::Long);
}

inline void check_vocab(const Tensor& logits, int64_t valid_vocab, double temperature) {
  OPD_CHECK(valid_vocab >= 1 && valid_vocab <= logits.size(1), "valid_vocab: expected 1 to ",
            logits.size(1), ", got ", valid_vocab);
  OPD_CHECK(temperature > 0 && std::isfinite(temperature),
            "temperature: expected a finite number > 0, got ", temperature);
}

inline void check_inplace(const char* name, const Tensor& t) {
  OPD_CHECK(t.size(1) <= 1 || t.stride(1) == 1, name, ": writing in place needs rows without gaps");
  OPD_CHECK(t.size(0) <= 1 || t.stride(0) >= t.size(1), name,
            ": writing in place needs rows that do not overlap");
}

// Where the gradient of `logits` goes: their own memory, or other rows of the same shape; of the
// same type, or beside float32 logits of 16 bits.
inline void check_out(const Tensor& out, const Tensor& logits) {
  check_device("out", out, logits);
  OPD_CHECK(out.dim() == 2 && out.size(0) == logits.size(0) && out.size(1) == logits.size(1),
            "out: expected shape ", shape(logits), ", got ", shape(out));
  const DType type = dtype_of("out", out), given = dtype_of("logits", logits);
  OPD_CHECK(type == given || (given == DType::f32 && type != DType::f64),
            "out: expected the type of the logits, or a 16-bit type beside float32 logits");
  check_inplace("out", out);
}

// out = factor * source, over the source or into a tensor of the same shape.
inline void check_scale(const Tensor& source, const Tensor& out) {
  check_out(out, source);
  OPD_CHECK(source.is_contiguous() && out.is_contiguous(),
            "scale_out: expected contiguous tensors");
  OPD_CHECK(dtype_of("source", source) != DType::f64, "scale_out: float64 is not taken");
}

inline void check_k(int64_t k, int64_t valid_vocab) {
  OPD_CHECK(k >= 1 && k <= valid_vocab, "k: expected 1 to ", valid_vocab, ", got ", k);
}

inline void check_pair(const Tensor& student, const Tensor& teacher, int64_t valid_vocab,
                       double temperature, int64_t divergence, double beta) {
  check_vocab(student, valid_vocab, temperature);
  OPD_CHECK(teacher.size(0) == student.size(0) && teacher.size(1) >= valid_vocab,
            "teacher_logits: expected [", student.size(0), ", at least ", valid_vocab, "], got ",
            shape(teacher));
  OPD_CHECK(result_type(student) == result_type(teacher),
            "teacher_logits: float64 only together with float64 student_logits");
  OPD_CHECK(divergence >= 0 && divergence <= 2, "divergence: expected 0, 1 or 2, got ", divergence);
  OPD_CHECK(divergence != 2 || (beta > 0 && beta < 1), "beta: expected inside (0, 1), got ", beta);
}

inline void check_product(const Tensor& hidden, const Tensor& head) {
  OPD_CHECK(hidden.size(1) == head.size(1), "head: expected [V, ", hidden.size(1), "], got ",
            shape(head));
  OPD_CHECK(result_type(hidden) == result_type(head),
            "head: float64 only together with float64 hidden");
}

inline void check_hidden(const Tensor& hidden, const Tensor& head) {
  check_device("hidden", hidden, head);
  OPD_CHECK(hidden.dim() == 2 && hidden.size(1) == head.size(1), "hidden: expected [N, ",
            head.size(1), "], got ", shape(hidden));
}

inline void check_buffer(const Tensor& buffer, const Tensor& hidden) {
  check_device("buffer", buffer, hidden);
  OPD_CHECK(buffer.dim() == 2 && buffer.size(1) == hidden.size(1), "buffer: expected [V, ",
            hidden.size(1), "], got ", shape(buffer));
  check_inplace("buffer", buffer);
  OPD_CHECK(result_type(buffer) == result_type(hidden),
            "buffer: float64 only together with float64 hidden");
}

// ==== helpers ====

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// A new tensor of the shape and type of `t` [N, V], without its strides.
inline Tensor new_rows(const Tensor& t) {
  return torch::stable::new_empty(t, {t.size(0), t.size(1)}, t.scalar_type());
}

}  // namespace opd
