"""The weights of an engine that is larger than its card: some calls keep theirs on the card, others' pass through it.

A call of a block is the unit. The weights that one call alone reads are a parcel: one stretch of host memory, filled
once. A parcel that stays is copied to the card once. The others are copied in every step, in the order in which their
calls run, into the slots of a ring, on a stream of its own: while call i computes, the weights of the calls behind it
arrive. Call i reads slot i modulo the number of slots; a copy into a slot waits for the slot's last reader, and a call
for its copy.

A step brings all that it needs itself, so nothing is assumed of the slots between steps: a CUDA graph of a step holds
its copies, and engines, shapes and threads may take turns. Where host memory is too short to be pinned, copies go from
the files' pages, and steps are not recorded.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from turbocompile.backends import NO_TUNING, Tuning
from turbocompile.ir.program import SHELL, Call, Program
from turbocompile.ir.stored_names import stored_weights
from turbocompile.ir.weights import Constant, is_relative, nbytes

ALIGN = 512  # bytes; PyTorch's own allocations on a card begin at multiples of it
SLOTS = 2  # one is read while the next is filled
THREADS = 4  # that read mapped files into host memory
_PORTABLE = 1  # cudaHostRegisterPortable: for every card of the process
HOST_MARGIN = 2 << 30  # bytes of host memory that stay free beside what is pinned

Run = Callable[..., tuple[torch.Tensor, ...]]


def aligned(size: int) -> int:
    """The next multiple of ALIGN."""
    return -(-size // ALIGN) * ALIGN


@dataclass(frozen=True)
class Parcel:
    """The weights that the calls with one prefix alone read: their stored names, and their bytes side by side."""

    prefix: str
    names: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class Parcels:
    """The weights of an engine, by who reads them. shared: the names that stay on the card, and their bytes.

    parcels: in the order in which the calls run. Constants, and what a graph reads by a full name, are shared, because
    values are folded from them when the code is generated, and so is what two calls of a Program read.
    """

    shared: tuple[str, ...]
    shared_bytes: int
    parcels: tuple[Parcel, ...]

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return self.shared_bytes + sum(p.bytes for p in self.parcels)

    @property
    def largest(self) -> int:
        """Of the largest parcel, which a slot has to hold."""
        return max((p.bytes for p in self.parcels), default=0)


def parcels_of(programs: Mapping[str, Program]) -> Parcels:
    """Sorts the weights of an engine's Programs into what stays and what may be streamed."""
    owner: dict[str, str | None] = {}  # stored name -> the one prefix that reads it; None: it is shared
    sizes: dict[str, int] = {}
    order: dict[str, None] = {}
    for program in programs.values():
        prefixes = [c.prefix for c in program.calls()]
        order |= dict.fromkeys(prefixes)
        alone = {p for p in prefixes if prefixes.count(p) == 1}
        shells = {w.name for w in stored_weights(_shell_alone(program))}
        for weight in stored_weights(program):
            sizes[weight.name] = nbytes(weight.expr)
            own = is_relative(weight.expr) and not isinstance(weight.expr, Constant)
            fits = own and weight.prefix in alone and weight.name not in shells
            known = owner.setdefault(weight.name, weight.prefix if fits else None)
            if not fits or known != weight.prefix:
                owner[weight.name] = None
    shared = tuple(name for name, prefix in owner.items() if prefix is None)
    made = []
    for prefix in order:
        names = tuple(name for name, of in owner.items() if of == prefix)
        if names:
            made.append(Parcel(prefix, names, sum(aligned(sizes[n]) for n in names)))
    return Parcels(shared, sum(aligned(sizes[n]) for n in shared), tuple(made))


def _shell_alone(program: Program) -> Program:
    return Program({SHELL: program.shell}, program.signature)


# ------------------------------------------------------------------------------------------------------- host memory


