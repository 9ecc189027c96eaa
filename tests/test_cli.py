"""The command line as its users meet it: results, exit codes, and one sentence for each mistake."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from videos import read_video

from turbocompile.cli import main
from turbocompile.errors import VerificationError
from turbocompile.version import __version__

ROOT = Path(__file__).parent.parent
RECIPE = """\
model: {preset: wan-tiny}
shapes: [{height: 64, width: 64, num_frames: 5}]
target: cpu
"""


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result: Result, sentence: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr without a traceback."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert sentence in lines[0]
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def engine(recipe) -> Path:
    folder = recipe.parent / "engine"
    result = call("optimize", recipe, "-o", folder)
    assert result.exit_code == 0, result.output
    return folder


def test_version_and_help_need_no_torch():
    code = (
        "import sys; from turbocompile.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules and 'rich' not in sys.modules"
    )
    for option in ("--version", "--help"):
        done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
    assert call("--version").stdout == f"turbocompile, version {__version__}\n"


def test_every_command_explains_itself():
    for name, command in main.commands.items():
        result = call(name, "--help")
        assert result.exit_code == 0
        assert command.help
        assert command.help.splitlines()[0] in result.stdout


def test_optimize_says_what_was_rewritten(recipe, tmp_path):
    result = call("optimize", recipe, "-o", tmp_path / "engine", "--set", "verify=off")
    assert result.exit_code == 0
    assert "attention: 4 of 4 sites rewritten" in result.stdout
    assert str(tmp_path / "engine") in result.stdout
    assert "capture" in result.stderr  # progress
    assert (tmp_path / "engine" / "manifest.json").is_file()


def test_optimize_prints_its_report_as_json(recipe, tmp_path):
    result = call("optimize", recipe, "-o", tmp_path / "engine", "--json", "--set", "passes=off")
    report = json.loads(result.stdout)
    assert report["passes"] == {}
    assert report["ops"]


def test_dry_run_writes_nothing(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("optimize", recipe, "--dry-run", "--json", "--set", "verify=off")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["passes"]["attention"]["rewritten"] == 4
    assert list(tmp_path.iterdir()) == []


def test_run_writes_a_video(engine, tmp_path):
    out = tmp_path / "out.mp4"
    result = call("run", engine, "--prompt", "a cat", "-o", out, "--seed", "3")
    assert result.exit_code == 0, result.output
    assert f"video: {out}" in result.stdout
    assert read_video(out)[0].shape == (5, 64, 64, 3)
    assert result.stderr.count("Warning: ") == 1
    assert "Warning: the weights are synthetic, so the picture is noise" in result.stderr


@pytest.mark.parametrize("command", ["run", "bench"])
def test_vram_takes_a_size_with_a_unit_for_a_gpu(engine, command, tmp_path):
    given = (engine, *(("--prompt", "x", "-o", tmp_path / "out.mp4") if command == "run" else ()))
    wrong = call(command, *given, "--vram", "12")
    assert wrong.exit_code == 2
    assert wrong.stderr.splitlines()[-1] == "Error: vram: 12 has no unit; write 12GB, 12GiB or auto"
    wrong = call(command, *given, "--vram", "12GB", "--device", "cpu")
    assert wrong.exit_code == 2
    assert "vram plans the memory of a GPU, and the engine runs on cpu; leave it out there" in wrong.stderr


def test_vram_says_what_it_chose(engine, monkeypatch, tmp_path):
    monkeypatch.setattr("turbocompile.runtime.planned.memory_budget", lambda vram, device: 10**9)
    monkeypatch.setattr("turbocompile.runtime.planned.host_bandwidth", lambda device: 25e9)
    result = call("run", engine, "--prompt", "x", "--steps", "1", "-o", tmp_path / "out.mp4", "--vram", "1GB", "--json")
    assert result.exit_code == 0, result.output
    said = [line for line in result.stderr.splitlines() if line.startswith("memory: transformer stays on the card")]
    assert len(said) == 1
    assert "of 1.0 GB" in said[0]
    memory = json.loads(result.stdout)["memory"]
    assert memory["budget"] == 10**9
    assert memory["parts"] == {"vae": "resident", "text_encoder": "resident"}


def test_an_adapter_is_a_part_of_the_engine_or_of_one_video(recipe, engine, tmp_path):
    shape = load_file(engine / "weights-transformer-00001.safetensors")["proj_out.weight"].shape
    lora = tmp_path / "lora.safetensors"
    save_file({"diffusion_model.head.head.diff": torch.randn(shape)}, lora)
    assert call("optimize", recipe, "-o", tmp_path / "merged", "--lora", f"{lora}:0.5").exit_code == 0
    given = ("--prompt", "x", "--steps", "1", "-o")
    assert call("run", tmp_path / "merged", *given, tmp_path / "a.mp4").exit_code == 0
    assert call("run", engine, "--lora", f"{lora}:0.5", *given, tmp_path / "b.mp4").exit_code == 0
    assert call("run", engine, *given, tmp_path / "c.mp4").exit_code == 0
    videos = [read_video(tmp_path / f"{name}.mp4")[0] for name in "abc"]
    assert (videos[0] == videos[1]).all()
    assert (videos[0] != videos[2]).any()


def test_run_prints_json(engine, tmp_path):
    options = ("--steps", "1", "--shape", "64x64x5", "--frames", tmp_path / "png", "--json")
    result = call("run", engine, "--prompt", "a cat", "-o", tmp_path / "out.mp4", *options)
    found = json.loads(result.stdout)
    assert found["paths"] == [str(tmp_path / "out.mp4")]
    assert found["shape"] == [1, 5, 64, 64, 3]
    assert found["timings"]["denoise"] > 0
    assert len(list((tmp_path / "png").iterdir())) == 5


def test_explain_shows_passes_graphs_json_and_a_page(engine, tmp_path):
    assert "residual_norm" in call("explain", engine).stdout
    assert "RTX 4090" in call("explain", engine, "--gpu", "rtx4090").stdout
    assert "turbocompile.adaln" in call("explain", engine, "--after", "adaln").stdout
    assert "turbocompile.adaln" not in call("explain", engine, "--after", "norms").stdout
    report = json.loads(call("explain", engine, "--json", "--gpu", "a100").stdout)
    assert report["passes"]["adaln"]["rewritten"] == 5
    assert report["gpu"] == "a100"
    assert report["roofline"][0]["seconds"] > 0
    assert call("explain", engine, "--html", tmp_path / "new" / "report.html").exit_code == 0
    assert "residual_norm" in (tmp_path / "new" / "report.html").read_text()


def test_a_terminal_without_unicode_shows_what_it_can(engine, tmp_path):
    place = tmp_path / "\u5f15\u64ce"  # in no 8-bit encoding
    place.symlink_to(engine)
    command = [sys.executable, "-c", "from turbocompile.cli import main; main()", "explain", str(place)]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=env, timeout=900)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("ascii")
    assert "residual_norm" in text
    assert " us " in text or " ms " in text
    assert "12 µs … 引".encode("ascii", "turbocompile") == b"12 us ... ?"  # registered by the engine's build
    nothing = subprocess.run([*command[:-1], str(place / "not")], capture_output=True, env=env, timeout=900)
    assert nothing.returncode == 2
    assert nothing.stderr.startswith(b"Error: ")


def test_verify_says_that_the_engine_is_whole_and_right(engine):
    result = call("verify", engine, "--numeric")
    assert result.exit_code == 0, result.output
    assert "all as they were built" in result.stdout
    assert "against its source model" in result.stdout
    assert json.loads(call("verify", engine, "--json").stdout)["good"] is True


def test_verify_fails_where_the_numbers_are_off(engine, monkeypatch):
    import turbocompile.tools.verify_folder

    monkeypatch.setattr(turbocompile.tools.verify_folder, "EXACT_LIMIT", -1.0)
    assert call("verify", engine, "--numeric").exit_code == 1


def test_doctor_reports_this_machine():
    result = call("doctor", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == (0 if found["healthy"] else 1)
    assert {"torch", "triton", "GPU", "tensorrt", "torchao"} <= {row["name"] for row in found["rows"]}
    assert "torch" in call("doctor").stdout


def test_an_example_can_be_built(tmp_path):
    result = call("init-example", tmp_path / "wan", "--head-dim", "128")
    assert result.exit_code == 0, result.output
    recipe = tmp_path / "wan" / "recipe.yaml"
    assert str(recipe) in result.stdout
    planned = call("optimize", recipe, "--dry-run", "--json", "--set", "verify=off")
    assert planned.exit_code == 0, planned.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("optimize", "nowhere.yaml", "-o", "engine"), "there is no such recipe"),
        (("optimize", "{recipe}"), "name the engine's folder with -o"),
        (("optimize", "{recipe}", "-o", "{engine}"), "never written over"),
        (("optimize", "{recipe}", "--dry-run", "--set", "passes.atention=sage"), "did you mean attention"),
        (("optimize", "{recipe}", "--dry-run", "--set", "target"), "name.of.field=value"),
        (("run", "nowhere", "--prompt", "x"), "is no folder"),
        (("run", "{engine}"), "--prompt"),
        (("run", "{engine}", "--prompt", "x", "--steps", "9"), "steps must be 1 to 4 for rcm"),
        (("run", "{engine}", "--prompt", "x", "-o", "x.gif"), "written as .mp4"),
        (("run", "{engine}", "--prompt", "x", "--device", "tpu"), "there is no device 'tpu'"),
        (("run", "{engine}", "--prompt", "x", "--seed", "-1"), "-1 is not in the range"),
        (("run", "{engine}", "--prompt", "x", "--lora", "l.pth:0.5"), "there is no file or folder l.pth; a weight"),
        (("optimize", "{recipe}", "-o", "x", "--lora", "l.pth:0.5"), "l.pth; a weight follows after a colon"),
        (("optimize", "{recipe}", "-o", "x", "--lora", "l.pth:nan"), "lora.0.weight must be a finite number"),
        (("explain", "{engine}", "--after", "nothing"), "it has adaln, attention"),
        (("explain", "{engine}", "--after", "adaln", "--module", "x"), "its modules are transformer"),
        (("explain", "{engine}", "--gpu", "voodoo"), "no figure for a GPU"),
        (("verify", "nowhere"), "is no folder"),
        (("init-example", "{engine}"), "is not an empty folder"),
        (("init-example", "x", "--variant", "t3v"), "t3v"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(recipe, engine, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    refused(call(*(a.format(recipe=recipe, engine=engine) for a in arguments)), sentence)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_sentence(recipe, engine, tmp_path):
    (tmp_path / "file").write_text("")
    refused(call("optimize", recipe, "-o", tmp_path / "file" / "engine", "--set", "verify=off"), "file")
    result = call("run", engine, "--prompt", "x", "--steps", "1", "-o", tmp_path / "file" / "out.mp4")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: ")


@pytest.mark.parametrize(("number", "code"), [(errno.EACCES, 2), (errno.EROFS, 2), (errno.ENOSPC, 1)])
def test_what_the_system_refuses_is_one_sentence(recipe, monkeypatch, number, code):
    import turbocompile.build.from_recipe

    def fails(*args, **kwargs):
        raise OSError(number, os.strerror(number), "/some/engine")

    monkeypatch.setattr(turbocompile.build.from_recipe, "optimize_recipe", fails)
    result = call("optimize", recipe, "--dry-run")
    assert result.exit_code == code
    assert result.stderr.splitlines()[-1] == f"Error: /some/engine: {os.strerror(number)}"


def test_a_failed_verification_has_exit_code_1(recipe, tmp_path, monkeypatch):
    import turbocompile.build.from_recipe

    def fails(*args, **kwargs):
        raise VerificationError("a pass changed\n the numbers")

    monkeypatch.setattr(turbocompile.build.from_recipe, "optimize_recipe", fails)
    result = call("optimize", recipe, "-o", tmp_path / "engine")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "Error: a pass changed the numbers"


def test_an_unexpected_error_keeps_its_traceback(recipe, monkeypatch):
    import turbocompile.build.from_recipe

    def fails(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(turbocompile.build.from_recipe, "optimize_recipe", fails)
    assert isinstance(call("optimize", recipe, "--dry-run").exception, ZeroDivisionError)


def test_the_example_script_makes_a_video_and_says_how(engine, tmp_path):
    script = ROOT / "examples" / "run_engine.py"
    command = [sys.executable, str(script), str(engine), "--prompt", "a cat", "-o", str(tmp_path / "out.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert read_video(tmp_path / "out.mp4")[0].shape == (5, 64, 64, 3)
    for part in ("rewritten:", "residual_norm", "capture", "denoise", f"video: {tmp_path / 'out.mp4'}"):
        assert part in done.stdout
    wrong = subprocess.run([*command[:2], "nowhere", *command[3:]], capture_output=True, text=True, timeout=900)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "Error: nowhere is no folder" in wrong.stderr


def test_results_go_nowhere_that_loses_something(recipe, engine, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    refused(call("calibrate", recipe, "-o", tmp_path / "file"), "give a name that ends so")
    refused(
        call("run", engine, "--prompt", "x", "-o", tmp_path / "a.mp4", "--frames", tmp_path / "file"), "not a folder"
    )
    refused(call("explain", engine, "--html", engine / "report.html"), "is inside the engine")
    refused(call("explain", engine, "--html", tmp_path / "p.html", "--json"), "are different outputs")
    refused(call("bench", engine, "--device", "meta"), "engines run on cpu, cuda")
    assert (tmp_path / "file").read_text() == "kept"
    assert call("explain", engine, "--html", tmp_path / "p.html").exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "p.html"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = call("bench", engine, "--calls", "1")
    assert result.exit_code == 0
    assert "forward" in result.stdout
    assert "Warning: the result is not kept in the cache" in result.stderr
    assert call("verify", engine).exit_code == 0


def test_a_build_that_is_stopped_leaves_nothing(recipe, tmp_path):
    """By SIGTERM, as a scheduler stops it, while the weights are written."""
    code = """
import os, signal, sys
import turbocompile.build.from_recipe as build
from turbocompile.cli import main
def stop(*arguments, **options):
    os.kill(os.getpid(), signal.SIGTERM)
build.write_recipes_module = stop
main(sys.argv[1:])
"""
    command = (
        sys.executable,
        "-c",
        code,
        "optimize",
        str(recipe),
        "-o",
        str(tmp_path / "engine"),
        "--set",
        "verify=off",
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 128 + 15, done.stderr
    assert not list(tmp_path.iterdir())
