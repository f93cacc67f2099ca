"""Do column names help a time-series transformer, and can one set of weights serve tables with different columns?

Method: windows of 96 steps are classified by a patch transformer that reads each column's values, the last one where
one is missing, and, as a second channel, which of them are present. Strategies for the columns' names: `none`, a
learned vocabulary that grows (`auto_expanding`), a frozen BERT read once and cached (`frozen_bert`), a fixed random
vector for each name as a control (`random_names`). Per-dataset models join all columns in one patch layer; the shared
model (--shared) treats each column alone, with its name's embedding, and lets columns attend to each other. Beside
them: the majority class, persistence, logistic regression, gradient boosting and Hydra, and on the archives' files
convolutions, alone and averaged with Hydra.

    python duet.py                                             # three data sets, all strategies: 5 minutes
    python duet.py --quick                                     # every experiment, small, no network: a minute
    python duet.py --shared --runs 5                           # one model for all, mean ± 95 % interval
    python duet.py --dataset etth1 --head ordinal              # what it takes to beat persistence
    python duet.py --data sales.csv --target price --num-classes 4
    python duet.py --data BasicMotions/                        # the UEA/UCR .ts format
    python duet.py --transfer --synthetic-schemas 8            # new columns with 0, 5, 10, 100 % of the labels
    python duet.py --nan-robustness --dataset user_metrics
    python duet.py --columns --bert-model FOLDER               # which names lie near each other
    python duet.py --predict new.csv --checkpoint outputs/duet/run-001/models/etth1-none-42.pt

Written to outputs/duet/run-001/ (the next free number): results.json, summary.md, pictures, models/*.pt.

A column's embedding is constant over time, so through one patch layer it is only a bias: inside one data set the three
strategies are the same class of functions, and a difference is one of optimization. In the shared model it tells the
columns apart.

Sources: Nie et al. 2023 (patches), Devlin et al. 2019 (BERT), McCullagh 1980 (the ordinal head), Zhou et al. 2021
(ETTh1), Bagnall et al. 2018 (the .ts archive); a public plan, "Multi-Dataset Training Plan for DuET", whose table is
reprinted as the original's; github.com/kailukowiak/TREA-C, whose synthetic data --protocol original makes.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import gc
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from common import (MARKERS, detect_device, has_bfloat16, in_notebook, legend_below, mean_and_interval, new_figure,
                    plot_curve, plot_dots, plot_ranking, save_figure, seed_everything)

try:
    import resource
except ImportError:  # Windows: memory is then not reported
    resource = None

SEQ_LEN, PATCH_LEN, STRIDE = 96, 16, 8
STRATEGIES = ["none", "auto_expanding", "frozen_bert", "random_names"]
ETTH1_URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv"
ETTH1_SHA256 = "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"
ORIGINAL_CLAIM = {"temperature_sensors": {"none": 99.5, "auto_expanding": 99.5, "frozen_bert": 100.0},
                  "user_metrics": {"none": 99.0, "auto_expanding": 99.0},
                  "etth1": {"none": 79.7, "auto_expanding": 87.5},
                  "mean of all": {"none": 92.8, "auto_expanding": 95.3, "frozen_bert": 93.8}}
SERIES_FILES = [".ts", ".tsv", ".txt"]  # of the UEA and UCR archives
FILLS = {"both": "forward fill and mask", "mask": "value and mask", "zero": "zero fill", "forward": "forward fill"}
MISSING = ["at random", "in blocks", "whole columns"]
MISSING_SHARES = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
LABEL_SHARES = [0.0, 0.05, 0.1, 1.0]
INTERVAL = ("± is the 95 % interval of the mean over the seeds (Student's t). It covers initial weights, order of "
            "batches and, in a transfer, the choice of labels; not that of the test part. * marks a difference whose "
            "interval leaves 0 out (paired t-test); the comparisons are not corrected for their number.")
PROBES = ["temp", "temperature", "price"]  # the original's question: is "temp" nearer to "temperature" than to "price"?

# The embedded data sets: {column: (level, scale)}, and the pair of which the second may follow the first.
EMBEDDED = {
    "temperature_sensors": ({"indoor_temp": (21, 1.5), "outdoor_temp": (12, 4), "humidity": (55, 8),
                             "pressure": (1013, 6)}, ("outdoor_temp", "indoor_temp")),
    "user_metrics": ({"user_count": (800, 150), "session_duration": (300, 60), "page_views": (4000, 900),
                      "click_rate": (0.04, 0.01), "conversion_rate": (0.02, 0.005)}, ("user_count", "page_views")),
}
# Synthetic schemas: in each the class is how a power column follows a temperature column; the rest is beside the point.
LEADS = ["outdoor_temp", "ambient_temperature", "airTempC", "temp_outside", "weather_temperature", "tempC"]
FOLLOWERS = ["power_load", "energy_usage", "electricity_demand", "consumptionKwh", "grid_load", "power_demand"]
OTHERS = ["humidity", "pressure", "wind_speed", "CPU_usage", "memory_usage", "disk_IO", "network_bytes", "price",
          "volume", "volatility", "page_views", "click_rate", "user_count", "vibration", "flow_rate", "rainfall"]
SITES = ["roof", "hall", "north", "south", "cellar", "garden", "plant", "office"]

ABBREVIATIONS = {"temp": "temperature", "hum": "humidity", "avg": "average", "num": "number",
                 "cnt": "count", "min": "minimum", "max": "maximum", "mem": "memory", "vol": "volume", "cap": "capital",
                 "hufl": "high useful load", "hull": "high useless load", "mufl": "middle useful load",
                 "mull": "middle useless load", "lufl": "low useful load", "lull": "low useless load",
                 "ot": "oil temperature", "io": "input output", "id": "identifier"}
UNITS = {"c": "celsius", "f": "fahrenheit", "k": "kelvin", "pct": "percent", "ms": "milliseconds", "s": "seconds",
         "h": "hours", "kwh": "kilowatt hours", "kw": "kilowatts", "hpa": "hectopascal", "ppm": "parts per million",
         "mb": "megabytes", "gb": "gigabytes", "mm": "millimetres", "v": "volts", "a": "amperes", "hz": "hertz"}


# A unit of one letter counts as one only after a number or one of these words: phase_a is not in amperes.
QUANTITIES = {"temperature", "voltage", "current", "duration", "time", "length", "period", "delay"}


class UserError(Exception):
    """Something that the user can put right: main() makes it one line on stderr and exit code 2."""


class Diverged(UserError):
    """The loss is no number; the run would end so each time, and --resume takes it only if it is named."""


class EncoderMissing(UserError):
    """A column name is not in the cache and its encoder cannot be had; the benchmark marks the row as not run."""


def note(text):
    print(f"duet.py: {text}", file=sys.stderr)


# --- Data: columns and windows ----------------------------------------------------------------------------------------


def name_to_words(name):
    """A column name as English words: `tempC` -> "temperature celsius", `CPU_usage` -> "cpu usage"."""
    words = []
    for token in re.findall(r"[^\W_]+", name):
        parts = re.findall(r"[A-Z]+(?![^\W\d_A-Z])|[A-Z]?[^\W\d_A-Z]+|\d+", token)
        words += [token.lower()] if token.lower() in UNITS else [part.lower() for part in parts]
    words = [ABBREVIATIONS.get(word, word) for word in words]
    if len(words) > 1 and (len(words[-1]) > 1 or words[-2] in QUANTITIES or words[-2].isdigit()):
        words[-1] = UNITS.get(words[-1], words[-1])  # a unit stands last; alone it is a name
    return " ".join(words) or name


@dataclass
class Dataset:
    """Windows of one table: window w is seq_len rows of `series` from row starts[w] on."""

    name: str
    columns: list  # names
    series: np.ndarray  # [rows, columns] float64, NaN where missing; scaled and float32 after prepare()
    starts: np.ndarray  # [windows] int64
    labels: np.ndarray  # [windows] int64
    classes: list  # names
    parts: dict  # {train, validation, test: indices of windows}
    seq_len: int = SEQ_LEN
    target: int | None = None  # the column whose next value is classified, if it is one
    limits: np.ndarray | None = None  # [classes - 1] between the classes, in units of the target
    info: dict = field(default_factory=dict)
    mean: np.ndarray | None = None  # [columns] of the training part
    std: np.ndarray | None = None


def prepare(data):
    """Leave out columns that are constant in the training part and scale the others by it; returns `data`."""
    train = np.zeros(len(data.series), bool)
    for start in data.starts[data.parts["train"]]:
        train[start : start + data.seq_len] = True
    known = np.where(np.isfinite(data.series), data.series, np.nan)
    filled = np.isfinite(known[train]).sum(axis=0)
    mean = np.nansum(known[train], axis=0) / filled.clip(1)
    std = np.sqrt(np.nansum((known[train] - mean) ** 2, axis=0) / filled.clip(1))
    keep = (filled > 0) & (std > 1e-9 * np.maximum(np.abs(mean), 1e-9))
    if data.target is not None:
        keep[data.target] = True
        data.target = int(keep[: data.target].sum())
    if not keep.any():
        raise UserError(f"{data.name}: no column that varies in the training part")
    left_out = data.info.setdefault("left_out", {})
    left_out |= {name: "constant or empty in the training part" for name, kept in zip(data.columns, keep) if not kept}
    data.columns = [name for name, kept in zip(data.columns, keep) if kept]
    data.mean, data.std = mean[keep], np.maximum(std[keep], 1e-12)
    data.series = ((known[:, keep] - data.mean) / data.std).astype(np.float32)
    if data.limits is not None:
        # Rounded like the series, so that a value at a limit stays at it.
        data.limits = ((data.limits - data.mean[data.target]) / data.std[data.target]).astype(np.float32)
    digest = hashlib.sha256(np.ascontiguousarray(data.series))
    digest.update(data.labels)
    counts = {part: np.bincount(data.labels[some], minlength=len(data.classes)) for part, some in data.parts.items()}
    data.info |= {"rows": len(data.series), "sha256": digest.hexdigest(), "windows": counts, "classes": data.classes,
                  "columns": {name: name_to_words(name) for name in data.columns},
                  "missing": float(np.isnan(data.series).mean())}
    for part, count in counts.items():
        if not count.any() or (part == "train" and np.count_nonzero(count) < 2):
            raise UserError(f"{data.name}: the {part} part has {count.tolist()} windows of its classes; take more data")
    for name, why in left_out.items():
        note(f"{data.name}: column {name!r} left out, {why}")
    for name, count in zip(data.classes, counts["train"]):
        if not count:
            note(f"{data.name}: class {name!r} has no window in the training part")
    return data


def split_blocks(windows, gap, blocks=25):
    """(train, validation) of window numbers 0 … windows - 1 in order of time, one row apart.

    Every fifth contiguous block is for validation; the `gap` windows beside it share rows with it and are left out.
    """
    blocks = int(np.clip(windows // (4 * gap), 5, blocks))
    block = np.arange(windows) * blocks // windows
    validation = np.flatnonzero(block % 5 == 2)
    near = np.zeros(windows, bool)
    for edge in np.flatnonzero(np.diff(block % 5 == 2)):  # the last window before the change
        near[max(0, edge - gap + 1) : edge + gap + 1] = True
    return np.flatnonzero((block % 5 != 2) & ~near), validation


def split_at_random(labels, share=0.2, seed=0, at_least=0):
    """(rest, chosen) window numbers, `share` of each class chosen; for windows that have no rows in common."""
    rng, chosen = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        number = max(at_least, round(share * len(own)), int(len(own) > 1))  # one of two is chosen
        chosen[own[:number]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def independent_parts(labels, test=None):
    """{part: window numbers}: 64, 16 and 20 % of each class, or those of `test` [windows] bool for the test part."""
    train, test = split_at_random(labels) if test is None else (np.flatnonzero(~test), np.flatnonzero(test))
    inner, validation = split_at_random(labels[train])
    return {"train": train[inner], "validation": train[validation], "test": test}


# --- Data: embedded generators ----------------------------------------------------------------------------------------


def generate_windows(columns, coupled, windows, seed):
    """Series [windows * 96, columns] and labels [windows] of three classes that no single column can tell apart.

    Every column has slow noise and one bump. That of the first of the two `coupled` columns is upward. In class 1 the
    second follows 6 steps later with a bump upward, in class 2 downward; in class 0 its bump is either, at another
    time. Some of the other columns follow each other as well, whatever the class. 5 % of the values are NaN.
    """
    rng, names, t = np.random.default_rng(seed), list(columns), np.arange(SEQ_LEN)
    labels = rng.integers(3, size=windows)
    centre = rng.uniform(10, SEQ_LEN - 16, (windows, len(names)))
    sign = rng.choice([-1, 1], (windows, len(names)))
    lead, follower = map(names.index, coupled)
    others = [i for i in range(len(names)) if i not in (lead, follower)]
    for a, b in [(lead, follower), *zip(others[::2], others[1::2])]:
        follows = (labels if a == lead else rng.integers(3, size=windows)) > 0
        away = (centre[:, a] - 4 + rng.uniform(20, 50, windows)) % (SEQ_LEN - 20) + 10
        centre[:, b] = np.where(follows, centre[:, a] + 6, away)
    sign[:, lead] = 1
    sign[:, follower] = np.select([labels == 1, labels == 2], [1, -1], sign[:, follower])
    height = sign * rng.uniform(1.6, 2.6, sign.shape)
    x = height[..., None] * np.exp(-(((t - centre[..., None]) / 4) ** 2))  # [windows, columns, time]
    x += np.cumsum(rng.normal(0, 0.06, x.shape), axis=-1) + rng.normal(0, 0.5, sign.shape)[..., None]
    x += rng.normal(0, 0.2, x.shape)
    level, scale = np.array(list(columns.values()), float).T[:, :, None]
    x = level + scale * x
    x[rng.random(x.shape) < 0.05] = np.nan
    return x.transpose(0, 2, 1).reshape(-1, len(names)), labels


def embedded_dataset(name, columns, coupled, windows, seed):
    series, labels = generate_windows(columns, coupled, windows, seed)
    info = {"source": "embedded"}
    return prepare(Dataset(name, list(columns), series, SEQ_LEN * np.arange(windows), labels,
                           ["apart", "along", "against"], independent_parts(labels), info=info))


def original_dataset(name, seed, windows=1000):
    """The original's synthetic data: each column is noise and a sine with 1, 2 or 3 periods, by the class.

    800 windows for training and validation and 200 for the test; 5 % of the values are NaN, 3 % in user_metrics.
    """
    rng, columns = np.random.default_rng(seed), list(EMBEDDED[name][0])
    labels = rng.integers(3, size=windows)
    t = np.linspace(0, 1, SEQ_LEN)
    wave = np.sin(2 * np.pi * (labels[:, None] + 1) * t)[..., None]  # [windows, time, 1]
    x = rng.normal(size=(windows, SEQ_LEN, len(columns))) + wave
    x[rng.random(x.shape) < (0.03 if name == "user_metrics" else 0.05)] = np.nan
    parts = independent_parts(labels, np.arange(windows) >= 0.8 * windows)
    return prepare(Dataset(name, columns, x.reshape(-1, len(columns)), SEQ_LEN * np.arange(windows), labels,
                           ["1 period", "2 periods", "3 periods"], parts, info={"source": "original's synthetic"}))


def synthetic_schema(number, windows):
    """Data set `number` of a family: 3 to 12 columns with names of its own, the same meaning of the classes in all."""
    rng = np.random.default_rng([1, number])
    site = number // len(LEADS)  # only then do names come again, with the place before them
    coupled = [f"{SITES[(site - 1) % 8]}{site}_{name}" if site else name
               for name in (LEADS[number % len(LEADS)], FOLLOWERS[number % len(FOLLOWERS)])]
    names = rng.permutation([*coupled, *rng.permutation(OTHERS)[: rng.integers(1, 11)]]).tolist()
    columns = {name: (rng.uniform(-5, 50), rng.uniform(0.5, 20)) for name in names}
    return embedded_dataset(f"schema_{number + 1:02}", columns, coupled, windows, [2, number])


# --- Data: CSV, .ts and ETTh1 -----------------------------------------------------------------------------------------


def read_text(path):
    """The text of a file in UTF-8, with or without a byte order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None


