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
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import batch_selection
import duet
import fire
import forecast
import toxicity
from common import has_bfloat16


def seconds(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def report(name, unit, count, mine, reference_name, reference):
    """One line: speeds from the seconds that `count` things took here and in the reference, and their ratio."""
    speeds = f"{name:16} {count / mine:12,.0f} {unit:9}   {reference_name:12} {count / reference:12,.0f}"
    print(f"{speeds}   ratio {reference / mine:.2f}")


def median_pair(ours, bare, repeats):
    """(seconds that `ours` returns, seconds of `bare`) of the repeat with the median ratio, after a warm-up."""
    bare()
    times = [(ours(), seconds(bare)) for _ in range(repeats)]
    return sorted(times, key=lambda pair: pair[1] / pair[0])[repeats // 2]


def clipped_step(model, optimizer, loss):
    """One step of the bare loops over models whose scripts clip the gradient at 1."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def fire_training(repeats=5):
    """Windows per second of an epoch of train_transformer, and of a bare loop over the same model and ready batches."""
    args = fire.parse_args(["--sample-per-area", "50000", "--epochs", "1", "--steps-per-epoch", "40"])
    data, info = fire.load_data(args)
    data.segments["val"] = data.segments["test"] = torch.tensor([[0, 60]])  # training alone is timed
    device = args.device
    model = fire.make_model(vars(args), info).to(device)
    starts = data.starts("train", 1)
    starts = starts[torch.randint(len(starts), (args.steps_per_epoch * args.batch_size,))]
    batches = [data.windows(rows) for rows in starts.split(args.batch_size)]
    batches = [(readings.contiguous(), area, label) for readings, area, label in batches]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def bare():
        model.train()
        for x, area, label in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
                logits, risk = model(x, area)
            clipped_step(model, optimizer, fire.fire_loss(logits.float(), risk.float(), label))

    def ours():
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            state = fire.new_state(args, info)
            fire.train_transformer(model, data, args, state, Path(folder))
            return state["stages"][0]["seconds"]

    mine, reference = median_pair(ours, bare, repeats)
    report("fire training", "windows/s", len(starts), mine, "bare loop", reference)


def fire_generator(rows=500_000):
    """Rows per second of the generator, and of the noise alone that it draws for them."""
    mine = seconds(lambda: fire.generate_area("basement", rows, 0))
    noise = seconds(lambda: np.random.default_rng(0).standard_normal((rows, 6), dtype=np.float32))
    report("fire generator", "rows/s", rows, mine, "noise alone", noise)


def fire_drift(rows=5_000_000):
    """Rows per second of the drift compensation of six sensors, and of a copy of the same readings."""
    readings = np.random.default_rng(0).standard_normal((rows, 6), dtype=np.float32)
    mine = seconds(lambda: fire.remove_drift(readings, 3600))
    report("fire drift", "rows/s", rows, mine, "copy", seconds(readings.copy))


def fire_csv(rows=1_000_000):
    """Rows per second from a CSV file to readings and labels, and of pyarrow.csv alone on the same file."""
    readings, labels, _ = fire.generate_area("basement", rows, 0)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        path = Path(folder) / "basement.csv"
        table = {name: readings[:, i] for i, name in enumerate(fire.SENSORS["basement"])} | {"label": labels}
        pa.csv.write_csv(pa.table(table), path)

        def alone():
            for _ in pa.csv.open_csv(path):
                pass

        args = fire.parse_args(["--data", str(path)])
        mine, reference = median_pair(lambda: seconds(lambda: fire.file_areas(args)), alone, 5)
    report("fire CSV", "rows/s", rows, mine, "pyarrow.csv", reference)


def fire_predict(rows=1_000_000):
    """Rows per second of --predict, from a CSV file to a CSV file, and of the model alone on ready windows of them."""
    args = fire.parse_args(["--sample-per-area", "20000"])
    readings = fire.generate_area("basement", rows, 0)[0]
    with contextlib.redirect_stderr(io.StringIO()):
        _, info = fire.load_data(args)
    model = fire.make_model(vars(args), info).to(args.device).eval()
    state = fire.new_state(args, info)
    state["best"]["model"] = model.state_dict()
    windows = torch.from_numpy(readings[: rows // 60 * 60]).view(-1, 60, 6).to(args.device)

    def alone():
        with torch.inference_mode(), fire.autocast(args.device):
            for batch in windows.split(1024):
                logits, _ = model(batch, torch.zeros(len(batch), dtype=torch.long, device=args.device))
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
    device = args.device
    data = duet.embedded_dataset("temperature_sensors", *duet.EMBEDDED["temperature_sensors"], args.windows, 0)
    data.splits["val"] = data.splits["val"][:1]
    series, starts, labels = (torch.from_numpy(array).to(device) for array in (data.series, data.starts, data.labels))
    rows = torch.from_numpy(data.splits["train"]).to(device)[: args.steps * args.batch_size].split(args.batch_size)
    batches = [(duet.gather_windows(series, starts[some], data.seq_len).contiguous(), labels[some]) for some in rows]
    model = duet.make_model(args, [data], "none", False, 0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def bare():
        model.train()
        for x, label in batches:
            with duet.autocast(device):
                logits = model(x, data.name)
            loss = nn.functional.cross_entropy(logits.float(), label)
            clipped_step(model, optimizer, loss)
        loss.item()

    def ours():
        with tempfile.TemporaryDirectory() as folder:
            return duet.fit(model, [data], args, 0, Path(folder) / "model.pt")[0]["train_seconds"]

    mine, reference = median_pair(ours, bare, repeats)
    report("duet training", "windows/s", args.steps * args.batch_size, mine, "bare loop", reference)


def selection_data():
    """Data of 60,000 x 784: Fashion-MNIST where it is in data/, else random bytes."""
    if batch_selection.find_folder("fashion_mnist", "data"):
        return batch_selection.load_dataset("fashion_mnist", "data")
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, high, shape).astype(np.uint8)
              for n in (60_000, 10_000) for high, shape in ((256, (n, 1, 28, 28)), (10, n))]
    return batch_selection.make_data("random bytes", arrays, "random")


def selection_training(repeats=5):
    """Samples per second of an epoch with each strategy; of a bare loop over normalized tensors; of `random`."""
    args = batch_selection.parse_args(["--device", "cpu"])
    torch.set_num_threads(1)
    data = selection_data().to("cpu")
    x, y = data.x_train.flatten(1), data.y_train

    def bare():
        torch.manual_seed(0)
        model = batch_selection.SimpleMLP((1, 28, 28), 10)
        optimizer = torch.optim.Adam(model.parameters(), args.learning_rate, fused=True)
        for rows in torch.randperm(len(x)).split(args.batch_size):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def run(strategy, epochs=2):  # the first, when most are unseen, and one more
        learner = batch_selection.Learner(data, batch_selection.SimpleMLP, 0, args)
        batch_selection.measure(learner)
        for _ in range(epochs):
            batch_selection.train_epoch(learner, batch_selection.STRATEGIES[strategy])
            learner.history.append(learner.history[-1] | {"steps": learner.steps})
        return learner.seconds / epochs, learner.samples // epochs

    bare()
    times, counts = {name: [] for name in ["bare loop", *batch_selection.STRATEGIES]}, {}
    for _ in range(repeats):  # side by side, since the machine's speed drifts
        times["bare loop"].append(seconds(bare))
        for name in batch_selection.STRATEGIES:
            took, counts[name] = run(name)
            times[name].append(took)
    medians = {name: np.median(values) for name, values in times.items()}
    report("random", "samples/s", len(x), medians["random"], "bare loop", medians["bare loop"])
    for name, count in counts.items():
        print(f"{name:20} epoch {medians[name]:.3f} s, {medians[name] / medians['random']:.2f} of random, "
              f"{medians[name] / medians['bare loop']:.2f} of the bare loop; {count:,} samples trained on")


def forecast_training(repeats=3, epochs=10):
    """Windows per second of train(), and of a bare loop over the same model and ready batches; both with validation."""
    torch.set_num_threads(1)
    args = forecast.parse_args(["--epochs", str(epochs), "--device", "cpu"])
    values = forecast.generate_series()
    z = torch.from_numpy((values - values.mean()) / values.std()).float()
    train_starts, val_starts = forecast.original_split(len(z) - 128)
    for name in forecast.MODELS:
        run = forecast.Run(name, "synthetic", 112, 1e-3, 64)
        model = forecast.MODELS[name](run, args)
        windows = z.unfold(0, run.time_steps + model.horizon, 1)
        batches = [windows[starts].contiguous() for starts in train_starts.split(args.batch_size)]
        optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)

        validation = windows[val_starts]

        def bare(model=model, windows=windows, batches=batches, optimizer=optimizer, align_target=name != "lstm",
                 validation=validation):
            model.start(windows[train_starts])
            for _ in range(epochs):
                for batch in batches:
                    loss = model.loss(batch, align_target)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                with torch.inference_mode():
                    model.loss(validation, align_target)

        def ours(model=model, run=run):
            forecast.train(model, z, train_starts, val_starts, run, args, shuffle=False)

        bare()
        ours_seconds, bare_seconds = np.median([(seconds(ours), seconds(bare)) for _ in range(repeats)], axis=0)
        report(f"forecast {name}", "windows/s", len(train_starts) * epochs, ours_seconds, "bare loop", bare_seconds)


def toxicity_data(count=2000):
    """Embedded comments, a BERT-Tiny with random weights, and the WordPiece tokenizer of their vocabulary."""
    args = toxicity.parse_args(["--dataset", "embedded", "--from-scratch", "--arm", "plain", "--epochs", "1",
                                "--sample-size", str(count)])
    with contextlib.redirect_stderr(io.StringIO()):
        data = toxicity.load_data(args)
    data.splits["validation"] = data.splits["validation"][:50]
    return args, data, toxicity.build_bert(toxicity.TINY), toxicity.train_wordpiece(data.split("train")[0])


def toxicity_training(repeats=5):
    """Texts per second of an epoch of train_model, and of a bare loop over the same model and ready batches."""
    args, data, model, tokenizer = toxicity_data()
    examples = toxicity.make_examples(tokenizer, data, args)
    train, device = examples["train"], args.device
    model = model.to(device)
    batches = [(rows, toxicity.make_batch(train.tokens, rows))
               for rows in toxicity.bucket_batches(train.tokens, args.batch_size, len(train.tokens))]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def bare():
        model.train()
        for rows, batch in batches:
            loss = train.loss(model(**batch).logits, rows)
            clipped_step(model, optimizer, loss)
        loss.item()

    def ours():
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            state = toxicity.new_state(model, [])
            toxicity.train_model(state, examples, [False, True], args, 1e-4, Path(folder) / "checkpoint.pt")
            return state["history"][0]["seconds"]

    mine, reference = median_pair(ours, bare, repeats)
    report("toxicity training", "texts/s", len(train.tokens), mine, "bare loop", reference)


def toxicity_scoring():
    """Texts per second from text to score in length buckets, and with every text padded to --max-length."""
    args, data, model, tokenizer = toxicity_data()
    texts, _ = data.split("train")
    classifier = toxicity.Classifier(model.eval(), tokenizer, "", vars(args), [False, True], torch.zeros(0))

    @torch.inference_mode()
    def padded():
        rows = classifier.tokens(texts)
        rows = F.pad(rows, (0, args.max_length - rows.shape[1])).long()
        for ids in rows.split(toxicity.INFERENCE_BATCH):
            model(input_ids=ids, attention_mask=(ids > 0).long()).logits.softmax(1)

    classifier.scores(texts)
    mine = seconds(lambda: classifier.scores(texts))
    report("toxicity scoring", "texts/s", len(texts), mine, "padded", seconds(padded))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    functions = (fire_training, fire_generator, fire_drift, fire_csv, fire_predict, duet_training, selection_training,
                 forecast_training, toxicity_training, toxicity_scoring)
    benchmarks = {function.__name__: function for function in functions}
    parser.add_argument("names", nargs="*", help=f"which (default: all): {', '.join(benchmarks)}")
    for name in parser.parse_args().names or benchmarks:
        with contextlib.redirect_stderr(io.StringIO()):  # the progress bars
            benchmarks[name]()
