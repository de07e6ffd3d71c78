// The second step: candidates, block by block or those that were probed, are scored for the query heads of their KV head.
// Included inside the namespace of one instruction set.
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

struct SignGroups {
  const uint32_t* signs[sign_groups];
  const uint8_t* factors[sign_groups];
};

// Scores of four groups, next to each other at scores[r] + at, for R queries: factor * sum of +-q.
template <int R>
ALWAYS_INLINE void scan_signs(int pieces, int shift, const SignGroups& from, const SignQuery* const* queries,
                              int16_t* const* scores, int64_t at) {
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
      _mm256_storeu_si256((__m256i*)(scores[r] + at + 16 * u), _mm512_cvtepi32_epi16(score));
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
    for (int r = 0; r < R; ++r) scores[r][at + i] = int16_t((sum[r] * int32_t(from.factors[i / 16][i % 16])) >> shift);
  }
#endif
}

template <int R>
void scan_block(const Attention& args, const SparseItem& item, const Sparse& sparse, const SignQuery* const* queries,
                int16_t* const* scores) {
  const Block& b = sparse.blocks[item.part];
  const int pieces = sparse.method->planes / 32, shift = sign_shift(sparse.method->planes);
  const int64_t n = b.end - b.begin, plane = plane_of(args, sparse, item.head);
  const uint32_t* signs = b.signs + plane * n * pieces;
  const uint8_t* factors = b.factors + plane * n;
  for (int64_t i = item.begin; i < item.end; i += 16 * sign_groups) {
    SignGroups from;
    for (int u = 0; u < sign_groups; ++u) {
      from.signs[u] = signs + (i + 16 * u) * pieces;
      from.factors[u] = factors + i + 16 * u;
    }
    prefetch((const char*)(from.signs[0] + 1024), 64 * sign_groups * pieces);
    scan_signs<R>(pieces, shift, from, queries, scores, b.begin - sparse.begin + i);
  }
}

// Piece item.begin of item.end pieces of what was probed. Scores follow each other in the order of `probed`.
template <int R>
void scan_probed(const Attention& args, const SparseItem& item, const Sparse& sparse, const SignQuery* const* queries,
                 int16_t* const* scores) {
  const int pieces = sparse.method->planes / 32, shift = sign_shift(sparse.method->planes);
  const int64_t plane = plane_of(args, sparse, item.head);
  const int32_t* probed = probed_of(sparse, item.head);
  const int64_t count = *probed++, steps = (count + sign_groups - 1) / sign_groups;
  const Block* b = sparse.blocks;
  for (int64_t step = steps * item.begin / item.end; step < steps * (item.begin + 1) / item.end; ++step) {
    SignGroups from;
    for (int u = 0; u < sign_groups; ++u) {
      const int64_t i = step * sign_groups + u, x = int64_t(probed[i < count ? i : count - 1]) * 16;
      while (x >= b->end - sparse.begin) ++b;
      const int64_t n = b->end - b->begin, at = plane * n + x - (b->begin - sparse.begin);
      from.signs[u] = b->signs + at * pieces;
      from.factors[u] = b->factors + at;
      prefetch((const char*)(from.signs[u] + 64 * pieces), 64 * pieces);
    }
    scan_signs<R>(pieces, shift, from, queries, scores, step * 16 * sign_groups);
  }
}

template <int R>
void scan_heads(const Attention& args, const SparseItem& item, const Sparse& sparse, int64_t first) {
  const SignQuery* queries[R];
  int16_t* scores[R];
  for (int r = 0; r < R; ++r) {
    queries[r] = (const SignQuery*)(sparse.queries + (first + r) * ranking_query_bytes);
    scores[r] = (int16_t*)(sparse.scores + (first + r) * padded_ranks(sparse.ranked) * 4);
  }
  if (sparse.probe)
    scan_probed<R>(args, item, sparse, queries, scores);
  else
    scan_block<R>(args, item, sparse, queries, scores);
}

inline void scan_signs_item(const Attention& args, const SparseItem& item, const Sparse& sparse) {
  const int64_t group = args.q_heads / args.kv_heads;
  for (int64_t g = 0; g < group; g += 4) {
    const int64_t first = item.head * group + g;
    switch (group - g) {
      case 1: scan_heads<1>(args, item, sparse, first); break;
      case 2: scan_heads<2>(args, item, sparse, first); break;
      case 3: scan_heads<3>(args, item, sparse, first); break;
      default: scan_heads<4>(args, item, sparse, first);
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
