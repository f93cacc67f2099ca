"""Does it matter which samples go into a batch?

Strategies choose the samples of each batch, and may weight them; all else is the same. The control
is random selection with exactly as many trained samples, or, with --budget-seconds, in the same
time, selection included. A paired t-test over the seeds, with Holm's correction, says whether the
last test accuracy differs from the control's.

Measured (Fashion-MNIST, an MLP, 5 epochs, 5 seeds): at equal samples selective_backprop gains 0.80
± 0.12 points, and `smart`, the original's, does not differ significantly; with 20 % wrong labels
`smart` loses 1.98 ± 0.20 and self_paced gains 0.91 ± 0.17. In equal time, with correct labels,
nothing beats random.

    python batch_selection.py                                # MNIST, all strategies: some 4 minutes
    python batch_selection.py --quick                        # embedded data: under a minute
    python batch_selection.py --dataset fashion_mnist --label-noise 0 0.1 0.2 --no-benchmark
    python batch_selection.py --dataset fashion_mnist --budget-seconds 5
    python batch_selection.py --data FILE.csv --drop id      # numbers, and a column `label`
    python batch_selection.py --task nlp                     # a byte-level language model
    python batch_selection.py --resume                       # go on with the newest unfinished run

Results are in outputs/batch_selection/run-001/, with the next free number: results.json,
summary.md, pictures of the comparison, and runs/*.pt for --resume. As in the original,
outputs/vision/DATASET/STRATEGY/run-001/ has summary.txt and four pictures of each strategy.

A strategy, a data set and a model of your own are one line each, in a notebook before main([...]);
other changes need an edit of this file, or --jobs 1, since workers import it anew:
    STRATEGIES["sorted"] = lambda run: [(b, None) for b in split_batches(run.loss.argsort(), 64)]
    DATASETS["mine"] = Dataset(read_mine)  # read_mine(folder): x_train, y_train, x_test, y_test
    MODELS["vision"]["wide"] = lambda shape, classes: SimpleMLP(shape, classes, hidden=1024)

Sources: Human-Augment-Analytics/Training-Batch-Selection ("the original"), whose `smart` credited
each sample with the mean loss of its batch (--smart-loss batch-mean) and whose learning rate was
constant (--schedule constant); Balles et al. 2023, arXiv:2312.05021, and Kaddour et al. 2023,
arXiv:2307.06440, for the controls; the papers of the strategies at each of them.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.6", "numpy>=2.0", "pandas>=2.2", "scikit-learn>=1.7", "scipy>=1.14",
#     "matplotlib>=3.9", "tqdm>=4.66", "joblib>=1.4", "pyarrow>=17", "pillow>=10.4",
# ]
# ///

import argparse
import contextlib
import gzip
import hashlib
import http.client
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from common import (COLORS, MARKERS, detect_device, epoch_axis, in_notebook, legend_below,
                    mean_and_interval, new_figure, plot_curve, save_figure)

EXPERIMENT = "batch_selection"
BASELINE = "random"
# What is measured after each epoch, and its axis label. The first one of a task decides.
METRICS = {
    "vision": {"test_acc": "test accuracy [%]", "train_acc": "training accuracy [%]",
               "test_loss": "test loss", "train_loss": "training loss"},
    "nlp": {"bits_per_byte": "validation [bits per byte]", "perplexity": "validation perplexity",
            "validation_loss": "validation loss", "train_loss": "training loss"},
}
# The metric that decides: its name, 1 if more of it is better, and its unit.
DECIDING = {"vision": ("test_acc", 1, "points"), "nlp": ("bits_per_byte", -1, "bits per byte")}
# Defaults that depend on the task.
TASK_DEFAULTS = {
    "vision": {"model": "mlp", "batch_size": 64, "learning_rate": 0.001, "loss_threshold": 0.5},
    "nlp": {"model": "transformer", "batch_size": 16, "learning_rate": 0.003,
            "loss_threshold": 2.0},
}
MIN_RUNS = 3  # a paired t-test of two runs has one degree of freedom
ALPHA = 0.05


def parse_args(argv=None):
    """The command line as a namespace; an error is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        f"{EXPERIMENT}.py", argparse.SUPPRESS, __doc__.split("\n\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    names = [*DATASETS, *(f"{name}_csv" for name in DATASETS)]
    add("--quick", action="store_true", help="two small embedded data sets: under a minute")
    add("--task", choices=METRICS, default="vision", help="vision: classification; nlp: a "
        "language model of bytes")
    add("--dataset", choices=names, metavar="NAME", help="known data set, see --list-datasets; "
        "NAME_csv is converted to CSV once and then read from there; if unset, mnist, or digits "
        "if that cannot be downloaded")
    add("--data", metavar="PATH", help="CSV file of your own with a column `label` and columns of "
        "numbers (p0, p1, … from 0 to 255 are pixels); nlp: a text file or a folder of them")
    add("--drop", nargs="+", default=[], metavar="COLUMN", help="columns of --data to leave out")
    add("--data-dir", default="data", help="folder of the known data sets, one folder each")
    add("--benchmark-datasets", nargs="+", choices=names, metavar="NAME", help="further data sets; "
        "if unset, those of digits, mnist and fashion_mnist that are already here")
    add("--no-benchmark", action="store_true", help="no further data sets")
    add("--strategy", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), metavar="NAME",
        help="strategies to compare")
    add("--model", help="mlp or cnn; nlp: transformer; if unset, the first of the task")
    add("--label-noise", nargs="+", type=float, default=[0.0], metavar="SHARE", help="share of "
        "training labels that are replaced by another class; several shares are compared")
    add("--epochs", type=int, default=5, help="calls of a strategy; importance and "
        "rho_loss train on a fifth of the samples in each")
    add("--schedule", choices=["linear", "constant"], default="linear", help="learning rate: "
        "linear decay to zero, or constant as in the original")
    add("--budget-seconds", type=float, metavar="SECONDS", help="train for this time instead of "
        "--epochs, selection included; the learning rate decays to zero")
    add("--runs", type=int, default=5, help="number of seeds; the t-test needs 3")
    add("--seed", type=int, default=42, help="first seed")
    add("--batch-size", type=int, help="samples in a batch; if unset, 64; nlp: 16 windows")
    add("--learning-rate", type=float, help="learning rate of Adam; if unset, 0.001; nlp: 0.003")
    add("--explore-frac", type=float, default=0.5, help="smart, easy_first: share of a batch that "
        "is drawn from all samples")
    add("--top-k-frac", type=float, default=0.2, help="smart, easy_first: share of the training "
        "samples, the hardest or easiest, from which the rest of a batch is drawn")
    add("--ema-decay", type=float, default=0.9, help="decay of the tracked loss; 0 keeps "
        "the latest loss only")
    add("--smart-loss", choices=["per-sample", "batch-mean"], default="per-sample", help="tracked "
        "loss of a sample: its own, or, as in the original, the mean of its batch")
    add("--loss-threshold", type=float, help="the strategy loss_threshold trains on samples "
        "whose tracked loss is above it; if unset, 0.5; nlp: 2")
    add("--selectivity", type=float, default=1.0, help="selective_backprop: power of the "
        "percentile")
    add("--target", type=float, help="value of the metric until which samples and seconds are "
        "counted; if unset, 1 %% short of what random reaches")
    add("--window-len", type=int, default=64, help="nlp: bytes in a sample")
    add("--text-bytes", type=int, default=150_000, help="nlp: bytes of text to use")
    add("--device", type=detect_device, default="auto", help="auto, cuda, mps or cpu")
    add("--jobs", type=int, help="runs at a time, one thread each; if unset, one for each core, "
        "or 1 on a GPU, with --quick and with --budget-seconds")
    add("--backend", choices=["loky", "dask"], default="loky", help="joblib's backend: this "
        "machine, or a dask cluster at DASK_SCHEDULER_ADDRESS that shares the folders")
    add("--output-dir", default="outputs", help="folder of all results")
    add("--resume", nargs="?", const="newest", metavar="RUN_DIR", help="unfinished run to go on "
        "with; without a value, the newest")
    add("--list-datasets", action="store_true", help="list the known data sets and exit")
    add("--download", nargs="+", choices=list(DATASETS), metavar="NAME", help="download data sets "
        "to --data-dir and exit")
    add("--check-device", action="store_true", help="show what this machine computes with and exit")
    if "--quick" in (argv or []):
        parser.set_defaults(runs=3, jobs=1, text_bytes=15_000)
    args = parser.parse_args(argv)
    check_args(args, parser.error)
    args.strategy = list(dict.fromkeys(args.strategy))
    args.label_noise = list(dict.fromkeys(args.label_noise))
    if args.quick and args.task == "vision" and not args.data:
        args.dataset = args.dataset or "digits"
        if not args.no_benchmark:
            args.benchmark_datasets = args.benchmark_datasets or ["breast_cancer"]
    for name, value in TASK_DEFAULTS[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.jobs is None:
        alone = args.device.type != "cpu" or args.budget_seconds
        args.jobs = 1 if alone else os.cpu_count()
    if args.data:
        args.data = os.path.abspath(args.data)  # a resumed run may be started elsewhere
    return args


def check_args(args, error):
    """Call `error` with a message if an argument is out of range or does not fit another."""
    least = {"epochs": 1, "runs": 1, "batch_size": 1, "jobs": 1, "text_bytes": 1, "window_len": 2,
             "seed": 0, "learning_rate": 0, "loss_threshold": 0, "selectivity": 0,
             "budget_seconds": 1e-3, "explore_frac": 0, "top_k_frac": 0, "ema_decay": 0,
             "label_noise": 0}
    most = dict.fromkeys(("explore_frac", "top_k_frac", "ema_decay", "label_noise"), 1)
    most["seed"] = 2**31
    for name, low in least.items():
        high = most.get(name, math.inf)
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not low <= value <= high:
                error(f"--{name.replace('_', '-')} {value} is not between {low} and {high:g}")
    if args.model not in (None, *MODELS[args.task]):
        error(f"--model {args.model}: --task {args.task} has {', '.join(MODELS[args.task])}")
    if args.task == "nlp" and (any(args.label_noise) or args.dataset or args.benchmark_datasets):
        error("--dataset, --benchmark-datasets and --label-noise are for --task vision; --task nlp "
              "takes --data")
    if args.data and (args.dataset or args.benchmark_datasets):
        error("--data excludes --dataset and --benchmark-datasets")
    if args.no_benchmark and args.benchmark_datasets:
        error("--no-benchmark and --benchmark-datasets exclude each other")
    if args.drop and not args.data:
        error("--drop is for --data")


# --- Strategies ---------------------------------------------------------------------------------
# A strategy gets the Learner (below) and returns or yields the batches of one epoch, at least one,
# as pairs: row numbers of training samples [batch], and their weights [batch] or None. The loss of
# a batch is the mean of weight x loss. What a strategy sees:
#   learner.loss                 moving average of each sample's loss [samples]; inf, thus harder
#                                than all others, where unseen
#   learner.last_loss            its latest loss [samples], inf where unseen
#   learner.score(rows)          present losses of these samples, by a forward pass
#   learner.gradient_norm(rows)  and the norms of the loss's gradients at the logits
#   learner.progress()           share of the training that is done, from 0 to 1
#   learner.memory               numpy arrays that last from epoch to epoch
#   learner.rng, learner.args    a numpy Generator and the command line


def split_batches(rows, size):
    """Cut `rows` into batches of `size`; the last one may be smaller."""
    return np.split(rows, range(size, len(rows), size))


def fill_batches(selections, size):
    """Batches of `size` from selections of at most so many rows, which wait until they fill one;
    the last batch may be smaller."""
    waiting = np.empty(0, int)
    for selected in selections:
        waiting = np.concatenate([waiting, selected])
        if len(waiting) >= size:
            yield waiting[:size], None
            waiting = waiting[size:]
    if len(waiting):
        yield waiting, None


def random_batches(learner):
    """Every sample once an epoch, in a new random order."""
    order = learner.rng.permutation(len(learner.loss))
    return [(rows, None) for rows in split_batches(order, learner.args.batch_size)]


def fixed_batches(learner):
    """Every sample once an epoch, always in the order of the file."""
    order = np.arange(len(learner.loss))
    return [(rows, None) for rows in split_batches(order, learner.args.batch_size)]


def explore_and_focus(learner, focus, size):
    """A batch of `size` rows: --explore-frac of it from all samples, the rest from `focus`."""
    explore = round(learner.args.explore_frac * size)
    explored = learner.rng.choice(len(learner.loss), explore, replace=False)
    is_small = len(focus) < size - explore
    focused = learner.rng.choice(focus, size - explore, replace=is_small)
    return np.concatenate([explored, focused])


def smart(learner):
    """Half of a batch from all samples, half from the 20 % with the highest tracked loss.

    The hardest are found anew for each batch, together with all that tie with the last of them; so
    the first batches are random. The original's strategy, but with each sample's own loss
    (--smart-loss).
    """
    loss = learner.loss
    focus_size = max(1, round(learner.args.top_k_frac * len(loss)))
    for batch in split_batches(loss, learner.args.batch_size):
        threshold = np.partition(loss, -focus_size)[-focus_size]
        yield explore_and_focus(learner, np.flatnonzero(loss >= threshold), len(batch)), None


def easy_first(learner):
    """The reverse of smart: half of a batch from the 20 % with the lowest tracked loss.

    Unseen samples count as the hardest, so the first epoch returns to those that it began with.
    """
    loss = learner.loss
    focus_size = max(1, round(learner.args.top_k_frac * len(loss)))
    for batch in split_batches(loss, learner.args.batch_size):
        threshold = np.partition(loss, focus_size - 1)[focus_size - 1]
        yield explore_and_focus(learner, np.flatnonzero(loss <= threshold), len(batch)), None


def self_paced(learner, limit=2):
    """The samples whose present loss is below a limit (Kumar et al. 2010, self-paced learning).

    The limit is `limit` times the loss of chance, the logarithm of the number of classes: a sample
    waits while its label is that unlikely, as a wrong one is. The limit is fixed instead of
    growing, and 2 was chosen on 10,000 of Fashion-MNIST's training images.
    """
    highest = limit * math.log(learner.data.num_classes)
    likely = (rows[learner.score(rows) < highest] for rows, _ in random_batches(learner))
    yield from fill_batches(likely, learner.args.batch_size)


def loss_threshold(learner):
    """The samples whose tracked loss is above --loss-threshold, in random order.

    If they are less than a batch, the hardest are taken. The original's strategy for language. A
    sample that has once fallen below is not seen again, so its tracked loss stays as it was.
    """
    size = learner.args.batch_size
    rows = np.flatnonzero(learner.loss > learner.args.loss_threshold)
    if len(rows) < size:
        rows = np.argsort(-learner.loss, kind="stable")[:size]
    return [(batch, None) for batch in split_batches(learner.rng.permutation(rows), size)]


def selective_backprop(learner, history=1024):
    """Train on a sample with the probability of its loss's percentile (Jiang et al. 2019).

    The percentile, to the power of --selectivity, is among the last `history` losses of this
    epoch. Every sample has a forward pass; the selected ones wait until they fill a batch.
    arXiv:1910.00762.
    """

    def select():
        recent = np.empty(0)
        for candidates, _ in random_batches(learner):
            losses = learner.score(candidates)
            recent = np.concatenate([recent, losses])[-history:]
            percentile = np.searchsorted(np.sort(recent), losses, side="right") / len(recent)
            chance = percentile**learner.args.selectivity
            yield candidates[learner.rng.random(len(candidates)) < chance]

    yield from fill_batches(select(), learner.args.batch_size)


def infobatch(learner, ratio=0.5):
    """Leave out a random half of the samples below the mean loss (Qin et al. 2024, ICLR).

    Those that are kept have weight 2, so that the expected gradient stays the same. The first epoch
    and the last eighth, at least the last epoch, take every sample. arXiv:2303.04947.
    """
    loss = learner.last_loss
    order = learner.rng.permutation(len(loss))
    weights = np.ones(len(loss), np.float32)
    is_late = learner.progress() > 7 / 8 or learner.is_last_epoch()
    if np.isfinite(loss).all() and not is_late:
        is_easy = loss < loss.mean()
        is_left_out = is_easy & (learner.rng.random(len(loss)) < ratio)
        weights[is_easy] = 1 / (1 - ratio)
        order = order[~is_left_out[order]]
    return [(rows, weights[rows]) for rows in split_batches(order, learner.args.batch_size)]


def importance(learner, pool=5):
    """Importance sampling by the norm of softmax minus one-hot (Katharopoulos and Fleuret 2018).

    A batch is drawn, with replacement, from `pool` batches of candidates in proportion to their
    norms; a sample's weight is 1 / (candidates x its probability), so that the expected gradient
    stays the same. Without their switch that waits until the variance falls. arXiv:1803.00942.
    """
    order = learner.rng.permutation(len(learner.loss))
    for candidates in split_batches(order, pool * learner.args.batch_size):
        norms = learner.gradient_norm(candidates).astype(float) + 1e-8
        probabilities = norms / norms.sum()
        size = math.ceil(len(candidates) / pool)
        drawn = learner.rng.choice(len(candidates), size, p=probabilities)
        weights = 1 / (len(candidates) * probabilities[drawn])
        yield candidates[drawn], weights.astype(np.float32)


def loss_rank(learner, pressure=100):
    """Draw samples by the rank of their latest loss (Loshchilov and Hutter 2016).

    The hardest sample is `pressure` times as likely as the easiest one in the beginning, and as
    likely in the end. Ranks are those at the start of an epoch, which is as long as random's;
    draws are with replacement. arXiv:1511.06343.
    """
    n = len(learner.loss)
    order = learner.rng.permutation(n)  # ties, as before the first epoch, are in random order
    order = order[np.argsort(-learner.last_loss[order], kind="stable")]
    log_pressure = math.log(pressure) * (1 - learner.progress())
    probabilities = np.exp(-log_pressure * np.arange(n) / n)
    cumulative = probabilities.cumsum() / probabilities.sum()
    ranks = np.searchsorted(cumulative, learner.rng.random(n)).clip(max=n - 1)
    return [(rows, None) for rows in split_batches(order[ranks], learner.args.batch_size)]


def rho_loss(learner, pool=5):
    """The largest reducible losses among `pool` batches of candidates (Mindermann et al. 2022).

    The reducible loss is the present loss minus that of a small hold-out model, which is high for
    a wrong label. Instead of further data there are two hold-out models, each trained on one half
    of the training samples for the other half. arXiv:2206.07137.
    """
    if "holdout_loss" not in learner.memory:
        learner.memory["holdout_loss"] = holdout_losses(learner)
    order = learner.rng.permutation(len(learner.loss))
    for candidates in split_batches(order, pool * learner.args.batch_size):
        reducible = learner.score(candidates) - learner.memory["holdout_loss"][candidates]
        size = math.ceil(len(candidates) / pool)
        yield candidates[np.argsort(-reducible, kind="stable")[:size]], None


def holdout_losses(learner):
    """Loss of each training sample [samples] under a small model that has not seen it.

    Each of two models is trained for one epoch on a random half. These samples are added to
    learner.samples, so that the control gets them, too.
    """
    args, data = learner.args, learner.data
    losses = np.empty(len(learner.loss), np.float32)
    first, second = np.array_split(learner.rng.permutation(len(losses)), 2)
    for seen, unseen in ((first, second), (second, first)):
        model = HOLDOUT_MODELS[args.task](data.x_train.shape[1:], data.num_classes)
        model.to(args.device)
        optimizer = make_optimizer(model, args)
        for rows in split_batches(seen, args.batch_size):
            loss = sample_losses(model, *data.training_samples(rows))[0].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        learner.samples += len(seen)
        with torch.inference_mode():
            for rows in split_batches(unseen, 1000):
                present, _ = sample_losses(model, *data.training_samples(rows))
                losses[rows] = present.cpu().numpy()
    return losses


STRATEGIES = {"random": random_batches, "fixed": fixed_batches, "smart": smart,
              "easy_first": easy_first, "self_paced": self_paced, "loss_threshold": loss_threshold,
              "selective_backprop": selective_backprop, "loss_rank": loss_rank,
              "infobatch": infobatch, "importance": importance, "rho_loss": rho_loss}


# --- Data: known data sets ----------------------------------------------------------------------


@dataclass
class Data:
    """Training and test samples, as numpy arrays or tensors.

    Vision: x [n, channels, height, width] or [n, features], y [n]. Language: x and y [n, window]
    bytes, y one byte further on, and no mean.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int
    info: dict  # source, numbers of samples, classes, sha256, score of a simple baseline
    mean: float | None = None
    std: float | None = None

    def to(self, device):
        """The same as tensors on the device, normalized: x is (x - mean) / std."""
        tensors = {name: torch.tensor(value, device=device).long() for name, value in
                   vars(self).items() if name.startswith("y_")}
        for name in ("x_train", "x_test"):
            x = torch.tensor(getattr(self, name), device=device)
            if self.mean is None:
                tensors[name] = x.long()
            else:
                tensors[name] = x.float().sub_(self.mean).div_(self.std)
        return replace(self, **tensors)

    def training_samples(self, rows):
        """(x, y) of these rows; index_select is several times faster than x_train[rows]."""
        index = torch.from_numpy(rows).to(self.x_train.device)
        return self.x_train.index_select(0, index), self.y_train.index_select(0, index)


@dataclass
class Dataset:
    """A known data set: read(folder) returns x_train, y_train, x_test and y_test."""

    read: Callable
    about: str = ""
    url: str = ""  # of a file, whose name takes the place of {}
    files: dict = field(default_factory=dict)  # {name: published MD5}
    unpacked: list = field(default_factory=list)  # MD5s of the files' unpacked content
    system_folder: str = ""  # where a system's package puts the files


def read_idx(path):
    """The array in a gzipped IDX file: type and number of dimensions, sizes, values."""
    content = gzip.decompress(path.read_bytes())
    value_type = {8: ">u1", 12: ">i4"}[content[2]]
    shape = np.frombuffer(content, ">i4", content[3], 4)
    return np.frombuffer(content, value_type, offset=4 + 4 * len(shape)).reshape(shape)


def read_mnist(folder):
    """The four files of MNIST and of those that have its format."""
    arrays = []
    for split in ("train", "t10k"):
        arrays.append(read_idx(folder / f"{split}-images-idx3-ubyte.gz")[:, None])
        arrays.append(read_idx(folder / f"{split}-labels-idx1-ubyte.gz"))
    return arrays


def read_qmnist(folder):
    """The four files of QMNIST; the first of eight label columns is the class."""
    arrays = []
    for split in ("train", "test"):
        arrays.append(read_idx(folder / f"qmnist-{split}-images-idx3-ubyte.gz")[:, None])
        arrays.append(read_idx(folder / f"qmnist-{split}-labels-idx2-int.gz")[:, 0])
    return arrays


def read_cifar(folder):
    """CIFAR's binary archive: records of one label (CIFAR-100: coarse, then fine) and an image."""
    (path,) = folder.glob("cifar-*-binary.tar.gz")
    label_bytes = 2 if "100" in path.name else 1
    splits = {"train": {}, "test": {}}
    with tarfile.open(path) as archive:
        for member in archive:
            name = Path(member.name).name
            if name.endswith(".bin"):
                split = "test" if name.startswith("test") else "train"
                splits[split][name] = archive.extractfile(member).read()
    arrays = []
    for contents in splits.values():
        content = b"".join(contents[name] for name in sorted(contents))
        records = np.frombuffer(content, np.uint8).reshape(-1, label_bytes + 3 * 32 * 32)
        arrays.append(records[:, label_bytes:].reshape(-1, 3, 32, 32))
        arrays.append(records[:, label_bytes - 1])
    return arrays


def read_cinic(folder):
    """CINIC-10's folders train/CLASS/*.png and test/CLASS/*.png, unpacked first where need be.

    In a fixed random order, since the folders are sorted by class; `valid` is not used.
    """
    from PIL import Image

    archive = folder / "CINIC-10.tar.gz"
    images = folder / "images"
    if not images.exists() and archive.exists():
        log(f"unpacking {archive}")
        with tempfile.TemporaryDirectory(dir=folder) as part, tarfile.open(archive) as tar:
            tar.extractall(f"{part}/images", filter="data")
            os.replace(f"{part}/images", images)
    root = next((images if images.exists() else folder).rglob("train")).parent
    classes = sorted(path.name for path in (root / "train").iterdir())
    arrays = []
    for split in ("train", "test"):
        paths = sorted(root.glob(f"{split}/*/*.png"))
        paths = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))]
        images = []
        for path in progress(paths, f"CINIC-10, {split}"):
            images.append(np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1))
        arrays += [np.stack(images), np.array([classes.index(path.parent.name) for path in paths])]
    return arrays


