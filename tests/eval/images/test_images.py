"""Images in: one conversion to 8 bits, one order, exact pixels or a clear refusal."""

from __future__ import annotations

import io
import os
import shutil
import struct
import warnings
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffaccel.errors import DiffAccelError
from diffaccel.eval.images import decode, png, prefetch
from diffaccel.eval.images.open import open_source
from diffaccel.eval.images.prefetch import ahead
from diffaccel.eval.images.source import Source, to_uint8


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def save(path: Path, image: torch.Tensor, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, **options)


def whole(source: Source, size: int = 4) -> dict[str, torch.Tensor]:
    return {name: image for ids, batch in source.batches(size) for name, image in zip(ids, batch, strict=True)}


# -- one conversion --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_level_survives_the_way_through_floats(dtype):
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8((levels.double() / 255).to(dtype)), levels)
    through = (levels.float() / 255 * 2 - 1).to(torch.float32)
    assert torch.equal(to_uint8(through, low=-1), levels)
    assert torch.equal(to_uint8(through / 2 + 0.5), levels)
    assert int(((through / 2 + 0.5) * 255).byte().ne(levels).sum()) > 0  # what truncation would lose
    assert to_uint8(levels) is levels


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.tensor([-1.0, 1.0]), r"from -1 to 1, but the declared range is 0 to 1. .*low=-1"),
        (torch.tensor([0.0, 255.0]), "from 0 to 255"),
        (torch.tensor([0, 255], dtype=torch.int32), "torch.int32"),
        (torch.tensor([0.5, float("nan"), float("inf")]), "2 values that are not finite, the first at flat index 1"),
    ],
)
def test_a_range_is_declared_not_guessed(images, message):
    with pytest.raises(DiffAccelError, match=message):
        to_uint8(images)


# -- one order -------------------------------------------------------------------------------------------------------


def test_a_folder_a_zip_an_npz_and_a_tensor_hold_the_same(tmp_path):
    images = pixels(5, 3, 6, 8)
    names = ["b/2.png", "b/10.png", "a.tiff", "c.BMP", "00003.png"]
    for name, image in zip(names, images, strict=True):
        save(tmp_path / "folder" / name, image)
    (tmp_path / "folder" / "run.json").write_text("{}")
    (tmp_path / "folder" / ".hidden.png").write_bytes(b"half an image")
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("__MACOSX/a.tiff", b"")
        archive.writestr("dataset.json", "{}")
        for name in reversed(names):
            archive.write(tmp_path / "folder" / name, name)
    expected = {name.rsplit(".", 1)[0]: image for name, image in zip(names, images, strict=True)}
    for source in (open_source(tmp_path / "folder"), open_source(str(tmp_path / "some.zip"))):
        assert source.ids == ("00003", "a", "b/2", "b/10", "c") and dict(source.sizes) == {(6, 8): 5}
        found = whole(source, 2)
        assert list(found) == list(source.ids) and all(torch.equal(found[i], expected[i]) for i in expected)
        assert source.files["c"] == "c.BMP" and [w.rpartition(": ")[2] for w in source.warnings] in ([], ["1 hidden."])
    np.savez(tmp_path / "stored.npz", images.permute(0, 2, 3, 1).numpy())
    np.savez_compressed(tmp_path / "packed.npz", images.permute(0, 2, 3, 1).numpy(), labels=np.arange(5))
    for path in ("stored.npz", "packed.npz"):
        source = open_source(tmp_path / path)
        assert (source.kind, len(source), source.ids[3]) == ("npz", 5, "000003")
        assert torch.equal(torch.stack(list(whole(source, 2).values())), images)
    named = open_source(images.float() / 255, ids=["4", "0", "3", "1", "2"])
    assert named.ids == ("0", "1", "2", "3", "4") and torch.equal(whole(named)["3"], images[2])
    assert open_source(images).digest() == open_source(tmp_path / "stored.npz").digest()
    assert open_source(images).digest() != open_source(images.flip(0)).digest()


def test_the_first_by_id_are_taken(tmp_path):
    for i in range(4):
        save(tmp_path / f"class{i % 2}" / f"{i}.png", pixels(3, 4, 4, seed=i))
    source = open_source(tmp_path, num=2)
    assert source.ids == ("class0/0", "class0/2")
    assert source.warnings == [f"The first 2 images of '{tmp_path}' come from 1 of its 2 folders."]
    assert open_source(pixels(5, 3, 4, 4), num=3).ids == ("000000", "000001", "000002")
    with pytest.raises(DiffAccelError, match=r"5 images were asked for, but .* holds 4"):
        open_source(tmp_path, num=5)


