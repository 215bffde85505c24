"""emoji-sd: two steps on the CPU, resumed; packed without what emoji-flux has; the acceptance table."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffaccel import zoo
from diffaccel.zoo import packing
from scripts.zoo.emoji import heldout, score
from scripts.zoo.emoji_sd import accept, export, job, recipe, unet

PACKED = Path(zoo.__file__).parent


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    few = replace(recipe.TINY, label_count=2)  # most of the time goes into encoding the scenes of its labels
    monkeypatch.setitem(recipe.RECIPES, "tiny", few)
    monkeypatch.setattr(sys, "argv", ["job", "--recipe", "tiny", "--device", "cpu", *map(str, arguments)])
    job.main()


@pytest.fixture(scope="module")
def done(world, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A work folder after two steps and an export, and what must leave the machine."""
    work, out = tmp_path_factory.mktemp("sd") / "work", tmp_path_factory.mktemp("sd_out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job.world, "load", lambda folder: world)
        call(patch, "--minutes", 3, "--work", work, "--out", out, "--stages", "train,export")
    return work, out


@pytest.mark.slow
def test_two_steps_and_a_repeated_command(done, world, monkeypatch, tmp_path) -> None:
    work, out = done
    steps = [json.loads(line)["step"] for line in (work / "unet.jsonl").read_text().splitlines()]
    assert steps[-1] == 2
    before = (work / "unet.safetensors").read_bytes()
    monkeypatch.setattr(job.world, "load", lambda folder: world)
    call(monkeypatch, "--minutes", 3, "--work", work, "--out", out, "--stages", "train")
    from safetensors.torch import load

    one, other = load(before), load((work / "unet.safetensors").read_bytes())
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)  # it is finished
    assert sum(part.stat().st_size for part in out.glob("emoji-sd.tar.*")) < 15 * 2**20
    received = export.receive(out, tmp_path / "zoo")
    assert (received / "card.json").is_file() and (received / "NOTICE").is_file()


@pytest.mark.slow
def test_packed_without_what_the_base_has_and_unpacked_as_a_pipeline(done, tmp_path) -> None:
    from diffusers import FluxPipeline, StableDiffusionPipeline

    model = done[0] / "zoo" / export.MODEL
    manifest = packing.read_manifest(model)
    assert manifest["base"] == export.BASE
    shared = manifest["weights"]["vae/diffusion_pytorch_model.safetensors"]["shared"]
    extra = set(manifest["weights"]["vae/diffusion_pytorch_model.safetensors"]["dtypes"]) - set(shared)
    assert shared and {name.split(".")[0] for name in extra} == {"quant_conv", "post_quant_conv"}
    text = manifest["weights"]["text_encoder/model.safetensors"]
    assert set(text["shared"]) == set(text["dtypes"])
    folder = packing.unpack(model, tmp_path / "plain", base=PACKED / export.BASE)
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    flux = FluxPipeline.from_pretrained(zoo.path(export.BASE), dtype=torch.float32)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = (flux.vae.encode(x).latent_dist.mean - unet.shift_of(flux.vae)) * flux.vae.config.scaling_factor
    torch.testing.assert_close(
        pipe.vae.encode(x).latent_dist.mean * pipe.vae.config.scaling_factor, z, atol=1e-5, rtol=1e-5
    )
    draw = accept.drawer(pipe, 64, 4.0)
    picture = draw(["a red apple", "a bus"], 2)
    assert picture.shape == (2, 3, 64, 64) and bool(torch.isfinite(picture).all())
    with pytest.raises(Exception, match="base"):
        packing.unpack(model, tmp_path / "other", base=tmp_path / "no base")


@pytest.mark.slow
def test_a_lost_machine_goes_on_from_the_packed_weights(done, tmp_path) -> None:
    restored, packed = tmp_path / "work", done[0] / "zoo"
    if not (packed / export.BASE).exists():
        (packed / export.BASE).symlink_to(PACKED / export.BASE)
    restored.mkdir()
    export.restore(packed, restored)
    base = job.base_pipeline()
    network = unet.build(recipe.TINY, base.vae, base.text_encoder.config.hidden_size)
    before = unet.load(network, done[0]).state_dict()
    after = unet.load(unet.build(recipe.TINY, base.vae, 192), restored).state_dict()
    errors = [float((after[k] - before[k]).norm() / before[k].norm().clamp_min(1e-9)) for k in before]
    assert max(errors) < 0.02


@pytest.mark.slow
def test_the_full_recipe_is_within_its_budget() -> None:
    base = job.base_pipeline()
    with torch.device("meta"):
        network = unet.build(recipe.FULL, base.vae, base.text_encoder.config.hidden_size)
    count = sum(p.numel() for p in network.parameters())
    assert 6e6 <= count <= 8e6 and all(width % 64 == 0 for width in recipe.FULL.channels)
    alphas = unet.scheduler().alphas_cumprod
    assert float(alphas[-1]) < 1e-6 and len(alphas) == 1000


def test_the_loss_of_a_perfect_network_is_zero() -> None:
    alphas = unet.scheduler().alphas_cumprod
    x0 = torch.randn(4, 2, 4, 4)

    class Perfect:
        def __call__(self, x, t, encoder_hidden_states, return_dict):
            a, s = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
            return ((a * (x - a * x0) / s - s * x0),)

    loss = unet.loss_of(Perfect(), x0, torch.zeros(4, 1, 8), alphas, 5.0, torch.Generator().manual_seed(0))
    assert float(loss) < 1e-6


def test_the_acceptance_table_of_real_pictures(world) -> None:
    """Real pictures obey their words, and have no distance from themselves."""
    sets = heldout.build(world, seed=0, device="cpu", size=4)
    real = {text: scenes.images(torch.tensor([i]), 128)[0].cpu() for scenes in sets.values()
            for i, text in enumerate(scenes.plain)}  # fmt: skip

    def draw(prompts, steps):
        return torch.stack([real[text] for text in prompts])

    judge = score.Judge(zoo.path("emoji-clip-judge"), "cpu")
    report = accept.accept(draw, draw, judge, world, count=4, by_eye=None, packed=9_000_000)
    passed = {row["check"]: row["passed"] for row in report["acceptance"]}
    assert passed["judge's score, points below emoji-flux"] is True and passed["packed megabytes"] is False
    assert passed["recognisable by eye in the grid, of 24"] is None


@pytest.mark.slow
def test_the_accept_stage_measures_the_packed_model(done, world, monkeypatch) -> None:
    monkeypatch.setattr(accept, "load", lambda folder: world)
    monkeypatch.setattr(accept, "STEPS", 2)  # of a model that has learnt nothing
    call(monkeypatch, "--minutes", 3, "--work", done[0], "--out", done[1], "--stages", "accept", "--count", 2)
    report = json.loads((done[1] / "report.json").read_text())
    checks = [row["check"] for row in report["acceptance"]]
    assert len(checks) == 5 and (done[1] / "grid.png").is_file()
    assert set(report["quality"]["judge's score"]) == {"sd", "sd few", "flux"}
    card = json.loads((done[0] / "zoo" / export.MODEL / "card.json").read_text())
    assert card["acceptance"] == report["acceptance"] and card["state"].startswith("below acceptance")
