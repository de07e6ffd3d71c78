// Weight-only linear on panels packed once at load. At one row it streams the weights; at many rows the same packed copy
// is the right-hand side of a register-blocked product.
#pragma once
#include "api/kernels.h"
#include "host/pool.h"
#include "isa/element.h"
#include "isa/namespace.h"
#include "isa/product.h"
#include "isa/softmax.h"
#include "isa/vector.h"

THRESHER_ISA_BEGIN

// act(x) = x sigmoid(u). Of u and -u the exponential of the negative one is taken, which cannot overflow.
inline vf activate(Activation kind, vf x) {
  const float log2e = 1.4426950408889634f;
  vf u = kind == Activation::silu ? x : 2 * 0.7978845608028654f * (x + 0.044715f * x * x * x);
  vf e = exp2_nonpositive((u < 0.0f ? u : -u) * log2e);
  return x * (u < 0.0f ? e / (1 + e) : 1 / (1 + e));
}

// Multiply by the scales and add the bias of one panel, in place; rows of c are `stride` apart.
inline void finish_panel(const Linear& args, int64_t first, int rows, float* c, int64_t stride) {
  if (!args.scale && !args.bias) return;
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < panel; j += W) {
      vf x = load<vf>(c + r * stride + j);
      if (args.scale) x = x * load<vf>(args.scale + first + j);
      if (args.bias) x = x + load<vf>(args.bias + first + j);
      store(c + r * stride + j, x);
    }
}

// One row of one panel goes to its place, `at` values from the first of y.
template <class E>
inline void write_panel(const Linear& args, int64_t at, int columns, const float* c) {
  typename E::Value* y = (typename E::Value*)args.y + at;
  const typename E::Value* add = args.add ? (const typename E::Value*)args.add + at : nullptr;
  if (columns == panel)
    for (int j = 0; j < panel; j += W)
      E::put_vector(y + j, add ? load<vf>(c + j) + E::get_vector(add + j) : load<vf>(c + j));
  else
    for (int j = 0; j < columns; ++j) E::put(y + j, add ? c[j] + E::get(add + j) : c[j]);
}

// Tiles of about as many rows each: those of a few would wait for their chains.
inline int next_rows(int64_t left) {
  const int64_t tiles_left = (left + tile_rows - 1) / tile_rows;
  return int((left + tiles_left - 1) / tiles_left);
}

// A panel as F32 has it.
template <class E>
inline void widen_panel(const typename E::Weight* w, int64_t steps, float* out) {
  for (int64_t s = 0; s < steps; ++s, w += panel * E::pack)
    for (int part = 0; part < E::parts; ++part)
      for (int j = 0; j < panel; j += W, out += W) store(out, E::load_b(w + j * E::pack, part));
}
template <class E>
inline void widen_row(const typename E::Value* x, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(out + i, E::get_vector(x + i));
  for (; i < count; ++i) out[i] = E::get(x + i);
}

// From how many rows on a panel is worth being widened for all of them; measured (docs/results.md).
template <class E>
constexpr int widened_rows = (sizeof(typename E::Weight) == 1 ? 1 : 4) * tile_rows + 1;

