"""Plans on tiny pipelines: made, killed and gone on with, applied, saved, loaded and taken off, all to the bit."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mixdq_bed as bed
import pytest
import torch
from diffusers import DDIMScheduler, PipelineQuantizationConfig
from torch import nn

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.quant import MixDQ, read_plan
from diffaccel.quant.layer import QuantizedLayer
from diffaccel.quant.mixdq.calibrate import CalibratedRanges
from diffaccel.quant.mixdq.candidates import candidates, group_of
from diffaccel.quant.mixdq.drawings import RecordedCalls
from diffaccel.quant.mixdq.sensitivity import RecordFile
from diffaccel.quant.mixdq.similarity import mean_similarity
from diffaccel.quant.mixdq.work import make
from diffaccel.quant.mixed.first_row import RowMemo

TO_K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
FEW = (
    "down_blocks",
    r"up_blocks\.\d+\.(?:attentions|upsamplers)",
    r"up_blocks\.1",
    r"mid_block\.resnets",
)  # left alone, for time
STATIC = MixDQ(**bed.FAST, weight_bits=5.0, activation_scale="tensor", skip=FEW)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> tuple[MixDQ, Path]:
    folder = tmp_path_factory.mktemp("sd")
    return bed.planned("sd", folder, STATIC), folder


def quantized_layers(network: nn.Module) -> dict[str, QuantizedLayer]:
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLayer)}


@pytest.mark.slow
def test_a_plan_of_a_unet(sd: tuple[MixDQ, Path]) -> None:
    config, folder = sd
    plan = config.read()
    assert plan.weight_average <= 5.0 and {layer.weight for layer in plan.layers.values()} <= {2, 4, 8}
    two = [name for name, layer in plan.layers.items() if layer.weight == 2]
    assert all(group_of(name) == "content" for name in two)
    assert (
        plan.first_row is not None and plan.layers["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"].first_row
    )
    assert plan.layers["up_blocks.0.resnets.0.conv1"].split == bed.pipeline("sd").unet.config.block_out_channels[-1]
    assert plan.provenance["scheduler"] == "EulerDiscreteScheduler" and plan.provenance["drawings"]["steps"] == 1
    assert len(plan.results["activations"]["protected"]) >= 2 and plan.results["rows"][0] > 0
    gaps = [program["gap"] for program in plan.results["weights"]["programs"]]
    assert all(0 <= gap < 0.05 for gap in gaps) and "mean bits" in str(plan)
    saved = json.loads((folder / "plan.json").read_text())
    assert read_plan(folder / "plan.json").layers == plan.layers and len(saved["layers"]) == len(plan.layers)


@pytest.mark.slow
def test_put_on_saved_loaded_and_taken_off(sd: tuple[MixDQ, Path], tmp_path: Path) -> None:
    config, pipe = sd[0], bed.pipeline("sd")
    stock = bed.draw(pipe, "sd")
    diffaccel.accelerate(pipe, config)
    layers, plan = quantized_layers(pipe.unet), config.read()
    assert set(layers) == set(plan.layers)
    memos = {id(layer.row_memo) for layer in layers.values() if hasattr(layer, "row_memo")}
    assert len(memos) == 1 and all(isinstance(m.row_memo, RowMemo) for m in layers.values() if hasattr(m, "row_memo"))
    result = bed.draw(pipe, "sd")
    assert 0 < float((result - stock).norm() / stock.norm()) < 0.5
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(bed.draw(loaded, "sd"), result)
    on_the_fly = PipelineQuantizationConfig(quant_mapping={"unet": config})
    bed.pipeline("sd").save_pretrained(tmp_path / "plain")
    other = type(pipe).from_pretrained(tmp_path / "plain", quantization_config=on_the_fly)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(bed.draw(other, "sd"), result)
    assert torch.equal(bed.draw(diffaccel.remove(pipe), "sd"), stock) and not quantized_layers(pipe.unet)


@pytest.mark.slow
def test_the_file_has_the_size_that_the_plan_says(sd: tuple[MixDQ, Path], tmp_path: Path) -> None:
    config, pipe = sd[0], bed.pipeline("sd")
    diffaccel.accelerate(pipe, replace(config, originals="drop"))
    pipe.unet.save_pretrained(tmp_path)
    told = 0
    for name, layer in quantized_layers(pipe.unet).items():
        codes = math.ceil(math.prod(layer.dequantize().shape[1:]) * config.read().layers[name].weight / 8)
        told += codes * layer.weight.shape[0]
        assert layer.weight.numel() * layer.weight.element_size() == codes * layer.weight.shape[0]
    others = sum(
        p.numel() * p.element_size() for name, p in pipe.unet.named_parameters()
        if name.rpartition(".")[0] not in quantized_layers(pipe.unet) or not name.endswith(".weight")
    )  # fmt: skip
    header = 8 + int.from_bytes((tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()[:8], "little")
    size = (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size - header
    assert size == pytest.approx(told + others, rel=0.01)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", (30, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1))))
def test_killed_at_any_point_it_goes_on_to_the_same_bits(sd: tuple[MixDQ, Path], after: int, tmp_path: Path) -> None:
    told = 0

    def kill(text: str) -> None:
        nonlocal told
        told += 1
        if told > after:
            raise Killed

    arguments = bed.arguments("sd")
    with pytest.raises(Killed):
        make(bed.pipeline("sd"), STATIC, tmp_path, bed.PROMPTS, arguments, tell=kill)
    assert not (tmp_path / "plan.json").exists()
    if (tmp_path / "measured.jsonl").exists():  # a line that was cut in the middle
        with open(tmp_path / "measured.jsonl", "a") as file:
            file.write('{"key": "weight ss')
    make(bed.pipeline("sd"), STATIC, tmp_path, bed.PROMPTS, arguments)
    for name in ("plan.json", "calibration.json", "work.json"):
        assert (tmp_path / name).read_bytes() == (sd[1] / name).read_bytes()
    lines = [sorted((folder / "measured.jsonl").read_text().splitlines()) for folder in (tmp_path, sd[1])]
    assert lines[0] == lines[1]


def test_killed_before_the_candidates_they_are_compared_with_the_plain_pictures(
    sd: tuple[MixDQ, Path], tmp_path: Path
) -> None:
    lines = (sd[1] / "measured.jsonl").read_text().splitlines(keepends=True)
    measured = [line for line in lines if '"candidate ' not in line]
    assert 0 < len(measured) < len(lines)
    for name in ("work.json", "calibration.json"):
        shutil.copy(sd[1] / name, tmp_path)
    (tmp_path / "measured.jsonl").write_text("".join(measured))
    make(bed.pipeline("sd"), STATIC, tmp_path, bed.PROMPTS, bed.arguments("sd"))
    assert sorted((tmp_path / "measured.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)
    assert (tmp_path / "plan.json").read_bytes() == (sd[1] / "plan.json").read_bytes()


def test_a_folder_with_other_work_is_refused(sd: tuple[MixDQ, Path]) -> None:
    arguments = bed.arguments("sd")
    with pytest.raises(DiffAccelError, match=r"other options \(weight_bits\)"):
        make(bed.pipeline("sd"), replace(STATIC, weight_bits=4.5), sd[1], bed.PROMPTS, arguments)
    with pytest.raises(DiffAccelError, match=r"other origin \(.*drawings"):
        make(bed.pipeline("sd"), STATIC, sd[1], ("other", "words"), arguments)
    pipe = bed.pipeline("sd")
    pipe.unet.conv_in.weight.data += 1
    with pytest.raises(DiffAccelError, match=r"other origin \(parts, weights"):
        make(pipe, STATIC, sd[1], bed.PROMPTS, arguments)
    pipe = bed.pipeline("sd")
    next(pipe.text_encoder.parameters()).data.neg_()  # other pictures by the same network
    with pytest.raises(DiffAccelError, match=r"other origin \(parts\)"):
        make(pipe, STATIC, sd[1], bed.PROMPTS, arguments)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("flux", MixDQ(**bed.FAST)),
        pytest.param("flux", MixDQ.paper(**bed.FAST, weight_bits=5.0, averages=2), marks=pytest.mark.slow),
        pytest.param("sd", MixDQ.paper(**bed.FAST, weight_bits=5.0, averages=2), marks=pytest.mark.slow),
        pytest.param("sdxl", MixDQ(**bed.FAST, allocation="sqnr"), marks=pytest.mark.slow),
        pytest.param("sd3", MixDQ(**bed.FAST, weight_bits=4.0, activation_bits=16.0), marks=pytest.mark.slow),
        pytest.param("pixart", MixDQ(**bed.FAST, activation_scale="tensor"), marks=pytest.mark.slow),
        pytest.param("wan", MixDQ(**bed.FAST), marks=pytest.mark.slow),
        pytest.param("flux", MixDQ(**bed.FAST, latency=0.5), marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else value.allocation,
)
def test_families_and_forms(family: str, config: MixDQ, tmp_path: Path) -> None:
    planned, pipe = bed.planned(family, tmp_path, config), bed.pipeline(family)
    stock = bed.draw(pipe, family)
    diffaccel.accelerate(pipe, planned)
    close = bed.draw(pipe, family)
    assert not torch.equal(close, stock) and float((close - stock).norm() / stock.norm()) < 0.6
    assert torch.equal(bed.draw(diffaccel.remove(pipe), family), stock)
    plan = planned.read()
    if not config.latency:
        assert plan.weight_average <= config.weight_bits + 1e-9
    if config.activation_bits == 16:
        assert {layer.activation for layer in plan.layers.values()} == {16}


def test_a_text_encoder_without_a_constant_row_has_none_stored(tmp_path: Path) -> None:
    assert bed.uniform("pixart", activation_scale="tensor").read().first_row is None
    off = bed.planned("sd", tmp_path, replace(STATIC, allocation="uniform", weight_bits=8.0, bos="off")).read()
    assert off.first_row is None and not any(layer.first_row for layer in off.layers.values())


def test_the_conditioned_half_and_the_empty_half(sd: tuple[MixDQ, Path]) -> None:
    """A batch of text states with the stored row, zeros and another row: each as in a batch of its own."""
    pipe = diffaccel.accelerate(bed.pipeline("sd"), sd[0])
    layer = pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    row = sd[0].read().first_row
    h = torch.randn(3, 5, len(row), generator=torch.Generator().manual_seed(0))
    h[0, 0], h[1] = row, 0
    together = layer(h)
    for i in range(3):
        assert torch.equal(layer(h[i : i + 1].clone())[0], together[i])
    plain = bed.pipeline("sd").unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    torch.testing.assert_close(together[0, 0], plain(row), rtol=1e-5, atol=1e-5)
    assert not together[1].any()


# -- parts ------------------------------------------------------------------------------------------------------------


def test_groups_by_the_parts_of_names() -> None:
    content = ("a.ff.net.2", "down.0.attn2.to_k", "transformer_blocks.0.ff_context.net.2", "blocks.3.ffn.net.2",
               "single_transformer_blocks.1.proj_out", "transformer_blocks.0.attn.add_k_proj")  # fmt: skip
    quality = ("buffer.0", "a.attn1.to_q", "proj_out", "conv_out", "diff.0", "attn20.to_k", "time_embedding.linear_1")
    assert {group_of(name) for name in content} == {"content"} and {group_of(name) for name in quality} == {"quality"}


def test_which_layers_are_planned() -> None:
    unet = bed.pipeline("sd").unet
    every = candidates(unet, MixDQ(planned="all"))
    linears = [m for m in unet.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(every) == len(linears) and "conv_in" in every and "conv_in" not in candidates(unet, MixDQ())
    assert not any(isinstance(c.module, nn.Conv2d) for c in candidates(unet, MixDQ(convs="keep")).values())
    once = [c for c in candidates(unet, MixDQ()).values() if c.name.endswith("time_emb_proj")]
    assert once and all(c.keeps_input and c.weight_choices == (4, 8) for c in once)
    assert not [n for n in candidates(unet, MixDQ(modulation="keep")) if n.endswith("time_emb_proj")]
    assert all(c.weight_choices == (8,) for c in candidates(unet, MixDQ(modulation="int8")).values()
               if c.name.endswith("time_emb_proj"))  # fmt: skip


def test_similarity() -> None:
    a = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert mean_similarity(a, a) == pytest.approx(1.0)
    noise = torch.randint(-9, 10, a.shape, generator=torch.Generator().manual_seed(1))
    b = (a.int() + noise).clamp(0, 255).to(torch.uint8)
    assert 0.9 < mean_similarity(a, b) < 1 and mean_similarity(a, 255 - a) < 0
    flat = torch.full_like(a, 100)
    c1 = (0.01 * 255) ** 2  # without variance only the means differ: (2 x y + c1) / (x^2 + y^2 + c1)
    expected = (2 * 100 * 120 + c1) / (100**2 + 120**2 + c1)
    assert mean_similarity(flat, flat + 20) == pytest.approx(expected)


@pytest.mark.parametrize("bits", (4, 6, 8))
def test_a_bit_is_worth_six_decibels(bits: int) -> None:
    """Uniform numbers rounded at 2^b levels have the ratio 6.02 b dB."""
    layer = nn.Identity()
    x = torch.rand(4, 10000, generator=torch.Generator().manual_seed(0))
    calls = RecordedCalls()
    with calls.recording(layer):
        layer(x)
    assert calls.noise_ratio(layer) == 200.0  # of equal outputs, a number that a program takes
    step = 1 / (2**bits - 1)
    calls.calls[0] = ((x,), {}, x)
    rounded = nn.Module()
    rounded.forward = lambda x: (x / step).round() * step  # type: ignore[method-assign]
    assert calls.noise_ratio(rounded) == pytest.approx(6.02 * bits + 6.02, abs=0.6)  # signal 1/3 over noise step^2/12


@pytest.mark.slow
def test_calibration_is_told_and_read_back(sd: tuple[MixDQ, Path]) -> None:
    values = json.loads((sd[1] / "calibration.json").read_text())
    assert len(values.pop("sha256")) == 64
    ranges = CalibratedRanges.from_dict(values)
    assert json.loads(json.dumps(ranges.to_dict())) == values and ranges.first_row is not None


def test_an_input_without_numbers_names_its_layer(tmp_path: Path) -> None:
    pipe = bed.pipeline("flux")
    pipe.transformer.transformer_blocks[0].norm1.linear.bias.data.fill_(float("nan"))
    with pytest.raises(DiffAccelError, match="in the plain network"):
        make(pipe, MixDQ(**bed.FAST), tmp_path, bed.PROMPTS, bed.arguments("flux"))


def test_records_are_appended(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    assert file.get("a", lambda: 1.5) == 1.5 == file.get("a", lambda: 2.0)
    assert RecordFile(tmp_path / "records.jsonl").values == {"a": 1.5}


# -- what is refused --------------------------------------------------------------------------------------------------


def test_foreign_and_damaged_plans_are_named(sd: tuple[MixDQ, Path], tmp_path: Path) -> None:
    file, values = tmp_path / "plan.json", json.loads((sd[1] / "plan.json").read_text())

    def refused(words: str, changed: Any, pipe: Any = None) -> None:
        file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
        pipe = pipe or bed.pipeline("sd")
        with pytest.raises(DiffAccelError, match=words):
            diffaccel.accelerate(pipe, MixDQ(plan=str(file)))
        assert diffaccel.summary(pipe).methods == []

    first = next(iter(values["layers"]))
    stray = {"nothing.here": values["layers"][first], **values["layers"]}
    refused("names 1 layers.*nothing.here", {**values, "layers": stray})
    refused("must be of", {**values, "layers": {first: {"size": 3}}})
    refused("must be of", {**values, "layers": {first: {**values["layers"][first], "weight": 3}}})
    refused("other shapes", {**values, "network": {**values["network"], "shapes": "0"}})
    refused("format version 9", {**values, "format": 9})
    refused("is no plan", "{")
    refused("is damaged", {**values, "layers": None})
    refused("does not have", values, bed.pipeline("flux"))
    with pytest.raises(DiffAccelError, match="There is no plan"):
        diffaccel.accelerate(bed.pipeline("sd"), MixDQ(plan=str(tmp_path / "none.json")))
    with pytest.raises(DiffAccelError, match="needs the plan"):
        diffaccel.accelerate(bed.pipeline("sd"), MixDQ())


@pytest.mark.slow
def test_bad_options_and_calls_are_named(tmp_path: Path) -> None:
    for make_config, words in (
        (lambda: MixDQ(weight_bits=1.5), "from 2 to 8"),
        (lambda: MixDQ(activation_bits=12.0), "from 4 to 8, or 16"),
        (lambda: MixDQ(group_size=3), "16 or more, or 0"),
        (lambda: MixDQ(samples=1), "2 or more"),
        (lambda: MixDQ(ratios=10**12), "from 1 to 1000"),
        (lambda: MixDQ(seed=10**22), r"from -2\*\*62 to 2"),
        (lambda: MixDQ(samples=4, probes=5), "more than samples"),
        (lambda: MixDQ(allocation="best"), "must be one of"),
        (lambda: MixDQ(allocation="uniform", latency=0.5), "latency is 0.5 with allocation='uniform'"),
        (lambda: MixDQ(allocation="uniform", exact=True), "exact is True with allocation='uniform'"),
        (lambda: MixDQ(calibration="ema"), "takes ranges at each call"),
        (lambda: MixDQ(protect=1.0), "all inputs stay as they are"),
        (lambda: MixDQ(within_average=True, activation_bits=4.0), "would need less than 4"),
    ):
        with pytest.raises(DiffAccelError, match=words):
            make_config()
    with pytest.raises(DiffAccelError, match="2 different prompts"):
        make(bed.pipeline("sd"), MixDQ(samples=3, probes=1), tmp_path, ("a", "b", "a"), bed.arguments("sd"))
    with pytest.raises(DiffAccelError, match=r"has 2\. Use w8a8"):
        make(bed.pipeline("wan22"), MixDQ(**bed.FAST), tmp_path, bed.PROMPTS, bed.arguments("wan22"))
    with pytest.raises(DiffAccelError, match="No plan has 2 bits"):
        make(bed.pipeline("sd"), replace(STATIC, weight_bits=2.0), tmp_path / "two", bed.PROMPTS, bed.arguments("sd"))
    counted = {"within_average": True, "protect": 0.2, "activation_bits": 4.05, "activation_scale": "token"}
    with pytest.raises(DiffAccelError, match=r"which is \d\.\d+ or more"):
        make(bed.pipeline("sd"), replace(STATIC, **counted), tmp_path / "in", bed.PROMPTS, bed.arguments("sd"))
    assert not list(tmp_path.glob("*/measured.jsonl"))  # before anything is measured


def test_another_scheduler_than_the_calibrated_one_is_told_of(sd: tuple[MixDQ, Path], caplog) -> None:
    pipe = bed.pipeline("sd")
    with caplog.at_level("WARNING"):
        diffaccel.remove(diffaccel.accelerate(pipe, sd[0]))
        assert not [r for r in caplog.records if "calibrated with" in r.message]
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        diffaccel.accelerate(pipe, sd[0])
    assert "calibrated with EulerDiscreteScheduler, and this pipeline has DDIMScheduler" in caplog.text


@pytest.mark.slow
def test_projections_that_were_joined_before(tmp_path: Path) -> None:
    """Keys and values in one linear have one stored product of both; joining quantized ones is refused."""
    pipe = bed.pipeline("sd")
    pipe.unet.fuse_qkv_projections()
    config = replace(STATIC, allocation="uniform", weight_bits=8.0, skip=("down_blocks", "up_blocks"))
    make(pipe, config, tmp_path, bed.PROMPTS, bed.arguments("sd"))
    plan = read_plan(tmp_path / "plan.json")
    assert plan.layers[TO_K.replace("to_k", "to_kv")].first_row and TO_K not in plan.layers
    stock = bed.draw(pipe, "sd")
    diffaccel.accelerate(pipe, replace(config, plan=str(tmp_path / "plan.json")))
    assert 0 < float((bed.draw(pipe, "sd") - stock).norm() / stock.norm()) < 0.3
    other = diffaccel.accelerate(bed.pipeline("sd"), bed.uniform("sd"))
    with pytest.raises(DiffAccelError, match="Call it before quantizing"):
        other.unet.fuse_qkv_projections()
    assert torch.equal(bed.draw(diffaccel.remove(pipe), "sd"), stock)


def test_plans_are_compared(sd: tuple[MixDQ, Path], tmp_path: Path) -> None:
    plan = sd[0].read()
    assert plan.diff(plan) == "no layer differs"
    name = next(iter(plan.layers))
    changed = {**plan.layers, name: replace(plan.layers[name], weight=4 if plan.layers[name].weight != 4 else 8)}
    told = plan.diff(replace(plan, layers=changed))
    assert told.count("\n") == 0 and told.startswith(name) and " -> " in told
    replace(plan, layers=changed).write(tmp_path / "other.json")
    assert read_plan(tmp_path / "other.json").layers == changed


def test_skipped_layers_and_records() -> None:
    config = bed.uniform("sd", activation_scale="tensor")
    pipe = diffaccel.accelerate(bed.pipeline("sd"), replace(config, skip=("mid_block",)))
    assert not [name for name in quantized_layers(pipe.unet) if name.startswith("mid_block")]
    for method in (MixDQ.paper(), config):
        assert MixDQ.from_dict(json.loads(json.dumps(method.to_dict()))) == method
