// The kernels, once for every instruction set and number type (L: F32 or F64 of vec.h).
#pragma once

#include "vec.h"

namespace opd {
namespace {

// Sum of exp((z - max) / temperature) over a row, online: a chunk is read once; the running sum is
// rescaled only when a chunk's maximum exceeds all before it. The lanes of a vector add up at most
// kPending chunks in float32; sums over those are double.
template <class L>
struct Accumulator {
  using A = typename L::A;
  using V = typename L::V;
  static constexpr int kPending = 16;
  double inv_temperature;
  typename L::Exp exp;
  A max = L::lowest;  // finite, so that -inf - max is -inf and not NaN
  V maxima = L::set(L::lowest);
  double sum = 0.0;
  double weighted = 0.0;  // sum of exp(x) * x, x = (z - max) / temperature
  double group = 0.0;     // the part of the sum since the last end_group
  V group_peak = L::set(-INFINITY);
  int pending = 0;
  V total[2] = {L::set(0.0), L::set(0.0)}, product[2] = {L::set(0.0), L::set(0.0)};

  explicit Accumulator(double inv_t) : inv_temperature(inv_t), exp(inv_t) {}

  template <bool with_entropy>
  void flush() {
    const double last = vhsum(total[0] + total[1]);
    sum += last;
    group += last;
    total[0] = total[1] = L::set(0.0);
    if (with_entropy) {
      weighted += vhsum(product[0] + product[1]) * inv_temperature;
      product[0] = product[1] = L::set(0.0);
    }
    pending = 0;
  }

  template <bool with_entropy>
  void add(const A* z) {
    V peak = L::set(-INFINITY);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kChunk; i += L::width) peak = vmax(vload(z + i), peak);
    group_peak = vmax(peak, group_peak);
    if (vgt_bits(peak, maxima) != 0) {
      flush<with_entropy>();
      const A chunk_max = vhmax(peak);
      if (sum != 0.0) {
        const double gap = (static_cast<double>(max) - chunk_max) * inv_temperature;
        const double shrink = ::exp(gap);
        if (with_entropy) weighted = (weighted + gap * sum) * shrink;
        sum *= shrink;
        group *= shrink;
      }
      max = chunk_max;
      maxima = L::set(max);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < kChunk; i += 2 * L::width) {
      for (int j = 0; j < 2; ++j) {
        const V x = vload(z + i + j * L::width) - maxima;
        const V e = exp(x);
        total[j] = total[j] + e;
        if (with_entropy) product[j] = vfma(e, vmax(exp.lowest, x), product[j]);
      }
    }
    if (++pending == kPending) flush<with_entropy>();
  }

  // The largest logit since the last call (NaN ignored), and the sum since then, against `max`.
  A end_group(A* group_sum) {
    flush<false>();
    *group_sum = static_cast<A>(group);
    const A peak = vhmax(group_peak);
    group = 0.0;
    group_peak = L::set(-INFINITY);
    return peak;
  }

