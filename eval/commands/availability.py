"""What can be measured on this machine without a network: metrics, protocols, extractors and scorers, and why not."""

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
_NETWORKS = {  # specs of networks with published weights, and their file
    "inception": "inception",
    "clean-inception": "inception",
    "dinov2": "dinov2",
}
_PACKAGES = {"dinov2": "timm", "timm": "timm"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Something that a command can be asked for.

    Attributes:
        kind: what it is.
        name: as the command line takes it.
        what: it is, in a few words.
        needs: beside the images.
        available: whether that is here.
        where: the file that was found, or what else stands for it.
        why: it is not available.
        looked: the places where its weights were looked for.
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
        """JSON-ready."""
        return asdict(self)


def entries() -> list[Entry]:
    """Everything, metrics first. No network is loaded and nothing is fetched."""
    networks = list(_extractors())
    return [*_metrics(networks), *_protocols(networks), *networks, *_scorers()]


def _extractors() -> Iterator[Entry]:
    for spec, what in extractors.SPECS.items():
        kind = spec.partition("[")[0].partition(":")[0]
        if spec == "tiny":
            here = tiny_network.WEIGHTS.is_file()
            yield Entry(
                kind="extractor", name=spec, what=what, needs="nothing", available=here,
                where="in the package" if here else "", why="" if here else "this installation lacks its weights",
            )  # fmt: skip
        elif kind in _NETWORKS:
            yield _of_file(kind, what)
        elif spec in zoo.names():
            for name in extractors.clips():
                yield Entry(kind="extractor", name=name, what="a CLIP of the zoo", needs="nothing", where="in the zoo")
        else:
            yield _packaged(Entry(kind="extractor", name=spec, what=what, needs=YOURS), kind)
    yield _clip_of_cmmd()


def _of_file(kind: str, what: str) -> Entry:
    known = weights.KNOWN[_NETWORKS[kind]]
    looked = weights.look(_NETWORKS[kind])
    entry = Entry(
        kind="extractor", name=kind, what=what, needs=known.files[0], available=looked.path is not None,
        where=str(looked.path or ""), why="" if looked.path else "weights not found", looked=looked.places,
    )  # fmt: skip
    if looked.path is not None and not sha256(looked.path).startswith(known.sha256):
        why = f"another sha256 than {known.sha256}...: only with --allow-unknown-weights"
        entry = replace(entry, available=False, why=why)
    return _packaged(entry, kind)


def _clip_of_cmmd() -> Entry:
    from diffaccel.eval.networks.extractors import clip

    looked = weights.look(clip.WEIGHTS, hub=protocols.CMMD_HUB, elsewhere=False)
    return Entry(
        kind="extractor", name=protocols.PROTOCOLS["cmmd"].extractor, what="the CLIP of CMMD",
        needs=f"{clip.WEIGHTS} of {protocols.CMMD_HUB}", available=looked.path is not None,
        where=str(looked.path or ""), why="" if looked.path else "weights not found", looked=looked.places,
    )  # fmt: skip


def _packaged(entry: Entry, kind: str) -> Entry:
    package = _PACKAGES.get(kind)
    if package is None or importlib.util.find_spec(package) is not None:
        return entry
    return replace(entry, available=False, why=f"the package {package} is not installed")


def _protocols(networks: list[Entry]) -> Iterator[Entry]:
    for name, protocol in protocols.PROTOCOLS.items():
        of = next(entry for entry in networks if entry.name == protocol.extractor)
        what = f"{', '.join(metric.name for metric in protocol.metrics)} ({protocol.source})"
        yield replace(of, kind="protocol", name=name, what=what, needs=f"extractor {of.name}")


def _scorers() -> Iterator[Entry]:
    for name, known in scorers.KNOWN.items():
        found = [weights.look(file, hub=hub) for file, hub in zip(known.files, known.hubs, strict=True)]
        lacking = [file for file, one in zip(known.files, found, strict=True) if one.path is None]
        why = f"{', '.join(lacking)} not found" if lacking else ""
        if known.package and importlib.util.find_spec(known.package) is None:
            why = "; ".join([*([why] if why else []), f"the package {known.package} is not installed"])
        yield Entry(
            kind="scorer", name=name, what=known.paper, needs=", ".join(known.files), available=not why,
            where=", ".join(str(one.path) for one in found if one.path), why=why,
            looked=tuple(place for one in found for place in one.places),
        )  # fmt: skip


def _metrics(networks: list[Entry]) -> Iterator[Entry]:
    def free(name: str, what: str, needs: str = "nothing") -> Entry:
        return Entry(kind="metric", name=name, what=what, needs=needs)

    yield free("fid", "Fréchet distance, its interval and its limit of many images", "an extractor (tiny)")
    yield free("kid", "kernel distance, unbiased", "an extractor (tiny)")
    yield free("prdc", "precision, recall, density, coverage", "an extractor (tiny)")
    yield free("cmmd", "kernel distance of CLIP's embeddings", "a CLIP (of the zoo)")
    inception = next(entry for entry in networks if entry.name == "inception")
    yield replace(
        inception, kind="metric", name="is", what="Inception Score", needs="a classifier: extractor inception"
    )
    yield free("clip", "CLIP score, CLIP-I", "a CLIP (of the zoo), prompts")
    yield free("paired: psnr, ssim", "distances of paired pixels", "paired images")
    yield free("paired: latent_error", "relative distance of latents", "runs made with --latents")
    looked = weights.look(lpips.BACKBONES["alex"].file)
    yield Entry(
        kind="metric", name="paired: lpips", what="distance of paired images in AlexNet's features",
        needs=lpips.BACKBONES["alex"].file, available=looked.path is not None, where=str(looked.path or ""),
        why="" if looked.path else "weights not found", looked=looked.places,
    )  # fmt: skip
