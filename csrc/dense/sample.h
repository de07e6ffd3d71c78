// From logits to tokens: edits of single logits, temperature, top-k, top-p, min-p, one draw.
//
// Nothing is sorted. The largest of every 64 logits, found with the largest of all, gives bounds below which nothing
// can be kept; what passes is copied together, and thresholds on it are found by bisection.
#pragma once
#include "api/carver.h"
#include "api/kernels.h"
#include "host/pool.h"
#include "isa/largest.h"
#include "isa/namespace.h"
#include "isa/softmax.h"
#include "isa/vector.h"

THRESHER_ISA_BEGIN

constexpr int64_t sample_chunk = 64;

inline int64_t sample_padded(int64_t vocab) { return (vocab + sample_chunk - 1) / sample_chunk * sample_chunk + sample_chunk; }

// Working memory of one thread; arrays of padded(vocab) but for the chunks'.
struct SampleScratch {
  float *edited, *weights, *chunk_max, *chunk_sum;
  int32_t *keys, *ids;

  SampleScratch(int64_t vocab, Carver& c) {
    const int64_t padded = sample_padded(vocab), chunks = sample_padded(padded / sample_chunk);
    c.take(edited, padded * int64_t(sizeof(float)));
    c.take(weights, padded * int64_t(sizeof(float)));
    c.take(chunk_max, chunks * int64_t(sizeof(float)));
    c.take(chunk_sum, chunks * int64_t(sizeof(float)));
    c.take(keys, padded * int64_t(sizeof(int32_t)));
    c.take(ids, padded * int64_t(sizeof(int32_t)));
  }
};

int64_t sample_scratch_bytes(int64_t vocab) { return bytes_of<SampleScratch>(vocab); }

// Chunk c of x as W-wide vectors for `each(vector)`, padded with -inf.
template <class F>
inline void for_chunk(const float* x, int64_t vocab, int64_t c, F each) {
  const int64_t begin = c * sample_chunk;
  if (begin + sample_chunk <= vocab) {
    for (int64_t i = 0; i < sample_chunk; i += W) each(load<vf>(x + begin + i));
    return;
  }
  float last[sample_chunk];
  for (int64_t i = 0; i < sample_chunk; ++i) last[i] = begin + i < vocab ? x[begin + i] : -__builtin_inff();
  for (int64_t i = 0; i < sample_chunk; i += W) each(load<vf>(last + i));
}

// The largest of each chunk and of all; NaN if any logit is.
inline float sample_maxima(const float* x, int64_t vocab, float* chunk_max) {
  const int64_t chunks = (vocab + sample_chunk - 1) / sample_chunk;
  float most = -__builtin_inff();
  vi bad = {};
  for (int64_t c = 0; c < chunks; ++c) {
    vf best = splat(-__builtin_inff());
    for_chunk(x, vocab, c, [&](vf v) {
      bad |= (vi)(v != v);
      best = v > best ? v : best;
    });
    chunk_max[c] = max(best);
    most = chunk_max[c] > most ? chunk_max[c] : most;
  }
  int32_t any = 0;
  for (int j = 0; j < W; ++j) any |= bad[j];
  return any ? __builtin_nanf("") : most;
}

// exp((x - most) / temperature), as a power of 2: the largest weighs 1.
struct Weigh {
  float most, scale;
  Weigh(float most, double temperature) : most(most), scale(float(1.4426950408889634 / temperature)) {}
  vf operator()(vf x) const { return exp2_nonpositive((x - most) * scale); }
};

// Sums of the weights of each chunk (if asked for) and of all.
inline double sum_weights(const float* x, int64_t vocab, Weigh weigh, float* chunk_sum) {
  const int64_t chunks = (vocab + sample_chunk - 1) / sample_chunk;
  double total = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    vf chunk = {};
    for_chunk(x, vocab, c, [&](vf v) { chunk += weigh(v); });
    const float s = sum(chunk);
    if (chunk_sum) chunk_sum[c] = s;
    total += s;
  }
  return total;
}

