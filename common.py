"""Shared by the five experiments: device detection, seeding and plotting helpers. Nothing else belongs here."""

import argparse
import random
import sys

import matplotlib
import numpy as np
import torch

# --- Device ------------------------------------------------------------------------------------


def detect_device(name="auto"):
    """The torch device called `name`; `auto` takes cuda, then mps, then cpu. Usable as an argparse type.

    Raises argparse.ArgumentTypeError when the device is unknown or not on this machine.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, present in available.items() if present))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"unknown device {name!r}; choose auto, cuda, mps or cpu") from None
    present = available.get(device.type, False)
    if not present or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        kinds = ", ".join(kind for kind in available if available[kind])
        raise argparse.ArgumentTypeError(f"device {name!r} is not on this machine, which has {kinds}")
    return device


def has_bfloat16(device):
    """Whether `device` multiplies bfloat16 matrices in hardware, so that autocast to it pays."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private: absent in some torch versions
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False


def in_notebook():
    """Whether this code runs in a Jupyter or Colab kernel."""
    return "ipykernel" in sys.modules and "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None


# --- Seeding -----------------------------------------------------------------------------------


def seed_everything(seed):
    """Seed Python's, numpy's and torch's random generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# --- Plotting: one style, readable in grey (each series has its own line style, marker or hatch) ----

if not in_notebook():
    matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  after the choice of the backend

COLORS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#666666", "#F0E442"]  # Okabe and Ito
LINES = ["-", "--", "-.", ":"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]  # seven: with eight colors, no two of 56 series look alike
HATCHES = ["", "//", "..", "xx", "\\\\", "++", "oo", "--"]
STYLE = {
    "figure.dpi": 110,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    "legend.frameon": False,
    "font.size": 10,
    "axes.titlesize": 11,
}
plt.rcParams.update(STYLE)


def new_figure(title, rows=1, columns=1, size=(11, 4)):
    """(figure, its axes in a flat list) with a title; `size` is (width, height) in inches."""
    fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    fig.suptitle(title, fontsize=12, fontweight="bold")
    return fig, list(axes.flat)


def mean_and_interval(values):
    """(mean, half width of the 95 % confidence interval) over the first axis, by Student's t; NaN width for one run."""
    values = np.asarray(values, dtype=float)
    mean, n = values.mean(axis=0), len(values)
    if n < 2:
        return mean, np.full_like(mean, np.nan)
    from scipy import stats

    return mean, stats.t.ppf(0.975, n - 1) * values.std(axis=0, ddof=1) / np.sqrt(n)


def plot_curve(ax, x, runs, label, index=0, marker=None):
    """One line over `x` [points]; `runs` is [points] or [runs, points], then with its 95 % confidence band."""
    mean, width = mean_and_interval(np.atleast_2d(runs))
    line = LINES[(index + index // 8) % 4]  # not the same again when the colors repeat
    ax.plot(x, mean, line, marker=marker, markersize=4, color=COLORS[index % 8], label=label)
    if np.isfinite(width).any():
        ax.fill_between(x, mean - width, mean + width, color=COLORS[index % 8], alpha=0.2, linewidth=0)


def legend_below(ax, columns=6):
    """One legend below the whole figure, for what `ax` shows; nothing inside the axes is covered."""
    handles, labels = ax.get_legend_handles_labels()
    ax.figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), columns), fontsize=9)


def epoch_axis(ax, label="epoch"):
    """An x axis for counts, with whole numbers only."""
    ax.set_xlabel(label)
    ax.xaxis.get_major_locator().set_params(integer=True)


def plot_bars(ax, labels, series, number="{:.1f}", errors=None):
    """Grouped vertical bars with their values above them.

    `series` maps each legend entry to one value a label; `errors` likewise to half widths of intervals.
    A single series gets no legend. None or NaN leaves its place empty.
    """
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        values = np.array(values, dtype=float)
        positions = np.arange(len(labels)) + (i - (len(series) - 1) / 2) * width
        half_widths = None if errors is None else errors[name]
        bars = ax.bar(positions, values, width, yerr=half_widths, label=name, color=COLORS[i % 8],
                      hatch=HATCHES[i % 8], alpha=0.85, edgecolor="white", linewidth=0.5, capsize=3)
        texts = [number.format(v) if np.isfinite(v) else "" for v in values]
        ax.bar_label(bars, texts, padding=2, fontsize=8, rotation=90 if len(series) * len(labels) > 15 else 0)
    ax.set_xticks(range(len(labels)), labels)
    ax.grid(axis="x", visible=False)
    ax.margins(y=0.18)
    if len(series) > 1:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=min(len(series), 6), fontsize=9)


