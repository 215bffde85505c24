"""How the frames of a chunk-causal network lie in tokens, whole and compressed, and how their keys are rotated.

Keys of a token at ``(frame, row, column)`` are complex numbers, each rotated by an angle linear in one of the three
(arXiv 2104.09864). The rotations are those of the network's own ``rope``; here a frame's time may be any number.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor

from diffaccel.errors import DiffAccelError, size_text
from diffaccel.models.next_frame.cache import REBASE

NETWORK = "AnyFlowFARTransformer3DModel"


def check_network(model: Any, whose: str) -> None:
    """Raise unless ``model`` is a network of the class that chunks can be drawn with.

    Args:
        whose: name of what needs it, for the message.
    """
    if not any(cls.__name__ == NETWORK for cls in type(model).__mro__):
        raise DiffAccelError(f"{whose} needs diffusers' {NETWORK}, and got a {type(model).__name__}. Pass such a one.")
    config = model.config
    patch, compressed = tuple(config.patch_size), tuple(config.compressed_patch_size)
    if patch[0] != 1 or compressed[0] != 1:
        raise DiffAccelError(
            f"{whose} needs patches of one latent frame, and the network's are {patch} and {compressed}. Use the stock "
            "call."
        )
    if config.full_chunk_limit < 2:
        raise DiffAccelError(
            f"{whose} needs a network that looks back at whole chunks, and its full_chunk_limit is "
            f"{config.full_chunk_limit}; it must be 2 or more."
        )


class ChunkGrid:
    """Tokens of the latent frames of one size; a :class:`RingNetwork` of compressed ones.

    Args:
        model: the network.
        height: of a latent frame.
        width: of a latent frame.

    Attributes:
        tokens: number of tokens of a compressed frame.
        whole_tokens: number of tokens of a frame at full resolution.

    Raises:
        DiffAccelError: for frames that are no whole number of patches, or smaller than one compressed one.
    """

    def __init__(self, model: Any, height: int, width: int) -> None:
        config = model.config
        self.model = model
        (_, p, q), (_, far_p, far_q) = config.patch_size, config.compressed_patch_size
        for name, value in (("height", height), ("width", width)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise DiffAccelError(f"{name} is {value!r}; it must be a whole number, of latent frames.")
        if height % p or width % q or height < far_p or width < far_q:
            raise DiffAccelError(
                f"Latent frames are {size_text(height, width)}; they must be a multiple of the patch "
                f"{size_text(p, q)} and at least {size_text(far_p, far_q)}. Choose another height and width."
            )
        longest = config.rope_max_seq_len
        if max(height // p, width // q) > longest:
            raise DiffAccelError(
                f"Latent frames are {size_text(height, width)}; the network has positions of {longest} patches a side, "
                f"so {size_text(longest * p, longest * q)} at most."
            )
        self.rows, self.columns = height // p, width // q
        self.whole_tokens = self.rows * self.columns
        self.far_rows, self.far_columns = height // far_p, width // far_q
        self.tokens = self.far_rows * self.far_columns
        self._prepare_rotations()

    @property
    def key_sizes(self) -> tuple[int, int, int]:
        """Numbers of layers and heads, and the channels of a head."""
        config = self.model.config
        return config.num_layers, config.num_attention_heads, config.attention_head_dim

    @property
    def key_weight(self) -> Tensor:
        """A weight that has the dtype and device of keys."""
        weight: Tensor = self.model.patch_embedding.weight
        return weight

    def _prepare_rotations(self) -> None:
        """Read the rotations of a frame's places off the network, and make those of times."""
        cfg = {
            "total_frames": 2, "num_compressed_frames": 1, "full_frame_shape": (self.rows, self.columns),
            "compressed_frame_shape": (self.far_rows, self.far_columns),
        }  # fmt: skip
        device, dim = self.key_weight.device, self.model.config.attention_head_dim
        turns = self.model.rope(far_cfg=cfg, device=device)["query"][0, 0]  # compressed frame 0, whole frame 1
        pairs = dim // 2 - 2 * (dim // 6)
        self._places = {True: turns[: self.tokens, pairs:], False: turns[self.tokens :, pairs:]}
        times = torch.arange(-REBASE, 3 * REBASE, dtype=torch.int64, device="cpu")
        table = get_1d_rotary_pos_embed(
            2 * pairs, times, self.model.rope.theta, use_real=False, freqs_dtype=torch.float64
        )
        length = torch.sqrt(table.real**2 + table.imag**2)  # compressed frames' are made unit numbers by the network
        far = torch.complex(table.real / length, table.imag / length)
        self._times = {kind: part.to(device, turns.dtype) for kind, part in ((True, far), (False, table))}

    def rotate(self, vectors: Tensor, times: Tensor, compressed: bool) -> Tensor:
        """Rotate queries or keys ``(B, heads, T * n, head_dim)`` of whole or compressed frames at times ``(T,)``."""
        time = self._times[compressed].index_select(0, times + REBASE)
        place = self._places[compressed]
        frames, tokens = len(time), len(place)
        turns = torch.cat([time[:, None].expand(-1, tokens, -1), place[None].expand(frames, -1, -1)], -1).flatten(0, 1)
        numbers = torch.view_as_complex(vectors.to(turns.real.dtype).unflatten(-1, (-1, 2)))
        return torch.view_as_real(numbers * turns).flatten(-2).type_as(vectors)

    def rotate_keys(self, keys: Tensor, times: Tensor) -> Tensor:
        """Return keys ``(B, heads, T * tokens, head_dim)`` of compressed frames, rotated to their times ``(T,)``."""
        return self.rotate(keys, times, True)
