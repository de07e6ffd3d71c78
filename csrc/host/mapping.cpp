#include "host/mapping.h"

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <mutex>

namespace thresher {

struct Mapping {
  std::atomic<uintptr_t> begin{0}, end{0};  // end 0: free
  std::atomic<bool> cut{false};
  Mapping* next = nullptr;
};

namespace {

std::mutex changing;
std::atomic<Mapping*> mappings{nullptr};  // all there ever were, free ones among them
struct sigaction before;                  // what SIGBUS did
uintptr_t page;

bool replace(uintptr_t address) {
  for (Mapping* m = mappings; m; m = m->next) {
    const uintptr_t begin = m->begin, end = m->end;
    if (address < begin || address >= end) continue;
    const uintptr_t from = address / page * page;
    m->cut = true;
    return mmap(reinterpret_cast<void*>(from), end - from, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != MAP_FAILED;
  }
  return false;
}

// Only what may be called in a signal handler: mmap is a bare system call.
void on_bus_error(int number, siginfo_t* info, void* context) {
  const int saved = errno;
  const bool replaced = info->si_code == BUS_ADRERR && replace(reinterpret_cast<uintptr_t>(info->si_addr));
  errno = saved;
  if (replaced) return;  // and read again
  if (before.sa_flags & SA_SIGINFO)
    before.sa_sigaction(number, info, context);
  else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN)
    before.sa_handler(number);
  else
    sigaction(number, &before, nullptr);
}

void install() {
  page = uintptr_t(sysconf(_SC_PAGESIZE));
  struct sigaction action{};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, &before);
}

}  // namespace

Mapping* watch(uintptr_t begin, size_t bytes) {
  const std::lock_guard<std::mutex> lock(changing);
  static std::once_flag once;
  std::call_once(once, install);
  Mapping* m = mappings;
  while (m && m->end) m = m->next;
  if (!m) {
    m = new Mapping;
    m->next = mappings;
    mappings = m;
  }
  m->cut = false;
  m->begin = begin;
  m->end = begin + bytes;
  return m;
}

void unwatch(Mapping* mapping) {
  const std::lock_guard<std::mutex> lock(changing);
  mapping->end = 0;
}

bool was_cut(const Mapping* mapping) { return mapping->cut; }

}  // namespace thresher
