// Step `query`, the first in which a sparse sequence decides what it reads of its candidates: each query head makes
// what it ranks by. Methods that do not rank (LSH, fixed sets) mark their candidates here already.
#pragma once
#include "api/carver.h"
#include "api/kernels.h"
#include "isa/namespace.h"
#include "sparse/layout.h"
#include "sparse/lsh.h"
#include "sparse/projection.h"
#include "sparse/signs.h"

THRESHER_ISA_BEGIN

struct QueryScratch {
  uint8_t* hits;  // tables: of each key of a block

  QueryScratch(const Method& m, Carver& c) { c.take(hits, m.rank == Rank::tables ? most_table_tokens : 0); }
};

template <class E>
void query_item(const Attention& args, const SparseItem& item, char* memory) {
  typedef typename E::Value Value;
  const Sequence& seq = args.sequences[item.sequence];
  const Sparse& sparse = *seq.sparse;
  const Method& m = *sparse.method;
  const int64_t dim = args.head_dim, n_words = words(sparse.end - sparse.begin);
  uint64_t* chosen = sparse.chosen + item.chooser * n_words;
  if (m.rank == Rank::none) {
    __builtin_memset(chosen, 0, size_t(8 * n_words));
    return;
  }
  if (m.rank == Rank::fixed) {
    for (int i = 0; i < sparse.block_count; ++i) {
      const Block& b = sparse.blocks[i];
      const int64_t n = (b.end - b.begin) / 64;
      __builtin_memcpy(chosen + (b.begin - sparse.begin) / 64, b.keep + plane_of(args, sparse, item.kv_head) * n, size_t(8 * n));
    }
    return;
  }
  const Value* q = (const Value*)args.q + seq.query_row * args.q_token + item.chooser * args.q_head;
  if (m.rank == Rank::tables) {
    uint64_t bits[most_directions / 64 + 1] = {};
    project_rows<E>(1, q, dim, m.directions, m.planes, [&](int64_t p, const float* x) {
      bits[p / 2] |= uint64_t(positive(x)) << (p % 2 * 32);
    });
    uint16_t codes[256];
    for (int l = 0; l < m.tables; ++l) codes[l] = uint16_t(field(bits, l, m.bits));
    Carver carver{memory};
    const QueryScratch s(m, carver);
    int64_t entries = 0;
    for (int i = 0; i < sparse.block_count; ++i) {
      const Block& b = sparse.blocks[i];
      entries += look_up(m, b, plane_of(args, sparse, item.kv_head), codes, s.hits, chosen + (b.begin - sparse.begin) / 64);
    }
    __atomic_fetch_add(&sparse.counters->entries, entries, __ATOMIC_RELAXED);
    return;
  }
  char* to = sparse.queries + item.chooser * sparse.query_bytes;
  if (m.rank == Rank::signs) {
    alignas(64) float x[most_directions];
    const char* directions = (const char*)m.directions + plane_of(args, sparse, item.kv_head) * m.directions_stride;
    project_rows<E>(1, q, dim, directions, m.planes,
                    [&](int64_t p, const float* part) { __builtin_memcpy(x + p * panel, part, panel * 4); });
    round_query(x, m.planes, *(SignQuery*)to);
    return;
  }
  Value* row = (Value*)to;
  if (m.row_dim == dim) {
    __builtin_memcpy(row, q, size_t(dim) * sizeof(Value));
  } else {  // the bound sum_c max(q_c least_c, q_c greatest_c) as one product
    for (int64_t c = 0; c < dim; ++c) {
      const float x = E::get(q + c);
      E::put(row + c, x < 0 ? x : 0);
      E::put(row + dim + c, x > 0 ? x : 0);
    }
  }
}

THRESHER_ISA_END
