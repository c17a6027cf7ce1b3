"""conv_ops.Conv2d and LazyConv2d stand in for those of torch.nn."""

import copy
import io
import pickle

import pytest
import torch
import torch.fx
from torch import nn

import conv_ops

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same'"),  # torch about a copy of its own
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

PADDINGS = [
    {},
    {"padding": 1},
    {"padding": (2, 1)},
    {"padding": "valid"},
    {"padding": "same"},
    {"padding": "same", "dilation": (1, 3)},
    {"padding": (2, 1), "padding_mode": "reflect"},
    {"padding": "same", "padding_mode": "replicate"},
    {"padding": "same", "padding_mode": "circular"},
    {"padding": 2, "stride": 2, "dilation": 2, "groups": 2},
]
OVERRIDES = [{}, {"precision": "ieee"}, {"algorithm": "direct"}]


@pytest.fixture(autouse=True)
def ieee():
    """The arithmetic of float32 on CUDA in which torch and conv_ops can be compared."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def pair(device="cpu", override=None, **arguments):
    """The two modules made of the same seed; kernel sides differ and one is even."""
    torch.manual_seed(7)
    ours = conv_ops.Conv2d(4, 6, (3, 2), device=device, **arguments, **(override or {}))
    torch.manual_seed(7)
    theirs = nn.Conv2d(4, 6, (3, 2), device=device, **arguments)
    return ours, theirs


@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("override", OVERRIDES, ids=str)
@pytest.mark.parametrize("arguments", PADDINGS, ids=str)
def test_forward_and_backward_equal_torch(device, arguments, override, unbatched):
    ours, theirs = pair(device, override, **arguments)
    x = torch.randn(4, 9, 8, device=device)
    x = x if unbatched else torch.stack([x, -x])
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual, expected = ours(ours_x), theirs(theirs_x)
    torch.testing.assert_close(actual, expected)
    assert actual.stride() == expected.stride()

    upstream = torch.randn_like(expected)
    actual.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours_x.grad, theirs_x.grad)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"groups": 2}, {"dtype": torch.half}])
def test_same_seed_same_parameters(device, arguments):
    ours, theirs = pair(device, **arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=0, atol=0)
        assert ours.get_parameter(name).dtype == parameter.dtype


def test_state_dict_goes_both_ways():
    ours, theirs = conv_ops.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    other = nn.Conv2d(4, 6, 3)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other.bias, theirs.bias)


@pytest.mark.parametrize("arguments", [*PADDINGS, {"bias": False}], ids=str)
def test_repr_equals_torch(arguments):
    ours, theirs = pair(**arguments)
    assert repr(ours) == repr(theirs)


def test_repr_shows_overrides():
    assert repr(conv_ops.Conv2d(1, 2, 3, precision="tf32", algorithm="direct")) == (
        "Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1), precision=tf32, algorithm=direct)"
    )


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_copies_keep_all(duplicate):
    module = conv_ops.Conv2d(4, 6, 3, padding="same", precision="ieee", algorithm="direct").eval()
    module.weight.requires_grad_(False)
    result = duplicate(module)
    assert type(result) is conv_ops.Conv2d
    assert repr(result) == repr(module)
    assert not result.training and not result.weight.requires_grad
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(result(x), module(x))


def test_saved_module_loads(tmp_path):
    module = conv_ops.Conv2d(4, 6, 3, algorithm="direct")
    torch.save(module, tmp_path / "module.pt")
    result = torch.load(tmp_path / "module.pt", weights_only=False)
    assert type(result) is conv_ops.Conv2d and result.algorithm == "direct"
    assert torch.equal(result.weight, module.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 0}, "groups must be a positive integer"),
        ({"groups": 3}, "in_channels must be divisible by groups"),
        ({"padding": "full"}, "Invalid padding string 'full'"),
        ({"padding": "same", "stride": 2}, "padding='same' is not supported for strided"),
        ({"padding_mode": "mirror"}, "padding_mode='mirror'"),
        ({"precision": "fp8"}, "precision must be 'ieee', 'tf32' or None, but got 'fp8'"),
        ({"algorithm": "magic"}, "but got 'magic'"),
    ],
)
def test_constructor_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        conv_ops.Conv2d(4, 6, 3, **arguments)
    with pytest.raises(ValueError, match=message):
        conv_ops.LazyConv2d(6, 3, **arguments)(torch.randn(1, 4, 5, 5))


@pytest.mark.parametrize("arguments", [{"padding": 1}, {"bias": False, "groups": 2}])
def test_lazy_becomes_conv2d(device, arguments):
    x = torch.randn(2, 4, 6, 5, device=device)
    torch.manual_seed(3)
    ours = conv_ops.LazyConv2d(6, 3, device=device, precision="ieee", **arguments)
    assert isinstance(ours, conv_ops.Conv2d)
    actual = ours(x)
    torch.manual_seed(3)
    theirs = nn.LazyConv2d(6, 3, device=device, **arguments)
    expected = theirs(x)
    assert type(ours) is conv_ops.Conv2d
    assert repr(ours) == f"{repr(theirs)[:-1]}, precision=ieee)"
    torch.testing.assert_close(actual, expected)


def test_lazy_loads_a_state_dict():
    lazy = conv_ops.LazyConv2d(6, 3)
    source = nn.Conv2d(4, 6, 3)
    lazy.load_state_dict(source.state_dict())
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(lazy(x), source(x))
    assert type(lazy) is conv_ops.Conv2d


@pytest.mark.parametrize("override", OVERRIDES, ids=str)
@pytest.mark.parametrize("arguments", PADDINGS, ids=str)
def test_torchscript(device, arguments, override):
    ours, theirs = pair(device, override, **arguments)
    x = torch.randn(2, 4, 9, 8, device=device, requires_grad=True)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(ours), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    assert "convops::conv2d" in str(loaded.inlined_graph)
    for each in (x, x[0]):
        torch.testing.assert_close(loaded(each), theirs(each))
    actual, expected = (torch.autograd.grad(each(x).sum(), x) for each in (loaded, theirs))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("override", OVERRIDES, ids=str)
def test_trace_and_fx(override):
    ours, theirs = pair("cpu", override, padding="same")
    x = torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(torch.jit.trace(ours, x)(x), theirs(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(x), theirs(x))


@pytest.mark.parametrize("override", OVERRIDES, ids=str)
@pytest.mark.parametrize(
    "arguments", [{}, {"padding": "same"}, {"padding": 2, "padding_mode": "circular"}], ids=str
)
def test_compile_without_graph_break(device, arguments, override):
    ours, theirs = pair(device, override, **arguments)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 9, 8, device=device, requires_grad=True)
    torch.testing.assert_close(compiled(x), theirs(x))
    actual, expected = (torch.autograd.grad(each(x).sum(), x) for each in (compiled, theirs))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("override", [{"precision": "ieee"}, {"algorithm": "direct"}], ids=str)
def test_override_is_in_the_exported_program(override):
    module = conv_ops.Conv2d(4, 6, 3, **override)
    program = torch.export.export(module, (torch.randn(1, 4, 5, 5),))
    (value,) = override.values()
    calls = [node for node in program.graph.nodes if "conv2d_forward" in str(node.target)]
    assert len(calls) == 1 and value in calls[0].args + tuple(calls[0].kwargs.values())


def test_override_reaches_the_plan():
    x = torch.randn(1, 4, 5, 5)
    module = conv_ops.Conv2d(4, 6, 3)
    module.algorithm = "no such algorithm"  # the constructor would have refused it
    with pytest.raises(RuntimeError, match="no such algorithm"):
        module(x)
    module.algorithm = None
    module.precision = "no such precision"
    with pytest.raises(RuntimeError, match="no such precision"):
        module(x)


def test_padding_may_be_changed_later():
    for override in OVERRIDES:
        ours, theirs = pair("cpu", override, padding=2)
        ours.padding = theirs.padding = (0, 1)
        x = torch.randn(1, 4, 6, 6)
        torch.testing.assert_close(ours(x), theirs(x))


def test_autocast_and_channels_last(device):
    ours, theirs = pair(device, padding=1)
    x = torch.randn(2, 4, 9, 8, device=device).to(memory_format=torch.channels_last)
    assert ours(x).is_contiguous(memory_format=torch.channels_last)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual, expected = ours(x), theirs(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


def test_parametrization_and_functional_call():
    ours, theirs = pair(padding=1)
    x = torch.randn(2, 4, 9, 8)
    parameters = {name: 2 * value for name, value in theirs.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(ours, parameters, x),
        torch.func.functional_call(theirs, parameters, x),
    )
    for module in (ours, theirs):
        nn.utils.parametrizations.weight_norm(module)
    torch.testing.assert_close(ours(x), theirs(x))
