"""The network of next-frame diffusion: a block-causal transformer with one noise level a frame (arXiv 2506.01380)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError, size_text
from diffaccel.models.next_frame import mask
from diffaccel.models.next_frame.block import Attend, FrameAttention, NextFrameBlock, modulate
from diffaccel.models.next_frame.rotary import rotate, rotation, space_angles, time_angles

TIME_CHANNELS = 256
SMALLEST_SIGMA = 0.05  # at which a predicted clean frame is turned into a velocity


class BandedAttention:
    """Attention of all frames of a clip to each other, in one piece: bidirectional in a frame, causal over frames.

    A frame sees itself and the ``window - 1`` frames before it.
    """

    def __init__(self, ids: Tensor, window: int, tokens: int, rotations: tuple[Tensor, Tensor]) -> None:
        self._cos, self._sin = (part[:, :, None] for part in rotations)  # (T, n, 1, head_dim / 2)
        frames = mask.band(ids, ids, window)
        self._mask = mask.of_tokens(frames, tokens)[None, None] if len(ids) > 1 else None

    def __call__(self, layer: int, attention: FrameAttention, qkv: Tensor) -> Tensor:
        """Return the attention of a layer; see :class:`Attend`."""
        query, key, value = attention.normed(qkv)
        shape = query.shape
        query, key = rotate(query, self._cos, self._sin), rotate(key, self._cos, self._sin)
        query, key, value = (part.flatten(1, 2).transpose(1, 2) for part in (query, key, value))  # (B, heads, T n, d)
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=self._mask)
        return out.transpose(1, 2).reshape(shape)


class NextFrameTransformer(ModelMixin, ConfigMixin):
    """Block-causal transformer over the frames of a video, each with a noise level and an action of its own.

    With ``x_t = (1 - sigma) x0 + sigma eps`` per frame, :meth:`forward` predicts the velocity ``v = eps - x0``. Frame i
    sees itself and the ``window - 1`` frames before it; conditions enter by adaLN-zero, which depends on a frame's
    level and action only. Positions are three-axis rotary ones of frame, row and column, so only differences of frame
    ids count. With ``prediction="velocity"`` an untrained network returns zero.

    Args:
        in_channels: channels C of a frame.
        height: of a frame, in pixels or latent cells.
        width: of a frame.
        patch_size: side of the square that becomes one token.
        num_layers: number of layers.
        num_attention_heads: heads of a layer; the width of the network is this times ``attention_head_dim``.
        attention_head_dim: channels of a head, a multiple of 8.
        mlp_ratio: width of the multilayer perceptron over that of the network.
        num_actions: number of actions; the index ``num_actions`` is "no action", of frames whose action is unknown.
        window: number of frames that attention spans, the queried one included.
        modulation: "block": each layer makes its adaLN rows itself; "shared": one layer makes them for all, which add a
            bias each.
        prediction: what the head predicts: "velocity", or "sample", the clean frame, from which :meth:`forward` makes
            ``v = (x_t - x0) / max(sigma, 0.05)``.
        rope_theta: base of the rotary frequencies.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("NextFrameBlock",)
    _repeated_blocks = ("NextFrameBlock",)

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 3,
        height: int = 64,
        width: int = 64,
        patch_size: int = 8,
        num_layers: int = 12,
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        num_actions: int = 9,
        window: int = 16,
        modulation: Literal["block", "shared"] = "block",
        prediction: Literal["velocity", "sample"] = "velocity",
        rope_theta: float = 10000.0,
    ) -> None:
        super().__init__()
        _check_sizes(self.config)
        _check_config(height, width, patch_size, attention_head_dim, window, modulation, prediction)
        dim = num_attention_heads * attention_head_dim
        self.rows, self.columns = height // patch_size, width // patch_size
        self.tokens = self.rows * self.columns
        patch = in_channels * patch_size**2
        self.proj_in = nn.Linear(patch, dim)
        place = torch.randn(self.tokens, dim, dtype=torch.float32, device=torch.get_default_device())
        self.place_embedding = nn.Parameter(0.02 * place)
        self.time_embedding = nn.Sequential(nn.Linear(TIME_CHANNELS, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.action_embedding = nn.Embedding(num_actions + 1, dim)
        own = modulation == "block"
        self.shared_modulation = None if own else nn.Linear(dim, 6 * dim)
        self.transformer_blocks = nn.ModuleList(
            NextFrameBlock(dim, num_attention_heads, attention_head_dim, mlp_ratio, own) for _ in range(num_layers)
        )
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, patch)
        self.gradient_checkpointing = False
        self._make_zero()

    def _make_zero(self) -> None:
        """Set gates, shifts, scales and the head to zero, and spread the other embeddings narrowly."""
        layers: list[Any] = [self.shared_modulation, self.modulation_out, self.proj_out]
        for layer in [*layers, *(block.modulation for block in self.transformer_blocks)]:
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.action_embedding.weight, std=0.02)

    @property
    def null_action(self) -> int:
        """Index of "no action"."""
        return self.config.num_actions

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """Shape ``(C, H, W)`` of a frame."""
        return self.config.in_channels, self.config.height, self.config.width

    @property
    def key_sizes(self) -> tuple[int, int, int]:
        """Numbers of layers and heads, and the channels of a head."""
        return self.config.num_layers, self.config.num_attention_heads, self.config.attention_head_dim

    @property
    def key_weight(self) -> Tensor:
        """A weight that has the dtype and device of keys."""
        return self.proj_in.weight

    def rotate_keys(self, keys: Tensor, times: Tensor) -> Tensor:
        """Return keys ``(B, heads, T * tokens, head_dim)`` of frames, rotated to their times ``(T,)``."""
        cos, sin = (part.flatten(0, 1) for part in self.rotations(times))
        return rotate(keys, cos, sin)

    def forward(
        self,
        frames: Tensor,
        sigma: Tensor,
        actions: Tensor,
        frame_ids: Tensor | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """Predict the velocity of every frame: ``v = eps - x0`` where ``frames = (1 - sigma) x0 + sigma eps``.

        All frames are evaluated in parallel; frame i's output depends on frames ``i - window + 1 .. i`` alone. It is
        the velocity for both values of the option ``prediction``.

        Args:
            frames: noisy frames ``(B, T, C, H, W)``, each at its own level.
            sigma: noise levels ``(B, T)`` in [0, 1]; 0 is clean, 1 pure noise. A scheduler's timestep is 1000 times it.
            actions: ``(B, T)`` integers from 0 to ``num_actions``: the action that PRODUCES each frame.
            frame_ids: ``(T,)`` integers, rising; 0, 1, ... by default. Only their differences count.
            attend: answers the attention of every layer instead of that of the given frames to each other.

        Returns:
            ``(B, T, C, H, W)`` in the dtype of ``frames``.

        Raises:
            DiffAccelError: for frames of another shape, levels or actions that are not one a frame.
        """
        self._check_shapes(frames, sigma, actions)
        dtype = self.proj_in.weight.dtype
        if attend is None:
            ids = mask.frame_ids(frames.shape[1], frames.device) if frame_ids is None else frame_ids
            attend = BandedAttention(ids, self.config.window, self.tokens, self.rotations(ids))
        condition = self._condition(sigma, actions, dtype)
        x = self.proj_in(self.patches(frames.to(dtype))) + self.place_embedding
        rows = condition if self.shared_modulation is None else self.shared_modulation(condition)
        for number, block in enumerate(self.transformer_blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, rows, number, attend)
            else:
                x = block(x, rows, number, attend)
        shift, scale = self.modulation_out(condition).chunk(2, -1)
        out = self.unpatched(self.proj_out(modulate(x, shift, scale)))
        if self.config.prediction == "sample":
            out = (frames - out) / sigma.to(frames.dtype).clamp(min=SMALLEST_SIGMA)[:, :, None, None, None]
        return out.to(frames.dtype)

    def compile_blocks(self, **options: Any) -> None:
        """Compile all layers around their attention, which stays as it is; ``options`` are those of torch.compile."""
        blocks: Any = self.transformer_blocks
        for block in blocks:
            block.compile_around_attention(**options)

    def uncompile_blocks(self) -> None:
        """Undo :meth:`compile_blocks`."""
        blocks: Any = self.transformer_blocks
        for block in blocks:
            block.uncompile()

    def _condition(self, sigma: Tensor, actions: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what modulates each frame, ``(B, T, d)``, after its activation."""
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        half = TIME_CHANNELS // 2
        exponents = torch.arange(half, dtype=precise, device=sigma.device) / half
        angles = 1000 * sigma.to(precise)[..., None] * torch.exp(-math.log(10000.0) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(dtype)
        return nn.functional.silu(self.time_embedding(waves) + self.action_embedding(actions))

    def patches(self, frames: Tensor) -> Tensor:
        """Cut frames ``(B, T, C, H, W)`` into tokens ``(B, T, n, C p p)``, row by row."""
        p = self.config.patch_size
        batch, count, channels = frames.shape[:3]
        cut = frames.reshape(batch, count, channels, self.rows, p, self.columns, p)
        return cut.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, count, self.tokens, channels * p * p)

    def unpatched(self, tokens: Tensor) -> Tensor:
        """Invert :meth:`patches`."""
        p, (channels, height, width) = self.config.patch_size, self.frame_shape
        batch, count = tokens.shape[:2]
        cut = tokens.reshape(batch, count, self.rows, self.columns, channels, p, p)
        return cut.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, count, channels, height, width)

    def rotations(self, frame_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine ``(T, n, head_dim / 2)`` for frames of these ids, negative ones too."""
        dtype = torch.float64 if self.proj_in.weight.dtype == torch.float64 else torch.float32
        dim, theta = self.config.attention_head_dim, self.config.rope_theta
        space = space_angles(self.rows, self.columns, dim, theta, dtype, frame_ids.device)
        return rotation(time_angles(frame_ids, dim, theta, dtype), space)

    def _check_shapes(self, frames: Tensor, sigma: Tensor, actions: Tensor) -> None:
        if frames.ndim != 5 or tuple(frames.shape[2:]) != self.frame_shape:
            raise DiffAccelError(
                f"frames have the shape {tuple(frames.shape)}; the model takes (batch, frames, "
                f"{', '.join(map(str, self.frame_shape))})."
            )
        for name, rows in (("sigma", sigma), ("actions", actions)):
            if rows.shape != frames.shape[:2]:
                raise DiffAccelError(
                    f"{name} has the shape {tuple(rows.shape)}; it must have one value a frame: "
                    f"{tuple(frames.shape[:2])}."
                )
        if actions.is_floating_point() or actions.dtype == torch.bool:
            raise DiffAccelError(f"actions are {actions.dtype}; they must be integers, such as torch.int64.")


def _check_sizes(config: Any) -> None:
    """Raise for sizes that are no whole numbers from 1 on, and for factors that are no positive numbers."""
    for name in (
        "in_channels", "height", "width", "patch_size", "num_layers", "num_attention_heads", "attention_head_dim",
        "num_actions", "window",
    ):  # fmt: skip
        size = config[name]
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise DiffAccelError(f"{name} is {size!r}; it must be a whole number, 1 or more.")
    for name in ("mlp_ratio", "rope_theta"):
        factor = config[name]
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
            raise DiffAccelError(f"{name} is {factor!r}; it must be a positive number.")


def _check_config(
    height: int, width: int, patch_size: int, head_dim: int, window: int, modulation: Any, prediction: Any
) -> None:
    """Raise for options that do not fit together."""
    if height % patch_size or width % patch_size:
        raise DiffAccelError(
            f"patch_size is {patch_size}; it must divide the frame size {size_text(height, width)} without rest."
        )
    if head_dim % 8:
        raise DiffAccelError(f"attention_head_dim is {head_dim}; it must be a multiple of 8.")
    if window < 2:
        raise DiffAccelError(f"window is {window}; it must be 2 (the queried frame and one before it) or more.")
    if modulation not in ("block", "shared"):
        raise DiffAccelError(f"modulation is {modulation!r}; it must be 'block' or 'shared'.")
    if prediction not in ("velocity", "sample"):
        raise DiffAccelError(f"prediction is {prediction!r}; it must be 'velocity' or 'sample'.")
