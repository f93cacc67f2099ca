"""What users of forecast.py rely on: offline, on the CPU, on short series."""

import gzip
import hashlib
import http.client
import http.server
import io
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import unittest.mock
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED
from sklearn.linear_model import RidgeCV
from torch import nn

import forecast
from forecast import Run

SMALL = ["--epochs", "1", "--time-steps", "16", "--learning-rate", "1e-3", "--jobs", "1", "--device", "cpu"]
HOURS = pd.date_range("2024-01-01", periods=400, freq="h")
WAVE = np.sin(np.arange(400) / 5).round(4)


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    """Each test in a folder of its own, with an address for the data that nobody answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forecast, "URL", "http://127.0.0.1:9/")
    monkeypatch.setattr(forecast, "NOTES", [])
    with unittest.mock.patch.dict(os.environ):  # dask sets OMP_NUM_THREADS here, too
        yield


@pytest.fixture
def without_pictures(monkeypatch):
    """Saves seconds where pictures are not the subject."""
    monkeypatch.setattr(forecast, "draw_pictures", lambda *_: None)


def run_small(*argv):
    return forecast.main(["--dataset", "synthetic", *SMALL, *argv])


def network(model, *argv, time_steps=112):
    """An untrained network with the original's options, where argv does not say otherwise."""
    args = forecast.parse_args(list(argv))
    torch.manual_seed(0)
    run = Run(model, "synthetic", time_steps, 1e-3, args.d_model[0], args.pe[0])
    return forecast.MODELS[model](run, args).eval()


def fit(model, values, *argv, time_steps=16, stop=None):
    args = forecast.parse_args(["--epochs", "1", "--device", "cpu", *argv])
    run = Run(model, "synthetic", time_steps, 1e-3, 64)
    return forecast.fit(run, args, values, stop or len(values))[0]


def widths_of(errors):
    return {"free run": forecast.free_run_widths(errors["free run"][:-1]),
            "one step": forecast.one_step_widths(errors["one step"])}


def score_holdout(run, args, values):
    """(scores, errors of the test part, widths of the intervals) of a run in the hold-out."""
    errors, _, _ = forecast.holdout(run, args, values)
    widths = widths_of(errors)
    return forecast.holdout_scores(errors, widths, values), {kind: errors[kind][-1] for kind in errors}, widths


def series_of(path, *argv):
    return forecast.read_series(forecast.parse_args(["--data", str(path), *argv]))


# --- Models -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "name", "parameters"), [  # counted by hand from the layers
    ("lstm", "lstm-1-64-2-1", 4 * 64 * (1 + 64 + 2) + 4 * 64 * (64 + 64 + 2) + 65),
    ("att", "att-64-1-1-512-is_inln-is_qln-is_kln-is_causal-sinpe", 128 + 3 * 64 * 64 + 3 * 128 + 64),
    ("att_mh", "att_mh-64-8-1-1-1-512-is_kln-is_causal-sinpe", 128 + 64 * 64 + 2 * 64 * 8 + 16 + 64),
    ("vq", "vq-64-64-1-1-512-is_causal-randpe", 128 + 512 * 64 + 64 * 64 + 65),
    ("vq_mh", "vq_mh-64-64-8-4-1-1-512-is_inln-is_n_pe-rope", 128 + 128 + 4 * 64 * 8 + 65),
])
def test_names_and_sizes_are_those_of_the_original(model, name, parameters):
    net = network(model)
    assert net.name == name
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters


@pytest.mark.parametrize("model", ["att", "att_mh"])
@pytest.mark.parametrize("pe", [["sinpe"], ["rope"], ["rope", "--norm-pe"]])
def test_a_later_value_changes_no_earlier_forecast(model, pe):
    net, x = network(model, "--pe", *pe), torch.randn(2, 70)
    changed = x.clone()
    changed[:, 41] += 1
    before, after = net(x), net(changed)
    torch.testing.assert_close(before[:, :41], after[:, :41])
    assert not torch.allclose(before[:, 41:], after[:, 41:])
    torch.testing.assert_close(net.predict(x, None), before[:, -1:])


@pytest.mark.parametrize("model", ["vq", "vq_mh"])
def test_the_codebook_models_of_the_original_see_the_last_value_only(model):
    net, x = network(model), torch.randn(2, 70)
    changed = x.clone()
    changed[:, :-1] += 1
    torch.testing.assert_close(net.predict(x, None), net.predict(changed, None))
    assert not torch.allclose(net(x), net(x.flip(1)))


def test_att_starts_with_the_smaller_weights_of_a_joint_projection():
    joint, separate = (network(model).fc_q.weight.abs().max() for model in ("att", "att_mh"))
    assert joint < (6 / (64 + 3 * 64)) ** 0.5
    assert separate > (6 / (64 + 3 * 64)) ** 0.5


def test_vq_ar_looks_back_and_starts_as_ridge_regression():
    net, x = network("vq_ar", time_steps=24), torch.randn(200, 32)
    x[:, 24] += x[:, :5].sum(1)  # the other seven are noise, and need more shrinkage
    net.start(x)
    last = x[:, 23:24]
    ridge = RidgeCV(forecast.RIDGE_STRENGTHS, alpha_per_target=True).fit(x[:, :24] - last, x[:, 24:] - last)
    assert ridge.alpha_[0] < ridge.alpha_[1]
    expected = torch.from_numpy(ridge.predict((x[:, :24] - last).numpy())).float() + last
    torch.testing.assert_close(net.predict(x[:, :24], None), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("flag", ["inln", "qln", "kln", "causal", "norm-pe"])
def test_each_flag_changes_the_forecasts_and_the_name(flag):
    x = torch.randn(2, 40)
    with_it, without = (network("att_mh", f"--{prefix}{flag}", "--no-align-target") for prefix in ("", "no-"))
    assert with_it.name != without.name
    assert not torch.allclose(with_it(x), without(x), atol=1e-5)


def test_rope_depends_on_the_distance_only():
    rope = forecast.Positions("rope", 8, 64)
    q, k = torch.randn(8), torch.randn(8)
    scores = rope(q.expand(64, 8)) @ rope(k.expand(64, 8)).T  # [query, key]
    torch.testing.assert_close(scores[5:, 5:], scores[:-5, :-5])
    assert not torch.allclose(scores[0, :-5], scores[0, 5:])


def test_grouped_queries_are_attention_with_repeated_key_heads():
    net, x = network("att_mh", "--kv-heads", "2", "--pe", "none"), torch.randn(3, 50)
    hidden = net.fc_in(x.unsqueeze(-1))
    q, k, v = (net.split_heads(layer(hidden)) for layer in (net.fc_q, net.fc_k, net.fc_v))
    k = net.ln_k(k)
    heads = F.scaled_dot_product_attention(q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1), is_causal=True)
    expected = net.fc_out(heads.transpose(1, 2).flatten(2)).squeeze(-1)
    torch.testing.assert_close(net(x), expected)


def test_the_aligned_loss_is_the_mean_over_every_step():
    net = network("att", time_steps=5)
    window = torch.tensor([[1.0, -2.0, 3.0, 0.5, 4.0, -1.0]])
    errors = [(net(window[:, :i])[0, -1] - window[0, i]) ** 2 for i in range(1, 6)]
    torch.testing.assert_close(net.loss(window, True), torch.stack(errors).mean())
    torch.testing.assert_close(net.loss(window, False), errors[-1])


