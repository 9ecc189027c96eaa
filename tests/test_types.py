"""The wheel: what a user installs is complete, and its types hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"turbocompile": "turbocompile"} | {f"turbocompile/{f}": f for f in ("passes", "kernels", "backends")}


def done(*command: str, cwd: Path, **env: str) -> str:
    result = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the sources and installed into a folder of its own."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    names = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    listed = names.stdout.split("\0") if names.returncode == 0 else []
    if not listed:  # sources without their repository
        found = [p.relative_to(ROOT) for p in ROOT.rglob("*")]
        listed = [str(p) for p in found if not any(part.startswith(".") or part == "build" for part in p.parts)]
    files = [ROOT / n for n in listed if n and (ROOT / n).is_file()]
    for file in files:  # a build leaves folders behind, which must not be the checkout's
        target = source / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    done(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(place), str(source), cwd=place)
    wheel = next(place.glob("turbocompile-*.whl"))
    target = place / "installed"
    done(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel), cwd=place)
    return target


def test_the_wheel_holds_all_four_source_folders(installed):
    for package, folder in FOLDERS.items():
        expected = {p.name for p in (ROOT / folder).glob("*.py")}
        assert {p.name for p in (installed / package).glob("*.py")} == expected
    assert (installed / "turbocompile" / "py.typed").is_file()
    info = next(installed.glob("turbocompile-*.dist-info"))
    assert {p.name for p in (info / "licenses").iterdir()} == {"LICENSE", "NOTICE"}


def test_the_wheel_runs_from_where_it_is(installed, tmp_path):
    code = "import turbocompile, turbocompile.passes, turbocompile.kernels; print(turbocompile.__file__)"
    found = done(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(found.strip()).is_relative_to(installed)


def test_types_hold_in_the_installed_wheel(installed, tmp_path):
    config = str(ROOT / "pyproject.toml")
    command = (sys.executable, "-m", "mypy", "--config-file", config, "--cache-dir", str(tmp_path / "cache"))
    done(*command, "-p", "turbocompile", cwd=tmp_path, MYPYPATH=str(installed))
