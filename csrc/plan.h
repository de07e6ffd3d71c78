// Which rows of K and V one forward pass reads, worked out once and used by every layer.
#pragma once
#include <cstdint>
#include <map>
#include <stdexcept>
#include <vector>

#include "kernels.h"

namespace thresher {

// Memory that outlives a pass, so that decoding does not allocate.
struct Workspace {
  std::vector<char> scratch;
  std::vector<float> partials;
  std::vector<char> activations;
};

class Plan {
 public:
  Plan(const Kernels* kernels, Workspace* workspace, Type type, int q_heads, int kv_heads, int head_dim, int threads);

  // `runs` cover [0, past + queries) without holes; the last one takes the new rows. window = 0: dense.
  void add(int64_t queries, int64_t past, int64_t window, int64_t sinks, std::vector<Run> runs);

  void attend(Attention args);
  Workspace& workspace() { return *workspace_; }
  int64_t rows_read(int64_t layer_window);  // rows of K (and as many of V) one layer reads, per KV head

 private:
  struct Work {
    std::vector<Item> items;
    int64_t fold_count = 0;
    std::vector<Span> spans;
    std::vector<Slots> slots;
    int64_t slot_count = 0;
    int64_t rows_read = 0;
  };
  const Work& work(int64_t layer_window);

  const Kernels* kernels_;
  Workspace* workspace_;
  Attention shape_{};
  int64_t tokens_ = 0;
  std::vector<std::vector<Run>> runs_;
  std::vector<Sequence> sequences_;
  std::map<int64_t, Work> work_;  // by layer window
};

}  // namespace thresher