def read_digits(folder):
    """scikit-learn's 1,797 digits of 8 × 8 pixels; a fixed fifth is the test part."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return split_samples(x.astype(np.uint8).reshape(-1, 1, 8, 8), y)


def read_breast_cancer(folder):
    """scikit-learn's 569 tumours with 30 features; a fixed fifth is the test part."""
    from sklearn.datasets import load_breast_cancer

    return standardize(*split_samples(*load_breast_cancer(return_X_y=True)))


def split_samples(x, y):
    """x_train, y_train, x_test, y_test: a fixed fifth, stratified, is the test part."""
    from sklearn.model_selection import train_test_split

    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, random_state=0,
                                                        stratify=y)
    return x_train, y_train, x_test, y_test


def standardize(x_train, y_train, x_test, y_test):
    """The same with each column of x standardized by the training part, as float32."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x_train)  # in float64: float32 loses small steps of large numbers
    x_train, x_test = (scaler.transform(x).astype(np.float32) for x in (x_train, x_test))
    return x_train, y_train, x_test, y_test


DATASETS = {
    "digits": Dataset(read_digits, "10 classes, 1,797 samples, embedded"),
    "breast_cancer": Dataset(read_breast_cancer, "2 classes, 569 samples, embedded"),
    "mnist": Dataset(
        read_mnist, "10 classes, 70,000 samples, 12 MB",
        "https://ossci-datasets.s3.amazonaws.com/mnist/{}", {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"},
        ["6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624",
         "2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"]),
    "fashion_mnist": Dataset(
        read_mnist, "10 classes, 70,000 samples, 31 MB",
        "https://fashion-mnist.s3.eu-central-1.amazonaws.com/{}", {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310"},
        ["f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9",
         "8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965"],
        "/usr/share/datasets/fashion-mnist"),  # Debian's package dataset-fashion-mnist
    "qmnist": Dataset(
        read_qmnist, "10 classes, 120,000 samples, 20 MB",
        "https://raw.githubusercontent.com/facebookresearch/qmnist/master/{}", {
            "qmnist-train-images-idx3-ubyte.gz": "ed72d4157d28c017586c42bc6afe6370",
            "qmnist-train-labels-idx2-int.gz": "0058f8dd561b90ffdd0f734c6a30e5e4",
            "qmnist-test-images-idx3-ubyte.gz": "1394631089c404de565df7b7aeaf9412",
            "qmnist-test-labels-idx2-int.gz": "5b5b05890a5e13444e108efe57b788aa"}),
    "cifar10": Dataset(
        read_cifar, "10 classes, 60,000 samples, 162 MB", "https://www.cs.toronto.edu/~kriz/{}",
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}),
    "cifar100": Dataset(
        read_cifar, "100 classes, 60,000 samples, 161 MB", "https://www.cs.toronto.edu/~kriz/{}",
        {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"}),
    "cinic10": Dataset(
        read_cinic, "10 classes, 180,000 samples, 688 MB", "https://datashare.ed.ac.uk/server/api/"
        "core/bitstreams/e8e186cc-2688-48f1-aa5a-3fda1a43f8b6/content",
        {"CINIC-10.tar.gz": "6ee4d0c996905fe93221de577967a372"}),
}
# Unless --benchmark-datasets names others, those of them that are already here are used.
BENCHMARK = ["digits", "mnist", "fashion_mnist"]


def find_folder(name, data_dir):
    """The folder with the files of a known data set; None when they are not here."""
    dataset = DATASETS[name]
    folders = [Path(data_dir, name)]
    if dataset.system_folder:
        folders.append(Path(dataset.system_folder))
    for folder in folders:
        if all((folder / file).exists() for file in dataset.files):
            return folder
    if any(Path(data_dir, name).glob("**/train/*/*.png")):
        return Path(data_dir, name)
    return None


def download(name, data_dir):
    """Download the missing files of a data set to data_dir/name, and check their MD5.

    A server must answer within 3 s, and may then pause for up to a minute.
    """
    dataset = DATASETS[name]
    for file, md5 in dataset.files.items():
        path = Path(data_dir, name, file)
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        url = dataset.url.format(file)
        try:
            with urllib.request.urlopen(url, timeout=3) as response, atomic_write(path) as part:
                response.fp.raw._sock.settimeout(60)
                with part.open("wb") as target:
                    shutil.copyfileobj(response, target)
                if compute_md5(part) != md5:
                    raise UserError(f"{url}: its MD5 is not the published one, {md5}; try again")
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError) as error:
            raise UserError(f"{name}: cannot download {url} ({error}); put {file} into "
                            f"{path.parent}, or use --dataset digits") from None


def compute_md5(path):
    """The MD5 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def check_files(name, folder):
    """Compare the files of a data set with the published ones, packed or unpacked.

    Raises UserError for a file of another data set; a file that is unknown is noted.
    """
    owners = {md5: other for other, dataset in DATASETS.items()
              for md5 in [*dataset.files.values(), *dataset.unpacked]}
    for path in (folder / file for file in DATASETS[name].files):
        if not path.exists():
            continue  # CINIC-10 may be there as a folder only
        owner = owners.get(compute_md5(path))
        if owner is None and "idx" in path.name:
            with gzip.open(path) as file:
                owner = owners.get(hashlib.file_digest(file, "md5").hexdigest())
        if owner is None:
            note(f"{path} is not the file that was published as {name}")
        elif owner != name:
            raise UserError(f"{path} is a file of {owner}; move it to a folder {owner}")


