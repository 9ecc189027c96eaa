"""wan-mini: its batches are functions of the step, its parts are Wan's, and the folder it writes is a pipeline."""

from __future__ import annotations

import json

import pytest
import torch

from turbocompile.training.losses import flow_matching_loss
from turbocompile.video.text import encode_prompt
from turbocompile.wan import tokenizer as wan_tokenizer
from turbocompile.wan.components import load_components
from turbocompile.wan_mini import train as wan_mini
from turbocompile.wan_mini import world

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clips() -> wan_mini.Clips:
    return wan_mini.Clips(batch=6, side=64, frames=9, device=CPU)


@pytest.fixture(scope="module")
def model() -> wan_mini.TextToVideo:
    return wan_mini.build_text_to_video(num_layers=1).eval()


@pytest.fixture(scope="module")
def vae():
    return wan_mini.build_vae().eval().requires_grad_(False)


def test_a_clip_is_a_function_of_its_step(clips):
    one, again, other = clips(5), clips(5), clips(6)
    assert one["video"].shape == (6, 3, 9, 64, 64)
    assert one["noise"].shape == (6, 16, 3, 8, 8)
    for name in one:
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name], other[name])


def test_clips_show_the_digit(clips):
    """The window lies between the digit's square at its one edge and at its other, so most show some of it."""
    ground = world.GROUND / 127.5 - 1.0
    shown = torch.cat([((clips(step)["video"] - ground).abs() > 0.2).flatten(1).any(1) for step in range(10)])
    assert shown.float().mean() > 0.8


