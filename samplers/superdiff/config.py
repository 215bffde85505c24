"""SuperDiff: models and prompts composed by their densities, and the rival rules of composition beside it."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from diffaccel.config import Level, Machine, SamplerConfig
from diffaccel.errors import DiffAccelError
from diffaccel.samplers.superdiff.checks import check_prior
from diffaccel.samplers.superdiff.components import SEPARATOR, Components, check_pipelines
from diffaccel.samplers.superdiff.formulas import parse
from diffaccel.samplers.superdiff.opening import PRODUCTS, superposition
from diffaccel.samplers.superdiff.regions import check_region
from diffaccel.samplers.superdiff.transitions import KernelKind
from diffaccel.session import Sampling, Session

logger = logging.getLogger(__name__)

Operator = Literal["or", "and", "average", "product", "dombi", "fkc", "mcmc"]


@dataclass(frozen=True, kw_only=True)
class SuperDiff(SamplerConfig):
    """Superposition of prompts or pipelines, ``y ~ N(sum_i kappa_i mu_i, V I)`` (Skreta et al., arXiv 2412.17762).

    The log-density of the state under every component follows from the step itself, ``dL_i = log N(y; mu_i, V) - log
    k(x|y)``, without a divergence of the network, and decides the mixing:

    - ``or``: ``kappa = softmax(T L + log w)``, a sample of the mixture;
    - ``and``: where all log-densities are equal, by a projection for any number of components;
    - ``average``: fixed weights (Composable Diffusion, arXiv 2206.01714);
    - ``product``: ``prod_i q_i^beta_i`` with weighted particles; a negative exponent is NOT;
    - ``dombi``: logic by power norms of densities, any formula (Blohm and Garg, ICLR 2026);
    - ``fkc``: the product by Feynman-Kac correctors in Euler-Maruyama form (arXiv 2503.02819);
    - ``mcmc``: the product by Langevin moves at every level (arXiv 2506.08894).

    For two prompts of one model take ``dombi``: by a held-out judge it shows the weaker concept better than averaging,
    the products and the published AND do (``docs/superdiff.md`` has the table; over ``and`` here it is not told apart).

    The components of one picture are given in its prompt, with ``|`` between them: ``pipe("a cat | a teapot")``; a list
    of such prompts is a batch. Several pipelines, ``accelerate([a, b], SuperDiff())``, share a prompt or take one
    component each. Latents are ``(B, C, H, W)`` or ``(B, C, F, H, W)``; L and kappa are (B, M), in nats.

    Args:
        op: the operator.
        weights: of ``or`` (prior) and ``average``, which sum to 1, or exponents of the products; () for equal ones,
            1 each in a product. With regions those of all regions, one region after the other.
        bias: of ``and`` in nats: how far the log-densities are to lie apart at the end; a higher one favours its
            component.
        temperature: T of ``or``; only 1 samples the mixture.
        switch: whether a step of ``or`` is one component's, drawn by its weight, in place of the mean of all: samples
            then have exactly the law of a coin flip between the components' own samplers, at any number of steps; the
            mean, the published form, has it in the limit of many. "auto" switches in steps without guidance, for which
            this is so. Without noise (eta 0) and with particles it is always the mean.
        formula: of ``dombi``, as "p1 and not p2"; "" for the AND of all. ``^`` is exclusive or.
        hardness: inverse temperature of ``dombi``'s and, or; large latents are nearly hard at 1.
        negation: gamma of ``dombi``'s not.
        regions: masks as rows of digits with ``/`` between them, stretched over the picture: ("10", "01") are its left
            and right half. Digits 0 to 9 are shares. Each region has densities and weights of its own.
        eta: 1 for the stochastic sampler, 0 for the probability flow with one further prediction per component.
        kernel: noise of a step: "matched" to the data, exact for Gaussian data; "posterior", DDPM's; "euler", an
            Euler-Maruyama step.
        data_std: standard deviation of clean latents per coordinate, for "matched"; of data that fall into modes,
            that within a mode tracks densities best.
        density: which prediction is a component's model: the "conditional" one without guidance, or the "guided" one;
            "auto" is conditional wherever the pipeline has both.
        curvature: correct ``and`` for the noise that its projection takes away; one further prediction per component
            and pair. It matters in few dimensions.
        repair: whether ``and`` also takes back differences that earlier steps left; False is the paper's form.
        particles: number K of weighted particles per picture (sequential Monte Carlo), of which one is returned.
        resample: resample the particles when their effective number falls below this share.
        langevin: moves of ``mcmc`` at every level.
        snr: size of these moves.
        probe: step of finite differences, in units of the noise level per coordinate.
        first_sigma: noise level in place of the call's first one; 0 leaves it. Euler-Maruyama needs one below 1 on flow
            models.
        folder: where ``density.json`` and ``density.png`` are written.
    """

    name: ClassVar[str] = "superdiff"
    citation: ClassVar[str] = (
        "The Superposition of Diffusion Models Using the Ito Density Estimator, arXiv 2412.17762; Feynman-Kac "
        "Correctors in Diffusion, arXiv 2503.02819"
    )
    composes: ClassVar[bool] = True
    leaves_files: ClassVar[bool] = True
    separator: ClassVar[str] = f" {SEPARATOR} "
    command: ClassVar[str] = 'diffaccel sample "cat face" "teapot" --sampler superdiff --superdiff.op dombi'

    op: Operator = "and"
    weights: tuple[float, ...] = ()
    bias: tuple[float, ...] = ()
    temperature: float = 1.0
    switch: Literal["auto", "always", "never"] = "auto"
    formula: str = ""
    hardness: float = 0.1
    negation: float = 1.0
    regions: tuple[str, ...] = ()
    eta: float = 1.0
    kernel: KernelKind = "matched"
    data_std: float = 1.0
    density: Literal["auto", "conditional", "guided"] = "auto"
    curvature: bool = False
    repair: bool = True
    particles: int = 1
    resample: float = 0.5
    langevin: int = 1
    snr: float = 0.1
    probe: float = 1e-3
    first_sigma: float = 0.0
    folder: str = ""

    @classmethod
    def paper(cls, *, op: Literal["or", "and"] = "and", first_sigma: float = 0.0, **options: Any) -> Self:
        """Return the published rule (arXiv 2412.17762): Euler-Maruyama steps, equal increments, the mean of components.

        It is meant for 1000 steps on the levels of an Euler scheduler, guidance 7.5. Not taken over are slips of the
        published code: the wrong sign of ``|score|^2`` in its OR for text-to-image models, and an Euler-Maruyama step
        to the clean sample at the end, which leaves noise in it; nor that it stops at two components.
        """
        own: dict[str, Any] = {"repair": False} if op == "and" else {"switch": "never"}
        return cls(op=op, kernel="euler", first_sigma=first_sigma, **own, **options)

    @classmethod
    def support(cls, machine: Machine) -> tuple[Level, str]:
        return "fast", "works everywhere: time follows NFE, one of each component and one of no prompt a step"

    @property
    def keeps_rows(self) -> bool:  # type: ignore[override]  # of a config, not of its class
        """Whether each row of the network calls goes on from the same row.

        Resampled particles do not, and neither do finite differences, which a cache's forecasts of two states a small
        step apart would spoil.
        """
        return self.particles == 1 and not self.takes_differences

    @property
    def takes_differences(self) -> bool:
        """Whether steps take finite differences of predictions."""
        return self.curvature or (self.eta == 0 and self.op != "average")

    def switches(self, guidance: float) -> bool:
        """Return whether a step of some guidance scale is one component's."""
        is_drawn = self.switch == "always" or (self.switch == "auto" and guidance == 1)
        return is_drawn and self.op == "or" and self.eta > 0 and self.particles == 1

    @property
    def negates(self) -> bool:
        """Whether the formula has a not, which is relative to no prompt where there is guidance."""
        return bool(re.search(r"\bnot\b|\^", self.formula))

    @staticmethod
    def check_pipelines(pipes: Sequence[Any]) -> None:
        """Raise for pipelines that cannot be composed: their latent spaces differ."""
        check_pipelines(pipes)

    def counts_guided(self, parts: Components) -> bool:
        """Return whether the guided prediction is the model whose density is tracked."""
        return self.density == "guided" and parts.null is not None

    # -- checks --------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        super().validate()
        self._check_numbers()
        self._check_belongings()
        for region in self.regions:
            check_region(region)
        if self.op in ("or", "average") and self.weights and not self.regions:
            check_prior(self.weights)
        if self.formula:
            parse(self.formula)
        if self.temperature != 1 and self.op == "or":
            logger.warning("SuperDiff.temperature is %s: only 1 samples the mixture.", self.temperature)

    def _check_numbers(self) -> None:
        limits: dict[str, tuple[bool, str]] = {
            "temperature": (self.temperature > 0, "above 0"),
            "hardness": (self.hardness > 0, "above 0"),
            "negation": (self.negation >= 0, "0 or more"),
            "eta": (
                self.eta in (0, 1),
                "1 (stochastic) or 0 (probability flow); no other has an estimator",
            ),
            "data_std": (self.data_std > 0, "above 0"),
            "particles": (self.particles >= 1, "1 or more"),
            "resample": (0 <= self.resample <= 1, "in [0, 1]"),
            "langevin": (self.langevin >= 1, "1 or more"),
            "snr": (self.snr > 0, "above 0"),
            "probe": (self.probe > 0, "above 0"),
            "first_sigma": (self.first_sigma >= 0, "0 (the call's own) or more"),
        }
        for name, (fits, words) in limits.items():
            if not fits:
                raise DiffAccelError(f"SuperDiff.{name} is {getattr(self, name)}; it must be {words}.")

    def _check_belongings(self) -> None:
        """Raise for options of another operator, which would have no effect."""
        belongs = {
            "weights": (*PRODUCTS, "or", "average"), "bias": ("and",), "temperature": ("or",), "switch": ("or",),
            "formula": ("dombi",), "hardness": ("dombi",), "negation": ("dombi",), "curvature": ("and",),
            "repair": ("and",), "langevin": ("mcmc",), "snr": ("mcmc",),
        }  # fmt: skip
        for name, ops in belongs.items():
            value = getattr(self, name)
            if self.op not in ops and value != type(self).__dataclass_fields__[name].default:
                advice = " Write priors of OR as weights." if name == "bias" and self.op == "or" else ""
                raise DiffAccelError(
                    f"SuperDiff.{name} is {value}, which has no effect: it is of op {' and '.join(ops)}, and op is "
                    f"'{self.op}'.{advice}"
                )
        self._check_effects()
        if self.eta == 0 and (self.op in PRODUCTS or self.particles > 1 or self.curvature):
            what = f"op '{self.op}'" if self.op in PRODUCTS else "particles" if self.particles > 1 else "curvature"
            raise DiffAccelError(f"{what} needs the stochastic sampler: set eta=1.")
        if self.particles > 1 and self.op in ("and", "mcmc"):
            raise DiffAccelError(
                f"SuperDiff.particles is {self.particles}, and op '{self.op}' gives them no weights. Use one particle, "
                "or op='product' or 'dombi'."
            )
        if self.regions and (self.particles > 1 or self.curvature):
            what = "particles" if self.particles > 1 else "curvature"
            raise DiffAccelError(f"regions and {what} cannot be combined. Leave one of them out.")
        if self.op == "fkc" and self.kernel != "matched":
            raise DiffAccelError("op 'fkc' always makes Euler-Maruyama steps. Leave kernel out.")

    def _check_effects(self) -> None:
        """Raise for options that another option leaves without effect."""
        is_matched = self.kernel == "matched" and self.op != "fkc"
        needs: dict[str, tuple[bool, str]] = {
            "resample": (self.particles > 1, "particles above 1"),
            "probe": (self.eta == 0 or self.curvature, "curvature=True or eta=0"),
            "kernel": (self.eta > 0, "the stochastic sampler, eta=1"),
            "switch": (self.eta > 0 and self.particles == 1, "the stochastic sampler, eta=1, and one particle"),
            "data_std": (self.eta > 0 and is_matched, "kernel='matched' and eta=1, and an op other than 'fkc'"),
            "negation": (self.negates, "a 'not' or '^' in formula"),
        }
        for name, (has_effect, words) in needs.items():
            value = getattr(self, name)
            if not has_effect and value != type(self).__dataclass_fields__[name].default:
                raise DiffAccelError(f"SuperDiff.{name} is {value!r}, which has no effect: it needs {words}.")

    def sample(self, session: Session) -> Sampling:
        return superposition(self, session).sample()
