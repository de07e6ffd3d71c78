// Mapped files that another process may cut: a page that is there no more reads as zeros instead of ending the process.
#pragma once
#include <cstddef>
#include <cstdint>

namespace thresher {

struct Mapping;  // never freed, but used again: a signal may come at any time

// Watches memory that a file is mapped to privately, until `unwatch`. Thread-safe.
Mapping* watch(uintptr_t begin, size_t bytes);
void unwatch(Mapping* mapping);

// Whether a page of it was missing when it was read.
bool was_cut(const Mapping* mapping);

}  // namespace thresher
