// Python's view of the native kernels: addresses and sizes in, nothing of torch.

#include <pybind11/pybind11.h>

#include "decode_attention.h"
#include "quantized_matmul.h"

namespace py = pybind11;
using namespace mimo_fast;

template <class T>
T* address(uintptr_t value) {
    return reinterpret_cast<T*>(value);
}

PYBIND11_MODULE(_native, module) {
    module.doc() = "Kernels of csrc/. What they are given is checked in mimo_fast/kernels/native.py.";
    py::enum_<Type>(module, "Type").value("float32", Type::float32).value("bfloat16", Type::bfloat16);
    module.def("runs_here", &has_avx2);
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
}
