"""What users of toxicity.py rely on: offline, on the CPU, with real dendrites. Real tweets where ../shared/data is."""

import io
import json
import os
import pdb
import pty
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
import pytest
import torch
from torch import nn

import toxicity

ROOT = Path(toxicity.__file__).resolve().parent
TWEETS = ROOT.parent / "shared/data/hate_speech/labeled_data.csv"
SMALL = ["--dataset", "embedded", "--from-scratch", "--sample-size", "400", "--max-length", "24", "--device", "cpu"]
DENDRITES = [*SMALL, "--epochs", "4", "--switch-every", "2"]
PICTURES = {"learning_curves.png", "pr_roc.png", "threshold_sweep.png", "confusion_matrices.png", "size_f1.png",
            "speed.png"}


@pytest.fixture(scope="session")
def dendritic(tmp_path_factory):
    """(output folder, results) of a run with dendrites, started on a pseudo-terminal in an empty working folder."""
    folder = tmp_path_factory.mktemp("working")
    parent, child = pty.openpty()  # with a terminal the library would open its debugger and wait
    command = [sys.executable, str(ROOT / "toxicity.py"), *DENDRITES]
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as here, for the same last bits
    process = subprocess.Popen(command, cwd=folder, env=threads, stdin=child, stdout=child, stderr=child)
    os.close(child)
    said = []

    def read():
        try:
            while chunk := os.read(parent, 65536):
                said.append(chunk)
        except OSError:  # the other end was closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    assert process.wait(timeout=240) == 0, b"".join(said).decode()
    reader.join()
    os.close(parent)
    said = b"".join(said).decode()
    assert "(Pdb)" not in said and "Press Enter" not in said
    assert [path.name for path in folder.iterdir()] == ["outputs"]  # nothing outside the run's folder
    return folder / "outputs", json.loads((folder / "outputs/toxicity/run-001/results.json").read_text())


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """(output folder, results) of a run without dendrites, in this process."""
    output = tmp_path_factory.mktemp("plain")
    results = toxicity.main([*SMALL, "--no-dendrites", "--epochs", "3", "--output-dir", str(output)])
    return output, results


def error_of(argv, capsys):
    """The one line on stderr of a run that ends with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        toxicity.main([str(argument) for argument in argv])
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("toxicity.py: error: "), lines
    return lines[0]


def random_tokens(count=37, seed=0):
    """Tokens of texts of 3 to 30 random ids."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 31, count)
    ids = rng.integers(5, 30000, lengths.sum()).astype(np.int32)
    return toxicity.Tokens(torch.from_numpy(ids), torch.from_numpy(np.cumsum([0, *lengths])))


# --- Data -------------------------------------------------------------------------------------------------------------


def test_embedded_comments_cannot_be_told_by_single_words():
    texts, labels = toxicity.generate_comments(20_000, seed=3)
    assert (texts, labels.tolist()) == (lambda again: (again[0], again[1].tolist()))(
        toxicity.generate_comments(20_000, seed=3))
    assert 0.05 < labels.mean() < 0.07
    for word in ("clown", "idiot", "bat", "congratulations", "blood"):
        with_word = labels[[word in text.lower() for text in texts]]
        assert len(with_word) > 20 and 0.02 < with_word.mean() < 0.8, word


