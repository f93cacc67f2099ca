"""Does it matter which samples go into a batch? Vision and language, with statistics that can answer.

Method: a strategy names the samples of each batch; data, first weights, seeds, optimizer and epochs are the same. A
paired t-test across several seeds (Holm's correction over strategies) says whether the last test accuracy differs from
that of `random`, with the difference and its 95 % interval.

    python batch_selection.py                                 # MNIST (digits where it cannot be had), all strategies
    python batch_selection.py --quick                         # everything, small, no network: under a minute
    python batch_selection.py --dataset fashion_mnist_csv --strategy random smart --no-benchmark
    python batch_selection.py --label-noise 0.1               # loss-based selection is known to suffer
    python batch_selection.py --task nlp                      # a byte-level transformer on Python's own source
    python batch_selection.py --list-datasets                 # and --download NAME…, --check-device
    python batch_selection.py --resume                        # go on with the newest unfinished run

Strategies. A tracked loss of every training sample is kept: its first cross-entropy, then the moving average
decay · old + (1 − decay) · new (--ema-decay 0: its last loss). An unseen sample counts as infinitely hard.
    random              every sample once an epoch, in a new order
    fixed               every sample once an epoch, in the order of the file
    smart               half of a batch drawn from all samples, half from those whose tracked loss is among the top 20 %
    loss_threshold      an epoch of the samples whose tracked loss is above a threshold, never fewer than a batch
    selective_backprop  Jiang et al. 2019: a sample is trained on with the probability of its loss's percentile

Samples are those trained on; seconds those of training and of the forward passes that choose. Written to
outputs/vision/run-001/ (the next free number; nlp: outputs/nlp/): results.json, summary.txt, comparison_*.png,
benchmark.png; to outputs/vision/DATASET/STRATEGY/run-001/: the same of one strategy, and seed-42.pt, … for --resume.

To add a strategy, a data set or a model, write one function or class and one entry in a dictionary:
    STRATEGIES["hardest"] = lambda loss, score, args, rng: iter([np.argsort(-loss)[: args.batch_size]])
    DATASETS["mine"] = Dataset(10, 70_000, 55, read_mine)     # read_mine(folder): x_train, y_train, x_test, y_test
    MODELS["vision"]["linear"] = lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(shape.numel(), classes))

Sources: github.com/Human-Augment-Analytics/Training-Batch-Selection, whose "smart" credited each sample with the mean
loss of its batch (`--smart-loss batch-mean` keeps that). Selective-Backprop: Jiang et al. 2019, arXiv:1910.00762.
MNIST: LeCun et al. 1998; Fashion-MNIST: Xiao et al. 2017; QMNIST: Yadav and Bottou 2019; CIFAR: Krizhevsky 2009;
CINIC-10: Darlow et al. 2018; digits: scikit-learn. Holm 1979. Transformer: Vaswani et al. 2017, pre-norm.
"""

import argparse
import contextlib
import dataclasses
import gzip
import hashlib
import http.client
import importlib.metadata
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import joblib
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from common import COLORS, detect_device, in_notebook, mean_and_interval, new_figure, plot_curve, save_figure

try:
    import resource
except ImportError:  # Windows
    resource = None

# What is measured after each epoch (its axis label), and which of them decides: (name, sign of better, unit)
METRICS = {
    "vision": {"test_acc": "test accuracy [%]", "train_acc": "training accuracy [%]", "test_loss": "test loss",
               "train_loss": "training loss"},
    "nlp": {"bits_per_byte": "validation [bits per byte]", "perplexity": "validation perplexity per byte",
            "validation_loss": "validation loss", "train_loss": "training loss"},
}
DECIDING = {"vision": ("test_acc", 1, "points"), "nlp": ("bits_per_byte", -1, "bits per byte")}
MARKERS = "osv^D"
BASELINE = "random"
MIN_RUNS = 3  # a paired t-test of two runs has one degree of freedom
ALPHA = 0.05


class UserError(Exception):
    """Something that the user can put right: main() makes it one line on stderr and exit code 2."""


def note(text):
    print(f"batch_selection.py: {text}", file=sys.stderr)


@contextlib.contextmanager
def whole_file(path):
    """Write to a temporary name, which takes the place of `path` only at the end; a full disk, no rights: UserError."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # a worker may outlive a killed run for a while
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb+") as file:
            yield file
        part.replace(path)
    except (OSError, RuntimeError) as problem:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path}: {problem}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


# --- Strategies -------------------------------------------------------------------------------------------------------
# One signature: strategy(loss, score, args, rng) yields the batches of one epoch, each an int64 array of rows.
#   loss    tracked loss [samples], inf where unseen; the training loop brings it up to date after every batch
#   score   score(rows) is the present loss of these samples [rows], by one forward pass without gradients
#   args    the command line; rng a numpy Generator


def random_batches(loss, score, args, rng):
    """Every sample once an epoch, in a new random order; the last batch may be smaller."""
    order = rng.permutation(len(loss))
    for start in range(0, len(order), args.batch_size):
        yield order[start : start + args.batch_size]


def fixed_batches(loss, score, args, rng):
    """Every sample once an epoch, always in the order of the file."""
    for start in range(0, len(loss), args.batch_size):
        yield np.arange(start, min(start + args.batch_size, len(loss)))


def kth_largest(values, k, guess):
    """The k-th largest of `values`, exactly; fast where it is near `guess`, as it is from batch to batch."""
    above = values >= 0.97 * guess
    rank = np.count_nonzero(above) - k
    if guess == np.inf and rank >= 0:
        return guess
    near = values[above & (values <= 1.03 * guess)]
    if not 0 <= rank < len(near):
        near, rank = values, len(values) - k
    return np.partition(near, rank)[rank]


def smart_batches(loss, score, args, rng):
    """A part of each batch from all samples, the rest from the hardest (all that tie with the last of them belong).

    Both parts are drawn without replacement; a sample may be in both. The hardest are found anew every --refresh
    batches. As in the seed, but with each sample's own loss and without sorting.
    """
    k, threshold = max(1, round(args.top_k_frac * len(loss))), np.float32(np.inf)
    for step, start in enumerate(range(0, len(loss), args.batch_size)):
        size = min(args.batch_size, len(loss) - start)  # an epoch is as many samples as random's
        explore = round(args.explore_frac * size)
        if step % args.refresh == 0:
            threshold = kth_largest(loss, k, threshold)
            hardest = np.flatnonzero(loss >= threshold)
        drawn = rng.choice(len(loss), explore, replace=False)
        yield np.concatenate([drawn, rng.choice(hardest, min(size - explore, len(hardest)), replace=False)])


def loss_threshold_batches(loss, score, args, rng):
    """An epoch of the samples above --loss-threshold only, in random order; of the hardest, if less than a batch is.

    The seed's language strategy. A sample that has once fallen below is not seen again, so its loss stays as it was.
    """
    rows = np.flatnonzero(loss > args.loss_threshold)
    if len(rows) < args.batch_size:
        rows = np.argsort(-loss, kind="stable")[: args.batch_size]
    for batch in random_batches(rows, score, args, rng):
        yield rows[batch]


def selective_backprop_batches(loss, score, args, rng, history=1024):
    """Selective-Backprop (Jiang et al. 2019, arXiv:1910.00762): a forward pass for all, training for the chosen.

    A sample is chosen with probability percentile ** --selectivity, its percentile being that of its present loss
    among the last `history` losses of this epoch; the chosen wait until they fill a batch.
    """
    recent, chosen = np.empty(0), np.empty(0, int)
    for candidates in random_batches(loss, score, args, rng):
        losses = score(candidates)
        recent = np.concatenate([recent, losses])[-history:]
        percentile = np.searchsorted(np.sort(recent), losses, side="right") / len(recent)
        lucky = rng.random(len(candidates)) < percentile**args.selectivity
        chosen = np.concatenate([chosen, candidates[lucky]])
        if len(chosen) >= args.batch_size:
            yield chosen[: args.batch_size]
            chosen = chosen[args.batch_size :]
    if len(chosen):
        yield chosen


STRATEGIES = {"random": random_batches, "fixed": fixed_batches, "smart": smart_batches,
              "loss_threshold": loss_threshold_batches, "selective_backprop": selective_backprop_batches}


def track(loss, rows, new, decay):
    """Bring the tracked `loss` [samples] of `rows` up to date: the first loss as it is, then the moving average."""
    old = loss[rows]
    with np.errstate(invalid="ignore"):  # unseen, decay 0: 0 · inf
        loss[rows] = np.where(np.isinf(old), new, decay * old + (1 - decay) * new)


# --- Data: known data sets --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Dataset:
    """A known data set. read(folder) gives x_train, y_train, x_test, y_test: x uint8 [n, channels, height, width]."""

    num_classes: int
    samples: int
    megabytes: float  # as downloaded
    read: Callable
    url: str = ""  # where its files lie; empty: embedded
    files: dict = dataclasses.field(default_factory=dict)  # name: published MD5
    also: tuple = ()  # other folders where they may be


@contextlib.contextmanager
def reading(path):
    """Turn whatever a truncated or wrong file raises into one line that names the file and its checksum."""
    try:
        yield
    except (OSError, EOFError, ValueError, LookupError, zlib.error, tarfile.TarError) as problem:
        if not path.is_file():
            raise UserError(f"{path}: {problem}") from None
        dataset = DATASETS.get(path.parent.name.replace("-", "_"))  # its folder has its name, Debian's too
        published = dataset and dataset.files.get(path.name)
        with path.open("rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        raise UserError(f"{path} is truncated or not what its name says ({str(problem) or 'it ends too early'}); its "
                        f"MD5 is {md5}, published: {published}; delete it, then run again to download it") from None


def read_idx(path, dimensions):
    """The array in a gzipped IDX file: magic (type code, number of dimensions), big-endian sizes, values."""
    with reading(path):
        content = gzip.decompress(path.read_bytes())
        if content[:2] != b"\0\0" or content[2] not in (8, 12) or content[3] != dimensions:
            raise ValueError("no such IDX header")
        shape = np.frombuffer(content, ">i4", dimensions, 4)
        return np.frombuffer(content, {8: ">u1", 12: ">i4"}[content[2]], offset=4 + 4 * dimensions).reshape(shape)


def read_mnist(folder, parts=("train", "t10k"), labels="labels-idx1-ubyte.gz", label_dimensions=1):
    """MNIST's four files; QMNIST's labels have eight columns, of which the first is the class."""
    arrays = []
    for part in parts:
        arrays.append(read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)[:, None])
        y = read_idx(folder / f"{part}-{labels}", label_dimensions)
        arrays.append(y.reshape(len(y), -1)[:, 0])
    return arrays


def read_cifar(path, label_bytes):
    """CIFAR's binary archive: records of one label (CIFAR-100: coarse, then fine) and 3 × 32 × 32 bytes."""
    with reading(path), tarfile.open(path) as archive:
        files = {Path(member.name).name: np.frombuffer(archive.extractfile(member).read(), np.uint8)
                 for member in archive if member.name.endswith(".bin")}  # in the order of the archive: no going back
        arrays = []
        for is_test in (False, True):
            part = [files[name] for name in sorted(files) if name.startswith("test") == is_test]
            records = np.concatenate(part).reshape(-1, label_bytes + 3072)
            arrays += [records[:, label_bytes:].reshape(-1, 3, 32, 32), records[:, label_bytes - 1]]
    return arrays


