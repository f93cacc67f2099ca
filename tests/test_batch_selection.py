"""What users of batch_selection.py rely on: offline, on the CPU. Every file that a reader needs is written here."""

import functools
import gzip
import hashlib
import http.server
import importlib.metadata
import inspect
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import unittest.mock
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError
from PIL import Image
from scipy import stats
from torch import nn

import batch_selection as bs

ROOT = Path(bs.__file__).resolve().parent
METRIC_PICTURES = {"test_acc.png", "train_acc.png", "test_loss.png", "train_loss.png"}


@pytest.fixture(autouse=True)
def no_data_of_this_machine(monkeypatch, tmp_path):
    """Each test in its own folder, without Debian's Fashion-MNIST, and with addresses that nobody answers."""
    monkeypatch.chdir(tmp_path)
    for dataset in bs.DATASETS.values():
        monkeypatch.setattr(dataset, "also", ())
        monkeypatch.setattr(dataset, "url", "http://127.0.0.1:9/")
    with unittest.mock.patch.dict(os.environ):  # dask sets OMP_NUM_THREADS here too, not in its workers alone
        yield


def md5_of(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def digits(*argv):
    return bs.main(["--dataset", "digits", "--no-benchmark", "--jobs", "1", "--device", "cpu", *argv])


def options(**changes):
    return SimpleNamespace(**vars(bs.parse_args([])) | changes)


# --- Strategies -------------------------------------------------------------------------------------------------------


def simulate(strategy, args, samples=331, epochs=3):
    """[batches, with the tracked losses that each was chosen by] of `epochs`; the losses fall as in training."""
    rng, loss, difficulty = np.random.default_rng(7), np.full(samples, np.inf, np.float32), None
    difficulty = np.random.default_rng(8).exponential(1, samples).astype(np.float32).round(1)  # with ties
    chosen = []
    for _ in range(epochs):
        for rows in strategy(loss, lambda rows: difficulty[rows], args, rng):
            chosen.append((rows.copy(), loss.copy()))
            bs.track(loss, rows, difficulty[rows], args.ema_decay)
            difficulty[rows] *= np.float32(0.9)
    return chosen


def test_random_covers_every_sample_once_an_epoch_and_fixed_is_fixed():
    args = options(batch_size=50)
    for strategy in (bs.random_batches, bs.fixed_batches):
        batches = [rows for rows, _ in simulate(strategy, args, 331, epochs=2)]
        first, second = np.concatenate(batches[:7]), np.concatenate(batches[7:])
        assert sorted(first) == sorted(second) == list(range(331)) and len(batches[6]) == 31
        in_order = strategy is bs.fixed_batches
        assert (list(first) == list(range(331))) == (list(second) == list(first)) == in_order


@pytest.mark.parametrize("refresh", [1, 3])
def test_smart_is_its_plain_definition(refresh):
    def plain(loss, score, args, rng):
        n = len(loss)
        for step in range(math.ceil(n / args.batch_size)):
            if step % refresh == 0:
                last_of_top = sorted(loss, reverse=True)[round(0.2 * n) - 1]
                top = [i for i in range(n) if loss[i] >= last_of_top]
            size = min(args.batch_size, n - step * args.batch_size)  # no more samples an epoch than random
            explore = rng.choice(n, round(0.5 * size), replace=False)
            yield np.concatenate([explore, rng.choice(top, size - len(explore), replace=False)])

    args = options(batch_size=16, refresh=refresh)
    mine, slow = simulate(bs.smart_batches, args), simulate(plain, args)
    assert len(mine) == len(slow) == 3 * math.ceil(331 / 16)
    assert all((a == b).all() for (a, _), (b, _) in zip(mine, slow))
    assert sum(len(rows) for rows, _ in mine) == 3 * 331
    few = list(bs.smart_batches(np.ones(40, np.float32), None, options(batch_size=30), np.random.default_rng(0)))
    assert [len(rows) for rows in few] == [30, 10], "all that tie with the 8 hardest belong"
    unseen = np.isinf(mine[0][1])
    assert unseen.all() and np.isinf(mine[3][1][mine[3][0][8:]]).all(), "unseen samples count as the hardest"


def test_kth_largest_is_exact_whatever_the_guess():
    rng = np.random.default_rng(0)
    for values in (rng.exponential(1, 500), rng.integers(0, 5, 500) / 2, np.where(rng.random(500) < 0.4, np.inf, 1.0)):
        for k in (1, 2, 100, 499, 500):
            for guess in (0.0, 0.5, values[3], np.median(values), 7.0, np.inf):
                found = bs.kth_largest(values.astype(np.float32), k, np.float32(guess))
                assert found == np.sort(values.astype(np.float32))[-k]


def test_loss_threshold_is_its_plain_definition():
    args = options(batch_size=16, loss_threshold=0.6)
    for rows, _ in simulate(bs.loss_threshold_batches, args, epochs=1):
        assert len(rows) <= 16
    loss = np.array([0.1, 0.9, 0.7, 0.3, np.inf, 0.65], np.float32)
    for threshold, size, expected in ((0.6, 2, {1, 2, 4, 5}), (0.6, 5, {1, 2, 3, 4, 5}), (0.8, 3, {1, 2, 4}),
                                      (9, 1, {4})):
        batches = list(bs.loss_threshold_batches(loss, None, options(batch_size=size, loss_threshold=threshold),
                                                 np.random.default_rng(0)))
        drawn = [int(row) for rows in batches for row in rows]
        assert sorted(drawn) == sorted(expected) and max(map(len, batches)) <= size


def test_selective_backprop_is_its_plain_definition():
    losses = np.random.default_rng(1).exponential(1, 97)
    args = options(batch_size=10, selectivity=2.0)

    def plain(rng, history=30):
        order, past, queue, batches = rng.permutation(97), [], [], []
        for start in range(0, 97, 10):
            candidates = order[start : start + 10]
            past = (past + [losses[i] for i in candidates])[-history:]
            draws = rng.random(len(candidates))
            for i, draw in zip(candidates, draws):
                share = sum(loss <= losses[i] for loss in past) / len(past)
                if draw < share * share:
                    queue.append(i)
            if len(queue) >= 10:
                batches.append(queue[:10])
                queue = queue[10:]
        return [*batches, queue] if queue else batches

    mine = list(bs.selective_backprop_batches(losses, lambda rows: losses[rows], args, np.random.default_rng(3), 30))
    assert [list(rows) for rows in mine] == plain(np.random.default_rng(3)) and len(mine) > 2
    every = bs.selective_backprop_batches(losses, lambda rows: losses[rows], options(batch_size=10, selectivity=0.0),
                                          np.random.default_rng(3))
    assert sorted(np.concatenate(list(every))) == list(range(97))


def test_strategies_are_short_and_share_a_signature():
    for name, strategy in bs.STRATEGIES.items():
        assert list(inspect.signature(strategy).parameters)[:4] == ["loss", "score", "args", "rng"], name
        assert len(inspect.getsource(strategy).splitlines()) < 25, name


def test_moving_average_by_hand_and_batch_mean():
    loss = np.full(4, np.inf, np.float32)
    bs.track(loss, np.array([0, 2]), np.array([2.0, 1.0]), 0.9)
    assert loss.tolist() == [2.0, np.inf, 1.0, np.inf]
    bs.track(loss, np.array([2, 3]), np.array([3.0, 5.0]), 0.9)
    assert loss.tolist() == pytest.approx([2.0, np.inf, 0.9 * 1 + 0.1 * 3, 5.0])
    with warnings.catch_warnings(action="error"):
        bs.track(loss, np.array([0, 1]), np.array([7.0, 8.0]), 0)
    assert loss[:2].tolist() == [7.0, 8.0]

    data = bs.load_dataset("digits", "data").to("cpu")
    tracked = {}
    for credit in ("per-sample", "batch-mean"):
        torch.manual_seed(0)
        model, tracked[credit] = bs.SimpleMLP((1, 8, 8), 10), np.full(1437, np.inf, np.float32)
        with torch.no_grad():
            losses = nn.functional.cross_entropy(
                model((data.x_train[:5] - data.mean) / data.std), data.y_train[:5], reduction="none")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        bs.train_one_epoch(model, optimizer, data, [np.arange(5)], tracked[credit], options(smart_loss=credit))
    assert tracked["per-sample"][:5] == pytest.approx(losses.numpy(), abs=1e-6)
    assert tracked["batch-mean"][:5] == pytest.approx([losses.mean().item()] * 5, abs=1e-6)


# --- Statistics -------------------------------------------------------------------------------------------------------


def test_verdicts_agree_with_scipy():
    rng = np.random.default_rng(0)
    finals = {"random": rng.normal(90, 0.3, 5), "good": rng.normal(91.5, 0.3, 5), "same": rng.normal(90, 0.3, 5),
              "bad": rng.normal(88, 0.3, 5)}
    found = bs.verdicts(finals, "vision")
    p = {name: stats.ttest_rel(finals[name], finals["random"]).pvalue for name in found}
    for name, verdict in found.items():
        low, high = stats.ttest_rel(finals[name], finals["random"]).confidence_interval(0.95)
        assert verdict["p"] == pytest.approx(p[name])
        assert (verdict["difference"] - verdict["interval"], verdict["difference"] + verdict["interval"]) == (
            pytest.approx((low, high)))
        harder = [other for other in p if p[other] <= p[name]]  # Holm: the worst of the steps up to this one
        assert verdict["p_holm"] == pytest.approx(min(1, max(
            p[other] * sum(p[third] >= p[other] for third in p) for other in harder)))
    assert "points better than random" in found["good"]["sentence"] and "worse" in found["bad"]["sentence"]
    assert "no difference from random is shown" in found["same"]["sentence"]
    assert "better" in bs.verdicts(finals, "nlp")["bad"]["sentence"], "fewer bits per byte are better"
    assert bs.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert bs.verdicts({"random": [1.0, 2.0], "smart": [2.0, 3.5]}, "vision") == {}
    assert bs.verdicts({"smart": [1.0, 2.0, 3.0]}, "vision") == {}
    equal = bs.verdicts({"random": [1.0, 2.0, 3.0], "smart": [1.0, 2.0, 3.0]}, "vision")["smart"]
    assert equal["p"] is equal["p_holm"] is None and equal["sentence"].startswith("smart: +0.00 points from random in")
    with warnings.catch_warnings(action="error"):
        same = bs.verdicts({"random": [1.1, 2.2, 3.3], "a": [2.2, 3.3, 4.4], "b": [3, 3, 3.6]}, "vision")
    assert same["a"]["p"] is None and "+1.10 points from random in every seed, no test" in same["a"]["sentence"]
    assert same["b"]["p_holm"] == pytest.approx(2 * same["b"]["p"])


def test_samples_to_a_target_lie_between_the_epochs():
    history = [{"test_acc": a, "bits_per_byte": 8 - a / 20, "samples": 100 * i, "seconds": 2.0 * i}
               for i, a in enumerate((10.0, 50.0, 90.0))]
    assert bs.to_reach(history, 70, "vision", "samples") == pytest.approx(150)
    assert bs.to_reach(history, 70, "vision", "seconds") == pytest.approx(3)
    assert bs.to_reach(history, 6.5, "nlp", "samples") == pytest.approx(50)
    assert bs.to_reach(history, 91, "vision", "samples") is None


# --- Readers and downloads --------------------------------------------------------------------------------------------


def write_idx(path, array):
    code = {"uint8": 8, "int32": 12}[array.dtype.name]
    header = bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(header + array.astype(array.dtype.newbyteorder(">")).tobytes()))


