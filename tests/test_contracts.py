"""What users do besides: LoRA before and after, compile, caches, offload state, subfolders of the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import diffaccel
from diffaccel.families import find
from diffaccel.samplers import Euler

TARGETS = ["to_q", "to_k", "to_v"]


@pytest.fixture(params=tiny.FAMILIES)
def family(request) -> str:
    return request.param


def run(pipe: Any, family: str, size: int = 32, **extra: Any) -> torch.Tensor:
    return pipe(**tiny.call_kwargs(family, size), **extra).images


def lora_folder(family: str, folder: Path, seed: int) -> Path:
    """Save a LoRA file of the family's own format, with weights large enough to be seen."""
    pipe = tiny.make(family)
    denoiser = getattr(pipe, find(pipe).denoiser)
    denoiser.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False))
    draw = torch.Generator().manual_seed(seed)
    for name, p in denoiser.named_parameters():
        if "lora" in name:
            p.data = torch.randn(p.shape, generator=draw)
    layers = {f"{find(pipe).denoiser}_lora_layers": get_peft_model_state_dict(denoiser)}
    type(pipe).save_lora_weights(folder, **layers)
    return folder


@pytest.mark.parametrize("family", ["flux", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_lora_before_after_swapped_and_fused(family: str, tmp_path: Path) -> None:
    """In one life of a pipeline; the contract matrix has each alone, of every family."""
    first_lora, second_lora = (lora_folder(family, tmp_path / str(seed), seed) for seed in (1, 2))
    pipe = tiny.make(family)
    bare = run(pipe, family)
    pipe.load_lora_weights(first_lora, adapter_name="one")
    with_one = run(pipe, family)
    pipe.load_lora_weights(second_lora, adapter_name="two")
    pipe.set_adapters(["two"])
    with_two = run(pipe, family)
    assert not torch.equal(bare, with_one) and not torch.equal(with_one, with_two)

    diffaccel.accelerate(pipe, Euler())  # loaded before wrapping
    assert torch.equal(run(pipe, family), with_two)
    pipe.set_adapters(["one"])  # swapped while wrapped
    assert torch.equal(run(pipe, family), with_one)
    pipe.fuse_lora(adapter_names=["one"])
    torch.testing.assert_close(run(pipe, family), with_one, rtol=1e-3, atol=1e-3)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    # unfusing subtracts what fusing added, up to rounding
    torch.testing.assert_close(run(pipe, family), bare, rtol=1e-4, atol=1e-4)

    # Loading and unloading can move a stock pipeline's last bits (other CPU kernels), so stock does the same here.
    stock, fresh = tiny.make(family), diffaccel.accelerate(tiny.make(family), Euler())
    for pipe in (stock, fresh):
        pipe.load_lora_weights(first_lora, adapter_name="one")  # loaded after wrapping
        assert torch.equal(run(pipe, family), with_one)
        pipe.unload_lora_weights()
    assert torch.equal(run(fresh, family), run(stock, family))
    torch.testing.assert_close(run(fresh, family), bare, rtol=1e-4, atol=1e-4)


def test_the_lora_scale_of_a_call(family: str, tmp_path: Path) -> None:
    pipe = tiny.make(family)
    pipe.load_lora_weights(lora_folder(family, tmp_path, 1))
    key = "joint_attention_kwargs" if family in tiny.FLOW else "cross_attention_kwargs"
    stock = run(pipe, family, **{key: {"scale": 0.25}})
    assert not torch.equal(stock, run(pipe, family))
    diffaccel.accelerate(pipe, Euler())
    assert torch.equal(run(pipe, family, **{key: {"scale": 0.25}}), stock)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "how"), [("flux", "in place"), ("flux", "wrapped"), ("sd", "wrapped")])
def test_torch_compile(family: str, how: str) -> None:
    """Compiled before or after wrapping, whole module: equal to the stock call of the same compiled module.

    The contract matrix compiles every family in place.
    """
    torch.compiler.reset()
    pipe = tiny.make(family)
    name = find(pipe).denoiser
    eager = run(pipe, family)
    if how == "in place":
        getattr(pipe, name).compile(backend="eager")
    else:
        setattr(pipe, name, torch.compile(getattr(pipe, name), backend="eager"))
    stock = [run(pipe, family, size) for size in (32, 64)]
    diffaccel.accelerate(pipe, Euler())
    assert all(torch.equal(run(pipe, family, size), x) for size, x in zip((32, 64), stock, strict=True))
    torch.testing.assert_close(stock[0], eager, rtol=1e-4, atol=1e-4)
    after = diffaccel.accelerate(tiny.make(family), Euler())
    if how == "in place":
        getattr(after, name).compile(backend="eager")
    else:
        setattr(after, name, torch.compile(getattr(after, name), backend="eager"))
    assert torch.equal(run(after, family), stock[0])


