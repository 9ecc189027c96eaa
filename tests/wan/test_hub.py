"""A model's folder on the hub: what is said without weights or network, and whether anything answers."""

from __future__ import annotations

import urllib.error
from email.message import Message

import pytest

from turbocompile.errors import RecipeError
from turbocompile.recipe.presets import PRESETS
from turbocompile.recipe.schema import Recipe
from turbocompile.wan import hub
from turbocompile.wan.source import open_source


def opened(model):
    return open_source(Recipe.from_dict({"model": model, "target": "cpu"}))


def test_without_weights_and_hub_one_sentence_says_what_to_do(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError) as caught:
        opened("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    message = str(caught.value)
    assert "\n" not in message
    for word in ("hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "model.path", "--set model.weights=synthetic"):
        assert word in message
    synthetic = opened({"path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "weights": "synthetic"})
    assert dict(synthetic.transformers["transformer"].config) == dict(PRESETS["wan2.1-t2v-1.3b"].transformer)


def test_a_hub_id_in_the_cache_is_opened_without_a_network(example, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(repo, *, local_files_only=False, **options):
        asked.append((repo, local_files_only))
        return str(example())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(hub, "_reachable", lambda url: pytest.fail("asked the network"))
    assert opened("owner/wan").task == "t2v"
    assert asked == [("owner/wan", True)]


@pytest.mark.parametrize(
    ("answer", "reachable"),
    [
        (urllib.error.URLError("no route"), False),
        (TimeoutError(), False),
        (urllib.error.HTTPError("u", 401, "Unauthorized", Message(), None), True),
    ],
)
def test_a_refusal_is_an_answer_and_silence_is_not(monkeypatch, answer, reachable):
    def urlopen(url, timeout):
        raise answer

    monkeypatch.setattr(hub.urllib.request, "urlopen", urlopen)
    assert hub._reachable("https://hub.example/api") is reachable