def read_cinic(folder):
    """CINIC-10's folders train/CLASS/*.png and test/CLASS/*.png, or its archive; `valid` is left aside.

    In a fixed random order, since the folders are sorted by class.
    """
    from PIL import Image

    archive = folder / "CINIC-10.tar.gz"

    def files():  # (path, content)
        if archive.exists():
            with reading(archive), tarfile.open(archive) as members:
                yield from ((member.name, members.extractfile(member).read()) for member in members if member.isfile())
        else:
            yield from ((str(path), path.read_bytes()) for path in sorted(folder.glob("t*/*/*.png")))

    parts = {"train": ([], []), "test": ([], [])}
    for path, content in tqdm(files(), "CINIC-10", unit=" files", leave=False):
        *_, part, label, name = "", "", *Path(path).parts
        if part in parts and name.endswith(".png"):
            try:
                image = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))  # [height, width, channel]
            except OSError:
                raise UserError(f"{path} in {folder} is not a whole PNG image; delete it or unpack it again") from None
            for values, value in zip(parts[part], (image.transpose(2, 0, 1), label)):
                values.append(value)
    classes, arrays = sorted(set(parts["train"][1])), []
    if not classes or set(parts["test"][1]) != set(classes):
        raise UserError(f"{folder} needs train/CLASS/*.png and test/CLASS/*.png with the same classes")
    for images, labels in parts.values():
        if len(sizes := {image.shape[1:] for image in images}) > 1:
            raise UserError(f"{folder} has images of different sizes (height, width): {sorted(sizes)[:5]}")
        order = np.random.default_rng(0).permutation(len(images))
        arrays += [np.stack(images)[order], np.searchsorted(classes, labels)[order]]
    return arrays


def read_digits(folder=None):
    """scikit-learn's 1,797 digits of 8 × 8 pixels; a fixed fifth, stratified, is the test part."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return split(x.astype(np.uint8).reshape(-1, 1, 8, 8), y)


def split(x, y):
    from sklearn.model_selection import train_test_split

    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)
    return x_train, y_train, x_test, y_test


DATASETS = {
    "digits": Dataset(10, 1_797, 0, read_digits),
    "mnist": Dataset(10, 70_000, 12, read_mnist, "https://ossci-datasets.s3.amazonaws.com/mnist/", {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"}),
    "fashion_mnist": Dataset(
        10, 70_000, 31, read_mnist, "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310"},
        also=("/usr/share/datasets/fashion-mnist",)),  # Debian's package dataset-fashion-mnist
    "qmnist": Dataset(
        10, 120_000, 20, partial(read_mnist, parts=("qmnist-train", "qmnist-test"), labels="labels-idx2-int.gz",
                                 label_dimensions=2),
        "https://raw.githubusercontent.com/facebookresearch/qmnist/master/", {
            "qmnist-train-images-idx3-ubyte.gz": "ed72d4157d28c017586c42bc6afe6370",
            "qmnist-train-labels-idx2-int.gz": "0058f8dd561b90ffdd0f734c6a30e5e4",
            "qmnist-test-images-idx3-ubyte.gz": "1394631089c404de565df7b7aeaf9412",
            "qmnist-test-labels-idx2-int.gz": "5b5b05890a5e13444e108efe57b788aa"}),
    "cifar10": Dataset(10, 60_000, 162, lambda folder: read_cifar(folder / "cifar-10-binary.tar.gz", 1),
                       "https://www.cs.toronto.edu/~kriz/",
                       {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}),
    "cifar100": Dataset(100, 60_000, 161, lambda folder: read_cifar(folder / "cifar-100-binary.tar.gz", 2),
                        "https://www.cs.toronto.edu/~kriz/",
                        {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"}),
    "cinic10": Dataset(10, 180_000, 656, read_cinic, "https://datashare.ed.ac.uk/bitstream/handle/10283/3192/",
                       {"CINIC-10.tar.gz": "6ee4d0c996905fe93221de577967a372"}),
}
BENCHMARK = ["digits", "mnist", "fashion_mnist"]  # those of them that are here, unless --benchmark-datasets says more


def folder_of(name, data_dir):
    """Where the original files (or image folders) of a known data set lie; None when they are not here."""
    dataset = DATASETS[name]
    for folder in (Path(data_dir) / name, *map(Path, dataset.also)):
        if all((folder / file).exists() for file in dataset.files) or (folder / "train").is_dir():
            return folder
    return None


def download(name, data_dir):
    """Fetch what is missing of a data set into data_dir/name; a file gets its name only if its checksum is right."""
    dataset, folder = DATASETS[name], Path(data_dir) / name
    for file, published in dataset.files.items():
        if (folder / file).exists():
            continue
        with whole_file(folder / file) as target:
            try:
                with urllib.request.urlopen(dataset.url + file, timeout=3) as response, tqdm.wrapattr(
                    response, "read", int(response.headers.get("Content-Length", 0)), desc=file
                ) as source:
                    shutil.copyfileobj(source, target)
            except (OSError, http.client.HTTPException) as problem:
                raise UserError(f"{name}: cannot download {dataset.url}{file} ({problem}); put "
                                f"{', '.join(dataset.files)} into {folder}, or take --dataset digits") from None
            target.seek(0)
            digest = hashlib.file_digest(target, "md5").hexdigest()
            if digest != published:
                raise UserError(f"{dataset.url}{file}: MD5 {digest}, published {published}: truncated, or not that "
                                "file; nothing was kept; try again")


# --- Data: CSV, text, and what training gets --------------------------------------------------------------------------


@dataclasses.dataclass
class Data:
    """Training and test part, as numpy arrays or tensors.

    Vision: x [n, channels, height, width] or [n, features], y [n]; (x - mean) / std goes into the model. Language: x
    and y [n, window] bytes, y one further on, and no mean.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int  # not `classes`: cloudpickle takes that name, beside torch, for the module torch.classes
    info: dict  # source (real or embedded), rows, sha256, the score of a simple baseline
    mean: np.ndarray | None = None
    std: np.ndarray | None = None

    def to(self, device):
        """The same as tensors on the device."""
        arrays = {key: torch.tensor(value, device=device) for key, value in vars(self).items()
                  if isinstance(value, np.ndarray)}
        return dataclasses.replace(self, **arrays)


