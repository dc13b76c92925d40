#include "conv_choice.h"

#include <algorithm>
#include <array>
#include <cstdio>

#include "direct_conv.h"
#include "few_pixels.h"
#include "kept_weights.h"
#include "packed_direct.h"
#include "unfolded_conv.h"
#include "winograd_conv.h"

namespace fastgan {
namespace {

std::string name_of(Algorithm algorithm, int64_t m, int64_t r) {
  std::string name(algorithm_name(algorithm));
  if (!m) return name;
  std::array<char, 64> tile;
  const auto side = static_cast<int>(m), taps = static_cast<int>(r);
  std::snprintf(tile.data(), tile.size(), " F(%dx%d, %dx%d)", side, side, taps, taps);
  return name += tile.data();
}

std::string verdict(const Candidate& candidate) {
  std::string text;
  if (candidate.predicted_ms > 0) {
    std::array<char, 32> number;
    std::snprintf(number.data(), number.size(), "predicted %.3g ms", candidate.predicted_ms);
    text = number.data();
    if (candidate.refusal) text += ", but ";
  }
  if (candidate.refusal) {
    text += "cannot serve: " + text_of(candidate.refusal);
  }
  return text.empty() ? "taken wherever it can serve, by measured bounds" : text;
}

constexpr std::array kConvolutions{Algorithm::kPackedDirect, Algorithm::kFewPixels, Algorithm::kUnfolded,
                                   Algorithm::kWinograd,     Algorithm::kDirect,    Algorithm::kTorch};

// Why an algorithm cannot compute a float32 call, or would only be slow at it.
Refusal refusal_of(Algorithm algorithm, const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  switch (algorithm) {
    case Algorithm::kPackedDirect:
      return refused_by_packed_direct(x, weight, g);
    case Algorithm::kFewPixels:
      return refused_by_few_pixels(x, weight, g);
    case Algorithm::kUnfolded:
      return refused_by_unfolded_conv(x, weight, g);
    case Algorithm::kWinograd:
      return refused_by_winograd(x, weight, g);
    case Algorithm::kDirect:
      return refused_by_direct_conv(x, weight, g);
    default:
      return g.reflect ? Refusal{"it pads with zeros"} : Refusal{};
  }
}

// Why it would not pay to pack a weight.
Refusal refuse_packing(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  if (x.scalar_type() != ScalarType::Float) return {"it takes float32"};
  if (keeping_of(static_cast<const float*>(weight.data_ptr())) != Keeping::kFrozen) {
    return {"it takes weights that an inference engine owns"};
  }
  if (std::min(weight.size(0), weight.size(1)) <= kFewChannels && !refused_by_direct_conv(x, weight, g)) {
    return {"direct_conv serves so few channels"};
  }
  return refused_by_packed_direct(x, weight, g);
}

}  // namespace

std::string text_of(const Refusal& refusal) {
  std::string text;
  int64_t number = refusal.first;
  for (const char* c = refusal.text; *c; ++c) {
    if (*c != '#') {
      text += *c;
      continue;
    }
    text += std::to_string(number);
    number = refusal.second;
  }
  return text;
}

bool asks_for_high(const char* op, const std::string& precision) {
  STD_TORCH_CHECK(precision == "fp32" || precision == "high", op, ": precision must be one of fp32, high, got '",
                  precision, "'");
  return precision == "high";
}

ConvChoice choose_convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                              const ConvGeometry& g, bool widened, bool high, Candidates* told) {
  const auto takes = [&](Algorithm algorithm, const Refusal& refusal) {
    if (told) told->push_back({.algorithm = algorithm, .refusal = refusal});
    return !refusal;
  };
  const Refusal packed = refuse_packing(x, weight, g);
  if (!packed) {
    const double ms = packed_direct_ms(x, weight, g);
    if (told) told->push_back({.algorithm = Algorithm::kPackedDirect, .predicted_ms = ms});
    const int64_t tile = winograd_tile(x, weight, g, high, ms, told);
    return {tile ? Algorithm::kWinograd : Algorithm::kPackedDirect, tile};
  }
  takes(Algorithm::kPackedDirect, packed);
  if (takes(Algorithm::kFewPixels, refused_by_few_pixels(x, weight, g))) {
    // Of a bias that does not fit, torch says what is wrong.
    return {is_plain_convolution(x, weight, bias, g) ? Algorithm::kFewPixels : Algorithm::kTorch};
  }
  if (widened) {
    constexpr Refusal kHalf{"it takes float32, not what half types are widened to"};
    for (const auto algorithm : {Algorithm::kUnfolded, Algorithm::kWinograd, Algorithm::kDirect}) {
      takes(algorithm, kHalf);
    }
    return {Algorithm::kTorch};
  }
  const Refusal unfolded = refused_by_unfolded_conv(x, weight, g);
  std::optional<double> unfolded_ms;
  // Only of kept weights is so much known beforehand that Winograd wins on few pixels.
  if (!unfolded && is_kept(weight.const_data_ptr<float>())) unfolded_ms = unfolded_conv_ms(x, weight, g);
  if (unfolded_ms) {
    if (told) told->push_back({.algorithm = Algorithm::kUnfolded, .predicted_ms = *unfolded_ms});
  } else if (takes(Algorithm::kUnfolded, unfolded)) {
    return {Algorithm::kUnfolded};
  }
  if (const int64_t tile = winograd_tile(x, weight, g, high, unfolded_ms, told)) return {Algorithm::kWinograd, tile};
  if (unfolded_ms) return {Algorithm::kUnfolded};
  if (takes(Algorithm::kDirect, refused_by_direct_conv(x, weight, g))) return {Algorithm::kDirect};
  return {Algorithm::kTorch};
}

