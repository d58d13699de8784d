// Tensor-level CPU implementations of the schemas in bindings.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace opd {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gather_logp_cpu(
    const Tensor& logits, const Tensor& ids, int64_t valid_vocab, double temperature,
    bool with_entropy, bool with_tail);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topk_logp_cpu(
    const Tensor& logits, int64_t k, const std::optional<Tensor>& token_ids, int64_t valid_vocab,
    double temperature);
Tensor gather_linear_cpu(const Tensor& hidden, const Tensor& head, const Tensor& ids, double scale);
Tensor gather_linear_backward_hidden_cpu(const Tensor& hidden, const Tensor& head,
                                         const Tensor& ids, const Tensor& grad);
void gather_linear_backward_head_cpu(const Tensor& buffer, const Tensor& hidden, const Tensor& ids,
                                     const Tensor& grad);
Tensor gather_logp_backward_cpu(const Tensor& logits, const Tensor& ids, const Tensor& grad,
                                const Tensor& stats, const Tensor& dense,
                                const std::optional<Tensor>& slope,
                                const std::optional<Tensor>& tail_stats,
                                const std::optional<Tensor>& tail_dense, int64_t valid_vocab,
                                double temperature);
void gather_logp_backward_inplace_cpu(const Tensor& logits, const Tensor& ids, const Tensor& grad,
                                      const Tensor& stats, const Tensor& dense,
                                      const std::optional<Tensor>& slope,
                                      const std::optional<Tensor>& tail_stats,
                                      const std::optional<Tensor>& tail_dense,
                                      int64_t valid_vocab, double temperature);
std::tuple<Tensor, Tensor> full_kl_cpu(const Tensor& student_logits, const Tensor& teacher_logits,
                                       int64_t valid_vocab, double temperature,
                                       int64_t divergence, double beta);
Tensor full_kl_backward_cpu(const Tensor& student_logits, const Tensor& teacher_logits,
                            const Tensor& stats, const Tensor& grad, int64_t valid_vocab,
                            double temperature, int64_t divergence, double beta);
void full_kl_backward_inplace_cpu(const Tensor& student_logits, const Tensor& teacher_logits,
                                  const Tensor& stats, const Tensor& grad, int64_t valid_vocab,
                                  double temperature, int64_t divergence, double beta);

}  // namespace opd
