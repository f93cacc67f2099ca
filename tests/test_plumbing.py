"""The last part of each script, which is about no experiment, is the same text in all of them."""

import ast

import pytest
from conftest import plumbing

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
