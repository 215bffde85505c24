"""Losses of world models: what a training sequence sees, flow matching, TrigFlow, tangents, the adversarial term."""

from __future__ import annotations

import math

import pytest
import torch

from diffaccel.distill.next_frame import adversary, consistency, trigflow
from diffaccel.distill.next_frame.attention import LayoutAttention
from diffaccel.distill.next_frame.forcing import NoisyClip, forcing_loss, limit_frequencies, noisy_clip
from diffaccel.distill.next_frame.layouts import LevelLaw, cached_layout, forcing_layout
from diffaccel.errors import DiffAccelError
from diffaccel.models.next_frame.transformer import NextFrameTransformer
from tests.support.worlds import clip, tiny_world


def _random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_all_frames_of_a_clip_see_what_the_network_lets_them_see():
    model = tiny_world()
    x, sigma, actions = clip(model, 7)
    layout = forcing_layout(7, model.config.window)
    for backend in ("sdpa", "math"):
        attend = LayoutAttention(model, layout, backend)
        torch.testing.assert_close(model(x, sigma, actions, layout.source, attend), model(x, sigma, actions))


@pytest.mark.parametrize(("queries", "draft"), [(1, 1), (4, 1), (5, 2), (5, 3), (6, 4)])
def test_a_noisy_frame_beside_the_cache_is_evaluated_as_in_a_round_of_the_sampler(queries, draft):
    """Each draft equals the full evaluation of the cached frames before it and its own noisy frames."""
    model, frames = tiny_world(), 12
    layout = cached_layout(frames, model.config.window, queries, draft)
    held = layout.held
    x, sigma, actions = clip(model, frames)
    actions = actions[:, layout.source]  # a frame has one action, cached or noisy
    together = model(x, sigma, actions, layout.source, LayoutAttention(model, layout))
    for number in range(int(layout.draft.max()) + 1):
        places = (layout.draft == number).nonzero()[:, 0]
        begin = int(layout.source[places[0]])
        chosen = torch.cat([torch.arange(begin), places])
        alone = model(x[:, chosen], sigma[:, chosen], actions[:, chosen])
        torch.testing.assert_close(together[:, places], alone[:, begin:], rtol=0, atol=1e-12)
    torch.testing.assert_close(together[:, :held], model(x[:, :held], sigma[:, :held], actions[:, :held]))
    assert layout.source[-1] == held == layout.clip_length - 1


def test_a_layout_that_does_not_fit_is_refused():
    for frames, queries, draft in ((8, 5, 1), (8, 0, 1), (8, 3, 4)):
        with pytest.raises(DiffAccelError, match="queries"):
            cached_layout(frames, 4, queries, draft)


def test_levels_of_the_cache_are_low_and_those_of_a_draft_are_one():
    law = LevelLaw(mean=0.5, deviation=0.7, shift=2.0, context=0.08)
    layout = cached_layout(14, 6, 6, 3)
    sigma, weight = law.draw(layout, 4000, _random())
    assert torch.equal(weight, (~layout.cached).float().expand(4000, -1))
    assert sigma[:, layout.cached].max() <= 0.08 and abs(sigma[:, layout.cached].mean() - 0.04) < 1e-3
    noisy = sigma[:, layout.held :]
    assert torch.equal(noisy[:, :3], noisy[:, :1].expand(-1, 3)) and (noisy[:, 3] != noisy[:, 2]).all()
    normal = torch.logit(noisy / (2 - noisy))  # the shift undone
    assert abs(normal.mean() - 0.5) < 0.05 and abs(normal[:, 0].std() - 0.7) < 0.05


def test_a_share_of_clips_has_a_clean_prefix_and_a_share_a_common_tail():
    layout = forcing_layout(10, 4)
    sigma, weight = LevelLaw(prefix=0.3, tail=0.4).draw(layout, 6000, _random())
    prefix = weight[:, 0] == 0
    assert abs(prefix.float().mean() - 0.3) < 0.02 and (sigma[weight == 0] <= 0.1).all()
    assert (weight.diff(dim=1) >= 0).all() and (weight[:, -1] == 1).all()  # one prefix, never the whole clip
    common = sigma[:, -2] == sigma[:, -1]
    assert abs(common.float().mean() - 0.4 * 3 / 4) < 0.02  # tails of 2, 3 and 4 frames
    plain, weight = LevelLaw(prefix=0.0, tail=0.0).draw(layout, 6000, _random())
    assert (weight == 1).all() and (plain.diff(dim=1) != 0).all()
    assert abs(torch.corrcoef(plain.T) - torch.eye(10)).max() < 0.06


