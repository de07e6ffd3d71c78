// Random numbers of the steps that draw.
#pragma once
#include "isa/namespace.h"

THRESHER_ISA_BEGIN

inline uint64_t mixed(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

struct Random {  // a stream for each (seed, position, layer, head)
  uint64_t state;
  Random(uint64_t seed, int64_t position, int layer, int64_t head)
      : state(mixed(mixed(seed + uint64_t(position)) + uint64_t(layer) * 0x10001u + uint64_t(head))) {}
  double uniform() {  // [0, 1)
    state += 0x9e3779b97f4a7c15u;
    return double(mixed(state) >> 11) * 0x1p-53;
  }
};

THRESHER_ISA_END
