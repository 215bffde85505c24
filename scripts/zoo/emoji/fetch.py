"""Download the emoji packages with npm and extract what the world needs.

    python -m scripts.zoo.emoji.fetch --out data/emoji

writes ``world.json.xz`` (labels, tags, categories), ``svg.json.xz`` (Noto and Twemoji bodies), ``fluent.zip``
(128-pixel WebP with alpha) and ``NOTICE``. Packages are pinned and verified by their sha512; complete ones are not
fetched again.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import lzma
import os
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffaccel.errors import DiffAccelError
from diffaccel.files import write_bytes
from scripts.zoo.emoji import labels
from scripts.zoo.emoji.sources import EMOJIBASE, FLUENT, NOTICE, NOTO, PACKAGES, TWEMOJI, Package, key

WORLD, SVG, FLUENT_ZIP = "world.json.xz", "svg.json.xz", "fluent.zip"
FORMAT = 1
ICON = 128  # pixels


def write_json(path: Path, value: Any) -> None:
    """Write JSON compressed by LZMA, with its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, lzma.compress(json.dumps(value, ensure_ascii=False, sort_keys=True).encode(), preset=9))


def read_json(path: Path) -> Any:
    """Read JSON compressed by LZMA.

    Raises:
        DiffAccelError: for a missing or damaged file.
    """
    try:
        return json.loads(lzma.decompress(path.read_bytes()))
    except FileNotFoundError as error:
        raise DiffAccelError(
            f"'{path}' is missing; make it with: python -m scripts.zoo.emoji.fetch --out {path.parent}"
        ) from error
    except (lzma.LZMAError, ValueError) as error:
        raise DiffAccelError(f"'{path}' is damaged ({error}); remove it and fetch again.") from error


def _sha512(path: Path) -> str:
    return base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def download(package: Package, folder: Path) -> Path:
    """Return the package's archive, fetched by ``npm pack`` unless a complete one exists."""
    target = folder / f"{package.name.replace('@', '').replace('/', '-')}-{package.version}.tgz"
    if target.exists() and _sha512(target) == package.sha512:
        return target
    npm = shutil.which("npm")
    if npm is None:
        raise DiffAccelError("npm is not on PATH; install Node.js with npm (any version that has `npm pack`).")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        spec = f"{package.name}@{package.version}"
        command = [npm, "pack", spec, "--ignore-scripts", "--pack-destination", scratch]
        process = subprocess.run(command, capture_output=True, text=True)
        archives = list(Path(scratch).glob("*.tgz"))
        if process.returncode or len(archives) != 1:
            reason = process.stderr.strip().splitlines()[-1:] or ["no message"]
            raise DiffAccelError(f"`npm pack {spec}` failed ({reason[0]}); check the network and run it again.")
        digest = _sha512(archives[0])
        if digest != package.sha512:
            raise DiffAccelError(f"{spec} has sha512 {digest}, expected {package.sha512}; it was not kept.")
        os.replace(archives[0], target)
    return target