def write_csv(path, x, y):
    """Write `label,p0,p1,…`, one image a line; x uint8 [n, …], y [n]."""
    import pyarrow as pa
    from pyarrow import csv

    table = np.column_stack([y.astype(np.uint8), x.reshape(len(x), -1)])
    schema = pa.schema([(name, pa.uint8()) for name in ["label", *(f"p{i}" for i in range(table.shape[1] - 1))]])
    blocks = np.array_split(table, max(1, len(table) // 2000))
    with whole_file(path) as file, csv.CSVWriter(file, schema) as writer:
        for block in tqdm(blocks, f"{path.parent.name}/{path.name}", unit=" blocks"):
            writer.write_batch(pa.record_batch([pa.array(column) for column in block.T.copy()], schema))


def read_csv(path, label="uint8", feature="uint8"):
    """(x [n, features], y [n], names of the features) of a CSV file with a column `label`; types are pyarrow's."""
    import pyarrow as pa
    from pyarrow import csv

    def tables(**types):
        return csv.open_csv(path, csv.ReadOptions(block_size=1 << 22), convert_options=csv.ConvertOptions(**types))

    try:
        with tables() as reader:
            names = reader.schema.names
        twice, times = Counter(names).most_common(1)[0]
        if times > 1:
            raise UserError(f"{path}: {times} columns are called {twice!r}")
        if "label" not in names or len(names) < 2:
            raise UserError(f"{path}: needs one column called label and at least one other; it has {names[:5]}")
        names.remove("label")
        types = {"label": pa.type_for_alias(label)} | dict.fromkeys(names, pa.type_for_alias(feature))
        x, y = [], []
        with tables(column_types=types, include_columns=["label", *names]) as reader:
            for batch in reader:
                y.append(batch.column(0).to_numpy(zero_copy_only=False))
                x.append(np.stack([column.to_numpy(zero_copy_only=False) for column in batch.columns[1:]], axis=1))
    except (OSError, pa.ArrowInvalid, pa.ArrowKeyError) as problem:
        raise UserError(f"{path}: {problem}".splitlines()[0]) from None
    if not x:
        raise UserError(f"{path}: has a header, but no rows")
    return np.concatenate(x), np.concatenate(y), names


def image_shape(pixels):
    """(channels, height, width) of a square image of so many values, RGB or grey; None when it cannot be one."""
    for channels in (3, 1) if pixels % 3 == 0 else (1,):
        side = math.isqrt(pixels // channels)
        if side * side * channels == pixels:
            return channels, side, side
    return None


def make_data(name, arrays, source, classes):
    """Data, checked, with mean and deviation of all pixels of the training part alone."""
    x_train, y_train, x_test, y_test = (np.ascontiguousarray(array) for array in arrays)
    for part, x, y in (("training", x_train, y_train), ("test", x_test, y_test)):
        if not 0 < len(x) == len(y) or x.shape[1:] != x_train.shape[1:] or y.min() < 0 or y.max() >= classes:
            raise UserError(f"{name}: its {part} part, images {x.shape} and labels {y.shape}"
                            f"{f' from {y.min()} to {y.max()}' if y.size else ''}, is not images of one size in "
                            f"{classes} classes; delete its files, then run again")
    digest = hashlib.sha256()
    for array in (x_train, y_train, x_test, y_test):
        digest.update(array)
    majority = 100 * np.mean(y_test == np.bincount(y_train).argmax())
    info = {"source": source, "train": len(x_train), "test": len(x_test), "sha256": digest.hexdigest(),
            "baseline": {"majority class: test accuracy [%]": majority}}
    mean, std = x_train.mean(dtype=np.float64), x_train.std(dtype=np.float32)
    return Data(name, x_train, y_train.astype(np.int64), x_test, y_test.astype(np.int64), classes, info,
                np.float32(mean), np.float32(std or 1))


def load_dataset(name, data_dir):
    """Data of a known data set, downloaded or converted to CSV where need be."""
    plain = name.removesuffix("_csv")
    dataset, tables = DATASETS[plain], [Path(data_dir) / name / f"{part}.csv" for part in ("train", "test")]
    source = "real" if dataset.files else "embedded"
    if plain == name or not all(table.exists() for table in tables):
        if dataset.files and folder_of(plain, data_dir) is None:
            download(plain, data_dir)
        data = make_data(plain, dataset.read(folder_of(plain, data_dir)), source, dataset.num_classes)
        if plain == name:
            return data
        write_csv(tables[0], data.x_train, data.y_train)
        write_csv(tables[1], data.x_test, data.y_test)
    arrays = []
    for table in tables:
        x, y, _ = read_csv(table)
        arrays += [x.reshape(len(x), *(image_shape(x.shape[1]) or x.shape[1:])), y]
    return make_data(name, arrays, source, dataset.num_classes)


def load_csv(path):
    """Data of one's own CSV file: numbers, and a column `label`; a fixed fifth, stratified, is the test part."""
    from sklearn.preprocessing import StandardScaler

    x, y, names = read_csv(path, "string", "float64")
    wrong = np.argwhere(~np.isfinite(x))
    if len(wrong):
        raise UserError(f"{path}: row {wrong[0][0] + 1} has no number in column {names[wrong[0][1]]}")
    y = np.char.strip(y.astype(str))
    if (y == "").any():
        raise UserError(f"{path}: row {np.argmin(y != '') + 1} has no label")
    classes, y, counts = np.unique(y, return_inverse=True, return_counts=True)
    if len(classes) < 2 or counts.min() < 2 or len(y) < 5 * len(classes):
        raise UserError(f"{path}: label needs two classes or more, each of two rows or more and of five on average; "
                        f"it has {dict(zip(classes.tolist()[:5], counts.tolist()))}")
    shape, pixels = image_shape(x.shape[1]), x.clip(0, 255).astype(np.uint8)
    if names == [f"p{i}" for i in range(len(names))] and shape and (pixels == x).all():
        return make_data(path.name, split(pixels.reshape(-1, *shape), y), "real", len(classes))
    x_train, y_train, x_test, y_test = split(x, y)
    scaler = StandardScaler().fit(x_train)  # each column, in float64: float32 would lose small steps of large numbers
    x_train, x_test = (scaler.transform(part).astype(np.float32) for part in (x_train, x_test))
    return make_data(path.name, (x_train, y_train, x_test, y_test), "real", len(classes))


def load_text(path, args):
    """Data of text as bytes: windows without overlap; the last tenth of the windows is the validation part.

    Without a path: the standard library's own source, its files in a fixed random order.
    """
    root, text = Path(path) if path else Path(os.__file__).parent, b""
    try:
        root.stat()
        found = sorted(root.rglob("*") if path else root.glob("*.py")) or [root]
        found = [file for file in found if file.is_file()]
        for i in np.random.default_rng(0).permutation(len(found)):
            text += found[i].read_bytes() if len(text) < args.text_bytes else b""
    except OSError as problem:
        raise UserError(f"--data: {problem}") from None
    text = np.frombuffer(text[: args.text_bytes], np.uint8)
    windows = (len(text) - 1) // args.window_len
    cut = windows - max(1, windows // 10)
    if cut < 2:
        raise UserError(f"{root}: {len(text):,} bytes of text are less than three windows of {args.window_len}")
    x, y = (text[i : i + windows * args.window_len].reshape(windows, -1) for i in (0, 1))  # views, not copies
    counts = np.ones((256, 256))  # of pairs of bytes, each once more than seen
    np.add.at(counts, (x[:cut], y[:cut]), 1)
    bigram = -np.log2(counts / counts.sum(1, keepdims=True))[x[cut:], y[cut:]].mean()
    info = {"source": "real" if path else "embedded", "train": cut, "test": windows - cut, "bytes": len(text),
            "sha256": hashlib.sha256(text).hexdigest(), "baseline": {"bigram: bits per byte": bigram}}
    return Data(str(root), x[:cut], y[:cut], x[cut:], y[cut:], 256, info)


# --- Models -----------------------------------------------------------------------------------------------------------


class SimpleMLP(nn.Sequential):
    """The seed's classifier: 784-128-10 at MNIST. Input [batch, …], output logits [batch, classes]."""

    def __init__(self, shape, classes, hidden=128):
        super().__init__(nn.Flatten(), nn.Linear(math.prod(shape), hidden), nn.ReLU(), nn.Linear(hidden, classes))


class SmallCNN(nn.Sequential):
    """Two convolutions with pooling and a linear layer. Input [batch, channels, height, width]."""

    def __init__(self, shape, classes, width=16):
        channels, height, side = shape
        super().__init__(
            nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(2 * width * (height // 4) * (side // 4), classes))


class Block(nn.Module):
    """Pre-norm decoder layer: causal self-attention, then a feed-forward network. [batch, time, d_model]."""

    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x):
        batch, time, d_model = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, time, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, time, d_head]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, d_model))
        return x + self.mlp(self.norm2(x))


class TinyTransformer(nn.Module):
    """Decoder-only language model. Input bytes [batch, time], output logits of the next [batch, time, classes]."""

    def __init__(self, shape, classes, d_model=64, num_heads=4, num_layers=2):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(classes, d_model), nn.Embedding(shape[0], d_model)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(d_model, num_heads) for _ in range(num_layers)), nn.LayerNorm(d_model))

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.blocks(x) @ self.tokens.weight.T  # input and output embedding are one


MODELS = {"vision": {"mlp": SimpleMLP, "cnn": SmallCNN}, "nlp": {"transformer": TinyTransformer}}


# --- Training ---------------------------------------------------------------------------------------------------------


def gather(data, rows):
    """(x, y) of the training samples `rows`; index_select is several times faster than data.x_train[rows]."""
    index = torch.from_numpy(rows).to(data.x_train.device)
    return data.x_train.index_select(0, index), data.y_train.index_select(0, index)


def forward(model, data, x, y):
    """(cross-entropy of each sample [batch], of a window the mean over its bytes; logits [batch, …, classes])."""
    logits = model(x.long() if data.mean is None else (x - data.mean) / data.std)
    losses = F.cross_entropy(logits.flatten(0, -2), y.flatten().long(), reduction="none")
    return losses if y.dim() == 1 else losses.view(y.shape).mean(1), logits


def check_finite(losses):
    if not np.isfinite(losses).all():
        raise UserError("the loss is no longer a number; lower --learning-rate")


def train_one_epoch(model, optimizer, data, batches, loss, args):
    """Train on the `batches` of a strategy and keep its tracked `loss` up to date; returns the samples trained on."""
    count = 0
    model.train()
    for rows in batches:
        losses, _ = forward(model, data, *gather(data, rows))
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        new = losses.detach().cpu().numpy()
        check_finite(new)
        track(loss, rows, new.mean() if args.smart_loss == "batch-mean" else new, args.ema_decay)
        count += len(rows)
    return count


@torch.inference_mode()
def evaluate(model, data, x, y, chunk=1000):
    """(mean loss, accuracy in percent) over all samples."""
    total, right = 0.0, 0.0
    model.eval()
    for a, b in zip(x.split(chunk), y.split(chunk)):
        losses, logits = forward(model, data, a, b)
        total += losses.sum().item()
        right += (logits.argmax(-1) == b).sum().item()
    return total / len(x), 100 * right / y.numel()


def training_stride(info):
    return max(1, info["train"] // info["test"])


def measure(model, data, task):
    """The metrics after an epoch; those of training on every k-th training sample, as many as the test part has."""
    stride = training_stride(data.info)  # all 60,000 would take a fifth of the epoch's own time
    train_loss, train_acc = evaluate(model, data, data.x_train[::stride], data.y_train[::stride])
    test_loss, test_acc = evaluate(model, data, data.x_test, data.y_test)
    check_finite([train_loss, test_loss])
    if task == "vision":
        return {"train_loss": train_loss, "train_acc": train_acc, "test_loss": test_loss, "test_acc": test_acc}
    perplexity = math.exp(test_loss) if test_loss < 700 else None  # beyond a float
    return {"train_loss": train_loss, "validation_loss": test_loss, "perplexity": perplexity,
            "bits_per_byte": test_loss / math.log(2)}


def add_label_noise(y, classes, share, seed):
    """A copy of y in which `share` of the labels, drawn by `seed`, are another class."""
    rng = np.random.default_rng([seed, 1])
    wrong = rng.choice(len(y), round(share * len(y)), replace=False)
    noisy = y.copy()
    noisy[wrong] = (y[wrong] + rng.integers(1, classes, len(wrong))) % classes
    return noisy


def train_run(data, strategy, make_model, seed, args, checkpoint):
    """One run from its first weights, or its checkpoint, to its last epoch; returns [{epoch, samples, seconds, …}].

    Entry 0 is before training. `seconds` is training alone, without evaluation. The same seed means the same first
    weights, label noise and random numbers for every strategy.
    """
    device = detect_device(args.device)
    torch.set_num_threads(1)  # alone as in parallel: so the numbers are the same, and small matrices gain nothing
    torch.manual_seed(seed)
    if args.label_noise:
        noisy = add_label_noise(data.y_train, data.num_classes, args.label_noise, seed)
        data = dataclasses.replace(data, y_train=noisy)
    data = data.to(device)
    model = make_model(data.x_train.shape[1:], data.num_classes).to(device)
    optimizer = torch.optim.Adam(model.parameters(), args.learning_rate, fused=device.type != "mps")
    rng, loss = np.random.default_rng(seed), np.full(len(data.x_train), np.inf, np.float32)

    @torch.inference_mode()
    def score(rows):
        return forward(model, data, *gather(data, rows))[0].cpu().numpy()

    if checkpoint.exists():
        try:
            state = torch.load(checkpoint, "cpu", weights_only=True)
            same = state["data"] == data.info["sha256"]
        except Exception as problem:
            raise UserError(f"{checkpoint} is not a whole checkpoint of this script ({type(problem).__name__}); delete "
                            "it, then --resume repeats this run") from None
        if not same:
            raise UserError(f"{checkpoint} was trained on other data than {data.name} is now; start without --resume")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        loss, history = state["loss"].numpy(), state["history"]
        rng.bit_generator.state = json.loads(state["rng"])
        torch.set_rng_state(state["torch_rng"])
    else:
        history = [{"epoch": 0, "samples": 0, "seconds": 0.0} | measure(model, data, args.task)]

    while len(history) <= args.epochs:
        began = time.perf_counter()
        count = train_one_epoch(model, optimizer, data, strategy(loss, score, args, rng), loss, args)
        if device.type == "cuda":
            torch.cuda.synchronize()
        last, seconds = history[-1], time.perf_counter() - began
        history.append({"epoch": len(history), "samples": last["samples"] + count, "seconds": last["seconds"] + seconds}
                       | measure(model, data, args.task))
        with whole_file(checkpoint) as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history,
                        "loss": torch.from_numpy(loss), "rng": json.dumps(rng.bit_generator.state),
                        "torch_rng": torch.get_rng_state(), "data": data.info["sha256"],
                        "arguments": vars(args)}, file)
    return history


