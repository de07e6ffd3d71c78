#include <cstring>

#include "api/kernels.h"

namespace thresher {
#if defined(__x86_64__)
extern const Kernels kernels_avx512_bf16, kernels_avx512, kernels_avx2;
#endif
extern const Kernels kernels_portable;

namespace {
// Asks for the very features each object was compiled with.
const char* const* supported_names(int* count) {
  static const char* names[4];
  static const int found = [] {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("avx512vbmi"))
      names[n++] = kernels_avx512_bf16.name;
    if (avx512) names[n++] = kernels_avx512.name;
    if (avx2) names[n++] = kernels_avx2.name;
#endif
    names[n++] = kernels_portable.name;
    return n;
  }();
  *count = found;
  return names;
}
}  // namespace

const char* const* kernel_names(int* count) { return supported_names(count); }

const Kernels* find_kernels(const char* name) {
  int count;
  const char* const* names = supported_names(&count);
  const Kernels* all[] = {
#if defined(__x86_64__)
      &kernels_avx512_bf16, &kernels_avx512, &kernels_avx2,
#endif
      &kernels_portable};
  for (int i = 0; i < count; ++i)
    if (!std::strcmp(names[i], name))
      for (const Kernels* k : all)
        if (!std::strcmp(k->name, name)) return k;
  return nullptr;
}
}  // namespace thresher
