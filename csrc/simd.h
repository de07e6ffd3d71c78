// Vectors of W floats in GCC's vector extensions, and the one primitive that differs between instruction sets:
// dp(acc, a, b), a multiply-add over packs. A pack is 32 bits: two bf16 values or one f32.
// Included inside the namespace of one instruction set.
#pragma once

#define ALWAYS_INLINE __attribute__((always_inline)) inline

#if defined(__AVX512F__)
constexpr int W = 16;
constexpr int tile_rows = 12;  // 12 rows x 2 vectors of accumulators fill the 32 registers
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int tile_rows = 4;
#else
constexpr int W = 4;
constexpr int tile_rows = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

template <class V, class P>
inline V load(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class P>
inline void store(P* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
inline vf splat(float x) { return x - vf{}; }
inline vu splat_bits(uint32_t x) { return x - vu{}; }
inline vf as_float(vu x) { return (vf)x; }

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
inline vf load_bf16(const uint16_t* p) { return as_float(__builtin_convertvector(load<vh>(p), vu) << 16); }
inline vh to_bf16(vf x) {  // round to nearest even; NaN stays NaN
  const vu u = (vu)x, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector(x == x ? rounded : rounded - rounded + 0x7fc0u, vh);
}

// 2^x for x <= 0 (and -inf; NaN stays NaN): a degree 6 polynomial on [-0.5, 0.5], relative error below 2e-7.
inline vf exp2_nonpositive(vf x) {
  const vf magic = splat(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  vf clamped = x < -126.0f ? splat(-126.0f) : x;
  vf shifted = clamped + magic;
  vf r = clamped - (shifted - magic);
  vf p = splat(1.540353039338161e-4f);
  p = p * r + 1.333355814642844e-3f;
  p = p * r + 9.618129107628477e-3f;
  p = p * r + 5.550410866482158e-2f;
  p = p * r + 2.402265069591007e-1f;
  p = p * r + 6.931471805599453e-1f;
  p = p * r + 1.0f;
  const vf power = (vf)(((vi)shifted - (vi)magic + 127) << 23);  // multiplied in, so that a NaN of p is not lost
  return x < -126.0f ? vf{} : p * power;
}
inline float exp2_nonpositive(float x) { return exp2_nonpositive(splat(x))[0]; }

// log2 of normal numbers above 0: 2 atanh((m - 1) / (m + 1)) of the mantissa, between sqrt(1/2) and sqrt(2).
inline vf log2_positive(vf x) {
  const vi exponent = ((vi)x - 0x3f3504f3) >> 23;
  const vf m = (vf)((vi)x - (exponent << 23)), t = (m - 1.0f) / (m + 1.0f), s = t * t;
  const vf series = 1.0f + s * (1.0f / 3 + s * (1.0f / 5 + s * (1.0f / 7 + s * (1.0f / 9))));
  return __builtin_convertvector(exponent, vf) + 2.885390081777927f * t * series;
}

inline float sum(vf x) {  // a fixed tree: the same order for every caller
  float lanes[W];
  store(lanes, x);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
inline float max(vf x) {
  float best = x[0];
  for (int i = 1; i < W; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// ---- packs -------------------------------------------------------------------------------------------------------
// An element type says how a step of a packed panel (W packs) is loaded and multiplied with one broadcast pack of x.

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
  static constexpr int pack = 1;
  typedef vf B;
  static B load_b(const Weight* p) { return load<vf>(p); }
  static void zip(const Value* first, const Value*, B* out) {  // 32 columns of a row as a step
    for (int j = 0; j < panel / W; ++j) out[j] = load<vf>(first + j * W);
  }
  static vf dp(vf acc, uint32_t a, B b) { return acc + as_float(splat_bits(a)) * b; }
  static float get(const Value* p) { return *p; }
  static void put(Value* p, float x) { *p = x; }
  static vf get_vector(const Value* p) { return load<vf>(p); }
  static void put_vector(Value* p, vf x) { store(p, x); }
  static vf rounded(vf x) { return x; }
};

struct BF16 {
  typedef uint16_t Value;
  typedef uint16_t Weight;
  static constexpr int pack = 2;
  static float get(const Value* p) { return bf16_to_float(*p); }
  static void put(Value* p, float x) { *p = float_to_bf16(x); }
  static vf get_vector(const Value* p) { return load_bf16(p); }
  static void put_vector(Value* p, vf x) { store(p, to_bf16(x)); }
  static vf rounded(vf x) { return as_float(__builtin_convertvector(to_bf16(x), vu) << 16); }
#if defined(__AVX512BF16__)
  typedef __m512bh B;
  static B load_b(const Weight* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static void zip(const Value* first, const Value* second, B* out) {  // 32 columns of two rows as a step
    const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
    out[0] = (__m512bh)_mm512_permutex2var_epi16(a, _mm512_load_si512(zip_low), b);
    out[1] = (__m512bh)_mm512_permutex2var_epi16(a, _mm512_load_si512(zip_high), b);
  }
  static vf dp(vf acc, uint32_t a, B b) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(int(a)), b);
  }
#else
  struct B {
    vf low, high;
  };
  static B load_b(const Weight* p) {
    vu packed = load<vu>(p);
    return {as_float(packed << 16), as_float(packed & 0xffff0000u)};
  }
  static void zip(const Value* first, const Value* second, B* out) {
    for (int j = 0; j < panel / W; ++j) out[j] = {load_bf16(first + j * W), load_bf16(second + j * W)};
  }
  static vf dp(vf acc, uint32_t a, B b) {
    acc += as_float(splat_bits(a << 16)) * b.low;
    return acc + as_float(splat_bits(a & 0xffff0000u)) * b.high;
  }
#endif
};

struct Int8 : BF16 {  // x is bf16; a weight is an integer of 8 bits, exact in bf16
  typedef int8_t Weight;
  static B load_b(const Weight* p) {
#if defined(__AVX512BF16__)
    __m256i bytes = _mm256_loadu_si256((const __m256i*)p);
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    return _mm512_cvtne2ps_pbh(high, low);
#else
    vi packed = __builtin_convertvector(load<vh>(p), vi);
    return {__builtin_convertvector((packed << 24) >> 24, vf), __builtin_convertvector((packed << 16) >> 24, vf)};
#endif
  }
};

// c[rows, 32 * panels] = a[rows, steps packs] @ packed panels, `b_stride` values apart (`onto`: += ). Every output is one
// chain of dp in the order of the packs, however many rows and panels are computed together, so results do not depend
// on the batch. A few rows take two panels at once: one alone would wait for its own chains.
template <class E, int R, int P>
inline void tile(const typename E::Value* a, int64_t a_stride, const typename E::Weight* b, int64_t b_stride,
                 int64_t steps, float* c, int64_t c_stride, bool onto) {
  for (int column = 0; column < panel; column += 2 * W) {
    vf acc[P][R][2] = {};
    if (onto)
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          acc[p][r][0] = load<vf>(c + r * c_stride + p * panel + column);
          acc[p][r][1] = load<vf>(c + r * c_stride + p * panel + column + W);
        }
    const typename E::Weight* w = b + column * E::pack;
    for (int64_t s = 0; s < steps; ++s, w += panel * E::pack) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        typename E::B b0 = E::load_b(w + p * b_stride), b1 = E::load_b(w + p * b_stride + W * E::pack);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          uint32_t x;
          __builtin_memcpy(&x, a + r * a_stride + s * E::pack, 4);
          acc[p][r][0] = E::dp(acc[p][r][0], x, b0);
          acc[p][r][1] = E::dp(acc[p][r][1], x, b1);
        }
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        store(c + r * c_stride + p * panel + column, acc[p][r][0]);
        store(c + r * c_stride + p * panel + column + W, acc[p][r][1]);
      }
  }
}

// Any number of rows up to tile_rows, any number of panels whose outputs lie side by side.
template <class E, int R = tile_rows>
inline void tiles(int rows, const typename E::Value* a, int64_t a_stride, const typename E::Weight* b,
                  int64_t b_stride, int panels, int64_t steps, float* c, int64_t c_stride, bool onto = false) {
  if (rows == R) {
    int p = 0;
    if constexpr (R <= tile_rows / 2)
      for (; p + 2 <= panels; p += 2)
        tile<E, R, 2>(a, a_stride, b + p * b_stride, b_stride, steps, c + p * panel, c_stride, onto);
    for (; p < panels; ++p)
      tile<E, R, 1>(a, a_stride, b + p * b_stride, b_stride, steps, c + p * panel, c_stride, onto);
  } else if constexpr (R > 1) {
    tiles<E, R - 1>(rows, a, a_stride, b, b_stride, panels, steps, c, c_stride, onto);
  }
}
