// What is not read, answered by centroids: rows that count as often as rows of their cluster are left. Their means stay those of
// the whole cluster: taking what was read out of them costs a second reading of it and gains nothing (docs/results.md).
#pragma once
#include "api/carver.h"
#include "api/kernels.h"
#include "isa/namespace.h"
#include "isa/softmax.h"
#include "isa/vector.h"
#include "sparse/group.h"
#include "sparse/layout.h"

THRESHER_ISA_BEGIN

struct TailScratch {
  int32_t* left;  // [clusters of a block]: rows that are not read

  explicit TailScratch(const Method& m, Carver& c) { c.take(left, m.tail ? most_clusters * 4 : 0); }
};

template <class E, int D>
void attend_tail(Group<E, D>& group, const TailScratch& s) {
  typedef typename E::Value Value;
  const Sparse& sparse = group.sparse;
  const int64_t plane = plane_of(group.args, sparse, group.kv_head), both = 2 * group.dim;
  const float scale = group.args.scale * log2_e;
  TileScratch& tile = group.s.tile;
  float log_counts[split];  // log2(rows that a centroid stands for), as a part of its score
  int waiting = 0;
  auto flush = [&] {
    if (!waiting) return;
    for (int k = waiting; k % W; ++k) log_counts[k] = 1;
    for (int k = 0; k < waiting; k += W) store(log_counts + k, log2_positive(load<vf>(log_counts + k)) * (1 / scale));
    group.attend(waiting, group.m.certify > 0, false, [&](int64_t, float* x, float*) {
      for (int k = 0; k < waiting; ++k) x[k] += log_counts[k];
    });
    waiting = 0;
  };
  const int32_t *listed = listed_of(sparse, group.kv_head), *end = listed + sparse.listed_count[group.kv_head];
  for (int i = 0; i < sparse.block_count; ++i) {
    const Block& b = sparse.blocks[i];
    const int64_t n = b.end - b.begin, first = b.begin - sparse.begin;
    const Value* means = (const Value*)b.means + plane * b.clusters * both;
    const uint16_t* assigned = b.assigned + plane * n;
    __builtin_memcpy(s.left, b.counts + plane * b.clusters, size_t(b.clusters) * sizeof(int32_t));
    for (; listed < end && *listed < first + n; ++listed) --s.left[assigned[*listed - first]];
    for (int64_t c = 0; c < b.clusters; ++c) {
      if (s.left[c] <= 0) continue;
      tile.key_rows[waiting] = (const char*)(means + c * both);
      tile.value_rows[waiting] = (const char*)(means + c * both + group.dim);
      log_counts[waiting] = float(s.left[c]);  // until flush
      if (++waiting == split) flush();
    }
  }
  flush();
}

THRESHER_ISA_END
