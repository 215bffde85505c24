"""Bottleneck Sampling and its relatives: most steps at a lower resolution, one config for all of their rules."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

from diffaccel.config import SamplerConfig
from diffaccel.errors import DiffAccelError, size_text
from diffaccel.modules.say_once import warn_once
from diffaccel.samplers.bottleneck import stages as rules
from diffaccel.samplers.bottleneck.engine import Handover, staged
from diffaccel.samplers.bottleneck.plan import ResolutionPlan, plan_call, reach, target_of
from diffaccel.samplers.bottleneck.presets import FEW_STEPS, OTHERS, PRESETS, STAGES, shares
from diffaccel.samplers.bottleneck.resizing import Interpolation
from diffaccel.samplers.bottleneck.stages import Stage
from diffaccel.session import Sampling, Session

logger = logging.getLogger(__name__)

Preset = Literal["auto", "bottleneck", "speed", "selflift-zero", "lightx2v"]
KINDS: dict[str, Literal["spectrum", "noise", "lift"]] = {
    "speed": "spectrum", "bottleneck": "noise", "selflift-zero": "lift", "lightx2v": "noise",
}  # fmt: skip
_GENERAL = {"preset", *(field.name for field in fields(SamplerConfig))}


@dataclass(frozen=True, kw_only=True)
class Bottleneck(SamplerConfig):
    """Stages of different resolution in one call: fewer tokens in most steps, no change of weights.

    A stage is Euler's method at one size. Between stages the latents change size in one of four ways, the presets:

    - ``speed``: low to high on the call's own noise levels; the spectrum of the noisy state is kept and what is new is
      filled with noise, as soon as the coarse grid cannot hold what the state shows (arXiv 2605.18736);
    - ``bottleneck``: high, low, high; the clean estimate is resized and noised again, each stage has levels of its own
      (arXiv 2503.18940; :meth:`paper` is that form);
    - ``selflift-zero``: low to high, for models of four to eight steps: the clean estimate is enlarged in latents, and
      through pixels where the two differ most (arXiv 2609.02036);
    - ``lightx2v``: low to high, resized and noised again, with a schedule shifted by one more (LightX2V).

    ``auto`` is ``selflift-zero`` for pictures in two to nine steps and ``speed`` else. Options left None are those of
    the preset; one that the preset does not have is refused. Latents are ``(B, C, H, W)`` or ``(B, C, F, H, W)``.

    Args:
        preset: the rule between stages.
        scales: side of each stage's picture relative to the call's; the last is 1.
        stage_steps: steps of each stage (``bottleneck``); they add up to ``num_inference_steps``. None divides these.
        starts: noise level in (0, 1] at which each stage begins (``bottleneck``).
        shifts: of each stage's schedule (``bottleneck``); None for the family's, or the curve of the call's own.
        stage_end: "clean": a stage ends at level 0; "handoff": at the level at which the next one begins.
        strength_space: "sigma": ``starts`` are noise levels; "linear": noise levels before the shift.
        count: "nominal": ``stage_steps`` are made in each; "truncated": its grid from 1 to 0 has so many, of which
            only those from its start on are made.
        tolerance: share of a frequency's power that may be missing when a grid is left (``speed``); larger is faster.
        spectrum: (A, beta) of the power ``A w^-beta`` of clean latents; None for that of the pipeline's VAE.
        switches: shares of the steps after which the stages end (``selflift-zero``, ``lightx2v``; ``speed``, where they
            take the place of ``tolerance``).
        lift: share of places that go through pixels, and their least and greatest weight (``selflift-zero``).
        noise: "shared": all sizes have the call's own noise, small ones its low frequencies, so that a picture stays
            near the one that the seed gives without stages; "fresh": new noise at each size, as published.
        resize: interpolation of clean estimates.
    """

    name: ClassVar[str] = "bottleneck"
    citation: ClassVar[str] = (
        "Training-free Diffusion Acceleration with Bottleneck Sampling, arXiv 2503.18940; Spectral Progressive "
        "Diffusion, arXiv 2605.18736; SelfLift, arXiv 2609.02036; LightX2V"
    )

    preset: Preset = "auto"
    scales: tuple[float, ...] | None = None
    stage_steps: tuple[int, ...] | None = None
    starts: tuple[float, ...] | None = None
    shifts: tuple[float, ...] | None = None
    stage_end: Literal["clean", "handoff"] | None = None
    strength_space: Literal["sigma", "linear"] | None = None
    count: Literal["nominal", "truncated"] | None = None
    tolerance: float | None = None
    spectrum: tuple[float, float] | None = None
    switches: tuple[float, ...] | None = None
    lift: tuple[float, float, float] | None = None
    noise: Literal["shared", "fresh"] | None = None
    resize: Interpolation | None = None

    @classmethod
    def paper(cls, *, video: bool = False) -> Self:
        """Return the published form (arXiv 2503.18940): of FLUX.1-dev, or of HunyuanVideo for videos.

        It makes 34 or 44 steps, so the call needs ``num_inference_steps=34`` or 44.
        """
        published = STAGES["hunyuan_video" if video else "flux"]
        options = published._asdict()
        return cls(preset="bottleneck", stage_steps=options.pop("steps"), noise="fresh", **options)

    @classmethod
    def ways(cls) -> tuple[Self, ...]:
        """Return one config for each preset."""
        return tuple(cls.from_dict({"preset": preset}) for preset in KINDS)

    @classmethod
    def fits(cls, pipeline: str, family: Any) -> tuple[bool | None, str]:
        """Return whether stages work on a pipeline, by its class name and its family or None, and why."""
        if family is None:
            return None, "works where the rows and columns of latents are known, which the loaded pipeline shows"
        if not family.has_sizes:
            return False, "draws at one size only"
        return True, "runs its own loop at several sizes"

    @classmethod
    def tunable(cls) -> dict[str, tuple[Any, ...]]:
        """Return what a tuner may try, in order of growing speed."""
        return {
            "preset": ("speed",),
            "scales": ((0.75, 1.0), (0.5, 1.0), (0.5, 0.75, 1.0)),
            "tolerance": (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
        }

    def validate(self) -> None:
        super().validate()
        if self.preset != "auto":
            refused = [name for name in self._given() if name not in PRESETS[self.preset]]
            if refused:
                raise DiffAccelError(
                    f"The preset '{self.preset}' has no option {', '.join(refused)}. It has: "
                    f"{', '.join(PRESETS[self.preset])}."
                )
        elif self._given():
            raise DiffAccelError(
                f"{', '.join(self._given())} needs a preset, since 'auto' chooses one by the number of steps. Pass "
                f"preset= one of {', '.join(PRESETS)}."
            )
        self._check_scales()
        self._check_numbers()

    def _given(self) -> dict[str, Any]:
        """Return the preset's options that are not left to it."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _GENERAL}
        return {name: value for name, value in values.items() if value is not None}

    def _check_scales(self) -> None:
        scales = self.scales
        if scales is None:
            return
        if not scales or scales[-1] != 1 or not all(0 < scale <= 1 for scale in scales):
            raise DiffAccelError(f"scales is {scales}; it must be numbers in (0, 1], the last of them 1.")
        if self.preset == "bottleneck" and scales[0] != 1:
            raise DiffAccelError(f"scales is {scales}; the preset 'bottleneck' begins and ends at 1, as (1, .5, 1).")
        if self.preset != "bottleneck" and any(after <= before for before, after in pairwise(scales)):
            raise DiffAccelError(f"scales is {scales}; those of the preset '{self.preset}' grow, as (.5, .75, 1).")

    def _check_numbers(self) -> None:
        """Raise for numbers out of range, and for lists whose lengths differ."""
        options, own = self._given(), PRESETS.get(self.preset, {})
        number = len(options.get("scales") or own.get("scales", ()))
        switches = options.get("switches", own.get("switches"))
        lists = {**options, "switches": None if number == 1 and self.switches is None else switches}
        for name, count in (("stage_steps", number), ("starts", number), ("shifts", number), ("switches", number - 1)):
            values = lists.get(name)
            if values is not None and len(values) != count:
                stages = "1 stage needs" if number == 1 else f"{number} stages need"
                raise DiffAccelError(f"{name} is {values}; {stages} {count} {'number' if count == 1 else 'numbers'}.")
        limits = {
            "stage_steps": (lambda n: n >= 1, "1 or more"),
            "starts": (lambda s: 0 < s <= 1, "in (0, 1]"),
            "shifts": (lambda h: h > 0, "above 0"),
            "switches": (lambda share: 0 < share < 1, "in (0, 1)"),
            "spectrum": (lambda value: value > 0, "above 0"),
            "lift": (lambda value: 0 <= value <= 1, "in [0, 1]"),
        }
        for name, (fits, words) in limits.items():
            if not all(map(fits, options.get(name, ()))):
                raise DiffAccelError(f"{name} is {options[name]}; each must be {words}.")
        if any(after <= before for before, after in pairwise(self.switches or ())):
            raise DiffAccelError(f"switches is {self.switches}; shares of the steps must grow, as (0.3, 0.6).")
        if self.lift is not None and self.lift[1] > self.lift[2]:
            raise DiffAccelError(f"lift is {self.lift}; its least weight, the second number, is above the greatest.")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise DiffAccelError(f"tolerance is {self.tolerance}; it must be in (0, 1), such as 0.01.")
        if self.preset == "speed" and self.switches and (self.tolerance or self.spectrum):
            raise DiffAccelError(
                "switches say when the stages end, in the place of tolerance and spectrum. Pass either."
            )
        if self.starts is not None and self.starts[0] != 1:
            raise DiffAccelError(f"starts is {self.starts}; the first stage begins at 1, pure noise.")
        if self.count == "truncated" and (self.strength_space == "sigma" or self.stage_end == "handoff"):
            raise DiffAccelError(
                "count='truncated' cuts each grid before the shift and runs it to its end. Leave strength_space and "
                "stage_end out, or use count='nominal'."
            )

    # -- one call ---------------------------------------------------------------------------------------------------

    def sample(self, session: Session) -> Sampling:
        stages, handover = self.stages(session)
        total, sizes = sum(stage.steps for stage in stages), {stage.size for stage in stages}
        if len(stages) > 1 and len(sizes) == 1:
            warn_once(
                logger,
                session.pipe,
                "All stages of a call of %s are rounded to that size, so that none is faster.",
                size_text(*stages[0].size),
            )
        can_lift = session.x.ndim == 4 and session.family.draws_pixels
        if total <= FEW_STEPS and len(sizes) > 1 and handover.kind != "lift" and can_lift:
            warn_once(
                logger,
                session.pipe,
                "%d steps leave few after the change of resolution; preset='selflift-zero' is made for such calls.",
                total,
            )
        return staged(session, stages, handover)

    def stages(self, session: Session) -> tuple[list[Stage], Handover]:
        """Return the stages of a call, and how each is entered from the one before."""
        if not session.family.has_sizes:
            raise DiffAccelError(
                f"{type(session.pipe).__name__} draws at one size only, that of its network, so its calls have no "
                "stages. Use a sampler that keeps the size, such as Euler."
            )
        is_whole = self.scales == (1.0,) and not {"stage_steps", "starts", "shifts"} & self._given().keys()
        target = target_of(session, needs_grid=not is_whole)
        if is_whole:
            return rules.whole(target), Handover("noise")
        is_video, total = session.x.ndim == 5, len(target.levels) - 1
        preset = self._preset(total, is_video or not session.family.draws_pixels)
        options = {**PRESETS[preset], **self._given()}
        scales = options["scales"]
        shares = options["noise"] == "shared" and session.conds[0].arguments.get("strength") is None
        resize, weights = options.get("resize", "bilinear"), options.get("lift", (0.0, 0.0, 0.0))
        handover = Handover(KINDS[preset], resize, weights, shares)
        if preset == "speed":
            if options["switches"] is not None:
                return rules.expanded(target, scales, rules.bounds(total, options["switches"])), handover
            spectrum = options["spectrum"] or session.spectrum
            return rules.spectral(target, scales, spectrum, options["tolerance"]), handover
        if preset == "bottleneck":
            return self._renoised(session, target, options), handover
        rule = rules.switched if preset == "selflift-zero" else rules.reshifted
        return rule(target, scales, options["switches"]), handover

    def _renoised(self, session: Session, target: rules.Target, options: dict[str, Any]) -> list[Stage]:
        """Return the stages of the preset "bottleneck", with the family's numbers where none were given."""
        of_family, given = STAGES.get(session.family.name, OTHERS), self._given()
        total, scales = len(target.levels) - 1, self.scales or of_family.scales
        if len(scales) != len(of_family.scales) and (self.stage_steps is None or self.starts is None):
            raise DiffAccelError(f"{len(scales)} stages were asked for: pass stage_steps and starts for each of them.")
        steps = self.stage_steps or shares(total, of_family.steps)
        if sum(steps) != total:
            raise DiffAccelError(
                f"stage_steps is {steps}, {sum(steps)} in all, and the call makes {total}. Pass num_inference_steps="
                f"{sum(steps)}, or leave stage_steps out."
            )
        if self.shifts is not None and session.schedule.vp:
            raise DiffAccelError(
                f"shifts belong to flow models; {type(session.pipe).__name__} has a table of noise levels. Leave them "
                "out: each stage then follows the curve of the call's own levels."
            )
        is_as_family = len(scales) == len(of_family.scales) and not session.schedule.vp and "starts" not in given
        return rules.renoised(
            target,
            scales,
            steps,
            self.starts or of_family.starts,
            self.shifts or (of_family.shifts if is_as_family else None),
            hands_off=options["stage_end"] == "handoff",
            before_shift=options["strength_space"] == "linear",
            is_truncated=options["count"] == "truncated",
        )

    def _preset(self, total: int, is_latent: bool) -> str:
        """Return the preset of a call, and refuse what it cannot do: pixels of videos, and of unlisted pipelines."""
        if self.preset == "selflift-zero" and is_latent:
            raise DiffAccelError(
                "The preset 'selflift-zero' is for pictures of listed pipelines, whose pixels are known between steps; "
                "for videos and others use preset='speed'."
            )
        is_few = 1 < total <= FEW_STEPS and not is_latent
        return ("selflift-zero" if is_few else "speed") if self.preset == "auto" else self.preset

    # -- planning ---------------------------------------------------------------------------------------------------

    @classmethod
    def plan(
        cls,
        pipe: Any,
        height: int | None = None,
        width: int | None = None,
        *,
        target_speedup: float | None = None,
        config: Bottleneck | None = None,
        **arguments: Any,
    ) -> ResolutionPlan:
        """Predict stages, FLOPs and speed of a call before anything is measured; no step is made.

        Args:
            height, width: size of the picture in pixels; None for the pipeline's own.
            target_speedup: speed to reach against all steps at full size, by the least tolerance that does.
            config: what to plan; None for the default.
            arguments: those of the call, such as ``num_inference_steps``; the prompt only matters for its length.

        Raises:
            DiffAccelError: for a network without a closed form of its FLOPs, and a speed that cannot be reached.
        """
        size = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
        if target_speedup is not None:
            if config is not None:
                raise DiffAccelError("Pass target_speedup, which chooses a config, or a config, but not both.")
            return reach(cls, pipe, target_speedup, {**size, **arguments})
        return plan_call(pipe, config or cls(), {**size, **arguments})
