// Vectors of W floats in GCC's vector extensions.
#pragma once
#include "isa/namespace.h"

THRESHER_ISA_BEGIN

#if defined(__AVX512F__)
constexpr int W = 16;
constexpr int accumulators = 24;  // of 32 registers
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int accumulators = 12;  // of 16
#else
constexpr int W = 4;
constexpr int accumulators = 12;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

template <class V, class P>
inline V load(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class P>
inline void store(P* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
inline vf splat(float x) { return x - vf{}; }
inline vu splat_bits(uint32_t x) { return x - vu{}; }
inline vf as_float(vu x) { return (vf)x; }

inline float sum(vf x) {  // a fixed tree: the same order for every caller
  float lanes[W];
  store(lanes, x);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
inline float max(vf x) {
  float best = x[0];
  for (int i = 1; i < W; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

THRESHER_ISA_END
