// One piece of memory dealt out as arrays.
#pragma once
#include <cstdint>

namespace thresher {
namespace {  // built with the flags of whoever includes it

// Aligned arrays, one behind the other; without memory it only counts their bytes.
struct Carver {
  char* at;
  int64_t bytes = 0;
  template <class T>
  void take(T*& part, int64_t size) {
    part = (T*)(at ? at + bytes : nullptr);
    bytes += (size + 63) / 64 * 64;
  }
};

// What an owner of working memory takes: its constructor ends in a Carver.
template <class Scratch, class... Given>
int64_t bytes_of(const Given&... given) {
  Carver counted{nullptr};
  Scratch(given..., counted);
  return counted.bytes;
}

}  // namespace
}  // namespace thresher
