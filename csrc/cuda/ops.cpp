// Checks, output tensors and launches of the CUDA ops. Needs no CUDA header: the kernels are behind
// kernels.h. docs/kernels.md has the checklist that each launcher here was reviewed against.
#include "../ops.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>

#include "../checks.h"
#include "kernels.h"

namespace opd::cuda {
namespace {

// The stream that torch would use now. libtorch_cuda is asked by name: this library links to
// libtorch_cpu alone, so that it loads without CUDA too.
void* current_stream(int device) {
#ifdef OPD_EMULATION
  (void)device;
  return nullptr;
#else
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Get>(symbol);
  }();
  OPD_CHECK(get != nullptr, "this torch has no CUDA streams");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
#endif
}

// Every launch of an op goes through here: on the device of its first tensor, which becomes the
// current one for as long, in torch's current stream of that device, with the error looked at.
template <class Args>
void run(const char* op, const Tensor& first, const Args& args) {
  const int device = first.get_device_index();
#ifndef OPD_EMULATION
  const torch::stable::accelerator::DeviceGuard guard(device);
#endif
  const int error = launch(args, Launch{device, current_stream(device)});
  OPD_CHECK(error == 0, op, ": CUDA error ", error, ", ", error_text(error));
}

void check_grid(const char* name, int64_t blocks) {
  OPD_CHECK(blocks < int64_t{1} << 31, name, ": expected less than 2^31 rows, got ", blocks);
}

Rows rows(const char* name, const Tensor& t, int64_t valid) {
  const DType dtype = dtype_of(name, t);
  OPD_CHECK(dtype != DType::f64, name, ": float64 is computed on CPU only");
  check_grid(name, t.size(0));
  return {t.data_ptr(), t.stride(0), t.size(0), valid, dtype};
}

float* data_or_null(const std::optional<Tensor>& t) { return t ? data<float>(*t) : nullptr; }

Tensor floats(const Tensor& first, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(first, sizes, ScalarType::Float);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gather_logp(
    const Tensor& logits, const Tensor& ids, int64_t valid_vocab, double temperature,
    bool with_entropy, bool with_tail) {
  const Tensor z = with_dense_rows("logits", logits);
  check_vocab(z, valid_vocab, temperature);
  const int64_t num = z.size(0);
  const Tensor wanted = id_rows(z, "ids", ids, num);
  OPD_CHECK(!(with_entropy && with_tail), "with_tail: not together with with_entropy");
  OPD_CHECK(!with_tail || valid_vocab <= kMaxMasked, "valid_vocab: expected at most ", kMaxMasked,
            " with a tail, got ", valid_vocab);
  const int64_t k = wanted.size(1), tails = with_tail ? num : 0;
  const Tensor logp = floats(z, {num, k}), lse = floats(z, {num}), stats = floats(z, {num, 2});
  const Tensor entropy = floats(z, {with_entropy ? num : 0});
  const Tensor tail = floats(z, {tails}), tail_stats = floats(z, {tails, 2});
  GatherLogp args{};
  args.logits = rows("logits", z, valid_vocab);
  args.ids = data<int64_t>(wanted);
  args.k = k;
  args.inv_temperature = 1.0 / temperature;
  args.logp = data<float>(logp);
  args.lse = data<float>(lse);
  args.stats = data<float>(stats);
  args.entropy = with_entropy ? data<float>(entropy) : nullptr;
  args.tail_logp = with_tail ? data<float>(tail) : nullptr;
  args.tail_stats = with_tail ? data<float>(tail_stats) : nullptr;
  run("gather_logp", z, args);
  return {logp, lse, entropy, tail, stats, tail_stats};
}

namespace {

void backward_rows(const Tensor& z, const Tensor& out, const Tensor& ids, const Tensor& grad,
                   const Tensor& stats, const Tensor& dense, const std::optional<Tensor>& slope,
                   const std::optional<Tensor>& tail_stats, const std::optional<Tensor>& tail_dense,
                   int64_t valid_vocab, double temperature) {
  check_vocab(z, valid_vocab, temperature);
  const int64_t num = z.size(0);
  const Tensor members = id_rows(z, "ids", ids, num);
  const int64_t k = members.size(1);
  const auto type = ScalarType::Float;
  const Tensor g = small(z, "grad", grad, {num, k}, type);
  const Tensor s = small(z, "stats", stats, {num, 2}, type);
  const Tensor a = small(z, "dense", dense, {num}, type);
  OPD_CHECK(tail_stats.has_value() == tail_dense.has_value(),
            "tail_dense: expected together with tail_stats");
  OPD_CHECK(!(slope.has_value() && tail_stats.has_value()), "slope: not together with tail_stats");
  std::optional<Tensor> b, os, od;
  if (slope.has_value()) b = small(z, "slope", *slope, {num}, type);
  if (tail_stats.has_value()) {
    os = small(z, "tail_stats", *tail_stats, {num, 2}, type);
    od = small(z, "tail_dense", *tail_dense, {num}, type);
  }
  const Tensor scratch = floats(z, {num, k});
  GatherBackward args{};
  args.logits = rows("logits", z, valid_vocab);
  args.out = out.data_ptr();
  args.out_dtype = dtype_of("out", out);
  args.out_stride = out.stride(0);
  args.size = z.size(1);
  args.ids = data<int64_t>(members);
  args.k = k;
  args.grad = data<float>(g);
  args.stats = data<float>(s);
  args.dense = data<float>(a);
  args.slope = data_or_null(b);
  args.tail_stats = data_or_null(os);
  args.tail_dense = data_or_null(od);
  args.scratch = data<float>(scratch);
  args.inv_temperature = 1.0 / temperature;
  run("gather_logp_backward", z, args);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> topk_logp(
    const Tensor& logits, int64_t k, const std::optional<Tensor>& token_ids, int64_t valid_vocab,
    double temperature) {
  const Tensor z = with_dense_rows("logits", logits);
  check_vocab(z, valid_vocab, temperature);
  check_k(k, valid_vocab);
  OPD_CHECK(k <= kMaxK, "k: expected at most ", kMaxK, " on CUDA, got ", k);
  OPD_CHECK(valid_vocab < kTopkChunk * kMaxChunks, "valid_vocab: expected below ",
            kTopkChunk * kMaxChunks, ", got ", valid_vocab);
  const int64_t num = z.size(0), tokens = token_ids.has_value() ? num : 0;
  std::optional<Tensor> wanted;
  if (token_ids.has_value()) wanted = small(z, "token_ids", *token_ids, {num}, ScalarType::Long);
  const Tensor ids = torch::stable::new_empty(z, {num, k}, ScalarType::Long);
  const Tensor logp = floats(z, {num, k}), lse = floats(z, {num}), tail = floats(z, {num});
  const Tensor token_logp = floats(z, {tokens});
  TopkLogp args{};
  args.logits = rows("logits", z, valid_vocab);
  args.token_ids = wanted ? data<int64_t>(*wanted) : nullptr;
  args.k = k;
  args.inv_temperature = 1.0 / temperature;
  args.ids = data<int64_t>(ids);
  args.logp = data<float>(logp);
  args.lse = data<float>(lse);
  args.tail_logp = data<float>(tail);
  args.token_logp = data<float>(token_logp);
  run("topk_logp", z, args);
  return {ids, logp, lse, tail, token_logp};
}

std::tuple<Tensor, Tensor> full_kl(const Tensor& student_logits, const Tensor& teacher_logits,
                                   int64_t valid_vocab, double temperature, int64_t divergence,
                                   double beta) {
  const Tensor student = with_dense_rows("student_logits", student_logits);
  const Tensor teacher = with_dense_rows("teacher_logits", teacher_logits, student);
  check_pair(student, teacher, valid_vocab, temperature, divergence, beta);
  const int64_t num = student.size(0);
  const Tensor value = floats(student, {num}), stats = floats(student, {num, 5});
  FullKl args{};
  args.student = rows("student_logits", student, valid_vocab);
  args.teacher = rows("teacher_logits", teacher, valid_vocab);
  args.divergence = static_cast<int>(divergence);
  args.beta = beta;
  args.inv_temperature = 1.0 / temperature;
  args.value = data<float>(value);
  args.stats = data<float>(stats);
  run("full_kl", student, args);
  return {value, stats};
}

namespace {

void divergence_grad_rows(const Tensor& student, const Tensor& teacher, const Tensor& out,
                          const Tensor& stats, const Tensor& grad, int64_t valid_vocab,
                          double temperature, int64_t divergence, double beta) {
  check_pair(student, teacher, valid_vocab, temperature, divergence, beta);
  const int64_t num = student.size(0);
  const Tensor s = small(student, "stats", stats, {num, 5}, ScalarType::Float);
  const Tensor g = small(student, "grad", grad, {num}, ScalarType::Float);
  FullKlBackward args{};
  args.student = rows("student_logits", student, valid_vocab);
  args.teacher = rows("teacher_logits", teacher, valid_vocab);
  args.out = out.data_ptr();
  args.out_dtype = dtype_of("out", out);
  args.out_stride = out.stride(0);
  args.size = student.size(1);
  args.divergence = static_cast<int>(divergence);
  args.beta = beta;
  args.inv_temperature = 1.0 / temperature;
  args.stats = data<float>(s);
  args.grad = data<float>(g);
  run("full_kl_backward", student, args);
}

}  // namespace

Tensor gather_linear(const Tensor& hidden, const Tensor& head, const Tensor& ids, double scale) {
  const Tensor h = with_dense_rows("hidden", hidden), w = with_dense_rows("head", head, h);
  check_product(h, w);
  const Tensor wanted = id_rows(h, "ids", ids, h.size(0));
  const Tensor out = floats(h, {h.size(0), wanted.size(1)});
  GatherLinear args{};
  args.hidden = rows("hidden", h, h.size(1));
  args.head = rows("head", w, w.size(1));
  args.ids = data<int64_t>(wanted);
  args.k = wanted.size(1);
  args.scale = scale;
  args.out = data<float>(out);
  run("gather_linear", h, args);
  return out;
}

Tensor gather_linear_backward_hidden(const Tensor& hidden, const Tensor& head, const Tensor& ids,
                                     const Tensor& grad) {
  const Tensor w = with_dense_rows("head", head);
  check_hidden(hidden, w);
  const int64_t num = hidden.size(0);
  const Tensor wanted = id_rows(w, "ids", ids, num);
  const Tensor g = small(w, "grad", grad, {num, wanted.size(1)}, ScalarType::Float);
  const Tensor out = new_rows(hidden);
  GatherLinearHidden args{};
  args.head = rows("head", w, w.size(1));
  args.ids = data<int64_t>(wanted);
  args.grad = data<float>(g);
  args.k = wanted.size(1);
  args.out = rows("hidden", out, out.size(1));
  run("gather_linear_backward_hidden", w, args);
  return out;
}

void gather_linear_backward_head(const Tensor& buffer, const Tensor& hidden, const Tensor& ids,
                                 const Tensor& grad) {
  const Tensor h = with_dense_rows("hidden", hidden);
  check_buffer(buffer, h);
  const Tensor wanted = id_rows(h, "ids", ids, h.size(0));
  const int64_t k = wanted.size(1), total = h.size(0) * k;
  const Tensor g = small(h, "grad", grad, {h.size(0), k}, ScalarType::Float);
  check_grid("ids", total);
  // Equal ids side by side, in the order of their places: the order in which they are added.
  const Tensor flat = torch::stable::view(wanted, {total});
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(flat), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  const Tensor sorted = torch::stable::detail::to<Tensor>(stack[0]);
  const Tensor places = torch::stable::detail::to<Tensor>(stack[1]);
  GatherLinearHead args{};
  args.hidden = rows("hidden", h, h.size(1));
  args.buffer = rows("buffer", buffer, buffer.size(1));
  args.sorted_ids = data<int64_t>(sorted);
  args.positions = data<int64_t>(places);
  args.grad = data<float>(g);
  args.k = k;
  args.total = total;
  run("gather_linear_backward_head", h, args);
}

void scale_out(const Tensor& source, const Tensor& factor, const Tensor& out) {
  check_scale(source, out);
  const Tensor number = small(source, "factor", factor, {}, ScalarType::Float);
  Scale args{};
  args.source = source.data_ptr();
  args.out = out.data_ptr();
  args.dtype = dtype_of("source", source);
  args.out_dtype = dtype_of("out", out);
  args.size = source.numel();
  args.factor = data<float>(number);
  run("scale_out", source, args);
}

#include "../backward_forms.inl"

}  // namespace opd::cuda
