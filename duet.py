"""Do column names help a time-series transformer, and can one model serve many tables?

A transformer over patches of 16 steps classifies windows of 96 steps. It reads each column's
values, in which missing ones are filled forward, and a mask of what is present. A strategy adds the
columns' names: none, a learned vocabulary that grows (auto_expanding), a frozen BERT (frozen_bert),
or, as a control, a fixed random vector for each name (random_names).

Measured on three data sets, 5 seeds: 95.8 % without names, 96.1 to 96.5 % with any of them, random
ones included. One shared model for all three (3 to 4 seeds): 97.1 to 97.4 % with names, 62.8 %
without. A name's meaning counts on a new table only: before it has seen one label, a pretrained
model is 100 % accurate with BERT's vectors, 56 % with learned and 35 % with random ones
(--transfer, 3 seeds).

    python duet.py                                        # three data sets: 5 minutes
    python duet.py --quick                                # every experiment, small, no network
    python duet.py --shared --runs 5                      # one model for all, with an interval
    python duet.py --dataset etth1 --head ordinal         # what it takes to match persistence
    python duet.py --data sales.csv --target price --num-classes 4
    python duet.py --data BasicMotions/                   # a folder of UEA or UCR files
    python duet.py --transfer --synthetic-schemas 8       # a new data set, few of its labels
    python duet.py --nan-robustness --dataset etth1 --head ordinal
    python duet.py --columns --bert-model FOLDER          # which names are near each other
    python duet.py --predict new.csv --checkpoint outputs/duet/run-001/models/etth1-none-42.pt

A strategy is a subclass of ColumnEmbedder and an entry in STRATEGIES, also from a notebook. Within
one data set, a name adds a constant that the patch layer's bias already has; in the shared model
it tells the columns apart.

Sources: Nie et al. 2023 (patches), Devlin et al. 2019 (BERT), McCullagh 1980 (ordinal head), Kim
et al. 2022 (scaled steps), Wang et al. 2017 (convolutions), Dempster et al. 2023 (Hydra), Zhou et
al. 2021 (ETTh1, epochs), Bagnall et al. 2018 (the archive's files). The original is
github.com/kailukowiak/TREA-C ("DuET").
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.6", "numpy>=2.0", "pandas>=2.2", "scikit-learn>=1.7", "scipy>=1.14",
#     "matplotlib>=3.9", "tqdm>=4.66", "transformers>=5.0", "safetensors>=0.4.5",
# ]
# ///

import argparse
import contextlib
import copy
import functools
import gc
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
import timeit
import urllib.request
import warnings
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from common import (MARKERS, detect_device, has_bfloat16, in_notebook, legend_below,
                    mean_and_interval, new_figure, plot_curve, plot_dots, save_figure,
                    seed_everything)

EXPERIMENT = "duet"
SEQ_LEN = 96
PATCH_LEN = 16
STRIDE = 8
D_MODEL = 64
MIN_ROWS = 1296  # of a CSV file: 10 windows without common rows before the test part
ETTH1_URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv"
ETTH1_SHA256 = "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"
ORIGINAL_TABLE = {  # accuracy [%] of single runs on the data of --protocol original
    "temperature_sensors": {"none": 99.5, "auto_expanding": 99.5, "frozen_bert": 100.0},
    "user_metrics": {"none": 99.0, "auto_expanding": 99.0},
    "etth1": {"none": 79.7, "auto_expanding": 87.5},
}
ARCHIVE_SUFFIXES = [".ts", ".tsv", ".txt"]  # files of the UEA and UCR archives
FILLS = {  # rows of --nan-robustness: (way to fill, whether training has gaps)
    "forward fill and mask, trained with gaps": ("forward fill and mask", True),
    "forward fill, trained with gaps": ("forward fill", True),
    "forward fill": ("forward fill", False),
    "zero fill": ("zero fill", False),
}
STEPS = 600  # of training
SMALLEST_CHANGE = 0.1  # of the column that an ordinal head forecasts, in standard deviations
MISSING_KINDS = ["at random", "in blocks", "whole columns"]
MISSING_SHARES = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
LABEL_SHARES = [0.0, 0.05, 0.1, 1.0]
KEYS = ["dataset", "strategy", "training", "missing", "share", "seed"]  # what tells records apart
INTERVALS = (
    "±: 95 % interval of the mean over the seeds (Student's t), which vary the initial weights, "
    "the order of batches and, in a transfer, the choice of labels, but not the test part. *: the "
    "interval of a difference excludes 0 (paired t-test, not corrected for the number of "
    "comparisons).")
PROBES = ["temp", "temperature", "price"]  # is "temp" nearer to "temperature" than to "price"?

# The embedded data sets: {column: (level, scale)} and the two columns that the class couples.
EMBEDDED = {
    "temperature_sensors": (
        {"indoor_temp": (21, 1.5), "outdoor_temp": (12, 4), "humidity": (55, 8),
         "pressure": (1013, 6)}, ("outdoor_temp", "indoor_temp")),
    "user_metrics": (
        {"user_count": (800, 150), "session_duration": (300, 60), "page_views": (4000, 900),
         "click_rate": (0.04, 0.01), "conversion_rate": (0.02, 0.005)},
        ("user_count", "page_views")),
}
# Synthetic schemas: the class is always how a power column follows a temperature column.
TEMPERATURES = ["outdoor_temp", "ambient_temperature", "airTempC", "temp_outside",
                "weather_temperature", "tempC"]
POWERS = ["power_load", "energy_usage", "electricity_demand", "consumptionKwh", "grid_load",
          "power_demand"]
OTHERS = ["humidity", "pressure", "wind_speed", "CPU_usage", "memory_usage", "disk_IO",
          "network_bytes", "price", "volume", "volatility", "page_views", "click_rate",
          "user_count", "vibration", "flow_rate", "rainfall"]
SITES = ["roof", "hall", "north", "south", "cellar", "garden", "plant", "office"]

CLUTTER = "|".join([  # what is no part of a table
    # Titles: lines of one cell above a line with a name in its second cell or later.
    r"^(?:[^;\t|,\r\n]*+[;\t|,]*+[\r\n]++)+(?![-+.]?\d)(?=.*[;\t|,] ?(?:\"|[^\W\d]))",
    r"[;\t|,]+(?=[\r\n]|$)",  # empty cells at the end of a row
    r" +(?=[;\t|,\r\n]|$)",  # blanks at the end of a cell
    r"[$€£](?=-?\.?\d)",  # a sign before a number
    r"(?<=\d) ?[€%](?=[;\t|,\"\r\n]|$)",  # a sign after a number
    r"(?<=\d)[\xa0\u202f](?=\d)",  # hard spaces in a number
])
MISSING = [".", "..", "?", "-", "--", ":", "***", "#DIV/0!", "#REF!", "#VALUE!", "#NV",
           "unavailable", "unknown"]
DATE = r"\d{1,4}([-/.]\d{1,4})+([ T].*)?$"
CLOCK = r"\d+(:\d+)+"
THOUSANDS = r"-?[1-9]\d{0,2}(,\d{3})+(\.\d+)?"
ABBREVIATIONS = {
    "temp": "temperature", "hum": "humidity", "avg": "average", "num": "number", "cnt": "count",
    "min": "minimum", "max": "maximum", "mem": "memory", "vol": "volume", "cap": "capital",
    "hufl": "high useful load", "hull": "high useless load", "mufl": "middle useful load",
    "mull": "middle useless load", "lufl": "low useful load", "lull": "low useless load",
    "ot": "oil temperature", "io": "input output", "id": "identifier",
}
UNITS = {
    "c": "celsius", "f": "fahrenheit", "k": "kelvin", "pct": "percent", "ms": "milliseconds",
    "s": "seconds", "h": "hours", "kwh": "kilowatt hours", "kw": "kilowatts",
    "hpa": "hectopascal", "ppm": "parts per million", "mb": "megabytes", "gb": "gigabytes",
    "mm": "millimetres", "v": "volts", "a": "amperes", "hz": "hertz",
}
# A single letter is a unit only after a number or one of these words: not in phase_a.
QUANTITIES = {"temperature", "voltage", "current", "duration", "time", "length", "period", "delay"}


def positive(text):
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse_args(argv=None):
    """The command line as a namespace; an error is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        f"{EXPERIMENT}.py", argparse.SUPPRESS, __doc__.split("\n\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="every experiment on the original's easy synthetic "
        "data, no network: about a minute")
    add("--dataset", nargs="+", choices=[*EMBEDDED, "etth1"], metavar="NAME", help="embedded data "
        "sets, or etth1, which is downloaded: %(choices)s; if unset, all three, or the embedded "
        "ones if etth1 cannot be downloaded")
    add("--data", nargs="+", metavar="PATH", help="CSV files of time series, or .ts, .tsv and "
        ".txt files of the UEA and UCR archives, or folders of those")
    add("--target", help="column of the CSV files whose next value is classified; the classes are "
        "its quantiles, or its values if it has at most ten")
    add("--num-classes", type=positive, default=3, help="number of quantile classes of --target")
    add("--synthetic-schemas", type=positive, default=0, help="number of synthetic data sets with "
        "3 to 12 columns each")
    add("--windows", type=positive, default=2000, help="windows of each embedded data set; the "
        "original's have 1,000")
    add("--protocol", choices=["original", "holdout"], help="class limits of series from all rows "
        "(original) or from those before the test part (holdout); if unset, original for etth1 "
        "and with --quick, otherwise holdout; original also takes the original's synthetic data "
        "in place of the embedded ones, and removes 5 %% of ETTh1")
    add("--strategies", nargs="+", choices=STRATEGIES, metavar="NAME", help="strategies for column "
        "names: %(choices)s; if unset, all; --quick then leaves out frozen_bert, and "
        "--nan-robustness uses none")
    add("--shared", nargs="?", const="also", choices=["also", "only"], help="train one model for "
        "all data sets, in addition to one for each (also, which is what --shared alone means) or "
        "alone (only)")
    add("--transfer", nargs="?", const="last", metavar="NAME", help="experiment: pretrain on the "
        "other data sets, then learn NAME, or the last one, from 0, 5, 10 and 100 %% of its labels")
    add("--nan-robustness", action="store_true", help="experiment: accuracy with 0 to 50 %% of the "
        "values missing")
    add("--head", choices=["mean", "ordinal"], help="mean classifies the mean of the patches, as "
        "the original does; ordinal forecasts --target and lets the limits of its quantiles cut "
        "the forecast; if unset, ordinal with --target, mean without")
    add("--steps", type=positive, help="training steps for each data set; if unset, 600, or 8 epochs "
        "of a CSV file if these are fewer; convolutions take twice as many")
    add("--evaluations", type=positive, default=6, help="number of evaluations on the "
        "validation part; the weights of the best are kept")
    add("--batch-size", type=positive, default=128, help="largest number of windows in a "
        "batch; small data sets have smaller batches")
    add("--learning-rate", type=float, default=1e-3, help="peak learning rate of AdamW")
    add("--bert-model", default="bert-base-uncased", help="frozen encoder of frozen_bert: a name "
        "on the Hugging Face hub, or a folder")
    add("--runs", type=positive, default=1, help="number of seeds")
    add("--seed", type=int, default=42, help="first seed")
    add("--device", type=detect_device, default="auto", help="auto, cuda, mps or cpu")
    add("--threads", type=positive, help="number of CPU threads, on which the last digits depend; "
        "if unset, 2, or 1 where a short test finds the machine busy")
    add("--data-dir", default="data", help="folder of downloads and of cached name embeddings")
    add("--output-dir", default="outputs", help="folder of all results")
    add("--resume", nargs="?", const="newest", metavar="RUN_DIR", help="unfinished run to go on "
        "with; without a value, the newest")
    add("--checkpoint", metavar="FILE", help="trained model for --predict")
    add("--predict", metavar="FILE", help="classify the windows of a file by --checkpoint and exit")
    add("--columns", action="store_true", help="show which column names the frozen encoder takes "
        "to be near each other, and exit")
    add("--prewarm", metavar="FILE", help="cache the embeddings of the names in a file, one a "
        "line, show what is cached, and exit")
    if "--quick" in (argv or []):
        parser.set_defaults(
            steps=40, batch_size=32, evaluations=2, shared="also", transfer="last",
            nan_robustness=True, protocol="original")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**31:
        parser.error("--seed: at least 0 and below 2**31")
    if args.learning_rate <= 0:
        parser.error("--learning-rate: above 0")
    args.head = args.head or ("ordinal" if args.target else "mean")
    if args.target and not args.data:
        parser.error("--target is for the CSV files of --data")
    if bool(args.predict) != bool(args.checkpoint):
        parser.error("--predict needs --checkpoint, a file in models/ of a run, and the reverse")
    return args


