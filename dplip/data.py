# SPDX-License-Identifier: Apache-2.0
"""Public benchmark data sets, checked on the way in.

`load` returns a `Dataset` whose inputs are float32 in a declared domain and whose labels are int64. Nothing
is normalised by statistics of the data, since those would cost privacy budget. MNIST is read from IDX files
(LeCun, Cortes and Burges, "The MNIST database of handwritten digits"); digits is scikit-learn's copy of
Alpaydin and Kaynak's "Optical Recognition of Handwritten Digits" (UCI), test part.

These sets are public: an epsilon computed on them protects nobody in them.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import math
import os
import tempfile
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dplip.errors import ConfigError, DataError, message

__all__ = [
    "DATASETS",
    "Dataset",
    "Schema",
    "Split",
    "digits",
    "load",
    "mnist",
    "read_idx",
    "schema",
    "validate",
]

MNIST_MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# sha256 of the decompressed canonical files.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
DOWNLOAD_TIMEOUT = 30.0  # seconds without progress
MAX_BYTES = 1 << 30  # refuses headers and downloads that claim more than any set here holds


class Split(NamedTuple):
    """Inputs ``x`` of shape [N, ...] (float32) and labels ``y`` of shape [N] (int64)."""

    x: Tensor
    y: Tensor


class Schema(NamedTuple):
    """What is public about a data set without opening it: shapes, classes, and the range of every entry."""

    input_shape: tuple[int, ...]
    num_classes: int
    domain: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set, valid by construction.

    Attributes:
        name: The name that `load` knows it by.
        train: Training inputs and labels.
        test: Held-out inputs and labels.
        num_classes: Labels are 0 .. num_classes - 1.
        input_shape: Shape of one input, batch axis excluded.
        domain: Public interval that holds every entry of every input; not computed from the data.

    Raises:
        DataError: A split breaks what `validate` checks.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    input_shape: tuple[int, ...]
    domain: tuple[float, float] = (0.0, 1.0)

    @property
    def schema(self) -> Schema:
        """The public part."""
        return Schema(self.input_shape, self.num_classes, self.domain)

    def __post_init__(self) -> None:
        for part, (x, y) in (("train", self.train), ("test", self.test)):
            validate(x, y, self.num_classes, self.input_shape, self.domain, where=f"{self.name} {part}")


def validate(
    x: Tensor,
    y: Tensor,
    num_classes: int,
    input_shape: tuple[int, ...] | None = None,
    domain: tuple[float, float] = (0.0, 1.0),
    where: str = "data",
) -> None:
    """Checks what every bound and certificate takes for granted about its data.

    Args:
        x: Inputs, expected float32 of shape [N, *input_shape], finite and within ``domain``.
        y: Labels, expected int64 of shape [N] within 0 .. num_classes - 1.
        num_classes: Number of classes, at least 1.
        input_shape: Expected shape of one input; any if None.
        domain: Closed interval for every entry of ``x``.
        where: Name of the data, for the message.

    Raises:
        DataError: Wrong type, shape or count, no examples, NaN or Inf, or a value outside its range.
    """

    def check(ok: bool, expected: str, got: str, remedy: str) -> None:
        if not ok:
            raise DataError(message(where, expected, got, remedy))

    for label, t, dtype in (("inputs", x, torch.float32), ("labels", y, torch.int64)):
        check(isinstance(t, Tensor), f"{label} as a tensor", type(t).__name__, f"convert the {label}")
        check(t.dtype == dtype, f"{label} of type {dtype}", str(t.dtype), f"convert the {label}")
    check(x.dim() >= 2, "inputs of shape [N, ...]", str(tuple(x.shape)), "add the missing axes")
    check(y.dim() == 1, "labels of shape [N]", str(tuple(y.shape)), "give one class index per example")
    check(len(x) == len(y), "as many labels as inputs", f"{len(x)} inputs and {len(y)} labels", "pair them")
    check(x.numel() > 0, "at least one example", f"inputs of shape {tuple(x.shape)}", "supply examples")
    if input_shape is not None:
        shape = tuple(x.shape[1:])
        check(shape == tuple(input_shape), f"inputs of shape {tuple(input_shape)}", f"{shape}", "reshape them")
    low, high = (float(v) for v in x.aminmax())  # NaN propagates to both
    finite = math.isfinite(low) and math.isfinite(high)
    check(finite, "finite inputs", "NaN or Inf", "remove or repair those examples")
    inside = domain[0] <= low and high <= domain[1]
    check(inside, f"inputs in [{domain[0]}, {domain[1]}]", f"[{low}, {high}]", "rescale by a public constant")
    first, last = (int(v) for v in y.aminmax())
    legal = first >= 0 and last < num_classes
    check(legal, f"labels in 0..{num_classes - 1}", f"{first}..{last}", "correct the labels or num_classes")


def schema(name: str) -> Schema:
    """The schema of the data set called ``name``, without reading it.

    Raises:
        ConfigError: No data set has this name.
    """
    _known(name)
    return SCHEMAS[name]


def _known(name: str) -> None:
    if name not in DATASETS:
        known = ", ".join(sorted(DATASETS))
        raise ConfigError(message("data set", f"one of {known}", repr(name), "correct the name"))


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads the data set called ``name``.

    Args:
        name: A key of `DATASETS`.
        data_dir: Folder that holds the files; else the environment variable DPLIP_DATA; else a cache folder
            (``$XDG_CACHE_HOME/dplip``, by default ``~/.cache/dplip``) that is filled by download. A folder
            that was named is only read: nothing is ever downloaded in its place.

    Raises:
        ConfigError: No data set has this name.
        DataError: The named folder or its files are absent or damaged, or the download failed.
    """
    _known(name)
    source = "data_dir (--data-dir)" if data_dir is not None else "DPLIP_DATA"
    given = data_dir if data_dir is not None else os.environ.get("DPLIP_DATA") or None
    folder = None if given is None else Path(given).expanduser()
    if folder is not None and not folder.is_dir():
        raise DataError(message(f"{source}={given}", "an existing folder", "none", "correct or unset it"))
    return DATASETS[name](folder)


