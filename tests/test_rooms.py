"""The house: which room imports which, what a file and a function may measure, what a user's first call imports."""

import ast
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest
import turbocompile.backends
import turbocompile.kernels
import turbocompile.passes

import turbocompile

# From the top: a file imports files of its own room and of the rooms before it, none after. The files at the root of
# the package are a room after the kernels; the doors are what documents name, and stand last.
ROOMS = (
    *("kernels", "root", "recipe", "ir", "capture", "rewrite", "numerics", "passes", "backends", "report", "wan"),
    *("runtime", "build", "sampling", "video", "training", "wan_mini", "tools", "cli", "doors"),
)
DOORS = ("turbocompile", "turbocompile.generate", "turbocompile.evaluate", "turbocompile.torchao")
OF_KERNELS = {"turbocompile.errors", "turbocompile.version"}
LINES, FUNCTION = 500, 60


def _sources() -> dict[str, Path]:
    """Module name -> its file, of all four source folders."""
    folders = {"turbocompile": turbocompile, "turbocompile.passes": turbocompile.passes}
    folders |= {"turbocompile.kernels": turbocompile.kernels, "turbocompile.backends": turbocompile.backends}
    found = {}
    for package, module in folders.items():
        root = Path(module.__file__).parent
        for file in root.rglob("*.py"):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = file
    return found


SOURCES = _sources()
TREES = {name: ast.parse(file.read_text()) for name, file in SOURCES.items()}


def room(name: str) -> str:
    """The room of a module."""
    if name in DOORS:
        return "doors"
    first = name.split(".")[1]
    return first if first in ROOMS else "root"


def imports(name: str) -> list[tuple[str, str]]:
    """(module, name taken out of it) of every import of the project in a file, also within functions and for types."""
    found = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found += [(a.name, "") for a in node.names if a.name.split(".")[0] == "turbocompile"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "turbocompile":
            assert node.level == 0, f"{name} imports relatively"
            for a in node.names:
                full = f"{node.module}.{a.name}"
                found.append((full, "") if full in SOURCES else (str(node.module), a.name))
    return found


def test_the_four_folders_are_looked_at():
    assert len(SOURCES) > 150
    assert {room(name) for name in SOURCES} == set(ROOMS)


def test_a_room_imports_only_rooms_above_it():
    order = {name: place for place, name in enumerate(ROOMS)}
    wrong = [
        f"{name} imports {module}"
        for name in SOURCES
        for module, _ in imports(name)
        if order[room(module)] > order[room(name)] and not (room(name) == "kernels" and module in OF_KERNELS)
    ]
    assert wrong == []


def test_kernels_need_torch_and_triton_alone():
    foreign = {
        module
        for name in SOURCES
        if room(name) == "kernels"
        for module, _ in imports(name)
        if room(module) != "kernels" and module not in OF_KERNELS
    }
    assert foreign == set()
    code = (
        "import sys; import turbocompile.kernels; "
        "ours = {m for m in sys.modules if m.startswith('turbocompile.') and 'kernels' not in m}; "
        "print(ours, [m for m in ('rich', 'click', 'yaml', 'networkx', 'diffusers') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split("}")[1].strip() == "[]"
    assert set(said.split("}")[0].strip("{").replace("'", "").split(", ")) <= OF_KERNELS


def test_files_import_each_other_in_no_circle():
    graph = nx.DiGraph((name, module) for name in SOURCES for module, _ in imports(name) if module != name)
    assert list(nx.simple_cycles(graph, length_bound=8)) == []


def test_no_private_name_is_imported_across_files():
    wrong = [
        f"{name} imports {module}.{taken}"
        for name in SOURCES
        for module, taken in imports(name)
        if taken.startswith("_") and not taken.endswith("__")
    ]
    assert wrong == []


def test_files_and_functions_are_short_outside_the_kernels():
    wrong = []
    for name, file in SOURCES.items():
        if room(name) == "kernels":
            continue
        lines = len(file.read_text().splitlines())
        wrong += [f"{name}: {lines} lines"] if lines > LINES else []
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                wrong += [f"{name}.{node.name}: {lines} lines"] if lines > FUNCTION else []
    assert wrong == []


@pytest.mark.parametrize("name", sorted(n for n, f in SOURCES.items() if f.name == "__init__.py"))
def test_a_room_says_what_it_is(name):
    said = ast.get_docstring(TREES[name])
    assert said
    assert said.split("\n")[0].endswith((".", ":"))


FIRST_CALL = """
import sys
import torch
from torch import nn
import turbocompile


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Dit(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


engine = turbocompile.optimize(Dit(), (torch.randn(1, 6, 16),))
engine(torch.randn(1, 6, 16))
engine.save(sys.argv[1])
print(*sorted(sys.modules))
"""


def test_the_first_call_and_a_load_import_what_they_need(tmp_path):
    """`optimize` of a plain module knows no Wan and none of the libraries around it; `load` knows no compiler."""

    def run(code: str) -> set[str]:
        command = [sys.executable, "-c", code, str(tmp_path / "engine")]
        return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())

    imported = run(FIRST_CALL)
    assert {"turbocompile.build.from_module", "turbocompile.rewrite.pipeline"} <= imported
    assert {m.split(".")[0] for m in imported} & {"tokenizers", "diffusers", "transformers"} == set()
    assert {m for m in imported if m.startswith("turbocompile.wan")} == set()
    loaded = run("import sys, turbocompile; turbocompile.load(sys.argv[1]); print(*sorted(sys.modules))")
    assert "turbocompile.runtime.engine" in loaded
    compiler = ("capture", "rewrite", "numerics", "passes", "build", "wan")
    assert {m for m in loaded if m.startswith(tuple(f"turbocompile.{r}" for r in compiler))} == set()
    assert {m.split(".")[0] for m in loaded} & {"tokenizers", "diffusers", "transformers"} == set()
