"""Noise as a pure function of a seed and a key: the same for any batch, number of processes and order of work."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from diffaccel.samplers.search.particles import Key
from diffaccel.session import Session

MAX_THREADS = 8
NUMBERS_PER_THREAD = 2**18  # at least so many, or a thread costs more than it saves


def seed_of(seed: int, key: Key) -> int:
    """Hash a seed and a key to 63 bits."""
    digest = hashlib.blake2b(struct.pack("<Q3q", seed % 2**64, *key), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def normal(keys: Iterable[tuple[int, Key]], shape: Sequence[int], like: Tensor) -> Tensor:
    """Draw standard normal rows ``(R, *shape)``, one for each ``(seed, key)``, with device and dtype of ``like``.

    They are drawn in fp32 on the CPU, so that every device gets the same numbers, and transferred together.
    """
    keys = list(keys)
    pinned = like.device.type == "cuda"
    rows = torch.empty(len(keys), *shape, dtype=torch.float32, device="cpu", pin_memory=pinned)

    def draw(begin: int, end: int) -> None:
        generator = torch.Generator("cpu")
        for row, (seed, key) in zip(rows[begin:end], keys[begin:end], strict=True):
            row.normal_(generator=generator.manual_seed(seed_of(seed, key)))

    workers = min(MAX_THREADS, os.cpu_count() or 1, rows.numel() // NUMBERS_PER_THREAD)
    if workers < 2:
        draw(0, len(keys))
    else:
        cuts = [len(keys) * i // workers for i in range(workers + 1)]
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(draw, cuts, cuts[1:]))
    return rows.to(like.device, like.dtype, non_blocking=True)


def initial_std(session: Session) -> float:
    """Return the factor of unit noise at the first level of a call, in the session's coordinates."""
    begin = torch.tensor(float(session.sigmas[0]), dtype=torch.float64, device="cpu")
    return float(session.schedule.state_scale(begin)) * float(getattr(session.scheduler, "init_noise_sigma", 1.0))


def seeds(generator: torch.Generator | list[torch.Generator] | None, rows: int) -> list[int]:
    """Draw a seed for each row of a call from the caller's generators, after the pipeline drew its latents from them.

    With a list of generators, row i takes its seed from generator i, so that a row's search depends on nothing else.
    """

    def draw(generator: torch.Generator | None, count: int) -> list[int]:
        device = "cpu" if generator is None else generator.device
        return torch.randint(2**63 - 1, (count,), generator=generator, dtype=torch.int64, device=device).tolist()

    if isinstance(generator, list):
        return [draw(row_generator, 1)[0] for row_generator in generator]
    return draw(generator, rows)
