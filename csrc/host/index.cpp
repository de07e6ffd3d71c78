#include "host/index.h"

#include <algorithm>

namespace thresher {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("Index: " + what); }

bool in_range(int64_t x, int64_t low, int64_t high) { return low <= x && x <= high; }

// Numbers that kernels use as sizes of what they read or of memory on their stack.
void check_method(const Method& m, const IndexShape& shape) {
  const bool ranks_units = m.rank == Rank::rows;
  if (!in_range(int(m.rank), int(Rank::none), int(Rank::fixed)) || !in_range(int(m.take), int(Take::top), int(Take::verify)))
    refuse("no such rank or take");
  if (!in_range(m.unit, 1, group_tokens) || group_tokens % m.unit || (m.unit != 1 && !ranks_units))
    refuse("unit must divide 64");
  if (m.row_dim != shape.head_dim && !(ranks_units && m.row_dim == 2 * shape.head_dim)) refuse("row_dim is not that of the heads");
  if (m.rank == Rank::signs && (!in_range(m.planes, 32, most_signs) || m.planes % 32)) refuse("bits must be 32, 64 .. 512");
  if (m.rank == Rank::tables &&
      (!in_range(m.bits, 0, 16) || !in_range(m.tables, 2, 255) || !in_range(m.planes, std::max(1, m.bits * m.tables), most_directions)))
    refuse("too many bits or tables");
  if (m.take == Take::draw && m.rank != Rank::keys) refuse("draws need exact scores");
  if (m.take == Take::verify && (m.grouping == Grouping::own || m.tail)) refuse("a sample of the rest stands for the whole group and has no tail");
  if (m.grouping == Grouping::shared && (m.rank == Rank::tables || m.rank == Rank::signs)) refuse("signs and tables are looked up by each query head");
  if (m.certify > 0 && m.rank != Rank::tables) refuse("errors are estimated of what tables find");
  if (shape.q_heads / shape.kv_heads > most_group) refuse("more than 32 query heads to a KV head");
}

}  // namespace

Index::Index(IndexShape shape, std::vector<int32_t> indexed_layer, int64_t begin)
    : shape_(shape), indexed_layer_(std::move(indexed_layer)), begin_(begin) {
  if (shape.kv_heads < 1 || shape.q_heads < shape.kv_heads || shape.q_heads % shape.kv_heads || shape.head_dim < 2)
    refuse("heads must divide");
  int32_t indexed = 0;
  for (int32_t layer : indexed_layer_) {
    if (layer != -1 && layer != indexed) refuse("indexed layers must be numbered in order");
    indexed += layer >= 0;
  }
  if (begin < 0) refuse("begins before the first token");
  planes_ = int64_t(indexed) * shape.kv_heads;
}

void Index::set_method(const MethodArrays& given, std::shared_ptr<const void> held) {
  State next = *state_;
  next.given = given;
  next.method_held = std::move(held);
  check_method(given.method, shape_);
  check(next);
  state_ = std::make_shared<const State>(std::move(next));
}

void Index::set_blocks(const std::vector<std::pair<std::pair<int64_t, int64_t>, Arrays>>& given, std::shared_ptr<const void> held) {
  State next = *state_;
  next.blocks.clear();
  next.blocks_held = std::move(held);
  int64_t reached = begin_;
  for (const auto& [bounds, arrays] : given) {
    const auto [begin, end] = bounds;
    if (begin != reached || end <= begin || (end - begin) % group_tokens) refuse("blocks must follow each other in whole groups");
    reached = end;
    next.blocks.push_back(block_of(next.given.method, begin, end, arrays));
  }
  check(next);
  state_ = std::make_shared<const State>(std::move(next));
}

Block Index::block_of(const Method& m, int64_t begin, int64_t end, const Arrays& arrays) const {
  Block b{};
  b.begin = begin;
  b.end = end;
  const int64_t n = end - begin, value = value_bytes(shape_.type);
  auto bytes_of = [&](const char* name) {
    const auto found = arrays.find(name);
    return found == arrays.end() ? 0 : found->second.bytes;
  };
  b.units = planes_ && m.row_dim ? bytes_of("rows") / (planes_ * m.row_dim * value) : 0;
  b.clusters = planes_ ? bytes_of("counts") / (planes_ * 4) : 0;
  size_t known = 0;
  auto take = [&](const char* name, auto*& to, int64_t bytes) {  // `bytes` of one plane
    const auto found = arrays.find(name);
    if (found == arrays.end()) return;
    ++known;
    if (found->second.bytes != planes_ * bytes)
      refuse(std::string(name) + " has " + std::to_string(found->second.bytes) + " bytes, not " + std::to_string(planes_ * bytes));
    to = static_cast<std::remove_reference_t<decltype(to)>>(found->second.data);
  };
  take("signs", b.signs, n * m.planes / 8);
  take("factors", b.factors, n);
  take("rows", b.ranked_rows, b.units * m.row_dim * value);
  take("codes", b.codes, int64_t(m.tables) * n * 2);
  take("heads", b.heads, m.tables * ((int64_t(1) << m.bits) + 1) * 4);
  take("ids", b.ids, int64_t(m.tables) * n * 2);
  take("norms", b.norms, n * 4);
  take("keep", b.keep, n / 8);
  take("means", b.means, b.clusters * 2 * shape_.head_dim * value);
  take("counts", b.counts, b.clusters * 4);
  take("assigned", b.assigned, n * 2);
  if (known != arrays.size()) refuse("an array that no method has");
  return b;
}

// What the method needs is there.
void Index::check(const State& state) const {
  const Method& m = state.given.method;
  for (const Block& b : state.blocks) {
    const int64_t n = b.end - b.begin;
    const bool clusters = m.tail || m.rank == Rank::clusters;
    if (m.rank == Rank::signs && !(b.signs && b.factors)) refuse("signs and factors are missing");
    if ((m.rank == Rank::rows || m.rank == Rank::clusters) && !b.ranked_rows) refuse("rows are missing");
    if (m.rank == Rank::rows && b.units * m.unit != n) refuse("not a row for every unit");
    if (m.rank == Rank::clusters && b.units != b.clusters) refuse("not a row for every cluster");
    if (m.rank == Rank::tables && !(b.norms && (b.codes || (b.heads && b.ids)))) refuse("norms, or codes or tables, are missing");
    if (m.rank == Rank::tables && n > most_table_tokens) refuse("more than 65536 tokens in a table");
    if (m.rank == Rank::fixed && !b.keep) refuse("keep is missing");
    if (clusters && !(b.means && b.counts && b.assigned && in_range(b.clusters, 1, most_clusters)))
      refuse("means, counts and assigned are missing, or too many");
  }
  if (state.blocks.empty()) return;
  const int64_t directions = (int64_t(m.planes) + panel - 1) / panel * panel * shape_.head_dim * value_bytes(shape_.type);
  if (m.rank == Rank::signs && (m.directions_stride < directions || state.given.directions.bytes < m.directions_stride * planes_))
    refuse("too few directions");
  if (m.rank == Rank::tables && (m.directions_stride != 0 || state.given.directions.bytes < directions)) refuse("too few directions");
  if (m.rank == Rank::tables && (m.log_u_count < 2 || state.given.log_u.bytes != int64_t(m.log_u_count) * 4))
    refuse("log_u is not as long as it says");
  if (m.rank == Rank::tables && state.given.mean.bytes != planes_ * shape_.head_dim * 4) refuse("mean has another shape");
}

}  // namespace thresher
