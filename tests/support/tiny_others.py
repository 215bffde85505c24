"""Tiny random pipelines that no family describes. Text that needs a large encoder is passed as embeddings."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from made_once import made_once

# name: two sides of square pictures
SIZES = {
    "qwen": (32, 48), "z_image": (32, 48), "ltx": (32, 64), "flux2_klein": (32, 64), "lumina2": (32, 48),
    "sana": (32, 64), "hunyuan15": (16, 32), "mochi": (16, 32), "chroma": (32, 48), "aura_flow": (32, 64),
    "hidream": (32, 64), "kandinsky5": (64, 32),
}  # fmt: skip
NAMES = tuple(SIZES)
SCALE = 3.5


def _embeds(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))


def _flow(**changes: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **changes})


def _dynamic() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)


def _image_vae(channels: int, levels: int = 1) -> Any:
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(4,) * levels, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=2, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.5, shift_factor=0.1,
    )  # fmt: skip


def qwen() -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, False, False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return diffusers.QwenImagePipeline(_dynamic(), vae, None, None, tiny._stir(transformer))


def z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    with torch.no_grad():  # made by torch.empty
        transformer.x_pad_token.fill_(1.0)
        transformer.cap_pad_token.fill_(1.0)
    return diffusers.ZImagePipeline(_flow(), _image_vae(4, 2), None, None, tiny._stir(transformer))


def ltx() -> Any:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=1, caption_channels=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1, 1, 1, 1), patch_size=1,
    )  # fmt: skip
    return diffusers.LTXPipeline(_dynamic(), vae, tiny._t5().eval(), tiny.t5_tokenizer(), tiny._stir(transformer))


def flux2_klein() -> Any:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return diffusers.Flux2KleinPipeline(_dynamic(), vae, None, None, tiny._stir(transformer))


def lumina2() -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4, in_channels=4, hidden_size=16, num_layers=1, num_attention_heads=2, num_kv_heads=1,
        multiple_of=16, axes_dim_rope=(4, 2, 2), cap_feat_dim=8,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(tiny._stir(transformer), _flow(), _image_vae(4), None, None)


def sana(out_channels: int = 4) -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=out_channels, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=32, patch_size=1,
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(
        latent_channels=4, in_channels=3, attention_head_dim=2, encoder_block_types=("ResBlock",) * 2,
        decoder_block_types=("ResBlock",) * 2, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )  # fmt: skip
    return diffusers.SanaPipeline(None, None, vae, tiny._stir(transformer), _flow())


def hunyuan15(guided: bool = True) -> Any:
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_refiner_layers=1,
        mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=32, image_embed_dim=12,
        rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=2, downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=SCALE if guided else 1.0)
    return diffusers.HunyuanVideo15Pipeline(
        None, None, tiny._stir(transformer), vae, _flow(shift=7.0), None, None, guider
    )


def mochi(inverted: bool = False) -> Any:
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=12, text_embed_dim=32, time_embed_dim=4, max_sequence_length=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5
    )
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=inverted)
    return diffusers.MochiPipeline(scheduler, vae, tiny._t5().eval(), tiny.t5_tokenizer(), tiny._stir(transformer))


def chroma() -> Any:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=32, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    return diffusers.ChromaPipeline(
        _flow(), _image_vae(4, 2), tiny._t5().eval(), tiny.t5_tokenizer(), tiny._stir(transformer)
    )


def aura_flow() -> Any:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, out_channels=4,
        pos_embed_max_size=256,
    )  # fmt: skip
    return diffusers.AuraFlowPipeline(
        tiny.t5_tokenizer(), tiny._t5().eval(), _image_vae(4, 2), tiny._stir(transformer), _flow(shift=1.73)
    )


def hidream() -> Any:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
    )  # fmt: skip
    pipe = diffusers.HiDreamImagePipeline(
        _flow(), _image_vae(4, 2), None, None, None, None, None, None, None, None, tiny._stir(transformer)
    )
    pipe.default_sample_size = 8  # every call is brought to the area of this square
    return pipe


def kandinsky5() -> Any:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=32, in_text_dim2=16, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
        model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(1, 1, 2), visual_cond=False,
        attention_type="regular",
    )  # fmt: skip
    pipe = diffusers.Kandinsky5T2IPipeline(tiny._stir(transformer), _image_vae(4, 2), None, None, None, None, _flow())
    pipe.resolutions = [(64, 64), (32, 32)]  # of the real network: from 640 to 1408
    return pipe


@made_once
def make(name: str, guided: bool = True, **changes: Any) -> Any:
    if name == "hunyuan15":
        changes["guided"] = guided
    torch.manual_seed(0)
    pipe = globals()[name](**changes)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe


def call_kwargs(
    name: str, size: int | None = None, guided: bool = True, batch: int = 2, steps: int = 4, seed: int = 0
) -> dict[str, Any]:
    """Return arguments of a call with ``batch`` prompts, latents out."""
    size = size or SIZES[name][0]
    kwargs: dict[str, Any] = dict(
        height=size, width=size, num_inference_steps=steps, output_type="latent",
        generator=[torch.Generator().manual_seed(seed + i) for i in range(batch)],
    )  # fmt: skip
    if name == "hidream":
        kwargs["width"] = SIZES[name][0]
    scale = SCALE if guided else 0.0 if name == "z_image" else 1.0
    if name != "hunyuan15":  # whose guider has it
        kwargs["true_cfg_scale" if name == "qwen" else "guidance_scale"] = scale
    if name in ("ltx", "mochi", "chroma", "aura_flow"):
        kwargs |= {"prompt": ["a red apple", "two cats"][:batch], "max_sequence_length": 16}
        if guided:
            kwargs["negative_prompt"] = ["blurry", "low quality"][:batch]
    kwargs |= {"ltx": {"num_frames": 9}, "mochi": {"num_frames": 7}}.get(name, {})
    return kwargs | _texts(name, batch, guided)


def _texts(name: str, batch: int, guided: bool) -> dict[str, Any]:
    ones = torch.ones(batch, 6, dtype=torch.long)
    match name:
        case "qwen":
            texts = {"prompt_embeds": _embeds(batch, 6, 16), "prompt_embeds_mask": ones}
        case "z_image":
            texts = {"prompt_embeds": [_embeds(5 + i, 16, seed=i) for i in range(batch)]}
        case "flux2_klein":
            texts = {"prompt_embeds": _embeds(batch, 6, 16)}
        case "lumina2" | "sana":
            texts = {"prompt_embeds": _embeds(batch, 6, 8), "prompt_attention_mask": ones}
        case "hunyuan15":
            texts = {
                "prompt_embeds": _embeds(batch, 6, 16), "prompt_embeds_mask": ones,
                "prompt_embeds_2": _embeds(batch, 6, 32), "prompt_embeds_mask_2": ones,
            }  # fmt: skip
        case "hidream":
            texts = {
                "prompt_embeds_t5": _embeds(batch, 6, 32), "prompt_embeds_llama3": _embeds(5, batch, 6, 16),
                "pooled_prompt_embeds": _embeds(batch, 64),
            }  # fmt: skip
        case "kandinsky5":
            texts = {
                "prompt_embeds_qwen": _embeds(batch, 6, 32), "prompt_embeds_clip": _embeds(batch, 16),
                "prompt_cu_seqlens": torch.tensor([6 * i for i in range(batch + 1)], dtype=torch.int32),
            }  # fmt: skip
        case _:
            return {}
    if name == "hunyuan15":
        texts["num_frames"] = 5
    if name == "lumina2":
        texts["cfg_normalization"] = False
    if name == "sana":
        texts |= {"use_resolution_binning": False, "negative_prompt": None}
    if guided:
        for key, value in list(texts.items()):
            if key.startswith(("prompt_", "pooled_")):
                texts["negative_" + key] = _other(value)
    return texts


def _other(value: Any) -> Any:
    """Return other embeddings of the same kind; masks and lengths stay."""
    if isinstance(value, list):
        return [_other(v) for v in value]
    return value.flip(-1) * 0.5 if value.is_floating_point() else value


def latents_of(result: Any) -> torch.Tensor:
    """Return a call's latents, under whatever name its output has them."""
    return next(iter(result.values()))
