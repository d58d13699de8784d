// What a CPU kernel does: one row of logits at a time, on raw pointers. Kernels assume that their
// arguments are right; ops.cpp has checked them. Scalars that belong to a row are double, so that
// only the arithmetic over the vocabulary is float32 (float64 for float64 logits).
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace opd {

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
  void* out;        // may be row.data
  DType out_dtype;  // that of the row, or a 16-bit type for a float32 row
  int64_t size;     // columns of out; those from row.valid on become 0
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

// What a pass over a row leaves behind for the selection, per group of chunks (`columns` logits):
// the largest logit, and the sum of exp((z - maxima[i]) / temperature), where maxima[i] is the
// running maximum.
template <class A>
struct ChunkSums {
  A* peaks;
  A* sums;
  A* maxima;
  int64_t columns;
};

template <class A>
struct Kernels {
  void (*stats)(const Row& row, double inv_temperature, bool with_entropy, RowStats* out);
  void (*outside)(const Row& row, double inv_temperature, const int64_t* sorted_ids,
                  int64_t num_ids, RowStats* out);
  void (*scatter)(const ScatterRow<A>& args);
  DivergenceValue (*divergence)(const DivergenceRow& args);
  void (*divergence_grad)(const DivergenceRow& args, double center, double grad, void* out,
                          DType out_dtype, int64_t size);
  // Top-K: one pass; then the candidates, as (value, id) in ascending order of id: all logits above
  // the threshold, and the first k equal to it (NaN counts as -inf). Returns how many.
  void (*chunks)(const Row& row, double inv_temperature, const ChunkSums<A>& out, RowStats* stats);
  A (*kth)(const A* values, int64_t n, int64_t k, void* scratch);  // k-th largest; scratch [n] A
  int64_t (*candidates)(const Row& row, const ChunkSums<A>& chunks, A threshold, int64_t k,
                        A* values, int64_t* ids);
  // Sum of exp((z - stats.shift) / temperature) outside ascending ids, from the chunks' sums.
  double (*outside_sum)(const Row& row, double inv_temperature, const ChunkSums<A>& chunks,
                        const RowStats& stats, const int64_t* sorted_ids, int64_t num_ids);
  // Rows of a matrix by index. dots: out[k] = scale * <vector, row ids[k]>;
  // combine: out = sum of weights[k] * row ids[k]. `vector` and `out` are padded to kChunk.
  void (*dots)(const A* vector, const Row& first, int64_t stride, const int64_t* ids, int64_t k,
               double scale, A* out);
  void (*combine)(const A* weights, const Row& first, int64_t stride, const int64_t* ids,
                  int64_t k, A* out);
  void (*load)(const Row& row, A* out);  // padded to kChunk with 0
  void (*store)(const A* values, void* out, DType dtype, int64_t n, bool add);
  void (*scale)(const Row& row, double factor, void* out, DType dtype);  // out may be the row
};

const Kernels<float>& kernels_portable();
const Kernels<double>& kernels_double();
#if defined(__x86_64__)
const Kernels<float>& kernels_avx2();
const Kernels<float>& kernels_avx512();
#endif

}  // namespace opd
