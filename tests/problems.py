"""The one list of convolution problems that every test and benchmark draws from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

Pair = tuple[int, int]


@dataclass(frozen=True)
class Problem:
    """Arguments of a convolution of an (n, c, h, w) input with o filters.

    `padding` is (top and bottom, left and right) or "same".
    """

    name: str
    n: int
    c: int
    h: int
    w: int
    o: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair | str = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = False

    @property
    def input_size(self) -> tuple[int, int, int, int]:
        return (self.n, self.c, self.h, self.w)

    @property
    def weight_size(self) -> tuple[int, int, int, int]:
        return (self.o, self.c // self.groups, *self.kernel)

    @property
    def output_size(self) -> tuple[int, int, int, int]:
        top, bottom, left, right = self.padding_sides
        height, width = (
            (size + padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, padding, kernel, stride, dilation in zip(
                (self.h, self.w),
                (top + bottom, left + right),
                self.kernel,
                self.stride,
                self.dilation,
                strict=True,
            )
        )
        return (self.n, self.o, height, width)

    @property
    def padding_sides(self) -> tuple[int, int, int, int]:
        """Padding at the top, bottom, left and right, as the core ops take it."""
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
            (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in totals)
            return (top, bottom, left, right)
        vertical, horizontal = self.padding
        return (vertical, vertical, horizontal, horizontal)

    @property
    def taps(self) -> int:
        """Products summed for one output element."""
        return math.prod(self.weight_size[1:])

    def scaled(self, max_elements: int) -> Problem:
        """The same problem with fewer images and pixels, so that no tensor has more elements.

        Channels, kernel and window stay: they decide which code runs.
        """
        problem = self
        while (
            max(math.prod(size) for size in (problem.input_size, problem.output_size))
            > max_elements
        ):
            least_h, least_w = (
                max(1, dilation * (kernel - 1) + 1)
                for dilation, kernel in zip(self.dilation, self.kernel, strict=True)
            )
            if problem.n > 1:
                smaller = dataclasses.replace(problem, n=problem.n // 2)
            else:
                smaller = dataclasses.replace(
                    problem, h=max(least_h, problem.h * 2 // 3), w=max(least_w, problem.w * 2 // 3)
                )
            if smaller == problem:
                break
            problem = smaller
        return problem


SEEDS = [
    Problem("kb55", 8, 64, 512, 1024, 128, (3, 3)),
    Problem("kb63", 16, 16, 1024, 1024, 128, (3, 3)),
    Problem("kb62", 8, 32, 512, 512, 64, (5, 9)),
    Problem("kb56", 8, 64, 512, 256, 128, (5, 7)),
]

# KernelBench level 1, the conv2d family.
KERNELBENCH = [
    Problem("kb50", 256, 3, 224, 224, 96, (11, 11), (4, 4), (2, 2), bias=True),
    *SEEDS,
    Problem("kb80", 8, 32, 512, 512, 64, (5, 9), padding=(2, 4), dilation=(2, 3)),
    Problem("kb82", 16, 64, 512, 512, 64, (3, 3), groups=64),
    Problem("kb83", 64, 8, 512, 512, 8, (3, 1), groups=8),
    Problem("kb84", 64, 128, 256, 512, 128, (3, 3), groups=128),
    Problem("kb85", 32, 128, 128, 256, 128, (3, 7), groups=128),
    Problem("kb86_depthwise", 16, 64, 512, 512, 64, (3, 3), padding=(1, 1), groups=64),
    Problem("kb86_pointwise", 16, 64, 512, 512, 128, (1, 1)),
    Problem("kb87", 16, 64, 1024, 1024, 128, (1, 1)),
]


def _resnet50(batch: int = 64) -> list[Problem]:
    """Every distinct convolution of ResNet-50 (He et al. 2015), strides as in torchvision."""
    problems = [Problem("r50_stem", batch, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3))]
    inputs, size = 64, 56
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        outputs, stride = 4 * width, 1 if stage == 1 else 2
        out_size = size // stride
        name = f"r50_{stage}"
        problems += [
            Problem(f"{name}_in", batch, inputs, size, size, width, (1, 1)),
            Problem(f"{name}_in_next", batch, outputs, out_size, out_size, width, (1, 1)),
            Problem(f"{name}_3x3", batch, width, out_size, out_size, width, (3, 3), padding=(1, 1)),
            Problem(f"{name}_out", batch, width, out_size, out_size, outputs, (1, 1)),
            Problem(
                f"{name}_shortcut", batch, inputs, size, size, outputs, (1, 1), (stride, stride)
            ),
        ]
        if stride == 2:
            problems.append(
                Problem(f"{name}_3x3_s2", batch, width, size, size, width, (3, 3), (2, 2), (1, 1))
            )
        inputs, size = outputs, out_size
    return problems


RESNET50 = _resnet50()

DEPTHWISE = [
    Problem("convnext_7x7", 64, 96, 56, 56, 96, (7, 7), padding=(3, 3), groups=96),
    Problem("convnext_7x7_14", 64, 384, 14, 14, 384, (7, 7), padding=(3, 3), groups=384),
    Problem("convnext_7x7_14_batch1", 1, 384, 14, 14, 384, (7, 7), padding=(3, 3), groups=384),
    Problem("efficientnet_3x3", 64, 192, 56, 56, 192, (3, 3), padding=(1, 1), groups=192),
    Problem("efficientnet_5x5_s2", 64, 240, 28, 28, 240, (5, 5), (2, 2), (2, 2), groups=240),
    Problem("replknet_31x31", 16, 128, 56, 56, 128, (31, 31), padding=(15, 15), groups=128),
]

GROUPED = [
    Problem("resnext_8_a_group", 32, 256, 56, 56, 256, (3, 3), padding=(1, 1), groups=32),
    Problem("regnet_16_a_group", 32, 224, 28, 28, 224, (3, 3), padding=(1, 1), groups=14),
    Problem("resnext_8_a_group_s2", 64, 256, 56, 56, 256, (3, 3), (2, 2), (1, 1), groups=32),
    Problem("resnext_16_a_group_14", 64, 512, 14, 14, 512, (3, 3), padding=(1, 1), groups=32),
    Problem("resnext_32_a_group_7", 64, 1024, 7, 7, 1024, (3, 3), padding=(1, 1), groups=32),
    Problem("regnet_16_a_group_7_batch1", 1, 784, 7, 7, 784, (3, 3), padding=(1, 1), groups=49),
]

DILATED = [Problem("deeplab_d4", 8, 256, 65, 65, 256, (3, 3), padding=(4, 4), dilation=(4, 4))]

# Every distinct depthwise or grouped layer at 224x224, padded by half the kernel: channels, size of
# the image, kernel, stride. ConvNeXt-T (Liu et al. 2022), EfficientNet-B0 as in timm, the others as
# in torchvision.
_NETWORKS: dict[str, list[tuple[int, int, int, int]]] = {
    "convnext_t": [(96, 56, 7, 1), (192, 28, 7, 1), (384, 14, 7, 1), (768, 7, 7, 1)],
    "efficientnet_b0": [
        *((32, 112, 3, 1), (96, 112, 3, 2), (144, 56, 3, 1), (144, 56, 5, 2), (240, 28, 5, 1)),
        *((240, 28, 3, 2), (480, 14, 3, 1), (480, 14, 5, 1), (672, 14, 5, 1), (672, 14, 5, 2)),
        *((1152, 7, 5, 1), (1152, 7, 3, 1)),
    ],
    "mobilenet_v3_l": [
        *((16, 112, 3, 1), (64, 112, 3, 2), (72, 56, 3, 1), (72, 56, 5, 2), (120, 28, 5, 1)),
        *((240, 28, 3, 2), (200, 14, 3, 1), (184, 14, 3, 1), (480, 14, 3, 1), (672, 14, 3, 1)),
        *((672, 14, 5, 2), (960, 7, 5, 1)),
    ],
    "resnext50": [
        *((128, 56, 3, 1), (256, 56, 3, 2), (256, 28, 3, 1), (512, 28, 3, 2), (512, 14, 3, 1)),
        *((1024, 14, 3, 2), (1024, 7, 3, 1)),
    ],
    "regnet_y_800mf": [
        *((64, 112, 3, 2), (64, 56, 3, 1), (144, 56, 3, 2), (144, 28, 3, 1), (320, 28, 3, 2)),
        *((320, 14, 3, 1), (784, 14, 3, 2), (784, 7, 3, 1)),
    ],
}


def _layers(network: str, groups: Callable[[int], int]) -> list[Problem]:
    """The layers of a network, for one image and for 64; `groups` of so many channels."""
    return [
        Problem(
            f"{network}_{c}x{size}_{kernel}x{kernel}_s{stride}_b{batch}",
            *(batch, c, size, size, c, (kernel, kernel), (stride, stride)),
            padding=(kernel // 2, kernel // 2),
            groups=groups(c),
        )
        for batch in (1, 64)
        for c, size, kernel, stride in _NETWORKS[network]
    ]


DEPTHWISE_LAYERS = [
    problem
    for network in ("convnext_t", "efficientnet_b0", "mobilenet_v3_l")
    for problem in _layers(network, lambda channels: channels)
]
GROUPED_LAYERS = [
    *_layers("resnext50", lambda channels: 32),
    *_layers("regnet_y_800mf", lambda channels: channels // 16),
]

# What breaks kernels: everything odd, one-sided or degenerate, small enough for every test.
ODD = [
    Problem("one_pixel", 1, 1, 1, 1, 1, (1, 1)),
    Problem("one_channel", 2, 1, 9, 7, 1, (3, 3), bias=True),
    Problem("odd_sizes", 3, 5, 13, 11, 7, (3, 5), (1, 1), (1, 2), bias=True),
    Problem("asymmetric_window", 2, 3, 17, 23, 4, (2, 4), (3, 2), (1, 3), (2, 1), bias=True),
    Problem("same_even_kernel", 2, 3, 10, 9, 4, (4, 2), padding="same", dilation=(1, 3)),
    Problem("same_odd_kernel", 2, 4, 8, 8, 4, (3, 5), padding="same", groups=2, bias=True),
    Problem("stride_past_kernel", 2, 3, 20, 19, 5, (2, 2), (5, 4), bias=True),
    Problem("stride_past_chunk", 2, 8, 9, 150, 20, (3, 3), (2, 70), (1, 1)),
    Problem("padding_past_kernel", 1, 2, 5, 6, 3, (2, 2), padding=(4, 5), bias=True),
    Problem("wide_dilation", 1, 3, 25, 25, 4, (3, 3), padding=(9, 10), dilation=(10, 11)),
    Problem("far_taps", 1, 24, 40, 48, 40, (3, 3), padding=(12, 12), dilation=(12, 12)),
    Problem("kernel_is_input", 2, 3, 6, 7, 5, (6, 7), bias=True),
    Problem("row", 2, 4, 1, 40, 6, (1, 5), padding=(0, 2), bias=True),
    Problem("column", 2, 4, 40, 1, 6, (5, 1), padding=(2, 0)),
    Problem("pointwise", 2, 16, 12, 10, 24, (1, 1), bias=True),
    Problem("pointwise_strided", 2, 16, 13, 11, 24, (1, 1), (2, 2)),
    Problem("pointwise_grouped", 3, 12, 9, 9, 8, (1, 1), groups=4, bias=True),
    Problem("grouped", 2, 12, 11, 10, 18, (3, 3), padding=(1, 1), groups=3, bias=True),
    Problem("grouped_many", 2, 32, 9, 9, 32, (3, 3), padding=(1, 1), groups=8),
    Problem("depthwise", 2, 8, 15, 14, 8, (3, 3), padding=(1, 1), groups=8, bias=True),
    Problem("depthwise_multiplier", 2, 6, 12, 13, 18, (5, 3), (2, 1), (2, 1), groups=6, bias=True),
    Problem("depthwise_large", 1, 4, 33, 30, 4, (31, 29), padding=(15, 14), groups=4),
    Problem("many_channels", 1, 130, 6, 5, 70, (3, 3), padding=(1, 1), bias=True),
    Problem("many_images", 33, 3, 7, 7, 8, (3, 3), padding=(1, 1)),
    Problem("no_images", 0, 3, 8, 8, 4, (3, 3), bias=True),
    Problem("no_channels", 2, 0, 6, 6, 4, (3, 3), bias=True),
]

# Rows of the result, and channels, begin at several places in a sector of memory, and a row is more
# than a tile.
WIDE = [
    Problem("rows_of_66", 2, 16, 20, 68, 32, (3, 3), bias=True),
    Problem("rows_of_68_woven", 2, 16, 17, 68, 24, (3, 3), padding=(1, 1)),
    Problem("rows_of_68", 2, 8, 16, 70, 16, (1, 3)),
    Problem("rows_of_70", 1, 8, 8, 70, 16, (3, 3), padding=(1, 1), bias=True),
    Problem("rows_of_76", 1, 8, 8, 78, 16, (3, 3)),
    Problem("rows_of_331", 1, 8, 16, 331, 17, (3, 3), padding=(1, 1), bias=True),
    Problem("rows_of_332_grouped", 2, 32, 10, 334, 32, (3, 3), groups=2),
    Problem("rows_of_330_strided", 1, 6, 17, 661, 10, (3, 3), (2, 2), (1, 1)),
    # Sources whose rows begin at two and four places between multiples of 16 bytes.
    Problem("rows_from_2_places", 2, 20, 18, 86, 20, (3, 3), padding=(1, 2), bias=True),
    Problem("rows_from_4_places", 2, 20, 20, 87, 70, (5, 3), padding=(2, 1)),
    # And of patches that are read at once.
    Problem("patches_of_4x4", 2, 3, 44, 100, 24, (11, 11), (4, 4), (2, 2), bias=True),
    Problem("patches_of_2x2", 2, 24, 18, 54, 40, (3, 3), (2, 2), (1, 1)),
    Problem("patches_of_2x1", 2, 24, 18, 54, 40, (3, 2), (2, 1), (1, 1)),
    # Cells that begin before the tensor, on either side.
    Problem("snug_cells", 2, 16, 20, 48, 40, (4, 4), (2, 2), (1, 1), bias=True),
    Problem("snug_rows_of_334", 2, 8, 18, 334, 24, (4, 4), (2, 2), (1, 1)),
    Problem("snug_from_2_places", 2, 24, 18, 54, 40, (4, 3), (2, 2), (1, 1)),
    Problem("snug_from_4_places", 2, 8, 20, 87, 24, (7, 3), (4, 1), (1, 1), bias=True),
    # Rows that share a stage of backward-weight's, channels that begin in several places.
    Problem("rows_of_13", 4, 19, 30, 13, 68, (3, 3), padding=(1, 1)),
    Problem("rows_of_27", 2, 24, 21, 27, 132, (5, 5), padding=(2, 2)),
    Problem("pointwise_rows_joined", 2, 70, 24, 22, 132, (1, 1)),
    Problem("pointwise_patches", 2, 3, 24, 40, 72, (4, 4), (4, 4)),
]

# A few channels in each of several groups: fewer than a tile of 8, several groups to a tile, more
# than a block's tiles; rows that are copied in vectors of 1, 2 and 4 numbers, and whole bands of
# them beside the tensor.
FEW_A_GROUP = [
    Problem("groups_of_3", 3, 15, 9, 13, 15, (3, 3), padding=(1, 1), groups=5),
    Problem("groups_of_2_strided", 3, 18, 7, 12, 18, (3, 3), (2, 2), (1, 1), groups=9),
    Problem("groups_of_8_rows_of_56", 2, 16, 10, 56, 16, (3, 3), padding=(1, 1), groups=2),
    Problem("groups_of_16_rows_of_14", 3, 32, 14, 14, 32, (3, 3), padding=(1, 1), groups=2),
    Problem("groups_of_12_to_20", 2, 24, 15, 28, 40, (3, 3), (2, 2), (1, 1), groups=2),
    Problem("groups_of_40_to_24", 2, 80, 9, 18, 48, (3, 3), padding=(1, 1), groups=2),
    Problem("groups_in_strips", 1, 8, 6, 130, 8, (3, 3), padding=(0, 1), groups=2),
    Problem("groups_of_8_pointwise", 3, 24, 9, 16, 24, (1, 1), groups=3),
    Problem("three_to_two_a_group", 2, 9, 6, 17, 6, (3, 3), groups=3, bias=True),
    Problem("64_a_group", 1, 128, 7, 7, 128, (3, 3), padding=(1, 1), groups=2),
    Problem("32_to_64_a_group", 1, 64, 7, 9, 128, (3, 3), padding=(2, 0), groups=2, bias=True),
    Problem("12_to_20_a_group_pointwise", 2, 24, 9, 20, 40, (1, 1), groups=2, bias=True),
    Problem("grouped_strided_unpadded", 2, 12, 12, 13, 18, (3, 3), (2, 2), groups=3, bias=True),
    Problem("grouped_strided_both", 1, 16, 9, 12, 16, (3, 3), (2, 2), (3, 5), groups=2, bias=True),
    Problem("grouped_padding_past_kernel", 1, 16, 5, 6, 16, (3, 3), padding=(4, 3), groups=2),
    Problem("grouped_column", 2, 8, 70, 1, 8, (3, 3), padding=(1, 1), groups=2, bias=True),
]

# Depthwise kernels as large as their planes: each width of a thread's or a warp's results, planes
# that share a block, tiles of the result and of the gradient, padding on all sides and none.
LARGE_KERNELS = [
    Problem("large_13x13", 9, 3, 14, 14, 3, (13, 13), padding=(6, 6), groups=3, bias=True),
    Problem("large_31x31", 2, 2, 56, 57, 2, (31, 31), padding=(15, 15), groups=2, bias=True),
    Problem("large_unpadded", 3, 2, 37, 30, 2, (21, 19), groups=2),
    Problem("large_padding", 2, 3, 9, 8, 3, (9, 8), padding=(12, 11), groups=3, bias=True),
    Problem("large_tiles", 1, 2, 150, 130, 2, (15, 17), padding=(7, 8), groups=2),
    Problem("large_5x51", 2, 2, 20, 70, 2, (5, 51), padding=(2, 25), groups=2),
    Problem("large_51x5", 2, 2, 60, 20, 2, (51, 5), padding=(25, 2), groups=2, bias=True),
    Problem("large_even", 5, 3, 28, 28, 3, (14, 8), padding=(6, 3), groups=3),
    Problem("large_row", 2, 3, 3, 80, 3, (1, 57), padding=(0, 28), groups=3),
]

# Depthwise convolutions that channels_last tensors of are tested, too: channels past and short of a
# warp's, and not a multiple of 16 or 4 bytes; tiles past the last column and row, strips; padding
# that is odd, none, and past the kernel; more products than small patches are for.
CHANNELS_LAST = [
    Problem("channels_of_8", 2, 8, 15, 14, 8, (3, 3), padding=(1, 1), groups=8, bias=True),
    Problem("channels_of_33", 3, 33, 9, 7, 33, (5, 5), padding=(2, 2), groups=33, bias=True),
    Problem("channels_of_36", 1, 36, 21, 60, 36, (7, 7), padding=(3, 3), groups=36),
    Problem("channels_of_66", 2, 66, 13, 29, 66, (3, 3), padding=(4, 5), groups=66, bias=True),
    Problem("channels_of_1", 2, 1, 30, 33, 1, (5, 5), padding=(2, 2), groups=1, bias=True),
    Problem("channels_3x3_s2", 2, 40, 31, 57, 40, (3, 3), (2, 2), (1, 1), groups=40, bias=True),
    Problem("channels_5x5_s2", 2, 35, 20, 37, 35, (5, 5), (2, 2), (2, 2), groups=35),
    Problem("channels_7x7_s2", 1, 72, 150, 21, 72, (7, 7), (2, 2), (3, 3), groups=72),
    Problem("channels_unpadded_s2", 2, 64, 7, 131, 64, (7, 7), (2, 2), groups=64, bias=True),
    Problem("channels_3x3_many", 9, 96, 31, 33, 96, (3, 3), padding=(1, 1), groups=96, bias=True),
    Problem("channels_3x3_s2_many", 9, 96, 61, 65, 96, (3, 3), (2, 2), (1, 1), groups=96),
    Problem("channels_7x7_strips", 1, 96, 56, 56, 96, (7, 7), padding=(3, 3), groups=96),
]

# The same of dense convolutions: cells of 16, 32 and 64 channels and what is past them, rows of the
# weight in whole and partial boxes, groups that boxes of 64, 32 and 16 channels divide and that
# they do not, classes of a stride, tiles of several rows and images.
DENSE_CHANNELS_LAST = [
    Problem("cells_3x3", 3, 24, 11, 23, 40, (3, 3), padding=(1, 1), bias=True),
    Problem("cells_3x3_s2", 2, 64, 17, 33, 130, (3, 3), (2, 2), (1, 1), bias=True),
    Problem("cells_of_64", 1, 128, 7, 30, 136, (3, 3), padding=(0, 2)),
    Problem("cells_1x1", 5, 48, 7, 7, 96, (1, 1), bias=True),
    Problem("cells_1x1_s2", 2, 32, 19, 23, 200, (1, 1), (2, 2)),
    Problem("cells_dilated", 2, 80, 15, 17, 64, (3, 3), padding=(2, 3), dilation=(2, 3)),
    Problem("cells_3_groups", 1, 192, 11, 50, 96, (5, 1), padding=(2, 0), groups=3, bias=True),
    Problem("cells_4_groups", 2, 64, 14, 15, 64, (3, 3), padding=(1, 1), groups=4),
    Problem("cells_2_groups", 1, 48, 10, 11, 256, (3, 3), padding=(1, 1), groups=2),
    # Tiles of pixels across rows and images, channels in several; weights that stay.
    Problem("pixels_of_7x7", 9, 72, 7, 7, 264, (3, 3), padding=(1, 1), bias=True),
    Problem("pixels_of_64_channels", 5, 64, 29, 31, 64, (3, 3), padding=(1, 1), bias=True),
    Problem("phases_of_3x2", 2, 40, 29, 31, 136, (5, 3), (3, 2), (2, 1)),
    Problem("windows_beyond", 2, 24, 9, 8, 64, (3, 4), padding=(4, 6), dilation=(2, 1)),
]

# The ways of the depthwise kernels: windows copied by one, two and four words, results stored by
# fours, pairs and through shared memory (of several planes, of whole rows, of parts of rows).
DEPTHWISE_TILES = [
    Problem("planes_of_14", 3, 40, 14, 14, 40, (7, 7), padding=(3, 3), groups=40, bias=True),
    Problem("planes_of_7", 5, 70, 7, 7, 70, (5, 5), padding=(2, 2), groups=70),
    Problem("aligned_5x5", 2, 6, 28, 28, 6, (5, 5), padding=(2, 2), groups=6),
    Problem("rows_of_510", 1, 3, 17, 512, 3, (3, 3), groups=3, bias=True),
    Problem("rows_of_1029", 1, 2, 19, 1029, 2, (3, 3), padding=(1, 1), groups=2),
    Problem("rows_of_250", 1, 4, 30, 256, 4, (3, 7), groups=4),
    Problem("tall_7x3", 2, 4, 41, 39, 4, (7, 3), padding=(3, 1), groups=4),
    Problem("depthwise_3x1", 2, 4, 32, 40, 4, (3, 1), groups=4),
    Problem("depthwise_1x3", 2, 4, 13, 35, 4, (1, 3), padding=(0, 1), groups=4, bias=True),
    Problem("depthwise_3x3_s2", 2, 5, 56, 56, 5, (3, 3), (2, 2), (1, 1), groups=5),
    Problem("depthwise_5x5_s2", 20, 40, 14, 14, 40, (5, 5), (2, 2), (2, 2), groups=40),
    Problem("depthwise_7x7_s2", 2, 3, 30, 33, 3, (7, 7), (2, 2), (3, 3), groups=3),
    Problem("wide_s2", 1, 2, 31, 1301, 2, (3, 3), (2, 2), (1, 1), groups=2),
    Problem("padded_past_s2", 2, 3, 20, 21, 3, (5, 5), (2, 2), (3, 4), groups=3),
    Problem("padded_by_3_and_1_s2", 2, 3, 20, 24, 3, (3, 3), (2, 2), (3, 1), groups=3),
    Problem("padded_by_1_and_2_s2", 2, 3, 21, 24, 3, (3, 3), (2, 2), (1, 2), groups=3),
    Problem(
        "depthwise_dilated", 2, 6, 40, 37, 6, (3, 3), padding=(4, 4), dilation=(4, 4), groups=6
    ),
    Problem("dilated_s2", 2, 3, 30, 31, 3, (3, 3), (2, 2), (2, 2), (3, 2), groups=3),
    Problem("phases_of_no_tap", 1, 4, 40, 37, 4, (5, 5), (6, 6), (4, 4), (4, 4), groups=4),
    Problem("multiplier_3x3", 2, 6, 20, 18, 12, (3, 3), padding=(1, 1), groups=6, bias=True),
    # Backward-weight: tiles, steps of several images, chunks of them, kernels of run-time size.
    Problem("depthwise_dilated_2x3", 2, 6, 20, 17, 6, (3, 3), (1, 1), (2, 4), (2, 3), groups=6),
    Problem("depthwise_tiles", 2, 2, 61, 141, 2, (3, 3), groups=2),
    Problem("depthwise_many_images", 45, 3, 14, 13, 3, (7, 7), padding=(3, 3), groups=3),
    Problem("depthwise_4x7", 5, 3, 19, 16, 6, (4, 7), (3, 2), (1, 3), groups=3),
    Problem("depthwise_6x8", 2, 3, 9, 40, 3, (6, 8), padding=(2, 3), groups=3),
    # Backward-weight by rows: several ranges of lines a warp, one, parts of rows; columns by fours,
    # pairs and one.
    Problem("rows_of_28", 9, 5, 28, 28, 5, (3, 3), padding=(1, 1), groups=5),
    Problem("rows_of_28_s2", 9, 5, 30, 28, 5, (5, 5), (2, 2), (2, 2), groups=5),
    Problem("rows_of_200", 2, 3, 19, 200, 6, (5, 5), padding=(4, 2), groups=3),
    Problem("rows_of_264_s2", 2, 3, 25, 264, 3, (3, 3), (2, 2), (1, 1), groups=3),
    Problem("rows_of_14", 17, 3, 14, 14, 3, (5, 5), padding=(2, 2), groups=3),
    Problem("rows_of_14_s2", 17, 3, 14, 14, 3, (3, 3), (2, 2), (1, 1), groups=3),
    Problem("rows_of_28_7x7", 3, 5, 28, 28, 5, (7, 7), padding=(3, 3), groups=5),
    Problem("rows_of_56_7x7_s2", 2, 3, 57, 56, 6, (7, 7), (2, 2), (3, 3), groups=3),
    # Whole planes in shared memory: one and several a block, rows copied by four, two and one.
    Problem("planes_of_13", 3, 5, 13, 13, 5, (3, 3), padding=(1, 1), groups=5, bias=True),
    Problem("planes_of_10_7x7", 2, 4, 10, 22, 4, (7, 7), padding=(3, 3), groups=4),
    Problem("planes_of_12_5x5", 2, 3, 12, 8, 3, (5, 5), padding=(2, 2), groups=3, bias=True),
    Problem("planes_of_27_s2", 2, 3, 27, 20, 3, (5, 5), (2, 2), (2, 2), groups=3),
    Problem("planes_of_14_s2", 2, 4, 14, 13, 4, (7, 7), (2, 2), (3, 3), groups=4, bias=True),
    Problem("many_planes_of_4", 20, 60, 4, 5, 60, (3, 3), padding=(1, 1), groups=60),
    Problem("many_planes_of_6_s2", 20, 60, 6, 6, 60, (3, 3), (2, 2), (1, 1), groups=60),
]

# Tensors of more than 2^31 elements (GPU with more than 40 GB only).
HUGE = [
    Problem("huge_output", 2, 1, 32768, 16384, 3, (1, 3)),
    Problem("huge_batch", 70000, 1, 176, 176, 1, (3, 3)),
]

# Real layers made small enough for a CPU in a test.
SCALED = [
    problem.scaled(20_000)
    for problem in [*KERNELBENCH, RESNET50[0], *DEPTHWISE[:-1], *GROUPED, *DILATED]
]
SMALL = ODD + WIDE + DEPTHWISE_TILES + LARGE_KERNELS + FEW_A_GROUP + SCALED

PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in [
        *(*KERNELBENCH, *RESNET50, *DEPTHWISE, *GROUPED, *DEPTHWISE_LAYERS, *GROUPED_LAYERS),
        *(
            *DILATED,
            *ODD,
            *WIDE,
            *DEPTHWISE_TILES,
            *LARGE_KERNELS,
            *CHANNELS_LAST,
            *DENSE_CHANNELS_LAST,
            *FEW_A_GROUP,
            *HUGE,
        ),
    ]
}
