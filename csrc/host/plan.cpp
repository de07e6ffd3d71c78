#include "host/plan.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <string>

#include "api/carver.h"

namespace thresher {
namespace {

constexpr int64_t decode_queries = 16;  // up to here a sequence is split over its keys, beyond over its queries
constexpr int64_t query_block = 64;

// The splits a run of queries may see: [0, sinks) and [begin, end).
struct Splits {
  int64_t sinks, begin, end;
};
Splits visible_splits(const Sequence& s, int64_t query_begin, int64_t query_end, int64_t layer_window) {
  const int64_t first = s.past + query_begin, last = s.past + query_end - 1;
  const int64_t reach = layer_window > 0 ? std::max<int64_t>(0, first - layer_window + 1) : 0;
  const int64_t recent = s.window > 0 ? std::max(reach, first - s.window + 1) : reach;
  const int64_t begin = recent / split;
  const int64_t sink_end = s.window > 0 ? std::min(s.sinks, last + 1) : 0;
  // Sinks that the layer's own window has left behind are not read.
  const int64_t sinks = reach < sink_end ? std::min(begin, (sink_end + split - 1) / split) : 0;
  return {sinks, begin, last / split + 1};
}

// Two sequences read the same rows of a split when its first row lies at the same address and the split in one run.
const char* shared_rows(const std::vector<Run>& runs, int64_t part, int64_t total, int64_t row_bytes) {
  const int64_t begin = part * split, end = std::min(begin + split, total);
  for (const Run& run : runs)
    if (run.start <= begin && end <= run.end) return run.base + (begin - run.start) * row_bytes;
  return nullptr;
}

}  // namespace

char* Buffer::reserve(int64_t bytes) {
  constexpr int64_t alignment = 64;
  if (int64_t(memory_.size()) < bytes + alignment) memory_.resize(size_t(bytes + alignment));
  return (char*)((uintptr_t(memory_.data()) + alignment - 1) / alignment * alignment);
}

Plan::Plan(const Kernels* kernels, Workspace* workspace, Type type, int q_heads, int kv_heads, int head_dim,
           int threads)
    : kernels_(kernels), workspace_(workspace) {
  if (q_heads < 1 || kv_heads < 1 || q_heads % kv_heads || head_dim < 2 || head_dim % 2 || threads < 1)
    throw std::invalid_argument("Plan: heads must divide, head_dim must be even, threads positive");
  shape_.type = type;
  shape_.q_heads = q_heads;
  shape_.kv_heads = kv_heads;
  shape_.head_dim = head_dim;
  shape_.threads = threads;
}

void Plan::add(int64_t queries, int64_t past, int64_t window, int64_t sinks, int layers, std::vector<Run> runs, Index* index,
               int64_t end, int64_t budget, float* votes, int64_t votes_stride) {
  if (layers < 1 || (layers_ && layers != layers_)) throw std::invalid_argument("Plan.add: sequences of one pass have equal layers");
  int64_t at = 0;
  for (const Run& run : runs) {
    if (run.start != at || run.end < run.start || run.end - run.start > run.capacity || !run.base)
      throw std::invalid_argument("Plan.add: runs must cover the sequence without holes");
    at = run.end;
  }
  if (queries < 1 || past < 0 || runs.empty() || at != past + queries || runs.back().start > past || window < 0 ||
      sinks < 0)
    throw std::invalid_argument("Plan.add: the last run must hold all new rows");
  if (index) check_index(*index, layers, queries, past, end, budget);
  if (votes && (index || queries > decode_queries || votes_stride < past + queries))
    throw std::invalid_argument("Plan.add: votes are of a few tokens that read densely, for all rows");
  layers_ = layers;
  runs_.push_back(std::move(runs));
  Sequence s{};
  s.query_row = tokens_;
  s.queries = queries;
  s.past = past;
  s.window = window;
  s.sinks = sinks;
  s.run_count = int32_t(runs_.back().size());
  s.votes = votes;
  s.votes_stride = votes_stride;
  sequences_.push_back(s);
  tokens_ += queries;
  plans_.clear();
  plan_of_layer_.clear();
  sparse_of_.push_back(nullptr);
  if (!index || end == index->begin()) return;
  states_.push_back(index->state());
  Sparse sparse = sparse_of(*index, *states_.back(), end, budget);
  sparse.counters = &index->counters;
  sparse_.push_back(sparse);
  sparse_of_.back() = &sparse_.back();
}

void Plan::check_index(const Index& index, int layers, int64_t queries, int64_t past, int64_t end, int64_t budget) const {
  const IndexShape& s = index.shape();
  if (s.type != shape_.type || s.q_heads != shape_.q_heads || s.kv_heads != shape_.kv_heads || s.head_dim != shape_.head_dim ||
      int(index.indexed_layer().size()) != layers)
    throw std::invalid_argument("Plan.add: the index is of another model");
  const Index::State& state = *index.state();
  const Method& m = state.given.method;
  const bool by_keys = m.rank == Rank::keys && !m.tail, none = m.rank == Rank::none && !m.tail;
  if (queries != 1 || end < index.begin() || end > past || end - index.begin() >= int64_t(1) << 31 || budget < 0 ||
      (!state.blocks.empty() && state.blocks.back().end != end) ||
      (state.blocks.empty() && !by_keys && !none && end != index.begin()))
    throw std::invalid_argument("Plan.add: an index is for one new token, its candidates lie before it");
}

// All but the counters and the working memory.
Sparse Plan::sparse_of(const Index& index, const Index::State& state, int64_t end, int64_t budget) const {
  const Rank rank = state.given.method.rank;
  Sparse sparse{};
  sparse.method = &state.given.method;
  sparse.blocks = state.blocks.data();
  sparse.block_count = int32_t(state.blocks.size());
  sparse.indexed_layer = index.indexed_layer().data();
  sparse.mean = static_cast<const float*>(state.given.mean.data);
  sparse.begin = index.begin();
  sparse.end = end;
  sparse.budget = budget;
  const int64_t row_bytes = int64_t(state.given.method.row_dim) * value_bytes(shape_.type);
  sparse.query_bytes = rank == Rank::signs ? sign_query_bytes : (row_bytes + 63) / 64 * 64;
  if (rank == Rank::keys || rank == Rank::signs) sparse.ranked = end - index.begin();
  for (const Block& b : state.blocks)
    if (rank == Rank::rows || rank == Rank::clusters) sparse.ranked += b.units;
  return sparse;
}

// Working memory of all sparse sequences of the pass.
void Plan::place_sparse() {
  auto place = [&](Carver carver) {
    for (Sparse& s : sparse_) {
      const int64_t n = s.end - s.begin, ranked = (s.ranked + 63) / 64 * 64;
      const bool signs = s.method->rank == Rank::signs;
      const int64_t pieces = signs ? (s.ranked + scan_tokens - 1) / scan_tokens : 0;
      carver.take(s.scores, signs ? 0 : shape_.q_heads * ranked * int64_t(sizeof *s.scores));
      carver.take(s.found, shape_.q_heads * pieces * int64_t(sizeof *s.found));
      carver.take(s.chosen, shape_.q_heads * ((n + 63) / 64) * int64_t(sizeof *s.chosen));
      carver.take(s.queries, shape_.q_heads * s.query_bytes);
      carver.take(s.listed_count, shape_.kv_heads * int64_t(sizeof *s.listed_count));
      carver.take(s.listed, shape_.kv_heads * listed_stride(n) * int64_t(sizeof *s.listed));
      carver.take(s.members, s.method->grouping == Grouping::own ? shape_.kv_heads * n * int64_t(sizeof *s.members) : 0);
      carver.take(s.done, shape_.kv_heads * step_kinds * int64_t(sizeof *s.done));
    }
    return carver.bytes;
  };
  place(Carver{workspace_->sparse.reserve(place(Carver{nullptr}))});
  for (Sparse& s : sparse_) std::memset(s.done, 0, size_t(shape_.kv_heads * step_kinds) * sizeof *s.done);
}

// The steps of one sparse sequence. Pieces do not depend on the batch, so results do not either.
void Plan::add_steps(LayerPlan& plan, size_t sequence) {
  const Sparse& sparse = *sparse_of_[sequence];
  const Method& m = *sparse.method;
  const int32_t s = int32_t(sequence), heads = shape_.kv_heads, group = shape_.q_heads / heads;
  const int32_t choosing = m.grouping == Grouping::shared ? 1 : group;  // of a KV head
  const int32_t querying = m.rank == Rank::fixed ? choosing : group;
  const bool by_token = m.rank == Rank::keys || m.rank == Rank::signs;
  const bool ranked = by_token || m.rank == Rank::rows || m.rank == Rank::clusters;
  const bool sampled = m.rank == Rank::signs;
  std::vector<SparseItem>& steps = plan.steps;
  struct Scan {
    int32_t block;
    int64_t begin, end;
  };
  std::vector<Scan> scans;  // of a KV head
  auto scan = [&](int32_t block, int64_t rows) {
    for (int64_t at = 0; at < rows; at += scan_tokens) scans.push_back({block, at, std::min(at + scan_tokens, rows)});
  };
  if (by_token) {
    scan(0, sparse.ranked);
  } else if (ranked) {
    for (int32_t b = 0; b < sparse.block_count; ++b) scan(b, sparse.blocks[b].units);
  }
  for (int32_t h = 0; h < heads; ++h)
    for (int32_t i = 0; i < querying; ++i)
      steps.push_back({.step = Step::query, .sequence = s, .kv_head = h, .chooser = h * querying + i});
  for (int32_t h = 0; sampled && h < heads; ++h)
    steps.push_back({.step = Step::sample, .sequence = s, .kv_head = h, .after = Step::query, .count = querying});
  for (int32_t h = 0; h < heads; ++h)
    for (const Scan& part : scans)
      steps.push_back({.step = Step::scan, .sequence = s, .kv_head = h, .after = sampled ? Step::sample : Step::query,
                       .count = sampled ? 1 : querying, .block = part.block, .begin = part.begin, .end = part.end});
  for (int32_t h = 0; ranked && h < heads; ++h)
    for (int32_t i = 0; i < choosing; ++i)
      steps.push_back({.step = Step::choose, .sequence = s, .kv_head = h, .chooser = h * choosing + i, .after = Step::scan,
                       .count = int32_t(scans.size())});
  for (int32_t h = 0; h < heads; ++h)
    steps.push_back({.step = Step::list, .sequence = s, .kv_head = h, .after = ranked ? Step::choose : Step::query,
                     .count = ranked ? choosing : querying});
  const int32_t pieces = m.take == Take::verify ? 1 : gather_parts;
  auto gather = [&](int32_t part) {
    for (int32_t h = 0; h < heads; ++h)
      steps.push_back({.step = Step::gather, .sequence = s, .kv_head = h, .after = Step::list, .count = 1, .part = part});
  };
  for (int32_t part = 0; part < pieces; ++part) gather(part);
  if (m.tail) gather(gather_parts);
  const int64_t slots = pieces + (m.tail ? 1 : 0);
  plan.slots[sequence] = {plan.slot_count, slots, slots, 0};
  plan.slot_count += slots * shape_.q_heads;
  plan.certify |= m.certify > 0;
}

// A long chunk is cut into blocks of queries; each folds its splits itself.
void Plan::add_query_blocks(LayerPlan& plan, size_t sequence) {
  const Sequence& s = sequences_[sequence];
  for (int64_t q = 0; q < s.queries; q += query_block) {
    const Span span{int32_t(sequence), q, std::min(q + query_block, s.queries)};
    const Splits splits = visible_splits(s, span.query_begin, span.query_end, plan.layer_window);
    plan.rows_read += s.past + span.query_end - splits.begin * split;
    for (int32_t h = 0; h < shape_.kv_heads; ++h)
      plan.items.push_back({h, int32_t(plan.spans.size()), 1, splits.sinks ? 0 : splits.begin, splits.end, true});
    plan.spans.push_back(span);
  }
}

// Splits of a pass, each once for all sequences that find it at the same address.
struct Plan::SharedSplits {
  struct Split {
    int64_t part;
    std::vector<Span> spans;
    int64_t keys = 0;
  };
  std::vector<Split> splits;
  std::map<const char*, size_t> at_address;

