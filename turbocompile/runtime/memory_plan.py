"""How an engine uses a card that may be too small for it: what stays on the card, what comes when it is needed.

A plan is data. It is made of what the modules need (`ModuleNeeds`), what the models around them need (`PartNeeds`) and
a budget in bytes, by arithmetic alone:

1. Everything is resident, if that fits.
2. Otherwise the models around the transformer (text encoder, VAE, image encoder) are on the card only while they work.
3. Of two experts one is on the card at a time.
4. What is still too large is streamed: as many calls as fit keep their weights on the card, evenly spread, and the
   others' pass through a ring of slots in every step (streaming.py).

The peak of a stage is what PyTorch's allocator takes from the card for it: weights, the activations with the kernels'
workspace in the allocator's blocks (cuda_allocator.py), the libraries' workspace, and a margin.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from turbocompile.errors import UnsupportedError
from turbocompile.hardware import Gpu
from turbocompile.ir.cost import cost
from turbocompile.ir.memory import allocations
from turbocompile.ir.program import Program
from turbocompile.runtime.cuda_allocator import MIB, CudaAllocator, has_expandable_segments, rounded, segment_bytes
from turbocompile.runtime.streaming import SLOTS, Parcels, parcels_of
from turbocompile.runtime.workspace import CUBLAS, workspace_bytes

GB = 10**9
AUTO = "auto"
_UNITS = {"GB": GB, "GIB": 1 << 30, "MB": 10**6, "MIB": MIB}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*")
MARGIN = 0.03  # of a peak: what the account leaves out, as small tensors
PCIE = 25e9  # bytes a second from pinned host memory where nothing was measured: PCIe 4.0 with 16 lanes

RESIDENT, ON_DEMAND, STREAMED, TILED = "resident", "on demand", "streamed", "in tiles"
DENOISE = "denoise"


def parse_size(text: str) -> int | None:
    """Bytes of a size as in "12GB", "12GiB" or "11500MB"; None for "auto". Raises UnsupportedError for another text."""
    if text.strip().lower() == AUTO:
        return None
    match = _SIZE.fullmatch(text)
    unit = match[2].upper() if match else ""
    if match is None or (unit and unit not in _UNITS):
        raise UnsupportedError(f"vram: {text!r} is no size; write it as 12GB, 12GiB, 11500MB or auto")
    if not unit:
        raise UnsupportedError(f"vram: {text.strip()} has no unit; write {match[1]}GB, {match[1]}GiB or auto")
    size = int(float(match[1]) * _UNITS[unit])
    if size <= 0:
        raise UnsupportedError(f"vram: {text.strip()} is no memory at all; write a size as 12GB, or auto")
    return size


def gigabytes(size: float) -> str:
    """As in "11.5 GB"."""
    return f"{size / GB:.1f} GB"


# ------------------------------------------------------------------------------------------------------------- needs


@dataclass(frozen=True)
class ModuleNeeds:
    """What a transformer needs on the card.

    parcels: its weights, by who reads them. working: bytes that the allocator reserves for a step beside the weights,
    the largest of the shapes. seconds: of a step where all is resident, at the very least; None where it is unknown.
    """

    parcels: Parcels
    working: int
    seconds: float | None = None

    @property
    def resident(self) -> int:
        """Bytes on the card of all weights."""
        return self.weights(frozenset(p.prefix for p in self.parcels.parcels), 0)

    def weights(self, resident: frozenset[str], slots: int) -> int:
        """Bytes on the card where only the calls with these prefixes keep their weights."""
        kept = sum(_allocated(p.bytes) for p in self.parcels.parcels if p.prefix in resident)
        streamed = [p.bytes for p in self.parcels.parcels if p.prefix not in resident]
        ring = min(slots, len(streamed)) * _allocated(max(streamed, default=0))
        return _allocated(self.parcels.shared_bytes) + kept + ring


@dataclass(frozen=True)
class PartNeeds:
    """What a model around the transformer needs on the card. weights, working: bytes; stages: those that it works in.

    block: bytes of its largest layer, if it can be streamed layer by layer, with `rest` bytes that stay; 0 if not.
    tiles: pixels of a tile -> what it takes to work in such tiles, instead of `working`, the largest tile first.
    """

    weights: int
    working: int
    stages: tuple[str, ...]
    block: int = 0
    rest: int = 0
    tiles: Mapping[int, int] = field(default_factory=dict)


def _allocated(size: int) -> int:
    """What an allocation of its own takes from the card."""
    return segment_bytes(size) if size else 0


def module_needs(programs: Mapping[str, Program], card: Gpu | None = None, graphs: bool = True) -> ModuleNeeds:
    """What the Programs of a transformer need, each alone. card: for the time of a step."""
    working = max(working_bytes(program, graphs) for program in programs.values())
    seconds = max(cost(program).seconds(card) for program in programs.values()) if card is not None else None
    return ModuleNeeds(parcels_of(programs), working, seconds)


def memory_budget(vram: str | int, device: torch.device) -> int:
    """Bytes that an engine may take of a card: what was asked, at most what is free of other processes.

    vram: bytes, or a text as parse_size takes it; "auto" is all that is free. Raises UnsupportedError, also for a
    device that is no card.
    """
    asked = parse_size(vram) if isinstance(vram, str) else vram
    if device.type != "cuda":
        raise UnsupportedError(f"vram plans the memory of a GPU, and the engine runs on {device}; leave it out there")
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)  # what this process has taken it may use
    return free if asked is None else min(asked, free)


def working_bytes(program: Program, graphs: bool = True) -> int:
    """What the allocator reserves for a forward, besides the weights. graphs: a CUDA graph is recorded of it."""
    run = CudaAllocator(has_expandable_segments()).run(allocations(program, workspace_bytes))
    inputs = sum(_allocated(_size(i.shape, i.dtype)) for i in program.signature.inputs)
    outputs = sum(_allocated(t.numel() * t.element_size()) for t in _outputs(program))
    return run.peak_reserved + (2 * inputs + outputs if graphs else inputs) + CUBLAS


def _size(shape: Sequence[int], dtype: object) -> int:
    size = getattr(dtype, "itemsize", 4)
    for n in shape:
        size *= n
    return size


def _outputs(program: Program) -> list[torch.Tensor]:
    return [n.meta["val"] for n in program.shell.outputs()]


# -------------------------------------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class ModulePlan:
    """Where the weights of a transformer are. resident: the prefixes of the calls that keep theirs on the card.

    slots: of the ring; 0 where nothing is streamed. weights: bytes on the card. streamed: bytes that a step copies.
    calls, streamed_calls: how many have weights of their own, and how many of them are streamed.
    """

    resident: frozenset[str]
    slots: int
    weights: int
    streamed: int = 0
    calls: int = 0
    streamed_calls: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """What an engine does with a card's memory.

    budget: bytes that it may take. modules: by name. together: all modules are on the card at once. parts: the models
    around them -> RESIDENT, ON_DEMAND (on the card while they work), STREAMED (their layers pass through) or TILED (on
    demand, and in tiles of `tile` pixels). leaves: the stages in which the transformers leave the card. peaks: bytes by
    stage, as PyTorch's allocator counts what it takes. bandwidth: bytes a second from host memory. slowdown: the
    predicted time of a step over that of a resident one, at most; None where the time of a step is unknown.
    """

    budget: int
    modules: Mapping[str, ModulePlan]
    together: bool
    parts: Mapping[str, str] = field(default_factory=dict)
    leaves: frozenset[str] = frozenset()
    peaks: Mapping[str, int] = field(default_factory=dict)
    bandwidth: float = PCIE
    slowdown: float | None = None
    tile: int = 0

    @property
    def peak(self) -> int:
        """The largest of the stages' peaks, in bytes."""
        return max(self.peaks.values(), default=0)

    @property
    def streams(self) -> bool:
        """Whether weights are copied in every step."""
        return any(m.streamed for m in self.modules.values())

    @property
    def swaps(self) -> bool:
        """Whether weights are copied to the card between steps, so that the host has to keep them."""
        return not self.together or bool(self.leaves) or self.streams

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "budget": self.budget, "peak": self.peak, "peaks": dict(self.peaks), "together": self.together,
            "modules": {
                name: {
                    "weights": m.weights, "calls": m.calls, "streamed_calls": m.streamed_calls,
                    "streamed_bytes": m.streamed, "slots": m.slots,
                }
                for name, m in self.modules.items()
            },
            "parts": dict(self.parts), "leaves": sorted(self.leaves), "bandwidth": self.bandwidth,
            "slowdown": self.slowdown, "tile": self.tile,
        }  # fmt: skip

    def sentences(self) -> list[str]:
        """What was chosen, and what it costs, in one or two sentences."""
        said = [f"memory: {self._where()}; predicted peak {gigabytes(self.peak)} of {gigabytes(self.budget)}"]
        if self.streams:
            most = max(self.modules.values(), key=lambda m: m.streamed)
            seconds = most.streamed / self.bandwidth
            cost = f"a step copies {gigabytes(most.streamed)}, which takes {seconds:.2f} s beside its computation"
            if self.slowdown is not None:
                cost += f", so it is at most {self.slowdown:.2f} times as long as a resident one"
            said.append(cost)
        return said

    def _where(self) -> str:
        words = []
        for name, module in self.modules.items():
            if module.streamed_calls:
                words.append(
                    f"{name} streams the weights of {module.streamed_calls} of {module.calls} blocks from host memory"
                )
        if not words:
            names = " and ".join(self.modules)
            words.append(f"{names} {'stays' if len(self.modules) == 1 else 'stay'} on the card")
        if not self.together and len(self.modules) > 1:
            words.append("one expert is there at a time")
        by: dict[str, list[str]] = {}
        for name, how in self.parts.items():
            by.setdefault(how, []).append(_in_words(name))
        for how, those in by.items():
            works = "it works" if len(those) == 1 else "they work"
            told = {
                RESIDENT: "there as well", ON_DEMAND: f"only while {works}", STREAMED: f"layer by layer while {works}",
                TILED: f"only while {works}, in blended tiles of {self.tile} pixels (not a whole's bits)",
            }  # fmt: skip
            words.append(f"{' and '.join(those)} {told[how]}")
        if self.leaves:
            words.append(f"the weights leave for {' and '.join(sorted(self.leaves))}")
        return ", ".join(words)


