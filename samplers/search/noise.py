"""Noise as a pure function of a seed and a key: equal for any batch, any number of processes, any order of work."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from diffaccel.samplers.search.particles import Key

THREADS, EACH = 8, 2**18  # at most so many threads draw, each at least so many numbers


def seed_of(seed: int, key: Key) -> int:
    """63 bits of a keyed hash."""
    digest = hashlib.blake2b(struct.pack("<Q3q", seed % 2**64, *key), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def normal(keys: Iterable[tuple[int, Key]], shape: Sequence[int], like: Tensor) -> Tensor:
    """Standard normal rows ``(R, *shape)``, fp32, one for each ``(seed, key)``.

    They are drawn on the CPU, so that every device gets the same, and sent together.
    """
    keys = list(keys)
    rows = torch.empty(len(keys), *shape, dtype=torch.float32, pin_memory=like.device.type == "cuda")

    def draw(begin: int, end: int) -> None:
        generator = torch.Generator()
        for row, (seed, key) in zip(rows[begin:end], keys[begin:end], strict=True):
            torch.randn(tuple(shape), generator=generator.manual_seed(seed_of(seed, key)), out=row)

    workers = min(THREADS, os.cpu_count() or 1, rows.numel() // EACH)
    if workers < 2:
        draw(0, len(keys))
    else:
        cuts = [len(keys) * i // workers for i in range(workers + 1)]
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(draw, cuts, cuts[1:]))
    return rows.to(like.device, like.dtype, non_blocking=True)


def seeds(generator: torch.Generator | list[torch.Generator] | None, rows: int) -> list[int]:
    """A seed for each row of a call, from the caller's generators after the pipeline drew from them: row i from its own
    where a list was given, so that a row's search depends on nothing but its own generator."""

    def draw(generator: torch.Generator | None, count: int) -> list[int]:
        device = "cpu" if generator is None else generator.device
        return torch.randint(2**63 - 1, (count,), generator=generator, device=device).tolist()

    if isinstance(generator, list):
        return [draw(each, 1)[0] for each in generator]
    return draw(generator, rows)
