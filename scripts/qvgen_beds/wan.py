"""A small network of the Wan architecture, without texts, that learns clips of the game by flow matching."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from diffaccel.distill import NetworkTeacher
from diffaccel.training.checkpoint import averages
from diffaccel.training.loop import Deadline, TrainingRun
from diffaccel.training.steps import computing
from scripts.qvgen_beds.clips import Clips
from scripts.qvgen_beds.recipe import Size
from scripts.zoo.coinrun.simulator import SIZE

PATCH, TEXT = 8, 16
SHIFT = 2.0  # of noise levels, as for the world model
tell = partial(print, flush=True)


def shape(frames: int) -> tuple[int, ...]:
    """Return the shape of a clip as the architecture has it: channels before frames."""
    return 3, frames, SIZE, SIZE


def arrange(frames: int) -> Any:
    """Return what makes samples ``(B, 3, T, H, W)`` of clips that are longer."""
    return lambda clips: clips[:, :frames].movedim(1, 2)


def network(options: dict[str, Any], seed: int = 0) -> WanTransformer3DModel:
    """Return a network with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanTransformer3DModel(
            patch_size=(1, PATCH, PATCH), in_channels=3, out_channels=3, text_dim=TEXT, freq_dim=256,
            rope_max_seq_len=64, **options,
        )  # fmt: skip


def call(net: Any, x: Tensor, sigma: Tensor, _: Any) -> Tensor:
    """Return the velocity at levels of the linear path; the text is one constant token."""
    dtype = net.patch_embedding.weight.dtype
    text = torch.zeros(len(x), 1, TEXT, dtype=dtype, device=x.device)
    time = 1000 * sigma.to(device=x.device, dtype=torch.float32)
    return net(hidden_states=x.to(dtype), timestep=time, encoder_hidden_states=text, return_dict=False)[0].float()


def followed(net: Any, frames: int) -> NetworkTeacher:
    """Return a network as what is followed."""
    return NetworkTeacher(net, call, "velocity", shape(frames))


def train(clips: Clips, size: Size, folder: Path, deadline: Deadline, device: torch.device) -> bool:
    """Train by ``|v - (eps - x0)|^2``, and return whether it is finished; ``folder`` then holds the averaged network.

    A run that was stopped goes on from its checkpoint.
    """
    if (folder / "config.json").is_file():
        return True
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    net = network(size.wan).to(device)
    run = TrainingRun(
        folder, "teacher", {"transformer": net}, size.plan, seed=1, deadline=deadline, device=device, tell=tell
    )
    for _ in run:
        draw, count = run.generator, size.plan_batch
        group = int(torch.randint(clips.groups(count), (1,), generator=draw, device=draw.device))
        x0 = clips.rows(group, count)
        eps = torch.randn(x0.shape, generator=draw, dtype=torch.float32, device=device)
        sigma = torch.rand(count, generator=draw, dtype=torch.float32, device=device)
        sigma = (SHIFT * sigma / (1 + (SHIFT - 1) * sigma)).clamp(1e-3, 1 - 1e-3)
        s = sigma.reshape(-1, 1, 1, 1, 1)
        with computing(device, dtype):
            v = call(net, (1 - s) * x0 + s * eps, sigma, None)
        run.update((v - (eps - x0)).square().mean(), samples=count)
    if not run.finished:
        return False
    net.load_state_dict(averages(run.checkpoint, "transformer."))
    net.to(torch.bfloat16).save_pretrained(folder)
    run.checkpoint.unlink()
    return True


def trained(folder: Path, device: torch.device) -> WanTransformer3DModel:
    """Return the network that :func:`train` left, in bfloat16 on a GPU, float32 elsewhere."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype).to(device).eval()
