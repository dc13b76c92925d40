// upfirdn2d: insert zeros, pad or crop, filter, keep every down-th pixel, then the epilogue, in one pass over the
// image.
//
// A row of the result is a sum of few rows of the image, filtered along x; each is filtered once and waits in a ring
// of as many rows as the filter has taps. Along x, a stride of up or down splits the result or the source into phases
// (polyphase filtering: Vaidyanathan, "Multirate Systems and Filter Banks", 1993, section 4.3), so both directions are
// the same sum of contiguous rows, and no inserted zero is multiplied unless both strides are above 1. A
// two-dimensional filter of rank one runs as two; any other sums over all its taps.

#include <bit>
#include <cmath>
#include <limits>

#include "epilogue.h"
#include "grouped_fir.h"
#include "recorded_calls.h"
#include "tasks.h"

namespace fastgan {
namespace {

template <int kRows, bool kAdd, typename C>
FASTGAN_INLINE void combine_loop(const C* const* rows, const C* factors, C* __restrict__ out, int64_t n) {
  const C* const a = rows[0];
  const C* const b = rows[kRows > 1 ? 1 : 0];
  const C* const c = rows[kRows > 2 ? 2 : 0];
  const C* const d = rows[kRows > 3 ? 3 : 0];
  const C fa = factors[0], fb = kRows > 1 ? factors[1] : C(0), fc = kRows > 2 ? factors[2] : C(0);
  const C fd = kRows > 3 ? factors[3] : C(0);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    C sum = a[i] * fa;
    if constexpr (kRows > 1) sum += b[i] * fb;
    if constexpr (kRows > 2) sum += c[i] * fc;
    if constexpr (kRows > 3) sum += d[i] * fd;
    out[i] = kAdd ? out[i] + sum : sum;
  }
}

// out[i] = sum over rows of factors[row] * rows[row][i].
template <typename C>
FASTGAN_INLINE void combine_any(const C* const* rows, const C* factors, int64_t count, C* out, int64_t n) {
  if (count == 0) {
    for (int64_t i = 0; i < n; ++i) out[i] = C(0);
  }
  for (int64_t first = 0; first < count; first += 4) {
    const C* const* const r = rows + first;
    const C* const f = factors + first;
    const int64_t left = count - first;
    const auto run = [&]<bool kAdd>() FASTGAN_LAMBDA_INLINE {
      if (left >= 4) return combine_loop<4, kAdd>(r, f, out, n);
      if (left == 3) return combine_loop<3, kAdd>(r, f, out, n);
      if (left == 2) return combine_loop<2, kAdd>(r, f, out, n);
      return combine_loop<1, kAdd>(r, f, out, n);
    };
    first == 0 ? run.template operator()<false>() : run.template operator()<true>();
  }
}
FASTGAN_MULTIVERSION void combine(const float* const* rows, const float* factors, int64_t count, float* out,
                                  int64_t n) {
  combine_any(rows, factors, count, out, n);
}
void combine(const double* const* rows, const double* factors, int64_t count, double* out, int64_t n) {
  combine_any(rows, factors, count, out, n);
}

// Rows of pixels apart and together again; stride 2 of single values is every layer's and vectorises.
template <typename C>
FASTGAN_INLINE void scatter_loop(const C* __restrict__ from, int64_t from_stride, C* __restrict__ to, int64_t to_stride,
                                 int64_t chunk, int64_t n) {
  if (chunk == 1 && from_stride == 2 && to_stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = from[2 * i];
  } else if (chunk == 1) {
    for (int64_t i = 0; i < n; ++i) to[i * to_stride] = from[i * from_stride];
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const C* const source = from + i * from_stride * chunk;
      C* const target = to + i * to_stride * chunk;
#pragma omp simd
      for (int64_t j = 0; j < chunk; ++j) target[j] = source[j];
    }
  }
}
template <typename C>
FASTGAN_INLINE void interleave_loop(const C* __restrict__ even, const C* __restrict__ odd, C* __restrict__ to,
                                    int64_t pairs) {
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    to[2 * i] = even[i];
    to[2 * i + 1] = odd[i];
  }
}
FASTGAN_MULTIVERSION void scatter(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t chunk,
                                  int64_t n) {
  scatter_loop(from, from_stride, to, to_stride, chunk, n);
}
void scatter(const double* from, int64_t from_stride, double* to, int64_t to_stride, int64_t chunk, int64_t n) {
  scatter_loop(from, from_stride, to, to_stride, chunk, n);
}
FASTGAN_MULTIVERSION void interleave(const float* even, const float* odd, float* to, int64_t pairs) {
  interleave_loop(even, odd, to, pairs);
}
void interleave(const double* even, const double* odd, double* to, int64_t pairs) {
  interleave_loop(even, odd, to, pairs);
}

