// What the files of Python's view share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace py = pybind11;
using namespace mimo_fast;
using Unlocked = py::call_guard<py::gil_scoped_release>;

extern const Kernels* kernels;  // set when the module is loaded

void bind_codec(py::module_& module);

template <class T>
T* address(uintptr_t value) {
    return reinterpret_cast<T*>(value);
}

// What Python passes for a field of a struct: a pointer's address, else its value.
template <class Field>
using Passed = std::conditional_t<std::is_pointer_v<Field>, uintptr_t, Field>;

template <class Field>
Field field(Passed<Field> value) {
    if constexpr (std::is_pointer_v<Field>) return reinterpret_cast<Field>(value);
    else return value;
}

// A constructor from the fields in their order, which Python gives by name.
template <class Struct, class... Fields, class... Names>
void bind_struct(py::module_& module, const char* name, Names... names) {
    py::class_<Struct>(module, name)
        .def(py::init([](Passed<Fields>... values) { return Struct{field<Fields>(values)...}; }), py::kw_only(),
             py::arg(names)...);
}

inline void check(bool right, const std::string& what) {
    if (!right) throw std::invalid_argument(what);
}

// Of a call that computes nothing, addresses may be missing.
template <class... Address>
void check_present(int64_t rows, Address... addresses) {
    check(rows >= 0, "there are fewer than no rows");
    check(!rows || (... && (addresses != 0)), "a tensor is missing");
}

inline void check_slot(int64_t slot, int64_t row, int64_t count) {
    check(slot >= 0 && slot < count, "slot " + std::to_string(slot) + " of row " + std::to_string(row) +
                                         " is not below " + std::to_string(count));
}

inline void check_slots(const int64_t* slots, int64_t rows, int64_t count) {
    for (int64_t r = 0; r < rows; ++r) check_slot(slots[r], r, count);
}

inline void check_shape(const Linear& w, int64_t rows, int64_t columns, const char* name) {
    check(w.rows == rows && w.columns == columns,
          std::string(name) + " is [" + std::to_string(w.rows) + ", " + std::to_string(w.columns) + "], not [" +
              std::to_string(rows) + ", " + std::to_string(columns) + "]");
}
