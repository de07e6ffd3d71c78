// Step `prepare`, the first in which a sparse sequence decides what it reads of its candidates: each query head prepares
// what it ranks by. Methods that do not rank (LSH, fixed sets) mark their candidates here already. Included inside the
// namespace of one instruction set.
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
#if defined(__AVX512BW__)
  return _mm512_kunpackw(_mm512_cmp_ps_mask(_mm512_loadu_ps(x + 16), _mm512_setzero_ps(), _CMP_GT_OQ),
                         _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_setzero_ps(), _CMP_GT_OQ));
#else
  uint32_t bits = 0;
  for (int j = 0; j < panel; ++j) bits |= uint32_t(x[j] > 0) << j;
  return bits;
#endif
}

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
        const uint16_t* from = ids + l * n + heads[l * buckets + query[l]];  // only asked for
        __builtin_prefetch(from);
        __builtin_prefetch(from + 32);
      }
      const int now = l - ahead;
      if (now < 0) continue;
      const uint32_t* head = heads + now * buckets + query[now];
      // Tables may come from a stranger's file: no bucket ends beyond its table, and `hits` has a place for every id.
      const int64_t first = head[0] < n ? head[0] : n, last = head[1] < n ? head[1] : n;
      const uint16_t *at = ids + now * n + first, *end = ids + now * n + last;
      entries += last > first ? last - first : 0;
      for (; at < end; ++at) ++hits[*at];
    }
  }
  for (int64_t i = 0; i < n; i += 64) chosen[i / 64] = twice(hits + i);
  return entries;
}

// ---- prepare -----------------------------------------------------------------------------------------------------

constexpr int nibble_zero = 128;  // stands for a sum of 0

// A query rotated and rounded: for every four directions, the sums of their products with 16 patterns of signs, as bytes.
// A piece is 32 directions: the patterns of the low halves of its four bytes, then those of the high halves.
struct SignQuery {
  uint8_t sums[most_signs / 32][2][4][16];
  int16_t bound;  // keys that are among the best score as much, most likely
};

static_assert(sizeof(SignQuery) <= sign_query_bytes);

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
      a = a > -127 ? (a < 127 ? a : 127) : -127;  // also what is not a number
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
  char* to = sparse.queries + item.head * sparse.query_bytes;
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
