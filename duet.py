"""Do column names help a time-series transformer, and can one model serve many tables?

Windows of 96 steps are classified by a transformer over patches of 16 steps, which reads each
column's values, with a missing one replaced by the value before it, and a mask of what is present.
A strategy adds the columns' names: none, a learned vocabulary that grows (auto_expanding), a frozen
BERT (frozen_bert), or, as a control, a fixed random vector for each name (random_names).

Measured on three data sets, 5 seeds: 95.8 % without names, 96.1 to 96.5 % with any of them, random
ones included. One shared model for all three (4 seeds): 97.1 to 97.4 % with names, 62.8 %
without. A name's meaning counts on a new table only: before it has seen one label, a pretrained
model is right in 100 % with BERT's vectors, 56 % with learned and 35 % with random ones
(--transfer, 3 seeds).

    python duet.py                                        # three data sets: 5 minutes
    python duet.py --quick                                # every experiment, small, no network
    python duet.py --shared --runs 5                      # one model for all, with an interval
    python duet.py --dataset etth1 --head ordinal         # what it takes to match persistence
    python duet.py --data sales.csv --target price --num-classes 4
    python duet.py --data BasicMotions/                   # a folder of UEA or UCR files
    python duet.py --transfer --synthetic-schemas 8       # a new data set, few of its labels
    python duet.py --nan-robustness --dataset user_metrics
    python duet.py --columns --bert-model FOLDER          # which names are near each other
    python duet.py --predict new.csv --checkpoint outputs/duet/run-001/models/etth1-none-42.pt

A strategy is a subclass of ColumnEmbedder and an entry in STRATEGIES, from a notebook, too. Within
one data set, a name adds a constant that the patch layer's bias already has; in the shared model
it tells the columns apart.

Sources: Nie et al. 2023 (patches), Devlin et al. 2019 (BERT), McCullagh 1980 (ordinal head), Wang
et al. 2017 (convolutions), Dempster et al. 2023 (Hydra), Zhou et al. 2021 (ETTh1), Bagnall et al.
2018 (the archive's files). The original is github.com/kailukowiak/TREA-C ("DuET").
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
import hashlib
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
import urllib.request
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from common import (MARKERS, detect_device, has_bfloat16, in_notebook, legend_below,
                    mean_and_interval, new_figure, plot_curve, plot_dots, plot_ranking,
                    save_figure, seed_everything)

EXPERIMENT = "duet"
SEQ_LEN, PATCH_LEN, STRIDE = 96, 16, 8
ETTH1_URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv"
ETTH1_SHA256 = "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"
ORIGINAL_TABLE = {  # accuracy [%] of single runs on the data of --protocol original
    "temperature_sensors": {"none": 99.5, "auto_expanding": 99.5, "frozen_bert": 100.0},
    "user_metrics": {"none": 99.0, "auto_expanding": 99.0},
    "etth1": {"none": 79.7, "auto_expanding": 87.5},
    "mean of all": {"none": 92.8, "auto_expanding": 95.3, "frozen_bert": 93.8},
}
ARCHIVE_SUFFIXES = [".ts", ".tsv", ".txt"]  # files of the UEA and UCR archives
FILLS = {"both": "forward fill and mask", "mask": "value and mask", "zero": "zero fill",
         "forward": "forward fill"}
HEADS = ["mean", "last", "ordinal"]
MISSING_KINDS = ["at random", "in blocks", "whole columns"]
MISSING_SHARES = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
LABEL_SHARES = [0.0, 0.05, 0.1, 1.0]
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


def parse_args(argv=None):
    """The command line as a namespace; an error is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        f"{EXPERIMENT}.py", argparse.SUPPRESS, __doc__.split("\n\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="every experiment on the original's easy synthetic "
        "data, no network: under a minute")
    add("--dataset", nargs="+", choices=[*EMBEDDED, "etth1"], metavar="NAME", help="embedded data "
        f"sets {', '.join(EMBEDDED)}, or etth1, which is downloaded; if unset, all three, or the "
        "embedded ones if etth1 cannot be downloaded")
    add("--data", nargs="+", metavar="PATH", help="CSV files of time series, or .ts, .tsv and "
        ".txt files of the UEA and UCR archives, or folders of those")
    add("--target", metavar="COLUMN", help="column of the CSV files whose next value is "
        "classified: into its quantiles, or, with few distinct values, into these")
    add("--num-classes", type=int, default=3, help="number of quantile classes of --target")
    add("--synthetic-schemas", type=int, default=0, metavar="N", help="number of synthetic data "
        "sets with 3 to 12 columns each")
    add("--windows", type=int, default=2000, help="windows of each embedded data set; the "
        "original's have 1,000")
    add("--protocol", choices=["original", "holdout"], help="class limits of series from all rows "
        "(original) or from those before the test part (holdout); if unset, original for etth1 "
        "and holdout for --data; original also takes the original's synthetic data in place of "
        "the embedded ones, and removes 5 %% of ETTh1")
    add("--strategies", nargs="+", choices=STRATEGIES, metavar="NAME", help="strategies for column "
        f"names: {', '.join(STRATEGIES)}; if unset, all; --nan-robustness then uses none")
    add("--shared", nargs="?", const="also", choices=["also", "only"], help="train one model for "
        "all data sets, in addition to one for each (also, which is what --shared alone means) or "
        "alone (only)")
    add("--transfer", nargs="?", const="last", metavar="NAME", help="experiment: pretrain on the "
        "other data sets, then learn NAME, or the last one, from 0, 5, 10 and 100 %% of its labels")
    add("--nan-robustness", action="store_true", help="experiment: accuracy with 0 to 50 %% of the "
        "values missing")
    add("--head", choices=HEADS, default="mean", help="classify the mean of "
        "the patches, as the original does, or the last patch, or forecast --target and let the "
        "class limits cut the forecast")
    add("--conv-members", type=int, metavar="N", help="convolutional networks to average, alone "
        "and with Hydra; if unset, 3 for files of the archives, otherwise 0")
    add("--dropout", type=float, default=0.1, help="dropout rate of the transformer")
    add("--steps", type=int, default=600, help="training steps for each data set; "
        "convolutions take twice as many")
    add("--evaluations", type=int, default=6, help="evaluations on the validation part, of which "
        "the best keeps its weights")
    add("--batch-size", type=int, default=128, help="most windows in a batch; small data sets "
        "have smaller batches")
    add("--learning-rate", type=float, default=1e-3, help="peak learning rate of AdamW")
    add("--bert-model", default="bert-base-uncased", help="frozen encoder of frozen_bert: a name "
        "on the Hugging Face hub, or a folder")
    add("--tokenization", choices=["words", "raw"], default="words", help="what the encoder "
        "reads: indoor_temp as indoor temperature, or as it is")
    add("--runs", type=int, default=1, help="number of seeds")
    add("--seed", type=int, default=42, help="first seed")
    add("--device", type=detect_device, default="auto", help="auto, cuda, mps or cpu")
    add("--threads", type=int, help="threads on a CPU, on which the last digits depend; if unset, "
        "2, or 1 where a short test shows that the machine is busy")
    add("--data-dir", default="data", help="folder of downloads and of cached name embeddings")
    add("--output-dir", default="outputs", help="folder of all results")
    add("--resume", nargs="?", const="newest", metavar="RUN_DIR", help="unfinished run to go on "
        "with; without a value, the newest")
    add("--checkpoint", metavar="FILE", help="trained model for --predict and --columns")
    add("--predict", metavar="FILE", help="classify the windows of a file and exit")
    add("--columns", action="store_true", help="show which column names are near each other, by "
        "the frozen encoder or the embeddings of --checkpoint, and exit")
    add("--prewarm", metavar="FILE", help="cache the embeddings of the names in a file, one a "
        "line, and exit")
    add("--cache-stats", action="store_true", help="show what is cached of --bert-model and exit")
    if "--quick" in (argv or []):
        parser.set_defaults(steps=40, batch_size=32, evaluations=2, shared="also",
                            transfer="last", nan_robustness=True, protocol="original")
    args = parser.parse_args(argv)
    check_args(args, parser.error)
    return args


def check_args(args, error):
    """Call `error` with a message if an argument is out of range or does not fit another."""
    least = {"num_classes": 2, "synthetic_schemas": 0, "windows": 60, "conv_members": 0,
             "dropout": 0, "steps": 1, "evaluations": 1, "batch_size": 1, "learning_rate": 1e-12,
             "runs": 1, "seed": 0, "threads": 1}
    most = {"num_classes": 100, "synthetic_schemas": 999, "dropout": 0.99, "runs": 999,
            "seed": 2**31}
    for name, low in least.items():
        value, high = getattr(args, name), most.get(name, math.inf)
        if value is not None and not low <= value <= high:
            error(f"--{name.replace('_', '-')} {value} is not between {low} and {high:g}")
    if args.target and not args.data:
        error("--target is for the CSV files of --data")
    if args.predict and not args.checkpoint:
        error("--predict needs --checkpoint, a file in models/ of a finished run")
    if args.checkpoint and not (args.predict or args.columns):
        error("--checkpoint is for --predict and --columns")


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
    seq_len: int = SEQ_LEN
    target: int | None = None  # the column whose next value is classified, if there is one
    limits: np.ndarray | None = None  # [classes - 1] between the classes, in units of the target
    info: dict = field(default_factory=dict)  # for results.json
    mean: np.ndarray | None = None  # [columns] of the training part
    std: np.ndarray | None = None

    def metadata(self):
        """What a checkpoint keeps of it, so that new files can be read in the same way."""
        limits = None if self.limits is None else self.limits.tolist()
        return {"name": self.name, "columns": self.columns, "classes": self.classes,
                "target": self.target, "limits": limits, "mean": self.mean.tolist(),
                "std": self.std.tolist(), "seq_len": self.seq_len}


def name_to_words(name):
    """A column name as English words: `tempC` -> "temperature celsius"."""
    words = []
    for token in re.findall(r"[^\W_]+", name):
        if token.lower() in UNITS:
            words.append(token.lower())
        else:
            parts = re.findall(r"[A-Z]+(?![^\W\d_A-Z])|[A-Z]?[^\W\d_A-Z]+|\d+", token)
            words += [part.lower() for part in parts]
    words = [ABBREVIATIONS.get(word, word) for word in words]
    if len(words) > 1:  # a unit is the last word
        *before, last = words
        if len(last) > 1 or before[-1] in QUANTITIES or before[-1].isdigit():
            words = [*before, UNITS.get(last, last)]
    return " ".join(words) or name


