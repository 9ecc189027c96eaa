"""The training loop: stateless data, a deterministic objective, AdamW, moving averages, exact resume.

    trainer = Trainer(model, data, objective, TrainConfig(steps=10_000, ema_power=0.1), Path("run"), device="cuda")
    result = trainer.run()           # after a kill, call it again: the run continues from the newest checkpoint
    weights = trainer.ema_state_dict()

`data(step)` returns the global batch of a step, and must depend on the step's number alone; it draws noise from
`step_generator(seed, step)`. `objective(model, batch)` returns the loss, a mean over the batch, and scalar metrics to
log. It must call the model itself, not the model's parts, and draw no random numbers. A run that was killed and resumed
then has the same bits as a run that was not, and several processes learn the same weights as one process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from turbocompile.errors import EngineError, RecipeError, TurbocompileError, UnsupportedError
from turbocompile.training import checkpoint, parallel
from turbocompile.training.config import FREE, TrainConfig, ema_weight, learning_rate
from turbocompile.training.ema import Ema
from turbocompile.training.metrics import MetricsLog, Window, average
from turbocompile.training.muon import Muon, parameter_groups

Batch = Mapping[str, torch.Tensor]
Data = Callable[[int], Batch]
Objective = Callable[[nn.Module, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]

WARMUP = 3  # eager steps before the CUDA graph is captured; in these steps libraries choose algorithms and allocate


def step_generator(seed: int, step: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator for the random draws of one step, which depends on seed and step alone.

    torch's CPU generator uses only 32 bits of its seed. These bits are a bijection of the step, so that no two steps of
    a run share their draws. MurmurHash3's finalizer mixes the bits, so that neighbouring seeds start far apart.
    """
    x = (step + 0x9E3779B1 * (seed + 1)) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    generator = torch.Generator(device)
    generator.manual_seed(((seed & 0x7FFFFFFF) << 32) | x)
    return generator


@dataclass(frozen=True)
class Result:
    """The result of a run."""

    step: int  # how many steps are done
    finished: bool  # False if max_seconds stopped the run
    seconds: float  # wall time of the whole training, including the runs before a resume
    metrics: dict[str, float]  # the last line of metrics; empty if this run wrote no line
    checkpoint: Path  # the folder of the last checkpoint


