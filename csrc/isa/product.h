// The product that everything else is made of: a few rows times packed panels.
#pragma once
#include "api/kernels.h"
#include "isa/element.h"
#include "isa/namespace.h"
#include "isa/vector.h"

THRESHER_ISA_BEGIN

// c[rows, 32 * panels] = a[rows, steps packs] @ packed panels, `b_stride` values apart (`onto`: += ). Every output is one
// chain of dp in the order of the packs, however many rows and panels are computed together, so results do not depend
// on the batch. A few rows take two panels at once: one alone would wait for its own chains.
template <class E, int R, int P>
inline void tile(const typename E::Value* a, int64_t a_stride, const typename E::Weight* b, int64_t b_stride,
                 int64_t steps, float* c, int64_t c_stride, bool onto) {
  for (int column = 0; column < panel; column += 2 * W) {
    vf acc[P][R][2] = {};
    if (onto)
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          acc[p][r][0] = load<vf>(c + r * c_stride + p * panel + column);
          acc[p][r][1] = load<vf>(c + r * c_stride + p * panel + column + W);
        }
    const typename E::Weight* w = b + column * E::pack;
    for (int64_t s = 0; s < steps; ++s, w += panel * E::pack) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        typename E::B b0 = E::load_b(w + p * b_stride), b1 = E::load_b(w + p * b_stride + W * E::pack);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          uint32_t x;
          __builtin_memcpy(&x, a + r * a_stride + s * E::pack, 4);
          acc[p][r][0] = E::dp(acc[p][r][0], x, b0);
          acc[p][r][1] = E::dp(acc[p][r][1], x, b1);
        }
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        store(c + r * c_stride + p * panel + column, acc[p][r][0]);
        store(c + r * c_stride + p * panel + column + W, acc[p][r][1]);
      }
  }
}

// Any number of rows up to tile_rows, any number of panels whose outputs lie side by side.
template <class E, int R = tile_rows>
inline void tiles(int rows, const typename E::Value* a, int64_t a_stride, const typename E::Weight* b,
                  int64_t b_stride, int panels, int64_t steps, float* c, int64_t c_stride, bool onto = false) {
  if (rows == R) {
    int p = 0;
    if constexpr (R <= tile_rows / 2)
      for (; p + 2 <= panels; p += 2)
        tile<E, R, 2>(a, a_stride, b + p * b_stride, b_stride, steps, c + p * panel, c_stride, onto);
    for (; p < panels; ++p)
      tile<E, R, 1>(a, a_stride, b + p * b_stride, b_stride, steps, c + p * panel, c_stride, onto);
  } else if constexpr (R > 1) {
    tiles<E, R - 1>(rows, a, a_stride, b, b_stride, panels, steps, c, c_stride, onto);
  }
}

THRESHER_ISA_END
