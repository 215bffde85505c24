"""NFD: several frames of a world model's video in one round, drafted while an action is held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from diffaccel.config import Config, Level, Machine, Touches
from diffaccel.errors import DiffAccelError

if TYPE_CHECKING:
    from diffaccel.samplers.nfd.drafting import Drafting

PIPELINE = "NextFramePipeline"
PAPER_DRAFTS = 2  # the paper's accessible text says that N is fixed, and not what it is; two is the least that drafts


@dataclass(frozen=True, kw_only=True)
class NFD(Config):
    """Speculative frames for a :class:`NextFramePipeline`: N frames a round under a held action; the right ones stay.

    Frames of a round are denoised together, each seeing those before it; the first is always right, and the others are
    kept while the action stays as guessed. With N = 1 and without graphs the video is the pipeline's own to the bit.
    With N > 1 it is another one: drafts see their predecessors noisy. Where actions repeat with probability p, a round
    keeps ``(1 - p^N) / (1 - p)`` frames.

    Args:
        draft: frames N of a round; "auto" measures the cost of each N and follows the share of held actions.
        capture: record rounds as CUDA graphs; None where the model is on a CUDA device.
        latency: longest time in milliseconds from an action to its frame, for "auto"; rounds then run step by step.
        merged: whether a frame's keys and values are written by the next round's first evaluation, or by one of their
            own, as published.
    """

    name: ClassVar[str] = "nfd"
    touches: ClassVar[Touches] = "blocks"
    citation: ClassVar[str] = "Playing with Transformer at 30+ FPS via Next-Frame Diffusion, arXiv 2506.01380"
    command: ClassVar[str] = "diffaccel rollout MODEL_FOLDER --actions hold --frames 500 --draft auto"
    conflicts: ClassVar[tuple[str, ...]] = (
        "euler", "heun", "dpmpp2m", "ancestral", "rbf", "bon", "drafts", "smc", "svdd", "code", "sop", "bottleneck",
        "superdiff", "scheduler", "spectrum", "seacache", "firstblock", "taylorseer", "diffusers_cache", "cache_dit",
        "fused_blocks", "rolling_context",
    )  # fmt: skip

    draft: int | Literal["auto"] = "auto"
    capture: bool | None = None
    latency: float | None = None
    merged: bool = True

    @classmethod
    def paper(cls) -> Self:
        """Return the published form: a fixed number of held-action drafts, and an evaluation that writes frames.

        The published model is distilled to a consistency model of four steps: call with ``num_inference_steps=4`` and a
        ``FlowMatchLCMScheduler``.
        """
        return cls(draft=PAPER_DRAFTS, merged=False)

    @classmethod
    def ways(cls) -> tuple[Self, ...]:
        """Return our form and the published one."""
        return cls(), cls.paper()

    @classmethod
    def support(cls, machine: Machine) -> tuple[Level, str]:
        """Return "fast" on CUDA devices, where a round is one graph; elsewhere it runs, and gains little."""
        if machine.device == "cuda":
            return "fast", "records rounds as CUDA graphs; drafts gain where one frame leaves the GPU idle"
        return "slow", f"works on {machine.device} without graphs; drafts gain little where one frame fills the machine"

    @classmethod
    def fits(cls, pipeline: str, family: Any) -> tuple[bool | None, str]:
        """Return whether a pipeline is a world model."""
        if pipeline == PIPELINE:
            return True, "drafts its frames"
        return False, "drafts the frames of a world model"

    def validate(self) -> None:
        if self.draft != "auto" and self.draft < 1:
            raise DiffAccelError(f"NFD.draft is {self.draft}; it must be 'auto' or a whole number, 1 or more.")
        if self.latency is not None and self.latency <= 0:
            raise DiffAccelError(
                f"NFD.latency is {self.latency}; it must be a number of milliseconds above 0, or None."
            )

    def apply(self, pipe: Any) -> Drafting:
        """Let a pipeline's calls draft.

        Raises:
            DiffAccelError: for a pipeline that is no world model, for more drafts than its window has room for, and
                where graphs are asked for without a CUDA device.
        """
        if not any(cls.__name__ == PIPELINE for cls in type(pipe).__mro__):
            raise DiffAccelError(
                f"'{self.name}' drafts the frames of a world model, and {type(pipe).__name__} is none. Pass a "
                "NextFramePipeline; a video that is drawn chunk by chunk without actions takes 'rolling_context'."
            )
        from diffaccel.samplers.nfd.drafting import Drafting  # with it come the networks of diffusers

        options = {name: getattr(self, name) for name in ("draft", "capture", "latency", "merged")}
        handle = Drafting(pipe, options)
        handle.sampler(4, (0,))  # its errors come now, and not in a call
        pipe.draw_frames = handle
        return handle
