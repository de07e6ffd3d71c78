// What a sparse sequence reads of its candidates, in three steps: each query head prepares what it ranks by, every block is
// scanned, and the best are marked in a bitmap of candidates. Included inside the namespace of one instruction set.
#pragma once

// Floats as integers of the same order.
inline int32_t sortable(float x) {
  int32_t i;
  __builtin_memcpy(&i, &x, 4);
  return i ^ ((i >> 31) & 0x7fffffff);
}
inline float unsortable(int32_t i) {
  i ^= (i >> 31) & 0x7fffffff;
  float x;
  __builtin_memcpy(&x, &i, 4);
  return x;
}

inline int64_t words(int64_t bits) { return (bits + 63) / 64; }
inline int64_t choosers(const Attention& args, const Method& m) { return m.shared ? args.kv_heads : args.q_heads; }

// The arrays of one (indexed layer, KV head).
inline int64_t plane_of(const Attention& args, const Sparse& sparse, int64_t kv_head) {
  return int64_t(sparse.slots[args.layer]) * args.kv_heads + kv_head;
}

// ---- signs of projections ------------------------------------------------------------------------------------------

// Bit j: x[j] > 0, of one panel.
inline uint32_t positive(const float* x) {
#if defined(__AVX512F__)
  return uint32_t(_mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_setzero_ps(), _CMP_GT_OQ)) |
         uint32_t(_mm512_cmp_ps_mask(_mm512_loadu_ps(x + 16), _mm512_setzero_ps(), _CMP_GT_OQ)) << 16;
#else
  uint32_t bits = 0;
  for (int j = 0; j < panel; ++j) bits |= uint32_t(x[j] > 0) << j;
  return bits;
#endif
}

constexpr int most_directions = 4096;

// out[r, count] = x[r, dim] @ directions.T, a panel at a time; `use(panel index, values [rows, panel])`.
template <class E, class Use>
inline void project_rows(int rows, const typename E::Value* x, int64_t dim, const void* directions, int64_t count, Use use) {
  const int64_t steps = dim / E::pack, panel_size = steps * panel * E::pack;
  alignas(64) float out[tile_rows * 2 * panel];
  for (int64_t p = 0; p < (count + panel - 1) / panel; p += 2) {
    const int n = (p + 1) * panel < count ? 2 : 1;
    tiles<E>(rows, x, dim, (const typename E::Weight*)directions + p * panel_size, panel_size, n, steps, out, 2 * panel);
    for (int i = 0; i < n; ++i) use(p + i, out + i * panel);
  }
}

// The l-th field of K bits in a stream of bits; the stream has a word to spare.
inline uint32_t field(const uint64_t* bits, int64_t l, int K) {
  const int64_t at = l * K;
  const int shift = int(at & 63);
  uint64_t x = bits[at >> 6] >> shift;
  if (shift + K > 64) x |= bits[(at >> 6) + 1] << (64 - shift);
  return uint32_t(x & ((uint64_t(1) << K) - 1));
}

// ---- LSH tables (MagicPIG, sections 4.1 to 4.3) ----------------------------------------------------------------------

// Bit i: hits[i] >= 2.
inline uint64_t twice(const uint8_t* hits) {
#if defined(__AVX512BW__)
  return _mm512_cmpge_epu8_mask(_mm512_loadu_si512(hits), _mm512_set1_epi8(2));
#else
  uint64_t bits = 0;
  for (int i = 0; i < 64; ++i) bits |= uint64_t(hits[i] >= 2) << i;
  return bits;
#endif
}

