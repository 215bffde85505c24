"""The network of next-frame diffusion: who sees whom, what it returns untrained, files, positions."""

from __future__ import annotations

import math

import pytest
import torch

from diffaccel.errors import DiffAccelError
from diffaccel.models.next_frame.transformer import NextFrameTransformer
from tests.support.worlds import clip, tiny_world


def test_an_untrained_network_returns_no_velocity():
    model = NextFrameTransformer(height=8, width=8, num_layers=2, num_attention_heads=2, attention_head_dim=8)
    assert torch.equal(model(*clip(model, 3)), torch.zeros(2, 3, 3, 8, 8))


@pytest.mark.parametrize("options", [{}, {"modulation": "shared"}, {"prediction": "sample"}])
def test_saved_and_loaded_it_computes_the_same(tmp_path, options):
    model = tiny_world(torch.float32, **options)
    model.save_pretrained(tmp_path)
    inputs = clip(model, 5)
    assert torch.equal(NextFrameTransformer.from_pretrained(tmp_path)(*inputs), model(*inputs))


def test_a_predicted_clean_frame_becomes_a_velocity():
    """With a head that predicts zero, v = x / max(sigma, 0.05)."""
    model = tiny_world(prediction="sample")
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    frames, sigma, actions = clip(model, 3)
    sigma[:, 0] = 0
    expected = frames / sigma.clamp(min=0.05)[:, :, None, None, None]
    torch.testing.assert_close(model(frames, sigma, actions), expected)


def test_no_frame_sees_a_later_one_or_one_outside_of_its_window():
    model = tiny_world(window=3, num_layers=1)
    frames, sigma, actions = clip(model, 6)
    frames.requires_grad_()
    out = model(frames, sigma, actions)
    for i in range(6):
        (gradient,) = torch.autograd.grad(out[0, i].square().sum(), frames, retain_graph=True)
        seen = gradient.abs().sum((2, 3, 4))
        assert (seen[0] > 0).tolist() == [i - 3 < j <= i for j in range(6)]
        assert seen[1].sum() == 0  # another row of the batch


def test_a_later_action_or_level_changes_no_earlier_frame():
    model = tiny_world()
    frames, sigma, actions = clip(model, 5)
    before = model(frames, sigma, actions)
    changed_sigma, changed_actions = sigma.clone(), actions.clone()
    changed_sigma[:, 3] = 0.9 - changed_sigma[:, 3] / 2
    changed_actions[:, 3] = (actions[:, 3] + 1) % 4
    after = model(frames, changed_sigma, changed_actions)
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=0, atol=1e-14)
    assert (after[:, 3:] - before[:, 3:]).abs().amin(0).amax() > 1e-3


def test_only_differences_of_frame_ids_count():
    model = tiny_world()
    inputs, ids = clip(model, 5), torch.arange(5)
    torch.testing.assert_close(model(*inputs, ids + 1000), model(*inputs, ids), rtol=0, atol=1e-9)
    assert (model(*inputs, 2 * ids) - model(*inputs, ids)).abs().max() > 1e-4


def test_patches_and_back():
    model = tiny_world()
    frames = clip(model, 2)[0]
    assert torch.equal(model.unpatched(model.patches(frames)), frames)


def test_checkpointed_gradients_are_the_same():
    model = tiny_world()
    inputs = clip(model, 3)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(*inputs).square().mean().backward()
        gradients.append(model.proj_in.weight.grad.clone())
        model.enable_gradient_checkpointing()
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_compiled_layers_compute_the_same():
    torch.compiler.reset()
    model = tiny_world()
    inputs = clip(model, 3)
    with torch.no_grad():
        expected = model(*inputs)
        model.compile_blocks(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(model(*inputs), expected)
        assert "before" in vars(model.transformer_blocks[0])
        model.uncompile_blocks()
        assert torch.equal(model(*inputs), expected) and "before" not in vars(model.transformer_blocks[0])


def test_autocast_trains_in_bfloat16():
    model = tiny_world(torch.float32)
    inputs = clip(model, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*inputs)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, model(*inputs), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"patch_size": 3}, "patch_size is 3"),
        ({"attention_head_dim": 12}, "multiple of 8"),
        ({"window": 1}, "window is 1"),
        ({"modulation": "none"}, "'block' or 'shared'"),
        ({"prediction": "noise"}, "'velocity' or 'sample'"),
        ({"height": 0}, "height is 0; it must be a whole number, 1 or more"),
        ({"num_layers": True}, "num_layers is True"),
        ({"num_actions": -1}, "num_actions is -1"),
        ({"window": math.nan}, "window is nan; it must be a whole number"),
        ({"rope_theta": math.nan}, "rope_theta is nan; it must be a positive number"),
        ({"mlp_ratio": "4"}, "mlp_ratio is '4'"),
    ],
)
def test_options_that_do_not_fit_are_named(options, sentence):
    with pytest.raises(DiffAccelError, match=sentence):
        NextFrameTransformer(**options)


def test_inputs_that_do_not_fit_are_named():
    model = tiny_world()
    frames, sigma, actions = clip(model, 3)
    for inputs, sentence in [
        ((frames[:, :, :, :4], sigma, actions), "frames have the shape"),
        ((frames, sigma[:, :2], actions), "sigma has the shape"),
        ((frames, sigma[:, :, None].expand(-1, -1, model.tokens), actions), "one value a frame"),
        ((frames, sigma, actions.float()), "must be integers"),
    ]:
        with pytest.raises(DiffAccelError, match=sentence):
            model(*inputs)
