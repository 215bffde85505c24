"""What a request means for one pipeline: the arguments of its call.

Pipelines differ in what they draw from (text, classes, nothing), whether they make video, and how guidance is asked
for; all of it is read from the pipeline's signature and its network's config.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any, Literal

from diffaccel import zoo
from diffaccel.errors import DiffAccelError
from diffaccel.families import find, network
from diffaccel.runs.request import Request

_USUAL_FPS = 16.0
_BINNED = (32, 64, 128, 256)  # latent sizes for which PixArt has a table of aspect ratios


def call_parameters(pipe: Any) -> dict[str, Any]:
    """Names of a pipeline's call arguments and their defaults; of an instance or a class."""
    cls = pipe if isinstance(pipe, type) else type(pipe)
    parameters = inspect.signature(cls.__call__).parameters
    return {name: p.default for name, p in parameters.items() if name != "self"}


def source_of(pipe: Any) -> Literal["text", "class", "nothing"]:
    """What a pipeline, or a class of them, draws from."""
    accepted = call_parameters(pipe)
    return "text" if "prompt" in accepted else "class" if "class_labels" in accepted else "nothing"


def check_subjects(pipe: Any, request: Request) -> None:
    """Refuse prompts and classes that a pipeline, or a class of them, cannot draw from, and missing ones."""
    cls, source = pipe if isinstance(pipe, type) else type(pipe), source_of(pipe)
    name = f"The model '{request.model}' is a {cls.__name__}, whose call takes no"
    if source == "nothing" and request.subjects != (None,):
        what = "class" if request.classes else "prompt"
        raise DiffAccelError(f"{name} {what}: it draws from noise alone. Leave the {what} out, or give another model.")
    if source == "text" and request.classes:
        raise DiffAccelError(f"{name} class. Say what to draw as a prompt.")
    if source == "text" and not request.prompts:
        raise DiffAccelError('No prompt was given. Say what to draw, such as "a red apple".')
    if source == "class" and request.subjects == (None,):
        raise DiffAccelError(
            f"No class was given. {cls.__name__} draws from classes: pass --class with a number or name."
        )


def class_labels(pipe: Any, texts: list[str]) -> list[int]:
    """The class numbers of numbers and names.

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
    near = difflib.get_close_matches(text.lower(), names, n=1, cutoff=0.5)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    known = f" and {len(names)} names, such as {', '.join(sorted(names)[:3])}" if names else ""
    raise DiffAccelError(
        f"Unknown class '{text}'. {hint}{type(pipe).__name__} knows the numbers 0 to {count - 1}{known}."
    )


def call_arguments(pipe: Any, request: Request) -> dict[str, Any]:
    """The arguments of every pipeline call of a request, apart from prompts and generators.

    Raises:
        DiffAccelError: for a size or a number of frames that does not fit (with the nearest that does), or something
            that the pipeline lacks.
    """
    accepted, name = call_parameters(pipe), type(pipe).__name__
    chosen: dict[str, Any] = {"num_inference_steps": request.steps or accepted["num_inference_steps"]}
    if request.size is not None:
        if "height" not in accepted:
            raise DiffAccelError(f"{name} draws at one size only, that of its network. Leave the size out.")
        chosen["height"], chosen["width"] = request.size
    check_size(pipe, {**accepted, **chosen})
    if "num_frames" in accepted:
        if request.frames is not None:
            check_frames(pipe, request.frames)
            chosen["num_frames"] = request.frames
    elif request.frames is not None or request.fps is not None:
        what = "fps" if request.frames is None else "frames"
        raise DiffAccelError(
            f"{name} makes images, and takes no {what}. Leave it out, or give a model that makes video."
        )
    if "use_resolution_binning" in accepted and network(pipe).config.sample_size not in _BINNED:
        chosen["use_resolution_binning"] = False  # there is no table for its size, and the call would say so
    longest = zoo.call_defaults(request.model).get("max_sequence_length")
    if longest is not None:
        chosen["max_sequence_length"] = longest
    return chosen | guidance_arguments(pipe, request.guidance, request.negative)


def check_size(pipe: Any, arguments: dict[str, Any]) -> None:
    """Refuse a picture size that the stock pipeline would round in silence."""
    family = find(pipe)
    if family is None:
        return
    height, width = family.size(pipe, arguments)
    step = family.multiple(pipe)
    if height % step or width % step or min(height, width) <= 0:
        near = [max(step, round(side / step) * step) for side in (width, height)]
        raise DiffAccelError(
            f"The size {width}x{height} (width x height) does not fit {type(pipe).__name__}: both sides must be "
            f"multiples of {step}. The nearest valid size is {near[0]}x{near[1]}."
        )
    family.check_size(pipe, height, width)


def check_frames(pipe: Any, frames: int) -> None:
    """Refuse a number of frames that the stock pipeline would change in silence.

    A causal video VAE packs all frames but the first by its stride. That of CogVideoX also unpacks latent frames two at
    a time, and gives three frames too many when a pair is left over.
    """
    names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
    stride = next((found for name in names if (found := getattr(pipe, name, None))), 1)
    if type(getattr(pipe, "vae", None)).__name__ == "AutoencoderKLCogVideoX":
        stride *= pipe.vae.num_latent_frames_batch_size
    if (frames - 1) % stride:
        near = 1 + max(0, round((frames - 1) / stride)) * stride
        raise DiffAccelError(
            f"{frames} frames do not fit {type(pipe).__name__}: they must be one more than a multiple of {stride}. "
            f"The nearest valid number is {near}."
        )


def frame_rate(pipe: Any, request: Request) -> float:
    """Frames a second of a request's videos: the request's, else what the model was trained at, else 16."""
    family = find(pipe)
    return request.fps or (family.fps if family else _USUAL_FPS)


def guidance_arguments(pipe: Any, guidance: float | None, negative: str | None) -> dict[str, Any]:
    """How this pipeline is asked for guidance.

    A network with an embedded scale (FLUX.1-dev) takes ``guidance_scale`` and no negative prompt. One of the same kind
    without it takes ``true_cfg_scale``, which acts only when a negative prompt is given, so an empty one is. All others
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
    chosen: dict[str, Any] = {} if guidance is None else {key: guidance}
    if negative is not None:
        chosen["negative_prompt"] = negative
    elif key == "true_cfg_scale" and scale > 1:
        chosen["negative_prompt"] = ""
    return chosen
