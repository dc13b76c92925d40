// The Python module of a file of kernels: what export.h collected, over NumPy's arrays.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "export.h"
#include "machine.h"

namespace py = pybind11;

namespace simt {

std::vector<Exported>& exported() {
  static std::vector<Exported> functions;
  return functions;
}

void add_buffer(const Array& array, const std::string& name, char kind, size_t item_bytes, bool writable) {
  const std::string where = "simt: " + name;
  if (array.kind != kind || array.item_bytes != item_bytes) {
    throw Error(where + " must be an array of " + kind + std::to_string(item_bytes) + ", got " + array.kind +
                std::to_string(array.item_bytes));
  }
  if (writable && !array.writable) {
    throw Error(where + " must be writable");
  }
  machine().memory.add_buffer(array.data, static_cast<size_t>(array.size) * item_bytes,
                              static_cast<unsigned>(item_bytes < 4 ? item_bytes : 4), writable, name);
}

void* workspace(size_t bytes, unsigned granule, const char* name, bool zeros) {
  return machine().memory.workspace(bytes, granule, name, zeros);
}

namespace {

Array to_array(const py::array& array) {
  if (!(array.flags() & py::array::c_style)) {
    throw Error("simt: an array must be contiguous");
  }
  // An array of NumPy says with a flag of its own whether it may be written.
  return {const_cast<void*>(array.data()), array.size(), static_cast<unsigned>(array.itemsize()), array.dtype().kind(),
          array.writeable()};
}

Argument to_argument(const py::handle& value) {
  if (py::isinstance<py::array>(value)) {
    return to_array(py::reinterpret_borrow<py::array>(value));
  }
  if (py::isinstance<py::float_>(value)) {
    return value.cast<double>();
  }
  if (py::isinstance<py::int_>(value)) {
    return value.cast<int64_t>();
  }
  const auto sequence = value.cast<py::sequence>();
  if (py::len(sequence) > 0 && py::isinstance<py::array>(sequence[0])) {
    std::vector<Array> arrays;
    for (const py::handle item : sequence) {
      arrays.push_back(to_array(item.cast<py::array>()));
    }
    return arrays;
  }
  std::vector<int64_t> integers;
  for (const py::handle item : sequence) {
    integers.push_back(item.cast<int64_t>());
  }
  return integers;
}

// Calls an exported function; returns what was read and written of each array: [(name, bytes read, bytes written)].
py::list call(const Exported& function, const py::args& values) {
  if (values.size() != function.parameters) {
    throw Error("simt: " + function.name + " takes " + std::to_string(function.parameters) + " arguments, got " +
                std::to_string(values.size()));
  }
  std::vector<Argument> arguments;
  for (const py::handle value : values) {
    arguments.push_back(to_argument(value));
  }
  Memory& memory = machine().memory;
  memory.clear_buffers();
  function.caller(function.function, arguments);
  py::list traffic;
  for (const auto& buffer : memory.buffers()) {
    traffic.append(py::make_tuple(buffer->name, buffer->read_bytes, buffer->written_bytes));
  }
  memory.clear_buffers();
  return traffic;
}

void set_schedule(const std::string& order, uint64_t seed) {
  if (order != "forward" && order != "reverse" && order != "random") {
    throw Error("simt: the order must be forward, reverse or random, got " + order);
  }
  machine().schedule = {order == "forward"   ? Schedule::Order::kForward
                        : order == "reverse" ? Schedule::Order::kReverse
                                             : Schedule::Order::kRandom,
                        seed};
}

}  // namespace
}  // namespace simt

PYBIND11_MODULE(simt_kernels, module) {
  py::register_local_exception<simt::Error>(module, "Error", PyExc_RuntimeError);
  module.def("set_schedule", &simt::set_schedule, py::arg("order"), py::arg("seed") = 0,
             "The order of threads and blocks in the launches to come: forward, reverse or random.");
  for (const simt::Exported& function : simt::exported()) {
    module.attr(function.name.c_str()) =
        py::cpp_function([function](const py::args& values) { return simt::call(function, values); });
  }
}
