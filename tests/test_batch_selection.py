"""What users of batch_selection.py rely on: offline, on the CPU. Every file that a reader needs is written here."""

import gzip
import hashlib
import inspect
import io
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import tracemalloc
import unittest.mock
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, run_notebook
from PIL import Image
from scipy import stats
from torch import nn

import batch_selection as bs

METRIC_PICTURES = {"test_acc.png", "train_acc.png", "test_loss.png", "train_loss.png"}


@pytest.fixture(autouse=True)
def no_data_of_this_machine(monkeypatch, tmp_path):
    """Each test in its own folder, with addresses that nobody answers."""
    monkeypatch.chdir(tmp_path)
    for dataset in bs.DATASETS.values():
        monkeypatch.setattr(dataset, "url", "http://127.0.0.1:9/{}")
    with unittest.mock.patch.dict(os.environ):  # dask sets OMP_NUM_THREADS here too, not in its workers alone
        yield


def digits(*argv):
    """Results of a run on the digits, without the pictures of each strategy."""
    return bs.main(["--quick", "--dataset", "digits", "--no-benchmark", "--device", "cpu", *argv])


def load(name):
    bs.NOTES.clear()
    return bs.load_dataset(name, "data")


def make_learner(samples=331, epochs=3, **changes):
    """A Learner of random samples in two classes, with the arguments changed."""
    args = bs.parse_args(["--device", "cpu"])
    vars(args).update(epochs=epochs, **changes)
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(samples, 4)).astype(np.float32), rng.integers(0, 2, samples)
    data = bs.make_data("random", (x, y, x[:50], y[:50]), "embedded").to("cpu")
    learner = bs.Learner(data, bs.SimpleMLP, 7, args, epochs)
    bs.measure(learner)
    return learner


# --- Strategies -------------------------------------------------------------------------------------------------------


def simulate(strategy, samples=331, epochs=3, **changes):
    """(rows, weights, tracked loss, latest loss before) of each batch; the losses fall as in training."""
    learner = make_learner(samples, epochs, **changes)
    difficulty = np.random.default_rng(8).exponential(1, samples).astype(np.float32).round(1)  # with ties
    learner.score = lambda rows, gradient_norms=False: difficulty[rows]
    batches = []
    for _ in range(epochs):
        for rows, weights in strategy(learner):
            batches.append((rows.copy(), weights, learner.loss.copy(), learner.last_loss.copy()))
            bs.track_losses(learner, rows, difficulty[rows])
            difficulty[rows] *= np.float32(0.9)
        learner.history.append({"steps": 0})
    return batches


def assert_same_batches(strategy, plain, **changes):
    batches, expected = simulate(strategy, **changes), simulate(plain, **changes)
    assert len(batches) == len(expected)
    for (rows, weights, *_), (plain_rows, plain_weights, *_) in zip(batches, expected):
        assert list(rows) == list(plain_rows)
        assert (weights is None) == (plain_weights is None)
        assert weights is None or weights == pytest.approx(plain_weights, rel=1e-5)
    return batches


def test_random_covers_every_sample_once_an_epoch_in_new_orders():
    batches = [rows for rows, *_ in simulate(bs.random_batches, 331, epochs=2, batch_size=50)]
    first, second = np.concatenate(batches[:7]), np.concatenate(batches[7:])
    assert sorted(first) == sorted(second) == list(range(331))
    assert list(first) != list(second)
    assert len(batches[6]) == 31


def test_fixed_keeps_the_order_of_the_file():
    batches = [rows for rows, *_ in simulate(bs.fixed_batches, 331, epochs=2, batch_size=50)]
    assert list(np.concatenate(batches)) == 2 * list(range(331))


@pytest.mark.parametrize("hardest_first", [True, False])
def test_smart_and_easy_first_are_their_plain_definitions(hardest_first):
    def plain(learner):
        n = len(learner.loss)
        for step in range(math.ceil(n / 16)):
            ranked = sorted(learner.loss, reverse=hardest_first)
            last_of_top = ranked[round(0.2 * n) - 1]
            top = [i for i in range(n) if (learner.loss[i] - last_of_top) * (1 if hardest_first else -1) >= 0
                   or learner.loss[i] == last_of_top]
            size = min(16, n - step * 16)  # no more samples an epoch than random
            explore = learner.rng.choice(n, round(0.5 * size), replace=False)
            yield np.concatenate([explore, learner.rng.choice(top, size - len(explore), replace=False)]), None

    strategy = bs.smart if hardest_first else bs.easy_first
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # inf - inf of the plain definition
        batches = assert_same_batches(strategy, plain, batch_size=16)
    assert sum(len(rows) for rows, *_ in batches) == 3 * 331
    if hardest_first:
        rows, _, loss, _ = batches[3]
        assert np.isinf(loss[rows[8:]]).all(), "unseen samples count as the hardest"


def test_smart_draws_among_all_that_tie():
    learner = make_learner(40, batch_size=30)
    learner.loss[:] = 1
    assert [len(rows) for rows, _ in bs.smart(learner)] == [30, 10]


@pytest.mark.parametrize(("threshold", "size", "expected"), [
    (0.6, 2, {1, 2, 4, 5}), (0.6, 5, {1, 2, 3, 4, 5}), (0.8, 3, {1, 2, 4}), (9, 1, {4})])
def test_loss_threshold_is_its_plain_definition(threshold, size, expected):
    learner = make_learner(6, batch_size=size)
    learner.loss[:] = [0.1, 0.9, 0.7, 0.3, np.inf, 0.65]
    batches = [rows for rows, _ in bs.loss_threshold(learner, threshold)]
    assert sorted(np.concatenate(batches)) == sorted(expected)
    assert max(map(len, batches)) <= size


def test_selective_backprop_is_its_plain_definition():
    def plain(learner, history=30):
        order, past, queue = learner.rng.permutation(331), [], []
        for start in range(0, 331, 10):
            candidates = order[start : start + 10]
            losses = dict(zip(candidates, learner.score(candidates)))
            past = (past + list(losses.values()))[-history:]
            for i, draw in zip(candidates, learner.rng.random(len(candidates))):
                share = sum(loss <= losses[i] for loss in past) / len(past)
                if draw < share:
                    queue.append(i)
            if len(queue) >= 10:
                yield np.array(queue[:10]), None
                queue = queue[10:]
        if queue:
            yield np.array(queue), None

    assert_same_batches(partial(bs.selective_backprop, history=30), plain, batch_size=10)


def test_self_paced_is_its_plain_definition():
    def plain(learner):
        queue = []
        order = learner.rng.permutation(331)
        for start in range(0, 331, 10):
            candidates = order[start : start + 10]
            queue += [i for i, loss in zip(candidates, learner.score(candidates)) if loss < 2 * math.log(2)]
            if len(queue) >= 10:
                yield np.array(queue[:10]), None
                queue = queue[10:]
        if queue:
            yield np.array(queue), None

    batches = assert_same_batches(bs.self_paced, plain, batch_size=10)
    assert sum(len(rows) for rows, *_ in batches) < 3 * 331


def test_infobatch_is_its_plain_definition():
    def plain(learner):
        order = learner.rng.permutation(331)
        weights = [1.0] * 331
        left_out = set()
        is_whole = not 0 < len(learner.history) - 1 < 3  # the first and the last of four epochs
        if not is_whole:
            mean = sum(map(float, learner.last_loss)) / 331
            for i, draw in enumerate(learner.rng.random(331)):
                if learner.last_loss[i] < mean:
                    weights[i] = 2.0
                    if draw < 0.5:
                        left_out.add(i)
        order = [i for i in order if i not in left_out]
        for start in range(0, len(order), 16):
            rows = np.array(order[start : start + 16])
            yield rows, None if is_whole else np.array([weights[i] for i in rows])

    batches = assert_same_batches(bs.infobatch, plain, batch_size=16, epochs=4)
    sizes = [len(rows) for rows, *_ in batches]
    assert sum(sizes[:21]) == sum(sizes[-21:]) == 331
    assert sum(sizes) < 4 * 331 - 100