# --- Evaluation: intervals, paired tests, seconds to a target ---------------------------------------------------------


def holm(p_values):
    """Holm's step-down correction (1979) of a list of p-values."""
    p = np.asarray(p_values)
    stepped = np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1)).clip(max=1)
    return stepped[np.argsort(np.argsort(p))].tolist()


def verdicts(finals, task):
    """What a paired t-test says of each strategy against `random`; `finals` {strategy: [last value of each seed]}.

    {strategy: {difference, interval (95 %, of this pair alone), p, p_holm, sentence}}; empty for less than MIN_RUNS.
    Where the difference is the same in every seed there is nothing to test by (x / 0): p is None, and 1 to Holm.
    """
    from scipy import stats

    (_, sign, unit), results = DECIDING[task], {}
    if len(finals.get(BASELINE, ())) < MIN_RUNS or len(finals) < 2:
        return results
    for name in [name for name in finals if name != BASELINE]:
        differences = np.subtract(finals[name], finals[BASELINE])
        mean, interval = mean_and_interval(differences)
        p = float(stats.ttest_rel(finals[name], finals[BASELINE]).pvalue) if np.ptp(differences) > 1e-9 else None
        results[name] = {"difference": float(mean), "interval": float(interval), "p": p}
    p_values = [1 if result["p"] is None else result["p"] for result in results.values()]
    for (name, result), p in zip(results.items(), holm(p_values)):
        mean, interval = result["difference"], result["interval"]
        better = "better" if sign * mean > 0 else "worse"
        found = f"{name} is {abs(mean):.2f} ± {interval:.2f} {unit} {better} than {BASELINE}"
        none = f"{name}: no difference from {BASELINE} is shown ({mean:+.2f} ± {interval:.2f} {unit})"
        result |= {"p_holm": p, "sentence": f"{found if p < ALPHA else none}, p = {p:.2g}"}
        if result["p"] is None:
            result |= {"p_holm": None, "sentence": f"{name}: {mean:+.2f} {unit} from {BASELINE} in every seed, no test"}
    return results


