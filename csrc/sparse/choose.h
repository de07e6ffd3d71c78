// Steps `choose` and `list`: the best candidates of each query head are marked in its bitmap, and those of a group listed.
#pragma once
#include "api/carver.h"
#include "api/kernels.h"
#include "isa/largest.h"
#include "isa/namespace.h"
#include "isa/random.h"
#include "isa/softmax.h"
#include "sparse/layout.h"
#include "sparse/signs.h"

THRESHER_ISA_BEGIN

// The best clusters until they hold `budget` tokens, at least one.
inline void choose_clusters(const Attention& args, const Sparse& sparse, int64_t kv_head, const int32_t* scores, uint8_t* wanted,
                            uint64_t* chosen) {
  const int64_t plane = plane_of(args, sparse, kv_head);
  int64_t low = -(int64_t(1) << 31), high = low;
  auto tokens_from = [&](int64_t t) {
    int64_t total = 0, at = 0;
    for (int i = 0; i < sparse.block_count; ++i) {
      const Block& b = sparse.blocks[i];
      const int32_t* counts = b.counts + plane * b.clusters;
      for (int64_t c = 0; c < b.clusters; ++c, ++at) total += scores[at] >= t ? counts[c] : 0;
    }
    return total;
  };
  for (int64_t at = 0; at < sparse.ranked; ++at) high = scores[at] > high ? scores[at] : high;
  while (low < high) {  // the least t whose clusters still fit
    const int64_t middle = low + (high - low) / 2;
    if (tokens_from(middle) <= sparse.budget)
      high = middle;
    else
      low = middle + 1;
  }
  int64_t at = 0;
  for (int i = 0; i < sparse.block_count; ++i) {
    const Block& b = sparse.blocks[i];
    const int64_t n = b.end - b.begin;
    const uint16_t* assigned = b.assigned + plane * n;
    for (int64_t c = 0; c < b.clusters; ++c, ++at) wanted[c] = scores[at] >= low;
    uint64_t* to = chosen + (b.begin - sparse.begin) / 64;
    for (int64_t w = 0; w < n / 64; ++w) {
      uint64_t bits = 0;
      for (int j = 0; j < 64; ++j) bits |= uint64_t(wanted[assigned[w * 64 + j]]) << j;
      to[w] = bits;
    }
  }
}

// `budget` independent draws in proportion to exp(score); each drawn token's score becomes
// log2(its draws / budget * sum of exp(score)). The uniform numbers come sorted, so one sweep is enough.
inline void choose_draws(const Attention& args, const Sequence& seq, int64_t head, float* scores, int64_t n, uint64_t* chosen) {
  const Sparse& sparse = *seq.sparse;
  const float scale = args.scale * log2_e;
  __builtin_memset(chosen, 0, size_t(8 * words(n)));
  float top = -infinity();
  for (int64_t i = 0; i < n; ++i) top = scores[i] * scale > top ? scores[i] * scale : top;
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += __builtin_exp2(double(scores[i] * scale - top));
  Random random(sparse.method->seed, seq.past, args.layer, head);
  int64_t left = sparse.budget;
  double above = 1, cumulated = 0;
  auto next = [&] {  // the smallest of `left` uniform numbers above the last
    above *= __builtin_pow(1 - random.uniform(), 1.0 / double(left));
    return (1 - above) * total;
  };
  double number = left > 0 ? next() : 0;
  for (int64_t i = 0; i < n && left > 0; ++i) {
    cumulated += __builtin_exp2(double(scores[i] * scale - top));
    int64_t taken = 0;
    while (left > 0 && (number < cumulated || i == n - 1)) {
      ++taken;
      if (--left > 0) number = next();
    }
    if (!taken) continue;
    scores[i] = float(__builtin_log2(double(taken) / double(sparse.budget) * total)) + top;
    chosen[i / 64] |= uint64_t(1) << (i % 64);
  }
}

// Spreads bit u of `units` over tokens u * unit .. of `chosen`.
inline void spread(const uint64_t* units, int64_t count, int unit, uint64_t* chosen) {
  const uint64_t ones = unit == 64 ? ~uint64_t(0) : (uint64_t(1) << unit) - 1;
  const int per_word = 64 / unit;
  for (int64_t w = 0; w < count / per_word; ++w) {
    uint64_t bits = 0;
    for (int j = 0; j < per_word; ++j) {
      const int64_t u = w * per_word + j;
      if (units[u / 64] >> (u % 64) & 1) bits |= ones << (j * unit);
    }
    chosen[w] = bits;
  }
}

