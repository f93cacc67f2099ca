"""Do attention and vector-quantized attention forecast one series better than an LSTM, and does any beat ridge?

Method: windows of --time-steps values predict the next one. Five models of the seed (LSTM, attention, grouped-query
attention, and attention over a learned codebook with one or many heads), one of ours, and three baselines (mean,
persistence, ridge on the lags) are scored one step ahead and free-running, as the seed did it (random windows, over the
whole series, training part included) and on a hold-out (the last 20 %, never seen, nothing chosen on it).

    python forecast.py                                    # y_w if it can be had, all models, the seed's five rates
    python forecast.py --quick                            # everything, small, embedded data: under a minute
    python forecast.py --dataset 4single --protocol seed  # the seed's second table
    python forecast.py --data FILE.csv --column NAME      # your own series
    python forecast.py --model att vq att_mh vq_mh --dataset y_w 4single --time-steps 64 128 256 512 1024
    python forecast.py --resume                           # go on with the newest unfinished sweep
    python forecast.py --predict-steps 200 --checkpoint outputs/forecast/run-001/runs/NAME.pt

Written to outputs/forecast/run-001/ (the next free number): runs.jsonl (each finished run, at once), runs/*.pt (its
forecasts and weights; those of the hold-out, fitted on the first 80 %, where that was run), results.json, summary.md,
and for each data set four pictures.

What to know before you read the tables: the seed's `vq` and `vq_mh` never mix time steps. Their keys and values are
rows of the codebook, so the forecast depends on the last value (and its position) alone, whatever --time-steps is, and
--causal only hides codebook rows from early positions. Ours, `vq_ar`, has a codebook that does look back.

Sources: the public project donglinkang2021/simple-sequence-prediction (MIT), its table of 2025-01-13 and its two data
sets. Attention: Vaswani et al. 2017; grouped queries: Ainslie et al. 2023; rotary positions: Su et al. 2021; codebook
attention: Kim et al. 2017 and van den Oord et al. 2017; mixtures of autoregressions: Wong and Li 2000; normalization of
each window: Kim et al. 2022 (RevIN).
"""

import argparse
import contextlib
import hashlib
import http.client
import importlib.metadata
import io
import itertools
import json
import math
import os
import pickle
import platform
import shutil
import subprocess
import sys
import time
import urllib.request
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from common import (COLORS, LINES, detect_device, has_bfloat16, in_notebook, mean_and_interval, new_figure, plot_curve,
                    save_figure)

try:
    import resource
except ImportError:  # Windows: memory is then not reported
    resource = None

URL = "https://raw.githubusercontent.com/donglinkang2021/simple-sequence-prediction/master/data/"
FILES = {  # name: (file, sha256)
    "y_w": ("y+w.csv", "2629be5f09063be55d8a8e1762337018e079f92a12ecac0d871b55cafaa49cf5"),
    "4single": ("4single.csv", "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"),
}
NETWORKS = ["lstm", "att", "att_mh", "vq", "vq_mh", "vq_ar"]
BASELINES = ["mean", "last", "ridge"]
SEED_RATES = [3e-3, 1e-3, 5e-4, 3e-4, 1e-4]
SEED_TIME_STEPS = 112
SEED_NAMES = {"lstm": "lstm-1-64-2-1", "att": "att-64-1-1-512-is_inln-is_qln-is_kln-is_causal-sinpe",
              "att_mh": "att_mh-64-8-1-1-1-512-is_kln-is_causal-sinpe", "vq": "vq-64-64-1-1-512-is_causal-randpe",
              "vq_mh": "vq_mh-64-64-8-4-1-1-512-is_inln-is_n_pe-rope"}
# The seed's two tables: (model, learning rate): (Predict/mse_regressive, Predict/mse_batch), all at 112 time steps.
SEED_TABLES = {
    "y_w": {
        ("att", 5e-4): (1123.62, 1128.09), ("att_mh", 5e-4): (1127.6, 1098.34), ("att_mh", 3e-3): (1277.27, 1097.75),
        ("att_mh", 1e-3): (1407.15, 1127.35), ("lstm", 3e-4): (1496.39, 1098.17), ("lstm", 5e-4): (1568.19, 1115.62),
        ("att", 3e-4): (1863.04, 1156.63), ("att_mh", 1e-4): (1954.19, 1211.73), ("att", 1e-3): (1998.94, 1123.66),
        ("lstm", 1e-3): (2384.63, 1126.47),
    },
    "4single": {
        ("vq", 1e-4): (20751.3, 2722.98), ("vq_mh", 5e-4): (24268.4, 2113.12), ("vq_mh", 1e-3): (24649.5, 1977.2),
        ("vq_mh", 3e-3): (25301.4, 1942.9), ("vq", 3e-4): (27897.9, 2010.93), ("att_mh", 3e-4): (28387.1, 1309.87),
        ("vq", 3e-3): (29481.0, 1991.11), ("vq", 5e-4): (29551.5, 2008.6), ("vq", 1e-3): (29758.8, 2009.97),
        ("lstm", 5e-4): (31854.4, 1360.52),
    },
}
# What the seed's tables used; each can be set on the command line.
MODEL_DEFAULTS = {
    "lstm": {"align_target": False},
    "att": {"n_heads": 1, "kv_heads": 1, "inln": True, "qln": True, "kln": True, "causal": True, "pe": "sinpe"},
    "att_mh": {"n_heads": 8, "kv_heads": 1, "kln": True, "causal": True, "pe": "sinpe"},
    "vq": {"n_heads": 1, "kv_heads": 1, "causal": True, "pe": "randpe"},
    "vq_mh": {"n_heads": 8, "kv_heads": 4, "inln": True, "norm_pe": True, "pe": "rope"},
    "vq_ar": {},
}
FLAGS = ["inln", "qln", "kln", "causal", "norm_pe"]
FIT, CHOOSE = 0.72, 0.80  # hold-out: fitted up to here, chosen up to here, tested on the rest
HOLDOUT_COLUMNS = ("validation/mse_batch", "holdout/mse_regressive", "holdout/mse_batch")
REGRESSIVE, BATCH = "Predict/mse_regressive", "Predict/mse_batch"
DIVERGED = 1e300  # stands for a squared error that is not finite, so that such a run sorts last


class UserError(Exception):
    """Something that the user can put right: main() makes it one line on stderr and exit code 2."""


def note(text):
    print(f"forecast.py: {text}", file=sys.stderr)


# --- Data -------------------------------------------------------------------------------------------------------------


@dataclass
class Series:
    """One series: `values` [rows] float64 with the name of their column, and the times of the rows."""

    name: str
    values: np.ndarray
    times: np.ndarray  # [rows] numbers or datetime64
    column: str
    time_label: str
    source: str  # real or embedded
    sha256: str


