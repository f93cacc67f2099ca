"""Shared by the five experiments: device detection, seeding and plotting helpers, nothing else."""

import argparse
import contextlib
import random
import sys

import matplotlib
import numpy as np
import torch

# --- Device -------------------------------------------------------------------------------------


def detect_device(name="auto"):
    """The torch device called `name`; `auto` is cuda, or else mps, or else cpu. Usable as an
    argparse type: raises ArgumentTypeError if the device is unknown or not on this machine."""
    counts = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
              "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    present = [kind for kind, count in counts.items() if count]
    if name == "auto":
        return torch.device(present[0])
    with contextlib.suppress(RuntimeError):  # of an unknown name
        device = torch.device(name)
        if (device.index or 0) < counts.get(device.type, 0):
            return device
    text = f"unknown device {name!r}; this machine has {', '.join(present)}"
    raise argparse.ArgumentTypeError(text)


def has_bfloat16(device):
    """Whether `device` multiplies bfloat16 matrices in hardware, so that autocast to it pays."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":  # these functions are private, and absent from some versions of torch
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False


def in_notebook():
    """Whether this code runs in a Jupyter or Colab kernel."""
    ipython = sys.modules.get("IPython")
    return "ipykernel" in sys.modules and ipython is not None and ipython.get_ipython() is not None


# --- Seeding ------------------------------------------------------------------------------------


def seed_everything(seed):
    """Seed Python's, numpy's and torch's random generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# --- Plotting: one style, readable in grey (each series has its own line, marker or hatch) -------

if not in_notebook():
    matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  after the choice of the backend

COLORS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#666666",
          "#F0E442"]  # Okabe and Ito
LINES = ["-", "--", "-.", ":"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]  # seven: of 56 series, no two look alike
HATCHES = ["", "//", "..", "xx", "\\\\", "++", "oo", "--"]
plt.rcParams.update({
    "figure.dpi": 110, "font.size": 10, "axes.titlesize": 11, "legend.frameon": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=COLORS), "date.converter": "concise",
})


def new_figure(title, rows=1, columns=1, size=(11, 4)):
    """(figure, its axes in a flat list) with a title; `size` is (width, height) in inches."""
    fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    fig.suptitle(title, fontsize=12, fontweight="bold")
    return fig, list(axes.flat)


def mean_and_interval(values):
    """(mean, half width of its 95 % confidence interval, NaN for one run) over the first axis."""
    values = np.asarray(values, dtype=float)
    mean = values.mean(axis=0)
    runs = len(values)
    if runs < 2:
        return mean, np.full_like(mean, np.nan)
    from scipy import stats

    error = values.std(axis=0, ddof=1) / np.sqrt(runs)  # of the mean
    return mean, stats.t.ppf(0.975, runs - 1) * error


def plot_curve(ax, x, runs, label, index=0, marker=None):
    """A line over `x` [points]; `runs` is [points], or [runs, points] for a mean with its 95 %
    confidence band. `index` is the number of the line, which gives it its look."""
    mean, width = mean_and_interval(np.atleast_2d(runs))
    color = COLORS[index % 8]
    line = LINES[(index + index // 8) % 4]  # not the same again when the colors repeat
    ax.plot(x, mean, line, marker=marker, markersize=4, color=color, label=label)
    if np.isfinite(width).any():
        ax.fill_between(x, mean - width, mean + width, color=color, alpha=0.2, linewidth=0)


def legend_below(ax, columns=6):
    """One legend for what `ax` shows, below the whole figure, where it covers nothing."""
    handles, labels = ax.get_legend_handles_labels()
    ax.figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)


def epoch_axis(ax, label="epoch"):
    """An x axis for counts, with whole numbers only."""
    ax.set_xlabel(label)
    ax.xaxis.get_major_locator().set_params(integer=True)


def plot_bars(ax, labels, series, number="{:.1f}"):
    """Grouped vertical bars of `series` {legend entry: [value of each label]}, with their values
    above them."""
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        positions = np.arange(len(labels)) + (i - (len(series) - 1) / 2) * width
        bars = ax.bar(positions, values, width, label=name, color=COLORS[i % 8],
                      hatch=HATCHES[i % 8], alpha=0.85, edgecolor="white", linewidth=0.5)
        ax.bar_label(bars, fmt=number, padding=2, fontsize=8)
    ax.set_xticks(range(len(labels)), labels)
    ax.grid(axis="x", visible=False)
    ax.margins(y=0.18)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=6, fontsize=9)


