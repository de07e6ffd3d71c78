// The product that everything else is made of: a few rows times packed panels.
#pragma once
#include "api/kernels.h"
#include "isa/element.h"
#include "isa/namespace.h"
#include "isa/vector.h"

THRESHER_ISA_BEGIN

constexpr int accumulators = registers * 3 / 4;  // the rest is for what is multiplied
constexpr int tile_rows = accumulators / 2;

// Columns that a tile computes together, in vectors: the whole panel if its accumulators fit into registers, beside the
// fewer of x and weights, which are kept, and one of the others. Else the panel is passed several times.
constexpr int tile_vectors(int rows, int panels) {
  int vectors = panel / W;
  while (vectors > 2 && rows * panels * vectors + (rows < vectors ? rows : vectors) + 1 > registers) vectors /= 2;
  return vectors;
}

// Whether tiles of so many rows ask for memory while they are computed: if they pass a panel several times, and with wide vectors
// always, as that was measured to be faster (docs/results.md).
constexpr bool asks_ahead(int rows) { return W == 16 || tile_vectors(rows, 1) * W < panel; }

// c[rows, 32 * panels] = a[rows, steps packs] @ packed panels, `b_stride` values apart (`onto`: += ). Every output is one
// chain of dp in the order of the packs, however many rows and panels are computed together, so results do not depend
// on the batch. A few rows take two panels at once: one alone would wait for its own chains. As much memory as the panels take is
// asked for from `ahead` on if `asks_ahead`: meanwhile it would rest.
template <class E, int R, int P>
inline void tile(const typename E::Value* a, int64_t a_stride, const typename E::Weight* b, int64_t b_stride,
                 int64_t steps, float* c, int64_t c_stride, bool onto, const char* ahead) {
  constexpr int V = tile_vectors(R, P);
  for (int column = 0; column < panel; column += V * W) {
    vf acc[P][R][V] = {};
    if (onto)
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) acc[p][r][v] = load<vf>(c + r * c_stride + p * panel + column + v * W);
    const typename E::Weight* w = b + column * E::pack;
    constexpr int64_t step_bytes = V * W * E::pack * sizeof(*w);
    for (int64_t s = 0; s < steps; ++s, w += panel * E::pack, ahead += step_bytes) {
      if (asks_ahead(R))
        for (int p = 0; p < P; ++p)
          for (int64_t line = 0; line < step_bytes; line += 64) __builtin_prefetch(ahead + p * steps * step_bytes + line, 0, W == 16 ? 2 : 3);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
        for (int part = 0; part < E::parts; ++part) {
          if (part == 1) asm volatile("" ::: "memory");  // load x again: kept for the second part it would displace sums
          if constexpr (R < V) {
            typename E::A x[R];
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) x[r] = E::load_a(a + r * a_stride + s * E::pack, part);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
              const typename E::B weight = E::load_b(w + p * b_stride + v * W * E::pack, part);
#pragma GCC unroll 12
              for (int r = 0; r < R; ++r) acc[p][r][v] = E::dp(acc[p][r][v], x[r], weight);
            }
          } else {
            typename E::B weights[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) weights[v] = E::load_b(w + p * b_stride + v * W * E::pack, part);
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
              const typename E::A x = E::load_a(a + r * a_stride + s * E::pack, part);
#pragma GCC unroll 8
              for (int v = 0; v < V; ++v) acc[p][r][v] = E::dp(acc[p][r][v], x, weights[v]);
            }
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store(c + r * c_stride + p * panel + column + v * W, acc[p][r][v]);
  }
}

// Any number of rows up to tile_rows, any number of panels whose outputs lie side by side. `ahead`: what is read next,
// by default the panels behind the first ones.
template <class E, int R = tile_rows>
inline void tiles(int rows, const typename E::Value* a, int64_t a_stride, const typename E::Weight* b,
                  int64_t b_stride, int panels, int64_t steps, float* c, int64_t c_stride, bool onto = false,
                  const void* ahead = nullptr) {
  if (rows == R) {
    constexpr int together = R * 2 * (panel / W) <= accumulators ? 2 : 1;
    const char* next = ahead ? (const char*)ahead : (const char*)(b + together * b_stride);
    const int64_t panel_bytes = steps * panel * E::pack * int64_t(sizeof *b);
    int p = 0;
    if constexpr (R * 2 * (panel / W) <= accumulators)
      for (; p + 2 <= panels; p += 2)
        tile<E, R, 2>(a, a_stride, b + p * b_stride, b_stride, steps, c + p * panel, c_stride, onto, next + p * panel_bytes);
    for (; p < panels; ++p)
      tile<E, R, 1>(a, a_stride, b + p * b_stride, b_stride, steps, c + p * panel, c_stride, onto, next + p * panel_bytes);
  } else if constexpr (R > 1) {
    tiles<E, R - 1>(rows, a, a_stride, b, b_stride, panels, steps, c, c_stride, onto, ahead);
  }
}

THRESHER_ISA_END
