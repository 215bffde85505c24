"""The processes that share one piece of work, and this one's place among them. ``accelerate`` starts and joins them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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
    """Join the processes of a launch, if there is one, and return them with this process's own device."""
    from accelerate import PartialState
    from accelerate.utils.environment import get_int_from_env

    if get_int_from_env(_SIZE_VARIABLES, 1) < 2:
        return Processes(), device

    # a launcher ends the others when one dies, so waiting long for a slow one is safe
    state = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=30))
    return Processes(state.process_index, state.num_processes, state), state.device