def test_no_text_is_on_two_sides_and_the_parts_are_stratified():
    texts = [f"Text {i // 3}" if i % 3 else f"text  {i // 3} " for i in range(3000)]  # each stands there three times
    labels = np.repeat(np.arange(1000) % 10 == 0, 3).astype(np.int64)
    for size in (0, 400, 5000):
        parts = toxicity.split_texts(texts, labels, size, seed=1)
        keys = [{toxicity.same_text(texts[row]) for row in parts[part]} for part in toxicity.PARTS]
        assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
        assert all(abs(labels[rows].mean() - 0.1) < 0.01 for rows in parts.values())
        assert len(keys[0]) == (400 if size == 400 else 800)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_files_of_each_kind_and_label_give_the_same_data(kind, tmp_path):
    texts, labels = toxicity.generate_comments(300, seed=5)
    path = tmp_path / f"comments.{kind}"
    columns = {"comment_text": [text + '\n"quoted", so' for text in texts], "toxic": labels.astype(int),
               "class": np.where(labels, 0, 2), "score": np.where(labels, 0.7, 0.2)}
    if kind == "csv":
        pa.csv.write_csv(pa.table(columns), path)
    elif kind == "parquet":
        pa.parquet.write_table(pa.table(columns), path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in pa.table(columns).to_pylist()))
    hashes = set()
    for more in (["toxic"], ["class", "--positive-label", "0"], ["score", "--label-threshold", "0.6"]):
        argv = ["--data", str(path), "--text-column", "comment_text", "--sample-size", "0", "--label-column", *more]
        data = toxicity.load_data(toxicity.parse_args(argv))
        hashes.add(data.info["sha256"])
        assert data.info["rows"] == 300 and data.texts[0].endswith('\n"quoted", so')
    assert len(hashes) == 1


