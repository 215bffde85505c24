"""Read and write files of reference statistics: mean and covariance of features, and the features of KID files.

Reads ``.npz`` of pytorch-fid and EDM (``mu, sigma``), of ADM (also ``mu_s, sigma_s`` of spatial features, ``arr_0``
images), of clean-fid (``mu, sigma``, or ``feats``), and EDM2's ``.pkl`` (a dict of such pairs by metric). Writes
``.npz`` with ``mu, sigma`` and their origin, which those packages can read too. No pickle is ever executed: the
``.pkl`` reader only rebuilds NumPy arrays and plain containers.
"""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffaccel.errors import DiffAccelError, unknown
from diffaccel.eval.metrics.frechet import Moments
from diffaccel.files import atomic

VERSION = 1
LARGEST = 1e100  # entry of statistics; products of larger ones are beyond float64
TOLERANCE = 1e-6  # asymmetry relative to the largest entry, negative eigenvalues relative to the largest
_NUMPY = {
    (f"numpy.{core}.{module}", name)
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
}
_ALLOWED = _NUMPY | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}


@dataclass(frozen=True, eq=False)
class StatisticsFile:
    """Statistics of a reference set; None for whatever its file does not state.

    Attributes:
        moments: mean, covariance and number of images; ``moments.n`` is None where the file does not give it.
        feature_name: name of the extractor, such as "inception".
        protocol: named protocol of preprocessing and extraction.
        weights_sha256: digest of the extractor's weights.
        version: version of this file format, 0 for files of other packages.
        spatial: ADM's statistics of spatial features, for sFID.
    """

    moments: Moments
    feature_name: str | None = None
    protocol: str | None = None
    weights_sha256: str | None = None
    version: int = 0
    spatial: Moments | None = None

    @property
    def assumed(self) -> tuple[str, ...]:
        """Names of the properties that the file does not state, which a report has to print as assumed."""
        names = ("feature_name", "protocol", "weights_sha256")
        return (*(("n",) if self.moments.n is None else ()), *(name for name in names if getattr(self, name) is None))


def read(path: str | Path, *, dim: int | None = None, metric: str | None = None) -> StatisticsFile:
    """Read the statistics of an ``.npz`` or EDM2 ``.pkl`` file; check for finite, symmetric, positive semidefinite.

    Args:
        path: the file.
        dim: expected number of features.
        metric: entry of a ``.pkl`` that holds several, such as "fid" or "fd_dinov2".

    Raises:
        DiffAccelError: for a missing file, another format, missing keys, and a matrix that is not a covariance.
    """
    path = Path(path)
    values = _pickled(path, metric) if path.suffix.lower() == ".pkl" else _npz(path)
    if "mu" not in values or "sigma" not in values:
        hint = " It holds images: give it as a set of images." if "arr_0" in values else ""
        hint = hint or (" It holds features for KID: use read_features." if "feats" in values else "")
        raise DiffAccelError(f"'{path}' has no statistics 'mu' and 'sigma'; found: {_quoted_keys(values)}.{hint}")
    n = _number(path, values.get("n", values.get("num_images")))
    spatial = None
    if "mu_s" in values and "sigma_s" in values:
        spatial = _moments(path, values["mu_s"], values["sigma_s"], n)
    moments = _moments(path, values["mu"], values["sigma"], n)
    if dim is not None and moments.dim != dim:
        raise DiffAccelError(f"'{path}' is of {moments.dim} features, the extractor gives {dim}. Use the file of it.")
    version = _number(path, values.get("version")) or 0
    if version > VERSION:
        raise DiffAccelError(f"'{path}' has format {version}; this version of diffaccel reads up to {VERSION}.")
    texts = [_text(path, values.get(key)) for key in ("feature_name", "protocol", "weights_sha256")]
    return StatisticsFile(moments, texts[0], texts[1], texts[2], version, spatial)


def arrays(path: str | Path) -> frozenset[str]:
    """Return the names of the arrays in an ``.npz``; ``mu`` and ``sigma`` for a ``.pkl``; none for other files."""
    path = Path(path)
    if path.suffix.lower() == ".pkl":
        return frozenset({"mu", "sigma"})
    if path.suffix.lower() != ".npz" or not path.is_file() or not zipfile.is_zipfile(path):
        return frozenset()
    with zipfile.ZipFile(path) as archive:
        return frozenset(name.removesuffix(".npy") for name in archive.namelist())


def read_features(path: str | Path) -> Tensor:
    """Read the features ``(n, d)`` of a clean-fid KID file (``feats``), float64."""
    values = _npz(Path(path))
    if "feats" not in values:
        raise DiffAccelError(f"'{path}' has no features 'feats'; found: {_quoted_keys(values)}.")
    feats = values["feats"]
    if feats.ndim != 2 or feats.dtype.kind != "f":
        raise DiffAccelError(f"'{path}': 'feats' must be a matrix (n, d) of floats, got {feats.dtype} {feats.shape}.")
    feats = feats.astype(np.float64)
    if feats.size == 0 or not (np.abs(feats) <= LARGEST).all():
        raise DiffAccelError(f"'{path}': 'feats' {feats.shape} is empty, or holds NaN or numbers beyond {LARGEST:g}.")
    return torch.from_numpy(feats)


