// Associative memories: keys and values of new tokens, and softmax over learned pairs. Sequences go step by step, so that the bits
// do not depend on how one is cut into passes.
#pragma once
#include "api/kernels.h"
#include "host/pool.h"
#include "isa/element.h"
#include "isa/namespace.h"
#include "isa/softmax.h"
#include "isa/vector.h"

THRESHER_ISA_BEGIN

constexpr float least_norm = 1e-10f;  // is added to each norm

// to = scale x / |x|; x [dim].
template <class E>
inline void write_unit(const float* x, typename E::Value* to, int64_t dim, float scale) {
  vf squares = {};
  float rest = 0;
  int64_t d = 0;
  for (; d + W <= dim; d += W) squares += load<vf>(x + d) * load<vf>(x + d);
  for (; d < dim; ++d) rest += x[d] * x[d];
  const float factor = scale / (__builtin_sqrtf(sum(squares) + rest) + least_norm);
  for (d = 0; d + W <= dim; d += W) E::put_vector(to + d, load<vf>(x + d) * factor);
  for (; d < dim; ++d) E::put(to + d, x[d] * factor);
}

// For each (sequence, head): f(sequence, head, offset of its numbers in a token, of those in what was before).
template <class F>
void for_streams(const Ragged& tokens, int threads, F f) {
  parallel_for(tokens.sequences * tokens.heads, 1, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i % tokens.heads;
      f(i / tokens.heads, head, head * tokens.head_dim, i * tokens.head_dim);
    }
  });
}

template <class E>
void make_keys(const MemoryKeys& args) {
  const int64_t dim = args.tokens.head_dim, row = args.tokens.heads * dim;
  for_streams(args.tokens, args.threads, [&](int64_t sequence, int64_t head, int64_t offset, int64_t past) {
    const float* last = args.before + past;
    for (int64_t t = args.tokens.starts[sequence]; t < args.tokens.starts[sequence + 1]; ++t) {
      const typename E::Value* x = (const typename E::Value*)args.x + t * row + offset;
      float* average = args.averages + t * row + offset;
      const float decay = args.decay[t * args.decay_stride + head];
      int64_t d = 0;
      for (; d + W <= dim; d += W) store(average + d, E::get_vector(x + d) + load<vf>(last + d) * decay);
      for (; d < dim; ++d) average[d] = E::get(x + d) + last[d] * decay;
      write_unit<E>(average, (typename E::Value*)args.keys + t * row + offset, dim, args.scale[head]);
      last = average;
    }
  });
}

template <class E>
void make_values(const MemoryValues& args) {
  typedef typename E::Value Value;
  const int64_t dim = args.tokens.head_dim, row = args.tokens.heads * dim;
  for_streams(args.tokens, args.threads, [&](int64_t sequence, int64_t head, int64_t offset, int64_t past) {
    const float share = args.share[head], rest = 1 - share;
    const int64_t first = args.tokens.starts[sequence];
    for (int64_t t = first; t < args.tokens.starts[sequence + 1]; ++t) {
      const Value* x = (const Value*)args.x + t * row + offset;
      float* mixed = args.mixed + t * row + offset;
      // The token before is brought to one form first: two loops for the two forms would not round alike.
      if (t == first)
        __builtin_memcpy(mixed, args.before + past, size_t(dim) * sizeof(float));
      else
        for (int64_t d = 0; d < dim; ++d) mixed[d] = E::get(x - row + d);
      int64_t d = 0;
      for (; d + W <= dim; d += W) store(mixed + d, E::get_vector(x + d) * rest + load<vf>(mixed + d) * share);
      for (; d < dim; ++d) mixed[d] = E::get(x + d) * rest + mixed[d] * share;
      write_unit<E>(mixed, (Value*)args.values + t * row + offset, dim, args.scale[head]);
    }
  });
}

template <class E>
void softmax_row(const float* x, typename E::Value* y, int64_t width) {
  vf best = splat(-infinity());
  float m = -infinity();
  int64_t i = 0;
  for (; i + W <= width; i += W) {
    const vf v = load<vf>(x + i);
    best = v > best ? v : best;
  }
  for (; i < width; ++i) m = x[i] > m ? x[i] : m;
  m = max(best) > m ? max(best) : m;
  auto weight = [&](vf v) {
    const vf below = (v - m) * log2_e;
    return exp2_nonpositive<E::exp2_degree>(below > 0.0f ? vf{} : below);
  };
  vf sums = {};
  float rest = 0;
  for (i = 0; i + W <= width; i += W) sums += weight(load<vf>(x + i));
  for (; i < width; ++i) rest += weight(splat(x[i]))[0];
  const float inverse = 1 / (sum(sums) + rest);
  for (i = 0; i + W <= width; i += W) E::put_vector(y + i, weight(load<vf>(x + i)) * inverse);
  for (; i < width; ++i) E::put(y + i, weight(splat(x[i]))[0] * inverse);
}

template <class E>
void make_softmax(const Softmax& args) {
  parallel_for(args.rows, 4, args.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r)
      softmax_row<E>(args.x + r * args.width, (typename E::Value*)args.y + r * args.width, args.width);
  });
}

void memory_keys(const MemoryKeys& args) { args.type == Type::f32 ? make_keys<F32>(args) : make_keys<BF16>(args); }
void memory_values(const MemoryValues& args) { args.type == Type::f32 ? make_values<F32>(args) : make_values<BF16>(args); }
void softmax_rows(const Softmax& args) { args.type == Type::f32 ? make_softmax<F32>(args) : make_softmax<BF16>(args); }

THRESHER_ISA_END