def generate_series(rows=720, seed=0):
    """The embedded series: two peaks in each cycle of 120 rows, a slow drift and sensor noise; [rows] float64."""
    rng = np.random.default_rng(seed)
    t = np.arange(rows)
    cycle, phase = t // 120, (t % 120) / 120
    heights = rng.uniform(0.85, 1.15, (rows // 120 + 1, 2))[cycle]  # [rows, 2]: no two cycles are quite alike
    first = np.exp(-(((phase - 0.25) / 0.07) ** 2))
    second = np.exp(-(((phase - 0.60) / 0.12) ** 2))
    level = 120 + 15 * np.sin(2 * np.pi * t / 1000)
    return level + 300 * heights[:, 0] * first + 170 * heights[:, 1] * second + 12 * rng.standard_normal(rows)


def read_series(path, column=None, time_column=None, name=None):
    """A column of a CSV file with a header as Series; `column` is a name or an index from 0 (default: the last one)."""
    import pyarrow as pa
    import pyarrow.csv

    try:
        raw = Path(path).read_bytes()
        parse = pa.csv.ParseOptions(ignore_empty_lines=False)
        table = pa.csv.read_csv(io.BytesIO(raw.rstrip()), pa.csv.ReadOptions(use_threads=False), parse)
        header = table.column_names
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --data takes a CSV file with a header") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; --data takes one CSV file") from None
    except (pa.ArrowInvalid, UnicodeDecodeError) as problem:
        reason = " ".join(str(problem).split())
        raise UserError(f"{path}: {reason}; a CSV file in UTF-8 with a header is needed") from None

    def numbers(wanted, flag):
        if wanted in header:
            index = header.index(wanted)
        elif wanted.lstrip("-").isdigit() and -len(header) <= int(wanted) < len(header):
            index = int(wanted) % len(header)
        else:
            raise UserError(f"{path}: no column {wanted!r} for {flag}, only {', '.join(header)}")
        cells = table.column(index)
        if flag == "--time-column" and pa.types.is_temporal(cells.type) and not cells.null_count:
            return cells.to_numpy(), header[index]
        values = np.empty(len(cells))
        for row, cell in enumerate(cells.to_pylist()):
            try:
                values[row] = math.nan if cell is None else float(cell)
            except (TypeError, ValueError):
                values[row] = math.nan
            if not math.isfinite(values[row]):
                what = "empty or NaN" if cell is None or cell != cell else repr(cell)
                raise UserError(f"{path}: row {row + 2}, column {header[index]!r}: {what}, a number is needed")
        return values, header[index]

    values, label = numbers("-1" if column is None else column, "--column")
    times, time_label = np.arange(float(len(values))), "row number"
    if time_column is not None:
        times, time_label = numbers(time_column, "--time-column")
    if len(values) == 0 or np.ptp(values) <= 1e-9 * np.abs(values).max():
        raise UserError(f"{path}: column {label!r} is constant or has no rows; there is nothing to forecast")
    return Series(name or Path(path).stem, values, times, label, time_label, "real", hashlib.sha256(raw).hexdigest())


def fetch(name, data_dir):
    """Path of the known data set in `data_dir`, downloaded once and checked by its sha256; UserError if that fails."""
    file, digest = FILES[name]
    path = Path(data_dir) / file
    if path.exists():
        return path
    help_text = f"bring {file} into --data-dir {data_dir}, or take --dataset synthetic"
    try:
        with urllib.request.urlopen(URL + file, timeout=3) as answer:
            raw = answer.read()
    except (OSError, ValueError, http.client.HTTPException) as problem:  # URLError is an OSError
        raise UserError(f"{URL}{file}: {problem}; {help_text}") from None
    if hashlib.sha256(raw).hexdigest() != digest:
        raise UserError(f"{URL}{file}: {len(raw):,} bytes with another sha256 than expected; {help_text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as target:
        target.write(raw)
    return path


def load_series(args):
    """{name: Series} of --data or --dataset; with neither y_w, or the embedded series if that cannot be had."""
    if args.data:
        series = read_series(args.data, args.column, args.time_column)
        return {series.name: series}
    names = args.dataset or ["y_w"]
    loaded = {}
    for name in names:
        if name != "synthetic":
            try:
                loaded[name] = read_series(fetch(name, args.data_dir), "1", "0", name)
                continue
            except UserError as problem:
                if args.dataset:
                    raise
                note(f"no real data ({problem}): the embedded series is used, all figures are about synthetic sensors")
        values = generate_series(seed=0)
        loaded["synthetic"] = Series("synthetic", values, np.arange(len(values)) / 30, "signal", "time [h]", "embedded",
                                     hashlib.sha256(values).hexdigest())
    return loaded


def seed_split(count):
    """(training, validation) window numbers, 80/20 at random, in the seed's own order (generator seed 42)."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(42))
    return order[: int(0.8 * count)], order[int(0.8 * count) :]


# --- Models: each reads [batch, time] normalized values --------------------------------------------------------------


class LSTM(nn.Module):
    """The seed's LSTM: [batch, time] -> [batch, 1], or [batch, time] without `last_only`. 50,497 parameters."""

    horizon = 1

    def __init__(self, hidden_dim=64, num_layers=2):
        super().__init__()
        self.name = f"lstm-1-{hidden_dim}-{num_layers}-1"
        self.lstm = nn.LSTM(1, hidden_dim, num_layers, batch_first=True)
        self.head = nn.Linear(hidden_dim, 1)
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if "bias" in name else nn.init.xavier_uniform_(parameter)

    def forward(self, x, last_only=True):
        hidden = self.lstm(x.unsqueeze(-1))[0]  # [batch, time, hidden_dim]
        return self.head(hidden[:, -1:] if last_only else hidden).squeeze(-1)


class Positions(nn.Module):
    """Puts positions into [..., time, width]: `randpe` adds learned rows, `sinpe` waves, `rope` rotates pairs.

    Sources: Vaswani et al. 2017 (sinpe), Su et al. 2021 (rope, pairs are the two halves of the width).
    """

    def __init__(self, kind, width, block_size):
        super().__init__()
        self.kind = kind
        if kind == "randpe":
            self.table = nn.Parameter(torch.randn(block_size, width))
        elif kind != "none":
            angles = torch.arange(block_size).unsqueeze(1) * 10000 ** (-torch.arange(0, width, 2) / width)
            sin, cos = angles.sin(), angles.cos()  # [block_size, width / 2]
            table = torch.stack([sin, cos], -1).flatten(1)[:, :width]
            if kind == "rope":  # cos of both halves, sin with the sign that the other half comes with
                table = torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)])
            self.register_buffer("table", table, persistent=False)

    def forward(self, x, first=0):
        if self.kind == "none":
            return x
        table = self.table[..., first : first + x.shape[-2], :]
        if self.kind == "rope":
            return x * table[0] + x.roll(x.shape[-1] // 2, -1) * table[1]
        return x + table


def attend(q, k, values, causal, first=0):
    """Sum over the heads of softmax(q kᵀ / √width) times one value a key, grouped-query; [batch, queries].

    q [batch, heads, queries, width]; k [batch, kv_heads, keys, width]; values [batch, kv_heads, keys, group], one for
    each of the `group` neighbouring heads that share a key head; k and values come without `batch` if they are the same
    for all. `first` is the position of the first query; with `causal` a query sees the keys up to its own position.
    Blocks of queries skip the keys that they may not see, which for narrow heads on a CPU takes half the time of
    scaled_dot_product_attention.
    """
    batch, heads, queries, width = q.shape
    kv_heads, keys, group = values.shape[-3:]
    block = max(16, 64 // heads, queries // 8) if causal and k.dim() == 4 else queries
    k, parts = k.transpose(-1, -2) * width**-0.5, []
    for start in range(0, queries, block):
        rows = q[:, :, start : start + block].reshape(batch, kv_heads, -1, width)  # [batch, kv_heads, group * block, …]
        seen = min(keys, first + start + block) if causal else keys
        scores = (rows @ k[..., :seen]).view(batch, heads, -1, seen)
        if causal:  # added, since filling in place would cost a copy in the backward pass
            scores = scores + torch.full_like(scores[0, 0], -math.inf).triu(first + start + 1)
        weights = scores.softmax(-1).view(batch, kv_heads, -1, seen)
        all_pairs = (weights @ values[..., :seen, :]).view(batch, kv_heads, group, -1, group)  # of heads in a group
        parts.append(all_pairs.diagonal(dim1=2, dim2=4).sum((1, 3)))
    return torch.cat(parts, 1)


class Attention(nn.Module):
    """The seed's four attention models: one layer, no residual, no MLP; [batch, time] -> [batch, 1] or [batch, time].

    `att` and `att_mh` attend over the window. With `vocab_size` (`vq`, `vq_mh`) a learned codebook takes the place of
    keys and values, and the embedded input is the query as it is: no time step sees another one.
    `inln`, `qln`, `kln`: LayerNorm on the embedded input, queries, keys. `norm_pe` puts the positions on queries and
    keys (after their norms, so that rope stays relative; the seed's order was the other way round) instead of on the
    input. With `last_only` just the last query is computed, which is all that a forecast needs.
    """

    horizon = 1

    def __init__(self, kind, d_model=64, n_heads=1, kv_heads=1, vocab_size=None, block_size=512, inln=False, qln=False,
                 kln=False, causal=False, norm_pe=False, pe="none"):
        super().__init__()
        width = d_model // n_heads
        self.n_heads, self.kv_heads, self.vocab_size = n_heads, kv_heads, vocab_size
        self.causal, self.norm_pe = causal, norm_pe
        sizes = ([vocab_size] if vocab_size else []) + [d_model] + ([n_heads, kv_heads] if kind[-3:] == "_mh" else [])
        flags = {"is_inln": inln, "is_qln": qln, "is_kln": kln, "is_causal": causal, "is_n_pe": norm_pe}
        named = [flag for flag, is_set in flags.items() if is_set] + [pe] * (pe != "none")
        self.name = "-".join(map(str, [kind, *sizes, 1, 1, block_size, *named]))
        self.fc_in = nn.Linear(1, d_model)
        self.position = Positions(pe, width if norm_pe else d_model, block_size)
        self.ln_in = nn.LayerNorm(d_model) if inln else nn.Identity()
        self.ln_q = nn.LayerNorm(width) if qln else nn.Identity()
        self.ln_k = nn.LayerNorm(width) if kln else nn.Identity()
        if vocab_size:
            self.codebook = nn.Parameter(torch.randn(kv_heads, vocab_size, width))
        else:
            self.fc_q = nn.Linear(d_model, d_model, bias=False)
            self.fc_k = nn.Linear(d_model, kv_heads * width, bias=False)
            self.fc_v = nn.Linear(d_model, kv_heads * width, bias=False)
        self.fc_out = nn.Linear(d_model, 1, bias=bool(vocab_size))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # `att` of the seed projects to q, k, v in one matrix, whose Xavier bound is smaller by this factor.
                joint = kind == "att" and name in ("fc_q", "fc_k", "fc_v")
                nn.init.xavier_uniform_(module.weight, gain=0.5**0.5 if joint else 1.0)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def split_heads(self, x):
        return x.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)  # [batch, kv_heads, time, width]

    def forward(self, x, last_only=True):
        first = x.shape[1] - 1 if last_only else 0
        h = self.fc_in(x.unsqueeze(-1))  # [batch, time, d_model]
        h = self.ln_in(h if self.norm_pe else self.position(h))
        if self.vocab_size:
            q, k, v = h[:, first:], self.codebook, self.codebook
        else:
            q, k, v = self.fc_q(h[:, first:]), self.split_heads(self.fc_k(h)), self.split_heads(self.fc_v(h))
        q = q.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # [batch, heads, time, width]
        q, k = self.ln_q(q), self.ln_k(k)
        if self.norm_pe:
            q, k = self.position(q, first), k if self.vocab_size else self.position(k)
        # The output layer is linear, so it may as well be applied to each value before the heads are added up.
        heads_out = self.fc_out.weight.view(self.kv_heads, -1, q.shape[-1])  # [kv_heads, group, width]
        out = attend(q, k, v @ heads_out.transpose(-1, -2), self.causal, first)
        return out if self.fc_out.bias is None else out + self.fc_out.bias


class CodebookAR(nn.Module):
    """Ours, `vq_ar`: attention over a codebook whose values are autoregressions, so that it does look back.

    The window is pooled to means over lags 1, 2, 3-4, 5-8, … (few weights, smooth in the lag), taken relative to the
    level (the mean of the last 4 values): what is forecast is a residual on that. A query, an MLP of the pooled shape
    divided by its spread, attends over `vocab_size` keys; each value is a linear map from the pooled lags to the next
    `horizon` residuals. Rises and decays so get a row each, instead of one compromise. `members` such models are
    trained side by side from different starts, and the forecast is their mean.

    [batch, time] -> [batch, horizon]; with `each_member` [members, batch, horizon].
    """

    vocab_size, hidden_dim, key_dim, horizon, members = 4, 32, 16, 16, 8

    def __init__(self, time_steps):
        super().__init__()
        self.name = f"vq_ar-{self.vocab_size}-{self.hidden_dim}-{self.horizon}-{self.members}"
        edges = [0] + [2**i for i in range(math.ceil(math.log2(time_steps)))] + [time_steps]
        pool = torch.zeros(time_steps, len(edges) - 1)
        for i, (near, far) in enumerate(itertools.pairwise(edges)):
            pool[time_steps - far : time_steps - near, i] = 1 / (far - near)
        self.register_buffer("pool", pool, persistent=False)  # [time, lags]
        lags = len(edges) - 1

        def normal(*shape):
            return nn.Parameter(torch.randn(self.members, *shape) * shape[0] ** -0.5)

        self.fc_in, self.fc_query = normal(lags + 1, self.hidden_dim), normal(self.hidden_dim, self.key_dim)
        self.keys = normal(self.key_dim, self.vocab_size)
        self.bias = nn.Parameter(torch.zeros(self.members, 1, self.hidden_dim))
        self.values = nn.Parameter(torch.zeros(self.members, self.vocab_size * (lags + 2), self.horizon))

    def forward(self, x, each_member=False):
        level = x[:, -4:].mean(1, keepdim=True)  # [batch, 1]
        lags = x @ self.pool - level  # [batch, lags]
        spread = (x - level).std(1, keepdim=True) + 0.05
        shape = torch.cat([lags / spread, spread.log()], 1)
        query = F.gelu(shape @ self.fc_in + self.bias) @ self.fc_query  # [members, batch, key_dim]
        weights = (query @ self.keys).softmax(-1)  # [members, batch, vocab_size]
        inputs = torch.cat([lags, level, torch.ones_like(level)], 1)
        mixed = (weights.unsqueeze(-1) * inputs.unsqueeze(1)).flatten(2)  # [members, batch, vocab_size * (lags + 2)]
        forecasts = level + mixed @ self.values
        return forecasts if each_member else forecasts.mean(0)


def make_model(spec):
    """The untrained network of a run's `spec`, its weights drawn with the run's seed."""
    torch.manual_seed(spec["seed"])
    options = spec["options"]
    if spec["model"] == "lstm":
        return LSTM(**options)
    return CodebookAR(spec["time_steps"]) if spec["model"] == "vq_ar" else Attention(spec["model"], **options)


# --- Training ---------------------------------------------------------------------------------------------------------


def window_loss(model, windows, spec):
    """Loss of windows [batch, time_steps + horizon]: at every step (`align_target`), at the last, or over `horizon`."""
    x = windows[:, : spec["time_steps"]]
    if spec["model"] == "vq_ar":  # Huber: a few rises of the series would else outweigh all the rest
        forecasts = model(x, each_member=True)
        target = windows[:, spec["time_steps"] :].expand_as(forecasts)
        return F.huber_loss(forecasts, target, delta=0.05)
    if spec["align_target"]:
        return F.mse_loss(model(x, last_only=False).float(), windows[:, 1:])
    return F.mse_loss(model(x).float(), windows[:, -1:])


def train(model, z, fitting, validation, spec, shuffle):
    """Fit `model` to the windows of z [rows] that begin at rows `fitting`; returns {train_loss: [epochs], val_loss: …}.

    The seed went through its random windows in one fixed order (`shuffle` False). Adam; ours with warm-up and cosine.
    """
    windows = z.unfold(0, spec["time_steps"] + model.horizon, 1)  # a view
    fitting, validation = (rows[rows < len(windows)].to(z.device) for rows in (fitting, validation))
    steps = spec["epochs"] * math.ceil(len(fitting) / spec["batch_size"])
    optimizer = torch.optim.Adam(model.parameters(), spec["learning_rate"], fused=True)
    ours = spec["model"] == "vq_ar"
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / (0.05 * steps), 1) * (
        0.5 + 0.5 * math.cos(math.pi * step / steps)) if ours else 1.0)
    history = {"train_loss": [], "val_loss": []}
    for _ in range(spec["epochs"]):
        model.train()
        order = fitting[torch.randperm(len(fitting), device=z.device)] if shuffle else fitting
        losses = []
        for rows in order.split(spec["batch_size"]):
            with torch.autocast(z.device.type, torch.bfloat16, enabled=spec["bfloat16"]):
                loss = window_loss(model, windows[rows], spec)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        history["train_loss"].append(torch.stack(losses).mean().item())
        if not math.isfinite(history["train_loss"][-1]):
            raise UserError(f"the loss in epoch {len(history['train_loss'])} is not finite; lower the --learning-rate")
        model.eval()
        with torch.inference_mode(), torch.autocast(z.device.type, torch.bfloat16, enabled=spec["bfloat16"]):
            losses = [window_loss(model, windows[rows], spec) for rows in validation.split(256)]
            history["val_loss"].append(torch.stack(losses).mean().item() if losses else None)
    return history