// Integers in the order of the floats; -0 and 0 are one.
inline int32_t order_key(float x) {
  x += 0.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// The k-th largest of n values, as a key; k <= n. `keys` has room for n and padding.
inline int32_t kth_key(const float* x, int64_t n, int64_t k, int32_t* keys) {
  const int64_t padded = (n + 63) / 64 * 64;
  for (int64_t i = 0; i < n; ++i) keys[i] = order_key(x[i]);
  for (int64_t i = n; i < padded; ++i) keys[i] = lowest<int32_t>();
  return threshold(keys, padded, k);
}

// Sum of the weights >= t; n a multiple of W.
inline double mass_from(const float* weights, int64_t n, float t) {
  double total = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t stop = i + 64 * W < n ? i + 64 * W : n;
    vf part = {};
    for (; i < stop; i += W) {
      const vf w = load<vf>(weights + i);
      part += w >= t ? w : vf{};
    }
    total += sum(part);
  }
  return total;
}

// Keeps of `count` weights those that have less than `wanted` of mass before them, counted from the largest, the first
// among equals first; the others become 0. There are zeros up to a multiple of W behind them.
inline void keep_nucleus(float* weights, int64_t count, double wanted) {
  const int64_t padded = (count + W - 1) / W * W;
  auto weight_of = [](int32_t bits) {
    float w;
    __builtin_memcpy(&w, &bits, 4);
    return w;
  };
  int32_t low = 0, high = 0x3f800000;  // weights are in [0, 1]; as integers they have the same order
  while (low < high) {
    const int32_t middle = low + (high - low + 1) / 2;
    if (mass_from(weights, padded, weight_of(middle)) >= wanted)
      low = middle;
    else
      high = middle - 1;
  }
  const float least = weight_of(low);
  double mass = mass_from(weights, padded, weight_of(low + 1));
  for (int64_t i = 0; i < count; ++i) {
    if (weights[i] > least) continue;
    const bool kept = weights[i] == least && mass < wanted;
    mass += kept ? least : 0;
    weights[i] = kept ? weights[i] : 0;
  }
}

// The first of n weights (their total is not 0) whose cumulated weight is above `target`; target < the sum, but for rounding.
inline int64_t find_weight(const float* weights, int64_t n, double target) {
  double cumulated = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (weights[i] == 0) continue;
    cumulated += weights[i];
    last = i;
    if (cumulated > target) break;
  }
  return last;
}

inline int32_t draw_from_all(const float* x, int64_t vocab, Weigh weigh, double uniform, SampleScratch& s) {
  double target = uniform * sum_weights(x, vocab, weigh, s.chunk_sum);
  const int64_t chunks = (vocab + sample_chunk - 1) / sample_chunk;
  int64_t chosen = 0;
  double before = 0, cumulated = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    if (s.chunk_sum[c] == 0) continue;
    before = cumulated;
    chosen = c;
    cumulated += s.chunk_sum[c];
    if (cumulated > target) break;
  }
  float* at = s.weights;
  for_chunk(x, vocab, chosen, [&](vf v) {
    store(at, weigh(v));
    at += W;
  });
  return int32_t(chosen * sample_chunk + find_weight(s.weights, sample_chunk, target - before));
}

inline float* weights_of(const Sample& a, int64_t row) { return a.wants_weights[row] ? a.weights + row * a.vocab : nullptr; }

