"""convert_conv2d changes what computes a convolution and nothing else; revert_conv2d undoes it."""

import copy
import logging
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import conv_ops
from conv_ops import conversion_report, convert_conv2d, revert_conv2d

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of the old spectral_norm, weight_norm
]


@pytest.fixture(autouse=True)
def ieee():
    """The arithmetic of float32 on CUDA in which torch and conv_ops can be compared."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


class Block(nn.Module):
    """Convolutions of several kinds, one of them used twice and one also in a plain list."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding="same")
        self.body = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, groups=8))
        self.twice = nn.Conv2d(8, 8, 1, bias=False)
        self.again = self.twice
        self.up = nn.ConvTranspose2d(8, 3, 2)
        self.plain = [self.twice]

    def forward(self, x):
        x = self.body(self.first(x))
        return self.up(self.plain[0](self.again(self.twice(x))))


def test_model_computes_the_same(device):
    model = Block().to(device)
    original = copy.deepcopy(model)
    assert convert_conv2d(model) is model
    assert conversion_report(model).converted == ("first", "body.1", "twice")
    assert not any(type(each) is nn.Conv2d for each in model.modules())

    x = torch.randn(2, 3, 8, 7, device=device)
    actual, expected = model(x), original(x)
    torch.testing.assert_close(actual, expected)
    actual.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in original.named_parameters():
        torch.testing.assert_close(
            model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4
        )


def test_everything_but_the_class_stays():
    model = Block().eval()
    model.first.weight.requires_grad_(False)
    model.first.note = "mine"
    model.first.double()
    parameters = dict(model.named_parameters())
    modules = list(model.modules())
    state = {name: vars(each).copy() for name, each in model.named_modules()}
    optimizer = torch.optim.SGD(model.parameters())
    text = repr(model)

    convert_conv2d(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(model.get_parameter(name) is each for name, each in parameters.items())
    assert {name: vars(each) for name, each in model.named_modules()} == state
    assert model.again is model.twice and model.plain[0] is model.twice
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert repr(model) == text


def test_hooks_stay_and_can_be_removed():
    module = nn.Conv2d(1, 1, 1)
    calls = []

    def note(name):
        def hook(*_):
            calls.append(name)

        return hook

    handles = [
        module.register_forward_pre_hook(note("forward_pre")),
        module.register_forward_hook(note("forward")),
        module.register_full_backward_pre_hook(note("backward_pre")),
        module.register_full_backward_hook(note("backward")),
        module.register_state_dict_pre_hook(note("state_dict_pre")),
        module._register_state_dict_hook(note("state_dict")),
        module.register_load_state_dict_pre_hook(note("load_pre")),
        module.register_load_state_dict_post_hook(note("load_post")),
    ]

    def use():
        calls.clear()
        module(torch.randn(1, 1, 2, 2, requires_grad=True)).sum().backward()
        module.load_state_dict(module.state_dict())
        return calls.copy()

    expected = use()
    assert len(expected) == len(handles)
    convert_conv2d(module)
    assert type(module) is conv_ops.Conv2d and use() == expected
    for handle in handles:
        handle.remove()
    assert use() == []


def test_replaced_forward_reaches_the_new_convolution():
    module = nn.Conv2d(1, 1, 1)
    original = module.forward
    module.forward = lambda x: original(x) + 1  # as offloading libraries do
    x = torch.randn(1, 1, 2, 2)
    expected = module(x)
    convert_conv2d(module)
    torch.testing.assert_close(module(x), expected)
    with conv_ops.settings.precision("ieee"), torch.profiler.profile() as profile:
        module(x)
    assert any("convops::" in event.key for event in profile.key_averages())


def scripted():
    return torch.jit.script(nn.Conv2d(2, 2, 3))


def replaced():
    module = nn.Conv2d(2, 2, 3)
    module._conv_forward = lambda input, weight, bias: input
    return module


class Special(nn.Conv2d):
    """A subclass, which may compute anything."""


class WeightTensor(torch.Tensor):
    """A subclass, which may mean anything."""


def subclassed_weight():
    module = nn.Conv2d(2, 2, 3)
    module.weight = nn.Parameter(torch.randn(2, 2, 3, 3).as_subclass(WeightTensor))
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Special(2, 2, 3), "it is a .*Special, not exactly a torch.nn.Conv2d"),
        (lambda: nn.LazyConv2d(2, 3), "it is lazy; run it once before converting"),
        (lambda: parametrizations.spectral_norm(nn.Conv2d(2, 2, 3)), r"parametrized \(weight\)"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(2, 2, 3)), r"parametrized \(weight\)"),
        (lambda: nn.utils.spectral_norm(nn.Conv2d(2, 2, 3)), "a hook computes its weight"),
        (lambda: nn.utils.weight_norm(nn.Conv2d(2, 2, 3)), "a hook computes its weight"),
        (
            lambda: prune.random_unstructured(nn.Conv2d(2, 2, 3), "weight", 0.5),
            "a hook computes its weight",
        ),
        (scripted, "it is compiled by TorchScript"),
        (replaced, "its _conv_forward has been replaced"),
        (lambda: torch.ao.nn.quantized.Conv2d(2, 2, 3), r"it is a .*quantized.*Conv2d"),
        (
            lambda: torch.ao.nn.qat.Conv2d(2, 2, 3, qconfig=torch.ao.quantization.default_qconfig),
            r"it is a .*qat.*Conv2d",
        ),
        (subclassed_weight, "its weight is a .*WeightTensor"),
        (lambda: nn.Conv2d(2, 2, 3, dtype=torch.cfloat), "its weight is of torch.complex64"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_skips_and_tells_why(make, reason, caplog):
    module = make()
    kind = type(module)
    model = nn.Sequential(nn.ReLU(), module, nn.Conv2d(2, 2, 1))
    with caplog.at_level(logging.WARNING, logger="conv_ops"):
        convert_conv2d(model)
    assert type(model[1]) is kind
    report = conversion_report(model)
    assert report.converted == ("2",) and list(report.skipped) == ["1"]
    assert re.search(reason, report.skipped["1"])
    (record,) = caplog.records
    assert record.getMessage() == f"convert_conv2d skips 1: {report.skipped['1']}"
    assert "1: " + report.skipped["1"] in str(report)


def test_other_layers_are_not_mentioned(caplog):
    model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.Conv3d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1))
    convert_conv2d(model)
    assert conversion_report(model) == conv_ops.ConversionReport((), (), {})
    assert not caplog.records


