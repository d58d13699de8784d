// Schemas of the compiled ops, registered through torch's stable ABI: one build serves several
// versions of torch. Fake kernels and autograd are in opd_ops/_autograd.py.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(opd_ops, m) {
  m.def(
      "gather_logp(Tensor logits, Tensor ids, int valid_vocab, float temperature, "
      "bool with_entropy, bool with_tail) -> (Tensor logp, Tensor lse, Tensor entropy, "
      "Tensor tail_logp, Tensor stats, Tensor tail_stats)");
  m.def(
      "topk_logp(Tensor logits, int k, Tensor? token_ids, int valid_vocab, float temperature) -> "
      "(Tensor ids, Tensor logp, Tensor lse, Tensor tail_logp, Tensor token_logp)");
  m.def("gather_linear(Tensor hidden, Tensor head, Tensor ids, float scale) -> Tensor");
  m.def(
      "gather_linear_backward_hidden(Tensor hidden, Tensor head, Tensor ids, Tensor grad) -> "
      "Tensor");
  m.def(
      "gather_linear_backward_head_(Tensor(a!) buffer, Tensor hidden, Tensor ids, Tensor grad) -> "
      "()");
  m.def(
      "gather_logp_backward(Tensor logits, Tensor ids, Tensor grad, Tensor stats, Tensor dense, "
      "Tensor? slope, Tensor? tail_stats, Tensor? tail_dense, int valid_vocab, "
      "float temperature) -> Tensor");
  m.def(
      "gather_logp_backward_out(Tensor logits, Tensor ids, Tensor grad, Tensor stats, "
      "Tensor dense, Tensor? slope, Tensor? tail_stats, Tensor? tail_dense, "
      "int valid_vocab, float temperature, Tensor(a!) out) -> ()");
  m.def(
      "full_kl(Tensor student_logits, Tensor teacher_logits, int valid_vocab, float temperature, "
      "int divergence, float beta) -> (Tensor divergence, Tensor stats)");
  m.def(
      "full_kl_backward_out(Tensor student_logits, Tensor teacher_logits, Tensor stats, "
      "Tensor grad, int valid_vocab, float temperature, int divergence, float beta, "
      "Tensor(a!) out) -> ()");
  m.def("scale_out(Tensor source, Tensor factor, Tensor(a!) out) -> ()");
}

#define OPD_IMPLEMENT(device)                                                                      \
  m.impl("gather_logp", TORCH_BOX(&opd::device::gather_logp));                                     \
  m.impl("topk_logp", TORCH_BOX(&opd::device::topk_logp));                                         \
  m.impl("gather_linear", TORCH_BOX(&opd::device::gather_linear));                                 \
  m.impl("gather_linear_backward_hidden", TORCH_BOX(&opd::device::gather_linear_backward_hidden)); \
  m.impl("gather_linear_backward_head_", TORCH_BOX(&opd::device::gather_linear_backward_head));    \
  m.impl("gather_logp_backward", TORCH_BOX(&opd::device::gather_logp_backward));                   \
  m.impl("gather_logp_backward_out", TORCH_BOX(&opd::device::gather_logp_backward_out));           \
  m.impl("full_kl", TORCH_BOX(&opd::device::full_kl));                                             \
  m.impl("full_kl_backward_out", TORCH_BOX(&opd::device::full_kl_backward_out));                   \
  m.impl("scale_out", TORCH_BOX(&opd::device::scale_out))

#ifdef OPD_EMULATION  // the CUDA ops on CPU tensors, for tests
STABLE_TORCH_LIBRARY_IMPL(opd_ops, CPU, m) { OPD_IMPLEMENT(cuda); }
#else
STABLE_TORCH_LIBRARY_IMPL(opd_ops, CPU, m) { OPD_IMPLEMENT(cpu); }
#ifdef OPD_CUDA
STABLE_TORCH_LIBRARY_IMPL(opd_ops, CUDA, m) { OPD_IMPLEMENT(cuda); }
#endif
#endif
