"""examples/train_wan_mini.py: from nothing to a pipeline that diffusers opens, in parts or at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "train_wan_mini.py"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--run", str(folder), "--device", "cpu", "--smoke", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_pipeline(tmp_path):
    stopped = run(tmp_path, "--seconds", "0.1")  # over after one step
    assert stopped.returncode == 0, stopped.stderr
    assert "goes on" in stopped.stderr
    assert not (tmp_path / "wan-mini" / "model_index.json").exists()
    assert [p.name for p in (tmp_path / "vae-short" / "checkpoints").iterdir()] == ["step_00000001"]

    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "vae-short" / "checkpoints").iterdir()] == ["step_00000002"]
    folder = tmp_path / "wan-mini"
    assert (folder / "model_index.json").exists()
    logs = {p.stem for p in (folder / "training").iterdir()}
    assert logs == {"vae-short", "vae-long", "transformer-short", "transformer"}
    assert json.loads((tmp_path / "evaluation.json").read_text())["prompts"] == 2
    assert (tmp_path / "sheet.png").exists()

    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(folder)
    assert len(set(pipe.vae.config.latents_std)) == 16  # measured, one a channel