// Marks the keys that share a bucket with the query in two tables or more; returns the bucket entries touched.
inline int64_t look_up(const Method& m, const Block& b, int64_t plane, const uint16_t* query, uint8_t* hits, uint64_t* chosen) {
  const int64_t n = b.end - b.begin;
  int64_t entries = 0;
  __builtin_memset(hits, 0, size_t(n));
  if (b.codes) {
    const uint16_t* codes = b.codes + plane * m.tables * n;
    for (int l = 0; l < m.tables; ++l, codes += n) {
      const uint16_t code = query[l];
      for (int64_t i = 0; i < n; ++i) hits[i] = uint8_t(hits[i] + (codes[i] == code));
    }
    entries = n * m.tables;
  } else {
    const int64_t buckets = (int64_t(1) << m.bits) + 1;
    const uint32_t* heads = b.heads + plane * m.tables * buckets;
    const uint16_t* ids = b.ids + plane * m.tables * n;
    for (int l = 0; l < m.tables; ++l) __builtin_prefetch(heads + l * buckets + query[l]);
    constexpr int ahead = 8;
    for (int l = 0; l < m.tables + ahead; ++l) {
      if (l < m.tables) {
        const uint16_t* from = ids + l * n + heads[l * buckets + query[l]];
        __builtin_prefetch(from);
        __builtin_prefetch(from + 32);
      }
      const int now = l - ahead;
      if (now < 0) continue;
      const uint32_t* head = heads + now * buckets + query[now];
      const uint16_t *at = ids + now * n + head[0], *end = ids + now * n + head[1];
      entries += end - at;
      for (; at < end; ++at) ++hits[*at];
    }
  }
  for (int64_t i = 0; i < n; i += 64) chosen[i / 64] = twice(hits + i);
  return entries;
}

// ---- prepare -----------------------------------------------------------------------------------------------------

constexpr int most_signs = 512;
constexpr int nibble_zero = 128;  // stands for a sum of 0

// A query rotated and rounded: for every four directions, the sums of their products with 16 patterns of signs, as bytes.
// A piece is 32 directions: the patterns of the low halves of its four bytes, then those of the high halves.
struct SignQuery {
  uint8_t sums[most_signs / 32][2][4][16];
};

inline void round_query(const float* x, int bits, SignQuery& out) {
  float top = 0;
  for (int j = 0; j < bits; j += 4) {
    float a = 0;
    for (int t = 0; t < 4; ++t) a += x[j + t] < 0 ? -x[j + t] : x[j + t];
    top = a > top ? a : top;
  }
  const float scale = top > 0 ? 127 / top : 0;
  for (int j = 0; j < bits / 4; ++j)
    for (int set = 0; set < 16; ++set) {
      float a = 0;
      for (int t = 0; t < 4; ++t) a += set >> t & 1 ? x[4 * j + t] : -x[4 * j + t];
      a *= scale;
      out.sums[j / 8][j % 2][j % 8 / 2][set] = uint8_t(nibble_zero + int(a + (a < 0 ? -0.5f : 0.5f)));
    }
}

template <class E>
void prepare_item(const Attention& args, const SparseItem& item, Scratch& s) {
  typedef typename E::Value Value;
  const Sequence& seq = args.sequences[item.sequence];
  const Sparse& sparse = *seq.sparse;
  const Method& m = *sparse.method;
  const int64_t dim = args.head_dim, n_words = words(sparse.end - sparse.begin);
  uint64_t* chosen = sparse.chosen + item.head * n_words;
  const int64_t kv_head = m.shared ? item.head : item.head / (args.q_heads / args.kv_heads);
  if (m.rank == Rank::none) {
    __builtin_memset(chosen, 0, size_t(8 * n_words));
    return;
  }
  if (m.rank == Rank::fixed) {
    for (int i = 0; i < sparse.block_count; ++i) {
      const Block& b = sparse.blocks[i];
      const int64_t n = (b.end - b.begin) / 64;
      __builtin_memcpy(chosen + (b.begin - sparse.begin) / 64, b.keep + plane_of(args, sparse, kv_head) * n, size_t(8 * n));
    }
    return;
  }
  const Value* q = (const Value*)args.q + seq.query_row * args.q_token + item.head * args.q_head;
  if (m.rank == Rank::tables) {
    uint64_t bits[most_directions / 64 + 1] = {};
    project_rows<E>(1, q, dim, m.directions, m.planes, [&](int64_t p, const float* x) {
      bits[p / 2] |= uint64_t(positive(x)) << (p % 2 * 32);
    });
    uint16_t codes[256];
    for (int l = 0; l < m.tables; ++l) codes[l] = uint16_t(field(bits, l, m.bits));
    int64_t entries = 0;
    for (int i = 0; i < sparse.block_count; ++i) {
      const Block& b = sparse.blocks[i];
      const int64_t kv = item.head / (args.q_heads / args.kv_heads);
      entries += look_up(m, b, plane_of(args, sparse, kv), codes, s.hits, chosen + (b.begin - sparse.begin) / 64);
    }
    __atomic_fetch_add(&sparse.counters->entries, entries, __ATOMIC_RELAXED);
    return;
  }
  char* to = sparse.queries + item.head * ranking_query_bytes;
  if (m.rank == Rank::signs) {
    alignas(64) float x[most_directions];
    const char* directions = (const char*)m.directions + plane_of(args, sparse, kv_head) * m.directions_stride;
    project_rows<E>(1, q, dim, directions, m.planes,
                    [&](int64_t p, const float* part) { __builtin_memcpy(x + p * panel, part, panel * 4); });
    round_query(x, m.planes, *(SignQuery*)to);
    return;
  }
  Value* row = (Value*)to;
  if (m.row_dim == dim) {
    __builtin_memcpy(row, q, size_t(dim) * sizeof(Value));
  } else {  // the bound sum_c max(q_c least_c, q_c greatest_c) as one product
    for (int64_t c = 0; c < dim; ++c) {
      const float x = E::get(q + c);
      E::put(row + c, x < 0 ? x : 0);
      E::put(row + dim + c, x > 0 ? x : 0);
    }
  }
}

