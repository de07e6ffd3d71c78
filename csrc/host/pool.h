// The threads of this process that kernels run on. Work is handed out piece by piece, so a thread that the machine has not
// scheduled takes nothing and nobody waits for it. Results do not depend on who computes what.
#pragma once
#include <cstdint>

namespace thresher {

constexpr int most_threads = 1024;
constexpr int most_phases = 8;

// Items [0, count) in pieces of `piece`. run(context, begin, end, thread): no two calls at once have the same thread number.
struct Phase {
  void (*run)(const void* context, int64_t begin, int64_t end, int thread);
  const void* context;
  int64_t count;
  int64_t piece;
  bool in_order;  // pieces begin one after another; else each thread first takes those of its own share, which lie together
  bool waits;     // for all phases before it; else it begins when their last pieces are handed out
};

// Runs all phases on up to `threads` threads; alone on this one while another caller has the pool.
void run_phases(const Phase* phases, int count, int threads);

template <class F>  // f(begin, end, thread)
Phase phase_of(const F& f, int64_t count, int64_t piece, bool in_order, bool waits) {
  return {[](const void* context, int64_t begin, int64_t end, int thread) { (*static_cast<const F*>(context))(begin, end, thread); },
          &f, count, piece, in_order, waits};
}

template <class F>  // f(begin, end, thread), each thread on a share of its own as long as all keep up
void parallel_for(int64_t count, int64_t piece, int threads, const F& f) {
  const Phase phase = phase_of(f, count, piece, false, false);
  run_phases(&phase, 1, threads);
}

// For loops that wait for another thread: the longer they wait, the less they hold on to the processor.
class Patience {
 public:
  void wait();

 private:
  int64_t waits_ = 0, since_ = 0;
};

}  // namespace thresher
