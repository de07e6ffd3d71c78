// Attention over the rows that a sparse sequence has chosen: gathered from wherever they lie, each read once for all query
// heads of its group, corrected for how likely it was to be chosen, and what was not read answered by centroids.
#pragma once
#include "api/kernels.h"
#include "dense/tile.h"
#include "isa/memory.h"
#include "isa/namespace.h"
#include "isa/random.h"
#include "isa/softmax.h"
#include "sparse/layout.h"

THRESHER_ISA_BEGIN

inline float total_of(vf x) {
#if defined(__AVX512F__)
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
#else
  return sum(x);
#endif
}

template <class E, int D>
struct Gather {
  typedef typename E::Value Value;
  const Attention& args;
  const Sequence& seq;
  const Sparse& sparse;
  const Method& m;
  Scratch& s;
  const int64_t kv_head, group, dim, wide;
  const float scale;
  const Run* run;
  int waiting = 0;
  // What scores become before the softmax: nothing else, what the method makes of its own choice, or that of a centroid.
  enum class Weighing { plain, own, centroids } weighing = Weighing::plain;
  bool doubtful = false;   // whether to estimate errors; slack is 1 for a sample of equal weights
  int64_t rows = 0, head_rows = 0;
  int32_t candidate[split];  // -1: read in any case
  uint32_t members[split];   // bit g: query head g of the group has chosen it
  float inverse_norm[split], is_candidate[split];  // tables
  float log_counts[split];   // centroids
  float query_norm[most_group], query_mean[most_group];  // of each query head: |q|, q . mean

  Gather(const Attention& a, const Sequence& sequence, int64_t head, Scratch& scratch)
      : args(a), seq(sequence), sparse(*sequence.sparse), m(*sparse.method), s(scratch), kv_head(head),
        group(a.q_heads / a.kv_heads), dim(D ? D : a.head_dim), wide(padded(dim)), scale(a.scale * log2_e), run(seq.runs) {
    Value* queries = (Value*)s.queries;
    for (int64_t g = 0; g < group; ++g)
      __builtin_memcpy(queries + g * dim,
                       (const Value*)args.q + seq.query_row * args.q_token + (kv_head * group + g) * args.q_head,
                       size_t(dim) * sizeof(Value));
    if (m.rank == Rank::tables) {
      const float* mean = sparse.mean + plane_of(args, sparse, kv_head) * dim;
      for (int64_t g = 0; g < group; ++g) {
        float norm = 0, along = 0;
        for (int64_t d = 0; d < dim; ++d) {
          const float x = E::get(queries + g * dim + d);
          norm += x * x;
          along += x * mean[d];
        }
        query_norm[g] = __builtin_sqrtf(norm);
        query_mean[g] = along;
      }
    }
    if (m.own) weighing = Weighing::own;
    doubtful = m.certify > 0;
    clear();
  }

  void clear() {
    for (int64_t g = 0; g < group; ++g) {
      s.max[g] = -infinity();
      s.sum[g] = 0;
    }
    __builtin_memset(s.acc, 0, size_t(group * dim) * sizeof(float));
    __builtin_memset(s.doubts, 0, size_t(group * (dim + 2)) * sizeof(float));
  }

  void row_addresses(int64_t position, const char*& key, const char*& value) {
    run = run_of(seq, run, position);
    const int64_t row_bytes = dim * int64_t(sizeof(Value)), plane = run->capacity * row_bytes;
    key = run->base + (int64_t(args.layer) * 2 * args.kv_heads + kv_head) * plane + (position - run->start) * row_bytes;
    value = key + args.kv_heads * plane;
  }

  void add(int64_t position, int64_t which, uint32_t who) {
    row_addresses(position, s.key_rows[waiting], s.value_rows[waiting]);
    prefetch(s.key_rows[waiting], dim * int64_t(sizeof(Value)));
    prefetch(s.value_rows[waiting], dim * int64_t(sizeof(Value)));
    candidate[waiting] = int32_t(which);
    members[waiting] = who;
    if (++waiting == split) flush();
  }

  // Runs over the rows that are read, in order of position; chunk c of `split` rows goes to piece c % pieces.
  void add_all(int part, int pieces) {
    const int32_t* rows = rows_of(sparse, kv_head);
    const uint32_t* members = members_of(sparse, kv_head);
    const int64_t listed = *rows++, total = sparse.begin + listed + seq.past + seq.queries - sparse.end;
    const bool all = !m.own || m.shared;
    for (int64_t chunk = int64_t(part) * split; chunk < total; chunk += int64_t(pieces) * split)
      for (int64_t i = chunk; i < total && i < chunk + split; ++i) {
        const int64_t at = i - sparse.begin;
        if (at < 0)
          add(i, -1, ~uint32_t(0));
        else if (at < listed)
          add(sparse.begin + rows[at], rows[at], all ? ~uint32_t(0) : members[at]);
        else
          add(sparse.end + at - listed, -1, ~uint32_t(0));
      }
    flush();
  }

