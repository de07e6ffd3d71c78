// A whole decoder layer of the Llama family in one call: at one token, calls cost more than some of what they compute.
#pragma once
#include <cstdint>

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

}  // namespace thresher
