// Before signs are scanned, if they lie in the order of clusters: which groups of 16 candidates are looked at, for all query
// heads of a KV head. Included inside the namespace of one instruction set.
#pragma once

inline int32_t* probed_of(const Sparse& sparse, int64_t kv_head) {
  return sparse.probed + kv_head * (1 + padded_ranks(sparse.ranked) / 16);
}

// Those with a token of the clusters that weigh most by their mean keys for any of the query heads: as many clusters as hold
// `probe` candidates, and those that weigh the same as the last.
template <class E>
void probe_item(const Attention& args, const SparseItem& item, Scratch& s) {
  typedef typename E::Value Value;
  const Sequence& seq = args.sequences[item.sequence];
  const Sparse& sparse = *seq.sparse;
  const int64_t dim = args.head_dim, group = args.q_heads / args.kv_heads, steps = dim / E::pack;
  const int64_t plane = plane_of(args, sparse, item.head), ranks = padded_ranks(sparse.ranked);
  const float scale = args.scale * log2_e;
  Value* queries = (Value*)s.queries;
  __builtin_memset(queries, 0, size_t(group * dim) * sizeof(Value));
  for (int64_t g = 0; g < group; ++g)
    __builtin_memcpy(queries + g * dim, (const Value*)args.q + seq.query_row * args.q_token + (item.head * group + g) * args.q_head,
                     size_t(dim) * sizeof(Value));
  // There is room for scores of all candidates, and clusters have 64 of them or more on average.
  auto scores_of = [&](int64_t g) { return (float*)(sparse.scores + (item.head * group + g) * ranks * 4); };
  int64_t clusters = 0;
  for (int i = 0; i < sparse.block_count; ++i) {
    const Block& b = sparse.blocks[i];
    const Value* means = (const Value*)b.means + plane * b.clusters * 2 * dim;
    for (int64_t at = 0; at < b.clusters; at += split) {
      const int n = int(b.clusters - at < split ? b.clusters - at : split);
      for (int j = 0; j < n; ++j) s.key_rows[j] = (const char*)(means + (at + j) * 2 * dim);
      pack_keys(s.key_rows, n, steps, s.keys);
      for (int64_t g = 0; g < group; g += tile_rows) {
        const int rows = int(group - g < tile_rows ? group - g : tile_rows);
        tiles<E>(rows, queries + g * dim, dim, (const Value*)s.keys, steps * panel * E::pack, int(padded(n)) / panel, steps,
                 s.scores, split);
        for (int r = 0; r < rows; ++r)
          for (int j = 0; j < n; ++j) scores_of(g + r)[clusters + at + j] = s.scores[r * split + j] * scale;
      }
    }
    clusters += b.clusters;
  }
  // log2 of the part that a token at the mean has of all weights, the largest of all query heads.
  float* weight = scores_of(0) + clusters;
  int32_t* counts = (int32_t*)weight + clusters;
  int64_t c = 0;
  for (int i = 0; i < sparse.block_count; ++i) {
    const Block& b = sparse.blocks[i];
    for (int64_t j = 0; j < b.clusters; ++j, ++c) {
      counts[c] = b.counts[plane * b.clusters + j];
      weight[c] = -infinity();
    }
  }
  for (int64_t g = 0; g < group; ++g) {
    const float* x = scores_of(g);
    float top = -infinity();
    for (c = 0; c < clusters; ++c) top = counts[c] && x[c] > top ? x[c] : top;
    float total = 0;
    for (c = 0; c < clusters; ++c) total += counts[c] ? float(counts[c]) * exp2_nonpositive(x[c] - top) : 0;
    const float shift = top + float(__builtin_log2(double(total)));
    for (c = 0; c < clusters; ++c) weight[c] = x[c] - shift > weight[c] ? x[c] - shift : weight[c];
  }
  int32_t* ranking = (int32_t*)weight;
  for (c = 0; c < clusters; ++c) ranking[c] = sortable(weight[c]);
  int64_t low = -(int64_t(1) << 31), high = (int64_t(1) << 31) - 1;
  while (low < high) {  // the largest t whose clusters hold enough
    const int64_t middle = low + (high - low + 1) / 2;
    const int32_t t = int32_t(middle);
    int32_t held = 0;
    for (c = 0; c < clusters; ++c) held += ranking[c] >= t ? counts[c] : 0;
    if (held >= sparse.probe)
      low = middle;
    else
      high = middle - 1;
  }
  int32_t *probed = probed_of(sparse, item.head), last = -1;
  int64_t found = 0, first = 0;
  for (int i = 0; i < sparse.block_count; first += sparse.blocks[i++].clusters) {
    const Block& b = sparse.blocks[i];
    int64_t at = b.begin - sparse.begin;
    for (c = first; c < first + b.clusters; at += counts[c++])
      if (counts[c] && ranking[c] >= low)
        for (int32_t g = int32_t(at / 16); g <= int32_t((at + counts[c] - 1) / 16); ++g)
          if (g > last) probed[++found] = last = g;
  }
  probed[0] = int32_t(found);
}