  // log2 of the probability that a key at this cosine is chosen, by linear interpolation.
  vf log_inclusion(vf cosine) const {
    const float last = float(m.log_u_count - 1);
    vf x = (cosine + 1.0f) * (0.5f * last);
    x = x > 0.0f ? (x < last ? x : splat(last)) : vf{};  // 0 for what is not a number
    vi at = __builtin_convertvector(x, vi);
    at = at > m.log_u_count - 2 ? at - at + (m.log_u_count - 2) : at;
    vf low, high;
    for (int j = 0; j < W; ++j) {
      low[j] = m.log_u[at[j]];
      high[j] = m.log_u[at[j] + 1];
    }
    return low + (high - low) * (x - __builtin_convertvector(at, vf));
  }

  void adjust(int64_t g, float* x, float* slack) const {
    if (weighing == Weighing::plain) return;
    if (weighing == Weighing::centroids) {
      for (int k = 0; k < waiting; ++k) x[k] += log_counts[k];
      return;
    }
    const uint32_t bit = uint32_t(1) << g;
    const int end = (waiting + W - 1) / W * W;
    if (m.rank == Rank::tables) {
      const float inverse = query_norm[g] > 0 ? 1 / query_norm[g] : 0;
      for (int k = 0; k < end; k += W) {
        const vf score = load<vf>(x + k);
        const vf log_u = log_inclusion((score - query_mean[g]) * inverse * load<vf>(inverse_norm + k));
        const vf is = load<vf>(is_candidate + k);
        store(x + k, score - log_u * is * (1 / scale));
        if (slack) store(slack + k, (1.0f - exp2_nonpositive(log_u < 0.0f ? log_u : vf{})) * is);
      }
    } else if (m.take == Take::draw) {
      const float* weights = (const float*)(sparse.scores + (kv_head * group + g) * padded_ranks(sparse.ranked) * 4);
      for (int k = 0; k < waiting; ++k)
        if (candidate[k] >= 0 && members[k] & bit) x[k] = weights[candidate[k]] / scale;
    }
    for (int k = 0; k < waiting; ++k)
      if (!(members[k] & bit)) x[k] = -infinity();
  }

  void flush() {
    if (!waiting) return;
    for (int i = 0; i < gather_ahead; ++i) {
      s.key_rows[waiting + i] = s.key_rows[waiting - 1];
      s.value_rows[waiting + i] = s.value_rows[waiting - 1];
    }
    for (int i = 0; i < 32; ++i) prefetch(s.key_rows[i], dim * int64_t(sizeof(Value)));
    if (weighing == Weighing::centroids) {
      for (int k = waiting; k % W; ++k) log_counts[k] = 1;
      for (int k = 0; k < waiting; k += W) store(log_counts + k, log2_positive(load<vf>(log_counts + k)) * (1 / scale));
    } else {
      rows += waiting;
    }
    if (weighing == Weighing::plain) head_rows += waiting * group;
    if (weighing == Weighing::own)
      for (int k = 0; k < waiting; ++k) head_rows += __builtin_popcount(members[k] & uint32_t((uint64_t(1) << group) - 1));
    if (m.rank == Rank::tables) {
      const Block* b = sparse.blocks;
      for (int k = 0; k < (waiting + W - 1) / W * W; ++k) {
        is_candidate[k] = inverse_norm[k] = 0;
        if (k >= waiting || candidate[k] < 0) continue;
        const int64_t x = sparse.begin + candidate[k];
        if (x < b->begin) b = sparse.blocks;
        while (x >= b->end) ++b;
        const float norm = b->norms[plane_of(args, sparse, kv_head) * (b->end - b->begin) + x - b->begin];
        inverse_norm[k] = norm > 0 ? 1 / norm : 0;
        is_candidate[k] = 1;
      }
    }
    Visible see[tile_rows];
    for (int r = 0; r < tile_rows; ++r) see[r] = {0, waiting, 0, 0};
    float top[tile_rows], total[tile_rows];
    for (int64_t g = 0; g < group; g += tile_rows) {
      const int count = int(group - g < tile_rows ? group - g : tile_rows);
      attend_tile<E, D, true>(args, s, count, (const Value*)s.queries + g * dim, see, waiting, g == 0, group <= tile_rows, top,
                              total, s.partial, [&](float* scores) {
                                for (int r = 0; r < count; ++r)
                                  adjust(g + r, scores + r * split, doubtful ? s.slack + r * split : nullptr);
                              });
      for (int r = 0; r < count; ++r) {
        if (doubtful) doubt(g + r, top[r], (const Value*)s.weights + r * split, weighing == Weighing::own ? s.slack + r * split : nullptr);
        fold(s.max[g + r], s.sum[g + r], s.acc + (g + r) * dim, top[r], total[r], s.partial + r * wide, dim);
      }
    }
    waiting = 0;
  }

