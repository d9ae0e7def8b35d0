"""Test the image sets: published formats, fetching with resume, samples, and augmentation."""

import gzip
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import ssl
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from PIL import Image

from bitquorum.data import (
    NAMES,
    SOURCES,
    Augment,
    Download,
    ImageSet,
    PublishedFile,
    Source,
    available,
    get,
    install,
    load,
)
from bitquorum.data import fetch as fetch_module
from bitquorum.data.formats import parse_cifar, parse_idx, read_source
from bitquorum.interface import ConfigError, DataError, InputError, MissingDataError

QUICK = settings(max_examples=60, deadline=None, database=None)


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def pixels(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)


def tar(members: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.type = len(content) if kind == tarfile.REGTYPE else 0, kind
            member.linkname = "" if kind == tarfile.REGTYPE else "/etc/passwd"
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def cifar(count: int, label_bytes: int = 1, classes: int = 10) -> bytes:
    labels = np.arange(count * label_bytes, dtype=np.uint8).reshape(count, label_bytes) % classes
    return np.concatenate([labels, pixels(count, 12)], axis=1).tobytes()


def cifar_source(url: str, content: dict[str, bytes], packed: bytes, *, sums: bool = True, **fields) -> Source:
    holds = tuple(
        PublishedFile(name=name, size=len(data), md5=md5(data) if sums else None) for name, data in content.items()
    )
    names = tuple(content)
    source = Source(
        name="tiny",
        layout="cifar",
        shape=(3, 2, 2),
        classes=tuple("abcdefghij"),
        train=names[:-1],
        test=names[-1:],
        downloads=(Download(url=f"{url}/tiny.tar.gz", size=len(packed), md5=md5(packed), holds=holds),),
    )
    return replace(source, **fields)


def idx_source(url: str, *, sums: bool = True) -> tuple[Source, dict[str, bytes]]:
    content = {
        "train-images": idx(pixels(6, 4, 4)),
        "train-labels": idx(np.arange(6, dtype=np.uint8)),
        "test-images": idx(pixels(3, 4, 4)),
        "test-labels": idx(np.arange(3, dtype=np.uint8)),
    }
    packed = {f"{name}.gz": gzip.compress(data) for name, data in content.items()}
    downloads = tuple(
        Download(
            url=f"{url}/{name}.gz",
            size=len(packed[f"{name}.gz"]),
            md5=md5(packed[f"{name}.gz"]),
            holds=(PublishedFile(name=name, size=len(data), md5=md5(data) if sums else None),),
        )
        for name, data in content.items()
    )
    names = tuple(content)
    source = Source(
        name="tiny-idx",
        layout="idx",
        shape=(1, 4, 4),
        classes=tuple("abcdef"),
        train=names[:2],
        test=names[2:],
        downloads=downloads,
    )
    return source, packed


CIFAR_FILES = {"one.bin": cifar(3), "two.bin": cifar(5), "test.bin": cifar(4)}
CIFAR_TAR = tar({f"tiny-bin/{name}": data for name, data in CIFAR_FILES.items()} | {"tiny-bin/readme.html": b"x"})


class Server:
    """Serve files on 127.0.0.1; `cut` ends each answer after so many bytes, `ranges` obeys Range."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: int | None = None
        self.ranges = True
        self.seen: list[str | None] = []
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.seen.append(wanted)
        content = self.files.get(handler.path.lstrip("/"))
        if content is None:
            handler.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if start and start >= len(content):
            handler.send_error(416)
            return
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        end = len(content) if self.cut is None else start + self.cut
        handler.wfile.write(content[start:end])


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as service:
        state.url = f"http://127.0.0.1:{service.server_port}"
        thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        service.shutdown()
        thread.join()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@contextmanager
def refused(error: type[Exception], message: str) -> Iterator[None]:
    """Expect our error, or that of a runtime type checker that saw the wrong type before us."""
    with pytest.raises((error, TypeCheckError)) as caught:
        yield
    if isinstance(caught.value, error):
        assert re.search(message, str(caught.value))


def image_set(count: int = 20, kinds: int = 4, **fields) -> ImageSet:
    values = {
        "name": "made",
        "split": "train",
        "images": torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 2, 3),
        "labels": torch.arange(count) % kinds,
        "classes": tuple(str(label) for label in range(kinds)),
        "index": torch.arange(count) + 100,
    }
    return ImageSet(**(values | fields))


# ---------------------------------------------------------------- ImageSet


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"images": torch.zeros(20, 2, 3)},
            InputError,
            r"expected uint8 or float32 images .*got torch.float32 \[20, 2",
        ),
        ({"images": torch.zeros(20, 1, 2, 3, dtype=torch.float64)}, InputError, "float64"),
        ({"images": np.zeros((20, 1, 2, 3))}, InputError, "images to be a tensor, got ndarray"),
        ({"labels": torch.zeros(19, dtype=torch.int64)}, InputError, r"labels of shape \[20\], got .*\[19\]"),
        ({"labels": torch.zeros(20)}, InputError, "int64 labels"),
        ({"index": torch.zeros(20, dtype=torch.int32)}, InputError, "int64 index"),
        ({"index": torch.arange(20, device="meta")}, InputError, "all tensors on cpu, got index on meta"),
        ({"classes": ["a", "b", "c", "d"]}, InputError, "classes as a tuple of names"),
        ({"labels": torch.full((20,), 4)}, DataError, r"labels in 0\.\.3 for 4 classes, got 4 for example 0"),
        ({"labels": torch.arange(20) % 4 - 1}, DataError, "got -1 for example 0"),
        (
            {"index": torch.arange(20) // 2},
            DataError,
            "different index for every example, got 0 more than once",
        ),
        ({"images": torch.full((20, 1, 2, 3), float("nan"))}, DataError, "got nan in image 0 .20 bad"),
        ({"images": torch.full((20, 1, 2, 3), 1.5)}, DataError, "got 1.5 in image 0"),
        ({"images": torch.zeros(0, 1, 2, 3)}, DataError, "at least one image"),
    ],
)
def test_image_set_refuses_bad_content(fields, error, message):
    with refused(error, message):
        image_set(**fields)


def test_one_bad_pixel_is_found_and_named():
    images = torch.rand(20, 1, 2, 3)
    images[7, 0, 1, 2] = -0.25
    with pytest.raises(DataError, match=r"got -0.25 in image 7 \(1 bad images\)"):
        image_set(images=images)


def test_batch_scales_bytes_exactly_and_keeps_floats():
    data = image_set(256, images=torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1))
    batch = data.batch(torch.arange(256))
    assert torch.equal(batch.images.flatten(), torch.arange(256, dtype=torch.float64).div(255).float())
    assert batch.images.dtype == torch.float32
    assert torch.equal(batch.examples, data.index)
    floats = torch.rand(20, 1, 2, 3)
    assert torch.equal(image_set(images=floats).batch(torch.tensor([3, 1])).images, floats[[3, 1]])


def test_batches_cover_the_set_in_order_once():
    data = image_set(20)
    batches = list(data.batches(8))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    assert torch.equal(torch.cat([batch.examples for batch in batches]), data.index)
    with pytest.raises(InputError, match="batch size of at least 1, got 0"):
        data.batches(0)


@pytest.mark.parametrize("positions", [torch.tensor([20]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor(3)])
def test_positions_outside_or_of_another_kind_are_refused(positions):
    with refused(InputError, r"expected (positions in 0\.\.19|a list of integer)"):
        image_set(20).batch(positions)


def test_select_keeps_identity_and_refuses_repetition():
    part = image_set(20).select([5, 2])
    assert part.index.tolist() == [105, 102]
    assert part.labels.tolist() == [1, 2]
    with pytest.raises(DataError, match="got 105 more than once"):
        image_set(20).select([5, 5])
    with pytest.raises(DataError, match="at least one image"):
        image_set(20).select([])


def test_take_first_and_balanced():
    labels = torch.tensor([0] * 30 + [1] * 30 + [2] * 3)
    data = image_set(63, kinds=3, labels=labels)
    assert data.take(5).index.tolist() == [100, 101, 102, 103, 104]
    assert torch.bincount(data.take(9, seed=1).labels).tolist() == [3, 3, 3]
    assert sorted(torch.bincount(data.take(8, seed=1).labels).tolist()) == [2, 3, 3]
    assert torch.bincount(data.take(23, seed=1).labels).tolist() == [10, 10, 3]  # class 2 has no more to give
    small, large = data.take(7, seed=4), data.take(30, seed=4)
    assert set(small.index.tolist()) < set(large.index.tolist())
    assert small.index.tolist() == sorted(small.index.tolist())
    assert data.take(9, seed=1).index.tolist() != data.take(9, seed=2).index.tolist()
    for count in (0, 64, True):
        with pytest.raises(InputError, match=r"count in 1\.\.63"):
            data.take(count)


def test_samples_do_not_depend_on_the_order_of_the_set():
    data = image_set(40)
    mixed = data.select(torch.randperm(40, generator=torch.Generator().manual_seed(0)))
    assert set(data.take(13, seed=3).index.tolist()) == set(mixed.take(13, seed=3).index.tolist())
    for one, other in zip(data.split_off(13, seed=3), mixed.split_off(13, seed=3), strict=True):
        assert set(one.index.tolist()) == set(other.index.tolist())


@QUICK
@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=60),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**40),
)
def test_split_off_is_a_stratified_partition(labels, share, seed):
    data = image_set(len(labels), kinds=5, labels=torch.tensor(labels))
    count = 1 + int(share * (len(labels) - 2))
    train, validation = data.split_off(count, seed=seed)
    assert (train.split, validation.split, len(validation)) == ("train", "validation", count)
    assert sorted(train.index.tolist() + validation.index.tolist()) == data.index.tolist()
    exact = count * torch.bincount(data.labels, minlength=5) / len(labels)
    assert ((torch.bincount(validation.labels, minlength=5) - exact).abs() < 1).all()
    again = data.split_off(count, seed=seed)[1]
    assert torch.equal(again.index, validation.index)


def test_every_example_is_held_out_equally_often():
    data = image_set(20, kinds=2)
    held = torch.zeros(20)
    for seed in range(400):
        held[data.split_off(5, seed=seed)[1].index - 100] += 1
    # 400 draws with probability 1/4: standard error 8.7; 20 comparisons, so 4.5 standard errors
    assert (held - 100).abs().max() < 39
    with pytest.raises(InputError, match=r"validation count in 1\.\.19, got 20"):
        data.split_off(20, seed=0)


# ---------------------------------------------------------------- formats


def test_idx_known_content():
    array = pixels(3, 2, 5)
    assert np.array_equal(parse_idx(idx(array)).numpy(), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header 00 00 08 01..08, got no bytes"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "got 00 00 0d 01"),
        (b"\x1f\x8b\x08\x08\0\0", "got 1f 8b 08 08"),
        (b"\0\0\x08\x03\0\0\0\x01", "header of 16 bytes, got a file of 8"),
        (b"\0\0\x08\x01\0\0\0\x05\x01", r"expected 5 values for shape \[5\], got 1"),
        (b"\0\0\x08\x02" + b"\xff" * 8, "got 0"),
        (b"\0\0\x08\x01\0\0\0\0", "at least one value"),
    ],
)
def test_idx_refuses_bad_headers(content, message):
    with pytest.raises(DataError, match=message):
        parse_idx(content)


@QUICK
@given(
    st.binary(max_size=40)
    | st.builds(
        lambda dims, sizes, rest: bytes([0, 0, 8, dims]) + b"".join(size.to_bytes(4, "big") for size in sizes) + rest,
        st.integers(1, 8),
        st.lists(st.integers(0, 3) | st.integers(0, 2**32 - 1), max_size=3),
        st.binary(max_size=12),
    )
)
def test_any_bytes_give_an_array_or_a_data_error(content):
    for parse in (parse_idx, lambda data: parse_cifar(data, (1, 2, 2))):
        try:
            parse(content)
        except DataError:
            continue


def test_cifar_label_bytes_and_channel_order():
    record = bytes([9, 4, *range(12)])
    images, labels = parse_cifar(record * 2, (3, 2, 2), label_bytes=2)
    assert labels.tolist() == [4, 4]
    assert images[1].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]
    with pytest.raises(DataError, match="positive multiple of 14 bytes, got 27"):
        parse_cifar((record * 2)[:-1], (3, 2, 2), label_bytes=2)


@QUICK
@given(where=st.floats(0, 1, exclude_max=True), packed=st.booleans(), layout=st.sampled_from(["idx", "cifar"]))
def test_a_truncated_file_is_always_a_data_error(where, packed, layout):
    if layout == "idx":
        source, files = idx_source("")
        content = {name.removesuffix(".gz"): gzip.decompress(data) for name, data in files.items()}
    else:
        source, content = cifar_source("", CIFAR_FILES, CIFAR_TAR), CIFAR_FILES
    with temporary_folder() as folder:
        for place, (name, data) in enumerate(content.items()):
            whole = gzip.compress(data, 1) if packed else data
            kept = int(where * len(whole)) if place == 0 else len(whole)
            (folder / f"{name}{'.gz' * packed}").write_bytes(whole[:kept])
        with pytest.raises(DataError):
            read_source(source, "train", folder)
        assert len(read_source(source, "test", folder)) == source.count("test")


def test_read_source_concatenates_in_order(tmp_path):
    for name, data in CIFAR_FILES.items():
        (tmp_path / name).write_bytes(data)
    source = cifar_source("", CIFAR_FILES, CIFAR_TAR)
    data = read_source(source, "train", tmp_path)
    assert (len(data), data.shape, source.count("train"), source.count("test")) == (8, (3, 2, 2), 8, 4)
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert data.index.tolist() == list(range(8))
    assert np.array_equal(data.images[3:].flatten(1).numpy(), pixels(5, 12))


def test_files_of_another_data_set_are_passed_over_and_refused(tmp_path):
    """Fashion-MNIST has the names and sizes of MNIST, and a folder that holds both is common."""
    source, content = idx_source("")
    content = {name.removesuffix(".gz"): gzip.decompress(data) for name, data in content.items()}
    other = {name: bytes(reversed(data)) if "images" in name else data for name, data in content.items()}
    for folder, files in (("a-other", other), ("b-ours", content)):
        (tmp_path / folder).mkdir()
        for name, data in files.items():
            (tmp_path / folder / name).write_bytes(data)
    assert torch.equal(read_source(source, "train", tmp_path).images[:, 0], torch.from_numpy(pixels(6, 4, 4)))
    with pytest.raises(DataError, match=r"train-images: expected MD5 \w+, got \w+: a damaged file, or that of another"):
        read_source(source, "train", tmp_path / "a-other")


def test_labels_without_a_class_are_refused(tmp_path):
    for name, data in CIFAR_FILES.items():
        (tmp_path / name).write_bytes(data)
    source = cifar_source("", CIFAR_FILES, CIFAR_TAR, classes=("a", "b", "c", "d"))
    with pytest.raises(DataError, match=r"labels in 0\.\.3 for 4 classes, got 4 for example 7"):
        read_source(source, "train", tmp_path)


def test_idx_images_and_labels_must_fit(tmp_path):
    source, _ = idx_source("", sums=False)
    images, labels = tmp_path / "train-images", tmp_path / "train-labels"
    labels.write_bytes(idx(np.arange(6, dtype=np.uint8)))
    images.write_bytes(idx(pixels(6, 2, 8)))
    with pytest.raises(DataError, match=r"expected images of \[4, 4\], got shape \[6, 2, 8\]"):
        read_source(source, "train", tmp_path)
    images.write_bytes(idx(pixels(6, 4, 4)))
    labels.write_bytes(struct.pack(">BBBBII", 0, 0, 8, 2, 1, 2) + bytes(2))
    with pytest.raises(DataError, match="expected one label for each of 6 images"):
        read_source(source, "train", tmp_path)


# ---------------------------------------------------------------- load


def test_digits_split_is_fixed_and_complete():
    train, test = load("digits", "train"), load("digits", "test")
    assert (len(train), len(test), train.split, test.split) == (1297, 500, "train", "test")
    assert sorted(train.index.tolist() + test.index.tolist()) == list(range(1797))
    assert torch.bincount(test.labels).min() >= 48
    assert set((train.images * 16).unique().tolist()) == set(range(17))
    # frozen: a change of the split would change every published number
    assert md5(test.index.numpy().astype("<i8").tobytes()) == "52b7ffd70399a4c0f070edc2c25a10f1"


def test_unknown_names_and_splits_get_a_suggestion(tmp_path):
    for wrong, right in (("cifar-10", "cifar10"), ("fashion_mnist", "fashion-mnist"), ("MNIST", "mnist")):
        with pytest.raises(ConfigError, match=f"got '{wrong}'; did you mean '{right}'"):
            load(wrong, "train", root=tmp_path)
    with pytest.raises(ConfigError, match=r"got 'xyzzy'; known: digits, mnist, .*folder:PATH, parquet:PATH"):
        load("xyzzy", "train", root=tmp_path)
    with pytest.raises(ConfigError, match="split 'train' or 'test', got 'valid'"):
        load("digits", "valid")
    with pytest.raises(ConfigError, match="got 'folder:'"):
        load("folder:", "train")


def test_missing_set_names_both_ways(tmp_path, monkeypatch):
    monkeypatch.setenv("BITQUORUM_DATA", str(tmp_path))
    with pytest.raises(MissingDataError) as caught:
        load("cifar10", "train")
    for text in ("`bitquorum data get cifar10`", "`bitquorum data get cifar10 --from PATH`", str(tmp_path)):
        assert text in str(caught.value)


def test_available_tells_facts_and_place(tmp_path):
    listing = available(tmp_path)
    assert tuple(listing) == NAMES
    assert listing["digits"].where == "scikit-learn"
    facts = listing["cifar100"]
    assert (facts.shape, facts.classes, facts.train, facts.test) == ((3, 32, 32), 100, 50_000, 10_000)
    assert (facts.where, facts.size) == (None, 60_000 * 3074)
    assert [(listing[name].train, listing[name].test) for name in ("mnist", "cifar10")] == [
        (60_000, 10_000),
        (50_000, 10_000),
    ]
    folder = tmp_path / "cifar100" / "cifar-100-binary"
    folder.mkdir(parents=True)
    for name in ("train.bin", "test.bin"):
        assert available(tmp_path)["cifar100"].where is None
        (folder / name).touch()
    assert available(tmp_path)["cifar100"].where == str(tmp_path / "cifar100")


def test_published_tables_are_consistent():
    for source in SOURCES.values():
        assert set(source.train + source.test) == set(source.files)
        assert len(set(source.classes)) == len(source.classes) in (10, 100)
        sums = [item.md5 for item in source.downloads] + [file.md5 for file in source.files.values() if file.md5]
        assert all(re.fullmatch("[0-9a-f]{32}", text) for text in sums)
        assert len(set(sums)) == len(sums)
    assert list(SOURCES["cifar100"].classes) == sorted(SOURCES["cifar100"].classes)


# ---------------------------------------------------------------- folder and Parquet


def write_image(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def test_folder_reads_sorted_classes_and_files(tmp_path):
    arrays = {name: pixels(seed, 4, 5, 3)[0] for seed, name in enumerate(("b/2.png", "a/1.bmp", "b/10.png"), 1)}
    for name, array in arrays.items():
        write_image(tmp_path / "train" / name, array)
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    write_image(tmp_path / "test" / "b" / "x.png", arrays["b/2.png"])
    data = load(f"folder:{tmp_path}", "train")
    assert (data.classes, data.labels.tolist(), data.shape) == (("a", "b"), [0, 1, 1], (3, 4, 5))
    for image, name in zip(data.images, ("a/1.bmp", "b/10.png", "b/2.png"), strict=True):
        assert np.array_equal(image.numpy(), arrays[name].transpose(2, 0, 1))
    assert load(f"folder:{tmp_path}", "test").labels.tolist() == [1]


def test_folder_grey_stays_grey_and_mixes_to_rgb(tmp_path):
    grey = pixels(1, 3, 3)[0]
    write_image(tmp_path / "train" / "a" / "1.png", grey)
    assert np.array_equal(load(f"folder:{tmp_path}", "train").images[0, 0].numpy(), grey)
    write_image(tmp_path / "train" / "a" / "2.png", np.dstack([pixels(2, 3, 3, 3)[0], np.full((3, 3), 255, np.uint8)]))
    mixed = load(f"folder:{tmp_path}", "train")
    assert mixed.shape == (3, 3, 3)
    assert np.array_equal(mixed.images[0].numpy(), np.stack([grey] * 3))
    assert np.array_equal(mixed.images[1].numpy(), pixels(2, 3, 3, 3)[0].transpose(2, 0, 1))


def test_folder_errors_name_the_file(tmp_path):
    with pytest.raises(MissingDataError, match="one folder of images for each class"):
        load(f"folder:{tmp_path}", "train")
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="got none"):
        load(f"folder:{tmp_path}", "train")
    write_image(tmp_path / "train" / "a" / "1.png", pixels(1, 4, 4, 3)[0])
    bad = tmp_path / "train" / "a" / "2.png"
    write_image(bad, pixels(1, 5, 4, 3)[0])
    with pytest.raises(DataError, match=r"2.png: expected the size of .*1.png, 4x4 pixels, got 4x5"):
        load(f"folder:{tmp_path}", "train")
    write_image(bad, np.full((4, 4), 1000, np.uint16))
    with pytest.raises(DataError, match=r"2.png: expected 8 bits a channel, got an image of mode I"):
        load(f"folder:{tmp_path}", "train")
    bad.write_bytes(png_of_16_bits(4, 4))
    with pytest.raises(DataError, match=r"2.png: expected 8 bits a channel, got an image of mode RGB"):
        load(f"folder:{tmp_path}", "train")
    bad.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\nshowpage\n%%EOF\n")
    with pytest.raises(DataError, match=r"2.png: expected an image that Pillow can read, got cannot identify"):
        load(f"folder:{tmp_path}", "train")
    write_image(bad, np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(DataError, match=r"2.png: expected an opaque image"):
        load(f"folder:{tmp_path}", "train")
    write_image(bad, pixels(1, 4, 4, 3)[0])
    whole = bad.read_bytes()
    for length in (0, 10, len(whole) // 2):
        bad.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"2.png: expected an image that Pillow can read"):
            load(f"folder:{tmp_path}", "train")
    write_image(tmp_path / "test" / "z" / "1.png", pixels(1, 4, 4, 3)[0])
    with pytest.raises(DataError, match=r"expected only the classes of .*got z"):
        load(f"folder:{tmp_path}", "test")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_set_beyond_the_limit_is_mapped_and_equal(tmp_path, monkeypatch, channels):
    for row in range(12):
        array = pixels(row + 1, 4, 5, channels)[0]
        write_image(tmp_path / "train" / "ab"[row % 2] / f"{row:02}.png", array[:, :, 0] if channels == 1 else array)
    held = load(f"folder:{tmp_path}", "train")
    monkeypatch.setattr("bitquorum.data.room.LIMIT", 100)
    monkeypatch.setenv("BITQUORUM_DATA", str(tmp_path / "sets"))
    mapped = load(f"folder:{tmp_path}", "train")
    assert torch.equal(mapped.images, held.images)
    assert mapped.shape == (channels, 4, 5)
    one, other = (data.split_off(4, seed=3)[0].select([5, 0, 2]) for data in (held, mapped))
    assert torch.equal(one.images, other.images)
    assert torch.equal(held.batch(torch.tensor([3, 1])).images, mapped.batch(torch.tensor([3, 1])).images)
    assert list((tmp_path / "sets").iterdir()) == [], "the file has no name"


def test_a_full_disk_is_told_before_anything_is_unpacked(tmp_path, monkeypatch):
    write_image(tmp_path / "train" / "a" / "1.png", pixels(1, 4, 4, 3)[0])
    monkeypatch.setattr("bitquorum.data.room.LIMIT", 0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 8, 2))  # type: ignore[attr-defined]
    monkeypatch.setenv("BITQUORUM_DATA", str(tmp_path / "sets"))
    with pytest.raises(
        DataError, match=r"GiB free in .*sets to unpack the images to, got 0\.0; let BITQUORUM_DATA name"
    ):
        load(f"folder:{tmp_path}", "train")


@pytest.mark.skipif(sys.platform != "linux", reason="limits on private memory are Linux's")
@pytest.mark.long
def test_a_set_larger_than_the_memory_is_read_split_and_batched(tmp_path):
    """A process that may take 64 MiB more than its imports reads 192 MiB of images."""
    for row in range(64):
        write_image(tmp_path / "train" / "ab"[row % 2] / f"{row}.png", np.full((1024, 1024, 3), row, np.uint8))
    code = f"""
import resource
import torch
from bitquorum.data import load, room
from PIL import Image
room.LIMIT = 1 << 20
load("folder:{tmp_path}/few", "train")
used = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")][0] * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + (64 << 20),) * 2)
try:
    torch.empty(192 << 20, dtype=torch.uint8)
except RuntimeError:
    pass
else:
    raise SystemExit("the limit does not hold")
train, held = load("folder:{tmp_path}", "train").split_off(16, seed=0)
print(len(train), len(held), float(train.batch(torch.tensor([0, 47])).images.sum()))
"""
    write_image(tmp_path / "few" / "train" / "a" / "1.png", pixels(1, 4, 4, 3)[0])
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "BITQUORUM_DATA": str(tmp_path / "sets"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    train, held, total = done.stdout.split()
    assert (int(train), int(held)) == (48, 16)
    assert float(total) > 0


def png(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, format="PNG")
    return out.getvalue()


def png_of_16_bits(width: int, height: int) -> bytes:
    """Return an RGB image of 16 bits a channel, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    lines = zlib.compress((b"\0" + b"\1\2" * 3 * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def write_parquet(path: Path, arrays, labels, names=None, columns=("image", "label")) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    cells = [{"bytes": None if array is None else png(array), "path": None} for array in arrays]
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({columns[0]: pa.array(cells, struct_type), columns[1]: pa.array(labels)})
    if names:
        features = {columns[0]: {"_type": "Image"}, columns[1]: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def test_parquet_in_the_form_of_the_hub(tmp_path):
    arrays = list(pixels(5, 4, 4, 3))
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", arrays[:3], [0, 1, 2], ["x", "y", "z"])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", arrays[3:], [2, 0], ["x", "y", "z"])
    data = load(f"parquet:{tmp_path}", "train")
    assert (data.classes, data.labels.tolist(), data.shape) == (("x", "y", "z"), [0, 1, 2, 2, 0], (3, 4, 4))
    assert np.array_equal(data.images.numpy(), np.stack(arrays).transpose(0, 3, 1, 2))
    with pytest.raises(MissingDataError, match=r"expected test-\*.parquet"):
        load(f"parquet:{tmp_path}", "test")


def test_an_unknown_home_folder_is_one_message(tmp_path):
    with pytest.raises(ConfigError, match="whose home folder is unknown"):
        load("folder:~nosuchuser/x", "train")
    with pytest.raises(ConfigError, match="whose home folder is unknown"):
        load("cifar10", "train", root=Path("~nosuchuser"))


def test_a_part_of_a_parquet_set_is_refused(tmp_path):
    arrays = list(pixels(4, 4, 4, 3))
    for number in (0, 1):
        name = f"train-0000{number}-of-00002.parquet"
        write_parquet(tmp_path / name, arrays[2 * number :][:2], [0, 1], ["x", "y"])
    assert len(load(f"parquet:{tmp_path}", "train")) == 4
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(MissingDataError, match="expected 2 files, as their names say, got 1, none with the number 0"):
        load(f"parquet:{tmp_path}", "train")


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (None, [1.9, 0.2]),
        (None, [1.0, float("nan")]),
        (None, ["a", "b"]),
        ([b"1", b"2"], [0, 1]),
        ([{"bytes": "1"}, {"bytes": "2"}], [0, 1]),
        ([{"path": "1"}, {"path": "2"}], [0, 1]),
        (None, [0, 2**63]),
    ],
)
def test_a_later_parquet_file_of_other_columns_is_refused(tmp_path, images, labels):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    arrays = list(pixels(2, 4, 4, 3))
    write_parquet(tmp_path / "train-0.parquet", arrays, [0, 1], ["x", "y"])
    cells = images or [{"bytes": png(array), "path": None} for array in arrays]
    column = pa.array(labels, pa.uint64()) if labels[1] == 2**63 else pa.array(labels)
    pq.write_table(pa.table({"image": pa.array(cells), "label": column}), tmp_path / "train-1.parquet")
    with pytest.raises(DataError, match=r"^parquet:.*(expected a struct and an integer|readable Parquet files)"):
        load(f"parquet:{tmp_path}", "train")


def test_parquet_other_columns_and_no_names(tmp_path):
    columns = ("img", "fine_label")
    write_parquet(tmp_path / "train-0.parquet", list(pixels(2, 3, 3)), [0, 6], columns=columns)
    write_parquet(tmp_path / "test-0.parquet", list(pixels(1, 3, 3)), [1], columns=columns)
    test = load(f"parquet:{tmp_path}", "test")
    assert test.classes == tuple("0123456")
    assert test.shape == (1, 3, 3)


def test_parquet_errors(tmp_path, monkeypatch):
    file = tmp_path / "train-0.parquet"
    arrays = list(pixels(2, 3, 3))
    write_parquet(file, arrays, [0, 1], columns=("picture", "label"))
    with pytest.raises(DataError, match="column image or img, got picture, label"):
        load(f"parquet:{tmp_path}", "train")
    write_parquet(file, arrays, ["a", "b"])
    with pytest.raises(DataError, match=r"a struct and an integer in image, label, got struct<.* and string"):
        load(f"parquet:{tmp_path}", "train")
    write_parquet(file, arrays, [0, None])
    with pytest.raises(DataError, match="a label in every row"):
        load(f"parquet:{tmp_path}", "train")
    write_parquet(file, [arrays[0], None], [0, 1])
    with pytest.raises(DataError, match="row 1: expected an image"):
        load(f"parquet:{tmp_path}", "train")
    write_parquet(file, arrays, [0, -1])
    with pytest.raises(DataError, match="got -1 for example 1"):
        load(f"parquet:{tmp_path}", "train")
    write_parquet(file, arrays, [0, 10**12])
    with pytest.raises(DataError, match=r"expected labels 0.."):
        load(f"parquet:{tmp_path}", "train")
    whole = file.read_bytes()
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match="readable Parquet files"):
            load(f"parquet:{tmp_path}", "train")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=re.escape('run `pip install "bitquorum[hub]"`')):
        load(f"parquet:{tmp_path}", "train")


