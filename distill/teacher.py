"""What is distilled: a network, how it is asked, and the conditions under which it draws."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from diffaccel.distill.identity import told
from diffaccel.distill.parameterization import Kind
from diffaccel.errors import DiffAccelError, shortened
from diffaccel.flow import VE_PATH
from diffaccel.session import Session, open_session

Branch = Literal["positive", "negative"]


class Teacher(Protocol):
    """A trained model as distillation sees it; its network, and copies of it, are asked at any noise level.

    Attributes:
        network: the trained network.
        kind: type of its output.
        sigma_data: of an "edm" network.
        shape: ``(C, H, W)`` of a sample.
        guidance: scale of classifier-free guidance of the teacher; 1 for none.
    """

    network: nn.Module
    kind: Kind
    sigma_data: float
    shape: tuple[int, ...]
    guidance: float

    @property
    def groups(self) -> int:
        """Number of batches of conditions."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a run must have in common with its checkpoint, beside the weights; JSON-ready."""

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``a`` and ``s`` of the network's input ``a x0 + s eps`` at levels ``(B,)`` of the linear path."""

    def ask(self, network: nn.Module, x: Tensor, sigma: Tensor, group: int, branch: Branch = "positive") -> Tensor:
        """Return the raw output ``(B, C, H, W)`` of a network at ``x``, under the conditions of a group."""


@dataclass
class NetworkTeacher:
    """A bare network.

    Args:
        call: the raw output from network, input, levels ``sigma`` of the linear path ``(B,)``, and conditions.
        preserves_variance: whether the input is ``a x0 + s eps`` with ``a^2 + s^2 = 1``; else ``a = 1 - sigma``,
            ``s = sigma``, or for "edm" ``a = 1`` and ``s = sigma / (1 - sigma)``.
        conditions: a batch each, "negative" ones beside them where the teacher is guided.
    """

    network: nn.Module
    call: Callable[[nn.Module, Tensor, Tensor, Any], Tensor]
    kind: Kind
    shape: tuple[int, ...]
    conditions: Sequence[Any] = (None,)
    negative: Any = None
    guidance: float = 1.0
    sigma_data: float = 0.5
    preserves_variance: bool = False

    @property
    def groups(self) -> int:
        return len(self.conditions)

    @property
    def identity(self) -> dict[str, Any]:
        changed = {"sigma_data": (self.sigma_data, 0.5), "preserves_variance": (self.preserves_variance, False)}
        others = {name: value for name, (value, default) in changed.items() if value != default}
        return {"kind": self.kind, "shape": list(self.shape), "guidance": self.guidance, **others}

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        sigma = sigma.reshape(-1, *[1] * len(self.shape))
        if self.kind == "edm":
            return torch.ones_like(sigma), sigma / (1 - sigma)
        return _on_path(sigma, self.preserves_variance)

    def ask(self, network: nn.Module, x: Tensor, sigma: Tensor, group: int, branch: Branch = "positive") -> Tensor:
        return self.call(
            network, x, sigma, self.conditions[group % self.groups] if branch == "positive" else self.negative
        )


