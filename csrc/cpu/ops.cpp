// Argument checks, output tensors and the loop over rows; the arithmetic is in kernels.inl.
#include "../ops.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../common.h"
#include "kernels.h"

namespace opd::cpu {
namespace {

const Kernels<float>& choose() {
#if defined(__x86_64__)
  const Isa isa = chosen_isa();
  if (isa == Isa::avx512) return kernels_avx512();
  if (isa == Isa::avx2) return kernels_avx2();
#endif
  return kernels_portable();
}

template <class A>
const Kernels<A>& kernels();
template <>
const Kernels<float>& kernels<float>() {
  static const Kernels<float>& chosen = choose();
  return chosen;
}
template <>
const Kernels<double>& kernels<double>() {
  return kernels_double();
}

constexpr int64_t kGroupsPerWinner = 4;

// ==== checks ====

// With `or_none`, -1 stands for no id.
Tensor checked_ids(const Tensor& first, const char* name, const Tensor& ids, int64_t num_rows,
                   int64_t valid_vocab, bool or_none = false) {
  Tensor dense = id_rows(first, name, ids, num_rows);
  const int64_t* p = static_cast<const int64_t*>(dense.const_data_ptr());
  for (int64_t i = 0; i < dense.numel(); ++i)
    OPD_CHECK(p[i] >= (or_none ? -1 : 0) && p[i] < valid_vocab, name, ": expected ids in [0, ",
              valid_vocab, "), got ", p[i]);
  return dense;
}

struct Rows {
  const char* base;
  int64_t stride;  // bytes
  DType dtype;
  int64_t valid;
  Rows(const Tensor& t, int64_t valid_vocab)
      : base(static_cast<const char*>(t.const_data_ptr())),
        stride(t.stride(0) * t.element_size()),
        dtype(dtype_of("logits", t)),
        valid(valid_vocab) {}
  Row operator[](int64_t n) const { return {base + n * stride, dtype, valid}; }
};

// Rows are independent; each is worked on by one thread in a fixed order, so that results do not
// depend on the number of threads.
template <class F>
void for_rows(int64_t num_rows, int64_t columns, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, num_rows, grain, f);
}

template <class F>
auto with_type(const Tensor& logits, const F& f) {
  if (logits.scalar_type() == ScalarType::Double) return f(double());
  return f(float());
}

double load(const Row& row, int64_t i) {
  switch (row.dtype) {
    case DType::bf16: {
      const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(row.data)[i]) << 16;
      float x;
      memcpy(&x, &bits, sizeof x);
      return x;
    }
    case DType::f16: return static_cast<float>(static_cast<const c10::Half*>(row.data)[i]);
    case DType::f32: return static_cast<const float*>(row.data)[i];
    default: return static_cast<const double*>(row.data)[i];
  }
}

double logp_of(double z, const RowStats& s, double inv_temperature) {
  if (s.shift == -INFINITY) return -INFINITY;
  return (z - s.shift) * inv_temperature - s.log_sum;
}

// Log of the mass outside a set, from the statistics of the complement and of the row.
double tail_of(const RowStats& outside, const RowStats& row, double inv_temperature) {
  if (outside.shift == -INFINITY) return std::isnan(row.log_sum) ? row.log_sum : -INFINITY;
  return (outside.shift - row.shift) * inv_temperature + outside.log_sum - row.log_sum;
}

double lse_of(const RowStats& s, double inv_temperature) {
  return s.shift == -INFINITY ? -INFINITY : s.shift * inv_temperature + s.log_sum;
}

