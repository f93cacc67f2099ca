"""Can a small transformer tell fire from burnt toast, and does it beat trees on the same sensor windows?

Method: windows of 60 s from five areas of a building (1 to 6 sensors each, 1 Hz) are classified as normal, warning or
fire at their last second. A transformer with an area embedding is trained on the raw windows; random forest, extra
trees and gradient boosting on summary statistics of the same windows; a majority vote joins the four. All of them,
logistic regression and the majority class are scored on the same later, unseen part of every area.

    python fire.py                                        # embedded sensors, 100,000 rows an area: 2 minutes
    python fire.py --sample-per-area 1000000              # the full job, 5 M rows: 20 minutes on 2 cores
    python fire.py --quick                                # everything, small: under a minute
    python fire.py --data FOLDER --label-column alarm     # your own CSV or Parquet files, one an area
    python fire.py --data s3://bucket/prefix --save-to s3://bucket/models    # versions v0001, v0002, …
    python fire.py --resume                               # go on with the newest unfinished run
    python fire.py --predict NEW.csv --area voc --checkpoint outputs/fire/run-001/transformer.pt
    python fire.py --compare outputs/fire/*/results.json  # accuracy, hours, cost
    torchrun --nproc-per-node 2 fire.py                   # two processes; more machines: see the README

Written to outputs/fire/run-001/ (the next free number): results.json, summary.md, transformer.pt (weights, arguments,
normalization), trees.joblib, checkpoint.pt (for --resume), nine pictures, training_progress.gif and
model_comparison.html; or predictions.csv; or cost_comparison.png.

Without --data the sensors are synthetic. Their labels follow the hidden intensity of an incident, with limits that
differ a little from incident to incident as annotators do, so nothing can be perfect: an oracle that knows the
intensity itself, without noise, reaches 98.3 % (measured, 5 M rows, seed 42).

The risk head (0 to 100) is trained towards 0, 50 and 100 for normal, warning and fire at the last row. The loss is
the class-weighted cross-entropy plus RISK_WEIGHT times the squared error of risk / 100.

Measured so, test accuracy: gradient boosting 95.7, ensemble 95.6, transformer 94.6 (95.1 with --patch-len 5, in a
third of the time), logistic regression 94.3, always "normal" 71.3 %.

Sources: a plan to train a "Fire Detection AI" on 5 M of 50 M rows (its bucket is not public), which sampled single
rows and let windows of one incident fall on both sides of its split; the first is not done here, the second only where
a class would be missing otherwise (it says so) or no quiet stretch is near the cut. Transformer: Vaswani et al. 2017,
pre-norm after Xiong et al. 2020. Trees: Breiman 2001, Geurts et al. 2006, Ke et al. 2017.
"""

import argparse
import contextlib
import copy
import hashlib
import importlib.metadata
import io
import json
import math
import os
import pickle
import platform
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from itertools import chain, pairwise, zip_longest
from pathlib import Path

import joblib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from common import (detect_device, has_bfloat16, in_notebook, mean_and_interval, new_figure, plot_bars, plot_confusion,
                    plot_curve, plot_history, plot_ranking, plt, save_figure, seed_everything)

try:
    import resource
except ImportError:  # Windows: memory is then not reported
    resource = None

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
CLASSES = ["normal", "warning", "fire"]
TARGET_MIX = np.array([0.70, 0.20, 0.10])  # the seed's aim for its sample
TARGET_ACCURACY = 0.94  # the seed expects 94 to 96 %
SEED_CLAIM = {"model": "the seed's plan, a claim", "accuracy %": "94 to 96"}
SEED_REFERENCE = {"run": "the seed's 50M model, a claim", "rows": "50,000,000", "training h": 43.0, "$ per h": 3.825}
MAX_SENSORS = 6
PARTS = {"train": 0.70, "validation": 0.15, "test": 0.15}
MIN_WINDOWS = 5  # a part with fewer windows of a class cannot measure it
RISK_WEIGHT = 0.5
MAX_FIRES = 200  # fires of the test part whose detection delay is measured
VOTERS = ["transformer", "random forest", "extra trees", "gradient boosting"]

# The embedded generator. Each sensor: level, daily swing, drift, noise, rise at the outbreak of fire, lag [s], rise in
# the area's harmless look-alike.
SENSORS = {
    "basement": {
        "temperature_c": (18.0, 1.0, 0.6, 0.3, 8.0, 40, 4.0),
        "humidity_pct": (55.0, 4.0, 3.0, 1.0, -6.0, 60, 10.0),
        "co_ppm": (3.0, 0.4, 0.4, 1.0, 16.0, 10, 8.0),
        "smoke_pct_m": (0.4, 0.0, 0.06, 0.15, 2.5, 5, 1.6),
        "methane_ppm": (2.0, 0.2, 0.3, 0.4, 2.0, 15, 4.0),
        "co2_ppm": (600.0, 60.0, 30.0, 20.0, 250.0, 20, 240.0),
    },
    "laundry": {
        "temperature_c": (22.0, 1.5, 0.6, 0.3, 9.0, 40, 8.0),
        "humidity_pct": (45.0, 4.0, 3.0, 1.0, -5.0, 60, 12.0),
        "co_ppm": (2.0, 0.3, 0.3, 1.0, 14.0, 10, 2.0),
        "smoke_pct_m": (0.4, 0.0, 0.05, 0.15, 2.2, 5, 0.6),
        "lint_ug_m3": (20.0, 4.0, 3.0, 5.0, 60.0, 5, 100.0),
    },
    "asd": {
        "temperature_c": (21.0, 0.8, 0.4, 0.25, 5.0, 50, 0.0),
        "airflow_l_min": (45.0, 0.5, 1.0, 0.8, -4.0, 20, -4.0),
        "smoke_pct_m": (0.04, 0.0, 0.006, 0.012, 0.22, 3, 0.28),
        "particles_per_cm3": (800.0, 60.0, 60.0, 75.0, 1500.0, 3, 2400.0),
    },
    "voc": {
        "temperature_c": (22.0, 1.0, 0.5, 0.25, 6.0, 45, 0.0),
        "tvoc_ppb": (180.0, 30.0, 20.0, 25.0, 500.0, 8, 800.0),
        "formaldehyde_ug_m3": (25.0, 4.0, 3.0, 4.0, 45.0, 10, 60.0),
        "co2_ppm": (650.0, 80.0, 30.0, 20.0, 220.0, 20, 20.0),
    },
    "arc": {
        "temperature_c": (28.0, 2.0, 0.8, 0.4, 12.0, 60, 2.0),
        "current_a": (12.0, 2.0, 0.5, 0.6, 5.0, 0, 6.0),
        "arc_pulses_per_s": (3.0, 0.2, 0.1, 1.5, 16.0, 0, 20.0),
        "ozone_ppb": (15.0, 3.0, 1.5, 2.0, 25.0, 12, 16.0),
    },
}
LOOKALIKES = {"basement": "cooking", "laundry": "dryer cycle", "asd": "dust", "voc": "solvent", "arc": "switching arcs"}
BLOCK_ROWS = 3600
WARNING_AT, FIRE_AT = 0.17, 1.0  # limits of the hidden intensity


class UserError(Exception):
    """Something that the user can put right: main() makes it one line on stderr and exit code 2."""


def note(text):
    if RANK == 0:
        print(f"fire.py: {text}", file=sys.stderr)


# --- Data: the embedded generator -----------------------------------------------------------------------------------


def intensity(t, onset, growth, burn, decay, scale):
    """Hidden intensity of an incident at `t` [s]: quadratic growth to `scale` in `growth` seconds and on for `burn`."""
    grown = scale * (np.clip(t - onset, 0, growth + burn) / growth) ** 2
    return grown * np.exp(-np.clip(t - onset - growth - burn, 0, None) / decay)


def lookalike(kind, t, start, length, rng):
    """Shape in 0..1 over `t` [s] of a harmless event that looks like the beginning of a fire."""
    phase = np.clip((t - start) / length, 0, 1)
    if kind == "cooking":
        return np.sin(np.pi * phase) ** 2
    if kind == "dryer cycle":
        return ((phase > 0) & (phase < 1)) * np.clip(2 * np.sin(2 * np.pi * (t - start) / 240), 0, 1)
    if kind == "solvent":
        return (phase > 0) * np.exp(-4 * (t - start).clip(0) / length)
    bursts = start + length * rng.random((12, 1))  # dust and switching arcs
    return np.exp(-np.abs(t - bursts) / rng.uniform(4, 20, (12, 1))).max(axis=0)


def generate_block(area, block, seed):
    """Hour number `block` of an area, the same whichever blocks were made before.

    Returns readings [3600, sensors] float32 with NaN where a sensor drops out, labels [3600] int8, and what the oracle
    answers [3600] int8: the class by the noise-free intensity and the usual limits.
    """
    number = list(SENSORS).index(area)
    rng = np.random.default_rng([seed, number, 1 + block])
    level, swing, drift, noise, rise, lag, false_rise = np.array(list(SENSORS[area].values())).T[:, :, None]
    t = np.arange(BLOCK_ROWS)
    hours = block + t / 3600

    growth, burn, decay = rng.uniform((500, 200, 60), (1100, 650, 180))
    onset = rng.uniform(0, BLOCK_ROWS - growth - burn - 6 * decay)
    scale = 1.0 if rng.random() < 0.66 else rng.uniform(0.35, 0.85) / (1 + burn / growth) ** 2  # else it never ignites
    incident = growth, burn, decay, scale
    hidden = intensity(t, onset, *incident)
    felt = intensity(t, onset + lag, *incident)  # [sensors, time]: each sensor lags behind
    gain = np.exp(0.1 * rng.standard_normal() + 0.25 * rng.standard_normal((len(level), 1)))  # how near each sensor is

    x = level + swing * np.sin(2 * np.pi * (hours - 9) / 24)
    phases = np.random.default_rng([seed, number]).uniform(0, 2 * np.pi, (3, len(level), 1))
    for period, phase in zip((7.3, 31.0, 170.0), phases):
        x = x + drift / math.sqrt(3) * np.sin(2 * np.pi * hours / period + phase)
    x += rise * gain * felt
    for start, length, size in rng.uniform((0, 300, -0.5), (BLOCK_ROWS - 900, 900, 0.5), (3, 3)):
        x += false_rise * math.exp(size) * lookalike(LOOKALIKES[area], t, start, length, rng)
    x += noise * (1 + 0.5 * felt) * rng.standard_normal(x.shape, dtype=np.float32)
    x = np.maximum(x, 0)
    x[rng.random(x.shape, dtype=np.float32) < 0.002] = np.nan
    for sensor in np.flatnonzero(rng.random(len(level)) < 0.15):
        start, length = rng.integers((0, 10), (BLOCK_ROWS, 300))
        x[sensor, start : start + length] = np.nan

    usual = np.array([WARNING_AT, FIRE_AT])
    annotated = usual * np.exp(rng.normal(0, (0.15, 0.10)))
    labels, oracle = (np.searchsorted(limits, hidden, side="right").astype(np.int8) for limits in (annotated, usual))
    return x.T.astype(np.float32), labels, oracle


