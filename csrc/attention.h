// Exact attention over rows of K and V that lie anywhere: decode, verification, shared prefixes and causal prefill are
// the same three steps on splits of 256 keys: S = Q K^T, a softmax against the split's own maximum, and P V. Splits
// count from absolute position 0 and are merged from left to right by log-sum-exp, so the result of a query does not
// depend on chunks, batches, forks or files. Included inside the namespace of one instruction set.
#pragma once

#include "tile.h"

inline int64_t item_rows(const Attention& args, const Item& item) {
  int64_t rows = 0;
  for (int i = 0; i < item.span_count; ++i) {
    const Span& span = args.spans[item.first_span + i];
    rows += span.query_end - span.query_begin;
  }
  return rows * (args.q_heads / args.kv_heads);
}

template <class E, int D>
void attend_item(const Attention& args, const Item& item, Scratch& s) {
  typedef typename E::Value Value;
  const int64_t dim = D ? D : args.head_dim, wide = padded(dim), group = args.q_heads / args.kv_heads;
  const int64_t row_bytes = dim * int64_t(sizeof(Value));
  const int64_t rows = item_rows(args, item);
  Value* queries = (Value*)s.queries;
  int64_t row = 0;
  for (int i = 0; i < item.span_count; ++i) {
    const Span& span = args.spans[item.first_span + i];
    const Sequence& seq = args.sequences[span.sequence];
    for (int64_t t = span.query_begin; t < span.query_end; ++t)
      for (int64_t g = 0; g < group; ++g, ++row)
        __builtin_memcpy(queries + row * dim,
                         (const Value*)args.q + (seq.query_row + t) * args.q_token +
                             (item.kv_head * group + g) * args.q_head,
                         row_bytes);
  }
  if (item.fold)
    for (int64_t r = 0; r < rows; ++r) {
      s.max[r] = -infinity();
      s.sum[r] = 0;
      __builtin_memset(s.acc + r * dim, 0, dim * sizeof(float));
    }
  // All spans of an item see the same rows of K and V; the longest view of them decides how many there are.
  const Sequence* longest = nullptr;
  int64_t total = 0;
  for (int i = 0; i < item.span_count; ++i) {
    const Span& span = args.spans[item.first_span + i];
    const Sequence& seq = args.sequences[span.sequence];
    if (seq.past + span.query_end > total) {
      total = seq.past + span.query_end;
      longest = &seq;
    }
  }
  for (int64_t part = item.split_begin; part < item.split_end; ++part) {
    const int64_t begin = part * split, end = begin + split < total ? begin + split : total;
    const int keys = int(end - begin);
    if (item.fold) {  // skip what no row of this block sees
      const Span& span = args.spans[item.first_span];
      const int64_t first = longest->past + span.query_begin;
      const Visible v = visible(first, begin, end, args.window, longest->window, longest->sinks);
      if (v.low >= keys && v.sink_low >= v.sink_high) continue;
    }
    int filled = 0;
    for (int i = 0; i < longest->run_count && filled < keys; ++i) {
      const Run& run = longest->runs[i];
      if (run.end <= begin + filled) continue;
      const int64_t plane = run.capacity * row_bytes;
      const char* key = run.base + (int64_t(args.layer) * 2 * args.kv_heads + item.kv_head) * plane;
      key += (begin + filled - run.start) * row_bytes;
      const int n = int(run.end - begin < keys ? run.end - begin : keys) - filled;
      for (int j = 0; j < n; ++j) {
        s.key_rows[filled + j] = key + j * row_bytes;
        s.value_rows[filled + j] = key + args.kv_heads * plane + j * row_bytes;
      }
      filled += n;
    }
    // Rows in tiles; a tile may cross spans.
    int64_t done = 0;
    int at = 0;
    int64_t in_span = 0;
    while (done < rows) {
      const int count = int(rows - done < tile_rows ? rows - done : tile_rows);
      Visible see[tile_rows];
      float top[tile_rows], total_weight[tile_rows];
      int64_t slot[tile_rows];
      for (int r = 0; r < count; ++r) {
        const Span* span = args.spans + item.first_span + at;
        if (in_span == (span->query_end - span->query_begin) * group) {
          ++at, ++span;
          in_span = 0;
        }
        const Sequence& seq = args.sequences[span->sequence];
        const int64_t t = span->query_begin + in_span / group, head = item.kv_head * group + in_span % group;
        see[r] = visible(seq.past + t, begin, end, args.window, seq.window, seq.sinks);
        const Slots& slots = args.slots[span->sequence];
        slot[r] = slots.begin + (t * args.q_heads + head) * slots.count + part - (part < slots.sink_splits ? 0 : slots.gap);
        ++in_span;
      }
      attend_tile<E, D>(args, s, count, queries + done * dim, see, keys, done == 0, rows <= tile_rows, top, total_weight, s.partial,
                        [](float*) {});
      for (int r = 0; r < count; ++r) {
        if (item.fold) {
          fold(s.max[done + r], s.sum[done + r], s.acc + (done + r) * dim, top[r], total_weight[r],
               s.partial + r * wide, dim);
        } else {
          float* to = args.partials + slot[r] * (dim + 2);
          to[0] = top[r];
          to[1] = total_weight[r];
          __builtin_memcpy(to + 2, s.partial + r * wide, dim * sizeof(float));
        }
      }
      done += count;
    }
  }
  if (!item.fold) return;
  const Span& span = args.spans[item.first_span];
  const Sequence& seq = args.sequences[span.sequence];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = seq.query_row + span.query_begin + r / group, head = item.kv_head * group + r % group;
    write_row<E>((Value*)args.out + (token * args.q_heads + head) * dim, s.acc + r * dim, s.sum[r], dim);
  }
}

// New keys and values go behind the rows that are there, all in the last run.
template <class E>
void append_token(const Attention& args, const Sequence& seq, int64_t t) {
  typedef typename E::Value Value;
  const Run& tail = seq.runs[seq.run_count - 1];
  const int64_t row_bytes = args.head_dim * int64_t(sizeof(Value)), plane = tail.capacity * row_bytes;
  char* to = tail.base + int64_t(args.layer) * 2 * args.kv_heads * plane + (seq.past + t - tail.start) * row_bytes;
  const Value* k = (const Value*)args.k + (seq.query_row + t) * args.k_token;
  const Value* v = (const Value*)args.v + (seq.query_row + t) * args.v_token;
  for (int64_t h = 0; h < args.kv_heads; ++h) {
    __builtin_memcpy(to + h * plane, k + h * args.k_head, row_bytes);
    __builtin_memcpy(to + (args.kv_heads + h) * plane, v + h * args.v_head, row_bytes);
  }
}

#include "largest.h"
#include "prepare.h"
#include "scan.h"
#include "choose.h"
#include "gather.h"
#include "certificate.h"

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
