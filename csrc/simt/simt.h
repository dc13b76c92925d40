// All that kernel text needs where g++ compiles it in nvcc's place. cuda/device.h includes it; README.md says how it
// works.
#pragma once

#include "atomic.h"
#include "block.h"
#include "half.h"
#include "launch.h"
#include "math.h"
#include "types.h"
#include "warp.h"
