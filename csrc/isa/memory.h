// Where rows of keys and values lie, and how memory is asked for ahead of time.
#pragma once
#include "api/kernels.h"
#include "isa/namespace.h"

THRESHER_ISA_BEGIN

inline int64_t padded(int64_t n) { return (n + panel - 1) / panel * panel; }

// Packing is where memory is waited for, and its order of reads is not one that processors foresee: ask for what lies
// some rows further on. Rows mostly follow each other; past the end of a run this asks in vain and does no harm. It is asked into
// the second cache, as that was measured to be faster (docs/results.md).
constexpr int64_t prefetch_distance = 8192;
inline void prefetch(const char* from, int64_t bytes) {
  const char* end = from + bytes;
  for (; from < end; from += 128) {
    __builtin_prefetch(from, 0, 2);
    __builtin_prefetch(from + 64, 0, 2);
  }
}

// Where a position of a run has its key and its value, for a KV head of this layer.
struct RowAddress {
  char *key, *value;
};
inline RowAddress row_address(const Attention& args, const Run& run, int64_t kv_head, int64_t position, int64_t row_bytes) {
  const int64_t plane = run.capacity * row_bytes;
  char* key = run.base + (int64_t(args.layer) * 2 * args.kv_heads + kv_head) * plane + (position - run.start) * row_bytes;
  return {key, key + args.kv_heads * plane};
}

// The run that holds position x; `run` is where the last search ended, positions mostly grow.
inline const Run* run_of(const Sequence& seq, const Run* run, int64_t x) {
  if (x < run->start) run = seq.runs;
  while (run->end <= x) ++run;
  return run;
}

THRESHER_ISA_END
