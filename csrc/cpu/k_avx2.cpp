#define OPD_AVX2
#include "kernels.inl"

namespace opd {
const Kernels<float>& kernels_avx2() {
  static constexpr Kernels<float> all = table<F32>();
  return all;
}
}  // namespace opd
