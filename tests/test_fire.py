"""What users of fire.py rely on: offline, on the CPU. Real files are read where ../shared/data lies beside."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from pyarrow import fs

import fire

ROOT = Path(fire.__file__).resolve().parent
SMOKE = ROOT.parent / "shared/data/smoke/smoke_detection_iot.csv"
SMALL = ["--sample-per-area", "4000", "--seq-len", "30", "--d-model", "16", "--num-layers", "1", "--num-trees", "4",
         "--epochs", "2", "--batch-size", "64", "--device", "cpu"]
PICTURES = {"dashboard.png", "class_distribution.png", "area_performance.png", "confusion_matrices.png",
            "training_progress.gif", "feature_importance.png", "learning_curves.png", "time_breakdown.png",
            "memory.png", "model_comparison.png", "model_comparison.html"}


def write_area(path, area="basement", rows=6000, label="label", values=None, **extra):
    """An area of the generator as a file; `values` maps classes to what stands in the label column."""
    readings, labels, _ = fire.generate_area(area, rows, seed=1)
    columns = {"timestamp": pa.array(range(rows), pa.timestamp("s"))}
    columns |= {name: readings[:, i] for i, name in enumerate(fire.SENSORS[area])}
    columns[label] = labels if values is None else [values[c] for c in labels]
    table = pa.table(columns | extra)
    (pa.parquet.write_table if path.suffix == ".parquet" else pa.csv.write_csv)(table, path)
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two areas as a user has them: a CSV and a Parquet file."""
    folder = tmp_path_factory.mktemp("areas")
    write_area(folder / "basement_data_cleaned.csv")
    write_area(folder / "voc_data_cleaned.parquet", "voc")
    return folder


@pytest.fixture(scope="session")
def finished(folder, tmp_path_factory):
    """(folder of a finished run on files, its results)."""
    output = tmp_path_factory.mktemp("outputs")
    results = fire.main(["--data", str(folder), "--output-dir", str(output), *SMALL])
    return output / "fire/run-001", results


def embedded_data(rows):
    """SensorData of the embedded generator."""
    return fire.load_data(fire.parse_args(["--sample-per-area", str(rows)]))


# --- The generator ----------------------------------------------------------------------------------------------------


def test_a_block_is_the_same_whatever_was_made_before():
    readings, labels, oracle = fire.generate_area("laundry", 3 * fire.BLOCK_ROWS, seed=7)
    for made, whole in zip(fire.generate_block("laundry", 2, seed=7), (readings, labels, oracle)):
        np.testing.assert_array_equal(made, whole[2 * fire.BLOCK_ROWS :])
    assert not np.array_equal(fire.generate_block("laundry", 2, seed=8)[1], labels[2 * fire.BLOCK_ROWS :])


def test_the_generator_has_the_promised_shape_and_mix():
    shares, agree = np.zeros(3), []
    for area, sensors in {"basement": 6, "laundry": 5, "asd": 4, "voc": 4, "arc": 4}.items():
        readings, labels, oracle = fire.generate_area(area, 200_000, seed=42)
        assert readings.shape == (200_000, sensors)
        assert 0.001 < np.isnan(readings).mean() < 0.05  # sensors drop out, but seldom
        steps = set(pairwise(labels))
        assert (0, 2) not in steps and (2, 0) not in steps  # a fire is preceded and followed by a warning
        shares += np.bincount(labels) / len(labels) / 5
        agree.append(np.mean(labels == oracle))
    np.testing.assert_allclose(shares, fire.TARGET_MIX, atol=0.04)
    assert 0.96 < np.mean(agree) < 0.995  # not even the oracle is perfect


# --- Split, sample, windows -------------------------------------------------------------------------------------------


def assert_no_shared_rows(parts, gap):
    """The parts' segments have no row in common and are `gap` rows apart."""
    segments = sorted((start, stop, part) for part, ranges in parts.items() for start, stop in ranges)
    for (_, stop, part), (start, _, other) in pairwise(segments):
        assert start >= stop + (gap if part != other else 0)


@pytest.mark.parametrize("by_run", [False, True])
def test_parts_are_in_order_of_time_and_a_window_apart(by_run):
    labels = np.repeat([0, 1, 2, 0, 1, 0], [5000, 2000, 1500, 4000, 900, 3000]).astype(np.int8)
    parts = fire.split_rows(labels, 60, by_run)
    assert_no_shared_rows(parts, 60)
    if by_run:
        for ranges in parts.values():
            assert {labels[start] for start, _ in ranges} == {0, 1, 2}
            assert all(len(set(labels[start:stop])) == 1 for start, stop in ranges)
    else:
        assert parts["train"] == [(0, 11480)] and parts["validation"][0][1] == 13940 and parts["test"][0][1] == 16400


def test_a_cut_does_not_go_through_an_incident():
    labels = np.repeat([0, 1, 2, 1, 0], [65_000, 3000, 3000, 1500, 27_500]).astype(np.int8)
    parts = fire.split_rows(labels, 60)
    assert parts["train"] == [(0, 72_500)] and parts["validation"] == [(72_560, 85_000)]
    busy = np.ones(10_000, np.int8)  # without a quiet stretch the cut stays
    assert fire.split_rows(busy, 60)["train"] == [(0, 7000)]


