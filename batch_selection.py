"""Does it matter which samples go into a batch?

Strategies choose the samples of each batch, and may weight them; all else is the same. The control
is random selection with exactly as many trained samples, or, with --budget-seconds, in the same
time, selection included. A paired t-test over the seeds, with Holm's correction, says whether the
last test accuracy differs from the control's.

Measured (Fashion-MNIST, an MLP, 5 epochs, 5 seeds): at equal samples selective_backprop gains 0.71
± 0.15 points, and `smart`, the original's, does not differ significantly; with 20 % wrong labels
`smart` loses 1.98 ± 0.20 and self_paced gains 0.83 ± 0.18. In equal time, with correct labels,
nothing beats random.

    python batch_selection.py                                # MNIST: about 4 minutes
    python batch_selection.py --quick                        # embedded data: under a minute
    python batch_selection.py --dataset fashion_mnist --label-noise 0 0.1 0.2 --no-benchmark
    python batch_selection.py --dataset fashion_mnist --budget-seconds 5
    python batch_selection.py --data FILE.csv --drop id      # numbers, and a column `label`
    python batch_selection.py --task nlp                     # a byte-level language model
    python batch_selection.py --resume                       # continue the newest unfinished run

Results are in outputs/batch_selection/run-001/ (then run-002, …): results.json, summary.md,
pictures of the comparison, and runs/*.pt for --resume. As in the original,
outputs/vision/DATASET/STRATEGY/run-001/ has summary.txt and four pictures of each strategy.

In a notebook, a strategy, a data set or a model of your own is one line before main([...]); other
changes need --jobs 1, since workers import this file anew:
    STRATEGIES["sorted"] = lambda learner: learner.batches(learner.loss.argsort())
    DATASETS["mine"] = Dataset(read_mine)  # read_mine(folder): x_train, y_train, x_test, y_test
    MODELS["vision"]["wide"] = lambda shape, classes: SimpleMLP(shape, classes, hidden=1024)

Sources: Human-Augment-Analytics/Training-Batch-Selection ("the original"), whose `smart` credited
each sample with the mean loss of its batch (--smart-loss batch-mean) and whose learning rate was
constant (--schedule constant); Balles et al. 2023, arXiv:2312.05021, and Kaddour et al. 2023,
arXiv:2307.06440, for the controls; each strategy's docstring cites its paper.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.6", "numpy>=2.0", "pandas>=2.2", "scikit-learn>=1.7", "scipy>=1.14",
#     "matplotlib>=3.9", "tqdm>=4.66", "joblib>=1.4", "pillow>=10.4",
# ]
# ///

import argparse
import contextlib
import gc
import glob
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
import time
import urllib.request
import warnings
import zlib
from collections import deque
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

from common import (MARKERS, detect_device, epoch_axis, in_notebook, legend_below,
                    mean_and_interval, new_figure, plot_curve, plot_dots, save_figure)

EXPERIMENT = "batch_selection"
BASELINE = "random"
# What is drawn of each strategy, and its axis label.
METRICS = {"bits_per_byte": "test loss [bits per byte]", "test_acc": "test accuracy [%]",
           "test_loss": "test loss", "train_acc": "accuracy on a part of the training samples [%]",
           "train_loss": "loss on a part of the training samples"}
# The deciding metric: its name, 1 if more of it is better and -1 if less, and the unit.
DECIDING = {"vision": ("test_acc", 1, "points"),
            "nlp": ("bits_per_byte", -1, "bits per byte, fewer are better")}
# What a metric is drawn over, and its axis label.
X_AXES = {"epoch": "epoch", "samples": "trained samples", "seconds": "training and selection [s]"}
# Columns of the tables and their formats.
NUMBERS = {"p": "{:.2g}", "samples": "{:,.0f}", "seconds": "{:.2f}",
           "samples to target": "{:,.0f}", "seconds to target": "{:.2f}"}
MIN_RUNS = 3  # a paired t-test of two runs has one degree of freedom
ALPHA = 0.05
# As in the original:
EXPLORE = 0.5  # share of a batch of smart and easy_first that is drawn from all samples
TOP = 0.2  # share of the samples, hardest or easiest, from which the rest is drawn
DECAY = 0.9  # of the tracked loss
WINDOW = 64  # bytes in a sample of text


def parse_args(argv=None):
    """The command line as a namespace; an error is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        f"{EXPERIMENT}.py", argparse.SUPPRESS, __doc__.split("\n\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add_source = parser.add_mutually_exclusive_group().add_argument
    add("--quick", action="store_true", help="two small embedded data sets: under a minute")
    add("--task", choices=DECIDING, default="vision", help="vision: classification; nlp: a "
        "language model of bytes")
    add_source("--dataset", choices=DATASETS, metavar="NAME", help="known data set, see "
               "--list-datasets; if unset, mnist, or digits if that cannot be downloaded")
    add_source("--data", type=os.path.abspath, metavar="PATH", help="CSV file of your own with a "
               "header, a column `label` and columns of numbers (p0, p1, … or pixel0, … are the "
               "pixels of a square grey image); nlp: a text file or a folder of them")
    add("--label-column", default="label", metavar="NAME", help="column of --data with the classes")
    add("--drop", nargs="+", default=[], metavar="COLUMN", help="columns of --data to leave out")
    add("--data-dir", default="data", help="folder of the known data sets, one folder each")
    add("--benchmark-datasets", nargs="+", choices=DATASETS, default=["digits"], metavar="NAME",
        help="further data sets")
    add("--no-benchmark", action="store_true", help="no further data sets")
    add("--strategy", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), metavar="NAME",
        help="strategies to compare")
    add("--model", default="mlp", help="mlp or cnn; nlp: transformer")
    add("--label-noise", nargs="+", type=float, default=[0.0], metavar="SHARE", help="share of "
        "training labels that are replaced by another class; several shares are compared")
    add("--epochs", type=int, default=5, help="number of epochs; in each, importance and rho_loss "
        "train on a fifth of the samples")
    add("--schedule", choices=["linear", "constant"], default="linear", help="learning rate: "
        "linear decay to zero, or constant as in the original")
    add("--budget-seconds", type=float, default=0.0, metavar="SECONDS", help="if not 0, train for "
        "this time instead of --epochs, selection included; the learning rate decays to zero")
    add("--runs", type=int, default=5, help="number of seeds; the t-test needs 3")
    add("--seed", type=int, default=42, help="first seed")
    add("--batch-size", type=int, default=64, help="samples in a batch; nlp: 16")
    add("--learning-rate", type=float, default=0.001, help="learning rate of Adam; nlp: 0.003")
    add("--smart-loss", choices=["per-sample", "batch-mean"], default="per-sample", help="tracked "
        "loss of a sample: its own, or, as in the original, the mean of its batch")
    add("--text-bytes", type=int, default=150_000, help="nlp: bytes of text to use")
    add("--device", type=detect_device, default="auto", help="auto, cuda, mps or cpu")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each; if "
        "unset, 1 on a GPU, with --quick or with --budget-seconds, else one for each core")
    add("--backend", choices=["loky", "dask"], default="loky", help="joblib's backend: this "
        "machine, or a dask cluster at DASK_SCHEDULER_ADDRESS that shares the folders")
    add("--output-dir", default="outputs", help="folder of all results")
    add("--resume", nargs="?", const="newest", metavar="RUN_DIR", help="unfinished run to go on "
        "with; without a value, the newest")
    add("--list-datasets", action="store_true", help="list the known data sets and exit")
    add("--download", nargs="+", choices=DATASETS, metavar="NAME", help="download data sets "
        "to --data-dir and exit")
    add("--check-device", action="store_true", help="show what this machine computes with and exit")
    args = parser.parse_args(argv)
    if args.task == "nlp":
        parser.set_defaults(model="transformer", batch_size=16, learning_rate=0.003)
    elif args.quick and not args.data:
        parser.set_defaults(dataset="digits", benchmark_datasets=["breast_cancer"])
    if args.quick:
        parser.set_defaults(runs=3, text_bytes=15_000)
    if args.quick or args.budget_seconds or args.device.type != "cpu":
        parser.set_defaults(jobs=1)
    args = parser.parse_args(argv)  # with the defaults of the task
    if args.model not in MODELS[args.task]:
        parser.error(f"--model {args.model}: --task {args.task} has {', '.join(MODELS[args.task])}")
    if args.task == "nlp" and (any(args.label_noise) or args.dataset):
        parser.error("--label-noise and --dataset are for --task vision")
    if not min(args.learning_rate, args.epochs, args.runs, args.batch_size, args.text_bytes,
               args.jobs) > 0:  # not "<= 0", since the first one may be NaN
        parser.error("--epochs, --runs, --batch-size, --text-bytes, --jobs and --learning-rate "
                     "must be above 0")
    if not min(args.budget_seconds, args.seed) >= 0:  # likewise
        parser.error("--budget-seconds and --seed must not be negative")
    if not all(0 <= share <= 1 for share in args.label_noise):
        parser.error("--label-noise must be from 0 to 1")
    return args


