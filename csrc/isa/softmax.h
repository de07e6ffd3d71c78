// What softmaxes are made of: powers of 2, and partial sums that take each other in.
#pragma once
#include "isa/element.h"
#include "isa/namespace.h"
#include "isa/vector.h"

THRESHER_ISA_BEGIN

constexpr float log2_e = 1.4426950408889634f;
inline float infinity() { return __builtin_inff(); }

// 2^x for x <= 0 (-inf is 0; NaN stays NaN), by a polynomial on [-0.5, 0.5]: relative error below
// 2e-7 with degree 6, and 3e-6 with degree 4, far less than rounding to bf16 adds.
template <int degree = 6>
inline vf exp2_nonpositive(vf x) {
  static_assert(degree == 4 || degree == 6);
  // Adding 1.5 * 2^23 + 127 rounds to an integer, and leaves n + 127, the exponent of 2^n, in the lowest bits. At -127 those are 0.
  const vf magic = splat(12582912.0f + 127.0f);
  const vf clamped = x < -127.0f ? splat(-127.0f) : x;
  const vf shifted = clamped + magic;
  const vf r = clamped - (shifted - magic);
  vf p;
  if constexpr (degree == 6) {
    p = splat(1.540353039338161e-4f);
    p = p * r + 1.333355814642844e-3f;
    p = p * r + 9.618129107628477e-3f;
    p = p * r + 5.550410866482158e-2f;
    p = p * r + 2.402265069591007e-1f;
    p = p * r + 6.931471805599453e-1f;
    p = p * r + 1.0f;
  } else {
    p = splat(9.570102207362652e-3f);
    p = p * r + 5.591785907745361e-2f;
    p = p * r + 2.40247443318367e-1f;
    p = p * r + 6.931217908859253e-1f;
    p = p * r + 9.999992847442627e-1f;
  }
  return p * (vf)((vi)shifted << 23);  // multiplied in, so that a NaN of p is not lost
}
inline float exp2_nonpositive(float x) { return exp2_nonpositive(splat(x))[0]; }

// log2 of normal numbers above 0: 2 atanh((m - 1) / (m + 1)) of the mantissa, between sqrt(1/2) and sqrt(2).
inline vf log2_positive(vf x) {
  const vi exponent = ((vi)x - 0x3f3504f3) >> 23;
  const vf m = (vf)((vi)x - (exponent << 23)), t = (m - 1.0f) / (m + 1.0f), s = t * t;
  const vf series = 1.0f + s * (1.0f / 3 + s * (1.0f / 5 + s * (1.0f / 7 + s * (1.0f / 9))));
  return __builtin_convertvector(exponent, vf) + 2.885390081777927f * t * series;
}

// (max, sum, acc) of one row takes in the partial of the next split. A split that shows nothing changes nothing; one whose scores are
// not numbers has no greatest either, but its sum is not 0, and then nothing is a number.
inline void fold(float& max, float& sum, float* acc, float m, float l, const float* part, int64_t head_dim) {
  if (l == 0) return;
  const float top = max > m ? max : m;
  const float keep = max == -infinity() ? 0.0f : exp2_nonpositive(max - top), add = exp2_nonpositive(m - top);
  max = top;
  sum = sum * keep + l * add;
  int64_t d = 0;
  for (; d + W <= head_dim; d += W) store(acc + d, load<vf>(acc + d) * keep + load<vf>(part + d) * add);
  for (; d < head_dim; ++d) acc[d] = acc[d] * keep + part[d] * add;
}

template <class E>
void write_row(typename E::Value* out, const float* acc, float sum, int64_t head_dim, bool empty) {
  // Of rows, nothing at all to divide is no number, as in any softmax. Of no rows (`empty`) there is no average: 0.
  const float inverse = empty ? 0 : 1 / sum;
  int64_t d = 0;
  for (; d + W <= head_dim; d += W) E::put_vector(out + d, load<vf>(acc + d) * inverse);
  for (; d < head_dim; ++d) E::put(out + d, acc[d] * inverse);
}

THRESHER_ISA_END
