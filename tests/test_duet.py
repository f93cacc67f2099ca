"""What users of duet.py rely on: offline, on the CPU. Real files are read where ../shared/data lies beside."""

import contextlib
import csv
import functools
import gc
import http.server
import json
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.ensemble import HistGradientBoostingClassifier

import duet

ROOT = Path(duet.__file__).resolve().parent
ETT = ROOT.parent / "shared/data"
TINY = ["--threads", "1", "--windows", "60", "--steps", "4", "--evaluations", "2", "--batch-size", "16",
        "--device", "cpu"]
new = duet.MultiDatasetPatchDuET.create_for_dataset
NAMES = ["indoor_temp", "outdoor_temp", "humidity", "pressure", "wind", "rain", "sun"]
QUANTILES = ["quantile 1", "quantile 2", "quantile 3"]


def make_baselines_fast(patch):
    """Hydra and boosting take the most of the time of runs that are not about them."""

    def chance(data):
        return np.full((len(data.splits["test"]), len(data.classes)), 1 / len(data.classes))

    patch.setattr(duet, "fit_hydra", chance)
    boosting = functools.partial(HistGradientBoostingClassifier, max_iter=2)
    patch.setattr("sklearn.ensemble.HistGradientBoostingClassifier", boosting)


@pytest.fixture
def no_hydra(monkeypatch):
    make_baselines_fast(monkeypatch)


@pytest.fixture
def few_windows(monkeypatch):
    """The original's data sets with at most 60 windows in each part."""
    original_dataset = duet.original_dataset

    def small(name, seed):
        data = original_dataset(name, seed)
        return duet.replace(data, splits={split: windows[:60] for split, windows in data.splits.items()})

    monkeypatch.setattr(duet, "original_dataset", small)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A random BERT of 32 dimensions in a local folder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    letters = [chr(i) for i in range(97, 123)]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
                                                + ["##" + letter for letter in letters]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    small = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(small).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def small_csv(tmp_path_factory):
    """1,600 rows: a date, a text, a constant and three numeric columns, with gaps."""
    path, rng = tmp_path_factory.mktemp("csv") / "plant.csv", np.random.default_rng(0)
    walk = np.cumsum(rng.normal(size=(1600, 2)), axis=0)
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["date", "site", "fixed", "tempC", "load", "noise"])
        for i, (a, b) in enumerate(walk):
            out.writerow([f"2024-01-{1 + i // 1440:02} {i // 60 % 24:02}:{i % 60:02}:00", "north", 7,
                          "" if i % 50 == 3 else a, b, rng.normal()])
    return path


@pytest.fixture(scope="session")
def finished(small_csv, tmp_path_factory):
    """(folder of a finished run on a CSV and an embedded data set with the shared model, its results)."""
    output = tmp_path_factory.mktemp("outputs")
    arguments = ["--data", str(small_csv), "--target", "load", "--dataset", "user_metrics", "--shared", "--runs", "2",
                 "--strategies", "none", "auto_expanding", "--output-dir", str(output), *TINY]
    with pytest.MonkeyPatch.context() as patch:
        make_baselines_fast(patch)
        return output / "duet/run-001", duet.main(arguments)


# --- Baselines --------------------------------------------------------------------------------------------------------


def test_hydra_is_its_plain_definition():
    x = torch.randn(2, 3, 40, dtype=torch.float64).float()
    features = iter(duet.hydra_features(x, groups=4, kernels=3).split(6, dim=1))  # two groups of three kernels
    generator = torch.Generator().manual_seed(0)
    for dilation, on_differences in ((1, False), (1, True), (2, False), (2, True), (4, False), (4, True)):
        weights = torch.randn(2, 3, 9, generator=generator)
        weights -= weights.mean(-1, keepdim=True)
        weights /= weights.abs().sum(-1, keepdim=True)
        columns = [torch.randperm(3, generator=generator)[:1] for _ in range(2)]
        source = (x[..., 1:] - x[..., :-1]) if on_differences else x
        largest, counts = torch.zeros(2, 2, 3), torch.zeros(2, 2, 3)
        for case, group, step in np.ndindex(2, 2, source.shape[-1]):
            mixed = source[case, columns[group]].sum(0)
            outputs = []
            for kernel in range(3):
                taps = [step + dilation * (k - 4) for k in range(9)]
                outputs.append(sum(float(weights[group, kernel, k]) * float(mixed[at])
                                   for k, at in enumerate(taps) if 0 <= at < len(mixed)))
            largest[case, group, int(np.argmax(outputs))] += max(outputs)
            counts[case, group, int(np.argmin(outputs))] += 1
        assert torch.allclose(next(features), largest.flatten(1), atol=1e-4)
        assert torch.equal(next(features), counts.flatten(1))
    assert not list(features)


def test_every_baseline_is_there_and_boosting_can_split_few_windows(tmp_path):
    lines = [f"{level},{level + 1},{level}:{'up' if level > 50 else 'down'}" for level in range(0, 100, 3)]
    (tmp_path / "Toy.ts").write_text("@classLabel true up down\n@data\n" + "\n".join(lines))
    (data,) = duet.load_datasets(duet.parse_args(["--data", str(tmp_path / "Toy.ts")]))
    accuracy = {name: duet.accuracy(outputs, data, "test") for name, outputs in duet.fit_baselines(data).items()}
    assert list(accuracy) == ["majority class", "logistic regression", "gradient boosting", "hydra"]
    assert accuracy["gradient boosting"] > 0.8
    assert accuracy["majority class"] < 0.7


# --- Model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy, counts", [("none", (571_459, 573_507, 577_603)),
                                              ("auto_expanding", (591_572, 594_644, 600_788)),
                                              ("frozen_bert", (576_324, 579_396, 585_540))])
def test_parameters_are_exactly_the_originals_and_hold_no_encoder(strategy, counts, tmp_path):
    save_file({name: torch.zeros(768) for name in NAMES}, tmp_path / "bert-base-uncased.safetensors")
    bert = {"cache_dir": tmp_path} if "bert" in strategy else {}
    for columns, count in zip((4, 5, 7), counts):
        model = new(
            c_in=columns, seq_len=96, num_classes=3, column_names=NAMES[:columns], strategy=strategy, **bert)
        assert sum(parameter.numel() for parameter in model.parameters()) == count
        assert not [name for name, _ in model.named_parameters() if name.startswith("embedder") and "layer" in name]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("fill", ["forward fill and mask", "zero fill and mask", "zero fill", "forward fill"])
@pytest.mark.parametrize("head", ["mean", "ordinal"])
def test_a_nan_never_reaches_the_output(shared, fill, head):
    one = duet.Dataset("a", NAMES[:3], None, None, None, QUANTILES, None, None, 96, NAMES[1], [-0.5, 0.5])
    model = duet.MultiDatasetPatchDuET(3, 96, "auto_expanding", shared, head, fill).train()
    model.add_dataset(one)
    x = torch.randn(4, 3, 96)
    x[0], x[1, 1], x[2, :, ::2], x[3, 1, -30:] = (torch.nan,) * 4
    logits = model(x, "a")
    assert logits.shape == (4, 3) and logits.isfinite().all()
    logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_the_mask_tells_a_missing_value_from_a_zero():
    x = torch.zeros(1, 4, 96)
    gap = x.clone()
    gap[..., 40:60] = torch.nan
    for fill, differs in (("forward fill and mask", True), ("zero fill and mask", True), ("zero fill", False)):
        model = new(4, fill=fill).eval()
        assert torch.equal(model(x), model(gap)) != differs
    values, mask = duet.values_and_mask(gap, "zero fill and mask")
    assert mask[..., 40:60].sum() == 0 and mask.sum() == 4 * 76 and not values.isnan().any()
    ramp = torch.arange(5.0).repeat(1, 1, 1)
    ramp[..., 0], ramp[..., 3] = torch.nan, torch.nan
    assert duet.values_and_mask(ramp, "forward fill")[0].tolist() == [[[0, 1, 2, 2, 4]]]
    values, mask = duet.values_and_mask(ramp)
    assert values.tolist() == [[[0, 1, 2, 2, 4]]]
    assert mask.tolist() == [[[0, 1, 1, 0, 1]]]


def test_patches_are_cut_as_by_hand():
    x = torch.randn(2, 3, 96)
    patches = duet.cut_patches(x)
    assert patches.shape == (2, 3, 11, 16)
    for i in range(11):
        assert torch.equal(patches[:, :, i], x[..., 8 * i : 8 * i + 16])
    for length in (5, 16, 17, 100):
        assert duet.cut_patches(torch.ones(1, 1, length)).sum() >= length  # nothing is cut off
    # The patch layer sees, for each channel, values then masks, as one flat patch.
    model = new(3).eval()
    seen = []
    model.patch_layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(x)
    assert torch.equal(seen[0][0, 4], torch.cat([x[0, :, 32:48].flatten(), torch.ones(48)]))


def test_the_vocabulary_grows_and_keeps_its_rows():
    model = new(2, column_names=["a", "b"], strategy="auto_expanding")
    table = model.embedder
    old = table.embedding.weight.detach().clone()
    table.add([f"name {i}" for i in range(1500)])
    assert table.embedding.weight.shape == (2000, 16)
    assert torch.equal(table.embedding.weight[:1000], old)
    model.set_dataset_columns(["name 1300", "a"])
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    before = table.embedding.weight.detach().clone()
    model(torch.randn(3, 2, 96)).sum().backward()
    optimizer.step()
    assert not torch.equal(table.embedding.weight[table.rows["name 1300"]], before[table.rows["name 1300"]])


