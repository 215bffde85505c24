"""``diffaccel doctor --model``: a model's family, its files, and which methods fit, without loading its weights."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffaccel import registry, terminal
from diffaccel.cli.doctor.host import GIB, reason, tried
from diffaccel.errors import DiffAccelError
from diffaccel.runs.loading import INDEX, find_folder

WEIGHTS = (".safetensors", ".bin", ".pt", ".ckpt")
_STEPS = 8


@dataclass(frozen=True)
class Model:
    """A pipeline as its ``model_index.json`` describes it.

    Attributes:
        name: as the user wrote it.
        folder: that holds the index.
        index: content of the index.
        complete: whether the folder holds the model's other files as well.
    """

    name: str
    folder: Path
    index: dict[str, Any]
    complete: bool

    @property
    def components(self) -> dict[str, tuple[str, str]]:
        """The library and class of each component, by its name."""
        pairs = {k: v for k, v in self.index.items() if isinstance(v, list) and len(v) == 2 and not k.startswith("_")}
        return {name: (library, cls) for name, (library, cls) in pairs.items() if library and cls}


def read(name: str) -> Model:
    """Read the index of a zoo model, a folder, or ``owner/name`` on the hub, of which only the index is fetched.

    Raises:
        DiffAccelError: when there is no such model, or its index names no pipeline.
    """
    folder = find_folder(name)
    complete = folder is not None
    folder = folder or _from_hub(name)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DiffAccelError(
            f"'{name}' is no pipeline: '{folder}' has no {INDEX}. Give one of save_pretrained."
        ) from None
    except (OSError, ValueError) as error:
        raise DiffAccelError(
            f"'{folder / INDEX}' cannot be read ({error}). Copy or download the model again."
        ) from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise DiffAccelError(f"'{folder / INDEX}' names no pipeline class (_class_name). Copy or download it again.")
    return Model(name, folder, index, complete)


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        folder = Path(hf_hub_download(name, INDEX)).parent
        hf_hub_download(name, "scheduler/scheduler_config.json")
    except Exception as error:
        raise DiffAccelError(
            f"'{name}' is neither in the zoo nor a folder, and the hub gave: {reason(error)}"
        ) from error
    return folder


def fit(model: Model) -> dict[str, Any]:
    """Return the model's family, its components and, for every registered method, whether it fits and why not."""
    pipeline = model.index["_class_name"]
    try:
        family, note = _family(pipeline), ""
    except Exception as error:
        family, note = None, reason(error)
    names = model.components if model.complete else ()
    components = [tried(name, lambda name=name: _component(model, name)) for name in names]  # type: ignore[misc]
    return {
        "name": model.name,
        "pipeline": pipeline,
        "family": family.name if family else None,
        "note": note
        or ("" if family else "none: the first run watches the pipeline's own call to find out how it works"),
        "components": [asdict(component) for component in components],
        "bytes": sum(size for _, size in _weights(model.folder)) if model.complete else None,
        "methods": [_method_fit(name, model, pipeline, family) for name in registry.names()],
    }


def _family(pipeline: str, *, for_search: bool = False) -> Any:
    """Find the family of a pipeline class from its name, as for an open pipeline."""
    import diffusers

    from diffaccel import families

    if pipeline not in families.FAMILIES and not hasattr(diffusers, pipeline):
        raise DiffAccelError(f"diffusers {diffusers.__version__} has no class {pipeline}; the pipeline brings its own")
    cls = type(pipeline, (), {}) if pipeline in families.FAMILIES else getattr(diffusers, pipeline)
    return (families.find_for_search if for_search else families.find)(object.__new__(cls))


def _component(model: Model, name: str) -> str:
    """Return the class and size of a component, after checking that none of its files is missing or truncated."""
    library, cls = model.components[name]
    if cls not in dir(importlib.import_module(library)):
        raise DiffAccelError(f"{library} has no class {cls}; it may need another version of {library}")
    folder = model.folder / name
    if not folder.is_dir():
        raise DiffAccelError(f"{cls}: the folder '{folder}' is missing")
    for file in folder.glob("*.index.json"):
        shards = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            raise DiffAccelError(f"{cls}: {len(missing)} of {len(shards)} weight files are missing, first {missing[0]}")
    weights = list(_weights(folder))
    for file, size in weights:
        if file.suffix == ".safetensors" and size != (declared := _declared_size(file)):
            raise DiffAccelError(f"{cls}: '{file.name}' has {size} bytes, and its own header asks for {declared}")
    total = sum(size for _, size in weights)
    return f"{cls}, {total / GIB:.2f} GiB of weights" if total else cls


