// Dense attention of one item: rows of several sequences against the splits that they see.
#pragma once
#include "api/carver.h"
#include "api/kernels.h"
#include "dense/tile.h"
#include "isa/memory.h"
#include "isa/namespace.h"
#include "isa/softmax.h"

THRESHER_ISA_BEGIN

inline int64_t item_rows(const Attention& args, const Item& item) {
  int64_t rows = 0;
  for (int i = 0; i < item.span_count; ++i) {
    const Span& span = args.spans[item.first_span + i];
    rows += span.query_end - span.query_begin;
  }
  return rows * (args.q_heads / args.kv_heads);
}

// Working memory of an item of so many rows.
struct AttendScratch {
  TileScratch tile;
  void* queries;     // [rows, head_dim]
  float *max, *sum;  // [rows], if partial softmaxes are folded here
  float* acc;        // [rows, head_dim]

  AttendScratch(const Attention& args, int64_t rows, Carver& c) : tile(args, c) {
    c.take(queries, rows * args.head_dim * value_bytes(args.type));
    c.take(max, rows * 4);
    c.take(sum, rows * 4);
    c.take(acc, rows * args.head_dim * 4);
  }
};

template <class E, int D>
void attend_item(const Attention& args, const Item& item, char* memory) {
  typedef typename E::Value Value;
  const int64_t dim = D ? D : args.head_dim, wide = padded(dim), group = args.q_heads / args.kv_heads;
  const int64_t row_bytes = dim * int64_t(sizeof(Value));
  const int64_t rows = item_rows(args, item);
  Carver carver{memory};
  AttendScratch s(args, rows, carver);
  TileScratch& tile = s.tile;
  Value* queries = (Value*)s.queries;
  int64_t row = 0;
  for (int i = 0; i < item.span_count; ++i) {
    const Span& span = args.spans[item.first_span + i];
    const Sequence& seq = args.sequences[span.sequence];
    for (int64_t t = span.query_begin; t < span.query_end; ++t)
      for (int64_t g = 0; g < group; ++g, ++row)
        __builtin_memcpy(queries + row * dim,
                         (const Value*)args.q + (seq.query_row + t) * args.q_token +
                             (item.kv_head * group + g) * args.q_head,
                         row_bytes);
  }
  if (item.fold)
    for (int64_t r = 0; r < rows; ++r) {
      s.max[r] = -infinity();
      s.sum[r] = 0;
      __builtin_memset(s.acc + r * dim, 0, dim * sizeof(float));
    }
  // All spans of an item see the same rows of K and V; the longest view of them decides how many there are.
  const Sequence* longest = nullptr;
  int64_t total = 0;
  for (int i = 0; i < item.span_count; ++i) {
    const Span& span = args.spans[item.first_span + i];
    const Sequence& seq = args.sequences[span.sequence];
    if (seq.past + span.query_end > total) {
      total = seq.past + span.query_end;
      longest = &seq;
    }
  }
  for (int64_t part = item.split_begin; part < item.split_end; ++part) {
    const int64_t begin = part * split, end = begin + split < total ? begin + split : total;
    const int keys = int(end - begin);
    if (item.fold) {  // skip what no row of this block sees
      const Span& span = args.spans[item.first_span];
      const int64_t first = longest->past + span.query_begin;
      const Visible v = visible(args, *longest, first, begin, end);
      if (v.low >= keys && v.sink_low >= v.sink_high) continue;
    }
    int filled = 0;
    for (int i = 0; i < longest->run_count && filled < keys; ++i) {
      const Run& run = longest->runs[i];
      if (run.end <= begin + filled) continue;
      const RowAddress first = row_address(args, run, item.kv_head, begin + filled, row_bytes);
      const int n = int(run.end - begin < keys ? run.end - begin : keys) - filled;
      for (int j = 0; j < n; ++j) {
        tile.key_rows[filled + j] = first.key + j * row_bytes;
        tile.value_rows[filled + j] = first.value + j * row_bytes;
      }
      filled += n;
    }
    // Rows in tiles; a tile may cross spans.
    int64_t done = 0;
    int at = 0;
    int64_t in_span = 0;
    while (done < rows) {
      const int64_t left = rows - done, tiles_left = (left + tile_rows - 1) / tile_rows;
      const int count = int((left + tiles_left - 1) / tiles_left);  // alike, as in linear layers
      Visible see[tile_rows];
      float top[tile_rows], total_weight[tile_rows];
      int64_t slot[tile_rows];
      for (int r = 0; r < count; ++r) {
        const Span* span = args.spans + item.first_span + at;
        if (in_span == (span->query_end - span->query_begin) * group) {
          ++at, ++span;
          in_span = 0;
        }
        const Sequence& seq = args.sequences[span->sequence];
        const int64_t t = span->query_begin + in_span / group, head = item.kv_head * group + in_span % group;
        see[r] = visible(args, seq, seq.past + t, begin, end);
        const Slots& slots = args.slots[span->sequence];
        slot[r] = slots.begin + (t * args.q_heads + head) * slots.count + part - (part < slots.sink_splits ? 0 : slots.gap);
        ++in_span;
      }
      attend_tile<E, D>(args, tile, count, queries + done * dim, see, keys, done == 0, rows <= tile_rows, top, total_weight,
                        [](float*) {});
      for (int r = 0; r < count; ++r) {
        if (item.fold) {
          fold(s.max[done + r], s.sum[done + r], s.acc + (done + r) * dim, top[r], total_weight[r],
               tile.acc + r * wide, dim);
        } else {
          float* to = args.partials + slot[r] * (dim + 2);
          to[0] = top[r];
          to[1] = total_weight[r];
          __builtin_memcpy(to + 2, tile.acc + r * wide, dim * sizeof(float));
          if (args.weights)
            __builtin_memcpy((Value*)args.weights + slot[r] * split, (const Value*)tile.weights + r * split, keys * sizeof(Value));
        }
      }
      done += count;
    }
  }
  if (!item.fold) return;
  const Span& span = args.spans[item.first_span];
  const Sequence& seq = args.sequences[span.sequence];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = seq.query_row + span.query_begin + r / group, head = item.kv_head * group + r % group;
    const bool empty = seq.past + span.query_begin + r / group < args.blank;
    write_row<E>((Value*)args.out + (token * args.q_heads + head) * dim, s.acc + r * dim, s.sum[r], dim, empty);
  }
}