  RowStats stats() const {
    if (sum == 0.0) return {-INFINITY, 0.0, 0.0};
    const double log_sum = ::log(sum);
    const double entropy = log_sum - weighted / sum;
    return {max, log_sum, entropy < 0.0 ? 0.0 : entropy};
  }
};

template <class L>
void stats(const Row& row, double inv_temperature, bool with_entropy, RowStats* out) {
  alignas(64) typename L::A buffer[kChunk];
  Accumulator<L> rows(inv_temperature);
  if (with_entropy)
    for (int64_t c = 0; c < row.valid; c += kChunk)
      rows.template add<true>(fetch(row, c, buffer));
  else
    for (int64_t c = 0; c < row.valid; c += kChunk)
      rows.template add<false>(fetch(row, c, buffer));
  rows.template flush<true>();
  *out = rows.stats();
}

// The same over the complement of a few ids, in ascending order (repeated ones allowed).
template <class L>
void outside(const Row& row, double inv_temperature, const int64_t* ids, int64_t num_ids,
             RowStats* out) {
  using A = typename L::A;
  alignas(64) A buffer[kChunk];
  Accumulator<L> rows(inv_temperature);
  for (int64_t c = 0; c < row.valid; c += kChunk) {
    const A* z = fetch(row, c, buffer);
    if (num_ids > 0 && *ids < c + kChunk) {
      if (z != buffer) memcpy(buffer, z, sizeof buffer);
      for (; num_ids > 0 && *ids < c + kChunk; ++ids, --num_ids) buffer[*ids - c] = -INFINITY;
      z = buffer;
    }
    rows.template add<false>(z);
  }
  rows.template flush<false>();
  *out = rows.stats();
}

// See ScatterRow in kernels.h. The terms of the ids are computed in full precision from logits
// that were set aside before they were overwritten, and rounded once.
template <class L, bool with_slope>
void scatter_dense(const ScatterRow<typename L::A>& a, double shift, double scale, double slope) {
  using A = typename L::A;
  using V = typename L::V;
  alignas(64) A buffer[kChunk];
  const typename L::Exp exp(a.inv_temperature);
  const V m = L::set(shift), constant = L::set(scale), linear = L::set(slope);
  for (int64_t c = 0; c < a.row.valid; c += kChunk) {
    const int64_t n = a.row.valid - c;
    const A* z = fetch(a.row, c, buffer);
    A* out = place(a.out, a.out_dtype, c, n, buffer);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kChunk; i += L::width) {
      const V x = vload(z + i) - m;
      V factor = constant;
      if (with_slope) factor = vfma(linear, vmax(exp.lowest, x), constant);
      vstore(out + i, exp(x) * factor);
    }
    commit(a.out, a.out_dtype, c, n, out);
  }
}

template <class L>
void scatter(const ScatterRow<typename L::A>& a) {
  using A = typename L::A;
  const bool dead = a.stats.shift == -INFINITY;
  const bool empty = a.dense == 0.0 && a.slope == 0.0;
  const int64_t item = size_of(a.out_dtype);
  char* out = static_cast<char*>(a.out);
  bool silent = empty && (!a.outside || a.outside_dense == 0.0);
  if (dead || silent) {  // nothing of the row is read
    memset(out, 0, a.size * item);
    if (dead) return;
    for (int64_t k = 0; k < a.num_ids; ++k)
      store_at(a.out, a.out_dtype, a.ids[k], static_cast<A>(a.grad[k] * a.inv_temperature));
    return;
  }
  for (int64_t k = 0; k < a.num_ids; ++k) a.scratch[k] = load_at(a.row, a.ids[k], A());
  // exp(logp) * (dense + slope * logp) = exp(x / T) * (scale + rate * x), x = z - shift
  const double weight = ::exp(-a.stats.log_sum) * a.inv_temperature;
  const double scale = (a.dense - a.slope * a.stats.log_sum) * weight;
  const double rate = a.slope * weight * a.inv_temperature;
  if (a.outside) {
    const bool nothing = a.outside_stats.shift == -INFINITY;
    const double outer = a.outside_dense * ::exp(-a.outside_stats.log_sum) * a.inv_temperature;
    scatter_dense<L, false>(a, nothing ? 0.0 : a.outside_stats.shift, nothing ? 0.0 : outer, 0.0);
  } else if (a.slope != 0.0) {
    scatter_dense<L, true>(a, a.stats.shift, scale, rate);
  } else {
    scatter_dense<L, false>(a, a.stats.shift, scale, 0.0);
  }
  for (int64_t k = 0; k < a.num_ids; ++k) {
    const double x = static_cast<double>(a.scratch[k]) - a.stats.shift;
    const double bounded = x < static_cast<double>(L::lowest) ? static_cast<double>(L::lowest) : x;
    const double value = ::exp(x * a.inv_temperature) * (scale + rate * bounded) +
                         a.grad[k] * a.inv_temperature;
    store_at(a.out, a.out_dtype, a.ids[k], static_cast<A>(value));
  }
  memset(out + a.row.valid * item, 0, (a.size - a.row.valid) * item);
}

