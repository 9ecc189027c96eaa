"""Random DiTs as people have them: wrapped, hooked, with constants of each layer, tied weights, tables that are kept,
options of many kinds, called in many ways. `trial(seed)` compiles one and compares it with itself.

As a script it makes many trials and counts what came of them.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib.util
import itertools
import logging
import random
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy  # noqa: F401 (its first import adds a filter of warnings to the process)
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

if "random_dits" not in sys.modules:  # as in tests/conftest.py, for a script
    spec = importlib.util.spec_from_file_location("random_dits", Path(__file__).parent / "random_dits.py")
    sys.modules["random_dits"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["random_dits"])
import random_dits

import turbocompile
from turbocompile.errors import TurbocompileError

TABLES: dict[int, Tensor] = {}
STEPS = {"n": 0}


@functools.lru_cache
def cached_table(n: int) -> Tensor:
    return torch.arange(n).float().cos()


def table_of_file(n: int) -> Tensor:
    if n not in TABLES:
        TABLES[n] = torch.arange(n).float().cos()
    return TABLES[n]


class Model(nn.Module):
    """A DiT with options: a gain, a flag, a size that groups tokens, a list of shifts; and what it keeps."""

    def __init__(self, net: nn.Module, table: str, counting: str) -> None:
        super().__init__()
        self.net, self.table, self.counting = net, table, counting
        self.step, self.kept = 0, None

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor,
        mask: Tensor | None = None,
        gain: float = 1.0,
        skip: bool = False,
        group: int | None = None,
        shifts: Any = (),
        **named: Any,
    ) -> Any:
        y = x * gain if skip else self.net(x, timestep, text, mask) * gain
        if group is not None:
            y = y[:, : y.shape[1] // group * group].unflatten(1, (-1, group)).flip(2).flatten(1, 2)
        for i, shift in enumerate(shifts):
            y = y + i * shift
        if self.table == "cache":
            y = y * cached_table(y.shape[-1])
        elif self.table == "file":
            y = y * table_of_file(y.shape[-1])
        elif self.table == "attribute":
            self.kept = torch.arange(y.shape[-1]).float().cos() if self.kept is None else self.kept
            y = y * self.kept
        if self.counting != "none":
            self.step += 1
            STEPS["n"] += self.counting == "file"
        if self.counting == "attribute":
            y = y * (1 + self.step % 2)
        elif self.counting == "file":
            y = y * (1 + STEPS["n"] % 3)
        return {"y": y, "more": [y.mean(), None]} if named.get("more") else y


def of_keywords(model: nn.Module) -> nn.Module:
    """What looks at how it is called, as diffusers' scale of a LoRA does."""
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        y = inner(*args, **kwargs)
        return y * (1 + len(args)) if isinstance(y, Tensor) and "gain" in kwargs else y

    model.forward = forward
    return model


def with_partial(model: nn.Module) -> nn.Module:
    model.forward = functools.partial(lambda f, *args, **kwargs: f(*args, **kwargs), model.forward)
    return model


def with_child(model: nn.Module) -> nn.Module:
    inner = model.net.head.forward
    model.net.head.forward = lambda x: inner(x) * model.net.head.bias.abs().sum()
    return model


def with_hooks(model: nn.Module) -> nn.Module:
    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "more": "mask" in kwargs}

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.net.register_forward_hook(lambda module, args, out: out + model.net.head.weight.sum())
    return model


def tied(model: nn.Module) -> nn.Module:
    first, last = model.net.blocks[0], model.net.blocks[-1]
    last.mlp = first.mlp
    return model


WRAPS = (lambda m: m, of_keywords, with_partial, with_child, with_hooks, tied)


def process() -> tuple[Any, ...]:
    """What belongs to the process, and nobody may leave changed."""
    loggers = [logging.getLogger(n).level for n in ("torch", "torch.export", "")]
    flags = torch.is_grad_enabled(), torch.compiler.is_exporting(), torch.get_default_dtype()
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    return loggers, flags, depth, sys.stderr, warnings.filters[:], torch.get_rng_state().tolist(), random.getstate()


def inside(model: nn.Module) -> tuple[Any, ...]:
    """The model's attributes, hooks, parameters, by identity, and the values of its tensors."""
    parts = []
    for module in model.modules():
        held = {k: v for k, v in vars(module).items() if not isinstance(v, (dict, set))}
        dicts = {k: dict(v) for k, v in vars(module).items() if isinstance(v, dict)}
        parts.append(
            ({k: id(v) for k, v in held.items()}, {k: {n: id(t) for n, t in d.items()} for k, d in dicts.items()})
        )
        assert not any(isinstance(t, FakeTensor) for d in dicts.values() for t in d.values())
    return parts, [t.clone() for t in (*model.parameters(), *model.buffers())], dict(STEPS), dict(TABLES)


def same(a: Any, b: Any, bound: float) -> bool:
    """Whether two results are of one form, and as near as rounding explains."""
    if isinstance(b, Tensor):
        return (
            type(a) is type(b) is Tensor
            and a.shape == b.shape
            and a.dtype == b.dtype
            and bool((a.double() - b.double()).abs().max() <= bound * (b.double().abs().max() + 1e-30))
        )
    if isinstance(b, dict):
        return isinstance(a, dict) and list(a) == list(b) and all(same(a[k], b[k], bound) for k in b)
    if isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y, bound) for x, y in zip(a, b, strict=True))
    return a == b


def options(rng: random.Random) -> dict[str, Any]:
    """Plain arguments of a call."""
    drawn: dict[str, Any] = {}
    if rng.random() < 0.4:
        drawn["gain"] = rng.choice((0.5, 2.0, 1.0, -1.5))
    if rng.random() < 0.2:
        drawn["skip"] = rng.random() < 0.5
    if rng.random() < 0.3:
        drawn["group"] = rng.choice((None, 1, 2))
    if rng.random() < 0.3:
        drawn["shifts"] = rng.choice(((), (1, 2), [0.5, 0.25], [3]))
    if rng.random() < 0.2:
        drawn["more"] = rng.random() < 0.5
    return drawn