def to_reach(history, target, task, unit):
    """`unit` (samples or seconds) until the deciding metric reached `target`, linear between epochs; None: never."""
    metric, sign, _ = DECIDING[task]
    for before, after in pairwise(history):
        if sign * (after[metric] - target) >= 0:
            gain = after[metric] - before[metric]
            share = np.clip((target - before[metric]) / gain, 0, 1) if gain else 0
            return before[unit] + float(share) * (after[unit] - before[unit])
    return None


def mean_text(values, number="{:.2f}"):
    """`mean ± interval` of the runs; how many of them have a value, when not all do."""
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return f"{len(there)} of {len(values)} runs"
    mean, interval = mean_and_interval(there)
    return number.format(mean) + (f" ± {number.format(interval)}" if len(there) > 1 else "")


def counted(n, noun):
    return f"{n} {noun}{'s' if n != 1 else ''}"


def compare(histories, task, target=None):
    """{target, verdicts, table} of the strategies on one data set; `histories` {strategy: [history of each seed]}."""
    metric, sign, unit = DECIDING[task]
    finals = {name: [history[-1][metric] for history in runs] for name, runs in histories.items()}
    if target is None:  # 1 % short of what the baseline reaches in the end
        target = float(np.mean(finals.get(BASELINE, next(iter(finals.values()))))) * (1 - sign * 0.01)
    samples = {name: f"{np.mean([h[-1]['samples'] for h in runs]):,.0f}" for name, runs in histories.items()}
    tests, table = verdicts(finals, task), []
    for name, runs in histories.items():
        row = {"strategy": name}
        for key, label in METRICS[task].items():
            row[label] = mean_text([history[-1][key] for history in runs], "{:.3f}" if "loss" in key else "{:.2f}")
        if test := tests.get(name):
            test["sentence"] += (f", after {counted(len(runs[0]) - 1, 'epoch')}, {samples[name]} samples against "
                                 f"{samples[BASELINE]}")
        row |= {f"difference from {BASELINE} [{unit}]": test and f"{test['difference']:+.2f} ± {test['interval']:.2f}",
                "p (Holm)": f"{test['p_holm']:.2g}" if test and test["p"] is not None else None,
                "samples": samples[name],
                "seconds": mean_text([history[-1]["seconds"] for history in runs], "{:.2f}"),
                f"samples to {target:.2f}": mean_text([to_reach(h, target, task, "samples") for h in runs], "{:,.0f}"),
                f"seconds to {target:.2f}": mean_text([to_reach(h, target, task, "seconds") for h in runs], "{:.2f}")}
        table.append(row)
    return {"target": target, "finals": finals, "verdicts": tests, "table": table}


# --- Pictures ---------------------------------------------------------------------------------------------------------


def curves(histories, key):
    """[runs, epochs] of one metric, from the first epoch on."""
    return np.array([[epoch[key] for epoch in history[1:]] for history in histories], float)


def plot_strategy(histories, title, task, part, folder):
    """One picture for each metric of one strategy: mean over the runs with its 95 % band; `part`: training_part."""
    for key, label in METRICS[task].items():
        fig, (ax,) = new_figure(f"{title}: {label}", size=(7, 4))
        values = curves(histories, key)
        plot_curve(ax, np.arange(1, values.shape[1] + 1), values, "mean", marker="o")
        ax.set(xlabel="epoch", ylabel=f"{label}\n{part}" if key.startswith("train") else label)
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        save_figure(fig, folder / f"{key}.png")


