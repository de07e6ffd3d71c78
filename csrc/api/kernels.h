// What the compiled kernels offer: plain structs and a table of functions, one table for each instruction set.
// No Python, no torch, no standard library: the same header is seen by objects built with different flags.
#pragma once
#include <cstdint>

namespace thresher {

enum class Type : int32_t { bf16 = 0, f32 = 1, int8 = 2 };
static constexpr int64_t value_bytes(Type type) { return type == Type::f32 ? 4 : 2; }  // of activations, keys and values

enum class Activation : int32_t { none = 0, silu = 1, gelu_tanh = 2 };

constexpr int panel = 32;   // outputs (or keys, or head dimensions) that one packed panel holds
constexpr int split = 256;  // keys that one partial softmax covers, counted from absolute position 0

// y[rows, out] = act(x @ w.T * scale + bias). `w` is packed in panels; see pack_linear in kernels/linear.py.
// With an activation the panels alternate gate, up, gate, up ... and y[rows, out] = act(gate) * up.
struct Linear {
  Type weight;  // bf16 and int8 weights take bf16 x, f32 takes f32
  Activation activation;
  const void* x;
  int64_t x_stride;  // elements between rows
  int64_t rows;
  const void* w;
  const float* scale;  // one per packed output (int8), or null
  const float* bias;   // one per packed output, or null
  const void* add;     // null, or what is added to y: of y's type and strides, may be y itself
  void* y;
  int64_t y_stride;
  int64_t out;
  int64_t in;
  bool y_f32;
  int threads;
};

// A run of keys and values that lie together: planes [layers, 2, kv_heads] of `capacity` rows each.
struct Run {
  char* base;
  int64_t capacity;
  int64_t start;  // absolute position of row 0
  int64_t end;    // absolute position after the last readable row
};

// ---- sparse attention --------------------------------------------------------------------------------------------
// A sparse sequence reads its first and last rows exactly, and of the candidates between them what its method chooses.
// Candidates are counted from `Sparse::begin`; they come in blocks of whole groups of 64, indexed once and never changed.

constexpr int group_tokens = 64;  // blocks begin and end at multiples of this, counted from the first candidate

enum class Rank : int32_t {  // what candidates are ranked by
  none = 0,
  keys = 1,      // the exact scores
  signs = 2,     // one bit a direction of the centred key against the unrounded query
  rows = 3,      // a row for every `unit` tokens: page bounds or mean keys
  clusters = 4,  // a row for every cluster, of any size
  tables = 5,    // LSH: keys that share a bucket with the query in two tables or more
  fixed = 6,     // a set chosen when the block was built
};
enum class Take : int32_t {  // what is read of what is ranked
  top = 0,     // the best `budget`
  draw = 1,    // `budget` draws in proportion to exp(score)
  verify = 2,  // the best `budget`, and of the rest a uniform sample as large as the error asks for
};

enum class Grouping : int32_t {  // what the query heads of a KV head choose and weigh of what is read for all of them
  united = 0,  // each chooses, and weighs what any of them has chosen
  own = 1,     // each chooses, and weighs only that
  shared = 2,  // they choose together, by the sum of their scores
};

struct Method {
  Rank rank;
  Take take;
  int32_t unit;           // tokens of a ranked row
  int32_t row_dim;        // numbers of a ranked row: head_dim, or 2 head_dim (the least and the greatest of each)
  Grouping grouping;
  bool tail;              // what is not read is answered by its clusters
  int32_t planes;         // signs: bits; tables: K * L
  const void* directions; // what queries are projected on: [planes, head_dim], packed like a linear layer
  int64_t directions_stride;  // bytes to those of the next (indexed layer, KV head); 0: the same for all
  int32_t bits, tables;   // K, L
  const float* log_u;     // tables: log2 of the inclusion probability at log_u_count cosines from -1 to 1
  int32_t log_u_count;
  float certify;          // tables: an estimated relative error above this is answered by dense attention; 0: never
  double confidence;      // verify: (normal quantile / tolerance)^2
  float pilot;            // verify: the part of the rest that the first sample takes
  uint64_t seed;
};

// Arrays are [planes, ...] with a plane for each (indexed layer, KV head), contiguous; null where the method has none.
struct Block {
  int64_t begin, end;        // candidates
  int64_t units;             // ranked rows
  const uint32_t* signs;     // [n / 16, bits / 32, 16]
  const uint8_t* factors;    // [n]: what a sum of signs is multiplied by
  const void* ranked_rows;   // [units, row_dim]
  const uint16_t* codes;     // [tables, n]: small blocks
  const uint32_t* heads;     // [tables, 2^K + 1]: where buckets begin in ids
  const uint16_t* ids;       // [tables, n]
  const float* norms;        // [n] of the centred keys
  const uint64_t* keep;      // [n / 64]
  int64_t clusters;
  const void* means;         // [clusters, 2, head_dim]: of the keys and values of each cluster
  const int32_t* counts;     // [clusters]
  const uint16_t* assigned;  // [n]: cluster of each token
};

struct Counters {  // of one sequence, since they were last cleared
  int64_t readings;   // one for each KV head of each layer in each step
  int64_t rows;       // that were read for them
  int64_t head_rows;  // and weighed by their query heads
  int64_t entries;    // of buckets that were looked at
  int64_t estimates;  // of errors, by a sample
  int64_t fallbacks;  // where an estimate was too large, so that all rows were read
};

constexpr int scan_tokens = 4096;  // signs that are scanned in one step

// The scores of signs that reach a query head's bound, in one piece of scan_tokens: score << 16 | place in the piece. They are
// written 16 at once.
struct Found {
  int32_t count;
  int32_t unused[15];
  int32_t entries[scan_tokens + 16];
};

struct Sparse {  // one sequence in one pass
  const Method* method;
  const Block* blocks;
  int32_t block_count;
  const int32_t* indexed_layer;  // of each layer: which of the indexed ones it is; -1: dense
  const float* mean;      // [indexed layers, kv_heads, head_dim]: what centred keys were centred by
  int64_t begin, end;     // candidates, absolute positions
  int64_t ranked;         // ranked rows of all blocks
  int64_t budget;         // tokens (draws) of a query head
  // Working memory.
  int32_t* scores;        // [q_heads, ranked, padded to 64]: floats as integers of the same order; not of signs
  Found* found;           // [q_heads, pieces of scan_tokens]: signs
  uint64_t* chosen;       // [q_heads, candidates / 64]: bits
  int32_t* listed_count;  // [kv_heads]: candidates that are read ...
  int32_t* listed;        // [kv_heads, listed_stride(candidates)]: ... and which
  uint32_t* members;      // [kv_heads, candidates]: bit g: query head g of the group has chosen it
  char* queries;          // [q_heads, query_bytes]: what each ranks by
  int64_t query_bytes;
  int32_t* done;          // [kv_heads, step_kinds]: steps of each kind that are finished in this layer
  Counters* counters;
};

constexpr int most_signs = 512;                // bits of a key
constexpr int most_directions = 4096;          // that a query is projected on
constexpr int64_t sign_query_bytes = 4096;     // room for a query that is rounded for the scan of signs
constexpr int64_t most_table_tokens = 65536;   // ids of keys in a table have 16 bits ...
constexpr int64_t most_clusters = 65536;       // ... and so have numbers of clusters
constexpr int most_group = 32;                 // query heads of a KV head
constexpr int gather_parts = 4;                // pieces that the rows read for a KV head are dealt out to

static constexpr int64_t listed_stride(int64_t candidates) { return candidates + 16; }  // they are written 16 at once

enum class Step : int32_t { query = 0, sample = 1, scan = 2, choose = 3, list = 4, gather = 5 };
constexpr int step_kinds = 6;

// One step of one sparse sequence. Steps are handed out in order, so those that a step waits for are never behind it.
struct SparseItem {
  Step step = Step::query;
  int32_t sequence = 0;
  int32_t kv_head = 0;
  int32_t chooser = 0;          // query, choose: a query head, or a KV head whose query heads choose together
  Step after = Step::query;     // waits until `count` steps of this kind are done for its KV head
  int32_t count = 0;
  int32_t block = 0;            // scan: of ranked rows
  int64_t begin = 0, end = 0;   // scan: ranked rows of the block; of signs and keys: candidates
  int32_t part = 0;             // gather: which of the pieces of the listed rows, or gather_parts for the tail
};

struct Sequence {
  const Run* runs;
  int32_t run_count;
  int64_t query_row;  // first row of this sequence in the flattened batch
  int64_t queries;    // new tokens
  int64_t past;       // absolute position of the first new token
  int64_t window;     // method: 0 = all, else keys > q - window are read ...
  int64_t sinks;      // ... and keys < sinks
  const Sparse* sparse;  // null: all that is visible is read
  float* votes;          // [layers, kv_heads, votes_stride]: takes in what the new tokens weigh each row; or null
  int64_t votes_stride;
};

// Rows of several sequences that attend to the same keys, or a block of rows of one long chunk.
struct Item {
  int32_t kv_head;
  int32_t first_span, span_count;  // into spans
  int64_t split_begin, split_end;  // decode: one split; prefill: the splits to loop over
  bool fold;                       // prefill: fold the splits here and write the output
};

// Consecutive queries of one sequence.
struct Span {
  int32_t sequence;
  int64_t query_begin, query_end;
};

// Where the partial softmaxes of one decode-like sequence go: slot (row, split), rows outermost.
struct Slots {
  int64_t begin;
  int64_t count;        // splits per row; 0 for a sequence that is folded
  int64_t sink_splits;  // splits 0 .. sink_splits - 1 come first ...
  int64_t gap;          // ... then those from sink_splits + gap
};

struct Attention {
  Type type;
  int32_t layer, q_heads, kv_heads, head_dim;
  const void *q, *k, *v;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;  // strides in elements
  void* out;                                                  // [tokens, q_heads, head_dim]
  float scale;
  int64_t window;  // of the layer, 0 = none
  int64_t blank;   // of the layer: so many first rows hold nothing and are seen by nobody
  const Sequence* sequences;
  int32_t sequence_count;
  const Item* items;
  int64_t fold_count, item_count;  // items that fold come first
  const Span* spans;
  const Slots* slots;  // one for each sequence
  const SparseItem* sparse_items;
  int64_t sparse_count;
  float* partials;     // one slot: max, sum, acc[head_dim]
  float* variances;    // one slot: sums of a, a |v|^2, a v with a = weight^2 (1 - inclusion probability); or null
  void* weights;       // one slot: [split] weights against the maximum of the split; null: nobody votes
  char* fallback;      // [sequences, q_heads]: which of them are to be answered by dense attention
  char* scratch;       // threads * scratch_bytes(args), 64-byte aligned
  int threads;
};

struct RmsNorm {
  Type type;
  const void* x;
  void* y;
  const float* weight;
  int64_t rows, width;
  float eps;
  int threads;
};

// Rotary embedding in place on q and k of a fused [tokens, (q_heads + 2 kv_heads) head_dim] matrix, after an optional
// RMS norm of each head (q_norm, k_norm or null).
struct Rope {
  Type type;
  void* qkv;
  int64_t token_stride;
  int64_t tokens;
  int32_t q_heads, kv_heads, head_dim, rotary_dim;
  const void *cos, *sin;  // [tokens, rotary_dim] of `type`
  const float *q_norm, *k_norm;
  float eps;
  int threads;
};

// ---- associative memories -------------------------------------------------------------------------------------------

// New tokens of sequences that lie one behind the other: of sequence i those from starts[i] up to starts[i + 1].
struct Ragged {
  const int64_t* starts;  // [sequences + 1]
  int64_t sequences, heads, head_dim;
};

// Keys of a leaky average: a_t = x_t + decay a_{t-1} from before[i] on, key_t = scale a_t / |a_t|.
struct MemoryKeys {
  Type type;             // of x and keys
  Ragged tokens;
  const void* x;         // [tokens, heads, head_dim]
  const float* decay;    // [tokens or 1, heads]
  int64_t decay_stride;  // elements between tokens; 0 if it is the same for all
  const float* before;   // [sequences, heads, head_dim]
  const float* scale;    // [heads]
  void* keys;            // [tokens, heads, head_dim]
  float* averages;       // the same
  int threads;
};

// Values of the pairs that tokens complete: v_t = (1 - share) x_t + share x_{t-1}, from x before[i] on, value_t = scale v_t / |v_t|.
struct MemoryValues {
  Type type;            // of x and values
  Ragged tokens;
  const void* x;        // [tokens, heads, head_dim]
  const float* before;  // [sequences, heads, head_dim]
  const float* share;   // [heads]
  const float* scale;   // [heads]
  void* values;         // [tokens, heads, head_dim]
  float* mixed;         // the same; working memory
  int threads;
};

// y = softmax(x) of each row; y of `type`, each number is rounded by itself.
struct Softmax {
  Type type;
  const float* x;  // [rows, width]
  void* y;
  int64_t rows, width;
  int threads;
};

// ---- building an index ----------------------------------------------------------------------------------------------

// Keys [planes, n, head_dim] less their plane's mean, times directions packed like a linear layer: the signs of the
// products as bits, the norm of the centred key, and the sum of the absolute products.
struct Project {
  Type type;
  const void* keys;
  int64_t planes, rows, plane_stride, head_dim;
  const float* mean;       // [planes, head_dim]
  const void* directions;
  int64_t count;           // directions
  uint64_t* bits;          // [planes, n, words] with words = ceil(count / 64)
  float *norms, *absolute; // [planes, n]
  int threads;
};

// bits [planes, n, ceil(K L / 64)] -> codes [planes, tables, n]
struct Codes {
  const uint64_t* bits;
  int64_t planes, rows;
  int32_t key_bits, tables;
  uint16_t* codes;
  int threads;
};

// codes [planes, tables, n] -> heads [planes, tables, 2^K + 1], ids [planes, tables, n] by counting sort; n <= 65536
struct Tables {
  const uint16_t* codes;
  int64_t planes, rows;
  int32_t key_bits, tables;
  uint32_t* heads;
  uint16_t* ids;
  int threads;
};

// ---- sampling -------------------------------------------------------------------------------------------------------

// A token for each row of logits. Edits make a logit x into (x < 0 ? x * factor : x / factor) + offset; then come
// temperature, top-k, top-p and min-p in transformers' order and meaning, and one draw by the row's uniform number.
struct Sample {
  const float* logits;
  int64_t stride, rows, vocab;                            // stride: elements between rows, 0 if all are one
  const double *temperature, *top_p, *min_p, *uniform;    // [rows]; temperature 0: the largest, the first among equals
  const int64_t* top_k;                                   // [rows]; 0: off
  const int64_t* first_edit;                              // [rows + 1]: where a row's edits begin
  const int32_t* edit_ids;
  const float *edit_factors, *edit_offsets;
  const uint8_t* wants_logsumexp;  // [rows]
  double* logsumexp;               // [rows], of the logits before edits, where wanted
  const uint8_t* wants_weights;    // [rows]
  float* weights;                  // [rows, vocab], where wanted: what each token is drawn in proportion to; the largest is 1
  int32_t* tokens;                 // [rows]; -1: the largest logit is not a number, or some logit is NaN
  char* scratch;                   // threads * sample_scratch_bytes(vocab), 64-byte aligned
  int threads;
};

struct Kernels {
  const char* name;
  void (*linear)(const Linear&);
  void (*attend)(const Attention&);
  int64_t (*scratch_bytes)(const Attention&);  // of one thread
  void (*rms_norm)(const RmsNorm&);
  void (*rope)(const Rope&);
  void (*softmax)(const Softmax&);
  void (*memory_keys)(const MemoryKeys&);
  void (*memory_values)(const MemoryValues&);
  float (*read)(const float*, int64_t count, int threads);  // sums: a measured read of memory
  void (*project)(const Project&);
  void (*codes)(const Codes&);
  void (*tables)(const Tables&);
  int64_t (*sample_scratch_bytes)(int64_t vocab);  // of one thread
  void (*sample)(const Sample&);
};

const Kernels* find_kernels(const char* name);  // null: not built, or not supported by this processor
const char* const* kernel_names(int* count);    // best first, supported by this processor

}  // namespace thresher
