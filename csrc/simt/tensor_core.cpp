#include "tensor_core.h"

#include <cstring>

#include "machine.h"

// The layouts of the fragments are those of the PTX ISA manual, "Matrix fragments for mma.m16n8k16 with floating point
// type" and "ldmatrix".

namespace simt {
namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;

struct Product {
  float* d;
  const uint32_t *a, *b;
  float (*value)(uint16_t);
};

float element(const uint32_t* fragment, unsigned i, float (*value)(uint16_t)) {
  return value(static_cast<uint16_t>(fragment[i / 2] >> (i % 2 * 16)));
}

void finish_product(const WarpOperation& operation) {
  float a[16][16], b[16][8], sums[16][8];
  const auto lane = [&](unsigned i) -> Product& { return *static_cast<Product*>(operation.lane[i]); };
  for (unsigned l = 0; l < kWarp; ++l) {
    const Product& product = lane(l);
    const unsigned group = l / 4, pair = l % 4 * 2;
    for (unsigned i = 0; i < 8; ++i) {
      a[group + i / 2 % 2 * 8][pair + i % 2 + i / 4 * 8] = element(product.a, i, product.value);
    }
    for (unsigned i = 0; i < 4; ++i) {
      b[pair + i % 2 + i / 2 * 8][group] = element(product.b, i, product.value);
      sums[group + i / 2 * 8][pair + i % 2] = product.d[i];
    }
  }
  for (unsigned row = 0; row < 16; ++row) {
    for (unsigned column = 0; column < 8; ++column) {
      for (unsigned k = 0; k < 16; ++k) {
        sums[row][column] += a[row][k] * b[k][column];
      }
    }
  }
  for (unsigned l = 0; l < kWarp; ++l) {
    for (unsigned i = 0; i < 4; ++i) {
      lane(l).d[i] = sums[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
    }
  }
}

struct Load {
  uint32_t* fragments;
  const uint16_t* row;
  unsigned count;
  bool transposed;
};

void finish_load(const WarpOperation& operation) {
  const auto lane = [&](unsigned i) -> Load& { return *static_cast<Load*>(operation.lane[i]); };
  for (unsigned l = 0; l < kWarp; ++l) {
    const Load& load = lane(l);
    for (unsigned matrix = 0; matrix < load.count; ++matrix) {
      uint16_t pair[2];
      for (unsigned i = 0; i < 2; ++i) {
        const unsigned row = load.transposed ? l % 4 * 2 + i : l / 4, column = load.transposed ? l / 4 : l % 4 * 2 + i;
        pair[i] = lane(matrix * 8 + row).row[column];
      }
      load.fragments[matrix] = pair[0] | uint32_t{pair[1]} << 16;
    }
  }
}

}  // namespace

void mma(float* d, const uint32_t* a, const uint32_t* b, float (*value)(uint16_t), Site site) {
  Product product{d, a, b, value};
  machine().meet("mma.sync", kAllLanes, &product, finish_product, site);
}

void load_matrices(uint32_t* fragments, unsigned count, const void* row, bool transposed, Site site, const void* code) {
  Machine& m = machine();
  Thread& thread = m.here("ldmatrix");
  // Only as many lanes as there are rows name one.
  if (thread.lane < count * 8) {
    const auto address = reinterpret_cast<uintptr_t>(row);
    if (address % 16 != 0) {
      fail("misaligned row of ldmatrix: the address is " + std::to_string(address % 16) +
           " bytes past a multiple of 16 [" + site.text() + "]");
    }
    m.memory.access(thread, address, 16, Access::kRead, code);
  }
  Load load{fragments, static_cast<const uint16_t*>(row), count, transposed};
  m.meet("ldmatrix", kAllLanes, &load, finish_load, site);
}

}  // namespace simt
