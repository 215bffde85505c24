"""Files of reference statistics: mean and covariance of features, and the features of KID files.

Read: ``.npz`` of pytorch-fid and EDM (``mu, sigma``), of ADM (also ``mu_s, sigma_s`` of spatial features, ``arr_0``
images), of clean-fid (``mu, sigma``, or ``feats``), and EDM2's ``.pkl`` (a dict of such pairs by metric). Written:
``.npz`` with ``mu, sigma`` and where they come from, which those packages can still read. No pickle is ever run: the
``.pkl`` reader allows what rebuilds NumPy arrays and nothing else.
"""

from __future__ import annotations

import io
import pickle
import zipfile
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
TOLERANCE = 1e-6  # of the largest entry for symmetry, of the largest eigenvalue for negative ones
_NUMPY = {
    (f"numpy.{core}.{module}", name)
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
}
_ALLOWED = _NUMPY | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}


@dataclass(frozen=True, eq=False)
class StatisticsFile:
    """Statistics of a reference set, as far as its file tells.

    Attributes:
        moments: mean, covariance and number of images; ``moments.n`` is None where the file does not give it.
        feature_name: extractor, such as "inception".
        protocol: named protocol of preprocessing and extraction.
        weights_sha256: digest of the extractor's weights.
        version: of this file format, 0 for a foreign file.
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
        """What the file does not say, so that a report has to print it as assumed."""
        names = ("feature_name", "protocol", "weights_sha256")
        return (*(("n",) if self.moments.n is None else ()), *(name for name in names if getattr(self, name) is None))


def read(path: str | Path, *, dim: int | None = None, metric: str | None = None) -> StatisticsFile:
    """The statistics in an ``.npz`` or EDM2 ``.pkl`` file, checked: finite, symmetric, no negative eigenvalue.

    Args:
        path: the file.
        dim: number of features expected of it.
        metric: which entry of a ``.pkl`` that holds several, such as "fid" or "fd_dinov2".

    Raises:
        DiffAccelError: no such file, not such a file, keys missing, or a matrix that is no covariance.
    """
    path = Path(path)
    values = _pickled(path, metric) if path.suffix.lower() == ".pkl" else _npz(path)
    if "mu" not in values or "sigma" not in values:
        held = " It holds images: give it as a set of images." if "arr_0" in values else ""
        held = held or (" It holds features for KID: use read_features." if "feats" in values else "")
        raise DiffAccelError(f"'{path}' has no statistics 'mu' and 'sigma'; found: {_listed(values)}.{held}")
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
    """The names of the arrays in an ``.npz``; ``mu`` and ``sigma`` for a ``.pkl``; none for anything else."""
    path = Path(path)
    if path.suffix.lower() == ".pkl":
        return frozenset({"mu", "sigma"})
    if path.suffix.lower() != ".npz" or not path.is_file() or not zipfile.is_zipfile(path):
        return frozenset()
    with zipfile.ZipFile(path) as archive:
        return frozenset(name.removesuffix(".npy") for name in archive.namelist())


def read_features(path: str | Path) -> Tensor:
    """The features ``(n, d)`` in a clean-fid KID file (``feats``), float64."""
    values = _npz(Path(path))
    if "feats" not in values:
        raise DiffAccelError(f"'{path}' has no features 'feats'; found: {_listed(values)}.")
    feats = values["feats"]
    if feats.ndim != 2 or feats.dtype.kind != "f":
        raise DiffAccelError(f"'{path}': 'feats' must be a matrix (n, d) of floats, got {feats.dtype} {feats.shape}.")
    return torch.from_numpy(feats.astype(np.float64))


def write(path: str | Path, statistics: StatisticsFile) -> None:
    """An ``.npz`` that :func:`read`, pytorch-fid and EDM can read, whole or not at all."""
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
    """Every array but images, which only count by their name."""
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
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DiffAccelError(f"'{path}' is no readable .npz file without pickled objects ({error}).") from error


class _NumpyOnly(pickle.Unpickler):
    """Rebuilds arrays, numbers, strings and containers; any other name in the file is refused, not imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for '{module}.{name}'")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _pickled(path: Path, metric: str | None) -> dict[str, Any]:
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
    mean, covariance = np.asarray(mean), np.asarray(covariance)
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise DiffAccelError(f"'{path}': statistics must be floats, got {mean.dtype} and {covariance.dtype}.")
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DiffAccelError(f"'{path}': expected (d,) and (d, d), got {mean.shape} and {covariance.shape}.")
    mu, sigma = torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64))
    if not (torch.isfinite(mu).all() and torch.isfinite(sigma).all()):
        raise DiffAccelError(f"'{path}' holds NaN or infinity. Compute it anew.")
    uneven = float((sigma - sigma.T).abs().max() / sigma.abs().max().clamp_min(1e-300))
    if uneven > TOLERANCE:
        raise DiffAccelError(f"'{path}': the covariance is not symmetric, by {uneven:.2g} of its largest entry.")
    sigma = (sigma + sigma.T) / 2
    eigenvalues = torch.linalg.eigvalsh(sigma)
    if float(eigenvalues[0]) < -TOLERANCE * float(eigenvalues[-1].clamp_min(0)):
        raise DiffAccelError(
            f"'{path}': the covariance has the eigenvalue {float(eigenvalues[0]):.3g} beside a largest of "
            f"{float(eigenvalues[-1]):.3g}. Is it a covariance?"
        )
    return Moments.from_covariance(mu, sigma, n)


def _number(path: Path, value: Any) -> int | None:
    if value is None:
        return None
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise DiffAccelError(f"'{path}': a count must be one whole number, got {value!r}.")
    return int(array.item())


def _text(path: Path, value: Any) -> str | None:
    if value is None:
        return None
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind != "U":
        raise DiffAccelError(f"'{path}': a name must be one text, got {value!r}.")
    return str(array.item())


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"'{key}'" for key in sorted(map(str, values))) or "nothing"
