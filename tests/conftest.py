"""What all test files share."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared/data"  # real files, where they lie beside the checkout
THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def threads():
    """After each test the number of threads is what it was, since the last digits of the next depend on it."""
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def error_line(capsys):
    """A function: the one line with which module.main(argv) stops, with exit code 2."""

    def run(module, argv):
        with pytest.raises(SystemExit) as stopped:
            module.main([str(word) for word in argv])
        assert stopped.value.code == 2, argv
        printed = capsys.readouterr().err.replace("\r", "\n").splitlines()
        lines = [line for line in printed if "error: " in line]
        assert len(lines) == 1, printed
        return lines[0]

    return run


def kill_when(script, argv, appears, cwd):
    """Start a script as a process of its own, and kill it as soon as the path `appears` exists."""
    command = [sys.executable, ROOT / script, *map(str, argv)]
    process = subprocess.Popen(command, cwd=cwd, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not appears.exists():
        time.sleep(0.005)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def run_notebook(cells, folder, timeout=200):
    """The outputs of the last of `cells`, texts, run in a real kernel in `folder`."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(book, timeout=timeout, resources={"metadata": {"path": folder}}).execute()
    return book.cells[-1].outputs


def plumbing(script):
    """The part of a script below its last banner."""
    text = (ROOT / script).read_text(encoding="utf-8")
    return re.split("# --- Plumbing: nothing below is about the experiment -*\n", text)[1]