@dataclass(frozen=True)
class Choices:
    """How a model is made and called. positional, options: of each call."""

    net: dict[str, Any]
    wrap: Callable[[nn.Module], nn.Module]
    table: str
    counting: str
    train: bool
    positional: tuple[int, ...]
    options: tuple[dict[str, Any], ...]
    lazy: bool

    def pairs(self) -> set[tuple[Any, ...]]:
        """Each two of the choices. Models that are refused because they count their calls are apart from the others."""
        o = vars(random_dits.draw(0, **self.net))
        made = {k: o[k] for k in ("depth", "heads", "batch", "cross", "layer_constants", *WRITTEN)}
        made |= {"wrap": WRAPS.index(self.wrap), "table": self.table, "train": self.train, "lazy": self.lazy}
        made |= {"calls": len(self.options), "positional": self.positional[0]}
        made |= {k: str(self.options[0].get(k, "absent")) for k in ("gain", "skip", "group", "shifts", "more")}
        if self.counting in STATE:
            return {(self.counting, k, v) for k, v in made.items() if k in ("wrap", "table", "lazy", "calls", "train")}
        return set(itertools.combinations([*made.items(), ("counting", self.counting)], 2))


STATE = ("attribute", "file")
WRITTEN = (
    "qkv",
    "qkv_bias",
    "layout",
    "attention",
    "mask",
    "qk_norm",
    "norm",
    "rope",
    "modulation",
    "gate",
    "mlp",
    "buffer",
)


def choose(seed: int) -> Choices:
    """The choices of a trial, without making its model."""
    rng = random.Random(seed)
    calls = rng.randint(1, 2)
    o = random_dits.draw(
        seed, layer_constants=rng.random() < 0.5, tokens=rng.randint(6, 12), depth=rng.randint(1, 3),
        heads=rng.randint(1, 2), head_dim=8,
    )  # fmt: skip
    return Choices(
        vars(o),
        rng.choice(WRAPS),
        rng.choice(("none", "cache", "file", "attribute")),
        rng.choice(("none", "none", "none", "harmless", *STATE)),
        rng.random() < 0.3,
        tuple(rng.randint(0, 3) for _ in range(calls)),
        tuple(options(rng) for _ in range(calls)),
        rng.random() < 0.3,
    )


def trial(seed: int, passes: bool = False) -> str:
    """Compiles one model in one way and compares it, itself and the process. Raises AssertionError with the seed.

    passes: with all exact rewrites. Returns what came of it: "equal", or the beginning of the sentence that refused.
    """
    chosen = choose(seed)
    lazy, calls = chosen.lazy, []
    net, drawn = random_dits.random_dit(seed, calls=len(chosen.options), **chosen.net)
    model = chosen.wrap(Model(net, chosen.table, chosen.counting))
    model.train(chosen.train)
    for (args, kwargs), count, more in zip(drawn, chosen.positional, chosen.options, strict=True):
        named = dict(zip(("x", "timestep", "text")[count:], args[count:], strict=True))
        calls.append((args[:count], named | kwargs | more))
    before, was = process(), inside(model)
    try:
        with torch.no_grad():
            engine = turbocompile.optimize(model, None if lazy else calls, recipe={} if passes else {"passes": "off"})
            first = [engine(*args, **kwargs) for args, kwargs in calls]
            second = [engine(*args, **kwargs) for args, kwargs in reversed(calls)]
        outcome = "equal"
    except TurbocompileError as error:
        outcome = str(error)
    now, left = process(), inside(model)
    assert now == before, (seed, "the process was changed")
    assert left[0] == was[0], (seed, "the model's attributes were changed")
    assert left[2:] == was[2:], (seed, "a dictionary of the model's file was changed")
    assert all(torch.equal(a, b) for a, b in zip(left[1], was[1], strict=True)), (seed, "a tensor was changed")
    if outcome == "equal":
        assert model.counting not in STATE, (seed, "state between calls was not seen")
        bound = 1e-4 if passes else 1e-5  # a model's own rounding, some ten blocks of it where sums are made otherwise
        wanted = [eager(model, *call) for call in calls]
        for found, true in (*zip(first, wanted, strict=True), *zip(second, reversed(wanted), strict=True)):
            assert same(found, true, bound), (seed, "the engine is not the model")
    elif model.counting in STATE:
        assert "keeps something between calls" in outcome, (seed, outcome)
        return "state refused"
    return outcome if outcome == "equal" else outcome[:80]


def eager(model: nn.Module, args: Any, kwargs: Any) -> Any:
    mode = model.training
    try:
        with torch.no_grad():
            return model.eval()(*args, **kwargs)
    finally:
        model.train(mode)
        model.step, model.kept = 0, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after that long")
    parser.add_argument("--passes", type=int, default=10, help="every how many-th is compiled with the rewrites")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts: collections.Counter[str] = collections.Counter()
    started = time.perf_counter()
    for seed in range(given.first, given.first + given.number):
        if time.perf_counter() - started > given.seconds:
            break
        try:
            counts[trial(seed, passes=seed % given.passes == 0)] += 1
        except AssertionError as error:
            counts["WRONG"] += 1
            print("WRONG", error, flush=True)
        except Exception as error:
            counts[f"OTHER {type(error).__name__}"] += 1
            print("OTHER", seed, type(error).__name__, str(error)[:300], flush=True)
    print(dict(counts), flush=True)


if __name__ == "__main__":
    main()
