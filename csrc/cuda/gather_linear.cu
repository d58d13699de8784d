// Products with K rows of the head per row of hidden states, and their gradients. Every sum has a
// fixed order and no two blocks add to the same number: results are the same bits in every run.
#include "device.cuh"

namespace opd::cuda {
namespace {

constexpr int kNarrow = 256;

// A warp takes a row of the head, the block the K rows of one row of hidden states.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) gather_linear(GatherLinear a) {
  constexpr int n = kVector<T>;
  const AnyRow hidden(a.hidden, blockIdx.x);
  const int64_t* ids = a.ids + blockIdx.x * a.k;
  for (int64_t i = threadIdx.x / 32; i < a.k; i += kWarps) {
    const bool known = ids[i] >= 0 && ids[i] < a.head.num;
    float sum = 0.0f;
    if (known) {
      const T* row = row_of<T>(a.head, ids[i]);
      for (int64_t c = first_column(row) + threadIdx.x % 32 * n; c < a.head.valid; c += 32 * n) {
        float w[n], h[n];
        load_columns(row, c, a.head.valid, 0.0f, w);
        hidden.columns(c, 0.0f, h);
#pragma unroll
        for (int j = 0; j < n; ++j) sum = fmaf(w[j], h[j], sum);
      }
    }
    sum = warp_reduce(sum, Sum());
    if (threadIdx.x % 32 == 0) a.out[blockIdx.x * a.k + i] = known ? sum * a.scale : NAN;
  }
}

// Per column, the sum over k of grad[n, k] * head[ids[n, k]], in the order of k.
template <class T>
__global__ void __launch_bounds__(kNarrow) gather_linear_hidden(GatherLinearHidden a) {
  constexpr int n = kVector<T>;
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * kNarrow + threadIdx.x) * n;
  if (c >= a.head.valid) return;
  const int64_t* ids = a.ids + blockIdx.x * a.k;
  const float* grad = a.grad + blockIdx.x * a.k;
  float sum[n] = {};
#pragma unroll 4
  for (int64_t i = 0; i < a.k; ++i) {
    const bool known = ids[i] >= 0 && ids[i] < a.head.num;
    const float g = known ? grad[i] : NAN;
    float w[n];
    load_columns(row_of<T>(a.head, known ? ids[i] : 0), c, a.head.valid, 0.0f, w);
#pragma unroll
    for (int j = 0; j < n; ++j) sum[j] = fmaf(g, w[j], sum[j]);
  }
  AnyRow(a.out, blockIdx.x).set_columns(c, sum);
}

// buffer[id] += the sum of grad[n, k] * hidden[n] over ids[n, k] == id, in the order of (n, k),
// rounded once. A block takes the run of equal ids that begins at its place, or nothing.
template <class T>
__global__ void __launch_bounds__(kNarrow) gather_linear_head(GatherLinearHead a) {
  constexpr int n = kVector<T>;
  const int64_t begin = blockIdx.x, id = a.sorted_ids[begin];
  if (begin > 0 && a.sorted_ids[begin - 1] == id) return;
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * kNarrow + threadIdx.x) * n;
  if (c >= a.hidden.valid || id < 0 || id >= a.buffer.num) return;
  float sum[n] = {};
  for (int64_t i = begin; i < a.total && a.sorted_ids[i] == id; ++i) {
    const int64_t place = a.positions[i];
    float h[n];
    load_columns(row_of<T>(a.hidden, place / a.k), c, a.hidden.valid, 0.0f, h);
#pragma unroll
    for (int j = 0; j < n; ++j) sum[j] = fmaf(a.grad[place], h[j], sum[j]);
  }
  const AnyRow row(a.buffer, id);
  float old[n];
  row.columns(c, 0.0f, old);
#pragma unroll
  for (int j = 0; j < n; ++j) sum[j] += old[j];
  row.set_columns(c, sum);
}

template <class T>
dim3 narrow_grid(int64_t rows, int64_t columns) {
  const int64_t step = kNarrow * kVector<T>;
  return dim3(rows, (columns + step - 1) / step);
}

}  // namespace

int launch(const GatherLinear& a, Launch where) {
  return with_dtype(a.head.dtype, [&](auto zero) {
    return launch_on(where, gather_linear<decltype(zero)>, dim3(a.hidden.num), kThreads, 0, a);
  });
}

int launch(const GatherLinearHidden& a, Launch where) {
  return with_dtype(a.head.dtype, [&](auto zero) {
    using T = decltype(zero);
    const dim3 grid = narrow_grid<T>(a.out.num, a.head.valid);
    return launch_on(where, gather_linear_hidden<T>, grid, kNarrow, 0, a);
  });
}

int launch(const GatherLinearHead& a, Launch where) {
  return with_dtype(a.hidden.dtype, [&](auto zero) {
    using T = decltype(zero);
    const dim3 grid = narrow_grid<T>(a.total, a.hidden.valid);
    return launch_on(where, gather_linear_head<T>, grid, kNarrow, 0, a);
  });
}

}  // namespace opd::cuda
