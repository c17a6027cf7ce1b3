// How grouped_weight deals out a problem to blocks and warps, and how a stage of its tensors comes
// to shared memory.
#pragma once

#include <algorithm>

#include "cuda/algorithms.h"
#include "cuda/ptx/copy.cuh"
#include "integers.h"

namespace convops::cuda::grouped_weight {

constexpr int kWarp = 32;
constexpr int kOctet = 8;  // channels, out channels and pixels of an MMA's side
// Warps of a block that compute, and that copy: 128 registers a thread leave a multiprocessor 16
// warps, two such blocks.
constexpr int kMaxWarps = 7, kCopyWarps = 1, kWarpsPerProcessor = 16;
// Octets of pixels of a block. Those of stride 2 have twice the input.
constexpr int kMaxColumns = 7, kMaxColumnsStride2 = 4;
constexpr int kStages = 3;  // two in flight, one in use
constexpr int kRows = 4;    // output rows of a stage
constexpr int kMaxGroupChannels = 64;
constexpr int64_t kMaxExtent = int64_t{1} << 29;  // a side times the stride fits int

template <int kKernel_, int kStride_>
struct Shape {
  static constexpr int kKernel = kKernel_, kStride = kStride_;
  static constexpr int kTaps = kKernel * kKernel;
  static constexpr int kHalo = kKernel - kStride;  // input rows that a stage shares with the last
  static constexpr int kNewRows = kRows * kStride;
  static constexpr int kInputRows = kHalo + kNewRows;
  static constexpr int kValues = kStride + kKernel;  // of a row, under two output pixels
  // Columns of a stage before the first that is needed: with padding 1 a row of the stage and one
  // of the tensor begin at the same place between multiples of 16 bytes.
  static constexpr int kShift = kKernel == 3 ? 3 : 0;
  static_assert(kHalo >= 0);
};
template <typename... Shapes>
struct ShapeList {};
using AllShapes = ShapeList<Shape<3, 1>, Shape<3, 2>, Shape<1, 1>>;

// Calls f with the shape of the problem; false if it is not compiled.
template <typename F, typename... Shapes>
bool with_shape(const ConvProblem& p, F&& f, ShapeList<Shapes...>) {
  const auto matches = [&](auto shape) {
    return p.kernel().h == shape.kKernel && p.kernel().w == shape.kKernel &&
           p.stride.h == shape.kStride && p.stride.w == shape.kStride;
  };
  return ((matches(Shapes{}) && (f(Shapes{}), true)) || ...);
}

// How the channels of a problem are dealt out.
struct Tiling {
  int pack;                      // groups of a job
  int channels, out_channels;    // of `pack` groups
  int sides, out_sides;          // octets of them in a block
  int blocks, out_blocks;        // that cover them
  int columns, strips;           // octets of pixels of a block, and blocks beside each other
  int packs, row_blocks, items;  // an item: kRows output rows of an image

  explicit Tiling(const ConvProblem& p) {
    const auto in = int(p.group_in_channels()), out = int(p.group_out_channels());
    pack = int(std::min<int64_t>(p.groups, std::max(1, kOctet / std::max(in, out))));
    channels = pack * in;
    out_channels = pack * out;
    packs = int(ceil_divide(p.groups, pack));
    const auto split = [](int64_t octets, int64_t most, int& each, int& count) {
      count = int(ceil_divide(octets, most));
      each = int(ceil_divide(octets, count));
    };
    const int most = p.stride.w == 2 ? kMaxColumnsStride2 : kMaxColumns;
    split(std::max<int64_t>(1, ceil_divide(p.output.size[3], kOctet)), most, columns, strips);
    const int jobs = kMaxWarps / columns;  // as square as possible: it shares most
    split(ceil_divide(channels, kOctet), jobs < 4 ? 1 : 2, sides, blocks);
    split(ceil_divide(out_channels, kOctet), jobs / sides, out_sides, out_blocks);
    row_blocks = int(ceil_divide(p.output.size[2], kRows));
    items = int(row_blocks * p.batch());
  }
  __host__ __device__ int jobs() const { return sides * out_sides; }
  __host__ __device__ int warps() const { return jobs() * columns; }
  int64_t blocks_of_a_chunk() const { return int64_t(packs) * blocks * out_blocks * strips; }
};

// A tensor of which a stage holds channels × rows × columns, copied in vectors by the lines of
// threads of a block.
struct Source {
  int64_t image_stride, channel_stride, row_stride;
  int channels, height, width;
  int first_row, first_column;  // of the first copied vector of output row and column 0
  int vectors, vector_floats;   // of a row
  int pitch, plane, octets;     // of a stage: floats of a row and a channel, channels / 8
  int shift;                    // where the first vector goes in a row
  int lanes, line_rows;         // threads of a row, rows copied at once