def plot_comparison(histories, name, task, result, folder):
    """The deciding metric by epoch, by samples trained on and by seconds; and the differences, paired by seed."""
    metric, sign, unit = DECIDING[task]
    runs = len(next(iter(histories.values())))
    fig, axes = new_figure(f"{name}: {METRICS[task][metric]}, mean and 95 % interval, runs: {runs}", 2, 2, (11, 8))
    labels = {"epoch": "epoch", "samples": "samples trained on [thousands]", "seconds": "training time [s]"}
    for ax, (key, label) in zip(axes, labels.items()):
        for i, (strategy, runs) in enumerate(histories.items()):
            x = curves(runs, key).mean(0) / (1000 if key == "samples" else 1)
            plot_curve(ax, x, curves(runs, metric), strategy if key == "epoch" else None, i, MARKERS[i % 5])
        ax.axhline(result["target"], color="0.4", linewidth=0.8,
                   label=f"target {result['target']:.2f}" if key == "epoch" else None)
        ax.set(xlabel=label, ylabel=METRICS[task][metric])
        ax.xaxis.get_major_locator().set_params(nbins=6, integer=key == "epoch", min_n_ticks=1)
    finals = result["finals"]
    others = [strategy for strategy in finals if strategy != BASELINE] if BASELINE in finals else []
    for i, strategy in enumerate(others):
        differences = np.subtract(finals[strategy], finals[BASELINE])
        mean, interval = mean_and_interval(differences)
        axes[3].plot(differences, np.full(len(differences), i + 0.2), ".", color="0.6")
        axes[3].errorbar(mean, i, xerr=np.nan_to_num(interval), fmt="o", color=COLORS[0], capsize=4)
    axes[3].axvline(0, color="k", linewidth=0.8)
    axes[3].set_yticks(range(len(others)), others)
    direction = "more" if sign > 0 else "less"
    axes[3].set(xlabel=f"difference from {BASELINE}, a dot a seed\n[{unit}; {direction} is better]",
                ylim=(max(len(others), 1) - 0.5, -0.5))
    fig.legend(loc="outside lower center", ncols=6)
    save_figure(fig, folder / f"comparison_{name}.png")


def plot_benchmark(results, task, folder):
    """The deciding metric of every strategy on every data set; `results` {data set: what compare returns}."""
    fig, (ax,) = new_figure("Benchmark across data sets, mean and 95 % interval", size=(max(7, 2.5 * len(results)), 5))
    strategies = list(next(iter(results.values()))["finals"])
    for i, strategy in enumerate(strategies):
        mean, interval = np.transpose([mean_and_interval(result["finals"][strategy]) for result in results.values()])
        at = np.arange(len(results)) + 0.12 * (i - (len(strategies) - 1) / 2)
        ax.errorbar(at, mean, np.nan_to_num(interval), fmt=MARKERS[i % 5], color=COLORS[i % 8], capsize=3,
                    label=strategy)
    ax.set_xticks(range(len(results)), results)
    ax.set(xlabel="data set", ylabel=METRICS[task][DECIDING[task][0]])
    fig.legend(loc="outside lower center", ncols=5)
    save_figure(fig, folder / "benchmark.png")


# --- Results ----------------------------------------------------------------------------------------------------------


def write_json(results, path):
    """Write plain JSON without NaN; returns the results as they are read back."""
    text = json.dumps(results, indent=1, allow_nan=False)
    with whole_file(path) as file:
        file.write(text.encode())
    return json.loads(text)


