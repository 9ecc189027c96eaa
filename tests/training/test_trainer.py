"""The loop against one written by hand, and what it refuses."""

from __future__ import annotations

import gc
import math

import pytest
import torch
import toy
from torch import nn

from turbocompile.errors import EngineError, RecipeError, TurbocompileError, UnsupportedError
from turbocompile.training import Trainer, step_generator
from turbocompile.training.config import ema_weight, learning_rate

EPS = torch.finfo(torch.float32).eps


def by_hand(config):
    """The same training with torch's plain optimizer, in a loop that hides nothing."""
    model = toy.network()
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=config.betas, eps=config.eps, foreach=False)
    averages = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        loss, _ = toy.objective(model, toy.data(step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf, foreach=False)
        optimizer.step()
        for name, p in model.named_parameters():
            averages[name].lerp_(p.detach(), ema_weight(config, step))
    return model.state_dict(), averages


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grad_clip": 0.1, "decay": 0.5},
        {"grad_clip": None, "weight_decay": 0.5, "ema_power": None, "ema_decay": 0.7},
    ],
)
def test_training_equals_a_loop_written_by_hand(tmp_path, changes):
    trainer = toy.trainer(tmp_path, **changes)
    trainer.run()
    weights, averages = by_hand(trainer.config)
    # The optimizers round an update differently, by a few eps of it (lr), and the weights, below 2, by an eps each.
    # What follows in later gradients is damped by AdamW's eps (tests/training/test_parallel.py): at most as much again.
    tolerance = 2 * toy.STEPS * (8 * trainer.config.lr + 2) * EPS
    for found, wanted in ((trainer.state_dict(), weights), (trainer.ema_state_dict(), averages)):
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=tolerance)
    moved = max((weights[n] - v).abs().max().item() for n, v in toy.network().state_dict().items())
    assert moved > 100 * tolerance  # or the comparison would mean nothing


def test_training_lowers_the_loss(tmp_path):
    toy.trainer(tmp_path, steps=200, lr=1e-2, log_every=50, checkpoint_every=200, eps=1e-8).run()
    first, *_, last = toy.lines(tmp_path)
    assert last["loss"] < 0.8 * first["loss"]


def test_weight_decay_spares_vectors_and_what_is_not_trained(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def no_gradient(model, batch):
        return 0.0 * model(batch["x"]).sum(), {}

    config = toy.config(steps=3, weight_decay=0.5, warmup=0, lr=0.1)
    Trainer(model, lambda step: {"x": torch.ones(2, 3)}, no_gradient, config, tmp_path, show=False).run()
    after = model.state_dict()
    torch.testing.assert_close(after["0.weight"], before["0.weight"] * 0.95**3, rtol=4 * EPS, atol=0)  # 3 products
    assert all(torch.equal(after[name], before[name]) for name in ("0.bias", "1.weight", "1.bias"))


def test_bfloat16_is_of_the_forward_pass_alone(tmp_path):
    seen = set()

    def objective(model, batch):
        velocity = model(batch["noisy"], batch["timestep"])
        seen.add(velocity.dtype)
        return (velocity.float() - batch["noise"]).square().mean(), {}

    trainer = Trainer(
        toy.network(), toy.data, objective, toy.config(steps=4, precision="bfloat16"), tmp_path, show=False
    )
    trainer.run()
    assert seen == {torch.bfloat16}
    assert {value.dtype for value in toy.contents(tmp_path).values()} == {torch.float32}


def test_a_compiled_model_learns_the_same_under_the_same_names(tmp_path):
    for compile in (False, True):
        model, folder = toy.network(depth=1), tmp_path / str(compile)
        Trainer(model, toy.data, toy.objective, toy.config(), folder, compile=compile, show=False).run()
    found, wanted = toy.contents(tmp_path / "True"), toy.contents(tmp_path / "False")
    assert found.keys() == wanted.keys()
    # As for two processes (tests/training/test_parallel.py): the gradients are rounded otherwise, and no more.
    tolerance = toy.STEPS * (0.2 * (toy.BATCH * 17) ** 0.5 * 4 + 2) * EPS
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=tolerance)


def test_nothing_is_kept_from_step_to_step(tmp_path):
    alive = []

    def counting(step):
        if step in (2, 9, 23):  # the first steps make the buffer of the metrics
            gc.collect()
            alive.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
        return toy.data(step)

    toy.trainer(tmp_path, batches=counting).run()
    assert len(alive) == 3
    assert len(set(alive)) == 1


def test_the_draws_of_a_step_depend_on_seed_and_step_alone():
    draws = {(seed, step): torch.rand(4, generator=step_generator(seed, step)) for seed in (0, 1) for step in range(50)}
    assert torch.equal(draws[1, 7], torch.rand(4, generator=step_generator(1, 7)))
    assert len({tuple(d.tolist()) for d in draws.values()}) == 100


def test_no_two_steps_share_a_seed():
    seeds = {step_generator(5, step).initial_seed() & 0xFFFFFFFF for step in range(50_000)}
    assert len(seeds) == 50_000