def make_data(name, arrays, source, class_names=None):
    """Data with mean and deviation of all values of the training part."""
    x_train, y_train, x_test, y_test = (np.ascontiguousarray(array) for array in arrays)
    num_classes = len(class_names or np.unique(y_train))
    classes = np.arange(num_classes)
    for x, y in ((x_train, y_train), (x_test, y_test)):
        if not 0 < len(x) == len(y) or x.shape[1:] != x_train.shape[1:]:
            raise UserError(f"{name}: images {x.shape} and labels {y.shape} do not fit together")
        if not np.isin(y, classes).all():
            raise UserError(f"{name}: labels must be 0 to {num_classes - 1}, all of them in the "
                            f"training part, not {np.setdiff1d(y, classes)[:5]}")
        if not np.isfinite(x).all():
            raise UserError(f"{name}: a value is missing or infinite")
    y_train, y_test = y_train.astype(np.int64), y_test.astype(np.int64)
    if x_train.dtype != np.uint8:
        x_train, x_test = x_train.astype(np.float32), x_test.astype(np.float32)
    digest = hashlib.sha256()
    for array in (x_train, y_train, x_test, y_test):
        digest.update(array)
    majority = 100 * np.mean(y_test == np.bincount(y_train).argmax())
    info = {"source": source, "train": len(x_train), "test": len(x_test),
            "classes": class_names or num_classes, "sha256": digest.hexdigest(),
            "baseline": {"majority class, test accuracy [%]": majority}}
    mean = float(x_train.mean(dtype=np.float64))
    std = float(x_train.std(dtype=np.float32)) or 1.0
    return Data(name, x_train, y_train, x_test, y_test, num_classes, info, mean, std)


