// How far an output may be from dense attention by what its sample shows, and dense attention where that is too far.
#pragma once
#include "api/carver.h"
#include "api/kernels.h"
#include "dense/attend.h"
#include "dense/tile.h"
#include "isa/memory.h"
#include "isa/namespace.h"
#include "isa/softmax.h"
#include "sparse/layout.h"

THRESHER_ISA_BEGIN

// The estimated relative error of a merged row: sqrt(sum a |v - o|^2) / (sum of weights * |o|); infinite without a sample.
inline float relative_error(const float* parts, const float* variances, int64_t count, int64_t dim, float max, float sum, const float* acc) {
  double weight = 0, square = 0, along = 0, norm = 0;
  for (int64_t d = 0; d < dim; ++d) norm += double(acc[d] / sum) * double(acc[d] / sum);
  for (int64_t i = 0; i < count; ++i) {
    const float* part = parts + i * (dim + 2);
    if (part[0] == -infinity()) continue;
    const float* variance = variances + i * (dim + 2);
    const double scale = __builtin_exp2(2 * double(part[0] - max));
    weight += variance[0] * scale;
    square += variance[1] * scale;
    for (int64_t d = 0; d < dim; ++d) along += variance[2 + d] * scale * double(acc[d] / sum);
  }
  if (weight == 0) return infinity();  // no candidate was drawn: nothing is known of the rest
  const double total = square - 2 * along + norm * weight;
  // What is not a number stays so, and is certain of nothing.
  return total <= 0 ? 0 : float(__builtin_sqrt(total / (norm > 0 ? norm : 1e-30)) / sum);
}

// One query head over all rows, where the estimate is too uncertain.
template <class E, int D>
void attend_densely(const Attention& args, const Sequence& seq, int64_t head, char* memory) {
  typedef typename E::Value Value;
  const int64_t dim = D ? D : args.head_dim, total = seq.past + 1, row_bytes = dim * int64_t(sizeof(Value));
  const int64_t kv_head = head / group_of(args);
  Carver carver{memory};
  AttendScratch s(args, 1, carver);
  const Value* q = (const Value*)args.q + seq.query_row * args.q_token + head * args.q_head;
  float max = -infinity(), sum = 0;
  __builtin_memset(s.acc, 0, size_t(dim) * sizeof(float));
  const Run* run = seq.runs;
  for (int64_t begin = 0; begin < total; begin += split) {
    const int keys = int(total - begin < split ? total - begin : split);
    for (int j = 0; j < keys; ++j) {
      run = run_of(seq, run, begin + j);
      const RowAddress at = row_address(args, *run, kv_head, begin + j, row_bytes);
      s.tile.key_rows[j] = at.key;
      s.tile.value_rows[j] = at.value;
    }
    const Visible see{clip(args.blank - begin, keys), keys, 0, 0};
    float top, weight;
    attend_tile<E, D>(args, s.tile, 1, q, &see, keys, true, true, &top, &weight, [](float*) {});
    fold(max, sum, s.acc, top, weight, s.tile.acc, dim);
  }
  write_row<E>((Value*)args.out + (seq.query_row * args.q_heads + head) * dim, s.acc, sum, dim,
               seq.past < args.blank);
}

THRESHER_ISA_END
