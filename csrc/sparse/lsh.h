// Candidates by LSH tables (MagicPIG, sections 4.1 to 4.3).
#pragma once
#include "api/kernels.h"
#include "isa/namespace.h"

THRESHER_ISA_BEGIN

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

THRESHER_ISA_END