def images(n, shape, seed=0, classes=10):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape)).astype(np.uint8), (np.arange(n) % classes).astype(np.uint8)


def write_mnist(folder, n=40):
    (x, y), (x_test, y_test) = images(n, (28, 28)), images(20, (28, 28), 1)
    for name, array in (("train-images-idx3", x), ("train-labels-idx1", y), ("t10k-images-idx3", x_test),
                        ("t10k-labels-idx1", y_test)):
        write_idx(folder / f"{name}-ubyte.gz", array)
    return x, y, x_test, y_test


def add_to(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_cifar(folder, classes):
    folder.mkdir(parents=True)
    x, y = images(60, (3, 32, 32), classes=classes)
    labels = [y] if classes == 10 else [y // 5, y]
    records = np.column_stack([*labels, x.reshape(60, -1)])
    parts = {"test_batch": 5, "data_batch_2": 2, "data_batch_1": 1} if classes == 10 else {"test": 5, "train": 1}
    with tarfile.open(folder / f"cifar-{classes}-binary.tar.gz", "w:gz") as archive:
        add_to(archive, "cifar/batches.meta.txt", b"text")
        for name, block in parts.items():  # ten records each; the training parts come in a wrong order
            add_to(archive, f"cifar/{name}.bin", records[10 * block : 10 * block + 10].tobytes())
    train = np.r_[10:30] if classes == 10 else np.r_[10:20]
    return x[train], y[train], x[50:], y[50:]


def test_idx_and_qmnist_readers():
    x, y, x_test, y_test = write_mnist(Path("data/mnist"))
    data = bs.load_dataset("mnist", "data")
    assert (data.x_train[:, 0] == x).all() and (data.y_train == y).all() and (data.x_test[:, 0] == x_test).all()
    assert (data.y_test == y_test).all() and data.num_classes == 10 and data.info["source"] == "real"
    assert data.mean == pytest.approx(x.mean(), rel=1e-5) and data.std == pytest.approx(x.std(), rel=1e-5)
    for part in ("train", "test"):
        labels = np.column_stack([y[:20], np.full((20, 7), 70_000)]).astype(np.int32)
        write_idx(Path(f"data/qmnist/qmnist-{part}-images-idx3-ubyte.gz"), x[:20])
        write_idx(Path(f"data/qmnist/qmnist-{part}-labels-idx2-int.gz"), labels)
    assert (bs.load_dataset("qmnist", "data").y_test == y[:20]).all()


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_reader(classes):
    x, y, x_test, y_test = write_cifar(Path(f"data/cifar{classes}"), classes)
    data = bs.load_dataset(f"cifar{classes}", "data")
    assert (data.x_train == x).all() and (data.y_train == y).all()
    assert (data.x_test == x_test).all() and (data.y_test == y_test).all()


@pytest.mark.parametrize("packed", [False, True])
def test_cinic_reader(packed):
    colours = {}
    for part in ("train", "valid", "test"):
        for number, label in enumerate(("airplane", "bird", "truck")):
            folder = Path("data/cinic10") / part / label
            folder.mkdir(parents=True)
            for i in range(2):
                colours[part, number, i] = colour = (40 * number, 10 * i, {"train": 1, "valid": 2, "test": 3}[part])
                Image.new("RGB", (32, 32), colour).save(folder / f"{i}.png")
    Path("data/cinic10/loose.png").write_text("not in a class")
    if packed:
        with tarfile.open("data/archive", "w:gz") as archive:
            archive.add("data/cinic10", ".")
        Path("data/cinic10").rename("unpacked")
        Path("data/cinic10").mkdir()
        Path("data/archive").rename("data/cinic10/CINIC-10.tar.gz")
    data = bs.load_dataset("cinic10", "data")
    for x, y, part in ((data.x_train, data.y_train, "train"), (data.x_test, data.y_test, "test")):
        assert x.shape == (6, 3, 32, 32) and (x == x[:, :, :1, :1]).all()
        found = {(part, int(label), int(image[1, 0, 0]) // 10): tuple(image[:, 0, 0].tolist())
                 for image, label in zip(x, y)}
        assert found == {key: colour for key, colour in colours.items() if key[0] == part}


def test_broken_files_are_named_with_their_checksum(capsys):
    folder = Path("data/mnist")
    write_mnist(folder)
    path = folder / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    wrong_label = gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 40]) + bytes(39) + b"\x0b")
    labels, published = (folder / "train-labels-idx1-ubyte.gz").read_bytes(), bs.DATASETS["mnist"].files
    for name, content, words in ((path.name, whole[:-3000], "truncated"), (path.name, b"<html>not found</html>", "MD5"),
                                 (path.name, gzip.compress(b"\0\0"), "truncated"), (path.name, labels, "IDX header"),
                                 ("train-labels-idx1-ubyte.gz", wrong_label, "from 0 to 11")):
        write_mnist(folder)
        (folder / name).write_bytes(content)
        with pytest.raises(SystemExit):
            bs.main(["--dataset", "mnist", "--no-benchmark"])
        error = capsys.readouterr().err
        assert words in error and error.startswith("batch_selection.py: error: ") and error.count("\n") == 1
        if content != wrong_label:
            assert str(path) in error and md5_of(path) in error and f"published: {published[name]};" in error
    assert not list(Path("outputs/vision").iterdir()), "no empty run stays behind"
    write_cifar(Path("data/cifar10"), 10)
    archive = Path("data/cifar10/cifar-10-binary.tar.gz")
    archive.write_bytes(archive.read_bytes()[:-5000])
    with pytest.raises(bs.UserError, match=r"cifar-10-binary\.tar\.gz is truncated"):
        bs.load_dataset("cifar10", "data")
    Path("data/cinic10/train/cat").mkdir(parents=True)
    with pytest.raises(bs.UserError, match="same classes"):
        bs.load_dataset("cinic10", "data")
    Path("data/cinic10/train/cat/1.png").write_bytes(b"\x89PNG")
    with pytest.raises(bs.UserError, match=r"1\.png .* not a whole PNG"):
        bs.load_dataset("cinic10", "data")
    for side, name in enumerate(("train/cat/1", "train/cat/2", "test/cat/1"), 3):
        Path(f"data/cinic10/{name}.png").parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side)).save(f"data/cinic10/{name}.png")
    with pytest.raises(bs.UserError, match="different sizes"):
        bs.load_dataset("cinic10", "data")


