"""What a superposition reports: log-densities and mixing weights of every step, as numbers and as a plot."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.files import atomic, write_text
from diffaccel.samplers.superdiff import particles
from diffaccel.samplers.superdiff.composition import Taken
from diffaccel.samplers.superdiff.geometry import Geometry

if TYPE_CHECKING:
    from diffaccel.samplers.superdiff.engine import Superposition

logger = logging.getLogger(__name__)
AGREE = 1e8
SHOWN = 3  # pictures in the plot


@dataclass(eq=False)
class Trace:
    """Per-step numbers of a run, kept on the device until its end.

    Attributes:
        bias: goals of AND, ``(R, 1, M)``.
        squares: ``(R, B, n + 3)`` of every step's vectors, which are finite where the predictions are.
    """

    bias: Tensor = field(default_factory=lambda: torch.zeros(1, 1, 1, dtype=torch.float64, device="cpu"))
    log_density: list[Tensor] = field(default_factory=list)
    kappa: list[Tensor] = field(default_factory=list)
    displacement: list[Tensor] = field(default_factory=list)
    agreement: list[Tensor] = field(default_factory=list)
    effective: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)

    def add(self, run: Superposition, geometry: Geometry, taken: Taken) -> None:
        """Note a step; a prediction that is not finite is found at once on a CPU, and at the end elsewhere."""
        count = len(run.parts)
        self.log_density.append(run.densities.log_density[..., :count])
        kappa = taken.kappa
        self.kappa.append(kappa.expand(*run.densities.log_density.shape[:2], count))
        if taken.displacement is not None and taken.agreement is not None:
            self.displacement.append(taken.displacement)
            self.agreement.append(taken.agreement)
        if run.config.particles > 1:
            weights = run.densities.log_weights.reshape(-1, run.config.particles)
            self.effective.append(particles.effective_sizes(weights))
        self.squares.append(geometry.gram.diagonal(dim1=-2, dim2=-1))
        if geometry.gram.device.type == "cpu":
            self._check(run, len(self.squares) - 1)

    def _check(self, run: Superposition, step: int) -> None:
        """Raise for a prediction of a step that is not finite; the last square is of the first component."""
        finite = self.squares[step].isfinite().flatten(0, 1).all(0).cpu()
        flags = [bool(finite[-1]), *(bool(flag) for flag in finite[:-3])]
        if all(flags) and bool(finite.all()):
            return
        index = flags.index(False) if not all(flags) else 0
        who = f"component {index + 1}" if index < len(run.parts) else "the prediction without prompt"
        raise DiffAccelError(
            f"Step {step + 1} of {len(run.kernels)}, at noise level {float(run.sigmas[step]):.4g}: {who} is not "
            "finite. Try dtype float32 or bfloat16 in place of float16, or another scheduler."
        )

    def finish(self, run: Superposition) -> None:
        """Make the session's report, and write its files where the run leaves any."""
        if not bool(torch.cat([squares.flatten() for squares in self.squares]).isfinite().all()):
            for step in range(len(self.squares)):
                self._check(run, step)
        report = self.report(run)
        run.session.report["superdiff"] = report
        worst = report["agreement"]
        if worst is not None and worst > AGREE:
            logger.warning(
                "The components agree so closely (condition %.1e) that their densities say little about the mixing.",
                worst,
            )
        folder = run.config.folder or run.session.folder
        if folder:
            write(Path(folder), report)

    def report(self, run: Superposition) -> dict[str, Any]:
        """Return the report, JSON-ready: lists by step, region, row and component."""
        tracked = None if run.config.op == "mcmc" else torch.stack(self.log_density).cpu().tolist()
        is_absolute = run.config.eta > 0 and tracked is not None
        return {
            "format": 1,
            "method": run.config.to_dict(),
            "components": len(run.parts),
            "sigmas": [float(sigma) for sigma in run.sigmas],
            "log_density": tracked,
            "common": run.densities.shared.cpu().tolist() if is_absolute else None,
            "kappa": torch.stack(self.kappa).cpu().tolist(),
            "displacement": max(_numbers(self.displacement), default=None),
            "agreement": max(_numbers(self.agreement), default=None),
            "effective": torch.stack(self.effective).cpu().tolist() if self.effective else None,
        }


def _numbers(values: list[Tensor]) -> list[float]:
    return torch.stack([value.amax() for value in values]).cpu().tolist() if values else []


def write(folder: Path, report: dict[str, Any]) -> None:
    """Write ``density.json`` and ``density.png``, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "density.json", json.dumps(report, indent=1))
    with atomic(folder / "density.png") as file:
        plot(report, file)


def plot(report: dict[str, Any], file: BinaryIO) -> None:
    """Plot, for the first pictures, each component's log-density minus their mean, and its mixing weight, by step."""
    from matplotlib.figure import Figure

    kappa = torch.tensor(report["kappa"], dtype=torch.float64, device="cpu")  # (N, R, B, M)
    tracked = report["log_density"]
    density = torch.zeros_like(kappa) if tracked is None else torch.tensor(tracked, dtype=torch.float64, device="cpu")
    density = density - density.mean(-1, keepdim=True)
    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    steps = range(1, len(kappa) + 1)
    pictures = min(SHOWN, kappa.shape[2])
    for component in range(kappa.shape[3]):
        for picture in range(pictures):
            style = {"color": f"C{component}", "linestyle": ("-", "--", ":")[picture], "linewidth": 1}
            label = f"component {component + 1}" if picture == 0 else None
            above.plot(steps, density[:, 0, picture, component], label=label, **style)
            below.plot(steps, kappa[:, 0, picture, component].clamp(-2, 3), **style)
    rows = f"the first {pictures} of {kappa.shape[2]} rows"
    region = f", region 1 of {kappa.shape[1]}" if kappa.shape[1] > 1 else ""
    above.set_title(f"superdiff, {report['method']['op']}: {rows}{region}", fontsize=9)
    above.set_ylabel("log-density minus mean, nats")
    below.set_ylabel("mixing weight, cut to [-2, 3]")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    above.legend(fontsize=7)
    figure.savefig(file, dpi=120, format="png")
