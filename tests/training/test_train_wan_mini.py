"""examples/train_wan_mini.py: from nothing to a pipeline that diffusers opens, in parts or at once."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from turbocompile.wan_mini import train as wan_mini

SCRIPT = Path(__file__).parents[2] / "examples" / "train_wan_mini.py"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the script as a command of this process, with an autoencoder of an eighth of the channels.

    The script keeps its state between two runs in files alone. Afterwards, torch's switches are as before.
    """
    monkeypatch.setattr(wan_mini, "VAE", {**wan_mini.VAE, "base_dim": 2})
    switches = [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]
    before = [(owner, name, getattr(owner, name)) for owner, name in switches]
    flash = torch.backends.cuda.flash_sdp_enabled()

    def start(*arguments: str) -> None:
        command = [str(SCRIPT), "--run", str(tmp_path), "--device", "cpu", "--smoke", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(str(SCRIPT), run_name="__main__")

    yield start
    for owner, name, value in before:
        setattr(owner, name, value)
    torch.backends.cuda.enable_flash_sdp(flash)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_pipeline(run, tmp_path, capsys):
    run("--seconds", "0.1")  # over after one step
    assert "goes on" in capsys.readouterr().err
    assert not (tmp_path / "wan-mini" / "model_index.json").exists()
    assert [p.name for p in (tmp_path / "vae-short" / "checkpoints").iterdir()] == ["step_00000001"]

    run()
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
