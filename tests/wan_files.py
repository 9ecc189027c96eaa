"""Writes a Wan transformer, given by its original tensor names, in each format that checkpoints have.

Each writer takes a folder and a state, and gives the path to open and the state that the file stands for: where the
format rounds, the rounded numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from turbocompile.wan.keys import diffusers_name

State = dict[str, torch.Tensor]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LIMITS = {E4M3: 448.0, E5M2: 57344.0, torch.int8: 127.0}
COMFY = "model.diffusion_model."


def is_linear(name: str, weight: torch.Tensor) -> bool:
    """Whether quantizers take a weight: a linear's in a block."""
    return name.startswith("blocks.") and name.endswith(".weight") and weight.dim() == 2 and "proj_l" not in name


def in_8_bits(weight: torch.Tensor, dtype: torch.dtype, by_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(data, scale): the scale () or (N, 1)."""
    amax = weight.abs().amax(1, keepdim=True) if by_row else weight.abs().max()
    scale = amax / LIMITS[dtype]
    data = weight / scale
    return (data.round() if dtype == torch.int8 else data).to(dtype), scale


def quantized(state: State, dtype: torch.dtype, scale_name: str, by_row: bool = False) -> tuple[State, State]:
    """(what the file holds, what it stands for)."""
    file, meant = dict(state), dict(state)
    for name, weight in state.items():
        if is_linear(name, weight):
            data, scale = in_8_bits(weight, dtype, by_row)
            file[name], meant[name] = data, data.float() * scale
            file[name.removesuffix("weight") + scale_name] = scale
    return file, meant


def in_tiles(state: State, dtype: torch.dtype, scale_name: str, limit: float) -> tuple[State, State]:
    """(what the file holds, what it stands for), with a scale amax / limit a tile of 128 x 128."""
    file, meant = dict(state), dict(state)
    for name, weight in state.items():
        if is_linear(name, weight):
            rows, columns = (size // 128 for size in weight.shape)
            tiles = weight.reshape(rows, 128, columns, 128)
            scale = tiles.abs().amax((1, 3)) / limit
            wide = tiles / scale[:, None, :, None]
            data = (wide.round().clamp(-128, 127) if dtype == torch.int8 else wide.clamp(-limit, limit)).to(dtype)
            file[name], file[name.removesuffix("weight") + scale_name] = data.reshape(weight.shape), scale
            meant[name] = (data.float() * scale[:, None, :, None]).reshape(weight.shape)
    return file, meant


def tiled(dtype: torch.dtype) -> Callable[[Path, State], tuple[Path, State]]:
    def write(folder: Path, state: State) -> tuple[Path, State]:
        file, meant = in_tiles(state, dtype, "weight_scale_inv", LIMITS[dtype])
        save_file(file, folder / "tiles.safetensors")
        return folder / "tiles.safetensors", meant

    return write


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def flat_patch(state: State) -> State:
    """The patch embedding as a linear over flattened patches, as rCM and TurboDiffusion have it."""
    weight = state["patch_embedding.weight"]
    return {**state, "patch_embedding.weight": weight.reshape(weight.shape[0], -1)}


def original_config(state: State) -> dict:
    channels = state["patch_embedding.bias"].shape[0]
    return {
        "_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "t2v", "dim": channels, "eps": 1e-6,
        "ffn_dim": state["blocks.0.ffn.0.bias"].shape[0], "freq_dim": 256, "in_dim": 16, "num_heads": channels // 128,
        "num_layers": 1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks.")), "out_dim": 16,
        "text_len": 512,
    }  # fmt: skip


def write_json(path: Path, values: Mapping) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def original_pth(folder: Path, state: State) -> tuple[Path, State]:
    torch.save(state, folder / "wan.pth")
    return folder / "wan.pth", state


def original_folder(folder: Path, state: State) -> tuple[Path, State]:
    """As published: shards, an index, config.json, and beside them the text encoder and the VAE."""
    write_json(folder / "config.json", original_config(state))
    names = [f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    places = {key: names[i % 3] for i, key in enumerate(state)}
    for name in names:
        save_file({k: v for k, v in state.items() if places[k] == name}, folder / name)
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    for other in ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"):
        (folder / other).write_bytes(b"no transformer")
    return folder, state


def pth_shards(folder: Path, state: State) -> tuple[Path, State]:
    write_json(folder / "config.json", original_config(state))
    for i in range(2):
        part = dict(list(state.items())[i::2])
        torch.save(part, folder / f"model-0000{i + 1}-of-00002.pth")
    (folder / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"no transformer")
    return folder, state


def safetensors_shards(folder: Path, state: State) -> tuple[Path, State]:
    """Shards of another name without an index, and no configuration."""
    for i in range(2):
        save_file(dict(list(state.items())[i::2]), folder / f"wan-0000{i + 1}-of-00002.safetensors")
    return folder, state


def one_file_in_a_folder(folder: Path, state: State) -> tuple[Path, State]:
    save_file(prefixed(state, COMFY), folder / "wan2.1_t2v_bf16.safetensors")
    save_file({"decoder.conv.weight": torch.ones(2, 2)}, folder / "wan_2.1_vae.safetensors")
    return folder, state


def rcm(folder: Path, state: State) -> tuple[Path, State]:
    torch.save(prefixed(flat_patch(state), "net."), folder / "rcm.pth")
    return folder / "rcm.pth", state


def with_projections(state: State) -> State:
    generator = torch.Generator().manual_seed(5)
    more = {}
    for name in [n for n in state if n.endswith("self_attn.q.bias")]:
        path = name.removesuffix("q.bias") + "attn_op.local_attn.proj_l"
        more[f"{path}.weight"] = 0.1 * torch.randn(128, 128, generator=generator)
        more[f"{path}.bias"] = 0.1 * torch.randn(128, generator=generator)
    return {**state, **more}


def turbodiffusion(folder: Path, state: State) -> tuple[Path, State]:
    state = with_projections(state)
    torch.save(flat_patch(state), folder / "turbo.pth")
    return folder / "turbo.pth", state


def turbodiffusion_quant(folder: Path, state: State) -> tuple[Path, State]:
    state = with_projections(state)
    file, meant = in_tiles(flat_patch(state), torch.int8, "scale", 128.0)
    chosen = {n for n, w in state.items() if is_linear(n, w)}
    file = {n.removesuffix("weight") + "int8_weight" if n in chosen else n: w for n, w in file.items()}
    meant["patch_embedding.weight"] = state["patch_embedding.weight"]
    torch.save(prefixed(file, "net."), folder / "turbo-quant.pth")
    return folder / "turbo-quant.pth", meant


def comfy(folder: Path, state: State) -> tuple[Path, State]:
    save_file(prefixed(state, COMFY), folder / "comfy.safetensors")
    return folder / "comfy.safetensors", state


def comfy_whole(folder: Path, state: State) -> tuple[Path, State]:
    """A whole pipeline in one file."""
    others = {"vae.decoder.conv.weight": torch.ones(2, 2), "text_encoders.umt5xxl.spiece_model": torch.ones(3)}
    save_file({**prefixed(state, COMFY), **others}, folder / "whole.safetensors")
    return folder / "whole.safetensors", state


def comfy_fp8_scaled(folder: Path, state: State) -> tuple[Path, State]:
    """fp8_scaled: one scale a weight, one for its input, and the marker, whose dtype may be float32."""
    file, meant = quantized(state, E4M3, "scale_weight")
    file |= {n.replace("scale_weight", "scale_input"): torch.ones(()) for n in file if n.endswith("scale_weight")}
    file["scaled_fp8"] = torch.empty(0)
    save_file(prefixed(file, COMFY), folder / "fp8_scaled.safetensors")
    return folder / "fp8_scaled.safetensors", meant


def comfy_fp8_rows(folder: Path, state: State) -> tuple[Path, State]:
    """A scale a channel, and a description beside each weight."""
    file, meant = quantized(state, E4M3, "weight_scale", by_row=True)
    said = torch.tensor(list(b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}'), dtype=torch.uint8)
    file |= {n.replace("weight_scale", "comfy_quant"): said.clone() for n in file if n.endswith("weight_scale")}
    save_file(prefixed(file, COMFY), folder / "fp8_rows.safetensors")
    return folder / "fp8_rows.safetensors", meant


def comfy_int8(folder: Path, state: State, by_row: bool = False) -> tuple[Path, State]:
    """INT8 tensor-wise, described in the header of the file."""
    file, meant = quantized(state, torch.int8, "weight_scale", by_row)
    layers = [n.removesuffix(".weight_scale") for n in file if n.endswith(".weight_scale")]
    said = {"format_version": "1.0", "layers": {COMFY + layer: {"format": "int8_tensorwise"} for layer in layers}}
    save_file(prefixed(file, COMFY), folder / "int8.safetensors", {"_quantization_metadata": json.dumps(said)})
    return folder / "int8.safetensors", meant


def comfy_int8_rotated(folder: Path, state: State) -> tuple[Path, State]:
    """`convrot`: groups of 64 columns are rotated before they are quantized by rows."""
    core = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    turn = torch.kron(torch.kron(core, core), core)
    file, meant = dict(state), dict(state)
    said = torch.tensor(list(b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 64}')).byte()
    for name, weight in state.items():
        if is_linear(name, weight):
            data, scale = in_8_bits((weight.reshape(-1, 64) @ turn).reshape(weight.shape), torch.int8, by_row=True)
            path = name.removesuffix("weight")
            file |= {name: data, f"{path}weight_scale": scale, f"{path}comfy_quant": said.clone()}
            meant[name] = ((data.float() * scale).reshape(-1, 64) @ turn).reshape(weight.shape)
            assert (meant[name] - weight).abs().max() < weight.abs().max() / 16  # the rotation is undone
    save_file(prefixed(file, COMFY), folder / "int8_convrot.safetensors")
    return folder / "int8_convrot.safetensors", meant


def comfy_int8_rows(folder: Path, state: State) -> tuple[Path, State]:
    return comfy_int8(folder, state, by_row=True)


def plain(dtype: torch.dtype, everything: bool = False) -> Callable[[Path, State], tuple[Path, State]]:
    """A cast without scales, of the blocks' linears, or of norms, biases and embeddings, too."""

    def write(folder: Path, state: State) -> tuple[Path, State]:
        file = {n: w.to(dtype) if everything or is_linear(n, w) else w for n, w in state.items()}
        save_file(file, folder / "plain.safetensors")
        return folder / "plain.safetensors", {n: w.float() for n, w in file.items()}

    return write


def diffusers_config(state: State) -> dict:
    ours = original_config(state)
    return {
        "_class_name": "WanTransformer3DModel", "num_attention_heads": ours["num_heads"], "attention_head_dim": 128,
        "ffn_dim": ours["ffn_dim"], "num_layers": ours["num_layers"],
        "text_dim": state["text_embedding.0.weight"].shape[1],
    }  # fmt: skip


def diffusers_names(file: State) -> State:
    """The file under diffusers' names, with the scales beside their weights."""
    made = {}
    for name, tensor in file.items():
        path, _, leaf = name.rpartition(".")
        theirs = diffusers_name(name) or str(diffusers_name(f"{path}.weight")).removesuffix("weight") + leaf
        made[theirs] = tensor
    return made


def modelopt(where: str) -> Callable[[Path, State], tuple[Path, State]]:
    """ModelOpt's FP8 in a diffusers folder; what it is says config.json, or hf_quant_config.json."""

    def write(folder: Path, state: State) -> tuple[Path, State]:
        file, meant = quantized(state, E4M3, "weight_scale")
        file |= {n.replace("weight_scale", "input_scale"): torch.ones(()) for n in file if n.endswith("weight_scale")}
        config = diffusers_config(state)
        if where == "config.json":
            config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["proj_out"]}
        else:
            said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
            write_json(folder / "hf_quant_config.json", said)
        write_json(folder / "config.json", config)
        save_file(diffusers_names(file), folder / "diffusion_pytorch_model.safetensors")
        return folder, meant

    return write


