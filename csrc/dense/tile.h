// One tile of query rows against one split of keys and values.
#pragma once
#include "api/carver.h"
#include "api/kernels.h"
#include "dense/pack.h"
#include "isa/element.h"
#include "isa/memory.h"
#include "isa/namespace.h"
#include "isa/product.h"
#include "isa/softmax.h"
#include "isa/vector.h"

THRESHER_ISA_BEGIN

// Working memory of attend_tile, and the addresses of the rows it reads.
struct TileScratch {
  uint32_t* keys;  // packed [split / 32][steps][32] packs
  void* values;    // packed [ceil(head_dim / 32)][split / pack][32] packs
  float* scores;   // [tile_rows, split]
  void* weights;   // [tile_rows, split]
  float* acc;      // [tile_rows, padded head_dim]
  const char *key_rows[split + gather_ahead], *value_rows[split + gather_ahead];

  TileScratch(const Attention& args, Carver& c) {
    const int64_t wide = padded(args.head_dim), value = value_bytes(args.type);
    c.take(keys, split * args.head_dim * value);
    c.take(values, split * wide * value);
    c.take(scores, tile_rows * split * 4);
    c.take(weights, tile_rows * split * 4);
    c.take(acc, tile_rows * wide * 4);
  }
};

// The keys of [begin, end) that query position q may see, as offsets from begin: [low, high) and the sinks [sink_low, sink_high).
struct Visible {
  int low, high, sink_low, sink_high;
};
inline int clip(int64_t x, int64_t end) { return int(x < 0 ? 0 : x > end ? end : x); }
inline Visible visible(const Attention& args, const Sequence& seq, int64_t q, int64_t begin, int64_t end) {
  const int64_t n = end - begin, window = seq.window, sinks = seq.sinks;
  const int64_t oldest = args.window > 0 ? q - args.window + 1 : 0, reach = oldest > args.blank ? oldest : args.blank;
  const int64_t recent = window > 0 && q - window + 1 > reach ? q - window + 1 : reach;
  return {clip(recent - begin, n), clip(q + 1 - begin, n), clip(reach - begin, n),
          window > 0 ? clip((sinks < q + 1 ? sinks : q + 1) - begin, n) : 0};
}

// Columns of values that a pass of weigh_rows takes, so that its sums stay in registers.
constexpr int weigh_columns(int head_dim, int rows) {
  int columns = head_dim;
  while (columns > panel && rows * columns / W > accumulators) columns /= 2;
  return columns;
}

// The most rows whose values need not be packed. With wide vectors only what takes one pass.
constexpr int weigh_most(int head_dim) { return accumulators * W / (W == 16 ? head_dim : panel); }

// acc[rows, head_dim] = P V for a few rows that fit into registers: values are used as they lie, and nothing is packed.
// The sums run in the order of tile(), so the bits are the same.
template <class E, int D, bool Gathered, int R>
void weigh_rows(const typename E::Value* weights, const char* const* values, const char* const* keys, int count,
                float* acc, int64_t acc_stride) {
  typedef typename E::Value Value;
  constexpr int columns = weigh_columns(D, R), vectors = columns / W;
  alignas(64) static constexpr Value zeros[D] = {};
  for (int begin = 0; begin < D; begin += columns) {
    vf sums[R][vectors] = {};
    for (int k = 0; k < count; k += E::pack) {
      if (begin > 0) {  // all has been asked for
      } else if (Gathered) {
        for (int i = 0; i < E::pack; ++i) prefetch(values[k + i + 16], D * sizeof(Value));
      } else {
        prefetch(values[k] + prefetch_distance, E::pack * D * sizeof(Value));
        if (!asks_ahead(R)) prefetch(keys[k] + split * D * sizeof(Value), E::pack * D * sizeof(Value));
      }
      const Value* first = (const Value*)values[k] + begin;
      const Value* second = k + 1 < count ? (const Value*)values[k + 1] + begin : zeros;
#pragma GCC unroll 2
      for (int part = 0; part < E::parts; ++part) {
        typename E::B rows[vectors];
        for (int d = 0; d < columns; d += panel) E::zip(first + d, second + d, part, rows + d / W);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const typename E::A x = E::load_a(weights + r * split + k, part);
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) sums[r][v] = E::dp(sums[r][v], x, rows[v]);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < vectors; ++v) store(acc + r * acc_stride + begin + v * W, sums[r][v]);
  }
}

