"""Two processes learn what one does, and their checkpoints are each other's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
import toy
from torch import nn

from turbocompile.errors import RecipeError, UnsupportedError
from turbocompile.training import init_distributed, parallel

EPS = torch.finfo(torch.float32).eps

# How far the weights of two runs may part whose gradients are summed in another order. What is summed for an element of
# a gradient is below c = 4 (the test checks the gradient's norm). Sums of 8 samples with up to 17 products each differ
# by sqrt(8 * 17) * eps * c at random. AdamW moves a weight by lr * m / (sqrt(v) + eps_adam), whose derivative by the
# gradient is at most 2 * lr / eps_adam (lr 1e-3, eps_adam 1e-2), at each of 24 steps; adding to weights below 4 rounds
# by 2 eps.
GRADIENT = (toy.BATCH * 17) ** 0.5 * EPS * 4
WEIGHT = toy.STEPS * (2 * 1e-3 / 1e-2 * GRADIENT + 2 * EPS)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    toy.trainer(folder).run()
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The runs of toy.distributed on two gloo processes; `resumed` goes on from a run of one."""
    root = tmp_path_factory.mktemp("two")
    toy.trainer(root / "resumed", steps=toy.STEPS // 2).run()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, toy.__file__, "distributed", root], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return root


def assert_near(folder, reference, tolerance=WEIGHT):
    found, wanted = toy.contents(folder), toy.contents(reference)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def test_two_processes_learn_what_one_does(one, two):
    moved = max((v - toy.network().state_dict()[n.removeprefix("model.")]).abs().max().item()
                for n, v in toy.contents(one).items() if n.startswith("model."))  # fmt: skip
    assert moved > 100 * WEIGHT  # or being near would mean nothing
    assert max(line["grad_norm"] for line in toy.lines(one)) < 4
    assert_near(two / "whole", one)


def test_two_processes_log_what_one_does(one, two):
    found, wanted = toy.lines(two / "whole"), toy.lines(one)
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=100 * GRADIENT)  # of sums over about a thousand weights and products


def test_two_processes_learn_with_muon_what_one_does(two, tmp_path):
    toy.trainer(tmp_path, optimizer="muon").run()
    # A step is 0.2 sqrt(16) lr of an orthogonalized momentum. Newton-Schulz multiplies what is small in it, rounding
    # too, by up to 3.4445 at each of 5 iterations, after dividing it by its norm.
    norms = [v.norm() for name, v in toy.contents(tmp_path).items() if name.endswith(".1.weight.momentum")]
    assert len(norms) == 3
    assert min(norms) > 0.1
    tolerance = toy.STEPS * (0.2 * 16**0.5 * 1e-3 * 3.4445**5 * GRADIENT / 0.1 + 2 * EPS)
    assert_near(two / "muon", tmp_path, tolerance)


def test_resuming_with_as_many_processes_is_exact(two):
    found, wanted = toy.contents(two / "again"), toy.contents(two / "whole")
    assert {name for name in wanted if not torch.equal(found[name], wanted[name])} == set()
    assert toy.lines(two / "again") == toy.lines(two / "whole")


def test_two_processes_go_on_from_one(one, two):
    assert_near(two / "resumed", one)
    assert [line["step"] for line in toy.lines(two / "resumed")] == [line["step"] for line in toy.lines(one)]


def test_one_process_goes_on_from_two(one, two, tmp_path):
    shutil.copytree(two / "half", tmp_path / "half")
    toy.trainer(tmp_path / "half").run()
    assert_near(tmp_path / "half", one)


def test_every_process_has_the_whole_weights(two):
    saved = toy.contents(two / "whole")
    for rank in (0, 1):
        weights, averages = torch.load(two / f"weights{rank}.pt")
        for prefix, state in (("model.", weights), ("ema.", averages)):
            assert state.keys() == toy.network().state_dict().keys()
            assert all(type(v) is torch.Tensor and torch.equal(v, saved[prefix + n]) for n, v in state.items())


def test_repeated_blocks_are_the_members_of_the_outermost_lists():
    inner = nn.ModuleList([nn.Linear(1, 1)])
    model = nn.Sequential(nn.ModuleDict({"a": nn.ModuleList([nn.Sequential(inner), nn.Identity()])}), nn.Linear(1, 1))
    assert parallel.blocks(model) == list(model[0]["a"])


def test_a_batch_is_cut_into_contiguous_parts(monkeypatch):
    batch = {"x": torch.arange(6), "y": torch.arange(12).reshape(6, 2)}
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        parts.append(parallel.local_part(batch))
    assert [p["x"].tolist() for p in parts] == [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(torch.cat([p["y"] for p in parts]), batch["y"])
    with pytest.raises(RecipeError, match="a batch of 4 cannot be divided among 3 processes; make it a multiple of 3"):
        parallel.local_part({"x": torch.zeros(4)})


@pytest.mark.parametrize("batch", [{"x": torch.zeros(2), "y": torch.zeros(3)}, {"x": torch.zeros(())}, {}])
def test_a_batch_without_one_size_is_refused(batch):
    with pytest.raises(RecipeError, match="the tensors of a batch must have one size of dimension 0"):
        parallel.local_part(batch)


def test_cuda_graphs_are_for_one_process(monkeypatch, tmp_path):
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(UnsupportedError, match="cuda_graph works in one process alone"):
        toy.trainer(tmp_path, device="cuda", cuda_graph=True)


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert init_distributed("cpu") == torch.device("cpu")
    assert (parallel.world_size(), parallel.rank()) == (1, 0)
    assert parallel.broadcast("x") == "x"
