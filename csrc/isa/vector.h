// Vectors of W floats in GCC's vector extensions.
#pragma once
#include "isa/namespace.h"

THRESHER_ISA_BEGIN

#if defined(__AVX512F__)
constexpr int W = 16;
constexpr int registers = 32;
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int registers = 16;
#else
constexpr int W = 4;
constexpr int registers = 16;
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
inline vu splat_bits(const void* p) {  // of the 32 bits there
#if defined(__AVX2__) && !defined(__AVX512F__)  // what is done to all of them GCC would else do to the one first, and be slower
  return (vu)_mm256_broadcast_ss((const float*)p);
#else
  uint32_t x;
  __builtin_memcpy(&x, p, 4);
  return x - vu{};
#endif
}
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
