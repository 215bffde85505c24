"""Modules that documented code imports by a former name give the objects of the new one."""

from __future__ import annotations

from importlib import import_module

import pytest

FORMER = [
    ("diffaccel.requests", "diffaccel.runs.request", ("Item", "Request")),
    ("diffaccel.sampling", "diffaccel.runs.generate", ("generate_run",)),
    ("diffaccel.record", "diffaccel.files", ("read_mp4",)),
    ("diffaccel.eval.frechet", "diffaccel.eval.metrics.frechet", ("Moments", "between", "distance")),
    ("diffaccel.eval.tiny_network", "diffaccel.eval.networks.tiny_network", ("TinyNetwork", "load_tiny")),
]


@pytest.mark.filterwarnings("ignore:diffaccel.* is now diffaccel:DeprecationWarning")  # as they should say
@pytest.mark.parametrize(("former", "present", "names"), FORMER, ids=[former for former, _, _ in FORMER])
def test_a_former_name_gives_the_same_objects(former, present, names):
    old, new = import_module(former), import_module(present)
    for name in names:
        assert getattr(old, name) is getattr(new, name), f"{former}.{name}"
