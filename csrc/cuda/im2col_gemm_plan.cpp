#include <algorithm>

#include "columns.h"
#include "cuda/im2col_gemm.h"
#include "integers.h"
#include "matrix.h"

namespace convops::cuda::im2col_gemm {
namespace {

// Images with fewer pixels are small ones, see packs_pixels.
constexpr int64_t kFewPixels = 4096;
// As many slices as make two tiles of kSliceTile² results for each multiprocessor.
constexpr int64_t kSliceTile = 128, kSliceWaves = 2;
constexpr int64_t kSliceBytes = int64_t{256} << 20;  // of the sums of all, at most
constexpr int64_t kAlignment = 256;

// Whether backward-weight's sum over the pixels is cut into slices.
bool is_sliced(const ConvProblem& p) {
  return p.direction == Direction::kBackwardWeight && p.groups == 1 && p.dtype != DType::kFloat64 &&
         p.batch() * p.output_pixels() > kLongestSum;
}

// What the padding of the chunk's rows may take on top.
int64_t padding_bytes(const ConvProblem& p) {
  return padded_pixels(1) * element_size(sum_dtype(p.dtype)) *
         (p.groups * p.taps() + p.out_channels());
}

}  // namespace

// For backward-weight because it would be a product for each image, unless each is a slice;
// otherwise because tensor cores take rows that do not begin at multiples of 16 bytes, as of 7×7,
// at half speed and less. (At 8 the copies of a 1×1 convolution cost what they gain.)
bool packs_pixels(const ConvProblem& p) {
  const bool fma = p.dtype == DType::kFloat32 && p.precision == Precision::kIeee;
  const bool small = p.batch() > 1 && p.output_pixels() < kFewPixels && pixel_stride(p.output) == 1;
  const bool weight = p.direction == Direction::kBackwardWeight;
  if (weight && !(is_sliced(p) && p.output_pixels() >= kShortestSlice)) return small;
  if (p.dtype == DType::kFloat64 || fma) return false;
  const int64_t aligned_bytes = p.is_pointwise() ? 8 : 16;
  return small && p.output_pixels() * element_size(p.dtype) % aligned_bytes != 0;
}

bool skips_im2col(const ConvProblem& p) {
  return p.is_pointwise() && is_pixel_matrix(p.input, p.group_in_channels()) && !packs_pixels(p);
}

bool packs_output(const ConvProblem& p) {
  if (p.direction == Direction::kForward) return false;
  return !is_pixel_matrix(p.output, p.group_out_channels()) || packs_pixels(p);
}

// cuBLAS may round a 16-bit product before it adds it to what is there: with a bias the sum is made
// in float32 and rounded as it is copied.
std::optional<DType> staged_dtype(const ConvProblem& p) {
  if (p.direction != Direction::kForward) return std::nullopt;
  if (p.has_bias && p.dtype != sum_dtype(p.dtype)) return sum_dtype(p.dtype);
  if (packs_pixels(p)) return p.dtype;
  return std::nullopt;
}

bool packs_weight(const ConvProblem& p) {
  const bool rounds = p.direction == Direction::kBackwardWeight && p.dtype != sum_dtype(p.dtype);
  return rounds || !p.weight.is_contiguous();
}

int64_t row_bytes(const ConvProblem& p) {
  const int64_t columns =
      skips_im2col(p) ? 0 : p.groups * p.taps() * element_size(columns_dtype(p));
  int64_t output = 0;
  if (packs_output(p)) output = p.out_channels() * element_size(p.dtype);
  if (const auto staged = staged_dtype(p)) output = p.out_channels() * element_size(*staged);
  return (columns + output) * p.output_size().w;
}

int64_t slice_count(const ConvProblem& p, const Device& device) {
  if (!is_sliced(p) || p.weight.numel() == 0) return 1;
  const int64_t tiles =
      ceil_divide(p.group_out_channels(), kSliceTile) * ceil_divide(p.taps(), kSliceTile);
  const int64_t room = kSliceBytes / (p.weight.numel() * int64_t(sizeof(float)));
  return std::max<int64_t>(1, std::min(kSliceWaves * device.processors / tiles, room));
}

int64_t weight_bytes(const ConvProblem& p, int64_t slices) {
  const bool sums = p.direction == Direction::kBackwardWeight;
  const int64_t copies = slices > 1 ? slices : packs_weight(p);
  return round_up(copies * p.weight.numel() * element_size(sums ? sum_dtype(p.dtype) : p.dtype),
                  kAlignment);
}

int64_t fixed_bytes(const ConvProblem& p, int64_t slices) {
  return weight_bytes(p, slices) + (row_bytes(p) ? padding_bytes(p) : 0);
}

// Backward-input works on input rows; one of them needs at most this many output rows.
int64_t minimum_rows(const ConvProblem& p) {
  if (p.direction != Direction::kBackwardInput) return 1;
  return std::min(p.output_size().h, (p.kernel().h - 1) * p.dilation.h / p.stride.h + 1);
}

WorkspaceRange workspace(const ConvProblem& p, const Device& device) {
  const int64_t fixed = fixed_bytes(p, 1), all = fixed_bytes(p, slice_count(p, device));
  const int64_t bytes = row_bytes(p);
  if (bytes == 0) return {fixed, all};
  const int64_t least = minimum_rows(p), rows = p.batch() * p.output_size().h;
  const int64_t wanted = std::clamp(kChunkBytes / bytes, least, std::max(rows, least));
  return {fixed + least * bytes, all + wanted * bytes};
}

}  // namespace convops::cuda::im2col_gemm
