// What the kernels share: number types, 16-byte loads and stores, reductions, the online softmax.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef OPD_EMULATION
#include "emulation/emulation.h"
#else
#include <cuda_runtime.h>
#define OPD_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define OPD_DYNAMIC_SHARED(type, name)                            \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(dynamic_shared)
#endif

#include "kernels.h"

namespace opd::cuda {

constexpr int kThreads = 512;  // a block works on one row
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr float kLowest = -3e38f;  // finite: -inf - kLowest is -inf and not NaN
constexpr double kLog2e = 1.4426950408889634;

// ==== numbers ====

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

#ifdef OPD_EMULATION
inline float to_float(F16 x) { return emulation::half_to_float(x.bits); }
inline float to_float(BF16 x) { return emulation::bfloat16_to_float(x.bits); }
inline void assign(F16& out, float x) { out.bits = emulation::float_to_half(x); }
inline void assign(BF16& out, float x) { out.bits = emulation::float_to_bfloat16(x); }
inline float exp2_fast(float x) { return std::exp2(x); }
#else
__device__ __forceinline__ float to_float(F16 x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
}
__device__ __forceinline__ float to_float(BF16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ void assign(F16& out, float x) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
}
__device__ __forceinline__ void assign(BF16& out, float x) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
}
// What exp2f uses too (2 ulp), without its care for results below 1e-38, which are 0 here.
__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
#endif
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ void assign(float& out, float x) { out = x; }

template <class F>
auto with_dtype(DType dtype, const F& f) {
  if (dtype == DType::bf16) return f(BF16());
  if (dtype == DType::f16) return f(F16());
  return f(float());
}

// ==== loads and stores: `n` neighbours, 16 bytes at once where the address allows it ====

template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T, int n = kVector<T>>
struct alignas(n * sizeof(T)) Packed {
  T item[n];
};

template <class T, int n = kVector<T>>
__device__ __forceinline__ bool aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (n * sizeof(T)) == 0;
}

// The types of a kernel that reads T and writes O: the same, or float and one of 16 bits.
template <class F>
auto with_dtypes(DType in, DType out, const F& f) {
  if (in == DType::f32 && out == DType::bf16) return f(float(), BF16());
  if (in == DType::f32 && out == DType::f16) return f(float(), F16());
  return with_dtype(in, [&](auto zero) { return f(zero, zero); });
}

// As one access. In assembler, since nvcc takes some stores of structs and of uint4 apart.
template <class P>
__device__ __forceinline__ void store_packed(P* p, const P& value) {
#ifdef OPD_EMULATION
  *p = value;
#else
  uint32_t w[sizeof(P) / 4];
  memcpy(w, &value, sizeof(P));
  const size_t address = __cvta_generic_to_global(p);
  if constexpr (sizeof(P) == 16)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(w[0]), "r"(w[1]),
                 "r"(w[2]), "r"(w[3])
                 : "memory");
  else
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(w[0]), "r"(w[1])
                 : "memory");
#endif
}

template <class T, int n>
__device__ __forceinline__ void load(const T* p, float (&out)[n]) {
  if (n % kVector<T> == 0 && aligned(p)) {
#pragma unroll
    for (int i = 0; i < n; i += kVector<T>) {
      const Packed<T> raw = *reinterpret_cast<const Packed<T>*>(p + i);
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j)
        if (i + j < n) out[i + j] = to_float(raw.item[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) out[i] = to_float(p[i]);
  }
}

template <class T, int n>
__device__ __forceinline__ void store(T* p, const float (&value)[n]) {
  constexpr int width = n < kVector<T> ? n : kVector<T>;
  if (n % width == 0 && aligned<T, width>(p)) {
#pragma unroll
    for (int i = 0; i < n; i += width) {
      Packed<T, width> raw;
#pragma unroll
      for (int j = 0; j < width; ++j)
        if (i + j < n) assign(raw.item[j], value[i + j]);
      store_packed(reinterpret_cast<Packed<T, width>*>(p + i), raw);
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) assign(p[i], value[i]);
  }
}

template <class T>
__device__ __forceinline__ T* row_of(const Rows& rows, int64_t n) {
  return static_cast<T*>(rows.data) + n * rows.stride;
}

// Columns i to i + n of a row; those outside [0, size) are `other`, and stay unwritten.
template <class T, int n>
__device__ __forceinline__ void load_columns(const T* row, int64_t i, int64_t size, float other,
                                             float (&out)[n]) {
  if (i >= 0 && i + n <= size) {
    load(row + i, out);
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j) out[j] = i + j >= 0 && i + j < size ? to_float(row[i + j]) : other;
  }
}

