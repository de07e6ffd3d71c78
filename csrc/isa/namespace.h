// Kernels are compiled once for each instruction set (CMakeLists.txt), each time into a namespace of its own. Inside of it is an
// unnamed one: nothing but the table of kernels.cpp may leave an object, or of two functions of one name the linker could pick the
// one that was built for another processor.
#pragma once
#include <stddef.h>
#include <stdint.h>
#if defined(__AVX2__)  // what other instruction sets need, the compiler makes of vector extensions
#include <immintrin.h>
#endif

#ifndef THRESHER_ISA
#define THRESHER_ISA portable
#endif

#define THRESHER_ISA_BEGIN namespace thresher { namespace THRESHER_ISA { namespace {
#define THRESHER_ISA_END }}}

#define ALWAYS_INLINE __attribute__((always_inline)) inline
