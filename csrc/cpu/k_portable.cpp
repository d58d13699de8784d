#include "kernels.inl"

namespace opd {
const Kernels<float>& kernels_portable() {
  static constexpr Kernels<float> all = table<F32>();
  return all;
}
const Kernels<double>& kernels_double() {
  static constexpr Kernels<double> all = table<F64>();
  return all;
}
}  // namespace opd
