// Exact attention over rows of K and V that lie anywhere: decode, verification, shared prefixes and causal prefill are
// the same three steps on splits of 256 keys: S = Q K^T, a softmax against the split's own maximum, and P V. Splits
// count from absolute position 0 and are merged from left to right by log-sum-exp, so the result of a query does not
// depend on chunks, batches, forks or files.
#pragma once
#include "api/carver.h"
#include "api/kernels.h"
#include "dense/attend.h"
#include "dense/tile.h"
#include "host/pool.h"
#include "isa/element.h"
#include "isa/namespace.h"
#include "isa/softmax.h"
#include "sparse/certificate.h"
#include "sparse/choose.h"
#include "sparse/gather.h"
#include "sparse/query.h"
#include "sparse/scan.h"

THRESHER_ISA_BEGIN

template <class E>
void merge_row(const Attention& args, int32_t sequence, int64_t row, float* acc) {
  const int64_t dim = args.head_dim, count = args.slots[sequence].count;
  const float* parts = args.partials + (args.slots[sequence].begin + row * count) * (dim + 2);
  float m = -infinity(), l = 0;
  __builtin_memset(acc, 0, dim * sizeof(float));
  for (int64_t i = 0; i < count; ++i, parts += dim + 2) fold(m, l, acc, parts[0], parts[1], parts + 2, dim);
  const Sequence& seq = args.sequences[sequence];
  if (args.doubts && seq.sparse && seq.sparse->method->certify > 0 && seq.sparse->slots[args.layer] >= 0) {
    const int64_t first = args.slots[sequence].begin + row * count;
    const float error = relative_error(args.partials + first * (dim + 2), args.doubts + first * (dim + 2), count, dim, m, l, acc);
    const bool uncertain = !(error <= seq.sparse->method->certify);
    args.escalated[sequence * args.q_heads + row] = uncertain;
    __atomic_fetch_add(&seq.sparse->counters->checked, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&seq.sparse->counters->escalated, int64_t(uncertain), __ATOMIC_RELAXED);
  }
  const int64_t token = seq.query_row + row / args.q_heads;
  write_row<E>((typename E::Value*)args.out + (token * args.q_heads + row % args.q_heads) * dim, acc, l, dim);
}

// One step of a sparse sequence, when those it needs are done.
template <class E, int D>
void run_step(const Attention& args, const SparseItem& item, Scratch& s) {
  int32_t* done = args.sequences[item.sequence].sparse->done + step_kinds * item.kv_head;
  Patience patience;
  while (item.count && __atomic_load_n(done + int(item.after), __ATOMIC_ACQUIRE) < item.count) patience.wait();
  switch (item.step) {
    case Step::prepare: prepare_item<E>(args, item, s); break;
    case Step::sample: sample_item(args, item, s); break;
    case Step::scan: scan_item<E>(args, item, s); break;
    case Step::choose: choose_item(args, item, s); break;
    case Step::list: list_item(args, item); break;
    case Step::gather: gather_item<E, D>(args, item, s); break;
  }
  __atomic_fetch_add(done + int(item.step), 1, __ATOMIC_RELEASE);
}

// The working memory of one thread; returns its bytes.
inline int64_t carve(const Attention& args, char* memory, Scratch& s) {
  const int64_t dim = args.head_dim, wide = padded(dim), value = args.type == Type::f32 ? 4 : 2;
  const int64_t group = args.q_heads / args.kv_heads;
  int64_t rows = group, row_dim = dim, ranked = 0;
  for (int64_t i = 0; i < args.item_count; ++i) {
    const int64_t n = item_rows(args, args.items[i]);
    rows = n > rows ? n : rows;
  }
  bool sparse = false, tables = false, clusters = false;
  for (int32_t i = 0; i < args.sequence_count; ++i) {
    const Sparse* p = args.sequences[i].sparse;
    if (!p) continue;
    sparse = true;
    row_dim = p->method->row_dim > row_dim ? p->method->row_dim : row_dim;
    ranked = p->ranked > ranked ? p->ranked : ranked;
    tables |= p->method->rank == Rank::tables;
    clusters |= p->method->tail || p->method->rank == Rank::clusters;
  }
  Carver c{memory};
  c.take(s.keys, split * row_dim * value);
  c.take(s.values, split * wide * value);
  c.take(s.queries, rows * row_dim * value);
  c.take(s.scores, tile_rows * split * 4);
  c.take(s.weights, tile_rows * split * 4);
  c.take(s.acc, rows * dim * 4);
  c.take(s.max, rows * 4);
  c.take(s.sum, rows * 4);
  c.take(s.partial, tile_rows * wide * 4);
  if (!sparse) return c.bytes;
  c.take(s.hits, tables ? most_table_tokens : 0);
  c.take(s.values_left, (padded_ranks(ranked) + 64) * 8 + (clusters ? most_clusters : 0));
  c.take(s.unit_marks, padded_ranks(ranked) / 8 + 64);
  c.take(s.left, clusters ? most_clusters * 4 : 0);
  c.take(s.slack, tile_rows * split * 4);
  c.take(s.doubts, group * (dim + 2) * 4);
  c.take(s.kept, group * (dim + 2) * 4);
  return c.bytes;
}

