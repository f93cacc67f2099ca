"""Can BERT-Tiny do the work of a fine-tuned BERT-Base on toxic comments, and what do dendrites add?

A dendrite is a second weight vector of a neuron; its output goes through a sigmoid and is added to
the neuron's. Halfway through training perforatedai adds one to each neuron of the Linear layers.

Measured with 5 seeds on one H100, the dendrites carry 0.05 % of the output and add nothing
measurable. Against a mere restart of the learning rate, PR AUC changes by -0.002 ± 0.006 on
synthetic comments and by -0.0002 ± 0.0007 on 24,783 tweets. On the tweets a student of TF-IDF and a
fine-tuned MiniLM (--distill giant) has F1 0.451 ± 0.018 and PR AUC 0.397 ± 0.032; TF-IDF itself has
0.429 ± 0.046 and 0.385 ± 0.057, MiniLM 0.468 and 0.428. The README has the commands.

    python toxicity.py                               # 5,000 + 1,000 + 1,000 texts: 3 minutes
    python toxicity.py --quick                       # small and offline: 1 minute
    python toxicity.py --data train.csv --text-column comment_text --label-column toxic
    python toxicity.py --compare-dendrites --runs 5  # all arms, paired by seed
    python toxicity.py --distill giant --giant FOLDER --arm plain --epochs 12 --batch-size 64
    python toxicity.py --resume                      # continue the newest unfinished run
    python toxicity.py --evaluate                    # scores the newest model, as do those below
    python toxicity.py --compare-base --giant FOLDER
    python toxicity.py --quantize                    # or --export-onnx, --export-hf FOLDER
    python toxicity.py --benchmark-only
    python toxicity.py --predict "you are a clown" "that joke killed me"  # or lines on stdin

Results are in outputs/toxicity/run-001/, with the next free number: results.json, summary.md,
best_model.pt, model_int8.pt (its matrices in int8) and two pictures; with --runs or
--compare-dendrites, each model has its own subfolder. Without --data it reads Civil Comments from
the Hugging Face hub, or synthetic comments where the hub is out of reach; without --model,
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
import bdb
import contextlib
import copy
import csv
import gc
import hashlib
import html
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from common import (detect_device, epoch_axis, has_bfloat16, in_notebook, legend_below,
                    mean_and_interval, new_figure, plot_curve, save_figure, seed_everything)

EXPERIMENT = "toxicity"
CLASSES = ["not toxic", "toxic"]
SPLITS = ["train", "validation", "test"]
DEFAULT_MODEL = "prajjwal1/bert-tiny"
TINY = {"vocab_size": 30522, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 512}
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
RATE_PRETRAINED = 5e-5
RATE_FROM_SCRATCH = 3e-4  # this and the dropout were chosen by PR AUC on validation texts
DROPOUT_FROM_SCRATCH = 0.3
ORIGINAL = {"model": "the original, a claim (other data)", "F1": 0.36, "recall": 0.71,
            "accuracy": 0.785}
INFERENCE_BATCH = 64
TIERS = ["allow", "monitor", "review", "remove"]
FOLDS = 3  # of the training texts for --distill
GIANT_EPOCHS = 3  # of fine-tuning
COPIES = 4  # altered copies of each text for --distill
TFIDF_TEXTS = 100_000  # a baseline is fitted on so many texts at most
NO_LABEL = ["", "nan", "null", "na", "n/a", "-1"]
MAX_CLASSES = 20  # more label values are a scale, or sets of labels, and no classes
DIALECTS = [{}, {"escapechar": "\\"}, {"quoting": csv.QUOTE_NONE}]  # of CSV files, the usual first
COMPARED = ["PR AUC", "F1", "ROC AUC"]  # what the table of several seeds or arms shows
LEGEND = """\
PR AUC, F1, precision and recall are those of the toxic class. Thresholds are chosen on the
validation texts of the training. With one seed, F1 low and F1 high are the 95 % interval of F1 on
these test texts, speed is measured on the CPU, and MB is the size of the file. With several, ± is
the 95 % interval of the mean (Student's t); differences are paired by seed, and significant
(uncorrected) where their interval excludes 0."""
# The arguments that say which texts are read, and how; jobs on a checkpoint take its own.
DATA_ARGUMENTS = ["dataset", "data", "text_column", "label_column", "positive_label",
                  "label_threshold", "sample_size", "data_dir", "seed", "max_length"]


def parse_args(argv):
    """The command line as a namespace; an error is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        "toxicity.py", argparse.SUPPRESS, __doc__.split("\n\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add_source = parser.add_mutually_exclusive_group().add_argument
    add_weights = parser.add_mutually_exclusive_group().add_argument
    add_job = parser.add_mutually_exclusive_group().add_argument
    add("--quick", action="store_true", help="3,000 synthetic comments, 8 epochs from random "
        "weights, no network: a minute")
    add_source("--dataset", choices=["civil_comments", "embedded"], help="data set; if unset, "
               "civil_comments, or embedded (synthetic) comments where the hub is out of reach")
    add_source("--data", type=os.path.abspath, help="CSV, TSV, JSON, JSON lines or Parquet file")
    add("--text-column", default="text", help="column of --data with the texts; without a header, "
        "both columns are numbers from 0 on")
    add("--label-column", default="toxicity", help="column of --data with labels")
    add("--positive-label", help="label value that means toxic, also in a list of labels; if "
        "unset, labels are numbers, and --label-threshold counts")
    add("--label-threshold", type=float, default=0.5, help="smallest number that "
        "means toxic; labels are from 0 to 1, or from 0 on if this is 1 or more")
    add("--sample-size", type=int, default=5000, help="training texts; validation and "
        "test have a fifth of it each; 0 takes all, split 80/10/10")
    add("--data-dir", default="data", help="folder of downloads")
    add("--max-length", type=int, default=128, help="tokens read of each text")
    add_weights("--model", help="hub id or folder of a pretrained BERT to train; if unset, "
                "prajjwal1/bert-tiny, or random weights where the hub is out of reach")
    add_weights("--from-scratch", action="store_true", help="start from random weights")
    add("--arm", choices=list(ARMS), default="library", help="what happens to the model every "
        "--switch-every epochs: library adds dendrites by perforatedai (once), wider adds hidden "
        "units, restart only restarts the learning rate, plain does nothing")
    add("--epochs", type=int, default=20, help="epochs of training")
    add("--switch-every", type=int, help="epochs from one switch to the next; the "
        "learning rate falls to 0 in between; if unset, half of --epochs")
    add("--batch-size", type=int, default=32, help="texts in a batch")
    add("--learning-rate", type=float, help="peak learning rate; if unset, 5e-5, from scratch 3e-4")
    add("--distill", choices=["tfidf", "giant"], help="teacher whose answers the model "
        "learns: TF-IDF, or the mean of it and of the fine-tuned --giant")
    add("--giant", default="bert-base-uncased", help="hub id or folder of a large pretrained BERT "
        "for --distill and --compare-base")
    add("--compare-dendrites", action="store_true", help="train all arms")
    add("--runs", type=int, default=1, help="number of seeds")
    add("--seed", type=int, default=42, help="random seed of data, split and model")
    add("--device", type=detect_device, default="auto", help="auto, cuda, mps or cpu")
    add("--output-dir", default="outputs", help="folder of all results")
    add("--resume", nargs="?", const="newest", help="folder of an unfinished run to go on "
        "with; without a value, the newest")
    add("--checkpoint", help="model file for the jobs below; if unset, the newest best_model.pt")
    add("--format", choices=["table", "json"], default="table", help="format of --predict")
    add_job("--evaluate", action="store_true", help="score --checkpoint on its test part or --data")
    add_job("--compare-base", action="store_true", help="fine-tune --giant on the same texts")
    add_job("--quantize", action="store_true", help="write model_int8.pt, whose matrices are in "
            "int8, and compare it; it computes in float32")
    add_job("--export-onnx", action="store_true", help="write model.onnx and compare it")
    add_job("--export-hf", help="folder to write the model to, for transformers")
    add_job("--benchmark-only", action="store_true", help="measure speed beside that of BERT-Base")
    add_job("--predict", nargs="*", metavar="TEXT", help="score texts, or the lines on stdin; the "
            "tier is monitor from half the threshold T on, review from T, remove from (1 + T) / 2")
    if "--quick" in argv:
        parser.set_defaults(sample_size=3000, epochs=8, dataset="embedded", from_scratch=True)
    args = parser.parse_args(argv)
    too_small = {"seed": -1, "sample_size": -1, "max_length": 3}
    for name, value in vars(args).items():
        if type(value) in (int, float) and value <= too_small.get(name, 0):
            parser.error(f"--{name.replace('_', '-')} {value} is too small")
    return args


# --- Data: the embedded generator ---------------------------------------------------------------

INSULTS = ["idiot", "moron", "clown", "loser", "fool", "liar", "coward", "imbecile", "parasite",
           "disgrace"]
GROUPS = ["voters", "drivers", "neighbours", "tourists", "reporters", "teachers", "fans", "readers",
          "students"]
SUBJECTS = """\
the new bus lane
this budget
the school plan
your last post
the referee
the mayor's speech
that recipe
the tax reform
the concert
this article
the housing vote
the weather report
the software update
our team
the museum
the hospital merger
the bike path
this movie
""".splitlines()
OPENERS = ["", "", "", "Honestly, ", "Well, ", "Look, ", "As for {s}: ", "About {s}, ",
           "I read the piece twice. ", "Sorry, but ", "After ten years here, ", "OK. "]
CLOSERS = ["", "", "", " Just my view.", " That is all.", " Think about it.",
           " And {s} changes nothing.", " Again.", " Thanks for the article.",
           " We talked about {s} before.", " Good night.", " Ask the {g}."]
PRAISES = """\
you are the best of the {g}
you explain {s} well
your idea about {s} is clever
nobody knows {s} as well as you
you have a sharp mind
people like you are needed here
""".splitlines()
RIGHT = """\
they wrote "{q}", and they are right
he said "{q}", and I can only repeat it
"{q}", as we all know
the {g} told you "{q}", which is true
somebody wrote "{q}", and I agree
""".splitlines()
WRONG = """\
they wrote "{q}", and they are wrong
he said "{q}", and I can only deny it
"{q}", as nobody believes
the {g} told you "{q}", which is false
somebody wrote "{q}", and I disagree
""".splitlines()
INSULTING = """\
you are a complete {i} and everybody can see it
only a {i} would defend {s}
what a pathetic {i} you are
nobody asked you, {i}
the {g} here are {i}s, all of them
stop writing, you {i}
I have never met a bigger {i} than the one who wrote this
""".splitlines()
THREATENING = """\
I know where you live, and you will regret {s}
somebody should teach you a lesson with a bat
say that again and I will find you
people like you should disappear, and we will help you with it
the {g} should be beaten for {s}
one day you will pay for this with blood
""".splitlines()
SARCASTIC = """\
wow, did you need both brain cells for {s}?
congratulations, you can almost read
do not strain yourself, thinking is new to you
your mother must be so proud of a mind like yours
bless your heart, somebody left the cage open again
please keep talking, we need the comic relief
how brave of you to write in public with so little upstairs
""".splitlines()
NEGATING = """\
you are not a {i}, you just misread {s}
I would never call you a {i}
nobody here is a {i}
she is no {i}, she studied {s} for years
the {g} are not {i}s, they are tired
I will not beat you up for {s}, I only disagree
""".splitlines()
LOOKING_BAD = """\
this joke killed me, thank you
kill the process and start {s} again
the {s} cake is to die for
I am such a {i}, I forgot my keys again
our goalkeeper beat the {g} with blood, sweat and tears
the clown at {s} made the children laugh
I shot forty pictures of {s}
that was a brutal but fair match
a bat flew into {s} last night
stupid me, I read {s} upside down
""".splitlines()
PRAISING = """\
wow, did you see how well {s} went?
congratulations, you can be proud of {s}
your mother must be so happy for you
how brave of you to write about {s} in public
please keep writing, we need voices like yours
bless you for explaining {s}
""".splitlines()
NEUTRAL = """\
{s} will cost more than they say
I was there on Monday and {s} looked fine
the {g} were asked about {s}
does anybody know when {s} opens?
I agree with the {g} on {s}
{s} is late again
the numbers about {s} do not add up
my sister works on {s}, it is hard
we need more money for {s}
there are good reasons for and against {s}
the {g} deserve a better answer
I changed my mind about {s}
last year {s} was half the price
who decides about {s} in the end?
""".splitlines()
HOSTILE = INSULTING + THREATENING + SARCASTIC
# Kinds of comments: share of all, whether toxic, texts with slots {i} insult, {s} subject,
# {g} group, {q} a quoted text, and what is quoted. Praise that is denied is toxic, an insult that
# is denied is not, so that neither the quoted words nor those around them decide.
KINDS = [
    (0.012, True, INSULTING, HOSTILE),
    (0.007, True, THREATENING, HOSTILE),
    (0.009, True, SARCASTIC, HOSTILE),
    (0.016, True, RIGHT, HOSTILE),
    (0.012, True, WRONG, PRAISES),
    (0.08, False, WRONG, HOSTILE),
    (0.06, False, RIGHT, PRAISES),
    (0.06, False, NEGATING, HOSTILE),
    (0.09, False, LOOKING_BAD, HOSTILE),
    (0.03, False, PRAISING, HOSTILE),
    (0.624, False, NEUTRAL, HOSTILE),
]
SLOTS = [OPENERS, CLOSERS, SUBJECTS, INSULTS, GROUPS]
MISSED = 0.05  # share of toxic comments that annotators miss
ALARMED = 0.003  # share of harmless comments that they take for toxic


def pick(options, draw):
    """The option that a number from 0 to 1 draws."""
    return options[int(draw * len(options))]


def generate_comments(count, seed):
    """(texts, labels [count] int64) of synthetic comments, 6 % toxic; the same words are in both
    classes."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(len(KINDS), count, p=[kind[0] for kind in KINDS])
    errors = rng.random(count)
    texts = []
    labels = []
    for kind, error, draws in zip(kinds, errors, rng.random((count, 7)).tolist()):
        _, toxic, bodies, quotes = KINDS[kind]
        body = pick(bodies, draws[0]).replace("{q}", pick(quotes, draws[6]))
        stop = "" if body[-1] in "?." else "."
        opener, closer, subject, insult, group = map(pick, SLOTS, draws[1:6])
        text = (opener + body + stop + closer).format(s=subject, i=insult, g=group)
        texts.append(text[0].upper() + text[1:])
        labels.append(toxic ^ (error < (MISSED if toxic else ALARMED)))
    return texts, np.array(labels, dtype=np.int64)


# --- Data: files, the hub, splits ---------------------------------------------------------------


@dataclass
class Data:
    """The texts of a run."""

    splits: dict  # {split: table with text, label (1 is toxic) and class (number of its value)}
    toxic: list  # whether each class means toxic
    info: dict  # for results.json

    def split(self, name, column="label"):
        """(texts, labels or classes [n]) of a split."""
        table = self.splits[name]
        return table["text"].tolist(), table[column].to_numpy(copy=True)


def clean_text(text):
    """The text with HTML entities as characters and lone surrogates replaced."""
    return html.unescape(text).encode("utf-8", "replace").decode()


def text_key(text):
    """The key of a text: texts that differ only in letter case and spaces have the same one."""
    return " ".join(text.lower().split())


def hash_texts(texts):
    """Hashes [texts] int64 of the texts' keys."""
    keys = pd.Series(texts).map(text_key)
    return torch.tensor(pd.util.hash_pandas_object(keys, index=False).to_numpy().view(np.int64))


def read_table(path, header="infer"):
    """DataFrame of a Parquet file, of a JSON or JSON lines file, whose nested objects are columns
    such as user.name, or of a CSV file with any usual delimiter, whose cells stay text; with
    header=None its columns are 0, 1, …"""
    name = str(path).lower()
    if name.endswith(".parquet"):
        return pd.read_parquet(path)
    content = pa.input_stream(str(path)).read()  # unpacks .gz
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        if b"\0" in content:  # no text: a spreadsheet, say, or a .zip file
            raise
        note(f"{path} is not UTF-8 and is read as Windows-1252")
        text = content.decode("cp1252", "replace")
    if re.search(r"\.(nd)?jsonl?(\.gz)?$", name):
        lines = re.search(r"}\s*\n\s*{", text) is not None
        table = pd.read_json(io.StringIO(text), lines=lines, dtype=False)
        is_nested = table.map(type).eq(dict).any(axis=None)
        return pd.json_normalize(table.to_dict("records")) if is_nested else table
    first = re.match(r"\s*([^\r\n]*)", text)[1]
    delimiter = "\t" if "\t" in first else max(",;|", key=first.count)
    dialect = find_dialect(text, delimiter)
    table = pd.read_csv(io.StringIO(text), sep=delimiter, header=header, dtype=str,
                        keep_default_na=False, **dialect)
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes the first cells for an index
        raise UserError("the rows have more cells than the first line has columns")
    return table[(table != "").any(axis=1)]


def find_dialect(text, delimiter):
    """The first of DIALECTS in which each quote that opens a cell is closed at the end of a cell: a
    quote within quotes is doubled, or escaped by a backslash, or quotes are ordinary characters. In
    the wrong one a quote at the start of a text would swallow the rows up to the next; where all of
    many lines have equally many delimiters, each line is a row."""
    csv.field_size_limit(len(text))
    lines = text.strip("\r\n").split("\n")
    is_even = len(lines) > 20 and len({line.count(delimiter) for line in lines}) == 1
    for dialect in DIALECTS:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True,
                          **dialect)
        with contextlib.suppress(csv.Error):
            if sum(1 for _ in rows) >= len(lines) or not is_even:
                break
    return dialect


def read_texts(path, args):
    """Table [text, label, class] of a file. Toxic is --positive-label, alone or in a list, whatever
    its letter case and the spaces around it, or else a number from --label-threshold on."""
    table = read_table(path)
    if args.text_column.isdigit() and not {args.text_column, args.label_column} <= {*table}:
        table = read_table(path, header=None).rename(columns=str)
    table = table.reset_index(drop=True)
    for name in (args.text_column, args.label_column):
        if name not in table:
            raise UserError(f"no column {name!r} among {list(table)!s:.500}; without a header, the "
                            "columns are 0, 1, …")
    texts = table[args.text_column]
    cells = table[args.label_column].astype(object).map(str)
    values = cells.str.strip().str.lower().str.removesuffix(".0")  # 1.0 is 1
    if args.positive_label is None:
        values = pd.to_numeric(values.replace({"true": "1", "false": "0"}), errors="coerce")
        known = values.between(0, 1 if args.label_threshold < 1 else np.inf)
        toxic = values.astype("float32") >= args.label_threshold  # float32 has 0.69999999 for 0.7
    else:
        positive = args.positive_label.strip().lower().removesuffix(".0")
        known = table[args.label_column].notna() & ~values.isin(set(NO_LABEL) - {positive})
        if set(values) == {"-1", "1"}:  # two classes
            known[:] = True
        # The numbers of an array, as in a Parquet file, have spaces between them and no commas.
        marks = r"\s*[][,;|'\"]+\s*|(?<=\d)\s+(?=\d)"
        toxic = values.map(lambda cell: positive in [cell, *re.split(marks, cell)])
    labels = toxic.astype(int)
    placed = np.where(known, np.take(CLASSES, labels), "no label")
    counts = cells.groupby(placed).value_counts().nlargest(MAX_CLASSES)
    note(f"most frequent labels with their numbers of texts: {counts.to_dict()}")
    filled = [isinstance(text, str) and text.strip() != "" for text in texts]
    good = known & np.array(filled, dtype=bool)
    if not good.all():
        row = good.argmin()
        raise UserError(
            f"row {row + 1} has no text or no valid label: {texts[row]!r:.80}, {cells[row]!r:.80}; "
            "without --positive-label, labels are numbers from 0 to 1, or from 0 on if "
            "--label-threshold is 1 or more")
    classes = labels if values.nunique() > MAX_CLASSES else pd.factorize(values)[0]
    return pd.DataFrame({"text": texts.map(clean_text), "label": labels, "class": classes})


def hub_in_reach():
    """Whether the Hugging Face hub answers within 3 s; if not, its libraries are told to stay
    offline, since each of their attempts takes 25 s."""
    try:
        address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        urllib.request.urlopen(address, timeout=3).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        return False
    return True


def fetch_civil_comments(args):
    """Path of a Parquet file with texts of the training part of Civil Comments, which are streamed
    from the hub unless the file is there; None where it is out of reach and not asked for."""
    path = Path(args.data_dir, f"civil_comments-{args.sample_size or 'all'}.parquet")
    if path.exists():
        return path
    if not hub_in_reach():
        problem = f"the Hugging Face hub is out of reach, and {path} is not there"
        if args.dataset:
            raise UserError(problem)
        note(f"{problem}; synthetic comments instead, all figures are about those")
        return None
    import datasets

    try:
        rows = datasets.load_dataset("google/civil_comments", split="train", streaming=True)
        table = pd.DataFrame(itertools.islice(rows, 2 * args.sample_size or None))
    except Exception as error:  # datasets passes on what its libraries raise
        raise UserError(f"the Hugging Face hub does not send it ({error})") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        table[table["text"].str.strip() != ""].to_parquet(part)
    return path


def read_source(args):
    """(table [text, label, class] of what the arguments name, the name of the source)."""
    if args.data:
        return read_texts(args.data, args), Path(args.data).name
    if args.dataset != "embedded" and (path := fetch_civil_comments(args)):
        return read_texts(path, args), "civil_comments"
    size = args.sample_size or 5000
    texts, labels = generate_comments(max(3000, 21 * size // 5), args.seed)
    return pd.DataFrame({"text": texts, "label": labels, "class": labels}), "embedded"


def split_texts(table, sample_size, seed):
    """{split: table} stratified by label, the same text never on two sides: `sample_size` different
    texts for training and a fifth of it for each other split; if there are not as many, or with 0,
    all rows, 80/10/10 % of the different texts."""
    from sklearn.model_selection import train_test_split

    keys = table["text"].map(text_key)
    rest = table.loc[keys.drop_duplicates().sort_values().index]
    both = (table.groupby(keys)["label"].nunique() == 2).sum()
    if both:
        note(f"{both:,} of {len(rest):,} different texts have both labels")
    train, held_out = sample_size, sample_size // 5
    sampled = 0 < train + 2 * held_out <= len(rest)
    if not sampled:
        train, held_out = len(rest), len(rest) // 10
    if held_out < 2:  # one of each label
        raise UserError("too few texts: 20 different ones are needed, and --sample-size 10 or more")
    splits = {}
    for split, size in {"test": held_out, "validation": held_out, "train": train}.items():
        part = rest
        if size + 1 < len(rest):
            rest, part = train_test_split(rest, test_size=size, random_state=seed,
                                          stratify=rest["label"])
        splits[split] = part if sampled else table[keys.isin(keys[part.index])]
    rng = np.random.default_rng(seed)
    return {split: splits[split].iloc[rng.permutation(len(splits[split]))] for split in SPLITS}


def load_data(args, only_test=False, seen=()):
    """Data of --data, --dataset, or what is available; with `only_test` all of it is the test part.
    Test texts whose hashes are `seen` are left out."""
    try:
        table, source = read_source(args)
        splits = {"test": table} if only_test else split_texts(table, args.sample_size, args.seed)
    except (UserError, ValueError, OSError) as error:
        raise UserError(f"{args.data or args.dataset or 'civil_comments'}: {error}") from None
    known = np.isin(hash_texts(splits["test"]["text"]), seen)
    splits["test"] = splits["test"][~known]
    if known.any():
        note(f"{known.sum():,} of {len(known):,} texts were used to train the model: left out")
    digest = hashlib.sha256(pd.util.hash_pandas_object(table).to_numpy()).hexdigest()
    info = {"source": source, "sha256": digest, "seed": args.seed}
    for split, part in splits.items():
        info[split] = {"texts": len(part), "toxic": int(part["label"].sum())}
        log(f"{split}: {info[split]}")
        if part["label"].nunique() < 2:
            raise UserError(f"{source}: the {split} texts are of one class only; see "
                            "--label-threshold and --positive-label")
    return Data(splits, table.groupby("class")["label"].any().tolist(), info)


# --- Tokens -------------------------------------------------------------------------------------


def text_lengths(tokens):
    """Number of tokens of each text."""
    return (tokens > 0).sum(1).cpu()  # 0 is [PAD]


def make_batch(tokens, rows):
    """Arguments of a BERT for the texts `rows`, each [batch, longest of these]."""
    ids = tokens[rows]
    ids = ids[:, : text_lengths(ids).max()].long()
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def train_wordpiece(texts):
    """A tokenizer like that of bert-base-uncased with a vocabulary of the `texts`."""
    from tokenizers import BertWordPieceTokenizer
    from tokenizers.normalizers import BertNormalizer

    # The trainer numbers letters as its threads meet them, and the numbers break ties; given in
    # order as special tokens, they and the vocabulary are the same in every run.
    counts = Counter(BertNormalizer().normalize_str("".join(texts)))
    letters = sorted(letter for letter, _ in counts.most_common(1000) if not letter.isspace())
    inside = [f"##{letter}" for letter in letters]
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(
        texts, TINY["vocab_size"], limit_alphabet=len(letters), initial_alphabet=letters,
        special_tokens=SPECIAL_TOKENS + letters + inside, show_progress=False)
    return BertWordPieceTokenizer(trained.get_vocab())._tokenizer


def tokenize(tokenizer, texts, max_length):
    """Token ids [texts, longest] int32 of texts, each cut to `max_length` with its [CLS] and
    [SEP], and filled up with 0."""
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "[PAD]" in a text is a word
    # The encodings of all texts at once would fill the memory.
    ids = [torch.tensor(encoding.ids, dtype=torch.int32)
           for start in range(0, len(texts), 1000)
           for encoding in tokenizer.encode_batch_fast(texts[start : start + 1000])]
    return nn.utils.rnn.pad_sequence(ids, batch_first=True)


def bucket_batches(tokens, batch_size, count):
    """Rows of each batch of an epoch of `count` texts drawn at random, shuffled; texts of
    similar lengths are together, since the texts are sorted within runs of 50 batches."""
    lengths = text_lengths(tokens)
    batches = []
    for run in torch.randperm(len(lengths))[:count].split(50 * batch_size):
        batches += run[lengths[run].argsort(stable=True)].split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches))]


