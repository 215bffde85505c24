"""Translate a request into the arguments of one pipeline's call.

Pipelines differ in what they draw from (text, classes, nothing), whether they make video, and how they take guidance;
all of it is read from the pipeline's signature and its network's config.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any, Literal

from diffaccel import zoo
from diffaccel.errors import DiffAccelError
from diffaccel.families import find, network
from diffaccel.runs.request import Request

_DEFAULT_FPS = 16.0
_BINNED_SIZES = (32, 64, 128, 256)  # latent sizes for which PixArt has a table of aspect ratios


def call_parameters(pipe: Any) -> dict[str, Any]:
    """Return the call arguments of a pipeline, or a class of them, with their defaults."""
    cls = pipe if isinstance(pipe, type) else type(pipe)
    parameters = inspect.signature(cls.__call__).parameters
    return {name: p.default for name, p in parameters.items() if name != "self"}


def source_of(pipe: Any) -> Literal["text", "class", "nothing"]:
    """Return what a pipeline, or a class of them, draws from."""
    accepted = call_parameters(pipe)
    return "text" if "prompt" in accepted else "class" if "class_labels" in accepted else "nothing"


def check_subjects(pipe: Any, request: Request) -> None:
    """Raise for prompts or classes that a pipeline, or a class of them, cannot draw from, and for missing ones."""
    cls, source = pipe if isinstance(pipe, type) else type(pipe), source_of(pipe)
    takes_no = f"The model '{request.model}' is a {cls.__name__}, whose call takes no"
    if source == "nothing" and request.subjects != (None,):
        kind = "class" if request.classes else "prompt"
        raise DiffAccelError(
            f"{takes_no} {kind}: it draws from noise alone. Leave the {kind} out, or give another model."
        )
    if source == "text" and request.classes:
        raise DiffAccelError(f"{takes_no} class. Say what to draw as a prompt.")
    if source == "text" and not request.prompts:
        raise no_prompt()
    if source == "class" and request.subjects == (None,):
        raise DiffAccelError(
            f"No class was given. {cls.__name__} draws from classes: pass --class with a number or name (in eval run "
            "--prompts, a file of classes; in eval time --prompt)."
        )


def steps_of_student(scheduler: Any) -> int | None:
    """Return how many steps a distilled student makes, whatever number is asked for; None for another's scheduler."""
    return len(scheduler.levels) if getattr(scheduler, "is_of_student", False) else None


def no_prompt() -> DiffAccelError:
    """Return the error for a request without a prompt."""
    return DiffAccelError('No prompt was given. Say what to draw, such as "a red apple".')


def check_settings(pipe: Any, request: Request) -> None:
    """Raise for a size, frames or a frame rate that the call of a pipeline, or a class of them, does not take.

    Raises:
        DiffAccelError: also for a pipeline that takes neither seeds nor a number of steps.
    """
    cls, accepted = pipe if isinstance(pipe, type) else type(pipe), call_parameters(pipe)
    if missing := {"generator", "num_inference_steps"} - accepted.keys():
        fix = "Give one that makes images or video."
        if getattr(cls, "rounds_by", None):
            fix = f"Draw the video of a world model by diffaccel rollout {request.model}."
        raise DiffAccelError(
            f"The model '{request.model}' is a {cls.__name__}, whose call takes no {', '.join(sorted(missing))}. {fix}"
        )
    if request.size is not None and "height" not in accepted:
        raise DiffAccelError(f"{cls.__name__} draws at one size only, that of its network. Leave the size out.")
    if (request.frames is not None or request.fps is not None) and "num_frames" not in accepted:
        option = "fps" if request.frames is None else "frames"
        raise DiffAccelError(
            f"{cls.__name__} makes images, and takes no {option}. Leave it out, or give a model that makes video."
        )


def class_labels(pipe: Any, texts: list[str]) -> list[int]:
    """Return the class numbers of class numbers and names.

    Raises:
        DiffAccelError: for a class that the model does not know, with the nearest name.
    """
    return [_class_label(pipe, text.strip()) for text in texts]


def _class_label(pipe: Any, text: str) -> int:
    names = {name.lower(): number for name, number in getattr(pipe, "labels", {}).items()}
    config = network(pipe).config
    count = config.get("num_embeds_ada_norm") or config.get("num_class_embeds") or max(names.values(), default=0) + 1
    if text.isdecimal() and int(text) < count:
        return int(text)
    if text.lower() in names:
        return names[text.lower()]
    nearest = difflib.get_close_matches(text.lower(), names, n=1, cutoff=0.5)
    hint = f"Did you mean '{nearest[0]}'? " if nearest else ""
    examples = f" and {len(names)} names, such as {', '.join(sorted(names)[:3])}" if names else ""
    raise DiffAccelError(
        f"Unknown class '{text}'. {hint}{type(pipe).__name__} knows the numbers 0 to {count - 1}{examples}."
    )


