"""How an engine follows a memory plan: where its weights are, who may call it, what a full card is answered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from turbocompile.errors import UnsupportedError
from turbocompile.hardware import host_gpu
from turbocompile.runtime.cuda_graph import release_cached
from turbocompile.runtime.memory_plan import MemoryPlan, PartNeeds, make_plan, memory_budget, module_needs
from turbocompile.runtime.streaming import Gate, HostWeights, Placement, host_bandwidth, parcels_of, warn_unpinned

if TYPE_CHECKING:
    from turbocompile.backends import Tuning
    from turbocompile.ir.program import Program
    from turbocompile.runtime.turns import Turns


class PlannedMemory:
    """A base of Engine. memory: the plan; None: all weights are on the engine's device.

    kept: models around the transformer that stay in memory between videos, by name (video/components.py).
    """

    memory: MemoryPlan | None = None
    planned_for: Any = None  # what the plan was made for, by whoever made it
    _module = "transformer"  # its name in the plan
    if TYPE_CHECKING:
        experts: dict[str, Any]
        weights: dict[str, torch.Tensor]
        programs: dict[str, Program]
        model_name: str
        backend: str
        tuning: Tuning
        _device: torch.device
        _turns: Turns
        _host: HostWeights | None
        _placed: Placement | None
        _gate: Gate
        kept: dict[str, Any]
        _graphs: dict[str, Any]
        _runners: dict[str, Any]
        _pool: Any

    def plan_memory(
        self,
        vram: int | str = "auto",
        parts: Mapping[str, PartNeeds] | None = None,
        *,
        shape: str | None = None,
        device: torch.device | None = None,
    ) -> MemoryPlan:
        """Has the engine and its experts run within so much of a GPU's memory, and says how.

        vram: bytes, or as in "12GB", "12GiB" or "auto", which is what other processes leave. parts: what the models
        around them need, as a text encoder, if they are to share the memory. shape: the name of the one shape that has
        to fit; all of them by default. device: the GPU; by default where the engine is.

        Raises UnsupportedError on another device or backend than a GPU and triton, and where no plan fits, with the
        memory that would do.
        """
        if any(e.backend != "triton" for e in self.experts.values()):
            raise UnsupportedError(f"vram plans engines of the backend triton, and this one is of {self.backend}")
        device = device or self._device
        budget, card = memory_budget(vram, device), host_gpu()
        needs = {}
        for name, engine in self.experts.items():
            programs = engine.programs if shape is None else {shape: engine.programs[shape]}
            needs[name] = replace(module_needs(programs, card, engine.cuda_graph), parcels=parcels_of(engine.programs))
        plan = make_plan(budget, needs, parts, bandwidth=host_bandwidth(device))
        self.use_plan(plan, device)
        return plan

    def use_plan(self, plan: MemoryPlan, device: torch.device | None = None) -> None:
        """Has the engine and its experts follow a plan, on whatever device they are, or on `device`."""
        gate = Gate()
        for name, engine in self.experts.items():
            with engine._turns.change():
                if engine._device.type == "cuda":
                    torch.cuda.synchronize(engine._device)
                engine._forget()
                engine._host = None
                engine.weights = {k: v.cpu() for k, v in engine.weights.items()}
                engine.adapted = engine.adapted.copied()  # copies of the engine keep the tensors on the device
                engine.memory, engine._module, engine._gate = plan, name, gate
                engine._device = device or engine._device
            engine.kept.clear()
            engine.planned_for = None

    def _placement(self) -> Placement:
        """The weights on the device as the plan says; other experts leave it if the plan has one there at a time."""
        assert self.memory is not None
        if self._placed is None:
            if not self.memory.together:
                for other in self.experts.values():
                    if other is not self:
                        other.park()
            plan = self.memory.modules[self._module]
            parcels = parcels_of(self.programs)
            if self._host is None:
                passing = [p for p in parcels.parcels if p.prefix not in plan.resident]
                self._host = HostWeights(self.weights, passing, self._device)
                if not self._host.pinned:
                    warn_unpinned(self.model_name, self._host.reason)
            self._placed = Placement(self.weights, parcels, plan.resident, plan.slots, self._host, self._device)
            if not self.memory.swaps:
                self.weights = {**self.weights, **self._placed.stays}  # no graph reads the others, which are small
        return self._placed

    def park(self) -> None:
        """Takes the weights off the GPU until the next call, if there is a plan; the host keeps them."""
        if self.memory is None or not self.memory.swaps or self._placed is None:
            return
        with self._turns.change():
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._forget()
            if self._device.type == "cuda":
                release_cached(self._device)

    def changed(self, names: Iterable[str]) -> None:
        """Has what follows from weights that were written in place follow them. names: their stored names.

        That is what was folded from them, and the copies of them that a plan keeps on the GPU.
        """
        names = set(names)
        if self._placed is not None:
            self._placed.refresh({name: self.weights[name] for name in names})
        for runner in self._runners.values():
            runner.refresh(names)

    def _forget(self) -> None:
        """Drops compiled code, graphs, and weights that the plan placed, because they hold tensors on the device."""
        self._graphs.clear()
        self._pool = None
        for runner in self._runners.values():
            if hasattr(runner, "release"):  # those of ONNX and TensorRT hold their weights otherwise
                runner.release()
        self._runners.clear()
        self._placed = None

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """Under a plan one call runs at a time, because two would take twice the memory."""
        return self._gate(self._device) if self.memory is not None else contextlib.nullcontext()

    def _out_of_memory(self, reason: str) -> UnsupportedError:
        """The error of a call that found no memory. What the call held is free again, and the engine can be called."""
        planned = f"planned for {self.memory.peak / 1e9:.1f} GB" if self.memory is not None else "all weights resident"
        taken = ""
        if self._device.type == "cuda":
            most = torch.cuda.max_memory_allocated(self._device) / 1e9
            taken = f"; {torch.cuda.memory_reserved(self._device) / 1e9:.1f} GB taken, {most:.1f} in use at most"
            release_cached(self._device)
        sentence = reason.split(". GPU")[0].removesuffix(".")
        return UnsupportedError(
            f"{self.model_name} ran out of the GPU's memory, {planned} ({sentence}{taken}); give it less to do (a "
            "smaller video, fewer frames), free memory that others use, or plan for less (--vram, engine.plan_memory)"
        )