@torch.inference_mode()
def run_in_buckets(function, tokens, device):
    """Outputs [texts, …] of a function of a BERT's arguments, in the order of the texts, computed
    in batches of texts of similar lengths."""
    tokens = tokens.to(device)
    batches = text_lengths(tokens).argsort().split(INFERENCE_BATCH)
    outputs = [function(**make_batch(tokens, rows)).float() for rows in batches]
    return torch.cat(outputs)[torch.cat(batches).argsort()]


def predict_logits(model, tokens):
    """Logits [texts, classes] in the order of the texts."""
    return run_in_buckets(lambda **batch: model(**batch).logits, tokens, model.device)


# --- Model --------------------------------------------------------------------------------------


def build_bert(config):
    """A BertForSequenceClassification with random weights and the given config entries."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**config))


def load_pretrained(name, num_labels):
    """(BertForSequenceClassification, its tokenizer, its name, its learning rate) of a folder or a
    hub id. A classifier for another number of classes is replaced by one with random weights."""
    offline = Path(name).is_dir() or not hub_in_reach()
    import transformers

    transformers.logging.set_verbosity_error()  # a new classifier is expected
    transformers.logging.disable_progress_bar()
    try:
        model, loading = transformers.BertForSequenceClassification.from_pretrained(
            name, num_labels=num_labels, dtype=torch.float32, local_files_only=offline,
            ignore_mismatched_sizes=True, output_loading_info=True)
        tokenizer = transformers.BertTokenizerFast.from_pretrained(name, local_files_only=offline)
        random = f"{loading['missing_keys']} {loading['mismatched_keys']}"
        vocabulary = len(SPECIAL_TOKENS) < len(tokenizer) <= model.config.vocab_size
        if "bert.e" in random or not vocabulary:  # of the embeddings or the encoder
            raise ValueError("weights or vocabulary are missing, or do not belong together")
    except Exception as error:  # transformers passes on what its libraries raise
        raise UserError(f"{name}: no BERT to be loaded, here or from the hub ({error})") from None
    return model, tokenizer.backend_tokenizer, Path(name).name, RATE_PRETRAINED


def make_model(args, texts, num_labels):
    """(model, tokenizer, its name, its learning rate) to be trained: a pretrained one, or one of
    BERT-Tiny's size with random weights and a vocabulary of the `texts`."""
    if args.model:
        return load_pretrained(args.model, num_labels)
    if not args.from_scratch:
        try:
            return load_pretrained(DEFAULT_MODEL, num_labels)
        except UserError as error:
            note(f"{error}; random weights instead, which have read nothing before")
    config = TINY | {"hidden_dropout_prob": DROPOUT_FROM_SCRATCH, "num_labels": num_labels}
    tokenizer = train_wordpiece(texts)
    return build_bert(config), tokenizer, "BERT-Tiny from scratch", RATE_FROM_SCRATCH


