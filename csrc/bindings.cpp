// Python's view of the native kernels: addresses and sizes in, nothing of torch.

#include <pybind11/pybind11.h>

#include "quantized_matmul.h"

namespace py = pybind11;
using namespace mimo_fast;

template <class T>
T* address(uintptr_t value) {
    return reinterpret_cast<T*>(value);
}

PYBIND11_MODULE(_native, module) {
    module.doc() = "Kernels of csrc/. Pointers are checked in mimo_fast/kernels/native.py.";
    py::enum_<Type>(module, "Type").value("float32", Type::float32).value("bfloat16", Type::bfloat16);
    module.def("quantized_matmul_runs", &quantized_matmul_runs);
    module.def(
        "quantized_matmul",
        [](uintptr_t x, uintptr_t y, uintptr_t words, uintptr_t scales, uintptr_t zeros, uintptr_t bias, Type type,
           int bits, int block, int64_t group, int64_t M, int64_t N, int64_t K) {
            quantized_matmul({address<const void>(x), address<void>(y), address<const uint8_t>(words),
                              address<const uint16_t>(scales), address<const uint16_t>(zeros),
                              address<const void>(bias), type, bits, block, group, M, N, K});
        },
        py::kw_only(), py::arg("x"), py::arg("y"), py::arg("words"), py::arg("scales"), py::arg("zeros"),
        py::arg("bias"), py::arg("type"), py::arg("bits"), py::arg("block"), py::arg("group"), py::arg("M"),
        py::arg("N"), py::arg("K"), py::call_guard<py::gil_scoped_release>());
}