# ---------------------------------------------------------------- fetch


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_download_unpacks_and_a_second_call_does_nothing(tmp_path, server):
    server.files["tiny.tar.gz"] = CIFAR_TAR
    source = cifar_source(server.url, CIFAR_FILES, CIFAR_TAR)
    seen: list[tuple[str, int, int | None]] = []
    folder = install(source, root=tmp_path, progress=lambda *step: seen.append(step))
    assert folder == tmp_path / "tiny"
    assert contents(tmp_path) == {f"tiny/{name}": data for name, data in CIFAR_FILES.items()}
    assert seen[-1] == ("tiny.tar.gz", len(CIFAR_TAR), len(CIFAR_TAR))
    times = [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
    install(source, root=tmp_path)
    assert len(server.seen) == 1
    assert times == [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
    assert len(read_source(source, "train", folder)) == 8


def test_a_damaged_file_is_fetched_again(tmp_path, server):
    source, server.files = idx_source(server.url)
    folder = install(source, root=tmp_path)
    good = contents(folder)
    broken = folder / "train-images"
    broken.write_bytes(broken.read_bytes()[:-1] + b"\0")
    install(source, root=tmp_path)
    assert contents(folder) == good
    assert len(server.seen) == 5


def test_one_call_resumes_as_long_as_bytes_come(tmp_path, server):
    server.files["tiny.tar.gz"] = CIFAR_TAR
    server.cut = 1 + len(CIFAR_TAR) // 3
    folder = install(cifar_source(server.url, CIFAR_FILES, CIFAR_TAR), root=tmp_path)
    assert contents(folder) == CIFAR_FILES
    assert server.seen == [None, f"bytes={server.cut}-", f"bytes={2 * server.cut}-"]


def test_a_connection_that_breaks_within_tls_is_resumed(tmp_path, server, monkeypatch):
    server.files["tiny.tar.gz"], server.cut = CIFAR_TAR, 1 + len(CIFAR_TAR) // 2
    read, broken = http.client.HTTPResponse.read, []

    def read_or_break(self, *size):
        block = read(self, *size)
        if not block and not broken:
            broken.append(True)
            raise ssl.SSLEOFError(8, "EOF occurred in violation of protocol")
        return block

    monkeypatch.setattr(http.client.HTTPResponse, "read", read_or_break)
    assert contents(install(cifar_source(server.url, CIFAR_FILES, CIFAR_TAR), root=tmp_path)) == CIFAR_FILES
    assert broken
    assert server.seen == [None, f"bytes={server.cut}-"]


def test_an_interrupted_download_keeps_its_part_and_the_next_call_goes_on(tmp_path, server):
    server.files["tiny.tar.gz"] = CIFAR_TAR
    source = cifar_source(server.url, CIFAR_FILES, CIFAR_TAR)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    server.cut = 100
    with pytest.raises(KeyboardInterrupt):
        install(source, root=tmp_path, progress=interrupt)
    assert contents(tmp_path) == {"tiny/tiny.tar.gz.part": CIFAR_TAR[:100]}
    server.cut = None
    assert contents(install(source, root=tmp_path)) == CIFAR_FILES
    assert server.seen == [None, "bytes=100-"]


def test_a_server_without_ranges_starts_afresh(tmp_path, server):
    server.files["tiny.tar.gz"], server.ranges = CIFAR_TAR, False
    part = tmp_path / "tiny" / "tiny.tar.gz.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 50)
    assert contents(install(cifar_source(server.url, CIFAR_FILES, CIFAR_TAR), root=tmp_path)) == CIFAR_FILES
    assert server.seen == ["bytes=50-"]


def test_a_server_without_ranges_that_cuts_off_ends_with_an_error(tmp_path, server):
    server.files["tiny.tar.gz"], server.ranges, server.cut = CIFAR_TAR, False, 60
    with pytest.raises(DataError, match=r"got 60 \(the connection ended\).*--from PATH"):
        install(cifar_source(server.url, CIFAR_FILES, CIFAR_TAR), root=tmp_path)
    assert len(server.seen) == 2


def test_a_wrong_sum_is_named_and_leaves_nothing(tmp_path, server):
    wrong = bytes([CIFAR_TAR[0] ^ 1]) + CIFAR_TAR[1:]
    server.files["tiny.tar.gz"] = wrong
    with pytest.raises(DataError, match=f"MD5 {md5(CIFAR_TAR)}, got .* MD5 {md5(wrong)}; the file was removed"):
        install(cifar_source(server.url, CIFAR_FILES, CIFAR_TAR), root=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [b"more", None])
def test_a_file_of_another_length_is_refused(tmp_path, server, change):
    server.files["tiny.tar.gz"] = CIFAR_TAR + change if change else CIFAR_TAR[:-7]
    with pytest.raises(DataError, match=f"expected {len(CIFAR_TAR)} bytes"):
        install(cifar_source(server.url, CIFAR_FILES, CIFAR_TAR), root=tmp_path)
    assert contents(tmp_path) == {}


def test_no_file_and_no_network_name_the_other_way(tmp_path, server):
    source = cifar_source(server.url, CIFAR_FILES, CIFAR_TAR)
    with pytest.raises(DataError, match=r"HTTP status 404.*bitquorum data get tiny --from PATH"):
        install(source, root=tmp_path)
    nowhere = cifar_source("http://127.0.0.1:9", CIFAR_FILES, CIFAR_TAR)
    with pytest.raises(DataError, match=r"no connection.*bitquorum data get tiny --from PATH"):
        install(nowhere, root=tmp_path)


@pytest.mark.parametrize("name", ["../evil.bin", "/evil.bin", "tiny-bin/../../evil.bin"])
def test_a_malicious_path_in_an_archive_is_refused(tmp_path, name):
    packed = tar({name: b"evil", **CIFAR_FILES})
    (tmp_path / "tiny.tar.gz").write_bytes(packed)
    with pytest.raises(DataError, match="expected plain files below one folder, got the member"):
        install(cifar_source("", CIFAR_FILES, packed), origin=tmp_path / "tiny.tar.gz", root=tmp_path / "root")
    assert contents(tmp_path) == {"tiny.tar.gz": packed}
    assert not list(tmp_path.parent.glob("evil*"))


def test_links_missing_members_and_false_members_are_refused(tmp_path):
    cases = {
        "got the member 'one.bin'": tar(CIFAR_FILES, tarfile.SYMTYPE),
        "expected the files test.bin, got": tar({name: CIFAR_FILES[name] for name in ("one.bin", "two.bin")}),
        "one.bin: expected 39 bytes .* got 38": tar({**CIFAR_FILES, "one.bin": CIFAR_FILES["one.bin"][:-1]}),
        "one.bin: expected 39 bytes .* got more": tar({**CIFAR_FILES, "one.bin": CIFAR_FILES["one.bin"] + b"x"}),
        "expected a tar.gz archive": b"no archive",
        "expected a tar.gz archive, got Compressed": CIFAR_TAR[:200],
    }
    for message, packed in cases.items():
        archive = tmp_path / "tiny.tar.gz"
        archive.write_bytes(packed)
        with pytest.raises(DataError, match=message):
            install(cifar_source("", CIFAR_FILES, packed), origin=archive, root=tmp_path / "root")
        assert contents(tmp_path / "root") == {}


def test_from_an_archive_and_from_folders(tmp_path):
    source = cifar_source("http://127.0.0.1:9", CIFAR_FILES, CIFAR_TAR)
    archive = tmp_path / "there" / "deep" / "tiny.tar.gz"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(CIFAR_TAR)
    assert contents(install(source, origin=archive, root=tmp_path / "a")) == CIFAR_FILES
    assert contents(install(source, origin=tmp_path / "there", root=tmp_path / "b")) == CIFAR_FILES
    loose = tmp_path / "loose" / "tiny-bin"
    loose.mkdir(parents=True)
    for name, data in CIFAR_FILES.items():
        (loose / f"{name}.gz").write_bytes(gzip.compress(data))
    assert contents(install(source, origin=tmp_path / "loose", root=tmp_path / "c")) == CIFAR_FILES
    archive.write_bytes(CIFAR_TAR + b"x")
    with pytest.raises(DataError, match=f"MD5 {md5(CIFAR_TAR)}, got"):
        install(source, origin=archive, root=tmp_path / "d")
    assert archive.exists()


def test_from_a_folder_takes_the_file_whose_sum_fits(tmp_path):
    source, packed = idx_source("http://127.0.0.1:9")
    for place, change in (("a-other-set", b"?"), ("z-right-set", b"")):
        (tmp_path / place).mkdir()
        for name, data in packed.items():
            content = gzip.decompress(data)
            (tmp_path / place / name).write_bytes(gzip.compress(content[: len(content) - len(change)] + change))
    folder = install(source, origin=tmp_path, root=tmp_path / "root")
    assert contents(folder) == {name.removesuffix(".gz"): gzip.decompress(data) for name, data in packed.items()}
    with pytest.raises(DataError, match=r"train-images.gz: expected 112 bytes with MD5 .* got 112 bytes with MD5"):
        install(source, origin=tmp_path / "a-other-set", root=tmp_path / "other")
    assert contents(tmp_path / "other") == {}


def test_from_errors(tmp_path):
    source, _ = idx_source("")
    with pytest.raises(MissingDataError, match="which is not there"):
        install(source, origin=tmp_path / "no", root=tmp_path)
    with pytest.raises(MissingDataError, match=r"expected train-images .*below"):
        install(source, origin=tmp_path, root=tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"expected a folder with published files such as train-images.gz"):
        install(source, origin=tmp_path / "file", root=tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train-images.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="expected a gzip file"):
        install(source, origin=tmp_path / "broken", root=tmp_path / "root")
    with pytest.raises(DataError, match=r"choose another folder by \$BITQUORUM_DATA"):
        install(source, root=tmp_path / "file")


def test_a_set_without_sums_is_checked_by_size(tmp_path):
    source = cifar_source("", CIFAR_FILES, CIFAR_TAR, sums=False)
    loose = tmp_path / "loose"
    loose.mkdir()
    for name, data in CIFAR_FILES.items():
        (loose / name).write_bytes(data)
    assert contents(install(source, origin=loose, root=tmp_path)) == CIFAR_FILES
    (loose / "one.bin").write_bytes(b"short")
    with pytest.raises(DataError, match="expected 39 bytes with MD5 unknown, got 5"):
        install(source, origin=loose, root=tmp_path / "other")


def test_get_knows_the_published_names(tmp_path):
    for name in ("digits", "folder:x"):
        with pytest.raises(ConfigError, match="which is local; load it directly"):
            get(name, root=tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'cifar100'"):
        get("cifar-100", root=tmp_path)
    with pytest.raises(MissingDataError, match="expected train-images-idx3-ubyte"):
        get("mnist", source=tmp_path, root=tmp_path)


def test_a_leftover_of_a_killed_run_is_not_read(tmp_path):
    source = cifar_source("", CIFAR_FILES, CIFAR_TAR)
    hidden = tmp_path / ".unpack-x"
    hidden.mkdir()
    for name in CIFAR_FILES:
        (hidden / name).write_bytes(b"half")
    with pytest.raises(MissingDataError):
        read_source(source, "train", tmp_path)


def test_a_part_of_wrong_content_is_removed_so_that_the_next_call_succeeds(tmp_path, server):
    server.files["tiny.tar.gz"] = CIFAR_TAR
    source = cifar_source(server.url, CIFAR_FILES, CIFAR_TAR)
    part = tmp_path / "tiny" / "tiny.tar.gz.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 50)
    with pytest.raises(DataError, match="the file was removed, run the command again"):
        install(source, root=tmp_path)
    assert contents(install(source, root=tmp_path)) == CIFAR_FILES


# ---------------------------------------------------------------- augment


def test_augment_without_options_changes_nothing():
    images = torch.rand(4, 3, 5, 6)
    assert torch.equal(Augment()(images, torch.arange(4), 0), images)


@pytest.mark.parametrize(
    "augment", [Augment(crop=2), Augment(flip=True), Augment(cutout=3), Augment(brightness=0.5),
                Augment(contrast=0.5), Augment(saturation=1.0), Augment(noise=0.1),
                Augment(crop=1, flip=True, cutout=2, brightness=0.3, contrast=0.2, saturation=0.2, noise=0.1)]
)  # fmt: skip
def test_augment_does_not_depend_on_the_place_in_the_batch(augment):
    images, examples = torch.rand(50, 3, 6, 7), torch.arange(50) * 7
    whole = augment(images, examples, 5)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(augment(images[order], examples[order], 5), whole[order])
    assert torch.equal(torch.cat([augment(images[i : i + 1], examples[i : i + 1], 5) for i in range(50)]), whole)
    assert not torch.equal(augment(images, examples, 6), whole)
    assert whole.min() >= 0
    assert whole.max() <= 1


def shifts(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row and the column of the single white pixel of each image."""
    place = images.flatten(1).argmax(1)
    return place // images.shape[3], place % images.shape[3]


def test_crop_shifts_uniformly_and_pads_with_zeros():
    count, pad = 20_000, 2
    images = torch.zeros(count, 1, 9, 9)
    images[:, :, 4, 4] = 1
    out = Augment(crop=pad)(images, torch.arange(count), 3)
    assert torch.equal(out.flatten(1).sum(1), torch.ones(count))
    row, column = shifts(out)
    table = torch.bincount((row - 2) * 5 + column - 2, minlength=25).float()
    expected = count / 25
    chi2 = ((table - expected) ** 2 / expected).sum().item()
    assert chi2 < 24 + 5 * (2 * 24) ** 0.5  # mean and five standard deviations of chi-squared with 24 degrees
    ones = Augment(crop=pad)(torch.ones(500, 1, 9, 9), torch.arange(500), 3)
    rows, columns = shifts(out[:500])
    assert torch.equal(ones.flatten(1).sum(1), (9 - (rows - 4).abs()) * (9.0 - (columns - 4).abs()))


def test_crop_equals_padding_and_cutting_back():
    images = torch.rand(64, 2, 5, 6)
    marks = torch.zeros(64, 1, 5, 6)
    marks[:, :, 2, 3] = 1
    examples, augment = torch.arange(64), Augment(crop=2)
    row, column = shifts(augment(marks, examples, 9))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for image, pad, down, right in zip(augment(images, examples, 9), padded, row - 2, column - 3, strict=True):
        top, left = 2 - int(down), 2 - int(right)
        assert torch.equal(image, pad[:, top : top + 5, left : left + 6])


def test_flip_mirrors_half_of_the_images():
    count = 10_000
    images = torch.rand(count, 1, 2, 3)
    out = Augment(flip=True)(images, torch.arange(count), 1)
    mirrored = (out == images.flip(3)).flatten(1).all(1)
    assert torch.equal(mirrored | (out == images).flatten(1).all(1), torch.ones(count, dtype=torch.bool))
    assert abs(mirrored.float().mean().item() - 0.5) < 5 * 0.5 / count**0.5


@pytest.mark.parametrize("side", [1, 2, 3, 20])
def test_cutout_masks_a_square_around_any_pixel(side):
    count = 4000
    out = Augment(cutout=side)(torch.ones(count, 2, 6, 5), torch.arange(count), 2)
    assert torch.equal(out[:, 0], out[:, 1])
    holes = out[:, 0] == 0
    heights, widths = holes.any(2).sum(1), holes.any(1).sum(1)
    assert torch.equal(holes.flatten(1).sum(1), heights * widths)  # one rectangle
    assert heights.max() == min(side, 6)
    assert widths.max() == min(side, 5)
    assert heights.min() >= min((side + 1) // 2, 6)
    if side == 1:
        chi2 = ((holes.sum(0) - count / 30) ** 2 / (count / 30)).sum().item()
        assert chi2 < 29 + 5 * (2 * 29) ** 0.5


def test_brightness_multiplies_by_a_uniform_factor():
    count = 10_000
    out = Augment(brightness=0.4)(torch.full((count, 1, 1, 2), 0.5), torch.arange(count), 4)
    factor = out[:, 0, 0, 0] / 0.5
    assert torch.equal(out[..., 0], out[..., 1])
    assert factor.min() >= 0.6
    assert factor.max() <= 1.4
    assert abs(factor.mean().item() - 1) < 5 * 0.8 / 12**0.5 / count**0.5
    assert Augment(brightness=1.0)(torch.ones(100, 1, 1, 1), torch.arange(100), 0).max() <= 1


def test_noise_is_uniform_and_independent_between_the_numbers_of_an_image():
    count, most = 5000, 0.125
    change = Augment(noise=most)(torch.full((count, 1, 1, 2), 0.5), torch.arange(count), 4)[:, 0, 0] - 0.5
    u = (change + most) / (2 * most)
    assert u.min() >= 0
    assert u.max() <= 1
    table = torch.bincount((u * 5).long().clamp(max=4) @ torch.tensor([5, 1]), minlength=25).float()
    expected = count / 25
    chi2 = ((table - expected) ** 2 / expected).sum().item()
    assert chi2 < 24 + 5 * (2 * 24) ** 0.5
    images = torch.rand(64, 3, 5, 6)
    moved, both = Augment(crop=2), Augment(crop=2, noise=most)
    near = both(images, torch.arange(64), 4) - moved(images, torch.arange(64), 4)
    assert 0 < near.abs().max() <= most, "noise comes last, and changes no other draw"
    assert both(images, torch.arange(64), 4).max() <= 1


GREY = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(1, 3, 1, 1)


def test_contrast_scales_the_distance_from_the_grey_of_the_image():
    count = 5000
    images = 0.4 + 0.2 * torch.rand(count, 3, 2, 3, dtype=torch.float64)  # no pixel is clipped
    out = Augment(contrast=0.8)(images, torch.arange(count), 4)
    grey = (images * GREY).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    factors = ((out - grey) / (images - grey)).flatten(1)
    factor = factors.median(1).values
    torch.testing.assert_close(out, grey + factor.view(-1, 1, 1, 1) * (images - grey))
    assert factor.min() >= 0.2
    assert factor.max() <= 1.8
    assert abs(factor.mean().item() - 1) < 5 * 1.6 / 12**0.5 / count**0.5
    wide = Augment(contrast=1.0)(torch.rand(100, 3, 4, 4), torch.arange(100), 4)
    assert wide.min() >= 0
    assert wide.max() <= 1


def test_saturation_scales_the_distance_from_the_grey_of_the_pixel():
    count = 5000
    images = 0.4 + 0.2 * torch.rand(count, 3, 2, 3, dtype=torch.float64)
    out = Augment(saturation=0.8)(images, torch.arange(count), 4)
    grey = (images * GREY).sum(1, keepdim=True)
    factor = ((out - grey) / (images - grey)).flatten(1).median(1).values
    torch.testing.assert_close(out, grey + factor.view(-1, 1, 1, 1) * (images - grey))
    assert factor.min() >= 0.2
    assert factor.max() <= 1.8
    assert abs(factor.mean().item() - 1) < 5 * 1.6 / 12**0.5 / count**0.5
    torch.testing.assert_close((out * GREY).sum(1), (images * GREY).sum(1))  # the grey stays


def test_contrast_serves_any_number_of_channels_and_saturation_three():
    images = torch.rand(4, 1, 3, 3)
    assert not torch.equal(Augment(contrast=0.5)(images, torch.arange(4), 0), images)
    with refused(InputError, "expected images of three channels for saturation, got 1; leave it out"):
        Augment(saturation=0.5)(images, torch.arange(4), 0)


def test_cutmix_puts_a_rectangle_of_the_other_image_and_counts_it():
    count, height, width = 4000, 8, 5
    own, other = torch.zeros(count, 3, height, width), torch.ones(count, 3, height, width)
    examples = torch.arange(count) * 3
    images, share = Augment(cutmix=0.75).mix(own, other, examples, 1)
    assert torch.equal(images[:, 0], images[:, 2])
    foreign = images[:, 0] == 1
    torch.testing.assert_close(share, 1 - foreign.flatten(1).float().mean(1))
    heights, widths = foreign.any(2).sum(1), foreign.any(1).sum(1)
    assert torch.equal(foreign.flatten(1).sum(1), heights * widths)  # one rectangle, of a part of each side
    edges = foreign[:, 0].any(1) | foreign[:, -1].any(1) | foreign[:, :, 0].any(1) | foreign[:, :, -1].any(1)
    uncut = ~edges & (heights > 0)
    assert uncut.sum() > 100
    assert bool(((heights[uncut] / height - widths[uncut] / width).abs() < 1 / width).all())
    assert abs((share < 1).float().mean().item() - 0.75) < 0.1  # small rectangles vanish
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    again, shares = Augment(cutmix=0.75).mix(own[order], other[order], examples[order], 1)
    assert torch.equal(again, images[order])
    assert torch.equal(shares, share[order])
    untouched, ones = Augment().mix(own, other, examples, 1)
    assert torch.equal(untouched, own)
    assert torch.equal(ones, torch.ones(count))


def test_partners_lie_anywhere_in_the_set():
    augment, examples = Augment(cutmix=1.0), torch.arange(20_000)
    partners = augment.partners(examples, 1)
    table = torch.bincount(partners // 1000, minlength=20).float()
    assert ((table - 1000) ** 2 / 1000).sum().item() < 19 + 5 * (2 * 19) ** 0.5
    assert not torch.equal(augment.partners(examples, 2), partners)


def test_an_option_does_not_change_the_draws_of_another():
    images, examples = torch.rand(30, 1, 8, 8), torch.arange(30)
    both = Augment(crop=2, brightness=0.5)(images, examples, 3)
    assert torch.equal(both, Augment(brightness=0.5)(Augment(crop=2)(images, examples, 3), examples, 3))
    images = torch.rand(30, 3, 8, 8)
    both = Augment(contrast=0.5, saturation=0.5)(images, examples, 3)
    contrast = Augment(contrast=0.5)(images, examples, 3)
    torch.testing.assert_close(both, Augment(saturation=0.5)(contrast, examples, 3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": -1}, "crop to be a number of pixels, 0 or more, got -1"),
        ({"cutout": 1.5}, "cutout to be a number of pixels"),
        ({"crop": True}, "got True"),
        ({"cutmix": 1.5}, "cutmix, a share of the images, in"),
        ({"flip": 1}, "flip to be true or false, got 1"),
        ({"brightness": 1.1}, r"brightness in \[0, 1\], got 1.1"),
        ({"contrast": -0.1}, r"contrast in \[0, 1\], got -0.1"),
        ({"saturation": 1.5}, r"saturation in \[0, 1\], got 1.5"),
        ({"noise": 1.5}, r"noise in \[0, 1\], got 1.5"),
        ({"brightness": float("nan")}, r"brightness in \[0, 1\], got nan"),
    ],
)
def test_augment_refuses_bad_options(fields, message):
    with refused(InputError, message):
        Augment(**fields)


def test_augment_refuses_a_crop_beyond_the_image():
    with pytest.raises(InputError, match=r"crop below the image size \[3, 8\], got 3"):
        Augment(crop=3)(torch.zeros(2, 1, 3, 8), torch.arange(2), 0)
    with refused(InputError, "expected 2 integer examples"):
        Augment()(torch.zeros(2, 1, 3, 8), torch.arange(3), 0)


# ---------------------------------------------------------------- the real files


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SOURCES))
def test_real_sets(name):
    where = available()[name].where if os.environ.get("BITQUORUM_DATA") else None
    if where is None:
        pytest.skip(f"{name} is not in $BITQUORUM_DATA")
    assert all(fetch_module._is_valid(Path(where) / file.name, file) for file in SOURCES[name].files.values())
    for split, count in (("train", available()[name].train), ("test", available()[name].test)):
        data = load(name, split)
        assert len(data) == count
        if name != "mnist":
            assert set(torch.bincount(data.labels).tolist()) == {count // len(data.classes)}
    if name == "cifar10":
        mean = load(name, "train").images.double().mean((0, 2, 3)) / 255
        assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float64), atol=5e-5)
