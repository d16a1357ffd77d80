# SPDX-License-Identifier: Apache-2.0
"""The loaders accept the canonical files and refuse everything else by name."""

import gzip
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import dplip.data as data
from dplip.data import Dataset, Split, load, read_idx, schema, validate
from dplip.errors import ConfigError, DataError, DplipError, message

STEMS = tuple(data.MNIST_SHA256)


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder: Path, suffix: str = "", train: int = 7, test: int = 3) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    arrays = {}
    for stem, count in zip(STEMS, (train, train, test, test), strict=True):
        shape, top = ((count, 28, 28), 256) if "images" in stem else ((count,), 10)
        arrays[stem] = generator.integers(0, top, shape, dtype=np.uint8)
        content = idx(arrays[stem])
        (folder / f"{stem}{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    return arrays


@pytest.fixture(autouse=True)
def no_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """No test reads the user's settings, fills the user's cache or reaches a network."""
    if "data_dir" in request.fixturenames:
        request.getfixturevalue("data_dir")  # read before the variable goes
    monkeypatch.delenv("DPLIP_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "MNIST_MIRROR", (tmp_path / "mirror").as_uri() + "/")


@pytest.mark.parametrize("place", ["mnist", ".", "MNIST/raw"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_from_each_layout(tmp_path: Path, place: str, suffix: str) -> None:
    arrays = write_mnist(tmp_path / "d" / place, suffix)
    ds = load("mnist", tmp_path / "d")
    assert (ds.name, ds.num_classes, ds.input_shape, ds.domain) == ("mnist", 10, (1, 28, 28), (0.0, 1.0))
    for split, part in ((ds.train, "train"), (ds.test, "t10k")):
        images, labels = arrays[f"{part}-images-idx3-ubyte"], arrays[f"{part}-labels-idx1-ubyte"]
        assert split.x.shape == (len(images), 1, 28, 28)
        assert torch.equal(split.x.mul(255).round().byte()[:, 0], torch.from_numpy(images))
        assert split.y.tolist() == labels.tolist()


def test_environment_names_the_folder_and_argument_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "env", train=7)
    write_mnist(tmp_path / "arg", train=5)
    monkeypatch.setenv("DPLIP_DATA", str(tmp_path / "env"))
    assert len(load("mnist").train.x) == 7
    assert len(load("mnist", str(tmp_path / "arg")).train.x) == 5


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_missing_folder_is_never_replaced_by_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    serve(tmp_path, monkeypatch)
    monkeypatch.setenv("DPLIP_DATA", str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"absent: expected an existing folder.*correct or unset"):
        load("mnist", tmp_path / "absent" if by == "argument" else None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"four MNIST IDX files.*--data-dir, DPLIP_DATA"):
        load("mnist", tmp_path / "empty")
    assert not (tmp_path / "cache").exists()


def test_files_are_not_mixed_across_folders(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist")
    write_mnist(tmp_path)
    (tmp_path / "mnist" / STEMS[0]).unlink()
    (tmp_path / STEMS[3]).unlink()
    with pytest.raises(DataError) as caught:
        load("mnist", tmp_path)
    assert str(tmp_path / "mnist" / STEMS[0]) in str(caught.value)
    assert str(tmp_path / STEMS[3]) in str(caught.value)


GOOD = idx(np.arange(6, dtype=np.uint8).reshape(3, 2))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty file"),
        (GOOD[:3], "00000"),
        (GOOD[:9], "header of 12 bytes, got 9"),
        (b"\x00\x00\x0d\x02" + GOOD[4:], "00000d02"),
        (b"\x00\x00\x08\x03" + GOOD[4:], "00000803"),
        (b"\x01" + GOOD[1:], "01000802"),
        (GOOD[:-1], "6 bytes of data .* got 5"),
        (GOOD + b"\x00", "6 bytes of data .* got more"),
        (idx(np.zeros((0, 2), np.uint8)), r"shape \(0, 2\)"),
        (b"\x00\x00\x08\x02" + b"\xff" * 8 + b"x", "between 1 and"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_damaged_idx(tmp_path: Path, content: bytes, says: str, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(DataError, match=says) as caught:
        read_idx(path, ndim=2)
    assert str(path) in str(caught.value) and "replace it" in str(caught.value)


@pytest.mark.parametrize("cut", [1, 5, 9, 15, 30])
def test_truncated_gzip(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(idx(np.arange(200, dtype=np.uint8).reshape(100, 2)))[:-cut])
    with pytest.raises(DataError, match=r"file\.gz"):
        read_idx(path, ndim=2)


@pytest.mark.parametrize("position", range(10, 30))
def test_flipped_byte_in_gzip(tmp_path: Path, position: int) -> None:
    content = bytearray(gzip.compress(GOOD, mtime=0))
    content[position] ^= 0xFF
    (tmp_path / "file.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"file\.gz"):
        read_idx(tmp_path / "file.gz", ndim=2)


def test_not_gzip_and_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "file.gz").write_bytes(GOOD)
    with pytest.raises(DataError, match="BadGzipFile"):
        read_idx(tmp_path / "file.gz", ndim=2)
    with pytest.raises(DataError, match="FileNotFoundError"):
        read_idx(tmp_path / "absent", ndim=2)


@pytest.mark.parametrize(
    ("stem", "array", "says"),
    [
        (STEMS[1], np.full(7, 10, np.uint8), r"labels in 0\.\.9, got 10\.\.10"),
        (STEMS[1], np.zeros(6, np.uint8), "7 images in train-images.* and 6 labels"),
        (STEMS[2], np.zeros((3, 27, 28), np.uint8), r"shape \(1, 28, 28\), got \(1, 27, 28\)"),
        (STEMS[2], np.zeros((0, 28, 28), np.uint8), "between 1 and"),
    ],
)
def test_inconsistent_mnist(tmp_path: Path, stem: str, array: np.ndarray, says: str) -> None:
    write_mnist(tmp_path)
    (tmp_path / stem).write_bytes(idx(array))
    with pytest.raises(DataError, match=says) as caught:
        load("mnist", tmp_path)
    assert stem in str(caught.value)


def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sets up a mirror of four small files and declares them canonical."""
    arrays = write_mnist(tmp_path / "mirror", ".gz")
    sums = {stem: hashlib.sha256(idx(array)).hexdigest() for stem, array in arrays.items()}
    monkeypatch.setattr(data, "MNIST_SHA256", sums)
    return tmp_path / "mirror"


def test_download_fills_the_cache_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = serve(tmp_path, monkeypatch)
    first = load("mnist")
    for path in mirror.iterdir():
        path.unlink()
    second = load("mnist")  # from the cache: the mirror is empty now
    assert torch.equal(first.train.x, second.train.x) and torch.equal(first.test.y, second.test.y)
    assert sorted(p.name for p in (tmp_path / "cache/dplip/mnist").iterdir()) == sorted(STEMS)


def test_download_with_the_wrong_content_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = serve(tmp_path, monkeypatch)
    other = gzip.compress(idx(np.zeros((7, 28, 28), np.uint8)))
    (mirror / f"{STEMS[0]}.gz").write_bytes(other)
    with pytest.raises(DataError, match="content of sha256"):
        load("mnist")
    assert not (tmp_path / "cache").exists()


def test_truncated_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = serve(tmp_path, monkeypatch) / f"{STEMS[0]}.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="EOFError"):
        load("mnist")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["truncated", "other"])
def test_damaged_cache_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    serve(tmp_path, monkeypatch)
    load("mnist")
    path = tmp_path / "cache/dplip/mnist" / STEMS[1]
    path.write_bytes(path.read_bytes()[:-1] if damage == "truncated" else idx(np.zeros(7, np.uint8)))
    with pytest.raises(DataError, match=rf"{STEMS[1]}.*delete it"):
        load("mnist")


def test_no_network_names_both_ways_out() -> None:
    with pytest.raises(DataError, match=r"--data-dir, DPLIP_DATA.*network"):
        load("mnist")


def test_digits_is_fixed_and_complete() -> None:
    ds = load("digits")
    assert ds.train.x.shape == (1437, 1, 8, 8) and ds.test.x.shape == (360, 1, 8, 8)
    assert ds.train.x.min() == 0.0 and ds.train.x.max() == 1.0
    assert torch.bincount(ds.test.y, minlength=10).min() >= 20
    content = b"".join(t.numpy().tobytes() for t in (*ds.train, *ds.test))
    assert hashlib.sha256(content).hexdigest() == DIGITS_SHA256
    from sklearn.datasets import load_digits

    both = torch.cat([ds.train.x, ds.test.x]).flatten(1).mul(16)
    ours = sorted(map(tuple, torch.cat([both, torch.cat([ds.train.y, ds.test.y])[:, None]], 1).tolist()))
    theirs = load_digits()
    assert ours == sorted(map(tuple, np.column_stack([theirs.data, theirs.target]).tolist()))


DIGITS_SHA256 = "dd315a53069dc0bcdea0d26e2466cc3dbe7eca035b3d02699329c901cf82f69c"


@pytest.mark.parametrize("find", [load, schema])
def test_unknown_name(find: Callable[[str], object]) -> None:
    with pytest.raises(ConfigError, match="one of digits, mnist, got 'cifar'"):
        find("cifar")


def test_schema_tells_the_truth_without_reading(tmp_path: Path) -> None:
    assert set(data.SCHEMAS) == set(data.DATASETS)
    write_mnist(tmp_path)
    for name in data.DATASETS:
        assert schema(name) == load(name, tmp_path).schema


X, Y = torch.rand(4, 2, 3), torch.tensor([0, 1, 2, 1])
BAD = {
    "nan": (X.clone().index_put_((torch.tensor(3), torch.tensor(1)), torch.tensor(float("nan"))), Y, "NaN"),
    "inf": (
        X.clone().index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(float("inf"))),
        Y,
        "NaN or",
    ),
    "float64": (X.double(), Y, "float32"),
    "int32 labels": (X, Y.int(), "int64"),
    "above": (X + 1.0, Y, r"inputs in \[0.0, 1.0\]"),
    "just above": (X.clamp(max=0.5) + 0.5 + 2e-7, Y, r"inputs in"),
    "below": (X - 1e-3 - X.min(), Y, r"inputs in"),
    "empty": (X[:0], Y[:0], "at least one"),
    "no entries": (X[:, :, :0], Y, "at least one"),
    "flat": (X[:, 0, 0], Y, r"\[N, ...\]"),
    "one-hot": (X, torch.eye(4, dtype=torch.int64), r"\[N\]"),
    "count": (X, Y[:3], "4 inputs and 3 labels"),
    "shape": (X.transpose(1, 2), Y, r"\(2, 3\), got \(3, 2\)"),
    "negative label": (X, Y - 1, r"0\.\.2, got -1\.\.1"),
    "label too large": (X, Y + 1, r"0\.\.2, got 1\.\.3"),
    "array": (X.numpy(), Y, "ndarray"),
}


@pytest.mark.parametrize("case", BAD)
def test_validate_refuses(case: str) -> None:
    x, y, says = BAD[case]
    with pytest.raises(DataError, match=says) as caught:
        validate(x, y, 3, (2, 3), where="here")
    assert str(caught.value).startswith("here: expected ") and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="bad test"):
        Dataset("bad", Split(X, Y), Split(x, y), 3, (2, 3))


def test_validate_accepts_the_closed_domain() -> None:
    validate(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]), 2)
    validate(torch.tensor([[-2.0], [3.0]]), torch.tensor([0, 1]), 2, domain=(-2.0, 3.0))


def test_message_is_one_line() -> None:
    assert message("a", "b\n c", "d", "do e") == "a: expected b c, got d; do e"
    assert issubclass(DataError, DplipError)


def test_real_mnist_is_canonical(data_dir: Path) -> None:
    for stem, digest in data.MNIST_SHA256.items():
        content = gzip.decompress((data_dir / "mnist" / f"{stem}.gz").read_bytes())
        assert hashlib.sha256(content).hexdigest() == digest
    ds = load("mnist", data_dir)
    assert (len(ds.train.x), len(ds.test.x)) == (60000, 10000)
    assert torch.bincount(ds.test.y).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
