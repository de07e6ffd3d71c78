// Exact attention over rows of K and V that lie anywhere: decode, verification, shared prefixes and causal prefill are
// the same three steps on splits of 256 keys: S = Q K^T, a softmax against the split's own maximum, and P V. Splits
// count from absolute position 0 and are merged from left to right by log-sum-exp, so the result of a query does not
// depend on chunks, batches, forks or files.
#pragma once
#include "api/carver.h"
#include "api/kernels.h"
#include "dense/attend.h"
#include "host/pool.h"
#include "isa/element.h"
#include "isa/namespace.h"
#include "isa/softmax.h"
#include "sparse/certificate.h"
#include "sparse/steps.h"

THRESHER_ISA_BEGIN

struct MergeScratch {
  float* acc;  // [head_dim]

  MergeScratch(const Attention& args, Carver& c) { c.take(acc, args.head_dim * 4); }
};

template <class E>
void merge_row(const Attention& args, int32_t sequence, int64_t row, char* memory) {
  const int64_t dim = args.head_dim, count = args.slots[sequence].count;
  const float* parts = args.partials + (args.slots[sequence].begin + row * count) * (dim + 2);
  Carver carver{memory};
  const MergeScratch s(args, carver);
  float m = -infinity(), l = 0;
  __builtin_memset(s.acc, 0, dim * sizeof(float));
  for (int64_t i = 0; i < count; ++i, parts += dim + 2) fold(m, l, s.acc, parts[0], parts[1], parts + 2, dim);
  const Sequence& seq = args.sequences[sequence];
  if (args.variances && seq.sparse && seq.sparse->method->certify > 0 && seq.sparse->indexed_layer[args.layer] >= 0) {
    const int64_t first = args.slots[sequence].begin + row * count;
    const float error = relative_error(args.partials + first * (dim + 2), args.variances + first * (dim + 2), count, dim, m, l, s.acc);
    const bool uncertain = !(error <= seq.sparse->method->certify);
    args.fallback[sequence * args.q_heads + row] = uncertain;
    __atomic_fetch_add(&seq.sparse->counters->estimates, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&seq.sparse->counters->fallbacks, int64_t(uncertain), __ATOMIC_RELAXED);
  }
  const int64_t token = seq.query_row + row / args.q_heads;
  const bool empty = seq.past + row / args.q_heads < args.blank;
  write_row<E>((typename E::Value*)args.out + (token * args.q_heads + row % args.q_heads) * dim, s.acc, l, dim, empty);
}

// Of one thread.
int64_t scratch_bytes(const Attention& args) {
  int64_t rows = 1;
  for (int64_t i = 0; i < args.item_count; ++i) {
    const int64_t n = item_rows(args, args.items[i]);
    rows = n > rows ? n : rows;
  }
  int64_t most = bytes_of<AttendScratch>(args, rows);
  for (int32_t i = 0; i < args.sequence_count; ++i) {
    const Sparse* sparse = args.sequences[i].sparse;
    const int64_t bytes = sparse ? step_bytes(args, *sparse) : 0;
    most = bytes > most ? bytes : most;
  }
  return most;  // no less than what merging takes
}

struct Place {
  int32_t sequence;
  int64_t row;
};

template <class E, int D>
void attend_threads(const Attention& args) {
  const int64_t bytes = scratch_bytes(args);
  auto memory = [&](int thread) { return args.scratch + thread * bytes; };
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
    for (int64_t i = begin; i < end; ++i) run_step<E, D>(args, args.sparse_items[i], memory(thread));
  };
  auto block = [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) attend_item<E, D>(args, args.items[i], memory(thread));
  };
  auto splits = [&](int64_t begin, int64_t end, int thread) { block(args.fold_count + begin, args.fold_count + end, thread); };
  auto merge = [&](int64_t begin, int64_t end, int thread) {
    for (int64_t row = begin; row < end; ++row) {
      const Place at = locate(row, merged_rows);
      merge_row<E>(args, at.sequence, at.row, memory(thread));
    }
  };
  auto votes = [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      if (args.sequences[i / args.kv_heads].votes) vote<E>(args, int32_t(i / args.kv_heads), i % args.kv_heads);
  };
  auto fall_back = [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i)
      if (args.fallback[i]) attend_densely<E, D>(args, args.sequences[i / args.q_heads], i % args.q_heads, memory(thread));
  };
  const int64_t split_count = args.item_count - args.fold_count;
  const Phase phases[] = {
      phase_of(append, tokens, 16, false, false),
      phase_of(step, args.sparse_count, 1, true, true),
      // Folded blocks differ in length; the splits of decode do not, and follow each other in memory.
      phase_of(block, args.fold_count, 1, true, false),
      phase_of(splits, split_count, 1, false, false),
      phase_of(merge, merged, 4, false, true),
      phase_of(votes, args.weights ? int64_t(args.sequence_count) * args.kv_heads : 0, 1, true, false),
      phase_of(fall_back, args.fallback ? int64_t(args.sequence_count) * args.q_heads : 0, 1, true, true),
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