def test_a_table_that_grows_after_the_optimizer_was_made_is_an_error():
    model = new(2, column_names=["a", "b"], strategy="auto_expanding")
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model(torch.randn(3, 2, 96)).sum().backward()
    optimizer.step()
    model.embedder.add([f"name {i}" for i in range(1500)])
    model.zero_grad()
    model(torch.randn(3, 2, 96)).sum().backward()
    with pytest.raises(RuntimeError):
        optimizer.step()


def test_a_strategy_is_one_entry(tmp_path, monkeypatch, no_hydra):
    class LengthEmbedder(duet.ColumnEmbedder):
        dim = 1

        def compute(self, name):
            return torch.tensor([float(len(name))])

    monkeypatch.setitem(duet.STRATEGIES, "length", LengthEmbedder)
    arguments = ["--dataset", "user_metrics", "--strategies", "none", "length", "--shared", *TINY]
    results = duet.main([*arguments, "--output-dir", str(tmp_path)])
    models = [row["model"] for row in results["benchmark"]["table"]]
    assert models[-4:] == ["none", "length", "none, shared", "length, shared"]


def test_columns_of_another_number_are_a_clear_error_and_shared_takes_them(tmp_path):
    weather = ["temperature", "humidity", "pressure", "wind_speed", "rainfall"]
    model = new(c_in=5, column_names=weather, strategy="auto_expanding")
    model.set_dataset_columns(["user_count", "session_duration", "page_views", "click_rate", "conversion_rate"])
    with pytest.raises(ValueError, match=r"4 columns for a model of 5.*shared=True"):
        model.set_dataset_columns(["price", "volume", "volatility", "market_cap"])
    shared = new(5, 96, 3, weather, "auto_expanding", shared=True).eval()
    for names in (["CPU_usage", "memory_usage", "disk_IO"], weather, [f"column {i}" for i in range(12)]):
        shared.set_dataset_columns(names)
        x = torch.randn(2, len(names), 96)
        logits = shared(x)
        assert logits.shape == (2, 3)
        order = torch.randperm(len(names))  # a column is known by its name, not by its place
        shared.set_dataset_columns([names[i] for i in order])
        torch.testing.assert_close(shared(x[:, order]), logits)
    shared.set_dataset_columns(["x", "y"], "items", duet.MeanHead(64, 4))  # no name clashes with a method of torch's
    assert shared(torch.randn(2, 2, 96), "items").shape == (2, 4)


def test_an_untrained_ordinal_head_is_persistence():
    limits = [-0.4, 0.3]
    one = duet.Dataset("a", NAMES[:4], None, None, None, QUANTILES, None, None, 96, NAMES[2], limits)
    model = duet.MultiDatasetPatchDuET(4, head="ordinal").eval()
    model.add_dataset(one)
    x = torch.randn(50, 4, 96)
    x[::3, 2, -5:] = torch.nan
    last = torch.where(x[:, 2, -1].isnan(), x[:, 2, -6], x[:, 2, -1])
    torch.testing.assert_close(model(x, "a").exp().sum(1), torch.ones(50))
    near = np.abs(last.numpy()[:, None] - limits).min(1) > 0.1
    assert (model(x, "a").argmax(1).numpy() == np.digitize(last, limits))[near].all() and near.sum() > 30


def test_a_step_is_forecast_from_changes_alone_so_that_a_new_level_does_not_matter():
    one = duet.Dataset("a", NAMES[:4], None, None, None, QUANTILES, None, None, 96, NAMES[2], [-0.4, 0.3])
    model = duet.MultiDatasetPatchDuET(4, head="ordinal").eval()
    model.add_dataset(one)
    torch.nn.init.normal_(model.head_of["a"].linear.weight)
    x = torch.randn(50, 4, 96)
    before = model(x, "a")
    model.head_of["a"].limits += 9.0
    torch.testing.assert_close(model(x + 9.0, "a"), before, rtol=1e-3, atol=1e-3)


def test_a_step_is_in_units_of_the_usual_change_in_the_window():
    head = duet.OrdinalHead(0, [0.5])
    torch.nn.init.constant_(head.linear.bias, 1.0)  # one usual change upward
    zigzag = torch.tensor([0.0, 1.0]).repeat(48)
    x = torch.stack([0.2 * zigzag, 0.8 * zigzag])[:, None] - torch.tensor([0.2, 0.8])[:, None, None]
    x[:, :, :3] = torch.nan  # what comes before the first value is no change
    assert head(torch.zeros(2, 1, 64), x).argmax(1).tolist() == [0, 1]


def test_where_the_target_never_changes_a_step_is_still_possible():
    head = duet.OrdinalHead(0, [0.15])
    torch.nn.init.constant_(head.linear.bias, 2.0)
    assert head(torch.zeros(1, 1, 64), torch.zeros(1, 1, 96)).argmax(1).tolist() == [1]


def test_where_the_target_is_missing_the_other_columns_are_classified_with_their_levels():
    one = duet.Dataset("a", NAMES[:4], None, None, None, QUANTILES, None, None, 96, NAMES[2], [-0.4, 0.3])
    model = duet.MultiDatasetPatchDuET(4, head="ordinal").eval()
    model.add_dataset(one)
    torch.nn.init.normal_(model.head_of["a"].without_target.weight)
    x = torch.randn(50, 4, 96)
    x[:25, 2] = torch.nan
    before = model(x, "a")
    x[:, 0] += 9.0
    change = (model(x, "a") - before).abs().amax(1)
    assert change[:25].min() > 0.1
    assert change[25:].max() < 1e-3


def test_overlapping_windows_are_trained_for_at_most_eight_epochs(small_csv):
    args = duet.parse_args(["--data", str(small_csv), "--target", "load", "--dataset", "user_metrics"])
    embedded, table = duet.load_datasets(args)
    size = len(table.splits["train"]) // 8
    assert duet.usual_steps(table, args) * size == pytest.approx(8 * len(table.splits["train"]), abs=size)
    assert duet.usual_steps(embedded, args) == 600


# --- The frozen encoder and its cache ---------------------------------------------------------------------------------


def test_a_letter_is_a_unit_only_after_a_quantity():
    words = {"phase_a": "phase a", "current_a": "current amperes", "tempC": "temperature celsius", "x_h": "x h",
             "delay_ms": "delay milliseconds", "lane_2_s": "lane 2 seconds"}
    assert {name: duet.name_to_words(name) for name in words} == words


def test_convolutions_see_each_window_normalized_by_itself():
    torch.manual_seed(0)
    x = torch.randn(4, 2, 96)
    x[0, 0, :20] = torch.nan
    values, mask = duet.values_and_mask(x)
    normalized = duet.normalize_windows(values, mask)
    assert torch.allclose(normalized[1].mean(-1), torch.zeros(2), atol=1e-5)
    assert torch.allclose(normalized[1].std(-1), torch.ones(2), atol=0.02)
    assert (normalized[0, 0, :20] == 0).all()
    assert duet.ConvNet(2, 3)(x).shape == (4, 3)


def test_names_become_words():
    words = {"CPU_usage": "cpu usage", "tempC": "temperature celsius", "indoor_temp": "indoor temperature",
             "Temperature[C]": "temperature celsius", "diskIO": "disk input output", "HUFL": "high useful load",
             "pageViews": "page views", "user-count": "user count", "CPUUsage": "cpu usage", "sensor12_hPa":
             "sensor 12 hectopascal", "load_kwh": "load kilowatt hours", "größe": "größe", "c": "c", "??": "??",
             "tBodyAcc": "t body acc", "hPa": "hpa"}
    assert {name: duet.name_to_words(name) for name in words} == words


def test_the_encoder_is_loaded_only_for_uncached_names_and_freed(encoder, tmp_path, monkeypatch):
    loads, load = [], duet.load_encoder

    def count(name):
        tokenizer, model = load(name)
        loads.append(weakref.ref(model))
        return tokenizer, model

    duet.FrozenBERTColumnEmbedder(encoder, tmp_path).embed(["wind"])  # an empty cache asks for the width
    monkeypatch.setattr(duet, "load_encoder", count)
    model = new(2, column_names=["temp", "indoor_temp"], strategy="frozen_bert", bert_model=encoder, cache_dir=tmp_path)
    gc.collect()
    assert len(loads) == 1
    assert loads[0]() is None  # gone from memory
    assert {name for name, _ in model.embedder.named_parameters()} == {"projection.weight", "projection.bias"}
    assert model.embedder.get_cache_stats() == {
        "cached_embeddings": 3, "bert_dim": 32, "bert_model": encoder,
        "cache_size_mb": round(model.embedder.cache_path.stat().st_size / 1e6, 3)}
    assert len(list(tmp_path.iterdir())) == 1  # one file for each encoder
    again = duet.FrozenBERTColumnEmbedder(encoder, tmp_path)
    vectors = again.embed(["indoor_temp", "temp"])
    assert len(loads) == 1
    assert torch.equal(vectors, model.embedder.embed(["temp", "indoor_temp"]).flip(0))
    torch.testing.assert_close(vectors.square().mean(1), torch.ones(2))


def test_without_an_encoder_the_row_is_not_run(tmp_path, monkeypatch, capsys, error_line, no_hydra):
    monkeypatch.setattr(duet.socket, "create_connection", lambda *_: (_ for _ in ()).throw(OSError))
    common = ["--dataset", "user_metrics", "--data-dir", tmp_path, "--output-dir", tmp_path / "out",
              "--bert-model", "no/such-encoder", *TINY]
    message = "--bert-model no/such-encoder cannot be loaded"
    assert message in error_line(duet, [*common, "--strategies", "frozen_bert"])
    assert not (tmp_path / "out").exists()
    results = duet.main([*map(str, common), "--strategies", "none", "frozen_bert"])
    assert message in results["notes"][0]
    assert [row["model"] for row in results["benchmark"]["table"]][-1] == "none"
    assert "Note: frozen_bert is not run" in capsys.readouterr().out
    assert message in error_line(duet, ["--columns", *common])


