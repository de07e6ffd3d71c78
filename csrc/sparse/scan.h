// Steps `sample` and `scan`: candidates are scored for the query heads of their KV head, signs after a sample of them has told
// what scores matter.
#pragma once
#include "api/kernels.h"
#include "dense/pack.h"
#include "dense/tile.h"
#include "isa/memory.h"
#include "isa/namespace.h"
#include "isa/product.h"
#include "sparse/layout.h"
#include "sparse/signs.h"

THRESHER_ISA_BEGIN

inline void sample_item(const Attention& args, const SparseItem& item, Scratch& s) {
  const Sparse& sparse = *args.sequences[item.sequence].sparse;
  for_query_heads(args, item.head, [&](auto count, int64_t first) {
    bound_scores<count.value>(args, sparse, first, (int16_t*)s.values_left);
  });
}

// Scores of ranked rows: dot products of the queries of a group with keys, page bounds, block or cluster means.
template <class E>
void scan_rows_item(const Attention& args, const SparseItem& item, Scratch& s) {
  typedef typename E::Value Value;
  const Sequence& seq = args.sequences[item.sequence];
  const Sparse& sparse = *seq.sparse;
  const Method& m = *sparse.method;
  const int64_t dim = m.row_dim, row_bytes = dim * int64_t(sizeof(Value)), steps = dim / E::pack;
  const int64_t group = args.q_heads / args.kv_heads, ranks = padded_ranks(sparse.ranked);
  int64_t first = 0;  // of this block among all ranked rows
  for (int i = 0; m.rank != Rank::keys && i < item.part; ++i) first += sparse.blocks[i].units;
  Value* queries = (Value*)s.queries;
  for (int64_t g = 0; g < group; ++g)
    __builtin_memcpy(queries + g * dim, sparse.queries + (item.head * group + g) * sparse.query_bytes, size_t(row_bytes));
  const Run* run = seq.runs;
  for (int64_t at = item.begin; at < item.end; at += split) {
    const int n = int(item.end - at < split ? item.end - at : split);
    if (m.rank == Rank::keys) {
      for (int j = 0; j < n; ++j) {
        const int64_t x = sparse.begin + at + j;
        run = run_of(seq, run, x);
        const int64_t plane = int64_t(args.layer) * 2 * args.kv_heads + item.head;
        s.key_rows[j] = run->base + (plane * run->capacity + x - run->start) * row_bytes;
      }
    } else {
      const Block& b = sparse.blocks[item.part];
      const char* rows = (const char*)b.rows + (plane_of(args, sparse, item.head) * b.units + at) * row_bytes;
      for (int j = 0; j < n; ++j) s.key_rows[j] = rows + j * row_bytes;
    }
    pack_keys(s.key_rows, n, steps, s.keys);
    for (int64_t g = 0; g < group; g += tile_rows) {
      const int rows = int(group - g < tile_rows ? group - g : tile_rows);
      tiles<E>(rows, queries + g * dim, dim, (const Value*)s.keys, steps * panel * E::pack, int(padded(n)) / panel, steps,
               s.scores, split);
      for (int r = 0; r < rows; ++r) {
        const int64_t chooser = m.shared ? item.head : item.head * group + g + r;
        int32_t* to = (int32_t*)sparse.scores + chooser * ranks + first + at;
        const float* x = s.scores + r * split;
        if (m.shared && g + r > 0)
          for (int j = 0; j < n; ++j) to[j] = sortable(unsortable(to[j]) + x[j]);
        else
          for (int j = 0; j < n; ++j) to[j] = sortable(x[j]);
      }
    }
  }
}

template <class E>
void scan_item(const Attention& args, const SparseItem& item, Scratch& s) {
  const Sparse& sparse = *args.sequences[item.sequence].sparse;
  if (sparse.method->rank == Rank::signs)
    for_query_heads(args, item.head,
                    [&](auto count, int64_t first) { scan_piece<count.value>(args, sparse, first, item.begin); });
  else
    scan_rows_item<E>(args, item, s);
}

THRESHER_ISA_END
