#include "host/plan.h"

#include <algorithm>
#include <cstring>
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
               int64_t end, int64_t budget) {
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
  if (index) {
    const IndexShape& s = index->shape();
    if (s.type != shape_.type || s.q_heads != shape_.q_heads || s.kv_heads != shape_.kv_heads || s.head_dim != shape_.head_dim ||
        int(index->slots().size()) != layers)
      throw std::invalid_argument("Plan.add: the index is of another model");
    const Index::State& state = *index->state();
    const Method& m = state.given.method;
    const bool by_keys = m.rank == Rank::keys && !m.tail, none = m.rank == Rank::none && !m.tail;
    if (queries != 1 || end < index->begin() || end > past || end - index->begin() >= int64_t(1) << 31 || budget < 0 ||
        (!state.blocks.empty() && state.blocks.back().end != end) ||
        (state.blocks.empty() && !by_keys && !none && end != index->begin()))
      throw std::invalid_argument("Plan.add: an index is for one new token, its candidates lie before it");
  }
  layers_ = layers;
  runs_.push_back(std::move(runs));
  Sequence s{};
  s.query_row = tokens_;
  s.queries = queries;
  s.past = past;
  s.window = window;
  s.sinks = sinks;
  s.run_count = int32_t(runs_.back().size());
  sequences_.push_back(s);
  tokens_ += queries;
  work_.clear();
  work_of_layer_.clear();
  sparse_of_.push_back(nullptr);
  if (!index || end == index->begin()) return;
  states_.push_back(index->state());
  const Index::State& state = *states_.back();
  const Rank rank = state.given.method.rank;
  Sparse sparse{};
  sparse.method = &state.given.method;
  sparse.blocks = state.blocks.data();
  sparse.block_count = int32_t(state.blocks.size());
  sparse.slots = index->slots().data();
  sparse.mean = static_cast<const float*>(state.given.mean.data);
  sparse.begin = index->begin();
  sparse.end = end;
  sparse.budget = budget;
  sparse.counters = &index->counters;
  const int64_t row_bytes = int64_t(state.given.method.row_dim) * (shape_.type == Type::f32 ? 4 : 2);
  sparse.query_bytes = rank == Rank::signs ? sign_query_bytes : (row_bytes + 63) / 64 * 64;
  if (rank == Rank::keys || rank == Rank::signs) sparse.ranked = end - index->begin();
  for (const Block& b : state.blocks)
    if (rank == Rank::rows || rank == Rank::clusters) sparse.ranked += b.units;
  sparse_.push_back(sparse);
  sparse_of_.back() = &sparse_.back();
}

bool Plan::is_sparse(size_t sequence, int layer, int64_t layer_window) const {
  const Sparse* sparse = sparse_of_[sequence];
  return sparse && layer >= 0 && layer_window == 0 && sparse->slots[layer] >= 0;  // a sliding window is short already
}

// The steps of one sparse sequence. Pieces do not depend on the batch, so results do not either.
void Plan::add_sparse(Work& work, size_t sequence) {
  const Sparse& sparse = *sparse_of_[sequence];
  const Method& m = *sparse.method;
  const int32_t s = int32_t(sequence), group = shape_.q_heads / shape_.kv_heads;
  const int32_t choosing = m.shared ? 1 : group;  // choosers of a KV head
  const int32_t preparing = m.rank == Rank::fixed ? choosing : group;
  const bool ranked = m.rank == Rank::keys || m.rank == Rank::signs || m.rank == Rank::rows || m.rank == Rank::clusters;
  const bool signs = m.rank == Rank::signs;
  struct Scan {
    int32_t block;
    int64_t begin, end;
  };
  std::vector<Scan> scans;
  auto scan = [&](int32_t block, int64_t rows) {
    for (int64_t at = 0; at < rows; at += scan_tokens) scans.push_back({block, at, std::min(at + scan_tokens, rows)});
  };
  if (m.rank == Rank::keys || signs) {
    scan(0, sparse.ranked);
  } else if (ranked) {
    for (int32_t b = 0; b < sparse.block_count; ++b) scan(b, sparse.blocks[b].units);
  }
  for (int32_t h = 0; h < shape_.kv_heads; ++h)
    for (int32_t i = 0; i < preparing; ++i)
      work.sparse.push_back({Step::prepare, s, h * preparing + i, h, Step::prepare, 0, 0, 0, 0});
  for (int32_t h = 0; signs && h < shape_.kv_heads; ++h)
    work.sparse.push_back({Step::sample, s, h, h, Step::prepare, preparing, 0, 0, 0});
  for (int32_t h = 0; ranked && h < shape_.kv_heads; ++h)
    for (const Scan& part : scans)
      work.sparse.push_back({Step::scan, s, h, h, signs ? Step::sample : Step::prepare, signs ? 1 : preparing, part.block,
                             part.begin, part.end});
  for (int32_t h = 0; ranked && h < shape_.kv_heads; ++h)
    for (int32_t i = 0; i < choosing; ++i)
      work.sparse.push_back({Step::choose, s, h * choosing + i, h, Step::scan, int32_t(scans.size()), 0, 0, 0});
  for (int32_t h = 0; h < shape_.kv_heads; ++h)
    work.sparse.push_back({Step::list, s, h, h, ranked ? Step::choose : Step::prepare, ranked ? choosing : preparing, 0, 0, 0});
  const int32_t pieces = m.take == Take::verify ? 1 : gather_parts;
  for (int32_t p = 0; p < pieces; ++p)
    for (int32_t h = 0; h < shape_.kv_heads; ++h) work.sparse.push_back({Step::gather, s, h, h, Step::list, 1, p, 0, 0});
  for (int32_t h = 0; m.tail && h < shape_.kv_heads; ++h)
    work.sparse.push_back({Step::gather, s, h, h, Step::list, 1, gather_parts, 0, 0});
  const int64_t slots = pieces + (m.tail ? 1 : 0);
  work.slots[sequence] = {work.slot_count, slots, slots, 0};
  work.slot_count += slots * shape_.q_heads;
  work.certify |= m.certify > 0;
}

