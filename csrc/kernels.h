// What the compiled kernels offer: plain structs and a table of functions, one table for each instruction set.
// No Python, no torch, no standard library: the same header is seen by objects built with different flags.
#pragma once
#include <cstdint>

namespace thresher {

enum class Type : int32_t { bf16 = 0, f32 = 1, int8 = 2 };
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

struct Sequence {
  const Run* runs;
  int32_t run_count;
  int64_t query_row;  // first row of this sequence in the flattened batch
  int64_t queries;    // new tokens
  int64_t past;       // absolute position of the first new token
  int64_t window;     // method: 0 = all, else keys > q - window are read ...
  int64_t sinks;      // ... and keys < sinks
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
  const Sequence* sequences;
  int32_t sequence_count;
  const Item* items;
  int64_t fold_count, item_count;  // items that fold come first
  const Span* spans;
  const Slots* slots;  // one for each sequence
  float* partials;     // one slot: max, sum, acc[head_dim]
  char* scratch;       // threads * scratch_bytes(args), 64-byte aligned
  int threads;
};

struct Rows {
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

struct Kernels {
  const char* name;
  void (*linear)(const Linear&);
  void (*attend)(const Attention&);
  int64_t (*scratch_bytes)(const Attention&);  // of one thread
  void (*rms_norm)(const Rows&);
  void (*rope)(const Rope&);
  float (*read)(const float*, int64_t count, int threads);  // sums: a measured read of memory
};

const Kernels* find_kernels(const char* name);  // null: not built, or not supported by this processor
const char* const* kernel_names(int* count);    // best first, supported by this processor

}  // namespace thresher
