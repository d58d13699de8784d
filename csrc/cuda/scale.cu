// A number times a tensor: the incoming gradient of a loss and gradients that are there already.
#include "device.cuh"

namespace opd::cuda {
namespace {

// A thread takes kLoads vectors, kThreads vectors apart, and reads all before it writes one.
template <class T, class O>
__global__ void __launch_bounds__(kThreads) scale(Scale a) {
  constexpr int width = kVector<T>;
  const T* source = static_cast<const T*>(a.source);
  O* out = static_cast<O*>(a.out);
  const float factor = *a.factor;
  const int64_t step = width * kThreads;
  const int64_t first = int64_t{blockIdx.x} * kLoads * step + threadIdx.x * width;
  float x[kLoads][width];
#pragma unroll
  for (int t = 0; t < kLoads; ++t)
    load_columns(source, first + t * step, a.size, 0.0f, x[t]);
#pragma unroll
  for (int t = 0; t < kLoads; ++t) {
#pragma unroll
    for (int j = 0; j < width; ++j) x[t][j] *= factor;
    store_columns(out, first + t * step, a.size, x[t]);
  }
}

}  // namespace

int launch(const Scale& a, Launch where) {
  return with_dtypes(a.dtype, a.out_dtype, [&](auto in, auto out) {
    constexpr int64_t step = kLoads * kVector<decltype(in)> * kThreads;
    const auto kernel = scale<decltype(in), decltype(out)>;
    return launch_on(where, kernel, dim3((a.size + step - 1) / step), kThreads, 0, a);
  });
}

}  // namespace opd::cuda
