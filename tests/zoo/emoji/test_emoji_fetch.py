"""Downloading and unpacking, with a stand-in for npm; nothing leaves this machine."""

import base64
import hashlib
import io
import json
import tarfile

import pytest

from diffaccel.errors import DiffAccelError
from scripts.zoo.emoji import fetch, labels, render, world
from scripts.zoo.emoji.sources import Package, key

FILES = {
    "chars.json": {"1f600": "grin", "2764-fe0f": "heart-alias", "1f601": "gone"},
    "icons.json": {
        "width": 36,
        "height": 36,
        "icons": {"grin": {"body": "<path/>", "width": 20}, "heart": {"body": "<g/>"}},
        "aliases": {"heart-alias": {"parent": "heart"}},
    },
}


def archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, value in files.items():
            data = json.dumps(value).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def package(path):
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    return Package(name="@scope/thing", version="1.0.0", sha512=digest, licence="MIT")


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """An npm whose ``pack`` copies one archive and counts its calls."""
    source = archive(tmp_path / "source.tgz", FILES)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    script = bin_folder / "npm"
    script.write_text(
        f'#!/bin/sh\necho call >> "{tmp_path}/calls"\n'
        'while [ "$1" != "--pack-destination" ]; do shift; done\n'
        f'cp "{source}" "$2/thing.tgz"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")
    return source


def test_a_package_is_fetched_once(npm, tmp_path):
    wanted = package(npm)
    first = fetch.download(wanted, tmp_path / "out")
    assert first.read_bytes() == npm.read_bytes()
    assert fetch.download(wanted, tmp_path / "out") == first
    assert (tmp_path / "calls").read_text().count("call") == 1
    first.write_bytes(b"half a file")
    assert fetch.download(wanted, tmp_path / "out").read_bytes() == npm.read_bytes()
    assert (tmp_path / "calls").read_text().count("call") == 2


def test_an_archive_with_another_sha_is_not_kept(npm, tmp_path):
    wrong = Package(name="thing", version="1.0.0", sha512="AAAA", licence="MIT")
    with pytest.raises(DiffAccelError, match="expected AAAA"):
        fetch.download(wrong, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_missing_npm_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DiffAccelError, match="npm is not on PATH; install Node"):
        fetch.download(Package(name="thing", version="1.0.0", sha512="AAAA", licence="MIT"), tmp_path / "out")


def test_iconify_aliases_and_sizes(tmp_path):
    found = fetch.iconify(archive(tmp_path / "a.tgz", FILES))
    assert found == {
        "1f600": {"body": "<path/>", "width": 20, "height": 36},
        "2764": {"body": "<g/>", "width": 36, "height": 36},
    }


def test_keys_lose_the_variation_selector_only():
    assert key("2764-FE0F-200D-1F525") == "2764-200d-1f525"
    assert key("1F600") == "1f600"


def test_a_narrow_icon_is_centred_in_a_square():
    assert 'viewBox="-8 0 36 36"' in render.svg("<path/>", 20, 36)


def test_rendering_gives_straight_alpha(tmp_path):
    pytest.importorskip("resvg_py")
    data = render.draw({"body": '<rect x="9" y="9" width="18" height="18" fill="#f00"/>', "width": 36, "height": 36})
    picture = render._decode(data)
    assert picture.shape == (128, 128, 4)
    assert picture[64, 64].tolist() == [255, 0, 0, 255]
    assert picture[4, 4, 3] == 0


def test_missing_and_damaged_files_say_what_to_run(tmp_path):
    with pytest.raises(DiffAccelError, match=r"python -m scripts\.zoo\.emoji\.fetch"):
        world.load(tmp_path)
    (tmp_path / fetch.WORLD).write_bytes(b"no archive")
    with pytest.raises(DiffAccelError, match="damaged"):
        world.load(tmp_path)
    fetch.write_json(tmp_path / fetch.WORLD, {"format": 1, "emoji": [{"key": "1f600", "label": "x", "tags": []}]})
    with pytest.raises(DiffAccelError, match=r"python -m scripts\.zoo\.emoji\.render"):
        world.load(tmp_path)


@pytest.fixture(scope="module")
def real():
    from pathlib import Path

    folder = Path(__file__).parents[3] / "data" / "emoji"
    if not (folder / render.ICONS).exists():
        pytest.skip("data/emoji is absent; make it with scripts.zoo.emoji.fetch and scripts.zoo.emoji.render")
    return world.load(folder)


def test_the_real_world_is_as_described(real):
    assert 850 <= len(real.labels) <= 950
    assert len(set(real.labels)) == len(real.labels)
    assert real.icons.shape == (3 * len(real.labels), 128, 128, 4)
    assert not any(labels.mentions_people_or_flags(text) for text in real.labels)
    assert not any(labels.mentions_people_or_flags(tag) for tags in real.tags for tag in tags)
    assert all(label.isascii() and label == label.lower() for label in real.labels)
    assert real.icons[..., 3].flatten(1).float().mean(1).min() > 2  # no icon is empty
    assert 40 <= (~real.training).sum() <= 80
