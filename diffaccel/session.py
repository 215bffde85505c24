"""The interface of samplers: a session (one prepared pipeline call) and the events that they yield.

A sampler is a generator. It yields :class:`Eval` and receives a :class:`Pred`, yields :class:`Decode` and receives
pixels, yields :class:`Step` once per step and receives the latents to go on with, and returns the final latents::

    def euler(session):
        x = session.x
        for sigma, sigma_next in pairwise(session.sigmas):
            pred = yield Eval(x, sigma)
            x = yield Step(x + (sigma_next - sigma) * pred.v, sigma_next)
        return x

It never sees a pipeline, a network or a scheduler. All latents are spatial, ``(B, C, H, W)`` or ``(B, C, F, H, W)``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError, size_text
from diffaccel.families.conditioning import Conditioning
from diffaccel.families.spectra import spectrum_of
from diffaccel.flow import Path
from diffaccel.noise import noise_like
from diffaccel.schedules import Schedule

if TYPE_CHECKING:
    from diffaccel.families.base import Family

Branch = Literal["guided", "positive", "negative"]
OPENER = "diffaccel.runtime.probe:open_session"


@dataclass(frozen=True)
class StreamPlace:
    """Where a request stands among those of the same rows, for methods that keep what each row computed.

    Attributes:
        stream: name of the rows; requests of one name have the same rows in the same order, from step 0 to the last.
        step, steps: the step that is made, and the number of all.
    """

    stream: str
    step: int
    steps: int


@dataclass(frozen=True, eq=False)
class Eval:
    """A request for a prediction at ``x``.

    Attributes:
        x: ``(R, C, H, W)`` latents in the session's coordinates.
        sigma: noise level, scalar or one per row ``(R,)``, on the CPU.
        cond: a handle from :meth:`Session.add_cond`; 0 is the call's own prompt.
        branch: the guided prediction, or that of one conditioning alone, as superposition needs it.
        rows: for each row of ``x`` the row of the call (prompt) that it belongs to; None when they are the call's own.
        at: the session of another resolution, from :meth:`Session.at`.
        place: of samplers whose requests are not the steps of the call one by one; None elsewhere.
    """

    x: Tensor
    sigma: Tensor
    cond: int = 0
    branch: Branch = "guided"
    rows: Sequence[int] | None = None
    at: Session | None = None
    place: StreamPlace | None = None


@dataclass(frozen=True, eq=False)
class Decode:
    """A request for pixels ``(R, 3, H, W)`` in [-1, 1] of clean latents ``x0``."""

    x0: Tensor
    at: Session | None = None


@dataclass(frozen=True, eq=False)
class Encode:
    """A request for clean latents ``(R, C, H, W)`` of pixels ``(R, 3, H, W)`` in [-1, 1]."""

    pixels: Tensor
    at: Session | None = None


@dataclass(frozen=True, eq=False)
class Stages:
    """An announcement, as the first event: the steps to come in order, each with the session of its resolution.

    Attributes:
        parts: the session and the ``(n + 1,)`` noise levels of every stage of n steps; the last at the call's own size.
    """

    parts: Sequence[tuple[Session, Tensor]]


@dataclass(frozen=True, eq=False)
class Advance:
    """A request for one step of the pipeline's own scheduler, in the pipeline's own coordinates, layout and dtype.

    Attributes:
        latents: :attr:`Session.latents`, or the reply to the previous request of this kind.
        index: of the step's timestep in :attr:`Session.timesteps`, which are taken in order.
    """

    latents: Tensor
    index: int


@dataclass(frozen=True, eq=False)
class Step:
    """A finished step: the state is now ``x`` at ``sigma``. Progress, callbacks and interruption happen here."""

    x: Tensor
    sigma: Tensor


@dataclass(eq=False)
class Pred:
    """A prediction at ``(x, sigma)``: velocity ``v = dx/dsigma``, clean sample ``x0`` and noise ``eps``."""

    path: Path
    x: Tensor
    sigma: Tensor
    v: Tensor
    skipped: bool = False  # a cache stood in for the network

    @cached_property
    def x0(self) -> Tensor:
        """The posterior mean ``E[x0 | x]``: ``x - sigma v`` on both the linear and the VE path."""
        return self.path.x0(self.x, self.v, self.sigma)

    @cached_property
    def eps(self) -> Tensor:
        """The noise that explains ``x`` given ``x0``: ``x = alpha x0 + sigma eps``."""
        return self.path.eps(self.x, self.v, self.sigma)


@dataclass(frozen=True, eq=False)
class Progress:
    """Progress in predictions; the reply is whether the user interrupts. ``best`` makes what a callback is shown."""

    done: int
    total: int
    best: Callable[[], dict[str, Any] | None] | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Draft:
    """A wish: network calls from here on are made under other methods of the registry, until the next such event.

    Attributes:
        acceleration: methods and settings in one word, such as "taylorseer:interval=4"; "" for calls in full.
    """

    acceleration: str = ""


@dataclass(frozen=True, eq=False)
class Lent:
    """The reply to :class:`Draft`: what of it the sampler itself follows.

    Attributes:
        loop: config of the sampler that draws, or None for the sampler's own steps.
        steps: number of steps that it makes, or None for the call's own.
        rows_apart: whether what the methods on the network do to a row depends on that row alone.
    """

    loop: Any = None
    steps: int | None = None
    rows_apart: bool = True


class Lender(Protocol):
    """Who puts methods on a pipeline's network for a part of a call."""

    told: tuple[str, ...]  # names of those put on that must be told the step of every network call

    def put_on(self, acceleration: str) -> Lent:
        """Put the methods of a wish on, in the place of those of the wish before."""

    def take_off(self) -> None:
        """Take off what is on; it may be called twice."""


