// What tma_im2col and tma_im2col_weight ask of a problem: that the copy engine can walk the pixels
// of its tensors (make_im2col_map), and which groups share a box of channels.
#pragma once

#include <string>

#include "cuda/tensor_map.h"
#include "integers.h"

namespace convops::cuda {

inline constexpr int kPixelVectorBytes = 16;  // what the copy engine counts in
inline int pixel_vector(DType dtype) { return kPixelVectorBytes / int(element_size(dtype)); }

inline bool is_astray(const void* tensor) {
  return reinterpret_cast<uintptr_t>(tensor) % kPixelVectorBytes != 0;
}

// Strides of what has no second element may be anything.
inline Tensor4 with_strides(Tensor4 t, DType dtype) {
  for (int i = 0; i < 4; ++i)
    if (t.size[i] == 1) t.stride[i] = i == 1 ? 1 : round_up(t.size[1], pixel_vector(dtype));
  return t;
}

// Why the copy engine cannot have a tensor's pixels; empty if it can.
inline std::string refuse_pixels(const Tensor4& tensor, DType dtype, const std::string& name) {
  const Tensor4 t = with_strides(tensor, dtype);
  if (t.stride[1] != 1) return name + "'s channel stride " + std::to_string(t.stride[1]);
  for (const int i : {0, 2, 3})
    if (t.stride[i] <= 0 || t.stride[i] >= kMaxMapStride || t.stride[i] % pixel_vector(dtype) != 0)
      return name + "'s stride " + std::to_string(t.stride[i]) + " in dimension " +
             std::to_string(i);
  return "";
}

// The same of windows along a side, the last of whose taps is `reach` from its first.
inline std::string refuse_windows(const Windows& windows, int64_t side, int64_t reach) {
  if (windows.step > kMostStep) return "a stride of " + std::to_string(windows.step);
  if (reach > kMostShift) return "a window of " + std::to_string(reach + 1);
  const int64_t last = last_corner(windows, side);
  if (windows.begin < kLeastCorner || windows.begin > kMostCorner || last < kLeastCorner ||
      last > kMostCorner)
    return "windows that begin " + std::to_string(-windows.begin) + " before or " +
           std::to_string(last) + " behind a side of " + std::to_string(side);
  return "";
}

// Whether groups of few channels are multiplied together, so many channels at a time.
inline constexpr int kMergedChannels = 64;
inline bool groups_share_boxes(const ConvProblem& p) {
  const int64_t channels = p.group_in_channels();
  return p.groups > 1 && channels > 0 && channels == p.group_out_channels() &&
         kMergedChannels % channels == 0;
}

}  // namespace convops::cuda
