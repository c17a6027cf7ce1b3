"""Setters act on the process, context managers on their thread, calls and modules win over both."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import conv_ops
from conv_ops import settings

MANAGERS = {
    "precision": settings.precision,
    "algorithm": settings.algorithm,
    "workspace_limit": settings.workspace_limit,
    "autotune": settings.autotune,
}
SETTERS = {
    "precision": settings.set_precision,
    "algorithm": settings.set_algorithm,
    "workspace_limit": settings.set_workspace_limit,
    "autotune": settings.set_autotune,
}
# Two values of each, neither the default.
VALUES = {
    "precision": ("ieee", "tf32"),
    "algorithm": ("direct", "im2col_gemm"),
    "workspace_limit": (2**20, 2**21),
    "autotune": (True, False),
}


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Defaults before and after each test, and no file of the user's."""
    monkeypatch.setenv("CONVOPS_CACHE_DIR", str(tmp_path))
    saved = settings.get()
    yield
    for name, setter in SETTERS.items():
        setter(getattr(saved, name))
    conv_ops.tuning.clear()


def in_new_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_defaults():
    assert settings.get() == settings.Settings(None, None, 2**30, False)


@pytest.mark.parametrize("name", SETTERS)
def test_setter_acts_on_all_threads(name):
    for value in VALUES[name]:
        SETTERS[name](value)
        assert getattr(settings.get(), name) == value
        assert getattr(in_new_thread(settings.get), name) == value


@pytest.mark.parametrize("name", MANAGERS)
def test_manager_acts_on_its_thread_and_nests(name):
    default = getattr(settings.get(), name)
    first, second = VALUES[name]
    with MANAGERS[name](first):
        assert getattr(settings.get(), name) == first
        assert getattr(in_new_thread(settings.get), name) == default
        with MANAGERS[name](second):
            assert getattr(settings.get(), name) == second
        assert getattr(settings.get(), name) == first
    assert getattr(settings.get(), name) == default


@pytest.mark.parametrize("name", MANAGERS)
def test_manager_wins_over_setter_and_none_lifts_it(name):
    ours, process = VALUES[name]
    with MANAGERS[name](ours):
        SETTERS[name](process)
        assert getattr(settings.get(), name) == ours
        with MANAGERS[name](None):
            assert getattr(settings.get(), name) == process
        assert getattr(settings.get(), name) == ours
    assert getattr(settings.get(), name) == process


def test_managers_are_independent():
    outer, inner = settings.precision("ieee"), settings.algorithm("direct")
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)  # not in the reverse order
    assert settings.get().precision is None and settings.get().algorithm == "direct"
    inner.__exit__(None, None, None)
    assert settings.get().algorithm is None


def test_manager_restores_after_an_error_and_decorates():
    with pytest.raises(KeyError), settings.workspace_limit(5):
        raise KeyError
    assert settings.get().workspace_limit == 2**30

    @settings.precision("tf32")
    def decorated():
        return settings.get().precision

    assert decorated() == decorated() == "tf32" and settings.get().precision is None


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("precision", "fp32", ValueError),
        ("precision", 1, ValueError),
        ("algorithm", "magic", ValueError),
        ("workspace_limit", -1, ValueError),
        ("workspace_limit", 2**63, ValueError),
        ("workspace_limit", 1.5, TypeError),
        ("workspace_limit", "1G", TypeError),
        ("workspace_limit", True, TypeError),
        ("autotune", 1, TypeError),
        ("autotune", "yes", TypeError),
    ],
)
def test_illegal_values_are_refused(name, value, error):
    before = settings.get()
    with pytest.raises(error, match=rf"{name} must be .*, but got {value!r}"):
        SETTERS[name](value)
    with pytest.raises(error, match=rf"{name} must be .*, but got {value!r}"):
        with MANAGERS[name](value):
            pass
    assert settings.get() == before


@pytest.mark.parametrize("setter", [settings.set_workspace_limit, settings.set_autotune])
def test_process_values_that_cannot_be_none(setter):
    with pytest.raises(TypeError, match="but got None"):
        setter(None)


def test_setters_in_many_threads_lose_nothing(monkeypatch):
    """Each thread sets its own field; a lost update would leave another's old value."""

    class Slow:
        """_C, with time between reading and writing for other threads to come in."""

        __getattr__ = staticmethod(partial(getattr, settings._C))

        @staticmethod
        def get_settings(scope):
            found = conv_ops._C.get_settings(scope)
            time.sleep(0.001)
            return found

    def repeat(name):
        for i in range(20):
            SETTERS[name](VALUES[name][i % 2])
            time.sleep(0.001)
            assert getattr(settings.get(), name) == VALUES[name][i % 2]

    monkeypatch.setattr(settings, "_C", Slow())
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(repeat, ["precision", "algorithm", "workspace_limit"]))


def test_managers_in_many_threads_do_not_mix():
    barrier = threading.Barrier(4)

    def repeat(i):
        barrier.wait()
        for _ in range(200):
            with settings.workspace_limit(i), settings.precision(("ieee", "tf32")[i % 2]):
                found = settings.get()
                assert (found.workspace_limit, found.precision) == (i, ("ieee", "tf32")[i % 2])
            assert settings.get() == settings.Settings(None, None, 2**30, False)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(repeat, range(4)))


def test_algorithm_setting_reaches_the_plan(device):
    x, w = torch.randn(1, 4, 6, 6, device=device), torch.randn(4, 4, 3, 3, device=device)
    for name in VALUES["algorithm"]:
        with settings.algorithm(name):
            assert conv_ops.explain(x, w).chosen.algorithm == name
        settings.set_algorithm(name)
        assert conv_ops.explain(x, w).chosen.algorithm == name
        settings.set_algorithm(None)


def test_call_wins_over_the_setting():
    x, w = torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3)
    with settings.algorithm("direct"), pytest.raises(RuntimeError, match="magic"):
        conv_ops.conv2d(x, w, algorithm="magic")


def test_workspace_limit_reaches_the_plan(device):
    x, w = torch.randn(2, 8, 64, 64, device=device), torch.randn(8, 8, 5, 5, device=device)
    free = {each.algorithm: each for each in conv_ops.explain(x, w).candidates}
    with settings.workspace_limit(2**18):
        bounded = {each.algorithm: each for each in conv_ops.explain(x, w).candidates}
    assert free["im2col_gemm"].workspace > 2**18
    assert bounded["im2col_gemm"].workspace <= 2**18 or not bounded["im2col_gemm"].can_run


def test_backward_has_the_settings_of_the_forward(device):
    """Backward runs after the block, on CUDA in another thread, with the algorithm of forward."""
    x = torch.randn(1, 4, 6, 6, device=device, requires_grad=True)
    w = torch.randn(4, 4, 3, 3, device=device)
    with settings.algorithm("direct"):
        inside = conv_ops.conv2d(x, w)
    expected = torch.ops.convops.conv2d_backward_input(
        torch.ones_like(inside), w, x.shape, [1], [0], [1], 1, None, "direct"
    )
    (gradient,) = torch.autograd.grad(inside.sum(), x)
    assert torch.equal(gradient, expected)


def test_torch_precision_follows_torch():
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert settings.torch_precision() == "ieee"
    with torch.backends.cudnn.flags(allow_tf32=True):
        assert settings.torch_precision() == "tf32"
    saved = torch.backends.cudnn.conv.fp32_precision
    try:
        for value in ("ieee", "tf32"):
            torch.backends.cudnn.conv.fp32_precision = value
            assert settings.torch_precision() == value
    finally:
        torch.backends.cudnn.conv.fp32_precision = saved
