"""Copy Fashion-MNIST out of Debian's package ``dataset-fashion-mnist`` (MIT, 31 MB), and verify it.

    python -m scripts.zoo.fashion.fetch --data data/fashion

An installed package is copied from ``/usr/share/datasets``; else ``apt-get download`` fetches it, or ``--package``
names its file. It is never committed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from diffaccel.errors import DiffAccelError, first_line
from diffaccel.files import sha256, write_bytes

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
DIGESTS = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
NOTICE = """Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv 1708.07747), from Debian's package dataset-fashion-mnist.
Copyright (c) 2017 Zalando SE, https://tech.zalando.com. MIT licence.
"""


def download(folder: Path) -> Path:
    """Return the package's file, fetched by apt."""
    command = ["apt-get", "download", PACKAGE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    files = sorted(folder.glob(f"{PACKAGE}_*.deb"))
    if done.returncode or not files:
        reason = first_line(RuntimeError(done.stderr.strip() or "no file"), 200)
        raise DiffAccelError(f"apt could not download {PACKAGE}: {reason} Give its file with --package.")
    return files[0]


def unpack(package: Path, folder: Path) -> Path:
    """Return the folder of the data in an unpacked package."""
    command = ["dpkg-deb", "-x", str(package.resolve()), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = first_line(RuntimeError(done.stderr.strip() or "no message"), 200)
        raise DiffAccelError(f"'{package}' cannot be unpacked: {reason}")
    return folder / INSTALLED.relative_to("/")


def take(source: Path, data: Path) -> int:
    """Copy the four files whose digests are right, and return their size in bytes."""
    data.mkdir(parents=True, exist_ok=True)
    for name, digest in DIGESTS.items():
        file = source / name
        if not file.is_file() or sha256(file) != digest:
            raise DiffAccelError(f"'{file}' is missing or not that of {PACKAGE}; fetch the package again.")
        shutil.copyfile(file, data / name)
    write_bytes(data / "NOTICE", NOTICE.encode())
    return sum((data / name).stat().st_size for name in DIGESTS)


def fetch(data: Path, package: Path | None = None) -> int:
    """Make the folder, and return its size in bytes."""
    if all((data / name).is_file() and sha256(data / name) == digest for name, digest in DIGESTS.items()):
        return sum((data / name).stat().st_size for name in DIGESTS)
    if package is None and INSTALLED.is_dir():
        return take(INSTALLED, data)
    with tempfile.TemporaryDirectory() as scratch:
        return take(unpack(package or download(Path(scratch)), Path(scratch) / "unpacked"), data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/fashion"), help="folder to make")
    parser.add_argument("--package", type=Path, help="the package's .deb file, where it is here already")
    options = parser.parse_args()
    try:
        print(f"{options.data}: {fetch(options.data, options.package) / 1e6:.1f} MB")
    except DiffAccelError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
