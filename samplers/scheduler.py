"""The pipeline's own scheduler, step by step: the result of the stock loop, driven by diffaccel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffaccel.config import SamplerConfig, State
from diffaccel.errors import DiffAccelError
from diffaccel.session import Advance, Sampling, Session


@dataclass(frozen=True, kw_only=True)
class Scheduler(SamplerConfig):
    """The rule of ``pipe.scheduler`` (UniPC, DPM-Solver++, DDIM, DDPM, ...) with its own history, to the bit.

    For pipelines that keep their solver while the rest of diffaccel applies: caches receive the step and its noise
    level, cost is counted, and network calls have at most ``max_batch`` rows. Every family is tested against the stock
    loop with it. Latents stay in the pipeline's layout and dtype.

    A call that cannot be followed (ControlNets, guidance of several branches, callbacks that may change anything) is
    made by the pipeline itself: with the same result, counted from outside, and without ``max_batch``.
    """

    name: ClassVar[str] = "scheduler"
    citation: ClassVar[str] = (
        "UniPC, arXiv 2302.04867; DPM-Solver++, arXiv 2211.01095; DDIM, arXiv 2010.02502; and others"
    )

    is_stock_rule: ClassVar[bool] = True

    state: State = "stock"

    def validate(self) -> None:
        super().validate()
        if self.state != "stock":
            raise DiffAccelError(
                f"Scheduler.state is '{self.state}'; a scheduler keeps latents in the pipeline's dtype: use 'stock'."
            )

    def sample(self, session: Session) -> Sampling:
        return own_steps(session)


def own_steps(session: Session) -> Sampling:
    """Sample by ``x' = scheduler.step(model(x, t), t, x)``: UniPC (arXiv 2302.04867), DDIM (arXiv 2010.02502), ..."""
    latents = session.latents
    for index in range(len(session.timesteps)):
        latents = yield Advance(latents, index)
    return latents
