// The table of one instruction set (isa/namespace.h).
#include "api/kernels.h"

#include "attention.h"
#include "dense/elementwise.h"
#include "dense/linear.h"
#include "dense/memory.h"
#include "dense/sample.h"
#include "index/project.h"

#define THRESHER_JOIN2(a, b) a##b
#define THRESHER_JOIN(a, b) THRESHER_JOIN2(a, b)
#define THRESHER_TEXT2(a) #a
#define THRESHER_TEXT(a) THRESHER_TEXT2(a)

namespace thresher {
using namespace THRESHER_ISA;

extern const Kernels THRESHER_JOIN(kernels_, THRESHER_ISA);
const Kernels THRESHER_JOIN(kernels_, THRESHER_ISA) = {
    THRESHER_TEXT(THRESHER_ISA), linear, attend, scratch_bytes, rms_norm, rope, softmax_rows, memory_keys, memory_values, read_memory,
    project, codes, tables, sample_scratch_bytes, sample,
};
}  // namespace thresher