def _in_words(part: str) -> str:
    return "VAE" if part == "vae" else part.replace("_", " ")


def spread(count: int, streamed: int) -> list[int]:
    """Which of `count` calls are streamed, in order: evenly spread, the last of each group, so that the first call of a
    step waits for nothing.
    """
    return [(i + 1) * count // streamed - 1 for i in range(streamed)]


def make_plan(
    budget: int,
    modules: Mapping[str, ModuleNeeds],
    parts: Mapping[str, PartNeeds] | None = None,
    *,
    bandwidth: float = PCIE,
    slots: int = SLOTS,
) -> MemoryPlan:
    """The plan that streams least. Raises UnsupportedError where no plan fits, and says what would."""
    parts = parts or {}
    room = int(budget / (1 + MARGIN))
    resident = {name: _resident(needs) for name, needs in modules.items()}
    working = max(n.working for n in modules.values())
    weights = sum(m.weights for m in resident.values())
    around = sum(_allocated(p.weights) for p in parts.values())
    busiest = max([working, *(p.working for p in parts.values())])
    if weights + around + busiest <= room:
        stages = {DENOISE: weights + around + working}
        for stage in _stages(parts):
            stages[stage] = weights + around + max(p.working for p in parts.values() if stage in p.stages)
        there = dict.fromkeys(parts, RESIDENT)
        return MemoryPlan(budget, resident, True, there, frozenset(), _with_margin(stages), bandwidth, 1.0)
    chosen, together = resident, weights + working <= room
    if not together:
        chosen = {name: _fitted(name, needs, room, slots, budget) for name, needs in modules.items()}
    on_card = sum(m.weights for m in chosen.values()) if together else max(m.weights for m in chosen.values())
    stages = {DENOISE: on_card + working}
    where: dict[str, str] = {}
    leaves: set[str] = set()
    tile = 0
    for name, part in parts.items():
        where[name], own, tiles = _placed(name, part, room, budget)
        tile = max(tile, tiles)
        for stage in part.stages:
            if on_card + own > room:
                leaves.add(stage)
            stages[stage] = max(stages.get(stage, 0), own)
    for stage in _stages(parts):
        stages[stage] += 0 if stage in leaves else on_card
    slowdown = max((_slowdown(modules[n], m, bandwidth) for n, m in chosen.items()), key=lambda s: s or 0.0)
    peaks = _with_margin(stages)
    return MemoryPlan(budget, chosen, together, where, frozenset(leaves), peaks, bandwidth, slowdown, tile)


def _stages(parts: Mapping[str, PartNeeds]) -> list[str]:
    return list(dict.fromkeys(stage for part in parts.values() for stage in part.stages))


def _with_margin(stages: Mapping[str, int]) -> dict[str, int]:
    return {name: rounded(int(size * (1 + MARGIN)), MIB) for name, size in stages.items()}


def _resident(needs: ModuleNeeds) -> ModulePlan:
    prefixes = frozenset(p.prefix for p in needs.parcels.parcels)
    return ModulePlan(prefixes, 0, needs.resident, 0, len(prefixes), 0)


def _fitted(name: str, needs: ModuleNeeds, room: int, slots: int, budget: int) -> ModulePlan:
    """The plan of a module that is alone on the card: as many calls resident as fit. Raises UnsupportedError."""
    if needs.resident + needs.working <= room:
        return _resident(needs)
    parcels = needs.parcels.parcels
    for streamed in range(slots + 1, len(parcels) + 1):
        passing = {parcels[i].prefix for i in spread(len(parcels), streamed)}
        stay = frozenset(p.prefix for p in parcels if p.prefix not in passing)
        weights = needs.weights(stay, slots)
        if weights + needs.working <= room:
            moved = sum(p.bytes for p in parcels if p.prefix in passing)
            return ModulePlan(stay, slots, weights, moved, len(parcels), streamed)
    least = min(needs.resident, needs.weights(frozenset(), slots)) + needs.working
    least = rounded(int(least * (1 + MARGIN)), 10**8)
    raise UnsupportedError(
        f"{name} needs {gigabytes(least)} on the card at this size, {gigabytes(needs.working)} of it for activations, "
        f"and may take {gigabytes(budget)}; give it more memory (--vram), or make a smaller video or fewer frames"
    )


def _placed(name: str, part: PartNeeds, room: int, budget: int) -> tuple[str, int, int]:
    """How a part is on the card while it works, the bytes that it takes then, and the pixels of its tiles, if any.

    Raises UnsupportedError.
    """
    weights = _allocated(part.weights)
    ways = [(ON_DEMAND, weights + part.working, 0)]
    if part.block:
        ways.append((STREAMED, SLOTS * _allocated(part.block) + _allocated(part.rest) + part.working, 0))
    ways += [(TILED, weights + working, tile) for tile, working in part.tiles.items()]
    for way in ways:
        if way[1] <= room:
            return way
    least = rounded(int(min(size for _, size, _ in ways) * (1 + MARGIN)), 10**8)
    raise UnsupportedError(
        f"the {_in_words(name)} needs {gigabytes(least)} on the card at this size, and may take {gigabytes(budget)}; "
        "give it more memory (--vram), or make a smaller video or fewer frames"
    )


def _slowdown(needs: ModuleNeeds, plan: ModulePlan, bandwidth: float) -> float | None:
    """The time of a step over that of a resident one, at most, because `seconds` is the least that one takes."""
    if not plan.streamed:
        return 1.0
    if not needs.seconds:
        return None
    return step_seconds(needs, plan, bandwidth) / needs.seconds


def step_seconds(needs: ModuleNeeds, plan: ModulePlan, bandwidth: float) -> float:
    """The time of a step, in which copies and calls wait for each other as streaming.Step has them do."""
    assert needs.seconds is not None
    parcels = needs.parcels.parcels
    each = needs.seconds / len(parcels)
    streamed = [p for p in parcels if p.prefix not in plan.resident]
    arrived: list[float] = []  # when the copy of each streamed call ends
    read: list[float] = []  # when each streamed call ends
    now = 0.0
    for parcel in parcels:
        if parcel.prefix not in plan.resident:
            number = len(read)
            while len(arrived) <= number + plan.slots - 1 and len(arrived) < len(streamed):
                before = len(arrived) - plan.slots
                start = max(arrived[-1] if arrived else 0.0, read[before] if before >= 0 else 0.0)
                arrived.append(start + streamed[len(arrived)].bytes / bandwidth)
            now = max(now, arrived[number])
        now += each
        if parcel.prefix not in plan.resident:
            read.append(now)
    return now