# --- Strategies ---------------------------------------------------------------------------------
# A strategy gets the Learner (below) and returns or yields the batches of one epoch, at least one,
# as pairs: row numbers of training samples [batch], and their weights [batch] or None. The loss of
# a batch is the mean of weight x loss. What a strategy sees:
#   learner.loss                 moving average of each sample's loss [samples]; inf, thus harder
#                                than all others, where unseen
#   learner.last_loss            its latest loss [samples], inf where unseen
#   learner.score(rows)          current losses of these samples, by a forward pass; with
#                                gradient_norms=True the norms of their gradients at the logits
#   learner.batches(rows)        these rows in batches without weights
#   learner.data                 tensors x_train [samples, …] and y_train [samples]; num_classes
#   learner.progress()           share of the training that is done, from 0 to 1, with which the
#                                learning rate decays. An epoch is taken to have as many batches as
#                                learner.batches returned last, or else as the epoch before
#   learner.rng, learner.args    a numpy Generator and the command line
# What it keeps as an attribute of the learner is there in the next epoch.


def random_batches(learner, pool=1):
    """Every sample once an epoch, in a new random order; in `pool` batches at a time."""
    order = learner.rng.permutation(len(learner.loss))
    return learner.batches(order, pool)


def fixed_batches(learner):
    """Every sample once an epoch, always in the order of the file."""
    return learner.batches(np.arange(len(learner.loss)))


def random_until(learner, samples):
    """The control: as random, until exactly so many samples are trained on."""
    for rows, _ in random_batches(learner):
        if learner.samples < samples:
            yield rows[: samples - learner.samples], None


def focus_batches(learner, sign):
    """Batches of which the share EXPLORE is drawn from all samples, and the rest from the share TOP
    with the highest sign x loss, found anew for each batch, and all that tie with its last."""
    loss, rng = learner.loss, learner.rng
    top = round(TOP * len(loss))
    for batch, _ in fixed_batches(learner):  # as many samples as random's
        score = sign * loss
        focus = np.flatnonzero(score >= np.partition(score, -top)[-top])
        explored = rng.choice(len(loss), round(EXPLORE * len(batch)), replace=False)
        size = len(batch) - len(explored)
        focused = rng.choice(focus, size, replace=len(focus) < size)
        yield np.concatenate([explored, focused]), None


def smart(learner):
    """Half of a batch from all samples, half from the 20 % with the highest tracked loss.

    Unseen samples count as the hardest, so the first batches are random. The original's strategy,
    but with each sample's own loss (--smart-loss).
    """
    return focus_batches(learner, 1)


def easy_first(learner):
    """The reverse of smart: half of a batch from the 20 % with the lowest tracked loss.

    Unseen samples count as the hardest, so the first epoch keeps to those that it began with.
    """
    return focus_batches(learner, -1)


def accepted_batches(learner, accept):
    """Batches of the samples that accept(their current losses) is true for; each random batch has a
    forward pass, and the accepted samples wait until they fill a batch. The learning rate decays
    with the random batches."""
    size = learner.args.batch_size
    waiting = np.empty(0, int)
    for step, (candidates, _) in enumerate(random_batches(learner)):
        accepted = candidates[accept(learner.score(candidates))]
        waiting = np.append(waiting, accepted)
        if len(waiting) >= size:
            learner.epoch_step = step
            yield waiting[:size], None
            waiting = waiting[size:]
    if len(waiting):
        yield waiting, None


def self_paced(learner):
    """The samples whose present loss is below a limit (Kumar et al. 2010, self-paced learning).

    The limit is twice the loss of chance, the logarithm of the number of classes: a sample waits
    while its label is that unlikely, as a wrong one is. The limit is fixed instead of growing, and
    twice was chosen on 10,000 of Fashion-MNIST's training images.
    """
    limit = 2 * math.log(learner.data.num_classes)
    return accepted_batches(learner, lambda losses: losses < limit)


def loss_threshold(learner, threshold=0.5):
    """The samples whose tracked loss is above a threshold, in random order.

    If they are less than a batch, the hardest are taken. The original's strategy for language. A
    sample that has once fallen below is not seen again, so its tracked loss stays as it was.
    """
    size = learner.args.batch_size
    rows = np.flatnonzero(learner.loss > threshold)
    if len(rows) < size:
        rows = np.argsort(-learner.loss, kind="stable")[:size]
    return learner.batches(learner.rng.permutation(rows))


def selective_backprop(learner, history=1024):
    """Train on a sample with the probability of its loss's percentile (Jiang et al. 2019).

    The percentile is among the last `history` losses of this epoch. arXiv:1910.00762.
    """
    recent = deque(maxlen=history)

    def accept(losses):
        recent.extend(losses)
        percentile = np.searchsorted(np.sort(recent), losses, side="right") / len(recent)
        return learner.rng.random(len(losses)) < percentile

    return accepted_batches(learner, accept)