# --- Baselines ----------------------------------------------------------------------------------


def season_and_trend(rows, noise=0.1):
    t = np.arange(rows)
    return np.tile([0, 3, 1, -2], rows)[:rows] + 0.02 * t + noise * np.random.default_rng(0).standard_normal(rows)


def one_step(fitted, values):
    """Forecasts of rows 150 to 200, each from the true values before it."""
    return fitted.free_run(values, np.arange(150, 200), 1)[:, 0]


def test_each_baseline_forecasts_what_it_says():
    values = season_and_trend(200)
    forecasts = {model: one_step(fit(model, values), values) for model in forecast.BASELINES}
    np.testing.assert_allclose(forecasts["mean"], values.mean(), rtol=1e-5)
    np.testing.assert_allclose(forecasts["last"], values[149:199], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(forecasts["seasonal"], values[146:196], rtol=1e-4, atol=1e-5)
    windows = np.lib.stride_tricks.sliding_window_view(values, 17)
    ridge = RidgeCV(forecast.RIDGE_STRENGTHS).fit((windows[:, :-1] - values.mean()) / values.std(),
                                                  (windows[:, -1] - values.mean()) / values.std())
    expected = ridge.predict((windows[134:, :-1] - values.mean()) / values.std()) * values.std() + values.mean()
    np.testing.assert_allclose(forecasts["ridge"], expected, rtol=1e-3, atol=1e-3)


def test_nlinear_follows_a_shift_of_the_level():
    values = season_and_trend(200)
    fitted = fit("nlinear", values)
    before, after = (one_step(fitted, series) for series in (values, values + 50))
    np.testing.assert_allclose(after, before + 50, rtol=1e-4)


def test_theta_continues_the_season_with_half_the_slope():
    values = season_and_trend(200, noise=0)
    forecasts = fit("theta", values).free_run(values, [200], 40)[0]
    level = forecasts.reshape(10, 4).mean(1)
    np.testing.assert_allclose(forecasts[4:] - forecasts[:-4], 4 * 0.01, atol=0.002)
    np.testing.assert_allclose(forecasts[:4] - level[0], [0 - 0.5, 3 - 0.5, 1 - 0.5, -2 - 0.5], atol=0.1)


def test_the_period_of_noise_is_one():
    assert forecast.find_period(np.random.default_rng(0).standard_normal(300)) == 1
    assert forecast.find_period(season_and_trend(200)) == 4


# --- Forecasts and the hold-out -----------------------------------------------------------------


@pytest.mark.parametrize("model", [*forecast.MODELS, "theta", "ridge"])
def test_a_free_run_feeds_its_forecasts_back(model):
    values = forecast.generate_series(300)
    fitted = fit(model, values, stop=250)
    z = fitted.normalize(values[:250])
    path = [*z[:1].expand(fitted.lookback), *z]
    while len(path) - fitted.lookback < 290:
        rows = torch.tensor([len(path) - fitted.lookback])
        with torch.no_grad():
            path += list(fitted.model.predict(torch.stack(path[-fitted.lookback:])[None], rows)[0])
    path = path[fitted.lookback :]
    expected = torch.stack(path[250:290]).double().numpy() * fitted.std + fitted.mean
    with torch.no_grad():
        np.testing.assert_allclose(fitted.free_run(values, [250], 40)[0], expected, rtol=1e-4)


@pytest.mark.parametrize("model", ["ridge", "theta", "lstm", "vq_ar", "combined"])
def test_no_test_value_reaches_a_fit_its_statistics_or_a_choice(model):
    args = forecast.parse_args(["--epochs", "1", "--protocol", "holdout", "--device", "cpu"])
    values = forecast.generate_series(300)
    altered = values.copy()
    altered[240:] = altered[240:] * 3 + 1000
    run = Run(model, "synthetic", 16, 1e-3)
    before, after = (score_holdout(run, args, series) for series in (values, altered))
    for kind in forecast.KINDS:
        assert before[0][f"validation {kind}"] == after[0][f"validation {kind}"]
        assert before[2][kind][0] == after[2][kind][0]
    assert before[2]["free run"] == after[2]["free run"]
    free_runs = [errors["free run"] + series[240:]
                 for (_, errors, _), series in zip((before, after), (values, altered))]
    np.testing.assert_allclose(*free_runs, rtol=1e-6)


def test_the_scores_are_what_their_names_say():
    args = forecast.parse_args(["--protocol", "holdout", "--device", "cpu"])
    values = season_and_trend(300)
    scores, _, widths = score_holdout(Run("last", "synthetic", 16), args, values)
    errors = np.abs(values[240:] - values[239:-1])
    assert scores["test one step"] == pytest.approx(np.mean(errors**2), rel=1e-4)
    seasonal_error = np.abs(values[4:240] - values[:236]).mean()
    assert scores["MASE one step"] == pytest.approx(errors.mean() / seasonal_error, rel=1e-4)
    assert scores["test free run"] == pytest.approx(np.mean((values[240:] - values[239]) ** 2), rel=1e-4)
    assert scores["coverage one step"] == np.mean(errors <= widths["one step"])


def test_intervals_cover_four_of_five_values_of_steady_noise():
    args = forecast.parse_args(["--protocol", "holdout", "--device", "cpu"])
    values = np.random.default_rng(1).standard_normal(2000)
    scores, _, _ = score_holdout(Run("mean", "synthetic", 16), args, values)
    assert 0.75 < scores["coverage one step"] < 0.85
    assert 0.75 < scores["coverage free run"] < 0.9


def test_combined_is_the_mean_of_vq_ar_and_the_best_on_validation():
    args = forecast.parse_args(["--epochs", "1", "--protocol", "holdout", "--device", "cpu"])
    values = season_and_trend(300)
    run = Run("combined", "synthetic", 16, 1e-3)
    errors, members, _ = forecast.holdout(run, args, values)
    candidates = [forecast.replace(run, model=model) for model in forecast.BASELINES]
    scores = [forecast.validation_error(forecast.holdout(candidate, args, values)[0]["free run"])
              for candidate in candidates]
    assert [member.run for member in members] == [forecast.replace(run, model="vq_ar"), candidates[np.argmin(scores)]]
    paths = [fitted.free_run(values, [240], 60)[0] for fitted in members]
    np.testing.assert_allclose(errors["free run"][-1] + values[240:], np.mean(paths, 0), rtol=1e-6)


def test_combined_chooses_for_one_step_and_for_the_free_run_separately(monkeypatch):
    values = forecast.generate_series(300)
    args = forecast.parse_args([])
    run = Run("combined", "synthetic", 16, 1e-3)
    combine = forecast.combine

    def errors_of(member, *_):
        shift = {"vq_ar": 0.0, "mean": 2.0, "last": 4.0}.get(member.model, 8.0)
        scale = {"mean": 0.1}.get(member.model, 1.0)
        errors = {"one step": [np.full(9, shift)] * 4, "free run": [np.full(9, shift * scale)] * 4}
        if member.model == "last":  # the best on validation, not on the test part
            errors["one step"] = [*[np.full(9, 0.5)] * 3, np.full(9, shift)]
        return errors, [member], []

    monkeypatch.setattr(forecast, "holdout", errors_of)
    combined, members, _ = combine(run, args, values)
    assert combined["one step"][-1][0] == 4.0 / 2
    assert combined["free run"][-1][0] == 0.2 / 2
    assert [member.model for member in members] == ["vq_ar", "mean"]


@pytest.mark.parametrize(("vq_ar_error", "expected"), [(1.4, 1.2), (1.5, 1.0)])  # 2 is the limit for squared errors
def test_combined_leaves_vq_ar_out_where_validation_says_so(monkeypatch, vq_ar_error, expected):
    def errors_of(member, *_):
        error = vq_ar_error if member.model == "vq_ar" else 1.0
        return {kind: [np.full(9, error)] * 4 for kind in forecast.KINDS}, [member], []

    run = Run("combined", "synthetic", 16, 1e-3)
    monkeypatch.setattr(forecast, "holdout", errors_of)
    combined, members, _ = forecast.combine(run, None, None)
    assert combined["free run"][-1][0] == pytest.approx(expected)
    assert ("vq_ar" in [member.model for member in members]) == (expected > 1)


def test_the_holdout_tables_show_the_settings_that_validation_chose():
    row = {"model": "lstm", "name": "lstm", "dataset": "a", "time_steps": 16, "learning_rate": 1e-3}
    scores = {f"{name} {kind}": 1.0 for name in ("validation", "test", "MASE", "coverage") for kind in forecast.KINDS}
    rows = [row | scores | {"validation one step": 3.0, "test one step": 30.0},
            row | scores | {"learning_rate": 3e-3, "validation free run": 2.0, "test free run": 0.5}]
    text = forecast.make_tables(pd.DataFrame(rows), forecast.parse_args(["--protocol", "holdout"]))
    lines = [line for line in text.splitlines() if "lstm" in line]
    assert lines == ["| lstm | a | 16 | 0.001 | 1 | 1 | 1 |", "| lstm | a | 16 | 0.003 | 1 | 1 | 1 |"]


def test_intervals_grow_with_the_horizon_and_stay_as_wide_beyond_it():
    rng = np.random.default_rng(0)
    paths = np.cumsum(rng.standard_normal((5, 40)), axis=1)
    paths[:, -3:] = 0
    widths = forecast.free_run_widths([*paths, *paths[:, :20]])
    assert len(widths) == 40
    assert (np.diff(widths) >= 0).all()
    np.testing.assert_array_equal(forecast.extend(widths, 60)[40:], widths[-1])


@pytest.mark.parametrize(("count", "rank"), [(3, 3), (9, 8), (50, 41)])  # min(count, ceil(0.8 · (count + 1)))
def test_the_width_is_the_conformal_rank(count, rank):
    errors = -np.arange(count, 0.0, -1.0)
    assert forecast.free_run_widths(np.split(errors, count)) == [rank]
    assert forecast.one_step_widths([errors, np.zeros(1)]) == [rank]


def test_an_interval_one_step_ahead_has_the_width_of_the_newest_errors_before_it():
    blocks = np.split(np.random.default_rng(0).standard_normal(160), 16)
    widths = forecast.one_step_widths([*[np.full(10, 99.0)] * 10, *blocks[:5], np.concatenate(blocks[5:])])
    newest = [np.abs(np.concatenate(blocks)[max(0, row - 50) : row]) for row in range(50, 160)]
    assert widths == [np.sort(sizes)[math.ceil(0.8 * (len(sizes) - 1))] for sizes in newest]


def test_intervals_one_step_ahead_follow_a_noise_that_grows():
    args = forecast.parse_args(["--protocol", "holdout", "--device", "cpu"])
    values = np.random.default_rng(0).standard_normal(2000)
    values[1600:] *= 5
    scores, _, _ = score_holdout(Run("mean", "synthetic", 16), args, values)
    assert 0.72 < scores["coverage one step"] < 0.85


def test_the_original_trains_on_its_split_in_a_fixed_order(monkeypatch):
    seen = []
    loss = forecast.LSTM.loss

    def spy(self, windows, align_target):
        seen.append(windows[:, 0].clone())
        return loss(self, windows, align_target)

    monkeypatch.setattr(forecast.LSTM, "loss", spy)
    values = forecast.generate_series(200)
    args = forecast.parse_args(["--epochs", "1", "--device", "cpu"])
    fitted, _ = forecast.fit(Run("lstm", "synthetic", 16, 1e-3), args, values, 200, original=True)
    train, val = forecast.original_split(184)
    torch.testing.assert_close(torch.cat(seen), fitted.normalize(values)[torch.cat([train, val])])


def test_the_learning_rate_of_vq_ar_warms_up_and_decays():
    factors = [forecast.warm_up_then_cosine(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.2, abs=0.01)
    assert max(factors) == factors[4]
    assert factors[99] < 0.001


def test_training_decays_the_learning_rate_of_vq_ar_only(monkeypatch):
    monkeypatch.setattr(forecast, "warm_up_then_cosine", lambda step, steps: 0.0)
    values = forecast.generate_series(200)
    assert not fit("vq_ar", values).model.values.any()
    assert fit("lstm", values).model.fc_out.bias.any()


def test_small_errors_are_not_rounded_to_zero():
    assert forecast.show([1.2345678e-7]) == "1.2346e-07"


def test_the_split_of_the_original_is_random_and_fixed():
    train, val = forecast.original_split(621)
    assert (len(train), len(val)) == (496, 125)
    assert torch.equal(torch.cat([train, val]), torch.randperm(621, generator=torch.Generator().manual_seed(42)))


# --- Sweeps -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """(results, folder) of a sweep with both protocols."""
    folder = tmp_path_factory.mktemp("sweep")
    results = run_small("--model", "lstm", "vq", "combined", "--learning-rate", "1e-3", "3e-3", "--runs", "2",
                        "--output-dir", str(folder))
    return results, folder / "forecast/run-001"


def test_a_sweep_end_to_end(sweep):
    results, run_dir = sweep
    out = (run_dir / "summary.md").read_text()
    rows = pd.DataFrame(results["rows"])
    assert len(rows) == 6 + 2 * 2 * 2 + 2
    assert not results["notes"]
    pair = rows[(rows["model"] == "lstm") & (rows["learning_rate"] == 3e-3)]["original one step"]
    mean, width = forecast.mean_and_interval(pair)
    assert f"| {mean:.5g} ± {width:.3g} |" in out
    for kind in forecast.KINDS:
        table = out.partition(f"## Hold-out, {kind}")[2].partition("##")[0]
        shown = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
        errors = [float(cells[4].split(" ± ")[0]) for cells in shown]
        assert errors == sorted(errors)
        assert {cells[0].split("-")[0] for cells in shown} == {"lstm", "vq", "combined", *forecast.BASELINES}
    pictures = {path.name for path in run_dir.glob("*.png")}
    assert pictures == {f"{kind}_synthetic.png" for kind in ("forecasts", "curves", "sweep")}


class GRU(forecast.Network):
    def __init__(self, run, args):
        super().__init__()
        self.gru = nn.GRU(1, 8, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        hidden, _ = self.gru(x.unsqueeze(-1))
        return self.head(hidden).squeeze(-1)


def test_a_new_model_is_one_entry(monkeypatch):
    monkeypatch.setitem(forecast.MODELS, "gru", GRU)
    results = run_small("--model", "gru", "att_mh", "--jobs", "2", "--protocol", "holdout")
    assert not results["notes"]
    (row,) = [row for row in results["rows"] if row["model"] == "gru"]
    assert row["test one step"] > 0


def test_the_original_figures_stand_where_they_belong():
    name = "att-64-1-1-512-is_inln-is_qln-is_kln-is_causal-sinpe"
    row = {"model": "att", "name": name, "dataset": "y_w", "time_steps": 112, "learning_rate": 5e-4,
           "original free run": 1200.0, "original one step": 1100.0}
    others = [row | {"time_steps": 64}, row | {"name": "att-8"}, row | {"learning_rate": 1e-2},
              row | {"dataset": "own"}]
    table = forecast.make_tables(pd.DataFrame([*others, row]), forecast.parse_args(["--protocol", "original"]))
    lines = [line for line in table.splitlines() if "1123.62" in line]
    assert lines == [f"| {name} | y_w | 112 | 0.0005 | 1200 | 1100 | 1123.62 | 1128.09 |"]


def test_the_published_figures_are_those_of_models_of_the_original():
    published = pd.read_csv(io.StringIO(forecast.ORIGINAL_TABLES))
    assert len(published) == 20
    assert set(published["name"]) == {network(model).name for model in ("lstm", "att", "att_mh", "vq", "vq_mh")}


def test_windows_that_do_not_fit_are_left_out_with_what_they_need(without_pictures, capsys):
    results = run_small("--model", "vq", "--time-steps", "16", "1024", "--protocol", "original")
    reason = "synthetic has 720 values and is left out with --time-steps 1024, which needs 1048"
    assert reason in capsys.readouterr().err
    assert results["notes"] == [reason]


def test_a_short_series_gets_shorter_windows(without_pictures):
    Path("own.csv").write_text("a\n" + "".join(f"{i % 7}\n" for i in range(150)))
    results = forecast.main(["--data", "own.csv", "--model", "vq_ar", "--learning-rate", "1e-3", "--epochs", "1",
                             "--jobs", "1", "--protocol", "holdout", "--device", "cpu"])
    assert {row["time_steps"] for row in results["rows"]} == {25}


def exact(value):
    """A value of a checkpoint with each tensor as its bytes."""
    if isinstance(value, dict):
        return {name: exact(item) for name, item in value.items()}
    if isinstance(value, list):
        return [exact(item) for item in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else str(value)


def all_checkpoints(run_dir):
    checkpoints = {}
    for path in Path(run_dir, "runs").glob("*.pt"):
        checkpoints[path.name] = exact(torch.load(path, weights_only=True))
    return checkpoints


def test_a_killed_sweep_goes_on_where_it_was(without_pictures):
    argv = ["--dataset", "synthetic", *SMALL, "--model", "lstm", "att", "--learning-rate", "1e-3", "5e-4", "3e-4"]
    process = subprocess.Popen([sys.executable, str(ROOT / "forecast.py"), *argv], start_new_session=True,
                               stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    runs = Path("outputs/forecast/run-001/runs")
    while len(list(runs.glob("*.pt"))) < 2:
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in runs.glob("*.pt")}
    assert len(done) < 12
    forecast.main(["--resume"])
    assert {path: path.stat().st_mtime_ns for path in done} == done  # none of them twice
    forecast.main([*argv, "--output-dir", "whole"])
    assert all_checkpoints("outputs/forecast/run-001") == all_checkpoints("whole/forecast/run-001")


def test_a_sweep_does_not_go_on_with_other_data(without_pictures, error_line):
    write_csv("own.csv", HOURS, WAVE)
    options = ["--data", "own.csv", *SMALL, "--model", "vq", "--protocol", "original"]
    forecast.main(options)
    Path("outputs/forecast/run-001/results.json").unlink()
    write_csv("own.csv", HOURS, WAVE + 1)
    assert "the series differs from the 400 values that it was fitted to" in error_line(forecast, ["--resume"])
    write_csv("own.csv", HOURS[:390], WAVE)
    assert "the series differs from the 400 values" in error_line(forecast, ["--resume"])


def test_a_sweep_does_not_go_on_with_a_series_that_has_grown(without_pictures, error_line):
    write_csv("own.csv", HOURS[:390], WAVE)
    forecast.main(["--data", "own.csv", *SMALL, "--model", "--protocol", "original"])
    Path("outputs/forecast/run-001/results.json").unlink()
    Path("outputs/forecast/run-001/runs/ridge_own_16_0.pt").unlink()
    write_csv("own.csv", HOURS, WAVE)
    assert "the series differs from the 390 values that it was fitted to" in error_line(forecast, ["--resume"])


def test_a_run_that_fails_is_reported_and_the_others_go_on(monkeypatch, capsys):
    class Broken(GRU):
        def forward(self, x):
            raise ValueError("boom")

    monkeypatch.setitem(forecast.MODELS, "broken", Broken)
    results = run_small("--model", "vq", "broken", "--protocol", "original")
    assert results["notes"] == ["broken_synthetic_16_0.001_42 failed: ValueError: boom"]
    assert {row["model"] for row in results["rows"]} == {"vq", *forecast.BASELINES}
    assert "broken_synthetic_16_0.001_42 failed: ValueError: boom" in capsys.readouterr().err


def test_a_free_run_that_diverges_is_last_in_the_table(monkeypatch, capsys):
    class Growing(GRU):
        def predict(self, windows, rows):
            return windows[:, -1:].abs() * 1e30 + 1

    monkeypatch.setitem(forecast.MODELS, "growing", Growing)
    run_small("--model", "growing", "--protocol", "original")
    assert "| diverged |" in capsys.readouterr().out.strip().splitlines()[-2]


def test_a_forecast_that_is_not_a_number_is_an_infinite_error(monkeypatch):
    class Nan(GRU):
        def predict(self, windows, rows):
            return windows[:, -1:] * torch.nan

    monkeypatch.setitem(forecast.MODELS, "nan", Nan)
    results = run_small("--model", "nan", "--protocol", "holdout")
    assert not results["notes"]
    assert "| diverged |" in Path("outputs/forecast/run-001/summary.md").read_text()


def test_two_dask_workers_give_the_results_of_one_process(sweep, without_pictures):
    run_small("--model", "lstm", "combined", "--backend", "dask", "--jobs", "2")
    by_dask = all_checkpoints("outputs/forecast/run-001")
    expected = all_checkpoints(sweep[1])
    assert len(by_dask) == 8
    assert by_dask == {name: expected[name] for name in by_dask}


def test_an_interrupted_sweep_says_how_to_go_on(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(forecast, "execute_all", interrupt)
    with pytest.raises(SystemExit) as stopped:
        run_small("--model", "vq")
    assert stopped.value.code == 130
    assert "python forecast.py --resume --output-dir outputs" in capsys.readouterr().err


# --- Forecasts after the end --------------------------------------------------------------------


def write_csv(path, times, values, names="date,value"):
    Path(path).write_text(names + "\n" + "".join(f"{t},{v}\n" for t, v in zip(times, values)))


def test_a_checkpoint_forecasts_from_the_newest_rows_of_a_series_that_has_grown(error_line, monkeypatch, tmp_path):
    write_csv("own.csv", HOURS[:390], WAVE)
    options = ["--time-column", "date", "--model", "combined", "--protocol", "holdout"]
    forecast.main(["--data", "own.csv", *SMALL, *options])
    checkpoint = next(Path("outputs/forecast/run-001/runs").glob("combined*.pt"))
    write_csv("own.csv", HOURS, WAVE)
    forecast.main(["--predict-steps", "12", "--checkpoint", str(checkpoint)])
    table = pd.read_csv("outputs/forecast/run-002/forecast.csv")
    assert list(table) == ["date", "value", "80 % low", "80 % high"]
    assert list(table["date"]) == list(pd.date_range(HOURS[-1], periods=13, freq="h")[1:].astype(str))
    np.testing.assert_allclose(table["value"], np.sin(np.arange(400, 412) / 5), atol=0.1)
    assert (table["80 % low"] < table["value"]).all()
    assert Path("outputs/forecast/run-002/forecast.png").stat().st_size > 10_000
    Path("own.csv").rename("moved.csv")
    monkeypatch.chdir(checkpoint.parent)
    forecast.main(["--predict-steps", "12", "--checkpoint", checkpoint.name, "--data", str(tmp_path / "moved.csv")])
    pd.testing.assert_frame_equal(pd.read_csv("outputs/forecast/run-001/forecast.csv"), table)
    monkeypatch.chdir(tmp_path)
    write_csv("own.csv", HOURS, WAVE + 1)
    assert "the series differs from the 390 values that it was fitted to" in error_line(
        forecast, ["--predict-steps", "3", "--checkpoint", checkpoint])


def test_a_checkpoint_of_another_script_is_one_line(error_line, without_pictures):
    run_small("--model", "--protocol", "original")
    path = Path("outputs/forecast/run-001/runs/fire.pt")
    torch.save({"model": {}}, path)
    assert "fire.pt: not a checkpoint of forecast.py" in error_line(
        forecast, ["--predict-steps", "3", "--checkpoint", path])


def test_a_checkpoint_of_a_model_that_is_absent_or_has_changed_is_one_line(error_line, monkeypatch, without_pictures):
    monkeypatch.setitem(forecast.MODELS, "gru", GRU)
    run_small("--model", "gru", "--protocol", "original")
    checkpoint = next(Path("outputs/forecast/run-001/runs").glob("gru*.pt"))
    argv = ["--predict-steps", "3", "--checkpoint", checkpoint]
    monkeypatch.setitem(forecast.MODELS, "gru", forecast.LSTM)
    assert "model 'gru' is absent or has changed" in error_line(forecast, argv)
    monkeypatch.delitem(forecast.MODELS, "gru")
    assert "model 'gru' is absent or has changed" in error_line(forecast, argv)


def test_a_column_called_low_is_forecast_beside_its_interval():
    write_csv("own.csv", HOURS, WAVE, "date,low")
    forecast.main(["--data", "own.csv", *SMALL, "--time-column", "date", "--model", "--protocol", "holdout"])
    forecast.main(["--predict-steps", "3", "--checkpoint", "outputs/forecast/run-001/runs/last_own_16_0.pt"])
    table = pd.read_csv("outputs/forecast/run-002/forecast.csv")
    np.testing.assert_allclose(table["low"], [WAVE[-1]] * 3, rtol=1e-4)
    assert (table["80 % low"] < table["low"]).all()


def test_the_limits_of_a_forecast_picture_are_those_of_the_series(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(forecast, "save_figure", lambda fig, path: figures.append(fig))
    checkpoint = {"row": {"name": "far"}, "forecasts": {"free run": [1e9, np.inf]}, "widths": {}}
    forecast.draw_forecasts([checkpoint], pd.Series([0.0, 2.0, 4.0, 2.0]), "title", tmp_path / "a.png")
    assert figures[0].axes[0].get_ylim() == (-2, 6)


def test_a_network_forecasts_from_its_checkpoint(without_pictures):
    run_small("--model", "lstm", "--protocol", "original")
    checkpoint = next(Path("outputs/forecast/run-001/runs").glob("lstm*.pt"))
    results = forecast.main(["--predict-steps", "7", "--checkpoint", str(checkpoint)])
    table = pd.read_csv("outputs/forecast/run-002/forecast.csv")
    assert list(table) == ["row", "signal"]
    np.testing.assert_array_equal(table["row"], 720 + np.arange(7))
    values = forecast.generate_series()
    args = forecast.parse_args(SMALL)
    fitted, _ = forecast.fit(Run("lstm", "synthetic", 16, 1e-3, None, None, 42), args, values, 720, original=True)
    with torch.no_grad():
        np.testing.assert_allclose(results["forecast"], fitted.free_run(values, [720], 7)[0], rtol=1e-5)


@pytest.mark.parametrize(("times", "following"), [
    (pd.bdate_range("2024-01-01", periods=60), ["2024-03-25", "2024-03-26"]),  # after a Friday
    ([f"{day:%d.%m.%Y}" for day in pd.bdate_range("2022-01-03", periods=60)], ["2022-03-28", "2022-03-29"]),
    ([day.isoformat() for day in pd.date_range("2024-03-30", periods=60, freq="h", tz="Europe/Berlin")],
     ["2024-04-01 11:00:00+00:00", "2024-04-01 12:00:00+00:00"]),
    (pd.date_range("1990-01-01", periods=60, freq="MS"), ["1995-01-01", "1995-02-01"]),
    (pd.date_range("1990-01-31", periods=60, freq="ME"), ["1995-01-31", "1995-02-28"]),
    (pd.date_range("2024-01-01", periods=60, tz="Etc/GMT-2", freq="h"),
     ["2024-01-03 12:00:00+02:00", "2024-01-03 13:00:00+02:00"]),
    (range(1700, 1760), ["1760", "1761"]),
    ([f"{day:%d/%m/%Y}" for day in pd.date_range("2024-01-01", periods=60)], ["2024-03-01", "2024-03-02"]),
    (pd.date_range("1990-12-31", periods=60, freq="12ME"), ["2050-12-31", "2051-12-31"]),
    (pd.date_range("1990-01-01", periods=60, freq="BMS"), ["1995-01-02", "1995-02-01"]),
    (pd.date_range("1990-01-01", periods=60, freq="6MS"), ["2020-01-01", "2020-07-01"]),
    (pd.date_range("1990-03-30", periods=60, freq="3BME"), ["2005-03-31", "2005-06-30"]),
    ([f"{month}-15" for month in pd.period_range("1990-01", periods=60, freq="M")], ["1995-01-15", "1995-02-15"]),
])
def test_the_calendar_step_and_the_zone_are_kept(times, following):
    write_csv("own.csv", times, WAVE[:60])
    series = series_of("own.csv", "--time-column", "date")
    texts = [str(time).removesuffix(" 00:00:00") for time in forecast.next_times(series.index, 2)]
    assert [text[: len(expected)] for text, expected in zip(texts, following)] == following


# --- Files --------------------------------------------------------------------------------------


def read(content, *argv, encoding="utf-8"):
    Path("own.csv").write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return series_of("own.csv", *argv)


COMMA_ONLY = "wert\n" + "".join(f"{50 + i % 9},5\n" for i in range(40))
SEMICOLON = "t;wert\n" + "".join(f"{i};{50 + i % 9},5\n" for i in range(40))
POINT = "t,wert\n" + "".join(f"{i},{50 + i % 9}.5\n" for i in range(40))


@pytest.mark.parametrize(("content", "encoding"), [
    (POINT, "utf-8"), (SEMICOLON, "utf-8"), (POINT.replace(",", "\t"), "utf-8"), (POINT, "utf-16"),
    ("\ufeff" + POINT, "utf-8"), (POINT.replace("t,", "µ,", 1), "latin-1"), (gzip.compress(POINT.encode()), ""),
    (COMMA_ONLY, "utf-8"), (POINT.replace(",", "|"), "utf-8"), (POINT.replace("\n", "\r"), "utf-8"),
    (SEMICOLON.replace("t;", "T, out;", 1), "utf-8"), (SEMICOLON.replace("t;", '"a, b, c";', 1), "utf-8"),
    (POINT + ",\n,\n", "utf-8"), (SEMICOLON.replace("\n", ";;\n"), "utf-8"), (POINT.replace(",", " , "), "utf-8"),
    ("sep=;\n" + SEMICOLON, "utf-8"), ("Category: all\n\n" + POINT, "utf-8"), ("# a\n# b\n" + POINT, "utf-8"),
    ("Report;;\n" + SEMICOLON, "utf-8"),
    (POINT.replace(",5", ",$5"), "utf-8"), (POINT.replace(".5", ".5%"), "utf-8"),
    (SEMICOLON.replace(",5", ",5 €"), "cp1252"),
    ("wert\n" + "".join(f"{50 + i % 9}.5\n" for i in range(40)), "utf-8"),
])
def test_files_are_read_whatever_their_encoding_delimiter_and_decimal_point(content, encoding):
    series = read(content, encoding=encoding)
    np.testing.assert_array_equal(series.values, [50.5 + i % 9 for i in range(40)])
    assert series.name == "wert"


@pytest.mark.parametrize("pattern", ["{:,.1f}", "{:_.1f}", "{:,}", "{:_}"])
def test_thousands_are_no_decimals(pattern):
    values = np.arange(40) * 31 + 999_500
    swap = str.maketrans(",._", ",,.") if "_" in pattern else {}
    content = "t;wert\n" + "".join(f"{i};{pattern.format(value).translate(swap)}\n" for i, value in enumerate(values))
    np.testing.assert_array_equal(read(content).values, values)
    assert not forecast.NOTES


@pytest.mark.parametrize(("pattern", "divisor", "meaning"), [
    ("{:,}", 1, "',' in the numbers of 'wert' is read as a thousands separator"),
    ("1{:,}", 1000, "',' in the numbers of 'wert' is read as a decimal mark"),
    ("{:_}", 1000, "'.' in the numbers of 'wert' is read as a decimal mark"),
])
def test_a_mark_that_may_be_one_between_thousands_is_noted(pattern, divisor, meaning):
    values = np.arange(40) * 31 + (1000 if pattern.startswith("1") else 500)
    texts = [pattern.format(value).replace("_", ".") for value in values]
    series = read("t;wert\n" + "".join(f"{i};{text}\n" for i, text in enumerate(texts)))
    expected = [int(text) if text.isdigit() else int(re.sub("[.,]", "", text)) / divisor for text in texts]
    np.testing.assert_array_equal(series.values, expected)
    assert [meaning] == forecast.NOTES


def test_a_number_may_name_a_column_or_a_series():
    text = "t,2023,2024\n" + "".join(f"{i},{2 * i},{i * i}\n" for i in range(40))
    np.testing.assert_array_equal(read(text, "--column", "2023"), 2 * np.arange(40))
    text = "id,y\n" + "".join(f"{i % 2:03d},{i}\n" for i in range(40))
    np.testing.assert_array_equal(read(text, "--series-column", "id", "--series", "001"), np.arange(1, 40, 2))


def test_times_that_are_not_used_are_noted():
    read("Date,Close\n" + "".join(f"2024-01-{31 - i},{2 * i}\n" for i in range(20)))
    assert forecast.NOTES == ["rows are taken as equally spaced, the newest last; --time-column sorts them"]


@pytest.mark.parametrize("column", ["date_time,2024", "dteday,31.12.2024", "Unnamed,2024-01-05", "Month,Jan 2024"])
def test_times_are_known_by_their_name_or_their_look(column):
    name, time = column.split(",")
    read(f"{name},y\n" + "".join(f"{time},{i % 7}\n" for i in range(40)))
    assert forecast.NOTES == ["rows are taken as equally spaced, the newest last; --time-column sorts them"]


@pytest.mark.parametrize("mark", [".", "?", "-", "..", "NA", "null", "unavailable", "#DIV/0!", "#NV"])
def test_marks_of_missing_values_are_filled(mark):
    series = read("a,y\n" + "".join(f"0,{mark if i in (0, 5) else 2 * i}\n" for i in range(40)), "--fill", "linear")
    np.testing.assert_array_equal(series.values, 2 * np.arange(1, 40))  # nothing is known before the first value


def test_a_low_value_that_repeats_is_noted():
    read("a,y\n" + "".join(f"0,{-200 if i in (3, 9) else i % 7}\n" for i in range(40)))
    assert forecast.NOTES == ["the lowest value, -200, repeats; if it marks missing values, empty these cells and "
                              "use --fill"]


def test_times_whose_values_are_mostly_missing_keep_their_step():
    values = [value if i % 3 == 0 else "" for i, value in enumerate(WAVE[:200])]
    write_csv("own.csv", HOURS[:200], values)
    assert len(series_of("own.csv", "--time-column", "date", "--fill", "linear")) == 200


def test_a_column_that_numbers_the_rows_is_noted():
    read("y,t\n" + "".join(f"{i % 7},{i}\n" for i in range(20)))
    assert forecast.NOTES == ["'t' seems to number the rows; --column chooses another column"]


def test_the_next_whole_number_is_whole():
    write_csv("own.csv", range(1900, 1960), WAVE[:60])
    series = series_of("own.csv", "--time-column", "date")
    assert [float(year) for year in forecast.next_times(series.index, 2)] == [1960, 1961]
    write_csv("own.csv", np.round(np.arange(60) / 30, 3), WAVE[:60])
    np.testing.assert_allclose(forecast.next_times(series_of("own.csv", "--time-column", "date").index, 2),
                               [2, 2 + 1 / 30], atol=1e-3)


def test_fractional_years_continue_without_rounding_errors():
    write_csv("own.csv", 1990 + np.arange(60) / 12, WAVE[:60])
    years = forecast.next_times(series_of("own.csv", "--time-column", "date").index, 7)
    assert (str(years[0]), str(years[6])) == ("1995.0", "1995.5")


@pytest.mark.parametrize("place", range(20, 60, 5))
def test_a_damaged_archive_is_one_line(error_line, place):
    content = bytearray(gzip.compress("".join(f"{i},{i * i % 97}\n" for i in range(300)).encode()))
    content[place] ^= 255
    Path("own.csv.gz").write_bytes(content)
    assert "own.csv.gz: " in error_line(forecast, ["--data", "own.csv.gz"])


def test_holidays_do_not_turn_days_into_months():
    days = pd.bdate_range("2022-01-03", periods=520).delete([30, 31, 100])
    write_csv("own.csv", days.strftime("%d.%m.%Y"), np.arange(517))
    series = series_of("own.csv", "--time-column", "date", "--fill", "linear")
    assert len(series) == 520
    assert series.index[-1] == days[-1]


def test_the_seed_may_be_zero():
    assert forecast.parse_args(["--seed", "0"]).seed == 0


def test_rows_are_sorted_by_time():
    order = np.random.default_rng(0).permutation(400)
    write_csv("own.csv", HOURS[order], WAVE[order])
    series = series_of("own.csv", "--time-column", "date")
    np.testing.assert_array_equal(series.values, WAVE)


def test_missing_rows_and_values_are_filled_on_demand():
    write_csv("own.csv", HOURS.delete([3, 4]), [0, 1, 2, "", 6, *range(7, 399), 0])
    linear, forward = (series_of("own.csv", "--time-column", "date", "--fill", way) for way in ("linear", "forward"))
    np.testing.assert_array_equal(linear.values[:8], [0, 1, 2, 3, 4, 5, 6, 7])
    assert forecast.NOTES == ["missing values, now filled: 3"]
    np.testing.assert_array_equal(forward.values[:8], [0, 1, 2, 2, 2, 2, 6, 7])


def test_one_of_several_series_is_taken():
    text = "unique_id,ds,y\n" + "".join(f"{name},{time},{2 * i + 100 * (name == 'B')}\n"
                                        for i, time in enumerate(HOURS) for name in "AB")
    series = read(text, "--series-column", "unique_id", "--series", "B", "--time-column", "ds")
    np.testing.assert_array_equal(series.values, 2 * np.arange(400) + 100)


def test_a_column_can_be_chosen_by_a_name_in_latin_1():
    assert len(read(POINT.replace("wert", "Größe"), "--column", "Größe", encoding="latin-1")) == 40


def test_of_two_columns_with_the_same_name_one_is_taken_by_its_index():
    np.testing.assert_array_equal(read("a,a\n" + "".join(f"{2 * i},{i % 7}\n" for i in range(40)), "--column", "0"),
                                  2 * np.arange(40))


def test_all_rows_are_taken_without_a_series_column():
    text = "group,y\n" + "".join(f"{i % 3},{i % 7}\n" for i in range(40))
    assert len(read(text, "--series-column", "none")) == 40


@pytest.mark.parametrize(("frequency", "pattern"), [
    ("D", "%d/%m/%Y"), ("D", "%m/%d/%Y"), ("MS", "%d/%m/%Y"), ("MS", "%m/%d/%Y"), ("ME", "%d/%m/%Y"),
    ("h", "%d/%m/%Y %H:%M"), ("7D", "%d.%m.%Y"), ("D", "%Y%m%d"), ("MS", "%Y%m%d"), ("B", "%Y%m%d"), ("MS", "%Y%m"),
    ("D", "%Y/%m/%d"), ("MS", "%Y/%m/%d"), ("D", "%d.%m.%y"), ("D", "%d/%m/%y"), ("MS", "%b %Y"), ("0.5s", "ISO"),
    ("MS", "%b-%y"), ("MS", "%y-%b"), ("MS", "%Y.%m"), ("MS", "%m.%Y"), ("h", "%Y%m%d%H"), ("h", "%Y%m%d%H%M"),
    ("h", "%Y%m%d%H%M%S"), ("D", "%Y%m%d.0"), ("h", "%Y-%m-%d %H:%M:%S"), ("h", "%d.%m.%Y %H:%M - 01.01.2020 01:00"),
    ("min", "%Y/%m/%d %H:%M"), ("h", "%Y-%m-%d %H:%M:%S UTC"),
])
def test_dates_are_read_whether_day_month_or_year_comes_first(frequency, pattern):
    times = pd.date_range("2020-01-01", periods=60, freq=frequency)
    write_csv("own.csv", [time.isoformat() if pattern == "ISO" else f"{time:{pattern}}" for time in times], WAVE)
    pd.testing.assert_index_equal(series_of("own.csv", "--time-column", "date").index, times, check_names=False,
                                  check_freq=False)
    assert not forecast.NOTES


def test_dates_that_can_be_read_in_two_ways_are_noted():
    write_csv("own.csv", pd.date_range("2020-02-01", periods=60, freq="min").strftime("%m/%d/%Y %H:%M"), WAVE)
    series_of("own.csv", "--time-column", "date")
    assert forecast.NOTES == ["the first time is read as 2020-02-01 00:00:00; it could also be 2020-01-02 00:00:00"]


def test_a_column_that_only_looks_like_the_name_of_a_series_is_no_obstacle():
    assert len(read("bid,y\n" + "".join(f"{i % 2 + 0.5},{i % 7}\n" for i in range(40)))) == 40
    assert len(read("id,y\n" + "".join(f"{i},{i % 7}\n" for i in range(40)))) == 40


def test_a_signal_on_a_large_constant_is_not_lost():
    args = forecast.parse_args(["--protocol", "holdout", "--device", "cpu"])
    scores, _, _ = score_holdout(Run("ridge", "own", 16), args, WAVE + 1e12)
    assert scores["test one step"] < 0.01


LONG = "".join(f"{i},{i % 3}\n" for i in range(20))


@pytest.mark.parametrize(("text", "options", "message"), [
    ("t,a\n0,1\n1,x\n2,3\n", [], "Unable to parse string"),
    ("t,a\n0,1\n1,\n2,3\n", [], "missing values: 1, the first at row 1; --fill linear"),
    ("t,a\n0,inf\n1,1\n2,3\n", [], "missing values: 1, the first at row 0"),
    ("a\n1\n\n2\n", [], "the first at row 1"),
    ("t,a\n0,5\n1,5\n2,5\n", [], "'a' is empty, constant"),
    ("t,a\n" + "".join(f"{i},0.1\n" for i in range(60)), [], "'a' is empty, constant"),
    ("t,a\n0,1e200\n1,2e200\n", [], "too large"),
    ("t,a\n0,1\n1,2\n", ["--column", "b"], "no column 'b', only t, a"),
    ("t,a\n0,1\n1,2\n", ["--time-column", "b"], "no column 'b', only t, a"),
    ("a,a\n0,1\n1,2\n", ["--column", "a"], "two columns are called 'a'; choose one by its index"),
    ("t,a\n0,1\n1,2,3\n", [], "Expected 2 fields in line 3, saw 3"),
    ("t,a\n0,50,13\n1,50,14\n", [], "Length of header or names does not match"),
    ("50,13\n50,14\n51,13\n", [], "must hold names of columns"),
    ("1.5E-05\n2.5E-05\n", [], "must hold names of columns"),
    ("2024-01-01 00:00, 50.13\n2024-01-02 00:00, 51.13\n", [], "must hold names of columns"),
    (".5\n.7\n.6\n", [], "must hold names of columns"),
    ("", [], "No columns to parse"),
    ("t,a\n", ["--time-column", "t"], "is empty"),
    ("PK\x03\x04\x00\x00", [], "not a CSV file"),
    ("t,a\n" + LONG, ["--time-steps", "16", "--protocol", "original"], "--time-steps 16, which needs 40"),
    ("t,a\n00:00:00,1\n00:01:00,2\n", ["--time-column", "t"], "times of day such as 00:00:00 need a date"),
    ("t,a\n09:00 AM,1\n09:01 AM,2\n", ["--time-column", "t"], "need a date"),
    ("t,a\n2024-01-01T00:00+02:00,1\n2024-01-01T01:00,2\n", ["--time-column", "t"], "Mixed timezones"),
    ("t,a\n0,1\n1,1\n2,1\n2.05,4\n3,2\n", ["--time-column", "t"], "not equally spaced"),
    ("v,t\n" + LONG, ["--time-column", "t"], "'t' is the time column"),
    ("t,a\n" + LONG, [], "has 20 values and is left out with --time-steps 2, which needs 65"),
    ("Entity,y\nA,1\nA,2\nB,3\nB,4\n", [], "column 'Entity' seems to name several series"),
    ("unique_id,y\nA,1\nB,2\nA,3\nB,4\n", [], "column 'unique_id' seems to name several series"),
    ("region,y\nA,1\nB,2\nA,3\nB,4\n", [], "all rows with --series-column none"),
    ("u,y\nA,1\nB,2\n", ["--series-column", "u", "--series", "C"], "--series must be one of A, B"),
    ("u,y\nA,1\nB,2\n", ["--series-column", "u"], "--series must be one of A, B"),
    ("u,y\nA,1\nB,2\n", ["--series", "A"], "--series needs --series-column, one of u, y"),
    ("t,a\n2024-01-01,1\nnever,2\n", ["--time-column", "t"], "row 1: the time never is invalid"),
    ("t,a\n2024-01-01,1\n2024-01-02,2\n2024-01-02,3\n", ["--time-column", "t"],
     "row 2: the time 2024-01-02 is invalid or occurs twice; --series-column"),
    ("t,a\n1,1\n2,1\n3,4\n4,4\n9,2\n", ["--time-column", "t"], "missing values: 4, the first at t 5"),
    ("t,a\n1,1\n2,1\n3,4\n4,4\n5.5,2\n", ["--time-column", "t"], "not equally spaced"),
    ("t,a\n1,1\n2,1\n3,4\n4,4\n11,2\n", ["--time-column", "t", "--fill", "linear"], "most are missing"),
    ("1,5\n2,6\n3,8\n", ["--column", "1"], "must hold names of columns"),
    ("t,a\n0,\n1,\n", [], "'a' is empty"),
    ("t,a\n0,1\n1700000000,1\n1700000001,4\n1700000002,4\n", ["--time-column", "t"],
     "most are missing"),
    ("t,a\n1970-01-01,1\n" + "".join(f"2024-05-01 00:00:0{i},{i}\n" for i in range(9)), ["--time-column", "t"],
     "most are missing"),
])
def test_a_file_that_cannot_be_taken_is_one_line_and_leaves_no_run(error_line, text, options, message):
    Path("own.csv").write_text(text)
    assert message in error_line(forecast, ["--data", "own.csv", "--model", "lstm", *options])
    assert not Path("outputs").exists()


@pytest.mark.parametrize(("argv", "message"), [
    (["--data", "absent.csv"], "absent.csv"),
    (["--dataset", "synthetic", "--model", "att", "--no-causal"], "would see its targets"),
    (["--model", "gru"], "invalid choice: 'gru'"),
    (["--epochs", "0"], "from 1 to a million"),
    (["--device", "abacus"], "unknown device 'abacus'"),
    (["--data", "a.csv", "--dataset", "synthetic"], "not allowed with argument"),
    (["--dataset", "synthetic", "--model", "att_mh", "--kv-heads", "3"], "--kv-heads must divide --n-heads"),
    (["--predict-steps", "3"], "go together"),
    (["--learning-rate", "0"], "--learning-rate must be above 0"),
    (["--predict-steps", "1000000000000", "--checkpoint", "a.pt"], "from 1 to a million"),
    (["--predict-steps", "3", "--checkpoint", "a/b/c.pt"], "a/arguments.json"),
    (["--resume"], "no unfinished run"),
    (["--resume", "--epochs", "3"], "no unfinished run"),
])
def test_a_command_line_that_cannot_be_met_is_one_line(error_line, argv, message):
    assert message in error_line(forecast, argv)


# --- Known series -------------------------------------------------------------------------------


@pytest.fixture
def server():
    """An address that serves the folder remote/."""
    Path("remote").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory="remote")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{service.server_port}/"
        service.shutdown()


def test_downloads_and_files_that_are_there_are_checked(without_pictures, monkeypatch, error_line, server):
    text = "time(h),formaldehyde\n" + "".join(f"{i / 30},{100 + i % 7}\n" for i in range(200))
    monkeypatch.setattr(forecast, "FILES", {"y_w": ("y+w.csv", hashlib.sha256(text.encode()).hexdigest())})
    monkeypatch.setattr(forecast, "URL", server)
    argv = ["--dataset", "y_w", *SMALL, "--model", "vq", "--protocol", "original"]
    assert "404" in error_line(forecast, argv)
    Path("remote/y+w.csv").write_text(text[:1000])
    assert "another sha256" in error_line(forecast, argv)
    assert not Path("data/y+w.csv").exists()
    Path("remote/y+w.csv").write_text(text)
    results = forecast.main(argv)
    assert results["data"]["y_w"]["rows"] == 200
    Path("data/y+w.csv").write_text(text[:1000])
    assert "another sha256" in error_line(forecast, argv)


def test_a_download_that_is_cut_off_is_one_line(monkeypatch, error_line):
    class Response:
        def read(self):
            raise http.client.IncompleteRead(b"time", 100)

    monkeypatch.setattr(forecast, "urlopen", lambda *_, **__: Response())
    assert "IncompleteRead(4 bytes read, 100 more expected); put it into --data-dir" in error_line(
        forecast, ["--dataset", "y_w"])


@pytest.mark.parametrize("name", forecast.FILES)
def test_the_checksums_are_those_of_the_real_files(name):
    file, sha256 = forecast.FILES[name]
    path = SHARED / "formaldehyde" / file
    if not path.exists():
        pytest.skip("the real files are not beside the checkout")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def test_without_data_the_embedded_series_is_used_and_that_is_noted(without_pictures, error_line):
    results = forecast.main([*SMALL, "--model", "vq", "--protocol", "original"])
    assert "the embedded series is used" in results["notes"][0]
    assert list(results["data"]) == ["synthetic"]
    assert "Connection refused" in error_line(forecast, ["--dataset", "y_w", *SMALL])


def test_baselines_alone():
    results = run_small("--model", "--protocol", "original")
    assert {row["model"] for row in results["rows"]} == set(forecast.BASELINES)
