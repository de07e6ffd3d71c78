// The third step: the best candidates of each query head are marked in its bitmap. Included inside the namespace of one
// instruction set.
#pragma once

template <class T>
struct Lanes;
template <>
struct Lanes<int16_t> {
  typedef int16_t V __attribute__((vector_size(64)));
};
template <>
struct Lanes<int32_t> {
  typedef int32_t V __attribute__((vector_size(64)));
};

// How many of n (a multiple of 64) are >= t.
template <class T>
int64_t count_from(const T* x, int64_t n, T t) {
  typedef typename Lanes<T>::V V;
  constexpr int lanes = 64 / sizeof(T);
  V count = {};
  const V limit = t - V{};
  for (int64_t i = 0; i < n; i += lanes) count -= (V)(load<V>(x + i) >= limit);
  int64_t total = 0;
  for (int j = 0; j < lanes; ++j) total += count[j];
  return total;
}

// Bit i: x[i] >= t, of 64. Masks are joined as masks: GCC 12 may spill a 32-bit one and read it back as 64 bits when it is
// widened instead, and then the upper half is whatever lay there.
inline uint64_t mask_from(const int16_t* x, int16_t t) {
#if defined(__AVX512BW__)
  const __m512i limit = _mm512_set1_epi16(t);
  return _mm512_kunpackd(_mm512_cmpge_epi16_mask(_mm512_loadu_si512(x + 32), limit),
                         _mm512_cmpge_epi16_mask(_mm512_loadu_si512(x), limit));
#else
  uint64_t bits = 0;
  for (int i = 0; i < 64; ++i) bits |= uint64_t(x[i] >= t) << i;
  return bits;
#endif
}
inline uint64_t mask_from(const int32_t* x, int32_t t) {
#if defined(__AVX512BW__)
  const __m512i limit = _mm512_set1_epi32(t);
  auto reached = [&](int at) { return _mm512_cmpge_epi32_mask(_mm512_loadu_si512(x + at), limit); };
  return _mm512_kunpackd(_mm512_kunpackw(reached(48), reached(32)), _mm512_kunpackw(reached(16), reached(0)));
#else
  uint64_t bits = 0;
  for (int i = 0; i < 64; ++i) bits |= uint64_t(x[i] >= t) << i;
  return bits;
#endif
}

template <class T>
constexpr T lowest() {
  return T(int64_t(1) << (8 * sizeof(T) - 1));
}

// The largest t that at least k of n values reach; n a multiple of 64.
template <class T>
T threshold(const T* x, int64_t n, int64_t k) {
  typedef typename Lanes<T>::V V;
  constexpr int lanes = 64 / sizeof(T);
  V least = load<V>(x), most = least;
  for (int64_t i = lanes; i < n; i += lanes) {
    const V v = load<V>(x + i);
    least = v < least ? v : least;
    most = v > most ? v : most;
  }
  int64_t low = least[0], high = most[0];
  for (int j = 1; j < lanes; ++j) {
    low = least[j] < low ? least[j] : low;
    high = most[j] > high ? most[j] : high;
  }
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (count_from(x, n, T(middle)) >= k)
      low = middle;
    else
      high = middle - 1;
  }
  return T(low);
}

// Values >= t, compacted and padded to a multiple of 64 with the lowest; returns how many there are.
template <class T>
int64_t compact(const T* x, int64_t n, T t, T* out) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 64)
    for (uint64_t bits = mask_from(x + i, t); bits; bits &= bits - 1) out[count++] = x[i + __builtin_ctzll(bits)];
  for (int64_t i = count; i < (count + 63) / 64 * 64; ++i) out[i] = lowest<T>();
  return count;
}

// Marks the k largest of n values; among equals the first. A sample finds a bound that leaves few to look at closely.
template <class T>
void mark_top(T* x, int64_t n, int64_t k, uint64_t* marks, T* buffer) {
  const int64_t padded_n = (n + 63) / 64 * 64;
  for (int64_t i = n; i < padded_n; ++i) x[i] = lowest<T>();
  if (k >= n || k <= 0) {
    for (int64_t w = 0; w < padded_n / 64; ++w) marks[w] = k <= 0 ? 0 : ~uint64_t(0);
    if (k > 0 && n % 64) marks[n / 64] = (uint64_t(1) << (n % 64)) - 1;
    return;
  }
  T bound = lowest<T>();
  constexpr int64_t stride = 16 * 64;
  if (n >= 4 * stride) {
    int64_t sampled = 0;
    for (int64_t i = 0; i + 64 <= n; i += stride, sampled += 64) __builtin_memcpy(buffer + sampled, x + i, 64 * sizeof(T));
    const double expected = double(k) * double(sampled) / double(n);
    const int64_t rank = int64_t(expected + 3 * __builtin_sqrt(expected) + 4);
    if (rank < sampled) bound = threshold(buffer, sampled, rank);
  }
  int64_t count = compact(x, padded_n, bound, buffer);
  if (count < k) count = compact(x, padded_n, lowest<T>(), buffer);
  const T least = threshold(buffer, (count + 63) / 64 * 64, k);
  const int64_t reaching = count_from(buffer, (count + 63) / 64 * 64, least);
  int64_t surplus = reaching - k;  // equals that are not wanted: the last ones
  for (int64_t w = padded_n / 64 - 1; w >= 0; --w) {
    uint64_t bits = mask_from(x + w * 64, least);
    if (surplus > 0) {
      uint64_t equal = least == T(~lowest<T>()) ? bits : bits & ~mask_from(x + w * 64, T(least + 1));
      for (; surplus > 0 && equal; --surplus) {
        const uint64_t last = uint64_t(1) << (63 - __builtin_clzll(equal));
        bits &= ~last;
        equal &= ~last;
      }
    }
    marks[w] = bits;
  }
}

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

