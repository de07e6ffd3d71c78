// Building an index: signs of projections, LSH codes and tables.
#pragma once
#include "api/kernels.h"
#include "host/pool.h"
#include "isa/element.h"
#include "isa/namespace.h"
#include "isa/product.h"
#include "sparse/layout.h"
#include "sparse/projection.h"

THRESHER_ISA_BEGIN

template <class E>
void project_planes(const Project& args) {
  typedef typename E::Value Value;
  const int64_t dim = args.head_dim, stream = words(args.count);
  const int64_t tiles_each = (args.rows + tile_rows - 1) / tile_rows;
  parallel_for(args.planes * tiles_each, 16, args.threads, [&](int64_t at, int64_t end, int) {
    for (int64_t i = at; i < end; ++i) {
      const int64_t plane = i / tiles_each, first = i % tiles_each * tile_rows;
      const int rows = int(args.rows - first < tile_rows ? args.rows - first : tile_rows);
      const float* mean = args.mean + plane * dim;
      Value centred[tile_rows * 512];
      float absolute[tile_rows] = {};
      uint64_t* bits = args.bits + (plane * args.rows + first) * stream;
      __builtin_memset(bits, 0, size_t(rows * stream) * 8);
      for (int r = 0; r < rows; ++r) {
        const Value* key = (const Value*)args.keys + plane * args.plane_stride + (first + r) * dim;
        float norm = 0;
        for (int64_t d = 0; d < dim; ++d) {
          const float x = E::get(key + d) - mean[d];
          E::put(centred + r * dim + d, x);
          norm += x * x;
        }
        args.norms[plane * args.rows + first + r] = __builtin_sqrtf(norm);
      }
      project_rows<E>(rows, centred, dim, args.directions, args.count, [&](int64_t p, const float* x) {
        for (int r = 0; r < rows; ++r) {
          bits[r * stream + p / 2] |= uint64_t(positive(x + r * 2 * panel)) << (p % 2 * 32);
          for (int j = 0; j < panel; ++j) absolute[r] += x[r * 2 * panel + j] < 0 ? -x[r * 2 * panel + j] : x[r * 2 * panel + j];
        }
      });
      for (int r = 0; r < rows; ++r) args.absolute[plane * args.rows + first + r] = absolute[r];
    }
  });
}

void project(const Project& args) {
  if (args.type == Type::f32)
    project_planes<F32>(args);
  else
    project_planes<BF16>(args);
}

void codes(const Codes& args) {
  const int64_t stream = words(int64_t(args.key_bits) * args.tables), n = args.rows;
  parallel_for(args.planes * n, 256, args.threads, [&](int64_t at, int64_t end, int) {
    for (int64_t i = at; i < end; ++i) {
      const int64_t plane = i / n, row = i % n;
      uint64_t bits[most_directions / 64 + 1] = {};
      __builtin_memcpy(bits, args.bits + i * stream, size_t(stream) * 8);
      for (int l = 0; l < args.tables; ++l)
        args.codes[(plane * args.tables + l) * n + row] = uint16_t(field(bits, l, args.key_bits));
    }
  });
}

void tables(const Tables& args) {
  const int64_t buckets = int64_t(1) << args.key_bits, n = args.rows;
  parallel_for(args.planes * args.tables, 1, args.threads, [&](int64_t at, int64_t end, int) {
    for (int64_t i = at; i < end; ++i) {
      const uint16_t* codes = args.codes + i * n;
      uint32_t* heads = args.heads + i * (buckets + 1);
      uint16_t* ids = args.ids + i * n;
      __builtin_memset(heads, 0, size_t(buckets + 1) * sizeof(uint32_t));
      for (int64_t row = 0; row < n; ++row) ++heads[codes[row] + 1];
      for (int64_t b = 0; b < buckets; ++b) heads[b + 1] += heads[b];
      // heads[b] walks to the end of bucket b, which is where b + 1 begins: shift back by one bucket afterwards.
      for (int64_t row = 0; row < n; ++row) ids[heads[codes[row]]++] = uint16_t(row);
      for (int64_t b = buckets; b > 0; --b) heads[b] = heads[b - 1];
      heads[0] = 0;
    }
  });
}

THRESHER_ISA_END
