// Compiled once for each instruction set (CMakeLists.txt), each time into a namespace of its own. Nothing with
// external linkage but the table may come out of here, or the linker could pick a function built for another processor.
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "pool.h"

#define THRESHER_JOIN2(a, b) a##b
#define THRESHER_JOIN(a, b) THRESHER_JOIN2(a, b)
#define THRESHER_TEXT2(a) #a
#define THRESHER_TEXT(a) THRESHER_TEXT2(a)

namespace thresher {
namespace {
#include "simd.h"
#include "linear.h"
#include "pack.h"
#include "attention.h"
#include "hashing.h"
#include "elementwise.h"
#include "sample.h"
}  // namespace

extern const Kernels THRESHER_JOIN(kernels_, THRESHER_ISA_NAME);
const Kernels THRESHER_JOIN(kernels_, THRESHER_ISA_NAME) = {
    THRESHER_TEXT(THRESHER_ISA_NAME), linear, attend, scratch_bytes, rms_norm, rope, read_memory,
    project, codes, tables, sample_scratch_bytes, sample,
};
}  // namespace thresher