def _weights(folder: Path) -> Iterator[tuple[Path, int]]:
    return ((file, file.stat().st_size) for file in sorted(folder.rglob("*")) if file.suffix in WEIGHTS)


def _declared_size(file: Path) -> int:
    """Return the bytes that a safetensors file should have by its own header."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            return length + 8
        header = json.loads(stream.read(length))
    return 8 + length + max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)


def _method_fit(name: str, model: Model, pipeline: str, family: Any) -> dict[str, Any]:
    fits: bool | None
    try:
        config_class = registry.config_class(name)
        if hasattr(config_class, "fits"):
            fits, why = config_class.fits(pipeline, family)
        elif config_class.touches == "loop":
            fits, why = _sampler_fit(config_class(), model, pipeline, family)
        else:
            fits, why = None, "the method does not say which pipelines it fits"
    except Exception as error:
        fits, why = False, reason(error)
    return {"name": name, "fits": fits, "reason": why}


def _sampler_fit(config: Any, model: Model, pipeline: str, family: Any) -> tuple[bool | None, str]:
    """Rehearse a sampler on the model's own noise schedule.

    Without a family, a run watches the pipeline's call to find out how it works, which needs the loaded model; where
    that fails, the sampler must work inside the pipeline's own loop.
    """
    import diffusers

    from diffaccel import schedules
    from diffaccel.runtime import rehearsal

    if "scheduler" not in model.components:
        raise DiffAccelError(f"{pipeline} has no scheduler, so there is no loop to replace")
    if config.is_stock_rule and family is None:
        return True, f"runs over {pipeline}, in the pipeline's own call where that cannot be followed"
    scheduler = getattr(diffusers, model.components["scheduler"][1]).from_pretrained(model.folder / "scheduler")
    shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(_STEPS, **shift)
    session = _Rehearsal(scheduler)
    try:
        next(config.sample(session))
    except _BeyondRehearsalError:
        _ = session.schedule  # raises for a schedule that diffaccel cannot read
    if family is None and config.searches:
        family = _family(pipeline, for_search=True)
    if family is not None:
        return True, f"runs its own loop over {pipeline}"
    try:
        sigmas = rehearsal.rehearse(config, type(pipeline, (), {})(), schedules.read(scheduler))
    except Exception:
        return None, f"only if the call of {pipeline} can be followed, which its first run finds out"
    return True, f"runs at least inside the loop of {pipeline}, {len(sigmas)} predictions for {_STEPS} steps"


class _BeyondRehearsalError(Exception):
    """A sampler needs something that only a loaded model has."""


class _Rehearsal:
    """The part of a session that exists without a network: enough for the first step of most samplers."""

    def __init__(self, scheduler: Any) -> None:
        import torch

        self._scheduler, self.timesteps = scheduler, scheduler.timesteps
        self.x = self.latents = torch.zeros(1, 1, 1, 1)

    @property
    def schedule(self) -> Any:
        from diffaccel import schedules

        return schedules.read(self._scheduler)

    @property
    def sigmas(self) -> Any:
        return self.schedule.sigmas

    @property
    def path(self) -> Any:
        return self.schedule.path

    def randn_like(self, x: Any) -> Any:
        return x

    def __getattr__(self, name: str) -> Any:
        raise _BeyondRehearsalError(name)


def show(report: dict[str, Any]) -> None:
    """Write the report of :func:`fit` as tables."""
    mark = {True: "yes", False: "no", None: "-"}
    family = report["family"] or report["note"]
    terminal.write(f"Model {report['name']}: {report['pipeline']}, family {family}\n")
    if report["components"]:
        rows = [[row["name"], mark[row["works"]], row["detail"]] for row in report["components"]]
        terminal.write_table(f"Files, {report['bytes'] / GIB:.2f} GiB of weights", ["part", "whole", "found"], rows)
    rows = [[row["name"], mark[row["fits"]], row["reason"]] for row in report["methods"]]
    terminal.write_table("Methods on this model", ["name", "fits", "why"], rows)
