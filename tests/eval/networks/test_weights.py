"""Where weights are found, in which order, and what is said when they are nowhere."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffaccel.errors import DiffAccelError
from diffaccel.eval.networks import weights

INCEPTION = weights.KNOWN["inception"].files


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The four places, empty."""
    found = {name: tmp_path / name for name in ("given", "folder", "torch/checkpoints", "hub/models--a--b")}
    for path in found.values():
        path.mkdir(parents=True)
    monkeypatch.setenv(weights.VARIABLE, str(found["folder"]))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return found


def test_the_order_of_places(places):
    hub = places["hub/models--a--b"]
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("f" * 40)
    files = [
        hub / "snapshots" / ("f" * 40) / INCEPTION[0],
        places["torch/checkpoints"] / INCEPTION[1],
        places["folder"] / INCEPTION[1],
        places["given"] / "mine.pth",
    ]
    files[0].parent.mkdir(parents=True)
    for file in files[:2]:
        file.write_bytes(b"x")
    files[1].unlink()
    assert weights.find("inception", hub="a/b") == files[0]
    for file in files[1:3]:  # each is looked for before the ones above
        file.write_bytes(b"x")
        assert weights.find("inception", hub="a/b") == file
    assert weights.find("inception", hub="a/b", elsewhere=False) == files[0]
    files[3].write_bytes(b"x")
    assert weights.find("inception", files[3]) == files[3]
    assert weights.find("mine.pth", places["given"]) == files[3]
    with pytest.raises(weights.MissingWeights, match=r"other\.pth"):
        weights.find("inception", places["given"] / "other.pth")  # a path that was given is the only one looked at


def test_missing_weights_say_what_to_do(places):
    with pytest.raises(weights.MissingWeights) as caught:
        weights.find("inception", hub="a/b", flag="--extractor inception:/path")
    text = str(caught.value)
    for part in (
        INCEPTION[0], str(places["folder"]), str(places["torch/checkpoints"]), "Hugging Face cache of a/b",
        "--extractor inception:/path", weights.VARIABLE, "--extractor tiny", "https://",
    ):  # fmt: skip
        assert part in text
    assert caught.value.exit_code == 6 and isinstance(caught.value, DiffAccelError)
    with pytest.raises(weights.MissingWeights, match="PSNR and SSIM need no weights"):
        weights.find("alexnet-owt-7be5be79.pth")


def test_looking_does_not_raise_and_names_every_place(places):
    nowhere = weights.look("inception", hub="a/b")
    assert nowhere.path is None and len(nowhere.places) == 2 * len(INCEPTION) + 1
    assert nowhere.places[-1] == "the local Hugging Face cache of a/b"
    (places["folder"] / INCEPTION[1]).write_bytes(b"x")
    assert weights.look("inception").path == places["folder"] / INCEPTION[1]
    with pytest.raises(weights.MissingWeights, match=r"run hf download a/b clip\.safetensors"):
        weights.find("clip.safetensors", hub="a/b", elsewhere=False)  # a name that says nothing outside its repository


def test_a_variable_that_is_not_set_is_told(places, monkeypatch):
    monkeypatch.delenv(weights.VARIABLE)
    with pytest.raises(weights.MissingWeights, match=r"DIFFACCEL_WEIGHTS is not set"):
        weights.find("inception")


def test_a_download_is_whole_and_verified_or_not_there(places, tmp_path, monkeypatch):
    published = tmp_path / "published.pth"
    published.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    known = weights.WeightFile(files=("some.pth",), url=published.as_uri(), sha256=digest[:8])
    monkeypatch.setitem(weights.KNOWN, "some", known)
    with pytest.raises(weights.MissingWeights):
        weights.find("some")  # not without leave
    target = places["torch/checkpoints"] / "some.pth"
    assert weights.find("some", download=True) == target and target.read_bytes() == b"weights"
    assert weights.find("some.pth") == target
    target.unlink()
    wrong = weights.WeightFile(files=("some.pth",), url=known.url, sha256="00000000")
    monkeypatch.setitem(weights.KNOWN, "some", wrong)
    with pytest.raises(DiffAccelError, match=f"sha256 {digest}, expected 00000000"):
        weights.find("some", download=True)
    with pytest.raises(DiffAccelError, match="could not be downloaded"):
        weights.fetch((tmp_path / "nowhere.pth").as_uri(), target)
    assert list(places["torch/checkpoints"].iterdir()) == []


class Surprise:
    """What a pickle may do when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_but_tensors_is_unpickled(tmp_path):
    state = {"layer.weight": torch.arange(6.0).view(2, 3)}
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "nested.pth")
    save_file(state, tmp_path / "plain.safetensors")
    for name in ("plain.pth", "nested.pth", "plain.safetensors"):
        assert torch.equal(weights.load(tmp_path / name)["layer.weight"], state["layer.weight"])
    torch.save({"layer.weight": Surprise(tmp_path / "ran")}, tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Surprise(tmp_path / "ran"), protocol=2))
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "plain.safetensors").read_bytes()[:20])
    for name, message in (
        ("evil.pth", "are not unpickled"),
        ("evil.pkl", "are not unpickled"),
        ("cut.safetensors", "cannot be read"),
        ("list.pth", "no state dict"),
    ):
        with pytest.raises(DiffAccelError, match=message):
            weights.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()