def diffusers_folder(folder: Path, state: State) -> tuple[Path, State]:
    write_json(folder / "config.json", diffusers_config(state))
    save_file(diffusers_names(state), folder / "diffusion_pytorch_model.safetensors")
    return folder, state


def fastvideo(folder: Path, state: State) -> tuple[Path, State]:
    """A diffusers folder with the gates of video sparse attention."""
    diffusers_folder(folder, state)
    file = diffusers_names(state)
    channels = state["patch_embedding.bias"].shape[0]
    for i in range(2):
        file[f"blocks.{i}.to_gate_compress.weight"] = torch.full((channels, channels), 0.5)
        file[f"blocks.{i}.to_gate_compress.bias"] = torch.full((channels,), float(i))
    save_file(file, folder / "diffusion_pytorch_model.safetensors")
    return folder, state


def hub_cache(folder: Path, state: State) -> tuple[Path, State]:
    """A repository in the hub's cache: links in a snapshot into files that are called by their hashes."""
    snapshot, blobs = folder / "models--a--b" / "snapshots" / "0123", folder / "models--a--b" / "blobs"
    for part in (snapshot, blobs, folder / "models--a--b" / "refs"):
        part.mkdir(parents=True)
    (folder / "models--a--b" / "refs" / "main").write_text("0123")
    original_folder(blobs, state)
    for number, path in enumerate(sorted(blobs.iterdir())):
        path.rename(blobs / f"{number:064}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064}")
    return folder / "models--a--b", state


