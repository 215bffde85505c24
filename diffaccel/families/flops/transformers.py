"""Multiply-adds of one row through the transformers of diffusers; n image tokens, m text tokens, d width."""

from __future__ import annotations

from diffaccel.families.flops.shared import Config, linears

SINUSOID = 256  # width of the sinusoidal time embedding in these transformers
CLIP_IMAGE_TOKENS = 257  # of the one image encoder that Wan's image-to-video checkpoints use


def _width(config: Config) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


def _self_attention(n: int, d: int) -> int:
    return 4 * d * d * n + 2 * d * n * n


def _cross_attention(n: int, m: int, d: int, context: int) -> int:
    return 2 * d * d * n + 2 * context * d * m + 2 * d * n * m


def _feed_forward(config: Config, d: int) -> int:
    gated = config.get("activation_fn") in ("geglu", "swiglu")
    return (12 if gated else 8) * d * d


def _patches(config: Config, d: int, n: int, volume: int) -> int:
    """Count the patch embedding and the final projection."""
    channels_out = config.get("out_channels") or config["in_channels"]
    return (config["in_channels"] + channels_out) * volume * d * n


def _time_and_pooled(config: Config, d: int) -> int:
    sinusoids = 2 if config.get("guidance_embeds") else 1
    return sinusoids * linears(SINUSOID, d, d) + linears(config["pooled_projection_dim"], d, d)


def flux(config: Config, n: int, m: int) -> int:
    """Count FLUX: joint blocks with two streams, then single-stream ones, both with 12 d^2 weights per token."""
    d, double, single = _width(config), config["num_layers"], config["num_single_layers"]
    blocks = (double + single) * (12 * d * d * (n + m) + 2 * d * (n + m) ** 2)
    modulation = (12 * double + 3 * single + 2) * d * d
    ends = config["joint_attention_dim"] * d * m + _patches(config, d, n, config["patch_size"] ** 2)
    return blocks + modulation + ends + _time_and_pooled(config, d)


def hunyuan(config: Config, n: int, m: int) -> int:
    """Count HunyuanVideo: Flux's blocks, after a small time-conditioned text transformer (arXiv 2412.03603)."""
    d, double, single = _width(config), config["num_layers"], config["num_single_layers"]
    widened = int(2 * d * config["mlp_ratio"])
    blocks = (double + single) * ((4 * d * d + widened * d) * (n + m) + 2 * d * (n + m) ** 2)
    modulation = (12 * double + 3 * single + 2) * d * d
    refiner = config["num_refiner_layers"] * (12 * d * d * m + 2 * d * m * m + 2 * d * d)
    refiner += config["text_embed_dim"] * d * m + linears(SINUSOID, d, d) + linears(config["text_embed_dim"], d, d)
    ends = _patches(config, d, n, config["patch_size"] ** 2 * config["patch_size_t"])
    return blocks + modulation + refiner + ends + _time_and_pooled(config, d)


def sd3(config: Config, n: int, m: int) -> int:
    """Count SD3: joint blocks, the first of SD3.5-medium with an extra image-only attention (arXiv 2403.03206)."""
    d, layers = _width(config), config["num_layers"]
    dual = sum(layer < layers for layer in config["dual_attention_layers"])
    blocks = layers * (12 * d * d * (n + m) + 2 * d * (n + m) ** 2) + dual * _self_attention(n, d)
    blocks -= 9 * d * d * m  # the last block drops the text after attention: no output projection, no feed-forward
    modulation = (12 * layers - 4 + 3 * dual + 2) * d * d
    ends = config["joint_attention_dim"] * d * m + _patches(config, d, n, config["patch_size"] ** 2)
    return blocks + modulation + ends + _time_and_pooled(config, d)


def wan(config: Config, n: int, m: int) -> int:
    """Count Wan: self-attention, cross-attention to the text, feed-forward (arXiv 2503.20314); one time per sample."""
    d, layers, (t, h, w) = _width(config), config["num_layers"], config["patch_size"]
    block = _self_attention(n, d) + _cross_attention(n, m, d, d) + 2 * d * config["ffn_dim"] * n
    head = linears(config["text_dim"], d, d) * m + linears(config["freq_dim"], d, d, 6 * d)
    if config.get("image_dim"):
        images = config.get("pos_embed_seq_len") or CLIP_IMAGE_TOKENS  # twice as many with a last frame
        block += (2 * d * d + 2 * d * n) * images
        head += linears(config["image_dim"], config["image_dim"], d) * images
    return layers * block + head + _patches(config, d, n, t * h * w)


def cogvideox(config: Config, n: int, m: int) -> int:
    """Count CogVideoX: one stream of text and video, two modulations per block (arXiv 2408.06072)."""
    d, layers, emb = _width(config), config["num_layers"], config["time_embed_dim"]
    block = _self_attention(n + m, d) + _feed_forward(config, d) * (n + m) + 12 * emb * d
    head = linears(d, emb, emb) + 2 * emb * d + config["text_embed_dim"] * d * m
    if config.get("ofs_embed_dim"):
        head += linears(*[config["ofs_embed_dim"]] * 3)
    volume = config["patch_size"] ** 2 * (config.get("patch_size_t") or 1)
    return layers * block + head + _patches(config, d, n, volume)


def pixart(config: Config, n: int, m: int) -> int:
    """Count PixArt: self-attention, cross-attention, feed-forward, one modulation for all blocks (arXiv 2310.00426)."""
    d, layers = _width(config), config["num_layers"]
    block = _self_attention(n, d) + _cross_attention(n, m, d, config["cross_attention_dim"])
    head = linears(SINUSOID, d, 6 * d) + d * d
    has_size_conditions = config.get("use_additional_conditions")
    if has_size_conditions or (has_size_conditions is None and config["sample_size"] == 128):
        head += 3 * linears(SINUSOID, d // 3, d // 3)  # height, width and aspect ratio
    if config.get("caption_channels"):
        head += linears(config["caption_channels"], d, d) * m
    volume = config["patch_size"] ** 2
    return layers * (block + _feed_forward(config, d) * n) + head + _patches(config, d, n, volume)


def dit(config: Config, n: int, m: int) -> int:
    """Count DiT: self-attention and feed-forward; each block embeds the time, the first twice (arXiv 2212.09748)."""
    d, layers = _width(config), config["num_layers"]
    block = _self_attention(n, d) + _feed_forward(config, d) * n + 6 * d * d
    head = (layers + 1) * linears(SINUSOID, d, d) + 2 * d * d
    return layers * block + head + _patches(config, d, n, config["patch_size"] ** 2)
