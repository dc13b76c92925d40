// A row of the result reads four rows of x, once: columns are summed first, and the last four sums stay in registers.

#include "grouped_fir.h"

#include <algorithm>

#include "simd.h"
#include "tasks.h"

namespace fastgan {
namespace {

constexpr int64_t kTaps = GroupedFir::kTaps, kStretch = 64;  // pixels that wait for their epilogue

// Of one group and one row of the result, pixels [first, first + count).
struct Stretch {
  std::array<const float*, kTaps> rows;  // of x
  const float* next;                     // that is read next
  int64_t first, count;
  float* to;  // [count, kGroup]
};

template <typename V>
FASTGAN_INLINE void filter(const GroupedFir& f, const Stretch& s) {
  const int64_t w_in = f.w_in, start = s.first - f.pad_x;
  for (int64_t c = 0; c < kGroup; c += kLanes<V>) {
    const float *const a = s.rows[0] + c, *const b = s.rows[1] + c, *const d = s.rows[2] + c, *const e = s.rows[3] + c;
    const auto column = [&](int64_t x) FASTGAN_LAMBDA_INLINE {
      if (x < 0 || x >= w_in) return V{};
      const int64_t at = x * kGroup;
      return f.along_y[0] * load<V>(a + at) + f.along_y[1] * load<V>(b + at) + f.along_y[2] * load<V>(d + at) +
             f.along_y[3] * load<V>(e + at);
    };
    V sums[kTaps] = {{}, column(start), column(start + 1), column(start + 2)};
    for (int64_t i = 0; i < s.count; ++i) {
      if (c == 0) __builtin_prefetch(s.next + (s.first + i) * kGroup);
      sums[0] = sums[1];
      sums[1] = sums[2];
      sums[2] = sums[3];
      sums[3] = column(start + i + 3);
      store(f.along_x[0] * sums[0] + f.along_x[1] * sums[1] + f.along_x[2] * sums[2] + f.along_x[3] * sums[3],
            s.to + i * kGroup + c);
    }
  }
}

void filter_portable(const GroupedFir& f, const Stretch& s) { filter<register_t<float, 16>>(f, s); }
#if defined(FASTGAN_AVX2)
FASTGAN_AVX2 void filter_avx2(const GroupedFir& f, const Stretch& s) { filter<register_t<float, 32>>(f, s); }
FASTGAN_AVX512 void filter_avx512(const GroupedFir& f, const Stretch& s) { filter<register_t<float, 64>>(f, s); }
const auto kFilter = has_avx512() ? filter_avx512 : has_avx2() ? filter_avx2 : filter_portable;
#else
const auto kFilter = filter_portable;
#endif

}  // namespace

void grouped_fir(const GroupedFir& fir, const PlanarResult& result) {
  const int64_t groups = result.blocks.c / kGroup, rows = result.blocks.n * groups * fir.h_out;
  const int64_t rows_of_task = 2 * kGrainElements / (fir.w_out * kGroup) + 1, row_values = fir.w_in * kGroup;
  const std::vector<float> zeros(row_values);
  const GroupWriter writer(result);
  share_tasks(ceil_div(rows, rows_of_task), [&](Tasks tasks) {
    std::vector<float> buffer(kStretch * kGroup);
    while (const auto task = tasks.next()) {
      for (int64_t row = *task * rows_of_task; row < std::min((*task + 1) * rows_of_task, rows); ++row) {
        const int64_t group = row / fir.h_out, i = row % fir.h_out;
        const float* const plane = fir.x + group * fir.h_in * row_values;
        Stretch s{{}, zeros.data(), 0, 0, buffer.data()};
        for (int64_t k = 0; k < kTaps; ++k) {
          const int64_t y = i + k - fir.pad_y;
          s.rows[k] = y >= 0 && y < fir.h_in ? plane + y * row_values : zeros.data();
          if (s.rows[k] != zeros.data()) s.next = s.rows[k] + row_values;
        }
        for (s.first = 0; s.first < fir.w_out; s.first += kStretch) {
          s.count = std::min(kStretch, fir.w_out - s.first);
          kFilter(fir, s);
          writer.write(group / groups, group % groups * kGroup, i * fir.w_out + s.first, 1, s.count, s.to, kGroup);
        }
      }
    }
  });
}

}  // namespace fastgan
