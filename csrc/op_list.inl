// The ops that bindings.cpp registers; included once for each device, inside its namespace.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gather_logp(
    const Tensor& logits, const Tensor& ids, int64_t valid_vocab, double temperature,
    bool with_entropy, bool with_tail);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> topk_logp(
    const Tensor& logits, int64_t k, const std::optional<Tensor>& token_ids, int64_t valid_vocab,
    double temperature);
Tensor gather_linear(const Tensor& hidden, const Tensor& head, const Tensor& ids, double scale);
Tensor gather_linear_backward_hidden(const Tensor& hidden, const Tensor& head, const Tensor& ids,
                                     const Tensor& grad);
void gather_linear_backward_head(const Tensor& buffer, const Tensor& hidden, const Tensor& ids,
                                 const Tensor& grad);
Tensor gather_logp_backward(const Tensor& logits, const Tensor& ids, const Tensor& grad,
                            const Tensor& stats, const Tensor& dense,
                            const std::optional<Tensor>& slope,
                            const std::optional<Tensor>& tail_stats,
                            const std::optional<Tensor>& tail_dense, int64_t valid_vocab,
                            double temperature);
void gather_logp_backward_out(const Tensor& logits, const Tensor& ids, const Tensor& grad,
                              const Tensor& stats, const Tensor& dense,
                              const std::optional<Tensor>& slope,
                              const std::optional<Tensor>& tail_stats,
                              const std::optional<Tensor>& tail_dense, int64_t valid_vocab,
                              double temperature, const Tensor& out);
std::tuple<Tensor, Tensor> full_kl(const Tensor& student_logits, const Tensor& teacher_logits,
                                   int64_t valid_vocab, double temperature, int64_t divergence,
                                   double beta);
void full_kl_backward_out(const Tensor& student_logits, const Tensor& teacher_logits,
                          const Tensor& stats, const Tensor& grad, int64_t valid_vocab,
                          double temperature, int64_t divergence, double beta, const Tensor& out);
void scale_out(const Tensor& source, const Tensor& factor, const Tensor& out);