def laid_out(tensors: Mapping[str, torch.Tensor], memory: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of the same shapes, dtypes and strides, side by side in `memory`, uint8. Their values are not copied."""
    made, at = {}, 0
    for name, tensor in tensors.items():
        stretch = memory[at : at + tensor.numel() * tensor.element_size()].view(tensor.dtype)
        dense = torch.empty_like(tensor, device="meta").stride() == tensor.stride()  # else it has gaps or overlaps
        made[name] = (
            stretch.as_strided(tensor.shape, tensor.stride(), stretch.storage_offset())
            if dense
            else stretch.view(tensor.shape)
        )
        at += aligned(tensor.numel() * tensor.element_size())
    return made


def host_memory() -> int | None:
    """Bytes of host memory that a process can still take, by the machine and by its control group; None: unknown."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        return None
    try:
        group = Path("/sys/fs/cgroup")
        most = (group / "memory.max").read_text(encoding="ascii").strip()
        statistics = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        pages = sum(int(line.split()[1]) for line in statistics if line.startswith(("inactive_file ", "active_file ")))
        if most != "max":
            found.append(int(most) - int((group / "memory.current").read_text(encoding="ascii")) + pages)
    except (OSError, ValueError):  # no control group of version 2
        pass
    return min(found, default=None)


class HostWeights:
    """The streamed parcels of one engine in host memory, pinned for a card, and the names of all weights.

    weights: stored name -> tensor on the CPU, the engine's own dictionary, whose streamed tensors become stretches of
    the pinned memory. A tensor that is written in place there is streamed with its new values from the next step on.
    reason: why the memory is not pinned; "" where it is.
    """

    def __init__(
        self, weights: dict[str, torch.Tensor], streamed: Sequence[Parcel], device: torch.device, pin: bool = True
    ) -> None:
        self.weights, self.streamed = weights, tuple(streamed)
        self.stretches: dict[str, torch.Tensor] = {}
        self.reason = ""
        if not pin:  # pinning takes longer than the copies, for weights that are needed once
            self.reason = "they are needed once"
            return
        size = sum(p.bytes for p in streamed)
        available = host_memory()
        if available is not None and size + HOST_MARGIN > available:
            self.reason = f"pinning them takes {size / 1e9:.1f} GB of host memory, and {available / 1e9:.1f} are free"
            return
        arena = torch.empty(size, dtype=torch.uint8)
        self._fill(arena)
        if device.type == "cuda":
            self.reason = _pin(self, arena)

    def _fill(self, arena: torch.Tensor) -> None:
        """Reads the parcels into the arena, some at a time, because a mapped file is read when it is touched."""
        starts: dict[str, int] = {}
        at = 0
        for parcel in self.streamed:
            starts[parcel.prefix], at = at, at + parcel.bytes

        @torch.no_grad()  # a mode of each thread
        def fill(parcel: Parcel) -> None:
            stretch = arena[starts[parcel.prefix] : starts[parcel.prefix] + parcel.bytes]
            made = laid_out({n: self.weights[n] for n in parcel.names}, stretch)
            for name, tensor in made.items():
                self.weights[name] = tensor.copy_(self.weights[name])
            self.stretches[parcel.prefix] = stretch

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(fill, self.streamed))

    @property
    def pinned(self) -> bool:
        """Whether copies to a card run beside its kernels, and can be recorded."""
        return not self.reason

    def send(self, parcel: Parcel, slot: torch.Tensor) -> None:
        """Queues the copy of a parcel into the beginning of a slot, on the current stream."""
        stretch = self.stretches.get(parcel.prefix)
        if stretch is not None:
            slot[: parcel.bytes].copy_(stretch, non_blocking=True)
            return
        tensors = {n: self.weights[n] for n in parcel.names}
        for name, target in laid_out(tensors, slot).items():
            target.copy_(tensors[name], non_blocking=True)


def _pin(owner: object, memory: torch.Tensor) -> str:
    """Locks host memory for copies to a card until `owner` is gone; why it could not be, or "".

    PyTorch's own pinned memory comes in powers of two, so that parcels of 351 MB would take 512 MB each.
    """
    runtime: Any = torch.cuda.cudart()
    if not memory.numel():
        return ""
    code = int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), _PORTABLE))
    if code:
        return f"the driver did not pin {memory.numel() / 1e9:.1f} GB of host memory (error {code})"
    weakref.finalize(owner, _unpin, memory).atexit = False  # the end of a process frees all
    return ""


def _unpin(memory: torch.Tensor) -> None:
    """Unlocks memory, once no copy reads it."""
    torch.cuda.synchronize()
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(memory.data_ptr())


# ------------------------------------------------------------------------------------------------------ on the card


class Lane:
    """The stream of the copies of one card. On a CPU copies run where they are queued, which is right as well."""

    def __init__(self, device: torch.device) -> None:
        # of high priority, because PyTorch hands out streams of a kind in turn, and graphs are recorded on normal ones
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def begin(self) -> None:
        """Copies wait for all that the caller's stream was given before."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))

    def end(self) -> None:
        """The caller's stream waits for all copies; a recording needs that of every stream that it reached."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def copy(self, copy: Callable[[], None], behind: torch.cuda.Event | None) -> torch.cuda.Event | None:
        """Queues a copy behind an event of the caller's stream. Returns the event of its end."""
        if self.stream is None:
            copy()
            return None
        with torch.cuda.stream(self.stream):
            if behind is not None:
                self.stream.wait_event(behind)
            copy()
            return self.stream.record_event()

    def read(self) -> torch.cuda.Event | None:
        """The event of the caller's stream behind all that it was given."""
        return torch.cuda.current_stream(self.stream.device).record_event() if self.stream is not None else None

    def wait(self, event: torch.cuda.Event | None) -> None:
        """The caller's stream waits for a copy."""
        if self.stream is not None and event is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(event)


