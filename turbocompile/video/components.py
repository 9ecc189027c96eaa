"""Components of an engine's folder (text encoder, VAE, ...): checked when they are read, placed by a memory plan."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from turbocompile.runtime.engine import Engine
from turbocompile.runtime.folder import check_files, check_strangers
from turbocompile.runtime.memory_plan import RESIDENT, STREAMED, TILED, MemoryPlan
from turbocompile.runtime.streaming import SLOTS, HostWeights, Lane, Parcel, Step, aligned, laid_out
from turbocompile.wan.components import folder_name, load_components

OVERLAP = 3 / 4  # a VAE's tile begins so much of its size after the one before it


def check_component(engine: Engine, name: str) -> Mapping[str, str]:
    """The row of a component in the manifest.

    Raises EngineError where a file of the component was altered, is gone, or is not listed.
    """
    assert engine.folder is not None
    row: Mapping[str, str] = engine.manifest["components"][name]
    folder = f"components/{folder_name(name, row)}"
    check_files(engine.folder, engine.manifest, [f for f in engine.manifest["files"] if f.startswith(folder + "/")])
    check_strangers(engine.folder, engine.manifest, folder)
    return row


def component(engine: Engine, name: str) -> Any:
    """A component of the engine's folder on the engine's device, after its files were checked."""
    return placed(_loaded(engine, name), name, engine.device)


def _loaded(engine: Engine, name: str) -> Any:
    """A component of the engine's folder on the CPU, after its files were checked."""
    assert engine.folder is not None
    row = check_component(engine, name)
    return load_components(engine.folder / "components", {name: row})[name]


def placed(part: Any, name: str, device: torch.device) -> Any:
    """The component on the device.

    On a CPU the component computes in float32, whatever dtype its files hold, because a CPU without instructions for
    16 bits took 300 times as long for a convolution of Wan's VAE in bfloat16. The text encoder keeps the dtype that the
    recipe asks for.
    """
    if not isinstance(part, torch.nn.Module):
        return part
    return part.float() if device.type == "cpu" and name != "text_encoder" else part.to(device)


def held(parts: Mapping[str, Any]) -> Callable[[str], contextlib.AbstractContextManager[Any]]:
    """Components that are on the device for good, in the form of `Pipeline.component`."""
    return lambda name: contextlib.nullcontext(parts[name])


class Parts:
    """The components of an engine, each where the engine's memory plan wants it while it works.

    Without a plan a component is read when it is needed, and freed afterwards. kept: components that stay in memory
    between videos, by name; None reads them anew.
    """

    def __init__(self, engine: Engine, kept: dict[str, Any] | None = None) -> None:
        self.engine, self.kept = engine, kept

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[Any]:
        """The component, on the device until the body ends."""
        plan = self.engine.memory
        if plan is None:
            yield component(self.engine, name)
            return
        part = (self.kept or {}).get(name)
        if part is None:
            part = _loaded(self.engine, name)
        if self.kept is not None:
            self.kept[name] = part
        with where(part, plan.parts.get(name, ""), plan, self.engine.device):
            yield part


def where(part: Any, how: str, plan: MemoryPlan, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Has a component be on the device, as the plan says of it, until the body ends."""
    if not isinstance(part, torch.nn.Module):
        return contextlib.nullcontext()
    if how == RESIDENT:
        part.to(device)
        return contextlib.nullcontext()
    if how == STREAMED:
        return layers_streamed(part, device)
    if how == TILED:
        in_tiles(part, plan.tile)
    return borrowed(list(part.parameters()), list(part.modules()), device)


def in_tiles(vae: Any, tile: int) -> None:
    """Has a VAE work in tiles of so many pixels, which it blends where they overlap."""
    step = int(tile * OVERLAP)
    vae.enable_tiling(tile, tile, step, step)


@contextlib.contextmanager
def borrowed(
    parameters: list[torch.nn.Parameter], modules: list[torch.nn.Module], device: torch.device
) -> Iterator[None]:
    """Has parameters, and the buffers of modules, be on a device until the body ends; their own tensors come back."""
    own = [(p, p.data) for p in parameters]
    buffers = [(m, n, b) for m in modules for n, b in m._buffers.items() if b is not None]
    try:
        for parameter, data in own:
            parameter.data = data.to(device)
        for module, name, buffer in buffers:
            module._buffers[name] = buffer.to(device)
        yield
    finally:
        for parameter, data in own:
            parameter.data = data
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        if device.type == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def layers_streamed(encoder: Any, device: torch.device) -> Iterator[None]:
    """Has a T5 encoder run on a device through whose memory its layers pass, two at a time, until the body ends.

    Its table of tokens stays on the CPU, where a few of its rows are read.
    """
    table, layers = encoder.encoder.embed_tokens, list(encoder.encoder.block)
    owned = [dict(layer.named_parameters()) for layer in layers]
    own = [{name: p.data for name, p in one.items()} for one in owned]
    weights = {f"{i}.{name}": t for i, one in enumerate(own) for name, t in one.items()}
    order = [
        Parcel(f"{i}.", tuple(f"{i}.{n}" for n in one), sum(aligned(t.nbytes) for t in one.values()))
        for i, one in enumerate(own)
    ]
    slots = [
        torch.empty(max(p.bytes for p in order), dtype=torch.uint8, device=device)
        for _ in range(min(SLOTS, len(order)))
    ]
    step = Step(order, slots, HostWeights(weights, order, device, pin=False), Lane(device))

    def before(number: int) -> None:
        if not number:
            step.begin()
        step.before(number)
        for name, tensor in laid_out(own[number], step.slot(number)).items():
            owned[number][name].data = tensor

    def after(number: int) -> None:
        step.after(number)
        for name, tensor in own[number].items():
            owned[number][name].data = tensor
        if number == len(order) - 1:
            step.end()

    tables = (*table.parameters(), *encoder.get_input_embeddings().parameters())
    apart = {id(p) for p in tables} | {id(p) for one in owned for p in one.values()}
    rest = [p for p in encoder.parameters() if id(p) not in apart]
    hooks = [
        table.register_forward_pre_hook(lambda _, args: tuple(a.cpu() for a in args)),
        table.register_forward_hook(lambda _, args, out: out.to(device)),
        *(layer.register_forward_pre_hook(lambda _, args, n=n: before(n)) for n, layer in enumerate(layers)),
        *(layer.register_forward_hook(lambda _, args, out, n=n: after(n)) for n, layer in enumerate(layers)),
    ]
    encoder.runs_on = device
    try:
        with borrowed(rest, list(encoder.modules()), device):
            yield
    finally:
        del encoder.runs_on
        for hook in hooks:
            hook.remove()
        for one, tensors in zip(owned, own, strict=True):
            for name, tensor in tensors.items():
                one[name].data = tensor