def k_quant(shape: tuple[int, ...], kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks (rows, bytes) of a K-quant, and their values, about as large as a linear's weights."""
    import gguf
    import numpy as np

    type_ = gguf.GGMLQuantizationType[kind]
    size, nbytes = gguf.GGML_QUANT_SIZES[type_]
    blocks = np.random.default_rng(seed).integers(0, 256, (shape[0], shape[1] // size, nbytes), dtype=np.uint8)
    scales = np.frombuffer(np.array([1e-4, 1e-4], np.float16).tobytes(), np.uint8)
    if kind == "Q6_K":
        blocks[..., -2:] = scales[:2]
    else:  # Q4_K and Q5_K begin with d and dmin
        blocks[..., :4] = scales
    data = blocks.reshape(shape[0], -1)
    return data, torch.from_numpy(gguf.quants.dequantize(data, type_)).reshape(shape)


def gguf(kind: str, fold: str = "", wide: str = "F16") -> Callable[[Path, State], tuple[Path, State]]:
    """As ComfyUI-GGUF's converter writes: original names, linears of the blocks in `kind`, what does not divide into
    blocks in `wide`, vectors in F32. fold: "rows": the patch embedding is folded to rows of 256, its shape in the
    metadata; "axes": it has the four axes that other writers allow.
    """

    def write(folder: Path, state: State) -> tuple[Path, State]:
        import gguf as package

        writer = package.GGUFWriter(folder / f"wan-{kind}.gguf", "wan")
        meant = {}
        for seed, (name, weight) in enumerate(state.items()):
            chosen = kind if is_linear(name, weight) else wide if weight.dim() > 1 else "F32"
            type_ = package.GGMLQuantizationType[chosen]
            values = weight.numpy()
            if fold == "axes" and name == "patch_embedding.weight":
                values = values[:, :, 0]
            elif fold == "rows" and name == "patch_embedding.weight":
                writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(size) for size in values.shape])
                values = values.reshape(-1, 256)
            if chosen.endswith("_K"):
                data, meant[name] = k_quant(tuple(weight.shape), chosen, seed)
            else:
                data = package.quants.quantize(values, type_)
                meant[name] = torch.from_numpy(package.quants.dequantize(data, type_).copy()).reshape(weight.shape)
            writer.add_tensor(name, data, raw_dtype=type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder / f"wan-{kind}.gguf", meant

    return write


def gguf_shards(folder: Path, state: State) -> tuple[Path, State]:
    """Two parts beside a text encoder, and no configuration."""
    meant = {}
    for i in range(2):
        path, part = gguf("Q8_0")(folder, dict(list(state.items())[i::2]))
        path.rename(folder / f"wan-Q8_0-0000{i + 1}-of-00002.gguf")
        meant |= part
    (folder / "umt5-xxl-encoder-Q8_0.gguf").write_bytes(b"no transformer")
    return folder, {name: meant[name] for name in state}


GGUF = {
    "Q8_0": gguf("Q8_0"), "Q6_K": gguf("Q6_K"), "Q5_K": gguf("Q5_K"), "Q5_0": gguf("Q5_0"), "Q5_1": gguf("Q5_1"),
    "Q4_K": gguf("Q4_K", fold="rows"), "Q4_0": gguf("Q4_0", fold="axes"), "Q4_1": gguf("Q4_1"),
    "BF16": gguf("BF16", wide="BF16"), "F16": gguf("F16"), "F32": gguf("F32", wide="F32"),
}  # fmt: skip

WRITERS: dict[str, Callable[[Path, State], tuple[Path, State]]] = {
    "original .pth": original_pth,
    "original folder": original_folder,
    ".pth shards": pth_shards,
    "hub cache": hub_cache,
    "shards without an index": safetensors_shards,
    "one file in a folder": one_file_in_a_folder,
    "diffusers folder": diffusers_folder,
    "rCM": rcm,
    "TurboDiffusion": turbodiffusion,
    "TurboDiffusion quant": turbodiffusion_quant,
    "ComfyUI": comfy,
    "ComfyUI whole pipeline": comfy_whole,
    "ComfyUI fp8_scaled": comfy_fp8_scaled,
    "ComfyUI fp8 by rows": comfy_fp8_rows,
    "ComfyUI int8": comfy_int8,
    "ComfyUI int8 by rows": comfy_int8_rows,
    "ComfyUI int8 rotated": comfy_int8_rotated,
    "plain e4m3": plain(E4M3),
    "plain e5m2": plain(E5M2),
    "all in e4m3": plain(E4M3, everything=True),
    "e4m3 by tiles": tiled(E4M3),
    "int8 by tiles": tiled(torch.int8),
    "ModelOpt config.json": modelopt("config.json"),
    "ModelOpt hf_quant_config.json": modelopt("hf_quant_config.json"),
    "FastVideo VSA": fastvideo,
    "GGUF shards": gguf_shards,
    **{f"GGUF {kind}": write for kind, write in GGUF.items()},
}
