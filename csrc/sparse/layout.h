// Where the arrays of a sparse sequence lie.
#pragma once
#include "api/kernels.h"
#include "isa/namespace.h"

THRESHER_ISA_BEGIN

inline int64_t words(int64_t bits) { return (bits + 63) / 64; }

// The arrays of one (indexed layer, KV head).
inline int64_t plane_of(const Attention& args, const Sparse& sparse, int64_t kv_head) {
  return int64_t(sparse.indexed_layer[args.layer]) * args.kv_heads + kv_head;
}

inline int64_t padded_ranks(int64_t n) { return (n + 63) / 64 * 64; }

inline int64_t group_of(const Attention& args) { return args.q_heads / args.kv_heads; }  // query heads of a KV head

// Bitmaps of a KV head in `chosen`.
inline int64_t choices(const Attention& args, const Method& m) { return m.grouping == Grouping::shared ? 1 : group_of(args); }

inline int32_t* listed_of(const Sparse& sparse, int64_t kv_head) {
  return sparse.listed + kv_head * listed_stride(sparse.end - sparse.begin);
}
inline uint32_t* members_of(const Sparse& sparse, int64_t kv_head) {
  return sparse.members + kv_head * (sparse.end - sparse.begin);
}

// The piece of a query head's scores that candidate c, counted from `Sparse::begin`, belongs to.
inline Found& found_of(const Sparse& sparse, int64_t head, int64_t c) {
  return sparse.found[head * ((sparse.ranked + scan_tokens - 1) / scan_tokens) + c / scan_tokens];
}

// Floats as integers of the same order.
inline int32_t sortable(float x) {
  int32_t i;
  __builtin_memcpy(&i, &x, 4);
  return i ^ ((i >> 31) & 0x7fffffff);
}
inline float unsortable(int32_t i) {
  i ^= (i >> 31) & 0x7fffffff;
  float x;
  __builtin_memcpy(&x, &i, 4);
  return x;
}

template <int N>
struct Constant {
  static constexpr int value = N;
};
// Calls f(Constant<R>, first query head) for all query heads of a KV head, at most four at a time.
template <class F>
void for_query_heads(const Attention& args, int64_t kv_head, F f) {
  const int64_t group = group_of(args);
  for (int64_t g = 0; g < group; g += 4) {
    const int64_t first = kv_head * group + g;
    switch (group - g) {
      case 1: f(Constant<1>(), first); break;
      case 2: f(Constant<2>(), first); break;
      case 3: f(Constant<3>(), first); break;
      default: f(Constant<4>(), first);
    }
  }
}

THRESHER_ISA_END
