"""A superposition made from a config and a session, with everything checked before the first prediction."""

from __future__ import annotations

import logging
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError, shortened
from diffaccel.files import obstacle
from diffaccel.modules.say_once import warn_once
from diffaccel.samplers.superdiff import formulas, particles
from diffaccel.samplers.superdiff.checks import check_prior
from diffaccel.samplers.superdiff.components import SEPARATOR, Components, open_components
from diffaccel.samplers.superdiff.composition import Densities
from diffaccel.samplers.superdiff.engine import Superposition
from diffaccel.samplers.superdiff.regions import masks_of
from diffaccel.samplers.superdiff.trace import Trace
from diffaccel.samplers.superdiff.transitions import ReverseKernel, growth, reverse_kernels
from diffaccel.session import Session

logger = logging.getLogger(__name__)
PRODUCTS = ("product", "fkc", "mcmc")
FEW_STEPS = 20
MOST_GROWTH = 2.0  # of the standard deviation at the end; stable steps come to 0.9 to 1.1


def superposition(config: Any, session: Session) -> Superposition:
    """Return the superposition of a call.

    Raises:
        DiffAccelError: for options that do not fit the call's components, noise levels or guidance.
    """
    _check_call(config, session)
    sigmas = _levels(config, session)
    parts = open_components(session, separate=config.op in PRODUCTS or config.particles > 1)
    if len(sigmas) < 3 and not float(sigmas[-1]) and len(parts) > 1:
        raise DiffAccelError(
            f"The call makes {len(sigmas) - 1} step, and the last tracks no density. Ask for num_inference_steps=2 or "
            "more; 50 are usual."
        )
    if len(parts) == 1 and session.pipe is not None:
        _warn_of_one(config, session)
    if len(parts) > 1 and len(sigmas) - 1 < FEW_STEPS and config.op in ("or", "and") and session.pipe is not None:
        warn_once(logger, session.pipe, "%d steps are few for tracked densities; take 25 or more.", len(sigmas) - 1)
    _check_density(config, session, parts)
    count, regions = len(parts), max(len(config.regions), 1)
    _check_counts(config, count, regions, session.x[0].numel())
    x = particles.spread(session, config.particles, _initial_std(config, session))
    if config.first_sigma:
        x = x * float(session.path.sigma(float(sigmas[0])) / session.path.sigma(float(session.sigmas[0])))
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    like = torch.zeros((), dtype=wide, device=x.device)
    rule, total = mix_rule(config, count, parts.null is not None, like)
    if total != 1 and parts.null is None and config.op in PRODUCTS and not _begins_at_picture(session):
        x = x / math.sqrt(total)  # particles begin in the product of the first densities
    masks = masks_of(config.regions, x) if config.regions else None
    sizes = (
        torch.full((1, 1), float(x[0].numel()), dtype=like.dtype, device=like.device)
        if masks is None
        else masks.sum(1, keepdim=True).to(like)
    )
    columns = count + (parts.null is not None)
    bias = formulas.per_region(config.bias or (0.0,) * count, regions if len(config.bias) > count else 1, like)
    rows = None
    if config.particles > 1:
        rows = [row for row in range(len(session.x)) for _ in range(config.particles)]
    return Superposition(
        session, parts, config, x, rows, masks, sigmas, _kernels(config, session, sigmas), rule, total,
        Densities(
            like.new_zeros(regions, len(x), columns), _initial_density(session, sigmas, x, masks, sizes),
            like.new_zeros(len(x)),
        ),
        sizes, Trace(bias),
    )  # fmt: skip


def mix_rule(config: Any, count: int, has_null: bool, like: Tensor) -> tuple[formulas.MixRule | None, float]:
    """Return what a config aims at and the sum of its mixing weights; None for AND of the paper.

    Args:
        like: a tensor of the dtype and device of densities.
    """
    regions = max(len(config.regions), 1)
    op, per = config.op, regions if len(config.weights) > count else 1
    if op == "and":
        return None, 1.0
    if op == "dombi":
        tree = formulas.parse(config.formula, count) if config.formula else formulas.conjunction(count)
        return formulas.logic(tree, config.hardness, config.negation, count if has_null else None), 1.0
    default = 1.0 if op in PRODUCTS else 1 / count
    weights = config.weights or (default,) * count
    table = formulas.per_region(weights, per, like)
    if op == "or":
        return formulas.mixture(table, config.temperature), 1.0
    return formulas.geometric(table), 1.0 if op == "average" else sum(weights)


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_call(config: Any, session: Session) -> None:
    """Raise for a negative guidance scale, and for a folder that could not be written at the end.

    Pipelines take a negative scale for none.
    """
    arguments = session.conds[0].arguments if session.conds else {}
    for name in ("guidance_scale", "true_cfg_scale"):
        scale = arguments.get(name)
        if isinstance(scale, int | float) and scale < 0:
            raise DiffAccelError(f"{name} is {scale}; it must be 0 or more, where 1 or less is no guidance.")
    if not config.folder:
        return
    try:
        reason = obstacle(Path(config.folder))
    except OSError as error:
        reason = str(error)
    if reason:
        raise DiffAccelError(
            f"SuperDiff.folder is {shortened(repr(config.folder), 100)}, which cannot be written: {reason}. Give "
            "another."
        )


