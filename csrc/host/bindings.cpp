// A thin binding: addresses and sizes go in as integers (0.2 us each; an array argument takes 3). The callers in
// kernels/ keep the tensors alive and check shapes; nothing here knows torch.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>

#include "host/index.h"
#include "host/layer.h"
#include "host/mapping.h"
#include "host/plan.h"
#include "host/pool.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace thresher;

namespace {

template <class T = void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

struct KernelSet {
  const Kernels* table;

  explicit KernelSet(const std::string& name) : table(find_kernels(name.c_str())) {
    if (!table) throw std::invalid_argument("no kernels for '" + name + "' on this processor");
  }
};

void bind_linear(nb::module_& m) {
  m.def(
      "linear",
      [](const KernelSet& k, int weight, int activation, uintptr_t x, int64_t x_stride, int64_t rows, uintptr_t w,
         uintptr_t scale, uintptr_t bias, uintptr_t y, int64_t y_stride, int64_t out, int64_t in, bool y_f32,
         int threads) {
        k.table->linear({Type(weight), Activation(activation), at(x), x_stride, rows, at(w), at<float>(scale),
                         at<float>(bias), nullptr, at(y), y_stride, out, in, y_f32, threads});
      },
      nb::call_guard<nb::gil_scoped_release>());
}

void bind_elementwise(nb::module_& m) {
  m.def(
      "rms_norm",
      [](const KernelSet& k, int type, uintptr_t x, uintptr_t y, uintptr_t weight, int64_t rows, int64_t width,
         float eps, int threads) {
        k.table->rms_norm({Type(type), at(x), at(y), at<float>(weight), rows, width, eps, threads});
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "rope",
      [](const KernelSet& k, int type, uintptr_t qkv, int64_t token_stride, int64_t tokens, int q_heads, int kv_heads,
         int head_dim, int rotary_dim, uintptr_t cos, uintptr_t sin, uintptr_t q_norm, uintptr_t k_norm, float eps,
         int threads) {
        k.table->rope({Type(type), at(qkv), token_stride, tokens, q_heads, kv_heads, head_dim, rotary_dim, at(cos),
                       at(sin), at<float>(q_norm), at<float>(k_norm), eps, threads});
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "read_memory",
      [](const KernelSet& k, uintptr_t data, int64_t count, int threads) {
        return k.table->read(at<float>(data), count, threads);
      },
      nb::call_guard<nb::gil_scoped_release>());
}

void bind_memory(nb::module_& m) {
  m.def(
      "memory_keys",
      [](const KernelSet& k, int type, const std::vector<int64_t>& starts, int64_t heads, int64_t head_dim, uintptr_t x, uintptr_t decay,
         int64_t decay_stride, uintptr_t before, uintptr_t scale, uintptr_t keys, uintptr_t averages, int threads) {
        const Ragged tokens{starts.data(), int64_t(starts.size()) - 1, heads, head_dim};
        k.table->memory_keys({Type(type), tokens, at(x), at<const float>(decay), decay_stride, at<const float>(before),
                              at<const float>(scale), at(keys), at<float>(averages), threads});
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "memory_values",
      [](const KernelSet& k, int type, const std::vector<int64_t>& starts, int64_t heads, int64_t head_dim, uintptr_t x, uintptr_t before,
         uintptr_t share, uintptr_t scale, uintptr_t values, uintptr_t mixed, int threads) {
        const Ragged tokens{starts.data(), int64_t(starts.size()) - 1, heads, head_dim};
        k.table->memory_values({Type(type), tokens, at(x), at<const float>(before), at<const float>(share), at<const float>(scale),
                                at(values), at<float>(mixed), threads});
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "persistent_memory",
      [](const KernelSet& k, int type, int weight, uintptr_t x, uintptr_t y, int64_t rows, int64_t head_dim, int64_t pairs,
         const std::vector<std::tuple<uintptr_t, uintptr_t>>& keys, const std::vector<std::tuple<uintptr_t, uintptr_t>>& values,
         uintptr_t scores, uintptr_t weights, int threads) {
        PersistentMemory memory{Type(type), {}, {}};
        auto linear = [&](const std::tuple<uintptr_t, uintptr_t>& given, int64_t in, int64_t out) {
          Linear args{};
          args.weight = Type(weight);
          args.w = at(std::get<0>(given));
          args.scale = at<const float>(std::get<1>(given));
          args.in = in;
          args.out = out;
          return args;
        };
        for (const auto& given : keys) memory.keys.push_back(linear(given, head_dim, pairs));
        for (const auto& given : values) memory.values.push_back(linear(given, pairs, head_dim));
        memory.run(k.table, at(x), at(y), rows, at<float>(scores), at(weights), threads);
      },
      nb::call_guard<nb::gil_scoped_release>());
}

void bind_sampling(nb::module_& m) {
  m.def("sample_scratch_bytes", [](const KernelSet& k, int64_t vocab) { return k.table->sample_scratch_bytes(vocab); });
  m.def(
      "sample",
      [](const KernelSet& k, uintptr_t logits, int64_t stride, int64_t rows, int64_t vocab, uintptr_t temperature,
         uintptr_t top_k, uintptr_t top_p, uintptr_t min_p, uintptr_t uniform, uintptr_t first_edit, uintptr_t edit_ids,
         uintptr_t edit_factors, uintptr_t edit_offsets, uintptr_t wants_logsumexp, uintptr_t logsumexp,
         uintptr_t wants_weights, uintptr_t weights, uintptr_t tokens, uintptr_t scratch, int threads) {
        Sample s{};
        s.logits = at<const float>(logits);
        s.stride = stride;
        s.rows = rows;
        s.vocab = vocab;
        s.temperature = at<const double>(temperature);
        s.top_k = at<const int64_t>(top_k);
        s.top_p = at<const double>(top_p);
        s.min_p = at<const double>(min_p);
        s.uniform = at<const double>(uniform);
        s.first_edit = at<const int64_t>(first_edit);
        s.edit_ids = at<const int32_t>(edit_ids);
        s.edit_factors = at<const float>(edit_factors);
        s.edit_offsets = at<const float>(edit_offsets);
        s.wants_logsumexp = at<const uint8_t>(wants_logsumexp);
        s.logsumexp = at<double>(logsumexp);
        s.wants_weights = at<const uint8_t>(wants_weights);
        s.weights = at<float>(weights);
        s.tokens = at<int32_t>(tokens);
        s.scratch = at<char>(scratch);
        s.threads = threads;
        k.table->sample(s);
      },
      nb::call_guard<nb::gil_scoped_release>());
}

void bind_plan(nb::module_& m) {
  nb::class_<Workspace>(m, "Workspace").def(nb::init<>());
  nb::class_<Plan>(m, "Plan")
      .def(
          "__init__",
          [](Plan* self, const KernelSet& k, Workspace& workspace, int type, int q_heads, int kv_heads, int head_dim,
             int threads) { new (self) Plan(k.table, &workspace, Type(type), q_heads, kv_heads, head_dim, threads); },
          nb::keep_alive<1, 3>())
      .def(
          "add",
          [](Plan& self, int64_t queries, int64_t past, int64_t window, int64_t sinks,
             int layers, const std::vector<std::tuple<uintptr_t, int64_t, int64_t, int64_t>>& runs, Index* index, int64_t end,
             int64_t budget, uintptr_t votes, int64_t votes_stride) {
            std::vector<Run> list;
            for (const auto& [base, capacity, start, last] : runs) list.push_back({at<char>(base), capacity, start, last});
            self.add(queries, past, window, sinks, layers, std::move(list), index, end, budget, at<float>(votes), votes_stride);
          },
          "queries"_a, "past"_a, "window"_a, "sinks"_a, "layers"_a, "runs"_a, "index"_a.none(), "end"_a, "budget"_a,
          "votes"_a, "votes_stride"_a, nb::keep_alive<1, 8>())
      .def("rows_read", &Plan::rows_read)
      .def("capture",
           [](Plan& self, uintptr_t queries, uintptr_t outputs, uintptr_t dense) {
             self.capture(at<char>(queries), at<char>(outputs), at<char>(dense));
           })
      .def(
          "attend",
          [](Plan& self, int layer, uintptr_t q, int64_t q_token, int64_t q_head, uintptr_t k, int64_t k_token,
             int64_t k_head, uintptr_t v, int64_t v_token, int64_t v_head, uintptr_t out, float scale, int64_t window,
             int64_t blank) {
            Attention args{};
            args.layer = layer;
            args.q = at(q);
            args.k = at(k);
            args.v = at(v);
            args.q_token = q_token;
            args.q_head = q_head;
            args.k_token = k_token;
            args.k_head = k_head;
            args.v_token = v_token;
            args.v_head = v_head;
            args.out = at(out);
            args.scale = scale;
            args.window = window;
            args.blank = blank;
            self.attend(args);
          },
          nb::call_guard<nb::gil_scoped_release>());
}

// Parameters and arrays come by name from dicts, so that a method need not know of what others use. Arrays are tensors.
template <class T>
void take(const nb::dict& from, const char* name, T& to) {
  if (from.contains(name)) to = nb::cast<T>(from[name]);
}
Array array_of(nb::handle tensor) {
  if (!nb::cast<bool>(tensor.attr("is_contiguous")())) throw std::invalid_argument("Index: arrays must be contiguous");
  return {at<const void>(nb::cast<uintptr_t>(tensor.attr("data_ptr")())), nb::cast<int64_t>(tensor.attr("nbytes"))};
}
Array take_array(const nb::dict& from, const char* name) {
  return from.contains(name) ? array_of(from[name]) : Array{};
}

MethodArrays method_of(const nb::dict& from) {
  MethodArrays given;
  Method& m = given.method;
  int rank = 0, kind = 0;
  take(from, "rank", rank);
  take(from, "take", kind);
  m.rank = Rank(rank);
  m.take = Take(kind);
  m.unit = 1;
  take(from, "unit", m.unit);
  take(from, "row_dim", m.row_dim);
  bool own = false, shared = false;
  take(from, "own", own);
  take(from, "shared", shared);
  m.grouping = shared ? Grouping::shared : own ? Grouping::own : Grouping::united;
  take(from, "tail", m.tail);
  take(from, "planes", m.planes);
  take(from, "directions_stride", m.directions_stride);
  take(from, "bits", m.bits);
  take(from, "tables", m.tables);
  take(from, "log_u_count", m.log_u_count);
  take(from, "certify", m.certify);
  take(from, "confidence", m.confidence);
  take(from, "pilot", m.pilot);
  take(from, "seed", m.seed);
  given.directions = take_array(from, "directions");
  given.log_u = take_array(from, "log_u");
  given.mean = take_array(from, "mean");
  m.directions = given.directions.data;
  m.log_u = static_cast<const float*>(given.log_u.data);
  return given;
}

// Keeps a Python object until the last plan that reads it is gone, whichever thread that may be on.
std::shared_ptr<const void> held(nb::object object) {
  return {new nb::object(std::move(object)), [](const void* p) {
            const nb::gil_scoped_acquire gil;
            delete static_cast<const nb::object*>(p);
          }};
}

void bind_index(nb::module_& m) {
  nb::class_<Index>(m, "Index")
      .def("__init__",
           [](Index* self, int type, int q_heads, int kv_heads, int head_dim, const std::vector<int>& indexed_layer, int64_t begin) {
             new (self) Index({Type(type), q_heads, kv_heads, head_dim}, indexed_layer, begin);
           })
      .def("set_method", [](Index& self, const nb::dict& method) { self.set_method(method_of(method), held(nb::list(method.values()))); })
      .def("set_blocks",
           [](Index& self, const std::vector<std::tuple<int64_t, int64_t, nb::dict>>& blocks) {
             std::vector<std::pair<std::pair<int64_t, int64_t>, Arrays>> given;
             nb::list tensors;
             for (const auto& [begin, end, arrays] : blocks) {
               Arrays named;
               for (const auto& [name, tensor] : arrays) {
                 named[nb::cast<std::string>(name)] = array_of(tensor);
                 tensors.append(tensor);
               }
               given.push_back({{begin, end}, std::move(named)});
             }
             self.set_blocks(given, held(std::move(tensors)));
           })
      .def("counters",
           [](const Index& self) {
             const Counters& c = self.counters;
             return std::make_tuple(c.readings, c.rows, c.head_rows, c.entries, c.estimates, c.fallbacks);
           })
      .def("clear_counters", [](Index& self) { self.counters = {}; });
  m.def(
      "project",
      [](const KernelSet& k, int type, uintptr_t keys, int64_t planes, int64_t rows, int64_t plane_stride, int64_t head_dim,
         uintptr_t mean, uintptr_t directions, int64_t count, uintptr_t bits, uintptr_t norms, uintptr_t absolute,
         int threads) {
        k.table->project({Type(type), at(keys), planes, rows, plane_stride, head_dim, at<float>(mean), at(directions), count,
                          at<uint64_t>(bits), at<float>(norms), at<float>(absolute), threads});
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "codes",
      [](const KernelSet& k, uintptr_t bits, int64_t planes, int64_t rows, int key_bits, int tables, uintptr_t codes,
         int threads) {
        k.table->codes({at<uint64_t>(bits), planes, rows, key_bits, tables, at<uint16_t>(codes), threads});
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "tables",
      [](const KernelSet& k, uintptr_t codes, int64_t planes, int64_t rows, int key_bits, int tables, uintptr_t heads,
         uintptr_t ids, int threads) {
        k.table->tables({at<uint16_t>(codes), planes, rows, key_bits, tables, at<uint32_t>(heads), at<uint16_t>(ids), threads});
      },
      nb::call_guard<nb::gil_scoped_release>());
}

void bind_layer(nb::module_& m) {
  // Packed weights come as (address, scale, bias, inputs, outputs).
  using Packed = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t>;
  nb::class_<Layer>(m, "Layer")
      .def(
          "__init__",
          [](Layer* self, const KernelSet& k, int type, int weight, int activation, const Packed& qkv, const Packed& out,
             const Packed& gate_up, const Packed& down, std::tuple<uintptr_t, float> norm,
             std::tuple<uintptr_t, float> mlp_norm, std::tuple<uintptr_t, uintptr_t, float> head_norms,
             std::tuple<int, int, int> heads, int layer, float scale, int64_t window) {
            auto linear = [&](const Packed& p, Activation act) {
              Linear l{};
              l.weight = Type(weight);
              l.activation = act;
              l.w = at(std::get<0>(p));
              l.scale = at<float>(std::get<1>(p));
              l.bias = at<float>(std::get<2>(p));
              l.in = std::get<3>(p);
              l.out = std::get<4>(p);
              l.y_f32 = Type(type) == Type::f32;
              return l;
            };
            Rope rope{};
            rope.type = Type(type);
            std::tie(rope.q_heads, rope.kv_heads, rope.head_dim) = heads;
            rope.q_norm = at<float>(std::get<0>(head_norms));
            rope.k_norm = at<float>(std::get<1>(head_norms));
            rope.eps = std::get<2>(head_norms);
            auto rms_norm = [&](const std::tuple<uintptr_t, float>& given) {
              RmsNorm n{};
              n.type = Type(type);
              n.weight = at<float>(std::get<0>(given));
              n.eps = std::get<1>(given);
              return n;
            };
            new (self) Layer{k.table,
                             rms_norm(norm),
                             rms_norm(mlp_norm),
                             linear(qkv, Activation::none),
                             linear(out, Activation::none),
                             linear(gate_up, Activation(activation)),
                             linear(down, Activation::none),
                             rope,
                             layer,
                             scale,
                             window};
          })
      .def(
          "run",
          [](const Layer& self, Plan& plan, uintptr_t hidden, int64_t tokens, uintptr_t cos, uintptr_t sin,
             int rotary_dim, int threads) { self.run(plan, at(hidden), tokens, at(cos), at(sin), rotary_dim, threads); },
          nb::call_guard<nb::gil_scoped_release>());
}

void bind_mapping(nb::module_& m) {
  m.def("watch", [](uintptr_t begin, size_t bytes) { return reinterpret_cast<uintptr_t>(watch(begin, bytes)); });
  m.def("unwatch", [](uintptr_t mapping) { unwatch(at<Mapping>(mapping)); });
  m.def("was_cut", [](uintptr_t mapping) { return was_cut(at<const Mapping>(mapping)); });
}

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // of what lives until the interpreter ends, and is never cleared by it
  nb::class_<KernelSet>(m, "KernelSet")
      .def(nb::init<const std::string&>())
      .def_prop_ro("name", [](const KernelSet& k) { return std::string(k.table->name); });
  m.def("isas", [] {
    int count;
    const char* const* names = kernel_names(&count);
    return std::vector<std::string>(names, names + count);
  });
  m.attr("panel") = panel;
  m.attr("split") = split;
  m.attr("most_threads") = most_threads;
  bind_linear(m);
  bind_elementwise(m);
  bind_memory(m);
  bind_sampling(m);
  bind_index(m);
  bind_plan(m);
  bind_layer(m);
  bind_mapping(m);
}
