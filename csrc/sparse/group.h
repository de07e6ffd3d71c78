// The query heads of a KV head in a step that attends to rows that lie anywhere: each row is read once for all of them.
#pragma once
#include "api/carver.h"
#include "api/kernels.h"
#include "dense/tile.h"
#include "isa/element.h"
#include "isa/memory.h"
#include "isa/namespace.h"
#include "isa/softmax.h"
#include "sparse/layout.h"

THRESHER_ISA_BEGIN

struct GroupScratch {
  TileScratch tile;
  void* queries;     // [group, head_dim]
  float *max, *sum;  // [group]: the softmax so far ...
  float* acc;        // [group, head_dim]
  float* variances;  // [group, head_dim + 2]: ... and how far it may be off (Attention::variances)
  float* excluded;   // [tile_rows, split]: 1 - inclusion probability

  GroupScratch(const Attention& args, Carver& c) : tile(args, c) {
    const int64_t group = group_of(args), dim = args.head_dim;
    c.take(queries, group * dim * value_bytes(args.type));
    c.take(max, group * 4);
    c.take(sum, group * 4);
    c.take(acc, group * dim * 4);
    c.take(variances, group * (dim + 2) * 4);
    c.take(excluded, tile_rows * split * 4);
  }
};

template <class E, int D>
struct Group {
  typedef typename E::Value Value;
  const Attention& args;
  const Sequence& seq;
  const Sparse& sparse;
  const Method& m;
  GroupScratch& s;
  const int64_t kv_head, heads, dim, wide;
  const Value* queries;

  Group(const Attention& attention, const SparseItem& item, GroupScratch& scratch)
      : args(attention), seq(args.sequences[item.sequence]), sparse(*seq.sparse), m(*sparse.method), s(scratch),
        kv_head(item.kv_head), heads(group_of(args)), dim(D ? D : args.head_dim), wide(padded(dim)),
        queries((const Value*)s.queries) {
    for (int64_t g = 0; g < heads; ++g)
      __builtin_memcpy((Value*)s.queries + g * dim,
                       (const Value*)args.q + seq.query_row * args.q_token + (kv_head * heads + g) * args.q_head,
                       size_t(dim) * sizeof(Value));
    clear();
  }

  void clear() {
    for (int64_t g = 0; g < heads; ++g) {
      s.max[g] = -infinity();
      s.sum[g] = 0;
    }
    __builtin_memset(s.acc, 0, size_t(heads * dim) * sizeof(float));
    __builtin_memset(s.variances, 0, size_t(heads * (dim + 2)) * sizeof(float));
  }

  // Takes in `count` rows, at most `split`, whose addresses are in s.tile. `adjust(g, scores, excluded)` makes of a query head's
  // products what goes into its softmax; if errors are to be estimated and rows were `sampled`, it writes `excluded` as well.
  template <class Adjust>
  void attend(int count, bool estimate, bool sampled, Adjust adjust) {
    TileScratch& tile = s.tile;
    for (int i = 0; i < gather_ahead; ++i) {
      tile.key_rows[count + i] = tile.key_rows[count - 1];
      tile.value_rows[count + i] = tile.value_rows[count - 1];
    }
    for (int i = 0; i < 32; ++i) prefetch(tile.key_rows[i], dim * int64_t(sizeof(Value)));
    Visible see[tile_rows];
    for (int r = 0; r < tile_rows; ++r) see[r] = {0, count, 0, 0};
    float top[tile_rows], total[tile_rows];
    for (int64_t g = 0; g < heads; g += tile_rows) {
      const int rows = int(heads - g < tile_rows ? heads - g : tile_rows);
      attend_tile<E, D, true>(args, tile, rows, queries + g * dim, see, count, g == 0, heads <= tile_rows, top, total,
                              [&](float* scores) {
                                for (int r = 0; r < rows; ++r)
                                  adjust(g + r, scores + r * split, estimate ? s.excluded + r * split : nullptr);
                              });
      for (int r = 0; r < rows; ++r) {
        if (estimate)
          add_variance(g + r, top[r], count, (const Value*)tile.weights + r * split, sampled ? s.excluded + r * split : nullptr);
        fold(s.max[g + r], s.sum[g + r], s.acc + (g + r) * dim, top[r], total[r], tile.acc + r * wide, dim);
      }
    }
  }

  // Takes the rows into the sums of squares, before `fold` takes them into the others.
  void add_variance(int64_t g, float top, int count, const Value* weights, const float* excluded) {
    if (top == -infinity()) return;  // nothing seen, or nothing that is a number: then the sums are none either
    float* to = s.variances + g * (dim + 2);
    const float most = s.max[g] > top ? s.max[g] : top;
    const float keep = s.max[g] == -infinity() ? 0 : exp2_nonpositive(2 * (s.max[g] - most));
    const float add = exp2_nonpositive(2 * (top - most));
    for (int64_t d = 0; d < dim + 2; ++d) to[d] *= keep;
    for (int k = 0; k < count; ++k) {
      const float w = E::get(weights + k), a = w * w * (excluded ? excluded[k] : 1) * add;
      if (a == 0) continue;
      const Value* v = (const Value*)s.tile.value_rows[k];
      float square = 0;
      for (int64_t d = 0; d < dim; ++d) {
        const float x = E::get(v + d);
        square += x * x;
        to[2 + d] += a * x;
      }
      to[0] += a;
      to[1] += a * square;
    }
  }

  // The softmax so far goes to slot `part` of each query head.
  void write(int part) const {
    const Slots& slots = args.slots[&seq - args.sequences];
    for (int64_t g = 0; g < heads; ++g) {
      const int64_t slot = slots.begin + (kv_head * heads + g) * slots.count + part;
      float* to = args.partials + slot * (dim + 2);
      to[0] = s.max[g];
      to[1] = s.sum[g];
      __builtin_memcpy(to + 2, s.acc + g * dim, size_t(dim) * sizeof(float));
      if (m.certify > 0)
        __builtin_memcpy(args.variances + slot * (dim + 2), s.variances + g * (dim + 2), size_t(dim + 2) * sizeof(float));
    }
  }
};

THRESHER_ISA_END
