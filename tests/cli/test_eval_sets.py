"""``diffaccel eval fid``, ``kid``, ``is``, ``prdc``, ``cmmd``, ``stats``: sets of images, or files in place of them."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel.eval.features.extract import extract
from diffaccel.eval.images.open import open_source
from diffaccel.eval.metrics.frechet import Moments
from diffaccel.eval.metrics.mmd import cmmd, cmmd_unbiased
from diffaccel.eval.metrics.mmd_intervals import kid_interval
from diffaccel.eval.networks import weights
from diffaccel.eval.networks.extractors import extractor
from diffaccel.files import sha256
from tests.support import random_inception


def draw(folder: Path, count: int, seed: int, size: int = 32) -> None:
    generator = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(count):
        pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((size, size)).save(folder / f"{i:03d}.png")


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Folders of 12 images (a, b), of 100 (many, more) and of one."""
    root = tmp_path_factory.mktemp("sets")
    for seed, (name, count) in enumerate({"a": 12, "b": 12, "many": 100, "more": 100, "one": 1}.items()):
        draw(root / name, count, seed)
    return root


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    return random_inception.save(tmp_path_factory.mktemp("inception") / "random.pth")


@pytest.fixture(autouse=True)
def nothing_on_this_machine(tmp_path, monkeypatch):
    """No weights but those of a test."""
    monkeypatch.delenv(weights.VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def kept(sets: Path) -> tuple[object, ...]:
    return "--cache", sets / ".kept"


def values(done) -> dict[str, float]:
    assert done.status == 0, done.err
    return {row["key"]: row["value"] for row in done.json["metrics"]}


@pytest.mark.slow
def test_a_distance_says_everything_that_decides_it(run, sets):
    done = run("eval", "fid", sets / "a", sets / "b", "--json")
    (row,) = done.json["metrics"]
    assert row["key"].startswith("FD-tiny@") and "FID" not in done.out and row["better"] == "lower"
    assert (row["n"], row["m"], row["run"], row["detail"]["reference"]) == (12, 12, "a", "b")
    assert row["detail"]["extractor"] == "tiny" and row["detail"]["protocol"] == "own"
    assert len(row["detail"]["weights_sha256"]) == 64 and row["value"] > 1e-3 and row["interval"] is None
    assert any("singular" in text for text in done.json["warnings"]) and not done.err
    assert values(run("eval", "fid", sets / "a", sets / "a", "--json"))[row["key"]] == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_values_are_those_of_the_library(run, sets):
    tiny, clip = extractor("tiny"), extractor("emoji-clip-judge")
    x, y = (extract(open_source(sets / name), tiny, cache=sets / ".kept").values for name in ("many", "more"))
    interval = kid_interval(x, y)
    (row,) = run("eval", "kid", sets / "many", sets / "more", *kept(sets), "--json").json["metrics"]
    assert row["value"] == pytest.approx(1000 * interval.value) and row["key"].endswith(" x1000")
    assert row["interval"]["low"] == pytest.approx(1000 * interval.low)
    a, b = (extract(open_source(sets / name), clip).values for name in ("a", "b"))
    found = values(run("eval", "cmmd", sets / "a", sets / "b", "--json"))
    assert found == {
        "CMMD[emoji-clip-judge] x1000": pytest.approx(cmmd(a, b)),
        "CMMD (unbiased)[emoji-clip-judge] x1000": pytest.approx(cmmd_unbiased(a, b)),
    }
    shares = values(run("eval", "prdc", sets / "a", sets / "a", "--json"))
    assert [name.partition("-")[0] for name in shares] == ["precision", "recall", "density", "coverage"]
    assert list(shares.values())[:2] == [1, 1]


@pytest.mark.slow
def test_an_interval_and_the_limit_of_many_images(run, sets):
    done = run("eval", "fid", sets / "many", sets / "more", *kept(sets), "--infinity", "--json")
    plain, limit = done.json["metrics"]
    assert plain["interval"]["low"] < plain["value"] < plain["interval"]["high"]
    assert "of 100 influences" in plain["interval"]["method"]
    assert limit["key"] == plain["key"].replace("FD-", "FD-infinity-") and limit["value"] < plain["value"]
    assert limit["detail"]["r2"] > 0.9 and limit["interval"]["low"] < limit["value"] and "FID" not in done.out
    bare = run("eval", "fid", sets / "many", sets / "more", *kept(sets), "--no-interval", "--json").json["metrics"]
    assert [row["interval"] for row in bare] == [None] and bare[0]["value"] == pytest.approx(plain["value"])


def test_text_has_a_line_a_number_and_notes_on_stderr(run, sets):
    done = run("eval", "kid", sets / "a", sets / "b")
    assert done.status == 0 and done.out.count("\n") == 1 and done.out.startswith("KID-tiny@")
    assert "n = 12, m = 12" in done.out and "FID" not in done.out and not done.err
    done = run("eval", "fid", sets / "a", sets / "b")
    assert done.out.count("\n") == 1 and done.err.startswith("warning: 12 images give a singular")


@pytest.mark.slow
def test_json_in_a_file(run, sets, tmp_path):
    file = tmp_path / "deep" / "out.json"
    done = run("eval", "fid", sets / "a", sets / "b", "--json", file)
    assert done.out.startswith("FD-tiny@") and "warning" in done.err
    assert json.loads(file.read_text())["metrics"][0]["n"] == 12
    assert json.loads(run("eval", "fid", sets / "a", sets / "b", "--json", "-").out)["metrics"]
    refused = run("eval", "fid", "--json", sets / "a", sets / "b")
    assert refused.status == 2 and "ends with .json" in refused.err


@pytest.mark.slow
def test_different_numbers_of_images_stay_apart(run, sets):
    refused = run("eval", "fid", sets / "a", sets / "many", sets / "more", *kept(sets))
    assert refused.status == 2 and "('a' 12, 'many' 100)" in refused.err and "--allow-mixed-n" in refused.err
    done = run("eval", "fid", sets / "a", sets / "many", sets / "more", *kept(sets), "--allow-mixed-n", "--json")
    assert [(row["run"], row["n"], row["m"]) for row in done.json["metrics"]] == [("a", 12, 100), ("many", 100, 100)]
    cut = run("eval", "fid", sets / "a", sets / "many", sets / "more", "--num", 12)
    assert cut.status == 0 and cut.out.startswith("a: FD-tiny@") and cut.out.count("\n") == 2


def test_sets_of_one_name_are_told_apart(run, sets, tmp_path):
    draw(tmp_path / "a", 12, 9)
    done = run("eval", "prdc", sets / "a", tmp_path / "a", sets / "b", "--json")
    assert {row["run"] for row in done.json["metrics"]} == {str(sets / "a"), str(tmp_path / "a")}


@pytest.mark.slow
def test_a_zip_and_an_npz_are_the_folder(run, sets, tmp_path):
    pixels = np.stack([np.asarray(Image.open(file)) for file in sorted((sets / "a").iterdir())])
    np.savez(tmp_path / "a.npz", pixels)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in (sets / "a").iterdir():
            archive.write(file, file.name)
    (expected,) = values(run("eval", "fid", sets / "a", sets / "b", "--json")).values()
    for name in ("a.npz", "a.zip"):
        (found,) = values(run("eval", "fid", tmp_path / name, sets / "b", "--json")).values()
        assert found == pytest.approx(expected, rel=1e-9)


def test_features_are_kept(run, sets, tmp_path, monkeypatch):
    first = values(run("eval", "fid", sets / "a", sets / "b", "--cache", tmp_path, "--json"))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    monkeypatch.setattr("diffaccel.eval.networks.tiny_network.TinyNetwork.forward", None)  # no network any more
    assert values(run("eval", "fid", sets / "a", sets / "b", "--cache", tmp_path, "--json")) == first


# -- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_statistics_stand_for_a_set(run, sets, tmp_path):
    made = run("eval", "stats", sets / "b", "-o", tmp_path / "b.npz", "--json")
    assert made.json["n"] == 12 and made.json["protocol"] == "own" and made.json["dim"] == 192
    direct, stored = (
        run("eval", "fid", sets / "a", other, "--json").json["metrics"][0] for other in (sets / "b", tmp_path / "b.npz")
    )
    assert stored["value"] == pytest.approx(direct["value"], rel=1e-6) and stored["m"] == 12
    with np.load(tmp_path / "b.npz") as file:
        assert file["mu"].shape == (192,) and file["sigma"].shape == (192, 192)
    both = run("eval", "fid", tmp_path / "b.npz", tmp_path / "b.npz", "--json")
    assert list(values(both).values()) == [pytest.approx(0, abs=1e-9)]
    beyond = run("eval", "fid", tmp_path / "b.npz", tmp_path / "b.npz", "--infinity")
    assert beyond.status == 2 and "not statistics" in beyond.err


@pytest.mark.slow
def test_foreign_statistics_are_assumed_to_fit_and_said_so(run, sets, tmp_path):
    moments = Moments.of(extract(open_source(sets / "b"), extractor("tiny")).values)
    arrays = {"mu": moments.mean.numpy(), "sigma": moments.covariance.numpy()}
    np.savez(tmp_path / "foreign.npz", **arrays)
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({"fid": arrays}))
    (expected,) = values(run("eval", "fid", sets / "a", sets / "b", "--json")).values()
    for name in ("foreign.npz", "edm2.pkl"):
        done = run("eval", "fid", sets / "a", tmp_path / name, "--json")
        (row,) = done.json["metrics"]
        assert row["value"] == pytest.approx(expected, rel=1e-6) and row["m"] is None
        said = [text for text in done.json["warnings"] if "assumed" in text]
        assert len(said) == 1 and "number of images, network, protocol, weights" in said[0]