def _members(archive: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Read JSON files of a package archive, by their names inside it."""
    with tarfile.open(archive) as tar:
        return {name: json.load(tar.extractfile(f"package/{name}")) for name in names}


def iconify(archive: Path) -> dict[str, dict[str, Any]]:
    """Read Iconify's SVG bodies by emoji key: ``{"body", "width", "height"}``."""
    files = _members(archive, ("icons.json", "chars.json"))
    data, bodies = files["icons.json"], {}
    for hexcode, name in files["chars.json"].items():
        name = data["aliases"].get(name, {}).get("parent", name)
        icon = data["icons"].get(name)
        if icon is not None:
            size = {side: icon.get(side, data.get(side, 16)) for side in ("width", "height")}
            bodies[key(hexcode)] = {"body": icon["body"], **size}
    return bodies


def entries(archive: Path) -> list[dict[str, Any]]:
    """Read Emojibase's English entries with group and subgroup names."""
    files = _members(archive, ("en/data.json", "meta/groups.json"))
    groups = files["meta/groups.json"]
    return [
        {
            "key": key(entry["hexcode"]),
            "label": entry["label"],
            "tags": entry.get("tags", []),
            "group": groups["groups"][str(entry["group"])],
            "subgroup": groups["subgroups"][str(entry["subgroup"])],
        }
        for entry in sorted(files["en/data.json"], key=lambda entry: entry.get("order", 0))
        if "group" in entry
    ]


def fluent_names(archive: Path) -> dict[str, str]:
    """Return the member names of the Fluent pictures by emoji key."""
    with tarfile.open(archive) as tar:
        names = [name for name in tar.getnames() if name.endswith(".webp")]
    return {key(Path(name).stem): name for name in names}


def _small_webp(data: bytes) -> bytes:
    """Resize a Fluent picture to 128 x 128 with alpha; four of them are a little taller than wide and are squashed."""
    from PIL import Image

    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    # Resizing premultiplied colours keeps the (arbitrary) colour of transparent pixels from bleeding into the rim.
    small = picture.convert("RGBa").resize((ICON, ICON), Image.Resampling.LANCZOS).convert("RGBA")
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=90, alpha_quality=100, method=4)
    return buffer.getvalue()


def pack_fluent(archive: Path, names: Mapping[str, str], path: Path) -> None:
    """Pack the Fluent pictures of ``names``, from emoji key to member name, into one zip archive."""
    buffer = io.BytesIO()
    key_of = {member: name for name, member in names.items()}
    with tarfile.open(archive) as tar, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as packed:
        for member in tar:
            if member.name in key_of:
                # With a fixed date equal inputs give equal archives.
                info = zipfile.ZipInfo(f"{key_of[member.name]}.webp", (1980, 1, 1, 0, 0, 0))
                packed.writestr(info, _small_webp(tar.extractfile(member).read()))
    write_bytes(path, buffer.getvalue())


def fetch(out: Path, *, force: bool = False) -> dict[str, int]:
    """Make the source archives under ``out``, and return their sizes in bytes by file name."""
    files = [out / name for name in (WORLD, SVG, FLUENT_ZIP)]
    archives = {package.name: download(package, out / "downloads") for package in PACKAGES}
    bodies = {"noto": iconify(archives[NOTO.name]), "twemoji": iconify(archives[TWEMOJI.name])}
    pictures = fluent_names(archives[FLUENT.name])
    emoji = entries(archives[EMOJIBASE.name])
    if stray := labels.unmatched(entry["label"] for entry in emoji):
        raise DiffAccelError(f"Rules name labels that emojibase does not have: {', '.join(stray)}; correct labels.py.")
    chosen = labels.select(emoji, [set(bodies["noto"]), set(bodies["twemoji"]), set(pictures)])
    world = {"format": FORMAT, "packages": {p.name: p.version for p in PACKAGES}, "emoji": chosen}
    if force or not all(file.exists() for file in files) or read_json(files[0]) != world:
        keys = [emoji["key"] for emoji in chosen]
        write_json(files[1], {style: {k: by_key[k] for k in keys} for style, by_key in bodies.items()})
        pack_fluent(archives[FLUENT.name], {k: pictures[k] for k in keys}, files[2])
        write_bytes(out / "NOTICE", NOTICE.encode())
        write_json(files[0], world)  # last: its presence says that the others are complete
    return {file.name: file.stat().st_size for file in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", "--data", type=Path, default=Path("data/emoji"), help="folder for the archives")
    parser.add_argument("--force", action="store_true", help="make the archives again even if they are up to date")
    options = parser.parse_args()
    try:
        sizes = fetch(options.out, force=options.force)
    except DiffAccelError as error:
        raise SystemExit(f"error: {error}") from error
    count = len(read_json(options.out / WORLD)["emoji"])
    print(f"{count} labels; " + ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items()))


if __name__ == "__main__":
    main()
