// The steps of a sparse sequence in one layer, and the working memory of one thread that they need.
#pragma once
#include "api/carver.h"
#include "api/kernels.h"
#include "host/pool.h"
#include "isa/namespace.h"
#include "sparse/choose.h"
#include "sparse/gather.h"
#include "sparse/group.h"
#include "sparse/query.h"
#include "sparse/scan.h"
#include "sparse/tail.h"
#include "sparse/verify.h"

THRESHER_ISA_BEGIN

struct GatherScratch {
  GroupScratch group;
  VerifyScratch exact;
  TailScratch tail;

  GatherScratch(const Attention& args, const Method& m, Carver& c) : group(args, c), exact(args, c), tail(m, c) {}
};

template <class E, int D>
void gather_item(const Attention& args, const SparseItem& item, char* memory) {
  const Sparse& sparse = *args.sequences[item.sequence].sparse;
  Carver carver{memory};
  GatherScratch s(args, *sparse.method, carver);
  Group<E, D> group(args, item, s.group);
  if (item.part == gather_parts) {
    attend_tail(group, s.tail);
  } else {
    Gather<E, D> gather(group);
    if (sparse.method->take == Take::verify)
      gather_verified(gather, s.exact);
    else
      gather.add_all(item.part, gather_parts);
    if (item.part == 0) __atomic_fetch_add(&sparse.counters->readings, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&sparse.counters->rows, gather.rows, __ATOMIC_RELAXED);
    __atomic_fetch_add(&sparse.counters->head_rows, gather.head_rows, __ATOMIC_RELAXED);
  }
  group.write(item.part);
}

// One step of a sparse sequence, when those it needs are done.
template <class E, int D>
void run_step(const Attention& args, const SparseItem& item, char* memory) {
  int32_t* done = args.sequences[item.sequence].sparse->done + step_kinds * item.kv_head;
  Patience patience;
  while (item.count && __atomic_load_n(done + int(item.after), __ATOMIC_ACQUIRE) < item.count) patience.wait();
  switch (item.step) {
    case Step::query: query_item<E>(args, item, memory); break;
    case Step::sample: sample_item(args, item, memory); break;
    case Step::scan: scan_item<E>(args, item, memory); break;
    case Step::choose: choose_item(args, item, memory); break;
    case Step::list: list_item(args, item); break;
    case Step::gather: gather_item<E, D>(args, item, memory); break;
  }
  __atomic_fetch_add(done + int(item.step), 1, __ATOMIC_RELEASE);
}

// Of the largest step: one begins when the thread's last one has ended.
inline int64_t step_bytes(const Attention& args, const Sparse& sparse) {
  const Method& m = *sparse.method;
  const int64_t each[] = {bytes_of<QueryScratch>(m), bytes_of<BoundScratch>(sparse), bytes_of<ScanScratch>(args, m),
                          bytes_of<ChooseScratch>(sparse), bytes_of<GatherScratch>(args, m)};
  int64_t most = 0;
  for (int64_t bytes : each) most = bytes > most ? bytes : most;
  return most;
}

THRESHER_ISA_END