def plot_dots(ax, labels, series, number=None, errors=None, highlight=None):
    """Dots of `series` {legend entry: [value of each label]}: a row for each label, the first on
    top, and a marker for each entry; the axis need not start at zero.

    `errors` likewise has half widths of intervals; `number` is a format that writes values beside
    the dots; the label or entry called `highlight` is larger and black.
    """
    for i, (name, values) in enumerate(series.items()):
        rows = np.arange(len(labels)) + (i - (len(series) - 1) / 2) * 0.7 / len(series)
        colors = ["black" if highlight in (name, label) else COLORS[i % 8] for label in labels]
        sizes = [35 if color == COLORS[i % 8] else 80 for color in colors]
        ax.scatter(values, rows, sizes, colors, marker=MARKERS[i % 7], label=name, zorder=3)
        if errors is not None:
            ax.errorbar(values, rows, xerr=errors[name], fmt="none", ecolor=colors[0], capsize=3)
        if number:
            for value, row in zip(values, rows):
                ax.annotate(number.format(value), (value, row), (0, 6), ha="center", fontsize=8,
                            textcoords="offset points")
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)


def plot_ranking(ax, values, number="{:.2f}"):
    """Horizontal bars of `values` {label: value}, the largest on top."""
    values = dict(sorted(values.items(), key=lambda item: item[1]))
    bars = ax.barh(list(values), list(values.values()))
    ax.bar_label(bars, fmt=number, padding=3, fontsize=8)
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.15)


def plot_history(axes, history, step_losses=None):
    """Loss and accuracy over the epochs of `history` [{train_loss, val_loss, …}] on two axes.

    Training figures are means over an epoch and stand at its middle, validation figures at its end.
    `step_losses` [steps] adds the loss of each training step and its moving average.
    """
    ends = np.arange(1, len(history) + 1)
    for ax, metric, scale in zip(axes, ("loss", "accuracy"), (1, 100)):
        train = [scale * epoch[f"train_{metric}"] for epoch in history]
        val = [scale * epoch[f"val_{metric}"] for epoch in history]
        plot_curve(ax, ends - 0.5, train, "training", 0, MARKERS[0])
        plot_curve(ax, ends, val, "validation", 1, MARKERS[1])
        epoch_axis(ax)
    axes[0].set_ylabel("loss")
    axes[1].set_ylabel("accuracy [%]")
    if step_losses is not None:
        steps = len(step_losses)
        positions = np.linspace(0, len(history), steps + 1)[1:]
        width = min(steps, max(5, steps // 50))
        mean = np.convolve(step_losses, np.ones(width) / width, "valid")
        axes[0].plot(positions, step_losses, color="0.8", linewidth=0.7, zorder=0,
                     label="training, each step")
        axes[0].plot(positions[width - 1 :], mean, ":", color="0.2",
                     label=f"moving average of {width} steps")
    for ax in axes:
        ax.legend()


def plot_confusion(ax, matrix, class_names, title):
    """Heatmap of a confusion matrix [true, predicted], with the count of each cell and its share of
    the true class."""
    matrix = np.asarray(matrix)
    share = matrix / matrix.sum(axis=1, keepdims=True).clip(1)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(matrix):
        color = "white" if share[i, j] > 0.5 else "black"
        text = f"{count:,}\n{share[i, j]:.1%}"
        ax.text(j, i, text, ha="center", va="center", fontsize=9, color=color)
    ax.set_xticks(range(len(class_names)), class_names)
    ax.set_yticks(range(len(class_names)), class_names)
    ax.set(title=title, xlabel="predicted class", ylabel="true class")
    ax.grid(visible=False)


def save_figure(fig, path, display_id=None, update=False, show=True):
    """Write a figure as PNG and close it; with `show` a notebook displays it, too."""
    try:
        fig.savefig(path)
    except OSError as error:  # a full disk does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from None
    if show and in_notebook():
        from IPython.display import display

        display(fig, display_id=display_id, update=update)
    plt.close(fig)
