"""The Programs of one module before the passes: as captured, and in normal form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from turbocompile.build.stages import Stages
from turbocompile.ir.program import Program
from turbocompile.rewrite.normalize import leave, normalize


@dataclass(frozen=True)
class Twin:
    """The Program that rewrites are measured on, as it was captured.

    shape: the name of the engine's shape that it is of; "" where it is of a smaller one.
    """

    program: Program
    shape: str = ""


class Captured:
    """The Programs of one module, by the name of their shape, in normal form.

    twin: the one that rewrites are measured on, in normal form, or None. twin_shape: the name of its shape, "" where it
    has one of its own. raw, raw_twin: as captured. left: the graphs that have no normal form that is right -> why;
    these graphs are as captured in all Programs.
    """

    def __init__(self, programs: Mapping[str, Program], twin: Twin | None, stages: Stages) -> None:
        self.raw = dict(programs)
        self.raw_twin = twin.program if twin is not None else None
        self.twin_shape = twin.shape if twin is not None else ""
        self.programs: dict[str, Program] = {}
        self.twin: Program | None = None
        self.left: dict[str, str] = {}
        left: dict[str, str] = {}
        with stages("normalize"):
            for shape, program in programs.items():
                made = self.programs[shape] = program.copy()
                left = {**normalize(made), **left}
            if twin is not None and twin.shape:
                self.twin = self.programs[twin.shape].copy()
            elif twin is not None:
                self.twin = twin.program.copy()
                left = {**normalize(self.twin), **left}
        self.leave(left)

    @property
    def measured(self) -> tuple[Program, Program]:
        """The Program that rewrites are measured on, as captured and in normal form. There has to be one."""
        if self.raw_twin is None or self.twin is None:
            raise AssertionError("nothing is measured without a twin")
        return self.raw_twin, self.twin

    def everything(self) -> list[tuple[Program, Program]]:
        """Each Program in normal form with the captured one; the twin last."""
        pairs = [(program, self.raw[shape]) for shape, program in self.programs.items()]
        return [*pairs, self.measured[::-1]] if self.twin is not None else pairs

    def leave(self, left: Mapping[str, str]) -> None:
        """Has graphs stay as captured, in every Program."""
        self.left |= {graph: reason for graph, reason in left.items() if graph not in self.left}
        for program, raw in self.everything():
            leave(program, raw, {g: why for g, why in self.left.items() if g in program.graphs})

    def warnings(self) -> list[str]:
        """A sentence for each graph that stays as captured."""
        return [
            f"the graph {graph!r} is built as it was captured, and no pass rewrites it: {reason}"
            for graph, reason in self.left.items()
        ]
