#define OPD_AVX512
#include "kernels.inl"

namespace opd {
const Kernels<float>& kernels_avx512() {
  static constexpr Kernels<float> all = table<F32>();
  return all;
}
}  // namespace opd
