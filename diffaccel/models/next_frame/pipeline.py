"""A diffusers pipeline for world models: frames and actions in, the frames that follow out (arXiv 2506.01380)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from diffusers.utils import BaseOutput
from torch import Tensor

from diffaccel.errors import DiffAccelError, unknown
from diffaccel.models.next_frame import beginnings
from diffaccel.models.next_frame.beginnings import Beginning
from diffaccel.models.next_frame.engine import FrameEngine, FrameSettings, check_seeds
from diffaccel.models.next_frame.inputs import check_actions, check_prompt
from diffaccel.models.next_frame.levels import StepRule
from diffaccel.models.next_frame.transformer import NextFrameTransformer

RULES: dict[type, StepRule] = {FlowMatchEulerDiscreteScheduler: "euler", FlowMatchLCMScheduler: "consistency"}


@dataclass
class NextFrameOutput(BaseOutput):
    """Result of a call.

    Attributes:
        frames: ``(B, T, C, H, W)`` in [-1, 1], or uint8 arrays ``(B, T, H, W, C)`` for ``output_type="np"``.
        stats: what a method on the pipeline counted, or None.
    """

    frames: Any
    stats: dict[str, Any] | None = None


class FrameSource(Protocol):
    """Draws the frames of a call; what a method puts in place of the pipeline's own rounds of one frame."""

    def __call__(
        self, pipe: NextFramePipeline, frames: Tensor, given: Tensor, actions: Tensor, steps: int, seeds: Sequence[int]
    ) -> tuple[Tensor, dict[str, Any] | None]:
        """Return the frames ``(B, T, C, H, W)`` that follow, and counts or None.

        Args:
            pipe: the pipeline.
            frames: ``(B, P, C, H, W)`` that the video begins with.
            given: ``(B, P)``, the actions that produced them.
            actions: ``(B, T)``, of the frames to draw.
            steps: evaluations of a frame.
            seeds: of each row's noise.
        """


def draw_plainly(
    pipe: NextFramePipeline, frames: Tensor, given: Tensor, actions: Tensor, steps: int, seeds: Sequence[int]
) -> tuple[Tensor, dict[str, Any] | None]:
    """Draw one frame a round; see :class:`FrameSource`."""
    engine = FrameEngine(pipe.transformer, pipe.settings(steps), seeds=seeds)
    engine.reset(frames, given)
    drawn = []
    for action in actions.split(1, 1):
        drawn.append(engine.draft(action).clone())
        engine.keep(1, action)
    return torch.cat(drawn, 1), None


