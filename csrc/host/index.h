// What a sparse method knows of the cached keys of one sequence, checked once when Python hands it over: plans only compare.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "api/kernels.h"

namespace thresher {

struct Array {
  const void* data = nullptr;
  int64_t bytes = 0;
};
using Arrays = std::map<std::string, Array>;

struct IndexShape {
  Type type;  // of the cached keys and values
  int32_t q_heads, kv_heads, head_dim;
};

// A method's parameters and the arrays they point to: directions, log_u and mean.
struct MethodArrays {
  Method method{};
  Array directions, log_u, mean;
};

class Index {
 public:
  // indexed_layer: for each layer which of the indexed ones it is, -1 for a dense one. begin: the first candidate.
  Index(IndexShape shape, std::vector<int32_t> indexed_layer, int64_t begin);

  // Both raise std::invalid_argument if an array is missing, unknown, or of another size than the kernels read. `held` keeps
  // alive what the arrays point to.
  void set_method(const MethodArrays& given, std::shared_ptr<const void> held);
  void set_blocks(const std::vector<std::pair<std::pair<int64_t, int64_t>, Arrays>>& given, std::shared_ptr<const void> held);

  // A plan goes on with what it was given, whatever is set in the meantime.
  struct State {
    MethodArrays given;
    std::vector<Block> blocks;  // one behind the other from `begin`
    std::shared_ptr<const void> method_held, blocks_held;
  };
  std::shared_ptr<const State> state() const { return state_; }
  const IndexShape& shape() const { return shape_; }
  const std::vector<int32_t>& indexed_layer() const { return indexed_layer_; }
  int64_t begin() const { return begin_; }

  Counters counters{};

 private:
  Block block_of(const Method& m, int64_t begin, int64_t end, const Arrays& arrays) const;
  void check(const State& state) const;

  IndexShape shape_;
  std::vector<int32_t> indexed_layer_;
  int64_t begin_;
  int64_t planes_;  // (indexed layer, KV head)
  std::shared_ptr<const State> state_ = std::make_shared<State>();
};

}  // namespace thresher