def test_windows_of_sampled_rows_are_unbroken_and_never_on_two_sides(folder):
    # The reading is the row number, so that the rows of a window can be told after sampling and normalization.
    rows = 40_000
    labels = (np.arange(rows) // 700 % 3).astype(np.int8)
    number = np.arange(rows, dtype=np.float32)
    path = folder.parent / "rows_numbered.csv"
    pa.csv.write_csv(pa.table({"reading": number, "label": labels}), path)
    args = fire.parse_args(["--data", str(path), "--sample-per-area", "9000", "--stride", "30"])
    data = fire.load_data(args)
    seen = {}
    for part in fire.PARTS:
        starts = fire.window_starts(data.segments[part], args.seq_len, args.stride)
        x = fire.gather_windows(torch.from_numpy(data.readings), torch.from_numpy(starts), args.seq_len)
        original = (x[:, :, 0].double() * data.std[0, 0] + data.mean[0, 0]).round().long()
        assert (original.diff(dim=1) == 1).all()
        assert (torch.from_numpy(labels)[original[:, -1]] == torch.from_numpy(data.labels)[starts + 59]).all()
        seen[part] = set(original.flatten().tolist())
    assert 5000 < len(seen["train"]) <= 6300
    assert max(seen["train"]) + 60 <= min(seen["validation"]) and max(seen["validation"]) + 60 <= min(seen["test"])


def test_sampling_brings_the_training_part_near_the_target_mix():
    labels = np.zeros(400_000, np.int8)
    for start in range(0, 400_000, 20_000):
        labels[start : start + 900], labels[start + 900 : start + 1300] = 1, 2
    ranges = fire.sample_blocks([(0, 400_000)], labels, 40_000, 500, np.random.default_rng(0))
    chosen = np.concatenate([labels[start:stop] for start, stop in ranges])
    assert len(chosen) == 40_000
    np.testing.assert_allclose(np.bincount(chosen) / len(chosen), fire.TARGET_MIX, atol=0.07)
    plain = fire.sample_blocks([(0, 400_000)], labels, 40_000, 500)  # validation and test are left as they are
    assert np.mean(np.concatenate([labels[a:b] for a, b in plain]) == 2) < 0.04


def test_a_class_that_sampling_loses_is_noticed(tmp_path, capsys):
    labels = np.zeros(400_000, int)
    labels[100_000:130_000], labels[350_000:350_400] = 2, 2  # one fire in the test part, too short for every sample
    rng = np.random.default_rng(0)
    pa.csv.write_csv(pa.table({"reading": rng.normal(size=len(labels)), "label": labels // 2}), tmp_path / "a.csv")
    data = fire.load_data(fire.parse_args(["--data", str(tmp_path), "--sample-per-area", "20000"]))
    notes = capsys.readouterr().err
    assert "fewer than 5 windows of fire in validation, fire in test" in notes
    assert "figures about fire in validation, fire in test say little" in notes
    assert data.info["split"] == "chronological"  # splitting label runs would not have helped


def test_a_sensor_that_training_never_sees_stays_missing(tmp_path):
    readings, labels, _ = fire.generate_area("arc", 20_000, seed=3)
    readings[:16_000, 1] = np.nan
    table = {f"f{i}": readings[:, i] for i in range(4)} | {"label": labels}
    pa.csv.write_csv(pa.table(table), tmp_path / "arc.csv")
    data = fire.load_data(fire.parse_args(["--data", str(tmp_path)]))
    assert np.isnan(data.readings[:, 1]).all()
    features = fire.window_features(data, fire.window_starts(data.segments["test"], 60, 60), 60)
    assert np.isfinite(features).all() and (features[:, 7 * 6 + 1] == 1).all()  # all of it is missing


def test_normalization_knows_the_training_part_alone(tmp_path):
    pa_tables = []
    for factor in (1, 100):
        readings, labels, _ = fire.generate_area("arc", 20_000, seed=3)
        readings[14_100:] *= factor  # validation and test
        path = tmp_path / f"arc_{factor}.csv"
        pa.csv.write_csv(pa.table({f"f{i}": readings[:, i] for i in range(4)} | {"label": labels}), path)
        pa_tables.append(fire.load_data(fire.parse_args(["--data", str(path)])))
    np.testing.assert_array_equal(pa_tables[0].mean, pa_tables[1].mean)
    train = np.concatenate([pa_tables[0].readings[a:b] for a, b in pa_tables[0].segments["train"]])
    np.testing.assert_allclose(np.nanmean(train[:, :4], axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(np.nanstd(train[:, :4], axis=0), 1, atol=1e-3)


def test_a_class_that_the_last_rows_lack_splits_each_run_and_says_so(tmp_path, capsys):
    labels = np.repeat([0, 1, 0], [4000, 4000, 8000])
    rng = np.random.default_rng(0)
    pa.csv.write_csv(pa.table({"reading": rng.normal(size=16000) + labels, "label": labels}), tmp_path / "a.csv")
    data = fire.load_data(fire.parse_args(["--data", str(tmp_path)]))
    assert data.info["split"] == "by label run (optimistic)"
    assert "optimistic" in capsys.readouterr().err
    for part in fire.PARTS:
        assert {0, 2} == set(data.labels[fire.window_starts(data.segments[part], 60, 60) + 59])


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values, expected", [
    ({0: 0, 1: 1, 2: 2}, {0, 1, 2}),
    ({0: "Normal", 1: " warning", 2: "FIRE"}, {0, 1, 2}),
    ({0: 0, 1: 0, 2: 1}, {0, 2}),
    ({0: False, 1: False, 2: True}, {0, 2}),
])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_label_spellings(tmp_path, values, expected, kind):
    path = write_area(tmp_path / f"a.{kind}", values=values, rows=8000)
    areas, _ = fire.file_areas([path], None)
    truth = fire.generate_area("basement", 8000, seed=1)[1]
    assert set(areas["a"].labels) == expected
    np.testing.assert_array_equal(areas["a"].labels == 2, truth == 2)


def test_is_anomaly_is_the_label_and_index_and_second_label_are_left_out(tmp_path, capsys):
    path = write_area(tmp_path / "basement_x.csv", label="is_anomaly", rows=4000, values={0: 0, 1: 0, 2: 1})
    lines = path.read_text().splitlines()
    path.write_text("\n".join(("," if i == 0 else f"{i},") + line for i, line in enumerate(lines)))
    areas, files = fire.file_areas([path], None)
    assert areas["basement"].sensors == list(fire.SENSORS["basement"])  # neither index nor timestamp
    assert "'' left out" in capsys.readouterr().err
    assert files[0]["rows"] == 4000 and len(files[0]["sha256"]) == 64
    both = write_area(tmp_path / "both.csv", rows=2000, is_anomaly=np.zeros(2000, int))
    assert "is_anomaly" not in fire.file_areas([both], None)[0]["both"].sensors


def test_csv_and_parquet_give_the_same_readings_with_nan_and_padding(tmp_path):
    truth = fire.generate_area("voc", 6000, seed=1)[0]
    for kind in ("csv", "parquet"):
        path = write_area(tmp_path / f"voc_x.{kind}", "voc")
        readings = fire.file_areas([path], None)[0]["voc"].readings
        np.testing.assert_allclose(readings[:, :4], truth, rtol=1e-6)
        assert np.isnan(readings).any() and not readings[:, 4:].any()


def bad_files(tmp_path):
    """{name: (arguments, words of the error)} for everything that can be wrong with input."""
    good = "a,b,label\n" + "".join(f"{i},1,{i // 100 % 3}\n" for i in range(3000))

    def file(name, text, encoding="utf-8"):
        (tmp_path / name).write_text(text, encoding=encoding)
        return ["--data", str(tmp_path / name)]

    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    labels = [i // 100 % 3 for i in range(3000)]
    pa.parquet.write_table(pa.table({"a": ["x"] * 3000, "label": labels}), tmp_path / "text.parquet")
    return {
        "missing": (["--data", str(tmp_path / "nowhere.csv")], ["nowhere.csv", "no such file"]),
        "empty folder": (["--data", str(tmp_path / "empty_folder")], ["empty_folder", "no .csv or .parquet"]),
        "empty file": (file("empty.csv", ""), ["empty.csv", "Empty"]),
        "header only": (file("header.csv", "a,b,label\n"), ["header.csv", "no rows"]),
        "text cell": (file("text.csv", good.replace("\n7,1,", "\n7,oops,")), ["text.csv", "row 9", "'b'", "oops"]),
        "ragged": (file("ragged.csv", good.replace("\n7,1,", "\n7,")), ["ragged.csv", "row 9", "2 cells", "has 3"]),
        "bad label": (file("label.csv", good.replace("\n7,1,0", "\n7,1,3")), ["label.csv", "row 9", "'label'", "'3'"]),
        "empty label": (file("nolabel.csv", good.replace("\n7,1,0", "\n7,1,")), ["nolabel.csv", "row 9", "''"]),
        "no label column": (file("none.csv", good.replace("label", "alarm")), ["none.csv", "'label'", "a, b, alarm"]),
        "misspelt label": ([*file("ok.csv", good), "--label-column", "labl"], ["ok.csv", "'labl'", "a, b, label"]),
        "no sensors": (file("few.csv", "label\n0\n2\n"), ["few.csv", "0 sensor columns"]),
        "many sensors": (file("many.csv", "a,b,c,d,e,f,g,label\n1,2,3,4,5,6,7,0\n"), ["many.csv", "7 sensor columns"]),
        "twice the same column": (file("twice.csv", "a,a,label\n1,2,0\n"), ["twice.csv", "same name"]),
        "few rows": (file("short.csv", good[: good.index("\n500,")]), ["'short'", "rows", "801"]),
        "one class": (file("one.csv", "a,label\n" + "1,0\n" * 3000), ["windows of normal", "nothing to tell apart"]),
        "one class in training": (file("late.csv", "a,label\n" + "1,0\n" * 3400 + "1,1\n" * 100), ["nothing to tell"]),
        "order of time": (file("order.csv", "timestamp," + good.replace("\n", "\n2024-01-01,", 3000).replace(
            "2024-01-01,7,", "2023-12-31,7,")), ["order.csv", "row 9", "'timestamp'", "sort"]),
        "encoding": (file("latin.csv", good.replace("\n7,1,0", "\n7,ß,0"), "latin-1"), ["latin.csv", "row 9", "'b'"]),
        "torn parquet": (["--data", str(tmp_path / "torn.parquet")], ["torn.parquet"]),
        "text in parquet": (["--data", str(tmp_path / "text.parquet")], ["text.parquet", "row 1,", "'a'", "'x'"]),
        "patch": (["--patch-len", "7"], ["--patch-len 7", "--seq-len 60"]),
        "heads": (["--num-heads", "5"], ["--num-heads 5", "--d-model 128"]),
        "range": (["--epochs", "0"], ["--epochs", "0 is not between 1"]),
        "not a number": (["--dropout", "x"], ["--dropout", "'x'"]),
        "unknown flag": (["--epoch", "3"], ["--epoch"]),
        "device": (["--device", "tpu"], ["'tpu'"]),
        "nothing to resume": (["--resume"], ["no unfinished run"]),
        "resume another": (["--resume", "--epochs", "3"], ["--epochs cannot", "--resume"]),
        "diverged": (["--learning-rate", "1e30", *SMALL], ["not finite", "--learning-rate"]),
    }


def test_every_error_is_one_line_with_exit_code_2(tmp_path, capsys):
    for name, (argv, words) in bad_files(tmp_path).items():
        with pytest.raises(SystemExit) as stopped:
            fire.main([*argv, "--output-dir", str(tmp_path / "outputs")])
        assert stopped.value.code == 2, name
        printed = capsys.readouterr().err.replace("\r", "\n")
        lines = [line for line in printed.splitlines() if "fire.py: error: " in line]
        assert len(lines) == 1 and all(word in lines[0] for word in words), (name, lines)
    assert not list(tmp_path.glob("outputs/fire/run-*")), "a run that never began leaves nothing behind"


def test_an_output_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        fire.main(["--output-dir", str(tmp_path / "file"), *SMALL])
    assert stopped.value.code == 2 and "file" in capsys.readouterr().err.splitlines()[-1]


# --- Models -----------------------------------------------------------------------------------------------------------


def test_exact_parameter_count():
    assert sum(parameter.numel() for parameter in fire.OptimizedFireTransformer().parameters()) == 621_316


@pytest.mark.parametrize("patch_len", [1, 5])
def test_the_short_last_layer_gives_what_the_whole_encoder_gives(patch_len):
    torch.manual_seed(0)
    model = fire.OptimizedFireTransformer(patch_len=patch_len).eval()
    x, area = torch.randn(4, 60, 6), torch.tensor([0, 1, 4, 2])
    tokens = model.input_proj(x.reshape(4, 60 // patch_len, -1)) + model.pos_encoding
    last = model.transformer(tokens + model.area_embedding(area)[:, None])[:, -1]
    logits, risk = model(x, area)
    torch.testing.assert_close(logits, model.fire_classifier(last), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(risk, 100 * model.risk_predictor(last)[:, 0], atol=1e-3, rtol=1e-4)
    assert ((risk > 0) & (risk < 100)).all()
    missing = x.clone()
    missing[:, 3] = float("nan")
    x[:, 3] = 0
    torch.testing.assert_close(model(missing, area)[0], model(x, area)[0])


def test_window_features_against_numpy():
    data = embedded_data(8000)
    starts = fire.window_starts(data.segments["validation"], 60, 60)[:200]
    features = fire.window_features(data, starts, 60, chunk=64)
    assert features.shape == (len(starts), 8 * 6 + 5) and np.isfinite(features).all()
    for row, start in zip(features, starts):
        x = data.readings[start : start + 60].astype(np.float64)
        missing = np.isnan(x).mean(axis=0)
        x[:, missing == 1] = 0
        x = np.where(np.isnan(x), np.nanmean(x, axis=0), x)
        slope = np.polyfit(np.arange(60), x, 1)[0]
        step = np.abs(np.diff(x, axis=0)).mean(axis=0)
        plain = [x.mean(0), x.std(0, ddof=1), x.min(0), x.max(0), x[-1], slope, step, missing]
        np.testing.assert_allclose(row, np.concatenate([*plain, np.eye(5)[data.areas[start]]]), atol=1e-4)


def test_majority_vote_against_a_plain_count():
    votes = np.array(np.meshgrid(*[range(3)] * 4)).reshape(4, -1)  # all 81 ways in which four models can vote
    for ballot, answer in zip(votes.T.tolist(), fire.majority_vote(votes)):
        most = max(map(ballot.count, ballot))
        assert answer == max(c for c in ballot if ballot.count(c) == most)


def test_class_weights():
    labels = np.repeat([0, 1, 2], [700, 200, 100])
    np.testing.assert_allclose(fire.class_weights(labels, 1), 1000 / 3 / np.array([700, 200, 100]))
    np.testing.assert_allclose(fire.class_weights(labels, 0), 1)
    assert fire.class_weights(labels, 0.5)[labels].mean() == pytest.approx(1)
    assert fire.class_weights(np.repeat([0, 2], 5), 1)[[0, 2]].tolist() == [1, 1]


# --- Evaluation -------------------------------------------------------------------------------------------------------


def test_detection_delay_of_windows_one_second_apart():
    data = embedded_data(60_000)
    starts, lengths = fire.fire_windows(data, 60)
    assert lengths and len(starts) == sum(lengths)
    inside = np.concatenate([np.arange(a, b) for a, b in data.segments["test"]])
    for first in np.split(starts, np.cumsum(lengths)[:-1]):
        ends = first + 59
        assert data.labels[ends[0] - 1] != 2 and (data.labels[ends] == 2).all()  # from the onset on, all of it
        assert ends[-1] + 1 in inside and data.labels[ends[-1] + 1] != 2  # a fire that is cut off does not count
        assert set(range(first[0], ends[-1] + 1)) <= set(inside)
    labels = np.zeros(600, np.int8)
    labels[20:40] = labels[100:150] = labels[570:] = 2  # too early for a window before it, whole, cut off
    starts, lengths = fire.fire_windows(SimpleNamespace(labels=labels, segments={"test": [(0, 600)]}), 60)
    assert lengths == [50] and starts[0] == 100 - 59
    assert fire.detection_delay(np.array([0, 1, 2, 2, 1, 1, 2]), [4, 2, 1]) == {
        "fires": 3, "never_detected": 1, "median_s": 1.0, "p90_s": 1.8}
    assert fire.detection_delay(None, [])["median_s"] is None


def test_metrics_by_hand():
    true, predicted = np.array([0, 0, 0, 1, 1, 2, 2, 2]), np.array([0, 0, 2, 1, 0, 2, 2, 1])
    metrics = fire.classification_metrics(true, predicted)
    assert metrics["accuracy"] == 5 / 8
    assert metrics["false_alarm_rate"] == 1 / 5 and metrics["missed_fire_rate"] == 1 / 3
    assert metrics["per_class"]["warning"]["precision"] == 0.5
    assert metrics["confusion_matrix"].tolist() == [[2, 0, 1], [1, 1, 0], [0, 1, 2]]


# --- The whole program ------------------------------------------------------------------------------------------------


def test_a_run_writes_everything(finished):
    run_dir, results = finished
    assert {path.name for path in run_dir.iterdir()} == PICTURES | {
        "results.json", "summary.md", "checkpoint.pt", "transformer.pt", "trees.joblib"}
    assert json.loads((run_dir / "results.json").read_text()) == results
    assert results["finished"] and results["data"]["source"] == "real" and results["data"]["rows"] > 7000
    assert set(results["models"]) == {*fire.VOTERS, "ensemble", "logistic regression", "majority class"}  # no oracle
    windows = results["data"]["windows"]["test"]
    for scores in results["models"].values():
        assert np.sum(scores["confusion_matrix"], axis=1).tolist() == windows
        assert scores["accuracy"] == pytest.approx(np.trace(scores["confusion_matrix"]) / sum(windows))
    summary = (run_dir / "summary.md").read_text()
    assert all(name in summary for name in results["models"]) and "94 to 96" in summary
    assert all(row["model"] in (run_dir / "model_comparison.html").read_text() for row in results["table"])
    kept = torch.load(run_dir / "transformer.pt", weights_only=True)
    assert kept["areas"]["voc"] == list(fire.SENSORS["voc"]) and kept["arguments"]["seq_len"] == 30
    assert kept["mean"].shape == kept["std"].shape == (2, 6)


def test_the_same_command_gives_the_same_numbers_and_a_new_folder(finished, folder):
    run_dir, results = finished
    again = fire.main(["--data", str(folder), "--output-dir", str(run_dir.parents[1]), *SMALL])
    assert again["models"] == results["models"]
    assert (run_dir.parent / "run-002/results.json").exists()


def weights_of(run_dir):
    """The best weights and those of the last epoch, which need not be the same."""
    names = "transformer.pt", "checkpoint.pt"
    best, last = (torch.load(run_dir / name, weights_only=True)["model"] for name in names)
    return {f"best {name}": weight for name, weight in best.items()} | last


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path, capsys):
    argv = [*SMALL, "--epochs", "4"]
    fire.main([*argv, "--output-dir", str(tmp_path / "whole")])
    command = [sys.executable, ROOT / "fire.py", *argv, "--output-dir", "killed"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    run_dir = tmp_path / "killed/fire/run-001"
    while process.poll() is None and not (run_dir / "checkpoint.pt").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run_dir / "transformer.pt").exists(), "it was too quick to be killed"
    results = fire.main(["--resume", str(run_dir)])
    assert len(results["history"]) == 4 and results["finished"]
    whole = json.loads((tmp_path / "whole/fire/run-001/results.json").read_text())
    assert results["models"] == whole["models"] and results["risk"] == whole["risk"]
    for name, weight in weights_of(tmp_path / "whole/fire/run-001").items():
        assert torch.equal(weight, weights_of(run_dir)[name]), name
    with pytest.raises(SystemExit):
        fire.main(["--resume", "run-001", "--output-dir", str(tmp_path / "killed")])
    assert "no unfinished run 'run-001'" in capsys.readouterr().err
    (run_dir / "results.json").write_text('{"experiment": "duet", "finished": false, "arguments": {}}')
    with pytest.raises(SystemExit):
        fire.main(["--resume", str(run_dir)])
    assert "no unfinished run" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on_and_bad_checkpoints_are_refused(folder, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    copy = tmp_path / "basement_copy.csv"
    copy.write_bytes((folder / "basement_data_cleaned.csv").read_bytes())
    output = ["--output-dir", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(fire, "plot_dashboard", interrupt)
        with pytest.raises(SystemExit) as stopped:
            fire.main(["--data", str(copy), *output, *SMALL])
    assert stopped.value.code == 130 and "--resume run-001" in capsys.readouterr().err
    checkpoint = tmp_path / "out/fire/run-001/checkpoint.pt"
    whole = checkpoint.read_bytes()
    for damage, words in ((whole[:5000], "damaged"), (b"no checkpoint", "damaged"), (whole, "other data")):
        checkpoint.write_bytes(damage)
        if damage is whole:
            copy.write_text(copy.read_text().replace("\n1970-01-01 00:00:07,", "\n1970-01-01 00:00:07,9", 1))
        with pytest.raises(SystemExit) as stopped:
            fire.main(["--resume", *output])
        assert stopped.value.code == 2 and words in capsys.readouterr().err
        assert checkpoint.exists()


def test_several_runs_give_mean_and_interval(folder, tmp_path):
    results = fire.main(["--data", str(folder), "--output-dir", str(tmp_path), *SMALL, "--runs", "2", "--seed", "5"])
    single = [json.loads((tmp_path / f"fire/run-001/seed-{seed}/results.json").read_text()) for seed in (5, 6)]
    assert results["data"]["rows"] == single[0]["data"]["rows"] and len(results["seconds"]) == 2
    for row in results["table"]:
        values = [100 * one["models"][row["model"]]["accuracy"] for one in single]
        mean, width = np.mean(values), 12.706 * np.std(values, ddof=1) / np.sqrt(2)  # Student's t with one degree
        assert [float(x) for x in row["accuracy %"].split(" ± ")] == pytest.approx([mean, width], abs=0.1)
    assert "±" in (tmp_path / "fire/run-001/summary.md").read_text()
    # As if killed in the second seed: the first is not run again, the second goes on, the table is the same.
    top, first, second = (tmp_path / "fire/run-001" / name for name in ("", "seed-5", "seed-6"))
    written = (first / "results.json").stat().st_mtime_ns
    (top / "results.json").write_text(json.dumps(results | {"finished": False}))
    (second / "results.json").unlink()
    again = fire.main(["--resume", "--output-dir", str(tmp_path)])
    accuracies = [{row["model"]: row["accuracy %"] for row in table["table"]} for table in (results, again)]
    assert accuracies[0] == accuracies[1] and (first / "results.json").stat().st_mtime_ns == written


# --- S3, saved versions, new readings, compared runs, several processes -----------------------------------------------


@pytest.fixture(scope="session")
def s3(folder):
    """A moto server on this machine that holds the files of `folder` under s3://areas/data.

    Yields a namespace: how many `writes` it still lets through, and pyarrow's `client` of it.
    """
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    moto, state = DomainDispatcherApplication(create_backend_app), SimpleNamespace(writes=math.inf)

    def gate(environ, start_response):
        state.writes -= environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE")
        if state.writes >= 0:
            return moto(environ, start_response)
        start_response("403 Forbidden", [("Content-Length", "0")])
        return []

    handler = type("Quiet", (WSGIRequestHandler,), {"log": lambda *_: None})
    server = make_server("127.0.0.1", 0, gate, threaded=True, request_handler=handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ENDPOINT_URL": f"http://127.0.0.1:{server.port}", "ACCESS_KEY_ID": "test",
                            "SECRET_ACCESS_KEY": "test", "EC2_METADATA_DISABLED": "true"}.items():
            patch.setenv(f"AWS_{name}", value)
        state.client = fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], allow_bucket_creation=True)
        state.client.create_dir("areas")
        fs.copy_files(str(folder), "areas/data", fs.LocalFileSystem(), state.client)
        yield state
    server.shutdown()


@pytest.fixture(params=["folder", "s3"])
def models(request, s3, tmp_path):
    """An empty place for versions, on this machine and in S3."""
    return str(tmp_path / "models") if request.param == "folder" else f"s3://areas/{tmp_path.name}"


def error_of(argv, capsys):
    """The one line with which main(argv) stops."""
    with pytest.raises(SystemExit) as stopped:
        fire.main(argv)
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "fire.py: error: " in line]
    assert stopped.value.code == 2 and len(lines) == 1
    return lines[0]


def test_s3_gives_the_same_data_as_the_folder(s3, folder):
    here, there = (fire.load_data(fire.parse_args(["--data", address])) for address in (str(folder), "s3://areas/data"))
    assert here.info["sha256"] == there.info["sha256"] and here.info["areas"] == there.info["areas"]
    assert [file["sha256"] for file in here.info["files"]] == [file["sha256"] for file in there.info["files"]]
    assert there.info["files"][0]["path"] == "s3://areas/data/basement_data_cleaned.csv"


def test_s3_errors(s3, tmp_path, capsys):
    import boto3

    client = boto3.client("s3", region_name="us-east-1", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    client.create_bucket(Bucket="closed")
    client.put_object(Bucket="closed", Key="data/basement.csv", Body=b"a,label\n1,0\n")
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": ["arn:aws:s3:::closed/*"]}
    client.put_bucket_policy(Bucket="closed", Policy=json.dumps({"Version": "2012-10-17", "Statement": [deny]}))
    client.put_object(Bucket="areas", Key="empty/readme.txt", Body=b"")
    output = ["--output-dir", str(tmp_path)]
    for address, word in (("s3://nowhere/data", "no such file, folder or bucket"), ("s3://areas/dat", "no such file"),
                          ("s3://areas/empty", "no .csv or .parquet"), ("s3://closed/data", "ACCESS_DENIED")):
        line = error_of(["--data", address, *output], capsys)
        assert address in line and word in line
    line = error_of(["--save-to", "s3://nowhere/models", *SMALL, *output], capsys)
    assert "--save-to s3://nowhere/models" in line and not list(tmp_path.rglob("results.json"))  # before any training


def whole_versions(address):
    """Names of the versions under `address` that have metadata, whose files must be as it says."""
    filesystem, root = fire.open_address(address)
    names = []
    for info in filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True)):
        if info.base_name == "metadata.json":
            names.append(Path(info.path).parent.name)
            metadata = json.loads(filesystem.open_input_stream(info.path).read())
            assert set(metadata["files"]) == {"transformer.pt", "trees.joblib", "summary.md"}
            for name, about in metadata["files"].items():
                assert fire.file_sha256(f"{address}/{names[-1]}/{name}") == about["sha256"]
    return sorted(names)


def test_a_finished_run_is_saved_as_the_next_version(folder, models, tmp_path):
    results = fire.main(["--data", str(folder), "--output-dir", str(tmp_path), "--save-to", models, *SMALL])
    assert results["saved_to"] == f"{models}/v0001" and whole_versions(models) == ["v0001"]
    filesystem, path = fire.open_address(f"{models}/v0001/metadata.json")
    before = filesystem.get_file_info(path).mtime_ns
    metadata = json.loads(filesystem.open_input_stream(path).read())
    assert metadata["metrics"] == results["models"] and metadata["arguments"] == results["arguments"]
    assert metadata["versions"]["torch"] and "git_commit" in metadata
    fire.save_version(results, tmp_path / "fire/run-001", models)
    assert whole_versions(models) == ["v0001", "v0002"] and filesystem.get_file_info(path).mtime_ns == before
    names = {info.base_name for info in filesystem.get_file_info(fs.FileSelector(path.removesuffix("/metadata.json")))}
    assert names == {*metadata["files"], "metadata.json"}


def test_an_upload_that_breaks_off_anywhere_does_not_look_complete(finished, s3):
    run_dir, results = finished
    for writes in range(100):
        s3.writes, whole = writes, whole_versions("s3://areas/broken")
        try:
            fire.save_version(results, run_dir, "s3://areas/broken")
        except fire.UserError as error:
            assert "--save-to s3://areas/broken" in str(error) and "is kept" in str(error)
            s3.writes = math.inf
            assert whole_versions("s3://areas/broken") == whole
        else:
            break
        finally:
            s3.writes = math.inf
    assert writes > 15 and len(whole_versions("s3://areas/broken")) == len(whole) + 1


def test_two_writers_at_once_get_two_versions(finished, models):
    run_dir, results = finished
    filesystem, root = fire.open_address(models)

    class Meeting:
        """The file system, but a second writer comes before the `count`-th call of `method`."""

        def __init__(self, method, count):
            self.method, self.count = method, count

        def __getattr__(self, name):
            if name == self.method:
                self.count -= 1
                if self.count == 0:
                    self.other = fire.claim_version(filesystem, root)[0]
            return getattr(filesystem, name)

    for call in (("get_file_info", 1), ("create_dir", 1), ("open_output_stream", 1), ("get_file_info", 3)):
        meeting = Meeting(*call)
        mine = fire.claim_version(meeting, root)[0]
        assert mine != meeting.other
    with ThreadPoolExecutor(4) as pool:
        saved = list(pool.map(lambda _: fire.save_version(results, run_dir, models), range(4)))
    assert len(set(saved)) == 4 and whole_versions(models) == sorted(address[-5:] for address in saved)


def test_prediction_equals_evaluation_on_the_same_windows(folder, tmp_path, capsys):
    argv = ["--data", str(folder), *SMALL, "--sample-per-area", "6000"]
    data, run_dir = fire.load_data(fire.parse_args(argv)), tmp_path / "trained/fire/run-001"
    fire.main([*argv, "--output-dir", str(tmp_path / "trained")])
    table = pa.csv.read_csv(folder / "basement_data_cleaned.csv")
    shuffled = table.select(table.column_names[::-1]).append_column("extra", table["label"])
    pa.csv.write_csv(shuffled, tmp_path / "basement_new.csv")
    argv = ["--predict", str(tmp_path / "basement_new.csv"), "--output-dir", str(tmp_path), "--stride", "1"]
    results = fire.main([*argv, "--checkpoint", str(run_dir / "transformer.pt")])
    assert "'label', 'extra' not used" in capsys.readouterr().err
    answers = pa.csv.read_csv(tmp_path / "fire/run-001/predictions.csv").to_pydict()
    assert results["rows"] == 6000 and results["windows"] == len(answers["class"]) == 5971
    assert results["counts"] == {name: answers["class"].count(name) for name in fire.CLASSES}

    state = torch.load(run_dir / "transformer.pt", weights_only=True)
    model = fire.OptimizedFireTransformer.from_arguments(state["arguments"], 2)
    model.load_state_dict(state["model"])
    starts = fire.window_starts(data.segments["test"], 30, 30)
    starts = starts[data.areas[starts] == 0]
    logits, risk = fire.predict(model, torch.from_numpy(data.readings), torch.from_numpy(data.areas), starts, 30)
    labels = table["label"].to_numpy().astype(np.int8)
    rows = starts - starts[0] + fire.split_rows(labels, 30)["test"][0][0]  # of the file
    np.testing.assert_array_equal([fire.CLASSES[c] for c in logits.argmax(1)], np.array(answers["class"])[rows])
    for c, name in enumerate(fire.CLASSES):
        np.testing.assert_allclose(np.array(answers[name])[rows], logits.softmax(1)[:, c], atol=0.02)
    np.testing.assert_allclose(np.array(answers["risk"])[rows], risk, atol=1)
    assert answers["first row"][0] == 1 and answers["last row"][-1] == 6000
    assert str(answers["timestamp"][7]) == "1970-01-01 00:00:36"  # of the last row of the eighth window


def test_prediction_errors(finished, tmp_path, capsys):
    checkpoint = str(finished[0] / "checkpoint.pt")
    good = "temperature_c,humidity_pct,co_ppm,smoke_pct_m,methane_ppm,co2_ppm\n" + "1,2,3,4,5,6\n" * 40
    texts = {"basement": good, "cellar": good, "basement_short": good[: 66 + 12 * 11],
             "basement_less": good.replace("co_ppm", "co"), "basement_text": good[:-2] + "x\n"}
    for name, text in texts.items():
        (tmp_path / f"{name}.csv").write_text(text)
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    output = ["--output-dir", str(tmp_path / "outputs")]
    for name, ckpt, words in (("cellar.csv", checkpoint, ["'cellar'", "--area", "basement, voc"]),
                              ("basement_short.csv", checkpoint, ["11 rows", "30"]),
                              ("basement_less.csv", checkpoint, ["co_ppm", "it has", "co,"]),
                              ("basement_text.csv", checkpoint, ["row 41", "'co2_ppm'", "a number"]),
                              ("nowhere.csv", checkpoint, ["nowhere.csv"]),
                              ("basement.csv", str(tmp_path / "nowhere.pt"), ["nowhere.pt"]),
                              ("basement.csv", str(tmp_path / "basement.csv"), ["basement.csv", "no checkpoint"]),
                              ("basement.csv", str(tmp_path / "foreign.pt"), ["foreign.pt", "no checkpoint"])):
        line = error_of(["--predict", str(tmp_path / name), "--checkpoint", ckpt, *output], capsys)
        assert all(word in line for word in words), line
    assert not list(tmp_path.rglob("predictions.csv"))
    fire.main(["--predict", str(tmp_path / "cellar.csv"), "--area", "basement", "--checkpoint", checkpoint, *output])
    for argv, words in ((["--predict", "x.csv"], ["--checkpoint"]), (["--area", "voc"], ["--area", "--predict"]),
                        (["--predict", "x.csv", "--checkpoint", "y", "--epochs", "3"], ["--epochs", "--predict"])):
        line = error_of([*argv, *output], capsys)
        assert all(word in line for word in words), line


def test_runs_are_compared_at_their_price_beside_the_claim(finished, tmp_path, capsys):
    run_dir, results = finished
    path, output = run_dir / "results.json", ["--output-dir", str(tmp_path)]
    table = fire.main(["--compare", str(path), str(path), "--price-per-hour", "3600", *output])["table"]
    seconds = sum(row["training s"] or 0 for row in results["table"])
    for row in table[:2]:
        assert row["accuracy %"] == max(row["accuracy %"] for row in results["table"]) and row["run"] == "run-001"
        assert row["cost $"] == pytest.approx(seconds, abs=0.01)
        assert row["training windows"] == sum(results["data"]["windows"]["train"])
        assert row["saved $"] == pytest.approx(43 * 3.825 - seconds, abs=0.02)
    assert "claim" in table[2]["run"] and "accuracy %" not in table[2]
    assert table[2]["cost $"] == pytest.approx(43 * 3.825, abs=0.01)
    assert {path.name for path in (tmp_path / "fire/run-001").iterdir()} == {
        "results.json", "summary.md", "cost_comparison.png"}
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "begun.json").write_text(json.dumps(fire.describe_run(fire.parse_args([]))))
    for name in ("other.json", "begun.json"):
        assert "finished" in error_of(["--compare", str(tmp_path / name), *output], capsys)
    assert "nowhere.json" in error_of(["--compare", str(path), str(tmp_path / "nowhere.json"), *output], capsys)
    ranges = [row | {"accuracy %": f"{90 + i}.00 ± 1.00", "training s": "3600.0 ± 1.0"}  # as --runs writes it
              for i, row in enumerate(results["table"])]
    (tmp_path / "runs.json").write_text(json.dumps(results | {"table": ranges}))
    row = fire.main(["--compare", str(tmp_path / "begun.json"), str(tmp_path / "runs.json"), *output])["table"][0]
    assert "begun.json: left out" in capsys.readouterr().err
    assert row["best model"] == results["table"][-1]["model"] and row["training h"] == len(ranges)


def test_two_processes_train_as_one_and_the_first_alone_writes(folder, tmp_path, finished):
    run_dir, results = finished  # its dropout is 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    argv = [*torchrun, ROOT / "fire.py", "--data", str(folder), *SMALL, "--output-dir", "outputs"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Everything is in") == done.stderr.count("epoch 2: loss") == 1
    assert [path.name for path in (tmp_path / "outputs/fire").iterdir()] == ["run-001"]
    both = json.loads((tmp_path / "outputs/fire/run-001/results.json").read_text())
    assert both["data"] == results["data"]
    steps = [torch.load(folder / "checkpoint.pt", weights_only=True)["history"][-1]["step_losses"]
             for folder in (run_dir, tmp_path / "outputs/fire/run-001")]
    np.testing.assert_allclose(*steps, atol=1e-3)  # the tolerance that the README states
    for one, two in zip(results["history"], both["history"]):
        assert two["validation_loss"] == pytest.approx(one["validation_loss"], abs=1e-3)
        assert two["train_accuracy"] == pytest.approx(one["train_accuracy"], abs=0.01)


def test_a_process_that_is_not_the_first_writes_nothing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fire, "RANK", 1)
    assert fire.run_experiment(fire.parse_args(["--data", str(folder), *SMALL]), tmp_path) is None
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_pasted_into_a_notebook_in_an_empty_folder(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    script = (ROOT / "fire.py").read_text()
    for default, small in (("100_000", "3_000"), ("128", "16"), ("12", "2")):  # main() is called as it is in the paste
        assert f"default={default}," in script
        script = script.replace(f"default={default},", f"default={small},")
    cells = ["%%writefile common.py\n" + (ROOT / "common.py").read_text(), script]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(book, timeout=200, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = book.cells[1].outputs
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 9  # the dashboard is redrawn in place
    assert {path.name for path in (tmp_path / "outputs/fire/run-001").iterdir()} > PICTURES


def test_flags(capsys):
    assert fire.parse_args(["--quick"]).sample_per_area == 30_000
    assert fire.parse_args(["--quick", "--epochs", "7"]).epochs == 7  # what is given counts
    assert fire.parse_args(["--seq-len", "90"]).stride == 90
    with pytest.raises(SystemExit) as stopped:
        fire.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and "(default: 0.002)" in text and "None" not in text


@pytest.mark.skipif(not SMOKE.exists(), reason="the real smoke-detector file is not beside the checkout")
def test_the_real_smoke_file(tmp_path, capsys):
    results = fire.main(["--data", str(SMOKE), "--label-column", "Fire Alarm", "--output-dir", str(tmp_path),
                         *SMALL[2:], "--sample-per-area", "100000"])
    notes = capsys.readouterr().err
    assert "column '' left out" in notes and "optimistic" in notes
    assert results["data"]["areas"] == {"smoke": ["Temperature[C]", "Humidity[%]", "eCO2[ppm]"]}
    assert results["data"]["split"] == "by label run (optimistic)"
    assert set(results["models"]["transformer"]["per_class"]) == {"normal", "fire"}  # 0 and 1 are normal and fire
