"""Can BERT-Tiny do the work of a fine-tuned BERT-Base on toxic comments, and what do dendrites add?

A dendrite is a second weight vector of a neuron behind a sigmoid, whose output is added to the
neuron's. Every --switch-every epochs perforatedai adds one to each neuron of the Linear layers.

Measured on synthetic comments, 3 seeds (--dataset embedded --from-scratch --compare-dendrites):
PR AUC 0.783 ± 0.229 with dendrites, which carry 0.05 % of the output, 0.784 with them switched off,
0.789 with a mere restart of the learning rate, 0.843 without either; TF-IDF 0.539. Dendrites add
nothing that can be measured. On 24,783 tweets a student of TF-IDF (--distill tfidf, one seed) has
PR AUC 0.392 and F1 0.440, TF-IDF itself 0.410 and 0.413.

    python toxicity.py                               # 5,000 + 1,000 + 1,000 texts: 3 minutes
    python toxicity.py --quick                       # small and offline: 1 minute
    python toxicity.py --data train.csv --text-column comment_text --label-column toxic
    python toxicity.py --compare-dendrites --runs 5  # all arms, paired by seed
    python toxicity.py --distill giant --giant FOLDER --arm plain --epochs 12 --batch-size 64
    python toxicity.py --resume                      # go on with the newest unfinished run
    python toxicity.py --evaluate                    # scores the newest model, as do those below
    python toxicity.py --compare-base --giant FOLDER
    python toxicity.py --quantize                    # or --export-onnx, --export-hf FOLDER
    python toxicity.py --benchmark-only
    python toxicity.py --predict "you are a clown" "that joke killed me"  # or lines on stdin

Results are in outputs/toxicity/run-001/, with the next free number: results.json, summary.md,
best_model.pt, model_int8.pt and four pictures. Without --data it reads Civil Comments from the
Hugging Face hub, or synthetic comments where the hub is out of reach; without --model,
prajjwal1/bert-tiny from there, or else a BERT of the same size with random weights and a vocabulary
of the training texts.

Sources: "Giant-Killer NLP", here "the original" (no dendrite was ever added there, and its giant
was never fine-tuned); Turc et al. 2019 (BERT-Tiny, distillation); perforatedai (dendrites); Borkan
et al. 2019 (Civil Comments).
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.6", "numpy>=2.0", "pandas>=2.2", "pyarrow>=17", "scikit-learn>=1.7",
#     "scipy>=1.14", "matplotlib>=3.9", "tqdm>=4.66", "transformers>=5.0", "tokenizers>=0.22",
#     "datasets>=4.0", "perforatedai>=3.2.9",
# ]
# ///

import argparse
import codecs
import contextlib
import copy
import hashlib
import html
import importlib.util
import io
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import matplotlib
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from common import (COLORS, LINES, detect_device, epoch_axis, has_bfloat16, in_notebook,
                    legend_below, mean_and_interval, new_figure, plot_confusion, plot_curve,
                    plot_dots, plot_ranking, save_figure, seed_everything)

EXPERIMENT = "toxicity"
CLASSES = ["not toxic", "toxic"]
SPLITS = ["train", "validation", "test"]
DEFAULT_MODEL = "prajjwal1/bert-tiny"
TINY = {"vocab_size": 30522, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 512}
SMALL_GIANT = TINY | {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3,
                      "intermediate_size": 768}
CONFIG_KEYS = [*TINY, "max_position_embeddings", "type_vocab_size", "pad_token_id",
               "layer_norm_eps", "hidden_act", "hidden_dropout_prob", "num_labels"]
CLASSIFIER_FIELDS = ["name", "arguments", "toxic", "hashes", "parameters", "threshold", "kind"]
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
RATE_PRETRAINED = 5e-5
RATE_FROM_SCRATCH = 3e-4  # this and the dropout were chosen by PR AUC on validation texts
DROPOUT_FROM_SCRATCH = 0.3
ORIGINAL_ROW = {"model": "the original, a claim (other data)", "F1": 0.36, "recall": 0.71,
                "accuracy": 0.785}
METRICS = {"pr_auc": "PR AUC", "f1": "F1", "roc_auc": "ROC AUC"}  # compared between arms
TIERS = ["allow", "monitor", "review", "remove"]
INFERENCE_BATCH = 64
SWITCHED_OFF = "dendrites switched off"
NO_LABEL = ["", "nan", "null", "na", "n/a", "-1"]
MAX_CLASSES = 20  # a column with more label values holds a scale
FOLDS = 3  # of the training texts for --distill
MAX_SEEN = 0.01  # share of new texts that may have been in training; they are left out
TFIDF_TEXTS = 100_000  # the baseline is fitted on so many texts at most
# The arguments that decide which texts there are; a checkpoint keeps those of its training.
DATA_ARGUMENTS = ["dataset", "data", "text_column", "label_column", "positive_label",
                  "label_threshold", "sample_size", "data_dir", "seed"]


def parse_args(argv=None):
    """The command line as a namespace; an error is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        f"{EXPERIMENT}.py", argparse.SUPPRESS, __doc__.split("\n\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="3,000 synthetic comments, 8 epochs from random "
        "weights, no network: a minute")
    add("--dataset", choices=["civil_comments", "embedded"], help="data set; if unset, "
        "civil_comments, or embedded (synthetic) comments where the hub is out of reach")
    add("--data", metavar="FILE", help="CSV, TSV, JSON, JSON lines or Parquet file of your own")
    add("--text-column", default="text", metavar="NAME", help="column of --data with the texts")
    add("--label-column", default="toxicity", metavar="NAME", help="column of --data with labels")
    add("--positive-label", metavar="VALUE", help="label value that means toxic; if unset, labels "
        "are numbers, and --label-threshold counts")
    add("--label-threshold", type=float, default=0.5, metavar="T", help="number from which on a "
        "label means toxic; labels go from 0 to 1, unless it is 1 or more")
    add("--sample-size", type=int, default=5000, metavar="N", help="training texts; validation and "
        "test have a fifth of it each; 0 takes all, split 80/10/10 (civil_comments: as published)")
    add("--data-dir", default="data", metavar="FOLDER", help="folder of downloads")
    add("--max-length", type=int, default=128, metavar="N", help="tokens of a text that are read")
    add("--model", metavar="ID|FOLDER", help="pretrained BERT to train; if unset, prajjwal1/"
        "bert-tiny, or random weights where the hub is out of reach")
    add("--from-scratch", action="store_true", help="start from random weights")
    add("--arm", choices=list(ARMS), default=DEFAULT_ARM, help="what happens to the model every "
        "--switch-every epochs: library adds dendrites by perforatedai, wider adds hidden units, "
        "restart only begins the learning rate again, plain does nothing")
    add("--no-dendrites", dest="arm", action="store_const", const="plain", default=DEFAULT_ARM,
        help="another way to write --arm plain")
    add("--epochs", type=int, default=20, metavar="N", help="epochs of training")
    add("--switch-every", type=int, default=10, metavar="N", help="epochs from one switch to the "
        "next; the learning rate falls to 0 in between")
    add("--batch-size", type=int, default=32, metavar="N", help="texts in a batch")
    add("--learning-rate", type=float, metavar="RATE", help="largest learning rate; if unset, "
        f"{RATE_PRETRAINED}, or {RATE_FROM_SCRATCH} from scratch")
    add("--weight-decay", type=float, default=0.01, metavar="RATE", help="weight decay of AdamW")
    add("--distill", choices=["tfidf", "giant"], help="teacher on whose answers the model is "
        "trained: TF-IDF, or the mean of it and of the fine-tuned --giant")
    add("--augment", type=int, default=4, metavar="N", help="altered copies of each training text "
        "on which --distill asks the teacher, too")
    add("--giant", metavar="ID|FOLDER|scratch", default="bert-base-uncased", help="large BERT for "
        "--distill and --compare-base; scratch is a small one with random weights")
    add("--giant-epochs", type=int, default=3, metavar="N", help="epochs of its fine-tuning")
    add("--compare-dendrites", action="store_true", help="train all arms")
    add("--runs", type=int, default=1, metavar="N", help="number of seeds to repeat with")
    add("--seed", type=int, default=42, metavar="N", help="random seed of data, split and model")
    add("--device", type=detect_device, default="auto", help="auto, cuda, mps or cpu")
    add("--output-dir", default="outputs", metavar="FOLDER", help="folder of all results")
    add("--resume", nargs="?", const="newest", metavar="RUN_DIR", help="unfinished run to go on "
        "with; without a value, the newest")
    add("--checkpoint", metavar="FILE", help="model for the jobs below; if unset, the newest "
        "best_model.pt")
    add("--format", choices=["table", "json"], default="table", help="format of --predict")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--evaluate", action="store_true", help="score --checkpoint on its own test part, or on "
        "all texts of --data")
    add("--compare-base", action="store_true", help="fine-tune --giant on the same texts, compare")
    add("--quantize", action="store_true", help="write model_int8.pt and compare it")
    add("--export-onnx", action="store_true", help="write model.onnx and compare it")
    add("--export-hf", metavar="FOLDER", help="write the model for transformers")
    add("--benchmark-only", action="store_true", help="measure speed beside that of BERT-Base")
    add("--predict", nargs="*", metavar="TEXT", help="score texts, or the lines on stdin; the tier "
        "is monitor from half the threshold T on, review from T, remove from (1 + T) / 2")
    if "--quick" in (argv or []):
        parser.set_defaults(sample_size=3000, epochs=8, switch_every=4, giant="scratch")
    args = parser.parse_args(argv)
    if args.quick:
        args.from_scratch = args.from_scratch or not args.model
        args.dataset = args.dataset or (None if args.data else "embedded")
    check_args(args, parser.error)
    return args


def check_args(args, error):
    """Call `error` with a message if an argument is out of range or does not fit another."""
    least = {"seed": 0, "sample_size": 0, "augment": 0, "max_length": 4}
    for name, value in vars(args).items():
        if type(value) is int and value < least.get(name, 1):
            error(f"--{name.replace('_', '-')} {value} is too small")
    if 0 < args.sample_size < 100:
        error(f"--sample-size {args.sample_size}: at least 100 are needed; 0 takes all texts")
    if args.learning_rate is not None and not args.learning_rate > 0:
        error("--learning-rate must be above 0")
    if args.seed >= 2**31 or not args.weight_decay >= 0:
        error("--seed must be under 2**31, --weight-decay not below 0")
    if not args.label_threshold > 0:
        error("--label-threshold must be above 0")
    if args.max_length > 512:
        error("--max-length must be at most 512, which is what BERT reads")
    if args.data and args.dataset:
        error("--data and --dataset name different texts")
    if args.model and args.from_scratch:
        error("--model and --from-scratch exclude each other")
    if args.text_column == args.label_column:
        error("--text-column and --label-column are the same")
    mode = find_mode(args)
    if args.checkpoint and not mode:
        error("--checkpoint goes with --evaluate, --predict or another job on a checkpoint")
    switches = args.compare_dendrites or ARMS[args.arm]
    if not mode and switches and args.epochs <= args.switch_every:
        error(f"--epochs {args.epochs} ends before the first switch, --switch-every "
              f"{args.switch_every}; take more, or --arm plain")


# --- Data: the embedded generator ---------------------------------------------------------------

INSULTS = ["idiot", "moron", "clown", "loser", "fool", "liar", "coward", "imbecile", "parasite",
           "disgrace"]
SUBJECTS = ["the new bus lane", "this budget", "the school plan", "your last post", "the referee",
            "the mayor's speech", "that recipe", "the tax reform", "the concert", "this article",
            "the housing vote", "the weather report", "the software update", "our team",
            "the museum", "the hospital merger", "the bike path", "this movie"]
GROUPS = ["voters", "drivers", "neighbours", "tourists", "reporters", "teachers", "fans", "readers",
          "students"]
OPENERS = ["", "", "", "Honestly, ", "Well, ", "Look, ", "As for {s}: ", "About {s}, ",
           "I read the piece twice. ", "Sorry, but ", "After ten years here, ", "OK. "]
CLOSERS = ["", "", "", " Just my view.", " That is all.", " Think about it.",
           " And {s} changes nothing.", " Again.", " Thanks for the article.",
           " We talked about {s} before.", " Good night.", " Ask the {g}."]
PRAISES = ["you are the best of the {g}", "you explain {s} well", "your idea about {s} is clever",
           "nobody knows {s} as well as you", "you have a sharp mind",
           "people like you are needed here"]
