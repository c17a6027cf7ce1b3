// The copy engine's descriptions (tensor maps) of implicit_gemm's source and result.
#include <algorithm>
#include <numeric>

#include "cuda/implicit_gemm.h"
#include "cuda/tensor_map.h"
#include "integers.h"

namespace convops::cuda {

int source_kinds(const GemmProblem& g) {
  return int(kVector / std::gcd(g.source.stride[2], int64_t{kVector}));
}

// Elements of a row must be neighbours, channels begin at multiples of 16 bytes, and rows follow
// each other where a box has the end of the row before: what lies between them is not the tensor's.
// No cell may have elements of both. Of cells that are several elements the phases must be whole
// channels of a block of the sum, each row of a cell in one kind's box and aligned there to its own
// length, but for its origin.
bool can_copy_bulk(const GemmProblem& g) {
  constexpr int64_t kMaxStride = int64_t{1} << 36;
  const auto& [size, stride] = g.source;
  const int kinds = source_kinds(g), phases = g.phases();
  const auto fits = [&](int i) { return stride[i] > 0 && stride[i] < kMaxStride; };
  const bool own = kinds == 1 || (stride[2] == size[3] && g.w.source_origin == 0);
  const bool patch = g.sum_classes == 1 && g.block_sums % phases == 0 && g.h.phases % kinds == 0 &&
                     g.w.phases <= kVector && stride[2] % g.w.phases == 0;
  return stride[3] == 1 && fits(0) && fits(1) && fits(2) && stride[0] % kVector == 0 &&
         stride[1] % kVector == 0 && size[2] >= kinds && own && (phases == 1 || patch);
}

// Every row of a kind, from the last multiple of 16 bytes before where the first begins.
void make_source_maps(const GemmProblem& g, const GemmTile& t, const float* source,
                      CUtensorMap* maps) {
  const auto& [size, stride] = g.source;
  const int kinds = 1 << t.source_kinds_log;
  const int box[4] = {t.raw_pitch, t.raw_cells / t.raw_pitch, t.raw_channels, 1};
  for (int kind = 0; kind < kinds; ++kind) {
    const int64_t first = kind * stride[2], before = first % kVector;
    maps[kind] = make_map(source + first - before,
                          {size[3] + before, ceil_divide(size[2] - kind, kinds), size[1], size[0]},
                          {kinds * stride[2], stride[1], stride[0]}, box);
  }
}

// Every row of a kind in every channel of a kind, from where its first sector begins; of its end
// only whole vectors of 16 bytes, because the copy engine does not write less. What a box has
// between channels lies outside: then a map's row is the tile's, and where that begins, in sectors,
// a dimension of its own.
void make_result_maps(const GemmProblem& g, const GemmTile& t, float* result, CUtensorMap* maps) {
  const auto& [size, stride] = g.result;
  const int row_kinds = 1 << t.row_kinds_log, channel_kinds = 1 << g.channel_kinds_log;
  const int box[5] = {t.box_pitch, 8 >> t.woven_log, 1, 1, 1};
  for (int row = 0; row < row_kinds; ++row)
    for (int channel = 0; channel < channel_kinds; ++channel) {
      const int64_t first = row * stride[2] + channel * stride[1],
                    left_out = t.to_border(int(first));
      maps[row * channel_kinds + channel] = make_map(
          result + first + left_out,
          {t.has_gaps() ? t.box_width : (size[3] - left_out) / kVector * kVector,
           ceil_divide(size[1] - channel, channel_kinds), t.has_gaps() ? size[3] / kSector : 1,
           ceil_divide(size[2] - row, row_kinds), size[0]},
          {channel_kinds * stride[1], kSector, row_kinds * stride[2], stride[0]}, box);
    }
}

}  // namespace convops::cuda