def test_the_study_of_missing_values_looks_for_no_encoder(monkeypatch):
    monkeypatch.setattr(duet, "load_encoder", lambda name: pytest.fail("the encoder is looked for"))
    args = duet.parse_args(["--nan-robustness", "--data-dir", "absent"])
    assert "frozen_bert" not in duet.find_strategies(args, [])


def test_prewarm_shows_what_is_cached(encoder, tmp_path, capsys, monkeypatch, error_line):
    monkeypatch.setattr(duet.socket, "create_connection", lambda *_: pytest.fail("the hub was asked"))
    names = tmp_path / "names.txt"
    names.write_text("temperature\n\nCPU_usage\ntemperature\n")
    cache = ["--data-dir", str(tmp_path), "--bert-model", encoder]
    stats = duet.main(["--prewarm", str(names), *cache])
    assert stats["cached_embeddings"] == 2
    assert stats["bert_dim"] == 32
    assert json.loads(capsys.readouterr().out) == stats
    assert "No such file" in error_line(duet, ["--prewarm", tmp_path / "absent", *cache])


# --- Data -------------------------------------------------------------------------------------------------------------


def test_embedded_classes_cannot_be_told_apart_by_one_threshold():
    from sklearn.tree import DecisionTreeClassifier

    for number, (name, recipe) in enumerate(duet.EMBEDDED.items()):
        data = duet.embedded_dataset(name, *recipe, 2000, [0, number])
        assert data.series.shape == (2000 * 96, len(recipe[0])) and data.columns == list(recipe[0])
        assert abs(np.isnan(data.series).mean() - 0.05) < 0.002
        assert np.bincount(data.labels).min() > 600
        features = duet.window_features(data, "train")
        stump = DecisionTreeClassifier(max_leaf_nodes=2).fit(features, data.labels[data.splits["train"]])
        assert stump.score(duet.window_features(data, "test"), data.labels[data.splits["test"]]) < 0.65


def test_schemas_differ_in_their_columns():
    schemas = [duet.synthetic_schema(i, 60) for i in range(12)]
    assert {3, 12} & {len(data.columns) for data in schemas} and all(3 <= len(d.columns) <= 12 for d in schemas)
    assert len({frozenset(data.columns) for data in schemas}) == 12
    assert sum("outdoor_temp" in data.columns for data in schemas) == 1  # names of one meaning, each in one schema
    assert np.array_equal(schemas[3].series, duet.synthetic_schema(3, 60).series, equal_nan=True)


def test_blocks_never_share_rows():
    train, validation = duet.split_blocks(13_859)
    assert 0.17 < len(validation) / 13_859 < 0.23
    apart = np.abs(train[:, None] - validation[None, :: 20]).min()
    assert apart > 96  # window i has rows i … i + 96, its label among them
    exact = np.zeros(13_859 + 97, bool)
    for start in train:
        exact[start : start + 97] = True
    assert not any(exact[start : start + 97].any() for start in validation)


def test_a_csv_is_prepared_and_its_classes_are_quantiles_of_the_next_value(small_csv, capsys):
    data = duet.csv_dataset(small_csv, "load", 4, "original")
    assert data.columns == ["tempC", "load", "noise"] and data.target == "load"
    said = capsys.readouterr().err
    assert "column 'site' left out: not numeric" in said
    assert "left out, constant, empty or too large in the training part, or the row's number: fixed" in said
    load = np.genfromtxt(small_csv, delimiter=",", skip_header=1, usecols=4)
    wanted = np.digitize(load[96:], np.percentile(load, (25, 50, 75)))
    assert np.array_equal(data.labels, wanted)
    train = np.zeros(1600, bool)
    for start in data.splits["train"]:
        train[start : start + 96] = True
    np.testing.assert_allclose(data.mean[1], load[train].mean(), rtol=1e-5)  # the scaling knows the training part alone
    held = duet.csv_dataset(small_csv, "load", 4, "holdout")
    first_test = held.splits["test"].min()
    assert held.splits["train"].max() + 97 <= first_test
    np.testing.assert_allclose(held.info["class_limits"], np.percentile(load[:first_test], (25, 50, 75)), rtol=1e-12)
    (own,) = duet.load_datasets(duet.parse_args(["--data", str(small_csv), "--target", "load", "--num-classes", "4"]))
    assert own.info["source"] == "real, protocol holdout" and own.info["sha256"] == held.info["sha256"]  # the default