@pytest.mark.slow
def test_statistics_of_any_network_compare_without_it(run, tmp_path):
    """Two files as pytorch-fid writes them, of 256 features: N(0, I) and N(1, I) are 256 apart."""
    for name, mean in (("a", 0.0), ("b", 1.0)):
        np.savez(tmp_path / f"{name}.npz", mu=np.full(256, mean), sigma=np.eye(256))
    done = run("eval", "fid", tmp_path / "a.npz", tmp_path / "b.npz", "--json")
    (row,) = done.json["metrics"]
    assert row["key"] == "FD-unknown" and row["value"] == pytest.approx(256, rel=1e-9)
    assert any("an unknown network" in text for text in done.json["warnings"])


@pytest.mark.slow
def test_clean_fids_features_are_a_set(run, sets, tmp_path):
    np.savez(tmp_path / "kid.npz", feats=extract(open_source(sets / "b"), extractor("tiny")).values.numpy())
    (expected,) = values(run("eval", "kid", sets / "a", sets / "b", "--json")).values()
    done = run("eval", "kid", sets / "a", tmp_path / "kid.npz", "--json")
    assert list(values(done).values()) == [pytest.approx(expected, rel=1e-9)] and "assumed" in done.json["warnings"][0]


# -- protocols --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_protocol_is_part_of_the_key(run, sets, inception, tmp_path, monkeypatch):
    sha = sha256(inception)
    how = ("--extractor", f"inception:{inception}", "--num", 4, "--cache", tmp_path / "kept", "--json")
    refused = run("eval", "fid", sets / "a", sets / "b", *how)
    assert refused.status == 2 and sha in refused.err and "--allow-unknown-weights" in refused.err
    unknown = run("eval", "fid", sets / "a", sets / "b", "--protocol", "adm", *how, "--allow-unknown-weights")
    assert list(values(unknown)) == [
        f"FD-inception(sha={sha[:8]})[adm]", f"FD-inception-spatial(sha={sha[:8]})[adm]",
    ]  # fmt: skip
    assert "FID" not in "".join(values(unknown)) and "not comparable" in " ".join(unknown.json["warnings"])

    monkeypatch.setitem(weights.KNOWN, "inception", weights.WeightFile(files=("i.pth",), url="", sha256=sha[:8]))
    monkeypatch.setenv(weights.VARIABLE, str(inception.parent))
    monkeypatch.setitem(weights.KNOWN, "inception", weights.WeightFile(files=(inception.name,), url="", sha256=sha[:8]))
    how = ("--num", 4, "--cache", tmp_path / "kept", "--json")
    found = run("eval", "fid", sets / "a", sets / "b", "--protocol", "adm", *how)
    assert list(values(found)) == ["FID[adm]", "sFID-unverified[adm]"]
    assert list(values(found).values()) == list(values(unknown).values())
    shares = values(run("eval", "prdc", sets / "a", sets / "b", "--protocol", "adm", *how))
    assert list(shares) == ["precision[adm]", "recall[adm]"]
    kernel = run("eval", "kid", sets / "a", sets / "b", "--protocol", "tf-fid", *how)
    assert list(values(kernel)) == ["KID[tf-fid] x1000", "KID (subsets)[tf-fid] x1000"]
    assert kernel.json["metrics"][1]["missing"] == "subsets of 1000 images cannot be drawn from 4"
    score = run("eval", "is", sets / "a", "--protocol", "adm", *how).json["metrics"][0]
    assert score["key"] == "IS[adm]" and score["value"] >= 1 and score["detail"]["size"] == 5000