// Working memory of all sparse sequences of the pass.
void Plan::place_sparse() {
  auto place = [&](Sparse& s, Carver& c) {
    const int64_t n = s.end - s.begin, ranked = (s.ranked + 63) / 64 * 64;
    const bool signs = s.method->rank == Rank::signs;
    c.take(s.scores, signs ? 0 : shape_.q_heads * ranked * 4);
    c.take(s.found, signs ? shape_.q_heads * ((ranked + scan_tokens - 1) / scan_tokens) * found_stride * 4 : 0);
    c.take(s.chosen, shape_.q_heads * ((n + 63) / 64) * 8);
    c.take(s.queries, shape_.q_heads * s.query_bytes);
    c.take(s.rows, shape_.kv_heads * rows_stride(n) * 4);
    c.take(s.members, s.method->own ? shape_.kv_heads * n * 4 : 0);
    c.take(s.done, shape_.kv_heads * step_kinds * 4);
  };
  Carver counted{nullptr};
  for (Sparse& s : sparse_) place(s, counted);
  std::vector<char>& memory = workspace_->sparse;
  if (int64_t(memory.size()) < counted.bytes + 64) memory.resize(size_t(counted.bytes + 64));
  Carver carved{(char*)((uintptr_t(memory.data()) + 63) / 64 * 64)};
  for (Sparse& s : sparse_) place(s, carved);
}

