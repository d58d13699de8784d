// Divergence of two full rows, and its gradient with respect to the student's logits.
#include <type_traits>

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

// The other row of a kernel whose first one is of type T: `same` where it has that type too, and its
// whole vectors are aligned where the first row's are. Else it is read in the way that fits.
template <class T, bool same>
struct Other {
  const AnyRow any;
  using Raw = Packed<T>;
  __device__ __forceinline__ void load(int64_t i, Raw& out) const {
    load_raw(reinterpret_cast<const T*>(any.data), i, any.valid, out);
  }
};
template <class T>
struct Other<T, false> {
  const AnyRow any;
  using Raw = Packed<float, kVector<T>>;
  __device__ __forceinline__ void load(int64_t i, Raw& out) const {
    any.columns(i, -INFINITY, out.item);
  }
};

constexpr int kPairs = 2;  // 16-byte loads of either row, by a thread before it uses the first

// f(c, near, far) of kPairs vectors each, of which number t begins at column c + t * step.
template <class T, bool same, class F>
__device__ __forceinline__ void for_columns(const T* row, int64_t size, int64_t valid,
                                            const Other<T, same>& other, const F& f) {
  constexpr int n = kVector<T>, step = n * kThreads;
  for (int64_t c = first_column(row) + threadIdx.x * n; c < size; c += kPairs * step) {
    Packed<T> near[kPairs];
    typename Other<T, same>::Raw far[kPairs];
#pragma unroll
    for (int t = 0; t < kPairs; ++t) {
      load_raw(row, c + t * step, valid, near[t]);
      other.load(c + t * step, far[t]);
    }
    float z[kPairs * n], y[kPairs * n];
#pragma unroll
    for (int i = 0; i < kPairs * n; ++i) {
      z[i] = to_float(near[i / n].item[i % n]);
      y[i] = to_float(far[i / n].item[i % n]);
    }
    f(c, z, y);
  }
}

// The softmax of two rows, and between them sum p log p / q but for its constant, in one pass: of
// the law p that is `from`, exp(x) (x - y), x and y as in Pair and without the temperature.
struct CrossSum {
  RowSum from, to;
  double cross = 0.0;
  bool excluded = false;  // a needed log-prob is -inf

  template <bool crossed, int n>
  __device__ __forceinline__ void add(const float (&z)[n], const float (&other)[n], float scale) {
    float peak = z[0], height = other[0];
#pragma unroll
    for (int j = 1; j < n; ++j) {
      peak = fmaxf(peak, z[j]);
      height = fmaxf(height, other[j]);
    }
    if (peak > from.max || height > to.max)
      move(fmaxf(peak, from.max), fmaxf(height, to.max), scale);
    float total = 0.0f, far_total = 0.0f, product = 0.0f;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float x = z[j] - from.max, y = other[j] - to.max, e = exp2_fast(x * scale);
      total += e;
      far_total += exp2_fast(y * scale);
      if (crossed) {
        const float above = fmaxf(kLowest, x), below = fmaxf(kLowest, y);
        product += e * (above - below);
        excluded |= above > kLowest && below <= kLowest;
      }
    }
    from.sum += total;
    to.sum += far_total;
    if (crossed) cross += product;
  }

  __device__ __forceinline__ void move(float peak, float height, float scale) {
    if (from.sum != 0.0) {
      const float rise = peak - from.max, far_rise = height - to.max;
      const double moved = static_cast<double>(rise) - far_rise;
      cross = (cross - moved * from.sum) * exp2_fast(-rise * scale);
    }
    from.move<false>(peak, scale);
    to.move<false>(height, scale);
  }

  template <bool crossed>
  __device__ void across_block(float scale) {
    move(block_reduce(from.max, Max()), block_reduce(to.max, Max()), scale);
    from.sum = block_reduce(from.sum, Sum());
    to.sum = block_reduce(to.sum, Sum());
    if (crossed) {
      cross = block_reduce(cross, Sum());
      excluded = block_reduce(excluded ? 1.0f : 0.0f, Max()) > 0.0f;
    }
  }
};