ConvChoice chosen_convolution(const Tensor& x, const Tensor& weight, const ConvGeometry& g,
                              const std::string& algorithm, int64_t tile) {
  for (const auto known : kConvolutions) {
    if (algorithm != algorithm_name(known)) continue;
    const Refusal refusal = refusal_of(known, x, weight, g);
    STD_TORCH_CHECK(!refusal, "scaled_conv2d: ", algorithm, " cannot serve this call: ", text_of(refusal));
    return {known, tile};
  }
  STD_TORCH_CHECK(false, "scaled_conv2d: there is no algorithm '", algorithm, "'");
}

std::string tell_candidates(const Tensor& x, const Tensor& weight, const ConvGeometry& g, bool high) {
  Candidates told;
  const ConvChoice choice = choose_convolution(x, weight, std::nullopt, g, false, high, &told);
  std::string first, others;
  for (const auto algorithm : kConvolutions) {
    if (refusal_of(algorithm, x, weight, g)) continue;
    Candidates of_algorithm;
    if (algorithm == Algorithm::kWinograd) {
      winograd_tile(x, weight, g, high, std::nullopt, &of_algorithm);
      std::erase_if(of_algorithm, [](const Candidate& c) { return c.algorithm != Algorithm::kWinograd || c.refusal; });
    } else {
      of_algorithm.push_back({.algorithm = algorithm});
      const auto with_time = std::ranges::find_if(told, [&](const Candidate& c) { return c.algorithm == algorithm; });
      if (with_time != told.end()) of_algorithm.back().predicted_ms = with_time->predicted_ms;
    }
    for (const Candidate& c : of_algorithm) {
      const bool chosen = c.algorithm == choice.algorithm && c.m == choice.tile;
      std::string& line = chosen ? first : others;
      line += algorithm_name(c.algorithm);
      line += '\t' + std::to_string(c.m) + '\t' + std::to_string(c.predicted_ms) + '\n';
    }
  }
  return first + others;
}

std::string tell(const ConvChoice& choice, const Candidates& told) {
  const auto is_chosen = [&](const Candidate& c) { return c.algorithm == choice.algorithm && c.m == choice.tile; };
  const auto chosen = std::ranges::find_if(told, is_chosen);
  const std::string name =
      chosen == told.end() ? name_of(choice.algorithm, 0, 0) : name_of(choice.algorithm, chosen->m, chosen->r);
  std::string text = name;
  for (const auto algorithm : kConvolutions) {
    bool found = false;
    for (const Candidate& c : told) {
      if (c.algorithm != algorithm) continue;
      found = true;
      text += '\n';
      text += name_of(c.algorithm, c.m, c.r);
      text += '\t';
      text += verdict(c);
    }
    if (found) continue;
    text += '\n';
    text += name_of(algorithm, 0, 0);
    text += '\t';
    if (algorithm == Algorithm::kTorch) {
      text += "serves whatever no other does";
    } else {
      text += "not asked: ";
      text += name;
      text += " comes first";
    }
  }
  return text;
}

}  // namespace fastgan
