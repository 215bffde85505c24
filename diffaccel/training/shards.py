"""Weights that several processes share out: their own part of each, and checkpoints that any number of them resumes.

Sharding is torch's ``fully_shard``, files are those of ``torch.distributed.checkpoint``; what is added is that a
checkpoint is whole or not there, and that its bytes are those of their SHA-256.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError, first_line
from diffaccel.files import sha256, write_json

_ADVICE = "Remove it to begin anew, or take another folder"


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, in the same memory; a tensor that is not shared out itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor; every process must ask where it is shared out."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shared_as(part: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that is shared out as ``like``, of which ``part`` is this process's."""
    if not hasattr(like, "to_local") or hasattr(part, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    whole_of: Any = like
    return DTensor.from_local(
        part, whole_of.device_mesh, whole_of.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def shard(network: nn.Module, device: torch.device) -> nn.Module:
    """Share out a network's weights among all processes of the launch; return it.

    Every entry of an outermost list of modules is gathered on its own when it is called, the rest with the network.

    Raises:
        DiffAccelError: where no processes were started.
    """
    if not torch.distributed.is_initialized():
        raise DiffAccelError(
            "Weights are to be shared out, but this is one process. Start several: accelerate launch -m diffaccel ..."
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in _blocks(network):
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the entries of the outermost lists of modules, each of which is called as a whole."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            for entry in child:
                yield from _blocks(nn.Sequential(entry)) if isinstance(entry, nn.ModuleList) else (entry,)
        else:
            yield from _blocks(child)


def save_shards(tensors: dict[str, Tensor], file: Path, state: dict[str, Any], rank: int) -> None:
    """Write a checkpoint of all processes: a folder beside ``file``, which then names it with its digests.

    The one that was named before stays until then.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = file.with_name(f"{file.stem}-{state['step']}")
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    save(tensors, checkpoint_id=folder)
    torch.distributed.barrier()
    if rank == 0:
        digests = {part.name: sha256(part) for part in sorted(folder.iterdir())}
        write_json(file, {"folder": folder.name, "digests": digests, "state": state})
        for old in file.parent.glob(f"{file.stem}-*"):
            if old != folder:
                shutil.rmtree(old)
    torch.distributed.barrier()


def read_state(file: Path) -> dict[str, Any]:
    """Return the state of a checkpoint of :func:`save_shards`, whose parts are there with their digests.

    Raises:
        DiffAccelError: for one that is damaged, or not whole.
    """
    try:
        named = json.loads(file.read_text(encoding="utf-8"))
        state, digests, folder = named["state"], named["digests"], file.parent / named["folder"]
        differing = [name for name, digest in digests.items() if sha256(folder / name) != digest]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DiffAccelError(f"'{file}' is no whole checkpoint ({first_line(error, 90)}). {_ADVICE}.") from error
    if differing:
        raise DiffAccelError(
            f"'{folder / differing[0]}' is damaged, or was changed since it was written: its content has not the "
            f"SHA-256 that '{file.name}' tells. {_ADVICE}."
        )
    return state


def load_shards(tensors: dict[str, Tensor], file: Path) -> None:
    """Fill tensors of these names, shared out in any way, from the checkpoint that ``file`` names.

    Raises:
        DiffAccelError: for a checkpoint that lacks one of them, or has it in another shape.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    folder = file.parent / json.loads(file.read_text(encoding="utf-8"))["folder"]
    known = FileSystemReader(folder).read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        if name not in known or getattr(known[name], "size", None) != tensor.shape:
            raise DiffAccelError(f"'{folder}' is damaged: '{name}' is missing or has another shape. {_ADVICE}.")
    load(tensors, checkpoint_id=folder)