// ==== divergence of two rows ====
// x = (z - shift) / temperature of the student, y of the teacher; -inf is held at `lowest`, so
// that exp(x) * anything is 0 there; a token that only the other side excludes is found apart.

template <class L>
struct Mixture {  // u = log((1 - beta) + beta * exp(d)) in two parts that stay exact far from 0
  typename L::V one_minus, beta, log_part, bound;
  explicit Mixture(double b) : one_minus(L::set(1.0 - b)), beta(L::set(b)) {}
  // d = log q - log p. Sets log_part; log(m / p) = log_part + max(d, 0).
  void at(typename L::V d, const typename L::Exp& exp) {
    using V = typename L::V;
    const V zero = L::set(0.0);
    const V e = exp(vmin(d, zero - d));
    const V small = vfma(beta, e, one_minus), large = vfma(one_minus, e, beta);
    log_part = vlog(vif_gt(d, zero, large, small));
  }
};

template <class L>
DivergenceValue divergence(const DivergenceRow& a) {
  using A = typename L::A;
  using V = typename L::V;
  alignas(64) A student_buffer[kChunk], teacher_buffer[kChunk];
  const typename L::Exp exp(1.0);
  const bool no_student = a.student_stats.shift == -INFINITY;
  const bool no_teacher = a.teacher_stats.shift == -INFINITY;
  const V ms = L::set(no_student ? 0.0 : a.student_stats.shift);
  const V mt = L::set(no_teacher ? 0.0 : a.teacher_stats.shift);
  const V scale = L::set(a.inv_temperature), lowest = L::set(L::lowest), zero = L::set(0.0);
  const double ls = a.student_stats.log_sum, lt = a.teacher_stats.log_sum;
  const V offset = L::set(ls - lt);
  const V p_weight = L::set(::exp(-ls)), q_weight = L::set(::exp(-lt));
  const V p_share = L::set((1.0 - a.beta) * ::exp(-ls)), q_share = L::set(a.beta * ::exp(-lt));
  Mixture<L> mixture(a.beta);
  const bool forward = a.kind == Divergence::forward;
  double value = 0.0, center = 0.0;
  V excluded = zero;  // goes down to `lowest` when a needed log-prob is -inf
  for (int64_t c = 0; c < a.student.valid; c += kChunk) {
    const A* zs = fetch(a.student, c, student_buffer);
    const A* zt = fetch(a.teacher, c, teacher_buffer);
    V total = zero, other = zero;
    if (a.kind == Divergence::jsd) {
#pragma GCC unroll 2
      for (int64_t i = 0; i < kChunk; i += L::width) {
        const V x = vmax(lowest, (vload(zs + i) - ms) * scale);
        const V y = vmax(lowest, (vload(zt + i) - mt) * scale);
        const V d = (y - x) + offset;
        mixture.at(d, exp);
        const V p = exp(x) * p_share, q = exp(y) * q_share;
        const V h = p * (zero - mixture.log_part - vmax(d, zero));  // p log(p / m)
        other = other + h;
        total = total + (h + q * (vmin(d, zero) - mixture.log_part));
      }
    } else {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kChunk; i += L::width) {
        const V x = vmax(lowest, (vload(zs + i) - ms) * scale);
        const V y = vmax(lowest, (vload(zt + i) - mt) * scale);
        const V from = forward ? y : x, to = forward ? x : y;
        total = vfma(exp(from) * (forward ? q_weight : p_weight), from - to, total);
        excluded = vmin(vif_gt(from, lowest, to, zero), excluded);
      }
    }
    value += vhsum(total);
    center += vhsum(other);
  }
  if (a.kind == Divergence::jsd) return {value, center};
  const V worst = zero - excluded;
  if (vhmax(worst) >= -L::lowest) return {INFINITY, INFINITY};
  // With no law on the near side every term is 0, and so is the divergence.
  if (forward ? no_teacher : no_student) return {0.0, 0.0};
  value += forward ? ls - lt : lt - ls;
  return {value, value};
}