// Sort (id, gradient) of a row and add up the gradients of repeated ids, in the order of k.
template <class A>
int64_t merge(const int64_t* ids, const A* grad, int64_t k, std::vector<std::pair<int64_t, int64_t>>& order,
              int64_t* unique, A* sum) {
  if (k == 1 && ids[0] >= 0) {
    unique[0] = ids[0];
    sum[0] = grad[0];
    return 1;
  }
  order.clear();
  for (int64_t i = 0; i < k; ++i)
    if (ids[i] >= 0) order.emplace_back(ids[i], i);
  std::sort(order.begin(), order.end());
  int64_t count = 0;
  for (const auto& [id, i] : order) {
    if (count > 0 && unique[count - 1] == id) {
      sum[count - 1] += grad[i];
    } else {
      unique[count] = id;
      sum[count++] = grad[i];
    }
  }
  return count;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gather_logp(
    const Tensor& logits, const Tensor& ids, int64_t valid_vocab, double temperature,
    bool with_entropy, bool with_tail) {
  const Tensor z = with_dense_rows("logits", logits);
  check_vocab(z, valid_vocab, temperature);
  const int64_t num_rows = z.size(0);
  const Tensor wanted = checked_ids(z, "ids", ids, num_rows, valid_vocab, true);
  OPD_CHECK(!(with_entropy && with_tail), "with_tail: not together with with_entropy");
  const int64_t k = wanted.size(1), tails = with_tail ? num_rows : 0;
  const ScalarType type = result_type(z);
  Tensor logp = torch::stable::new_empty(z, {num_rows, k}, type);
  Tensor lse = torch::stable::new_empty(z, {num_rows}, type);
  Tensor entropy = torch::stable::new_empty(z, {with_entropy ? num_rows : 0}, type);
  Tensor tail = torch::stable::new_empty(z, {tails}, type);
  Tensor stats = torch::stable::new_empty(z, {num_rows, 2}, type);
  Tensor tail_stats = torch::stable::new_empty(z, {tails, 2}, type);
  const double inv_t = 1.0 / temperature;
  with_type(z, [&](auto zero) {
    using A = decltype(zero);
    const Rows rows(z, valid_vocab);
    const auto& table = kernels<A>();
    const int64_t* id = data<const int64_t>(wanted);
    A *out = data<A>(logp), *log_total = data<A>(lse), *h = data<A>(entropy), *s = data<A>(stats);
    A *log_tail = data<A>(tail), *ts = data<A>(tail_stats);
    for_rows(num_rows, valid_vocab, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> sorted;
      for (int64_t n = begin; n < end; ++n) {
        const Row row = rows[n];
        RowStats r;
        table.stats(row, inv_t, with_entropy, &r);
        s[2 * n] = static_cast<A>(r.shift);
        s[2 * n + 1] = static_cast<A>(r.log_sum);
        log_total[n] = static_cast<A>(lse_of(r, inv_t));
        if (with_entropy) h[n] = static_cast<A>(r.entropy);
        sorted.clear();
        for (int64_t j = n * k; j < (n + 1) * k; ++j) {
          const bool none = id[j] < 0;
          out[j] = static_cast<A>(none ? -INFINITY : logp_of(load(row, id[j]), r, inv_t));
          if (with_tail && !none) sorted.push_back(id[j]);
        }
        if (!with_tail) continue;
        std::sort(sorted.begin(), sorted.end());
        RowStats o;
        table.outside(row, inv_t, sorted.data(), static_cast<int64_t>(sorted.size()), &o);
        ts[2 * n] = static_cast<A>(o.shift);
        ts[2 * n + 1] = static_cast<A>(o.log_sum);
        log_tail[n] = static_cast<A>(tail_of(o, r, inv_t));
      }
    });
  });
  return {logp, lse, entropy, tail, stats, tail_stats};
}

