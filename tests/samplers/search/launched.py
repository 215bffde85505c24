"""One search that all processes of a launch make together; the main process saves what came of it."""

from __future__ import annotations

import sys
from pathlib import Path

import tiny
import torch
from search_bed import latent_reward

import diffaccel
from diffaccel.samplers import SVDD


def main(out: Path, *, shared: bool = True) -> None:
    """Two prompts on tiny FLUX, and the same again from what the first left; ``out`` is a folder."""
    reward = latent_reward(lambda x0: x0.flatten(1).mean(1))
    config = SVDD(reward=reward, budget=36, particles=2, max_batch=2, keep=1, folder=str(out / "search"), shared=shared)
    pipe = diffaccel.accelerate(tiny.make("flux"), config)
    images = pipe(**tiny.call_kwargs("flux", steps=3)).images
    run = diffaccel.summary(pipe).last_run
    again = pipe(**tiny.call_kwargs("flux", steps=3)).images
    rank = 0
    if shared:
        from accelerate import PartialState

        state = PartialState()
        state.wait_for_everyone()
        rank = state.process_index
    torch.save({"images": images, "again": again, "nfe": run["nfe"], "report": run["report"]}, out / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