@dataclass
class PipelineTeacher:
    """The denoiser of a pipeline, with every condition that one of its calls would have.

    Calls are opened and not made, so that text encoders, guidance and layouts of all families are the pipeline's own.
    A group is one call's batch of prompts; its encodings are kept.

    Args:
        arguments: of the pipeline's call, such as ``height``, ``guidance_scale`` and ``negative_prompt``.
        prompts: to draw, ``batch`` of them in a group; the last group is filled up from the first.
    """

    pipe: Any
    prompts: Sequence[str]
    batch: int
    arguments: dict[str, Any] = field(default_factory=dict)
    _sessions: dict[int, Session] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise DiffAccelError(f"PipelineTeacher.batch is {self.batch}; it must be at least 1.")
        if isinstance(self.prompts, str) or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise DiffAccelError(f"prompts is {shortened(repr(self.prompts), 80)}; it must be a list of texts.")
        self._check_arguments()
        if not self.prompts:
            raise DiffAccelError("No prompts to distil with. Give a file of prompts, one a line, or a packaged set.")
        session = self._session(0)
        schedule = session.schedule
        if schedule.continuous:
            raise DiffAccelError(
                f"{type(self.pipe).__name__} has a network of EDM's form, which a pipeline does not tell of. "
                "Pass its network as NetworkTeacher(kind='edm', ...)."
            )
        networks = session.family.networks(self.pipe)
        if len(networks) > 1:
            raise DiffAccelError(
                f"{type(self.pipe).__name__} has {len(networks)} denoisers ({', '.join(networks)}), of which each "
                "knows a part of the noise levels. Distil a pipeline with one."
            )
        self.kind: Kind = schedule.prediction if schedule.prediction != "score" else "epsilon"
        self.sigma_data = 0.5
        self.network: nn.Module = next(iter(networks.values()))  # not the session's, which may be watched
        self.shape = tuple(session.x.shape[1:])

    def _check_arguments(self) -> None:
        """Raise for a pipeline that takes no prompts, and for arguments that stand beside them."""
        name, parameters = type(self.pipe).__name__, inspect.signature(type(self.pipe).__call__).parameters
        if "prompt" not in parameters:
            raise DiffAccelError(
                f"{name} takes no prompt, so that there are no conditions to distil it under. Pass its network as "
                "NetworkTeacher, with the classes as conditions."
            )
        if several := [
            key for key in ("num_images_per_prompt", "num_videos_per_prompt") if self.arguments.get(key, 1) != 1
        ]:
            raise DiffAccelError(
                f"{several[0]} is {self.arguments[several[0]]}, but a drawing has a prompt of its own. Leave it out."
            )
        beside = [
            key for key in self.arguments if key in ("prompt", "latents", "generator") or key.endswith("prompt_embeds")
        ]
        if beside:
            raise DiffAccelError(
                f"arguments has {', '.join(beside)}, but the texts of 'prompts' are drawn, from noise of their own. "
                f"Leave {'it' if len(beside) == 1 else 'them'} out."
            )
        negative = self.arguments.get("negative_prompt")
        if isinstance(negative, (list, tuple)):
            raise DiffAccelError(
                f"negative_prompt is a list of {len(negative)}, but a batch has any {self.batch} of the prompts. "
                "Give one text for all."
            )

    @property
    def groups(self) -> int:
        return -(-len(self.prompts) // self.batch)

    @property
    def identity(self) -> dict[str, Any]:
        prompts = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()[:16]
        arguments = {name: known for name, value in self.arguments.items() if (known := told(value)) is not None}
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "guidance": self.guidance,
            "prompts": prompts,
            **arguments,
        }

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return _on_path(sigma.reshape(-1, *[1] * len(self.shape)), self._session(0).schedule.vp)

    def ask(self, network: nn.Module, x: Tensor, sigma: Tensor, group: int, branch: Branch = "positive") -> Tensor:
        session = self._session(group)
        family, schedule, cond = session.family, session.schedule, session.conds[0]
        kwargs = cond.positive if branch == "positive" else cond.negative
        if kwargs is None:
            raise DiffAccelError("The call has no second guidance branch. Pass a guidance scale above 1.")
        level = sigma.float().cpu()
        level = level / (1 - level) if schedule.path is VE_PATH else level
        network_x = family.to_network(x.to(session.dtype))
        time = family.time(session.pipe, schedule.timestep(level), network_x, session.dtype)
        arguments = {family.latent_arg: network_x, family.time_arg: time, **kwargs, "return_dict": False}
        positional = [arguments.pop(name) for name in session.positional]
        out = family.prediction(network(*positional, **arguments)[0], network_x)
        return family.from_network(out, x).float()

    def decode(self, x0: Tensor, group: int) -> Tensor:
        """Return the pixels of clean samples in [-1, 1], as the pipeline decodes them in a group's call."""
        return self._session(group).decoder()(x0)

    def timestep(self, sigma: float) -> float:
        """Return the time that the pipeline would pass to its network at a level of the linear path."""
        schedule = self._session(0).schedule
        level = sigma / (1 - sigma) if schedule.path is VE_PATH else sigma
        return float(schedule.timestep(torch.tensor([level], dtype=torch.float32, device="cpu")))

    @property
    def largest_ratio(self) -> float:
        """Ratio of noise to signal of the last level that the network was trained at; infinite for pure noise."""
        table = self._session(0).schedule.table
        return math.inf if table is None else float(torch.exp(-table.rho(float(len(table.alphas_cumprod) - 1))))

    @property
    def scales_input(self) -> bool:
        """Whether the pipeline has its scheduler scale the network's input, as those of variance-preserving models."""
        return self._session(0).schedule.vp

    def _session(self, group: int) -> Session:
        if group not in self._sessions:
            places = range(group * self.batch, (group + 1) * self.batch)
            texts = [self.prompts[place % len(self.prompts)] for place in places]
            arguments = dict(self.arguments)
            if isinstance(arguments.get("negative_prompt"), str):
                arguments["negative_prompt"] = [arguments["negative_prompt"]] * self.batch
            with open_session(self.pipe, prompt=texts, **arguments) as session:
                scale = session.family.guidance_scale(self.pipe, session.conds[0].arguments, session.timesteps[0])
                self.guidance = 1.0 if scale is None else float(scale)  # known while the call is open
                if scale is not None:
                    _check_linear(session, self.pipe, self.guidance)
                self._sessions[group] = session
        return self._sessions[group]


def _check_linear(session: Session, pipe: Any, scale: float) -> None:
    """Raise unless the pipeline's guidance is that of the teacher, ``N_neg + scale (N_pos - N_neg)``."""
    shape = (2, *session.x.shape[1:])
    values = torch.linspace(-1, 1, 2 * math.prod(shape), dtype=torch.float32, device="cpu").sin()
    negative, positive = values.reshape(2, *shape)
    own = session.family.combine(pipe, negative, positive, scale)
    if not torch.allclose(own, negative + scale * (positive - negative), rtol=1e-3, atol=1e-3):
        raise DiffAccelError(
            f"{type(pipe).__name__} changes its guided prediction further in this call, which a teacher's is not. Call "
            "without guidance_rescale and the like."
        )


def _on_path(sigma: Tensor, preserves_variance: bool) -> tuple[Tensor, Tensor]:
    a, s = 1 - sigma, sigma
    if not preserves_variance:
        return a, s
    norm = (a * a + s * s).sqrt()
    return a / norm, s / norm
