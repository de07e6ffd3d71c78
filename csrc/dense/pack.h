// Rows of keys and values become packed right-hand sides of a product.
#pragma once
#include "api/kernels.h"
#include "isa/element.h"
#include "isa/memory.h"
#include "isa/namespace.h"
#include "isa/vector.h"

THRESHER_ISA_BEGIN

#if defined(__AVX512F__)
// 16 rows of W packs, transposed: the columns become rows of 32 packs' stride.
ALWAYS_INLINE void transpose16(const char* const* rows, int64_t byte_offset, uint32_t* out) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i] + byte_offset);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(out + (i)*panel, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 4) * panel, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_si512(out + (i + 8) * panel, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    _mm512_storeu_si512(out + (i + 12) * panel, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
  }
}
#elif defined(__AVX2__)
// 8 rows of 8 packs, transposed, twice.
ALWAYS_INLINE void transpose16(const char* const* rows, int64_t byte_offset, uint32_t* out) {
  for (int half = 0; half < 16; half += 8) {
    vu r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = load<vu>(rows[half + i] + byte_offset);
    for (int i = 0; i < 8; i += 2) {
      t[i] = __builtin_shuffle(r[i], r[i + 1], vu{0, 8, 1, 9, 4, 12, 5, 13});
      t[i + 1] = __builtin_shuffle(r[i], r[i + 1], vu{2, 10, 3, 11, 6, 14, 7, 15});
    }
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; ++j) {
        r[i + 2 * j] = __builtin_shuffle(t[i + j], t[i + j + 2], vu{0, 1, 8, 9, 4, 5, 12, 13});
        r[i + 2 * j + 1] = __builtin_shuffle(t[i + j], t[i + j + 2], vu{2, 3, 10, 11, 6, 7, 14, 15});
      }
    for (int i = 0; i < 4; ++i) {
      store(out + half + i * panel, __builtin_shuffle(r[i], r[i + 4], vu{0, 1, 2, 3, 8, 9, 10, 11}));
      store(out + half + (i + 4) * panel, __builtin_shuffle(r[i], r[i + 4], vu{4, 5, 6, 7, 12, 13, 14, 15}));
    }
  }
}
#endif

constexpr int gather_ahead = 64;  // row addresses behind the last one, for prefetching

// Keys become the right-hand side of S = Q K^T: panels of 32 keys, step by step. Missing rows are zero. Gathered rows
// are asked for one by one; behind the last one there are `gather_ahead` more addresses. `asked`: nothing is asked for here.
template <bool Gathered = false>
ALWAYS_INLINE void pack_keys(const char* const* rows, int count, int64_t steps, uint32_t* out, bool asked = false) {
  for (int base = 0; base < count; base += panel) {
    uint32_t* to = out + base * steps;
    for (int half = 0; half < panel; half += 16) {
      const int begin = base + half, present = count - begin < 16 ? count - begin : 16;
      if (Gathered)
        for (int i = 0; i < 16; ++i) prefetch(rows[begin + i + 32], steps * 4);
      else if (present > 0 && !asked)
        prefetch(rows[begin] + prefetch_distance, present * steps * 4);
      int64_t s = 0;
#if defined(__AVX2__)
      if (present == 16)
        for (; s + W <= steps; s += W) transpose16(rows + begin, s * 4, to + s * panel + half);
#endif
      for (int i = 0; i < 16; ++i)
        for (int64_t j = s; j < steps; ++j) {
          uint32_t x = 0;
          if (i < present) __builtin_memcpy(&x, rows[begin + i] + j * 4, 4);
          to[j * panel + half + i] = x;
        }
    }
  }
}

// out[j] = (first[j], second[j]) for 32 columns; missing ones and a missing second are zero.
ALWAYS_INLINE void zip_rows(const uint16_t* first, const uint16_t* second, int columns, uint16_t* out) {
  if (columns < panel || !second) {
    for (int j = 0; j < panel; ++j) {
      out[2 * j] = j < columns ? first[j] : uint16_t(0);
      out[2 * j + 1] = j < columns && second ? second[j] : uint16_t(0);
    }
    return;
  }
#if defined(__AVX512BW__)
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, _mm512_load_si512(zip_low), b));
  _mm512_storeu_si512(out + panel, _mm512_permutex2var_epi16(a, _mm512_load_si512(zip_high), b));
#else
  for (int j = 0; j < panel; j += W) {
    vu low = __builtin_convertvector(load<vh>(first + j), vu), high = __builtin_convertvector(load<vh>(second + j), vu);
    store(out + 2 * j, low | (high << 16));
  }
#endif
}

// Values become the right-hand side of P V: panels of 32 head dimensions, keys (bf16: pairs of keys) step by step.
// Meanwhile the keys of the next split are asked for, which most often lie behind those of this one, and values further on, if
// nobody has `asked` for them.
template <bool Gathered = false>
ALWAYS_INLINE void pack_values(F32, const char* const* rows, const char* const* keys, int count, int64_t head_dim, float* out,
                               bool asked) {
  for (int i = 0; i < count; ++i) {
    if (!Gathered && !asked) {
      prefetch(rows[i] + prefetch_distance, head_dim * 4);
      prefetch(keys[i] + split * head_dim * 4, head_dim * 4);
    }
    for (int64_t d = 0; d < head_dim; d += panel) {
      const int columns = int(head_dim - d < panel ? head_dim - d : panel);
      float* to = out + d * split + i * panel;
      __builtin_memcpy(to, rows[i] + d * 4, columns * 4);
      for (int j = columns; j < panel; ++j) to[j] = 0;
    }
  }
}
template <bool Gathered = false>
ALWAYS_INLINE void pack_values(BF16, const char* const* rows, const char* const* keys, int count, int64_t head_dim,
                               uint16_t* out, bool asked) {
  for (int i = 0; i < count; i += 2) {
    if (!Gathered && !asked) {
      prefetch(rows[i] + prefetch_distance, head_dim * 4);  // of two rows
      prefetch(keys[i] + split * head_dim * 2, head_dim * 4);
    }
    const uint16_t* first = (const uint16_t*)rows[i];
    const uint16_t* second = i + 1 < count ? (const uint16_t*)rows[i + 1] : nullptr;
    int64_t d = 0;
    if (second)
      for (; d + panel <= head_dim; d += panel) zip_rows(first + d, second + d, panel, out + d * split + i * panel);
    for (; d < head_dim; d += panel) {
      const int columns = int(head_dim - d < panel ? head_dim - d : panel);
      zip_rows(first + d, second ? second + d : nullptr, columns, out + d * split + i * panel);
    }
  }
}

THRESHER_ISA_END
