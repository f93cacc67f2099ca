"""Does attention forecast a series better than an LSTM, and does any network beat ridge?

Windows of --time-steps values predict the next one. Five networks of a public project ("the
original": LSTM, attention, grouped-query attention, attention over a learned codebook with one or
many heads) and six baselines are scored one step ahead and in a free run, which feeds its own
forecasts back. Two models of ours are added: `vq_ar`, and `combined`, the mean of `vq_ar` and the
baseline that is best on validation, or that baseline alone where `vq_ar` is far worse. The original
scores random windows over the whole series, training part included; the hold-out tests on the last
20 %, which are never used for fitting or choosing.

Measured on y_w, squared error of free run and one step: in the original's protocol ridge 1070 and
1055, grouped-query attention 1079 and 1080, LSTM 1261 and 1120; on the hold-out ridge 1219 and
1230, grouped-query attention 1258 and 1234 (one seed), `combined` 1232 ± 3 and 1273 ± 3 (five):
attention beats the LSTM, and nothing beats ridge. On 24 other series `combined` has 1.89 and 1.06
times the error of the best baseline in hindsight, the one chosen on validation 2.10 and 1.15.

    python forecast.py                                        # y_w, all models: about 8 minutes
    python forecast.py --quick                                # embedded series: under a minute
    python forecast.py --dataset 4single --protocol original  # the original's second table
    python forecast.py --data FILE.csv --column NAME --time-column NAME --model combined
    python forecast.py --time-steps 64 128 256 512 --learning-rate 1e-3 --protocol original
    python forecast.py --resume                               # continue the newest unfinished run
    python forecast.py --predict-steps 200 --checkpoint outputs/forecast/run-001/runs/NAME.pt

Results are in outputs/forecast/run-001/, with the next free number: results.json, summary.md,
runs/*.pt (scores, forecasts and weights of each run) and three pictures of each series.

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
import gc
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
ORIGINAL_BLOCK_SIZE = 512  # positions of the attention models
ORIGINAL_RATES = [3e-3, 1e-3, 5e-4, 3e-4, 1e-4]
# The original's published errors.
ORIGINAL_TABLES = """
dataset,name,time_steps,learning_rate,published free run,published one step
y_w,att-64-1-1-512-is_inln-is_qln-is_kln-is_causal-sinpe,112,5e-4,1123.62,1128.09
y_w,att_mh-64-8-1-1-1-512-is_kln-is_causal-sinpe,112,5e-4,1127.6,1098.34
y_w,att_mh-64-8-1-1-1-512-is_kln-is_causal-sinpe,112,3e-3,1277.27,1097.75
y_w,att_mh-64-8-1-1-1-512-is_kln-is_causal-sinpe,112,1e-3,1407.15,1127.35
y_w,lstm-1-64-2-1,112,3e-4,1496.39,1098.17
y_w,lstm-1-64-2-1,112,5e-4,1568.19,1115.62
y_w,att-64-1-1-512-is_inln-is_qln-is_kln-is_causal-sinpe,112,3e-4,1863.04,1156.63
y_w,att_mh-64-8-1-1-1-512-is_kln-is_causal-sinpe,112,1e-4,1954.19,1211.73
y_w,att-64-1-1-512-is_inln-is_qln-is_kln-is_causal-sinpe,112,1e-3,1998.94,1123.66
y_w,lstm-1-64-2-1,112,1e-3,2384.63,1126.47
4single,vq-64-64-1-1-512-is_causal-randpe,112,1e-4,20751.3,2722.98
4single,vq_mh-64-64-8-4-1-1-512-is_inln-is_n_pe-rope,112,5e-4,24268.4,2113.12
4single,vq_mh-64-64-8-4-1-1-512-is_inln-is_n_pe-rope,112,1e-3,24649.5,1977.2
4single,vq_mh-64-64-8-4-1-1-512-is_inln-is_n_pe-rope,112,3e-3,25301.4,1942.9
4single,vq-64-64-1-1-512-is_causal-randpe,112,3e-4,27897.9,2010.93
4single,att_mh-64-8-1-1-1-512-is_kln-is_causal-sinpe,112,3e-4,28387.1,1309.87
4single,vq-64-64-1-1-512-is_causal-randpe,112,3e-3,29481.0,1991.11
4single,vq-64-64-1-1-512-is_causal-randpe,112,5e-4,29551.5,2008.6
4single,vq-64-64-1-1-512-is_causal-randpe,112,1e-3,29758.8,2009.97
4single,lstm-1-64-2-1,112,5e-4,31854.4,1360.52
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
VQ_AR_LIMIT = 2  # times the best validation error, above which vq_ar is left out of `combined`
RANGES = 8  # of the horizon, in each of which the intervals of a free run are equally wide
RECENT = 50  # errors that set the width of an interval one step ahead
KINDS = ["free run", "one step"]
SETTINGS = ["name", "dataset", "time_steps", "learning_rate"]  # of a row of a table
MAX_PERIOD = 500
RIDGE_STRENGTHS = 10.0 ** np.arange(-4, 5)
# A number where the name of a column should be.
NUMBER = r"\s*[-+]?[.,]?\d[-+\d.,eE]*\s*"
# What a column of times is called or begins with.
TIME = r"(?i)date|time|year|month|week|\bds\b|\d{4}-\d\d\b|\b\d\d?[./]\d\d?[./]\d\d"
# Names of columns that tell several series apart.
SERIES_COLUMN = (
    r"(?i)^((.*[ _])?(id|name|nbr|series|item|store|sensor|device|station|ticker|symbol|region|"
    r"country|city|location|group|variable|entity)|geo|country_?code|"
    r"(unique|series|item|store|sensor|device|meter|lcl)id)$")
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
# What cannot stand in numbers whose thousands are separated by the mark M.
NO_THOUSANDS = r"[M](?!\d{3}\D)|(?<!\d)0?[M]|\d{4}[M]|[^-+.,\d ]"
# Dates that look like numbers, in the order in which they are preferred.
NUMERIC_DATES = ["%Y%m%d", "%Y%m", "%Y.%m", "%m.%Y", "%Y%m%d%H", "%Y%m%d%H%M", "%Y%m%d%H%M%S"]


