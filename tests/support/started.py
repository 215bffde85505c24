"""Processes of a launch that start at once: forked from one that has imported the libraries, and nothing else."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch

IMPORTED = ["torch.distributed.checkpoint", "torch.distributed.fsdp", "peft",
            "diffusers.models.transformers.transformer_wan", "diffaccel.distill.run",
            "diffaccel.distill.next_frame.train", "diffaccel.quant.qvgen.run"]  # fmt: skip


def in_processes(work: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Call ``work(rank, *arguments)`` in as many processes, and wait for them.

    As by ``torch.multiprocessing.spawn``, nothing of this process but its environment and the arguments reaches them;
    the processes of that import the libraries each, which takes most of their time.

    Raises:
        torch.multiprocessing.ProcessRaisedException: for an exception in one of them.
    """
    multiprocessing.set_forkserver_preload(IMPORTED)
    what = (dict(os.environ), work, arguments)
    torch.multiprocessing.start_processes(_begin, what, nprocs=count, start_method="forkserver")


def _begin(rank: int, environment: dict[str, str], work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)  # of the test: that of the process that has imported the libraries is older
    work(rank, *arguments)