def test_importance_is_its_plain_definition():
    def plain(learner):
        order = learner.rng.permutation(331)
        for start in range(0, 331, 50):
            candidates = order[start : start + 50]
            norms = [float(norm) + 1e-8 for norm in learner.score(candidates, gradient_norms=True)]
            chances = np.array([norm / sum(norms) for norm in norms])
            drawn = learner.rng.choice(len(candidates), math.ceil(len(candidates) / 5), p=chances)
            yield candidates[drawn], np.array([1 / (len(candidates) * chances[i]) for i in drawn])

    assert_same_batches(bs.importance, plain, batch_size=10)


def test_the_gradient_norm_is_that_of_autograd():
    learner = make_learner(6)
    x, y = learner.data.training_samples(np.arange(6))
    _, logits = bs.sample_losses(learner.model, x, y)
    logits = logits.detach().requires_grad_()
    nn.functional.cross_entropy(logits, y, reduction="sum").backward()
    assert learner.score(np.arange(6), gradient_norms=True) == pytest.approx(logits.grad.norm(dim=1).numpy(), rel=1e-5)


def test_loss_rank_is_its_plain_definition():
    def plain(learner):
        shuffled = list(learner.rng.permutation(331))
        ranked = sorted(shuffled, key=lambda i: -learner.last_loss[i])
        pressure = 100 ** (1 - (len(learner.history) - 1) / 3)
        chances = np.array([1 / math.exp(math.log(pressure) * rank / 331) for rank in range(331)])
        chances /= chances.sum()
        draws = learner.rng.random(331)
        drawn = [ranked[min(330, next((k for k, c in enumerate(np.cumsum(chances)) if c >= draw), 330))]
                 for draw in draws]
        for start in range(0, 331, 16):
            yield np.array(drawn[start : start + 16]), None

    assert_same_batches(bs.loss_rank, plain, batch_size=16)


def test_rho_loss_takes_the_largest_reducible_losses():
    def plain(learner):
        if not hasattr(learner, "kept"):
            learner.kept = bs.holdout_losses(learner)
        order = learner.rng.permutation(331)
        for start in range(0, 331, 50):
            candidates = order[start : start + 50]
            reducible = [now - learner.kept[i] for i, now in zip(candidates, learner.score(candidates))]
            ranked = sorted(range(len(candidates)), key=lambda k: -reducible[k])
            yield candidates[ranked[: math.ceil(len(candidates) / 5)]], None

    assert_same_batches(bs.rho_loss, plain, batch_size=10)


def test_holdout_models_have_not_seen_what_they_score_and_cost_samples(monkeypatch):
    learner = make_learner(200)
    learner.data.y_train[:] = torch.randint(0, 2, (200,))  # nothing to learn but by heart
    seen, halves = [], []
    get, evaluate = bs.Data.training_samples, bs.evaluate
    monkeypatch.setattr(bs.Data, "training_samples", lambda data, rows: (seen.append(set(rows)), get(data, rows))[1])

    def evaluate_half(*samples):
        halves.append((set.union(*seen[:-1]), seen[-1]))
        seen.clear()
        return evaluate(*samples)

    monkeypatch.setattr(bs, "evaluate", evaluate_half)
    losses = bs.holdout_losses(learner)
    assert len(halves) == 2
    assert all(not trained & scored and len(trained | scored) == 200 for trained, scored in halves)
    assert np.isfinite(losses).all()
    assert learner.samples == 200


def test_weights_scale_the_gradient_of_their_sample():
    def step(weights):
        learner = make_learner(4, schedule="constant")
        learner.optimizer = torch.optim.SGD(learner.model.parameters(), 1.0)
        before = [parameter.detach().clone() for parameter in learner.model.parameters()]
        bs.train_epoch(learner, lambda learner: [(np.arange(2), weights)])
        return [after.detach() - old for after, old in zip(learner.model.parameters(), before)]

    first, second, both = (step(np.array(w, np.float32)) for w in ([1, 0], [0, 1], [3, 0.5]))
    for a, b, c in zip(first, second, both):
        assert torch.allclose(3 * a + 0.5 * b, c, atol=1e-6)


def test_weights_of_another_shape_never_apply_to_all_samples():
    def weighted(weights):
        learner = make_learner(4)
        bs.train_epoch(learner, lambda learner: [(np.arange(3), weights)])
        return learner.model[1].weight

    row = np.arange(3.0)
    assert torch.equal(weighted(row[:, None]), weighted(row)), "a column is no table of 3 x 3"
    with pytest.raises(RuntimeError, match="invalid for input of size 1"):
        weighted(np.ones(1))


def test_no_rows_are_no_batches():
    learner = make_learner(4)
    assert learner.batches(np.flatnonzero(learner.loss < 0)) == learner.batches([]) == []


def test_strategies_are_short_and_take_one_argument():
    for name, strategy in bs.STRATEGIES.items():
        required = [p for p in inspect.signature(strategy).parameters.values() if p.default is p.empty]
        assert len(required) == 1, name
        assert len(inspect.getsource(strategy).splitlines()) < 25, name


def test_moving_average_by_hand():
    learner = make_learner(4)
    bs.track_losses(learner, np.array([0, 2]), np.array([2.0, 1.0]))
    assert learner.loss.tolist() == [2.0, np.inf, 1.0, np.inf]
    bs.track_losses(learner, np.array([2, 3]), np.array([3.0, 5.0]))
    assert learner.loss.tolist() == pytest.approx([2.0, np.inf, 0.9 * 1 + 0.1 * 3, 5.0])
    assert learner.last_loss.tolist() == [2.0, np.inf, 3.0, 5.0]
    learner.args.smart_loss = "batch-mean"
    bs.track_losses(learner, np.array([0, 1]), np.array([7.0, 8.0]))
    assert learner.loss[:2].tolist() == pytest.approx([0.9 * 2 + 0.1 * 7.5, 7.5])


def test_the_learning_rate_decays_to_zero_or_stays():
    rates = {"linear": [], "constant": []}
    for schedule, seen in rates.items():
        learner = make_learner(100, epochs=2, batch_size=10, schedule=schedule)
        step = learner.optimizer.step
        learner.optimizer.step = lambda step=step, learner=learner, seen=seen: (
            seen.append(learner.optimizer.param_groups[0]["lr"]), step())
        for _ in range(2):
            bs.train_epoch(learner, bs.random_batches)
            bs.measure(learner)
    assert rates["linear"] == pytest.approx([0.001 * (1 - i / 20) for i in range(20)])
    assert rates["constant"] == [0.001] * 20


@pytest.mark.parametrize("name", bs.STRATEGIES)
def test_the_learning_rate_decays_to_zero_in_a_single_epoch(name):
    learner = make_learner(3000, epochs=1, batch_size=10)
    bs.train_epoch(learner, bs.STRATEGIES[name])
    assert learner.optimizer.param_groups[0]["lr"] < 0.02 * 0.001, "as the control's, which has as many samples"


# --- Statistics -------------------------------------------------------------------------------------------------------


def make_records(finals, controls):
    """Records of one setting: {strategy: [last value of each seed]}, and those of the controls."""
    rows = []
    for name, values in finals.items():
        for seed, value in enumerate(values):
            control = controls[name][seed] if name in controls else math.nan
            for epoch, score in ((0, 10.0), (1, 99.0), (2, value)):  # the best epoch does not count
                rows.append({"setting": "digits", "strategy": name, "seed": seed, "epoch": epoch,
                             "samples": 100 * epoch, "seconds": 2.0 * epoch, "test_acc": score, "bits_per_byte": score,
                             "difference": round(score - control, 9)})
    return pd.DataFrame(rows)