def test_the_loss_of_a_network_without_velocity_is_that_of_the_noise_and_the_frames():
    model = NextFrameTransformer(
        height=8, width=8, patch_size=4, num_layers=1, num_attention_heads=1, attention_head_dim=8
    ).double()
    layout = forcing_layout(5, 16)
    frames, actions = torch.rand(3, 5, 3, 8, 8, dtype=torch.float64) * 2 - 1, torch.zeros(3, 5, dtype=torch.int64)
    noisy = noisy_clip(frames, actions, layout, LevelLaw(prefix=1.0, tail=0.0), _random())
    loss = forcing_loss(model, noisy, layout, LayoutAttention(model, layout))
    errors = (noisy.eps - frames).square().mean((2, 3, 4)).float()
    assert 0 < noisy.weight.sum() < 15
    torch.testing.assert_close(loss.float(), errors[noisy.weight == 1].mean())
    torch.testing.assert_close(noisy.x - noisy.sigma[:, :, None, None, None] * noisy.v, frames)


def test_one_level_for_all_frames_is_ordinary_flow_matching_of_a_video():
    model = tiny_world(window=8)
    x0, _, actions = clip(model, 6)
    eps, sigma = clip(model, 6, seed=1)[0], torch.full((2, 6), 0.4, dtype=torch.float64)
    layout = forcing_layout(6, 8)
    noisy = NoisyClip(x0, eps, sigma, actions, torch.ones(2, 6, dtype=torch.float64))
    v = model(0.6 * x0 + 0.4 * eps, sigma, actions)
    expected = (v - (eps - x0)).float().square().mean()
    torch.testing.assert_close(forcing_loss(model, noisy, layout, LayoutAttention(model, layout)).float(), expected)


def test_the_loss_of_a_frame_never_reaches_later_frames():
    model = tiny_world()
    x0, sigma, actions = clip(model, 6)
    x0.requires_grad_()
    weight = torch.zeros(2, 6, dtype=torch.float64)
    weight[:, 2] = 1
    layout = forcing_layout(6, 4)
    noisy = NoisyClip(x0, torch.zeros_like(x0), sigma, actions, weight)
    (gradient,) = torch.autograd.grad(forcing_loss(model, noisy, layout, LayoutAttention(model, layout)), x0)
    assert gradient[:, 3:].abs().max() == 0 and gradient[:, :3].abs().amin((0, 2, 3, 4)).gt(0).all()