def mnist(folder: Path | None = None) -> Dataset:
    """MNIST: x of shape [N, 1, 28, 28], grey level / 255; 10 classes; 60,000 train and 10,000 test.

    The four IDX files, plain or gzipped, are looked for in ``folder/mnist``, ``folder`` and torchvision's
    ``folder/MNIST/raw``; all four must lie in one of them. Without a folder they come from the cache.

    Raises:
        DataError: A file is absent, damaged or inconsistent with the others, or the download failed.
    """
    files = _cached_mnist() if folder is None else _find_mnist(folder)
    splits = []
    for part in ("train", "t10k"):
        image_file, label_file = files[f"{part}-images-idx3-ubyte"], files[f"{part}-labels-idx1-ubyte"]
        images, labels = read_idx(image_file, ndim=3), read_idx(label_file, ndim=1)
        if len(images) != len(labels):
            got = f"{len(images)} images in {image_file.name} and {len(labels)} labels"
            raise DataError(message(str(label_file), "one label per image", got, "replace both files"))
        x, y = torch.from_numpy(images).unsqueeze(1).float().div_(255), torch.from_numpy(labels).long()
        validate(x, y, 10, (1, 28, 28), where=f"{image_file} with {label_file.name}")
        splits.append(Split(x, y))
    return Dataset("mnist", splits[0], splits[1], SCHEMAS["mnist"].num_classes, SCHEMAS["mnist"].input_shape)


def digits(folder: Path | None = None) -> Dataset:
    """scikit-learn's digits: x of shape [N, 1, 8, 8], count / 16; 10 classes; 1,437 train and 360 test.

    The set ships with scikit-learn, so ``folder`` is not read. It has no official split: this one is a fixed
    permutation from NumPy's frozen ``RandomState(0)`` stream, the last 360 examples held out.
    """
    from sklearn.datasets import load_digits  # heavy, and only this set needs it

    bunch = load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))
    x = torch.from_numpy(bunch.images[order]).float().unsqueeze(1).div_(16)
    y = torch.from_numpy(bunch.target[order]).long()
    train, test = Split(x[:1437], y[:1437]), Split(x[1437:], y[1437:])
    return Dataset("digits", train, test, SCHEMAS["digits"].num_classes, SCHEMAS["digits"].input_shape)


