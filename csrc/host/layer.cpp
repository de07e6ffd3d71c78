#include "host/layer.h"

#include "api/carver.h"

namespace thresher {
namespace {

void apply(const Kernels* kernels, Linear args, const void* x, int64_t rows, void* y, const void* add, int threads) {
  args.x = x;
  args.x_stride = args.in;
  args.rows = rows;
  args.y = y;
  args.y_stride = args.out;
  args.add = add;
  args.threads = threads;
  kernels->linear(args);
}

void normalize(const Kernels* kernels, RmsNorm args, const void* x, void* y, int64_t rows, int64_t width, int threads) {
  args.x = x;
  args.y = y;
  args.rows = rows;
  args.width = width;
  args.threads = threads;
  kernels->rms_norm(args);
}

}  // namespace

void Layer::run(Plan& plan, void* hidden, int64_t tokens, const void* cos, const void* sin, int rotary_dim,
                int threads) const {
  if (!plan.fits(rope.type, rope.q_heads, rope.kv_heads, rope.head_dim, tokens))
    throw std::invalid_argument("Layer.run: the plan is for other heads or another number of tokens");
  const std::lock_guard<std::recursive_mutex> lock(plan.workspace().turn);
  const int64_t size = value_bytes(rope.type), width = qkv.in;
  const int64_t q_width = int64_t(rope.q_heads) * rope.head_dim, kv_width = int64_t(rope.kv_heads) * rope.head_dim;
  char *normed, *rows, *mixed, *gated;
  auto place = [&](Carver carver) {
    carver.take(normed, tokens * width * size);
    carver.take(rows, tokens * qkv.out * size);
    carver.take(mixed, tokens * q_width * size);
    carver.take(gated, tokens * gate_up.out * size);
    return carver.bytes;
  };
  place(Carver{plan.workspace().activations.reserve(place(Carver{nullptr}))});

  normalize(kernels, norm, hidden, normed, tokens, width, threads);
  apply(kernels, qkv, normed, tokens, rows, nullptr, threads);
  Rope turn = rope;
  turn.qkv = rows;
  turn.token_stride = qkv.out;
  turn.tokens = tokens;
  turn.rotary_dim = rotary_dim;
  turn.cos = cos;
  turn.sin = sin;
  turn.threads = threads;
  kernels->rope(turn);
  Attention args{};
  args.layer = layer;
  args.q = rows;
  args.k = rows + q_width * size;
  args.v = rows + (q_width + kv_width) * size;
  args.q_token = args.k_token = args.v_token = qkv.out;
  args.q_head = args.k_head = args.v_head = rope.head_dim;
  args.out = mixed;
  args.scale = scale;
  args.window = window;
  plan.attend(args);
  apply(kernels, out, mixed, tokens, hidden, hidden, threads);
  normalize(kernels, mlp_norm, hidden, normed, tokens, width, threads);
  apply(kernels, gate_up, normed, tokens, gated, nullptr, threads);
  apply(kernels, down, gated, tokens, hidden, hidden, threads);
}

void PersistentMemory::run(const Kernels* kernels, const void* x, void* y, int64_t rows, float* scores, void* weights,
                           int threads) const {
  const int64_t heads = int64_t(keys.size()), size = value_bytes(type);
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t head_dim = keys[h].in, pairs = keys[h].out, offset = h * head_dim * size;
    Linear args = keys[h];
    args.x = (const char*)x + offset;
    args.x_stride = heads * head_dim;
    args.rows = rows;
    args.y = scores;
    args.y_stride = pairs;
    args.y_f32 = true;
    args.threads = threads;
    kernels->linear(args);
    kernels->softmax({type, scores, weights, rows, pairs, threads});
    args = values[h];
    args.x = weights;
    args.x_stride = pairs;
    args.rows = rows;
    args.y = (char*)y + offset;
    args.y_stride = heads * head_dim;
    args.y_f32 = type == Type::f32;
    args.threads = threads;
    kernels->linear(args);
  }
}

}  // namespace thresher
