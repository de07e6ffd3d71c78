#include "host/pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <system_error>
#include <thread>

namespace thresher {
namespace {

// How long a thread looks for the next job before it sleeps: longer than the gaps between the layers of a pass, and too short
// to be noticed by whoever else needs the processor.
constexpr int64_t spin_ns = 60000;

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
}

// The pieces of a share that are left, under the number of the job they belong to. A thread that slept through the end of its
// job finds another number, takes nothing and touches nothing: so nobody has to wait until it has left.
struct alignas(64) Share {
  std::atomic<uint64_t> left{0};
  std::atomic<int64_t> end{0};  // the piece after the last
};

struct alignas(64) Stage {
  std::atomic<int64_t> done{0};  // items
  std::atomic<int64_t> count{0};
  std::atomic<int> shares{0};
  std::atomic<bool> waits{false};
  std::atomic<const Phase*> phase{nullptr};
};

class Pool {
 public:
  bool run(const Phase* phases, int count, int threads) {
    const std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
    if (!alone) return false;
    hire(threads);
    const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
    for (int p = 0; p < count; ++p) {
      const Phase& phase = phases[p];
      const int64_t pieces = (phase.count + phase.piece - 1) / phase.piece;
      const int shares = phase.in_order ? 1 : threads;
      Stage& stage = stages_[p];
      stage.done.store(0, std::memory_order_relaxed);
      stage.count.store(phase.count, std::memory_order_relaxed);
      stage.shares.store(shares, std::memory_order_relaxed);
      stage.waits.store(phase.waits, std::memory_order_relaxed);
      stage.phase.store(&phase, std::memory_order_relaxed);
      for (int s = 0; s < shares; ++s) {
        const int64_t begin = pieces * s / shares, end = pieces * (s + 1) / shares;
        shares_[p][s].end.store(end, std::memory_order_relaxed);
        shares_[p][s].left.store(uint64_t(job) << 32 | uint64_t(end - begin), std::memory_order_release);
      }
    }
    phases_.store(count, std::memory_order_relaxed);
    team_.store(threads, std::memory_order_relaxed);
    job_.store(job, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst)) wake_all(job_);
    take_part(job, 0, count);
    for (int p = 0; p < count; ++p) finish(job, p);
    return true;
  }

 private:
  void hire(int threads) {
    if (uint32_t(threads) == wanted_.load(std::memory_order_relaxed)) return;
    wanted_.store(threads, std::memory_order_seq_cst);
    wake_all(wanted_);
    try {
      for (; hired_ < threads; ++hired_) std::thread([this, id = hired_] { work(id); }).detach();
    } catch (const std::system_error&) {
      // The machine gives no more: those that are there do all.
    }
  }

  void work(int id) {
    uint32_t seen = 0;
    for (;;) {
      const uint32_t wanted = wanted_.load(std::memory_order_seq_cst);
      if (id >= int(wanted)) {
        sleep_while(wanted_, wanted);
        continue;
      }
      seen = next_job(seen);
      if (id < team_.load(std::memory_order_acquire)) take_part(seen, id, phases_.load(std::memory_order_acquire));
    }
  }

  uint32_t next_job(uint32_t seen) {
    uint32_t job;
    const int64_t until = now_ns() + spin_ns;
    do {
      for (int i = 0; i < 32; ++i) {
        if ((job = job_.load(std::memory_order_acquire)) != seen) return job;
        relax();
      }
    } while (now_ns() < until);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    while ((job = job_.load(std::memory_order_seq_cst)) == seen) sleep_while(job_, seen);
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    return job;
  }

  void take_part(uint32_t job, int thread, int count) {
    for (int p = 0; p < count; ++p) {
      Stage& stage = stages_[p];
      // Without a piece, so that nobody has to wait for who waits here.
      for (int before = 0; before < p && stage.waits.load(std::memory_order_relaxed); ++before)
        if (!finish(job, before)) return;
      const int shares = stage.shares.load(std::memory_order_relaxed);
      for (int i = 0; i < shares; ++i) {
        int64_t items = 0;
        Share& share = shares_[p][(thread + i) % shares];
        for (int64_t piece; (piece = claim(share, job)) >= 0;) {
          // Holding a piece, the job cannot end.
          const Phase& phase = *stage.phase.load(std::memory_order_relaxed);
          const int64_t begin = piece * phase.piece, end = std::min(begin + phase.piece, phase.count);
          phase.run(phase.context, begin, end, thread);
          items += end - begin;
        }
        if (items) stage.done.fetch_add(items, std::memory_order_release);
      }
    }
  }

  // A piece of the share, or -1.
  static int64_t claim(Share& share, uint32_t job) {
    uint64_t left = share.left.load(std::memory_order_acquire);
    do {
      if (left >> 32 != job || !(left & 0xffffffffu)) return -1;
    } while (!share.left.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel, std::memory_order_acquire));
    return share.end.load(std::memory_order_relaxed) - int64_t(left & 0xffffffffu);
  }

  // Waits until all items of a phase are done; false if the job has ended meanwhile.
  bool finish(uint32_t job, int p) {
    Patience patience;
    while (stages_[p].done.load(std::memory_order_acquire) < stages_[p].count.load(std::memory_order_relaxed)) {
      if (job_.load(std::memory_order_relaxed) != job) return false;
      patience.wait();
    }
    return true;
  }

  std::mutex busy_;
  std::atomic<uint32_t> job_{0}, wanted_{1};
  std::atomic<int> sleepers_{0}, team_{0}, phases_{0};
  int hired_ = 1;  // the caller is thread 0
  Stage stages_[most_phases];
  Share shares_[most_phases][most_threads];
};

// Never freed: threads sleep in it until the process ends.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  Pool* found = the_pool.load(std::memory_order_acquire);
  if (found) return *found;
  static std::once_flag once;
  // A forked child has none of the threads: it begins anew.
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); }); });
  Pool* made = new Pool;
  if (the_pool.compare_exchange_strong(found, made)) return *made;
  delete made;
  return *found;
}

}  // namespace

void Patience::wait() {
  if (++waits_ % 64) return relax();
  const int64_t now = now_ns();
  if (!since_) since_ = now;
  if (now - since_ < spin_ns / 3) return;
  if (now - since_ < 20 * spin_ns) {
    sched_yield();
  } else {
    const timespec nap{0, 50000};
    nanosleep(&nap, nullptr);
  }
}

void run_phases(const Phase* phases, int count, int threads) {
  threads = std::clamp(threads, 1, most_threads);
  int64_t pieces = 0;
  for (int p = 0; p < count; ++p) pieces = std::max(pieces, (phases[p].count + phases[p].piece - 1) / phases[p].piece);
  if (threads > 1 && pieces > 1 && pool().run(phases, count, threads)) return;
  for (int p = 0; p < count; ++p)
    for (int64_t i = 0; i < phases[p].count; i += phases[p].piece)
      phases[p].run(phases[p].context, i, std::min(i + phases[p].piece, phases[p].count), 0);
}

}  // namespace thresher