inline int32_t draw_from_kept(const Sample& a, int64_t row, const float* x, float most, Weigh weigh, SampleScratch& s) {
  const int64_t vocab = a.vocab, chunks = (vocab + sample_chunk - 1) / sample_chunk, k = a.top_k[row];
  const double temperature = a.temperature[row], top_p = a.top_p[row], min_p = a.min_p[row];
  const bool by_count = k > 0 && k < vocab, by_mass = top_p < 1;
  // What certainly falls: bounds on logits, a little low, for the exact tests are on weights.
  auto logit_of = [&](double weight) { return float(double(most) + temperature * (__builtin_log(weight) - 0.01)); };
  float bound = -__builtin_inff();
  double total = 0;
  if (by_count) {
    if (k <= chunks) {  // k chunks reach their k-th largest maximum, so k logits do
      const int32_t least = kth_key(s.chunk_max, chunks, k, s.keys);
      const int32_t bits = least ^ ((least >> 31) & 0x7fffffff);
      __builtin_memcpy(&bound, &bits, 4);
    }
  } else {
    if (by_mass) {  // even all of them together are not more than 1 - top_p
      total = sum_weights(x, vocab, weigh, nullptr);
      bound = logit_of((1 - top_p) * total / double(vocab));
    }
    if (min_p > 0) bound = __builtin_fmaxf(bound, logit_of(min_p));
  }
  int64_t count = 0;
  float* kept = s.weights;
  for (int64_t c = 0; c < chunks; ++c) {
    if (s.chunk_max[c] < bound) continue;
    const int64_t end = (c + 1) * sample_chunk < vocab ? (c + 1) * sample_chunk : vocab;
    for (int64_t i = c * sample_chunk; i < end; ++i) {
      kept[count] = x[i];
      s.ids[count] = int32_t(i);
      count += x[i] >= bound;
    }
  }
  if (by_count) {
    const int32_t least = kth_key(kept, count, k, s.keys);
    int64_t n = 0;
    for (int64_t i = 0; i < count; ++i) {
      kept[n] = kept[i];
      s.ids[n] = s.ids[i];
      n += s.keys[i] >= least;
    }
    count = n;
  }
  for (int64_t i = count; i < (count + W - 1) / W * W; ++i) kept[i] = -__builtin_inff();
  for (int64_t i = 0; i < count; i += W) store(kept + i, weigh(load<vf>(kept + i)));
  const int64_t padded = (count + W - 1) / W * W;
  if (by_mass) keep_nucleus(kept, count, top_p * (by_count ? mass_from(kept, padded, 0) : total));
  if (min_p > 0)
    for (int64_t i = 0; i < count; ++i) kept[i] = kept[i] < min_p ? 0 : kept[i];
  double mass = 0;
  for (int64_t i = 0; i < count; ++i) mass += kept[i];
  if (float* to = weights_of(a, row)) {
    __builtin_memset(to, 0, size_t(vocab) * sizeof(float));
    for (int64_t i = 0; i < count; ++i) to[s.ids[i]] = kept[i];
  }
  return s.ids[find_weight(kept, count, a.uniform[row] * mass)];
}

inline int32_t sample_row(const Sample& a, int64_t row, SampleScratch& s) {
  const float* x = a.logits + row * a.stride;
  if (a.wants_logsumexp[row]) {
    const float most = sample_maxima(x, a.vocab, s.chunk_max);
    a.logsumexp[row] = double(most) + __builtin_log(sum_weights(x, a.vocab, Weigh(most, 1), nullptr));
  }
  if (a.first_edit[row] < a.first_edit[row + 1]) {
    __builtin_memcpy(s.edited, x, size_t(a.vocab) * sizeof(float));
    x = s.edited;
    for (int64_t i = a.first_edit[row]; i < a.first_edit[row + 1]; ++i) {
      float& logit = s.edited[a.edit_ids[i]];
      logit = (logit < 0 ? logit * a.edit_factors[i] : logit / a.edit_factors[i]) + a.edit_offsets[i];
    }
  }
  const float most = sample_maxima(x, a.vocab, s.chunk_max);
  if (!(__builtin_fabsf(most) <= 3.402823466e38f)) return -1;
  if (a.temperature[row] == 0) {
    int64_t i = 0;
    while (s.chunk_max[i / sample_chunk] != most) i += sample_chunk;
    while (x[i] != most) ++i;
    if (float* to = weights_of(a, row)) {
      __builtin_memset(to, 0, size_t(a.vocab) * sizeof(float));
      to[i] = 1;
    }
    return int32_t(i);
  }
  const Weigh weigh(most, a.temperature[row]);
  const bool all = (a.top_k[row] <= 0 || a.top_k[row] >= a.vocab) && a.top_p[row] >= 1 && a.min_p[row] <= 0;
  if (!all) return draw_from_kept(a, row, x, most, weigh, s);
  if (float* to = weights_of(a, row)) {
    int64_t i = 0;
    for (; i + W <= a.vocab; i += W) store(to + i, weigh(load<vf>(x + i)));
    for (; i < a.vocab; ++i) to[i] = weigh(splat(x[i]))[0];
  }
  return draw_from_all(x, a.vocab, weigh, a.uniform[row], s);
}

void sample(const Sample& args) {
  const int64_t bytes = sample_scratch_bytes(args.vocab);
  parallel_for(args.rows, 1, args.threads, [&](int64_t begin, int64_t end, int thread) {
    Carver carver{args.scratch + thread * bytes};
    SampleScratch scratch(args.vocab, carver);
    for (int64_t row = begin; row < end; ++row) args.tokens[row] = sample_row(args, row, scratch);
  });
}

THRESHER_ISA_END
