"""metrics.jsonl, TensorBoard, and what a person sees."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
import toy

from turbocompile.training.metrics import MetricsLog, Window, average

CPU = torch.device("cpu")


def test_a_line_is_the_average_of_its_steps():
    window = Window(3, CPU)
    for value in (1.0, 2.0, 6.0):
        window.add(("loss", "norm"), torch.tensor([value, 10 * value]))
    assert average(window.rows()) == {"loss": 3.0, "norm": 30.0}


def test_a_window_that_a_checkpoint_cut_continues():
    whole, first, second = (Window(4, CPU) for _ in range(3))
    for window, values in ((whole, (0.1, 0.2, 0.3)), (first, (0.1, 0.2))):
        for value in values:
            window.add(("loss",), torch.tensor([value]))
    second.start(json.loads(json.dumps(first.rows())))
    second.add(("loss",), torch.tensor([0.3]))
    assert second.rows() == whole.rows()
    second.start()
    assert second.rows() == []


def test_a_metric_may_appear_within_a_window():
    window = Window(2, CPU)
    window.add(("loss",), torch.tensor([1.0]))
    window.add(("loss", "extra"), torch.tensor([3.0, 5.0]))
    assert average(window.rows()) == {"loss": 2.0, "extra": 5.0}


def test_the_average_of_something_not_finite_is_not_a_number():
    assert math.isnan(average([{"x": math.inf}, {"x": -math.inf}])["x"])


def test_resuming_drops_later_lines_and_a_broken_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"step": 8, "lo')
    log = MetricsLog(tmp_path, 4, 10, show=False)
    log.write(6, {"loss": 1.5, "odd": math.nan})
    log.close()
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n{"step": 6, "loss": 1.5, "odd": null}\n'


def test_a_run_writes_every_line_once(tmp_path):
    toy.trainer(tmp_path, steps=10, log_every=4, lr=0.5).run()
    lines = toy.lines(tmp_path, clock=True)
    assert [line["step"] for line in lines] == [4, 8, 10]  # and one at the end
    assert list(lines[0]) == ["step", "loss", "grad_norm", "size", "lr", "seconds", "samples_per_second"]
    assert all(line["lr"] == 0.5 for line in lines)
    assert all(line["samples_per_second"] > 0 for line in lines)
    assert 0 < lines[0]["seconds"] < lines[1]["seconds"] < lines[2]["seconds"]


def test_tensorboard_has_the_lines_of_a_resumed_run_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    toy.trainer(tmp_path, steps=12).run()
    (tmp_path / "checkpoints" / "step_00000012").rename(tmp_path / "away")  # back to step 10
    toy.trainer(tmp_path, steps=16).run()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    lines = toy.lines(tmp_path)
    assert [event.step for event in events] == [line["step"] for line in lines] == [4, 8, 12, 16]
    wanted = [torch.tensor(line["loss"]).item() for line in lines]  # events are float32
    assert [event.value for event in events] == wanted


def test_without_tensorboard_training_goes_on_and_says_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    toy.trainer(tmp_path, steps=8).run()
    said = [r.getMessage() for r in caplog.records if r.name.startswith("turbocompile")]
    assert said == ["tensorboard is not installed (pip install 'turbocompile[training]'); metrics go to JSONL alone"]
    assert [line["step"] for line in toy.lines(tmp_path)] == [4, 8]
    assert not (tmp_path / "tensorboard").exists()


def test_progress_is_a_line_each_time_in_a_file(tmp_path, capsys):
    log = MetricsLog(tmp_path, 0, 8)
    log.write(4, {"loss": 0.25})
    log.close()
    captured = capsys.readouterr()
    assert captured.err == "step 4/8  loss 0.25\n"
    assert captured.out == ""


def test_progress_is_a_bar_in_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    log = MetricsLog(tmp_path, 2, 8)
    log.write(4, {"loss": 0.25})
    log.close()
    captured = capsys.readouterr()
    assert "4/8" in captured.err
    assert "\x1b[" in captured.err
    assert captured.out == ""
