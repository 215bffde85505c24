"""The processes that share one piece of work, and this one's place among them. ``accelerate`` starts and joins them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from diffaccel.errors import DiffAccelError

if TYPE_CHECKING:
    import torch

_RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_SIZE_VARIABLES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]


@dataclass(frozen=True)
class Processes:
    """The processes that share the work; one, unless started by ``accelerate launch`` or ``torchrun``.

    Attributes:
        rank: number of this process.
        size: number of processes.
        state: accelerate's ``PartialState``; None for a single process.
    """

    rank: int = 0
    size: int = 1
    state: Any = None

    def wait(self) -> None:
        """Block until every process has reached this point."""
        if self.size > 1:
            self.state.wait_for_everyone()

    def share(self, value: Any) -> Any:
        """Return the first process's value in every process."""
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]


def join(device: torch.device) -> tuple[Processes, torch.device]:
    """Join the processes of a launch, if there is one, and return them with this process's own device.

    Raises:
        DiffAccelError: for a number of processes without the number of this one: no launcher started it.
    """
    from accelerate import PartialState
    from accelerate.utils.environment import get_int_from_env

    size = get_int_from_env(_SIZE_VARIABLES, 1)
    if size < 2:
        return Processes(), device
    if not any(name in os.environ for name in _RANK_VARIABLES):
        name = next(name for name in _SIZE_VARIABLES if name in os.environ)
        raise DiffAccelError(
            f"{name} is {size}, but RANK, which a launcher sets beside it, is not: this process would wait for others "
            f"that nobody starts. Unset {name}, or start with accelerate launch."
        )

    # a launcher ends the others when one dies, so waiting long for a slow one is safe
    state = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=30))
    return Processes(state.process_index, state.num_processes, state), state.device