const Plan::Work& Plan::work(int layer, int64_t layer_window) {
  const size_t at = size_t(layer + 1);  // layer -1: dense
  if (at < work_of_layer_.size() && work_of_layer_[at]) return *work_of_layer_[at];
  if (at >= work_of_layer_.size()) work_of_layer_.resize(at + 1);
  std::vector<bool> sparse(sequences_.size());
  for (size_t i = 0; i < sparse.size(); ++i) sparse[i] = is_sparse(i, layer, layer_window);
  const auto key = std::make_pair(layer_window, sparse);
  auto found = work_.find(key);
  if (found != work_.end()) {
    if (layer >= 0) work_of_layer_[at] = &found->second;
    return found->second;
  }
  Work& work = work_[key];
  if (layer >= 0) work_of_layer_[at] = &work;
  work.sequences = sequences_;
  for (size_t i = 0; i < runs_.size(); ++i) {
    work.sequences[i].runs = runs_[i].data();
    work.sequences[i].sparse = sparse[i] ? sparse_of_[i] : nullptr;
  }
  const int64_t row_bytes = shape_.head_dim * (shape_.type == Type::f32 ? 4 : 2);

  struct Shared {
    int64_t part;
    std::vector<Span> spans;
    int64_t keys = 0;
  };
  std::vector<Shared> shared;
  std::map<const char*, size_t> at_address;
  std::vector<Item> folds;
  work.slots.resize(sequences_.size());
  for (size_t i = 0; i < sequences_.size(); ++i) {
    const Sequence& s = sequences_[i];
    if (sparse[i]) {
      add_sparse(work, i);
      continue;
    }
    if (s.queries > decode_queries) {
      for (int64_t q = 0; q < s.queries; q += query_block) {
        const Span span{int32_t(i), q, std::min(q + query_block, s.queries)};
        const Splits splits = visible_splits(s, span.query_begin, span.query_end, layer_window);
        work.rows_read += s.past + span.query_end - splits.begin * split;
        for (int32_t h = 0; h < shape_.kv_heads; ++h)
          folds.push_back({h, int32_t(work.spans.size()), 1, splits.sinks ? 0 : splits.begin, splits.end, true});
        work.spans.push_back(span);
      }
      continue;
    }
    const Splits splits = visible_splits(s, 0, s.queries, layer_window);
    const int64_t count = splits.sinks + splits.end - splits.begin, total = s.past + s.queries;
    work.slots[i] = {work.slot_count, count, splits.sinks, splits.begin - splits.sinks};
    work.slot_count += count * s.queries * shape_.q_heads;
    for (int64_t n = 0; n < count; ++n) {
      const int64_t part = n < splits.sinks ? n : n - splits.sinks + splits.begin;
      const char* address = shared_rows(runs_[i], part, total, row_bytes);
      size_t index = shared.size();
      if (address) index = at_address.emplace(address, index).first->second;
      if (index == shared.size()) shared.push_back({part, {}, 0});
      shared[index].spans.push_back({int32_t(i), 0, s.queries});
      shared[index].keys = std::max(shared[index].keys, std::min(total, (part + 1) * split) - part * split);
    }
  }
  std::stable_sort(work.sparse.begin(), work.sparse.end(),
                   [](const SparseItem& a, const SparseItem& b) { return a.step < b.step; });
  // Long work first, so that the threads finish together.
  std::stable_sort(folds.begin(), folds.end(), [](const Item& a, const Item& b) {
    return a.split_end - a.split_begin > b.split_end - b.split_begin;
  });
  work.items = std::move(folds);
  work.fold_count = int64_t(work.items.size());
  std::vector<int32_t> first_span;
  for (const Shared& s : shared) {
    first_span.push_back(int32_t(work.spans.size()));
    work.spans.insert(work.spans.end(), s.spans.begin(), s.spans.end());
    work.rows_read += s.keys;
  }
  for (int32_t h = 0; h < shape_.kv_heads; ++h)
    for (size_t i = 0; i < shared.size(); ++i)
      work.items.push_back(
          {h, first_span[i], int32_t(shared[i].spans.size()), shared[i].part, shared[i].part + 1, false});
  return work;
}

int64_t Plan::rows_read(int64_t layer_window) { return work(-1, layer_window).rows_read; }

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
  const std::lock_guard<std::recursive_mutex> turn(workspace_->turn);
  run(args, work(args.layer, args.window));
  const int64_t value = shape_.type == Type::f32 ? 4 : 2, row = shape_.head_dim * value;
  const int64_t layer_bytes = tokens_ * shape_.q_heads * row, at = args.layer * layer_bytes;
  if (queries_)
    for (int64_t i = 0; i < tokens_ * shape_.q_heads; ++i)
      std::memcpy(queries_ + at + i * row,
                  (const char*)args.q + (i / shape_.q_heads * args.q_token + i % shape_.q_heads * args.q_head) * value,
                  size_t(row));
  if (outputs_) std::memcpy(outputs_ + at, args.out, size_t(layer_bytes));
  if (dense_) {
    args.out = dense_ + at;
    run(args, work(-1, args.window));
  }
}

void Plan::run(Attention args, const Work& w) {
  place_sparse();  // each time: another plan may have used the workspace since
  args.type = shape_.type;
  args.q_heads = shape_.q_heads;
  args.kv_heads = shape_.kv_heads;
  args.head_dim = shape_.head_dim;
  args.threads = shape_.threads;
  args.sequences = w.sequences.data();
  args.sequence_count = int32_t(w.sequences.size());
  args.sparse_items = w.sparse.data();
  args.sparse_count = int64_t(w.sparse.size());
  for (const Sparse& sparse : sparse_) std::memset(sparse.done, 0, size_t(shape_.kv_heads * step_kinds) * sizeof(int32_t));
  args.items = w.items.data();
  args.item_count = int64_t(w.items.size());
  args.fold_count = w.fold_count;
  args.spans = w.spans.data();
  args.slots = w.slots.data();
  const size_t partials = size_t(w.slot_count * (args.head_dim + 2));
  if (workspace_->partials.size() < partials) workspace_->partials.resize(partials);
  args.partials = workspace_->partials.data();
  if (w.certify) {
    if (workspace_->doubts.size() < partials) workspace_->doubts.resize(partials);
    args.doubts = workspace_->doubts.data();
    workspace_->escalated.assign(w.sequences.size() * size_t(args.q_heads), 0);
    args.escalated = workspace_->escalated.data();
  }
  const size_t scratch = size_t(args.threads * kernels_->scratch_bytes(args)) + 64;
  if (workspace_->scratch.size() < scratch) workspace_->scratch.resize(scratch);
  args.scratch = (char*)((uintptr_t(workspace_->scratch.data()) + 63) / 64 * 64);
  kernels_->attend(args);
}

}  // namespace thresher