  // Takes the waiting rows into the sums of squares, before `fold` takes them into the others.
  void doubt(int64_t g, float top, const Value* weights, const float* slack) {
    if (top == -infinity()) return;  // nothing seen, or nothing that is a number: then the sums are none either
    float* to = s.doubts + g * (dim + 2);
    const float most = s.max[g] > top ? s.max[g] : top;
    const float keep = s.max[g] == -infinity() ? 0 : exp2_nonpositive(2 * (s.max[g] - most));
    const float add = exp2_nonpositive(2 * (top - most));
    for (int64_t d = 0; d < dim + 2; ++d) to[d] *= keep;
    for (int k = 0; k < waiting; ++k) {
      const float w = E::get(weights + k), a = w * w * (slack ? slack[k] : 1) * add;
      if (a == 0) continue;
      const Value* v = (const Value*)s.value_rows[k];
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

  // The state so far goes to slot `part` of each query head.
  void write(int part) {
    const Slots& slots = args.slots[&seq - args.sequences];
    for (int64_t g = 0; g < group; ++g) {
      const int64_t slot = slots.begin + (kv_head * group + g) * slots.count + part;
      float* to = args.partials + slot * (dim + 2);
      to[0] = s.max[g];
      to[1] = s.sum[g];
      __builtin_memcpy(to + 2, s.acc + g * dim, size_t(dim) * sizeof(float));
      if (m.certify > 0)
        __builtin_memcpy(args.doubts + slot * (dim + 2), s.doubts + g * (dim + 2), size_t(dim + 2) * sizeof(float));
    }
  }

  // ---- a sample of the rest, as large as the error asks for (vAttention) ----------------------------------

  uint64_t read_any(int64_t w) const {  // candidates 64 w .. that are read exactly
    const int64_t n_words = words(sparse.end - sparse.begin);
    const uint64_t* chosen = sparse.chosen + (m.shared ? kv_head : kv_head * group) * n_words;
    uint64_t any = 0;
    for (int64_t h = 0; h < (m.shared ? 1 : group); ++h) any |= chosen[h * n_words + w];
    return any;
  }

  void sample(Random& random, int64_t count) {  // uniformly, with replacement, from what is not read
    const int64_t n = sparse.end - sparse.begin;
    while (count > 0) {
      const int64_t c = int64_t(random.uniform() * double(n));
      if (read_any(c / 64) >> (c % 64) & 1) continue;
      add(sparse.begin + c, c, ~uint32_t(0));
      --count;
    }
    flush();
  }

  void verify() {
    const int64_t n = sparse.end - sparse.begin;
    int64_t rest = 0;
    for (int64_t w = 0; w < words(n); ++w) rest += __builtin_popcountll(~read_any(w));
    rest -= words(n) * 64 - n;
    add_all(0, 1);
    if (!rest) return;
    int64_t pilot = int64_t(m.pilot * float(rest)) + 1;
    pilot = pilot < 32 ? 32 : pilot;
    __builtin_memcpy(s.kept, s.max, size_t(group) * 4);
    __builtin_memcpy(s.kept + group, s.sum, size_t(group) * 4);
    __builtin_memcpy(s.kept + 2 * group, s.acc, size_t(group * dim) * 4);
    const float *heavy_max = s.kept, *heavy_sum = s.kept + group, *heavy_acc = s.kept + 2 * group;
    double wanted = double(rest);
    Random random(m.seed, seq.past, args.layer, kv_head);
    if (4 * pilot < rest) {
      clear();
      doubtful = true;
      sample(random, pilot);
      doubtful = false;
      wanted = 0;
      for (int64_t g = 0; g < group; ++g) {
        const float top = s.max[g] > heavy_max[g] ? s.max[g] : heavy_max[g];
        const double light = __builtin_exp2(double(s.max[g] - top)), heavy = __builtin_exp2(double(heavy_max[g] - top));
        const double count = double(pilot), mean = s.sum[g] * light / count;
        const float* doubts = s.doubts + g * (dim + 2);
        double norm = 0, mean_square = 0;
        for (int64_t d = 0; d < dim; ++d) {
          const double a = s.acc[g * dim + d] * light / count, x = heavy_acc[g * dim + d] * heavy + double(rest) * a;
          norm += x * x;
          mean_square += a * a;
        }
        const double spread_sum = (doubts[0] * light * light / count - mean * mean) * count / (count - 1);
        const double spread_acc = (doubts[1] * light * light / count - mean_square) * count / (count - 1);
        const double total = heavy_sum[g] * heavy + double(rest) * mean, all = double(rest) * double(rest) * m.confidence;
        const double for_sum = spread_sum > 0 ? all * spread_sum / (total * total) : 0;
        const double for_acc = spread_acc > 0 ? (norm > 0 ? all * spread_acc / norm : double(rest)) : 0;
        wanted = for_sum > wanted ? for_sum : wanted;
        wanted = for_acc > wanted ? for_acc : wanted;
      }
    }
    float factor = 1;
    if (wanted >= 0.5 * double(rest)) {  // cheaper, and exact, to read all of it
      clear();
      for (int64_t w = 0; w < words(n); ++w)
        for (uint64_t bits = ~read_any(w); bits; bits &= bits - 1) {
          const int64_t c = w * 64 + __builtin_ctzll(bits);
          if (c < n) add(sparse.begin + c, c, ~uint32_t(0));
        }
      flush();
      __atomic_fetch_add(&sparse.counters->escalated, 1, __ATOMIC_RELAXED);
    } else {
      const int64_t size = int64_t(wanted) + 1 > pilot ? int64_t(wanted) + 1 : pilot;
      sample(random, size - pilot);
      factor = float(double(rest) / double(size));
    }
    __atomic_fetch_add(&sparse.counters->checked, 1, __ATOMIC_RELAXED);
    for (int64_t g = 0; g < group; ++g) {
      for (int64_t d = 0; d < dim; ++d) s.acc[g * dim + d] *= factor;
      s.sum[g] *= factor;
      fold(s.max[g], s.sum[g], s.acc + g * dim, heavy_max[g], heavy_sum[g], heavy_acc + g * dim, dim);
    }
  }

  // ---- what is not read: centroids less the rows that are ----------------------------------------------------------

  // Centroids are rows that count as often as rows of their cluster are left. Their means stay those of the whole cluster:
  // taking what was read out of them costs a second reading of it and gains nothing (docs/results.md).
  void tail() {
    const int64_t plane = plane_of(args, sparse, kv_head), both = 2 * dim;
    weighing = Weighing::centroids;
    const int32_t* rows = rows_of(sparse, kv_head);
    const int32_t* end = rows + 1 + *rows;
    ++rows;
    for (int i = 0; i < sparse.block_count; ++i) {
      const Block& b = sparse.blocks[i];
      const int64_t n = b.end - b.begin, first = b.begin - sparse.begin;
      const Value* means = (const Value*)b.means + plane * b.clusters * both;
      const uint16_t* assigned = b.assigned + plane * n;
      __builtin_memcpy(s.left, b.counts + plane * b.clusters, size_t(b.clusters) * sizeof(int32_t));
      for (; rows < end && *rows < first + n; ++rows) --s.left[assigned[*rows - first]];
      for (int64_t c = 0; c < b.clusters; ++c) {
        if (s.left[c] <= 0) continue;
        s.key_rows[waiting] = (const char*)(means + c * both);
        s.value_rows[waiting] = (const char*)(means + c * both + dim);
        log_counts[waiting] = float(s.left[c]);  // until flush
        if (++waiting == split) flush();
      }
    }
    flush();
  }
};

template <class E, int D>
void gather_item(const Attention& args, const SparseItem& item, Scratch& s) {
  const Sequence& seq = args.sequences[item.sequence];
  Gather<E, D> gather(args, seq, item.head, s);
  if (item.part == gather_parts)
    gather.tail();
  else if (gather.m.take == Take::verify)
    gather.verify();
  else
    gather.add_all(item.part, gather_parts);
  gather.write(item.part == gather_parts ? gather_parts : item.part);
  Counters& counters = *seq.sparse->counters;
  if (item.part == 0) __atomic_fetch_add(&counters.readings, 1, __ATOMIC_RELAXED);
  __atomic_fetch_add(&counters.rows, gather.rows, __ATOMIC_RELAXED);
  __atomic_fetch_add(&counters.head_rows, gather.head_rows, __ATOMIC_RELAXED);
}

THRESHER_ISA_END
