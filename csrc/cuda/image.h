// Images [N, C, H, W] as torch's tensors, in one of the two dense layouts.
#pragma once

#include "launch.h"

namespace fastgan {

// What is contiguous as well, one pixel or one channel, is not called channels_last.
inline bool is_channels_last(const Tensor& t) {
  return !t.is_contiguous() && t.stride(1) == 1 && t.stride(3) == t.size(1) && t.stride(2) == t.size(1) * t.size(3) &&
         t.stride(0) == t.size(1) * t.size(2) * t.size(3);
}

// t itself if it is dense in the wanted layout, else a copy.
inline Tensor in_layout(const Tensor& t, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  if (channels_last ? is_channels_last(t) : t.is_contiguous()) {
    return t;
  }
  return torch::stable::contiguous(t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace fastgan
