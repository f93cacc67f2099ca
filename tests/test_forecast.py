"""What users of forecast.py rely on: offline, on the CPU, on short series."""

import contextlib
import hashlib
import http.client
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import unittest.mock
from pathlib import Path

import numpy as np
import pyarrow.csv
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.linear_model import Ridge

import forecast

ROOT = Path(forecast.__file__).resolve().parent
SMALL = ["--epochs", "1", "--time-steps", "16", "--learning-rate", "1e-3", "--jobs", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """Each test in its own folder, with an address for the data that nobody answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forecast, "URL", "http://127.0.0.1:9/")
    with unittest.mock.patch.dict(os.environ):  # dask sets OMP_NUM_THREADS here too, not in its workers alone
        yield


def run(*argv):
    return forecast.main(["--dataset", "synthetic", *SMALL, *argv])


def failure(capsys, *argv):
    """The one line on stderr of a command that must end with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        forecast.main(list(argv))
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("forecast.py: error: ")
    return lines[0]


def specs_of(*argv):
    args = forecast.parse_args(["--dataset", "synthetic", *argv])
    specs, _ = forecast.make_specs(args, forecast.load_series(args), torch.device("cpu"))
    return {spec["model"]: spec for spec in specs}


def network(model, *argv):
    """The untrained network `model` with the seed's defaults, where argv does not say otherwise."""
    return forecast.make_model(specs_of("--model", model, *argv)[model]).eval()


# --- Models -----------------------------------------------------------------------------------------------------------


def test_names_and_sizes_are_those_of_the_seeds_models():
    expected = {  # parameters: counted by hand from the layers of each
        "lstm": ("lstm-1-64-2-1", 4 * 64 * (1 + 64 + 2) + 4 * 64 * (64 + 64 + 2) + 65),
        "att": ("att-64-1-1-512-is_inln-is_qln-is_kln-is_causal-sinpe", 128 + 3 * 64 * 64 + 3 * 128 + 64),
        "att_mh": ("att_mh-64-8-1-1-1-512-is_kln-is_causal-sinpe", 128 + 64 * 64 + 2 * 64 * 8 + 16 + 64),
        "vq": ("vq-64-64-1-1-512-is_causal-randpe", 128 + 512 * 64 + 64 * 64 + 65),
        "vq_mh": ("vq_mh-64-64-8-4-1-1-512-is_inln-is_n_pe-rope", 128 + 128 + 4 * 64 * 8 + 65),
    }
    for name, spec in specs_of("--model", *expected).items():
        if name in expected:
            model = forecast.make_model(spec)
            assert (spec["name"], sum(p.numel() for p in model.parameters())) == expected[name]


@pytest.mark.parametrize("model", ["att", "att_mh"])
@pytest.mark.parametrize("pe", ["sinpe", "rope"])
def test_a_later_value_changes_no_earlier_forecast(model, pe):
    net, x = network(model, "--pe", pe), torch.randn(2, 70)
    changed = x.clone()
    changed[:, 41] += 1
    before, after = net(x, last_only=False), net(changed, last_only=False)
    assert torch.equal(before[:, :41], after[:, :41]) and not torch.allclose(before[:, 41:], after[:, 41:])
    torch.testing.assert_close(net(x), before[:, -1:])


@pytest.mark.parametrize("model", ["vq", "vq_mh"])
def test_the_seeds_codebook_models_see_the_last_value_alone(model):
    net, x = network(model), torch.randn(2, 70)
    changed = x.clone()
    changed[:, :-1] += 1
    torch.testing.assert_close(net(x), net(changed))
    assert not torch.allclose(net(x), net(x.flip(1)))


def test_att_begins_as_the_seeds_joint_projection_does():
    joint, own = (network(model).fc_q.weight.abs().max() for model in ("att", "att_mh"))
    assert joint < (6 / (64 + 3 * 64)) ** 0.5 < own


def test_ours_looks_back():
    net, x = network("vq_ar"), torch.randn(2, forecast.SEED_TIME_STEPS)
    torch.nn.init.normal_(net.values, std=0.1)
    changed = x.clone()
    changed[:, 3] += 5
    assert not torch.allclose(net(x), net(changed))


@pytest.mark.parametrize("norm_pe", [[], ["--norm-pe"]])
def test_each_encoding_changes_the_forecasts(norm_pe):
    x = torch.randn(2, 40)
    outputs = [network("att", "--pe", pe, *norm_pe)(x, last_only=False) for pe in ("none", "randpe", "sinpe", "rope")]
    for i, one in enumerate(outputs):
        assert all(not torch.allclose(one, other, atol=1e-4) for other in outputs[:i])


@pytest.mark.parametrize("flag", ["inln", "qln", "kln", "causal", "norm-pe"])
def test_each_flag_changes_the_forecasts(flag):
    x, options = torch.randn(2, 40), ["--no-align-target"]
    with_it, without = (network("att_mh", f"--{prefix}{flag}", *options) for prefix in ("", "no-"))
    assert with_it.name != without.name
    assert not torch.allclose(with_it(x, last_only=False), without(x, last_only=False), atol=1e-5)


def test_rope_depends_on_the_distance_alone():
    rope = forecast.Positions("rope", 8, 64)
    q, k = torch.randn(8), torch.randn(8)
    scores = rope(q.expand(64, 8)) @ rope(k.expand(64, 8)).T  # [query, key]: the same vectors everywhere
    torch.testing.assert_close(scores[5:, 5:], scores[:-5, :-5])
    assert not torch.allclose(scores[0, :-5], scores[0, 5:])
    torch.testing.assert_close(rope(q.expand(64, 8)).norm(dim=1), q.norm().expand(64))


def test_grouped_queries_are_plain_attention_with_repeated_heads():
    q, k, v = torch.randn(3, 8, 50, 4), torch.randn(3, 2, 50, 4), torch.randn(3, 2, 50, 4)
    weights = torch.randn(8, 4)  # of each head, from its output to the forecast
    values = v @ weights.view(2, 4, 4).transpose(1, 2)
    repeated_k, repeated_v = (one.repeat_interleave(4, 1) for one in (k, v))
    for causal in (True, False):
        heads = F.scaled_dot_product_attention(q, repeated_k, repeated_v, is_causal=causal)
        plain = (heads * weights.view(8, 1, 4)).sum((1, 3))
        torch.testing.assert_close(forecast.attend(q, k, values, causal), plain)
        torch.testing.assert_close(forecast.attend(q[:, :, 20:21], k, values, causal, 20), plain[:, 20:21])


# --- Training and forecasts -------------------------------------------------------------------------------------------


def test_the_aligned_loss_is_the_mean_over_every_step():
    spec = specs_of("--model", "att", "--time-steps", "5")["att"]
    net = forecast.make_model(spec)
    window = torch.tensor([[1.0, -2.0, 3.0, 0.5, 4.0, -1.0]])
    by_hand = [(net(window[:, : i + 1])[0, -1] - target) ** 2 for i, target in enumerate([-2.0, 3.0, 0.5, 4.0, -1.0])]
    torch.testing.assert_close(forecast.window_loss(net, window, spec), torch.stack(by_hand).mean())
    last = forecast.window_loss(net, window, spec | {"align_target": False})
    torch.testing.assert_close(last, by_hand[-1])


def test_free_runs_equal_recomputing_every_window():
    for model in forecast.NETWORKS:
        net = network(model, "--time-steps", "6")
        if model == "vq_ar":
            torch.nn.init.normal_(net.values, std=0.1)
        history = torch.randn(6)
        values = list(history)
        while len(values) < 6 + 40:
            values += list(net(torch.stack(values[-6:])[None])[0].detach())
        torch.testing.assert_close(forecast.free_run(net, history, 40), torch.stack(values[6 : 6 + 40]))


def test_ridge_is_scikit_learns_with_the_strength_of_the_validation_part():
    values = forecast.generate_series(400)
    row, state = forecast.run_one(specs_of("--time-steps", "16", "--no-refit")["ridge"], values)
    z = (values - values[:288].mean()) / values[:288].std()
    x, y = np.lib.stride_tricks.sliding_window_view(z, 16)[:-1], z[16:]
    fitted = [Ridge(alpha).fit(x[: 288 - 16], y[: 288 - 16]) for alpha in 10.0 ** np.arange(-4, 4.1, 0.5)]
    best = min(fitted, key=lambda model: np.mean((model.predict(x[288 - 16 : 320 - 16]) - z[288:320]) ** 2))
    expected = best.predict(x[320 - 16 :]) * values[:288].std() + values[:288].mean()
    np.testing.assert_allclose(state["forecasts"]["holdout"]["batch"], expected, rtol=1e-4)
    assert row["holdout/mse_batch"] == pytest.approx(np.mean((expected - values[320:]) ** 2), rel=1e-3)


@pytest.mark.parametrize("model", ["ridge", "lstm", "att", "vq_ar"])
def test_no_test_row_reaches_a_fit_its_statistics_or_the_choice(model):
    spec = specs_of("--model", "lstm", "att", "vq_ar", "--time-steps", "16", "--epochs", "1", "--protocol", "holdout")
    values = forecast.generate_series(300)
    altered = values.copy()
    altered[240:] = altered[240:] * 3 + 1000
    before, after = (forecast.run_one(spec[model], series) for series in (values, altered))
    for name in ("validation/mse_batch", "validation/mse_regressive"):
        assert before[0][name] == after[0][name]
    # The free run sees nothing but the rows before the test part: not even its normalization may differ.
    assert torch.equal(*(state["forecasts"]["holdout"]["regressive"] for _, state in (before, after)))
    unfitted = values.copy()
    unfitted[216:240] += 500
    without_refit = [forecast.run_one(spec[model] | {"refit": False}, series)[1] for series in (values, unfitted)]
    if model != "ridge":  # whose strength may change
        assert without_refit[0]["mean"] == without_refit[1]["mean"]
        assert all(torch.equal(without_refit[0]["weights"][name], weight)
                   for name, weight in without_refit[1]["weights"].items())


def test_the_seeds_split_is_random_and_fixed():
    fitting, validation = forecast.seed_split(621)
    assert (len(fitting), len(validation)) == (496, 125)
    assert sorted([*fitting.tolist(), *validation.tolist()]) == list(range(621))
    expected = torch.randperm(621, generator=torch.Generator().manual_seed(42))
    assert torch.equal(torch.cat([fitting, validation]), expected)


# --- Sweeps -----------------------------------------------------------------------------------------------------------


def test_a_sweep_end_to_end(capsys):
    results = run("--model", "lstm", "vq", "--learning-rate", "1e-3", "3e-3", "--runs", "2")
    out, run_dir = capsys.readouterr().out, Path("outputs/forecast/run-001")
    rows = [json.loads(line) for line in (run_dir / "runs.jsonl").read_text().splitlines()]
    assert len(rows) == 3 + 2 * 2 * 2 and results["finished"] and not results["failed"]
    pair = [row["holdout/mse_batch"] for row in rows if row["combination"] == "lstm-1-64-2-1_synthetic_ts16_lr0.003"]
    low, high = stats.t.interval(0.95, 1, np.mean(pair), stats.sem(pair))
    assert f"| {np.mean(pair):.6g} ± {(high - low) / 2:.3g} |" in out
    shown = [line.split(" | ") for line in out.split("`Predict/")[0].splitlines() if line.startswith("| ")][2:]
    errors = [float(cells[3].split(" ± ")[0]) for cells in shown]
    assert errors == sorted(errors) and {"| mean", "| last", "| ridge"} <= {cells[0] for cells in shown}
    pictures = {path.name for path in run_dir.glob("*.png")}
    assert pictures == {f"{kind}_synthetic.png" for kind in ("forecasts", "learning_curves", "sweep", "horizon")}


def test_the_seeds_figures_stand_in_the_table_where_they_belong():
    row = {"model": "att", "dataset": "y_w", "time_steps": 112, "learning_rate": 5e-4, "seconds": 1.0,
           forecast.REGRESSIVE: [1200.0, np.nan], forecast.BATCH: [1100.0, np.nan],
           "name": forecast.SEED_NAMES["att"]}
    rows = [row, row | {"time_steps": 64}, row | {"name": "att-8"}]
    table = forecast.result_table(rows, True).splitlines()
    assert "| 1123.62 | 1128.09 |" in table[2] and not any("1123.62" in line for line in table[3:])
    assert "1123.62" not in forecast.result_table(rows, False)


def test_combinations_that_cannot_be_are_skipped_with_their_reason(capsys):
    run("--model", "vq", "--time-steps", "16", "1024", "--protocol", "seed")
    captured = capsys.readouterr()
    reason = "synthetic has 720 values, --time-steps 1024 needs 1035: 315 too few"
    assert reason in captured.err and reason in captured.out
    assert "--block-size" not in captured.err
    run("--model", "vq", "--time-steps", "600", "--protocol", "seed")
    assert "--block-size 512 is extended to --time-steps, up to 600" in capsys.readouterr().err


def without_clock(run_dir):
    rows = (json.loads(line) for line in Path(run_dir, "runs.jsonl").read_text().splitlines())
    clock = {"seconds", "peak_memory_mib"}
    return {row["id"]: {key: value for key, value in row.items() if key not in clock} for row in rows}


def test_a_killed_sweep_goes_on_where_it_was():
    argv = ["--dataset", "synthetic", *SMALL, "--model", "lstm", "att", "--learning-rate", "1e-3", "5e-4", "3e-4"]
    with subprocess.Popen([sys.executable, str(ROOT / "forecast.py"), *argv], start_new_session=True,
                          stderr=subprocess.DEVNULL) as process:
        log = Path("outputs/forecast/run-001/runs.jsonl")
        while not log.exists() or log.read_text().count("\n") < 2:
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    with log.open("a") as file:
        file.write('{"id": "cut off')
    done = log.read_text().splitlines()[:2]
    results = forecast.main(["--resume"])
    lines = log.read_text().splitlines()
    assert results["finished"] and lines[:2] == done and len(lines) == 3 + 6  # none of them twice
    forecast.main([*argv, "--output-dir", "whole"])
    assert without_clock("outputs/forecast/run-001") == without_clock("whole/forecast/run-001")


def test_a_run_that_fails_is_recorded_and_the_others_go_on(monkeypatch, capsys):
    make_model = forecast.make_model

    def broken(spec):
        if spec["model"] == "vq" and spec["seed"] == 42:
            raise ValueError("boom")
        return make_model(spec)

    options = ["--model", "vq", "lstm", "--protocol", "seed"]
    specs = forecast.make_specs
    monkeypatch.setattr(forecast, "make_specs", lambda *a: (specs(*a), monkeypatch.setattr(
        forecast, "make_model", broken))[0])
    results = run(*options)
    assert list(results["failed"].values()) == ["ValueError: boom"]
    assert {row["model"] for row in results["table"]} == {"lstm", *forecast.BASELINES}
    assert "failed: ValueError: boom" in capsys.readouterr().err
    monkeypatch.setattr(forecast, "make_specs", specs)
    monkeypatch.setattr(forecast, "make_model", make_model)
    assert "vq" in {row["model"] for row in forecast.main(["--resume"])["table"]}  # tried again


def test_a_run_that_diverges_sorts_last(monkeypatch, capsys):
    monkeypatch.setattr(forecast, "free_run_lstm", lambda model, history, steps: torch.full((steps,), torch.inf))
    rows = [f"2024-01-{1 + i // 24:02d} {i % 24:02d}:00:00,{i % 7}\n" for i in range(300)]
    Path("own.csv").write_text("day,a $x_{$\n" + "".join(rows))  # dates, and a name that is no formula
    results = forecast.main(["--data", "own.csv", "--time-column", "day", *SMALL, "--model", "lstm", "vq"])
    out = capsys.readouterr().out
    assert results["finished"] and "diverged" in out.split("`Predict/")[0].splitlines()[-2]


def test_two_dask_workers_give_the_rows_of_loky():
    options = ["--model", "lstm", "vq_ar", "--jobs", "2", "--protocol", "seed"]
    run(*options, "--output-dir", "a")
    run(*options, "--output-dir", "b", "--backend", "dask")
    run(*options, "--output-dir", "c", "--jobs", "1")
    assert without_clock("a/forecast/run-001") == without_clock("b/forecast/run-001") == without_clock(
        "c/forecast/run-001")


def test_a_checkpoint_continues_its_series():
    run("--model", "lstm", "--protocol", "holdout")
    (checkpoint,) = Path("outputs/forecast/run-001/runs").glob("lstm*.pt")
    results = forecast.main(["--predict-steps", "7", "--checkpoint", str(checkpoint)])
    table = pyarrow.csv.read_csv("outputs/forecast/run-002/forecast.csv")
    assert table.column_names == ["time [h]", "signal"] and len(table) == 7 and len(results["forecast"]) == 7
    np.testing.assert_allclose(table["time [h]"].to_numpy(), (720 + np.arange(7)) / 30)
    state = torch.load(checkpoint, weights_only=True)
    net = forecast.make_model(state["spec"])
    net.load_state_dict(state["weights"])
    history = (torch.tensor(forecast.generate_series())[-16:].float() - state["mean"]) / state["std"]
    first = net(history[None].float())[0, 0].item() * state["std"] + state["mean"]
    assert table["signal"][0].as_py() == pytest.approx(first, rel=1e-4)
    assert Path("outputs/forecast/run-002/forecast.png").stat().st_size > 10_000


def test_a_checkpoint_of_other_data_is_refused(capsys, monkeypatch):
    lines = ["t,a", *(f"{i},{i % 11}" for i in range(200))]
    Path("own.csv").write_text("\n".join(lines))
    forecast.main(["--data", "own.csv", *SMALL, "--model", "vq", "--protocol", "seed"])
    (checkpoint,) = Path("outputs/forecast/run-001/runs").resolve().glob("vq*.pt")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert len(forecast.main(["--predict-steps", "3", "--checkpoint", str(checkpoint)])["forecast"]) == 3
    Path("../own.csv").write_text("\n".join(lines[:-1]))
    assert "made of other data" in failure(capsys, "--predict-steps", "3", "--checkpoint", str(checkpoint))


# --- Data and errors --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(folder):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{service.server_port}/"
        service.shutdown()


def test_downloads_are_checked(monkeypatch, capsys, tmp_path):
    remote = tmp_path / "remote"
    remote.mkdir()
    text = "time(h),formaldehyde\n" + "".join(f"{i / 30},{100 + i % 7}\n" for i in range(200))
    digest = hashlib.sha256(text.encode()).hexdigest()
    monkeypatch.setattr(forecast, "FILES", {"y_w": ("y+w.csv", digest)})
    argv = ["--dataset", "y_w", *SMALL, "--model", "vq", "--protocol", "seed"]
    with server(remote) as url:
        monkeypatch.setattr(forecast, "URL", url)
        assert "404" in failure(capsys, *argv)
        (remote / "y+w.csv").write_text(text[:1000])
        assert "1,000 bytes with another sha256" in failure(capsys, *argv) and not Path("data/y+w.csv").exists()
        (remote / "y+w.csv").write_text(text)
        with monkeypatch.context() as patch:  # a connection that breaks off
            patch.setattr(http.client.HTTPResponse, "read", lambda *_: (_ for _ in ()).throw(
                http.client.IncompleteRead(b"")))
            assert "IncompleteRead" in failure(capsys, *argv)
        results = forecast.main(argv)
    assert results["data"]["y_w"] == {"source": "real", "rows": 200, "column": "formaldehyde", "sha256": digest}
    assert forecast.main(argv)["finished"]  # the server is gone, the file is there


def test_without_data_the_embedded_series_is_used_and_said(capsys):
    results = forecast.main([*SMALL, "--model", "vq", "--protocol", "seed"])
    assert "no real data" in capsys.readouterr().err and results["data"]["synthetic"]["source"] == "embedded"
    assert "--dataset synthetic" in failure(capsys, "--dataset", "y_w", *SMALL)


@pytest.mark.parametrize(("text", "options", "message"), [
    ("t,a\n0,1\n1,x\n2,3\n", [], "row 3, column 'a': 'x', a number is needed"),
    ("t,a\n0,1\n1,\n2,3\n", [], "row 3, column 'a': empty or NaN"),
    ("t,a\n0,1\n1,2\n2,nan\n", [], "row 4, column 'a': empty or NaN"),
    ("t,a\n0,5\n1,5\n2,5\n", [], "column 'a' is constant"),
    ("t,a\n0,1\n1,2\n", ["--column", "b"], "no column 'b' for --column, only t, a"),
    ("t,a\n0,1\n1,2\n", ["--column", "2"], "no column '2' for --column, only t, a"),
    ("t,a\n0,1\n1,2\n", ["--time-column", "b"], "no column 'b' for --time-column, only t, a"),
    ("t,a\n0,1\n1,2,3\n", [], "Expected 2 columns, got 3"),
    ("a\n1\n\n2\n", [], "row 3, column 'a': empty or NaN"),
    ("", [], "Empty CSV file"),
    ("t,a\n" + "".join(f"{i},{i % 3}\n" for i in range(20)), ["--protocol", "seed"], "needs 27: 7 too few"),
])
def test_bad_series(capsys, text, options, message):
    Path("own.csv").write_text(text)
    assert message in failure(capsys, "--data", "own.csv", *SMALL, "--model", "lstm", *options)
    assert not list(Path("outputs").rglob("run-*"))


def test_bad_command_lines(capsys, tmp_path):
    (tmp_path / "file").write_text("no checkpoint")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    (tmp_path / "results.json").write_text('{"experiment": "fire", "finished": false, "arguments": {}}')
    for argv, message in {
        ("--data", "absent.csv"): "no such file",
        ("--data", str(tmp_path)): "a folder",
        ("--data", "a.csv", "--dataset", "y_w"): "take one of them",
        ("--column", "a"): "go with --data",
        ("--model", "att", "--no-causal"): "would see its own answer",
        ("--model", "att_mh", "--n-heads", "6"): "must divide",
        ("--model", "att_mh", "--kv-heads", "3"): "must divide",
        ("--model", "att", "--pe", "rope", "--d-model", "7"): "must be even",
        ("--model", "gru"): "invalid choice: 'gru'",
        ("--learning-rate", "0"): "is not between",
        ("--device", "abacus"): "--device",
        ("--predict-steps", "3"): "go together",
        ("--predict-steps", "3", "--checkpoint", str(tmp_path / "file")): "no checkpoint of a run",
        ("--predict-steps", "3", "--checkpoint", str(tmp_path / "other.pt")): "no checkpoint of a run (other content)",
        ("--predict-steps", "3", "--checkpoint", "a.pt", "--model", "att"): "the model are its own",
        ("--resume",): "no unfinished run",
        ("--resume", str(tmp_path)): "no unfinished run",
        ("--resume", "--epochs", "3"): "a run keeps its own arguments",
        ("--output-dir", str(tmp_path / "file")): "file",
    }.items():
        data = [] if {"--data", "--resume", "--checkpoint", "--predict-steps", "--column"} & set(argv) else [
            "--dataset", "synthetic"]
        assert message in failure(capsys, *argv, *data)


def test_interrupted_runs_say_how_to_go_on(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(forecast, "run_all", interrupt)
    with pytest.raises(SystemExit) as stop:
        run("--model", "vq")
    assert stop.value.code == 130
    assert "python forecast.py --resume run-001 --output-dir outputs" in capsys.readouterr().err