def _warn_of_one(config: Any, session: Session) -> None:
    """Warn once for a pipeline of a picture with nothing to compose; a formula or a product may be of one component."""
    if config.op in ("and", "or", "average") or (config.op == "dombi" and not config.formula):
        warn_once(
            logger, session.pipe,
            "The picture has one component, so op '%s' composes nothing. Write prompts with '%s' between them, as "
            "'a cat %s a teapot' (in a command, give several; embeddings are one), or accelerate several pipelines.",
            config.op, SEPARATOR, SEPARATOR,
        )  # fmt: skip


def _levels(config: Any, session: Session) -> Tensor:
    """Return the call's noise levels, the first replaced where the config says so; the state is scaled to it."""
    sigmas = session.sigmas
    if config.first_sigma:
        if _begins_at_picture(session):
            raise DiffAccelError(
                "SuperDiff.first_sigma replaces the level of pure noise, and the call begins at a picture. Change the "
                "call's strength instead."
            )
        if not float(sigmas[1]) < config.first_sigma <= float(sigmas[0]):
            raise DiffAccelError(
                f"SuperDiff.first_sigma is {config.first_sigma}; it must lie above the call's second level, "
                f"{float(sigmas[1]):.5g}, and not above its first, {float(sigmas[0]):.7g}."
            )
        sigmas = sigmas.clone()
        sigmas[0] = config.first_sigma
    if any(float(after) >= float(before) for before, after in pairwise(sigmas.tolist())):
        raise DiffAccelError(
            "The noise levels of the call do not fall from step to step, so no density can be tracked."
        )
    return sigmas


def _kernels(config: Any, session: Session, sigmas: Tensor) -> list[ReverseKernel]:
    kind: Any = "euler" if config.op == "fkc" else config.kernel
    times = [float(sigma) for sigma in sigmas]
    if kind == "euler" and not float(session.path.alpha(times[0])):
        raise DiffAccelError(
            f"The call begins at noise level {times[0]:g}, pure noise, where an Euler-Maruyama step has no end. Set "
            "first_sigma=0.999, or kernel='matched'."
        )
    kernels = reverse_kernels(session.path, times, kind, config.data_std)
    if kind == "euler" and (factor := growth(session.path, times, kernels)) > MOST_GROWTH:
        logger.warning(
            "%d Euler-Maruyama steps from noise level %g are unstable: Gaussian data would end %.3g times too wide, so "
            "the result shows nothing of its prompts. Take more steps, or %s.",
            len(kernels), times[0], factor,
            "another op than 'fkc'" if config.op == "fkc" else "kernel='matched'",
        )  # fmt: skip
    return kernels


def _check_counts(config: Any, count: int, regions: int, size: int) -> None:
    """Raise for lists that do not have one number for every component, and more components than dimensions."""
    for name in ("weights", "bias"):
        values = getattr(config, name)
        if values and len(values) not in (count, count * regions):
            several = f", or {count * regions} for {regions} regions" if regions > 1 else ""
            raise DiffAccelError(
                f"SuperDiff.{name} has {len(values)} numbers, and the picture {count} components: give {count}"
                f"{several}."
            )
    if config.op in ("or", "average") and config.weights:
        for begin in range(0, len(config.weights), count):
            check_prior(config.weights[begin : begin + count])
    if config.op in PRODUCTS and config.weights and sum(config.weights) <= 0:
        raise DiffAccelError(
            f"The exponents {config.weights} of a product sum to {sum(config.weights):g}; they must sum to more than "
            "0. Give a negative one less weight, as (1, -0.5)."
        )
    if config.op == "and" and count > size + 1:
        raise DiffAccelError(f"AND of {count} components needs {count - 1} dimensions, and latents have {size}.")


def _check_density(config: Any, session: Session, parts: Components) -> None:
    """Raise where the density that was asked for is not to be had."""
    is_guided = bool(session.conds) and session.conds[0].negative is not None
    if config.density == "conditional":
        if parts.branch == "guided" and is_guided and len(parts) > 1:
            raise DiffAccelError(
                "Several pipelines under guidance return guided predictions alone, so density='conditional' cannot be "
                "had. Leave density out, or call without guidance."
            )
        if _embeds_guidance(session):
            raise DiffAccelError(
                f"{type(session.pipe).__name__} embeds its guidance in the network, whose prediction is the guided "
                "one: density='conditional' cannot be had. Leave density out."
            )
    if config.density == "guided" and config.eta == 0 and parts.null is not None:
        raise DiffAccelError("eta=0 tracks the conditional predictions. Leave density out, or set eta=1.")


def _embeds_guidance(session: Session) -> bool:
    if session.family is None or not session.conds:
        return False
    network = session.family.network(session.pipe, session.timesteps[0])
    return bool(getattr(getattr(network, "config", None), "guidance_embeds", False))


def _begins_at_picture(session: Session) -> bool:
    return bool(session.conds) and session.conds[0].arguments.get("strength") is not None


def _initial_std(config: Any, session: Session) -> float:
    if config.particles == 1:
        return 1.0
    if _begins_at_picture(session):
        raise DiffAccelError("Particles begin at pure noise, and the call at a picture. Use particles=1.")
    return particles.initial_std(session)


def _initial_density(session: Session, sigmas: Tensor, x: Tensor, masks: Tensor | None, sizes: Tensor) -> Tensor:
    """Return the log-density of the initial state under pure noise of the first level, ``(R, B)``."""
    scale = session.path.sigma(float(sigmas[0]))
    squares = x.flatten(1).to(sizes).square()
    total = squares.sum(1)[None] if masks is None else torch.einsum("bd,rd->rb", squares, masks.to(sizes))
    variance = float(scale) ** 2
    return -0.5 * (total / variance + sizes * math.log(2 * math.pi * variance))
