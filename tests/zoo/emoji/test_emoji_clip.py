"""CLIP training's parts, its measures, and the folders it leaves, with tiny random towers."""

import dataclasses
import itertools
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from scripts.zoo.emoji import captions as words
from scripts.zoo.emoji import clip, clip_eval, clip_export, damage, heldout, recipe, tokenizers, views
from scripts.zoo.emoji.scenes import Row, Scenes, build
from scripts.zoo.emoji.world import bucket

VIT = {"image_size": 64, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
CNN = {
    "timm_model_name": "test_convnext2",
    "timm_model_pretrained": False,
    "timm_pool": "abs_attn",
    "timm_proj": "linear",
    "image_size": 64,
}


def small(base, vision):
    return dataclasses.replace(
        base,
        vision=vision,
        text_width=32,
        text_layers=2,
        text_heads=2,
        embed_dim=24,
        batch=16,
        seconds=0.5,
        warmup=2,
        ema=0.9,
    )


@pytest.fixture(scope="module")
def shared(counts):
    cpu = recipe.CPU
    return dataclasses.replace(
        cpu, scenes=counts, vocabulary=1024, clip_a=small(cpu.clip_a, VIT), clip_b=small(cpu.clip_b, CNN)
    )


@pytest.fixture(scope="module")
def scenes(world, shared):
    return build(world, shared, 0, "cpu")


@pytest.fixture(scope="module")
def work(scenes, shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    assert clip.train(scenes, shared, folder)
    return folder


def test_shuffling_moves_every_patch_somewhere_and_loses_none():
    images = torch.rand(6, 3, 64, 64)
    for seed in range(8):
        shuffled = damage.shuffle_patches(images, torch.Generator().manual_seed(seed))
        assert torch.equal(shuffled.flatten(2).sort().values, images.flatten(2).sort().values)
        assert all(not torch.equal(one, other) for one, other in zip(images, shuffled, strict=True))


def test_exchanged_halves_are_the_scene_with_its_two_things_exchanged(world):
    two = ((32.0, 64.0, 58.0), (96.0, 64.0, 58.0))
    above = ((64.0, 32.0, 58.0), (64.0, 96.0, 58.0))
    rows = []
    for icons in ((0, 5), (5, 0)):
        rows += [Row("pair", icons, (-1, -1), two), Row("pair", icons, (-1, -1), above, True)]
    images = Scenes(world, rows, seed=0, device="cpu").images(torch.arange(4))
    exchanged = damage.exchange_halves(images[:2], torch.tensor([False, True]))
    assert torch.allclose(exchanged, images[2:], atol=1e-5)


def test_bands_and_blocks_keep_their_rows_and_columns():
    rows = torch.arange(64.0)[None, None, :, None].expand(5, 3, 64, 64)
    bands = damage.shuffle_patches(rows, torch.Generator().manual_seed(0), (4, 1))
    assert torch.equal(bands, bands[..., :1].expand_as(bands))  # a band moves as a whole, across all columns
    assert torch.equal(bands[:, 0, ::16, 0].sort(1).values, torch.tensor([0.0, 16, 32, 48]).expand(5, 4))


def test_a_box_blur_averages_squares_and_more_of_it_is_more_severe():
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    assert torch.allclose(damage.box_blur(images, 5)[..., 10, 7], images[..., 8:13, 5:10].mean((2, 3)), atol=1e-6)
    assert torch.allclose(damage.box_blur(torch.full_like(images, 0.3), 9), torch.tensor(0.3))
    severities = [damage.severity(images, damage.box_blur(images, width)) for width in (1, 3, 5, 9)]
    assert severities[0].max() < 1e-3
    assert all((more > less).all() for less, more in itertools.pairwise(severities))
    assert torch.allclose(
        damage.severity(images, -images + 2 * images.mean((1, 2, 3), keepdim=True)), torch.tensor(2.0)
    )


def test_every_picture_is_degraded_and_stays_in_range():
    images = (torch.rand(40, 3, 64, 64) > 0.5) * 1.2 - 0.6
    worse = damage.degrade(images, torch.Generator().manual_seed(0))
    assert worse.shape == images.shape and worse.abs().max() <= 1.0001
    assert (damage.severity(images, worse) > 0.05).all()
    assert damage.degrade(images[:0], torch.Generator()).shape == (0, 3, 64, 64)


def test_a_graded_loss_asks_for_its_cost_and_nothing_else():
    image = torch.nn.functional.normalize(torch.randn(6, 8), dim=1)
    lost = torch.linspace(0.0, 0.5, 6)
    worse = image * (1 - lost)[:, None]  # the cosine to the caption falls by ``lost``
    assert clip._graded(image, worse, image, lost) < 1e-6
    assert clip._graded(image, worse, image, lost + 0.1) == pytest.approx(0.2 * (10 - 0.5), rel=1e-3)
    assert clip._graded(image, worse, image, lost - 0.1) == pytest.approx(0.2 * (10 - 0.5), rel=1e-3)


def test_a_close_up_is_a_part_of_the_picture_or_its_mirror_image():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    images = torch.stack([x, y, torch.ones_like(x)]).expand(64, 3, 64, 64)
    close = views.close_up(images, torch.Generator().manual_seed(0))
    width = (close[:, 0, 0, -1] - close[:, 0, 0, 0]) / 2
    height = (close[:, 1, -1, 0] - close[:, 1, 0, 0]) / 2
    assert torch.allclose(width.abs(), height, atol=0.03) and height.min() > 0.28
    assert 16 < (width < 0).sum() < 48 and (height > 0.98).any()
    assert torch.allclose(close[:, 2], torch.tensor(1.0)) and close.abs().max() <= 1.0001


def test_a_missing_style_is_never_told_to_be_false(world):
    counts = recipe.SceneCounts(variants=1, exact=1, colour=40, pair=60, colour_pair=40, count=30)
    scenes = build(world, dataclasses.replace(recipe.CPU, scenes=counts), 0, "cpu")
    shown = world.styles_shown
    missing = {label: set(world.styles) - set(styles) for label, styles in shown.items()}
    assert any(missing.values())
    for i, text in enumerate(scenes.contradictions(1)):
        for label in scenes.facts(i).labels:
            if len(scenes.facts(i).labels) == 1 and label in text:
                assert not any(style in text for style in missing[label]), text


def test_augmentation_keeps_what_it_must(shared):
    images = torch.rand(64, 3, 64, 64) * 2 - 1
    plain = dataclasses.replace(shared.clip_a, turn=0.0, zoom=1.0, shift=0.0, fade=0.0)
    unchanged = views.augment(images, plain, torch.Generator().manual_seed(0))
    noise = unchanged - images
    assert noise.abs().max() < 0.15 and abs(noise.std().item() - 0.02) < 1e-3
    # White stays white beyond the borders, and a quarter of the pictures stays as it was.
    white = views.augment(torch.ones_like(images), shared.clip_a, torch.Generator().manual_seed(0))
    assert (white - 1).abs().max() < 0.15
    changed = views.augment(images, shared.clip_a, torch.Generator().manual_seed(0))
    same = ((changed - images).abs().amax((1, 2, 3)) < 0.15).float().mean()
    assert 0.05 < same < 0.5


def test_a_picture_moves_by_whole_pixels_and_turns_by_degrees(shared):
    """With the largest change asked of every picture: the disc's centre moves no further than ``shift``."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    disc = 1 - 2 * (((x - 31.5) ** 2 + (y - 31.5) ** 2) < 100).float()
    only_shift = dataclasses.replace(shared.clip_a, turn=180.0, zoom=1.0, shift=8.0, fade=0.0)
    ink = 1 - views.augment(disc.expand(200, 3, 64, 64), only_shift, torch.Generator().manual_seed(0))
    centre = torch.stack([(ink[:, 0] * c).sum((1, 2)) / ink[:, 0].sum((1, 2)) for c in (x, y)], 1)
    away = (centre - 31.5).abs()
    assert away.max() < 8.5 * 2**0.5 and away.max() > 6
    assert (ink.sum((1, 2, 3)) / (1 - disc).sum() / 3 - 1).abs().max() < 0.1


def test_cropping_padding_changes_no_feature(shared):
    model = clip.make(clip.model_config(shared.clip_a, shared, 1024)).eval()
    tokens = torch.full((3, 32), 1023)
    for row, length in enumerate((3, 9, 5)):
        tokens[row, :length] = torch.randint(0, 1000, (length,))
        tokens[row, 0] = 1022
    cropped = clip.crop(tokens)
    assert cropped.shape == (3, 16)
    with torch.no_grad():
        short = clip_export.reference(model, cropped)[1] @ model.text_projection
        assert torch.allclose(short, model.encode_text(tokens), atol=1e-5)


def test_crop_keeps_full_rows():
    tokens = torch.full((2, 32), 1023)
    tokens[1, :31] = 5
    assert clip.crop(tokens).shape == (2, 32)


@pytest.mark.slow
def test_equal_pictures_are_no_negatives_and_parts_of_the_scenes_are_left_out(scenes, shared, work):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    made = [clip.Data(scenes, c, shared, tokenizer) for c in (shared.clip_a, shared.clip_b)]
    number = torch.arange(len(scenes)) % 5
    assert made[0].weights[number == 0].sum() == 0
    assert made[1].weights[number == 1].sum() == 0
    assert made[0].weights[number == 1].sum() > 0
    rows = scenes.rows
    assert made[0].content[0] == made[0].content[1]  # variants of one icon
    differing = next(i for i, row in enumerate(rows) if row.icons != rows[0].icons)
    assert made[0].content[0] != made[0].content[differing]
    index = made[0].batch(64, torch.Generator().manual_seed(0))
    first = made[0].may_damage[index].int()
    assert torch.equal(first, first.sort(descending=True).values)


@pytest.mark.slow
def test_one_batch_can_be_learned_and_its_false_twins_told_apart(scenes, shared, work):
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    data = clip.Data(scenes, shared.clip_a, shared, CLIPTokenizer.from_pretrained(work / "tokenizer"))
    model = clip.make(clip.model_config(shared.clip_a, shared, 1024))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for _ in range(80):
        found.append(clip.loss_of(model, data, shared.clip_a, torch.Generator().manual_seed(0)))
        optimizer.zero_grad()
        found[-1]["loss"].backward()
        optimizer.step()
    assert found[-1]["loss"] < 0.3 * found[0]["loss"]
    assert found[-1]["false_text"] == 1
    assert found[-1]["false_image"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", clip.NAMES)
def test_folders_load_in_open_clip_offline_and_agree(name, work, scenes):
    import open_clip
    from transformers import CLIPTokenizer

    where = f"local-dir:{work / name}"
    model, _, preprocess = open_clip.create_model_and_transforms(where, require_pretrained=True)
    model.eval()
    texts = ["red apple, noto", "A noto emoji of CAT", "dog left of bus " * 9, ""]
    ids = open_clip.get_tokenizer(where)(texts)
    assert torch.equal(ids, clip.tokenize(CLIPTokenizer.from_pretrained(work / "tokenizer"), texts, 32).long())
    # open_clip's preprocessing of a 64-pixel picture is the range [-1, 1] that scenes give.
    picture = scenes.images([5], 64)
    from torchvision.transforms.functional import to_pil_image

    assert (preprocess(to_pil_image(picture[0] / 2 + 0.5)) - picture[0]).abs().max() <= 1.1 / 127.5
    with torch.no_grad():
        assert model.encode_image(picture, normalize=True).norm().item() == pytest.approx(1, abs=1e-4)
    assert (work / f"{name}.json").is_file()


def test_the_text_encoder_is_clip_a_s(work):
    import open_clip
    from transformers import CLIPTextModel

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{work / 'clip_a'}", require_pretrained=True)
    text = CLIPTextModel.from_pretrained(work / "text_encoder").eval()
    ids = open_clip.get_tokenizer(f"local-dir:{work / 'clip_a'}")(["red apple, noto", "two cats", ""])
    with torch.no_grad():
        found = text(input_ids=ids)
        assert torch.allclose(found.pooler_output @ model.text_projection, model.encode_text(ids), atol=1e-5)
        hidden, _ = clip_export.reference(model, ids)
    assert torch.allclose(found.last_hidden_state, hidden, atol=1e-5)


def test_finished_work_is_not_done_again(work, scenes, shared):
    before = (work / "clip_a" / "open_clip_model.safetensors").stat().st_mtime_ns
    assert clip.train(scenes, shared, work)
    assert (work / "clip_a" / "open_clip_model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_reopened_clip_goes_on_where_it_ended(work, scenes, shared, tmp_path):
    copy = shutil.copytree(work, tmp_path / "work")
    (copy / "clip_b.safetensors").unlink()  # what packed models lack
    done, weights = json.loads((copy / "clip_b.json").read_text()), copy / "clip_b" / "open_clip_model.safetensors"
    before = load_file(weights)
    clip.reopen("clip_b", copy)
    assert not (copy / "clip_b").exists() and (copy / "clip_a").is_dir()
    # No seconds are left: the same weights come back.
    as_before = dataclasses.replace(shared, clip_b=dataclasses.replace(shared.clip_b, seconds=done["seconds"]))
    assert clip.train(scenes, as_before, copy)
    assert all(torch.equal(before[key], value) for key, value in load_file(weights).items())
    clip.reopen("clip_b", copy)
    longer = dataclasses.replace(shared.clip_b, seconds=done["seconds"] + 0.5)
    assert clip.train(scenes, dataclasses.replace(shared, clip_b=longer), copy)
    more = json.loads((copy / "clip_b.json").read_text())
    assert more["steps"] > done["steps"] and more["samples"] == more["steps"] * shared.clip_b.batch
    assert any(not torch.equal(before[key], value) for key, value in load_file(weights).items())


def test_a_job_without_time_says_that_it_is_not_done(scenes, shared, tmp_path):
    from diffaccel.training.loop import Deadline

    tokenizers.build([*scenes.captions[0], *scenes.captions[1]], tmp_path, size=1024)
    assert not clip.train(scenes, shared, tmp_path, deadline=Deadline(0))
    assert not (tmp_path / "clip_a").exists()


def test_frechet_distance_of_known_gaussians():
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    assert clip_eval.frechet(x, x) == pytest.approx(0, abs=1e-6)
    assert clip_eval.frechet(x, x + 2) == pytest.approx(6 * 4, rel=1e-5)
    # Scaling about the mean by 3: the trace of C (1 - 3)^2.
    trace = torch.cov(x.double().T).trace().item()
    assert clip_eval.frechet(x, (x - x.mean(0)) * 3 + x.mean(0)) == pytest.approx(4 * trace, rel=1e-5)


def test_order_is_measured_with_one_relation_word(world, sets_of_pairs):
    """A scorer that knows the caption is perfect; one that sees a bag of words is at zero (ties lose)."""

    class Letters:
        def __init__(self, positional):
            self.positional = positional

        def texts(self, texts):
            rows = []
            for text in texts:
                row = torch.zeros(4096)
                for place, word in enumerate(text.replace(",", "").split()):
                    row[bucket(f"{word} {place}" if self.positional else word, 4096)] += 1
                rows.append(row)
            return torch.nn.functional.normalize(torch.stack(rows), dim=-1)

    truth = [
        words.caption(sets_of_pairs.facts(i), random.Random(i), related=True, plain=True)
        for i in range(len(sets_of_pairs))
    ]
    knows = Letters(positional=True)
    assert clip_eval.order(knows, sets_of_pairs, knows.texts(truth)) == 1.0
    bag = Letters(positional=False)
    assert clip_eval.order(bag, sets_of_pairs, bag.texts(truth)) <= 0.1


@pytest.fixture(scope="module")
def sets_of_pairs(world):
    return heldout.build(world, size=20)["pair"]