constexpr int64_t kAhead = 1024;  // values from what is read to what is fetched: what memory takes to answer

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

// One axis: out[i] = sum over k of f[k] * u[i * down + k - pad], where u[j * up] = x[j] and u is zero elsewhere.
struct Axis {
  int64_t up, down, pad, taps, in, out;
};

// The x axis as sums of contiguous rows. The source is split into `parts` by its pixels' index modulo down, the result
// into `phases` modulo up; where both are above 1, the source gets its zeros first, and there is one phase.
struct RowPlan {
  struct Tap {
    int64_t index;   // in the filter
    int64_t part;    // of the source
    int64_t offset;  // pixel m of the phase takes pixel m + offset of the part
  };
  int64_t parts, phases, expand, in, out;
  int64_t lead = 0, part_pixels = 0;   // zeros before a part, and its pixels with all zeros around it
  std::vector<std::vector<Tap>> taps;  // by phase

  explicit RowPlan(const Axis& a)
      : parts(a.down), phases(a.down == 1 ? a.up : 1), expand(a.down == 1 ? 1 : a.up), in(a.in), out(a.out) {
    int64_t last = ceil_div(in * expand, parts);
    taps.resize(phases);
    for (int64_t phase = 0; phase < phases; ++phase) {
      for (int64_t k = 0; k < a.taps; ++k) {
        const int64_t position = phase + k - a.pad, step = std::max(phases, parts);
        const int64_t offset = floor_div(position, step), rest = position - offset * step;
        if (phases > 1 && rest != 0) continue;
        taps[phase].push_back({k, rest, offset});
        lead = std::max(lead, -offset);
        last = std::max(last, offset + pixels_of(phase));
      }
    }
    part_pixels = lead + last;
  }

  int64_t pixels_of(int64_t phase) const { return ceil_div(out - phase, phases); }
};

// The filter as correlation takes it, times gain: rows x columns, or one vector for each axis.
template <typename C>
struct Filter {
  bool separable = true;
  std::vector<C> along_x{C(1)}, along_y{C(1)}, full;

  Filter(const std::optional<Tensor>& f, bool flip, C gain) {
    if (f) {
      const C* const data = f->const_data_ptr<C>();
      full.assign(data, data + f->numel());
      if (!flip) std::reverse(full.begin(), full.end());
      const int64_t columns = f->size(-1), rows = f->dim() == 1 ? 1 : f->size(0);
      if (f->dim() == 1) {
        along_x = along_y = full;
      } else {
        separable = split(rows, columns);
      }
    }
    for (C& value : along_y) value *= gain;
    for (C& value : full) value *= gain;
  }

 private:
  // full = along_y along_x^T, to a few roundings of C; false if it is not.
  bool split(int64_t rows, int64_t columns) {
    const auto larger = [](C a, C b) { return std::abs(a) < std::abs(b); };
    const int64_t pivot = std::max_element(full.begin(), full.end(), larger) - full.begin();
    along_x.assign(full.begin() + pivot / columns * columns, full.begin() + (pivot / columns + 1) * columns);
    along_y.resize(rows);
    for (int64_t i = 0; i < rows; ++i) along_y[i] = full[i * columns + pivot % columns] / full[pivot];
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        const C value = full[i * columns + j];
        // Written so that a NaN, or a filter of zeros, is not separable.
        if (!(std::abs(along_y[i] * along_x[j] - value) <= 4 * std::numeric_limits<C>::epsilon() * std::abs(value))) {
          return false;
        }
      }
    }
    return true;
  }
};

// What all threads share. A plane is [H, W] of one channel, or [H, W, C] of one sample; chunk is a pixel's values in
// it.
template <typename T>
struct Job {
  using C = accumulate_t<T>;
  const T* x;
  Tensor y;
  Axis across, down;
  RowPlan plan;
  Filter<C> filter;
  int64_t chunk;
  bool plain;  // no epilogue
  const EpilogueArgs& epilogue;
  ImageBlocks blocks;

  int64_t planes() const { return blocks.planar ? blocks.n * blocks.c : blocks.n; }
  int64_t row_values() const { return across.out * chunk; }
};

// Computes consecutive rows of the result.
template <typename T>
class RowFilter {
 public:
  using C = accumulate_t<T>;

