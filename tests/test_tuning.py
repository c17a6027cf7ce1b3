"""The file of tuned choices: what is in it counts, and nothing wrong with it ever hurts."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import conv_ops
from conv_ops import _C, settings, tuning


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """An own cache directory, and a process that has not enabled tuning yet."""
    monkeypatch.setenv("CONVOPS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_enabled", False)
    _C.clear_tuned_choices()
    yield tuning.cache_file()
    _C.clear_tuned_choices()
    _C.set_tuned_callback(None)


def choice(problem="problem", algorithm="direct", device="device", **milliseconds):
    return {
        "device": device,
        "problem": problem,
        "algorithm": algorithm,
        "milliseconds": milliseconds or {"direct": 1.5},
    }


def document(**changes):
    content = {"format": 1, "version": conv_ops.__version__, "choices": [choice()], **changes}
    return json.dumps(content).encode()


def test_missing_file_is_no_event(file, recwarn):
    assert not file.exists() and tuning.load() == []
    assert not recwarn.list


def test_saved_choices_are_loaded(file):
    tuning.save(choice("a"))
    tuning.save(choice("b", "im2col_gemm", direct=2.0, im2col_gemm=1))
    tuning.save(choice("a", device="other"))
    assert tuning.load() == [
        choice("a"),
        choice("b", "im2col_gemm", direct=2.0, im2col_gemm=1),
        choice("a", device="other"),
    ]
    tuning.save(choice("a", "im2col_gemm"))  # newer than the first
    assert tuning.load()[0] == choice("a", "im2col_gemm") and len(tuning.load()) == 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        document()[:-5],
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b"[" * 100_000,
        b'{"a": 1}',
        document(format=2),
        document(version="0.0.9"),
        document(choices={}),
        document(choices=[1]),
        document(choices=[{"device": "d", "problem": "p", "algorithm": "a"}]),
        document(choices=[{**choice(), "algorithm": 3}]),
        document(choices=[{**choice(), "milliseconds": {"direct": "fast"}}]),
        document(choices=[{**choice(), "more": 1}]),
    ],
    ids=lambda content: content[:40].decode(errors="replace"),
)
def test_unusable_file_is_ignored_with_a_warning_and_repaired(file, content):
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="ignores the tuned choices") as warned:
        tuning.enable()
    assert str(file) in str(warned[0].message)
    assert _C.tuned_choices() == []
    with pytest.warns(RuntimeWarning, match="ignores the tuned choices"):
        tuning.save(choice("new"))
    assert tuning.load() == [choice("new")]


def test_directory_in_place_of_the_file(file):
    file.mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="cannot read its tuned choices"):
        assert tuning.load() == []
    with pytest.warns(RuntimeWarning) as warned:
        tuning.save(choice())
    assert "cannot keep its tuned choices" in str(warned[-1].message)


def test_failed_write_leaves_the_old_file(file, monkeypatch):
    tuning.save(choice("old"))
    before = file.read_bytes()

    def fail(*_):
        raise OSError("disk on fire")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(RuntimeWarning, match="cannot keep its tuned choices: disk on fire"):
        tuning.save(choice("new"))
    assert file.read_bytes() == before
    assert {each.name for each in file.parent.iterdir()} == {
        file.name,
        file.with_suffix(".lock").name,
    }


def test_cache_that_cannot_be_written_does_not_stop_a_convolution(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("a file, not a directory")
    monkeypatch.setenv("CONVOPS_CACHE_DIR", str(tmp_path / "taken" / "cache"))
    x, w = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    with pytest.warns(RuntimeWarning, match="tuned choices"), settings.autotune(True):
        actual = conv_ops.conv2d(x, w)
    torch.testing.assert_close(actual, torch.nn.functional.conv2d(x, w))


def test_a_reader_never_sees_a_part(file):
    """Whatever is in the file while others write it is whole."""
    tuning.save(choice("first"))
    done = threading.Event()

    def read():
        seen = 0
        while not done.is_set():
            seen = max(seen, len(json.loads(file.read_bytes())["choices"]))
        return seen

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        pool.submit(lambda: [tuning.save(choice(f"{i}" * 100)) for i in range(100)]).result()
        done.set()
    assert all(reader.result() >= 1 for reader in readers) and len(tuning.load()) == 101


WRITER = """
import sys
from conv_ops import tuning
print("ready", flush=True)
sys.stdin.readline()
for i in range(50):
    problem = f"{sys.argv[1]} {i}"
    choice = {"device": "d", "problem": problem, "algorithm": "direct", "milliseconds": {}}
    tuning.save(choice)
