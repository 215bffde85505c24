"""What keeps the context of a pipeline's calls in a ring while RollingContext is on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Self

from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.models.anyflow_far.engine import ChunkEngine, ChunkWindow, chunk_window
from diffaccel.models.next_frame.engine import backend_for
from diffaccel.modules.guard import attributes_of, restored
from diffaccel.modules.stand_in import StandIn, uncompiled

_REMOVED = "'rolling_context' was removed while a call of the pipeline was running. Remove it after the call."
PARTS = ("_forward_inference", "_forward_cache")  # of the network's forward: a chunk's velocity, and the context


class RollingCalls:
    """Keeps the context of a pipeline's calls until removal.

    Attributes:
            engine: memory and graphs of the latest call, which serve the next one of its kind.
        stats: of the latest call.
    """

    def __init__(self, window: ChunkWindow, capture: bool | None) -> None:
        self.window, self.capture = window, capture
        self.engine: ChunkEngine | None = None
        self.stats: dict[str, Any] | None = None
        self._network: Any = None  # of the running call
        self._is_begun = False

    @classmethod
    def of(cls, network: Any, window: int | None, chunk: int | None, capture: bool | None, what: str) -> Self:
        """Return what takes the evaluations of a network; ``what`` asks for it, in errors.

        Raises:
            DiffAccelError: for a window that does not fit the network, a network under ``torch.compile`` or without
                the parts that are taken, and where graphs are asked for without a CUDA device.
        """
        if uncompiled(network) is not network or getattr(network, "_compiled_call_impl", None) is not None:
            raise DiffAccelError(
                f"{what} records graphs of its own, and the network is under torch.compile. Compile its "
                "blocks alone: transformer.compile_repeated_blocks()."
            )
        sizes = chunk_window(network, window, chunk, what)
        if missing := [part for part in PARTS if not callable(getattr(network, part, None))]:
            raise DiffAccelError(
                f"{what} takes the parts {' and '.join(PARTS)} of the network's forward, and this version of "
                f"diffusers has no {missing[0]}. Install diffusers 0.42."
            )
        backend_for(capture, network.device)
        return cls(sizes, capture)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies have: no memory and no graphs, which belong to one network."""
        return {**vars(self), "engine": None, "_network": None}

    @contextlib.contextmanager
    def during(self, pipe: Any, label: Any) -> Iterator[None]:
        """Take the network's evaluations of one pipeline call."""
        outer = self.engine, self._network, self._is_begun
        is_within = isinstance(pipe.transformer, _Caller)  # a callback of a call draws another video
        network = self._network if is_within else pipe.transformer
        if network is None:
            raise DiffAccelError(_REMOVED)
        restores = [attributes_of(network, list(PARTS)), attributes_of(pipe, ["transformer"])]

        def restore() -> None:
            for part in restores:
                part()

        self._network, self._is_begun = network, False
        if is_within:
            self.engine = None  # the outer call's context stays as it is
        with restored(pipe, restore):
            vars(network)[PARTS[0]], vars(network)[PARTS[1]] = self._velocity, self._keep
            vars(pipe)["transformer"] = _Caller(network)
            try:
                yield
            finally:
                self._count()
                if is_within:
                    self.engine, self._network, self._is_begun = outer

    def _begun(self, latents: Tensor) -> ChunkEngine:
        """Return the memory of this call, which its first evaluation makes or clears."""
        if self._is_begun and self.engine is not None:
            return self.engine
        network = self._network
        if network is None:
            raise DiffAccelError(_REMOVED)
        batch, _, _, height, width = latents.shape
        weight = network.patch_embedding.weight
        if weight.device != latents.device:
            raise DiffAccelError(
                f"The network's weights are on {weight.device} and latents on {latents.device}: sequential and group "
                "offload move weights while the network runs, where no ring can stay. Use enable_model_cpu_offload()."
            )
        kept = self.engine
        if kept is not None:
            cache = kept.memory.cache
            same_sizes = (kept.shape[0], *kept.shape[-2:]) == (batch, height, width)
            if kept.model is not network or not same_sizes or (cache.dtype, cache.device) != (
                weight.dtype, weight.device
            ):  # fmt: skip
                kept = self.engine = None  # before memory for the other one is taken
        if kept is None:
            kept = self.engine = ChunkEngine(network, self.window, batch, height, width, self.capture)
        kept.begin()
        kept.evaluations, self._is_begun = 0, True
        return kept

    def _velocity(
        self, hidden_states: Tensor, chunk_partition: Any, timestep: Tensor, r_timestep: Tensor,
        encoder_hidden_states: Tensor, encoder_hidden_states_image: Any = None, return_dict: bool = True,
        kv_cache: Any = None, kv_cache_flag: Any = None,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """Answer the network's evaluation of a chunk, which the pipeline asks for as a tuple."""
        engine = self._begun(hidden_states)
        text = _for_rows(encoder_hidden_states, len(hidden_states))
        velocity = engine.velocity(hidden_states, timestep[:, 0], r_timestep[:, 0], text)
        return velocity.clone(), kv_cache

    def _keep(
        self, hidden_states: Tensor, chunk_partition: Any, timestep: Tensor, r_timestep: Tensor,
        encoder_hidden_states: Tensor, encoder_hidden_states_image: Any = None, attention_mask: Any = None,
        return_dict: bool = True, clean_hidden_states: Any = None, clean_timestep: Any = None, kv_cache: Any = None,
        kv_cache_flag: Any = None,
    ) -> tuple[None, Any]:  # fmt: skip
        """Answer the network's evaluation of the whole context: of that, only the latest chunk is new."""
        engine = self._begun(hidden_states)
        engine.keep(hidden_states[:, -chunk_partition[-1] :], _for_rows(encoder_hidden_states, len(hidden_states)))
        return None, kv_cache

    def _count(self) -> None:
        """Note what the call that ends has cost."""
        if (engine := self.engine) is not None:
            self.stats = {
                "context_frames": engine.count, "evaluations": engine.evaluations, "bytes": engine.bytes,
                "captures": engine.captures, "window": self.window.far + self.window.whole,
            }  # fmt: skip

    def remove(self) -> None:
        """Free the memory; between calls nothing else is changed."""
        self.engine = self._network = None

    def report(self) -> dict[str, Any] | None:
        """Return the counts of the latest call."""
        return self.stats


def _for_rows(text: Tensor, rows: int) -> Tensor:
    """Return embedded prompts ``(B, L, channels)`` for all rows: one prompt counts for all, as in the stock call."""
    return text.expand(rows, -1, -1) if text.shape[0] == 1 else text


class _NoLayers:
    """A network's config for a pipeline that takes memory for each layer: it sees none."""

    def __init__(self, config: Any) -> None:
        self._config, self.num_layers = config, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class _Caller(StandIn):
    """The network as the pipeline's call sees it: without layers to take memory for, and without a mask to make."""

    def __init__(self, network: Any) -> None:
        super().__init__(network, network)
        self.config = _NoLayers(network.config)

    def build_attention_mask(self, **_: Any) -> None:
        """Return no mask: nothing is hidden in the ring."""