def parse_args(argv):
    """The command line as a namespace; an error is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        f"{EXPERIMENT}.py", argparse.SUPPRESS, __doc__.split("\n\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="embedded series, one rate: under a minute")
    source = parser.add_mutually_exclusive_group().add_argument
    source("--dataset", nargs="+", choices=[*FILES, "synthetic"], help="known series, downloaded "
           "to --data-dir, or the embedded one; if unset, y_w if it can be downloaded")
    source("--data", type=os.path.abspath, help="CSV file with your own series")
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
    add("--resume", nargs="?", const="newest", help="unfinished sweep to continue; without a "
        "value, the newest")
    for flag, default, description in [
        ("--column", "-1", "column of values, or its index; -1 is the last"),
        ("--time-column", None, "column of times, or its index; if unset, rows are equally spaced"),
        ("--series-column", None, "column that names the series of a row, or none"),
        ("--series", None, "series to forecast, with --series-column"),
        ("--data-dir", "data", "folder for downloads"),
        ("--checkpoint", None, "file in runs/ of a sweep, for --predict-steps"),
        ("--output-dir", "outputs", "folder for results"),
    ]:
        add(flag, default=default, help=description)
    for flag, default, description in [
        ("--hidden-dim", 64, "width of the LSTM"),
        ("--num-layers", 2, "layers of the LSTM"),
        ("--n-heads", None, "query heads of att_mh and vq_mh; if unset, 8"),
        ("--kv-heads", None, "key heads of att_mh and vq_mh; if unset, 1 and 4"),
        ("--vocab-size", 64, "codebook rows of vq and vq_mh"),
        ("--epochs", 50, "passes over the windows"),
        ("--batch-size", 64, "windows in a step"),
        ("--runs", 1, "number of seeds; reports mean and interval"),
        ("--jobs", os.cpu_count(), "runs at a time, one thread each"),
        ("--predict-steps", None, "values to forecast after the end of the series of --checkpoint"),
    ]:
        add(flag, type=positive, default=default, help=description)
    add("--seed", type=int, default=42, help="random seed of weights and order; the original's "
        "split has 42")
    add("--device", type=detect_device, default="auto", help="auto, cuda, mps or cpu")
    if "--quick" in argv:
        parser.set_defaults(dataset=["synthetic"], epochs=12, time_steps=[128],
                            learning_rate=[3e-3])
    args = parser.parse_args(argv)
    if (args.predict_steps is None) != (args.checkpoint is None):
        parser.error("--predict-steps and --checkpoint go together")
    if min(args.learning_rate) <= 0:
        parser.error("--learning-rate must be above 0")
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


def read_table(path):
    """The table of texts in a CSV file, whatever its encoding and delimiter."""
    content = Path(path).read_bytes()
    if content.startswith(b"\x1f\x8b"):
        content = gzip.decompress(content)
    try:
        text = content.decode(json.detect_encoding(content))  # UTF-8, 16 or 32
    except UnicodeDecodeError:
        text = content.decode("cp1252", "replace")
    if "\0" in text:
        raise UserError("this is not a CSV file")
    text = re.sub(CLUTTER, "", text).strip("\r\n")
    header = re.split("[\r\n]", text, maxsplit=1)[0]
    header = re.sub('"[^"]*"', "", header)  # without quoted names
    separator = max(";\t|,", key=header.count)
    with warnings.catch_warnings(action="error"):  # a row is longer than the header
        return pd.read_csv(io.StringIO(text), sep=separator, dtype=str, index_col=False,
                           skip_blank_lines=False, skipinitialspace=True, na_values=MISSING)


def find_column(table, name):
    """The column of a table by its name or index."""
    if f"{name}.1" in table:  # as pandas calls the second column of a name
        raise UserError(f"two columns are called {name!r}; choose one by its index")
    if name in table:
        return table[name]
    try:
        return table.iloc[:, int(name)]
    except (ValueError, IndexError):
        raise UserError(f"no column {name!r}, only {', '.join(table)}") from None


def select_series(table, args):
    """The rows of --series, if that is set; otherwise all, which should be of one series."""
    if args.series_column == "none":
        return table
    if args.series and not args.series_column:
        raise UserError(f"--series needs --series-column, one of {', '.join(table)}")
    if args.series_column:
        names = find_column(table, args.series_column)
        chosen = table[names == args.series]
        if chosen.empty:
            raise UserError(f"--series must be one of {', '.join(names.dropna().unique()[:10])}")
        return chosen
    for name, count in table.filter(regex=SERIES_COLUMN).nunique().items():
        if 2 <= count <= len(table) / 2:
            raise UserError(f"column {name!r} seems to name several series; choose one with "
                            "--series-column and --series, or all rows with --series-column none")
    return table


def plain_numbers(texts):
    """Texts of numbers with a point before decimals and no thousands separators. If three digits
    follow every comma and some numbers have none, it is taken to separate thousands."""
    text = " ".join(texts.dropna()) + " "
    for mark, decimal in [",.", ".,"]:
        if mark in text and not re.search(NO_THOUSANDS.replace("M", mark), text):
            is_certain = decimal in text or re.search(f"[{mark}]...[{mark}]", text)
            is_thousands = is_certain or (mark == "," and text.count(mark) != texts.count())
            if not is_certain:
                meaning = "thousands separator" if is_thousands else "decimal mark"
                note(f"{mark!r} in the numbers of {texts.name!r} is read as a {meaning}")
            if is_thousands:
                return texts.str.replace(mark, "").str.replace(decimal, ".")
    return texts.str.replace(",", ".")


def read_times(texts):
    """Times as dates or numbers; of all ways to read a column, the one with the fewest invalid
    and missing times."""
    first = str(texts.iloc[0])
    if re.match(r"T?\d\d?:", first):
        raise UserError(f"times of day such as {first} need a date; leave out --time-column")
    offsets = texts.str.extract(r":\d\d[.\d]* ?(Z|[+-]\d\d:?\d*)$", expand=False)
    is_utc = offsets.nunique() > 1
    if is_utc:
        note("the times have several offsets; they are converted to UTC")

    def read(**options):
        with warnings.catch_warnings(action="ignore"):  # pandas warns of other formats
            return pd.to_datetime(texts, errors="coerce", utc=is_utc, **options)

    # 2024.0, 2024 Q1, a time with UTC, and an interval, of which the start counts.
    texts = texts.str.replace(r"\.0$| (?=Q\d$)| UTC$| - .*", "", regex=True)
    numbers = pd.to_numeric(plain_numbers(texts), errors="coerce")
    if numbers.notna().iloc[0]:
        readings = [*(read(format=date) for date in NUMERIC_DATES), numbers]
    elif re.match(r"\d{4}-\d\d-\d\d", first):
        readings = [read(format="ISO8601")]
    else:
        readings = [read(dayfirst="." in first[:3]),  # as in 31.12.2024
                    read(dayfirst=not re.match(r"\d{4}", first)), read(format="%y-%b"),
                    read(format="%b-%y")]
    best = min(readings, key=missing_times)
    for reading in readings:
        if missing_times(reading) == missing_times(best) and not reading.equals(best):
            note(f"the first time is read as {best.iloc[0]}; it could also be {reading.iloc[0]}")
    is_wrong = best.isna() | best.duplicated()
    if is_wrong.any():
        row = is_wrong.idxmax()
        raise UserError(f"row {row}: the time {texts[row]} is invalid or occurs twice; "
                        "--series-column and --series choose one of several series; without "
                        "--time-column the rows are taken as equally spaced")
    return best


def missing_times(times):
    """(number of invalid times, time from the first to the last in median steps)."""
    steps = times.drop_duplicates().sort_values().diff()
    return times.isna().sum(), steps.sum() / steps.median()


def equally_spaced(values, times):
    """The values at evenly spaced times, NaN where a row is missing. The step is fixed or one of
    the calendar: the one that reaches all times with the fewest rows."""
    values = values.set_axis(times).sort_index()
    times = values.index
    steps = pd.Series(times).diff()
    step = steps[steps < 1.5 * steps.mode()[0]].mean()
    count = round((times[-1] - times[0]) / step) + 1
    most = 2 * len(times)  # rows, of which half would be missing
    if count > most:
        grids = []
    elif isinstance(times, pd.DatetimeIndex):
        months = max(1, round(step / pd.Timedelta(days=30.4)))
        calendar = ["B", f"{months}MS", f"{months}ME", f"{months}BMS", f"{months}BME",
                    pd.DateOffset(months=months)]
        grids = [pd.date_range(times[0], times[-1], freq=freq) for freq in [step, *calendar]]
        tolerance = 0 * step
    else:
        grids = [np.linspace(times[0], times[-1], count, dtype=times.dtype)]
        tolerance = step / 10  # numbers may have been rounded
    grids = [grid for grid in grids if len(grid) <= most]
    for grid in sorted(grids, key=len):
        placed = values.reindex(grid, method="nearest", tolerance=tolerance)
        if placed.count() == values.count():
            return placed.rename_axis(times.name)
    raise UserError(f"the times are not equally spaced, or most are missing; the usual step is "
                    f"{step}; without --time-column the rows are taken as equally spaced")


def read_series(args):
    """The values of the file --data, in the order of their times and without gaps."""
    try:
        table = select_series(read_table(args.data), args)
        values = find_column(table, args.column)
        # A column that was chosen by its name may be called 2024, but not all of them.
        header = "".join(table) if values.name == args.column else values.name
        if re.fullmatch(NUMBER, header):
            raise UserError(f"the first line must hold names of columns, not {values.name!r}")
        values = pd.to_numeric(plain_numbers(values)).astype(float).where(np.isfinite)
        if not 1e-100 < values.max() - values.min() < 1e100:
            raise UserError(f"{values.name!r} is empty, constant, or too large or small")
        if args.time_column:
            times = find_column(table, args.time_column)
            if times.name == values.name:
                raise UserError(f"{times.name!r} is the time column; choose another --column")
            values = equally_spaced(values, read_times(times))
        elif re.search(TIME, table.head(1).to_csv()):
            note("rows are taken as equally spaced, the newest last; --time-column sorts them")
        if args.fill:
            filled = values.interpolate() if args.fill == "linear" else values.ffill()
            note(f"missing values, now filled: {values.isna().sum() - filled.isna().sum()}")
            values = filled.dropna()  # nothing is known before the first value
        missing = values.index[values.isna()]
        if len(missing):
            raise UserError(f"missing values: {len(missing)}, the first at "
                            f"{values.index.name or 'row'} {missing[0]}; --fill linear or --fill "
                            "forward fills them")
        if values.nsmallest(2).max() == values.min() <= -99:
            note(f"the lowest value, {values.min():g}, repeats; if it marks missing values, empty "
                 "these cells and use --fill")
        if (values.diff()[1:] == 1).all():
            note(f"{values.name!r} seems to number the rows; --column chooses another column")
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, Warning, UserError) as error:
        raise UserError(f"{args.data}: {error}") from None
    return values


def load_known(name, args):
    """The embedded series, or a public one from --data-dir, downloaded if it is not there."""
    if name == "synthetic":
        return pd.Series(generate_series(), name="signal")
    file, sha256 = FILES[name]
    path = Path(args.data_dir, file)
    is_new = not path.exists()
    try:
        content = urlopen(URL + file, timeout=3).read() if is_new else path.read_bytes()
    except (OSError, HTTPException) as error:
        raise UserError(f"{URL}{file}: {error}; put it into --data-dir, or use --dataset "
                        "synthetic") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path} has another sha256 than the published file; delete it if it is "
                        "there, and put the right one into --data-dir")
    if is_new:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_bytes(content)
    return pd.read_csv(io.BytesIO(content), index_col=0).squeeze()


def load_series(args):
    """{name: values} of all series that the arguments ask for."""
    if args.data:
        return {Path(args.data).stem: read_series(args)}
    try:
        return {name: load_known(name, args) for name in args.dataset or ["y_w"]}
    except UserError as error:
        if args.dataset:
            raise
        note(f"no real data ({error}); the embedded series is used")
        return {"synthetic": load_known("synthetic", args)}


def digest(values):
    """The sha256 of values [rows]."""
    return hashlib.sha256(values.tobytes()).hexdigest()


# --- Models: each reads [batch, time] normalized values -----------------------------------------


class Network(nn.Module):
    """Base of all models. A new model needs __init__(run, args), with a Run and the command line,
    forward, and an entry in MODELS; if its horizon is longer than 1, also loss and predict.

    forward(x) takes x [batch, time] to one-step forecasts [batch, time], one from every step.
    Tables show self.name, where that is set.
    """

    horizon = 1  # values of one forecast
    decay = False  # whether the learning rate warms up and decays
    align_target = True  # whether the loss is taken at every step, without --align-target

    def start(self, windows):
        """Called before training with all training windows [count, time + horizon]."""

    def loss(self, windows, align_target):
        """Loss of windows [batch, time + 1] at every step, or at the last only."""
        x, targets = windows[:, :-1], windows[:, 1:]
        if align_target:
            return F.mse_loss(self(x), targets)
        return F.mse_loss(self.predict(x, None), targets[:, -1:])

    def predict(self, windows, rows):
        """Forecasts [batch, horizon] of the values at `rows` [batch] and after, from windows
        [batch, time]."""
        return self(windows)[:, -1:]


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


def regress(windows, time_steps, relative):
    """Fitted ridge regression of the later columns of windows on the first ones, or of all relative
    to the last of these. Each later column has its own strength, by generalized cross-validation,
    since one step ahead needs less than many."""
    if relative:
        windows = windows - windows[:, time_steps - 1 : time_steps]
    model = RidgeCV(RIDGE_STRENGTHS, alpha_per_target=True)
    return model.fit(windows[:, :time_steps], windows[:, time_steps:])


def fit_ridge(z, time_steps, relative=False):
    """Ridge regression on the last values."""
    windows = np.lib.stride_tricks.sliding_window_view(z, time_steps + 1)
    model = regress(windows, time_steps, relative)
    weights = model.coef_.ravel()
    if relative:
        weights[-1] = 1 - weights[:-1].sum()
    return weights, model.intercept_


def fit_nlinear(z, time_steps):
    """Ridge regression on differences from the last value (NLinear, Zeng et al. 2023)."""
    return fit_ridge(z, time_steps, relative=True)


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
    """The original's zero biases, and Xavier weights in layers called fc_* and lstm*. The layers
    in `joint` share one matrix in the original, which has a smaller bound."""
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
        elif name.startswith(("fc_", "lstm")):
            nn.init.xavier_uniform_(parameter, gain=0.5**0.5 if name.startswith(joint) else 1.0)


class LSTM(Network):
    """The original's LSTM; 50,497 parameters at its defaults. A GRU differs in its layer only."""

    align_target = False
    layer = nn.LSTM

    def __init__(self, run, args):
        super().__init__()
        self.name = f"{run.model}-1-{args.hidden_dim}-{args.num_layers}-1"
        self.lstm = self.layer(1, args.hidden_dim, args.num_layers, batch_first=True)
        self.fc_out = nn.Linear(args.hidden_dim, 1)
        initialize(self)

    def forward(self, x):
        hidden, _ = self.lstm(x.unsqueeze(-1))  # [batch, time, hidden_dim]
        return self.fc_out(hidden).squeeze(-1)


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
    place of keys and values, and the embedded input is the query: they never mix time steps, and a
    forecast depends on the last value and its position only. With --norm-pe the positions follow
    the norms of queries and keys, so that rope stays relative (in the original they precede them).
    """

    def __init__(self, run, args):
        super().__init__()
        name, heads, kv_heads, parts, pe = ATTENTION[run.model]
        pe = run.pe or pe
        if run.model.endswith("_mh"):
            heads = args.n_heads or heads
            kv_heads = args.kv_heads or kv_heads
        if run.d_model % heads or heads % kv_heads:
            raise UserError("--kv-heads must divide --n-heads, and that --d-model")
        flags = {part: getattr(args, part) for part in ATTENTION_PARTS}
        parts = [part for part in flags if flags[part] or (flags[part] is None and part in parts)]
        self.causal = "causal" in parts
        has_codebook = run.model.startswith("vq")
        if not (has_codebook or self.causal or args.align_target is False):
            raise UserError(f"{run.model} would see its targets; add --no-align-target or --causal")
        block_size = max(ORIGINAL_BLOCK_SIZE, run.time_steps)
        name = name.format(run.d_model, heads, kv_heads, args.vocab_size)
        name = "-is_".join([f"{name}-1-1-{block_size}", *parts])
        self.name = f"{name.replace('norm', 'n')}-{pe}"
        self.width = run.d_model // heads
        norms = {part: nn.LayerNorm if part in parts else nn.Identity for part in ATTENTION_PARTS}
        on_input, on_heads = ("none", pe) if "norm_pe" in parts else (pe, "none")
        self.fc_in = nn.Linear(1, run.d_model)
        self.position_in = Positions(on_input, run.d_model, block_size)
        self.position_qk = Positions(on_heads, self.width, block_size)
        self.ln_in = norms["inln"](run.d_model)
        self.ln_q = norms["qln"](self.width)
        self.ln_k = norms["kln"](self.width)
        self.codebook = None
        if has_codebook:
            self.codebook = nn.Parameter(torch.randn(kv_heads, args.vocab_size, self.width))
            self.fc_q = nn.Identity()
        else:
            self.fc_q = nn.Linear(run.d_model, run.d_model, bias=False)
            self.fc_k = nn.Linear(run.d_model, kv_heads * self.width, bias=False)
            self.fc_v = nn.Linear(run.d_model, kv_heads * self.width, bias=False)
        self.fc_out = nn.Linear(run.d_model, 1, bias=has_codebook)
        initialize(self, ("fc_q", "fc_k", "fc_v") if run.model == "att" else ())

    def split_heads(self, x):
        """[batch, time, heads · width] -> [batch, heads, time, width]."""
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)

    def predict(self, windows, rows):
        return self(windows, first=windows.shape[1] - 1)

    def forward(self, x, first=0):
        """Forecasts [batch, time - first] from the steps `first` and after."""
        hidden = self.ln_in(self.position_in(self.fc_in(x.unsqueeze(-1))))  # [batch, time, d_model]
        q = self.ln_q(self.split_heads(self.fc_q(hidden[:, first:])))
        q = self.position_qk(q, first)
        if self.codebook is not None:
            v = self.codebook.expand(len(x), -1, -1, -1)
            k = self.ln_k(v)
        else:
            v = self.split_heads(self.fc_v(hidden))
            k = self.position_qk(self.ln_k(self.split_heads(self.fc_k(hidden))))
        # The query heads that share a key head become more queries of it (grouped queries).
        groups = q.unflatten(1, (k.shape[1], -1))  # [batch, key heads, group, time, width]
        mask = None
        if self.causal:
            mask = x.new_ones(q.shape[2], k.shape[2]).bool().tril(first)
            mask = mask.repeat(groups.shape[2], 1)
        out = F.scaled_dot_product_attention(groups.flatten(2, 3), k, v, mask)
        out = out.view_as(q)  # [batch, heads, time, width]
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
        self.horizon = min(8, run.time_steps)
        ages = torch.arange(run.time_steps, 0, -1)  # 1 for the last value
        pool = F.one_hot(ages.double().log2().ceil().long()).float()
        self.register_buffer("pool", pool / pool.sum(0), persistent=False)  # [time, lags]
        lags = pool.shape[1]
        self.ridge = nn.Linear(run.time_steps, self.horizon).requires_grad_(False)
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
        model = regress(windows, self.ridge.in_features, relative=True)
        self.ridge.weight.copy_(torch.from_numpy(model.coef_))
        self.ridge.bias.copy_(torch.from_numpy(model.intercept_))

    def predict(self, windows, rows):
        return self(windows).mean(0)

    def forward(self, x):
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
        return last + self.ridge(x - last) + correction

    def loss(self, windows, align_target):
        """Huber loss over the horizon: otherwise a few steep rises would outweigh the rest."""
        forecasts = self(windows[:, : -self.horizon])
        targets = windows[:, -self.horizon :].expand_as(forecasts)
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
    """(Fitted, history) of a run on values[:stop], with losses on the rows from there to the test
    part; with `original` on a random 80 % of the windows, with losses on the others."""
    past = values[:stop]
    mean = float(past.mean())
    std = float(past.std()) or 1.0
    if run.model in BASELINES:
        weights, bias = BASELINES[run.model]((past - mean) / std, run.time_steps)
        return Fitted(run, LinearForecaster(weights, bias), len(weights), mean, std), []
    torch.manual_seed(run.seed)
    model = MODELS[run.model](run, args).to(args.device)
    fitted = Fitted(run, model, run.time_steps, mean, std)
    end = stop - run.time_steps  # the first window with no target before `stop`
    count = end - model.horizon + 1  # windows with all targets before it
    if original:
        starts = [part[part < count] for part in original_split(end)]
    else:
        test_count = count + int(TEST_START * len(values)) - stop
        starts = [torch.arange(count), torch.arange(test_count)[end:]]
    train_starts, val_starts = (part.to(args.device) for part in starts)
    z = fitted.normalize(values).to(args.device)
    history = train(model, z, train_starts, val_starts, run, args, shuffle=not original)
    model.cpu()
    return fitted, history


# --- Evaluation: errors are {kind: [array of each block]}, of which the last is the test part ---


def forecast_errors(fitted, values, start, stop, blocks):
    """Forecasts minus truth of rows start to stop: one step ahead, in about equal blocks, and of
    free runs from the start of each block to `stop`."""
    origins = np.linspace(start, stop, blocks, endpoint=False).astype(int)
    one_step = fitted.free_run(values, np.arange(start, stop), 1)[:, 0] - values[start:stop]
    paths = fitted.free_run(values, origins, stop - start)
    return {"one step": np.array_split(one_step, blocks),
            "free run": [path[: stop - origin] - values[origin:stop]
                         for path, origin in zip(paths, origins)]}


def holdout(run, args, values):
    """(errors, [Fitted on all before the test part], history of the last fold) of a run."""
    if run.model == "combined":
        return combine(run, args, values)
    rows = len(values)
    errors = {kind: [] for kind in KINDS}
    histories = []
    for share in [*FOLDS, TEST_START]:
        start = int(share * rows)
        stop = rows if share == TEST_START else start + int(VALIDATION_SHARE * rows)
        fitted, history = fit(run, args, values, start)
        histories.append(history)
        blocks = 1 if share == TEST_START else ORIGINS
        for kind, parts in forecast_errors(fitted, values, start, stop, blocks).items():
            errors[kind] += parts
    return errors, [fitted], histories[-2]


def combine(run, args, values):
    """Ours, `combined`: the mean of vq_ar and the baseline with the least validation error, or that
    one alone where the error of vq_ar is more than VQ_AR_LIMIT times as large; chosen for one step
    and for the free run separately."""
    errors, network, history = holdout(replace(run, model="vq_ar"), args, values)
    baselines = [holdout(replace(run, model=model), args, values) for model in BASELINES]
    combined = {}
    for kind in reversed(KINDS):  # the members that are returned are those of the free run
        best, members, _ = min(baselines, key=lambda found: validation_error(found[0][kind]))
        combined[kind] = best[kind]
        if validation_error(errors[kind]) <= VQ_AR_LIMIT * validation_error(best[kind]):
            combined[kind] = [(a + b) / 2 for a, b in zip(errors[kind], best[kind])]
            members = network + members
    return combined, members, history


def validation_error(blocks):
    """Geometric mean of the squared errors of the validation blocks, so that none dominates."""
    return float(stats.gmean([np.mean(block**2) for block in blocks[:-1]]))


def free_run_widths(blocks):
    """Half widths [horizon] of split-conformal intervals (Vovk et al. 2005) of a free run, from the
    errors of validation blocks in each range of the horizon; they never become narrower."""
    edges = np.unique(np.geomspace(1, len(blocks[0]) + 1, RANGES + 1).astype(int)) - 1
    widths = []
    for first, last in itertools.pairwise(edges):
        sizes = np.sort(np.abs(np.concatenate([block[first:last] for block in blocks])))
        rank = math.ceil((len(sizes) + 1) * COVERAGE)
        widths += [sizes[:rank][-1]] * (last - first)
    return np.maximum.accumulate(widths).tolist()


def one_step_widths(blocks):
    """Half widths [test rows] of the intervals one step ahead, each from the RECENT errors before
    its row, so that they follow the noise of the series; the first are those of the last fold."""
    sizes = pd.Series(np.abs(np.concatenate(blocks[-ORIGINS - 1 :])))
    quantiles = sizes.rolling(RECENT, min_periods=1).quantile(COVERAGE, interpolation="higher")
    return quantiles.shift()[-len(blocks[-1]) :].tolist()


def extend(widths, count):
    """Half widths [count]: beyond the validated horizon the last one."""
    return np.pad(widths, (0, count), "edge")[:count]


def holdout_scores(errors, widths, values):
    """Scores on validation and on the test part; MASE is relative to the mean error of the
    seasonal naive forecast in training."""
    past = values[: int(TEST_START * len(values))]
    period = find_period(past)
    scale = np.abs(past[period:] - past[:-period]).mean() or math.nan
    scores = {}
    for kind, blocks in errors.items():
        sizes = np.abs(blocks[-1])
        scores[f"validation {kind}"] = validation_error(blocks)
        scores[f"test {kind}"] = float(np.mean(sizes**2))
        scores[f"MASE {kind}"] = float(sizes.mean() / scale)
        scores[f"coverage {kind}"] = float(np.mean(sizes <= extend(widths[kind], len(sizes))))
    return scores


def execute(run, args, values, models):
    """Fit and score one run: (run, its checkpoint); an error is returned as {"error"} and not
    raised, so that the other runs go on. What the checkpoint holds beside the scores is of the
    hold-out, if that was run. `models` has the MODELS of the parent, to which a user may have
    added."""
    MODELS.update(models)
    torch.set_num_threads(1)
    row = asdict(run)
    widths = {}
    try:
        if args.protocol != "holdout" and run.model != "combined":
            fitted, history = fit(run, args, values, len(values), original=True)
            members = [fitted]
            errors = forecast_errors(fitted, values, run.time_steps, len(values), 1)
            for kind in KINDS:
                row[f"original {kind}"] = float(np.mean(errors[kind][0] ** 2))
        if args.protocol != "original":
            errors, members, history = holdout(run, args, values)
            widths["free run"] = free_run_widths(errors["free run"][:-1])
            widths["one step"] = one_step_widths(errors["one step"])
            row |= holdout_scores(errors, widths, values)
    except Exception as error:
        return run, {"error": f"{type(error).__name__}: {error}"}
    row["name"] = getattr(members[0].model, "name", run.model)
    forecasts = {}
    for kind in KINDS:
        test = errors[kind][-1]
        forecasts[kind] = (values[-len(test) :] + test).tolist()
    members = [vars(fitted) | {"run": asdict(fitted.run), "model": fitted.model.state_dict()}
               for fitted in members]
    return run, {"row": row, "data": [len(values), digest(values)], "history": history,
                 "widths": widths, "forecasts": forecasts, "members": members}


# --- The sweep ----------------------------------------------------------------------------------


def make_runs(args, series):
    """All runs that the arguments ask for; the quick baselines of a series come last."""
    runs = []
    seeds = range(args.seed, args.seed + args.runs)
    is_original = args.protocol == "original"
    share = 1 if is_original else FOLDS[0]  # of the smallest training part
    for dataset, values in series.items():
        rows = len(values)
        longest = min(ORIGINAL_TIME_STEPS, rows // 6, int(FOLDS[0] * rows) - 24)
        for time_steps in args.time_steps or [max(2, longest)]:
            # A window, the horizon of vq_ar and 16 windows more.
            needed = math.ceil((time_steps + 24) / share)
            if rows < needed:
                note(f"{dataset} has {rows} values and is left out with --time-steps {time_steps}, "
                     f"which needs {needed}")
                continue
            runs += [Run(model, dataset, time_steps) for model in BASELINES]
            for model in args.model:
                rates = args.learning_rate
                widths = encodings = [None]
                if model in ATTENTION:
                    widths = args.d_model
                    encodings = args.pe
                if model == "combined":
                    rates = [] if is_original else [COMBINED_RATE]
                for options in itertools.product(rates, widths, encodings, seeds):
                    runs.append(Run(model, dataset, time_steps, *options))
                    if model in MODELS:
                        MODELS[model](runs[-1], args)  # raises UserError if options do not fit
    if not runs:
        raise UserError(NOTES[-1])
    return runs[::-1]


def execute_all(runs, args, series, run_dir):
    """{run: checkpoint} of all runs that succeed. A checkpoint is written when its run has ended;
    those that are there already are read."""
    from joblib import Parallel, delayed, parallel_config

    (run_dir / "runs").mkdir(exist_ok=True)
    files = {run: run_dir / "runs" / f"{run.id}.pt" for run in runs}
    checkpoints = {run: read_checkpoint(file, series) for run, file in files.items()
                   if file.exists()}
    # The workers' allocator keeps what is freed; mapping it again took a tenth of the time.
    os.environ |= {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
    cluster = contextlib.nullcontext()
    if args.backend == "dask":
        from distributed import Client

        address = os.environ.get("DASK_SCHEDULER_ADDRESS")
        workers = {"n_workers": args.jobs, "threads_per_worker": 1, "dashboard_address": None}
        cluster = Client(address) if address else Client(**workers)
    jobs = [delayed(execute)(run, args, series[run.dataset].to_numpy(), MODELS)
            for run in runs if run not in checkpoints]
    threads = torch.get_num_threads()
    with cluster, parallel_config(args.backend, n_jobs=args.jobs):
        finished = Parallel(return_as="generator_unordered")(jobs)
        for run, checkpoint in progress(finished, "runs", len(jobs)):
            if "error" in checkpoint:
                note(f"{run.id} failed: {checkpoint['error']}")
            else:
                checkpoints[run] = checkpoint
                with atomic_write(files[run]) as path:
                    torch.save(checkpoint, path)
    torch.set_num_threads(threads)
    return {run: checkpoints[run] for run in runs if run in checkpoints}


def read_checkpoint(file, series, may_have_grown=False):
    """The checkpoint in a file, whose series should be as it was, or begin like that."""
    checkpoint = load_checkpoint(file, file)
    if "members" not in checkpoint:
        raise UserError(f"{file}: not a checkpoint of {EXPERIMENT}.py")
    values = series.get(checkpoint["row"]["dataset"], pd.Series()).to_numpy()
    rows, sha256 = checkpoint["data"]
    if may_have_grown:
        values = values[:rows]
    if digest(values) != sha256:
        raise UserError(f"{file}: the series differs from the {rows} values that it was fitted to")
    return checkpoint


# --- Tables -------------------------------------------------------------------------------------


def show(values):
    """Mean ± 95 % confidence interval of the values of all seeds, as text."""
    mean, width = mean_and_interval(values)
    text = f"{mean:.5g}".replace("inf", "diverged")
    return text if np.isnan(width) else f"{text} ± {width:.3g}"


def tabulate(rows, columns):
    """A table of columns over seeds, sorted by the first of them in each data set."""
    groups = rows.groupby(SETTINGS, dropna=False)
    table = groups[columns].agg(show).assign(order=groups[columns[0]].mean())
    return table.sort_values(["dataset", "order"]).drop(columns="order").reset_index()


def choose(rows, score):
    """The rows of each model with the settings whose mean score is the least."""
    means = rows.groupby(SETTINGS, dropna=False)[score].transform("mean")
    return rows[means == means.groupby([rows["dataset"], rows["model"]]).transform("min")]


def make_tables(rows, args):
    """The tables of all data sets, with their headings."""
    texts = []
    if args.protocol != "holdout":
        table = tabulate(rows[rows["model"] != "combined"], [f"original {kind}" for kind in KINDS])
        table = table.merge(pd.read_csv(io.StringIO(ORIGINAL_TABLES)), "left")
        texts += ["## The original's protocol: squared errors over the whole series",
                  markdown_table(table)]
    for kind in KINDS if args.protocol != "original" else ():
        columns = [f"{score} {kind}" for score in ("test", "MASE", "coverage")]
        texts += [f"## Hold-out, {kind}: squared error, MASE and coverage of the 80 % "
                  "intervals on the last 20 %, settings that are best on validation",
                  markdown_table(tabulate(choose(rows, f"validation {kind}"), columns))]
    return "\n\n".join(texts)


# --- Pictures -----------------------------------------------------------------------------------


def draw_forecasts(checkpoints, values, title, path):
    """The end of the series, and the forecasts of its last rows in the checkpoint of each model."""
    rows = math.ceil(len(checkpoints) / 2)
    fig, axes = new_figure(title, rows, min(2, len(checkpoints)), (13, 1 + 2.6 * rows))
    for ax, checkpoint in zip(axes, checkpoints):
        count = len(checkpoint["forecasts"]["free run"])
        times = values.index[-count:]
        ax.margins(y=0.5)
        ax.plot(values[-max(100, 2 * count) :], color="black", linewidth=0.8, label="series")
        ax.set_ylim(ax.get_ylim())  # the forecasts may lie outside
        for index, (kind, forecast) in enumerate(checkpoint["forecasts"].items(), 1):
            forecast = pd.Series(forecast, times).replace(np.inf, np.nan)
            plot_curve(ax, times, forecast, kind, index)
            if checkpoint["widths"]:
                widths = extend(checkpoint["widths"][kind], count)
                ax.fill_between(times, forecast - widths, forecast + widths, alpha=0.2,
                                color=COLORS[index], linewidth=0, label=f"80 % interval, {kind}")
        ax.axvline(times[0], color="0.5", linestyle=":")
        ax.set(title=checkpoint["row"]["name"], xlabel=times.name or "row")
    for ax in axes[len(checkpoints) :]:
        ax.set_axis_off()
    fig.supylabel(values.name)
    legend_below(axes[0])
    save_figure(fig, path)


def draw_curves(checkpoints, title, path):
    """The losses of networks; a training loss is an epoch's mean and stands in its middle."""
    fig, axes = new_figure(title, 1, 2)
    for index, checkpoint in enumerate(checkpoints):
        history = pd.DataFrame(checkpoint["history"])
        for ax, name, end in zip(axes, history, [0.5, 1.0]):
            label = checkpoint["row"]["model"]
            plot_curve(ax, history.index + end, history[name], label, index, marker=".")
            ax.set(xlabel="epoch", ylabel=f"{name}, normalized series", yscale="log")
    legend_below(axes[0])
    save_figure(fig, path)


