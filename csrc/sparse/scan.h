// Steps `sample` and `scan`: candidates are scored for the query heads of their KV head, signs after a sample of them has told
// what scores matter.
#pragma once
#include "api/carver.h"
#include "api/kernels.h"
#include "dense/pack.h"
#include "isa/memory.h"
#include "isa/namespace.h"
#include "isa/product.h"
#include "sparse/layout.h"
#include "sparse/signs.h"

THRESHER_ISA_BEGIN

struct BoundScratch {
  int16_t* scores;  // [4, sampled_scores]: of the query heads that are scored together

  BoundScratch(const Sparse& sparse, Carver& c) {
    c.take(scores, sparse.method->rank == Rank::signs ? 4 * sampled_scores(sparse) * 2 : 0);
  }
};

inline void sample_item(const Attention& args, const SparseItem& item, char* memory) {
  const Sparse& sparse = *args.sequences[item.sequence].sparse;
  Carver carver{memory};
  const BoundScratch s(sparse, carver);
  for_query_heads(args, item.kv_head, [&](auto count, int64_t first) { bound_scores<count.value>(args, sparse, first, s.scores); });
}

struct ScanScratch {
  uint32_t* keys;  // packed [split / 32][steps][32] packs
  void* queries;   // [group, row_dim]
  float* scores;   // [tile_rows, split]
  const char* rows[split];

  ScanScratch(const Attention& args, const Method& m, Carver& c) {
    c.take(keys, split * m.row_dim * value_bytes(args.type));
    c.take(queries, group_of(args) * m.row_dim * value_bytes(args.type));
    c.take(scores, tile_rows * split * 4);
  }
};

// Scores of ranked rows: dot products of the queries of a group with keys, page bounds, block or cluster means.
template <class E>
void scan_rows_item(const Attention& args, const SparseItem& item, char* memory) {
  typedef typename E::Value Value;
  const Sequence& seq = args.sequences[item.sequence];
  const Sparse& sparse = *seq.sparse;
  const Method& m = *sparse.method;
  const int64_t dim = m.row_dim, row_bytes = dim * int64_t(sizeof(Value)), steps = dim / E::pack;
  const int64_t group = group_of(args), ranks = padded_ranks(sparse.ranked);
  const bool shared = m.grouping == Grouping::shared;
  int64_t first = 0;  // of this block among all ranked rows
  for (int i = 0; m.rank != Rank::keys && i < item.block; ++i) first += sparse.blocks[i].units;
  Carver carver{memory};
  ScanScratch s(args, m, carver);
  Value* queries = (Value*)s.queries;
  for (int64_t g = 0; g < group; ++g)
    __builtin_memcpy(queries + g * dim, sparse.queries + (item.kv_head * group + g) * sparse.query_bytes, size_t(row_bytes));
  const Run* run = seq.runs;
  for (int64_t at = item.begin; at < item.end; at += split) {
    const int n = int(item.end - at < split ? item.end - at : split);
    if (m.rank == Rank::keys) {
      for (int j = 0; j < n; ++j) {
        const int64_t x = sparse.begin + at + j;
        run = run_of(seq, run, x);
        s.rows[j] = row_address(args, *run, item.kv_head, x, row_bytes).key;
      }
    } else {
      const Block& b = sparse.blocks[item.block];
      const char* rows = (const char*)b.ranked_rows + (plane_of(args, sparse, item.kv_head) * b.units + at) * row_bytes;
      for (int j = 0; j < n; ++j) s.rows[j] = rows + j * row_bytes;
    }
    pack_keys(s.rows, n, steps, s.keys);
    for (int64_t g = 0; g < group; g += tile_rows) {
      const int rows = int(group - g < tile_rows ? group - g : tile_rows);
      tiles<E>(rows, queries + g * dim, dim, (const Value*)s.keys, steps * panel * E::pack, int(padded(n)) / panel, steps,
               s.scores, split);
      for (int r = 0; r < rows; ++r) {
        const int64_t chooser = shared ? item.kv_head : item.kv_head * group + g + r;
        int32_t* to = sparse.scores + chooser * ranks + first + at;
        const float* x = s.scores + r * split;
        if (shared && g + r > 0)
          for (int j = 0; j < n; ++j) to[j] = sortable(unsortable(to[j]) + x[j]);
        else
          for (int j = 0; j < n; ++j) to[j] = sortable(x[j]);
      }
    }
  }
}

template <class E>
void scan_item(const Attention& args, const SparseItem& item, char* memory) {
  const Sparse& sparse = *args.sequences[item.sequence].sparse;
  if (sparse.method->rank == Rank::signs)
    for_query_heads(args, item.kv_head,
                    [&](auto count, int64_t first) { scan_piece<count.value>(args, sparse, first, item.begin); });
  else
    scan_rows_item<E>(args, item, memory);
}

THRESHER_ISA_END
