// The backward ops that write into a new tensor or a given one; included at the end of each
// device's ops.cpp, which has `backward_rows` and `divergence_grad_rows`.
Tensor gather_logp_backward(const Tensor& logits, const Tensor& ids, const Tensor& grad,
                            const Tensor& stats, const Tensor& dense,
                            const std::optional<Tensor>& slope,
                            const std::optional<Tensor>& tail_stats,
                            const std::optional<Tensor>& tail_dense, int64_t valid_vocab,
                            double temperature) {
  const Tensor z = with_dense_rows("logits", logits);
  const Tensor out = new_rows(z);
  backward_rows(z, out, ids, grad, stats, dense, slope, tail_stats, tail_dense, valid_vocab,
                temperature);
  return out;
}

void gather_logp_backward_out(const Tensor& logits, const Tensor& ids, const Tensor& grad,
                              const Tensor& stats, const Tensor& dense,
                              const std::optional<Tensor>& slope,
                              const std::optional<Tensor>& tail_stats,
                              const std::optional<Tensor>& tail_dense, int64_t valid_vocab,
                              double temperature, const Tensor& out) {
  const Tensor z = with_dense_rows("logits", logits);
  check_out(out, z);
  backward_rows(z, out, ids, grad, stats, dense, slope, tail_stats, tail_dense, valid_vocab,
                temperature);
}

void full_kl_backward_out(const Tensor& student_logits, const Tensor& teacher_logits,
                          const Tensor& stats, const Tensor& grad, int64_t valid_vocab,
                          double temperature, int64_t divergence, double beta, const Tensor& out) {
  const Tensor student = with_dense_rows("student_logits", student_logits);
  const Tensor teacher = with_dense_rows("teacher_logits", teacher_logits, student);
  check_out(out, student);
  divergence_grad_rows(student, teacher, out, stats, grad, valid_vocab, temperature, divergence,
                       beta);
}
