"""The context of a video that is drawn chunk by chunk, in a ring: nothing computed twice, and memory that never grows.

A chunk of frames is denoised while it looks back at the latest chunks at full resolution and at earlier ones compressed
(FAR, arXiv 2503.19325). Compressed frames see compressed ones alone, so their keys and values stay right once written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from diffaccel.config import Config, Level, Machine, Touches
from diffaccel.errors import DiffAccelError

if TYPE_CHECKING:
    from diffaccel.samplers.caches.rolling_calls import RollingCalls

PIPELINE = "AnyFlowFARPipeline"


@dataclass(frozen=True, kw_only=True)
class RollingContext(Config):
    """A ring for the context of diffusers' ``AnyFlowFARPipeline``: the same frames, and longer videos.

    The pipeline writes keys and values of its whole context anew after every chunk, in memory that grows with the
    video, and makes a mask of all its tokens by all. Here what stays right is kept: a chunk that leaves the full
    resolution is compressed once, and only the latest chunks are written anew, without any mask. While the window holds
    the whole video, results equal the pipeline's up to rounding. Beyond, the oldest frames leave the ring; times count
    from a frame that moves along. A prompt that a callback changes counts from then on, and not for earlier frames.

    Args:
        window: maximum number of latent frames that a chunk looks back at; None for as many as the last chunk of the
            network's own video has behind it (19 for 21 latent frames in chunks of 1, 3, 3, ..., 2). The ring grows
            where a call's chunks are shorter, and leave fewer frames at full resolution.
        chunk: maximum number of latent frames of a chunk; None for the network's own (3).
        capture: record evaluations as CUDA graphs once the ring is full; None where the model is on a CUDA device.
    """

    name: ClassVar[str] = "rolling_context"
    touches: ClassVar[Touches] = "blocks"
    citation: ClassVar[str] = "Long-Context Autoregressive Video Modeling with FAR, arXiv 2503.19325; 2605.13724"
    command: ClassVar[str] = 'diffaccel sample "a cat" --model ANYFLOW_FOLDER --frames 81 --method rolling_context'
    watches_calls: ClassVar[bool] = True
    conflicts: ClassVar[tuple[str, ...]] = (
        "euler", "heun", "dpmpp2m", "ancestral", "rbf", "bon", "drafts", "smc", "svdd", "code", "sop", "bottleneck",
        "superdiff", "scheduler", "spectrum", "seacache", "firstblock", "taylorseer", "diffusers_cache", "cache_dit",
        "fused_blocks", "nfd", "tib", "capture",
    )  # fmt: skip

    window: int | None = None
    chunk: int | None = None
    capture: bool | None = None

    @classmethod
    def support(cls, machine: Machine) -> tuple[Level, str]:
        """Return "fast": it leaves work out on every machine."""
        return "fast", "writes each part of the context once; graphs on CUDA devices"

    @classmethod
    def fits(cls, pipeline: str, family: Any) -> tuple[bool | None, str]:
        """Return whether a pipeline draws its video chunk by chunk."""
        if pipeline == PIPELINE:
            return True, "keeps its context in a ring"
        return False, f"keeps the context of a video drawn chunk by chunk, by {PIPELINE}"

    def validate(self) -> None:
        for name in ("window", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DiffAccelError(f"RollingContext.{name} is {value}; it must be 1 or more, or None.")

    def apply(self, pipe: Any) -> RollingCalls:
        """Let a pipeline's calls keep their context in a ring.

        Raises:
            DiffAccelError: for another pipeline, a window that does not fit its network, a network under
                ``torch.compile``, and where graphs are asked for without a CUDA device.
        """
        if not any(cls.__name__ == PIPELINE for cls in type(pipe).__mro__):
            raise DiffAccelError(
                f"'{self.name}' keeps the context of a video drawn chunk by chunk, by {PIPELINE}, and "
                f"{type(pipe).__name__} draws none. Pass diffusers' {PIPELINE}."
            )
        from diffaccel.samplers.caches.rolling_calls import RollingCalls  # with it come the networks of diffusers

        return RollingCalls.of(pipe.transformer, self.window, self.chunk, self.capture, f"'{self.name}'")
