// Divergence of two full rows, and its gradient with respect to the student's logits.
#include "device.cuh"

namespace opd::cuda {
namespace {

enum Kind { kReverse, kForward, kJsd };

// x = (z - shift) / temperature of the student, y of the teacher, -inf held at kLowest so that
// exp(x) * anything is 0 there. `p` and `q` are the probabilities.
struct Pair {
  float student_shift, teacher_shift, inv_temperature, p_scale, q_scale;
  float offset;  // log q - log p = y - x + offset
  float beta;

  __device__ Pair(const RowStats& s, const RowStats& t, double inv_t, double b)
      : student_shift(s.shift == -INFINITY ? 0.0 : s.shift),
        teacher_shift(t.shift == -INFINITY ? 0.0 : t.shift),
        inv_temperature(inv_t),
        p_scale(exp(-s.log_sum)),
        q_scale(exp(-t.log_sum)),
        offset(s.log_sum - t.log_sum),
        beta(b) {}
  __device__ __forceinline__ float x(float z) const {
    return fmaxf(kLowest, (z - student_shift) * inv_temperature);
  }
  __device__ __forceinline__ float y(float z) const {
    return fmaxf(kLowest, (z - teacher_shift) * inv_temperature);
  }
  __device__ __forceinline__ float p(float x) const { return exp_(x) * p_scale; }
  __device__ __forceinline__ float q(float y) const { return exp_(y) * q_scale; }
  __device__ static __forceinline__ float exp_(float x) {
    return exp2_fast(x * static_cast<float>(kLog2e));
  }
  // log of the mixture over the larger of p and q, exact far from 0; d = log q - log p.
  __device__ __forceinline__ float log_mixture(float d) const {
    const float e = exp_(-fabsf(d));
    return logf(d > 0 ? fmaf(1.0f - beta, e, beta) : fmaf(beta, e, 1.0f - beta));
  }
};

template <class T, class F>
__device__ __forceinline__ void for_columns(const T* row, int64_t size, int64_t valid,
                                            const AnyRow& other, const F& f) {
  constexpr int n = kVector<T>;
  for (int64_t c = first_column(row) + threadIdx.x * n; c < size; c += n * kThreads) {
    float near[n], far[n];
    load_columns(row, c, valid, -INFINITY, near);
    other.columns(c, -INFINITY, far);
    f(c, near, far);
  }
}

template <class T, Kind kind>
__global__ void __launch_bounds__(kThreads, 2) full_kl(FullKl a) {
  const int64_t n = blockIdx.x, valid = a.student.valid;
  const T* row = row_of<T>(a.student, n);
  const AnyRow teacher(a.teacher, n);
  const float scale = static_cast<float>(a.inv_temperature * kLog2e);
  const RowStats s = sum_row<false, false>(row, valid, scale, Mask()).stats(a.inv_temperature);
  RowSum far_sum;
  for (int64_t c = first_column(row) + threadIdx.x * kVector<T>; c < valid;
       c += kVector<T> * kThreads) {
    float z[kVector<T>];
    teacher.columns(c, -INFINITY, z);
    far_sum.add<false>(z, scale);
  }
  far_sum.across_block<false>(scale);
  const RowStats t = far_sum.stats(a.inv_temperature);

  const Pair pair(s, t, a.inv_temperature, a.beta);
  double value = 0.0, center = 0.0;
  bool excluded = false;  // a needed log-prob is -inf
  for_columns(row, valid, valid, teacher, [&](int64_t, const auto& near, const auto& far) {
    float total = 0.0f, part = 0.0f;
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const float x = pair.x(near[j]), y = pair.y(far[j]);
      if (kind == kJsd) {
        const float d = (y - x) + pair.offset, mixture = pair.log_mixture(d);
        const float h = (1.0f - pair.beta) * pair.p(x) * (-mixture - fmaxf(d, 0.0f));
        part += h;  // (1 - beta) p log(p / m)
        total += h + pair.beta * pair.q(y) * (fminf(d, 0.0f) - mixture);
      } else {
        const float from = kind == kForward ? y : x, to = kind == kForward ? x : y;
        total += (kind == kForward ? pair.q(y) : pair.p(x)) * (from - to);
        excluded |= from > kLowest && to <= kLowest;
      }
    }
    value += total;
    center += part;
  });
  value = block_reduce(value, Sum());
  if (kind == kJsd) {
    center = block_reduce(center, Sum());
  } else {
    value += kind == kForward ? s.log_sum - t.log_sum : t.log_sum - s.log_sum;
    // With no law on the near side every term is 0, and so is the divergence.
    if ((kind == kForward ? t : s).shift == -INFINITY) value = 0.0;
    if (block_reduce(excluded ? 1.0f : 0.0f, Max()) > 0.0f) value = INFINITY;
    center = value;
  }
  if (threadIdx.x != 0) return;
  a.value[n] = value;
  const double stats[5] = {s.shift, s.log_sum, t.shift, t.log_sum, center};
  for (int i = 0; i < 5; ++i) a.stats[5 * n + i] = stats[i];
}

// exp(logp) * (h - center) * grad / temperature, with h = log p - log q (reverse), -q / p (forward,
// center -1), (1 - beta) log(p / m) (jsd).
template <class T, class O, Kind kind>
__global__ void __launch_bounds__(kThreads, 2) full_backward(FullKlBackward a) {
  const int64_t n = blockIdx.x;
  const T* row = row_of<T>(a.student, n);
  O* out = static_cast<O*>(a.out) + n * a.out_stride;
  const float* stats = a.stats + 5 * n;
  const RowStats s{stats[0], stats[1], 0.0}, t{stats[2], stats[3], 0.0};
  // Without a student, or for the forward KL without a teacher, every term is 0.
  if (a.grad[n] == 0.0f || s.shift == -INFINITY || (kind == kForward && t.shift == -INFINITY)) {
    fill_with_zero(out, a.size);
    return;
  }
  const Pair pair(s, t, a.inv_temperature, a.beta);
  const double factor = a.grad[n] * a.inv_temperature;
  const float p_factor = exp(-s.log_sum) * factor, q_factor = exp(-t.log_sum) * factor;
  const float middle = kind == kReverse ? stats[4] + s.log_sum - t.log_sum : stats[4];
  const AnyRow teacher(a.teacher, n);
  for_columns(row, a.size, a.student.valid, teacher, [&](int64_t c, auto& near, const auto& far) {
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const float x = pair.x(near[j]), y = pair.y(far[j]), p = Pair::exp_(x) * p_factor;
      float d;
      if (kind == kReverse) {
        d = p * ((x - y) - middle);
      } else if (kind == kForward) {
        d = p - Pair::exp_(y) * q_factor;
      } else {
        const float gap = (y - x) + pair.offset;
        d = p * ((1.0f - pair.beta) * (-pair.log_mixture(gap) - fmaxf(gap, 0.0f)) - middle);
      }
      near[j] = c + j < a.student.valid ? d : 0.0f;
    }
    store_columns(out, c, a.size, near);
  });
}

}  // namespace

int launch(const FullKl& a, Launch where) {
  return with_dtype(a.student.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = a.divergence == kReverse   ? full_kl<T, kReverse>
                        : a.divergence == kForward ? full_kl<T, kForward>
                                                   : full_kl<T, kJsd>;
    return launch_on(where, kernel, dim3(a.student.num), kThreads, 0, a);
  });
}

int launch(const FullKlBackward& a, Launch where) {
  return with_dtypes(a.student.dtype, a.out_dtype, [&](auto in, auto to) {
    using T = decltype(in);
    using O = decltype(to);
    const auto kernel = a.divergence == kReverse   ? full_backward<T, O, kReverse>
                        : a.divergence == kForward ? full_backward<T, O, kForward>
                                                   : full_backward<T, O, kJsd>;
    return launch_on(where, kernel, dim3(a.student.num), kThreads, 0, a);
  });
}

}  // namespace opd::cuda
