"""An engine's tuning: the configuration that each of its kernels is launched with on a card.

The kernels of an 8-bit linear compete on the card. An attention's configuration follows from the card, its format and
its blocks; it is kept so that an engine goes on with the configuration that it was built with. A build measures where
it has the card, and writes tuning.json into the engine's folder. `turbocompile tune` measures afterwards, for an engine
that was built elsewhere, and keeps the result in the user's cache, because a folder stays as it was built. A choice is
used only where it is a configuration that the kernel declares (backends/launchers.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, astuple
from typing import Any, TypeVar

import torch
from torch import fx

from turbocompile.backends import Tuning
from turbocompile.backends.launchers import (
    ATTENTIONS,
    LINEARS,
    AttentionSize,
    LinearSize,
    attention_size,
    linear_size,
)
from turbocompile.cache import cache_path
from turbocompile.errors import EngineError
from turbocompile.ir.program import Program
from turbocompile.ir.reading import Unreadable, plain, table

FILE = "tuning.json"
LEAST_PRODUCTS = 1 << 32  # of a linear whose kernels compete: four microseconds of an H200 at its full FP8 rate
Progress = Callable[[str, float], None]
Size = TypeVar("Size", LinearSize, AttentionSize)


def linears(programs: Mapping[str, Program]) -> list[LinearSize]:
    """The sizes of the 8-bit linears in all shapes and graphs, each size once."""
    return sorted(set(_sizes(programs, linear_size)), key=str)


def _sizes(programs: Mapping[str, Program], size: Callable[[fx.Node], Size | None]) -> Iterator[Size]:
    """The sizes of the nodes that have one, in all graphs that the Programs run."""
    for program in programs.values():
        for graph, sub in program.graphs.items():
            for node in sub.graph.nodes if program.count(graph) else ():
                if (found := size(node)) is not None:
                    yield found


def tune(
    programs: Mapping[str, Program],
    device: torch.device,
    progress: Progress = lambda stage, fraction: None,
    least: int | None = None,
) -> Tuning:
    """Lets the kernels of each large linear compete on the device, some seconds each. Returns the winners.

    A linear of fewer products than `least` keeps the default configuration. least: None is LEAST_PRODUCTS, for a build,
    because a smaller linear takes some microseconds with any kernel, and the competition would compile a dozen kernels
    for it.
    """
    from turbocompile.kernels.linear import linear_choice, linear_triton  # here: a machine may lack Triton

    least = LEAST_PRODUCTS if least is None else least
    # A linear that no kernel takes runs on the reference, where there is nothing to choose.
    large = [one for one in linears(programs) if one.rows * one.n * one.k >= least]
    wanted = [one for one in large if linear_triton.takes(one.format, one.dtype, one.k, device)]
    winners: dict[str, dict[str, Any]] = {}
    for done, one in enumerate(wanted):
        size = (one.format, one.rows, one.n, one.k, one.dtype, device)
        winners[linear_choice.key(*size)] = asdict(next(iter(linear_choice.measure(*size))))
        progress("tune", (done + 1) / len(wanted))
    chosen = {LINEARS: winners}
    if found := attentions(programs, device):
        chosen[ATTENTIONS] = found
    return chosen


def attentions(programs: Mapping[str, Program], device: torch.device) -> dict[str, dict[str, Any]]:
    """The default configurations on a device of the quantized attentions in all graphs, in the form of tuning.json."""
    wanted = sorted(set(_sizes(programs, attention_size)), key=astuple)
    if not wanted:
        return {}
    from turbocompile.kernels.attention import attend_triton

    kept = {}
    for one in wanted:
        pv = attend_triton.product_format(device, one.pv)
        config = attend_triton.default_config(device, pv, one.block_k, one.block_q)
        kept[attend_triton.choice_key(device, pv, one.block_k, one.block_q)] = asdict(config)
    return kept


def merge(*parts: Tuning) -> Tuning:
    """The choices of all parts; where several parts have a choice of one name, the last part's."""
    made: dict[str, dict[str, Mapping[str, Any]]] = {}
    for part in parts:
        for kind, choices in part.items():
            made.setdefault(kind, {}).update(choices)
    return made


def read_tuning(data: Any, where: str) -> Tuning:
    """Parsed JSON as a tuning. Raises EngineError for other data; `where` names the file."""
    try:
        for kind, choices in table(data, "it").items():
            for key, config in table(choices, f"{kind[:40]!r}").items():
                for name, value in table(config, f"the configuration of {key[:80]!r}").items():
                    plain(value, f"{name[:40]!r} of {key[:80]!r}")
    except Unreadable as error:
        raise EngineError(f"{where} is no tuning ({error}); the engine is damaged, build it again") from error
    return data


# ----------------------------------------------------------------------------------------------------------- the cache


def read_cache(digest: str) -> Tuning:
    """The tuning that `turbocompile tune` kept for an engine of this digest; empty where no readable one is there."""
    try:
        path = cache_path("tuning", digest)
        return read_tuning(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError, RecursionError, EngineError):
        return {}
