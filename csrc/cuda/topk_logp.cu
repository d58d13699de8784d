// Top-K of a row, its log-sum-exp, the mass outside, and a token's log-prob, in one pass.
#include "device.cuh"

namespace opd::cuda {
namespace {

constexpr int kBuffer = 2 * kMaxK;           // candidates that a block can sort
constexpr uint32_t kMinusInf = 0x007fffffu;  // ordered(-inf)

// Keys in the order of the numbers. NaN counts as -inf, -0 as 0.
__device__ __forceinline__ uint32_t ordered(float z) {
  const uint32_t bits = __float_as_uint(fmaxf(z, -INFINITY) + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Value and id in one key: larger is better, of equal values the lower id; all keys differ.
__device__ __forceinline__ uint64_t key_of(float z, int64_t id) {
  return static_cast<uint64_t>(ordered(z)) << 32 | static_cast<uint32_t>(~id);
}

__device__ __forceinline__ int64_t id_of(uint64_t key) { return static_cast<uint32_t>(~key); }

// A row in chunks of kTopkChunk columns, each read by one warp; chunk 0 begins at first_column.
template <class T>
struct Chunks {
  static constexpr int n = kVector<T>, turns = kTopkChunk / (32 * kVector<T>);
  const T* row;
  int64_t valid, begin, num;
  __device__ Chunks(const T* r, int64_t v)
      : row(r), valid(v), begin(first_column(r)), num((v - begin + kTopkChunk - 1) / kTopkChunk) {}
  __device__ __forceinline__ int64_t column(int64_t c, int t) const {
    return begin + c * kTopkChunk + (t * 32 + threadIdx.x % 32) * n;
  }
  __device__ __forceinline__ void read(int64_t c, float (&z)[turns][n]) const {
#pragma unroll
    for (int t = 0; t < turns; ++t) load_columns(row, column(c, t), valid, -INFINITY, z[t]);
  }
};

// The threads of a block share: per chunk its largest logit and its sum of
// exp((z - largest) / temperature), and the candidates.
struct Shared {
  float *peaks, *sums;
  uint64_t* keys;
  int* count;
};

template <class T>
__device__ void first_pass(const Chunks<T>& chunks, const Shared& s, float scale) {
  for (int64_t c = threadIdx.x / 32; c < chunks.num; c += kWarps) {
    float z[Chunks<T>::turns][Chunks<T>::n];
    chunks.read(c, z);
    float peak = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int t = 0; t < Chunks<T>::turns; ++t)
#pragma unroll
      for (int j = 0; j < Chunks<T>::n; ++j) peak = fmaxf(peak, z[t][j]);
    peak = warp_reduce(peak, Max());
    const float shift = fmaxf(peak, kLowest);
#pragma unroll
    for (int t = 0; t < Chunks<T>::turns; ++t) {
#pragma unroll
      for (int j = 0; j < Chunks<T>::n; ++j) sum += exp2_fast((z[t][j] - shift) * scale);
    }
    sum = warp_reduce(sum, Sum());
    if (threadIdx.x % 32 == 0) {
      s.peaks[c] = peak;
      s.sums[c] = sum;
    }
  }
  __syncthreads();
}

// The k-th largest chunk maximum: a lower bound of the k-th largest logit. Every maximum counts
// those before it; one of them finds k - 1.
__device__ inline float kth_peak(const float* peaks, int64_t num, int64_t k) {
  __shared__ float found;
  for (int64_t i = threadIdx.x; i < num; i += kThreads) {
    const float mine = peaks[i];
    int64_t before = 0;
    for (int64_t j = 0; j < num; ++j) before += peaks[j] > mine || (peaks[j] == mine && j < i);
    if (before == k - 1) found = mine;
  }
  __syncthreads();
  return found;
}

// Puts the keys that are at least `threshold` into the buffer, in any order, and returns how many
// there are; those over the buffer's size are only counted.
template <class T>
__device__ int collect(const Chunks<T>& chunks, const Shared& s, uint64_t threshold) {
  if (threadIdx.x == 0) *s.count = 0;
  __syncthreads();
  for (int64_t c = threadIdx.x / 32; c < chunks.num; c += kWarps) {
    if (ordered(s.peaks[c]) < threshold >> 32) continue;
    float z[Chunks<T>::turns][Chunks<T>::n];
    chunks.read(c, z);
    for (int t = 0; t < Chunks<T>::turns; ++t) {
      for (int j = 0; j < Chunks<T>::n; ++j) {
        const int64_t i = chunks.column(c, t) + j;
        const uint64_t key = key_of(z[t][j], i);
        if (i < 0 || i >= chunks.valid || key < threshold) continue;
        const int at = atomicAdd(s.count, 1);
        if (at < kBuffer) s.keys[at] = key;
      }
    }
  }
  __syncthreads();
  const int count = *s.count;
  __syncthreads();
  return count;
}

// The k-th largest key of a row, digit by digit: for rows with more candidates than the buffer
// holds (fewer chunks than k, many ties, the largest logits in few chunks).
template <class T>
__device__ uint64_t kth_key(const T* row, int64_t valid, int k) {
  __shared__ int histogram[256];
  __shared__ int digit, rest, size;
  uint64_t prefix = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kThreads) histogram[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < valid; i += kThreads) {
      const uint64_t key = key_of(to_float(row[i]), i);
      if (shift == 56 || key >> (shift + 8) == prefix)
        atomicAdd(histogram + (key >> shift & 255), 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int d = 255, left = k;
      for (; histogram[d] < left; --d) left -= histogram[d];
      digit = d;
      rest = left;
      size = histogram[d];
    }
    __syncthreads();
    prefix = prefix << 8 | digit;
    k = rest;
    if (size == k) return prefix << shift;  // all that begin with these digits
    __syncthreads();
  }
  return prefix;
}

// Sorts the first `count` keys in descending order.
__device__ inline void sort(uint64_t* keys, int count) {
  int size = 1;
  while (size < count) size *= 2;
  for (int i = count + threadIdx.x; i < size; i += kThreads) keys[i] = 0;
  __syncthreads();
  for (int block = 2; block <= size; block *= 2) {
    for (int step = block / 2; step > 0; step /= 2) {
      for (int i = threadIdx.x; i < size; i += kThreads) {
        const int other = i ^ step;
        if (other <= i) continue;
        const uint64_t a = keys[i], b = keys[other];
        if ((a < b) == ((i & block) == 0)) {
          keys[i] = b;
          keys[other] = a;
        }
      }
      __syncthreads();
    }
  }
}

// Sum over the keys below `last`, relative to `shift`: chunks without a winner by their sums.
template <class T>
__device__ double outside_sum(const Chunks<T>& chunks, const Shared& s, float scale, float shift,
                              uint64_t last) {
  double sum = 0.0;
  for (int64_t c = threadIdx.x / 32; c < chunks.num; c += kWarps) {
    const float peak = s.peaks[c];
    if (ordered(peak) < last >> 32) {
      if (threadIdx.x % 32 == 0)
        sum += static_cast<double>(s.sums[c]) * exp2_fast((fmaxf(peak, kLowest) - shift) * scale);
      continue;
    }
    float z[Chunks<T>::turns][Chunks<T>::n];
    chunks.read(c, z);
    float part = 0.0f;
    for (int t = 0; t < Chunks<T>::turns; ++t)
      for (int j = 0; j < Chunks<T>::n; ++j)
        if (key_of(z[t][j], chunks.column(c, t) + j) < last)
          part += exp2_fast((z[t][j] - shift) * scale);
    sum += part;
  }
  return block_reduce(sum, Sum());
}

// The same against its own maximum, for a tail too small to be seen beside the row's.
template <class T>
__device__ RowStats outside_stats(const T* row, int64_t valid, float scale, double inv_temperature,
                                  uint64_t last) {
  RowSum result;
  for (int64_t i = threadIdx.x; i < valid; i += kThreads) {
    const float z[1] = {to_float(row[i])};
    if (key_of(z[0], i) < last) result.add<false>(z, scale);
  }
  result.across_block<false>(scale);
  return result.stats(inv_temperature);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) topk_logp(TopkLogp a) {
  __shared__ uint64_t keys[kBuffer];
  __shared__ int count;
  OPD_DYNAMIC_SHARED(float, space);
  const int64_t n = blockIdx.x, valid = a.logits.valid;
  const int k = a.k;
  const T* row = row_of<T>(a.logits, n);
  const float scale = static_cast<float>(a.inv_temperature * kLog2e);
  const Chunks<T> chunks(row, valid);
  const Shared shared{space, space + chunks.num, keys, &count};
  first_pass(chunks, shared, scale);

  RowSum total;
  for (int64_t c = threadIdx.x; c < chunks.num; c += kThreads)
    total.max = fmaxf(total.max, shared.peaks[c]);
  total.max = block_reduce(total.max, Max());
  for (int64_t c = threadIdx.x; c < chunks.num; c += kThreads)
    total.sum += static_cast<double>(shared.sums[c]) *
                 exp2_fast((fmaxf(shared.peaks[c], kLowest) - total.max) * scale);
  total.sum = block_reduce(total.sum, Sum());
  const RowStats s = total.stats(a.inv_temperature);

  uint64_t threshold = static_cast<uint64_t>(kMinusInf) << 32;
  if (chunks.num >= k)
    threshold = static_cast<uint64_t>(ordered(kth_peak(shared.peaks, chunks.num, k))) << 32;
  int found = threshold >> 32 == kMinusInf && valid > kBuffer ? kBuffer + 1
                                                              : collect(chunks, shared, threshold);
  if (found > kBuffer) found = collect(chunks, shared, kth_key(row, valid, k));
  sort(keys, found);

  const uint64_t last = keys[k - 1];
  for (int i = threadIdx.x; i < k; i += kThreads) {
    const int64_t id = id_of(keys[i]);
    a.ids[n * k + i] = id;
    a.logp[n * k + i] = logp_of(to_float(row[id]), s, a.inv_temperature);
  }
  const bool none = k == valid || s.shift == -INFINITY;
  const double rest = none ? 0.0 : outside_sum(chunks, shared, scale, total.max, last);
  double tail = log(rest) - s.log_sum;
  if (!(rest > 1e-25))  // the same for all threads
    tail = tail_of(outside_stats(row, valid, scale, a.inv_temperature, last), s, a.inv_temperature);
  if (threadIdx.x != 0) return;
  a.lse[n] = lse_of(s, a.inv_temperature);
  a.tail_logp[n] = tail;
  if (a.token_ids) {
    const int64_t token = a.token_ids[n];
    const bool known = token >= 0 && token < valid;
    a.token_logp[n] = known ? logp_of(to_float(row[token]), s, a.inv_temperature) : NAN;
  }
}

}  // namespace

int launch(const TopkLogp& a, Launch where) {
  return with_dtype(a.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    // one chunk more than the columns need, for rows that begin before an aligned address
    const int64_t chunks = (a.logits.valid + kTopkChunk - 1) / kTopkChunk + 1;
    return launch_on(where, topk_logp<T>, dim3(a.logits.num), kThreads, 2 * chunks * sizeof(float), a);
  });
}

}  // namespace opd::cuda