def draw_sweep(rows, score, title, path):
    """A heatmap of a score of all networks by learning rate and time steps."""
    table = rows.pivot_table(score, ["name", "learning_rate"], "time_steps")
    fig, (ax,) = new_figure(title, size=(9, 2 + len(table) / 3))
    fig.colorbar(ax.pcolormesh(np.log10(table), edgecolor="white"))
    ax.set_xticks(np.arange(table.shape[1]) + 0.5, table.columns)
    ax.set_yticks(np.arange(len(table)) + 0.5, [f"{name}, {rate}" for name, rate in table.index])
    ax.set(xlabel="time steps", ylabel="model, learning rate")
    save_figure(fig, path)


def draw_pictures(rows, score, checkpoints, values, run_dir):
    """All pictures of a data set."""
    dataset = rows["dataset"].iloc[0]
    best = [checkpoints[run] for run in choose(rows, score).drop_duplicates("model").index]
    draw_forecasts(best, values, f"forecasts of {dataset}", run_dir / f"forecasts_{dataset}.png")
    networks = [checkpoint for checkpoint in best if checkpoint["history"]]
    if networks:
        title = f"{dataset}: best networks (squared error; Huber loss for vq_ar and combined)"
        draw_curves(networks, title, run_dir / f"curves_{dataset}.png")
        title = f"{dataset}, {score}: log10 of the squared error [({values.name})²]"
        draw_sweep(rows, score, title, run_dir / f"sweep_{dataset}.png")


