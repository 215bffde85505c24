"""What trains computes in one context: cuDNN's attention, Hopper's first choice, has wrong gradients in autocast."""

from __future__ import annotations

import ast

import pytest

from tests.layout import tree

PLACE = "diffaccel/training/steps.py"


def strays(module: ast.Module) -> list[int]:
    """Lines that switch autocast on, or differentiate a loss, by themselves."""
    found = []
    for node in tree.nodes(module):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            on = not any(k.arg == "enabled" and getattr(k.value, "value", True) is False for k in node.keywords)
            casts = name == "autocast" and on and ast.unparse(node.func).startswith(("torch.", "autocast"))
            differentiates = name == "backward" and ast.unparse(node.func) not in (
                "backward",
                "torch.autograd.backward",
            )
            if casts or differentiates:
                found.append(node.lineno)
    return sorted(found)


def test_training_computes_in_one_context():
    """``computing`` and ``backward`` of diffaccel.training.steps are what all of it goes through."""
    files = [*tree.modules().values(), *(tree.ROOT / "scripts").rglob("*.py")]
    found = {str(file.relative_to(tree.ROOT)): lines for file in files if (lines := strays(tree.parse(file)))}
    assert set(found) == {PLACE}


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("with torch.autocast(kind, dtype, enabled=dtype != torch.float32): f()", [1]),
        ("f()\nwith autocast('cuda'): loss.backward()", [2, 2]),
        ("with torch.amp.autocast('cuda', enabled=True): f()", [1]),
        ("with torch.autocast(kind, enabled=False): f()\nwith run.autocast(): backward(loss)", []),
        ("(a + b).backward()", [1]),
    ],
)
def test_strays_are_seen(text, lines):
    assert strays(ast.parse(text)) == lines
