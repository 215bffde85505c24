"""Export emoji-sd: the pipeline of a work folder, packed beside emoji-flux, whose VAE and text encoder it shares.

python -m scripts.zoo.emoji_sd.export --receive OUT --zoo diffaccel/zoo    # parts that a job returned
"""

from __future__ import annotations

import argparse
import json
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from diffaccel.training.checkpoint import save_weights
from diffaccel.zoo import packing
from scripts.zoo.emoji import card
from scripts.zoo.emoji.export import join, split, training_state
from scripts.zoo.emoji_sd import unet as network
from scripts.zoo.emoji_sd.recipe import UNetRecipe

MODEL, BASE = "emoji-sd", "emoji-flux"
LARGEST = 8e6  # packed bytes


def shifted_vae(vae: AutoencoderKL) -> AutoencoderKL:
    """Return the autoencoder with its shift as 1x1 convolutions: StableDiffusionPipeline reads no ``shift_factor``."""
    config = {k: v for k, v in vae.config.items() if not k.startswith("_")}
    other = AutoencoderKL(**{**config, "use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": None})
    other.load_state_dict(vae.state_dict(), strict=False)
    channels, shift = vae.config.latent_channels, network.shift_of(vae)
    with torch.no_grad():
        for conv, width, bias in ((other.quant_conv, 2 * channels, -shift), (other.post_quant_conv, channels, shift)):
            conv.weight.copy_(torch.eye(width)[:, :, None, None])
            conv.bias.zero_()
            conv.bias[:channels] = bias
    return other.eval()


def assemble(base: Any, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """Assemble the pipeline from the base pipeline's autoencoder, text encoder and tokenizer, and a UNet."""
    pipe = StableDiffusionPipeline(
        vae=shifted_vae(base.vae), text_encoder=base.text_encoder, tokenizer=base.tokenizer, unet=unet,
        scheduler=network.scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export(
    pipe: Any, recipe: UNetRecipe, work: Path, zoo: Path, base: Path, report: dict[str, Any] | None = None
) -> Path:
    """Pack a pipeline into ``zoo/emoji-sd``, without what the packed base has, with card and licence texts."""
    out, report = zoo / MODEL, report or {}
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / MODEL
        for part in (pipe.unet, pipe.vae):  # the text encoder has the dtype of the base's file
            part.to(torch.bfloat16)
        pipe.save_pretrained(plain)
        card.legal(plain)
        packing.pack(plain, out, base=base)
    facts = {
        "name": MODEL, "title": "a small text-to-image UNet on emoji", "pipeline": "StableDiffusionPipeline",
        "licence": "Apache-2.0", "attribution": card.ATTRIBUTION.strip().splitlines(), "state": card.state(report),
        "recipe": recipe.name, "note": report.get("note", ""), "base": BASE,
        "training": training_state(work / f"{network.NAME}.safetensors"),
        "parameters": {"unet": sum(p.numel() for p in pipe.unet.parameters())},
        "defaults": {"height": recipe.size, "width": recipe.size, "num_inference_steps": recipe.steps,
                     "guidance_scale": recipe.guidance},
        "bytes": {"packed": sum(entry["size"] for entry in packing.read_manifest(out)["packed"].values())},
        **{key: report[key] for key in ("acceptance", "quality") if key in report},
    }  # fmt: skip
    card.legal(out)
    (out / "card.json").write_text(json.dumps(facts, indent=1) + "\n")
    return out


def restore(zoo: Path, work: Path) -> None:
    """Start an empty work folder from the packed model; the optimiser's moments are lost, so it warms up again."""
    with tempfile.TemporaryDirectory(dir=work.parent) as scratch:
        plain = packing.unpack(zoo / MODEL, Path(scratch) / MODEL, base=zoo / BASE)
        weights = {f"unet.{k}": v for k, v in load_file(plain / "unet/diffusion_pytorch_model.safetensors").items()}
    training = json.loads((zoo / MODEL / "card.json").read_text())["training"]
    save_weights(weights, work / f"{network.NAME}.safetensors", **training)


def send(model: Path, out: Path) -> list[Path]:
    """Write a packed model to ``out``, as parts of one tar of at most 15 MiB."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(f"{MODEL}.tar.*"):
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        tar = Path(scratch) / f"{MODEL}.tar"
        with tarfile.open(tar, "w") as archive:
            archive.add(model, arcname=MODEL)
        return split(tar, out)


def receive(folder: Path, zoo: Path) -> Path:
    """Put the packed model of :func:`send` in place, and verify it."""
    with tempfile.TemporaryDirectory() as scratch:
        tar = join(sorted(folder.glob(f"{MODEL}.tar.*")), Path(scratch) / f"{MODEL}.tar")
        with tarfile.open(tar) as archive:
            archive.extractall(scratch, filter="data")
        manifest = packing.read_manifest(Path(scratch) / MODEL)
        packing.verify(Path(scratch) / MODEL, manifest["packed"], "Packed model file", "fetch it again")
        shutil.rmtree(zoo / MODEL, ignore_errors=True)
        return Path(shutil.copytree(Path(scratch) / MODEL, zoo / MODEL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--receive", type=Path, required=True, help="folder with the parts that a job returned")
    parser.add_argument("--zoo", type=Path, default=Path("diffaccel/zoo"))
    options = parser.parse_args()
    print(receive(options.receive, options.zoo))


if __name__ == "__main__":
    main()
