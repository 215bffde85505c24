"""FusedBlocks: the blocks of a transformer in fewer launches and passes over memory, equal to the bit."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Literal, Self

from torch import nn

from diffaccel import families
from diffaccel.config import Config, Level, Machine, Touches
from diffaccel.errors import DiffAccelError
from diffaccel.modules.fused.forward import BlockKind, Forward
from diffaccel.modules.fused.place import innermost
from diffaccel.modules.fused.plain_parts import is_own
from diffaccel.modules.stand_in import uncompiled

Rounding = Literal["exact", "folded"]
MODULES = {  # by the network's class
    "FluxTransformer2DModel": "diffaccel.modules.fused.flux",
    "SD3Transformer2DModel": "diffaccel.modules.fused.sd3",
    "WanTransformer3DModel": "diffaccel.modules.fused.wan",
}


@dataclass(frozen=True, kw_only=True)
class FusedBlocks(Config):
    """Run what stands between the products of a transformer's blocks as few passes over memory, without a compiler.

    Modulation, gated sums, norms of heads with rotation and the joining of text and image tokens are one launch each,
    and streams are joined where they lie. Each intermediate is rounded as torch rounds it, so that the result equals
    that of the network to the bit. Where all layers that read a tensor take 8-bit codes (:class:`W8A8`), norm,
    modulation and quantization are one pass, and its codes are shared; then a norm may differ by one rounding from
    that of the layers alone.

    A block whose parts are changed (other attention processors, hooks, gradients) runs its own forward, and the
    summary says why; adapters stay as they are. What ``torch.compile`` compiles runs as without this.

    Args:
        rounding: "exact" as described; "folded" also takes the norm into the pass and rounds once at its end, which is
            faster and not equal to the bit.
    """

    name: ClassVar[str] = "fused_blocks"
    touches: ClassVar[Touches] = "blocks"
    conflicts: ClassVar[tuple[str, ...]] = ("diffusers_cache", "cache_dit")  # which replace the same forwards
    citation: ClassVar[str] = "FlashAttention, arXiv 2205.14135 (passes over memory); AdaLN, arXiv 2212.09748"

    rounding: Rounding = "exact"

    @classmethod
    def paper(cls) -> Self:
        """Return the default: fusing is published as equal to what it fuses."""
        return cls()

    @classmethod
    def support(cls, machine: Machine) -> tuple[Level, str]:
        """Return what the kernels need: Triton and a CUDA device of capability 8.0."""
        if machine.device == "cuda" and machine.triton and (machine.capability or (0, 0)) >= (8, 0):
            return "fast", "kernels for this device; most without torch.compile"
        return "slow", "torch's own operations on this device: no faster than without"

    @classmethod
    def fits(cls, pipeline: str, family: Any) -> tuple[bool | None, str]:
        """Return whether the blocks of a pipeline's networks are known."""
        if family is None:
            return None, "needs a network whose blocks are known"
        if pipeline.startswith(("Flux", "StableDiffusion3", "Wan")):
            return True, "fuses its transformer blocks"
        return False, f"knows the blocks of {_known()}"

    def apply(self, pipe: Any) -> FusedNetworks:
        """Put a pass-saving forward on every known block of a pipeline's networks.

        Raises:
            DiffAccelError: for a pipeline without such blocks, for blocks of another version of diffusers, and for
                blocks whose forward another tool has replaced, as caches do; below hooks of offloading it is put on.
        """
        fused = FusedNetworks([])
        try:
            for network in families.networks(pipe):
                fused.forwards += self._put_on(uncompiled(network))
        except BaseException:  # also an interrupt
            fused.remove()
            raise
        if not fused.forwards:
            kinds = ", ".join(type(uncompiled(network)).__name__ for network in families.networks(pipe)) or "no network"
            raise DiffAccelError(
                f"'{self.name}' knows the blocks of {_known()}, and {type(pipe).__name__} has {kinds}. Leave it out."
            )
        return fused

    def _put_on(self, network: nn.Module) -> list[Forward]:
        kinds = _kinds_of(network)
        blocks = [(module, kind) for module in network.modules() for kind in kinds if kind.fits(module)]
        for block, kind in blocks:
            if not kind.has_signature():
                raise DiffAccelError(
                    f"'{self.name}' does not know the arguments of {kind.block.__name__} in this version of diffusers."
                )
            if not is_own(forward := innermost(block).forward, block):
                raise DiffAccelError(_whose(block, forward, self.name))
        forwards = [Forward(block, kind, self.rounding == "folded") for block, kind in blocks]
        for forward in forwards:
            forward.put_on()
        return forwards


def _known() -> str:
    return ", ".join(MODULES)


def _kinds_of(network: nn.Module) -> tuple[BlockKind, ...]:
    for cls in type(network).__mro__:
        if cls.__name__ in MODULES and cls.__module__.startswith("diffusers."):
            kinds: tuple[BlockKind, ...] = import_module(MODULES[cls.__name__]).KINDS
            return kinds
    return ()


def _whose(block: nn.Module, forward: Any, name: str) -> str:
    """Return the error for a block whose forward is not its class's."""
    if isinstance(forward, Forward):
        return (
            f"'{name}' is on these blocks already, through another pipeline that shares them. Use that one, or "
            "diffaccel.remove it first."
        )
    return (
        f"The forward of {type(block).__name__} was replaced by a {type(forward).__name__}, as caching of diffusers "
        f"does. Apply '{name}' first, and the other after it."
    )


@dataclass(eq=False)
class FusedNetworks:
    """Gives the blocks of all networks of a pipeline their own forwards again, and tells about them."""

    forwards: list[Forward]

    def remove(self) -> None:
        """Restore every block; may be called twice."""
        for forward in self.forwards:
            forward.remove()

    def report(self) -> dict[str, Any]:
        """Return the number of blocks, of calls, and of calls left to the blocks' own forwards by reason."""
        stock: Counter[str] = Counter()
        for forward in self.forwards:
            stock.update(forward.stock_calls)
        return {
            "blocks": len(self.forwards),
            "fused_calls": sum(forward.fused_calls for forward in self.forwards),
            "stock_calls": dict(stock),
        }