namespace {

void backward_rows(const Tensor& z, const Tensor& out, const Tensor& ids, const Tensor& grad,
                   const Tensor& stats, const Tensor& dense, const std::optional<Tensor>& slope,
                   const std::optional<Tensor>& tail_stats, const std::optional<Tensor>& tail_dense,
                   int64_t valid_vocab, double temperature) {
  check_vocab(z, valid_vocab, temperature);
  const int64_t num_rows = z.size(0);
  const Tensor members = checked_ids(z, "ids", ids, num_rows, valid_vocab, true);
  const int64_t k = members.size(1);
  const ScalarType type = result_type(z);
  const Tensor g = small(z, "grad", grad, {num_rows, k}, type);
  const Tensor s = small(z, "stats", stats, {num_rows, 2}, type);
  const Tensor a = small(z, "dense", dense, {num_rows}, type);
  OPD_CHECK(tail_stats.has_value() == tail_dense.has_value(),
            "tail_dense: expected together with tail_stats");
  OPD_CHECK(!(slope.has_value() && tail_stats.has_value()),
            "slope: not together with tail_stats");
  std::optional<Tensor> b, os, od;
  if (slope.has_value()) b = small(z, "slope", *slope, {num_rows}, type);
  if (tail_stats.has_value()) {
    os = small(z, "tail_stats", *tail_stats, {num_rows, 2}, type);
    od = small(z, "tail_dense", *tail_dense, {num_rows}, type);
  }
  with_type(z, [&](auto zero) {
    using A = decltype(zero);
    const Rows rows(z, valid_vocab);
    const auto& table = kernels<A>();
    const int64_t* id = data<const int64_t>(members);
    const A *pg = data<const A>(g), *ps = data<const A>(s), *pa = data<const A>(a);
    const A* pb = b ? data<const A>(*b) : nullptr;
    const A* pos = os ? data<const A>(*os) : nullptr;
    const A* pod = od ? data<const A>(*od) : nullptr;
    char* target = static_cast<char*>(out.data_ptr());
    const int64_t target_stride = out.stride(0) * out.element_size();
    for_rows(num_rows, out.size(1), [&](int64_t begin, int64_t end) {
      std::vector<std::pair<int64_t, int64_t>> order;
      std::vector<int64_t> unique(k);
      std::vector<A> sum(k), scratch(k);
      for (int64_t n = begin; n < end; ++n) {
        ScatterRow<A> args;
        args.row = rows[n];
        args.out = target + n * target_stride;
        args.out_dtype = dtype_of("out", out);
        args.size = out.size(1);
        args.stats = {ps[2 * n], ps[2 * n + 1], 0.0};
        args.dense = pa[n];
        args.slope = pb ? static_cast<double>(pb[n]) : 0.0;
        args.outside = pos != nullptr;
        if (pos) args.outside_stats = {pos[2 * n], pos[2 * n + 1], 0.0};
        args.outside_dense = pod ? static_cast<double>(pod[n]) : 0.0;
        args.num_ids = k == 0 ? 0 : merge(id + n * k, pg + n * k, k, order, unique.data(), sum.data());
        args.ids = unique.data();
        args.grad = sum.data();
        args.scratch = scratch.data();
        args.inv_temperature = 1.0 / temperature;
        table.scatter(args);
      }
    });
  });
}

}  // namespace

namespace {

void divergence_grad_rows(const Tensor& student, const Tensor& teacher, const Tensor& out,
                          const Tensor& stats, const Tensor& grad, int64_t valid_vocab,
                          double temperature, int64_t divergence, double beta) {
  check_pair(student, teacher, valid_vocab, temperature, divergence, beta);
  const int64_t num_rows = student.size(0);
  const Tensor s = small(student, "stats", stats, {num_rows, 5}, result_type(student));
  const Tensor g = small(student, "grad", grad, {num_rows}, result_type(student));
  with_type(student, [&](auto zero) {
    using A = decltype(zero);
    const Rows near(student, valid_vocab), far(teacher, valid_vocab);
    const auto& table = kernels<A>();
    const A *ps = data<const A>(s), *pg = data<const A>(g);
    char* target = static_cast<char*>(out.data_ptr());
    const int64_t stride = out.stride(0) * out.element_size();
    for_rows(num_rows, out.size(1), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const A* r = ps + 5 * n;
        const DivergenceRow args{near[n],
                                 far[n],
                                 {r[0], r[1], 0.0},
                                 {r[2], r[3], 0.0},
                                 static_cast<Divergence>(divergence),
                                 beta,
                                 1.0 / temperature};
        table.divergence_grad(args, r[4], pg[n], target + n * stride, dtype_of("out", out),
                              out.size(1));
      }
    });
  });
}

}  // namespace

