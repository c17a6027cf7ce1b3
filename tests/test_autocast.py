"""Autocast: conv2d takes the autocast dtype as nn.Conv2d does."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import conv_ops

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def sample(device, dtype=torch.float32, requires_grad=True):
    torch.manual_seed(0)
    sizes = ((2, 4, 6, 5), (6, 2, 3, 3), (6,))
    return [torch.randn(s, device=device).to(dtype).requires_grad_(requires_grad) for s in sizes]


def outcome(conv2d, *args, **kwargs):
    """The dtype of the result, or that there is none."""
    try:
        return conv2d(*args, **kwargs).dtype
    except RuntimeError:
        return RuntimeError


@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16])
def test_forward_and_gradients(device, target):
    options = {"stride": (2, 1), "padding": 1, "groups": 2}
    results = []
    for conv2d in (conv_ops.conv2d, F.conv2d):
        tensors = sample(device)
        with torch.autocast(device, target):
            y = conv2d(*tensors, **options)
        y.float().square().sum().backward()
        results.append((y, *(t.grad for t in tensors)))
    eps = torch.finfo(target).eps
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        scale = theirs.float().abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=4 * eps, atol=4 * eps * scale)
    assert results[0][0].dtype == target


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("padding", [1, "same"])
def test_dtypes_in_every_mode(device, grad_mode, padding):
    for input_dtype, weight_dtype in itertools.product(DTYPES, repeat=2):
        x, w, b = sample(device, requires_grad=False)
        tensors = x.to(input_dtype), w.to(weight_dtype), b.to(weight_dtype)
        with grad_mode(), torch.autocast(device, torch.bfloat16):
            ours = outcome(conv_ops.conv2d, *tensors, padding=padding, groups=2)
            theirs = outcome(F.conv2d, *tensors, padding=padding, groups=2)
        assert ours == theirs, (input_dtype, weight_dtype)


def test_disabled_inside(device):
    tensors = sample(device)
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        assert conv_ops.conv2d(*tensors, groups=2).dtype == torch.float32


def test_call_with_a_choice_of_its_own(device):
    tensors = sample(device)
    with torch.autocast(device, torch.bfloat16):
        y = conv_ops.conv2d(*tensors, groups=2, precision="ieee", algorithm="direct")
    assert y.dtype == torch.bfloat16


def test_other_ops_keep_their_dtype(device):
    x = torch.randn(1, 2, 4, 4, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert conv_ops.im2col(x, 2).dtype == F.unfold(x, 2).dtype == torch.float32


def test_module_in_a_loop_with_scaled_loss(device):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        conv_ops.Conv2d(3, 8, 3, padding=1),
        torch.nn.ReLU(),
        conv_ops.Conv2d(8, 4, 3, padding="same"),
    ).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    x, target = torch.randn(4, 3, 8, 8, device=device), torch.randn(4, 4, 8, 8, device=device)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_compiled(device):
    tensors = sample(device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x, w, b):
        with torch.autocast(device, torch.bfloat16):
            return conv_ops.conv2d(x, w, b, groups=2)

    with torch.autocast(device, torch.bfloat16):
        expected = conv_ops.conv2d(*tensors, groups=2)
    torch.testing.assert_close(function(*tensors), expected)
