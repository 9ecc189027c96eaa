"""Which kernels run an engine's 8-bit linears and attentions on a card: kept with the engine or in the user's cache.

The kernels of a linear compete. An attention's configuration follows from the card, its format and its blocks; it is
kept so that an engine goes on with what it was built with. The build measures where it has the card (tuning.json in the
engine's folder). `turbocompile tune` does it afterwards, for an engine that was built elsewhere, and keeps the result
in the cache, as a folder stays as it was built. What is read is taken only where it names a configuration that the
kernel declares.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from turbocompile.cache import cache_path, keep_json
from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.ir.attention_ops import SAGE, SLA
from turbocompile.ir.cost import arguments
from turbocompile.ir.program import Program, is_op
from turbocompile.ir.reading import Unreadable, plain, table
from turbocompile.kernels import ops

if TYPE_CHECKING:
    from turbocompile.runtime.engine import Engine

FILE = "tuning.json"
LINEARS, ATTENTIONS = "linears", "attentions"
Tuning = dict[str, dict[str, Any]]  # by kind: what a choice is kept under, and the fields of its configuration
Progress = Callable[[str, float], None]


class Linear(NamedTuple):
    """A w8a8_linear's size: data (rows, K) in the format, weight (N, K), result in dtype."""

    format: str
    rows: int
    n: int
    k: int
    dtype: torch.dtype


def linears(programs: Mapping[str, Program]) -> list[Linear]:
    """The 8-bit linears of all shapes and graphs, each size once."""
    return sorted(set(_linears(programs)), key=str)


def _linears(programs: Mapping[str, Program]) -> Iterator[Linear]:
    for program in programs.values():
        for graph, sub in program.graphs.items():
            for node in sub.graph.nodes if program.count(graph) else ():
                if is_op(node, ops.w8a8_linear):
                    a = arguments(node)
                    n, k = a["weight"].shape
                    yield Linear(a["format"], a["data"].shape[:-1].numel(), n, k, node.meta["val"].dtype)


def tune(
    programs: Mapping[str, Program], device: torch.device, progress: Progress = lambda stage, fraction: None
) -> Tuning:
    """Lets the kernels of each linear compete on the device, about a second each; this process uses the winners."""
    from turbocompile.kernels.linear import linear_choice, linear_triton

    # What no kernel takes runs on the reference, where there is nothing to choose.
    wanted = [one for one in linears(programs) if linear_triton.takes(one.format, one.dtype, one.k, device)]
    for done, one in enumerate(wanted):
        linear_choice.choose(*one, device)
        progress("tune", (done + 1) / len(wanted))
    keys = {linear_choice.key(*one, device) for one in wanted}
    chosen = {LINEARS: {key: config for key, config in linear_choice.saved().items() if key in keys}}
    if found := attentions(programs, device):
        chosen[ATTENTIONS] = found
    return chosen


def attentions(programs: Mapping[str, Program], device: torch.device) -> dict[str, dict[str, Any]]:
    """The configurations of the quantized attentions of all shapes and graphs on a device, as JSON takes them."""
    wanted = sorted(set(_attentions(programs)))
    if not wanted:
        return {}
    from turbocompile.kernels.attention import attend_triton

    kept = {}
    for given, block_q, block_k in wanted:
        pv = attend_triton.product_format(device, given)
        config = attend_triton.default_config(device, pv, block_k, block_q)
        kept[attend_triton.choice_key(device, pv, block_k, block_q)] = asdict(config)
    return kept


def _attentions(programs: Mapping[str, Program]) -> Iterator[tuple[str, int, int]]:
    """Format of the product with V, and blocks, of each attention that the kernels compute."""
    for program in programs.values():
        for graph, sub in program.graphs.items():
            for node in sub.graph.nodes if program.count(graph) else ():
                if is_op(node, *SAGE):
                    from turbocompile.kernels.attention.attend_triton import (
                        SAGE_BLOCKS,  # here: not all machines have Triton
                    )

                    yield arguments(node)["pv"], *SAGE_BLOCKS
                elif is_op(node, *SLA) and arguments(node)["pv"] != "none":
                    a = arguments(node)
                    yield a["pv"], a["block_q"], a["block_k"]


def merge(*parts: Tuning) -> Tuning:
    """All choices; of one linear on one card the last."""
    made: Tuning = {}
    for part in parts:
        for kind, choices in part.items():
            made.setdefault(kind, {}).update(choices)
    return made


def read_tuning(data: Any, where: str) -> Tuning:
    """Parsed JSON as a tuning. EngineError for other data; `where` names the file."""
    try:
        for kind, choices in table(data, "it").items():
            for key, config in table(choices, f"{kind[:40]!r}").items():
                for name, value in table(config, f"the configuration of {key[:80]!r}").items():
                    plain(value, f"{name[:40]!r} of {key[:80]!r}")
    except Unreadable as error:
        raise EngineError(f"{where} is no tuning ({error}); the engine is damaged, build it again") from error
    return data


def restore(tuning: Tuning, where: str) -> None:
    """Takes the choices into this process. EngineError for what no kernel declares; `where` names the file."""
    from turbocompile.kernels.linear import linear_choice

    try:
        linear_choice.restore(tuning.get(LINEARS, {}))
        if tuning.get(ATTENTIONS):
            from turbocompile.kernels.attention import attend_triton

            attend_triton.restore(tuning[ATTENTIONS])
    except ValueError as error:
        raise EngineError(f"{where}: {error}; tune or build the engine again") from error


# ----------------------------------------------------------------------------------------------------------- the cache


def read_cache(digest: str) -> Tuning:
    """What `tune_engine` kept; nothing where there is none, or it cannot be read."""
    try:
        path = cache_path("tuning", digest)
        return read_tuning(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError, RecursionError, EngineError):
        return {}


def tune_engine(engine: Engine, progress: Progress = lambda stage, fraction: None) -> tuple[Tuning, Path | None]:
    """Tunes all modules of an engine's folder on the GPU that it is on, and keeps the result in the cache.

    The second value is where, None (and a warning) where the cache cannot be written.

    Raises UnsupportedError for an engine that is on no GPU, or has no 8-bit linear.
    """
    if engine.device.type != "cuda":
        raise UnsupportedError(f"tuning measures kernels on a GPU, and the engine is on {engine.device}; name a GPU")
    programs = {f"{name}/{shape}": p for name, e in engine.experts.items() for shape, p in e.programs.items()}
    if not linears(programs):
        raise UnsupportedError("the engine has no 8-bit linear, so there is nothing to tune")
    found = tune(programs, engine.device, progress)
    return found, keep_json("tuning", str(engine.manifest["digest"]), found)