# --- Data: columns and windows ------------------------------------------------------------------


@dataclass
class Dataset:
    """Windows of one table: window w is seq_len rows of `series`, from row starts[w] on."""

    name: str
    columns: list  # names
    series: np.ndarray  # [rows, columns] float64, NaN where missing; float32 once normalized
    starts: np.ndarray  # [windows] int64
    labels: np.ndarray  # [windows] int64
    classes: list  # names
    splits: dict  # {train, val, test: numbers of windows}
    info: dict  # for results.json
    seq_len: int = SEQ_LEN
    target: str | None = None  # the column whose next value is classified, if there is one
    limits: list | None = None  # [classes - 1] between the classes, in units of the target
    mean: list | None = None  # [columns] of the training part
    std: list | None = None

    @property
    def has_quantiles(self):
        """Whether the classes are quantiles of the target."""
        return self.classes[0] == "quantile 1"


def describe(data):
    """What a checkpoint keeps of a Dataset, so that new files can be read in the same way."""
    return vars(replace(data, series=None, starts=None, labels=None, splits=None, info=None))


def name_to_words(name):
    """A column name as English words: `tempC` -> "temperature celsius"."""
    words = []
    for token in re.findall(r"[^\W_]+", name):
        parts = re.findall(r"[A-Z]+(?![^\W\d_A-Z])|[A-Z]?[^\W\d_A-Z]+|\d+", token)
        words += [token] if token.lower() in UNITS else parts  # hPa is one word
    words = [ABBREVIATIONS.get(word.lower(), word.lower()) for word in words or [name]]
    *before, last = words
    if before and (len(last) > 1 or before[-1] in QUANTITIES or before[-1].isdigit()):
        words[-1] = UNITS.get(last, last)  # a unit is the last word
    return " ".join(words)


def count_classes(data):
    """{split: [windows of each class]}; UserError where a part has none or training one class."""
    counts = {split: np.bincount(data.labels[part], minlength=len(data.classes)).tolist()
              for split, part in data.splits.items()}
    if not all(map(any, counts.values())) or np.count_nonzero(counts["train"]) < 2:
        raise UserError(f"{data.name}: too few windows of its classes: {counts}")
    if not all(counts["train"]) or np.count_nonzero(counts["test"]) == 1:
        note(f"{data.name}: accuracy says little where training lacks a class or the test part has "
             f"one class only; windows of the classes {data.classes}: {counts}")
    return counts


def normalize_dataset(data):
    """Standardize the columns by the training part, without those that do not vary there or that
    number the rows; returns `data`. Raises UserError where no column is left, or not the target."""
    counts = count_classes(data)
    starts = data.starts[data.splits["train"]]
    rows = np.unique(starts[:, None] + np.arange(data.seq_len))
    series = np.where(np.isfinite(data.series), data.series, np.nan)
    with warnings.catch_warnings(action="ignore"):  # the mean of an empty column, an overflow
        mean = np.nanmean(series[rows], axis=0)
        std = np.nanstd(series[rows], axis=0)
        has_equal_steps = np.ptp(np.diff(series, axis=0), axis=0) == 0
    is_input = [data.target not in (None, name) for name in data.columns]  # of a CSV file
    numbers_rows = has_equal_steps & is_input
    varies = np.isfinite(std) & (std > 1e-12 * np.abs(mean)) & ~numbers_rows
    columns = np.array(data.columns)
    if not varies.all():
        note(f"{data.name}: left out, constant, empty or too large in the training part, or the "
             f"row's number: {', '.join(columns[~varies])}")
    data.columns = columns[varies].tolist()
    if not data.columns or data.target not in [None, *data.columns]:
        raise UserError(f"{data.name}: no column, or not --target, is left")
    data.mean = mean[varies].tolist()
    data.std = std[varies].tolist()
    data.series = standardize(series[:, varies], data.mean, data.std)
    if data.target:  # rounded like the series, so that a value at a limit stays there
        i = data.columns.index(data.target)
        data.limits = standardize(data.limits, data.mean[i], data.std[i]).tolist()
    digest = hashlib.sha256(data.series.tobytes() + data.labels.tobytes())
    data.info |= {"sha256": digest.hexdigest(), "windows": counts, "classes": data.classes,
                  "columns": data.columns}
    return data


def standardize(series, mean, std):
    """The series in float32, scaled; NaN where a value is not finite or absurd."""
    scaled = (series - mean) / std
    return np.where(np.abs(scaled) < 1e6, scaled, np.nan).astype(np.float32)


