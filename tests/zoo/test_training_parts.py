"""Losses, targets and batches of the zoo's autoencoder and flow model."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline

from diffaccel.errors import DiffAccelError
from diffaccel.training.loop import Deadline, TrainingPlan
from scripts.zoo.emoji import flow, recipe_flow, vae


def _images(index, size):
    """Half dark, half bright pictures whose border moves with the index."""
    x = torch.linspace(0, 1, size).expand(len(index), 3, size, size)
    return torch.where(x < (index.view(-1, 1, 1, 1) % 7 + 1) / 8, -0.5, 0.5)


VAE_RECIPE = recipe_flow.VAERecipe(
    channels=(4, 4, 4, 8),
    groups=2,
    cycle=vae.STEPS,
    batch=dict.fromkeys(vae.STEPS, 2),
    plan=TrainingPlan(lr=1e-3, samples=20),
)
FLOW_RECIPE = recipe_flow.FlowRecipe(
    heads=2,
    head_dim=16,
    rope=(4, 6, 6),
    double_blocks=1,
    single_blocks=1,
    text_dim=16,
    text_layers=1,
    text_heads=2,
    text_ff=32,
    cycle=(64, 128),
    lengths={8: 0.5, 48: 0.5},
    tokens=8 * 24,
    plan=TrainingPlan(lr=1e-3, samples=100),
)


def test_reconstruction_loss_of_a_constant_difference():
    target = torch.zeros(2, 3, 16, 16)
    d = 0.3  # no gradient: |d| + |pool d| + 0.5 d^2
    assert vae.reconstruction(target + d, target).item() == pytest.approx(2 * d + 0.5 * d * d, rel=1e-5)
    assert vae.reconstruction(target, target).item() == 0


def test_reconstruction_loss_of_a_checkerboard():
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    board = (1.0 - 2.0 * ((rows + columns) % 2)).expand(1, 3, 16, 16)  # the 4x4 mean is 0, every neighbour differs by 2
    assert vae.reconstruction(board, torch.zeros_like(board)).item() == pytest.approx(1 + 0 + 0.5 * (2 + 2) + 0.5)


def test_divergence_against_torch_distributions():
    g = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(3, 4, generator=g), torch.randn(3, 4, generator=g)
    ours = vae.divergence(mean, logvar)
    normal = torch.distributions.Normal
    theirs = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0)).mean()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize(("kind", "size"), [("full", 128), ("half", 64), ("crop", 64), ("pooled", 64), ("up", 128)])
def test_what_each_step_compares(kind, size):
    model = vae.build(VAE_RECIPE)
    index = torch.arange(2)
    generator = torch.Generator().manual_seed(0)
    decoded, target, mean, _ = vae.step_pair(kind, _images, index, torch.zeros_like, model, generator)
    assert decoded.shape == target.shape == (2, 3, size, size)
    assert mean.shape[-1] == {"full": 16, "half": 8, "crop": 8, "pooled": 16, "up": 8}[kind]
    if kind == "pooled":
        assert torch.equal(target, F.avg_pool2d(_images(index, 128), 2))
    if kind == "half":
        assert torch.equal(target, _images(index, 64))


@pytest.mark.slow
def test_autoencoder_trains_saves_its_latent_scale_and_resumes(tmp_path):
    def train(seconds):
        return vae.train(_images, 70, tmp_path, VAE_RECIPE, deadline=Deadline(seconds), device="cpu")

    assert train(-1) is None and vae.load(tmp_path, "cpu") is None
    model = train(100)
    latents = vae.encode(model, _images(torch.arange(70), 128))[0]
    scaled = (latents - model.config.shift_factor) * model.config.scaling_factor
    assert abs(scaled.mean().item()) < 1e-2 and scaled.std().item() == pytest.approx(1, abs=1e-2)
    assert set(vae.quality(model, _images, 70, "cpu")) == {"full", "half", "pooled", "up"}


def test_path_and_target():
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(3, 5, 4, generator=g), torch.randn(3, 5, 4, generator=g)
    t = torch.tensor([0.0, 0.25, 1.0])
    x, v = flow.noisy(x0, eps, t)
    assert torch.equal(x[0], x0[0]) and torch.equal(x[2], eps[2])
    # An Euler step along v from time t to 0 lands on the data, and to 1 on the noise.
    torch.testing.assert_close(x - t.view(-1, 1, 1) * v, x0)
    torch.testing.assert_close(x + (1 - t).view(-1, 1, 1) * v, eps)


def test_latents_are_packed_as_flux_packs_them():
    z = torch.randn(2, 16, 8, 8)
    ours = F.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2)
    assert torch.equal(ours, FluxPipeline._pack_latents(z, 2, 16, 8, 8))


def _table(pictures=40):
    g = torch.Generator().manual_seed(0)
    return flow.Table(
        latents={size: torch.randn(pictures, 64, size // 16, size // 16, generator=g).half() for size in (64, 128)},
        prompt=torch.randint(1, 9, (pictures, 2), generator=g),
        pooled=torch.arange(9.0).view(9, 1).expand(9, 8).half(),
        tokens=torch.arange(9).view(9, 1).expand(9, flow.TABLE_LENGTH).contiguous(),
        pad=11,
    )


def test_a_batch_has_matching_texts_and_long_lengths_are_padding():
    table = _table()
    generator = torch.Generator().manual_seed(0)
    weights = torch.ones(40)
    x0, eps, t, pooled, tokens = flow.draw(table, FLOW_RECIPE, weights, 64, 48, generator)
    assert x0.shape == eps.shape == (8, 16, 64) and t.shape == (8,) and ((t > 0) & (t < 1)).all()
    assert tokens.shape == (8, 48) and (tokens[:, flow.TABLE_LENGTH :] == 11).all()
    assert torch.equal(tokens[:, 0].float(), pooled[:, 0])  # both encoders see the same prompt


def test_empty_prompts_have_their_share():
    recipe = recipe_flow.FlowRecipe(**{**vars(FLOW_RECIPE), "empty": 0.25, "tokens": 24 * 4000})
    pooled = flow.draw(_table(), recipe, torch.ones(40), 64, 8, torch.Generator().manual_seed(0))[3]
    share, n = (pooled[:, 0] == 0).float().mean().item(), len(pooled)
    assert n == 4000 and abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)


@pytest.mark.parametrize("recipe", recipe_flow.RECIPES.values(), ids=recipe_flow.RECIPES)
def test_shipped_recipes_are_consistent(recipe):
    f = recipe.flow
    assert sum(f.rope) == f.head_dim and sum(f.lengths.values()) == pytest.approx(1)
    assert 512 in f.lengths  # stock FluxPipeline's default
    assert {length for _, length in f.compiled} <= set(f.lengths) and {size for size, _ in f.compiled} <= set(f.cycle)
    assert sum(f.shares.values()) == pytest.approx(1)
    assert set(recipe.vae.cycle) == set(vae.STEPS) == set(recipe.vae.batch)
    for size in set(f.cycle):
        for length in f.lengths:
            tokens = flow.batch_size(f, size, length) * ((size // 16) ** 2 + length)
            assert tokens <= max(f.tokens, 8 * ((size // 16) ** 2 + length))


def test_unknown_recipe():
    with pytest.raises(DiffAccelError, match="Did you mean 'full'"):
        recipe_flow.get("ful")


@pytest.mark.slow
def test_flow_starts_at_zero_trains_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "vocabulary_of", lambda work: 12)

    def train(work, seconds=100.0):
        recipe = recipe_flow.Recipe(name="toy", vae=VAE_RECIPE, flow=FLOW_RECIPE, default_size=64)
        return flow.train(_table(), torch.ones(40), work, recipe, deadline=Deadline(seconds), device="cpu")

    fresh = train(tmp_path / "none", -1)
    x0, _, t, pooled, tokens = flow.draw(_table(), FLOW_RECIPE, torch.ones(40), 64, 8, torch.Generator().manual_seed(0))
    assert not flow.predict(fresh.module, x0, t, pooled, tokens).any()
    run = train(tmp_path / "one")
    assert run.finished and run.samples >= 100
    long = F.pad(tokens, (0, 512 - 8), value=11)
    for text in (tokens, long):
        assert flow.predict(run.module, x0, t, pooled, text).shape == x0.shape
    loaded = flow.load(tmp_path / "one", FLOW_RECIPE)
    with run.ema:
        averaged = flow.predict(run.module, x0, t, pooled, tokens)
    assert torch.equal(flow.predict(loaded, x0, t, pooled, tokens), averaged)