  Split& find(int64_t part, const char* address) {
    size_t at = splits.size();
    if (address) at = at_address.emplace(address, at).first->second;
    if (at == splits.size()) splits.push_back({part, {}, 0});
    return splits[at];
  }
};

// A few queries: every split is an item of its own, and partial softmaxes are merged afterwards.
void Plan::add_splits(LayerPlan& plan, size_t sequence, SharedSplits& shared) {
  const Sequence& s = sequences_[sequence];
  const int64_t row_bytes = shape_.head_dim * value_bytes(shape_.type);
  const Splits splits = visible_splits(s, 0, s.queries, plan.layer_window);
  const int64_t count = splits.sinks + splits.end - splits.begin, total = s.past + s.queries;
  plan.slots[sequence] = {plan.slot_count, count, splits.sinks, splits.begin - splits.sinks};
  plan.voting |= s.votes != nullptr;
  plan.slot_count += count * s.queries * shape_.q_heads;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t part = n < splits.sinks ? n : n - splits.sinks + splits.begin;
    SharedSplits::Split& to = shared.find(part, shared_rows(runs_[sequence], part, total, row_bytes));
    to.spans.push_back({int32_t(sequence), 0, s.queries});
    to.keys = std::max(to.keys, std::min(total, (part + 1) * split) - part * split);
  }
}