def infobatch(learner):
    """Leave out a random half of the samples below the mean loss (Qin et al. 2024, ICLR).

    Those that are kept have weight 2, so that the expected gradient stays the same. The first epoch
    and those that end in the last eighth of the training take every sample. arXiv:2303.04947.
    """
    loss = learner.last_loss
    epochs = len(learner.history) - 1  # that are done
    if epochs == 0 or learner.progress() * (epochs + 1) / epochs > 7 / 8:  # where this one will end
        return random_batches(learner)
    order = learner.rng.permutation(len(loss))
    is_easy = loss < loss.mean()
    is_left_out = is_easy & (learner.rng.random(len(loss)) < 0.5)
    weights = np.where(is_easy, 2, 1)
    batches = learner.batches(order[~is_left_out[order]])
    return [(rows, weights[rows]) for rows, _ in batches]


def importance(learner, pool=5):
    """Importance sampling by the norm of softmax minus one-hot (Katharopoulos and Fleuret 2018).

    A batch is drawn, with replacement, from `pool` batches of candidates in proportion to their
    norms; a sample's weight is 1 / (candidates x its probability), so that the expected gradient
    stays the same. Without their switch that waits until the variance falls. arXiv:1803.00942.
    """
    for candidates, _ in random_batches(learner, pool):
        norms = learner.score(candidates, gradient_norms=True).astype(float) + 1e-8
        probabilities = norms / norms.sum()
        size = math.ceil(len(candidates) / pool)
        drawn = learner.rng.choice(len(candidates), size, p=probabilities)
        weights = 1 / (len(candidates) * probabilities[drawn])
        yield candidates[drawn], weights


def loss_rank(learner, pressure=100):
    """Draw samples by the rank of their latest loss (Loshchilov and Hutter 2016).

    At first, the hardest sample is `pressure` times as likely as the easiest one; at the end, all
    are equally likely. Ranks are those at the start of an epoch, which is as long as random's;
    draws are with replacement. arXiv:1511.06343.
    """
    n = len(learner.loss)
    order = learner.rng.permutation(n)  # ties, as before the first epoch, are in random order
    order = order[np.argsort(-learner.last_loss[order], kind="stable")]
    chances = pressure ** ((learner.progress() - 1) * np.arange(n) / n)
    drawn = learner.rng.choice(order, n, p=chances / chances.sum())
    return learner.batches(drawn)


def rho_loss(learner, pool=5):
    """The largest reducible losses among `pool` batches of candidates (Mindermann et al. 2022).

    The reducible loss is the present loss minus that of a small hold-out model, which is high for
    a wrong label. Instead of further data there are two hold-out models, each trained on one half
    of the training samples for the other half. arXiv:2206.07137.
    """
    if not hasattr(learner, "holdout_loss"):
        learner.holdout_loss = holdout_losses(learner)
    for candidates, _ in random_batches(learner, pool):
        reducible = learner.score(candidates) - learner.holdout_loss[candidates]
        size = math.ceil(len(candidates) / pool)
        yield candidates[np.argsort(-reducible, kind="stable")[:size]], None


def holdout_losses(learner):
    """Loss of each training sample [samples] under a small model that has not seen it.

    Each of two models is trained for one epoch on a random half. These samples are added to
    learner.samples, so that the control gets them, too.
    """
    args, data = learner.args, learner.data
    losses = np.empty(len(learner.loss), np.float32)
    halves = np.array_split(learner.rng.permutation(len(losses)), 2)
    for seen, unseen in (halves, halves[::-1]):
        model = HOLDOUT_MODELS[args.task](data.x_train.shape[1:], data.num_classes).to(args.device)
        optimizer = torch.optim.Adam(model.parameters(), args.learning_rate, fused=True)
        for rows, _ in learner.batches(seen):
            loss = sample_losses(model, *data.training_samples(rows))[0].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        learner.samples += len(seen)
        losses[unseen] = evaluate(model, *data.training_samples(unseen))[0].cpu()
    return losses


STRATEGIES = {"random": random_batches, "fixed": fixed_batches, "smart": smart,
              "easy_first": easy_first, "self_paced": self_paced, "loss_threshold": loss_threshold,
              "selective_backprop": selective_backprop, "loss_rank": loss_rank,
              "infobatch": infobatch, "importance": importance, "rho_loss": rho_loss}


# --- Data: known data sets ----------------------------------------------------------------------


@dataclass
class Data:
    """Normalized training and test samples, as numpy arrays or tensors.

    Vision: x [n, channels, height, width] or [n, features], float32, and y [n]. Language: x and y
    [n, window] bytes, y one byte further on. y and bytes are int64.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int
    info: dict  # source, classes, score of a simple baseline, sha256: a row of the summary

    def __sizeof__(self):
        """Bytes of the training images, so that dask sends them to a worker once, not per run."""
        return self.x_train.nbytes

    def to(self, device):
        """The same as tensors on the device."""
        tensors = {name: torch.tensor(value, device=device) for name, value in vars(self).items()
                   if isinstance(value, np.ndarray)}
        return replace(self, **tensors)

    def training_samples(self, rows):
        """(x, y) of these rows; index_select is several times faster than x_train[rows]."""
        index = torch.as_tensor(rows, device=self.x_train.device)
        return self.x_train.index_select(0, index), self.y_train.index_select(0, index)


@dataclass
class Dataset:
    """A known data set: read(folder) returns x_train, y_train, x_test and y_test."""

    read: Callable
    about: str = "own"
    url: str = ""  # of a file, whose name takes the place of {}
    files: dict = field(default_factory=dict)  # {name: published MD5}


def read_idx(folder):
    """The four gzipped IDX files of MNIST and those like it: a header, then bytes. QMNIST has eight
    four-byte columns of labels, the first of which is the class."""
    arrays = []
    for path in sorted(folder.glob("*-idx*.gz")):
        content = gzip.decompress(path.read_bytes())
        owner = OWNERS.get(hashlib.md5(content).hexdigest(), folder.name)
        if owner != folder.name:
            raise UserError(f"{path} is a file of {owner}; move it to a folder {owner}")
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
        if "images" in path.name:
            values = values.reshape(-1, 1, 28, 28)
        elif "idx2" in path.name:
            values = values[3::32]
        arrays.append(values)
    return arrays[2:] + arrays[:2]  # the test part is first by name


def read_cifar(folder):
    """CIFAR's binary archive: records that end with the (fine) label and the image."""
    (path,) = folder.glob("cifar-*-binary.tar.gz")
    splits = {"train": b"", "test": b""}
    with tarfile.open(path) as archive:
        for name in sorted(archive.getnames()):
            if name.endswith(".bin"):
                split = "test" if "/test" in name else "train"
                splits[split] += archive.extractfile(name).read()
    arrays = []
    for content in splits.values():
        records = np.frombuffer(content, np.uint8).reshape(-1, 3074 if "100" in path.name else 3073)
        arrays += [records[:, -3072:].reshape(-1, 3, 32, 32), records[:, -3073]]
    return arrays