// ---- scan --------------------------------------------------------------------------------------------------------

inline int sign_shift(int bits) {  // so that the largest score fits into 16 bits
  int shift = 0;
  while ((127 * 255 * int64_t(bits / 4)) >> shift > 32767) ++shift;
  return shift;
}

#if defined(__AVX512BW__)
// Adds the four bytes of each 32-bit lane to acc: what 16 keys have of four sums.
ALWAYS_INLINE __m512i add_bytes(__m512i acc, __m512i bytes) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(acc, bytes, _mm512_set1_epi8(1));
#else
  const __m512i pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi8(1));
  return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}

// sums[i % 4][nibble of byte i]; `place` is 16 (i % 4).
ALWAYS_INLINE __m512i look_up_nibbles(__m512i nibbles, __m512i place, const uint8_t (*sums)[16]) {
#if defined(__AVX512VBMI__)
  return _mm512_permutexvar_epi8(_mm512_or_si512(nibbles, place), _mm512_loadu_si512(sums));
#else
  (void)place;
  __m512i out = _mm512_setzero_si512();
  for (int i = 0; i < 4; ++i)
    out = _mm512_mask_shuffle_epi8(out, 0x1111111111111111u << i,
                                   _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)sums[i])), nibbles);
  return out;
#endif
}
#endif

// Scores of keys [begin, end), multiples of 64, for R queries: factor * sum of +-q.
template <int R>
void scan_signs(int bits, const uint32_t* signs, const uint8_t* factors, int64_t begin, int64_t end,
                const SignQuery* const* queries, int16_t* const* scores) {
  const int pieces = bits / 32, shift = sign_shift(bits), zero = nibble_zero * bits / 4;
#if defined(__AVX512BW__)
  constexpr int groups = 4;  // of 16 keys: the sums of a piece are loaded once for all of them
  const __m512i low = _mm512_set1_epi8(15), place = _mm512_set1_epi32(0x30201000);
  const __m128i down = _mm_cvtsi32_si128(shift);
  for (int64_t i = begin; i < end; i += 16 * groups) {
    const uint32_t* group = signs + i * pieces;
    prefetch((const char*)(group + 1024), 64 * groups * pieces);
    __m512i acc[groups][R];
#pragma GCC unroll 4
    for (int u = 0; u < groups; ++u)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[u][r] = _mm512_set1_epi32(-zero);
    for (int p = 0; p < pieces; ++p) {
#pragma GCC unroll 4
      for (int u = 0; u < groups; ++u) {
        const __m512i x = _mm512_loadu_si512(group + (u * pieces + p) * 16);
        const __m512i first = _mm512_and_si512(x, low), second = _mm512_and_si512(_mm512_srli_epi32(x, 4), low);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          acc[u][r] = add_bytes(acc[u][r], look_up_nibbles(first, place, queries[r]->sums[p][0]));
          acc[u][r] = add_bytes(acc[u][r], look_up_nibbles(second, place, queries[r]->sums[p][1]));
        }
      }
    }
#pragma GCC unroll 4
    for (int u = 0; u < groups; ++u) {
      const __m512i factor = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(factors + i + 16 * u)));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512i score = _mm512_sra_epi32(_mm512_mullo_epi32(acc[u][r], factor), down);
        _mm256_storeu_si256((__m256i*)(scores[r] + i + 16 * u), _mm512_cvtepi32_epi16(score));
      }
    }
  }
