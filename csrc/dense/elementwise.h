// RMS norm and rotary embedding, the small operations between the large ones.
#pragma once
#include "api/kernels.h"
#include "host/pool.h"
#include "isa/element.h"
#include "isa/namespace.h"
#include "isa/softmax.h"
#include "isa/vector.h"

THRESHER_ISA_BEGIN

template <class E>
inline void norm_row(const typename E::Value* x, typename E::Value* y, const float* weight, int64_t width, float eps) {
  vf squares = {};
  float rest = 0;
  int64_t i = 0;
  for (; i + W <= width; i += W) {
    vf v = E::get_vector(x + i);
    squares += v * v;
  }
  for (; i < width; ++i) rest += E::get(x + i) * E::get(x + i);
  const float scale = 1.0f / __builtin_sqrtf((sum(squares) + rest) / float(width) + eps);
  for (i = 0; i + W <= width; i += W) E::put_vector(y + i, E::get_vector(x + i) * scale * load<vf>(weight + i));
  for (; i < width; ++i) E::put(y + i, E::get(x + i) * scale * weight[i]);
}

template <class E>
void norm_rows(const RmsNorm& args) {
  typedef typename E::Value Value;
  parallel_for(args.rows, 16, args.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r)
      norm_row<E>((const Value*)args.x + r * args.width, (Value*)args.y + r * args.width, args.weight, args.width, args.eps);
  });
}

void rms_norm(const RmsNorm& args) {
  if (args.type == Type::f32)
    norm_rows<F32>(args);
  else
    norm_rows<BF16>(args);
}

// x[i], x[i + half] = x[i] cos[i] - x[i + half] sin[i], x[i + half] cos[i + half] + x[i] sin[i + half]
template <class E>
inline void rotate(typename E::Value* x, const typename E::Value* cos, const typename E::Value* sin, int64_t dim) {
  const int64_t half = dim / 2;
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    vf a = E::get_vector(x + i), b = E::get_vector(x + half + i);
    E::put_vector(x + i, a * E::get_vector(cos + i) - b * E::get_vector(sin + i));
    E::put_vector(x + half + i, b * E::get_vector(cos + half + i) + a * E::get_vector(sin + half + i));
  }
  for (; i < half; ++i) {
    const float a = E::get(x + i), b = E::get(x + half + i);
    E::put(x + i, a * E::get(cos + i) - b * E::get(sin + i));
    E::put(x + half + i, b * E::get(cos + half + i) + a * E::get(sin + half + i));
  }
}

template <class E>
void rope_rows(const Rope& args) {
  typedef typename E::Value Value;
  parallel_for(args.tokens, 16, args.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      Value* head = (Value*)args.qkv + t * args.token_stride;
      for (int32_t h = 0; h < args.q_heads + args.kv_heads; ++h, head += args.head_dim) {
        const float* norm = h < args.q_heads ? args.q_norm : args.k_norm;
        if (norm) norm_row<E>(head, head, norm, args.head_dim, args.eps);
        rotate<E>(head, (const Value*)args.cos + t * args.rotary_dim, (const Value*)args.sin + t * args.rotary_dim,
                  args.rotary_dim);
      }
    }
  });
}

void rope(const Rope& args) {
  if (args.type == Type::f32)
    rope_rows<F32>(args);
  else
    rope_rows<BF16>(args);
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

void softmax_rows(const Softmax& args) {
  parallel_for(args.rows, 4, args.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float* x = args.x + r * args.width;
      if (args.type == Type::f32)
        softmax_row<F32>(x, (float*)args.y + r * args.width, args.width);
      else
        softmax_row<BF16>(x, (BF16::Value*)args.y + r * args.width, args.width);
    }
  });
}

// Step by step, so that the bits do not depend on how a sequence is cut into passes.
void leaky(const Leaky& args) {
  parallel_for(args.sequences * args.heads, 1, args.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sequence = i / args.heads, head = i % args.heads, row = args.heads * args.head_dim;
      const float* last = args.before + i * args.head_dim;
      for (int64_t t = args.starts[sequence]; t < args.starts[sequence + 1]; ++t) {
        const float* x = args.x + t * row + head * args.head_dim;
        float* y = args.y + t * row + head * args.head_dim;
        const float decay = args.decay[t * args.decay_stride + head];
        for (int64_t d = 0; d < args.head_dim; ++d) y[d] = x[d] + decay * last[d];
        last = y;
      }
    }
  });
}

// A plain sweep over memory: what the machine can read, to hold the other kernels against.
float read_memory(const float* data, int64_t count, int threads) {
  float sums[most_threads] = {}, total = 0;
  parallel_for(count / (8 * W), 65536 / (8 * W), threads, [&](int64_t begin, int64_t end, int thread) {
    vf acc[8] = {};
    for (int64_t at = begin * 8 * W; at < end * 8 * W; at += 8 * W)
      for (int j = 0; j < 8; ++j) acc[j] += load<vf>(data + at + j * W);
    for (int j = 0; j < 8; ++j) sums[thread] += sum(acc[j]);
  });
  for (float x : sums) total += x;
  return total;
}

THRESHER_ISA_END
