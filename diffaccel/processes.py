"""The processes that share one piece of work, and this one's place among them. ``accelerate`` starts and joins them."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from diffaccel.errors import DiffAccelError, first_line

if TYPE_CHECKING:
    import torch

_RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_PLACE = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # where the processes of one of torch's launchers meet
MEETING_SECONDS, _QUIET_SECONDS = 180, 15

logger = logging.getLogger(__name__)


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
        DiffAccelError: for a number of processes that no launcher set: its other variables are missing, or the other
            processes do not come.
    """
    import torch
    from accelerate import PartialState

    size = _whole_number(_SIZE_VARIABLES, 1)
    if size < 2:
        return Processes(), device
    # a launcher ends the others when one dies, so waiting long for a slow one is safe
    options: dict[str, Any] = {"timeout": timedelta(days=30)}
    if _has_meeting_place(size) and not torch.distributed.is_initialized():
        rank, _ = _whole_number(_RANK_VARIABLES, 0), _whole_number(("MASTER_PORT",), 0)
        if not 0 <= rank < size:
            raise DiffAccelError(
                f"RANK is {rank}, but WORLD_SIZE is {size}. Unset both, or start with accelerate launch."
            )
        options |= {"store": _meet(rank, size), "rank": rank, "world_size": size}
    state = PartialState(cpu=device.type == "cpu", **options)
    return Processes(state.process_index, state.num_processes, state), state.device


def _whole_number(names: Sequence[str], default: int) -> int:
    """Return the number in the first of these variables that is set."""
    name = next((name for name in names if name in os.environ), None)
    if name is None:
        return default
    try:
        return int(os.environ[name])
    except ValueError:
        raise DiffAccelError(
            f"{name} is '{os.environ[name]}'; a launcher sets it to a whole number. Unset it, or start with accelerate "
            "launch."
        ) from None


def _has_meeting_place(size: int) -> bool:
    """Return whether one of torch's launchers started this process; MPI's processes find each other by themselves.

    Raises:
        DiffAccelError: when some of the variables that such a launcher sets are missing.
    """
    if any(name in os.environ for name in _RANK_VARIABLES[1:]):
        return False
    variables = (next(name for name in _SIZE_VARIABLES if name in os.environ), "RANK", *_PLACE)
    if missing := [name for name in variables if name not in os.environ]:
        present = [name for name in variables if name in os.environ]
        raise DiffAccelError(
            f"{variables[0]} is {size}, but {', '.join(missing)}, which a launcher sets beside it, cannot be found: "
            f"this process would wait for others that nobody starts. Unset {' '.join(present)}, or start with "
            "accelerate launch."
        )
    return True


def _meet(rank: int, size: int) -> Any:
    """Wait until every process of the launch is there, and return the store through which they found each other.

    Raises:
        DiffAccelError: when the others do not come within :data:`MEETING_SECONDS`.
    """
    from torch.distributed import DistError
    from torch.distributed.rendezvous import rendezvous

    limit = timedelta(seconds=MEETING_SECONDS)
    variables = ("RANK", "WORLD_SIZE", *_PLACE)
    told = ", ".join(f"{name}={os.environ[name]}" for name in variables)
    note = threading.Timer(_QUIET_SECONDS, logger.warning, ["Waiting for the other processes of a launch (%s).", told])
    note.daemon = True
    note.start()
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=limit))
        store.set(f"diffaccel/{rank}", "here")
        store.wait([f"diffaccel/{other}" for other in range(size)], limit)
    except DistError as error:
        raise DiffAccelError(
            f"The environment says that this is one of {size} processes ({told}), but the others did not come within "
            f"{MEETING_SECONDS} s ({first_line(error, 90)}). Start all with accelerate launch; for a run of one "
            f"process: unset {' '.join(variables)}."
        ) from error
    finally:
        note.cancel()
    return store