def read_cinic(folder):
    """CINIC-10's folders train/CLASS/*.png and test/CLASS/*.png, unpacked first where need be; in a
    fixed random order, since the folders are sorted by class. The part `valid` is not used."""
    from PIL import Image
    from sklearn.datasets import load_files

    if not any(folder.glob("**/train")):
        part = folder.with_suffix(".part")  # elsewhere, so that a part is not taken for the whole
        shutil.unpack_archive(folder / "CINIC-10.tar.gz", part, filter="data")
        part.rename(folder / "images")
    arrays = []
    for split in ("train", "test"):
        (root,) = folder.glob(f"**/{split}")
        found = load_files(root, load_content=False)
        images = [Image.open(path).convert("RGB") for path in progress(found.filenames, split)]
        labels = np.array(found.target_names)[found.target]
        arrays += [np.stack(images).transpose(0, 3, 1, 2), labels]
    return arrays


def read_digits(folder):
    """scikit-learn's 1,797 digits of 8 × 8 pixels; a fixed fifth is the test part."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return split_samples(x.astype(np.uint8).reshape(-1, 1, 8, 8), y)


def read_breast_cancer(folder):
    """scikit-learn's 569 tumours with 30 features; a fixed fifth is the test part."""
    from sklearn.datasets import load_breast_cancer

    return split_samples(*load_breast_cancer(return_X_y=True))


def split_samples(x, y):
    """x_train, y_train, x_test, y_test: a fixed fifth, stratified, is the test part."""
    from sklearn.model_selection import train_test_split

    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, random_state=0,
                                                        stratify=y)
    return x_train, y_train, x_test, y_test


