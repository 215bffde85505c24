"""Train the embedded feature network on procedural pictures.

    python -m scripts.features.train_tiny --device cuda --minutes 4 --out out/tiny     # or --device cpu --minutes 25

Every picture is drawn, cropped once more, spoiled in one of twelve ways, and shown twice. The network has to name the
family, the numbers that drew it, what spoiled it and how much; to tell colours, contrast and spectrum of what it sees;
and to know two crops of one picture from crops of others (NT-Xent, arXiv 2002.05709). The heads are then thrown away.

A killed run goes on where its last checkpoint was, by the same command. Step k depends on the seed and k alone, so one
device, seed and number of steps give one network; ``--minutes`` only chooses the number of steps, from the speed of the
first ones. ``tiny.safetensors`` is written to ``--out``.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import time
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
from scripts.features.degradations import KINDS, luma
from scripts.features.textures import FACTORS, FAMILIES, sample

WARMUP, TIMED = 50, (5, 25)  # steps of rising learning rate; steps whose speed chooses how many there will be
SAVE_SECONDS = 60
BATCH = {"cuda": 512, "cpu": 32}
STATISTICS = 48 + 16 + 1 + 24


# -- what a step shows -------------------------------------------------------------------------------------------------


def crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """A part of each picture, between 0.65 of its side and all of it, at the size it came in."""
    n, device = len(images), images.device
    scale = 0.65 + 0.35 * torch.rand(n, generator=generator, device=device)
    shift = (2 * torch.rand(n, 2, generator=generator, device=device) - 1) * (1 - scale)[:, None]
    zero = torch.zeros_like(scale)
    theta = torch.stack([scale, zero, shift[:, 0], zero, scale, shift[:, 1]], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def batch(count: int, step: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Two views of ``count`` pictures, (2 * count, 3, S, S) in [0, 1], and what is true of each picture."""
    drawn = sample(FAMILIES, count=count, generator=generator)
    order = torch.rand(count, generator=generator, device=generator.device).argsort()
    images = drawn.images[order]
    views = torch.stack([images, crop(images, generator)])
    if step % 3 == 2:  # pictures of 64 pixels, which the network enlarges itself
        views = F.avg_pool2d(views.flatten(0, 1), 2).unflatten(0, (2, count))
    severity = torch.rand(count, generator=generator, device=generator.device)
    kind = torch.arange(count, device=generator.device) * len(KINDS) // count
    spoiled = []
    for i, spoil in enumerate(KINDS.values()):  # pictures are in random order: consecutive ones share a kind
        mine = slice(-(-i * count // len(KINDS)), -(-(i + 1) * count // len(KINDS)))
        twice = severity[mine].repeat(2)
        spoiled.append(spoil(views[:, mine].flatten(0, 1), twice, generator).unflatten(0, (2, -1)))
    seen = (torch.cat(spoiled, 1).flatten(0, 1).clamp(0, 1) * 255).round() / 255
    return {
        "images": seen,
        "family": drawn.family[order],
        "factors": drawn.factors[order],
        "kind": kind,
        "severity": severity,
    }


def statistics(x: Tensor) -> Tensor:
    """(N, STATISTICS): colours and log contrast of 16 cells, saturation, log power of 6 x 4 spectral sectors."""
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


# -- what is learned ---------------------------------------------------------------------------------------------------


class Learner(nn.Module):
    """The network with batch normalisation after each convolution, and its heads."""

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
        """The terms, weighted; their sum is minimised."""
        images, count = shown["images"], len(shown["family"])
        f = self.network.features(images.contiguous(memory_format=torch.channels_last) * 2 - 1)
        family, kind, severity = (shown[key].repeat(2) for key in ("family", "kind", "severity"))
        factors = shown["factors"]  # of whole pictures: the crop has others
        own = self.factors(f[:count]).view(count, -1, FACTORS)
        own = own.gather(1, shown["family"][:, None, None].expand(-1, 1, FACTORS))[:, 0].float()
        known = ~factors.isnan()
        amount = self.severity(f).gather(1, kind[:, None])[:, 0].float()
        spoiled = (kind != 0).float()
        views = F.normalize(self.view(f).float(), dim=1)
        alike = views[:count] @ views[count:].T / 0.2
        pairs = torch.arange(count, device=f.device)
        with torch.autocast(images.device.type, enabled=False):
            truth = self.measure(statistics(images))
        return {
            "family": F.cross_entropy(self.family(f).float(), family),
            "factors": 4 * ((own - factors.nan_to_num(0.0)).square() * known).sum() / known.sum(),
            "kind": F.cross_entropy(self.kind(f).float(), kind),
            "severity": 8 * ((amount - severity).square() * spoiled).sum() / spoiled.sum(),
            "statistics": 2 * F.mse_loss(self.statistics(f).float(), truth),
            "views": 0.15 * (F.cross_entropy(alike, pairs) + F.cross_entropy(alike.T, pairs)),
        }


def folded(learner: Learner) -> TinyNetwork:
    """The bare network, normalisations folded into convolutions."""
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
    """Give every feature variance 1 over clean pictures of the training families; one that never varies stays."""
    generator = torch.Generator(device).manual_seed(seed)
    parts = [sample(FAMILIES, count=256, generator=generator).images for _ in range(8)]
    deviation = torch.cat([network.features(part * 2 - 1) for part in parts]).double().std(0).float()
    rescale(network, torch.where(deviation > 1e-3, 1 / deviation.clamp_min(1e-3), 1.0))


# -- the run -----------------------------------------------------------------------------------------------------------


def rate(step: int, steps: int | None, peak: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < WARMUP or steps is None:
        return peak * min(1.0, (step + 1) / WARMUP)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(steps - WARMUP, 1)))


def train(options: argparse.Namespace) -> TinyNetwork:
    """Run or resume, and write the weights."""
    device = torch.device(options.device)
    count = options.batch or BATCH[device.type]
    settings = {"seed": options.seed, "batch": count, "lr": options.lr, "device": device.type}
    torch.manual_seed(options.seed)
    learner = Learner().to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(learner.parameters(), lr=options.lr, weight_decay=0.02)
    generator = torch.Generator(device)
    file, step, steps, spent = options.out / "checkpoint.pt", 0, options.steps, 0.0
    if file.exists():
        kept = torch.load(file, map_location=device, weights_only=True)
        if kept["settings"] != settings:
            raise SystemExit(f"'{file}' was made with {kept['settings']}, not {settings}. Choose another --out.")
        learner.load_state_dict(kept["learner"])
        optimiser.load_state_dict(kept["optimiser"])
        step, spent, steps = kept["step"], kept["seconds"], options.steps or kept["steps"]
    options.out.mkdir(parents=True, exist_ok=True)
    begun, saved, timed = time.monotonic() - spent, time.monotonic(), 0.0

    def checkpoint() -> None:
        state: dict[str, Any] = {"settings": settings, "learner": learner.state_dict(), "steps": steps, "step": step}
        buffer = io.BytesIO()
        torch.save(state | {"optimiser": optimiser.state_dict(), "seconds": time.monotonic() - begun}, buffer)
        with atomic(file) as out:
            out.write(buffer.getvalue())

    bar = tqdm(total=steps, initial=step, unit="step", mininterval=5)
    learner.train()
    while steps is None or step < steps:
        if steps is None and step == TIMED[0]:
            timed = _clock(device)
        if steps is None and step == TIMED[1]:
            pace = (_clock(device) - timed) / (TIMED[1] - TIMED[0])
            steps = max(WARMUP + 1, int((60 * options.minutes - (time.monotonic() - begun)) / pace))
            bar.total = step + steps
            steps = bar.total
        generator.manual_seed(options.seed * 1_000_003 + step)
        for group in optimiser.param_groups:
            group["lr"] = rate(step, steps, options.lr)
        with torch.no_grad():
            shown = batch(count, step, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses = learner.losses(shown)
            loss = torch.stack(list(losses.values())).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 2.0)
        optimiser.step()
        step += 1
        bar.update()
        if step % 50 == 0 or step == steps:
            if not math.isfinite(loss.item()):
                raise SystemExit(f"The loss is {loss.item()} at step {step}; try a lower --lr.")
            bar.set_postfix_str(" ".join(f"{name} {value.item():.3f}" for name, value in losses.items()))
        if time.monotonic() - saved > SAVE_SECONDS:
            checkpoint()
            saved = time.monotonic()
    bar.close()
    checkpoint()
    network = folded(learner)
    equalise(network, device, options.seed)
    export(network, options.out / "tiny.safetensors", settings | {"steps": step})
    return network


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def export(network: TinyNetwork, path: Path, settings: dict[str, Any]) -> None:
    """Half-precision weights with what made them; they are computed with in float32."""
    weights = {name: value.half().cpu().contiguous() for name, value in network.state_dict().items()}
    if not all(value.isfinite().all() for value in weights.values()):
        raise SystemExit("A weight does not fit into half precision.")
    told = {"format": FORMAT, "recipe": "scripts/features/train_tiny.py", "date": now()[:10], "licence": "Apache-2.0"}
    told |= {"torch": torch.__version__} | {name: str(value) for name, value in settings.items()}
    with atomic(path) as file:
        file.write(save(weights, metadata=told))


def main() -> None:
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
