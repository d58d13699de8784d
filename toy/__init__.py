"""A study of bias and variance in on-policy distillation, exact where the paper estimates."""