// d divergence / d student logits = exp(logp) * (h - center) * grad / temperature, with
// h = log p - log q (reverse), -q / p (forward, center -1), (1 - beta) log(p / m) (jsd).
template <class L>
void divergence_grad(const DivergenceRow& a, double center, double grad, void* out,
                     DType out_dtype, int64_t size) {
  using A = typename L::A;
  using V = typename L::V;
  const int64_t item = size_of(out_dtype);
  const bool no_student = a.student_stats.shift == -INFINITY;
  const bool no_teacher = a.teacher_stats.shift == -INFINITY;
  // Without a student, or for the forward KL without a teacher, every term is 0.
  if (grad == 0.0 || no_student || (no_teacher && a.kind == Divergence::forward)) {
    memset(out, 0, size * item);
    return;
  }
  alignas(64) A student_buffer[kChunk], teacher_buffer[kChunk];
  const typename L::Exp exp(1.0);
  const V ms = L::set(a.student_stats.shift);
  const V mt = L::set(no_teacher ? 0.0 : a.teacher_stats.shift);
  const V scale = L::set(a.inv_temperature), lowest = L::set(L::lowest), zero = L::set(0.0);
  const double ls = a.student_stats.log_sum, lt = a.teacher_stats.log_sum;
  const double factor = grad * a.inv_temperature;
  const V offset = L::set(ls - lt);
  const V p_factor = L::set(::exp(-ls) * factor), q_factor = L::set(::exp(-lt) * factor);
  const V middle = L::set(a.kind == Divergence::reverse ? center + ls - lt : center);
  const V share = L::set(1.0 - a.beta);
  Mixture<L> mixture(a.beta);
  for (int64_t c = 0; c < a.student.valid; c += kChunk) {
    const int64_t n = a.student.valid - c;
    const A* zs = fetch(a.student, c, student_buffer);
    const A* zt = fetch(a.teacher, c, teacher_buffer);
    A* dz = place(out, out_dtype, c, n, student_buffer);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kChunk; i += L::width) {
      const V x = vmax(lowest, (vload(zs + i) - ms) * scale);
      const V y = vmax(lowest, (vload(zt + i) - mt) * scale);
      const V p = exp(x) * p_factor;
      V d;
      switch (a.kind) {
        case Divergence::reverse: d = p * ((x - y) - middle); break;
        case Divergence::forward: d = p - exp(y) * q_factor; break;
        default: {
          const V gap = (y - x) + offset;
          mixture.at(gap, exp);
          d = p * (share * (zero - mixture.log_part - vmax(gap, zero)) - middle);
        }
      }
      vstore(dz + i, d);
    }
    commit(out, out_dtype, c, n, dz);
  }
  memset(static_cast<char*>(out) + a.student.valid * item, 0, (size - a.student.valid) * item);
}

// ==== top-K ====

template <class L>
void chunks(const Row& row, double inv_temperature, const ChunkSums<typename L::A>& out,
            RowStats* stats) {
  using A = typename L::A;
  alignas(64) A buffer[kChunk];
  Accumulator<L> rows(inv_temperature);
  for (int64_t begin = 0, i = 0; begin < row.valid; begin += out.columns, ++i) {
    const int64_t end = begin + out.columns < row.valid ? begin + out.columns : row.valid;
    for (int64_t c = begin; c < end; c += kChunk) rows.template add<false>(fetch(row, c, buffer));
    out.peaks[i] = rows.end_group(out.sums + i);
    out.maxima[i] = rows.max;
  }
  *stats = rows.stats();
}

