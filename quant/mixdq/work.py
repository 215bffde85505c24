"""The work that makes a plan: calibrate, measure, allocate, write; killed at any moment, it goes on where it was."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from diffaccel import families
from diffaccel.errors import DiffAccelError, first_line
from diffaccel.files import write_json
from diffaccel.modules.stand_in import uncompiled
from diffaccel.quant.identity import pipeline_hash
from diffaccel.quant.mixdq.calibrate import CalibratedRanges, Recorder
from diffaccel.quant.mixdq.candidates import candidates
from diffaccel.quant.mixdq.choose import Choice, Choosing, candidate_budgets, choose, uniform
from diffaccel.quant.mixdq.drawings import Drawings
from diffaccel.quant.mixdq.plan_file import PrecisionPlan, read_plan, shapes_digest
from diffaccel.quant.mixdq.sensitivity import Probe, RecordFile, Sensitivities
from diffaccel.quant.mixdq.simulate import Bench
from diffaccel.quant.plan import check_skips

PLAN, CALIBRATION, RECORDS, IDENTITY = "plan.json", "calibration.json", "measured.jsonl", "work.json"
_NOT_OF_THE_PLAN = ("name", "plan", "backend", "originals")
_T = TypeVar("_T")
_REPEATS = 7  # of a layer's time


def make(
    pipe: Any,
    config: Any,
    folder: Path,
    prompts: tuple[str, ...],
    arguments: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    tell: Callable[[str], None] = lambda text: None,
    begin: Callable[[], None] = lambda: None,
) -> PrecisionPlan:
    """Make the plan of a pipeline's network in a folder, or go on with one, and return it.

    Args:
        config: a ``MixDQ`` without a plan.
        folder: of ``plan.json``, and of what is measured on the way.
        prompts: at least ``config.samples`` different ones.
        arguments: of the pipeline's call, such as its size and guidance.
        provenance: what else the plan says of its origin.
        tell: called with every step as text.
        begin: called before anything is written, when pipeline, prompts and options are found to fit.

    Raises:
        DiffAccelError: for a pipeline with no network or two, too few prompts, a folder with other work, and an
            average that no plan has.
    """
    planning = _Planning(pipe, config, folder, prompts, arguments or {}, provenance or {}, tell)
    begin()
    return planning.plan()


class _Planning:
    def __init__(
        self, pipe: Any, config: Any, folder: Path, prompts: tuple[str, ...], arguments: dict[str, Any],
        provenance: dict[str, Any], tell: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.pipe, self.config, self.folder, self.tell = pipe, config, folder, tell
        self.network = _only_network(pipe)
        if "prompt" not in inspect.signature(type(pipe).__call__).parameters:
            raise DiffAccelError(
                f"'mixdq' measures on drawings of prompts, and {type(pipe).__name__} takes none. Use w8a8, w4a16 or "
                "w4a8, which need no data."
            )
        if config.exact and importlib.util.find_spec("scipy") is None:
            raise DiffAccelError(
                "MixDQ.exact needs scipy, which is not installed. pip install 'diffaccel[exact]', or leave it out."
            )
        different = tuple(dict.fromkeys(prompts))
        if len(different) < config.samples:
            raise DiffAccelError(
                f"MixDQ.samples is {config.samples}, and there are {len(different)} different prompts. Give more, or "
                "ask for fewer samples."
            )
        self.drawings = Drawings(different[: config.samples], config.steps, config.seed, arguments)
        check_skips([self.network], config)
        self.layers = candidates(self.network, config)
        self.settings = {k: v for k, v in config.to_dict().items() if k not in _NOT_OF_THE_PLAN}
        origin = _origin(pipe, self.network)
        self.provenance = {**origin, **provenance, "drawings": self.drawings.identity}
        self._probe: Probe | None = None

    def plan(self) -> PrecisionPlan:
        """Return the plan, made or read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_identity()
        if (self.folder / PLAN).is_file():
            return self._made_before()
        self.ranges = self._calibrated()
        self.layers = {name: layer for name, layer in self.layers.items() if name in self.ranges.ranges}
        self.bench = Bench(self.network, self.layers, self.ranges, self.config)
        self.records = RecordFile(self.folder / RECORDS)
        self.measured = Sensitivities(
            self.bench, self.records, self.probe, self.config.allocation == "decoupled", self.tell
        )
        self._check_inputs()
        weights = self._weights()
        inputs, told = self._inputs(weights.bits)
        plan = PrecisionPlan(
            {"class": type(self.network).__name__, "shapes": shapes_digest(self.network)},
            {name: self.bench.planned(name, weights.bits[name], inputs[name]) for name in self.layers},
            {name: layer.size for name, layer in self.layers.items()},
            self.settings, self.provenance, {"weights": weights.results, "activations": told, "rows": self.ranges.rows},
            self.ranges.first_row if self.ranges.readers else None,
        )  # fmt: skip
        plan.write(self.folder / PLAN)
        return read_plan(self.folder / PLAN)

    def probe(self) -> Probe:
        """Return the plain pictures and calls, drawn at the first use."""
        if self._probe is None:
            config = self.config
            self._probe = Probe(self.pipe, self.network, self.drawings, config.probes, config.window)
        return self._probe

    def _check_identity(self) -> None:
        """Raise for a folder with the work on another model, or with other options."""
        file = self.folder / IDENTITY
        if not file.is_file():
            if rest := [name for name in (CALIBRATION, RECORDS, PLAN) if (self.folder / name).exists()]:
                raise DiffAccelError(
                    f"'{self.folder}' has {' and '.join(rest)} and no {IDENTITY}, which tells what they are of. Give "
                    "another folder, or throw this one away."
                )
            write_json(file, self._identity())
            return
        parts = tuple(self._identity())
        self._compare(_read(file, lambda values: {part: dict(values[part]) for part in parts}), self.folder)

    def _identity(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(json.dumps({"settings": self.settings, "origin": self.provenance}))
        return values

    def _compare(self, before: dict[str, Any], where: Path) -> None:
        """Raise unless a file of the work is of these options and this origin."""
        now = self._identity()
        before["origin"].setdefault("parts", now["origin"]["parts"])  # of work that was begun before they were noted
        for part in ("settings", "origin"):
            if other := [key for key in {**now[part], **before[part]} if now[part].get(key) != before[part].get(key)]:
                raise DiffAccelError(
                    f"'{where}' has the work of other {'options' if part == 'settings' else 'origin'} "
                    f"({', '.join(sorted(other))}). Give another folder, or throw this one away."
                )

    def _made_before(self) -> PrecisionPlan:
        """Return the plan that is in the folder."""
        plan = read_plan(self.folder / PLAN)
        self._compare({"settings": plan.settings, "origin": plan.provenance}, self.folder / PLAN)
        return plan

    def _calibrated(self) -> CalibratedRanges:
        file = self.folder / CALIBRATION
        if not file.is_file():
            recorder = Recorder(self.layers, self.config.calibration, self.config.bos == "auto")
            with recorder.watching():
                self.drawings.draw(self.pipe)
            values = recorder.result().to_dict()
            write_json(file, {**values, "sha256": _digest(values)})
            self.tell(f"calibrated {len(self.layers)} layers on {len(self.drawings.prompts)} drawings")
        return _read(file, _ranges_of)

    def _groups(self, names: list[str]) -> list[list[str]]:
        """Return the names of each group that is programmed by itself."""
        if self.config.allocation == "sqnr":
            return [names]
        groups = [[n for n in names if self.layers[n].group == group] for group in ("content", "quality")]
        return [group for group in groups if group]

    def _weights(self) -> Choice:
        config, names = self.config, list(self.layers)
        sizes = {name: layer.size for name, layer in self.layers.items()}
        choices = {name: layer.weight_choices for name, layer in self.layers.items()}
        if config.allocation == "uniform" or (config.weight_bits >= 8 and not config.latency):
            allowed = (2, 4, 8) if config.allocation == "uniform" else (8,)
            bits = uniform(names, sizes, allowed, config.weight_bits)
            average = Choosing(sizes, {}, [names]).average(bits)
            return Choice(bits, average, {"average": average, "asked": config.weight_bits})
        unknown = {name: dict.fromkeys(several, 0.0) for name, several in choices.items()}
        if not config.latency:  # before hours are spent on what no plan can keep
            unmeasured = Choosing(sizes, unknown, self._groups(names))
            candidate_budgets(unmeasured, config.weight_bits, "weight", config.ratios, config.averages)
        values = self.measured.measure("weight", choices)
        costs = self._times(choices) if config.latency else None
        what = Choosing(sizes, values, self._groups(names), costs, config.latency, config.exact)
        started = time.perf_counter()
        found = choose(what, config.weight_bits, "weight", config.ratios, config.averages, self._error_of_weights)
        self.tell(f"weights: {found.average:.3f} bits on average, chosen in {time.perf_counter() - started:.2f} s")
        return found

    def _inputs(self, weights: dict[str, int]) -> tuple[dict[str, int], dict[str, Any]]:
        """Return the bits of every input, and what is told of the choice."""
        config = self.config
        names = [name for name, layer in self.layers.items() if not layer.keeps_input]
        bits = dict.fromkeys(self.layers, 16)
        if config.activation_bits == 16 or not names:
            return bits, {"asked": 16}
        sizes = {name: self.ranges.elements(name) for name in names}
        if config.allocation == "uniform":
            bits |= uniform(names, sizes, (4, 8), config.activation_bits)
            return bits, {"asked": config.activation_bits}
        protected = self._protected(names)
        rest = [name for name in names if name not in protected]
        target = config.activation_bits
        if not rest:  # small groups, of which one input each is protected
            return bits, {"asked": target, "protected": protected}
        if config.within_average:
            total, kept = (sum(sizes[name] for name in several) for several in (names, protected))
            target = (target * total - 16 * kept) / (total - kept)
        if target >= 8:
            bits |= dict.fromkeys(rest, 8)
            return bits, {"asked": config.activation_bits, "protected": protected}
        values = self.measured.measure("activation", dict.fromkeys(rest, (4, 8)))
        what = Choosing(sizes, values, self._groups(rest), exact=config.exact)
        found = choose(
            what, target, "activation", 2 * config.ratios, config.averages,
            lambda chosen: self._error_of_both(weights, chosen),
        )  # fmt: skip
        return bits | found.bits, {**found.results, "protected": protected}

    def _check_inputs(self) -> None:
        """Raise where protected inputs leave the others fewer bits than an input may have, whichever they are."""
        config = self.config
        sizes = {n: self.ranges.elements(n) for n, layer in self.layers.items() if not layer.keeps_input}
        is_asked = config.within_average and config.protect and config.allocation != "uniform"
        if not (is_asked and sizes) or config.activation_bits == 16:
            return
        groups = [sorted(sizes[name] for name in group) for group in self._groups(list(sizes))]
        kept = sum(sum(group[: math.ceil(config.protect * len(group))]) for group in groups)  # the smallest
        total = sum(sizes.values())
        least = (4 * (total - kept) + 16 * kept) / total
        if kept < total and config.activation_bits < least - 1e-9:
            raise DiffAccelError(
                f"MixDQ.activation_bits is {config.activation_bits:g} with within_average and protect={config.protect}"
                f": protected inputs have 16 bits and others at least 4, which is {least:.2f} or more. Allow that "
                "many, or protect less."
            )

    def _protected(self, names: list[str]) -> list[str]:
        """Return the inputs that stay as they are: the share of each group that 8 bits cost the most."""
        if not self.config.protect:
            return []
        values = self.measured.measure("activation", dict.fromkeys(names, (8,)))
        kept: list[str] = []
        for group in self._groups(names):
            count = math.ceil(self.config.protect * len(group))
            kept += sorted(group, key=lambda name: (values[name][8], name))[:count]
        return kept

    def _error_of_weights(self, bits: dict[str, int]) -> float:
        return self._error_of_both(bits, {})

    def _error_of_both(self, weights: dict[str, int], inputs: dict[str, int]) -> float:
        """Return the squared error of the pictures under a choice of bits."""
        entries = {name: self.bench.planned(name, bits, inputs.get(name, 16)) for name, bits in weights.items()}

        def drawn() -> float:
            probe = self.probe()  # of the plain network: a run that goes on here has drawn nothing yet
            with self.bench.with_layers(entries):
                return probe.squared_error()

        key = hashlib.sha256(json.dumps([weights, inputs]).encode()).hexdigest()[:16]
        value = self.records.get(f"candidate {key}", drawn)
        self.tell(f"candidate {key}: squared error {value:.4g}")
        return value

    def _times(self, choices: dict[str, tuple[int, ...]]) -> dict[str, dict[int, float]]:
        """Return the milliseconds of each layer at each choice, at the calibrated shape of its input."""
        return {
            name: {bits: self.records.get(f"time {bits} {name}", partial(self._time, name, bits)) for bits in several}
            for name, several in choices.items()
        }

    @torch.no_grad()
    def _time(self, name: str, bits: int) -> float:
        module = self.layers[name].module
        wanted = 16 if self.config.activation_bits == 16 else 8
        layer: nn.Module = self.bench.layer(name, self.bench.planned(name, bits, wanted))
        weight = module.weight
        x = torch.ones(self.ranges.shapes[name], dtype=weight.dtype, device=weight.device)
        times = []
        for _ in range(_REPEATS):
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            started = time.perf_counter()
            layer(x)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            times.append(1000 * (time.perf_counter() - started))
        return statistics.median(times[1:])


def _read(file: Path, parse: Callable[[Any], _T]) -> _T:
    """Return what a file of the work says, and raise one sentence for a damaged one."""
    try:
        return parse(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DiffAccelError(
            f"'{file}' is damaged ({first_line(error, 80)}). Throw '{file.parent}' away to make the plan anew."
        ) from error


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _ranges_of(values: dict[str, Any]) -> CalibratedRanges:
    """Return the ranges of a file whose content has the SHA-256 that it tells."""
    told = values.pop("sha256", None)  # files of earlier versions have none
    if told is not None and told != _digest(values):
        raise ValueError("it was changed since it was written")
    return CalibratedRanges.from_dict(values)


def _only_network(pipe: Any) -> nn.Module:
    networks: list[nn.Module] = [uncompiled(network) for network in families.networks(pipe)]
    if len(networks) != 1:
        raise DiffAccelError(
            f"'mixdq' plans one network, and {type(pipe).__name__} has {len(networks)}. Use w8a8, w4a16 or w4a8."
        )
    return networks[0]


def _origin(pipe: Any, network: nn.Module) -> dict[str, Any]:
    """Return what a plan tells of the model that it was made on; weights by their sums."""
    weight = next(p for p in network.parameters() if p.is_floating_point())
    sums = [f"{n} {float(p.detach().double().abs().sum()):.12g}" for n, p in network.named_parameters()]
    return {
        "pipeline": type(pipe).__name__, "scheduler": type(getattr(pipe, "scheduler", None)).__name__,
        "weights": hashlib.sha256("\n".join(sums).encode()).hexdigest()[:16],
        "parts": pipeline_hash(pipe), "dtype": str(weight.dtype).removeprefix("torch."), "device": weight.device.type,
    }  # fmt: skip
