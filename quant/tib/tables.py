"""The tables of all networks of a pipeline: what takes them off again, and tells about them."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from typing import Any

from diffaccel.modules.temporal.cache import TemporalCache
from diffaccel.quant.tib.low_rank import LowRankModulation


class TemporalTables:
    """Tables on the networks of a pipeline."""

    def __init__(self, caches: list[TemporalCache]) -> None:
        self.caches = caches

    def install(self) -> None:
        """Take the calls of all networks, or of none."""
        try:
            for cache in self.caches:
                cache.install()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Give every network back as it was; may be called twice."""
        for cache in reversed(self.caches):
            cache.remove()

    @contextlib.contextmanager
    def during(self, pipe: Any, label: Hashable) -> Iterator[None]:
        """Know that the network calls of this block are those of one pipeline call, whose loop ``label`` names."""
        with contextlib.ExitStack() as stack:
            for cache in self.caches:
                stack.enter_context(cache.during(pipe, label))
            yield

    def report(self) -> dict[str, Any]:
        """Return what the tables of each network hold and did; JSON-ready."""
        return {"tables": [cache.report() for cache in self.caches]}


class LowRankTables:
    """Low-rank modulation on the networks of a pipeline."""

    def __init__(self, networks: list[LowRankModulation]) -> None:
        self.networks = networks

    def install(self) -> None:
        """Watch the next call of every network."""
        for network in self.networks:
            network.install()

    def remove(self) -> None:
        """Put all linears back; may be called twice."""
        for network in reversed(self.networks):
            network.remove()

    @contextlib.contextmanager
    def during(self, pipe: Any, label: Hashable) -> Iterator[None]:
        """Do nothing: low-rank modulation serves any timestep."""
        yield

    def report(self) -> dict[str, Any]:
        """Return rank and error bound of each network; JSON-ready."""
        return {"low_rank": [network.report() for network in self.networks]}