// The k-th largest of n numbers (no NaN), by bisection over the bits of keys that are ordered like
// the numbers: no branch depends on the data.
inline float kth_largest(const float* values, int64_t n, int64_t k, void* scratch) {
  uint32_t* keys = static_cast<uint32_t*>(scratch);
  for (int64_t i = 0; i < n; ++i) {
    const float x = values[i] + 0.0f;  // -0 is equal to 0
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    keys[i] = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  uint32_t best = 0;  // largest t with at least k keys >= t
  for (int shift = 31; shift >= 0; --shift) {
    const uint32_t t = best | (uint32_t(1) << shift);
    uint32_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += keys[i] >= t;
    if (count >= k) best = t;
  }
  const uint32_t bits = best & 0x80000000u ? best & 0x7fffffffu : ~best;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline double kth_largest(const double* values, int64_t n, int64_t k, void*) {
  for (int64_t i = 0; i < n; ++i) {  // quadratic: float64 is for tests
    int64_t above = 0, equal = 0;
    for (int64_t j = 0; j < n; ++j) {
      above += values[j] > values[i];
      equal += values[j] == values[i];
    }
    if (above < k && k <= above + equal) return values[i];
  }
  return -INFINITY;
}

template <class L>
typename L::A kth(const typename L::A* values, int64_t n, int64_t k, void* scratch) {
  return kth_largest(values, n, k, scratch);
}

template <class L>
int64_t candidates(const Row& row, const ChunkSums<typename L::A>& chunks,
                   typename L::A threshold, int64_t k, typename L::A* values, int64_t* ids) {
  using A = typename L::A;
  using V = typename L::V;
  alignas(64) A buffer[kChunk];
  const V bound = L::set(threshold);
  const bool everything = threshold == -INFINITY;
  int64_t count = 0, equal = 0;
  for (int64_t c = 0; c < row.valid; c += kChunk) {
    const A peak = chunks.peaks[c / chunks.columns];
    if ((!(peak >= threshold) && !everything) || (peak == threshold && equal >= k)) {
      c += chunks.columns - kChunk - c % chunks.columns;  // past this group
      continue;
    }
    const A* z = fetch(row, c, buffer);
    const int64_t n = row.valid - c;
    for (int64_t j = 0; j < kChunk; j += L::width) {
      uint32_t bits = vge_bits(vload(z + j), bound);
      if (everything) bits = static_cast<uint32_t>((uint64_t(1) << L::width) - 1);
      for (; bits != 0; bits &= bits - 1) {
        const int64_t at = j + __builtin_ctz(bits);
        if (at >= n) break;
        const A value = z[at] > threshold ? z[at] : threshold;
        if (value == threshold && equal++ >= k) continue;
        values[count] = value;
        ids[count++] = c + at;
      }
    }
  }
  return count;
}

template <class L>
double outside_sum(const Row& row, double inv_temperature, const ChunkSums<typename L::A>& chunks,
                   const RowStats& stats, const int64_t* ids, int64_t num_ids) {
  using A = typename L::A;
  using V = typename L::V;
  alignas(64) A buffer[kChunk];
  const typename L::Exp exp(inv_temperature);
  const V m = L::set(stats.shift);
  A before = chunks.maxima[0];
  double sum = 0.0;
  double factor = ::exp((static_cast<double>(before) - stats.shift) * inv_temperature);
  for (int64_t begin = 0, i = 0; begin < row.valid; begin += chunks.columns, ++i) {
    const int64_t end = begin + chunks.columns < row.valid ? begin + chunks.columns : row.valid;
    if (num_ids == 0 || *ids >= end) {
      if (chunks.maxima[i] != before) {  // the running maximum rarely changes: few calls of exp
        before = chunks.maxima[i];
        factor = ::exp((static_cast<double>(before) - stats.shift) * inv_temperature);
      }
      sum += chunks.sums[i] * factor;
      continue;
    }
    for (int64_t c = begin; c < end; c += kChunk) {
      const A* z = fetch(row, c, buffer);
      if (num_ids > 0 && *ids < c + kChunk) {
        if (z != buffer) memcpy(buffer, z, sizeof buffer);
        for (; num_ids > 0 && *ids < c + kChunk; ++ids, --num_ids) buffer[*ids - c] = -INFINITY;
        z = buffer;
      }
      V total = L::set(0.0);
      for (int64_t j = 0; j < kChunk; j += L::width) total = total + exp(vload(z + j) - m);
      sum += vhsum(total);
    }
  }
  return sum;
}

template <class L>
void dots(const typename L::A* vector, const Row& first, int64_t stride, const int64_t* ids,
          int64_t k, double scale, typename L::A* out) {
  using A = typename L::A;
  using V = typename L::V;
  alignas(64) A buffer[kChunk];
  for (int64_t i = 0; i < k; ++i) {
    const Row row{static_cast<const char*>(first.data) + ids[i] * stride, first.dtype, first.valid};
    double sum = 0.0;
    for (int64_t c = 0; c < row.valid; c += kChunk) {
      const A* w = fetch(row, c, buffer, A(0));
      V total[2] = {L::set(0.0), L::set(0.0)};
#pragma GCC unroll 8
      for (int64_t j = 0; j < kChunk; j += 2 * L::width)
        for (int h = 0; h < 2; ++h)
          total[h] = vfma(vload(w + j + h * L::width), vload(vector + c + j + h * L::width), total[h]);
      sum += vhsum(total[0] + total[1]);
    }
    out[i] = static_cast<A>(sum * scale);
  }
}

template <class L>
void combine(const typename L::A* weights, const Row& first, int64_t stride, const int64_t* ids,
             int64_t k, typename L::A* out) {
  using A = typename L::A;
  using V = typename L::V;
  alignas(64) A buffer[kChunk];
  for (int64_t c = 0; c < first.valid; c += kChunk) memset(out + c, 0, kChunk * sizeof(A));
  for (int64_t i = 0; i < k; ++i) {
    const Row row{static_cast<const char*>(first.data) + ids[i] * stride, first.dtype, first.valid};
    const V weight = L::set(weights[i]);
    for (int64_t c = 0; c < row.valid; c += kChunk) {
      const A* w = fetch(row, c, buffer, A(0));
#pragma GCC unroll 8
      for (int64_t j = 0; j < kChunk; j += L::width)
        vstore(out + c + j, vfma(weight, vload(w + j), vload(out + c + j)));
    }
  }
}

template <class L>
void load(const Row& row, typename L::A* out) {
  using A = typename L::A;
  alignas(64) A buffer[kChunk];
  for (int64_t c = 0; c < row.valid; c += kChunk)
    memcpy(out + c, fetch(row, c, buffer, A(0)), kChunk * sizeof(A));
}

template <class L>
void store(const typename L::A* values, void* out, DType dtype, int64_t n, bool add) {
  using A = typename L::A;
  alignas(64) A buffer[kChunk];
  const Row old{out, dtype, n};
  for (int64_t c = 0; c < n; c += kChunk) {
    const A* result = values + c;
    if (add) {
      const A* before = fetch(old, c, buffer, A(0));
      for (int64_t j = 0; j < kChunk; ++j) buffer[j] = before[j] + values[c + j];
      result = buffer;
    }
    commit(out, dtype, c, n - c, result);
  }
}

template <class L>
void scale(const Row& row, double factor, void* out, DType dtype) {
  using A = typename L::A;
  alignas(64) A buffer[kChunk], scaled[kChunk];
  const typename L::V by = L::set(factor);
  for (int64_t c = 0; c < row.valid; c += kChunk) {
    const A* x = fetch(row, c, buffer, A(0));
#pragma GCC unroll 8
    for (int64_t j = 0; j < kChunk; j += L::width) vstore(scaled + j, vload(x + j) * by);
    commit(out, dtype, c, row.valid - c, scaled);
  }
}

template <class L>
constexpr Kernels<typename L::A> table() {
  return {stats<L>,  outside<L>, scatter<L>,    divergence<L>,  divergence_grad<L>,
          chunks<L>, kth<L>,     candidates<L>, outside_sum<L>,
          dots<L>,   combine<L>, load<L>,       store<L>,       scale<L>};
}

}  // namespace
}  // namespace opd