template <class T, bool same, Kind kind>
__global__ void __launch_bounds__(kThreads, 2) full_kl(FullKl a) {
  const int64_t n = blockIdx.x, valid = a.student.valid;
  const T* row = row_of<T>(a.student, n);
  const Other<T, same> teacher{AnyRow(a.teacher, n)};
  const float scale = static_cast<float>(a.inv_temperature * kLog2e);
  constexpr bool crossed = kind != kJsd, forward = kind == kForward;
  CrossSum sums;
  for_columns(row, valid, valid, teacher, [&](int64_t, const auto& near, const auto& far) {
    if (forward)
      sums.add<crossed>(far, near, scale);
    else
      sums.add<crossed>(near, far, scale);
  });
  sums.across_block<crossed>(scale);
  const RowStats from = sums.from.stats(a.inv_temperature), to = sums.to.stats(a.inv_temperature);
  const RowStats s = forward ? to : from, t = forward ? from : to;

  double value = 0.0, center = 0.0;
  if (crossed) {
    // With no law `from` every term is 0, and so is the divergence.
    if (sums.from.sum != 0.0)
      value = sums.cross / sums.from.sum * a.inv_temperature + to.log_sum - from.log_sum;
    if (sums.excluded) value = INFINITY;
    center = value;
  } else {
    const Pair pair(s, t, a.inv_temperature, a.beta);
    for_columns(row, valid, valid, teacher, [&](int64_t, const auto& near, const auto& far) {
      float total = 0.0f, part = 0.0f;
#pragma unroll
      for (int j = 0; j < kPairs * kVector<T>; ++j) {
        const float x = pair.x(near[j]), y = pair.y(far[j]);
        const float d = (y - x) + pair.offset, mixture = pair.log_mixture(d);
        const float h = (1.0f - pair.beta) * pair.p(x) * (-mixture - fmaxf(d, 0.0f));
        part += h;  // (1 - beta) p log(p / m)
        total += h + pair.beta * pair.q(y) * (fminf(d, 0.0f) - mixture);
      }
      value += total;
      center += part;
    });
    value = block_reduce(value, Sum());
    center = block_reduce(center, Sum());
  }
  if (threadIdx.x != 0) return;
  a.value[n] = value;
  const double stats[5] = {s.shift, s.log_sum, t.shift, t.log_sum, center};
  for (int i = 0; i < 5; ++i) a.stats[5 * n + i] = stats[i];
}

// exp(logp) * (h - center) * grad / temperature, with h = log p - log q (reverse), -q / p (forward,
// center -1), (1 - beta) log(p / m) (jsd).
template <class T, class O, bool same, Kind kind>
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
  const Other<T, same> teacher{AnyRow(a.teacher, n)};
  for_columns(row, a.size, a.student.valid, teacher, [&](int64_t c, const auto& near, auto& far) {
    constexpr int width = kVector<T>;
#pragma unroll
    for (int t = 0; t < kPairs; ++t) {
      const int64_t i = c + t * width * kThreads;
      float grad[width];
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const float x = pair.x(near[t * width + j]), y = pair.y(far[t * width + j]);
        const float p = Pair::exp_(x) * p_factor;
        float d;
        if (kind == kReverse) {
          d = p * ((x - y) - middle);
        } else if (kind == kForward) {
          d = p - Pair::exp_(y) * q_factor;
        } else {
          const float gap = (y - x) + pair.offset;
          d = p * ((1.0f - pair.beta) * (-pair.log_mixture(gap) - fmaxf(gap, 0.0f)) - middle);
        }
        grad[j] = i + j < a.student.valid ? d : 0.0f;
      }
      store_columns(out, i, a.size, grad);
    }
  });
}

// Whether all rows of the teacher are of the student's type, with their whole vectors in step.
bool in_step(const Rows& student, const Rows& teacher) {
  const int64_t size = student.dtype == DType::f32 ? 4 : 2;
  const auto gap =
      reinterpret_cast<uintptr_t>(student.data) - reinterpret_cast<uintptr_t>(teacher.data);
  return student.dtype == teacher.dtype && gap % 16 == 0 &&
         (student.num < 2 || (student.stride - teacher.stride) * size % 16 == 0);
}

template <class F>
int with_kind(int divergence, const F& f) {
  if (divergence == kReverse) return f(std::integral_constant<Kind, kReverse>());
  if (divergence == kForward) return f(std::integral_constant<Kind, kForward>());
  return f(std::integral_constant<Kind, kJsd>());
}

}  // namespace

int launch(const FullKl& a, Launch where) {
  return with_dtype(a.student.dtype, [&](auto zero) {
    return with_kind(a.divergence, [&](auto kind) {
      const auto kernel = in_step(a.student, a.teacher)
                              ? full_kl<decltype(zero), true, decltype(kind)::value>
                              : full_kl<decltype(zero), false, decltype(kind)::value>;
      return launch_on(where, kernel, dim3(a.student.num), kThreads, 0, a);
    });
  });
}

int launch(const FullKlBackward& a, Launch where) {
  return with_dtypes(a.student.dtype, a.out_dtype, [&](auto in, auto to) {
    using T = decltype(in);
    using O = decltype(to);
    return with_kind(a.divergence, [&](auto kind) {
      const auto kernel = in_step(a.student, a.teacher)
                              ? full_backward<T, O, true, decltype(kind)::value>
                              : full_backward<T, O, false, decltype(kind)::value>;
      return launch_on(where, kernel, dim3(a.student.num), kThreads, 0, a);
    });
  });
}

}  // namespace opd::cuda
