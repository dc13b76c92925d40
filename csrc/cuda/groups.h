// CUDA's cooperative groups, for nvcc or for csrc/simt.
#pragma once

#include "device.h"

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#else
#include "../simt/cooperative_groups.h"
#endif
