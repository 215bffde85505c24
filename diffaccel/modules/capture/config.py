"""Capture: the networks of a pipeline as CUDA graphs, equal to the bit to the networks as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from diffaccel import families
from diffaccel.config import Config, Level, Machine, Touches
from diffaccel.errors import DiffAccelError
from diffaccel.modules.block_stack import cached_blocks
from diffaccel.modules.capture import state
from diffaccel.modules.capture.arenas import Store
from diffaccel.modules.capture.graphs import BACKENDS
from diffaccel.modules.capture.interceptor import Interceptor
from diffaccel.modules.stand_in import uncompiled

MemoryFormat = Literal["preserve", "channels_last"]


@dataclass(frozen=True, kw_only=True)
class Capture(Config):
    """Record what a network launches once for each kind of call, and launch it again as a whole: one CUDA graph.

    A kind of call is the shapes, strides and dtypes of its tensors, the structure and numbers of its other arguments,
    and the settings of torch that choose kernels. Its first call runs as ever, its second is recorded and the graph
    checked against it to the bit, the others replay the graph. Inputs are copied in, results copied out. Whatever
    changes in the network (adapters, their scales, weights moved, hooks, processors) is noticed before the next call,
    and its graphs are recorded again; what cannot be in a graph runs without one, and the summary says why. Under a
    step cache on a transformer the blocks are captured one by one, below the cache; under one on a UNet the whole.

    Args:
        memory_format: "channels_last" stores the weights of 2-D convolutions with channels last, until removal. The
            result equals to the bit that of the network in this format, and differs in rounding from other formats.
        cudnn_benchmark: let cuDNN time its algorithms for each new shape, and take the fastest.
        budget_gib: maximum GiB of device memory that graphs hold; None for half of the device. Over it, graphs that
            were not used for longest are freed.
    """

    name: ClassVar[str] = "capture"
    touches: ClassVar[Touches] = "graphs"
    conflicts: ClassVar[tuple[str, ...]] = ("diffusers_cache",)
    citation: ClassVar[str] = "Nimble, arXiv 2012.02732"

    memory_format: MemoryFormat = "preserve"
    cudnn_benchmark: bool = False
    budget_gib: float | None = None

    @classmethod
    def paper(cls) -> Self:
        """Return the published form, on one stream: kernels as the network launches them."""
        return cls()

    @classmethod
    def support(cls, machine: Machine) -> tuple[Level, str]:
        """Return "fast" on CUDA devices, which alone have graphs."""
        if machine.device != "cuda":
            return "unsupported", f"records CUDA graphs, and the best device here is {machine.device}"
        return "fast", "one launch a network call; most where a network launches many small kernels"

    @classmethod
    def fits(cls, pipeline: str, family: Any) -> tuple[bool | None, str]:
        """Return whether the networks of a pipeline can be captured."""
        if family is None:
            return None, "captures its transformer or UNet, unless that waits for the device or draws random numbers"
        return True, f"captures its {' and '.join((family.denoiser, *family.other_denoisers))}"

    def validate(self) -> None:
        if self.budget_gib is not None and self.budget_gib <= 0:
            raise DiffAccelError(f"Capture.budget_gib is {self.budget_gib}; it must be positive, or None.")

    def apply(self, pipe: Any) -> Captured:
        """Capture every network of a pipeline.

        Raises:
            DiffAccelError: for a pipeline without a network that is known, one that is not on a CUDA device, and one
                whose weights move, are sharded, or are captured already.
        """
        networks = families.networks(pipe)
        if not networks:
            raise DiffAccelError(
                f"'{self.name}' found no network in {type(pipe).__name__}. Pass a pipeline with a transformer or UNet."
            )
        for network in networks:
            self._check(network)
        budget = None if self.budget_gib is None else int(self.budget_gib * 2**30)
        captured = Captured(Store(budget, self.cudnn_benchmark))
        try:
            for network in networks:
                captured.add(network, self.memory_format == "channels_last")
        except BaseException:  # also an interrupt
            captured.remove()
            raise
        return captured

    def _check(self, network: Any) -> None:
        state.check(network)
        weight, kind = state.first_weight(network), type(uncompiled(network)).__name__
        device = "cpu" if weight is None else weight.device.type
        if device not in BACKENDS:
            raise DiffAccelError(
                f"'{self.name}' records CUDA graphs, and {kind} is on {device}. Move the pipeline first, by "
                f"pipe.to('cuda'), or leave out '{self.name}'."
            )
        if any(isinstance(vars(module).get(name), Interceptor) for module in network.modules() for name in _PLACES):
            raise DiffAccelError(
                f"{kind} is captured already, through another pipeline that shares it. Use that one, or "
                "diffaccel.remove it first."
            )
        is_wrapped = network is not uncompiled(network)
        is_compiled = is_wrapped or vars(network).get("_compiled_call_impl") is not None
        if is_compiled and (_parts_of(network) != [network] or (is_wrapped and cached_blocks(network))):
            raise DiffAccelError(
                f"{kind} is compiled as a whole and has a step cache on its blocks, so that '{self.name}' finds no "
                "block to record. Compile its blocks instead, by compile_repeated_blocks()."
            )
        if self.memory_format == "channels_last" and not _convolutions(uncompiled(network)):
            raise DiffAccelError(
                f"memory_format='channels_last' is for networks of 2-D convolutions, and {kind} has none. Leave it out."
            )


_PLACES = ("forward", "_compiled_call_impl")


def _parts_of(network: nn.Module) -> list[nn.Module]:
    """Return what is captured of a network: the blocks between which a step cache decides, or the whole."""
    blocks = cached_blocks(network)
    return blocks if blocks and uncompiled(network) not in blocks else [network]


def _convolutions(network: nn.Module) -> list[Tensor]:
    return [weight for weight in network.parameters() if weight.ndim == 4]


class ChannelsLast:
    """The weights of a network's 2-D convolutions, stored with channels last from :meth:`put_on` until removal."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.strides = {name: p.stride() for name, p in network.named_parameters() if p.ndim == 4}

    def put_on(self) -> None:
        """Store them with channels last."""
        self.network.to(memory_format=torch.channels_last)

    def remove(self) -> None:
        """Store them as before, to the bit; weights that others have replaced since stay."""
        weights = dict(self.network.named_parameters())
        for name, strides in self.strides.items():
            weight = weights.get(name)
            if weight is not None and weight.ndim == 4 and weight.stride() != strides:
                before = torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device=weight.device)
                weight.data = before.copy_(weight.detach())
        self.strides = {}


