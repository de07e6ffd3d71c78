// RMS norm and rotary embedding, the small operations between the large ones.
#pragma once
#include "api/kernels.h"
#include "host/pool.h"
#include "isa/element.h"
#include "isa/namespace.h"
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