def compare(finals, task="vision", controls=None):
    """The table of one setting and its verdict; without `controls`, each is compared with random's run."""
    args = bs.parse_args(["--task", task, "--runs", str(len(finals["random"]))])
    controls = controls or {name: finals["random"] for name in finals if name != "random"}
    table = bs.compare(make_records(finals, controls), args).loc["digits"]
    return table, bs.verdict(table, args)


def test_comparisons_agree_with_scipy():
    rng = np.random.default_rng(0)
    finals = {"random": rng.normal(90, 0.3, 5), "good": rng.normal(91.5, 0.3, 5), "same": rng.normal(90, 0.3, 5),
              "bad": rng.normal(88, 0.3, 5)}
    table, verdict = compare(finals)
    p = {name: stats.ttest_rel(finals[name], finals["random"]).pvalue for name in ("good", "same", "bad")}
    for name, row in table.drop("random").iterrows():
        low, high = stats.ttest_rel(finals[name], finals["random"]).confidence_interval(0.95)
        assert (row["difference"] - row["width"], row["difference"] + row["width"]) == pytest.approx((low, high))
        harder = [other for other in p if p[other] <= p[name]]  # Holm: the worst of the steps up to this one
        assert row["p"] == pytest.approx(min(1, max(
            p[other] * sum(p[third] >= p[other] for third in p) for other in harder)))
    control = "random with as many trained samples"
    assert re.fullmatch(rf"Better than {control}: good \(\+1\.\d\d ± 0\.\d\d \*\)\. Not significantly different "
                        rf"from {control}: same \([^)]*\)\. Worse than {control}: bad \(-[^)]*\)\.", verdict)


def test_fewer_bits_per_byte_are_better():
    rng = np.random.default_rng(0)
    _, verdict = compare({"random": rng.normal(3, 0.1, 5), "smart": rng.normal(2, 0.1, 5)}, "nlp")
    assert "Better than random with as many trained samples: smart (-" in verdict


def test_a_strategy_is_compared_with_its_own_control():
    finals = {"random": [90.0, 91, 92], "smart": [80.0, 82, 84]}
    table, _ = compare(finals, controls={"smart": [70.0, 71, 75]})
    assert table.loc["smart", "difference"] == pytest.approx(10)


def test_the_same_difference_in_every_run_is_not_tested():
    with warnings.catch_warnings(action="error"):
        table, verdict = compare({"random": [1.1, 2.2, 3.3], "a": [2.2, 3.3, 4.4], "b": [3, 3, 3.6]})
    assert math.isnan(table.loc["a", "p"])
    assert "Not significantly different from random with as many trained samples: a (+1.10 ± 0.00)" in verdict
    p = stats.ttest_rel([1.1, 2.2, 3.3], [3, 3, 3.6]).pvalue
    assert table.loc["b", "p"] == pytest.approx(p), "only one test is corrected for"


def test_the_target_is_reached_by_the_mean_of_all_runs_not_by_one_that_trains_longer():
    records = make_records({"random": [90.0, 91, 92], "slow": [50.0, 51, 52]}, {"slow": [90.0, 91, 92]})
    records.loc[records["epoch"] == 1, "test_acc"] = 10
    longer = records.iloc[[-1]].assign(epoch=3, test_acc=99.0)
    table = bs.compare(pd.concat([records, longer]), bs.parse_args(["--runs", "3"])).loc["digits"]
    assert table.loc["random", "samples to target"] == 200
    assert math.isnan(table.loc["slow", "samples to target"])


def test_holm_by_hand():
    corrected = bs.holm(pd.Series([0.01, 0.04, math.nan, 0.03]))
    assert corrected.tolist() == pytest.approx([0.03, 0.06, math.nan, 0.06], nan_ok=True)


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
    for array, expected in zip(bs.read_idx(Path("data/mnist")), (x[:, None], y, x_test[:, None], y_test)):
        assert np.array_equal(array, expected)
    data = load("mnist")
    assert data.x_test[:, 0] == pytest.approx((x_test - x.mean()) / x.std(), abs=1e-5)
    assert (data.y_train == y).all()
    for part in ("train", "test"):
        labels = np.column_stack([y[:20], np.full((20, 7), 70_000)]).astype(np.int32)
        write_idx(Path(f"data/qmnist/qmnist-{part}-images-idx3-ubyte.gz"), x[:20])
        write_idx(Path(f"data/qmnist/qmnist-{part}-labels-idx2-int.gz"), labels)
    assert (load("qmnist").y_test == y[:20]).all()


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_reader(classes):
    x, y, x_test, y_test = write_cifar(Path(f"data/cifar{classes}"), classes)
    arrays = bs.read_cifar(Path(f"data/cifar{classes}"))
    for array, expected in zip(arrays, (x, y, x_test, y_test)):
        assert np.array_equal(array, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_cinic_reader(packed):
    colors = {}
    for part in ("train", "valid", "test"):
        for number, label in enumerate(("airplane", "bird", "truck")):
            folder = Path("data/cinic10") / part / label
            folder.mkdir(parents=True)
            for i in range(2):
                colors[part, number, i] = color = (40 * number, 10 * i, {"train": 1, "valid": 2, "test": 3}[part])
                Image.new("RGB", (32, 32), color).save(folder / f"{i}.png")
    Path("data/cinic10/loose.png").write_text("not in a class")
    if packed:
        with tarfile.open("data/archive", "w:gz") as archive:
            archive.add("data/cinic10", ".")
        Path("data/cinic10").rename("unpacked")
        Path("data/cinic10").mkdir()
        Path("data/archive").rename("data/cinic10/CINIC-10.tar.gz")
    assert bs.find_folder("cinic10", "data") == Path("data/cinic10")
    assert load("cinic10").info["classes"] == ["airplane", "bird", "truck"]
    arrays = bs.read_cinic(Path("data/cinic10"))
    for x, y, part in ((*arrays[:2], "train"), (*arrays[2:], "test")):
        assert x.shape == (6, 3, 32, 32)
        assert (x == x[:, :, :1, :1]).all()
        numbers = ["airplane", "bird", "truck"].index
        found = {(part, numbers(label), int(image[1, 0, 0]) // 10):
                 tuple(image[:, 0, 0].tolist()) for image, label in zip(x, y)}
        assert found == {key: color for key, color in colors.items() if key[0] == part}


def test_images_that_were_unpacked_in_part_are_not_taken_for_the_whole(monkeypatch):
    def interrupted(_, folder, **__):
        Path(folder, "train/cat").mkdir(parents=True)
        Path(folder, "train/cat/1.png").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.unpack_archive", interrupted)
    Path("data/cinic10").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        bs.read_cinic(Path("data/cinic10"))
    assert bs.find_folder("cinic10", "data") is None


WHOLE_LABELS = bytes([0, 0, 8, 1, 0, 0, 0, 40])


@pytest.mark.parametrize(("name", "content", "words"), [
    ("train-images-idx3-ubyte.gz", b"", "out of range"), ("train-images-idx3-ubyte.gz", "cut", "ended before"),
    ("train-images-idx3-ubyte.gz", b"<html></html>", "gzip"),
    ("train-labels-idx1-ubyte.gz", gzip.compress(WHOLE_LABELS + bytes(39)), "inconsistent numbers of samples"),
    ("t10k-images-idx3-ubyte (1).gz", gzip.compress(WHOLE_LABELS), "too many values"),
    ("t10k-labels-idx1-ubyte.gz", gzip.compress(WHOLE_LABELS[:7] + b"\x14" + bytes(19) + b"\x0b"), "unseen")])
def test_a_broken_file_is_an_error(name, content, words, error_line):
    write_mnist(Path("data/mnist"))
    path = Path("data/mnist", name)
    path.write_bytes(path.read_bytes()[:-3000] if content == "cut" else content)  # or one file more
    line = error_line(bs, ["--dataset", "mnist", "--no-benchmark"])
    assert words in line
    assert "mnist" in line
    assert error_line(bs, []) == line, "not the digits, and the same error later"
    assert not Path("outputs").exists()


def test_a_broken_archive_or_folder_of_images_is_an_error(error_line):
    write_cifar(Path("data/cifar10"), 10)
    archive = Path("data/cifar10/cifar-10-binary.tar.gz")
    archive.write_bytes(archive.read_bytes()[:-5000])
    line = error_line(bs, ["--dataset", "cifar10"])
    assert "cifar10 in data/cifar10: " in line
    assert "if a file is damaged or incomplete, delete it" in line
    Path("data/cinic10/train/cat").mkdir(parents=True)
    assert "cinic10 in data/cinic10: " in error_line(bs, ["--dataset", "cinic10"])
    for part in ("train", "test"):
        Path(f"data/cinic10/{part}/cat").mkdir(parents=True, exist_ok=True)
        Path(f"data/cinic10/{part}/cat/1.png").write_bytes(b"\x89PNG")
    assert "1.png" in error_line(bs, ["--dataset", "cinic10"])


def md5(content):
    return hashlib.md5(content).hexdigest()


def test_files_of_another_data_set_are_known_by_their_unpacked_content(monkeypatch, error_line):
    write_mnist(Path("data/mnist"))
    files = {path.name: path.read_bytes() for path in Path("data/mnist").iterdir()}
    for name, content in files.items():  # packed anew, as Debian does: another MD5
        Path("data/mnist", name).write_bytes(gzip.compress(gzip.decompress(content), 1))
    unpacked = gzip.decompress(files["train-images-idx3-ubyte.gz"])
    monkeypatch.setattr(bs, "OWNERS", {md5(unpacked): "fashion_mnist"})
    line = error_line(bs, ["--dataset", "mnist", "--no-benchmark"])
    assert "is a file of fashion_mnist; move it to a folder fashion_mnist" in line
    Path("data/mnist").rename("data/fashion_mnist")
    load("fashion_mnist")


def test_images_of_one_data_set_are_not_taken_for_another(capsys):
    Path("data/cinic10/train/cat").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save("data/cinic10/train/cat/1.png")
    assert bs.find_folder("mnist", "data") is None


def serve(folder):
    """A server of a folder, in a thread, that says nothing."""
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder))
    Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_downloads_are_checked_and_a_bad_one_does_not_stay(monkeypatch, capsys, error_line):
    write_mnist(Path("site"))
    files = {path.name: md5(path.read_bytes()) for path in Path("site").iterdir()}
    monkeypatch.setattr(bs.DATASETS["mnist"], "files", files)
    name = "train-images-idx3-ubyte.gz"
    with serve("site") as server:
        monkeypatch.setattr(bs.DATASETS["mnist"], "url", f"http://127.0.0.1:{server.server_port}/{{}}")
        bs.main(["--download", "mnist"])
        assert sorted(path.name for path in Path("data/mnist").iterdir()) == sorted(files)
        assert "mnist is in data/mnist" in capsys.readouterr().err
        bs.main(["--list-datasets"])
        assert "| mnist | 10 classes, 70,000 samples, 12 MB | yes |" in capsys.readouterr().out
        whole = Path("site", name).read_bytes()
        for content, words in ((whole[:100], "not the published one"), (None, "404")):
            Path("data/mnist", name).unlink(missing_ok=True)
            Path("site", name).unlink(missing_ok=True)
            if content:
                Path("site", name).write_bytes(content)
            line = error_line(bs, ["--dataset", "mnist"])
            assert words in line
            assert name in line
            assert not [path for path in Path("data/mnist").iterdir() if path.name.startswith(name)]
        server.shutdown()


