"""A linear layer that is trained with the rounding of its weights and inputs in its forward."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError
from diffaccel.quant.low_bit.form import LowBit
from diffaccel.quant.low_bit.linear import LowBitLinear, stored_tensors
from diffaccel.quant.low_bit.start import INITIAL_CLIP, best_of_rank, search_scales
from diffaccel.quant.low_bit.timesteps import TimeGroups, factors
from diffaccel.quant.qvgen.rounding import round_tokens, round_weight


class FakeQLinear(nn.Linear):
    """``y = (W_q + L diag(g) R) x_q + b``; the side branch sees the rounded activations.

    Attributes:
        weight: the latent weight, fp32 ``(N, K)``.
        weight_scale, weight_zero: fp32 ``(N, 1)``; the zero counts from the least code.
        act_logit: fp32 ``(G, 2)``; clipping factors are its sigmoid.
        side_left, side_right: ``(N, r)`` and ``(r, K)``; None when the rank is 0.
        keep, gate: how many columns of the side branch count fully, and the factor of the others.
        quantizes_weight, quantizes_input: False leaves one of them as it is.
        compute_dtype: of the layer that it stands for.
    """

    side_left: nn.Parameter | None
    side_right: nn.Parameter | None
    time: TimeGroups | None = None

    def __init__(self, linear: nn.Linear, form: LowBit, rank: int, range_gradients: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.form, self.range_gradients, self.compute_dtype = form, range_gradients, linear.weight.dtype
        self.quantizes_weight = self.quantizes_input = True
        self.keep, self.gate = rank, 1.0
        weight = linear.weight.detach().float()
        scale, zero = search_scales(weight, form.weight_bits, form.symmetric)
        self.weight = nn.Parameter(weight.clone())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float().clone())
        self.weight_scale = nn.Parameter(scale)
        self.weight_zero = nn.Parameter(zero, requires_grad=not form.symmetric)
        clip = torch.full((form.act_groups, 2), INITIAL_CLIP, dtype=torch.float32, device=weight.device)
        self.act_logit = nn.Parameter(clip.logit())
        self.set_side(None, None)
        if rank:
            error = weight - round_weight(weight, scale, zero, form.weight_bits)
            self.set_side(*best_of_rank(error, rank))

    @property
    def rank(self) -> int:
        """Rank of the side branch."""
        return 0 if self.side_right is None else len(self.side_right)

    def set_side(self, left: Tensor | None, right: Tensor | None) -> None:
        """Take other matrices as the side branch; None removes it."""
        for name, value in (("side_left", left), ("side_right", right)):
            self.register_parameter(name, None if value is None else nn.Parameter(value.detach().contiguous().clone()))

    def effective_weight(self) -> Tensor:
        """Return ``W_q + L diag(g) R``, fp32 ``(N, K)``."""
        form = self.form
        weight: Tensor = self.weight
        if self.quantizes_weight:
            weight = round_weight(self.weight, self.weight_scale, self.weight_zero, form.weight_bits)
        if self.side_left is None or self.side_right is None:
            return weight
        left: Tensor = self.side_left
        if self.keep < self.rank and self.gate < 1:
            if self.gate == 0:  # to the bit what is left when the columns are cut off
                return weight + left[:, : self.keep] @ self.side_right[: self.keep] if self.keep else weight
            left = torch.cat([left[:, : self.keep], left[:, self.keep :] * self.gate], dim=1)
        return weight + left @ self.side_right

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        x = input
        with torch.autocast(input.device.type, enabled=False):
            weight = self.effective_weight()
            if self.quantizes_input:
                rows = input.reshape(-1, self.in_features)
                clip = factors(torch.sigmoid(self.act_logit), self.time, len(rows))
                form = self.form
                rounded = round_tokens(rows, clip, form.act_bits, form.symmetric, self.range_gradients)
                x = rounded.reshape(input.shape)
        if torch.is_autocast_enabled(input.device.type):
            return F.linear(x, weight, self.bias)
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @torch.no_grad()
    def exported(self, keep_rank: bool = False) -> LowBitLinear:
        """Return the layer with codes.

        Raises:
            DiffAccelError: for a side branch that is not meant to stay, and numbers that are not finite.
        """
        if self.rank and not keep_rank:
            raise DiffAccelError(
                f"A side branch of rank {self.rank} is left. Train to the end, or convert(model, keep_rank=True)."
            )
        form = replace(self.form, rank=self.rank)
        tensors = stored_tensors(self.weight, self.weight_scale, self.weight_zero, form)
        tensors["act_clip"] = torch.sigmoid(self.act_logit.detach().float())
        if self.side_left is not None and self.side_right is not None:
            gates = torch.ones(self.rank, dtype=torch.float32, device=self.weight.device)
            gates[self.keep :] = self.gate
            tensors |= {"side_left": self.side_left * gates, "side_right": self.side_right.detach()}
            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}  # as a file has them
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise DiffAccelError("The trained scales or clipping factors are not finite. Train with a smaller rate.")
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().to(self.compute_dtype), False)
        return LowBitLinear(self.in_features, self.out_features, form, tensors, bias, self.compute_dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.form}, rank={self.rank}"