std::tuple<Tensor, Tensor> full_kl(const Tensor& student_logits, const Tensor& teacher_logits,
                                       int64_t valid_vocab, double temperature,
                                       int64_t divergence, double beta) {
  const Tensor student = with_dense_rows("student_logits", student_logits);
  const Tensor teacher = with_dense_rows("teacher_logits", teacher_logits, student);
  check_pair(student, teacher, valid_vocab, temperature, divergence, beta);
  const int64_t num_rows = student.size(0);
  const ScalarType type = result_type(student);
  Tensor value = torch::stable::new_empty(student, {num_rows}, type);
  Tensor stats = torch::stable::new_empty(student, {num_rows, 5}, type);
  const double inv_t = 1.0 / temperature;
  with_type(student, [&](auto zero) {
    using A = decltype(zero);
    const Rows near(student, valid_vocab), far(teacher, valid_vocab);
    const auto& table = kernels<A>();
    A *out = data<A>(value), *s = data<A>(stats);
    for_rows(num_rows, valid_vocab, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        DivergenceRow args{near[n], far[n], {},   {}, static_cast<Divergence>(divergence),
                           beta,    inv_t};
        table.stats(args.student, inv_t, false, &args.student_stats);
        table.stats(args.teacher, inv_t, false, &args.teacher_stats);
        const DivergenceValue result = table.divergence(args);
        out[n] = static_cast<A>(result.value);
        const double row[5] = {args.student_stats.shift, args.student_stats.log_sum,
                               args.teacher_stats.shift, args.teacher_stats.log_sum,
                               result.center};
        for (int i = 0; i < 5; ++i) s[5 * n + i] = static_cast<A>(row[i]);
      }
    });
  });
  return {value, stats};
}

