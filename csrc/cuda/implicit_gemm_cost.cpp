// How long a tile of implicit_gemm takes, by estimate: what chooses among tiles, and among
// algorithms.
#include <algorithm>
#include <cmath>

#include "cuda/implicit_gemm.h"
#include "integers.h"

namespace convops::cuda {
namespace {

// Measured on an H200 (docs/implicit_gemm_measurements.md): cycles on one multiprocessor.
constexpr double kStepCycles = 10.7;       // between steps
constexpr double kPromoteCycles = 268;     // to add up sums in registers
constexpr double kDrainCycles = 450;       // from a stage to the next
constexpr double kConvertCycles = 138;     // a pass of a group of converters
constexpr double kTogether = 1.31;         // times as long where there are more warps of them
constexpr double kCopyCycles = 1210;       // besides, where they copy cell by cell
constexpr double kMixedCopyCycles = 1990;  // and several phases of the source mix
constexpr double kStraddled = 1.17;        // times as long where tiles cross images
constexpr double kMaxCycles = 93;          // of a vector that a thread looks at for the maximum
constexpr double kStageCycles = 1600;      // of a stage, whatever its size
constexpr double kLoadCycles = 875;        // until a raw stage is there
constexpr double kRowCycles = 586;         // of a row of the tile: to stage its results
constexpr double kUnpairedRows = 2.77;     // times as long where they are staged one by one
constexpr double kRunCycles = 110;         // of a run that is copied by itself
constexpr double kApartCycles = 2.0;       // of a result that goes alone
constexpr double kHalfCycles = 995;  // until half of the results has left, if both share memory
constexpr double kJobCycles = 762;
// Of 16 bits, of a stage of the converters: a row of boxes and four of its matrices, an octet of a
// patch, one that is gathered; all of one that is copied, and an octet of it.
constexpr double kRowOfMatrices = 294, kMatricesCycles = 45.9, kPatchCycles = 395;
constexpr double kGatherCycles = 2570, kOctetsCycles = 5920, kOctetCycles = 163;
// And of the consumers: from a stage to the next, a row of the tile, a result that goes alone, a
// job. Cells that are loaded as they are multiplied cost no more than that, nor do those stored
// whole.
constexpr double kHalfDrainCycles = 607, kDirectDrainCycles = 100, kHalfRowCycles = 505;
constexpr double kEdgeCycles = 4880, kHalfRunCycles = 613;
constexpr double kHalfApartCycles = 0.529, kHalfJobCycles = 1440;
constexpr double kFewConverters = 1.08;  // times as long beside four warpgroups that multiply
// Of the shorter of two things at a time is not hidden; of consumers and converters of 16 bits.
constexpr double kOverlap = 0.373, kHalfOverlap = 0.224;
constexpr double kClock = 1.98e9;
constexpr double kBandwidthShare = 1.1;      // of the device's peak: kOverlap takes more than that
constexpr double kReadSeconds = 0.0383e-12;  // of a byte that blocks read, mostly from L2
constexpr double kPackSeconds = 11.5e-12;    // of a packed weight
constexpr double kCutBytes = 54.6;           // more for a chunk in two tiles of 64 channels
constexpr double kLaunchSeconds = 23e-6;     // three kernels

// Of dense float32 in channels_last results cost less and copies more than that. Tiles are in a
// better order without it: by it KernelBench 63 takes 8.1 ms instead of 5.8, though it is estimated
// at 7.6 instead of 19.
constexpr double kPixelCopyCycles = 5500, kMixedPixelCopyCycles = 4000, kPixelApartCycles = 0.3;

// Cycles of a group of converters for a stage, which its threads go through in so many passes.
double float_stage(const GemmProblem& g, const GemmTile& t, double passes, bool of_pixels) {
  const bool mixed = g.mixes_phases();
  const double cells = of_pixels ? (mixed ? kMixedPixelCopyCycles : kPixelCopyCycles)
                                 : (mixed ? kMixedCopyCycles : kCopyCycles);
  const double copy = cells * (t.straddles ? kStraddled : 1);
  const double slowly = t.columns <= kFewColumns ? kTogether : 1;
  // The vectors that a thread looks at in each box, four at a time.
  const int lanes = gemm_converter_threads(g.element_bytes, t.columns, t.consumers) / t.max_groups
                    << t.max_pieces_log;
  const double vectors = double(round_up(ceil_divide(t.raw_cells, g.vector() * lanes), 4));
  const double look = vectors * (1 << t.source_kinds_log) * kMaxCycles * slowly;
  const double pass = kConvertCycles * slowly + (t.bulk ? 0 : copy);
  return kStageCycles + look + passes * pass;
}

double half_stage(const GemmProblem& g, const GemmTile& t, double passes) {
  if (t.by_octets) return kOctetsCycles + passes * g.octets * kOctetCycles;
  if (!t.bulk) return passes * g.octets * kGatherCycles;
  if (t.run > 0) return passes * g.octets * kPatchCycles;
  const int warps = gemm_converter_threads(g.element_bytes, t.columns, t.consumers) / 32;
  const double rows = double(ceil_divide(t.tile_rows + g.h.shifts - 1, warps));
  return rows * t.depth * g.octets *
         (kRowOfMatrices + kMatricesCycles * std::ceil(t.raw_pitch / 32.0));
}

}  // namespace

int64_t packed_steps(const GemmProblem& g, const GemmTile& t) {
  int64_t steps = 0;
  for (int r = 0; r < g.row_classes; ++r) steps += int64_t{g.steps(r)} * t.row_blocks * g.groups;
  return steps;
}

double estimate_gemm(const GemmProblem& g, const GemmTile& t, const Device& device, double bytes,
                     Compared compared) {
  const bool of_pixels = compared == Compared::kAlgorithms && g.groups == 1 &&
                         g.source.stride[1] == 1 && g.source.size[1] > 1;
  const double steps = double(packed_steps(g, t));
  const double weights = steps * t.row_tile * kStepOctets * kOctet;
  const auto& size = g.result.size;
  // Contiguous results of a tile. Unless they are whole chunks of memory two tiles share one, which
  // waits for its other half; the more channels the tiles have, the more of them wait.
  const double piece = t.tiles_w > 1 ? t.step * g.w.block : double(size[3]) * t.height * g.h.block;
  const double cuts = t.has_gaps() ? 0 : double(size[0] * size[1] * size[2] * size[3]) / piece;
  const double memory =
      (bytes + cuts * kCutBytes * t.row_tile / 64) / (device.bandwidth * kBandwidthShare);
  const double waves = std::ceil(double(t.jobs) / device.processors);
  // Of the units of one tile of cells; resident weights are read by a block, not by each job.
  double cycles = 0;
  double read = t.resident_bytes > 0 ? 0 : steps * gemm_weight_bytes(g.products, t.row_tile);
  for (int r = 0; r < g.row_classes; ++r) {
    double stages = 0;
    for (int s = 0; s < g.sum_classes; ++s) {
      const int block_steps = g.step_count(r, s);
      if (block_steps > 0) stages += double(ceil_divide(g.sum_blocks, t.depth));
    }
    // All warpgroups, who share the tensor cores.
    const double sums = double(ceil_divide(g.steps(r), promoted_steps(g.products)));
    const double multiply = g.steps(r) * (g.products * t.columns * t.consumers / 2 + kStepCycles) +
                            (g.is_half() ? 0 : sums * kPromoteCycles) +
                            stages * (t.direct      ? kDirectDrainCycles
                                      : g.is_half() ? kHalfDrainCycles
                                                    : kDrainCycles);
    const double passes =
        std::ceil(double(t.depth) * t.source_cells /
                  gemm_converter_threads(g.element_bytes, t.columns, t.consumers));
    read += stages * t.raw_bytes * t.row_blocks * g.groups;
    const double rows = double(g.class_rows) / t.row_blocks;
    // By each consumer warp, of its 16 rows.
    const double staging =
        t.height * (g.is_half() ? kHalfRowCycles : kRowCycles) * (t.paired ? 1 : kUnpairedRows);
    const double runs =
        t.boxed ? 0 : (16 >> t.woven_log) * t.runs * (g.is_half() ? kHalfRunCycles : kRunCycles);
    // Warps without a row store nothing; the blocks of the fullest rows are the last to end.
    const double filled = std::min(1.0, double(g.class_rows) / t.row_tile);
    const double ends = std::min(1.0, 2.0 / t.tiles_w);  // of the tiles are at a row's begin or end
    const double edges = g.is_half() && t.boxed && t.has_edges ? ends * t.height * kEdgeCycles : 0;
    const double apart = g.is_half() ? kHalfApartCycles
                         : of_pixels ? kPixelApartCycles
                                     : kApartCycles;
    const double store = t.neighbours ? filled * (staging + runs + edges)
                         : t.across   ? 0
                                      : rows * t.tile_rows * t.width * apart;
    const double halves = !g.is_half() && t.neighbours && t.staged_halves == 1 ? kHalfCycles : 0;
    const double consume = multiply + store + halves + (g.is_half() ? kHalfJobCycles : kJobCycles);
    // A group works on one stage; a raw stage is loaded, looked at and converted.
    const double few = t.consumers > kConsumers ? kFewConverters : 1;
    const double stage =
        g.is_half() ? few * half_stage(g, t, passes) : float_stage(g, t, passes, of_pixels);
    const double convert =
        t.direct ? 0
                 : stages * std::max(stage / kConverterGroups,
                                     t.bulk ? (kLoadCycles + stage) / t.raw_stages : 0);
    const double overlap = g.is_half() ? kHalfOverlap : kOverlap;
    cycles += t.row_blocks * (std::max(consume, convert) + overlap * std::min(consume, convert));
  }
  cycles *= g.groups;
  const double mean = cycles / t.units;
  const double compute = waves * mean / kClock;
  return std::max(compute, memory) + kOverlap * std::min(compute, memory) +
         read / t.units * t.jobs * kReadSeconds + weights * kPackSeconds + kLaunchSeconds;
}

}  // namespace convops::cuda