void Plan::add_items(LayerPlan& plan, const SharedSplits& shared) {
  std::vector<int32_t> first_span;
  for (const SharedSplits::Split& s : shared.splits) {
    first_span.push_back(int32_t(plan.spans.size()));
    plan.spans.insert(plan.spans.end(), s.spans.begin(), s.spans.end());
    plan.rows_read += s.keys;
  }
  for (int32_t h = 0; h < shape_.kv_heads; ++h)
    for (size_t i = 0; i < shared.splits.size(); ++i) {
      const SharedSplits::Split& s = shared.splits[i];
      plan.items.push_back({h, first_span[i], int32_t(s.spans.size()), s.part, s.part + 1, false});
    }
}

// From its sequences, and which of them are sparse.
void Plan::build(LayerPlan& plan) {
  SharedSplits shared;
  plan.slots.resize(sequences_.size());
  for (size_t i = 0; i < sequences_.size(); ++i) {
    if (plan.sequences[i].sparse)
      add_steps(plan, i);
    else if (sequences_[i].queries > decode_queries)
      add_query_blocks(plan, i);
    else
      add_splits(plan, i, shared);
  }
  std::stable_sort(plan.steps.begin(), plan.steps.end(),
                   [](const SparseItem& a, const SparseItem& b) { return a.step < b.step; });
  // Long work first, so that the threads finish together.
  std::stable_sort(plan.items.begin(), plan.items.end(), [](const Item& a, const Item& b) {
    return a.split_end - a.split_begin > b.split_end - b.split_begin;
  });
  plan.fold_count = int64_t(plan.items.size());
  add_items(plan, shared);
}

