// Element types: how a value is read and written, and how a step of a packed panel (W packs) is loaded and multiplied with one
// broadcast pack of x. A pack is 32 bits: two bf16 values or one f32. It is multiplied in one go or, without an instruction for
// that, in two parts: first all first values, then all second ones, so that less has to lie in registers.
#pragma once
#include "api/kernels.h"
#include "isa/namespace.h"
#include "isa/vector.h"

THRESHER_ISA_BEGIN

inline float bf16_to_float(uint16_t h) {
  uint32_t u = uint32_t(h) << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
inline uint16_t float_to_bf16(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 64);  // NaN stays NaN
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline vi load_widened(const void* p) {  // W integers of 16 bits
#if defined(__AVX2__) && !defined(__AVX512F__)  // GCC 12 would widen them in halves
  return (vi)_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  typedef int16_t narrow __attribute__((vector_size(2 * W)));
  return __builtin_convertvector(load<narrow>(p), vi);
#endif
}
inline vf load_bf16(const uint16_t* p) { return (vf)(load_widened(p) << 16); }
inline vu rounded_bits(vf x) {  // the upper half is x as bf16, to the nearest even; NaN stays NaN
  const vu u = (vu)x, rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return x == x ? rounded : rounded - rounded + 0x7fc00000u;
}
inline vh to_bf16(vf x) { return __builtin_convertvector(rounded_bits(x) >> 16, vh); }

#if defined(__AVX512BW__)
// Orders for vpermt2w that interleave two rows of 16-bit values.
alignas(64) constexpr uint16_t zip_low[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                              8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
alignas(64) constexpr uint16_t zip_high[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                               24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
#endif

struct F32 {
  typedef float Value;   // of x
  typedef float Weight;  // of the packed panel
  static constexpr int pack = 1, parts = 1, exp2_degree = 6;
  typedef vf A, B;
  static A load_a(const Value* p, int) { return as_float(splat_bits(p)); }
  static B load_b(const Weight* p, int) { return load<vf>(p); }
  static void zip(const Value* first, const Value*, int, B* out) {  // 32 columns of a row as a step
    for (int j = 0; j < panel / W; ++j) out[j] = load<vf>(first + j * W);
  }
  static vf dp(vf acc, A a, B b) { return acc + a * b; }
  static float get(const Value* p) { return *p; }
  static void put(Value* p, float x) { *p = x; }
  static vf get_vector(const Value* p) { return load<vf>(p); }
  static void put_vector(Value* p, vf x) { store(p, x); }
  static vf put_rounded(Value* p, vf x) {  // returns what was put
    store(p, x);
    return x;
  }
};

struct BF16 {
  typedef uint16_t Value;
  typedef uint16_t Weight;
  static constexpr int pack = 2, exp2_degree = 4;
  static float get(const Value* p) { return bf16_to_float(*p); }
  static void put(Value* p, float x) { *p = float_to_bf16(x); }
  static vf get_vector(const Value* p) { return load_bf16(p); }
  static void put_vector(Value* p, vf x) { store(p, to_bf16(x)); }
  static vf put_rounded(Value* p, vf x) {  // returns what was put; of AVX-512 numbers below 1.2e-38 become 0
#if defined(__AVX512BF16__)
    const vh rounded = (vh)_mm512_cvtneps_pbh((__m512)x);
    store(p, rounded);
    return as_float(__builtin_convertvector(rounded, vu) << 16);
#else
    const vu bits = rounded_bits(x);
    store(p, __builtin_convertvector(bits >> 16, vh));
    return as_float(bits & 0xffff0000u);
#endif
  }
#if defined(__AVX512BF16__)
  static constexpr int parts = 1;
  typedef __m512bh A, B;
  static A load_a(const Value* p, int) { return (__m512bh)splat_bits(p); }
  static B load_b(const Weight* p, int) { return (__m512bh)_mm512_loadu_si512(p); }
  static void zip(const Value* first, const Value* second, int, B* out) {  // 32 columns of two rows as a step
    const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
    out[0] = (__m512bh)_mm512_permutex2var_epi16(a, _mm512_load_si512(zip_low), b);
    out[1] = (__m512bh)_mm512_permutex2var_epi16(a, _mm512_load_si512(zip_high), b);
  }
  static vf dp(vf acc, A a, B b) { return (vf)_mm512_dpbf16_ps((__m512)acc, a, b); }
#else
  static constexpr int parts = 2;
  typedef vf A, B;
  static vf half(vu packed, int part) { return as_float(part == 0 ? packed << 16 : packed & 0xffff0000u); }
  static A load_a(const Value* p, int part) { return half(splat_bits(p), part); }
  static B load_b(const Weight* p, int part) { return half(load<vu>(p), part); }
  static void zip(const Value* first, const Value* second, int part, B* out) {
    for (int j = 0; j < panel / W; ++j) out[j] = load_bf16((part == 0 ? first : second) + j * W);
  }
  static vf dp(vf acc, A a, B b) { return acc + a * b; }
#endif
};

struct Int8 : BF16 {  // x is bf16; a weight is an integer of 8 bits, exact in bf16
  typedef int8_t Weight;
#if defined(__AVX512BF16__)
  static B load_b(const Weight* p, int) {
    __m256i bytes = _mm256_loadu_si256((const __m256i*)p);
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    return _mm512_cvtne2ps_pbh(high, low);
  }
#else
  static B load_b(const Weight* p, int part) {
    const vi both = load_widened(p);
    return __builtin_convertvector(part == 0 ? (both << 24) >> 24 : both >> 8, vf);
  }
#endif
};

THRESHER_ISA_END