def test_light_norms_are_the_autoencoders(vae):
    """Float32: the product of scale and gamma is rounded once more, two roundings of 2^-24 of values up to 8."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    for images, shape in ((False, (2, 16, 3, 4, 5)), (True, (6, 16, 4, 5))):
        norm = WanRMS_norm(16, images=images)
        torch.nn.init.normal_(norm.gamma)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        expected = norm(x)
        holder = torch.nn.ModuleList([norm])
        wan_mini.light_norms(holder)
        assert torch.allclose(norm(x), expected, atol=8 * 2**-22, rtol=0)
        assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_the_autoencoder_is_wans(vae):
    """8 times smaller in space, 4 times in time; without noise it is encode and decode."""
    wrapped = wan_mini.Autoencoder(vae)
    video = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    made, mean, logvar = wrapped(video, torch.zeros(1, 16, 2, 4, 4))
    assert made.shape == video.shape
    assert mean.shape == logvar.shape == (1, 16, 2, 4, 4)
    assert torch.equal(made, vae.decode(vae.encode(video).latent_dist.mode()).sample)
    loss, parts = wan_mini.reconstruct(wrapped, {"video": video, "noise": torch.zeros(1, 16, 2, 4, 4)})
    expected = parts["l1"] + 2 * parts["mse"] + wan_mini.KL_WEIGHT * parts["kl"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_statistics_are_those_of_the_channels():
    latents = torch.randn(7, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    mean, std = wan_mini.statistics(latents)
    assert mean == pytest.approx(latents.double().mean((0, 2, 3, 4)).tolist())
    assert std == pytest.approx(latents.double().std((0, 2, 3, 4), correction=0).tolist())


def test_every_word_of_a_prompt_is_one_token():
    every = world.combinations()
    ids, mask = wan_mini.tokenize([c.prompt for c in every] + [""])
    assert ids.shape == mask.shape == (len(every) + 1, wan_mini.PROMPT_TOKENS)
    words = torch.tensor([len(c.prompt.split()) + 1 for c in every] + [1])  # and the end
    assert torch.equal(mask.sum(1), words)
    assert len({tuple(row) for row in ids.tolist()}) == len(every) + 1  # no two prompts alike
    unknown = wan_tokenizer.build_tokenizer(wan_mini.WORDS).token_to_id(wan_tokenizer.UNK)
    assert not (ids == unknown).any()


def test_a_batch_of_latents_is_a_function_of_its_step():
    latents = torch.randn(12, 16, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    prompts = [world.combinations()[i].prompt for i in range(12)]
    data = wan_mini.Latents(400, latents, prompts)
    one, again, other = data(3), data(3), data(4)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["noise"], other["noise"])
    # the network's input and target belong to the drawn latent: x_t - t (noise - x_0) = x_0
    t = one["timestep"].reshape(-1, 1, 1, 1, 1) / 1000
    assert torch.allclose(one["noisy"] - t * (one["noise"] - one["latents"]), one["latents"], atol=1e-5)
    # each has its own prompt, or none: one in ten, 4 standard deviations of 400 draws either way
    empty = one["mask"].sum(1) == 1
    assert 400 * 0.1 - 24 < empty.sum() < 400 * 0.1 + 24
    ids, _ = wan_mini.tokenize(prompts)
    chosen = (one["latents"].flatten(1)[:, None] == latents.flatten(1)).all(2).float().argmax(1)
    assert torch.equal(one["ids"][~empty], ids[chosen[~empty]])


def test_shorter_samples_are_the_first_frames():
    latents = torch.randn(5, 16, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    short = wan_mini.Latents(7, latents, ["a red one moves up"] * 5, frames=1)(0)
    assert short["noisy"].shape == short["latents"].shape == (7, 16, 1, 2, 2)
    assert all((row[None] == latents[:, :, :1]).flatten(1).all(1).any() for row in short["latents"])


def test_the_first_guess_is_nothing(model):
    """The last layer starts at zero weights, so that the first loss is that of the mean: E (noise - x0)^2 = 2."""
    latents = torch.randn(4, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    data = wan_mini.Latents(8, latents, ["a red one moves up"] * 4)
    batch = data(0)
    made = model(batch["noisy"], batch["timestep"], batch["ids"], batch["mask"])
    assert made.shape == batch["latents"].shape
    loss, _ = wan_mini.denoise(model, batch)
    assert torch.equal(loss, flow_matching_loss(made, batch["latents"], batch["noise"]))
    assert 1.5 < loss < 2.5


def test_every_linear_of_a_block_takes_a_multiple_of_128(model):
    widths = {m.in_features for m in model.transformer.blocks.modules() if isinstance(m, torch.nn.Linear)}
    assert widths
    assert all(width % 128 == 0 for width in widths)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, vae):
    folder = tmp_path_factory.mktemp("pipeline")
    vae.register_to_config(latents_mean=[0.5] * 16, latents_std=[2.0] * 16)
    wan_mini.save_model(vae, vae.state_dict(), folder / "vae")
    wan_mini.save_pipeline(folder, model, model.state_dict(), folder / "vae")
    return folder


def test_the_folder_is_a_pipeline_of_bfloat16_safetensors(folder):
    from diffusers import WanPipeline
    from safetensors import safe_open

    pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert pipe.scheduler.config.flow_shift == wan_mini.FLOW_SHIFT
    assert pipe.vae.config.latents_std == [2.0] * 16
    files = list(folder.rglob("*.safetensors"))
    assert len(files) == 3
    for path in files:
        with safe_open(path, "pt") as opened:
            assert {opened.get_tensor(name).dtype for name in opened.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pickle")]


def test_the_pipelines_text_is_the_one_trained_with(folder, model):
    """Embeddings by tokenizer and encoder of the folder, and by the training module with weights rounded alike."""
    row = {"class": "UMT5EncoderModel", "library": "transformers", "folder": "text_encoder", "dtype": "float32"}
    tokens = {"class": "PreTrainedTokenizerFast", "library": "transformers", "folder": "tokenizer"}
    index = json.loads((folder / "model_index.json").read_text())
    assert index["text_encoder"] == [row["library"], row["class"]]
    parts = load_components(folder, {"text_encoder": row, "tokenizer": tokens})
    prompts = [world.combinations()[i].prompt for i in (0, 100, 639)] + [""]
    expected = encode_prompt(prompts, parts["tokenizer"], parts["text_encoder"])
    rounded = wan_mini.build_text_to_video(num_layers=1).eval()
    rounded.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    with torch.no_grad():
        made = rounded.text(*wan_mini.tokenize(prompts))
    assert made.shape == expected.shape == (4, 512, 128)
    # float32 attention over 512 padded places here, 16 there: sums in another order, eps * sqrt(512) of values near 1
    assert torch.allclose(made, expected, atol=1e-4)
    assert (made[0] != 0).any(1).sum() == 6  # a red zero moves left, and the end


@pytest.mark.slow
def test_sampling_follows_seed_and_prompt(model):
    """The VAE has an eighth of the channels, because decoding at the full size takes most of the time."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(**{**wan_mini.VAE, "base_dim": 2}).eval().requires_grad_(False)
    prompts = ["a red zero moves left", "a red one moves left"]
    made = wan_mini.sample_videos(model, vae, prompts, [3, 3], steps=2)
    assert made.shape == (2, 33, 256, 256, 3)
    assert made.dtype == torch.uint8
    alone = wan_mini.sample_videos(model, vae, prompts[1:], [3], steps=2)
    # one video alone and beside another: the same up to float32 sums, half a grey level at most
    assert (made[1].int() - alone[0].int()).abs().max() <= 1
