// What every CPU kernel shares: run-time dispatch between instruction sets, dtypes, checks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "stable_compat.h"

// A function marked FASTGAN_MULTIVERSION is compiled once per instruction set and chosen when the library is loaded, so
// that one binary serves every x86-64. Everything that it inlines (FASTGAN_INLINE) is compiled with it.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define FASTGAN_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTGAN_MULTIVERSION
#endif
#if defined(__GNUC__)
#define FASTGAN_INLINE inline __attribute__((always_inline))
#define FASTGAN_LAMBDA_INLINE __attribute__((always_inline))
#else
#define FASTGAN_INLINE inline
#define FASTGAN_LAMBDA_INLINE
#endif

namespace fastgan {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The type in which a kernel computes and accumulates values stored as T.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

// Calls f.template operator()<T>() with the C++ type of a floating dtype.
template <typename F>
auto dispatch_dtype(const char* op, ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::BFloat16:
      return f.template operator()<BFloat16>();
    case ScalarType::Half:
      return f.template operator()<Half>();
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(dtype));
  }
  __builtin_unreachable();
}

// Elements that one task of a memory-bound loop should at least have: about 10 us of work, several times a fork and
// join.
constexpr int64_t kGrainElements = 16384;

// Of values that are not negative.
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

}  // namespace fastgan
