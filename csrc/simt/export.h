// How a file of kernels offers them to Python: functions that launch them, over NumPy's arrays.
//
//   void scale(simt::Buffer<const float> x, simt::Buffer<float> y, double factor) { simt::launch(...); }
//   SIMT_EXPORT("scale", scale);
//
// binding.cpp alone includes pybind11: what is compiled with the kernels is compiled for their checks, and slowly.
#pragma once

#include <concepts>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "error.h"
#include "half.h"

namespace simt {

// An array of Python's, as a parameter. Of const elements, the kernel may not write it; else the array has to be
// writable. __nv_bfloat16 takes arrays of uint16, which is how NumPy can hold it.
template <typename T>
struct Buffer {
  T* data;
  int64_t size;
};

struct Array {
  void* data;
  int64_t size;
  unsigned item_bytes;
  char kind;  // NumPy's: 'f', 'i', 'u'
  bool writable;
};

using Argument = std::variant<int64_t, double, Array, std::vector<Array>, std::vector<int64_t>>;

template <typename T>
constexpr char kind_of() {
  using Element = std::remove_const_t<T>;
  if constexpr (std::is_floating_point_v<Element> || std::is_same_v<Element, __half>) {
    return 'f';
  } else {
    return std::is_signed_v<Element> ? 'i' : 'u';
  }
}

// Makes the array known to the machine for the call; throws Error where its type or writability is not the parameter's.
void add_buffer(const Array& array, const std::string& name, char kind, size_t item_bytes, bool writable);

// Memory for the rest of the call: what cudaMalloc gives, whose contents are an error to read before they are written,
// or zeros.
void* workspace(size_t bytes, unsigned granule, const char* name, bool zeros);

template <typename T>
T* workspace(int64_t size, const char* name, bool zeros = false) {
  return static_cast<T*>(workspace(static_cast<size_t>(size) * sizeof(T), sizeof(T) < 4 ? sizeof(T) : 4, name, zeros));
}

template <typename P>
struct Convert;

template <typename P>
  requires std::integral<P> || std::floating_point<P>
struct Convert<P> {
  static P from(const Argument& argument, size_t position) {
    if (const auto* integer = std::get_if<int64_t>(&argument)) {
      return static_cast<P>(*integer);
    }
    if constexpr (std::floating_point<P>) {
      if (const auto* number = std::get_if<double>(&argument)) {
        return static_cast<P>(*number);
      }
    }
    throw Error("simt: argument " + std::to_string(position) + " must be a number");
  }
};

template <>
struct Convert<std::vector<int64_t>> {
  static std::vector<int64_t> from(const Argument& argument, size_t position) {
    if (const auto* integers = std::get_if<std::vector<int64_t>>(&argument)) {
      return *integers;
    }
    throw Error("simt: argument " + std::to_string(position) + " must be a list of integers");
  }
};

template <typename T>
struct Convert<Buffer<T>> {
  static Buffer<T> one(const Array& array, const std::string& name) {
    add_buffer(array, name, kind_of<T>(), sizeof(T), !std::is_const_v<T>);
    return {static_cast<T*>(array.data), array.size};
  }
  static Buffer<T> from(const Argument& argument, size_t position) {
    if (const auto* array = std::get_if<Array>(&argument)) {
      return one(*array, "argument " + std::to_string(position));
    }
    throw Error("simt: argument " + std::to_string(position) + " must be an array");
  }
};

template <typename T>
struct Convert<std::vector<Buffer<T>>> {
  static std::vector<Buffer<T>> from(const Argument& argument, size_t position) {
    const auto* arrays = std::get_if<std::vector<Array>>(&argument);
    if (!arrays) {
      // A list of nothing may be one of anything.
      const auto* integers = std::get_if<std::vector<int64_t>>(&argument);
      if (integers && integers->empty()) {
        return {};
      }
      throw Error("simt: argument " + std::to_string(position) + " must be a list of arrays");
    }
    std::vector<Buffer<T>> buffers;
    for (const Array& array : *arrays) {
      const std::string index = "[" + std::to_string(buffers.size()) + "]";
      buffers.push_back(Convert<Buffer<T>>::one(array, "argument " + std::to_string(position) + index));
    }
    return buffers;
  }
};

using Caller = void (*)(void (*)(), const std::vector<Argument>&);

struct Exported {
  std::string name;
  void (*function)();
  Caller caller;
  size_t parameters;
};

std::vector<Exported>& exported();

template <typename... P>
struct Exporter {
  template <size_t... I>
  static void call(void (*function)(P...), const std::vector<Argument>& arguments, std::index_sequence<I...>) {
    // In braces: converted from the left to the right, so that buffers are known by their positions.
    std::tuple<P...> converted{Convert<P>::from(arguments[I], I)...};
    std::apply(function, std::move(converted));
  }
  static void caller(void (*function)(), const std::vector<Argument>& arguments) {
    call(reinterpret_cast<void (*)(P...)>(function), arguments, std::index_sequence_for<P...>());
  }
};

template <typename... P>
bool export_function(const char* name, void (*function)(P...)) {
  exported().push_back({name, reinterpret_cast<void (*)()>(function), &Exporter<P...>::caller, sizeof...(P)});
  return true;
}

}  // namespace simt

#define SIMT_JOIN_NAME(a, b) a##b
#define SIMT_UNIQUE_NAME(a, b) SIMT_JOIN_NAME(a, b)
#define SIMT_EXPORT(name, ...)                                                       \
  [[maybe_unused]] static const bool SIMT_UNIQUE_NAME(simt_exported_, __COUNTER__) = \
      ::simt::export_function(name, __VA_ARGS__)
