"""What users of fire.py rely on: offline, on the CPU. Real files are read where ../shared/data lies beside."""

import gzip
import json
import math
import os
import socket
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, SHARED, kill_when, run_notebook
from pyarrow import fs

import fire

SMOKE = SHARED / "smoke/smoke_detection_iot.csv"
SMALL = ["--sample-per-area", "4000", "--seq-len", "30", "--d-model", "16", "--num-layers", "2", "--num-trees", "4",
         "--epochs", "2", "--steps-per-epoch", "10", "--batch-size", "64", "--device", "cpu"]
PICTURES = {"dashboard.png", "class_distribution.png", "area_performance.png", "confusion_matrices.png",
            "training_progress.gif", "feature_importance.png", "learning_curves.png", "resources.png",
            "model_comparison.png", "model_comparison.html"}


def area_frame(area="basement", rows=6000, label="label", values=None):
    """An area of the generator as a table; `values` maps classes to what stands in the label column."""
    readings, labels, _ = fire.generate_area(area, rows, seed=1)
    frame = pd.DataFrame({"timestamp": pd.date_range("2024-01-01", periods=rows, freq="s")})
    frame[list(fire.SENSORS[area])] = readings
    frame[label] = labels if values is None else [values[c] for c in labels]
    return frame


def load(*argv):
    """(Data, info) for arguments."""
    fire.NOTES.clear()
    return fire.load_data(fire.parse_args([str(word) for word in argv]))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two areas as a user has them: a CSV and a Parquet file, the latter with a gap."""
    folder = tmp_path_factory.mktemp("areas")
    area_frame().to_csv(folder / "basement_data_cleaned.csv", index=False)
    frame = area_frame("voc")
    frame.loc[3000:, "timestamp"] += pd.Timedelta("2h")
    frame.to_parquet(folder / "voc_data_cleaned.parquet")
    return folder


@pytest.fixture(scope="session")
def finished(folder, tmp_path_factory):
    """(folder of a finished run on files, its results)."""
    output = tmp_path_factory.mktemp("outputs")
    results = fire.main(["--data", str(folder), "--output-dir", str(output), *SMALL])
    return output / "fire/run-001", results


# --- The generator ----------------------------------------------------------------------------------------------------


def test_a_block_is_the_same_whatever_was_made_before():
    whole = fire.generate_area("laundry", 3 * fire.BLOCK_ROWS, seed=7)
    for block, area in zip(fire.generate_block("laundry", 2, seed=7), whole):
        np.testing.assert_array_equal(block, area[2 * fire.BLOCK_ROWS :])


def test_another_seed_gives_another_block():
    assert not np.array_equal(*(fire.generate_block("laundry", 2, seed)[1] for seed in (7, 8)))


def test_the_generator_has_the_promised_shape_and_mix():
    shares, agree = np.zeros(3), []
    for area, sensors in {"basement": 6, "laundry": 5, "asd": 4, "voc": 4, "arc": 4}.items():
        readings, labels, oracle = fire.generate_area(area, 200_000, seed=42)
        assert readings.shape == (200_000, sensors)
        assert 0.001 < np.isnan(readings).mean() < 0.05  # sensors drop out, but seldom
        assert not {(0, 2), (2, 0)} & set(pairwise(labels))  # a fire is preceded and followed by a warning
        shares += np.bincount(labels) / len(labels) / 5
        agree.append(np.mean(labels == oracle))
    np.testing.assert_allclose(shares, [0.7, 0.2, 0.1], atol=0.04)
    assert 0.96 < np.mean(agree) < 0.995  # not even the oracle is perfect


# --- Drift, split, sample, windows ------------------------------------------------------------------------------------


def test_the_baseline_knows_nothing_of_what_comes_later():
    rng = np.random.default_rng(0)
    readings = rng.normal(size=(1000, 2)).astype(np.float32)
    changed = readings.copy()
    changed[600:] += 50
    for array in (readings, changed):
        fire.remove_drift(array, 300)
    np.testing.assert_array_equal(readings[:600], changed[:600])


def test_the_baseline_follows_drift_and_leaves_a_short_incident():
    readings = np.linspace(20, 40, 20_000, dtype=np.float32)[:, None]
    readings[10_000:10_900] += 5
    readings[5000:5200] = np.nan
    fire.remove_drift(readings, 3600)
    assert np.nanmax(np.abs(readings[4000:9900])) < 4  # half an hour of drift, not 20
    assert np.nanmean(readings[10_000:10_900]) > 5
    assert np.isnan(readings[5000:5200]).all()


def test_the_baseline_of_a_recording_knows_nothing_of_another(tmp_path):
    for number, level in enumerate((100, 20, 20, 20, 20, 20)):
        frame = CLEAN.assign(a=level + CLEAN["a"])
        frame.to_csv(tmp_path / f"x_{number}.csv", index=False)
    data, info = load("--data", tmp_path, "--split", "files", "--baseline-seconds", "600")
    area = info["areas"]["all"]
    column = data.readings[:, area["columns"][0]] * area["std"][0] + area["mean"][0]
    assert column.abs().max() < 10  # not 80, the step from one recording to the next


def test_a_sample_of_short_stretches_is_as_large_as_asked():
    stretches = [(start, start + 900) for start in range(0, 400_000, 1000)]
    args = fire.parse_args(["--sample-per-area", "100000"])
    for split, share in fire.SPLITS.items():
        blocks = fire.sample_blocks(stretches, np.zeros(400_000, np.int8), split, args, 0)
        assert sum(stop - start for start, stop in blocks) == pytest.approx(share * 100_000, rel=0.05)
        assert min(stop - start for start, stop in blocks) >= args.seq_len


def test_no_baseline_leaves_the_readings():
    readings = np.arange(100, dtype=np.float32)[:, None]
    fire.remove_drift(readings, 0)
    assert readings[50, 0] == 50


def test_a_baseline_to_which_incidents_would_adapt_is_not_used(tmp_path, capsys):
    frame = pd.DataFrame({"a": np.random.default_rng(0).normal(size=40_000), "label": np.arange(40_000) // 6000 % 2})
    frame.to_csv(tmp_path / "a.csv", index=False)
    assert load("--data", tmp_path)[1]["baseline_seconds"] == 0
    assert "no drift compensation, since an incident lasts 4," in capsys.readouterr().err
    assert load("--data", tmp_path, "--baseline-seconds", "600")[1]["baseline_seconds"] == 600


def area_of(labels, breaks=(), recordings=(0,)):
    return fire.Area(["a"], None, np.asarray(labels, np.int8), None, breaks=breaks, recordings=recordings)


@pytest.mark.parametrize("how", ["time", "runs"])
def test_splits_have_no_row_in_common_and_are_a_window_apart(how):
    labels = np.repeat([0, 1, 2, 0, 1, 0], [5000, 2000, 1500, 4000, 900, 3000])
    stretches = fire.split_area(area_of(labels), how, fire.parse_args([]))
    ordered = sorted((start, stop, split) for split in stretches for start, stop in stretches[split])
    for (_, stop, split), (start, _, other) in pairwise(ordered):
        assert start >= stop + (60 if split != other else 0)


def test_label_runs_bring_every_class_into_every_split():
    labels = np.repeat([0, 1, 2, 0], [5000, 2000, 1500, 4000])
    stretches = fire.split_area(area_of(labels), "runs", fire.parse_args([]))
    for split in fire.SPLITS:
        assert {labels[start] for start, _ in stretches[split]} == {0, 1, 2}


def test_a_cut_does_not_go_through_an_incident():
    labels = np.repeat([0, 1, 2, 1, 0], [65_000, 3000, 3000, 1500, 27_500])
    stretches = fire.split_area(area_of(labels), "time", fire.parse_args([]))
    assert stretches["train"] == [(0, 72_500)]
    assert stretches["val"] == [(72_560, 85_000)]


def test_without_a_quiet_stretch_the_cut_stays():
    stretches = fire.split_area(area_of(np.ones(10_000)), "time", fire.parse_args([]))
    assert stretches["train"] == [(0, 7000)]


def test_no_window_straddles_a_gap():
    stretches = fire.split_area(area_of(np.zeros(10_000), breaks=[3000, 3050]), "time", fire.parse_args([]))
    assert stretches["train"] == [(0, 3000), (3050, 7000)]  # 50 rows hold no window


def test_whole_recordings_are_on_one_side_and_each_split_has_fire():
    labels = np.tile(np.repeat([0, 2], [400, 100]), 16)
    area = area_of(labels, breaks=range(500, 8000, 500), recordings=range(0, 8000, 500))
    stretches = fire.split_area(area, "files", fire.parse_args([]))
    assert [len(stretches[split]) for split in fire.SPLITS] == [11, 3, 2]
    assert sorted(start for bounds in stretches.values() for start, _ in bounds) == list(range(0, 8000, 500))


def test_windows_of_sampled_rows_are_unbroken_and_never_on_two_sides(tmp_path):
    rows = 40_000  # the reading is the row number, so that the rows of a window can be told
    labels = np.arange(rows) // 700 % 3
    frame = pd.DataFrame({"reading": np.arange(rows), "label": labels})
    frame.to_csv(tmp_path / "a.csv", index=False)
    data, info = load("--data", tmp_path, "--sample-per-area", "9000", "--columns", "reading",
                      "--baseline-seconds", "0")
    area, seen = info["areas"]["a"], {}
    for split in fire.SPLITS:
        starts = data.starts(split, 30)
        x, _, label = data.windows(starts)
        original = (x[:, :, 0].double() * area["std"][0] + area["mean"][0]).round().long()
        assert (original.diff(dim=1) == 1).all()
        assert (torch.from_numpy(labels)[original[:, -1]] == label).all()
        seen[split] = set(original.flatten().tolist())
    assert 5000 < len(seen["train"]) <= 6300
    assert max(seen["train"]) + 60 <= min(seen["val"])
    assert max(seen["val"]) + 60 <= min(seen["test"])


def test_windows_lie_in_one_segment_each():
    segments = {"train": [(3, 9), (20, 31), (40, 43)]}
    data = fire.Data(None, torch.zeros(50), None, None, segments, seq_len=5)
    assert data.starts("train", 1).tolist() == [3, 4, *range(20, 27)]


def test_sampling_brings_the_training_part_near_the_target_mix():
    labels = np.zeros(400_000, np.int8)
    for start in range(0, 400_000, 10_000):
        labels[start : start + 900], labels[start + 900 : start + 1300] = 1, 2
    args = fire.parse_args(["--sample-per-area", "57143", "--seq-len", "15"])
    blocks = fire.sample_blocks([(0, 400_000)], labels, "train", args, 0)
    chosen = np.concatenate([labels[start:stop] for start, stop in blocks])
    assert 39_000 < len(chosen) <= 40_000
    np.testing.assert_allclose(np.bincount(chosen) / len(chosen), [0.7, 0.2, 0.1], atol=0.07)


def test_validation_and_test_are_sampled_as_they_are():
    labels = np.zeros(400_000, np.int8)
    labels[::20_000] = 2
    blocks = fire.sample_blocks([(0, 400_000)], labels, "test", fire.parse_args([]), 0)
    assert np.mean(np.concatenate([labels[start:stop] for start, stop in blocks]) == 2) < 0.04


def test_a_class_that_sampling_loses_is_noticed(tmp_path, capsys):
    labels = np.zeros(400_000, int)
    labels[100_000:103_000], labels[350_000:350_400] = 1, 1  # one fire in the test part, too short for the sample
    frame = pd.DataFrame({"reading": np.random.default_rng(0).normal(size=len(labels)), "label": labels})
    frame.to_csv(tmp_path / "a.csv", index=False)
    _, info = load("--data", tmp_path, "--sample-per-area", "20000")
    assert "too few to score: {('fire', 'val'): 0, ('fire', 'test'): 0}" in capsys.readouterr().err
    assert info["split"] == "time"  # splitting label runs would not have helped


def test_a_class_that_the_last_rows_lack_splits_each_run_and_says_so(tmp_path, capsys):
    labels = np.repeat([0, 1, 0], [4000, 3000, 8000])
    frame = pd.DataFrame({"reading": np.random.default_rng(0).normal(size=len(labels)), "label": labels})
    frame.to_csv(tmp_path / "a.csv", index=False)
    data, info = load("--data", tmp_path)
    assert info["split"] == "runs"
    assert "optimistic" in capsys.readouterr().err
    for split in fire.SPLITS:
        assert set(data.windows(data.starts(split, 60))[2].tolist()) == {0, 2}


def test_a_sensor_that_training_never_sees_stays_missing(tmp_path):
    frame = area_frame("arc", 20_000)
    frame.loc[:16_000, "current_a"] = np.nan
    frame.to_csv(tmp_path / "arc.csv", index=False)
    data, info = load("--data", tmp_path)
    column = info["areas"]["arc"]["columns"][1]
    assert data.readings[:, column].isnan().all()
    features, _ = fire.window_features(data, data.starts("test", 60))
    assert np.isfinite(features).all()
    assert (features[:, 7 * data.readings.shape[1] + column] == 1).all()  # all of it is missing


def test_a_sensor_that_is_constant_in_training_counts_as_missing(tmp_path):
    frame = area_frame("arc", 20_000)
    frame.loc[:16_000, "current_a"] = 0
    frame.to_csv(tmp_path / "arc.csv", index=False)
    data, info = load("--data", tmp_path)
    assert data.readings[:, info["areas"]["arc"]["columns"][1]].isnan().all()


def test_normalization_knows_the_training_part_alone(tmp_path):
    described = []
    for factor in (1, 100):
        frame = area_frame("arc", 20_000)
        frame.loc[14_100:, list(fire.SENSORS["arc"])] *= factor  # validation and test
        frame.to_csv(tmp_path / "arc.csv", index=False)
        _, info = load("--data", tmp_path, "--baseline-seconds", "0")
        described.append(info["areas"])
    assert described[0] == described[1]


def test_training_readings_have_mean_0_and_standard_deviation_1(folder):
    data, _ = load("--data", folder)
    train = torch.cat([data.readings[start:stop] for start, stop in data.segments["train"]][:1])
    np.testing.assert_allclose(np.nanmean(train, axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(np.nanstd(train, axis=0), 1, atol=1e-3)


def test_the_same_sensor_has_the_same_column_in_all_areas():
    areas = [fire.Area(list(sensors), None, None, None) for sensors in fire.SENSORS.values()]
    columns = fire.assign_columns(areas)
    assert max(columns.values()) == 5  # six, as the largest area has
    for area in areas:
        assert len({columns[sensor] for sensor in area.sensors}) == len(area.sensors)


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values, expected", [
    ({0: 0, 1: 1, 2: 2}, {0, 1, 2}),
    ({0: "Normal", 1: " warning", 2: "FIRE"}, {0, 1, 2}),
    ({0: 0, 1: 0, 2: 1}, {0, 2}),
    ({0: False, 1: False, 2: True}, {0, 2}),
    ({0: "No Fire", 1: "No Fire", 2: "Fire"}, {0, 2}),
    ({0: "no_fire", 1: "No-Fire", 2: "fire"}, {0, 2}),
    ({0: "no", 1: "no", 2: "yes"}, {0, 2}),
    ({0: "off", 1: "off", 2: "On"}, {0, 2}),
    ({0: "not fire   ", 1: "Not fire", 2: "fire"}, {0, 2}),
    ({0: "Normal", 1: "Normal", 2: "ALARM"}, {0, 2}),
    ({0: "NoFire", 1: "NoFire", 2: "Fire"}, {0, 2}),
    ({0: "normal", 1: "normal", 2: "Anomaly"}, {0, 2}),
])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_label_spellings(tmp_path, values, expected, kind):
    frame = area_frame(rows=8000, values=values)
    path = tmp_path / f"a.{kind}"
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    labels = fire.file_areas(fire.parse_args(["--data", str(path)]))[0]["a"].labels
    assert set(labels) == expected
    np.testing.assert_array_equal(labels == 2, fire.generate_area("basement", 8000, seed=1)[1] == 2)


def test_areas_may_spell_their_labels_differently(tmp_path):
    spellings = {"a": {0: False, 1: False, 2: True}, "b": {0: 0, 1: 1, 2: 2}, "c": {0: "no", 1: "Warning", 2: "yes"}}
    for area, values in spellings.items():
        area_frame(rows=8000, values=values).to_csv(tmp_path / f"{area}.csv", index=False)
    areas, _ = fire.file_areas(fire.parse_args(["--data", str(tmp_path)]))
    true = fire.generate_area("basement", 8000, seed=1)[1]
    np.testing.assert_array_equal(areas["a"].labels, np.where(true == 2, 2, 0))
    np.testing.assert_array_equal(areas["b"].labels, true)
    np.testing.assert_array_equal(areas["c"].labels, true)


def test_what_labels_were_taken_for_is_said(tmp_path, capsys):
    area_frame(values={0: 1, 1: 1, 2: 2}).to_csv(tmp_path / "a.csv", index=False)
    load("--data", tmp_path)
    assert "{'1': 'warning', '2': 'fire'}" in capsys.readouterr().err


def sensors_of(frame, path, *argv):
    frame.to_csv(path, index=False)
    return fire.file_areas(fire.parse_args(["--data", str(path), *argv]))[0]


def test_columns_that_give_the_answer_away_are_left_out(tmp_path, capsys):
    frame = area_frame(label="is_anomaly", values={0: 0, 1: 0, 2: 1})
    frame.insert(0, "", np.arange(6000))
    frame["Label_code"] = frame["is_anomaly"]
    frame["CNT"] = np.arange(6000) // 2 + 7.0
    frame.loc[9, "CNT"] = np.nan
    frame["UTC"] = 1_654_733_331 + np.arange(6000)
    frame["day"] = np.arange(6000) // 600
    frame["remaining"] = 6000 - np.arange(6000)
    frame["empty"] = np.nan
    frame["received"] = frame["timestamp"] + pd.to_timedelta(np.arange(6000) % 7, unit="s")
    areas = sensors_of(frame, tmp_path / "a.csv")
    assert areas["a"].sensors == list(fire.SENSORS["basement"])
    left_out = ["Unnamed: 0", "Label_code", "CNT", "UTC", "day", "remaining", "empty", "received"]
    assert f"left out {left_out}" in capsys.readouterr().err
    areas = sensors_of(frame, tmp_path / "a.csv", "--columns", "CNT", "co_ppm", "is_anomaly")
    assert areas["a"].sensors == ["CNT", "co_ppm"]


def test_a_sensor_that_rises_in_one_recording_and_a_latched_alarm_stay(tmp_path):
    for number in range(3):
        frame = CLEAN.assign(c=[0, np.arange(3000), 1][number], latch=np.arange(3000) > 2000)
        frame.to_csv(tmp_path / f"x{number}.csv", index=False)
    areas, _ = fire.file_areas(fire.parse_args(["--data", str(tmp_path), "--split", "files"]))
    assert areas["all"].sensors == ["a", "b", "c", "latch"]


def test_any_number_of_sensors(tmp_path):
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(3000, 18))).add_prefix("s")
    frame["label"] = np.arange(3000) // 300 % 2
    frame.to_csv(tmp_path / "a.csv", index=False)
    assert load("--data", tmp_path)[0].readings.shape[1] == 18


def test_csv_and_parquet_give_the_same_readings(tmp_path):
    for kind in ("to_csv", "to_parquet"):
        path = tmp_path / f"voc_x.{kind[3:]}"
        getattr(area_frame("voc"), kind)(path, index=False)
        areas, _ = fire.file_areas(fire.parse_args(["--data", str(path)]))
        np.testing.assert_allclose(areas["voc"].readings, fire.generate_area("voc", 6000, seed=1)[0], rtol=1e-6)


CLEAN = pd.DataFrame({"a": np.arange(3000) % 7 + 0.5, "b": np.arange(3000) % 5 + 0.25,
                      "label": np.arange(3000) // 100 % 3})


@pytest.mark.parametrize("name, content", {
    "semicolon and decimal comma": CLEAN.to_csv(index=False, sep=";", decimal=",").encode(),
    "tab": CLEAN.to_csv(index=False, sep="\t").encode(),
    "byte order mark": CLEAN.to_csv(index=False).encode("utf-8-sig"),
    "latin-1": CLEAN.assign(**{"é [°C]": 1}).to_csv(index=False).encode("latin-1"),
    "compressed": gzip.compress(CLEAN.to_csv(index=False).encode()),
    "PARQUET": CLEAN.to_parquet(),
    "a delimiter in a cell": CLEAN.assign(note="x, y").to_csv(index=False).encode(),
    "empty rows": CLEAN.to_csv(index=False).encode() + 9 * b",,\n",
    "UTF-16": CLEAN.to_csv(index=False, sep="\t").encode("utf-16"),
    "spaces in the header": CLEAN.to_csv(index=False).replace(",", ", ").encode(),
    "a separator above the header": b"sep=;\n" + CLEAN.to_csv(index=False, sep=";").encode(),
    "lines above the header": b'"Plot Title: room, 1"\n\n' + CLEAN.to_csv(index=False).encode(),
    "a comma in a name": CLEAN.rename(columns={"b": "b, C"}).to_csv(index=False).encode(),
    "row names of R": CLEAN.to_csv(index_label=False).encode(),
    "names that differ by a space": CLEAN.rename(columns={"b": " a"}).to_csv(index=False).encode(),
}.items())
def test_csv_files_as_people_have_them(tmp_path, name, content):
    path = tmp_path / {"compressed": "x.CSV.gz", "PARQUET": "x.PARQUET"}.get(name, "x.csv")
    path.write_bytes(content)
    argv = ["--columns", "a", "b"] if "cell" in name else []
    areas, _ = fire.file_areas(fire.parse_args(["--data", str(tmp_path), *argv]))
    np.testing.assert_allclose(areas["x"].readings[:, :2], CLEAN[["a", "b"]], rtol=1e-6)


@pytest.mark.parametrize("clock", ["%H:%M:%S", "%H.%M.%S"])
def test_a_date_and_a_time_of_day_may_be_two_columns(tmp_path, clock):
    times = pd.date_range("2024-12-30 23:50", periods=3000, freq="10s")
    clocks = {"Date": times.strftime("%d/%m/%Y"), "Time": times.strftime(clock)}
    CLEAN.assign(**clocks).to_csv(tmp_path / "x.csv", index=False)
    areas, _ = fire.file_areas(fire.parse_args(["--data", str(tmp_path)]))
    assert areas["x"].times.iloc[-1] == "31/12/2024 08:09:50"
    assert areas["x"].sensors == ["a", "b"]


def test_an_empty_row_between_others_keeps_its_place():
    assert len(fire.read_csv(b"a,b\n1,2\n,\n3,4\n")) == 3


def test_a_time_column_that_is_not_used_is_no_sensor(tmp_path):
    CLEAN.assign(time=np.arange(3000) % 1000).to_csv(tmp_path / "x.csv", index=False)
    areas, _ = fire.file_areas(fire.parse_args(["--data", str(tmp_path), "--time-column", "none"]))
    assert areas["x"].sensors == ["a", "b"]


def test_latin_1_may_begin_far_down_in_a_file(tmp_path):
    frame = pd.concat([CLEAN.assign(room="attic")] * 3 + [CLEAN.assign(room="küche")])
    frame.to_csv(tmp_path / "x.csv", index=False, encoding="latin-1")
    areas, _ = fire.file_areas(fire.parse_args(["--data", str(tmp_path), "--area-column", "room"]))
    assert list(areas) == ["attic", "küche"]


def test_hidden_files_are_no_data_and_folders_can_name_areas(tmp_path):
    for name in ("area=hall/x.parquet", "area=attic/x.parquet"):
        (tmp_path / name).parent.mkdir()
        CLEAN.to_parquet(tmp_path / name)
    (tmp_path / "area=hall/.ipynb_checkpoints").mkdir()
    for name in ("._room.csv", ".DS_Store", "area=hall/.ipynb_checkpoints/x.csv"):
        (tmp_path / name).write_bytes(b"\0")
    areas, _ = fire.file_areas(fire.parse_args(["--data", str(tmp_path)]))
    assert set(areas) == {"hall", "attic"}


def test_files_of_the_same_name_are_areas_of_their_own(tmp_path):
    for room in ("hall", "attic"):
        (tmp_path / room).mkdir()
        CLEAN.to_csv(tmp_path / room / "log.csv", index=False)
    areas, _ = fire.file_areas(fire.parse_args(["--data", str(tmp_path)]))
    assert set(areas) == {f"{tmp_path}/attic/log.csv", f"{tmp_path}/hall/log.csv"}


def test_files_in_the_split_by_files_are_recordings_of_one_area(tmp_path):
    for number in range(8):
        CLEAN.to_csv(tmp_path / f"fire{number}.csv", index=False)
    areas, _ = fire.file_areas(fire.parse_args(["--data", str(tmp_path), "--split", "files"]))
    assert list(areas["all"].recordings) == list(range(0, 24_000, 3000))


def test_a_column_can_tell_areas_apart(tmp_path):
    frame = pd.concat([CLEAN.assign(room=room, t=np.arange(3000)) for room in ("hall", "attic")]).sort_values("t")
    frame.drop(columns="t").to_csv(tmp_path / "a.csv", index=False)
    areas, _ = fire.file_areas(fire.parse_args(["--data", str(tmp_path), "--area-column", "room"]))
    np.testing.assert_allclose(areas["hall"].readings, CLEAN[["a", "b"]])


def stamped(times):
    return CLEAN.assign(date=times)


def test_times_make_gaps_and_steps(tmp_path):
    times = pd.date_range("2024-03-01", periods=3000, freq="10s").to_series()
    times.iloc[1000:] += pd.Timedelta("3h")
    texts = [times.dt.strftime(f"{form} %H:%M:%S") for form in ("%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%Y.%m.%d")]
    for column in (*texts, times.astype("int64") // 10**6):
        areas = sensors_of(stamped(column.to_numpy()), tmp_path / "a.csv")
        assert areas["a"].step == 10
        assert list(areas["a"].breaks[areas["a"].breaks > 0]) == [1000]


def test_digits_of_date_and_time_are_no_numbers(tmp_path):
    times = pd.date_range("2024-03-01", periods=3000, freq="min")
    for form in ("%Y%m%d%H%M%S", "%Y%m%d%H%M"):
        areas = sensors_of(CLEAN.assign(ts=times.strftime(form)), tmp_path / "a.csv")
        assert areas["a"].step == 60
        assert list(areas["a"].breaks) == [0]


def test_times_without_seconds_may_be_left_aside(tmp_path):
    times = pd.date_range("2024-03-01", periods=3000, freq="10s").strftime("%Y-%m-%d %H:%M")
    areas = sensors_of(stamped(times), tmp_path / "a.csv", "--time-column", "none")
    assert areas["a"].sensors == ["a", "b"]
    assert list(areas["a"].breaks) == [0]


def test_sensors_are_named(tmp_path, capsys):
    sensors_of(CLEAN.assign(changepoint=0), tmp_path / "a.csv")
    assert "sensors: a, b, changepoint" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_timestamps_need_no_usual_name(tmp_path, kind):
    times = pd.date_range("2024-03-01", periods=3000, freq="10s")
    frame = CLEAN.set_index(times.where(np.arange(3000) < 1000, times + pd.Timedelta("3h")))
    path = tmp_path / f"a.{kind}"
    fire.NOTES.clear()
    frame.to_csv(path) if kind == "csv" else frame.to_parquet(path)
    areas, _ = fire.file_areas(fire.parse_args(["--data", str(path)]))
    assert areas["a"].step == 10
    assert list(areas["a"].breaks) == [0, 1000]
    assert "rows 10 s apart; stretches without a gap: 2" in fire.NOTES[0]


def test_steps_of_an_hour_are_said_in_plain_seconds(tmp_path, capsys):
    sensors_of(stamped(pd.date_range("2024-03-01", periods=3000, freq="h")), tmp_path / "a.csv")
    assert "rows 3600 s apart" in capsys.readouterr().err


def test_files_without_a_normal_row_are_noted_as_recordings_that_their_area_gives_away(tmp_path, capsys):
    for number in range(3):
        CLEAN.assign(label=number).to_csv(tmp_path / f"r{number}.csv", index=False)
    fire.file_areas(fire.parse_args(["--data", str(tmp_path)]))
    assert "an area without a normal row" in capsys.readouterr().err
    fire.file_areas(fire.parse_args(["--data", str(tmp_path), "--split", "files"]))
    assert "an area without a normal row" not in capsys.readouterr().err


def test_recordings_are_in_order_of_time(tmp_path):
    (tmp_path / "area=hall").mkdir()
    times = pd.date_range("2024-03-01", periods=3000, freq="s")
    for number in range(12):  # part-10 comes before part-2 in the alphabet
        rows = slice(250 * number, 250 * number + 250)
        stamped(times)[rows].to_csv(tmp_path / f"area=hall/part-{number}.csv", index=False)
    areas, _ = fire.file_areas(fire.parse_args(["--data", str(tmp_path)]))
    assert areas["hall"].times.is_monotonic_increasing
    assert list(areas["hall"].recordings) == list(range(0, 3000, 250))
    np.testing.assert_array_equal(areas["hall"].readings, CLEAN[["a", "b"]])


def test_missing_values(tmp_path, capsys):
    frame = CLEAN.copy()
    frame.loc[::50, "a"] = -999
    assert not np.isnan(sensors_of(frame, tmp_path / "a.csv")["a"].readings).any()
    assert "column 'a': -999 in 60 rows is far from all other readings" in capsys.readouterr().err
    areas = sensors_of(frame, tmp_path / "a.csv", "--na-values", "-999")
    assert np.isnan(areas["a"].readings[::50, 0]).all()
    assert "far from" not in capsys.readouterr().err
    broken = frame.astype({"a": str}).replace("-999.0", "broken")
    broken.to_parquet(tmp_path / "a.parquet")
    areas, _ = fire.file_areas(fire.parse_args(["--data", str(tmp_path / "a.parquet"), "--na-values", "broken"]))
    assert np.isnan(areas["a"].readings[::50, 0]).all()
    areas = sensors_of(broken, tmp_path / "a.csv", "--na-values", "broken")
    assert np.isnan(areas["a"].readings[::50, 0]).all()


def bad_inputs(tmp_path):
    """{name: (arguments, words of the error)} for what can be wrong with input."""
    text = CLEAN.to_csv(index=False)

    def file(name, content, *argv):
        (tmp_path / name).write_text(content)
        return ["--data", tmp_path / name, *argv]

    times = pd.date_range("2024-10-27", periods=3000, freq="10s").to_series()
    back = times.where(np.arange(3000) < 1000, times - pd.Timedelta("1h")).to_numpy()
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    pa.parquet.write_table(pa.table({"a": ["x"] * 9, "label": [0] * 9}), tmp_path / "text.parquet")
    return {
        "missing": (["--data", tmp_path / "nowhere.csv"], ["nowhere.csv", "no such file"]),
        "empty folder": (["--data", tmp_path / "empty_folder"], ["empty_folder", "no .csv"]),
        "empty file": (file("empty.csv", ""), ["empty.csv"]),
        "header only": (file("header.csv", "time,a,label\n"), ["header.csv", "no rows"]),
        "no header": (file("bare.csv", text.split("\n", 1)[1]), ["bare.csv", "no column ['label']", "0.5"]),
        "text cell": (file("text.csv", text.replace("\n1.5,1.25,", "\n1.5,oops,", 1)),
                      ["text.csv", "row 2", "'b'", "'oops'"]),
        "ragged": (file("ragged.csv", text.replace("\n1.5,1.25,", "\n1.5,", 1)),
                   ["ragged.csv", "Expected 3 columns, got 2"]),
        "bad label": (file("label.csv", text.replace(",0\n", ",3\n", 1)),
                      ["row 1,", "'label'", "'3'", "no fire", "yes"]),
        "empty label": (file("nolabel.csv", text.replace(",0\n", ",\n", 1)), ["row 1,", "'label'"]),
        "no label column": (file("none.csv", text.replace("label", "alarm")), ["'label'", "a, b, alarm"]),
        "misspelt label": (file("ok.csv", text, "--label-column", "labl"), ["'labl'", "a, b, label"]),
        "no sensors": (file("few.csv", "label\n0\n2\n"), ["few.csv", "no sensor column"]),
        "no sensor chosen": (file("fine.csv", text, "--columns", "label"), ["fine.csv", "no sensor column"]),
        "few rows": (file("short.csv", text[: text.index("\n", 900)]), ["too few"]),
        "other classes later": (
            file("later.csv", "a,label\n" + "1,0\n2,1\n" * 1500 + "3,2\n" * 1280, "--split", "time"),
            ["too few", "fire"]),
        "one class": (file("one.csv", "a,label\n" + "1,0\n2,0\n" * 1500), ["too few", "normal"]),
        "shuffled": (file("order.csv", stamped(times[::-1].to_numpy()).to_csv(index=False)),
                     ["'date'", "row 2", "not later"]),
        "duplicate": (file("same.csv", stamped(times.to_numpy().repeat(2)[:3000]).to_csv(index=False)),
                      ["not later", "--area-column"]),
        "clock change": (file("clock.csv", stamped(back).to_csv(index=False)), ["clock change", "row 1001"]),
        "stations below each other": (
            file("stations.csv", pd.concat([CLEAN.assign(station=name, measured=times.to_numpy()) for name in "ab"])
                 .to_csv(index=False)), ["'measured'", "row 3001", "--area-column"]),
        "names in order": (file("names.csv", CLEAN.assign(station=np.repeat(list("abc"), 1000)).to_csv(index=False)),
                           ["'station'", "'a'", "--area-column"]),
        "no time": (file("when.csv", stamped("soon").to_csv(index=False)), ["when.csv", "'date'"]),
        "devices": (file("mixed.csv", CLEAN.assign(device_id=CLEAN["label"]).to_csv(index=False)),
                    ["'device_id'", "--area-column"]),
        "devices, as people write": (file("id.csv", CLEAN.assign(**{"Sensor ID": CLEAN["label"]}).to_csv(index=False)),
                                     ["'Sensor ID'", "--area-column"]),
        "torn parquet": (["--data", tmp_path / "torn.parquet"], ["torn.parquet"]),
        "text in parquet": (["--data", tmp_path / "text.parquet"], ["text.parquet", "row 1,", "'a'", "'x'"]),
        "nothing to resume": (["--resume"], ["no unfinished run"]),
        "resume another": (["--resume", "--epochs", "3"], ["no unfinished run"]),
    }


def test_every_error_is_one_line_with_exit_code_2(tmp_path, error_line):
    for name, (argv, words) in bad_inputs(tmp_path).items():
        line = error_line(fire, [*argv, "--output-dir", tmp_path / "outputs"])
        for word in words:
            assert word in line, (name, line)
    assert not list(tmp_path.glob("outputs/fire/run-*")), "a run that never began leaves nothing behind"


@pytest.mark.parametrize("argv, words", [
    (["--patch-len", "7"], ["--patch-len must divide --seq-len"]),
    (["--d-model", "30"], ["--d-model must be a multiple of 4"]),
    (["--epochs", "0"], ["--epochs: 0 is too small"]),
    (["--dropout", "x"], ["--dropout", "'x'"]),
    (["--dropout", "2"], ["--dropout must be"]),
    (["--learning-rate", "nan"], ["--learning-rate must be above 0"]),
    (["--seed", "-1"], ["--seed must be"]),
    (["--seed", str(2**32)], ["--seed must be"]),
    (["--epoch", "3"], ["--epoch"]),
    (["--device", "tpu"], ["'tpu'"]),
    (["--predict", "x.csv"], ["--checkpoint"]),
])
def test_a_wrong_argument_is_one_line(argv, words, error_line):
    line = error_line(fire, argv)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(("words", "noise"), [
    ([], 0.2), (["--baseline-seconds", "0"], 0), (["--baseline-seconds", "0", "--gain-noise", "0.3"], 0.3)])
def test_gains_vary_by_default_only_where_readings_are_relative_to_a_baseline(
        folder, tmp_path, monkeypatch, words, noise):
    noises = []

    def stop(readings, noise):
        noises.append(noise)
        raise KeyboardInterrupt

    monkeypatch.setattr(fire, "vary_gains", stop)
    with pytest.raises(SystemExit):
        fire.main(["--data", str(folder), "--output-dir", str(tmp_path), *SMALL, *words])
    assert noises == [noise]


def test_a_loss_that_is_not_finite_is_an_error(tmp_path, error_line):
    assert "--learning-rate" in error_line(fire, [*SMALL, "--learning-rate", "1e30", "--output-dir", tmp_path])


def test_an_output_folder_that_cannot_be_written(tmp_path, error_line):
    (tmp_path / "file").write_text("")
    assert "file" in error_line(fire, ["--output-dir", tmp_path / "file", *SMALL])


# --- Models -----------------------------------------------------------------------------------------------------------


def test_exact_parameter_count():
    assert sum(weight.numel() for weight in fire.OptimizedFireTransformer().parameters()) == 621_316


def test_the_original_model_is_one_flag_away():
    _, info = load("--sample-per-area", "4000")
    model = fire.make_model(vars(fire.parse_args(["--original-model"])), info)
    assert sum(weight.numel() for weight in model.parameters()) == 621_316


def test_the_last_token_layer_gives_what_the_whole_layer_gives():
    torch.manual_seed(0)
    layer = {"d_model": 16, "nhead": 2, "dim_feedforward": 64, "activation": "gelu", "batch_first": True,
             "norm_first": True}
    whole, last = torch.nn.TransformerEncoderLayer(**layer).eval(), fire.LastTokenLayer(**layer).eval()
    last.load_state_dict(whole.state_dict())
    x = torch.randn(4, 12, 16)
    torch.testing.assert_close(last(x), whole(x)[:, -1], atol=1e-5, rtol=1e-4)


def test_a_missing_reading_counts_as_the_mean():
    model, area = fire.OptimizedFireTransformer().eval(), torch.tensor([0, 1, 4, 2])
    x = torch.randn(4, 60, 6)
    missing = x.clone()
    missing[:, 3] = float("nan")
    x[:, 3] = 0
    torch.testing.assert_close(model(missing, area)[0], model(x, area)[0])


def test_the_risk_is_between_0_and_100():
    _, risk = fire.OptimizedFireTransformer().eval()(100 * torch.randn(4, 60, 6), torch.tensor([0, 1, 4, 2]))
    assert ((risk >= 0) & (risk <= 100)).all()


def test_window_statistics_against_numpy():
    x = torch.randn(50, 60, 3, dtype=torch.float64)
    x[torch.rand(x.shape) < 0.1] = float("nan")
    x[0, :, 1] = float("nan")
    for row, window in zip(fire.window_statistics(x.float()), x.numpy()):
        missing = np.isnan(window).mean(axis=0)
        window[:, missing == 1] = 0
        window = np.where(np.isnan(window), np.nanmean(window, axis=0), window)
        slope = 59 * np.polyfit(np.arange(60), window, 1)[0]
        step = np.abs(np.diff(window, axis=0)).mean(axis=0)
        plain = [window.mean(0), window.std(0, ddof=1), window.min(0), window.max(0), window[-1], slope, step, missing]
        np.testing.assert_allclose(row, np.concatenate(plain), atol=1e-4)


def test_majority_vote_against_a_plain_count(monkeypatch):
    votes = np.array(np.meshgrid(*[range(3)] * 4)).reshape(4, -1)  # all 81 ways in which four models can vote
    logits = torch.nn.functional.one_hot(torch.tensor(votes[0]))
    monkeypatch.setattr(fire, "predict", lambda *_: (logits, logits))
    monkeypatch.setattr(fire, "window_features", lambda *_: (None, None))
    trees = {name: SimpleNamespace(predict=lambda _, vote=vote: vote) for name, vote in zip(fire.VOTERS[1:], votes[1:])}
    starts = torch.arange(81)
    answers = fire.classify(None, trees, SimpleNamespace(oracle=-torch.ones(81), seq_len=1), starts)
    for ballot, answer in zip(votes.T.tolist(), answers["ensemble"]):
        most = max(map(ballot.count, ballot))
        assert answer == max(c for c in ballot if ballot.count(c) == most)


def test_the_rule_finds_the_limits_of_smoke_times_co():
    rng = np.random.default_rng(0)
    means = rng.uniform(-1, 3, (900, 2))
    classes = np.digitize(means.clip(0).prod(axis=1), [1, 4])
    features = np.column_stack([means, np.ones(900)])
    train, test = (features[:600], classes[:600]), features[600:]
    area = {"sensors": ["smoke_pct_m", "co_ppm"], "columns": [0, 1]}
    assert np.mean(fire.smoke_times_co(train, test, {"hall": area}) == classes[600:]) > 0.98
    area = {"sensors": ["smoke_pct_m", "co2_ppm"], "columns": [0, 1]}
    assert (fire.smoke_times_co(train, test, {"hall": area}) == -1).all()


# --- Evaluation -------------------------------------------------------------------------------------------------------


def test_detection_delay_by_hand(monkeypatch):
    labels = np.zeros(600, np.int8)
    labels[20:40] = labels[100:150] = labels[300:350] = labels[570:] = 2  # at the start, two whole ones, cut off
    segments = {"test": [(30, 590)]}
    data = fire.Data(None, torch.tensor(labels), torch.zeros(600, dtype=torch.int16), None, segments, seq_len=20)

    def classify(model, baselines, data, starts):
        rows = starts + 19
        return pd.DataFrame({"early": 2 * (rows >= 100), "late": 2 * ((rows >= 120) & (rows < 200))})

    monkeypatch.setattr(fire, "classify", classify)
    table = fire.detection_delays(None, None, data, {"areas": {"hall": {"step": 10.0}}})
    assert table.loc["early"].tolist() == [100, 0]
    assert table.loc["late"].tolist() == [50, 200]  # in seconds, not rows


def test_metrics_by_hand():
    true = np.array([0, 0, 0, 1, 1, 2, 2, 2, 0])
    answers = pd.DataFrame({"model": [0, 0, 2, 1, 0, 2, 2, 1, -1]})
    table, by_area, scores = fire.score_answers(answers, true, pd.Series(["a"] * 5 + ["b"] * 4))
    assert table.loc["model", "accuracy %"] == 100 * 5 / 8
    assert table.loc["model", "false alarms %"] == 100 / 5
    assert table.loc["model", "missed fire %"] == pytest.approx(100 / 3)
    assert scores["model"]["warning"]["precision"] == 0.5
    assert by_area["model"].to_dict() == pytest.approx({"a": 60, "b": 200 / 3})
    assert scores["model"]["confusion_matrix"].tolist() == [[2, 0, 1], [1, 1, 0], [0, 1, 2]]


# --- The whole program ------------------------------------------------------------------------------------------------


def test_a_run_writes_everything(finished):
    run_dir, _ = finished
    assert {path.name for path in run_dir.iterdir()} == PICTURES | {
        "arguments.json", "results.json", "summary.md", "checkpoint.pt", "transformer.pt", "trees.joblib"}


def test_results_agree_with_themselves(finished):
    run_dir, results = finished
    assert json.loads((run_dir / "results.json").read_text()) == results
    assert set(results["models"]) == {*fire.VOTERS, "ensemble", "logistic regression", "majority class",
                                      "smoke × CO rule"}  # no oracle
    windows = results["data"]["windows"]["test"]
    for row in results["table"]:
        matrix = np.array(results["models"][row["model"]]["confusion_matrix"])
        assert row["accuracy %"] == pytest.approx(100 * np.trace(matrix) / matrix.sum(), abs=0.01)
        assert matrix.sum(axis=1).tolist() == windows or row["model"] == "smoke × CO rule"


def test_results_say_what_made_them(finished):
    _, results = finished
    assert results["changed_arguments"]["seq_len"] == 30
    assert "dropout" not in results["changed_arguments"]
    assert len(results["script_sha256"]) == 64
    assert results["git_clean"] in (True, False, None)


def test_the_summary_has_arguments_notes_tables_and_the_answer(finished):
    run_dir, results = finished
    summary = (run_dir / "summary.md").read_text()
    assert summary.startswith("# fire.py ")
    assert "seq_len=30" in summary.splitlines()[0]
    assert all(f"Note: {note}" in summary for note in results["notes"])
    assert all(name in summary for name in results["models"])
    assert "The transformer classifies" in summary
    assert "\n| area | " in summary  # a row for each area: hundreds of them are no wider than two


@pytest.mark.parametrize("tested, said", [([20, 0, 0], True), ([20, 3, 0], False)])
def test_the_answer_says_that_a_test_part_of_one_class_compares_no_models(finished, tested, said):
    _, results = finished
    table = pd.DataFrame(results["table"]).set_index("model")
    data = results["data"] | {"windows": {"test": tested}}
    summary = fire.format_summary(results | {"data": data}, table, pd.DataFrame(results["areas"]).T)
    answer = summary[summary.index("The transformer classifies") :]
    assert ("of one class" in answer) == said


def test_a_thousand_areas_fit_on_a_picture(monkeypatch, tmp_path):
    sizes = []
    monkeypatch.setattr(fire, "save_figure", lambda fig, path: sizes.append(max(fig.get_size_inches() * fig.dpi)))
    by_area = pd.DataFrame({"transformer": 90.0}, range(1000))
    scores = {name: {"confusion_matrix": np.eye(3)} for name in ("transformer", "ensemble")}
    fire.plot_models(pd.DataFrame({"accuracy %": [90.0]}, ["transformer"]), by_area, scores, tmp_path)
    assert max(sizes) < 2**16  # pixels, matplotlib's limit


def weights_of(run_dir):
    """Weights of the last epoch, their moving average, and the best ones."""
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    return {f"{kind} {name}": weight for kind, weights in (("last", state["model"]), ("average", state["average"]),
            ("best", state["best"]["model"])) for name, weight in weights.items()}


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path, error_line):
    argv = [*SMALL, "--epochs", "4"]
    whole = fire.main([*argv, "--output-dir", str(tmp_path / "whole")])
    run_dir = tmp_path / "killed/fire/run-001"
    kill_when("fire.py", [*argv, "--output-dir", tmp_path / "killed"], run_dir / "checkpoint.pt", tmp_path)
    before = torch.load(run_dir / "checkpoint.pt", weights_only=True)["stages"]
    results = fire.main(["--resume", str(run_dir)])
    assert len(results["history"]) == 4
    assert results["models"] == whole["models"]
    assert results["stages"][: len(before)] == before  # the time of the killed process counts
    for name, weight in weights_of(tmp_path / "whole/fire/run-001").items():
        assert torch.equal(weight, weights_of(run_dir)[name]), name
    assert "no unfinished run" in error_line(fire, ["--resume", run_dir])


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fire, "plot_dashboard", interrupt)
    with pytest.raises(SystemExit) as stopped:
        fire.main(["--output-dir", str(tmp_path), *SMALL])
    assert stopped.value.code == 130
    assert f"python fire.py --resume --output-dir {tmp_path}" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_what_does_not_fit(folder, tmp_path, monkeypatch, error_line):
    copy = tmp_path / "basement_copy.csv"
    copy.write_bytes((folder / "basement_data_cleaned.csv").read_bytes())
    output = ["--output-dir", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(fire, "plot_dashboard", lambda *_: (_ for _ in ()).throw(fire.UserError("stop")))
        error_line(fire, ["--data", copy, *output, *SMALL])
    checkpoint = tmp_path / "out/fire/run-001/checkpoint.pt"
    whole = checkpoint.read_bytes()
    assert "leave out --epochs" in error_line(fire, ["--resume", "--epochs", "3", *output])
    monkeypatch.setattr(fire, "WORLD_SIZE", 3)
    monkeypatch.setattr(fire, "join_processes", lambda args: args)
    assert "began with 1 processes" in error_line(fire, ["--resume", *output])
    monkeypatch.setattr(fire, "WORLD_SIZE", 1)
    for damaged in (whole[:5000], b"no checkpoint"):
        checkpoint.write_bytes(damaged)
        line = error_line(fire, ["--resume", *output])
        assert "damaged" in line
        assert "weights_only" not in line
    checkpoint.write_bytes(whole)
    frame = pd.read_csv(copy)
    frame.loc[7, "co_ppm"] = 9
    frame.to_csv(copy, index=False)
    assert "other data" in error_line(fire, ["--resume", *output])


def test_several_runs_give_mean_and_interval_and_go_on_where_they_stopped(folder, tmp_path):
    argv = ["--data", str(folder), "--output-dir", str(tmp_path), *SMALL, "--runs", "2", "--seed", "5"]
    results = fire.main(argv)
    top = tmp_path / "fire/run-001"
    runs = [json.loads((top / f"seed-{seed}/results.json").read_text()) for seed in (5, 6)]
    for row in results["table"]:
        values = [other["accuracy %"] for run in runs for other in run["table"] if other["model"] == row["model"]]
        mean, width = np.mean(values), 12.706 * np.std(values, ddof=1) / np.sqrt(2)  # Student's t with one degree
        assert [float(x) for x in row["accuracy %"].split(" ± ")] == pytest.approx([mean, width], abs=0.1)
    assert "paired t-test" in (top / "summary.md").read_text()
    written = (top / "seed-5/results.json").stat().st_mtime_ns
    for name in ("results.json", "seed-6/results.json"):  # as if killed in the second seed
        (top / name).unlink()
    again = fire.main(["--resume", "--output-dir", str(tmp_path)])
    assert [row["accuracy %"] for row in again["table"]] == [row["accuracy %"] for row in results["table"]]
    assert (top / "seed-5/results.json").stat().st_mtime_ns == written
    assert again["notes"] == results["notes"] == list(dict.fromkeys(runs[0]["notes"] + runs[1]["notes"]))


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


def test_s3_gives_the_same_data_as_the_folder(s3, folder):
    (_, here), (_, there) = (load("--data", address) for address in (folder, "s3://areas/data"))
    assert here["hash"] == there["hash"]
    assert [file["sha256"] for file in here["files"]] == [file["sha256"] for file in there["files"]]
    assert there["files"][0]["path"] == "s3://areas/data/basement_data_cleaned.csv"


def test_s3_errors(s3, finished, tmp_path, error_line):
    s3.client.create_dir("areas/empty")
    output = ["--output-dir", tmp_path]
    for address, word in (("s3://nowhere/data", "no such file, folder or bucket"), ("s3://areas/dat", "no such file"),
                          ("s3://areas/empty", "no .csv")):
        line = error_line(fire, ["--data", address, *output])
        assert address in line
        assert word in line
    with pytest.raises(OSError, match="bucket does not exist"):
        fire.save_version(finished[0], "s3://nowhere/models")


def whole_versions(address, run_dir):
    """Names of the versions under `address` that have metadata, whose models must be those of the run."""
    filesystem, root = fire.open_address(address)
    names = []
    for info in filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True)):
        if info.base_name == "metadata.json":
            names.append(Path(info.path).parent.name)
            json.loads(bytes(fire.read_bytes(f"{address}/{names[-1]}/metadata.json")))
            for name in ("transformer.pt", "trees.joblib"):
                assert bytes(fire.read_bytes(f"{address}/{names[-1]}/{name}")) == (run_dir / name).read_bytes()
            assert len(fire.read_bytes(f"{address}/{names[-1]}/summary.md")) > 0
    return sorted(names)


def test_the_same_command_gives_the_same_numbers_a_new_folder_and_a_saved_version(finished, folder, s3):
    run_dir, results = finished
    again = fire.main(["--data", str(folder), "--output-dir", str(run_dir.parents[1]), *SMALL, "--save-to",
                       "s3://areas/again"])
    assert again["models"] == results["models"]
    assert (run_dir.parent / "run-002/results.json").exists()
    version = Path(again["saved_to"]).name
    assert whole_versions("s3://areas/again", run_dir.parent / "run-002") == [version]
    metadata = json.loads(bytes(fire.read_bytes(f"{again['saved_to']}/metadata.json")))
    assert metadata["models"] == again["models"]
    assert metadata == json.loads((run_dir.parent / "run-002/results.json").read_text())


def test_each_save_is_a_new_version(finished, models):
    run_dir, _ = finished
    versions = [Path(fire.save_version(run_dir, models)).name for _ in range(2)]
    assert whole_versions(models, run_dir) == sorted(versions)


def test_results_are_safe_where_the_models_cannot_be_copied(folder, tmp_path, monkeypatch, error_line):
    (tmp_path / "file").write_text("")
    for name in ("plot_data", "plot_training", "plot_models"):
        monkeypatch.setattr(fire, name, lambda *_: None)
    error_line(fire, ["--data", folder, *SMALL, "--save-to", tmp_path / "file", "--output-dir", tmp_path])
    assert (tmp_path / "fire/run-001/results.json").exists()


def test_an_upload_that_breaks_off_anywhere_does_not_look_complete(finished, s3):
    run_dir, _ = finished
    for writes in range(100):
        s3.writes = writes
        try:
            fire.save_version(run_dir, "s3://areas/broken")
            break
        except OSError:
            pass
        finally:
            s3.writes = math.inf
            whole_versions("s3://areas/broken", run_dir)  # which reads all that looks complete
    assert writes > 5


def test_prediction_equals_evaluation_on_the_same_windows(finished, folder, tmp_path):
    data, _ = load("--data", folder, *SMALL)
    checkpoint = finished[0] / "transformer.pt"
    frame = pd.read_csv(folder / "basement_data_cleaned.csv")
    frame[frame.columns[::-1]].assign(extra=1).to_csv(tmp_path / "basement_new.csv", index=False)
    results = fire.main(["--predict", str(tmp_path / "basement_new.csv"), "--checkpoint", str(checkpoint),
                         "--output-dir", str(tmp_path), "--stride", "1"])
    answers = pd.read_csv(tmp_path / "fire/run-001/predictions.csv")
    assert results["windows"] == len(answers) == 5971
    for name in fire.CLASSES:
        assert results["counts"][name] == (answers["class"] == name).sum()

    model, _, _ = fire.load_transformer(str(checkpoint))
    starts = data.starts("test", 30)
    starts = starts[data.areas[starts] == 0]  # the first area: rows of the file are rows of the data
    logits, risk = fire.predict(model, data, starts)
    rows = answers.iloc[starts.numpy()]
    assert [fire.CLASSES[c] for c in logits.argmax(1)] == list(rows["class"])
    np.testing.assert_allclose(rows[fire.CLASSES], logits.softmax(1), atol=0.02)
    np.testing.assert_allclose(rows["risk"], risk, atol=1)
    assert answers["first row"][0] == 1
    assert answers["last row"].iloc[-1] == 6000
    assert str(answers["time"][7]) == "2024-01-01 00:00:36"  # of the last row of the eighth window


def test_a_window_without_any_reading_has_no_class_and_none_straddles_a_gap(finished, tmp_path):
    frame = area_frame(rows=400)
    frame.loc[100:, list(fire.SENSORS["basement"])] = np.nan
    frame.loc[200:, "timestamp"] += pd.Timedelta("1h")
    frame.to_csv(tmp_path / "basement.csv", index=False)
    results = fire.main(["--predict", str(tmp_path / "basement.csv"), "--checkpoint",
                         str(finished[0] / "transformer.pt"), "--stride", "1", "--output-dir", str(tmp_path)])
    answers = pd.read_csv(tmp_path / "fire/run-001/predictions.csv")
    empty = answers["first row"] > 100
    assert results["counts"]["no class"] == empty.sum()
    assert list(results["counts"]) == [*fire.CLASSES, "no class"]
    assert answers.loc[empty, ["class", "normal", "risk"]].isna().all(axis=None)
    assert answers.loc[~empty, ["class", "normal", "risk"]].notna().all(axis=None)
    assert not ((answers["first row"] <= 200) & (answers["last row"] > 200)).any()


def test_new_readings_at_another_rate_are_noted(finished, tmp_path, capsys):
    frame = area_frame(rows=100)
    frame["timestamp"] = pd.date_range("2024-01-01", periods=100, freq="2s")
    frame.to_csv(tmp_path / "basement.csv", index=False)
    fire.main(["--predict", str(tmp_path / "basement.csv"), "--checkpoint", str(finished[0] / "transformer.pt"),
               "--output-dir", str(tmp_path)])
    assert "a row is 2 s, in training it was 1 s" in capsys.readouterr().err


def test_new_readings_without_times_are_as_far_apart_as_in_training(finished, tmp_path, capsys):
    checkpoint = torch.load(finished[0] / "transformer.pt")
    checkpoint["data"]["areas"]["basement"]["step"] = 10.0
    torch.save(checkpoint, tmp_path / "transformer.pt")
    frame = area_frame(rows=3000).assign(timestamp=pd.date_range("2024-01-01", periods=3000, freq="10s"))
    answers = []
    for columns in (frame.columns, frame.columns.drop("timestamp")):
        frame[columns].to_csv(tmp_path / "basement.csv", index=False)
        fire.main(["--predict", str(tmp_path / "basement.csv"), "--checkpoint", str(tmp_path / "transformer.pt"),
                   "--output-dir", str(tmp_path)])
        answers.append(pd.read_csv(max(tmp_path.glob("fire/*/predictions.csv"))))
    pd.testing.assert_frame_equal(answers[0].drop(columns="time"), answers[1])
    assert "in training it was" not in capsys.readouterr().err


def test_prediction_errors(finished, tmp_path, error_line):
    checkpoint = finished[0] / "checkpoint.pt"
    good = "temperature_c,humidity_pct,co_ppm,smoke_pct_m,methane_ppm,co2_ppm\n" + "1,2,3,4,5,6\n" * 40
    texts = {"basement": good, "cellar": good, "basement_short": good[: 66 + 12 * 11],
             "basement_once": "timestamp,temperature_c,humidity_pct,co_ppm,smoke_pct_m,methane_ppm,co2_ppm\n"
             "2024-03-01 10:00:00,1,2,3,4,5,6\n",
             "basement_less": good.replace("co_ppm", "co"), "basement_text": good[:-2] + "x\n",
             "basement_rooms": good.replace("\n", ",hall\n").replace("hall", "room", 1).replace("hall", "attic", 9)}
    for name, text in texts.items():
        (tmp_path / f"{name}.csv").write_text(text)
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    trained = torch.load(finished[0] / "transformer.pt")
    trained["arguments"]["area_column"] = "wing"
    torch.save(trained, tmp_path / "wings.pt")
    (tmp_path / "basement_wings.csv").write_text((tmp_path / "basement_rooms.csv").read_text().replace("room", "wing"))
    output = ["--output-dir", tmp_path / "outputs"]
    for name, ckpt, words in (("cellar.csv", checkpoint, ["'cellar'", "--area", "basement, voc"]),
                              ("basement_short.csv", checkpoint, ["30 rows"]),
                              ("basement_once.csv", checkpoint, ["30 rows"]),
                              ("basement_less.csv", checkpoint, ["co_ppm"]),
                              ("basement_rooms.csv", checkpoint, ["devices or rooms"]),
                              ("basement_wings.csv", tmp_path / "wings.pt", ["'wing'", "devices or rooms"]),
                              ("basement_text.csv", checkpoint, ["row 40", "'co2_ppm'", "not a number"]),
                              ("nowhere.csv", checkpoint, ["nowhere.csv"]),
                              ("basement.csv", tmp_path / "nowhere.pt", ["nowhere.pt"]),
                              ("basement.csv", tmp_path / "basement.csv", ["basement.csv", "not a checkpoint"]),
                              ("basement.csv", tmp_path / "foreign.pt", ["foreign.pt", "not a checkpoint"])):
        line = error_line(fire, ["--predict", tmp_path / name, "--checkpoint", ckpt, *output])
        assert all(word in line for word in words), line
    assert not list(tmp_path.rglob("predictions.csv"))


def test_compared_runs_name_what_differs_and_other_data(finished, tmp_path, error_line):
    run_dir, results = finished
    arguments = results["arguments"] | {"d_model": 64, "time_column": "utc"}
    other = results | {"arguments": arguments, "data": results["data"] | {"hash": "0"}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    output = ["--output-dir", str(tmp_path)]
    table = fire.main(["--compare", str(run_dir / "results.json"), str(tmp_path / "other.json"), "--price-per-hour",
                       "3600", *output])["table"]
    seconds = sum(row["training s"] or 0 for row in results["table"])
    assert table[0]["differs in"] == "--time-column None --d-model 16"
    assert "OTHER DATA" in table[1]["run"]
    assert "OTHER DATA" not in table[0]["run"]
    assert table[0]["transformer"] == next(r["accuracy %"] for r in results["table"] if r["model"] == "transformer")
    assert table[0]["cost $"] == pytest.approx(seconds, abs=0.5)
    assert table[2]["cost $"] == pytest.approx(43 * 3.825, abs=0.01)
    assert (tmp_path / "fire/run-001/cost_comparison.png").exists()
    rows = [*results["table"], {"model": "oracle", "accuracy %": 99.0, "training s": None}]
    (tmp_path / "oracle.json").write_text(json.dumps(results | {"table": rows}))
    table = fire.main(["--compare", str(run_dir / "results.json"), str(tmp_path / "oracle.json"), *output])["table"]
    assert list(table[0])[2:4] == ["training h", results["table"][0]["model"]]
    assert list(table[0])[-4:] == ["oracle", "differs in", "$ per h", "cost $"]
    (tmp_path / "wrong.json").write_text("[1]")
    assert "finished" in error_line(fire, ["--compare", tmp_path / "wrong.json", *output])


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", ROOT / "fire.py"]


def test_two_processes_train_as_one_and_the_first_alone_writes(folder, tmp_path):
    argv = ["--data", str(folder), *SMALL, "--dropout", "0", "--gain-noise", "0", "--output-dir"]
    one = fire.main([*argv, str(tmp_path / "one")])
    done = subprocess.run([*TORCHRUN, *argv, "two"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Everything is in") == 1
    assert done.stderr.count("epoch 2: train_loss") == 1
    assert [path.name for path in (tmp_path / "two/fire").iterdir()] == ["run-001"]
    two = json.loads((tmp_path / "two/fire/run-001/results.json").read_text())
    assert two["data"] == one["data"]
    for first, second in zip(one["history"], two["history"]):
        assert second["val_loss"] == pytest.approx(first["val_loss"], abs=1e-3)  # the rounding of bfloat16


def run_two_processes(script, argv, cwd):
    """Run a script in two processes, as torchrun starts them; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                                "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([sys.executable, script, *argv], cwd=cwd, env=environment | {"RANK": rank},
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for rank in "01"]
    return [process.wait() for process in processes]