@pytest.mark.slow
def test_a_protocols_statistics_stand_for_its_images(run, sets, inception, tmp_path, monkeypatch):
    monkeypatch.setenv(weights.VARIABLE, str(inception.parent))
    known = weights.WeightFile(files=(inception.name,), url="", sha256=sha256(inception)[:8])
    monkeypatch.setitem(weights.KNOWN, "inception", known)
    how = ("--num", 4, "--cache", tmp_path / "kept", "--json")
    found = run("eval", "fid", sets / "a", sets / "b", "--protocol", "adm", *how)
    made = run("eval", "stats", sets / "b", "-o", tmp_path / "ref.npz", "--protocol", "adm", *how)
    assert made.json["protocol"] == "adm"
    with np.load(tmp_path / "ref.npz") as file:
        assert file["mu_s"].shape == (2023,) and file["sigma"].shape == (2048, 2048)
    stored = run("eval", "fid", sets / "a", tmp_path / "ref.npz", "--protocol", "adm", *how)
    assert list(values(stored)) == ["FID[adm]", "sFID-unverified[adm]"]
    for key, value in values(found).items():
        assert values(stored)[key] == pytest.approx(value, rel=1e-5)


@pytest.mark.slow
def test_adms_file_is_its_statistics_for_fid_and_its_images_elsewhere(run, sets, inception, tmp_path):
    how = ("--extractor", f"inception:{inception}", "--allow-unknown-weights", "--num", 3, "--json")
    pixels = np.stack([np.asarray(Image.open(file)) for file in sorted((sets / "b").iterdir())])
    np.savez(tmp_path / "adm.npz", arr_0=pixels, mu=np.zeros(2048), sigma=np.eye(2048))
    found = run("eval", "fid", sets / "a", tmp_path / "adm.npz", *how)
    network = extractor(f"inception:{inception}", allow_unknown_weights=True)
    rows = extract(open_source(sets / "a", num=3), network).values.double()
    roots = torch.linalg.svdvals(rows - rows.mean(0)) / 2**0.5  # of the covariance's eigenvalues
    expected = float(rows.mean(0).square().sum() + roots.square().sum() + 2048 - 2 * roots.sum())
    assert list(values(found).values()) == [pytest.approx(expected, rel=1e-6)]
    direct, stored = (
        values(run("eval", "kid", sets / "a", other, *how)) for other in (sets / "b", tmp_path / "adm.npz")
    )
    assert direct == stored