// Adds to a sequence's votes what its new tokens weigh the rows of a KV head, when their partial softmaxes are there.
template <class E>
void vote(const Attention& args, int32_t sequence, int64_t kv_head) {
  typedef typename E::Value Value;
  const Sequence& seq = args.sequences[sequence];
  const Slots& slots = args.slots[sequence];
  const int64_t size = args.head_dim + 2, group = args.q_heads / args.kv_heads, total = seq.past + seq.queries;
  float* votes = seq.votes + (args.layer * args.kv_heads + kv_head) * seq.votes_stride;
  for (int64_t i = 0; i < seq.queries * group; ++i) {
    const int64_t first = slots.begin + (i / group * args.q_heads + kv_head * group + i % group) * slots.count;
    const float* parts = args.partials + first * size;
    float top = -infinity(), sum = 0, none = 0;
    for (int64_t n = 0; n < slots.count; ++n) fold(top, sum, &none, parts[n * size], parts[n * size + 1], &none, 0);
    for (int64_t n = 0; n < slots.count; ++n) {
      if (parts[n * size + 1] == 0) continue;
      const int64_t begin = (n < slots.sink_splits ? n : n + slots.gap) * split, keys = total - begin < split ? total - begin : split;
      const float scale = exp2_nonpositive(parts[n * size] - top) / sum;
      const Value* weights = (const Value*)args.weights + (first + n) * split;
      int64_t k = 0;
      for (; k + W <= keys; k += W) store(votes + begin + k, load<vf>(votes + begin + k) + E::get_vector(weights + k) * scale);
      for (; k < keys; ++k) votes[begin + k] += E::get(weights + k) * scale;
    }
  }
}

// New keys and values go behind the rows that are there, all in the last run.
template <class E>
void append_token(const Attention& args, const Sequence& seq, int64_t t) {
  typedef typename E::Value Value;
  const Run& tail = seq.runs[seq.run_count - 1];
  const int64_t row_bytes = args.head_dim * int64_t(sizeof(Value));
  const Value* k = (const Value*)args.k + (seq.query_row + t) * args.k_token;
  const Value* v = (const Value*)args.v + (seq.query_row + t) * args.v_token;
  for (int64_t h = 0; h < args.kv_heads; ++h) {
    const RowAddress to = row_address(args, tail, h, seq.past + t, row_bytes);
    __builtin_memcpy(to.key, k + h * args.k_head, row_bytes);
    __builtin_memcpy(to.value, v + h * args.v_head, row_bytes);
  }
}

THRESHER_ISA_END
