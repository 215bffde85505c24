"""Every fact about a denoiser against a network of its class, and against what the stock pipeline passes to it."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import diffusers
import networks
import pytest
import tiny
import torch
from torch import nn

from diffaccel.errors import DiffAccelError
from diffaccel.families.facts import facts_of
from diffaccel.families.facts_data import FACTS

BATCH = 3
ROUTED = nn.Linear | nn.Conv2d | nn.Conv3d


@pytest.fixture(scope="module", params=FACTS)
def network(request: pytest.FixtureRequest) -> Any:
    return networks.make(request.param)


def recorded(network: Any, modules: dict[str, nn.Module], **changes: Any) -> dict[str, tuple[Any, Any]]:
    """Input and output of the first call of each of ``modules``, in the order of the calls."""
    seen: dict[str, tuple[Any, Any]] = {}
    hooks = [
        module.register_forward_hook(lambda _, args, out, name=name: seen.setdefault(name, (args, out)) and None)
        for name, module in modules.items()
    ]
    square = type(network).__name__ == "DiTTransformer2DModel"
    call = networks.arguments(network, batch=BATCH, height=8, width=8 if square else 12, frames=2)
    network(**call | changes)
    for hook in hooks:
        hook.remove()
    return seen


def layers(network: Any) -> dict[str, nn.Module]:
    return {name: module for name, module in network.named_modules() if isinstance(module, ROUTED)}


def by_row(network: Any) -> set[str]:
    """Layers that see one row a sample, not one a token or pixel."""
    calls = recorded(network, layers(network))
    return {name for name, ((x, *_), _) in calls.items() if x.ndim == 2}


def matching(pattern: str, network: Any) -> set[str]:
    return {name for name, _ in network.named_modules() if re.fullmatch(pattern, name)}


def inside(name: str, blocks: list[str]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def test_blocks_are_all_there_and_in_order(network: Any):
    config, names = network.config, facts_of(network).block_names(network)
    if "block_out_channels" in config:
        expected = 2 * len(config.block_out_channels) + 1
    else:
        expected = config.num_layers + config.get("num_single_layers", 0)
    assert len(names) == expected
    assert list(recorded(network, {name: network.get_submodule(name) for name in names})) == names


def test_attention_is_what_has_queries(network: Any):
    facts = facts_of(network)
    blocks = facts.block_names(network)
    queries = {name for name, m in network.named_modules() if hasattr(m, "to_q") and inside(name, blocks)}
    assert matching(facts.attention, network) == queries != set()


@pytest.mark.slow
def test_what_is_kept_in_high_precision(network: Any):
    """All that stands outside the blocks, and inside them what sees one row a sample: attention and MLPs are free."""
    facts = facts_of(network)
    blocks = facts.block_names(network)
    high_precision = {name for name in layers(network) if facts.keeps(name)}
    assert high_precision == {name for name in layers(network) if not inside(name, blocks)} | by_row(network)
    attention_and_mlp = {name for name in layers(network) if inside(name, blocks) and name not in by_row(network)}
    assert len(attention_and_mlp) > len(blocks)
    assert list(recorded(network, layers(network)))[-1] in high_precision


def test_every_pattern_matches_something(network: Any):
    facts = facts_of(network)
    for pattern in facts.never_quantize:
        alone = dataclasses.replace(facts, never_quantize=(pattern,))
        assert any(alone.keeps(name) for name, _ in network.named_modules()), pattern
    norms = {name for name, m in network.named_modules() if "Norm" in type(m).__name__}
    assert [name for name in norms if not facts.keeps(name)] == []


def test_modulation_follows_time_and_not_the_sample(network: Any):
    facts = facts_of(network)
    modulation = {name: network.get_submodule(name) for name in matching(facts.modulation, network)}
    key = "sample" if "sample" in inspect.signature(network.forward).parameters else "hidden_states"
    call = networks.arguments(network, batch=BATCH, height=8, width=8, frames=2)
    first, other, later = (
        {name: out for name, (_, out) in recorded(network, modulation, **call | changes).items()}
        for changes in ({}, {key: -call[key]}, {"timestep": call["timestep"] / 2})
    )
    assert set(first) == set(modulation) != set()
    assert all(torch.equal(first[name], other[name]) for name in modulation)
    assert not any(torch.equal(first[name], later[name]) for name in modulation)
    # and nothing else does, but the embedders
    assert all("emb" in name for name in by_row(network) - set(modulation))


# -- what stock pipelines pass ----------------------------------------------------------------------------------------


def flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def embeds(network: Any, **size: int) -> dict[str, Any]:
    """Prompt embeddings made up here: text encoders are no part of what is recorded."""
    call = networks.arguments(network, batch=1, **size)
    return {"prompt_embeds": call["encoder_hidden_states"], "negative_prompt_embeds": call["encoder_hidden_states"]}


def wan(network: Any) -> tuple[Any, dict[str, Any]]:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=network)
    return pipe, embeds(network) | dict(height=32, width=48, num_frames=9)


def hunyuan(network: Any) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, transformer=network, vae=None, scheduler=flow(), text_encoder_2=None,
        tokenizer_2=None,
    )  # fmt: skip
    call = networks.arguments(network, batch=1)
    pooled = {"pooled_prompt_embeds": call["pooled_projections"], "prompt_attention_mask": torch.ones(1, 7)}
    return pipe, embeds(network) | pooled | dict(height=32, width=48, num_frames=9)


def cogvideox(network: Any) -> tuple[Any, dict[str, Any]]:
    scheduler = diffusers.CogVideoXDDIMScheduler(timestep_spacing="trailing")
    pipe = diffusers.CogVideoXPipeline(None, None, None, network, scheduler)
    return pipe, embeds(network) | dict(height=64, width=64, num_frames=9)


def pixart(network: Any) -> tuple[Any, dict[str, Any]]:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    pipe = diffusers.PixArtSigmaPipeline(None, None, None, network, scheduler)
    masks = {f"{side}prompt_attention_mask": torch.ones(1, 7) for side in ("", "negative_")}
    options = dict(height=32, width=48, use_resolution_binning=False, negative_prompt=None)
    return pipe, embeds(network) | masks | options


def dit(network: Any) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.DiTPipeline(network, tiny.sd().vae, diffusers.DDIMScheduler())
    return pipe, {"class_labels": [1]}


def ddpm(network: Any) -> tuple[Any, dict[str, Any]]:
    return diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()), {"output_type": "np"}


def family(name: str) -> Any:
    return lambda _: (tiny.make(name), tiny.call_kwargs(name, batch=1, size=48))


# the pipeline, and the size of its picture or video in pixels and frames
STOCK = {
    "flux": (family("flux"), "FluxTransformer2DModel", (48, 48, 1)),
    "sd3": (family("sd3"), "SD3Transformer2DModel", (48, 48, 1)),
    "sdxl": (family("sdxl"), "UNet2DConditionModel", (48, 48, 1)),
    "sd": (family("sd"), "UNet2DConditionModel", (48, 48, 1)),
    "wan": (wan, "WanTransformer3DModel", (32, 48, 9)),
    "hunyuan": (hunyuan, "HunyuanVideoTransformer3DModel", (32, 48, 9)),
    "cogvideox": (cogvideox, "CogVideoXTransformer3DModel", (64, 64, 9)),
    "pixart": (pixart, "PixArtTransformer2DModel", (32, 48, 1)),
    "dit": (dit, "DiTTransformer2DModel", (64, 64, 1)),
    "ddpm": (ddpm, "UNet2DModel", (16, 16, 1)),
}


@pytest.mark.parametrize("name", STOCK)
def test_tokens_and_times_are_what_the_stock_pipeline_passes(name: str):
    build, cls, (height, width, frames) = STOCK[name]
    changes = {"use_additional_conditions": False} if name == "pixart" else {}  # which it passes at 1024 pixels only
    pipe, call = build(networks.make(cls, **networks.TINY[cls] | changes))
    pipe.set_progress_bar_config(disable=True)
    network = getattr(pipe, "transformer", None) or pipe.unet
    facts, seen, times = facts_of(network), [], []

    def see_time(_: Any, args: tuple, kwargs: dict) -> None:
        times.append(float(torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).max()))

    def see_tokens(_: Any, args: tuple, kwargs: dict) -> None:
        x = kwargs.get("hidden_states", args[0] if args else None)
        seen.append(x.shape[1] if x.ndim == 3 else x.shape[2] * x.shape[3])

    network.register_forward_pre_hook(see_time, with_kwargs=True)
    first = network.get_submodule(facts.block_names(network)[0])
    first.register_forward_pre_hook(see_tokens, with_kwargs=True)
    output = {"output_type": "latent"} if name not in ("dit", "ddpm") else {}
    pipe(**{**call, **output, "num_inference_steps": 8})
    assert set(seen) == {facts.tokens(network.config, height, width, frames)}
    low, high = facts.timestep_range
    assert low <= min(times) < 0.4 * high and 0.8 * high < max(times) <= high
    if isinstance(pipe.scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        assert max(times) == high  # from pure noise


@pytest.mark.parametrize(
    ("pipeline", "cls", "beside"),
    [
        ("FluxPipeline", "FluxTransformer2DModel", 0),
        ("StableDiffusion3Pipeline", "SD3Transformer2DModel", 77),  # of CLIP
        ("WanPipeline", "WanTransformer3DModel", 0),
        ("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", 0),
        ("CogVideoXPipeline", "CogVideoXTransformer3DModel", 0),
    ],
)
def test_text_tokens_are_the_pipelines_default(pipeline: str, cls: str, beside: int):
    signature = inspect.signature(getattr(diffusers, pipeline).__call__)
    assert FACTS[cls].text_tokens == signature.parameters["max_sequence_length"].default + beside


# -- looking them up --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_facts_are_seen_through_compile_and_subclasses():
    network = networks.make("UNet2DModel")

    class Ours(type(network)):
        pass

    facts = FACTS["UNet2DModel"]
    assert facts_of(torch.compile(network)) is facts
    assert facts_of(Ours(**networks.TINY["UNet2DModel"])) is facts
    assert facts.block_names(torch.compile(network)) == facts.block_names(network)


def test_an_unknown_class_names_the_nearest():
    class FluxTransformer3DModel(nn.Module):
        pass

    with pytest.raises(DiffAccelError, match=r"'FluxTransformer2DModel'.*Known: CogVideoXTransformer3DModel, "):
        facts_of(FluxTransformer3DModel())


def test_tokens_of_published_sizes():
    """By hand: 4096 tokens of FLUX at a megapixel, 32760 of Wan at 480p, CogVideoX 1.5's frames filled up to pairs."""
    wan, cog = {"patch_size": (1, 2, 2)}, {"patch_size": 2, "patch_size_t": 2}
    assert FACTS["FluxTransformer2DModel"].tokens({"patch_size": 1}, 1024, 1024) == 4096
    assert FACTS["WanTransformer3DModel"].tokens(wan, 480, 832, 81) == 32760
    assert FACTS["WanTransformer3DModel"].tokens(wan, 704, 1280, 121, vae_scale=16) == 31 * 22 * 40
    assert FACTS["CogVideoXTransformer3DModel"].tokens(cog, 768, 1360, 81) == 11 * 48 * 85
    assert FACTS["UNet2DModel"].tokens({}, 32, 32) == 1024


@pytest.mark.parametrize("size", [(8, 1024, 1), (1024, 1024, 0), (-16, -16, 1)])
def test_a_size_without_tokens_is_refused(size: tuple[int, int, int]):
    with pytest.raises(DiffAccelError, match="no token"):
        FACTS["FluxTransformer2DModel"].tokens({}, *size)