def markdown_table(rows):
    """Rows [{column: value}] as a Markdown table; None is a dash."""
    cells = [["–" if value is None else str(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(rows[0]), ["---"] * len(rows[0]), *cells])


def training_part(data, args):
    """What the training metrics are of, as text."""
    return f"1 in {training_stride(data)} samples{', noisy labels' if args.label_noise else ''}"


def summary(name, data, result, args):
    """The table and the verdicts of one data set as text."""
    noise = f", label noise {args.label_noise:.0%}" if args.label_noise else ""
    held_out = "validation windows" if args.task == "nlp" else "test samples"
    head = (f"## {name} ({data['source']}): {data['train']:,} training and {data['test']:,} {held_out}, {args.model}, "
            f"{counted(args.epochs, 'epoch')}, batches of {args.batch_size}, {counted(args.runs, 'run')} from seed "
            f"{args.seed}{noise}")
    sentences = [f"- {test['sentence']}" for test in result["verdicts"].values()]
    sentences += ["- p: paired t-test over the seeds, after Holm's correction; ±: 95 % interval of that pair alone"
                  if sentences else f"- no verdict: it needs {BASELINE}, another strategy and {MIN_RUNS} runs or more"]
    sentences += [f"- training metrics: {training_part(data, args)}; seconds: of training alone, but runs side by side "
                  "(--jobs) share the machine"]
    baseline = ", ".join(f"{key}: {value:.2f}" for key, value in data["baseline"].items())
    return "\n".join([head, "", markdown_table(result["table"]), "", *sentences, f"- simple baseline, {baseline}", ""])


def describe_run(args):
    """What results.json holds from the beginning: arguments, versions, git commit."""
    folder = Path(globals().get("__file__", "batch_selection.py")).resolve().parent
    commit, versions = None, {"python": platform.python_version()}
    with contextlib.suppress(OSError):  # no git on this machine
        git = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or None
    for name in ("torch", "numpy", "scipy", "scikit-learn", "pyarrow", "joblib"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # not every run needs pyarrow
            versions[name] = importlib.metadata.version(name)
    return {"experiment": args.task, "finished": False, "arguments": vars(args), "seed": args.seed,
            "git_commit": commit, "versions": versions}


def new_run(root):
    """Make and return the next free folder run-001, run-002, … under outputs/TASK; no strategy has that number yet."""
    root.mkdir(parents=True, exist_ok=True)
    while True:
        numbers = [int(run.name[4:]) for run in root.rglob("run-*") if run.name[4:].isdigit()]
        folder = root / f"run-{max(numbers, default=0) + 1:03d}"
        with contextlib.suppress(FileExistsError):  # another process may have been quicker
            folder.mkdir()
            return folder


def newest(paths):
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)


def read_results(paths):
    """The (folder, results) of those results.json that are whole and this script's own."""
    for path in paths:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            results = json.loads(path.read_text())
            if results["experiment"] in MODELS:
                yield path.parent, results


def find_run(args):
    """(folder, arguments) of the unfinished invocation that --resume names, or of the newest one."""
    folders, named = newest(Path(args.output_dir).glob("*/run-*")), ""
    if args.resume != "newest":
        folders, named = [Path(args.resume), *(run for run in folders if run.name == args.resume)], f" {args.resume!r}"
    for folder, results in read_results(folder / "results.json" for folder in folders):
        if not results["finished"]:
            return folder, argparse.Namespace(**results["arguments"])
    raise UserError(f"{args.output_dir} has no unfinished run{named}; start one without --resume")


def finished_results(root, args):
    """(data set, {strategy: results}) for --only compare: the newest, and of others what was made as that was."""
    runs = read_results(newest(root.glob("run-*/results.json")))
    name = args.dataset or next((next(iter(run["data"])) for _, run in runs if run["finished"]), "")
    chosen, like = {}, None
    for _, results in read_results(newest((root / name).glob("*/run-*/results.json"))):
        same = [results["data"]["sha256"], *(results["arguments"][argument] for argument in (
            "runs", "seed", "epochs", "batch_size", "learning_rate", "model", "label_noise"))]
        if results["strategy"] in args.strategy and like in (None, same):
            like = same
            chosen.setdefault(results["strategy"], results)
    if not chosen:
        raise UserError(f"{root / name} has no finished results; run the strategies first, without --only compare")
    return name, {strategy: chosen[strategy] for strategy in args.strategy if strategy in chosen}


# --- Command line -----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def between(kind, low, high=math.inf):
    """An argparse type: a finite number of `kind` from `low` to `high`."""

    def number(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    return number


def parse_args(argv):
    names = [*DATASETS, *(f"{name}_csv" for name in DATASETS)]
    share, count, positive = between(float, 0, 1), between(int, 1), between(float, 0)
    parser = Parser("batch_selection.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                    formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--task", choices=MODELS, default="vision", help="vision: classification; nlp: a language model of bytes")
    add("--quick", action="store_true", help="everything, small: 1 epoch, 1 run, embedded data, under 60 s")
    add("--dataset", choices=names, metavar="NAME", help="see --list-datasets; NAME_csv is converted to CSV once, then "
        "read from there (default: mnist, or digits where it cannot be had)")
    add("--data", metavar="PATH", help="your own instead: a CSV file with a column `label` and numbers (p0, p1, … of 0 "
        "to 255 are pixels); nlp: a text file or a folder of them (default: the standard library's source)")
    add("--data-dir", default="data", metavar="FOLDER", help="data sets, as FOLDER/NAME/original files")
    add("--output-dir", default="outputs", metavar="FOLDER", help="results go to FOLDER/TASK/run-001, run-002, …")
    add("--resume", nargs="?", const="newest", metavar="RUN", help="go on with an unfinished run, the newest or the "
        "one named, with its own arguments")
    add("--strategy", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), metavar="NAME", help="which to run")
    add("--model", help="mlp or cnn; nlp: transformer (default: the first of the task)")
    add("--epochs", type=count, default=5, metavar="N", help="for each strategy")
    add("--runs", type=between(int, 1, 999), default=5, metavar="N", help="seeds in a row: mean ± 95 %% CI; verdicts "
        f"from {MIN_RUNS} on")
    add("--seed", type=between(int, 0, 2**31), default=42, metavar="N", help="the first of them")
    add("--batch-size", type=count, metavar="N", help="samples in a batch (default: 64; nlp: 16 windows)")
    add("--learning-rate", type=positive, metavar="RATE", help="of Adam (default: 0.001; nlp: 0.003)")
    add("--explore-frac", type=share, default=0.5, metavar="SHARE", help="smart: of a batch, drawn from all samples")
    add("--top-k-frac", type=share, default=0.2, metavar="SHARE", help="smart: the hardest, that the others come from")
    add("--refresh", type=count, default=1, metavar="BATCHES", help="smart: until the hardest are found anew")
    add("--ema-decay", type=share, default=0.9, metavar="RATE", help="of the tracked loss")
    add("--smart-loss", choices=["per-sample", "batch-mean"], default="per-sample", help="what the tracked loss is fed "
        "with: a sample's own loss, or, as in the seed, the mean of its batch")
    add("--loss-threshold", type=positive, metavar="NATS", help="loss_threshold: only samples above it (default: 0.5; "
        "nlp: 2)")
    add("--selectivity", type=positive, default=1.0, metavar="POWER", help="selective_backprop: of the percentile")
    add("--label-noise", type=share, default=0.0, metavar="SHARE", help="training labels replaced by another class")
    add("--target", type=between(float, 0, 100), metavar="VALUE", help="count samples and seconds until this test "
        f"accuracy [%%] or, nlp, bits per byte (default: 1 %% short of the last mean of {BASELINE})")
    add("--only", choices=["run", "compare", "benchmark"], help="run: the strategies on one data set; compare: newest "
        "finished results of a data set, no training; benchmark: --benchmark-datasets (default: all three)")
    add("--no-benchmark", action="store_true", help="only --dataset, not the others")
    add("--benchmark-datasets", nargs="+", choices=names, metavar="NAME", help="(default: --dataset and those of "
        f"{', '.join(BENCHMARK)} that are here)")
    add("--window-len", type=between(int, 2), default=64, metavar="BYTES", help="nlp: length of a sample")
    add("--text-bytes", type=count, default=150_000, metavar="BYTES", help="nlp: how much of the text to use")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu) or one of them")
    add("--jobs", type=count, metavar="N", help="runs in parallel, one thread each (default: one a core; on a GPU and "
        "with --quick 1)")
    add("--backend", choices=["loky", "dask"], default="loky", help="processes on this machine, or dask workers: those "
        "of DASK_SCHEDULER_ADDRESS, else local ones (needs dask[distributed]; folders are shared)")
    add("--list-datasets", action="store_true", help="name, classes, samples, size, whether it is here; then end")
    add("--download", nargs="+", choices=list(DATASETS), metavar="NAME", help="into --data-dir; then end")
    add("--check-device", action="store_true", help="what this machine computes with; then end")
    if "--quick" in argv:
        parser.set_defaults(epochs=1, runs=1, text_bytes=100_000)
    args = parser.parse_args(argv)
    given = {flag.split("=")[0][2:].replace("-", "_") for flag in argv if flag.startswith("--")}
    for refused, why in (
        ("" in (args.data, args.data_dir, args.output_dir, args.resume), "a path is empty"),
        (args.resume and given - {"resume", "output_dir", "device", "jobs", "backend"},
         "--resume goes with --output-dir, --device, --jobs, --backend; a run keeps its own arguments"),
        (args.only == "compare" and given - {"only", "task", "dataset", "data", "strategy", "target", "output_dir"},
         "--only compare goes with --task, --dataset, --data, --strategy, --target, --output-dir; nothing is trained"),
        (args.task == "nlp" and given & {"dataset", "label_noise", "benchmark_datasets"},
         "--dataset, --label-noise and --benchmark-datasets are of --task vision; nlp takes --data"),
        ({"dataset", "data"} <= given, "--dataset and --data exclude each other"),
        ({"no_benchmark", "benchmark_datasets"} <= given, "--no-benchmark and --benchmark-datasets exclude each other"),
        ({"data", "benchmark_datasets"} <= given, "--data and --benchmark-datasets exclude each other"),
        (args.only == "benchmark" and (args.no_benchmark or args.data or args.task == "nlp"),
         "--only benchmark needs data sets: not --no-benchmark, --data or --task nlp"),
    ):
        if refused:
            raise UserError(why)
    for name, *defaults in (("batch_size", 64, 16), ("learning_rate", 0.001, 0.003), ("loss_threshold", 0.5, 2.0),
                            ("model", *(next(iter(models)) for models in MODELS.values()))):
        if getattr(args, name) is None:
            setattr(args, name, defaults[args.task == "nlp"])
    if args.model not in MODELS[args.task]:
        raise UserError(f"--model {args.model} is not of --task {args.task}, which has {', '.join(MODELS[args.task])}")
    args.strategy = list(dict.fromkeys(args.strategy))
    if args.data:
        args.dataset = Path(args.data).resolve().stem or "root"  # a name for . and / too
    return args


def is_here(name, data_dir):
    return (Path(data_dir) / name / "test.csv").exists() or folder_of(name.removesuffix("_csv"), data_dir) is not None


def list_datasets(data_dir):
    return markdown_table([
        {"data set": name, "classes": dataset.num_classes, "samples": f"{dataset.samples:,}", "MB": dataset.megabytes,
         "here": (folder_of(name, data_dir) or "no") if dataset.files else "embedded",
         "as CSV": "yes" if (Path(data_dir) / f"{name}_csv/test.csv").exists() else "no"}
        for name, dataset in DATASETS.items()])


def check_device():
    gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "no"
    return (f"auto: {detect_device()}; cuda: {gpus}; mps: {'yes' if torch.backends.mps.is_available() else 'no'}; "
            f"cpu: {joblib.cpu_count()} cores; torch: {torch.__version__}")


# --- The experiment ---------------------------------------------------------------------------------------------------


def choose_datasets(args):
    """Settle args.dataset and args.benchmark_datasets: what is here or, with one attempt, can be fetched."""
    if args.task == "nlp" or args.data:
        args.dataset, args.benchmark_datasets = args.dataset or "python_stdlib", []
        return
    if args.dataset is None and args.only == "benchmark" and args.benchmark_datasets:
        args.dataset = args.benchmark_datasets[0]
    if args.dataset is None:
        args.dataset = "digits" if args.quick else "mnist"
        try:
            if not is_here(args.dataset, args.data_dir):
                download(args.dataset, args.data_dir)
        except UserError as problem:
            note(f"warning: no MNIST, so these are scikit-learn's digits: {problem}")
            args.dataset = "digits"
    if args.no_benchmark or args.only == "run":
        args.benchmark_datasets = []
        return
    small = ["digits", "digits_csv"] if args.quick else [name for name in BENCHMARK if is_here(name, args.data_dir)]
    args.benchmark_datasets = list(dict.fromkeys([args.dataset, *(args.benchmark_datasets or small)]))
    if len(args.benchmark_datasets) == 1:
        note(f"no benchmark across data sets: there is only {args.dataset}; --benchmark-datasets names others")


