"""From a work folder to packed models and back: what a user loads, what travels, what training resumes from."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from diffaccel.errors import DiffAccelError
from diffaccel.training.loop import Deadline, TrainingPlan, TrainingRun
from diffaccel.zoo import packing
from scripts.zoo.emoji import export, finish, flow, recipe_flow, score, tokenizers, vae

CAPTIONS = ["red apple, noto", "blue cat left of green dog, twemoji", "three bananas in fluent 3d style"]
RECIPE = recipe_flow.Recipe(
    name="toy",
    default_size=32,
    default_steps=2,
    vae=recipe_flow.VAERecipe(
        channels=(4, 4, 4, 8), groups=2, batch=dict.fromkeys(vae.STEPS, 2), plan=TrainingPlan(lr=1e-3, samples=4)
    ),
    flow=recipe_flow.FlowRecipe(
        heads=2,
        head_dim=16,
        rope=(4, 6, 6),
        double_blocks=1,
        single_blocks=1,
        text_dim=16,
        text_layers=1,
        text_heads=2,
        text_ff=32,
        cycle=(64,),
        lengths={16: 1.0},
        tokens=256,
        plan=TrainingPlan(lr=1e-2, samples=64, warmup=1),
    ),
)
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {
        "context_length": 32,
        "vocab_size": 640,
        "width": 16,
        "heads": 2,
        "layers": 1,
        "hf_tokenizer_name": "local",
    },
}


def _open_clip(folder, tokenizer):
    import open_clip

    model = open_clip.CLIP(
        **{"embed_dim": 16, "vision_cfg": OPEN_CLIP["vision_cfg"], "text_cfg": OPEN_CLIP["text_cfg"]}
    )
    folder.mkdir()
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    preprocess = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": preprocess}))
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A finished work folder with tiny models, trained for a handful of steps."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    work = tmp_path_factory.mktemp("work")
    clip_tokenizer, _ = tokenizers.build(CAPTIONS, work, size=640)

    def images(index, size):
        return torch.linspace(-1, 1, size).expand(len(index), 3, size, size)

    vae.train(images, 70, work, RECIPE.vae, deadline=Deadline(100), device="cpu")
    size = len(clip_tokenizer)
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        projection_dim=16,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
    )
    CLIPTextModel(config).save_pretrained(work / "text_encoder")
    for name in export.CLIPS.values():
        _open_clip(work / name, clip_tokenizer)
    autoencoder = vae.load(work, "cpu")
    table = flow.tabulate(images, [CAPTIONS, CAPTIONS[::-1]], autoencoder, work, "cpu")
    assert table.latents[64].shape == (3, 64, 4, 4) and table.latents[128].shape == (3, 64, 8, 8)
    assert table.prompt.tolist() == [[1, 2], [3, 3], [2, 1]]
    flow.train(table, torch.ones(3), work, RECIPE, deadline=Deadline(100), device="cpu")
    return work


@pytest.fixture(scope="module")
def zoo(work, tmp_path_factory):
    zoo = tmp_path_factory.mktemp("zoo")
    (work / "clip_b.json").write_text('{"pair_order": 0.5}')
    report = {
        "acceptance": [{"check": "label, top 1", "target": ">= 0.55", "value": 0.1, "passed": False}],
        "note": "toy",
    }
    export.export(work, RECIPE, zoo, report)
    return zoo


@pytest.mark.slow
def test_everything_that_must_go_with_the_weights_is_there(zoo):
    for name in (export.PIPELINE, *export.CLIPS):
        files = {p.name for p in (zoo / name).iterdir()}
        assert files >= {"manifest.json", "card.json", "README.md", "NOTICE", "LICENSE-MIT", "LICENSE-APACHE"}
        assert not any(p.is_dir() for p in (zoo / name).iterdir())  # package data is one level deep
        card = json.loads((zoo / name / "card.json").read_text())
        assert (
            card["state"] == "below acceptance in: label, top 1"
            and card["licence"] == "Apache-2.0"
            and card["bytes"]["packed"] > 0
        )
        plain = json.loads((zoo / name / "manifest.json").read_text())["files"]
        assert {"NOTICE", "LICENSE-MIT", "LICENSE-APACHE"} <= set(plain)
    readme = (zoo / export.PIPELINE / "README.md").read_text()
    assert "| label, top 1 | 0.1 | >= 0.55 |  | no |" in readme and "CC-BY 4.0" in readme


@pytest.mark.slow
def test_stock_pipeline_draws_what_the_work_folder_draws(work, zoo, tmp_path):
    from diffusers import FluxPipeline

    def draw(pipe, length=32):
        pipe.set_progress_bar_config(disable=True)
        settings = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
        prompt = {"prompt": CAPTIONS[0], "negative_prompt": "", "true_cfg_scale": 2.0, "max_sequence_length": length}
        return pipe(**prompt, **settings, generator=torch.Generator().manual_seed(0)).images

    stock = FluxPipeline.from_pretrained(packing.unpack(zoo / export.PIPELINE, tmp_path / "plain"), dtype=torch.float32)
    ours = export.assemble(work, RECIPE)
    assert (draw(stock) - draw(ours)).square().mean() < 1e-4  # 40 dB: bf16 and int8
    assert stock.scheduler.config.shift == 1.5 and not stock.transformer.config.guidance_embeds
    assert draw(stock, 512).shape == draw(stock).shape


def test_rounding_of_packed_weights_is_measured(work, zoo, tmp_path):
    packed, judge = export.reload(zoo, tmp_path / "plain", "cpu")
    original = export.assemble(work, RECIPE, torch.bfloat16).to(torch.float32)
    settings = {"size": 32, "steps": 2, "guidance": 2.0}
    assert 40 < score.rounding(original, packed, **settings) < 120
    assert score.rounding(packed, packed, **settings) > 120 and (judge / "open_clip_config.json").is_file()
    score.grid(packed, tmp_path / "grid.png", **settings)
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_cards_take_a_report_and_packed_files_stay(zoo, tmp_path):
    shutil.copytree(zoo, tmp_path / "zoo")
    row = {"check": "label, top 1", "target": ">= 0.55", "value": 0.7, "passed": True}
    (tmp_path / "report.json").write_text(json.dumps({"acceptance": [row], "quality": {"x": 1}, "note": "Good."}))
    (tmp_path / "grid.png").write_bytes(b"png")
    finish.publish(tmp_path / "zoo", tmp_path)
    folder = tmp_path / "zoo" / export.PIPELINE
    card = json.loads((folder / "card.json").read_text())
    assert card["state"] == "accepted" and card["quality"] == {"x": 1} and (folder / "grid.png").is_file()
    readme = (folder / "README.md").read_text()
    assert "| label, top 1 | 0.7 | >= 0.55 |  | yes |" in readme and "(grid.png)" in readme and "Good." in readme
    packing.verify(folder, packing.read_manifest(folder)["packed"], "file", "fix")


def test_open_clip_loads_the_unpacked_judge(zoo, tmp_path):
    import open_clip

    folder = packing.unpack(zoo / "emoji-clip-judge", tmp_path / "judge")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", require_pretrained=True)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    assert model.encode_text(tokens).shape == (3, 16) and tokens.shape == (3, 32)


def test_models_travel_in_parts(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(export.split, "__defaults__", (100_000,))
    parts = export.send(zoo, tmp_path / "out")
    assert len(parts) > 2 and all(part.stat().st_size <= 100_000 for part in parts)
    export.receive(tmp_path / "out", tmp_path / "zoo")
    for name in (export.PIPELINE, *export.CLIPS):
        assert packing.fingerprints(tmp_path / "zoo" / name) == packing.fingerprints(zoo / name)
    middle = parts[1].read_bytes()
    parts[1].write_bytes(middle[:-1] + bytes([middle[-1] ^ 1]))
    with pytest.raises(DiffAccelError, match="damaged"):
        export.receive(tmp_path / "out", tmp_path / "zoo")
    parts[1].unlink()
    with pytest.raises(DiffAccelError, match=f"has {len(parts):02d} parts, got {len(parts) - 1}"):
        export.receive(tmp_path / "out", tmp_path / "zoo")
    with pytest.raises(DiffAccelError, match="not the parts of one file"):
        export.join([parts[0], tmp_path / "other"], tmp_path / "x")


def test_training_resumes_from_packed_models(work, zoo, tmp_path):
    export.restore(zoo, tmp_path)
    first, second = flow.load(work, RECIPE.flow), flow.load(tmp_path, RECIPE.flow)
    for name, module in first.items():
        for a, b in zip(module.parameters(), second[name].parameters(), strict=True):
            assert (a - b).abs().max() <= 0.02 * a.abs().max()
    run = TrainingRun(tmp_path, "flow", second, RECIPE.flow.plan)
    assert run.step == run.restarted_at == 8 and run.samples == 64
    assert json.loads((tmp_path / "clip_b.json").read_text()) == {"pair_order": 0.5}
    assert (tmp_path / "clip_b" / "open_clip_config.json").is_file() and vae.load(tmp_path, "cpu") is not None