def test_a_killed_run_of_two_processes_ends_as_one_that_was_not(folder, tmp_path):
    argv = ["--data", str(folder), *SMALL, "--output-dir"]
    text = (ROOT / "fire.py").read_text().replace("    if RANK > 0:\n        return None", "    return None")
    train, stop = tmp_path / "train.py", tmp_path / "stop.py"
    train.write_text(text)  # the same script, but it ends after training
    stop.write_text(text.replace("average.update_parameters(model)\n", "average.update_parameters(model)\n"
                                 "            if epoch == 2: os._exit(1)\n"))
    assert run_two_processes(train, [*argv, "whole"], tmp_path) == [0, 0]
    assert run_two_processes(stop, [*argv, "killed"], tmp_path) == [1, 1]
    assert run_two_processes(train, ["--resume", "--output-dir", "killed"], tmp_path) == [0, 0]
    for name, weight in weights_of(tmp_path / "whole/fire/run-001").items():
        assert torch.equal(weight, weights_of(tmp_path / "killed/fire/run-001")[name]), name


def test_pasted_into_a_notebook_in_an_empty_folder(tmp_path):
    script = (ROOT / "fire.py").read_text()
    for default, small in (("300_000", "3_000"), ("128", "16"), ("100", "5"), ("20", "3")):
        assert f"default={default}," in script or f"default={default}, help" in script
        script = script.replace(f"default={default},", f"default={small},")  # main() is called as it is
    outputs = run_notebook(["%%writefile common.py\n" + (ROOT / "common.py").read_text(), script], tmp_path)
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 8  # the dashboard is redrawn in place
    assert any("text/markdown" in output.get("data", {}) for output in outputs)
    assert {path.name for path in (tmp_path / "outputs/fire/run-001").iterdir()} > PICTURES


