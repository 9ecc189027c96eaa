"""What tests of passes share: capture, rewrite, run, print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from turbocompile.backends.triton import compile_program

from turbocompile.capture.export import capture
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.hardware import AttentionChoice
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.printer import print_program
from turbocompile.ir.program import SHELL, Program
from turbocompile.ir.stored_names import stored_weights
from turbocompile.recipe.options import CompileOptions, resolve
from turbocompile.recipe.schema import Settings
from turbocompile.rewrite.normalize import normalize
from turbocompile.rewrite.pipeline import PASSES, load_pass, run_passes
from turbocompile.rewrite.results import PassResult

HERE = Path(__file__).parent


def options_of(
    passes: Mapping[str, Any], target: str = "cpu", checkpoint: Iterable[str] = (), smoothed: Iterable[str] = (),
    choices: Mapping[str, AttentionChoice] | None = None,
) -> CompileOptions:  # fmt: skip
    """The options of `passes` in a recipe. smoothed: of w8a8's sites; choices: of attentions, as at other shapes."""
    asked = resolve(Settings.from_dict({"target": target, "passes": passes}), checkpoint)
    return asked.with_choices(choices or {}).with_calibration({}, frozenset(smoothed), {})


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", help="write the printed graphs that tests compare with, anew")


@dataclass
class Rewritten:
    """A model's Program after normalize and some passes."""

    model: nn.Module
    program: Program
    results: dict[str, PassResult]

    def run(self, *tensors: torch.Tensor) -> Any:
        """The rewritten program's outputs: a tensor where there is one, else a tuple."""
        evaluate = Evaluator(ModuleTensors(self.model), self.program.constants)
        weights = {w.name: evaluate(w.expr, w.prefix) for w in stored_weights(self.program)}
        out = compile_program(self.program, weights, torch.device("cpu"))(*tensors)
        return out[0] if len(out) == 1 else out

    def ops(self, graph: str = SHELL) -> list[str]:
        """The names of the operators of a graph, in order: "linear", "adaln", ..."""
        nodes = self.program.graphs[graph].graph.nodes
        return [n.target._opname for n in nodes if isinstance(n.target, torch._ops.OpOverload)]

    def nodes(self, op: str, graph: str = SHELL) -> list[fx.Node]:
        """The calls of an operator."""
        nodes = self.program.graphs[graph].graph.nodes
        return [n for n in nodes if isinstance(n.target, torch._ops.OpOverload) and n.target._opname == op]

    def reasons(self, name: str) -> list[str]:
        """Why sites of a pass were left alone."""
        return [reason for _, reason, _ in self.results[name].skipped]


@pytest.fixture
def rewrite():
    """rewrite(model, args, until="adaln", options={...}, target="cpu"): all passes up to one, on a model.

    options: `passes` of a recipe. Further arguments: `checkpoint`, `smoothed` and `choices` of `options_of`.
    """

    def make(
        model: nn.Module,
        args: tuple[torch.Tensor, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        until: str = PASSES[-1],
        options: Mapping[str, Any] | None = None,
        target: str = "cpu",
        **found: Any,
    ) -> Rewritten:
        program = capture(model, args, kwargs)
        normalize(program)
        given = {"attention": {"kind": "native"}, "w8a8": {"format": "off"}, **(options or {})}
        resolved = options_of(given, target, **found)
        passes = [load_pass(n) for n in PASSES[: PASSES.index(until) + 1]]
        results = run_passes(program, resolved, passes=passes)
        return Rewritten(model, program, {r.name: r for r in results})

    return make


@pytest.fixture
def shown(request, rewrite):
    """shown(name, model, args, until, options): compares the graph before and after a pass with <name>.txt."""

    def check(
        name: str, model: nn.Module, args: tuple[torch.Tensor, ...], until: str, options=None, **found: Any
    ) -> None:
        before = rewrite(model, args, until=PASSES[PASSES.index(until) - 1], options=options, **found)
        after = rewrite(model, args, until=until, options=options, **found)
        texts = [print_program(r.program) for r in (before, after)]
        text = f"# before {until}\n{texts[0]}\n# after {until}\n{texts[1]}"
        file = HERE / f"{name}.txt"
        if request.config.getoption("--rewrite", default=False):
            file.write_text(text)
        assert text == file.read_text(), f"{file.name} shows another graph; if it is meant, run with --rewrite"

    return check


class Form(nn.Module):
    """`form(x, module)` as a module, with a few weights of C channels to write with."""

    def __init__(self, form: Any, channels: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.form = form
        for name in ("a", "b", "c"):
            setattr(self, name, nn.Parameter(torch.randn(channels, generator=generator), requires_grad=False))

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.form(*tensors, self)


@pytest.fixture
def form():
    """form(function): a module that computes function(*tensors, module)."""
    return Form


@pytest.fixture
def assert_same():
    """assert_same(found, truth, bound=1e-5): max|a - b| <= bound * max|b|, for a tensor or each of several."""

    def check(found: Any, truth: Any, bound: float = 1e-5) -> None:
        pairs = [(found, truth)] if isinstance(truth, torch.Tensor) else list(zip(found, truth, strict=True))
        for a, b in pairs:
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            error = float((a.double() - b.double()).abs().max() / b.double().abs().max())
            assert error <= bound, f"differs by {error:.1e} of the largest value"

    return check
