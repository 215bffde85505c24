"""The processes that share a run, and this one's place among them. ``accelerate`` starts and joins them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from diffaccel.runs import loading as opening

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class World:
    """The processes that share a run; one, unless started by ``accelerate launch`` or ``torchrun``."""

    rank: int = 0
    size: int = 1
    state: Any = None

    def wait(self) -> None:
        """Until every process is here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def share(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.state is None:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]


def join_world(device: str = "auto") -> tuple[World, torch.device]:
    """This process's place among those that share the run, and its device."""
    from accelerate import PartialState
    from accelerate.utils.environment import get_int_from_env

    chosen = opening.pick_device(device)
    sizes = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]
    if get_int_from_env(sizes, 1) < 2:
        return World(), chosen

    # a launcher ends the others when one dies, so waiting long for a slow one is safe
    state = PartialState(cpu=chosen.type == "cpu", timeout=timedelta(days=30))
    return World(state.process_index, state.num_processes, state), state.device