class Trainer:
    """Trains `model`, whose trained parameters are float32, in place; the module says how.

    folder: for checkpoints and metrics. compile: applies torch.compile to the model's call. show: prints progress to
    stderr. Raises RecipeError for options or parameters that do not fit together, and UnsupportedError for a device
    that is missing or does not support the options.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        objective: Objective,
        config: TrainConfig,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        compile: bool = False,
        show: bool = True,
    ) -> None:
        self.data, self.objective, self.config, self.folder, self.show = data, objective, config, Path(folder), show
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None and torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())  # the device that init_distributed chose
        _check_device(config, self.device)
        self.model = _place(model, self.device, compile)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        _check_parameters(self.parameters)
        self.lr = torch.zeros(
            (), device=self.device
        )  # a tensor, so that a captured graph reads the present step's rate
        self.optimizer = _optimizer(self.model, self.parameters, self.lr, config)
        averaged = config.ema_decay is not None or config.ema_power is not None
        self.ema = Ema(list(self.parameters.values())) if averaged else None
        self.window = Window(config.log_every, self.device)
        self.step, self.seconds, self.began = 0, 0.0, time.perf_counter()
        self.names: tuple[str, ...] = ()
        self.graph: _Graph | None = None

    def run(self) -> Result:
        """Trains to the last step, or until max_seconds are over, from the newest whole checkpoint if there is one.

        Raises EngineError if the checkpoint does not fit this run, and TurbocompileError if the loss or the gradient is
        not finite; the last checkpoint is then of an earlier, finite step.
        """
        with _flags(self.config.deterministic):
            saved = self._resume()
            log = self._log()
            try:
                return self._loop(log, saved)
            finally:
                if log is not None:
                    log.close()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of the model's unsharded weights, under the model's own names; every process must call this."""
        return {name: parallel.full(v.detach()).clone() for name, v in self.model.state_dict().items()}

    def ema_state_dict(self) -> dict[str, torch.Tensor]:
        """The state dict with moving averages instead of trained weights; every process must call this.

        Raises RecipeError if the run keeps no averages.
        """
        if self.ema is None:
            raise RecipeError("the configuration has no moving average; set ema_decay or ema_power")
        averages = {name: parallel.full(a).clone() for name, a in self._averages().items()}
        return self.state_dict() | averages

    # ---- the loop

    def _loop(self, log: MetricsLog | None, saved: Path | None) -> Result:
        config, metrics, samples = self.config, dict[str, float](), 0
        began = line_at = time.perf_counter()
        self.began = began - self.seconds
        over = False
        while self.step < config.steps and not over:
            samples += self._advance()
            last, over = self.step == config.steps, self._time_is_over(began)
            if self.step % config.log_every == 0 or last:
                metrics = self._line(log, samples, line_at)
                line_at, samples = time.perf_counter(), 0
            if self.step % config.checkpoint_every == 0 or last or over:
                saved = self._save(log)
        assert saved is not None  # the loop has written a checkpoint, or the run resumed from a finished checkpoint
        return Result(self.step, self.step == config.steps, self.seconds, metrics, saved)

    def _advance(self) -> int:
        """Does one step without waiting for the device; returns the size of the global batch."""
        batch = parallel.local_part(self.data(self.step))
        size = next(iter(batch.values())).shape[0] * parallel.world_size()
        self.lr.fill_(learning_rate(self.config, self.step))
        if self.ema is not None:
            self.ema.weight.fill_(ema_weight(self.config, self.step))
        if self.config.cuda_graph:
            self.graph = self.graph or _Graph(self._compute)
            row = self.graph(batch, self.device)
        else:
            row = self._compute({name: _move(value, self.device) for name, value in batch.items()})
        self.window.add(self.names, row)
        self.step += 1
        return size

    def _compute(self, batch: Batch) -> torch.Tensor:
        """Runs forward, backward, clipping, optimizer and averages; returns loss, gradient norm and metrics,
        float32 (n,).
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            loss, metrics = self.objective(self.model, batch)
        loss.backward()
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update()
        self.names = ("loss", "grad_norm", *metrics)
        return torch.stack([value.detach().float().reshape(()) for value in (loss, norm, *metrics.values())])

    def _clip(self) -> torch.Tensor:
        """Clips the global gradient norm; returns the norm before clipping, a float32 scalar."""
        parameters = [p for p in self.parameters.values() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        if self.config.grad_clip is not None:
            clip_grads_with_norm_(parameters, self.config.grad_clip, norm, foreach=True)
        return parallel.full(norm)

    def _time_is_over(self, began: float) -> bool:
        """Whether max_seconds are over.

        Rank 0 decides for all processes, and with several processes only at lines of metrics, because they wait for the
        decision.
        """
        if self.config.max_seconds is None or (parallel.world_size() > 1 and self.step % self.config.log_every):
            return False
        return parallel.broadcast(time.perf_counter() - began > self.config.max_seconds)

    # ---- metrics and checkpoints

    def _log(self) -> MetricsLog | None:
        if parallel.rank() != 0:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        return MetricsLog(self.folder, self.step, self.config.steps, show=self.show)

    def _line(self, log: MetricsLog | None, samples: int, since: float) -> dict[str, float]:
        metrics = average(self._finite_rows())
        self.window.start()
        speed = samples / max(time.perf_counter() - since, 1e-9)
        lr = learning_rate(self.config, self.step - 1)
        metrics |= {"lr": lr, "seconds": self.seconds, "samples_per_second": speed}
        if log is not None:
            log.write(self.step, metrics)
        return metrics

    def _finite_rows(self) -> list[dict[str, float]]:
        rows = self.window.rows()  # waits for the device, so the clock is read after it
        self.seconds = time.perf_counter() - self.began
        for step, row in enumerate(rows, self.step - len(rows) + 1):
            for name in ("loss", "grad_norm"):
                if not abs(row[name]) < float("inf"):
                    text = f"{name} is {row[name]} at step {step}"
                    raise TurbocompileError(f"{text}; lower lr or grad_clip, or look at the data of step {step - 1}")
        return rows

    def _save(self, log: MetricsLog | None) -> Path:
        about = {
            "config": dataclasses.asdict(self.config),
            "window": self._finite_rows(),  # raises before the save, because a broken state must not replace a good one
            "seconds": self.seconds,
        }
        if log is not None:
            log.sync()
        return checkpoint.save(self._root, self.step, self._tensors(), about, self.config.keep)

    @property
    def _root(self) -> Path:
        return self.folder / "checkpoints"

    def _tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of a checkpoint by name, as views, so that they can be saved or loaded in place."""
        tensors = {f"model.{name}": value.detach() for name, value in self.model.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema.{name}": value for name, value in self._averages().items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def _averages(self) -> dict[str, torch.Tensor]:
        """The moving averages under all names of their parameters, because a tied weight has several names."""
        assert self.ema is not None
        of = {id(p): a for p, a in zip(self.ema.parameters, self.ema.averages, strict=True)}
        named = self.model.named_parameters(remove_duplicate=False)
        return {name: of[id(p)] for name, p in named if id(p) in of}

    def _resume(self) -> Path | None:
        """Loads the newest whole checkpoint; returns its path, or None if there is no checkpoint."""
        if parallel.rank() == 0:
            checkpoint.clean(self._root)
        found = parallel.broadcast(checkpoint.newest(self._root) if parallel.rank() == 0 else None)
        if found is None:
            return None
        _check_config(found, self.config)
        checkpoint.load(found, self._tensors())
        self.step, self.seconds = found.step, found.about["seconds"]
        self.window.start(found.about["window"])
        return found.path


class _Graph:
    """A step as a CUDA graph, which is captured after `WARMUP` eager steps, and replayed from then on.

    Inputs are copied into static buffers. The eager steps run on the capture's stream, because capturing demands it.
    They train the model like all other steps, so that no state has to be restored after them.
    """

    def __init__(self, compute: Callable[[Batch], torch.Tensor]) -> None:
        self.compute, self.calls = compute, 0
        self.stream = torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()
        self.inputs: dict[str, torch.Tensor] = {}
        self.row = torch.zeros(0)

    def __call__(self, batch: Batch, device: torch.device) -> torch.Tensor:
        if not self.inputs:
            self.inputs = {name: torch.empty_like(value, device=device) for name, value in batch.items()}
        self._copy(batch)
        self.calls += 1
        if self.calls <= WARMUP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                row = self.compute(self.inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return row
        if self.calls == WARMUP + 1:
            with torch.cuda.graph(self.graph, stream=self.stream):  # records the step without running it
                self.row = self.compute(self.inputs)
        self.graph.replay()
        return self.row

    def _copy(self, batch: Batch) -> None:
        shapes = {name: (value.shape, value.dtype) for name, value in batch.items()}
        static = {name: (value.shape, value.dtype) for name, value in self.inputs.items()}
        if shapes != static:
            raise RecipeError(f"cuda_graph needs batches of one shape: the first was {static}, now there is {shapes}")
        for name, value in batch.items():
            self.inputs[name].copy_(_pinned(value), non_blocking=True)


def _pinned(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().pin_memory() if value.device.type == "cpu" else value


def _move(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device, through pinned memory, because a copy from pageable memory waits for the device."""
    return _pinned(value).to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def _check_device(config: TrainConfig, device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("there is no CUDA device here; train with device='cpu'")
    if config.cuda_graph and device.type != "cuda":
        raise UnsupportedError(f"cuda_graph needs a CUDA device, not {device}; leave it off")
    if config.cuda_graph and parallel.world_size() > 1:
        raise UnsupportedError(
            "cuda_graph works in one process alone: FSDP's collectives are not captured; leave it off"
        )


def _check_parameters(parameters: Mapping[str, torch.Tensor]) -> None:
    if not parameters:
        raise RecipeError("the model has no parameter to train; set requires_grad on some")
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise RecipeError(
                f"{name} is {kind}; trained weights are float32 (precision='bfloat16' casts where it helps)"
            )


def _place(model: nn.Module, device: torch.device, compile: bool) -> nn.Module:
    model = model.to(device).train()
    if parallel.world_size() > 1:
        parallel.shard(model, device, compile=compile)
    elif compile:
        model.compile(dynamic=False)
    return model


def _optimizer(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], lr: torch.Tensor, config: TrainConfig
) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return _adamw(parameters, lr, config)
    return Muon(parameter_groups(model, config.weight_decay), lr=lr, betas=config.betas, eps=config.eps)


def _adamw(parameters: Mapping[str, nn.Parameter], lr: torch.Tensor, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW whose state exists from the start, so that a checkpoint can be read into the state."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    # Biases and norms get no decay, because decay would shrink the activations.
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if group
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=lr, betas=config.betas, eps=config.eps, fused=True, capturable=config.cuda_graph
    )
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter.detach()),
            "exp_avg_sq": torch.zeros_like(parameter.detach()),
        }
    return optimizer


def _check_config(found: checkpoint.Checkpoint, config: TrainConfig) -> None:
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    then: dict[str, Any] = found.about["config"]
    for name in now:
        if name not in FREE and now[name] != then.get(name):
            text = f"{found.path} was trained with {name}={then.get(name)}, and now it is {now[name]}"
            raise EngineError(f"{text}; set it back, or use another folder")
    if found.step > config.steps:
        raise EngineError(f"{found.path} is beyond the last step, {config.steps}; raise steps, or use another folder")


@contextlib.contextmanager
def _flags(deterministic: bool) -> Iterator[None]:
    """Sets torch's switches for a run, and restores them."""
    cudnn = torch.backends.cudnn
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
    )
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, deterministic cuBLAS calls raise
    try:
        torch.use_deterministic_algorithms(deterministic or before[0])
        cudnn.deterministic, cudnn.benchmark = deterministic or before[2], not deterministic
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = before[2:]
