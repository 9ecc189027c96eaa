"""A pass in a package of its own: registered or installed, it runs in its place, is verified, and is in the report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from turbocompile.passes import Pass, op, register, rewrite, unregister, variables

from turbocompile.errors import TurbocompileError
from turbocompile.rewrite.pipeline import PASSES, story

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "quick_gelu_pass"
INSTALLED = """
import runpy, turbocompile, turbocompile.passes
turbocompile.passes.register = lambda pass_: None  # the entry point alone brings the pass
names = runpy.run_path("main.py")
engine = names["engine"]
assert list(engine.report.passes).index("quick_gelu") < list(engine.report.passes).index("residual_norm")
assert "quick_gelu_pass" in str(engine.report.ops)
try:
    engine.save("folder")
except turbocompile.UnsupportedError as error:
    print(error)
"""


def run(code: list[str], **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *code], cwd=EXAMPLE, env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_runs_in_its_own_folder():
    said = run(["main.py"])
    assert "quick_gelu: 1 of 2 sites rewritten, relative L1" in said
    assert "does not have the form (x * sigmoid((x * 1.702)))" in said


def test_an_installed_pass_runs_without_being_registered_and_its_operator_is_saved_in_no_folder(tmp_path):
    (tmp_path / "quick_gelu_pass.py").write_text((EXAMPLE / "quick_gelu_pass.py").read_text())
    info = tmp_path / "quick_gelu_pass-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quick-gelu-pass\nVersion: 0.1\n")
    group = (EXAMPLE / "pyproject.toml").read_text().split('[project.entry-points."turbocompile.passes"]\n')[1]
    entry = group.split("\n")[0].replace('"', "")
    (info / "entry_points.txt").write_text(f"[turbocompile.passes]\n{entry}\n")
    said = run(["-c", INSTALLED], PYTHONPATH=str(tmp_path))
    assert "quick_gelu: 1 of 2 sites rewritten" in said
    assert "quick_gelu_pass.quick_gelu.default, which is not among the operators that an engine may hold" in said


(x,) = variables("x")


@rewrite(op(torch.ops.aten.relu.default)(x))
def nothing(m):
    return "it stays"


def test_a_registered_pass_is_part_of_the_story_until_it_is_taken_out():
    early = register(Pass("early", "exact", [nothing], before=("rope",)))
    try:
        names = [p.name for p in story()]
        assert names == [*PASSES[: PASSES.index("rope")], "early", *PASSES[PASSES.index("rope") :]]
        assert [p.name for p in story("rope")] == names[: names.index("rope") + 1]
        assert register(Pass("early", "exact", [nothing])) is not early  # a module that is imported anew
        assert [p.name for p in story()][-1] == "early"
    finally:
        unregister("early")
    assert [p.name for p in story()] == list(PASSES)
    with pytest.raises(TurbocompileError, match="no pass 'early' is registered; those that are: none"):
        unregister("early")


def test_a_built_in_pass_is_not_replaced():
    with pytest.raises(TurbocompileError, match="there is a built-in pass 'norms'"):
        register(Pass("norms", "exact", [nothing]))
