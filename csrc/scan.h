// Steps `sample` and `scan`: candidates are scored for the query heads of their KV head, signs after a sample of them has told
// what scores matter. Included inside the namespace of one instruction set.
#pragma once

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

constexpr int sign_groups = 4;  // of 16 keys, scored together: the sums of a piece are loaded once for all of them
constexpr int sign_keys = 16 * sign_groups;

struct SignGroups {
  const uint32_t* signs[sign_groups];
  const uint8_t* factors[sign_groups];
};

// Scores of four groups for R queries: factor * sum of +-q.
template <int R>
ALWAYS_INLINE void scan_signs(int pieces, int shift, const SignGroups& from, const SignQuery* const* queries,
                              int16_t (*scores)[sign_keys]) {
  const int zero = nibble_zero * pieces * 8;
#if defined(__AVX512BW__)
  const __m512i low = _mm512_set1_epi8(15), place = _mm512_set1_epi32(0x30201000);
  const __m128i down = _mm_cvtsi32_si128(shift);
  __m512i acc[sign_groups][R];
#pragma GCC unroll 4
  for (int u = 0; u < sign_groups; ++u)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[u][r] = _mm512_set1_epi32(-zero);
  for (int p = 0; p < pieces; ++p) {
#pragma GCC unroll 4
    for (int u = 0; u < sign_groups; ++u) {
      const __m512i x = _mm512_loadu_si512(from.signs[u] + p * 16);
      const __m512i first = _mm512_and_si512(x, low), second = _mm512_and_si512(_mm512_srli_epi32(x, 4), low);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        acc[u][r] = add_bytes(acc[u][r], look_up_nibbles(first, place, queries[r]->sums[p][0]));
        acc[u][r] = add_bytes(acc[u][r], look_up_nibbles(second, place, queries[r]->sums[p][1]));
      }
    }
  }
#pragma GCC unroll 4
  for (int u = 0; u < sign_groups; ++u) {
    const __m512i factor = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from.factors[u]));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512i score = _mm512_sra_epi32(_mm512_mullo_epi32(acc[u][r], factor), down);
      _mm256_storeu_si256((__m256i*)(scores[r] + 16 * u), _mm512_cvtepi32_epi16(score));
    }
  }
#else
  for (int i = 0; i < 16 * sign_groups; ++i) {
    const uint32_t* signs = from.signs[i / 16] + i % 16;
    int32_t sum[R];
    for (int r = 0; r < R; ++r) sum[r] = -zero;
    for (int p = 0; p < pieces; ++p)
      for (int j = 0; j < 4; ++j) {
        const uint32_t byte = signs[p * 16] >> (8 * j) & 255;
        for (int r = 0; r < R; ++r) sum[r] += queries[r]->sums[p][0][j][byte & 15] + queries[r]->sums[p][1][j][byte >> 4];
      }
    for (int r = 0; r < R; ++r) scores[r][i] = int16_t((sum[r] * int32_t(from.factors[i / 16][i % 16])) >> shift);
  }
#endif
}

// Where the signs of a KV head lie.
struct Signs {
  const Sparse& sparse;
  const int64_t plane;
  const int pieces, shift;
  const Block* b;

  Signs(const Attention& args, const Sparse& of, int64_t kv_head)
      : sparse(of), plane(plane_of(args, of, kv_head)), pieces(of.method->planes / 32), shift(sign_shift(of.method->planes)),
        b(of.blocks) {}

  // Four groups of 16 candidates, `step` apart; each call begins behind the last one.
  ALWAYS_INLINE SignGroups groups(int64_t candidate, int step) {
    SignGroups from;
    for (int u = 0; u < sign_groups; ++u) {
      const int64_t x = sparse.begin + candidate + step * u;
      while (x >= b->end) ++b;
      const int64_t at = plane * (b->end - b->begin) + x - b->begin;
      from.signs[u] = b->signs + at * pieces;
      from.factors[u] = b->factors + at;
    }
    prefetch((const char*)(from.signs[0] + 1024), sign_keys * 4 * pieces);
    return from;
  }
};

// The scores of a piece that reach the query head's bound, in order: score << 16 | place in the piece. The first number is how
// many. Cores hand each other these few, not all scores.
inline int32_t* found_of(const Sparse& sparse, int64_t head, int64_t candidate) {
  return sparse.found + (head * ((sparse.ranked + scan_tokens - 1) / scan_tokens) + candidate / scan_tokens) * found_stride;
}
inline SignQuery* sign_query(const Sparse& sparse, int64_t head) {
  return (SignQuery*)(sparse.queries + head * sparse.query_bytes);
}

