"""Protocols are frozen, and every part of them exists."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import pytest

from diffaccel.errors import DiffAccelError
from diffaccel.eval.networks import protocols
from diffaccel.eval.networks.extractors import clip, inception
from diffaccel.eval.networks.extractors import timm as vision

KNOWN = {
    "inception": tuple(inception.PREPROCESSING),
    "dinov2": (vision.PIL, vision.TORCH),
    "clip": (clip.OWN, clip.STRETCHED),
}


@pytest.mark.parametrize("name", sorted(protocols.PROTOCOLS))
def test_every_part_exists(name):
    protocol = protocols.protocol(name)
    assert protocol.name == name and protocol.preprocessing in KNOWN[protocol.network]
    for metric in protocol.metrics:
        module, _, function = metric.function.rpartition(".")
        taken = inspect.signature(getattr(importlib.import_module(module), function)).parameters
        assert set(metric.parameters) <= set(taken)
        assert protocol.network != "inception" or metric.tap in inception.TAPS
        with pytest.raises(TypeError):
            metric.parameters["k"] = 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        protocol.samples = 10


def test_what_is_published():
    found = {name: protocols.protocol(name) for name in protocols.PROTOCOLS}
    names = {"tf-fid", "pytorch-fid", "clean-fid", "adm", "edm", "dgm-dinov2", "edm2-dinov2", "cmmd"}
    assert set(found) == names and protocols.DEFAULT in names
    assert found["tf-fid"].preprocessing == found["adm"].preprocessing == found["edm"].preprocessing
    assert len({found[name].preprocessing for name in names}) == 6
    assert [metric.name for metric in found["adm"].metrics] == ["FID", "sFID", "IS", "precision, recall"]
    assert found["adm"].metrics[3].reference == 10_000 and found["adm"].metrics[3].parameters == {"k": 3}
    scores = {name: dict(found[name].metrics[i].parameters) for name, i in (("tf-fid", 3), ("adm", 2))}
    assert scores == {"tf-fid": {"splits": 10, "shuffle_seed": 2020}, "adm": {"size": 5000, "shuffle_seed": None}}
    assert found["cmmd"].metrics[0].parameters == {"sigma": 10.0, "scale": 1000.0}


def test_the_nearest_is_named():
    with pytest.raises(DiffAccelError, match=r"Unknown protocol 'cleanfid'. Did you mean 'clean-fid'"):
        protocols.protocol("cleanfid")
    with pytest.raises(TypeError):
        protocols.PROTOCOLS["mine"] = protocols.PROTOCOLS["edm"]


def test_a_command_measures_what_the_protocol_has():
    names = {
        (command, name): [metric.name for metric in protocols.metrics(command, protocols.protocol(name))]
        for command, name in (("fid", "adm"), ("kid", "tf-fid"), ("is", "adm"), ("prdc", "adm"), ("cmmd", "cmmd"))
    }
    assert names == {
        ("fid", "adm"): ["FID", "sFID"], ("kid", "tf-fid"): ["KID", "KID (subsets)"], ("is", "adm"): ["IS"],
        ("prdc", "adm"): ["precision, recall"], ("cmmd", "cmmd"): ["CMMD"],
    }  # fmt: skip
    assert all(protocols.metrics(command, None) for command in protocols.COMMANDS)
    with pytest.raises(DiffAccelError, match=r"'edm' has FID, nothing for 'eval kid'. Protocols that have: tf-fid, cl"):
        protocols.metrics("kid", protocols.protocol("edm"))


def test_statistics_of_protocols_with_one_preprocessing_are_the_same_numbers():
    assert protocols.alike("tf-fid", "adm") and protocols.alike("adm", "edm") and protocols.alike("own", "own")
    for one, other in (("tf-fid", "pytorch-fid"), ("tf-fid", "own"), ("dgm-dinov2", "edm2-dinov2")):
        assert not protocols.alike(one, other)