def plot_dots(ax, labels, series, number=None, errors=None, highlight=None):
    """Dots, a row for each label (the first on top) and a marker for each series; the axis need not start at zero.

    `series` maps each legend entry to one value a label; `errors` likewise to half widths of intervals. The label or
    the series called `highlight` is larger and black; `number` is a format that writes values beside the dots.
    """
    for i, (name, values) in enumerate(series.items()):
        rows = np.arange(len(labels)) + (i - (len(series) - 1) / 2) * 0.7 / len(series)
        colors = ["black" if highlight in (name, label) else COLORS[i % 8] for label in labels]
        sizes = [80 if highlight in (name, label) else 35 for label in labels]
        ax.scatter(values, rows, sizes, colors, marker=MARKERS[i % 7], label=name, zorder=3)
        for value, row, error, color in zip(values, rows, errors[name], colors) if errors is not None else ():
            ax.errorbar(value, row, xerr=error, fmt="none", ecolor=color, capsize=3)
        for value, row in zip(values, rows) if number else ():
            ax.annotate(number.format(value), (value, row), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)


def plot_ranking(ax, values, number="{:.2f}", highlight=None):
    """Horizontal bars of `values` {label: value}, the largest on top, the one called `highlight` in another color."""
    labels = sorted(values, key=values.get)
    bars = ax.barh(labels, [values[label] for label in labels], color=[COLORS[label == highlight] for label in labels])
    ax.bar_label(bars, [number.format(values[label]) for label in labels], padding=3, fontsize=8)
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.15)


def plot_history(axes, history, step_losses=None):
    """Loss and accuracy over the epochs of `history` [{train_loss, val_loss, train_accuracy, …}] on two axes.

    Training figures are means over an epoch and stand at its middle, validation figures at its end. `step_losses`
    [steps] adds the loss of each training step and its moving average.
    """
    ends = np.arange(1, len(history) + 1)
    for ax, name, scale in zip(axes, ("loss", "accuracy"), (1, 100)):
        for i, (split, x) in enumerate({"train": ends - 0.5, "val": ends}.items()):
            values = [scale * epoch[f"{split}_{name}"] for epoch in history]
            plot_curve(ax, x, values, {"train": "training", "val": "validation"}[split], index=i, marker=MARKERS[i])
        ax.set_ylabel("accuracy [%]" if scale == 100 else "loss")
        epoch_axis(ax)
    if step_losses is not None:
        positions = np.linspace(0, len(history), len(step_losses) + 1)[1:]
        width = min(len(step_losses), max(5, len(step_losses) // 50))
        mean = np.convolve(step_losses, np.ones(width) / width, "valid")
        axes[0].plot(positions, step_losses, color="0.8", linewidth=0.7, zorder=0, label="training, each step")
        axes[0].plot(positions[width - 1 :], mean, ":", color="0.2", label=f"moving average of {width} steps")
    for ax in axes:
        ax.legend()


def plot_confusion(ax, matrix, class_names, title):
    """Heatmap of a confusion matrix [true, predicted]: each cell has its count and its share of the true class."""
    matrix = np.asarray(matrix)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(matrix):
        ax.text(j, i, f"{count:,}\n{share[i, j]:.1%}", ha="center", va="center", fontsize=9,
                color="white" if share[i, j] > 0.5 else "black")
    ax.set_xticks(range(len(class_names)), class_names)
    ax.set_yticks(range(len(class_names)), class_names)
    ax.set(title=title, xlabel="predicted class", ylabel="true class")
    ax.grid(visible=False)


def save_figure(fig, path, display_id=None, update=False, show=True):
    """Write the figure as PNG and close it; in a notebook also show it (`update` redraws the one of that id), unless
    `show` is false."""
    try:
        fig.savefig(path)
    except OSError as error:  # a full disk does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from None
    if show and in_notebook():
        from IPython.display import display

        display(fig, display_id=display_id, update=update)
    plt.close(fig)