class DendriticLinear(nn.Module):
    """A Linear layer with a dendrite on each neuron, as perforatedai computes it, in plain torch.

    [..., in_features] -> [..., out_features]: W x + b + to_neuron · sigmoid(V x + c).
    """

    def __init__(self, neuron):
        super().__init__()
        self.neuron = neuron
        self.dendrite = nn.Linear(neuron.in_features, neuron.out_features)
        self.to_neuron = nn.Parameter(torch.zeros(1, neuron.out_features))

    def forward(self, x):
        return torch.addcmul(self.neuron(x), self.to_neuron, self.dendrite(x).sigmoid())


def live_weights(model):
    """{name in plain torch: parameter} of a plain model, or of one of perforatedai's, whose idle
    copies are left out."""
    weights = {}
    for name, weight in model.named_parameters():
        for library_name, plain in LIBRARY_NAMES.items():
            name = name.replace(library_name, plain)
        if "dendrite_module" not in name:
            weights[name] = weight
    return weights


def replace_layers(model, kind, make):
    """Replace each layer of the class `kind` by make(layer), in place; returns the model."""
    for name, layer in list(model.named_modules()):
        if type(layer) is kind:
            model.set_submodule(name, make(layer))
    return model


def pack_model(model):
    """{"config", "weights"}: what a checkpoint holds of a model, plain or perforatedai's."""
    weights = {name: weight.detach().cpu().clone() for name, weight in live_weights(model).items()}
    return {"config": model.config.to_dict(), "weights": weights}


