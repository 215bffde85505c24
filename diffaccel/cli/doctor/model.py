"""What ``diffaccel doctor --model`` reads of a model without loading its weights: its family, its files, what fits."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffaccel import registry
from diffaccel import terminal as console
from diffaccel.cli.doctor.host import GIB, reason, tried
from diffaccel.errors import DiffAccelError
from diffaccel.runs.loading import INDEX, find_folder

WEIGHTS = (".safetensors", ".bin", ".pt", ".ckpt")
_STEPS = 8


@dataclass(frozen=True)
class Model:
    """A pipeline by its ``model_index.json``; ``complete`` says whether its other files are in ``folder`` as well."""

    name: str
    folder: Path
    index: dict[str, Any]
    complete: bool

    @property
    def components(self) -> dict[str, tuple[str, str]]:
        """Name of each part, and the library and class it is made of."""
        pairs = {k: v for k, v in self.index.items() if isinstance(v, list) and len(v) == 2 and not k.startswith("_")}
        return {name: (library, cls) for name, (library, cls) in pairs.items() if library and cls}


def read(name: str) -> Model:
    """The model of a zoo name, a folder, or ``owner/name`` on the hub, of which only the index is fetched.

    Raises:
        DiffAccelError: when there is no such model, or its index says nothing of a pipeline.
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
    """Family, parts and, for every registered method, whether it fits and why not."""
    pipeline = model.index["_class_name"]
    try:
        family, note = _family(pipeline), ""
    except Exception as error:
        family, note = None, reason(error)
    parts = [tried(name, lambda n=name: _part(model, n)) for name in model.components] if model.complete else []  # type: ignore[misc]
    return {
        "name": model.name,
        "pipeline": pipeline,
        "family": family.name if family else None,
        "note": note
        or ("" if family else "none: the first run watches the pipeline's own call to find out how it works"),
        "components": [asdict(part) for part in parts],
        "bytes": sum(size for _, size in _weights(model.folder)) if model.complete else None,
        "methods": [_fits(name, model, pipeline, family) for name in registry.names()],
    }


def _family(pipeline: str) -> Any:
    """The family of a pipeline class, found as for a pipeline but from its name."""
    import diffusers

    from diffaccel import families

    if pipeline not in families.FAMILIES and not hasattr(diffusers, pipeline):
        raise DiffAccelError(f"diffusers {diffusers.__version__} has no class {pipeline}; the pipeline brings its own")
    cls = type(pipeline, (), {}) if pipeline in families.FAMILIES else getattr(diffusers, pipeline)
    return families.find(object.__new__(cls))


def _part(model: Model, name: str) -> str:
    """What a component is and how large its files are, which are looked at for missing ends."""
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
    found = list(_weights(folder))
    for file, size in found:
        if file.suffix == ".safetensors" and size != (whole := _declared(file)):
            raise DiffAccelError(f"{cls}: '{file.name}' has {size} bytes, and its own header asks for {whole}")
    total = sum(size for _, size in found)
    return f"{cls}, {total / GIB:.2f} GiB of weights" if total else cls


def _weights(folder: Path) -> Iterator[tuple[Path, int]]:
    return ((file, file.stat().st_size) for file in sorted(folder.rglob("*")) if file.suffix in WEIGHTS)


def _declared(file: Path) -> int:
    """How long a safetensors file is by its own header."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            return length + 8
        header = json.loads(stream.read(length))
    return 8 + length + max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)


def _fits(name: str, model: Model, pipeline: str, family: Any) -> dict[str, Any]:
    fits: bool | None
    try:
        config_class = registry.config_class(name)
        if hasattr(config_class, "fits"):
            fits, why = config_class.fits(pipeline, family)
        elif config_class.touches == "loop":
            fits, why = _follows(config_class(), model, pipeline, family)
        else:
            fits, why = None, "the method does not say which pipelines it fits"
    except Exception as error:
        fits, why = False, reason(error)
    return {"name": name, "fits": fits, "reason": why}


def _follows(config: Any, model: Model, pipeline: str, family: Any) -> tuple[bool | None, str]:
    """Rehearse the sampler on the model's own noise schedule.

    Without a family, a run watches the pipeline's call to find out how it works, which takes the loaded model; where
    that fails the sampler must do inside the pipeline's loop.
    """
    import diffusers

    from diffaccel import schedules
    from diffaccel.runtime import stock_loop as stock

    if "scheduler" not in model.components:
        raise DiffAccelError(f"{pipeline} has no scheduler, so there is no loop to replace")
    scheduler = getattr(diffusers, model.components["scheduler"][1]).from_pretrained(model.folder / "scheduler")
    shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(_STEPS, **shift)
    session = _Rehearsal(scheduler)
    try:
        next(config.sample(session))
    except _BeyondRehearsalError:
        _ = session.schedule  # raises when it cannot be followed
    if family is not None:
        return True, f"runs its own loop over {pipeline}"
    try:
        asked = stock.rehearse(config, type(pipeline, (), {})(), schedules.read(scheduler))
    except Exception:
        return None, f"only if the call of {pipeline} can be followed, which its first run finds out"
    return True, f"runs at least inside the loop of {pipeline}, {len(asked)} predictions for {_STEPS} steps"


class _BeyondRehearsalError(Exception):
    """A sampler looks at something that only a loaded model has."""


class _Rehearsal:
    """The part of a session that there is without a network: enough for the first step of most samplers."""

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


def show(found: dict[str, Any]) -> None:
    """The same as tables."""
    mark = {True: "yes", False: "no", None: "-"}
    family = found["family"] or found["note"]
    console.write(f"Model {found['name']}: {found['pipeline']}, family {family}\n")
    if found["components"]:
        rows = [[row["name"], mark[row["works"]], row["detail"]] for row in found["components"]]
        console.write_table(f"Files, {found['bytes'] / GIB:.2f} GiB of weights", ["part", "whole", "found"], rows)
    rows = [[row["name"], mark[row["fits"]], row["reason"]] for row in found["methods"]]
    console.write_table("Methods on this model", ["name", "fits", "why"], rows)
