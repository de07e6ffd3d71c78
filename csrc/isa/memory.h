// Where rows of keys and values lie, and how memory is asked for ahead of time.
#pragma once
#include "api/kernels.h"
#include "isa/namespace.h"

THRESHER_ISA_BEGIN

inline int64_t padded(int64_t n) { return (n + panel - 1) / panel * panel; }

// Packing is where memory is waited for, and its order of reads is not one that processors foresee: ask for what lies
// some rows further on. Rows mostly follow each other; past the end of a run this asks in vain and does no harm.
constexpr int64_t prefetch_distance = 8192;
inline void prefetch(const char* from, int64_t bytes) {
  const char* end = from + bytes;
  for (; from < end; from += 128) {
    __builtin_prefetch(from);
    __builtin_prefetch(from + 64);
  }
}

// The run that holds position x; `run` is where the last search ended, positions mostly grow.
inline const Run* run_of(const Sequence& seq, const Run* run, int64_t x) {
  if (x < run->start) run = seq.runs;
  while (run->end <= x) ++run;
  return run;
}

THRESHER_ISA_END