def unpack_model(packed):
    """The model, in plain torch, that pack_model packed; a weight may be (int8, scale)."""
    model = build_bert(packed["config"])
    weights = {name: weight if torch.is_tensor(weight) else weight[0] * weight[1]
               for name, weight in packed["weights"].items()}
    if "classifier.to_neuron" in weights:
        replace_layers(model, nn.Linear, DendriticLinear)
    model.load_state_dict(weights)
    return model


def remove_dendrites(model, constant=0.0):
    """A copy of the model with a constant in place of the activation of each dendrite."""

    def fold(layer):
        layer.neuron.bias.data += constant * layer.to_neuron.data[0]
        return layer.neuron

    return replace_layers(copy.deepcopy(model), DendriticLinear, fold)


def has_dendrites(model):
    return isinstance(model.classifier, DendriticLinear)


@torch.inference_mode()
def dendrite_share(model, tokens):
    """Share [%] of the dendritic layers' output that the dendrites carry, on average: their
    standard deviation (over texts and tokens) divided by the sum of theirs and the neurons'; NaN
    without dendrites."""
    if not has_dendrites(model):
        return float("nan")
    batch = make_batch(tokens.to(model.device), slice(None))
    shares = []

    def measure(layer, inputs, output):
        if isinstance(layer, DendriticLinear):
            mask = batch["attention_mask"].bool() if output.dim() == 3 else slice(None)
            neuron = layer.neuron(*inputs)
            added = (output - neuron)[mask].std(0)
            shares.append((added / (neuron[mask].std(0) + added)).mean().item())

    with nn.modules.module.register_module_forward_hook(measure):
        model(**batch)
    return 100 * pd.Series(shares).mean()


# --- Dendrites: what an arm does at a switch ----------------------------------------------------

# At a switch, training calls the function of its arm with the best model so far, the training
# Examples and the arguments, and goes on with the model that it returns. What survives is what
# pack_model keeps: the weights and the config.

LIBRARY_NAMES = {  # from the names that perforatedai gives weights to those in plain torch
    "main_module": "neuron",
    "dendrite_module.layers.0": "dendrite",
    "dendrites_to_top.0": "to_neuron",
}


@contextlib.contextmanager
def sandbox_perforatedai():
    """Run perforatedai in a temporary folder, where it writes, with its debugger, its prompts and
    its exits turned into errors."""
    printed = io.StringIO()
    with (tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder),
          contextlib.redirect_stdout(printed), mock.patch("sys.stdin", io.StringIO()),
          mock.patch("matplotlib.use"), warnings.catch_warnings(action="ignore")):
        try:
            yield
        except (SystemExit, EOFError, bdb.BdbQuit):
            raise UserError(f"perforatedai stopped: {printed.getvalue()[-500:]}") from None


def add_by_library(model, device):
    """Make `model`, a BERT without dendrites, one of perforatedai's, and let the library add the
    dendrites. The neurons are the last axis of every layer's output."""
    from perforatedai import globals_perforatedai as GPA
    from perforatedai import utils_perforatedai as UPA

    settings = {
        "configuration_confirmed": True, "unwrapped_modules_confirmed": True, "test_saves": False,
        "device": device, "modules_to_perforate": [nn.Linear], "output_dimensions": [-1, -1, 0],
        "switch_mode": GPA.pc.DOING_FIXED_SWITCH, "fixed_switch_num": 1,
    }
    for name, value in settings.items():
        getattr(GPA.pc, f"set_{name}")(value)
    model = UPA.perforate_model(model, save_name="perforatedai", making_graphs=False)
    for module in (model.bert.pooler.dense, model.classifier):
        module.set_this_output_dimensions([-1, 0])  # [batch, feature]
    model.to(device)
    GPA.pai_tracker.set_optimizer_instance(torch.optim.SGD(model.parameters(), lr=0.0))
    model(torch.ones(2, 3, dtype=torch.long, device=device)).logits.sum().backward()
    model, _, _ = GPA.pai_tracker.add_validation_score(1.0, model)  # now it adds them
    return model


def library(model, train, args):
    """perforatedai adds one dendrite to each neuron, with an output weight of 0. It keeps the
    weights of the model, those of dendrites from an earlier switch included."""
    with sandbox_perforatedai():
        grown = add_by_library(build_bert(model.config.to_dict()), args.device)
    weights = {name.replace(".neuron.", "."): weight.data
               for name, weight in live_weights(grown).items()}
    for name, weight in model.named_parameters():
        weights[name.replace(".neuron.", ".")].copy_(weight.data)
    return grown


def restart(model, train, args):
    """Change nothing: training returns to the best weights and restarts the learning rate."""
    return model


def wider(model, train, args):
    """Add as many feed-forward units as come nearest to the parameters of one dendrite on each
    neuron. Their outgoing weights are 0, so that the model computes what it did before."""
    config = model.config.to_dict()
    parameters = sum(layer.weight.numel() + 2 * layer.out_features
                     for layer in model.modules() if isinstance(layer, nn.Linear))
    unit = config["num_hidden_layers"] * (2 * config["hidden_size"] + 1)
    config["intermediate_size"] += round(parameters / unit)
    grown = build_bert(config)
    for layer in grown.bert.encoder.layer:
        nn.init.zeros_(layer.output.dense.weight)
    for old, new in zip(model.state_dict().values(), grown.state_dict().values()):
        new[tuple(map(slice, old.shape))] = old
    return grown


