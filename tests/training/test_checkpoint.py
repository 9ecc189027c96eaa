"""What is on disk: whole or absent, the newest few, and readable without a trainer."""

from __future__ import annotations

import json
import logging
import os

import pytest
import torch
import toy
from torch import nn

from turbocompile.errors import EngineError
from turbocompile.training import Trainer, checkpoint, read_weights


def save(root, step, keep=2, **tensors):
    return checkpoint.save(root, step, tensors or {"x": torch.full((3,), float(step))}, {"note": "hi"}, keep)


def test_what_was_saved_is_loaded_in_place(tmp_path):
    save(tmp_path, 7, x=torch.arange(6.0).reshape(2, 3), count=torch.tensor(4.0))
    target = {"x": torch.zeros(2, 3), "count": torch.zeros(())}
    found = checkpoint.newest(tmp_path)
    checkpoint.load(found, target)
    assert (found.step, found.about["note"]) == (7, "hi")
    assert torch.equal(target["x"], torch.arange(6.0).reshape(2, 3))
    assert target["count"] == 4


def test_the_newest_few_stay(tmp_path):
    for step in (5, 10, 100, 15):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000015", "step_00000100"]


def test_everything_is_on_disk_before_a_checkpoint_gets_its_name(tmp_path, monkeypatch):
    order = []

    def fsync(descriptor, function=os.fsync):
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        function(descriptor)

    def rename(source, target, function=os.rename):
        order.append(f"-> {os.path.basename(target)}")
        function(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save(tmp_path / "root", 3)
    named = order.index("-> step_00000003")
    assert {"__0_0.distcp", "about.json", ".step_00000003.writing"} < set(order[:named])
    assert any("metadata" in name for name in order[:named])
    assert order[named + 1 :] == ["root"]


def test_a_step_that_exists_is_replaced(tmp_path):
    save(tmp_path, 5, x=torch.zeros(2))
    save(tmp_path, 5, x=torch.ones(2))
    assert torch.equal(checkpoint.read(checkpoint.newest(tmp_path))["x"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]


@pytest.mark.parametrize("damage", ["cut", "lost", "no about", "about cut"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage, caplog):
    save(tmp_path, 5)
    path = save(tmp_path, 10)
    data, about = path / "__0_0.distcp", path / "about.json"
    if damage == "cut":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "lost":
        data.unlink()
    elif damage == "no about":
        about.unlink()
    else:
        about.write_text(about.read_text()[:-5])
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path).step == 5
    assert "step_00000010 is damaged" in caplog.text
    (tmp_path / "step_00000005" / "about.json").unlink()
    with pytest.raises(EngineError, match="every checkpoint is damaged; restore one"):
        checkpoint.newest(tmp_path)


def test_a_run_goes_on_from_before_a_damaged_checkpoint(tmp_path):
    toy.trainer(tmp_path / "whole", steps=15).run()
    toy.trainer(tmp_path / "run", steps=10).run()
    (tmp_path / "run" / "checkpoints" / "step_00000010" / "__0_0.distcp").write_bytes(b"")
    toy.trainer(tmp_path / "run", steps=15).run()
    found, wanted = toy.contents(tmp_path / "run"), toy.contents(tmp_path / "whole")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    names = [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert names == ["step_00000010", "step_00000015"]
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == 15


def test_a_format_of_later_versions_is_refused(tmp_path):
    path = save(tmp_path, 5)
    about = json.loads((path / "about.json").read_text())
    (path / "about.json").write_text(json.dumps({**about, "format": 2}))
    with pytest.raises(EngineError, match="has format 2, and this version reads 1; update turbocompile"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": torch.zeros(3), "y": torch.zeros(1)}, "lacks y; resume with the model"),
        ({}, "has x, which this run lacks"),
        ({"x": torch.zeros(4)}, r"has x of shape \(3,\), and this run's is \(4,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, tensors, message):
    save(tmp_path, 5)
    with pytest.raises(EngineError, match=message):
        checkpoint.load(checkpoint.newest(tmp_path), tensors)


class Tied(nn.Module):
    """A weight under two names, a buffer, and a weight that is not trained."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("offset", torch.full((3,), 0.5))

    def forward(self, x):
        return self.second(self.first(x)) * self.fixed + self.offset


def test_weights_are_read_without_a_trainer(tmp_path):
    def batches(step):
        return {"x": torch.ones(2, 3) * (step + 1)}

    def objective(model, batch):
        return model(batch["x"]).square().mean(), {}

    trainer = Trainer(Tied(), batches, objective, toy.config(steps=6, ema_power=0.2), tmp_path, show=False)
    trainer.run()
    for read, wanted in (
        (read_weights(tmp_path), trainer.ema_state_dict()),
        (read_weights(tmp_path, ema=False), trainer.state_dict()),
    ):
        assert list(read) == list(Tied().state_dict())
        assert all(torch.equal(read[name], wanted[name]) for name in wanted)
        assert torch.equal(read["first.weight"], read["second.weight"])
        Tied().load_state_dict(read)
    assert not torch.equal(read_weights(tmp_path)["first.weight"], trainer.state_dict()["first.weight"])
    assert torch.equal(trainer.ema_state_dict()["fixed"], torch.ones(3))


def test_weights_that_are_not_there_are_asked_for_in_vain(tmp_path):
    with pytest.raises(EngineError, match="has no checkpoint; give the folder of a run"):
        read_weights(tmp_path)
    toy.trainer(tmp_path, steps=2, ema_power=None).run()
    with pytest.raises(EngineError, match="has no moving averages; read it with ema=False"):
        read_weights(tmp_path)
    assert read_weights(tmp_path, ema=False).keys() == toy.network().state_dict().keys()