def test_parts_of_a_batch_are_those_of_the_whole():
    layout, law = forcing_layout(4, 4), LevelLaw()
    frames, actions = torch.rand(6, 4, 1, 2, 2), torch.zeros(6, 4, dtype=torch.int64)
    whole = noisy_clip(frames, actions, layout, law, _random())
    parts = [
        noisy_clip(frames[3 * r : 3 * r + 3], actions[3 * r : 3 * r + 3], layout, law, _random(), (r, 2))
        for r in (0, 1)
    ]
    for name in ("eps", "sigma", "weight"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_fast_waves_of_the_level_are_not_read_and_not_learnt():
    model = tiny_world()
    x, sigma, actions = clip(model, 3)
    limit_frequencies(model, 30.0)
    step = torch.zeros_like(sigma)
    step[:, :] = 2 * math.pi / 1000  # a whole wave of the fastest
    weight = model.time_embedding[0].weight
    columns = weight.abs().sum(0)
    assert (columns[:48] == 0).all() and (columns[50:128] > 0).all() and (columns[128:176] == 0).all()
    model(x, sigma, actions).square().mean().backward()
    assert (weight.grad[:, :48] == 0).all() and (weight.grad[:, 60:128].abs().sum(0) > 0).all()


# The world of one frame: every pixel is normal around MU with deviation S, so all paths are known.
MU, S = 0.3, 0.2


def _spread(t, sd):
    return (t.cos().square() * S**2 + t.sin().square() * sd**2).sqrt()


def _path_velocity(sd):
    def prediction(z, t):
        cos, sin = trigflow.per_pixel(t.cos()), trigflow.per_pixel(t.sin())
        spread = trigflow.per_pixel(_spread(t, sd))
        return -sin * MU + cos * sin * (sd**2 - S**2) / spread**2 * (z - cos * MU)

    return prediction


def _end_of_path(z, t, sd):
    return MU + S * (z - trigflow.per_pixel(t.cos()) * MU) / trigflow.per_pixel(_spread(t, sd))


def _consistent(sd):
    def prediction(z, t):
        return (trigflow.per_pixel(t.cos()) * z - _end_of_path(z, t, sd)) / trigflow.per_pixel(t.sin())

    return prediction


def _states(sd):
    t = 0.1 + 1.4 * torch.rand(3, 5, generator=_random(1), dtype=torch.float64)
    noise = torch.randn(3, 5, 1, 4, 4, generator=_random(2), dtype=torch.float64)
    return trigflow.per_pixel(t.cos()) * MU + trigflow.per_pixel(_spread(t, sd)) * noise, t


@pytest.mark.parametrize("sd", [0.5, 1.0])
def test_linear_and_trigonometric_paths_are_one(sd):
    x = torch.randn(3, 5, 1, 4, 4, generator=_random(), dtype=torch.float64)
    sigma = torch.rand(3, 5, generator=_random(3), dtype=torch.float64)
    z, t = trigflow.from_linear(x, sigma, sd)
    for got, expected in zip(trigflow.to_linear(z, t, sd), (x, sigma), strict=True):
        torch.testing.assert_close(got, expected)
    logit = torch.logit(sigma)
    torch.testing.assert_close((sd * t.tan()).log(), logit)  # log-normal tangents are logit-normal levels

    def velocity(x, s):  # the best one for this world
        a, b = 1 - trigflow.per_pixel(s), trigflow.per_pixel(s)
        return (b - a * S**2) / (a**2 * S**2 + b**2) * (x - a * MU) - MU

    scaled = trigflow.scaled_prediction(velocity, z, t, sd)
    torch.testing.assert_close(scaled, _path_velocity(sd)(z, t))
    clean = trigflow.clean_estimate(z, t, scaled)
    torch.testing.assert_close(clean, x - trigflow.per_pixel(sigma) * velocity(x, sigma))


@pytest.mark.parametrize(("kind", "step", "most"), [("jvp", 0.0, 1e-12), ("secant", 1e-3, 1e-3), ("secant", 0.1, 0.1)])
def test_a_network_that_is_consistent_has_no_tangent(kind, step, most):
    sd, moving = 0.5, torch.tensor([False, True, True, True, True])
    z, t = _states(sd)
    dz = _path_velocity(sd)(z, t)
    value, slope = consistency.derivative(_consistent(sd), z, t, dz, moving, kind, step)
    g = consistency.tangent(value, slope, dz, z, t, torch.ones_like(t))
    assert g[:, moving].abs().max() <= most
    value, slope = consistency.derivative(_path_velocity(sd), z, t, dz, moving, kind, step)  # one that is not
    assert consistency.tangent(value, slope, dz, z, t, 1.0)[:, moving].abs().mean() > 0.05
    assert consistency.tangent(value, slope, dz, z, t, 0.0).abs().max() < 1e-12  # r = 0 is the teacher


def test_the_solved_end_of_the_path_is_the_true_one():
    sd, moving = 0.5, torch.tensor([False, True, True, True, True])
    z, t = _states(sd)
    errors = []
    for steps in (8, 16, 32):
        solved = consistency.solved_prediction(_path_velocity(sd), z, t, moving, steps)
        assert torch.equal(solved[:, 0], z[:, 0])
        errors.append((solved - _consistent(sd)(z, t))[:, 1:].abs().max())
    assert errors[2] < 0.03 and errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1]  # of first order