  explicit RowFilter(const Job<T>& given)
      : job(given),
        prepared_values(job.plan.parts * job.plan.part_pixels * job.chunk),
        ring_values(job.filter.separable ? job.row_values() : prepared_values),
        held(std::bit_ceil(static_cast<uint64_t>(job.down.taps)), -1),
        ring(held.size() * ring_values, C(0)),
        prepared(job.filter.separable ? prepared_values : 0, C(0)),
        expanded(job.plan.phases > 1 ? job.plan.phases * job.plan.pixels_of(0) * job.chunk : 0),
        wide(sizeof(T) == 2 ? job.across.in * job.chunk : 0),
        terms(job.plan.phases) {
    if (!job.filter.separable) return;
    for (int64_t phase = 0; phase < job.plan.phases; ++phase) {
      for (const auto& tap : job.plan.taps[phase]) {
        terms[phase].add(prepared.data() + offset(tap), job.filter.along_x[tap.index]);
      }
    }
  }

  // Row i of the result's plane, before the epilogue.
  void row(int64_t plane, int64_t i, C* out) {
    if (plane != current) {
      std::fill(held.begin(), held.end(), -1);
      current = plane;
    }
    const Axis& a = job.down;
    const int64_t start = i * a.down - a.pad;
    lines.clear();
    taps.clear();
    for (int64_t k = std::max<int64_t>(0, -start); k < a.taps && start + k < a.in * a.up; ++k) {
      if (a.up > 1 && (start + k) % a.up != 0) continue;
      lines.add(source_row(a.up > 1 ? (start + k) / a.up : start + k), job.filter.along_y[k]);
      taps.push_back(k);
    }
    if (job.filter.separable) return lines.sum(out, job.row_values());
    for (int64_t phase = 0; phase < job.plan.phases; ++phase) {
      terms[phase].clear();
      for (const auto& tap : job.plan.taps[phase]) {
        for (size_t r = 0; r < taps.size(); ++r) {
          terms[phase].add(lines.rows[r] + offset(tap), job.filter.full[taps[r] * job.across.taps + tap.index]);
        }
      }
    }
    along_x(out);
  }

 private:
  // Rows of pixels and what each is multiplied with.
  struct Terms {
    std::vector<const C*> rows;
    std::vector<C> factors;

    void clear() {
      rows.clear();
      factors.clear();
    }
    void add(const C* row, C factor) {
      rows.push_back(row);
      factors.push_back(factor);
    }
    void sum(C* out, int64_t values) const { combine(rows.data(), factors.data(), rows.size(), out, values); }
  };

  // Of a tap's first pixel in a prepared row.
  int64_t offset(const RowPlan::Tap& tap) const {
    return (tap.part * job.plan.part_pixels + job.plan.lead + tap.offset) * job.chunk;
  }

  // Row j of the plane, filtered along x if the filter is separable, else only prepared for it.
  const C* source_row(int64_t j) {
    const int64_t slot = j & (held.size() - 1);
    C* const found = ring.data() + slot * ring_values;
    if (held[slot] == j) return found;
    held[slot] = j;
    const int64_t values = job.across.in * job.chunk;
    const T* const pixels = job.x + (current * job.down.in + j) * values;
    for (int64_t i = 0; i < values; i += 64 / sizeof(T)) __builtin_prefetch(pixels + kAhead + i);
    const C* const source = as_compute(pixels, values, wide.data());
    prepare(source, job.filter.separable ? prepared.data() : found);
    if (job.filter.separable) along_x(found);
    return found;
  }

  // Splits a row of the source into parts; the zeros around them are there from the start and stay.
  void prepare(const C* source, C* parts) {
    const RowPlan& p = job.plan;
    for (int64_t part = 0; part < p.parts; ++part) {
      C* const to = parts + (part * p.part_pixels + p.lead) * job.chunk;
      if (p.expand == 1) {
        const int64_t pixels = ceil_div(p.in - part, p.parts);
        if (pixels > 0)
          scatter(source + part * job.chunk, p.parts, to, 1, p.parts == 1 ? 1 : job.chunk,
                  p.parts == 1 ? pixels * job.chunk : pixels);
        continue;
      }
      for (int64_t j = 0; j < p.in; ++j) {
        const int64_t at = j * p.expand;
        if (at % p.parts == part) scatter(source + j * job.chunk, 1, to + at / p.parts * job.chunk, 1, job.chunk, 1);
      }
    }
  }