def test_downloads_are_checked_and_a_bad_one_does_not_stay(monkeypatch, capsys):
    write_mnist(Path("site"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory="site")
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(bs.DATASETS["mnist"], "url", f"http://127.0.0.1:{server.server_port}/")
        files = {path.name: md5_of(path) for path in Path("site").iterdir()}
        monkeypatch.setattr(bs.DATASETS["mnist"], "files", files)
        bs.main(["--download", "mnist"])
        assert sorted(path.name for path in Path("data/mnist").iterdir()) == sorted(files)
        assert "| mnist | 10 | 70,000 | 12 | data/mnist | no |" in capsys.readouterr().out

        name = "train-images-idx3-ubyte.gz"
        whole = (Path("site") / name).read_bytes()
        for content, words in ((whole[:100], "published"), (b"x" * len(whole), "published"), (None, "404")):
            (Path("data/mnist") / name).unlink(missing_ok=True)
            (Path("site") / name).unlink(missing_ok=True)
            if content:
                (Path("site") / name).write_bytes(content)
            with pytest.raises(SystemExit) as stopped:
                bs.main(["--dataset", "mnist"])
            error = capsys.readouterr().err
            assert stopped.value.code == 2 and words in error and name in error
            assert not [path for path in Path("data/mnist").iterdir() if path.name.startswith(name)]
        server.shutdown()
    results = bs.main(["--quick", "--strategy", "random"])  # no network
    assert list(results["comparison"]) == ["digits", "digits_csv"]
    results = bs.main(["--epochs", "1", "--runs", "1", "--jobs", "1", "--strategy", "random"])
    assert "no MNIST" in capsys.readouterr().err and list(results["comparison"]) == ["digits"]


def test_csv_round_trip_is_equal_and_converted_once(capsys):
    x, y, x_test, y_test = write_mnist(Path("data/mnist"))
    data = bs.load_dataset("mnist_csv", "data")
    assert Path("data/mnist_csv/train.csv").read_text().splitlines()[0].startswith('"label","p0","p1"')
    assert (data.x_train[:, 0] == x).all() and (data.y_train == y).all() and data.x_test.dtype == np.uint8
    assert (data.x_test[:, 0] == x_test).all() and (data.y_test == y_test).all()
    assert data.info["sha256"] == bs.load_dataset("mnist", "data").info["sha256"]
    Path("data/mnist/train-images-idx3-ubyte.gz").unlink()
    assert bs.load_dataset("mnist_csv", "data").info == data.info
    train = Path("data/mnist_csv/train.csv")
    train.write_text(train.read_text()[:-300] + "999,1\n")
    with pytest.raises(bs.UserError, match=r"mnist_csv/train\.csv: "):
        bs.load_dataset("mnist_csv", "data")


def test_own_csv(capsys):
    rng = np.random.default_rng(0)
    label = np.array(["cat", "dog"])[np.arange(60) % 2]
    x = rng.normal(size=(60, 3)) + (label == "dog")[:, None] * np.array([0, 100.0, 0])
    lines = ["a,label,b,c"] + [f"{r[0]},{name},{r[1]},{r[2]}" for r, name in zip(x, label)]
    Path("pets.csv").write_text("\n".join(lines))
    results = bs.main(["--data", "pets.csv", "--epochs", "20", "--runs", "1", "--strategy", "random", "smart",
                       "--batch-size", "8", "--learning-rate", "0.01", "--jobs", "1"])
    assert results["comparison"]["pets"]["finals"]["random"] == [100.0] and results["data"]["pets"]["train"] == 48
    pixels = "label,p0,p1,p2,p3\n" + "".join(f"{i % 2},0,{i},{255 - i},9\n" for i in range(50))
    Path("pixels.csv").write_text(pixels)
    assert bs.load_csv(Path("pixels.csv")).x_train.shape == (40, 1, 2, 2)
    Path("large.csv").write_text("label,t\n" + "".join(f"{i % 2},{1_700_000_000 + i % 2}\n" for i in range(50)))
    large = bs.load_csv(Path("large.csv"))
    assert large.x_train[:, 0] == pytest.approx(2.0 * large.y_train - 1), "a step of one second is not lost"
    Path("pixels.csv").write_text(pixels.replace(",9\n", ",0.9\n"))
    assert bs.load_csv(Path("pixels.csv")).x_train.dtype == np.float32, "no pixels: nothing is cut off"
    capsys.readouterr()
    for text, words in (("a,b\n1,2\n", "one column called label"), ("label\n1\n", "at least one other"),
                        ("label,a\n", "no rows"), ("label,a\n0,1\n1,x\n", "x"), ("label,a\n0,1\n1,\n", "row 2"),
                        ("label,a\n0,1\n0,2\n", "two classes"), ("", "Empty"),
                        ("label,label\n1,2\n", "2 columns are called 'label'"),
                        ("label,a,b,a\n1,2,3,4\n", "are called 'a'"),
                        ("label,a\n0,1\n  ,2\n1,3\n", "row 2 has no label")):
        Path("bad.csv").write_text(text)
        with pytest.raises(SystemExit):
            bs.main(["--data", "bad.csv"])
        error = capsys.readouterr().err
        assert "bad.csv" in error and words in error and error.count("\n") == 1, text


def test_text_is_windows_that_share_nothing(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_bytes(bytes(range(200)))
    (folder / "sub/b.txt").write_bytes(bytes(range(100, 156)))
    data = bs.load_text(str(folder), options(window_len=10, text_bytes=10**6))
    assert data.x_train.shape == (23, 10) and data.x_test.shape == (2, 10) and data.num_classes == 256
    flat = np.concatenate([data.x_train, data.x_test]).ravel()
    assert sorted(flat) == sorted((bytes(range(200)) + bytes(range(100, 156)))[:250]) or len(flat) == 250
    assert (data.y_train.ravel()[:-1] == data.x_train.ravel()[1:]).all()
    assert data.x_train.base is not None and np.shares_memory(data.x_train, data.y_train), "views, not copies"
    embedded = bs.load_text(None, options(window_len=64, text_bytes=50_000))
    assert embedded.info["source"] == "embedded" and 2 < embedded.info["baseline"]["bigram: bits per byte"] < 6
    for path, words in (("nowhere", "No such file"), (str(tmp_path / "texts/sub/b.txt"), "less than three windows")):
        with pytest.raises(bs.UserError, match=words):
            bs.load_text(path, options(window_len=64, text_bytes=1000))


# --- Models, training, whole runs -------------------------------------------------------------------------------------


def test_models():
    assert sum(p.numel() for p in bs.SimpleMLP((1, 28, 28), 10).parameters()) == 784 * 128 + 128 + 128 * 10 + 10
    assert bs.SmallCNN((3, 32, 32), 100)(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
    model, tokens = bs.TinyTransformer((16,), 256), torch.randint(0, 256, (2, 16))
    later = tokens.clone()
    later[:, 9:] = 0
    assert torch.allclose(model(tokens)[:, :9], model(later)[:, :9], atol=1e-5)
    assert not torch.allclose(model(tokens)[:, 9:], model(later)[:, 9:], atol=1e-3)


def test_label_noise_changes_its_share_of_the_training_labels_alone(monkeypatch):
    y = np.arange(1000) % 10
    noisy = bs.add_label_noise(y, 10, 0.1, seed=3)
    assert (noisy != y).sum() == 100 and set(noisy) <= set(range(10))
    assert (bs.add_label_noise(y, 10, 0.1, 3) == noisy).all()
    assert (bs.add_label_noise(y, 10, 0.1, 4) != noisy).any() and (y == np.arange(1000) % 10).all()
    seen, original = [], bs.measure
    monkeypatch.setattr(bs, "measure", lambda model, data, task: seen.append(data) or original(model, data, task))
    digits("--label-noise", "0.1", "--epochs", "1", "--runs", "1", "--strategy", "random", "smart")
    clean = bs.load_dataset("digits", "data")
    assert all((data.y_test.numpy() == clean.y_test).all() for data in seen)
    assert {(data.y_train.numpy() != clean.y_train).sum() for data in seen} == {144}
    assert (seen[0].y_train == seen[-1].y_train).all(), "the same noise for every strategy"


def test_one_command_does_everything_in_the_seeds_folders(capsys):
    strategies = ["random", "smart", "loss_threshold"]
    results = bs.main(["--quick", "--runs", "3", "--jobs", "1", "--strategy", *strategies])
    assert results["finished"] and set(results["comparison"]) == {"digits", "digits_csv"}
    root = Path("outputs/vision")
    names = {path.name for path in (root / "run-001").iterdir()}
    assert names == {"results.json", "summary.txt", "benchmark.png", "comparison_digits.png",
                     "comparison_digits_csv.png"}
    for strategy in strategies:
        folder = root / "digits" / strategy / "run-001"
        assert {path.name for path in folder.iterdir()} == METRIC_PICTURES | {
            "summary.txt", "results.json", "seed-42.pt", "seed-43.pt", "seed-44.pt"}
        one = json.loads((folder / "results.json").read_text())
        finals = [history[-1]["test_acc"] for history in one["histories"]]
        assert one["finished"] and finals == results["comparison"]["digits"]["finals"][strategy]
        assert results["comparison"]["digits_csv"]["finals"][strategy] == finals, "the CSV is the same data"
    first = [json.loads((root / f"digits/{strategy}/run-001/results.json").read_text())["histories"][0][0]
             for strategy in strategies]
    assert all(entry == first[0] for entry in first), "the same first weights for every strategy"
    text = (root / "run-001/summary.txt").read_text()
    assert text in capsys.readouterr().out and "smart" in text and "majority class: test accuracy [%]: 1" in text
    assert text.count("p = ") == text.count("loss_threshold: +0.00 points from random in every seed, no test") == 2
    assert ", after 1 epoch, 1,437 samples against 1,437\n" in text and "1 epoch, batches of 64, 3 runs" in text
    assert "training metrics: 1 in 3 samples;" in text and "difference from random [points]" in text
    assert set(results["seconds"]) == {"data", "runs", "tables and pictures"} and results["peak_memory_mib"] > 1
    state = torch.load(root / "digits/smart/run-001/seed-42.pt", weights_only=True)
    assert state["arguments"] == results["arguments"]

    newer = root / "digits/smart/run-000/results.json"
    newer.parent.mkdir()
    newer.write_text('{"experiment": "visi')  # half written
    again = bs.main(["--only", "compare", "--strategy", "random", "smart"])
    newer.unlink()
    newer.parent.rmdir()
    assert again["arguments"] == results["arguments"] | {"only": "compare", "strategy": ["random", "smart"]}
    assert again["comparison"]["digits"]["finals"]["smart"] == results["comparison"]["digits"]["finals"]["smart"]
    assert {path.name for path in (root / "run-002").iterdir()} == {
        "results.json", "summary.txt", "comparison_digits.png"}
    short = ["--epochs", "1", "--runs", "1", "--jobs", "1"]
    bs.main(["--only", "run", "--dataset", "digits", "--strategy", "fixed", *short])
    assert {path.name for path in (root / "run-003").iterdir()} == {"results.json", "summary.txt"}
    bench = bs.main(["--dataset", "digits_csv", "--benchmark-datasets", "digits", "--strategy", "random", "fixed",
                     *short])
    assert bench["arguments"]["benchmark_datasets"] == ["digits_csv", "digits"]
    assert (root / "run-004/benchmark.png").exists()
    assert "no verdict" in (root / "run-004/summary.txt").read_text()


def test_language_task():
    results = bs.main(["--task", "nlp", "--quick", "--runs", "2", "--text-bytes", "20000",
                       "--strategy", "random", "smart"])
    folder = Path("outputs/nlp/python_stdlib/smart/run-001")
    assert {path.name for path in folder.iterdir()} == {
        "bits_per_byte.png", "perplexity.png", "validation_loss.png", "train_loss.png", "results.json", "summary.txt",
        "seed-42.pt", "seed-43.pt"}
    before, after = json.loads((folder / "results.json").read_text())["histories"][0]
    assert before["bits_per_byte"] == pytest.approx(8, abs=0.3) and after["bits_per_byte"] < before["bits_per_byte"] - 1
    assert after["perplexity"] == pytest.approx(2 ** after["bits_per_byte"])
    assert list(results["comparison"]) == ["python_stdlib"]
    assert "validation windows" in Path("outputs/nlp/run-001/summary.txt").read_text()
    results = bs.main(["--task", "nlp", "--text-bytes", "5000", "--learning-rate", "1e4", "--batch-size", "80",
                       "--runs", "1", "--epochs", "1", "--strategy", "random", "--data", ".", "--jobs", "1"])
    name = Path.cwd().name
    assert list(results["comparison"]) == [name] and Path(f"outputs/nlp/{name}/random/run-002/perplexity.png").exists()
    history = json.loads(Path(f"outputs/nlp/{name}/random/run-002/results.json").read_text())["histories"][0]
    assert history[1]["perplexity"] is None and history[1]["bits_per_byte"] > 1000


def test_strategy_data_set_and_model_are_one_entry_each(monkeypatch):
    def read_toy(folder):
        x, y = images(80, (1, 4, 4), classes=2)
        x[:, 0, 0, 0] = 255 * y
        return x[:60], y[:60], x[60:], y[60:]

    class Linear(nn.Sequential):
        def __init__(self, shape, classes):
            super().__init__(nn.Flatten(), nn.Linear(math.prod(shape), classes))

    monkeypatch.setitem(bs.STRATEGIES, "hardest", lambda loss, score, args, rng: iter([np.argsort(-loss)[:16]]))
    monkeypatch.setitem(bs.DATASETS, "toy", bs.Dataset(2, 80, 0, read_toy))
    monkeypatch.setitem(bs.MODELS["vision"], "linear", Linear)
    results = bs.main(["--dataset", "toy", "--strategy", "random", "hardest", "--model", "linear", "--no-benchmark",
                       "--learning-rate", "0.1", "--batch-size", "16", "--jobs", "1"])
    assert np.mean(results["comparison"]["toy"]["finals"]["random"]) > 90
    assert Path("outputs/vision/toy/hardest/run-001/seed-46.pt").exists()


def finals_of(results):
    return results["comparison"]["digits"]["finals"]


PARALLEL = ["--dataset", "digits", "--no-benchmark", "--epochs", "2", "--runs", "2", "--strategy", "selective_backprop",
            "--device", "cpu"]


def assert_equal_runs(root, other_root, runs):
    paths = sorted(Path(root).rglob("seed-*.pt"))
    assert len(paths) == runs
    for path in paths:
        one, other = (torch.load(file, weights_only=True) for file in (path, other_root / path.relative_to(root)))
        assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
        assert torch.equal(one["loss"], other["loss"]) and len(one["history"]) == len(other["history"])


def test_dask_equals_sequential():
    pytest.importorskip("distributed")
    alone = bs.main([*PARALLEL, "--jobs", "1", "--output-dir", "alone"])
    dask = bs.main([*PARALLEL, "--jobs", "2", "--backend", "dask", "--output-dir", "dask"])
    assert finals_of(alone) == finals_of(dask)
    assert_equal_runs("alone", Path("dask"), runs=2)


def test_loky_in_a_notebook_equals_sequential(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    (tmp_path / "empty").mkdir()
    cells = [f"%%writefile common.py\n{(ROOT / 'common.py').read_text()}",
             (ROOT / "batch_selection.py").read_text().replace("    main()\n", "    pass\n"),
             f"results = main({[*PARALLEL, '--jobs', '2']})"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(book, timeout=200, resources={"metadata": {"path": tmp_path / "empty"}}).execute()
    pictures = [output for output in book.cells[-1].outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1 + 4
    bs.main([*PARALLEL, "--jobs", "1", "--output-dir", "alone"])
    assert_equal_runs("alone", Path("empty/outputs"), runs=2)


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path, capsys):
    argv = ["--dataset", "digits", "--no-benchmark", "--runs", "2", "--epochs", "3", "--strategy", "smart",
            "selective_backprop", "--jobs", "1", "--device", "cpu"]
    whole = bs.main([*argv, "--output-dir", "whole"])
    kill = "\n".join([  # in its batch 3 · 23 + 15: the second strategy's second epoch
        "import itertools, os, sys, batch_selection as bs",
        "track, calls = bs.track, itertools.count(1)",
        "bs.track = lambda *given: os.kill(os.getpid(), 9) if next(calls) == 84 else track(*given)",
        "bs.main(sys.argv[1:])"])
    command = [sys.executable, "-c", kill, *argv, "--output-dir", "killed"]
    process = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert process.returncode == -signal.SIGKILL
    state = torch.load("killed/vision/digits/selective_backprop/run-001/seed-42.pt", weights_only=True)
    assert len(state["history"]) == 2 and not list(Path("killed").rglob("seed-43.pt"))
    first = Path("killed/vision/digits/smart/run-001/seed-42.pt")
    stamp = first.stat().st_mtime_ns
    with pytest.raises(SystemExit):
        bs.main(["--resume", "--output-dir", "killed", "--epochs", "5"])  # the default is an argument too
    assert "a run keeps its own arguments" in capsys.readouterr().err
    resumed = bs.main(["--resume", "--output-dir", "killed"])
    assert finals_of(resumed) == finals_of(whole) and first.stat().st_mtime_ns == stamp, "finished runs are skipped"
    assert_equal_runs("whole", Path("killed"), runs=4)
    with pytest.raises(SystemExit):
        bs.main(["--resume", "--output-dir", "killed"])
    assert "no unfinished run" in capsys.readouterr().err


def test_ctrl_c_bad_checkpoints_and_other_data(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bs, "compare", interrupt)
        with pytest.raises(SystemExit) as stopped:
            digits("--epochs", "1", "--runs", "1", "--strategy", "random")
    said = capsys.readouterr().err
    assert stopped.value.code == 130 and "--resume outputs/vision/run-001 --output-dir outputs" in said
    checkpoint = Path("outputs/vision/digits/random/run-001/seed-42.pt")
    whole = checkpoint.read_bytes()
    state = torch.load(checkpoint, weights_only=True) | {"data": "of another day"}
    for change, words in ((lambda: checkpoint.write_bytes(whole[:2000]), "not a whole checkpoint"),
                          (lambda: torch.save(state, checkpoint), "other data")):
        change()
        with pytest.raises(SystemExit) as stopped:
            bs.main(["--resume", "run-001"])
        assert Path("outputs/vision/run-001").is_dir()
        assert stopped.value.code == 2 and words in capsys.readouterr().err
    shutil.rmtree("outputs/vision/digits")
    with pytest.raises(SystemExit), monkeypatch.context() as patch:
        patch.setattr(bs, "train_all", lambda *_: bs.check_finite(math.nan))
        bs.main(["--resume"])
    assert Path("outputs/vision/run-001").is_dir(), "what another invocation made stays"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(whole)
    foreign = Path("outputs/fire/run-001")
    foreign.mkdir(parents=True)
    (foreign / "results.json").write_text('{"experiment": "fire", "finished": false, "arguments": {}}')
    for argv in (["--resume", str(foreign)], ["--resume", "run-001", "--output-dir", "nowhere"]):
        with pytest.raises(SystemExit):
            bs.main(argv)
        assert "no unfinished run" in capsys.readouterr().err
    assert bs.main(["--resume"])["finished"]


def test_a_killed_worker_and_a_missing_package(monkeypatch, capsys):
    def killed(*_):
        raise TerminatedWorkerError

    def missing(name):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(bs, "train_all", killed)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(SystemExit):
        digits()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--resume outputs/vision/run-001" in error and "fewer --jobs" in error
    assert Path("outputs/vision/run-001/results.json").exists()


@pytest.mark.parametrize(("argv", "words"), [
    ("--dataset minst", "--dataset"), ("--strategy clever", "--strategy"), ("--epochs 0", "not between 1"),
    ("--label-noise 2", "not between 0 and 1"), ("--batch-size x", "--batch-size"),
    ("--device quantum", "unknown device 'quantum'"), ("--model transformer", "is not of --task vision"),
    ("--task nlp --model cnn", "is not of --task nlp"), ("--task nlp --dataset digits", "nlp takes --data"),
    ("--dataset digits --data x.csv", "exclude each other"), ("--data nowhere.csv", "nowhere.csv"),
    ("--no-benchmark --benchmark-datasets digits", "exclude each other"),
    ("--only benchmark --no-benchmark", "needs data sets"), ("--only compare --dataset digits", "no finished results"),
    ("--dataset cifar10", "cifar-10-binary.tar.gz into data/cifar10"), ("--download cifar100", "cannot download"),
    ("--task nlp --data nowhere", "No such file"), ("--resume", "no unfinished run"), ("--jobs 0", "--jobs"),
    ("--dataset digits --learning-rate 1e30 --jobs 1 --strategy smart", "lower --learning-rate"),
    ("--data=", "a path is empty"), ("--resume=", "a path is empty"),
    ("--only compare --epochs 5", "nothing is trained"),
    ("--dataset digits --learning-rate 1e20 --batch-size 2000 --jobs 1 --epochs 1", "lower --learning-rate"),
    ("--data table.csv --model cnn", "a CNN needs images"), ("--data-dir file --dataset mnist", "file"),
    ("--output-dir file --dataset digits", "file"), ("--nonsense", "--nonsense"),
])
def test_every_error_is_one_line(argv, words, capsys):
    Path("file").write_text("in the way")
    Path("table.csv").write_text("label,a,b\n" + "0,1,2\n1,3,4\n" * 10)
    with pytest.raises(SystemExit) as stopped:
        bs.main(argv.split())
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith("batch_selection.py: error: ") and words in error
    assert not list(Path("outputs").glob("vision/run-*")) or "learning" in argv


def test_a_dask_scheduler_that_does_not_answer(monkeypatch, capsys):
    pytest.importorskip("distributed")
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://127.0.0.1:9")
    with pytest.raises(SystemExit) as stopped:
        digits("--backend", "dask")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "no dask scheduler at DASK_SCHEDULER_ADDRESS=tcp://127.0.0.1:9" in error


def test_lists(capsys):
    assert bs.main(["--list-datasets"]) is None and bs.main(["--check-device"]) is None
    out = capsys.readouterr().out
    assert "| cinic10 | 10 | 180,000 | 656 | no | no |" in out and "cpu: " in out and "auto: " in out
