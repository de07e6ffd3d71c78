// A whole decoder layer of the Llama family in one call: at one token, calls cost more than some of what they compute.
#pragma once
#include <cstdint>
#include <vector>

#include "api/kernels.h"
#include "host/plan.h"

namespace thresher {

// The parts of a layer, with everything set that does not change from pass to pass.
struct Layer {
  const Kernels* kernels;
  RmsNorm norm, mlp_norm;
  Linear qkv, out, gate_up, down;
  Rope rope;
  int layer;  // in the KV cache
  float scale;
  int64_t window;

  // hidden += out(attention(norm(hidden))); hidden += down(gated(mlp_norm(hidden))), in place on [tokens, width].
  void run(Plan& plan, void* hidden, int64_t tokens, const void* cos, const void* sin, int rotary_dim,
           int threads) const;
};

// Learned pairs that the heads of a layer answer from: of each head y = softmax(keys x) values, products on packed weights.
struct PersistentMemory {
  Type type;                         // of x and y
  std::vector<Linear> keys, values;  // of each head: head_dim -> pairs, pairs -> head_dim

  // x, y [rows, heads, head_dim]; scores [rows, pairs] float, weights [rows, pairs] of `type`: working memory.
  void run(const Kernels* kernels, const void* x, void* y, int64_t rows, float* scores, void* weights, int threads) const;
};

}  // namespace thresher