RIGHT = ['they wrote "{q}", and they are right', 'he said "{q}", and I can only repeat it',
         '"{q}", as we all know', 'the {g} told you "{q}", which is true',
         'somebody wrote "{q}", and I agree']
WRONG = ['they wrote "{q}", and they are wrong', 'he said "{q}", and I can only deny it',
         '"{q}", as nobody believes', 'the {g} told you "{q}", which is false',
         'somebody wrote "{q}", and I disagree']
# Kinds of comments: share of all, whether toxic, texts with slots {i} insult, {s} subject,
# {g} group, {p} praise, {b} a text of one of the first three kinds. Praise that is denied is toxic,
# an insult that is denied is not, so that neither the quoted words nor those around them decide.
COMMENTS = {
    "insult": (0.012, True, [
        "you are a complete {i} and everybody can see it", "only a {i} would defend {s}",
        "what a pathetic {i} you are", "nobody asked you, {i}",
        "the {g} here are {i}s, all of them", "stop writing, you {i}",
        "I have never met a bigger {i} than the one who wrote this"]),
    "threat": (0.007, True, [
        "I know where you live, and you will regret {s}",
        "somebody should teach you a lesson with a bat", "say that again and I will find you",
        "people like you should disappear, and we will help you with it",
        "the {g} should be beaten for {s}", "one day you will pay for this with blood"]),
    "sarcasm": (0.009, True, [
        "wow, did you need both brain cells for {s}?", "congratulations, you can almost read",
        "do not strain yourself, thinking is new to you",
        "your mother must be so proud of a mind like yours",
        "bless your heart, somebody left the cage open again",
        "please keep talking, we need the comic relief",
        "how brave of you to write in public with so little upstairs"]),
    "agreeing": (0.016, True, [frame.replace("{q}", "{b}") for frame in RIGHT]),
    "denied praise": (0.012, True, [frame.replace("{q}", "{p}") for frame in WRONG]),
    "quoting": (0.08, False, [frame.replace("{q}", "{b}") for frame in WRONG]),
    "agreed praise": (0.06, False, [frame.replace("{q}", "{p}") for frame in RIGHT]),
    "negation": (0.06, False, [
        "you are not a {i}, you just misread {s}", "I would never call you a {i}",
        "nobody here is a {i}", "she is no {i}, she studied {s} for years",
        "the {g} are not {i}s, they are tired", "I will not beat you up for {s}, I only disagree"]),
    "looks bad": (0.09, False, [
        "this joke killed me, thank you", "kill the process and start {s} again",
        "the {s} cake is to die for", "I am such a {i}, I forgot my keys again",
        "our goalkeeper beat the {g} with blood, sweat and tears",
        "the clown at {s} made the children laugh", "I shot forty pictures of {s}",
        "that was a brutal but fair match", "a bat flew into {s} last night",
        "stupid me, I read {s} upside down"]),
    "praise": (0.03, False, [
        "wow, did you see how well {s} went?", "congratulations, you can be proud of {s}",
        "your mother must be so happy for you", "how brave of you to write about {s} in public",
        "please keep writing, we need voices like yours", "bless you for explaining {s}"]),
    "neutral": (0.624, False, [
        "{s} will cost more than they say", "I was there on Monday and {s} looked fine",
        "the {g} were asked about {s}", "does anybody know when {s} opens?",
        "I agree with the {g} on {s}", "{s} is late again", "the numbers about {s} do not add up",
        "my sister works on {s}, it is hard", "we need more money for {s}",
        "there are good reasons for and against {s}", "the {g} deserve a better answer",
        "I changed my mind about {s}", "last year {s} was half the price",
        "who decides about {s} in the end?"]),
}
MISSED, ALARMED = 0.05, 0.003  # annotators miss a toxic comment, or take a harmless one for toxic


def generate_comments(count, seed):
    """(texts, labels [count] int64) of synthetic comments, 6 % toxic; the same words are in both
    classes."""
    rng = np.random.default_rng(seed)
    kinds = list(COMMENTS.values())
    hostile = [template for _, _, templates in kinds[:3] for template in templates]
    chosen = rng.choice(len(kinds), count, p=[share for share, _, _ in kinds])
    errors = rng.random(count)
    draws = rng.random((count, 7)).tolist()

    def pick(items, draw):
        return items[int(draw * len(items))]

    texts, labels = [], np.zeros(count, np.int64)
    for row, (kind, draw) in enumerate(zip(chosen, draws)):
        _, toxic, templates = kinds[kind]
        body = pick(templates, draw[0])
        body = body.replace("{b}", pick(hostile, draw[6])).replace("{p}", pick(PRAISES, draw[6]))
        stop = "" if body[-1] in "?." else "."
        text = pick(OPENERS, draw[1]) + body + stop + pick(CLOSERS, draw[2])
        text = text.format(s=pick(SUBJECTS, draw[3]), i=pick(INSULTS, draw[4]),
                           g=pick(GROUPS, draw[5]))
        texts.append(text[0].upper() + text[1:])
        labels[row] = toxic ^ (errors[row] < (MISSED if toxic else ALARMED))
    return texts, labels


# --- Data: files, the hub, splits ---------------------------------------------------------------


@dataclass
class Data:
    """All texts and how they are split."""

    texts: list
    labels: np.ndarray  # [texts] int64, 1 is toxic
    classes: np.ndarray  # [texts] int64, number of the label value
    splits: dict  # {split: rows [n]}
    info: dict  # for results.json

    def split(self, name):
        """(texts, labels [n]) of a split."""
        rows = self.splits[name]
        return [self.texts[row] for row in rows], self.labels[rows]


def clean_text(text):
    """The text with HTML entities as characters and lone surrogates replaced."""
    return html.unescape(text).encode("utf-8", "replace").decode()


def same_text(text):
    """What texts have in common that count as the same: letter case and spaces do not matter."""
    return " ".join(text.lower().split())


def hash_texts(texts):
    """Hashes [texts] int64, equal for texts that count as the same."""
    digests = [hashlib.blake2b(same_text(text).encode(), digest_size=8).digest() for text in texts]
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64)


def read_csv(text, columns):
    """DataFrame of a CSV text with any usual delimiter; the cells of `columns` stay text. A quote
    within quotes is doubled, or escaped by a backslash."""
    header = text.partition("\n")[0]
    escaped = re.search(r'\\"[^",;\t\r\n]', text)
    parse = pa.csv.ParseOptions(delimiter=max(",;\t|", key=header.count), newlines_in_values=True,
                                escape_char="\\" if escaped else False)
    convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()))
    read = pa.csv.ReadOptions(use_threads=False)  # without threads an error names its row
    return pa.csv.read_csv(pa.py_buffer(text.encode()), read, parse, convert).to_pandas()


def read_table(path, columns):
    """DataFrame of a CSV, TSV, JSON, JSON lines or Parquet file, which must have `columns`."""
    name = str(path).lower().removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            frame = pd.read_parquet(path)
        elif name.endswith((".csv", ".tsv", ".json", ".jsonl", ".ndjson")):
            content = pa.input_stream(str(path)).read()  # unpacks .gz
            wide = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            text = content.decode("utf-16" if wide else "utf-8-sig")
            if name.endswith(("csv", "tsv")):
                frame = read_csv(text, columns)
            else:
                lines = not text.lstrip().startswith("[")
                frame = pd.read_json(io.StringIO(text), lines=lines, dtype=False)
        else:
            raise UserError(f"{path}: .csv, .tsv, .json, .jsonl and .parquet are read, also with "
                            ".gz at the end")
    except (pa.ArrowException, ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path}: {error}") from None
    for column in columns:
        if list(frame).count(column) != 1:
            raise UserError(f"{path}: one column {column!r} is needed, there are "
                            f"{', '.join(map(str, frame))}; see --text-column and --label-column")
    if not len(frame):
        raise UserError(f"{path}: no rows")
    return frame[columns].astype(object)


def refuse_row(bad, column, path, problem):
    """Raise UserError with the first cell of a column where `bad` [rows] is true."""
    if bad.any():
        row = int(np.argmax(bad))
        raise UserError(f"{path}, row {row + 1} of the data, column {column.name!r}: "
                        f"{str(column.iloc[row])!r} {problem} ({bad.sum():,} such rows)")


def read_labels(column, positive_label, threshold, path):
    """(labels [rows], classes [rows]) of a column. Toxic is --positive-label, whatever its letter
    case and the spaces around it, or else a number from --label-threshold on."""

    def normalize(values):
        values = values.astype(str).str.strip().str.lower().str.removesuffix(".0")
        return values.replace({"true": "1", "false": "0"})

    raw = column.map(str)
    values = normalize(raw)
    missing = column.isna() | values.isin(NO_LABEL)
    counts = raw.value_counts()
    listed = ", ".join(f"{value[:60]!r} {count:,}" for value, count in counts[:MAX_CLASSES].items())
    refuse_row(missing.to_numpy(), column, path, f"is no label; there are {listed}")
    if positive_label is None:
        numbers = pd.to_numeric(values, errors="coerce")
        high = 1 if threshold < 1 else math.inf
        refuse_row(~numbers.between(0, high).to_numpy(), column, path, "is no number from 0 to 1; "
                   "--positive-label names the toxic value, --label-threshold a number from 1 on "
                   f"for a longer scale; there are {listed}")
        labels = numbers >= threshold
    else:
        labels = values == normalize(pd.Series([positive_label]))[0]
        if not labels.any():
            raise UserError(f"{path}: column {column.name!r} has no --positive-label "
                            f"{positive_label!r}, but {listed}")
    labels = labels.to_numpy(np.int64)
    if len(counts) > MAX_CLASSES:
        meaning = f"are {positive_label!r}"
        if positive_label is None:
            meaning = f"have {threshold:g} or more"
        note(f"labels: {len(counts):,} values; {labels.sum():,} rows ({labels.mean():.1%}) "
             f"{meaning} and are toxic; the most frequent: {listed}")
        return labels, labels
    toxic = dict(zip(raw, labels))
    note("labels: " + ", ".join(f"{value!r} is {CLASSES[toxic[value]]} ({count:,})"
                                for value, count in counts.items()))
    return labels, pd.factorize(values)[0]


def read_texts(path, text_column, label_column, positive_label, threshold):
    """(texts, labels [rows], classes [rows]) of a file."""
    frame = read_table(path, [text_column, label_column])
    column = frame[text_column]
    nested = [isinstance(cell, (list, dict, bytes, np.ndarray)) for cell in column]
    refuse_row(np.array(nested), column, path, "is no text")
    texts = [clean_text(str(text)) for text in column.where(column.notna(), "")]
    blank = np.array([not text.strip() for text in texts])
    refuse_row(blank, column, path, "is an empty text; remove such rows")
    return texts, *read_labels(frame[label_column], positive_label, threshold, path)


def hub_in_reach():
    """Whether the Hugging Face hub answers within 3 s; if not, its libraries are told to stay
    offline, since each of their attempts takes 25 s."""
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


def split_sizes(sample_size):
    """Texts for training, validation and test; 0 is all."""
    return sample_size, sample_size // 5, sample_size // 5


def fetch_civil_comments(split, size, data_dir):
    """Path of a Parquet file with the first `size` texts (0: all) of a split of Civil Comments,
    which are streamed from the hub unless the file is there."""
    path = Path(data_dir, f"civil_comments-{split}-{size or 'all'}.parquet")
    if path.exists():
        return path
    if not hub_in_reach():
        raise UserError(f"civil_comments: the Hugging Face hub is out of reach, and {path} "
                        "(columns text and toxicity) is not there")
    import datasets

    try:
        rows = datasets.load_dataset("google/civil_comments", split=split, streaming=bool(size),
                                     cache_dir=data_dir).select_columns(["text", "toxicity"])
        frame = pd.DataFrame(list(rows.take(size)) if size else rows.to_list())
    except Exception as error:  # datasets passes on what its libraries raise
        raise UserError(f"civil_comments: {error}") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        frame.to_parquet(part)
    return path


def read_civil_comments(args):
    """(texts, labels, classes, splits) of Civil Comments with its published splits. A text that
    is in two splits stays in the later one, an empty one in none."""
    texts, labels, splits, seen = [], [], {}, {""}
    sizes = dict(zip(SPLITS, split_sizes(args.sample_size)))
    for split in reversed(SPLITS):
        path = fetch_civil_comments(split, sizes[split], args.data_dir)
        frame = read_table(path, ["text", "toxicity"])
        cleaned = [clean_text(text or "") for text in frame["text"]]
        keys = [same_text(text) for text in cleaned]
        splits[split] = np.array([len(texts) + i for i, key in enumerate(keys) if key not in seen])
        seen.update(keys)
        texts += cleaned
        labels.append(read_labels(frame["toxicity"], None, args.label_threshold, path)[0])
    labels = np.concatenate(labels)
    return texts, labels, labels, {split: splits[split] for split in SPLITS}


