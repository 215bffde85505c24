"""Packing: exact where it says so, half a quantisation step elsewhere, stable, and loud about damage."""

import json
import math
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffaccel.errors import DiffAccelError
from diffaccel.zoo import packing


def _bytes(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def packed(flux_folder, tmp_path_factory):
    return packing.pack(flux_folder, tmp_path_factory.mktemp("packed") / "tiny", shard_bytes=2**17)


def test_row_error_is_at_most_half_a_step():
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    codes, scale = packing.quantize_rows(weight)
    assert codes.dtype is torch.int8 and codes.shape == weight.shape and scale.shape == (5,)
    error = (packing.dequantize_rows(codes, scale) - weight).abs().flatten(1).amax(1)
    assert (error <= 0.5 * scale * (1 + 1e-5)).all()
    assert scale[2] == 0 and not codes[2].any()


@pytest.mark.parametrize("seed", range(5))
def test_packing_a_decoded_bf16_matrix_finds_the_same_codes_and_scales(seed):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(seed)).bfloat16()
    codes, scale = packing.quantize_rows(weight)
    again = packing.quantize_rows(packing.dequantize_rows(codes, scale).bfloat16())
    assert torch.equal(codes, again[0]) and torch.equal(scale, again[1])


def test_packing_is_deterministic_and_stable(packed, flux_folder, tmp_path):
    assert _bytes(packing.pack(flux_folder, tmp_path / "second", shard_bytes=2**17)) == _bytes(packed)
    plain = packing.unpack(packed, tmp_path / "plain")
    assert _bytes(packing.unpack(packed, tmp_path / "plain2")) == _bytes(plain)
    assert _bytes(packing.pack(plain, tmp_path / "third", shard_bytes=2**17)) == _bytes(packed)


def test_small_files_vectors_and_dtypes_come_back_exactly(packed, flux_folder, tmp_path):
    plain = packing.unpack(packed, tmp_path / "plain")
    before, after = _bytes(flux_folder), _bytes(plain)
    assert before.keys() == after.keys()
    for name in before:
        if not name.endswith(".safetensors"):
            assert before[name] == after[name]
            continue
        old, new = load_file(flux_folder / name), load_file(plain / name)
        assert old.keys() == new.keys()
        for key, tensor in old.items():
            assert new[key].dtype is tensor.dtype and new[key].shape == tensor.shape
            if tensor.dim() < 2:
                assert torch.equal(new[key], tensor)
            else:
                step = tensor.float().flatten(1).abs().amax(1) / 127
                error = (new[key].float() - tensor.float()).flatten(1).abs().amax(1)
                assert (error <= step).all()  # half a step of int8, and a bf16 rounding below half a step


def test_kept_files_are_bit_equal(flux_folder, tmp_path):
    packed = packing.pack(flux_folder, tmp_path / "packed", keep=["vae/*"])
    name = "vae/diffusion_pytorch_model.safetensors"
    old, new = load_file(flux_folder / name), load_file(packing.unpack(packed, tmp_path / "plain") / name)
    assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.slow
def test_stock_pipeline_loads_the_unpacked_folder_and_draws_the_same_picture(packed, flux_folder, tmp_path):
    from diffusers import FluxPipeline

    def draw(folder):
        pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            "a red cat",
            height=32,
            width=32,
            num_inference_steps=3,
            max_sequence_length=32,
            output_type="np",
            generator=torch.Generator().manual_seed(1),
        ).images

    plain = packing.unpack(packed, tmp_path / "plain")
    saved = FluxPipeline.from_pretrained(plain, dtype=torch.bfloat16)
    saved.save_pretrained(tmp_path / "again")
    assert np.array_equal(draw(plain), draw(tmp_path / "again"))  # the folder is the whole model
    assert -10 * math.log10(np.mean((draw(plain) - draw(flux_folder)) ** 2)) > 40


def test_shards_stay_below_their_limit(packed):
    names = sorted(p.name for p in packed.glob("weights-*"))
    assert len(names) > 1 and names[-1].endswith(f"of-{len(names):05d}.zip")
    assert all((packed / name).stat().st_size <= 2**17 for name in names)


def test_a_tensor_larger_than_a_shard_is_refused(tmp_path):
    (tmp_path / "plain").mkdir()
    save_file({"weight": torch.zeros(2048, 1024)}, tmp_path / "plain" / "model.safetensors")
    with pytest.raises(DiffAccelError, match="raise shard_bytes"):
        packing.pack(tmp_path / "plain", tmp_path / "packed", shard_bytes=2**19)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    (tmp_path / "plain").mkdir()
    save_file({"weight": torch.full((2, 2), math.nan)}, tmp_path / "plain" / "model.safetensors")
    with pytest.raises(DiffAccelError, match=r"'weight'.*not finite"):
        packing.pack(tmp_path / "plain", tmp_path / "packed")


@pytest.fixture
def copy(packed, tmp_path):
    import shutil

    return shutil.copytree(packed, tmp_path / "copy")


