// A vector of float32 in three widths, and double as a vector of one. Included once per
// instruction set; everything here is in an anonymous namespace, so that the linker never merges
// code compiled for different processors. No standard-library templates for the same reason.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(OPD_AVX512) || defined(OPD_AVX2)
#include <immintrin.h>
#else
#include <torch/headeronly/util/Half.h>
#endif

namespace opd {
namespace {

// a > b ? a : b returns b when either is NaN: `vmax(x, best)` ignores NaN in x, and
// `vmax(bound, x)` keeps it.
#if defined(OPD_AVX512)

typedef __m512 vf;
inline vf vset(float a) { return _mm512_set1_ps(a); }
inline vf vload(const float* p) { return _mm512_loadu_ps(p); }
inline void vstore(float* p, vf a) { _mm512_storeu_ps(p, a); }
inline vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf vpow2(vf a, vf n) { return _mm512_scalef_ps(a, n); }  // a * 2^n
inline vf vif_gt(vf a, vf b, vf yes, vf no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
}
inline float vhmax(vf a) { return _mm512_reduce_max_ps(a); }
inline float vhsum(vf a) { return _mm512_reduce_add_ps(a); }
// Bit i is set where a[i] >= b[i], or a[i] > b[i] (NaN: not).
inline uint32_t vge_bits(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline uint32_t vgt_bits(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }

#elif defined(OPD_AVX2)

typedef __m256 vf;
inline vf vset(float a) { return _mm256_set1_ps(a); }
inline vf vload(const float* p) { return _mm256_loadu_ps(p); }
inline void vstore(float* p, vf a) { _mm256_storeu_ps(p, a); }
inline vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf vround(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT); }
inline vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf vpow2(vf a, vf n) {
  n = _mm256_min_ps(_mm256_max_ps(n, vset(-127.0f)), vset(128.0f));
  __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return a * _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
inline vf vif_gt(vf a, vf b, vf yes, vf no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
inline float vhmax(vf a) {
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
inline float vhsum(vf a) {
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
inline uint32_t vge_bits(vf a, vf b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}

inline uint32_t vgt_bits(vf a, vf b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}

#else  // portable: 16-byte vectors of the compiler (SSE2, NEON, ...)

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vint __attribute__((vector_size(16)));
inline vf vset(float a) { return vf{a, a, a, a}; }
inline vf vload(const float* p) {
  vf a;
  memcpy(&a, p, sizeof a);
  return a;
}
inline void vstore(float* p, vf a) { memcpy(p, &a, sizeof a); }
inline vf vpick(vint mask, vf yes, vf no) {
  return (vf)((mask & (vint)yes) | (~mask & (vint)no));
}
inline vf vmax(vf a, vf b) { return vpick(a > b, a, b); }
inline vf vmin(vf a, vf b) { return vpick(a < b, a, b); }
inline vf vround(vf a) {  // to nearest, ties to even, for |a| < 2^22
  const vf magic = vset(12582912.0f);
  return (a + magic) - magic;
}
inline vf vfma(vf a, vf b, vf c) { return a * b + c; }
inline vf vpow2(vf a, vf n) {
  n = vmin(vmax(n, vset(-127.0f)), vset(128.0f));
  vint e = __builtin_convertvector(n, vint) + 127;
  return a * (vf)(e << 23);
}
inline vf vif_gt(vf a, vf b, vf yes, vf no) { return vpick(a > b, yes, no); }
inline float vhmax(vf a) {
  float best = a[0];
  for (int i = 1; i < 4; ++i) best = a[i] > best ? a[i] : best;
  return best;
}
inline float vhsum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline uint32_t vge_bits(vf a, vf b) {
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= uint32_t(a[i] >= b[i]) << i;
  return bits;
}
inline uint32_t vgt_bits(vf a, vf b) {
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= uint32_t(a[i] > b[i]) << i;
  return bits;
}

#endif

constexpr float kLowest = -3.0e38f;  // stands for -inf where -inf * 0 has to be 0

// exp(x * s) for a fixed s > 0. Relative error below 1.5e-7 + |x| * s * 6e-8; 0 below -110.
// 2^f is 1 + f * q(f), so that exp(0) is exactly 1.
struct ExpF {
  vf scale, lowest;  // exp is 0 from `lowest` on
#if !defined(OPD_AVX512) && !defined(OPD_AVX2)
  vf factor;
#endif
  explicit ExpF(double s) {
    const double log2e = 1.4426950408889634;
    scale = vset(static_cast<float>(s * log2e));
    lowest = vset(static_cast<float>(-160.0 / (s * log2e)));
#if !defined(OPD_AVX512) && !defined(OPD_AVX2)
    factor = vset(static_cast<float>(s));
#endif
  }
  vf operator()(vf x) const {
#if defined(OPD_AVX512)
    // scalef takes the floor of its second argument, reduce leaves the rest of it (0 for -inf), so
    // that no rounding and no bound is needed; the polynomial is that of [0, 1].
    const vf t = x * scale;
    const vf f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    vf q = vset(0.0018671302823349833f);
    q = vfma(q, f, vset(0.009017029777169228f));
    q = vfma(q, f, vset(0.05579991266131401f));
    q = vfma(q, f, vset(0.24016444385051727f));
    q = vfma(q, f, vset(0.6931512951850891f));
    return vpow2(vfma(q, f, vset(1.0f)), t);
#else
    x = vmax(lowest, x);
    const vf t = x * scale, n = vround(t);
#if defined(OPD_AVX2)
    const vf f = t - n;
#else
    const vf y = x * factor;  // ln 2 in two parts, because a * b + c rounds twice here
    const vf f = ((y - n * vset(0.693359375f)) - n * vset(-2.12194440e-4f)) * vset(1.44269504f);
#endif
    vf q = vset(0.001326472731307149f);
    q = vfma(q, f, vset(0.009671512991189957f));
    q = vfma(q, f, vset(0.05550733581185341f));
    q = vfma(q, f, vset(0.24022242426872253f));
    q = vfma(q, f, vset(0.6931470036506653f));
    return vpow2(vfma(q, f, vset(1.0f)), n);
#endif
  }
};

// Natural logarithm of a positive, finite, normal number (after Cephes logf).
inline vf vlog(vf x) {
  typedef int32_t vi __attribute__((vector_size(sizeof(vf))));
  const vi bits = (vi)x;
  const vi e = (bits - 0x3f3504f3) >> 23;  // x = m * 2^e, sqrt(1/2) <= m < sqrt(2)
  const vf m = (vf)(bits - (e << 23));
  const vf f = m - vset(1.0f), exponent = __builtin_convertvector(e, vf), square = f * f;
  vf p = vset(7.0376836292e-2f);
  p = vfma(p, f, vset(-1.1514610310e-1f));
  p = vfma(p, f, vset(1.1676998740e-1f));
  p = vfma(p, f, vset(-1.2420140846e-1f));
  p = vfma(p, f, vset(1.4249322787e-1f));
  p = vfma(p, f, vset(-1.6668057665e-1f));
  p = vfma(p, f, vset(2.0000714765e-1f));
  p = vfma(p, f, vset(-2.4999993993e-1f));
  p = vfma(p, f, vset(3.3333331174e-1f));
  vf y = p * f * square;
  y = vfma(exponent, vset(-2.12194440e-4f), y);
  y = y - vset(0.5f) * square;
  return vfma(exponent, vset(0.693359375f), f + y);
}

struct F32 {
  using A = float;
  using V = vf;
  using Exp = ExpF;
  static constexpr int64_t width = sizeof(vf) / sizeof(float);
  static constexpr float lowest = kLowest;
  static V set(double a) { return vset(static_cast<float>(a)); }
};

#if !defined(OPD_AVX512) && !defined(OPD_AVX2)
inline double vload(const double* p) { return *p; }
inline void vstore(double* p, double a) { *p = a; }
inline double vmax(double a, double b) { return a > b ? a : b; }
inline double vmin(double a, double b) { return a < b ? a : b; }
inline double vfma(double a, double b, double c) { return a * b + c; }
inline double vif_gt(double a, double b, double yes, double no) { return a > b ? yes : no; }
inline uint32_t vge_bits(double a, double b) { return a >= b; }
inline uint32_t vgt_bits(double a, double b) { return a > b; }
inline double vhmax(double a) { return a; }
inline double vhsum(double a) { return a; }
inline double vlog(double x) { return ::log(x); }

struct ExpD {
  double scale, lowest;
  explicit ExpD(double s) : scale(s), lowest(-800.0 / s) {}
  double operator()(double x) const { return ::exp(x * scale); }
};

struct F64 {
  using A = double;
  using V = double;
  using Exp = ExpD;
  static constexpr int64_t width = 1;
  static constexpr double lowest = -1.0e300;
  static V set(double a) { return a; }
};
#endif

// ==== storage types ====

inline float from_bf16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint16_t to_bf16(float x) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

#if defined(OPD_AVX512) || defined(OPD_AVX2)
inline float from_f16(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t to_f16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
inline float from_f16(uint16_t h) { return c10::detail::fp16_ieee_to_fp32_value(h); }
inline uint16_t to_f16(float x) { return c10::detail::fp16_ieee_from_fp32_value(x); }
#endif

inline float load_at(const Row& row, int64_t i, float) {
  switch (row.dtype) {
    case DType::bf16: return from_bf16(static_cast<const uint16_t*>(row.data)[i]);
    case DType::f16: return from_f16(static_cast<const uint16_t*>(row.data)[i]);
    default: return static_cast<const float*>(row.data)[i];
  }
}
inline double load_at(const Row& row, int64_t i, double) {
  return static_cast<const double*>(row.data)[i];
}

inline void store_at(void* out, DType dtype, int64_t i, float x) {
  switch (dtype) {
    case DType::bf16: static_cast<uint16_t*>(out)[i] = to_bf16(x); break;
    case DType::f16: static_cast<uint16_t*>(out)[i] = to_f16(x); break;
    default: static_cast<float*>(out)[i] = x;
  }
}
inline void store_at(void* out, DType, int64_t i, double x) { static_cast<double*>(out)[i] = x; }

inline int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// The logits [begin, begin + kChunk) as float32: where they lie, or converted into `buffer`;
// beyond the end of the row, `fill`.
inline const float* fetch(const Row& row, int64_t begin, float* buffer, float fill = -INFINITY) {
  const int64_t n = row.valid - begin;
  if (row.dtype == DType::f32) {
    const float* p = static_cast<const float*>(row.data) + begin;
    if (n >= kChunk) return p;
    for (int64_t i = 0; i < kChunk; ++i) buffer[i] = i < n ? p[i] : fill;
    return buffer;
  }
  const uint16_t* p = static_cast<const uint16_t*>(row.data) + begin;
  if (n < kChunk) {
    const bool bf16 = row.dtype == DType::bf16;
    for (int64_t i = 0; i < kChunk; ++i)
      buffer[i] = i >= n ? fill : bf16 ? from_bf16(p[i]) : from_f16(p[i]);
  } else if (row.dtype == DType::bf16) {
    for (int64_t i = 0; i < kChunk; ++i) buffer[i] = from_bf16(p[i]);
  } else {
#if defined(OPD_AVX512)
    for (int64_t i = 0; i < kChunk; i += 16)
      vstore(buffer + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + i))));
#elif defined(OPD_AVX2)
    for (int64_t i = 0; i < kChunk; i += 8)
      vstore(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + i))));
#else
    for (int64_t i = 0; i < kChunk; ++i) buffer[i] = from_f16(p[i]);
#endif
  }
  return buffer;
}

inline const double* fetch(const Row& row, int64_t begin, double* buffer,
                           double fill = -INFINITY) {
  const int64_t n = row.valid - begin;
  const double* p = static_cast<const double*>(row.data) + begin;
  if (n >= kChunk) return p;
  for (int64_t i = 0; i < kChunk; ++i) buffer[i] = i < n ? p[i] : fill;
  return buffer;
}

// Where the results of a chunk are computed: in place for whole float32 chunks, else in `buffer`.
inline float* place(void* out, DType dtype, int64_t begin, int64_t n, float* buffer) {
  return dtype == DType::f32 && n >= kChunk ? static_cast<float*>(out) + begin : buffer;
}
inline double* place(void* out, DType, int64_t begin, int64_t n, double* buffer) {
  return n >= kChunk ? static_cast<double*>(out) + begin : buffer;
}

inline void commit(void* out, DType dtype, int64_t begin, int64_t n, const float* values) {
  if (n > kChunk) n = kChunk;
  if (dtype == DType::f32) {
    float* p = static_cast<float*>(out) + begin;
    if (p != values) memcpy(p, values, n * sizeof(float));
    return;
  }
  uint16_t* p = static_cast<uint16_t*>(out) + begin;
  if (n < kChunk) {
    for (int64_t i = 0; i < n; ++i)
      p[i] = dtype == DType::bf16 ? to_bf16(values[i]) : to_f16(values[i]);
  } else if (dtype == DType::bf16) {
    for (int64_t i = 0; i < kChunk; ++i) p[i] = to_bf16(values[i]);
  } else {
#if defined(OPD_AVX512)
    for (int64_t i = 0; i < kChunk; i += 16)
      _mm256_storeu_si256((__m256i*)(p + i),
                          _mm512_cvtps_ph(vload(values + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(OPD_AVX2)
    for (int64_t i = 0; i < kChunk; i += 8)
      _mm_storeu_si128((__m128i*)(p + i),
                       _mm256_cvtps_ph(vload(values + i), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int64_t i = 0; i < kChunk; ++i) p[i] = to_f16(values[i]);
#endif
  }
}
inline void commit(void* out, DType, int64_t begin, int64_t n, const double* values) {
  double* p = static_cast<double*>(out) + begin;
  if (p != values) memcpy(p, values, (n < kChunk ? n : kChunk) * sizeof(double));
}

}  // namespace
}  // namespace opd
