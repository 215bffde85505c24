"""Metrics of world models: PSNR of a set, pixels seen before, actions that change, actions that are read."""

from __future__ import annotations

import pytest
import torch
from dot_world import MOVES, DotClips

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics import world_model
from diffaccel.eval.networks.inverse_dynamics import CONTEXT, InverseDynamics, action_accuracy


def test_the_psnr_of_a_set_is_that_of_its_mean_error():
    truth = torch.zeros(3, 2, 1, 4, 4)
    frames = torch.stack([truth[0], truth[1] + 0.2, truth[2] + 0.4])
    errors = world_model.squared_error(frames, truth)
    torch.testing.assert_close(errors[:, 0], torch.tensor([0.0, 0.04, 0.16], dtype=torch.float64))
    assert world_model.psnr(errors)[1].item() == pytest.approx(10 * torch.log10(torch.tensor(60.0)).item())
    with pytest.raises(DiffAccelError, match="the same"):
        world_model.squared_error(frames, truth[:, :1])


def test_only_pixels_of_the_mask_count_and_a_frame_without_any_is_left_out():
    frames, truth = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    frames[0, 0, 0] = 1
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, :2] = True
    errors = world_model.squared_error(frames, truth, mask)
    assert errors[0] == 0.5 and errors[1].isnan()
    assert world_model.psnr(errors).item() == pytest.approx(10 * torch.log10(torch.tensor(8.0)).item())


def test_pixels_that_scrolled_in_were_not_seen_before():
    given = torch.zeros(1, 1, 2)
    camera = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [0.0, 2.5], [100.0, 0.0]]])
    seen = world_model.seen_before(given, camera, 8, 8, margin=0.0)
    assert seen[0, 0].all() and not seen[0, 3].any()
    assert seen[0, 1, :, :5].all() and not seen[0, 1, :, 5:].any()  # three columns came from the right
    assert not seen[0, 2, :3].any() and seen[0, 2, 3:].all()  # two and a half rows came from above
    second = torch.cat([given, torch.tensor([[[3.0, 0.0]]])], 1)  # another given frame shows them
    assert world_model.seen_before(second, camera, 8, 8, margin=0.0)[0, 1].all()
    edge = world_model.seen_before(given, camera, 8, 8)[0, 0]
    assert edge[1:-1, 1:-1].all() and edge.sum() == 36


def test_changes_of_action_within_a_horizon():
    actions = torch.tensor([[1, 1, 2], [1, 1, 1], [2, 1, 1]])
    present = torch.tensor([1, 1, 1])
    assert world_model.changes_within(present, actions, 2).tolist() == [False, False, True]
    assert world_model.changes_within(present, actions, 3).tolist() == [True, False, True]


def test_the_mean_difference_of_frames():
    clip = torch.arange(4.0).reshape(1, 4, 1, 1, 1).expand(1, 4, 3, 2, 2)
    assert world_model.mean_difference(2 * clip).tolist() == [2.0]


@pytest.mark.slow
def test_actions_are_read_from_the_frames_that_show_them():
    """A network trained on a small world reads its actions; shown other ones, it does not find those told."""
    torch.manual_seed(0)
    network = InverseDynamics(len(MOVES), channels=1, width=8)
    optimizer, draw = torch.optim.Adam(network.parameters(), 3e-3), torch.Generator().manual_seed(0)
    for _ in range(50):
        frames, actions = DotClips(6).draw(48, draw)
        logits = network(frames)
        assert logits.shape == (48, 4, 5)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), actions[:, CONTEXT - 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    frames, actions = DotClips(6).draw(100, draw)
    assert action_accuracy(network, frames, actions) > 0.5  # chance is 0.2
    assert action_accuracy(network, frames, (actions + 1) % 5) < 0.25
    unknown = actions.clone()
    unknown[:, 3:] = 5
    assert action_accuracy(network, frames, unknown) > 0.4
    with pytest.raises(DiffAccelError, match="3 frames"):
        network(frames[:, :2])
