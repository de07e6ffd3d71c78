// A uniform sample of the rows that are not read exactly, as large as the error asks for (vAttention).
#pragma once
#include "api/carver.h"
#include "api/kernels.h"
#include "isa/namespace.h"
#include "isa/random.h"
#include "isa/softmax.h"
#include "sparse/gather.h"
#include "sparse/group.h"
#include "sparse/layout.h"

THRESHER_ISA_BEGIN

// The softmax over what is read exactly.
struct VerifyScratch {
  float *max, *sum;  // [group]
  float* acc;        // [group, head_dim]

  VerifyScratch(const Attention& args, Carver& c) {
    c.take(max, group_of(args) * 4);
    c.take(sum, group_of(args) * 4);
    c.take(acc, group_of(args) * args.head_dim * 4);
  }
};

// Candidates 64 w .. that are read exactly, as bits.
template <class E, int D>
uint64_t read_exactly(const Group<E, D>& group, int64_t w) {
  const int64_t n_words = words(group.sparse.end - group.sparse.begin), heads = choices(group.args, group.m);
  const uint64_t* chosen = group.sparse.chosen + group.kv_head * heads * n_words;
  uint64_t any = 0;
  for (int64_t h = 0; h < heads; ++h) any |= chosen[h * n_words + w];
  return any;
}

// Adds rows uniformly, with replacement, of those that are not read exactly.
template <class E, int D>
void add_sample(Gather<E, D>& gather, Random& random, int64_t count) {
  const Sparse& sparse = gather.group.sparse;
  const int64_t n = sparse.end - sparse.begin;
  while (count > 0) {
    const int64_t c = int64_t(random.uniform() * double(n));
    if (read_exactly(gather.group, c / 64) >> (c % 64) & 1) continue;
    gather.add(sparse.begin + c, c, all_heads);
    --count;
  }
  gather.flush();
}

// How large a sample of the `rest` rows must be, by one of `pilot` rows that is in the group's softmax and variances; `exact` is
// the softmax over what is read exactly.
template <class E, int D>
double wanted_sample(const Group<E, D>& group, const VerifyScratch& exact, int64_t rest, int64_t pilot) {
  const GroupScratch& s = group.s;
  double wanted = 0;
  for (int64_t g = 0; g < group.heads; ++g) {
    const float top = s.max[g] > exact.max[g] ? s.max[g] : exact.max[g];
    const double light = __builtin_exp2(double(s.max[g] - top)), heavy = __builtin_exp2(double(exact.max[g] - top));
    const double count = double(pilot), mean = s.sum[g] * light / count;
    const float* variances = s.variances + g * (group.dim + 2);
    double norm = 0, mean_square = 0;
    for (int64_t d = 0; d < group.dim; ++d) {
      const double a = s.acc[g * group.dim + d] * light / count, x = exact.acc[g * group.dim + d] * heavy + double(rest) * a;
      norm += x * x;
      mean_square += a * a;
    }
    const double spread_sum = (variances[0] * light * light / count - mean * mean) * count / (count - 1);
    const double spread_acc = (variances[1] * light * light / count - mean_square) * count / (count - 1);
    const double total = exact.sum[g] * heavy + double(rest) * mean, all = double(rest) * double(rest) * group.m.confidence;
    const double for_sum = spread_sum > 0 ? all * spread_sum / (total * total) : 0;
    const double for_acc = spread_acc > 0 ? (norm > 0 ? all * spread_acc / norm : double(rest)) : 0;
    wanted = for_sum > wanted ? for_sum : wanted;
    wanted = for_acc > wanted ? for_acc : wanted;
  }
  return wanted;
}

template <class E, int D>
void gather_verified(Gather<E, D>& gather, const VerifyScratch& exact) {
  Group<E, D>& group = gather.group;
  GroupScratch& s = group.s;
  const Sparse& sparse = group.sparse;
  const int64_t n = sparse.end - sparse.begin, heads = group.heads, dim = group.dim;
  int64_t rest = 0;
  for (int64_t w = 0; w < words(n); ++w) rest += __builtin_popcountll(~read_exactly(group, w));
  rest -= words(n) * 64 - n;
  gather.add_all(0, 1);
  if (!rest) return;
  int64_t pilot = int64_t(group.m.pilot * float(rest)) + 1;
  pilot = pilot < 32 ? 32 : pilot;
  __builtin_memcpy(exact.max, s.max, size_t(heads) * 4);
  __builtin_memcpy(exact.sum, s.sum, size_t(heads) * 4);
  __builtin_memcpy(exact.acc, s.acc, size_t(heads * dim) * 4);
  double wanted = double(rest);
  Random random(group.m.seed, group.seq.past, group.args.layer, group.kv_head);
  if (4 * pilot < rest) {
    group.clear();
    gather.estimate = true;
    add_sample(gather, random, pilot);
    gather.estimate = false;
    wanted = wanted_sample(group, exact, rest, pilot);
  }
  float factor = 1;
  if (wanted >= 0.5 * double(rest)) {  // cheaper, and exact, to read all of it
    group.clear();
    for (int64_t w = 0; w < words(n); ++w)
      for (uint64_t bits = ~read_exactly(group, w); bits; bits &= bits - 1) {
        const int64_t c = w * 64 + __builtin_ctzll(bits);
        if (c < n) gather.add(sparse.begin + c, c, all_heads);
      }
    gather.flush();
    __atomic_fetch_add(&sparse.counters->fallbacks, 1, __ATOMIC_RELAXED);
  } else {
    const int64_t size = int64_t(wanted) + 1 > pilot ? int64_t(wanted) + 1 : pilot;
    add_sample(gather, random, size - pilot);
    factor = float(double(rest) / double(size));
  }
  __atomic_fetch_add(&sparse.counters->estimates, 1, __ATOMIC_RELAXED);
  for (int64_t g = 0; g < heads; ++g) {
    for (int64_t d = 0; d < dim; ++d) s.acc[g * dim + d] *= factor;
    s.sum[g] *= factor;
    fold(s.max[g], s.sum[g], s.acc + g * dim, exact.max[g], exact.sum[g], exact.acc + g * dim, dim);
  }
}

THRESHER_ISA_END
