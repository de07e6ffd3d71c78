// The second step: every block of candidates is scored for the query heads of its KV head. Included inside the namespace of
// one instruction set.
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
