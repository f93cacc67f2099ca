"""Does attention forecast a series better than an LSTM, and does any network beat ridge?

Windows of --time-steps values predict the next one. Five networks of a public project ("the
original": LSTM, attention, grouped-query attention, attention over a learned codebook with one or
many heads) and six baselines are scored one step ahead and in a free run, which feeds its own
forecasts back. So are two of ours: `vq_ar`, and `combined`, the mean of `vq_ar` and the forecaster
that is best on validation. The original scores random windows over the whole series, training part
included; the hold-out tests on the last 20 %, on which nothing is fitted or chosen.

Measured on y_w, squared error of free run and one step: in the original's protocol ridge 1070 and
1055, grouped-query attention 1079 and 1080, LSTM 1261 and 1120; on the hold-out ridge 1219 and
1230, grouped-query attention 1258 and 1234 (one seed), `combined` 1239 ± 5 and 1295 ± 5 (five):
attention beats the LSTM, and nothing beats ridge (`python forecast.py`). On 18 fresh series
`combined` is level with NLinear, which is ridge on differences from the last value.

    python forecast.py                                        # y_w, all models: about 8 minutes
    python forecast.py --quick                                # embedded series: under a minute
    python forecast.py --dataset 4single --protocol original  # the original's second table
    python forecast.py --data FILE.csv --column NAME --time-column NAME --model combined
    python forecast.py --time-steps 64 128 256 512 --learning-rate 1e-3 --protocol original
    python forecast.py --resume                               # go on with the newest unfinished
    python forecast.py --predict-steps 200 --checkpoint outputs/forecast/run-001/runs/NAME.pt

Results are in outputs/forecast/run-001/, with the next free number: results.json, summary.md,
runs/*.pt (scores, forecasts and weights of each run) and four pictures of each series.

The original's `vq` and `vq_mh` never mix time steps: their keys and values are rows of the
codebook, so a forecast depends on the last value and its position only.

Sources: donglinkang2021/simple-sequence-prediction (MIT); Vaswani et al. 2017 (attention), Ainslie
et al. 2023 (grouped queries), Su et al. 2021 (rotary positions), van den Oord et al. 2017
(codebooks), Bates and Granger 1969 (combination), Vovk et al. 2005 (conformal intervals).
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.6", "numpy>=2.0", "pandas>=2.2", "scikit-learn>=1.7", "scipy>=1.14",
#     "matplotlib>=3.9", "tqdm>=4.66", "joblib>=1.4",
# ]
# ///

import argparse
import codecs
import contextlib
import csv
import gzip
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
import urllib.request
import warnings
import zlib
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeCV
from torch import nn
from tqdm.auto import tqdm

from common import (COLORS, LINES, MARKERS, detect_device, epoch_axis, in_notebook, legend_below,
                    mean_and_interval, new_figure, plot_curve, save_figure)

EXPERIMENT = "forecast"
URL = "https://raw.githubusercontent.com/donglinkang2021/simple-sequence-prediction/master/data/"
FILES = {  # name: (file, sha256)
    "y_w": ("y+w.csv", "2629be5f09063be55d8a8e1762337018e079f92a12ecac0d871b55cafaa49cf5"),
    "4single": ("4single.csv", "bc405f93002e8c447cf55cd073df7f2375113b7dc58ace4e88895e046deff199"),
}
ORIGINAL_TIME_STEPS = 112
# The model strings of the original's defaults; its figures stand beside these only.
ORIGINAL_NAMES = ["lstm-1-64-2-1", "att-64-1-1-512-is_inln-is_qln-is_kln-is_causal-sinpe",
                  "att_mh-64-8-1-1-1-512-is_kln-is_causal-sinpe",
                  "vq-64-64-1-1-512-is_causal-randpe",
                  "vq_mh-64-64-8-4-1-1-512-is_inln-is_n_pe-rope"]
ORIGINAL_RATES = [3e-3, 1e-3, 5e-4, 3e-4, 1e-4]
# (model, learning rate): (free-run MSE, one-step MSE), all with 112 time steps.
ORIGINAL_TABLES = {
    "y_w": {
        ("att", 5e-4): (1123.62, 1128.09), ("att_mh", 5e-4): (1127.6, 1098.34),
        ("att_mh", 3e-3): (1277.27, 1097.75), ("att_mh", 1e-3): (1407.15, 1127.35),
        ("lstm", 3e-4): (1496.39, 1098.17), ("lstm", 5e-4): (1568.19, 1115.62),
        ("att", 3e-4): (1863.04, 1156.63), ("att_mh", 1e-4): (1954.19, 1211.73),
        ("att", 1e-3): (1998.94, 1123.66), ("lstm", 1e-3): (2384.63, 1126.47),
    },
    "4single": {
        ("vq", 1e-4): (20751.3, 2722.98), ("vq_mh", 5e-4): (24268.4, 2113.12),
        ("vq_mh", 1e-3): (24649.5, 1977.2), ("vq_mh", 3e-3): (25301.4, 1942.9),
        ("vq", 3e-4): (27897.9, 2010.93), ("att_mh", 3e-4): (28387.1, 1309.87),
        ("vq", 3e-3): (29481.0, 1991.11), ("vq", 5e-4): (29551.5, 2008.6),
        ("vq", 1e-3): (29758.8, 2009.97), ("lstm", 5e-4): (31854.4, 1360.52),
    },
}
# The options of the original's attention models; each can be set on the command line.
ATTENTION = {
    "att": {"n_heads": 1, "kv_heads": 1, "inln": True, "qln": True, "kln": True, "causal": True,
            "norm_pe": False, "pe": "sinpe", "codebook": False},
    "att_mh": {"n_heads": 8, "kv_heads": 1, "inln": False, "qln": False, "kln": True,
               "causal": True, "norm_pe": False, "pe": "sinpe", "codebook": False},
    "vq": {"n_heads": 1, "kv_heads": 1, "inln": False, "qln": False, "kln": False, "causal": True,
           "norm_pe": False, "pe": "randpe", "codebook": True},
    "vq_mh": {"n_heads": 8, "kv_heads": 4, "inln": True, "qln": False, "kln": False,
              "causal": False, "norm_pe": True, "pe": "rope", "codebook": True},
}
ATTENTION_FLAGS = {  # the name in the original's model strings and a description
    "inln": ("is_inln", "LayerNorm on the input"),
    "qln": ("is_qln", "LayerNorm on queries"),
    "kln": ("is_kln", "LayerNorm on keys"),
    "causal": ("is_causal", "causal mask"),
    "norm_pe": ("is_n_pe", "positions on queries and keys instead of the input"),
}
# The hold-out, as shares of the rows: models are fitted on the first 40, 50 and 60 % and validated
# on the next 20 %, with free runs from five origins there; then fitted on 80 % and tested.
FOLDS = [0.4, 0.5, 0.6]
VALIDATION_SHARE = 0.2
TEST_START = 0.8
ORIGINS = 5
COVERAGE = 0.8  # of the intervals
COMBINED_RATE = 1e-3  # learning rate of vq_ar in `combined`
KINDS = ["free run", "one step"]
PROTOCOLS = {"original": "original's protocol (in-sample)", "holdout": "hold-out"}
RANKED_BY = {"original": "original free run", "holdout": "validation free run"}
MAX_PERIOD = 500
RIDGE_STRENGTHS = 10.0 ** np.arange(-4, 5)
# Names of columns that tell series apart.
SERIES_COLUMN = re.compile(
    r"(.*[ _])?(id|name|nbr|series|item|store|sensor|device|station|ticker|symbol|region|country|"
    r"city|location|group|variable)|(unique|series|item|store|sensor|device|meter|lcl)id", re.I)
COMPACT_DATES = {6: "%Y%m", 8: "%Y%m%d", 10: "%Y%m%d%H"}  # by the number of digits


def parse_args(argv=None):
    """The command line as a namespace; an error is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        f"{EXPERIMENT}.py", argparse.SUPPRESS, __doc__.split("\n\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="embedded series, one rate: under a minute")
    add("--dataset", nargs="+", choices=[*FILES, "synthetic"], help="known series, downloaded to "
        "--data-dir, or the embedded one; if unset, y_w, or synthetic if that cannot be downloaded")
    add("--data", metavar="FILE", help="CSV file of your own series")
    add("--column", default="-1", metavar="NAME", help="column of values, or its index; -1 is the "
        "last")
    add("--time-column", metavar="NAME", help="column of times, or its index; if unset, the rows "
        "are taken as equally spaced")
    add("--series-column", metavar="NAME", help="column that names the series of a row, or "
        "none")
    add("--series", metavar="NAME", help="series to take, with --series-column")
    add("--fill", choices=["linear", "forward"], help="how to fill missing values and rows")
    add("--data-dir", default="data", help="folder of downloads")
    add("--protocol", choices=["original", "holdout", "both"], default="both", help="original: "
        "random windows, scored over the whole series; holdout: tested on the last 20 %%")
    add("--model", nargs="*", choices=[*MODELS, "combined"], default=[*MODELS, "combined"],
        help="models to run beside the baselines; without a value, the baselines only")
    add("--time-steps", nargs="+", type=int, help="values in a window; if unset, 112, or about a "
        "sixth of a shorter series")
    add("--learning-rate", nargs="+", type=float, default=ORIGINAL_RATES, help="learning rates")
    add("--d-model", nargs="+", type=int, default=[64], help="widths of the attention models")
    add("--pe", nargs="+", choices=["none", "randpe", "sinpe", "rope"], help="positional "
        "encodings; if unset, the original's for each model")
    add("--hidden-dim", type=int, default=64, help="width of the LSTM")
    add("--num-layers", type=int, default=2, help="layers of the LSTM")
    add("--n-heads", type=int, help="query heads of att_mh and vq_mh; if unset, 8")
    add("--kv-heads", type=int, help="key heads of att_mh and vq_mh; if unset, 1 and 4")
    add("--vocab-size", type=int, default=64, help="codebook rows of vq and vq_mh")
    add("--block-size", type=int, default=512, help="positions of the attention models")
    for flag, (_, description) in ATTENTION_FLAGS.items():
        add(f"--{flag.replace('_', '-')}", action=argparse.BooleanOptionalAction,
            help=f"{description}; if unset, the original's choice for each model")
    add("--align-target", action=argparse.BooleanOptionalAction, help="loss at every step instead "
        "of the last one; if unset, for all models but the LSTM")
    add("--epochs", type=int, default=50, help="passes over the windows")
    add("--batch-size", type=int, default=64, help="windows in a step")
    add("--seed", type=int, default=42, help="random seed of weights and order; the original's "
        "split always has 42")
    add("--runs", type=int, default=1, help="number of seeds; reports mean and interval")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    add("--backend", choices=["loky", "dask"], default="loky", help="joblib's backend: this "
        "machine, or a dask cluster at DASK_SCHEDULER_ADDRESS")
    add("--device", type=detect_device, default="auto", help="auto, cuda, mps or cpu")
    add("--output-dir", default="outputs", help="folder of all results")
    add("--resume", nargs="?", const="newest", metavar="RUN_DIR", help="unfinished sweep to go on "
        "with; without a value, the newest")
    add("--predict-steps", type=int, metavar="N", help="values to forecast after the end of the "
        "series of --checkpoint")
    add("--checkpoint", metavar="FILE", help="file in runs/ of a sweep")
    if "--quick" in (argv or []):
        parser.set_defaults(dataset=["synthetic"], epochs=12, time_steps=[128],
                            learning_rate=[3e-3])
    args = parser.parse_args(argv)
    if args.data:
        args.data = os.path.abspath(args.data)  # a resumed run may be started elsewhere
    check_args(args, parser.error)
    return args


def check_args(args, error):
    """Call `error` with a message if an argument is out of range or does not fit another."""
    least = {"seed": 0, "time_steps": 2}
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if type(number) is int and number < least.get(name, 1):
                error(f"--{name.replace('_', '-')} {number} is too small")
    if not all(0 < rate <= 10 for rate in args.learning_rate) or args.seed >= 2**31:
        error("--learning-rate must be above 0 and at most 10, --seed under 2**31")
    if args.data and args.dataset and not args.quick:
        error("--data and --dataset exclude each other")
    if args.protocol == "original" and args.model == ["combined"]:
        error("combined needs the hold-out; see --protocol")
    if (args.series_column not in (None, "none")) != bool(args.series):
        error("--series-column and --series go together")
    if (args.predict_steps is None) != (args.checkpoint is None):
        error("--predict-steps and --checkpoint go together")
    if (args.predict_steps or 0) > 10**6:
        error("--predict-steps is at most a million")


# --- Data ---------------------------------------------------------------------------------------


@dataclass
class Series:
    """One series: `values` [rows] float64 of a column, and the times of the rows."""

    name: str
    values: np.ndarray
    times: pd.Index  # row numbers, numbers, or dates with their frequency
    column: str
    time_label: str
    source: str  # real or embedded


def digest(values):
    """sha256 of values [rows]."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def generate_series(rows=720, seed=0):
    """The embedded series [rows]: two peaks in each cycle of 120 rows, a slow drift and noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(rows)
    cycle, phase = t // 120, (t % 120) / 120
    heights = rng.uniform(0.85, 1.15, (rows // 120 + 1, 2))[cycle]  # no two cycles are alike
    first = np.exp(-(((phase - 0.25) / 0.07) ** 2))
    second = np.exp(-(((phase - 0.60) / 0.12) ** 2))
    level = 120 + 15 * np.sin(2 * np.pi * t / 1000)
    peaks = 300 * heights[:, 0] * first + 170 * heights[:, 1] * second
    return level + peaks + 12 * rng.standard_normal(rows)


def decode(content, path):
    """The text of a file, which may be compressed, or in UTF-16 or Latin-1."""
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{path}: {error}") from None
    encoding = "utf-8-sig"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    if "\0" in text:
        raise UserError(f"{path}: not a text file; save it as CSV")
    return "\n".join(text.rstrip().splitlines())


def read_frame(path):
    """pandas DataFrame of a CSV file with any usual encoding, delimiter and decimal point."""
    text = decode(Path(path).read_bytes(), path)
    if text.startswith("sep="):  # as Excel writes it
        text = text.partition("\n")[2]
    header, first_row = [*text.split("\n", 2), "", ""][:2]
    delimiter = next((mark for mark in ";\t|," if mark in header and mark in first_row), "\t")
    decimal = "," if delimiter != "," and re.search(r"\d,\d", text) else "."
    names = next(csv.reader([header], delimiter=delimiter), [])
    if not first_row or not names[-1] or len(set(names)) < len(names) or any(map(is_number, names)):
        raise UserError(f"{path}: the first line must name the columns, each once, and rows must "
                        f"follow; it is {header[:80]!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(io.StringIO(text), sep=delimiter, decimal=decimal, index_col=False,
                                skip_blank_lines=False)
            return frame.rename_axis("row")
    except (ValueError, pd.errors.ParserWarning) as error:
        raise UserError(f"{path}: {error}") from None


def is_number(text):
    """Whether a cell is a number, with a point or a comma, or nan."""
    with contextlib.suppress(ValueError):
        float(text.replace(",", "."))
        return True
    return False


def find_column(frame, name, path):
    """The name of a column of a frame that is called `name` or has this index."""
    if name in frame:
        return name
    with contextlib.suppress(ValueError, IndexError):
        return frame.columns[int(name)]
    raise UserError(f"{path}: no column {name!r}, only {', '.join(frame)}")


def select_series(frame, args):
    """The rows of --series. Raises UserError where a column seems to name several series."""
    if args.series_column == "none":
        return frame
    if args.series_column:
        names = frame[find_column(frame, args.series_column, args.data)].astype(str)
        if args.series not in set(names):
            raise UserError(f"{args.data}: no series {args.series!r}, only "
                            f"{', '.join(names.unique()[:10])}")
        return frame[names == args.series]
    for name in frame.columns.difference([args.column, args.time_column]):
        if not SERIES_COLUMN.fullmatch(name) or pd.api.types.is_float_dtype(frame[name]):
            continue
        if 1 < frame[name].nunique() <= len(frame) / 2:
            raise UserError(f"{args.data}: column {name!r} names {frame[name].nunique()} series; "
                            f"choose one with --series-column {name} --series "
                            f"{frame[name].iloc[0]}, or take all with --series-column none")
    return frame


def read_times(column, path):
    """The times of a column: numbers, or dates with their time zone."""
    where = f"{path}, column {column.name!r}"
    texts = column.astype(str).str.strip()
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        digits = set(texts.str.len())
        compact = COMPACT_DATES.get(digits.pop()) if len(digits) == 1 else None
        dates = pd.to_datetime(texts, format=compact or "%Y", errors="coerce")
        return dates if compact and dates.dt.year.between(1700, 2200).all() else column
    if texts.str.match(r"T?\d{1,2}:\d\d").any():
        raise UserError(f"{where}: times of day need a date; without --time-column the rows are "
                        "taken as equally spaced")
    offsets = texts.str.extract(r":\d\d(Z|[+-]\d\d:?\d\d)$", expand=False)
    mixed = offsets.nunique(dropna=False) > 1
    if mixed and offsets.isna().any():
        raise UserError(f"{where}: some times have an offset from UTC and others have none")
    if mixed:
        note(f"{where}: several offsets from UTC; times are in UTC")
    orders = [False] if texts.str.match(r"\d{4}").all() else [False, True]
    candidates = [pd.to_datetime(texts, format="mixed", errors="coerce", dayfirst=day_first,
                                 utc=mixed) for day_first in orders]
    # The right order of day and month leaves the fewest invalid and missing times.
    return min(candidates, key=lambda times: (times.isna().sum(), span_in_steps(times)))


def span_in_steps(times):
    """The time from the first to the last of times in any order, in median steps."""
    steps = times.drop_duplicates().sort_values().diff()
    return steps.sum() / steps.median()


def usual_step(times):
    """The mean of the steps of numeric times that are near the median; whole if it is."""
    steps = np.diff(times)
    step = steps[np.abs(steps / np.median(steps) - 1) < 0.1].mean()
    return int(step) if step == int(step) else step


def place_on_grid(times, where):
    """(grid, places): all equally spaced times from the first to the last of the increasing
    `times`, and the places of `times` among them. The spacing is a number, or a frequency such as
    business days. Raises UserError if there is none."""
    if isinstance(times, pd.DatetimeIndex):
        starts = range(0, max(1, len(times) - 9), max(1, len(times) // 50))
        with warnings.catch_warnings(action="ignore"):  # pandas 4 will return another type
            frequencies = {pd.infer_freq(times[start : start + 10]) for start in starts} - {None}
        grids = [pd.date_range(times[0], times[-1], freq=frequency) for frequency in frequencies]
        places = [grid.get_indexer(times) for grid in grids]
    else:
        step = usual_step(times)
        exact = (times.to_numpy() - times[0]) / step
        places = [exact.round().astype(int)]
        grids = [times[0] + step * pd.RangeIndex(places[0][-1] + 1)]
        places[0][np.abs(exact - places[0]) > 0.1] = -1
    fitting = [(grid, place) for grid, place in zip(grids, places)
               if place.min() >= 0 and len(set(place)) == len(times)]
    if not fitting:
        raise UserError(f"{where}: the times are not equally spaced; resample them, or leave out "
                        "--time-column to take the rows as equally spaced")
    return min(fitting, key=lambda pair: len(pair[0]))


def sort_by_time(frame, time_column, args):
    """The frame with its times as index, in order and complete: missing rows hold NaN."""
    where = f"{args.data}, column {time_column!r}"
    times = read_times(frame[time_column], args.data)
    for bad, problem in ((times.isna(), "is not a time"),
                         (times.duplicated(), "occurs twice; are these several series? Choose one "
                          "with --series-column and --series")):
        if bad.any():
            row = bad.idxmax()
            raise UserError(f"{where}, row {row + 2}: {frame[time_column][row]} {problem}")
    if not times.is_monotonic_increasing:
        note(f"{where}: the rows are not in order and are sorted by time")
    if len(times) < 3:
        raise UserError(f"{where}: at least three rows are needed")
    frame = frame.set_index(pd.Index(times)).sort_index()
    grid, places = place_on_grid(frame.index, where)
    missing = np.setdiff1d(np.arange(len(grid)), places)
    if len(missing) and not args.fill:
        raise UserError(f"{where}: {len(missing)} rows are missing, the first at "
                        f"{grid[missing[0]]}; --fill linear or --fill forward fills them")
    return frame.set_index(grid[places]).reindex(grid)


def read_values(column, args):
    """The numbers [rows] float64 of a column, with missing ones filled as --fill says."""
    where = f"{args.data}, column {column.name!r}"
    values = pd.to_numeric(column, errors="coerce").astype(float).replace([np.inf, -np.inf], np.nan)
    no_numbers = values.isna() & column.notna() & ~column.isin([np.inf, -np.inf])
    if no_numbers.any():
        raise UserError(f"{where}, {row_name(no_numbers)}: {column[no_numbers].iloc[0]!r} is not a "
                        "number")
    missing = values.isna()
    if missing.any() and not args.fill:
        raise UserError(f"{where}, {row_name(missing)}: empty, NaN or infinite, like "
                        f"{missing.sum()} of {len(values)} rows; --fill linear or --fill forward "
                        "fills them")
    if missing.any():
        note(f"{where}: missing values filled: {missing.sum()}")
        values = values.ffill() if args.fill == "forward" else values.interpolate("linear")
    if values.isna().any():
        raise UserError(f"{where}: the first value is missing")
    if np.ptp(values) == 0:
        raise UserError(f"{where}: constant; there is nothing to forecast")
    if not 1e-100 < np.abs(values).max() < 1e100:
        raise UserError(f"{where}: values below 1e-100 or above 1e100; rescale them")
    return values.to_numpy()


def row_name(is_bad):
    """The first row that is bad: its line in the file, or its time."""
    label = is_bad.idxmax()
    return f"row {label + 2}" if is_bad.index.name == "row" else f"at {label}"


def read_series(args):
    """The Series of --data. Raises UserError for a file that cannot be taken as one series."""
    frame = select_series(read_frame(args.data), args)
    column, time_label = find_column(frame, args.column, args.data), "row number"
    times = pd.RangeIndex(len(frame))
    if args.time_column:
        time_label = find_column(frame, args.time_column, args.data)
        if column == time_label:
            raise UserError(f"{args.data}: {column!r} is the time column; choose another --column")
        frame = sort_by_time(frame, time_label, args)
        times = frame.index
    values = read_values(frame[column], args)
    return Series(Path(args.data).stem, values, times, column, time_label, "real")


def fetch(name, data_dir):
    """Path of a known series in `data_dir`, downloaded if absent. Raises UserError."""
    file, sha256 = FILES[name]
    path = Path(data_dir, file)
    where = path if path.exists() else URL + file
    try:
        content = path.read_bytes() if path.exists() else download(where)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{where}: {error}; put {file} into {data_dir}, or use --dataset "
                        "synthetic") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{where}: {len(content):,} bytes with another sha256 than expected")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_bytes(content)
    return path


def download(url):
    """The content at a URL; one attempt of 3 s."""
    with urllib.request.urlopen(url, timeout=3) as response:
        return response.read()


def load_series(args):
    """{name: Series} of --data or --dataset; with neither y_w, or the embedded series."""
    if args.data:
        series = read_series(args)
        return {series.name: series}
    loaded = {}
    for name in args.dataset or ["y_w"]:
        if name != "synthetic":
            try:
                times, values = read_frame(fetch(name, args.data_dir)).items()
                loaded[name] = Series(name, values[1].to_numpy(), pd.Index(times[1]), values[0],
                                      times[0], "real")
                continue
            except UserError as error:
                if args.dataset:
                    raise
                note(f"no real data ({error}); the embedded series is used")
        values = generate_series()
        times = pd.Index(np.arange(len(values)) / 30)
        loaded["synthetic"] = Series("synthetic", values, times, "signal", "time [h]", "embedded")
    return loaded


# --- Baselines: linear functions of the last values, plus a constant for each phase -------------


class LinearForecaster(nn.Module):
    """x[t] = weights · x[t - lookback : t] + bias[t mod period]."""

    def __init__(self, weights, bias):
        super().__init__()
        self.register_buffer("weights", torch.as_tensor(weights, dtype=torch.float32))  # [lookback]
        self.register_buffer("bias", torch.as_tensor(bias, dtype=torch.float32))  # [period]

    def predict(self, windows, rows):
        """Forecasts [batch, 1] of the rows [batch] that follow windows [batch, lookback]."""
        return (windows @ self.weights + self.bias[rows % len(self.bias)]).unsqueeze(1)


def find_period(z):
    """The period of z [rows], or 1 if it has none. Candidates are the high peaks of the
    autocorrelation; it is the shortest with which the seasonal naive forecast of the last quarter
    has an error within 10 % of the least."""
    rows = np.arange(len(z))
    residuals = z - np.polyval(np.polyfit(rows, z, 1), rows)
    if np.ptp(residuals) <= 1e-9 * np.ptp(z):  # a straight line
        return 1
    spectrum = np.abs(np.fft.rfft(residuals, 2 * len(z))) ** 2
    correlation = np.fft.irfft(spectrum)[: len(z)] / np.arange(len(z), 0, -1)
    correlation = correlation[: min(MAX_PERIOD, len(z) // 3)] / correlation[0]
    middle = correlation[1:-1]
    is_peak = (middle > correlation[:-2]) & (middle > correlation[2:])
    is_high = middle > max(0.2, 0.8 * middle[is_peak].max(initial=0))
    peaks = np.flatnonzero(is_peak & is_high) + 1
    start = len(z) * 3 // 4
    errors = [np.mean((z[start:] - z[start - peak : len(z) - peak]) ** 2) for peak in peaks]
    return next((int(peak) for peak, error in zip(peaks, errors) if error <= 1.1 * min(errors)), 1)


def fit_mean(z, time_steps):
    """The mean of the training part."""
    return np.zeros(1), [z.mean()]


def fit_last(z, time_steps):
    """The last value (persistence)."""
    return np.ones(1), [0.0]


def fit_seasonal(z, time_steps):
    """The value one period ago."""
    return np.eye(find_period(z))[0], [0.0]


def fit_ridge(z, time_steps):
    """Ridge regression on the last values; its strength by generalized cross-validation."""
    return regress_last(np.lib.stride_tricks.sliding_window_view(z, time_steps + 1))


def regress_last(windows):
    """(weights, bias) of ridge regression of the last column of windows on the others."""
    model = RidgeCV(RIDGE_STRENGTHS).fit(windows[:, :-1], windows[:, -1])
    return model.coef_, [model.intercept_]


def fit_nlinear(z, time_steps):
    """Ridge regression on differences from the last value (NLinear, Zeng et al. 2023)."""
    windows = np.lib.stride_tricks.sliding_window_view(z, time_steps + 1)
    weights, bias = regress_last(windows - windows[:, -2:-1])
    weights[-1] = 1 - weights[:-1].sum()
    return weights, bias


def fit_theta(z, time_steps):
    """The Theta method (Assimakopoulos and Nikolopoulos 2000): exponential smoothing of the
    deseasonalized series, with half the slope of its trend as drift (Hyndman and Billah 2003)."""
    period = find_period(z)
    rows = np.arange(len(z))
    slope, level = np.polyfit(rows, z, 1)
    season = pd.Series(z - level - slope * rows).groupby(rows % period).mean().to_numpy()
    drift = slope / 2
    remainder = pd.Series(z - season[rows % period] - drift * rows)
    errors = {strength: np.mean((remainder.ewm(alpha=strength).mean().shift() - remainder) ** 2)
              for strength in np.arange(0.05, 1.01, 0.05).clip(max=1)}
    strength = min(errors, key=errors.get)
    ages = np.arange(1, min(len(z), 300) + 1)  # 1 for the last value
    weights = strength * (1 - strength) ** (ages - 1)
    weights /= weights.sum()
    phases = np.arange(period)
    past_season = season[(phases[:, None] - ages) % period] @ weights
    return weights[::-1].copy(), season - past_season + drift * (ages @ weights)


BASELINES = {"mean": fit_mean, "last": fit_last, "seasonal": fit_seasonal, "ridge": fit_ridge,
             "nlinear": fit_nlinear, "theta": fit_theta}


# --- Networks: each reads [batch, time] normalized values ---------------------------------------


class Network(nn.Module):
    """Base of all networks. A new one needs __init__(run, args), with a Run and the command line,
    forward, and an entry in MODELS; with a longer horizon its own loss, too.

    forward(x, last_only) takes x [batch, time] to the forecasts [batch, horizon] of the values
    after x; without last_only to one-step forecasts [batch, time] from every step.
    """

    horizon = 1  # values of one forecast
    decay = False  # whether the learning rate warms up and decays
    align_target = True  # whether the loss is taken at every step, without --align-target

    def start(self, windows):
        """Called before training with all training windows [count, time + horizon]."""

    def loss(self, windows, align_target):
        """Loss of windows [batch, time + 1] at every step, or at the last only."""
        inputs, targets = windows[:, :-1], windows[:, 1:]
        if align_target:
            return F.mse_loss(self(inputs, last_only=False), targets)
        return F.mse_loss(self(inputs), targets[:, -1:])

    def predict(self, windows, rows):
        """Forecasts [batch, horizon] after windows [batch, time], whatever their rows are."""
        return self(windows)


class LSTM(Network):
    """The original's LSTM; 50,497 parameters at its defaults."""

    align_target = False

    def __init__(self, run, args):
        super().__init__()
        self.name = f"lstm-1-{args.hidden_dim}-{args.num_layers}-1"
        self.lstm = nn.LSTM(1, args.hidden_dim, args.num_layers, batch_first=True)
        self.head = nn.Linear(args.hidden_dim, 1)
        for name, parameter in self.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x, last_only=True):
        hidden, _ = self.lstm(x.unsqueeze(-1))  # [batch, time, hidden_dim]
        if last_only:
            hidden = hidden[:, -1:]
        return self.head(hidden).squeeze(-1)


class Positions(nn.Module):
    """Puts positions into [..., time, width]: `randpe` adds learned rows, `sinpe` waves (Vaswani
    et al. 2017), and `rope` rotates pairs, one half of the width with the other (Su et al. 2021).
    """

    def __init__(self, kind, width, block_size):
        super().__init__()
        self.kind = kind
        frequencies = 10000 ** (-torch.arange(0, width, 2) / width)
        angles = torch.arange(block_size).unsqueeze(1) * frequencies  # [block_size, width / 2]
        if kind == "randpe":
            self.table = nn.Parameter(torch.randn(block_size, width))
        if kind == "sinpe":
            waves = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]
            self.register_buffer("table", waves, persistent=False)
        if kind == "rope":
            cos, sin = angles.cos(), angles.sin()
            self.register_buffer("cos", torch.cat([cos, cos], 1), persistent=False)
            self.register_buffer("sin", torch.cat([-sin, sin], 1), persistent=False)

    def forward(self, x, first=0):
        rows = slice(first, first + x.shape[-2])
        if self.kind == "none":
            return x
        if self.kind == "rope":
            return x * self.cos[rows] + x.roll(x.shape[-1] // 2, -1) * self.sin[rows]
        return x + self.table[rows]


def attention_options(run, args):
    """The options of run.model: the original's, where the command line does not say otherwise."""
    options = dict(ATTENTION[run.model])
    for name in options:
        if getattr(args, name, None) is not None and name != "pe":
            options[name] = getattr(args, name)
    if run.model in ("att", "vq"):
        options |= {"n_heads": 1, "kv_heads": 1}
    if run.pe:
        options["pe"] = run.pe
    return argparse.Namespace(**options)


class Attention(Network):
    """The original's four attention models: one layer, without residual and MLP.

    `att` and `att_mh` attend over the window. In `vq` and `vq_mh` a learned codebook takes the
    place of keys and values, and the embedded input is the query. With --norm-pe the positions
    are put on queries and keys after their norms, so that rope stays relative (the original had
    the other order).
    """

    def __init__(self, run, args):
        super().__init__()
        options = attention_options(run, args)
        width, rest = divmod(run.d_model, options.n_heads)
        if rest or options.n_heads % options.kv_heads:
            raise UserError(f"{run.model}: --kv-heads {options.kv_heads} must divide --n-heads "
                            f"{options.n_heads}, and that --d-model {run.d_model}")
        if options.pe == "rope" and (width if options.norm_pe else run.d_model) % 2:
            raise UserError(f"{run.model}: --pe rope needs an even width; see --d-model, --n-heads")
        if args.align_target is not False and not (options.causal or options.codebook):
            raise UserError(f"{run.model} would see its own targets; add --no-align-target or "
                            "--causal")
        self.options, self.width = options, width
        block_size = max(args.block_size, run.time_steps)
        self.name = self.make_name(run, args, block_size)
        self.fc_in = nn.Linear(1, run.d_model)
        self.position = Positions(options.pe, width if options.norm_pe else run.d_model, block_size)
        self.ln_in = nn.LayerNorm(run.d_model) if options.inln else nn.Identity()
        self.ln_q = nn.LayerNorm(width) if options.qln else nn.Identity()
        self.ln_k = nn.LayerNorm(width) if options.kln else nn.Identity()
        if options.codebook:
            self.codebook = nn.Parameter(torch.randn(options.kv_heads, args.vocab_size, width))
        else:
            self.fc_q = nn.Linear(run.d_model, run.d_model, bias=False)
            self.fc_k = nn.Linear(run.d_model, options.kv_heads * width, bias=False)
            self.fc_v = nn.Linear(run.d_model, options.kv_heads * width, bias=False)
        self.fc_out = nn.Linear(run.d_model, 1, bias=options.codebook)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # `att` of the original projects to q, k and v with one matrix, which has a
                # Xavier bound that is smaller by this factor.
                joint = run.model == "att" and name in ("fc_q", "fc_k", "fc_v")
                nn.init.xavier_uniform_(module.weight, gain=0.5**0.5 if joint else 1.0)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def make_name(self, run, args, block_size):
        """The original's model string: sizes, the flags that are set, the encoding."""
        options = self.options
        sizes = [args.vocab_size] * options.codebook + [run.d_model]
        if run.model.endswith("_mh"):
            sizes += [options.n_heads, options.kv_heads]
        flags = [flag for name, (flag, _) in ATTENTION_FLAGS.items() if getattr(options, name)]
        encoding = [options.pe] if options.pe != "none" else []
        return "-".join(map(str, [run.model, *sizes, 1, 1, block_size, *flags, *encoding]))

    def split_heads(self, x):
        """[batch, time, heads · width] -> [batch, heads, time, width]."""
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)

    def forward(self, x, last_only=True):
        first = x.shape[1] - 1 if last_only else 0  # the first query
        hidden = self.fc_in(x.unsqueeze(-1))  # [batch, time, d_model]
        if not self.options.norm_pe:
            hidden = self.position(hidden)
        hidden = self.ln_in(hidden)
        if self.options.codebook:
            q = self.split_heads(hidden[:, first:])
            k = v = self.codebook.expand(len(x), -1, -1, -1)
        else:
            q = self.split_heads(self.fc_q(hidden[:, first:]))
            k, v = self.split_heads(self.fc_k(hidden)), self.split_heads(self.fc_v(hidden))
        q, k = self.ln_q(q), self.ln_k(k)
        if self.options.norm_pe:
            q = self.position(q, first)
            k = k if self.options.codebook else self.position(k)
        # The query heads that share a key head become more queries of it (grouped queries).
        batch, heads, queries, width = q.shape
        group = heads // k.shape[1]
        q = q.reshape(batch, k.shape[1], group * queries, width)
        mask = None
        if self.options.causal:
            mask = torch.ones(queries, k.shape[2], dtype=torch.bool, device=x.device).tril(first)
            mask = mask.repeat(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, mask)
        out = out.reshape(batch, heads, queries, width).transpose(1, 2).flatten(2)
        return self.fc_out(out).squeeze(-1)


class CodebookAR(Network):
    """Ours, `vq_ar`: attention over a codebook of autoregressions, which does look back.

    It starts as ridge regression of the next `horizon` values on the window, relative to its last
    value, and learns a correction. A query, an MLP of the window's means over lags 1, 2, 3-4,
    5-8, … divided by their spread, attends over `vocab_size` keys; each value is a linear map
    from the same means to the next values, so that rises and decays get a row each. `members`
    such models are trained side by side; the forecast is their mean.
    """

    vocab_size, hidden_dim, key_dim, members = 4, 32, 16, 8
    decay = True

    def __init__(self, run, args):
        super().__init__()
        time_steps = run.time_steps
        self.horizon = min(16, time_steps)
        edges = [0] + [2**i for i in range(math.ceil(math.log2(time_steps)))] + [time_steps]
        pool = torch.zeros(time_steps, len(edges) - 1)
        for lag, (near, far) in enumerate(itertools.pairwise(edges)):
            pool[time_steps - far : time_steps - near, lag] = 1 / (far - near)
        self.register_buffer("pool", pool, persistent=False)  # [time, lags]
        lags = len(edges) - 1
        self.register_buffer("ridge", torch.zeros(time_steps, self.horizon))
        self.register_buffer("intercept", torch.zeros(self.horizon))
        self.fc_in = self.normal(lags + 1, self.hidden_dim)
        self.bias = nn.Parameter(torch.zeros(self.members, 1, self.hidden_dim))
        self.fc_query = self.normal(self.hidden_dim, self.key_dim)
        self.keys = self.normal(self.key_dim, self.vocab_size)
        value_rows = self.vocab_size * (lags + 2)
        self.values = nn.Parameter(torch.zeros(self.members, value_rows, self.horizon))

    def normal(self, rows, columns):
        return nn.Parameter(torch.randn(self.members, rows, columns) * rows**-0.5)

    def start(self, windows):
        """Fit the ridge regression from which training starts."""
        windows = windows.cpu().double().numpy()
        time_steps = len(self.pool)
        last = windows[:, time_steps - 1 : time_steps]
        model = RidgeCV(RIDGE_STRENGTHS)
        model.fit(windows[:, :time_steps] - last, windows[:, time_steps:] - last)
        self.ridge.copy_(torch.from_numpy(model.coef_.T.reshape(time_steps, -1)))
        self.intercept.copy_(torch.from_numpy(np.atleast_1d(model.intercept_)))

    def forward(self, x, last_only=True, each_member=False):
        """[batch, time] -> [batch, horizon], or [members, batch, horizon] with each_member."""
        last = x[:, -1:]
        level = x[:, -4:].mean(1, keepdim=True)
        lags = x @ self.pool - level  # [batch, lags]
        spread = (x - level).square().mean(1, keepdim=True).sqrt() + 0.05
        shape = torch.cat([lags / spread, spread.log()], 1)
        query = F.gelu(shape @ self.fc_in + self.bias) @ self.fc_query  # [members, batch, key_dim]
        weights = (query @ self.keys).softmax(-1)  # [members, batch, vocab_size]
        inputs = torch.cat([lags, level, torch.ones_like(level)], 1)
        mixed = (weights.unsqueeze(-1) * inputs.unsqueeze(1)).flatten(2)
        forecasts = last + (x - last) @ self.ridge + self.intercept + mixed @ self.values
        return forecasts if each_member else forecasts.mean(0)

    def loss(self, windows, align_target):
        """Huber loss over the horizon: otherwise a few steep rises would outweigh the rest."""
        time_steps = len(self.pool)
        forecasts = self(windows[:, :time_steps], each_member=True)
        return F.huber_loss(forecasts, windows[:, time_steps:].expand_as(forecasts), delta=0.05)


MODELS = {"lstm": LSTM, "att": Attention, "att_mh": Attention, "vq": Attention,
          "vq_mh": Attention, "vq_ar": CodebookAR}


# --- Training -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run of a sweep: everything that differs from run to run."""

    model: str
    dataset: str
    time_steps: int
    learning_rate: float | None = None
    d_model: int | None = None
    pe: str | None = None
    seed: int = 0

    @property
    def id(self):
        """A name for files."""
        return "_".join(str(value) for value in astuple(self) if value is not None)


def warm_up_then_cosine(step, steps):
    """Factor of the learning rate: up over the first 5 % of the steps, then a cosine to 0."""
    return min((step + 1) / (0.05 * steps), 1) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def original_split(count):
    """(training, validation) windows of `count`, 80/20 at random, in the original's order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(42))
    return order[: int(0.8 * count)], order[int(0.8 * count) :]


def train(model, z, train_starts, val_starts, run, args, shuffle):
    """Train a network on the windows of z [rows] that begin at rows `train_starts`.

    The original went through its random windows in one fixed order (`shuffle` False). Returns
    the history [{train_loss, val_loss}], one entry an epoch. Raises UserError if it diverges.
    """
    windows = z.unfold(0, run.time_steps + model.horizon, 1)  # a view [count, time + horizon]
    align_target = model.align_target if args.align_target is None else args.align_target
    model.start(windows[train_starts])
    optimizer = torch.optim.Adam(model.parameters(), run.learning_rate, fused=True)
    steps = args.epochs * math.ceil(len(train_starts) / args.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_up_then_cosine(step, steps) if model.decay else 1.0)
    history = []
    for epoch in range(args.epochs):
        model.train()
        order = train_starts
        if shuffle:
            order = order[torch.randperm(len(order), device=z.device)]
        losses = []
        for starts in order.split(args.batch_size):
            loss = model.loss(windows[starts], align_target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
        train_loss = torch.stack(losses).mean().item()
        if not math.isfinite(train_loss):
            raise UserError(f"the loss of epoch {epoch + 1} is not finite; try a lower "
                            "--learning-rate")
        model.eval()
        with torch.inference_mode():
            losses = [model.loss(windows[starts], align_target) for starts in val_starts.split(256)]
        val_loss = torch.stack(losses).mean().item()  # NaN without validation windows
        history.append({"train_loss": train_loss, "val_loss": val_loss})
    return history


@dataclass
class Fitted:
    """A fitted model with the mean and standard deviation that normalize its series."""

    model: nn.Module
    lookback: int
    mean: float
    std: float
    history: list

    def normalize(self, values):
        device = next(itertools.chain(self.model.parameters(), self.model.buffers())).device
        return torch.tensor((values - self.mean) / self.std, dtype=torch.float32, device=device)

    def denormalize(self, z):
        return z.double().cpu().numpy() * self.std + self.mean

    @torch.inference_mode()
    def one_step(self, values, start, stop):
        """Forecasts [stop - start] of the rows, each from the true values before it."""
        z = self.normalize(values)
        forecasts = []
        for rows in torch.arange(start, stop, device=z.device).split(256):
            forecasts.append(self.model.predict(windows_before(z, rows, self.lookback), rows)[:, 0])
        return self.denormalize(torch.cat(forecasts))

    @torch.inference_mode()
    def free_run(self, values, origins, steps):
        """Forecasts [origins, steps] from each origin on, which feed their own values back."""
        z = self.normalize(values)
        rows = torch.as_tensor(origins, device=z.device)
        known = windows_before(z, rows, self.lookback)
        path = torch.cat([known, known.new_zeros(len(rows), steps)], 1)
        done = 0
        while done < steps:
            window = path[:, done : done + self.lookback]
            ahead = self.model.predict(window, rows + done)[:, : steps - done]
            first = self.lookback + done
            path[:, first : first + ahead.shape[1]] = ahead
            done += ahead.shape[1]
        return self.denormalize(path[:, self.lookback :])


def windows_before(z, rows, lookback):
    """Windows [len(rows), lookback] of z [rows] that end before the rows; before the first value,
    that value is repeated."""
    padded = torch.cat([z[:1].expand(lookback), z])
    return padded.unfold(0, lookback, 1)[rows]


def split_windows(run, horizon, stop, val_stop):
    """(training, validation) windows by the rows at which they begin: those that end before row
    `stop`, and those whose targets lie in rows stop to val_stop."""
    train_starts = torch.arange(stop - run.time_steps - horizon + 1)
    val_count = max(0, val_stop - stop - horizon + 1)
    return train_starts, stop - run.time_steps + torch.arange(val_count)


def fit(run, args, models, values, stop, val_stop=0, original=False):
    """Fit the model of a run to values[:stop]; with `original` to a random 80 % of its windows.
    `models` holds BASELINES and MODELS, since workers do not see what was added to these."""
    mean, std = values[:stop].mean(), values[:stop].std()
    if not std > 0:
        raise UserError(f"the first {stop} values are constant")
    if run.model in models["baselines"]:
        z = (values[:stop] - mean) / std
        weights, bias = models["baselines"][run.model](z, run.time_steps)
        model = LinearForecaster(weights, bias).to(args.device)
        return Fitted(model, len(weights), mean, std, [])
    torch.manual_seed(run.seed)
    model = models["networks"][run.model](run, args).to(args.device)
    fitted = Fitted(model, run.time_steps, mean, std, [])
    z = fitted.normalize(values)
    starts = split_windows(run, model.horizon, stop, val_stop)
    if original:
        count = stop - run.time_steps - model.horizon + 1
        starts = [part[part < count] for part in original_split(stop - run.time_steps)]
    train_starts, val_starts = (part.to(args.device) for part in starts)
    fitted.history = train(model, z, train_starts, val_starts, run, args, shuffle=not original)
    model.eval()
    return fitted


# --- Evaluation ---------------------------------------------------------------------------------


def forecast_errors(fitted, values, start, stop, origins):
    """Forecasts minus truth for rows start to stop: {"one step": [rows], "free run": [origins,
    rows]} with column j of an origin for the value j after it, NaN from `stop` on."""
    firsts = np.linspace(start, stop, origins, endpoint=False).astype(int)
    padded = np.append(values[:stop], np.full(stop - start, np.nan))
    truth = padded[firsts[:, None] + np.arange(stop - start)]
    one_step = fitted.one_step(values, start, stop)
    free_run = fitted.free_run(values, firsts, stop - start)
    # A model that has diverged to NaN has an infinite error.
    return {"one step": np.where(np.isnan(one_step), np.inf, one_step) - values[start:stop],
            "free run": np.where(np.isnan(free_run), np.inf, free_run) - truth}


def holdout_parts(rows):
    """The parts of the hold-out as (start, stop, origins): validation of each fold, then test."""
    horizon = int(VALIDATION_SHARE * rows)
    starts = [int(share * rows) for share in FOLDS]
    validation = [(start, start + horizon, ORIGINS) for start in starts]
    return [*validation, (int(TEST_START * rows), rows, 1)]


def holdout_errors(run, args, models, values):
    """Fit a run to the rows before each part of the hold-out. Returns ([forecast_errors of each
    part], [(run, Fitted) of the test part], history of the last fold)."""
    if run.model == "combined":
        return combined_errors(run, args, models, values)
    parts, history = [], []
    for start, stop, origins in holdout_parts(len(values)):
        fitted = fit(run, args, models, values, start, min(stop, int(TEST_START * len(values))))
        parts.append(forecast_errors(fitted, values, start, stop, origins))
        history.append(fitted.history)
    return parts, [(run, fitted)], history[-2]


def combined_members(run, models):
    """The runs of which `combined` takes the first, vq_ar, and the best of the others."""
    quarter = max(2, run.time_steps // 4)
    members = [replace(run, model=model) for model in ["vq_ar", *models["baselines"]]]
    return members + [replace(run, model=model, time_steps=quarter)
                      for model in ("vq_ar", "ridge", "nlinear")]


def combined_errors(run, args, models, values):
    """Ours, `combined`: the mean of vq_ar and the forecaster with the least validation error,
    chosen for one step and for the free run separately. Returns what holdout_errors does."""
    network, *others = [holdout_errors(member, args, models, values)
                        for member in combined_members(run, models)]
    best = {}
    for kind in KINDS:
        scores = [validation_score(parts, kind) for parts, _, _ in others]
        best[kind] = others[np.argmin(scores)]
    parts = [{kind: (network[0][i][kind] + best[kind][0][i][kind]) / 2 for kind in KINDS}
             for i in range(len(FOLDS) + 1)]
    return parts, network[1] + best["free run"][1], []


def validation_score(parts, kind):
    """The geometric mean of the squared errors on validation: of the free run from each origin,
    or of one step in the block from it to the next, so that no block dominates."""
    errors = []
    for part in parts[: len(FOLDS)]:
        blocks = part[kind] if kind == "free run" else np.array_split(part[kind], ORIGINS)
        errors += [np.nanmean(block**2) for block in blocks]
    return np.exp(np.mean(np.log(np.maximum(errors, 1e-300))))


def interval_widths(parts):
    """Half widths of split-conformal intervals (Vovk et al. 2005) from the validation parts:
    [1] for one step, and [horizon] for the free run, pooled over similar horizons."""
    free_run = np.abs(np.concatenate([part["free run"] for part in parts[: len(FOLDS)]]))
    edges = np.unique(np.geomspace(1, free_run.shape[1] + 1, 9).astype(int)) - 1
    widths = [np.full(stop - start, conformal_quantile(free_run[:, start:stop]))
              for start, stop in itertools.pairwise(edges)]
    one_step = np.abs(np.concatenate([part["one step"] for part in parts[: len(FOLDS)]]))
    return {"one step": np.array([conformal_quantile(one_step)]),
            "free run": np.maximum.accumulate(np.concatenate(widths))}


def conformal_quantile(residuals):
    """The quantile of residuals that covers a new one with probability COVERAGE."""
    residuals = residuals[~np.isnan(residuals)]
    share = min(1, math.ceil((residuals.size + 1) * COVERAGE) / residuals.size)
    return np.quantile(residuals, share, method="higher")


def extend(widths, count):
    """Half widths [count]: beyond the validated horizon the last one."""
    return widths[np.minimum(np.arange(count), len(widths) - 1)]


def score_original(run, args, models, values):
    """The original's protocol, over the whole series: (scores, result of the run)."""
    fitted = fit(run, args, models, values, len(values), original=True)
    errors = forecast_errors(fitted, values, run.time_steps, len(values), 1)
    scores = dict(fitted.history[-1]) if fitted.history else {}
    scores |= {f"original {kind}": np.mean(errors[kind] ** 2) for kind in KINDS}
    return scores, {"errors": errors, "history": fitted.history, "members": [(run, fitted)]}


def score_holdout(run, args, models, values):
    """The hold-out, validation and test: (scores, result of the run)."""
    parts, members, history = holdout_errors(run, args, models, values)
    widths = interval_widths(parts)
    start = int(TEST_START * len(values))
    period = find_period(values[:start])
    seasonal_error = np.abs(values[period:start] - values[: start - period]).mean() or math.nan
    scores = {}
    for kind in KINDS:
        errors = np.abs(parts[-1][kind].ravel())
        scores |= {
            f"validation {kind}": validation_score(parts, kind),
            f"test {kind}": np.mean(errors**2),
            f"MASE {kind}": errors.mean() / seasonal_error,
            f"coverage {kind}": np.mean(errors <= extend(widths[kind], len(errors))),
        }
    return scores, {"errors": parts[-1], "history": history, "members": members,
                    "widths": widths}


def execute(run, args, models, values):
    """Fit and score one run: (run, its checkpoint or {"error"}), so that other runs go on."""
    torch.set_num_threads(1)
    start_time = time.perf_counter()
    scores, results = {}, {}
    try:
        if args.protocol != "holdout" and run.model != "combined":
            original_scores, results["original"] = score_original(run, args, models, values)
            scores |= original_scores
        if args.protocol != "original":
            holdout_scores, results["holdout"] = score_holdout(run, args, models, values)
            scores |= holdout_scores
    except Exception as error:
        return run, {"error": f"{type(error).__name__}: {error}"}
    members = results.get("holdout", results.get("original"))["members"]
    name = getattr(members[0][1].model, "name", run.model)
    parameters = sum(parameter.numel() for _, fitted in members
                     for parameter in fitted.model.parameters())
    row = asdict(run) | {"id": run.id, "name": name, "parameters": parameters}
    row |= {key: float(score) for key, score in scores.items()}
    row |= {"seconds": time.perf_counter() - start_time, "peak_memory_mib": memory_mib("VmHWM")}
    checkpoint = {"row": row, "arguments": plain_arguments(args), "rows": len(values),
                  "digest": digest(values)}
    checkpoint["members"] = [pack(member, fitted) for member, fitted in members]
    for protocol, result in results.items():
        checkpoint[protocol] = {"history": result["history"],
                                "errors": to_tensors(result["errors"]),
                                "widths": to_tensors(result.get("widths", {}))}
    return run, checkpoint


def to_tensors(arrays):
    """{name: tensor [rows]} of arrays, for a checkpoint."""
    return {name: torch.from_numpy(np.ascontiguousarray(array.ravel()))
            for name, array in arrays.items()}


def pack(run, fitted):
    """What restores a fitted model from a checkpoint."""
    return {"run": asdict(run), "weights": fitted.model.state_dict(), "lookback": fitted.lookback,
            "mean": float(fitted.mean), "std": float(fitted.std)}


def unpack(member, args):
    """The Fitted model of a checkpoint."""
    run = Run(**member["run"])
    if run.model in MODELS:
        model = MODELS[run.model](run, args)
        model.load_state_dict(member["weights"])
    elif set(member["weights"]) == {"weights", "bias"}:
        model = LinearForecaster(**member["weights"])
    else:
        raise UserError(f"{run.model} is not in MODELS")
    return Fitted(model.eval(), member["lookback"], member["mean"], member["std"], [])


# --- The sweep ----------------------------------------------------------------------------------


def needed_rows(time_steps, protocol):
    """Rows with which each part of a protocol has a few windows."""
    needed = time_steps + 16 + 8  # a window, the horizon of vq_ar and seven windows more
    return needed if protocol == "original" else math.ceil(needed / FOLDS[0])


def make_runs(args, series):
    """(all runs of the sweep, the longest first; the reasons for which some are left out)."""
    runs, skipped = [], []
    seeds = range(args.seed, args.seed + args.runs)
    for name, one in series.items():
        rows = len(one.values)
        # The longest windows that a short series allows.
        default = min(ORIGINAL_TIME_STEPS, rows // 6, int(FOLDS[0] * rows) - 24)
        for time_steps in args.time_steps or [max(2, default)]:
            needed = needed_rows(time_steps, args.protocol)
            if rows < needed:
                skipped.append(f"{name} has {rows} values; --time-steps {time_steps} needs "
                               f"{needed}, {needed - rows} more")
                continue
            base = Run("mean", name, time_steps, seed=args.seed)
            runs += [replace(base, model=model) for model in BASELINES]
            for model, seed in itertools.product(args.model, seeds):
                run = replace(base, model=model, seed=seed)
                if model == "combined":
                    run = replace(run, learning_rate=COMBINED_RATE)
                    runs += [run] if args.protocol != "original" else []
                    continue
                is_attention = model in ATTENTION
                widths = args.d_model if is_attention else [None]
                encodings = args.pe or [None] if is_attention else [None]
                for rate, width, pe in itertools.product(args.learning_rate, widths, encodings):
                    runs.append(replace(run, learning_rate=rate, d_model=width, pe=pe))
    for run in runs:
        if run.model in MODELS:
            MODELS[run.model](run, args)  # raises UserError for options that do not go together
    # Rough relative times of the models.
    cost = {"combined": 9, "att_mh": 4, "lstm": 3, "vq_mh": 3, "att": 2}
    runs = dict.fromkeys(runs)  # each once
    return sorted(runs, key=lambda run: -cost.get(run.model, 1) * run.time_steps), skipped


def execute_all(runs, args, series):
    """Yield (run, checkpoint) as each run ends, --jobs at a time, each with one thread."""
    from joblib import Parallel, delayed, parallel_config

    # The workers' allocator keeps what is freed; mapping it again took a tenth of the time.
    os.environ |= {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        if args.backend == "dask":
            try:
                import dask
                from distributed import Client, LocalCluster
            except ImportError:
                raise UserError("--backend dask: pip install 'dask[distributed]'") from None
            cluster = None  # the one at DASK_SCHEDULER_ADDRESS
            if not dask.config.get("scheduler-address", None):
                cluster = stack.enter_context(LocalCluster(
                    n_workers=args.jobs, threads_per_worker=1, dashboard_address=None))
            stack.enter_context(Client(cluster))
        stack.enter_context(parallel_config(args.backend, n_jobs=min(args.jobs, len(runs) or 1)))
        models = {"baselines": BASELINES, "networks": MODELS}
        tasks = [delayed(execute)(run, args, models, series[run.dataset].values) for run in runs]
        parallel = Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="all")
        try:
            yield from parallel(tasks)
        except BrokenProcessPool:
            raise UserError("a worker was killed, out of memory? Go on with --resume and fewer "
                            "--jobs") from None


# --- Tables -------------------------------------------------------------------------------------

CONFIG = ["name", *(field.name for field in fields(Run) if field.name != "seed")]


def mean_over_seeds(frame):
    """One row for each combination: the means of its scores over the seeds, and half widths of
    95 % intervals in columns that end in ±."""
    others = [*CONFIG, "id", "seed", "parameters", "peak_memory_mib"]
    scores = frame.columns.difference(others, sort=False)
    merged = []
    for config, group in frame.groupby(CONFIG, dropna=False, sort=False):
        means, widths = mean_and_interval(group[scores])
        merged.append(dict(zip(CONFIG, config)) | {"id": group["id"].iloc[0]}
                      | dict(zip(scores, means))
                      | dict(zip([f"{name} ±" for name in scores], widths)))
    return pd.DataFrame(merged)


def show(row, column, number="{:.6g}"):
    """A score with its interval as text."""
    if not np.isfinite(row.get(column, math.nan)):
        return "diverged" if np.isinf(row.get(column, 0)) else "–"
    text = number.format(row[column])
    if np.isfinite(row[f"{column} ±"]):
        text += f" ± {row[f'{column} ±']:.3g}"
    return text


def original_table(frame, dataset):
    """The ten networks with the least error of the free run, and the baselines, beside the
    original's own figures."""
    frame = frame.dropna(subset="original free run").sort_values("original free run")
    is_baseline = frame["model"].isin(BASELINES)
    frame = frame[is_baseline | (~is_baseline).cumsum().le(10)]
    table = []
    for _, row in frame.iterrows():
        published = ("–", "–")
        if row["name"] in ORIGINAL_NAMES and row["time_steps"] == ORIGINAL_TIME_STEPS:
            key = row["model"], row["learning_rate"]
            published = ORIGINAL_TABLES.get(dataset, {}).get(key, published)
        table.append({
            "model": row["name"], "time steps": row["time_steps"],
            "learning rate": f"{row['learning_rate']:g}".replace("nan", "–"),
            "free run MSE": show(row, "original free run"),
            "one-step MSE": show(row, "original one step"),
            "train loss": show(row, "train_loss", "{:.4g}"),
            "validation loss": show(row, "val_loss", "{:.4g}"),
            "original's free run": published[0], "original's one step": published[1],
        })
    return markdown_table(table)


def best_by(frame, column):
    """{model: its row with the least score}, in the order of the scores."""
    best = frame.dropna(subset=column).sort_values(column).drop_duplicates("model")
    return {row["model"]: row for _, row in best.iterrows()}


def holdout_table(frame):
    """One row for each model: its settings are those with the least validation error, chosen for
    the free run and for one step separately."""
    best = {kind: best_by(frame, f"validation {kind}") for kind in KINDS}
    models = sorted(best["free run"], key=lambda model: best["free run"][model]["test free run"])
    table = []
    for model in models:
        columns = {"model": model}
        for kind in KINDS:
            row = best[kind][model]
            settings = f"{row['time_steps']}"
            if model in MODELS:
                settings += f", {row['learning_rate']:g}"
            for name in ("d_model", "pe"):
                if model in ATTENTION and frame[name].nunique() > 1:
                    settings += f", {row[name]}"
            columns |= {
                f"{kind}: settings": settings,
                f"{kind} MSE": show(row, f"test {kind}"),
                f"{kind} MASE": show(row, f"MASE {kind}", "{:.3f}"),
                f"{kind} in 80 % interval": f"{row[f'coverage {kind}']:.0%}",
            }
        table.append(columns)
    return markdown_table(table)


def summarize(tables, series, failed, skipped, args):
    """All tables as Markdown."""
    text = []
    seeds = f"seed {args.seed}"
    if args.runs > 1:
        seeds = f"mean ± 95 % interval (Student's t) of {args.runs} seeds"
    for name, frame in tables.items():
        one = series[name]
        text.append(f"## {name}: {one.source} data, {len(one.values)} values of {one.column}, "
                    f"{seeds}")
        if args.protocol != "holdout":
            text += ["The original's protocol: networks are trained on 80 % of the windows at "
                     "random, baselines fitted to all, errors over the whole series, so in-sample.",
                     original_table(frame, name)]
        if args.protocol != "original":
            text += ["The hold-out, errors on the last 20 %, which nothing has seen. MASE is the "
                     "absolute error relative to the seasonal naive forecast in training.",
                     holdout_table(frame)]
    text += [f"Left out: {reason}." for reason in skipped]
    text += [f"Failed: {run}: {error}" for run, error in failed.items()]
    return "\n\n".join(text)


# --- Pictures -----------------------------------------------------------------------------------


def escape(text):
    """Names for matplotlib, which would take dollar signs for formulas."""
    return str(text).replace("$", r"\$")


def load_best(frame, args, run_dir):
    """{model: (row, result)} of the best run of each model, with the first seed: by validation of
    the free run, or by its error in the original's protocol where only that was run."""
    protocol = main_protocol(args)
    best = {}
    for model, row in best_by(frame, RANKED_BY[protocol]).items():
        file = run_dir / "runs" / f"{row['id']}.pt"
        best[model] = row, load_checkpoint(file, file)[protocol]
    return best


def main_protocol(args):
    """The protocol that the pictures show."""
    return "original" if args.protocol == "original" else "holdout"


def title_of(series, args):
    """The beginning of a picture's title."""
    return f"{escape(series.name)}, {PROTOCOLS[main_protocol(args)]}: "


def new_grid(title, count, width, height):
    """(figure, axes) of `count` panels, three in a row of so many inches."""
    rows = math.ceil(count / 3)
    fig, axes = new_figure(title, rows, 3, (width, height * rows + 0.8))
    for ax in axes[count:]:
        ax.set_axis_off()
    return fig, axes[:count]


def plot_forecasts(series, best, args, path):
    """One step, free run and 80 % intervals of the best run of each model."""
    models = [model for model in [*MODELS, "combined", *BASELINES] if model in best]
    title = title_of(series, args) + "forecasts of the best runs"
    fig, axes = new_grid(title, len(models), 16, 1.9)
    for ax, model in zip(axes, models):
        row, result = best[model]
        errors = {kind: result["errors"][kind].numpy() for kind in KINDS}
        start = len(series.values) - len(errors["free run"])
        shown = slice(max(0, start - len(errors["free run"])), None)
        times, truth = series.times[start:], series.values[start:]
        free_run = truth + errors["free run"]
        ax.plot(series.times[shown], series.values[shown], color="0.7", linewidth=1, label="series")
        ax.plot(times, truth + errors["one step"], color=COLORS[0], linewidth=0.9, label="one step")
        ax.plot(times, free_run, "--", color=COLORS[3], linewidth=1.5, label="free run")
        if result["widths"]:
            plot_interval(ax, times, free_run, extend(result["widths"]["free run"], len(times)))
        low, high = series.values[shown].min(), series.values[shown].max()
        ax.set_ylim(low - 0.3 * (high - low), high + 0.3 * (high - low))
        rate = f", rate {row['learning_rate']:g}" if model in MODELS else ""
        ax.set_title(f"{model}, {row['time_steps']} steps{rate}", fontsize=9)
        ax.set_xlabel(escape(series.time_label), fontsize=9)
    fig.supylabel(escape(series.column), fontsize=10)
    legend_below(axes[0])
    save_figure(fig, path)


def plot_interval(ax, times, forecast, width):
    """An 80 % interval around a forecast."""
    with np.errstate(invalid="ignore"):  # of a forecast that has diverged
        low, high = forecast - np.asarray(width), forecast + np.asarray(width)
    ax.fill_between(times, low, high, color=COLORS[3], alpha=0.15, linewidth=0,
                    label="80 % interval")


def plot_learning_curves(series, best, args, path):
    """Training and validation loss of the best run of each network."""
    histories = {model: pd.DataFrame(result["history"]) for model, (_, result) in best.items()
                 if result["history"]}
    if not histories:
        return
    title = title_of(series, args) + "learning curves"
    fig, axes = new_grid(title, len(histories), 12, 3)
    for ax, (model, history) in zip(axes, histories.items()):
        ends = np.arange(1, len(history) + 1)
        plot_curve(ax, ends - 0.5, history["train_loss"], "training, mean of an epoch", 0)
        plot_curve(ax, ends, history["val_loss"], "validation, after an epoch", 1)
        ax.set(title=f"{model}, rate {best[model][0]['learning_rate']:g}", yscale="log",
               ylabel="Huber loss" if model == "vq_ar" else "MSE (normalized)")
        epoch_axis(ax)
    legend_below(axes[0])
    save_figure(fig, path)


def plot_sweep(series, frame, args, path):
    """Heatmaps of the free run's error over learning rates and time steps: the mean over seeds,
    the least over the other settings."""
    column = RANKED_BY[main_protocol(args)]
    frame = frame[frame["model"].isin(list(MODELS)) & np.isfinite(frame[column])]
    if frame.empty:
        return
    tables = {model: group.pivot_table(column, "learning_rate", "time_steps", "min")
              for model, group in frame.groupby("model", sort=False)}
    low, high = np.log(frame[column].min()), np.log(frame[column].max()) + 1e-9
    width = max(8, len(tables) * (1.2 + 0.75 * frame["time_steps"].nunique()))
    title = f"{title_of(series, args)}{column}, error [({escape(series.column)})²], dark is low"
    height = 2.2 + 0.5 * frame["learning_rate"].nunique()
    fig, axes = new_figure(title, 1, len(tables), (width, height))
    for ax, (model, table) in zip(axes, tables.items()):
        shades = (np.log(table.to_numpy()) - low) / (high - low)
        ax.imshow(shades, cmap="gray", vmin=-0.2, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(table.to_numpy()):
            number = "{:,.0f}" if value >= 1000 else "{:.4g}"
            ax.text(j, i, number.format(value), ha="center", va="center", fontsize=8,
                    color="white" if shades[i, j] < 0.4 else "black")
        ax.set_xticks(range(table.shape[1]), table.columns)
        ax.set_yticks(range(table.shape[0]), [f"{rate:g}" for rate in table.index])
        ax.set(title=model, xlabel="time steps")
        ax.grid(visible=False)
    axes[0].set_ylabel("learning rate")
    save_figure(fig, path)


def plot_horizon(series, best, args, path):
    """Root mean square error of the first h values of the free run, for the best runs."""
    fig, (ax,) = new_figure(title_of(series, args) + "error of the free run", size=(10, 5))
    for i, (model, (_, result)) in enumerate(best.items()):
        squares = result["errors"]["free run"].numpy() ** 2
        steps = np.arange(1, len(squares) + 1)
        ax.plot(steps, np.sqrt(np.cumsum(squares) / steps), LINES[(i + i // 8) % 4],
                color=COLORS[i % 8], label=model, marker=MARKERS[i % 7], markersize=5,
                markevery=(i, max(1, len(steps) // 8)))
    ax.set(ylabel=f"RMSE up to the horizon [{escape(series.column)}]", yscale="log")
    epoch_axis(ax, "horizon [values]")
    legend_below(ax)
    save_figure(fig, path)


# --- The experiment -----------------------------------------------------------------------------


def run_experiment(args):
    """Run all combinations that are not done yet, then write tables and pictures."""
    series = load_series(args)
    runs, skipped = make_runs(args, series)
    for reason in skipped:
        note(f"left out: {reason}")
    if not runs:
        raise UserError("; ".join(skipped))
    run_dir = next_run_dir(args)
    (run_dir / "runs").mkdir(exist_ok=True)
    files = {run: run_dir / "runs" / f"{run.id}.pt" for run in runs}
    digests = {name: digest(one.values) for name, one in series.items()}
    rows, failed = [], {}
    for run, file in files.items():
        if file.exists():
            checkpoint = load_checkpoint(file, file)
            if checkpoint["digest"] != digests[run.dataset]:
                raise UserError(f"{file}: made with other data; start a new sweep")
            rows.append(checkpoint["row"])
    todo = [run for run in files if not files[run].exists()]
    if args.resume:
        log(f"{len(rows)} runs are done, {len(todo)} to go")
    for run, checkpoint in progress(execute_all(todo, args, series), "runs", len(todo)):
        if "error" in checkpoint:
            failed[run.id] = checkpoint["error"]
            log(f"{run.id} failed: {checkpoint['error']}")
            continue
        with atomic_write(files[run]) as path:
            torch.save(checkpoint, path)
        rows.append(checkpoint["row"])
    if failed and all(row["model"] in BASELINES for row in rows):
        raise UserError(f"every network failed; the first: {next(iter(failed.values()))}")
    rows = sorted(rows, key=lambda row: row["id"])
    tables = {name: mean_over_seeds(group) for name, group in pd.DataFrame(rows).groupby("dataset")}
    for name, table in tables.items():
        best = load_best(table, args, run_dir)
        plot_forecasts(series[name], best, args, run_dir / f"forecasts_{name}.png")
        plot_learning_curves(series[name], best, args, run_dir / f"learning_curves_{name}.png")
        plot_sweep(series[name], table, args, run_dir / f"sweep_{name}.png")
        plot_horizon(series[name], best, args, run_dir / f"horizon_{name}.png")
    data = {name: {"source": one.source, "rows": len(one.values), "column": one.column,
                   "sha256 of values": digests[name]} for name, one in series.items()}
    results = {"data": data, "rows": rows, "failed": failed, "left out": skipped}
    summary = summarize(tables, series, failed, skipped, args)
    return write_results(results, summary, args, run_dir)


def run(args):
    """Do what the arguments ask for."""
    return predict_steps(args) if args.checkpoint else run_experiment(args)


# --- Extra: forecast after the end of a series --------------------------------------------------


def predict_steps(args):
    """Forecast --predict-steps values after the end of the series of a checkpoint, which may have
    grown since, with --data for a file that has moved: forecast.csv with 80 % intervals, and
    forecast.png. The weights are those of the hold-out, fitted on the first 80 %."""
    checkpoint = load_checkpoint(args.checkpoint, args.checkpoint)
    if not isinstance(checkpoint, dict) or "members" not in checkpoint:
        raise UserError(f"{args.checkpoint}: not a file in runs/ of a sweep")
    arguments = argparse.Namespace(**vars(parse_args([])) | checkpoint["arguments"])
    arguments.data_dir = args.data_dir
    arguments.data = args.data or arguments.data
    arguments.fill = args.fill or arguments.fill
    row = checkpoint["row"]
    if not arguments.data:
        arguments.dataset = [row["dataset"]]
    (series,) = load_series(arguments).values()
    known = checkpoint["rows"]
    if digest(series.values[:known]) != checkpoint["digest"]:
        raise UserError(f"{args.checkpoint}: the first {known} values of {series.name} are not "
                        "those it was trained with")
    if len(series.values) > known:
        note(f"{series.name} has {len(series.values) - known} new values since the training")
    members = [unpack(member, arguments) for member in checkpoint["members"]]
    end = np.array([len(series.values)])
    paths = [member.free_run(series.values, end, args.predict_steps)[0] for member in members]
    forecast = np.mean(paths, axis=0)
    times = next_times(series.times, args.predict_steps)
    table = pd.DataFrame({series.time_label: times, series.column: forecast})
    if "holdout" in checkpoint:
        width = extend(checkpoint["holdout"]["widths"]["free run"].numpy(), len(forecast))
        table["low"], table["high"] = forecast - width, forecast + width
    run_dir = next_run_dir(args)
    with atomic_write(run_dir / "forecast.csv") as path:
        table.to_csv(path, index=False)
    fig, (ax,) = new_figure(f"{escape(series.name)}: {len(forecast)} values by {row['name']}")
    ax.plot(series.times, series.values, color="0.6", linewidth=1, label="series")
    ax.plot(times, forecast, "--", color=COLORS[3], label="forecast")
    if "low" in table:
        plot_interval(ax, times, forecast, width)
    ax.set(xlabel=escape(series.time_label), ylabel=escape(series.column))
    legend_below(ax)
    save_figure(fig, run_dir / "forecast.png")
    summary = (f"{series.name}: {len(forecast)} values by {row['name']} ({args.checkpoint}), in "
               "forecast.csv and forecast.png.")
    return write_results({"forecast": forecast}, summary, args, run_dir)


def next_times(times, count):
    """The times that follow, at the same step or calendar frequency."""
    if isinstance(times, pd.DatetimeIndex):
        with contextlib.suppress(pd.errors.OutOfBoundsDatetime, OverflowError):
            following = pd.date_range(times[-1], periods=count + 1, freq=times.freq)[1:]
            if following.year.max() < 10000 and len(following) == count:  # NaT is less
                return following
        raise UserError("--predict-steps goes beyond the year 9999")
    return times[-1] + usual_step(times) * np.arange(1, count + 1)


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
