#include "plan.h"

#include <algorithm>

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

void Plan::add(int64_t queries, int64_t past, int64_t window, int64_t sinks, std::vector<Run> runs) {
  int64_t at = 0;
  for (const Run& run : runs) {
    if (run.start != at || run.end < run.start || run.end - run.start > run.capacity || !run.base)
      throw std::invalid_argument("Plan.add: runs must cover the sequence without holes");
    at = run.end;
  }
  if (queries < 1 || past < 0 || runs.empty() || at != past + queries || runs.back().start > past || window < 0 ||
      sinks < 0)
    throw std::invalid_argument("Plan.add: the last run must hold all new rows");
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
}

const Plan::Work& Plan::work(int64_t layer_window) {
  auto found = work_.find(layer_window);
  if (found != work_.end()) return found->second;
  for (size_t i = 0; i < runs_.size(); ++i) sequences_[i].runs = runs_[i].data();
  Work& work = work_[layer_window];
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

int64_t Plan::rows_read(int64_t layer_window) { return work(layer_window).rows_read; }

void Plan::attend(Attention args) {
  const Work& w = work(args.window);
  args.type = shape_.type;
  args.q_heads = shape_.q_heads;
  args.kv_heads = shape_.kv_heads;
  args.head_dim = shape_.head_dim;
  args.threads = shape_.threads;
  args.sequences = sequences_.data();
  args.sequence_count = int32_t(sequences_.size());
  args.items = w.items.data();
  args.item_count = int64_t(w.items.size());
  args.fold_count = w.fold_count;
  args.spans = w.spans.data();
  args.slots = w.slots.data();
  const size_t partials = size_t(w.slot_count * (args.head_dim + 2));
  if (workspace_->partials.size() < partials) workspace_->partials.resize(partials);
  args.partials = workspace_->partials.data();
  const size_t scratch = size_t(args.threads * kernels_->scratch_bytes(args)) + 64;
  if (workspace_->scratch.size() < scratch) workspace_->scratch.resize(scratch);
  args.scratch = (char*)((uintptr_t(workspace_->scratch.data()) + 63) / 64 * 64);
  kernels_->attend(args);
}

}  // namespace thresher
