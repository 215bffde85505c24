"""Train two video models with few bits by QVGen, LSQ+ and the recipe that follows the data, and measure all of them.

    python -m scripts.zoo.coinrun.fetch --data data/coinrun
    python -m scripts.qvgen_video --recipe full --work out/qvgen-video --minutes 9 --kind nvidia-h200 --out docs/results

``world`` is the embedded world model coinrun-nfd, measured by the PSNR of the videos that it draws on levels which no
training saw; ``wan`` a network of the Wan architecture that this script trains first, measured by its clean estimates
of clips of such levels. Every way has the same clips, draws and rates; those that follow the data make half of the
steps. Each call works for at most ``--minutes`` and goes on where the last one stopped; exit status 4 says that work is
left. Calls with other ``--seeds`` may share a machine and a folder, once ``--stages teacher`` is made; ``--stages
report`` makes the table of all that is finished.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections import defaultdict
from dataclasses import asdict, is_dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import diffaccel
from diffaccel import record
from diffaccel.errors import DiffAccelError, unknown
from diffaccel.files import write_json
from diffaccel.quant import QVGen
from diffaccel.quant.qvgen.run import QATRun
from diffaccel.training.checkpoint import save_tensors
from diffaccel.training.loop import Deadline
from scripts.qvgen_beds import recipe as sizes
from scripts.qvgen_beds import report, wan, world
from scripts.qvgen_beds.clips import Clips
from scripts.qvgen_beds.held import estimate_errors, held_errors
from scripts.zoo.coinrun.forks import make_forks
from scripts.zoo.coinrun.pool import TRAINING_LEVELS, VALIDATION_LEVELS, Pool
from scripts.zoo.coinrun.simulator import SIZE

UNFINISHED = 4
BEDS = ("world", "wan")
STAGES = ("teacher", "runs", "report")
WAYS: dict[str, tuple[str, dict[str, Any]]] = {  # preset, and what differs from it
    "qvgen": ("qvgen", {}),
    "lsq": ("lsq", {}),
    "dsa": ("dsa", {}),
    "dsa+rank": ("dsa+rank", {}),
    "dsa-asymmetric": ("dsa", {"symmetric": False}),
    "dsa+rank-asymmetric": ("dsa+rank", {"symmetric": False}),
}
BASELINE = "lsq"
_MEASURING = 45  # seconds kept for the measurement of a run
tell = partial(print, flush=True)


def config_of(way: str, bits: int, size: sizes.Size, args: argparse.Namespace, **changes: Any) -> QVGen:
    """Return the settings of one run; ways that follow the data make half of the steps."""
    preset, own = WAYS[way]
    steps = args.steps or size.steps
    rates = {"lr": args.lr, "scale_lr": args.lr, "rank_lr": args.lr, "clip_lr": args.clip_lr}
    sides = {"rank": size.rank} if "rank" in way or way == "qvgen" else {}
    return QVGen.preset(
        preset, weight_bits=bits, act_bits=bits, steps=steps // 2 if preset.startswith("dsa") else steps,
        batch=args.batch or size.batch, shift=wan.SHIFT, modulation="keep", log_seconds=0.5,
        **rates, **sides, **own, **changes,
    )  # fmt: skip


def device_of(args: argparse.Namespace) -> torch.device:
    """Return the device asked for, or a GPU where there is one."""
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


class Bed:
    """One model with its clips, made when a stage needs them.

    Attributes:
        levels: at which held-out clips are measured.
        skip: layers that stay.
        largest_time: the network's time of pure noise.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.args, self.size = name, args, sizes.get(args.recipe)
        self.folder = args.work / name
        self.device = device_of(args)
        is_world = name == "world"
        self.levels = (0.4, 0.667, 0.857, 1.0) if is_world else (0.1, 0.3, 0.5, 0.7, 0.9)
        self.skip = world.KEPT if is_world else ()
        self.largest_time = 1.0 if is_world else None

    @cached_property
    def pool(self) -> Pool:
        """Frames to learn from."""
        return Pool(self.args.data, self.size.pool, TRAINING_LEVELS, 11, self._length, self.device)

    @cached_property
    def held_pool(self) -> Pool:
        """Frames of levels that are measured."""
        return Pool(self.args.data, self.size.held_pool, VALIDATION_LEVELS, 12, self._length, self.device)

    @property
    def _length(self) -> int:
        return self.size.context + 1 if self.name == "world" else self.size.frames

    @cached_property
    def pipe(self) -> Any:
        """The embedded world model."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return diffaccel.load("coinrun-nfd").to(self.device, dtype)

    @cached_property
    def parts(self) -> tuple[Any, Clips, Any, Clips]:
        """What is followed with its clips, and the same on held-out clips."""
        size, batch = self.size, self.args.batch or self.size.batch
        if self.name == "world":
            common = {"context": size.context, "queries": size.queries, "context_noise": self.pipe.config.context_noise}
            net = self.pipe.transformer.eval()
            model = world.World(net, self.pool, size.clips, 1, batch=batch, **common)
            held = world.World(net, self.held_pool, size.held, 2, batch=batch, **common)
            return model, model.clips, held, held.clips
        if not (self.folder / "teacher" / "config.json").is_file():
            raise DiffAccelError(f"'{self.folder}' has no finished teacher. Run the stage 'teacher' first.")
        followed = wan.followed(wan.trained(self.folder / "teacher", self.device), size.frames)
        return followed, self.clips(self.pool, size.clips, 1), followed, self.clips(self.held_pool, size.held, 2)

    def clips(self, pool: Pool, count: int, seed: int) -> Clips:
        """Return clips as the Wan architecture has them."""
        return Clips(pool, count, seed, wan.shape(self.size.frames), wan.arrange(self.size.frames))

    @cached_property
    def forks(self) -> Any:
        """Games in which drawn videos are measured."""
        return make_forks(self.args.data, self.size.forks, 8, max(world.HORIZONS))

    def teacher(self, deadline: Deadline) -> bool:
        """Train the network that is followed, where it is not embedded."""
        if self.name == "world":
            return True
        clips = self.clips(self.pool, self.size.clips, 1)
        return wan.train(clips, self.size, self.folder / "teacher", deadline, self.device)

    def measured(self, network: Any) -> dict[str, Tensor]:
        """Return errors of every clip and column, ``(N, ...)``."""
        _, _, held, clips = self.parts
        found = held_errors(held, clips, network, self.levels)
        if self.name == "world":
            found |= world.drawn_errors(self.pipe, network, self.forks)
        return {name: errors.contiguous() for name, errors in found.items()}

    def columns(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return errors ``(N,)`` of frames by what they are of; PSNR is that of their mean."""
        columns = {}
        for key in ("drawn, seen before", "drawn"):
            for place, ahead in enumerate(world.HORIZONS) if key in found else ():
                columns[f"{key}, {ahead} ahead"] = found[key][:, place]
        estimates = estimate_errors(found["loss"], self.levels)
        return columns | {f"clean estimate at {level}": estimates[:, i] for i, level in enumerate(self.levels)}

    def runs(self, deadline: Deadline) -> bool:
        """Make the runs that are left, and return whether all are made."""
        if not (self.folder / "plain.safetensors").is_file():
            save_tensors(self.measured(self.parts[0].network), self.folder / "plain.safetensors", {})
        for seed in self.args.seeds:
            for bits in self.args.bits:
                for way in self.args.ways:
                    if not self.run(way, bits, seed, deadline):
                        return False
        return True

    def run(self, way: str, bits: int, seed: int, deadline: Deadline) -> bool:
        """Make one run as far as the time goes, and measure it; return whether it is whole."""
        folder = self.folder / f"{way}-w{bits}a{bits}-{seed}"
        if (folder / "result.json").is_file():
            return True
        if deadline.left() < self.args.measuring:
            return False
        tell(f"-- {self.name} {folder.name}, {deadline.left():.0f} s left")
        model, clips, held, held_clips = self.parts
        config = config_of(way, bits, self.size, self.args, skip=self.skip)
        run = QATRun(
            model, clips, config, folder, seed=seed, device=self.device, largest_time=self.largest_time,
            dtype=torch.bfloat16 if self.device.type == "cuda" else torch.float32,
        )  # fmt: skip

        def distance(run: QATRun) -> dict[str, float]:
            errors = held_errors(held, held_clips, run.student, self.levels, 32)
            return {"distance": round(float(errors["distance"].mean()), 8)}

        every = max(1, config.steps // self.size.curve)
        if not run.run(Deadline(deadline.left() - self.args.measuring), every, distance):
            return False
        is_fast = self.device.type == "cuda"  # elsewhere codes are multiplied by a slow formula, to the same numbers
        found = self.measured(run.result() if is_fast else run.student)
        save_tensors(found, folder / "measured.safetensors", {})
        write_json(folder / "result.json", {
            "way": way, "bits": bits, "seed": seed, "steps": config.steps, "seconds": round(run.seconds, 1),
            "options": config.run_options(), "early_norm": report.early_norm(report.log_of(folder), config.steps),
            "distance": float(found["distance"].mean()), "device": record.describe_device(self.device),
        })  # fmt: skip
        run.checkpoint.unlink(missing_ok=True)
        del run
        gc.collect()
        return True

    def report(self) -> dict[str, Any]:
        """Print the table of all finished runs, draw their curves, and return the numbers."""
        groups: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
        logs: dict[tuple[int, str], list[list[dict[str, float]]]] = defaultdict(list)
        plain = self.columns(load_file(self.folder / "plain.safetensors"))
        for bits in self.args.bits:
            for way in self.args.ways:
                for file in sorted(self.folder.glob(f"{way}-w{bits}a{bits}-*/result.json")):
                    result = json.loads(file.read_text(encoding="utf-8"))
                    result["columns"] = self.columns(load_file(file.parent / "measured.safetensors"))
                    groups[bits, way].append(result)
                    logs[bits, way].append(report.log_of(file.parent))
        if not groups:
            raise DiffAccelError(f"'{self.folder}' has no finished run. Run the stage 'runs' first.")
        rows = report.rows_of(groups, plain, BASELINE)
        told = report.table(rows, plain, BASELINE)
        tell(f"\n{self.name}\n{told}")
        out = self.args.out or self.args.work
        out.mkdir(parents=True, exist_ok=True)
        report.plot(logs, f"{self.name}, {self.args.kind}", out / f"qvgen_video_{self.name}_{self.args.kind}.png")
        full = {name: report.decibels([errors]) for name, errors in plain.items()}
        return {"table": told, "full precision": full, "rows": rows, "levels": self.levels,
                "options": groups[next(iter(groups))][0]["options"]}  # fmt: skip


def plainly(value: Any) -> Any:
    """Return a value as JSON has it."""
    if is_dataclass(value) and not isinstance(value, type):
        return plainly(asdict(value))
    if isinstance(value, dict):
        return {str(key): plainly(part) for key, part in value.items()}
    return [plainly(part) for part in value] if isinstance(value, list | tuple) else value


def options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of runs; kept from call to call")
    parser.add_argument("--recipe", default="full", help=", ".join(sizes.SIZES))
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call")
    parser.add_argument("--stages", default=",".join(STAGES), help="which of them; they run in this order")
    parser.add_argument("--beds", nargs="+", choices=BEDS, default=list(BEDS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="of ways that follow the teacher; 0 for the recipe's")
    parser.add_argument("--batch", type=int, default=0, help="0 for the recipe's")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--clip-lr", type=float, default=1e-2)
    parser.add_argument("--data", type=Path, default=Path("data/coinrun"), help="folder of scripts.zoo.coinrun.fetch")
    parser.add_argument("--device", default="")
    parser.add_argument("--kind", default="cpu", help="name of the machine, for the record's file name")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON record and the curves")
    parser.add_argument("--measuring", type=float, default=_MEASURING, help="seconds kept for measuring a run")
    args = parser.parse_args()
    args.stages = args.stages.split(",")
    for stage in args.stages:
        if stage not in STAGES:
            raise SystemExit(f"error: {unknown('stage', stage, STAGES)}")
    return args


def compared(args: argparse.Namespace) -> int:
    """Run the stages asked for, bed by bed."""
    deadline, values = Deadline(60 * args.minutes), {}
    for name in args.beds:
        bed = Bed(name, args)
        bed.folder.mkdir(parents=True, exist_ok=True)
        for stage in ("teacher", "runs"):
            if stage in args.stages and not getattr(bed, stage)(deadline):
                tell(f"work is left in '{stage}' of {name}: give the same command again")
                return UNFINISHED
        if "report" in args.stages:
            values[name] = plainly(bed.report())
    if args.out and values:
        settings = {key: value for key, value in vars(args).items() if key not in ("work", "out", "data")}
        made = record.Record(kind="qvgen_video", settings=settings, command=["python", "-m", "scripts.qvgen_video"])
        made.device = record.describe_device(device_of(args))
        made.finish(frame=[SIZE, SIZE], **values).save(args.out / f"qvgen_video_{args.kind}.json")
    return 0


def main() -> int:
    try:
        return compared(options())
    except DiffAccelError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    raise SystemExit(main())