def split_blocks(windows):
    """(train, val) numbers of windows that begin at consecutive rows.

    Every fifth block is for validation; the windows beside it that share rows with it are left out.
    """
    blocks = int(np.clip(windows // (4 * SEQ_LEN), 5, 25))
    in_val = np.arange(windows) * blocks // windows % 5 == 2
    near = np.convolve(in_val, np.ones(2 * SEQ_LEN + 1), "same") > 0.5
    return np.flatnonzero(~near), np.flatnonzero(in_val)


def choose_windows(windows, labels, share=0.2, seed=0, at_least=0):
    """(rest, chosen) of `windows`: a random `share` of each class is chosen, and at least one of a
    class that has two."""
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels[windows]):
        members = rng.permutation(windows[labels[windows] == label])
        count = max(at_least, round(share * len(members)), len(members) > 1)
        chosen.extend(members[:count])
    is_chosen = np.isin(windows, chosen)
    return windows[~is_chosen], windows[is_chosen]


def windows_dataset(name, columns, x, labels, classes, info, is_test=None):
    """The Dataset of windows x [windows, time, columns] that share no rows: 64, 16 and 20 % of each
    class for training, validation and test, or the test part `is_test` [windows]."""
    windows, seq_len, _ = x.shape
    rest, test = choose_windows(np.arange(windows), labels)
    if is_test is not None:
        rest = np.flatnonzero(~is_test)
        test = np.flatnonzero(is_test)
    train, val = choose_windows(rest, labels)
    series = x.reshape(windows * seq_len, -1)
    starts = seq_len * np.arange(windows)
    splits = {"train": train, "val": val, "test": test}
    return normalize_dataset(
        Dataset(name, columns, series, starts, labels, classes, splits, info, seq_len))


# --- Data: embedded generators ------------------------------------------------------------------


def embedded_dataset(name, columns, coupled, windows, seed):
    """Windows of three classes that no single column can tell apart.

    Every column has slow noise and one bump, which is upward in the first of the two `coupled`
    columns. In class 1 the second of them follows 6 steps later with a bump upward, in class 2
    downward; in class 0 its bump is either, at another time. Other pairs of columns are coupled
    likewise, whatever the class. 5 % of the values are NaN.
    """
    rng = np.random.default_rng(seed)
    names = list(columns)
    shape = (windows, len(names))
    labels = rng.integers(3, size=windows)
    centre = rng.uniform(10, SEQ_LEN - 16, shape)
    sign = rng.choice([-1, 1], shape)
    lead, follower = map(names.index, coupled)
    others = np.delete(np.arange(len(names)), [lead, follower])
    for first, second in [(lead, follower), *zip(others[::2], others[1::2])]:
        kind = labels if first == lead else rng.integers(3, size=windows)
        distance = rng.uniform(20, 50, windows)
        elsewhere = (centre[:, first] - 4 + distance) % (SEQ_LEN - 20) + 10
        following = centre[:, first] + 6
        centre[:, second] = np.where(kind > 0, following, elsewhere)
    sign[:, lead] = 1
    sign[labels == 1, follower] = 1
    sign[labels == 2, follower] = -1
    # x is [windows, columns, time].
    t = (np.arange(SEQ_LEN) - centre[..., None]) / 4
    height = sign * rng.uniform(1.6, 2.6, shape)
    x = height[..., None] * np.exp(-(t**2))
    x += np.cumsum(rng.normal(0, 0.06, x.shape), axis=-1)
    x += rng.normal(0, 0.5, (*shape, 1))
    x += rng.normal(0, 0.2, x.shape)
    level, scale = np.transpose(list(columns.values()))[:, :, None]
    x = level + scale * x
    x[rng.random(x.shape) < 0.05] = np.nan
    return windows_dataset(name, names, x.transpose(0, 2, 1), labels, ["apart", "along", "against"],
                           {"source": "embedded"})


def original_dataset(name, seed):
    """The original's synthetic data: each column is noise and a sine with 1, 2 or 3 periods.

    The number of periods is the class. 800 windows are for training and validation and 200 for the
    test; 5 % of the values are NaN, 3 % in user_metrics.
    """
    rng = np.random.default_rng(seed)
    names = list(EMBEDDED[name][0])
    labels = rng.integers(3, size=1000)
    t = np.linspace(0, 1, SEQ_LEN)
    periods = labels[:, None] + 1
    wave = np.sin(2 * np.pi * periods * t)
    x = rng.normal(size=(1000, SEQ_LEN, len(names)))
    x += wave[..., None]
    x[rng.random(x.shape) < (0.03 if name == "user_metrics" else 0.05)] = np.nan
    return windows_dataset(name, names, x, labels, ["1 period", "2 periods", "3 periods"],
                           {"source": "original's synthetic"}, np.arange(1000) >= 800)


def synthetic_schema(number, windows):
    """Data set `number` of a family with the same classes, 3 to 12 columns and their own names."""
    rng = np.random.default_rng([1, number])
    place, kind = divmod(number, 6)  # from the seventh on, names begin with a place
    prefix = f"{SITES[(place - 1) % 8]}{place}_" if place else ""
    coupled = [prefix + TEMPERATURES[kind], prefix + POWERS[kind]]
    names = [*coupled, *rng.permutation(OTHERS)[: rng.integers(1, 11)]]
    columns = {name: (rng.uniform(-5, 50), rng.uniform(0.5, 20))
               for name in rng.permutation(names).tolist()}
    return embedded_dataset(f"schema_{number + 1:02}", columns, coupled, windows, [2, number])


# --- Data: CSV, .ts and ETTh1 -------------------------------------------------------------------


def read_csv(path):
    """The numeric columns of a CSV file in order of time; the index has its dates, or the rows.

    Separators are commas, semicolons (then with decimal commas) or tabs; `1,504` is 1504.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", "replace")
    text = re.sub(CLUTTER, "", text).strip("\r\n")
    separator = max(",;\t", key=re.split("[\r\n]", text, maxsplit=1)[0].count)
    decimal = "."
    if separator == ";":
        decimal = ","
        text = re.sub(r"\.(?=\d{3}(\.\d{3})*,\d)", "", text)  # thousands, as in 1.504,5
    try:
        with warnings.catch_warnings(action="error"):  # a row is longer than the header
            frame = pd.read_csv(io.StringIO(text), sep=separator, decimal=decimal,
                                index_col=False, skipinitialspace=True, low_memory=False,
                                skip_blank_lines=False, na_values=MISSING)
    except (ValueError, Warning) as error:
        raise UserError(f"{path}: {error}") from None
    frame.index += 2  # row 1 is the header
    frame = frame.loc[: frame.last_valid_index()].rename_axis("row")
    numbers = {}
    dates = []
    clocks = []  # times of day
    for name, column in frame.items():
        values = pd.to_numeric(column, errors="coerce")
        texts = column[values.isna() & column.notna()].astype(str)  # cells that are no numbers
        if len(texts) and texts.str.fullmatch(THOUSANDS).all():
            values = pd.to_numeric(column.str.replace(",", ""))
            texts = texts[:0]
        is_text = len(texts) > column.count() / 2
        is_date = is_text and texts.str.match(DATE).mean() > 0.5
        if is_date or re.match("(?i)(date|datetime|timestamp)$", name):
            dates.append(column.astype(str))
        elif is_text and texts.str.match(CLOCK).mean() > 0.5:
            clocks.append(column.astype(str))
        elif is_text or re.match("(?i)time$|Unnamed: ", name):
            note(f"{path}: column {name!r} left out: not numeric, or the row's number or time")
        elif len(texts):
            raise UserError(f"{path}: column {name!r}: {texts.iloc[0]!r}, a number is needed")
        else:
            numbers[name] = values.astype(float)
            if numbers[name].nsmallest(2).max() == values.min() <= -99:
                note(f"{path}: the lowest value of {name!r} repeats; if it marks missing values, "
                     "empty these cells")
    numbers = pd.DataFrame(numbers, frame.index)
    if not dates:
        return numbers
    if clocks and not dates[0].str.contains(":").any():
        dates[0] += " " + clocks[0]
    return sort_rows(path, numbers, dates[0])


def sort_rows(path, numbers, dates):
    """The rows in order of their dates, with a note if they had another order or uneven steps.

    Dates have the month or the day first, or are numbers such as Unix time: whichever reads more of
    them or has fewer different steps between them.
    """
    numbers.index = pd.Index(dates, name="date")
    parse = functools.partial(pd.to_datetime, errors="coerce", utc=True)
    counts = pd.to_numeric(dates, errors="coerce")
    with warnings.catch_warnings(action="ignore"):  # that no format could be inferred
        readings = [parse(dates), parse(dates, dayfirst=True), parse(counts, unit="us")]
    times = min(readings, key=lambda times: (times.isna().sum(),
                                             times.sort_values().diff().nunique()))
    if times.isna().any():
        note(f"{path}: {dates[times.isna()].iloc[0]!r} is not a date; the rows keep their order")
        return numbers
    times = times.astype("int64")
    order = times.argsort(kind="stable")
    falls = (times.diff() < 0).sum()
    steps = times.iloc[order].diff()[1:]
    usual_step = steps[steps > 0].median()
    uneven = (~steps.between(0.5 * usual_step, 1.5 * usual_step)).sum()
    if falls or uneven:
        note(f"{path}: dates of column {dates.name!r} out of order: {falls:,}, repeated or after a "
             f"gap: {uneven:,}; the rows are sorted and taken as one series of equal steps")
    return numbers.iloc[order]


def csv_dataset(path, target, num_classes, protocol, name=None, missing=0.0):
    """Windows of 96 rows of a CSV file, classified by the value of `target` in the next row: by its
    quantiles or, if it has few distinct values, by these.

    The last 20 % of the windows are the test part. With the `original` protocol, the class limits
    are quantiles of the whole series; with `holdout`, of the rows before the test part, and no
    training window shares rows with it. Validation windows never do. A share `missing` of the
    values is removed once the classes are known.
    """
    numbers = read_csv(path)
    if target not in numbers or len(numbers) < MIN_ROWS:
        raise UserError(f"{path}: needs {MIN_ROWS} rows and a numeric --target {target}; it has "
                        f"{len(numbers)} rows of {', '.join(numbers)}; classes that are texts must "
                        "be numbered")
    values = numbers[target].to_numpy()
    starts = np.arange(len(values) - SEQ_LEN)
    first_test = int(0.8 * len(starts))
    before_test = first_test - SEQ_LEN
    train, val = split_blocks(first_test)
    known = values
    if protocol == "holdout":
        known = values[:first_test]
        train = train[train < before_test]
    distinct = np.unique(values[np.isfinite(values)])
    if len(distinct) <= max(10, num_classes):
        classes = [f"{value:.15g}" for value in distinct]
        limits = (distinct[1:] + distinct[:-1]) / 2
    else:
        percentiles = 100 * np.arange(1, num_classes) / num_classes
        limits = np.nanpercentile(known, percentiles.round(2))
        # Where many values are equal, limits coincide, or nothing is below the lowest of them.
        limits = np.unique(limits.clip(min=distinct[1]))
        classes = [f"quantile {k + 1}" for k in range(len(limits) + 1)]
    next_values = values[SEQ_LEN:]
    splits = {"train": train, "val": val[val < before_test], "test": starts[first_test:]}
    is_known = np.isfinite(next_values)
    splits = {split: windows[is_known[windows]] for split, windows in splits.items()}
    series = numbers.to_numpy(copy=True)
    series[np.random.default_rng(0).random(series.shape) < missing] = np.nan
    info = {"source": f"real, protocol {protocol}", "path": str(path), "class_limits": limits}
    labels = np.digitize(next_values, limits)
    return normalize_dataset(Dataset(name or path.stem, list(numbers), series, starts, labels,
                                     classes, splits, info, target=target, limits=limits))


def read_archive(files, seq_len=0):
    """(x [cases, time, dimensions], labels, is_test) of the cases in files of the archives; cases
    that are shorter than the longest, or than seq_len, begin with NaN.

    A .ts file has a header, and `?` for a missing value; a .tsv or .txt file has one case a line,
    the class first. Cases of a file without classes have `?` as labels.
    """
    cases = []
    labels = []
    is_test = []
    separator = r" *[\t,] *| +"
    for file in files:
        text = file.read_text("utf-8-sig", "backslashreplace")
        if re.search(r"(?im)^@targetlabel\s+true", text):
            raise UserError(f"{file}: @targetlabel true: a regression file, which has no classes")
        has_label = not re.search(r"(?im)^@classlabel\s+false", text)
        text = re.sub(r"\([^(),]*,([^(),]*)\)", r"\1", text)  # (time,value)
        for line in re.findall(r"(?m)^ *([^#%@\s].*?)\s*$", text):
            if file.suffix.lower() == ".ts":
                dimensions = line.split(":")
                label = dimensions.pop() if has_label else "?"
            else:
                label, *dimensions = re.split(separator, line, maxsplit=1)
            case = []
            try:
                for values in dimensions:
                    cells = re.split(separator, values.strip(" "))
                    case.append(np.array([float(cell.strip("?") or "nan") for cell in cells]))
            except ValueError as error:
                raise UserError(f"{file}: {error}") from None
            cases.append(case)
            labels.append(label.strip())
            is_test.append(file.stem.lower().endswith("_test"))
            seq_len = max([seq_len, *map(len, case)])
    if len(set(map(len, cases))) != 1 or not cases[0]:
        raise UserError(f"{file}: no cases of the archive, or not all with the same number of "
                        "dimensions; a table must be called .csv")
    x = np.full((len(cases), seq_len, len(cases[0])), np.nan)
    for i, case in enumerate(cases):
        for j, values in enumerate(case):
            x[i, seq_len - len(values) :, j] = values
    return x, labels, np.array(is_test)


def archive_dataset(name, files):
    """The data set of one archive file, or of NAME_TRAIN and NAME_TEST together."""
    x, texts, is_test = read_archive(files)
    classes, labels = np.unique(texts, return_inverse=True)
    if {"", "?"} & {*texts}:
        raise UserError(f"{name}: cases without a class")
    columns = [f"dim_{i}" for i in range(x.shape[2])]
    info = {"source": "archive", "path": [str(file) for file in files]}
    return windows_dataset(name, columns, x, labels, classes.tolist(), info,
                           is_test if len(files) > 1 else None)


def fetch_etth1(data_dir):
    """Path of ETTh1.csv in data_dir/ett, downloaded if it is absent. Raises UserError."""
    path = Path(data_dir) / "ett/ETTh1.csv"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with urllib.request.urlopen(ETTH1_URL, timeout=3) as response:
                content = response.read()
            with atomic_write(path) as file:
                file.write_bytes(content)
        except (OSError, HTTPException) as error:
            raise UserError(f"{ETTH1_URL}: {error}; put the file at {path}") from None
    if hashlib.sha256(path.read_bytes()).hexdigest() != ETTH1_SHA256:
        raise UserError(f"{path}: its checksum is wrong; delete it or put the right file there")
    return path


def group_files(paths):
    """{path without _TRAIN or _TEST: its files} of files and of folders of archive files."""
    groups = {}
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():  # the archive has the same data in several formats: take one
            by_suffix = [sorted(path.glob(f"*{suffix}")) for suffix in ARCHIVE_SUFFIXES]
            files = max(by_suffix, key=bool)
        if not files:
            raise UserError(f"{path}: no .ts, .tsv or .txt file in this folder; name CSV files")
        for file in files:
            group = Path(re.sub(r"(?i)_(train|test)(?=\.(ts|tsv|txt)$)", "", str(file)))
            groups.setdefault(group, []).append(file)
    return groups


def load_datasets(args):
    """The data sets [Dataset] that the arguments name, that of --transfer last; if they name none,
    the embedded ones and ETTh1, if that is available."""
    names = args.dataset or []
    if not (names or args.data or args.synthetic_schemas):
        names = [*EMBEDDED]
        try:
            if not args.quick:
                fetch_etth1(args.data_dir)
                names.append("etth1")
        except UserError as error:
            note(f"etth1 is left out: {error}")
    original = args.protocol == "original"
    datasets = []
    for number, name in enumerate(names):
        if name == "etth1":
            path = fetch_etth1(args.data_dir)
            missing = 0.05 if original else 0.0
            data = csv_dataset(path, "OT", 3, args.protocol or "original", name, missing)
        elif original:
            data = original_dataset(name, [4, number])
        else:
            data = embedded_dataset(name, *EMBEDDED[name], args.windows, [0, number])
        datasets.append(data)
    for path, files in group_files(args.data or []).items():
        if path.suffix.lower() in ARCHIVE_SUFFIXES:
            data = archive_dataset(path.stem, files)
        else:
            data = csv_dataset(path, args.target, args.num_classes, args.protocol or "holdout")
        datasets.append(data)
    datasets += [synthetic_schema(number, args.windows) for number in range(args.synthetic_schemas)]
    names = [data.name for data in datasets]
    if len(set(names)) < len(names):
        raise UserError(f"data sets must have different names: {names}")
    too_few = len(names) < 2 and not args.quick
    if args.transfer and (too_few or args.transfer not in ["last", *names]):
        raise UserError(f"--transfer needs two data sets, and the name of one of them: {names}")
    if args.head == "ordinal" and not all(data.has_quantiles for data in datasets):
        note("data sets whose classes are no quantiles have --head mean")
    return sorted(datasets, key=lambda data: data.name == args.transfer)


# --- Model: embeddings of column names ----------------------------------------------------------


class ColumnEmbedder(nn.Module):
    """A vector for each column name, then a Linear: forward(names) gives [names, target_dim].

    A strategy is a subclass with the fixed vector [dim] of a name in compute(name), with a mean
    square of about 1, and, for another length, its own `dim`; only the Linear is trained. One that
    learns its vectors overrides add() and embed() instead.
    """

    dim = 16

    def __init__(self, target_dim=1):
        super().__init__()
        self.vectors = {}
        self.projection = nn.Linear(self.dim, target_dim)

    def add(self, names):
        """Compute the vectors of the names that are new."""
        for name in names:
            if name not in self.vectors:
                self.vectors[name] = self.compute(name)

    def embed(self, names):
        """Vectors [names, dim]."""
        self.add(names)
        return torch.stack([self.vectors[name] for name in names]).to(self.projection.weight)

    def forward(self, names):
        return self.projection(self.embed(names))


class AutoExpandingEmbedder(ColumnEmbedder):
    """A learned vocabulary of column names; its table of 1,000 names doubles when it is full.

    Names beyond the table's size must be added before an optimizer is made, or its next step
    raises RuntimeError.
    """

    def __init__(self, target_dim=1):
        super().__init__(target_dim)
        self.rows = {}  # name: row of the table
        self.embedding = nn.Embedding(1000, 16)

    def add(self, names):
        for name in names:
            self.rows.setdefault(name, len(self.rows))
        weight = self.embedding.weight
        while len(self.rows) > len(weight):
            weight.data = torch.cat([weight.data, torch.randn_like(weight)])

    def embed(self, names):
        self.add(names)
        return self.embedding.weight[[self.rows[name] for name in names]]


class RandomNameEmbedder(ColumnEmbedder):
    """A fixed random vector for each name: identity without meaning, as a control."""

    def compute(self, name):
        seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
        return torch.randn(self.dim, generator=torch.Generator().manual_seed(seed))


class FrozenBERTColumnEmbedder(ColumnEmbedder):
    """Column names as read by a frozen BERT: the mean of its last hidden states, scaled to a mean
    square of 1.

    The encoder is loaded only for names that the cache lacks, and freed at once. The cache is one
    safetensors file for each encoder; delete it if the encoder's weights have changed. bert_model:
    a name on the Hugging Face hub, or a folder. Raises UserError where the encoder cannot be
    loaded.
    """

    def __init__(self, bert_model="bert-base-uncased", cache_dir="data/column_embeddings",
                 target_dim=1):
        from safetensors.torch import load_file

        file = re.sub(r"[^a-zA-Z0-9.-]+", "_", bert_model)
        path = Path(cache_dir) / f"{file}.safetensors"
        vectors = load_file(path) if path.exists() else {}
        dims = [len(vector) for vector in vectors.values()]
        self.dim = dims[0] if dims else load_encoder(bert_model)[1].config.hidden_size
        super().__init__(target_dim)
        self.vectors = vectors
        self.bert_model = bert_model
        self.cache_path = path

    @torch.no_grad()
    def add(self, names):
        """Compute the vectors of the names that are new, and cache them."""
        from safetensors.torch import save_file

        new = [name for name in dict.fromkeys(names) if name not in self.vectors]
        if not new:
            return
        tokenizer, encoder = load_encoder(self.bert_model)
        for name in new:
            tokens = tokenizer(name_to_words(name), return_tensors="pt", truncation=True)
            vector = encoder(**tokens).last_hidden_state[0].mean(0)
            self.vectors[name] = vector * self.dim**0.5 / vector.norm()
        self.cache_path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.cache_path) as path:
            save_file(self.vectors, path)

    def get_cache_stats(self):
        """{cached_embeddings, cache_size_mb, bert_model, bert_dim} of this encoder's cache file."""
        return {"cached_embeddings": len(self.vectors),
                "cache_size_mb": round(self.cache_path.stat().st_size / 1e6, 3),
                "bert_model": self.bert_model, "bert_dim": self.dim}


STRATEGIES = {
    "none": None,
    "auto_expanding": AutoExpandingEmbedder,
    "frozen_bert": FrozenBERTColumnEmbedder,
    "random_names": RandomNameEmbedder,
}


def load_encoder(name):
    """(tokenizer, model) of a BERT in a folder, in Hugging Face's cache, or on the hub."""
    import transformers

    local = True
    if not os.path.isdir(name):
        with contextlib.suppress(OSError):  # the hub is asked once, for at most 3 s
            socket.create_connection(("huggingface.co", 443), 3).close()
            local = False
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
        model = transformers.AutoModel.from_pretrained(name, local_files_only=local)
    except Exception as error:  # transformers raises errors of many types here
        reason = str(error).partition("\n")[0]
        raise UserError(f"--bert-model {name} cannot be loaded; give a folder ({reason})") from None
    return tokenizer, model.eval()


# --- Model: the networks ------------------------------------------------------------------------


def forward_fill(x):
    """x [batch, columns, time] with each NaN replaced by the value before it; leading NaNs stay."""
    steps = torch.arange(x.shape[-1], device=x.device)
    return x.gather(-1, steps.where(~x.isnan(), 0).cummax(-1).values)


def values_and_mask(x, fill="forward fill and mask"):
    """(values, mask) [batch, columns, time] of x with NaNs, for which `fill` puts the last value or
    a 0; where it has no mask, this is 1 everywhere."""
    values = forward_fill(x) if "forward fill" in fill else x
    mask = (~x.isnan()).to(x.dtype) if "mask" in fill else torch.ones_like(x)
    return values.nan_to_num(), mask


def cut_patches(x):
    """x [batch, channels, time] -> [batch, channels, patches, 16], every 8 steps, with zeros in
    front to make it fit."""
    lacking = PATCH_LEN - x.shape[-1]
    padding = max(lacking, lacking % STRIDE)
    return F.pad(x, (padding, 0)).unfold(-1, PATCH_LEN, STRIDE)


class MeanHead(nn.Linear):
    """Logits [batch, classes] from the mean of the patch tokens [batch, patches, d_model], as the
    original's; it does not need the windows x."""

    def forward(self, tokens, x):
        return super().forward(tokens.mean(1))


class OrdinalHead(nn.Module):
    """Logits [batch, classes]: log probabilities of intervals of one column's next value.

    This is the cumulative logit model of McCullagh (1980): it forecasts the value as the last one
    plus a learned step, with a learned spread, and lets the class limits cut that distribution;
    untrained, it is persistence. Both are in units of the column's usual change in the window, so
    that they fit calm and restless times (scaling by the window: Kim et al. 2022). Windows without
    any value of the column are classified as by a MeanHead.
    """

    def __init__(self, target, limits):
        super().__init__()
        self.linear = nn.Linear(D_MODEL, 2)
        self.target = target  # number of the column
        # The limits belong to the data set: no head gets those of another.
        self.register_buffer("limits", torch.tensor([-1e9, *limits, 1e9]), persistent=False)
        nn.init.zeros_(self.linear.weight)
        self.linear.bias.data = torch.tensor([0.0, -2.0])  # no step, a spread of 0.14 usual changes
        self.without_target = MeanHead(D_MODEL, len(limits) + 1)
        nn.init.zeros_(self.without_target.weight)

    def lacks_target(self, x):
        """Whether each of the windows x has no value of the column: [batch, 1]."""
        return x[:, self.target].isnan().all(1, keepdim=True)

    def forward(self, tokens, x):
        outputs = self.linear(tokens[:, -1]).float()
        step, log_spread = outputs.split(1, dim=1)
        values = forward_fill(x[:, self.target])
        change = values.diff().square().nanmean(1, keepdim=True).sqrt()
        change = change.nan_to_num(1.0).clamp(min=SMALLEST_CHANGE)
        forecast = values[:, -1:].nan_to_num() + change * step
        below = torch.sigmoid((self.limits - forecast) / (change * log_spread.exp()))
        logits = below.diff(dim=1).clamp(min=1e-6).log()
        return self.without_target(tokens, x).float().where(self.lacks_target(x), logits)


class MultiDatasetPatchDuET(nn.Module):
    """Logits [batch, classes] from windows x [batch, columns, time], scaled, with NaNs.

    Patches, two pre-norm transformer layers, and a head for each data set. As in the original, one
    Linear reads all columns of a patch, so their number c_in is fixed, and a strategy makes each
    column's name one number, a third channel beside value and mask: 571,459 parameters with 4
    columns and `none`.

    With `shared`, one set of weights serves any columns, and c_in is not used: the patch layer
    reads one column at a time and adds the embedding of its name, then 8 learned queries
    pool the columns of a patch by attention, and their results together are one token.
    """

    def __init__(self, c_in, seq_len=SEQ_LEN, strategy="none", shared=False, head="mean",
                 fill="forward fill and mask", dropout=0.0, **bert):
        super().__init__()
        self.settings = {"c_in": c_in, "seq_len": seq_len, "strategy": strategy, "shared": shared,
                         "head": head, "fill": fill, "dropout": dropout} | bert
        # What all strategies have comes first: with one seed they begin with the same weights.
        patches = cut_patches(torch.zeros(1, 1, seq_len)).shape[2]
        self.positions = nn.Parameter(0.02 * torch.randn(patches, D_MODEL))
        layer = nn.TransformerEncoderLayer(D_MODEL, 8, 2048, 0.0, batch_first=True, norm_first=True)
        # Dropout on what each half of a layer adds; on its 2048 hidden units it would take a third
        # of the time.
        layer.dropout1.p = layer.dropout2.p = dropout
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        channels = 2 if shared else c_in * (2 if strategy == "none" else 3)
        self.patch_layer = nn.Linear(channels * PATCH_LEN, D_MODEL)
        if shared:
            self.queries = nn.Linear(D_MODEL, 8)
            self.join = nn.Linear(8 * D_MODEL, D_MODEL)
        self.embedder = None
        if strategy != "none":
            self.embedder = STRATEGIES[strategy](target_dim=D_MODEL if shared else 1, **bert)
        self.heads = nn.ModuleList()
        self.head_of = {}  # {data set: its head}
        self.columns = {}  # {data set: names}
        self.datasets = {}  # {data set: what describe() says}

    @classmethod
    def create_for_dataset(cls, c_in, seq_len=SEQ_LEN, num_classes=3, column_names=None,
                           strategy="none", **options):
        """The original's constructor; `options` are those of the class."""
        model = cls(c_in, seq_len, strategy, **options)
        names = column_names or [f"column_{i + 1}" for i in range(c_in)]
        model.set_dataset_columns(names, head=MeanHead(D_MODEL, num_classes))
        return model

    def set_dataset_columns(self, names, dataset="default", head=None):
        """Serve `dataset` with columns `names` and, if it is new, with the module `head`.

        Raises ValueError where the number of columns does not fit.
        """
        c_in = self.settings["c_in"]
        if not self.settings["shared"] and len(names) != c_in:
            raise ValueError(f"{len(names)} columns for a model of {c_in}, whose patch layer "
                             "has a fixed size; create_for_dataset(..., shared=True) takes any")
        if self.embedder:
            self.embedder.add(names)
        self.columns[dataset] = names
        if head:
            self.head_of[dataset] = head.to(self.positions.device)
            self.heads.append(head)

    def add_dataset(self, data):
        """Serve a Dataset, with a new head."""
        self.datasets[data.name] = describe(data)
        head = MeanHead(D_MODEL, len(data.classes))
        if data.has_quantiles and self.settings["head"] == "ordinal":
            head = OrdinalHead(data.columns.index(data.target), data.limits)
        self.set_dataset_columns(data.columns, data.name, head)

    def forward(self, x, dataset="default"):
        values, mask = values_and_mask(x, self.settings["fill"])
        head = self.head_of[dataset]
        if isinstance(head, OrdinalHead):  # a step is forecast whatever the level
            values = values - values[..., -1:].where(~head.lacks_target(x)[..., None], 0)
        names = self.embedder(self.columns[dataset]) if self.embedder else None
        if self.settings["shared"]:  # one column at a time
            patches = torch.cat([cut_patches(values), cut_patches(mask)], dim=-1)
            tokens = self.patch_layer(patches.transpose(1, 2))  # [batch, patches, columns, d_model]
            if names is not None:
                tokens = tokens + names.to(tokens)
            weights = self.queries(tokens).softmax(dim=2).to(tokens)
            pooled = weights.transpose(2, 3) @ tokens  # [batch, patches, queries, d_model]
            tokens = self.join(pooled.flatten(2))
        else:
            channels = [values, mask]
            if names is not None:
                channels.append(names.expand(mask.shape))
            patches = cut_patches(torch.cat(channels, dim=1))  # [batch, channels, patches, 16]
            tokens = self.patch_layer(patches.transpose(1, 2).flatten(2))
        tokens = self.encoder(tokens + self.positions[-tokens.shape[1] :])
        return head(tokens, x)


class ConvNet(nn.Module):
    """Logits [batch, classes] from windows x [batch, columns, time] by three convolutions (Wang et
    al. 2017, arXiv:1611.06455), for data sets of too few windows for a transformer.

    It reads values, mask, and the values normalized within each window.
    """

    def __init__(self, c_in, num_classes):
        super().__init__()
        self.settings = {"c_in": c_in, "num_classes": num_classes}
        self.datasets = {}
        sizes = [3 * c_in, 128, 128, 64]
        layers = []
        for channels, outputs, kernel in zip(sizes, sizes[1:], (9, 5, 3)):
            convolution = nn.Conv1d(channels, outputs, kernel, padding="same", bias=False)
            layers += [convolution, nn.BatchNorm1d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(64, num_classes)

    def add_dataset(self, data):
        self.datasets[data.name] = describe(data)

    def forward(self, x, dataset="default"):
        values, mask = values_and_mask(x)
        channels = torch.cat([values, mask, normalize_windows(values, mask)], dim=1)
        return self.linear(self.layers(channels).mean(-1))


def normalize_windows(values, mask):
    """Each column of each window minus its mean over what is present, divided by its standard
    deviation; 0 where missing."""
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    mean = (values * mask).sum(-1, keepdim=True) / count
    centered = (values - mean) * mask
    std = (centered.square().sum(-1, keepdim=True) / count).sqrt()
    return centered / (std + 1e-2)


# --- Training -----------------------------------------------------------------------------------


def gather_windows(series, starts, seq_len):
    """Windows [batch, columns, seq_len] of series [rows, columns] from rows `starts` [batch] on."""
    return series.unfold(0, seq_len, 1)[starts]


def window_batches(data, windows, size, device="cpu"):
    """The windows x [batch, columns, time] with these numbers, `size` at a time."""
    series = torch.from_numpy(data.series).to(device)
    for starts in torch.from_numpy(data.starts[windows]).to(device).split(size):
        yield gather_windows(series, starts, data.seq_len)


def drop_values(x, share, missing="at random"):
    """x [batch, columns, time] with a share of its values NaN: at random, in one block of each
    series, or in whole columns, of which one stays.

    `share` is a number or a tensor [batch, 1, 1].
    """
    batch, columns, seq_len = x.shape
    if missing == "at random":
        return x.masked_fill(torch.rand_like(x) < share, math.nan)
    place = torch.rand(batch, columns, 1, device=x.device)
    if missing == "whole columns":
        chance = torch.rand(batch, 1, 1, device=x.device)  # rounds up or down, right on average
        count = (share * columns + chance).floor().clamp(max=columns - 1)
        return x.masked_fill(place.argsort(1).argsort(1) < count, math.nan)
    length = share * seq_len
    first = (place * (seq_len - length)).round()
    after = torch.arange(seq_len, device=x.device) - first
    return x.masked_fill((after >= 0) & (after < length), math.nan)


def autocast(device):
    """bfloat16 on a GPU that has it; on a CPU, float32 is faster for models of this size."""
    enabled = device.type == "cuda" and has_bfloat16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def warm_up_then_cosine(step, steps):
    """Factor of the learning rate: linear over the first 5 %, then half a cosine to zero."""
    warm_up = max(1, steps // 20)
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return min((step + 1) / warm_up, cosine)


def choose_batch_size(windows, largest):
    """An eighth of the windows, so that an epoch has several steps, but 16 to `largest`."""
    return min(max(16, windows // 8), windows, largest)


def usual_steps(data, args):
    """STEPS, or those of 8 epochs if these are fewer and the windows overlap, since then they are
    nearly alike (Zhou et al. 2021 train as long)."""
    if not data.target:
        return STEPS
    windows = len(data.splits["train"])
    return min(STEPS, 8 * windows // choose_batch_size(windows, args.batch_size))


def draw_batches(datasets, steps, batch_size, device):
    """`steps` batches of each data set in random order: [(number of the data set, windows)]."""
    batches = []
    for number, data in enumerate(datasets):
        train = torch.from_numpy(data.splits["train"])
        size = choose_batch_size(len(train), batch_size)
        epochs = math.ceil(steps * size / len(train))
        order = torch.cat([torch.randperm(len(train)) for _ in range(epochs)])
        parts = train[order].to(device).split(size)
        batches += [(number, windows) for windows in parts[:steps]]
    return [batches[i] for i in torch.randperm(len(batches))]


def validate(model, datasets):
    """Mean accuracy on the validation parts."""
    return float(np.mean([accuracy(predict(model, data, "val"), data, "val") for data in datasets]))


def load_state(file, model, optimizer, datasets):
    """The state of a training, which is new or in `file`; if that is unfinished, its weights and
    the optimizer's moments are loaded."""
    hashes = [data.info["sha256"] for data in datasets]
    if file.exists():
        state = load_checkpoint(file, file)
        if state["hashes"] != hashes or "best_accuracy" not in state:
            raise UserError(f"{file}: the run began with other data, or with an older version of this "
                            "script; start a new run")
        if "training" in state:  # it is not finished
            weights, moments = state.pop("training")
            model.load_state_dict(weights)
            optimizer.load_state_dict(moments)
        return state
    best_accuracy = -1.0
    if model.settings.get("head") == "ordinal" and all(data.has_quantiles for data in datasets):
        best_accuracy = validate(model, datasets)  # untrained, it is persistence
    return {"hashes": hashes, "history": [], "class": type(model).__name__,
            "settings": model.settings, "datasets": model.datasets,
            "best": copy.deepcopy(model.state_dict()), "best_accuracy": best_accuracy}


def fit(model, datasets, args, seed, file, keep="best", drop=False, **changes):
    """Train a model for --steps on each data set, or go on with the checkpoint in `file`; returns the
    history, a list with a dictionary for each evaluation.

    The model ends with the weights of the best mean validation accuracy over the data sets, which
    for an ordinal head may be those that it began with; with keep="last", with its last weights.
    With `drop`, up to half of the values are left out in training; `changes` replace arguments. All
    that is random follows from the seed and the number of the evaluation, so that a resumed
    training ends with the same weights bit for bit.
    """
    args = argparse.Namespace(**vars(args) | changes)
    steps = args.steps or max(usual_steps(data, args) for data in datasets)
    device = args.device
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    state = load_state(file, model, optimizer, datasets)
    tensors = []
    for data in datasets:
        arrays = (data.series, data.starts, data.labels)
        tensors.append([torch.from_numpy(array).to(device) for array in arrays])
    evaluations = min(args.evaluations, steps)
    for number in range(len(state["history"]), evaluations):
        start_time = time.perf_counter()
        torch.manual_seed(1000 * seed + number)
        model.train()
        first = steps * number // evaluations
        end = steps * (number + 1) // evaluations
        batches = draw_batches(datasets, end - first, args.batch_size, device)
        losses = []
        for index, windows in progress(batches, file.stem):
            step = first * len(datasets) + len(losses)
            rate = args.learning_rate * warm_up_then_cosine(step, steps * len(datasets))
            optimizer.param_groups[0]["lr"] = rate
            series, starts, labels = tensors[index]
            x = gather_windows(series, starts[windows], datasets[index].seq_len)
            if drop:
                share = 0.5 * torch.rand(len(x), 1, 1, device=device)
                x = drop_values(x, share, MISSING_KINDS[len(losses) % 3])
            with autocast(device):
                logits = model(x, datasets[index].name)
            loss = F.cross_entropy(logits.float(), labels[windows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
        train_loss = torch.stack(losses).mean().item()
        if not math.isfinite(train_loss):
            raise UserError(f"{file.stem}: the loss is not finite; lower --learning-rate")
        train_seconds = time.perf_counter() - start_time
        val_accuracy = validate(model, datasets)
        state["history"].append({"train_loss": train_loss, "val_accuracy": val_accuracy,
                                 "train_seconds": train_seconds})
        if keep == "last" or val_accuracy > state["best_accuracy"]:
            state["best"] = copy.deepcopy(model.state_dict())
            state["best_accuracy"] = val_accuracy
        training = {"training": (model.state_dict(), optimizer.state_dict())}
        with atomic_write(file) as path:
            torch.save(state | training if number + 1 < evaluations else state, path)
    log(f"{file.stem} is trained")
    model.load_state_dict(state["best"])
    return state["history"]


@torch.inference_mode()
def predict(model, data, split, corrupt=None):
    """Probabilities [windows, classes] of a split; `corrupt`, if given, is what
    drop_values() needs: a share of the values and how they are missing."""
    model.eval()
    device = next(model.parameters()).device
    outputs = []
    for x in window_batches(data, data.splits[split], max(16, 100_000 // data.seq_len), device):
        with autocast(device):
            logits = model(drop_values(x, *corrupt) if corrupt else x, data.name)
        outputs.append(logits.float().softmax(1))
    return torch.cat(outputs).cpu().numpy()


def accuracy(outputs, data, split):
    """Share of a split's windows that `outputs`, classes [windows] or their probabilities [windows,
    classes], have right."""
    predicted = outputs if outputs.ndim == 1 else outputs.argmax(1)
    return np.mean(predicted == data.labels[data.splits[split]])


# --- Evaluation: baselines ----------------------------------------------------------------------


def window_features(data, split):
    """Features [windows, 7 * columns] for baselines: last value, mean, standard deviation, minimum,
    maximum, slope and share missing of each column."""
    features = []
    t = torch.linspace(-1, 1, data.seq_len)
    for x in window_batches(data, data.splits[split], 4096):
        last = forward_fill(x)[..., -1].nan_to_num()
        share_missing = x.isnan().float().mean(-1)
        mean = x.nanmean(-1).nan_to_num()
        x = torch.where(x.isnan(), mean[..., None], x)
        std = x.std(-1, correction=0)
        slope = x @ t / (t @ t)
        features.append(torch.cat([last, mean, std, x.amin(-1), x.amax(-1), slope, share_missing],
                                  dim=1))
    return torch.cat(features).numpy()


def hydra_features(x, groups=64, kernels=8):
    """Features [batch, features] of x [batch, columns, time] without NaN for a ridge classifier:
    Hydra (Dempster et al. 2023, arXiv:2203.13652).

    Every dilation has `groups` groups of random kernels, half of them on the differences between
    steps; of several columns, a group reads the sum of a random few. At each step the kernels of a
    group compete: the one with the largest output gets that output, the one with the smallest is
    counted.
    """
    generator = torch.Generator().manual_seed(0)  # the same kernels for every batch
    features = []
    _, columns, seq_len = x.shape
    differences = x.diff(dim=-1) if seq_len > 1 else x
    count = max(1, min(8, columns // 2))
    exponents = 1 + int(math.log2(max(1, (seq_len - 1) / 8)))
    for exponent, source in itertools.product(range(exponents), (x, differences)):
        weights = torch.randn(groups // 2, kernels, 9, generator=generator)
        weights -= weights.mean(-1, keepdim=True)
        weights /= weights.abs().sum(-1, keepdim=True)
        chosen = [torch.randperm(columns, generator=generator)[:count] for _ in weights]
        mixed = source[:, torch.stack(chosen)].sum(2)  # [batch, groups, time]
        dilation = 2**exponent
        filters = weights.flatten(0, 1)[:, None]
        output = F.conv1d(mixed, filters, padding=4 * dilation, dilation=dilation,
                          groups=len(weights))
        output = output.unflatten(1, weights.shape[:2])
        largest, winner = output.max(2)  # [batch, groups, time]
        empty = torch.zeros(output.shape[:3])
        loser = output.min(2).indices  # argmin(2) is five times slower
        features += [empty.scatter_add(2, winner, largest),
                     empty.scatter_add(2, loser, torch.ones_like(largest))]
    return torch.stack(features, dim=1).flatten(1)


def fit_hydra(data):
    """Probabilities [windows, classes] for the test part by Hydra's features, scaled as its authors
    do, and a ridge classifier, fitted to at most 4,000 training windows."""
    from sklearn.linear_model import RidgeCV

    def read(windows):
        for x in window_batches(data, windows, 64):
            yield hydra_features(forward_fill(x).nan_to_num()).clamp(min=0).sqrt()

    def scale(features):
        return ((features - mean) * (features != 0) / std).numpy()

    train = data.splits["train"]
    train = train[:: math.ceil(len(train) / 4000)]
    features = torch.cat(list(read(train)))
    mean = features.mean(0)
    # A rare count has hardly any spread: the more zeros, the more is added to it.
    share_zero = (features == 0).float().mean(0)
    std = features.std(0) + share_zero**4 + 1e-8
    targets = 2 * np.eye(len(data.classes))[data.labels[train]] - 1  # 1 for the class, -1 elsewhere
    ridge = RidgeCV(np.logspace(-3, 3, 10)).fit(scale(features), targets)
    outputs = [ridge.predict(scale(features)) for features in read(data.splits["test"])]
    return torch.from_numpy(2 * np.concatenate(outputs)).softmax(1).numpy()


def with_validation(data):
    """The data set with its validation windows in the training part."""
    train = np.union1d(data.splits["train"], data.splits["val"])
    return replace(data, splits=data.splits | {"train": train})


def fit_baselines(data):
    """{name: classes [windows] of the test part, or their probabilities}: persistence, where a
    column's next value is classified, the majority class, logistic regression and boosting on
    window features, and Hydra.

    They choose nothing on the validation part, so they are fitted to it as well.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = with_validation(data)
    x_train = window_features(data, "train")
    x_test = window_features(data, "test")
    y_train = data.labels[data.splits["train"]]
    leaf = int(np.clip(len(y_train) // 20, 1, 20))  # with 20, no tree can split 30 windows
    models = {
        "majority class": DummyClassifier(),
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
        "gradient boosting": HistGradientBoostingClassifier(
            early_stopping=False, min_samples_leaf=leaf, random_state=0)}
    outputs = {}
    if data.target:
        last_value = x_test[:, data.columns.index(data.target)]  # of the first features
        outputs["persistence"] = np.digitize(last_value, data.limits)
    for name, model in models.items():
        outputs[name] = model.fit(x_train, y_train).predict(x_test)
    return outputs | {"hydra": fit_hydra(data)}


# --- Evaluation: records, tables and pictures ---------------------------------------------------


def make_records(data, outputs, seed, **columns):
    """Rows of the results: the accuracy on the test part of {model: its outputs}."""
    record = dict.fromkeys(KEYS) | {
        "dataset": data.name, "seed": seed, "quantity": "accuracy %",
        "chance": 1 / len(data.classes), "parameters": None} | columns
    return [record | {"model": model, "accuracy": accuracy(predicted, data, "test")}
            for model, predicted in outputs.items()]


def evaluate(model, data, strategy, training, seed, corrupt=None, **columns):
    """The record of a trained model on the test part of a data set, in a list."""
    name = strategy if training == "own" else f"{strategy}, {training}"
    count = sum(parameter.numel() for parameter in model.parameters())
    return make_records(data, {name: predict(model, data, "test", corrupt)}, seed,
                        strategy=strategy, training=training, parameters=f"{count:,}", **columns)


def difference(records, column, base):
    """Records of the accuracy minus that of the record whose `column` is `base`, all else equal."""
    is_base = records[column] == base
    keys = [name for name in KEYS if name != column]
    pairs = records[~is_base].merge(records[is_base], on=keys, suffixes=("", "_base"))
    pairs["accuracy"] -= pairs["accuracy_base"]
    return pairs.assign(quantity=f"minus {base}")


def write_cell(accuracies, sign=""):
    """Mean [%] over the seeds and its interval; * marks a difference whose interval excludes 0."""
    mean, width = mean_and_interval(100 * accuracies)
    text = f"{mean:{sign}.2f}"
    if np.isfinite(width):
        text += f" ± {width:.2f}"
    if sign and abs(mean) > width:
        text += " *"
    return text


def make_table(records, rows, column):
    """A table of texts: the accuracies and their differences from `none`, `own` and `scratch`, with
    a row for each value of the columns `rows` and a column for each of `column`."""
    tables = [records.pivot_table("accuracy", rows, column, write_cell, sort=False)]
    for name, base in (("strategy", "none"), ("training", "own"), ("training", "scratch")):
        pairs = difference(records, name, base)
        if len(pairs):
            write_signed = functools.partial(write_cell, sign="+")
            tables.append(pairs.pivot_table("accuracy", rows, column, write_signed, sort=False))
    return pd.concat(tables, axis=1 if column == "quantity" else 0)


def plot_benchmark(records, path):
    """Accuracy of every model on each data set, with its interval where there are several seeds."""
    names = records["dataset"].unique()
    groups = records.groupby(["dataset", "model"], sort=False)["accuracy"]
    means = 100 * groups.mean().unstack(sort=False)
    widths = 100 * groups.agg(lambda runs: mean_and_interval(runs)[1]).unstack(sort=False)
    fig, (ax,) = new_figure("Test accuracy, with the 95 % interval where there are several seeds",
                            size=(11, 2 + 1.4 * len(names)))
    plot_dots(ax, names, means.to_dict("list"), errors=widths.to_dict("list"))
    chance = 100 * records.groupby("dataset", sort=False)["chance"].first()
    rows = np.arange(len(names))
    ax.vlines(chance, rows - 0.4, rows + 0.4, "0.4", "--", label="chance")
    ax.set(xlabel="accuracy [%]", xlim=(0, 101))
    legend_below(ax, 5)
    save_figure(fig, path)


def plot_shares(records, title, xlabel, panel, path):
    """Accuracy over the column `share`, with its interval where there are several seeds: a panel
    for each value of the columns `panel`, a line for each model."""
    shares = records["share"].unique()
    panels = records.groupby(panel, sort=False)
    rows = math.ceil(len(panels) / 3)
    fig, axes = new_figure(f"{title}, with the 95 % interval where there are several seeds", rows,
                           min(3, len(panels)), (11, 2 + 4 * rows))
    for ax, (name, part) in zip(axes, panels):
        for i, (model, runs) in enumerate(part.groupby("model", sort=False)):
            table = runs.pivot_table("accuracy", "seed", "share").reindex(columns=shares)
            plot_curve(ax, shares, 100 * table, model, i, MARKERS[i % 7])
        ax.axhline(100 * part["chance"].iloc[0], linestyle=":", color="black", label="chance")
        ax.set(title=", ".join(name), xlabel=xlabel, ylabel="test accuracy [%]", ylim=(0, 102))
    legend_below(axes[0], 4)
    save_figure(fig, path)


# --- The experiment -----------------------------------------------------------------------------


def make_model(args, datasets, strategy, shared, seed, **options):
    """An untrained model for the data sets, on the device."""
    seed_everything(seed)
    options = {"seq_len": max(data.seq_len for data in datasets), "head": args.head} | options
    if strategy == "frozen_bert":
        options |= bert_options(args)
    model = MultiDatasetPatchDuET(len(datasets[0].columns), strategy=strategy, shared=shared,
                                  dropout=0.1, **options)
    for data in datasets:
        model.add_dataset(data)
    return model.to(args.device)


def model_file(run_dir, *names):
    """The path of a checkpoint."""
    return run_dir / "models" / ("-".join(map(str, names)) + ".pt")


def bert_options(args):
    """The arguments that FrozenBERTColumnEmbedder needs."""
    return {"bert_model": args.bert_model, "cache_dir": f"{args.data_dir}/column_embeddings"}


def train_convolutions(args, data, seed, run_dir):
    """Probabilities [windows, classes] for the test part: the mean of three ConvNets, which train
    on training and validation windows, for twice the steps, and choose nothing."""
    whole = with_validation(data)
    outputs = 0
    for member in range(3):
        member_seed = seed + 1000 * member
        seed_everything(member_seed)
        model = ConvNet(len(data.columns), len(data.classes)).to(args.device)
        model.add_dataset(data)
        fit(model, [whole], args, member_seed,
            model_file(run_dir, data.name, "conv", seed, member), keep="last",
            steps=2 * (args.steps or STEPS), batch_size=min(args.batch_size, 32))
        outputs += predict(model, data, "test") / 3
    return outputs


def benchmark(args, datasets, strategies, seeds, run_dir):
    """Test accuracy of baselines, of convolutions (conv, on files of the archives; conv + hydra is
    the mean of both) and of each strategy: a model for each data set (own) or for all (shared).

    The original's figures, shown with --protocol original, are single runs, scored at their last or
    best epoch.
    """
    records = []
    for data in progress(datasets, "baselines"):
        baselines = fit_baselines(data)
        records += make_records(data, baselines, args.seed)
        for seed in seeds if data.info["source"] == "archive" else ():
            conv = train_convolutions(args, data, seed, run_dir)
            records += make_records(
                data, {"conv": conv, "conv + hydra": conv + baselines["hydra"]}, seed)
    groups = [(data.name, [data], "own") for data in datasets if args.shared != "only"]
    if args.shared:
        groups.append(("shared", datasets, "shared"))
    for seed, (name, group, training), strategy in itertools.product(seeds, groups, strategies):
        model = make_model(args, group, strategy, training == "shared", seed)
        fit(model, group, args, seed, model_file(run_dir, name, strategy, seed))
        for data in group:
            records += evaluate(model, data, strategy, training, seed)
    records = pd.DataFrame(records)
    shown = add_means(records)
    plot_benchmark(shown, run_dir / "benchmark.png")
    table = make_table(shown, ["dataset", "model"], "quantity")
    table["parameters"] = records.groupby(["dataset", "model"])["parameters"].first()
    if args.protocol == "original":
        table["original %"] = pd.DataFrame(ORIGINAL_TABLE).unstack()
    return records, table


def add_means(records):
    """The records and, of each model that all data sets have, the mean over these; of more than
    six data sets, the means alone."""
    count = records["dataset"].nunique()
    if count == 1:
        return records
    groups = records.groupby(["model", "strategy", "training", "seed", "quantity"], sort=False,
                             dropna=False)[["accuracy", "chance"]]
    means = groups.mean()[groups.size() == count].reset_index().assign(dataset="mean of all")
    shown = pd.concat([records, means])
    return shown[shown["dataset"] == "mean of all"] if count > 6 else shown


def with_labels(data, share, seed):
    """The data set with a share of its training and validation labels, at least one a class."""
    chosen = {split: choose_windows(data.splits[split], data.labels, share, seed, at_least=1)[1]
              for split in ("train", "val")}
    return replace(data, splits=data.splits | chosen)


def add_new_dataset(model, data, alike):
    """A copy of a shared model with a new data set, whose head begins as the mean of those of the
    data sets `alike` [names], if there are some."""
    model = copy.deepcopy(model)
    model.add_dataset(data)
    heads = [model.head_of[name].state_dict() for name in alike]
    if heads:
        for name, value in model.head_of[data.name].state_dict().items():
            value.copy_(torch.stack([head[name] for head in heads]).mean(0))
    return model


def transfer(args, datasets, strategies, seeds, run_dir):
    """Test accuracy on the last data set by the share of its labels that is known: of a shared
    model that is pretrained on the other data sets or begins from scratch, and of baselines.

    With few labels both train for a quarter of the steps, at least 40. Other data sets with the
    same classes let a pretrained model classify the last one without any label.
    """
    *sources, data = datasets
    alike = [source.name for source in sources if source.classes == data.classes]
    steps = args.steps or STEPS
    few_steps = min(steps, max(40, steps // 4))
    records = []
    for seed, strategy in itertools.product(seeds, strategies):
        base = make_model(args, sources, strategy, True, seed,
                          seq_len=max(data.seq_len for data in datasets))
        fit(base, sources, args, seed, model_file(run_dir, "sources", strategy, seed))
        for share, training in itertools.product(LABEL_SHARES, ("pretrained", "scratch")):
            seed_everything(seed)
            if training == "pretrained":
                model = add_new_dataset(base, data, alike)
            else:
                model = make_model(args, [data], strategy, True, seed)
            if share:
                file = model_file(run_dir, data.name, strategy, training, f"{share:g}", seed)
                fit(model, [with_labels(data, share, seed)], args, seed, file,
                    steps=steps if share == 1 else few_steps)
            elif training == "scratch" or not alike:
                continue
            records += evaluate(model, data, strategy, training, seed, share=f"{share:.0%}")
    for seed, share in itertools.product(seeds, LABEL_SHARES[1:]):
        baselines = fit_baselines(with_labels(data, share, seed))
        records += make_records(
            data, {name: baselines[name] for name in ("gradient boosting", "hydra")}, seed,
            share=f"{share:.0%}")
    records = pd.DataFrame(records)
    plot_shares(records, "A shared model on a new data set",
                "share of its labels that is known", ["dataset"], run_dir / "transfer.png")
    return records, make_table(records, ["quantity", "model"], "share")


def nan_robustness(args, datasets, strategies, seeds, run_dir):
    """Test accuracy by the share of values that are left out in addition to those that the data
    lack: of plain forward and zero fill, and of models that train with gaps.

    The latter train with up to half of the values left out, at random, in blocks or as whole
    columns in turn. One column always stays, so that a single one is never left out as a whole.
    """
    strategies = strategies if args.strategies else ["none"]
    records = []
    for data, seed, strategy, row in itertools.product(datasets, seeds, strategies, FILLS):
        fill, drop = FILLS[row]
        model = make_model(args, [data], strategy, False, seed, fill=fill)
        file = model_file(run_dir, data.name, strategy, row, seed)
        fit(model, [data], args, seed, file, drop=drop)
        for missing, share in itertools.product(MISSING_KINDS, MISSING_SHARES):
            torch.manual_seed(seed)  # the same values are missing for every model
            records += evaluate(model, data, strategy, row, seed, (share, missing),
                                missing=missing, share=f"{share:.0%}")
    records = pd.DataFrame(records)
    plot_shares(records, "Test windows with missing values", "share of values left out",
                ["dataset", "missing"], run_dir / "nan_robustness.png")
    return records, make_table(records, ["dataset", "quantity", "missing", "model"], "share")


def find_strategies(args, datasets):
    """The strategies to run; frozen_bert is left out if its encoder cannot be loaded."""
    strategies = list(dict.fromkeys(args.strategies or STRATEGIES))  # each is run once
    needs_no_names = args.nan_robustness and not args.transfer
    if not args.strategies and (args.quick or needs_no_names):
        strategies.remove("frozen_bert")
    try:
        if "frozen_bert" in strategies:
            names = [name for data in datasets for name in data.columns]
            FrozenBERTColumnEmbedder(**bert_options(args)).add(names)
    except (UserError, ModuleNotFoundError) as error:
        if len(strategies) == 1:
            raise
        note(f"frozen_bert is not run: {error}")
        strategies.remove("frozen_bert")
    return strategies


def choose_threads():
    """2, or 1 on a busy machine, where two threads wait for each other and can be ten times slower
    than one; more than 2 hardly help such small models."""
    x = torch.randn(512, 512)
    seconds = {}
    for threads in (2, 2, 1):  # the first time warms up
        torch.set_num_threads(threads)
        seconds[threads] = timeit.timeit(lambda: x @ x, number=40)
    return 2 if seconds[2] < 0.9 * seconds[1] else 1


def run_experiment(args):
    """Load the data sets, run the experiments that the arguments name, and write the results."""
    args = argparse.Namespace(**vars(args) | {"threads": args.threads or choose_threads()})
    torch.set_num_threads(args.threads)
    datasets = load_datasets(args)
    gigabytes = args.batch_size * max(data.seq_len for data in datasets) / 2e5
    if gigabytes > 4:
        note(f"batches of such long windows need about {gigabytes:.0f} GB in training; lower "
             "--batch-size")
    strategies = find_strategies(args, datasets)
    seeds = range(args.seed, args.seed + args.runs)
    experiments = [nan_robustness] if args.nan_robustness else []
    if args.transfer and len(datasets) > 1:
        experiments.append(transfer)
    if args.quick or not experiments:
        experiments.append(benchmark)
    run_dir = next_run_dir(args)
    (run_dir / "models").mkdir(exist_ok=True)
    results = {"data": {data.name: data.info for data in datasets}}
    parts = [f"{data.name}: {data.info['source']}, {len(data.labels):,} windows"
             for data in datasets]
    for experiment in experiments:
        name = experiment.__name__
        start_time = time.perf_counter()
        records, table = experiment(args, datasets, strategies, seeds, run_dir)
        table = table.reset_index().to_dict("records")
        results[name] = {"records": records.to_dict("records"), "table": table,
                         "seconds": time.perf_counter() - start_time}
        parts += [f"## {name}", inspect.getdoc(experiment), markdown_table(table)]
    if args.runs > 1:
        parts.append(INTERVALS)
    return write_results(results, "\n\n".join(parts) + "\n", args, run_dir)


def run(args):
    """Do what the arguments ask for."""
    if args.prewarm:
        return prewarm_cache(args)
    if args.predict:
        return predict_file(args)
    if args.columns:
        return compare_columns(args)
    return run_experiment(args)


# --- Extra: classify the windows of a file ------------------------------------------------------


def restore_model(path, device):
    """The trained model in a checkpoint; its `datasets` say how to read files for it."""
    checkpoint = load_checkpoint(path, path)
    classes = {"MultiDatasetPatchDuET": MultiDatasetPatchDuET, "ConvNet": ConvNet}
    try:
        model = classes[checkpoint["class"]](**checkpoint["settings"])
        for description in checkpoint["datasets"].values():
            model.add_dataset(Dataset(**description))
        model.load_state_dict(checkpoint["best"])
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a model of this {EXPERIMENT}.py ({error})") from None
    return model.to(device)


def predict_file(args):
    """Write the class and the probabilities of every window of --predict to predictions.csv.

    The file is read as the data set of the model with which it has most columns in common and, of
    several such, with whose name its own begins.
    """
    path = Path(args.predict)
    model = restore_model(args.checkpoint, args.device)
    datasets = [Dataset(**description) for description in model.datasets.values()]
    step = 1  # from one window to the next
    if path.suffix.lower() in ARCHIVE_SUFFIXES:
        x = read_archive([path], max(data.seq_len for data in datasets))[0]
        cases, step, dimensions = x.shape
        index = pd.RangeIndex(1, cases + 1, name="case").repeat(step)
        numbers = pd.DataFrame(x.reshape(-1, dimensions), index).add_prefix("dim_")
    else:
        numbers = read_csv(path)
    data = max(datasets, key=lambda data: (len({*data.columns} & {*numbers}),
                                           path.stem.startswith(data.name)))
    missing = {*data.columns} - {*numbers}
    if missing:
        note(f"{path}: no column {', '.join(sorted(missing))}; their values count as missing")
    starts = np.arange(step, len(numbers) + 1, step) - data.seq_len
    starts = starts[starts >= 0]
    if not len(starts) or len(missing) == len(data.columns):
        raise UserError(f"{path}: needs {data.seq_len} rows of {', '.join(data.columns)}")
    series = standardize(numbers.reindex(columns=data.columns), data.mean, data.std)
    data = replace(data, series=series, starts=starts, splits={"all": np.arange(len(starts))})
    probabilities = predict(model, data, "all")
    table = numbers.index[starts + data.seq_len - 1].to_frame(index=False)  # that of the last row
    table["class"] = np.array(data.classes)[probabilities.argmax(1)]
    table[[f"p({name})" for name in data.classes]] = probabilities.round(4)
    run_dir = next_run_dir(args)
    table.to_csv(run_dir / "predictions.csv", index=False)
    counts = table["class"].value_counts().to_dict()
    summary = (f"{markdown_table([counts])}\n\nWindows of {args.predict}, read as {data.name}; "
               "each is in predictions.csv.\n")
    results = {"dataset": data.name, "windows": len(table), "classes": counts}
    return write_results(results, summary, args, run_dir)


# --- Extra: column names ------------------------------------------------------------------------


def compare_columns(args):
    """Cosine similarity of column names by the frozen encoder."""
    from sklearn.metrics.pairwise import cosine_similarity

    columns = [name for data in load_datasets(args) for name in data.columns]
    names = list(dict.fromkeys(PROBES + columns))
    embedder = FrozenBERTColumnEmbedder(**bert_options(args))
    vectors = embedder.embed(names).detach().double()
    similarity = pd.DataFrame(cosine_similarity(vectors), names, names)
    run_dir = next_run_dir(args)
    side = max(8, len(names) / 6)
    fig, (ax,) = new_figure("Column names by their embedding", size=(side + 1, side))
    fig.colorbar(ax.imshow(similarity, cmap="Greys", vmax=1), label="cosine similarity")
    ax.set_yticks(range(len(names)), names)
    ax.set_xticks(range(len(names)), names, rotation=90)
    save_figure(fig, run_dir / "columns.png")
    others = similarity - 2 * np.eye(len(names))
    table = pd.DataFrame({"column": names, "read as": map(name_to_words, names),
                          "nearest": others.idxmax(), "similarity": others.max().round(2)})
    rows = table.to_dict("records")
    return write_results({"nearest names": rows}, markdown_table(rows) + "\n", args, run_dir)


def prewarm_cache(args):
    """Cache the embeddings of the names in --prewarm; returns and prints what the cache holds."""
    names = Path(args.prewarm).read_text("utf-8-sig", "replace").splitlines()
    embedder = FrozenBERTColumnEmbedder(**bert_options(args))
    embedder.add(filter(None, map(str.strip, names)))
    stats = embedder.get_cache_stats()
    print(json.dumps(stats, indent=1))
    return stats


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
