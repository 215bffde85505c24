"""Settings of a comparison's measurements: distances, networks, the reference, times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from diffaccel.eval.comparison import zoo_reference
from diffaccel.eval.comparison.fidelity import BUILT_IN, Distance
from diffaccel.eval.comparison.reference_statistics import is_statistics_file
from diffaccel.eval.comparison.zoo_reference import ShippedStatistics
from diffaccel.eval.images.open import open_source
from diffaccel.eval.images.source import Source
from diffaccel.eval.networks.by_spec import Network
from diffaccel.eval.networks.extractors import as_clip, extractor
from diffaccel.eval.networks.extractors.base import Extractor
from diffaccel.eval.networks.extractors.clip import ClipExtractor
from diffaccel.eval.networks.scorers import Scorer
from diffaccel.eval.sets.run import Run
from diffaccel.runs.loading import pick_device


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Everything that is measured of every run against the baseline.

    Attributes:
        others: the baseline with other seeds: the noise floor of every metric.
        distances: of paired pictures, or of the frames of videos; PSNR and SSIM need no network.
        extractors: networks for distances of distributions of pictures.
        clips: CLIPs for the fit of pictures to prompts, which the runs must know, for CLIP-I and for CMMD.
        scorers: networks that score pictures by human preference.
        video: network for the Fréchet distance of videos.
        reference: images that distributions are compared with, or the path of a file that keeps only their
            statistics, or those that ship with a zoo model, which go with a network of their own; the baseline's own
            pictures when there is none.
        timing: result of :func:`diffaccel.eval.timing.turns.take_turns`; without it seconds are the runs' own.
        prompts: a file or a packaged set that names the category of every prompt; None looks in the packaged sets.
        allow_mixed_n: compare runs of different prompts and seeds on what they share, and distributions on all.
    """

    others: Run | None = None
    distances: Sequence[Distance] = BUILT_IN
    extractors: Sequence[Extractor] = ()
    clips: Sequence[ClipExtractor] = ()
    scorers: Sequence[Scorer] = ()
    video: Network | None = None
    reference: Source | Path | ShippedStatistics | None = None
    timing: dict[str, Any] | None = None
    prompts: str | None = None
    allow_mixed_n: bool = False

    @classmethod
    def load(
        cls,
        *,
        extractors: Sequence[str] | None = (),
        clips: Sequence[str] = (),
        reference: Any = None,
        device: str = "auto",
        protocol: str | None = None,
        baseline: Run | None = None,
        **attributes: Any,
    ) -> Self:
        """Load networks by their names onto a device, open the reference, and take the rest as it is.

        Args:
            extractors, clips: names as ``diffaccel eval list`` shows them. None for the extractors takes the network of
            the statistics that ship for ``baseline``, else "tiny", and none for videos.
            reference: images, or a file of statistics, as a path; "none" for the baseline's own pictures; None for the
            statistics that ship for ``baseline`` where extractors are not named, else its own pictures.
            device: on which the networks compute.
            protocol: published preprocessing of the extractors.
            baseline: of the comparison.
            attributes: the other attributes.

        Raises:
            MissingWeights: for weights that are not on this machine.
            DiffAccelError: for an unknown name, and a reference that cannot be read.
        """
        torch_device = pick_device(device)
        shipped = None
        if reference is None and extractors is None and protocol is None and baseline is not None:
            shipped = zoo_reference.find(baseline, device=torch_device)
        names = extractors
        if names is None:
            names = () if baseline is not None and baseline.is_video else ("tiny",)
        networks = [extractor(name, device=torch_device, protocol=protocol) for name in ([] if shipped else names)]
        return cls(
            extractors=[shipped.extractor] if shipped else networks,
            clips=[as_clip(extractor(name, device=torch_device)) for name in clips],
            reference=shipped or open_reference(reference),
            **attributes,
        )


def open_reference(reference: Any) -> Source | Path | None:
    """Open images; a file of statistics stays a path, since it is read for one network at a time."""
    if reference is None or reference == zoo_reference.NONE:
        return None
    return Path(reference) if is_statistics_file(reference) else open_source(reference)