#else
  for (int64_t i = begin; i < end; ++i) {
    const uint32_t* group = signs + i / 16 * 16 * pieces + i % 16;
    int32_t sum[R];
    for (int r = 0; r < R; ++r) sum[r] = -zero;
    for (int p = 0; p < pieces; ++p)
      for (int j = 0; j < 4; ++j) {
        const uint32_t byte = group[p * 16] >> (8 * j) & 255;
        for (int r = 0; r < R; ++r) sum[r] += queries[r]->sums[p][0][j][byte & 15] + queries[r]->sums[p][1][j][byte >> 4];
      }
    for (int r = 0; r < R; ++r) scores[r][i] = int16_t((sum[r] * int32_t(factors[i])) >> shift);
  }
#endif
}

inline void scan_signs_item(const Attention& args, const SparseItem& item, const Sparse& sparse) {
  const Method& m = *sparse.method;
  const Block& b = sparse.blocks[item.part];
  const int64_t plane = plane_of(args, sparse, item.head), n = b.end - b.begin, group = args.q_heads / args.kv_heads;
  const uint32_t* signs = b.signs + plane * n * (m.planes / 32);
  const uint8_t* factors = b.factors + plane * n;
  for (int64_t g = 0; g < group; g += 4) {
    const SignQuery* queries[4];
    int16_t* scores[4];
    const int rows = int(group - g < 4 ? group - g : 4);
    for (int r = 0; r < rows; ++r) {
      const int64_t head = item.head * group + g + r;
      queries[r] = (const SignQuery*)(sparse.queries + head * ranking_query_bytes);
      scores[r] = (int16_t*)(sparse.scores + head * padded_ranks(sparse.ranked) * 4) + (b.begin - sparse.begin);
    }
    switch (rows) {
      case 1: scan_signs<1>(m.planes, signs, factors, item.begin, item.end, queries, scores); break;
      case 2: scan_signs<2>(m.planes, signs, factors, item.begin, item.end, queries, scores); break;
      case 3: scan_signs<3>(m.planes, signs, factors, item.begin, item.end, queries, scores); break;
      default: scan_signs<4>(m.planes, signs, factors, item.begin, item.end, queries, scores);
    }
  }
}

// The run that holds position x; `run` is where the last search ended, positions mostly grow.
inline const Run* run_of(const Sequence& seq, const Run* run, int64_t x) {
  if (x < run->start) run = seq.runs;
  while (run->end <= x) ++run;
  return run;
}