def test_quick_is_small_and_what_is_given_counts():
    assert fire.parse_args(["--quick"]).sample_per_area == 30_000
    assert fire.parse_args(["--quick", "--epochs", "7"]).epochs == 7


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        fire.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert "(default: 0.1)" in text


@pytest.mark.skipif(not SMOKE.exists(), reason="the real smoke-detector file is not beside the checkout")
def test_the_real_smoke_file(capsys):
    data, info = load("--data", SMOKE, "--label-column", "Fire Alarm")
    notes = capsys.readouterr().err
    assert "left out ['Unnamed: 0']" in notes
    assert "optimistic" in notes
    assert info["areas"]["smoke"]["sensors"] == ["Temperature[C]", "Humidity[%]", "eCO2[ppm]"]
    assert info["baseline_seconds"] == 0
    assert set(data.labels.unique().tolist()) == {0, 2}  # 0 and 1 are normal and fire


def test_a_sensor_that_the_first_recording_lacks_is_named():
    first = pd.DataFrame({"co": np.arange(5.0) % 2, "label": 0})
    second = first.assign(smoke=1.0)
    fire.NOTES.clear()
    area = fire.read_area({"a.csv": first, "b.csv": second}, fire.parse_args([]))
    assert area.sensors == ["co"]
    assert "columns ['smoke'] are not in the first file" in fire.NOTES[0]
