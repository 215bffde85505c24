"""Features: rows in the order of ids whatever the batches, and nothing extracted twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError
from diffaccel.eval.features import extract as features
from diffaccel.eval.features.extract import Features, extract, merge
from diffaccel.eval.images.open import open_source
from diffaccel.eval.networks.extractors.base import Extractor


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    """Up to the rounding of a convolution, whose algorithm may follow the batch size."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-6 * b.abs().max())


class Counting:
    """A small convolutional extractor that counts images, and can be killed after some."""

    def __init__(self, dim: int = 6, sha: str = "a" * 64, last: int | None = None) -> None:
        torch.manual_seed(0)
        self.seen, self.last = 0, last
        self.layers = nn.Sequential(nn.Conv2d(3, dim, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.extractor = Extractor(
            name="small", key="FD-small", dim=dim, weights_sha256=sha, official=False, network=self.network
        )

    def network(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        if self.last is not None and self.seen > self.last:
            raise KeyboardInterrupt
        return self.layers(x.float() / 255)


def test_rows_follow_ids_and_not_batches():
    images = pixels(23, 3, 12, 12)
    whole = extract(open_source(images), Counting().extractor)
    assert isinstance(whole, Features) and whole.values.shape == (23, 6) and whole.values.dtype == torch.float32
    for batch in (1, 7, 23):
        assert same(extract(open_source(images), Counting().extractor, batch=batch).values, whole.values)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    shuffled = extract(open_source(images[order], ids=[f"{i:06d}" for i in order]), Counting().extractor, batch=5)
    assert shuffled.ids == whole.ids and same(shuffled.values, whole.values)
    assert torch.equal(whole.rows(["000004", "000001"]), whole.values[[4, 1]])
    with pytest.raises(DiffAccelError, match="'tensor' has no image with the id 'x'"):
        whole.rows(["000001", "x"])


def test_files_of_several_sizes_give_the_rows_of_their_ids(tmp_path):
    for i in range(12):
        size = (10 + 4 * (i % 3), 9)
        name = f"{i:02d}.{'png' if i % 2 else 'bmp'}"  # a suffix does not change the order
        Image.fromarray(pixels(*size, 3, seed=i).numpy()).save(tmp_path / name)
    found = extract(open_source(tmp_path), Counting().extractor, batch=3)
    assert found.ids == tuple(f"{i:02d}" for i in range(12)) and "3 sizes" in found.warnings[0]
    counting = Counting()
    for i in range(12):
        expected = counting.extractor(pixels(10 + 4 * (i % 3), 9, 3, seed=i).permute(2, 0, 1)[None])
        assert torch.allclose(found.values[i], expected[0], atol=1e-6)


def test_preparation_is_the_extractors():
    images = pixels(5, 3, 12, 12)
    halves = Counting()
    halves.extractor.prepare = lambda image: image[:, ::2, ::2]
    found = extract(open_source(images), halves.extractor)
    assert torch.equal(found.values, halves.extractor(images))
    assert torch.equal(found.values, Counting().extractor(images[:, :, ::2, ::2]))


def test_what_was_extracted_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 10)
    images = pixels(34, 3, 12, 12)
    source = open_source(images)
    expected = extract(source, Counting().extractor).values
    killed = Counting(last=25)
    with pytest.raises(KeyboardInterrupt):
        extract(source, killed.extractor, batch=1, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    goes_on = Counting()
    assert same(extract(source, goes_on.extractor, batch=4, cache=tmp_path).values, expected)
    assert goes_on.seen == 14 and len(list(tmp_path.iterdir())) == 4
    again = Counting()
    assert same(extract(source, again.extractor, cache=tmp_path).values, expected) and again.seen == 0
    first = Counting()
    extract(open_source(images, num=20), first.extractor, cache=tmp_path)
    assert first.seen == 0  # the same images in a row, whatever follows them
    changed = images.clone()
    changed[12, 0, 0, 0] += 1
    other = Counting()
    extract(open_source(changed), other.extractor, cache=tmp_path)
    assert other.seen == 10
    for different in (Counting(sha="b" * 64), Counting(dim=5)):
        extract(source, different.extractor, cache=tmp_path)
        assert different.seen == 34


def test_a_damaged_file_of_the_cache_is_made_again(tmp_path):
    source = open_source(pixels(4, 3, 12, 12))
    expected = extract(source, Counting().extractor, cache=tmp_path).values
    (file,) = tmp_path.iterdir()
    for data in (file.read_bytes()[:50], b""):
        file.write_bytes(data)
        counting = Counting()
        assert torch.equal(extract(source, counting.extractor, cache=tmp_path).values, expected) and counting.seen == 4


def test_features_that_are_not_finite_are_refused_and_not_kept(tmp_path):
    def network(x: Tensor) -> Tensor:
        means = x.float().mean((2, 3))
        return means / (means > 0)

    broken = Extractor(name="broken", key="FD-broken", dim=3, weights_sha256="", official=False, network=network)
    images = pixels(6, 3, 8, 8)
    images[3], images[5] = 0, 0
    with pytest.raises(DiffAccelError, match=r"'broken' .* not finite for 2 of 6 images, the first '000003'"):
        extract(open_source(images), broken, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_statistics_have_no_features(tmp_path):
    np.savez(tmp_path / "reference.npz", mu=np.zeros(6), sigma=np.eye(6))
    with pytest.raises(DiffAccelError, match="'reference' holds statistics and no images"):
        extract(open_source(tmp_path / "reference.npz"), Counting().extractor)


def test_progress_is_on_stderr_alone(capsys):
    extract(open_source(pixels(4, 3, 8, 8)), Counting().extractor, progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "4/4" in shown.err
    extract(open_source(pixels(4, 3, 8, 8)), Counting().extractor)
    assert capsys.readouterr() == ("", "")


def test_processes_are_merged_by_id():
    """A sampler that pads its last batch repeats images; a mean over the repetitions is another mean."""
    images = pixels(10, 3, 12, 12)
    whole = extract(open_source(images), Counting().extractor)

    def part(rows: list[int]) -> Features:
        return extract(open_source(images[rows], ids=[f"{i:06d}" for i in rows]), Counting().extractor)

    shards = [part([0, 4, 8, 1]), part([9, 5, 1]), part([2, 6, 0]), part([3, 7])]
    assert sum(map(len, shards)) == 12
    for parts in (shards, shards[::-1]):
        merged = merge(parts, num=10)
        assert merged.ids == whole.ids and same(merged.values, whole.values)
    with pytest.raises(DiffAccelError, match="hold 8 different images, but 10 were expected"):
        merge(shards[:3], num=10)
    shards[1].values[0] += 1
    with pytest.raises(DiffAccelError, match="Two different images have the id '000001'"):
        merge(shards)
    other = extract(open_source(images), Counting(sha="b" * 64).extractor)
    with pytest.raises(DiffAccelError, match="cannot be merged"):
        merge([whole, other])
    with pytest.raises(DiffAccelError, match="no features"):
        merge([])