// Scores of ranked rows: dot products of the queries of a group with keys, page bounds, block or cluster means.
template <class E>
void scan_rows_item(const Attention& args, const SparseItem& item, Scratch& s) {
  typedef typename E::Value Value;
  const Sequence& seq = args.sequences[item.sequence];
  const Sparse& sparse = *seq.sparse;
  const Method& m = *sparse.method;
  const int64_t dim = m.row_dim, row_bytes = dim * int64_t(sizeof(Value)), steps = dim / E::pack;
  const int64_t group = args.q_heads / args.kv_heads, ranks = padded_ranks(sparse.ranked);
  int64_t first = 0;  // of this block among all ranked rows
  for (int i = 0; m.rank != Rank::keys && i < item.part; ++i) first += sparse.blocks[i].units;
  Value* queries = (Value*)s.queries;
  for (int64_t g = 0; g < group; ++g)
    __builtin_memcpy(queries + g * dim, sparse.queries + (item.head * group + g) * ranking_query_bytes, size_t(row_bytes));
  const Run* run = seq.runs;
  for (int64_t at = item.begin; at < item.end; at += split) {
    const int n = int(item.end - at < split ? item.end - at : split);
    if (m.rank == Rank::keys) {
      for (int j = 0; j < n; ++j) {
        const int64_t x = sparse.begin + at + j;
        run = run_of(seq, run, x);
        const int64_t plane = int64_t(args.layer) * 2 * args.kv_heads + item.head;
        s.key_rows[j] = run->base + (plane * run->capacity + x - run->start) * row_bytes;
      }
    } else {
      const Block& b = sparse.blocks[item.part];
      const char* rows = (const char*)b.rows + (plane_of(args, sparse, item.head) * b.units + at) * row_bytes;
      for (int j = 0; j < n; ++j) s.key_rows[j] = rows + j * row_bytes;
    }
    pack_keys(s.key_rows, n, steps, s.keys);
    for (int64_t g = 0; g < group; g += tile_rows) {
      const int rows = int(group - g < tile_rows ? group - g : tile_rows);
      tiles<E>(rows, queries + g * dim, dim, (const Value*)s.keys, steps * panel * E::pack, int(padded(n)) / panel, steps,
               s.scores, split);
      for (int r = 0; r < rows; ++r) {
        const int64_t chooser = m.shared ? item.head : item.head * group + g + r;
        int32_t* to = (int32_t*)sparse.scores + chooser * ranks + first + at;
        const float* x = s.scores + r * split;
        if (m.shared && g + r > 0)
          for (int j = 0; j < n; ++j) to[j] = sortable(unsortable(to[j]) + x[j]);
        else
          for (int j = 0; j < n; ++j) to[j] = sortable(x[j]);
      }
    }
  }
}

template <class E>
void scan_item(const Attention& args, const SparseItem& item, Scratch& s) {
  const Sparse& sparse = *args.sequences[item.sequence].sparse;
  if (sparse.method->rank == Rank::signs)
    scan_signs_item(args, item, sparse);
  else
    scan_rows_item<E>(args, item, s);
}

// ---- choose ------------------------------------------------------------------------------------------------------

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

// Bit i: x[i] >= t, of 64.
inline uint64_t mask_from(const int16_t* x, int16_t t) {
#if defined(__AVX512BW__)
  const __m512i limit = _mm512_set1_epi16(t);
  return uint64_t(_mm512_cmpge_epi16_mask(_mm512_loadu_si512(x), limit)) |
         uint64_t(_mm512_cmpge_epi16_mask(_mm512_loadu_si512(x + 32), limit)) << 32;
#else
  uint64_t bits = 0;
  for (int i = 0; i < 64; ++i) bits |= uint64_t(x[i] >= t) << i;
  return bits;
#endif
}
inline uint64_t mask_from(const int32_t* x, int32_t t) {
  uint64_t bits = 0;
#if defined(__AVX512F__)
  const __m512i limit = _mm512_set1_epi32(t);
  for (int j = 0; j < 4; ++j)
    bits |= uint64_t(_mm512_cmpge_epi32_mask(_mm512_loadu_si512(x + 16 * j), limit)) << (16 * j);
#else
  for (int i = 0; i < 64; ++i) bits |= uint64_t(x[i] >= t) << i;
#endif
  return bits;
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

inline void choose_item(const Attention& args, const SparseItem& item, Scratch& s) {
  const Sequence& seq = args.sequences[item.sequence];
  const Sparse& sparse = *seq.sparse;
  const Method& m = *sparse.method;
  const int64_t n = sparse.end - sparse.begin, ranks = padded_ranks(sparse.ranked);
  uint64_t* chosen = sparse.chosen + item.head * words(n);
  int32_t* scores = (int32_t*)(sparse.scores + item.head * ranks * 4);
  const int64_t kv_head = m.shared ? item.head : item.head / (args.q_heads / args.kv_heads);
  if (m.rank == Rank::signs) {
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
