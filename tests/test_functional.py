"""The functions of Python: arguments in all the forms that torch takes, and overrides of a call."""

import pytest
import torch
import torch.nn.functional as F

import conv_ops

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same'"),  # torch about a copy of its own
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

X = torch.randn(2, 4, 8, 9, dtype=torch.float64)
W = torch.randn(6, 2, 3, 4, dtype=torch.float64)
OVERRIDES = [{}, {"precision": "ieee"}, {"algorithm": "direct"}]


@pytest.mark.parametrize("override", OVERRIDES, ids=str)
@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stride": 2, "padding": 1, "dilation": 2},
        {"stride": (1, 2), "padding": (2, 0), "dilation": (1, 2)},
        {"stride": [2], "padding": [1], "dilation": [1]},
        {"padding": "valid", "stride": 2},
        {"padding": "same"},
        {"padding": "same", "stride": [1], "dilation": [3]},
        {"padding": "same", "dilation": (2, 3)},
        {"bias": torch.arange(6, dtype=torch.float64)},
    ],
    ids=str,
)
def test_conv2d(arguments, unbatched, override):
    x = X[0] if unbatched else X
    actual = conv_ops.conv2d(x, W, groups=2, **arguments, **override)
    torch.testing.assert_close(actual, F.conv2d(x, W, groups=2, **arguments))


@pytest.mark.parametrize("override", OVERRIDES, ids=str)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": "full"}, r"Invalid padding string: 'full'"),
        ({"padding": "same", "stride": 2}, "padding='same' is not supported for strided"),
        ({"padding": "same", "stride": (1, 2)}, "padding='same' is not supported for strided"),
        ({"padding": (1, 2, 3)}, r"a list of 2 values .* but got padding=\[1, 2, 3\]"),
        ({"padding": (1, 1, 1, 1)}, r"a list of 2 values .* but got padding=\[1, 1, 1, 1\]"),
        ({"padding": ()}, r"a list of 2 values .* but got padding=\[\]"),
        ({"padding": -1}, "negative padding is not supported"),
        ({"stride": (1, 2, 3)}, r"a list of 2 values .* but got stride=\[1, 2, 3\]"),
        ({"stride": 0}, "non-positive stride is not supported"),
        ({"dilation": ()}, r"a list of 2 values .* but got dilation=\[\]"),
    ],
)
def test_conv2d_refuses_as_torch(arguments, message, override):
    with pytest.raises(RuntimeError, match=message):
        conv_ops.conv2d(X, W, groups=2, **arguments, **override)
    with pytest.raises(RuntimeError, match=message):
        F.conv2d(X, W, groups=2, **arguments)


@pytest.mark.parametrize("override", OVERRIDES, ids=str)
@pytest.mark.parametrize("sizes", [(8, 9), (1, 2, 4, 8, 9)])
def test_conv2d_refuses_other_dimensions(sizes, override):
    with pytest.raises(RuntimeError, match=r"Expected 3D .* or 4D .* input to conv2d, but got"):
        conv_ops.conv2d(torch.randn(sizes), torch.randn(6, 4, 3, 3), **override)


@pytest.mark.parametrize(
    ("override", "message"),
    [({"precision": "fp8"}, "fp8"), ({"algorithm": "magic"}, "magic")],
)
def test_unknown_override_is_refused(override, message):
    with pytest.raises(RuntimeError, match=message):
        conv_ops.conv2d(X, W, groups=2, **override)


@pytest.mark.parametrize("unbatched", [False, True])
def test_im2col_and_col2im(unbatched):
    x = X[0] if unbatched else X
    columns = F.unfold(x, (3, 2), 2, (1, 0), (1, 2))
    torch.testing.assert_close(conv_ops.im2col(x, (3, 2), 2, (1, 0), (1, 2)), columns)
    torch.testing.assert_close(
        conv_ops.col2im(columns, (8, 9), (3, 2), 2, (1, 0), (1, 2)),
        F.fold(columns, (8, 9), (3, 2), 2, (1, 0), (1, 2)),
    )
    square = F.unfold(x[..., :8], 3)
    torch.testing.assert_close(conv_ops.col2im(square, 8, 3), F.fold(square, 8, 3))


def test_torchscript_calls_the_ops():
    @torch.jit.script
    def program(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        same = conv_ops.conv2d(x, w, padding="same", groups=2)
        strided = conv_ops.conv2d(x, w, None, [1, 1], 1, dilation=1, groups=2)
        columns = conv_ops.im2col(x, [3, 4], 1, 0, 1)
        return same.sum() + strided.sum() + conv_ops.col2im(columns, [8, 9], [3, 4]).sum()

    columns = F.unfold(X, (3, 4))
    expected = F.conv2d(X, W, padding="same", groups=2).sum()
    expected += F.conv2d(X, W, padding=1, groups=2).sum()
    expected += F.fold(columns, (8, 9), (3, 4)).sum()
    torch.testing.assert_close(program(X, W), expected)


@pytest.mark.parametrize("override", OVERRIDES, ids=str)
@pytest.mark.parametrize("padding", [1, (0, 2), "same"], ids=str)
def test_compile_without_graph_break(padding, override):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def program(x, w):
        return conv_ops.conv2d(x, w, padding=padding, groups=2, **override)

    torch._dynamo.reset()
    torch.testing.assert_close(program(X, W), F.conv2d(X, W, padding=padding, groups=2))
