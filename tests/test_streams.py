"""Words are never worth a run: a full disk and a reader that has gone end nothing."""

import os
import signal
import subprocess
import sys

import pytest

from tests.runs import ROOT

SPEAKS = """
import sys
from lmboost import errors
def main(argv):
    for i in range(3000):
        print("a line of words that fills buffers", flush=i % 3 == 0)
        print("and others", file=sys.stderr)
    open(argv[0], "w").write("done")
errors.run_verb(main, "what it does")
"""
RESULT = """
import argparse
from lmboost import errors
errors.run_flags(lambda: print("the result"), argparse.ArgumentParser(), prints=True)
"""


def run(program, *arguments, **streams):
    return subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, timeout=60, **streams)


def test_a_full_disk_ends_nothing(tmp_path):
    with open("/dev/full", "w") as full:
        assert run(SPEAKS, tmp_path / "x", stdout=full, stderr=full).returncode == 0
    assert (tmp_path / "x").read_text() == "done"


def test_a_reader_that_has_gone_ends_nothing(tmp_path):
    read, write = os.pipe()
    os.close(read)
    assert run(SPEAKS, tmp_path / "x", stdout=write, stderr=write).returncode == 0
    os.close(write)
    assert (tmp_path / "x").read_text() == "done"


def test_streams_that_are_closed_end_nothing(tmp_path):
    command = f'exec "{sys.executable}" -c "$0" "$1" >&- 2>&-'
    assert subprocess.run(["bash", "-c", command, SPEAKS, str(tmp_path / "x")], cwd=ROOT, timeout=60).returncode == 0
    assert (tmp_path / "x").read_text() == "done"


def test_what_is_printed_is_there():
    done = run(RESULT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the result\n", "")


def test_a_result_that_could_not_be_written_is_an_error_unless_nobody_reads_on():
    with open("/dev/full", "w") as full:
        done = run(RESULT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (
        done.returncode == 1
        and done.stderr == "error: standard output could not be written (No space left on device).\n"
    )
    read, write = os.pipe()
    os.close(read)
    done = run(RESULT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_notice_while_the_libraries_are_imported_ends_training_cleanly(number):
    command = [sys.executable, "-X", "importtime", "-m", "lmboost.train", "--config=x.py", "--workdir=x"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "lmboost.run.notice" in line:
            break
    process.stderr.readline()  # of what is imported after it
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait(30) == 75 and "Traceback" not in rest
    assert f"stopped by {number.name} before there was anything to save." in rest


def test_an_interrupted_verb_says_so_without_a_traceback():
    program = "from lmboost import errors\ndef main(argv): raise KeyboardInterrupt\nerrors.run_verb(main, '')"
    done = run(program, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
