// What the headers of torch 2.10, the oldest that we build against, lack of the stable ABI's later ones.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

// Later headers check a C call with this, and so pass on torch's own message; 2.10 only knows that the call failed.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif
