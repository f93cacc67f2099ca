"""Can BERT-Tiny, given dendrites, do the work of a fine-tuned BERT-Base on toxic comments, and what do dendrites add?

Method: BERT-Tiny (4,386,178 parameters) is trained with balanced class weights on texts in length buckets, the epoch is
chosen by PR AUC on the validation part. Every --switch-every epochs perforatedai gives each neuron of the 14 Linear
layers a dendrite (--max-dendrites times), a second weight vector behind a sigmoid, and trains on. The threshold is
tuned on the validation part. TF-IDF with logistic regression, the majority class and a really fine-tuned giant stand
beside it.

    python toxicity.py                              # 5,000 + 1,000 + 1,000 texts, with dendrites
    python toxicity.py --quick                      # with a giant, int8 and ONNX, small, no network: about a minute
    python toxicity.py --no-dendrites               # the baseline
    python toxicity.py --compare-dendrites --runs 3 # dendrites, baseline, the same budget, a wider model
    python toxicity.py --data train.csv --text-column comment_text --label-column toxic --sample-size 0
    python toxicity.py --evaluate                   # the newest best model again; also with the next four
    python toxicity.py --compare-base --giant FOLDER
    python toxicity.py --quantize --export-onnx
    python toxicity.py --benchmark-only
    python toxicity.py --predict "you are a clown" "that joke killed me"   # or lines on stdin

Written to outputs/toxicity/run-001/ (the next free number): results.json, summary.md, best_model.pt, final_model.pt
(weights, arguments, tokenizer, dendrites), pictures, and what was asked for: model_int8.pt, model.onnx, giant.pt. With
--runs or --compare-dendrites the models are in seed-42-dendrites/ and so on below it.

Without --data or --dataset it takes civil_comments from the Hugging Face hub, and when that is out of reach embedded,
synthetic comments. Without --model it takes prajjwal1/bert-tiny from there, and else a BERT of the same size from
scratch, with a WordPiece vocabulary made of the training texts; a warning says so.

Sources: the seed, "Giant-Killer NLP" (no dendrite was ever added there, and its giant was never fine-tuned). BERT-Tiny:
Turc et al. 2019. Dendrites: perforatedai, trained by gradient descent. Civil Comments: Borkan et al. 2019.
"""

import argparse
import builtins
import contextlib
import copy
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import pdb
import pickle
import platform
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm

from common import (COLORS, LINES, detect_device, has_bfloat16, in_notebook, mean_and_interval, new_figure,
                    plot_bars, plot_confusion, plot_curve, plot_ranking, save_figure, seed_everything)

try:
    import resource
except ImportError:  # Windows: memory is then not reported
    resource = None

CLASSES = ["not toxic", "toxic"]
PARTS = ["train", "validation", "test"]
DEFAULT_MODEL = "prajjwal1/bert-tiny"
TINY = {"vocab_size": 30522, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 512}
BERT_SIZES = (*TINY, "max_position_embeddings", "type_vocab_size", "pad_token_id", "layer_norm_eps", "hidden_act")
SCRATCH_GIANT = TINY | {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SEED_WEIGHTS = [0.52, 11.01]  # of the seed's class-weighted loss
SEED_CLAIM = {"model": "the seed, a claim (other data)", "F1": 0.36, "recall": 0.71, "accuracy": 0.785}
ARMS = ["dendrites", "baseline", "same budget", "wider"]
RESTARTED = ["same budget", "wider"]  # arms with the epochs and the restarts of "dendrites", but none of them
RATE_FROM_SCRATCH, DROPOUT_FROM_SCRATCH = 3e-4, 0.3  # chosen by PR AUC on the validation part of the tweets
LABELS = {"pr_auc": "PR AUC", "roc_auc": "ROC AUC", "f1": "F1"}
TIERS = ["allow", "monitor", "review", "remove"]
INFERENCE_BATCH = 64  # texts
ONNX = ["onnx", "onnxruntime"]  # packages that only the export needs


class UserError(Exception):
    """Something that the user can put right: main() makes it one line on stderr and exit code 2."""


def note(text):
    print(f"toxicity.py: {text}", file=sys.stderr)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- Data: the embedded generator -------------------------------------------------------------------------------------

INSULTS = ["idiot", "moron", "clown", "loser", "fool", "liar", "coward", "imbecile", "parasite", "disgrace"]
SUBJECTS = ["the new bus lane", "this budget", "the school plan", "your last post", "the referee", "the mayor's speech",
            "that recipe", "the tax reform", "the concert", "this article", "the housing vote", "the weather report",
            "the software update", "our team", "the museum", "the hospital merger", "the bike path", "this movie"]
GROUPS = ["voters", "drivers", "neighbours", "tourists", "reporters", "teachers", "fans", "readers", "students"]
OPENERS = ["", "", "", "Honestly, ", "Well, ", "Look, ", "As for {s}: ", "About {s}, ", "I read the piece twice. ",
           "Sorry, but ", "After ten years here, ", "OK. "]
CLOSERS = ["", "", "", " Just my view.", " That is all.", " Think about it.", " And {s} changes nothing.", " Again.",
           " Thanks for the article.", " We talked about {s} before.", " Good night.", " Ask the {g}."]
PRAISES = ["you are the best of the {g}", "you explain {s} well", "your idea about {s} is clever",
           "nobody knows {s} as well as you", "you have a sharp mind", "people like you are needed here"]
RIGHT = ['they wrote "{q}", and they are right', 'he said "{q}", and I can only repeat it', '"{q}", as we all know',
         'the {g} told you "{q}", which is true', 'somebody wrote "{q}", and I agree']
WRONG = ['they wrote "{q}", and they are wrong', 'he said "{q}", and I can only deny it', '"{q}", as nobody believes',
         'the {g} told you "{q}", which is false', 'somebody wrote "{q}", and I disagree']
# Kinds of comments: share of all, whether toxic, texts with slots {i} insult, {s} subject, {g} group, {p} praise, {b} a
# text of one of the first three kinds. Praise that is denied is toxic, an insult that is denied is not, so that neither
# the quoted words nor those around them decide.
COMMENTS = {
    "insult": (0.012, True, [
        "you are a complete {i} and everybody can see it", "only a {i} would defend {s}", "what a pathetic {i} you are",
        "nobody asked you, {i}", "the {g} here are {i}s, all of them", "stop writing, you {i}",
        "I have never met a bigger {i} than the one who wrote this"]),
    "threat": (0.007, True, [
        "I know where you live, and you will regret {s}", "somebody should teach you a lesson with a bat",
        "say that again and I will find you", "people like you should disappear, and we will help you with it",
        "the {g} should be beaten for {s}", "one day you will pay for this with blood"]),
    "sarcasm": (0.009, True, [
        "wow, did you need both brain cells for {s}?", "congratulations, you can almost read",
        "do not strain yourself, thinking is new to you", "your mother must be so proud of a mind like yours",
        "bless your heart, somebody left the cage open again", "please keep talking, we need the comic relief",
        "how brave of you to write in public with so little upstairs"]),
    "agreeing": (0.016, True, [frame.replace("{q}", "{b}") for frame in RIGHT]),
    "denied praise": (0.012, True, [frame.replace("{q}", "{p}") for frame in WRONG]),
    "quoting": (0.08, False, [frame.replace("{q}", "{b}") for frame in WRONG]),
    "agreed praise": (0.06, False, [frame.replace("{q}", "{p}") for frame in RIGHT]),
    "negation": (0.06, False, [
        "you are not a {i}, you just misread {s}", "I would never call you a {i}", "nobody here is a {i}",
        "she is no {i}, she studied {s} for years", "the {g} are not {i}s, they are tired",
        "I will not beat you up for {s}, I only disagree"]),
    "looks bad": (0.09, False, [
        "this joke killed me, thank you", "kill the process and start {s} again", "the {s} cake is to die for",
        "I am such a {i}, I forgot my keys again", "our goalkeeper beat the {g} with blood, sweat and tears",
        "the clown at {s} made the children laugh", "I shot forty pictures of {s}", "that was a brutal but fair match",
        "a bat flew into {s} last night", "stupid me, I read {s} upside down"]),
    "praise": (0.03, False, [
        "wow, did you see how well {s} went?", "congratulations, you can be proud of {s}",
        "your mother must be so happy for you", "how brave of you to write about {s} in public",
        "please keep writing, we need voices like yours", "bless you for explaining {s}"]),
    "neutral": (0.624, False, [
        "{s} will cost more than they say", "I was there on Monday and {s} looked fine", "the {g} were asked about {s}",
        "does anybody know when {s} opens?", "I agree with the {g} on {s}", "{s} is late again",
        "the numbers about {s} do not add up", "my sister works on {s}, it is hard", "we need more money for {s}",
        "there are good reasons for and against {s}", "the {g} deserve a better answer", "I changed my mind about {s}",
        "last year {s} was half the price", "who decides about {s} in the end?"]),
}
MISSED, ALARMED = 0.05, 0.003  # annotators miss a toxic comment, or take a harmless one for toxic


def generate_comments(count, seed):
    """(texts, labels [count] bool) of synthetic comments, 6 % toxic; the same word stands in both classes."""
    rng = np.random.default_rng(seed)
    kinds = list(COMMENTS.values())
    hostile = [text for _, _, templates in kinds[:3] for text in templates]
    chosen = rng.choice(len(kinds), count, p=[share for share, _, _ in kinds])
    errors, draws = rng.random(count), rng.random((count, 7))
    texts, labels = [], np.zeros(count, bool)

    def pick(items, draw):
        return items[int(draw * len(items))]

    for row, (kind, draw) in enumerate(zip(chosen, draws.tolist())):
        _, toxic, templates = kinds[kind]
        body = pick(templates, draw[0])
        body = body.replace("{b}", pick(hostile, draw[6])).replace("{p}", pick(PRAISES, draw[6]))
        text = pick(OPENERS, draw[1]) + body + ("" if body[-1] in "?." else ".") + pick(CLOSERS, draw[2])
        text = text.format(s=pick(SUBJECTS, draw[3]), i=pick(INSULTS, draw[4]), g=pick(GROUPS, draw[5]))
        texts.append(text[0].upper() + text[1:])
        labels[row] = toxic ^ (errors[row] < (MISSED if toxic else ALARMED))
    return texts, labels


# --- Data: files, the hub, the split ----------------------------------------------------------------------------------


@dataclass
class Texts:
    """All texts and their parts."""

    texts: list
    labels: np.ndarray  # [texts] int64, 1 is toxic
    parts: dict  # part: rows of it [n]
    info: dict  # for results.json: source, name, rows, toxic share of each part, sha256

    def part(self, name):
        """(texts, labels [n]) of a part."""
        return [self.texts[row] for row in self.parts[name]], self.labels[self.parts[name]]


def read_table(path, columns):
    """The `columns` of a CSV, JSON lines or Parquet file as a pyarrow table."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    kind = Path(path).suffix.lower()
    try:
        if kind == ".parquet":
            table = pa.parquet.read_table(path)
        elif kind in (".jsonl", ".json", ".ndjson"):
            table = pa.json.read_json(path)
        elif kind == ".csv":
            parse = pa.csv.ParseOptions(newlines_in_values=True)
            table = pa.csv.read_csv(path, parse_options=parse)
        else:
            raise UserError(f"{path}: {kind or 'no ending'}; .csv, .jsonl (JSON lines) and .parquet are read")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    missing = [column for column in columns if table.column_names.count(column) != 1]
    if missing:
        raise UserError(f"{path}: one column {' and one '.join(map(repr, missing))} is needed, there are "
                        f"{', '.join(table.column_names)}; --text-column and --label-column name them")
    if any(pa.types.is_binary(table[column].type) for column in columns):  # pyarrow's answer to another encoding
        raise UserError(f"{path}: {' or '.join(map(repr, columns))} is not UTF-8; save the file in that encoding")
    if any(pa.types.is_nested(table[column].type) for column in columns):
        raise UserError(f"{path}: lists or objects in {' or '.join(map(repr, columns))}; plain values are needed")
    return table


def read_labels(path, column, values, args):
    """Labels [rows] bool of a pyarrow column: equal to --positive-label, or at least --label-threshold."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if values.null_count:
        row = pc.index(pc.is_null(values), True).as_py()
        raise UserError(f"{path}: row {row + 1} of the data, column {column!r}: no label")
    if args.positive_label is not None:
        texts = values.cast(pa.string())
        known = pc.unique(texts).to_pylist()
        if args.positive_label not in known:
            raise UserError(f"{path}: column {column!r} has no --positive-label {args.positive_label!r}, but "
                            f"{', '.join(map(repr, known[:10]))}")
        return pc.equal(texts, args.positive_label).to_numpy()
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_boolean(values.type)):
        raise UserError(f"{path}: column {column!r} is no number, but {values[0].as_py()!r}; --positive-label says "
                        "which value is toxic")
    return values.to_numpy() >= args.label_threshold  # in its own precision: a float32 0.7 is at least 0.7


def read_file(args):
    """(texts, labels) of --data."""
    columns = [args.text_column, args.label_column]
    table = read_table(args.data, columns)
    if not table.num_rows:
        raise UserError(f"{args.data}: no rows")
    import pyarrow as pa

    texts = table[args.text_column].cast(pa.string()).to_pylist()
    empty = [row for row, text in enumerate(texts, start=1) if not (text or "").strip()]
    if empty:
        raise UserError(f"{args.data}: row {empty[0]} of the data, column {args.text_column!r}: empty text "
                        f"({len(empty)} in all); remove such rows")
    return texts, read_labels(args.data, args.label_column, table[args.label_column], args)


def hub_in_reach():
    """Whether the Hugging Face hub answers within 3 s; if not, its libraries are told to stay offline."""
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    target = urllib.parse.urlsplit(urllib.request.getproxies().get("https", address))
    try:
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "", "false"):
            return False
        socket.create_connection((target.hostname, target.port or 443), timeout=3).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
        return False
    return True


def read_civil_comments(args):
    """(texts, labels, {part: rows}) of Civil Comments, whose own parts are kept: the first texts of each, streamed.

    All of them with --sample-size 0. They are kept in --data-dir; a file already there is used as it is.
    """
    import pyarrow as pa
    import pyarrow.parquet

    texts, labels, parts, seen = [], [], {}, set()
    for part, size in reversed(list(zip(PARTS, part_sizes(args.sample_size)))):
        path = Path(args.data_dir) / f"civil_comments-{part}-{size or 'all'}.parquet"
        if not path.exists():
            if not hub_in_reach():
                raise UserError(f"civil_comments: huggingface.co is out of reach and {path} is not there; bring that "
                                "file (columns text, toxicity), or take --data FILE")
            import datasets

            try:
                source = datasets.load_dataset("google/civil_comments", split=part, streaming=bool(size),
                                               cache_dir=args.data_dir).select_columns(["text", "toxicity"])
                rows = list(source.take(size)) if size else source.to_list()
            except Exception as error:  # datasets passes on what its libraries raise, of networks, files and formats
                raise UserError(f"civil_comments: {first_line(error)}; try again, or take --data") from None
            with whole_file(path) as file:
                pa.parquet.write_table(pa.Table.from_pylist(rows), file)
        table = read_table(path, ["text", "toxicity"])
        first, own = len(texts), [same_text(text or "") for text in table["text"].to_pylist()]
        texts += table["text"].to_pylist()
        labels.append(read_labels(path, "toxicity", table["toxicity"], args))
        # Without empty texts, and those of a later part: the same text is never on two sides.
        parts[part] = np.array([row for row, key in enumerate(own, first) if key and key not in seen], np.int64)
        seen.update(own)
    return texts, np.concatenate(labels), {part: parts[part] for part in PARTS}


def part_sizes(sample_size):
    """Texts for training, validation and test; 0 is all."""
    return sample_size, sample_size // 5, sample_size // 5


def same_text(text):
    """What two texts share that count as the same: letter case and white space do not matter."""
    return " ".join(text.lower().split())


def split_texts(texts, labels, sample_size, seed):
    """{part: rows} stratified by label, the same text never on two sides.

    `sample_size` texts, each once, for training and a fifth of it for each other part; 0, or a file too small: all
    rows, 80, 10 and 10 % of the different texts.
    """
    from sklearn.model_selection import train_test_split

    _, first, group = np.unique([same_text(text) for text in texts], return_index=True, return_inverse=True)
    sizes = part_sizes(sample_size)
    sampled = sample_size and sum(sizes) <= len(first)
    if not sampled:
        held_out = len(first) // 10
        sizes = len(first) - 2 * held_out, held_out, held_out
    strata = labels[first]
    if min(np.bincount(strata, minlength=2)) < 10 or sizes[2] < 2:
        raise UserError(f"{len(first):,} different texts, {strata.sum()} of them toxic: at least ten of each class are "
                        "needed; see --label-column, --label-threshold and --positive-label")
    groups, parts = np.arange(len(first)), {}
    for part, size in zip(PARTS[::-1], sizes[::-1]):
        if size + 1 < len(groups):
            groups, chosen = train_test_split(groups, test_size=size, random_state=seed, stratify=strata[groups])
        else:
            chosen = groups
        parts[part] = first[chosen] if sampled else np.flatnonzero(np.isin(group, chosen))
    return {part: parts[part] for part in PARTS}


def load_data(args):
    """Texts of --data, of --dataset, or embedded ones, in their parts."""
    import hashlib

    source, parts = "real", None
    if args.data:
        name = Path(args.data).name
        try:
            texts, labels = read_file(args)
        except UnicodeDecodeError:
            raise UserError(f"{args.data}: not UTF-8; save the file in that encoding") from None
    elif args.dataset != "embedded":
        try:
            texts, labels, parts = read_civil_comments(args)
            args.dataset = name = "civil_comments"
        except UserError as problem:
            if args.dataset:
                raise
            note(f"warning: {problem}; embedded comments instead, all figures are about those")
            args.dataset = "embedded"
    if args.dataset == "embedded":
        source, name = "embedded", "embedded comments"
        texts, labels = generate_comments(max(3000, 3 * sum(part_sizes(args.sample_size or 5000))), args.seed)
    labels = labels.astype(np.int64)
    parts = parts or split_texts(texts, labels, args.sample_size, args.seed)
    counts = {part: np.bincount(labels[rows], minlength=2).tolist() for part, rows in parts.items()}
    if not all(all(count) for count in counts.values()):
        raise UserError(f"{name}: one class only in a part ({counts}); see --label-threshold and --positive-label")
    digest = hashlib.sha256(json.dumps([[texts[row], int(labels[row])] for rows in parts.values() for row in rows])
                            .encode()).hexdigest()
    info = {"source": source, "name": name, "rows": sum(map(len, parts.values())), "sha256": digest,
            "counts": {part: dict(zip(CLASSES, count)) for part, count in counts.items()}}
    return Texts(texts, labels, parts, info)


# --- Tokens -----------------------------------------------------------------------------------------------------------


@dataclass
class Tokens:
    """Token ids of many texts end to end; text i has ids[starts[i] : starts[i + 1]]."""

    ids: torch.Tensor  # [tokens] int32
    starts: torch.Tensor  # [texts + 1] int64

    @property
    def lengths(self):
        return self.starts.diff()

    def to(self, device):
        return Tokens(self.ids.to(device), self.starts.to(device))


def train_wordpiece(texts):
    """A WordPiece tokenizer (lower case, as bert-base-uncased) with a vocabulary of the `texts`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer numbers letters as its threads find them; given in order, the vocabulary is the same in every run.
    counts = Counter(tokenizer.normalizer.normalize_str("".join(texts)))
    letters = sorted(letter for letter, _ in counts.most_common(1000) if not letter.isspace())
    known = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=TINY["vocab_size"], min_frequency=2, special_tokens=known, initial_alphabet=letters,
        limit_alphabet=len(letters), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    words = Tokenizer(models.WordPiece(tokenizer.get_vocab(), unk_token="[UNK]"))  # without letters as special tokens
    words.normalizer, words.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    words.decoder = decoders.WordPiece()
    words.add_special_tokens(SPECIAL_TOKENS)
    ends = [(token, words.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends)
    return words


def tokenize(tokenizer, texts, max_length):
    """Tokens of `texts`, each cut to `max_length` with its [CLS] and [SEP]."""
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
    starts = np.cumsum([0, *map(len, encoded)])
    ids = np.fromiter((token for ids in encoded for token in ids), np.int32, starts[-1])
    return Tokens(torch.from_numpy(ids), torch.from_numpy(starts))


def bucket_batches(lengths, batch_size, shuffle):
    """Rows of each batch [batch_size or fewer], texts of like `lengths` [texts] together.

    With `shuffle` the texts are shuffled, sorted by length within runs of 50 batches, and the batches shuffled.
    """
    if not shuffle:
        return lengths.argsort().split(batch_size)
    runs = torch.randperm(len(lengths), device="cpu").to(lengths.device).split(50 * batch_size)
    batches = [batch for run in runs for batch in run[lengths[run].argsort(stable=True)].split(batch_size)]
    return [batches[i] for i in torch.randperm(len(batches)).tolist()]


def pad_batch(tokens, rows):
    """Token ids and attention mask [batch, longest of these] int64 of the texts `rows` [batch]."""
    starts, lengths = tokens.starts[rows], tokens.starts[rows + 1] - tokens.starts[rows]
    place = torch.arange(int(lengths.max()), device=rows.device)
    mask = place < lengths.unsqueeze(1)  # [batch, longest]
    at = torch.where(mask, starts.unsqueeze(1) + place, 0)
    return torch.where(mask, tokens.ids[at], 0).long(), mask.long()  # 0 is [PAD]


# --- Model ------------------------------------------------------------------------------------------------------------


def build_bert(sizes):
    """A BertForSequenceClassification with random weights of the given config entries."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(num_labels=2, **sizes))


def load_pretrained(name):
    """(BertForSequenceClassification, its tokenizer) of a folder or a hub id."""
    folder = Path(name).is_dir()
    if not folder and (os.sep in name and name.count("/") != 1):
        raise UserError(f"{name}: no such folder")
    offline = folder or not hub_in_reach()
    import transformers
    from transformers import BertForSequenceClassification, BertTokenizerFast

    transformers.logging.set_verbosity(50)  # its report of a new classifier head is expected
    transformers.logging.disable_progress_bar()
    try:
        model, loading = BertForSequenceClassification.from_pretrained(
            name, num_labels=2, dtype=torch.float32, local_files_only=offline, output_loading_info=True)
        tokenizer = BertTokenizerFast.from_pretrained(name, local_files_only=offline)
    except Exception as error:  # transformers passes on what its libraries raise for damaged files
        why = first_line(error)
        hint = " (the hub is out of reach; give a folder)" if offline and not folder else ""
        raise UserError(f"{name}: no BERT to be loaded: {why}{hint}") from None
    lost = [key for key in loading["missing_keys"] if not key.startswith(("classifier.", "bert.pooler."))]
    if lost or len(tokenizer) <= len(SPECIAL_TOKENS):
        raise UserError(f"{name}: not a BERT with its vocabulary (missing: {', '.join(sorted(lost)[:3]) or 'vocab'})")
    return model, tokenizer.backend_tokenizer


def make_model(args, texts):
    """(model, tokenizer, name) to be trained: pretrained, or BERT-Tiny's sizes from scratch with a new vocabulary.

    Where the default model is out of reach, args.from_scratch is set.
    """
    if not args.from_scratch:
        try:
            return *load_pretrained(args.model or DEFAULT_MODEL), Path(args.model or DEFAULT_MODEL).name
        except UserError as problem:
            if args.model:
                raise
            note(f"warning: {problem}; BERT-Tiny from scratch instead, which has read nothing before")
            args.from_scratch = True
    return build_bert(TINY | {"hidden_dropout_prob": DROPOUT_FROM_SCRATCH}), train_wordpiece(texts), "BERT-Tiny"


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def widen(model, dendrites):
    """Add as many feed-forward units, in place, as come nearest to the parameters of so many dendrites on each neuron.

    Their incoming weights are random and their outgoing ones zero, so that the model computes what it did before.
    """
    more = count_parameters(grow_dendrites(copy.deepcopy(model), dendrites)) - count_parameters(model)
    units = round(more / (model.config.num_hidden_layers * (2 * model.config.hidden_size + 1)))
    for layer in model.bert.encoder.layer:
        up, down = layer.intermediate.dense, layer.output.dense
        new = torch.randn(units, up.in_features) * model.config.initializer_range
        up.weight = nn.Parameter(torch.cat([up.weight.data, new]))
        up.bias = nn.Parameter(torch.cat([up.bias.data, torch.zeros(units)]))
        down.weight = nn.Parameter(torch.cat([down.weight.data, torch.zeros(down.out_features, units)], dim=1))
        up.out_features += units
        down.in_features += units
    model.config.intermediate_size += units


class DendriticLinear(nn.Module):
    """A Linear layer whose neurons have dendrites, as perforatedai computes it, in plain torch.

    [..., in_features] -> [..., out_features]: W x + b + Σ_k to_neuron_k · a_k with the activations of the dendrites
    a_k = sigmoid(W_k x + b_k + Σ_{j<k} to_dendrite_kj · a_j). W and all W_k lie in one Linear, for one product.
    """

    def __init__(self, in_features, out_features, dendrites):
        super().__init__()
        self.linear = nn.Linear(in_features, (1 + dendrites) * out_features)
        self.to_neuron = nn.Parameter(torch.zeros(dendrites, out_features))
        self.to_dendrite = nn.ParameterList(torch.zeros(k, out_features) for k in range(1, dendrites))

    def forward(self, x):
        neuron, *dendrites = self.linear(x).chunk(1 + len(self.to_neuron), dim=-1)
        activations = []
        for k, dendrite in enumerate(dendrites):
            for j, activation in enumerate(activations):
                dendrite = dendrite + self.to_dendrite[k - 1][j] * activation
            activations.append(dendrite.sigmoid())
            neuron = neuron + self.to_neuron[k] * activations[k]
        return neuron


def grow_dendrites(model, dendrites):
    """Give each neuron of a plain BERT's Linear layers so many dendrites (0: none), in place; returns the model."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)] if dendrites else []
    for name in names:
        linear = model.get_submodule(name)
        model.set_submodule(name, DendriticLinear(linear.in_features, linear.out_features, dendrites))
    return model


# --- Dendrites --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def confined_library(folder):
    """Run perforatedai inside `folder`, where it writes, with its debugger, prompts and exits turned into errors."""
    said = io.StringIO()

    def last_lines():
        return " / ".join(said.getvalue().split("\n")[-6:-1]) or "it said nothing"

    def refuse(*_, **__):
        raise UserError(f"perforatedai stopped to ask: {last_lines()}")

    before, kept, backend = os.getcwd(), (pdb.set_trace, builtins.input), matplotlib.get_backend()
    pdb.set_trace = builtins.input = refuse
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # numpy's, about the library
            yield
    except SystemExit:
        raise UserError(f"perforatedai gave up: {last_lines()}") from None
    except SafetensorError as error:
        raise UserError(f"{folder}: perforatedai cannot read or write there ({first_line(error)})") from None
    finally:
        matplotlib.use(backend)  # importing the library changes it
        os.chdir(before)
        pdb.set_trace, builtins.input = kept


def dendrite_tries(args):
    """How often --epochs has room to try each set of dendrites."""
    return (args.epochs // args.switch_every - 1) // args.max_dendrites


def perforate(model, args, device):
    """(wrapped model, tracker): perforatedai set up so that the neuron axis is the last one of every layer.

    A set of dendrites that brings nothing is thrown away and tried again, as often as --epochs has room for.
    """
    from perforatedai import globals_perforatedai as GPA
    from perforatedai import utils_perforatedai as UPA

    settings = {
        "configuration_confirmed": True, "unwrapped_modules_confirmed": True, "weight_decay_accepted": True,
        "silent": True, "testing_dendrite_capacity": False, "test_saves": False, "device": device,
        "modules_to_perforate": [nn.Linear], "modules_to_track": [nn.LayerNorm, nn.Embedding],
        "output_dimensions": [-1, -1, 0],  # [batch, sequence, feature], 0 marks the neurons
        "switch_mode": GPA.pc.DOING_FIXED_SWITCH, "fixed_switch_num": args.switch_every,
        "first_fixed_switch_num": args.switch_every, "max_dendrites": args.max_dendrites,
        "max_dendrite_tries": dendrite_tries(args),
    }
    for name, value in settings.items():
        getattr(GPA.pc, f"set_{name}")(value)
    model = UPA.perforate_model(model, save_name="perforatedai", making_graphs=False, maximizing_score=True)
    for module in (model.bert.pooler.dense, model.classifier):
        module.set_this_output_dimensions([-1, 0])  # [batch, feature]
    return model.to(device), GPA.pai_tracker


def live_weights(model):
    """({name: tensor} of the weights in use, dendrites on each neuron) of a plain or a perforated model.

    The names are those of grow_dendrites(plain model); the library's idle copies are left out.
    """
    weights, dendrites = {}, 0
    for name, parameter in model.named_parameters():
        if not any(part in name for part in (".dendrite_module.", ".dendrites_to_top", ".candidate")):
            weights[name.replace("main_module.", "")] = parameter.detach()
    for name, module in model.named_modules():
        count = getattr(module, "dendrite_modules_added", 0) if hasattr(module, "dendrite_module") else 0
        if count:
            dendrites, inner = count, module.dendrite_module
            for kind in ("weight", "bias"):
                own = weights.pop(f"{name}.{kind}")
                weights[f"{name}.linear.{kind}"] = torch.cat([own, *(getattr(d, kind) for d in inner.layers)]).detach()
            weights[f"{name}.to_neuron"] = module.dendrites_to_top[count - 1].detach()
            for k in range(1, count):
                weights[f"{name}.to_dendrite.{k - 1}"] = inner.dendrites_to_dendrites[k].detach()
    return weights, dendrites


# --- Training ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict_logits(model, tokens, batch_size=INFERENCE_BATCH):
    """Logits [texts, 2] of a model in evaluation mode, computed in length buckets, in the order of the texts."""
    logits = torch.empty(len(tokens.lengths), 2, device=tokens.ids.device)
    for rows in bucket_batches(tokens.lengths, batch_size, shuffle=False):
        ids, mask = pad_batch(tokens, rows)
        logits[rows] = model(input_ids=ids, attention_mask=mask).logits.float()
    return logits


def threshold_sweep(labels, scores):
    """(F1, precision, recall, thresholds), each [thresholds], when a text is called toxic from that score on."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, thresholds = precision_recall_curve(labels, scores)
    precision, recall = precision[:-1], recall[:-1]  # sklearn's last point has no threshold
    return 2 * precision * recall / np.maximum(precision + recall, 1e-12), precision, recall, thresholds


def best_threshold(labels, scores):
    """The score from which on a text is called toxic so that F1 is highest on these [texts]."""
    f1, _, _, thresholds = threshold_sweep(labels, scores)
    return float(thresholds[f1.argmax()])


def learning_rate_factor(schedule, step, steps, steps_per_epoch):
    """What multiplies the learning rate at `step` of `steps`: linear warm-up and decay, or the seed's "step"."""
    if schedule == "step":
        return 0.1 ** (step // steps_per_epoch)
    warm_up = max(1, steps // 10)
    return max(min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up)), 0.0)


def train_classifier(model, tokenizer, data, args, arm, path, from_scratch):
    """Train with selection by PR AUC on the validation part; goes on from the checkpoint `path` where that exists.

    `arm`: "dendrites" lets perforatedai add them every --switch-every epochs and end the run; those of RESTARTED begin
    again from the best weights as often; any other trains over --epochs with --patience. Returns {history: a dict for
    each epoch, switches: likewise, seconds, best and last: {weights, dendrites, epoch, pr_auc, threshold}}.
    """
    from sklearn.metrics import average_precision_score, f1_score
    from sklearn.utils.class_weight import compute_class_weight

    longest = model.config.max_position_embeddings
    if args.max_length > longest:
        raise UserError(f"--max-length {args.max_length}: this model reads {longest} tokens")
    device = choose_device(args.device)
    (texts, train_labels), (validation_texts, validation_labels) = data.part("train"), data.part("validation")
    tokens = tokenize(tokenizer, texts, args.max_length).to(device)
    validation = tokenize(tokenizer, validation_texts, args.max_length).to(device)
    labels = torch.from_numpy(train_labels).to(device)
    class_weights = compute_class_weight("balanced", classes=np.array([0, 1]), y=train_labels)
    weights = torch.tensor(class_weights, dtype=torch.float32, device=device)
    steps_per_epoch = math.ceil(len(labels) / args.batch_size)
    cycle = args.switch_every if arm in ("dendrites", *RESTARTED) else args.epochs
    rate = args.learning_rate or (RATE_FROM_SCRATCH if from_scratch else 2e-5)
    # A large model gains from bfloat16 where the hardware has it; for BERT-Tiny the casts cost more than they save.
    half = has_bfloat16(device) and (device.type == "cuda" or model.config.hidden_size > 256)

    def factor(step):
        return learning_rate_factor(args.schedule, step, cycle * steps_per_epoch, steps_per_epoch)

    def new_optimizer():
        used = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(used, rate, weight_decay=args.weight_decay, fused=True)
        if tracker:
            tracker.set_optimizer_instance(optimizer)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    with confined_library(path.parent) if arm == "dendrites" else contextlib.nullcontext():
        model, tracker = perforate(model, args, device) if arm == "dendrites" else (model.to(device), None)
        state = load_progress(path, data)
        if state is None:
            state = {"history": [], "switches": [], "best": {"pr_auc": -1.0}, "done": False}
            optimizer, scheduler = new_optimizer()
        else:
            if not state["done"]:
                if tracker:
                    model = reload_perforated(model, f"epoch-{len(state['history'])}")
                else:
                    model.load_state_dict(state["model"])
                optimizer, scheduler = new_optimizer()
                optimizer.load_state_dict(state["optimizer"])
                scheduler.load_state_dict(state["scheduler"])
            torch.set_rng_state(state["random"])
        history, best = state["history"], state["best"]

        while not state["done"]:
            began, losses, epoch = time.perf_counter(), [], len(history) + 1
            model.train()
            bar = tqdm(bucket_batches(tokens.lengths, args.batch_size, shuffle=True), f"{arm}, epoch {epoch}",
                       unit="batch", leave=False)
            for rows in bar:
                ids, mask = pad_batch(tokens, rows)  # [batch, longest]
                with torch.autocast(device.type, torch.bfloat16, enabled=half):
                    logits = model(input_ids=ids, attention_mask=mask).logits  # [batch, 2]
                loss = F.cross_entropy(logits.float(), labels[rows], weights)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                losses.append(loss.detach())
                if len(losses) % 20 == 1:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
            logits = predict_logits(model.eval(), validation)
            train_loss = torch.stack(losses).mean().item()
            if not (math.isfinite(train_loss) and logits.isfinite().all()):
                raise UserError(f"the loss in epoch {epoch} is not finite; lower the --learning-rate")

            scores = logits.softmax(1)[:, 1].cpu().numpy()
            threshold = best_threshold(validation_labels, scores)
            pr_auc = float(average_precision_score(validation_labels, scores))
            live, dendrites = live_weights(model)
            history.append({
                "train_loss": train_loss,
                "validation_loss": F.cross_entropy(logits.cpu(), torch.from_numpy(validation_labels),
                                                   weights.cpu()).item(),
                "validation_pr_auc": pr_auc,
                "validation_f1": float(f1_score(validation_labels, scores >= threshold)),
                "learning_rate": scheduler.get_last_lr()[0],
                "live_parameters": sum(tensor.numel() for tensor in live.values()),
                "seconds": time.perf_counter() - began,
            })
            last = {"weights": {name: tensor.cpu().clone() for name, tensor in live.items()}, "dendrites": dendrites,
                    "epoch": epoch, "pr_auc": pr_auc, "threshold": threshold}
            if pr_auc > best["pr_auc"]:
                best = last
            restarted = False
            if tracker:
                model, restarted, done = tracker.add_validation_score(pr_auc, model)
                state["done"] = bool(done) or epoch == args.epochs
            elif arm in RESTARTED:
                restarted = epoch % cycle == 0
                state["done"] = epoch == args.epochs
            else:
                state["done"] = epoch == args.epochs or epoch - best["epoch"] >= args.patience
            if restarted and not state["done"]:
                if not tracker:
                    model.load_state_dict(best["weights"])
                now = sum(tensor.numel() for tensor in live_weights(model)[0].values())
                state["switches"].append({"epoch": epoch, "parameters_before": history[-1]["live_parameters"],
                                          "parameters_after": now})
                optimizer, scheduler = new_optimizer()
            state |= {"best": best, "last": last, "optimizer": optimizer.state_dict(), "data": data.info["sha256"],
                      "scheduler": scheduler.state_dict(), "random": torch.get_rng_state()}
            if tracker:
                save_perforated(model, epoch)
            else:
                state["model"] = model.state_dict()
            save_checkpoint(state, path)
            note(f"{arm}, epoch {epoch}: loss {train_loss:.3f}, validation PR AUC {pr_auc:.3f} (best "
                 f"{best['pr_auc']:.3f}), {history[-1]['live_parameters']:,} live parameters")
    for switch, end in zip(state["switches"], [s["epoch"] for s in state["switches"][1:]] + [len(history)]):
        parts = history[: switch["epoch"]], history[switch["epoch"] : end]
        for when, epochs in zip(("score_before", "score_after"), parts):
            switch[when] = max(epoch["validation_pr_auc"] for epoch in epochs)
    seconds = round(sum(epoch["seconds"] for epoch in history), 1)
    return state | {"seconds": seconds, "class_weights": class_weights.tolist()}


@contextlib.contextmanager
def whole_file(path):
    """Open `path` to write under another name, and rename at the end: a killed run leaves the older file whole."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.part", "wb") as file:
            yield file
        os.replace(f"{path}.part", path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; make room, or take another folder") from None


def save_checkpoint(state, path):
    """torch.save to a whole file; returns its size in MB."""
    buffer = io.BytesIO()  # writing to the disk itself, torch hides a full one behind a RuntimeError
    torch.save(state, buffer)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())
    return buffer.tell() / 1e6


def read_checkpoint(path):
    """The dictionary in a checkpoint of this script."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (RuntimeError, LookupError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: damaged, or no checkpoint of toxicity.py ({first_line(error)})") from None


def load_progress(path, data):
    """The state of an unfinished training, None where there is none."""
    if not path.exists():
        return None
    state = read_checkpoint(path)
    if state["data"] != data.info["sha256"]:
        raise UserError(f"{path}: the run began with other data; bring them back or start a new run")
    return state


def save_perforated(model, epoch):
    """Have perforatedai keep model and tracker as they are after `epoch`, beside the epoch before."""
    from perforatedai import utils_perforatedai as UPA

    UPA.save_system(model, "perforatedai", f"epoch-{epoch}")
    for old in Path("perforatedai").glob("epoch-*.pt"):
        if old.stem not in (f"epoch-{epoch}", f"epoch-{epoch - 1}"):
            old.unlink()


def reload_perforated(model, name):
    from perforatedai import utils_perforatedai as UPA

    return UPA.load_system(model, "perforatedai", name, load_from_restart=True, load_from_manual_save=True)


# --- The finished classifier ------------------------------------------------------------------------------------------


@dataclass
class Classifier:
    """What a checkpoint holds, ready to score texts."""

    model: nn.Module  # plain torch, in evaluation mode
    tokenizer: object
    arguments: dict  # of the run that trained it
    name: str
    dendrites: int  # on each neuron
    parameters: int
    threshold: float  # tuned on the validation part
    kind: str = "float32"  # or int8, ONNX
    megabytes: float = math.nan  # of its file

    def tokens(self, texts):
        return tokenize(self.tokenizer, texts, self.arguments["max_length"]).to(self.model.device)

    def scores(self, texts):
        """Probability [texts] that each of the texts is toxic."""
        return predict_logits(self.model, self.tokens(texts)).softmax(1)[:, 1].cpu().numpy()

    def save(self, path):
        """Write the checkpoint; `megabytes` is then the size of the file."""
        self.megabytes = save_checkpoint({
            "format": "toxicity.py 1", "kind": self.kind, "arguments": self.arguments, "name": self.name,
            "config": {key: self.model.config.to_dict()[key] for key in BERT_SIZES}, "dendrites": self.dendrites,
            "threshold": self.threshold, "tokenizer": self.tokenizer.to_str(),
            "model": {name: tensor.cpu() for name, tensor in self.model.state_dict().items()}}, path)
        return self

    @classmethod
    def load(cls, path, device):
        """The classifier in a checkpoint, with dendrites and int8 layers as they were."""
        from tokenizers import Tokenizer

        state = read_checkpoint(path)
        try:
            if state["format"] != "toxicity.py 1":
                raise KeyError("format")
            model = grow_dendrites(build_bert(state["config"]), state["dendrites"])
            parameters = count_parameters(model)
            if state["kind"] == "int8":
                model, device = make_int8(model), torch.device("cpu")
            model.load_state_dict(state["model"])
            return cls(model.to(device).eval(), Tokenizer.from_str(state["tokenizer"]), state["arguments"],
                       state["name"], state["dendrites"], parameters, state["threshold"], state["kind"],
                       Path(path).stat().st_size / 1e6)
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: no finished model of toxicity.py ({first_line(error)})") from None

    @property
    def label(self):
        return self.name + " + dendrites" * bool(self.dendrites) + f", {self.kind}" * (self.kind != "float32")


# --- int8 and ONNX ----------------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A Linear layer with int8 weights, a scale for each output, and inputs made int8 by the range of each batch."""

    def __init__(self, linear):
        super().__init__()
        weight, scale = round_to_int8(linear.weight)
        self.register_buffer("weight", weight)  # [out, in] int8
        self.register_buffer("scale", scale)  # [out]
        self.register_buffer("bias", linear.bias.detach().clone())
        self.packed = None

    def forward(self, x):
        if self.packed is None:
            zeros = torch.zeros(len(self.scale), dtype=torch.long)
            weight = self.weight * self.scale.unsqueeze(1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says that this will move to another package one day
                weight = torch.quantize_per_channel(weight, self.scale.double(), zeros, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(weight, self.bias)
        return torch.ops.quantized.linear_dynamic(x, self.packed, reduce_range=True)


class Int8Embedding(nn.Module):
    """An Embedding with int8 weights and a scale for each row."""

    def __init__(self, embedding):
        super().__init__()
        weight, scale = round_to_int8(embedding.weight)
        self.register_buffer("weight", weight)  # [rows, width] int8
        self.register_buffer("scale", scale)  # [rows]

    def forward(self, ids):
        return self.weight[ids] * self.scale[ids].unsqueeze(-1)


def round_to_int8(weight):
    """(int8 [rows, columns], scale [rows]) with weight ≈ int8 · scale; the largest weight of a row is ±127."""
    scale = (weight.detach().abs().amax(1) / 127).clamp(min=1e-12)
    return (weight.detach() / scale.unsqueeze(1)).round().to(torch.int8), scale


def make_int8(model):
    """Replace all Linear and Embedding layers of a plain model, in place, by int8 ones."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            model.set_submodule(name, (Int8Linear if isinstance(module, nn.Linear) else Int8Embedding)(module))
    return model


class OnnxModel:
    """An ONNX file that is called as a BertForSequenceClassification is."""

    device = torch.device("cpu")

    def __init__(self, path):
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def __call__(self, input_ids, attention_mask):
        inputs = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return SimpleNamespace(logits=torch.from_numpy(self.session.run(None, inputs)[0]))


def require_onnx():
    missing = [name for name in ONNX if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"--export-onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def export_onnx(classifier, path):
    """Write the model as ONNX with free batch size and length, and tokenizer.json beside it: the Classifier of both."""
    model, example, buffer = copy.deepcopy(classifier.model).cpu(), torch.ones(2, 8, dtype=torch.long), io.BytesIO()
    model.config.return_dict = False
    axes, names = {0: "batch", 1: "length"}, ["input_ids", "attention_mask"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter is on its way out; the newer one fails on dendrites
        torch.onnx.export(model, (example, example), buffer, dynamo=False, input_names=names, output_names=["logits"],
                          dynamic_axes=dict.fromkeys(names, axes) | {"logits": {0: "batch"}})
    with whole_file(path) as file:
        file.write(buffer.getbuffer())
    classifier.tokenizer.save(str(path.with_name("tokenizer.json")))
    return replace(classifier, kind="ONNX", megabytes=buffer.tell() / 1e6, model=OnnxModel(path))


# --- Evaluation -------------------------------------------------------------------------------------------------------


def classification_metrics(labels, scores, threshold):
    """Metrics of `scores` [texts] in 0 … 1 against `labels` [texts], called toxic from `threshold` on."""
    from sklearn import metrics

    called = scores >= threshold
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        labels, called, average="binary", zero_division=0)
    weighted = metrics.precision_recall_fscore_support(labels, called, average="weighted", zero_division=0)
    return {
        "threshold": threshold, "accuracy": float((called == labels).mean()), "precision": precision, "recall": recall,
        "f1": f1, "weighted_precision": weighted[0], "weighted_recall": weighted[1], "weighted_f1": weighted[2],
        "roc_auc": metrics.roc_auc_score(labels, scores), "pr_auc": metrics.average_precision_score(labels, scores),
        "confusion_matrix": metrics.confusion_matrix(labels, called, labels=[0, 1]).tolist(),
    }


def bootstrap_f1(labels, called, seed, samples=1000):
    """(low, high): 95 % percentile interval of F1 over resampled texts, of bool [texts] `labels` and `called`."""
    cells = np.array([(labels & called).sum(), (labels ^ called).sum(), (~labels & ~called).sum()])
    # F1 needs only how many true positives and how many errors a sample has, which are multinomial.
    found, wrong, _ = np.random.default_rng(seed).multinomial(len(labels), cells / len(labels), samples).T
    return np.percentile(2 * found / np.maximum(2 * found + wrong, 1), (2.5, 97.5)).tolist()


LEET = str.maketrans({"a": "4", "e": "3", "i": "1", "o": "0", "s": "5"})


def disguise(texts, seed):
    """The texts with each word of four letters or more, at 30 %, in leetspeak or with two inner letters swapped."""
    rng, changed = np.random.default_rng(seed), []
    for text in texts:
        words = text.split(" ")
        for i, (draw, place) in enumerate(rng.random((len(words), 2))):
            if len(words[i]) < 4 or draw > 0.3:
                continue
            at = 1 + int(place * (len(words[i]) - 3))
            swapped = words[i][:at] + words[i][at + 1] + words[i][at] + words[i][at + 2 :]
            words[i] = words[i].translate(LEET) if draw < 0.15 else swapped
        changed.append(" ".join(words))
    return changed


def fit_tfidf(texts, labels):
    """Score function texts -> [texts] of TF-IDF of words and word pairs with balanced logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
                             LogisticRegression(class_weight="balanced", max_iter=1000))
    try:
        pipeline.fit(texts, labels)
    except ValueError as error:  # for instance no word stands in two texts
        raise UserError(f"TF-IDF: {first_line(error)}") from None
    return lambda texts: pipeline.predict_proba(texts)[:, 1]


def evaluate(scorers, data, seed):
    """{name: metrics} on the test part, where scorers is {name: (texts -> scores [texts], threshold or None)}.

    Without a threshold it is the F1-optimal one of the validation part. Each metrics has those at 0.5, at the threshold
    ("tuned") with the bootstrap interval of F1, and at the threshold on disguised texts.
    """
    (validation_texts, validation_labels), (texts, labels) = data.part("validation"), data.part("test")
    disguised, results = disguise(texts, seed), {}
    for name, (scorer, threshold) in scorers.items():
        validation_scores, scores = scorer(validation_texts), scorer(texts)
        threshold = best_threshold(validation_labels, validation_scores) if threshold is None else threshold
        results[name] = {
            "at_half": classification_metrics(labels, scores, 0.5),
            "tuned": classification_metrics(labels, scores, threshold),
            "disguised": classification_metrics(labels, scorer(disguised), threshold),
            "f1_interval": bootstrap_f1(labels == 1, scores >= threshold, seed),
            "validation_scores": validation_scores, "test_scores": scores,
        }
    return results


def benchmark(classifier, texts):
    """Latency of one text [ms] and throughput [texts/s] over real text lengths on the CPU, both from text to score.

    "model alone" is without tokenization, "memory MiB" what the weights take.
    """
    own = classifier if classifier.kind == "ONNX" else replace(classifier, model=copy.deepcopy(classifier.model).cpu())
    large, times = own.parameters > 2e7, []
    own.scores(texts[:INFERENCE_BATCH])
    for _ in range(1 if large else 3):
        began = time.perf_counter()
        tokens = own.tokens(texts)
        between = time.perf_counter()
        predict_logits(own.model, tokens).softmax(1)
        times.append((time.perf_counter() - began, time.perf_counter() - between))
    single = []
    for i in range(50 if large else 200):
        began = time.perf_counter()
        own.scores([texts[i % len(texts)]])
        single.append(time.perf_counter() - began)
    (whole, alone), (median, p95, p99) = np.min(times, axis=0), 1000 * np.percentile(single, (50, 95, 99))
    weights = None if own.kind == "ONNX" else sum(tensor.nbytes for tensor in own.model.state_dict().values())
    return {"memory MiB": weights and weights / 2**20, "latency ms": median, "p95 ms": p95, "p99 ms": p99,
            "texts/s": len(texts) / whole, "texts/s, model alone": len(texts) / alone}


# --- Pictures ---------------------------------------------------------------------------------------------------------


def plot_learning(training, path):
    """Loss, PR AUC and F1 over the epochs, with the switches of the dendrites as vertical lines."""
    history, switches = training["history"], training["switches"]
    fig, axes = new_figure("Training of BERT-Tiny", 1, 2, (11, 4.2))
    epochs = np.arange(1, len(history) + 1)
    for ax, kinds, label in zip(axes, (("train_loss", "validation_loss"), ("validation_pr_auc", "validation_f1")),
                                ("class-weighted cross-entropy", "score on the validation part")):
        for i, kind in enumerate(kinds):
            plot_curve(ax, epochs, [epoch[kind] for epoch in history],
                       kind.replace("_", " ").replace("pr auc", "PR AUC").replace("f1", "F1"), i, "os"[i])
        for i, switch in enumerate(switches):
            ax.axvline(switch["epoch"] + 0.5, linestyle=":", color="0.3", label=None if i else "switch")
        ax.set(xlabel="epoch", ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=9)
    save_figure(fig, path)


def plot_evaluation(results, data, run_dir):
    """PR and ROC curves, threshold sweep, confusion matrices."""
    from sklearn.metrics import precision_recall_curve, roc_curve

    labels, validation_labels = data.part("test")[1], data.part("validation")[1]
    scored = {name: one for name, one in results["models"].items() if name != "majority class"}
    fig, axes = new_figure("Toxic texts of the test part", 1, 2, (11, 4.6))
    for i, (name, one) in enumerate(scored.items()):
        precision, recall, _ = precision_recall_curve(labels, one["test_scores"])
        false, true, _ = roc_curve(labels, one["test_scores"])
        for ax, x, y, area in ((axes[0], recall, precision, "pr_auc"), (axes[1], false, true, "roc_auc")):
            ax.plot(x, y, LINES[i % 4], color=COLORS[i % 8], label=f"{name}: {one['tuned'][area]:.3f}")
    axes[0].axhline(labels.mean(), linestyle=":", color="0.5", label=f"chance: {labels.mean():.3f}")
    axes[1].plot([0, 1], [0, 1], ":", color="0.5", label="chance: 0.500")
    axes[0].set(title="precision and recall (area)", xlabel="recall", ylabel="precision")
    axes[1].set(title="ROC (area)", xlabel="share of harmless texts called toxic", ylabel="recall")
    for ax in axes:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=9)
    save_figure(fig, run_dir / "pr_roc.png")

    name, one = next(iter(scored.items()))
    fig, axes = new_figure(f"Threshold sweep, {name}", size=(9, 4.6))
    for i, (part, true, scores) in enumerate((("validation", validation_labels, one["validation_scores"]),
                                              ("test", labels, one["test_scores"]))):
        f1, precision, recall, thresholds = threshold_sweep(true, scores)
        curves = {"F1": f1} if i else {"F1": f1, "precision": precision, "recall": recall}
        for j, (key, values) in enumerate(curves.items()):
            axes[0].plot(thresholds, values, LINES[j], color=COLORS[3 * i + j], linewidth=1.5 + 1.5 * i,
                         label=f"{key}, {part}")
    axes[0].axvline(one["tuned"]["threshold"], linestyle=":", color="0.3", label="the model's")
    axes[0].set(xlabel="threshold on the score", ylabel="of the toxic class")
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=5, fontsize=9)
    save_figure(fig, run_dir / "threshold_sweep.png")

    fig, axes = new_figure("Test texts by true and predicted class", 1, 3, (13, 4.4))
    shown = [(name, one, "at_half"), (name, one, "tuned"), ("TF-IDF", results["models"]["TF-IDF"], "tuned")]
    for ax, (title, one, when) in zip(axes, shown):
        threshold = one[when]["threshold"]
        plot_confusion(ax, one[when]["confusion_matrix"], CLASSES, f"{title}\nthreshold {threshold:.3f}")
    save_figure(fig, run_dir / "confusion_matrices.png")


def plot_deployments(rows, run_dir):
    """Size against F1, and latency and throughput bars, of the deployable models."""
    if rows[0]["F1"] is not None:
        fig, axes = new_figure("Size on disk and quality", size=(8, 5))
        for i, row in enumerate(rows):
            axes[0].plot(row["MB"], row["F1"], "osD^vPX*"[i % 8], color=COLORS[i % 8], markersize=9, alpha=0.8,
                         label=row["model"])
        axes[0].axvline(25, linestyle=":", color="0.3", label="the seed's limit, 25 MB")
        axes[0].set(xlabel="size on disk [MB]", ylabel="F1 of the toxic class (tuned, test part)", xscale="log",
                    xlim=(1, 1000), ylim=(0, 1))
        axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=9)
        save_figure(fig, run_dir / "size_f1.png")

    fig, axes = new_figure("Speed on the CPU, tokenization included", 1, 2, (13, 0.5 * len(rows) + 2))
    for ax, column, label, number in ((axes[0], "latency ms", "median latency of one text [ms]", "{:,.2f}"),
                                      (axes[1], "texts/s", "throughput over real lengths [texts/s]", "{:,.0f}")):
        values = {row["model"]: row[column] for row in rows}
        plot_ranking(ax, values, number)
        ax.set(xlabel=label, xscale="log", xlim=(min(values.values()) / 3, 3 * max(values.values())))
        ax.xaxis.set_minor_formatter("")  # its labels would overlap
    save_figure(fig, run_dir / "speed.png")


def plot_arms(scores, run_dir):
    """Test PR AUC and F1 of each arm of --compare-dendrites with its 95 % interval."""
    fig, axes = new_figure("Test part: mean and 95 % interval over seeds", size=(9, 4.8))
    series, errors = {}, {}
    for key, label in LABELS.items():
        both = [mean_and_interval(values[key]) for values in scores.values()]
        series[label], errors[label] = ([float(pair[i]) for pair in both] for i in (0, 1))
    plot_bars(axes[0], list(scores), series, "{:.3f}", errors)
    axes[0].set_ylabel("score on the test part")
    save_figure(fig, run_dir / "dendrites.png")


# --- Results ----------------------------------------------------------------------------------------------------------


def memory_mib():
    """Peak resident memory of this process in MiB, None where it cannot be had."""
    if resource is None:
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024), 1)


def write_results(results, path):
    """Write the dictionary as JSON without NaN (null instead), and return it as it then reads."""

    def plain(value):
        if isinstance(value, dict):
            return {str(key): plain(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(inner) for inner in value]
        if isinstance(value, (np.ndarray, np.generic)):
            return plain(value.tolist())
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(plain(results), indent=1)
    with whole_file(path) as file:
        file.write(text.encode())
    return json.loads(text)


def markdown_table(rows):
    """[{column: value}] as a Markdown table; a value that is missing or None is a dash."""
    columns = list(dict.fromkeys(column for row in rows for column in row))

    def cell(value):
        if isinstance(value, float):
            return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
        return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    lines = [columns, ["---"] * len(columns), *([cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_run(args):
    """What results.json holds from the beginning: arguments, versions, git commit."""
    folder = Path(globals().get("__file__", "toxicity.py")).resolve().parent
    commit, versions = None, {"python": platform.python_version()}
    with contextlib.suppress(OSError):  # no git on this machine
        git = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or None
    for package in ("torch", "transformers", "tokenizers", "perforatedai", "scikit-learn", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"experiment": "toxicity", "finished": False, "arguments": vars(args), "seed": args.seed,
            "git_commit": commit, "versions": versions}


def new_run(output_dir):
    """Make and return the next free folder run-001, run-002, … of this experiment."""
    parent = Path(output_dir).absolute() / "toxicity"
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        taken = [int(run.name[4:]) for run in parent.glob("run-*") if run.name[4:].isdigit()]
        run_dir = parent / f"run-{max(taken, default=0) + 1:03d}"
        with contextlib.suppress(FileExistsError):  # another process may have been quicker
            run_dir.mkdir()
            return run_dir


def newest_first(output_dir):
    runs = (Path(output_dir).absolute() / "toxicity").glob("run-*")
    return sorted(runs, key=lambda run: (len(run.name), run.name), reverse=True)


def find_run(output_dir, name, known):
    """(folder, arguments) of the unfinished run called `name`, or of the newest one, with all `known` arguments."""
    named = [Path(name).absolute() if os.sep in name else Path(output_dir).absolute() / "toxicity" / name]
    for run_dir in newest_first(output_dir) if name == "newest" else named:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # not a run's file
            results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
            arguments = results["arguments"]
            mine = results["experiment"] == "toxicity" and known.keys() <= arguments.keys()
            part = "arm" in results and (arguments["compare_dendrites"] or arguments["runs"] > 1)  # of a larger run
            if mine and not part and not results["finished"]:
                return run_dir, argparse.Namespace(**arguments)
    which = "" if name == "newest" else f" {name!r}"
    raise UserError(f"{Path(output_dir) / 'toxicity'} has no unfinished run{which}; start one without --resume")


def find_checkpoint(args):
    """The path of --evaluate or --checkpoint, or of the newest best model."""
    path = args.checkpoint or (args.evaluate if args.evaluate != "newest" else None)
    if path:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; best_model.pt of a run is needed")
        return Path(path)
    for run_dir in newest_first(args.output_dir):
        arms = sorted(run_dir.glob("seed-*/best_model.pt"), key=lambda path: "dendrites" not in path.parent.name)
        for path in (run_dir / "best_model.pt", *arms):
            if path.exists():
                note(f"the model is {path}")
                return path
    raise UserError(f"{Path(args.output_dir) / 'toxicity'} has no best_model.pt yet; train first: python toxicity.py")


# --- Command line -----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        unset = action.default is None or action.default is False
        return action.help if unset else super()._get_help_string(action)


def between(kind, low, high=math.inf):
    """An argparse type: a number of `kind` from `low` to `high`."""

    def number(text):
        value = kind(text)
        if not (low <= value <= high and value < math.inf):
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    return number


DATA_ARGUMENTS = ("dataset", "data", "text_column", "label_column", "positive_label", "label_threshold", "sample_size",
                  "data_dir", "max_length", "seed")
MODES = ("predict", "export_hf", "evaluate", "compare_base", "benchmark_only", "quantize", "export_onnx")


def parse_args(argv):
    parser = Parser("toxicity.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                    formatter_class=HelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=["civil_comments", "embedded"], help="(default: civil_comments, embedded synthetic "
        "comments when the hub is out of reach)")
    add("--data", metavar="FILE", help="your own CSV, JSON lines or Parquet file instead")
    add("--text-column", default="text", metavar="NAME", help="of --data")
    add("--label-column", default="toxicity", metavar="NAME", help="of --data")
    add("--positive-label", metavar="VALUE", help="the toxic label (default: numbers from --label-threshold on)")
    add("--label-threshold", type=between(float, 0, 1), default=0.5, metavar="P", help="toxic from this label on")
    add("--sample-size", type=between(int, 0), default=5000, metavar="N", help="training texts; validation and test "
        "get a fifth of it each; 0, or more than there are: all, in 80, 10 and 10 %% (civil_comments: its own parts)")
    add("--data-dir", default="data", metavar="FOLDER", help="downloads and caches")
    add("--max-length", type=between(int, 4, 512), default=128, metavar="N", help="tokens of a text that are read")

    add = parser.add_argument_group("model and training").add_argument
    add("--quick", action="store_true", help="train with dendrites, then a small giant from scratch, int8 and ONNX "
        "(where installed), on few embedded comments without a network: under 90 s")
    add("--model", metavar="ID|FOLDER", help=f"a pretrained BERT (default: {DEFAULT_MODEL}, from scratch when that is "
        "out of reach)")
    add("--from-scratch", action="store_true", help="BERT-Tiny's sizes, random weights, a vocabulary of the "
        "training texts")
    add("--epochs", type=between(int, 1), default=10, metavar="N", help="at most")
    add("--patience", type=between(int, 1), default=3, metavar="N", help="epochs without a better PR AUC on the "
        "validation part; with dendrites perforatedai ends the run instead")
    add("--batch-size", type=between(int, 1), default=32, metavar="N", help="texts in a batch")
    add("--learning-rate", type=between(float, 1e-9), metavar="RATE", help="highest, of AdamW (default: 2e-5, from "
        f"scratch {RATE_FROM_SCRATCH})")
    add("--weight-decay", type=between(float, 0), default=0.01, metavar="RATE", help="of AdamW")
    add("--schedule", choices=["linear", "step"], default="linear", help="of the learning rate: linear to zero "
        "after a warm-up, or the seed's, a tenth each epoch")
    add("--no-dendrites", action="store_true", help="the baseline: plain training, with --patience")
    add("--switch-every", type=between(int, 2), default=4, metavar="N", help="epochs from one set of dendrites to the "
        "next, or to the end")
    add("--max-dendrites", type=between(int, 1), default=1, metavar="N", help="on each neuron")
    add("--compare-dendrites", action="store_true", help="train dendrites, baseline, the same budget without "
        "dendrites, and a wider model of the same size")

    add = parser.add_argument_group("a trained model").add_argument
    add("--evaluate", nargs="?", const="newest", metavar="CKPT", help="a best_model.pt (default: the newest one) on "
        "its own test part, or on that of --data")
    add("--checkpoint", metavar="CKPT", help="the model for the next ones (default: the newest best_model.pt)")
    add("--compare-base", action="store_true", help="fine-tune --giant on the same data and compare")
    add("--giant", default="bert-base-uncased", metavar="ID|FOLDER|scratch", help="for --compare-base; scratch is a "
        "small one from random weights, to try the comparison")
    add("--benchmark-only", action="store_true", help="latency, throughput, size and memory, also of a BERT-Base with "
        "random weights")
    add("--quantize", action="store_true", help="write model_int8.pt and compare it")
    add("--export-onnx", action="store_true", help="write model.onnx with tokenizer.json and compare it")
    add("--export-hf", metavar="FOLDER", help="write a model without dendrites for transformers")
    add("--predict", nargs="*", metavar="TEXT", help="score texts, or the lines on stdin; tier by the tuned "
        "threshold T: monitor from T/2, review from T, remove from (1 + T)/2 on")
    add("--format", choices=["table", "json"], default="table", help="of --predict; json is one object a line")

    add = parser.add_argument_group("runs").add_argument
    add("--output-dir", default="outputs", metavar="FOLDER", help="results go to FOLDER/toxicity/run-001, run-002, …")
    add("--resume", nargs="?", const="newest", metavar="RUN", help="go on with an unfinished run, the newest or the "
        "one named, with its own arguments")
    add("--seed", type=between(int, 0, 2**31), default=42, metavar="N", help="of data, split and model")
    add("--runs", type=between(int, 1, 999), default=1, metavar="N", help="seeds in a row: mean ± 95 %% CI")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu) or one of them")
    if "--quick" in argv:
        parser.set_defaults(sample_size=1200, epochs=6, switch_every=3, dataset="embedded", from_scratch=True,
                            giant="scratch")
    defaults = vars(parser.parse_args([]))
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults))))
    given = {name: value for name, value in given.items() if value is not None}
    args = argparse.Namespace(**defaults | given)
    for name in ("data", "data_dir", "model", "giant", "checkpoint"):  # a run may be resumed from another folder
        path = getattr(args, name)
        if path and path != "scratch" and Path(path).exists():
            setattr(args, name, str(Path(path).resolve()))
    if args.resume is not None:
        other = given.keys() - {"resume", "output_dir", "device"}
        if other:
            raise UserError(f"--{sorted(other)[0].replace('_', '-')} cannot be given with --resume, which keeps the "
                            "run's own arguments")
        return args
    args.mode = next((mode for mode in MODES if mode in given), None)
    check_args(args, given.keys())
    return args


def check_args(args, given):
    """Raise UserError where arguments contradict each other."""
    def refuse(*pairs):
        for one, other in pairs:
            if one in given and other in given:
                names = (name.replace("_", "-") for name in (one, other))
                raise UserError("--{} and --{} cannot be given together".format(*names))

    refuse(("data", "dataset"), ("model", "from_scratch"), ("no_dendrites", "compare_dendrites"), ("quick", "data"),
           ("quick", "model"), ("predict", "export_hf"), ("benchmark_only", "compare_base"),
           ("benchmark_only", "evaluate"), *product(("predict", "export_hf"), (*MODES[3:], *DATA_ARGUMENTS)))
    if args.evaluate not in (None, "newest"):
        refuse(("checkpoint", "evaluate"))
    if args.mode:
        refuse(*product(("model", "from_scratch", "no_dendrites", "compare_dendrites", "switch_every", "max_dendrites",
                         "runs", "quick"), MODES))
        other = sorted(given & {*DATA_ARGUMENTS} - {"data", "dataset", "data_dir"})
        if other and not given & {"data", "dataset"}:
            raise UserError(f"--{other[0].replace('_', '-')}: the texts and parts are those that the model was trained "
                            "with; other texts come with --data or --dataset")
        refuse(("data", "compare_base"), ("dataset", "compare_base"))
    elif "checkpoint" in given:
        raise UserError("--checkpoint goes with --predict, --quantize, --export-onnx, --export-hf, --compare-base or "
                        "--benchmark-only")
    for name in ("text_column", "label_column", "positive_label"):
        if name in given and "data" not in given:
            raise UserError(f"--{name.replace('_', '-')} goes with --data")
    if args.text_column == args.label_column:
        raise UserError("--text-column and --label-column are the same")
    if 0 < args.sample_size < 100:
        raise UserError(f"--sample-size {args.sample_size}: at least 100, or 0 for everything")
    if not args.no_dendrites and not args.mode and dendrite_tries(args) < 1:
        raise UserError(f"--epochs {args.epochs} has no room for --max-dendrites {args.max_dendrites} with "
                        f"--switch-every {args.switch_every}: {(args.max_dendrites + 1) * args.switch_every} are "
                        "needed; or take --no-dendrites")


def choose_device(name):
    try:
        return detect_device(name)
    except argparse.ArgumentTypeError as problem:
        raise UserError(f"--device: {problem}") from None


# --- The experiment ---------------------------------------------------------------------------------------------------


def make_classifier(base, kept, args, data, tokenizer, name):
    """The Classifier of `kept`, one of the best and last weights that train_classifier returns; `base` is its BERT."""
    model = grow_dendrites(build_bert({key: base.config.to_dict()[key] for key in BERT_SIZES}), kept["dendrites"])
    model.load_state_dict(kept["weights"])
    device, parameters = choose_device(args.device), count_parameters(model)
    arguments = vars(args) | {"data_sha256": data.info["sha256"]}
    return Classifier(model.to(device).eval(), tokenizer, arguments, name, kept["dendrites"], parameters,
                      kept["threshold"])


def train_tiny(args, data, arm, run_dir):
    """Train BERT-Tiny: (best Classifier, training); best_model.pt and final_model.pt are written to `run_dir`."""
    texts, _ = data.part("train")
    model, tokenizer, name = make_model(args, texts)
    if arm == "wider":
        widen(model, args.max_dendrites)
        name = f"{name}, wider"
    write_results(describe_run(args) | {"arm": arm}, run_dir / "results.json")  # with what it falls back to
    plain = copy.deepcopy(model)
    training = train_classifier(model, tokenizer, data, args, arm, run_dir / "checkpoint.pt", args.from_scratch)
    best, last = (make_classifier(plain, training[which], args, data, tokenizer, name) for which in ("best", "last"))
    last.save(run_dir / "final_model.pt")
    return best.save(run_dir / "best_model.pt"), training


def train_giant(args, data, run_dir):
    """Fine-tune --giant on the same data with the same selection: (Classifier, training); writes giant.pt."""
    scratch = args.giant == "scratch"
    if scratch:
        model, tokenizer = build_bert(SCRATCH_GIANT), train_wordpiece(data.part("train")[0])
    else:
        model, tokenizer = load_pretrained(args.giant)
    training = train_classifier(model, tokenizer, data, args, "giant", run_dir / "giant_checkpoint.pt", scratch)
    name = "a small giant from scratch" if scratch else f"giant {Path(args.giant).name}"
    giant = make_classifier(model, training["best"], args, data, tokenizer, name)
    return giant.save(run_dir / "giant.pt"), training


def giant_killer(tiny, giant):
    """The seed's list for a giant-killer, as measured: [{criterion, asked, measured, met}]."""
    ratio, speed = 100 * tiny["F1"] / max(giant["F1"], 1e-12), tiny["texts/s"] / giant["texts/s"]
    rows = [("F1 against the giant's", "at least 98 %", f"{ratio:.1f} %", ratio >= 98),
            ("speed against the giant's", "15 to 40 times", f"{speed:.1f} times", speed >= 15),
            ("size on disk", "under 25 MB", f"{tiny['MB']:.1f} MB", tiny["MB"] < 25),
            ("real time on a CPU, p99 of one text", "under 100 ms", f"{tiny['p99 ms']:.2f} ms", tiny["p99 ms"] < 100)]
    return [dict(zip(("criterion", "asked", "measured", "met"), row)) for row in rows]


def run_experiment(args, run_dir, arm="dendrites"):
    """Train, or take a trained model, then evaluate, compress and compare as asked; returns the results dictionary."""
    device, began, seconds = choose_device(args.device), time.perf_counter(), {}
    if args.mode:
        tiny, training = Classifier.load(args.checkpoint, device), None
        if tiny.kind != "float32" and (args.quantize or args.export_onnx):
            raise UserError(f"{args.checkpoint}: int8 already; take the best_model.pt that it was made of")
        own_texts = not (args.data or args.dataset)
        if own_texts:
            args = argparse.Namespace(**vars(args) | {name: tiny.arguments[name] for name in DATA_ARGUMENTS})
        elif args.data and args.data == tiny.arguments["data"]:
            raise UserError(f"--data {args.data}: the model was trained with it; without --data its test part is taken")
    if args.export_onnx:
        require_onnx()
    seed_everything(args.seed)
    results, data = describe_run(args) | ({} if args.mode else {"arm": arm}), load_data(args)
    if args.mode and own_texts and data.info["sha256"] != tiny.arguments.get("data_sha256"):
        raise UserError(f"{data.info['name']}: not the texts that the model was trained with, so that it may have seen "
                        "some of the test part; bring them back, or give other texts with --data")
    note(f"{data.info['name']}: " + ", ".join(
        f"{sum(counts.values()):,} {part} ({counts['toxic'] / sum(counts.values()):.1%} toxic)"
        for part, counts in data.info["counts"].items()))
    seconds["data"] = time.perf_counter() - began
    if not args.mode:
        tiny, training = train_tiny(args, data, arm, run_dir)
        seconds["training"] = training["seconds"]
        results["training"] = {key: training[key] for key in ("history", "switches", "class_weights", "seconds")}
        results["best_epoch"], results["dendrites"] = training["best"]["epoch"], tiny.dendrites
    models, giant = [tiny], None
    if args.quantize or args.quick:
        small = replace(tiny, model=make_int8(copy.deepcopy(tiny.model).cpu()), kind="int8")
        models.append(small.save(run_dir / "model_int8.pt"))
    if args.export_onnx or (args.quick and all(map(importlib.util.find_spec, ONNX))):
        models.append(export_onnx(tiny, run_dir / "model.onnx"))
    if args.compare_base or args.quick:
        giant, giant_training = train_giant(args, data, run_dir)
        models.append(giant)
        seconds["giant training"] = giant_training["seconds"]
        results["giant_training"] = giant_training["history"]
    if args.benchmark_only:
        base = build_bert({"vocab_size": TINY["vocab_size"]}).to(device).eval()
        parameters = count_parameters(base)
        models.append(Classifier(base, tiny.tokenizer, tiny.arguments, "BERT-Base, random weights", 0, parameters, 0.5,
                                 megabytes=4e-6 * parameters))

    test_texts = data.part("test")[0]
    if not args.benchmark_only:
        began = time.perf_counter()
        scorers = {own.label: (own.scores, own.threshold) for own in models}
        scorers |= {"TF-IDF": (fit_tfidf(*data.part("train")), None),
                    "majority class": (lambda texts: np.zeros(len(texts)), 0.5)}
        results["models"] = evaluate(scorers, data, args.seed)
        seconds["evaluation"] = time.perf_counter() - began
    began, rows = time.perf_counter(), []
    some = (test_texts + data.part("validation")[0])[:1000]
    for own in models:
        f1 = results["models"][own.label]["tuned"]["f1"] if "models" in results else None
        rows.append({"model": own.label, "parameters": own.parameters, "MB": own.megabytes, "F1": f1}
                    | benchmark(own, some))
        if own.kind != "float32" and own is not tiny:
            logits = [predict_logits(one.model, one.tokens(test_texts)).cpu() for one in (tiny, own)]
            rows[-1]["largest logit difference"] = (logits[0] - logits[1]).abs().max().item()
    seconds["benchmark"] = time.perf_counter() - began
    results["deployments"] = rows
    if giant:
        results["giant_killer"] = giant_killer(rows[0], next(row for row in rows if row["model"] == giant.label))
    if training:
        plot_learning(training, run_dir / "learning_curves.png")
    if "models" in results:
        plot_evaluation(results, data, run_dir)
        for one in results["models"].values():
            del one["validation_scores"], one["test_scores"]
    plot_deployments(rows, run_dir)
    results |= {
        "finished": True, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(), "data": data.info, "parameters": tiny.parameters,
        "seconds": {name: round(value, 1) for name, value in seconds.items()}, "peak_memory_mib": memory_mib()}
    (run_dir / "summary.md").write_text(summary(results), encoding="utf-8")
    results = write_results(results, run_dir / "results.json")
    for name in ("checkpoint.pt", "giant_checkpoint.pt"):  # only an unfinished run needs them
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / "perforatedai", ignore_errors=True)
    return results


def summary(results):
    """The tables of a finished run as Markdown."""
    data, text = results["data"], []
    training = results.get("training")
    text.append(f"# toxicity.py, {data['name']} ({data['source']}), {data['rows']:,} texts, seed {results['seed']}")
    if training:
        weights = ", ".join(f"{weight:.2f}" for weight in training["class_weights"])
        text.append(f"Class weights {weights} (the seed: {SEED_WEIGHTS[0]}, {SEED_WEIGHTS[1]}); "
                    f"{len(training['history'])} epochs in {training['seconds']} s, best: epoch "
                    f"{results['best_epoch']}, dendrites on each neuron then: {results['dendrites']}.")
        if training["switches"]:
            text.append("## Switches (best validation PR AUC before and after)")
            text.append(markdown_table(training["switches"]))
    if "models" in results:
        table = []
        for name, one in results["models"].items():
            half, tuned, interval = one["at_half"], one["tuned"], one["f1_interval"]
            table.append({
                "model": name, "F1 at 0.5": half["f1"], "threshold": tuned["threshold"], "F1": tuned["f1"],
                "95 % interval": f"{interval[0]:.3f} to {interval[1]:.3f}",
                "precision": tuned["precision"], "recall": tuned["recall"], "accuracy": tuned["accuracy"],
                "weighted F1": tuned["weighted_f1"], "ROC AUC": tuned["roc_auc"], "PR AUC": tuned["pr_auc"],
                "F1 disguised": one["disguised"]["f1"]})
        text.append("## Quality on the test part, toxic class")
        text.append(markdown_table([*table, SEED_CLAIM]))
        text.append("A model's threshold is the F1-optimal one of the validation part of its training, TF-IDF's that "
                    "of this one; intervals are of 1,000 bootstrap samples of the test texts. Disguised: "
                    "leetspeak and swapped letters in 30 % of the longer words.")
    text.append(f"## Size and speed on the CPU, {results['threads']} threads, tokenization included")
    text.append(markdown_table(results["deployments"]))
    if "giant_killer" in results:
        text.append("## A giant-killer?")
        text.append(markdown_table([row | {"met": "yes" if row["met"] else "no"} for row in results["giant_killer"]]))
    return "\n\n".join(text) + "\n"


def run_seeds(args, run_dir):
    """The experiment once, or for each seed and, with --compare-dendrites, each arm; returns the results dictionary."""
    arms = ARMS if args.compare_dendrites else ["baseline" if args.no_dendrites else "dendrites"]
    if args.mode or (args.runs == 1 and len(arms) == 1):
        return run_experiment(args, run_dir, arms[0])
    finished = {arm: [] for arm in arms}
    for seed, arm in product(range(args.seed, args.seed + args.runs), arms):
        own_dir = run_dir / f"seed-{seed}-{arm.replace(' ', '-')}"
        own_dir.mkdir(exist_ok=True)
        done = own_dir / "results.json"
        kept = json.loads(done.read_text(encoding="utf-8")) if done.exists() else {"finished": False, "arguments": {}}
        one = argparse.Namespace(**vars(args) | kept["arguments"] | {"seed": seed, "device": args.device})
        if arm in RESTARTED:
            one.epochs = len(finished["dendrites"][-1]["training"]["history"])
        finished[arm].append(kept if kept["finished"] else run_experiment(one, own_dir, arm))
        used = finished[arm][-1]["arguments"]  # all runs on what the first one found in reach
        args.dataset, args.from_scratch = used["dataset"], used["from_scratch"]
    return combine_runs(args, finished, run_dir)


def combine_runs(args, finished, run_dir):
    """Mean ± 95 % interval over the seeds of each arm, and paired differences, written to `run_dir`."""
    runs, scores, table = next(iter(finished.values())), {}, []
    for arm, own in (finished | {"TF-IDF": runs}).items():
        tuned = [run["models"]["TF-IDF"] if arm == "TF-IDF" else next(iter(run["models"].values())) for run in own]
        scores[arm] = {key: [one["tuned"][key] for one in tuned] for key in LABELS}

    def interval(values, marked=False):
        mean, width = mean_and_interval(values)
        text = f"{mean:.3f}" + (f" ± {width:.3f}" if math.isfinite(width) else "")
        return text + "*" * bool(marked and abs(mean) > width)

    first = next(iter(finished))
    for arm, own in scores.items():
        row = {"arm": arm} | {label: interval(own[key]) for key, label in LABELS.items()}
        if arm != first:
            row |= {f"{first} minus this, {label}": interval(np.subtract(scores[first][key], own[key]), True)
                    for key, label in LABELS.items()}
        if arm in finished:
            row |= {name: ", ".join(map(str, (run[key] for run in finished[arm])))
                    for name, key in (("best epochs", "best_epoch"), ("dendrites kept", "dendrites"))}
            row["parameters"] = max(run["parameters"] for run in finished[arm])
        table.append(row)
    if len(runs) > 1:
        plot_arms(scores, run_dir)
    seeds = [run["seed"] for run in runs]
    text = (f"# toxicity.py, {runs[0]['data']['name']}, seeds {seeds[0]} to {seeds[-1]}: mean ± 95 % interval "
            f"(Student's t), test part\n\n{markdown_table(table)}\n\nDifferences are paired by seed; * marks an "
            "interval without 0." + " \"same budget\" and \"wider\" have the epochs and the restarts of \"dendrites\"."
            * args.compare_dendrites + "\n")
    (run_dir / "summary.md").write_text(text, encoding="utf-8")
    return write_results(describe_run(args) | {
        "finished": True, "data": runs[0]["data"], "seeds": seeds, "scores": scores, "table": table,
        "seconds": {arm: [run["training"]["seconds"] for run in own] for arm, own in finished.items()},
        "peak_memory_mib": memory_mib()}, run_dir / "results.json")


def export_for_transformers(args):
    """Write a model without dendrites as a folder that transformers' from_pretrained reads."""
    from transformers import BertTokenizerFast

    classifier, folder = Classifier.load(find_checkpoint(args), torch.device("cpu")), args.export_hf
    if classifier.dendrites or classifier.kind != "float32":
        raise UserError(f"--export-hf: {classifier.label} is no plain BERT, which is all that transformers can load; "
                        "train with --no-dendrites")
    Path(folder).mkdir(parents=True, exist_ok=True)
    classifier.model.save_pretrained(folder)
    BertTokenizerFast(tokenizer_object=classifier.tokenizer).save_pretrained(folder)
    print(f"{classifier.label} for transformers is in {folder}")


def predict(args):
    """Print score, decision and tier of each text of --predict, or of each line on stdin; returns them as a list."""
    classifier = Classifier.load(find_checkpoint(args), choose_device(args.device))
    try:
        texts = args.predict or [line.rstrip("\n") for line in sys.stdin]
        "".join(texts).encode()
    except UnicodeError:
        raise UserError("--predict: a text is not UTF-8") from None
    if not texts:
        raise UserError("--predict: no text given, and none on stdin")
    threshold = classifier.threshold
    cuts = [threshold / 2, threshold, (1 + threshold) / 2]
    rows = [{"text": text, "score": round(float(score), 4), "toxic": bool(score >= threshold),
             "tier": TIERS[int(np.searchsorted(cuts, score, side="right"))]}
            for text, score in zip(texts, classifier.scores(texts))]
    if args.format == "json":
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
    else:
        print("score   decision   tier      text")
        for row in rows:
            print(f"{row['score']:.3f}   {'toxic' if row['toxic'] else 'not toxic':9}  {row['tier']:8}  {row['text']}")
    return rows


def main(argv=None):
    """Run the experiment with `argv` as on a command line (default: this process's, in a notebook none).

    Returns the results dictionary, with --predict a list; what a user can put right raises SystemExit(2), Ctrl-C
    SystemExit(130).
    """
    run_dir, resumed = None, False
    try:
        args = parse_args(([] if in_notebook() else sys.argv[1:]) if argv is None else argv)
        if args.resume is not None:
            given, resumed = {"device": args.device} if args.device != "auto" else {}, True
            run_dir, kept = find_run(args.output_dir, args.resume, vars(args))
            args = argparse.Namespace(**vars(kept) | given | {"output_dir": args.output_dir})
        if args.mode in ("predict", "export_hf"):
            return predict(args) if args.mode == "predict" else export_for_transformers(args)
        if args.mode:
            args.checkpoint = str(find_checkpoint(args).absolute())
        run_dir = run_dir or new_run(args.output_dir)
        if not resumed:
            write_results(describe_run(args), run_dir / "results.json")
        results = run_seeds(args, run_dir)
    except KeyboardInterrupt:
        where = run_dir and f"; to go on: python toxicity.py --resume {run_dir}"
        note(f"stopped{where or ''}")
        raise SystemExit(130) from None
    except UserError as problem:
        error = str(problem)
    except torch.OutOfMemoryError:
        error = "not enough GPU memory; lower --batch-size or take --device cpu"
    except OSError as problem:
        error = f"{problem.filename}: {problem.strerror}" if problem.filename else str(problem)
    else:
        print((run_dir / "summary.md").read_text(encoding="utf-8"))
        print(f"Everything is in {run_dir}")
        return results
    if run_dir and not resumed and not [*run_dir.rglob("*.pt"), *run_dir.rglob("*.onnx")]:  # leave no empty run behind
        shutil.rmtree(run_dir, ignore_errors=True)
    print(f"toxicity.py: error: {error}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
