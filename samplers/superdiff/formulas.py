"""What a composition aims at: a log-density made of the components' log-densities, and its gradient in them.

Of ``F(L_1 ... L_M)`` the score is ``sum_i kappa_i s_i`` with ``kappa_i = dF/dL_i``, so one number a component says both
how predictions are mixed and which density the mixture follows:

- OR: ``F = log sum_i w_i exp(T L_i) / T``, the mixture for ``T = 1`` (arXiv 2412.17762);
- average: ``F = sum_i w_i L_i`` with ``sum_i w_i = 1``; product: the same with any exponents;
- logic: power norms ``log sum_c exp(a L_c) / a``, ``a = lam`` for OR and ``-lam`` for AND, and NOT relative to a
  reference r, ``L_r + gamma (L_r - L)`` (Dombi operators, Blohm and Garg, ICLR 2026).
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError, shortened

Mixed = tuple[Tensor, Tensor]  # kappa (..., M'), log-density (...)
MixRule = Callable[[Tensor], Mixed]


def mixture(weights: Tensor, temperature: float) -> MixRule:
    """Return OR: ``kappa = softmax(T L + log w)``; weights ``(..., M)``."""
    log_weights = weights.log()

    def target(log_densities: Tensor) -> Mixed:
        logits = temperature * log_densities + log_weights
        return logits.softmax(-1), logits.logsumexp(-1) / temperature

    return target


def geometric(exponents: Tensor) -> MixRule:
    """Return the product of densities to powers ``(..., M)``; an average where these sum to 1."""

    def target(log_densities: Tensor) -> Mixed:
        return exponents.expand_as(log_densities), (exponents * log_densities).sum(-1)

    return target


def guided(target: MixRule, total: float, scale: float, sees_null: bool = False) -> MixRule:
    """Return a target under classifier-free guidance, for log-densities whose last column is of no prompt.

    ``F_w = w F + (1 - w total) L_u``, where ``total = sum_i kappa_i`` (arXiv 2207.12598).

    Args:
        sees_null: whether the target itself is over all columns, as a NOT relative to no prompt is.
    """

    def target_with_null(log_densities: Tensor) -> Mixed:
        kappa, log_density = target(log_densities if sees_null else log_densities[..., :-1])
        rest = 1 - scale * total
        kappa = scale * (kappa if sees_null else torch.cat([kappa, torch.zeros_like(log_densities[..., :1])], -1))
        ends = torch.zeros_like(kappa)
        ends[..., -1] = rest
        return kappa + ends, scale * log_density + rest * log_densities[..., -1]

    return target_with_null


# -- logic -------------------------------------------------------------------------------------------------------------

LONGEST = 1000  # components named in a formula without exclusive or
Tree = int | tuple[Any, ...]  # a component's index, ("and", ...), ("or", ...) or ("not", tree)


def parse(formula: str, count: int | None = None) -> Tree:
    """Parse ``p1 and not p2``, ``p1 ^ p2`` (exclusive or), with parentheses, into a tree over components 0, 1, ...

    Args:
        count: number of components; None where it is not known yet.

    Raises:
        DiffAccelError: for anything else, for a component that is not there, and for a formula that grows too long.
    """
    try:
        return _tree(ast.parse(formula.strip(), mode="eval").body, count)
    except DiffAccelError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DiffAccelError(
            f"The formula {shortened(repr(formula), 200)} cannot be read. Write components {_names(count)} with and, "
            "or, not, ^ and parentheses, as in 'p1 and not p2'."
        ) from error


def _names(count: int | None) -> str:
    return "p1, p2, ..." if count is None else "p1" if count == 1 else f"p1 to p{count}"


def conjunction(count: int) -> Tree:
    """Return the formula ``p1 and p2 and ...``."""
    return ("and", *range(count)) if count > 1 else 0


def _tree(node: ast.AST, count: int | None) -> Tree:
    if isinstance(node, ast.Name) and (match := re.fullmatch(r"p([1-9]\d*)", node.id)):
        if count is not None and int(match[1]) > count:
            raise DiffAccelError(
                f"The formula names {node.id}, and the picture has {count} component{'s' * (count > 1)}, "
                f"{_names(count)}."
            )
        return int(match[1]) - 1
    if isinstance(node, ast.BoolOp):
        return ("and" if isinstance(node.op, ast.And) else "or", *(_tree(value, count) for value in node.values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return negated(_tree(node.operand, count))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitXor):
        left, right = _tree(node.left, count), _tree(node.right, count)
        if 2 * (_length(left) + _length(right)) > LONGEST:
            raise DiffAccelError(
                f"The formula has too many '^': each doubles what stands on its two sides, here beyond {LONGEST} "
                "components. Write one with fewer."
            )
        return ("and", ("or", left, right), ("or", negated(left), negated(right)))
    raise ValueError(ast.dump(node))


def _length(tree: Tree) -> int:
    """Return how often components are named in a formula."""
    return 1 if isinstance(tree, int) else sum(_length(child) for child in tree[1:])


def negated(tree: Tree) -> Tree:
    """Return the negation, moved down to the components by De Morgan's laws."""
    if isinstance(tree, int):
        return ("not", tree)
    if tree[0] == "not":
        return tree[1]
    return ("or" if tree[0] == "and" else "and", *(negated(child) for child in tree[1:]))


def logic(tree: Tree, hardness: float, negation: float, reference: int | None) -> MixRule:
    """Return the target of a formula.

    Args:
        hardness: inverse temperature lam of every and and or; infinity would be a hard minimum and maximum.
        negation: gamma of every not; 0 leaves the reference alone.
        reference: index of the component that a not is relative to; None for the mixture of all.
    """

    def evaluate(node: Tree, log_densities: Tensor) -> Mixed:
        if isinstance(node, int):
            kappa = torch.zeros_like(log_densities)
            kappa[..., node] = 1
            return kappa, log_densities[..., node]
        if node[0] == "not":
            kappa, log_density = evaluate(node[1], log_densities)
            if reference is None:
                of_reference, value = log_densities.softmax(-1), log_densities.logsumexp(-1)
                value = value - math.log(log_densities.shape[-1])
            else:
                of_reference, value = evaluate(reference, log_densities)
            return (1 + negation) * of_reference - negation * kappa, (1 + negation) * value - negation * log_density
        children = [evaluate(child, log_densities) for child in node[1:]]
        sign = hardness if node[0] == "or" else -hardness
        values = torch.stack([log_density for _, log_density in children], -1)
        shares = (sign * values).softmax(-1)
        kappas = torch.stack([kappa for kappa, _ in children], -2)
        return (shares[..., None] * kappas).sum(-2), (sign * values).logsumexp(-1) / sign

    return lambda log_densities: evaluate(tree, log_densities)


def per_region(values: Sequence[float], regions: int, like: Tensor) -> Tensor:
    """Return numbers of every region and component, ``(R, 1, M)``: one row for all regions, or one for each."""
    table = torch.tensor(values, dtype=like.dtype, device=like.device).reshape(-1, 1, len(values) // regions)
    return table if regions > 1 else table.reshape(1, 1, -1)
