"""Steps that the blocks of several families share, and what must be as its class has it for them."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from diffaccel.kernels.activate_rows import gelu_codes
from diffaccel.kernels.streams import norm_modulate, norm_modulate_codes
from diffaccel.modules.fused.codes import Coded, codes_of, product
from diffaccel.modules.fused.plain_parts import is_bare_norm, is_idle_dropout, is_plain


def reason_of_feed_forward(feed_forward: Any) -> str | None:
    net: Any = getattr(feed_forward, "net", ())
    is_stock = type(feed_forward) is FeedForward and is_plain(feed_forward) and len(net) == 3
    if is_stock and type(net[0]) is GELU and is_plain(net[0]) and is_idle_dropout(net[1]):
        return None
    return "its feed-forward is not the stock one"


def reason_of_norm(norm: Any, kind: Any) -> str | None:
    if type(norm) is kind and is_plain(norm) and is_plain(norm.silu) and is_bare_norm(norm.norm):
        return None
    return "its norms are not the stock ones"


def normed_streams(
    streams: list[tuple[Tensor, Tensor, Tensor]], epsilon: float, readers: list[list[nn.Module]], folded: bool,
    gated: list[tuple[Tensor, Tensor]] | None = None,
) -> tuple[list[Tensor], list[Tensor | Coded]]:  # fmt: skip
    """Return the sums and the modulated norms of streams: codes, where all layers that read them take codes."""
    kinds = {codes_of(linears) for linears in readers}
    codes = kinds.pop()
    if codes is None or kinds:
        sums, outputs = norm_modulate(streams, epsilon, gated, folded)
        return sums, list(outputs)
    sums, coded = norm_modulate_codes(streams, epsilon, codes, gated)
    return sums, list(coded)


def products_of(linears: list[nn.Module], x: Tensor | Coded, like: Tensor) -> list[Tensor]:
    """Return the product of each linear with the same input, tokens or codes of the tokens ``like``."""
    if isinstance(x, tuple):
        return [product(linear, x, like) for linear in linears]
    return [linear(x) for linear in linears]


def feed_forward_of(feed_forward: Any, x: Tensor | Coded, like: Tensor) -> Tensor:
    """Return the feed-forward layers of tokens; their second one is given codes where it takes them."""
    first, _, second = feed_forward.net
    hidden = products_of([first.proj], x, like)[0]
    codes = codes_of([second])
    if codes is None:
        output: Tensor = second(F.gelu(hidden, approximate=first.approximate))
        return output
    return product(second, gelu_codes(None, hidden, codes, first.approximate), hidden)