def test_report_before_conversion():
    model = Block()
    report = conversion_report(model)
    assert report.convertible == ("first", "body.1", "twice") and report.converted == ()
    assert all(type(model.get_submodule(name)) is nn.Conv2d for name in report.convertible)


def test_root_and_repetition():
    module = nn.Conv2d(1, 2, 3)
    assert convert_conv2d(module) is module and type(module) is conv_ops.Conv2d
    assert convert_conv2d(module) is module and type(module) is conv_ops.Conv2d
    assert conversion_report(module).converted == ("",)


def test_revert_is_the_inverse():
    model = Block()
    modules = list(model.modules())
    classes = [type(each) for each in modules]
    state = [vars(each).copy() for each in modules]
    convert_conv2d(model)
    model.first.precision, model.twice.algorithm = "ieee", "direct"
    assert revert_conv2d(model) is model
    assert [type(each) for each in model.modules()] == classes
    assert [vars(each) for each in model.modules()] == state
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_revert_of_a_constructed_module():
    module = conv_ops.Conv2d(2, 3, 3, precision="ieee")
    x = torch.randn(1, 2, 4, 4)
    expected = module(x)
    revert_conv2d(module)
    assert type(module) is nn.Conv2d and not hasattr(module, "precision")
    torch.testing.assert_close(module(x), expected)


def test_revert_leaves_parametrized_modules():
    module = parametrizations.weight_norm(conv_ops.Conv2d(2, 3, 3))
    revert_conv2d(module)
    assert isinstance(module, conv_ops.Conv2d) and parametrize.is_parametrized(module)


def test_converted_model_can_be_copied_scripted_and_compiled():
    model = convert_conv2d(Block().eval())
    x = torch.randn(1, 3, 6, 6)
    expected = model(x)
    assert conversion_report(copy.deepcopy(model)).converted == ("first", "body.1", "twice")
    del model.plain  # TorchScript knows no lists of modules
    model.plain = nn.ModuleList([model.twice])
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