@pytest.mark.slow
def test_weights_are_fetched_when_that_is_allowed(run, sets, inception, tmp_path, monkeypatch):
    sha = sha256(inception)
    known = weights.WeightFile(files=("fetched.pth",), url=inception.as_uri(), sha256=sha[:8])
    monkeypatch.setitem(weights.KNOWN, "inception", known)
    argv = ("eval", "kid", sets / "a", sets / "b", "--protocol", "clean-fid", "--num", 3, "--json")
    assert run(*argv).status == 6
    found = run(*argv, "--download")
    assert list(values(found)) == ["KID (subsets)[clean-fid] x1000"]
    (row,) = found.json["metrics"]
    assert row["detail"]["size"] == 3 and row["detail"]["subsets"] == 100 and row["detail"]["weights_sha256"] == sha
    assert row["detail"]["std"] == pytest.approx(0, abs=1e-6)  # every subset is the whole set
    assert (tmp_path / "torch" / "checkpoints" / "fetched.pth").is_file() and run(*argv).status == 0


def test_another_clip_than_cmmds_is_named(run, sets):
    done = run(
        "eval", "cmmd", sets / "a", sets / "b", "--protocol", "cmmd", "--extractor", "emoji-clip-judge", "--json"
    )
    assert list(values(done)) == [
        "CMMD[emoji-clip-judge][cmmd] x1000", "CMMD (unbiased)[emoji-clip-judge][cmmd] x1000",
    ]  # fmt: skip
    assert "CMMD is published with ViT-L-14-336; this is emoji-clip-judge." in done.json["warnings"]


