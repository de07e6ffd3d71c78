// The rows that a sparse sequence reads, gathered from wherever they lie. What a query head weighs by itself is corrected for how
// likely it was to be chosen.
#pragma once
#include "api/kernels.h"
#include "isa/element.h"
#include "isa/memory.h"
#include "isa/namespace.h"
#include "isa/softmax.h"
#include "sparse/group.h"
#include "sparse/inclusion.h"
#include "sparse/layout.h"

THRESHER_ISA_BEGIN

constexpr uint32_t all_heads = ~uint32_t(0);

template <class E, int D>
struct Gather {
  typedef typename E::Value Value;
  Group<E, D>& group;
  const bool own;         // query heads weigh what they have chosen themselves
  const Run* run;
  bool estimate;          // of errors
  int64_t rows = 0, head_rows = 0;  // that were read, and weighed by query heads
  int waiting = 0;
  int32_t candidate[split];  // of the rows that wait; -1: read in any case
  uint32_t members[split];   // bit g: query head g of the group weighs it

  Inclusion inclusion;

  explicit Gather(Group<E, D>& of)
      : group(of), own(of.m.grouping == Grouping::own), run(of.seq.runs), estimate(of.m.certify > 0),
        inclusion(E(), of.args, of.sparse, of.kv_head, of.queries, of.dim) {}

  void add(int64_t position, int64_t which, uint32_t who) {
    if (position < group.args.blank) return;
    const int64_t row_bytes = group.dim * int64_t(sizeof(Value));
    run = run_of(group.seq, run, position);
    const RowAddress at = row_address(group.args, *run, group.kv_head, position, row_bytes);
    prefetch(at.key, row_bytes);
    prefetch(at.value, row_bytes);
    group.s.tile.key_rows[waiting] = at.key;
    group.s.tile.value_rows[waiting] = at.value;
    candidate[waiting] = int32_t(which);
    members[waiting] = who;
    if (++waiting == split) flush();
  }

  // Rows in order of position; of their chunks of `split` rows, each `pieces`-th from `part`.
  void add_all(int part, int pieces) {
    const Sparse& sparse = group.sparse;
    const Sequence& seq = group.seq;
    const int32_t* listed_rows = listed_of(sparse, group.kv_head);
    const uint32_t* listed_members = members_of(sparse, group.kv_head);
    const int64_t listed = sparse.listed_count[group.kv_head];
    const int64_t total = sparse.begin + listed + seq.past + seq.queries - sparse.end;
    for (int64_t chunk = int64_t(part) * split; chunk < total; chunk += int64_t(pieces) * split)
      for (int64_t i = chunk; i < total && i < chunk + split; ++i) {
        const int64_t at = i - sparse.begin;
        if (at < 0)
          add(i, -1, all_heads);
        else if (at < listed)
          add(sparse.begin + listed_rows[at], listed_rows[at], own ? listed_members[at] : all_heads);
        else
          add(sparse.end + at - listed, -1, all_heads);
      }
    flush();
  }

  void adjust(int64_t g, float* x, float* excluded) const {
    if (!own) return;
    const uint32_t bit = uint32_t(1) << g;
    const float scale = group.args.scale * log2_e;
    inclusion.adjust(g, (waiting + W - 1) / W * W, scale, x, excluded);
    if (group.m.take == Take::draw) {  // the scores of what was drawn are already its weights
      const Sparse& sparse = group.sparse;
      const float* weights = (const float*)sparse.scores + (group.kv_head * group.heads + g) * padded_ranks(sparse.ranked);
      for (int k = 0; k < waiting; ++k)
        if (candidate[k] >= 0 && members[k] & bit) x[k] = weights[candidate[k]] / scale;
    }
    for (int k = 0; k < waiting; ++k)
      if (!(members[k] & bit)) x[k] = -infinity();
  }

  void flush() {
    if (!waiting) return;
    rows += waiting;
    const uint32_t heads = uint32_t((uint64_t(1) << group.heads) - 1);
    for (int k = 0; k < waiting; ++k) head_rows += __builtin_popcount(members[k] & heads);
    inclusion.look_up(candidate, waiting);
    group.attend(waiting, estimate, own, [&](int64_t g, float* x, float* excluded) { adjust(g, x, excluded); });
    waiting = 0;
  }
};

THRESHER_ISA_END
