"""What holds for the five scripts, the README and requirements.txt together."""

import importlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

SCRIPTS = ["fire", "forecast", "batch_selection", "duet", "toxicity"]
REQUIREMENTS = (ROOT / "requirements.txt").read_text().split()


def header(script):
    """The dependencies in the PEP 723 header of a script."""
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    (block,) = re.findall(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", text)
    return tomllib.loads(re.sub(r"(?m)^# ?", "", block))["dependencies"]


def commands():
    """[(script, arguments)] of every command in the README and in the docstrings of the scripts."""
    texts = [(ROOT / "README.md").read_text(encoding="utf-8")]
    texts += [importlib.import_module(script).__doc__ for script in SCRIPTS]
    found = []
    for text in texts:
        text = re.sub(r"```(?:bash)?|`", "\n", text.replace("\\\n", " "))
        for line in text.splitlines():
            match = re.match(r".*?(?:python|nproc-per-node \d|FIRST_MACHINE) (\w+)\.py\b([^|&]*)", line)
            if match and match[1] in SCRIPTS and "--help" not in match[2]:
                found.append((match[1], match[2].split(" # ")[0].split("  ")[0].strip()))
    return sorted(set(found))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_header_of_each_script_agrees_with_requirements(script):
    assert set(header(script)) <= set(REQUIREMENTS)


def test_requirements_has_nothing_that_no_script_needs():
    assert set(REQUIREMENTS) == {line for script in SCRIPTS for line in header(script)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_is_imported_with_the_packages_of_its_header_alone(script):
    others = {re.match(r"[\w-]+", line)[0] for line in set(REQUIREMENTS) - set(header(script))}
    others -= {"pillow", "joblib", "tokenizers"}  # what matplotlib, scikit-learn and transformers bring along
    code = f"import sys; sys.modules |= dict.fromkeys({others}); import {script}; {script}.parse_args([])"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_there_are_commands_to_check():
    assert len(commands()) > 40


@pytest.mark.parametrize(("script", "arguments"), commands())
def test_every_command_in_the_readme_and_docstrings_parses(script, arguments):
    importlib.import_module(script).parse_args(shlex.split(arguments))