class Step:
    """The copies of one step: `begin`, then `before` and `after` each streamed call in turn, then `end`.

    order: the parcels in the order in which their calls run. Parcel i goes to slot i modulo the number of slots.
    """

    def __init__(self, order: Sequence[Parcel], slots: Sequence[torch.Tensor], host: HostWeights, lane: Lane) -> None:
        self.order, self.slots, self.host, self.lane = tuple(order), tuple(slots), host, lane
        self._sent: list[torch.cuda.Event | None] = []
        self._read: list[torch.cuda.Event | None] = []

    def slot(self, number: int) -> torch.Tensor:
        """The slot of parcel `number`."""
        return self.slots[number % len(self.slots)]

    def begin(self) -> None:
        """Fills the slots."""
        self._sent, self._read = [], []
        self.lane.begin()
        for _ in self.slots[: len(self.order)]:
            self._send()

    def before(self, number: int) -> None:
        """The weights of call `number` are there."""
        self.lane.wait(self._sent[number])

    def after(self, number: int) -> None:
        """Call `number` was launched. The slot of the call before it is filled again.

        Not its own: a copy from memory that is not pinned holds the caller up until it is done, and meanwhile the card
        has this call to run.
        """
        self._read.append(self.lane.read())
        if number and len(self._sent) < len(self.order):
            self._send()

    def end(self) -> None:
        self.lane.end()

    def _send(self) -> None:
        number = len(self._sent)
        before = number - len(self.slots)  # the parcel that the slot held
        parcel, slot = self.order[number], self.slot(number)
        behind = self._read[before] if before >= 0 else None
        self._sent.append(self.lane.copy(lambda: self.host.send(parcel, slot), behind))


class Placement:
    """An engine's weights on a device: shared ones and those of resident calls stay, the others pass through slots.

    resident: the prefixes of the calls that stay. slots: how many calls' weights the ring holds.
    """

    def __init__(
        self, weights: Mapping[str, torch.Tensor], parcels: Parcels, resident: frozenset[str], slots: int,
        host: HostWeights, device: torch.device,
    ) -> None:  # fmt: skip
        self.host, self.device = host, device
        self.streamed = {p.prefix: p for p in parcels.parcels if p.prefix not in resident}
        self.stays: dict[str, torch.Tensor] = {}
        kept = [parcels.shared, *(p.names for p in parcels.parcels if p.prefix in resident)]
        for names in kept:
            self._place({name: weights[name] for name in names})
        largest = max((p.bytes for p in self.streamed.values()), default=0)
        count = min(slots, len(self.streamed))
        self.slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(count)]
        self.lane = Lane(device)

    def _place(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies tensors to the device, side by side, because each allocation of its own would be rounded up."""
        size = sum(aligned(t.numel() * t.element_size()) for t in tensors.values())
        memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        for name, target in laid_out(tensors, memory).items():
            self.stays[name] = target.copy_(tensors[name])

    def refresh(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copies the values of the weights to where they stay; streamed ones are copied in every step."""
        for name, tensor in weights.items():
            if name in self.stays:
                self.stays[name].copy_(tensor)

    def compiled(self, program: Program, weights: Mapping[str, torch.Tensor], tuning: Tuning = NO_TUNING) -> Run:
        """The Program as a callable over flat tensors on the device."""
        order = [self.streamed[c.prefix] for c in program.calls() if c.prefix in self.streamed]
        step = Step(order, self.slots, self.host, self.lane)
        placed = dict(self.stays)
        for number, parcel in enumerate(order):
            placed |= laid_out({n: weights[n] for n in parcel.names}, step.slot(number))
        number_of = {parcel.prefix: number for number, parcel in enumerate(order)}

        def around(call: Call) -> tuple[Callable[[], None], Callable[[], None]] | None:
            number = number_of.get(call.prefix)
            if number is None:
                return None
            return lambda: step.before(number), lambda: step.after(number)

        from turbocompile.backends import triton

        run = triton.compile_program(program, placed, self.device, tuning=tuning, around=around)
        return Streamed(run, step) if order else run


class Streamed:
    """The callable of a Program whose weights are streamed."""

    def __init__(self, run: Any, step: Step) -> None:
        self.run, self.step = run, step

    @property
    def shell(self) -> Any:
        """The generated code of the shell."""
        return self.run.shell

    def refresh(self, names: Collection[str]) -> None:
        """Computes anew what was folded from weights of these names, which stay on the device."""
        self.run.refresh(names)

    def release(self) -> None:
        """As `Runner.release`."""
        self.run.release()

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.step.begin()
        try:
            return self.run(*tensors)
        finally:
            self.step.end()


class Gate:
    """Lets one call at a time use a plan's memory, whatever thread and stream it comes from; experts share it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._done: torch.cuda.Event | None = None  # behind the last call

    @contextlib.contextmanager
    def __call__(self, device: torch.device) -> Iterator[None]:
        with self._lock:
            recorded = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
            if recorded and self._done is not None:
                torch.cuda.current_stream(device).wait_event(self._done)
            try:
                yield
            finally:
                if recorded:
                    self._done = torch.cuda.current_stream(device).record_event()


def host_bandwidth(device: torch.device, size: int = 64 << 20) -> float:
    """Bytes a second of copies from pinned host memory to a card, measured in some tens of milliseconds."""
    host = torch.empty(size, dtype=torch.uint8).pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(device))
        target.copy_(host, non_blocking=True)
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return size / min(seconds)


def warn_unpinned(name: str, reason: str) -> None:
    """Says once that steps are slower than planned."""
    warnings.warn(
        f"{name} streams its weights from memory that is not pinned, without a CUDA graph, slower than planned: "
        f"{reason}",
        RuntimeWarning,
        4,
    )