template <class T, int n>
__device__ __forceinline__ void store_columns(T* row, int64_t i, int64_t size,
                                              const float (&value)[n]) {
  if (i >= 0 && i + n <= size) {
    store(row + i, value);
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j)
      if (i + j >= 0 && i + j < size) assign(row[i + j], value[j]);
  }
}

// A row whose type is known only at run time: the second operand of a kernel.
struct AnyRow {
  char* data;
  int64_t valid;
  DType dtype;
  __device__ AnyRow(const Rows& rows, int64_t n)
      : data(static_cast<char*>(rows.data) + n * rows.stride * (rows.dtype == DType::f32 ? 4 : 2)),
        valid(rows.valid),
        dtype(rows.dtype) {}
  template <int n>
  __device__ __forceinline__ void columns(int64_t i, float other, float (&out)[n]) const {
    if (dtype == DType::bf16)
      load_columns(reinterpret_cast<const BF16*>(data), i, valid, other, out);
    else if (dtype == DType::f16)
      load_columns(reinterpret_cast<const F16*>(data), i, valid, other, out);
    else
      load_columns(reinterpret_cast<const float*>(data), i, valid, other, out);
  }
  template <int n>
  __device__ __forceinline__ void set_columns(int64_t i, const float (&value)[n]) const {
    if (dtype == DType::bf16)
      store_columns(reinterpret_cast<BF16*>(data), i, valid, value);
    else if (dtype == DType::f16)
      store_columns(reinterpret_cast<F16*>(data), i, valid, value);
    else
      store_columns(reinterpret_cast<float*>(data), i, valid, value);
  }
};

// Where to begin so that all whole vectors are aligned: 0, or a few columns before the row.
template <class T>
__device__ __forceinline__ int64_t first_column(const T* row) {
  return -static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}

template <class T>
__device__ void fill_with_zero(T* out, int64_t size) {
  const float zero[kVector<T>] = {};
  for (int64_t c = first_column(out) + threadIdx.x * kVector<T>; c < size;
       c += kVector<T> * kThreads)
    store_columns(out, c, size, zero);
}

// ==== reductions: trees of fixed shape, so that results are the same bits in every run ====

struct Sum {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a + b;
  }
};
struct Max {  // ignores NaN
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <class V, class Op>
__device__ __forceinline__ V warp_reduce(V x, Op op) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(kAll, x, offset));
  return x;
}

// The same value for every thread of the block.
template <class V, class Op>
__device__ V block_reduce(V x, Op op) {
  __shared__ V parts[kWarps];
  x = warp_reduce(x, op);
  __syncthreads();  // the last call's parts have been read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  V result = parts[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) result = op(result, parts[i]);
  return result;
}

// ==== softmax ====

// probability = exp((z - shift) / temperature - log_sum). A row without a possible token has
// shift -inf and log_sum 0.
struct RowStats {
  double shift, log_sum, entropy;
};

// Sum of exp((z - max) / temperature), online; `weighted` is the sum of exp(..) * (z - max).
struct RowSum {
  float max = kLowest;
  double sum = 0.0, weighted = 0.0;

  // `scale` is log2(e) / temperature throughout.
  template <bool entropy, int n>
  __device__ __forceinline__ void add(const float (&z)[n], float scale) {
    float peak = z[0];
#pragma unroll
    for (int j = 1; j < n; ++j) peak = fmaxf(peak, z[j]);
    if (peak > max) move<entropy>(peak, scale);
    float total = 0.0f, product = 0.0f;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float x = z[j] - max, e = exp2_fast(x * scale);
      total += e;
      if (entropy) product += e * fmaxf(x, kLowest);
    }
    sum += total;
    if (entropy) weighted += product;
  }

  template <bool entropy>
  __device__ __forceinline__ void move(float to, float scale) {
    if (sum != 0.0) {
      const float gap = max - to;
      const double shrink = exp2_fast(gap * scale);
      if (entropy) weighted = (weighted + fmaxf(gap, kLowest) * sum) * shrink;
      sum *= shrink;
    }
    max = to;
  }

  template <bool entropy>
  __device__ void across_block(float scale) {
    move<entropy>(block_reduce(max, Max()), scale);
    sum = block_reduce(sum, Sum());
    if (entropy) weighted = block_reduce(weighted, Sum());
  }

  __device__ RowStats stats(double inv_temperature) const {
    if (sum == 0.0) return {-INFINITY, 0.0, 0.0};
    const double log_sum = log(sum), entropy = log_sum - weighted / sum * inv_temperature;
    return {max, log_sum, entropy < 0.0 ? 0.0 : entropy};
  }
};

