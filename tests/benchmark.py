"""python tests/benchmark.py: how fast the scripts are, each figure as a ratio to a plain reference in the same run."""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import duet
import fire
from common import detect_device, has_bfloat16


def seconds(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def report(name, unit, count, mine, reference_name, reference):
    """One line: speeds from the seconds that `count` things took here and in the reference, and their ratio."""
    speeds = f"{name:16} {count / mine:12,.0f} {unit:9}   {reference_name:12} {count / reference:12,.0f}"
    print(f"{speeds}   ratio {reference / mine:.2f}")


def fire_training(repeats=5):
    """Windows per second of an epoch of train_transformer, and of a bare loop over the same model and ready batches."""
    args = fire.parse_args(["--sample-per-area", "50000", "--epochs", "1"])
    data, device = fire.load_data(args), detect_device()
    starts = fire.window_starts(data.segments["train"], 60, 60)
    model = fire.OptimizedFireTransformer(dropout=args.dropout).to(device)
    readings, weights = torch.from_numpy(data.readings).to(device), torch.ones(3, device=device)
    areas, labels = (torch.from_numpy(array).long().to(device) for array in (data.areas, data.labels))
    batches = [(fire.gather_windows(readings, rows, 60).contiguous(), areas[rows], labels[rows + 59])
               for rows in torch.from_numpy(starts).to(device).split(args.batch_size)]

    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def bare():
        model.train()
        for x, area, label in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
                logits, risk = model(x, area)
            loss = fire.fire_loss(logits.float(), risk.float(), label, weights, label)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        loss.item()

    def ours():
        with tempfile.TemporaryDirectory() as folder:
            return fire.train_transformer(model, data, starts[:1], args, Path(folder))[0]["seconds"]

    bare()
    times = [(ours(), seconds(bare)) for _ in range(repeats)]  # side by side, since the machine's speed drifts
    mine, reference = np.median(times, axis=0)
    report("fire training", "windows/s", len(starts), mine, "bare loop", reference)


def fire_generator(rows=500_000):
    """Rows per second of the generator, and of the noise alone that it draws for them."""
    mine = seconds(lambda: fire.generate_area("basement", rows, 0))
    noise = seconds(lambda: np.random.default_rng(0).standard_normal((rows, 6), dtype=np.float32))
    report("fire generator", "rows/s", rows, mine, "noise alone", noise)


def fire_csv(rows=1_000_000):
    """Rows per second from a CSV file to readings and labels, and of pyarrow.csv alone on the same file."""
    readings, labels, _ = fire.generate_area("basement", rows, 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "basement.csv"
        table = {name: readings[:, i] for i, name in enumerate(fire.SENSORS["basement"])} | {"label": labels}
        pa.csv.write_csv(pa.table(table), path)

        def alone():
            for _ in pa.csv.open_csv(path):
                pass

        alone()
        mine = seconds(lambda: fire.file_areas([path], None))
        reference = seconds(alone)
    report("fire CSV", "rows/s", rows, mine, "pyarrow.csv", reference)


def fire_predict(rows=1_000_000):
    """Rows per second of --predict, from a CSV file to a CSV file, and of the model alone on ready windows of them."""
    readings, device = fire.generate_area("basement", rows, 0)[0], detect_device()
    model = fire.OptimizedFireTransformer(dropout=0.0).to(device).eval()
    areas = {area: list(sensors) for area, sensors in fire.SENSORS.items()}
    state = {"model": model.state_dict(), "arguments": vars(fire.parse_args([])), "areas": areas,
             "mean": torch.zeros(5, 6), "std": torch.ones(5, 6)}
    windows = torch.from_numpy(readings[: rows // 60 * 60]).view(-1, 60, 6).to(device)

    def alone():
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
            for batch in windows.split(1024):
                logits, _ = model(batch, torch.zeros(len(batch), dtype=torch.long, device=device))
        logits.sum().item()

    with tempfile.TemporaryDirectory() as folder:
        table = {name: readings[:, i] for i, name in enumerate(fire.SENSORS["basement"])}
        pa.csv.write_csv(pa.table(table), f"{folder}/basement.csv")
        torch.save(state, f"{folder}/model.pt")
        argv = ["--predict", f"{folder}/basement.csv", "--checkpoint", f"{folder}/model.pt", "--output-dir", folder]
        alone()
        with contextlib.redirect_stdout(io.StringIO()):
            mine = seconds(lambda: fire.main(argv))
    report("fire predict", "rows/s", rows, mine, "model alone", seconds(alone))


def duet_training(repeats=5):
    """Windows per second of fit(), and of a bare loop over the same model and ready batches."""
    args = duet.parse_args(["--windows", "12000", "--steps", "60", "--evaluations", "1"])
    args.torch_device = device = detect_device()
    data = duet.embedded_dataset("temperature_sensors", *duet.EMBEDDED["temperature_sensors"], args.windows, 0)
    data.parts["validation"] = data.parts["validation"][:1]
    series, starts, labels = (torch.from_numpy(array).to(device) for array in (data.series, data.starts, data.labels))
    rows = torch.from_numpy(data.parts["train"]).to(device)[: args.steps * args.batch_size].split(args.batch_size)
    batches = [(duet.gather_windows(series, starts[some], data.seq_len).contiguous(), labels[some]) for some in rows]
    model = duet.new_model(args, [data], "none", False, 0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def bare():
        model.train()
        for x, label in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
                logits = model(x)
            loss = nn.functional.cross_entropy(logits.float(), label)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        loss.item()

    def ours():
        with tempfile.TemporaryDirectory() as folder:
            return duet.fit(model, [data], args, Path(folder) / "model.pt")[0]["train_seconds"]

    bare()
    times = [(ours(), seconds(bare)) for _ in range(repeats)]
    mine, reference = sorted(times, key=lambda pair: pair[1] / pair[0])[repeats // 2]  # the pair of the median ratio
    report("duet training", "windows/s", args.steps * args.batch_size, mine, "bare loop", reference)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    functions = (fire_training, fire_generator, fire_csv, fire_predict, duet_training)
    benchmarks = {function.__name__: function for function in functions}
    parser.add_argument("names", nargs="*", help=f"which (default: all): {', '.join(benchmarks)}")
    for name in parser.parse_args().names or benchmarks:
        with contextlib.redirect_stderr(io.StringIO()):  # the progress bars
            benchmarks[name]()