# --- Forecasts: `predict` maps [batch, time_steps] to [batch, horizon] ------------------------------------------------


@torch.inference_mode()
def one_step(predict, z, start, stop, time_steps):
    """Forecasts [stop - start] of z [rows] at rows start to stop, each from the true values before it."""
    windows = z.unfold(0, time_steps, 1)[start - time_steps : stop - time_steps]
    return torch.cat([predict(some)[:, 0] for some in windows.split(256)])


@torch.inference_mode()
def free_run(predict, history, steps):
    """Continue `history` [time_steps] by `steps` values, feeding each forecast back; all of the horizon is taken."""
    if isinstance(predict, LSTM):
        return free_run_lstm(predict, history, steps)
    known, filled = len(history), 0
    values = torch.cat([history, history.new_zeros(steps)])
    while filled < steps:
        ahead = predict(values[None, filled : filled + known])[0][: steps - filled]
        values[known + filled : known + filled + len(ahead)] = ahead
        filled += len(ahead)
    return values[known:]


def free_run_lstm(model, history, steps):
    """The same for an LSTM that starts from zero in every window, in one cell step a value instead of time_steps.

    All windows that will hold the newest value advance by it together: one row of the state for each window.
    """
    lstm, time_steps, forecasts = model.lstm, len(history), []
    weights = [[getattr(lstm, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
               for layer in range(lstm.num_layers)]
    states = [[history.new_zeros(time_steps, lstm.hidden_size) for _ in "hc"] for _ in weights]
    for row in range(time_steps + steps - 1):
        value = history[row] if row < time_steps else forecasts[row - time_steps]
        x = value.expand(time_steps, 1)
        for layer, state in enumerate(states):
            for part in state:
                part[row % time_steps] = 0  # a window begins here
            states[layer] = list(torch.lstm_cell(x, state, *weights[layer]))
            x = states[layer][0]
        if row >= time_steps - 1:
            forecasts.append(model.head(x[(row + 1) % time_steps])[0])  # the oldest window is complete
    return torch.stack(forecasts)


@dataclass
class Fit:
    """What one fit on one part of a series has made."""

    predict: object  # a network or, for a baseline, a function: [batch, time_steps] -> [batch, horizon]
    z: torch.Tensor  # [rows] the whole series, normalized with mean and std
    mean: float
    std: float
    history: dict | None = None
    strength: float | None = None  # of ridge

    def scores(self, start, stop, time_steps):
        """{batch, regressive: mean squared error in original units} over rows start to stop, and the forecasts."""
        forecasts = {"batch": one_step(self.predict, self.z, start, stop, time_steps),
                     "regressive": free_run(self.predict, self.z[start - time_steps : start], stop - start)}
        errors = {name: (forecast - self.z[start:stop]).square().mean().item() * self.std**2
                  for name, forecast in forecasts.items()}
        errors = {name: error if math.isfinite(error) else DIVERGED for name, error in errors.items()}
        return errors, {name: (forecast * self.std + self.mean).cpu() for name, forecast in forecasts.items()}


def fit(spec, values, fitting, validation, statistics, shuffle, strength=None):
    """Fit a network or a baseline to the windows from rows `fitting` on, normalized by values[:statistics].

    The baselines: mean (0 in normalized values), last (persistence), and ridge on the lags, whose `strength` is, if not
    given, the one with the least error on the windows from `validation` on.
    """
    mean, std, time_steps = float(values[:statistics].mean()), float(values[:statistics].std()), spec["time_steps"]
    if not std > 0:
        raise UserError(f"the first {statistics} values are constant")
    z = torch.tensor((values - mean) / std, dtype=torch.float32, device=spec["device"])
    if spec["model"] == "mean":
        return Fit(lambda x: torch.zeros_like(x[:, :1]), z, mean, std)
    if spec["model"] == "last":
        return Fit(lambda x: x[:, -1:], z, mean, std)
    if spec["model"] == "ridge":
        from sklearn.linear_model import Ridge

        windows = z.unfold(0, time_steps + 1, 1).cpu().double().numpy()
        x, y = windows[:, :-1], windows[:, -1]
        strengths = 10.0 ** np.arange(-4, 4.1, 0.5) if strength is None else [strength]
        models = [Ridge(alpha).fit(x[fitting], y[fitting]) for alpha in strengths]
        best = min(models, key=lambda model: np.mean((model.predict(x[validation]) - y[validation]) ** 2))
        weights, bias = torch.from_numpy(best.coef_).to(z), float(best.intercept_)
        return Fit(lambda x: (x @ weights + bias).unsqueeze(1), z, mean, std, strength=best.alpha)
    model = make_model(spec).to(z.device)
    history = train(model, z, fitting, validation, spec, shuffle)
    return Fit(model.eval(), z, mean, std, history)


# --- One run: a model, a data set, its knobs and a seed ---------------------------------------------------------------


def forecast_horizon(spec):
    """Values that one forecast of the run's model holds."""
    return CodebookAR.horizon if spec["model"] == "vq_ar" else 1


def needed_rows(spec):
    """The shortest series that gives each part of the run's protocols at least one window."""
    horizon = forecast_horizon(spec)
    window = spec["time_steps"] + horizon
    if spec["protocol"] == "seed":
        return window + 10
    return max(window + 10, math.ceil((window + 1) / FIT), math.ceil((horizon + 1) / (CHOOSE - FIT)))


def run_one(spec, values):
    """Fit and score one run on `values` [rows]; returns (row for the table, {forecasts and weights}).

    Whatever goes wrong is recorded in the row, so that the other runs go on.
    """
    torch.set_num_threads(1)
    began, rows, time_steps = time.perf_counter(), len(values), spec["time_steps"]
    row, state, histories = dict(spec), {"forecasts": {}}, {}
    try:
        if spec["protocol"] in ("seed", "both"):
            fitting, validation = seed_split(rows - time_steps)
            result = fit(spec, values, fitting, validation, rows, shuffle=False)
            errors, state["forecasts"]["seed"] = result.scores(time_steps, rows, time_steps)
            row |= {REGRESSIVE: errors["regressive"], BATCH: errors["batch"]}
            if result.history:
                row |= {f"Final/{name}": losses[-1] for name, losses in result.history.items()}
                histories["seed"] = result.history
        if spec["protocol"] in ("holdout", "both"):
            fitted, chosen, horizon = int(FIT * rows), int(CHOOSE * rows), forecast_horizon(spec)
            starts = torch.arange(rows - time_steps)
            validation = starts[fitted - time_steps : chosen - time_steps - horizon + 1]
            result = fit(spec, values, starts[: fitted - time_steps - horizon + 1], validation, fitted, shuffle=True)
            row |= {f"validation/mse_{name}": error
                    for name, error in result.scores(fitted, chosen, time_steps)[0].items()}
            if result.history:
                histories["holdout"] = result.history
            if spec["refit"]:
                result = fit(spec, values, starts[: chosen - time_steps - horizon + 1], validation, chosen, True,
                             result.strength)
            errors, state["forecasts"]["holdout"] = result.scores(chosen, rows, time_steps)
            row |= {f"holdout/mse_{name}": error for name, error in errors.items()}
        if isinstance(result.predict, nn.Module):
            state |= {"weights": result.predict.state_dict(), "mean": result.mean, "std": result.std, "spec": spec}
            row["parameters"] = sum(parameter.numel() for parameter in result.predict.parameters())
    except Exception as problem:
        row["error"] = f"{type(problem).__name__}: {problem}"
    if resource:  # in KiB, on macOS in bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row["peak_memory_mib"] = round(peak / 2 ** (20 if sys.platform == "darwin" else 10))
    return row | {"seconds": round(time.perf_counter() - began, 2), "history": histories}, state


def make_specs(args, series, device):
    """([spec of each run], [(run, reason) of those that cannot be]): every combination once, the slowest first."""
    specs, skipped = {}, {}
    bfloat16 = has_bfloat16(device)
    shared = {"protocol": args.protocol, "refit": args.refit, "epochs": args.epochs, "batch_size": args.batch_size,
              "device": str(device)}
    for dataset, model, time_steps in itertools.product(series, BASELINES + args.model, args.time_steps):
        knobs = [(None, None, None)] if model in BASELINES else itertools.product(
            args.learning_rate, args.d_model, args.pe or [None])
        for rate, d_model, pe in knobs:
            spec = {"model": model, "name": model, "dataset": dataset, "time_steps": time_steps}
            spec |= shared | {"learning_rate": rate, "bfloat16": bfloat16 and model not in ("vq_ar", *BASELINES)}
            if model not in BASELINES:
                spec |= {"options": model_options(model, d_model, pe, time_steps, args), "seed": 0}
                align = MODEL_DEFAULTS[model].get("align_target", True)
                spec["align_target"] = align if args.align_target is None else args.align_target
                if spec["align_target"] and model in ("att", "att_mh") and not spec["options"]["causal"]:
                    raise UserError(f"{model} with --align-target and --no-causal would see its own answer; take "
                                    "--no-align-target or --causal")
                spec["name"] = make_model(spec).name
            for seed in [args.seed] if model in BASELINES else range(args.seed, args.seed + args.runs):
                spec = spec | {"seed": seed}
                combination = f"{spec['name']}_{dataset}_ts{time_steps}"
                combination += "" if rate is None else f"_lr{rate:g}"
                spec |= {"combination": combination, "id": f"{combination}_seed{seed}"}
                short = needed_rows(spec) - len(series[dataset].values)
                if short > 0:
                    skipped[combination] = (f"{dataset} has {len(series[dataset].values)} values, --time-steps "
                                            f"{time_steps} needs {needed_rows(spec)}: {short} too few")
                else:
                    specs[spec["id"]] = spec
    cost = {"lstm": 3, "att_mh": 4, "vq_mh": 2, "att": 2, "vq": 1}
    return sorted(specs.values(), key=lambda spec: -cost.get(spec["model"], 0) * spec["time_steps"]), skipped


def model_options(model, d_model, pe, time_steps, args):
    """Constructor arguments of `model`: the seed's, where the command line does not say otherwise."""
    if model == "vq_ar":
        return {}
    if model == "lstm":
        return {"hidden_dim": args.hidden_dim, "num_layers": args.num_layers}
    options = {"d_model": d_model, "block_size": max(args.block_size, time_steps)} | MODEL_DEFAULTS[model]
    options |= {"pe": pe} if pe else {}
    options |= {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    if model in ("att_mh", "vq_mh"):
        options |= {name: getattr(args, name) for name in ("n_heads", "kv_heads") if getattr(args, name) is not None}
    if model in ("vq", "vq_mh"):
        options["vocab_size"] = args.vocab_size
    width = d_model / options["n_heads"]
    if width % 1 or options["n_heads"] % options["kv_heads"]:
        raise UserError(f"{model}: --kv-heads {options['kv_heads']} must divide --n-heads {options['n_heads']}, and "
                        f"that --d-model {d_model}")
    if options["pe"] == "rope" and (width if options.get("norm_pe") else d_model) % 2:
        raise UserError(f"{model}: --pe rope rotates pairs, so its width must be even; change --d-model or --n-heads")
    return options


def run_all(specs, series, jobs, backend):
    """Yield (row, state) of each run as it ends, `jobs` at a time, each with one thread."""
    from joblib import Parallel, delayed, parallel_config

    # The workers' allocator (glibc) keeps what is freed; to map each step's tensors anew took a tenth of the time.
    os.environ |= {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())  # one job runs in this process
        if backend == "dask":
            try:
                import dask
                from distributed import Client, LocalCluster
            except ImportError:
                raise UserError("--backend dask needs the package: pip install 'dask[distributed]'") from None
            # A cluster whose address is in DASK_SCHEDULER_ADDRESS, or one on this machine.
            cluster = None if dask.config.get("scheduler-address", None) else stack.enter_context(
                LocalCluster(n_workers=jobs, threads_per_worker=1, dashboard_address=None))
            stack.enter_context(Client(cluster))
        stack.enter_context(parallel_config(backend, n_jobs=jobs))
        tasks = (delayed(run_one)(spec, series[spec["dataset"]].values) for spec in specs)
        yield from Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="all")(tasks)


# --- Tables -----------------------------------------------------------------------------------------------------------


def mean_rows(rows):
    """One row for each combination: every number as [mean, half width of the 95 % interval] over its seeds."""
    groups = {}
    for row in rows:
        groups.setdefault(row["combination"], []).append(row)
    merged = []
    for group in groups.values():
        numbers = [key for key in group[0] if "/" in key or key == "seconds"]
        spread = {key: [float(part) for part in mean_and_interval([row[key] for row in group])] for key in numbers}
        merged.append(group[0] | spread)
    return merged


def show(value):
    """A [mean, half width] pair, a number or nothing, as text."""
    if value is None:
        return "–"
    mean, width = value if isinstance(value, list) else (value, math.nan)
    if mean > DIVERGED / 1000:
        return "diverged"
    return f"{mean:.6g}" + (f" ± {width:.3g}" if math.isfinite(width) else "")


def markdown_table(rows):
    """Rows [{column: text}] as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def networks_of(rows):
    """The rows, or specs, that are not of a baseline."""
    return [row for row in rows if row["model"] not in BASELINES]


def ranking(rows):
    """What to sort by: the free run of the seed's protocol; where that was not run, the error on validation."""
    return REGRESSIVE if REGRESSIVE in rows[0] else "validation/mse_batch"


def result_table(rows, with_seed):
    """The ten best networks and the baselines with the same time steps; `with_seed`: beside the seed's own figures."""
    rows = sorted(rows, key=lambda row: row[ranking(rows)][0])
    ten = networks_of(rows)[:10]
    shown, table = {row["time_steps"] for row in ten}, []
    for row in rows:
        if row in ten or (row["model"] in BASELINES and row["time_steps"] in shown):
            known = row["name"] == SEED_NAMES.get(row["model"]) and row["time_steps"] == SEED_TIME_STEPS
            seeds = SEED_TABLES[row["dataset"]] if with_seed and known else {}
            seed = seeds.get((row["model"], row["learning_rate"]))
            columns = {"Model": row["name"], "time steps": row["time_steps"]}
            columns["learning rate"] = show(row["learning_rate"])
            if REGRESSIVE in row:
                columns |= {f"{name} (in-sample)": show(row[name]) for name in (REGRESSIVE, BATCH)}
                columns |= {name: show(None if row["model"] == "vq_ar" else row.get(name))
                            for name in ("Final/train_loss", "Final/val_loss")}
                columns |= {"seed's regressive": show(seed and seed[0]), "seed's batch": show(seed and seed[1])}
            if "holdout/mse_batch" in row:
                columns |= {name: show(row[name]) for name in HOLDOUT_COLUMNS}
            table.append(columns | {"seconds": show(row["seconds"])})
    return markdown_table(table)


def chosen_table(rows):
    """For each model the combination with the least one-step error on validation, and its test beside ridge's."""
    table = []
    for model in BASELINES + NETWORKS:
        own = [row for row in rows if row["model"] == model]
        if own:
            best = min(own, key=lambda row: row["validation/mse_batch"][0])
            ridge = next(row for row in rows if row["model"] == "ridge" and row["time_steps"] == best["time_steps"])
            columns = {"Model": best["name"], "time steps": best["time_steps"],
                       "learning rate": show(best["learning_rate"])}
            columns |= {name: show(best[name]) for name in HOLDOUT_COLUMNS}
            table.append(columns | {f"ridge {name}": show(ridge[name]) for name in HOLDOUT_COLUMNS[1:]})
    return markdown_table(table)


def summary(rows, failed, skipped, series, args):
    """All tables as Markdown."""
    text = []
    for name, one in series.items():
        mine = mean_rows([row for row in rows if row["dataset"] == name])
        if not networks_of(mine):
            continue
        seeds = f"seed {args.seed}"
        if args.runs > 1:
            seeds = f"mean ± 95 % interval (Student's t) of seeds {args.seed} to {args.seed + args.runs - 1}"
        text.append(f"# forecast.py: {name} ({one.source} data, {len(one.values)} values of {one.column}), {seeds}")
        text.append(result_table(mine, not args.data and name in SEED_TABLES))
        if args.protocol != "holdout":
            text.append("`Predict/…`: the seed's protocol, in-sample: squared error over the whole series from the "
                        "first time steps on (so other rows for other time steps); `batch` one step ahead, "
                        "`regressive` free-running (`vq_ar` feeds back 16 values at a time, the others one).")
        if args.protocol != "seed":
            text.append("`holdout/…`: the same on the last 20 %, never seen; each model as chosen by `validation` "
                        "(the 8 % before), beside ridge with the same time steps:")
            text.append(chosen_table(mine))
    if skipped:
        text.append(f"Skipped, {len(skipped)} combinations: " + "; ".join(dict.fromkeys(skipped.values())) + ".")
    if failed:
        text.append("Failed: " + "; ".join(f"{row['id']}: {row['error']}" for row in failed) + ".")
    return "\n\n".join(text) + "\n"


# --- Pictures ---------------------------------------------------------------------------------------------------------


def best_runs(rows, key):
    """{model: its run with the least `key`}."""
    best = {}
    for row in rows:
        if key in row and row[key] < best.get(row["model"], {key: math.inf})[key]:
            best[row["model"]] = row
    return best


def load_checkpoint(path):
    """What a run's .pt file holds; UserError if it is absent or damaged."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"forecasts", "data"} <= state.keys():
            raise ValueError("other content")
        return state
    except (RuntimeError, LookupError, EOFError, OSError, ValueError, TypeError, AttributeError,
            pickle.UnpicklingError) as problem:
        why = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise UserError(f"{path}: no checkpoint of a run ({why})") from None


def label(text):
    """Names for matplotlib, which would take dollar signs for formulas."""
    return text.replace("$", r"\$")


def plot_series(series, rows, run_dir):
    """The forecasts of the best run of each model: seed protocol on the left, hold-out on the right."""
    keys = {"seed": (REGRESSIVE, "seed's protocol (in-sample)"),
            "holdout": ("validation/mse_batch", "hold-out (last 20 %)")}
    best = {protocol: best_runs(rows, key) for protocol, (key, _) in keys.items()}
    protocols = [protocol for protocol in keys if best[protocol]]
    models = [model for model in ["ridge", *NETWORKS] if model in best[protocols[0]]]
    title = f"{label(series.name)}: forecasts of the best run of each model"
    fig, axes = new_figure(title, len(models), len(protocols),
                           (7 * len(protocols), 1.9 * len(models) + 1))
    for axis, (model, protocol) in zip(axes, itertools.product(models, protocols)):
        row = best[protocol][model]
        forecasts = load_checkpoint(run_dir / "runs" / f"{row['id']}.pt")["forecasts"][protocol]
        start = len(series.values) - len(forecasts["batch"])
        shown = slice(max(0, start - len(forecasts["batch"]) // 2), None)
        axis.plot(series.times[shown], series.values[shown], color="0.75", linewidth=1, label="series")
        axis.plot(series.times[start:], forecasts["batch"], color=COLORS[0], linewidth=0.9, label="one step ahead")
        axis.plot(series.times[start:], forecasts["regressive"], "--", color=COLORS[3], linewidth=1.6,
                  label="free-running")
        axis.axvline(series.times[start], color="k", linestyle=":", linewidth=1.2, label="start of the forecasts")
        rate = "" if row["learning_rate"] is None else f", rate {row['learning_rate']:g}"
        axis.set_title(f"{model}, {row['time_steps']} steps{rate}; {keys[protocol][1]}", fontsize=9)
    for axis in axes[-len(protocols) :]:
        axis.set_xlabel(label(series.time_label))
    fig.supylabel(label(series.column), fontsize=10)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save_figure(fig, run_dir / f"forecasts_{series.name}.png")


def plot_learning_curves(series, rows, run_dir):
    """Training and validation loss over the epochs, for the best run of each network."""
    best = {model: row for model, row in best_runs(rows, ranking(rows)).items() if row["history"]}
    fig, axes = new_figure(f"{label(series.name)}: learning curves of the best run of each model", 2, 3, (11, 6))
    for axis, model in itertools.zip_longest(axes, [model for model in NETWORKS if model in best]):
        if model is None:
            axis.set_axis_off()
            continue
        protocol, history = next(iter(best[model]["history"].items()))
        for i, (name, losses) in enumerate(history.items()):
            plot_curve(axis, range(1, len(losses) + 1), np.array(losses, float), name.replace("_", " "), index=i)
        axis.set(title=f"{model}, rate {best[model]['learning_rate']:g}, {protocol}", xlabel="epoch", yscale="log",
                 ylabel="Huber loss" if model == "vq_ar" else "loss (normalized MSE)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save_figure(fig, run_dir / f"learning_curves_{series.name}.png")


def plot_heatmap(series, rows, run_dir):
    """The error that ranks the models over learning rates and time steps: mean over seeds, best over other knobs."""
    key = ranking(rows)
    rows = mean_rows(networks_of(rows))
    models = [model for model in NETWORKS if any(row["model"] == model for row in rows)]
    rates = sorted({row["learning_rate"] for row in rows})
    steps = sorted({row["time_steps"] for row in rows})
    fig, axes = new_figure(f"{label(series.name)}: {key} over the sweep (dark: low)", 1, len(models),
                           (max(8, len(models) * (1.2 + 0.75 * len(steps))), 1.6 + 0.5 * len(rates)))
    errors = np.full((len(models), len(rates), len(steps)), np.nan)
    for row in rows:
        place = models.index(row["model"]), rates.index(row["learning_rate"]), steps.index(row["time_steps"])
        errors[place] = np.nanmin([errors[place], row[key][0]])
    errors[errors > DIVERGED / 1000] = np.nan
    low, high = np.log(np.nanmin(errors)), np.log(np.nanmax(errors)) + 1e-9
    for axis, model, values in zip(axes, models, errors):
        shades = (np.log(values) - low) / (high - low)
        axis.imshow(shades, cmap="gray", vmin=-0.2, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                axis.text(j, i, f"{value:,.0f}", ha="center", va="center", fontsize=8,
                          color="white" if shades[i, j] < 0.4 else "black")
        axis.set_xticks(range(len(steps)), steps)
        axis.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axis.set(title=model, xlabel="time steps")
        axis.grid(visible=False)
    axes[0].set_ylabel("learning rate")
    save_figure(fig, run_dir / f"sweep_{series.name}.png")


def plot_horizon(series, rows, run_dir):
    """Root mean square error of the first h values of the free run, for the best run of each model."""
    protocol, key = ("holdout", "validation/mse_batch") if "validation/mse_batch" in rows[0] else ("seed", REGRESSIVE)
    title = f"{label(series.name)}: error of the free run against its horizon ({protocol})"
    fig, (axis,) = new_figure(title, size=(9, 4.5))
    for i, (model, row) in enumerate(best_runs(rows, key).items()):
        forecast = load_checkpoint(run_dir / "runs" / f"{row['id']}.pt")["forecasts"][protocol]["regressive"].numpy()
        error = np.sqrt(np.cumsum((forecast - series.values[-len(forecast) :]) ** 2) / np.arange(1, len(forecast) + 1))
        axis.plot(np.arange(1, len(error) + 1), error, LINES[i % 4], color=COLORS[i % 8], label=model,
                  marker="os^vDPXd*"[i], markevery=(len(error) // 40 * i, max(1, len(error) // 5)), markersize=5)
    axis.set(xlabel="horizon [values]", ylabel=f"RMSE up to there\n[{label(series.column)}]", xlim=(1, None))
    fig.legend(loc="outside right upper")
    save_figure(fig, run_dir / f"horizon_{series.name}.png")


# --- Results ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path):
    """Open `path` to write under another name, and rename at the end: a killed run leaves the older file whole."""
    try:
        with open(f"{path}.part", "wb") as file:
            yield file
        os.replace(f"{path}.part", path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; make room, or take another folder") from None


def plain(value):
    """NaN, which JSON does not have, becomes null."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_results(results, path):
    """Write plain JSON; returns the results as they are read back."""
    text = json.dumps(plain(results), indent=1, allow_nan=False)
    with whole_file(path) as file:
        file.write(text.encode())
    return json.loads(text)


def read_rows(path):
    """{id: row} of the runs that a runs.jsonl holds; a last line that a kill cut off is left out."""
    rows = {}
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                rows[row["id"]] = row
    return rows


def new_run(output_dir):
    """Make and return the next free folder run-001, run-002, … of this experiment."""
    parent = Path(output_dir) / "forecast"
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        taken = [int(run.name[4:]) for run in parent.glob("run-*") if run.name[4:].isdigit()]
        run_dir = parent / f"run-{max(taken, default=0) + 1:03d}"
        with contextlib.suppress(FileExistsError):  # another process may have been quicker
            run_dir.mkdir()
            return run_dir


def find_run(output_dir, name):
    """(folder, results so far) of the unfinished run called `name`, or of the newest one."""
    parent = Path(output_dir) / "forecast"
    newest_first = sorted(parent.glob("run-*"), key=lambda run: (len(run.name), run.name), reverse=True)
    for run_dir in newest_first if name == "newest" else [Path(name) if os.sep in name else parent / name]:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # not a run's file
            results = json.loads((run_dir / "results.json").read_text())
            if results["experiment"] == "forecast" and not results["finished"]:
                return run_dir, results
    name = "" if name == "newest" else f" {name!r}"
    raise UserError(f"{parent} has no unfinished run{name}; start one without --resume")


def describe_run(args, series):
    """What results.json holds from the beginning: arguments, versions, git commit, data."""
    folder = Path(globals().get("__file__", "forecast.py")).resolve().parent
    commit, packages = None, ("torch", "numpy", "scikit-learn", "joblib")
    with contextlib.suppress(OSError):  # no git on this machine
        git = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or None
    data = {name: {"source": one.source, "rows": len(one.values), "column": one.column, "sha256": one.sha256}
            for name, one in series.items()}
    return {"experiment": "forecast", "finished": False, "arguments": vars(args), "seed": args.seed,
            "git_commit": commit, "data": data,
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
    parser = Parser("forecast.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                    formatter_class=HelpFormatter)
    add = parser.add_argument
    several = {"nargs": "+", "metavar": "N"}
    add("--quick", action="store_true", help="everything, small: embedded data, 2 rates, 2 time steps, under 60 s")
    add("--dataset", nargs="+", choices=[*FILES, "synthetic"], help="known series, downloaded once into --data-dir, or "
        "the embedded one (default: y_w, or synthetic where that cannot be had)")
    add("--data", metavar="FILE.csv", help="your own series: a CSV file with a header, rows in order of time")
    add("--column", metavar="NAME|INDEX", help="its column of values, index from 0 (default: the last)")
    add("--time-column", metavar="NAME|INDEX", help="its column of times, for the axis (default: row numbers)")
    add("--data-dir", default="data", metavar="FOLDER", help="where downloads go and are looked for")
    add("--output-dir", default="outputs", metavar="FOLDER", help="results go to FOLDER/forecast/run-001, run-002, …")
    add("--resume", nargs="?", const="newest", metavar="RUN", help="go on with an unfinished sweep, the newest or the "
        "one named, with its own arguments: runs in its runs.jsonl are skipped, failed ones tried again")
    add("--predict-steps", type=between(int, 1), metavar="N", help="continue the series of --checkpoint by N values")
    add("--checkpoint", metavar="CKPT", help="a run's .pt file, for --predict-steps")
    add("--protocol", choices=["seed", "holdout", "both"], default="both", help="seed: random windows, scored over the "
        "whole series; holdout: fitted on 72 %%, chosen on 8 %%, tested on the last 20 %%")
    add("--refit", action=argparse.BooleanOptionalAction, default=True, help="hold-out: fit networks and ridge anew on "
        "the first 80 %% before the test")
    add("--model", nargs="+", choices=NETWORKS, default=NETWORKS, help="networks; the baselines always run, too")
    add("--time-steps", type=between(int, 2), default=[SEED_TIME_STEPS], help="values in a window", **several)
    add("--learning-rate", type=between(float, 1e-9, 10), default=SEED_RATES, help="of Adam; ours decays from it",
        **several)
    add("--d-model", type=between(int, 1), default=[64], help="width of the attention models", **several)
    add("--pe", nargs="+", choices=["none", "randpe", "sinpe", "rope"], help="positions (default: the seed's choice "
        "for each model)")
    add("--hidden-dim", type=between(int, 1), default=64, metavar="N", help="width of lstm")
    add("--num-layers", type=between(int, 1), default=2, metavar="N", help="layers of lstm")
    add("--n-heads", type=between(int, 1), metavar="N", help="query heads of att_mh and vq_mh (default: 8)")
    add("--kv-heads", type=between(int, 1), metavar="N", help="their key heads (default: att_mh 1, vq_mh 4)")
    add("--vocab-size", type=between(int, 1), default=64, metavar="N", help="codebook rows of vq and vq_mh")
    add("--block-size", type=between(int, 1), default=512, metavar="N", help="positions of the attention models; grows "
        "to --time-steps by itself")
    for flag, what in zip(FLAGS, ("LayerNorm on the input", "LayerNorm on queries", "LayerNorm on keys",
                                  "causal mask", "positions on queries and keys, not on the input (is_n_pe)")):
        add(f"--{flag.replace('_', '-')}", action=argparse.BooleanOptionalAction,
            help=f"{what} (default: the seed's choice for each model)")
    add("--align-target", action=argparse.BooleanOptionalAction, help="loss at every step, not at the last alone "
        "(default: all but lstm)")
    add("--epochs", type=between(int, 1), default=50, metavar="N", help="passes over the windows")
    add("--batch-size", type=between(int, 1), default=64, metavar="N", help="windows in a batch")
    add("--seed", type=between(int, 0, 2**31), default=42, metavar="N", help="of the weights and of the hold-out's "
        "order; the seed's split is always 42")
    add("--runs", type=between(int, 1, 999), default=1, metavar="N", help="seeds: mean ± 95 %% CI in the tables")
    add("--jobs", type=between(int, 1), default=os.cpu_count(), metavar="N", help="runs at a time, one thread each")
    add("--backend", choices=["loky", "dask"], default="loky", help="joblib's: this machine, or a dask cluster "
        "(DASK_SCHEDULER_ADDRESS, else one on this machine)")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu) or one of them")
    if "--quick" in argv:
        parser.set_defaults(dataset=["synthetic"], epochs=4, time_steps=[32, 64], learning_rate=[3e-3, 1e-3])
    args = parser.parse_args(argv)
    changed = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.resume and changed - {"resume", "output_dir", "device", "jobs", "backend", "data_dir"}:
        raise UserError("--resume goes with --output-dir, --data-dir, --jobs, --backend and --device only; a run keeps "
                        "its own arguments")
    if args.data and "dataset" in changed:
        raise UserError("--data and --dataset: take one of them")
    if args.checkpoint and changed - {"checkpoint", "predict_steps", "output_dir", "data_dir"}:
        raise UserError("--checkpoint goes with --predict-steps, --output-dir and --data-dir only; the series and the "
                        "model are its own")
    if args.data is None and (args.column or args.time_column):
        raise UserError("--column and --time-column go with --data")
    if (args.predict_steps is None) != (args.checkpoint is None):
        raise UserError("--predict-steps and --checkpoint go together")
    if args.data:
        args.data = str(Path(args.data).resolve())  # a resumed run may be started elsewhere
    return args


def continue_series(args, run_dir):
    """Forecast --predict-steps values beyond the end of the checkpoint's series: forecast.csv and forecast.png."""
    import pyarrow as pa
    import pyarrow.csv

    state = load_checkpoint(args.checkpoint)
    if "weights" not in state:
        raise UserError(f"{args.checkpoint}: holds no weights, so it is a baseline's; take a network's")
    spec, data = state["spec"], state["data"]
    again = argparse.Namespace(**data | {"data_dir": args.data_dir})
    (series,) = load_series(again).values()
    if series.sha256 != state["sha256"]:
        raise UserError(f"{args.checkpoint}: made of other data than {series.name} is now; train on it first")
    model = make_model(spec)
    model.load_state_dict(state["weights"])
    known = torch.tensor((series.values - state["mean"]) / state["std"], dtype=torch.float32)[-spec["time_steps"] :]
    values = free_run(model.eval(), known, args.predict_steps).double().numpy() * state["std"] + state["mean"]
    step = np.sort(np.diff(series.times))[len(series.times) // 2]  # the median, of dates too
    times = series.times[-1] + step * np.arange(1, len(values) + 1)
    with whole_file(run_dir / "forecast.csv") as file:
        pa.csv.write_csv(pa.table([times, values], names=[series.time_label, series.column]), file)
    fig, (axis,) = new_figure(f"{label(series.name)}: continued by {len(values)} values, {spec['name']}")
    axis.plot(series.times, series.values, color="0.6", linewidth=1, label="series")
    axis.plot(times, values, "--", color=COLORS[3], label="forecast")
    axis.set(xlabel=label(series.time_label), ylabel=label(series.column))
    fig.legend(loc="outside lower center", ncols=2)
    save_figure(fig, run_dir / "forecast.png")
    (run_dir / "summary.md").write_text(f"# forecast.py: {series.name} continued by {len(values)} values\n\n"
                                        f"{spec['name']}, {args.checkpoint}: forecast.csv, forecast.png\n")
    results = describe_run(args, {series.name: series}) | {"forecast": values.tolist()}
    return write_results(results | {"finished": True}, run_dir / "results.json")


def run_sweep(args, run_dir, before):
    """All runs that are not done yet, then tables and pictures; `before` is the results.json of a resumed sweep."""
    try:
        device = detect_device(args.device)
    except argparse.ArgumentTypeError as problem:
        raise UserError(f"--device: {problem}") from None
    began, series = time.perf_counter(), load_series(args)
    specs, skipped = make_specs(args, series, device)
    results = describe_run(args, series)
    if before and before["data"] != results["data"]:
        raise UserError(f"{run_dir}: the sweep began with other data; bring the files back or start a new one")
    for reason in dict.fromkeys(skipped.values()):
        note(f"skipped: {reason}")
    if not networks_of(specs):
        raise UserError(next(iter(skipped.values())))
    longest = max(spec["time_steps"] for spec in specs)
    if longest > args.block_size:
        note(f"--block-size {args.block_size} is extended to --time-steps, up to {longest}")
    write_results(results, run_dir / "results.json")

    (run_dir / "runs").mkdir(exist_ok=True)
    rows = {key: row for key, row in read_rows(run_dir / "runs.jsonl").items() if "error" not in row}
    with whole_file(run_dir / "runs.jsonl") as file:  # without a line that was cut off, and without failed runs
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows.values())
    todo = [spec for spec in specs if spec["id"] not in rows]
    if before:
        note(f"{len(rows)} runs are done, {len(todo)} to go")
    data = {"data": args.data, "column": args.column, "time_column": args.time_column}
    with tqdm(total=len(todo), unit="run", desc="sweep") as bar, open(run_dir / "runs.jsonl", "ab") as log:
        for row, state in run_all(todo, series, min(args.jobs, max(1, len(todo))), args.backend):
            buffer = io.BytesIO()
            torch.save(state | {"data": data | {"dataset": None if args.data else [row["dataset"]]},
                                "sha256": series[row["dataset"]].sha256}, buffer)
            with whole_file(run_dir / "runs" / f"{row['id']}.pt") as file:
                file.write(buffer.getbuffer())
            rows[row["id"]] = row = plain(row)
            log.write(json.dumps(row).encode() + b"\n")
            log.flush()
            bar.update()
            bar.set_postfix_str(f"{row['model']} {row['seconds']:.1f} s")
    failed = [row for row in rows.values() if "error" in row]
    good = [row for row in rows.values() if "error" not in row]
    for row in failed:
        note(f"{row['id']} failed: {row['error']}")
    if not networks_of(good):
        raise UserError(f"every run failed; the first: {failed[0]['error']}")
    swept = time.perf_counter() - began
    for name, one in series.items():
        mine = [row for row in good if row["dataset"] == name]
        if networks_of(mine):
            for plot in (plot_series, plot_learning_curves, plot_heatmap, plot_horizon):
                plot(one, mine, run_dir)
    (run_dir / "summary.md").write_text(summary(good, failed, skipped, series, args))
    results |= {"finished": not failed, "device": str(device), "skipped": skipped, "table": mean_rows(good),
                "failed": {row["id"]: row["error"] for row in failed},
                "seconds": {"sweep": round(swept, 1), "pictures": round(time.perf_counter() - began - swept, 1)}}
    return write_results(results, run_dir / "results.json")


def main(argv=None):
    """Run the experiment with `argv` as on a command line (default: this process's, in a notebook none).

    Returns the results dictionary; what a user can put right raises SystemExit(2), Ctrl-C SystemExit(130).
    """
    run_dir, resumed = None, None
    try:
        args = parse_args(([] if in_notebook() else sys.argv[1:]) if argv is None else argv)
        if args.resume:
            run_dir, resumed = find_run(args.output_dir, args.resume)
            given = {name: getattr(args, name) for name in ("output_dir", "data_dir", "jobs", "backend", "device")}
            args = argparse.Namespace(**resumed["arguments"] | given)
        run_dir = run_dir or new_run(args.output_dir)
        results = continue_series(args, run_dir) if args.checkpoint else run_sweep(args, run_dir, resumed)
    except KeyboardInterrupt:
        begun = run_dir and (run_dir / "results.json").exists()
        note(f"stopped; to go on: python forecast.py --resume {run_dir.name} --output-dir {args.output_dir}" if begun
             else "stopped")
        raise SystemExit(130) from None
    except UserError as problem:
        error = str(problem)
    except BrokenProcessPool:
        error = f"a worker was killed (out of memory?); go on with --resume {run_dir.name} and fewer --jobs"
    except OSError as problem:
        error = f"{problem.filename}: {problem.strerror}" if problem.filename else str(problem)
    else:
        print((run_dir / "summary.md").read_text())
        print(f"Everything is in {run_dir}")
        return results
    if run_dir and not resumed and not (run_dir / "runs").exists():  # leave no empty run behind
        shutil.rmtree(run_dir)
    print(f"forecast.py: error: {error}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