def cached_flux(threshold: float) -> tuple[Any, list[int]]:
    """Return a Flux with first-block caching, and a count of the calls of a block that the cache can skip."""
    from diffusers import FirstBlockCacheConfig

    pipe = tiny.make("flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    count = [0]
    block = pipe.transformer.single_transformer_blocks[0].attn

    def hook(*args: Any) -> None:
        count[0] += 1

    block.register_forward_pre_hook(hook)
    return pipe, count


def test_diffusers_caches_work_under_a_sampler() -> None:
    pipe, count = cached_flux(threshold=1e9)
    stock = run(pipe, "flux")
    skipped = count[0]
    diffaccel.accelerate(pipe, Euler())
    assert torch.equal(run(pipe, "flux"), stock)
    assert count[0] == 2 * skipped and skipped == 2  # the first step only, once a branch


def test_caches_forget_at_a_change_of_resolution() -> None:
    """High, low, high: neither an error nor a residual of another stage."""
    from diffaccel.runtime.native import Native
    from diffaccel.session import Eval

    pipe, count = cached_flux(threshold=1e9)
    plain = tiny.make("flux")
    with torch.no_grad(), diffaccel.open_session(pipe, **tiny.call_kwargs("flux", 64)) as session:
        low = session.at(32, 32)
        driver = Native(session)
        sigma = session.sigmas[1]
        for resolution in (session, session, low, low, session):
            before = count[0]
            v = driver.predict([Eval(resolution.x, sigma, at=resolution)])[0].v
            ran = count[0] - before
            with diffaccel.open_session(plain, **tiny.call_kwargs("flux", resolution.height)) as fresh:
                expected = Native(fresh).predict([Eval(fresh.x, sigma)])[0].v
            # the second call in a row at one resolution is served from the cache, the others are computed
            assert torch.equal(v, expected) and ran in (0, 2)
        assert count[0] == 2 * 3


def test_particles_do_not_mix_in_a_cache() -> None:
    from diffaccel.runtime.native import Native
    from diffaccel.session import Eval

    pipe, _ = cached_flux(threshold=1e9)
    with torch.no_grad(), diffaccel.open_session(pipe, **tiny.call_kwargs("flux")) as session:
        x = torch.randn(4, *session.x.shape[1:], generator=torch.Generator().manual_seed(0))
        rows, sigma = [0, 0, 1, 1], session.sigmas[1]
        driver = Native(session, max_batch=2)
        first = driver.predict([Eval(x, sigma, rows=rows)])[0].v
        again = driver.predict([Eval(x, sigma, rows=rows)])[0].v
    assert torch.equal(first, again)


def test_a_pipeline_with_its_text_encoders_dropped() -> None:
    """Embeddings in, encoders gone: the usual way to fit a large model."""
    pipe = tiny.make("flux")
    embeds, pooled, _ = pipe.encode_prompt("a red apple", None, max_sequence_length=24)
    pipe.text_encoder = pipe.text_encoder_2 = pipe.tokenizer = pipe.tokenizer_2 = None
    kwargs = dict(prompt_embeds=embeds, pooled_prompt_embeds=pooled, height=32, width=32, num_inference_steps=2,
                  output_type="latent")  # fmt: skip
    stock = pipe(**kwargs, generator=torch.Generator().manual_seed(0)).images
    diffaccel.accelerate(pipe, Euler())
    assert torch.equal(pipe(**kwargs, generator=torch.Generator().manual_seed(0)).images, stock)


def test_out_of_memory_says_what_to_try() -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), Euler())

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    pipe.transformer.register_forward_pre_hook(full)
    with pytest.raises(diffaccel.DiffAccelError, match=r"max_batch=1.*enable_model_cpu_offload"):
        run(pipe, "flux")