@pytest.mark.parametrize(("bad", "checkpoint_every"), [(6, 5), (5, 6)])
def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_last_checkpoint(tmp_path, bad, checkpoint_every):
    """It is noticed at the line of step 8, or before that by the checkpoint of step 6."""

    def batches(step):
        return {name: value / (step != bad) for name, value in toy.data(step).items()}

    with pytest.raises(TurbocompileError, match=f"loss is (nan|inf) at step {bad + 1}; .* the data of step {bad}"):
        toy.trainer(tmp_path, batches=batches, checkpoint_every=checkpoint_every).run()
    kept = [p.name for p in (tmp_path / "checkpoints").glob("*")]
    assert kept == (["step_00000005"] if checkpoint_every == 5 else [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, r"was trained with lr=0.001, and now it is 0.5; set it back, or use another folder"),
        ({"ema_power": 0.2}, r"ema_power=0.1, and now it is 0.2"),
        ({"betas": (0.8, 0.99)}, r"betas=\[0.9, 0.99\], and now it is \[0.8, 0.99\]"),
        ({"steps": 5}, r"is beyond the last step, 5; raise steps"),
    ],
)
def test_options_that_do_not_fit_a_checkpoint_are_refused(tmp_path, changes, message):
    toy.trainer(tmp_path, steps=8).run()
    with pytest.raises(EngineError, match=message):
        toy.trainer(tmp_path, **{"steps": 8, **changes}).run()


def test_options_that_change_no_step_so_far_may_change(tmp_path):
    toy.trainer(tmp_path, steps=8).run()
    changes = {"steps": 10, "decay": 0.2, "keep": 1, "checkpoint_every": 3, "log_every": 2, "max_seconds": 60.0}
    assert toy.trainer(tmp_path, **changes).run().step == 10


def test_another_model_is_refused_by_the_first_tensor_that_differs(tmp_path):
    toy.trainer(tmp_path, steps=5).run()
    wider = Trainer(toy.network(width=20), toy.data, toy.objective, toy.config(), tmp_path, show=False)
    with pytest.raises(EngineError, match=r"has ema.blocks.0.0.bias of shape \(16,\), and this run's is \(20,\)"):
        wider.run()
    deeper = Trainer(toy.network(depth=4), toy.data, toy.objective, toy.config(), tmp_path, show=False)
    with pytest.raises(EngineError, match=r"lacks ema.blocks.3.0.bias; resume with the model"):
        deeper.run()


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="cuda_graph needs a CUDA device, not cpu; leave it off"):
        toy.trainer(tmp_path, cuda_graph=True)
    for model, message in (
        (nn.Linear(2, 2).bfloat16(), "weight is bfloat16; trained weights are float32"),
        (nn.Linear(2, 2).requires_grad_(False), "the model has no parameter to train"),
    ):
        with pytest.raises(RecipeError, match=message):
            Trainer(model, toy.data, toy.objective, toy.config(), tmp_path)
    with pytest.raises(RecipeError, match="no moving average; set ema_decay or ema_power"):
        toy.trainer(tmp_path, ema_power=None).ema_state_dict()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="there is no CUDA device here"):
        toy.trainer(tmp_path, device="cuda")


def test_torch_is_left_as_it_was(tmp_path):
    switches = (torch.are_deterministic_algorithms_enabled, lambda: torch.backends.cudnn.benchmark)
    before = [read() for read in switches]
    during = []

    def batches(step):
        during.append([read() for read in switches])
        return toy.data(step)

    toy.trainer(tmp_path, batches=batches, steps=2, deterministic=True).run()
    assert during == [[True, False]] * 2
    assert [read() for read in switches] == before


# ---- on a GPU

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class TestCuda:
    pytestmark = gpu

    @pytest.mark.parametrize("options", [{}, {"cuda_graph": True}, {"precision": "bfloat16"}])
    def test_a_resumed_run_has_the_same_bits(self, tmp_path, options):
        common = {"device": "cuda", "deterministic": True, "steps": 20, **options}
        toy.trainer(tmp_path / "whole", **common).run()
        toy.trainer(tmp_path / "cut", **{**common, "steps": 10}).run()
        toy.trainer(tmp_path / "cut", **common).run()
        found, wanted = toy.contents(tmp_path / "cut"), toy.contents(tmp_path / "whole")
        assert {name for name in wanted if not torch.equal(found[name], wanted[name])} == set()

    def test_a_cuda_graph_replays_the_eager_step(self, tmp_path):
        for graph in (False, True):
            toy.trainer(tmp_path / str(graph), device="cuda", deterministic=True, decay=0.5, cuda_graph=graph).run()
        found, wanted = toy.contents(tmp_path / "True"), toy.contents(tmp_path / "False")
        assert {name for name in wanted if not torch.equal(found[name], wanted[name])} == set()  # the same kernels
        for a, b in zip(toy.lines(tmp_path / "True"), toy.lines(tmp_path / "False"), strict=True):
            assert a == b

    @pytest.mark.parametrize("graph", [False, True])
    def test_no_step_waits_for_the_device(self, tmp_path, graph):
        """torch raises where a call waits; lines of metrics, every 4 steps, and the capture may."""

        def batches(step):
            free = step % 4 == 3 or step < 8
            torch.cuda.set_sync_debug_mode("default" if free else "error")
            return toy.data(step)

        try:
            toy.trainer(tmp_path, batches=batches, device="cuda", checkpoint_every=24, cuda_graph=graph).run()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_graph_needs_batches_of_one_shape(self, tmp_path):
        def batches(step):
            return {name: value[: 8 - step] for name, value in toy.data(step).items()}

        with pytest.raises(RecipeError, match="cuda_graph needs batches of one shape"):
            toy.trainer(tmp_path, batches=batches, device="cuda", cuda_graph=True).run()