def test_without_mnist_the_digits_are_used():
    results = bs.main(["--epochs", "1", "--runs", "1", "--jobs", "1", "--strategy", "random"])
    assert list(results["data"]) == ["digits"]
    assert "scikit-learn's digits are used" in results["notes"][0]


# --- One's own CSV ----------------------------------------------------------------------------------------------------


def write_pets(path="pets.csv", rows=60, extra=""):
    """Two classes that the second feature tells apart."""
    rng = np.random.default_rng(0)
    label = np.array(["cat", "dog"])[np.arange(rows) % 2]
    x = rng.normal(size=(rows, 3)) + (label == "dog")[:, None] * np.array([0, 100.0, 0])
    frame = pd.DataFrame({"a": x[:, 0], "label": label, "b": x[:, 1], "c": x[:, 2]})
    frame.to_csv(path, index=False)
    return frame


def run_table(frame, *argv):
    """Results of a short run on a table."""
    frame.to_csv("table.csv", index=False)
    return bs.main(["--quick", "--data", "table.csv", "--epochs", "1", "--runs", "1", "--strategy", "random", *argv])


def test_own_csv_is_learned_and_its_header_names_the_classes(capsys):
    results = run_table(write_pets(), "--epochs", "20", "--batch-size", "8", "--learning-rate", "0.01")
    assert results["comparisons"][0]["mean"] == 100
    assert results["data"]["table"]["train"] == 48
    assert "| ['cat', 'dog'] |" in capsys.readouterr().out
    assert results["notes"] == []


def test_pixels_of_a_square_are_an_image():
    frame = pd.DataFrame([[i % 2, 0, i, 255 - i, 9] for i in range(50)], columns=["label", "p0", "p1", "p2", "p3"])
    frame.to_csv("pixels.csv", index=False)
    assert bs.load_table("pixels.csv", []).x_train.shape == (40, 1, 2, 2)
    frame.rename(columns={"p3": "q"}).to_csv("pixels.csv", index=False)
    assert bs.load_table("pixels.csv", []).x_train.shape == (40, 4)


@pytest.mark.parametrize("name", ["pixel{0}", "pixel{1}"])
def test_the_usual_names_of_pixels_are_known(name):
    names = [name.format(i, i + 1) for i in range(4)]
    frame = pd.DataFrame(np.arange(200).reshape(50, 4), columns=names)
    frame.assign(label=np.arange(50) % 2).to_csv("pixels.csv", index=False)
    assert bs.load_table("pixels.csv", []).x_train.shape == (40, 1, 2, 2)


def test_pixels_that_are_out_of_order_are_a_table():
    frame = pd.DataFrame(np.arange(200).reshape(50, 4), columns=["p0", "p2", "p1", "p3"])
    frame.assign(label=np.arange(50) % 2).to_csv("pixels.csv", index=False)
    assert bs.load_table("pixels.csv", []).x_train.shape == (40, 4)


@pytest.mark.parametrize("separator", [",", ", ", ";", "\t"])
def test_columns_are_separated_in_any_usual_way(separator):
    text = write_pets().to_csv(index=False)
    Path("usual.csv").write_text(text.replace(",", separator))
    data = bs.load_table("usual.csv", [])
    assert (data.x_train == bs.load_table("pets.csv", []).x_train).all()
    assert data.info["classes"] == ["cat", "dog"]


def test_the_label_may_have_another_name():
    results = run_table(write_pets().rename(columns={"label": "Species"}), "--label-column", "Species")
    assert results["data"]["table"]["classes"] == ["cat", "dog"]


def test_a_comma_at_the_end_of_the_header_is_a_column_to_drop(error_line):
    write_pets()
    Path("comma.csv").write_text(Path("pets.csv").read_text().replace("c\n", "c,\n", 1))
    assert "values are missing in columns ['Unnamed: 4']; see --drop" in error_line(bs, ["--data", "comma.csv"])
    assert bs.load_table("comma.csv", ["Unnamed: 4"]).x_train.shape == (48, 3)


