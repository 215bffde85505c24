"""Train the embedded feature network on procedural pictures.

    python -m scripts.features.train_tiny --device cuda --minutes 4 --out out/tiny     # or --device cpu --minutes 25

Every picture is drawn, cropped, degraded in one of twelve ways, and shown as two views, whole and cropped. The network
has to predict the family and the parameters of its drawing, the degradation and its strength, and colours, contrast and
spectrum of the view, and to match the two views of one picture among those of others (NT-Xent, arXiv 2002.05709). The
heads are discarded afterwards.

The same command resumes an interrupted run from its last checkpoint. Step k depends on the seed and k alone, so a
device, a seed and a number of steps determine the network; ``--minutes`` only chooses the number of steps, from the
speed of the first ones. ``tiny.safetensors`` is written to ``--out``.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from diffaccel.eval.networks.tiny_network import FORMAT, Residual, TinyNetwork
from diffaccel.files import atomic
from diffaccel.record import now
from diffaccel.training.steps import backward, computing
from scripts.features.degradations import KINDS, luma
from scripts.features.textures import FACTORS, FAMILIES, sample

WARMUP, TIMED = 50, (5, 25)  # steps of rising learning rate; steps between which the speed is measured
SAVE_SECONDS = 60
BATCH = {"cuda": 512, "cpu": 32}
STATISTICS = 48 + 16 + 1 + 24


# -- the batch of a step -----------------------------------------------------------------------------------------------


def crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop each picture to between 0.65 and all of its side, resized to its own size."""
    n, device = len(images), images.device
    scale = 0.65 + 0.35 * torch.rand(n, generator=generator, device=device)
    shift = (2 * torch.rand(n, 2, generator=generator, device=device) - 1) * (1 - scale)[:, None]
    zero = torch.zeros_like(scale)
    theta = torch.stack([scale, zero, shift[:, 0], zero, scale, shift[:, 1]], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def batch(count: int, step: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw two views of ``count`` pictures, (2 * count, 3, S, S) in [0, 1], and the targets of each picture."""
    drawn = sample(FAMILIES, count=count, generator=generator)
    order = torch.rand(count, generator=generator, device=generator.device).argsort()
    images = drawn.images[order]
    views = torch.stack([images, crop(images, generator)])
    if step % 3 == 2:  # pictures of 64 pixels, which the network enlarges
        views = F.avg_pool2d(views.flatten(0, 1), 2).unflatten(0, (2, count))
    severity = torch.rand(count, generator=generator, device=generator.device)
    kind = torch.arange(count, device=generator.device) * len(KINDS) // count
    degraded = []
    for i, degrade in enumerate(KINDS.values()):  # pictures are in random order: consecutive ones share a kind
        rows = slice(-(-i * count // len(KINDS)), -(-(i + 1) * count // len(KINDS)))
        strength = severity[rows].repeat(2)
        degraded.append(degrade(views[:, rows].flatten(0, 1), strength, generator).unflatten(0, (2, -1)))
    return {
        "images": (torch.cat(degraded, 1).flatten(0, 1).clamp(0, 1) * 255).round() / 255,
        "family": drawn.family[order],
        "factors": drawn.factors[order],
        "kind": kind,
        "severity": severity,
    }


def statistics(x: Tensor) -> Tensor:
    """Compute (N, STATISTICS): colours and log contrast of 16 cells, saturation, log power of 24 spectral sectors."""
    if x.shape[-1] != TinyNetwork.size:
        x = F.interpolate(x, (TinyNetwork.size,) * 2, mode="bilinear", antialias=True)
    grey = luma(x)
    colours = F.adaptive_avg_pool2d(x, 4).flatten(1)
    variance = F.adaptive_avg_pool2d(grey.square(), 4) - F.adaptive_avg_pool2d(grey, 4).square()
    contrast = (variance.clamp_min(0) + 1e-5).log().flatten(1)
    saturation = (x.amax(1) - x.amin(1)).mean((1, 2))[:, None]
    power = torch.fft.rfft2(grey[:, 0], norm="ortho").abs().square()
    size = TinyNetwork.size
    fy, fx = torch.fft.fftfreq(size, 1 / size, device=x.device)[:, None], torch.arange(size // 2 + 1, device=x.device)
    octave = torch.log2((fx * fx + fy * fy).clamp_min(1).sqrt()).floor().clamp(0, 5)
    sector = ((torch.atan2(fy, fx + 1e-9) / math.pi * 4 + 0.5).floor() % 4).expand_as(octave)
    member = F.one_hot((octave * 4 + sector).long(), 24).flatten(0, 1).float()
    bands = power.flatten(1) @ (member / member.sum(0))
    return torch.cat([colours, contrast, saturation, (bands + 1e-4).log()], 1)


# -- model and losses -------------------------------------------------------------------------------------------------


class Learner(nn.Module):
    """The network with batch normalisation after each convolution, and the heads of its tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.network = TinyNetwork()
        for module in list(self.network.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Conv2d):
                    setattr(module, name, nn.Sequential(child, nn.BatchNorm2d(child.out_channels)))
        dim = TinyNetwork.dim
        self.family = nn.Linear(dim, len(FAMILIES))
        self.factors = nn.Linear(dim, len(FAMILIES) * FACTORS)
        self.kind = nn.Linear(dim, len(KINDS))
        self.severity = nn.Linear(dim, len(KINDS))
        self.statistics = nn.Linear(dim, STATISTICS)
        self.measure = nn.BatchNorm1d(STATISTICS, affine=False)
        self.view = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 96))

    def losses(self, shown: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the weighted terms of the loss."""
        images, count = shown["images"], len(shown["family"])
        f = self.network.features(images.contiguous(memory_format=torch.channels_last) * 2 - 1)
        family, kind, severity = (shown[key].repeat(2) for key in ("family", "kind", "severity"))
        factors = shown["factors"]  # of whole pictures; crops have others
        predicted = self.factors(f[:count]).view(count, -1, FACTORS)
        predicted = predicted.gather(1, shown["family"][:, None, None].expand(-1, 1, FACTORS))[:, 0].float()
        defined = ~factors.isnan()
        amount = self.severity(f).gather(1, kind[:, None])[:, 0].float()
        degraded = (kind != 0).float()
        views = F.normalize(self.view(f).float(), dim=1)
        similarity = views[:count] @ views[count:].T / 0.2
        pairs = torch.arange(count, device=f.device)
        with torch.autocast(images.device.type, enabled=False):
            truth = self.measure(statistics(images))
        return {
            "family": F.cross_entropy(self.family(f).float(), family),
            "factors": 4 * ((predicted - factors.nan_to_num(0.0)).square() * defined).sum() / defined.sum(),
            "kind": F.cross_entropy(self.kind(f).float(), kind),
            "severity": 8 * ((amount - severity).square() * degraded).sum() / degraded.sum(),
            "statistics": 2 * F.mse_loss(self.statistics(f).float(), truth),
            "views": 0.15 * (F.cross_entropy(similarity, pairs) + F.cross_entropy(similarity.T, pairs)),
        }


def folded(learner: Learner) -> TinyNetwork:
    """Return the bare network, with normalisations folded into convolutions."""
    network = TinyNetwork().to(next(learner.parameters()).device)
    trained = dict(learner.network.named_modules())
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            pair = trained[name].eval()
            module.load_state_dict(fuse_conv_bn_eval(pair[0], pair[1]).state_dict())
    return network.eval().requires_grad_(False)


def rescale(network: TinyNetwork, scale: Tensor) -> None:
    """Multiply features by ``scale`` (dim,) > 0, exactly: a positive factor of a channel passes through ReLU."""
    down, last = network.stages[-3], network.stages[-1]
    if not isinstance(down, nn.Conv2d) or not isinstance(last, Residual):
        raise TypeError("The last stage is no longer a convolution, a ReLU and a residual block.")
    last.first.weight /= scale[:, None, None]
    for layer in (down, last.second):
        layer.weight *= scale[:, None, None, None]
        layer.bias *= scale


def equalise(network: TinyNetwork, device: torch.device, seed: int) -> None:
    """Scale every feature to variance 1 over clean pictures of the training families, except constant ones."""
    generator = torch.Generator(device).manual_seed(seed)
    parts = [sample(FAMILIES, count=256, generator=generator).images for _ in range(8)]
    deviation = torch.cat([network.features(part * 2 - 1) for part in parts]).double().std(0).float()
    rescale(network, torch.where(deviation > 1e-3, 1 / deviation.clamp_min(1e-3), 1.0))


# -- training ---------------------------------------------------------------------------------------------------------


def rate(step: int, steps: int | None, peak: float) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to zero."""
    if step < WARMUP or steps is None:
        return peak * min(1.0, (step + 1) / WARMUP)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(steps - WARMUP, 1)))