def test_the_exact_derivative_of_the_network_is_that_of_finite_differences():
    model = tiny_world()
    layout = cached_layout(9, model.config.window, 4, 2)
    x, sigma, actions = clip(model, 9)
    z, t = trigflow.from_linear(x, sigma, 0.5)
    t = t.clamp(0.2, 1.3)
    attend, dz, moving = LayoutAttention(model, layout, "math"), torch.randn_like(z), ~layout.cached

    def prediction(z, t):
        return trigflow.scaled_prediction(lambda x, s: model(x, s, actions, layout.source, attend), z, t, 0.5)

    value, slope = consistency.derivative(prediction, z, t, dz, moving, "jvp", 0.0)
    h, along = 1e-6, moving.double().expand_as(t)
    wide = trigflow.per_pixel(along)
    with torch.no_grad():
        difference = (prediction(z + h * wide * dz, t + h * along) - prediction(z - h * wide * dz, t - h * along)) / (
            2 * h
        )
    torch.testing.assert_close(value, prediction(z, t).detach())
    torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-5)
    assert slope[:, moving].abs().mean() > 0.1 and (slope[:, : layout.held] == 0).all()  # the cache stands


def test_norms_of_tangents():
    g = torch.randn(2, 3, 1, 4, 4, generator=_random(), dtype=torch.float64)
    moving = torch.tensor([False, True, True])
    clip_norm = consistency.normalized(g, moving, "clip")
    for row in range(2):
        rms = g[row, 1:].square().mean().sqrt()
        torch.testing.assert_close(clip_norm[row], g[row] / (rms + 0.1))
    frame_norm = consistency.normalized(g, moving, "frame")
    torch.testing.assert_close(frame_norm[1, 2], g[1, 2] / (g[1, 2].square().mean().sqrt() + 0.1))


def test_the_share_of_consistency_rises_with_the_run_and_with_the_level():
    sigma = torch.tensor([[0.05, 0.1, 0.15, 0.2, 1.0]])
    share = consistency.consistency_share(sigma, 0.1, 0.2, 0.1)
    torch.testing.assert_close(share, torch.tensor([[0.0, 0.0, 0.25, 0.5, 0.5]]))
    assert (consistency.consistency_share(sigma, 0.0, 0.0, 0.0) == 1).all()


def test_the_loss_is_least_where_its_weight_says_how_large_the_error_is():
    weight = consistency.LossWeight()
    z, t = _states(0.5)
    moving = torch.ones(5, dtype=torch.bool)
    bias = weight.line.bias
    options = {"r": 1.0, "norm": "frame", "kind": "jvp", "step": 0.0, "solver_steps": 1}
    prediction = _path_velocity(0.5)

    def loss():
        return consistency.consistency_loss(prediction, prediction, prediction, z, t, moving, weight, **options)[0]

    with torch.no_grad():
        bias.fill_(0.0)
        error = loss()  # exp(0) e - 0
        bias.copy_(-error.log())
    torch.testing.assert_close(loss(), 1 - bias[0])
    loss().backward()
    assert abs(bias.grad) < 1e-6


def test_judges_learn_from_frames_and_the_student_from_judges():
    share = torch.tensor([0.0, 1.0, 1.0])
    real, fake = torch.tensor([[9.0, 0.5, 2.0]]), torch.tensor([[9.0, -2.0, 0.25]])
    assert adversary.hinge(real, fake, share).item() == pytest.approx((0.5 + 0 + 0 + 1.25) / 2)
    assert adversary.persuasion(fake, share).item() == pytest.approx((2.0 - 0.25) / 2)
    assert adversary.every_third(8) == (1, 4, 7) and adversary.every_third(2) == (1,)
    model = tiny_world(torch.float32).requires_grad_(False)
    heads = adversary.FeatureHeads(32, adversary.every_third(2))
    x, sigma, actions = clip(model, 3)
    layout = forcing_layout(3, 4)
    x.requires_grad_()
    seen = adversary.features(model, heads.layers, x, sigma, actions, layout.source, LayoutAttention(model, layout))
    adversary.persuasion(adversary.frozen_heads(heads, seen), share).backward()
    assert x.grad.abs().max() > 0 and all(p.grad is None for p in heads.parameters())
    adversary.hinge(heads([f.detach() for f in seen]), heads([f.detach() for f in seen]), share).backward()
    assert all(p.grad is not None for p in heads.parameters())
    assert not model.transformer_blocks[1]._forward_hooks
