"""Image-to-video conditions equal those of diffusers' pipeline."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from turbocompile.video.image import image_condition, image_embeddings, image_tensor


@pytest.fixture(scope="module")
def pipe(example):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(example("i2v-image"))


@pytest.fixture(scope="module")
def picture():
    generator = torch.Generator().manual_seed(0)
    return Image.fromarray(torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8, generator=generator).numpy())


def test_the_condition_equals_the_pipelines(pipe, picture):
    image = image_tensor(picture, 32, 48)
    with torch.no_grad():
        _, theirs = pipe.prepare_latents(image, 1, 16, 32, 48, 5, torch.float32, torch.device("cpu"))
    ours = image_condition(pipe.vae, image, 5)
    assert ours.shape == (1, 20, 2, 4, 6)
    assert torch.equal(ours[:, :4], theirs[:, :4])
    assert ours[:, :4, 0].min() == 1
    assert ours[:, :4, 1:].abs().max() == 0
    # they multiply by 1 / std, we divide: one rounding of values up to 4
    torch.testing.assert_close(ours, theirs, atol=4 * 2**-23, rtol=0)


def test_clip_tokens_equal_the_pipelines(pipe, picture):
    with torch.no_grad():
        theirs = pipe.encode_image(picture)
    ours = image_embeddings(pipe.image_encoder, pipe.image_processor, picture)
    assert ours.shape == (1, 17, 32)
    assert torch.equal(ours, theirs)


def test_pictures_are_stretched_to_the_size_and_range(picture):
    image = image_tensor(Image.new("RGBA", (30, 20), (255, 0, 255, 255)), 16, 32)
    assert image.shape == (1, 3, 16, 32)
    assert image[0, :, 0, 0].tolist() == [1.0, -1.0, 1.0]
    # antialiasing: shrinking noise of std 74 by 2.5 x 3.1 averages some pixels, so that its std falls by more than half
    small = image_tensor(picture, 16, 16)
    assert small.std() < 0.5 * image_tensor(picture, 40, 50).std()
