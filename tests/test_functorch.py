"""torch.func: vmap of every op over every choice of arguments, and mixtures with derivatives."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

import conv_ops

ops = torch.ops.convops
BATCH = 3
WINDOW = ([2, 1], [1, 0], [1, 2])  # stride, padding, dilation

# Each op on its tensors and a number of groups, with the tensors' sizes.
OPS = {
    "conv2d": (
        lambda x, w, b, g: conv_ops.conv2d(x, w, b, *WINDOW, g),
        lambda g: ((2, 2 * g, 5, 6), (4 * g, 2, 3, 2), (4 * g,)),
    ),
    "conv2d_same": (
        lambda x, w, g: conv_ops.conv2d(x, w, None, padding="same", groups=g),
        lambda g: ((2, 2 * g, 4, 3), (4 * g, 2, 3, 2)),
    ),
    "conv2d_unbatched": (
        lambda x, w, g: conv_ops.conv2d(x, w, None, *WINDOW, g),
        lambda g: ((2 * g, 5, 6), (4 * g, 2, 3, 2)),
    ),
    "conv2d_backward_input": (
        lambda dy, w, g: ops.conv2d_backward_input(dy, w, [2, 2 * g, 5, 6], *WINDOW, g),
        lambda g: ((2, 4 * g, 3, 4), (4 * g, 2, 3, 2)),
    ),
    "conv2d_backward_weight": (
        lambda dy, x, g: ops.conv2d_backward_weight(dy, x, [4 * g, 2, 3, 2], [], *WINDOW, g),
        lambda g: ((2, 4 * g, 3, 4), (2, 2 * g, 5, 6)),
    ),
    "im2col": (
        lambda x, g: conv_ops.im2col(x, (3, 2), 1, (1, 0), 2),
        lambda g: ((2, 2 * g, 5, 6),),
    ),
    "im2col_unbatched": (lambda x, g: conv_ops.im2col(x, 2), lambda g: ((2 * g, 3, 4),)),
    "col2im": (
        lambda x, g: conv_ops.col2im(x, (5, 6), (3, 2), 1, (1, 0), 2),
        lambda g: ((2, 12 * g, 9),),
    ),
    "col2im_unbatched": (
        lambda x, g: conv_ops.col2im(x, (3, 4), 2),
        lambda g: ((4 * g, 6),),
    ),
}


def randn(*size, device):
    return torch.randn(size, device=device, dtype=torch.float64)


def loop(function, in_dims, *args):
    """What vmap means."""

    def call(i):
        pairs = zip(args, in_dims, strict=True)
        return function(*(a if dim is None else a.select(dim, i) for a, dim in pairs))

    return torch.stack([call(i) for i in range(BATCH)])


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", OPS)
def test_vmap(device, name, groups):
    op, sizes_of = OPS[name]
    sizes = sizes_of(groups)
    for in_dims in itertools.product((None, 0, 1), repeat=len(sizes)):
        if not any(d is not None for d in in_dims):
            continue
        args = [
            randn(*(size if d is None else (*size[:d], BATCH, *size[d:])), device=device)
            for size, d in zip(sizes, in_dims, strict=True)
        ]

        def function(*tensors):
            return op(*tensors, groups)

        actual = vmap(function, in_dims)(*args)
        torch.testing.assert_close(actual, loop(function, in_dims, *args), msg=str(in_dims))


@pytest.mark.parametrize("groups", [1, 2])
def test_nested_vmap(device, groups):
    x = randn(2, 3, 1, 2 * groups, 4, 4, device=device)
    w = randn(3, 2 * groups, 2, 3, 3, device=device)

    def function(x, w):
        return conv_ops.conv2d(x, w, None, padding=1, groups=groups)

    actual = vmap(vmap(function), (0, None))(x, w)
    expected = torch.stack([torch.stack(list(map(function, xs, w))) for xs in x])
    torch.testing.assert_close(actual, expected)
    # All pairs: each level batches another operand.
    pairs = vmap(vmap(function, (None, 0)), (0, None))(x[:, 0], w)
    torch.testing.assert_close(pairs[1, 2], function(x[1, 0], w[2]))


def loss(conv2d, x, w, b):
    return conv2d(x, w, b, stride=(2, 1), padding=1, groups=2).tanh().square().sum()


def sample(device):
    return [randn(*size, device=device) for size in ((4, 4, 5, 4), (6, 2, 3, 2), (6,))]


def ours(x, w, b):
    return loss(conv_ops.conv2d, x, w, b)


def theirs(x, w, b):
    return loss(F.conv2d, x, w, b)


@pytest.mark.parametrize("argnums", [0, 1, 2, (0, 1, 2)])
def test_grad(device, argnums):
    args = sample(device)
    torch.testing.assert_close(grad(ours, argnums)(*args), grad(theirs, argnums)(*args))


def test_grad_of_grad(device):
    args = sample(device)

    def penalty(function):
        return lambda x, w, b: grad(function, 1)(x, w, b).square().sum()

    torch.testing.assert_close(
        grad(penalty(ours), (0, 1))(*args), grad(penalty(theirs), (0, 1))(*args)
    )


def test_per_sample_gradients(device):
    args = sample(device)
    in_dims = (0, None, None)
    torch.testing.assert_close(
        vmap(grad(ours, (1, 2)), in_dims)(*args), vmap(grad(theirs, (1, 2)), in_dims)(*args)
    )


def test_per_sample_gradients_of_second_order(device):
    args = sample(device)

    def penalty(function):
        return lambda x, w, b: grad(function, 1)(x, w, b).square().sum()

    in_dims = (0, None, None)
    torch.testing.assert_close(
        vmap(grad(penalty(ours), 1), in_dims)(*args),
        vmap(grad(penalty(theirs), 1), in_dims)(*args),
    )


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)])
def test_jvp(device, which):
    args = sample(device)
    tangents = tuple(torch.randn_like(args[i]) for i in which)

    def tangent(function):
        def partial(*chosen):
            chosen = dict(zip(which, chosen, strict=True))
            return function(*(chosen.get(i, args[i]) for i in range(3)))

        return jvp(partial, tuple(args[i] for i in which), tangents)

    torch.testing.assert_close(tangent(ours), tangent(theirs))


def test_vmap_of_jvp(device):
    x, w, b = sample(device)
    directions = torch.randn(BATCH, *w.shape, device=device, dtype=w.dtype)

    def tangents(function):
        return vmap(lambda d: jvp(lambda w: function(x, w, b), (w,), (d,))[1])(directions)

    torch.testing.assert_close(tangents(ours), tangents(theirs))


JACOBIANS = {
    "reverse": jacrev,
    "forward": jacfwd,
    "forward over reverse": hessian,
    "reverse over forward": lambda f, i: jacrev(jacfwd(f, i), i),
    "reverse over reverse": lambda f, i: jacrev(jacrev(f, i), i),
    "forward over forward": lambda f, i: jacfwd(jacfwd(f, i), i),
}


@pytest.mark.parametrize("transform", JACOBIANS)
@pytest.mark.parametrize("argnum", [0, 1, 2])
def test_jacobians(device, transform, argnum):
    args = (
        randn(2, 2, 3, 3, device=device),
        randn(2, 1, 2, 2, device=device),
        randn(2, device=device),
    )

    def jacobian(conv2d):
        def function(*args):
            return conv2d(*args, padding=1, groups=2).tanh().sum((2, 3))

        return JACOBIANS[transform](function, argnum)(*args)

    torch.testing.assert_close(jacobian(conv_ops.conv2d), jacobian(F.conv2d))


def test_ensemble(device):
    models = [conv_ops.Conv2d(2, 4, 3, padding=1, device=device) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    x = torch.randn(2, 2, 5, 5, device=device)
    with conv_ops.settings.precision("ieee"):
        stacked = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
        expected = torch.stack([model(x) for model in models])
    torch.testing.assert_close(stacked, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batched_weights_and_bias_round_once(device, dtype):
    x = torch.randn(2, 16, 5, 5, device=device, dtype=dtype)
    w = torch.randn(BATCH, 4, 16, 3, 3, device=device, dtype=dtype)
    b = 100 * torch.randn(BATCH, 4, device=device, dtype=dtype)
    actual = vmap(conv_ops.conv2d, (None, 0, 0))(x, w, b)
    exact = vmap(F.conv2d, (None, 0, 0))(x.double(), w.double(), b.double())
    error = (actual.double() - exact).abs() / exact.abs().clamp(min=1)
    assert error.max() < 0.51 * torch.finfo(dtype).eps


def test_strided_memory_format_survives(device):
    x = torch.randn(BATCH, 2, 4, 5, 6, device=device)
    w = torch.randn(8, 4, 3, 3, device=device).to(memory_format=torch.channels_last)
    y = vmap(conv_ops.conv2d, (0, None))(x, w)
    assert y[0].is_contiguous(memory_format=torch.channels_last)
