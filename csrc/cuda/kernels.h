// The launches of the CUDA kernels: raw pointers, int64 and a stream, no torch. They assume that
// their arguments are right; ops.cpp has checked them. Each returns a cudaError_t, 0 for success.
// Every tensor but logits, hidden states and heads is contiguous; strides are in elements.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace opd::cuda {

// Top-K keeps its candidates in shared memory: at most so many ids, and chunks of kTopkChunk.
constexpr int64_t kMaxK = 1024;
constexpr int64_t kTopkChunk = 512;
constexpr int64_t kMaxChunks = 8192;
// The columns that a set of ids is a bit mask over, 96 KiB of shared memory.
constexpr int64_t kMaxMasked = 96 * 1024 * 8;

struct Launch {
  int device;
  void* stream;
};

// N rows of logits, of which the first `valid` columns count.
struct Rows {
  void* data;
  int64_t stride, num, valid;
  DType dtype;
};

struct GatherLogp {
  Rows logits;
  const int64_t* ids;  // [N, K]; -1 is no id
  int64_t k;
  double inv_temperature;
  float *logp, *lse, *stats;      // [N, K], [N], [N, 2]
  float* entropy;                 // [N], or null
  float *tail_logp, *tail_stats;  // [N], [N, 2]; both or neither null
};

// csrc/cpu/kernels.h, ScatterRow, says what is computed.
struct GatherBackward {
  Rows logits;
  void* out;  // may be the logits
  DType out_dtype;  // that of the logits, or a 16-bit type for float32 logits
  int64_t out_stride, size;
  const int64_t* ids;  // [N, K]
  int64_t k;
  const float *grad, *stats, *dense;     // [N, K], [N, 2], [N]
  const float* slope;                    // [N], or null
  const float *tail_stats, *tail_dense;  // [N, 2], [N], or null
  float* scratch;                        // [N, K]
  double inv_temperature;
};

struct TopkLogp {
  Rows logits;
  const int64_t* token_ids;  // [N], or null
  int64_t k;
  double inv_temperature;
  int64_t* ids;                   // [N, K]
  float *logp, *lse, *tail_logp;  // [N, K], [N], [N]
  float* token_logp;              // [N], or null
};

struct FullKl {
  Rows student, teacher;
  int divergence;  // 0 reverse, 1 forward, 2 jsd
  double beta, inv_temperature;
  float *value, *stats;  // [N], [N, 5]: shift and log_sum of both, center
};

struct FullKlBackward {
  Rows student, teacher;
  void* out;  // may be the student
  DType out_dtype;  // as above
  int64_t out_stride, size;
  int divergence;
  double beta, inv_temperature;
  const float *stats, *grad;  // [N, 5], [N]
};

// hidden [N, D] and head [V, D] as Rows with `valid` = D.
struct GatherLinear {
  Rows hidden, head;
  const int64_t* ids;  // [N, K]
  int64_t k;
  double scale;
  float* out;  // [N, K]
};

struct GatherLinearHidden {
  Rows head;
  const int64_t* ids;  // [N, K]
  const float* grad;   // [N, K]
  int64_t k;
  Rows out;  // [N, D]
};

struct GatherLinearHead {
  Rows hidden, buffer;
  const int64_t *sorted_ids, *positions;  // [N * K]: ids in order, and their places in ids [N, K]
  const float* grad;                      // [N, K]
  int64_t k, total;
};

// out = factor * source, of `size` numbers each.
struct Scale {
  const void* source;
  void* out;  // may be the source
  DType dtype, out_dtype;
  int64_t size;
  const float* factor;  // one
};

int launch(const GatherLogp&, Launch);
int launch(const GatherBackward&, Launch);
int launch(const TopkLogp&, Launch);
int launch(const FullKl&, Launch);
int launch(const FullKlBackward&, Launch);
int launch(const GatherLinear&, Launch);
int launch(const GatherLinearHidden&, Launch);
int launch(const GatherLinearHead&, Launch);
int launch(const Scale&, Launch);
const char* error_text(int error);

}  // namespace opd::cuda