// The best of what reached the bound; among equals the first.
inline void choose_signs(const Attention& args, const Sparse& sparse, int64_t head, int16_t* scores, uint64_t* chosen) {
  const int64_t n = sparse.ranked, k = sparse.budget < n ? sparse.budget : n;
  auto collect = [&] {
    int64_t count = 0;
    for (int64_t at = 0; at < n; at += scan_tokens) {
      const Found& found = found_of(sparse, head, at);
      for (int32_t i = 0; i < found.count; ++i) scores[count++] = int16_t(found.entries[i] >> 16);
    }
    return count;
  };
  int64_t count = collect();
  if (count < k) {  // the sample was not like the rest
    sign_query(sparse, head)->bound = lowest<int16_t>();
    for (int64_t at = 0; at < n; at += scan_tokens) scan_piece<1>(args, sparse, head, at);
    count = collect();
  }
  __builtin_memset(chosen, 0, size_t(8 * words(n)));
  if (k <= 0) return;
  const int64_t padded_count = (count + 63) / 64 * 64;
  for (int64_t i = count; i < padded_count; ++i) scores[i] = lowest<int16_t>();
  const int16_t least = threshold(scores, padded_count, k);
  int64_t equals = k - (least == int16_t(~lowest<int16_t>()) ? 0 : count_from(scores, padded_count, int16_t(least + 1)));
  for (int64_t at = 0; at < n; at += scan_tokens) {
    const Found& found = found_of(sparse, head, at);
    for (int32_t i = 0; i < found.count; ++i) {  // no branches: whether a score is taken is not to be foreseen
      const int32_t entry = found.entries[i], score = entry >> 16;
      const bool equal = score == least, taken = bool(int(score > least) | (int(equal) & int(equals > 0)));
      const int64_t c = at + (entry & 0xffff);
      equals -= equal;
      chosen[c / 64] |= uint64_t(taken) << (c % 64);
    }
  }
}

// What the ways of choosing work on; each has one.
struct ChooseScratch {
  int16_t* sign_scores;  // [ranked, padded]: signs, of what was found
  uint8_t* wanted;       // [clusters of a block]
  int32_t* top_scores;   // [ranked, padded]: of what may be among the best
  uint64_t* unit_marks;  // [ranked / 64]: bits, if a ranked row is more than one token

  ChooseScratch(const Sparse& sparse, Carver& c) {
    const Method& m = *sparse.method;
    const bool signs = m.rank == Rank::signs, clusters = m.rank == Rank::clusters;
    const bool top = !signs && !clusters && m.take != Take::draw;
    c.take(sign_scores, signs ? padded_ranks(sparse.ranked) * 2 : 0);
    c.take(wanted, clusters ? most_clusters : 0);
    c.take(top_scores, top ? padded_ranks(sparse.ranked) * 4 : 0);
    c.take(unit_marks, top && m.unit > 1 ? padded_ranks(sparse.ranked) / 8 : 0);
  }
};

inline void choose_item(const Attention& args, const SparseItem& item, char* memory) {
  const Sequence& seq = args.sequences[item.sequence];
  const Sparse& sparse = *seq.sparse;
  const Method& m = *sparse.method;
  const int64_t n = sparse.end - sparse.begin, ranks = padded_ranks(sparse.ranked);
  uint64_t* chosen = sparse.chosen + item.chooser * words(n);
  int32_t* scores = sparse.scores + item.chooser * ranks;
  Carver carver{memory};
  const ChooseScratch s(sparse, carver);
  if (m.rank == Rank::signs) {
    choose_signs(args, sparse, item.chooser, s.sign_scores, chosen);
  } else if (m.rank == Rank::clusters) {
    choose_clusters(args, sparse, item.kv_head, scores, s.wanted, chosen);
  } else if (m.take == Take::draw) {
    for (int64_t i = 0; i < n; ++i) ((float*)scores)[i] = unsortable(scores[i]);
    choose_draws(args, seq, item.chooser, (float*)scores, n, chosen);
  } else if (m.unit == 1) {
    mark_top(scores, n, sparse.budget, chosen, s.top_scores);
  } else {
    mark_top(scores, sparse.ranked, (sparse.budget + m.unit - 1) / m.unit, s.unit_marks, s.top_scores);
    spread(s.unit_marks, sparse.ranked, m.unit, chosen);
  }
}

// Writes the places of the bits of a word, `base` being that of the first, and up to 15 numbers more; returns where the next go.
ALWAYS_INLINE int32_t* places_of(uint64_t bits, int32_t base, int32_t* to) {
#if defined(__AVX512BW__)
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int i = 0; i < 64; i += 16) {
    const uint32_t part = uint32_t(bits >> i & 0xffff);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(__mmask16(part), _mm512_add_epi32(lanes, _mm512_set1_epi32(base + i))));
    to += __builtin_popcount(part);
  }
#else
  for (; bits; bits &= bits - 1) *to++ = base + __builtin_ctzll(bits);
#endif
  return to;
}

// What any query head of a KV head has chosen, in order, and which of them have.
inline void list_item(const Attention& args, const SparseItem& item) {
  const Sparse& sparse = *args.sequences[item.sequence].sparse;
  const Method& m = *sparse.method;
  const int64_t n_words = words(sparse.end - sparse.begin), heads = choices(args, m);
  const uint64_t* chosen = sparse.chosen + item.kv_head * heads * n_words;
  int32_t *listed = listed_of(sparse, item.kv_head), *to = listed;
  for (int64_t w = 0; w < n_words; ++w) {
    uint64_t any = 0;
    for (int64_t h = 0; h < heads; ++h) any |= chosen[h * n_words + w];
    to = places_of(any, int32_t(w * 64), to);
  }
  const int32_t count = int32_t(to - listed);
  sparse.listed_count[item.kv_head] = count;
  if (m.grouping != Grouping::own) return;
  uint32_t* members = members_of(sparse, item.kv_head);
  for (int32_t i = 0; i < count; ++i) {
    const int64_t c = listed[i];
    members[i] = 0;
    for (int64_t h = 0; h < heads; ++h) members[i] |= uint32_t(chosen[h * n_words + c / 64] >> (c % 64) & 1) << h;
  }
}

THRESHER_ISA_END