def test_empty_rows_and_commas_at_the_end_of_rows_are_no_data():
    write_pets()
    text = Path("pets.csv").read_text()
    Path("pets.csv").write_text(text + ",,,\n" * 3)
    assert bs.load_table("pets.csv", []).x_train.shape == (48, 3)
    Path("pets.csv").write_text(text.replace("\n", ",\n").replace(",\n", "\n", 1))
    assert bs.load_table("pets.csv", []).x_train.shape == (48, 3)


def test_a_small_step_of_a_large_number_is_not_lost():
    seconds = 1_700_000_000 + np.arange(50) % 2 + np.arange(50) / 1e4
    pd.DataFrame({"label": np.arange(50) % 2, "t": seconds}).to_csv("large.csv", index=False)
    data = bs.load_table("large.csv", [])
    assert data.x_train[:, 0] == pytest.approx(2.0 * data.y_train - 1, abs=0.02)


def test_an_id_that_follows_the_class_is_noted_and_can_be_dropped():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"number": range(200), "a": rng.normal(size=200), "label": np.arange(200) // 100})
    results = run_table(frame.sample(frac=1, random_state=0))
    assert "columns ['number'] seem to number the rows" in results["notes"][0]
    results = run_table(pd.concat([frame] * 2))
    assert "columns ['number'] seem to number the rows" in results["notes"][1]
    results = run_table(frame, "--drop", "number")
    assert results["notes"] == []


def test_two_columns_of_one_name_are_features(capsys):
    frame = write_pets().rename(columns={"c": "a"})
    assert run_table(frame)["notes"] == []


def test_a_named_id_with_gaps_is_noted():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"user_id": rng.permutation(9000)[:60], "a": rng.normal(size=60), "label": np.arange(60) % 2})
    assert "columns ['user_id'] seem to number the rows" in run_table(frame)["notes"][0]


def test_counts_and_measurements_are_not_taken_for_ids():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"count": rng.integers(0, 50, 300), "width": rng.normal(size=300), "flag": np.arange(300) % 2,
                          "label": rng.integers(0, 2, 300)})
    assert run_table(frame)["notes"] == []


def test_repeated_rows_are_left_out_with_a_note():
    frame = write_pets()
    results = run_table(pd.concat([frame] * 5))
    assert "60 of 300 rows are distinct and are used" in results["notes"][0]
    assert results["data"]["table"]["train"] + results["data"]["table"]["test"] == 60


def test_pixels_of_ones_own_may_be_fractions():
    frame = bs.pd.DataFrame(np.random.default_rng(0).random((40, 4)), columns=["p0", "p1", "p2", "p3"])
    assert run_table(frame.assign(label=np.arange(40) % 2))["data"]["table"]["train"] == 32


@pytest.mark.parametrize(("first", "second"), [("cat", "Cat"), ("cat", "cat ")])
def test_labels_that_seem_the_same_are_noted(first, second):
    frame = write_pets()
    frame.loc[:19, "label"] = first
    frame.loc[20:39, "label"] = second
    (note,) = run_table(frame)["notes"]
    assert "labels differ only in case or spaces: [" in note
    assert f"'{second}'" in note


@pytest.mark.parametrize(("first", "second"), [("1", "1.0"), ("7", "007")])
def test_a_number_as_a_label_may_be_written_in_two_ways(first, second):
    lines = [f"{[first, second, '2'][i % 3]},{i}.5\n" for i in range(30)]
    Path("numbers.csv").write_text("label,a\n" + "".join(lines))
    assert len(bs.load_table("numbers.csv", []).info["classes"]) == 2


def test_a_column_of_whole_numbers_with_a_missing_cell_is_named_and_can_be_dropped(error_line):
    frame = write_pets().assign(count=range(60)).astype({"count": "Int64"})
    frame.loc[3, "count"] = pd.NA
    frame.to_csv("pets.csv", index=False)
    assert "values are missing in columns ['count']" in error_line(bs, ["--data", "pets.csv"])
    assert bs.load_table("pets.csv", ["count"]).x_train.shape == (48, 3)


def rows(value):
    return "label,a\n" + "".join(f"{i % 2},{i}.5\n" for i in range(30)) + f"0,{value}\n"


@pytest.mark.parametrize(("text", "words"), [
    ("a,b\n1,2\n", "called `label`; the columns are a,b; is there a header? See --label-column"),
    ("0,0,3,1.5\n1,0,2,0.5\n", "is there a header?"), (rows("x"), "['a'] are not numbers alone"),
    ("label,a,day\n0,1,2024-05-01\n1,2,2024-05-02\n", "['day'] are not numbers"),
    ("label,a,label\n" + "0,1.5,0\n1,2.5,1\n" * 9, "one column must be called `label`"), (rows("inf"), "infinity"),
    ("label,a\n0,1.5\n1,\n", "missing in columns ['a']"), ("", "No columns|Empty CSV"),
    ("label,a\n0,1\n0,2\n1,3\n", "only 1 member"), ("label,a\n0,1\n,2\n1,3\n", "missing in columns ['label']"),
    ("label,a\ncat,1\nNaN,2\n1,3\n", "missing in columns ['label']"),
    ("label,a\n0,1,7\n1,2,8\n", "Length of header"), ("label,a\n1,2\n1,3\n1,5\n", "fewer than two classes"),
    ("label,a\n", "['a'] are not numbers"), ("label,a\n0,1\n\xff,2\n", "UTF8|utf-8"),
    ("label,a\n0,1\n1,2,8\n", "Expected 2 fields in line 3, saw 3"), ("label a\n0 1\n", "is there a header?")])
def test_a_bad_table_is_one_line(text, words, error_line):
    Path("bad.csv").write_bytes(text.encode("latin-1"))
    line = error_line(bs, ["--data", "bad.csv"])
    assert "bad.csv" in line
    assert any(word in line for word in words.split("|")), "of pandas 2 or 3"


def test_dropping_an_unknown_column_is_an_error(error_line):
    write_pets()
    assert "['x'] not found" in error_line(bs, ["--data", "pets.csv", "--drop", "x"])


def test_text_is_windows_that_share_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_bytes(bytes(range(200)))
    (folder / "sub/b.txt").write_bytes(bytes(range(100, 156)))
    for hidden in (folder / ".git", folder / "sub/.checkpoints"):
        hidden.mkdir()
        (hidden / "c").write_bytes(bytes(1000))
    monkeypatch.setattr(bs, "WINDOW", 10)
    data = bs.load_text(bs.parse_args(["--task", "nlp", "--data", str(folder)]))
    assert data.x_train.shape == (22, 10)
    assert data.x_test.shape == (3, 10)
    assert (data.y_train.ravel()[:-1] == data.x_train.ravel()[1:]).all()
    monkeypatch.undo()
    with pytest.raises(bs.UserError, match="less than two windows"):
        bs.load_text(bs.parse_args(["--task", "nlp", "--data", str(folder / "sub/b.txt")]))
    embedded = bs.load_text(bs.parse_args(["--task", "nlp"]))
    assert embedded.info["source"] == "embedded"
    assert 2 < embedded.info["pairs of bytes [bits per byte]"] < 6


def test_a_text_that_is_compressed_is_noted(tmp_path, capsys):
    (tmp_path / "text.gz").write_bytes(gzip.compress(Path(bs.__file__).read_bytes()))
    bs.load_text(bs.parse_args(["--task", "nlp", "--data", str(tmp_path / "text.gz")]))
    assert "has zero bytes; is it compressed" in capsys.readouterr().err


def test_of_long_texts_only_the_beginning_is_read(tmp_path):
    for name in "ab":
        with Path(tmp_path, f"texts-{name}").open("wb") as file:
            file.truncate(50_000_000)
    args = bs.parse_args(["--task", "nlp", "--data", str(tmp_path), "--text-bytes", "1000"])
    tracemalloc.start()
    assert len(bs.load_text(args).x_train) == 13
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