int64_t scratch_bytes(const Attention& args) {
  Scratch s;
  return carve(args, nullptr, s);
}

struct Place {
  int32_t sequence;
  int64_t row;
};

template <class E, int D>
void attend_threads(const Attention& args) {
  Scratch sizes;
  const int64_t bytes = carve(args, nullptr, sizes);
  auto scratch = [&](int thread, Scratch& s) { carve(args, args.scratch + thread * bytes, s); };
  // The sequence that a row of some kind belongs to, and its number there; `of(sequence)` says how many each has.
  auto locate = [&](int64_t row, auto of) {
    int32_t i = 0;
    for (; row >= of(i); ++i) row -= of(i);
    return Place{i, row};
  };
  auto new_tokens = [&](int32_t i) { return args.sequences[i].queries; };
  auto merged_rows = [&](int32_t i) { return args.slots[i].count ? args.sequences[i].queries * args.q_heads : 0; };
  int64_t tokens = 0, merged = 0;
  for (int32_t i = 0; i < args.sequence_count; ++i) tokens += new_tokens(i), merged += merged_rows(i);

  auto append = [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const Place at = locate(t, new_tokens);
      append_token<E>(args, args.sequences[at.sequence], at.row);
    }
  };
  auto step = [&](int64_t begin, int64_t end, int thread) {
    Scratch s;
    scratch(thread, s);
    for (int64_t i = begin; i < end; ++i) run_step<E, D>(args, args.sparse_items[i], s);
  };
  auto block = [&](int64_t begin, int64_t end, int thread) {
    Scratch s;
    scratch(thread, s);
    for (int64_t i = begin; i < end; ++i) attend_item<E, D>(args, args.items[i], s);
  };
  auto splits = [&](int64_t begin, int64_t end, int thread) { block(args.fold_count + begin, args.fold_count + end, thread); };
  auto merge = [&](int64_t begin, int64_t end, int thread) {
    Scratch s;
    scratch(thread, s);
    for (int64_t row = begin; row < end; ++row) {
      const Place at = locate(row, merged_rows);
      merge_row<E>(args, at.sequence, at.row, s.partial);
    }
  };
  auto doubted = [&](int64_t begin, int64_t end, int thread) {
    Scratch s;
    scratch(thread, s);
    for (int64_t i = begin; i < end; ++i)
      if (args.escalated[i]) attend_densely<E, D>(args, args.sequences[i / args.q_heads], i % args.q_heads, s);
  };
  const int64_t split_count = args.item_count - args.fold_count;
  const Phase phases[] = {
      phase_of(append, tokens, 16, false, false),
      phase_of(step, args.sparse_count, 1, true, true),
      // Folded blocks differ in length; the splits of decode do not, and follow each other in memory.
      phase_of(block, args.fold_count, 1, true, false),
      phase_of(splits, split_count, 1, false, false),
      phase_of(merge, merged, 4, false, true),
      phase_of(doubted, args.escalated ? int64_t(args.sequence_count) * args.q_heads : 0, 1, true, true),
  };
  run_phases(phases, sizeof phases / sizeof *phases, args.threads);
}

// Known head dimensions become constants of the inner loops.
template <class E>
void attend_elements(const Attention& args) {
  if (args.head_dim == 64)
    attend_threads<E, 64>(args);
  else if (args.head_dim == 128)
    attend_threads<E, 128>(args);
  else
    attend_threads<E, 0>(args);
}

void attend(const Attention& args) {
  if (args.type == Type::f32)
    attend_elements<F32>(args);
  else
    attend_elements<BF16>(args);
}

THRESHER_ISA_END