@dataclass
class Progress:
    """Position of a run.

    Attributes:
        step: steps taken.
        steps: steps in all; None until they are chosen from the speed of the first ones.
        seconds: time spent.
    """

    step: int = 0
    steps: int | None = None
    seconds: float = 0.0


def train(options: argparse.Namespace) -> TinyNetwork:
    """Run or resume the training, and write the weights."""
    device = torch.device(options.device)
    count = options.batch or BATCH[device.type]
    settings = {"seed": options.seed, "batch": count, "lr": options.lr, "device": device.type}
    torch.manual_seed(options.seed)
    learner = Learner().to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(learner.parameters(), lr=options.lr, weight_decay=0.02)
    generator = torch.Generator(device)
    file, progress = options.out / "checkpoint.pt", Progress(steps=options.steps)
    if file.exists():
        progress = load_checkpoint(file, settings, learner, optimiser, device)
        progress.steps = options.steps or progress.steps
    options.out.mkdir(parents=True, exist_ok=True)
    begun, saved, timed = time.monotonic() - progress.seconds, time.monotonic(), 0.0
    bar = tqdm(total=progress.steps, initial=progress.step, unit="step", mininterval=5)
    learner.train()
    while progress.steps is None or progress.step < progress.steps:
        if progress.steps is None and progress.step == TIMED[0]:
            timed = _clock(device)
        if progress.steps is None and progress.step == TIMED[1]:
            pace = (_clock(device) - timed) / (TIMED[1] - TIMED[0])
            remaining = int((60 * options.minutes - (time.monotonic() - begun)) / pace)
            progress.steps = bar.total = progress.step + max(WARMUP + 1, remaining)
        generator.manual_seed(options.seed * 1_000_003 + progress.step)
        for group in optimiser.param_groups:
            group["lr"] = rate(progress.step, progress.steps, options.lr)
        with torch.no_grad():
            shown = batch(count, progress.step, generator)
        losses = optimise(learner, optimiser, shown)
        progress.step += 1
        bar.update()
        if progress.step % 50 == 0 or progress.step == progress.steps:
            report(bar, losses, progress.step)
        if time.monotonic() - saved > SAVE_SECONDS:
            progress.seconds = time.monotonic() - begun
            save_checkpoint(file, settings, learner, optimiser, progress)
            saved = time.monotonic()
    bar.close()
    progress.seconds = time.monotonic() - begun
    save_checkpoint(file, settings, learner, optimiser, progress)
    network = folded(learner)
    equalise(network, device, options.seed)
    export(network, options.out / "tiny.safetensors", settings | {"steps": progress.step})
    return network


