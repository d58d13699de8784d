// Log-probs at ids under the softmax of a row, and the one backward of every loss of them.
#include "device.cuh"

namespace opd::cuda {
namespace {

// One read. With `tail` also the softmax of the complement of the ids, in the same pass: the ids
// are bits in shared memory, so that repeated ones count once and every sum has a fixed order.
template <class T, bool entropy, bool tail>
__global__ void __launch_bounds__(kThreads, 2) gather_logp(GatherLogp a) {
  OPD_DYNAMIC_SHARED(uint32_t, words);
  const Mask mask{words};
  const int64_t n = blockIdx.x;
  const int t = threadIdx.x;
  const T* row = row_of<T>(a.logits, n);
  const int64_t* ids = a.ids + n * a.k;
  const int64_t valid = a.logits.valid;
  const float scale = static_cast<float>(a.inv_temperature * kLog2e);
  if (tail) {
    for (int64_t i = t; i < Mask::size(valid); i += kThreads) words[i] = 0;
    __syncthreads();
    for (int64_t i = t; i < a.k; i += kThreads)
      if (ids[i] >= 0 && ids[i] < valid) mask.insert(ids[i]);
    __syncthreads();
  }
  RowSum total = sum_row<entropy, tail>(row, valid, scale, mask);
  if (tail) {
    const RowStats outside = total.stats(a.inv_temperature);
    RowSum inside;
    for (int64_t i = 32 * t; i < valid; i += 32 * kThreads) {
      for (uint32_t bits = mask.from(i); bits != 0; bits &= bits - 1) {
        const float z[1] = {to_float(row[i + __ffs(bits) - 1])};
        inside.add<false>(z, scale);
      }
    }
    inside.across_block<false>(scale);
    const float max = fmaxf(total.max, inside.max);
    total.move<false>(max, scale);
    inside.move<false>(max, scale);
    total.sum += inside.sum;
    if (t == 0) {
      a.tail_stats[2 * n] = outside.shift;
      a.tail_stats[2 * n + 1] = outside.log_sum;
      a.tail_logp[n] = tail_of(outside, total.stats(a.inv_temperature), a.inv_temperature);
    }
  }
  const RowStats s = total.stats(a.inv_temperature);
  if (t == 0) {
    a.stats[2 * n] = s.shift;
    a.stats[2 * n + 1] = s.log_sum;
    a.lse[n] = lse_of(s, a.inv_temperature);
    if (entropy) a.entropy[n] = s.entropy;
  }
  for (int64_t i = t; i < a.k; i += kThreads) {
    float value = -INFINITY;
    if (ids[i] >= valid)
      value = NAN;  // never read
    else if (ids[i] >= 0)
      value = logp_of(to_float(row[ids[i]]), s, a.inv_temperature);
    a.logp[n * a.k + i] = value;
  }
}

// Over the dense part of a row: exp(x / temperature) * (constant + linear * x), x = z - shift.
template <class T, class O, bool with_slope>
__device__ void scatter_dense(const GatherBackward& a, int64_t n, float shift, float constant,
                              float linear) {
  constexpr int width = kVector<T>;
  const T* row = row_of<T>(a.logits, n);
  O* out = static_cast<O*>(a.out) + n * a.out_stride;
  const float scale = static_cast<float>(a.inv_temperature * kLog2e);
  const float lowest = -160.0f / scale;  // exp is 0 from here on, and linear * x is finite
  for (int64_t c = first_column(row) + threadIdx.x * width; c < a.size;
       c += kLoads * width * kThreads) {
    Packed<T> raw[kLoads];
    load_ahead(row, c, a.logits.valid, raw);
#pragma unroll
    for (int t = 0; t < kLoads; ++t) {
      const int64_t i = c + t * width * kThreads;
      float z[width];
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const float x = to_float(raw[t].item[j]) - shift;
        const float factor = with_slope ? fmaf(linear, fmaxf(x, lowest), constant) : constant;
        z[j] = i + j < a.logits.valid ? exp2_fast(x * scale) * factor : 0.0f;
      }
      store_columns(out, i, a.size, z);
    }
  }
}

// One read, one write. What belongs to an id is computed from the logit before that is overwritten,
// with the gradients of equal ids added up in the order of k, and written last: rounded once.
template <class T, class O>
__global__ void __launch_bounds__(kThreads, 2) gather_backward(GatherBackward a) {
  const int64_t n = blockIdx.x;
  const T* row = row_of<T>(a.logits, n);
  O* out = static_cast<O*>(a.out) + n * a.out_stride;
  const int64_t* ids = a.ids + n * a.k;
  const float* grad = a.grad + n * a.k;
  float* value = a.scratch + n * a.k;
  const double shift = a.stats[2 * n], log_sum = a.stats[2 * n + 1], dense = a.dense[n];
  const double slope = a.slope ? a.slope[n] : 0.0;
  const bool outside = a.tail_stats != nullptr;
  const double outside_dense = outside ? a.tail_dense[n] : 0.0;
  const bool dead = shift == -INFINITY;
  const bool silent = dense == 0.0 && slope == 0.0 && outside_dense == 0.0;

  const double weight = exp(-log_sum) * a.inv_temperature;
  const double constant = (dense - slope * log_sum) * weight;
  const double linear = slope * weight * a.inv_temperature;
  for (int64_t i = threadIdx.x; i < a.k; i += kThreads) {
    const int64_t id = ids[i];
    if (dead || id < 0 || id >= a.logits.valid) continue;
    float sum = 0.0f;
    for (int64_t j = 0; j < a.k; ++j)
      if (ids[j] == id) sum += grad[j];
    double joined = sum * a.inv_temperature;
    if (!silent) {
      const double x = to_float(row[id]) - shift;
      const double bounded = x < kLowest ? kLowest : x;
      joined += exp(x * a.inv_temperature) * (constant + linear * bounded);
    }
    value[i] = joined;
  }
  __syncthreads();
  if (dead || silent) {
    fill_with_zero(out, a.size);  // nothing of the row is read
  } else if (outside) {
    const double outside_shift = a.tail_stats[2 * n];
    const bool nothing = outside_shift == -INFINITY;
    const double factor = outside_dense * exp(-a.tail_stats[2 * n + 1]) * a.inv_temperature;
    scatter_dense<T, O, false>(a, n, nothing ? 0.0 : outside_shift, nothing ? 0.0 : factor, 0.0f);
  } else if (slope != 0.0) {
    scatter_dense<T, O, true>(a, n, shift, constant, linear);
  } else {
    scatter_dense<T, O, false>(a, n, shift, constant, 0.0f);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < a.k; i += kThreads)
    if (!dead && ids[i] >= 0 && ids[i] < a.logits.valid) assign(out[ids[i]], value[i]);
}

}  // namespace

int launch(const GatherLogp& a, Launch where) {
  return with_dtype(a.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = a.tail_logp ? gather_logp<T, false, true>
                        : a.entropy ? gather_logp<T, true, false>
                                    : gather_logp<T, false, false>;
    const int64_t shared = a.tail_logp ? 4 * Mask::size(a.logits.valid) : 0;
    return launch_on(where, kernel, dim3(a.logits.num), kThreads, shared, a);
  });
}

int launch(const GatherBackward& a, Launch where) {
  return with_dtypes(a.logits.dtype, a.out_dtype, [&](auto in, auto out) {
    const auto kernel = gather_backward<decltype(in), decltype(out)>;
    return launch_on(where, kernel, dim3(a.logits.num), kThreads, 0, a);
  });
}

#ifndef OPD_EMULATION
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
#else
const char* error_text(int) { return "emulated"; }
#endif

}  // namespace opd::cuda
