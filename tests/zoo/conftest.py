"""A complete FluxPipeline small enough for tests, with random weights."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch


def _tokenizers():
    from transformers import CLIPTokenizer, T5TokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=32)
    words = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{c}" for c in letters), *letters]
    t5 = T5TokenizerFast(vocab=[(word, -float(i)) for i, word in enumerate(words)], extra_ids=0, model_max_length=32)
    return clip, t5, len(pieces), len(words)


def tiny_flux(seed: int = 0):
    """A random FluxPipeline: 32 px, 8x autoencoder, two blocks."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    clip, t5, clip_size, t5_size = _tokenizers()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5),
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.6,
            shift_factor=0.5,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=clip_size,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=32,
                projection_dim=32,
                bos_token_id=clip_size - 2,
                eos_token_id=clip_size - 1,
            )
        ),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=t5_size, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
        ),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
    )


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory):
    """The random pipeline saved in bf16, as a trained one is exported."""
    folder = tmp_path_factory.mktemp("flux") / "plain"
    tiny_flux().to(torch.bfloat16).save_pretrained(folder)
    return folder