def normalize_dataset(data):
    """Scale the columns by the training part, without those that do not vary there; returns `data`.

    Raises UserError where no column varies or a part lacks windows.
    """
    in_train = np.zeros(len(data.series), bool)
    for start in data.starts[data.splits["train"]]:
        in_train[start : start + data.seq_len] = True
    series = np.where(np.isfinite(data.series), data.series, np.nan)
    with warnings.catch_warnings(), np.errstate(over="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of an empty column
        mean = np.nanmean(series[in_train], axis=0)
        std = np.nanstd(series[in_train], axis=0)
    if np.isinf(std).any():
        raise UserError(f"{data.name}: the values of {data.columns[np.isinf(std).argmax()]!r} are "
                        "too large")
    varies = std > 1e-9 * np.maximum(np.abs(mean), 1e-9)
    if data.target is not None:
        varies[data.target] = True
        std[data.target] = max(std[data.target], 1e-12)
        data.target = int(varies[: data.target].sum())
    if not varies.any():
        raise UserError(f"{data.name}: no column varies in the training part")
    for name in itertools.compress(data.columns, ~varies):
        note(f"{data.name}: column {name!r} left out, constant or empty in the training part")
    data.columns = list(itertools.compress(data.columns, varies))
    data.mean, data.std = mean[varies], std[varies]
    data.series = standardize(series[:, varies], data.mean, data.std)
    if data.limits is not None:  # rounded like the series, so that a value at a limit stays there
        limits = (data.limits - data.mean[data.target]) / data.std[data.target]
        data.limits = limits.astype(np.float32)
    return describe_dataset(data)


def standardize(series, mean, std):
    """The series in float32, scaled; NaN where a value is not finite or absurd."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (series - mean) / std
    return np.where(np.abs(scaled) < 1e6, scaled, np.nan).astype(np.float32)


def describe_dataset(data):
    """Add the data set's figures to its info and check that each part has windows."""
    counts = {split: np.bincount(data.labels[windows], minlength=len(data.classes))
              for split, windows in data.splits.items()}
    for split, count in counts.items():
        if not count.any() or (split == "train" and np.count_nonzero(count) < 2):
            raise UserError(f"{data.name}: the {split} part has {count.tolist()} windows of its "
                            "classes; take more data")
    for name in itertools.compress(data.classes, counts["train"] == 0):
        note(f"{data.name}: class {name!r} has no window in the training part")
    digest = hashlib.sha256(np.ascontiguousarray(data.series))
    digest.update(data.labels)
    data.info |= {"rows": len(data.series), "sha256": digest.hexdigest(), "windows": counts,
                  "classes": data.classes, "missing": float(np.isnan(data.series).mean()),
                  "columns": {name: name_to_words(name) for name in data.columns}}
    return data


def split_blocks(windows, gap):
    """(train, val) numbers of windows that begin at consecutive rows.

    Every fifth block is for validation; the `gap` windows beside it, which share rows with it, are
    left out.
    """
    blocks = int(np.clip(windows // (4 * gap), 5, 25))
    in_val = np.arange(windows) * blocks // windows % 5 == 2
    near = in_val.copy()
    for edge in np.flatnonzero(np.diff(in_val)):  # the last window before a change
        near[max(0, edge - gap + 1) : edge + gap + 1] = True
    return np.flatnonzero(~near), np.flatnonzero(in_val)


def split_at_random(labels, share=0.2, seed=0, at_least=0):
    """(rest, chosen) numbers of windows that share no rows; `share` of each class is chosen, and at
    least one of a class that has two."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        windows = rng.permutation(np.flatnonzero(labels == label))
        count = max(at_least, round(share * len(windows)), int(len(windows) > 1))
        chosen[windows[:count]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def split_windows(labels, is_test=None):
    """{split: numbers of windows}: 64, 16 and 20 % of each class, or the test part `is_test`."""
    if is_test is None:
        rest, test = split_at_random(labels)
    else:
        rest, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    train, val = split_at_random(labels[rest])
    return {"train": rest[train], "val": rest[val], "test": test}


# --- Data: embedded generators ------------------------------------------------------------------


def generate_windows(columns, coupled, windows, seed):
    """Series [windows * 96, columns] and labels [windows] of three classes that no single column
    can tell apart.

    Every column has slow noise and one bump, which is upward in the first of the two `coupled`
    columns. In class 1 the second of them follows 6 steps later with a bump upward, in class 2
    downward; in class 0 its bump is either, at another time. Other pairs of columns are coupled
    likewise, whatever the class. 5 % of the values are NaN.
    """
    rng = np.random.default_rng(seed)
    names = list(columns)
    labels = rng.integers(3, size=windows)
    centre = rng.uniform(10, SEQ_LEN - 16, (windows, len(names)))
    sign = rng.choice([-1, 1], (windows, len(names)))
    lead, follower = map(names.index, coupled)
    others = [i for i in range(len(names)) if i not in (lead, follower)]
    for first, second in [(lead, follower), *zip(others[::2], others[1::2])]:
        follows = (labels if first == lead else rng.integers(3, size=windows)) > 0
        elsewhere = (centre[:, first] - 4 + rng.uniform(20, 50, windows)) % (SEQ_LEN - 20) + 10
        centre[:, second] = np.where(follows, centre[:, first] + 6, elsewhere)
    sign[:, lead] = 1
    sign[:, follower] = np.select([labels == 1, labels == 2], [1, -1], sign[:, follower])
    height = sign * rng.uniform(1.6, 2.6, sign.shape)
    t = np.arange(SEQ_LEN)
    # x is [windows, columns, time].
    x = height[..., None] * np.exp(-(((t - centre[..., None]) / 4) ** 2))
    x += np.cumsum(rng.normal(0, 0.06, x.shape), axis=-1)
    x += rng.normal(0, 0.5, sign.shape)[..., None]
    x += rng.normal(0, 0.2, x.shape)
    level, scale = np.array(list(columns.values()), float).T[:, :, None]
    x = level + scale * x
    x[rng.random(x.shape) < 0.05] = np.nan
    return x.transpose(0, 2, 1).reshape(-1, len(names)), labels


def embedded_dataset(name, columns, coupled, windows, seed):
    """The Dataset of generate_windows."""
    series, labels = generate_windows(columns, coupled, windows, seed)
    return normalize_dataset(Dataset(
        name, list(columns), series, SEQ_LEN * np.arange(windows), labels,
        ["apart", "along", "against"], split_windows(labels), info={"source": "embedded"}))


def original_dataset(name, seed):
    """The original's synthetic data: each column is noise and a sine with 1, 2 or 3 periods.

    The number of periods is the class. 800 windows are for training and validation and 200 for the
    test; 5 % of the values are NaN, 3 % in user_metrics.
    """
    rng = np.random.default_rng(seed)
    windows = 1000
    columns = list(EMBEDDED[name][0])
    labels = rng.integers(3, size=windows)
    t = np.linspace(0, 1, SEQ_LEN)
    wave = np.sin(2 * np.pi * (labels[:, None] + 1) * t)[..., None]  # [windows, time, 1]
    x = rng.normal(size=(windows, SEQ_LEN, len(columns))) + wave
    x[rng.random(x.shape) < (0.03 if name == "user_metrics" else 0.05)] = np.nan
    splits = split_windows(labels, np.arange(windows) >= 0.8 * windows)
    return normalize_dataset(Dataset(
        name, columns, x.reshape(-1, len(columns)), SEQ_LEN * np.arange(windows), labels,
        ["1 period", "2 periods", "3 periods"], splits, info={"source": "original's synthetic"}))


def synthetic_schema(number, windows):
    """Data set `number` of a family with the same classes, 3 to 12 columns and their own names."""
    rng = np.random.default_rng([1, number])
    round_number = number // len(TEMPERATURES)  # from the second on, names begin with a place
    coupled = [names[number % len(names)] for names in (TEMPERATURES, POWERS)]
    if round_number:
        coupled = [f"{SITES[(round_number - 1) % 8]}{round_number}_{name}" for name in coupled]
    others = rng.permutation(OTHERS)[: rng.integers(1, 11)]
    names = rng.permutation([*coupled, *others]).tolist()
    columns = {name: (rng.uniform(-5, 50), rng.uniform(0.5, 20)) for name in names}
    return embedded_dataset(f"schema_{number + 1:02}", columns, coupled, windows, [2, number])


# --- Data: CSV, .ts and ETTh1 -------------------------------------------------------------------


def read_text(path):
    """The text of a file in UTF-8, with or without a byte order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {error}; save it as UTF-8") from None


def read_csv(path):
    """A CSV file as (numbers, dates): a DataFrame of its numeric columns in order of time, whose
    index counts the rows of the file, and the texts of its date column, or None.

    Separators are commas, semicolons or tabs. Columns of other texts are left out with a note.
    """
    text = read_text(path)
    header = text.split("\n", 1)[0]
    separator = max(",;\t", key=header.count)
    options = {"sep": separator, "decimal": "," if separator == ";" else ".", "index_col": False,
               "skipinitialspace": True}
    try:
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
            names = pd.read_csv(io.StringIO(header), header=None, dtype=str, **options)
            frame = pd.read_csv(io.StringIO(text), **options)
    except (ValueError, pd.errors.ParserWarning) as error:
        raise UserError(f"{path}: {error}") from None
    if names.iloc[0].dropna().duplicated().any():
        raise UserError(f"{path}: two columns have the same name: "
                        f"{', '.join(names.iloc[0].astype(str))}")
    if frame.empty:
        raise UserError(f"{path}: no rows")
    date_names, dates, times = find_dates(path, frame)
    numbers = {}
    for name, column in frame.drop(columns=date_names).items():
        if column.isna().all() or re.fullmatch(r"Unnamed: \d+|__index_level_\d+__", name):
            note(f"{path}: column {name!r} left out, empty or a row index")
            continue
        values = parse_numbers(column)
        wrong = values.isna() & column.notna()
        if 0 < wrong.mean() < 0.5:
            row = wrong.argmax()
            raise UserError(f"{path}: row {row + 2}, column {name!r}: {column[row]!r}, a number is "
                            "needed")
        if wrong.any():
            note(f"{path}: column {name!r} left out, not numeric")
        else:
            numbers[name] = values.astype(float)
    if not numbers:
        raise UserError(f"{path}: no numeric column, only {', '.join(frame)}")
    numbers = pd.DataFrame(numbers)
    if dates is None:
        return numbers, None
    order = sort_times(path, times, date_names[0])
    return numbers.iloc[order], dates.iloc[order].tolist()


def parse_numbers(column):
    """A column as numbers, NaN for other texts; `1,504` has thousands and `50,13` a decimal comma
    where all cells look like that."""
    if pd.api.types.is_numeric_dtype(column):
        return column
    text = column.astype(str).str.strip()
    present = text[column.notna()]
    thousands = present.str.fullmatch(r"-?[1-9]\d{0,2}(,\d{3})+(\.\d+)?|-?\d{1,3}(\.\d+)?").all()
    if thousands and present.str.contains(",").any():
        text = text.str.replace(",", "")
    elif present.str.fullmatch(r"-?\d+(,\d*)?").all():
        decimals = present.str.extract(r",(\d*)$")[0].dropna()
        if not (decimals.str.len() == 3).all():  # 1,504 beside 1200 may mean either
            text = text.str.replace(",", ".")
    return pd.to_numeric(text, errors="coerce")


def find_dates(path, frame):
    """(names, texts, times) of the date columns of a table: by their names, or as texts that can
    all be read as dates. A date and a time of day are joined; otherwise, the first column counts.
    """
    found = {}
    for name, column in frame.items():
        is_number = pd.api.types.is_numeric_dtype(column)
        named = name.lower() in ("date", "time", "datetime", "timestamp")
        text = column.dropna().astype(str)
        if is_number and named:
            found[name] = column
        elif not is_number and (named or text.str.contains(r"\d[-/:]\d").all()):
            times = parse_dates(column.astype(str))
            if named or (len(text) and times[text.index].notna().all()):
                found[name] = times
    names = list(found)
    if not names:
        return [], None, None
    texts = frame[names[0]].astype(str)
    if len(names) > 1:
        joined = frame[names].astype(str).agg(" ".join, axis=1)
        times = parse_dates(joined)
        if times.notna().all():
            return names, joined, times
        note(f"{path}: of the date columns {', '.join(names)}, only the first counts")
    return names, texts, found[names[0]]


def parse_dates(text):
    """Texts as times, NaT where one is not a date.

    All are read in one format, day or month first: the one that reads more of them, leaves them in
    order of time, and has fewer different steps. If neither reads all, each is read by itself.
    """
    def read(**options):
        return pd.to_datetime(text, errors="coerce", utc=True, **options)

    def rate(times):
        return times.notna().sum(), times.is_monotonic_increasing, -times.diff().nunique()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no format could be inferred
        times = max(read(dayfirst=False), read(dayfirst=True), key=rate)
        if times.isna().any():  # slow: each text has a format of its own
            times = max(times, read(format="mixed"), key=rate)
    return times.dt.tz_localize(None)


def sort_times(path, times, name):
    """The order of the rows in time; notes tell of unsorted and repeated times and of gaps."""
    if times.isna().any():
        row = times.isna().argmax()
        note(f"{path}: row {row + 2} of {name!r} is not a date; the rows keep their order")
        return np.arange(len(times))
    repeated = int(times.duplicated().sum())
    if repeated:
        note(f"{path}: {repeated:,} rows repeat a value of {name!r}; are there several series in "
             "this file?")
    if repeated and pd.api.types.is_numeric_dtype(times):
        return np.arange(len(times))  # it may be an hour of the day
    order = np.argsort(times.to_numpy(), kind="stable")
    if (np.diff(order) < 0).any():
        note(f"{path}: rows that were not in order of {name!r} have been sorted")
    steps = times.iloc[order].diff()[1:]
    gaps = int((steps > 1.5 * steps.median()).sum()) if len(steps) else 0
    if gaps:
        note(f"{path}: {gaps:,} gaps in {name!r}; the rows are taken as equally spaced")
    return order


def make_classes(path, values, num_classes, rows):
    """(names, limits) of the classes of a target column: its distinct values, if they are few,
    otherwise the quantiles of its first `rows`."""
    distinct = np.unique(values[np.isfinite(values)])
    if 2 <= len(distinct) <= max(10, num_classes):
        note(f"{path}: the target has only {len(distinct)} distinct values, which are the classes")
        return [f"{value:g}" for value in distinct], (distinct[1:] + distinct[:-1]) / 2
    percentiles = np.round(100 * np.arange(1, num_classes) / num_classes, 2)
    limits = np.nanpercentile(values[:rows], percentiles)
    if not (np.diff(limits) > 0).all():
        raise UserError(f"{path}: --num-classes {num_classes}: quantiles of the target coincide: "
                        f"{limits.tolist()}")
    return [f"quantile {k + 1}" for k in range(num_classes)], limits


def csv_dataset(path, target, num_classes, protocol, name=None, missing=0.0):
    """Windows of 96 rows of a CSV file, classified by the value of `target` in the next row.

    The last 20 % of the windows are the test part. With the `original` protocol, the class limits
    are quantiles of the whole series; with `holdout`, of the rows before the test part, and no
    training window shares rows with it. Validation windows never do. A share `missing` of the
    values is removed once the classes are known.
    """
    numbers, _ = read_csv(path)
    if target not in numbers:
        raise UserError(f"{path}: --target {target!r} is not one of the numeric columns "
                        f"{', '.join(numbers)}")
    series, values = numbers.to_numpy(copy=True), numbers[target].to_numpy()
    starts = np.arange(len(series) - SEQ_LEN)
    first_test = int(0.8 * len(starts))
    if first_test < 10 * SEQ_LEN:
        needed = math.ceil(12.5 * SEQ_LEN) + SEQ_LEN
        raise UserError(f"{path}: {len(series)} rows, at least {needed} are needed")
    known = first_test if protocol == "holdout" else None
    classes, limits = make_classes(path, values, num_classes, known)
    train, val = split_blocks(first_test, gap=SEQ_LEN)
    val = val[val < first_test - SEQ_LEN]
    if protocol == "holdout":
        train = train[train < first_test - SEQ_LEN]
    next_values = values[starts + SEQ_LEN]
    splits = {"train": train, "val": val, "test": np.arange(first_test, len(starts))}
    splits = {split: windows[np.isfinite(next_values[windows])]
              for split, windows in splits.items()}
    series[np.random.default_rng(0).random(series.shape) < missing] = np.nan
    info = {"source": "real", "path": str(path), "protocol": protocol,
            "class_limits": limits.tolist(),
            "file_sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
    return normalize_dataset(Dataset(
        name or Path(path).stem, list(numbers), series, starts, np.digitize(next_values, limits),
        classes, splits, target=list(numbers).index(target), limits=limits, info=info))


def read_archive_file(path, labelled=True):
    """(cases, labels) of an archive file: cases [[float64 [length] of each dimension]].

    A .ts file has a header, and `?` for a missing value; a .tsv or .txt file has one case a line,
    the class first. With labelled=False, as for --predict, cases need no class.
    """
    lines = [line.strip() for line in read_text(path).splitlines()]
    header, first = {"@classlabel": "true"}, 0
    if Path(path).suffix.lower() == ".ts":
        first = next((i + 1 for i, line in enumerate(lines) if line.lower() == "@data"), 0)
        if not first:
            raise UserError(f"{path}: no @data line, so this is not a .ts file")
        words = [line.lower().split() for line in lines[:first] if line.startswith("@")]
        header |= {key: value[0] for key, *value in words if value}
    else:
        rows = [line.split("\t") if "\t" in line else re.split(r"[, ]+", line) for line in lines]
        lines = [f"{','.join(values)}:{label}" if label else "" for label, *values in rows]
    if header.get("@targetlabel") == "true":
        raise UserError(f"{path}: @targetlabel true: a regression file, which has no classes")
    if header.get("@timestamps") == "true":
        raise UserError(f"{path}: @timestamps true: files with time stamps are not supported")
    has_label = header["@classlabel"] == "true"
    if labelled and not has_label:
        raise UserError(f"{path}: @classlabel false: a file with classes is needed")
    cases, labels = [], []
    for number, line in enumerate(lines[first:], start=first + 1):
        if not line or line[0] in "#%":
            continue
        dimensions = line.split(":")
        labels.append(dimensions.pop().strip() if has_label else "?")
        try:
            cells = [text.replace("?", "nan").split(",") for text in dimensions]
            case = [np.array([cell.strip() or "nan" for cell in row], np.float64) for row in cells]
        except ValueError as error:
            raise UserError(f"{path}: line {number}: {error}, a number or ? is needed") from None
        if not case or (cases and len(case) != len(cases[0])):
            raise UserError(f"{path}: line {number}: {len(case)} dimensions, "
                            f"{len(cases[0]) if cases else 'at least one'} needed")
        if labelled and labels[-1] in ("", "?"):
            raise UserError(f"{path}: line {number}: the class after the last colon is missing")
        cases.append(case)
    if not cases:
        raise UserError(f"{path}: no cases")
    return cases, labels


def stack_cases(cases, seq_len):
    """The last seq_len steps of each case as a series [cases * seq_len, dimensions]; NaN before
    shorter ones."""
    series = np.full((len(cases), seq_len, len(cases[0])), np.nan)
    for i, case in enumerate(cases):
        for j, values in enumerate(case):
            values = values[-seq_len:]
            series[i, seq_len - len(values) :, j] = values
    return series.reshape(-1, len(cases[0]))


def normalize_label(text):
    """Numbers alike, so that the classes 1 and 1.0 are one."""
    try:
        return f"{float(text):g}"
    except ValueError:
        return text


def archive_dataset(name, files):
    """The data set of one archive file, or of NAME_TRAIN and NAME_TEST together."""
    cases, texts, is_test = [], [], []
    for file in files:
        file_cases, file_labels = read_archive_file(file)
        cases += file_cases
        texts += map(normalize_label, file_labels)
        is_test += [file.stem.lower().endswith("_test")] * len(file_cases)
    if len({len(case) for case in cases}) > 1:
        raise UserError(f"{name}: training and test file have different dimensions")
    classes, labels = np.unique(texts, return_inverse=True)
    seq_len = max(len(values) for case in cases for values in case)
    columns = [f"dim_{i}" for i in range(len(cases[0]))]
    content = b"".join(file.read_bytes() for file in files)
    info = {"source": "real", "archive": True, "path": [str(file) for file in files],
            "file_sha256": hashlib.sha256(content).hexdigest()}
    splits = split_windows(labels, np.array(is_test) if len(set(is_test)) > 1 else None)
    return normalize_dataset(Dataset(
        name, columns, stack_cases(cases, seq_len), seq_len * np.arange(len(cases)), labels,
        classes.tolist(), splits, seq_len, info=info))


def fetch_etth1(data_dir):
    """Path of ETTh1.csv in data_dir/ett, downloaded if it is absent. Raises UserError."""
    path = Path(data_dir) / "ett/ETTh1.csv"
    source = path if path.exists() else ETTH1_URL
    try:
        if path.exists():
            content = path.read_bytes()
        else:
            with urllib.request.urlopen(ETTH1_URL, timeout=3) as response:
                content = response.read()
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: {error}; put the file at {path}") from None
    if hashlib.sha256(content).hexdigest() != ETTH1_SHA256:
        raise UserError(f"{source}: its checksum is wrong; put the right file at {path}")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_bytes(content)
    return path


def group_files(paths):
    """{path without _TRAIN or _TEST: files} of files and folders of archive files."""
    groups, seen = {}, set()
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():  # the archive has the same data in several formats: take one
            found = [sorted(path.glob(f"*{suffix}")) for suffix in ARCHIVE_SUFFIXES]
            files = next(filter(None, found), [])
        if not files:
            raise UserError(f"{path}: no .ts, .tsv or .txt file in this folder; CSV files must be "
                            "named one by one")
        for file in files:
            if file.resolve() in seen:
                raise UserError(f"{file}: named twice")
            seen.add(file.resolve())
            name = str(file)
            if is_archive_file(file):
                name = re.sub(r"_(train|test)(\.\w+)$", r"\2", name, flags=re.I)
            groups.setdefault(Path(name), []).append(file)
    return groups


def is_archive_file(path):
    return path.suffix.lower() in ARCHIVE_SUFFIXES


def load_datasets(args):
    """The data sets [Dataset] that the arguments name; if they name none, the embedded ones and
    ETTh1, if that can be had."""
    datasets, names = [], args.dataset or []
    by_default = not (names or args.data or args.synthetic_schemas)
    if by_default:
        names = list(EMBEDDED) if args.quick else [*EMBEDDED, "etth1"]
    for number, name in enumerate(names):
        if name == "etth1":
            try:
                path = fetch_etth1(args.data_dir)
            except UserError as error:
                if not by_default:
                    raise
                note(f"etth1 is left out: {error}")
                continue
            missing = 0.05 if args.protocol == "original" else 0.0
            datasets.append(csv_dataset(path, "OT", 3, args.protocol or "original", name, missing))
        elif args.protocol == "original":
            datasets.append(original_dataset(name, [4, number]))
        else:
            datasets.append(embedded_dataset(name, *EMBEDDED[name], args.windows, [0, number]))
    for path, files in group_files(args.data or []).items():
        if is_archive_file(path):
            datasets.append(archive_dataset(path.stem, files))
        elif args.target is None:
            raise UserError(f"{path}: a CSV file needs --target, one of the columns "
                            f"{', '.join(read_csv(path)[0])}")
        else:
            datasets += [csv_dataset(file, args.target, args.num_classes,
                                     args.protocol or "holdout") for file in files]
    datasets += [synthetic_schema(number, args.windows) for number in range(args.synthetic_schemas)]
    names = [data.name for data in datasets]
    if len(set(names)) < len(names):
        raise UserError(f"two data sets have the same name: {', '.join(names)}")
    return datasets


# --- Model: embeddings of column names ----------------------------------------------------------


class ColumnEmbedder(nn.Module):
    """A vector for each column name, then a Linear: forward(names) gives [names, target_dim].

    A strategy is a subclass that computes the vectors [names, dim] of new names in compute(names).
    Only the Linear is trained.
    """

    def __init__(self, target_dim=1, dim=16):
        super().__init__()
        self.rows = {}  # name: row of the table
        self.register_buffer("table", torch.zeros(0, dim), persistent=False)
        self.projection = nn.Linear(dim, target_dim)

    def add(self, names):
        """Extend the table by the names that it lacks."""
        new = [name for name in dict.fromkeys(names) if name not in self.rows]
        if new:
            self.table = torch.cat([self.table, self.compute(new).to(self.table)])
            self.rows |= {name: len(self.rows) + i for i, name in enumerate(new)}

    def embed(self, names):
        """Vectors [names, dim]."""
        self.add(names)
        return self.table[[self.rows[name] for name in names]]

    def forward(self, names):
        return self.projection(self.embed(names))


class AutoExpandingEmbedder(ColumnEmbedder):
    """A learned vocabulary of column names; its table doubles when it is full.

    Names beyond the table's size must be added before an optimizer is made, or its next step
    raises RuntimeError.
    """

    def __init__(self, target_dim=1, dim=16, initial_size=1000):
        super().__init__(target_dim, dim)
        self.embedding = nn.Embedding(initial_size, dim)  # in place of the table

    def add(self, names):
        for name in names:
            self.rows.setdefault(name, len(self.rows))
        while len(self.rows) > len(self.embedding.weight):
            weight = self.embedding.weight
            weight.data = torch.cat([weight.data, torch.randn_like(weight)])
            self.embedding.num_embeddings = len(weight)

    def embed(self, names):
        self.add(names)
        rows = [self.rows[name] for name in names]
        return self.embedding(torch.tensor(rows, device=self.embedding.weight.device))

    def get_extra_state(self):
        return dict(self.rows)

    def set_extra_state(self, rows):
        self.rows = dict(rows)


class RandomNameEmbedder(ColumnEmbedder):
    """A fixed random vector for each name: identity without meaning, as a control."""

    def compute(self, names):
        vectors = []
        for name in names:
            seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
            generator = torch.Generator().manual_seed(seed)
            vectors.append(torch.randn(self.table.shape[1], generator=generator))
        return torch.stack(vectors)


class FrozenBERTColumnEmbedder(ColumnEmbedder):
    """Column names as read by a frozen BERT: the mean of its last hidden states, scaled to a mean
    square of 1.

    The encoder is loaded only for names that neither `known` {name: vector}, such as a
    checkpoint's, nor the cache has, and freed at once. The cache is one safetensors file for each
    encoder, with keys `tokenization/name`; delete it if the encoder's weights have changed.
    bert_model: a name on the Hugging Face hub, or a folder. tokenization: `words` reads a name
    through name_to_words(), `raw` as it is. Raises UserError where the encoder cannot be loaded.
    """

    def __init__(self, bert_model="bert-base-uncased", cache_dir="data/column_embeddings",
                 target_dim=1, tokenization="words", known=None, offline=False):
        cache_path = find_cache(bert_model, cache_dir)
        cache, known = read_cache(cache_path), known or {}
        dim = max(map(len, [*cache.values(), *known.values()]), default=None)
        if dim is None:
            dim = load_encoder(bert_model, offline)[1].config.hidden_size
        super().__init__(target_dim, dim)
        self.bert_model, self.tokenization, self.offline = bert_model, tokenization, offline
        self.cache_path, self.cache, self.known = cache_path, cache, known

    def compute(self, names):
        keys = {name: f"{self.tokenization}/{name}" for name in names}
        vectors = {name: self.cache[key] for name, key in keys.items() if key in self.cache}
        vectors |= self.known
        missing = [name for name in names if name not in vectors]
        if missing:
            vectors |= self.read_names(missing)
            self.cache |= {keys[name]: vectors[name] for name in missing}
            self.save_cache()
        return torch.stack([vectors[name] for name in names])

    @torch.no_grad()
    def read_names(self, names):
        """{name: vector} from the encoder."""
        tokenizer, encoder = load_encoder(self.bert_model, self.offline)
        vectors = {}
        for name in names:
            text = name_to_words(name) if self.tokenization == "words" else name
            tokens = tokenizer(text, return_tensors="pt", truncation=True)
            vector = encoder(**tokens).last_hidden_state[0].mean(0)
            vectors[name] = vector * len(vector) ** 0.5 / vector.norm()
        return vectors

    def save_cache(self):
        from safetensors.torch import save

        self.cache_path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.cache_path) as path:
            path.write_bytes(save(self.cache))

    def get_cache_stats(self):
        """{cached_embeddings, cache_size_mb, bert_model, bert_dim} of this encoder's cache file."""
        return cache_stats(self.bert_model, self.cache_path)


STRATEGIES = {"none": None, "auto_expanding": AutoExpandingEmbedder,
              "frozen_bert": FrozenBERTColumnEmbedder, "random_names": RandomNameEmbedder}


def find_cache(bert_model, cache_dir):
    """Path of the cache file of an encoder, a name on the hub or a folder."""
    folder = Path(bert_model).expanduser()
    name = str(folder.resolve()) if folder.is_dir() else bert_model
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return Path(cache_dir) / f"{Path(name).name}-{digest}.safetensors"


def cache_stats(bert_model, path):
    cache = read_cache(path)
    size = path.stat().st_size if path.exists() else 0
    dim = max(map(len, cache.values()), default=None)
    return {"cached_embeddings": len(cache), "cache_size_mb": round(size / 1e6, 3),
            "bert_model": bert_model, "bert_dim": dim}


def read_cache(path):
    """{tokenization/name: vector} of a cache file, empty where there is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path) if path.exists() else {}
    except SafetensorError as error:
        raise UserError(f"{path}: {error}; delete this cache of name embeddings") from None


def load_encoder(name, offline):
    """(tokenizer, model) of a BERT in a folder, in Hugging Face's cache, or on the hub."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    error = None
    for local in (True, False):
        if not local and (offline or os.path.isdir(name) or not hub_in_reach()):
            break
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
            model = transformers.AutoModel.from_pretrained(name, local_files_only=local)
            return tokenizer, model.eval()
        except Exception as problem:  # transformers raises errors of many types here
            error = (str(problem).strip() or repr(problem)).splitlines()[0]
    raise UserError(f"--bert-model {name} cannot be loaded ({error[:120]}); give a local folder")


def hub_in_reach():
    """Whether the Hugging Face hub answers, in one attempt of 3 s."""
    try:
        socket.create_connection(("huggingface.co", 443), 3).close()
        return True
    except OSError:
        return False


# --- Model: the networks ------------------------------------------------------------------------


def forward_fill(x):
    """x [batch, columns, time] with each NaN replaced by the value before it; leading NaNs stay."""
    steps = torch.arange(x.shape[-1], device=x.device)
    return x.gather(-1, steps.where(~x.isnan(), 0).cummax(-1).values)


def values_and_mask(x, fill):
    """(values, mask) [batch, columns, time] of x with NaNs; the mask is 1 where a value is present.

    fill: `both` puts the last value for a NaN and `mask` a 0, and the mask says so; `zero` and
    `forward` fill likewise, with a mask of 1 everywhere.
    """
    values = forward_fill(x) if fill in ("both", "forward") else x
    mask = (~x.isnan()).to(x.dtype) if fill in ("both", "mask") else torch.ones_like(x)
    return values.nan_to_num(), mask


def cut_patches(x):
    """x [batch, channels, time] -> [batch, channels, patches, 16], every 8 steps, with zeros in
    front to make it fit."""
    padding = max(PATCH_LEN - x.shape[-1], (PATCH_LEN - x.shape[-1]) % STRIDE)
    return F.pad(x, (padding, 0)).unfold(-1, PATCH_LEN, STRIDE)


def num_patches(seq_len):
    return max(0, math.ceil((seq_len - PATCH_LEN) / STRIDE)) + 1


class Head(nn.Module):
    """Logits [batch, classes] from patch tokens [batch, patches, d_model] and the windows x.

    `mean` and `last` are a Linear on the mean (the original's) or the last token. `ordinal` is the
    cumulative logit model of McCullagh (1980): the classes are intervals of one column's next
    value, so it forecasts this as the last value plus a learned step, with a learned spread, and
    lets the class limits cut that distribution; untrained, it is persistence. Where the data set
    has no such column, `ordinal` is `last`.
    """

    def __init__(self, kind, d_model, num_classes, target=None, limits=None):
        super().__init__()
        self.kind = "last" if kind == "ordinal" and target is None else kind
        self.target = target
        self.linear = nn.Linear(d_model, 2 if self.kind == "ordinal" else num_classes)
        if self.kind == "ordinal":
            self.register_buffer("limits", torch.tensor(np.asarray(limits), dtype=torch.float32))
            nn.init.zeros_(self.linear.weight)
            self.linear.bias.data = torch.tensor([0.0, -2.0])  # no step, a spread of 0.14

    def forward(self, tokens, x):
        if self.kind == "mean":
            return self.linear(tokens.mean(1))
        outputs = self.linear(tokens[:, -1])
        if self.kind == "last":
            return outputs
        step, log_spread = outputs.float().unbind(-1)
        last_value = forward_fill(x[:, self.target]).nan_to_num()[:, -1]
        distance = self.limits - (last_value + step)[:, None]  # [batch, classes - 1]
        below = torch.sigmoid(distance * torch.exp(-log_spread)[:, None])
        below = F.pad(F.pad(below, (0, 1), value=1.0), (1, 0))  # 0, …, 1
        return below.diff(dim=-1).clamp(min=1e-6).log()


class MultiDatasetPatchDuET(nn.Module):
    """Logits [batch, classes] from windows x [batch, columns, time], scaled, with NaNs.

    Patches, two pre-norm transformer layers, and a head for each data set. As in the original, one
    Linear reads all columns of a patch, so their number c_in is fixed, and a strategy makes each
    column's name one number, a third channel beside value and mask: 571,459 parameters with 4
    columns and `none`.

    With `shared`, one set of weights serves any columns, and c_in is not used: the patch layer
    reads one column at a time and adds the embedding of its name, then `queries` learned queries
    pool the columns of a patch by attention, and their results together are one token.
    """

    def __init__(self, c_in, seq_len=SEQ_LEN, strategy="none", shared=False, head="mean",
                 fill="both", dropout=0.0, d_model=64, queries=8, **bert):
        super().__init__()
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy {strategy!r} is not one of {', '.join(STRATEGIES)}")
        if fill not in FILLS or head not in HEADS:
            raise ValueError(f"fill {fill!r} must be one of {', '.join(FILLS)}, and head {head!r} "
                             f"one of {', '.join(HEADS)}")
        self.settings = {"c_in": c_in, "seq_len": seq_len, "strategy": strategy, "shared": shared,
                         "head": head, "fill": fill, "dropout": dropout, "d_model": d_model,
                         "queries": queries} | bert
        self.c_in, self.shared, self.head_kind, self.fill = c_in, shared, head, fill
        # What all strategies have comes first: with one seed they begin with the same weights.
        self.positions = nn.Parameter(0.02 * torch.randn(num_patches(seq_len), d_model))
        layer = nn.TransformerEncoderLayer(d_model, 8, 2048, 0.0, batch_first=True, norm_first=True)
        # Dropout on what each half of a layer adds; on its 2048 hidden units it would take a third
        # of the time.
        layer.dropout1.p = layer.dropout2.p = dropout
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        if shared:
            self.patch_layer = nn.Linear(2 * PATCH_LEN, d_model)
            self.queries = nn.Linear(d_model, queries)
            self.join = nn.Linear(queries * d_model, d_model)
        else:
            channels = c_in * (2 if strategy == "none" else 3)
            self.patch_layer = nn.Linear(channels * PATCH_LEN, d_model)
        self.embedder = None
        if strategy != "none":
            self.embedder = STRATEGIES[strategy](target_dim=d_model if shared else 1, **bert)
        self.heads = nn.ModuleList()
        self.head_numbers, self.column_names, self.datasets = {}, {}, {}

    @classmethod
    def create_for_dataset(cls, c_in, seq_len=SEQ_LEN, num_classes=3, column_names=None,
                           strategy="none", **options):
        """The original's constructor; `options` are those of the class."""
        model = cls(c_in, seq_len, strategy, **options)
        names = column_names or [f"column_{i + 1}" for i in range(c_in)]
        model.set_dataset_columns(names, num_classes=num_classes)
        return model

    def set_dataset_columns(self, names, dataset="default", num_classes=None, target=None,
                            limits=None):
        """Serve `dataset` with columns `names`; with `num_classes` it gets a new head.

        Raises ValueError where the number of columns does not fit, or the head is missing.
        """
        if not self.shared and len(names) != self.c_in:
            raise ValueError(f"{len(names)} columns for a model of {self.c_in}, whose patch layer "
                             "has a fixed size; create_for_dataset(..., shared=True) takes any")
        if num_classes is not None:
            head = Head(self.head_kind, self.settings["d_model"], num_classes, target, limits)
            self.head_numbers[dataset] = len(self.heads)
            self.heads.append(head.to(self.positions.device))
        if dataset not in self.head_numbers:
            raise ValueError(f"no head for data set {dataset!r} yet: give its num_classes")
        if self.embedder:
            self.embedder.add(names)
        self.column_names[dataset] = list(names)

    def add_dataset(self, metadata):
        """Serve the data set of a Dataset.metadata(), with a new head."""
        name, classes = metadata["name"], metadata["classes"]
        self.set_dataset_columns(metadata["columns"], name, len(classes), metadata["target"],
                                 metadata["limits"])
        self.datasets[name] = metadata

    def head(self, dataset):
        return self.heads[self.head_numbers[dataset]]

    def forward(self, x, dataset="default"):
        if not self.shared and x.shape[1] != self.c_in:
            raise ValueError(f"x has {x.shape[1]} columns, the model {self.c_in}")
        values, mask = values_and_mask(x, self.fill)
        names = None
        if self.embedder:
            names = self.embedder(self.column_names[dataset]).to(x.dtype)
        embed = self.embed_each_column if self.shared else self.embed_all_columns
        tokens = embed(values, mask, names)  # [batch, patches, d_model]
        tokens = self.encoder(tokens + self.positions[-tokens.shape[1] :])
        return self.head(dataset)(tokens, x)

    def embed_all_columns(self, values, mask, names):
        """Tokens [batch, patches, d_model]; names [columns, 1] are a constant channel each."""
        channels = [values, mask]
        if names is not None:
            channels.append(names.expand(values.shape))
        patches = cut_patches(torch.cat(channels, dim=1))  # [batch, channels, patches, 16]
        return self.patch_layer(patches.transpose(1, 2).flatten(2))

    def embed_each_column(self, values, mask, names):
        """Tokens [batch, patches, d_model]; names [columns, d_model] are added to each column."""
        patches = torch.cat([cut_patches(values), cut_patches(mask)], dim=-1)
        tokens = self.patch_layer(patches.transpose(1, 2))  # [batch, patches, columns, d_model]
        if names is not None:
            tokens = tokens + names.to(tokens.dtype)
        weights = self.queries(tokens).softmax(dim=2).to(tokens.dtype)
        pooled = weights.transpose(2, 3) @ tokens  # [batch, patches, queries, d_model]
        return self.join(pooled.flatten(2))


class ConvNet(nn.Module):
    """Logits [batch, classes] from windows x [batch, columns, time] by three convolutions (Wang et
    al. 2017, arXiv:1611.06455), for data sets of too few windows for a transformer.

    It reads values, mask, and the values normalized within each window.
    """

    def __init__(self, c_in, num_classes):
        super().__init__()
        self.settings = {"c_in": c_in, "num_classes": num_classes}
        self.datasets = {}
        layers, channels = [], 3 * c_in
        for kernel, outputs in ((9, 128), (5, 128), (3, 64)):
            layers += [nn.Conv1d(channels, outputs, kernel, padding=kernel // 2, bias=False),
                       nn.BatchNorm1d(outputs), nn.ReLU()]
            channels = outputs
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, num_classes)

    def add_dataset(self, metadata):
        self.datasets[metadata["name"]] = metadata

    def forward(self, x, dataset="default"):
        values, mask = values_and_mask(x, "both")
        channels = torch.cat([values, mask, normalize_windows(values, mask)], dim=1)
        return self.linear(self.layers(channels).mean(-1))


def normalize_windows(values, mask):
    """Each column of each window minus its mean over what is present, divided by its standard
    deviation; 0 where missing."""
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    centered = (values - (values * mask).sum(-1, keepdim=True) / count) * mask
    std = (centered.square().sum(-1, keepdim=True) / count).sqrt()
    return centered / (std + 1e-2)


# --- Training -----------------------------------------------------------------------------------


def gather_windows(series, starts, seq_len):
    """Windows [batch, columns, seq_len] of series [rows, columns] from rows `starts` [batch] on."""
    return series.unfold(0, seq_len, 1)[starts]


def drop_values(x, share, missing="at random"):
    """x [batch, columns, time] with a share of its values NaN: at random, in one block of each
    series, or in whole columns, of which one stays.

    `share` is a number or a tensor [batch, 1, 1].
    """
    share = torch.as_tensor(share, device=x.device)
    if missing == "at random":
        return x.masked_fill(torch.rand_like(x) < share, math.nan)
    if missing == "whole columns":
        rank = torch.rand(*x.shape[:2], 1, device=x.device).argsort(1).argsort(1)
        chance = torch.rand(len(x), 1, 1, device=x.device)  # rounds up or down, right on average
        count = (share * x.shape[1] + chance).floor().clamp(max=x.shape[1] - 1)
        return x.masked_fill(rank < count, math.nan)
    length = share * x.shape[-1]
    first = (torch.rand(*x.shape[:2], 1, device=x.device) * (x.shape[-1] - length)).round()
    t = torch.arange(x.shape[-1], device=x.device)
    return x.masked_fill((t >= first) & (t < first + length), math.nan)


def autocast(device):
    """bfloat16 on a GPU that has it; on a CPU, float32 is faster for models of this size."""
    enabled = device.type == "cuda" and has_bfloat16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def warm_up_then_cosine(step, steps):
    """Factor of the learning rate: linear over the first 5 %, then half a cosine to zero."""
    warm_up = max(1, steps // 20)
    return min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1)))


def draw_batches(datasets, steps, batch_size, device):
    """`steps` batches of each data set in random order: (number of the data set, windows [batch]).

    A batch is an eighth of few windows, so that an epoch has several steps.
    """
    batches = []
    for number, data in enumerate(datasets):
        train = torch.from_numpy(data.splits["train"])
        size = min(max(16, len(train) // 8), len(train), batch_size)
        epochs = math.ceil(steps * size / len(train))
        order = torch.cat([torch.randperm(len(train)) for _ in range(epochs)])[: steps * size]
        batches += [(number, windows) for windows in train[order].to(device).split(size)]
    return [batches[i] for i in torch.randperm(len(batches))]


def fit(model, datasets, args, seed, file, keep="best", drop=False):
    """Train a model with args.steps steps on each data set, or go on with the checkpoint in `file`,
    or load it if it is finished; returns the history, a list with a dictionary for each evaluation.

    The model ends with the weights of the best mean validation accuracy over the data sets, or,
    with keep="last", with its last weights. With `drop`, up to half of the values are left out in
    training. All that is random follows from the seed and the number of the evaluation, so that a
    resumed training ends with the same weights bit for bit.
    """
    device = next(model.parameters()).device
    tensors = [[torch.from_numpy(array).to(device)
                for array in (data.series, data.starts, data.labels)] for data in datasets]
    steps = args.steps * len(datasets)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.01,
                                  fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_up_then_cosine(step, steps))
    modules = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    state = load_state(file, modules, datasets)
    evaluations = min(args.evaluations, args.steps)
    ends = [args.steps * number // evaluations for number in range(evaluations + 1)]
    for number in range(len(state["history"]), evaluations):
        start_time = time.perf_counter()
        torch.manual_seed(1000 * seed + number)
        model.train()
        batches = draw_batches(datasets, ends[number + 1] - ends[number], args.batch_size, device)
        losses = []
        for index, windows in progress(batches, f"{file.stem}, {number + 1} of {evaluations}"):
            series, starts, labels = tensors[index]
            x = gather_windows(series, starts[windows], datasets[index].seq_len)
            if drop:
                share = 0.5 * torch.rand(len(x), 1, 1, device=device)
                x = drop_values(x, share, MISSING_KINDS[len(losses) % len(MISSING_KINDS)])
            with autocast(device):
                logits = model(x, datasets[index].name)
            loss = F.cross_entropy(logits.float(), labels[windows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
        train_loss = torch.stack(losses).mean().item()
        if not math.isfinite(train_loss):
            raise UserError(f"{file.stem}: the loss is not finite; lower --learning-rate")
        train_seconds = time.perf_counter() - start_time
        accuracies = {data.name: accuracy(model, data, "val") for data in datasets}
        state["history"].append({
            "step": ends[number + 1] * len(datasets), "train_loss": train_loss,
            "val_accuracy": accuracies, "train_seconds": train_seconds,
            "seconds": time.perf_counter() - start_time})
        end_evaluation(state, modules, keep, file, finished=number + 1 == evaluations)
    model.load_state_dict(state["best"]["model"])
    return state["history"]


def load_state(file, modules, datasets):
    """A new training state, or that of an unfinished or finished checkpoint; `modules` are then set
    to it, too."""
    data_sha256 = [data.info["sha256"] for data in datasets]
    state = {"history": [], "best": {"accuracy": -1.0}, "data_sha256": data_sha256}
    if not file.exists():
        return state
    state = load_checkpoint(file, file)
    if state["data_sha256"] != data_sha256:
        raise UserError(f"{file}: trained on other data; restore the files or start a new run")
    try:
        modules["model"].load_state_dict(state.get("model") or state["best"]["model"])
        for name in state.keys() & {"optimizer", "scheduler"}:
            modules[name].load_state_dict(state[name])
    except RuntimeError:
        raise UserError(f"{file}: from another version of {EXPERIMENT}.py") from None
    return state


def end_evaluation(state, modules, keep, file, finished):
    """Keep the best or the last weights and write the checkpoint: with all that training needs, or,
    once it is finished, with all that prediction needs."""
    model = modules["model"]
    val_accuracy = float(np.mean(list(state["history"][-1]["val_accuracy"].values())))
    if keep == "last" or val_accuracy > state["best"]["accuracy"]:
        weights = copy.deepcopy(model.state_dict())
        state["best"] = {"accuracy": val_accuracy, "model": weights}
    for name, module in modules.items():
        state[name] = module.state_dict()
    checkpoint = state
    if finished:
        settings = dict(model.settings)
        if settings.get("strategy") == "frozen_bert":  # prediction then needs no encoder
            embedder = model.embedder
            settings["known"] = {name: embedder.embed([name])[0].cpu() for name in embedder.rows}
        checkpoint = {key: state[key] for key in ("history", "best", "data_sha256")}
        checkpoint |= {"class": type(model).__name__, "settings": settings,
                       "datasets": model.datasets}
    with atomic_write(file) as path:
        torch.save(checkpoint, path)


@torch.inference_mode()
def predict(model, data, split, corrupt=None):
    """Logits [windows, classes] of a split; `corrupt` changes x [batch, columns, time] first."""
    model.eval()
    device = next(model.parameters()).device
    series = torch.from_numpy(data.series).to(device)
    starts = torch.from_numpy(data.starts[data.splits[split]]).to(device)
    outputs = []
    for batch in starts.split(max(16, 100_000 // data.seq_len)):
        x = gather_windows(series, batch, data.seq_len)
        if corrupt:
            x = corrupt(x)
        with autocast(device):
            outputs.append(model(x, data.name).float())
    return torch.cat(outputs).cpu().numpy()


def accuracy(model, data, split):
    """Share of the windows of a split that the model classifies correctly."""
    predicted = predict(model, data, split).argmax(1)
    return float(np.mean(predicted == data.labels[data.splits[split]]))


# --- Evaluation: baselines ----------------------------------------------------------------------


def make_record(data, model, predicted, **columns):
    """One row of the results: accuracy and macro F1 of the classes [windows] predicted for the test
    part. The F1 is over the classes that occur."""
    from sklearn.metrics import f1_score

    labels = data.labels[data.splits["test"]]
    macro_f1 = f1_score(labels, predicted, labels=np.unique(labels), average="macro",
                        zero_division=0)
    return {"dataset": data.name, "model": model, "accuracy": float(np.mean(labels == predicted)),
            "macro_f1": float(macro_f1), "parameters": None} | columns


def window_features(data, split):
    """Features [windows, 7 * columns] for baselines: last value, mean, standard deviation, minimum,
    maximum, slope and share missing of each column."""
    series, features = torch.from_numpy(data.series), []
    t = torch.linspace(-1, 1, data.seq_len)
    for starts in torch.from_numpy(data.starts[data.splits[split]]).split(4096):
        x = gather_windows(series, starts, data.seq_len)
        missing = x.isnan()
        last = forward_fill(x)[..., -1].nan_to_num()
        mean = x.nanmean(-1).nan_to_num()
        x = torch.where(missing, mean[..., None], x)
        features.append(torch.cat([
            last, mean, x.std(-1, correction=0), x.amin(-1), x.amax(-1), x @ t / (t @ t),
            missing.float().mean(-1)], dim=1))
    return torch.cat(features).numpy()


class Hydra:
    """Features of windows by competing convolutions (Dempster et al. 2023, arXiv:2203.13652), for a
    ridge classifier.

    At each step the random kernels of a group compete: the one with the largest output gets that
    output, the one with the smallest is counted. Every dilation has `groups` groups, half of them
    on the differences between steps; of several columns, a group reads the sum of a random few.
    """

    def __init__(self, columns, seq_len, groups=64, kernels=8, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.kernels = kernels
        self.parts = []  # (dilation, on differences, weights [kernels, 1, 9], columns)
        count = max(1, min(8, columns // 2))
        for exponent in range(1 + int(math.log2(max(1, (seq_len - 1) / 8)))):
            for on_differences in (False, True):
                weights = torch.randn(groups // 2 * kernels, 1, 9, generator=generator)
                weights = weights - weights.mean(-1, keepdim=True)
                weights = weights / weights.abs().sum(-1, keepdim=True)
                chosen = torch.stack([torch.randperm(columns, generator=generator)[:count]
                                      for _ in range(groups // 2)])
                self.parts.append((2**exponent, on_differences, weights, chosen))

    def transform(self, x):
        """Features [batch, features] of x [batch, columns, time] without NaN."""
        features = []
        differences = F.pad(x.diff(dim=-1), (0, int(x.shape[-1] == 1)))
        for dilation, on_differences, weights, chosen in self.parts:
            source = differences if on_differences else x
            mixed = F.pad(source[:, chosen].sum(2), (4 * dilation, 4 * dilation))
            output = F.conv1d(mixed, weights, dilation=dilation, groups=len(chosen))
            output = output.unflatten(1, (len(chosen), self.kernels))
            largest, winner = output.max(2)  # [batch, groups, time]
            loser = output.min(2).indices
            empty = torch.zeros(output.shape[:3])
            features.append(empty.scatter_add(2, winner, largest).flatten(1))
            features.append(empty.scatter_add(2, loser, torch.ones_like(largest)).flatten(1))
        return torch.cat(features, dim=1)


class HydraClassifier:
    """Hydra's features, scaled as its authors do, and a ridge classifier, fitted to at most 4,000
    training windows."""

    def features(self, data, windows):
        series, features = torch.from_numpy(data.series), []
        for starts in torch.from_numpy(data.starts[windows]).split(64):
            x = forward_fill(gather_windows(series, starts, data.seq_len)).nan_to_num()
            features.append(self.hydra.transform(x))
        return torch.cat(features).clamp(min=0).sqrt()

    def scale(self, features):
        return ((features - self.mean) * (features != 0) / self.std).numpy()

    def fit(self, data):
        from sklearn.linear_model import RidgeClassifierCV

        windows = data.splits["train"]
        windows = windows[:: math.ceil(len(windows) / 4000)]
        self.hydra = Hydra(len(data.columns), data.seq_len)
        features = self.features(data, windows)
        self.mean = features.mean(0)
        # A rare count has hardly any spread: the more zeros, the more is added to it.
        self.std = features.std(0) + (features == 0).float().mean(0) ** 4 + 1e-8
        self.ridge = RidgeClassifierCV(np.logspace(-3, 3, 10))
        self.ridge.fit(self.scale(features), data.labels[windows])
        return self

    def probabilities(self, data, split):
        """[windows, classes]: the softmax of twice the outputs, which lie about -1 and 1."""
        outputs = self.ridge.decision_function(self.scale(self.features(data, data.splits[split])))
        if outputs.ndim == 1:  # two classes
            outputs = np.stack([-outputs, outputs], axis=1)
        probabilities = np.zeros((len(outputs), len(data.classes)))
        probabilities[:, self.ridge.classes_] = torch.from_numpy(2 * outputs).softmax(1).numpy()
        return probabilities


def fit_hydra(data):
    """(Hydra's probabilities [windows, classes] for the test part, seconds)."""
    start_time = time.perf_counter()
    probabilities = HydraClassifier().fit(with_validation(data)).probabilities(data, "test")
    return probabilities, time.perf_counter() - start_time


def with_validation(data):
    """The data set with its validation windows in the training part."""
    train = np.sort(np.concatenate([data.splits["train"], data.splits["val"]]))
    return replace(data, splits=data.splits | {"train": train})


def baseline_records(data, seed, hydra):
    """Records of the majority class, logistic regression and boosting on window features, what
    fit_hydra returned, and, where a column's next value is classified, persistence.

    They choose nothing on the validation part, so they are fitted to it as well.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = with_validation(data)
    x_train, x_test = window_features(data, "train"), window_features(data, "test")
    y_train = data.labels[data.splits["train"]]
    leaf = int(np.clip(len(y_train) // 20, 1, 20))  # with 20, no tree can split 30 windows
    models = {
        "majority class": DummyClassifier(),
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
        "gradient boosting": HistGradientBoostingClassifier(
            early_stopping=False, min_samples_leaf=leaf, random_state=0)}
    records = []
    if data.target is not None:
        last_value = x_test[:, data.target]  # the last values are the first features
        predicted = np.digitize(last_value, data.limits)
        records.append(make_record(data, "persistence", predicted, seed=seed, seconds=0.0))
    for name, model in models.items():
        start_time = time.perf_counter()
        predicted = model.fit(x_train, y_train).predict(x_test)
        seconds = time.perf_counter() - start_time
        records.append(make_record(data, name, predicted, seed=seed, seconds=seconds))
    probabilities, seconds = hydra
    predicted = probabilities.argmax(1)
    return [*records, make_record(data, "hydra", predicted, seed=seed, seconds=seconds)]


# --- Evaluation: tables -------------------------------------------------------------------------


def percent(values, sign=""):
    """Mean of shares in percent, with its 95 % interval where there are several.

    With `sign` "+" they are differences, and a star says that the interval excludes 0.
    """
    mean, width = mean_and_interval(100 * np.asarray(values, float))
    if len(values) == 1:
        return f"{mean:{sign}.2f}"
    star = " *" if sign and abs(mean) > width else ""
    return f"{mean:{sign}.2f} ± {width:.2f}{star}"


def difference(accuracies, model, other):
    """Accuracy of one model minus that of another, paired by seed, as percent(); None where either
    is missing. `accuracies` is a table [seed, model]."""
    if model == other or not {model, other} <= set(accuracies):
        return None
    return percent((accuracies[model] - accuracies[other]).dropna(), "+")


def add_means(records):
    """The records with those of a data set "mean of all": of each model and seed that occurs in all
    data sets, where there are several."""
    count = records["dataset"].nunique()
    if count == 1:
        return records
    groups = records.groupby(["model", "seed"], sort=False)
    means = groups[["accuracy", "macro_f1", "seconds"]].mean()[groups.size() == count]
    return pd.concat([records, means.reset_index().assign(dataset="mean of all")])


def benchmark_table(records, original):
    """Rows {column: value} for each data set and model, with differences paired by seed."""
    records = add_means(pd.DataFrame(records))
    records["parameters"] = records["parameters"].map("{:,.0f}".format, na_action="ignore")
    rows = []
    for name, of_dataset in records.groupby("dataset", sort=False):
        accuracies = of_dataset.pivot_table("accuracy", "seed", "model")
        for model, runs in of_dataset.groupby("model", sort=False):
            plain, strategy = model, model.removeprefix("shared, ")
            if strategy in STRATEGIES:
                plain = model.removesuffix(strategy) + "none"
            rows.append({
                "data set": name, "model": model, "accuracy %": percent(runs["accuracy"]),
                "macro F1 %": percent(runs["macro_f1"]),
                "minus none": difference(accuracies, model, plain),
                "minus per-dataset": difference(accuracies, model, strategy),
                "original %": original.get(name, {}).get(model),
                "parameters": runs["parameters"].iloc[0],
                "seconds": f"{runs['seconds'].mean():.1f}"})
    return rows


def share_table(records, keys):
    """Rows {column: value} of the accuracy [%]: a row for each combination of the columns `keys`, a
    column for each share."""
    table = pd.DataFrame(records).pivot_table("accuracy", keys, "share", percent, sort=False)
    table = table[sorted(table)].rename(columns="{:.0%}".format)
    return table.reset_index().to_dict("records")


# --- Pictures -----------------------------------------------------------------------------------


def plot_benchmark(records, datasets, path):
    """Accuracy of every model: for each data set where there are few, otherwise on average."""
    records = pd.DataFrame(records)
    records = records[records["model"] != "majority class"]
    names = [data.name for data in datasets]
    chance = [100 / len(data.classes) for data in datasets]
    if len(names) > 6:
        fig, (axis,) = new_figure("Test accuracy", size=(11, 5))
        means = 100 * records.groupby("model", sort=False)["accuracy"].mean()
        plot_ranking(axis, means.to_dict(), "{:.1f}")
        axis.axvline(np.mean(chance), linestyle="--", color="0.4")
        axis.set(xlabel=f"accuracy [%], mean over {len(names)} data sets; dashed: chance",
                 xlim=(0, 105))
        return save_figure(fig, path)
    fig, (axis,) = new_figure("Test accuracy, with the 95 % interval where there are several runs",
                              size=(11, 2 + 1.4 * len(names)))
    runs = dict(list(records.groupby(["dataset", "model"])["accuracy"]))
    means, errors = {}, {}
    for model in records["model"].unique():
        intervals = [mean_and_interval(runs.get((name, model), [np.nan])) for name in names]
        means[model], errors[model] = 100 * np.array(intervals, float).T
    plot_dots(axis, names, means, errors=errors)
    for row, value in enumerate(chance):
        label = None if row else "chance"
        axis.plot([value, value], [row - 0.4, row + 0.4], "--", color="0.4", label=label)
    axis.set(xlabel="accuracy [%]", xlim=(0, 101))
    legend_below(axis, 5)
    return save_figure(fig, path)


def plot_shares(records, title, xlabel, panel, classes, path):
    """Accuracy over the column `share` of the records, a line for each model and a panel for each
    value of the column `panel`; chance is one of `classes`."""
    records = pd.DataFrame(records)
    panels = records[panel].unique()
    fig, axes = new_figure(title, 1, len(panels), (5 * len(panels) + 3, 4.5))
    for axis, name in zip(axes, panels):
        shown = records[records[panel] == name]
        models = shown["model"].unique()
        for i, model in enumerate(models):  # the bands of many models would hide each other
            runs = 100 * shown[shown["model"] == model].pivot_table("accuracy", "seed", "share")
            values = runs.to_numpy() if len(models) < 6 else runs.mean().to_numpy()
            plot_curve(axis, 100 * runs.columns, values, model, i, MARKERS[i % 7])
        axis.axhline(100 / len(classes), linestyle="--", color="0.4", label="chance")
        shares = sorted(shown["share"].unique())
        if shares[-1] == 1:  # 0, 5, 10 and 100 %
            axis.set_xscale("symlog", linthresh=10)
            axis.set_xlim(-1, 110)
        axis.set_xticks([100 * share for share in shares], [f"{share:.0%}" for share in shares])
        low, high = axis.get_ylim()  # an interval may reach beyond what an accuracy can be
        axis.set(title=name, xlabel=xlabel, ylabel="test accuracy [%]",
                 ylim=(max(low, 0), min(high, 101)))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    save_figure(fig, path)


# --- The experiment -----------------------------------------------------------------------------


def make_model(args, datasets, strategy, shared, seed, fill="both", min_seq_len=0):
    """An untrained model for the data sets, and for windows of min_seq_len, on the device."""
    seed_everything(seed)
    seq_len = max(min_seq_len, *(data.seq_len for data in datasets))
    options = bert_options(args) if strategy == "frozen_bert" else {}
    model = MultiDatasetPatchDuET(len(datasets[0].columns), seq_len, strategy, shared, args.head,
                                  fill, args.dropout, **options)
    for data in datasets:
        model.add_dataset(data.metadata())
    return model.to(args.device)


def bert_options(args):
    """The arguments that FrozenBERTColumnEmbedder needs."""
    return {"bert_model": args.bert_model, "tokenization": args.tokenization,
            "cache_dir": str(Path(args.data_dir) / "column_embeddings"), "offline": args.quick}


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def evaluate(model, data, name, history=(), corrupt=None, **columns):
    """The record of a trained model on the test part of a data set."""
    predicted = predict(model, data, "test", corrupt).argmax(1)
    seconds = sum(entry["seconds"] for entry in history)
    return make_record(data, name, predicted, seconds=seconds, parameters=count_parameters(model),
                       **columns)


def train_convolutions(args, data, members, hydra, seed, run_dir):
    """Records of the mean of several ConvNets, and of that mean together with Hydra.

    They train on training and validation windows, for twice the steps, and choose nothing.
    """
    whole = with_validation(data)
    conv_args = argparse.Namespace(**vars(args) | {
        "batch_size": min(args.batch_size, 32), "steps": 2 * args.steps})
    logits, seconds, parameters = [], 0.0, 0
    for member in range(members):
        member_seed = seed + 1000 * member
        seed_everything(member_seed)
        model = ConvNet(len(data.columns), len(data.classes)).to(args.device)
        model.add_dataset(data.metadata())
        file = run_dir / f"models/{data.name}-conv-{seed}-{member}.pt"
        history = fit(model, [whole], conv_args, member_seed, file, keep="last")
        seconds += sum(entry["seconds"] for entry in history)
        parameters += count_parameters(model)
        logits.append(predict(model, data, "test"))
    conv = torch.from_numpy(np.stack(logits)).softmax(-1).mean(0).numpy()
    probabilities, hydra_seconds = hydra
    columns = {"seed": seed, "parameters": parameters}
    return [make_record(data, "conv", conv.argmax(1), seconds=seconds, **columns),
            make_record(data, "conv + hydra", (conv + probabilities).argmax(1),
                        seconds=seconds + hydra_seconds, **columns)]


def train_strategies(args, datasets, strategies, seed, run_dir):
    """Records of a model for each data set and strategy, and of the shared models."""
    groups = []  # (name, data sets, shared)
    if args.shared != "only":
        groups += [(data.name, [data], False) for data in datasets]
    if args.shared:
        groups.append(("shared", datasets, True))
    records = []
    for (name, group, shared), strategy in itertools.product(groups, strategies):
        model = make_model(args, group, strategy, shared, seed)
        history = fit(model, group, args, seed, run_dir / f"models/{name}-{strategy}-{seed}.pt")
        label = f"shared, {strategy}" if shared else strategy
        tested = [evaluate(model, data, label, history, seed=seed) for data in group]
        mean = np.mean([record["accuracy"] for record in tested])
        log(f"{name}, {strategy}, seed {seed}: test accuracy {mean:.2%}")
        records += tested
    return records


def benchmark(args, datasets, strategies, run_dir):
    """Baselines, convolutions where --conv-members asks for them, and every strategy."""
    records, hydra = [], {}
    for data in progress(datasets, "baselines"):
        hydra[data.name] = fit_hydra(data)
        records += baseline_records(data, args.seed, hydra[data.name])
    for seed in range(args.seed, args.seed + args.runs):
        for data in datasets:
            members = args.conv_members
            if members is None:
                members = 3 if data.info.get("archive") else 0
            if members:
                records += train_convolutions(args, data, members, hydra[data.name], seed,
                                              run_dir)
        records += train_strategies(args, datasets, strategies, seed, run_dir)
    plot_benchmark(records, datasets, run_dir / "benchmark.png")
    table = benchmark_table(records, original_figures(args, datasets))
    if len(datasets) > 6:  # the records have every data set
        table = [row for row in table if row["data set"] == "mean of all"]
    text = f"{answer(table)}\n\nSeconds are those of one training, of a shared model on all data."
    if any(row["original %"] for row in table):
        text += " The original's figures are single runs, scored at their last or best epoch."
    return {"records": records, "tables": {"accuracy": table}, "note": text}


def original_figures(args, datasets):
    """The part of ORIGINAL_TABLE that was made with the data sets of this run."""
    if args.head != "mean" or args.data or args.protocol == "holdout":
        return {}
    names = {"etth1"} if args.protocol is None else {*EMBEDDED, "etth1"}
    if args.protocol == "original" and {data.name for data in datasets} == names:
        names = {*names, "mean of all"}
    return {name: figures for name, figures in ORIGINAL_TABLE.items() if name in names}


def answer(table):
    """The verdict on names and the best models, over all data sets where there are several."""
    rows = {row["model"]: row for row in table if row["data set"] == table[-1]["data set"]}
    ours = [model for model in rows if model.removeprefix("shared, ") in STRATEGIES]

    def name_best(models):
        best = max(models, key=lambda model: float(rows[model]["accuracy %"].split()[0]))
        return f"{best} ({rows[best]['accuracy %']} %)"

    differences = [f"{model} {rows[model]['minus none']}" for model in ours
                   if rows[model]["minus none"]]
    text = f"{table[-1]['data set']}: the best strategy is {name_best(ours)}, the best other model "
    text += name_best(set(rows) - set(ours)) + "."
    if differences:
        text += f" Difference to none in points: {'; '.join(differences)}."
    return text


def with_labels(data, share, seed):
    """The data set with a share of its training and validation labels, at least one a class."""
    splits = dict(data.splits)
    for split in ("train", "val"):
        windows = splits[split]
        _, chosen = split_at_random(data.labels[windows], share, seed, at_least=1)
        splits[split] = np.sort(windows[chosen])
    return replace(data, splits=splits)


def add_new_dataset(model, data, sources):
    """(copy of a shared model with a new data set, whether it can already classify it).

    It can if there are sources with the same classes: its head begins as the mean of theirs.
    """
    model = copy.deepcopy(model)
    model.add_dataset(data.metadata())
    head = model.head(data.name)
    others = [model.head(source.name) for source in sources if source.classes == data.classes]
    others = [other for other in others if other.kind == head.kind]
    if not others:
        return model, False
    mean = {name: torch.stack([other.state_dict()[name] for other in others]).mean(0)
            for name, _ in head.named_parameters()}
    head.load_state_dict(head.state_dict() | mean)
    return model, True


def split_sources(args, datasets):
    """(new data set, the others) of --transfer."""
    by_name = {data.name: data for data in datasets}
    name = datasets[-1].name if args.transfer == "last" else args.transfer
    if name not in by_name or len(datasets) < 2:
        raise UserError(f"--transfer {name}: name one of at least two data sets: "
                        f"{', '.join(by_name)}")
    return by_name.pop(name), list(by_name.values())


def transfer(args, datasets, strategies, run_dir):
    """A shared model on a new data set at LABEL_SHARES of its labels: pretrained on the other data
    sets, or from scratch. With few labels both train for a quarter of the steps, at least 40."""
    data, sources = split_sources(args, datasets)
    name = data.name
    steps = min(args.steps, max(40, args.steps // 4))
    few_steps = argparse.Namespace(**vars(args) | {"steps": steps})
    records = []
    for seed in range(args.seed, args.seed + args.runs):
        limited = {share: with_labels(data, share, seed) for share in LABEL_SHARES[1:]}
        for share, part in limited.items():
            baselines = baseline_records(part, seed, fit_hydra(part))
            records += [record | {"share": share} for record in baselines
                        if record["model"] in ("gradient boosting", "hydra")]
        for strategy in strategies:
            base = make_model(args, sources, strategy, True, seed, min_seq_len=data.seq_len)
            fit(base, sources, args, seed, run_dir / f"models/sources-{strategy}-{seed}.pt")
            model, can_predict = add_new_dataset(base, data, sources)
            if can_predict:
                label = f"{strategy}, pretrained"
                records.append(evaluate(model, data, label, share=0.0, seed=seed))
            for share, start in itertools.product(limited, ("pretrained", "scratch")):
                seed_everything(seed)
                if start == "pretrained":
                    model, _ = add_new_dataset(base, data, sources)
                else:
                    model = make_model(args, [data], strategy, True, seed)
                budget = args if share == 1 else few_steps
                file = run_dir / f"models/{name}-{strategy}-{start}-{share:g}-{seed}.pt"
                history = fit(model, [limited[share]], budget, seed, file)
                records.append(evaluate(model, data, f"{strategy}, {start}", history, share=share,
                                        seed=seed))
            log(f"transfer to {name}, {strategy}, seed {seed}: done")
    plot_shares(records, "Shared model on a new data set", "share of its labels", "dataset",
                data.classes, run_dir / "transfer.png")
    tables = {"accuracy": share_table(records, ["model"]),
              "differences": transfer_differences(records, strategies)}
    return {"to": name, "records": records, "tables": tables, "note": f"Test accuracy [%] on "
            f"{name} by the share of its labels; differences in points, paired by seed."}


def transfer_differences(records, strategies):
    """Rows {column: value}: pretrained minus scratch, and each strategy minus none."""
    pairs = [(f"{strategy}, pretrained", f"{strategy}, scratch") for strategy in strategies]
    if "none" in strategies:
        pairs += [(f"{strategy}, {start}", f"none, {start}") for start in ("pretrained", "scratch")
                  for strategy in strategies if strategy != "none"]
    rows = [{"model": model, "minus": other} for model, other in pairs]
    for share, group in pd.DataFrame(records).groupby("share"):
        accuracies = group.pivot_table("accuracy", "seed", "model")
        for row in rows:
            row[f"{share:.0%}"] = difference(accuracies, row["model"], row["minus"])
    return rows


def find_strategies(args, datasets):
    """The strategies to run; frozen_bert is left out with a note if its encoder cannot be had."""
    strategies = list(dict.fromkeys(args.strategies or STRATEGIES))
    if "frozen_bert" in strategies:
        try:
            embedder = FrozenBERTColumnEmbedder(**bert_options(args))
            embedder.add([name for data in datasets for name in data.columns])
        except (UserError, ModuleNotFoundError) as error:
            if strategies == ["frozen_bert"]:
                raise
            strategies.remove("frozen_bert")
            note(f"frozen_bert is not run: {error}")
    return strategies


def choose_threads():
    """2, or 1 on a busy machine, where two threads wait for each other and can be ten times slower
    than one; more than 2 hardly help such small models."""
    x = torch.randn(512, 512)
    seconds = {}
    for threads in (2, 2, 1):  # the first time warms up
        torch.set_num_threads(threads)
        start_time = time.perf_counter()
        for _ in range(40):
            x @ x
        seconds[threads] = time.perf_counter() - start_time
    return 2 if seconds[2] < 0.9 * seconds[1] else 1


def note_memory(datasets, args):
    """A note before a training that needs gigabytes."""
    longest = max(data.seq_len for data in datasets)
    patches = num_patches(longest)
    floats = patches * (2 * 2048 + 600)  # mostly the 2048 hidden units, before and after ReLU
    gigabytes = args.batch_size * floats * 2 * 4 / 1e9  # 2 layers, 4 bytes
    if gigabytes > 4:
        note(f"windows of {longest:,} steps need about {gigabytes:.0f} GB in training; a lower "
             "--batch-size needs less")


def run_experiment(args):
    """Load the data sets, run the experiments that the arguments name, and write the results."""
    args = argparse.Namespace(**vars(args) | {"threads": args.threads or choose_threads()})
    torch.set_num_threads(args.threads)
    datasets = load_datasets(args)
    note_memory(datasets, args)
    strategies = find_strategies(args, datasets)
    experiments = {}
    if args.nan_robustness:
        experiments["nan_robustness"] = nan_robustness
    if args.transfer and not (args.quick and len(datasets) < 2):
        split_sources(args, datasets)  # an error is told before anything is trained
        experiments["transfer"] = transfer
    if args.quick or not experiments:
        experiments["benchmark"] = benchmark
    run_dir = next_run_dir(args)
    (run_dir / "models").mkdir(exist_ok=True)
    results = {"data": {data.name: data.info for data in datasets}, "seconds": {}}
    for name, experiment in experiments.items():
        start_time = time.perf_counter()
        results[name] = experiment(args, datasets, strategies, run_dir)
        results["seconds"][name] = time.perf_counter() - start_time
    return write_results(results, summarize(results, experiments, args), args, run_dir)


def summarize(results, experiments, args):
    """The data sets, tables and notes of a run as Markdown."""
    parts = []
    for name, info in results["data"].items():
        columns = ", ".join(f"{column} ({words})" for column, words in info["columns"].items())
        source = info["source"] + (f", protocol {info['protocol']}" if "protocol" in info else "")
        parts.append(f"{name}: {source}, {info['rows']:,} rows, {columns}")
    for experiment in experiments:
        for name, rows in results[experiment]["tables"].items():
            table = pd.DataFrame(rows, dtype=object).dropna(axis=1, how="all")
            title = f"## {experiment.replace('_', ' ')}: {name}"
            parts.append(f"{title}\n\n{markdown_table(table)}")
        parts.append(results[experiment]["note"])
    if args.runs > 1:
        parts.append("±: 95 % interval of the mean over the seeds (Student's t), which vary the "
                     "initial weights, the order of batches and, in a transfer, the choice of "
                     "labels, but not the test part. *: the interval of a difference excludes 0 "
                     "(paired t-test, not corrected for the number of comparisons).")
    return "\n\n".join(parts) + "\n"


def run(args):
    """Do what the arguments ask for."""
    if args.prewarm or args.cache_stats:
        return manage_cache(args)
    if args.predict:
        return predict_file(args)
    if args.columns:
        return compare_columns(args)
    return run_experiment(args)


# --- Extra: missing values ----------------------------------------------------------------------


def nan_robustness(args, datasets, strategies, run_dir):
    """Models with four ways to fill, on test windows with more and more values missing.

    All train alike, with up to half of the values left out at random, in blocks and as whole
    columns in turn.
    """
    if not args.strategies:
        strategies = ["none"]
    records = []
    for data in datasets:
        for seed in range(args.seed, args.seed + args.runs):
            for strategy, (fill, fill_name) in itertools.product(strategies, FILLS.items()):
                model = make_model(args, [data], strategy, False, seed, fill)
                file = run_dir / f"models/{data.name}-{strategy}-{fill}-{seed}.pt"
                fit(model, [data], args, seed, file, drop=True)
                label = f"{strategy}, {fill_name}"
                for missing, share in itertools.product(MISSING_KINDS, MISSING_SHARES):
                    torch.manual_seed(seed)  # the same values are missing for every model
                    corrupt = functools.partial(drop_values, share=share, missing=missing)
                    records.append(evaluate(model, data, label, corrupt=corrupt, share=share,
                                            seed=seed, missing=missing))
            log(f"missing values, {data.name}, seed {seed}: done")
        shown = [record for record in records if record["dataset"] == data.name]
        plot_shares(shown, f"{data.name}: test accuracy with missing values", "values left out",
                    "missing", data.classes, run_dir / f"nan_robustness_{data.name}.png")
    tables = {"accuracy": share_table(records, ["dataset", "missing", "model"])}
    return {"records": records, "tables": tables, "note": "Test accuracy [%] by the share of "
            "values left out, beyond those that the data lack."}


# --- Extra: classify the windows of a file ------------------------------------------------------


def restore_model(path, device):
    """The trained model in a checkpoint; its `datasets` has the metadata of its data sets."""
    checkpoint = load_checkpoint(path, path)
    classes = {"MultiDatasetPatchDuET": MultiDatasetPatchDuET, "ConvNet": ConvNet}
    try:
        model = classes[checkpoint["class"]](**checkpoint["settings"])
        for metadata in checkpoint["datasets"].values():
            model.add_dataset(metadata)
        model.load_state_dict(checkpoint["best"]["model"])
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a finished model of this {EXPERIMENT}.py ({error}); name a "
                        "file in models/ of a finished run") from None
    return model.to(device)


def match_columns(wanted, found):
    """{wanted name: found name or None}: the same name, or one of the same words, each once."""
    free = {name_to_words(name): name for name in reversed(list(found)) if name not in wanted}
    return {name: name if name in found else free.pop(name_to_words(name), None)
            for name in wanted}


def read_windows(path, datasets):
    """(windows of a CSV or archive file as a Dataset, a DataFrame that identifies them, names of
    missing columns).

    The file is read as the one of `datasets` (metadata) of which it has most columns.
    """
    dates = None
    if is_archive_file(path):
        cases, _ = read_archive_file(path, labelled=False)
        found = [f"dim_{i}" for i in range(len(cases[0]))]
    else:
        numbers, dates = read_csv(path)
        found = list(numbers)
    matches = [match_columns(metadata["columns"], found) for metadata in datasets]
    shares = [np.mean([name is not None for name in match.values()]) for match in matches]
    best = [i for i, share in enumerate(shares) if share == max(shares)]
    if len(best) > 1:  # the columns of all archive files have the same names
        stem = re.sub(r"_(train|test)$", "", path.stem, flags=re.I)
        best = [i for i in best if datasets[i]["name"] == stem]
    if not best:
        names = ", ".join(metadata["name"] for metadata in datasets)
        raise UserError(f"{path}: its columns fit several data sets; name the file after one of "
                        f"{names}")
    match, metadata = matches[best[0]], datasets[best[0]]
    unused = set(found) - set(match.values())
    if unused and is_archive_file(path):
        note(f"{path}: its dimensions {', '.join(sorted(unused))} are not used")
    missing = [name for name, found_name in match.items() if found_name is None]
    if len(missing) == len(match):
        raise UserError(f"{path}: none of the columns {', '.join(match)}, only {', '.join(found)}")
    if missing:
        note(f"{path}: no column {', '.join(missing)}; their values count as missing")
    seq_len = metadata["seq_len"]
    if is_archive_file(path):
        if max(len(values) for case in cases for values in case) > seq_len:
            note(f"{path}: only the last {seq_len} steps of longer series are read")
        numbers = pd.DataFrame(stack_cases(cases, seq_len), columns=found)
        starts = seq_len * np.arange(len(cases))
        about = pd.DataFrame({"case": np.arange(1, len(cases) + 1)})
    else:
        last_rows = np.arange(min(seq_len, len(numbers)) - 1, len(numbers))
        about = pd.DataFrame({"last row": numbers.index[last_rows] + 2})  # row 1 is the header
        if dates:
            about["date"] = [dates[row] for row in last_rows]
        padding = max(0, seq_len - len(numbers))  # a short file is one window
        numbers = numbers.reset_index(drop=True).reindex(range(-padding, len(numbers)))
        starts = np.arange(len(last_rows))
    columns = [numbers[name] if name else pd.Series(np.nan, numbers.index)
               for name in match.values()]
    series = np.stack(columns, axis=1)
    series = standardize(series, metadata["mean"], metadata["std"])
    data = Dataset(metadata["name"], list(match), series, starts, None, metadata["classes"],
                   {"all": np.arange(len(starts))}, seq_len)
    return data, about, missing


def predict_file(args):
    """Write the class and the probabilities of every window of --predict to predictions.csv."""
    model = restore_model(args.checkpoint, args.device)
    path = Path(args.predict)
    data, table, missing = read_windows(path, list(model.datasets.values()))
    run_dir = next_run_dir(args)
    probabilities = torch.from_numpy(predict(model, data, "all")).softmax(1).numpy()
    table["class"] = np.array(data.classes)[probabilities.argmax(1)]
    for name, column in zip(data.classes, probabilities.T):
        table[f"p({name})"] = column.round(4)
    table.to_csv(run_dir / "predictions.csv", index=False)
    counts = table["class"].value_counts().reindex(data.classes, fill_value=0)
    rows = [{"class": name, "windows": int(count)} for name, count in counts.items()]
    summary = (f"{markdown_table(rows)}\n\n{path}, read as {data.name}; each window is in "
               "predictions.csv.\n")
    results = {"dataset": data.name, "windows": len(table), "missing": missing, "classes": rows}
    return write_results(results, summary, args, run_dir)


# --- Extra: which column names are near each other ----------------------------------------------


def compare_columns(args):
    """Cosine similarity of column names by the frozen encoder or the embeddings of --checkpoint."""
    tables = {}
    if args.checkpoint:
        embedder = getattr(restore_model(args.checkpoint, "cpu"), "embedder", None)
        if embedder is None:
            raise UserError(f"{args.checkpoint}: a model without column embeddings")
        names = list(embedder.rows)
    else:
        columns = [name for data in load_datasets(args) for name in data.columns]
        names = list(dict.fromkeys([*PROBES, *columns]))
        tables["is temp nearer to temperature than to price?"] = compare_probes(args)
        embedder = FrozenBERTColumnEmbedder(**bert_options(args))
    vectors = F.normalize(embedder.embed(names).detach().double(), dim=1).numpy()
    similarity = pd.DataFrame(vectors @ vectors.T, index=names, columns=names)
    run_dir = next_run_dir(args)
    similarity.round(4).to_csv(run_dir / "column_similarity.csv")
    if len(names) > 2:
        plot_columns(similarity, vectors, run_dir / "columns.png")
    nearest = []
    for name, row in similarity.items():
        best = row.drop(name).nlargest(3)
        nearest.append({"column": name, "read as": name_to_words(name)} | {
            f"nearest {i}": f"{other} ({value:.2f})"
            for i, (other, value) in enumerate(best.items(), start=1)})
    tables["nearest names"] = nearest
    parts = [f"## {title}\n\n{markdown_table(rows)}" for title, rows in tables.items()]
    summary = "\n\n".join([*parts, "Cosine similarity of the embeddings.\n"])
    return write_results({"tables": tables}, summary, args, run_dir)


def compare_probes(args):
    """The original's question, for both ways to read a name."""
    rows = []
    for tokenization in ("raw", "words"):
        options = bert_options(args) | {"tokenization": tokenization}
        embedder = FrozenBERTColumnEmbedder(**options)
        temp, temperature, price = F.normalize(embedder.embed(PROBES), dim=1)
        rows.append({"read as": tokenization, "temp, temperature": f"{temp @ temperature:.3f}",
                     "temp, price": f"{temp @ price:.3f}"})
    return rows


def plot_columns(similarity, vectors, path):
    """Heatmap of the similarities beside the names' first two principal components."""
    names = list(similarity)
    fig, axes = new_figure("Column names by their embedding", 1, 2, (15, 7))
    low = min(0, similarity.to_numpy().min())
    image = axes[0].imshow(similarity, cmap="Greys", vmin=low, vmax=1, aspect="auto")
    fig.colorbar(image, ax=axes[0], label="cosine similarity", shrink=0.8)
    if len(names) <= 45:
        labels = [f"{name}  {i}" for i, name in enumerate(names, start=1)]
        axes[0].set_yticks(range(len(names)), labels, fontsize=8)
        axes[0].set_xticks(range(len(names)), range(1, len(names) + 1), fontsize=6)
    axes[0].grid(visible=False)
    u, s, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    points = u[:, :2] * s[:2]
    axes[1].scatter(*points.T, s=12)
    label_size = np.ptp(points, axis=0) * (0.06, 0.03)
    places = []  # [point, numbers]: names that lie together share a label
    for number, point in enumerate(points, start=1):
        near = [place for place in places if (np.abs(point - place[0]) < label_size).all()]
        if near:
            near[0][1] += f", {number}"
        else:
            places.append([point, str(number)])
    for point, numbers in places:
        axes[1].annotate(numbers, point, (3, 3), textcoords="offset points", fontsize=8)
    first, second = 100 * s[:2] ** 2 / (s**2).sum()
    axes[1].set(title="principal components, numbered as on the left",
                xlabel=f"first ({first:.0f} % of the variance)",
                ylabel=f"second ({second:.0f} % of the variance)")
    save_figure(fig, path)


# --- Extra: the cache of name embeddings --------------------------------------------------------


def manage_cache(args):
    """Cache the names in --prewarm; returns and prints what the cache holds."""
    options = bert_options(args)
    if args.prewarm:
        names = [line.strip() for line in read_text(args.prewarm).splitlines()]
        FrozenBERTColumnEmbedder(**options).add(filter(None, names))
    path = find_cache(args.bert_model, options["cache_dir"])
    stats = cache_stats(args.bert_model, path)
    print(json.dumps(stats, indent=1))
    return stats


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
