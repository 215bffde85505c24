"""Render the world's emoji at 128 x 128 with alpha and pack them, so that training needs no SVG renderer.

    python -m scripts.zoo.emoji.render --data data/emoji

reads the files of ``fetch`` and writes ``icons.zip``: one WebP per style and emoji, lossless for Noto and Twemoji
(rendered here) and as fetched for Fluent. ``world.json.xz`` and ``icons.zip`` are all that a training machine needs.
"""

from __future__ import annotations

import argparse
import io
import os
import zipfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from diffaccel.errors import DiffAccelError
from diffaccel.files import write_bytes
from scripts.zoo.emoji.fetch import FLUENT_ZIP, ICON, SVG, WORLD, read_json
from scripts.zoo.emoji.sources import STYLES

ICONS = "icons.zip"


def svg(body: str, width: float, height: float) -> str:
    """Wrap an Iconify body in a square SVG document, with the emoji centred."""
    side = max(width, height)
    box = f"{(width - side) / 2:g} {(height - side) / 2:g} {side:g} {side:g}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{ICON}" height="{ICON}" viewBox="{box}">{body}</svg>'
    )


def draw(icon: dict) -> bytes:
    """Render one SVG emoji to a lossless WebP, without system fonts, so that every machine draws the same."""
    import resvg_py
    from PIL import Image

    document = svg(icon["body"], icon["width"], icon["height"])
    png = resvg_py.svg_to_bytes(svg_string=document, width=ICON, height=ICON, skip_system_fonts=True)
    buffer = io.BytesIO()
    Image.open(io.BytesIO(bytes(png))).convert("RGBA").save(buffer, "WEBP", lossless=True, quality=60, method=4)
    return buffer.getvalue()


def render(folder: Path, *, force: bool = False) -> Path:
    """Make ``icons.zip``, unless it exists with every emoji of the world."""
    keys = [emoji["key"] for emoji in read_json(folder / WORLD)["emoji"]]
    target = folder / ICONS
    expected = [f"{style}/{key}.webp" for style in STYLES for key in keys]
    if target.exists() and not force:
        with zipfile.ZipFile(target) as packed:
            if packed.namelist() == expected:
                return target
    bodies = read_json(folder / SVG)
    jobs = [bodies[style][key] for style in STYLES[:2] for key in keys]
    with ProcessPoolExecutor(os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()) as pool:
        pictures = list(pool.map(draw, jobs, chunksize=32))
    with zipfile.ZipFile(folder / FLUENT_ZIP) as fluent:
        pictures += [fluent.read(f"{key}.webp") for key in keys]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as packed:
        for name, data in zip(expected, pictures, strict=True):
            packed.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    write_bytes(target, buffer.getvalue())
    return target


def _decode(data: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))


def read(folder: Path, names: Iterable[str]) -> np.ndarray:
    """Read icons by name (``style/key.webp``): uint8 (N, 128, 128, 4), straight alpha."""
    path = folder / ICONS
    if not path.exists():
        raise DiffAccelError(f"'{path}' is missing; make it with: python -m scripts.zoo.emoji.render --data {folder}")
    with zipfile.ZipFile(path) as packed:
        packed_names = set(packed.namelist())
        names = list(names)
        if missing := [name for name in names if name not in packed_names]:
            raise DiffAccelError(
                f"'{path}' lacks {len(missing)} icons ('{missing[0]}', ...); make it again with: "
                f"python -m scripts.zoo.emoji.render --data {folder}"
            )
        data = [packed.read(name) for name in names]
    with ThreadPoolExecutor() as pool:  # the decoder releases the interpreter lock
        return np.stack(list(pool.map(_decode, data, chunksize=64)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="folder that fetch wrote")
    parser.add_argument("--force", action="store_true", help="render again even if icons.zip is complete")
    options = parser.parse_args()
    try:
        path = render(options.data, force=options.force)
    except DiffAccelError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{path} {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