def test_columns_that_are_no_numbers_are_left_out(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("time,time spent,none,big\n" + f"x,1,,{2**60}\n" * 3)
    numbers = duet.read_csv(tmp_path / "a.csv")
    assert list(numbers) == ["time spent", "none", "big"]  # what is empty is left out with what is constant
    assert "column 'time' left out: not numeric" in capsys.readouterr().err
    assert numbers["big"].dtype == np.float64


def test_a_target_of_few_values_is_the_classes(tmp_path, no_hydra):
    labels = np.random.default_rng(0).integers(0, 3, 2000)
    (tmp_path / "c.csv").write_text("a,x\n" + "\n".join(f"0.{label + 1},{i}.5" for i, label in enumerate(labels)))
    assert duet.csv_dataset(tmp_path / "c.csv", "a", 4, "holdout").classes == ["0.1", "0.2", "0.3"]
    (tmp_path / "b.csv").write_text("a,x\n" + "\n".join(f"{2 * label},{i}.5" for i, label in enumerate(labels)))
    data = duet.csv_dataset(tmp_path / "b.csv", "a", 4, "holdout")
    assert data.classes == ["0", "2", "4"]
    assert np.array_equal(data.labels, labels[96:])
    assert next(iter(duet.fit_baselines(data))) == "persistence"


@pytest.mark.parametrize(("text", "values"), [
    ('a,b\n"1,504",2\n"12,001,000",3\n7,4\n', [1504, 12001000, 7]), ("a;b\n50,13;1\n-2,5;2\n3;3\n", [50.13, -2.5, 3]),
    ("\ufeffa\tb\n1.5\t2\n3\t4\n", [1.5, 3]), ("a,b\n1,2\n3,4\n,\n,\n", [1, 3]),
    ("a;b\n1.504,5;1\n-12.001.000,25;2\n999,5;3\n", [1504.5, -12001000.25, 999.5]), ("a;b\n4.216;1\n", [4.216]),
    ("a,b\n$1.5,2\n-$.5,3\n", [1.5, -0.5]), ("a,b\n12%,2\n7 %,3\n", [12, 7]), ("sep=;\na;b\n1,5 €;2\n", [1.5]),
    ("Report,,\n\na,b,\n1,2,\n", [1]), ("# from a logger\na,b\n1,2\n", [1]),
    ("a ,b\n1 ,2\n", [1])])
def test_numbers_as_people_write_them_are_read(text, values, tmp_path):
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    numbers = duet.read_csv(tmp_path / "a.csv")
    assert numbers["a"].tolist() == values
    assert list(numbers) == ["a", "b"]


@pytest.mark.parametrize("cell", ['"0,504"', '"1,50"', '"-0,504"'])
def test_a_comma_that_separates_no_thousands_is_refused(cell, tmp_path):
    (tmp_path / "a.csv").write_text(f"a,b\n1,2\n2,3\n{cell},4\n")
    with pytest.raises(duet.UserError, match="a number is needed"):
        duet.read_csv(tmp_path / "a.csv")


@pytest.mark.parametrize("mark", [".", "?", "-", "..", "NA", "null", "unavailable", "#DIV/0!", "#NV"])
def test_marks_of_missing_values_are_no_texts(mark, tmp_path):
    (tmp_path / "a.csv").write_text(f"a;b\n1,5;2\n{mark};3\n{mark};4\n")
    assert np.isnan(duet.read_csv(tmp_path / "a.csv")["a"]).tolist() == [False, True, True]


def test_an_empty_row_between_others_has_missing_values(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n,\n3,4\n")
    assert np.isnan(duet.read_csv(tmp_path / "a.csv")["a"]).tolist() == [False, True, False]


def test_a_low_value_that_repeats_is_noted(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("a,b\n5,1\n-200,2\n-200,3\n")
    duet.read_csv(tmp_path / "a.csv")
    assert "the lowest value of 'a' repeats; if it marks missing values, empty these cells" in capsys.readouterr().err


def test_a_column_name_in_another_encoding_is_no_obstacle(tmp_path):
    (tmp_path / "a.csv").write_text("a,W/m²\n1,2\n", encoding="latin-1")
    assert duet.read_csv(tmp_path / "a.csv").to_numpy().tolist() == [[1, 2]]


@pytest.mark.parametrize("pattern", ["%d/%m/%Y", "%d.%m.%Y", "%m/%d/%Y", "%Y-%m-%d", "%d-%m-%Y %H:%M", "%d %b %Y"])
def test_dates_of_one_file_are_read_in_one_order(pattern, tmp_path, capsys):
    days = duet.pd.date_range("2024-01-01", periods=300).strftime(pattern)
    (tmp_path / "a.csv").write_text("date,a\n" + "\n".join(f"{day},{i}" for i, day in enumerate(days)))
    numbers = duet.read_csv(tmp_path / "a.csv")
    assert numbers["a"].tolist() == list(range(300))
    assert capsys.readouterr().err == ""


def test_dates_are_known_by_their_look(tmp_path, capsys):
    days = duet.pd.date_range("2024-01-01", periods=300).strftime("%d.%m.%Y")
    rows = [f"{day};{i},5" for i, day in enumerate(days)]
    (tmp_path / "a.csv").write_text("Zeitpunkt;a\n" + "\n".join(reversed(rows)))
    assert duet.read_csv(tmp_path / "a.csv")["a"].tolist() == [i + 0.5 for i in range(300)]
    assert "out of order: 299, repeated or after a gap: 0" in capsys.readouterr().err


def test_a_date_and_a_time_of_day_may_stand_in_two_columns(tmp_path):
    times = duet.pd.date_range("2024-02-27", periods=300, freq="h")
    rows = [f"{time:%H:%M},{time:%d.%m.%Y},{i},{i % 7}" for i, time in enumerate(times)]
    np.random.default_rng(0).shuffle(rows)
    (tmp_path / "a.csv").write_text("Time,Day,a,date_count\n" + "\n".join(rows))
    numbers = duet.read_csv(tmp_path / "a.csv")
    assert numbers["a"].tolist() == list(range(300))
    assert list(numbers) == ["a", "date_count"]
    text = "\n".join(f"{time:%H:%M},{i}" for i, time in enumerate(times))  # the time of day alone is no order
    (tmp_path / "b.csv").write_text(f"clock,a\n{text}")
    assert duet.read_csv(tmp_path / "b.csv")["a"].tolist() == list(range(300))


def test_dates_of_few_days_are_read_with_the_day_or_the_month_first(tmp_path, capsys):
    times = duet.pd.date_range("2024-03-01", periods=200, freq="h")
    for pattern in ("%d/%m/%Y %H:%M", "%m/%d/%Y %H:%M"):
        text = "\n".join(f"{time},{i}" for i, time in enumerate(times.strftime(pattern)))
        (tmp_path / "a.csv").write_text(f"t,a\n{text}")
        assert duet.read_csv(tmp_path / "a.csv")["a"].tolist() == list(range(200))
    assert capsys.readouterr().err == ""


def test_a_column_called_date_may_hold_plain_numbers(tmp_path, capsys):
    days = duet.pd.date_range("2024-01-01", periods=90).strftime("%Y%m%d")
    (tmp_path / "a.csv").write_text("Date,a\n" + "\n".join(f"{days[i]},{i}" for i in reversed(range(90))))
    assert duet.read_csv(tmp_path / "a.csv")["a"].tolist() == list(range(90))
    assert "out of order: 89" in capsys.readouterr().err


def test_rows_that_are_longer_than_the_header_are_refused(tmp_path, error_line):
    (tmp_path / "a.csv").write_text("a,b\n1,5,2\n1,6,3\n")  # decimal commas in a file with commas
    assert "Length of header" in error_line(duet, ["--data", tmp_path / "a.csv", "--target", "b"])


def test_dates_that_fall_or_repeat_or_have_gaps_are_noted_and_sorted(tmp_path, capsys):
    days = ["2024-01-05", "2024-01-04", "2024-01-02", "2024-01-02", "2024-01-01"]
    (tmp_path / "a.csv").write_text("day,a\n" + "\n".join(f"{day},{i}" for i, day in enumerate(days)))
    numbers = duet.read_csv(tmp_path / "a.csv")
    assert numbers["a"].tolist() == [4, 2, 3, 1, 0]
    assert numbers.index[0] == "2024-01-01"
    said = capsys.readouterr().err
    assert "dates of column 'day' out of order: 3, repeated or after a gap: 2; the rows are sorted" in said
    (tmp_path / "a.csv").write_text("day,a\n" + "\n".join(f"2024-01-0{i},{i}" for i in range(1, 6)))
    duet.read_csv(tmp_path / "a.csv")
    assert capsys.readouterr().err == ""


def test_the_last_validation_block_ends_before_the_test_part_and_large_values_keep_their_digits(tmp_path):
    rows = np.random.default_rng(0).normal(size=4300)
    (tmp_path / "a.csv").write_text("a\n" + "\n".join(f"{1e9 + value:.6f}" for value in rows))
    for protocol in ("original", "holdout"):
        data = duet.csv_dataset(tmp_path / "a.csv", "a", 3, protocol)
        assert data.splits["val"].max() + 96 < data.splits["test"].min()
        np.testing.assert_allclose(data.series[:, 0], (rows - np.array(data.mean) + 1e9) / data.std, atol=1e-5)


@pytest.mark.skipif(not (ETT / "ett/ETTh1.csv").exists(), reason="ETTh1.csv is not beside the checkout")
def test_etth1_is_the_originals_task_and_persistence_is_at_95():
    args = duet.parse_args(["--dataset", "etth1", "--data-dir", str(ETT)])
    (data,) = duet.load_datasets(args)
    assert data.info["windows"]["test"] == [1870, 1556, 39] and len(data.splits["test"]) == 3465
    raw = np.genfromtxt(ETT / "ett/ETTh1.csv", delimiter=",", skip_header=1, usecols=7)
    limits = np.percentile(raw, (33.33, 66.67))  # values that occur: rounding must not move one across
    assert np.array_equal(np.digitize(data.series[:, 6], data.limits), np.digitize(raw, limits))
    last = duet.window_features(data, "test")[:, 6]  # the last values are the first features
    persistence = np.mean(np.digitize(last, data.limits) == data.labels[data.splits["test"]])
    assert persistence == np.mean(np.digitize(raw[-3466:-1], limits) == np.digitize(raw[-3465:], limits))
    assert round(100 * persistence, 2) == 95.12


HEADER = "# a comment\n@problemName Toy\n@timeStamps false\n@univariate false\n@classLabel true up down\n@data\n"


def write_ts(folder, lines, name="Toy.ts", header=HEADER):
    (folder / name).write_text(header + "\n".join(lines) + "\n")
    return folder / name


def toy_cases(count):
    rng = np.random.default_rng(0)
    values = [[",".join(f"{value:.3f}" for value in rng.normal(size=length)) for length in (20 + i % 7, 20)]
              for i in range(count)]
    return [f"{a}:{b}:{'up' if i % 2 else 'down'}" for i, (a, b) in enumerate(values)]


def test_ts_files_with_missing_values_unequal_length_and_text_labels(tmp_path, no_hydra):
    write_ts(tmp_path, ["1,2,?:4,5,6:down", "7,8:9,?,11,12:up"])
    x, labels, _ = duet.read_archive([tmp_path / "Toy.ts"])
    assert labels == ["down", "up"]
    np.testing.assert_array_equal(x[0], [[np.nan, np.nan], [1, 4], [2, 5], [np.nan, 6]])
    np.testing.assert_array_equal(x[1], [[np.nan, 9], [np.nan, np.nan], [7, 11], [8, 12]])
    (tmp_path / "Toy.ts").unlink()
    write_ts(tmp_path, toy_cases(60), "Toy_TRAIN.ts")
    write_ts(tmp_path, [*toy_cases(30), "1,2:3,4:only here"], "Toy_TEST.ts")
    files = [str(tmp_path / f"Toy_{part}.ts") for part in ("TRAIN", "TEST")]
    (data,) = duet.load_datasets(duet.parse_args(["--data", *files]))
    assert data.splits["test"].tolist() == list(range(60, 91))
    assert data.info["windows"]["train"][1] == 0  # "only here"
    (data,) = duet.load_datasets(duet.parse_args(["--data", str(tmp_path)]))
    assert data.name == "Toy" and data.classes == ["down", "only here", "up"] and data.seq_len == 26
    assert data.splits["test"].tolist() == list(range(31)) and data.splits["train"].min() >= 31  # TEST is read first
    results = duet.main(["--data", str(tmp_path), "--strategies", "none", "--output-dir", str(tmp_path / "out"), *TINY])
    models = [row["model"] for row in results["benchmark"]["table"]]
    assert models == ["majority class", "logistic regression", "gradient boosting", "hydra", "conv", "conv + hydra",
                      "none"]


def test_ts_files_of_many_kinds_are_read(tmp_path):
    path = tmp_path / "Toy.ts"
    path.write_text("\ufeff%comment\n@classLabel true a b\n% more\n@data\n" + "1.5:a\n2.5:b\n" * 40, encoding="utf-8")
    (data,) = duet.load_datasets(duet.parse_args(["--data", str(path)]))
    assert data.seq_len == 1
    assert duet.accuracy(duet.fit_baselines(data)["logistic regression"], data, "test") == 1
    path.write_text("@classLabel false\n@data\n1,2:3,4\n5,6:7,8\n")
    assert duet.read_archive([path])[1] == ["?", "?"]
    path.write_text("@timestamps true\n@data\n(2024-01-01 00:00:00,1),(2024-01-02 00:00:00,2.5):a\n")
    assert duet.read_archive([path])[0].ravel().tolist() == [1, 2.5]
    path.write_text("@classLabel true a\n@data\n1,2:?\n")
    assert duet.read_archive([path])[1] == ["?"]


def test_the_older_archives_files_and_lower_case_parts_are_one_data_set(tmp_path):
    for part in ("train", "test"):
        (tmp_path / f"Gun_{part}.tsv").write_text("\n".join(f"{1 + i % 2}\t{i}\t{i % 2}\t3.5" for i in range(20)))
    (data,) = duet.load_datasets(duet.parse_args(["--data", str(tmp_path)]))
    assert (data.name, data.classes, data.seq_len, len(data.splits["test"])) == ("Gun", ["1", "2"], 3, 20)


def test_an_empty_cell_of_a_tsv_is_missing(tmp_path):
    (tmp_path / "Gun.tsv").write_text("1\t\t1\t\t3.5\n2\t?\t0\t1\t2\n")
    x, *_ = duet.read_archive([tmp_path / "Gun.tsv"])
    np.testing.assert_array_equal(x[0, :, 0], [np.nan, 1, np.nan, 3.5])


@pytest.mark.parametrize("line", ["  1  2.5  3.5  ", "1\t2.5\t3.5\t", "1, 2.5, 3.5"])
def test_blanks_around_a_case_are_no_values(line, tmp_path):
    (tmp_path / "Gun.txt").write_text(f"{line}\n" * 2)
    x, labels, _ = duet.read_archive([tmp_path / "Gun.txt"])
    assert labels == ["1", "1"]
    np.testing.assert_array_equal(x[0, :, 0], [2.5, 3.5])


def test_one_of_two_cases_of_a_class_is_for_validation():
    rest, chosen = duet.choose_windows(np.arange(16), np.repeat(np.arange(8), 2))
    assert (rest // 2).tolist() == (chosen // 2).tolist() == list(range(8))


@pytest.mark.parametrize("lines, header, message", [
    (["1,2,x:3,4,5:up"], HEADER, "could not convert string to float: 'x'"),
    (["1,2:3,4:up", "1,2:up"], HEADER, "not all with the same number of dimensions"),
    ([], HEADER, "no cases"),
    (["1,2:up"], "@timeStamps true\n@data\n(0,1,2):up\n", "could not convert string to float: '(0'"),
    (["1,2:3.5"], "@targetlabel true\n@data\n", "@targetlabel true: a regression file"),
    (["1,2:3:", "1,2:3:up"], HEADER, "cases without a class"),
    (["1,2:3:up", "1,2:3: ?"], HEADER, "cases without a class"),
    (["1,2:3"], "@classLabel false\n@data\n", "cases without a class"),
    (["up", "down"], HEADER, "no cases"),
    (["1,2:3:up"] * 20, HEADER, "too few windows of its classes: {'train': [13]"),
])
def test_bad_ts_files(tmp_path, error_line, lines, header, message):
    path = write_ts(tmp_path, lines, header=header)
    assert message in error_line(duet, ["--data", path, "--threads", "1", "--output-dir", tmp_path])


def test_downloads_are_checked(tmp_path, monkeypatch, capsys, error_line):
    site = tmp_path / "site"
    site.mkdir()
    (site / "good.csv").write_bytes(b"a,b\n1,2\n")
    monkeypatch.setattr(duet, "ETTH1_SHA256", duet.hashlib.sha256(b"a,b\n1,2\n").hexdigest())
    (site / "wrong.csv").write_bytes(b"a,b\n1,")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(site))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, message in (("absent.csv", "404"), ("wrong.csv", "its checksum is wrong")):
        monkeypatch.setattr(duet, "ETTH1_URL", f"http://127.0.0.1:{server.server_port}/{name}")
        arguments = ["--dataset", "etth1", "--data-dir", tmp_path, "--output-dir", tmp_path / "out"]
        assert message in error_line(duet, arguments)
        assert not list((tmp_path / "out").glob("*"))
    (tmp_path / "ett/ETTh1.csv").unlink()
    monkeypatch.setattr(duet, "ETTH1_URL", f"http://127.0.0.1:{server.server_port}/good.csv")
    assert duet.fetch_etth1(tmp_path).read_bytes() == b"a,b\n1,2\n"
    server.shutdown()
    server.server_close()
    (tmp_path / "ett/ETTh1.csv").unlink()  # no network: without --dataset a warning and the embedded data sets
    datasets = duet.load_datasets(duet.parse_args(["--data-dir", str(tmp_path), "--windows", "60"]))
    assert [data.name for data in datasets] == list(duet.EMBEDDED) and "etth1 is left out" in capsys.readouterr().err


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_and_pairs_the_seeds(finished):
    run_dir, results = finished
    assert results == json.loads((run_dir / "results.json").read_text())
    models = {path.stem for path in (run_dir / "models").glob("*.pt")}
    assert models == {f"{name}-{strategy}-{seed}" for name in ("plant", "user_metrics", "shared")
                      for strategy in ("none", "auto_expanding") for seed in (42, 43)}
    assert {"benchmark.png", "summary.md"} <= {path.name for path in run_dir.iterdir()}
    rows = {(row["dataset"], row["model"]): row for row in results["benchmark"]["table"]}
    assert rows["plant", "persistence"]["accuracy %"] and ("user_metrics", "persistence") not in rows
    records = results["benchmark"]["records"]
    frame = duet.pd.DataFrame(records).query("dataset == 'plant'").pivot_table("accuracy", "seed", "model")
    wanted = duet.write_cell(frame["auto_expanding"] - frame["none"], "+")
    assert rows["plant", "auto_expanding"]["minus none"] == wanted
    assert "±" in wanted
    assert rows["mean of all", "none, shared"]["minus own"] and rows["plant", "none"]["parameters"] == "569,541"
    assert "| plant | persistence |" in (run_dir / "summary.md").read_text()


def test_the_test_part_is_never_used_for_a_choice(small_csv, tmp_path, monkeypatch):
    asked, predict = [], duet.predict
    monkeypatch.setattr(duet, "predict", lambda model, data, part: asked.append(part) or predict(model, data, part))
    args = duet.parse_args([*TINY, "--steps", "8", "--evaluations", "4"])
    weights = []
    for change in (False, True):
        data = duet.csv_dataset(small_csv, "load", 3, "holdout")
        if change:
            data.labels[data.splits["test"]] = 0
            data.series[data.splits["test"].min() :] = 99.0
        model = duet.make_model(args, [data], "none", False, 1)
        duet.fit(model, [data], args, 1, tmp_path / f"{change}.pt")
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert set(asked) == {"val"}


@pytest.mark.parametrize("shared", [False, True])
def test_a_killed_run_goes_on_to_the_same_weights(shared, tmp_path, monkeypatch, no_hydra):
    arguments = ["--dataset", *duet.EMBEDDED, "--strategies", "auto_expanding", *TINY,
                 *["--shared"] * shared]
    whole = duet.main([*arguments, "--output-dir", str(tmp_path / "whole")])
    end, ends = duet.atomic_write, []

    @contextlib.contextmanager
    def stop(path):
        with end(path) as part:
            yield part
        ends.append(path.suffix == ".pt")
        if sum(ends) == (5 if shared else 3):  # within the shared model, or the second data set
            raise KeyboardInterrupt

    monkeypatch.setattr(duet, "atomic_write", stop)
    with pytest.raises(SystemExit) as stopped:
        duet.main([*arguments, "--output-dir", str(tmp_path / "killed")])
    assert stopped.value.code == 130
    monkeypatch.setattr(duet, "atomic_write", end)
    resumed = duet.main(["--resume", "--output-dir", str(tmp_path / "killed")])
    assert [r["accuracy"] for r in resumed["benchmark"]["records"]] == [
        r["accuracy"] for r in whole["benchmark"]["records"]]
    for path in sorted((tmp_path / "whole/duet/run-001/models").iterdir()):
        one, other = (torch.load(folder / "duet/run-001/models" / path.name, weights_only=True)
                      for folder in (tmp_path / "whole", tmp_path / "killed"))
        one, other = (state["best"] for state in (one, other))
        assert all(torch.equal(one[key], other[key]) for key in one if "extra" not in key)


def test_transfer_and_missing_values(tmp_path, monkeypatch, no_hydra):
    results = duet.main(["--transfer", "--synthetic-schemas", "3", "--strategies", "none", "auto_expanding", *TINY,
                         "--windows", "200", "--output-dir", str(tmp_path)])
    assert (tmp_path / "duet/run-001/transfer.png").exists()
    rows = {row["model"]: row for row in results["transfer"]["table"] if row["quantity"] == "accuracy %"}
    assert rows["none, pretrained"]["0%"] and rows["none, scratch"]["0%"] is None
    networks = {f"{strategy}, {start}" for strategy in ("none", "auto_expanding")
                for start in ("pretrained", "scratch")}
    assert set(rows) == {"gradient boosting", "hydra", *networks}
    for checkpoint, names in (("schema_03-none-pretrained-0.1-42", 3), ("sources-auto_expanding-42", 2)):
        model = duet.restore_model(tmp_path / f"duet/run-001/models/{checkpoint}.pt", "cpu")
        assert list(model.datasets) == ["schema_01", "schema_02", "schema_03"][:names]
        assert duet.predict(model, duet.synthetic_schema(0, 200), "test").shape[1] == 3
    holes, drop, training_shares = {}, duet.drop_values, []

    def record(x, share, missing):
        dropped = drop(x, share, missing)
        if not isinstance(share, float):  # in training, each window has its own
            training_shares.extend(share.flatten().tolist())
        elif share:
            holes.setdefault((share, missing), set()).add(dropped.isnan().numpy().tobytes())
        return dropped

    monkeypatch.setattr(duet, "drop_values", record)
    results = duet.main(["--nan-robustness", "--dataset", "user_metrics", *TINY, "--output-dir", str(tmp_path),
                         "--strategies", "auto_expanding"])
    assert len(holes) == 15 and all(len(same) == 1 for same in holes.values())  # the same gaps for every model
    assert len(training_shares) == 2 * 4 * 16  # two of the four rows train with gaps, for 4 steps of 16 windows
    assert 0 <= min(training_shares) < 0.1 and 0.4 < max(training_shares) <= 0.5
    table = results["nan_robustness"]["table"]
    assert [(row["missing"], row["model"]) for row in table].count(("in blocks", "auto_expanding, forward fill")) == 1
    assert len(table) == 12 and (tmp_path / "duet/run-002/nan_robustness.png").exists()


def test_quick_is_every_experiment_and_never_asks_the_hub(tmp_path, monkeypatch, no_hydra, few_windows):
    monkeypatch.setattr(duet.socket, "create_connection", lambda *_: pytest.fail("the hub was asked"))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("the network was asked"))
    monkeypatch.setattr(duet, "MISSING_SHARES", [0.0, 0.5])
    monkeypatch.setattr(duet, "LABEL_SHARES", [0.0, 0.1, 1.0])
    monkeypatch.delitem(duet.STRATEGIES, "random_names")
    results = duet.main(["--quick", "--steps", "2", "--batch-size", "8", "--threads", "1", "--data-dir", str(tmp_path),
                         "--output-dir", str(tmp_path)])
    assert {"nan_robustness", "transfer", "benchmark"} <= set(results)
    assert not results["notes"]
    assert {data["source"] for data in results["data"].values()} == {"original's synthetic"}


def test_what_quick_trains_is_learned(tmp_path):
    args = duet.parse_args(["--quick", "--device", "cpu"])
    data = duet.original_dataset("user_metrics", [4, 1])
    model = duet.make_model(args, [data], "none", False, 42)
    duet.fit(model, [data], args, 42, tmp_path / "model.pt")
    assert duet.accuracy(duet.predict(model, data, "test"), data, "test") > 0.8


def test_the_originals_data_are_sines_of_one_to_three_periods_with_noise():
    data = duet.original_dataset("user_metrics", 0)
    assert {part: len(some) for part, some in data.splits.items()} == {"train": 640, "val": 160, "test": 200}
    assert np.isnan(data.series).mean() == pytest.approx(0.03, abs=0.002)
    assert np.isnan(duet.original_dataset("temperature_sensors", 0).series).mean() == pytest.approx(0.05, abs=0.002)
    windows = np.nan_to_num(data.series.reshape(1000, 96, 5))
    for label in range(3):
        spectrum = np.abs(np.fft.rfft(windows[data.labels == label].mean((0, 2))))
        assert spectrum.argmax() == label + 1


def test_random_names_are_fixed_by_the_name_alone():
    first, second = duet.RandomNameEmbedder(), duet.RandomNameEmbedder()
    vectors = first.embed(["a", "b"])
    assert torch.equal(vectors[1], second.embed(["b"])[0])
    assert not torch.equal(vectors[0], vectors[1])
    assert sum(parameter.numel() for parameter in first.parameters()) == 17


def test_a_training_that_needs_gigabytes_is_announced(tmp_path, monkeypatch, capsys):
    data = duet.replace(duet.synthetic_schema(0, 60), seq_len=20_000)
    monkeypatch.setattr(duet, "load_datasets", lambda args: [data])
    monkeypatch.setattr(duet, "benchmark", lambda *_: pytest.fail("it began"))
    with pytest.raises(BaseException, match="it began"):
        duet.main(["--strategies", "none", "--output-dir", str(tmp_path)])
    assert "windows need about 13 GB in training" in capsys.readouterr().err


def test_few_labels_are_the_share_asked_for():
    data = duet.synthetic_schema(0, 1000)
    few = duet.with_labels(data, 0.1, 42)
    assert abs(len(few.splits["train"]) / len(data.splits["train"]) - 0.1) < 0.01
    assert set(few.splits["val"]) < set(data.splits["val"])
    assert np.array_equal(few.splits["test"], data.splits["test"])
    assert set(few.splits["train"]) != set(duet.with_labels(data, 0.1, 43).splits["train"])  # each seed has its own
    rare = duet.with_labels(duet.synthetic_schema(0, 60), 0.05, 42)
    assert all(set(rare.labels[rare.splits[part]]) == {0, 1, 2} for part in ("train", "val"))


def test_strategies_with_one_seed_begin_alike(encoder, tmp_path):
    args = duet.parse_args(["--bert-model", encoder, "--data-dir", str(tmp_path), "--device", "cpu"])
    data = duet.synthetic_schema(0, 60)
    for shared in (False, True):
        first, *others = [duet.make_model(args, [data], strategy, shared, 1) for strategy in duet.STRATEGIES]
        alike = first.encoder.state_dict()
        for model in others:
            assert all(torch.equal(value, alike[name]) for name, value in model.encoder.state_dict().items())


def test_whole_columns_are_missing_and_one_stays():
    for share in (0.1, 0.3, 0.5):
        missing = duet.drop_values(torch.zeros(4000, 5, 96), share, "whole columns").isnan()
        assert missing.float().mean().item() == pytest.approx(share, abs=0.02)
    missing = duet.drop_values(torch.zeros(200, 4, 96), 0.5, "whole columns").isnan()
    assert (missing.all(-1) == missing.any(-1)).all()
    assert (missing.all(-1).sum(1) == 2).all()
    assert missing.all(-1).float().mean(0).tolist() == pytest.approx([0.5] * 4, abs=0.1)
    assert duet.drop_values(torch.zeros(5, 1, 96), 0.9, "whole columns").isnan().sum() == 0


@pytest.mark.parametrize("missing", ["at random", "in blocks"])
def test_dropped_values_have_the_share_asked_for(missing):
    x = duet.drop_values(torch.zeros(200, 3, 96), 0.25, missing)
    assert abs(x.isnan().float().mean() - 0.25) < 0.02
    if missing == "in blocks":
        assert (x.isnan().sum(-1) == 24).all() and (x.isnan().float().diff(dim=-1).abs().sum(-1) <= 2).all()


def test_similar_names_are_found(encoder, tmp_path):
    results = duet.main(["--columns", "--dataset", "user_metrics", "--bert-model", encoder, "--data-dir", str(tmp_path),
                         "--output-dir", str(tmp_path), "--windows", "60"])
    (row,) = [row for row in results["nearest names"] if row["column"] == "temp"]
    assert row["nearest"] == "temperature"
    assert row["similarity"] == 1
    assert (tmp_path / "duet/run-001/columns.png").exists()


def test_prediction_matches_columns_by_name(finished, small_csv, tmp_path):
    run_dir, _ = finished
    with open(small_csv) as file:
        rows = list(csv.reader(file))[:301]
    path = tmp_path / "new.csv"

    def ask(checkpoint, change):
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([change(row) for row in rows])
        results = duet.main(["--predict", str(path), "--checkpoint", str(run_dir / "models" / checkpoint),
                             "--output-dir", str(tmp_path)])
        newest = max((tmp_path / "duet").iterdir())
        return results, list(csv.DictReader((newest / "predictions.csv").read_text().splitlines()))

    for checkpoint in ("plant-auto_expanding-42.pt", "shared-none-42.pt"):
        result, same = ask(checkpoint, lambda row: row)
        assert result["windows"] == len(same) == 205 and result["dataset"] == "plant"
        assert not [text for text in result["notes"] if "no column" in text]
        assert same[0]["date"].startswith("2024-01-01 01:35")
        assert abs(sum(float(same[0][f"p(quantile {k})"]) for k in (1, 2, 3)) - 1) < 1e-3
        assert ask(checkpoint, lambda row: row[::-1])[1] == same  # in another order
        missing, other = ask(checkpoint, lambda row: row[:4] + row[5:])  # without load
        assert [text for text in missing["notes"] if "no column load; their values count as missing" in text]
        assert other != same


def test_archive_files_train_convolutions_that_learn_and_predict(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("TRAIN", 40), ("TEST", 40)):
        lines = []
        for i in range(count):
            values = rng.normal(size=30) + 6 * (np.arange(30) == rng.integers(5, 25)) * (1 if i % 2 else -1)
            lines.append(",".join(f"{value:.3f}" for value in values) + (":up" if i % 2 else ":down"))
        write_ts(tmp_path, lines, f"Toy_{part}.ts", "@classLabel true up down\n@data\n")
    results = duet.main(["--data", str(tmp_path), "--strategies", "none", "--steps", "40", "--threads", "1",
                         "--output-dir", str(tmp_path / "out"), "--device", "cpu"])
    accuracy = {record["model"]: record["accuracy"] for record in results["benchmark"]["records"]}
    assert accuracy["conv"] > 0.8
    assert accuracy["conv + hydra"] > 0.8
    model = tmp_path / "out/duet/run-001/models/Toy-conv-42-0.pt"
    predicted = duet.main(["--predict", str(tmp_path / "Toy_TEST.ts"), "--checkpoint", str(model),
                           "--output-dir", str(tmp_path / "out")])
    rows = list(csv.DictReader((tmp_path / "out/duet/run-002/predictions.csv").read_text().splitlines()))
    right = np.mean([(row["class"] == "up") == bool(i % 2) for i, row in enumerate(rows)])
    assert predicted["windows"] == 40
    assert right > 0.8


def test_a_short_case_to_predict_is_padded_as_in_training(tmp_path, monkeypatch):
    write_ts(tmp_path, [f"{i % 2},{i}:{'ab'[i % 2]}" for i in range(40)])
    data = duet.archive_dataset("Toy", [tmp_path / "Toy.ts"])
    model = duet.ConvNet(1, 2)
    model.add_dataset(duet.replace(data, seq_len=4))
    seen = []
    monkeypatch.setattr(duet, "restore_model", lambda *_: model)
    monkeypatch.setattr(duet, "standardize", lambda series, mean, std: series.to_numpy(np.float32, copy=True))
    monkeypatch.setattr(model, "forward", lambda x, name: seen.extend(x[:, 0].tolist()) or x[:, 0, :2].nan_to_num())
    (tmp_path / "a.ts").write_text("@classLabel false\n@data\n1,2\n1,2,3,4,5\n")
    argv = ["--predict", str(tmp_path / "a.ts"), "--checkpoint", "a.pt", "--output-dir", str(tmp_path)]
    assert duet.main(argv)["windows"] == 2
    np.testing.assert_array_equal(seen, [[np.nan, np.nan, 1, 2], [2, 3, 4, 5]])
    rows = list(csv.DictReader((tmp_path / "duet/run-001/predictions.csv").read_text().splitlines()))
    assert [row["case"] for row in rows] == ["1", "2"]


@pytest.mark.parametrize("value", ["inf", "1e30", "1e300"])
def test_an_absurd_value_to_predict_counts_as_missing(value, finished, small_csv, tmp_path):
    lines = small_csv.read_text().splitlines()[:150]
    cells = lines[140].split(",")
    lines[140] = ",".join([*cells[:4], value, cells[5]])
    (tmp_path / "new.csv").write_text("\n".join(lines))
    duet.main(["--predict", str(tmp_path / "new.csv"), "--checkpoint", str(finished[0] / "models/plant-none-42.pt"),
               "--output-dir", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "duet/run-001/predictions.csv").read_text().splitlines()))
    assert all(0 <= float(row["p(quantile 1)"]) <= 1 for row in rows)


def test_the_best_epoch_is_kept(tmp_path, monkeypatch):
    data, args = duet.synthetic_schema(0, 60), duet.parse_args([*TINY, "--evaluations", "3"])
    accuracies, states = iter([0.4, 0.9, 0.5]), []
    model = duet.make_model(args, [data], "none", False, 1)

    def score(outputs, data, split):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(accuracies)

    monkeypatch.setattr(duet, "accuracy", score)
    duet.fit(model, [data], args, 1, tmp_path / "model.pt")
    assert all(torch.equal(value, states[1][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("head", "is_kept"), [("ordinal", True), ("mean", False)])
def test_training_that_only_harms_leaves_an_ordinal_head_as_it_was(head, is_kept, small_csv, tmp_path, monkeypatch):
    args = duet.parse_args(["--data", str(small_csv), "--target", "load", "--head", head, *TINY])
    data = duet.load_datasets(args)[0]
    model = duet.make_model(args, [data], "none", False, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    accuracies = iter([0.9, 0.4, 0.9])
    monkeypatch.setattr(duet, "accuracy", lambda *arguments: next(accuracies))
    duet.fit(model, [data], args, 1, tmp_path / "model.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) == is_kept


def records_of(models, datasets=("a", "b"), **columns):
    """Records of {model: accuracies [data sets]}; a model is named after its strategy."""
    rows = []
    for model, accuracies in models.items():
        for dataset, accuracy in zip(datasets, accuracies):
            rows.append(dict.fromkeys(duet.KEYS) | {
                "dataset": dataset, "model": model, "strategy": model.split(",")[0], "seed": 1, "accuracy": accuracy,
                "training": "shared" if "shared" in model else "own", "chance": 0.5, "quantity": "accuracy %",
                "parameters": "5"} | columns)
    return duet.pd.DataFrame(rows)


def test_pictures_show_each_model_with_its_interval(tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(duet, "plot_dots", lambda ax, names, means, errors: shown.update(
        names=list(names), means=means, errors=errors))
    seeds = [records_of({"learned": [0.8, 0.4], "none": [0.5, 0.6 + seed / 10], "majority class": [0.3, 0.3]},
                        seed=seed, share=share) for seed in (0, 1) for share in ("5%", "100%")]
    records = duet.pd.concat(seeds[::2])
    records = records.sort_values("model", kind="stable")  # not in the order of a table
    duet.plot_benchmark(duet.add_means(records), tmp_path / "benchmark.png")
    assert shown["names"] == ["a", "b", "mean of all"]
    assert shown["means"]["learned"] == pytest.approx([80, 40, 60])
    assert shown["means"]["none"] == pytest.approx([50, 65, 57.5])
    assert shown["errors"]["none"] == pytest.approx([0, 63.53, 31.77], abs=0.01)  # t of one degree of freedom: 12.71
    monkeypatch.setattr(duet, "plot_curve", lambda ax, x, runs, label, *_: shown.update(
        {(label, len(shown)): (list(x), duet.np.asarray(runs).tolist())}))
    shown.clear()
    duet.plot_shares(duet.pd.concat(seeds), "title", "share", ["dataset"], tmp_path / "shares.png")
    assert [label for label, _ in shown] == ["learned", "none", "majority class"] * 2
    shares, runs = shown["none", 4]
    assert shares == ["5%", "100%"]
    np.testing.assert_allclose(runs, [[60, 60], [70, 70]])


def test_differences_are_paired_by_seed():
    parts = [records_of({"none": [value]}, seed=seed, share="10%", training=training) for training, seed, value in (
        ("pretrained", 1, 0.9), ("pretrained", 2, 0.8), ("scratch", 1, 0.5), ("scratch", 2, 0.6))]
    pairs = duet.difference(duet.pd.concat(parts), "training", "scratch")
    assert pairs["accuracy"].round(6).tolist() == [0.4, 0.2]
    assert set(pairs["training"]) == {"pretrained"}
    assert set(pairs["quantity"]) == {"minus scratch"}


def test_the_originals_etth1_lacks_five_percent(tmp_path):
    (tmp_path / "a.csv").write_text("OT,b\n" + "\n".join(f"{i % 97}.5,{i % 89}" for i in range(3000)))
    data = duet.csv_dataset(tmp_path / "a.csv", "OT", 3, "original", missing=0.05)
    assert np.isnan(data.series).mean() == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize("arguments, message", [
    (["--dataset", "no_such"], "invalid choice: 'no_such'"),
    (["--data", "no/such.csv"], "No such file or directory: 'no/such.csv'"),
    (["--data", "CSV"], "a numeric --target None; it has 1600 rows of fixed, tempC, load, noise"),
    (["--data", "CSV", "--target", "lod"], "a numeric --target lod; it has 1600 rows of fixed, tempC"),
    (["--data", "CSV", "--target", "site"], "a numeric --target site; it has"),
    (["--data", "CSV", "--target", "fixed"], "too few windows of its classes: {'train': [675]"),
    (["--data", "SHORT", "--target", "a"], "needs 1296 rows and a numeric --target a; it has 100 rows of a"),
    (["--data", "TEXT", "--target", "a"], "column 'a': 'oops', a number is needed"),
    (["--data", "WORDS", "--target", "a"], "needs 1296 rows and a numeric --target a"),
    (["--data", "EMPTY"], "no .ts, .tsv or .txt file in this folder"),
    (["--data", "HEADER", "--target", "a"], "needs 1296 rows and a numeric --target a"),
    (["--data", "LATIN", "--target", "a"], "it has 1 rows of aé, b; classes that are texts must be numbered"),
    (["--data", "SEMICOLON", "--target", "a"], "it has 1 rows of a, b"),
    (["--transfer", "x", "--data", "HUGE", "--target", "a"], "--transfer needs two data sets"),
    (["--dataset", "etth1", "--data-dir", "OTHER"], "ETTh1.csv: its checksum is wrong"),
    (["--predict", "CSV"], "--predict needs --checkpoint"),
    (["--columns", "--checkpoint", "MODEL"], "--predict needs --checkpoint"),
    (["--predict", "CSV", "--checkpoint", "no.pt"], "no.pt"),
    (["--predict", "CSV", "--checkpoint", "CSV"], "damaged, or not a checkpoint of duet.py"),
    (["--predict", "CSV", "--checkpoint", "TENSOR"], "damaged, or not a checkpoint of duet.py"),
    (["--predict", "CSV", "--checkpoint", "FOREIGN"], "not a model of this duet.py"),
    (["--predict", "CSV", "--checkpoint", "CARDLESS"], "not a model of this duet.py"),
    (["--predict", "SHORT", "--checkpoint", "MODEL"], "needs 96 rows of tempC, load, noise"),
    (["--predict", "no.csv", "--checkpoint", "MODEL"], "no.csv"),
    (["--transfer", "nothing", "--dataset", *duet.EMBEDDED], "the name of one of them: ['temperature_sensors', "),
    (["--seed", "5000000000"], "--seed: at least 0 and below 2**31"),
    (["--num-classes", "0"], "--num-classes: invalid positive value"),
    (["--seed", "-1"], "--seed: at least 0 and below 2**31"),
    (["--threads", "-1"], "--threads: invalid positive value"),
    (["--target", "HULL"], "--target is for the CSV files of --data"),
    (["--data", "CSV", "COPY", "--target", "load"], "data sets must have different names"),
    (["--steps", "0"], "--steps: invalid positive value"),
    (["--device", "tpu"], "unknown device 'tpu'"),
    (["--resume"], "no unfinished run"),
    (["--resume", "--steps", "5"], "no unfinished run"),
    (["--num-class", "5"], "unrecognized arguments: --num-class"),
])
def test_errors_are_one_line(arguments, message, finished, small_csv, tmp_path, error_line):
    files = {"SHORT": "a\n" + "1\n2\n" * 50, "TEXT": "a\n1\n2\n3\noops\n5\n6\n", "WORDS": "a\nx\ny\n",
             "HEADER": "a\n", "LATIN": "a\xe9,b\n1,2\n", "SEMICOLON": "a;b\n1;2\n",
             "HUGE": "a,b\n" + "1.5,1e200\n2.5,-1e200\n3.25,1e200\n" * 500}
    for name, text in files.items():
        (tmp_path / f"{name}.csv").write_text(text, encoding="latin-1")
    for name, state in (("TENSOR", torch.ones(2)), ("FOREIGN", {"model": {}}), ("CARDLESS", {"finished": True})):
        torch.save(state, tmp_path / f"{name}.csv")
        files[name] = ""
    (tmp_path / "empty").mkdir()
    (tmp_path / "other/ett").mkdir(parents=True)
    (tmp_path / "other/ett/ETTh1.csv").write_text("OT\n1\n")
    (tmp_path / small_csv.name).write_text(small_csv.read_text())
    places = {name: tmp_path / f"{name}.csv" for name in files}
    places |= {"CSV": small_csv, "COPY": tmp_path / small_csv.name, "EMPTY": tmp_path / "empty",
               "OTHER": tmp_path / "other", "MODEL": finished[0] / "models/plant-none-42.pt"}
    argv = ["--threads", "1", *(places.get(word, word) for word in arguments)]
    line = error_line(duet, [*argv, "--output-dir", tmp_path / "out"])
    assert line.startswith("duet.py: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()  # no empty run is left behind


def test_a_loss_that_is_not_finite_is_one_line(tmp_path, error_line, no_hydra):
    arguments = ["--dataset", "user_metrics", "--strategies", "none", *TINY, "--output-dir", tmp_path]
    assert "the loss is not finite" in error_line(duet, [*arguments, "--learning-rate", "1e30"])


def test_a_model_made_by_hand_is_fitted_saved_and_read(tmp_path):
    data, args = duet.synthetic_schema(0, 60), duet.parse_args(TINY)
    model = duet.MultiDatasetPatchDuET(len(data.columns), strategy="auto_expanding", head="ordinal")
    model.add_dataset(data)
    duet.fit(model, [data], args, 42, tmp_path / "hand.pt")
    again = duet.restore_model(tmp_path / "hand.pt", "cpu")
    assert list(again.datasets) == [data.name]
    assert np.array_equal(duet.predict(again, data, "test"), duet.predict(model, data, "test"))
    with pytest.raises(ValueError, match=r"columns for a model of 5.*shared=True"):
        new(5).add_dataset(duet.synthetic_schema(1, 60))


def test_figures_carry_their_interval_and_the_originals_stand_beside_its_protocol(tmp_path, no_hydra, few_windows):
    assert duet.write_cell(np.array([0.01, 0.02, 0.03]), "+") == "+2.00 ± 2.48"
    assert duet.write_cell(np.array([0.01, 0.011, 0.012]), "+") == "+1.10 ± 0.25 *"
    assert duet.write_cell(np.array([0.9])) == "90.00" and "*" not in duet.write_cell(np.array([0.9, 0.91]))
    command = ["--dataset", "user_metrics", "--strategies", "none", *TINY, "--output-dir", str(tmp_path)]
    original = ["--protocol", "original"]  # the embedded data of this script are not the original's
    for protocol, claim in ((original, 99.0), ([], None)):
        results = duet.main([*command, *protocol])
        assert results["benchmark"]["table"][-1].get("original %") == claim
    records = records_of({"none": [0.5, 0.5], "none, shared": [0.5, 0.5]})
    assert list(duet.add_means(records)["dataset"]) == ["a", "b"] * 2 + ["mean of all"] * 2
    many = records_of({"none": [0.5] * 7}, datasets="abcdefg")
    assert list(duet.add_means(many)["dataset"]) == ["mean of all"]


def test_a_damaged_checkpoint_and_other_data_are_told(small_csv, tmp_path, capsys, monkeypatch, error_line, no_hydra):
    arguments = ["--data", str(small_csv), "--target", "load", "--strategies", "none", *TINY]
    arguments += ["--output-dir", str(tmp_path)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(duet, "evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        duet.main(arguments)
    assert "python duet.py --resume --output-dir" in capsys.readouterr().err
    text = small_csv.read_text()
    small_csv.write_text(text.replace("north,7", "north,7", 1) + "2024-01-02,north,7,1,1,1\n")
    assert "the run began with other data" in error_line(duet, ["--resume", "--output-dir", tmp_path])
    small_csv.write_text(text)
    model = tmp_path / "duet/run-001/models/plant-none-42.pt"
    model.write_bytes(b"PK torn")
    assert "damaged" in error_line(duet, ["--resume", "--output-dir", tmp_path])
    (tmp_path / "file").write_text("")
    assert "file" in error_line(duet, [*arguments, "--output-dir", tmp_path / "file"])


def test_cells_that_look_like_dates_are_errors_in_a_column_of_numbers(tmp_path):
    for cell in ("1.2.3", "1-2", "12:30"):
        (tmp_path / "a.csv").write_text("a,b\n" + "1,2\n" * 20 + f"{cell},2\n")
        with pytest.raises(duet.UserError, match=f"'{cell}', a number is needed"):
            duet.read_csv(tmp_path / "a.csv")


def test_unix_times_that_fall_are_sorted(tmp_path):
    (tmp_path / "a.csv").write_text("timestamp,a\n" + "".join(f"{1467331200 + i},{i}\n" for i in range(90, 0, -1)))
    assert duet.read_csv(tmp_path / "a.csv")["a"].tolist() == list(range(1, 91))


@pytest.mark.parametrize("share, classes", [(0.5, 3), (0.9, 2)])
def test_no_class_is_empty_where_many_values_are_equal(share, classes, tmp_path):
    rng = np.random.default_rng(0)
    rain = np.where(rng.random(2000) < share, 0, rng.gamma(1, 1, 2000))
    (tmp_path / "a.csv").write_text("a\n" + "\n".join(map(str, rain)))
    data = duet.csv_dataset(tmp_path / "a.csv", "a", 3, "holdout")
    train = data.info["windows"]["train"]
    assert len(train) == classes
    assert min(train) > 50


def test_classes_that_are_large_numbers_keep_their_names(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n" + "".join(f"{1000001 + i % 2},{i % 7}\n" for i in range(2000)))
    assert duet.csv_dataset(tmp_path / "a.csv", "a", 3, "holdout").classes == ["1000001", "1000002"]


def test_a_class_that_training_lacks_is_noted(tmp_path, capsys):
    (tmp_path / "a_TRAIN.ts").write_text("1,2:x\n2,1:y\n" * 9)
    (tmp_path / "a_TEST.ts").write_text("1,2:x\n2,1:z\n" * 9)
    duet.archive_dataset("a", [tmp_path / "a_TRAIN.ts", tmp_path / "a_TEST.ts"])
    assert "training lacks a class" in capsys.readouterr().err


def test_a_test_part_of_one_class_is_noted(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("a\n" + "".join(f"{i + i % 7}\n" for i in range(2000)))  # it rises
    data = duet.csv_dataset(tmp_path / "a.csv", "a", 3, "holdout")
    assert data.info["windows"]["test"][:2] == [0, 0]
    assert "the test part has one class only" in capsys.readouterr().err


def test_the_number_of_a_row_is_no_column(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("rownames,a\n" + "".join(f"{i},{i % 97}.5\n" for i in range(2000)))
    assert duet.csv_dataset(tmp_path / "a.csv", "a", 3, "holdout").columns == ["a"]
    assert "or the row's number: rownames" in capsys.readouterr().err


def test_an_identifier_with_a_dash_is_no_date(tmp_path):
    days = duet.pd.date_range("2024-01-01", periods=60)
    rows = [f"2015-{i:06},{day:%Y-%m-%d},{i}" for i, day in enumerate(days)]
    (tmp_path / "a.csv").write_text("id,date,a\n" + "\n".join(reversed(rows)))
    assert duet.read_csv(tmp_path / "a.csv")["a"].tolist() == list(range(60))


def test_dates_that_several_series_share_are_counted(tmp_path, capsys):
    days = duet.pd.date_range("2024-01-01", periods=50).strftime("%Y-%m-%d")
    (tmp_path / "a.csv").write_text("date,a\n" + "".join(f"{day},{place}\n" for place in range(4) for day in days))
    duet.read_csv(tmp_path / "a.csv")
    assert "out of order: 3, repeated or after a gap: 150" in capsys.readouterr().err


def test_labels_in_another_encoding_stay_apart(tmp_path):
    (tmp_path / "a.ts").write_bytes("1,2:Bär\n2,1:Bör\n".encode("cp1252"))
    assert len(set(duet.read_archive([tmp_path / "a.ts"])[1])) == 2


def test_an_ordinal_head_has_the_limits_of_its_own_data_set(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        values = rng.gamma(1 if name == "a" else 9, 1, 2000)
        (tmp_path / f"{name}.csv").write_text("y\n" + "\n".join(map(str, values)))
    args = duet.parse_args(["--head", "ordinal", "--device", "cpu"])
    first, second = [duet.csv_dataset(tmp_path / f"{name}.csv", "y", 3, "holdout") for name in "ab"]
    model = duet.make_model(args, [first], "none", True, 0)
    model = duet.add_new_dataset(model, second, ["a"])
    assert model.head_of["b"].limits[1:-1].tolist() == pytest.approx(second.limits)
    assert torch.equal(model.head_of["a"].linear.weight, model.head_of["b"].linear.weight)


@pytest.mark.parametrize(("target", "head"), [("y", duet.OrdinalHead), ("code", duet.MeanHead)])
def test_quantiles_of_a_target_are_forecast_and_its_few_values_are_not(target, head, tmp_path):
    rng = np.random.default_rng(0)
    rows = [f"{value},{code}" for value, code in zip(rng.random(2000), rng.integers(3, size=2000))]
    (tmp_path / "a.csv").write_text("y,code\n" + "\n".join(rows))
    args = duet.parse_args(["--data", str(tmp_path / "a.csv"), "--target", target, "--device", "cpu"])
    data = duet.csv_dataset(tmp_path / "a.csv", target, 3, "holdout")
    assert type(duet.make_model(args, [data], "none", False, 0).head_of["a"]) is head


def test_more_than_six_data_sets_have_their_means_in_the_table_and_a_strategy_runs_once(tmp_path, no_hydra):
    results = duet.main(["--synthetic-schemas", "7", "--strategies", "none", "random_names", "none",
                         "--output-dir", str(tmp_path), *TINY])
    table = results["benchmark"]["table"]
    assert {row["dataset"] for row in table} == {"mean of all"}
    assert [row["model"] for row in table][-2:] == ["none", "random_names"]
    assert len([row for row in results["benchmark"]["records"] if row["strategy"] == "none"]) == 7


def test_quick_takes_a_single_data_set(tmp_path, no_hydra, few_windows):
    results = duet.main(["--quick", "--dataset", "user_metrics", "--strategies", "none", "--output-dir", str(tmp_path),
                         *TINY])
    assert "transfer" not in results
