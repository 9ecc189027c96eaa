"""A small training run, for tests to run here, to kill in another process, and to run in several.

python toy.py kill FOLDER           each of MOMENTS in a process of its own, which kills itself then
python toy.py forever FOLDER        a run without end, to be killed from outside
torchrun toy.py distributed FOLDER  the runs that tests/training/test_parallel.py compares
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from turbocompile.training import (
    TrainConfig,
    Trainer,
    checkpoint,
    flow_matching_batch,
    flow_matching_loss,
    init_distributed,
    step_generator,
)

WIDTH, BATCH, STEPS = 6, 8, 24

# (function, which call of it): the process is killed before that call. A checkpoint, every 5 steps, asks for 6 fsyncs:
# of the metrics, the data, the metadata, about.json, the folder and the folder around it. It renames the metadata's
# file and the folder, and from the third on the oldest folder, before that is removed.
MOMENTS = {
    "before the first checkpoint": ("data", 4),
    "right after a checkpoint": ("data", 6),
    "within a line's window": ("data", 18),
    "at the last step": ("data", 24),
    "the metrics are not on disk": ("fsync", 7),
    "the data is not on disk": ("fsync", 8),
    "the metadata is not on disk": ("fsync", 9),
    "about.json is not on disk": ("fsync", 10),
    "the folder is not on disk": ("fsync", 11),
    "the new name is not on disk": ("fsync", 12),
    "the first checkpoint has no name yet": ("rename", 2),
    "the second checkpoint has no name yet": ("rename", 4),
    "the oldest is about to be removed": ("rename", 7),
    "the oldest is half removed": ("unlink", 2),
}


class Network(nn.Module):
    """A stack of residual blocks between two linears; the time enters as a feature."""

    def __init__(self, width: int = 16, depth: int = 3):
        super().__init__()
        self.into = nn.Linear(WIDTH + 1, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(depth)
        )
        self.out = nn.Linear(width, WIDTH)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        h = self.into(torch.cat([x, timestep[:, None] / 1000], dim=1))
        for block in self.blocks:
            h = h + block(h)
        return self.out(h)


def network(**changes) -> Network:
    torch.manual_seed(0)
    return Network(**changes)


def data(step: int) -> dict[str, torch.Tensor]:
    generator = step_generator(3, step)
    latents = torch.randn(BATCH, 1, generator=generator).expand(BATCH, WIDTH)  # a line: there is something to learn
    return flow_matching_batch(latents, generator, shift=3.0)


def objective(model, batch):
    velocity = model(batch["noisy"], batch["timestep"])
    return flow_matching_loss(velocity, batch["latents"], batch["noise"]), {"size": velocity.detach().square().mean()}


def config(**changes) -> TrainConfig:
    base = {"steps": STEPS, "seed": 3, "ema_power": 0.1, "warmup": 4, "checkpoint_every": 5, "log_every": 4}
    # A large eps keeps AdamW's update proportional to small gradients, so that rounding stays rounding.
    return TrainConfig(**{**base, "eps": 1e-2, **changes})


def trainer(folder: Path, *, batches=data, device="cpu", compile=False, **changes) -> Trainer:
    return Trainer(network(), batches, objective, config(**changes), folder, device=device, compile=compile, show=False)


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint of a run's folder."""
    return checkpoint.read(checkpoint.newest(folder / "checkpoints"))


def lines(folder: Path, clock: bool = False) -> list[dict[str, float]]:
    """metrics.jsonl, by default without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if clock or k not in ("seconds", "samples_per_second")} for line in found]


def kill_before(name: str, count: int) -> None:
    """Replaces a function by one that kills this process with SIGKILL when it is called for the count-th time."""
    owner = {"data": sys.modules[__name__]}.get(name, os)
    function, calls = getattr(owner, name), [0]

    def replacement(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, replacement)


def kill_all(root: Path) -> None:
    """Forks for each moment, before torch has started any thread of its own."""
    import torch.utils.tensorboard  # noqa: F401 (slow to import: once, not in each fork)

    for name, moment in MOMENTS.items():
        child = os.fork()
        if child == 0:
            kill_before(*moment)
            trainer(root / name, batches=lambda step: data(step)).run()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            raise SystemExit(f"{name}: the run ended by itself, with status {status}")


def distributed(root: Path) -> None:
    """Every run of several processes; `resumed` begins with what one process left there."""
    device = init_distributed("cpu")
    whole = trainer(root / "whole", device=device)
    whole.run()
    torch.save((whole.state_dict(), whole.ema_state_dict()), root / f"weights{os.environ['RANK']}.pt")
    trainer(root / "half", device=device, steps=STEPS // 2).run()
    if os.environ["RANK"] == "0":
        shutil.copytree(root / "half", root / "again")
    torch.distributed.barrier()
    trainer(root / "again", device=device).run()
    trainer(root / "resumed", device=device).run()
    stopped = trainer(root / "stopped", device=device, max_seconds=1e-6).run()
    trainer(root / "muon", device=device, optimizer="muon").run()
    if (stopped.step, stopped.finished) != (4, False):  # the first line of metrics
        raise SystemExit(f"max_seconds stopped at {stopped}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[2])
    if sys.argv[1] == "kill":
        kill_all(target)
    elif sys.argv[1] == "forever":
        trainer(target, steps=10**6, decay=0.0).run()
    else:
        distributed(target)
