#include "host/layer.h"

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

void normalize(const Kernels* kernels, Rows args, const void* x, void* y, int64_t rows, int64_t width, int threads) {
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
  const int64_t size = rope.type == Type::f32 ? 4 : 2, width = qkv.in;
  const int64_t q_width = int64_t(rope.q_heads) * rope.head_dim, kv_width = int64_t(rope.kv_heads) * rope.head_dim;
  const int64_t parts[] = {tokens * width * size, tokens * qkv.out * size, tokens * q_width * size,
                           tokens * gate_up.out * size};
  char* buffers[4];
  int64_t bytes = 64;
  for (int64_t part : parts) bytes += (part + 63) / 64 * 64;
  std::vector<char>& memory = plan.workspace().activations;
  if (int64_t(memory.size()) < bytes) memory.resize(size_t(bytes));
  char* at = (char*)((uintptr_t(memory.data()) + 63) / 64 * 64);
  for (int i = 0; i < 4; ++i) {
    buffers[i] = at;
    at += (parts[i] + 63) / 64 * 64;
  }
  char *normed = buffers[0], *rows = buffers[1], *mixed = buffers[2], *gated = buffers[3];

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
  args.layer = index;
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

}  // namespace thresher