def load_dataset(name, data_dir):
    """Data of a known data set, downloaded or converted to CSV where need be."""
    original_name = name.removesuffix("_csv")
    dataset = DATASETS[original_name]
    tables = [Path(data_dir, name, f"{split}.csv") for split in ("train", "test")]
    if not dataset.files and name == original_name:
        return make_data(name, dataset.read(None), "embedded" if dataset.about else "own")
    source = "real" if dataset.files else "embedded"
    try:
        if name == original_name or not all(table.exists() for table in tables):
            folder = find_folder(original_name, data_dir)
            if dataset.files and folder is None:
                download(original_name, data_dir)
                folder = Path(data_dir, original_name)
            if dataset.files:
                check_files(original_name, folder)
            arrays = dataset.read(folder)
            if name == original_name:
                return make_data(name, arrays, source)
            write_csv(tables[0], *arrays[:2])
            write_csv(tables[1], *arrays[2:])
        return make_data(name, [*read_csv(tables[0]), *read_csv(tables[1])], source)
    except (ValueError, LookupError, EOFError, zlib.error, tarfile.TarError, StopIteration,
            gzip.BadGzipFile) as error:
        raise UserError(f"{name} in {data_dir}: a file is damaged or incomplete ({error}); delete "
                        "it, then it is downloaded again") from None


# --- Data: CSV and text -------------------------------------------------------------------------


