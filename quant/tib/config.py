"""TIB: what a network computes from its timestep alone is looked up, and its weights leave the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import nn

from diffaccel import families
from diffaccel.config import Config, Handle, Level, Machine, Touches
from diffaccel.errors import DiffAccelError
from diffaccel.modules.stand_in import uncompiled
from diffaccel.modules.temporal.cache import Options, TemporalCache
from diffaccel.modules.temporal.places import is_taken
from diffaccel.quant.tib.low_rank import LowRankModulation
from diffaccel.quant.tib.quantized import Method, TemporalQuantizer
from diffaccel.quant.tib.schedule import Timesteps, timesteps_of
from diffaccel.quant.tib.tables import LowRankTables, TemporalTables

Where = Literal["host", "device"]


@dataclass(frozen=True, kw_only=True)
class TIB(Config):
    """Look up what a network computes from its timestep, instead of computing it: the temporal information block.

    Modules whose output depends on the timestep, and on conditions of the whole call such as pooled text, guidance or a
    class, but not on the sample, are found by watching one network call. Their outputs are kept in a table by the exact
    bits of the timestep, made with the same operations on the same shapes: images are equal to the bit. A table is made
    for each set of conditions; the weights that it replaces leave the device until they are needed again. Adapters,
    casts, other schedules, batch sizes and resolutions are noticed, and nothing is stale.

    Args:
        rank: 0 for tables; otherwise modulation of this rank for any timestep, without tables, in networks whose
            modulation depends on the timestep alone (Wan, CogVideoX, PixArt-Sigma, SD1.5): not equal to the bit, with
            an error bound that is measured and told by ``summary``.
        bits: 0 for exact features; 4 or 8 for features of a quantized block, whose first call calibrates it.
        act_bits: bits of the activations inside of the block, and of features that are kept as codes.
        features: learned rounding with ranges for each timestep ("tiar"), codes of the exact features ("cache"), the
            better of both for each feature ("auto"), or round-to-nearest with one range for all timesteps ("nearest").
        iterations: of the learned rounding.
        weights: where replaced weights rest: in the memory of the host ("host"), or where they are ("device").
        keep: sets of conditions (prompts) that have a table at one time.
        budget_gib: maximum GiB of one table; None for the size of the weights that it replaces, 64 MiB at least. A
            network whose table would be larger runs as ever.
        trust: find timesteps on the device alone in pipeline calls whose schedule is known from an earlier call, so
            that the host waits for nothing; False reads every timestep.
    """

    name: ClassVar[str] = "tib"
    touches: ClassVar[Touches] = "graphs"
    citation: ClassVar[str] = "TFMQ-DM, arXiv 2311.16503 and 2407.19547"
    watches_calls: ClassVar[bool] = True

    rank: int = 0
    bits: int = 0
    act_bits: int = 8
    features: Method = "auto"
    iterations: int = 1000
    weights: Where = "host"
    keep: int = 4
    budget_gib: float | None = None
    trust: bool = True

    def validate(self) -> None:
        if self.rank < 0:
            raise DiffAccelError(f"TIB.rank is {self.rank}; it must be 0 for exact tables, or a positive rank.")
        if self.bits not in (0, 4, 8) or self.act_bits not in (4, 8):
            raise DiffAccelError(
                f"TIB.bits is {self.bits} and act_bits {self.act_bits}; bits must be 0 (exact), 4 or 8, and act_bits 4 "
                "or 8."
            )
        if self.bits and self.rank:
            raise DiffAccelError("TIB.rank and TIB.bits are two ways to store modulation. Use one of them.")
        if self.iterations < 1:
            raise DiffAccelError(f"TIB.iterations is {self.iterations}; it must be 1 or more.")
        if self.keep < 1:
            raise DiffAccelError(f"TIB.keep is {self.keep}; it must be 1 or more sets of conditions.")
        if self.budget_gib is not None and self.budget_gib <= 0:
            raise DiffAccelError(f"TIB.budget_gib is {self.budget_gib}; it must be positive, or None.")

    @classmethod
    def paper(cls) -> Self:
        """Return the published block: 4-bit weights, 8-bit activations, 20000 iterations, the better of both ways."""
        return cls(bits=4, act_bits=8, features="auto", iterations=20000)

    @classmethod
    def support(cls, machine: Machine) -> tuple[Level, str]:
        """Return "fast": tables need nothing of a machine; on the CPU they save time and no memory."""
        if machine.device != "cuda":
            return "fast", "works everywhere; weights and tables share one memory here, so that none is saved"
        return "fast", "works everywhere: saves the memory of modulation weights, and launches"

    @classmethod
    def fits(cls, pipeline: str, family: Any) -> tuple[bool | None, str]:
        """Return whether the networks of a pipeline have such modules, by the pipeline's class name or its family."""
        if family is None:
            return None, "watches the first call of its network, and replaces what depends on the timestep alone"
        return (
            True,
            f"replaces what the {' and '.join((family.denoiser, *family.other_denoisers))} makes of its timestep",
        )

    def apply(self, pipe: Any) -> Handle:
        """Put tables on every network of a pipeline.

        Raises:
            DiffAccelError: for a pipeline without a network, one whose weights move by themselves, and one that has
                tables already.
        """
        networks: list[nn.Module] = [uncompiled(network) for network in families.networks(pipe)]
        if not networks:
            raise DiffAccelError(
                f"'{self.name}' found no network in {type(pipe).__name__}. Pass a pipeline with a transformer or UNet."
            )
        for network in networks:
            _check(network)
        if self.rank:
            return _installed(LowRankTables([LowRankModulation(n, self.rank, Timesteps(pipe)) for n in networks]))
        budget = None if self.budget_gib is None else int(self.budget_gib * 2**30)
        options = Options(self.weights == "host", self.trust, self.keep, budget)
        return _installed(
            TemporalTables([TemporalCache(network, options, timesteps_of, self._maker()) for network in networks])
        )

    def _maker(self) -> TemporalQuantizer | None:
        if not self.bits:
            return None
        return TemporalQuantizer(self.bits, self.act_bits, self.features, self.iterations)


def _installed(tables: Any) -> Any:
    tables.install()
    return tables


def _check(network: nn.Module) -> None:
    kind = type(network).__name__
    if is_taken(network):
        raise DiffAccelError(
            f"{kind} has tables already, through another pipeline that shares it. Use that one, or diffaccel.remove it."
        )
    for part in network.modules():
        hooks = getattr(vars(part).get("_diffusers_hook"), "hooks", {})
        if "_hf_hook" in vars(part) or "group_offloading" in hooks:
            raise DiffAccelError(
                f"'tib' moves weights of {kind} itself, and offloading hooks move them too. Leave out "
                "enable_model_cpu_offload() and enable_group_offload() (pipe.remove_all_hooks() takes them off), or "
                "'tib'."
            )
        if any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in type(part).__mro__):
            raise DiffAccelError(f"'tib' needs the whole {kind} on one device, and FSDP shards it. Load it whole.")