  // out = the sum of the terms, phase by phase.
  void along_x(C* out) {
    const RowPlan& p = job.plan;
    const int64_t stride = p.phases > 1 ? p.pixels_of(0) * job.chunk : 0;
    for (int64_t phase = 0; phase < p.phases; ++phase) {
      terms[phase].sum(p.phases > 1 ? expanded.data() + phase * stride : out, p.pixels_of(phase) * job.chunk);
    }
    if (p.phases == 1) return;
    const int64_t pairs = p.phases == 2 && job.chunk == 1 ? p.out / 2 : 0;
    interleave(expanded.data(), expanded.data() + stride, out, pairs);
    for (int64_t phase = 0; phase < p.phases; ++phase) {
      scatter(expanded.data() + phase * stride + pairs * job.chunk, 1, out + (phase + pairs * p.phases) * job.chunk,
              p.phases, job.chunk, p.pixels_of(phase) - pairs);
    }
  }

  const Job<T>& job;
  const int64_t prepared_values, ring_values;
  std::vector<int64_t> held, taps;
  std::vector<C> ring, prepared, expanded, wide;
  Terms lines;               // of the rows above each other
  std::vector<Terms> terms;  // along x, by phase: the same for all rows if the filter is separable
  int64_t current = -1;
};

// Rows of all planes, one behind the other, in tasks of `grain` of them, with the epilogue; as many rows at a time as
// fill a block.
template <typename T>
void run_rows(const Job<T>& job, Tasks tasks, int64_t grain) {
  using C = accumulate_t<T>;
  const int64_t height = job.down.out, values = job.row_values();
  const int64_t most_rows = std::max<int64_t>(1, kBlock / values);
  RowFilter<T> filter(job);
  BlockEpilogue<T> epilogue(job.blocks, job.epilogue, job.y);
  T* const to = job.y.template mutable_data_ptr<T>();
  std::vector<C> buffer(most_rows * values);
  while (const auto task = tasks.next()) {
    const int64_t end = std::min((*task + 1) * grain, job.planes() * height);
    for (int64_t first = *task * grain; first < end;) {
      const int64_t plane = first / height, i = first % height;
      const int64_t rows = std::min({most_rows, height - i, end - first});
      C* const out = job.plain ? result_buffer(to + first * values, buffer.data()) : buffer.data();
      for (int64_t r = 0; r < rows; ++r) filter.row(plane, i + r, out + r * values);
      if (job.plain) {
        flush(out, to + first * values, rows * values);
      } else {
        const int64_t pixels = rows * job.across.out;
        for (int64_t p = 0; p < pixels; p += job.blocks.pixels_per_block) {
          const int64_t count = std::min(job.blocks.pixels_per_block, pixels - p);
          const int64_t channels = job.blocks.planar ? job.blocks.c : 1;
          epilogue(out + p * job.chunk, {plane / channels, plane % channels, i * job.across.out + p, count,
                                         first * values + p * job.chunk, count * job.chunk});
        }
      }
      first += rows;
    }
  }
}

struct FirSettings {
  std::vector<int64_t> up, down, padding;  // padding: left, right, top, bottom
  bool flip_filter;
  double gain;
};

// What happens along each axis.
struct FirAxes {
  Axis across, along;

  FirAxes(const Tensor& x, const std::optional<Tensor>& f, const FirSettings& s)
      : across(axis(x, 1, f ? f->size(-1) : 1, s.up[0], s.down[0], s.padding[0], s.padding[1])),
        along(axis(x, 0, f ? f->size(0) : 1, s.up[1], s.down[1], s.padding[2], s.padding[3])) {}

 private:
  static Axis axis(const Tensor& x, int which, int64_t taps, int64_t up, int64_t down, int64_t before, int64_t after) {
    const int64_t in = x.size(2 + which);
    return {up, down, before, taps, in, (in * up + before + after - taps + down) / down};
  }
};

void filter_into(const Tensor& x, const std::optional<Tensor>& f, const FirSettings& settings,
                 const EpilogueArgs& epilogue, bool channels_last, const Tensor& y) {
  const Tensor source = in_layout(x, channels_last);
  const std::optional<Tensor>& residual = epilogue.residual;
  const auto dense_residual = residual ? std::optional(in_layout(*residual, channels_last)) : std::nullopt;
  const EpilogueArgs args = epilogue.with_residual(dense_residual);
  const bool plain = args.act == Act::kLinear && args.gain == 1.0 &&
                     args.clamp == std::numeric_limits<double>::infinity() && !args.noise && !args.bias && !residual;
  const FirAxes axes(x, f, settings);
  const int64_t n = x.size(0), c = x.size(1);
  dispatch_dtype("upfirdn2d", x.scalar_type(), [&]<typename T>() {
    using C = accumulate_t<T>;
    const Job<T> job{source.const_data_ptr<T>(),
                     y,
                     axes.across,
                     axes.along,
                     RowPlan(axes.across),
                     Filter<C>(f, settings.flip_filter, static_cast<C>(settings.gain)),
                     channels_last ? c : 1,
                     plain,
                     args,
                     ImageBlocks(n, c, axes.along.out * axes.across.out, !channels_last)};
    // A task's first rows are filtered once more.
    const int64_t grain = std::max<int64_t>(1, 2 * kGrainElements / std::max<int64_t>(1, job.row_values()));
    share_tasks(ceil_div(job.planes() * axes.along.out, grain), [&](Tasks tasks) { run_rows(job, tasks, grain); });
  });
}