# --- The experiment -----------------------------------------------------------------------------


def run_experiment(args):
    """The whole story: read the series, run the sweep, write tables, pictures and results."""
    start_time = time.perf_counter()
    series = load_series(args)
    runs = make_runs(args, series)
    # A resumed run takes the same series.
    args = argparse.Namespace(**vars(args) | {"dataset": list(series)})
    run_dir = next_run_dir(args)
    checkpoints = execute_all(runs, args, series, run_dir)
    rows = pd.DataFrame([checkpoint["row"] for checkpoint in checkpoints.values()],
                        list(checkpoints))
    score = "original free run" if args.protocol == "original" else "validation free run"
    for dataset, part in rows.groupby("dataset"):
        draw_pictures(part, score, checkpoints, series[dataset], run_dir)
    results = {
        "data": {name: {"rows": len(values), "sha256": digest(values.to_numpy())}
                 for name, values in series.items()},
        "rows": rows.to_dict("records"),
        "seconds": time.perf_counter() - start_time,
    }
    return write_results(results, make_tables(rows, args), args, run_dir)


def run(args):
    return predict_steps(args) if args.predict_steps else run_experiment(args)


# --- Extra: forecast after the end of a series --------------------------------------------------


def unpack(member, args):
    """The Fitted that a checkpoint holds."""
    run = Run(**member["run"])
    if run.model in BASELINES:
        model = LinearForecaster(**member["model"])
    else:
        try:
            model = MODELS[run.model](run, args)
            model.load_state_dict(member["model"])
        except (KeyError, RuntimeError) as error:
            raise UserError(f"model {run.model!r} is absent or has changed ({error})") from None
    return Fitted(**member | {"run": run, "model": model.eval()})


