// Python's view of the kernels: addresses and sizes in named structs, nothing of torch. What a struct can tell to be
// wrong raises ValueError when it is made, and what a call can tell (slots, lengths) before anything is computed; types
// and shapes of tensors are checked in mimo_fast/kernels/cpu, which alone calls this.

#include "bindings.h"

#include "instruction_set.h"
#include "threads.h"

const Kernels* kernels = nullptr;

namespace {

// A row without a position reads nothing of the cache, whatever its slot.
void check_rows(const Positions& at, const Cache& cache) {
    for (int64_t r = 0; r < at.rows; ++r)
        if (at.starts[r] >= 0) check_slot(at.slots[r], r, cache.slots);
}

void check_cache(const Cache& cache, const Positions& at) {
    check_present(at.rows, uintptr_t(at.slots), uintptr_t(at.starts));
    check_present(cache.layers * cache.slots * cache.capacity, uintptr_t(cache.k), uintptr_t(cache.v));
    check_rows(at, cache);
}

void check_heads(int64_t heads, int64_t kv_heads, int64_t head_dim) {
    check(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "heads are no multiple of kv_heads");
    check(head_dim > 0 && head_dim % 8 == 0, "head_dim is no multiple of 8");
}

QuantizedWeight quantized_weight(
    uintptr_t words, uintptr_t scales, uintptr_t zeros, int bits, int block, int64_t group, int64_t rows,
    int64_t columns
) {
    check(bits == 4 || bits == 8, "bits are neither 4 nor 8");
    check(block == 128 || block == 64 || (block == 32 && bits == 8), "blocks of this size are not known");
    check(group > 0 && group % block == 0, "group is no multiple of block");
    check(columns > 0 && columns % group == 0, "columns are no multiple of group");
    check(rows >= 0 && (!rows || (words && scales)), "words and scales are missing");
    return {address<const uint8_t>(words), address<const uint16_t>(scales), address<const uint16_t>(zeros), bits,
            block, group, rows, columns};
}

void bind_weights(py::module_& module) {
    py::enum_<Type>(module, "Type").value("float32", Type::float32).value("bfloat16", Type::bfloat16);
    py::class_<QuantizedWeight>(module, "QuantizedWeight")
        .def(py::init(&quantized_weight), py::kw_only(), py::arg("words"), py::arg("scales"), py::arg("zeros"),
             py::arg("bits"), py::arg("block"), py::arg("group"), py::arg("rows"), py::arg("columns"));
    py::class_<QuantizedMatmul>(module, "QuantizedMatmul")
        .def(py::init([](const QuantizedWeight& weight, Type type, uintptr_t bias, uintptr_t norm, float eps,
                         bool swiglu) {
                 check(!swiglu || weight.rows % 2 == 0, "SwiGLU needs an even number of rows");
                 return QuantizedMatmul{weight, type, address<const void>(bias), address<const void>(norm), eps, swiglu};
             }),
             py::kw_only(), py::arg("weight"), py::arg("type"), py::arg("bias"), py::arg("norm"), py::arg("eps"),
             py::arg("swiglu"))
        .def("run",
             [](QuantizedMatmul self, uintptr_t x, uintptr_t y, uintptr_t residual, int64_t rows) {
                 check_present(rows, x, y);
                 self.x = address<const void>(x);
                 self.y = address<void>(y);
                 self.residual = address<const void>(residual);
                 self.M = rows;
                 kernels->quantized_matmul(self);
             },
             py::kw_only(), py::arg("x"), py::arg("y"), py::arg("residual"), py::arg("rows"), Unlocked());
    py::class_<Linear>(module, "Linear")
        .def(py::init([](int64_t columns) {
                 check(columns > 0 && columns % 8 == 0, "columns are no multiple of 8");
                 return Linear{{}, {}, nullptr, 0, columns, {}};
             }),
             py::kw_only(), py::arg("columns"))
        .def("add_block",
             [](Linear& self, uintptr_t weight, uintptr_t bias, int64_t rows) {
                 check(!self.quantized.bits, "the matrix is quantized");
                 check(weight && rows > 0, "the block is empty");
                 self.blocks.push_back({address<const float>(weight), address<const float>(bias), rows});
                 self.rows += rows;
             },
             py::kw_only(), py::arg("weight"), py::arg("bias"), py::arg("rows"))
        .def_static(
            "quantized",
            [](const QuantizedWeight& weight, uintptr_t bias) {
                return Linear{{}, weight, address<const float>(bias), weight.rows, weight.columns, {}};
            },
            py::kw_only(), py::arg("weight"), py::arg("bias"))
        .def("adapt",
             [](Linear& self, uintptr_t a, uintptr_t b, int64_t rank, int64_t first, int64_t rows) {
                 check(a && b, "A and B are missing");
                 check(rank > 0 && rank % 8 == 0, "the rank is no multiple of 8");
                 check(self.columns % 8 == 0, "columns are no multiple of 8");
                 check(first >= 0 && rows > 0 && rows <= self.rows - first, "rows of an adapter are none of the matrix");
                 self.added.push_back({address<const float>(a), address<const float>(b), rank, first, rows});
             },
             py::kw_only(), py::arg("a"), py::arg("b"), py::arg("rank"), py::arg("first"), py::arg("rows"))
        .def("scale",
             [](Linear& self, uintptr_t factor, uintptr_t bias) {
                 check(factor && !self.added.empty(), "a factor is missing, or the adapter that it belongs to");
                 self.factor = address<const float>(factor);
                 self.last_bias = address<const float>(bias);
             },
             py::kw_only(), py::arg("factor"), py::arg("bias"))
        .def("multiply",
             [](const Linear& self, uintptr_t x, uintptr_t y, int64_t rows) {
                 check_present(rows, x, y);
                 kernels->multiply(self, address<const float>(x), rows, address<float>(y));
             },
             py::kw_only(), py::arg("x"), py::arg("y"), py::arg("rows"), Unlocked());
}

void bind_attention(py::module_& module) {
    bind_struct<Cache, void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>(
        module, "Cache", "k", "v", "layers", "slots", "capacity", "layer_stride", "slot_stride", "head_stride",
        "position_stride");
    bind_struct<Positions, const int64_t*, const int64_t*, int64_t>(module, "Positions", "slots", "starts", "rows");
    py::class_<DecodeAttention>(module, "DecodeAttention")
        .def(py::init([](Type type, int64_t heads, int64_t kv_heads, int64_t head_dim, uintptr_t table,
                         int64_t positions) {
                 check_heads(heads, kv_heads, head_dim);
                 return DecodeAttention{type, heads, kv_heads, head_dim, address<const float>(table), positions,
                                        nullptr, 0, nullptr, {}, {}};
             }),
             py::kw_only(), py::arg("type"), py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"),
             py::arg("table"), py::arg("positions"))
        .def("run",
             [](DecodeAttention self, uintptr_t qkv, int64_t row_stride, uintptr_t y, const Cache& cache,
                const Positions& at) {
                 check_cache(cache, at);
                 check_present(at.rows, qkv, y);
                 check(self.table || !self.positions, "the table is missing");
                 self.qkv = address<const void>(qkv);
                 self.row_stride = row_stride;
                 self.y = address<void>(y);
                 self.cache = cache;
                 self.at = at;
                 kernels->decode_attention(self);
             },
             py::kw_only(), py::arg("qkv"), py::arg("row_stride"), py::arg("y"), py::arg("cache"), py::arg("at"),
             Unlocked());
}

void add_layer(
    Transformer& self, uintptr_t attention_norm, const Linear& qkv, const Linear& out, uintptr_t ffn_norm,
    const Linear& gate_up, const Linear& down
) {
    check(attention_norm && ffn_norm, "a norm is missing");
    check_shape(qkv, self.qkv_width(), self.dim, "qkv");
    check_shape(out, self.dim, self.heads * self.head_dim, "out");
    check_shape(gate_up, gate_up.rows / 2 * 2, self.dim, "gate_up");
    check_shape(down, self.dim, gate_up.rows / 2, "down");
    self.layers.push_back(
        {address<const float>(attention_norm), qkv, out, address<const float>(ffn_norm), gate_up, down});
}

void bind_transformer(py::module_& module) {
    py::class_<Transformer>(module, "Transformer")
        .def(py::init([](uintptr_t norm, float eps, uintptr_t table, int64_t positions, int64_t dim, int64_t heads,
                         int64_t kv_heads, int64_t head_dim) {
                 check(norm && table, "norm and table are missing");
                 check(dim > 0 && dim % 8 == 0, "dim is no multiple of 8");
                 check_heads(heads, kv_heads, head_dim);
                 return Transformer{{}, address<const float>(norm), eps, address<const float>(table), positions, dim,
                                    heads, kv_heads, head_dim};
             }),
             py::kw_only(), py::arg("norm"), py::arg("eps"), py::arg("table"), py::arg("positions"), py::arg("dim"),
             py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"))
        .def("add_layer", &add_layer, py::kw_only(), py::arg("attention_norm"), py::arg("qkv"), py::arg("out"),
             py::arg("ffn_norm"), py::arg("gate_up"), py::arg("down"))
        .def("step",
             [](const Transformer& self, uintptr_t x, uintptr_t y, const Cache& cache, const Positions& at) {
                 check(cache.layers == int64_t(self.layers.size()), "the cache has other layers");
                 check_cache(cache, at);
                 check_present(at.rows, x, y);
                 kernels->step(self, address<const float>(x), address<float>(y), cache, at);
             },
             py::kw_only(), py::arg("x"), py::arg("y"), py::arg("cache"), py::arg("at"), Unlocked())
        .def("encode",
             [](const Transformer& self, uintptr_t x, uintptr_t y, int64_t sequences, int64_t length, bool causal) {
                 check(length >= 0 && length <= self.positions, "a sequence is longer than the table of rotations");
                 check_present(sequences * length, x, y);
                 kernels->encode(self, address<const float>(x), address<float>(y), sequences, length, causal);
             },
             py::kw_only(), py::arg("x"), py::arg("y"), py::arg("sequences"), py::arg("length"), py::arg("causal"),
             Unlocked());
}

// The patch decoder and the rows of its tables, to hold its steps against.
struct BoundPatchDecoder {
    PatchDecoder decoder;
    int64_t table_rows;

    void add_step(uintptr_t heads, int64_t active) {
        check_present(active, heads);
        const int64_t* values = address<const int64_t>(heads);
        for (int64_t a = 0; a < active; ++a) {
            const int64_t channel = values[a], frame = values[active + a], first = values[2 * active + a];
            const int64_t size = values[3 * active + a];
            check(channel >= 0 && channel < decoder.channels && frame >= 0 && frame < decoder.group_size,
                  "a head is of no channel and frame of the patch");
            check(first >= 0 && size > 0 && first + size <= table_rows, "a head is beyond the tables");
        }
        check(int64_t(decoder.steps.size()) < decoder.transformer.positions,
              "there are more steps than the transformer's table has positions");
        decoder.steps.push_back({values, active});
    }
};

void check_settings(const SamplerRows& s) {
    check_present(s.rows, uintptr_t(s.temperature), uintptr_t(s.top_k), uintptr_t(s.tail), uintptr_t(s.greedy),
                  uintptr_t(s.seeds), uintptr_t(s.draws));
}

void bind_sampling(py::module_& module) {
    bind_struct<SamplerRows, const float*, const int64_t*, const float*, const bool*, const int64_t*, const int64_t*,
                int64_t>(module, "SamplerRows", "temperature", "top_k", "tail", "greedy", "seeds", "draws", "rows");
    py::class_<Logits>(module, "Logits")
        .def(py::init([](uintptr_t values, uintptr_t banned, int64_t banned_stride, int64_t size, uint32_t slot) {
                 check(size > 0, "there are no ids");
                 check(banned_stride == 0 || banned_stride == size, "banned ids are neither of one row nor of each");
                 return Logits{address<const float>(values), address<const bool>(banned), banned_stride, size, slot};
             }),
             py::kw_only(), py::arg("values"), py::arg("banned"), py::arg("banned_stride"), py::arg("size"),
             py::arg("slot"));
    module.def(
        "sample",
        [](const Logits& logits, const SamplerRows& settings, uintptr_t ids) {
            check_present(settings.rows, ids, uintptr_t(logits.values));
            check_settings(settings);
            kernels->sample(logits, settings, address<int64_t>(ids));
        },
        py::kw_only(), py::arg("logits"), py::arg("settings"), py::arg("ids"), Unlocked());
    module.def(
        "gumbel",
        [](int64_t seed, int64_t draw, uint32_t slot, uint32_t first, int64_t count, uintptr_t noise) {
            check_present(count, noise);
            kernels->gumbel(seed, draw, slot, first, count, address<float>(noise));
        },
        py::kw_only(), py::arg("seed"), py::arg("draw"), py::arg("slot"), py::arg("first"), py::arg("count"),
        py::arg("noise"), Unlocked());
    py::class_<BoundPatchDecoder>(module, "PatchDecoder")
        .def(py::init([](const Transformer& transformer, uintptr_t heads, uintptr_t embeddings, int64_t table_rows,
                         int64_t channels, int64_t group_size) {
                 check(heads && embeddings, "heads and embeddings are missing");
                 check(channels > 0 && group_size > 0, "a patch has no codes");
                 return BoundPatchDecoder{{transformer, address<const float>(heads),
                                           address<const float>(embeddings), channels, group_size, {}},
                                          table_rows};
             }),
             py::kw_only(), py::arg("transformer"), py::arg("heads"), py::arg("embeddings"), py::arg("table_rows"),
             py::arg("channels"), py::arg("group_size"))
        .def("add_step", &BoundPatchDecoder::add_step, py::kw_only(), py::arg("heads"), py::arg("active"))
        .def("decode",
             [](const BoundPatchDecoder& self, uintptr_t local, uintptr_t codes, const SamplerRows& settings) {
                 check_present(settings.rows, local, codes);
                 check_settings(settings);
                 kernels->decode_patch(self.decoder, address<const float>(local), address<int64_t>(codes), settings);
             },
             py::kw_only(), py::arg("local"), py::arg("codes"), py::arg("settings"), Unlocked());
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Kernels of csrc/cpu; mimo_fast/kernels/cpu calls them.";
    kernels = &choose_kernels();
    module.def("instruction_set", [] { return kernels->name; }, "Name of the set of kernels in use.");
    module.def(
        "instruction_sets",
        [] {
            std::vector<std::string> names;
            for (const Kernels* each : supported_kernels()) names.push_back(each->name);
            return names;
        },
        "Names of the sets that this CPU runs, the fastest first.");
    module.def("narrow", &narrow, "Keeps the operations of this thread on it until `widen`.");
    module.def("widen", &widen);
    module.def("available_threads", &available_threads);
    module.def(
        "multiply_registers",
        [](int64_t rounds) {
            int64_t products = 0;
#pragma omp parallel reduction(+ : products)
            products += kernels->multiply_registers(rounds);
            return products;
        },
        py::arg("rounds"), Unlocked(),
        "Multiplies integers on registers alone, on all threads; returns how many products that was, or 0 for none.");
    bind_weights(module);
    bind_attention(module);
    bind_transformer(module);
    bind_sampling(module);
    bind_codec(module);
}