// A group is at most four chunks: one maximum and one sum to reduce and to store for all of them.
// The groups of the winners are read again, so that many winners want small groups.
static int64_t group_columns(int64_t valid_vocab, int64_t k) {
  int64_t columns = 4 * kChunk;
  while (columns > kChunk && valid_vocab < kGroupsPerWinner * k * columns) columns /= 2;
  return columns;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> topk_logp(
    const Tensor& logits, int64_t k, const std::optional<Tensor>& token_ids, int64_t valid_vocab,
    double temperature) {
  const Tensor z = with_dense_rows("logits", logits);
  check_vocab(z, valid_vocab, temperature);
  check_k(k, valid_vocab);
  const int64_t num_rows = z.size(0);
  const bool with_token = token_ids.has_value();
  std::optional<Tensor> token;
  if (with_token) {
    token = small(z, "token_ids", *token_ids, {num_rows}, ScalarType::Long);
    for (int64_t n = 0; n < num_rows; ++n) {
      const int64_t id = data<const int64_t>(*token)[n];
      OPD_CHECK(id >= 0 && id < valid_vocab, "token_ids: expected ids in [0, ", valid_vocab,
                "), got ", id);
    }
  }
  const ScalarType type = result_type(z);
  Tensor ids = torch::stable::new_empty(z, {num_rows, k}, ScalarType::Long);
  Tensor logp = torch::stable::new_empty(z, {num_rows, k}, type);
  Tensor lse = torch::stable::new_empty(z, {num_rows}, type);
  Tensor tail = torch::stable::new_empty(z, {num_rows}, type);
  Tensor token_logp = torch::stable::new_empty(z, {with_token ? num_rows : 0}, type);
  const double inv_t = 1.0 / temperature;
  with_type(z, [&](auto zero) {
    using A = decltype(zero);
    const Rows rows(z, valid_vocab);
    const auto& table = kernels<A>();
    const int64_t columns = group_columns(valid_vocab, k);
    const int64_t num_chunks = (valid_vocab + columns - 1) / columns;
    const int64_t most = std::min(valid_vocab, (columns + 1) * k);
    const int64_t* wanted = with_token ? data<const int64_t>(*token) : nullptr;
    int64_t* out_ids = data<int64_t>(ids);
    A *out_logp = data<A>(logp), *out_lse = data<A>(lse), *out_tail = data<A>(tail);
    A* out_token = data<A>(token_logp);
    for_rows(num_rows, valid_vocab, [&](int64_t begin, int64_t end) {
      std::vector<A> space(4 * num_chunks), values(most);
      std::vector<int64_t> found(most), order(most), sorted(k);
      const ChunkSums<A> sums{space.data(), space.data() + num_chunks,
                              space.data() + 2 * num_chunks, columns};
      for (int64_t n = begin; n < end; ++n) {
        const Row row = rows[n];
        RowStats r;
        table.chunks(row, inv_t, sums, &r);
        // The k-th largest chunk maximum is a lower bound of the k-th largest logit.
        const A threshold =
            num_chunks < k ? -INFINITY
                           : table.kth(sums.peaks, num_chunks, k, space.data() + 3 * num_chunks);
        const int64_t count =
            table.candidates(row, sums, threshold, k, values.data(), found.data());
        for (int64_t i = 0; i < count; ++i) order[i] = i;
        const auto better = [&](int64_t a, int64_t b) {  // candidates are in order of their ids
          return values[a] != values[b] ? values[a] > values[b] : a < b;
        };
        if (count > k)
          std::nth_element(order.begin(), order.begin() + (k - 1), order.begin() + count, better);
        std::sort(order.begin(), order.begin() + k, better);
        for (int64_t i = 0; i < k; ++i) {
          sorted[i] = out_ids[n * k + i] = found[order[i]];
          out_logp[n * k + i] = static_cast<A>(logp_of(load(row, sorted[i]), r, inv_t));
        }
        std::sort(sorted.begin(), sorted.end());
        out_lse[n] = static_cast<A>(lse_of(r, inv_t));
        double rest = k == valid_vocab || r.shift == -INFINITY
                          ? 0.0
                          : table.outside_sum(row, inv_t, sums, r, sorted.data(), k);
        if (rest > 1e-25) {
          out_tail[n] = static_cast<A>(std::log(rest) - r.log_sum);
        } else {  // too small against the row's maximum: sum against its own
          RowStats o;
          table.outside(row, inv_t, sorted.data(), k, &o);
          out_tail[n] = static_cast<A>(tail_of(o, r, inv_t));
        }
        if (with_token) out_token[n] = static_cast<A>(logp_of(load(row, wanted[n]), r, inv_t));
      }
    });
  });
  return {ids, logp, lse, tail, token_logp};
}

namespace {

struct Matrix {
  Row first;
  int64_t stride;
};

Matrix matrix(const char* name, const Tensor& t) {
  return {{t.const_data_ptr(), dtype_of(name, t), t.size(1)},
          t.stride(0) * static_cast<int64_t>(t.element_size())};
}

int64_t padded(int64_t n) { return (n + kChunk - 1) / kChunk * kChunk; }

}  // namespace

Tensor gather_linear(const Tensor& hidden, const Tensor& head, const Tensor& ids,
                         double scale) {
  const Tensor h = with_dense_rows("hidden", hidden), w = with_dense_rows("head", head, h);
  check_product(h, w);
  const int64_t num_rows = h.size(0), width = h.size(1);
  const Tensor wanted = checked_ids(h, "ids", ids, num_rows, w.size(0));
  const int64_t k = wanted.size(1);
  Tensor out = torch::stable::new_empty(h, {num_rows, k}, result_type(h));
  with_type(h, [&](auto zero) {
    using A = decltype(zero);
    const Matrix from = matrix("hidden", h), by = matrix("head", w);
    const auto& table = kernels<A>();
    for_rows(num_rows, k * width, [&](int64_t begin, int64_t end) {
      std::vector<A> vector(padded(width));
      for (int64_t n = begin; n < end; ++n) {
        table.load({static_cast<const char*>(from.first.data) + n * from.stride, from.first.dtype,
                    width},
                   vector.data());
        table.dots(vector.data(), by.first, by.stride, data<const int64_t>(wanted) + n * k, k, scale,
                   data<A>(out) + n * k);
      }
    });
  });
  return out;
}

Tensor gather_linear_backward_hidden(const Tensor& hidden, const Tensor& head,
                                         const Tensor& ids, const Tensor& grad) {
  const Tensor w = with_dense_rows("head", head);
  check_hidden(hidden, w);
  const int64_t num_rows = hidden.size(0), width = w.size(1);
  const Tensor wanted = checked_ids(w, "ids", ids, num_rows, w.size(0));
  const int64_t k = wanted.size(1);
  const Tensor g = small(w, "grad", grad, {num_rows, k}, result_type(w));
  Tensor out = new_rows(hidden);
  with_type(w, [&](auto zero) {
    using A = decltype(zero);
    const Matrix by = matrix("head", w);
    const auto& table = kernels<A>();
    const DType type = dtype_of("hidden", hidden);
    char* target = static_cast<char*>(out.data_ptr());
    for_rows(num_rows, k * width, [&](int64_t begin, int64_t end) {
      std::vector<A> sum(padded(width));
      for (int64_t n = begin; n < end; ++n) {
        table.combine(data<const A>(g) + n * k, by.first, by.stride,
                      data<const int64_t>(wanted) + n * k, k, sum.data());
        table.store(sum.data(), target + n * out.stride(0) * out.element_size(), type, width,
                    false);
      }
    });
  });
  return out;
}

// buffer[id] += sum of grad[n, k] * hidden[n] over ids[n, k] == id. The terms of an id are added
// in the order of (n, k) in full precision, by one thread, and rounded once.
void gather_linear_backward_head(const Tensor& buffer, const Tensor& hidden, const Tensor& ids,
                                     const Tensor& grad) {
  const Tensor h = with_dense_rows("hidden", hidden);
  check_buffer(buffer, h);
  const int64_t num_rows = h.size(0), width = h.size(1);
  const Tensor wanted = checked_ids(h, "ids", ids, num_rows, buffer.size(0));
  const int64_t k = wanted.size(1), total = num_rows * k;
  const Tensor g = small(h, "grad", grad, {num_rows, k}, result_type(h));
  const int64_t* id = data<const int64_t>(wanted);
  std::vector<std::pair<int64_t, int64_t>> order(total);
  for (int64_t i = 0; i < total; ++i) order[i] = {id[i], i};
  std::sort(order.begin(), order.end());
  std::vector<int64_t> starts;
  for (int64_t i = 0; i < total; ++i)
    if (i == 0 || order[i].first != order[i - 1].first) starts.push_back(i);
  const int64_t groups = static_cast<int64_t>(starts.size());
  starts.push_back(total);
  with_type(h, [&](auto zero) {
    using A = decltype(zero);
    const Matrix from = matrix("hidden", h);
    const auto& table = kernels<A>();
    const DType type = dtype_of("buffer", buffer);
    const A* weight = data<const A>(g);
    char* target = static_cast<char*>(buffer.data_ptr());
    const int64_t stride = buffer.stride(0) * buffer.element_size();
    for_rows(groups, width * std::max<int64_t>(1, total / std::max<int64_t>(1, groups)),
             [&](int64_t begin, int64_t end) {
               std::vector<A> sum(padded(width)), weights;
               std::vector<int64_t> rows;
               for (int64_t i = begin; i < end; ++i) {
                 weights.clear();
                 rows.clear();
                 for (int64_t j = starts[i]; j < starts[i + 1]; ++j) {
                   weights.push_back(weight[order[j].second]);
                   rows.push_back(order[j].second / k);
                 }
                 table.combine(weights.data(), from.first, from.stride, rows.data(),
                               static_cast<int64_t>(rows.size()), sum.data());
                 table.store(sum.data(), target + order[starts[i]].first * stride, type, width,
                             true);
               }
             });
  });
}

void scale_out(const Tensor& source, const Tensor& factor, const Tensor& out) {
  check_scale(source, out);
  const Tensor number = small(source, "factor", factor, {}, ScalarType::Float);
  constexpr int64_t kBlock = 32 * kChunk;
  const int64_t total = source.numel(), blocks = (total + kBlock - 1) / kBlock;
  const auto& table = kernels<float>();
  const float by = *data<const float>(number);
  const DType from = dtype_of("source", source), to = dtype_of("out", out);
  const char* read = static_cast<const char*>(source.const_data_ptr());
  char* write = static_cast<char*>(out.data_ptr());
  for_rows(blocks, kBlock, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kBlock, last = std::min(total, end * kBlock);
    table.scale({read + first * source.element_size(), from, last - first}, by,
                write + first * out.element_size(), to);
  });
}

#include "../backward_forms.inl"

}  // namespace opd::cpu
