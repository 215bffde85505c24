"""Fetch CoinRun, once, on a Linux machine with a network, gcc and binutils, and keep the part that training needs.

    python -m scripts.zoo.coinrun.fetch --data data/coinrun

The wheel of ``procgen-mirror`` (MIT, 48 MB) becomes a folder of about 14 MB, which another machine loads with any
Python: libraries stripped, pictures of other games blank. It is never committed.
"""

from __future__ import annotations

import argparse
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

from diffaccel.errors import DiffAccelError, first_line
from scripts.zoo.coinrun.stubs import copy_libraries

PACKAGE = "procgen-mirror==0.10.7"
# What easy CoinRun draws; the library opens every picture of every game when it starts, so the others stay as 1x1.
DRAWN = (
    "platform_backgrounds/alien_bg.png", "misc_assets/", "kenney/Players/128x256/", "kenney/Enemies/", "kenney/Ground/",
    "kenney/Items/coin", "kenney/Tiles/",
)  # fmt: skip
NOTICE = """CoinRun of the procgen benchmark (Cobbe et al., arXiv 1912.01588), from the wheel of procgen-mirror 0.10.7.
Code: Copyright (c) 2019 OpenAI, MIT licence. Libraries: Qt 5.9 (LGPL 3), libpng (libpng licence).
Pictures: platformer art of Kenney (https://www.kenney.nl/assets, CC0); backgrounds and further pictures by ansimuz,
rubberduck, Rawdanitsu, Nidhoggn, tgfcoder, thekingphoenix (CC0), GameArtGuppy.com (CC-BY 4.0), Alucard (CC-BY 3.0) and
CraftPix.net (OGA-BY 3.0). List of sources: ASSET_LICENSES.md of https://github.com/openai/procgen.
"""


def download(folder: Path) -> Path:
    """Download the wheel through pip."""
    options = ("--no-deps", "--only-binary=:all:", "--python-version", "3.11", "--platform", "manylinux2014_x86_64")
    command = [sys.executable, "-m", "pip", "download", PACKAGE, *options, "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("procgen_mirror-*.whl"))
    if done.returncode or not wheels:
        raise DiffAccelError(
            f"pip could not download {PACKAGE}: {first_line(RuntimeError(done.stderr.strip() or 'no wheel'), 200)} "
            "Download its wheel for Linux elsewhere, and pass it with --wheel."
        )
    return wheels[0]


def blank() -> bytes:
    """Return a PNG file of one transparent pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 6, 0, 0, 0)
    pixels = zlib.compress(bytes(5))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def copy_pictures(source: Path, target: Path) -> None:
    """Copy the pictures that the game draws, and a blank one in the place of every other."""
    empty = blank()
    for file in sorted(source.rglob("*.png")):
        name = file.relative_to(source).as_posix()
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes() if name.startswith(DRAWN) else empty)


def fetch(data: Path, wheel: Path | None = None) -> int:
    """Make the folder, and return its size in bytes; an existing one is replaced only when the new one is whole."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        archive = zipfile.ZipFile(wheel or download(folder))
        archive.extractall(folder / "wheel")
        copy_libraries(folder / "wheel", folder / "made" / "lib")
        copy_pictures(folder / "wheel" / "procgen" / "data" / "assets", folder / "made" / "assets")
        (folder / "made" / "NOTICE").write_text(NOTICE, encoding="utf-8")
        shutil.rmtree(data, ignore_errors=True)
        data.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder / "made", data)
    return sum(file.stat().st_size for file in data.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/coinrun"), help="folder to make")
    parser.add_argument("--wheel", type=Path, help="a wheel of procgen-mirror that is already here")
    parser.add_argument("--archive", type=Path, help="also write the folder as a .tar.xz of 5 MB, to take along")
    options = parser.parse_args()
    try:
        print(f"{options.data}: {fetch(options.data, options.wheel) / 1e6:.1f} MB")
        if options.archive:
            with tarfile.open(options.archive, "w:xz") as archive:
                archive.add(options.data, options.data.name)
            print(f"{options.archive}: {options.archive.stat().st_size / 1e6:.1f} MB")
    except DiffAccelError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