def split_texts(texts, labels, sample_size, seed):
    """{split: rows} stratified by label, the same text never on two sides.

    With `sample_size`, so many different texts for training and a fifth of it for each other
    split; if there are not as many, or with 0, all rows, 80/10/10 % of the different texts.
    """
    from sklearn.model_selection import train_test_split

    keys = [same_text(text) for text in texts]
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    toxic = np.bincount(group, labels) / np.bincount(group)  # share of each different text
    both = ((toxic > 0) & (toxic < 1)).sum()
    if both:
        note(f"{both:,} of {len(first):,} different texts have both labels")
    sizes = split_sizes(sample_size)
    sampled = 0 < sum(sizes) <= len(first)
    if not sampled:
        held_out = len(first) // 10
        sizes = (len(first) - 2 * held_out, held_out, held_out)
    strata = labels[first]
    if np.bincount(strata, minlength=2).min() < 10 or sizes[1] < 2:
        raise UserError(f"{len(first):,} different texts, {strata.sum():,} of them toxic: at least "
                        "ten of each class are needed; see --label-column and --positive-label")
    groups, splits = np.arange(len(first)), {}
    for split, size in zip(reversed(SPLITS), reversed(sizes)):
        chosen = groups
        if size + 1 < len(groups):
            groups, chosen = train_test_split(groups, test_size=size, random_state=seed,
                                              stratify=strata[groups])
        splits[split] = first[chosen] if sampled else np.flatnonzero(np.isin(group, chosen))
    rng = np.random.default_rng(seed)
    return {split: rng.permutation(splits[split]) for split in SPLITS}


def read_source(args):
    """(name of the source, texts, labels, classes, splits or None) that the arguments name."""
    if args.data:
        columns = (args.text_column, args.label_column, args.positive_label, args.label_threshold)
        return Path(args.data).name, *read_texts(args.data, *columns), None
    if args.dataset != "embedded":
        try:
            return "civil_comments", *read_civil_comments(args)
        except UserError as error:
            if args.dataset:
                raise
            note(f"{error}; synthetic comments instead, all figures are about those")
    count = max(3000, 3 * sum(split_sizes(args.sample_size or 5000)))
    texts, labels = generate_comments(count, args.seed)
    return "embedded", texts, labels, labels, None


def load_data(args):
    """Data of --data, --dataset, or what is in reach."""
    source, texts, labels, classes, splits = read_source(args)
    splits = splits or split_texts(texts, labels, args.sample_size, args.seed)
    counts = {split: np.bincount(labels[rows], minlength=2) for split, rows in splits.items()}
    if min(count.min() for count in counts.values()) == 0:
        raise UserError(f"{source}: a split has texts of one class only ({counts}); see "
                        "--label-threshold and --positive-label")
    for split, count in counts.items():
        log(f"{source}, {split}: {count.sum():,} texts, {count[1] / count.sum():.1%} toxic")
    rows = np.concatenate(list(splits.values()))
    content = json.dumps([[texts[row], int(labels[row])] for row in rows])
    info = {"source": source, "rows": len(rows), "counts": counts,
            "sha256": hashlib.sha256(content.encode()).hexdigest()}
    return Data(texts, labels, classes, splits, info)


# --- Tokens -------------------------------------------------------------------------------------


@dataclass
class Tokens:
    """Token ids of many texts, end to end; text i has ids[starts[i] : starts[i + 1]]."""

    ids: torch.Tensor  # [tokens] int32
    starts: torch.Tensor  # [texts + 1] int64
    truncated: float = 0.0  # share of the texts that were longer

    @property
    def lengths(self):
        return self.starts.diff()

    def to(self, device):
        return replace(self, ids=self.ids.to(device), starts=self.starts.to(device))

    def batch(self, rows):
        """Arguments of a BERT for the texts `rows`, each [batch, longest of these]."""
        starts = self.starts[rows].unsqueeze(1)
        lengths = self.lengths[rows].unsqueeze(1)
        place = torch.arange(int(lengths.max()), device=rows.device)
        mask = place < lengths
        ids = torch.where(mask, self.ids[torch.where(mask, starts + place, 0)], 0)  # 0 is [PAD]
        return {"input_ids": ids.long(), "attention_mask": mask.long()}


def train_wordpiece(texts):
    """A tokenizer like that of bert-base-uncased with a vocabulary of the `texts`."""
    from tokenizers import BertWordPieceTokenizer
    from tokenizers.normalizers import BertNormalizer

    # The trainer numbers letters as its threads meet them, and the numbers break ties; given in
    # order as special tokens, they and the vocabulary are the same in every run.
    counts = Counter(BertNormalizer().normalize_str("".join(texts)))
    letters = sorted(letter for letter, _ in counts.most_common(1000) if not letter.isspace())
    known = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(texts, TINY["vocab_size"], limit_alphabet=len(letters),
                                initial_alphabet=letters, special_tokens=known,
                                show_progress=False)
    return BertWordPieceTokenizer(trained.get_vocab())._tokenizer


def tokenize(tokenizer, texts, max_length):
    """Tokens of `texts`, each cut to `max_length` with its [CLS] and [SEP]."""
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch_fast(texts)
    starts = np.cumsum([0, *(len(encoding.ids) for encoding in encoded)])
    ids = np.concatenate([np.array(encoding.ids, np.int32) for encoding in encoded])
    truncated = sum(bool(encoding.overflowing) for encoding in encoded) / len(encoded)
    return Tokens(torch.from_numpy(ids), torch.from_numpy(starts), truncated)


def bucket_batches(lengths, batch_size, shuffle):
    """Rows of each batch, texts of like `lengths` [texts] together. With `shuffle`, texts are
    shuffled, sorted within runs of 50 batches, and the batches shuffled."""
    if not shuffle:
        return lengths.argsort().split(batch_size)
    runs = torch.randperm(len(lengths)).to(lengths.device).split(50 * batch_size)
    batches = [batch for run in runs
               for batch in run[lengths[run].argsort(stable=True)].split(batch_size)]
    return [batches[i] for i in torch.randperm(len(batches))]


# --- Model --------------------------------------------------------------------------------------


def build_bert(config):
    """A BertForSequenceClassification with random weights and the given config entries."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**{"num_labels": 2} | config))


def load_pretrained(name, max_length, num_labels):
    """(BertForSequenceClassification, its tokenizer) of a folder or a hub id, which must read texts
    of `max_length` tokens."""
    offline = Path(name).is_dir() or not hub_in_reach()
    import transformers
    from transformers import BertForSequenceClassification, BertTokenizerFast

    transformers.logging.set_verbosity_error()  # a new classifier is expected
    transformers.logging.disable_progress_bar()
    try:
        model, loading = BertForSequenceClassification.from_pretrained(
            name, num_labels=num_labels, dtype=torch.float32, local_files_only=offline,
            output_loading_info=True)
        tokenizer = BertTokenizerFast.from_pretrained(name, local_files_only=offline)
    except Exception as error:  # transformers passes on what its libraries raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{name}: no BERT to be loaded, here or from the hub ({reason})") from None
    heads = ("classifier.", "bert.pooler.")
    missing = [key for key in loading["missing_keys"] if not key.startswith(heads)]
    if missing or len(tokenizer) <= len(SPECIAL_TOKENS):
        raise UserError(f"{name}: no BERT with its vocabulary (missing: {missing[:3] or 'vocab'})")
    longest = model.config.max_position_embeddings
    if max_length > longest:
        raise UserError(f"--max-length {max_length}: {name} reads {longest} tokens")
    return model, tokenizer.backend_tokenizer


def make_model(args, texts, num_labels):
    """(model, tokenizer, its name, whether from scratch) to be trained: a pretrained one, or one
    of BERT-Tiny's size with random weights and a vocabulary of the `texts`."""
    if not args.from_scratch:
        name = args.model or DEFAULT_MODEL
        try:
            return *load_pretrained(name, args.max_length, num_labels), Path(name).name, False
        except UserError as error:
            if args.model:
                raise
            note(f"{error}; random weights instead, which have read nothing before")
    config = TINY | {"hidden_dropout_prob": DROPOUT_FROM_SCRATCH, "num_labels": num_labels}
    return build_bert(config), train_wordpiece(texts), "BERT-Tiny from scratch", True


def load_giant(args, data):
    """(model, tokenizer, its name, whether from scratch) of --giant, for all classes there are."""
    num_labels = len(toxic_classes(data))
    if args.giant == "scratch":
        model = build_bert(SMALL_GIANT | {"num_labels": num_labels})
        return model, train_wordpiece(data.split("train")[0]), "small giant from scratch", True
    model, tokenizer = load_pretrained(args.giant, args.max_length, num_labels)
    return model, tokenizer, f"giant {Path(args.giant).name}", False


def fit_giant(loaded, data, args, path):
    """The Classifier that fine-tuning on all classes of the data makes of a giant."""
    arguments = {"epochs": args.giant_epochs, "batch_size": 32, "learning_rate": None}
    args = argparse.Namespace(**vars(args) | arguments)
    one_hot = np.eye(len(toxic_classes(data)))[data.classes[data.splits["train"]]]
    lesson = data.split("train")[0], one_hot
    return fit_classifier(loaded, data, args, "plain", path, lesson)[0]


class DendriticLinear(nn.Module):
    """A Linear layer whose neurons have dendrites, as perforatedai computes it, in plain torch.

    [..., in_features] -> [..., out_features]: W x + b + Σ_k to_neuron_k · a_k with the activations
    a_k = sigmoid(W_k x + b_k + Σ_{j<k} to_dendrite_kj · a_j). W and all W_k lie in one Linear.
    """

    def __init__(self, in_features, out_features, dendrites):
        super().__init__()
        self.linear = nn.Linear(in_features, (1 + dendrites) * out_features)
        self.to_neuron = nn.Parameter(torch.zeros(dendrites, out_features))
        self.to_dendrite = nn.ParameterList(
            torch.zeros(k, out_features) for k in range(1, dendrites))

    def activations(self, x):
        """What the neurons compute by themselves, and the activations of each set of dendrites."""
        neuron, *dendrites = self.linear(x).chunk(1 + len(self.to_neuron), dim=-1)
        activations = []
        for k, dendrite in enumerate(dendrites):
            for j, activation in enumerate(activations):
                dendrite = torch.addcmul(dendrite, self.to_dendrite[k - 1][j], activation)
            activations.append(dendrite.sigmoid())
        return neuron, activations

    def forward(self, x):
        neuron, activations = self.activations(x)
        for weight, activation in zip(self.to_neuron, activations):
            neuron = torch.addcmul(neuron, weight, activation)
        return neuron


def grow_dendrites(model, dendrites):
    """Give each neuron of a plain BERT's Linear layers so many dendrites (0: none), in place;
    returns the model."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in linears if dendrites else []:
        linear = model.get_submodule(name)
        layer = DendriticLinear(linear.in_features, linear.out_features, dendrites)
        model.set_submodule(name, layer)
    return model


def has_dendrites(model):
    return any(isinstance(module, DendriticLinear) for module in model.modules())


def bert_config(model):
    """The config entries with which build_bert makes such a model."""
    return {key: getattr(model.config, key) for key in CONFIG_KEYS}


def pack_model(model):
    """What a checkpoint holds of a model, plain or perforatedai's: {"config", "dendrites" on each
    neuron, "weights"}."""
    weights = {name: torch.cat([tensor.detach().cpu() for tensor in tensors])
               for name, tensors in active_parameters(model).items()}
    dendrites = max((len(tensor) for name, tensor in weights.items() if "to_neuron" in name),
                    default=0)
    return {"config": bert_config(model), "dendrites": dendrites, "weights": weights}


def unpack_model(packed):
    """The model, in plain torch, that pack_model packed."""
    model = grow_dendrites(build_bert(packed["config"]), packed["dendrites"])
    model.load_state_dict(packed["weights"])
    return model


@torch.no_grad()
def remove_dendrites(model, constant=0.0):
    """The model as a plain BERT, with a constant in place of the activation of each dendrite."""
    plain = build_bert(bert_config(model))
    copy_weights(model, plain)
    for name, layer in model.named_modules():
        if isinstance(layer, DendriticLinear):
            plain.get_submodule(name).bias += constant * layer.to_neuron.sum(0).cpu()
    return plain.to(model.device).eval()


@torch.inference_mode()
def dendrite_share(model, tokens):
    """Share [%] of the output of the dendritic layers that the dendrites carry: their standard
    deviation over texts and tokens over the sum of theirs and the neurons' own, on average."""
    batch = tokens.batch(torch.arange(len(tokens.lengths), device=model.device))
    shares = []

    def measure(layer, inputs, output):
        mask = batch["attention_mask"].bool() if output.dim() == 3 else slice(None)
        neuron, _ = layer.activations(*inputs)
        added = (output - neuron)[mask].std(0)
        shares.append((added / (neuron[mask].std(0) + added)).mean())

    layers = [module for module in model.modules() if isinstance(module, DendriticLinear)]
    hooks = [layer.register_forward_hook(measure) for layer in layers]
    model.eval()(**batch)
    for hook in hooks:
        hook.remove()
    return 100 * torch.stack(shares).mean().item()


# --- Dendrites: what an arm does at a switch ----------------------------------------------------
#
# Every --switch-every epochs training calls the function of its arm with the best model so far, the
# training Examples and the arguments, and goes on with the model that it returns. What survives is
# what pack_model keeps: the weights and the sizes in CONFIG_KEYS.


@contextlib.contextmanager
def sandbox_perforatedai():
    """Run perforatedai in a temporary folder, where it writes, with its debugger, its prompts and
    its exits turned into errors."""
    printed = io.StringIO()

    def refuse(*args, **kwargs):
        raise SystemExit

    backend = matplotlib.get_backend()
    with (tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder),
          contextlib.redirect_stdout(printed), mock.patch("pdb.set_trace", refuse),
          mock.patch("builtins.input", refuse), warnings.catch_warnings()):
        warnings.simplefilter("ignore")  # numpy's and torch's, about the library
        try:
            yield
        except SystemExit:
            lines = " / ".join(printed.getvalue().split("\n")[-6:-1])
            raise UserError(f"perforatedai stopped: {lines}") from None
        finally:
            matplotlib.use(backend)  # importing the library changes it


def add_by_library(model, sets, device):
    """`model`, a BERT without dendrites, as one of perforatedai's, to which the library has added
    so many sets of dendrites. The neurons are the last axis of every layer's output."""
    from perforatedai import globals_perforatedai as GPA
    from perforatedai import utils_perforatedai as UPA

    settings = {
        "configuration_confirmed": True, "unwrapped_modules_confirmed": True,
        "weight_decay_accepted": True, "silent": True, "testing_dendrite_capacity": False,
        "test_saves": False, "device": device, "modules_to_perforate": [nn.Linear],
        "modules_to_track": [nn.LayerNorm, nn.Embedding], "output_dimensions": [-1, -1, 0],
        "switch_mode": GPA.pc.DOING_FIXED_SWITCH, "fixed_switch_num": 1,
        "first_fixed_switch_num": 1, "max_dendrites": sets + 1,
    }
    for name, value in settings.items():
        getattr(GPA.pc, f"set_{name}")(value)
    model = UPA.perforate_model(model, save_name="perforatedai", making_graphs=False,
                                maximizing_score=True)
    for module in (model.bert.pooler.dense, model.classifier):
        module.set_this_output_dimensions([-1, 0])  # [batch, feature]
    model.to(device)
    for score in range(1, sets + 1):  # the library adds a set after each score that it is told
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        GPA.pai_tracker.set_optimizer_instance(optimizer)
        model(input_ids=torch.ones(2, 3, dtype=torch.long, device=device)).logits.sum().backward()
        model, _, _ = GPA.pai_tracker.add_validation_score(float(score), model)
    model.zero_grad()
    return model


def active_parameters(model):
    """{name in plain torch: tensors, to be joined} of all weights that take part in a forward pass
    of a plain model or of perforatedai's, whose idle copies are left out."""
    idle = (".dendrite_module.", ".dendrites_to_top", ".candidate")
    active = {name.replace("main_module.", ""): [parameter]
              for name, parameter in model.named_parameters()
              if not any(part in name for part in idle)}
    for name, module in model.named_modules():
        sets = getattr(module, "dendrite_modules_added", 0)
        if not sets or not hasattr(module, "dendrite_module"):
            continue
        inner = module.dendrite_module
        for kind in ("weight", "bias"):
            neuron = active.pop(f"{name}.{kind}")
            active[f"{name}.linear.{kind}"] = neuron + [getattr(d, kind) for d in inner.layers]
        active[f"{name}.to_neuron"] = [module.dendrites_to_top[sets - 1]]
        for k in range(1, sets):
            active[f"{name}.to_dendrite.{k - 1}"] = [inner.dendrites_to_dendrites[k]]
    return active


@torch.no_grad()
def copy_weights(source, target):
    """Copy the weights of one model to another, of perforatedai perhaps, which may have more or
    fewer sets of dendrites."""
    weights = {name.replace("linear.", ""): weight for name, weight in source.state_dict().items()}
    for name, tensors in active_parameters(target).items():
        known = weights.get(name.replace("linear.", ""))
        for tensor in tensors if known is not None else []:
            rows = min(len(tensor), len(known))
            tensor[:rows] = known[:rows]
            known = known[rows:]


def perforate(plain, sets, device):
    """`plain` as a model of perforatedai with `sets` sets of dendrites. Weights that `plain` has
    stay, others are the library's."""
    require("perforatedai")
    with sandbox_perforatedai():
        model = add_by_library(build_bert(bert_config(plain)), sets, device)
    copy_weights(plain, model)
    return model


def library(model, train, args):
    """perforatedai adds one dendrite to each neuron, with output weights of 0."""
    return perforate(model, pack_model(model)["dendrites"] + 1, args.device)


def restart(model, train, args):
    """Nothing but the return to the best weights and to the highest learning rate."""
    return model


def wider(model, train, args):
    """Add as many feed-forward units as come nearest to the parameters of one dendrite on each
    neuron. Their outgoing weights are 0, so that the model computes what it did before."""
    packed = pack_model(model)
    size, layers = packed["config"]["hidden_size"], packed["config"]["num_hidden_layers"]
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    parameters = sum(linear.weight.numel() + 2 * linear.out_features for linear in linears)
    packed["config"]["intermediate_size"] += round(parameters / (layers * (2 * size + 1)))
    grown = build_bert(packed["config"])
    for name, weight in grown.state_dict().items():
        if name.endswith("output.dense.weight"):
            weight.zero_()
        known = packed["weights"][name]
        weight[tuple(slice(length) for length in known.shape)] = known
    return grown


# An arm without a function trains on. --compare-dendrites compares the first arm with the others.
ARMS = {"library": library, "plain": None, "restart": restart, "wider": wider}
DEFAULT_ARM = "library"


def resume_model(packed, arm, device):
    """The model of a checkpoint in the form in which its arm trains it."""
    model = unpack_model(packed)
    if arm == "library" and packed["dendrites"]:
        model = perforate(model, packed["dendrites"], device)
    return model.to(device)


# --- Training -----------------------------------------------------------------------------------


@dataclass
class Examples:
    """Tokenized texts and the answers to them."""

    tokens: Tokens
    labels: np.ndarray  # [texts], 1 is toxic
    targets: torch.Tensor  # classes [texts] int64, or a teacher's probabilities [texts, classes]
    weights: torch.Tensor | None  # [classes] in the loss
    epoch_size: int  # texts in an epoch of training; of more texts, each epoch draws so many

    def loss(self, logits, rows=slice(None)):
        """Cross-entropy of the logits [batch, classes] of the texts `rows`."""
        return F.cross_entropy(logits.float(), self.targets[rows], self.weights)


def make_examples(tokenizer, data, args, lesson=None):
    """{split: Examples} for training and validation. Targets are the labels, with weights that
    balance them; with a teacher's `lesson`, (texts, probabilities [texts, classes]), it replaces
    the training texts, and all classes of the data count as they are."""
    counts = np.bincount(data.split("train")[1])
    weights = torch.tensor(counts.sum() / (2 * counts), dtype=torch.float32, device=args.device)
    examples = {}
    for split in ("train", "validation"):
        texts, labels = data.split(split)
        size = len(texts)
        targets = torch.from_numpy((data.classes if lesson else data.labels)[data.splits[split]])
        if split == "train" and lesson:
            texts, probabilities = lesson
            targets = torch.tensor(probabilities, dtype=torch.float32)
        tokens = tokenize(tokenizer, texts, args.max_length)
        if tokens.truncated:
            note(f"{tokens.truncated:.2%} of the {split} texts have more than --max-length "
                 f"{args.max_length} tokens; what follows is not read")
        examples[split] = Examples(tokens.to(args.device), labels, targets.to(args.device),
                                   None if lesson else weights, size)
    return examples


@torch.inference_mode()
def predict_logits(model, tokens):
    """Logits [texts, classes] in the order of the texts, computed in length buckets."""
    batches = bucket_batches(tokens.lengths, INFERENCE_BATCH, shuffle=False)
    logits = torch.cat([model(**tokens.batch(rows)).logits.float() for rows in batches])
    return logits[torch.cat(batches).argsort()]


def toxic_probability(logits, toxic):
    """Probability [texts] of the classes that are `toxic` [classes], together."""
    return logits.softmax(1).cpu().numpy()[:, toxic].sum(axis=1)


def warm_up_then_decay(step, steps):
    """Share of the largest learning rate: a rise over a tenth of the steps, then a fall to 0."""
    warm_up = max(1, steps // 10)
    return max(0, min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up)))


def make_optimizer(model, args, rate, steps):
    """(AdamW, scheduler) for the `steps` steps up to the next switch or the end."""
    used = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(used, rate, weight_decay=args.weight_decay,
                                  fused=args.device.type != "mps")
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_up_then_decay(step, steps))


def new_state(model, source):
    """What training keeps up to date and a checkpoint holds; the state dictionaries "optimizer"
    and "scheduler" come with the first epoch."""
    return {
        "source": source,  # what the data and the first weights were
        "model": pack_model(model),  # as it goes on
        "best": {"pr_auc": -1.0, "epoch": 0, "model": pack_model(model)},
        "history": [],  # a dictionary of metrics for each epoch
        "switches": [],  # likewise for each switch
    }


def load_state(model, source, path):
    """The state of the checkpoint `path`, if there is one, or a new one."""
    if not path.exists():
        return new_state(model, source)
    state = load_checkpoint(path, path)
    if state["source"] != source:
        raise UserError(f"{path}: the run began with {state['source']}, here are {source}; bring "
                        "them back, or start a new run")
    return state


def train_model(state, examples, toxic, args, arm, rate, path):
    """Train the model of `state`, which is kept up to date, for what remains of --epochs. `toxic`
    [classes] says which of its classes are.

    All that is random in an epoch follows from --seed and its number. At a switch the best model
    so far goes through the function of the arm and begins a new cycle of the learning rate.
    """
    train, switch = examples["train"], ARMS[arm]
    cycle = args.switch_every if switch else args.epochs
    steps_per_epoch = math.ceil(train.epoch_size / args.batch_size)
    steps = cycle * steps_per_epoch
    model = resume_model(state["model"], arm, args.device)
    optimizer, scheduler = make_optimizer(model, args, rate, steps)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
    # A large model gains from bfloat16; for BERT-Tiny the casts cost more than they save.
    half = has_bfloat16(args.device) and model.config.hidden_size > 256

    while len(state["history"]) < args.epochs:
        epoch, start_time = len(state["history"]) + 1, time.perf_counter()
        torch.manual_seed(1000 * args.seed + epoch)
        model.train()
        losses = []
        batches = bucket_batches(train.tokens.lengths, args.batch_size, shuffle=True)
        batches = batches[:steps_per_epoch]
        for rows in progress(batches, f"{arm}, epoch {epoch} of {args.epochs}"):
            with torch.autocast(args.device.type, torch.bfloat16, enabled=half):
                logits = model(**train.tokens.batch(rows)).logits
            loss = train.loss(logits, rows)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
        loss = torch.stack(losses).mean().item()
        add_epoch(state, model.eval(), examples["validation"], toxic, loss)
        if switch and epoch % cycle == 0 and epoch < args.epochs:
            model = switch(unpack_model(state["best"]["model"]), train, args).to(args.device)
            optimizer, scheduler = make_optimizer(model, args, rate, steps)
            state["model"] = pack_model(model)
            state["switches"].append({"epoch": epoch, "parameters": count_active(model)})
        state["optimizer"], state["scheduler"] = optimizer.state_dict(), scheduler.state_dict()
        state["history"][-1]["learning_rate"] = scheduler.get_last_lr()[0]
        state["history"][-1]["seconds"] = time.perf_counter() - start_time
        with atomic_write(path) as part:
            torch.save(state, part)


def add_epoch(state, model, validation, toxic, train_loss):
    """Validate after an epoch; the model with the best PR AUC stays in the state."""
    from sklearn.metrics import average_precision_score

    logits = predict_logits(model, validation.tokens)
    epoch = len(state["history"]) + 1
    if not (math.isfinite(train_loss) and logits.isfinite().all()):
        raise UserError(f"the loss in epoch {epoch} is not finite; lower --learning-rate")
    scores = toxic_probability(logits, toxic)
    pr_auc = float(average_precision_score(validation.labels, scores))
    state["model"] = pack_model(model)
    state["history"].append({
        "train_loss": train_loss, "validation_loss": validation.loss(logits).item(),
        "validation_pr_auc": pr_auc, "parameters": count_active(model)})
    if pr_auc > state["best"]["pr_auc"]:
        state["best"] = {"pr_auc": pr_auc, "epoch": epoch, "model": state["model"]}
    log(f"epoch {epoch}: training loss {train_loss:.3f}, validation PR AUC {pr_auc:.3f}, "
        f"{state['history'][-1]['parameters']:,} parameters")


def count_active(model):
    """Parameters in use, without the idle copies that perforatedai keeps."""
    return sum(tensor.numel() for tensors in active_parameters(model).values()
               for tensor in tensors)


def fit_classifier(loaded, data, args, arm, path, lesson=None):
    """(Classifier, state): train `loaded`, what make_model or load_giant returned, on the training
    texts or on a teacher's `lesson`. `path` is the checkpoint of the training."""
    model, tokenizer, name, from_scratch = loaded
    examples = make_examples(tokenizer, data, args, lesson)
    toxic = toxic_classes(data) if lesson else [False, True]
    state = load_state(model, [data.info["sha256"], name], path)
    rate = args.learning_rate or (RATE_FROM_SCRATCH if from_scratch else RATE_PRETRAINED)
    train_model(state, examples, toxic, args, arm, rate, path)
    best = state["best"]["model"]
    model = unpack_model(best).to(args.device).eval()
    arguments = plain_arguments(args)
    if args.data:
        arguments["data"] = str(Path(args.data).resolve())  # it may be read from another folder
    else:
        arguments["dataset"] = data.info["source"]
    if best["dendrites"]:
        name += " + dendrites"
    texts, labels = data.split("validation")
    hashes = hash_texts(data.split("train")[0] + texts)
    classifier = Classifier(model, tokenizer, name, arguments, toxic, hashes, count_active(model))
    classifier.threshold = choose_threshold(labels, classifier.scores(texts))
    return classifier, state


# --- The finished classifier ----------------------------------------------------------------------


@dataclass
class Classifier:
    """What best_model.pt holds, ready to score texts."""

    model: nn.Module  # plain torch, in evaluation mode
    tokenizer: object
    name: str
    arguments: dict  # of the run that trained it
    toxic: list  # [classes] bool, which of the model's classes are toxic
    hashes: torch.Tensor  # [texts] int64 of the texts that it was trained and chosen with
    parameters: int
    threshold: float = 0.5  # score from which on a text is called toxic
    kind: str = "float32"  # or int8, ONNX
    megabytes: float = math.nan  # of its file

    def tokens(self, texts):
        return tokenize(self.tokenizer, texts, self.arguments["max_length"]).to(self.model.device)

    def logits(self, texts):
        """Logits [texts, classes] of texts."""
        return predict_logits(self.model, self.tokens(texts))

    def scores(self, texts):
        """Probability [texts] that each of the texts is toxic."""
        return self.score_tokens(self.tokens(texts))

    def score_tokens(self, tokens):
        """The same for texts that tokens() has read."""
        return toxic_probability(predict_logits(self.model, tokens), self.toxic)

    @property
    def label(self):
        """What the model is called in tables."""
        return self.name if self.kind == "float32" else f"{self.name}, {self.kind}"

    def save(self, path):
        """Write the checkpoint; returns the classifier with the size of its file."""
        weights = {name: weight.cpu() for name, weight in self.model.state_dict().items()}
        state = {name: getattr(self, name) for name in CLASSIFIER_FIELDS}
        state["tokenizer"] = self.tokenizer.to_str()
        state["model"] = pack_model(self.model) | {"weights": weights}
        with atomic_write(path) as part:
            torch.save(state, part)
        return replace(self, megabytes=path.stat().st_size / 1e6)


def load_classifier(path, device):
    """The Classifier in a checkpoint, with dendrites and int8 layers as they were."""
    from tokenizers import Tokenizer

    state = load_checkpoint(path, path)
    try:
        packed = state["model"]
        if state["kind"] == "int8":
            device = torch.device("cpu")
            model = make_int8(grow_dendrites(build_bert(packed["config"]), packed["dendrites"]))
            model.load_state_dict(packed["weights"])
        else:
            model = unpack_model(packed)
        fields = {name: state[name] for name in CLASSIFIER_FIELDS}
        return Classifier(model.to(device).eval(), Tokenizer.from_str(state["tokenizer"]), **fields,
                          megabytes=Path(path).stat().st_size / 1e6)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
        raise UserError(f"{path}: no best_model.pt of this version of the script") from None


class Int8Linear(nn.Module):
    """A Linear layer in int8: a scale for each output, and for each row of the input, so that the
    answer to a text does not depend on the other texts of its batch."""

    def __init__(self, linear):
        super().__init__()
        weight, scale = round_to_int8(linear.weight)
        self.register_buffer("weight", weight)  # [out, in] int8
        self.register_buffer("scale", scale)  # [out, 1]
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x):
        rows, scale = round_to_int8(x.flatten(0, -2))
        product = torch._int_mm(rows, self.weight.T).float().mul_(self.scale.T)
        return torch.addcmul(self.bias, product, scale).view(*x.shape[:-1], -1)


class Int8Embedding(nn.Module):
    """An Embedding with int8 weights and a scale for each row."""

    def __init__(self, embedding):
        super().__init__()
        weight, scale = round_to_int8(embedding.weight)
        self.register_buffer("weight", weight)  # [rows, width] int8
        self.register_buffer("scale", scale)  # [rows, 1]

    def forward(self, ids):
        return self.weight[ids] * self.scale[ids]


def round_to_int8(x):
    """(int8 [rows, columns], scale [rows, 1]) of x ≈ int8 * scale; the largest of a row is ±127."""
    scale = (x.detach().abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)
    return (x.detach() / scale).round_().to(torch.int8), scale


def make_int8(model):
    """Replace all Linear and Embedding layers of a model, in place, by int8 ones; returns it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, Int8Linear(module))
        elif isinstance(module, nn.Embedding):
            model.set_submodule(name, Int8Embedding(module))
    return model


def to_int8(classifier, path):
    """The classifier in int8, saved as `path`."""
    model = make_int8(copy.deepcopy(classifier.model).cpu())
    return replace(classifier, model=model, kind="int8").save(path)


# --- Evaluation and baselines -------------------------------------------------------------------


def choose_threshold(labels, scores):
    """Score from which on a text is called toxic: the one with the highest expected F1 under a
    smooth calibration curve (beta calibration, Kull et al. 2017), since the one with the highest F1
    on these texts would fit their noise."""
    from sklearn.linear_model import LogisticRegression

    clipped = scores.clip(1e-6, 1 - 1e-6)
    features = np.stack([np.log(clipped), -np.log1p(-clipped)], axis=1)
    calibrated = LogisticRegression(C=1000).fit(features, labels).predict_proba(features)[:, 1]
    order = np.argsort(-scores)
    called = np.arange(1, len(scores) + 1)
    expected_f1 = 2 * calibrated[order].cumsum() / (called + calibrated.sum())
    return float(scores[order][expected_f1.argmax()])


def calibration_error(labels, scores, bins=10):
    """Expected calibration error: the gap between score and share of toxic texts, by bins of the
    score, weighed by their texts."""
    places = (scores * bins).astype(int).clip(max=bins - 1)
    return np.abs(np.bincount(places, scores - labels)).sum() / len(labels)


def bootstrap_f1(labels, called, samples=1000):
    """(low, high): 95 % percentile interval of F1 over resampled texts. F1 needs only how many true
    positives and how many errors a sample has, which are multinomial."""
    cells = np.array([(labels & called).mean(), (labels ^ called).mean()])
    rng = np.random.default_rng(0)
    found, wrong, _ = rng.multinomial(len(labels), [*cells, 1 - cells.sum()], samples).T
    return np.percentile(2 * found / np.maximum(2 * found + wrong, 1), (2.5, 97.5)).tolist()


def classification_metrics(labels, scores, threshold):
    """Metrics of `scores` [texts] in 0 to 1 against `labels` [texts]."""
    from sklearn import metrics

    called = scores >= threshold
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        labels, called, average="binary", zero_division=0)
    return {
        "threshold": threshold, "f1": f1, "precision": precision, "recall": recall,
        "f1_interval": bootstrap_f1(labels == 1, called),
        "f1_at_half": metrics.f1_score(labels, scores >= 0.5, zero_division=0),
        "accuracy": (called == labels).mean(),
        "roc_auc": metrics.roc_auc_score(labels, scores),
        "pr_auc": metrics.average_precision_score(labels, scores),
        "calibration_error": calibration_error(labels, scores),
        "confusion_matrix": metrics.confusion_matrix(labels, called),
    }


def score_splits(scorer, data):
    """{split: scores} of a function texts -> scores [texts] on validation and test texts."""
    return {split: scorer(data.split(split)[0]) for split in SPLITS[1:] if split in data.splits}


def evaluate(scores, data, thresholds):
    """{name: metrics} on the test part of `scores` {name: {split: scores}}. A threshold that is not
    among `thresholds` {name: threshold} is chosen on the validation part."""
    metrics = {}
    for name, by_split in scores.items():
        threshold = thresholds.get(name)
        if np.ptp(by_split["test"]) == 0:
            threshold = 0.5  # one score for all texts
        elif threshold is None:
            threshold = choose_threshold(data.split("validation")[1], by_split["validation"])
        metrics[name] = classification_metrics(data.split("test")[1], by_split["test"], threshold)
    return metrics


def make_tfidf():
    """Logistic regression on TF-IDF of words, word pairs and 2 to 5 letters within words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=200_000)
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True,
                              max_features=300_000)
    return make_pipeline(make_union(words, letters),
                         LogisticRegression(class_weight="balanced", max_iter=300))


def toxic_classes(data):
    """Whether each class, in the order of their numbers, means toxic."""
    return [bool(data.labels[data.classes == c].any()) for c in np.unique(data.classes)]


def fit_tfidf_classes(data):
    """A function texts -> probabilities [texts, classes] of TF-IDF on all classes of the data."""
    rows = data.splits["train"][:TFIDF_TEXTS]
    model = make_tfidf().fit([data.texts[row] for row in rows], data.classes[rows])
    counts = np.bincount(data.classes[rows], minlength=len(toxic_classes(data)))

    def predict_classes(texts):
        probabilities = np.zeros((len(texts), len(counts)))
        probabilities[:, model.classes_] = model.predict_proba(texts)
        probabilities *= counts  # undoes the balance of the classes
        return probabilities / probabilities.sum(axis=1, keepdims=True)

    return predict_classes


def fit_tfidf(data, args):
    """Scores of TF-IDF: the probability of all classes that mean toxic."""
    predict_classes = fit_tfidf_classes(data)
    toxic = toxic_classes(data)
    return lambda texts: predict_classes(texts)[:, toxic].sum(axis=1)


def fit_frozen_encoder(data, args):
    """Scores of logistic regression on the mean hidden state of --giant, which is not trained."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer

    encoder, tokenizer, _, _ = load_giant(args, data)
    encoder = encoder.bert.to(args.device).eval()

    @torch.inference_mode()
    def features(texts):
        tokens = tokenize(tokenizer, texts, args.max_length).to(args.device)
        hidden = torch.empty(len(texts), encoder.config.hidden_size)
        for rows in bucket_batches(tokens.lengths, INFERENCE_BATCH, shuffle=False):
            batch = tokens.batch(rows)
            mask = batch["attention_mask"].unsqueeze(2)
            states = encoder(**batch).last_hidden_state
            hidden[rows.cpu()] = ((states * mask).sum(1) / mask.sum(1)).cpu()
        return hidden.numpy()

    model = make_pipeline(Normalizer(), LogisticRegression(C=10, class_weight="balanced",
                                                           max_iter=300))
    model.fit(features(data.split("train")[0]), data.classes[data.splits["train"]])
    toxic = np.array(toxic_classes(data))[model.classes_]
    return lambda texts: model.predict_proba(features(texts))[:, toxic].sum(axis=1)


def fit_majority(data, args):
    """The score 0 for every text, since most texts are not toxic."""
    return lambda texts: np.zeros(len(texts))


BASELINES = {"TF-IDF": fit_tfidf, "frozen encoder": fit_frozen_encoder,
             "majority class": fit_majority}
CHEAP_BASELINES = [name for name in BASELINES if name != "frozen encoder"]  # without a giant


def baseline_scores(data, args, names=tuple(CHEAP_BASELINES)):
    """{name: {split: scores}} of the baselines; one that fails is noted and left out."""
    scores = {}
    for name in names:
        try:
            scores[name] = score_splits(BASELINES[name](data, args), data)
        except Exception as error:  # whatever it is, the model is trained and must be saved
            note(f"baseline {name} left out: {error}")
    return scores


def benchmark(classifier, texts):
    """Latency of one text [ms] and throughput [texts/s] on the CPU, from text to score."""
    if classifier.kind != "ONNX":
        classifier = replace(classifier, model=copy.deepcopy(classifier.model).cpu())
    repeats = 1 if classifier.megabytes > 100 else 5

    def measure(texts):
        start_time = time.perf_counter()
        classifier.scores(texts)
        return time.perf_counter() - start_time

    measure(texts[:8])  # warm-up
    seconds = min(measure(texts) for _ in range(repeats))
    latency = [1000 * measure([text]) for text in texts[: 40 * repeats]]
    return {"latency ms": np.median(latency), "p99 ms": np.percentile(latency, 99),
            "texts/s": len(texts) / seconds}


def deployment_rows(classifiers, data, metrics):
    """Rows [{column: value}] with size, F1 and speed of each classifier on up to 1,000 texts."""
    texts = data.split("test")[0][:1000]
    return [{"model": classifier.label, "parameters": classifier.parameters,
             "MB": classifier.megabytes, "F1": metrics.get(classifier.label, {}).get("f1")}
            | benchmark(classifier, texts) for classifier in classifiers]


# --- Pictures -----------------------------------------------------------------------------------


def plot_learning(state, name, path):
    """Loss and PR AUC over the epochs; dotted lines are switches."""
    history = pd.DataFrame(state["history"])
    fig, axes = new_figure(f"Training of {name}", 1, 2, (11, 4.2))
    ends = np.arange(1, len(history) + 1)
    plot_curve(axes[0], ends - 0.5, history["train_loss"], "training", 0, "o")
    plot_curve(axes[0], ends, history["validation_loss"], "validation", 1, "s")
    plot_curve(axes[1], ends, history["validation_pr_auc"], "validation", 1, "s")
    axes[0].set_ylabel("loss")
    axes[1].set_ylabel("PR AUC of the toxic class")
    for ax in axes:
        for switch in state["switches"]:
            ax.axvline(switch["epoch"], linestyle=":", color="0.3")
        epoch_axis(ax, "epoch (dotted: a switch, after which the learning rate starts again)")
        ax.legend()
    save_figure(fig, path)


def plot_curves(scores, metrics, labels, path):
    """Precision over recall, and ROC, of the rows of the table that rank texts."""
    from sklearn.metrics import precision_recall_curve, roc_curve

    fig, axes = new_figure("Toxic texts of the test part", 1, 2, (11, 5.2))
    for i, (name, by_split) in enumerate(scores.items()):
        if np.ptp(by_split["test"]) == 0 or (i > 0 and name.endswith(", int8")):
            continue  # one score for all texts, or nearly the curve of the model itself
        precision, recall, _ = precision_recall_curve(labels, by_split["test"])
        false_alarms, found, _ = roc_curve(labels, by_split["test"])
        label = "{}: {:.3f}, {:.3f}".format(name, metrics[name]["pr_auc"], metrics[name]["roc_auc"])
        style = {"linestyle": LINES[i % 4], "color": COLORS[i % 8], "label": label}
        axes[0].plot(recall, precision, **style)
        axes[1].plot(false_alarms, found, **style)
    axes[0].axhline(labels.mean(), linestyle=":", color="0.5")
    axes[1].plot([0, 1], [0, 1], ":", color="0.5", label="chance (areas: left, right)")
    axes[0].set(title="precision and recall", xlabel="recall", ylabel="precision")
    axes[1].set(title="ROC", xlabel="share of harmless texts called toxic", ylabel="recall")
    legend_below(axes[1], 2)
    save_figure(fig, path)


def plot_matrices(metrics, path):
    """Confusion matrices of the model and of TF-IDF."""
    shown = [name for i, name in enumerate(metrics) if i == 0 or name == "TF-IDF"]
    fig, axes = new_figure("Test texts by true and predicted class", 1, len(shown),
                           (1 + 4 * len(shown), 4.4))
    for ax, name in zip(axes, shown):
        title = f"{name}\nthreshold {metrics[name]['threshold']:.3f}"
        plot_confusion(ax, metrics[name]["confusion_matrix"], CLASSES, title)
    save_figure(fig, path)


def plot_deployments(rows, path):
    """Size and speed of the models in `rows` of the table."""
    fig, axes = new_figure("Size and speed on the CPU", 3, 1, (9, 2 + 1.2 * len(rows)))
    columns = {"MB": "size on disk [MB]", "latency ms": "median latency of one text [ms]",
               "texts/s": "throughput, tokenization included [texts/s]"}
    for ax, (column, label) in zip(axes, columns.items()):
        values = {row["model"]: row[column] for row in rows}
        plot_ranking(ax, values, "{:,.0f}" if column == "texts/s" else "{:,.1f}")
        ax.set_xlabel(label)
    save_figure(fig, path)


# --- The experiment -----------------------------------------------------------------------------


def quality_table(metrics):
    """Rows [{column: value}] with the figures of each model on the test part."""
    columns = {"pr_auc": "PR AUC", "f1": "F1", "f1_interval": "95 % interval",
               "threshold": "threshold", "f1_at_half": "F1 at 0.5", "precision": "precision",
               "recall": "recall", "accuracy": "accuracy", "roc_auc": "ROC AUC",
               "calibration_error": "calibration error"}
    table = pd.DataFrame(metrics).T.rename_axis("model").reset_index()
    table["f1_interval"] = ["{:.3f} to {:.3f}".format(*pair) for pair in table["f1_interval"]]
    return table[["model", *columns]].rename(columns=columns).to_dict("records")


def rounded(rows):
    """The rows of a table with three digits behind the point, or none in large numbers."""

    def show(value):
        if not isinstance(value, float) or math.isnan(value):
            return f"{value:,}" if type(value) is int else value
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"

    return [{column: show(value) for column, value in row.items()} for row in rows]


def format_summary(results):
    """The tables of a run as Markdown, the answer last."""
    data = results["data"]
    text = [f"Test part of {sum(data['counts']['test']):,} texts ({data['source']}), "
            f"seed {results['seed']}:",
            markdown_table(rounded([*results["table"], ORIGINAL_ROW])),
            "PR AUC, F1, precision and recall are those of the toxic class. Thresholds are chosen "
            "on the validation texts of the training; intervals are of 1,000 bootstrap samples of "
            "the test texts."]
    if "deployments" in results:
        text += [f"Size and speed on the CPU, {torch.get_num_threads()} threads:",
                 markdown_table(rounded(results["deployments"]))]
    if "giant_killer" in results:
        text += ["A giant-killer?", markdown_table(results["giant_killer"])]
    return "\n\n".join([*text, results["answer"]]) + "\n"


def format_answer(metrics, share):
    """The sentence at the end of a run."""
    (name, model), *others = metrics.items()
    baselines = {name: row for name, row in others if name in BASELINES}
    text = f"{name}: PR AUC {model['pr_auc']:.3f} and F1 {model['f1']:.3f} on the test part"
    if baselines:
        best = max(baselines, key=lambda name: baselines[name]["pr_auc"])
        text += (f"; the best baseline, {best}: {baselines[best]['pr_auc']:.3f} and "
                 f"{baselines[best]['f1']:.3f}")
    if share is not None:
        text += (f". Its dendrites carry {share:.1f} % of the output; with them switched off its "
                 f"PR AUC is {metrics[SWITCHED_OFF]['pr_auc']:.3f}")
    return text + "."


def report(classifiers, scores, data, args, run_dir, giant=None, **results):
    """Score the classifiers and the giant, if any, put them beside `scores` {name: {split: scores}}
    of other models, draw and write everything; returns the results. The first classifier is what
    the run is about."""
    classifier = classifiers[0]
    classifiers = [*classifiers, giant] if giant else classifiers
    scores = {model.label: score_splits(model.scores, data) for model in classifiers} | scores
    thresholds = {model.label: model.threshold for model in classifiers}
    if "validation" not in data.splits:
        thresholds |= {name: classifier.threshold for name in scores}
    metrics = evaluate(scores, data, thresholds)
    rows = deployment_rows(classifiers, data, metrics)
    share = None
    if SWITCHED_OFF in scores:
        share = dendrite_share(classifier.model, classifier.tokens(data.split("test")[0][:500]))
    results |= {"seed": args.seed, "data": data.info, "parameters": classifier.parameters,
                "models": metrics, "table": quality_table(metrics), "deployments": rows,
                "dendrite_share": share, "answer": format_answer(metrics, share)}
    if giant:
        results["giant_killer"] = giant_killer(rows[0], rows[-1])
    plot_curves(scores, metrics, data.split("test")[1], run_dir / "pr_roc.png")
    plot_matrices(metrics, run_dir / "confusion_matrices.png")
    plot_deployments(rows, run_dir / "deployments.png")
    return write_results(results, format_summary(results), args, run_dir)


def switched_off_scores(classifier, data):
    """{name: {split: scores}} of the classifier without its dendrites; empty if it has none."""
    if classifier.kind != "float32" or not has_dendrites(classifier.model):
        return {}
    plain = replace(classifier, model=remove_dendrites(classifier.model))
    return {SWITCHED_OFF: score_splits(plain.scores, data)}


def run_experiment(args, run_dir=None):
    """Train one arm with one seed, evaluate it beside the baselines and draw everything, in
    `run_dir` or a new folder; returns the results."""
    seed_everything(args.seed)
    data = load_data(args)
    texts, _ = data.split("train")
    loaded = make_model(args, texts, len(toxic_classes(data)) if args.distill else 2)
    giant = load_giant(args, data) if args.distill == "giant" else None
    if args.arm == "library":
        require("perforatedai")
    run_dir = run_dir or next_run_dir(args)  # now arguments and data are known to be good
    lesson = teach(giant, data, args, run_dir) if args.distill else None
    checkpoint = run_dir / "checkpoint.pt"
    classifier, state = fit_classifier(loaded, data, args, args.arm, checkpoint, lesson)
    classifier = classifier.save(run_dir / "best_model.pt")
    int8 = to_int8(classifier, run_dir / "model_int8.pt")
    scores = switched_off_scores(classifier, data)
    scores |= baseline_scores(data, args, BASELINES if giant else CHEAP_BASELINES)
    if giant:
        giant = fit_giant(giant, data, args, run_dir / "giant_checkpoint.pt")
        giant = giant.save(run_dir / "giant.pt")
    if state["switches"] and state["best"]["epoch"] <= state["switches"][0]["epoch"]:
        note("the best epoch was before the first switch, so the model is as it was before it")
    plot_learning(state, classifier.label, run_dir / "learning_curves.png")
    seconds = sum(epoch["seconds"] for epoch in state["history"])
    results = report(
        [classifier, int8], scores, data, args, run_dir, giant, arm=args.arm,
        history=state["history"], switches=state["switches"], best_epoch=state["best"]["epoch"],
        dendrites=state["best"]["model"]["dendrites"], training_seconds=round(seconds, 1))
    for path in run_dir.glob("*checkpoint*.pt"):  # only an unfinished run needs them
        path.unlink()
    return results


def find_mode(args):
    """The job among MODES that the arguments name, or None for training."""
    return next((mode for mode in MODES if getattr(args, mode) not in (None, False)), None)


def run(args):
    """What the arguments ask for; returns the results."""
    mode = find_mode(args)
    if mode:
        return MODES[mode](args)
    if args.compare_dendrites or args.runs > 1:
        return run_arms(args)
    return run_experiment(args)


def require(*packages):
    """Raise UserError where a package is missing that only some jobs need."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing: pip install {' '.join(missing)}")


