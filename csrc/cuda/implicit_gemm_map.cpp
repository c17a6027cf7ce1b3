// The copy engine's descriptions (tensor maps) of implicit_gemm's source and result.
#include <algorithm>
#include <numeric>

#include "cuda/implicit_gemm.h"
#include "cuda/tensor_map.h"
#include "integers.h"

namespace convops::cuda {

int source_kinds(const GemmProblem& g) { return 1 << kinds_log(g.source.stride[2], g.vector()); }

// Elements of a row must be neighbours, channels of a kind begin at multiples of 16 bytes, and rows
// (and channels) follow each other where a box has the end of what is before: what lies between
// them is not the tensor's. No cell may have elements of both. Of cells that are several elements
// the phases must be whole channels of a block of the sum, each row of a cell in one kind's box and
// aligned there to its own length, but for its origin.
bool can_copy_bulk(const GemmProblem& g) {
  const auto& [size, stride] = g.source;
  const int kinds = source_kinds(g), channel_kinds = 1 << g.sum_kinds_log, phases = g.phases();
  const auto fits = [&](int i) { return stride[i] > 0 && stride[i] < kMaxMapStride; };
  const bool own = (kinds == 1 || (stride[2] == size[3] && g.w.source_origin == 0)) &&
                   (channel_kinds == 1 || stride[1] == size[2] * stride[2] || stride[1] == size[3]);
  const bool patch = g.sum_classes == 1 && g.block_sums % phases == 0 && g.h.phases % kinds == 0 &&
                     g.w.phases <= kMostRun && stride[2] % g.w.phases == 0;
  return stride[3] == 1 && fits(0) && fits(1) && fits(2) && stride[0] % g.vector() == 0 &&
         (stride[1] << g.sum_kinds_log) % g.vector() == 0 && size[2] >= kinds && own &&
         kinds * channel_kinds <= kMaxSourceKinds && (phases == 1 || patch);
}

// Every row of a kind in every channel of a kind, from the last multiple of 16 bytes before where
// the first begins.
void make_source_maps(const GemmProblem& g, const GemmTile& t, const void* source,
                      CUtensorMap* maps) {
  const auto& [size, stride] = g.source;
  const int kinds = 1 << t.source_kinds_log, channel_kinds = 1 << g.sum_kinds_log;
  const int channels = t.octets_apart ? kOctet : t.raw_channels;
  const int box[4] = {t.raw_pitch, t.raw_cells / t.raw_pitch, channels, 1};
  for (int kind = 0; kind < kinds; ++kind)
    for (int channel = 0; channel < channel_kinds; ++channel) {
      const int64_t first = kind * stride[2] + channel * stride[1], before = first % g.vector();
      maps[kind * channel_kinds + channel] =
          make_map(static_cast<const uint8_t*>(source) + (first - before) * g.element_bytes,
                   {size[3] + before, ceil_divide(size[2] - kind, kinds),
                    ceil_divide(size[1] - channel, channel_kinds), size[0]},
                   {kinds * stride[2], channel_kinds * stride[1], stride[0]}, box, g.element_bytes);
    }
}

// The classes of the sum are few, and their elements lie a cell apart. A box has no other group's
// channels (GemmTile::direct).
bool can_copy_direct(const GemmProblem& g) {
  const auto& [size, stride] = g.source;
  const auto fits = [&](int i) { return stride[i] > 0 && stride[i] < kMaxMapStride; };
  return has_octets(g.element_bytes, g.source) && g.octets == kStepOctets && fits(0) && fits(2) &&
         fits(3) && g.h.source_origin + g.w.source_origin == 0 && g.sum_classes == g.phases() &&
         g.sum_classes <= kMaxSourceKinds && size[2] >= g.h.phases && size[3] >= g.w.phases;
}

// Cells of a class of the sum, with the channels of a stage.
void make_cell_maps(const GemmProblem& g, const GemmTile& t, const void* source,
                    CUtensorMap* maps) {
  const auto& [size, stride] = g.source;
  const int box[4] = {t.depth * g.block_sums, t.pitch, t.source_cells / t.pitch, 1};
  for (int i = 0; i < g.sum_classes; ++i) {
    const GemmSum first = gemm_sum(g, i, 0);
    const int64_t offset = first.phase_h * stride[2] + first.phase_w * stride[3];
    maps[i] = make_map(static_cast<const uint8_t*>(source) + offset * g.element_bytes,
                       {size[1], ceil_divide(size[3] - first.phase_w, g.w.phases),
                        ceil_divide(size[2] - first.phase_h, g.h.phases), size[0]},
                       {g.w.phases * stride[3], g.h.phases * stride[2], stride[0]}, box,
                       g.element_bytes, box[0] * g.element_bytes);
  }
}

// Every row of a kind in every channel of a kind, from its first multiple of 16 bytes on; of its
// end only whole vectors of them, because the copy engine does not write less. What a box has
// between channels lies outside: then a map's row is the tile's, and where that begins, in chunks
// of a gap, a dimension of its own.
void make_result_maps(const GemmProblem& g, const GemmTile& t, void* result, CUtensorMap* maps) {
  const auto& [size, stride] = g.result;
  const int vector = g.vector();
  const int row_kinds = 1 << t.row_kinds_log, channel_kinds = 1 << g.channel_kinds_log;
  const int box[5] = {t.box_pitch, 8 >> t.woven_log, 1, 1, 1};
  for (int row = 0; row < row_kinds; ++row)
    for (int channel = 0; channel < channel_kinds; ++channel) {
      const int64_t first = row * stride[2] + channel * stride[1];
      const int64_t left_out = round_up(first, vector) - first;
      maps[row * channel_kinds + channel] = make_map(
          static_cast<uint8_t*>(result) + (first + left_out) * g.element_bytes,
          {t.has_gaps() ? t.box_width : (size[3] - left_out) / vector * vector,
           ceil_divide(size[1] - channel, channel_kinds), t.has_gaps() ? size[3] / kGap : 1,
           ceil_divide(size[2] - row, row_kinds), size[0]},
          {channel_kinds * stride[1], kGap, row_kinds * stride[2], stride[0]}, box,
          g.element_bytes);
    }
}

// A row of a tile in the channels that a box has of its cells.
CUtensorMap make_result_cells_map(const GemmProblem& g, const GemmTile& t, void* result) {
  const auto& [size, stride] = g.result;
  return make_map(result, {size[1], size[3], size[2], size[0], 1},
                  {stride[3], stride[2], stride[0], g.vector()}, {t.cell_rows, t.step, 1, 1, 1},
                  g.element_bytes, t.cell_rows * g.element_bytes);
}

}  // namespace convops::cuda
