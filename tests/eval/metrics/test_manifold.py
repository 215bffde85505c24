"""Precision, recall, density and coverage against plain definitions, closed forms and exact edges."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics import manifold
from diffaccel.eval.metrics.manifold import density_coverage, precision_recall

Boundary = Literal["<=", "<"]


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lattice(n: int, d: int, seed: int = 0) -> Tensor:
    """Points of small whole numbers: full of duplicates and of equal distances, all exact in float64."""
    return torch.randint(0, 3, (n, d), generator=torch.Generator().manual_seed(seed)).double()


def plain(x: Tensor, y: Tensor, k: int, boundary: Boundary) -> tuple[float, float, float, float]:
    """All four from whole matrices of sums of squares."""

    def squared(a: Tensor, b: Tensor) -> Tensor:
        return (a.double()[:, None] - b.double()[None]).square().sum(2)

    def radii(a: Tensor) -> Tensor:
        return squared(a, a).fill_diagonal_(torch.inf).sort(1).values[:, k - 1]

    compare = torch.le if boundary == "<=" else torch.lt
    in_x = compare(squared(y, x), radii(x))  # (m, n)
    in_y = compare(squared(x, y), radii(y))  # (n, m)
    means = [float(v.double().mean()) for v in (in_x.any(1), in_y.any(1), in_x.sum(1).double() / k, in_x.any(0))]
    return means[0], means[1], means[2], means[3]


def ours(x: Tensor, y: Tensor, k: int, boundary: Boundary) -> tuple[float, float, float, float]:
    return (*precision_recall(x, y, k=k, boundary=boundary), *density_coverage(x, y, k=k, boundary=boundary))


@pytest.fixture(params=[(7, 16), (2048, 8192)])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "TILE", request.param)
    monkeypatch.setattr(manifold, "_PAIRS", 13)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("boundary", ["<=", "<"])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_plain_definitions(k: int, boundary: Boundary) -> None:
    x, y = draw(90, 6), draw(70, 6, seed=1) * 1.3 + 0.2
    assert ours(x, y, k, boundary) == pytest.approx(plain(x, y, k, boundary), rel=1e-12)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("boundary", ["<=", "<"])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_edges_and_duplicates_are_exact(boundary: Boundary, offset: float) -> None:
    x, y = lattice(60, 4) + offset, lattice(50, 4, seed=1) + offset
    for k in (1, 3):
        assert ours(x, y, k, boundary) == pytest.approx(plain(x, y, k, boundary), rel=1e-12)
    assert plain(x, y, 3, "<=") != plain(x, y, 3, "<")  # there are edges to decide


@pytest.mark.usefixtures("tiles")
def test_samples_on_the_edge_of_balls_of_rounded_distances() -> None:
    """A sample that copies the k-th neighbour lies on the edge, whose distance no float holds exactly."""
    x = draw(40, 37) + 100
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    isolated = int(distance.sort(1).values[:, 0].argmax())
    x[isolated] += 50  # then no ball but its own reaches far from the others
    neighbour = int((x - x[isolated]).square().sum(1).index_fill(0, torch.tensor(isolated), torch.inf).argmin())
    on_edge = 2 * x[isolated] - x[neighbour]  # mirrored: as far away, up to rounding
    copies = x[neighbour].expand(4, -1)
    assert density_coverage(x[[isolated, neighbour]], copies, k=1, boundary="<=") == (2.0, 1.0)
    assert density_coverage(x[[isolated, neighbour]], copies, k=1, boundary="<") == (1.0, 0.5)
    nudged = on_edge + 1e-9 * (on_edge - x[isolated])
    assert precision_recall(x, nudged.expand(4, -1), k=1)[0] == 0.0
    inside = on_edge - 1e-9 * (on_edge - x[isolated])
    assert precision_recall(x, inside.expand(4, -1), k=1)[0] == 1.0


def test_float32_features_far_from_zero() -> None:
    """Squared norms of 1e9 would swallow distances near 1 in float32."""
    x, y = (draw(200, 8) + 1e4).float(), (draw(150, 8, seed=1) + 1e4).float()
    assert ours(x, y, 3, "<=") == pytest.approx(plain(x, y, 3, "<="), rel=1e-12)
    near = ours(x.double() - 1e4, y.double() - 1e4, 3, "<=")
    assert ours(x, y, 3, "<=") == near


def test_a_set_and_itself_and_far_clusters() -> None:
    x = draw(100, 5)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 1e3) == (0, 0)
    assert density_coverage(x, x)[1] == 1
    assert density_coverage(x, x + 1e3) == (0, 0)


def test_identical_points_only() -> None:
    same = torch.ones(9, 3)
    assert precision_recall(same, same) == (1, 1)
    assert precision_recall(same, same, boundary="<") == (0, 0)
    assert density_coverage(same, same[:2], k=5, boundary="<=") == (9 / 5, 1)


def test_a_point_is_not_its_own_neighbour() -> None:
    x = torch.tensor([[0.0], [1.0], [3.0]])
    # balls at k=1: [-1, 1], [0, 2], [1, 5]
    assert density_coverage(x, torch.tensor([[0.5], [4.5], [6.0]]), k=1) == (1.0, 1.0)
    assert density_coverage(x, torch.tensor([[-0.9], [6.0]]), k=1) == (0.5, pytest.approx(1 / 3))


@pytest.mark.parametrize(("k", "expected"), [(3, 0.8754), (5, 0.9690)])
def test_coverage_and_density_of_equal_distributions(k: int, expected: float) -> None:
    n = 1000
    product = 1.0
    for i in range(1, k + 1):
        product *= (n - i) / (2 * n - i)
    assert 1 - product == pytest.approx(expected, abs=5e-4)
    found = [density_coverage(draw(n, 4, s), draw(n, 4, 100 + s), k=k) for s in range(8)]
    density, coverage = (torch.tensor(v, dtype=torch.float64) for v in zip(*found, strict=True))
    assert float(coverage.mean()) == pytest.approx(1 - product, abs=4 * float(coverage.std()) / 8**0.5)
    assert float(coverage.std()) < 0.02
    assert float(density.mean()) == pytest.approx(1, abs=0.05)


def test_order_does_not_matter() -> None:
    x, y = draw(120, 6), draw(110, 6, seed=1)
    assert ours(x, y, 3, "<=") == ours(x.flip(0), y.roll(17, 0), 3, "<=")


def test_parity_with_torch_fidelity() -> None:
    theirs = pytest.importorskip("torch_fidelity.metric_prc")
    reference, samples = draw(400, 16), draw(300, 16, seed=1) * 1.1
    found = theirs.prc_features_to_metric(
        samples, reference, prc_neighborhood=3, prc_batch_size=128, save_cpu_ram=False, verbose=False
    )
    precision, recall = precision_recall(reference, samples)
    assert 0.05 < precision < recall < 1
    assert precision == pytest.approx(found["precision"], rel=1e-5)
    assert recall == pytest.approx(found["recall"], rel=1e-5)


def test_refused() -> None:
    x = draw(5, 3)
    with pytest.raises(DiffAccelError, match="samples: 3 rows have no 3-th neighbour"):
        precision_recall(x, x[:3])
    with pytest.raises(DiffAccelError, match="reference: 5 rows have no 5-th neighbour"):
        density_coverage(x, x)
    assert density_coverage(x, x[:1], k=4)[0] > 0  # one sample is enough
    with pytest.raises(DiffAccelError, match="k must be at least 1, got 0"):
        precision_recall(x, x, k=0)
    with pytest.raises(DiffAccelError, match="Unknown boundary '=='"):
        precision_recall(x, x, boundary="==")  # type: ignore[arg-type]
    with pytest.raises(DiffAccelError, match="reference has 3 features and samples has 2"):
        precision_recall(x, x[:, :2])
    with pytest.raises(DiffAccelError, match="samples: 1 of 5 rows"):
        precision_recall(x, x.masked_fill(x == x[0, 0], torch.nan))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("boundary", ["<=", "<"])
def test_a_gpu_decides_as_the_cpu_does(boundary: Boundary) -> None:
    for x, y in ((lattice(300, 5) + 1e4, lattice(250, 5, seed=1) + 1e4), (draw(3000, 40).float(), draw(2500, 40, 1))):
        assert ours(x.cuda(), y.cuda(), 3, boundary) == ours(x, y, 3, boundary)