inline uint64_t mixed(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

struct Random {  // a stream for each (seed, position, layer, head)
  uint64_t state;
  Random(uint64_t seed, int64_t position, int layer, int64_t head)
      : state(mixed(mixed(seed + uint64_t(position)) + uint64_t(layer) * 0x10001u + uint64_t(head))) {}
  double uniform() {  // [0, 1)
    state += 0x9e3779b97f4a7c15u;
    return double(mixed(state) >> 11) * 0x1p-53;
  }
};

// `budget` independent draws in proportion to exp(score); each drawn token's score becomes
// log2(its draws / budget * sum of exp(score)). The uniform numbers come sorted, so one sweep is enough.
inline void choose_draws(const Attention& args, const Sequence& seq, int64_t head, float* scores, int64_t n, uint64_t* chosen) {
  const Sparse& sparse = *seq.sparse;
  const float scale = args.scale * 1.4426950408889634f;
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

// The best of what was probed, marked where the tokens lie.
inline void choose_probed(const Attention& args, const Sparse& sparse, int64_t kv_head, int16_t* scores, Scratch& s, uint64_t* chosen) {
  const int32_t* probed = probed_of(sparse, kv_head);
  const int64_t count = *probed++, plane = plane_of(args, sparse, kv_head);
  mark_top(scores, count * 16, sparse.budget, s.unit_marks, (int16_t*)s.values_left);
  __builtin_memset(chosen, 0, size_t(8 * words(sparse.end - sparse.begin)));
  const Block* b = sparse.blocks;
  for (int64_t w = 0; w < words(count * 16); ++w)
    for (uint64_t bits = s.unit_marks[w]; bits; bits &= bits - 1) {
      const int64_t slot = w * 64 + __builtin_ctzll(bits), x = int64_t(probed[slot / 16]) * 16 + slot % 16;
      while (x >= b->end - sparse.begin) ++b;
      const int64_t begin = b->begin - sparse.begin, token = begin + b->order[plane * (b->end - b->begin) + x - begin];
      chosen[token / 64] |= uint64_t(1) << (token % 64);
    }
}

inline void choose_item(const Attention& args, const SparseItem& item, Scratch& s) {
  const Sequence& seq = args.sequences[item.sequence];
  const Sparse& sparse = *seq.sparse;
  const Method& m = *sparse.method;
  const int64_t n = sparse.end - sparse.begin, ranks = padded_ranks(sparse.ranked);
  uint64_t* chosen = sparse.chosen + item.head * words(n);
  int32_t* scores = (int32_t*)(sparse.scores + item.head * ranks * 4);
  const int64_t kv_head = m.shared ? item.head : item.head / (args.q_heads / args.kv_heads);
  if (sparse.probe) {
    choose_probed(args, sparse, kv_head, (int16_t*)scores, s, chosen);
  } else if (m.rank == Rank::signs) {
    mark_top((int16_t*)scores, n, sparse.budget, chosen, (int16_t*)s.values_left);
  } else if (m.rank == Rank::clusters) {
    choose_clusters(args, sparse, kv_head, scores, (uint8_t*)s.values_left, chosen);
  } else if (m.take == Take::draw) {
    for (int64_t i = 0; i < n; ++i) ((float*)scores)[i] = unsortable(scores[i]);
    choose_draws(args, seq, item.head, (float*)scores, n, chosen);
  } else if (m.unit == 1) {
    mark_top(scores, n, sparse.budget, chosen, (int32_t*)s.values_left);
  } else {
    uint64_t* units = s.unit_marks;
    mark_top(scores, sparse.ranked, (sparse.budget + m.unit - 1) / m.unit, units, (int32_t*)s.values_left);
    spread(units, sparse.ranked, m.unit, chosen);
  }
}