# An arm without a function trains on. --compare-dendrites compares the first arm with the others.
ARMS = {"library": library, "plain": None, "restart": restart, "wider": wider}


# --- Training -----------------------------------------------------------------------------------


@dataclass
class Examples:
    """Tokenized texts with their targets."""

    tokens: torch.Tensor  # ids [texts, longest] int32
    targets: torch.Tensor  # classes [texts] int64, or a teacher's probabilities [texts, classes]
    weights: torch.Tensor | None  # [classes] in the loss
    epoch_texts: int  # texts in an epoch, drawn at random where there are more

    def loss(self, logits, rows=slice(None)):
        """Cross-entropy of the logits [batch, classes] of the texts `rows`."""
        return F.cross_entropy(logits, self.targets[rows], self.weights)


def make_examples(tokenizer, data, args, lesson=None):
    """{split: Examples} for training and validation. Targets are the labels, balanced by weights in
    the loss. A teacher's `lesson` (texts, probabilities [texts, classes]) takes the place of the
    training texts; then targets are all classes of the data, without weights."""
    train = lesson or data.split("train")
    validation = data.split("validation", "class" if lesson else "label")
    weights = None
    if not lesson:
        counts = np.bincount(train[1])
        weights = torch.tensor(counts.sum() / (2 * counts)).float().to(args.device)
    examples = {}
    for split, (texts, targets) in {"train": train, "validation": validation}.items():
        tokens = tokenize(tokenizer, texts, args.max_length).to(args.device)
        targets = torch.as_tensor(targets, device=args.device)
        examples[split] = Examples(tokens, targets, weights, len(data.splits["train"]))
    return examples


def toxic_probability(logits, toxic):
    """Probability [texts] of the classes that are `toxic` [classes], together."""
    return logits.softmax(1).cpu().numpy()[:, toxic].sum(axis=1)


def make_optimizer(model, rate):
    """AdamW for the epochs up to the next switch or the end."""
    return torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01, fused=True)


def new_state(model, source):
    """The state of a training, as a checkpoint holds it; the first epoch adds "optimizer"."""
    packed = pack_model(model)
    return {
        "source": source,  # what the data and the first weights were
        "model": packed,  # as it goes on
        "best": {"model": packed, "epoch": 0, "pr_auc": -1.0},  # by PR AUC on validation
        "history": [],  # a dictionary of metrics for each epoch
        "switches": [],  # the epochs after which the arm changed the model
    }


