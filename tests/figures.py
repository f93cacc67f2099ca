"""Check the README's cheap figures, or draw its pictures again; called by hand.

    python tests/figures.py --data-dir data     # runs of at most two minutes each, against the README
    python tests/figures.py --pictures          # .github/*.png, from runs of about 20 minutes in all

A figure is the mean in a table of summary.md; it must lie within the stated distance of the README's.
Exit code 1 if one does not. Data sets that are not in --data-dir are skipped, but the pictures need
fashion_mnist/ and y+w.csv there, or the network.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
HOLDOUT = "--protocol holdout --dataset y_w --model combined vq_ar --learning-rate 1e-3 --runs 5"
SELECTION = "--dataset fashion_mnist --strategy random fixed smart --no-benchmark"
# (script, arguments, file needed in --data-dir, cells that begin the row, column, the README's value, distance)
FIGURES = [
    ("forecast", HOLDOUT, "y+w.csv", ("combined",), "test free run", 1232, 10),
    ("forecast", HOLDOUT, "y+w.csv", ("ridge",), "test one step", 1230, 5),
    ("batch_selection", SELECTION, "fashion_mnist", ("random",), "test accuracy [%]", 88.32, 0.2),
    ("batch_selection", SELECTION, "fashion_mnist", ("smart",), "difference [points]", -0.29, 0.27),
    ("duet", "--dataset etth1 --head ordinal --strategies none", "ett/ETTh1.csv", ("etth1", "persistence"),
     "accuracy %", 95.12, 0.01),
    ("duet", "--dataset etth1 --head ordinal --strategies none", "ett/ETTh1.csv", ("etth1", "none"),
     "accuracy %", 95.35, 0.4),
]
# {script: (arguments, picture)}
PICTURES = {
    "fire": ("", "model_comparison"),
    "batch_selection": ("--dataset fashion_mnist --label-noise 0.2 --no-benchmark",
                        "comparison_fashion_mnist-noise-0.2"),
    "duet": ("--shared", "benchmark"),
    "forecast": (HOLDOUT, "forecasts_y_w"),
    "toxicity": ("--dataset embedded --from-scratch", "pr_roc"),
}


def run(script, arguments, folder):
    """The folder of results of one run."""
    command = [sys.executable, ROOT / f"{script}.py", *arguments, "--output-dir", folder]
    print("+", " ".join(map(str, command[1:-2])), flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / script / "run-001"


def read_cell(summary, cells, column):
    """The number that begins the cell of `column` in the row that begins with `cells`."""
    header = []
    for line in summary.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if column in row:
            header = row
        elif header and tuple(row[: len(cells)]) == cells:
            return float(row[header.index(column)].replace(",", "").split()[0])
    raise LookupError(f"no row {cells} with a column {column}")


def check_figures(data_dir):
    """Run each command once and compare; returns the number of figures that are not as stated."""
    summaries, wrong = {}, 0
    for script, arguments, needed, cells, column, stated, distance in FIGURES:
        if not (data_dir / needed).exists():
            print(f"{script} {arguments}: skipped, {data_dir / needed} is not there")
            continue
        if (script, arguments) not in summaries:
            with tempfile.TemporaryDirectory() as folder:
                run_dir = run(script, [*arguments.split(), "--data-dir", data_dir], Path(folder))
                summaries[script, arguments] = (run_dir / "summary.md").read_text(encoding="utf-8")
        value = read_cell(summaries[script, arguments], cells, column)
        agrees = abs(value - stated) <= distance
        wrong += not agrees
        print(f"{'ok   ' if agrees else 'WRONG'} {' '.join(cells)}, {column}: {value}, README {stated} ± {distance}")
    return wrong


def draw_pictures(scripts, data_dir):
    """Draw .github/SCRIPT.png for each of `scripts`, and all pictures side by side."""
    for script in scripts:
        arguments, name = PICTURES[script]
        place = [] if script == "fire" else ["--data-dir", data_dir]
        with tempfile.TemporaryDirectory() as folder:
            run_dir = run(script, [*arguments.split(), *place], Path(folder))
            image = Image.open(run_dir / f"{name}.png").convert("RGB")
        image.thumbnail((1000, 1200))
        image.quantize(256).save(ROOT / f".github/{script}.png", optimize=True)
    images = [Image.open(ROOT / f".github/{script}.png").convert("RGB") for script in PICTURES]
    images = [image.resize((image.width * 240 // image.height, 240)) for image in images]
    strip = Image.new("RGB", (sum(image.width for image in images), 240), "white")
    for i, image in enumerate(images):
        strip.paste(image, (sum(other.width for other in images[:i]), 0))
    strip.quantize(256).save(ROOT / ".github/strip.png", optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--pictures", nargs="*", choices=PICTURES, help="draw the README's pictures, or some")
    args = parser.parse_args()
    if args.pictures is not None:
        draw_pictures(args.pictures or PICTURES, args.data_dir.resolve())
    elif check_figures(args.data_dir.resolve()):
        sys.exit(1)


if __name__ == "__main__":
    main()