DATASETS = {
    "digits": Dataset(read_digits, "10 classes, 1,797 samples, embedded"),
    "breast_cancer": Dataset(read_breast_cancer, "2 classes, 569 samples, embedded"),
    "mnist": Dataset(
        read_idx, "10 classes, 70,000 samples, 12 MB",
        "https://ossci-datasets.s3.amazonaws.com/mnist/{}", {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"}),
    "fashion_mnist": Dataset(
        read_idx, "10 classes, 70,000 samples, 31 MB",
        "https://fashion-mnist.s3.eu-central-1.amazonaws.com/{}", {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310"}),
    "qmnist": Dataset(
        read_idx, "10 classes, 120,000 samples, 20 MB",
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
# Whose training images these are, by the MD5 of the unpacked file.
OWNERS = {"6bbc9ace898e44ae57da46a324031adb": "mnist",
          "f4a8712d7a061bf5bd6d2ca38dc4d50a": "fashion_mnist"}


def find_folder(name, data_dir):
    """The folder with the files of a known data set; None when they are not here."""
    folder = Path(data_dir, name)
    is_packed = all((folder / file).exists() for file in DATASETS[name].files)
    if is_packed or any(folder.glob("**/train")):
        return folder


def download(name, data_dir):
    """Download the missing files of a data set and check their MD5; returns their folder.

    A server must answer within 3 s, and may then pause for up to a minute.
    """
    folder = Path(data_dir, name)
    folder.mkdir(parents=True, exist_ok=True)
    for file, md5 in DATASETS[name].files.items():
        if (folder / file).exists():
            continue
        url = DATASETS[name].url.format(file)
        try:
            with urllib.request.urlopen(url, timeout=3) as response:
                response.fp.raw._sock.settimeout(60)
                content = response.read()
            if hashlib.md5(content).hexdigest() != md5:
                raise OSError("its MD5 is not the published one")
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{name}: cannot download {url} ({error}); put {file} into {folder}, "
                            "or use --dataset digits") from None
        with atomic_write(folder / file) as path:
            path.write_bytes(content)
    return folder


def load_dataset(name, data_dir):
    """Data of a known data set, downloaded where need be."""
    folder = find_folder(name, data_dir) or download(name, data_dir)
    try:
        return make_data(name, DATASETS[name].read(folder), DATASETS[name].about)
    except (ValueError, IndexError, OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{name} in {folder}: {error}; if a file is damaged or incomplete, delete "
                        "it, then a known data set is downloaded again") from None


def make_data(name, arrays, source):
    """Data of x_train, y_train, x_test and y_test, with sklearn's checks; labels may be anything.
    Features are normalized column by column and images as a whole, by the training part."""
    from sklearn.preprocessing import LabelEncoder, StandardScaler
    from sklearn.utils import check_X_y

    x_train, y_train, x_test, y_test = arrays
    x_train, y_train = check_X_y(x_train, y_train, allow_nd=True)
    x_test, y_test = check_X_y(x_test, y_test, allow_nd=True)
    encoder = LabelEncoder()
    y_train = encoder.fit_transform(y_train)
    y_test = encoder.transform(y_test)
    classes = encoder.classes_.tolist()
    if len(classes) < 2:
        raise ValueError("fewer than two classes")
    digest = hashlib.sha256()
    for array in (x_train, y_train, x_test, y_test):
        digest.update(np.ascontiguousarray(array))
    majority = np.bincount(y_train).argmax()
    info = {"source": source, "train": len(y_train), "test": len(y_test), "classes": classes,
            "majority class [%]": round(100 * (y_test == majority).mean(), 2),
            "sha256": digest.hexdigest()}
    if x_train.ndim == 2:
        scaler = StandardScaler().fit(x_train)  # float32 would lose small steps of large numbers
        x_train, x_test = (scaler.transform(x).astype(np.float32) for x in (x_train, x_test))
    else:
        mean = float(x_train.mean(dtype=np.float64))
        std = float(x_train.std(dtype=np.float32))
        x_train, x_test = ((x.astype(np.float32) - mean) / std for x in (x_train, x_test))
    return Data(name, x_train, y_train, x_test, y_test, len(classes), info)


# --- Data: CSV and text -------------------------------------------------------------------------


def load_table(path, drop, label="label"):
    """Data of one's own CSV file; a fixed fifth, stratified, is the test part. Columns that are
    called p0, p1, … or pixel0, pixel1, … and as many as the pixels of a square are an image, row by
    row: x is [n, 1, side, side]."""
    try:
        header = ",".join(pd.read_csv(path, nrows=0))
        separator = max(",;\t", key=header.count)
        # Cells beyond the header's are an error, unless all are empty.
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
            table = pd.read_csv(path, sep=separator, index_col=False, skipinitialspace=True,
                                low_memory=False)
        table = table.drop(columns=drop).dropna(how="all")
        if label not in table or f"{label}.1" in table:  # pandas numbers columns of one name
            raise ValueError(f"one column must be called `{label}`; the columns are {header:.99}; "
                             "is there a header? See --label-column")
        missing = list(table.columns[table.isna().any()])
        if missing:
            raise ValueError(f"values are missing in columns {missing}; see --drop")
        distinct = table.drop_duplicates()
        if len(distinct) < len(table):
            note(f"{path}: {len(distinct):,} of {len(table):,} rows are distinct and are used")
        labels = distinct.pop(label).astype(str)
        if labels.str.strip().str.casefold().nunique() < labels.nunique():
            note(f"{path}: some labels differ only in case or spaces: {sorted(labels.unique())}")
        ids = [name for name in distinct.select_dtypes("integer") if distinct[name].is_unique]
        if ids:
            note(f"{path}: columns {ids} seem to number the rows; if the rows are sorted by "
                 "class, this gives the class away; see --drop")
        words = list(distinct.select_dtypes(exclude=["number", "bool"]))
        if words:
            raise ValueError(f"columns {words} are not numbers alone; see --drop")
        x = distinct.to_numpy()
        side = math.isqrt(x.shape[1])
        numbers = distinct.columns.str.extract(r"^(?:p|pixel)(\d+)$", expand=False).astype(float)
        if side * side == x.shape[1] and (np.diff(numbers) == 1).all() and numbers.notna().all():
            x = x.reshape(-1, 1, side, side)
        return make_data(Path(path).stem, split_samples(x, labels.to_numpy()), path)
    except (ValueError, KeyError, pd.errors.ParserWarning) as error:
        raise UserError(f"{path}: {error}") from None


def load_text(args):
    """Data of text as bytes: windows without overlap; the last tenth is the test part.

    The files of a folder, without hidden ones, are in a fixed random order. Without --data the text
    is the standard library's source.
    """
    from sklearn.model_selection import train_test_split

    root = Path(args.data or Path(os.__file__).parent)
    names = glob.glob("**" if args.data else "*.py", root_dir=root, recursive=True)
    paths = [root / name for name in sorted(names) if (root / name).is_file()]
    text = b""
    for path in np.random.default_rng(0).permutation(paths or [root]):
        with path.open("rb") as file:
            text += file.read(args.text_bytes - len(text))
    if b"\0" in text:
        note(f"{root} has zero bytes; is it compressed or binary, and not plain text?")
    if len(text) <= 2 * WINDOW:
        raise UserError(f"{root}: {len(text)} bytes are less than two windows of {WINDOW}")
    values = np.frombuffer(text, np.uint8).astype(np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(values, WINDOW + 1)[::WINDOW]
    x_train, x_test, y_train, y_test = train_test_split(
        windows[:, :-1], windows[:, 1:], test_size=0.1, shuffle=False)
    pairs = np.ones((256, 256))  # each pair of bytes once more than seen
    np.add.at(pairs, (x_train, y_train), 1)
    bits = -np.log2(pairs / pairs.sum(1, keepdims=True))
    info = {"source": args.data or "embedded", "train": len(x_train), "test": len(x_test),
            "pairs of bytes [bits per byte]": round(bits[x_test, y_test].mean(), 2),
            "sha256": hashlib.sha256(text).hexdigest()}
    name = root.stem if args.data else "python_stdlib"
    return Data(name, x_train, y_train, x_test, y_test, 256, info)


def load_all(args):
    """A list of the Data of all data sets."""
    if args.task == "nlp":
        return [load_text(args)]
    if args.data:
        return [load_table(args.data, args.drop, args.label_column)]
    names = [args.dataset or "mnist"]
    if not args.dataset:
        try:
            download("mnist", args.data_dir)
        except UserError as error:
            note(f"no mnist ({error}); scikit-learn's digits are used")
            names = ["digits"]
    if not args.no_benchmark:
        names += args.benchmark_datasets
    return [load_dataset(name, args.data_dir) for name in dict.fromkeys(names)]


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
        if len(shape) != 3:
            raise UserError("--model cnn needs images in all data sets; see --no-benchmark")
        channels, height, side = shape
        super().__init__(
            nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(2 * width * (height // 4) * (side // 4), classes))


class TinyTransformer(nn.Module):
    """Decoder-only language model. Bytes [batch, time] to logits [batch, classes, time]."""

    def __init__(self, shape, classes, d_model=64, num_heads=4, num_layers=2):
        super().__init__()
        self.tokens = nn.Embedding(classes, d_model)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.positions = nn.Parameter(0.02 * torch.randn(shape[0], d_model))
        layer = nn.TransformerEncoderLayer(d_model, num_heads, 4 * d_model, 0, "gelu",
                                           batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(d_model),
                                            enable_nested_tensor=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], tokens.device)
        x = self.layers(x, mask, is_causal=True)
        return self.tokens.weight @ x.mT  # input and output embedding are one


MODELS = {"vision": {"mlp": SimpleMLP, "cnn": SmallCNN}, "nlp": {"transformer": TinyTransformer}}
# The small models of rho_loss.
HOLDOUT_MODELS = {"vision": partial(SimpleMLP, hidden=32),
                  "nlp": partial(TinyTransformer, d_model=32, num_heads=2, num_layers=1)}


def sample_losses(model, x, y):
    """(cross-entropy of each sample [batch], of a window the mean over its bytes; logits). Raises
    UserError if a loss is NaN or infinite."""
    logits = model(x)
    losses = F.cross_entropy(logits, y, reduction="none")
    if losses.dim() > 1:
        losses = losses.mean(1)
    if not math.isfinite(losses.detach().sum()):
        raise UserError("the loss is no longer a number; lower --learning-rate, or look for very "
                        "large numbers in the data")
    return losses, logits


# --- Training -----------------------------------------------------------------------------------


class Learner:
    """A model in training, as a strategy sees it.

    The same seed means the same first weights and random numbers for every strategy.
    """

    def __init__(self, data, make_model, seed, args, epochs=None):
        torch.manual_seed(seed)
        self.data = data
        self.args = args
        self.epochs = epochs or args.epochs  # a control may end within one
        self.model = make_model(data.x_train.shape[1:], data.num_classes).to(args.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), args.learning_rate, fused=True)
        self.rng = np.random.default_rng(seed)
        self.loss = np.full(len(data.x_train), np.inf, np.float32)
        self.last_loss = self.loss.copy()
        self.samples = 0  # trained on
        self.steps = 0  # batches trained on
        self.epoch_step = 0  # how far this epoch is, and how far it is expected to go
        self.epoch_steps = len(self.loss) / args.batch_size
        self.seconds = 0.0  # of training and selection, without evaluation
        self.history = []  # metrics before training and after each epoch

    def batches(self, rows, pool=1):
        """These rows in batches, `pool` together, without weights; the last one may be smaller.
        Their number is taken to be that of the epoch."""
        size = pool * self.args.batch_size
        batches = [(rows[start : start + size], None) for start in range(0, len(rows), size)]
        self.epoch_steps = len(batches)
        return batches

    @torch.inference_mode()
    def score(self, rows, gradient_norms=False):
        """Current losses of the training samples `rows`, as an array; or the norms of softmax minus
        one-hot, the gradient of the loss at the logits."""
        x, y = self.data.training_samples(rows)
        self.model.eval()
        scores, logits = sample_losses(self.model, x, y)
        self.model.train()
        if gradient_norms:
            error = logits.softmax(1) - F.one_hot(y, logits.shape[1]).movedim(-1, 1)
            scores = error.flatten(1).norm(dim=1)
        return scores.cpu().numpy()

    def progress(self):
        """Share of the training that is done, from 0 to 1."""
        if self.args.budget_seconds:
            return min(1, self.seconds / self.args.budget_seconds)
        share = self.epoch_step / max(1, self.epoch_steps)
        return min(1, (len(self.history) - 1 + share) / self.epochs)


def train_epoch(learner, strategy):
    """Train on the batches of a strategy; stop when the time is used up."""
    args, optimizer = learner.args, learner.optimizer
    start_time = time.perf_counter() - learner.seconds
    learner.model.train()
    for rows, weights in strategy(learner):
        if args.schedule == "linear":
            remaining = max(0.001, 1 - learner.progress())  # the learning rate stays above 0
            optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
        losses, _ = sample_losses(learner.model, *learner.data.training_samples(rows))
        loss = losses.mean()
        if weights is not None:
            weights = torch.as_tensor(weights, dtype=torch.float32, device=args.device)
            loss = (losses * weights.view_as(losses)).mean()  # never one weight for all
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        track_losses(learner, rows, losses.detach().cpu().numpy())
        learner.samples += len(rows)
        learner.steps += 1
        learner.epoch_step += 1
        learner.seconds = time.perf_counter() - start_time
        if args.budget_seconds and learner.progress() == 1:
            break
    learner.epoch_steps = learner.epoch_step
    learner.epoch_step = 0
    learner.seconds = time.perf_counter() - start_time


def track_losses(learner, rows, losses):
    """Bring the latest losses and their moving averages up to date; a first loss is its average."""
    learner.last_loss[rows] = losses
    if learner.args.smart_loss == "batch-mean":
        losses = losses.mean()
    old = learner.loss[rows]
    average = DECAY * old + (1 - DECAY) * losses
    learner.loss[rows] = np.where(np.isinf(old), losses, average)


@torch.inference_mode()
def evaluate(model, x, y):
    """(losses of all samples [n], accuracy in percent), by forward passes of 1,000 at a time."""
    model.eval()
    losses = []
    correct = 0
    for x_part, y_part in zip(x.split(1000), y.split(1000)):
        part_losses, logits = sample_losses(model, x_part, y_part)
        losses.append(part_losses)
        correct += (logits.argmax(1) == y_part).sum().item()
    return torch.cat(losses), 100 * correct / y.numel()


def measure(learner):
    """Append the metrics of this moment to the history; those of training are of every k-th sample,
    as many as the test part has."""
    data = learner.data
    k = max(1, len(data.x_train) // len(data.x_test))
    train_losses, train_acc = evaluate(learner.model, data.x_train[::k], data.y_train[::k])
    test_losses, test_acc = evaluate(learner.model, data.x_test, data.y_test)
    metrics = {"epoch": len(learner.history), "steps": learner.steps, "samples": learner.samples,
               "seconds": learner.seconds, "train_acc": train_acc, "test_acc": test_acc,
               "train_loss": train_losses.double().mean().item(),
               "test_loss": test_losses.double().mean().item()}
    if learner.args.task == "nlp":
        metrics["bits_per_byte"] = metrics.pop("test_loss") / math.log(2)
    learner.history.append(metrics)


def add_label_noise(data, share, seed):
    """Data of which this share of the training labels, drawn by `seed`, are replaced by
    another class."""
    if not share:
        return data
    rng = np.random.default_rng([seed, 1])
    y = data.y_train.copy()
    wrong = rng.choice(len(y), round(share * len(y)), replace=False)
    shift = rng.integers(1, data.num_classes, len(wrong))
    y[wrong] = (y[wrong] + shift) % data.num_classes
    return replace(data, name=f"{data.name}-noise-{share}", y_train=y)


def train_with_control(data, noise, strategy, seed, strategies, make_model, args, folder):
    """Records of one strategy with one seed, a row for each epoch. `difference` is that of the
    deciding metric from the last value of the control: random with exactly as many trained samples,
    or with the same time budget. What `folder` has is not trained again."""
    torch.set_num_threads(1)  # alone as in parallel: the numbers are the same, and it is as fast
    data = add_label_noise(data, noise, seed).to(args.device)
    # Other data are other files, so a run is never resumed with data that have changed.
    digest = data.info["sha256"][:8]

    def train(name, batches, samples):
        file = folder / f"{data.name}-{digest}-seed-{seed}-{name}-{samples}.pt"
        if not file.exists():
            learner = Learner(data, make_model, seed, args, samples / len(data.x_train))
            measure(learner)
            while learner.progress() < 1:
                train_epoch(learner, batches)
                measure(learner)
            with atomic_write(file) as path:
                torch.save({"model": learner.model.state_dict(), "history": learner.history}, path)
        return pd.DataFrame(load_checkpoint(file, file)["history"])

    samples = args.epochs * len(data.x_train)
    records = train(strategy, strategies[strategy], samples)
    difference = math.nan
    if strategy != BASELINE:
        control = random_batches
        if not args.budget_seconds:
            samples = records["samples"].iloc[-1]
            control = partial(random_until, samples=samples)
        metric = DECIDING[args.task][0]
        difference = records[metric] - train(BASELINE, control, samples)[metric].iloc[-1]
        difference = difference.round(9)  # equal ones are equal
    return records.assign(setting=data.name, strategy=strategy, seed=seed, difference=difference)


def train_all(all_data, args, run_dir):
    """Records of all runs, --jobs at a time: a table with one row for each epoch of each run."""
    from joblib import Parallel, delayed, parallel_config

    folder = run_dir.resolve() / "runs"
    folder.mkdir(exist_ok=True)
    seeds = range(args.seed, args.seed + args.runs)
    make_model = MODELS[args.task][args.model]
    noise = dict.fromkeys(args.label_noise)  # what is named twice is trained once
    combinations = itertools.product(all_data, noise, dict.fromkeys(args.strategy), seeds)
    tasks = [delayed(train_with_control)(*combination, STRATEGIES, make_model, args, folder)
             for combination in combinations]
    client = dask_client(args.jobs) if args.backend == "dask" else contextlib.nullcontext()
    with client, parallel_config(args.backend, n_jobs=min(args.jobs, len(tasks))):
        try:
            finished = Parallel(return_as="generator")(tasks)
            return pd.concat(progress(finished, "runs", len(tasks)), ignore_index=True)
        except BrokenProcessPool:
            raise UserError("a worker was killed, out of memory? Go on with --resume and fewer "
                            "--jobs") from None


def dask_client(jobs):
    """A client of the scheduler at DASK_SCHEDULER_ADDRESS, else of local processes."""
    from distributed import Client, LocalCluster

    address = os.environ.get("DASK_SCHEDULER_ADDRESS")
    client = Client(address or LocalCluster(n_workers=jobs, threads_per_worker=1), timeout=3)
    for module in {"common", __name__} - {"__main__"}:  # remote workers may not have them
        client.upload_file(sys.modules[module].__file__)
    return client


# --- Evaluation: paired tests and tables --------------------------------------------------------


def half_width(values):
    """Half width of the 95 % confidence interval, by Student's t; NaN for one run."""
    return mean_and_interval(values)[1].item()


def p_value(differences):
    """The p-value of a paired t-test over the seeds; NaN for fewer than MIN_RUNS of them, and where
    every seed has the same difference."""
    from scipy import stats

    if len(differences) < MIN_RUNS or differences.nunique() < 2:
        return math.nan
    return stats.ttest_1samp(differences, 0).pvalue


def holm(p):
    """Holm's correction of p-values for as many tests as there are; NaN stay NaN."""
    ordered = p.sort_values()  # NaN last
    tests_left = p.count() - np.arange(len(p))
    return (ordered * tests_left).cummax().clip(upper=1).reindex(p.index)


def plus_minus(means, intervals, mean_format="{:.2f}"):
    """Means and their intervals as texts, `0.80 ± 0.12`; NaN without a mean."""
    texts = means.map(mean_format.format) + intervals.map(" ± {:.2f}".format)
    return texts.str.removesuffix(" ± nan").where(means.notna())


def compare(records, args):
    """A table with one row for each setting and strategy: the metric that decides, after the last
    epoch; its paired difference from the control; and samples and seconds, in all and until the
    mean of the runs first comes within 1 % of what the first strategy has in the end."""
    metric, sign, _ = DECIDING[args.task]
    keys = ["setting", "strategy"]
    final = records.groupby([*keys, "seed"], sort=False).last()
    table = final.groupby(keys, sort=False).agg(
        mean=(metric, "mean"), interval=(metric, half_width), difference=("difference", "mean"),
        width=("difference", half_width), p=("difference", p_value), samples=("samples", "mean"),
        seconds=("seconds", "mean"))
    by_setting = table.groupby("setting", sort=False)
    table["p"] = by_setting["p"].transform(holm)
    stars = np.where(table["p"] < ALPHA, " *", "")
    table["effect"] = plus_minus(table["difference"], table["width"], "{:+.2f}") + stars
    table["target"] = by_setting["mean"].transform("first") * (1 - 0.01 * sign)
    epochs = records.groupby([*keys, "epoch"], sort=False)
    is_complete = epochs.size() == args.runs  # reached by all runs
    curves = epochs.mean()[is_complete].join(table["target"])
    reached = curves.query(f"{sign} * ({metric} - target) >= 0").groupby(keys).first()
    return table.join(reached[["samples", "seconds"]].add_suffix(" to target"))


def name_control(args):
    """What the strategies are compared with."""
    if args.budget_seconds:
        return f"random in the same time ({args.budget_seconds:g} s)"
    return "random with as many trained samples"


def format_table(table, args):
    """The rows of one setting as a Markdown table."""
    metric, _, unit = DECIDING[args.task]
    texts = pd.DataFrame({
        "strategy": table.index, METRICS[metric]: plus_minus(table["mean"], table["interval"]),
        f"difference [{unit}]": table["effect"]})
    for column, number_format in NUMBERS.items():
        texts[column] = table[column].map(number_format.format, na_action="ignore")
    return markdown_table(texts)


def verdict(table, args):
    """Which strategies differ from their control by the paired t-test, and which do not."""
    if args.runs < MIN_RUNS:
        return f"No verdict: a paired t-test needs {MIN_RUNS} runs."
    table = table.dropna(subset="difference")
    is_better = DECIDING[args.task][1] * table["difference"] > 0
    is_shown = table["p"] < ALPHA
    outcomes = np.select([is_shown & is_better, is_shown], ["Better than", "Worse than"],
                         "Not significantly different from")
    names = table.index + " (" + table["effect"] + ")"
    return " ".join(f"{outcome} {name_control(args)}: {', '.join(group)}."
                    for outcome, group in names.groupby(outcomes))


# --- Pictures -----------------------------------------------------------------------------------


def plot_runs(ax, records, x, y):
    """The mean of y over the seeds of each strategy, with its 95 % interval, over the mean of x,
    from the first epoch to the last that all seeds have."""
    records = records.query("epoch > 0")
    for i, (strategy, runs) in enumerate(records.groupby("strategy", sort=False)):
        values = runs.pivot(index="epoch", columns="seed", values=y).dropna()
        positions = runs.groupby("epoch")[x].mean()[values.index]
        plot_curve(ax, positions, values.T, strategy, i, MARKERS[i % 7])
    ax.set(xlabel=X_AXES[x], ylabel=METRICS[y])
    if x == "epoch":
        epoch_axis(ax)


def plot_differences(ax, table, args):
    """The differences of all strategies from their controls, a marker for each setting."""
    table = table.dropna(subset="difference")
    means = table["difference"].unstack("setting", sort=False)
    widths = table["width"].unstack("setting", sort=False)
    plot_dots(ax, means.index, means.to_dict("list"), errors=widths)
    ax.axvline(0, color="black", linewidth=1)
    ax.set_xlabel(f"difference from {name_control(args)}\n[{DECIDING[args.task][2]}]; bars: 95 % "
                  "intervals,\nuncorrected; p in the table: corrected after Holm")


def plot_comparison(records, table, setting, args, run_dir):
    """The metric that decides over epochs, samples and seconds, and the differences."""
    runs = records.query("setting == @setting")
    fig, axes = new_figure(f"{setting}: mean of all runs ({args.runs})", 2, 2, (12, 9))
    for ax, x in zip(axes, X_AXES):
        plot_runs(ax, runs, x, DECIDING[args.task][0])
    plot_differences(axes[3], table.loc[[setting]], args)
    legend_below(axes[0])
    save_figure(fig, run_dir / f"comparison_{setting}.png")


def write_strategy_folders(records, args):
    """As in the original, summary.txt and four pictures of each strategy; returns the folders."""
    metrics = [metric for metric in METRICS if metric in records]
    folders = []
    for (setting, strategy), runs in records.groupby(["setting", "strategy"], sort=False):
        folder = free_run_dir(Path(args.output_dir, args.task, setting, strategy))
        folder.mkdir(parents=True, exist_ok=True)  # two processes may go on with the same run
        title = f"{strategy} on {setting}: mean of all runs ({args.runs})"
        for metric in metrics:
            fig, (ax,) = new_figure(title)
            plot_runs(ax, runs, "epoch", metric)
            save_figure(fig, folder / f"{metric}.png", show=False)
        final = runs.groupby("seed")[metrics].last().rename(columns=METRICS)
        summary = final.agg(["mean", half_width]).set_axis(["mean", "± 95 % interval"])
        text = f"{title}, after the last epoch\n{summary.T.to_string(na_rep='–')}\n"
        (folder / "summary.txt").write_text(text, encoding="utf-8")
        folders.append(str(folder))
    return folders


# --- The experiment -----------------------------------------------------------------------------

ABOUT = """±: 95 % interval over the seeds, of that figure alone. p: paired t-test, after Holm's \
correction for all strategies on the same data set with the same share of wrong labels; none where \
every seed has the same difference; * is p < 0.05. Seconds: training and selection, without \
evaluation; runs side by side (--jobs) share the machine. The last two columns: until the mean of \
all runs first comes within 1 % of what the first strategy has in the end."""


def run_experiment(args):
    """Train every strategy and its controls, compare them, and write tables and pictures."""
    all_data = load_all(args)
    run_dir = next_run_dir(args)
    records = train_all(all_data, args, run_dir)
    table = compare(records, args)
    sections = [markdown_table([{"data set": data.name, **data.info} for data in all_data])]
    for setting in table.index.unique("setting"):
        rows = table.loc[setting]
        sections += [f"## {setting}", format_table(rows, args), verdict(rows, args)]
        plot_comparison(records, table, setting, args, run_dir)
    effects = table["effect"].dropna().unstack("setting", sort=False)
    if effects.shape[1] > 1:
        sections += [f"## Differences from {name_control(args)}",
                     markdown_table(effects.reset_index())]
        fig, (ax,) = new_figure("Mean of all runs", size=(9, 2 + len(table) / 4))
        plot_differences(ax, table, args)
        legend_below(ax, 3)
        save_figure(fig, run_dir / "benchmark.png")
    folders = [] if args.quick else write_strategy_folders(records, args)
    sections += [ABOUT, f"Pictures of each strategy: {', '.join(folders) or 'not with --quick'}"]
    results = {
        "data": {data.name: data.info for data in all_data},
        "comparisons": table.reset_index().to_dict("records"),
        "records": records.to_dict("records"),
        "folders": folders,
    }
    return write_results(results, "\n\n".join(sections), args, run_dir)


# --- Extras: data sets and device ---------------------------------------------------------------


def run(args):
    """Do what the arguments ask for."""
    if args.list_datasets:
        print(markdown_table([
            {"data set": name, "what": dataset.about,
             "here": "yes" if find_folder(name, args.data_dir) else "no"}
            for name, dataset in DATASETS.items()]))
    elif args.check_device:
        print(f"auto: {detect_device()}; cpu: {os.cpu_count()} cores; torch: {torch.__version__}")
    elif args.download:
        for name in args.download:
            log(f"{name} is in {download(name, args.data_dir)}")
    else:
        return run_experiment(args)


# --- Plumbing: nothing below is about the experiment --------------------------------------------

PACKAGES = ["torch", "numpy", "pandas", "pyarrow", "sklearn", "transformers", "datasets",
            "perforatedai"]
NOTES = []
PIP_NAMES = {"sklearn": "scikit-learn", "PIL": "pillow"}


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
        part.unlink(missing_ok=True)


def load_checkpoint(file, name):
    """What torch.save wrote to `file`, a path or a stream. Raises UserError with its `name`."""
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception:  # torch.load raises errors of many types for a damaged file
        raise UserError(f"{name}: damaged, or not a checkpoint of {EXPERIMENT}.py") from None


def plain_arguments(args):
    """{name: value} of the arguments, all of which JSON can hold."""
    return vars(args) | {"device": str(args.device)}


def changed_arguments(args):
    """{name: value} of the arguments that differ from their defaults."""
    defaults = plain_arguments(parse_args([]))
    return {name: value for name, value in plain_arguments(args).items()
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
    files = [file for file in files
             if file.exists() and not file.with_name("results.json").exists()]
    if not files:
        raise UserError(f"--resume {args.resume}: no unfinished run; see --output-dir")
    changed = changed_arguments(args)
    refused = changed.keys() - {"resume", "output_dir", "data_dir", "device", "jobs", "backend"}
    if refused:
        flags = " --".join(sorted(refused)).replace("_", "-")
        raise UserError(f"--resume keeps a run's arguments; leave out --{flags}")
    script = Path(globals().get("__file__", ""))
    if script.is_file() and script.stat().st_mtime > files[-1].stat().st_mtime:
        note("the script is newer than this run, whose results may mix two versions of it")
    arguments = json.loads(files[-1].read_text()) | changed
    arguments |= {"device": args.device, "resume": str(files[-1].parent)}
    return argparse.Namespace(**arguments)


def describe_run(args):
    """What made the results: arguments, script, versions, device and peak memory."""
    script = Path(globals().get("__file__", "pasted into a notebook")).resolve()
    digest = hashlib.sha256(script.read_bytes()).hexdigest() if script.exists() else None
    git = f'git -C "{script.parent}" describe --always --dirty --abbrev=40 --exclude="*"'
    failed, commit = subprocess.getstatusoutput(git)
    versions = {name: getattr(sys.modules[name], "__version__", None)
                for name in PACKAGES if name in sys.modules}
    device = args.device
    return {
        "experiment": EXPERIMENT,
        "arguments": plain_arguments(args),
        "changed_arguments": changed_arguments(args),
        "script_sha256": digest,
        "git_commit": None if failed else commit,
        "git_clean": None if failed else not commit.endswith("-dirty"),
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
    arguments = [f"{name}={value}" for name, value in results["changed_arguments"].items()]
    title = f"# {EXPERIMENT}.py {', '.join(arguments)}"
    text = "\n\n".join([title, *(f"Note: {text}" for text in NOTES), summary])
    (run_dir / "summary.md").write_text(text, encoding="utf-8")
    content = to_json(results)
    with atomic_write(run_dir / "results.json") as path:
        path.write_text(content)
    if in_notebook():
        from IPython.display import Markdown, display

        display(Markdown(text))
    else:
        print(text)
    print(f"Everything is in {run_dir}")
    return json.loads(content)


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
        command = f"python {EXPERIMENT}.py --resume --output-dir {args.output_dir}"
        command = 'main(["--resume"])' if in_notebook() else command
        text = f"interrupted; to go on with a run that had begun: {command}"
        code = 130
    except (UserError, OSError, ModuleNotFoundError, torch.OutOfMemoryError) as error:
        text = f"error: {' '.join(str(error).split())}"
        code = 2
        if isinstance(error, ModuleNotFoundError):
            package = error.name.split(".")[0]
            text += f"; pip install {PIP_NAMES.get(package, package)}"
    gc.collect()  # what pyarrow leaves of a file that it could not read may abort Python's exit
    print(f"{EXPERIMENT}.py: {text}", file=sys.stderr)  # in every process of torchrun
    if not in_notebook():
        raise SystemExit(code)


if __name__ == "__main__":
    main()