Tensor upfirdn2d(const Tensor& x, const std::optional<Tensor>& f, const std::optional<Tensor>& noise,
                 const std::optional<Tensor>& noise_strength, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& residual, std::vector<int64_t> up, std::vector<int64_t> down,
                 std::vector<int64_t> padding, bool flip_filter, double fir_gain, std::string act, double alpha,
                 double gain, std::optional<double> clamp, double residual_gain) {
  const bool channels_last = is_channels_last(x);
  const FirSettings settings{up, down, padding, flip_filter, fir_gain};
  const FirAxes axes(x, f, settings);
  Tensor y = empty_dense({x.size(0), x.size(1), axes.along.out, axes.across.out}, x.scalar_type(), channels_last);
  const std::optional<Tensor> none;
  filter_into(x, f, settings,
              {none, noise, noise_strength, bias, residual, parse_act("upfirdn2d", act), alpha, gain,
               clamp.value_or(std::numeric_limits<double>::infinity()), residual_gain},
              channels_last, y);
  return y;
}

// Whether x and the result may be grouped (image.h), of whole groups of channels and without a residual.
bool takes_grouped(const Tensor& f, std::vector<int64_t> up, std::vector<int64_t> down) {
  const Filter<float> filter(f, false, 1.0f);
  const auto is_one = [](int64_t stride) { return stride == 1; };
  return filter.separable && std::max(filter.along_x.size(), filter.along_y.size()) <= GroupedFir::kTaps &&
         std::ranges::all_of(up, is_one) && std::ranges::all_of(down, is_one);
}

// upfirdn2d of float32 in NCHW, or grouped, into `out`.
void upfirdn2d_into(const Tensor& x, const std::optional<Tensor>& f, const std::optional<Tensor>& noise,
                    const std::optional<Tensor>& noise_strength, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& residual, std::vector<int64_t> up, std::vector<int64_t> down,
                    std::vector<int64_t> padding, bool flip_filter, double fir_gain, std::string act, double alpha,
                    double gain, std::optional<double> clamp, double residual_gain, const Tensor& out, bool x_grouped,
                    bool y_grouped) {
  const std::optional<Tensor> none;
  const FirSettings settings{up, down, padding, flip_filter, fir_gain};
  const EpilogueArgs epilogue{none,         noise,    noise_strength,
                              bias,         residual, parse_act("upfirdn2d", act),
                              alpha,        gain,     clamp.value_or(std::numeric_limits<double>::infinity()),
                              residual_gain};
  if (!x_grouped && !y_grouped) return filter_into(x, f, settings, epilogue, false, out);
  STD_TORCH_CHECK(x_grouped && y_grouped && !residual && x.size(1) % kGroup == 0 && f && takes_grouped(*f, up, down),
                  "_upfirdn2d_into: both images are grouped, of a small separable filter and without a residual, or "
                  "none is");
  const Filter<float> filter(f, flip_filter, static_cast<float>(fir_gain));
  const FirAxes axes(x, f, settings);
  GroupedFir fir{x.const_data_ptr<float>(),
                 axes.along.in,
                 axes.across.in,
                 axes.along.out,
                 axes.across.out,
                 axes.along.pad,
                 axes.across.pad,
                 {},
                 {}};
  std::ranges::copy(filter.along_y, fir.along_y.begin());
  std::ranges::copy(filter.along_x, fir.along_x.begin());
  grouped_fir(fir, PlanarResult(epilogue, out, nullptr, true));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, m) {
  m.impl("upfirdn2d", TORCH_BOX(&upfirdn2d));
  m.impl("_grouped_filter", TORCH_BOX(&takes_grouped));
  m.impl("_upfirdn2d_into", TORCH_BOX(&Recordable<&upfirdn2d_into>::call));
}

}  // namespace fastgan
