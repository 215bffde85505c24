"""The process that :mod:`scripts.bench_kills` kills: imported once, then forked for every command."""

from __future__ import annotations

import os
import sys
from typing import Any

import diffusers
import torch
import transformers  # noqa: F401

from diffaccel.cli import main
from diffaccel.eval import commands  # noqa: F401
from diffaccel.runs import generate  # noqa: F401

torch.set_num_threads(1)  # no thread may live when it is forked
for name in ("FluxPipeline", "AutoencoderKL"):
    getattr(diffusers, name)


def command(words: list[str], folder: str, begins: Any) -> None:
    """Run ``diffaccel WORDS`` in a folder, silently, and end with its status."""
    os.chdir(folder)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    begins.send(True)
    sys.exit(main(words))
