"""Metrics, protocols, extractors and scorers: which of them work on this machine offline, and why others do not."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from diffaccel import zoo
from diffaccel.eval.networks import extractors, lpips, protocols, scorers, tiny_network, weights
from diffaccel.files import sha256

Kind = Literal["metric", "protocol", "extractor", "scorer"]
YOURS = "a file of yours"
_NETWORKS = {  # extractor -> its published weights in networks.weights.KNOWN
    "inception": "inception",
    "clean-inception": "inception",
    "dinov2": "dinov2",
}
_PACKAGES = {"dinov2": "timm", "timm": "timm"}  # extractor -> the package that it needs


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One metric, protocol, extractor or scorer of the listing.

    Attributes:
        kind: which of the four it is.
        name: as the command line takes it.
        what: description in a few words.
        needs: requirements beside the images.
        available: whether the requirements are met here.
        where: the weights' file, or where else they come from.
        why: reason for which it is not available.
        looked: places where its weights were looked for.
    """

    kind: Kind
    name: str
    what: str
    needs: str
    available: bool = True
    where: str = ""
    why: str = ""
    looked: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON-ready values."""
        return asdict(self)


def entries() -> list[Entry]:
    """List everything, metrics first, without loading a network or fetching a file."""
    networks = list(_extractors())
    return [*_metrics(networks), *_protocols(networks), *networks, *_scorers()]


def _extractors() -> Iterator[Entry]:
    for spec, description in extractors.SPECS.items():
        kind = spec.partition("[")[0].partition(":")[0]
        if spec == "tiny":
            available = tiny_network.WEIGHTS.is_file()
            yield Entry(
                kind="extractor", name=spec, what=description, needs="nothing", available=available,
                where="in the package" if available else "",
                why="" if available else "this installation lacks its weights",
            )  # fmt: skip
        elif kind in _NETWORKS:
            yield _with_published_weights(kind, description)
        elif spec in zoo.names():
            for name in extractors.clips():
                yield Entry(kind="extractor", name=name, what="a CLIP of the zoo", needs="nothing", where="in the zoo")
        else:
            yield _check_package(Entry(kind="extractor", name=spec, what=description, needs=YOURS), kind)
    yield _cmmd_clip()


def _with_published_weights(name: str, description: str) -> Entry:
    """Return the entry of an extractor, available where its weights are here and have the published sha256."""
    published = weights.KNOWN[_NETWORKS[name]]
    looked = weights.look(_NETWORKS[name])
    entry = Entry(
        kind="extractor", name=name, what=description, needs=published.files[0], available=looked.path is not None,
        where=str(looked.path or ""), why="" if looked.path else "weights not found", looked=looked.places,
    )  # fmt: skip
    if looked.path is not None and not sha256(looked.path).startswith(published.sha256):
        why = f"another sha256 than {published.sha256}...: only with --allow-unknown-weights"
        entry = replace(entry, available=False, why=why)
    return _check_package(entry, name)


def _cmmd_clip() -> Entry:
    from diffaccel.eval.networks.extractors import clip

    looked = weights.look(clip.WEIGHTS, hub=protocols.CMMD_HUB, elsewhere=False)
    return Entry(
        kind="extractor", name=protocols.PROTOCOLS["cmmd"].extractor, what="the CLIP of CMMD",
        needs=f"{clip.WEIGHTS} of {protocols.CMMD_HUB}", available=looked.path is not None,
        where=str(looked.path or ""), why="" if looked.path else "weights not found", looked=looked.places,
    )  # fmt: skip


def _check_package(entry: Entry, kind: str) -> Entry:
    """Return the entry, unavailable where the package that its kind needs is not installed."""
    package = _PACKAGES.get(kind)
    if package is None or importlib.util.find_spec(package) is not None:
        return entry
    return replace(entry, available=False, why=f"the package {package} is not installed")


def _protocols(networks: list[Entry]) -> Iterator[Entry]:
    for name, protocol in protocols.PROTOCOLS.items():
        network = next(entry for entry in networks if entry.name == protocol.extractor)
        description = f"{', '.join(metric.name for metric in protocol.metrics)} ({protocol.source})"
        yield replace(network, kind="protocol", name=name, what=description, needs=f"extractor {network.name}")


def _scorers() -> Iterator[Entry]:
    for name, scorer in scorers.KNOWN.items():
        looked = [weights.look(file, hub=hub) for file, hub in zip(scorer.files, scorer.hubs, strict=True)]
        missing = [file for file, search in zip(scorer.files, looked, strict=True) if search.path is None]
        why = f"{', '.join(missing)} not found" if missing else ""
        if scorer.package and importlib.util.find_spec(scorer.package) is None:
            why = "; ".join([*([why] if why else []), f"the package {scorer.package} is not installed"])
        yield Entry(
            kind="scorer", name=name, what=scorer.paper, needs=", ".join(scorer.files), available=not why,
            where=", ".join(str(search.path) for search in looked if search.path), why=why,
            looked=tuple(place for search in looked for place in search.places),
        )  # fmt: skip


def _metrics(networks: list[Entry]) -> Iterator[Entry]:
    def metric(name: str, description: str, needs: str = "nothing") -> Entry:
        return Entry(kind="metric", name=name, what=description, needs=needs)

    yield metric("fid", "Fréchet distance, its interval and its limit of many images", "an extractor (tiny)")
    yield metric("kid", "kernel distance, unbiased", "an extractor (tiny)")
    yield metric("prdc", "precision, recall, density, coverage", "an extractor (tiny)")
    yield metric("cmmd", "kernel distance of CLIP's embeddings", "a CLIP (of the zoo)")
    inception = next(entry for entry in networks if entry.name == "inception")
    yield replace(
        inception, kind="metric", name="is", what="Inception Score", needs="a classifier: extractor inception"
    )
    yield metric("clip", "CLIP score, CLIP-I", "a CLIP (of the zoo), prompts")
    yield metric("paired: psnr, ssim", "distances of paired pixels", "paired images")
    yield metric("paired: latent_error", "relative distance of latents", "runs made with --latents")
    looked = weights.look(lpips.BACKBONES["alex"].file)
    yield Entry(
        kind="metric", name="paired: lpips", what="distance of paired images in AlexNet's features",
        needs=lpips.BACKBONES["alex"].file, available=looked.path is not None, where=str(looked.path or ""),
        why="" if looked.path else "weights not found", looked=looked.places,
    )  # fmt: skip