// What reads those sequences sparsely that `sparse` is not null for.
const Plan::LayerPlan& Plan::reading(const std::vector<const Sparse*>& sparse, int64_t layer_window) {
  auto same = [](const Sequence& s, const Sparse* p) { return s.sparse == p; };
  for (const LayerPlan& plan : plans_)
    if (plan.layer_window == layer_window && std::equal(plan.sequences.begin(), plan.sequences.end(), sparse.begin(), same))
      return plan;
  LayerPlan& plan = plans_.emplace_back();
  plan.layer_window = layer_window;
  plan.sequences = sequences_;
  for (size_t i = 0; i < runs_.size(); ++i) {
    plan.sequences[i].runs = runs_[i].data();
    plan.sequences[i].sparse = sparse[i];
  }
  build(plan);
  return plan;
}

const Plan::LayerPlan& Plan::dense(int64_t layer_window) {
  return reading(std::vector<const Sparse*>(sequences_.size()), layer_window);
}

const Plan::LayerPlan& Plan::of_layer(int layer, int64_t layer_window) {
  plan_of_layer_.resize(size_t(layers_));
  const LayerPlan*& known = plan_of_layer_[size_t(layer)];
  if (known && known->layer_window == layer_window) return *known;
  std::vector<const Sparse*> sparse(sequences_.size());
  for (size_t i = 0; i < sparse.size(); ++i)  // a sliding window is short already
    if (sparse_of_[i] && layer_window == 0 && sparse_of_[i]->indexed_layer[layer] >= 0) sparse[i] = sparse_of_[i];
  known = &reading(sparse, layer_window);
  return *known;
}