def test_truncated_and_altered_shards_are_named(copy, tmp_path):
    shard = next(copy.glob("weights-00001-*"))
    data = bytearray(shard.read_bytes())
    shard.write_bytes(data[:-1])
    with pytest.raises(DiffAccelError, match=rf"{shard.name}.* has {len(data) - 1} bytes, expected {len(data)}"):
        packing.unpack(copy, tmp_path / "out")
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DiffAccelError, match=rf"{shard.name}.*sha256"):
        packing.unpack(copy, tmp_path / "out")
    shard.unlink()
    with pytest.raises(DiffAccelError, match=rf"{shard.name}.*missing"):
        packing.unpack(copy, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ("[]", "not a diffaccel-packed manifest"), ('{"format": "x"}', "not a diffaccel-packed")],
)
def test_damaged_manifests(copy, text, message):
    (copy / packing.MANIFEST).write_text(text)
    with pytest.raises(DiffAccelError, match=message):
        packing.read_manifest(copy)


def test_later_format_version_and_no_manifest(copy, tmp_path):
    manifest = json.loads((copy / packing.MANIFEST).read_text()) | {"version": 99}
    (copy / packing.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DiffAccelError, match="format version 99; this diffaccel reads version 1"):
        packing.unpack(copy, tmp_path / "out")
    with pytest.raises(DiffAccelError, match="not a packed model"):
        packing.read_manifest(tmp_path)
    with pytest.raises(DiffAccelError, match="nothing to pack"):
        packing.pack(tmp_path / "none", tmp_path / "out")


def test_names_outside_the_folder_are_refused(copy, tmp_path):
    with zipfile.ZipFile(copy / packing.FILES, "w") as archive:
        archive.writestr("../evil.txt", "x")
    manifest = json.loads((copy / packing.MANIFEST).read_text())
    manifest["files"] = ["../evil.txt"]
    manifest["packed"][packing.FILES] = packing.fingerprints(copy, [packing.FILES])[packing.FILES]
    (copy / packing.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DiffAccelError, match="outside its folder"):
        packing.unpack(copy, tmp_path / "out" / "deep")
    assert not (tmp_path / "out" / "evil.txt").exists()


def _base_and_changed(tmp_path, rank=2):
    """Make two plain folders that differ by a matrix of low rank, a vector, and in one file more."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    base = {"a": normal(32, 48), "b": normal(24, 8, 3, 3), "c": normal(16), "d": normal(20, 20)}
    other = dict(base, c=base["c"] + 1)
    other["a"] = base["a"] + normal(32, rank) @ normal(rank, 48)
    other["b"] = base["b"] + 0.5 * (normal(24, rank) @ normal(rank, 72)).view(24, 8, 3, 3)
    for name, tensors in (("base", base), ("other", other)):
        (tmp_path / name).mkdir()
        save_file({k: v.bfloat16() for k, v in tensors.items()}, tmp_path / name / "model.safetensors")
    packing.pack(tmp_path / "base", tmp_path / "zoo" / "base")
    packing.unpack(tmp_path / "zoo" / "base", tmp_path / "plain")
    known = load_file(tmp_path / "plain" / "model.safetensors")
    changed = {k: (known[k].float() + other[k].float() - base[k].float()).bfloat16() for k in known}
    save_file(dict(changed, d=known["d"]), tmp_path / "other" / "model.safetensors")
    return known, dict(changed, d=known["d"])


def test_changes_of_low_rank_stand_beside_their_base(tmp_path):
    known, changed = _base_and_changed(tmp_path)
    packed = packing.pack(
        tmp_path / "other", tmp_path / "zoo" / "other", base=tmp_path / "zoo" / "base", change_bytes=800
    )
    entry = packing.read_manifest(packed)["weights"]["model.safetensors"]
    assert sorted(entry["changed"]) == ["a", "b"] and entry["shared"] == ["d"]
    packing.unpack(packed, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    for name in ("a", "b"):
        error = (again[name].float() - changed[name].float()).norm() / (changed[name] - known[name]).float().norm()
        assert error < 0.03 and again[name].dtype == torch.bfloat16
    assert torch.equal(again["d"], known["d"]) and torch.equal(again["c"], changed["c"])


def test_bytes_of_changes_go_where_they_change_the_most(tmp_path):
    from diffaccel.zoo import low_rank

    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(40, 6, generator=generator), torch.randn(6, 30, generator=generator)
    changes = {"large": 10 * up @ down, "small": 0.1 * up @ down, "none": torch.zeros(9, 9)}
    made = low_rank.factors(changes, 6 * (40 + 30 + 4) + 4 * 40)
    assert set(made) == {"large"} and made["large"][0].shape == (40, 6)
    torch.testing.assert_close(made["large"][0] @ made["large"][1], changes["large"], rtol=1e-4, atol=1e-3)
    assert low_rank.factors(changes, 100) == {}
    with pytest.raises(DiffAccelError, match="not finite"):
        low_rank.factors({"x": torch.full((2, 2), float("nan"))}, 100)


def test_changes_need_a_base(tmp_path):
    _base_and_changed(tmp_path)
    with pytest.raises(DiffAccelError, match="no base to change"):
        packing.pack(tmp_path / "other", tmp_path / "x", change_bytes=10)
