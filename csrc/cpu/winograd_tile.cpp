// Which tile of Winograd's filtering a convolution should use, by what each costs.

#include <algorithm>
#include <limits>

#include "algorithm.h"
#include "channel_patch.h"
#include "conv_choice.h"
#include "direct_conv.h"
#include "kept_weights.h"
#include "packed_direct.h"
#include "product.h"
#include "winograd.h"
#include "winograd_conv.h"
#include "winograd_plan.h"

namespace fastgan {
namespace {

// Costs in multiply-adds of the products, 60 a nanosecond, fitted to the layers of the models on Zen 3 with two
// threads: of a float that a transform writes, of one that was kept (less where the threads divide the weights, and
// less where nothing is hashed), and of a call.
constexpr double kWeightCost = 45, kKeptCost = 18, kDividedCost = 11, kTileCost = 24, kSumCost = 32, kCallCost = 2e7;
constexpr double kHashCost = 3;
// Convolution by torch's own kernels, which order the weights anew in every call: of a product, of a weight, of a value
// of y that a transposed one scatters its products to, and of a call with the pass over its result.
constexpr double kDirectCost = 0.95, kOrderCost = 40, kScatterCost = 110, kTorchCallCost = 2.5e7;
constexpr double kCostPerMs = 60e6;
// Where registers hold 16 floats, on an Ice Lake; the transforms of weights that threads divide do not keep up with the
// products there, but for those of 3 x 3 values, which only add.
constexpr double kWideCostPerMs = 68e6, kWideDividedCost = 17;
// The same for integers.
constexpr double kWholeProductCost = 0.67, kWholeSumCost = 27, kWholeCost = 4, kWholeTileCost = 19,
                 kWholeCallCost = 3e6;

// Quantised values at most.
constexpr int64_t kLargestInput = 255, kLargestWeight = 127;

// precision = "high": tiles of 4 are too inexact. Measured against float64 (bench/precision.py says how), their error
// is 2.6e-6 to 7.5e-6 whatever the layer, up to 20 times that of torch's convolution, which lies anywhere from 2e-7 to
// 4e-6; that of tiles of 2 and 3 is at most 1.3e-6 and 2.5 times torch's.
constexpr int64_t kLargestHighTile = 3;

double cost_per_ms() { return product_lanes() == 16 ? kWideCostPerMs : kCostPerMs; }

double divided_cost(const WinogradPlan& plan) {
  return product_lanes() == 16 && plan.t > 3 ? kWideDividedCost : kDividedCost;
}

double direct_cost(const ConvPlan& conv) {
  const double pixels = static_cast<double>(conv.n) * conv.base_h * conv.base_w;
  const double scattered = conv.out_stride > 1 ? kScatterCost * conv.n * conv.h_out * conv.w_out * conv.c_out : 0;
  return (kDirectCost * pixels + kOrderCost) * conv.c_in * conv.c_out * conv.taps + scattered;
}

double winograd_cost(const ConvPlan& conv, const WinogradPlan& plan, Keeping keeping) {
  const double tiles = static_cast<double>(conv.n) * plan.tiles_h * plan.tiles_w, rows = conv.c_out;
  const double depth = plan.depth;
  const double kept =
      (plan.divides_weights() ? divided_cost(plan) : kKeptCost) - (keeping == Keeping::kFrozen ? kHashCost : 0);
  const double weight = keeping == Keeping::kNo ? kWeightCost : kept;
  return kCallCost + plan.products * rows * tiles * (depth + kSumCost) + plan.weights * rows * depth * weight +
         plan.values * depth * tiles * kTileCost;
}

// Of integers: two products in one step of an instruction, and words of two channels to transform and to store.
double quantized_cost(const ConvPlan& conv, const WinogradPlan& plan) {
  const double tiles = static_cast<double>(conv.n) * plan.tiles_h * plan.tiles_w, rows = conv.c_out;
  const double depth = plan.depth, weight = plan.m == 1 ? kWholeCost / 2 : kWholeCost;
  return kWholeCallCost + plan.products * rows * tiles * (kWholeProductCost * depth + kWholeSumCost) +
         plan.weights * rows * depth * weight + plan.values * depth * tiles * kWholeTileCost;
}

// What both kinds of tiles refuse.
Refusal refuse_kernel(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  if (!has_dense_kernels(weight)) return {"it takes a weight of dense kernels"};
  if (g.dilation[0] != 1 || g.dilation[1] != 1)
    return {"it takes dilation = 1, got # and #", g.dilation[0], g.dilation[1]};
  if (weight.size(2) != weight.size(3)) return {"it takes square kernels, got #x#", weight.size(2), weight.size(3)};
  if (!taps_per_axis(ConvPlan(x, weight, g), weight.size(2))) {
    return {"it takes kernels of 2 to 4 taps per stride, got # for stride #", weight.size(2), g.stride[0]};
  }
  return {};
}

}  // namespace

Refusal refused_by_winograd(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  if (const Refusal refusal = refuse_unless_float_nchw(x, weight, g)) return refusal;
  return refuse_kernel(x, weight, g);
}

Refusal refused_by_quantized(const Tensor& x, const Tensor& weight, const ConvGeometry& g, int64_t m) {
  if (x.scalar_type() != ScalarType::Float) return {"it takes float32"};
  if (weight.scalar_type() != ScalarType::Char) return {"it takes a weight in int8"};
  if (!weight.is_contiguous()) return {"it takes a contiguous weight"};
  if (const Refusal refusal = refuse_unless_plain_shapes(x, weight, g)) return refusal;
  if (const Refusal refusal = refuse_unless_nchw(x, weight, g)) return refusal;
  if (m == 0) return refused_by_quantized_direct(x, weight, g);
  if (const Refusal refusal = refuse_kernel(x, weight, g)) return refusal;
  const ConvPlan conv(x, weight, g);
  const int64_t per_axis = taps_per_axis(conv, weight.size(2)), largest = per_axis == 3 ? 2 : 3;
  if (m < 1 || m > largest) return {"it takes tiles of 0 to #, got #", largest, m};
  const WinogradPlan plan(conv, per_axis, m);
  const WholeFactors factors = whole_factors(m, plan.r);
  const int64_t deepest = INT32_MAX / (kLargestInput * factors.input * kLargestWeight * factors.weight);
  if (plan.depth > deepest) return {"its sums of # channels might not fit 32 bits: it takes #", plan.depth, deepest};
  return {};
}

Candidates quantized_tiles(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  Candidates found;
  if (!refused_by_quantized(x, weight, g, 0)) {
    found.push_back({.algorithm = Algorithm::kQuantizedDirect, .predicted_ms = quantized_direct_ms(x, weight, g)});
  }
  for (const int64_t m : {1, 2, 3}) {
    if (refused_by_quantized(x, weight, g, m)) continue;
    const ConvPlan conv(x, weight, g);
    const WinogradPlan plan(conv, taps_per_axis(conv, weight.size(2)), m);
    found.push_back({.algorithm = Algorithm::kQuantizedWinograd,
                     .m = m,
                     .r = plan.r,
                     .predicted_ms = quantized_cost(conv, plan) / kCostPerMs});
  }
  std::ranges::sort(found, {}, &Candidate::predicted_ms);
  return found;
}

int64_t winograd_tile(const Tensor& x, const Tensor& weight, const ConvGeometry& g, bool high,
                      std::optional<double> rival_ms, Candidates* told) {
  const auto tell = [&](const Candidate& candidate) {
    if (told) told->push_back(candidate);
  };
  if (const Refusal refusal = refused_by_winograd(x, weight, g)) {
    tell({.algorithm = Algorithm::kWinograd, .refusal = refusal});
    return 0;
  }
  const ConvPlan conv(x, weight, g);
  const int64_t per_axis = taps_per_axis(conv, weight.size(2)), r = per_axis == 3 ? 3 : 2;
  int64_t best = 0;
  double least = rival_ms ? *rival_ms * cost_per_ms() : direct_cost(conv);
  const bool tiny = least < kCallCost;
  if (!rival_ms) {
    // What direct_conv serves has no such pass.
    if (refused_by_direct_conv(x, weight, g)) least += kTorchCallCost;
    tell({.algorithm = Algorithm::kTorch, .predicted_ms = least / cost_per_ms()});
  }
  if (tiny) {
    tell({.algorithm = Algorithm::kWinograd, .refusal = {"it costs more per call than the rest would in all"}});
    return 0;
  }
  const Keeping keeping = keeping_of(weight.const_data_ptr<float>());
  for (const int64_t m : {int64_t{2}, int64_t{r == 3 ? 4 : 3}}) {
    const double cost = winograd_cost(conv, WinogradPlan(conv, per_axis, m), keeping);
    Candidate candidate{.algorithm = Algorithm::kWinograd, .m = m, .r = r, .predicted_ms = cost / cost_per_ms()};
    if (high && m > kLargestHighTile) {
      candidate.refusal = {"precision high takes tiles of at most #: its error would not stay within 3x torch's",
                           kLargestHighTile};
    } else if (cost < least) {
      least = cost;
      best = m;
    }
    tell(candidate);
  }
  return best;
}

int64_t growing_tile(const Tensor& x, const std::vector<Tensor>& weights, const ConvGeometry& g, bool high) {
  constexpr double kMostFloats = 64 << 20;  // 256 MB of tiles
  if (refused_by_winograd(x, weights[0], g) || x.size(1) % kGroup) return 0;
  ConvPlan conv(x, weights[0], g);
  const int64_t most = weights.back().size(1), per_axis = taps_per_axis(conv, weights[0].size(2));
  int64_t best = 0;
  double least = std::numeric_limits<double>::infinity();
  for (const int64_t m : {int64_t{0}, int64_t{2}, int64_t{per_axis == 3 && !high ? 4 : 2}}) {
    double cost = 0;
    for (const Tensor& weight : weights) {
      if (!has_dense_kernels(weight) || weight.size(1) % kGroup) return 0;
      conv.c_in = weight.size(1);
      conv.c_out = weight.size(0);
      cost += m ? winograd_cost(conv, WinogradPlan(conv, per_axis, m), Keeping::kHashed) : direct_cost(conv);
    }
    const WinogradPlan plan(conv, per_axis, m ? m : 2);
    const double floats = static_cast<double>(plan.values) * plan.tiles_h * plan.tiles_w * conv.n *
                          ceil_div(most, kPanelDepth) * kPanelStride;
    if (cost < least && (!m || floats <= kMostFloats)) {
      least = cost;
      best = m;
    }
  }
  return best;
}

}  // namespace fastgan