# --- Extras: learning from a teacher (--distill) --------------------------------------------------


def augment(texts, folds, copies, seed):
    """Lists of altered texts: every other list drops a fifth of the words, the rest join the head
    of a text and the tail of another of its fold, so that the fold's teacher has seen neither."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(folds == fold) for fold in range(FOLDS)]
    words = [text.split() for text in texts]
    lists = []
    for number in range(copies):
        altered = []
        for first, fold in zip(words, folds):
            if number % 2 == 0:
                remaining = [word for word in first if rng.random() > 0.2] or first[:1]
            else:
                second = words[rng.choice(members[fold])]
                head, tail = rng.uniform(0.3, 0.8, 2)
                remaining = first[: int(len(first) * head) + 1] + second[int(len(second) * tail):]
            altered.append(" ".join(remaining))
        lists.append(altered)
    return lists


def teach(giant, data, args, run_dir):
    """The lesson (texts, probabilities [texts, classes]) of a teacher: the training texts and their
    altered copies with the geometric mean of what TF-IDF and the giant, if any, say. Each text is
    answered by teachers that were trained without its fold."""
    rows = data.splits["train"]
    texts, _ = data.split("train")
    _, group = np.unique(hash_texts(texts), return_inverse=True)  # the same text in one fold
    folds = (np.random.default_rng(args.seed).permutation(group.max() + 1) % FOLDS)[group]
    lists = [texts, *augment(texts, folds, args.augment, args.seed)]
    logits = torch.zeros(len(lists), len(rows), len(toxic_classes(data)))
    for fold in range(FOLDS):
        inside = np.flatnonzero(folds == fold)
        others = replace(data, splits=data.splits | {"train": rows[folds != fold]})
        try:
            tfidf = fit_tfidf_classes(others)
        except ValueError as error:
            raise UserError(f"--distill: TF-IDF cannot learn from these texts: {error}") from None
        if giant:
            log(f"fine-tuning teacher {fold + 1} of {FOLDS}")
            teacher = fit_giant(giant, others, args, run_dir / f"checkpoint_{fold}.pt")
        for i, altered in enumerate(lists):
            asked = [altered[row] for row in inside]
            answers = torch.tensor(tfidf(asked).clip(1e-6)).log()
            if giant:
                answers = (answers + teacher.logits(asked).cpu().log_softmax(1)) / 2
            logits[i, inside] = answers.float()
    return list(itertools.chain(*lists)), logits.flatten(0, 1).softmax(1).numpy()


# --- Extras: arms and seeds (--compare-dendrites, --runs) -----------------------------------------


def run_arms(args):
    """Run every arm with every seed in a folder of its own, unless it is finished; returns what
    they have in common."""
    arms = list(ARMS) if args.compare_dendrites else [args.arm]
    load_data(args)  # an error in the data comes before there is a folder
    if "library" in arms:
        require("perforatedai")
    run_dir = next_run_dir(args)
    runs = []
    for seed in range(args.seed, args.seed + args.runs):
        for arm in arms:
            folder = run_dir / f"seed-{seed}-{arm}"
            finished = folder / "results.json"
            if not finished.exists():
                folder.mkdir(exist_ok=True)
                changed = {"seed": seed, "arm": arm}
                before = list(NOTES)
                run_experiment(argparse.Namespace(**vars(args) | changed), folder)
                NOTES[:] = before  # those of this run are in its own results
            runs.append(json.loads(finished.read_text()))
    return write_results(*combine_runs(runs, run_dir), args, run_dir)


def format_mean(values):
    """Mean ± half width of the 95 % interval (Student's t)."""
    mean, width = mean_and_interval(values)
    return f"{mean:.3f}" + (f" ± {width:.3f}" if len(values) > 1 else "")


def collect_rows(runs):
    """DataFrame with a row for each seed of each arm, of each arm with its dendrites switched off
    (the same model, where it has none), of each baseline and of the giant."""
    records = []
    dendritic = {run["arm"] for run in runs if SWITCHED_OFF in run["models"]}
    for run in runs:
        models = run["models"]
        model = next(iter(models))
        if run["arm"] in dendritic:
            models.setdefault(SWITCHED_OFF, models[model])
        names = {model: run["arm"], SWITCHED_OFF: f"{run['arm']}, {SWITCHED_OFF}"}
        for name, metrics in models.items():
            scores = {label: metrics[key] for key, label in METRICS.items()}
            if name != f"{model}, int8":
                records.append({"arm": names.get(name, name), "seed": run["seed"], **scores})
    return pd.DataFrame(records).drop_duplicates(["arm", "seed"])


def combine_runs(runs, run_dir):
    """(results, summary): arms and baselines over the seeds, and the PR AUC of the first arm minus
    that of each other row, paired by seed."""
    from scipy.stats import ttest_1samp

    records = collect_rows(runs)
    groups = dict(list(records.groupby("arm", sort=False)))
    first = runs[0]["arm"]
    by_seed = records.pivot(index="seed", columns="arm", values="PR AUC")
    fig, axes = new_figure("Test part, mean and 95 % interval over the seeds", 1, 2, (11, 4.5))
    for ax, metric in zip(axes, ["PR AUC", "F1"]):
        means, widths = zip(*(mean_and_interval(group[metric]) for group in groups.values()))
        plot_dots(ax, list(groups), {metric: means}, "{:.3f}", {metric: widths}, first)
        left, right = ax.get_xlim()
        ax.set(xlabel=f"{metric} of the toxic class", xlim=(max(left, 0), min(right, 1)))
    save_figure(fig, run_dir / "dendrites.png")
    table, sentences = [], []
    for name, group in groups.items():
        row = {"arm": name} | {label: format_mean(group[label]) for label in METRICS.values()}
        same = [run for run in runs if run["arm"] == name]
        difference = (by_seed[first] - by_seed[name]).dropna()
        if name != first and len(difference) > 1:
            row["difference"] = format_mean(difference)
            if difference.any():
                row["p"] = f"{ttest_1samp(difference, 0).pvalue:.2g}"
            if name not in BASELINES or name == "TF-IDF":
                sentences.append(f"{first} minus {name} {format_mean(difference)}")
        row["parameters"] = max((run["parameters"] for run in same), default=None)
        row["dendrites carry %"] = np.mean([run["dendrite_share"] or 0 for run in same] or [np.nan])
        table.append(row)
    source = runs[0]["data"]["source"]
    summary = f"""Test part of {source}, mean ± 95 % interval over seeds {by_seed.index.tolist()}:

{markdown_table(rounded(table))}

All arms have the same epochs. Difference: PR AUC of {first} minus this, paired by seed, with p of
a paired t-test.

PR AUC: {"; ".join(sentences) or format_mean(by_seed[first])}.
"""
    return {"data": runs[0]["data"], "seeds": by_seed.index.tolist(), "table": table,
            "pr_auc": by_seed.to_dict("list")}, summary


# --- Extras: what works on a checkpoint -----------------------------------------------------------


def find_checkpoint(args):
    """The path of --checkpoint, or of the newest best_model.pt."""
    if args.checkpoint:
        return Path(args.checkpoint)
    paths = Path(args.output_dir, EXPERIMENT).glob("run-*/**/best_model.pt")
    newest = max(paths, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise UserError(f"no best_model.pt in {args.output_dir}; train first: python toxicity.py")
    log(f"the model is {newest}")
    return newest


def open_checkpoint(args):
    """(Classifier, Data, the arguments with those of the data): the texts of the run that trained
    it, or all of --data or --dataset as a test part."""
    classifier = load_classifier(find_checkpoint(args), args.device)
    foreign = args.data or args.dataset
    if not foreign:
        arguments = {name: classifier.arguments[name] for name in DATA_ARGUMENTS}
        args = argparse.Namespace(**vars(args) | arguments)
    else:
        args = argparse.Namespace(**vars(args) | {"sample_size": 0})
    data = load_data(args)
    if foreign:
        data.splits = {"test": np.concatenate(list(data.splits.values()))}
    rows = data.splits["test"]
    seen = torch.isin(hash_texts([data.texts[row] for row in rows]), classifier.hashes).numpy()
    if seen.mean() > MAX_SEEN:
        raise UserError(f"{data.info['source']}: {seen.sum():,} of these {len(rows):,} texts were "
                        "used to train the model; take others, or the files as they were then")
    if seen.any():
        note(f"{seen.sum():,} texts were used to train the model and are left out")
        data.splits["test"] = rows[~seen]
    return classifier, data, args


def evaluate_checkpoint(args):
    """A checkpoint on its own test part, beside the baselines, or on all texts of --data."""
    classifier, data, args = open_checkpoint(args)
    run_dir = next_run_dir(args)
    scores = switched_off_scores(classifier, data)
    names = CHEAP_BASELINES if "train" in data.splits else ["majority class"]
    scores |= baseline_scores(data, args, names)
    return report([classifier], scores, data, args, run_dir)


def giant_killer(tiny, giant):
    """Rows [{column: value}]: what the original asks of a giant-killer, and what was measured."""
    ratio = 100 * tiny["F1"] / max(giant["F1"], 1e-12)
    speed = tiny["texts/s"] / giant["texts/s"]
    rows = [("F1 against the giant's", "at least 98 %", f"{ratio:.1f} %", ratio >= 98),
            ("speed against the giant's", "at least 15 times", f"{speed:.1f} times", speed >= 15),
            ("size on disk", "under 25 MB", f"{tiny['MB']:.1f} MB", tiny["MB"] < 25),
            ("99 % of the texts on a CPU", "under 100 ms", f"{tiny['p99 ms']:.2f} ms",
             tiny["p99 ms"] < 100)]
    return [{"criterion": criterion, "asked": asked, "measured": measured,
             "met": "yes" if met else "no"} for criterion, asked, measured, met in rows]


def compare_base(args):
    """Fine-tune --giant on the texts that a checkpoint was trained with, and compare."""
    if args.data or args.dataset:
        raise UserError("--compare-base takes the texts of the checkpoint, not --data or --dataset")
    classifier, data, args = open_checkpoint(args)
    giant = load_giant(args, data)
    run_dir = next_run_dir(args)
    checkpoint = run_dir / "giant_checkpoint.pt"
    giant = fit_giant(giant, data, args, checkpoint).save(run_dir / "giant.pt")
    scores = baseline_scores(data, args, BASELINES)
    results = report([classifier], scores, data, args, run_dir, giant)
    checkpoint.unlink()
    return results


def compare_versions(classifier, version, data, args, run_dir):
    """Write tables of a classifier and another version of it; returns the results."""
    texts = data.split("test")[0]
    difference = (classifier.logits(texts).cpu() - version.logits(texts).cpu()).abs().max().item()
    note(f"{version.label}: the largest difference of a logit is {difference:.2g}")
    return report([classifier, version], {}, data, args, run_dir,
                  largest_logit_difference=difference)


def require_float(classifier, args):
    """Raise UserError for a checkpoint that is int8."""
    if classifier.kind != "float32":
        raise UserError(f"{find_checkpoint(args)} is {classifier.kind}; take its best_model.pt")


def open_float(args):
    """What open_checkpoint returns, for a checkpoint that is not int8."""
    classifier, data, args = open_checkpoint(args)
    require_float(classifier, args)
    return classifier, data, args


def quantize(args):
    """Write model_int8.pt and compare it."""
    classifier, data, args = open_float(args)
    run_dir = next_run_dir(args)
    version = to_int8(classifier, run_dir / "model_int8.pt")
    return compare_versions(classifier, version, data, args, run_dir)


class OnnxModel:
    """An ONNX file that is called as a BertForSequenceClassification is."""

    device = torch.device("cpu")

    def __init__(self, path):
        import onnxruntime

        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def __call__(self, **batch):
        inputs = {name: tensor.numpy() for name, tensor in batch.items()}
        return SimpleNamespace(logits=torch.from_numpy(self.session.run(None, inputs)[0]))


def export_onnx(args):
    """Write model.onnx, with free batch size and length, and tokenizer.json; compare."""
    require("onnx", "onnxruntime")
    classifier, data, args = open_float(args)
    run_dir = next_run_dir(args)
    path = run_dir / "model.onnx"
    model = copy.deepcopy(classifier.model).cpu()
    model.config.return_dict = False
    names = ["input_ids", "attention_mask"]
    axes = {name: {0: "batch", 1: "length"} for name in names} | {"logits": {0: "batch"}}
    example = torch.ones(2, 8, dtype=torch.long)
    with atomic_write(path) as part, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter will go; the newer fails on dendrites
        torch.onnx.export(model, (example, example), part, dynamo=False, input_names=names,
                          output_names=["logits"], dynamic_axes=axes)
    classifier.tokenizer.save(str(run_dir / "tokenizer.json"))
    version = replace(classifier, model=OnnxModel(path), kind="ONNX",
                      megabytes=path.stat().st_size / 1e6)
    return compare_versions(classifier, version, data, args, run_dir)


def export_hf(args):
    """Write a folder that transformers loads; returns what was done."""
    import transformers

    classifier = load_classifier(find_checkpoint(args), torch.device("cpu"))
    require_float(classifier, args)
    model, change = classifier.model, 0.0
    if has_dendrites(model):
        texts, _ = generate_comments(300, seed=0)
        model = remove_dendrites(model, constant=0.5)  # a sigmoid at 0
        folded = replace(classifier, model=model)
        change = float(np.abs(folded.scores(texts) - classifier.scores(texts)).max())
        if change > 0.01:
            raise UserError("--export-hf: no BERT of transformers has dendrites, and without them "
                            f"a score changes by {change:.3f}; take --export-onnx, or train with "
                            "--arm plain")
        note(f"dendrites folded into the biases, which changes a score by at most {change:.1g}")
    names = [CLASSES[toxic] for toxic in classifier.toxic]
    if len(names) > 2:
        names = [f"class {i}, {name}" for i, name in enumerate(names)]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    Path(args.export_hf).mkdir(parents=True, exist_ok=True)
    transformers.logging.disable_progress_bar()
    model.save_pretrained(args.export_hf)
    tokenizer = transformers.BertTokenizerFast(
        tokenizer_object=classifier.tokenizer, model_max_length=classifier.arguments["max_length"])
    tokenizer.save_pretrained(args.export_hf)
    print(f"{classifier.label} for transformers is in {args.export_hf}")
    return {"folder": args.export_hf, "largest_change": change}


def benchmark_models(args):
    """Speed and size of a checkpoint beside those of a BERT-Base with random weights."""
    classifier, data, args = open_checkpoint(args)
    base = build_bert({"num_labels": len(classifier.toxic)}).to(args.device).eval()
    parameters = count_active(base)
    base = replace(classifier, model=base, name="BERT-Base, random weights", kind="float32",
                   parameters=parameters, megabytes=4e-6 * parameters)
    run_dir = next_run_dir(args)
    rows = deployment_rows([classifier, base], data, {})
    plot_deployments(rows, run_dir / "deployments.png")
    ratio = rows[0]["texts/s"] / rows[1]["texts/s"]
    summary = (f"{markdown_table(rounded(rows))}\n\n{classifier.label} reads "
               f"{rows[0]['texts/s']:,.0f} texts/s on {torch.get_num_threads()} threads of the "
               f"CPU, {ratio:.0f} times as many as BERT-Base.\n")
    return write_results({"deployments": rows, "times_base": ratio}, summary, args, run_dir)


def printable(text):
    """The text in one line, with control characters escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def predict(args):
    """Print score, decision and tier of each text of --predict or, as they come, of the lines on
    stdin; empty ones are skipped. Returns the rows of --predict, and the number of texts."""
    classifier = load_classifier(find_checkpoint(args), args.device)
    threshold, rows, count = classifier.threshold, [], 0
    cuts = [threshold / 2, threshold, (1 + threshold) / 2]
    lines = (line.rstrip("\r\n") for line in args.predict or sys.stdin)
    texts = (text for text in lines if text.strip())
    size = 1 if not args.predict and sys.stdin.isatty() else INFERENCE_BATCH
    if args.format == "table":
        print("score   decision   tier      text")
    try:
        while batch := list(itertools.islice(texts, size)):
            tokens = classifier.tokens([clean_text(text) for text in batch])
            if tokens.truncated:
                note(f"some texts have more than {classifier.arguments['max_length']} tokens; what "
                     "follows is not read")
            scores = classifier.score_tokens(tokens)
            for text, score in zip(batch, scores.tolist()):
                row = {"text": text, "score": round(score, 4), "toxic": score >= threshold,
                       "tier": TIERS[int(np.searchsorted(cuts, score, side="right"))]}
                count += 1
                if args.predict:  # a stream may be endless
                    rows.append(row)
                if args.format == "json":
                    print(json.dumps(row, ensure_ascii=False))
                else:
                    print(f"{score:.3f}   {CLASSES[row['toxic']]:9}  {row['tier']:8}  "
                          f"{printable(text)}")
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UnicodeDecodeError as error:
        raise UserError(f"--predict: stdin is not UTF-8: {error}") from None
    if not count:
        raise UserError("--predict: no text given, and none on stdin")
    return {"rows": rows, "count": count}


MODES = {"evaluate": evaluate_checkpoint, "compare_base": compare_base, "quantize": quantize,
         "export_onnx": export_onnx, "export_hf": export_hf, "benchmark_only": benchmark_models,
         "predict": predict}


# --- Plumbing: nothing below is about the experiment --------------------------------------------

NOTES = []


class UserError(Exception):
    """A problem that the user can solve: main() makes it one line on stderr and exit code 2."""


def log(text):
    """Print a line on stderr; under torchrun in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{EXPERIMENT}.py: {text}", file=sys.stderr)


def note(text):
    """Log a line and record it in the results, for whoever reads them."""
    if text not in NOTES:
        NOTES.append(text)
        log(text)


def progress(iterable, description, total=None):
    """A progress bar on a terminal and in a notebook, and nothing elsewhere."""
    hidden = not (sys.stderr.isatty() or in_notebook())
    return tqdm(iterable, description, total, leave=False, disable=hidden)


def memory_mib(field="VmRSS"):
    """Resident memory of this process [MiB], its peak with the field VmHWM; NaN except on Linux."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{field}:\s*(\d+) kB", status)[1]) / 1024
    return float("nan")


@contextlib.contextmanager
def atomic_write(path):
    """A temporary path to write to, renamed to `path` at the end: a file is whole or absent."""
    part = Path(f"{path}.{os.getpid()}.part")  # two processes may go on with the same run
    try:
        yield part
        part.replace(path)
    except RuntimeError as error:  # torch.save raises this on a full disk
        raise UserError(f"{path} cannot be written; is the disk full? ({error})") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def load_checkpoint(file, name):
    """What torch.save wrote to `file`, a path or a stream. Raises UserError with its `name`."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception:  # torch.load raises errors of many types for a damaged file
        raise UserError(f"{name}: damaged, or not a checkpoint of {EXPERIMENT}.py") from None


def plain_arguments(args):
    """{name: value} of the arguments, all of which JSON can hold."""
    return vars(args) | {"device": str(args.device)}


def changed_arguments(args):
    """{flag: value} of the arguments that differ from their defaults."""
    defaults = plain_arguments(parse_args([]))
    return {f"--{name.replace('_', '-')}": value for name, value in plain_arguments(args).items()
            if value is not None and value != defaults[name]}


def free_run_dir(parent):
    """The path run-001 in the folder `parent`, with the next free number."""
    numbers = [int(path.name[4:]) for path in parent.glob("run-*") if path.name[4:].isdigit()]
    return parent / f"run-{max(numbers, default=0) + 1:03d}"


def next_run_dir(args):
    """The folder of this run: that of --resume, or else a new one with arguments.json."""
    if args.resume:
        return Path(args.resume)
    run_dir = free_run_dir(Path(args.output_dir, EXPERIMENT))
    run_dir.mkdir(parents=True)
    with atomic_write(run_dir / "arguments.json") as path:
        path.write_text(to_json(plain_arguments(args)))
    return run_dir


def resume_arguments(args):
    """The arguments of the unfinished run in --resume, a folder, or of the newest one."""
    files = [Path(args.resume, "arguments.json")]
    if args.resume == "newest":
        files = sorted(Path(args.output_dir, EXPERIMENT).glob("run-*/arguments.json"))
    unfinished = [file for file in files
                  if file.exists() and not file.with_name("results.json").exists()]
    if not unfinished:
        raise UserError(f"--resume {args.resume}: no unfinished run; see --output-dir")
    free = {"--resume", "--output-dir", "--data-dir", "--device", "--jobs", "--backend"}
    changed = set(changed_arguments(args))
    if changed - free:
        raise UserError("--resume keeps a run's arguments; leave out "
                        f"{', '.join(sorted(changed - free))}")
    arguments = vars(parse_args([])) | json.loads(unfinished[-1].read_text())
    arguments |= {name: value for name, value in vars(args).items()
                  if f"--{name.replace('_', '-')}" in changed | {"--device"}}
    return argparse.Namespace(**arguments | {"resume": str(unfinished[-1].parent)})


def describe_run(args):
    """What made the results: arguments, script, versions, device and peak memory."""
    script = Path(globals().get("__file__", "pasted into a notebook")).resolve()
    digest = hashlib.sha256(script.read_bytes()).hexdigest() if script.exists() else None
    commit = None
    with contextlib.suppress(OSError):
        command = ["git", "-C", script.parent, "describe", "--always", "--dirty", "--abbrev=40",
                   "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    packages = ("torch", "numpy", "pandas", "pyarrow", "sklearn", "transformers", "datasets",
                "perforatedai")
    versions = {name: getattr(sys.modules[name], "__version__", None)
                for name in packages if name in sys.modules}
    device = args.device
    return {
        "experiment": EXPERIMENT,
        "arguments": plain_arguments(args),
        "changed_arguments": changed_arguments(args),
        "script_sha256": digest,
        "git_commit": commit,
        "git_clean": commit and not commit.endswith("-dirty"),
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "peak_memory_mib": memory_mib("VmHWM"),
        "notes": list(NOTES),
    }


def to_json(value):
    """JSON with arrays as lists, and null for NaN."""
    text = json.dumps(value, default=lambda array: array.tolist())
    return json.dumps(json.loads(text, parse_constant=lambda constant: None), indent=1)


def write_results(results, summary, args, run_dir):
    """Write and print summary.md, then write results.json, with which a run is finished; returns
    the results as they are read back."""
    results = describe_run(args) | results
    title = f"# {EXPERIMENT}.py"
    for flag, value in results["changed_arguments"].items():
        values = value if isinstance(value, list) else [value]
        title += " ".join(["", flag, *(str(item) for item in values if item is not True)])
    text = "\n\n".join([title, *(f"Note: {text}" for text in NOTES), summary])
    (run_dir / "summary.md").write_text(text, encoding="utf-8")
    with atomic_write(run_dir / "results.json") as path:
        path.write_text(to_json(results))
    if in_notebook():
        from IPython.display import Markdown, display

        display(Markdown(text))
    else:
        print(text)
    print(f"Everything is in {run_dir}")
    return json.loads((run_dir / "results.json").read_text())


def markdown_table(rows):
    """Rows [{column: value}] as a Markdown table; a value that is missing is a dash."""
    table = pd.DataFrame(rows, dtype=object).fillna("–").astype(str)
    lines = [table.columns, ["---"] * table.shape[1], *table.to_numpy()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv=None):
    """Run the script with the arguments `argv`: those of the command line, or none in a notebook.

    Returns the results. A problem that the user can solve is one line and SystemExit(2), an
    interruption one line and SystemExit(130); in a notebook only the line.
    """
    if argv is None:
        argv = [] if in_notebook() else sys.argv[1:]
    args = parse_args(argv)
    NOTES.clear()
    try:
        return run(resume_arguments(args) if args.resume else args)
    except KeyboardInterrupt:
        text = ("interrupted; to go on with a run that had begun: "
                f"python {EXPERIMENT}.py --resume --output-dir {args.output_dir}")
        code = 130
    except ModuleNotFoundError as error:
        name = error.name.split(".")[0]
        package = {"sklearn": "scikit-learn", "PIL": "pillow"}.get(name, name)
        text = f"error: {error}; pip install {package}"
        code = 2
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        text = f"error: {' '.join(str(error).split())}"
        code = 2
    print(f"{EXPERIMENT}.py: {text}", file=sys.stderr)  # in every process of torchrun
    if not in_notebook():
        raise SystemExit(code)


if __name__ == "__main__":
    main()
