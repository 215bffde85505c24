"""One chunk of a run: one pipeline call, its pictures or clips, and what it cost."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel import compose, record
from diffaccel.compose import summary
from diffaccel.families import find
from diffaccel.files import Clip
from diffaccel.modules.guard import alone
from diffaccel.runs.call_arguments import call_parameters, class_labels, source_of
from diffaccel.runs.energy import joules
from diffaccel.runs.request import Item

if TYPE_CHECKING:
    from diffaccel.runs.profile import Profile


def generate_chunk(
    pipe: Any,
    chunk: list[Item],
    call: dict[str, Any],
    fps: float,
    *,
    folder: Path | None = None,
    shared: bool = False,
) -> tuple[list[Any], dict[str, Any], Profile]:
    """Draw one chunk by one pipeline call and return its pictures or clips, its cost, and the call's profile.

    Every image is drawn from a CPU generator with its own seed, so that it depends on neither its neighbours nor the
    device.

    Args:
        folder: where a search may leave files; None for nowhere.
        shared: whether all processes of the launch make this call together.
    """
    return alone(pipe, lambda: _generate_chunk(pipe, chunk, call, fps, folder, shared))


def _generate_chunk(
    pipe: Any, chunk: list[Item], call: dict[str, Any], fps: float, folder: Path | None, shared: bool
) -> tuple[list[Any], dict[str, Any], Profile]:
    import torch

    from diffaccel.runs.profile import measure

    arguments = dict(call)
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(chunk)
    arguments |= _subject_arguments(pipe, chunk)
    if "num_frames" in call_parameters(pipe):
        arguments["output_type"] = "pil"  # some pipelines return arrays by default
    generators = [torch.Generator().manual_seed(item.seed) for item in chunk]
    if pipe.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pipe.device)
    joules_before = joules(pipe.device)
    with measure(pipe) as profile, warnings.catch_warnings():
        # diffusers' only sign of not-a-number in a picture, which it then draws black
        warnings.filterwarnings("error", "invalid value encountered in cast", RuntimeWarning)
        output = compose.call(pipe, {**arguments, "generator": generators}, folder=folder, shared=shared)
    joules_after = joules(pipe.device)
    frames = getattr(output, "frames", None)
    images = output.images if frames is None else [Clip(list(clip), fps) for clip in frames]
    cost = _cost(pipe, arguments, profile)
    if joules_before is not None and joules_after is not None:
        cost["joules"] = joules_after - joules_before
    return images, cost, profile


def _subject_arguments(pipe: Any, chunk: list[Item]) -> dict[str, Any]:
    """Return the arguments that say what each row of a call shows."""
    source = source_of(pipe)
    if source == "nothing":
        return {"batch_size": len(chunk)}
    texts = [item.prompt or "" for item in chunk]
    return {"prompt": texts} if source == "text" else {"class_labels": class_labels(pipe, texts)}


def _cost(pipe: Any, arguments: dict[str, Any], profile: Profile) -> dict[str, Any]:
    """Return the cost of a call.

    Seconds, whole, by part and by network call; NFE (a guided prediction counts once), rows through the network and
    network calls; peak memory in bytes; with a cache on the network its real and skipped calls and their seconds; with
    captured networks their graphs. Joules, which only the caller can read, are added by it.
    Of a search that goes on where an earlier process was stopped NFE are those of the whole search, and "resumed" has
    those of them that the earlier process made: the rest is of this process alone.
    """
    stats = summary(pipe).last_run
    resumed = (stats or {}).get("report", {}).get("resumed")
    nfe = profile.forwards // _branches(pipe, arguments) if stats is None else stats["nfe"]
    peak = record.peak_memory(pipe.device)
    if stats is not None:
        peak = max(peak or 0, stats["peak_memory"]) or None
    return {
        "seconds": round(profile.seconds, 4),
        "nfe": nfe + (resumed["nfe"] if resumed else 0),
        "forwards": profile.forwards,
        "calls": profile.calls,
        "peak_memory": peak,
        "parts": {part: round(seconds, 4) for part, seconds in profile.parts.items()},
        "steps": [round(seconds, 5) for seconds in profile.steps],
        **({"resumed": {"nfe": resumed["nfe"]}} if resumed else {}),
        **({"caches": stats["caches"]} if stats and stats["caches"] else {}),
        **({"graphs": graphs} if (graphs := graphs_of(pipe)) else {}),
    }


def graphs_of(pipe: Any) -> dict[str, Any] | None:
    """Return what the captured graphs of a pipeline say of themselves, since they were put on; None without any."""
    return next((report for report in summary(pipe).reports.values() if "graphs" in report), None)


def _branches(pipe: Any, arguments: dict[str, Any]) -> int:
    """Return how many rows a stock loop sends through its network for one guided prediction."""
    family = find(pipe)
    if family is not None:
        return 2 if family.guidance_scale(pipe, {**call_parameters(pipe), **arguments}) is not None else 1
    return 2 if getattr(pipe, "do_classifier_free_guidance", False) else 1
