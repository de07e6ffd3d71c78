// Scores of keys of which the signs of some directions are known.
#pragma once
#include "api/kernels.h"
#include "isa/largest.h"
#include "isa/memory.h"
#include "isa/namespace.h"
#include "sparse/layout.h"

THRESHER_ISA_BEGIN

constexpr int nibble_zero = 128;  // how a sum of 0 is stored: bytes have no sign

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
#elif defined(__AVX2__)
// Byte j of the words of 32 keys in out[j], of each eight keys in the order of joined_halves.
ALWAYS_INLINE void gather_bytes(const uint32_t* first, const uint32_t* second, __m256i* out) {
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  auto words = [&](const uint32_t* from) { return _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i*)from), order); };
  const __m256i a = words(first), b = words(first + 8), c = words(second), d = words(second + 8);
  const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
  const __m256i upper_ab = _mm256_unpackhi_epi32(a, b), upper_cd = _mm256_unpackhi_epi32(c, d);
  out[0] = _mm256_unpacklo_epi64(ab, cd);
  out[1] = _mm256_unpackhi_epi64(ab, cd);
  out[2] = _mm256_unpacklo_epi64(upper_ab, upper_cd);
  out[3] = _mm256_unpackhi_epi64(upper_ab, upper_cd);
}

// What bytes at even and at odd places add up to becomes the sums of 16 keys in order: the first or the second.
ALWAYS_INLINE __m256i joined_halves(__m256i even, __m256i odd, bool second) {
  return _mm256_permute4x64_epi64(second ? _mm256_unpackhi_epi16(even, odd) : _mm256_unpacklo_epi16(even, odd), 0xd8);
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
#elif defined(__AVX2__)
  const __m256i low = _mm256_set1_epi8(15);
  const __m128i down = _mm_cvtsi32_si128(shift);
  for (int u = 0; u < sign_groups; u += 2) {
    __m256i all[R], odd[R];  // of 16-bit lanes: sums of what they hold, which may overflow, and of their upper bytes
    for (int r = 0; r < R; ++r) all[r] = odd[r] = _mm256_setzero_si256();
    for (int p = 0; p < pieces; ++p) {
      __m256i bytes[4];
      gather_bytes(from.signs[u] + p * 16, from.signs[u + 1] + p * 16, bytes);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m256i nibbles = _mm256_and_si256(half ? _mm256_srli_epi16(bytes[j], 4) : bytes[j], low);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const __m128i sums = _mm_loadu_si128((const __m128i*)queries[r]->sums[p][half][j]);
            const __m256i found = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(sums), nibbles);
            all[r] = _mm256_add_epi16(all[r], found);
            odd[r] = _mm256_add_epi16(odd[r], _mm256_srli_epi16(found, 8));
          }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m256i even = _mm256_sub_epi16(all[r], _mm256_slli_epi16(odd[r], 8));
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __m256i sum = _mm256_sub_epi16(joined_halves(even, odd[r], i), _mm256_set1_epi16(int16_t(zero)));
        const __m256i factor = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from.factors[u + i]));
        const __m256i product = _mm256_mullo_epi16(sum, factor), upper = _mm256_mulhi_epi16(sum, factor);
        const __m256i score = _mm256_packs_epi32(_mm256_sra_epi32(_mm256_unpacklo_epi16(product, upper), down),
                                                 _mm256_sra_epi32(_mm256_unpackhi_epi16(product, upper), down));
        _mm256_storeu_si256((__m256i*)(scores[r] + 16 * (u + i)), score);
      }
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

// What a query head ranks by.
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
#elif defined(__AVX2__)
  const __m256i least = _mm256_set1_epi16(bound);
  auto below = [&](int at) { return _mm256_cmpgt_epi16(least, _mm256_loadu_si256((const __m256i*)(x + at))); };
  for (int i = 0; i < sign_keys; i += 32) {
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi16(below(i), below(i + 16)), 0xd8);
    for (uint32_t bits = ~uint32_t(_mm256_movemask_epi8(both)); bits; bits &= bits - 1) {
      const int at = i + __builtin_ctz(bits);
      *to++ = int32_t(uint32_t(x[at]) << 16 | uint32_t(place + at));
    }
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
  Signs signs(args, sparse, first_head / group_of(args));
  const int64_t end = begin + scan_tokens < sparse.ranked ? begin + scan_tokens : sparse.ranked;
  const SignQuery* queries[R];
  int32_t* to[R];
  for (int r = 0; r < R; ++r) {
    queries[r] = sign_query(sparse, first_head + r);
    to[r] = found_of(sparse, first_head + r, begin).entries;
  }
  alignas(64) int16_t scores[R][sign_keys];
  for (int64_t x = begin; x < end; x += sign_keys) {
    scan_signs<R>(signs.pieces, signs.shift, signs.groups(x, 16), queries, scores);
    for (int r = 0; r < R; ++r) to[r] = keep_from(scores[r], queries[r]->bound, int32_t(x - begin), to[r]);
  }
  for (int r = 0; r < R; ++r) {
    Found& found = found_of(sparse, first_head + r, begin);
    found.count = int32_t(to[r] - found.entries);
  }
}

constexpr int sampled_step = 256, sampled_stride = sign_groups * sampled_step;  // one group of 16 in 16: neighbours are alike

// Scores of a query head that are sampled.
inline int64_t sampled_scores(const Sparse& sparse) { return sparse.ranked / sampled_stride * sign_keys; }

// The bounds of R query heads: a sample of scores [R, sampled_scores] tells what leaves few to look at closely.
template <int R>
void bound_scores(const Attention& args, const Sparse& sparse, int64_t first_head, int16_t* sample) {
  Signs signs(args, sparse, first_head / group_of(args));
  const SignQuery* queries[R];
  for (int r = 0; r < R; ++r) {
    queries[r] = sign_query(sparse, first_head + r);
    sign_query(sparse, first_head + r)->bound = lowest<int16_t>();
  }
  if (sparse.ranked < 4 * sampled_stride) return;
  const int64_t sampled = sampled_scores(sparse);
  alignas(64) int16_t scores[R][sign_keys];
  for (int64_t at = 0; at < sampled; at += sign_keys) {
    scan_signs<R>(signs.pieces, signs.shift, signs.groups(at / sign_keys * sampled_stride, sampled_step), queries, scores);
    for (int r = 0; r < R; ++r) __builtin_memcpy(sample + r * sampled + at, scores[r], sizeof scores[r]);
  }
  const double expected = double(sparse.budget) * double(sampled) / double(sparse.ranked);
  const int64_t rank = int64_t(expected + 4 * __builtin_sqrt(expected) + 8);
  for (int r = 0; r < R && rank < sampled; ++r)
    sign_query(sparse, first_head + r)->bound = threshold(sample + r * sampled, sampled, rank);
}

THRESHER_ISA_END