def test_sizes_are_mixed_without_losing_track(tmp_path):
    sizes = [(4, 4), (4, 4), (6, 4), (4, 4), (6, 4), (5, 5)]
    images = {f"{i}": pixels(3, *size, seed=i) for i, size in enumerate(sizes)}
    for name, image in images.items():
        save(tmp_path / f"{name}.png", image)
    source = open_source(tmp_path)
    assert source.sizes == {(4, 4): 3, (6, 4): 2, (5, 5): 1} and "3 sizes: 3 of 4x4, 2 of 4x6" in source.warnings[0]
    batches = list(source.batches(2))
    assert all(len(ids) == len(batch) <= 2 for ids, batch in batches)
    found = whole(source, 2)
    assert set(found) == set(images) and all(torch.equal(found[i], images[i]) for i in images)
    assert [ids for ids, _ in source.batches(2, positions=[4, 1])] == [("4",), ("1",)]


def test_preparation_happens_image_by_image_in_order():
    images = pixels(7, 3, 4, 4)
    batches = list(open_source(images).batches(3, prepare=lambda image: image[:, :2].float()))
    assert [len(ids) for ids, _ in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([batch for _, batch in batches]), images[:, :, :2].float())


def test_reading_ahead_is_bounded_and_raises_in_place():
    seen = []
    results = ahead(lambda i: seen.append(i) or i, range(1000), workers=1)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    results.close()
    assert len(seen) < 50
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda i: 1 // i, [2, 1, 0, 3]))


# -- exact pixels or a refusal ---------------------------------------------------------------------------------------


