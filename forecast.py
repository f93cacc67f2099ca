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
runs/*.pt (scores, errors and weights of each run) and three pictures of each series.

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
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
import zlib
from dataclasses import asdict, astuple, dataclass, replace
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import signal, stats
from sklearn.linear_model import RidgeCV
from torch import nn
from tqdm.auto import tqdm

from common import (COLORS, detect_device, in_notebook, legend_below,
                    mean_and_interval, new_figure, plot_curve, save_figure)

EXPERIMENT = "forecast"
URL = "https://raw.githubusercontent.com/donglinkang2021/simple-sequence-prediction/master/data/"
FILES = {  # name: (file, sha256)
    "y_w": ("y+w.csv", "2629be5f09063be55d8a8e1762337018e079f92a12ecac0d871b55cafaa49cf5"),
    "4single": ("4single.csv", "bc405f93002e8c447cf55cd073df7f2375113b7dc58ace4e88895e046deff199"),
}
ORIGINAL_TIME_STEPS = 112
ORIGINAL_RATES = [3e-3, 1e-3, 5e-4, 3e-4, 1e-4]
# The original's published errors, all with 112 time steps.
ORIGINAL_TABLES = """
dataset,name,learning_rate,published free run,published one step
y_w,att-64-1-1-512-is_inln-is_qln-is_kln-is_causal-sinpe,5e-4,1123.62,1128.09
y_w,att_mh-64-8-1-1-1-512-is_kln-is_causal-sinpe,5e-4,1127.6,1098.34
y_w,att_mh-64-8-1-1-1-512-is_kln-is_causal-sinpe,3e-3,1277.27,1097.75
y_w,att_mh-64-8-1-1-1-512-is_kln-is_causal-sinpe,1e-3,1407.15,1127.35
y_w,lstm-1-64-2-1,3e-4,1496.39,1098.17
y_w,lstm-1-64-2-1,5e-4,1568.19,1115.62
y_w,att-64-1-1-512-is_inln-is_qln-is_kln-is_causal-sinpe,3e-4,1863.04,1156.63
y_w,att_mh-64-8-1-1-1-512-is_kln-is_causal-sinpe,1e-4,1954.19,1211.73
y_w,att-64-1-1-512-is_inln-is_qln-is_kln-is_causal-sinpe,1e-3,1998.94,1123.66
y_w,lstm-1-64-2-1,1e-3,2384.63,1126.47
4single,vq-64-64-1-1-512-is_causal-randpe,1e-4,20751.3,2722.98
4single,vq_mh-64-64-8-4-1-1-512-is_inln-is_n_pe-rope,5e-4,24268.4,2113.12
4single,vq_mh-64-64-8-4-1-1-512-is_inln-is_n_pe-rope,1e-3,24649.5,1977.2
4single,vq_mh-64-64-8-4-1-1-512-is_inln-is_n_pe-rope,3e-3,25301.4,1942.9
4single,vq-64-64-1-1-512-is_causal-randpe,3e-4,27897.9,2010.93
4single,att_mh-64-8-1-1-1-512-is_kln-is_causal-sinpe,3e-4,28387.1,1309.87
4single,vq-64-64-1-1-512-is_causal-randpe,3e-3,29481.0,1991.11
4single,vq-64-64-1-1-512-is_causal-randpe,5e-4,29551.5,2008.6
4single,vq-64-64-1-1-512-is_causal-randpe,1e-3,29758.8,2009.97
4single,lstm-1-64-2-1,5e-4,31854.4,1360.52
"""
# The original's attention models: (name with width {0}, heads {1} and {2}, and codebook rows {3};
# query heads, key heads, parts, positional encoding).
ATTENTION = {
    "att": ("att-{0}", 1, 1, "inln qln kln causal", "sinpe"),
    "att_mh": ("att_mh-{0}-{1}-{2}", 8, 1, "kln causal", "sinpe"),
    "vq": ("vq-{3}-{0}", 1, 1, "causal", "randpe"),
    "vq_mh": ("vq_mh-{3}-{0}-{1}-{2}", 8, 4, "inln norm_pe", "rope"),
}
ATTENTION_PARTS = {
    "inln": "LayerNorm on the input",
    "qln": "LayerNorm on queries",
    "kln": "LayerNorm on keys",
    "causal": "causal mask",
    "norm_pe": "positions on queries and keys instead of the input",
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
MAX_PERIOD = 500
RIDGE_STRENGTHS = 10.0 ** np.arange(-4, 5)
# A number in place of the name of a column.
NUMBER = r"\s*[-+]?[.,]?\d[-+\d.,eE]*\s*"
# Names of columns that tell series apart.
SERIES_COLUMN = (
    r"(?i)^((.*[ _])?(id|name|nbr|series|item|store|sensor|device|station|ticker|symbol|region|"
    r"country|city|location|group|variable)|(unique|series|item|store|sensor|device|meter|lcl)id)$")
# pandas' names of steps of the calendar.
CALENDAR = ["B", "MS", "ME", "BMS", "BME", "3MS", "3ME", "12MS", "12ME"]


def parse_args(argv=None):
    """The command line as a namespace; an error is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        f"{EXPERIMENT}.py", argparse.SUPPRESS, __doc__.split("\n\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="embedded series, one rate: under a minute")
    source = parser.add_mutually_exclusive_group().add_argument
    source("--dataset", nargs="+", choices=[*FILES, "synthetic"], help="known series, downloaded "
           "to --data-dir, or the embedded one; if unset, y_w if it can be downloaded")
    source("--data", type=os.path.abspath, help="CSV file of your own series")
    add("--fill", choices=["linear", "forward"], help="how to fill missing values and rows")
    add("--protocol", choices=["original", "holdout", "both"], default="both", help="original: "
        "random windows, scored over the whole series; holdout: tested on the last 20 %%")
    models = [*MODELS, "combined"]
    add("--model", nargs="*", choices=models, default=models, help="models to run beside the "
        "baselines; combined needs the hold-out; without a value, the baselines only")
    add("--time-steps", nargs="+", type=positive, help="values in a window; if unset, the "
        f"original's {ORIGINAL_TIME_STEPS}, or fewer for a short series")
    add("--learning-rate", nargs="+", type=float, default=ORIGINAL_RATES, help="learning rates")
    add("--d-model", nargs="+", type=positive, default=[64], help="widths of the attention models")
    add("--pe", nargs="+", choices=["none", "randpe", "sinpe", "rope"], default=[None],
        help="positional encodings; if unset, the original's for each model")
    parts = ATTENTION_PARTS | {"align_target": "loss at every step instead of the last one"}
    for name, description in parts.items():
        add(f"--{name.replace('_', '-')}", action=argparse.BooleanOptionalAction,
            help=f"{description}; if unset, the original's choice for each model")
    add("--backend", choices=["loky", "dask"], default="loky", help="joblib's backend: this "
        "machine, or a dask cluster at DASK_SCHEDULER_ADDRESS")
    add("--resume", nargs="?", const="newest", help="unfinished sweep to go on with; without a "
        "value, the newest")
    for flag, default, description in [
        ("--column", "-1", "column of values, or its index; -1 is the last"),
        ("--time-column", None, "column of times, or its index; if unset, rows are equally spaced"),
        ("--series-column", None, "column that names the series of a row, or none"),
        ("--series", None, "series to take, with --series-column"),
        ("--data-dir", "data", "folder of downloads"),
        ("--checkpoint", None, "file in runs/ of a sweep, for --predict-steps"),
        ("--output-dir", "outputs", "folder of all results"),
    ]:
        add(flag, default=default, help=description)
    for flag, default, description in [
        ("--hidden-dim", 64, "width of the LSTM"),
        ("--num-layers", 2, "layers of the LSTM"),
        ("--n-heads", None, "query heads of att_mh and vq_mh; if unset, 8"),
        ("--kv-heads", None, "key heads of att_mh and vq_mh; if unset, 1 and 4"),
        ("--vocab-size", 64, "codebook rows of vq and vq_mh"),
        ("--block-size", 512, "positions of the attention models"),
        ("--epochs", 50, "passes over the windows"),
        ("--batch-size", 64, "windows in a step"),
        ("--runs", 1, "number of seeds; reports mean and interval"),
        ("--jobs", os.cpu_count(), "runs at a time, one thread each"),
        ("--predict-steps", None, "values to forecast after the end of --checkpoint"),
    ]:
        add(flag, type=positive, default=default, help=description)
    add("--seed", type=int, default=42, help="random seed of weights and order; the original's "
        "split has 42")
    add("--device", type=detect_device, default="auto", help="auto, cuda, mps or cpu")
    if "--quick" in (argv or []):
        parser.set_defaults(dataset=["synthetic"], epochs=12, time_steps=[128],
                            learning_rate=[3e-3])
    args = parser.parse_args(argv)
    if (args.predict_steps is None) != (args.checkpoint is None):
        parser.error("--predict-steps and --checkpoint go together")
    if args.seed < 0 or not min(args.learning_rate) > 0:
        parser.error("--seed must not be negative, and --learning-rate must be above 0")
    return args


def positive(text):
    """A whole number from 1 to a million, as an argparse type."""
    number = int(text)
    if not 1 <= number <= 10**6:
        raise argparse.ArgumentTypeError("it must be from 1 to a million")
    return number


# --- Data: pandas Series of values, indexed by their times --------------------------------------


def generate_series(rows=720):
    """The embedded series [rows]: two peaks in each cycle of 120 rows, a slow drift and noise."""
    rng = np.random.default_rng(0)
    t = np.arange(rows)
    phase = t[:, None] % 120 / 120
    heights = rng.uniform(0.85, 1.15, (rows // 120 + 1, 2))[t // 120]  # no two cycles are alike
    peaks = [300, 170] * heights * np.exp(-(((phase - [0.25, 0.60]) / [0.07, 0.12]) ** 2))
    level = 120 + 15 * np.sin(2 * np.pi * t / 1000)
    return level + peaks.sum(1) + 12 * rng.standard_normal(rows)


def read_frame(path):
    """DataFrame of a CSV file, indexed by the lines of the file, whatever its encoding, delimiter
    and decimal point."""
    content = Path(path).read_bytes()
    if content.startswith(b"\x1f\x8b"):
        content = gzip.decompress(content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        is_utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = content.decode("utf-16" if is_utf16 else "latin-1")
    text = text.rstrip()
    header = re.split("[\r\n]", text)[0]
    delimiter = next((mark for mark in ";\t|," if mark in header), "\t")
    decimal = "," if delimiter != "," and re.search(r"\d,\d", text) else "."
    with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
        frame = pd.read_csv(io.StringIO(text), sep=delimiter, decimal=decimal, index_col=False,
                            skip_blank_lines=False)
    numbers = [name for name in frame if re.fullmatch(NUMBER, name)]
    if "\0" in text or numbers:
        raise ValueError("not a CSV file whose first line names the columns")
    frame.index = pd.RangeIndex(2, len(frame) + 2, name="line")
    return frame


def find_column(frame, name):
    """The name of a column of a frame that is called `name` or has this index."""
    if f"{name}.1" in frame:  # as pandas calls the second one of the same name
        raise ValueError(f"two columns are called {name!r}; choose one by its index")
    if name in frame:
        return name
    try:
        return frame.columns[int(name)]
    except (TypeError, ValueError, IndexError):
        raise ValueError(f"no column {name!r}, only {', '.join(frame)}") from None


def select_series(frame, args):
    """The rows of --series. Raises ValueError where a column seems to name several series."""
    if args.series_column == "none":
        return frame
    if args.series_column or args.series:
        names = frame[find_column(frame, args.series_column)].astype(str)
        if args.series not in set(names):
            raise ValueError(f"no series {args.series!r}, only {', '.join(names.unique()[:10])}")
        return frame[names == args.series]
    for name, count in frame.filter(regex=SERIES_COLUMN).nunique().items():
        if 2 <= count <= len(frame) / 2:
            raise ValueError(f"column {name!r} seems to name several series; choose one with "
                             "--series-column and --series, or all rows with --series-column none")
    return frame


def read_times(column):
    """The times of a column as numbers, or as dates with their time zone: of all ways to read
    them, such as day or month first, the one with the fewest invalid and missing times."""
    texts = column.astype(str)
    if texts.str.match(r"\s*T?\d{1,2}:\d\d").any():
        raise ValueError("times of day need a date; add one, or leave out --time-column")
    offsets = texts.str.extract(r":\d\d(Z|[+-]\d\d:?\d\d)$", expand=False)
    options = {"errors": "coerce", "utc": offsets.nunique() > 1}  # two as summer time begins
    readings = [pd.to_datetime(texts, format="%Y%m%d", **options),
                pd.to_datetime(texts, format="%Y%m", **options)]
    if column.dtype.kind in "iuf":
        readings.append(column)
    else:
        for day_first in (False, True):
            readings.append(pd.to_datetime(texts, format="mixed", dayfirst=day_first, **options))
    return min(readings, key=lambda times: (times.isna().sum(), span_in_steps(times)))


def span_in_steps(times):
    """The time from the first to the last of times in any order, in median steps."""
    steps = times.drop_duplicates().sort_values().diff()
    return steps.sum() / steps.median()


def index_by_time(frame, time_column):
    """The frame by increasing times, with rows of NaN where times are missing between equal steps,
    which are a number or a step of the calendar."""
    times = read_times(frame[time_column])
    is_bad = times.isna() | times.duplicated()
    if is_bad.any():
        raise ValueError(f"line {is_bad.idxmax()}: the time is invalid or occurs twice; "
                         "--series-column and --series choose one of several series")
    if not span_in_steps(times) <= 10 * len(times):
        raise ValueError("too few rows, or most times are missing; is one of them wrong?")
    frame = frame.set_index(times).sort_index()
    times = frame.index
    steps = times.to_series().diff()
    step = steps.quantile(interpolation="lower")
    tolerance = 0 * step
    if isinstance(times, pd.DatetimeIndex):
        grids = [pd.date_range(times[0], times[-1], freq=freq) for freq in [step, *CALENDAR]]
    else:
        step = steps[(steps / step - 1).abs() < 0.1].mean()
        tolerance = 0.1 * step
        grids = [pd.Index(np.arange(times[0], times[-1] + tolerance, step)).astype(times.dtype)]
    for grid in sorted(grids, key=len):
        places = grid.get_indexer(times, method="nearest", tolerance=tolerance)
        if places.min() >= 0 and grid[places].is_unique:
            return frame.set_index(grid[places]).reindex(grid).rename_axis(time_column)
    raise ValueError("the times are not equally spaced; resample them, or leave out --time-column")


def read_series(args):
    """The Series of --data. Raises UserError for a file that cannot be taken as one series."""
    try:
        frame = select_series(read_frame(args.data), args)
        column = find_column(frame, args.column)
        if args.time_column:
            time_column = find_column(frame, args.time_column)
            if column == time_column:
                raise ValueError(f"{column!r} is the time column; choose another --column")
            frame = index_by_time(frame, time_column)
        values = pd.to_numeric(frame[column]).astype(float).where(np.isfinite)
        if args.fill:
            note(f"missing values, now filled: {values.isna().sum()}")
            values = values.ffill() if args.fill == "forward" else values.interpolate()
        if values.hasnans:
            missing = values.isna()
            raise ValueError(f"missing values: {missing.sum()}, the first at {values.index.name} "
                             f"{missing.idxmax()}; --fill linear or --fill forward fills them, "
                             "but not the first value of all")
        if not 1e-100 < np.ptp(values) < 1e100:
            raise ValueError(f"{column!r} is empty, constant, or too large or small")
        return values
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error,
            pd.errors.ParserWarning) as error:
        raise UserError(f"{args.data}: {error}") from None


def load_known(name, data_dir):
    """The embedded series, or a known one from `data_dir`, downloaded if absent."""
    if name == "synthetic":
        times = pd.Index(np.arange(720) / 30, name="time [h]")
        return pd.Series(generate_series(), times, name="signal")
    file, sha256 = FILES[name]
    path = Path(data_dir, file)
    is_new = not path.exists()
    try:
        content = urlopen(URL + file, timeout=3).read() if is_new else path.read_bytes()
    except (OSError, HTTPException) as error:
        raise UserError(f"{URL}{file}: {error}; put it into --data-dir, or use --dataset "
                        "synthetic") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path}: another sha256 than expected")
    if is_new:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_bytes(content)
    return pd.read_csv(path, index_col=0).squeeze()


def load_series(args):
    """{name: Series} of --data or --dataset; with neither y_w, or the embedded series."""
    if args.data:
        return {Path(args.data).stem: read_series(args)}
    try:
        return {name: load_known(name, args.data_dir) for name in args.dataset or ["y_w"]}
    except UserError as error:
        if args.dataset:
            raise
        note(f"no real data ({error}); the embedded series is used")
        return {"synthetic": load_known("synthetic", args.data_dir)}


def digest(values):
    """sha256 of values [rows] float64."""
    return hashlib.sha256(np.asarray(values).tobytes()).hexdigest()


# --- Models: each reads [batch, time] normalized values -----------------------------------------


class Network(nn.Module):
    """Base of all models. A new one needs __init__(run, args), which takes a Run and the command
    line, forward, and an entry in MODELS; with a longer horizon, a loss of its own, too.

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
        forecasts = self(windows[:, :-1], last_only=not align_target)
        return F.mse_loss(forecasts, windows[:, -forecasts.shape[1] :])

    def predict(self, windows, rows):
        """Forecasts [batch, horizon] after windows [batch, time], whatever their rows are."""
        return self(windows)


# --- Baselines: linear functions of the last values, plus a constant for each phase -------------


class LinearForecaster(Network):
    """x[t] = weights · x[t - lookback : t] + bias[t mod period]."""

    def __init__(self, weights, bias):
        super().__init__()
        self.register_buffer("weights", torch.as_tensor(weights, dtype=torch.float32))  # [lookback]
        self.register_buffer("bias", torch.as_tensor(bias, dtype=torch.float32))  # [period]

    def predict(self, windows, rows):
        phases = rows % len(self.bias)
        return (windows @ self.weights + self.bias[phases]).unsqueeze(1)


def find_period(z):
    """The period of z [rows], or 1 if it has none. Candidates are the high peaks of the
    autocorrelation; it is the shortest with which the seasonal naive forecast of the last quarter
    has an error within 10 % of the least."""
    residuals = signal.detrend(z)
    residuals /= residuals.std() + 1e-9 * np.ptp(z) + 1e-300  # a straight line has no period
    correlation = signal.correlate(residuals, residuals)[len(z) - 1 :]
    correlation /= np.arange(len(z), 0, -1)
    longest = min(MAX_PERIOD, len(z) // 3)
    peaks, found = signal.find_peaks(correlation[:longest], height=0.2)
    heights = found["peak_heights"]
    peaks = peaks[heights > 0.8 * heights.max(initial=0)]
    if len(peaks) == 0:
        return 1
    start = len(z) * 3 // 4
    errors = [np.mean((z[start:] - z[start - peak : -peak]) ** 2) for peak in peaks]
    return int(peaks[errors <= 1.1 * np.min(errors)][0])


def fit_mean(z, time_steps):
    """The mean of the training part."""
    return [0.0], [z.mean()]


def fit_last(z, time_steps):
    """The last value (persistence)."""
    return [1.0], [0.0]


def fit_seasonal(z, time_steps):
    """The value one period ago."""
    return np.eye(find_period(z))[0], [0.0]


def regress(windows, time_steps):
    """(weights [time_steps, horizon], intercepts [horizon]) of ridge regression of the later
    columns of windows on the first ones; its strength by generalized cross-validation."""
    model = RidgeCV(RIDGE_STRENGTHS).fit(windows[:, :time_steps], windows[:, time_steps:])
    return model.coef_.reshape(-1, time_steps).T, np.atleast_1d(model.intercept_)


def regress_differences(windows, time_steps):
    """The same relative to the last of the first columns."""
    return regress(windows - windows[:, time_steps - 1 : time_steps], time_steps)


def fit_ridge(z, time_steps):
    """Ridge regression on the last values."""
    windows = np.lib.stride_tricks.sliding_window_view(z, time_steps + 1)
    weights, bias = regress(windows, time_steps)
    return weights[:, 0], bias


def fit_nlinear(z, time_steps):
    """Ridge regression on differences from the last value (NLinear, Zeng et al. 2023)."""
    windows = np.lib.stride_tricks.sliding_window_view(z, time_steps + 1)
    weights, bias = regress_differences(windows, time_steps)
    weights[-1] = 1 - weights[:-1].sum()
    return weights[:, 0], bias


def fit_theta(z, time_steps):
    """The Theta method (Assimakopoulos and Nikolopoulos 2000): exponential smoothing of the
    deseasonalized series, with half the slope of its trend as drift (Hyndman and Billah 2003)."""
    period = find_period(z)
    rows = np.arange(len(z))
    slope, level = np.polyfit(rows, z, 1)
    detrended = pd.Series(z - level - slope * rows)
    season = detrended.groupby(rows % period).mean().to_numpy()
    drift = slope / 2
    remainder = pd.Series(z - season[rows % period] - drift * rows)

    def smoothing_error(strength):
        return ((remainder.ewm(alpha=strength).mean().shift() - remainder) ** 2).mean()

    strength = min(np.linspace(0.05, 1, 20), key=smoothing_error)
    ages = np.arange(1, min(len(z), 300) + 1)  # 1 for the last value
    weights = strength * (1 - strength) ** (ages - 1)
    weights /= weights.sum()
    phases = np.arange(period)
    past_season = season[(phases[:, None] - ages) % period] @ weights
    return weights[::-1].copy(), season - past_season + drift * (ages @ weights)


BASELINES = {"mean": fit_mean, "last": fit_last, "seasonal": fit_seasonal, "ridge": fit_ridge,
             "nlinear": fit_nlinear, "theta": fit_theta}


# --- Networks -----------------------------------------------------------------------------------


def initialize(model, joint=()):
    """The original's Xavier weights and zero biases. Layers named in `joint` share one matrix in
    the original, which has a smaller bound."""
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
        elif name.startswith(("fc_", "lstm")):
            nn.init.xavier_uniform_(parameter, gain=0.5**0.5 if name.startswith(joint) else 1.0)


class LSTM(Network):
    """The original's LSTM; 50,497 parameters at its defaults."""

    align_target = False

    def __init__(self, run, args):
        super().__init__()
        self.name = f"lstm-1-{args.hidden_dim}-{args.num_layers}-1"
        self.lstm = nn.LSTM(1, args.hidden_dim, args.num_layers, batch_first=True)
        self.fc_out = nn.Linear(args.hidden_dim, 1)
        initialize(self)

    def forward(self, x, last_only=True):
        hidden, _ = self.lstm(x.unsqueeze(-1))  # [batch, time, hidden_dim]
        return self.fc_out(hidden[:, -1:] if last_only else hidden).squeeze(-1)


class Positions(nn.Module):
    """Puts positions into [..., time, width]: `randpe` adds learned rows, `sinpe` waves (Vaswani
    et al. 2017), and `rope` rotates pairs, one half of the width with the other (Su et al. 2021).
    """

    def __init__(self, kind, width, block_size):
        super().__init__()
        self.kind = kind
        frequencies = 10000 ** (-torch.arange(0, width, 2) / width)
        angles = torch.arange(block_size).unsqueeze(1) * frequencies
        waves = torch.stack([angles.sin(), angles.cos()], -1)  # [block_size, width / 2, 2]
        self.register_buffer("waves", waves, persistent=False)
        if kind == "randpe":
            self.table = nn.Parameter(torch.randn(block_size, width))

    def forward(self, x, first=0):
        rows = slice(first, first + x.shape[-2])
        if self.kind == "none":
            return x
        if self.kind == "randpe":
            return x + self.table[rows]
        if self.kind == "sinpe":
            return x + self.waves[rows].flatten(1)
        sin, cos = self.waves[rows].unbind(-1)
        left, right = x.chunk(2, -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class Attention(Network):
    """The original's four attention models: one layer, without residual and MLP.

    `att` and `att_mh` attend over the window. In `vq` and `vq_mh` a learned codebook takes the
    place of keys and values, and the embedded input is the query. With --norm-pe the positions
    are put on queries and keys after their norms, so that rope stays relative (the original had
    the other order).
    """

    def __init__(self, run, args):
        super().__init__()
        name, heads, kv_heads, parts, pe = ATTENTION[run.model]
        pe = run.pe or pe
        if run.model.endswith("_mh"):
            heads, kv_heads = args.n_heads or heads, args.kv_heads or kv_heads
        if run.d_model % heads or heads % kv_heads:
            raise UserError("--kv-heads must divide --n-heads, and that --d-model")
        self.parts = []
        for part in ATTENTION_PARTS:
            choice = getattr(args, part)
            if choice or (choice is None and part in parts):
                self.parts.append(part)
        self.has_codebook = run.model.startswith("vq")
        if not (self.has_codebook or "causal" in self.parts or args.align_target is False):
            raise UserError(f"{run.model} would see its targets; add --no-align-target or --causal")
        block_size = max(args.block_size, run.time_steps)
        name = name.format(run.d_model, heads, kv_heads, args.vocab_size)
        part_names = "".join(f"-is_{part}" for part in self.parts).replace("norm", "n")
        self.name = f"{name}-1-1-{block_size}{part_names}-{pe}".removesuffix("-none")
        self.width = run.d_model // heads
        self.fc_in = nn.Linear(1, run.d_model)
        places = [pe, "none"]
        if "norm_pe" in self.parts:
            places.reverse()
        self.position_in = Positions(places[0], run.d_model, block_size)
        self.position_qk = Positions(places[1], self.width, block_size)
        self.ln_in = self.norm("inln", run.d_model)
        self.ln_q = self.norm("qln", self.width)
        self.ln_k = self.norm("kln", self.width)
        self.fc_q = nn.Identity()
        if self.has_codebook:
            self.codebook = nn.Parameter(torch.randn(kv_heads, args.vocab_size, self.width))
        else:
            self.fc_q = nn.Linear(run.d_model, run.d_model, bias=False)
            self.fc_k = nn.Linear(run.d_model, kv_heads * self.width, bias=False)
            self.fc_v = nn.Linear(run.d_model, kv_heads * self.width, bias=False)
        self.fc_out = nn.Linear(run.d_model, 1, bias=self.has_codebook)
        initialize(self, ("fc_q", "fc_k", "fc_v") if run.model == "att" else ())

    def norm(self, part, width):
        return nn.LayerNorm(width) if part in self.parts else nn.Identity()

    def split_heads(self, x):
        """[batch, time, heads · width] -> [batch, heads, time, width]."""
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)

    def forward(self, x, last_only=True):
        first = x.shape[1] - 1 if last_only else 0  # the first query
        hidden = self.position_in(self.fc_in(x.unsqueeze(-1)))  # [batch, time, d_model]
        hidden = self.ln_in(hidden)
        q = self.ln_q(self.split_heads(self.fc_q(hidden[:, first:])))
        q = self.position_qk(q, first)
        if self.has_codebook:
            v = self.codebook.expand(len(x), -1, -1, -1)
            k = self.ln_k(v)
        else:
            v = self.split_heads(self.fc_v(hidden))
            k = self.position_qk(self.ln_k(self.split_heads(self.fc_k(hidden))))
        # The query heads that share a key head become more queries of it (grouped queries).
        groups = q.unflatten(1, (k.shape[1], -1))  # [batch, key heads, group, time, width]
        mask = None
        if "causal" in self.parts:
            mask = x.new_ones(q.shape[2], k.shape[2]).bool().tril(first)
            mask = mask.repeat(groups.shape[2], 1)
        out = F.scaled_dot_product_attention(groups.flatten(2, 3), k, v, mask)
        out = out.unflatten(2, groups.shape[2:4]).flatten(1, 2)  # [batch, heads, time, width]
        return self.fc_out(out.transpose(1, 2).flatten(2)).squeeze(-1)


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
        self.time_steps = run.time_steps
        self.horizon = min(16, run.time_steps)
        ages = torch.arange(run.time_steps, 0, -1)  # 1 for the last value
        pool = F.one_hot(ages.double().log2().ceil().long()).float()
        self.register_buffer("pool", pool / pool.sum(0), persistent=False)  # [time, lags]
        lags = pool.shape[1]
        self.register_buffer("ridge", torch.zeros(run.time_steps, self.horizon))
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
        windows = windows.double().cpu().numpy()
        weights, intercepts = regress_differences(windows, self.time_steps)
        self.ridge.copy_(torch.from_numpy(weights))
        self.intercept.copy_(torch.from_numpy(intercepts))

    def forward(self, x, last_only=True):
        return self.forecasts(x).mean(0)

    def forecasts(self, x):
        """Forecasts [members, batch, horizon] after x [batch, time]."""
        last = x[:, -1:]
        level = x[:, -4:].mean(1, keepdim=True)
        lags = x @ self.pool - level  # [batch, lags]
        spread = (x - level).square().mean(1, keepdim=True).sqrt() + 0.05
        shape = torch.cat([lags / spread, spread.log()], 1)
        query = F.gelu(shape @ self.fc_in + self.bias) @ self.fc_query  # [members, batch, key_dim]
        weights = (query @ self.keys).softmax(-1)  # [members, batch, vocab_size]
        inputs = torch.cat([lags, level, torch.ones_like(level)], 1)
        mixed = (weights.unsqueeze(-1) * inputs.unsqueeze(1)).flatten(2)
        correction = mixed @ self.values
        return last + (x - last) @ self.ridge + self.intercept + correction

    def loss(self, windows, align_target):
        """Huber loss over the horizon: otherwise a few steep rises would outweigh the rest."""
        forecasts = self.forecasts(windows[:, : self.time_steps])
        targets = windows[:, self.time_steps :].expand_as(forecasts)
        return F.huber_loss(forecasts, targets, delta=0.05)


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

    @property
    def settings(self):
        """What distinguishes the runs of a model, in tables."""
        return ", ".join(str(value) for value in astuple(self)[2:-1] if value is not None)


def warm_up_then_cosine(step, steps):
    """Factor of the learning rate: up over the first 5 % of the steps, then a cosine to 0."""
    warm_up = min((step + 1) / (0.05 * steps), 1)
    return warm_up * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def original_split(count):
    """(training, validation) windows of `count`, 80/20 at random, in the original's order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(42))
    return order.tensor_split([int(0.8 * count)])


def train(model, z, train_starts, val_starts, run, args, shuffle):
    """Train a network on the windows of z [rows] that begin at rows `train_starts`.

    The original went through its random windows in one fixed order (`shuffle` False). Returns
    the history [{train_loss, val_loss}], one entry an epoch.
    """
    windows = z.unfold(0, run.time_steps + model.horizon, 1)  # a view [count, time + horizon]
    align_target = model.align_target if args.align_target is None else args.align_target
    model.start(windows[train_starts])
    optimizer = torch.optim.Adam(model.parameters(), run.learning_rate, fused=True)
    steps = args.epochs * math.ceil(len(train_starts) / args.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_up_then_cosine(step, steps) if model.decay else 1.0)
    history = []
    for _ in range(args.epochs):
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
        model.eval()
        with torch.inference_mode():  # the mean is NaN without validation windows
            val = [model.loss(windows[starts], align_target) for starts in val_starts.split(256)]
        history.append({"train_loss": torch.stack(losses).mean().item(),
                        "val_loss": torch.stack(val).mean().item()})
    return history


@dataclass
class Fitted:
    """The fitted model of a run, with the mean and standard deviation that normalize its series."""

    run: Run
    model: Network
    lookback: int
    mean: float
    std: float
    history: list

    def normalize(self, values):
        return torch.tensor((values - self.mean) / self.std, dtype=torch.float32)

    @torch.inference_mode()
    def free_run(self, values, origins, steps):
        """Forecasts [origins, steps] of the rows from each origin on, which feed their own values
        back; infinite for a model that has diverged to NaN. The first value is also taken for
        those before it."""
        z = self.normalize(values)
        windows = torch.cat([z[:1].expand(self.lookback), z]).unfold(0, self.lookback, 1)
        paths = []
        for rows in torch.as_tensor(origins).split(256):
            window = windows[rows]
            path = []
            for step in range(0, steps, self.model.horizon):
                path.append(self.model.predict(window, rows + step))
                window = torch.cat([window, path[-1]], 1)[:, -self.lookback :]
            paths.append(torch.cat(path, 1)[:, :steps])
        z = torch.cat(paths)
        return z.masked_fill(z.isnan(), math.inf).double().numpy() * self.std + self.mean


def fit(run, args, values, stop, original=False):
    """Fit the model of a run to values[:stop], with losses on the rows from there to the test part
    for the learning curves; with `original` to a random 80 % of the windows, with losses on the
    others."""
    past = values[:stop]
    mean = float(past.mean())
    std = float(past.std()) or 1.0
    if run.model in BASELINES:
        weights, bias = BASELINES[run.model]((past - mean) / std, run.time_steps)
        return Fitted(run, LinearForecaster(weights, bias), len(weights), mean, std, [])
    torch.manual_seed(run.seed)
    model = MODELS[run.model](run, args).to(args.device)
    fitted = Fitted(run, model, run.time_steps, mean, std, [])
    end = stop - run.time_steps  # the first window with no target before `stop`
    count = end - model.horizon + 1  # windows with all targets before it
    test_count = count + int(TEST_START * len(values)) - stop  # the same for the test part
    starts = [torch.arange(count), torch.arange(end, max(end, test_count))]
    if original:
        starts = [part[part < count] for part in original_split(end)]
    train_starts, val_starts = (part.to(args.device) for part in starts)
    z = fitted.normalize(values).to(args.device)
    fitted.history = train(model, z, train_starts, val_starts, run, args, shuffle=not original)
    model.eval().cpu()
    return fitted


# --- Evaluation ---------------------------------------------------------------------------------


def forecast_errors(fitted, values, start, stop, origins):
    """Forecasts minus truth for rows start to stop: {"one step": [rows], "free run": [origins,
    rows]} with column j of an origin for the value j after it, NaN from `stop` on."""
    count = stop - start
    firsts = np.linspace(start, stop, origins, endpoint=False).astype(int)
    padded = np.append(values[:stop], np.full(count, np.nan))
    truth = padded[firsts[:, None] + np.arange(count)]
    one_step = fitted.free_run(values, np.arange(start, stop), 1)[:, 0]
    return {"one step": one_step - values[start:stop],
            "free run": fitted.free_run(values, firsts, count) - truth}


def holdout_parts(rows):
    """The parts of the hold-out as (start, stop, origins): validation of each fold, then test."""
    parts = []
    for share in FOLDS:
        start = int(share * rows)
        parts.append((start, start + int(VALIDATION_SHARE * rows), ORIGINS))
    return [*parts, (int(TEST_START * rows), rows, 1)]


def holdout_errors(run, args, values):
    """Fit a run to the rows before each part of the hold-out. Returns ([forecast_errors of each
    part], [Fitted of the test part, with the history of the last fold])."""
    if run.model == "combined":
        return combined_errors(run, args, values)
    parts, histories = [], []
    for start, stop, origins in holdout_parts(len(values)):
        fitted = fit(run, args, values, start)
        histories.append(fitted.history)
        parts.append(forecast_errors(fitted, values, start, stop, origins))
    fitted.history = histories[-2]
    return parts, [fitted]


def combined_errors(run, args, values):
    """Ours, `combined`: the mean of vq_ar and the forecaster with the least validation error,
    chosen for one step and for the free run separately. Returns what holdout_errors does."""
    members = [replace(run, model=model) for model in ["vq_ar", *BASELINES]]
    for model in ("vq_ar", "ridge", "nlinear"):
        members.append(replace(run, model=model, time_steps=max(2, run.time_steps // 4)))
    (parts, network), *others = [holdout_errors(member, args, values) for member in members]
    means = [{} for _ in parts]
    for kind in ("one step", "free run"):
        scores = [validation_score(other_parts, kind) for other_parts, _ in others]
        best_parts, best = others[np.argmin(scores)]
        for mean, part, best_part in zip(means, parts, best_parts):
            mean[kind] = (part[kind] + best_part[kind]) / 2
    return means, network + best  # which is that of the free run


def validation_score(parts, kind):
    """The geometric mean of the squared errors on validation: of the free run from each origin,
    or of one step in the block from it to the next, so that no block dominates."""
    blocks = [block for part in parts[:-1] for block in np.array_split(part[kind], ORIGINS)]
    return stats.gmean([np.nanmean(block**2) for block in blocks])


def interval_widths(parts):
    """Half widths of split-conformal intervals (Vovk et al. 2005) from the validation parts:
    [1] for one step, and [horizon] for the free run, pooled over similar horizons."""
    one_step = np.concatenate([part["one step"] for part in parts[:-1]])
    free_run = np.concatenate([part["free run"] for part in parts[:-1]])
    edges = np.unique(np.geomspace(1, free_run.shape[1] + 1, 9).astype(int)) - 1
    pools = np.split(free_run, edges[1:-1], axis=1)
    widths = np.repeat([conformal_quantile(pool) for pool in pools], np.diff(edges))
    return {"one step": [conformal_quantile(one_step)],
            "free run": np.maximum.accumulate(widths).tolist()}


def conformal_quantile(residuals):
    """The quantile of absolute residuals that covers a new one with probability COVERAGE."""
    residuals = np.sort(np.abs(residuals[~np.isnan(residuals)]))
    rank = math.ceil((len(residuals) + 1) * COVERAGE)
    return float(residuals[: rank + 1][-1])


def extend(widths, count):
    """Half widths [count]: beyond the validated horizon the last one."""
    return np.pad(widths, (0, count), "edge")[:count]


def holdout_scores(parts, widths, values):
    """Scores on validation, and on the test part, where MASE is relative to the seasonal naive
    forecast in training."""
    past = values[: int(TEST_START * len(values))]
    period = find_period(past)
    scale = np.abs(past[period:] - past[:-period]).mean() or math.nan
    scores = {}
    for kind in KINDS:
        errors = np.abs(parts[-1][kind].ravel())
        scores[f"validation {kind}"] = validation_score(parts, kind)
        scores[f"test {kind}"] = np.mean(errors**2)
        scores[f"MASE {kind}"] = errors.mean() / scale
        scores[f"coverage {kind}"] = np.mean(errors <= extend(widths[kind], len(errors)))
    return scores


def execute(run, args, values, models):
    """Fit and score one run: (run, its checkpoint or {"error"}), so that other runs go on. What
    the checkpoint holds beside the scores is of the hold-out, if that was run. `models` has the
    BASELINES and MODELS of the parent, to which a user may have added."""
    BASELINES.update(models[0])
    MODELS.update(models[1])
    torch.set_num_threads(1)
    start_time = time.perf_counter()
    scores, widths = {}, {}
    try:
        if args.protocol != "holdout" and run.model != "combined":
            members = [fit(run, args, values, len(values), original=True)]
            errors = forecast_errors(members[0], values, run.time_steps, len(values), 1)
            scores = {f"original {kind}": np.mean(errors[kind] ** 2) for kind in KINDS}
            scores.update(*members[0].history[-1:])
        if args.protocol != "original":
            parts, members = holdout_errors(run, args, values)
            errors = parts[-1]
            widths = interval_widths(parts)
            scores |= holdout_scores(parts, widths, values)
    except Exception as error:
        return run, {"error": f"{type(error).__name__}: {error}"}
    row = asdict(run) | {"id": run.id, "settings": run.settings,
                         "name": getattr(members[0].model, "name", run.model),
                         "seconds": time.perf_counter() - start_time}
    row |= {name: float(score) for name, score in scores.items()}
    checkpoint = {"row": row, "widths": widths, "errors": {}, "members": []}
    for kind in KINDS:
        checkpoint["errors"][kind] = errors[kind].ravel().tolist()
    for fitted in members:
        state = {"run": asdict(fitted.run), "model": fitted.model.state_dict()}
        checkpoint["members"].append(vars(fitted) | state)
    return run, checkpoint


# --- The sweep ----------------------------------------------------------------------------------


def make_runs(args, series):
    """All runs of the sweep, the longest first."""
    in_sample = args.protocol == "original"
    runs = {}
    for name, values in series.items():
        rows = len(values)
        longest = min(ORIGINAL_TIME_STEPS, rows // 6, int(FOLDS[0] * rows) - 24)
        for time_steps in args.time_steps or [max(2, longest)]:
            # A window, the horizon of vq_ar and seven windows more, in the shortest training part.
            needed = math.ceil((time_steps + 24) / (1 if in_sample else FOLDS[0]))
            if rows < needed:
                note(f"{name} is left out with --time-steps {time_steps}, which needs {needed} "
                     f"values, {needed - rows} more; take shorter windows")
                continue
            for model in [*BASELINES, *args.model]:
                rates = args.learning_rate
                widths = encodings = [None]
                seeds = range(args.seed, args.seed + args.runs)
                if model in BASELINES:
                    rates = [None]
                    seeds = [args.seed]
                if model in ATTENTION:
                    widths = args.d_model
                    encodings = args.pe
                if model == "combined":
                    rates = [] if in_sample else [COMBINED_RATE]
                for combination in itertools.product(rates, widths, encodings, seeds):
                    run = Run(model, name, time_steps, *combination)
                    runs[run] = None  # each once
                    if model in MODELS:
                        MODELS[model](run, args)  # raises UserError for options that do not fit
    if not runs:
        raise UserError(NOTES[-1])
    # Rough relative times of the models.
    cost = {"combined": 9, "att_mh": 4, "lstm": 3, "vq_mh": 3, "att": 2}
    return sorted(runs, key=lambda run: -cost.get(run.model, 1) * run.time_steps)


def execute_all(runs, args, series):
    """Yield (run, checkpoint) as each run ends, --jobs at a time, each with one thread."""
    from joblib import Parallel, delayed, parallel_config

    # The workers' allocator keeps what is freed; mapping it again took a tenth of the time.
    os.environ |= {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
    client = contextlib.nullcontext()
    if args.backend == "dask":
        from distributed import Client

        local = {"n_workers": args.jobs, "threads_per_worker": 1, "dashboard_address": None}
        client = Client(**({} if os.environ.get("DASK_SCHEDULER_ADDRESS") else local))
    models = [BASELINES, MODELS]
    tasks = [delayed(execute)(run, args, series[run.dataset].to_numpy(), models) for run in runs]
    with client, parallel_config(args.backend, n_jobs=min(args.jobs, len(runs) or 1)):
        yield from Parallel(return_as="generator_unordered", batch_size=1,
                            pre_dispatch="all")(tasks)


# --- Tables -------------------------------------------------------------------------------------


def show(values):
    """The mean of scores [seeds] with its 95 % interval as text; None if there are none."""
    mean, width = mean_and_interval(values)
    if np.isnan(mean):
        return None
    text = f"{mean:.5g}".replace("inf", "diverged")
    return f"{text} ± {width:.3g}" if np.isfinite(width) else text


def over_seeds(rows):
    """(means, texts): two DataFrames with a row for each combination of settings."""
    groups = rows.groupby(["dataset", "model", "name", "settings", "time_steps", "learning_rate"],
                          dropna=False, sort=False)
    scores = list(rows.filter(regex="loss$|free run$|one step$"))
    return groups[scores].mean().reset_index(), groups[scores].agg(show).reset_index()


def original_table(means, texts):
    """The ten networks and baselines with the least error of the free run, beside the original's
    published figures."""
    published = pd.read_csv(io.StringIO(ORIGINAL_TABLES), converters={"learning_rate": float})
    published["time_steps"] = ORIGINAL_TIME_STEPS
    ranked = means.dropna(subset="original free run").sort_values("original free run")
    ranked = ranked.groupby(ranked["model"].isin(BASELINES)).head(10)
    table = texts.loc[ranked.index].merge(published, "left")
    return markdown_table(table.reindex(columns=[
        "name", "settings", "original free run", "original one step", "train_loss", "val_loss",
        "published free run", "published one step"]))


def holdout_table(means, texts):
    """One row for each model: its settings are those with the least validation error, chosen for
    the free run and for one step separately."""
    tables = []
    for kind in KINDS:
        best = means.sort_values(f"validation {kind}").drop_duplicates("model")
        best = best.sort_values(f"test {kind}")
        columns = ["model", "settings", f"test {kind}", f"MASE {kind}", f"coverage {kind}"]
        tables.append(texts.loc[best.index, columns])
    return markdown_table(pd.merge(*tables, on="model", suffixes=[f" {kind}" for kind in KINDS]))


def summarize(name, values, rows, args):
    """The tables of a series as Markdown."""
    means, texts = over_seeds(rows)
    text = [f"## {name}: {len(values)} values of {values.name}"]
    if args.runs > 1:
        text.append(f"Mean ± 95 % interval (Student's t) of {args.runs} seeds.")
    if args.protocol != "holdout":
        text += ["The original's protocol, squared errors: networks are trained on 80 % of the "
                 "windows at random, baselines fitted to all, errors over the whole series, so "
                 "in-sample.", original_table(means, texts)]
    if args.protocol != "original":
        text += ["The hold-out: mean squared errors on the last 20 %, which no model has seen, "
                 "MASE (absolute error relative to the seasonal naive forecast in training) and "
                 "coverage of the 80 % intervals. Settings are time steps, learning rate, d_model "
                 "and encoding.", holdout_table(means, texts)]
    return "\n\n".join(text)


# --- Pictures: of the best run of each model ----------------------------------------------------


def draw_pictures(name, series, rows, checkpoints, args, run_dir):
    """The pictures of a series. The best run of a model is chosen by validation of the free run,
    or by its in-sample error where only the original's protocol was run."""
    column = "original free run" if args.protocol == "original" else "validation free run"
    rows = rows.dropna(subset=column).sort_values(column)
    best = [checkpoints[id] for id in rows.drop_duplicates("model")["id"]]
    title = f"{name}, best runs by {column}: "
    figures = {"forecasts": plot_forecasts(series, best, title),
               "curves": plot_curves(series, best, title)}
    rows = rows[rows["model"].isin(args.model) & np.isfinite(rows[column])]
    if len(rows):
        title = f"{name}: {column}, squared error [({series.name})²]"
        figures["sweep"] = plot_sweep(rows, column, title)
    for kind, fig in figures.items():
        save_figure(fig, run_dir / f"{kind}_{name}.png")


def forecast_table(times, free_run, widths):
    """DataFrame of a free run, with its 80 % interval if there are widths."""
    table = pd.DataFrame({"free run": free_run}, times)
    if widths:
        width = extend(widths["free run"], len(table))
        table["low"] = free_run - width
        table["high"] = free_run + width
    return table


def plot_forecast(ax, series, table, title=""):
    """A series, and the forecasts and the interval in a table."""
    lines = pd.concat([series.rename("series"), table.filter(regex="run|step")], axis=1)
    margin = 0.3 * np.ptp(series) or 1.0
    lines.plot(ax=ax, color=["0.7", COLORS[3], COLORS[0]], style=["-", "--", "-"], legend=False,
               x_compat=True)
    ax.set(xlabel=series.index.name, ylabel=series.name, title=title)
    ax.set_ylim(series.min() - margin, series.max() + margin)
    if "low" in table:
        ax.fill_between(table.index, table["low"], table["high"], color=COLORS[3], alpha=0.15,
                        label="80 % interval")


def plot_forecasts(series, best, title):
    """One step, free run and its 80 % interval of each model."""
    title += "forecasts (time steps, learning rate, width)"
    rows = math.ceil(len(best) / 3)
    fig, axes = new_figure(title, rows, 3, (16, 1.9 * rows + 0.8))
    for ax in axes[len(best) :]:
        ax.set_axis_off()
    for ax, checkpoint in zip(axes, best):
        errors = checkpoint["errors"]
        truth = series.iloc[-len(errors["free run"]) :]
        table = forecast_table(truth.index, truth + errors["free run"], checkpoint["widths"])
        table["one step"] = truth + errors["one step"]
        title = "{model}: {settings}".format(**checkpoint["row"])
        plot_forecast(ax, series.iloc[-2 * len(truth) :], table, title)
    legend_below(axes[0])
    return fig


def plot_curves(series, best, title):
    """Losses of the networks over the epochs, and the error of the free run by its length."""
    title += "losses (vq_ar: Huber, others: squared error) and errors"
    fig, axes = new_figure(title, 1, 3, (16, 5))
    for i, checkpoint in enumerate(best):
        history = pd.DataFrame(checkpoint["members"][0]["history"],
                               columns=["train_loss", "val_loss"])
        squares = pd.Series(checkpoint["errors"]["free run"]) ** 2
        curves = {"training loss, mean of an epoch": history["train_loss"],
                  "validation loss, after an epoch": history["val_loss"],
                  f"RMSE up to the horizon [{series.name}]": squares.expanding().mean() ** 0.5}
        for ax, (label, curve) in zip(axes, curves.items()):
            plot_curve(ax, curve.index + 1, curve, checkpoint["row"]["model"], i)
            ax.set(xlabel="epoch", ylabel=label, yscale="log")
    axes[2].set_xlabel("horizon [values]")
    legend_below(axes[0])
    return fig


def plot_sweep(rows, column, title):
    """Heatmap of errors over models, learning rates and time steps: the least over seeds and the
    other settings."""
    names = rows["model"] + ", " + rows["learning_rate"].astype(str)
    table = rows.pivot_table(column, names, "time_steps", "min")
    fig, (ax,) = new_figure(title, size=(9, 1.5 + 0.3 * len(table)))
    ax.imshow(table, cmap="Blues", norm="log", alpha=0.5, aspect="auto")
    for (i, j), error in np.ndenumerate(table):
        ax.text(j, i, f"{error:.5g}", ha="center", va="center", fontsize=8)
    ax.set_xticks(range(len(table.columns)), table.columns)
    ax.set_yticks(range(len(table)), table.index)
    ax.set(xlabel="time steps", ylabel="model, learning rate")
    ax.grid(visible=False)
    return fig


# --- The experiment -----------------------------------------------------------------------------


def run_experiment(args):
    """Run all combinations that are not done yet, then write tables and pictures."""
    series = load_series(args)
    runs = make_runs(args, series)
    run_dir = next_run_dir(args)
    (run_dir / "runs").mkdir(exist_ok=True)
    data = {name: {"rows": len(values), "column": values.name, "sha256": digest(values)}
            for name, values in series.items()}
    checkpoints, failed, todo = {}, {}, []
    for run in runs:
        file = run_dir / f"runs/{run.id}.pt"
        if not file.exists():
            todo.append(run)
            continue
        checkpoints[run.id] = load_checkpoint(file, file)
        if checkpoints[run.id]["data"] != data[run.dataset]:
            raise UserError(f"{file}: made with other data; start a new sweep")
    for run, checkpoint in progress(execute_all(todo, args, series), "runs", len(todo)):
        if "error" in checkpoint:
            failed[run.id] = checkpoint["error"]
            note(f"{run.id} failed: {checkpoint['error']}")
            continue
        checkpoint |= {"arguments": plain_arguments(args), "data": data[run.dataset]}
        checkpoints[run.id] = checkpoint
        with atomic_write(run_dir / f"runs/{run.id}.pt") as path:
            torch.save(checkpoint, path)
    rows = [checkpoints[run.id]["row"] for run in runs if run.id in checkpoints]
    frame = pd.DataFrame(rows).astype({"learning_rate": float})
    summary = []
    for name, group in frame.groupby("dataset"):
        summary.append(summarize(name, series[name], group, args))
        draw_pictures(name, series[name], group, checkpoints, args, run_dir)
    return write_results({"data": data, "rows": rows, "failed": failed}, "\n\n".join(summary),
                         args, run_dir)


def run(args):
    """Do what the arguments ask for."""
    return predict_steps(args) if args.checkpoint else run_experiment(args)


# --- Extra: forecast after the end of a series --------------------------------------------------


def predict_steps(args):
    """Forecast --predict-steps values after the end of the series of a checkpoint, which may have
    grown since, with --data for a file that has moved: forecast.csv and forecast.png. After the
    hold-out, the weights are those of the first 80 %, and the forecast has 80 % intervals."""
    checkpoint = load_checkpoint(args.checkpoint, args.checkpoint)
    if "members" not in checkpoint:
        raise UserError(f"{args.checkpoint}: not a checkpoint of forecast.py")
    arguments = argparse.Namespace(**checkpoint["arguments"] | changed_arguments(args))
    arguments.dataset = [checkpoint["row"]["dataset"]]
    ((name, series),) = load_series(arguments).items()
    values = series.to_numpy()
    known = checkpoint["data"]["rows"]
    if digest(values[:known]) != checkpoint["data"]["sha256"]:
        raise UserError(f"{args.checkpoint}: {name} does not begin with the values that it was "
                        "trained with")
    members = [unpack(member, checkpoint["arguments"]) for member in checkpoint["members"]]
    paths = [member.free_run(values, [len(values)], args.predict_steps)[0] for member in members]
    forecast = np.mean(paths, axis=0)
    times = next_times(series.index, args.predict_steps)
    table = forecast_table(times, forecast, checkpoint["widths"])
    run_dir = next_run_dir(args)
    file = run_dir / "forecast.csv"
    table.rename(columns={"free run": series.name}).to_csv(file, index_label=series.index.name)
    summary = f"{name}: {args.predict_steps} values by {checkpoint['row']['name']}"
    fig, (ax,) = new_figure(summary)
    plot_forecast(ax, series.iloc[-max(200, 4 * len(table)) :], table)
    legend_below(ax)
    save_figure(fig, run_dir / "forecast.png")
    summary += f", trained with {known} of its {len(values)} values, in forecast.csv and .png"
    if not checkpoint["widths"]:
        note("there are no intervals, which need --protocol holdout or both")
    return write_results({"forecast": forecast}, summary, args, run_dir)


def unpack(member, arguments):
    """The Fitted model of a checkpoint."""
    run = Run(**member["run"])
    if run.model in BASELINES:
        model = LinearForecaster(**member["model"])
    else:
        model = MODELS[run.model](run, argparse.Namespace(**arguments)).eval()
        model.load_state_dict(member["model"])
    return Fitted(**member | {"run": run, "model": model})


def next_times(times, count):
    """The times that follow, at the same step or calendar frequency."""
    if isinstance(times, pd.DatetimeIndex):
        return pd.date_range(times[-1], periods=count + 1, freq=times.freq)[1:]
    step = np.median(np.diff(times))
    return (times[-1] + step * np.arange(1, count + 1)).astype(times.dtype)


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
        return torch.load(file, map_location="cpu", weights_only=True)
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
    print(f"{EXPERIMENT}.py: {text}", file=sys.stderr)  # in every process of torchrun
    if not in_notebook():
        raise SystemExit(code)


if __name__ == "__main__":
    main()
