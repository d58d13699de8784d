// What a CPU kernel does: one row of logits at a time, on raw pointers. Kernels assume that their
// arguments are right; ops.cpp has checked them. Scalars that belong to a row are double, so that
// only the arithmetic over the vocabulary is float32 (float64 for float64 logits).
#pragma once

#include <cstdint>

namespace opd {

enum class DType : int { f32, bf16, f16, f64 };

// Rows are read in chunks of this many logits; the last one is filled up with -inf.
constexpr int64_t kChunk = 128;

struct Row {
  const void* data;
  DType dtype;
  int64_t valid;  // columns that take part in the softmax
};

// Softmax of logits / temperature: probability = exp((z - shift) / temperature - log_sum).
// A row without a possible token has shift -inf and log_sum 0.
struct RowStats {
  double shift;
  double log_sum;
  double entropy;
};

// Gradient of a loss of log-probs, entropy and tail, in one pass over a row:
//   dz[v] = exp(logp[v]) * (dense + slope * logp[v]) / temperature          for v not in ids
//   dz[v] = (exp(logp[v]) * (dense + slope * logp[v]) + grad[k]) / temperature   for v = ids[k]
// With `outside`, the first line is exp(logp under outside_stats) * outside_dense instead.
template <class A>
struct ScatterRow {
  Row row;
  void* out;     // may be row.data
  int64_t size;  // columns of out; those from row.valid on become 0
  RowStats stats;
  double dense, slope;
  bool outside;
  RowStats outside_stats;
  double outside_dense;
  const int64_t* ids;  // distinct
  const A* grad;
  int64_t num_ids;
  A* scratch;  // [num_ids]
  double inv_temperature;
};

enum class Divergence : int { reverse = 0, forward = 1, jsd = 2 };

struct DivergenceRow {
  Row student, teacher;
  RowStats student_stats, teacher_stats;
  Divergence kind;
  double beta;
  double inv_temperature;
};

// The gradient of a divergence is exp(logp) * (h - center), with h per token and one center.
struct DivergenceValue {
  double value;
  double center;
};

struct TopkRow {
  Row row;
  int64_t k;
  int64_t* ids;       // [k]
  float* peaks;       // scratch [ceil(valid / kChunk)]
  double inv_temperature;
};

template <class A>
struct Kernels {
  void (*stats)(const Row& row, double inv_temperature, bool with_entropy, RowStats* out);
  void (*outside)(const Row& row, double inv_temperature, const int64_t* sorted_ids,
                  int64_t num_ids, RowStats* out);
  void (*scatter)(const ScatterRow<A>& args);
  DivergenceValue (*divergence)(const DivergenceRow& args);
  void (*divergence_grad)(const DivergenceRow& args, double center, double grad, void* out,
                          int64_t size);
};

const Kernels<float>& kernels_portable();
const Kernels<double>& kernels_double();
#if defined(__x86_64__)
const Kernels<float>& kernels_avx2();
const Kernels<float>& kernels_avx512();
#endif

}  // namespace opd
