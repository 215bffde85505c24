"""Feature extractors, built from the specs of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffaccel import zoo
from diffaccel.errors import DiffAccelError, unknown
from diffaccel.eval.networks import protocols
from diffaccel.eval.networks.extractors.base import Extractor, exact_float32

if TYPE_CHECKING:
    from diffaccel.eval.networks.extractors.clip import ClipExtractor

__all__ = ["SPECS", "Extractor", "as_clip", "clips", "exact_float32", "extractor"]

# spec: description
SPECS = {
    "tiny": "the embedded network",
    "inception[:/path.pth]": "the Inception of 2015, whose distance is FID",
    "clean-inception[:/path.pth]": "the same network behind clean-fid's resizing",
    "dinov2[:/path]": "DINOv2 ViT-L/14",
    "open_clip:ARCHITECTURE:/path": "a CLIP of open_clip; a tag such as openai instead of a path takes the hub's cache",
    "open_clip:local-dir:/folder": "a CLIP in a folder with open_clip_config.json",
    "emoji-clip-judge": "a CLIP of diffaccel.zoo, by its name",
    "timm:NAME:/path": "any network of timm",
    "torchscript:/path": "a TorchScript file from uint8 images to features",
    "py:module:callable": "a Python callable from uint8 images to features",
}
NEEDS_ARGUMENT = ("open_clip", "timm", "torchscript", "py")
DEFAULT_PROTOCOL = {"inception": "tf-fid", "clean-inception": "clean-fid", "dinov2": "dgm-dinov2"}


def extractor(
    spec: str,
    *,
    device: str | torch.device = "cpu",
    allow_unknown_weights: bool = False,
    protocol: str | protocols.Protocol | None = None,
    tap: str = "pool3",
    download: bool = False,
) -> Extractor:
    """Build the extractor of a spec, one of :data:`SPECS`.

    Args:
        spec: the spec, as on the command line.
        device: device of its network.
        allow_unknown_weights: accept Inception weights of another sha256; then no key says "FID".
        protocol: sets the preprocessing of Inception, DINOv2 and CLIP; other networks have their own.
        tap: tap of Inception: "pool3", "logits", "logits_unbiased", "spatial", or "both" pool3 and spatial in one pass.
        download: download published weights that are not on this machine.

    Raises:
        MissingWeights: for weights that are not on this machine.
        DiffAccelError: for an unknown spec, a protocol of another network, and weights of another network.
    """
    kind, _, rest = spec.partition(":")
    path = rest or None
    chosen = _protocol(kind, protocol)
    options: dict[str, Any] = {"device": device}
    if chosen is not None:
        options |= {"preprocessing": chosen.preprocessing, "protocol": chosen.name}
    if tap != "pool3" and not kind.endswith("inception"):
        raise DiffAccelError(f"Only Inception has taps; '{spec}' has no '{tap}'.")
    if kind in NEEDS_ARGUMENT and path is None:
        raise DiffAccelError(f"The extractor '{spec}' lacks its argument. Write {_syntax(kind)}.")
    if spec == "tiny":
        from diffaccel.eval.networks.extractors.tiny import tiny

        return tiny(device=device)
    if kind in ("inception", "clean-inception"):
        from diffaccel.eval.networks.extractors.inception import inception

        return inception(path, tap=tap, allow_unknown_weights=allow_unknown_weights, download=download, **options)
    if kind in ("dinov2", "timm"):
        from diffaccel.eval.networks.extractors.timm import dinov2, timm_model

        if kind == "dinov2":
            return dinov2(path, download=download, **options)
        return timm_model(*_name_and_path(spec, rest), **options)
    if kind in ("torchscript", "py"):
        from diffaccel.eval.networks.extractors.user import python, torchscript

        return torchscript(rest, **options) if kind == "torchscript" else python(rest, **options)
    if kind == "open_clip" or spec in clips():
        from diffaccel.eval.networks.extractors.clip import LOCAL, clip, clip_folder

        if rest.startswith(LOCAL):
            return clip_folder(Path(rest.removeprefix(LOCAL)).expanduser(), **options)
        if kind == "open_clip":
            return clip(*_name_and_path(spec, rest), **options)
        return clip_folder(zoo.path(spec), name=spec, **options)
    raise unknown("extractor", spec, list(dict.fromkeys([*SPECS, *clips()])))


def as_clip(candidate: Extractor) -> ClipExtractor:
    """Return an extractor that also encodes texts, unchanged.

    Raises:
        DiffAccelError: for any other extractor.
    """
    from diffaccel.eval.networks.extractors.clip import ClipExtractor

    if not isinstance(candidate, ClipExtractor):
        named = ", ".join([*clips(), *(spec for spec in SPECS if spec.startswith("open_clip"))])
        raise DiffAccelError(f"'{candidate.name}' reads no texts. Give a CLIP: {named}.")
    return candidate


def clips() -> list[str]:
    """List the CLIPs of the zoo."""
    return [name for name in zoo.names() if "clip" in name.split("-")]


def _name_and_path(spec: str, rest: str) -> tuple[str, str]:
    """Split ``NAME:/path``, the part of a spec after its kind."""
    name, _, path = rest.partition(":")
    if not name or not path:
        raise DiffAccelError(f"The extractor '{spec}' lacks its name or path. Write {_syntax(spec.partition(':')[0])}.")
    return name, path


def _syntax(kind: str) -> str:
    """Return the specs of one kind, for error messages."""
    return " or ".join(spec for spec in SPECS if spec.startswith(kind))


def _protocol(kind: str, protocol: str | protocols.Protocol | None) -> protocols.Protocol | None:
    """Return the protocol whose preprocessing an extractor uses, or None for the network's own."""
    default = DEFAULT_PROTOCOL.get(kind)
    if protocol is None:
        return protocols.protocol(default) if default else None
    chosen = protocols.protocol(protocol) if isinstance(protocol, str) else protocol
    network = "clip" if kind == "open_clip" or kind in clips() else kind.removeprefix("clean-")
    if network != chosen.network or (kind == "clean-inception" and chosen.name != default):
        raise DiffAccelError(
            f"The protocol '{chosen.name}' is of {chosen.network} and does not say what to do before '{kind}'. "
            "Leave it out, or take another extractor."
        )
    return chosen