"""


def test_concurrent_writers_lose_nothing(tmp_path):
    """Threads of this process and two other processes write at the same time."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WRITER, name],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for name in ("left", "right")
    ]
    for process in processes:
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        process.stdin.write(b"go\n")
        process.stdin.flush()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: tuning.save(choice(f"here {i}")), range(50)))
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    problems = {each["problem"] for each in tuning.load()}
    assert problems == {f"{name} {i}" for name in ("here", "left", "right") for i in range(50)}


def test_read_once_and_only_when_autotune_is_enabled(monkeypatch):
    reads = []
    monkeypatch.setattr(tuning, "load", lambda: reads.append(1) or [])
    conv_ops.conv2d(torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3))
    with settings.autotune(False):
        assert not reads
    with settings.autotune(True), settings.autotune(True):
        assert len(reads) == 1
    settings.set_autotune(True)
    settings.set_autotune(False)
    assert len(reads) == 1


def test_tuned_once_and_kept(device, file):
    x = torch.randn(2, 4, 12, 11, device=device)
    w = torch.randn(6, 4, 3, 3, device=device)
    expected = conv_ops.conv2d(x, w)
    with settings.autotune(True):
        actual = conv_ops.conv2d(x, w)
        (kept,) = tuning.load()
        before = file.stat().st_mtime_ns
        conv_ops.conv2d(x, w)
        assert file.stat().st_mtime_ns == before
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)
    found = conv_ops.explain(x, w)
    assert (kept["problem"], kept["device"]) == (found.problem, found.device)
    assert kept["algorithm"] == min(kept["milliseconds"], key=kept["milliseconds"].get)
    assert found.chosen.algorithm == kept["algorithm"]
    assert [kept] == _C.tuned_choices()


def test_a_choice_in_the_file_is_taken(device, file):
    x, w = torch.randn(1, 4, 9, 9, device=device), torch.randn(4, 4, 3, 3, device=device)
    before = conv_ops.explain(x, w)
    other = next(each for each in before.candidates if each.can_run and not each.chosen)
    measured = {other.algorithm: 0.25, "of another build": 0.1}
    tuning.save(choice(before.problem, other.algorithm, before.device, **measured))
    assert conv_ops.explain(x, w).chosen == before.chosen
    tuning.enable()
    after = conv_ops.explain(x, w)
    assert after.chosen.algorithm == other.algorithm and after.chosen.measured_ms == 0.25


def test_an_unknown_algorithm_in_the_file_is_not_taken(device, file):
    x, w = torch.randn(1, 4, 9, 9, device=device), torch.randn(4, 4, 3, 3, device=device)
    before = conv_ops.explain(x, w)
    tuning.save(choice(before.problem, "of another build", before.device))
    tuning.enable()
    assert conv_ops.explain(x, w).chosen.algorithm == before.chosen.algorithm
    conv_ops.conv2d(x, w)


def test_clear_forgets_memory_and_file(file):
    tuning.save(choice())
    tuning.enable()
    assert len(_C.tuned_choices()) == 1
    tuning.clear()
    assert _C.tuned_choices() == [] and not file.exists()
    tuning.clear()


@pytest.mark.parametrize(
    ("environment", "directory"),
    [
        ({"CONVOPS_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"CONVOPS_CACHE_DIR": "~/a"}, "/home/me/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/conv_ops"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/conv_ops"),
        ({"CONVOPS_CACHE_DIR": ""}, "/home/me/.cache/conv_ops"),
        ({}, "/home/me/.cache/conv_ops"),
    ],
)
def test_where_the_file_is(environment, directory, monkeypatch):
    for name in ("CONVOPS_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert tuning.cache_file() == Path(directory) / f"tuned-{conv_ops.__version__}.json"


def test_environment_enables_autotune(file):
    tuning.save(choice())
    program = (
        "import conv_ops; print(conv_ops.settings.get().autotune, conv_ops._C.tuned_choices())"
    )
    output = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "CONVOPS_AUTOTUNE": "1"},
        cwd=file.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output == f"True {[choice()]}\n"
