"""The components of a call: prompts of one picture, or pipelines, and how their velocities are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.families.conditioning import Conditioning
from diffaccel.flow import transport
from diffaccel.session import Branch, Eval, Pred, Session, bcast

SEPARATOR = "|"
TEXTS = ("prompt", "prompt_2", "prompt_3")


@dataclass(frozen=True, eq=False)
class Component:
    """One model under one prompt.

    Attributes:
        cond: handle of its conditioning.
        at: the session of another pipeline; None for the call's own.
    """

    cond: int = 0
    at: Session | None = None


@dataclass(frozen=True, eq=False)
class Components:
    """What a call superposes.

    Attributes:
        branch: "guided" where a component's prediction already is the guided one, else "positive".
        null: handle of the conditioning without prompt, where guidance is applied to the mixture.
    """

    session: Session
    items: tuple[Component, ...]
    branch: Branch = "guided"
    null: int | None = None

    def __len__(self) -> int:
        return len(self.items)

    def guidance(self, sigma: Tensor) -> float:
        """Return the scale of guidance between no prompt and the mixture at a noise level; 1 for none."""
        if self.null is None:
            return 1.0
        session = self.session
        timestep = session.schedule.timestep(sigma)
        scale = session.family.guidance_scale(session.pipe, session.conds[0].arguments, timestep)
        return 1.0 if scale is None else scale

    def requests(self, x: Tensor, sigma: Tensor, rows: Sequence[int] | None, *, with_null: bool) -> list[Eval]:
        """Return the predictions to ask for: of every component, then of no prompt."""
        requests = [self._request(item, x, sigma, rows) for item in self.items]
        if with_null and self.null is not None:
            requests.append(Eval(x, sigma, self.null, self.branch, rows))
        return requests

    def _request(self, item: Component, x: Tensor, sigma: Tensor, rows: Sequence[int] | None) -> Eval:
        if item.at is None or item.at.path is self.session.path:
            return Eval(x, sigma, item.cond, self.branch, rows, item.at)
        moved, level = transport(x, sigma.double(), self.session.path, item.at.path)
        return Eval(
            moved.to(x.dtype),
            torch.as_tensor(level, device=sigma.device).to(sigma),
            item.cond,
            self.branch,
            rows,
            item.at,
        )

    def velocities(self, preds: Sequence[Pred], x: Tensor, sigma: Tensor) -> list[Tensor]:
        """Return the velocities ``(B, C, ...)`` on the session's path, of predictions asked for by this object."""
        path, velocities = self.session.path, []
        for pred in preds:
            if pred.path is path:
                velocities.append(pred.v)
                continue
            level = bcast(sigma, x)
            eps = (x - path.alpha(level) * pred.x0) / path.sigma(level)
            velocities.append(path.velocity(pred.x0, eps, level))
        return velocities


def open_components(session: Session, *, separate: bool) -> Components:
    """Return the components of a call.

    A prompt holds those of one picture with ``|`` between them, ``"a cat | a teapot"``; a list of prompts is a batch of
    pictures. Several pipelines share a prompt, or take one component each.

    Args:
        separate: whether guidance is always applied here, also to a single component.

    Raises:
        DiffAccelError: for pictures with different numbers of components, and pipelines that cannot be superposed.
    """
    sessions: list[Session | None] = [None, *session.partners]
    arguments = session.conds[0].arguments if session.conds else {}
    parts = split_arguments(arguments)
    count = len(parts) if parts else 1
    if len(sessions) > 1 and count not in (1, len(sessions)):
        raise DiffAccelError(
            f"The prompt has {count} components, and {len(sessions)} pipelines were given. Give one prompt for all, or "
            f"{len(sessions)} components with '{SEPARATOR}' between them."
        )
    for partner in session.partners:
        check_partner(session, partner)
    places = sessions if len(sessions) > 1 else [None] * count
    items = tuple(
        Component(0 if not parts else (at or session).add_cond(**parts[i if len(parts) > 1 else 0]), at)
        for i, at in enumerate(places)
    )
    is_guided = bool(session.conds) and session.conds[0].negative is not None
    if not is_guided or len(sessions) > 1 or (len(items) == 1 and not separate):
        return Components(session, items)
    if not session.family.is_linear(session.pipe):
        raise DiffAccelError(
            "guidance_rescale changes the guided prediction by a rule that does not superpose. Call without it."
        )
    return Components(session, items, "positive", add_null(session))


def add_null(session: Session) -> int:
    """Return the handle of a conditioning without prompt, so that it is predicted in one call with the others."""
    own = session.conds[0]
    if own.negative is None:
        raise DiffAccelError("The call has no guidance, so it has no conditioning without prompt.")
    session.conds.append(Conditioning(own.negative, None, None, own.arguments))
    return len(session.conds) - 1