def parse_numbers(column):
    """A column of texts as numbers, with `1,504` as thousands or `50,13` as decimals where all cells look like that."""
    text = column.dropna().astype(str).str.strip()
    if text.str.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?|-?\d{1,3}(\.\d+)?").all() and text.str.contains(",").any():
        column = column.astype(str).str.replace(",", "")
    elif text.str.fullmatch(r"-?\d+,?\d*").all():
        column = column.astype(str).str.replace(",", ".")
    return pd.to_numeric(column, errors="coerce")


def read_csv(path):
    """({numeric column: float64 [rows]}, {left out: why}, texts of the date column or None) of a CSV file.

    The rows are in order of time: dates that fall, or are mixed, are sorted with a note.
    """
    text = read_text(path)
    header = text.split("\n", 1)[0]
    separator = max(",;\t", key=header.count)
    try:
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
            frame = pd.read_csv(io.StringIO(text), sep=separator, index_col=False, skipinitialspace=True)
    except (ValueError, pd.errors.ParserWarning) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    names = next(csv.reader([header], delimiter=separator))
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two columns have the same name: {', '.join(names)}")
    if frame.empty:
        raise UserError(f"{path}: no rows")
    numbers, left_out, dates = {}, {}, None
    for name, column in frame.items():
        if column.isna().all():
            left_out[name] = "empty"
        elif re.fullmatch(r"|Unnamed: \d+|__index_level_\d+__", name):
            left_out[name] = "a row index"
        elif is_date(name, column):
            left_out[name], dates = "a date", column
        elif pd.api.types.is_numeric_dtype(column):
            numbers[name] = column.to_numpy(float)
        else:
            values = parse_numbers(column)
            bad = values.isna() & column.notna()
            if not bad.any():
                numbers[name] = values.to_numpy(float)
                continue
            left_out[name] = "not numeric"
            if bad.mean() < 0.5:
                row = bad.argmax()
                raise UserError(f"{path}: row {row + 2}, column {name!r}: {column[row]!r}, a number is needed")
    if not numbers:
        raise UserError(f"{path}: no numeric column, only {', '.join(map(str, frame))}")
    if dates is not None:
        order = sort_dates(path, dates)
        numbers = {name: values[order] for name, values in numbers.items()}
        dates = dates.iloc[order].astype(str).tolist()
    return numbers, left_out, dates


def is_date(name, column):
    """Whether a column has dates: by its name, or as texts that can all be read as such."""
    if name.lower() in ("date", "time", "datetime", "timestamp"):
        return True
    text = column.dropna()
    return (not pd.api.types.is_numeric_dtype(column) and text.astype(str).str.contains(r"\d[-/:]\d").all()
            and pd.to_datetime(text, errors="coerce", format="mixed", utc=True).notna().all())


def sort_dates(path, dates):
    """The order of the rows in time; a note tells of another order in the file, of repeated dates and of gaps."""
    times = dates
    if not pd.api.types.is_numeric_dtype(dates):
        times = pd.to_datetime(dates, errors="coerce", format="mixed", utc=True).dt.tz_localize(None)
    if times.isna().any():
        note(f"{path}: row {times.isna().argmax() + 2} of {dates.name!r} is no date; the rows are taken as they stand")
        return np.arange(len(dates))
    order = np.argsort(times.to_numpy(), kind="stable")
    if (np.diff(order) < 0).any():
        note(f"{path}: its rows are not in order of {dates.name!r}; they have been sorted")
    steps = np.diff(times.to_numpy()[order].astype("int64" if times.dtype.kind == "M" else float)).astype(float)
    if (steps == 0).any():
        note(f"{path}: {(steps == 0).sum():,} rows repeat a value of {dates.name!r}: several series in one file?")
    if len(steps) and (steps > 1.5 * np.median(steps)).any():
        note(f"{path}: {(steps > 1.5 * np.median(steps)).sum():,} gaps in {dates.name!r}; rows count as equally spaced")
    return order


