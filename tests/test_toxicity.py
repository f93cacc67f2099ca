"""What users of toxicity.py rely on: offline, on the CPU, with real dendrites. Real tweets where ../shared/data is."""

import contextlib
import gzip
import io
import json
import os
import pdb
import pty
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SHARED, kill_when, run_notebook
from torch import nn

import toxicity

TWEETS = SHARED / "hate_speech/labeled_data.csv"
CPU = torch.device("cpu")
SMALL = ["--dataset", "embedded", "--from-scratch", "--sample-size", "400", "--max-length", "24", "--device", "cpu"]
DENDRITES = [*SMALL, "--epochs", "4", "--switch-every", "2"]
FILES = {"arguments.json", "results.json", "summary.md", "best_model.pt", "model_int8.pt", "learning_curves.png",
         "pr_roc.png"}


@pytest.fixture(autouse=True)
def no_left_over_notes(monkeypatch):
    """Notes of one test are not those of the next."""
    monkeypatch.setattr(toxicity, "NOTES", [])


@pytest.fixture
def fast(monkeypatch):
    """Runs without pictures, where a test is not about them."""
    for name in ("plot_learning", "plot_curves"):
        monkeypatch.setattr(toxicity, name, lambda *arguments: None)


@pytest.fixture(scope="session")
def dendritic(tmp_path_factory):
    """(output folder, results) of a run with dendrites, started on a pseudo-terminal in an empty working folder."""
    folder = tmp_path_factory.mktemp("working")
    parent, child = pty.openpty()  # with a terminal the library would open its debugger and wait
    command = [sys.executable, str(ROOT / "toxicity.py"), *DENDRITES]
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as here, for the same last bits
    process = subprocess.Popen(command, cwd=folder, env=threads, stdin=child, stdout=child, stderr=child)
    os.close(child)
    chunks = []

    def read():
        try:
            while chunk := os.read(parent, 65536):
                chunks.append(chunk)
        except OSError:  # the other end was closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    code = process.wait(timeout=240)
    reader.join()
    os.close(parent)
    printed = b"".join(chunks).decode()
    assert code == 0, printed
    assert "(Pdb)" not in printed
    assert "Press Enter" not in printed
    assert [path.name for path in folder.iterdir()] == ["outputs"]  # nothing outside the run's folder
    return folder / "outputs", json.loads((folder / "outputs/toxicity/run-001/results.json").read_text())


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """(output folder, results) of a run without dendrites, in this process."""
    output = tmp_path_factory.mktemp("plain")
    results = toxicity.main([*SMALL, "--arm", "plain", "--epochs", "3", "--output-dir", str(output)])
    return output, results


@pytest.fixture(scope="session")
def giant(plain, tmp_path_factory):
    """A folder with a pretrained BERT."""
    folder = tmp_path_factory.mktemp("giant") / "hf"
    toxicity.main(["--export-hf", str(folder), "--output-dir", str(plain[0])])
    return folder


def model_of(run, name="best_model.pt"):
    return run[0] / "toxicity/run-001" / name


def load_model(run, name="best_model.pt"):
    return toxicity.load_classifier(model_of(run, name), CPU)


def rows_of(results):
    """{model: its row} of the results of one run."""
    return {row["model"]: row for row in results["models"]}


def write_csv(path, texts, labels):
    pd.DataFrame({"text": texts, "toxicity": labels}).to_csv(path, index=False)
    return path


def load(*argv):
    return toxicity.load_data(toxicity.parse_args([str(word) for word in argv]))


def read(path, *argv):
    """(texts, labels) of a file in its order."""
    args = toxicity.parse_args(["--data", str(path), *argv])
    table, _ = toxicity.read_source(args)
    return table["text"].tolist(), table["label"].tolist()


# --- Data -------------------------------------------------------------------------------------------------------------


def test_embedded_comments_cannot_be_told_by_single_words():
    texts, labels = toxicity.generate_comments(20_000, seed=3)
    again, _ = toxicity.generate_comments(20_000, seed=3)
    assert texts == again
    assert 0.05 < labels.mean() < 0.07
    for word in ("clown", "idiot", "bat", "congratulations", "blood"):
        with_word = labels[[word in text.lower() for text in texts]]
        assert len(with_word) > 20, word
        assert 0.02 < with_word.mean() < 0.8, word


def test_no_text_is_on_two_sides_and_the_splits_are_stratified():
    texts = [f"Text {i // 3}" if i % 3 else f"text  {i // 3} " for i in range(3000)]  # each stands there three times
    labels = np.repeat(np.arange(1000) % 10 == 0, 3).astype(np.int64)
    for size in (0, 400, 5000):
        splits = toxicity.split_texts(pd.DataFrame({"text": texts, "label": labels}), size, seed=1)
        keys = [set(splits[split]["text"].map(toxicity.text_key)) for split in toxicity.SPLITS]
        assert not keys[0] & keys[1]
        assert not (keys[0] | keys[1]) & keys[2]
        assert all(abs(part["label"].mean() - 0.1) < 0.01 for part in splits.values())
        assert len(keys[0]) == (400 if size == 400 else 800)
        assert len(splits["train"]) == (400 if size == 400 else 2400)


