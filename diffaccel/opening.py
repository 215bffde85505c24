"""From the name of a model to an open pipeline: where its files are, on which device, in which dtype."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel import record, zoo
from diffaccel.errors import DiffAccelError, unknown
from diffaccel.requests import Request, call_parameters, check_subjects, first_line

if TYPE_CHECKING:
    import torch


def locate(model: str) -> tuple[Path, str]:
    """The local folder of a model, downloaded if need be, and a digest of its content.

    Raises:
        DiffAccelError: when there is no such model, with the nearest zoo name.
    """
    if model in zoo.names():
        folder = zoo.path(model)
        if not (folder / "model_index.json").is_file():
            raise DiffAccelError(
                f"The embedded model '{model}' is no pipeline. Use one that makes images: {zoo.DEFAULT}."
            )
        return folder, folder.name.rpartition("-")[2]
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise DiffAccelError(f"'{model}' is a folder without model_index.json. Give one made by save_pretrained.")
        return folder, record.folder_digest(folder)
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise unknown("model", model, zoo.names())
    from diffusers import DiffusionPipeline

    try:
        folder = Path(DiffusionPipeline.download(model))
    except Exception as error:
        raise DiffAccelError(
            f"The model '{model}' is neither in the zoo ({', '.join(zoo.names()) or 'none'}) nor a folder, and the hub "
            f"did not give it: {first_line(error)}"
        ) from error
    return folder, folder.name  # a snapshot's folder is named by its commit


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" takes the first of CUDA, MPS and CPU that is there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown("device", name, ("auto", "cpu", "cuda", "cuda:0", "mps")) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DiffAccelError(
            f"The device '{name}' is not there: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
            ". Use --device cpu, or install a torch that fits the GPU's driver."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DiffAccelError("The device 'mps' is not there. Use --device cpu.")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; "auto" is float32 on a CPU and bfloat16 elsewhere."""
    import torch

    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)


def open_pipeline(request: Request, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The request's pipeline on its device, accelerated.

    Raises:
        DiffAccelError: for files that cannot be loaded, and a pipeline that does not make what was asked for.
    """
    import diffaccel

    try:
        pipe = _load(request.model, folder, dtype)
    except DiffAccelError:
        raise
    except Exception as error:
        advice = "Reinstall diffaccel." if request.model in zoo.names() else "Copy or download it again."
        raise DiffAccelError(
            f"The model '{request.model}' cannot be loaded from '{folder}', whose files are damaged, incomplete or of "
            f"another version ({type(error).__name__}: {first_line(error)}). {advice}"
        ) from error
    missing = {"generator", "num_inference_steps"} - call_parameters(pipe).keys()
    if missing:
        raise DiffAccelError(
            f"The model '{request.model}' is a {type(pipe).__name__}, whose call takes no {', '.join(sorted(missing))}."
            " Give one that makes images or video."
        )
    check_subjects(pipe, request)
    if request.methods:
        diffaccel.accelerate(pipe, *request.methods)
    return pipe.to(device)


def _load(model: str, folder: Path, dtype: torch.dtype) -> Any:
    import diffaccel

    try:
        return diffaccel.load(folder, dtype=dtype)
    except Exception:
        if model not in zoo.names():
            raise
    return diffaccel.load(zoo.path(model, verify=True), dtype=dtype)  # a damaged cache is made again
