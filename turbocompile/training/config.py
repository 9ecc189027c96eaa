"""The options of a training run, and the schedules that follow from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from turbocompile.errors import RecipeError
from turbocompile.recipe.fields import Section
from turbocompile.training.ema import power_gamma

# Fields that a resumed run may change, because they do not affect the steps before the resume. `decay` is among them,
# so that one checkpoint of the phase of constant rate can be decayed over several lengths.
FREE = ("steps", "decay", "checkpoint_every", "keep", "log_every", "deterministic", "cuda_graph", "max_seconds")


def _field(help: str, default: Any = dataclasses.MISSING, **bounds: Any) -> Any:
    """A field with its meaning, `help`, and its bounds `minimum`, `above`, `maximum`, `choices`, which Section
    checks.
    """
    return dataclasses.field(default=default, metadata={"help": help, **bounds})


@dataclass(frozen=True)
class TrainConfig(Section):
    """The options of a run. Raises RecipeError, which names the field, for a value that cannot be used."""

    steps: int = _field("Optimizer steps in all, those before a resume included.", minimum=1)
    seed: int = _field("The seed that the caller's data passes to step_generator(seed, step).", 0, minimum=0)
    optimizer: str = _field("muon: Muon for hidden weights, AdamW for others.", "adamw", choices=("adamw", "muon"))
    lr: float = _field("The highest learning rate, of Muon and of AdamW.", 1e-3, above=0.0)
    betas: tuple[float, float] = _field("AdamW's decays of the two moments.", (0.9, 0.99), minimum=0.0)
    eps: float = _field("AdamW's term in the denominator.", 1e-8, above=0.0)
    weight_decay: float = _field("The decay of tensors of 2 dimensions or more; others have none.", 0.01, minimum=0.0)
    warmup: int = _field("Steps over which the learning rate rises linearly from 0.", 100, minimum=0)
    decay: float = _field(
        "Share of the steps, at the end, over which the rate falls to 0.", 0.0, minimum=0.0, maximum=1.0
    )
    grad_clip: float | None = _field("The largest global gradient norm; None clips nothing.", 1.0, above=0.0)
    ema_decay: float | None = _field("Constant decay of the weights' moving average.", None, minimum=0.0, maximum=1.0)
    ema_power: float | None = _field("Relative width of a power EMA, e.g. 0.1.", None, above=0.0, maximum=0.28)
    precision: str = _field("Of the forward pass: bfloat16 is autocast.", "float32", choices=("float32", "bfloat16"))
    checkpoint_every: int = _field("Steps between checkpoints.", 1000, minimum=1)
    keep: int = _field("How many of the newest checkpoints are kept.", 2, minimum=1)
    log_every: int = _field("Steps between lines of metrics, which are averages over these steps.", 50, minimum=1)
    deterministic: bool = _field("Gives the same bits in every run on the same device, and is slower.", False)
    cuda_graph: bool = _field("Replays a step as one CUDA graph, for models bound by kernel launches.", False)
    max_seconds: float | None = _field("Wall time after which this run stops with a checkpoint.", None, above=0.0)

    def check(self) -> None:
        if len(self.betas) != 2 or max(self.betas) >= 1:
            raise RecipeError(f"betas must be two numbers below 1, not {self.betas}")
        if self.ema_decay == 1:
            raise RecipeError("ema_decay must be below 1, not 1: the average would stay what the weights began with")
        if self.ema_decay is not None and self.ema_power is not None:
            raise RecipeError("ema_decay and ema_power exclude each other; set one of them")


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step (counted from 0): linear warm-up, then constant, then linear decay (WSD).

    The last step has a rate above 0: with D = decay * steps, its rate is lr / D. Source: warmup-stable-decay, arXiv
    2404.06395.
    """
    rise = (step + 1) / config.warmup if config.warmup else 1.0
    length = config.decay * config.steps
    fall = (config.steps - step) / length if length else 1.0
    return config.lr * min(1.0, rise, fall)


def ema_weight(config: TrainConfig, step: int) -> float:
    """The weight 1 - beta of the new parameters in the moving average at a step (counted from 0); see ema.py.

    0 if the run keeps no average.
    """
    if config.ema_power is not None:
        return 1.0 - (1.0 - 1.0 / (step + 1)) ** (power_gamma(config.ema_power) + 1.0)
    if config.ema_decay is not None:
        return 1.0 - config.ema_decay
    return 0.0