// Adds those of sign_keys scores that are >= bound; returns where the next goes.
ALWAYS_INLINE int32_t* keep_from(const int16_t* x, int16_t bound, int32_t place, int32_t* to) {
#if defined(__AVX512BW__)
  const __m512i least = _mm512_set1_epi32(bound);
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int i = 0; i < sign_keys; i += 16) {
    const __m512i score = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)(x + i)));
    const __mmask16 mask = _mm512_cmpge_epi32_mask(score, least);
    const __m512i entry = _mm512_or_si512(_mm512_slli_epi32(score, 16), _mm512_add_epi32(lanes, _mm512_set1_epi32(place + i)));
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(mask, entry));
    to += __builtin_popcount(_cvtmask16_u32(mask));
  }
#else
  for (int i = 0; i < sign_keys; ++i)
    if (x[i] >= bound) *to++ = int32_t(uint32_t(x[i]) << 16 | uint32_t(place + i));
#endif
  return to;
}

// Candidates [begin, begin + scan_tokens), as far as there are any, for R query heads.
template <int R>
void scan_piece(const Attention& args, const Sparse& sparse, int64_t first_head, int64_t begin) {
  Signs signs(args, sparse, first_head / (args.q_heads / args.kv_heads));
  const int64_t end = begin + scan_tokens < sparse.ranked ? begin + scan_tokens : sparse.ranked;
  const SignQuery* queries[R];
  int32_t* to[R];
  for (int r = 0; r < R; ++r) {
    queries[r] = sign_query(sparse, first_head + r);
    to[r] = found_of(sparse, first_head + r, begin) + 16;
  }
  alignas(64) int16_t scores[R][sign_keys];
  for (int64_t x = begin; x < end; x += sign_keys) {
    scan_signs<R>(signs.pieces, signs.shift, signs.groups(x, 16), queries, scores);
    for (int r = 0; r < R; ++r) to[r] = keep_from(scores[r], queries[r]->bound, int32_t(x - begin), to[r]);
  }
  for (int r = 0; r < R; ++r) {
    int32_t* found = found_of(sparse, first_head + r, begin);
    found[0] = int32_t(to[r] - found) - 16;
  }
}

template <int N>
struct Constant {
  static constexpr int value = N;
};
// Calls f(Constant<R>, first query head) for all query heads of a KV head, at most four at a time.
template <class F>
void for_query_heads(const Attention& args, int64_t kv_head, F f) {
  const int64_t group = args.q_heads / args.kv_heads;
  for (int64_t g = 0; g < group; g += 4) {
    const int64_t first = kv_head * group + g;
    switch (group - g) {
      case 1: f(Constant<1>(), first); break;
      case 2: f(Constant<2>(), first); break;
      case 3: f(Constant<3>(), first); break;
      default: f(Constant<4>(), first);
    }
  }
}

// The bounds of R query heads: a sample of scores tells what leaves few to look at closely.
template <int R>
void bound_scores(const Attention& args, const Sparse& sparse, int64_t first_head, int16_t* buffer) {
  Signs signs(args, sparse, first_head / (args.q_heads / args.kv_heads));
  const SignQuery* queries[R];
  for (int r = 0; r < R; ++r) {
    queries[r] = sign_query(sparse, first_head + r);
    sign_query(sparse, first_head + r)->bound = lowest<int16_t>();
  }
  constexpr int step = 256, stride = sign_groups * step;  // one group of 16 in 16: neighbours are alike
  if (sparse.ranked < 4 * stride) return;
  const int64_t room = sparse.ranked / stride * sign_keys;  // of each query head
  int64_t sampled = 0;
  alignas(64) int16_t scores[R][sign_keys];
  for (int64_t x = 0; x + stride <= sparse.ranked; x += stride, sampled += sign_keys) {
    scan_signs<R>(signs.pieces, signs.shift, signs.groups(x, step), queries, scores);
    for (int r = 0; r < R; ++r) __builtin_memcpy(buffer + r * room + sampled, scores[r], sizeof scores[r]);
  }
  const double expected = double(sparse.budget) * double(sampled) / double(sparse.ranked);
  const int64_t rank = int64_t(expected + 4 * __builtin_sqrt(expected) + 8);
  for (int r = 0; r < R && rank < sampled; ++r)
    sign_query(sparse, first_head + r)->bound = threshold(buffer + r * room, sampled, rank);
}

inline void sample_item(const Attention& args, const SparseItem& item, Scratch& s) {
  const Sparse& sparse = *args.sequences[item.sequence].sparse;
  for_query_heads(args, item.head, [&](auto count, int64_t first) {
    bound_scores<count.value>(args, sparse, first, (int16_t*)s.values_left);
  });
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
    __builtin_memcpy(queries + g * dim, sparse.queries + (item.head * group + g) * sparse.query_bytes, size_t(row_bytes));
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
    for_query_heads(args, item.head,
                    [&](auto count, int64_t first) { scan_piece<count.value>(args, sparse, first, item.begin); });
  else
    scan_rows_item<E>(args, item, s);
}