def load(name, args):
    if args.task == "nlp":
        return load_text(args.data, args)
    data = load_csv(Path(args.data)) if args.data else load_dataset(name, args.data_dir)
    if args.model == "cnn" and (data.x_train.ndim != 4 or data.x_train.shape[-1] < 4):
        raise UserError(f"{data.name}: a CNN needs images of 4 × 4 or more, not {data.x_train.shape[1:]}; --model mlp")
    return data


def train_all(all_data, args, jobs, folders):
    """Every strategy with every seed on every data set, in parallel; returns {data set: {strategy: [history]}}."""
    tasks = list(product(all_data, range(args.seed, args.seed + args.runs), args.strategy))
    # Absolute paths: a worker that joblib kept from an earlier call may be in another folder.
    calls = (joblib.delayed(train_run)(all_data[name], STRATEGIES[strategy], MODELS[args.task][args.model], seed, args,
                                       (folders[name, strategy] / f"seed-{seed}.pt").resolve())
             for name, seed, strategy in tasks)
    histories = {name: {strategy: [] for strategy in args.strategy} for name in all_data}
    metric = DECIDING[args.task][0]
    with (dask_client(jobs) if args.backend == "dask" else contextlib.nullcontext(),
          joblib.parallel_config(args.backend), tqdm(total=len(tasks), desc="runs", unit="run") as bar):
        for (name, seed, strategy), history in zip(tasks, joblib.Parallel(jobs, return_as="generator")(calls)):
            histories[name][strategy].append(history)
            bar.set_postfix_str(f"{name} {strategy} seed {seed}: {metric} {history[-1][metric]:.2f}", refresh=False)
            bar.update()
    return histories


def dask_client(jobs):
    """A client of the scheduler that DASK_SCHEDULER_ADDRESS names, else of local processes."""
    address = os.environ.get("DASK_SCHEDULER_ADDRESS")
    local = {} if address else {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
    try:
        from dask.distributed import Client

        client = Client(address, timeout=3, **local)
    except ImportError:
        raise UserError("--backend dask needs: pip install 'dask[distributed]'") from None
    except OSError as problem:
        raise UserError(f"no dask scheduler at DASK_SCHEDULER_ADDRESS={address}: {problem}") from None
    for module in {"common", __name__} - {"__main__"} if address else ():  # local workers import as this process does
        client.upload_file(sys.modules[module].__file__)
    return client


def run_experiment(args, run_dir):
    """All that one invocation does, written to `run_dir` and beside it; returns the results dictionary."""
    began, seconds, root, folders = time.perf_counter(), {}, run_dir.parent, {}
    if args.only == "compare":
        name, found = finished_results(root, args)
        first = next(iter(found.values()))
        own = {name: getattr(args, name) for name in ("only", "target", "output_dir")}
        args = argparse.Namespace(**first["arguments"] | own | {"strategy": list(found)})
        device, infos = first["device"], {name: first["data"]}
        all_histories = {name: {strategy: one["histories"] for strategy, one in found.items()}}
    else:
        try:
            device = detect_device(args.device)
        except argparse.ArgumentTypeError as problem:
            raise UserError(f"--device: {problem}") from None
        names = args.benchmark_datasets if args.only == "benchmark" else [args.dataset, *args.benchmark_datasets]
        all_data = {name: load(name, args) for name in names}
        seconds["data"] = time.perf_counter() - began
        infos = {name: data.info for name, data in all_data.items()}
        folders = {(name, strategy): root / name / strategy / run_dir.name
                   for name, strategy in product(all_data, args.strategy)}
        jobs = args.jobs or (joblib.cpu_count() if device.type == "cpu" and not args.quick else 1)
        all_histories = train_all(all_data, args, jobs, folders)
        seconds["runs"] = time.perf_counter() - began - seconds["data"]

    header = describe_run(args) | {"device": str(device)}
    comparison, text = {}, f"# batch_selection.py --task {args.task}\n\n"
    for name, histories in all_histories.items():
        comparison[name] = compare(histories, args.task, args.target)
        text += summary(name, infos[name], comparison[name], args) + "\n"
        if args.only != "run":
            plot_comparison(histories, name, args.task, comparison[name], run_dir)
    for (name, strategy), folder in folders.items():
        histories = all_histories[name][strategy]
        alone = compare({strategy: histories}, args.task, comparison[name]["target"])
        plot_strategy(histories, f"{name}, {strategy}", args.task, training_part(infos[name], args), folder)
        (folder / "summary.txt").write_text(summary(name, infos[name], alone, args))
        write_json(header | {"strategy": strategy, "data": infos[name], "histories": histories,
                             "final": alone["table"][0], "finished": True}, folder / "results.json")
    if len(all_histories) > 1:
        plot_benchmark({name: comparison[name] for name in args.benchmark_datasets}, args.task, run_dir)
    (run_dir / "summary.txt").write_text(text)
    print(text)
    seconds["tables and pictures"] = time.perf_counter() - began - sum(seconds.values())
    unit = 2**20 if sys.platform == "darwin" else 2**10
    memory = resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit  # of this process, not of workers
    return write_json(header | {"data": infos, "comparison": comparison, "finished": True, "seconds": seconds,
                                "peak_memory_mib": memory}, run_dir / "results.json")


def main(argv=None):
    """Run the experiment with `argv` as on a command line (default: this process's, in a notebook none).

    Returns the results dictionary; what a user can put right raises SystemExit(2), Ctrl-C SystemExit(130).
    """
    run_dir, made, threads = None, None, torch.get_num_threads()
    try:
        args = parse_args(([] if in_notebook() else sys.argv[1:]) if argv is None else argv)
        if args.check_device or args.list_datasets or args.download:
            for name in args.download or ():
                download(name, args.data_dir)
            print(check_device() if args.check_device else list_datasets(args.data_dir))
            return None
        if args.resume:
            run_dir, kept = find_run(args)
            new = {name: getattr(args, name) for name in ("output_dir", "jobs", "backend")}
            args = argparse.Namespace(**vars(kept) | new | ({} if args.device == "auto" else {"device": args.device}))
        else:
            if args.only != "compare":
                choose_datasets(args)
            run_dir = made = new_run(Path(args.output_dir) / args.task)
            write_json(describe_run(args), run_dir / "results.json")
        results = run_experiment(args, run_dir)
        print(f"Everything is in {run_dir} and {run_dir.parent}/DATASET/STRATEGY/{run_dir.name}")
        return results
    except KeyboardInterrupt:
        where = run_dir and f"; to go on: python batch_selection.py --resume {run_dir} --output-dir {args.output_dir}"
        note(f"stopped{where or ''}")
        raise SystemExit(130) from None
    except UserError as problem:
        error = str(problem)
    except BrokenProcessPool:
        made, error = None, (f"a worker was killed, perhaps for want of memory; go on with --resume {run_dir} "
                             f"--output-dir {args.output_dir} and fewer --jobs")
    except torch.OutOfMemoryError:
        error = "not enough GPU memory; lower --batch-size or --jobs, or take --device cpu"
    except OSError as problem:
        error = f"{problem.filename}: {problem.strerror}" if problem.filename else str(problem)
    finally:
        torch.set_num_threads(threads)
    if made and not list(made.parent.glob(f"*/*/{made.name}")):  # leave no empty run behind
        shutil.rmtree(made, ignore_errors=True)
    note(f"error: {' '.join(error.split())}")
    raise SystemExit(2)


if __name__ == "__main__":
    main()
