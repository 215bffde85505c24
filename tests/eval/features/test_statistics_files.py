"""Files of statistics: every format read, ours written, and what is refused."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffaccel.errors import DiffAccelError
from diffaccel.eval.features.statistics_files import StatisticsFile, read, read_features, write
from diffaccel.eval.metrics.frechet import Moments, distance

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(50, 6)) @ RNG.normal(size=(6, 6)) + 2
MU, SIGMA = ROWS.mean(0), np.cov(ROWS.T)
MOMENTS = Moments.of(torch.from_numpy(ROWS))


def npz(path: Path, **values: Any) -> Path:
    np.savez(path, **values)
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "ref.npz"
    spatial = Moments.of(torch.from_numpy(ROWS[:, :3]))
    write(path, StatisticsFile(MOMENTS, "inception", "tf-fid", "6726825d", spatial=spatial))
    found = read(path, dim=6)
    assert (found.moments.n, found.feature_name, found.protocol, found.weights_sha256, found.version) == (
        50, "inception", "tf-fid", "6726825d", 1)  # fmt: skip
    torch.testing.assert_close(found.moments.mean, MOMENTS.mean, rtol=0, atol=0)
    torch.testing.assert_close(found.moments.covariance, MOMENTS.covariance, rtol=1e-14, atol=0)
    assert found.spatial is not None and found.spatial.dim == 3
    assert found.assumed == ()
    assert distance(found.moments, MOMENTS) == 0
    assert os.listdir(tmp_path) == ["ref.npz"]


def test_pytorch_fid_reads_ours(tmp_path: Path) -> None:
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    path = tmp_path / "ref.npz"
    write(path, StatisticsFile(MOMENTS, "inception"))
    mu, sigma = fid_score.compute_statistics_of_path(str(path), None, 50, 6, "cpu")
    np.testing.assert_allclose(mu, MU, rtol=1e-14)
    np.testing.assert_allclose(sigma, SIGMA, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_foreign_file_without_a_count_still_gives_a_distance(tmp_path: Path, dtype: type) -> None:
    found = read(npz(tmp_path / "fid.npz", mu=MU.astype(dtype), sigma=SIGMA.astype(dtype)))
    assert found.moments.n is None
    assert found.assumed == ("n", "feature_name", "protocol", "weights_sha256")
    assert found.version == 0
    assert distance(found.moments, MOMENTS) == pytest.approx(0, abs=1e-6 * float(MOMENTS.covariance.trace()))
    assert found.moments.mean.dtype == found.moments.m2.dtype == torch.float64
    write(tmp_path / "again.npz", found)
    assert read(tmp_path / "again.npz").moments.n is None


def test_adm_files(tmp_path: Path) -> None:
    images = np.zeros((3, 4, 4, 3), dtype=np.uint8)
    path = npz(tmp_path / "adm.npz", arr_0=images, mu=MU, sigma=SIGMA, mu_s=MU[:2], sigma_s=SIGMA[:2, :2])
    found = read(path)
    assert (found.moments.dim, found.spatial.dim if found.spatial else None) == (6, 2)
    with pytest.raises(DiffAccelError, match=r"found: 'arr_0'\. It holds images"):
        read(npz(tmp_path / "images.npz", arr_0=images))


def test_clean_fid_features(tmp_path: Path) -> None:
    path = npz(tmp_path / "kid.npz", feats=ROWS.astype(np.float32))
    torch.testing.assert_close(read_features(path), torch.from_numpy(ROWS.astype(np.float32)).double())
    with pytest.raises(DiffAccelError, match=r"found: 'feats'\. It holds features for KID"):
        read(path)
    with pytest.raises(DiffAccelError, match="no features 'feats'; found: 'mu', 'sigma'"):
        read_features(npz(tmp_path / "fid.npz", mu=MU, sigma=SIGMA))
    with pytest.raises(DiffAccelError, match="must be a matrix"):
        read_features(npz(tmp_path / "flat.npz", feats=MU))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_edm2_pickles(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "edm2.pkl"
    fid, dino = dict(mu=MU, sigma=SIGMA), dict(mu=MU[:4], sigma=SIGMA[:4, :4])
    path.write_bytes(pickle.dumps(dict(num_images=np.int64(50), fid=fid, fd_dinov2=dino), protocol))
    found = read(path, metric="fid", dim=6)
    assert found.moments.n == 50
    assert distance(found.moments, MOMENTS) == 0
    assert read(path, metric="fd_dinov2").moments.dim == 4
    with pytest.raises(DiffAccelError, match="statistics of fd_dinov2, fid; say which"):
        read(path)
    with pytest.raises(DiffAccelError, match="Unknown metric 'dino'"):
        read(path, metric="dino")
    path.write_bytes(pickle.dumps(dict(fid=fid), protocol))
    assert read(path).moments.n is None


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *values: Any) -> None:
        self.call, self.values = call, values

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.values


@pytest.mark.parametrize("call", [os.mkdir, eval, exec, getattr, np.load, np.save])
def test_pickles_that_ask_for_anything_else_are_not_run(tmp_path: Path, call: Callable[..., Any]) -> None:
    path, made = tmp_path / "evil.pkl", tmp_path / "made"
    values = [str(made)] if call in (os.mkdir, np.load) else [f"__import__('os').mkdir({str(made)!r})"]
    path.write_bytes(pickle.dumps(dict(fid=dict(mu=MU, sigma=Attack(call, *values)))))
    with pytest.raises(DiffAccelError, match=r"it asks for '.*'\); it was not run"):
        read(path)
    # an attack hidden in an array of objects goes through the same reader
    hidden = np.empty(1, dtype=object)
    hidden[0] = Attack(call, *values)
    path.write_bytes(pickle.dumps(dict(mu=hidden, sigma=SIGMA)))
    with pytest.raises(DiffAccelError, match="it asks for"):
        read(path)
    assert not made.exists()


def test_objects_in_an_npz_are_not_run(tmp_path: Path) -> None:
    objects = np.empty(1, dtype=object)
    objects[0] = Attack(os.mkdir, str(tmp_path / "made"))
    with pytest.raises(DiffAccelError, match=r"no readable \.npz"):
        read(npz(tmp_path / "evil.npz", mu=objects, sigma=SIGMA))
    assert not (tmp_path / "made").exists()


def spoiled(**changes: Any) -> dict[str, Any]:
    return {"mu": MU, "sigma": SIGMA, **changes}


SKEW = SIGMA.copy()
SKEW[0, 1] += 1e-3 * np.abs(SIGMA).max()
INDEFINITE = SIGMA - 1.5 * np.linalg.eigvalsh(SIGMA)[-1] * np.outer(np.eye(6)[0], np.eye(6)[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(mean=MU, cov=SIGMA), "no statistics 'mu' and 'sigma'; found: 'cov', 'mean'"),
        (dict(), "found: nothing"),
        (spoiled(mu=np.full(6, np.nan)), "holds NaN or infinity"),
        (spoiled(sigma=SIGMA * np.inf), "holds NaN or infinity"),
        (spoiled(sigma=SKEW), "not symmetric, by 0.001 of"),
        (spoiled(sigma=INDEFINITE), "has the eigenvalue -"),
        (spoiled(sigma=SIGMA[:5, :5]), r"expected \(d,\) and \(d, d\), got \(6,\) and \(5, 5\)"),
        (spoiled(mu=MU[None]), r"got \(1, 6\)"),
        (spoiled(mu=MU.astype(int)), "must be floats, got int64"),
        (spoiled(n=np.float64(50)), "one whole number"),
        (spoiled(n=1), "at least 2 rows"),
        (spoiled(protocol=np.array(["a", "b"])), "one text"),
        (spoiled(version=2), "has format 2; this version of diffaccel reads up to 1"),
    ],
)
def test_refused_values(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffAccelError, match=message):
        read(npz(tmp_path / "bad.npz", **values))


def test_rounding_within_tolerance_is_no_fault(tmp_path: Path) -> None:
    singular = np.cov(RNG.normal(size=(3, 6)).T)  # eigenvalues of -1e-17 come with it
    noisy = singular * (1 + 1e-8 * RNG.normal(size=(6, 6)))
    assert read(npz(tmp_path / "ok.npz", mu=MU, sigma=noisy)).moments.dim == 6


def test_refused_files(tmp_path: Path) -> None:
    with pytest.raises(DiffAccelError, match="There is no file"):
        read(tmp_path / "none.npz")
    with pytest.raises(DiffAccelError, match="There is no file"):
        read(tmp_path / "none.pkl")
    (tmp_path / "text.npz").write_text("mu sigma")
    (tmp_path / "cut.npz").write_bytes(npz(tmp_path / "whole.npz", mu=MU, sigma=SIGMA).read_bytes()[:300])
    (tmp_path / "text.pkl").write_text("mu sigma")
    for name in ("text.npz", "cut.npz", "text.pkl"):
        with pytest.raises(DiffAccelError, match=f"{name}' is no "):
            read(tmp_path / name)
    np.save(tmp_path / "one.npy", MU)
    with pytest.raises(DiffAccelError, match="a single array"):
        read(tmp_path / "one.npy")
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([MU]))
    with pytest.raises(DiffAccelError, match="holds a list, not a dict"):
        read(tmp_path / "list.pkl")
    with pytest.raises(DiffAccelError, match="is of 6 features, the extractor gives 2048"):
        read(tmp_path / "whole.npz", dim=2048)
    with pytest.raises(DiffAccelError, match=r"written as '\.npz', got 'x\.pkl'"):
        write(tmp_path / "x.pkl", StatisticsFile(MOMENTS))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "holds statistics of no features"),
        ({"mu": MU, "sigma": 1e308 * np.eye(6)}, "numbers up to 1e\\+308, which no features give"),
        ({"mu": MU * np.nan, "sigma": SIGMA}, "NaN or infinity"),
    ],
)
def test_numbers_that_are_no_statistics_are_one_sentence(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(DiffAccelError, match=f"x.npz'.*{said}"):
        read(npz(tmp_path / "x.npz", **values))


@pytest.mark.parametrize("feats", [np.zeros((0, 3)), np.zeros((3, 0)), np.full((2, 2), np.nan), np.full((2, 2), 1e308)])
def test_features_that_are_none_are_one_sentence(tmp_path: Path, feats: np.ndarray) -> None:
    with pytest.raises(DiffAccelError, match="is empty, or holds NaN or numbers beyond"):
        read_features(npz(tmp_path / "x.npz", feats=feats))


def test_an_encrypted_file_is_one_sentence(tmp_path: Path) -> None:
    path = npz(tmp_path / "x.npz", mu=MU, sigma=SIGMA)
    data = bytearray(path.read_bytes())
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = -1
        while (start := data.find(mark, start + 1)) >= 0:
            data[start + place] |= 1
    path.write_bytes(data)
    with pytest.raises(DiffAccelError, match=r"no readable \.npz file.*encrypted"):
        read(path)