def generate_area(area, rows, seed):
    """The first `rows` seconds of an area: readings [rows, sensors], labels [rows], oracle [rows]."""
    blocks = [generate_block(area, block, seed) for block in range(math.ceil(rows / BLOCK_ROWS))]
    return tuple(np.concatenate(arrays)[:rows] for arrays in zip(*blocks))


# --- Data: CSV and Parquet files, on this machine or in S3 ------------------------------------------------------------


LABEL_COLUMNS = ("label", "is_anomaly")
LABEL_CODES = {"normal": 0, "warning": 1, "fire": 2, "0": 0, "1": 1, "2": 2, "0.0": 0, "1.0": 1, "2.0": 2,
               "false": 0, "true": 1}


@contextlib.contextmanager
def file_errors(where, names=()):
    """Turn what pyarrow says about a bad file into one line with file, row and column (`names`: those of a CSV)."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        text = " ".join(str(error).split())
        cell = re.search(r"In CSV column #(\d+): Row #(\d+): CSV conversion error to (\w+).*?: (.*)", text)
        ragged = re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+)", text)
        if cell:
            wanted = "readable text" if cell[3] == "string" else "a number"
            text = f"row {cell[2]}, column {names[int(cell[1])]!r}: {cell[4]}, {wanted} is needed"
        elif ragged:
            text = f"row {ragged[1]}: {ragged[3]} cells, the header has {ragged[2]}"
        raise UserError(f"{where}: {text}") from None


def open_address(address):
    """(pyarrow filesystem, path in it) of a path or of s3://bucket/key, with the usual AWS_… variables and profiles."""
    from pyarrow import fs

    if not str(address).startswith("s3://"):
        return fs.LocalFileSystem(), os.path.abspath(address)
    path = str(address).removeprefix("s3://").strip("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    with file_errors(address):
        if endpoint:
            return fs.S3FileSystem(endpoint_override=endpoint), path
        return fs.FileSystem.from_uri("s3://" + path.split("/")[0])[0], path  # finds the bucket's region


def file_sha256(address):
    filesystem, path = open_address(address)
    with file_errors(address), filesystem.open_input_stream(path, compression=None) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_files(addresses):
    """{area: address} of files and folders; an area is a stem up to the first _, or whole where those clash."""
    from pyarrow import fs

    files = []
    for address in addresses:
        filesystem, path = open_address(address)
        with file_errors(address):
            found = [filesystem.get_file_info(path)]
            if found[0].type == fs.FileType.NotFound:
                raise UserError(f"{address}: no such file, folder or bucket; CSV and Parquet files are read")
            if found[0].type == fs.FileType.Directory:
                found = [info for info in filesystem.get_file_info(fs.FileSelector(path))
                         if info.is_file and info.extension.lower() in ("csv", "parquet")]
        if not found:
            raise UserError(f"{address}: no .csv or .parquet file in this folder")
        files += sorted(("s3://" if str(address).startswith("s3://") else "") + info.path for info in found)
    for name in (lambda file: Path(file).stem.split("_")[0], lambda file: Path(file).stem):
        areas = {name(file): file for file in files}
        if len(areas) == len(files):
            return areas
    raise UserError(f"two --data files have the same name, rename one: {', '.join(files)}")


def is_parquet(address):
    return str(address).lower().endswith(".parquet")


def is_text(column):
    import pyarrow as pa

    return pa.types.is_string(column.type) or pa.types.is_large_string(column.type)


def column_names(address):
    """The columns of a CSV or Parquet file, each of them once."""
    import pyarrow.csv
    import pyarrow.parquet

    filesystem, path = open_address(address)
    with file_errors(address):
        if is_parquet(address):
            names = pyarrow.parquet.ParquetFile(filesystem.open_input_file(path)).schema_arrow.names
        else:
            read = pyarrow.csv.ReadOptions(use_threads=False)  # with threads the errors would have no row numbers
            names = pyarrow.csv.open_csv(filesystem.open_input_stream(path), read).schema.names
    if len(set(names)) < len(names):
        raise UserError(f"{address}: two columns have the same name: {', '.join(names)}")
    return names


def choose_columns(address, label_column=None):
    """(sensor columns, label column) of a file with labels."""
    names = column_names(address)
    label = label_column or next((name for name in LABEL_COLUMNS if name in names), "label")
    if label not in names:
        raise UserError(f"{address}: no column {label!r}, only {', '.join(names)}; --label-column names the label")
    left_out = [name for name in names if re.fullmatch(r"|Unnamed: \d+|__index_level_\d+__", name)]
    left_out += [name for name in LABEL_COLUMNS if name in names and name != label]
    if left_out:
        columns = ", ".join(map(repr, left_out))
        note(f"{address}: column {columns} left out, since a row index or a second label gives the answer away")
    sensors = [name for name in names if name not in (label, *left_out) and name.lower() != "timestamp"]
    if not 1 <= len(sensors) <= MAX_SENSORS:
        raise UserError(f"{address}: {len(sensors)} sensor columns ({', '.join(sensors)}), must be 1 to {MAX_SENSORS}")
    return sensors, label


def read_file(address, sensors, label=None):
    """(readings, codes, times) of a CSV or Parquet file.

    Readings [rows, 6] float32 are NaN where missing and 0 in the columns beyond `sensors`; codes [rows] int8 are
    positions in LABEL_CODES, None without `label`; times are the column "timestamp", None where there is none.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv
    import pyarrow.parquet

    names, codes, times = column_names(address), None, None
    stamp = next((name for name in names if name.lower() == "timestamp"), None)
    columns = [*sensors, *filter(None, (label, stamp))]
    first = 1 if is_parquet(address) else 2  # in a CSV the header is row 1
    filesystem, path = open_address(address)
    with file_errors(address, names):
        if is_parquet(address):
            table = pa.parquet.read_table(filesystem.open_input_file(path), columns=columns)
        else:
            types = dict.fromkeys(sensors, pa.float32()) | ({label: pa.string()} if label else {})
            convert = pa.csv.ConvertOptions(include_columns=columns, column_types=types)
            read = pa.csv.ReadOptions(use_threads=False)
            table = pa.csv.read_csv(filesystem.open_input_stream(path), read, convert_options=convert)
    if not table.num_rows:
        raise UserError(f"{address}: no rows")
    readings = np.zeros((table.num_rows, MAX_SENSORS), np.float32)
    for i, name in enumerate(sensors):
        if is_text(table[name]):  # in Parquet
            text = f"row {first}, column {name!r}: {table[name][0].as_py()!r} is text, numbers are needed"
            raise UserError(f"{address}: {text}")
        with file_errors(f"{address}: column {name!r}"):
            readings[:, i] = table[name].cast(pa.float32(), safe=False)
    readings[~np.isfinite(readings)] = np.nan
    if label:
        text = pc.utf8_lower(pc.utf8_trim_whitespace(table[label].cast(pa.string())))
        codes = pc.index_in(text, pa.array(LABEL_CODES)).fill_null(-1).to_numpy().astype(np.int8)
        if codes.min() < 0:
            bad = int(codes.argmin())
            raise UserError(f"{address}: row {first + bad}, column {label!r}: {table[label][bad].as_py()!r} is no "
                            "label, which are 0, 1, 2 or normal, warning, fire")
    if stamp:
        times = table[stamp].combine_chunks()
        with file_errors(f"{address}: column {stamp!r}"):
            back = [] if is_text(times) else pc.indices_nonzero(pc.less(times[1:], times[:-1]))
        if len(back):
            where = f"{address}: row {first + 1 + back[0].as_py()}, column {stamp!r}"
            raise UserError(f"{where}: earlier than the row above; sort the file by time")
    return readings, codes, times


# --- Data: areas, split, sample, windows -----------------------------------------------------------------------------


@dataclass
class Area:
    """One area before sampling."""

    sensors: list  # names
    labels: np.ndarray  # [rows] int8
    readings: np.ndarray  # [rows, 6] float32, NaN where missing
    oracle: np.ndarray | None = None  # [rows] int8, in the embedded generator


def embedded_areas(rows, seed):
    """{area: Area} of the embedded generator, `rows` seconds each."""
    areas = {}
    for area, sensors in SENSORS.items():
        readings, labels, oracle = generate_area(area, rows, seed)
        readings = np.pad(readings, ((0, 0), (0, MAX_SENSORS - len(sensors))))
        areas[area] = Area(list(sensors), labels, readings, oracle)
    return areas


def file_areas(addresses, label_column):
    """{area: Area} of CSV and Parquet files, and [{path, area, rows, sha256}, …]."""
    addresses, read = list_files(addresses), {}
    for area, address in addresses.items():
        sensors, label = choose_columns(address, label_column)
        read[area] = sensors, label, *read_file(address, sensors, label)[:2]
    texts, areas, files = np.array(list(LABEL_CODES)), {}, []
    for area, (sensors, label, readings, codes) in read.items():
        classes = np.array(list(LABEL_CODES.values()), np.int8)
        alike = [other for _, column, _, other in read.values() if column == label]  # it means the same everywhere
        if not {"2", "2.0", *CLASSES} & {text for other in alike for text in texts[np.unique(other)]}:
            classes[classes == 1] = 2  # 0 and 1 alone are normal and fire
        areas[area] = Area(sensors, classes[codes], readings)
        address = addresses[area]
        files.append({"path": address, "area": area, "rows": len(codes), "sha256": file_sha256(address)})
    return areas, files


def calm_row(labels, row, gap):
    """The first row from `row` on that begins `gap` normal rows; `row` itself where there is none within 5 % of all."""
    incidents = np.append(0, np.cumsum(labels > 0))
    calm = np.flatnonzero(incidents[row + gap :] == incidents[row : len(incidents) - gap])
    return row + int(calm[0]) if len(calm) and calm[0] <= 0.05 * len(labels) else row


def split_rows(labels, gap, by_run=False):
    """{part: [(start, stop), …]} of one area: 70, 15 and 15 % in order of time, `gap` rows apart.

    A cut waits for the next `gap` normal rows, if they are near, so that no incident is on both sides. With `by_run`
    each run of one label is split so (all of a short one is for training): every class gets into every part, but parts
    of one incident are on both sides, which is optimistic.
    """
    edges = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist() * by_run, len(labels) + gap]
    parts = {part: [] for part in PARTS}
    for start, stop in pairwise(edges):
        stop -= gap  # from the next run, too
        first, second = (start + int(share * (stop - start)) for share in np.cumsum(list(PARTS.values()))[:2])
        if not by_run:
            first, second = calm_row(labels, first, gap), calm_row(labels, second, gap)
        ranges = [(start, first), (first + gap, second), (second + gap, stop)]
        if by_run and stop - second < 2 * gap:
            ranges = [(start, stop)]
        for part, (begin, end) in zip(PARTS, ranges):
            parts[part] += [(begin, end)] if end - begin >= gap else []
    return parts


def window_starts(segments, seq_len, stride):
    """First rows [windows] of the windows that lie whole in one of `segments` [(start, stop), …]."""
    starts = [np.arange(start, stop - seq_len + 1, stride) for start, stop in segments]
    return np.concatenate([np.zeros(0, np.int64), *starts])


def sample_blocks(ranges, labels, rows, block_rows, rng=None):
    """About `rows` rows of `ranges` [(start, stop), …] in blocks of `block_rows`; all, where there are hardly more.

    Evenly spaced; with `rng` at random instead, and so that the classes come near TARGET_MIX.
    """
    if sum(stop - start for start, stop in ranges) <= 1.1 * rows:
        return ranges
    blocks = [(begin, min(begin + block_rows, stop)) for start, stop in ranges
              for begin in range(start, stop, block_rows)]
    count = min(len(blocks), max(1, rows // block_rows))
    if rng is None:
        return [blocks[i] for i in np.linspace(0, len(blocks) - 1, count).round().astype(int)]
    classes = np.array([np.bincount(labels[begin:end], minlength=3) for begin, end in blocks])  # [blocks, 3] rows
    order, chosen = rng.permutation(len(blocks)), np.zeros(len(blocks), bool)
    for rare in (2, 1):  # blocks with fire until there is enough of it, then with warnings, then the most normal ones
        for i in order[classes[order, rare] > 0]:
            if chosen.sum() == count or classes[chosen, rare].sum() >= TARGET_MIX[rare] * rows:
                break
            chosen[i] = True
    rest = order[~chosen[order]]
    rest = rest[np.argsort(classes[rest, 1:].sum(axis=1), kind="stable")]
    chosen[rest[: count - chosen.sum()]] = True
    return [blocks[i] for i in np.flatnonzero(chosen)]


def sample_parts(labels, split, args, rng):
    """{part: [(start, stop), …]} of one area, about --sample-per-area rows in all, out of a `split` of that form."""
    sampled = {}
    for part, share in PARTS.items():
        rows = int(share * args.sample_per_area)
        # Training takes many short blocks, for the mix of classes; the others few long ones, which leave fires whole.
        block_rows = max(args.seq_len, min(50 * args.seq_len, rows // 10) if part == "train" else rows // 4)
        sampled[part] = sample_blocks(split[part], labels, rows, block_rows, rng if part == "train" else None)
    return sampled


def choose_split(areas, args):
    """({area: {part: [(start, stop), …]}}, name of the split): sampled in order of time, or by label run if that helps.

    Raises UserError where there are too few rows, or one class only.
    """
    needed = math.ceil(2 * args.seq_len / PARTS["test"]) + 1
    for name, area in areas.items():
        if len(area.labels) < needed:
            raise UserError(f"area {name!r} has {len(area.labels)} rows, --seq-len {args.seq_len} needs {needed}")
    present = np.unique(np.concatenate([np.unique(area.labels) for area in areas.values()]))
    splits, lacking = [], []
    for by_run in (False, True):
        split, windows = {}, {part: [] for part in PARTS}
        for number, (name, area) in enumerate(areas.items()):
            rng = np.random.default_rng([args.seed, number])
            split[name] = sample_parts(area.labels, split_rows(area.labels, args.seq_len, by_run), args, rng)
            for part, ranges in split[name].items():
                windows[part].append(area.labels[window_starts(ranges, args.seq_len, args.stride) + args.seq_len - 1])
        counts = {part: np.bincount(np.concatenate(labels), minlength=3) for part, labels in windows.items()}
        splits.append((split, counts))
        lacking.append([f"{CLASSES[c]} in {part}" for part in PARTS for c in present if counts[part][c] < MIN_WINDOWS])
        if not lacking[-1]:
            break
    by_run = len(lacking[-1]) < len(lacking[0])
    if lacking[0]:
        note(f"in order of time there are fewer than {MIN_WINDOWS} windows of {', '.join(lacking[0])}")
    if by_run:
        note("each label run is split instead: parts of one incident are on both sides, all figures are optimistic")
    if lacking[by_run]:
        note(f"figures about {', '.join(lacking[by_run])} say little")
    split, counts = splits[by_run]
    if np.count_nonzero(counts["train"]) < 2 or not all(part.any() for part in counts.values()):
        raise UserError(f"the training part has {counts['train'].tolist()} windows of {', '.join(CLASSES)}: nothing to "
                        "tell apart; take more rows, or a shorter --seq-len or --stride")
    return split, "by label run (optimistic)" if by_run else "chronological"


@dataclass
class SensorData:
    """The sampled rows of all areas end to end; a window is seq_len of them from its first row on."""

    readings: np.ndarray  # [rows, 6] float32, normalized with mean and std, NaN where missing
    labels: np.ndarray  # [rows] int8
    areas: np.ndarray  # [rows] int16, number of the area
    oracle: np.ndarray | None  # [rows] int8, what the oracle answers
    segments: dict  # part: [(start, stop), …], unbroken in time
    mean: np.ndarray  # [areas, 6] of the training part
    std: np.ndarray
    info: dict  # for results.json: source, files, areas with their sensors, rows, sha256, split


def normalize(readings, areas, train):
    """Scale `readings` [rows, 6] in place, each of `areas` [rows] by its rows in `train` [rows] bool.

    Returns mean and std [areas, 6]. The mean of a sensor that no training row has is NaN, so that it stays missing.
    """
    mean, std = (np.zeros((areas[-1] + 1, MAX_SENSORS)) for _ in range(2))
    for area in range(len(mean)):
        known = readings[train & (areas == area)]
        count = np.isfinite(known).sum(axis=0)
        mean[area] = np.where(count, np.nansum(known, axis=0, dtype=np.float64) / count.clip(1), np.nan)
        std[area] = np.sqrt(np.nansum((known - mean[area]) ** 2, axis=0) / count.clip(1))
        std[area][std[area] <= 1e-6 * np.abs(mean[area])] = 1  # a constant column
        readings[areas == area] = (readings[areas == area] - mean[area]) / std[area]
    return mean, std


def load_data(args):
    """Read or generate the areas, split them, sample blocks and normalize: SensorData."""
    if args.data:
        areas, files = file_areas(args.data, args.label_column)
    else:
        note("no --data: the embedded generator makes the readings, all figures are about synthetic sensors")
        areas, files = embedded_areas(args.sample_per_area, args.seed), []
    split, split_name = choose_split(areas, args)
    kept = {}
    for name, area in areas.items():
        kept[name] = np.zeros(len(area.labels), bool)
        for start, stop in chain.from_iterable(split[name].values()):
            kept[name][start:stop] = True
    rows = sum(map(np.count_nonzero, kept.values()))
    readings, labels = np.empty((rows, MAX_SENSORS), np.float32), np.empty(rows, np.int8)
    oracle, numbers = np.empty(rows, np.int8), np.empty(rows, np.int16)
    available, segments, offset = sum(map(len, kept.values())), {part: [] for part in PARTS}, 0
    for number, (name, area) in enumerate(areas.items()):
        place = np.cumsum(kept[name]) - 1 + offset  # where a kept row comes to lie
        for part in PARTS:
            ranges = split[name][part]
            segments[part] += [(int(place[start]), int(place[start]) + stop - start) for start, stop in ranges]
        own = slice(offset, int(place[-1]) + 1)
        readings[own], labels[own], numbers[own] = area.readings[kept[name]], area.labels[kept[name]], number
        if area.oracle is not None:
            oracle[own] = area.oracle[kept[name]]
        area.readings, offset = None, own.stop  # its memory is needed
    train = np.zeros(len(labels), bool)
    for start, stop in segments["train"]:
        train[start:stop] = True
    mean, std = normalize(readings, numbers, train)
    digest = hashlib.sha256(readings)
    digest.update(labels)
    info = {"source": "real" if args.data else "embedded", "files": files, "split": split_name,
            "areas": {name: area.sensors for name, area in areas.items()},
            "rows_available": available, "rows": rows,
            "sha256": digest.hexdigest()}
    return SensorData(readings, labels, numbers, None if args.data else oracle, segments, mean, std, info)


def gather_windows(readings, starts, seq_len):
    """Readings [rows, 6] -> the windows [batch, seq_len, 6] that begin at the rows `starts` [batch]."""
    return readings.unfold(0, seq_len, 1)[starts].transpose(1, 2)


# --- Models -----------------------------------------------------------------------------------------------------------


class OptimizedFireTransformer(nn.Module):
    """The seed's transformer: area embedding, learned positions, a fire classifier and a risk head.

    Reads [batch, seq_len, input_dim] normalized readings, where NaN (missing) counts as 0, the mean of the training
    part, and area numbers [batch]; returns logits [batch, num_classes] and risk [batch] in 0 to 100. A token is
    `patch_len` time steps. 621,316 parameters at the defaults.
    """

    def __init__(self, input_dim=6, seq_len=60, d_model=128, num_heads=4, num_layers=3, num_classes=3, num_areas=5,
                 dropout=0.1, patch_len=1):
        super().__init__()
        self.patch_len = patch_len
        self.input_proj = nn.Linear(input_dim * patch_len, d_model)
        self.area_embedding = nn.Embedding(num_areas, d_model)
        self.pos_encoding = nn.Parameter(torch.randn(seq_len // patch_len, d_model))
        # Pre-norm, because the seed's learning rate of 0.002 is too much for post-norm; both heads begin with a norm.
        layer = nn.TransformerEncoderLayer(d_model, num_heads, 4 * d_model, dropout, "gelu", batch_first=True,
                                           norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.fire_classifier = nn.Sequential(
            nn.LayerNorm(d_model), nn.Dropout(dropout), nn.Linear(d_model, d_model // 2), nn.GELU(),
            nn.Linear(d_model // 2, num_classes))
        self.risk_predictor = nn.Sequential(
            nn.LayerNorm(d_model), nn.Linear(d_model, 64), nn.ReLU(), nn.Linear(64, 1), nn.Sigmoid())

    @classmethod
    def from_arguments(cls, arguments, areas):
        """The model that a run with `arguments` {name: value} trains on so many `areas`."""
        names = "seq_len", "d_model", "num_heads", "num_layers", "dropout", "patch_len"
        return cls(num_areas=areas, **{name: arguments[name] for name in names})

    def forward(self, x, area):
        x = torch.nan_to_num(x).unflatten(1, (-1, self.patch_len)).flatten(2)  # [batch, tokens, patch_len * input_dim]
        x = self.input_proj(x) + self.pos_encoding + self.area_embedding(area).unsqueeze(1)  # [batch, tokens, d_model]
        for layer in self.transformer.layers[:-1]:
            x = layer(x)
        # The label is that of the last row, so only the last token is read, and the last layer need compute no other:
        # the same numbers as the whole layer gives, 1.6 times as fast.
        layer = self.transformer.layers[-1]
        keys = layer.norm1(x)
        x = x[:, -1:] + layer.dropout1(layer.self_attn(keys[:, -1:], keys, keys, need_weights=False)[0])
        hidden = layer.dropout(layer.activation(layer.linear1(layer.norm2(x))))
        x = (x + layer.dropout2(layer.linear2(hidden))).squeeze(1)  # [batch, d_model]
        return self.fire_classifier(x), 100 * self.risk_predictor(x).squeeze(1)


STATISTICS = ["mean", "std", "min", "max", "last", "slope", "mean step", "missing"]


def window_features(data, starts, seq_len, chunk=8192):
    """What the trees see: STATISTICS of the six columns, then the area one-hot: [windows, 48 + areas] float32."""
    readings, time_steps = torch.from_numpy(data.readings), torch.arange(seq_len) - (seq_len - 1) / 2
    features = []
    for some in torch.from_numpy(starts).split(chunk):
        x = gather_windows(readings, some, seq_len)  # [chunk, seq_len, 6]
        missing = x.isnan()
        mean = x.nansum(1) / (~missing).sum(1).clamp(min=1)
        x = torch.where(missing, mean.unsqueeze(1), x)
        slope = torch.einsum("bsf,s->bf", x, time_steps) / (time_steps**2).sum()
        step = x.diff(dim=1).abs().mean(1)
        statistics = mean, x.std(1), x.amin(1), x.amax(1), x[:, -1], slope, step, missing.float().mean(1)
        features.append(torch.cat(statistics, dim=1))
    return np.hstack([torch.cat(features).numpy(), np.eye(len(data.mean), dtype=np.float32)[data.areas[starts]]])


def make_baselines(args):
    """{name: untrained scikit-learn model}; few estimators, as the seed asks."""
    from sklearn.ensemble import ExtraTreesClassifier, HistGradientBoostingClassifier, RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    forest = dict(n_estimators=args.num_trees, min_samples_leaf=2, n_jobs=-1, random_state=args.seed)
    boosting = dict(max_iter=args.num_trees, early_stopping=False, random_state=args.seed)
    return {
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
        "random forest": RandomForestClassifier(**forest),
        "extra trees": ExtraTreesClassifier(**forest),
        "gradient boosting": HistGradientBoostingClassifier(**boosting),
    }


def feature_importance(baselines, data, starts, args):
    """{tree model: {feature: importance}}: decrease of impurity; for boosting, accuracy lost by shuffling."""
    from sklearn.inspection import permutation_importance

    columns = [set(sensors) - {None} for sensors in zip_longest(*data.info["areas"].values(), [None] * MAX_SENSORS)]
    columns = [names.pop() if len(names) == 1 else f"column {i}" for i, names in enumerate(columns, start=1)]
    names = [f"{statistic}, {column}" for statistic in STATISTICS for column in columns] + list(data.info["areas"])
    some = np.random.default_rng(args.seed).permutation(starts)[:2000]
    lost = permutation_importance(baselines["gradient boosting"], window_features(data, some, args.seq_len),
                                  data.labels[some + args.seq_len - 1], n_repeats=3, random_state=args.seed)
    values = {name: baselines[name].feature_importances_ for name in ("random forest", "extra trees")}
    values["gradient boosting"] = lost.importances_mean
    return {name: dict(zip(names, scores)) for name, scores in values.items()}


def majority_vote(votes):
    """Class [windows] that most of `votes` [voters, windows] name; of tied classes the most dangerous one."""
    counts = (np.asarray(votes)[:, :, None] == np.arange(len(CLASSES))).sum(axis=0)  # [windows, classes]
    return len(CLASSES) - 1 - counts[:, ::-1].argmax(axis=1)


# --- Training ---------------------------------------------------------------------------------------------------------


def class_weights(labels, power):
    """Weights [3] proportional to (1 / share of the class) ** power, 1 on average over `labels`."""
    counts = np.bincount(labels, minlength=len(CLASSES))
    weights = (len(labels) / counts.clip(1)) ** power
    return weights * len(labels) / (weights @ counts)


def fire_loss(logits, risk, labels, weights, batch_labels):
    """Class-weighted cross-entropy plus RISK_WEIGHT times the squared error of risk / 100, aimed at 0, ½ and 1.

    The means are over `batch_labels`, of which `labels` may be the part of one process: the losses of the parts add up.
    """
    cross_entropy = F.cross_entropy(logits, labels, weights, reduction="sum") / weights[batch_labels].sum()
    squared_error = F.mse_loss(risk / 100, labels / 2, reduction="sum") / len(batch_labels)
    return cross_entropy + RISK_WEIGHT * squared_error


def from_rank_0(value):
    """What the first process of torchrun has as `value`, in all of them."""
    box = [value]
    if PROCESSES > 1:
        dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def sum_over_processes(*tensors):
    """Each of `tensors`, summed in place over the processes of torchrun."""
    for tensor in tensors if PROCESSES > 1 else ():
        dist.all_reduce(tensor)
    return tensors


@torch.inference_mode()
def predict(model, readings, areas, starts, seq_len, batch_size=1024):
    """(logits [windows, 3], risk [windows]) of the windows from `starts` on in `readings` [rows, 6], `areas` [rows]."""
    model.eval()
    device, outputs = readings.device, []
    with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
        batches = torch.as_tensor(starts, device=device).split(batch_size)
        for batch in tqdm(batches, "predicting", unit="batch", leave=False, disable=RANK > 0):
            outputs.append(model(gather_windows(readings, batch, seq_len), areas[batch].long()))
    return tuple(torch.cat(parts).float() for parts in zip(*outputs))


def train_transformer(model, data, validation, args, run_dir):
    """Train on the training part, with early stopping by accuracy on the windows from rows `validation` on.

    Every epoch cuts the windows anew, from a random row below the stride on, so that their number stays and they
    differ: that keeps 621,316 parameters from learning 58,000 windows by heart. Goes on from `run_dir`/checkpoint.pt
    where that exists; the model ends with its best weights. Returns the history, a dict for each epoch.
    """
    device = next(model.parameters()).device
    readings, areas, labels = (torch.from_numpy(array).to(device) for array in (data.readings, data.areas, data.labels))
    last, network = args.seq_len - 1, DistributedDataParallel(model) if PROCESSES > 1 else model
    own_validation = validation[RANK::PROCESSES]
    own_labels, validation_labels = (labels[torch.from_numpy(rows).to(device) + last].long()
                                     for rows in (own_validation, validation))
    segments = data.segments["train"]
    grid = window_starts(segments, args.seq_len, args.stride)
    weights = class_weights(data.labels[grid + last], args.class_weight_power)
    weights = torch.tensor(weights, dtype=torch.float32, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=args.weight_decay, fused=True)
    steps = args.epochs * math.ceil(len(grid) / args.batch_size)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # half a cosine, down to zero at the last step, after a warm-up
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1))))
    saved = {"model": model, "optimizer": optimizer, "schedule": schedule}
    history, best = load_checkpoint(run_dir / "checkpoint.pt", saved, data) or ([], {"accuracy": -1.0, "epoch": 0})

    first = len(history) + 1
    while len(history) < args.epochs and len(history) - best["epoch"] < args.patience:
        began, losses, correct = time.perf_counter(), [], torch.zeros((), dtype=torch.long, device=device)
        model.train()
        if RANK:
            torch.manual_seed(args.seed + RANK + PROCESSES * len(history))  # other dropout than in the first process
        offsets = torch.randint(args.stride, (len(segments),)).tolist()
        cut = [(start + offset, stop) for (start, stop), offset in zip(segments, offsets)]
        train = torch.from_numpy(window_starts(cut, args.seq_len, args.stride))
        batches = from_rank_0(train[torch.randperm(len(train))]).to(device).split(args.batch_size)
        bar = tqdm(batches, f"epoch {len(history) + 1}/{args.epochs}", unit="batch", leave=False, disable=RANK > 0)
        for batch in bar:
            starts = batch[RANK::PROCESSES]  # each process takes its share of the batch
            true = labels[starts + last].long()
            with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
                logits, risk = network(gather_windows(readings, starts, args.seq_len), areas[starts].long())
            loss = fire_loss(logits.float(), risk.float(), true, weights, labels[batch + last].long())
            optimizer.zero_grad()
            (loss * PROCESSES).backward()  # DistributedDataParallel takes the mean of the gradients, wanted is the sum
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            correct += (logits.argmax(1) == true).sum()
            if len(losses) % 20 == 1:
                bar.set_postfix(loss=f"{PROCESSES * loss.item():.3f}")
        logits, risk = predict(model, readings, areas, own_validation, args.seq_len)
        losses, loss, correct, right = sum_over_processes(
            torch.stack(losses), fire_loss(logits, risk, own_labels, weights, validation_labels), correct,
            (logits.argmax(1) == own_labels).sum())
        if not (losses.isfinite().all() and loss.isfinite()):
            raise UserError(f"the loss in epoch {len(history) + 1} is not finite; lower the --learning-rate")

        accuracy = right.item() / len(validation)
        history.append({
            "train_loss": losses.mean().item(),
            "validation_loss": loss.item(),
            "train_accuracy": correct.item() / sum(map(len, batches)),
            "validation_accuracy": accuracy,
            "learning_rate": schedule.get_last_lr()[0],
            "memory_mib": memory_mib(),
            "seconds": time.perf_counter() - began,
            "step_losses": losses.tolist(),
        })
        if accuracy > best["accuracy"]:
            best = {"accuracy": accuracy, "epoch": len(history), "model": copy.deepcopy(model.state_dict())}
        if RANK:
            continue
        state = {name: part.state_dict() for name, part in saved.items()} | model_card(data, args)
        state |= {"history": history, "best": best, "data": data.info["sha256"], "random": torch.get_rng_state(),
                  "cuda_random": torch.cuda.get_rng_state_all()}
        save_checkpoint(state, run_dir / "checkpoint.pt")
        plot_dashboard(history, args, run_dir / "dashboard.png", update=len(history) > first)
        note(f"epoch {len(history)}: loss {losses.mean():.3f}, validation accuracy {accuracy:.2%} "
             f"(best {best['accuracy']:.2%})")
    model.load_state_dict(best["model"])
    return history


@contextlib.contextmanager
def whole_file(path):
    """Open `path` to write under another name, and rename at the end: a killed run leaves the older file whole."""
    try:
        with open(f"{path}.part", "wb") as file:
            yield file
        os.replace(f"{path}.part", path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; make room, or take another --output-dir") from None


def save_checkpoint(state, path):
    """torch.save to a whole file."""
    buffer = io.BytesIO()  # writing to the disk itself, torch hides a full one behind a RuntimeError
    torch.save(state, buffer)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())


def model_card(data, args):
    """What a checkpoint needs to be used: arguments, areas with their sensors, classes, normalization."""
    return {"arguments": vars(args), "areas": data.info["areas"], "classes": CLASSES,
            "mean": torch.from_numpy(data.mean), "std": torch.from_numpy(data.std)}


def read_checkpoint(address):
    """The dictionary in a checkpoint, wherever it lies."""
    filesystem, path = open_address(address)
    with file_errors(address), filesystem.open_input_stream(path, compression=None) as stream:
        whole = io.BytesIO(stream.read())
    with checkpoint_errors(address):
        return torch.load(whole, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def checkpoint_errors(address):
    try:
        yield
    except (RuntimeError, LookupError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{address}: damaged, or no checkpoint of this model ({why})") from None


def load_checkpoint(path, saved, data):
    """Restore the parts in `saved` and the random states; returns (history, best), or None where there is no file."""
    state = from_rank_0(read_checkpoint(path) if RANK == 0 and path.exists() else None)
    if state is None:
        return None
    with checkpoint_errors(path):
        if state["data"] != data.info["sha256"]:
            raise UserError(f"{path}: the run began with other data; bring the files back or start a new run")
        for name, part in saved.items():
            part.load_state_dict(state[name])
        if RANK == 0:
            torch.set_rng_state(state["random"])
            torch.cuda.set_rng_state_all(state["cuda_random"][: torch.cuda.device_count()])
        return state["history"], state["best"]


# --- Evaluation -------------------------------------------------------------------------------------------------------


def predict_classes(model, baselines, data, starts, majority, args):
    """({name: class [windows]}, risk [windows]): transformer, baselines, vote, `majority` class and, if any, oracle."""
    device = next(model.parameters()).device
    readings, areas = torch.from_numpy(data.readings).to(device), torch.from_numpy(data.areas).to(device)
    features = window_features(data, starts, args.seq_len)
    answers = {name: baseline.predict(features) for name, baseline in baselines.items()}
    logits, risk = predict(model, readings, areas, starts, args.seq_len)
    answers["transformer"] = logits.argmax(1).cpu().numpy()
    answers["ensemble"] = majority_vote([answers[name] for name in VOTERS])
    answers["majority class"] = np.full(len(starts), majority)
    if data.oracle is not None:
        answers["oracle"] = data.oracle[starts + args.seq_len - 1]
    return answers, risk.cpu().numpy()


def classification_metrics(true, predicted):
    """Metrics of predicted classes [windows]. False alarms are windows called fire among those that are not fire."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    present, fire, alarm = np.unique(true), true == 2, predicted == 2
    scores = precision_recall_fscore_support(true, predicted, labels=present, zero_division=0)
    return {
        "accuracy": np.mean(true == predicted),
        "macro_precision": np.mean(scores[0]),
        "macro_recall": np.mean(scores[1]),
        "macro_f1": np.mean(scores[2]),
        "false_alarm_rate": None if fire.all() else np.mean(alarm[~fire]),
        "missed_fire_rate": np.mean(~alarm[fire]) if fire.any() else None,
        "per_class": {CLASSES[c]: dict(zip(("precision", "recall", "f1", "windows"), row))
                      for c, row in zip(present, zip(*scores))},
        "confusion_matrix": confusion_matrix(true, predicted, labels=range(len(CLASSES))),
    }


def fire_windows(data, seq_len):
    """First rows of windows, one a second, that end in the fires of the test part, and how many each fire has [fires].

    The first window of a fire ends at its onset. At most MAX_FIRES fires, evenly chosen among those that lie whole in
    an unbroken stretch, with a window before them.
    """
    fires = []
    for start, stop in data.segments["test"]:
        edges = np.flatnonzero(np.diff(data.labels[start:stop] == 2, prepend=False, append=False)) + start
        fires += [(onset, end) for onset, end in edges.reshape(-1, 2) if onset - start >= seq_len and end < stop]
    fires = fires[:: math.ceil(len(fires) / MAX_FIRES) or 1]
    starts = [np.arange(onset, end) - seq_len + 1 for onset, end in fires]
    return np.concatenate([np.zeros(0, np.int64), *starts]), [len(windows) for windows in starts]


def detection_delay(predicted, lengths):
    """Seconds (rows) from the onset of each fire to the first window called fire, over the fires that are detected."""
    fires = np.split(predicted == 2, np.cumsum(lengths)[:-1]) if lengths else []
    delays = [fire.argmax() for fire in fires if fire.any()]
    median, late = np.percentile(delays, (50, 90)).round(1) if delays else (None, None)
    return {"fires": len(fires), "never_detected": len(fires) - len(delays), "median_s": median, "p90_s": late}


# --- Pictures ---------------------------------------------------------------------------------------------------------


def plot_dashboard(history, args, path, update):
    """Loss, accuracy, learning rate and memory; drawn again after every epoch, in a notebook in place with `update`."""
    fig, axes = new_figure(f"Training: epoch {len(history)} of {args.epochs}", 2, 2, (10, 6.5))
    plot_history(axes[:2], history)
    for axis, name, label in zip(axes[2:], ("learning_rate", "memory_mib"), ("learning rate", "resident memory [MiB]")):
        values = np.array([epoch[name] for epoch in history], float)  # None becomes NaN
        plot_curve(axis, range(1, len(history) + 1), values, name, marker="o")
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
    save_figure(fig, path, display_id=str(path.resolve()), update=update)


def animate_history(history, path):
    """GIF with one frame an epoch: how loss and accuracy came about."""
    from matplotlib.animation import FuncAnimation, PillowWriter

    fig, axes = new_figure("Training of the transformer", 1, 2, (9, 3.6))

    def draw(epoch):
        for axis in axes:
            axis.clear()
        plot_history(axes, history[: epoch + 1])
        for axis in axes:
            axis.set_xlim(0.5, len(history) + 0.5)

    FuncAnimation(fig, draw, frames=len(history)).save(path, PillowWriter(fps=2))
    plt.close(fig)


def plot_results(results, history, monitor, run_dir):
    """Every picture but the dashboard."""
    models, windows = results["models"], results["data"]["windows"]
    learned = ["logistic regression", *VOTERS, "ensemble"]
    accuracy = {name: 100 * scores["accuracy"] for name, scores in models.items()}

    fig, axes = new_figure("Windows of each class in each part", 1, 2)
    plot_bars(axes[0], CLASSES, windows, "{:,.0f}")
    plot_bars(axes[1], CLASSES, {part: 100 * counts / counts.sum() for part, counts in windows.items()})
    axes[0].set_ylabel("windows")
    axes[1].set_ylabel("share of the part [%]")
    save_figure(fig, run_dir / "class_distribution.png")

    fig, axes = new_figure("Test accuracy by area", size=(11, 4.5))
    by_area = {name: [100 * scores["accuracy"] for scores in models[name]["per_area"].values()] for name in learned}
    plot_bars(axes[0], list(models["ensemble"]["per_area"]), by_area)
    axes[0].set(ylabel="accuracy [%]", ylim=(max(0, min(map(min, by_area.values())) - 5), 102.5))
    save_figure(fig, run_dir / "area_performance.png")

    fig, axes = new_figure("Test windows by true and predicted class", 1, 2, (10, 4.6))
    for axis, name in zip(axes, ("transformer", "ensemble")):
        plot_confusion(axis, models[name]["confusion_matrix"], CLASSES, name)
    save_figure(fig, run_dir / "confusion_matrices.png")

    fig, axes = new_figure("The twelve most important window features of each tree model", 1, 3, (14, 5))
    for axis, (name, values) in zip(axes, results["importance"].items()):
        plot_ranking(axis, {feature: values[feature] for feature in sorted(values, key=values.get)[-12:]}, "{:.3f}")
        what = "accuracy lost by shuffling it" if name == "gradient boosting" else "share of the decrease of impurity"
        axis.set(title=name, xlabel=what)
    columns = zip_longest(*results["data"]["areas"].values())
    fig.supxlabel("\n".join(f"column {i}: {', '.join(dict.fromkeys(filter(None, names)))}"
                            for i, names in enumerate(columns, start=1) if len(set(names) - {None}) > 1), fontsize=8)
    save_figure(fig, run_dir / "feature_importance.png")

    fig, axes = new_figure("Learning curves of the transformer", 1, 2)
    plot_history(axes, history, np.concatenate([epoch["step_losses"] for epoch in history]))
    save_figure(fig, run_dir / "learning_curves.png")
    animate_history(history, run_dir / "training_progress.gif")

    fig, axes = new_figure("Where the time went", 1, 2)
    seconds = results["seconds"]
    axes[0].pie(seconds.values(), labels=seconds, autopct=lambda share: f"{share:.0f} %" if share > 5 else "")
    plot_bars(axes[1], list(seconds), {"time": list(seconds.values())})
    axes[1].set_ylabel("time [s]")
    save_figure(fig, run_dir / "time_breakdown.png")

    fig, (axis,) = new_figure("Memory of the process over time", size=(9, 4))
    axis.plot(*np.array(monitor.samples, float).reshape(-1, 2).T)
    for i, (name, (begin, end)) in enumerate(monitor.parts.items()):
        axis.axvspan(begin, end, color=f"C{i + 1}", alpha=0.15, label=name)
    axis.set(xlabel="time [s]", ylabel="resident memory [MiB]")
    fig.legend(loc="outside lower center", ncols=len(monitor.parts))
    save_figure(fig, run_dir / "memory.png")

    fig, (axis,) = new_figure("Test accuracy of all models (orange: the best that learned)", size=(8, 4))
    plot_ranking(axis, accuracy, highlight=max(learned, key=accuracy.get))
    axis.axvline(100 * TARGET_ACCURACY, color="k", linestyle="--", label=f"target {TARGET_ACCURACY:.0%}")
    axis.set(xlabel="accuracy [%]", xlim=(max(0, min(accuracy.values()) - 5), 104))
    fig.legend(loc="outside lower right")
    save_figure(fig, run_dir / "model_comparison.png")


HTML = """<!doctype html><meta charset="utf-8"><title>fire.py: models compared</title><style>
body {font: 15px sans-serif; margin: 2em} td, th {padding: .3em .8em; text-align: right}
th:first-child, td:first-child {text-align: left} th {cursor: pointer; border-bottom: 1px solid}
.bar {position: relative; width: 20em} .bar i {display: block; height: 1.1em; background: #0072B2}
.bar b {position: absolute; top: 0; height: 1.1em; border-left: 2px dashed}
</style><h1>fire.py: models on the same test windows</h1>
<p>Click a heading to sort by it; point at a bar for its values. Bold: the best that learned. Dashed: the target.</p>
<table></table><script>
const rows = ROWS, columns = Object.keys(rows[0]), table = document.querySelector("table");
const best = Math.max(...rows.filter(row => row.model !== "oracle").map(row => row[columns[1]]));
let by = columns[1], down = true;
const text = value => value ?? "–";
function draw() {
  rows.sort((a, b) => (down ? -1 : 1) * ((a[by] ?? -1) > (b[by] ?? -1) ? 1 : -1));
  table.innerHTML = "<tr>" + columns.map(c => `<th>${c}</th>`).join("") + "</tr>" + rows.map(row =>
    `<tr ${row[columns[1]] === best ? 'style="font-weight: bold"' : ""}>` +
    columns.map(c => `<td>${text(row[c])}</td>`).join("") +
    `<td><div class="bar" title="${columns.map(c => `${c}: ${text(row[c])}`).join("&#10;")}">
     <i style="width: ${row[columns[1]]}%"></i><b style="left: TARGET%"></b></div></td></tr>`).join("");
}
table.onclick = event => {
  if (event.target.tagName !== "TH") return;
  down = by === event.target.textContent ? !down : true;
  by = event.target.textContent;
  draw();
};
draw();
</script>"""


# --- Results --------------------------------------------------------------------------------------------------------


def memory_mib(peak=False):
    """Resident memory of this process [MiB], now (on Linux) or at its peak so far; None where it is not known."""
    try:
        if peak:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    except (OSError, AttributeError):
        return None


class Monitor(threading.Thread):
    """Seconds of each part of a run, and memory over its time, sampled twice a second until `done` is set."""

    def __init__(self):
        super().__init__(daemon=True)
        self.began, self.parts, self.samples, self.done = time.perf_counter(), {}, [], threading.Event()
        self.start()

    def run(self):
        while not self.done.wait(0.5):
            self.samples.append((self.seconds(), memory_mib()))

    def seconds(self):
        return time.perf_counter() - self.began

    @contextlib.contextmanager
    def part(self, name):
        began = self.seconds()
        try:
            yield
        except BaseException:
            self.done.set()
            raise
        self.parts[name] = began, self.seconds()


def to_json(results):
    """Plain JSON, without NaN, in bytes."""
    return json.dumps(results, indent=1, allow_nan=False, default=lambda array: array.tolist()).encode()


def write_results(results, path):
    """Write JSON; returns the results as they are read back."""
    with whole_file(path) as file:
        file.write(to_json(results))
    return json.loads(to_json(results))


def model_table(models, seconds):
    """[{column: value}] with a row for each model, the best accuracy first."""
    rows = []
    for name, scores in sorted(models.items(), key=lambda item: -item[1]["accuracy"]):
        shares = {"accuracy %": "accuracy", "macro F1 %": "macro_f1", "false alarms %": "false_alarm_rate",
                  "missed fire %": "missed_fire_rate"}
        row = {column: None if scores[key] is None else round(100 * scores[key], 2) for column, key in shares.items()}
        delay = scores["detection_delay"]["median_s"]
        rows.append({"model": name} | row | {"delay s": delay, "training s": seconds.get(name)})
    return rows


def markdown_table(rows):
    """Rows [{column: value}] as a Markdown table; a value that is missing or None is a dash."""
    columns = list(dict.fromkeys(chain.from_iterable(rows)))
    cells = [[("–" if row.get(column) is None else str(row[column])) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, ["---"] * len(columns), *cells])


def summary(results):
    """The tables of a finished run as Markdown."""
    data, models, risk = results["data"], results["models"], results["risk"]
    classes = [{"model": name} | {f"{c} {key}": f"{100 * scores[key]:.1f}" for c, scores in model["per_class"].items()
                                  for key in ("precision", "recall", "f1")} for name, model in models.items()]
    areas = [{"model": name} | {area: f"{100 * scores['accuracy']:.2f}" for area, scores in model["per_area"].items()}
             for name, model in models.items()]
    return f"""# fire.py, {data['source']} data, {data['rows']:,} rows, split {data['split']}, seed {results['seed']}

{markdown_table([*results['table'], SEED_CLAIM])}

False alarms: windows called fire among those that are not. Delay: median seconds from the onset of a fire.
The ensemble is the majority of transformer and trees; a tie goes to the most dangerous of the tied classes.
Risk head, 0 to 100: mean absolute error {risk['mean_absolute_error']:.1f}, of a constant {risk['of_a_constant']:.1f}.

## Classes [%]

{markdown_table(classes)}

## Accuracy by area [%]

{markdown_table(areas)}
"""


def new_run(output_dir):
    """Make and return the next free folder run-001, run-002, … of this experiment."""
    parent = Path(output_dir) / "fire"
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        taken = [int(run.name[4:]) for run in parent.glob("run-*") if run.name[4:].isdigit()]
        run_dir = parent / f"run-{max(taken, default=0) + 1:03d}"
        with contextlib.suppress(FileExistsError):  # another process may have been quicker
            run_dir.mkdir()
            return run_dir


def find_run(output_dir, name):
    """(folder, arguments) of the unfinished run called `name`, or of the newest one."""
    parent = Path(output_dir) / "fire"
    newest_first = sorted(parent.glob("run-*"), key=lambda run: (len(run.name), run.name), reverse=True)
    for run_dir in newest_first if name == "newest" else [Path(name) if os.sep in name else parent / name]:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # not a run's file
            results = json.loads((run_dir / "results.json").read_text())
            if results["experiment"] == "fire" and not results["finished"]:
                return run_dir, argparse.Namespace(**results["arguments"])
    name = "" if name == "newest" else f" {name!r}"
    raise UserError(f"{parent} has no unfinished run{name}; start one without --resume")


def describe_run(args):
    """What results.json holds from the beginning: arguments, versions, git commit."""
    folder = Path(globals().get("__file__", "fire.py")).resolve().parent
    commit, packages = None, ("torch", "numpy", "scikit-learn", "pyarrow")
    with contextlib.suppress(OSError):  # no git on this machine
        git = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or None
    return {"experiment": "fire", "finished": False, "arguments": vars(args), "seed": args.seed, "git_commit": commit,
            "processes": PROCESSES,
            "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages}}


# --- Saving versions, predicting, comparing runs ----------------------------------------------------------------------


def claim_version(filesystem, root):
    """(next version v0001, v0002, … under `root`, the claim on it), which no other writer has or gets.

    Neither pyarrow nor every S3 server can create a file only if it is not there. So each writer leaves a claim of its
    own name and then looks: who sees no other claim and no such version owns it, since whoever comes later sees that
    claim; else it takes the claim back and tries again. The claim of a writer that died stays: its version is skipped.
    """
    from pyarrow import fs

    def names():  # claims first: a claim that is gone by then has its version in the second listing
        folders = [fs.FileSelector(folder, allow_not_found=True) for folder in (f"{root}/claims", root)]
        return [info.base_name for folder in folders for info in filesystem.get_file_info(folder)]

    while True:
        taken = [int(name.split("-")[0][1:]) for name in names() if re.fullmatch(r"v\d{4,}(-.*)?", name)]
        version = f"v{max(taken, default=0) + 1:04d}"
        claim = f"{root}/claims/{version}-{uuid.uuid4().hex}"
        filesystem.create_dir(f"{root}/claims")
        with filesystem.open_output_stream(claim) as stream:
            stream.write(b"being written")
        if sum(name.split("-")[0] == version for name in names()) == 1:
            return version, claim
        filesystem.delete_file(claim)
        time.sleep(random.random())  # lest two writers meet again and again


def save_version(results, run_dir, address):
    """Copy the models and tables of a finished run to the next version under `address`: the new folder's address.

    metadata.json (metrics, arguments, versions, commit, sha256 of each file) comes last: a folder without it is not
    complete.
    """
    from pyarrow import fs

    filesystem, root = open_address(address)
    with file_errors(f"{run_dir} is kept, and --resume saves it again; --save-to {address}"):
        version, claim = claim_version(filesystem, root)
        folder, files = f"{root}/{version}", {}
        filesystem.create_dir(folder)
        for name in ("transformer.pt", "trees.joblib", "summary.md"):
            fs.copy_files(str(run_dir / name), f"{folder}/{name}", fs.LocalFileSystem(), filesystem)
            files[name] = {"bytes": (run_dir / name).stat().st_size, "sha256": file_sha256(run_dir / name)}
        about = {name: results[name] for name in ("experiment", "arguments", "seed", "versions", "git_commit", "data")}
        metadata = about | {"metrics": results["models"], "parameters": results["parameters"], "files": files}
        part = ".part" if filesystem.type_name == "local" else ""  # in S3 an object appears whole or not at all
        with filesystem.open_output_stream(f"{folder}/metadata.json{part}") as stream:
            stream.write(to_json(metadata))
        if part:
            filesystem.move(f"{folder}/metadata.json{part}", f"{folder}/metadata.json")
    with contextlib.suppress(OSError):  # a claim that stays does no harm
        filesystem.delete_file(claim)
    return f"{address.rstrip('/')}/{version}"


def predict_file(args, run_dir):
    """Class, probabilities and risk of each window of the readings in --predict, as `run_dir`/predictions.csv.

    Columns are found by name, and normalized as the checkpoint's training part was. Returns the results dictionary.
    """
    import pyarrow as pa
    import pyarrow.csv

    device, began = choose_device(args.device), time.perf_counter()
    state = read_checkpoint(args.checkpoint)
    with checkpoint_errors(args.checkpoint):
        kept, areas = state["arguments"], state["areas"]
        model = OptimizedFireTransformer.from_arguments(kept, len(areas)).to(device)
        model.load_state_dict(state.get("best", state)["model"])
        mean, std = state["mean"], state["std"]
    name = args.area or Path(args.predict).stem.split("_")[0]
    if name not in areas:
        raise UserError(f"{args.predict}: the checkpoint has no area {name!r}; --area takes {', '.join(areas)}")
    number, sensors, names = list(areas).index(name), areas[name], column_names(args.predict)
    missing = [sensor for sensor in sensors if sensor not in names]
    if missing:
        raise UserError(f"{args.predict}: area {name!r} needs column {', '.join(missing)}; it has {', '.join(names)}")
    unused = [column for column in names if column not in sensors and column.lower() != "timestamp"]
    if unused:
        note(f"{args.predict}: column {', '.join(map(repr, unused))} not used")
    readings, _, times = read_file(args.predict, sensors)
    rows, seq_len = len(readings), kept["seq_len"]
    if rows < seq_len:
        raise UserError(f"{args.predict}: {rows} rows, a window needs {seq_len}")
    readings = ((torch.from_numpy(readings).double() - mean[number]) / std[number]).float().to(device)
    starts = np.arange(0, rows - seq_len + 1, args.stride or kept["stride"])
    logits, risk = predict(model, readings, torch.full((rows,), number, device=device), starts, seq_len)

    classes, last = logits.argmax(1).cpu().numpy(), starts + seq_len - 1
    columns = {"area": pa.repeat(name, len(starts)), "first row": starts + 1, "last row": last + 1}
    if times is not None:
        columns["timestamp"] = times.take(pa.array(last))
    columns["class"] = pa.array(CLASSES).take(pa.array(classes))
    columns |= dict(zip(CLASSES, logits.softmax(1).cpu().numpy().T)) | {"risk": risk.cpu().numpy()}
    with whole_file(run_dir / "predictions.csv") as file:
        pa.csv.write_csv(pa.table(columns), file)
    counts = dict(zip(CLASSES, np.bincount(classes, minlength=len(CLASSES)).tolist()))
    results = describe_run(args) | {
        "finished": True, "device": device.type, "rows": rows, "windows": len(starts), "counts": counts,
        "sha256": {address: file_sha256(address) for address in (args.predict, args.checkpoint)},
        "seconds": round(time.perf_counter() - began, 2), "peak_memory_mib": memory_mib(peak=True)}
    text = (f"# fire.py: {len(starts):,} windows of {seq_len} rows, one each {args.stride or kept['stride']} rows, of "
            f"{args.predict}, area {name!r}\n\n")
    rows = [{"class": c, "windows": n, "share %": round(100 * n / len(starts), 2)} for c, n in counts.items()]
    (run_dir / "summary.md").write_text(text + markdown_table(rows) + "\n")
    return write_results(results, run_dir / "results.json")


def compare_runs(args, run_dir):
    """Accuracy, training time, cost and savings of finished runs beside the seed's reference; returns the results."""
    reference = SEED_REFERENCE | {"cost $": round(SEED_REFERENCE["training h"] * SEED_REFERENCE["$ per h"], 2)}
    table = []
    for address in args.compare:
        filesystem, path = open_address(address)
        with file_errors(address), filesystem.open_input_stream(path) as stream:
            text = stream.read()
        try:
            results = json.loads(text)
            models = {row["model"]: row for row in results["table"] if row["model"] != "oracle"}
            accuracy = {name: float(str(row["accuracy %"]).split()[0]) for name, row in models.items()}
            best = max(accuracy, key=accuracy.get)
            hours = sum(float(str(row["training s"] or 0).split()[0]) for row in models.values()) / 3600
            row = {"run": Path(address).parent.name, "rows": f"{results['data']['rows']:,}",
                   "training windows": sum(results["data"]["windows"]["train"]), "best model": best,
                   "accuracy %": models[best]["accuracy %"], "transformer %": models["transformer"]["accuracy %"],
                   "majority class %": models["majority class"]["accuracy %"], "training h": round(hours, 4)}
        except (ValueError, LookupError, TypeError):
            note(f"{address}: left out, since it is not of a finished training run")
            continue
        cost = hours * args.price_per_hour
        saved = reference["cost $"] - cost
        table.append(row | {"$ per h": args.price_per_hour, "cost $": round(cost, 4), "saved $": round(saved, 2),
                            "saved %": round(100 * saved / reference["cost $"], 2)})
    if not table:
        raise UserError(f"{', '.join(args.compare)}: not the results.json of a finished training run of fire.py")
    table.append(reference)

    size = 14, 1.6 + 0.4 * len(table)
    fig, axes = new_figure("Runs compared (orange: the seed's claim, which gives no accuracy)", 1, 3, size)
    labels = [f"{i}. {row['run']}" for i, row in enumerate(table, start=1)]
    for axis, (column, what) in zip(axes, (("accuracy %", "accuracy of the best model [%]"),
                                           ("training h", "training time [h]"), ("cost $", "training cost [$]"))):
        values = {label: float(str(row[column]).split()[0]) for label, row in zip(labels, table) if column in row}
        plot_ranking(axis, values, "{:.4g}", highlight=labels[-1])
        axis.set(xlabel=what)
        if column != "accuracy %":
            axis.set(xscale="log", xlim=(min(values.values()) / 2, 20 * max(values.values())))
    save_figure(fig, run_dir / "cost_comparison.png")
    (run_dir / "summary.md").write_text(
        f"# fire.py: {len(table) - 1} runs at ${args.price_per_hour} per hour, and the seed's claim\n\n"
        f"{markdown_table(table)}\n\nTraining: of all models. Saved: against the seed's claim, which we did not "
        "check; its data and machine are others.\n")
    return write_results(describe_run(args) | {"finished": True, "table": table}, run_dir / "results.json")


# --- Command line ----------------------------------------------------------------------------------------------------


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
    parser = Parser("fire.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                    formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="everything, small: 30,000 rows an area, 3 epochs, 30 trees, under 60 s")
    add("--data", nargs="+", metavar="PATH", help="a folder, or CSV or Parquet files, one an area, here or at "
        "s3://bucket/prefix, with 1 to 6 numeric columns, a label (0/1/2, 0/1 for normal/fire, or normal/warning/fire) "
        "and perhaps a timestamp; rows in order of time (default: the embedded generator)")
    add("--label-column", metavar="NAME", help="(default: label, else is_anomaly)")
    add("--predict", metavar="FILE", help="classify the windows of new readings (CSV or Parquet)")
    add("--checkpoint", metavar="CKPT", help="for --predict: transformer.pt or checkpoint.pt of a run")
    add("--area", metavar="NAME", help="of the checkpoint, for --predict (default: the file's name up to a _)")
    add("--compare", nargs="+", metavar="RESULTS.json", help="accuracy, hours and cost of finished runs, side by side")
    add("--price-per-hour", type=between(float, 1e-6), default=1.624, metavar="$", help="of all machines (--compare)")
    add("--save-to", metavar="FOLDER", help="copy the models with metadata.json to its next version, v0001, v0002, …; "
        "also s3://bucket/prefix")
    add("--sample-per-area", type=between(int, 1), default=100_000, metavar="ROWS", help="rows of each area to use")
    add("--seq-len", type=between(int, 2), default=60, metavar="ROWS", help="window length; at 1 Hz, seconds")
    add("--stride", type=between(int, 1), metavar="ROWS", help="from window to window (default: --seq-len, no overlap)")
    add("--patch-len", type=between(int, 1), default=1, metavar="ROWS", help="time steps in a token of the transformer")
    add("--d-model", type=between(int, 1), default=128, metavar="N", help="width of the transformer")
    add("--num-heads", type=between(int, 1), default=4, metavar="N", help="attention heads; they divide --d-model")
    add("--num-layers", type=between(int, 1), default=3, metavar="N", help="layers of the transformer")
    add("--dropout", type=between(float, 0, 0.99), default=0.0, metavar="P", help="of the transformer; seed: 0.1")
    add("--epochs", type=between(int, 1), default=12, metavar="N", help="over which the rate decays; seed: 50")
    add("--patience", type=between(int, 1), default=5, metavar="N", help="epochs without better validation accuracy")
    add("--batch-size", type=between(int, 1), default=256, metavar="N", help="windows in a batch")
    add("--learning-rate", type=between(float, 0), default=0.002, metavar="RATE", help="after warm-up, before decay")
    add("--weight-decay", type=between(float, 0), default=0.01, metavar="RATE", help="of AdamW")
    add("--class-weight-power", type=between(float, 0, 1), default=0.25, metavar="P",
        help="class weights of every model: (1 / share of the class) to this power; 0 is none, 1 is balanced")
    add("--num-trees", type=between(int, 1), default=100, metavar="N", help="trees of a forest, rounds of the boosting")
    add("--output-dir", default="outputs", metavar="FOLDER", help="results go to FOLDER/fire/run-001, run-002, …")
    add("--resume", nargs="?", const="newest", metavar="RUN", help="go on with an unfinished run, the newest or the "
        "one named, with its own arguments")
    add("--seed", type=between(int, 0, 2**31), default=42, metavar="N", help="of generator, sampling and models")
    add("--runs", type=between(int, 1, 999), default=1, metavar="N", help="seeds in a row: mean ± 95 %% CI")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu) or one of them")
    if "--quick" in argv:
        parser.set_defaults(sample_per_area=30_000, epochs=3, num_trees=30)
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    goes_with = {"resume": {"output_dir", "device", "save_to"}, "compare": {"output_dir", "price_per_hour"},
                 "predict": {"output_dir", "device", "checkpoint", "area", "stride"}}
    mode = next((mode for mode in goes_with if mode in given), None)
    alone = {"checkpoint", "area", "price_per_hour"} if mode is None else given - goes_with[mode] - {mode}
    if given & alone:
        names = ", ".join(f"--{name}".replace("_", "-") for name in sorted(given & alone))
        raise UserError(f"{names} cannot be given " + (f"with --{mode}" if mode else "without --predict or --compare"))
    if mode == "predict":
        if not args.checkpoint:
            raise UserError("--predict needs --checkpoint, the transformer.pt of a run")
        return args
    args.stride = args.stride or args.seq_len
    for part, whole in (("patch_len", "seq_len"), ("num_heads", "d_model")):
        if getattr(args, whole) % getattr(args, part):
            text = f"--{part} {getattr(args, part)} does not divide --{whole} {getattr(args, whole)}"
            raise UserError(text.replace("_", "-"))
    return args


def choose_device(name):
    """The device called `name`; under torchrun each process of a machine has its own GPU."""
    try:
        device = detect_device(name)
    except ValueError as problem:
        raise UserError(f"--device: {problem}") from None
    if PROCESSES > 1 and device.type != "cpu":
        number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= there:
            raise UserError(f"--nproc-per-node takes up to {there} processes with {there} GPUs; or take --device cpu")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    return device


def run_experiment(args, run_dir):
    """One seed from data to pictures, written to `run_dir`; returns the results dictionary."""
    device = choose_device(args.device)
    seed_everything(args.seed)
    monitor, results = Monitor(), describe_run(args)
    with monitor.part("data"):
        data = load_data(args)
        if data.info["sha256"] != from_rank_0(data.info["sha256"]):
            raise UserError(f"process {RANK} has read other data than process 0; give every machine the same files")
        areas = data.info["areas"]
        starts = {part: window_starts(data.segments[part], args.seq_len, args.stride) for part in PARTS}
        labels = {part: data.labels[rows + args.seq_len - 1] for part, rows in starts.items()}
        counts = {part: np.bincount(classes, minlength=len(CLASSES)) for part, classes in labels.items()}
        results["data"] = data.info | {"windows": counts}
        note(f"{len(data.labels):,} rows; windows: " + ", ".join(f"{n.sum():,} {part}" for part, n in counts.items()))

    with monitor.part("transformer"):
        model = OptimizedFireTransformer.from_arguments(vars(args), len(areas)).to(device)
        history = train_transformer(model, data, starts["validation"], args, run_dir)
        if RANK:
            return None  # the first process does the rest
        seconds = {"transformer": round(sum(epoch["seconds"] for epoch in history), 1)}
        save_checkpoint({"model": model.state_dict()} | model_card(data, args), run_dir / "transformer.pt")

    with monitor.part("trees"):
        baselines, features = make_baselines(args), window_features(data, starts["train"], args.seq_len)
        weights = class_weights(labels["train"], args.class_weight_power)[labels["train"]]
        for name, baseline in tqdm(baselines.items(), "baselines", leave=False):
            began = time.perf_counter()
            key = "logisticregression__sample_weight" if name == "logistic regression" else "sample_weight"
            baseline.fit(features, labels["train"], **{key: weights})
            seconds[name] = round(time.perf_counter() - began, 1)
        with whole_file(run_dir / "trees.joblib") as file:
            joblib.dump({"models": baselines} | model_card(data, args), file)
        results["importance"] = feature_importance(baselines, data, starts["validation"], args)

    with monitor.part("evaluation"):
        test, owners = labels["test"], data.areas[starts["test"]]
        majority = np.bincount(labels["train"]).argmax()
        answers, risk = predict_classes(model, baselines, data, starts["test"], majority, args)
        fire_starts, lengths = fire_windows(data, args.seq_len)
        in_fires = predict_classes(model, baselines, data, fire_starts, majority, args)[0] if lengths else {}
        results["models"] = {}
        for name, answer in answers.items():
            of_area = {area: owners == number for number, area in enumerate(areas) if number in owners}
            results["models"][name] = classification_metrics(test, answer) | {
                "per_area": {area: classification_metrics(test[own], answer[own]) for area, own in of_area.items()},
                "detection_delay": detection_delay(in_fires.get(name), lengths),
            }
        results["risk"] = {"mean_absolute_error": np.abs(risk - 50 * test).mean(),
                           "of_a_constant": np.abs(50 * labels["train"].mean() - 50 * test).mean(),
                           "mean_by_class": {CLASSES[c]: risk[test == c].mean() for c in np.unique(test)}}
        results["table"] = model_table(results["models"], seconds)

    with monitor.part("pictures"):
        results["seconds"] = {name: round(end - begin, 1) for name, (begin, end) in monitor.parts.items()}
        plot_results(results, history, monitor, run_dir)
        html = HTML.replace("ROWS", json.dumps(results["table"])).replace("TARGET", str(100 * TARGET_ACCURACY))
        (run_dir / "model_comparison.html").write_text(html)
    monitor.done.set()
    cuda = device.type == "cuda"
    results |= {
        "finished": True,
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "history": [{key: value for key, value in epoch.items() if key != "step_losses"} for epoch in history],
        "seconds": {name: round(end - begin, 1) for name, (begin, end) in monitor.parts.items()},
        "peak_memory_mib": memory_mib(peak=True),
        "peak_gpu_memory_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
    }
    (run_dir / "summary.md").write_text(summary(results))
    if args.save_to:
        results["saved_to"] = save_version(results, run_dir, args.save_to)
    return write_results(results, run_dir / "results.json")


def run_seeds(args, run_dir):
    """The experiment once, or with --runs seeds; returns the results dictionary."""
    if args.save_to and RANK == 0:  # whether it can be written, before hours of training and not after them
        filesystem, root = open_address(args.save_to)
        with file_errors(f"--save-to {args.save_to}"):
            filesystem.delete_file(claim_version(filesystem, root)[1])
    if args.runs == 1:
        return run_experiment(args, run_dir)
    all_results = []
    for seed in range(args.seed, args.seed + args.runs):
        seed_dir = run_dir / f"seed-{seed}"
        seed_dir.mkdir(exist_ok=True)
        done = seed_dir / "results.json"
        one = argparse.Namespace(**vars(args) | {"seed": seed})
        all_results.append(json.loads(done.read_text()) if done.exists() else run_experiment(one, seed_dir))
    return combine_runs(args, all_results, run_dir)


def combine_runs(args, all_results, run_dir):
    """The table of models over several seeds as mean ± 95 % confidence interval, written to `run_dir`."""
    table = []
    for name in (row["model"] for row in all_results[0]["table"]):
        rows = [row for results in all_results for row in results["table"] if row["model"] == name]
        table.append({"model": name})
        for column in list(rows[0])[1:]:
            values = [row[column] for row in rows if row[column] is not None]
            mean, width = mean_and_interval(values) if values else (None, None)
            table[-1][column] = mean if mean is None or len(values) < 2 else f"{mean:.2f} ± {width:.2f}"
    seeds = [results["seed"] for results in all_results]
    results = describe_run(args) | {key: all_results[0][key] for key in ("data", "device", "parameters")}
    results |= {"finished": True, "seeds": seeds, "table": table,
                "seconds": [one["seconds"] for one in all_results],
                "peak_memory_mib": max(one["peak_memory_mib"] or 0 for one in all_results)}
    text = (f"# fire.py, {results['data']['source']} data, {results['data']['rows']:,} rows, split "
            f"{results['data']['split']}, seeds {seeds[0]} to {seeds[-1]}: mean ± 95 % interval (Student's t)\n\n")
    (run_dir / "summary.md").write_text(text + markdown_table([*table, SEED_CLAIM]) + "\n")
    return write_results(results, run_dir / "results.json")


def main(argv=None):
    """Run the experiment with `argv` as on a command line (default: this process's, in a notebook none).

    Returns the results dictionary; what a user can put right raises SystemExit(2), Ctrl-C SystemExit(130).
    """
    run_dir = None
    try:
        args = parse_args(([] if in_notebook() else sys.argv[1:]) if argv is None else argv)
        resumed = args.resume is not None
        if PROCESSES > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if RANK == 0:
            if resumed:
                given = {name: getattr(args, name) for name in ("output_dir", "device", "save_to")}
                given = {name: value for name, value in given.items() if value not in ("auto", None)}
                run_dir, kept = find_run(args.output_dir, args.resume)
                args = argparse.Namespace(**vars(kept) | given)
            run_dir = run_dir or new_run(args.output_dir)
            write_results(describe_run(args), run_dir / "results.json")
        args, run_dir = from_rank_0((args, run_dir))
        job = predict_file if args.predict is not None else compare_runs if args.compare else run_seeds
        if PROCESSES > 1 and (job is not run_seeds or args.runs > 1):
            raise UserError("several processes (torchrun) train one model; --predict, --compare and --runs go without")
        results = job(args, run_dir)
    except KeyboardInterrupt:
        go_on = f"; to go on: python fire.py --resume {run_dir.name} --output-dir {args.output_dir}" if run_dir else ""
        note(f"stopped{go_on}")
        raise SystemExit(130) from None
    except UserError as problem:
        error = str(problem)
    except torch.OutOfMemoryError:
        error = "not enough GPU memory; lower --batch-size or --sample-per-area, or take --device cpu"
    except OSError as problem:
        error = f"{problem.filename}: {problem.strerror}" if problem.filename else str(problem)
    else:
        if RANK == 0:
            print((run_dir / "summary.md").read_text())
            print(f"Everything is in {run_dir}")
        return results
    finally:
        if PROCESSES > 1 and dist.is_initialized():
            dist.destroy_process_group()
    if RANK == 0 and run_dir and not resumed and not list(run_dir.rglob("checkpoint.pt")):  # leave no empty run behind
        shutil.rmtree(run_dir)
    if RANK:
        time.sleep(2)  # torchrun ends all processes with the first that fails: let that be the one that cleans up
    print(f"fire.py: error: {error}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
    if RANK:  # torch's clean-up at the exit of a process aborts now and then while the first one still runs
        os._exit(0)
