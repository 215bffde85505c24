"""Quantization-aware training of a network that does not fit one device: weights and moments are split (FSDP2).

``fully_shard`` splits the weights that learn, with their gradients and moments, block by block. What changes its shape
or is small stays whole in every process: side branches, scales, zeros and clipping factors.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from diffaccel.errors import DiffAccelError, first_line
from diffaccel.families.facts import facts_of
from diffaccel.files import write_json
from diffaccel.quant.qvgen.optimizer import grouped
from diffaccel.quant.qvgen.prepare import fake_layers
from diffaccel.quant.qvgen.run import QATRun
from diffaccel.quant.qvgen.store import VERSION
from diffaccel.training.steps import average_gradients

WHOLE = ("weight_scale", "weight_zero", "act_logit", "side_left", "side_right")
MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedQATRun(QATRun):
    """A run whose weights that learn are split among the processes of a launch.

    Numbers are those of :class:`QATRun` up to the order of sums. Checkpoints are folders of
    ``torch.distributed.checkpoint``, of which each process writes its part; a run goes on to the same bits with the
    same number of processes, and up to the order of sums with another. The model that is followed is whole in each.

    Raises:
        DiffAccelError: where torch.distributed is not initialised.
    """

    def prepared(self) -> nn.Module:
        """Return the network that learns, split."""
        from torch.distributed.fsdp import fully_shard

        if not torch.distributed.is_initialized():
            raise DiffAccelError(
                "A sharded run needs the processes of a launch, and torch.distributed is not initialised. Start it by "
                "accelerate launch or torchrun with two processes or more, or leave it whole (QATRun)."
            )
        network = super().prepared()
        mesh = init_device_mesh(self.device.type, (torch.distributed.get_world_size(),))
        whole = {p for _, layer in fake_layers(network) for name, p in layer.named_parameters() if name in WHOLE}
        whole |= {p for p in network.parameters() if not p.requires_grad}
        for block in _blocks(network):
            fully_shard(block, mesh=mesh, ignored_params=whole)
        fully_shard(network, mesh=mesh, ignored_params=whole)
        return network

    @property
    def checkpoint(self) -> Path:
        """File that names the folder of the checkpoint."""
        return self.folder / "checkpoint.json"

    @torch.no_grad()
    def whole(self) -> nn.Module:
        """Return a copy of the student with all of its weights; every process must ask for it."""
        network = super().prepared()
        sides = dict(fake_layers(self.student))
        for name, layer in fake_layers(network):
            own = sides[name]
            layer.set_side(own.side_left, own.side_right)
            layer.keep, layer.gate = own.keep, own.gate
        for name, p in self.student.named_parameters():
            network.get_parameter(name).data.copy_(p.full_tensor() if isinstance(p, DTensor) else p)
        return network

    @torch.no_grad()
    def _update(self) -> Tensor:
        """Step the optimiser; a gradient that is not finite is replaced by zero and counted."""
        learning = [p for group in grouped(self.student).values() for p in group.values() if p.grad is not None]
        average_gradients([p for p in learning if not isinstance(p, DTensor)], self.processes.size)
        squares = torch.zeros(2, dtype=torch.float32, device=self.device)  # of split and of whole gradients
        local = [(_local(p.grad), isinstance(p, DTensor)) for p in learning]
        for gradient, is_split in local:
            squares[0 if is_split else 1] += gradient.float().square().sum()
        torch.distributed.all_reduce(split := squares[:1].clone())
        norm = (split[0] + squares[1]).sqrt()
        finite = torch.isfinite(norm)
        factor = (self.config.max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient, _ in local:
            torch.where(finite, gradient * factor, torch.zeros_like(gradient), out=gradient)
        self.optimizer.step(self.step)
        self._bad = torch.where(finite, torch.zeros_like(self._bad), self._bad + 1)
        return norm

    def save(self) -> None:
        """Write a checkpoint: every process its part, then the file that names them, atomically."""
        if float(self._bad):
            return  # a state that may be spoilt is not kept
        name = f"checkpoint-{self.step}"
        if self.processes.rank == 0:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        torch.distributed.barrier()
        state_dict_saver.save(self._tensors(), checkpoint_id=self.folder / name)
        if self.processes.rank == 0:
            ranks = {layer: fake.rank for layer, fake in fake_layers(self.student)}
            moments = [key for key in self._tensors() if key.startswith("moment.")]
            state = {"version": VERSION, "step": self.step, "seconds": self.seconds, **vars(self._origin)}
            write_json(self.checkpoint, {**state, "folder": name, "ranks": ranks, "moments": moments})
            for old in self.folder.glob("checkpoint-*"):
                if old.name != name:
                    shutil.rmtree(old, ignore_errors=True)
        torch.distributed.barrier()

    @torch.no_grad()
    def load(self) -> None:
        """Resume from the checkpoint.

        Raises:
            DiffAccelError: for a checkpoint of another model, other data or other options, and one that is damaged.
        """
        try:
            state = json.loads(self.checkpoint.read_text(encoding="utf-8"))
            reason = self._origin.difference(state) if state["version"] == VERSION else "no run of this version"
            folder, ranks, moments = self.folder / state["folder"], state["ranks"], set(state["moments"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DiffAccelError(
                f"'{self.checkpoint}' is no whole checkpoint ({first_line(error, 90)}). Remove it to begin anew."
            ) from error
        if reason:
            raise DiffAccelError(f"'{self.checkpoint}' is of {reason}. Take another folder, or remove the file.")
        for name, layer in fake_layers(self.student):
            rank = ranks[name]
            left = torch.zeros(layer.out_features, rank, dtype=torch.float32, device=self.device)
            right = torch.zeros(rank, layer.in_features, dtype=torch.float32, device=self.device)
            layer.set_side(left if rank else None, right if rank else None)
        self.optimizer.renew()
        for p in (p for group in grouped(self.student).values() for p in group.values()):
            step = torch.zeros((), dtype=torch.float32, device=self._step_device)
            self.optimizer.adam.state[p] = {"step": step, **{key: torch.zeros_like(p) for key in MOMENTS}}
        tensors = {key: t for key, t in self._tensors().items() if not key.startswith("moment.") or key in moments}
        try:
            state_dict_loader.load(tensors, checkpoint_id=folder)
        except Exception as error:
            raise DiffAccelError(
                f"'{folder}' is damaged ({first_line(error, 90)}). Remove '{self.checkpoint}' to begin anew."
            ) from error
        for name, p in ((name, p) for group in grouped(self.student).values() for name, p in group.items()):
            if f"moment.{name}.step" not in moments:  # it had no gradient yet
                self.optimizer.adam.state.pop(p)
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.decay.step(max(self.step - 1, 0))

    @property
    def _step_device(self) -> Any:
        return self.device if self.optimizer.adam.defaults.get("fused") else torch.device("cpu")

    def _tensors(self) -> dict[str, Tensor]:
        """Return weights and moments by name; they are the run's own."""
        tensors: dict[str, Tensor] = {}
        for group in grouped(self.student).values():
            for name, p in group.items():
                tensors[f"live.{name}"] = p.detach()
                for key, value in self.optimizer.adam.state.get(p, {}).items():
                    tensors[f"moment.{name}.{key}"] = value
        return tensors


def _local(gradient: Any) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network that is listed; none of another, which is split as one."""
    try:
        paths = facts_of(network).blocks
    except DiffAccelError:
        return []
    blocks: list[nn.Module] = []
    for path in paths:
        part: Any = getattr(network, path, None)
        if part is not None:
            blocks += list(part) if isinstance(part, nn.ModuleList) else [part]
    return blocks
