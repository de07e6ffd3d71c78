// Which rows of K and V one forward pass reads, worked out once and used by every layer.
#pragma once
#include <cstdint>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "api/kernels.h"
#include "host/index.h"

namespace thresher {

// Memory that only grows, aligned to 64 bytes.
class Buffer {
 public:
  char* reserve(int64_t bytes);

 private:
  std::vector<char> memory_;
};

// Memory that outlives a pass, so that decoding does not allocate. Plans may share one: they take turns, a call at a time.
struct Workspace {
  std::recursive_mutex turn;
  Buffer activations, scratch, sparse, partials, weights, variances, fallback;
};

class Plan {
 public:
  Plan(const Kernels* kernels, Workspace* workspace, Type type, int q_heads, int kv_heads, int head_dim, int threads);

  // `runs` hold `layers` layers and cover [0, past + queries) without holes; the last one takes the new rows. window = 0: dense.
  // With an index, the layers it covers read its choice of [begin, end), `budget` tokens a query head, and all rows before and
  // after. The index must outlive the plan. votes: Sequence::votes, of up to decode_queries new tokens that read densely.
  void add(int64_t queries, int64_t past, int64_t window, int64_t sinks, int layers, std::vector<Run> runs, Index* index = nullptr,
           int64_t end = 0, int64_t budget = 0, float* votes = nullptr, int64_t votes_stride = 0);

  // Raises std::invalid_argument for a layer that the sequences do not have.
  void attend(Attention args);

  // Copies of what each layer attends with and to, [layers, tokens, q_heads, head_dim] of the plan's type: queries, outputs,
  // and what dense attention makes of the same queries. Null: not wanted.
  void capture(char* queries, char* outputs, char* dense);
  Workspace& workspace() { return *workspace_; }
  bool fits(Type type, int q_heads, int kv_heads, int head_dim, int64_t tokens) const;
  int64_t rows_read(int64_t layer_window);  // rows of K (and as many of V) a dense layer reads, per KV head

 private:
  // What layers do that have the same window and read the same sequences sparsely.
  struct LayerPlan {
    int64_t layer_window = 0;
    std::vector<Sequence> sequences;
    std::vector<SparseItem> steps;  // in order of their kinds
    bool certify = false, voting = false;
    std::vector<Item> items;  // those that fold come first
    int64_t fold_count = 0;
    std::vector<Span> spans;
    std::vector<Slots> slots;
    int64_t slot_count = 0;
    int64_t rows_read = 0;
  };
  struct SharedSplits;

  const LayerPlan& of_layer(int layer, int64_t layer_window);
  const LayerPlan& dense(int64_t layer_window);
  const LayerPlan& reading(const std::vector<const Sparse*>& sparse, int64_t layer_window);
  void build(LayerPlan& plan);
  void add_steps(LayerPlan& plan, size_t sequence);
  void add_query_blocks(LayerPlan& plan, size_t sequence);
  void add_splits(LayerPlan& plan, size_t sequence, SharedSplits& shared);
  void add_items(LayerPlan& plan, const SharedSplits& shared);
  void check_index(const Index& index, int layers, int64_t queries, int64_t past, int64_t end, int64_t budget) const;
  Sparse sparse_of(const Index& index, const Index::State& state, int64_t end, int64_t budget) const;
  void place_sparse();
  void run(Attention args, const LayerPlan& plan);

  const Kernels* kernels_;
  Workspace* workspace_;
  Attention shape_{};
  int64_t tokens_ = 0;
  int layers_ = 0;
  std::vector<std::shared_ptr<const Index::State>> states_;  // what `sparse_` points to
  std::vector<std::vector<Run>> runs_;
  std::vector<Sequence> sequences_;
  std::deque<Sparse> sparse_;         // of the sequences that have an index
  std::vector<Sparse*> sparse_of_;    // of each sequence, or null
  std::deque<LayerPlan> plans_;       // a few: most layers are alike
  std::vector<const LayerPlan*> plan_of_layer_;
  char *queries_ = nullptr, *outputs_ = nullptr, *dense_ = nullptr;
};

}  // namespace thresher
