// Which rows of K and V one forward pass reads, worked out once and used by every layer.
#pragma once
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "host/index.h"
#include "api/kernels.h"

namespace thresher {

// Memory that outlives a pass, so that decoding does not allocate. Plans may share one: they take turns, a call at a time.
struct Workspace {
  std::recursive_mutex turn;
  std::vector<char> scratch;
  std::vector<float> partials;
  std::vector<char> activations;
  std::vector<char> sparse;
  std::vector<float> doubts;
  std::vector<char> escalated;
};

class Plan {
 public:
  Plan(const Kernels* kernels, Workspace* workspace, Type type, int q_heads, int kv_heads, int head_dim, int threads);

  // `runs` hold `layers` layers and cover [0, past + queries) without holes; the last one takes the new rows. window = 0: dense.
  // With an index, the layers it covers read its choice of [begin, end), `budget` tokens a query head, and all rows before and
  // after. The index must outlive the plan.
  void add(int64_t queries, int64_t past, int64_t window, int64_t sinks, int layers, std::vector<Run> runs, Index* index = nullptr,
           int64_t end = 0, int64_t budget = 0);

  // Raises std::invalid_argument for a layer that the sequences do not have.
  void attend(Attention args);

  // Copies of what each layer attends with and to, [layers, tokens, q_heads, head_dim] of the plan's type: queries, outputs,
  // and what dense attention makes of the same queries. Null: not wanted.
  void capture(char* queries, char* outputs, char* dense);
  Workspace& workspace() { return *workspace_; }
  bool fits(Type type, int q_heads, int kv_heads, int head_dim, int64_t tokens) const;
  int64_t rows_read(int64_t layer_window);  // rows of K (and as many of V) a dense layer reads, per KV head

 private:
  struct Work {
    std::vector<Sequence> sequences;
    std::vector<SparseItem> sparse;  // in order of their steps
    bool certify = false;
    std::vector<Item> items;
    int64_t fold_count = 0;
    std::vector<Span> spans;
    std::vector<Slots> slots;
    int64_t slot_count = 0;
    int64_t rows_read = 0;
  };
  bool is_sparse(size_t sequence, int layer, int64_t layer_window) const;
  const Work& work(int layer, int64_t layer_window);
  void run(Attention args, const Work& work);
  void add_sparse(Work& work, size_t sequence);
  void place_sparse();

  const Kernels* kernels_;
  Workspace* workspace_;
  Attention shape_{};
  int64_t tokens_ = 0;
  int layers_ = 0;
  std::vector<std::shared_ptr<const Index::State>> states_;  // what `sparse_` points to
  std::vector<std::vector<Run>> runs_;
  std::vector<Sequence> sequences_;
  std::deque<Sparse> sparse_;      // of the sequences that have an index
  std::vector<Sparse*> sparse_of_;  // of each sequence, or null
  std::map<std::pair<int64_t, std::vector<bool>>, Work> work_;  // by layer window and which sequences are sparse
  std::vector<const Work*> work_of_layer_;
  char *queries_ = nullptr, *outputs_ = nullptr, *dense_ = nullptr;
};

}  // namespace thresher