def test_civil_comments_are_streamed_once_and_kept(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split, streaming, cache_dir):
        asked.append((name, split, streaming))
        texts = ["shared text", *(f"{split} text {i}" for i in range(2000)), " "]
        rows = {"text": texts, "toxicity": [float(i % 10 == 0) / 2 for i in range(len(texts))], "x": texts}
        return datasets.Dataset.from_dict(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(toxicity, "hub_in_reach", lambda: True)
    args = toxicity.parse_args(["--sample-size", "500", "--data-dir", str(tmp_path)])
    data = toxicity.load_data(args)
    assert sorted(asked) == sorted(("google/civil_comments", part, True) for part in toxicity.PARTS)
    assert {part: len(rows) for part, rows in data.parts.items()} == {"train": 499, "validation": 99, "test": 100}
    assert data.info["counts"]["test"] == {"not toxic": 90, "toxic": 10} and args.dataset == "civil_comments"
    again = toxicity.load_data(toxicity.parse_args(["--sample-size", "500", "--data-dir", str(tmp_path)]))
    assert len(asked) == 3 and again.info["sha256"] == data.info["sha256"]


def test_without_a_hub_embedded_comments_are_used_and_never_for_a_named_dataset(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    data = toxicity.load_data(toxicity.parse_args(["--sample-size", "200"]))
    assert data.info["source"] == "embedded" and "warning" in capsys.readouterr().err
    assert os.environ.pop("HF_HUB_OFFLINE") == "1" and os.environ.pop("HF_DATASETS_OFFLINE") == "1"
    argv = ["--dataset", "civil_comments", "--data-dir", tmp_path / "d", "--output-dir", tmp_path]
    assert "out of reach" in error_of(argv, capsys)
    assert "out of reach" in error_of([*SMALL[:2], "--model", "some/bert", "--output-dir", tmp_path], capsys)
    os.environ.pop("HF_HUB_OFFLINE", None)


# --- Tokens and batches -----------------------------------------------------------------------------------------------


def test_buckets_give_the_logits_of_plain_padding():
    tokens, model = random_tokens(), toxicity.build_bert(toxicity.TINY).eval()
    bucketed = toxicity.predict_logits(model, tokens, batch_size=5)
    ids = torch.zeros(37, 128, dtype=torch.long)
    for i, (start, stop) in enumerate(zip(tokens.starts, tokens.starts[1:])):
        ids[i, : stop - start] = tokens.ids[start:stop]
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=(ids > 0).long()).logits
    torch.testing.assert_close(bucketed, whole, atol=2e-6, rtol=0)
    seen = torch.cat(toxicity.bucket_batches(tokens.lengths, 5, shuffle=True))
    assert sorted(seen.tolist()) == list(range(37))


def test_the_vocabulary_is_the_same_in_every_run():
    texts, _ = toxicity.generate_comments(500, seed=1)
    rare = "".join(map(chr, range(0x4E00, 0x4E00 + 1500)))  # more letters than the vocabulary has room for
    first, second = (toxicity.train_wordpiece([*texts, rare]) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert first.encode("You are a clown").tokens == ["[CLS]", "you", "are", "a", "clown", "[SEP]"]
    tokens = toxicity.tokenize(first, ["you are a clown " * 10, "you"], 8)
    assert tokens.lengths.tolist() == [8, 3]


# --- Dendrites --------------------------------------------------------------------------------------------------------


def test_class_weights_parameters_and_switches_are_reported(dendritic):
    output, results = dendritic
    training = results["training"]
    counts = results["data"]["counts"]["train"].values()
    np.testing.assert_allclose(training["class_weights"], [sum(counts) / (2 * count) for count in counts])
    assert [epoch["live_parameters"] for epoch in training["history"]] == [4_386_178] * 2 + [4_800_902] * 2
    (switch,) = training["switches"]
    assert (switch["epoch"], switch["parameters_before"], switch["parameters_after"]) == (2, 4_386_178, 4_800_902)
    scores = [epoch["validation_pr_auc"] for epoch in training["history"]]
    assert (switch["score_before"], switch["score_after"]) == (max(scores[:2]), max(scores[2:]))
    run = output / "toxicity/run-001"
    assert {path.name for path in run.iterdir()} == PICTURES | {"results.json", "summary.md", "best_model.pt",
                                                                "final_model.pt"}
    assert (run / "final_model.pt").stat().st_size < 20e6


def perforated_model(dendrites, idle_layer=False):
    """(a perforated BERT with so many sets of random dendrites, a batch): made by the library itself."""
    args = toxicity.parse_args(["--epochs", "8", "--switch-every", "2", "--max-dendrites", "3"])
    torch.manual_seed(0)
    model = toxicity.build_bert(toxicity.TINY | {"vocab_size": 200})
    if idle_layer:
        model.idle = nn.Linear(4, 4)
    model, tracker = toxicity.perforate(model, args, torch.device("cpu"))
    batch = {"input_ids": torch.randint(5, 200, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    tracker.set_optimizer_instance(torch.optim.SGD(model.parameters(), 0.1))
    for score in np.linspace(0.1, 0.9, 2 * dendrites):
        model(**batch).logits.square().sum().backward()
        model, _, _ = tracker.add_validation_score(float(score), model)
        tracker.set_optimizer_instance(torch.optim.SGD(model.parameters(), 0.1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval(), batch


def test_the_plain_layers_compute_what_the_library_does(tmp_path):
    with toxicity.confined_library(tmp_path):
        model, batch = perforated_model(dendrites=2)
        wrapped = [m for m in model.modules() if hasattr(m, "dendrite_modules_added")]
        with torch.no_grad():
            expected = model(**batch).logits
    assert len(wrapped) == 14 and {m.dendrite_modules_added for m in wrapped} == {2}
    for module in wrapped:  # the neuron axis is the last one: the library saw 128, 512 or 2 neurons, not 9 tokens
        assert module.out_channels == module.main_module.out_features
        axes = [-1, 0] if module.name.endswith((".pooler.dense", ".classifier")) else [-1, -1, 0]
        assert module.this_output_dimensions.tolist() == axes
    weights, dendrites = toxicity.live_weights(model)
    plain = toxicity.grow_dendrites(toxicity.build_bert(toxicity.TINY | {"vocab_size": 200}), dendrites).eval()
    plain.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    assert toxicity.count_parameters(plain) == sum(tensor.numel() for tensor in weights.values())


def test_the_debugger_prompts_and_exits_of_the_library_become_errors(tmp_path):
    before = Path.cwd(), pdb.set_trace
    for stop in (lambda: pdb.set_trace(), lambda: input(), lambda: sys.exit(0)):
        with pytest.raises(toxicity.UserError, match="the reason"), toxicity.confined_library(tmp_path):
            print("the reason")
            stop()
    with pytest.raises(toxicity.UserError, match="stopped to ask"), toxicity.confined_library(tmp_path):
        perforated_model(dendrites=1, idle_layer=True)  # a layer that forward leaves out: the library opens pdb
    assert (Path.cwd(), pdb.set_trace) == before


def test_a_wider_model_computes_the_same_and_has_the_size_of_the_dendrites():
    model = toxicity.build_bert(toxicity.TINY).eval()
    batch = {"input_ids": torch.randint(5, 999, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    before = model(**batch).logits
    toxicity.widen(model, 1)
    torch.testing.assert_close(model(**batch).logits, before)
    assert toxicity.count_parameters(model) == 4_386_178 + 807 * 514
    assert abs(toxicity.count_parameters(model) - 4_800_902) < 100


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def test_a_dendritic_checkpoint_comes_back_whole(dendritic, tmp_path):
    path = dendritic[0] / "toxicity/run-001/final_model.pt"
    first = toxicity.Classifier.load(path, torch.device("cpu"))
    assert first.dendrites == 1 and first.parameters == 4_800_902 and "dendrites" in first.label
    assert any(p.abs().max() > 0 for name, p in first.model.named_parameters() if name.endswith("to_neuron"))
    second = toxicity.Classifier.load(first.save(tmp_path / "again.pt") and tmp_path / "again.pt", torch.device("cpu"))
    texts = ["you are a clown", "this joke killed me"]
    np.testing.assert_array_equal(first.scores(texts), second.scores(texts))


@pytest.mark.parametrize("arm", ["--no-dendrites", "--max-dendrites=1"])
def test_a_killed_run_goes_on_from_where_it_was(arm, dendritic, tmp_path, monkeypatch, capsys):
    argv, whole = [*DENDRITES, arm], dendritic
    if arm == "--no-dendrites":
        whole = tmp_path / "whole", toxicity.main([*argv, "--output-dir", str(tmp_path / "whole")])
    saved, calls = toxicity.save_checkpoint, []

    def kill_after_the_third(state, path):
        size = saved(state, path)
        calls.append(path.name)
        if calls.count("checkpoint.pt") == 3:
            raise KeyboardInterrupt
        return size

    def kill(*_):
        raise KeyboardInterrupt

    again = ["--resume", "--output-dir", str(tmp_path / "killed")]
    for command, name, function in (([*argv, *again[1:]], "save_checkpoint", kill_after_the_third),
                                    (again, "evaluate", kill)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(toxicity, name, function)
            toxicity.main(command)
        assert stopped.value.code == 130 and f"--resume {tmp_path}/killed/tox" in capsys.readouterr().err
    resumed = toxicity.main(again)  # in the third epoch, then after the training
    assert len(resumed["training"]["history"]) == len(whole[1]["training"]["history"]) >= 4
    assert resumed["training"]["switches"] == whole[1]["training"]["switches"]
    one, other = (torch.load(folder / "toxicity/run-001/final_model.pt", weights_only=True)["model"]
                  for folder in (whole[0], tmp_path / "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)  # bit for bit
    assert "no unfinished run" in error_of(again, capsys)
    results = tmp_path / "killed/toxicity/run-001/results.json"
    results.write_text(json.dumps(resumed | {"experiment": "fire", "finished": False}))
    assert "no unfinished run" in error_of(["--resume", str(results.parent)], capsys)


def test_a_comparison_that_fails_keeps_what_is_done_and_goes_on(tmp_path, monkeypatch, capsys):
    argv = [*DENDRITES, "--sample-size", "200", "--compare-dendrites", "--output-dir", str(tmp_path)]
    train = toxicity.train_classifier

    def fail_in_the_second_arm(model, tokenizer, data, args, arm, path, from_scratch):
        if arm == "baseline":
            raise toxicity.UserError("out of luck")
        return train(model, tokenizer, data, args, arm, path, from_scratch)

    with monkeypatch.context() as patch:
        patch.setattr(toxicity, "train_classifier", fail_in_the_second_arm)
        assert "out of luck" in error_of(argv, capsys)
    run = tmp_path / "toxicity/run-001"
    first = (run / "seed-42-dendrites/best_model.pt").stat().st_mtime_ns
    results = toxicity.main(["--resume", "--output-dir", str(tmp_path)])
    assert (run / "seed-42-dendrites/best_model.pt").stat().st_mtime_ns == first
    assert [row["arm"] for row in results["table"]] == [*toxicity.ARMS, "TF-IDF"]
    epochs = {arm: json.loads((run / f"seed-42-{arm.replace(' ', '-')}/results.json").read_text())["training"]
              for arm in toxicity.ARMS}
    assert {len(epochs[arm]["history"]) for arm in ("dendrites", "same budget", "wider")} == {4}
    assert [switch["epoch"] for switch in epochs["same budget"]["switches"]] == [2]
    wider = results["table"][3]["parameters"]
    assert abs(wider - 4_800_902) < 100 and "dendrites minus this, F1" in results["table"][1]


def test_the_texts_of_a_trained_model_stay_its_own(tmp_path, capsys):
    texts, labels = toxicity.generate_comments(300, seed=1)
    path, out = write_csv(tmp_path / "comments.csv", texts, labels.astype(int)), ["--output-dir", tmp_path / "out"]
    argv = ["--data", path, "--from-scratch", "--no-dendrites", "--epochs", "1", "--max-length", "16", *out]
    toxicity.main(list(map(str, argv)))
    for more in (["--seed", "42"], ["--sample-size", "100"], ["--label-threshold", "0.4"]):
        assert "the model was trained with" in error_of(["--evaluate", *more, *out], capsys)
    assert "the model was trained with it" in error_of(["--evaluate", "--data", path, *out], capsys)
    assert toxicity.main(["--evaluate", *map(str, out)])["data"]["rows"] == 300  # all rows: those of the run
    write_csv(path, texts[::-1], labels.astype(int)[::-1])
    assert "may have seen" in error_of(["--quantize", *out], capsys)
    other = write_csv(tmp_path / "other.csv", *(own[:250] for own in (texts, labels.astype(int))))
    assert toxicity.main(list(map(str, ["--evaluate", "--data", other, *out])))["data"]["rows"] == 250


def test_foreign_and_truncated_files_are_refused(dendritic, tmp_path, capsys):
    path = dendritic[0] / "toxicity/run-001/best_model.pt"
    whole = path.read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"model": {}}, tmp_path / "other.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "pickle.pt")  # a pickled class is not loaded
    state = torch.load(path, weights_only=True)
    torch.save(state | {"dendrites": 1 - state["dendrites"]}, tmp_path / "layout.pt")
    for name in ("half", "text", "other", "pickle", "layout"):
        for mode in ("--evaluate", "--checkpoint"):
            more = ["--predict", "hello"] if mode == "--checkpoint" else []
            line = error_of([mode, tmp_path / f"{name}.pt", *more, "--output-dir", tmp_path], capsys)
            assert f"{name}.pt" in line
    assert "no such file" in error_of(["--evaluate", tmp_path / "absent.pt", "--output-dir", tmp_path], capsys)


def test_the_best_epoch_is_kept_and_its_loss_is_weighted_by_class(plain):
    output, results = plain
    classifier = toxicity.Classifier.load(output / "toxicity/run-001/best_model.pt", torch.device("cpu"))
    data = toxicity.load_data(toxicity.parse_args(SMALL))
    (_, train_labels), (texts, labels) = data.part("train"), data.part("validation")
    logits = toxicity.predict_logits(classifier.model, classifier.tokens(texts))
    weights = torch.tensor([len(train_labels) / (2 * (train_labels == label).sum()) for label in (0, 1)]).float()
    history = results["training"]["history"]
    best = max(history, key=lambda epoch: epoch["validation_pr_auc"])
    assert history.index(best) == results["best_epoch"] - 1
    loss = nn.functional.cross_entropy(logits, torch.from_numpy(labels), weights).item()
    assert best["validation_loss"] == pytest.approx(loss, rel=1e-4)


# --- Evaluation and deployment ----------------------------------------------------------------------------------------


def test_the_threshold_is_chosen_on_validation_alone():
    labels = np.array([0, 0, 0, 1, 1, 0])
    assert toxicity.best_threshold(labels, np.array([0.1, 0.2, 0.5, 0.4, 0.9, 0.3])) == 0.4
    rng = np.random.default_rng(0)
    labels, texts = (rng.random(600) < 0.3).astype(np.int64), [str(i) for i in range(600)]
    scores = np.clip(labels * 0.3 + rng.random(600) * 0.7, 0, 1)
    parts = {part: np.arange(200 * i, 200 * i + 200) for i, part in enumerate(toxicity.PARTS)}
    thresholds = []
    for shift in (0.0, 0.25):  # other scores on the test part must not move the threshold
        moved = np.where(np.arange(600) >= 400, np.clip(scores - shift, 0, 1), scores)
        data = toxicity.Texts(texts, labels, parts, {})
        # Disguised texts are still the numbers: words below four letters stay as they are.
        scorer = (lambda own, m=moved: m[[int(text) for text in own]], None)
        results = toxicity.evaluate({"model": scorer}, data, seed=0)
        thresholds.append(results["model"]["tuned"]["threshold"])
        low, high = results["model"]["f1_interval"]
        assert low < results["model"]["tuned"]["f1"] < high
    assert thresholds[0] == thresholds[1] == toxicity.best_threshold(labels[200:400], scores[200:400])


def test_int8_and_onnx_agree_with_the_float_model(dendritic, tmp_path):
    checkpoint = dendritic[0] / "toxicity/run-001/final_model.pt"
    argv = ["--quantize", "--export-onnx", "--checkpoint", str(checkpoint), "--output-dir", str(tmp_path)]
    results = toxicity.main(argv)
    full, int8, onnx = results["deployments"]
    assert int8["MB"] < 6 and int8["largest logit difference"] < 0.05
    assert onnx["largest logit difference"] < 1e-4 and onnx["F1"] == full["F1"]
    run = tmp_path / "toxicity/run-001"
    texts = toxicity.generate_comments(50, seed=9)[0]
    scores = [toxicity.Classifier.load(path, torch.device("cpu")).scores(texts)
              for path in (checkpoint, run / "model_int8.pt")]
    np.testing.assert_allclose(*scores, atol=0.005)
    assert (run / "tokenizer.json").exists()


def test_speed_is_measured_beside_a_bert_base(plain, tmp_path, monkeypatch, capsys):
    argv = ["--checkpoint", str(plain[0] / "toxicity/run-001/best_model.pt"), "--output-dir", str(tmp_path)]
    tiny, base = toxicity.main(["--benchmark-only", *argv])["deployments"]
    assert (tiny["parameters"], base["parameters"]) == (4_386_178, 109_483_778)
    assert tiny["latency ms"] < tiny["p95 ms"] <= tiny["p99 ms"] and tiny["texts/s"] < tiny["texts/s, model alone"]
    assert tiny["texts/s"] > 5 * base["texts/s"] and tiny["memory MiB"] == pytest.approx(4 * 4_386_178 / 2**20, 0.01)
    monkeypatch.setattr(toxicity.importlib.util, "find_spec", lambda name: None)
    assert "pip install onnx onnxruntime" in error_of(["--export-onnx", *argv], capsys)


def test_int8_layers_against_their_definition():
    torch.manual_seed(0)
    linear, embedding, x = nn.Linear(64, 32), nn.Embedding(50, 16), torch.randn(10, 64)
    small = toxicity.Int8Linear(linear)
    rebuilt = small.weight * small.scale.unsqueeze(1)
    assert (rebuilt - linear.weight).abs().max() <= small.scale.max() / 2 + 1e-7
    assert small.weight.abs().amax(1).eq(127).all()  # the whole range of int8 is used
    torch.testing.assert_close(small(x), x @ rebuilt.T + linear.bias, atol=0.05, rtol=0)
    ids = torch.tensor([[1, 7], [49, 0]])
    torch.testing.assert_close(toxicity.Int8Embedding(embedding)(ids), embedding(ids), atol=0.02, rtol=0)


def test_a_plain_model_is_exported_for_transformers_and_trained_on(plain, tmp_path, capsys):
    from transformers import BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path / "hf"
    toxicity.main(["--export-hf", str(folder), "--output-dir", str(plain[0])])
    model, tokenizer = (kind.from_pretrained(folder) for kind in (BertForSequenceClassification, BertTokenizerFast))
    own = toxicity.Classifier.load(plain[0] / "toxicity/run-001/best_model.pt", torch.device("cpu"))
    text = "You are a complete clown"
    with torch.no_grad():
        score = model.eval()(**tokenizer(text, return_tensors="pt")).logits.softmax(1)[0, 1].item()
    assert score == pytest.approx(own.scores([text])[0], abs=1e-5)
    argv = [*SMALL, "--no-dendrites", "--epochs", "1", "--model", str(folder), "--output-dir", str(tmp_path)]
    argv.remove("--from-scratch")
    results = toxicity.main(argv)
    assert results["parameters"] == 4_386_178 and "hf" in results["models"]
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    assert "no BERT" in error_of(argv, capsys)
    os.remove(folder / "model.safetensors")
    assert "no BERT" in error_of(argv, capsys)


def test_a_giant_is_really_trained_before_it_is_compared(plain, tmp_path):
    results = toxicity.main(["--compare-base", "--giant", "scratch", "--epochs", "2", "--checkpoint",
                             str(plain[0] / "toxicity/run-001/best_model.pt"), "--output-dir", str(tmp_path)])
    assert len(results["giant_training"]) == 2
    giant = torch.load(tmp_path / "toxicity/run-001/giant.pt", weights_only=True)["model"]
    assert all((weight != 1).any() for name, weight in giant.items() if name.endswith("LayerNorm.weight"))  # 1 at first
    assert [row["criterion"].split()[0] for row in results["giant_killer"]] == ["F1", "speed", "size", "real"]


def test_texts_and_stdin_are_scored(dendritic, monkeypatch, capsys):
    argv = ["--predict", "--format", "json", "--output-dir", str(dendritic[0])]
    monkeypatch.setattr(sys, "stdin", io.StringIO("you are a clown\n\nthis joke killed me\n"))
    rows = toxicity.main(argv)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == rows and [row["text"] for row in rows] == ["you are a clown", "", "this joke killed me"]
    threshold = toxicity.Classifier.load(toxicity.find_checkpoint(toxicity.parse_args(argv)), "cpu").threshold
    for row in rows:
        assert row["toxic"] == (row["tier"] in ("review", "remove")) == (row["score"] >= round(threshold, 4))
    assert toxicity.main([*argv[:1], "you are a clown", *argv[3:]])[0] == rows[0]
    assert "score   decision" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "no text" in error_of(argv, capsys)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("schön".encode("latin-1")), encoding="utf-8"))
    assert "not UTF-8" in error_of(argv, capsys)
    assert "perforatedai" not in subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "toxicity.py"), *argv[:1], "hello", *argv[3:]],
        capture_output=True, text=True, check=True).stderr


# --- Errors -----------------------------------------------------------------------------------------------------------


def write_csv(path, texts, labels):
    pa.csv.write_csv(pa.table({"text": texts, "toxicity": labels}), path)
    return path


def test_bad_files_end_in_one_line(tmp_path, capsys):
    out = ["--output-dir", tmp_path / "out"]
    texts, labels = toxicity.generate_comments(300, seed=1)
    good = write_csv(tmp_path / "good.csv", texts, labels.astype(int))
    latin = tmp_path / "latin.csv"
    latin.write_bytes("text,toxicity\nschön,1\n".encode("latin-1"))
    head = tmp_path / "latin_head.csv"
    head.write_bytes("text,größe,toxicity\na,b,1\n".encode("latin-1"))
    lines = tmp_path / "latin.jsonl"
    lines.write_bytes('{"text": "schön", "toxicity": 1}\n'.encode("latin-1"))
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "head.csv").write_text("text,toxicity\n")
    (tmp_path / "comments.xlsx").write_text("x")
    words = write_csv(tmp_path / "words.csv", texts, ["bad" if label else "good" for label in labels])
    blank = write_csv(tmp_path / "blank.csv", [*texts[:4], "  ", *texts[5:]], labels.astype(int))
    one = write_csv(tmp_path / "one.csv", texts, np.zeros(300, int))
    gap = write_csv(tmp_path / "gap.csv", texts, [None, *labels[1:].astype(int).tolist()])
    cases = [
        (["--data", good, "--text-column", "comment"], "one column 'comment' is needed, there are text, toxicity"),
        (["--data", blank], "row 5 of the data, column 'text': empty text"),
        (["--data", one], "0 of them toxic"),
        (["--data", latin], "UTF-8"), (["--data", head], "UTF-8"), (["--data", lines], "UTF-8"),
        (["--data", good, "--text-column", "toxicity"], "are the same"),
        (["--data", words], "--positive-label"),
        (["--data", words, "--positive-label", "worse"], "'bad'"),
        (["--data", gap], "no label"),
        (["--data", tmp_path / "empty.csv"], "empty.csv"),
        (["--data", tmp_path / "head.csv"], "no rows"),
        (["--data", tmp_path / "comments.xlsx"], ".csv, .jsonl"),
        (["--data", tmp_path / "absent.csv"], "absent.csv"),
        (["--data", tmp_path], "are read"),
    ]
    for argv, expected in cases:
        assert expected in error_of([*argv, *out], capsys)
    assert not list((tmp_path / "out").rglob("run-*"))  # no empty run is left behind


def test_bad_arguments_end_in_one_line(dendritic, tmp_path, capsys):
    out = ["--output-dir", tmp_path / "out"]
    cases = [
        (["--epochs", "0"], "--epochs"), (["--nonsense"], "--nonsense"), (["--device", "tpu"], "--device"),
        (["--epochs", "4"], "8 are needed"), (["--data", "x.csv", "--dataset", "embedded"], "together"),
        (["--evaluate", "--no-dendrites"], "together"), (["--checkpoint", "x.pt"], "goes with"),
        (["--model", "x", "--from-scratch"], "together"), (["--resume", "--seed", "1"], "--resume"),
        (["--evaluate", "--predict", "hello"], "train first"), (["--quantize", "--predict", "hello"], "together"),
        (["--predict", "hello", "--data", "x.csv"], "together"), (["--benchmark-only", "--compare-base"], "together"),
        (["--positive-label", "0"], "goes with --data"),
        (["--sample-size", "7"], "at least 100"), (["--max-length", "600"], "--max-length"),
        (["--evaluate"], "train first"), (["--predict", "hello"], "train first"),
        ([*SMALL[:2], "--no-dendrites", "--model", tmp_path], "no BERT"),
        ([*DENDRITES, "--learning-rate", "1e9"], "not finite"),
        (["--compare-base", "--giant", tmp_path / "absent", "--checkpoint",
          dendritic[0] / "toxicity/run-001/best_model.pt"], "no such folder"),
        (["--export-hf", tmp_path / "hf", "--checkpoint", dendritic[0] / "toxicity/run-001/final_model.pt"],
         "--no-dendrites"),
    ]
    for argv, expected in cases:
        assert expected in error_of([*argv, *out], capsys), argv
    file = tmp_path / "file"
    file.write_text("")
    assert str(file) in error_of([*SMALL, "--output-dir", file], capsys)


@pytest.mark.skipif(not TWEETS.exists(), reason="the real tweets are not beside this checkout")
def test_real_tweets_are_read(tmp_path):
    argv = ["--data", str(TWEETS), "--text-column", "tweet", "--label-column", "class", "--positive-label", "0"]
    data = toxicity.load_data(toxicity.parse_args([*argv, "--sample-size", "0"]))
    assert data.info["rows"] == 24_783 and sum(data.labels) == 1_430
    assert {part: len(rows) for part, rows in data.parts.items()}["test"] == pytest.approx(2_478, abs=3)