KINDS = ["csv", "csv.gz", "tsv", "semicolon.csv", "escaped.csv", "utf16.csv", "jsonl", "json", "of.json.csv",
         "columns.json", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_each_kind_give_the_same_data(kind, tmp_path):
    texts, labels = toxicity.generate_comments(300, seed=5)
    texts = [f'{text}\n"quoted", so; and\tso' for text in texts]
    frame = pd.DataFrame({"comment": texts, "toxic": labels})
    path = tmp_path / f"comments.{kind}"
    if kind == "parquet":
        frame.to_parquet(path)
    elif kind == "columns.json":
        frame.to_json(path)
    elif kind.startswith("json"):
        frame.to_json(path, orient="records", lines=kind == "jsonl")
    elif kind == "escaped.csv":
        rows = [text.replace('"', '\\"') for text in texts]
        path.write_text("comment,toxic\n" + "".join(f'"{row}",{label}\n' for row, label in zip(rows, labels)))
    else:
        separator = {"tsv": "\t", "semicolon.csv": ";"}.get(kind, ",")
        frame.to_csv(path, sep=separator, index=False, encoding="utf-16" if kind == "utf16.csv" else "utf-8")
    assert read(path, "--text-column", "comment", "--label-column", "toxic") == (texts, labels.tolist())


@pytest.mark.parametrize("separator", ["\t", ","])
def test_a_file_without_quoting_keeps_all_its_rows(separator, tmp_path):
    texts = ['"hello world', 'fine "bar" text', '"quote" she said', "nothing", 'he said "no', "\\"] * 9
    lines = [f"{text}{separator}{i % 2}" for i, text in enumerate(texts)]
    (tmp_path / "a.csv").write_text("\n".join([f"text{separator}toxicity", *lines]))
    assert read(tmp_path / "a.csv") == (texts, [i % 2 for i in range(54)])


def test_a_file_that_is_not_utf8_is_read_as_windows_1252(tmp_path, capsys):
    texts = [f"schön – {i} €" for i in range(40)]
    pd.DataFrame({"text": texts, "toxicity": [0, 1] * 20}).to_csv(tmp_path / "a.csv", encoding="cp1252")
    assert read(tmp_path / "a.csv")[0] == texts
    assert "a.csv is not UTF-8 and is read as Windows-1252" in capsys.readouterr().err


def test_columns_of_a_file_without_a_header_are_numbers(tmp_path):
    lines = ["spam\tbuy, buy, buy", "ham\twell", "ham\t7"] * 20
    (tmp_path / "SMSSpamCollection").write_text("\n".join(lines))
    flags = ["--text-column", "1", "--label-column", "0", "--positive-label", "spam"]
    assert read(tmp_path / "SMSSpamCollection", *flags) == (["buy, buy, buy", "well", "7"] * 20, [1, 0, 0] * 20)


def test_without_a_header_a_label_may_look_like_the_number_of_a_column(tmp_path):
    (tmp_path / "a.tsv").write_text("1\tyou fool\n0\tgood day\n" * 20)
    flags = ["--text-column", "1", "--label-column", "0", "--positive-label", "1"]
    assert read(tmp_path / "a.tsv", *flags) == (["you fool", "good day"] * 20, [1, 0] * 20)


def test_few_texts_with_line_breaks_in_quotes_stay_whole(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"Hello, you\nfool",toxic\n"Oh, no\nwell",ok\n')
    assert len(toxicity.read_table(tmp_path / "a.csv")) == 2


def test_a_header_may_be_numbers(tmp_path):
    pd.DataFrame([("good", 0), ("bad", 1)] * 20).to_csv(tmp_path / "a.csv", index=False)
    texts, _ = read(tmp_path / "a.csv", "--text-column", "0", "--label-column", "1")
    assert texts == ["good", "bad"] * 20


def test_empty_rows_are_no_data(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["good", "bad"] * 20, [0, 1] * 20)
    path.write_text(path.read_text() + ",\n" * 3)
    assert read(path)[0] == ["good", "bad"] * 20


def test_nested_objects_are_columns(tmp_path):
    rows = [{"tweet": {"text": f"text {i}", "user": None}, "annotation": {"label": [str(i % 2)]}} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--text-column", "tweet.text", "--label-column", "annotation.label", "--positive-label", "1"]
    assert read(tmp_path / "a.jsonl", *flags) == ([f"text {i}" for i in range(40)], [0, 1] * 20)


def test_of_many_columns_an_error_names_the_first(tmp_path, error_line):
    posts = {f"post {i}": {"post_tokens": ["so"], "annotators": []} for i in range(9000)}
    (tmp_path / "a.json").write_text(json.dumps(posts))
    line = error_line(toxicity, ["--data", tmp_path / "a.json"])
    assert "'post 7'" in line
    assert len(line) < 1000


@pytest.mark.parametrize("separator", ["\t", ","])
def test_a_quotation_over_several_texts_swallows_no_rows(separator, tmp_path):
    texts = ['"He said so', "and then", 'and left."', '"whole"'] * 10
    lines = [f"{text}{separator}{i % 2}" for i, text in enumerate(texts)]
    (tmp_path / "a.csv").write_text("\n".join([f"text{separator}toxicity", *lines]))
    assert read(tmp_path / "a.csv") == (texts, [0, 1] * 20)


def test_html_entities_are_characters(tmp_path):
    texts, labels = toxicity.generate_comments(300, seed=5)
    path = write_csv(tmp_path / "a.csv", [f"{text} &amp; &#39;so&#39;" for text in texts], labels)
    assert read(path)[0][7] == f"{texts[7]} & 'so'"


LABELS = [  # labels of a file that begins with them, further flags, what the labels then are
    (["0.6", "0.4"], [], [1, 0]),
    (["true", "False"], [], [1, 0]),
    (["Toxic", "toxic ", "ok", "OK"], ["--positive-label", "toxic"], [1, 1, 0, 0]),
    (["none", "hate"], ["--positive-label", "hate"], [0, 1]),
    (["55", "3"], ["--label-threshold", "40"], [1, 0]),
    ([0, 2, 1], ["--positive-label", "0"], [1, 0, 0]),
    (["1.0", "1", "0"], ["--positive-label", "1"], [1, 1, 0]),
    (["0.699999988079071", "0.6"], ["--label-threshold", "0.7"], [1, 0]),  # 0.7 in float32
    (["-1", "1"], ["--positive-label", "-1"], [1, 0]),
    (["-1.0", "0.0", "1.0"], ["--positive-label", "-1"], [1, 0, 0]),
    (["toxic,insult", "['insult', 'toxic']", "not toxic", "[]"], ["--positive-label", "toxic"], [1, 1, 0, 0]),
]


@pytest.mark.parametrize(("values", "flags", "expected"), LABELS)
def test_label_values_are_placed(values, flags, expected, tmp_path):
    texts = [f"text number {i}" for i in range(40 * len(values))]
    path = write_csv(tmp_path / "a.csv", texts, values * 40)
    assert read(path, *flags)[1][: len(values)] == expected


REFUSED = [  # labels that cannot be placed, further flags, what the error names
    (["toxic", "NaN", "ok"], ["--positive-label", "toxic"], "row 2"),
    (["toxic", "", "ok"], ["--positive-label", "toxic"], "row 2"),
    (["1", "0", "-1"], [], "row 3"),
    (["1", "0", "-1"], ["--positive-label", "1"], "row 3"),
    (["1.0", "0.0", "-1.0"], ["--positive-label", "1.0"], "row 3"),
    (["0", "80", "3"], [], "row 2 has no text or no valid label: 'text number 1', '80'"),
    (["0", "1", "nan"], [], "row 3"),
    (["good", "bad", "good"], [], "'good'"),
    (["good", "bad", "good"], ["--positive-label", "worse"], "of one class only"),
]


@pytest.mark.parametrize(("values", "flags", "expected"), REFUSED)
def test_labels_that_cannot_be_placed_are_refused(values, flags, expected, tmp_path, error_line):
    path = write_csv(tmp_path / "a.csv", [f"text number {i}" for i in range(120)], values * 40)
    assert expected in error_line(toxicity, ["--data", path, *flags, "--output-dir", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


def test_missing_labels_of_parquet_are_refused(tmp_path, error_line):
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(60)], "toxicity": [1.0, 0.0, None] * 20})
    frame.to_parquet(tmp_path / "a.parquet")
    assert "row 3" in error_line(toxicity, ["--data", tmp_path / "a.parquet"])


def test_a_label_is_found_in_the_lists_of_a_parquet_file(tmp_path):
    lists = [[2], [14, 2], [], [14], [22], [3, 2, 14]] * 10
    pd.DataFrame({"text": [f"text {i}" for i in range(60)], "toxicity": lists}).to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", "--positive-label", "2")[1][:6] == [1, 1, 0, 0, 0, 1]


def test_each_label_value_is_named_with_its_count(tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", [f"text {i}" for i in range(120)], ["Toxic", "toxic ", "ok"] * 40)
    read(path, "--positive-label", "toxic")
    line = "{('not toxic', 'ok'): 40, ('toxic', 'Toxic'): 40, ('toxic', 'toxic '): 40}"
    assert line in capsys.readouterr().err


def test_of_many_label_values_the_most_frequent_are_named(tmp_path, capsys):
    labels = ["hate"] * 4 + ["hate_normal"] * 6 + [f"other {i}" for i in range(50)]
    read(write_csv(tmp_path / "a.csv", [f"text {i}" for i in range(60)], labels), "--positive-label", "hate")
    assert "{('not toxic', 'hate_normal'): 6, ('toxic', 'hate'): 4, " in capsys.readouterr().err


def test_label_values_of_categories_are_named_once(tmp_path, capsys):
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(60)], "toxicity": pd.Categorical(["bad", "ok"] * 30)})
    frame.to_parquet(tmp_path / "a.parquet")
    read(tmp_path / "a.parquet", "--positive-label", "bad")
    assert "{('not toxic', 'ok'): 30, ('toxic', 'bad'): 30}" in capsys.readouterr().err


