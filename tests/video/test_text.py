"""Prompts become what diffusers' pipeline makes of them."""

from __future__ import annotations

import pytest
import torch

from turbocompile.video.text import clean_prompt, encode_prompt


@pytest.fixture(scope="module")
def pipe(example):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(example())


PROMPTS = ["A red  cat &amp;amp; a dog\n", "", "word " * 100]


def test_prompts_are_cleaned_as_diffusers_does():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for prompt in [*PROMPTS, "caf\u00c3\u00a9 \u201cquoted\u201d", " x\u3000y "]:
        assert clean_prompt(prompt) == prompt_clean(prompt)


def test_embeddings_equal_the_pipelines(pipe):
    with torch.no_grad():
        theirs = pipe._get_t5_prompt_embeds(PROMPTS, max_sequence_length=64)
    ours = encode_prompt(PROMPTS, pipe.tokenizer, pipe.text_encoder, 64)
    assert torch.equal(ours, theirs)


def test_embeddings_are_zero_beyond_the_prompt(pipe):
    one = encode_prompt("A red cat", pipe.tokenizer, pipe.text_encoder, dtype=torch.bfloat16)
    assert one.shape == (1, 512, 64)
    assert one.dtype == torch.bfloat16
    length = len(pipe.tokenizer("A red cat").input_ids)
    assert (one[:, :length].abs().sum(-1) > 0).all()
    assert (one[:, length:] == 0).all()