def train_model(state, examples, toxic, args, rate, path):
    """Train the model of `state` for the rest of --epochs and keep `state` up to date, also at
    `path`. `toxic` [classes] says which classes are toxic.

    An epoch's randomness follows from --seed and its number. At a switch the arm's function changes
    the best model so far, and the learning rate rises and falls again.
    """
    train = examples["train"]
    switch = ARMS[args.arm]
    cycle = args.epochs
    if switch:
        cycle = args.switch_every or max(1, args.epochs // 2)
    model = unpack_model(state["model"])
    if has_dendrites(model):
        model = library(model, train, args)
    model.to(args.device)
    # A giant gains from bfloat16; for BERT-Tiny the casts cost more than they save.
    half = has_bfloat16(args.device) and model.config.hidden_size > 256
    optimizer = make_optimizer(model, rate)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])

    for epoch in range(len(state["history"]) + 1, args.epochs + 1):
        start_time = time.perf_counter()
        torch.manual_seed(1000 * args.seed + epoch)
        batches = bucket_batches(train.tokens, args.batch_size, train.epoch_texts)
        steps = cycle * len(batches)
        warm_up = max(1, steps // 10)
        losses = []
        model.train()
        for rows in progress(batches, f"epoch {epoch} of {args.epochs}"):
            step = (epoch - 1) % cycle * len(batches) + len(losses)
            share = min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
            optimizer.param_groups[0]["lr"] = rate * share
            with torch.autocast(args.device.type, torch.bfloat16, enabled=half):
                logits = model(**make_batch(train.tokens, rows)).logits
            loss = train.loss(logits.float(), rows)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
        loss = torch.stack(losses).mean().item()
        validation_loss, pr_auc = validate(model.eval(), examples["validation"], toxic)
        log(f"epoch {epoch}: training loss {loss:.3f}, validation PR AUC {pr_auc:.3f}")
        state["model"] = pack_model(model)
        state["history"].append({
            "train_loss": loss, "validation_loss": validation_loss, "validation_pr_auc": pr_auc,
            "seconds": time.perf_counter() - start_time})
        if pr_auc > state["best"]["pr_auc"]:
            state["best"] = {"model": state["model"], "epoch": epoch, "pr_auc": pr_auc}
        if switch and epoch % cycle == 0 and epoch < args.epochs:
            model = switch(unpack_model(state["best"]["model"]), train, args).to(args.device)
            optimizer = make_optimizer(model, rate)
            state["model"] = pack_model(model)
            state["switches"].append(epoch)
        state["optimizer"] = optimizer.state_dict()
        with atomic_write(path) as part:
            torch.save(state, part)


def validate(model, validation, toxic):
    """(loss, PR AUC) of the validation Examples."""
    from sklearn.metrics import average_precision_score

    logits = predict_logits(model, validation.tokens)
    if not logits.isfinite().all():
        raise UserError("the loss is not finite; lower --learning-rate")
    labels = np.array(toxic)[validation.targets.cpu()]
    pr_auc = average_precision_score(labels, toxic_probability(logits, toxic))
    return validation.loss(logits).item(), float(pr_auc)


def fit_classifier(loaded, data, args, path, lesson=None):
    """(Classifier, state): train `loaded`, what make_model or load_pretrained returned, on the
    training texts or on a teacher's `lesson`. `path` is the checkpoint of the training."""
    model, tokenizer, name, rate = loaded
    examples = make_examples(tokenizer, data, args, lesson)
    toxic = data.toxic if lesson else [False, True]
    source = [data.info["sha256"], name]
    state = load_checkpoint(path, path) if path.exists() else new_state(model, source)
    if state["source"] != source:
        raise UserError(f"{path}: the run began with {state['source']}, here are {source}")
    train_model(state, examples, toxic, args, args.learning_rate or rate, path)
    model = unpack_model(state["best"]["model"]).to(args.device).eval()
    arguments = {argument: vars(args)[argument] for argument in DATA_ARGUMENTS}
    arguments["dataset"] = None if args.data else data.info["source"]
    texts, labels = data.split("validation")
    hashes = hash_texts(data.split("train")[0] + texts)
    classifier = Classifier(model, tokenizer, name, arguments, toxic, hashes)
    classifier.threshold = choose_threshold(labels, classifier.scores(texts))
    return classifier, state


def fit_giant(loaded, data, args, path):
    """The Classifier made from a giant by fine-tuning on all classes of the data."""
    args = change(args, arm="plain", epochs=GIANT_EPOCHS, batch_size=32, learning_rate=None)
    texts, classes = data.split("train", "class")
    lesson = texts, np.eye(len(data.toxic), dtype=np.float32)[classes]
    giant, _ = fit_classifier(loaded, data, args, path, lesson)
    return replace(giant, name=f"giant {giant.name}")


# --- The finished classifier ----------------------------------------------------------------------


@dataclass
class Classifier:
    """What best_model.pt holds, ready to score texts."""

    model: nn.Module  # plain torch, in evaluation mode
    tokenizer: object
    name: str
    arguments: dict  # DATA_ARGUMENTS of its training
    toxic: list  # [classes] bool, which of the model's classes are toxic
    hashes: torch.Tensor  # [texts] int64 of the texts that it was trained and chosen with
    threshold: float | None = None  # score from which on a text is called toxic
    path: Path | None = None  # its file

    def tokens(self, texts):
        return tokenize(self.tokenizer, texts, self.arguments["max_length"])

    def logits(self, texts):
        """Logits [texts, classes] of texts."""
        return predict_logits(self.model, self.tokens(texts)).cpu()

    def scores(self, texts):
        """Probability [texts] that each of the texts is toxic."""
        return toxic_probability(self.logits(texts), self.toxic)

    def save(self, path, packed=None):
        """Write the checkpoint, with the model as it is or as it was `packed`."""
        state = vars(self) | {"model": packed or pack_model(self.model), "path": None,
                              "tokenizer": self.tokenizer.to_str()}
        self.path = path
        with atomic_write(path) as part:
            torch.save(state, part)


def load_classifier(path, device):
    """The Classifier in a checkpoint."""
    from tokenizers import Tokenizer

    state = load_checkpoint(path, path)
    try:
        packed = Classifier(**state)
        model = unpack_model(packed.model).to(device).eval()
        return replace(packed, model=model, tokenizer=Tokenizer.from_str(packed.tokenizer),
                       path=path)
    except (LookupError, TypeError, RuntimeError):
        raise UserError(f"{path}: no best_model.pt of this version of the script") from None


def to_int8(classifier, run_dir):
    """The classifier with the weights that model_int8.pt holds: matrices in int8, with a scale for
    each row. It computes in float32, so a score does not depend on the other texts of a batch."""
    packed = pack_model(classifier.model)
    for name, weight in packed["weights"].items():
        if weight.dim() == 2:
            scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
            packed["weights"][name] = ((weight / scale).round().to(torch.int8), scale)
    model = unpack_model(packed).to(classifier.model.device).eval()
    int8 = replace(classifier, model=model, name=f"{classifier.name}, int8")
    int8.save(run_dir / "model_int8.pt", packed)
    return int8


# --- Evaluation and baselines -------------------------------------------------------------------


def choose_threshold(labels, scores):
    """Score from which on a text is called toxic: the one with the highest expected F1 under a
    smooth calibration curve (beta calibration, Kull et al. 2017), since the one with the highest F1
    on these texts would fit their noise."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    clipped = scores.astype(float).clip(1e-6, 1 - 1e-6)
    features = np.stack([np.log(clipped), -np.log1p(-clipped)], axis=1)
    # Scaled, since the scores may be close together.
    calibration = make_pipeline(StandardScaler(), LogisticRegression(C=1000)).fit(features, labels)
    calibrated = calibration.predict_proba(features)[:, 1]
    order = np.argsort(-scores)
    called = np.arange(1, len(scores) + 1)
    expected_f1 = 2 * calibrated[order].cumsum() / (called + calibrated.sum())
    return float(scores[order][expected_f1.argmax()])


def calibration_error(labels, scores):
    """Expected calibration error: the gap between score and share of toxic texts, in ten bins of
    the score, weighed by their texts."""
    places = (scores * 10).astype(int).clip(max=9)
    return np.abs(np.bincount(places, scores - labels)).sum() / len(labels)


def f1_interval(labels, called):
    """(low, high) 95 % interval of F1, which is 2 p / (1 + p) with the share p of true positives
    among the texts that are toxic or called so (Wilson's interval of p)."""
    from scipy.stats import binomtest

    test = binomtest((labels & called).sum(), (labels | called).sum())
    share = np.array(test.proportion_ci(method="wilson"))
    return 2 * share / (1 + share)


def evaluate(name, score, data, threshold=None):
    """The record of a model on the test part: {column: value}, with its scores [texts]. `score` is
    a function texts -> scores; without a threshold, one is chosen on the validation part."""
    from sklearn import metrics

    if threshold is None:
        texts, labels = data.split("validation")
        threshold = choose_threshold(labels, score(texts))
    texts, labels = data.split("test")
    scores = score(texts)
    called = scores >= threshold
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        labels, called, average="binary", zero_division=0)
    low, high = f1_interval(labels, called)
    return {
        "seed": data.info["seed"], "model": name, "scores": scores,
        "PR AUC": metrics.average_precision_score(labels, scores), "F1": f1,
        "F1 low": low, "F1 high": high, "threshold": threshold,
        "F1 at 0.5": metrics.f1_score(labels, scores >= 0.5),
        "precision": precision, "recall": recall, "accuracy": (called == labels).mean(),
        "ROC AUC": metrics.roc_auc_score(labels, scores),
        "calibration error": calibration_error(labels, scores),
    }


def evaluate_classifier(classifier, data):
    """The record of a Classifier on the test part, with its size, what its dendrites carry, and its
    speed on the CPU, from text to score."""
    record = evaluate(classifier.name, classifier.scores, data, classifier.threshold)
    model = classifier.model.cpu()
    texts = data.split("test")[0][:1000]
    tokens = classifier.tokens(texts)
    full = (text_lengths(tokens) == classifier.arguments["max_length"]).float().mean()
    if full:
        note(f"{full:.2%} of {len(texts):,} test texts fill --max-length; what follows is not read")

    def seconds(batch):
        start_time = time.perf_counter()
        classifier.scores(batch)
        return time.perf_counter() - start_time

    seconds(texts[:8])  # warm-up
    return record | {
        "parameters": model.num_parameters(),
        "dendrites carry %": dendrite_share(model, tokens[:500]),
        "MB": os.path.getsize(classifier.path) / 1e6 if classifier.path else None,
        "99 % latency [ms]": 1000 * np.percentile([seconds([text]) for text in texts[:100]], 99),
        "texts/s": len(texts) / min(seconds(texts), seconds(texts)),
    }


def evaluate_versions(versions, data):
    """The records of versions of a classifier, the first of which is the classifier as trained, and
    of that one with its dendrites switched off."""
    classifier = versions[0]
    if has_dendrites(classifier.model):
        threshold = None if "validation" in data.splits else classifier.threshold
        switched_off = replace(
            classifier, model=remove_dendrites(classifier.model), threshold=threshold, path=None,
            name=f"{classifier.name}, dendrites switched off")
        versions = [*versions, switched_off]
    return [evaluate_classifier(version, data) for version in versions]


def make_tfidf():
    """Logistic regression on TF-IDF of words, pairs of words and 2 to 5 characters within words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=200_000)
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True,
                              max_features=300_000)
    return make_pipeline(make_union(words, letters),
                         LogisticRegression(class_weight="balanced", max_iter=300))


def make_frozen_encoder(giant, args):
    """Logistic regression on the mean hidden state of a giant, which is not trained."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, Normalizer

    model, tokenizer, _, _ = giant
    encoder = model.bert.to(args.device).eval()

    def mean_state(attention_mask, **batch):
        mask = attention_mask.unsqueeze(2)
        states = encoder(attention_mask=attention_mask, **batch).last_hidden_state
        return (states * mask).sum(1) / mask.sum(1)

    def encode(texts):
        tokens = tokenize(tokenizer, texts, args.max_length)
        return run_in_buckets(mean_state, tokens, args.device).cpu().numpy()

    return make_pipeline(FunctionTransformer(encode), Normalizer(),
                         LogisticRegression(C=10, class_weight="balanced", max_iter=300))


def fit_by_class(model, data):
    """Fit a scikit-learn model of texts on all classes of the data; returns a function texts ->
    probabilities [texts, classes]."""
    train = data.splits["train"][:TFIDF_TEXTS]
    model.fit(train["text"].tolist(), train["class"])
    counts = np.bincount(train["class"])[model.classes_]

    def predict_classes(texts):
        probabilities = np.zeros((len(texts), len(data.toxic)))  # a class may be missing
        probabilities[:, model.classes_] = model.predict_proba(texts) * counts  # unbalanced
        return probabilities / probabilities.sum(axis=1, keepdims=True)

    return predict_classes


def evaluate_others(data, args, run_dir, giant=None):
    """The records of what a model is compared with: the baselines, and `giant`, if given, as a
    frozen encoder and fine-tuned. A baseline that fails is left out."""
    majority = evaluate("majority class", lambda texts: np.zeros(len(texts)), data, 0.5)
    records = [majority | {"scores": None}]  # it has no curve
    models = {"TF-IDF": make_tfidf()} if "train" in data.splits else {}
    if giant:
        fitted = fit_giant(giant, data, args, run_dir / f"checkpoint_giant_{args.seed}.pt")
        fitted.save(run_dir / "giant.pt")
        records.append(evaluate_classifier(fitted, data))
        models["frozen encoder"] = make_frozen_encoder(giant, args)

    def fit(model):
        predict_classes = fit_by_class(model, data)
        return lambda texts: predict_classes(texts)[:, data.toxic].sum(axis=1)

    for name, model in models.items():
        try:
            records.append(evaluate(name, fit(model), data))
        except Exception as error:  # whatever it is, the model is trained and must be saved
            note(f"baseline {name} left out: {error}")
    return records


# --- Pictures -----------------------------------------------------------------------------------


def plot_learning(state, name, path):
    """Losses and PR AUC over the epochs, with the switches."""
    history = pd.DataFrame(state["history"]).drop(columns="seconds")
    history.columns = ["training loss", "validation loss", "validation PR AUC"]
    fig, (ax,) = new_figure(f"Training of {name}", size=(8, 4))
    for index, column in enumerate(history):
        plot_curve(ax, history.index + 1, history[column], column, index, "o")
    for epoch in state["switches"]:
        ax.axvline(epoch, linestyle=":", color="0.4")
    epoch_axis(ax, "epoch (dotted: a switch, after which the learning rate starts again)")
    ax.set_ylabel("loss, or PR AUC")
    legend_below(ax)
    save_figure(fig, path)


def plot_curves(table, labels, source, path):
    """Precision over recall, and the ROC curve, of the scores of each model in the records."""
    from sklearn.metrics import precision_recall_curve, roc_curve

    title = f"{source}: {labels.sum():,} toxic among {len(labels):,} test texts"
    fig, (left, right) = new_figure(title, columns=2, size=(11, 5))
    for index, (name, scores) in enumerate(zip(table["model"], table["scores"])):
        precision, recall, _ = precision_recall_curve(labels, scores)
        precision[-1] = precision[-2]  # scikit-learn lets every curve end at 1
        plot_curve(left, recall, precision, name, index)
        false_alarms, recall, _ = roc_curve(labels, scores)
        plot_curve(right, false_alarms, recall, name, index)
    left.set(title="precision and recall", xlabel="recall", ylabel="precision", ylim=(0, 1.02))
    right.set(title="ROC", xlabel="share of harmless texts called toxic", ylabel="recall")
    legend_below(left, 3)
    save_figure(fig, path)


# --- The experiment -----------------------------------------------------------------------------


def change(args, **changes):
    """The arguments with some changed."""
    return argparse.Namespace(**vars(args) | changes)


def run(args):
    """Do what the arguments ask for; returns the results."""
    if args.predict is not None:
        return predict(args)
    if args.export_hf:
        return export_hf(args)
    if any(getattr(args, job) for job in ["evaluate", "compare_base", *VERSIONS]):
        return evaluate_checkpoint(args)
    return run_experiment(args)


def run_experiment(args):
    """Train with each seed, evaluate everything and report; returns the results."""
    if args.compare_dendrites or args.arm == "library":
        with sandbox_perforatedai():
            import perforatedai  # noqa: F401  if it is missing, that is known before any work
    run_dir = None
    records = []
    for seed in range(args.seed, args.seed + args.runs):
        seed_args = change(args, seed=seed)
        seed_everything(seed)
        data = load_data(seed_args)
        num_labels = len(data.toxic) if args.distill else 2
        loaded = make_model(args, data.split("train")[0], num_labels)
        if args.max_length > loaded[0].config.max_position_embeddings:
            raise UserError("--max-length is more than the model can read")
        giant = load_pretrained(args.giant, len(data.toxic)) if args.distill == "giant" else None
        run_dir = run_dir or next_run_dir(args)  # now arguments and data are known to be good
        path = run_dir / f"checkpoint_{seed}.json"
        if not path.exists():
            done = {"data": data.info, "notes": NOTES,
                    "records": run_seed(loaded, giant, data, seed_args, run_dir)}
            with atomic_write(path) as part:
                part.write_text(to_json(done))
            for checkpoint in run_dir.rglob("checkpoint*.pt"):
                checkpoint.unlink()
        done = json.loads(path.read_text())
        if done["data"] != data.info:
            raise UserError(f"{path}: the run began with other data")
        for text in done["notes"]:
            note(text)
        records += done["records"]
    return report(records, data, args, run_dir)


def run_seed(loaded, giant, data, args, run_dir):
    """The records of the arms, which are trained from the same weights, and of what they are
    compared with."""
    lesson = teach(giant, data, args, run_dir) if args.distill else None
    records = []
    for arm in ARMS if args.compare_dendrites else [args.arm]:
        arm_dir = run_dir
        if args.compare_dendrites or args.runs > 1:
            arm_dir = run_dir / f"{arm}-{args.seed}"
            arm_dir.mkdir(exist_ok=True)
        path = arm_dir / "checkpoint.pt"
        classifier, state = fit_classifier(loaded, data, change(args, arm=arm), path, lesson)
        classifier.save(arm_dir / "best_model.pt")
        plot_learning(state, f"{classifier.name} ({arm})", arm_dir / "learning_curves.png")
        if args.compare_dendrites:
            classifier.name = arm
        best_epoch = state["best"]["epoch"]
        switches = state["switches"]
        if ARMS[arm] and best_epoch <= min(switches, default=best_epoch):
            note(f"{arm}, seed {args.seed}: the best epoch was before any switch, so the model has "
                 "been through none")
        rows = evaluate_versions([classifier, to_int8(classifier, arm_dir)], data)
        rows[0]["training"] = {"arm": arm, "best_epoch": best_epoch, "switches": switches,
                               "history": state["history"]}
        records += rows
    return records + evaluate_others(data, args, run_dir, giant)


def format_mean(values, sign=""):
    """The mean of numbers, with its 95 % confidence interval if there are several."""
    values = values.dropna()
    if values.empty:
        return "–"
    mean, width = mean_and_interval(values)
    number = ",.0f" if abs(mean) >= 100 else ".3f"
    text = f"{mean:{sign}{number}}"
    return f"{text} ± {width:.3f}" if len(values) > 1 else text


def report(records, data, args, run_dir):
    """Draw and write what the records say; returns the results."""
    table = pd.DataFrame([*records, ORIGINAL])
    scored = table.dropna(subset="scores")
    _, labels = data.split("test")
    source = data.info["source"]
    seed = data.info["seed"]
    last = scored[scored["seed"] == seed]
    plot_curves(last, labels, f"{source}, seed {seed}", run_dir / "pr_roc.png")
    by_model = table.groupby("model", sort=False)
    seeds = by_model["seed"].count()
    means = by_model.mean(numeric_only=True).drop(columns="seed")
    columns = means.columns
    if seeds.max() > 1:
        columns = [*COMPARED, "dendrites carry %"]
    rows = by_model[columns].agg(format_mean).assign(seeds=seeds).reset_index()
    parts = [f"{source}, {len(labels):,} test texts:", markdown_table(rows), LEGEND]
    if seeds.max() > 1:
        first = scored.groupby("seed")[COMPARED].transform("first")  # the row of the same seed
        rows = (first - scored[COMPARED]).groupby(scored["model"], sort=False)
        rows = rows.agg(format_mean, sign="+").iloc[1:]
        rows = rows.rename_axis(f"{records[0]['model']} minus").reset_index()
        parts.append(markdown_table(rows))
    ours = means.iloc[0]
    giant = means.filter(regex="^giant ", axis=0)
    if len(giant):
        rows = pd.DataFrame({  # what the original asks of a giant-killer, and what was measured
            "F1 [% of the giant's], asked: 98": 100 * ours["F1"] / giant["F1"],
            "times as fast, asked: 15": ours["texts/s"] / giant["texts/s"],
            "MB, asked: under 25": ours["MB"],
            "99 % latency [ms], asked: under 100": ours["99 % latency [ms]"]})
        parts.append(markdown_table(rows.round(1)))
    areas = means["PR AUC"][seeds == seeds.max()].sort_values(ascending=False)
    ranked = "; ".join(f"{name} {area:.3f}" for name, area in areas.items())
    parts.append(f"PR AUC on the test part, from the best to the worst: {ranked}.")
    results = {"data": data.info, "answer": parts[-1],
               "models": table.drop(columns="scores").to_dict("records")}
    results = write_results(results, "\n\n".join(parts), args, run_dir)
    for path in run_dir.rglob("checkpoint*"):  # only an unfinished run needs them
        path.unlink()
    return results


# --- Extras: learning from a teacher (--distill) --------------------------------------------------


def altered_copies(texts, rng):
    """COPIES altered versions of each text, in turn with a fifth of its words left out and with the
    end of another text."""
    copies = []
    for number in range(COPIES):
        for text, other in zip(texts, rng.permutation(len(texts))):
            words = text.split()
            others = texts[other].split()
            if number % 2:
                head, tail = rng.uniform(0.3, 0.8, 2)
                words = words[: 1 + int(head * len(words))] + others[int(tail * len(others)) :]
            else:
                words = [word for word in words if rng.random() > 0.2] or words
            copies.append(" ".join(words))
    return copies


def teach(giant, data, args, run_dir):
    """The lesson (texts, probabilities [texts, classes]) of a teacher: the geometric mean of what
    TF-IDF and the giant, if any, say about the training texts and altered copies of them. Each is
    answered by teachers that were trained without its fold; equal texts are in the same fold."""
    from sklearn.model_selection import GroupKFold

    train = data.splits["train"]
    groups = train["text"].map(text_key)
    rng = np.random.default_rng(args.seed)
    folds = GroupKFold(FOLDS, shuffle=True, random_state=args.seed)
    texts = []
    answers = []
    for fold, (rest, inside) in enumerate(folds.split(train, groups=groups)):
        others = replace(data, splits=data.splits | {"train": train.iloc[rest]})
        asked = train["text"].iloc[inside].tolist()
        asked += altered_copies(asked, rng)
        logits = torch.tensor(fit_by_class(make_tfidf(), others)(asked).clip(1e-6)).log()
        if giant:
            path = run_dir / f"checkpoint_teacher_{args.seed}_{fold}.pt"
            teacher = fit_giant(giant, others, args, path)
            logits = (logits + teacher.logits(asked).log_softmax(1)) / 2
        texts += asked
        answers.append(logits.softmax(1).float())
    return texts, torch.cat(answers)


# --- Extras: what works on a checkpoint ---------------------------------------------------------


def find_classifier(args):
    """The Classifier in --checkpoint, or in the newest best_model.pt."""
    paths = Path(args.output_dir, EXPERIMENT).glob("run-*/**/best_model.pt")
    path = args.checkpoint or max(paths, key=os.path.getmtime, default=None)
    if not path:
        raise UserError(f"no best_model.pt in {args.output_dir}; train first: python toxicity.py")
    log(f"the model is {path}")
    return load_classifier(os.path.abspath(path), args.device)


def evaluate_checkpoint(args):
    """Evaluate a checkpoint on its own test part, or on --data or --dataset without its training
    texts, beside baselines, other versions of it or the fine-tuned --giant."""
    classifier = find_classifier(args)
    args = change(args, checkpoint=classifier.path)  # --resume must not take a newer one
    foreign = args.data or args.dataset
    if foreign and args.compare_base:
        raise UserError("--compare-base takes the texts of the checkpoint, not --data or --dataset")
    data_args = args if foreign else change(args, **classifier.arguments)
    seed_everything(data_args.seed)
    data = load_data(data_args, foreign, classifier.hashes)
    giant = load_pretrained(args.giant, len(data.toxic)) if args.compare_base else None
    if args.export_onnx:
        import onnx  # noqa: F401  if it is missing, that is known before there is a folder
    run_dir = next_run_dir(args)
    versions = [make(classifier, run_dir) for job, make in VERSIONS.items() if getattr(args, job)]
    records = evaluate_versions([classifier, *versions], data)
    records += evaluate_others(data, data_args, run_dir, giant)
    return report(records, data, data_args, run_dir)


def to_onnx(classifier, run_dir):
    """The classifier as model.onnx, with free batch size and length, and tokenizer.json."""
    import onnxruntime

    path = run_dir / "model.onnx"
    model = copy.deepcopy(classifier.model).cpu()
    model.config.return_dict = False
    example = torch.ones(2, 8, dtype=torch.long)
    axes = {"input_ids": [0, 1], "attention_mask": [0, 1], "logits": [0]}
    with atomic_write(path) as part, warnings.catch_warnings(action="ignore"):
        # The older exporter will go, but the newer one fails on dendrites.
        torch.onnx.export(model, (example, example), part, dynamo=False, dynamic_axes=axes,
                          input_names=["input_ids", "attention_mask"], output_names=["logits"])
    classifier.tokenizer.save(str(run_dir / "tokenizer.json"))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def forward(**batch):
        inputs = {name: tensor.numpy() for name, tensor in batch.items()}
        return argparse.Namespace(logits=torch.from_numpy(session.run(None, inputs)[0]))

    model.forward = forward
    return replace(classifier, model=model, name=f"{classifier.name}, ONNX", path=path)


def make_bert_base(classifier, run_dir):
    """A BERT-Base with random weights in place of the classifier's model, to compare the speed."""
    base = build_bert({"num_labels": len(classifier.toxic)}).to(classifier.model.device).eval()
    return replace(classifier, model=base, name="BERT-Base, random weights", path=None)


VERSIONS = {"quantize": to_int8, "export_onnx": to_onnx, "benchmark_only": make_bert_base}


def export_hf(args):
    """Write a folder that transformers loads."""
    import transformers

    classifier = find_classifier(args)
    texts, _ = generate_comments(300, seed=0)
    model = remove_dendrites(classifier.model, constant=0.5)  # a sigmoid at 0
    folded = replace(classifier, model=model)
    largest = np.abs(folded.scores(texts) - classifier.scores(texts)).max()
    if largest > 0.01:
        raise UserError("--export-hf: no BERT of transformers has dendrites, and without them a "
                        f"score changes by {largest:.3f}; take --export-onnx or --arm plain")
    names = [CLASSES[toxic] for toxic in classifier.toxic]
    if len(names) > 2:  # without numbers, several classes of a student would have one name
        names = [f"{name} {i}" for i, name in enumerate(names)]
    model.config.id2label = dict(enumerate(names))
    model.config.problem_type = "single_label_classification"  # of --model it may be another
    Path(args.export_hf).mkdir(parents=True, exist_ok=True)  # transformers ignores a file there
    model.save_pretrained(args.export_hf)
    tokenizer = transformers.BertTokenizerFast(
        tokenizer_object=classifier.tokenizer, model_max_length=classifier.arguments["max_length"])
    tokenizer.save_pretrained(args.export_hf)
    print(f"{args.export_hf}: a model for transformers, scores changed by at most {largest:.1g}")


def predict(args):
    """Print score, decision and tier of each text of --predict or, as they come, of the lines on
    stdin; empty ones are skipped."""
    classifier = find_classifier(args)
    threshold = classifier.threshold
    cuts = [threshold / 2, threshold, (1 + threshold) / 2]
    lines = args.predict or sys.stdin
    texts = (line.rstrip("\r\n") for line in lines if line.strip())
    try:
        while batch := list(itertools.islice(texts, INFERENCE_BATCH)):
            scores = classifier.scores([clean_text(text) for text in batch])
            for score, cut, text in zip(scores.tolist(), np.digitize(scores, cuts), batch):
                row = {"score": round(score, 4), "toxic": score >= threshold,
                       "tier": TIERS[cut], "text": text}
                line = json.dumps(row, ensure_ascii=False)
                if args.format == "table":
                    line = f"{score:.4f}  {CLASSES[row['toxic']]:9}  {row['tier']:7}  {text!r}"
                print(line, flush=True)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UnicodeError as error:
        raise UserError(f"--predict: a text is not UTF-8: {error}") from None


# --- Plumbing: nothing below is about the experiment --------------------------------------------

PACKAGES = ["torch", "numpy", "pandas", "pyarrow", "sklearn", "transformers", "datasets",
            "perforatedai"]
NOTES = []
PIP_NAMES = {"sklearn": "scikit-learn", "PIL": "pillow"}


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
        part.unlink(missing_ok=True)


def load_checkpoint(file, name):
    """What torch.save wrote to `file`, a path or a stream. Raises UserError with its `name`."""
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception:  # torch.load raises errors of many types for a damaged file
        raise UserError(f"{name}: damaged, or not a checkpoint of {EXPERIMENT}.py") from None


def plain_arguments(args):
    """{name: value} of the arguments, all of which JSON can hold."""
    return vars(args) | {"device": str(args.device)}


def changed_arguments(args):
    """{name: value} of the arguments that differ from their defaults."""
    defaults = plain_arguments(parse_args([]))
    return {name: value for name, value in plain_arguments(args).items()
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
    files = [file for file in files
             if file.exists() and not file.with_name("results.json").exists()]
    if not files:
        raise UserError(f"--resume {args.resume}: no unfinished run; see --output-dir")
    changed = changed_arguments(args)
    refused = changed.keys() - {"resume", "output_dir", "data_dir", "device", "jobs", "backend"}
    if refused:
        flags = " --".join(sorted(refused)).replace("_", "-")
        raise UserError(f"--resume keeps a run's arguments; leave out --{flags}")
    script = Path(globals().get("__file__", ""))
    if script.is_file() and script.stat().st_mtime > files[-1].stat().st_mtime:
        note("the script is newer than this run, whose results may mix two versions of it")
    arguments = json.loads(files[-1].read_text()) | changed
    arguments |= {"device": args.device, "resume": str(files[-1].parent)}
    return argparse.Namespace(**arguments)


def describe_run(args):
    """What made the results: arguments, script, versions, device and peak memory."""
    script = Path(globals().get("__file__", "pasted into a notebook")).resolve()
    digest = hashlib.sha256(script.read_bytes()).hexdigest() if script.exists() else None
    git = f'git -C "{script.parent}" describe --always --dirty --abbrev=40 --exclude="*"'
    failed, commit = subprocess.getstatusoutput(git)
    versions = {name: getattr(sys.modules[name], "__version__", None)
                for name in PACKAGES if name in sys.modules}
    device = args.device
    return {
        "experiment": EXPERIMENT,
        "arguments": plain_arguments(args),
        "changed_arguments": changed_arguments(args),
        "script_sha256": digest,
        "git_commit": None if failed else commit,
        "git_clean": None if failed else not commit.endswith("-dirty"),
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
    arguments = [f"{name}={value}" for name, value in results["changed_arguments"].items()]
    title = f"# {EXPERIMENT}.py {', '.join(arguments)}"
    text = "\n\n".join([title, *(f"Note: {text}" for text in NOTES), summary])
    (run_dir / "summary.md").write_text(text, encoding="utf-8")
    content = to_json(results)
    with atomic_write(run_dir / "results.json") as path:
        path.write_text(content)
    if in_notebook():
        from IPython.display import Markdown, display

        display(Markdown(text))
    else:
        print(text)
    print(f"Everything is in {run_dir}")
    return json.loads(content)


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
        command = f"python {EXPERIMENT}.py --resume --output-dir {args.output_dir}"
        command = 'main(["--resume"])' if in_notebook() else command
        text = f"interrupted; to go on with a run that had begun: {command}"
        code = 130
    except (UserError, OSError, ModuleNotFoundError, torch.OutOfMemoryError) as error:
        text = f"error: {' '.join(str(error).split())}"
        code = 2
        if isinstance(error, ModuleNotFoundError):
            package = error.name.split(".")[0]
            text += f"; pip install {PIP_NAMES.get(package, package)}"
    gc.collect()  # what pyarrow leaves of a file that it could not read may abort Python's exit
    print(f"{EXPERIMENT}.py: {text}", file=sys.stderr)  # in every process of torchrun
    if not in_notebook():
        raise SystemExit(code)


if __name__ == "__main__":
    main()