def optimise(learner: Learner, optimiser: torch.optim.Optimizer, shown: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take one optimiser step on a batch, and return the terms of its loss and their sum ``loss``."""
    device = shown["images"].device
    with computing(device, torch.bfloat16 if device.type == "cuda" else torch.float32):
        losses = learner.losses(shown)
        loss = torch.stack(list(losses.values())).sum()
    optimiser.zero_grad(set_to_none=True)
    backward(loss)
    nn.utils.clip_grad_norm_(learner.parameters(), 2.0)
    optimiser.step()
    return losses | {"loss": loss}


def report(bar: tqdm, losses: dict[str, Tensor], step: int) -> None:
    """Show the terms of the loss, and stop where the loss is not finite."""
    loss = losses["loss"].item()
    if not math.isfinite(loss):
        raise SystemExit(f"The loss is {loss} at step {step}; try a lower --lr.")
    bar.set_postfix_str(" ".join(f"{name} {value.item():.3f}" for name, value in losses.items() if name != "loss"))


def save_checkpoint(
    file: Path, settings: dict[str, Any], learner: Learner, optimiser: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write a checkpoint atomically."""
    state = {"settings": settings, "learner": learner.state_dict(), "optimiser": optimiser.state_dict()}
    buffer = io.BytesIO()
    torch.save(state | asdict(progress), buffer)
    with atomic(file) as out:
        out.write(buffer.getvalue())


def load_checkpoint(
    file: Path, settings: dict[str, Any], learner: Learner, optimiser: torch.optim.Optimizer, device: torch.device
) -> Progress:
    """Restore learner and optimiser from a checkpoint, and return its progress; refuse one of other settings."""
    state = torch.load(file, map_location=device, weights_only=True)
    if state["settings"] != settings:
        raise SystemExit(f"'{file}' was made with {state['settings']}, not {settings}. Choose another --out.")
    learner.load_state_dict(state["learner"])
    optimiser.load_state_dict(state["optimiser"])
    return Progress(step=state["step"], steps=state["steps"], seconds=state["seconds"])


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def export(network: TinyNetwork, path: Path, settings: dict[str, Any]) -> None:
    """Write the weights in half precision with their origin; inference uses them in float32."""
    weights = {name: value.half().cpu().contiguous() for name, value in network.state_dict().items()}
    if not all(value.isfinite().all() for value in weights.values()):
        raise SystemExit("A weight does not fit into half precision.")
    metadata = {
        "format": FORMAT,
        "recipe": "scripts/features/train_tiny.py",
        "date": now()[:10],
        "licence": "Apache-2.0",
    }
    metadata |= {"torch": torch.__version__} | {name: str(value) for name, value in settings.items()}
    with atomic(path) as file:
        file.write(save(weights, metadata=metadata))


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the embedded feature network on procedural pictures.")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint.pt and tiny.safetensors are written here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=list(BATCH))
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="choose the number of steps that takes about this long")
    length.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, help=f"pictures a step, each seen twice (default: {BATCH})")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    train(options)


if __name__ == "__main__":
    main()
