// Python's view of the native kernels: addresses and sizes in, nothing of torch.

#include <omp.h>
#include <pybind11/pybind11.h>

#include "codec_stack.h"
#include "decode_attention.h"
#include "patch_decoder.h"
#include "quantized_matmul.h"

namespace py = pybind11;
using namespace mimo_fast;

template <class T>
T* address(uintptr_t value) {
    return reinterpret_cast<T*>(value);
}

SamplerRows sampler_rows(
    uintptr_t temperature, uintptr_t top_k, uintptr_t tail, uintptr_t greedy, uintptr_t seeds, uintptr_t draws
) {
    return {address<const float>(temperature), address<const int64_t>(top_k), address<const float>(tail),
            address<const bool>(greedy), address<const int64_t>(seeds), address<const int64_t>(draws)};
}

void bind_transformer(py::module_& module) {
    py::class_<Linear>(module, "Linear")
        .def(py::init([](int64_t columns) {
                 Linear linear;
                 linear.columns = columns;
                 return linear;
             }),
             py::kw_only(), py::arg("columns"))
        .def("add_block",
             [](Linear& self, uintptr_t weight, uintptr_t bias, int64_t rows) {
                 self.blocks.push_back({address<const float>(weight), address<const float>(bias), rows});
                 self.rows += rows;
             },
             py::kw_only(), py::arg("weight"), py::arg("bias"), py::arg("rows"))
        .def_static(
            "quantized",
            [](uintptr_t words, uintptr_t scales, uintptr_t zeros, uintptr_t bias, int bits, int block, int64_t group,
               int64_t rows, int64_t columns) {
                Linear linear;
                linear.rows = rows, linear.columns = columns;
                linear.quantized = {nullptr, nullptr, address<const uint8_t>(words), address<const uint16_t>(scales),
                                    address<const uint16_t>(zeros), address<const void>(bias), nullptr, nullptr, 0,
                                    false, Type::float32, bits, block, group, 0, rows, columns};
                return linear;
            },
            py::kw_only(), py::arg("words"), py::arg("scales"), py::arg("zeros"), py::arg("bias"), py::arg("bits"),
            py::arg("block"), py::arg("group"), py::arg("rows"), py::arg("columns"));
    py::class_<Transformer>(module, "Transformer")
        .def(py::init([](uintptr_t norm, float eps, uintptr_t table, int64_t positions, int64_t dim, int64_t heads,
                         int64_t kv_heads, int64_t head_dim) {
                 return Transformer{{}, address<const float>(norm), eps, address<const float>(table), positions, dim,
                                    heads, kv_heads, head_dim};
             }),
             py::kw_only(), py::arg("norm"), py::arg("eps"), py::arg("table"), py::arg("positions"), py::arg("dim"),
             py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"))
        .def("add_layer",
             [](Transformer& self, uintptr_t attention_norm, const Linear& qkv, const Linear& out, uintptr_t ffn_norm,
                const Linear& gate_up, const Linear& down) {
                 self.layers.push_back(
                     {address<const float>(attention_norm), qkv, out, address<const float>(ffn_norm), gate_up, down});
             },
             py::kw_only(), py::arg("attention_norm"), py::arg("qkv"), py::arg("out"), py::arg("ffn_norm"),
             py::arg("gate_up"), py::arg("down"))
        .def("step",
             [](const Transformer& self, uintptr_t x, uintptr_t y, uintptr_t k, uintptr_t v, uintptr_t slots,
                uintptr_t starts, int64_t rows, int64_t capacity, int64_t layer_stride, int64_t slot_stride,
                int64_t head_stride, int64_t position_stride) {
                 step(self, address<const float>(x), address<float>(y),
                      {address<float>(k), address<float>(v), capacity, layer_stride, slot_stride, head_stride,
                       position_stride},
                      address<const int64_t>(slots), address<const int64_t>(starts), rows);
             },
             py::kw_only(), py::arg("x"), py::arg("y"), py::arg("k"), py::arg("v"), py::arg("slots"),
             py::arg("starts"), py::arg("rows"), py::arg("capacity"), py::arg("layer_stride"), py::arg("slot_stride"),
             py::arg("head_stride"), py::arg("position_stride"), py::call_guard<py::gil_scoped_release>())
        .def("encode",
             [](const Transformer& self, uintptr_t x, uintptr_t y, int64_t sequences, int64_t length, bool causal) {
                 encode(self, address<const float>(x), address<float>(y), sequences, length, causal);
             },
             py::kw_only(), py::arg("x"), py::arg("y"), py::arg("sequences"), py::arg("length"), py::arg("causal"),
             py::call_guard<py::gil_scoped_release>());
}

void bind_sampling(py::module_& module) {
    py::class_<PatchDecoder>(module, "PatchDecoder")
        .def(py::init([](const Transformer& transformer, uintptr_t heads, uintptr_t embeddings, int64_t channels,
                         int64_t group_size) {
                 return PatchDecoder{transformer, address<const float>(heads), address<const float>(embeddings),
                                     channels, group_size, {}};
             }),
             py::kw_only(), py::arg("transformer"), py::arg("heads"), py::arg("embeddings"), py::arg("channels"),
             py::arg("group_size"))
        .def("add_step",
             [](PatchDecoder& self, uintptr_t heads, int64_t active) {
                 self.steps.push_back({address<const int64_t>(heads), active});
             },
             py::kw_only(), py::arg("heads"), py::arg("active"))
        .def("decode",
             [](const PatchDecoder& self, uintptr_t local, uintptr_t codes, int64_t rows, uintptr_t temperature,
                uintptr_t top_k, uintptr_t tail, uintptr_t greedy, uintptr_t seeds, uintptr_t draws) {
                 decode_patch(self, address<const float>(local), address<int64_t>(codes), rows,
                              sampler_rows(temperature, top_k, tail, greedy, seeds, draws));
             },
             py::kw_only(), py::arg("local"), py::arg("codes"), py::arg("rows"), py::arg("temperature"),
             py::arg("top_k"), py::arg("tail"), py::arg("greedy"), py::arg("seeds"), py::arg("draws"),
             py::call_guard<py::gil_scoped_release>());
    module.def(
        "sample",
        [](uintptr_t logits, uintptr_t ids, uintptr_t banned, int64_t banned_stride, int64_t rows, int64_t size,
           uint32_t slot, uintptr_t temperature, uintptr_t top_k, uintptr_t tail, uintptr_t greedy, uintptr_t seeds,
           uintptr_t draws) {
            const SamplerRows settings = sampler_rows(temperature, top_k, tail, greedy, seeds, draws);
            Sampler sampler;
            for (int64_t r = 0; r < rows; ++r)
                address<int64_t>(ids)[r] = sampler.draw(
                    address<const float>(logits) + r * size, size,
                    banned ? address<const bool>(banned) + r * banned_stride : nullptr, -1, settings, r, slot, 0);
        },
        py::kw_only(), py::arg("logits"), py::arg("ids"), py::arg("banned"), py::arg("banned_stride"), py::arg("rows"),
        py::arg("size"), py::arg("slot"), py::arg("temperature"), py::arg("top_k"), py::arg("tail"), py::arg("greedy"),
        py::arg("seeds"), py::arg("draws"), py::call_guard<py::gil_scoped_release>());
    module.def(
        "gumbel",
        [](int64_t seed, int64_t draw, uint32_t slot, uint32_t first, int64_t count, uintptr_t noise) {
            gumbel(seed, draw, slot, first, count, address<float>(noise));
        },
        py::kw_only(), py::arg("seed"), py::arg("draw"), py::arg("slot"), py::arg("first"), py::arg("count"),
        py::arg("noise"), py::call_guard<py::gil_scoped_release>());
}

void bind_codec(py::module_& module) {
    py::class_<CodecStack>(module, "CodecStack")
        .def(py::init([](int64_t dim, int64_t heads, float eps) { return CodecStack{{}, dim, heads, eps}; }),
             py::kw_only(), py::arg("dim"), py::arg("heads"), py::arg("eps"))
        .def("add_layer",
             [](CodecStack& self, uintptr_t attention_norm, uintptr_t attention_norm_bias, const Linear& qkv,
                const Linear& out, uintptr_t ffn_norm, uintptr_t ffn_norm_bias, const Linear& up, const Linear& down) {
                 self.layers.push_back(
                     {{address<const float>(attention_norm), address<const float>(attention_norm_bias)}, qkv, out,
                      {address<const float>(ffn_norm), address<const float>(ffn_norm_bias)}, up, down});
             },
             py::kw_only(), py::arg("attention_norm"), py::arg("attention_norm_bias"), py::arg("qkv"), py::arg("out"),
             py::arg("ffn_norm"), py::arg("ffn_norm_bias"), py::arg("up"), py::arg("down"))
        .def("run",
             [](const CodecStack& self, uintptr_t x, int64_t rows, uintptr_t table, uintptr_t k, uintptr_t v,
                uintptr_t slots, uintptr_t visible, int64_t places) {
                 run_codec_stack(self, address<float>(x), rows,
                                 {address<const float>(table), address<float>(k), address<float>(v),
                                  address<const int64_t>(slots), address<const bool>(visible), places});
             },
             py::kw_only(), py::arg("x"), py::arg("rows"), py::arg("table"), py::arg("k"), py::arg("v"),
             py::arg("slots"), py::arg("visible"), py::arg("places"), py::call_guard<py::gil_scoped_release>());
}

PYBIND11_MODULE(_native, module) {
    module.doc() = "Kernels of csrc/. What they are given is checked in mimo_fast/kernels/native.py.";
    py::enum_<Type>(module, "Type").value("float32", Type::float32).value("bfloat16", Type::bfloat16);
    module.def("runs_here", &has_avx2);
    module.def(
        "set_threads",
        [](int threads) {
            const int before = omp_get_max_threads();
            omp_set_num_threads(threads);
            return before;
        },
        py::arg("threads"));
    module.def(
        "quantized_matmul",
        [](uintptr_t x, uintptr_t y, uintptr_t words, uintptr_t scales, uintptr_t zeros, uintptr_t bias, uintptr_t norm,
           uintptr_t residual, float eps, bool swiglu, Type type, int bits, int block, int64_t group, int64_t M,
           int64_t N, int64_t K) {
            quantized_matmul({address<const void>(x), address<void>(y), address<const uint8_t>(words),
                              address<const uint16_t>(scales), address<const uint16_t>(zeros),
                              address<const void>(bias), address<const void>(norm), address<const void>(residual), eps,
                              swiglu, type, bits, block, group, M, N, K});
        },
        py::kw_only(), py::arg("x"), py::arg("y"), py::arg("words"), py::arg("scales"), py::arg("zeros"),
        py::arg("bias"), py::arg("norm"), py::arg("residual"), py::arg("eps"), py::arg("swiglu"), py::arg("type"),
        py::arg("bits"), py::arg("block"), py::arg("group"), py::arg("M"), py::arg("N"), py::arg("K"),
        py::call_guard<py::gil_scoped_release>());
    module.def(
        "decode_attention",
        [](uintptr_t qkv, uintptr_t table, uintptr_t k, uintptr_t v, uintptr_t slots, uintptr_t starts, uintptr_t y,
           Type type, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t positions,
           int64_t capacity, int64_t row_stride, int64_t slot_stride, int64_t head_stride, int64_t position_stride) {
            decode_attention({address<const void>(qkv), address<const float>(table), address<void>(k),
                              address<void>(v), address<const int64_t>(slots), address<const int64_t>(starts),
                              address<void>(y), type, rows, heads, kv_heads, head_dim, positions, capacity, row_stride,
                              slot_stride, head_stride, position_stride});
        },
        py::kw_only(), py::arg("qkv"), py::arg("table"), py::arg("k"), py::arg("v"), py::arg("slots"),
        py::arg("starts"), py::arg("y"), py::arg("type"), py::arg("rows"), py::arg("heads"), py::arg("kv_heads"),
        py::arg("head_dim"), py::arg("positions"), py::arg("capacity"), py::arg("row_stride"),
        py::arg("slot_stride"), py::arg("head_stride"), py::arg("position_stride"),
        py::call_guard<py::gil_scoped_release>());
    bind_transformer(module);
    bind_sampling(module);
    bind_codec(module);
}