// Of 16 bytes each, by a thread before it uses the first.
constexpr int kLoads = 4;

// Columns i to i + kVector of a row, 16 aligned bytes; -inf outside [0, valid).
template <class T>
__device__ __forceinline__ void load_raw(const T* row, int64_t i, int64_t valid, Packed<T>& out) {
  if (i >= 0 && i + kVector<T> <= valid) {
    out = *reinterpret_cast<const Packed<T>*>(row + i);
  } else {
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      if (i + j >= 0 && i + j < valid)
        out.item[j] = row[i + j];
      else
        assign(out.item[j], -INFINITY);
    }
  }
}

// Columns c, c + kVector * kThreads, ... of a row.
template <class T>
__device__ __forceinline__ void load_ahead(const T* row, int64_t c, int64_t valid,
                                           Packed<T> (&out)[kLoads]) {
#pragma unroll
  for (int t = 0; t < kLoads; ++t) load_raw(row, c + t * kVector<T> * kThreads, valid, out[t]);
}

// A set of columns as bits in shared memory. Column i is bit i + 32: the first step of a row may
// begin before it.
struct Mask {
  uint32_t* words;
  __host__ __device__ static int64_t size(int64_t columns) { return columns / 32 + 3; }
  __device__ void insert(int64_t i) const { atomicOr(words + i / 32 + 1, 1u << (i % 32)); }
  // The columns from i on, the first one in the lowest bit.
  __device__ __forceinline__ uint32_t from(int64_t i) const {
    const uint32_t* word = words + (i + 32) / 32;
    return (word[0] | static_cast<uint64_t>(word[1]) << 32) >> ((i + 32) % 32);
  }
};

// Columns in `mask` are left out.
template <bool entropy, bool masked, class T>
__device__ RowSum sum_row(const T* row, int64_t valid, float scale, Mask mask) {
  constexpr int n = kVector<T>, together = 16 / n;  // vectors that are added at once
  RowSum result;
  for (int64_t c = first_column(row) + threadIdx.x * n; c < valid; c += kLoads * n * kThreads) {
    Packed<T> raw[kLoads];
    load_ahead(row, c, valid, raw);
#pragma unroll
    for (int first = 0; first < kLoads; first += together) {
      float z[together][n];
#pragma unroll
      for (int t = 0; t < together; ++t) {
        const int64_t i = c + (first + t) * n * kThreads;
        const uint32_t out = masked && i < valid ? mask.from(i) : 0;
#pragma unroll
        for (int j = 0; j < n; ++j)
          z[t][j] = out >> j & 1 ? -INFINITY : to_float(raw[first + t].item[j]);
      }
      result.add<entropy>(reinterpret_cast<float (&)[16]>(z), scale);
    }
  }
  result.across_block<entropy>(scale);
  return result;
}

__device__ inline double logp_of(float z, const RowStats& s, double inv_temperature) {
  if (s.shift == -INFINITY) return -INFINITY;
  return (z - s.shift) * inv_temperature - s.log_sum;
}

__device__ inline double lse_of(const RowStats& s, double inv_temperature) {
  return s.shift == -INFINITY ? -INFINITY : s.shift * inv_temperature + s.log_sum;
}

// Log of the mass outside a set, from the statistics of the complement and of the row.
__device__ inline double tail_of(const RowStats& outside, const RowStats& row,
                                 double inv_temperature) {
  if (outside.shift == -INFINITY) return row.log_sum != row.log_sum ? row.log_sum : -INFINITY;
  return (outside.shift - row.shift) * inv_temperature + outside.log_sum - row.log_sum;
}

// ==== launches ====

template <class Kernel, class... Args>
int launch_on(Launch where, Kernel kernel, dim3 grid, int block, int64_t shared,
              const Args&... args) {
  if (grid.x == 0 || grid.y == 0) return 0;
#ifndef OPD_EMULATION
  // This library has a CUDA runtime of its own, and that has a current device of its own.
  if (const cudaError_t error = cudaSetDevice(where.device)) return error;
  if (shared > 28 * 1024) {  // with what a kernel declares itself, 48 KiB need no permission
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error) return error;
  }
#endif
  OPD_LAUNCH(kernel, grid, block, shared, where.stream, args...);
#ifdef OPD_EMULATION
  return 0;
#else
  return cudaGetLastError();
#endif
}

}  // namespace opd::cuda