Event = Eval | list[Eval] | Decode | Encode | Advance | Step | Progress | Stages | Draft
Sampling = Generator[Event, Any, Tensor]


@dataclass(eq=False)
class Session:
    """One prepared call of one pipeline at one resolution.

    Attributes:
        conds: the call's own conditioning, then those added by :meth:`add_cond`.
        latents: the pipeline's own initial latents, in its layout and dtype.
        timesteps: the timesteps that the scheduler will be stepped with, on the pipeline's device.
        step_arguments: further arguments of the scheduler's step, such as ``eta``.
        read_schedule: the scheduler's noise schedule, or the reason why samplers cannot follow it.
        dtype: the dtype in which the pipeline itself keeps its latents.
        height, width: size of the picture in pixels.
        generator: the caller's generator or list of generators, or None for torch's global one.
        positional: names of the network's arguments that the pipeline passes by position.
        returns: ``return_dict`` as the pipeline passes it to its network, where it does.
        noised: the clean latents and the noise that the pipeline mixed for its first step, of an image to begin at.
        prepared: results of the pipeline's methods that the family asks for, by which inpainting keeps its image.
        scalar_time: whether the pipeline passes its network one time for all rows, a tensor without axes.
        reopen: probes the call again with changed arguments; ``fresh_text=True`` encodes its prompts anew.
        stock_levels: whether noise levels are kept on the scheduler's device, for equality to the bit.
        folder: where a sampler may leave files beside the pictures; None for nowhere.
        shared: whether all processes of the launch make this one call together.
        beside: options of the methods on the network that are told their steps.
        report: the sampler's report on the run, JSON-ready.
        partners: sessions of the same call of other pipelines that the sampler composes with this one.
        lender: puts methods on the network for a part of the call; None where nobody does.
    """

    pipe: Any
    family: Family
    scheduler: Any
    conds: list[Conditioning]
    latents: Tensor
    timesteps: Tensor
    step_arguments: dict[str, Any]
    read_schedule: Schedule | DiffAccelError
    dtype: torch.dtype
    height: int
    width: int
    generator: torch.Generator | list[torch.Generator] | None
    reopen: Callable[..., Session]
    positional: tuple[str, ...] = ()
    returns: dict[str, Any] = field(default_factory=dict)
    noised: tuple[Tensor, Tensor] | None = None
    prepared: dict[str, Any] = field(default_factory=dict)
    scalar_time: bool = False
    stock_levels: bool = False
    folder: FilePath | None = None
    shared: bool = False
    beside: tuple[dict[str, Any], ...] = ()
    report: dict[str, Any] = field(default_factory=dict)
    partners: list[Session] = field(default_factory=list)
    lender: Lender | None = None
    _siblings: dict[tuple[int, int], Session] = field(default_factory=dict, repr=False)

    @property
    def schedule(self) -> Schedule:
        """Noise levels, timesteps and prediction type of the call.

        Raises:
            DiffAccelError: for a scheduler whose convention samplers cannot follow.
        """
        if isinstance(self.read_schedule, DiffAccelError):
            raise self.read_schedule
        return self.read_schedule

    @cached_property
    def x(self) -> Tensor:
        """``(B, C, H, W)`` initial latents in the coordinates of :attr:`path`, fp32."""
        rows = self.family.unwrap(self.latents, self.conds[0].arguments)
        state = self.family.spatial(self.pipe, rows, self.height, self.width)
        return self.schedule.from_pipeline(state.to(torch.promote_types(state.dtype, torch.float32)))

    @property
    def denoiser(self) -> Any:
        """The network of the first step; see :meth:`Family.network` for pipelines with two."""
        return self.family.network(self.pipe, self.timesteps[0])

    @cached_property
    def sigmas(self) -> Tensor:
        """``(n + 1,)`` noise levels of the call, fp32 on the CPU; with ``stock_levels`` on the scheduler's device."""
        return self.schedule.stock_sigmas if self.stock_levels else self.schedule.sigmas

    @property
    def path(self) -> Path:
        """The noise path whose coordinates ``x`` has."""
        return self.schedule.path

    @property
    def latent_pixels(self) -> int:
        """Pixels a latent, along a side."""
        return self.height // self.x.shape[-2]

    @cached_property
    def spectrum(self) -> tuple[float, float]:
        """``(A, beta)`` of the power spectrum ``A w^-beta`` of clean latents."""
        return spectrum_of(self.pipe)

    @property
    def device(self) -> torch.device:
        """The device of the pipeline's latents."""
        return self.latents.device

    @property
    def prompts(self) -> list[str]:
        """The prompt of every row; "" where the call was given embeddings, or takes no prompt."""
        prompt = self.conds[0].arguments.get("prompt")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [""])
        rows_per_prompt = len(self.x) // len(prompts)
        return [text or "" for text in prompts for _ in range(rows_per_prompt)]

    def decoder(self, device: torch.device | str | None = None) -> Callable[[Tensor], Tensor]:
        """Return a thread-safe function from clean latents ``(R, C, H, W)`` to pixels in [-1, 1].

        Args:
            device: where it decodes, with a copy of the decoder if that is not the pipeline's own device.
        """
        family, arguments = self.family, self.conds[0].arguments
        target = self.device if device is None else torch.device(device)
        pipe = self.pipe if target == self.device else _with_decoder_on(self.pipe, target)
        return lambda x0: family.decode(pipe, x0.to(target), arguments)

    def randn_like(self, x: Tensor) -> Tensor:
        """Draw standard normal noise of the shape of ``x`` from the caller's generator, or row by row from several."""
        return noise_like(x, self.generator)

    def at(self, height: int, width: int) -> Session:
        """Return the session of the same call at another resolution (pixels).

        Text encodings and network are shared, noise is drawn from the generator's initial state, and each resolution is
        probed once.

        Raises:
            DiffAccelError: when the call fixed its latents, or the size does not fit the model.
        """
        if (height, width) == (self.height, self.width):
            return self
        if (height, width) not in self._siblings:
            if self.conds[0].arguments.get("latents") is not None:
                raise DiffAccelError(
                    f"`latents` were passed for {size_text(self.height, self.width)}; it also works at "
                    f"{size_text(height, width)}. Leave `latents` out and pass a `generator`."
                )
            self.family.check_size(self.pipe, height, width)
            sibling = self.reopen(**self.family.resized(self.conds[0].arguments, height, width))
            sibling._siblings, sibling.stock_levels = self._siblings, self.stock_levels
            self._siblings[self.height, self.width] = self
            self._siblings[height, width] = sibling
        return self._siblings[height, width]

    def add_cond(self, **arguments: Any) -> int:
        """Add the call's conditioning with ``arguments`` (say ``prompt=``) replaced; return its ``Eval.cond``."""
        other = self.reopen(fresh_text=True, **arguments)
        if other.latents.shape != self.latents.shape:
            raise DiffAccelError(
                f"The added conditioning has latents of shape {tuple(other.latents.shape)}, the call "
                f"{tuple(self.latents.shape)}. Give both the same batch size and resolution."
            )
        self.conds.append(other.conds[0])
        return len(self.conds) - 1


def open_session(pipe: Any, **arguments: Any) -> Any:
    """Open a session of a pipeline call without making it, as a method must to plan one.

    Methods do not see the room that makes calls; this is :func:`diffaccel.open_session`, by its name.
    """
    module, _, function = OPENER.partition(":")
    return getattr(import_module(module), function)(pipe, **arguments)


def _with_decoder_on(pipe: Any, device: torch.device) -> Any:
    """Return a view of the pipeline whose VAE is a copy on another device."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return pipe

    class View:
        def __getattr__(self, name: str) -> Any:
            return getattr(pipe, name)

    view: Any = View()
    view.vae = copy.deepcopy(vae).to(device)
    return view


def bcast(sigma: Tensor, x: Tensor) -> Tensor:
    """Reshape ``sigma`` to multiply ``x``: a scalar stays on the CPU (no device sync), ``(R,)`` is ``(R, 1, ...)``."""
    if sigma.ndim == 0:
        return sigma
    return sigma.to(x.device).reshape(-1, *[1] * (x.ndim - 1))