# --- Models, training, whole runs -------------------------------------------------------------------------------------


def test_models():
    assert sum(p.numel() for p in bs.SimpleMLP((1, 28, 28), 10).parameters()) == 784 * 128 + 128 + 128 * 10 + 10
    assert bs.SmallCNN((3, 32, 32), 100)(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
    model, tokens = bs.TinyTransformer((16,), 256), torch.randint(0, 256, (2, 16))
    later = tokens.clone()
    later[:, 9:] = 0
    assert torch.allclose(model(tokens)[..., :9], model(later)[..., :9], atol=1e-5)
    assert not torch.allclose(model(tokens)[..., 9:], model(later)[..., 9:], atol=1e-3)
    trained = model(tokens)
    with torch.inference_mode():
        assert torch.allclose(model.eval()(tokens), trained, atol=1e-5), "scored as trained"


def test_label_noise_changes_its_share_of_the_training_labels_alone(monkeypatch):
    y = np.arange(1000) % 10
    x = np.zeros((1000, 1))
    data = bs.make_data("mine", (x, y, x, y), "real")
    noisy, again, other = (bs.add_label_noise(data, 0.1, seed) for seed in (3, 3, 4))
    assert (noisy.y_train != y).sum() == 100
    assert set(noisy.y_train) <= set(range(10))
    assert (again.y_train == noisy.y_train).all()
    assert (other.y_train != noisy.y_train).any()
    assert (data.y_train == noisy.y_test).all()
    seen, original = [], bs.measure
    monkeypatch.setattr(bs, "measure", lambda learner: (seen.append(learner.data), original(learner)))
    digits("--label-noise", "0.1", "--epochs", "1", "--runs", "1", "--strategy", "random", "smart")
    clean = load("digits")
    assert all((data.y_test.numpy() == clean.y_test).all() for data in seen)
    assert {int((data.y_train.numpy() != clean.y_train).sum()) for data in seen} == {144}
    assert (seen[0].y_train == seen[-1].y_train).all(), "the same noise for every strategy"


def records_of(results):
    return pd.DataFrame(results["records"])


def runs_of(name):
    return Path("outputs/batch_selection", name, "runs")


def test_a_strategy_and_its_control_have_the_same_wrong_labels(monkeypatch):
    seen, original = [], bs.measure
    monkeypatch.setattr(bs, "measure", lambda learner: (seen.append(learner), original(learner)))
    digits("--label-noise", "0.3", "--epochs", "1", "--runs", "1", "--strategy", "importance")
    assert {learner.epochs for learner in seen} == {1, 288 / 1437}
    assert all(torch.equal(learner.data.y_train, seen[0].data.y_train) for learner in seen)


def test_models_are_scored_as_in_evaluation():
    learner = make_learner(64)
    learner.model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
    first = learner.score(np.arange(64))
    learner.score(np.arange(64), gradient_norms=True)
    assert (learner.score(np.arange(64)) == first).all()
    assert learner.model.training
    assert (learner.model[2].running_mean == 0).all()


def test_infobatch_takes_every_sample_in_the_last_epoch():
    for epochs in (2, 3, 5, 7, 10):
        batches = simulate(bs.infobatch, 331, epochs=epochs, batch_size=400)
        assert len(batches[-1][0]) == 331, epochs


@pytest.mark.parametrize(("x", "y", "words"), [
    (np.full((8, 3), np.nan), [0, 1] * 4, "contains NaN"), (np.ones((8, 3)), [0, 1], "inconsistent numbers"),
    (np.ones((0, 3)), [], "minimum of 1 is required")])
def test_a_data_set_of_ones_own_is_checked(x, y, words, monkeypatch):
    monkeypatch.setitem(bs.DATASETS, "mine", bs.Dataset(lambda folder: (x, y, x, y)))
    with pytest.raises(bs.UserError, match=words):
        load("mine")


@pytest.mark.parametrize("labels", [["a", "b"], [1, 2], [True, False]])
def test_labels_of_ones_own_data_may_be_anything(labels):
    x = np.arange(8.0)[:, None]
    data = bs.make_data("mine", (x, labels * 4, x, labels * 4), "real")
    assert data.info["classes"] == sorted(labels)
    assert data.y_test.tolist() == [sorted(labels).index(label) for label in labels * 4]
    assert data.x_train.dtype == np.float32


def test_the_control_is_random_with_exactly_as_many_trained_samples():
    results = digits("--runs", "2", "--epochs", "2", "--strategy", "random", "selective_backprop", "smart")
    samples = records_of(results).groupby(["strategy", "seed"])["samples"].last()
    assert samples["smart"].tolist() == samples["random"].tolist() == [2 * 1437] * 2
    for seed, count in samples["selective_backprop"].items():
        (file,) = runs_of("run-001").glob(f"*-seed-{seed}-random-{count}.pt")
        history = torch.load(file, weights_only=True)["history"]
        assert history[-1]["samples"] == count
        last = records_of(results).query(f"strategy == 'selective_backprop' and seed == {seed}").iloc[-1]
        assert last["test_acc"] - last["difference"] == pytest.approx(history[-1]["test_acc"])
    alone = digits("--runs", "2", "--epochs", "2", "--strategy", "smart")
    finals = [records_of(run).groupby(["strategy", "seed"]).last() for run in (results, alone)]
    controls = finals[1].loc["smart", "test_acc"] - finals[1].loc["smart", "difference"]
    assert controls.tolist() == pytest.approx(finals[0].loc["random", "test_acc"].tolist()), "random's run"


def test_a_time_budget_counts_training_and_selection_and_decays_the_rate(monkeypatch):
    rates = []
    original = bs.track_losses
    monkeypatch.setattr(bs, "track_losses", lambda learner, *more: (
        rates.append(learner.optimizer.param_groups[0]["lr"]), original(learner, *more)))
    results = digits("--budget-seconds", "0.3", "--runs", "3", "--epochs", "1", "--strategy", "random",
                     "selective_backprop")
    last = records_of(results).groupby(["strategy", "seed"]).last()
    controls = last.loc["selective_backprop", "test_acc"] - last.loc["selective_backprop", "difference"]
    assert controls.tolist() == pytest.approx(last.loc["random", "test_acc"].tolist()), "the same run"
    assert (last["seconds"] >= 0.3).all()
    assert (last["seconds"] < 0.5).all()
    assert (last["epoch"] > 1).all(), "--epochs does not end it"
    assert max(rates) > 0.0009
    assert min(rates) < 0.00005
    assert "random in the same time" in Path("outputs/batch_selection/run-001/summary.md").read_text()


def test_without_random_a_time_budget_has_a_control_of_its_own_with_the_same_time():
    results = digits("--budget-seconds", "0.3", "--runs", "1", "--strategy", "importance")
    (control,) = runs_of("run-001").glob("*-random-*.pt")
    (own,) = runs_of("run-001").glob("*-importance-*.pt")
    own, control = (torch.load(file, weights_only=True)["history"][-1] for file in (own, control))
    assert min(own["seconds"], control["seconds"]) >= 0.3
    assert control["samples"] > 1.3 * own["samples"]
    assert results["records"][-1]["difference"] == pytest.approx(own["test_acc"] - control["test_acc"])


def test_one_command_does_everything(capsys):
    strategies = ["random", "smart"]
    argv = ["--dataset", "digits", "--benchmark-datasets", "breast_cancer", "--runs", "3", "--epochs", "2", "--jobs",
            "1", "--strategy", *strategies, "--label-noise", "0", "0.2", "--device", "cpu"]
    results = bs.main(argv)
    out = capsys.readouterr().out
    run_dir = Path("outputs/batch_selection/run-001")
    settings = ["digits", "digits-noise-0.2", "breast_cancer", "breast_cancer-noise-0.2"]
    assert {path.name for path in run_dir.iterdir()} == {
        "arguments.json", "results.json", "summary.md", "runs", "benchmark.png",
        *(f"comparison_{setting}.png" for setting in settings)}
    folders = [f"outputs/vision/{setting}/{strategy}/run-001" for setting in settings for strategy in strategies]
    assert sorted(results["folders"]) == sorted(folders)
    for folder in folders:
        assert {path.name for path in Path(folder).iterdir()} == METRIC_PICTURES | {"summary.txt"}
        assert folder in out
    text = Path("outputs/vision/digits/smart/run-001/summary.txt").read_text()
    query = "setting == 'digits' and strategy == 'smart' and epoch == 2"
    finals = records_of(results).query(query)
    mean, interval = bs.mean_and_interval(finals["test_acc"])
    assert re.search(rf"test accuracy \[%\] +{mean:.4f}\d* +{interval:.4f}", text)
    assert "| majority class [%] |" in out
    assert f"| strategy | {' | '.join(settings)} |" in out
    first = records_of(results).query("setting == 'digits' and epoch == 0 and seed == 42")
    assert first["test_acc"].nunique() == 1, "the same first weights for every strategy"
    assert results["data"]["digits"]["source"] == "10 classes, 1,797 samples, embedded"
    bs.main(["--dataset", "digits", "--no-benchmark", "--runs", "1", "--epochs", "1", "--strategy", "smart"])
    assert Path("outputs/vision/digits/smart/run-002/test_acc.png").exists()
    summary = Path("outputs/batch_selection/run-002/summary.md").read_text()
    assert "No verdict" in summary
    assert "±" not in summary.split("±: 95 %")[0], "one run has no interval"
    assert "nan" not in Path("outputs/vision/digits/smart/run-002/summary.txt").read_text().lower()


def test_quick_learns_and_draws_few_pictures():
    results = bs.main(["--quick", "--strategy", "random", "smart"])
    assert list(results["data"]) == ["digits", "breast_cancer"]
    last = records_of(results).groupby(["setting", "strategy"]).last()
    assert last.loc[("digits", "random"), "test_acc"] > 80
    assert last["epoch"].tolist() == [5] * 4
    assert len(list(Path("outputs").rglob("*.png"))) == 3
    assert not Path("outputs/vision").exists()


def test_what_is_named_twice_is_trained_once():
    results = digits("--runs", "2", "--epochs", "1", "--strategy", "random", "smart", "random", "--label-noise", "0",
                     "0")
    assert [(row["setting"], row["strategy"]) for row in results["comparisons"]] == [
        ("digits", "random"), ("digits", "smart")]
    assert len(results["records"]) == 2 * 2 * 2


def test_random_alone_is_compared_with_nothing(capsys):
    digits("--runs", "3", "--epochs", "1", "--strategy", "random", "--label-noise", "0", "0.1")
    assert "shown" not in capsys.readouterr().out
    assert not list(Path("outputs").rglob("benchmark.png"))


def test_language_task():
    results = bs.main(["--task", "nlp", "--runs", "1", "--text-bytes", "20000", "--epochs", "1", "--strategy", "random",
                       "rho_loss", "importance", "--jobs", "1"])
    folder = Path("outputs/nlp/python_stdlib/rho_loss/run-001")
    assert {path.name for path in folder.iterdir()} == {
        "bits_per_byte.png", "test_acc.png", "train_acc.png", "train_loss.png", "summary.txt"}
    runs = records_of(results).query("strategy == 'random'")
    before, after = (runs[runs["epoch"] == epoch]["bits_per_byte"] for epoch in (0, 1))
    assert before.item() == pytest.approx(8, abs=0.3)
    assert after.item() < 7


def test_strategy_data_set_and_model_are_one_line_each_as_the_docstring_shows(monkeypatch):
    def read_mine(folder):
        x, y = images(80, (1, 4, 4), classes=2)
        x[:, 0, 0, 0] = 255 * y
        return x[:60], y[:60], x[60:], y[60:]

    lines = re.findall(r"^    ((?:STRATEGIES|DATASETS|MODELS)\[.*)$", bs.__doc__, re.M)
    assert len(lines) == 3
    for name in ("STRATEGIES", "DATASETS", "MODELS"):
        monkeypatch.setattr(bs, name, dict(getattr(bs, name)))
    monkeypatch.setitem(bs.MODELS, "vision", dict(bs.MODELS["vision"]))
    for line in lines:
        exec(line, vars(bs) | {"read_mine": read_mine, "np": np, "nn": nn})
    results = bs.main(["--dataset", "mine", "--strategy", "random", "sorted", "--model", "wide", "--no-benchmark",
                       "--learning-rate", "0.1", "--batch-size", "16", "--jobs", "2", "--epochs", "20",
                       "--runs", "2"])
    last = records_of(results).query("strategy == 'random' and epoch == 20")
    assert last["test_acc"].mean() > 90
    assert Path("outputs/vision/mine/sorted/run-001/test_acc.png").exists()


PARALLEL = ["--dataset", "digits", "--no-benchmark", "--epochs", "2", "--runs", "2", "--strategy", "selective_backprop",
            "--device", "cpu"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The output folder of these runs, one after the other."""
    folder = tmp_path_factory.mktemp("alone")
    bs.main(["--quick", *PARALLEL, "--jobs", "1", "--output-dir", str(folder)])
    return folder


def assert_equal_runs(root, other_root, runs):
    paths = sorted(Path(root).rglob("*.pt"))
    assert len(paths) == runs
    for path in paths:
        one, other = (torch.load(file, weights_only=True) for file in (path, other_root / path.relative_to(root)))
        for name in one["model"]:
            assert torch.equal(one["model"][name], other["model"][name])
        columns = ["epoch", "samples", "train_loss", "test_acc"]
        assert pd.DataFrame(one["history"])[columns].equals(pd.DataFrame(other["history"])[columns])


@pytest.mark.parametrize("backend", ["dask", "loky"])
def test_runs_side_by_side_equal_sequential(backend, alone):
    if backend == "dask":
        pytest.importorskip("distributed")
    bs.main(["--quick", *PARALLEL, "--jobs", "2", "--backend", backend, "--output-dir", backend])
    assert_equal_runs(alone, Path(backend), runs=4)


def test_loky_in_a_notebook_equals_sequential(tmp_path, alone):
    (tmp_path / "empty").mkdir()
    cells = [f"%%writefile common.py\n{(ROOT / 'common.py').read_text()}",
             (ROOT / "batch_selection.py").read_text().replace("    main()\n", "    pass\n"),
             f"results = main({[*PARALLEL, '--jobs', '2']})"]
    outputs = run_notebook(cells, tmp_path / "empty")
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1, "the pictures of each strategy are in their folders only"
    assert_equal_runs(alone, Path("empty/outputs"), runs=4)


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path, error_line):
    argv = ["--dataset", "digits", "--no-benchmark", "--runs", "1", "--epochs", "3", "--strategy", "smart",
            "rho_loss", "--jobs", "1", "--device", "cpu"]
    whole = bs.main([*argv, "--output-dir", "whole"])
    kill = "\n".join([  # in the second epoch of rho_loss, after 3 x 23 steps of smart and as many of its control
        "import itertools, os, sys, batch_selection as bs",
        "track, calls = bs.track_losses, itertools.count(1)",
        "bs.track_losses = lambda *x: os.kill(os.getpid(), 9) if next(calls) == 145 else track(*x)",
        "bs.main(sys.argv[1:])"])
    command = [sys.executable, "-c", kill, *argv, "--output-dir", "killed"]
    process = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert process.returncode == -signal.SIGKILL
    runs = Path("killed/batch_selection/run-001/runs")
    assert not list(runs.glob("*-rho_loss-*.pt"))
    (first,) = runs.glob("*-smart-*.pt")
    stamp = first.stat().st_mtime_ns
    line = error_line(bs, ["--resume", "--output-dir", "killed", "--strategy", "smart"])
    assert "--resume keeps a run's arguments; leave out --strategy" in line
    resumed = bs.main(["--resume", "--output-dir", "killed"])
    assert first.stat().st_mtime_ns == stamp, "finished runs are not trained again"
    assert_equal_runs("whole", Path("killed"), runs=4)
    columns = ["strategy", "seed", "difference", "epoch", "test_acc", "samples"]
    assert records_of(resumed)[columns].equals(records_of(whole)[columns])
    assert "no unfinished run" in error_line(bs, ["--resume", "--output-dir", "killed"])


def test_two_processes_that_resume_one_run_do_not_disturb_each_other(tmp_path, monkeypatch, alone):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(bs, "train_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        bs.main([*PARALLEL, "--jobs", "1", "--output-dir", "twice"])
    command = [sys.executable, ROOT / "batch_selection.py", "--resume", "twice/batch_selection/run-001"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert_equal_runs(alone / "batch_selection", Path("twice/batch_selection"), runs=4)
    assert not list(Path("twice").rglob("*.part"))


def test_ctrl_c_names_the_way_to_go_on(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bs, "compare", interrupt)
    with pytest.raises(SystemExit) as stopped:
        digits("--epochs", "1", "--runs", "1", "--strategy", "random")
    assert stopped.value.code == 130
    assert "python batch_selection.py --resume --output-dir outputs" in capsys.readouterr().err


def test_damaged_checkpoints_are_named_and_those_of_other_data_are_not_used(monkeypatch, error_line):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(bs, "compare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        digits("--epochs", "1", "--runs", "1", "--strategy", "random")
    runs = Path("outputs/batch_selection/run-001/runs")
    (checkpoint,) = runs.iterdir()
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:2000])
    assert f"{checkpoint.name}: damaged" in error_line(bs, ["--resume"])
    checkpoint.write_bytes(whole)
    read_digits = bs.read_digits
    monkeypatch.setattr(bs.DATASETS["digits"], "read", lambda folder: [array[:300] for array in read_digits(folder)])
    results = bs.main(["--resume"])
    assert len(list(runs.iterdir())) == 2, "other data: trained anew"
    assert results["records"][-1]["samples"] == 300


@pytest.mark.parametrize(("argv", "words"), [
    ("--dataset minst", "--dataset"), ("--seed -1", "--seed must not be negative"),
    ("--strategy clever", "--strategy"), ("--epochs 0", "must be above 0"), ("--jobs 0", "must be above 0"),
    ("--label-noise 2", "--label-noise must be from 0 to 1"), ("--batch-size x", "--batch-size"),
    ("--label-noise nan", "from 0 to 1"), ("--budget-seconds -1", "must not be negative"),
    ("--device quantum", "unknown device 'quantum'"), ("--model transformer", "--task vision has mlp, cnn"),
    ("--task nlp --model cnn", "--task nlp has transformer"), ("--task nlp --label-noise 0.1", "--task vision"),
    ("--task nlp --dataset digits", "--task vision"),
    ("--dataset digits --data x.csv", "not allowed with"), ("--data nowhere.csv", "nowhere.csv"),
    ("--dataset cifar10", "cifar-10-binary.tar.gz"), ("--download cifar100", "cannot download"),
    ("--task nlp --data nowhere", "No such file"), ("--resume", "no unfinished run"),
    ("--dataset digits --learning-rate 1e30 --jobs 1 --strategy smart", "lower --learning-rate"),
    ("--dataset digits --learning-rate 1e20 --batch-size 2000 --jobs 1 --epochs 1", "lower --learning-rate"),
    ("--dataset digits --learning-rate nan", "must be above 0"), ("--budget-seconds nan", "must not be negative"),
    ("--data table.csv --model cnn --jobs 1", "cnn needs images"),
    ("--data-dir file --dataset mnist", "file"),
    ("--output-dir file --dataset digits", "file"), ("--nonsense", "--nonsense"),
])
def test_every_error_is_one_line(argv, words, error_line):
    Path("file").write_text("in the way")
    Path("table.csv").write_text("label,a,b\n" + "".join(f"{i % 2},{i}.5,{3 * i}.25\n" for i in range(30)))
    assert words in error_line(bs, argv.split())


def test_a_full_disk_is_one_line(monkeypatch, error_line):
    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")

    monkeypatch.setattr(torch, "save", full)
    line = error_line(bs, ["--dataset", "digits", "--no-benchmark", "--strategy", "random", "--jobs", "1"])
    assert "-random-7185.pt cannot be written; is the disk full?" in line
    assert not list(Path("outputs").rglob("*.part"))


def kill_worker(learner):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line(monkeypatch, error_line):
    monkeypatch.setitem(bs.STRATEGIES, "deadly", kill_worker)
    argv = ["--dataset", "digits", "--no-benchmark", "--runs", "2", "--strategy", "random", "deadly", "--jobs", "2"]
    assert "a worker was killed, out of memory?" in error_line(bs, argv)


def test_quick_keeps_what_is_asked_for():
    write_pets()
    changed = bs.changed_arguments(bs.parse_args(["--quick", "--data", "pets.csv"]))
    assert not {"dataset", "benchmark_datasets"} & set(changed)
    assert bs.parse_args(["--quick", "--dataset", "mnist", "--runs", "4"]).dataset == "mnist"
    assert bs.parse_args(["--quick", "--dataset", "mnist", "--runs", "4"]).runs == 4
    for argv, name in ((["--no-benchmark"], "digits"), (["--data", "pets.csv"], "pets")):
        assert [data.name for data in bs.load_all(bs.parse_args(["--quick", *argv]))] == [name]


def test_the_picture_says_that_its_intervals_are_not_corrected(monkeypatch):
    labels = []
    monkeypatch.setattr(bs, "save_figure", lambda fig, *_, **__: (
        labels.extend(ax.get_xlabel() for ax in fig.axes), plt.close(fig)))
    digits("--epochs", "1", "--runs", "3", "--strategy", "random", "smart")
    assert any("uncorrected; p in the table: corrected after Holm" in label.replace("\n", " ") for label in labels)


def test_a_title_is_not_wider_than_its_picture(monkeypatch):
    widths, titles = [], []
    monkeypatch.setattr(bs, "save_figure", lambda fig, *_, **__: (
        widths.append(fig._suptitle.get_window_extent().width / fig.bbox.width),
        titles.append(fig.get_suptitle()), plt.close(fig)))
    bs.main(["--dataset", "digits", "--no-benchmark", "--epochs", "1", "--runs", "1", "--jobs", "1", "--strategy",
             "selective_backprop", "--label-noise", "0.15", "--output-dir", "a/long/path/of/results/of/all/scripts"])
    assert len(widths) == 5
    assert max(widths) < 1
    assert not [title for title in titles if "1 runs" in title]


def test_a_dask_scheduler_that_does_not_answer(monkeypatch, error_line):
    pytest.importorskip("distributed")
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://127.0.0.1:9")
    assert "tcp://127.0.0.1:9" in error_line(bs, ["--dataset", "digits", "--backend", "dask"])


def test_lists(capsys):
    assert bs.main(["--list-datasets"]) is None
    out = capsys.readouterr().out
    assert "| cinic10 | 10 classes, 180,000 samples, 688 MB | no |" in out
    assert "| digits | 10 classes, 1,797 samples, embedded | yes |" in out
    assert bs.main(["--check-device"]) is None
    out = capsys.readouterr().out
    assert "cpu: " in out
    assert "auto: " in out
