// The ring of a warp, for stride 1: no warp waits for another, rows are copied by code that knows
// how many columns there are, and the columns at a warp's edges, which two warps copy, come out of
// L1.
#pragma once

#include "cuda/depthwise_channels_last.cuh"
#include "cuda/ptx/copy.cuh"

namespace convops::cuda::depthwise_channels_last {

constexpr int kTeam = 4;  // warps of a block, at most

// Copies one row of a warp's columns and channels after the other to shared memory, zeros where the
// tensor ends. A lane has the same chunk of a pixel in every row, in every kStep-th column;
// channels past the last are left as they are, nobody stores what becomes of them.
template <typename T, int kChannels, int kColumns>
class WarpCopier {
 public:
  // `image`: the tile's first channel of its image. Rows from `row` on; from `end_row` on, zeros.
  __device__ WarpCopier(const Source& source, const T* image, int row, int end_row,
                        int first_column, int channels)
      : image_(source.image), bytes_(source.chunk_bytes), row_(row), end_row_(end_row) {
    const int chunk = max(4, bytes_), chunks = kPixelBytes / chunk, lane = threadIdx.x % kWarp;
    const int byte = lane % chunks * chunk;
    column_ = first_column + lane / chunks;
    end_ = byte < channels * int(sizeof(T)) ? first_column + kColumns : column_;
    place_ = lane * chunk / int(sizeof(T));
    from_ = image + row * image_.row_stride + int64_t(column_) * image_.column_stride +
            byte / int(sizeof(T));
    half_ = channels * int(sizeof(T)) - byte == 2;
  }

  // The next row.
  __device__ __forceinline__ void copy_row(T* to) {
    if constexpr (kPixelBytes > 4 * kWarp)  // whose smaller chunks a warp has no lanes for
      copy_chunks<16>(to + place_);
    else if (bytes_ == 16)
      copy_chunks<16>(to + place_);
    else if (sizeof(T) == 4 || bytes_ == 4)
      copy_chunks<4>(to + place_);
    else if constexpr (sizeof(T) == 2)
      copy_chunks<2>(to + place_);
    ++row_;
    from_ += image_.row_stride;
  }

 private:
  static constexpr int kPixelBytes = kChannels * int(sizeof(T));

  template <int kBytes>
  __device__ __forceinline__ void copy_chunks(T* to) const {
    // Columns that the warp copies at once.
    constexpr int kStep = kWarp * (kBytes > 4 ? kBytes : 4) / kPixelBytes;
    static_assert(kStep > 0);
    const T* from = from_;
    const bool row_inside = unsigned(row_) < unsigned(end_row_);
#pragma unroll(kBytes == 16 ? kColumns : 1)
    for (int i = 0; i < kColumns; i += kStep) {
      if (column_ + i >= end_) break;
      const bool inside = row_inside && unsigned(column_ + i) < unsigned(image_.width);
      T* const target = to + i * kChannels;
      if constexpr (kBytes > 2) {
        ptx::copy_bytes<kBytes>(uint32_t(__cvta_generic_to_shared(target)), from, inside);
      } else {
        // No asynchronous copy has 2 bytes. The barrier before the row is read orders these.
        target[0] = inside ? from[0] : convert<T>(0.0f);
        target[1] = inside && !half_ ? from[1] : convert<T>(0.0f);
      }
      from += int64_t(kStep) * image_.column_stride;
    }
  }

  const Image& image_;
  const T* from_;
  int bytes_, row_, end_row_, end_, column_, place_;
  bool half_;  // of the chunk's two channels only one is the tensor's
};

// A place in a warp's ring of kStages stages that goes round with them.
template <typename T, int kSize, int kStages>
struct WarpPlace {
  T* place;
  T* end;

  __device__ WarpPlace(T* ring, int offset) : place(ring + offset), end(place + kStages * kSize) {}
  __device__ __forceinline__ void next() {
    place += kSize;
    if (place == end) place -= kStages * kSize;
  }
};

}  // namespace convops::cuda::depthwise_channels_last