def csv_dataset(path, target, num_classes, protocol, name=None, missing=0.0):
    """Windows of 96 rows of a CSV file; the class is the quantile of `target` in the next row.

    `original` protocol: quantiles of the whole series, first 80 % of the windows for training. `holdout`: quantiles of
    the rows before the test part, and no training window shares rows with it. Validation shares none in either. A share
    `missing` of the values is left out at random, once the classes are known.
    """
    numbers, left_out, _ = read_csv(path)
    if target not in numbers:
        why = f"is left out, {left_out[target]}" if target in left_out else "is not there"
        raise UserError(f"{path}: --target {target!r} {why}; numeric columns: {', '.join(numbers)}")
    series = np.stack(list(numbers.values()), axis=1)
    starts = np.arange(len(series) - SEQ_LEN)
    train = int(0.8 * len(starts))
    if train < 10 * SEQ_LEN:
        raise UserError(f"{path}: {len(series)} rows, at least {math.ceil(12.5 * SEQ_LEN) + SEQ_LEN} are needed")
    values = numbers[target]
    seen = values if protocol == "original" else values[:train]
    distinct = np.unique(values[np.isfinite(values)])
    classes = [f"quantile {k + 1}" for k in range(num_classes)]
    limits = np.nanpercentile(seen, np.round(100 * np.arange(1, num_classes) / num_classes, 2))
    if 2 <= len(distinct) <= max(10, num_classes) and (distinct % 1 == 0).all():
        note(f"{path}: {target!r} has {len(distinct)} distinct values only; they are the classes")
        classes = [f"{value:g}" for value in distinct]
        limits = (distinct[1:] + distinct[:-1]) / 2
    elif not (np.diff(limits) > 0).all():
        raise UserError(f"{path}: --num-classes {num_classes}: quantiles of {target!r} coincide ({limits.tolist()})")
    following = values[starts + SEQ_LEN]
    inner, validation = split_blocks(train, gap=SEQ_LEN)
    validation = validation[validation < train - SEQ_LEN]
    if protocol == "holdout":
        inner = inner[inner < train - SEQ_LEN]
    parts = {"train": inner, "validation": validation, "test": np.arange(train, len(starts))}
    parts = {part: some[np.isfinite(following[some])] for part, some in parts.items()}
    labels = np.digitize(following, limits)
    series[np.random.default_rng(0).random(series.shape) < missing] = np.nan
    info = {"source": "real", "path": str(path), "left_out": left_out, "class_limits": limits.tolist(),
            "file_sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(), "protocol": protocol}
    return prepare(Dataset(name or Path(path).stem, list(numbers), series, starts, labels, classes, parts,
                           target=list(numbers).index(target), limits=limits, info=info))


def read_ts(path, labelled=True):
    """(cases [[float64 [length] for each dimension], …], labels [text]) of a UEA/UCR .ts file; `?` is NaN.

    A .tsv or .txt file of the older UCR archive has one case a line, the class first. With labelled=False, as for
    --predict, a file without classes, and `?` as a class, are taken, too.
    """
    lines = read_text(path).splitlines()
    if Path(path).suffix != ".ts":
        rows = [re.split(r"[\t, ]+", line.strip()) for line in lines if line.strip()]
        lines = ["@data", *(f"{','.join(values)}:{label}" for label, *values in rows)]
    cases, labels, in_data, has_label = [], [], False, True
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line[0] in "#%":
            continue
        if not in_data:
            key, *value = line.lower().split()
            if not key.startswith("@"):
                raise UserError(f"{path}: line {number}: no @data line before it, this is no .ts file")
            if (key, value[:1]) == ("@targetlabel", ["true"]):
                raise UserError(f"{path}: line {number}: {line}: a file for regression, it has no classes")
            if (key, value[:1]) == ("@timestamps", ["true"]):
                raise UserError(f"{path}: line {number}: {line}: files with time stamps are not read")
            if (key, value[:1]) == ("@classlabel", ["false"]):
                has_label = False
                if labelled:
                    raise UserError(f"{path}: line {number}: {line}: it must have classes")
            in_data = key == "@data"
            continue
        dimensions = line.split(":")
        label = dimensions.pop().strip() if has_label else "?"
        try:
            case = [np.array([cell.strip().replace("?", "nan") or "nan" for cell in text.split(",")], np.float64)
                    for text in dimensions]
        except ValueError as error:
            raise UserError(f"{path}: line {number}: {error}, a number or ? is needed") from None
        if not case or (cases and len(case) != len(cases[0])):
            wanted = f"{len(cases[0])} dimensions" if cases else "values, a colon and the class"
            raise UserError(f"{path}: line {number}: {len(case)} dimensions, {wanted} are needed")
        if labelled and label in ("", "?"):
            raise UserError(f"{path}: line {number}: the class after the last colon is missing")
        cases.append(case)
        labels.append(label)
    if not cases:
        raise UserError(f"{path}: no cases after @data")
    return cases, labels


def stack_cases(cases, seq_len):
    """Cases of unequal length, the last seq_len steps of each, as series [cases * seq_len, dimensions], NaN before."""
    series = np.full((len(cases), seq_len, len(cases[0])), np.nan)
    for i, case in enumerate(cases):
        for j, values in enumerate(case):
            values = values[-seq_len:]
            series[i, seq_len - len(values) :, j] = values
    return series.reshape(-1, len(cases[0]))


def ts_dataset(name, files):
    """The data set of a .ts file, or of NAME_TRAIN.ts and NAME_TEST.ts together."""
    cases, texts, test = [], [], []
    for file in files:
        own, labels = read_ts(file)
        is_test = file.stem.lower().endswith("_test")
        cases, texts, test = cases + own, texts + labels, test + [is_test] * len(own)
    if len({len(case) for case in cases}) > 1:
        raise UserError(f"{name}: training and test file have different dimensions")
    classes = sorted(set(texts))
    labels = np.array([classes.index(text) for text in texts])
    seq_len = max(len(values) for case in cases for values in case)
    info = {"source": "real", "archive": True, "path": [str(file) for file in files],
            "file_sha256": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()}
    parts = independent_parts(labels, np.array(test) if 0 < sum(test) < len(test) else None)
    return prepare(Dataset(name, [f"dim_{i}" for i in range(len(cases[0]))], stack_cases(cases, seq_len),
                           seq_len * np.arange(len(cases)), labels, classes, parts, seq_len, info=info))


def fetch_etth1(data_dir):
    """Path of ETTh1.csv under `data_dir`/ett, downloaded and checked if it is not there."""
    path = Path(data_dir) / "ett/ETTh1.csv"
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(ETTH1_URL, timeout=3) as response:
            content = response.read()
    except (OSError, ValueError) as error:
        raise UserError(f"{ETTH1_URL}: {error}; download it yourself to {path}") from None
    if hashlib.sha256(content).hexdigest() != ETTH1_SHA256:
        raise UserError(f"{ETTH1_URL}: the checksum is wrong; try again, or put the right file at {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(content)
    return path


def load_datasets(args):
    """[Dataset, …] that the arguments ask for, the real one only if it can be had and nothing was named."""
    datasets, names = [], args.dataset
    if names is None and not (args.data or args.synthetic_schemas):
        names = list(EMBEDDED)
        if not args.quick:
            try:
                fetch_etth1(args.data_dir)
                names.append("etth1")
            except UserError as problem:
                note(f"warning: etth1 left out, embedded data sets alone: {problem}")
    for number, name in enumerate(names or []):
        if name == "etth1":
            path, missing = fetch_etth1(args.data_dir), 0.05 if args.protocol == "original" else 0.0
            datasets.append(csv_dataset(path, "OT", 3, args.protocol or "original", "etth1", missing))
        elif args.protocol == "original":
            datasets.append(original_dataset(name, [4, number]))
        else:
            datasets.append(embedded_dataset(name, *EMBEDDED[name], args.windows, [0, number]))
    groups = {}  # path without _TRAIN or _TEST: files
    for path in map(Path, args.data or []):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; --data takes .csv, .ts and folders of .ts")
        files = [path]
        if path.is_dir():  # one format: the archive has the same data in several
            files = next((found for kind in SERIES_FILES if (found := sorted(path.glob(f"*{kind}")))), [])
        if not files:
            raise UserError(f"{path}: no .ts, .tsv or .txt file in this folder")
        for file in files:
            name = re.sub(r"_(train|test)(\.\w+)$", r"\2", str(file), flags=re.I)
            groups.setdefault(Path(name), []).append(file)
    for path, files in groups.items():
        if path.suffix in SERIES_FILES:
            datasets.append(ts_dataset(path.stem, files))
        elif args.target is None:
            raise UserError(f"{path}: --target COLUMN is needed for a CSV: {', '.join(read_csv(path)[0])}")
        else:
            datasets += [csv_dataset(file, args.target, args.num_classes, args.protocol or "holdout") for file in files]
    datasets += [synthetic_schema(number, args.windows) for number in range(args.synthetic_schemas)]
    names = [data.name for data in datasets]
    if len(set(names)) < len(names):
        raise UserError(f"two data sets have the same name: {', '.join(names)}")
    if reserved := {"shared", "sources", "mean of all"} & set(names):
        raise UserError(f"a data set cannot be called {reserved.pop()!r}, a name that results use; rename the file")
    return datasets


# --- Model: column embeddings -----------------------------------------------------------------------------------------


class AutoExpandingEmbedder(nn.Module):
    """A learned vocabulary of column names that grows: forward maps rows [columns] to [columns, target_dim]."""

    def __init__(self, target_dim=1, dim=16, initial_size=1000):
        super().__init__()
        self.rows = {}  # name: row
        self.embedding = nn.Embedding(initial_size, dim)
        self.projection = nn.Linear(dim, target_dim)

    def lookup(self, names, optimizer=None):
        """Rows [columns] of `names`; new names get the next rows, and the table doubles when it is full.

        An `optimizer` that already has moments of the table must be given here, or its next step raises.
        """
        for name in names:
            self.rows.setdefault(name, len(self.rows))
        size = self.embedding.num_embeddings
        while size < len(self.rows):
            size *= 2
        self.grow(size, optimizer)
        return torch.tensor([self.rows[name] for name in names])

    @torch.no_grad()
    def grow(self, size, optimizer=None):
        """Append rows up to `size`; old rows keep their values, new ones have no moments in the optimizer yet."""
        weight = self.embedding.weight
        added = size - len(weight)
        if added <= 0:
            return
        new = torch.randn(added, weight.shape[1], device=weight.device, dtype=weight.dtype)
        moments = optimizer.state.get(weight, {}) if optimizer else {}
        for key, value in moments.items():
            if value.shape == weight.shape:
                moments[key] = torch.cat([value, torch.zeros_like(new)])
        weight.data, weight.grad = torch.cat([weight, new]), None  # the same Parameter, so the optimizer still has it
        self.embedding.num_embeddings = size

    def embed(self, names):
        """Vectors [names, dim]."""
        return self.embedding(self.lookup(names))

    def forward(self, rows):
        return self.projection(self.embedding(rows))

    def get_extra_state(self):
        return dict(self.rows)

    def set_extra_state(self, rows):
        self.rows = dict(rows)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        key = prefix + "embedding.weight"
        weight = state_dict[key]
        self.grow(len(weight))  # a checkpoint may have a larger vocabulary, or a smaller one
        state_dict[key] = torch.cat([weight, self.embedding.weight.data[len(weight) :].to(weight)])
        super()._load_from_state_dict(state_dict, prefix, *args)


class RandomNameEmbedder(nn.Module):
    """A fixed random vector for each name, drawn by the name alone: identity without meaning, as a control.

    forward maps rows [columns] to [columns, target_dim]; only the projection is trained.
    """

    def __init__(self, target_dim=1, dim=16):
        super().__init__()
        self.rows = {}  # name: row
        self.register_buffer("table", torch.zeros(0, dim), persistent=False)
        self.projection = nn.Linear(dim, target_dim)

    def lookup(self, names, optimizer=None):
        """Rows [columns] of `names` in the table."""
        for name in names:
            if name not in self.rows:
                self.rows[name] = len(self.rows)
                self.table = torch.cat([self.table, self.embed([name]).to(self.table)])
        return torch.tensor([self.rows[name] for name in names])

    def embed(self, names):
        """Vectors [names, dim]."""
        seeds = [int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) for name in names]
        dim = self.table.shape[1]
        return torch.stack([torch.randn(dim, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def forward(self, rows):
        return self.projection(self.table[rows])


class FrozenBERTColumnEmbedder(nn.Module):
    """Column names by a frozen BERT: forward maps rows [columns] of its table to [columns, target_dim].

    Only the projection is trained. The encoder is loaded for names that neither `known` nor the cache has, and is
    freed at once; it is never a part of this module. The cache is one safetensors file for each encoder, with keys
    `tokenization/name`; index.json beside it says in plain text what is there.

    bert_model: a name on the Hugging Face hub, or a local folder. tokenization: `words` reads a name as words
    (name_to_words), `raw` as it is. A vector is the mean of the last hidden states, scaled to mean square 1. known:
    {name: vector} that need neither cache nor encoder, such as a checkpoint's. offline: do not ask the hub.
    Raises EncoderMissing where an uncached name finds no encoder.
    """

    def __init__(self, bert_model="bert-base-uncased", cache_dir="data/column_embeddings", target_dim=1,
                 tokenization="words", known=None, offline=False):
        super().__init__()
        local = Path(bert_model).expanduser()
        self.bert_model = str(local.resolve()) if local.is_dir() else bert_model
        self.tokenization, self.cache_dir, self.offline = tokenization, Path(cache_dir), offline
        digest = hashlib.sha256(self.bert_model.encode()).hexdigest()[:8]
        self.cache_path = self.cache_dir / f"{Path(self.bert_model).name}-{digest}.safetensors"
        self.encoder = None  # (tokenizer, model in a list) between _compute_bert_embedding and _save_cache
        self.fresh = set()  # keys computed, not yet saved
        self.rows = {}  # name: row
        self.cache = self._read_cache() | {f"{tokenization}/{name}": vector for name, vector in (known or {}).items()}
        if not self.cache:
            self._load_encoder()
        self.bert_dim = self.encoder[1][0].config.hidden_size if self.encoder else len(next(iter(self.cache.values())))
        self.register_buffer("table", torch.zeros(0, self.bert_dim), persistent=False)
        self.projection = nn.Linear(self.bert_dim, target_dim)

    def lookup(self, names, optimizer=None):
        """Rows [columns] of `names` in the table, after computing and caching what is not there."""
        new = [name for name in dict.fromkeys(names) if name not in self.rows]
        if new:
            self.table = torch.cat([self.table, self.embed(new).to(self.table)])
            self.rows |= {name: len(self.rows) + i for i, name in enumerate(new)}
        return torch.tensor([self.rows[name] for name in names])

    def embed(self, names):
        """Vectors [names, bert_dim] from the cache, the missing ones from the encoder, which is freed afterwards."""
        try:
            return torch.stack([self._compute_bert_embedding(name) for name in names])
        finally:
            self._save_cache()

    def forward(self, rows):
        return self.projection(self.table[rows])

    def _fingerprint(self):
        """Sizes and dates of a local encoder's weights, so that a cache of older weights is not read."""
        files = sorted(Path(self.bert_model).glob("*.safetensors")) if os.path.isdir(self.bert_model) else []
        return " ".join(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)

    def _read_cache(self):
        """{tokenization/name: vector [bert_dim]}; empty where there is no file, or a torn one, or older weights'."""
        from safetensors import SafetensorError, safe_open

        if not self.cache_path.exists():
            return {}
        try:
            with safe_open(self.cache_path, "pt") as file:
                now = self._fingerprint()
                if now and file.metadata()["fingerprint"] != now:
                    return {}
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            note(f"warning: {self.cache_path} is damaged ({error}) and will be written anew")
            return {}

    def _load_encoder(self):
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        import transformers

        transformers.utils.logging.disable_progress_bar()
        for offline in (True, False):  # first what is on this machine
            if not offline and (self.offline or os.path.isdir(self.bert_model) or not hub_in_reach()):
                break
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(self.bert_model, local_files_only=offline)
                model = transformers.AutoModel.from_pretrained(self.bert_model, local_files_only=offline)
                self.encoder = tokenizer, [model.eval()]  # in a list, so that it is no submodule
                return
            except Exception as error:  # transformers raises many kinds here, its own and those of its libraries
                why = str(error).strip().splitlines()[0]
        raise EncoderMissing(f"--bert-model {self.bert_model}: no such encoder here and the hub is out of reach, or "
                             f"it cannot be read ({why[:120]}); take a local folder, or names that the cache has")

    @torch.inference_mode()
    def _compute_bert_embedding(self, name):
        """Vector [bert_dim] of one name, from the cache or else from the encoder; _save_cache() keeps it."""
        key = f"{self.tokenization}/{name}"
        if key not in self.cache:
            if self.encoder is None:
                self._load_encoder()
            tokenizer, (model,) = self.encoder
            text = name_to_words(name) if self.tokenization == "words" else name
            vector = model(**tokenizer(text, return_tensors="pt", truncation=True)).last_hidden_state[0].mean(0)
            self.cache[key] = vector * len(vector) ** 0.5 / vector.norm()
            self.fresh.add(key)
        return self.cache[key]

    def _save_cache(self):
        """Merge what is new into the file, under a lock and with a rename, and free the encoder."""
        if self.encoder:
            self.encoder = None
            gc.collect()
        if not self.fresh:
            return
        from filelock import FileLock
        from safetensors.torch import save

        self.cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(self.cache_dir / "lock"):
            self.cache = self._read_cache() | self.cache  # another process may have written meanwhile
            with whole_file(self.cache_path) as file:
                file.write(save(self.cache, {"bert_model": self.bert_model, "fingerprint": self._fingerprint()}))
            index, index_path = {}, self.cache_dir / "index.json"
            with contextlib.suppress(OSError, ValueError, TypeError):
                index |= json.loads(index_path.read_text())
            index[self.cache_path.name] = {"bert_model": self.bert_model, "bert_dim": self.bert_dim,
                                           "keys": sorted(self.cache)}
            with whole_file(index_path) as file:
                file.write(json.dumps(index, indent=1, ensure_ascii=False).encode())
        self.fresh.clear()

    def get_cache_stats(self):
        """{cached_embeddings, cache_size_mb, bert_model, bert_dim} of this encoder's cache file."""
        size = self.cache_path.stat().st_size if self.cache_path.exists() else 0
        return {"cached_embeddings": len(self._read_cache()), "cache_size_mb": round(size / 1e6, 3),
                "bert_model": self.bert_model, "bert_dim": self.bert_dim}


def hub_in_reach():
    """Whether the Hugging Face hub answers, in one attempt of 3 s."""
    try:
        socket.create_connection(("huggingface.co", 443), 3).close()
        return True
    except OSError:
        return False


# --- Model: the transformers ------------------------------------------------------------------------------------------


def forward_fill(x):
    """x [batch, columns, time] with each NaN replaced by the value before it; leading NaNs stay."""
    at = torch.arange(x.shape[-1], device=x.device).where(~x.isnan(), 0).cummax(-1).values
    return x.gather(-1, at)


def values_and_mask(x, fill):
    """Two channels [batch, columns, time] each of x with NaNs: the values, and 1 where they are present.

    fill: `both` puts the last value for a NaN and says so in the mask, `mask` puts 0 and says so; `zero` and `forward`
    fill and say nothing (a mask of 1).
    """
    filled = forward_fill(x) if fill in ("both", "forward") else x
    mask = (~x.isnan()).to(x.dtype) if fill in ("both", "mask") else torch.ones_like(x)
    return filled.nan_to_num(), mask


def cut_patches(x):
    """x [batch, channels, time] -> [batch, channels, patches, 16], every 8 steps; 0s in front to make it fit."""
    pad = max(PATCH_LEN - x.shape[-1], (PATCH_LEN - x.shape[-1]) % STRIDE)
    return F.pad(x, (pad, 0)).unfold(-1, PATCH_LEN, STRIDE)


def num_patches(seq_len):
    return max(0, math.ceil((seq_len - PATCH_LEN) / STRIDE)) + 1


class ConvStem(nn.Module):
    """Three convolutions with batch normalization, pooled: [batch, channels, time] -> [batch, patches, d_model].

    Their kernels of 9, 5 and 3 steps see details that a patch of 16 steps must learn at each place anew.
    """

    def __init__(self, channels, d_model, width=128):
        super().__init__()
        layers = []
        for kernel, outputs in ((9, width), (5, width), (3, d_model)):
            layers += [nn.Conv1d(channels, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm1d(outputs),
                       nn.ReLU()]
            channels = outputs
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return F.adaptive_avg_pool1d(self.layers(x), num_patches(x.shape[-1])).transpose(1, 2)


def normalize_windows(values, mask):
    """Each column of each window minus its mean over what is present, by its deviation; 0 where missing."""
    number = mask.sum(-1, keepdim=True).clamp(min=1)
    mean = (values * mask).sum(-1, keepdim=True) / number
    deviation = (((values - mean) * mask).square().sum(-1, keepdim=True) / number).sqrt()
    return (values - mean) * mask / (deviation + 1e-2)


class Head(nn.Module):
    """Logits [batch, classes] from patch tokens [batch, patches, d_model].

    `mean` and `last`: one Linear on the mean (the original's) or the last token. `ordinal`: the classes are intervals
    of one column's next value, so forecast it as its last value plus a learned step, with a learned spread, and let the
    class `limits` cut that distribution (the cumulative logit model of McCullagh 1980). An untrained one is
    persistence. Where the data set has no such column, `ordinal` is `last`.
    """

    def __init__(self, kind, d_model, num_classes, target=None, limits=None):
        super().__init__()
        self.kind = "last" if kind == "ordinal" and target is None else kind
        self.target = target
        if self.kind == "ordinal":
            self.register_buffer("limits", torch.as_tensor(np.asarray(limits), dtype=torch.float32))
            self.linear = nn.Linear(d_model, 2)
            nn.init.zeros_(self.linear.weight)
            self.linear.bias.data = torch.tensor([0.0, -2.0])  # no step; a spread of 0.14 standard deviations
        else:
            self.linear = nn.Linear(d_model, num_classes)

    def forward(self, tokens, x):
        if self.kind != "ordinal":
            return self.linear(tokens.mean(1) if self.kind == "mean" else tokens[:, -1])
        step, log_spread = self.linear(tokens[:, -1]).float().unbind(-1)
        expected = forward_fill(x[:, self.target]).nan_to_num()[:, -1] + step  # [batch]
        below = torch.sigmoid((self.limits - expected[:, None]) * torch.exp(-log_spread)[:, None])
        return F.pad(F.pad(below, (0, 1), value=1.0), (1, 0)).diff(dim=-1).clamp(min=1e-6).log()


class MultiDatasetPatchDuET(nn.Module):
    """Logits [batch, num_classes] from x [batch, columns, time], scaled, with NaNs: patches, two pre-norm layers, head.

    As in the original, one Linear reads all columns of a patch, so their number c_in is fixed, and with a strategy each
    column's name is one number, a third channel beside value and mask; 571,459 parameters with 4 columns and `none`.

    With `shared`, one set of weights serves any columns (c_in is not read): the patch layer sees one column at a time
    (value, mask) and adds the embedding of its name, then each of `queries` learned queries pools the columns of a
    patch by attention, whatever their number, and the results together are one token. Each data set has a head.

    With stem="conv", convolutions over all columns (Wang et al. 2017, arXiv:1611.06455) take the place of patch layer
    and transformer, which a few dozen windows are not enough for; they also see each window normalized by itself.
    Not with `shared`.
    """

    def __init__(self, c_in, seq_len=SEQ_LEN, strategy="none", shared=False, head="mean", fill="both", dropout=0.0,
                 d_model=64, queries=8, stem="patches", **bert):
        super().__init__()
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy {strategy!r} is none of {', '.join(STRATEGIES)}")
        self.settings = {"c_in": c_in, "seq_len": seq_len, "strategy": strategy, "shared": shared, "head": head,
                         "fill": fill, "dropout": dropout, "d_model": d_model, "queries": queries,
                         "stem": stem} | bert
        self.c_in, self.strategy, self.shared, self.head_kind, self.fill = c_in, strategy, shared, head, fill
        if stem == "patches":
            # What all strategies have comes first: with one seed they begin with the same weights there.
            self.positions = nn.Parameter(0.02 * torch.randn(num_patches(seq_len), d_model))
            layer = nn.TransformerEncoderLayer(d_model, 8, 2048, 0.0, batch_first=True, norm_first=True)
            # Dropout on what each half of a layer adds, not inside: on 2048 hidden units it is a third of the time.
            layer.dropout1.p = layer.dropout2.p = dropout
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        if shared:
            self.patch_layer = nn.Linear(2 * PATCH_LEN, d_model)
            self.queries = nn.Linear(d_model, queries)
            self.join = nn.Linear(queries * d_model, d_model)
        elif stem == "conv":
            self.stem = ConvStem(c_in * (3 if strategy == "none" else 4), d_model)
        else:
            self.patch_layer = nn.Linear(c_in * (2 if strategy == "none" else 3) * PATCH_LEN, d_model)
        self.embedder = None
        if strategy == "auto_expanding":
            self.embedder = AutoExpandingEmbedder(d_model if shared else 1)
        elif strategy == "random_names":
            self.embedder = RandomNameEmbedder(d_model if shared else 1)
        elif strategy == "frozen_bert":
            self.embedder = FrozenBERTColumnEmbedder(target_dim=d_model if shared else 1, **bert)
        self.heads, self.column_names, self.cards = nn.ModuleDict(), {}, {}

    @classmethod
    def create_for_dataset(cls, c_in, seq_len=SEQ_LEN, num_classes=3, column_names=None, strategy="none", **options):
        """The original's constructor; `options` are those of the class."""
        model = cls(c_in, seq_len, strategy, **options)
        model.set_dataset_columns(column_names or [f"column_{i + 1}" for i in range(c_in)], num_classes=num_classes)
        return model

    def set_dataset_columns(self, names, dataset="default", num_classes=None, target=None, limits=None, optimizer=None):
        """Serve `dataset`, whose columns are `names`; with `num_classes` it gets a new head.

        Raises ValueError where the model cannot take that number of columns, or has no head for the data set.
        """
        if not self.shared and len(names) != self.c_in:
            raise ValueError(f"{len(names)} columns for a model of {self.c_in}: its patch layer is built for that "
                             "number; create_for_dataset(..., shared=True) takes any")
        if num_classes is not None:
            head = Head(self.head_kind, self.settings["d_model"], num_classes, target, limits)
            self.heads[head_key(dataset)] = head.to(next(self.parameters()).device)
        if head_key(dataset) not in self.heads:
            raise ValueError(f"no head for data set {dataset!r} yet: give its num_classes")
        if self.embedder:
            self.embedder.lookup(names, optimizer)
        self.column_names[dataset] = list(names)

    def add_dataset(self, card):
        """Serve the data set of this card(), with a new head; checkpoints keep the card."""
        self.cards[card["name"]] = card
        self.set_dataset_columns(card["columns"], card["name"], len(card["classes"]), card["target"], card["limits"])

    def forward(self, x, dataset="default"):
        if not self.shared and x.shape[1] != self.c_in:
            raise ValueError(f"x has {x.shape[1]} columns, the model {self.c_in}")
        values, mask = values_and_mask(x, self.fill)
        names = None  # [columns, d_model or 1]
        if self.embedder:  # rows are looked up each time: a loaded state may have others
            names = self.embedder(self.embedder.lookup(self.column_names[dataset]).to(x.device))
        if self.shared:
            patches = torch.cat([cut_patches(values), cut_patches(mask)], dim=-1)  # [batch, columns, patches, 32]
            tokens = self.patch_layer(patches.transpose(1, 2))  # [batch, patches, columns, d_model]
            if names is not None:
                tokens = tokens + names.to(tokens.dtype)
            weights = self.queries(tokens).softmax(dim=2).to(tokens.dtype)  # [batch, patches, columns, queries]
            tokens = self.join((weights.transpose(2, 3) @ tokens).flatten(2))
        else:
            channels = [values, mask] + ([] if names is None else [names.to(x.dtype).expand(x.shape)])
            if self.settings["stem"] == "conv":
                channels.append(normalize_windows(values, mask))
                return self.heads[head_key(dataset)](self.stem(torch.cat(channels, dim=1)), x)
            patches = cut_patches(torch.cat(channels, dim=1))  # [batch, channels, patches, 16]
            tokens = self.patch_layer(patches.transpose(1, 2).flatten(2))
        tokens = tokens + self.positions[-tokens.shape[1] :]  # [batch, patches, d_model]
        return self.heads[head_key(dataset)](self.encoder(tokens), x)


def head_key(dataset):
    """The name of a data set's head: a module's name has no dot and is no method of ModuleDict."""
    return "of " + dataset.replace(".", "\N{MIDDLE DOT}")


def card(data):
    """What a checkpoint keeps of a data set, so that new files can be read the same way."""
    return {"name": data.name, "columns": data.columns, "classes": data.classes, "target": data.target,
            "limits": None if data.limits is None else data.limits.tolist(), "mean": data.mean.tolist(),
            "std": data.std.tolist(), "seq_len": data.seq_len}


def use_bfloat16(device):
    """On a GPU that has it; on a CPU float32 was faster for models of this size (41 against 51 ms a step)."""
    return device.type == "cuda" and has_bfloat16(device)


# --- Training ---------------------------------------------------------------------------------------------------------


def gather_windows(series, starts, seq_len):
    """Series [rows, columns] -> the windows [batch, columns, seq_len] that begin at the rows `starts` [batch]."""
    return series.unfold(0, seq_len, 1)[starts]


def drop_values(x, share, missing="at random"):
    """x [batch, columns, time] with `share` of it NaN: values at random, one block of each series, or whole columns.

    `share` is a number or a tensor that broadcasts to [batch, 1, 1]. Of whole columns at least one stays.
    """
    if missing == "at random":
        return x.masked_fill(torch.rand_like(x) < share, math.nan)
    if missing == "whole columns":
        order = torch.rand(*x.shape[:2], 1, device=x.device).argsort(1).argsort(1)  # a random rank for each column
        number = (torch.as_tensor(share, device=x.device) * x.shape[1]).round().clamp(max=x.shape[1] - 1)
        return x.masked_fill(order < number, math.nan)
    length = torch.as_tensor(share, device=x.device) * x.shape[-1]
    first = torch.rand(*x.shape[:2], 1, device=x.device) * (x.shape[-1] - length)
    t = torch.arange(x.shape[-1], device=x.device)
    return x.masked_fill((t >= first.round()) & (t < first.round() + length), math.nan)


def choose_batch_size(windows, largest):
    """An eighth of few windows, so that an epoch has several steps; from 16 to `largest`."""
    return int(min(max(16, windows // 8), windows, largest))


def note_memory(datasets, args):
    """A note before a training that needs gigabytes: attention keeps patches x patches weights for each of 8 heads."""
    patches = max(num_patches(data.seq_len) for data in datasets)
    gigabytes = args.batch_size * patches * (2 * 8 * patches + 4 * 2048 + 1000) * 4 * 2 / 1e9
    if gigabytes > 4:
        longest = max(data.seq_len for data in datasets)
        note(f"windows of {longest:,} steps need about {gigabytes:.0f} GB in training; a lower --batch-size needs less")


def fit(model, datasets, args, path, drop=False, keep="best"):
    """Train `model` on the training parts, args.steps steps a data set; returns the history, a dict an evaluation.

    Every data set has the same number of steps, in random order; one that is new to the model gets a head. The model
    ends with the weights that were best by mean validation accuracy over the data sets, or, with keep="last", with the
    last ones. Goes on from the checkpoint at
    `path`, if there is one; a finished one is loaded and nothing is done. With `drop`, values are left out at random,
    up to half of them, in training alone.
    """
    for data in datasets:
        if data.name not in model.cards:
            model.add_dataset(card(data))
    device = next(model.parameters()).device
    tensors = [(torch.from_numpy(data.series).to(device), torch.from_numpy(data.starts).to(device),
                torch.from_numpy(data.labels).to(device)) for data in datasets]
    steps = args.steps * len(datasets)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.01, fused=True)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # half a cosine, down to zero at the last step, after a warm-up
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1))))
    saved = {"model": model, "optimizer": optimizer, "schedule": schedule}
    data_key = "".join(data.info["sha256"] for data in datasets)
    state = load_checkpoint(path, data_key)
    history, best = [], {"accuracy": -1.0}
    if state:
        with reading(path):
            for name, part in {"model": model}.items() if state["finished"] else saved.items():
                part.load_state_dict(state[name])
            if state["finished"]:
                return state["history"]
            torch.set_rng_state(state["random"])
            torch.cuda.set_rng_state_all(state["cuda_random"][: torch.cuda.device_count()])
            history, best = state["history"], state["best"]

    hidden = not (sys.stderr.isatty() or in_notebook())
    done = history[-1]["step"] if history else 0
    bar = tqdm(total=steps, initial=done, desc=path.stem, unit="step", leave=False, disable=hidden)
    evaluations = min(args.evaluations, args.steps)
    for number in range(len(history), evaluations):
        began, losses = time.perf_counter(), []
        model.train()
        each = args.steps * (number + 1) // evaluations - args.steps * number // evaluations
        turns = torch.arange(len(datasets)).repeat(each)[torch.randperm(each * len(datasets))].tolist()
        batches = []
        for data in datasets:
            train = torch.from_numpy(data.parts["train"])
            batch_size = choose_batch_size(len(train), args.batch_size)
            needed = each * batch_size
            order = torch.cat([torch.randperm(len(train)) for _ in range(math.ceil(needed / len(train)))])[:needed]
            batches.append(iter(train[order].to(device).split(batch_size)))
        for turn in turns:
            (series, starts, labels), batch = tensors[turn], next(batches[turn])
            x = gather_windows(series, starts[batch], datasets[turn].seq_len)  # [batch, columns, time]
            if drop:
                share = 0.5 * torch.rand(len(x), 1, 1, device=device)
                x = drop_values(x, share, MISSING[len(losses) % len(MISSING)])
            with torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16(device)):
                logits = model(x, datasets[turn].name)
            loss = F.cross_entropy(logits.float(), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            if len(losses) % 20 == 1:
                bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()
        trained = time.perf_counter() - began
        loss = torch.stack(losses).mean().item()
        if not math.isfinite(loss):
            raise Diverged(f"{path.stem}: the loss is not finite; lower the --learning-rate")
        accuracies = {data.name: float(np.mean(predict(model, data, "validation").argmax(1)
                                               == data.labels[data.parts["validation"]])) for data in datasets}
        accuracy = float(np.mean(list(accuracies.values())))
        history.append({"step": args.steps * (number + 1) // evaluations * len(datasets), "train_loss": loss,
                        "validation_accuracy": accuracies, "train_seconds": trained,
                        "seconds": time.perf_counter() - began})
        if accuracy > best["accuracy"] or keep == "last":
            best = {"accuracy": accuracy, "model": copy.deepcopy(model.state_dict())}
        state = {name: part.state_dict() for name, part in saved.items()}
        state |= {"history": history, "best": best, "data": data_key, "finished": False,
                  "random": torch.get_rng_state(), "cuda_random": torch.cuda.get_rng_state_all()}
        if number < evaluations - 1:
            save_checkpoint(state, path)
    bar.close()
    model.load_state_dict(best["model"])
    settings = dict(model.settings)
    if model.strategy == "frozen_bert":  # its vectors: then predicting needs neither cache nor encoder
        settings |= {"cache_dir": str(model.embedder.cache_dir),
                     "known": dict(zip(model.embedder.rows, model.embedder.table.cpu()))}
    save_checkpoint({"model": best["model"], "history": history, "data": data_key, "finished": True,
                     "cards": model.cards, "settings": settings}, path)
    return history


@torch.inference_mode()
def predict(model, data, part, corrupt=None):
    """Logits [windows, classes] of a part of `data`; `corrupt` changes each batch x [batch, columns, time] before."""
    model.eval()
    device = next(model.parameters()).device
    series, outputs = torch.from_numpy(data.series).to(device), []
    with torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16(device)):
        for starts in torch.from_numpy(data.starts[data.parts[part]]).to(device).split(1024):
            x = gather_windows(series, starts, data.seq_len)
            outputs.append(model(corrupt(x) if corrupt else x, data.name).float())
    return torch.cat(outputs).cpu().numpy()


def bert_options(args):
    """The arguments that FrozenBERTColumnEmbedder needs."""
    return {"bert_model": args.bert_model, "cache_dir": str(Path(args.data_dir) / "column_embeddings"),
            "tokenization": args.tokenization, "offline": args.quick}


@contextlib.contextmanager
def whole_file(path):
    """Open `path` to write under another name, and rename at the end: a killed run leaves the older file whole."""
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; make room, or take another folder") from None


def save_checkpoint(state, path):
    """torch.save to a whole file."""
    buffer = io.BytesIO()  # writing to the disk itself, torch hides a full one behind a RuntimeError
    torch.save(state, buffer)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())


@contextlib.contextmanager
def reading(path):
    """What goes wrong while the checkpoint at `path` is read becomes a UserError."""
    try:
        yield
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError, EOFError, OSError,
            pickle.UnpicklingError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: damaged, or no checkpoint of this duet.py ({why})") from None


def load_checkpoint(path, data_key=None):
    """The state at `path`, None where there is no file; UserError where it is damaged or of other data."""
    if not Path(path).exists():
        return None
    with reading(path):
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        if data_key and data_key != state["data"]:
            raise UserError(f"{path}: the run began with other data; bring the files back or start a new run")
        return state


# --- Evaluation -------------------------------------------------------------------------------------------------------


def scores(labels, predicted):
    """Accuracy and macro F1 (over the classes that occur) of predicted classes [windows]."""
    from sklearn.metrics import f1_score

    present = np.unique(labels)
    return {"accuracy": float(np.mean(labels == predicted)),
            "macro_f1": float(f1_score(labels, predicted, labels=present, average="macro", zero_division=0))}


def window_features(data, part):
    """What the baselines see: last, mean, std, min, max, slope, missing share [windows, 7 columns]."""
    series, features = torch.from_numpy(data.series), []
    t = torch.linspace(-1, 1, data.seq_len)
    for starts in torch.from_numpy(data.starts[data.parts[part]]).split(4096):
        x = gather_windows(series, starts, data.seq_len)
        missing, last = x.isnan(), forward_fill(x)[..., -1].nan_to_num()
        mean = x.nanmean(-1).nan_to_num()
        x = torch.where(missing, mean[..., None], x)
        columns = last, mean, x.std(-1, correction=0), x.amin(-1), x.amax(-1), x @ t / (t @ t), missing.float().mean(-1)
        features.append(torch.cat(columns, dim=1))
    return torch.cat(features).numpy()


class Hydra:
    """Features of windows by competing convolutions (Dempster et al. 2023, arXiv:2203.13652), for a ridge classifier.

    At each step the `kernels` random kernels of a group compete: the one with the largest output gets that output,
    the one with the smallest is counted. Every dilation has `groups` groups, half of them on the differences between
    steps; of several columns a group reads the sum of a random few.
    """

    def __init__(self, columns, seq_len, groups=64, kernels=8, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.kernels = kernels
        self.parts = []  # (dilation, whether on differences, weights [groups / 2 * kernels, 1, 9], columns of a group)
        few = max(1, min(8, columns // 2))
        for exponent in range(1 + int(math.log2(max(1, (seq_len - 1) / 8)))):
            for on_differences in (False, True):
                weights = torch.randn(groups // 2 * kernels, 1, 9, generator=generator)
                weights = weights - weights.mean(-1, keepdim=True)
                weights = weights / weights.abs().sum(-1, keepdim=True)
                chosen = [torch.randperm(columns, generator=generator)[:few] for _ in range(groups // 2)]
                self.parts.append((2**exponent, on_differences, weights, torch.stack(chosen)))

    def transform(self, x):
        """Features [batch, features] of x [batch, columns, time] without NaN."""
        features = []
        differences = F.pad(x.diff(dim=-1), (0, int(x.shape[-1] == 1)))
        for dilation, on_differences, weights, chosen in self.parts:
            source = differences if on_differences else x
            mixed = F.pad(source[:, chosen].sum(2), (4 * dilation, 4 * dilation))  # [batch, groups, time]
            output = F.conv1d(mixed, weights, dilation=dilation, groups=len(chosen))
            output = output.unflatten(1, (len(chosen), self.kernels))  # [batch, groups, kernels, time]
            largest, winner = output.max(2)
            smallest, loser = output.min(2)
            empty = torch.zeros(output.shape[:3])
            features.append(empty.scatter_add(2, winner, largest).flatten(1))
            features.append(empty.scatter_add(2, loser, torch.ones_like(smallest)).flatten(1))
        return torch.cat(features, dim=1)


class HydraClassifier:
    """Hydra, scaled as its authors do, and a ridge classifier, on at most `most` training windows in equal steps."""

    def __init__(self, most=4000):
        self.most = most

    def features(self, data, windows):
        series = torch.from_numpy(data.series)
        chunks = [forward_fill(gather_windows(series, starts, data.seq_len)).nan_to_num()
                  for starts in torch.from_numpy(data.starts[windows]).split(64)]
        return torch.cat([self.hydra.transform(chunk) for chunk in chunks]).clamp(min=0).sqrt()

    def fit(self, data):
        from sklearn.linear_model import RidgeClassifierCV

        windows = data.parts["train"]
        windows = windows[:: math.ceil(len(windows) / self.most)]
        self.hydra = Hydra(len(data.columns), data.seq_len)
        features = self.features(data, windows)
        self.mean = features.mean(0)
        # The square root of a rare count has hardly a spread: the more zeros, the more is added to it.
        self.std = features.std(0) + (features == 0).float().mean(0) ** 4 + 1e-8
        self.ridge = RidgeClassifierCV(np.logspace(-3, 3, 10)).fit(self.scale(features), data.labels[windows])
        return self

    def scale(self, features):
        return ((features - self.mean) * (features != 0) / self.std).numpy()

    def probabilities(self, data, part, sharpness=2):
        """[windows, classes]: the softmax of the ridge classifier's outputs, which lie about -1 and 1, times 2."""
        outputs = self.ridge.decision_function(self.scale(self.features(data, data.parts[part])))
        if outputs.ndim == 1:  # of two classes
            outputs = np.stack([-outputs, outputs], axis=1)
        probabilities = np.zeros((len(outputs), len(data.classes)))
        probabilities[:, self.ridge.classes_] = torch.from_numpy(sharpness * outputs).softmax(1).numpy()
        return probabilities


def with_validation(data):
    """The data with the validation windows among those for training, where nothing is chosen by them."""
    train = np.sort(np.concatenate([data.parts["train"], data.parts["validation"]]))
    return dataclasses.replace(data, parts=data.parts | {"train": train})


def baseline_records(data):
    """One record of scores each for the majority class, persistence (where the target is a column), two models on
    window features, and Hydra. They choose nothing on the validation part, so they are fitted on it, too."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = with_validation(data)
    labels, records = {part: data.labels[data.parts[part]] for part in ("train", "test")}, []
    features = {part: window_features(data, part) for part in ("train", "test")}
    majority = np.full(len(labels["test"]), np.bincount(labels["train"]).argmax())
    records.append({"dataset": data.name, "model": "majority class", "seconds": 0.0} | scores(labels["test"], majority))
    if data.target is not None:
        last = features["test"][:, data.target]  # the first columns of the features are the last values
        found = scores(labels["test"], np.digitize(last, data.limits))
        records.append({"dataset": data.name, "model": "persistence", "seconds": 0.0} | found)
    leaf = int(np.clip(len(labels["train"]) // 20, 1, 20))  # with 20, as by default, no tree can split 30 windows
    trees = HistGradientBoostingClassifier(early_stopping=False, min_samples_leaf=leaf, random_state=0)
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    for name, model in {"logistic regression": linear, "gradient boosting": trees}.items():
        began = time.perf_counter()
        model.fit(features["train"], labels["train"])
        record = {"dataset": data.name, "model": name, "seconds": time.perf_counter() - began}
        records.append(record | scores(labels["test"], model.predict(features["test"])))
    began = time.perf_counter()
    predicted = HydraClassifier().fit(data).probabilities(data, "test").argmax(1)
    records.append({"dataset": data.name, "model": "hydra", "seconds": time.perf_counter() - began}
                   | scores(labels["test"], predicted))
    return records


def evaluate(model, data, history=(), corrupt=None, /, **about):
    """The record of a model on the test part of a data set: scores, size and how it was trained."""
    found = scores(data.labels[data.parts["test"]], predict(model, data, "test", corrupt).argmax(1))
    return {"dataset": data.name, "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "seconds": sum(entry["seconds"] for entry in history), "history": list(history)} | about | found


def values_of(records, key, **where):
    """[runs] of `key` in the records that match, in order of the seeds."""
    return [record[key] for record in records if all(record.get(name) == value for name, value in where.items())]


def distinct(records, key):
    return list(dict.fromkeys(record.get(key) for record in records))


def percent(values, sign=""):
    """Mean of shares in percent, and its 95 % interval where there are several; None for no values.

    With `sign` "+" they are differences, and a star says that the interval leaves 0 out.
    """
    if not len(values):
        return None
    mean, width = mean_and_interval(100 * np.array(values, float))
    star = " *" * bool(sign and abs(mean) > width)  # never for one run, whose width is NaN
    return f"{mean:{sign}.2f}" + (f" ± {width:.2f}{star}" if len(values) > 1 else "")


def difference(records, one, other, **where):
    """Accuracy of model `one` minus that of `other`, paired by seed, as percent(); None where either is not there."""
    pairs = zip(*(values_of(records, "accuracy", model=name, **where) for name in (one, other)))
    return None if one == other else percent([a - b for a, b in pairs], "+")


def share_table(records, *keys):
    """[{column: value}] of accuracy [%]: a row for each combination of `keys`, a column for each share."""
    groups = list(dict.fromkeys(tuple(record[key] for key in keys) for record in records))
    return [dict(zip(keys, group)) | {f"{share:.0%}": percent(values_of(records, "accuracy", share=share,
                                                                        **dict(zip(keys, group))))
                                      for share in sorted(distinct(records, "share"))} for group in groups]


# --- Experiments: (args, datasets, strategies, run_dir) -> {tables: {name: [{column: value}]}, …} ---------------------


def new_model(args, datasets, strategy, shared, seed, fill="both", seq_len=0, stem="patches"):
    """An untrained model on the device for windows up to seq_len, or as long as the data sets'.

    With one seed, training starts from the same random state and the same transformer whatever the strategy.
    """
    seed_everything(seed)
    seq_len = max(seq_len, *(data.seq_len for data in datasets))
    model = MultiDatasetPatchDuET(len(datasets[0].columns), seq_len, strategy, shared, args.head, fill, args.dropout,
                                  stem=stem, **(bert_options(args) if strategy == "frozen_bert" else {}))
    for data in datasets:
        model.add_dataset(card(data))
    seed_everything(seed)
    return model.to(args.torch_device)


def conv_records(args, data, members, seed, run_dir):
    """Two records: the mean of `members` models with convolutions, and that with Hydra's probabilities as much again.

    They are trained on training and validation windows: their steps are given, twice --steps, and nothing is chosen.
    """
    whole = with_validation(data)
    settings = argparse.Namespace(**vars(args) | {"batch_size": min(args.batch_size, 32), "steps": 2 * args.steps})
    logits, seconds = [], 0.0
    for member in range(members):
        model = new_model(args, [data], "none", False, seed + 1000 * member, stem="conv")
        history = fit(model, [whole], settings, run_dir / f"models/{data.name}-conv-{seed}-{member}.pt", keep="last")
        seconds += sum(entry["seconds"] for entry in history)
        logits.append(predict(model, data, "test"))
    probabilities = torch.from_numpy(np.stack(logits)).softmax(-1).mean(0).numpy()
    parameters = members * sum(parameter.numel() for parameter in model.parameters())
    began = time.perf_counter()
    hydra = HydraClassifier().fit(whole).probabilities(data, "test")
    records = []
    for name, answer in (("conv", probabilities), ("conv + hydra", probabilities + hydra)):
        if name != "conv":
            seconds += time.perf_counter() - began
        records.append({"dataset": data.name, "model": name, "seed": seed, "parameters": parameters, "seconds": seconds}
                       | scores(data.labels[data.parts["test"]], answer.argmax(1)))
        note(f"{data.name}, {name}, seed {seed}: {records[-1]['accuracy']:.2%}")
    return records


def benchmark(args, datasets, strategies, run_dir):
    """The baselines and every strategy on every data set, and with --shared the shared models."""
    records = [record for data in datasets for record in baseline_records(data)]
    for seed in range(args.seed, args.seed + args.runs):
        for data in datasets:
            members = args.members
            if members is None:
                members = 3 if data.info.get("archive") else 0
            if members:
                records += conv_records(args, data, members, seed, run_dir)
        for shared in (False, True) if args.shared else (False,):
            for strategy in strategies:
                for own in [datasets] if shared else [[data] for data in datasets]:
                    name = "shared" if shared else own[0].name
                    model = new_model(args, own, strategy, shared, seed)
                    history = fit(model, own, args, run_dir / f"models/{name}-{strategy}-{seed}.pt")
                    records += [evaluate(model, data, history, model="shared, " * shared + strategy, seed=seed)
                                for data in own]
                    accuracy = np.mean([record["accuracy"] for record in records[-len(own) :]])
                    note(f"{name}, {strategy}, seed {seed}: {accuracy:.2%}")
    plot_benchmark(records, {data.name: 1 / len(data.classes) for data in datasets}, run_dir)
    claim = {}  # the original's figures, beside its own data only
    if args.head == "mean" and not args.data and args.protocol != "holdout":
        claim = ORIGINAL_CLAIM if args.protocol == "original" else {"etth1": ORIGINAL_CLAIM["etth1"]}
    if {data.name for data in datasets} != {*EMBEDDED, "etth1"}:  # the original's average is over these three
        claim = {name: models for name, models in claim.items() if name != "mean of all"}
    table = benchmark_table(records, [name for name in args.strategies or STRATEGIES if name not in strategies], claim)
    return {"records": records, "tables": {"accuracy": table}, "note": "Differences are points of accuracy, paired by "
            "seed. Seconds are one training, of a shared model for all data sets. The original's figures are single "
            "runs whose last or best epoch on the test part was scored; its data are those of --protocol original."}


def benchmark_table(records, not_run, claim):
    """[{column: value}]: data sets × models, then the means over the data sets; differences are paired by seed."""
    datasets, models, table = distinct(records, "dataset"), distinct(records, "model"), []
    for model in models if len(datasets) > 1 else []:  # a data set "mean of all": for each seed the mean over them
        same = [[r for r in records if (r["dataset"], r["model"]) == (name, model)] for name in datasets]
        records = records + [{"dataset": "mean of all", "model": model} | {
            key: float(np.mean([one[key] for one in run])) for key in ("accuracy", "macro_f1", "seconds")}
            for run in zip(*same)]
    for name in distinct(records, "dataset"):
        for model in models:
            own = [record for record in records if (record["dataset"], record["model"]) == (name, model)]
            if own:
                strategy = model.removeprefix("shared, ")
                plain, learned = model.replace(strategy, "none"), strategy in STRATEGIES
                table.append({
                    "data set": name, "model": model, "accuracy %": percent([record["accuracy"] for record in own]),
                    "macro F1 %": percent([record["macro_f1"] for record in own]),
                    "minus none": difference(records, model, plain, dataset=name) if learned else None,
                    "minus per-dataset": difference(records, model, strategy, dataset=name) if learned else None,
                    "original %": claim.get(name, {}).get(model), "parameters": own[0].get("parameters"),
                    "seconds": round(float(np.mean([record["seconds"] for record in own])), 1)})
        table += [{"data set": name, "model": f"{model} (not run)"} for model in not_run]
    return table


def with_labels(data, share, seed):
    """`data` with `share` of the labels of its training and validation part, of each class alike and at least one."""
    parts = dict(data.parts)
    for part in ("train", "validation"):
        some = data.parts[part]
        parts[part] = np.sort(some[split_at_random(data.labels[some], share, seed, at_least=1)[1]])
    return dataclasses.replace(data, parts=parts)


def introduce(model, data, sources):
    """Give a shared model a new data set; its head begins as the mean of the sources' heads for the same classes.

    Returns whether there were such: only then the model can be asked before it saw a label.
    """
    model.add_dataset(card(data))
    head, heads = model.heads[head_key(data.name)], [model.heads[head_key(one.name)] for one in sources]
    alike = [other for one, other in zip(sources, heads) if (one.classes, other.kind) == (data.classes, head.kind)]
    if alike:
        for parameter, *others in zip(head.parameters(), *(other.parameters() for other in alike)):
            parameter.data = torch.stack([other.data for other in others]).mean(0)
    return bool(alike)


def transfer(args, datasets, strategies, run_dir):
    """A shared model, trained on the other data sets or not at all, on a new one at LABEL_SHARES of its labels.

    Each seed draws its labels. With few labels both are trained for a quarter of the steps. At 0 % there is a
    pretrained figure only, and only where the other data sets have the same classes.
    """
    names = [data.name for data in datasets]
    goal = names[-1] if args.transfer == "last" else args.transfer
    if goal not in names or len(names) < 2:
        raise UserError(f"--transfer {goal}: must be one of at least two data sets: {', '.join(names)}")
    data, sources = datasets[names.index(goal)], [other for other in datasets if other.name != goal]
    records = []
    for seed in range(args.seed, args.seed + args.runs):
        limited = {share: with_labels(data, share, seed) for share in LABEL_SHARES[1:]}
        records += [record | {"share": share, "seed": seed} for share, some in limited.items()
                    for record in baseline_records(some) if record["model"] in ("gradient boosting", "hydra")]
        for strategy in strategies:
            base = new_model(args, sources, strategy, True, seed, seq_len=data.seq_len)
            fit(base, sources, args, run_dir / f"models/sources-{strategy}-{seed}.pt")
            model = copy.deepcopy(base)
            if introduce(model, data, sources):
                records.append(evaluate(model, data, model=f"{strategy}, pretrained", share=0.0, seed=seed))
            for share, some in limited.items():
                budget = argparse.Namespace(**vars(args) | {"steps": args.steps if share == 1 else -(-args.steps // 4)})
                for start in ("pretrained", "from scratch"):
                    model = new_model(args, [data], strategy, True, seed)
                    if start == "pretrained":
                        model = copy.deepcopy(base)
                        introduce(model, data, sources)
                    path = run_dir / f"models/{data.name}-{strategy}-{start.replace(' ', '-')}-{share:g}-{seed}.pt"
                    history = fit(model, [some], budget, path)
                    records.append(evaluate(model, data, history, model=f"{strategy}, {start}", share=share, seed=seed))
            note(f"transfer to {data.name}, {strategy}, seed {seed}: done")
    pairs = [(f"{one}, pretrained", f"{one}, from scratch") for one in strategies]
    pairs += [(f"{one}, {start}", f"none, {start}") for start in ("pretrained", "from scratch")
              for one in strategies if one != "none" and "none" in strategies]
    differences = [{"model": one, "minus": other} | {f"{share:.0%}": difference(records, one, other, share=share)
                                                     for share in LABEL_SHARES} for one, other in pairs]
    plot_shares(records, "Shared model on a new data set", "share of its labels", "dataset", run_dir / "transfer.png")
    return {"to": goal, "records": records, "tables": {"accuracy": share_table(records, "model"),
                                                       "differences": differences},
            "note": f"Test accuracy [%] on {goal} by the share of its labels; differences in points, paired by seed."}


def nan_robustness(args, datasets, strategies, run_dir):
    """The model with four ways to fill, on test windows with more and more values missing.

    Strategies are those of --strategies, without it `none`. All are trained alike, with up to half of the values left
    out at random, in blocks and as whole columns in turn.
    """
    records, strategies = [], [name for name in strategies if name in (args.strategies or ["none"])]
    for data in datasets:
        for seed in range(args.seed, args.seed + args.runs):
            for strategy, (fill, name) in itertools.product(strategies, FILLS.items()):
                model = new_model(args, [data], strategy, False, seed, fill)
                fit(model, [data], args, run_dir / f"models/{data.name}-{strategy}-{fill}-{seed}.pt", drop=True)
                for missing in MISSING:
                    for share in MISSING_SHARES:
                        torch.manual_seed(seed)  # the same values are missing for every model
                        corrupt = partial(drop_values, share=share, missing=missing) if share else None
                        records.append(evaluate(model, data, (), corrupt, model=f"{strategy}, {name}", share=share,
                                                seed=seed, missing=missing))
            note(f"missing values, {data.name}, seed {seed}: done")
        own = [record for record in records if record["dataset"] == data.name]
        plot_shares(own, f"{data.name}: test accuracy with missing values", "values left out", "missing",
                    run_dir / f"nan_robustness_{data.name}.png")
    return {"records": records, "tables": {"accuracy": share_table(records, "dataset", "missing", "model")},
            "note": "Test accuracy [%] by the share of values left out, in addition to those that the data "
            "lack (5 % of the embedded ones)."}


def column_similarity(args, datasets, strategies, run_dir):
    """Cosine similarity of column names by the frozen encoder, or of those in --checkpoint by its own embeddings."""
    tables = {}
    if args.checkpoint:
        embedder = restore_model(args)[0].embedder
        if embedder is None:
            raise UserError(f"{args.checkpoint}: strategy none has no column embeddings")
        names = list(embedder.rows)
    else:
        names = list(dict.fromkeys([*PROBES, *(name for data in datasets for name in data.columns)]))
        for tokenization in ("raw", "words"):
            embedder = FrozenBERTColumnEmbedder(**bert_options(args) | {"tokenization": tokenization})
            temp, temperature, price = F.normalize(embedder.embed(PROBES), dim=1)
            row = {"read as": tokenization, "temp, temperature": f"{temp @ temperature:.3f}",
                   "temp, price": f"{temp @ price:.3f}"}
            tables.setdefault("is temp nearer to temperature than to price?", []).append(row)
        embedder = FrozenBERTColumnEmbedder(**bert_options(args))
    unit = F.normalize(embedder.embed(names).detach().double(), dim=1).numpy()
    similarity, nearest = unit @ unit.T, []
    with open(run_dir / "column_similarity.csv", "w", newline="") as file:
        csv.writer(file).writerows([["", *names], *([name, *row] for name, row in zip(names, similarity.round(4)))])
    plot_columns(names, similarity, unit, run_dir / "columns.png")
    for i, name in enumerate(names):
        order = [j for j in np.argsort(-similarity[i]) if j != i][:3]
        near = {f"nearest {k}": f"{names[j]} ({similarity[i, j]:.2f})" for k, j in enumerate(order, start=1)}
        nearest.append({"column": name, "read as": name_to_words(name)} | near)
    return {"tables": {"nearest names": nearest} | tables, "note": "By cosine similarity of the embeddings."}


def restore_model(args):
    """(model, cards of its data sets) of --checkpoint."""
    state = load_checkpoint(args.checkpoint)
    with reading(args.checkpoint):
        if state is None or not state["finished"]:
            raise UserError(f"{args.checkpoint}: no finished model; take one of a run's models/, or --resume the run")
        model = MultiDatasetPatchDuET(**state["settings"])
        for one in state["cards"].values():
            model.add_dataset(one)
        if missing := model.load_state_dict(state["model"], strict=False).missing_keys:  # other heads may be there
            raise ValueError(f"no {missing[0]}")
    return model, list(model.cards.values())


def match_columns(wanted, found):
    """{wanted name: found name or None}: the same name, else one of the same words; none is taken twice."""
    free = {name_to_words(name): name for name in reversed(found) if name not in wanted}
    return {name: name if name in found else free.pop(name_to_words(name), None) for name in wanted}


def read_for_prediction(path, cards):
    """(Dataset of all windows of a CSV or .ts file, {column: what tells its windows apart}, names of missing columns).

    It is read as the one of `cards` that shares most columns with it, by name, else by name_to_words().
    """
    if path.suffix in SERIES_FILES:
        cases, _ = read_ts(path, labelled=False)
        columns, dates = {f"dim_{i}": i for i in range(len(cases[0]))}, None
    else:
        columns, _, dates = read_csv(path)
    matches = [match_columns(one["columns"], columns) for one in cards]
    number = max(range(len(cards)), key=lambda i: np.mean([match is not None for match in matches[i].values()]))
    match, one = matches[number], cards[number]
    missing, seq_len = [name for name in match if match[name] is None], one["seq_len"]
    if len(missing) == len(match):
        raise UserError(f"{path}: none of the columns {', '.join(match)}, only {', '.join(columns)}")
    if missing:
        note(f"{path}: no column {', '.join(missing)}: treated as missing values")
    if path.suffix in SERIES_FILES:
        series, starts = stack_cases(cases, seq_len), seq_len * np.arange(len(cases))
        about = {"case": np.arange(1, len(cases) + 1)}
        if max(len(values) for case in cases for values in case) > seq_len:
            note(f"{path}: some series are longer than {seq_len} steps, only the last {seq_len} are read")
    else:
        series = np.stack(list(columns.values()), axis=1)
        last = np.arange(min(seq_len, len(series)) - 1, len(series))  # a short file is one window
        series = np.pad(series, ((max(0, seq_len - len(series)), 0), (0, 0)), constant_values=np.nan)
        starts = np.arange(len(last))
        about = {"last row": last + 2} | ({"date": [dates[row] for row in last]} if dates else {})  # 1 is the header
    places = {name: i for i, name in enumerate(columns)}
    absent = np.full(len(series), np.nan)
    series = np.stack([absent if name is None else series[:, places[name]] for name in match.values()], axis=1)
    series = np.where(np.isfinite(series), series, np.nan)  # as in training
    series = ((series - one["mean"]) / one["std"]).astype(np.float32)
    parts = {"all": np.arange(len(starts))}
    return Dataset(one["name"], list(match), series, starts, None, one["classes"], parts, seq_len), about, missing


def predict_file(args, datasets, strategies, run_dir):
    """Classes and probabilities of every window of --predict, written to predictions.csv."""
    model, cards = restore_model(args)
    data, about, missing = read_for_prediction(Path(args.predict), cards)
    probabilities = torch.from_numpy(predict(model.to(args.torch_device), data, "all")).softmax(1).numpy()
    answer = np.array(data.classes)[probabilities.argmax(1)]
    table = about | {"class": answer} | {f"p({name})": p for name, p in zip(data.classes, probabilities.T.round(4))}
    with open(run_dir / "predictions.csv", "w", newline="") as file:
        csv.writer(file).writerows([list(table), *zip(*table.values())])
    counts = [{"class": name, "windows": int((answer == name).sum())} for name in data.classes]
    return {"dataset": data.name, "windows": len(answer), "missing": missing, "tables": {"classes": counts},
            "note": f"{args.predict}, read as {data.name}; each window is in predictions.csv."}


# --- Pictures ---------------------------------------------------------------------------------------------------------


def plot_benchmark(records, chance, run_dir):
    """Accuracy of every model, by data set where there are few, else on average; `chance` {data set: share}."""
    datasets, models = distinct(records, "dataset"), distinct(records, "model")
    models = [name for name in models if name != "majority class"]
    if len(datasets) <= 6:
        title = "Test accuracy, with 95 % interval over several runs"
        fig, (axis,) = new_figure(title, size=(11, 2 + 1.4 * len(datasets)))
        values, ends = {}, {}
        for model in models:
            found = [mean_and_interval(values_of(records, "accuracy", dataset=data, model=model) or [np.nan])
                     for data in datasets]
            values[model], ends[model] = (100 * np.array(column, float) for column in zip(*found))
        plot_dots(axis, datasets, values, errors=ends)
        for row, name in enumerate(datasets):
            label = "chance" if row == 0 else None
            axis.plot(2 * [100 * chance[name]], [row - 0.4, row + 0.4], "--", color="0.4", label=label)
        axis.set(xlabel="accuracy [%]", xlim=(0, 101))
        legend_below(axis, 5)
    else:
        fig, (axis,) = new_figure("Test accuracy", size=(11, 5))
        means = {model: 100 * np.mean(values_of(records, "accuracy", model=model)) for model in models}
        plot_ranking(axis, means, "{:.1f}")
        axis.axvline(100 * np.mean(list(chance.values())), linestyle="--", color="0.4")
        axis.set(xlabel=f"accuracy [%], mean over {len(datasets)} data sets; dashed: chance", xlim=(0, 105))
    save_figure(fig, run_dir / "benchmark.png")


def plot_shares(records, title, xlabel, key, path):
    """Accuracy over `share`, a line for each model, a panel for each value of `key`."""
    panels = distinct(records, key)
    fig, axes = new_figure(title, 1, len(panels), (5 * len(panels) + 3, 4.5))
    for axis, panel in zip(axes, panels):
        own = [record for record in records if record.get(key) == panel]
        shares = sorted(distinct(own, "share"))
        for i, model in enumerate(distinct(own, "model")):
            runs = {share: values_of(own, "accuracy", model=model, share=share) for share in shares}
            at = [100 * share for share in shares if runs[share]]
            plot_curve(axis, at, 100 * np.array(list(filter(None, runs.values()))).T, model, i, MARKERS[i % 7])
        if shares[-1] == 1:  # 0, 5, 10 and 100 %
            axis.set_xscale("symlog", linthresh=10)
        axis.set_xticks([100 * share for share in shares], [f"{share:.0%}" for share in shares])
        low, high = axis.get_ylim()  # an interval may reach beyond what an accuracy can be
        axis.set(title=panel, xlabel=xlabel, ylabel="test accuracy [%]", ylim=(max(low, 0), min(high, 101)))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    save_figure(fig, path)


def plot_columns(names, similarity, unit, path):
    """Heatmap of the similarities and a map of the names by their first two principal components, numbered alike."""
    fig, axes = new_figure("Column names by their embedding", 1, 2, (15, 7))
    image = axes[0].imshow(similarity, cmap="Greys", vmin=min(0, similarity.min()), vmax=1, aspect="auto")
    fig.colorbar(image, ax=axes[0], label="cosine similarity", shrink=0.8)
    if len(names) <= 45:
        axes[0].set_yticks(range(len(names)), [f"{name}  {i}" for i, name in enumerate(names, start=1)], fontsize=8)
        axes[0].set_xticks(range(len(names)), range(1, len(names) + 1), fontsize=6)
    axes[0].grid(visible=False)
    u, s, _ = np.linalg.svd(unit - unit.mean(0), full_matrices=False)
    points, places = u[:, :2] * s[:2], []
    label_size = np.ptp(points, axis=0) * (0.06, 0.03)
    axes[1].scatter(*points.T, s=12)
    for i, at in enumerate(points, start=1):  # names that lie together have one label
        near = [numbers for place, numbers in places if (np.abs(at - place) < label_size).all()]
        if near:
            near[0].append(str(i))
        else:
            places.append((at, [str(i)]))
    for at, numbers in places:
        axes[1].annotate(", ".join(numbers), at, xytext=(3, 3), textcoords="offset points", fontsize=8)
    first, second = 100 * s[:2] ** 2 / (s**2).sum()
    axes[1].set(title="principal components, numbered as on the left", xlabel=f"first ({first:.0f} % of the variance)",
                ylabel=f"second ({second:.0f} % of the variance)")
    save_figure(fig, path)


# --- Results ----------------------------------------------------------------------------------------------------------


def summary(results):
    """The tables of a finished run as Markdown; empty columns are left out, a value that is None is a dash."""
    args = results["arguments"]
    seeds = f"seed {args['seed']}" + (f" to {args['seed'] + args['runs'] - 1}" if args["runs"] > 1 else "")
    parts = [f"# duet.py, head {args['head']}, {seeds}"]
    for name, data in results["data"].items():
        left_out = "; ".join(f"{column!r} left out, {why}" for column, why in data["left_out"].items())
        columns = ", ".join(f"{column} ({words})" for column, words in data["columns"].items())
        source = data["source"] + (f", protocol {data['protocol']}" if "protocol" in data else "")
        parts.append(f"{name}: {source}, {data['rows']:,} rows, {columns}" + (f"; {left_out}" * bool(left_out)))
    parts += [f"**{name} was not run:** {why}" for name, why in results["not_run"].items()]
    for experiment in EXPERIMENTS:
        for name, rows in results.get(experiment, {}).get("tables", {}).items():
            columns = [column for column in rows[0] if any(row.get(column) is not None for row in rows)]
            lines = [columns, ["---"] * len(columns)]
            for row in rows:
                cells = [row.get(column) for column in columns]
                lines.append(["–" if cell is None else str(cell) for cell in cells])
            table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
            parts.append(f"## {experiment.replace('_', ' ')}: {name}\n\n{table}")
        parts += [results[experiment]["note"]] if experiment in results else []
    return "\n\n".join([*parts, INTERVAL * (args["runs"] > 1)]) + "\n"


def write_results(results, path):
    """Write plain JSON; returns the results as they are read back."""
    text = json.dumps(results, indent=1, allow_nan=False, default=lambda value: value.tolist())
    with whole_file(path) as file:
        file.write(text.encode())
    return json.loads(text)


def new_run(output_dir):
    """Make and return the next free folder run-001, run-002, … of this experiment."""
    parent = Path(output_dir) / "duet"
    while True:
        taken = [int(run.name[4:]) for run in parent.glob("run-*") if run.name[4:].isdigit()]
        run_dir = parent / f"run-{max(taken, default=0) + 1:03d}"
        with contextlib.suppress(FileExistsError):  # another process may have been quicker
            run_dir.mkdir(parents=True)
            return run_dir


def find_run(args):
    """(folder, arguments) of the unfinished run that --resume names, or of the newest one that did not fail."""
    parent = Path(args.output_dir) / "duet"
    newest_first = sorted(parent.glob("run-*"), key=lambda run: (len(run.name), run.name), reverse=True)
    newest = args.resume == "newest"
    for run_dir in newest_first if newest else [Path(args.resume) if os.sep in args.resume else parent / args.resume]:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # not a run's file
            results = json.loads((run_dir / "results.json").read_text())
            mine = results["experiment"] == "duet" and results["arguments"].keys() == vars(args).keys()
            if mine and not results["finished"] and not (newest and "failed" in results):
                return run_dir, results["arguments"]
    name = "" if newest else f" {args.resume!r}"
    raise UserError(f"{parent} has no unfinished run{name} of this duet.py; start one without --resume")


def describe_run(args):
    """What results.json holds from the beginning: arguments, versions, git commit."""
    folder = Path(globals().get("__file__", "duet.py")).resolve().parent
    commit, packages = None, ("torch", "numpy", "scikit-learn")
    with contextlib.suppress(OSError):  # no git on this machine
        git = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or None
    return {"experiment": "duet", "finished": False, "arguments": dict(vars(args)), "seed": args.seed,
            "git_commit": commit,
            "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages}}


# --- Command line -----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        unset = action.default is None or action.default is False
        return action.help if unset else super()._get_help_string(action)


def between(kind, low, high=math.inf):
    """An argparse type: a number of `kind` from `low` to `high`."""

    def number(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    return number


def parse_args(argv):
    parser = Parser("duet.py", description=__doc__.split("\n\n")[0], allow_abbrev=False, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="every experiment in a minute, no network, on the original's synthetic "
        "data, which a few steps are enough for")
    add("--dataset", nargs="+", choices=[*EMBEDDED, "etth1"], metavar="NAME", help=f"{', '.join(EMBEDDED)} (embedded), "
        "etth1 (downloaded); default: all three, etth1 if it can be had")
    add("--data", nargs="+", metavar="PATH", help="your own .csv files, in order of time, .ts files or folders of .ts")
    add("--target", metavar="COLUMN", help="of the .csv files: the classes are quantiles of its next value")
    add("--num-classes", type=between(int, 2, 100), default=3, metavar="N", help="quantile classes of --target")
    add("--synthetic-schemas", type=between(int, 0, 999), default=0, metavar="N", help="tables of 3-12 columns")
    add("--windows", type=between(int, 60), default=2000, metavar="N", help="of each embedded data set, 96 steps each")
    add("--protocol", choices=["original", "holdout"], help="original: class limits are quantiles of the whole series, "
        "embedded data are the original's synthetic ones, 5 %% of ETTh1 are left out; holdout: limits are quantiles "
        "of the rows before the test part, with a gap (default: for etth1 the original's limits, for --data holdout)")
    add("--strategies", nargs="+", choices=STRATEGIES, metavar="NAME", help="for the columns' names: "
        f"{', '.join(STRATEGIES)}; default: all, with --nan-robustness none")
    add("--shared", action="store_true", help="also one shared model for all data sets, with each strategy")
    add("--transfer", nargs="?", const="last", metavar="NAME", help="instead: pretrain on the other data sets, then "
        "learn NAME (without it the last one) with 0, 5, 10 and 100 %% of its labels")
    add("--nan-robustness", action="store_true", help="instead: accuracy with 0 to 50 %% of the values missing")
    add("--columns", action="store_true", help="instead: which names are near, by the encoder or --checkpoint")
    add("--predict", metavar="FILE", help="instead: classes and probabilities of the windows of FILE, by --checkpoint")
    add("--checkpoint", metavar="FILE", help="a finished model, of a run's folder models/")
    add("--bert-model", default="bert-base-uncased", metavar="NAME", help="encoder: a Hugging Face name, or a folder")
    add("--tokenization", choices=["words", "raw"], default="words", help="indoor_temp as indoor temperature, or as is")
    add("--prewarm", metavar="FILE", help="instead: put the column names in FILE, one a line, into the cache")
    add("--cache-stats", action="store_true", help="instead: how many embeddings of --bert-model are cached")
    add("--head", choices=["mean", "last", "ordinal"], default="mean", help="mean of all patches, as in the original, "
        "the last patch, or a forecast of --target cut by the class limits")
    add("--members", type=between(int, 0), metavar="N", help="models with convolutions, averaged, alone and with Hydra "
        "(default: 3 for files of the UEA and UCR archives, else none)")
    add("--dropout", type=between(float, 0, 0.99), default=0.1, metavar="P", help="in the encoder")
    add("--steps", type=between(int, 1), default=600, metavar="N", help="of training for each data set")
    add("--evaluations", type=between(int, 1), default=6, metavar="N", help="on validation; the best weights are kept")
    add("--batch-size", type=between(int, 1), default=128, metavar="N", help="windows in a batch")
    add("--learning-rate", type=between(float, 0), default=1e-3, metavar="RATE", help="after warm-up, before decay")
    add("--data-dir", default="data", metavar="FOLDER", help="downloads, and the cache FOLDER/column_embeddings")
    add("--output-dir", default="outputs", metavar="FOLDER", help="results go to FOLDER/duet/run-001, run-002, …")
    add("--resume", nargs="?", const="newest", metavar="RUN", help="go on with the newest unfinished run or this one")
    add("--seed", type=between(int, 0, 2**31), default=42, metavar="N", help="of models and training")
    add("--runs", type=between(int, 1, 999), default=1, metavar="N", help="seeds in a row: mean ± 95 %% interval")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu) or one of them")
    if "--quick" in argv:
        parser.set_defaults(windows=300, steps=40, batch_size=32, evaluations=2, shared=True, transfer="last",
                            nan_robustness=True, protocol="original")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if "" in (value if isinstance(value, list) else [value]):  # an empty path would be this folder
            raise UserError(f"--{name.replace('_', '-')} is an empty text")
    changed = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.resume and changed - {"resume", "output_dir", "device"}:
        raise UserError("--resume goes with --output-dir and --device only; a run keeps its own arguments")
    if args.predict and not args.checkpoint:
        raise UserError("--predict needs --checkpoint, a finished model of a run's folder models/")
    if args.checkpoint and (not (args.predict or args.columns) or args.quick or args.transfer or args.nan_robustness):
        raise UserError("--checkpoint goes with --predict or --columns, and with no other experiment")
    return args


def manage_cache(args):
    """--prewarm and --cache-stats: fill the cache, and return what it holds."""
    names = Path(args.prewarm).read_text(encoding="utf-8", errors="replace").split("\n") if args.prewarm else []
    try:
        embedder = FrozenBERTColumnEmbedder(**bert_options(args) | {"offline": args.prewarm is None})
        embedder.lookup([name.strip() for name in names if name.strip()])
        stats = embedder.get_cache_stats()
    except EncoderMissing:
        if args.prewarm:
            raise
        stats = {"cached_embeddings": 0, "cache_size_mb": 0.0, "bert_model": args.bert_model, "bert_dim": None}
    print(json.dumps(stats, indent=1))
    return stats


EXPERIMENTS = {"predict": predict_file, "columns": column_similarity, "nan_robustness": nan_robustness,
               "transfer": transfer, "benchmark": benchmark}


def run_experiments(args, run_dir):
    """The benchmark, or the experiments that the arguments name, written to `run_dir`; returns the results."""
    began = time.perf_counter()
    (run_dir / "models").mkdir(exist_ok=True)
    try:
        device = detect_device(args.device)
    except argparse.ArgumentTypeError as problem:
        raise UserError(f"--device: {problem}") from None
    todo = [name for name in EXPERIMENTS if getattr(args, name, False)]
    if args.quick or not todo:
        todo.append("benchmark")
    datasets = [] if args.checkpoint else load_datasets(args)
    if datasets:
        note_memory(datasets, args)
    if args.quick and len(datasets) < 2:  # nothing to transfer from
        todo.remove("transfer")
    strategies = args.strategies or (["none"] if todo == ["nan_robustness"] else STRATEGIES)
    strategies, not_run = list(dict.fromkeys(strategies)), {}
    if "frozen_bert" in strategies and {"nan_robustness", "transfer", "benchmark"} & set(todo):
        try:
            names = [name for data in datasets for name in data.columns]
            FrozenBERTColumnEmbedder(**bert_options(args)).lookup(names)
            todo += ["columns"] * (args.quick and not args.columns)
        except EncoderMissing as problem:
            if strategies == ["frozen_bert"]:
                raise
            strategies.remove("frozen_bert")
            not_run["frozen_bert"] = str(problem)
            note(f"warning: frozen_bert is not run: {problem}")
    results = describe_run(args) | {"data": {data.name: data.info for data in datasets}, "not_run": not_run}
    seconds = {"data": time.perf_counter() - began}
    settings = argparse.Namespace(**vars(args), torch_device=device)
    for name in todo:
        began = time.perf_counter()
        results[name] = EXPERIMENTS[name](settings, datasets, strategies, run_dir)
        seconds[name] = time.perf_counter() - began
    unit = 2 ** (20 if sys.platform == "darwin" else 10)
    peak = resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    results |= {"finished": True, "device": str(device), "peak_memory_mib": peak, "seconds": seconds}
    (run_dir / "summary.md").write_text(summary(results))
    return write_results(results, run_dir / "results.json")


def main(argv=None):
    """Run the experiment with `argv` as on a command line (default: this process's, in a notebook none).

    Returns the results dictionary; what a user can put right raises SystemExit(2), Ctrl-C SystemExit(130).
    """
    run_dir, resumed = None, False
    try:
        args = parse_args(([] if in_notebook() else sys.argv[1:]) if argv is None else argv)
        if args.prewarm or args.cache_stats:
            return manage_cache(args)
        resumed = args.resume is not None
        if resumed:
            given = {"output_dir": args.output_dir} | ({} if args.device == "auto" else {"device": args.device})
            run_dir, kept = find_run(args)
            args = argparse.Namespace(**kept | given)
        run_dir = run_dir or new_run(args.output_dir)
        write_results(describe_run(args), run_dir / "results.json")
        results = run_experiments(args, run_dir)
    except KeyboardInterrupt:
        go_on = f"; to go on: python duet.py --resume {run_dir.name} --output-dir {args.output_dir}" if run_dir else ""
        note(f"stopped{go_on}")
        raise SystemExit(130) from None
    except UserError as problem:
        error = str(problem)
        if isinstance(problem, Diverged):
            write_results(describe_run(args) | {"failed": error}, run_dir / "results.json")
    except torch.OutOfMemoryError:
        error = "not enough GPU memory; lower --batch-size, or take --device cpu"
    except OSError as problem:
        error = f"{problem.filename}: {problem.strerror}" if problem.filename else str(problem)
    else:
        print((run_dir / "summary.md").read_text())
        print(f"Everything is in {run_dir}")
        return results
    if run_dir and not resumed and not list(run_dir.rglob("*.pt")):  # leave no empty run behind
        shutil.rmtree(run_dir)
    print(f"duet.py: error: {error}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