def write_csv(path, x, y):
    """Write `label,p0,p1,…`, one sample a line; `label,f0,f1,…` for features that are no pixels."""
    import pyarrow as pa
    from pyarrow import csv

    letter = "p" if x.dtype == np.uint8 else "f"
    values = np.ascontiguousarray(x.reshape(len(x), -1).T)
    columns = {f"{letter}{i}": column for i, column in enumerate(values)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        csv.write_csv(pa.table({"label": y.astype(np.uint8)} | columns), part)


def read_csv(path):
    """(x, y) of a file that write_csv wrote."""
    from pyarrow import csv

    with path.open() as file:
        names = file.readline().strip().replace('"', "").split(",")
    types = {name: "float32" if name.startswith("f") else "uint8" for name in names}
    table = csv.read_csv(path, convert_options=csv.ConvertOptions(column_types=types))
    label, *columns = (column.to_numpy() for column in table.columns)
    return to_images(np.column_stack(columns), names[1:]), label


def to_images(x, names):
    """x [n, channels, height, width], uint8, if its columns are p0, p1, … from 0 to 255 and as many
    as the pixels of a square image, grey or RGB; else x as it is."""
    pixels = x.clip(0, 255).astype(np.uint8)
    if names != [f"p{i}" for i in range(len(names))] or (pixels != x).any():
        return x
    for channels in (3, 1):
        side = math.isqrt(len(names) // channels)
        if channels * side * side == len(names):
            return pixels.reshape(-1, channels, side, side)
    return x


def read_table(path, drop):
    """(x [n, features], labels [n], names of the features) of a CSV file with a column `label`."""
    try:
        header = pd.read_csv(path, header=None, nrows=1, dtype=str, encoding="utf-8-sig").iloc[0]
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
            frame = pd.read_csv(path, converters={"label": str.strip}, index_col=False,
                                skipinitialspace=True, encoding="utf-8-sig")
    except (ValueError, pd.errors.ParserWarning) as error:
        raise UserError(f"{path}: {error}") from None
    if frame.empty:
        raise UserError(f"{path}: has no rows")
    missing = set(drop) - set(frame)
    if missing:
        raise UserError(f"--drop: {path} has no column {sorted(missing)}")
    frame = frame.drop(columns=drop)
    names = [name for name in frame if name != "label"]
    if "label" not in frame or not names:
        is_number = pd.to_numeric(pd.Series(list(frame)), errors="coerce").notna()
        hint = "; has it no header?" if is_number.any() else ", separated by commas"
        raise UserError(f"{path}: needs a column `label` and another one{hint}; it has "
                        f"{list(frame)[:5]}")
    if header.duplicated().any():
        raise UserError(f"{path}: two columns are called {header[header.duplicated()].iloc[0]!r}")
    for name in names:
        column = pd.to_numeric(frame[name], errors="coerce").astype(float)
        is_bad = ~np.isfinite(column)
        if is_bad.any():
            raise UserError(f"{path}: row {is_bad.argmax() + 1}, column {name!r}: "
                            f"{frame[name][is_bad.argmax()]} is no number; see --drop")
        frame[name] = column
    is_missing = frame["label"].isna() | (frame["label"] == "")
    if is_missing.any():
        raise UserError(f"{path}: row {is_missing.argmax() + 1} has no label, or one that means a "
                        "missing value")
    note_doubtful(frame, path)
    frame = frame.drop_duplicates()
    return frame[names].to_numpy(), frame["label"].to_numpy(), names


def note_doubtful(frame, path):
    """Note what makes the result of a table doubtful: repeated rows, ids, spellings of a class."""
    repeated = frame.duplicated().sum()
    if repeated:
        note(f"{path}: {repeated:,} of {len(frame):,} rows repeat an earlier one and are left out, "
             "so that no row is in both parts")
    for name in frame.columns.drop("label"):
        values = frame[name].drop_duplicates()
        is_counter = (len(values) == len(frame) - repeated and (values % 1 == 0).all()
                      and (np.ptp(values) == len(values) - 1 or values.is_monotonic_increasing))
        if not is_counter and not re.fullmatch(r"(.*_)?id|index|row|unnamed: \d+", name, re.I):
            continue
        copies = frame.drop(columns=name).duplicated().sum() - repeated
        note(f"{path}: column {name!r} seems to number the rows; if they are sorted by class, it "
             f"gives the class away, and it hides {copies:,} repeated rows: --drop {name!r} leaves "
             "it out")
    labels = frame["label"].drop_duplicates()
    spellings = labels.groupby(labels.str.casefold()).agg(list)
    for spelling in spellings[spellings.str.len() > 1]:
        note(f"{path}: the labels {spelling} differ in case only, and are classes of their own")


def load_table(path, drop):
    """Data of one's own CSV file; a fixed fifth, stratified, is the test part."""
    x, labels, names = read_table(path, drop)
    classes, y, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(classes) < 2 or counts.min() < 2 or len(y) < 5 * len(classes):
        raise UserError(f"{path}: label needs two classes, each in two rows, in five on average; "
                        f"it has {len(classes)} in {len(y)} rows, {classes[counts.argmin()]!r} in "
                        f"{counts.min()}; is it a number instead of a class?")
    x = to_images(x, names)
    arrays = split_samples(x, y)
    if x.dtype != np.uint8:
        arrays = standardize(*arrays)
    return make_data(Path(path).stem, arrays, "real", classes.tolist())


def load_text(path, args):
    """Data of text as bytes: windows without overlap; the last tenth is the validation part.

    Without a path the text is the standard library's source, its files in a fixed random order.
    """
    root = Path(path) if path else Path(os.__file__).parent
    paths = sorted(root.rglob("*") if path else root.glob("*.py"))
    paths = [file for file in paths if file.is_file()] or [root]
    text = b""
    for i in np.random.default_rng(0).permutation(len(paths)):
        if len(text) < args.text_bytes:
            text += paths[i].read_bytes()
    text = np.frombuffer(text[: args.text_bytes], np.uint8)
    windows = (len(text) - 1) // args.window_len
    cut = windows - max(1, windows // 10)
    if cut < 2:
        raise UserError(f"{root}: {len(text):,} bytes are less than three windows of "
                        f"{args.window_len}")
    x, y = (text[i : i + windows * args.window_len].reshape(windows, -1) for i in (0, 1))  # views
    pairs = np.ones((256, 256))  # each pair of bytes once more than seen
    np.add.at(pairs, (x[:cut], y[:cut]), 1)
    bigram = -np.log2(pairs / pairs.sum(1, keepdims=True))[x[cut:], y[cut:]].mean()
    info = {"source": "real" if path else "embedded", "train": cut, "test": windows - cut,
            "bytes": len(text), "classes": 256, "sha256": hashlib.sha256(text).hexdigest(),
            "baseline": {"pairs of bytes, bits per byte": bigram}}
    name = root.resolve().stem if path else "python_stdlib"
    return Data(name, x[:cut], y[:cut], x[cut:], y[cut:], 256, info)


def load_all(args):
    """({name: Data}, the arguments with the data sets that were found)."""
    if args.task == "nlp":
        data = load_text(args.data, args)
        return {data.name: data}, args
    if args.data:
        data = load_table(args.data, args.drop)
        return {data.name: data}, args
    names = [args.dataset or "mnist"]
    if args.benchmark_datasets:
        names += args.benchmark_datasets
    elif not args.no_benchmark:
        names += [name for name in BENCHMARK if find_folder(name, args.data_dir)]
    loaded = {}
    for name in dict.fromkeys(names):
        try:
            loaded[name] = load_dataset(name, args.data_dir)
        except UserError as error:
            if args.dataset:
                raise
            note(f"no mnist ({error}); scikit-learn's digits are used")
            loaded["digits"] = load_dataset("digits", args.data_dir)
    first, *others = loaded
    found = {"dataset": first, "benchmark_datasets": others or None, "no_benchmark": not others}
    return loaded, argparse.Namespace(**vars(args) | found)


# --- Models: model(shape of a sample, classes) ---------------------------------------------------


class SimpleMLP(nn.Sequential):
    """The original's classifier, 784-128-10 on MNIST. [batch, …] to logits [batch, classes]."""

    def __init__(self, shape, classes, hidden=128):
        super().__init__(nn.Flatten(), nn.Linear(math.prod(shape), hidden), nn.ReLU(),
                         nn.Linear(hidden, classes))


class SmallCNN(nn.Sequential):
    """Two convolutions with pooling and a linear layer. [batch, channels, height, width] to logits
    [batch, classes]."""

    def __init__(self, shape, classes, width=16):
        if len(shape) != 3 or min(shape[1:]) < 4:
            raise UserError(f"--model cnn needs images of 4 × 4 or more, not {tuple(shape)}")
        channels, height, side = shape
        super().__init__(
            nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(2 * width * (height // 4) * (side // 4), classes))


class Block(nn.Module):
    """Pre-norm decoder layer: causal self-attention, then a feed-forward network; [batch, time,
    d_model] to the same shape."""

    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(),
                                 nn.Linear(4 * d_model, d_model))

    def forward(self, x):
        batch, time_steps, d_model = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, time_steps, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, time, d_head]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, time_steps, d_model))
        return x + self.mlp(self.norm2(x))


class TinyTransformer(nn.Module):
    """Decoder-only language model. Bytes [batch, time] to logits [batch, time, classes]."""

    def __init__(self, shape, classes, d_model=64, num_heads=4, num_layers=2):
        super().__init__()
        self.tokens = nn.Embedding(classes, d_model)
        self.positions = nn.Embedding(shape[0], d_model)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        blocks = [Block(d_model, num_heads) for _ in range(num_layers)]
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(d_model))

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.blocks(x) @ self.tokens.weight.T  # input and output embedding are one


MODELS = {"vision": {"mlp": SimpleMLP, "cnn": SmallCNN}, "nlp": {"transformer": TinyTransformer}}
# The small models of rho_loss.
HOLDOUT_MODELS = {"vision": partial(SimpleMLP, hidden=32),
                  "nlp": partial(TinyTransformer, d_model=32, num_heads=2, num_layers=1)}


def sample_losses(model, x, y):
    """(cross-entropy of each sample [batch], of a window the mean over its bytes; logits)."""
    logits = model(x)
    if y.dim() == 1:
        return F.cross_entropy(logits, y, reduction="none"), logits
    losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
    return losses.view(y.shape).mean(1), logits


# --- Training -----------------------------------------------------------------------------------


def make_optimizer(model, args):
    """The optimizer of the model, and of the hold-out models of rho_loss."""
    fused = args.device.type != "mps"
    return torch.optim.Adam(model.parameters(), args.learning_rate, fused=fused)


class Learner:
    """A model in training: what a strategy sees, and what a checkpoint keeps.

    The same seed means the same first weights and random numbers for every strategy.
    """

    def __init__(self, data, make_model, seed, args, max_samples=None):
        torch.manual_seed(seed)
        self.data = data
        self.args = args
        self.max_samples = max_samples
        self.model = make_model(data.x_train.shape[1:], data.num_classes).to(args.device)
        self.optimizer = make_optimizer(self.model, args)
        self.rng = np.random.default_rng(seed)
        self.loss = np.full(len(data.x_train), np.inf, np.float32)
        self.last_loss = self.loss.copy()
        self.memory = {}
        self.samples = 0  # trained on
        self.steps = 0  # batches of this epoch up to now
        self.expected_steps = 0  # batches of this epoch
        self.seconds = 0.0  # of training and selection, without evaluation
        self.start_time = None  # of the epoch that is going on
        self.history = []  # metrics before training and after each epoch

    @torch.inference_mode()
    def score(self, rows):
        """Present losses of the training samples `rows`, as an array, by one forward pass."""
        self.model.eval()
        losses, _ = sample_losses(self.model, *self.data.training_samples(rows))
        self.model.train()
        return losses.cpu().numpy()

    @torch.inference_mode()
    def gradient_norm(self, rows):
        """Norms of softmax minus one-hot, the gradient of the loss at the logits."""
        x, y = self.data.training_samples(rows)
        self.model.eval()
        _, logits = sample_losses(self.model, x, y)
        self.model.train()
        error = logits.softmax(-1) - F.one_hot(y, logits.shape[-1])
        return error.flatten(1).norm(dim=1).cpu().numpy()

    def elapsed(self):
        """Seconds of training up to now."""
        if self.start_time is None:
            return self.seconds
        return self.seconds + time.perf_counter() - self.start_time

    def progress(self):
        """Share of the training that is done, from 0 to 1. An epoch of unknown length is taken to
        be as long as the one before."""
        if self.args.budget_seconds:
            return min(1, self.elapsed() / self.args.budget_seconds)
        epochs = self.args.epochs
        if self.max_samples is not None:
            epochs = self.max_samples / len(self.loss)
        share = (len(self.history) - 1 + self.steps / self.expected_steps) / epochs
        return min(0.999, share)  # the learning rate stays above 0

    def is_last_epoch(self):
        """Whether this is the last one of --epochs."""
        return not self.args.budget_seconds and len(self.history) >= self.args.epochs

    def is_done(self):
        """Whether the time, the samples or the epochs are used up."""
        if self.args.budget_seconds:
            return self.elapsed() >= self.args.budget_seconds
        if self.max_samples is not None:
            return self.samples >= self.max_samples
        return len(self.history) > self.args.epochs

    def state(self):
        """All that --resume needs, in plain types and tensors."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "loss": torch.from_numpy(self.loss), "last_loss": torch.from_numpy(self.last_loss),
                "memory": {name: torch.as_tensor(array) for name, array in self.memory.items()},
                "samples": self.samples, "seconds": self.seconds, "history": self.history,
                "rng": json.dumps(self.rng.bit_generator.state),
                "torch_rng": torch.get_rng_state()}

    def load(self, state):
        """Go on from what state() returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss = state["loss"].numpy()
        self.last_loss = state["last_loss"].numpy()
        self.memory = {name: tensor.numpy() for name, tensor in state["memory"].items()}
        self.samples = state["samples"]
        self.seconds = state["seconds"]
        self.history = state["history"]
        self.rng.bit_generator.state = json.loads(state["rng"])
        torch.set_rng_state(state["torch_rng"])


def train_epoch(learner, strategy):
    """Train on the batches of a strategy; stop when the samples or the time are used up."""
    args, data = learner.args, learner.data
    learner.start_time = time.perf_counter()
    learner.steps = 0
    learner.expected_steps = learner.history[-1]["steps"]
    learner.model.train()
    batches = strategy(learner)
    if isinstance(batches, list):
        learner.expected_steps = len(batches)
    for rows, weights in batches:
        if learner.is_done():
            break
        rows = check_batch(rows, weights)
        if args.schedule == "linear":
            for group in learner.optimizer.param_groups:
                group["lr"] = args.learning_rate * (1 - learner.progress())
        if learner.max_samples is not None:  # in a control, whose strategy has no weights
            rows = rows[: learner.max_samples - learner.samples]
        losses, _ = sample_losses(learner.model, *data.training_samples(rows))
        loss = losses.mean()
        if weights is not None:
            loss = (losses * torch.from_numpy(weights).to(args.device)).mean()
        learner.optimizer.zero_grad()
        loss.backward()
        learner.optimizer.step()
        track_losses(learner, rows, losses.detach().cpu().numpy())
        learner.samples += len(rows)
        learner.steps += 1
    if not learner.steps and not learner.is_done():
        raise UserError("the strategy has no batch for this epoch")
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    learner.seconds = learner.elapsed()
    learner.start_time = None


def check_batch(rows, weights):
    """The rows as an array of integers, or UserError for what is none, or has other weights."""
    rows = np.ascontiguousarray(rows)
    if rows.dtype.kind not in "iu" or (weights is not None and weights.shape != rows.shape):
        raise UserError("a strategy must yield row numbers, and as many weights or None, not rows "
                        f"{rows.dtype} {rows.shape} and weights {np.shape(weights)}")
    return rows.astype(np.int64, copy=False)


def check_finite(loss):
    """Raise UserError if a loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise UserError("the loss is no longer a number; lower --learning-rate")


def track_losses(learner, rows, losses):
    """Bring the latest losses and their moving averages up to date; a first loss is its average."""
    check_finite(losses.sum())
    learner.last_loss[rows] = losses
    if learner.args.smart_loss == "batch-mean":
        losses = losses.mean()
    decay = learner.args.ema_decay
    old = learner.loss[rows]
    with np.errstate(invalid="ignore"):  # 0 x inf, with --ema-decay 0
        average = decay * old + (1 - decay) * losses
    learner.loss[rows] = np.where(np.isinf(old), losses, average)


@torch.inference_mode()
def evaluate(model, x, y):
    """(mean loss, accuracy in percent) over all samples."""
    total, correct = 0.0, 0.0
    model.eval()
    for x_part, y_part in zip(x.split(1000), y.split(1000)):
        losses, logits = sample_losses(model, x_part, y_part)
        total += losses.sum().item()
        correct += (logits.argmax(-1) == y_part).sum().item()
    return total / len(x), 100 * correct / y.numel()


def training_stride(info):
    """k, where the training metrics are of every k-th sample: as many as the test part has."""
    return max(1, info["train"] // info["test"])


def measure(learner):
    """Append the metrics of this moment to the history."""
    data = learner.data
    stride = training_stride(data.info)
    train_loss, train_acc = evaluate(learner.model, data.x_train[::stride],
                                     data.y_train[::stride])
    test_loss, test_acc = evaluate(learner.model, data.x_test, data.y_test)
    check_finite(train_loss + test_loss)
    # Before training: those of random, which progress() takes as the length of the first epoch.
    steps = learner.steps or math.ceil(len(learner.loss) / learner.args.batch_size)
    metrics = {"epoch": len(learner.history), "steps": steps, "samples": learner.samples,
               "seconds": learner.seconds, "train_loss": train_loss}
    if learner.args.task == "vision":
        metrics |= {"train_acc": train_acc, "test_loss": test_loss, "test_acc": test_acc}
    else:
        metrics |= {"validation_loss": test_loss, "bits_per_byte": test_loss / math.log(2),
                    "perplexity": math.exp(min(test_loss, 700))}
    learner.history.append(metrics)


def add_label_noise(y, classes, share, seed):
    """A copy of y in which `share` of the labels, drawn by `seed`, are another class."""
    rng = np.random.default_rng([seed, 1])
    wrong = rng.choice(len(y), round(share * len(y)), replace=False)
    noisy = y.copy()
    noisy[wrong] = (y[wrong] + rng.integers(1, classes, len(wrong))) % classes
    return noisy


def train_run(data, strategy, make_model, seed, args, file, max_samples=None):
    """Train with a strategy, from the start or from the checkpoint `file`; returns the history.

    `max_samples` ends the training after so many samples instead of --epochs.
    """
    learner = Learner(data, make_model, seed, args, max_samples)
    if file.exists():
        state = load_checkpoint(file, file)
        if state["data"] != data.info["sha256"]:
            raise UserError(f"{file}: trained on other data than {data.name} is now; start anew")
        learner.load(state)
    else:
        measure(learner)
    while not learner.is_done():
        train_epoch(learner, strategy)
        measure(learner)
        with atomic_write(file) as path:
            torch.save(learner.state() | {"data": data.info["sha256"]}, path)
    return learner.history


def train_with_control(data, noise, name, strategies, make_model, seed, args, file):
    """Records of one strategy with one seed, and of its control where that is another run.

    The control is random with exactly as many trained samples. Where random trains on equally many
    in --epochs, or with a time budget, the run of random with the same seed is the control.
    """
    torch.set_num_threads(1)  # alone as in parallel: the numbers are the same, and it is as fast
    if noise:
        noisy = add_label_noise(data.y_train, data.num_classes, noise, seed)
        data = replace(data, y_train=noisy)
    data = data.to(args.device)
    history = train_run(data, strategies[name], make_model, seed, args, file)
    records = pd.DataFrame(history).assign(control=False)
    max_samples = None if args.budget_seconds else history[-1]["samples"]
    same_as_random = max_samples in (None, args.epochs * len(data.x_train))
    if name != BASELINE and not (same_as_random and BASELINE in args.strategy):
        control_file = file.with_name(f"{file.stem}-control.pt")
        control = train_run(data, strategies[BASELINE], make_model, seed, args, control_file,
                            max_samples)
        records = pd.concat([records, pd.DataFrame(control).assign(control=True)])
    return records.assign(dataset=data.name, noise=noise, strategy=name, seed=seed)


def train_all(all_data, args, run_dir):
    """Records of all runs, --jobs at a time: a table with one row for each epoch of each run."""
    from joblib import Parallel, delayed, parallel_config

    seeds = range(args.seed, args.seed + args.runs)
    make_model = MODELS[args.task][args.model]
    tasks = []
    for name, noise, seed, strategy in itertools.product(all_data, args.label_noise, seeds,
                                                         args.strategy):
        file = run_dir.resolve() / "runs" / f"{name}-noise-{noise}-{strategy}-{seed}.pt"
        tasks.append(delayed(train_with_control)(all_data[name], noise, strategy, STRATEGIES,
                                                 make_model, seed, args, file))
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        if args.backend == "dask":
            stack.enter_context(dask_client(args.jobs))
        stack.enter_context(parallel_config(args.backend, n_jobs=min(args.jobs, len(tasks))))
        parallel = Parallel(return_as="generator")
        try:
            records = list(progress(parallel(tasks), "runs", len(tasks)))
        except BrokenProcessPool:
            raise UserError("a worker was killed, out of memory? Go on with --resume and fewer "
                            "--jobs") from None
    return pd.concat(records, ignore_index=True)


def dask_client(jobs):
    """A client of the scheduler at DASK_SCHEDULER_ADDRESS, else of local processes."""
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise UserError("--backend dask: pip install 'dask[distributed]'") from None
    address = os.environ.get("DASK_SCHEDULER_ADDRESS")
    if address:
        client = Client(address, timeout=3)
        for module in {"common", __name__} - {"__main__"}:  # remote workers may not have them
            client.upload_file(sys.modules[module].__file__)
        return client
    return Client(LocalCluster(n_workers=jobs, threads_per_worker=1, dashboard_address=None))


# --- Evaluation: paired tests, samples to a target, tables ----------------------------------------


def holm(p_values):
    """Holm's step-down correction (1979) of a list of p-values."""
    p_values = np.asarray(p_values)
    steps = np.sort(p_values) * np.arange(len(p_values), 0, -1)
    corrected = np.maximum.accumulate(steps).clip(max=1)
    return corrected[p_values.argsort().argsort()]


def compare(records, args):
    """Each strategy in one setting against its control, by a paired t-test over the seeds.

    Returns a table with a row for each strategy that has a control: the control's score and the
    difference from it for each seed, mean and interval of the difference (95 %, of this pair
    alone), p, p_holm, and the steps of both. Where the difference is the same for every seed,
    there is nothing to test: p is NaN.
    """
    from scipy import stats

    metric, _, _ = DECIDING[args.task]
    runs = records[records["epoch"] > 0].groupby(["strategy", "control", "seed"], sort=False)
    scores = runs[metric].last().unstack("seed")
    steps = runs["steps"].sum().unstack("seed")
    rows = {}
    for name in args.strategy:
        # The control of a seed is a run of its own, or else the one of random.
        controls = [key for key in ((name, True), (BASELINE, False)) if key in scores.index]
        if name == BASELINE or not controls:
            continue
        control = scores.loc[controls].bfill().iloc[0].to_numpy()
        differences = scores.loc[(name, False)].to_numpy() - control
        mean, interval = mean_and_interval(differences)
        p = np.nan
        if len(differences) >= MIN_RUNS and np.ptp(differences) > 1e-9:
            p = stats.ttest_1samp(differences, 0).pvalue
        rows[name] = {"control": control, "differences": differences, "mean": mean,
                      "interval": interval, "p": p, "steps": steps.loc[(name, False)].mean(),
                      "control_steps": steps.loc[controls].bfill().iloc[0].mean()}
    columns = ["control", "differences", "mean", "interval", "p", "steps", "control_steps"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    is_tested = table["p"].notna()
    table.loc[is_tested, "p_holm"] = holm(table.loc[is_tested, "p"])
    return table


def name_control(args):
    """What strategies are compared with, for tables, pictures and sentences."""
    if args.budget_seconds:
        return f"{BASELINE} in the same time ({args.budget_seconds:g} s)"
    return f"{BASELINE} with as many trained samples"


def verdicts(comparison, args):
    """Sentences on what the tests find."""
    _, sign, unit = DECIDING[args.task]
    control = name_control(args)
    sentences = []
    for name, row in comparison[comparison["p_holm"] < ALPHA].iterrows():
        word = "better" if sign * row["mean"] > 0 else "worse"
        sentences.append(f"{name} is {abs(row['mean']):.2f} ± {row['interval']:.2f} {unit} {word} "
                         f"than {control}, p = {row['p_holm']:.2g}.")
    others = comparison.index[comparison["p_holm"] >= ALPHA]
    if len(others):
        sentences.append(f"No difference from {control} is shown for {', '.join(others)}.")
    for name in comparison.index[comparison["p"].isna()]:
        sentences.append(f"{name} differs from {control} by {comparison.loc[name, 'mean']:+.2f} "
                         f"{unit} in every run, so there is nothing to test.")
    for name, row in comparison.iterrows():
        ratio = row["steps"] / row["control_steps"]
        if not args.budget_seconds and not 0.95 < ratio < 1.05:
            sentences.append(f"{name} makes {row['steps']:,.0f} steps and its control "
                             f"{row['control_steps']:,.0f}, which alone may make a difference.")
    return sentences


def until_target(run, target, args, column):
    """`column` (samples or seconds) until the metric of a run reaches the target, linear between
    epochs; NaN if it never does."""
    metric, sign, _ = DECIDING[args.task]
    reached = (sign * (run[metric] - target) >= 0).to_numpy()
    if not reached.any():
        return math.nan
    i = reached.argmax()
    if i == 0:
        return run[column].iloc[0]
    values, amounts = run[metric].iloc[i - 1 : i + 1], run[column].iloc[i - 1 : i + 1]
    return float(np.interp(sign * target, sign * values, amounts))


def mean_text(values, number="{:.2f}"):
    """`mean ± interval` of the runs, or how many of them have a value."""
    values = np.asarray(values, float)
    if np.isnan(values).any():
        return f"{np.isfinite(values).sum()} of {len(values)} runs"
    mean, interval = mean_and_interval(values)
    if len(values) == 1:
        return number.format(mean)
    return f"{number.format(mean)} ± {number.replace('+', '').format(interval)}"


def runs_of(records, name):
    """The records of a strategy without those of its control."""
    return records[(records["strategy"] == name) & ~records["control"]]


def choose_target(records, args):
    """--target, or 1 % short of what random, else the first strategy, reaches at the end."""
    metric, sign, _ = DECIDING[args.task]
    if args.target is not None:
        return args.target
    runs = runs_of(records, BASELINE if BASELINE in args.strategy else args.strategy[0])
    return runs.groupby("seed")[metric].last().mean() * (1 - sign * 0.01)


def comparison_table(records, comparison, args):
    """The rows that are printed for one setting, one for each strategy."""
    metric, _, unit = DECIDING[args.task]
    target = choose_target(records, args)
    rows = []
    for name in args.strategy:
        runs = runs_of(records, name).groupby("seed")
        row = {"strategy": name, METRICS[args.task][metric]: mean_text(runs[metric].last()),
               name_control(args): None, f"difference [{unit}]": None, "p (Holm)": None}
        if name in comparison.index:
            tested = comparison.loc[name]
            row[name_control(args)] = mean_text(tested["control"])
            row[f"difference [{unit}]"] = mean_text(tested["differences"], "{:+.2f}")
            if np.isfinite(tested["p"]):
                row["p (Holm)"] = f"{tested['p_holm']:.2g}"
        row["samples"] = f"{runs['samples'].max().mean():,.0f}"
        row["seconds"] = mean_text(runs["seconds"].max())
        for column, number in (("samples", "{:,.0f}"), ("seconds", "{:.2f}")):
            reached = [until_target(run, target, args, column) for _, run in runs]
            row[f"{column} to {target:.2f}"] = mean_text(reached, number)
        rows.append(row)
    return rows


def title_of(dataset, noise):
    """The name of a setting."""
    return f"{dataset}, {100 * noise:g} % wrong labels" if noise else dataset


def file_name(dataset, noise):
    """The name of a setting in files and folders."""
    return f"{dataset}-noise-{noise:g}" if noise else dataset


def summarize_setting(title, table, comparison, info, args):
    """Table and verdicts of one setting as text."""
    classes = info["classes"]
    if isinstance(classes, list):
        classes = f"{len(classes)} ({', '.join(classes[:12])}{', …' if len(classes) > 12 else ''})"
    length = f"{args.epochs} epochs"
    if args.budget_seconds:
        length = f"{args.budget_seconds:g} s"
    baseline = ", ".join(f"{name}: {value:.2f}" for name, value in info["baseline"].items())
    lines = [f"## {title}", "",
             f"{info['source'].capitalize()} data, {info['train']:,} training and "
             f"{info['test']:,} test samples, classes: {classes}; {args.model}, {length}, batches "
             f"of {args.batch_size}, runs: {args.runs}; {baseline}.", "",
             markdown_table(table), ""]
    if args.runs < MIN_RUNS:
        lines.append(f"- No verdict: a paired t-test needs {MIN_RUNS} runs.")
    else:
        lines += [f"- {sentence}" for sentence in verdicts(comparison, args)]
    return "\n".join(lines)


def noise_table(comparisons, dataset, args):
    """Difference from the control by share of wrong labels, a row for each strategy."""
    rows = []
    for name in args.strategy:
        row = {"strategy": name}
        for noise in args.label_noise:
            comparison = comparisons[dataset, noise]
            if name in comparison.index:
                tested = comparison.loc[name]
                text = mean_text(tested["differences"], "{:+.2f}")
                if tested["p_holm"] < ALPHA:
                    text = f"**{text}**"
                row[f"{100 * noise:g} % wrong"] = text
        if len(row) > 1:
            rows.append(row)
    return rows


# --- Pictures -----------------------------------------------------------------------------------


def pivot_runs(records, column):
    """[runs, epochs] of a column of one strategy; runs end with their last common epoch."""
    return records.pivot(index="seed", columns="epoch", values=column).dropna(axis=1).to_numpy()


def plot_strategy(records, title, info, args, folder):
    """One picture for each metric of one strategy: mean over the runs with its 95 % band."""
    part = f"1 in {training_stride(info)} training samples, labels as trained on"
    runs = f"mean and 95 % interval of {args.runs} runs" if args.runs > 1 else "one run"
    for metric, label in METRICS[args.task].items():
        fig, (ax,) = new_figure(f"{title}: {runs}", size=(7, 4))
        values = pivot_runs(records, metric)[:, 1:]
        plot_curve(ax, np.arange(1, values.shape[1] + 1), values, "mean", marker="o")
        epoch_axis(ax)
        ax.set_ylabel(f"{label}\n{part}" if metric.startswith("train") else label)
        save_figure(fig, folder / f"{metric}.png", show=False)


def plot_comparison(records, comparison, title, args, path):
    """The metric by epoch, by samples trained on and by seconds; and the differences from the
    controls."""
    metric, sign, unit = DECIDING[args.task]
    label = METRICS[args.task][metric]
    target = choose_target(records, args)
    fig, axes = new_figure(f"{title}: {label}, mean of {args.runs} runs", 2, 2, (12, 9))
    axis_labels = {"epoch": "epoch", "samples": "samples trained on [thousands]",
                   "seconds": "training time [s]"}
    for ax, (column, axis_label) in zip(axes, axis_labels.items()):
        for i, name in enumerate(args.strategy):
            runs = runs_of(records, name)
            x = pivot_runs(runs, column).mean(axis=0) / (1000 if column == "samples" else 1)
            plot_curve(ax, x[1:], pivot_runs(runs, metric)[:, 1:], name, i, MARKERS[i % 7])
            if name == BASELINE:
                ax.lines[-1].set(color="black", linewidth=2.5)
        ax.axhline(target, color="0.4", linewidth=0.8, label="target")
        ax.set(xlabel=axis_label, ylabel=label)
    epoch_axis(axes[0])
    ax = axes[3]
    for i, (_, row) in enumerate(comparison.iterrows()):
        ax.plot(row["differences"], np.full(len(row["differences"]), i + 0.25), ".", color="0.6")
        ax.errorbar(row["mean"], i, xerr=row["interval"], fmt="o", color=COLORS[0], capsize=4)
        if np.isfinite(row["p_holm"]):
            ax.annotate(f"p = {row['p_holm']:.2g}", (1.02, i), xycoords=("axes fraction", "data"),
                        va="center", fontsize=8)
    ax.axvline(0, color="k", linewidth=0.8)
    ax.set_yticks(range(len(comparison)), comparison.index)
    ax.set_ylim(max(len(comparison), 1) - 0.4, -0.6)
    direction = "more" if sign > 0 else "less"
    ax.set_xlabel(f"difference from {name_control(args)}\n[{unit}; {direction} is better]; grey: "
                  "each seed; bars: 95 % interval\nof each strategy alone, uncorrected; p: "
                  "corrected after Holm for all")
    legend_below(axes[0])
    save_figure(fig, path)


def plot_benchmark(comparisons, args, path):
    """The difference of every strategy from its control in every setting."""
    _, sign, unit = DECIDING[args.task]
    names = [name for name in args.strategy if name != BASELINE]
    fig, (ax,) = new_figure(f"Differences from {BASELINE}, mean of {args.runs} runs",
                            size=(9, 2 + 0.25 * len(names) * len(comparisons)))
    for i, ((dataset, noise), table) in enumerate(comparisons.items()):
        table = table.reindex(names)
        y = np.arange(len(names)) + 0.7 * (i - (len(comparisons) - 1) / 2) / len(comparisons)
        ax.errorbar(table["mean"], y, xerr=table["interval"], fmt=MARKERS[i % 7],
                    color=COLORS[i % 8], capsize=3, label=title_of(dataset, noise))
    ax.axvline(0, color="k", linewidth=0.8)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    direction = "more" if sign > 0 else "less"
    ax.set_xlabel(f"difference from {name_control(args)} [{unit}; {direction} is better]\nbars: 95 "
                  "% interval of each alone, uncorrected")
    legend_below(ax, 3)
    save_figure(fig, path)


# --- The experiment -----------------------------------------------------------------------------


def write_strategy_folder(records, parent, title, info, args):
    """A new folder in `parent`, outputs/TASK/DATASET/STRATEGY: summary.txt and a picture of each
    metric. Returns the folder."""
    folder = free_run_dir(parent)
    folder.mkdir(parents=True, exist_ok=True)  # two processes may go on with the same run
    last = records.groupby("seed").last()
    lines = [f"{title}, runs: {args.runs}, after the last epoch; mean and 95 % interval"]
    lines += [f"{label}: {mean_text(last[metric], '{:.4f}')}"
              for metric, label in METRICS[args.task].items()]
    lines += [f"samples: {mean_text(last['samples'], '{:,.0f}')}",
              f"seconds: {mean_text(last['seconds'])}"]
    (folder / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot_strategy(records, title, info, args, folder)
    return str(folder)


def run_experiment(args):
    """Train all strategies on all data sets with all seeds, then compare them."""
    all_data, args = load_all(args)
    run_dir = next_run_dir(args)
    (run_dir / "runs").mkdir(exist_ok=True)
    records = train_all(all_data, args, run_dir)
    comparisons, texts, tables, folders = {}, [], {}, []
    for (dataset, noise), setting in records.groupby(["dataset", "noise"], sort=False):
        info = all_data[dataset].info
        title = title_of(dataset, noise)
        comparison = compare(setting, args)
        comparisons[dataset, noise] = comparison
        tables[title] = comparison_table(setting, comparison, args)
        texts.append(summarize_setting(title, tables[title], comparison, info, args))
        name = file_name(dataset, noise)
        plot_comparison(setting, comparison, title, args, run_dir / f"comparison_{name}.png")
        for strategy in args.strategy if not args.quick else ():
            parent = Path(args.output_dir, args.task, name, strategy)
            runs = runs_of(setting, strategy)
            folders.append(write_strategy_folder(runs, parent, f"{title}, {strategy}", info, args))
    if len(comparisons) > 1 and set(args.strategy) != {BASELINE}:
        plot_benchmark(comparisons, args, run_dir / "benchmark.png")
    if len(args.label_noise) > 1:
        for dataset in all_data:
            table = noise_table(comparisons, dataset, args)
            texts.append(f"## {dataset}: difference from the control, by share of wrong labels\n\n"
                         f"{markdown_table(table)}\n\nBold: p below {ALPHA} after Holm.")
    texts.append("±: half width of the 95 % interval over the seeds, of that figure alone. p: "
                 "paired t-test, after Holm's correction for all tests of a table. Seconds: "
                 "training and selection, without evaluation; runs side by side (--jobs) share the "
                 "machine. The last two columns are until the metric reaches --target, by default "
                 f"1 % short of what {BASELINE}, or else the first strategy, has at the end.")
    results = {"data": {name: data.info for name, data in all_data.items()}, "tables": tables,
               "comparisons": {title_of(*setting): table.reset_index(names="strategy").to_dict(
                   "records") for setting, table in comparisons.items()},
               "records": records.to_dict("records"), "folders": folders}
    if folders:
        texts.append(f"Each strategy alone: {', '.join(folders)}")
    return write_results(results, "\n\n".join(texts), args, run_dir)


def run(args):
    """Do what the arguments ask for."""
    if args.check_device:
        return check_device()
    if args.list_datasets or args.download:
        return list_datasets(args)
    return run_experiment(args)


# --- Extras: data sets and device ---------------------------------------------------------------


def list_datasets(args):
    """Download the data sets of --download, then print which ones are here."""
    for name in args.download or []:
        download(name, args.data_dir)
    rows = [{"data set": name, "what": dataset.about,
             "here": find_folder(name, args.data_dir) if dataset.files else "embedded",
             "as CSV": Path(args.data_dir, f"{name}_csv", "test.csv").exists() or None}
            for name, dataset in DATASETS.items()]
    print(markdown_table(rows))


def check_device():
    """Print what this machine computes with."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"auto: {detect_device()}; cuda: {', '.join(gpus) or 'no'}; "
          f"mps: {'yes' if torch.backends.mps.is_available() else 'no'}; "
          f"cpu: {os.cpu_count()} cores; torch: {torch.__version__}")


# --- Plumbing: nothing below is about the experiment --------------------------------------------

NOTES = []


class UserError(Exception):
    """A problem that the user can solve: main() makes it one line on stderr and exit code 2."""


def log(text):
    """Print a line on stderr; under torchrun in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{EXPERIMENT}.py: {text}", file=sys.stderr)


def note(text):
    """Log a line and record it in the results, for whoever reads them."""
    if text not in NOTES:
        NOTES.append(text)
        log(text)


def progress(iterable, description, total=None):
    """A progress bar on a terminal and in a notebook, and nothing elsewhere."""
    hidden = not (sys.stderr.isatty() or in_notebook())
    return tqdm(iterable, description, total, leave=False, disable=hidden)


def memory_mib(field="VmRSS"):
    """Resident memory of this process [MiB], its peak with the field VmHWM; NaN except on Linux."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{field}:\s*(\d+) kB", status)[1]) / 1024
    return float("nan")


@contextlib.contextmanager
def atomic_write(path):
    """A temporary path to write to, renamed to `path` at the end: a file is whole or absent."""
    part = Path(f"{path}.{os.getpid()}.part")  # two processes may go on with the same run
    try:
        yield part
        part.replace(path)
    except RuntimeError as error:  # torch.save raises this on a full disk
        raise UserError(f"{path} cannot be written; is the disk full? ({error})") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def load_checkpoint(file, name):
    """What torch.save wrote to `file`, a path or a stream. Raises UserError with its `name`."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception:  # torch.load raises errors of many types for a damaged file
        raise UserError(f"{name}: damaged, or not a checkpoint of {EXPERIMENT}.py") from None


def plain_arguments(args):
    """{name: value} of the arguments, all of which JSON can hold."""
    return vars(args) | {"device": str(args.device)}


def changed_arguments(args):
    """{flag: value} of the arguments that differ from their defaults."""
    defaults = plain_arguments(parse_args([]))
    return {f"--{name.replace('_', '-')}": value for name, value in plain_arguments(args).items()
            if value is not None and value != defaults[name]}


def free_run_dir(parent):
    """The path run-001 in the folder `parent`, with the next free number."""
    numbers = [int(path.name[4:]) for path in parent.glob("run-*") if path.name[4:].isdigit()]
    return parent / f"run-{max(numbers, default=0) + 1:03d}"


def next_run_dir(args):
    """The folder of this run: that of --resume, or else a new one with arguments.json."""
    if args.resume:
        return Path(args.resume)
    run_dir = free_run_dir(Path(args.output_dir, EXPERIMENT))
    run_dir.mkdir(parents=True)
    with atomic_write(run_dir / "arguments.json") as path:
        path.write_text(to_json(plain_arguments(args)))
    return run_dir


def resume_arguments(args):
    """The arguments of the unfinished run in --resume, a folder, or of the newest one."""
    files = [Path(args.resume, "arguments.json")]
    if args.resume == "newest":
        files = sorted(Path(args.output_dir, EXPERIMENT).glob("run-*/arguments.json"))
    unfinished = [file for file in files
                  if file.exists() and not file.with_name("results.json").exists()]
    if not unfinished:
        raise UserError(f"--resume {args.resume}: no unfinished run; see --output-dir")
    free = {"--resume", "--output-dir", "--data-dir", "--device", "--jobs", "--backend"}
    changed = set(changed_arguments(args))
    if changed - free:
        raise UserError("--resume keeps a run's arguments; leave out "
                        f"{', '.join(sorted(changed - free))}")
    arguments = vars(parse_args([])) | json.loads(unfinished[-1].read_text())
    arguments |= {name: value for name, value in vars(args).items()
                  if f"--{name.replace('_', '-')}" in changed | {"--device"}}
    return argparse.Namespace(**arguments | {"resume": str(unfinished[-1].parent)})


def describe_run(args):
    """What made the results: arguments, script, versions, device and peak memory."""
    script = Path(globals().get("__file__", "pasted into a notebook")).resolve()
    digest = hashlib.sha256(script.read_bytes()).hexdigest() if script.exists() else None
    commit = None
    with contextlib.suppress(OSError):
        command = ["git", "-C", script.parent, "describe", "--always", "--dirty", "--abbrev=40",
                   "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    packages = ("torch", "numpy", "pandas", "pyarrow", "sklearn", "transformers", "datasets",
                "perforatedai")
    versions = {name: getattr(sys.modules[name], "__version__", None)
                for name in packages if name in sys.modules}
    device = args.device
    return {
        "experiment": EXPERIMENT,
        "arguments": plain_arguments(args),
        "changed_arguments": changed_arguments(args),
        "script_sha256": digest,
        "git_commit": commit,
        "git_clean": commit and not commit.endswith("-dirty"),
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "peak_memory_mib": memory_mib("VmHWM"),
        "notes": list(NOTES),
    }


def to_json(value):
    """JSON with arrays as lists, and null for NaN."""
    text = json.dumps(value, default=lambda array: array.tolist())
    return json.dumps(json.loads(text, parse_constant=lambda constant: None), indent=1)


def write_results(results, summary, args, run_dir):
    """Write and print summary.md, then write results.json, with which a run is finished; returns
    the results as they are read back."""
    results = describe_run(args) | results
    title = f"# {EXPERIMENT}.py"
    for flag, value in results["changed_arguments"].items():
        values = value if isinstance(value, list) else [value]
        title += " ".join(["", flag, *(str(item) for item in values if item is not True)])
    text = "\n\n".join([title, *(f"Note: {text}" for text in NOTES), summary])
    (run_dir / "summary.md").write_text(text, encoding="utf-8")
    with atomic_write(run_dir / "results.json") as path:
        path.write_text(to_json(results))
    if in_notebook():
        from IPython.display import Markdown, display

        display(Markdown(text))
    else:
        print(text)
    print(f"Everything is in {run_dir}")
    return json.loads((run_dir / "results.json").read_text())


def markdown_table(rows):
    """Rows [{column: value}] as a Markdown table; a value that is missing is a dash."""
    table = pd.DataFrame(rows, dtype=object).fillna("–").astype(str)
    lines = [table.columns, ["---"] * table.shape[1], *table.to_numpy()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv=None):
    """Run the script with the arguments `argv`: those of the command line, or none in a notebook.

    Returns the results. A problem that the user can solve is one line and SystemExit(2), an
    interruption one line and SystemExit(130); in a notebook only the line.
    """
    if argv is None:
        argv = [] if in_notebook() else sys.argv[1:]
    args = parse_args(argv)
    NOTES.clear()
    try:
        return run(resume_arguments(args) if args.resume else args)
    except KeyboardInterrupt:
        text = ("interrupted; to go on with a run that had begun: "
                f"python {EXPERIMENT}.py --resume --output-dir {args.output_dir}")
        code = 130
    except ModuleNotFoundError as error:
        name = error.name.split(".")[0]
        package = {"sklearn": "scikit-learn", "PIL": "pillow"}.get(name, name)
        text = f"error: {error}; pip install {package}"
        code = 2
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        text = f"error: {' '.join(str(error).split())}"
        code = 2
    print(f"{EXPERIMENT}.py: {text}", file=sys.stderr)  # in every process of torchrun
    if not in_notebook():
        raise SystemExit(code)


if __name__ == "__main__":
    main()