int64_t Plan::rows_read(int64_t layer_window) { return dense(layer_window).rows_read; }

void Plan::capture(char* queries, char* outputs, char* dense) {
  queries_ = queries;
  outputs_ = outputs;
  dense_ = dense;
}

bool Plan::fits(Type type, int q_heads, int kv_heads, int head_dim, int64_t tokens) const {
  return type == shape_.type && q_heads == shape_.q_heads && kv_heads == shape_.kv_heads && head_dim == shape_.head_dim &&
         tokens == tokens_;
}

void Plan::attend(Attention args) {
  if (args.layer < 0 || args.layer >= layers_)
    throw std::invalid_argument("Plan.attend: layer " + std::to_string(args.layer) + " of " + std::to_string(layers_));
  if (args.blank < 0) throw std::invalid_argument("Plan.attend: " + std::to_string(args.blank) + " blank rows");
  const std::lock_guard<std::recursive_mutex> turn(workspace_->turn);
  run(args, of_layer(args.layer, args.window));
  const int64_t value = value_bytes(shape_.type), row = shape_.head_dim * value;
  const int64_t layer_bytes = tokens_ * shape_.q_heads * row, at = args.layer * layer_bytes;
  if (queries_)
    for (int64_t i = 0; i < tokens_ * shape_.q_heads; ++i)
      std::memcpy(queries_ + at + i * row,
                  (const char*)args.q + (i / shape_.q_heads * args.q_token + i % shape_.q_heads * args.q_head) * value,
                  size_t(row));
  if (outputs_) std::memcpy(outputs_ + at, args.out, size_t(layer_bytes));
  if (dense_) {
    args.out = dense_ + at;
    run(args, dense(args.window));
  }
}

void Plan::run(Attention args, const LayerPlan& plan) {
  place_sparse();  // each time: another plan may have used the workspace since
  args.type = shape_.type;
  args.q_heads = shape_.q_heads;
  args.kv_heads = shape_.kv_heads;
  args.head_dim = shape_.head_dim;
  args.threads = shape_.threads;
  args.sequences = plan.sequences.data();
  args.sequence_count = int32_t(plan.sequences.size());
  args.sparse_items = plan.steps.data();
  args.sparse_count = int64_t(plan.steps.size());
  args.items = plan.items.data();
  args.item_count = int64_t(plan.items.size());
  args.fold_count = plan.fold_count;
  args.spans = plan.spans.data();
  args.slots = plan.slots.data();
  const int64_t partials = plan.slot_count * (args.head_dim + 2) * int64_t(sizeof(float));
  args.partials = (float*)workspace_->partials.reserve(partials);
  if (plan.voting) args.weights = workspace_->weights.reserve(plan.slot_count * split * value_bytes(shape_.type));
  if (plan.certify) {
    const int64_t outputs = int64_t(args.sequence_count) * args.q_heads;
    args.variances = (float*)workspace_->variances.reserve(partials);
    args.fallback = workspace_->fallback.reserve(outputs);
    std::memset(args.fallback, 0, size_t(outputs));
  }
  args.scratch = workspace_->scratch.reserve(args.threads * kernels_->scratch_bytes(args));
  kernels_->attend(args);
}

}  // namespace thresher