// False if so many rows do not fit.
template <class E, int D, bool Gathered, int R = D ? weigh_most(D ? D : 1) : 0>
bool weigh_few_rows(int rows, const typename E::Value* weights, const TileScratch& s, int count, float* acc,
                    int64_t acc_stride) {
  if constexpr (R < 1) {
    return false;
  } else {
    if (rows > R) return false;
    if (rows < R) return weigh_few_rows<E, D, Gathered, R - 1>(rows, weights, s, count, acc, acc_stride);
    weigh_rows<E, D, Gathered, R>(weights, s.value_rows, s.key_rows, count, acc, acc_stride);
    return true;
  }
}

// D: the head dimension if it is known to the compiler, else 0.
//
// One tile of rows against one split: writes max, sum and s.acc[rows, padded head_dim] (not normalised). The first tile
// packs keys and values as it goes: memory is asked for while the rows that have come are computed. The only tile need
// not keep what it packed, and stays in the nearest cache.
//
// Gathered: rows lie anywhere. `adjust(scores)` may change the products before they become weights.
template <class E, int D, bool Gathered = false, class Adjust>
void attend_tile(const Attention& args, TileScratch& s, int rows, const typename E::Value* q, const Visible* see, int keys,
                 bool first, bool only, float* row_max, float* row_sum, Adjust adjust) {
  typedef typename E::Value Value;
  const int64_t dim = D ? D : args.head_dim, wide = padded(dim), steps = dim / E::pack;
  const int key_end = int(padded(keys)), chunk = first ? 2 * panel : split;
  // Rows of the next split most often lie behind those of this one. Tiles of many rows ask for them as they go: all at once while
  // rows are packed would be more than a processor can wait for.
  const bool asking = !Gathered && first && asks_ahead(rows);
  auto ahead = [&](const char* const* row) { return asking ? *row + split * dim * int64_t(sizeof(Value)) : nullptr; };
  for (int k = 0; k < keys; k += chunk) {
    const int n = keys - k < chunk ? keys - k : chunk;
    uint32_t* packed = s.keys + (only ? 0 : k * steps);
    if (first) pack_keys<Gathered>(s.key_rows + k, n, steps, packed, asking);
    if (Gathered && first)
      for (int i = 0; i < n; ++i) prefetch(s.value_rows[k + i], dim * sizeof(Value));
    tiles<E>(rows, q, dim, (const Value*)packed, steps * panel * E::pack, int(padded(n)) / panel, steps,
             s.scores + k, split, false, ahead(s.key_rows + k));
  }
  adjust(s.scores);
  const float scale = args.scale * log2_e;
  Value* weights = (Value*)s.weights;
  for (int r = 0; r < rows; ++r) {
    float* x = s.scores + r * split;
    const Visible& v = see[r];
    for (int k = 0; k < v.low; ++k)
      if (k < v.sink_low || k >= v.sink_high) x[k] = -infinity();
    for (int k = v.high; k < key_end; ++k) x[k] = -infinity();
    vf best = splat(-infinity());
    for (int k = 0; k < key_end; k += W) {
      const vf y = load<vf>(x + k) * scale;
      best = y > best ? y : best;
    }
    const float m = max(best);
    row_max[r] = m;
    const vf shift = splat(m == -infinity() ? 0.0f : m);
    vf total = {};
    for (int k = 0; k < key_end; k += W) {
      const vf below = load<vf>(x + k) * scale - shift;  // not rounded between, so that of huge scores the best is not at 0
      const vf p = exp2_nonpositive<E::exp2_degree>(below > 0.0f ? vf{} : below);
      total += E::put_rounded(weights + r * split + k, p);  // the weights that are used add up to the sum they are divided by
    }
    row_sum[r] = sum(total);
  }
  if (only && weigh_few_rows<E, D, Gathered>(rows, weights, s, keys, s.acc, wide)) return;
  for (int k = 0; k < keys; k += chunk) {
    const int n = keys - k < chunk ? keys - k : chunk;
    Value* packed = (Value*)s.values + (only ? 0 : k * panel);
    if (first) pack_values<Gathered>(E(), s.value_rows + k, s.key_rows + k, n, dim, packed, asking);
    tiles<E>(rows, weights + k, split, packed, panel * split, int(wide / panel),
             (n + E::pack - 1) / E::pack, s.acc, wide, k > 0, ahead(s.value_rows + k));
  }
}

THRESHER_ISA_END
