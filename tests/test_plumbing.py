"""The last part of each script, which is about no experiment, is the same text in all of them."""

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT, plumbing

import fire

SCRIPTS = ["fire.py", "forecast.py", "batch_selection.py", "duet.py", "toxicity.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_plumbing_is_that_of_fire(script):
    assert plumbing(script) == plumbing("fire.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_plumbing_has_what_design_promises_and_no_word_of_an_experiment(script):
    text = plumbing(script)
    names = {node.name for node in ast.parse(text).body if hasattr(node, "name")}
    assert names >= {"UserError", "log", "atomic_write", "next_run_dir", "write_results", "markdown_table", "main"}
    assert "fire" not in text


def test_a_missing_package_is_one_line(error_line, monkeypatch):
    def need(args):
        raise ModuleNotFoundError("No module named 'sklearn.tree'", name="sklearn.tree")

    monkeypatch.setattr(fire, "run", need)
    assert error_line(fire, []).endswith("No module named 'sklearn.tree'; pip install scikit-learn")


@pytest.mark.parametrize(("begun", "notes"), [(0, 1), (2**31, 0)])
def test_going_on_with_a_run_that_is_older_than_the_script_is_noted(begun, notes, tmp_path, monkeypatch):
    monkeypatch.setattr(fire, "run", lambda args: list(fire.NOTES))
    run_dir = fire.next_run_dir(fire.parse_args(["--output-dir", str(tmp_path)]))
    os.utime(run_dir / "arguments.json", (begun, begun))
    assert len(fire.main(["--resume", str(run_dir)])) == notes


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_a_file_that_pyarrow_cannot_read_does_not_abort_the_exit(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('"é,label\n1,0\n', encoding="latin-1")  # the quote never ends
    one_core = f"import os; os.sched_setaffinity(0, [{min(os.sched_getaffinity(0))}]); "  # there it is sure to happen
    code = one_core + f"import fire; fire.main(['--data', {str(path)!r}])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
