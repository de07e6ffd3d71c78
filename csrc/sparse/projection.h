// Projections of keys and queries on random directions, and bits of their signs.
#pragma once
#include "api/kernels.h"
#include "isa/namespace.h"
#include "isa/product.h"

THRESHER_ISA_BEGIN

// Bit j: x[j] > 0, of one panel.
inline uint32_t positive(const float* x) {
#if defined(__AVX512BW__)
  return _mm512_kunpackw(_mm512_cmp_ps_mask(_mm512_loadu_ps(x + 16), _mm512_setzero_ps(), _CMP_GT_OQ),
                         _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_setzero_ps(), _CMP_GT_OQ));
#else
  uint32_t bits = 0;
  for (int j = 0; j < panel; ++j) bits |= uint32_t(x[j] > 0) << j;
  return bits;
#endif
}

// out[r, count] = x[r, dim] @ directions.T, a panel at a time; `use(panel index, values [rows, panel])`.
template <class E, class Use>
inline void project_rows(int rows, const typename E::Value* x, int64_t dim, const void* directions, int64_t count, Use use) {
  const int64_t steps = dim / E::pack, panel_size = steps * panel * E::pack;
  alignas(64) float out[tile_rows * 2 * panel];
  for (int64_t p = 0; p < (count + panel - 1) / panel; p += 2) {
    const int n = (p + 1) * panel < count ? 2 : 1;
    tiles<E>(rows, x, dim, (const typename E::Weight*)directions + p * panel_size, panel_size, n, steps, out, 2 * panel);
    for (int i = 0; i < n; ++i) use(p + i, out + i * panel);
  }
}

// The l-th field of K bits in a stream of bits; the stream has a word to spare.
inline uint32_t field(const uint64_t* bits, int64_t l, int K) {
  const int64_t at = l * K;
  const int shift = int(at & 63);
  uint64_t x = bits[at >> 6] >> shift;
  if (shift + K > 64) x |= bits[(at >> 6) + 1] << (64 - shift);
  return uint32_t(x & ((uint64_t(1) << K) - 1));
}

THRESHER_ISA_END