// c[rows, panels * 32] = x[rows, in] @ panels, with rows of c 64 apart. Where packs are multiplied in parts and several tiles pass
// the panels, these are widened once for all tiles, some columns at a time: that changes no sum, as F32 adds in the same order.
template <class E>
void panel_product(const Linear& args, const typename E::Value* x, int rows, const typename E::Weight* w, int panels, float* c) {
  const int64_t steps = args.in / E::pack, panel_size = steps * panel * E::pack;
  constexpr int64_t stride = 2 * panel;
  if constexpr (E::parts > 1) {
    if (rows >= widened_rows<E>) {
      constexpr int64_t block = 256;  // 64 KiB of widened panels stay in the second cache
      alignas(64) float wide[2 * block * panel], row_block[tile_rows * block];
      for (int64_t column = 0; column < args.in; column += block) {
        const int64_t count = args.in - column < block ? args.in - column : block;
        const typename E::Weight* from = w + column * panel;
        for (int i = 0; i < panels; ++i) widen_panel<E>(from + i * panel_size, count / E::pack, wide + i * count * panel);
        for (int row = 0, n; row < rows; row += n) {
          n = next_rows(rows - row);
          for (int r = 0; r < n; ++r) widen_row<E>(x + (row + r) * args.x_stride + column, count, row_block + r * block);
          tiles<F32>(n, row_block, block, wide, count * panel, panels, count, c + row * stride, stride, column > 0,
                     from + count * panel);
        }
      }
      return;
    }
  }
  for (int row = 0, n; row < rows; row += n) {
    n = next_rows(rows - row);
    tiles<E>(n, x + row * args.x_stride, args.x_stride, w, panel_size, panels, steps, c + row * stride, stride);
  }
}

// Panels are computed in pairs: a gate with what it gates, or two neighbours.
template <class E>
void linear_panels(const Linear& args, int64_t panel_begin, int64_t panel_end) {
  typedef typename E::Value Value;
  const bool gated = args.activation != Activation::none;
  const int64_t panel_size = args.in * panel;
  constexpr int64_t row_chunk = 20 * tile_rows;  // x of one chunk stays in the cache while the panels pass
  constexpr int64_t stride = 2 * panel;
  alignas(64) float c[row_chunk * stride];
  for (int64_t chunk = 0; chunk < args.rows; chunk += row_chunk) {
    const int rows = int(args.rows - chunk < row_chunk ? args.rows - chunk : row_chunk);
    for (int64_t p = panel_begin; p < panel_end; p += gated ? 1 : 2) {
      const int64_t packed = gated ? 2 * p : p;
      const int panels = gated || p + 1 < panel_end ? 2 : 1, written = gated ? 1 : panels;
      panel_product<E>(args, (const Value*)args.x + chunk * args.x_stride, rows,
                       (const typename E::Weight*)args.w + packed * panel_size, panels, c);
      for (int i = 0; i < panels; ++i) finish_panel(args, (packed + i) * panel, rows, c + i * panel, stride);
      if (gated)
        for (int r = 0; r < rows; ++r)
          for (float* y = c + r * stride; y < c + r * stride + panel; y += W)
            store(y, activate(args.activation, load<vf>(y)) * load<vf>(y + panel));
      for (int i = 0; i < written; ++i) {
        const int64_t first = (p + i) * panel;
        const int columns = int(args.out - first < panel ? args.out - first : panel);
        for (int r = 0; r < rows; ++r) {
          const int64_t at = (chunk + r) * args.y_stride + first;
          if (args.y_f32)
            write_panel<F32>(args, at, columns, c + r * stride + i * panel);
          else
            write_panel<BF16>(args, at, columns, c + r * stride + i * panel);
        }
      }
    }
  }
}

template <class E>
void linear_threads(const Linear& args) {
  const int64_t panels = (args.out + panel - 1) / panel;
  const int64_t panel_bytes = args.in * panel * int64_t(sizeof(typename E::Weight)) * (args.activation == Activation::none ? 1 : 2);
  // Pieces long enough to be read as a stream, short enough that the threads finish together.
  const int64_t streamed = (65536 + panel_bytes - 1) / panel_bytes, fair = panels / (int64_t(args.threads) * 8) + 1;
  parallel_for(panels, streamed < fair ? streamed : fair, args.threads,
               [&](int64_t begin, int64_t end, int) { linear_panels<E>(args, begin, end); });
}

void linear(const Linear& args) {
  if (args.rows == 0) return;
  if (args.weight == Type::f32)
    linear_threads<F32>(args);
  else if (args.weight == Type::bf16)
    linear_threads<BF16>(args);
  else
    linear_threads<Int8>(args);
}

THRESHER_ISA_END