def split_arguments(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the text arguments of every component; [] where the call has one component, whose arguments stay."""
    given = {name: arguments[name] for name in TEXTS if arguments.get(name) is not None}
    split = {name: _split(text) for name, text in given.items()}
    counts = {len(parts) for parts in split.values()} - {1}
    if not counts:
        return []
    if len(counts) > 1:
        raise DiffAccelError(
            f"{' and '.join(split)} have {' and '.join(str(len(parts)) for parts in split.values())} components. Give "
            "each as many."
        )
    return [{name: parts[i if len(parts) > 1 else 0] for name, parts in split.items()} for i in range(max(counts))]


def _split(text: Any) -> list[Any]:
    """Split a prompt, or every prompt of a batch, into its components: one text or list of texts for each."""
    if isinstance(text, str):
        return split_prompt(text)
    rows = [split_prompt(row) for row in text]
    counts = sorted({len(row) for row in rows})
    if len(counts) > 1:
        raise DiffAccelError(
            f"The pictures of a batch have {' and '.join(map(str, counts))} components. Give each as many, or call the "
            "pipeline once for each number (in a command: --batch 1)."
        )
    return [[row[i] for row in rows] for i in range(counts[0])]


def split_prompt(text: str) -> list[str]:
    """Split a prompt at ``|``.

    Raises:
        DiffAccelError: for an empty component.
    """
    if SEPARATOR not in text:
        return [text]
    parts = [part.strip() for part in text.split(SEPARATOR)]
    if not all(parts):
        raise DiffAccelError(f"The prompt '{text}' has an empty component. Put a text on both sides of '{SEPARATOR}'.")
    return parts


# -- several pipelines -------------------------------------------------------------------------------------------------


def check_pipelines(pipes: Sequence[Any]) -> None:
    """Raise for pipelines whose latents do not mean the same.

    Raises:
        DiffAccelError: for VAEs that differ in channels, scaling or the weights of their encoder.
    """
    first = pipes[0]
    for other in pipes[1:]:
        if other is first:
            raise DiffAccelError("The same pipeline was given twice. Give each once, and several prompts instead.")
        problem = _latent_difference(getattr(first, "vae", None), getattr(other, "vae", None))
        if problem:
            raise DiffAccelError(
                f"{type(first).__name__} and {type(other).__name__} have latents of different meaning: {problem}. "
                "Superpose models that share one latent space."
            )


def _latent_difference(a: Any, b: Any) -> str:
    """Return in words why two VAEs have different latents; "" where they have the same.

    Raises:
        DiffAccelError: for weights without values.
    """
    if a is b:
        return ""
    if a is None or b is None:
        return "one has a VAE, the other none"
    for name in ("latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        one, two = a.config.get(name), b.config.get(name)
        if one != two:
            return f"{name} is {one} and {two}"
    encoders = [
        {k: v for k, v in vae.state_dict().items() if not k.startswith(("decoder", "post_quant"))} for vae in (a, b)
    ]
    if encoders[0].keys() != encoders[1].keys():
        return "their encoders have different layers"
    for name, one in encoders[0].items():
        two = encoders[1][name]
        if one.is_meta or two.is_meta:
            raise DiffAccelError(
                f"The VAEs cannot be compared: {name} of one is on the meta device and has no values. Load the "
                "weights, and compose pipelines before enable_sequential_cpu_offload()."
            )
        if one.shape != two.shape or not _agree(one, two):
            return f"their encoders have different weights ({name})"
    return ""


def _agree(one: Tensor, two: Tensor) -> bool:
    """Return whether weights are the same but for rounding to half precision, also where that was undone."""
    same_type = one.dtype == two.dtype
    one, two = (value.detach().to("cpu", torch.float32) for value in (one, two))
    if not same_type:
        return torch.allclose(one, two, rtol=1e-2, atol=1e-3)
    halves = (torch.float16, torch.bfloat16)
    return torch.equal(one, two) or any(torch.equal(one.to(h).float(), two.to(h).float()) for h in halves)


def check_partner(session: Session, partner: Session) -> None:
    """Raise for another pipeline's session that cannot be asked at the states of this one."""
    if partner.latents.shape != session.latents.shape:
        raise DiffAccelError(
            f"{type(partner.pipe).__name__} prepares latents of shape {tuple(partner.latents.shape)}, "
            f"{type(session.pipe).__name__} of {tuple(session.latents.shape)}. Superpose models of one latent shape."
        )
    first, path, theirs = session.sigmas[0], session.path, partner.schedule
    if path is not partner.path and not float(path.alpha(float(first))):
        raise DiffAccelError(
            f"{type(session.pipe).__name__} begins at pure noise, where the noise levels of "
            f"{type(partner.pipe).__name__} have no end. Give the pipelines one kind of scheduler."
        )
    highest = None if theirs.table is None else float(theirs.table.rho(theirs.num_train_timesteps - 1))
    if highest is not None and float(path.rho(float(first))) < highest - 0.1:
        raise DiffAccelError(
            f"{type(partner.pipe).__name__} was trained up to a signal-to-noise ratio of exp({2 * highest:.2f}), and "
            f"the call begins below it. Make that pipeline the first of the list."
        )