def test_texts_with_both_labels_are_noted(tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", [f"text {i % 80}" for i in range(120)], [0, 1] * 40 + [1, 0] * 20)
    load("--data", path)
    assert "40 of 80 different texts have both labels" in capsys.readouterr().err


def test_a_baseline_reads_all_classes_there_are(tmp_path):
    texts, labels = toxicity.generate_comments(300, seed=5)
    path = write_csv(tmp_path / "a.csv", texts, np.where(labels, 0, 1 + np.arange(300) % 2))
    args = toxicity.parse_args(["--data", str(path), "--positive-label", "0"])
    data = toxicity.load_data(args)
    assert data.toxic.count(True) == 1
    assert len(data.toxic) == 3
    scores = toxicity.fit_by_class(toxicity.make_tfidf(), data)(texts)[:, data.toxic].sum(axis=1)
    assert scores[labels == 1].mean() > 2 * scores[labels == 0].mean()


def test_texts_without_spaces_have_a_baseline_too(tmp_path):
    rng = np.random.default_rng(0)
    letters = np.array(list("你我他她们是的了在有人不这个上来到说白痴"))
    labels = np.arange(400) % 4 == 0
    texts = ["".join(rng.choice(letters[:-2], 9)) + ("白痴" if label else "") for label in labels]
    path = write_csv(tmp_path / "a.csv", texts, labels.astype(int))
    args = toxicity.parse_args(["--data", str(path)])
    rows = toxicity.evaluate_others(toxicity.load_data(args), args, None)
    assert rows[-1]["model"] == "TF-IDF"
    assert rows[-1]["PR AUC"] > 0.9


def test_a_baseline_that_fails_is_noted(monkeypatch, capsys):
    def fail(model, data):
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr(toxicity, "fit_by_class", fail)
    args = toxicity.parse_args(SMALL)
    rows = toxicity.evaluate_others(toxicity.load_data(args), args, None)
    assert [row["model"] for row in rows] == ["majority class"]
    assert "TF-IDF left out: no luck" in capsys.readouterr().err


def test_civil_comments_are_streamed_once_and_kept(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        texts = ["shared text", "shared text", *(f"text {i}" for i in range(2000)), " "]
        rows = {"text": texts, "toxicity": [float(i % 10 == 0) / 2 for i in range(len(texts))], "x": texts}
        return datasets.Dataset.from_dict(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(toxicity, "hub_in_reach", lambda: True)
    data = load("--sample-size", "500", "--data-dir", tmp_path)
    assert asked == [("google/civil_comments", "train", True)]
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 500, "validation": 100, "test": 100}
    assert data.info["test"] == {"texts": 100, "toxic": 10}
    assert data.info["source"] == "civil_comments"
    again = load("--sample-size", "500", "--data-dir", tmp_path)
    assert len(asked) == 1
    assert again.info["sha256"] == data.info["sha256"]


def test_without_a_hub_embedded_comments_are_used_and_never_for_a_named_dataset(tmp_path, monkeypatch, capsys,
                                                                               error_line):
    def refuse(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # restored after the test
    data = load("--sample-size", "200", "--data-dir", tmp_path)
    assert data.info["source"] == "embedded"
    assert "out of reach" in capsys.readouterr().err
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    argv = ["--dataset", "civil_comments", "--data-dir", tmp_path, "--output-dir", tmp_path]
    assert "out of reach" in error_line(toxicity, argv)
    assert "some/bert" in error_line(toxicity, [*SMALL[:2], "--model", "some/bert", "--output-dir", tmp_path])


# --- Tokens and batches -----------------------------------------------------------------------------------------------


def test_buckets_give_the_logits_of_plain_padding():
    rng, model = np.random.default_rng(0), toxicity.build_bert(toxicity.TINY).eval()
    ids = torch.from_numpy(rng.integers(5, 30000, (37, 128)))
    ids[torch.arange(128) >= torch.from_numpy(rng.integers(3, 31, (37, 1)))] = 0
    bucketed = toxicity.predict_logits(model, ids)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=(ids > 0).long()).logits
    torch.testing.assert_close(bucketed, whole, atol=2e-6, rtol=0)
    seen = torch.cat(toxicity.bucket_batches(ids, 5, 37))
    assert sorted(seen.tolist()) == list(range(37))


def test_the_vocabulary_is_the_same_in_every_run():
    texts, _ = toxicity.generate_comments(500, seed=1)
    rare = "".join(map(chr, range(0x4E00, 0x4E00 + 1500)))  # more letters than the vocabulary has room for
    first, second = (toxicity.train_wordpiece([*texts, rare]) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert first.encode("You are a clown").tokens == ["[CLS]", "you", "are", "a", "clown", "[SEP]"]
    tokens = toxicity.tokenize(first, ["you are a clown " * 10, "you"], 8)
    assert toxicity.text_lengths(tokens).tolist() == [8, 3]


def test_special_tokens_in_a_text_are_words(plain):
    classifier = load_model(plain)
    tokens = classifier.tokens(["[PAD] [SEP] you are a clown", "you"])
    assert toxicity.text_lengths(tokens)[0] > 6
    assert (tokens[0] == tokens[1, 2]).sum() == 1  # one [SEP], that of the end


def test_the_share_of_texts_that_are_cut_is_noted(plain):
    notes = [note for note in plain[1]["notes"] if "fill --max-length" in note]
    assert len(notes) == 1
    assert notes[0] in model_of(plain, "summary.md").read_text()


# --- Dendrites and other arms -----------------------------------------------------------------------------------------


def test_a_run_reports_parameters_and_switches(dendritic):
    output, results = dendritic
    model = rows_of(results)["BERT-Tiny from scratch"]
    assert model["training"]["switches"] == [2]
    assert model["training"]["best_epoch"] > 2
    assert model["parameters"] == 4_800_902
    assert 0 < model["dendrites carry %"] < 1
    run = output / "toxicity/run-001"
    assert {path.name for path in run.iterdir()} == FILES
    assert (run / "best_model.pt").stat().st_size < 20e6


@pytest.fixture(scope="module")
def perforated():
    """(a model of perforatedai with random dendrites, the same in plain torch, a batch)."""
    torch.manual_seed(0)
    plain = toxicity.build_bert(toxicity.TINY | {"vocab_size": 200, "hidden_dropout_prob": 0.0})
    model = toxicity.library(plain, None, toxicity.argparse.Namespace(device=CPU))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = {"input_ids": torch.randint(5, 200, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    return model.eval(), toxicity.unpack_model(toxicity.pack_model(model)).eval(), batch


def test_the_library_adds_a_dendrite_to_every_neuron(perforated):
    wrapped = [module for module in perforated[0].modules() if hasattr(module, "dendrite_modules_added")]
    assert [module.dendrite_modules_added for module in wrapped] == [1] * 14
    for module in wrapped:  # the neuron axis is the last one: the library saw 128, 512 or 2 neurons, not 9 tokens
        assert module.out_channels == module.main_module.out_features
        axes = [-1, 0] if module.name.endswith((".pooler.dense", ".classifier")) else [-1, -1, 0]
        assert module.this_output_dimensions.tolist() == axes


def test_plain_layers_compute_and_learn_what_the_library_does(perforated):
    model, plain, batch = perforated
    gradients = []
    for network in (model, plain):
        network.zero_grad()
        logits = network(**batch).logits
        logits.square().sum().backward()
        gradients.append((logits, {name: weight.grad for name, weight in toxicity.live_weights(network).items()}))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_the_library_trains_the_dendrites(monkeypatch, tmp_path):
    args = toxicity.parse_args([*DENDRITES, "--sample-size", "50", "--epochs", "2", "--switch-every", "1"])
    data = toxicity.load_data(args)
    trained = []

    def validate(model, validation, toxic):
        trained.append(model.classifier)
        return 0.0, 0.5

    monkeypatch.setattr(toxicity, "validate", validate)
    loaded = toxicity.make_model(args, data.split("train")[0], 2)
    toxicity.fit_classifier(loaded, data, args, tmp_path / "checkpoint.pt")
    assert type(trained[0]) is nn.Linear
    assert type(trained[1]).__module__.startswith("perforatedai")


def test_a_second_switch_keeps_the_dendrites(perforated):
    _, plain, batch = perforated
    again = toxicity.library(plain, None, toxicity.argparse.Namespace(device=CPU)).eval()
    torch.testing.assert_close(again(**batch).logits, plain(**batch).logits, atol=1e-5, rtol=1e-5)


def test_the_debugger_prompts_and_exits_of_the_library_become_errors():
    before = Path.cwd(), pdb.set_trace
    for stop in (lambda: pdb.set_trace(), lambda: input(), lambda: sys.exit(0)):
        with pytest.raises(toxicity.UserError, match="the reason"), toxicity.sandbox_perforatedai():
            print("the reason")
            stop()
    model = toxicity.build_bert(toxicity.TINY | {"vocab_size": 200})
    model.idle = nn.Linear(4, 4)  # a layer that forward leaves out: the library opens pdb
    with pytest.raises(toxicity.UserError, match="stopped"), toxicity.sandbox_perforatedai():
        toxicity.add_by_library(model, CPU)
    assert (Path.cwd(), pdb.set_trace) == before


def test_without_perforatedai_one_line_says_what_to_install(tmp_path, monkeypatch, error_line):
    monkeypatch.setitem(sys.modules, "perforatedai", None)
    line = error_line(toxicity, [*DENDRITES, "--output-dir", tmp_path / "out"])
    assert "pip install perforatedai" in line
    assert not (tmp_path / "out").exists()


def test_a_wider_model_computes_the_same_and_has_the_size_of_the_dendrites():
    model = toxicity.build_bert(toxicity.TINY).eval()
    batch = {"input_ids": torch.randint(5, 999, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    wide = toxicity.wider(model, None, None).eval()
    torch.testing.assert_close(wide(**batch).logits, model(**batch).logits)
    assert abs(wide.num_parameters() - 4_800_902) < 100


def test_dendrites_that_do_nothing_carry_nothing():
    tokenizer = toxicity.train_wordpiece(["you are a clown"] * 50)
    tokens = toxicity.tokenize(tokenizer, ["you are a clown", "are you a clown", "a clown", "you", "clown are"], 32)
    plain = toxicity.build_bert(toxicity.TINY | {"vocab_size": 3000}).eval()
    assert np.isnan(toxicity.dendrite_share(plain, tokens))
    grown = toxicity.replace_layers(plain, nn.Linear, toxicity.DendriticLinear)
    assert toxicity.dendrite_share(grown, tokens) == 0
    for name, weight in grown.named_parameters():
        if "to_neuron" in name:
            nn.init.normal_(weight)
    assert toxicity.dendrite_share(grown, tokens) > 1


def test_switched_off_dendrites_leave_the_neurons(perforated):
    _, plain, batch = perforated
    silent = toxicity.unpack_model(toxicity.pack_model(plain)).eval()
    for name, weight in silent.named_parameters():
        if "to_neuron" in name:
            nn.init.zeros_(weight)
    off = toxicity.remove_dendrites(plain)
    torch.testing.assert_close(off(**batch).logits, silent(**batch).logits, atol=1e-5, rtol=1e-5)
    assert off.num_parameters() < plain.num_parameters()


def test_an_arm_is_one_entry(fast, tmp_path, monkeypatch):
    def halve(model, train, args):
        with torch.no_grad():
            model.classifier.weight.mul_(0.5)
        return model

    monkeypatch.setattr(toxicity, "ARMS", {"halve": halve, "plain": None})
    argv = [*DENDRITES, "--epochs", "2", "--switch-every", "1", "--sample-size", "100", "--compare-dendrites",
            "--runs", "2", "--output-dir", str(tmp_path)]
    results = toxicity.main(argv)
    rows = [(row["model"], row["seed"]) for row in results["models"] if row["training"]]
    assert rows == [("halve", 42), ("plain", 42), ("halve", 43), ("plain", 43)]
    assert results["models"][0]["training"]["switches"] == [1]
    summary = (tmp_path / "toxicity/run-001/summary.md").read_text()
    first, second = (pd.Series({row["seed"]: row["PR AUC"] for row in results["models"] if row["model"] == arm})
                     for arm in ("halve", "plain"))
    mean, width = toxicity.mean_and_interval(first - second)  # paired by seed
    assert f"| plain | {mean:+.3f} ± {width:.3f} |" in summary.split("halve minus")[1]
    assert f"| {toxicity.ORIGINAL['model']} | – | 0.360 | – | – |" in summary  # it is one claim, without an interval
    assert set((tmp_path / "toxicity/run-001").rglob("checkpoint*")) == set()


def test_a_model_that_went_through_no_switch_is_noted(fast, plain, tmp_path):
    argv = [*SMALL, "--arm", "restart", "--epochs", "1", "--sample-size", "100", "--output-dir", str(tmp_path)]
    line = "restart, seed 42: the best epoch was before any switch, so the model has been through none"
    assert line in toxicity.main(argv)["notes"]
    assert not any("switch" in note for note in plain[1]["notes"])  # that arm has no switches


def test_a_comparison_that_stops_keeps_what_is_done(fast, tmp_path, monkeypatch, error_line, capsys):
    def fail(model, train, args):
        raise toxicity.UserError("out of luck")

    monkeypatch.setattr(toxicity, "ARMS", {"plain": None, "restart": fail})
    argv = [*SMALL, "--epochs", "2", "--sample-size", "100", "--compare-dendrites", "--output-dir", str(tmp_path)]
    assert "out of luck" in error_line(toxicity, argv)
    monkeypatch.setitem(toxicity.ARMS, "restart", toxicity.restart)
    results = toxicity.main(["--resume", "--output-dir", str(tmp_path)])
    assert capsys.readouterr().err.count(": epoch ") == 2  # those of the second arm alone
    assert [row["model"] for row in results["models"] if row["training"]] == ["plain", "restart"]


def test_a_resumed_run_keeps_the_notes_and_the_data_of_its_finished_seeds(fast, tmp_path, monkeypatch, error_line):
    texts, labels = toxicity.generate_comments(300, seed=5)
    path = write_csv(tmp_path / "a.csv", texts, labels)
    run_seed, seeds = toxicity.run_seed, [42]

    def run(loaded, giant, data, args, run_dir):
        if args.seed not in seeds:
            raise toxicity.UserError("out of luck")
        toxicity.note(f"something about seed {args.seed}")
        return run_seed(loaded, giant, data, args, run_dir)

    monkeypatch.setattr(toxicity, "run_seed", run)
    argv = ["--data", path, "--from-scratch", "--arm", "plain", "--epochs", "1", "--max-length", "16", "--runs", "2"]
    assert "out of luck" in error_line(toxicity, [*argv, "--output-dir", tmp_path])
    seeds.append(43)
    write_csv(path, texts, 1 - labels)
    assert "the run began with other data" in error_line(toxicity, ["--resume", "--output-dir", tmp_path])
    write_csv(path, texts, labels)
    notes = toxicity.main(["--resume", "--output-dir", str(tmp_path)])["notes"]
    assert {"something about seed 42", "something about seed 43"} <= set(notes)


def test_models_are_ranked_by_means_over_the_same_seeds(fast, tmp_path):
    args = toxicity.parse_args([*SMALL, "--output-dir", str(tmp_path)])
    data = toxicity.load_data(args)
    record = {"scores": [0.5], "F1": 0.5, "ROC AUC": 0.5, "dendrites carry %": 0.1}
    areas = [("library", 42, 0.4), ("off", 42, 0.4), ("plain", 42, 0.3), ("library", 43, 0.1), ("plain", 43, 0.2)]
    records = [record | {"model": model, "seed": seed, "PR AUC": area} for model, seed, area in areas]
    results = toxicity.report(records, data, args, toxicity.next_run_dir(args))
    assert results["answer"].endswith("to the worst: library 0.250; plain 0.250.")
    summary = (tmp_path / "toxicity/run-001/summary.md").read_text()
    assert "| off | 0.400 | 0.500 | 0.500 | 0.100 | 1 |" in summary
    mean, width = toxicity.mean_and_interval([0.4 - 0.3, 0.1 - 0.2])
    assert f"| plain | {mean:+.3f} ± {width:.3f} |" in summary.split("library minus")[1]


def test_a_teacher_has_not_seen_the_texts_that_it_scores(monkeypatch):
    args = toxicity.parse_args(SMALL)
    data = toxicity.load_data(args)
    data.splits["train"] = pd.concat([data.splits["train"]] * 3)  # the same text is in one fold
    asked = []

    def fit(model, others):
        seen = set(others.split("train")[0])
        assert len(seen) == pytest.approx(400 * 2 / 3, abs=2)

        def answer(texts):
            originals = texts[: len(texts) // (1 + toxicity.COPIES)]
            assert not seen & set(originals)
            asked.extend(originals)
            return np.tile([0.75, 0.25], (len(texts), 1))

        return answer

    monkeypatch.setattr(toxicity, "fit_by_class", fit)
    texts, lesson = toxicity.teach(None, data, args, None)
    assert sorted(asked) == sorted(data.split("train")[0])
    assert len(texts) == 5 * 1200
    np.testing.assert_allclose(lesson, np.tile([0.75, 0.25], (6000, 1)), atol=1e-6)


def test_altered_copies_leave_out_words_or_have_the_end_of_another_text():
    rng = np.random.default_rng(0)
    copies = toxicity.altered_copies(["a b c d e f g h i j", "k l m n o p q r s t"] * 50, rng)
    assert len(copies) == 400
    dropped = [copy.split() for copy in copies[:100]]
    assert np.mean([len(words) for words in dropped]) == pytest.approx(8, abs=0.5)
    assert all(words == sorted(words) for words in dropped)
    assert any({"a", "t"} <= set(copy.split()) for copy in copies[100:200])


def test_a_student_learns_all_classes_from_tfidf(fast, tmp_path):
    texts, labels = toxicity.generate_comments(500, seed=5)
    path = write_csv(tmp_path / "a.csv", texts, np.where(labels, 0, 1 + np.arange(500) % 2))
    argv = ["--data", str(path), "--positive-label", "0", "--from-scratch", "--sample-size", "0", "--arm", "plain",
            "--epochs", "1", "--distill", "tfidf", "--output-dir", str(tmp_path)]
    results = toxicity.main(argv)
    assert "BERT-Tiny from scratch" in rows_of(results)
    args = toxicity.parse_args(argv)
    data = toxicity.load_data(args)
    lesson = toxicity.teach(None, data, args, tmp_path)
    student = load_model((tmp_path, None))
    examples = toxicity.make_examples(student.tokenizer, data, args, lesson)["train"]
    assert student.model.config.num_labels == 3
    assert len(examples.targets) == 5 * len(data.splits["train"])
    assert examples.epoch_texts == len(data.splits["train"])
    assert examples.weights is None
    toxic = np.flatnonzero(student.toxic)
    label_of = dict(zip(*data.split("train")))
    scores, labels = np.array([(score, label_of[text]) for text, score in zip(
        lesson[0], examples.targets[:, toxic].sum(1).tolist()) if text in label_of]).T
    assert scores[labels == 1].mean() > 1.5 * scores[labels == 0].mean()
    np.testing.assert_allclose(student.scores(texts[:9]), student.logits(texts[:9]).softmax(1)[:, toxic].sum(1))
    toxicity.main(["--export-hf", str(tmp_path / "hf"), "--output-dir", str(tmp_path)])
    names = json.loads((tmp_path / "hf/config.json").read_text())["id2label"]
    assert len(set(names.values())) == 3


def test_a_student_learns_from_a_giant_that_was_trained(fast, giant, tmp_path, monkeypatch):
    argv = [*SMALL, "--arm", "plain", "--epochs", "1", "--distill", "giant", "--giant", str(giant),
            "--sample-size", "100", "--output-dir", str(tmp_path)]
    monkeypatch.setattr(toxicity, "GIANT_EPOCHS", 1)
    results = toxicity.main(argv)
    weights = load_model((tmp_path, None), "giant.pt").model.state_dict()
    before = toxicity.load_pretrained(str(giant), 2)[0].state_dict()
    assert all((weights[name] != before[name]).any() for name in weights if name.endswith("LayerNorm.weight"))
    assert {"giant hf", "frozen encoder"} <= set(rows_of(results))
    summary = (tmp_path / "toxicity/run-001/summary.md").read_text()
    assert "| F1 [% of the giant's], asked: 98 | times as fast, asked: 15 |" in summary


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def same_weights(first, second):
    """Whether the models of two runs are the same, bit for bit."""
    first, second = (torch.load(model_of((folder, None)), weights_only=True)["model"]["weights"]
                     for folder in (first, second))
    return all(torch.equal(first[name], second[name]) for name in first | second)


@pytest.mark.parametrize("arm", ["library", "wider"])
def test_an_interrupted_run_goes_on_after_its_switch(arm, fast, tmp_path, monkeypatch, capsys):
    argv = [*DENDRITES, "--epochs", "3", "--sample-size", "100", "--arm", arm, "--output-dir"]
    whole = toxicity.main([*argv, str(tmp_path / "whole")])
    validate, epochs = toxicity.validate, iter([1, 2])

    def interrupt(*given):
        if next(epochs, None) is None:
            raise KeyboardInterrupt
        return validate(*given)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(toxicity, "validate", interrupt)
        toxicity.main([*argv, str(tmp_path / "cut")])
    assert stopped.value.code == 130
    assert "--resume" in capsys.readouterr().err
    resumed = toxicity.main(["--resume", "--output-dir", str(tmp_path / "cut")])
    resumed, whole = (results["models"][0]["training"] for results in (resumed, whole))
    assert resumed["history"][-1]["train_loss"] == whole["history"][-1]["train_loss"]
    assert resumed["switches"] == whole["switches"]
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


def test_a_killed_run_goes_on_from_its_last_epoch_with_the_same_data(fast, plain, tmp_path, error_line):
    argv = [*SMALL, "--arm", "plain", "--epochs", "3", "--output-dir", tmp_path]
    checkpoint = tmp_path / "toxicity/run-001/checkpoint.pt"
    kill_when("toxicity.py", argv, checkpoint, tmp_path)
    content = checkpoint.read_bytes()
    torch.save(torch.load(checkpoint, weights_only=True) | {"source": ["another file", "BERT-Tiny"]}, checkpoint)
    assert "the run began with ['another file'" in error_line(toxicity, ["--resume", "--output-dir", tmp_path])
    checkpoint.write_bytes(content)
    resumed = toxicity.main(["--resume", "--output-dir", str(tmp_path)])
    assert len(resumed["models"][0]["training"]["history"]) == 3
    assert same_weights(plain[0], tmp_path)
    assert not checkpoint.exists()


def test_a_finished_run_is_not_resumed(plain, error_line):
    assert "no unfinished run" in error_line(toxicity, ["--resume", "--output-dir", plain[0]])


def test_training_texts_are_known_by_their_hashes(fast, tmp_path, error_line):
    texts, labels = toxicity.generate_comments(600, seed=1)
    path, out = write_csv(tmp_path / "a.csv", texts[:300], labels[:300]), ["--output-dir", tmp_path / "out"]
    flags = ["--from-scratch", "--arm", "plain", "--epochs", "1", "--max-length", "16"]
    toxicity.main([str(word) for word in ["--data", path, *flags, *out]])
    copy = write_csv(tmp_path / "copy.csv", [f" {text.upper()}" for text in texts], labels)
    results = toxicity.main([str(word) for word in ["--evaluate", "--data", copy, *out]])
    hashes = load_model((tmp_path / "out", None)).hashes.tolist()
    new = [text for text in texts if toxicity.hash_texts([text]).item() not in hashes]
    assert 300 < len(new) < 400
    left = len(texts) - len(new)
    assert any(f"{left:,} of 600 texts were used to train" in line for line in results["notes"])
    assert results["data"]["test"]["texts"] == len(new)  # what the summary says
    only = [text for text in texts[:300] if text not in new]
    path = write_csv(tmp_path / "only.csv", only, np.arange(len(only)) % 2)
    assert "of one class only" in error_line(toxicity, ["--evaluate", "--data", path, *out])


@pytest.mark.filterwarnings("error")
def test_foreign_and_truncated_files_are_refused(dendritic, tmp_path, error_line):
    whole = model_of(dendritic).read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"model": {}}, tmp_path / "other.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "pickle.pt")  # a pickled class is not loaded
    state = torch.load(model_of(dendritic), weights_only=True)
    state["model"]["config"]["hidden_size"] = 64
    torch.save(state, tmp_path / "layout.pt")
    for name in ("half", "text", "other", "tensor", "pickle", "layout", "absent"):
        for mode in (["--evaluate", "--checkpoint", tmp_path / f"{name}.pt"],
                     ["--predict", "hello", "--checkpoint", tmp_path / f"{name}.pt"]):
            line = error_line(toxicity, [*mode, "--output-dir", tmp_path])
            assert f"{name}.pt" in line
            assert "weights_only" not in line


def test_the_best_epoch_is_kept_and_its_loss_is_weighted_by_class(plain):
    classifier, results = load_model(plain), plain[1]
    data = load(*SMALL)
    texts, labels = data.split("validation")
    _, train_labels = data.split("train")
    logits = toxicity.predict_logits(classifier.model, classifier.tokens(texts))
    weights = torch.tensor([len(train_labels) / (2 * (train_labels == label).sum()) for label in (0, 1)]).float()
    training = results["models"][0]["training"]
    history = training["history"]
    best = max(history, key=lambda epoch: epoch["validation_pr_auc"])
    assert history.index(best) == training["best_epoch"] - 1
    loss = nn.functional.cross_entropy(logits, torch.from_numpy(labels), weights).item()
    assert best["validation_loss"] == pytest.approx(loss, rel=1e-4)


# --- Evaluation and deployment ----------------------------------------------------------------------------------------


def test_the_threshold_is_chosen_on_validation_alone():
    rng = np.random.default_rng(0)
    labels = (rng.random(600) < 0.3).astype(np.int64)
    scores = np.clip(labels * 0.3 + rng.random(600) * 0.7, 0, 1)
    table = pd.DataFrame({"text": np.repeat(toxicity.SPLITS, 200), "label": labels})
    data = toxicity.Data(dict(list(table.groupby("text"))), [False, True], {"seed": 0})
    thresholds = []
    for shift in (0.0, 0.25):  # other scores on the test part must not move the threshold
        rows = {"validation": scores[200:400], "test": (scores[400:] - shift).clip(0)}
        metrics = toxicity.evaluate("a model", lambda texts, rows=rows: rows[texts[0]], data)
        assert metrics["F1 low"] < metrics["F1"] < metrics["F1 high"]
        thresholds.append(metrics["threshold"])
    assert thresholds[0] == thresholds[1]


def test_the_threshold_is_better_elsewhere_than_one_half_and_than_the_best_f1_of_the_sample():
    from sklearn.metrics import f1_score, precision_recall_curve

    rng = np.random.default_rng(0)

    def sample(count):
        labels = (rng.random(count) < 0.1).astype(np.int64)
        return labels, 1 / (1 + np.exp(-rng.normal(3 * labels - 2, 1.5)))

    true, scores = sample(20_000)
    f1 = []
    for _ in range(30):
        labels, few = sample(240)
        precision, recall, thresholds = precision_recall_curve(labels, few)
        best = thresholds[(precision * recall / (precision + recall + 1e-9))[:-1].argmax()]
        f1.append([f1_score(true, scores >= t) for t in (toxicity.choose_threshold(labels, few), best, 0.5)])
    assert np.argmax(np.mean(f1, axis=0)) == 0


def test_a_threshold_tells_scores_apart_that_are_all_alike():
    labels = np.arange(60) % 4 == 0
    scores = np.float32(0.157) + np.float32(0.001) * labels + np.linspace(0, 1e-4, 60, dtype=np.float32)
    called = scores >= toxicity.choose_threshold(labels, scores)
    assert called.tolist() == labels.tolist()


def test_the_calibration_error_of_its_definition():
    labels, scores = np.array([0, 1, 1, 1]), np.array([0.15, 0.12, 0.95, 1.0])
    expected = (2 * abs(0.135 - 0.5) + 2 * abs(0.975 - 1)) / 4
    assert toxicity.calibration_error(labels, scores) == pytest.approx(expected)


def test_int8_is_small_and_agrees_with_the_float_model(fast, dendritic, tmp_path):
    results = toxicity.main(["--quantize", "--checkpoint", str(model_of(dendritic)), "--output-dir", str(tmp_path)])
    assert "BERT-Tiny from scratch, dendrites switched off" in rows_of(results)
    assert results["arguments"]["checkpoint"] == str(model_of(dendritic))  # also if it was the newest
    assert results["arguments"]["sample_size"] == 400  # what it was evaluated on
    assert rows_of(dendritic[1])["BERT-Tiny from scratch, int8"]["MB"] < 6
    assert (tmp_path / "toxicity/run-001/model_int8.pt").stat().st_size < 6e6
    texts = toxicity.generate_comments(50, seed=9)[0]
    scores = [load_model(run, name).scores(texts) for run, name in
              ((dendritic, "best_model.pt"), ((tmp_path, None), "model_int8.pt"))]
    np.testing.assert_allclose(*scores, atol=0.005)


def test_a_score_in_int8_does_not_depend_on_the_neighbours(dendritic):
    classifier = load_model(dendritic, "model_int8.pt")
    texts = [*toxicity.generate_comments(200, seed=9)[0], "ZZZZ " * 20]
    alone = np.concatenate([classifier.scores([text]) for text in texts])
    np.testing.assert_allclose(classifier.scores(texts), alone, atol=2e-4)
    np.testing.assert_allclose(classifier.scores(texts[::-1])[::-1], alone, atol=2e-4)


def test_onnx_agrees_with_the_float_model(fast, dendritic, tmp_path):
    pytest.importorskip("onnxruntime")
    results = toxicity.main(["--export-onnx", "--checkpoint", str(model_of(dendritic)), "--output-dir", str(tmp_path)])
    full, onnx = results["models"][:2]
    assert onnx["F1"] == full["F1"]
    classifier, texts = load_model(dendritic), toxicity.generate_comments(50, seed=9)[0]
    exported = toxicity.to_onnx(load_model(dendritic), tmp_path)
    np.testing.assert_allclose(exported.scores(texts), classifier.scores(texts), atol=1e-5)
    assert (tmp_path / "toxicity/run-001/tokenizer.json").exists()


def test_speed_is_measured_beside_a_bert_base(plain, tmp_path, monkeypatch, error_line):
    texts, _ = toxicity.generate_comments(12, seed=5)
    path = write_csv(tmp_path / "a.csv", texts, np.arange(12) % 2)
    argv = ["--checkpoint", str(model_of(plain)), "--data", str(path), "--output-dir", str(tmp_path)]
    results = toxicity.main(["--benchmark-only", *argv])
    tiny, base = results["models"][:2]
    assert base["parameters"] == 109_483_778
    assert 0 < tiny["99 % latency [ms]"] < base["99 % latency [ms]"]
    assert tiny["texts/s"] > 5 * base["texts/s"]
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "pip install onnx" in error_line(toxicity, ["--export-onnx", *argv])


def test_int8_weights_against_their_definition(plain, tmp_path):
    classifier = load_model(plain)
    toxicity.to_int8(classifier, tmp_path)
    stored = torch.load(tmp_path / "model_int8.pt", weights_only=True)["model"]["weights"]
    loaded = toxicity.load_classifier(tmp_path / "model_int8.pt", CPU).model.state_dict()
    for name, weight in classifier.model.state_dict().items():
        if weight.dim() == 2:
            rows, scale = stored[name]
            assert rows.dtype == torch.int8
            assert rows.abs().amax(1)[1:].eq(127).all()  # the whole range of int8; [PAD] is 0
            assert ((loaded[name] - weight).abs() <= scale / 2 + 1e-7).all()
        else:
            assert torch.equal(loaded[name], weight)


def test_a_plain_model_is_exported_for_transformers_and_trained_on(fast, plain, giant, tmp_path, error_line):
    from transformers import pipeline

    folder = shutil.copytree(giant, tmp_path / "hf")
    classify = pipeline("text-classification", str(folder), device="cpu")
    score = load_model(plain).scores(["You are a complete clown"])[0]
    answer = classify("You are a complete clown")[0]
    assert answer["label"] == toxicity.CLASSES[int(score >= 0.5)]
    assert answer["score"] == pytest.approx(max(score, 1 - score), abs=1e-5)
    assert classify("clown " * 800, truncation=True)[0]["score"] > 0.3  # longer than the model can read
    argv = [*SMALL, "--arm", "plain", "--epochs", "1", "--model", str(folder), "--output-dir", str(tmp_path)]
    argv.remove("--from-scratch")
    results = toxicity.main(argv)
    assert "hf" in rows_of(results)
    other_classes, *_ = toxicity.load_pretrained(str(folder), 3)
    assert other_classes.classifier.out_features == 3
    (tmp_path / "file").touch()
    assert "file" in error_line(toxicity, ["--export-hf", tmp_path / "file", "--checkpoint", model_of(plain)])
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    assert "no BERT" in error_line(toxicity, argv)
    os.remove(folder / "model.safetensors")
    assert "no BERT" in error_line(toxicity, argv)


def test_a_model_that_reads_fewer_tokens_is_refused(giant, tmp_path, error_line):
    folder = shutil.copytree(giant, tmp_path / "hf")
    toxicity.build_bert(toxicity.TINY | {"max_position_embeddings": 16}).save_pretrained(folder)
    argv = ["--dataset", "embedded", "--arm", "plain", "--model", folder, "--output-dir", tmp_path / "out"]
    assert "--max-length is more than the model can read" in error_line(toxicity, argv)
    assert not (tmp_path / "out").exists()


def test_dendrites_are_folded_where_they_do_nothing_and_refused_where_they_matter(dendritic, tmp_path, error_line):
    idle = load_model(dendritic)
    idle.save(tmp_path / "idle.pt")
    toxicity.main(["--export-hf", str(tmp_path / "hf"), "--checkpoint", str(tmp_path / "idle.pt")])
    from transformers import BertForSequenceClassification

    plain = BertForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    tokens = idle.tokens(["you are a clown"])
    torch.testing.assert_close(toxicity.predict_logits(plain, tokens), toxicity.predict_logits(idle.model, tokens),
                               atol=0.02, rtol=0)
    torch.manual_seed(0)
    for name, weight in idle.model.named_parameters():
        if "to_neuron" in name or "dendrite" in name:
            nn.init.normal_(weight, std=0.5)
    idle.save(tmp_path / "busy.pt")
    line = error_line(toxicity, ["--export-hf", tmp_path / "hf2", "--checkpoint", tmp_path / "busy.pt"])
    assert "a score changes by" in line


def test_a_giant_is_fine_tuned_and_compared_also_after_a_stop(fast, plain, giant, tmp_path, monkeypatch, error_line):
    monkeypatch.setattr(toxicity, "GIANT_EPOCHS", 1)
    argv = ["--compare-base", "--giant", str(giant), "--checkpoint", str(model_of(plain)), "--output-dir",
            str(tmp_path)]

    def stop(*arguments):
        raise toxicity.UserError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(toxicity, "fit_giant", stop)
        assert "stopped" in error_line(toxicity, argv)
    results = toxicity.main(["--resume", "--output-dir", str(tmp_path)])
    assert results["data"] | {"test": plain[1]["data"]["test"]} == plain[1]["data"]
    assert {"giant hf", "frozen encoder"} <= set(rows_of(results))
    assert "times as fast" in (tmp_path / "toxicity/run-001/summary.md").read_text()
    assert "takes the texts of the checkpoint" in error_line(toxicity, [*argv, "--data", tmp_path / "a.csv"])


# --- Predictions ------------------------------------------------------------------------------------------------------


def test_texts_and_lines_are_scored(dendritic, monkeypatch, capsys):
    argv = ["--predict", "--format", "json", "--output-dir", str(dendritic[0])]
    monkeypatch.setattr(sys, "stdin", io.StringIO("you are a clown\n\n  \nthis joke killed me\n"))
    toxicity.main(argv)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["you are a clown", "this joke killed me"]  # no empty line
    threshold = load_model(dendritic).threshold
    for row in rows:
        assert row["toxic"] == (row["tier"] in ("review", "remove")) == (row["score"] >= round(threshold, 4))
    for text in ("you are a clown", "you are &#97; clown"):
        toxicity.main(["--predict", text, *argv[1:]])
        assert json.loads(capsys.readouterr().out) == rows[0] | {"text": text}


def test_the_majority_class_calls_nothing_toxic(plain):
    row = rows_of(plain[1])["majority class"]
    assert (row["F1"], row["recall"]) == (0, 0)


def test_evaluate_scores_all_texts_of_another_file(plain, tmp_path):
    path = tmp_path / "other.csv"
    rows = [f"some other text number {i},{int(i % 7 == 0)}" for i in range(700)]
    path.write_text("text,toxicity\n" + "\n".join(rows))
    results = toxicity.main(["--evaluate", "--checkpoint", str(model_of(plain)), "--data", str(path), "--sample-size",
                             "100", "--output-dir", str(tmp_path)])
    assert results["data"]["test"] == {"texts": 700, "toxic": 100}


def test_quick_takes_a_file_or_a_model_of_ones_own(giant, tmp_path):
    texts, labels = toxicity.generate_comments(300, seed=5)
    path = write_csv(tmp_path / "a.csv", texts, labels)
    assert load("--quick", "--data", path).info["source"] == "a.csv"
    args = toxicity.parse_args(["--quick", "--model", str(giant)])
    assert toxicity.make_model(args, texts, 2)[2] == "hf"


def test_control_characters_are_escaped_in_the_table(dendritic, capsys):
    toxicity.main(["--predict", "red \x1b[31m\nnew line", "--output-dir", str(dendritic[0])])
    line = capsys.readouterr().out.rstrip()
    assert line.endswith(r"  'red \x1b[31m\nnew line'")
    assert line.split()[1] in ("toxic", "not")


def test_predictions_need_texts_in_utf_8(dendritic, monkeypatch, error_line):
    argv = ["--predict", "--output-dir", dendritic[0]]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("schön".encode("latin-1")), encoding="utf-8"))
    assert "not UTF-8" in error_line(toxicity, argv)
    byte = "sch\udcf6n"  # as Python reads it from a shell
    assert "not UTF-8" in error_line(toxicity, ["--predict", byte, "--format", "json", *argv[1:]])


def test_lines_stream_and_a_reader_may_leave(dendritic, tmp_path):
    command = [sys.executable, str(ROOT / "toxicity.py"), "--predict", "--checkpoint", str(model_of(dendritic))]
    with open(tmp_path / "stderr", "w") as stderr:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr)
    lines = b"you are a clown\n" * toxicity.INFERENCE_BATCH
    process.stdin.write(lines)
    process.stdin.flush()
    assert process.stdout.readline().endswith(b"'you are a clown'\n")  # an answer before the input ends
    process.stdout.close()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(100 * lines)
        process.stdin.close()
    assert process.wait(timeout=60) == 0
    assert "rror" not in (tmp_path / "stderr").read_text()


def test_the_script_runs_when_pasted_into_a_notebook(tmp_path):
    (tmp_path / "common.py").write_text((ROOT / "common.py").read_text())
    flags = [*SMALL, "--sample-size", "100", "--arm", "plain", "--epochs", "1", "--output-dir", "out"]
    source = (ROOT / "toxicity.py").read_text().replace('if __name__ == "__main__":\n    main()', "")
    outputs = run_notebook([source, f"results = main({flags})\nprint(str(results['models']))"], tmp_path)
    assert "TF-IDF" in str(outputs)


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_bad_files_end_in_one_line(tmp_path, error_line):
    texts, labels = toxicity.generate_comments(300, seed=1)
    good = write_csv(tmp_path / "good.csv", texts, labels)
    blank = write_csv(tmp_path / "blank.csv", [*texts[:4], "  ", *texts[5:]], labels)
    one = write_csv(tmp_path / "one.csv", texts, np.zeros(300, int))
    few = write_csv(tmp_path / "few.csv", texts[:9], np.arange(9) % 2)
    contents = {
        "empty.csv": b"", "head.csv": b"text,toxicity\n", "comments.xlsx": b"PK\x03\x04\xff\0",
        "comma.csv": b"text,toxicity\ngood,0\nwell, well,1\n", "broken.json": b'[{"text": "a"',
        "nested.json": b'[{"text": ["a"], "toxicity": 1}]',
        "shifted.csv": b"text,toxicity\nwell, good,0\nwell, bad,1\n",
        "headless.tsv": b"ham\twell, good\nspam\tbuy, buy, buy\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with gzip.open(tmp_path / "cut.csv.gz", "wb") as file:
        file.write(good.read_bytes())
    (tmp_path / "cut.csv.gz").write_bytes((tmp_path / "cut.csv.gz").read_bytes()[:500])
    cases = [
        ([good, "--text-column", "comment"], "no column 'comment' among ['text', 'toxicity']"),
        ([blank], "row 5 has no text or no valid label: ' '"),
        ([one], "of one class only"), ([few], "few.csv: too few texts"),
        ([good, "--sample-size", "9"], "too few texts"),
        ([tmp_path / "empty.csv"], "empty.csv"), ([tmp_path / "head.csv"], "head.csv"),
        ([tmp_path / "comments.xlsx"], "utf-8"), ([tmp_path / "absent.csv"], "absent.csv"),
        ([tmp_path], str(tmp_path)), ([tmp_path / "comma.csv"], "Expected 2 fields in line 3, saw 3"),
        ([tmp_path / "broken.json"], "broken.json"), ([tmp_path / "nested.json"], "row 1 has no text"),
        ([tmp_path / "cut.csv.gz"], "cut.csv.gz"), ([tmp_path / "shifted.csv"], "more cells than"),
        ([tmp_path / "headless.tsv"], "among ['ham', 'well, good']; without a header, the columns are 0, 1, …"),
        ([tmp_path / "headless.tsv", "--text-column", "1"], "no column 'toxicity' among ['0', '1']"),
    ]
    for argv, expected in cases:
        assert expected in error_line(toxicity, ["--data", *argv, "--output-dir", tmp_path / "out"])
    assert not list((tmp_path / "out").rglob("run-*"))  # no empty run is left behind


ARGUMENTS = [
    (["--epochs", "0"], "--epochs"), (["--nonsense"], "--nonsense"), (["--device", "tpu"], "--device"),
    (["--data", "x.csv", "--dataset", "embedded"], "not allowed with"), (["--learning-rate", "-1"], "too small"),
    (["--model", "x", "--from-scratch"], "not allowed with"), (["--label-threshold", "0"], "too small"),
    (["--resume", "--seed", "1"], "--resume"), (["--quantize", "--predict", "hello"], "not allowed with"),
    (["--sample-size", "-7"], "too small"), (["--max-length", "600", *SMALL[:5]], "--max-length"),
    (["--evaluate"], "train first"), (["--predict", "hello"], "train first"),
    ([*DENDRITES, "--learning-rate", "1e9"], "not finite"), ([*SMALL[:2], "--model", "/tmp"], "no BERT"),
]


@pytest.mark.parametrize(("argv", "expected"), ARGUMENTS)
def test_bad_arguments_end_in_one_line(argv, expected, tmp_path, error_line):
    assert expected in error_line(toxicity, [*argv, "--output-dir", tmp_path / "out"])


def test_a_giant_that_is_not_there_is_an_error_before_training(plain, tmp_path, error_line):
    argv = ["--compare-base", "--giant", tmp_path / "absent", "--checkpoint", model_of(plain), "--output-dir", tmp_path]
    assert "absent" in error_line(toxicity, argv)
    assert not (tmp_path / "toxicity").exists()


@pytest.mark.skipif(not TWEETS.exists(), reason="the real tweets are not beside this checkout")
def test_real_tweets_are_read():
    data = load("--data", TWEETS, "--text-column", "tweet", "--label-column", "class", "--positive-label", "0",
                "--sample-size", "0")
    table = pd.concat(data.splits.values())
    assert len(table) == 24_783
    assert table["label"].sum() == 1_430
    assert len(data.splits["test"]) == pytest.approx(2_478, abs=3)
    assert not table["text"].str.contains("&amp;").any()