def write(path: str | Path, statistics: StatisticsFile) -> None:
    """Write an ``.npz`` that :func:`read`, pytorch-fid and EDM can read, atomically."""
    path = Path(path)
    if path.suffix.lower() != ".npz":
        raise DiffAccelError(f"Statistics are written as '.npz', got '{path.name}'.")
    moments = statistics.moments
    values: dict[str, Any] = {
        "mu": moments.mean.cpu().numpy(),
        "sigma": moments.covariance.cpu().numpy(),
        "version": VERSION,
        **({} if moments.n is None else {"n": moments.n}),
        **{k: v for k in ("feature_name", "protocol", "weights_sha256") if (v := getattr(statistics, k)) is not None},
    }
    if statistics.spatial is not None:
        values["mu_s"] = statistics.spatial.mean.cpu().numpy()
        values["sigma_s"] = statistics.spatial.covariance.cpu().numpy()
    with atomic(path) as file:
        np.savez(file, **values)


def _npz(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays of an ``.npz``; images ``arr_*`` are empty placeholders."""
    if not path.is_file():
        raise DiffAccelError(f"There is no file '{path}'.")
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise DiffAccelError(f"'{path}' is a single array, not an .npz with 'mu' and 'sigma'.")
        with file:
            return {key: np.empty(0) if key.startswith("arr_") else file[key] for key in file.files}
    except DiffAccelError:
        raise
    except (
        ValueError,
        OSError,
        EOFError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:  # also encrypted ones
        raise DiffAccelError(f"'{path}' is no readable .npz file without pickled objects ({error}).") from error


class _NumpyOnly(pickle.Unpickler):
    """Unpickler of arrays, numbers, strings and containers; any other name in the file is refused, not imported."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a NumPy constructor; refuse any other name."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for '{module}.{name}'")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _pickled(path: Path, metric: str | None) -> dict[str, Any]:
    """Read the entry of ``metric`` from EDM2's ``.pkl``, or its top level where it has no entries."""
    if not path.is_file():
        raise DiffAccelError(f"There is no file '{path}'.")
    try:
        values = _NumpyOnly(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise DiffAccelError(
            f"'{path}' is no pickle of plain NumPy statistics ({error}); it was not run. "
            "Convert it to .npz with 'mu' and 'sigma' where you trust it."
        ) from error
    if not isinstance(values, dict):
        raise DiffAccelError(f"'{path}' holds a {type(values).__name__}, not a dict of statistics.")
    entries = {str(key): entry for key, entry in values.items() if isinstance(entry, dict) and "mu" in entry}
    if not entries:
        return values
    if metric is None and len(entries) > 1:
        raise DiffAccelError(f"'{path}' holds statistics of {', '.join(sorted(entries))}; say which with metric=.")
    if metric is not None and metric not in entries:
        raise unknown("metric", metric, entries)
    return {"num_images": values.get("num_images"), **entries[metric if metric is not None else next(iter(entries))]}


def _moments(path: Path, mean: Any, covariance: Any, n: int | None) -> Moments:
    """Check a mean and a covariance, and build their moments in float64."""
    mean, covariance = np.asarray(mean), np.asarray(covariance)
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise DiffAccelError(f"'{path}': statistics must be floats, got {mean.dtype} and {covariance.dtype}.")
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DiffAccelError(f"'{path}': expected (d,) and (d, d), got {mean.shape} and {covariance.shape}.")
    if len(mean) == 0:
        raise DiffAccelError(f"'{path}' holds statistics of no features. Compute it anew.")
    mu, sigma = torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64))
    if not (torch.isfinite(mu).all() and torch.isfinite(sigma).all()):
        raise DiffAccelError(f"'{path}' holds NaN or infinity. Compute it anew.")
    if (largest := max(float(mu.abs().max()), float(sigma.abs().max()))) > LARGEST:
        raise DiffAccelError(f"'{path}' holds numbers up to {largest:.3g}, which no features give. Compute it anew.")
    asymmetry = float((sigma - sigma.T).abs().max() / sigma.abs().max().clamp_min(1e-300))
    if asymmetry > TOLERANCE:
        raise DiffAccelError(f"'{path}': the covariance is not symmetric, by {asymmetry:.2g} of its largest entry.")
    sigma = (sigma + sigma.T) / 2
    eigenvalues = torch.linalg.eigvalsh(sigma)
    if float(eigenvalues[0]) < -TOLERANCE * float(eigenvalues[-1].clamp_min(0)):
        raise DiffAccelError(
            f"'{path}': the covariance has the eigenvalue {float(eigenvalues[0]):.3g} beside a largest of "
            f"{float(eigenvalues[-1]):.3g}. Is it a covariance?"
        )
    return Moments.from_covariance(mu, sigma, n)


def _number(path: Path, value: Any) -> int | None:
    """Convert a scalar array to an int; None stays None."""
    if value is None:
        return None
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise DiffAccelError(f"'{path}': a count must be one whole number, got {value!r}.")
    return int(array.item())


def _text(path: Path, value: Any) -> str | None:
    """Convert a scalar array to a string; None stays None."""
    if value is None:
        return None
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind != "U":
        raise DiffAccelError(f"'{path}': a name must be one text, got {value!r}.")
    return str(array.item())


def _quoted_keys(values: dict[str, Any]) -> str:
    return ", ".join(f"'{key}'" for key in sorted(map(str, values))) or "nothing"
