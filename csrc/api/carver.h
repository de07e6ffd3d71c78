// One piece of memory dealt out as arrays.
#pragma once
#include <cstdint>

namespace thresher {
namespace {  // built with the flags of whoever includes it

// Carves aligned arrays out of memory; with none, only counts bytes.
struct Carver {
  char* at;
  int64_t bytes = 0;
  template <class T>
  void take(T*& part, int64_t size) {
    part = (T*)(at ? at + bytes : nullptr);
    bytes += (size + 63) / 64 * 64;
  }
};

}  // namespace
}  // namespace thresher