  Source(const Tensor4& t, const void* data, const Pair& padding, int columns, int rows,
         int octets_, int kernel_shift, int bank, int strips, int strip_columns, int threads)
      : image_stride(t.stride[0]),
        channel_stride(t.stride[1]),
        row_stride(t.stride[2]),
        channels(int(t.size[1])),
        height(int(t.size[2])),
        width(int(t.size[3])),
        first_row(int(-padding.h)),
        octets(octets_) {
    const auto aligned = [&](int floats) {
      return reinterpret_cast<uintptr_t>(data) % (floats * sizeof(float)) == 0 &&
             image_stride % floats == 0 && channel_stride % floats == 0 &&
             row_stride % floats == 0 && width % floats == 0 &&
             (padding.w + kernel_shift) % floats == 0;
    };
    vector_floats = aligned(4) ? 4 : aligned(2) ? 2 : 1;
    shift = kernel_shift / vector_floats * vector_floats;
    first_column = int(-padding.w) - (kernel_shift - shift);
    columns += kernel_shift;
    vectors = int(ceil_divide(columns - shift, vector_floats));
    pitch = int(round_up(columns, 4));
    // The channels of a phase of a load must lie `bank` banks apart.
    plane = int(round_up(rows * pitch - bank, 32)) + bank;
    // Vectors of a row that are inside: no strip has more than the first two.
    int most = end_vector(first_column) - first_vector(first_column);
    if (strips > 1) {
      const int column = first_column + strip_columns;
      most = std::max(most, end_vector(column) - first_vector(column));
    }
    lanes = 1;
    while (lanes < most && lanes < kWarp) lanes *= 2;
    line_rows = std::min(kRows, threads / lanes);
  }
  // The vectors of a row that begins at `column` that are inside the tensor: all or nothing of a
  // vector is.
  __host__ __device__ int first_vector(int column) const {
    return column < 0 ? -column / vector_floats : 0;
  }
  __host__ __device__ int end_vector(int column) const {
    const int end = (width - column) / vector_floats;
    return end < vectors ? end : vectors;
  }
  __host__ __device__ int floats() const { return octets * kOctet * plane; }
};

struct Arguments {
  Tiling tiling;
  Source input, grad;
  int group_channels, group_out_channels;
  int64_t groups;
  int chunks;
};

// What a thread copies of every stage: the same columns, rows and channels. Columns outside the
// tensor are not touched: they are zero from the beginning.
class Copier {
 public:
  // `data`: the first image, at the block's first channel. `channels`: how many there are.
  // `first_row`: of the tensor, that of the next stage.
  __device__ __forceinline__ Copier(const Source& s, const float* data, int first_column,
                                    int channels, int thread, int image, int first_row)
      : s_(s), channels_(channels), next_row_(first_row) {
    const int column = s.first_column + first_column;
    vector_ = s.first_vector(column) + thread % s.lanes;
    end_ = s.end_vector(column);
    row_ = thread / s.lanes;
    if (row_ >= s.line_rows) vector_ = end_;  // idle
    from_ = data + image * s.image_stride + (first_row + row_) * s.row_stride + column +
            vector_ * s.vector_floats;
    to_ = row_ * s.pitch + s.shift + vector_ * s.vector_floats;
  }

  // The kCount rows of the tensor from `offset` after the next on; zeros outside.
  template <int kCount>
  __device__ __forceinline__ void copy(const float* stage, int offset) const {
    if (s_.vector_floats == 4)
      copy_vectors<kCount, 4>(stage, offset);
    else if (s_.vector_floats == 2)
      copy_vectors<kCount, 2>(stage, offset);
    else
      copy_vectors<kCount, 1>(stage, offset);
  }

  // To the next stage, `rows` on in the image, or to the first row of the next image.
  __device__ __forceinline__ void advance(int rows) {
    next_row_ += rows;
    from_ += rows * s_.row_stride;
  }
  __device__ __forceinline__ void advance_image(int first_row) {
    from_ += s_.image_stride - (next_row_ - first_row) * s_.row_stride;
    next_row_ = first_row;
  }

 private:
  template <int kCount, int kFloats>
  __device__ __forceinline__ void copy_vectors(const float* stage, int offset) const {
    const auto to = unsigned(__cvta_generic_to_shared(stage + to_ + offset * s_.pitch));
    const float* from = from_ + offset * s_.row_stride;
    const int first_row = next_row_ + offset;
#pragma unroll 1
    for (int vector = vector_, i = 0; vector < end_; vector += s_.lanes, i += s_.lanes) {
#pragma unroll 1
      for (int row = row_, line = 0; row < kCount; row += s_.line_rows, line += s_.line_rows) {
        const float* source = from + line * s_.row_stride + i * kFloats;
        unsigned target = to + 4 * (line * s_.pitch + i * kFloats);
        const bool inside = unsigned(first_row + row) < unsigned(s_.height);
#pragma unroll 1
        for (int first = 0; first < s_.octets * kOctet; first += kOctet) {
          const int channels = inside ? channels_ - first : 0;
#pragma unroll
          for (int channel = 0; channel < kOctet; ++channel) {
            ptx::copy_bytes_or_zeros<kFloats* int(sizeof(float))>(target, source,
                                                                  channel < channels);
            source += s_.channel_stride;
            target += 4 * s_.plane;
          }
        }
      }
    }
  }

  const Source& s_;
  const float* from_;  // the thread's first place in the next stage's first row
  int channels_, next_row_, vector_, end_, row_, to_;
};

}  // namespace convops::cuda::grouped_weight
