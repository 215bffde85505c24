"""A few made pictures in the files of Fashion-MNIST."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), 1))


def make_data(folder: Path) -> Path:
    """Write pictures of ten classes: a bright square at a place that tells the class."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for part, count in (("train", 80), ("t10k", 40)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = generator.integers(0, 60, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[5 * (label // 5) + 4 :, 5 * (label % 5) :][:6, :6] = 230
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder
