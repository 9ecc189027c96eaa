"""A run that was killed at any moment and resumed has the bits of one that was not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import toy

from turbocompile.training import checkpoint


def start(*args):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, toy.__file__, *map(str, args)], env=environment, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with a killed run for each moment."""
    root = tmp_path_factory.mktemp("killed")
    process = start("kill", root)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors.decode()
    return root


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("uninterrupted")
    toy.trainer(folder).run()
    return folder


def assert_same_run(folder, reference):
    """Weights, moving averages and optimizer bit by bit; the metrics but for the clock's."""
    found, wanted = toy.contents(folder), toy.contents(reference)
    assert found.keys() == wanted.keys()
    assert {name for name in wanted if not torch.equal(found[name], wanted[name])} == set()
    assert toy.lines(folder) == toy.lines(reference)


def test_a_checkpoint_holds_weights_averages_and_optimizer(uninterrupted):
    parts = {name.split(".")[0] for name in toy.contents(uninterrupted)}
    assert parts == {"model", "ema", "optimizer"}
    assert toy.contents(uninterrupted)["optimizer.out.weight.step"] == toy.STEPS


# The newest whole checkpoint at that moment, and whether another is half written or half removed.
LEFT = {
    "before the first checkpoint": (None, False),
    "right after a checkpoint": (5, False),
    "within a line's window": (15, False),
    "at the last step": (20, False),
    "the metrics are not on disk": (5, False),
    "the data is not on disk": (5, True),
    "the metadata is not on disk": (5, True),
    "about.json is not on disk": (5, True),
    "the folder is not on disk": (5, True),
    "the new name is not on disk": (10, False),
    "the first checkpoint has no name yet": (None, True),
    "the second checkpoint has no name yet": (5, True),
    "the oldest is about to be removed": (15, False),
    "the oldest is half removed": (15, True),
}


@pytest.mark.parametrize("moment", toy.MOMENTS)
def test_killed_and_resumed_equals_uninterrupted(killed, uninterrupted, moment, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(killed / moment, folder)
    root = folder / "checkpoints"
    found = checkpoint.newest(root)
    assert (found and found.step, bool(list(root.glob(".step_*")))) == LEFT[moment]

    result = toy.trainer(folder).run()

    assert (result.step, result.finished) == (toy.STEPS, True)
    assert_same_run(folder, uninterrupted)
    assert sorted(p.name for p in root.iterdir()) == ["step_00000020", "step_00000024"]


def test_killed_from_outside_and_resumed_equals_uninterrupted(tmp_path):
    process = start("forever", tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5):  # 20 steps
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached = checkpoint.newest(tmp_path / "run" / "checkpoints").step

    for folder in ("run", "reference"):
        toy.trainer(tmp_path / folder, steps=reached + 12).run()
    assert reached >= 15
    assert_same_run(tmp_path / "run", tmp_path / "reference")


def test_a_run_cut_by_time_goes_on(tmp_path, uninterrupted):
    def slow(step):
        time.sleep(0.02)
        return toy.data(step)

    cut = toy.trainer(tmp_path, batches=slow, max_seconds=0.15).run()
    assert not cut.finished
    assert 0 < cut.step < toy.STEPS
    assert cut.checkpoint.name == f"step_{cut.step:08d}"

    result = toy.trainer(tmp_path).run()
    assert result.finished
    assert result.seconds > cut.seconds > 0.15
    assert_same_run(tmp_path, uninterrupted)


def test_a_finished_run_is_left_alone(tmp_path, uninterrupted):
    shutil.copytree(uninterrupted, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "checkpoints").rglob("*")}
    trainer = toy.trainer(tmp_path / "run")
    result = trainer.run()
    assert (result.step, result.finished, result.metrics) == (toy.STEPS, True, {})
    assert result.seconds == checkpoint.newest(uninterrupted / "checkpoints").about["seconds"] > 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "checkpoints").rglob("*")} == before
    weights = toy.contents(uninterrupted)
    assert all(torch.equal(value, weights[f"model.{name}"]) for name, value in trainer.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon"}, {"ema_power": None, "precision": "bfloat16"}])
def test_a_longer_run_goes_on_from_a_finished_one(tmp_path, options):
    for steps in (8, 16):
        toy.trainer(tmp_path / "two", steps=steps, **options).run()
    toy.trainer(tmp_path / "one", steps=16, **options).run()
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_log_every_may_change_within_a_window(tmp_path):
    toy.trainer(tmp_path, steps=10, log_every=7).run()  # lines at 7 and, the end, 10
    (tmp_path / "checkpoints" / "step_00000010").rename(tmp_path / "away")  # back to step 5, within the first window
    toy.trainer(tmp_path, steps=10, log_every=2).run()
    assert [line["step"] for line in toy.lines(tmp_path)] == [6, 8, 10]
    toy.trainer(tmp_path / "other", steps=10, log_every=6).run()
    assert toy.lines(tmp_path)[0] == toy.lines(tmp_path / "other")[0]  # both average steps 1 to 6