def next_times(times, count):
    """The times [count] after an index of times."""
    step = getattr(times, "freq", None) or times[-1] - times[-2]
    following = [times[-1] + number * step for number in range(1, count + 1)]
    if times.dtype == float:
        following = np.round(following, 9)  # 2013.5, not 2013.5000000000032
    return pd.Index(following, name=times.name or "row")


def predict_steps(args):
    """Forecast the values after the newest row of the series of --checkpoint, which may have grown
    or moved to --data. After the hold-out, the weights are those of the first 80 %, and there are
    intervals."""
    file = Path(args.checkpoint).resolve()
    arguments = json.loads((file.parents[1] / "arguments.json").read_text())
    settings = argparse.Namespace(**arguments | changed_arguments(args))
    series = dict(zip(settings.dataset, load_series(settings).values()))
    checkpoint = read_checkpoint(file, series, may_have_grown=True)
    values = series[checkpoint["row"]["dataset"]]
    paths = [unpack(member, settings).free_run(values.to_numpy(), [len(values)], args.predict_steps)
             for member in checkpoint["members"]]
    times = next_times(values.index, args.predict_steps)
    forecast = np.mean(paths, axis=0)[0]
    table = pd.DataFrame({values.name: forecast}, times)
    if checkpoint["widths"]:
        widths = extend(checkpoint["widths"]["free run"], len(times))
        table["80 % low"] = forecast - widths
        table["80 % high"] = forecast + widths
    run_dir = next_run_dir(args)
    table.to_csv(run_dir / "forecast.csv")
    checkpoint["forecasts"] = {"free run": forecast}
    extended = values.reindex(values.index.append(times))
    draw_forecasts([checkpoint], extended, "forecast", run_dir / "forecast.png")
    text = f"{len(table)} values after {values.index[-1]}, in forecast.csv and forecast.png"
    return write_results({"forecast": forecast}, text, args, run_dir)


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