class NextFramePipeline(DiffusionPipeline):
    """Draws a video frame by frame, each under an action.

    Args:
        transformer: the world model.
        scheduler: gives the shift of the noise levels, and by its class the rule of a step:
            ``FlowMatchEulerDiscreteScheduler``, or ``FlowMatchLCMScheduler`` for a model distilled to consistency.
        context_noise: level of the noise on frames that are looked back at.
    """

    _optional_components = ("scheduler",)
    rounds_by = "nfd"  # the method that changes how frames are drawn: samplers of one sample cannot

    def __init__(self, transformer: NextFrameTransformer, scheduler: Any = None, context_noise: float = 0.0) -> None:
        super().__init__()
        scheduler = FlowMatchEulerDiscreteScheduler() if scheduler is None else scheduler
        if type(scheduler) not in RULES:
            known = " or ".join(kind.__name__ for kind in RULES)
            raise DiffAccelError(
                f"The scheduler is a {type(scheduler).__name__}, whose levels are not the sigmas of flow matching. "
                f"Pass a {known}."
            )
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(context_noise=context_noise)
        self.draw_frames: FrameSource = draw_plainly
        self.beginnings: list[Beginning] = []
        self.settings(1)  # its errors come now, and not in a call

    @classmethod
    def from_folder(cls, folder: str | Path, **options: Any) -> NextFramePipeline:
        """Load what ``save_pretrained`` of this pipeline, or of its network alone, wrote into a folder.

        Raises:
            DiffAccelError: for a folder with another model, or with none, for one whose weights are not those of its
                config or not finite, and for one that was saved quantized where the quantizer is not entered into
                diffusers, as ``diffaccel.load`` does.
        """
        folder = Path(folder)
        index, config_file = folder / "model_index.json", folder / "config.json"
        if not index.is_file() and not config_file.is_file():
            raise DiffAccelError(
                f"'{folder}' holds neither model_index.json nor config.json. Give a folder that save_pretrained of a "
                "NextFrameTransformer or a NextFramePipeline wrote."
            )
        parts = index if index.is_file() else config_file
        kind = json.loads(parts.read_text(encoding="utf-8")).get("_class_name")
        if kind not in (cls.__name__, NextFrameTransformer.__name__):
            raise DiffAccelError(f"'{folder}' holds a {kind}, which is no world model. Give a {cls.__name__}.")
        _check_quantization(folder, config_file if parts is config_file else folder / "transformer" / "config.json")
        if parts is config_file:
            pipe = cls(_network(folder, options))
        else:
            from diffusers import SchedulerMixin

            config = cls.load_config(folder)
            transformer = _network(folder / "transformer", options)
            kinds = {kind.__name__: kind for kind in RULES}
            name = config["scheduler"][1]
            if name not in kinds:
                raise unknown("scheduler of a world model", name, kinds)
            loader: type[SchedulerMixin] = kinds[name]
            pipe = cls(transformer, loader.from_pretrained(folder / "scheduler"), config.get("context_noise", 0.0))
        pipe.beginnings = beginnings.read(folder, pipe.transformer.frame_shape)
        return pipe

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save as any pipeline, and what its videos begin with."""
        super().save_pretrained(save_directory, *args, **kwargs)
        beginnings.write_all(Path(save_directory), self.beginnings)

    def settings(self, steps: int, capture: bool | None = False) -> FrameSettings:
        """Return how a frame is drawn in this many steps."""
        return FrameSettings(
            steps=steps, context_noise=self.config.context_noise, capture=capture,
            shift=self.scheduler.config.shift, rule=RULES[type(self.scheduler)],
        )  # fmt: skip

    @torch.no_grad()
    def __call__(
        self,
        actions: Any,
        frames: Any = None,
        frame_actions: Any = None,
        num_inference_steps: int = 4,
        seeds: int | Sequence[int] = 0,
        truncate: bool = False,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> Any:
        """Draw the frames that follow, one for each action.

        Args:
            actions: ``(T,)`` or ``(B, T)`` integers from 0 to ``num_actions - 1``.
            frames: ``(P, C, H, W)`` or ``(B, P, C, H, W)`` floats in [-1, 1] that the video begins with, a tensor or an
                array; None for a grey one.
            frame_actions: the actions that produced these; None where they are unknown.
            num_inference_steps: evaluations of a frame.
            seeds: of the noise, one for each row, or the first row's.
            truncate: whether of a beginning longer than the window the last frames are taken.
            output_type: "pt", or "np" for uint8 arrays.
            return_dict: whether the result is a :class:`NextFrameOutput`, or a tuple.

        Raises:
            DiffAccelError: for frames, actions or seeds that do not fit.
        """
        if output_type not in ("pt", "np"):
            raise unknown("output_type", str(output_type), ("pt", "np"))
        model = self.transformer
        if model is None:
            raise DiffAccelError("The pipeline has no transformer. Make it with a NextFrameTransformer.")
        steps: Any = num_inference_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise DiffAccelError(f"num_inference_steps is {steps!r}; it must be a whole number, 1 or more.")
        actions = check_actions(actions, model.null_action, "actions")
        prompt, given = check_prompt(model, frames, frame_actions, model.config.window, truncate)
        if len(prompt) not in (1, len(actions)):
            raise DiffAccelError(
                f"frames are of {len(prompt)} videos and actions of {len(actions)}. Give one beginning for all, or one "
                "for each row of actions."
            )
        prompt, given = prompt.expand(len(actions), -1, -1, -1, -1), given.expand(len(actions), -1)
        rows: Any = seeds
        if isinstance(seeds, int) and not isinstance(seeds, bool):
            rows = range(seeds, seeds + len(actions))
        check_seeds(rows)
        if len(rows) != len(actions):
            raise DiffAccelError(f"Got {len(rows)} seeds for {len(actions)} videos. Give one for each.")
        drawn, stats = self.draw_frames(self, prompt, given, actions, num_inference_steps, tuple(rows))
        result = to_uint8(drawn).cpu().numpy() if output_type == "np" else drawn
        return NextFrameOutput(frames=result, stats=stats) if return_dict else (result,)


def _network(folder: Path, options: dict[str, Any]) -> NextFrameTransformer:
    """Return the network of a folder; a weight that it lacks, has too many of or that is not finite is an error."""
    model, told = NextFrameTransformer.from_pretrained(folder, output_loading_info=True, **options)
    floats = ((name, p) for name, p in model.named_parameters() if p.is_floating_point() and not p.is_meta)
    for what, names in (
        ("the file lacks the weight", told["missing_keys"]),
        ("the config has no place for the weight", told["unexpected_keys"]),
        ("NaN or infinite values are in the weight", [name for name, p in floats if not bool(p.isfinite().all())]),
    ):
        if names:
            raise DiffAccelError(f"'{folder}' is damaged, or was changed: {what} '{names[0]}'. Copy it again.")
    return model


def _check_quantization(folder: Path, config_file: Path) -> None:
    """Raise for a network that was saved quantized in a way that diffusers does not know yet."""
    from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None and str(method) not in AUTO_QUANTIZER_MAPPING:
        raise DiffAccelError(
            f"'{folder}' holds a model that was saved quantized ('{method}'), which from_folder alone does not open. "
            f"Use diffaccel.load('{folder}')."
        )


def to_uint8(frames: Tensor) -> Tensor:
    """Turn frames ``(..., C, H, W)`` in [-1, 1] into bytes ``(..., H, W, C)``."""
    return ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1)
