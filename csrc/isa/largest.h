// The largest of many numbers.
#pragma once
#include "isa/namespace.h"
#include "isa/vector.h"

THRESHER_ISA_BEGIN

// As wide as registers are: of wider ones GCC 12 makes single numbers.
template <class T>
struct Lanes;
template <>
struct Lanes<int16_t> {
  typedef int16_t V __attribute__((vector_size(4 * W)));
};
template <>
struct Lanes<int32_t> {
  typedef int32_t V __attribute__((vector_size(4 * W)));
};

// How many of n (a multiple of 64) are >= t.
template <class T>
int64_t count_from(const T* x, int64_t n, T t) {
  typedef typename Lanes<T>::V V;
  constexpr int64_t lanes = sizeof(V) / sizeof(T), most = 32767 * lanes;  // that counts of 16 bits hold
  const V limit = t - V{};
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += most) {
    const int64_t end = begin + most < n ? begin + most : n;
    V count = {};
    for (int64_t i = begin; i < end; i += lanes) count -= (V)(load<V>(x + i) >= limit);
    for (int j = 0; j < lanes; ++j) total += count[j];
  }
  return total;
}

// Bit i: x[i] >= t, of 64. Masks are joined as masks: GCC 12 may spill a 32-bit one and read it back as 64 bits when it is
// widened instead, and then the upper half is whatever lay there.
inline uint64_t mask_from(const int32_t* x, int32_t t) {
#if defined(__AVX512BW__)
  const __m512i limit = _mm512_set1_epi32(t);
  auto reached = [&](int at) { return _mm512_cmpge_epi32_mask(_mm512_loadu_si512(x + at), limit); };
  return _mm512_kunpackd(_mm512_kunpackw(reached(48), reached(32)), _mm512_kunpackw(reached(16), reached(0)));
#else
  uint64_t bits = 0;
  for (int i = 0; i < 64; ++i) bits |= uint64_t(x[i] >= t) << i;
  return bits;
#endif
}

template <class T>
constexpr T lowest() {
  return T(int64_t(1) << (8 * sizeof(T) - 1));
}

// The largest t that at least k of n values reach; n a multiple of 64.
template <class T>
T threshold(const T* x, int64_t n, int64_t k) {
  typedef typename Lanes<T>::V V;
  constexpr int lanes = sizeof(V) / sizeof(T);
  V least = load<V>(x), most = least;
  for (int64_t i = lanes; i < n; i += lanes) {
    const V v = load<V>(x + i);
    least = v < least ? v : least;
    most = v > most ? v : most;
  }
  int64_t low = least[0], high = most[0];
  for (int j = 1; j < lanes; ++j) {
    low = least[j] < low ? least[j] : low;
    high = most[j] > high ? most[j] : high;
  }
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (count_from(x, n, T(middle)) >= k)
      low = middle;
    else
      high = middle - 1;
  }
  return T(low);
}

// Values >= t, compacted and padded to a multiple of 64 with the lowest; returns how many there are.
inline int64_t compact(const int32_t* x, int64_t n, int32_t t, int32_t* out) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 64)
    for (uint64_t bits = mask_from(x + i, t); bits; bits &= bits - 1) out[count++] = x[i + __builtin_ctzll(bits)];
  for (int64_t i = count; i < (count + 63) / 64 * 64; ++i) out[i] = lowest<int32_t>();
  return count;
}

// Marks the k largest of n values; among equals the first. A sample finds a bound that leaves few to look at closely.
inline void mark_top(int32_t* x, int64_t n, int64_t k, uint64_t* marks, int32_t* buffer) {
  const int64_t padded_n = (n + 63) / 64 * 64;
  for (int64_t i = n; i < padded_n; ++i) x[i] = lowest<int32_t>();
  if (k >= n || k <= 0) {
    for (int64_t w = 0; w < padded_n / 64; ++w) marks[w] = k <= 0 ? 0 : ~uint64_t(0);
    if (k > 0 && n % 64) marks[n / 64] = (uint64_t(1) << (n % 64)) - 1;
    return;
  }
  int32_t bound = lowest<int32_t>();
  constexpr int64_t stride = 16 * 64;
  if (n >= 4 * stride) {
    int64_t sampled = 0;
    for (int64_t i = 0; i + 64 <= n; i += stride, sampled += 64) __builtin_memcpy(buffer + sampled, x + i, 64 * sizeof(int32_t));
    const double expected = double(k) * double(sampled) / double(n);
    const int64_t rank = int64_t(expected + 3 * __builtin_sqrt(expected) + 4);
    if (rank < sampled) bound = threshold(buffer, sampled, rank);
  }
  int64_t count = compact(x, padded_n, bound, buffer);
  if (count < k) count = compact(x, padded_n, lowest<int32_t>(), buffer);
  const int32_t least = threshold(buffer, (count + 63) / 64 * 64, k);
  const int64_t reaching = count_from(buffer, (count + 63) / 64 * 64, least);
  int64_t surplus = reaching - k;  // equals that are not wanted: the last ones
  for (int64_t w = padded_n / 64 - 1; w >= 0; --w) {
    uint64_t bits = mask_from(x + w * 64, least);
    if (surplus > 0) {
      uint64_t equal = least == int32_t(~lowest<int32_t>()) ? bits : bits & ~mask_from(x + w * 64, int32_t(least + 1));
      for (; surplus > 0 && equal; --surplus) {
        const uint64_t last = uint64_t(1) << (63 - __builtin_clzll(equal));
        bits &= ~last;
        equal &= ~last;
      }
    }
    marks[w] = bits;
  }
}

THRESHER_ISA_END