@pytest.mark.gpu
@pytest.mark.parametrize("command", ["fid", "kid", "prdc", "cmmd"])
def test_a_gpu_gives_the_numbers_of_a_cpu(run, sets, command):
    more = ("--infinity",) if command == "fid" else ()
    on = {
        device: run("eval", command, sets / "many", sets / "more", "--device", device, *more, "--json")
        for device in ("cpu", "cuda")
    }
    for key, value in values(on["cpu"]).items():
        assert values(on["cuda"])[key] == pytest.approx(value, rel=1e-3, abs=1e-3)


# -- failures ---------------------------------------------------------------------------------------------------------


BAD = {
    "nothing there": ("fid a none", 2, "There is no"),
    "one set": ("fid a", 2, "at least two"),
    "empty folder": ("fid a empty", 2, "holds no images"),
    "one image": ("fid one b", 2, "holds 1 image, and at least 2"),
    "too few": ("fid a b --num 99", 2, "99 images were asked for"),
    "num": ("fid a b --num 0", 2, "--num is 0"),
    "batch": ("fid a b --batch 0", 2, "--batch is 0"),
    "few for the limit": ("fid a b --infinity", 2, "at least 100"),
    "extractor": ("fid a b --extractor tny", 2, "Did you mean 'tiny'"),
    "protocol": ("fid a b --protocol cleanfid", 2, "Did you mean 'clean-fid'"),
    "a protocol without it": ("kid a b --protocol edm", 2, "nothing for 'eval kid'"),
    "protocol and extractor": ("fid a b --protocol tf-fid --extractor tiny", 2, "does not say what to do before"),
    "no weights": ("fid a b --protocol tf-fid", 6, "--extractor tiny works"),
    "no weights of clip": ("cmmd a b --protocol cmmd", 6, "vit_large_patch14_clip_336.openai"),
    "no weights of dinov2": ("fid a b --protocol dgm-dinov2", 6, "dinov2_vitl14_pretrain.pth"),
    "no weights for a score": ("is a", 6, "6726825d"),
    "no classes": ("is a --extractor tiny", 2, "gives features and no classes"),
    "no clip": ("cmmd a b --extractor tiny", 2, "reads no texts"),
    "statistics for shares": ("prdc a stats.npz", 2, "not statistics"),
    "another network": ("fid a other.npz", 2, "another network"),
    "another protocol": ("fid a protocol.npz", 2, "Give --protocol tf-fid"),
    "dimensions": ("fid a small.npz", 2, "of 4 features, the extractor gives 192"),
    "no statistics": ("fid a keys.npz", 2, "its keys are gamma, mean"),
    "floats": ("fid a floats.npz", 2, "must be uint8"),
    "no numbers": ("fid a nan.npz", 2, "NaN"),
    "no covariance": ("fid a skew.npz", 2, "not symmetric"),
    "a pickle": ("fid a evil.pkl", 2, "was not run"),
    "device": ("fid a b --device cpuu", 2, "Did you mean 'cpu'"),
    "command": ("fdi a b", 2, "Did you mean 'fid'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(sets) -> Path:
    """The sets, and files that are wrong in one way each."""
    (sets / "empty").mkdir()
    known = {"weights_sha256": "0" * 64, "feature_name": "net", "protocol": "own", "n": 9, "version": 1}
    np.savez(sets / "stats.npz", mu=np.zeros(192), sigma=np.eye(192))
    np.savez(sets / "other.npz", mu=np.zeros(192), sigma=np.eye(192), **known)
    known |= {"weights_sha256": extractor("tiny").weights_sha256, "protocol": "tf-fid"}
    np.savez(sets / "protocol.npz", mu=np.zeros(192), sigma=np.eye(192), **known)
    np.savez(sets / "small.npz", mu=np.zeros(4), sigma=np.eye(4))
    np.savez(sets / "keys.npz", mean=np.zeros(4), gamma=np.eye(4))
    np.savez(sets / "floats.npz", np.full((4, 8, 8, 3), np.nan, np.float32))
    np.savez(sets / "nan.npz", mu=np.full(192, np.nan), sigma=np.eye(192))
    np.savez(sets / "skew.npz", mu=np.zeros(192), sigma=np.triu(np.ones((192, 192))))
    (sets / "evil.pkl").write_bytes(pickle.dumps(print))
    return sets


@pytest.mark.parametrize("case", BAD)
def test_bad_input(run, files, case):
    words, status, said = BAD[case]
    there = {path.name for path in files.iterdir()} | {"none"}
    done = run("eval", *[files / word if word in there else word for word in words.split()])
    assert done.status == status and said in done.err and not done.out
    assert done.err.count("\n") == 1 and "Traceback" not in done.err


def test_mixed_sizes_are_allowed_and_said(run, sets, tmp_path):
    draw(tmp_path / "mixed", 6, 3)
    Image.new("RGB", (48, 40)).save(tmp_path / "mixed" / "zz.png")
    done = run("eval", "fid", tmp_path / "mixed", sets / "b")
    assert done.status == 0 and "2 sizes: 6 of 32x32, 1 of 48x40" in done.err


def test_lossy_files_are_said(run, sets, tmp_path):
    draw(tmp_path / "lossy", 4, 3)
    Image.new("RGB", (32, 32)).save(tmp_path / "lossy" / "zz.jpg")
    done = run("eval", "fid", tmp_path / "lossy", sets / "b")
    assert done.status == 0 and "1 of 5 images" in done.err and "JPEG" in done.err


def test_a_network_that_raises_is_a_metric_that_failed(run, sets, monkeypatch):
    def broken(self, images):
        raise RuntimeError("out of ideas")

    monkeypatch.setattr("diffaccel.eval.networks.tiny_network.TinyNetwork.forward", broken)
    done = run("eval", "fid", sets / "a", sets / "b")
    assert done.status == 4 and "'eval fid' failed: RuntimeError: out of ideas" in done.err and not done.out
    monkeypatch.setattr("diffaccel.eval.metrics.frechet.between", lambda x, y: 1 / 0)
    monkeypatch.undo()
    monkeypatch.setattr("diffaccel.eval.metrics.frechet.between", lambda x, y: 1 / 0)
    assert run("eval", "fid", sets / "a", sets / "b").status == 4


def test_features_that_are_not_finite_name_the_image(run, sets, monkeypatch):
    def broken(self, images):
        return torch.full((len(images), 192), torch.nan)

    monkeypatch.setattr("diffaccel.eval.networks.tiny_network.TinyNetwork.forward", broken)
    done = run("eval", "fid", sets / "a", sets / "b")
    assert done.status == 2 and "not finite for 12 of 12 images, the first '000'" in done.err


def test_an_interrupt_says_so(run, sets, monkeypatch):
    def interrupted(self, images):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffaccel.eval.networks.tiny_network.TinyNetwork.forward", interrupted)
    assert run("eval", "fid", sets / "a", sets / "b").status == 130
