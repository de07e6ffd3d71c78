// How likely a key was to be found in the tables: the score that it enters the softmax with is corrected by that.
#pragma once
#include "api/kernels.h"
#include "isa/namespace.h"
#include "isa/softmax.h"
#include "isa/vector.h"
#include "sparse/layout.h"

THRESHER_ISA_BEGIN

struct Inclusion {
  const Sparse& sparse;
  const bool known;  // for keys found in tables, and query heads that weigh what they found
  const int64_t plane;
  float query_norm[most_group], query_mean[most_group];  // of each query head: |q|, q . mean
  float inverse_norm[split], is_candidate[split];        // of each row

  template <class E>
  Inclusion(E, const Attention& args, const Sparse& of, int64_t kv_head, const typename E::Value* queries, int64_t dim)
      : sparse(of), known(of.method->rank == Rank::tables && of.method->grouping == Grouping::own),
        plane(plane_of(args, of, kv_head)) {
    if (!known) return;
    const float* mean = sparse.mean + plane * dim;
    for (int64_t g = 0; g < group_of(args); ++g) {
      float norm = 0, along = 0;
      for (int64_t d = 0; d < dim; ++d) {
        const float x = E::get(queries + g * dim + d);
        norm += x * x;
        along += x * mean[d];
      }
      query_norm[g] = __builtin_sqrtf(norm);
      query_mean[g] = along;
    }
  }

  // Of rows that are candidates, in order, or -1.
  void look_up(const int32_t* candidate, int count) {
    if (!known) return;
    const Block* b = sparse.blocks;
    for (int k = 0; k < (count + W - 1) / W * W; ++k) {
      is_candidate[k] = inverse_norm[k] = 0;
      if (k >= count || candidate[k] < 0) continue;
      const int64_t x = sparse.begin + candidate[k];
      if (x < b->begin) b = sparse.blocks;
      while (x >= b->end) ++b;
      const float norm = b->norms[plane * (b->end - b->begin) + x - b->begin];
      inverse_norm[k] = norm > 0 ? 1 / norm : 0;
      is_candidate[k] = 1;
    }
  }

  // log2 of the probability that a key at this cosine is chosen, by linear interpolation.
  vf log_inclusion(vf cosine) const {
    const Method& m = *sparse.method;
    const float last = float(m.log_u_count - 1);
    vf x = (cosine + 1.0f) * (0.5f * last);
    x = x > 0.0f ? (x < last ? x : splat(last)) : vf{};  // 0 for what is not a number
    vi at = __builtin_convertvector(x, vi);
    at = at > m.log_u_count - 2 ? at - at + (m.log_u_count - 2) : at;
    vf low, high;
    for (int j = 0; j < W; ++j) {
      low[j] = m.log_u[at[j]];
      high[j] = m.log_u[at[j] + 1];
    }
    return low + (high - low) * (x - __builtin_convertvector(at, vf));
  }

  // If it is known, corrects the scores x of a query head, and writes 1 - the probabilities if asked for; scale: what scores are multiplied by.
  void adjust(int64_t g, int count, float scale, float* x, float* excluded) const {
    if (!known) return;
    const float inverse = query_norm[g] > 0 ? 1 / query_norm[g] : 0;
    for (int k = 0; k < count; k += W) {
      const vf score = load<vf>(x + k);
      const vf log_u = log_inclusion((score - query_mean[g]) * inverse * load<vf>(inverse_norm + k));
      const vf is = load<vf>(is_candidate + k);
      store(x + k, score - log_u * is * (1 / scale));
      if (excluded) store(excluded + k, (1.0f - exp2_nonpositive(log_u < 0.0f ? log_u : vf{})) * is);
    }
  }
};

THRESHER_ISA_END
