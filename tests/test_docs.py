"""What the documents say is so."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import torch
from torch import nn

from turbocompile.recipe import Recipe, reference

ROOT = Path(__file__).parent.parent


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.S | re.M)


def test_the_readmes_commands_are_the_main_job_and_the_tests():
    first, second = blocks("README.md", "bash")[:2]
    for part in ("pip install -e .", "turbocompile optimize examples/wan-mini.yaml", "python examples/run_engine.py"):
        assert part in first
    assert "pip install -e" in second
    assert "pytest" in second
    for block in (first, second):
        subprocess.run(["bash", "-n", "-c", block], check=True)


def test_ci_runs_the_readmes_second_block(tmp_path):
    """The script with stand-ins for python, apt-get and bash's timeout: what it would run is the block."""
    (tmp_path / "venv.sh").write_text('#!/bin/sh\n[ "$2" = venv ] && mkdir -p "$3/bin"\nexit 0\n')
    (tmp_path / "timeout").write_text('#!/bin/sh\nfor last; do :; done\nprintf "%s\\n" "$last" > "$SEEN"\n')
    for tool in ("python", "apt-get"):
        (tmp_path / tool).write_text("#!/bin/sh\nexit 0\n")
    for tool in tmp_path.iterdir():
        tool.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "venv.sh")}
    subprocess.run([ROOT / ".ci" / "run"], env=env | {"SEEN": str(tmp_path / "seen")}, check=True, timeout=900)
    assert (tmp_path / "seen").read_text().strip() == blocks("README.md", "bash")[1].strip()


def test_the_recipe_page_lists_every_field():
    assert reference() in (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")


def test_the_readmes_recipe_is_one():
    import yaml

    recipe = Recipe.from_dict(yaml.safe_load(blocks("README.md", "yaml")[0]))
    assert recipe.target == "sm90"
    assert recipe.passes.w8a8.format == "fp8"


class Dit(nn.Module):
    """A block of a model of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(8, 64)
        self.mix = nn.Linear(32, 32)
        self.text = nn.Linear(16, 32)

    def forward(self, x, timestep, context):
        scale, shift = self.modulation(timestep[:, None] * torch.ones(1, 8)).unsqueeze(1).chunk(2, dim=-1)
        y = nn.functional.layer_norm(x, (32,)) * (1 + scale) + shift
        return x + self.mix(y) + self.text(context).mean(1, keepdim=True)


def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"model": Dit().eval(), "x": torch.randn(1, 6, 32), "timestep": torch.rand(1)}
    names["context"] = torch.randn(1, 4, 16)
    exec(blocks("README.md", "python")[0], names)
    assert "adaln" in capsys.readouterr().out
    again = names["engine"](names["x"], names["timestep"], names["context"])
    assert torch.equal(again, names["out"])


def test_the_pass_of_the_contributing_page_is_that_of_the_example():
    """tests/passes/test_third_party.py runs it."""
    file = ROOT / "examples" / "quick_gelu_pass" / "quick_gelu_pass.py"
    assert blocks("CONTRIBUTING.md", "python")[0] == file.read_text(encoding="utf-8")


def test_links_between_documents_lead_somewhere():
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