class Captured:
    """Takes the graphs off all networks of a pipeline again, and tells about them."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.interceptors: list[Interceptor] = []
        self.formats: list[ChannelsLast] = []

    def add(self, network: Any, channels_last: bool) -> None:
        """Capture one more network."""
        if channels_last:
            self.formats.append(ChannelsLast(uncompiled(network)))
            self.formats[-1].put_on()
        for module in _parts_of(network):
            self.interceptors.append(Interceptor.of(module, self.store))
            self.interceptors[-1].put_on()

    def remove(self) -> None:
        """Free all graphs and restore networks and memory formats; may be called twice."""
        for interceptor in reversed(self.interceptors):
            interceptor.remove()
        self.store.clear()
        for weights in self.formats:
            weights.remove()

    def report(self) -> dict[str, Any]:
        """Return graphs, their bytes, replays, other calls by reason, and graphs given up by reason; JSON-ready."""
        account = self.store.account
        modules = sorted({interceptor.unit.name for interceptor in self.interceptors})
        notes = sorted(account.notes)
        for interceptor in self.interceptors:
            if interceptor.is_bypassed():
                notes.append(f"{interceptor.unit.name} was compiled later, which bypasses its graphs: accelerate again")
        return {
            "modules": modules,
            "graphs": self.store.graphs,
            "bytes": self.store.bytes,
            "captures": account.captures,
            "replays": account.replays,
            "eager_calls": {reason: count for reason, count in account.eager.items() if count},
            "dropped": {reason: count for reason, count in account.dropped.items() if count},
            "notes": sorted(set(notes)),
        }