def read_idx(path: Path, ndim: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Reads an IDX file of unsigned bytes, gzipped if its name ends in ``.gz``.

    Layout: bytes 0, 0, 8 (unsigned byte), ndim; then ``ndim`` big-endian 32-bit sizes; then exactly their
    product of bytes.

    Raises:
        DataError: Wrong magic number, a size of zero or beyond reason, missing or extra bytes, broken gzip.
    """

    def broken(expected: str, got: str) -> DataError:
        return DataError(message(str(path), expected, got, "replace it with an intact copy"))

    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * ndim)
            if header[:4] != bytes((0, 0, 8, ndim)):
                raise broken(f"IDX magic number 000008{ndim:02x}", header[:4].hex() or "an empty file")
            if len(header) != 4 + 4 * ndim:
                raise broken(f"a header of {4 + 4 * ndim} bytes", f"{len(header)}")
            shape = tuple(int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4))
            size = math.prod(shape)
            if not 0 < size <= MAX_BYTES:
                raise broken(f"between 1 and {MAX_BYTES} entries", f"shape {shape}")
            body = file.read(size + 1)  # one more than due, to notice trailing bytes (and check gzip's CRC)
    except (OSError, EOFError, zlib.error) as error:
        raise broken("a readable file", f"{type(error).__name__}: {error}") from error
    if len(body) != size:
        raise broken(f"{size} bytes of data for shape {shape}", "more" if len(body) > size else f"{len(body)}")
    return np.frombuffer(bytearray(body), np.uint8).reshape(shape)


def _find_mnist(folder: Path) -> dict[str, Path]:
    """Returns the path of each MNIST file, all from one folder."""
    missing: list[str] = []
    for place in (folder / "mnist", folder, folder / "MNIST" / "raw"):
        paths = [place / f"{stem}{end}" for stem in MNIST_SHA256 for end in (".gz", "")]
        found = {path.name.removesuffix(".gz"): path for path in paths if path.is_file()}  # plain wins
        if len(found) == len(MNIST_SHA256):
            return found
        if found:
            missing += [str(place / stem) for stem in MNIST_SHA256 if stem not in found]
    expected = f"the four MNIST IDX files (plain or .gz) in {folder}/mnist, {folder} or {folder}/MNIST/raw"
    got = f"no {', no '.join(missing)}" if missing else "none of them"
    raise DataError(message("mnist", expected, got, "put them there or name another folder (--data-dir, DPLIP_DATA)"))


def _cached_mnist() -> dict[str, Path]:
    """Returns the path of each MNIST file in the cache, verified; downloads those that are absent."""
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))  # a relative one is to be ignored, says the XDG standard
    folder = (xdg if xdg.is_absolute() else Path.home() / ".cache") / "dplip" / "mnist"
    files = {stem: folder / stem for stem in MNIST_SHA256}
    for stem, path in files.items():
        if not path.is_file():
            _download(MNIST_MIRROR + stem + ".gz", path, MNIST_SHA256[stem])
            continue
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise DataError(message(str(path), "a readable file", str(error), "delete it")) from error
        if digest != MNIST_SHA256[stem]:
            remedy = "delete it to download it again"
            raise DataError(message(str(path), f"content of sha256 {MNIST_SHA256[stem]}", digest, remedy))
    return files


def _download(url: str, path: Path, sha256: str) -> None:
    """Fetches a gzip file and stores its decompressed content, whole and verified or not at all."""
    remedy = f"name a folder that holds {path.name} (--data-dir, DPLIP_DATA) or connect to a network"
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as reply, gzip.open(reply) as file:
            content = file.read(MAX_BYTES)
    except (OSError, EOFError, http.client.HTTPException, zlib.error) as error:
        raise DataError(message(url, "a download", f"{type(error).__name__}: {error}", remedy)) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise DataError(message(url, f"content of sha256 {sha256}", digest, remedy))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(content)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise DataError(message(str(path), "a writable cache", str(error), "set XDG_CACHE_HOME")) from error


SCHEMAS = {"digits": Schema((1, 8, 8), 10), "mnist": Schema((1, 28, 28), 10)}
DATASETS: dict[str, Callable[[Path | None], Dataset]] = {"digits": digits, "mnist": mnist}
