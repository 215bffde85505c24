"""What to generate: a request, checked before anything is loaded, and what it means for one pipeline.

Image ``id`` of a request belongs to prompt ``id // num`` and is drawn from a CPU generator seeded with ``seed + id``:
it depends on its own seed alone. Pipelines differ in what they draw from (text, classes, nothing), whether they make
video, and how guidance is asked for; all of it is read from the pipeline's signature and its network's config.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffaccel import record, zoo
from diffaccel.errors import DiffAccelError, unknown
from diffaccel.families import find, network

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
_USUAL_FPS = 16.0
_BINNED = (32, 64, 128, 256)  # latent sizes for which PixArt has a table of aspect ratios
WAY = ("model", "methods", "steps", "size", "guidance", "negative")  # settings that say how, not what, is drawn
_DECIDES = ("diffaccel", "torch", "diffusers", "transformers")  # versions that may change bits


@dataclass(frozen=True)
class Item:
    """One image or video: its number, its prompt or class (None where nothing is asked for), its generator's seed."""

    id: int
    prompt: str | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that decides the pixels of a run.

    Args:
        prompts: what to draw; ``num`` images of each. Empty for a pipeline that draws from nothing, and for one that
            draws from classes, numbers or names of them.
        classes: the same for a pipeline that draws from classes, and an error for any other.
        model: a name of the zoo, a local folder, or ``owner/name`` on the hub.
        seed: image ``id`` uses ``seed + id``.
        methods: configs to accelerate the pipeline with; none is the plain pipeline.
        steps, size, guidance, negative: None leaves the model's own default; ``size`` is (height, width) in pixels.
        frames, fps: of a video; None leaves the model's own.
        batch: images in one pipeline call. It belongs to the result, since kernels round by shape.
        dtype: "auto" is float32 on a CPU and bfloat16 elsewhere.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        threads: of a CPU run; 0 leaves torch's own number. They change how sums are split, and so the last bits.
        latents: keep what the decoder was given as well, a safetensors file an image.
    """

    prompts: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    model: str = zoo.DEFAULT
    num: int = 1
    seed: int = 0
    methods: tuple[Any, ...] = ()
    steps: int | None = None
    size: tuple[int, int] | None = None
    guidance: float | None = None
    negative: str | None = None
    frames: int | None = None
    fps: float | None = None
    batch: int = 1
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 0
    latents: bool = False

    def __post_init__(self) -> None:
        for name in ("prompts", "classes"):
            if isinstance(getattr(self, name), str):
                raise DiffAccelError(f"{name} is one text; it must be a tuple of texts. Write ({name[:-1]},).")
        if self.prompts and self.classes:
            raise DiffAccelError(f"Got a prompt and a class, '{self.prompts[0]}' and '{self.classes[0]}'. Give one.")
        for number, prompt in enumerate(self.prompts, 1):
            if not prompt.strip():
                raise DiffAccelError(f"Prompt {number} is empty. Say what to draw, or leave it out.")
        for name, least in (("num", 1), ("batch", 1), ("seed", 0), ("threads", 0), ("steps", 1), ("frames", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise DiffAccelError(f"{name} is {value}; it must be at least {least}.")
        if self.seed + len(self) > 2**63:
            raise DiffAccelError(f"seed is {self.seed}; it must be below 2**63 for every image.")
        if self.guidance is not None and not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise DiffAccelError(f"guidance is {self.guidance}; it must be 0 or more, and 1 switches it off.")
        if self.fps is not None and not (math.isfinite(self.fps) and 0 < self.fps <= 1000):
            raise DiffAccelError(f"fps is {self.fps}; it must be above 0 and at most 1000 frames a second.")
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)

    @property
    def subjects(self) -> tuple[str | None, ...]:
        """What is drawn: the prompts or classes, or one None."""
        return self.prompts or self.classes or (None,)

    def __len__(self) -> int:
        return len(self.subjects) * self.num

    def items(self) -> list[Item]:
        """The images in the order of their ids: all of the first prompt, then all of the second."""
        return [Item(i, self.subjects[i // self.num], self.seed + i) for i in range(len(self))]

    def chunks(self) -> list[list[Item]]:
        """Consecutive images that share a pipeline call; they are the same however many processes share the run."""
        items = self.items()
        return [items[i : i + self.batch] for i in range(0, len(items), self.batch)]

    def with_model_defaults(self) -> Request:
        """The request with what a zoo model's card recommends where nothing was asked for."""
        if self.model not in zoo.names():
            return self
        defaults = zoo.call_defaults(self.model)
        wanted: dict[str, Any] = {"steps": defaults.get("num_inference_steps")}
        wanted["guidance"] = defaults.get("true_cfg_scale", defaults.get("guidance_scale"))
        wanted["size"] = (defaults["height"], defaults["width"]) if {"height", "width"} <= defaults.keys() else None
        wanted = {key: value for key, value in wanted.items() if getattr(self, key) is None}
        return replace(self, **wanted)

    def settings(self, digest: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """The request as JSON, with the model's content and the versions that decide bits as well."""
        import torch

        versions = {name: version for name, version in record.versions().items() if name in _DECIDES}
        model = Path(self.model).name if Path(self.model).is_dir() and self.model not in zoo.names() else self.model
        settings: dict[str, Any] = {
            "model": model,
            "model_digest": digest,
            "prompts": list(self.prompts),
            "num": self.num,
            "seed": self.seed,
            "methods": [config.to_dict() for config in self.methods],
            "steps": self.steps,
            "size": list(self.size) if self.size else None,
            "guidance": self.guidance,
            "negative": self.negative,
            "batch": self.batch,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,
            "versions": versions,
        }
        optional = {"classes": self.classes, "frames": self.frames, "fps": self.fps, "latents": self.latents}
        settings |= {name: value for name, value in optional.items() if value}  # absent: older runs stay the same runs
        if device.type == "cpu":
            settings["threads"] = self.threads or torch.get_num_threads()
        return json.loads(json.dumps(settings))  # as it will be read back: tuples become lists


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
