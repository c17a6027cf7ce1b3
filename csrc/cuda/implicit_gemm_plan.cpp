// From the problem on cells to its tiles: every block and tile that fits is estimated, the fastest
// is taken.
#include <algorithm>
#include <bit>
#include <cmath>
#include <iterator>
#include <limits>
#include <numeric>
#include <vector>

#include "cuda/implicit_gemm.h"
#include "integers.h"

namespace convops::cuda {
namespace {

constexpr int kBlocks[] = {1, 2, 4};
constexpr int kLargestBox = 256;             // the copy engine's, along any side
constexpr int kBoxAlignment = 128;           // of its boxes in shared memory, in bytes
constexpr int kFewRows = 64, kFewSums = 16;  // below them an instruction is not full

int64_t align(int64_t bytes) { return round_up(bytes, 256); }

void set_raw_channels(const GemmProblem& g, GemmTile& t, int channels) {
  constexpr int kGroups = 16;
  t.raw_channels = channels;
  t.max_groups = std::max(kGroups, channels);
  t.max_pieces_log = std::countr_zero(unsigned(t.max_groups / channels));
  t.by_max_lanes = Divisor(
      std::max(1, gemm_converter_threads(g.element_bytes, t.columns, t.consumers) / t.max_groups));
}

int align_box(const GemmProblem& g, int64_t elements) {
  return int(round_up(elements, kBoxAlignment / g.element_bytes));
}

// The source as boxes; false where the copy engine cannot have them.
bool copy_in_bulk(const GemmProblem& g, GemmTile& t) {
  const int kinds = source_kinds(g), rows = (t.tile_rows + g.h.shifts - 1) * g.h.phases;
  const int vector = g.vector();
  // A row begins at a multiple of 16 bytes, less than a vector before the tile: as much for every
  // tile where tiles are whole vectors.
  const bool aligned = t.tiles_w == 1 || t.step * g.w.phases % vector == 0;
  const int before = aligned && kinds == 1 && g.sum_kinds_log == 0
                         ? g.w.source(g.w.first) & (vector - 1)
                         : vector - 1;
  const int raw_rows = int(ceil_divide(rows, kinds));
  t.bulk = true;
  t.by_octets = t.direct = false;
  t.source_kinds_log = std::countr_zero(unsigned(kinds));
  set_raw_channels(g, t, t.depth * g.block_sums / g.phases());
  t.raw_pitch = int(round_up(t.pitch * g.w.phases + before, vector));
  // Channels in different banks, where eight of them are read at a time.
  if (g.is_half() && t.raw_pitch / kOctet % 2 == 0 && t.raw_pitch < kLargestBox)
    t.raw_pitch += kOctet;
  t.raw_cells = raw_rows * t.raw_pitch;
  t.octets_apart = g.sum_kinds_log > 0;
  t.raw_octet = t.raw_cells * kOctet;
  if (t.octets_apart) t.raw_octet = align_box(g, t.raw_octet);
  t.raw_box = align_box(g, int64_t{t.raw_cells} * t.raw_channels);
  if (t.octets_apart) t.raw_box = t.raw_octet * (t.raw_channels / kOctet);
  // Room for cells one by one as well, should the source's address be unfit.
  const int cells = int(round_up(t.source_cells, vector)) * t.depth * g.block_sums;
  t.raw_bytes =
      (g.is_half() ? kinds * t.raw_box : std::max(kinds * t.raw_box, cells)) * g.element_bytes;
  // Elements of patches are at the same places in all tiles, and vectors of a run aligned.
  t.run = g.phases() > 1 ? std::gcd(g.w.phases, g.w.source_origin) : 0;
  return !t.straddles && t.raw_pitch <= kLargestBox && raw_rows <= kLargestBox &&
         (aligned || t.run == 0);
}

// The source as boxes of whole cells, which have no other group's channels.
bool copy_direct(const GemmProblem& g, const GemmTile& t) {
  return can_copy_direct(g) && !t.straddles && t.pitch <= kLargestBox &&
         t.source_cells / t.pitch <= kLargestBox &&
         (g.groups == 1 || g.sums % (t.depth * g.block_sums) == 0);
}

// Of the source ring: planes of octets, or whole cells of 32, 64 or 128 bytes, whose octets change
// places in a pattern that repeats after eight of them, or what wgmma takes for that many.
void lay_out_stages(const GemmProblem& g, GemmTile& t) {
  const int bytes = t.direct ? t.depth * kBlockBytes : kOctet * 2;
  const uint32_t swizzle = !t.direct ? 0 : bytes == 128 ? 1 : bytes == 64 ? 2 : 3;
  t.operand_layout = swizzle << 30 | uint32_t(kOctet * bytes >> 4);
  t.stage_cells = t.depth * t.part * (g.products == 3 ? 2 : 1);
  if (t.direct) t.stage_cells = int(round_up(t.stage_cells, kSwizzleBytes / 16));
}

// As many stages as fit: first those in which both halves of the results leave at a time, then raw
// ones for the memory's latency and weights' for that of L2, then a third source stage, so that the
// consumers have one while both groups of converters fill theirs; false if the fewest do not.
bool choose_stages(GemmTile& t) {
  t.source_stages = 2;
  t.raw_stages = kConverterGroups;
  t.weight_stages = t.resident_bytes > 0 ? 1 : t.weight_stage_bytes > kLeastWeightStage ? 3 : 4;
  t.staged_halves = 1;
  const auto fits = [&] { return GemmSharedMemory(t).bytes <= kMaxSharedMemory; };
  if (!fits()) t.weight_stages = 3;
  if (!fits()) return false;
  const auto grow = [&](int& stages, int most) {
    while (stages < most) {
      ++stages;
      if (fits()) continue;
      --stages;
      break;
    }
  };
  if (!t.across) grow(t.staged_halves, 2);
  if (t.bulk) grow(t.raw_stages, 3);
  if (t.resident_bytes == 0) grow(t.weight_stages, kMaxWeightStages - 1);
  grow(t.source_stages, kMaxSourceStages);
  if (t.bulk) grow(t.raw_stages, kMaxRawStages);
  if (t.resident_bytes == 0) grow(t.weight_stages, kMaxWeightStages);
  return true;
}

// How results lie in memory, as far as storing them goes.
void describe_results(const GemmProblem& g, GemmTile& t) {
  const auto& [size, stride] = g.result;
  const int block = g.w.block;
  t.neighbours = are_neighbours(g);
  t.woven_log = t.neighbours ? block / 2 : 0;
  // A box has as many channels as its tensor has, or the group has in whole boxes.
  t.cell_rows = g.groups == 1 ? 64 : std::gcd(g.rows, 64);
  t.across = !t.neighbours && block == 1 && g.h.block == 1 && g.rows % kOctet == 0 &&
             t.cell_rows >= 16 && has_octets(g.element_bytes, g.result) && stride[0] > 0 &&
             stride[2] > 0 && stride[3] > 0;
  t.paired = t.neighbours && block == 1 && (stride[0] | stride[1] | stride[2] | size[3]) % 2 == 0;
  t.row_kinds_log = kinds_log(stride[2], g.vector());
  const int sector = g.sector();
  const auto kinds = [&](int i) { return kinds_log(stride[i], sector); };
  const int most = std::max({kinds(0), kinds(1), kinds(2)});
  t.overlap = t.neighbours ? sector - (sector >> most) : 0;
}

// Whether the results of eight rows can leave as boxes: whole channels of one vertical phase and
// kind, whose rows begin at few different places in a sector (every kind's map is a kernel
// parameter). Of rows that are short and begin inside a sector too much would be no box's.
bool boxes_pay(const GemmProblem& g, const GemmTile& t) {
  constexpr int kShortRow = 64;
  const auto& [size, stride] = g.result;
  const int channels = 8 >> t.woven_log, channel_kinds = 1 << g.channel_kinds_log;
  const int row_kinds = 1 << t.row_kinds_log, kinds = row_kinds * channel_kinds;
  const bool whole =
      g.rows % channels == 0 || (g.groups == 1 && (g.row_classes > 1 || g.h.block == 1));
  return t.neighbours && whole && kinds <= kMaxKinds &&
         kinds_log(stride[1], g.sector()) == g.channel_kinds_log && stride[0] % g.sector() == 0 &&
         stride[0] > 0 && stride[1] > 0 && stride[2] > 0 && (kinds == 1 || size[3] >= kShortRow) &&
         size[2] >= row_kinds && size[1] >= channel_kinds && t.box_pitch <= kLargestBox;
}

// Bytes of the weights that a block of the kernel needs, where it is always on the same rows of
// them; else 0.
int resident_bytes(const GemmProblem& g, const GemmTile& t, int processors) {
  if (t.jobs > processors && processors % t.units != 0) return 0;
  int most = 0;
  for (int r = 0; r < g.row_classes; ++r) {
    if (g.steps(r) == 0) return 0;
    most = std::max(most, g.steps(r));
  }
  const int64_t bytes = int64_t{most} * gemm_weight_bytes(g.products, t.row_tile);
  return bytes < kMaxSharedMemory ? int(bytes) : 0;
}

// Of all lists.
int step_count(const GemmProblem& g) { return g.step_begin[g.row_classes - 1][g.sum_classes]; }

// What there is to choose for a tile: into how many parts a row of cells is cut, how deep a stage
// is and whether tiles cross images.
struct TileChoice {
  int row_tile;
  GemmShape shape;
  int parts, depth;
  bool straddles;
};

// That tile but for its stages; false where there is none.
bool make_tile(const GemmProblem& g, const TileChoice& choice, bool bulk, GemmTile& t) {
  const auto [row_tile, shape, parts, depth, straddles] = choice;
  const int columns = shape.columns;
  t.depth = depth;
  // Where stages end in the middle of a sum; elsewhere the second warpgroup would only have more of
  // them.
  const int sum_steps = promoted_steps(g.products);
  t.staggered = !g.is_half() && depth * g.step_count(0, 0) % sum_steps == sum_steps / 2;
  t.row_tile = row_tile;
  t.weight_stage_bytes = gemm_weight_stage_bytes(g.products, row_tile);
  t.columns = columns;
  t.consumers = shape.consumers;
  describe_results(g, t);
  const auto& stride = g.result.stride;
  const int block = g.w.block, sector_size = g.sector();
  t.step = t.width = int(ceil_divide(g.cells_w, parts));
  // Rows of whole chunks of memory may be cut between them.
  const bool chunks = t.neighbours && t.overlap == 0 &&
                      (t.step << t.woven_log) % chunk_elements(g.element_bytes) == 0 &&
                      g.result.size[3] == int64_t{t.step} * parts * block;
  if (parts > 1 && t.neighbours && !chunks) {
    const int sector = sector_size >> t.woven_log;
    // An odd number of sectors: channels lie in different banks of shared memory then.
    t.step = int(ceil_divide(t.step, sector) | 1) * sector;
    t.width = t.step + int(ceil_divide(t.overlap + g.w.result_origin, 1 << t.woven_log));
    if (t.width >= g.cells_w) return false;
  }
  const int round = t.paired ? 1 : 0;  // to even numbers
  t.pitch = (t.width + g.w.shifts - 1 + round) & ~round;
  // A row of the tile begins at a multiple of 128 bytes.
  if (t.across) t.pitch = int(round_up(t.pitch, 64 / t.cell_rows));
  if (t.width > columns) return false;
  t.height = 1 + (columns - t.width) / t.pitch;
  const int groups = t.consumers * 64 / row_tile;
  // Not more rows than there are.
  const int64_t straddling_rows = int64_t(g.images) * (g.cells_h + g.h.shifts - 1);
  t.height = int(std::min<int64_t>(t.height, ceil_divide(straddling_rows, groups)));
  t.tile_rows = groups * t.height;
  const int64_t apart = int64_t(g.images) * ceil_divide(g.cells_h, t.tile_rows);
  const int64_t straddling = ceil_divide(straddling_rows, t.tile_rows);
  t.straddles = straddles;
  if (straddles && straddling >= apart) return false;
  t.image_rows = t.straddles ? g.cells_h + g.h.shifts - 1 : int(round_up(g.cells_h, t.tile_rows));
  t.tiles_w = 1 + int(ceil_divide(std::max(0, g.cells_w - t.width), t.step));
  t.tiles_h = int(t.straddles ? straddling : apart);
  t.row_blocks = int(ceil_divide(g.class_rows, row_tile));
  t.units = t.row_blocks * g.row_classes * g.groups;
  const int64_t jobs = (straddles ? straddling : apart) * t.tiles_w * t.units;
  if (jobs >= kMaxExtent || int64_t(g.images) * t.image_rows >= kMaxExtent) return false;
  t.jobs = int(jobs);
  t.source_cells = (t.tile_rows + g.h.shifts - 1) * t.pitch;
  if (!bulk || !copy_in_bulk(g, t)) copy_by_cells(g, t);
  t.direct = t.by_octets && copy_direct(g, t);
  t.box_width = int(round_up(t.step << t.woven_log, sector_size));
  t.box_pitch = t.box_width + (chunks ? kGap : 0);
  t.box_elements = align_box(g, t.box_pitch * (8 >> t.woven_log));
  t.boxed = boxes_pay(g, t);
  t.has_edges = t.overlap > 0 || g.result.size[3] % g.vector() != 0;
  // Rows that follow each other leave at once, but where another image begins.
  t.joined = t.neighbours && block == 1 && g.h.block == 1 && t.tiles_w == 1 &&
             stride[2] == g.result.size[3];
  t.runs = !t.joined      ? t.height
           : !t.straddles ? 1
                          : 1 + int(ceil_divide(t.height - 1, t.image_rows));
  // Slots of whole vectors, with room for where the row begins. Lines are apart from each other's
  // banks.
  const int skew = g.vector() - 1;
  t.slot = t.joined ? t.width : int(round_up((t.width << t.woven_log) + skew, g.vector()));
  const int line = t.height * t.slot + (t.joined ? skew * (t.runs + 1) : 0);
  t.line = int(round_up(line + 8, 16)) - 8;
  // The last tap of the last warpgroup reads `columns` cells whether they are kept or not.
  const int last = (groups - 1) * t.height * t.pitch + (g.h.shifts - 1) * t.pitch + g.w.shifts - 1;
  t.plane = std::max(t.source_cells, last + columns);
  t.part = g.octets * t.plane;
  lay_out_stages(g, t);
  const int lines = t.neighbours ? (8 >> t.woven_log) * t.line : 8 * gemm_stage_pitch(columns);
  t.line_bytes = align_box(g, lines) * g.element_bytes;
  if (t.across) t.line_bytes = columns * 16 * g.element_bytes;
  t.staged_bytes = t.boxed ? t.height * t.box_elements * g.element_bytes : t.line_bytes;
  // A descriptor has 14 bits for the cells between octets; between taps there are fewer.
  return t.plane < (1 << 14) && t.depth * step_count(g) <= kMaxTaps;
}

// Into how many parts a row of cells may be cut: the fewest that fit, and more; and what makes
// them whole chunks of memory.
std::vector<int> row_parts(const GemmProblem& g, int columns) {
  constexpr int kMostRows = 10, kTries = 24;  // of a tile; between one row and two
  std::vector<int> result;
  const int cells_w = g.cells_w;
  const int64_t fewest = ceil_divide(cells_w, columns);
  const int64_t most = std::min<int64_t>(cells_w, kMostRows * (fewest + 1));
  for (int64_t parts = fewest; parts <= most; parts += std::max<int64_t>(1, fewest / kTries)) {
    const bool same =
        !result.empty() && ceil_divide(cells_w, parts) == ceil_divide(cells_w, result.back());
    if (!same) result.push_back(int(parts));
  }
  if (!are_neighbours(g)) return result;  // chunks may have no whole cells
  const int chunk = chunk_elements(g.element_bytes) / g.w.block;
  for (int cells = chunk; cells <= columns; cells += chunk)
    if (cells_w % cells == 0 && std::ranges::find(result, cells_w / cells) == result.end())
      result.push_back(cells_w / cells);
  return result;
}

// Where steps find their octets in a stage.
void place_steps(GemmProblem& g, const GemmTile& t) {
  const int step_taps = g.step_taps(), block_cells = t.stage_cells / t.depth;
  const auto cells = [&](const GemmTap& tap) { return tap.h * t.pitch + tap.w; };
  uint32_t* place = g.step_cells;
  for (int r = 0; r < g.row_classes; ++r)
    for (int s = 0; s < g.sum_classes; ++s)
      for (int block = 0; block < t.depth; ++block)
        for (int i = g.step_begin[r][s]; i < g.step_begin[r][s + 1]; ++i) {
          const GemmTap &first = g.taps[i * step_taps], &last = g.taps[(i + 1) * step_taps - 1];
          // Taps are in the order of their cells; of no tap the weights are zeros, whatever is
          // there.
          const int apart = step_taps == 1 ? t.plane : std::max(0, cells(last) - cells(first));
          const int cell = cells(first) * t.cell_octets();
          *place++ = t.direct ? uint32_t(cell + block * kStepOctets)
                              : uint32_t(block * block_cells + cell | apart << 16);
        }
}

GemmWorkspace lay_out(const GemmProblem& g, const GemmTile& t) {
  const int64_t channels = int64_t(g.groups) * g.rows;
  GemmWorkspace w;
  w.packed_weights = 0;
  w.row_scales = align(packed_steps(g, t) * gemm_weight_bytes(g.products, t.row_tile));
  w.bad_jobs = w.row_scales + align(channels * 4);
  w.bytes = w.bad_jobs + align(t.jobs);
  return w;
}

// What only the tile that is taken needs.
void finish_plan(GemmPlan& plan) {
  GemmTile& tile = plan.tile;
  tile.by_units = Divisor(tile.units);
  tile.by_row_blocks = Divisor(tile.row_blocks);
  tile.by_row_classes = Divisor(plan.problem.row_classes);
  tile.by_tiles_w = Divisor(tile.tiles_w);
  tile.by_image_rows = Divisor(tile.image_rows);
  tile.by_pitch = Divisor(tile.pitch);
  tile.by_runs = Divisor(tile.runs);
  place_steps(plan.problem, tile);
  plan.workspace = lay_out(plan.problem, tile);
}

// Estimates all tiles of the problem on such cells; `best` becomes the fastest.
void try_tiles(const ConvProblem& p, const CellChoice& cells, const Device& device,
               GemmPlan& best) {
  GemmProblem g{};
  GemmTile t{};
  if (!describe_cells(p, cells, g)) return;
  const bool bulk = can_copy_bulk(g);
  // A deeper stage has octets enough for blocks of two.
  const int most =
      cells.octets == 1 ? 1 : std::min(kMaxStageSums / g.block_sums, 2 * g.sum_blocks - 1);
  for (const int row_tile : {64, 128}) {
    if (row_tile == 128 && g.class_rows <= 64) continue;
    for (const GemmShape& shape : gemm_shapes(g.element_bytes))
      for (const int parts : row_parts(g, shape.columns))
        for (int depth = 1; depth <= most; depth *= 2)
          for (const bool straddles : {false, true}) {
            const TileChoice choice{row_tile, shape, parts, depth, straddles};
            if (!make_tile(g, choice, bulk, t)) continue;
            const int resident = resident_bytes(g, t, device.processors);
            for (const bool stay : {false, true}) {
              t.resident_bytes = stay ? resident : 0;
              if ((stay && resident == 0) || !choose_stages(t)) continue;
              const double seconds = estimate_gemm(g, t, device, p.bytes(), Compared::kTiles);
              if (seconds < best.seconds) best = {"", g, t, seconds, {}};
            }
          }
  }
}

}  // namespace

void store_lines(GemmTile& t) {
  t.boxed = false;
  t.staged_halves = 1;
  t.staged_bytes = t.line_bytes;
}

void copy_by_cells(const GemmProblem& g, GemmTile& t) {
  t.bulk = false;
  t.by_octets = !g.mixes_phases() && g.sums % kOctet == 0 && has_octets(g.element_bytes, g.source);
  t.raw_stages = kConverterGroups;  // each has its own
  t.run = t.source_kinds_log = 0;
  set_raw_channels(g, t, t.depth * g.block_sums);
  t.raw_pitch = t.pitch;
  t.octets_apart = t.direct = false;
  t.raw_cells = int(round_up(t.source_cells, g.vector()));
  t.raw_octet = t.raw_cells * kOctet;
  t.raw_box = t.raw_cells * t.raw_channels;
  t.raw_bytes = g.is_half() ? 0 : t.raw_box * g.element_bytes;  // read without a stop there
}

void copy_by_elements(GemmProblem& g, GemmTile& t) {
  if (t.bulk) copy_by_cells(g, t);
  t.by_octets = t.direct = false;
  lay_out_stages(g, t);
  place_steps(g, t);
}

GemmPlan plan_gemm(const ConvProblem& p, const Device& device) {
  GemmPlan best{};
  best.seconds = std::numeric_limits<double>::infinity();
  for (const Tensor4* t : {&p.input, &p.weight, &p.output})
    for (const int64_t size : t->size)
      if (size >= kMaxExtent) best.reason = "a side of 2^30 or more";
  for (const Pair side : {p.stride, p.dilation, p.padding})
    if (std::max(std::abs(side.h), std::abs(side.w)) >= 1 << 15)
      best.reason = "a stride, dilation or padding of 2^15 or more";
  if (p.groups > 65535) best.reason = "more than 65535 groups";
  const bool forward = p.direction == Direction::kForward;
  const int64_t rows = forward ? p.group_out_channels() : p.group_in_channels();
  const int64_t sums = forward ? p.group_in_channels() : p.group_out_channels();
  const int64_t products = sums * p.kernel().h * p.kernel().w;
  if (products < kStepOctets * kOctet)
    best.reason = "sums of fewer than 16 products: too few for an instruction and its error";
  if (products >= kMaxExtent) best.reason = "sums of 2^30 or more products";
  if (element_size(p.dtype) == 2 && products > kMostHalfProducts)
    best.reason = "sums of more than 2^14 products of 16 bits, which are not promoted";
  if (!best.reason.empty()) return best;

  best.reason = "no tile of its cells fits shared memory";
  for (const int block_h : kBlocks)
    for (const int block_w : kBlocks) {
      // Blocks are for filling instructions that channels leave empty.
      if (block_h * block_w > 1 && rows * block_h * block_w > kFewRows &&
          sums * block_h * block_w > kFewSums)
        continue;
      for (const bool snug : {false, true})
        for (const bool row_classes : {false, true})
          for (const bool sum_classes : {false, true})
            for (const bool join : {false, true})
              for (const int octets : {kStepOctets, 1})
                try_tiles(p, {block_h, block_w, octets, snug, row_classes, sum_classes, join},
                          device, best);
    }
  if (!best.reason.empty()) return best;
  best.seconds = estimate_gemm(best.problem, best.tile, device, p.bytes(), Compared::kAlgorithms);
  finish_plan(best);
  return best;
}

}  // namespace convops::cuda