def call_arguments(pipe: Any, request: Request) -> dict[str, Any]:
    """Return the arguments of every pipeline call of a request, apart from prompts and generators.

    Raises:
        DiffAccelError: for a size or a number of frames that does not fit (with the nearest that does), or something
            that the pipeline does not take.
    """
    check_settings(pipe, request)
    accepted = call_parameters(pipe)
    steps = steps_of_student(getattr(pipe, "scheduler", None)) or request.steps or accepted["num_inference_steps"]
    arguments: dict[str, Any] = {"num_inference_steps": steps}
    if request.size is not None:
        arguments |= dict(zip(("height", "width"), request.size, strict=True))
    check_size(pipe, {**accepted, **arguments})
    if request.frames is not None:
        check_frames(pipe, request.frames)
        arguments["num_frames"] = request.frames
    if "use_resolution_binning" in accepted and network(pipe).config.sample_size not in _BINNED_SIZES:
        arguments["use_resolution_binning"] = False  # no table for its size: the call would raise
    max_length = zoo.call_defaults(request.model).get("max_sequence_length")
    if max_length is not None:
        arguments["max_sequence_length"] = max_length
    return arguments | guidance_arguments(pipe, request.guidance, request.negative)


def check_size(pipe: Any, arguments: dict[str, Any]) -> None:
    """Raise for a picture size that the stock pipeline would round without saying so."""
    family = find(pipe)
    if family is not None:
        family.check_size(pipe, *family.asked_size(pipe, arguments))


def check_frames(pipe: Any, frames: int) -> None:
    """Raise for a number of frames that the stock pipeline would change without saying so.

    A causal video VAE compresses all frames but the first by its temporal stride. That of CogVideoX also decodes latent
    frames two at a time, and gives three frames too many when one is left over.
    """
    names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
    stride = next((value for name in names if (value := getattr(pipe, name, None))), 1)
    if type(getattr(pipe, "vae", None)).__name__ == "AutoencoderKLCogVideoX":
        stride *= pipe.vae.num_latent_frames_batch_size
    if (frames - 1) % stride:
        nearest = 1 + max(0, round((frames - 1) / stride)) * stride
        raise DiffAccelError(
            f"{frames} frames do not fit {type(pipe).__name__}: they must be one more than a multiple of {stride}. "
            f"The nearest valid number is {nearest}."
        )


def frame_rate(pipe: Any, request: Request) -> float:
    """Return the frames a second of a request's videos: its own, else those the model was trained at, else 16."""
    family = find(pipe)
    return request.fps or (family.fps if family else _DEFAULT_FPS)


def guidance_arguments(pipe: Any, guidance: float | None, negative: str | None) -> dict[str, Any]:
    """Return the call arguments that ask this pipeline for guidance.

    A network with an embedded scale (FLUX.1-dev) takes ``guidance_scale`` and no negative prompt. One of the same kind
    without it takes ``true_cfg_scale``, which acts only with a negative prompt, so an empty one is passed. All others
    take ``guidance_scale`` and ``negative_prompt``.
    """
    accepted, name = call_parameters(pipe), type(pipe).__name__
    if getattr(getattr(network(pipe), "config", None), "guidance_embeds", False):
        if negative is not None:
            raise DiffAccelError(f"This {name} has its guidance embedded and takes no negative prompt. Leave it out.")
        return {} if guidance is None else {"guidance_scale": guidance}
    key = next((k for k in ("true_cfg_scale", "guidance_scale") if k in accepted), None)
    if key is None or (negative is not None and "negative_prompt" not in accepted):
        if guidance is None and negative is None:
            return {}
        raise DiffAccelError(f"{name} takes no {'guidance' if key is None else 'negative prompt'}. Leave it out.")
    scale = accepted[key] if guidance is None else guidance
    if negative and not scale > 1:
        raise DiffAccelError(f"A negative prompt has no effect at guidance {scale:g}. Ask for guidance above 1.")
    arguments: dict[str, Any] = {} if guidance is None else {key: guidance}
    if negative is not None:
        arguments["negative_prompt"] = negative
    elif key == "true_cfg_scale" and scale > 1:
        arguments["negative_prompt"] = ""
    return arguments