def test_what_has_one_rgb_form_is_converted(tmp_path):
    grey = pixels(1, 5, 5)[0].numpy()
    colour = pixels(3, 5, 5).permute(1, 2, 0).numpy()
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey > 99).save(tmp_path / "two.png")
    Image.fromarray(np.dstack([grey, np.full_like(grey, 255)]), "LA").save(tmp_path / "grey_alpha.png")
    Image.fromarray(np.dstack([colour, np.full_like(grey, 255)]), "RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(grey // 32).convert("P").save(tmp_path / "palette.gif")
    found = whole(open_source(tmp_path))
    rows = torch.from_numpy(grey).expand(3, 5, 5)
    assert torch.equal(found["grey"], rows) and torch.equal(found["grey_alpha"], rows)
    assert torch.equal(found["two"], (rows > 99).to(torch.uint8) * 255)
    assert torch.equal(found["alpha"], torch.from_numpy(colour).permute(2, 0, 1))
    assert torch.equal(found["palette"], rows // 32)


def raw_png(width: int, height: int, streams: list[bytes], bits: int = 8, colour: int = 2, passes: int = 0) -> bytes:
    """A PNG of the given pixel chunks, all of whose checksums are right."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, passes))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(b"IDAT", data) for data in streams) + chunk(b"IEND", b"")


def png16(width: int, height: int) -> bytes:
    """A PNG of 16-bit colour, which Pillow opens as RGB and cuts to 8 bits without a word."""
    return raw_png(width, height, [zlib.compress((b"\0" + b"\1\2" * 3 * width) * height)], bits=16)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


SQUARE = Image.new("RGB", (8, 8), (10, 200, 30))
TRANSPARENT = encoded(Image.new("RGBA", (8, 8), (1, 2, 3, 128)), "PNG")
NOISE = Image.fromarray(pixels(64, 64, 3).numpy())


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("alpha.png", TRANSPARENT, r"see-through in places \(alpha down to 128\)"),
        ("key.png", encoded(SQUARE, "PNG", transparency=(10, 200, 30)), "see-through"),
        ("deep.png", png16(4, 4), "more than 8 bits a channel"),
        (
            "deep_grey.png",
            encoded(Image.fromarray(np.full((4, 4), 300, np.uint16)), "PNG"),
            "more than 8 bits a channel",
        ),
        ("float.tiff", encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "more than 8 bits a channel"),
        ("print.jpg", encoded(SQUARE.convert("CMYK"), "JPEG"), "colour model CMYK"),
        ("moves.gif", encoded(SQUARE, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8))]), "has 2 frames"),
        ("cut.png", encoded(NOISE, "PNG")[:3000], "cut off"),
        ("cut.jpg", encoded(NOISE, "JPEG")[:1500], "cut off"),
        ("text.png", b"not an image", "is not an image"),
    ],
)
def test_what_has_none_is_refused_by_name(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DiffAccelError, match=rf"'{name}'.*{message}|{message}.*'{name}'"):
        whole(open_source(tmp_path))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("extra", [{}, {"dpi": (72, 72)}, {"text": 3}, {"text": 3000}, {"icc": True}])
def test_the_short_way_through_a_png_header_says_what_pillow_says(monkeypatch, mode, extra):
    info = PngInfo()
    info.add_text("prompt", "a" * extra.get("text", 0))
    options = {"pnginfo": info, "icc_profile": b"x" * 300} if "icc" in extra else {**extra, "pnginfo": info}
    options.pop("text", None)
    data = encoded(NOISE.resize((31, 17)).convert(mode), "PNG", **options)
    assert (decode._plain_png_header(data[: decode._PNG_START]) is None) == (extra.get("text") == 3000)
    short, pixels_of = decode.read_header(io.BytesIO(data), "x"), decode.decode(data, "x")
    assert short.simple == (mode == "RGB" and extra.get("text") != 3000)
    monkeypatch.setattr(decode, "_plain_png_header", lambda start: None)
    by_pillow = decode.read_header(io.BytesIO(data), "x")
    assert replace(short, simple=False) == by_pillow == decode.Header((17, 31), lossy=False)
    assert torch.equal(pixels_of, decode.decode(data, "x"))


def test_a_simple_png_is_decoded_by_torch_without_a_warning(monkeypatch):
    data = encoded(NOISE, "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_torch = decode._decode_with_torch(data)
    assert torch.equal(by_torch, torch.from_numpy(np.array(NOISE)).permute(2, 0, 1))
    assert torch.equal(by_torch, decode.decode(data, "x"))
    monkeypatch.setattr(torch.ops, "image", SimpleNamespace())  # a torchvision without its image extension
    with pytest.raises(ImportError):
        decode._decode_with_torch(data)
    assert torch.equal(by_torch, decode.decode(data, "x"))


@pytest.mark.parametrize("kind", ["see-through", "interlaced"])
def test_torch_reads_no_png_that_needs_a_choice_or_comes_in_passes(kind):
    """Pillow writes no passes, so the header alone is changed."""
    data = encoded(NOISE, "PNG", transparency=NOISE.getpixel((0, 0)))
    if kind == "interlaced":
        header = data[12:28] + b"\x01"
        data = encoded(NOISE, "PNG")
        data = data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]
    found = decode._plain_png_header(data[: decode._PNG_START])
    assert found is not None and not found.simple


@pytest.mark.parametrize("text", [None, "a" * 500])
def test_a_png_that_is_damaged_anywhere_stays_with_pillow(monkeypatch, text):
    info = PngInfo()
    if text:
        info.add_text("prompt", text)
    data = encoded(NOISE, "PNG", pnginfo=info)
    assert decode._checksums_hold(data)
    harmed = [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(8, len(data), 37)]
    for one in [*harmed, data[:-1], data[:-12], data[: len(data) // 2], data[:8], data[: len(data) // 2] + data[-12:]]:
        assert not decode._checksums_hold(one)
    monkeypatch.setattr(decode, "_decode_with_torch", lambda data: pytest.fail("it may crash"))
    with pytest.raises(DiffAccelError, match="'x' cannot be read"):
        decode.decode(data[: len(data) // 2], "x")
    assert decode.decode(data[:-12], "x").shape == (3, *NOISE.size[::-1])  # all pixels are there


ROWS = b"".join(b"\0" + bytes(range(row, row + 48)) for row in range(16))  # 16x16 in RGB, or 48x16 in grey
STREAM = zlib.compress(ROWS)


@pytest.mark.parametrize(("width", "colour"), [(16, 2), (48, 0)])
@pytest.mark.parametrize(
    ("streams", "reason"),
    [
        ([zlib.compress(ROWS[:-49])], "end after 735 of 784 bytes"),
        ([zlib.compress(b"")], "end after 0 of 784"),
        ([b""], "end after 0 of 784"),
        ([], "no pixel data"),
        ([b"garbage" * 20], "damaged"),
        ([STREAM[:-1] + bytes([STREAM[-1] ^ 1])], "damaged"),
        ([STREAM[: len(STREAM) // 2]], "end after"),
        ([STREAM[:-4]], "end after 784"),
        ([zlib.compress(ROWS[:49] + b"\5" + ROWS[50:])], "filter 5"),
    ],
)
def test_unsound_pixel_data_behind_sound_checksums_are_refused(monkeypatch, width, colour, streams, reason):
    data = raw_png(width, 16, streams, colour=colour)
    assert decode._checksums_hold(data)
    monkeypatch.setattr(decode, "_decode_with_torch", lambda data: pytest.fail("it may crash"))
    with pytest.raises(DiffAccelError, match=rf"'x' cannot be read \(.*{reason}"):
        decode.decode(data, "x")


@pytest.mark.parametrize("streams", [[STREAM], [STREAM[:9], b"", STREAM[9:]], [STREAM + b"more"]])
def test_sound_pixel_data_in_any_number_of_chunks_are_decoded(streams):
    rows = np.frombuffer(ROWS, np.uint8).reshape(16, 49)[:, 1:]
    colour, grey = (decode.decode(raw_png(48 // n, 16, streams, colour=c), "x") for n, c in ((3, 2), (1, 0)))
    assert np.array_equal(colour.permute(1, 2, 0).numpy(), rows.reshape(16, 16, 3))
    assert np.array_equal(grey.numpy(), np.stack([rows] * 3))


@pytest.mark.parametrize(("bits", "width", "height"), [(1, 13, 7), (2, 5, 1), (4, 1, 9), (8, 3, 3)])
def test_rows_of_passes_and_of_packed_pixels_are_counted(bits, width, height):
    """Of the seven passes of Adam7, narrow pictures lack some."""
    corners = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    sizes = [(len(range(x, width, dx)), len(range(y, height, dy))) for x, y, dx, dy in corners]
    raw = b"".join((b"\0" + b"\0" * ((w * bits + 7) // 8)) * h for w, h in sizes if w)
    sound = raw_png(width, height, [zlib.compress(raw)], bits, colour=0, passes=1)
    assert not decode.decode(sound, "x").any()
    with pytest.raises(DiffAccelError, match=f"end after {len(raw) - 1} of {len(raw)}"):
        decode.decode(raw_png(width, height, [zlib.compress(raw[:-1])], bits, colour=0, passes=1), "x")


def test_threads_read_what_lets_them_run_and_processes_the_rest(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(prefetch, "_process_count", lambda *arguments: asked.append(1) or 0)
    for i in range(3):
        save(tmp_path / f"{i}.png", pixels(3, 8, 8, seed=i))
    assert open_source(tmp_path).threads
    assert len(whole(open_source(tmp_path))) == 3 and not asked
    save(tmp_path / "3.jpg", pixels(3, 8, 8))
    assert not open_source(tmp_path).threads
    assert len(whole(open_source(tmp_path))) == 4 and asked == [1]
    assert list(open_source(tmp_path, num=3).batches(2, prepare=lambda image: image)) and asked == [1, 1]


def test_pillow_looks_at_every_png_that_is_not_plain():
    animated = encoded(NOISE, "PNG", save_all=True, append_images=[SQUARE.resize(NOISE.size)])
    broken = bytearray(encoded(NOISE, "PNG"))
    broken[17] ^= 1  # of its width
    for data in (animated, bytes(broken), png16(4, 4), encoded(NOISE, "PNG")[:30], b""):
        assert decode._plain_png_header(data[: decode._PNG_START]) is None
        with pytest.raises(DiffAccelError):
            decode.read_header(io.BytesIO(data), "x")


def test_loss_is_told(tmp_path):
    noise = pixels(3, 16, 16)
    for i, name in enumerate(("a.jpg", "b.jpeg", "c.webp")):
        save(tmp_path / name, noise, quality=70 + i)
    save(tmp_path / "d.webp", noise, lossless=True)
    Image.fromarray(noise.permute(1, 2, 0).numpy()).save(tmp_path / "e.png", "JPEG")  # what it is counts, not its name
    source = open_source(tmp_path)
    assert source.warnings[0].startswith("4 of 5 images in")
    assert torch.equal(whole(source)["d"], noise)


def test_other_errors_say_what_was_found(tmp_path):
    with pytest.raises(DiffAccelError, match=r"holds no images. Known files: .png"):
        open_source(tmp_path)
    with pytest.raises(DiffAccelError, match="There is no"):
        open_source(tmp_path / "nowhere")
    save(tmp_path / "folder" / "a.png", pixels(3, 4, 4))
    save(tmp_path / "folder" / "a.bmp", pixels(3, 4, 4))
    with pytest.raises(DiffAccelError, match=r"id 'a'. Ids must be unique"):
        open_source(tmp_path / "folder")
    with pytest.raises(DiffAccelError, match="neither a folder nor a zip nor an npz"):
        open_source(tmp_path / "folder" / "a.png")
    np.savez(tmp_path / "other.npz", means=np.zeros(3), sigma=np.zeros((3, 3)))
    with pytest.raises(DiffAccelError, match="its keys are means, sigma"):
        open_source(tmp_path / "other.npz")
    np.savez(tmp_path / "float.npz", np.zeros((2, 4, 4, 3)))
    with pytest.raises(DiffAccelError, match=r"must be uint8 of shape \(N, H, W, 3\); got float64"):
        open_source(tmp_path / "float.npz")
    np.savez(tmp_path / "pickled.npz", arr_0=np.array([{}], dtype=object))
    with pytest.raises(DiffAccelError, match="cannot be read as an npz"):
        open_source(tmp_path / "pickled.npz")
    (tmp_path / "broken.zip").write_bytes(b"PK")
    with pytest.raises(DiffAccelError, match="cannot be read as a zip"):
        open_source(tmp_path / "broken.zip")
    with pytest.raises(DiffAccelError, match=r"shape \(N, 3, H, W\); .* \(2, 4, 4, 3\)"):
        open_source(pixels(2, 4, 4, 3))
    with pytest.raises(DiffAccelError, match="2 images were given with 1 ids"):
        open_source(pixels(2, 3, 4, 4), ids=["a"])
    broken = torch.zeros(5, 3, 4, 4)
    broken[1, 0, 0, 0], broken[3] = float("nan"), float("inf")
    with pytest.raises(DiffAccelError, match=r"2 of 5 images of the tensor hold .* not finite, the first 'b'"):
        open_source(broken, ids=list("abcde"))
    with pytest.raises(DiffAccelError, match="batch size 0"):
        list(open_source(pixels(2, 3, 4, 4)).batches(0))


def test_statistics_are_told_from_images(tmp_path):
    statistics = {"mu": np.zeros(3), "sigma": np.eye(3)}
    np.savez(tmp_path / "reference.npz", **statistics)
    source = open_source(tmp_path / "reference.npz")
    assert (source.kind, len(source), source.path) == ("statistics", 0, tmp_path / "reference.npz")
    with pytest.raises(DiffAccelError, match="holds statistics and no images"):
        next(source.batches())
    np.savez(tmp_path / "both.npz", arr_0=pixels(2, 4, 4, 3).numpy(), **statistics)
    both = open_source(tmp_path / "both.npz")
    assert both.kind == "npz" and "also holds statistics" in both.warnings[0]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # on two cores
@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("sides", [(8,), (8, 12)])
def test_processes_read_what_threads_read(tmp_path, kind, sides):
    for i in range(70):
        save(tmp_path / "images" / f"{i:03d}.png", pixels(3, sides[i % len(sides)], 8, seed=i))
    if kind == "zip":
        shutil.make_archive(str(tmp_path / "images"), "zip", tmp_path / "images")
    source = open_source(tmp_path / {"folder": "images", "zip": "images.zip"}[kind])
    threads, processes = ([*source.batches(16, processes=count)] for count in (0, 3))
    assert [ids for ids, _ in threads] == [ids for ids, _ in processes]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(threads, processes, strict=True))


def test_an_archive_may_spell_its_names_in_its_own_way(tmp_path):
    save(tmp_path / "a.png", pixels(3, 4, 4))
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("./deep//a.png", (tmp_path / "a.png").read_bytes())  # write() would tidy it
    source = open_source(tmp_path / "all.zip")
    assert source.ids == ("deep/a",) and torch.equal(source.image(0), pixels(3, 4, 4))


@pytest.mark.skipif(not prefetch._SHARED_MEMORY.is_dir(), reason="processes read on Linux only")
def test_processes_read_where_there_is_work_cores_and_memory_for_them(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    many, image = range(prefetch.MIN_ITEMS), torch.zeros(3, 100, 100, dtype=torch.uint8)

    def worth(items, free=10**9):
        monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=free // 1000, f_frsize=1000))
        return prefetch._process_count(lambda i: image, items, 50)

    assert worth(many) == 6 and worth(many[:-1]) == 0  # two cores are left
    # two waiting batches of fifty images, in half of what is free
    assert [worth(many, 2 * k * 2 * 50 * image.nbytes) for k in (0, 1, 2, 5, 9)] == [0, 0, 2, 5, 6]
    assert prefetch._process_count(lambda i: None, many, 50) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert worth(many) == 0


def test_an_error_in_a_process_is_the_error_itself(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", pixels(3, 40, 40, seed=i))
    source = open_source(tmp_path)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:900])
    with pytest.raises(DiffAccelError, match=r"^The image '1\.png' cannot be read"):
        list(source.batches(processes=1))


def test_a_decompression_bomb_is_refused_before_it_is_inflated(monkeypatch):
    """Two kilobytes may stand for gigabytes of rows: Pillow's limit comes first."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1 << 20))), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    monkeypatch.setattr(png.zlib, "decompressobj", lambda: pytest.fail("its rows were inflated"))
    with pytest.raises(DiffAccelError, match="decompression bomb"):
        decode.decode(data, "bomb.png")
