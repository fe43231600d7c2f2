"""What helpers say before the run: the same however it is made, and help as that of helpers in memory."""

import json
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from lmboost import checkpoint, score
from lmboost.config import read
from lmboost.data import loader, scored
from lmboost.data.scored import Scored
from lmboost.errors import UserError
from tests import runs
from tests.compare import assert_same, losses

HELPED = ("--config.objective.kd.stop=0.75",)
ROWS = 4


def write(recipe, out, *flags):
    """The score verb in this process."""
    score.score(*read([f"--config={recipe}", f"--out={out}", f"--rows={ROWS}", *flags], score.Flags))
    return str(out)


@pytest.fixture(scope="module")
def said(home, recipe, data, teacher):
    """Draws, losses, states and scores for runs of the helped recipe."""
    return write(f"{recipe}:helped", home / "said", data, teacher, *HELPED)


def contents(directory):
    directory = pathlib.Path(directory)
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_a_run_from_disk_is_that_of_a_teacher_in_memory(tmp_path, recipe, data, teacher):
    """All helps, kd by the teacher's best tokens: to the rounding of states in eight bits; the same rows are chosen."""
    top_k = "--config.objective.kd.top_k=8"
    said = write(f"{recipe}:helped", tmp_path / "said", data, teacher, *HELPED, top_k)
    runs.run(f"{recipe}:helped", tmp_path / "online", data, teacher, *HELPED, top_k)
    runs.run(f"{recipe}:helped", tmp_path / "cached", data, f"--config.teacher.targets={said}", *HELPED, top_k)
    for name in ("loss", "val_loss"):
        wanted, found = losses(tmp_path / "online", name), losses(tmp_path / "cached", name)
        assert found == pytest.approx(wanted, rel=3e-3)
    manifest, known = json.loads((tmp_path / "cached" / "manifest.json").read_text()), Scored.find(said)
    assert manifest["targets"]["fingerprint"] == known.fingerprint
    assert manifest["teacher"]["fingerprint"] == known.manifest["teacher"]["fingerprint"]
    lines, online = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("cached", "online")
    )
    assert [sum(name in line for line in lines) for name in ("kd_weight", "align_weight")] == [6, 4]
    spent = [max(line["flops"] for line in each if "flops" in line) for each in (lines, online)]
    assert spent[0] < spent[1]  # the teacher is not computed


@pytest.mark.slow
def test_a_run_by_draws_is_near_that_of_a_teacher_in_memory(tmp_path, recipe, data, teacher, said):
    runs.run(f"{recipe}:helped", tmp_path / "online", data, teacher, *HELPED)
    runs.run(f"{recipe}:helped", tmp_path / "drawn", data, f"--config.teacher.targets={said}", *HELPED)
    assert losses(tmp_path / "drawn") == pytest.approx(losses(tmp_path / "online"), rel=2e-2)


@pytest.mark.slow
def test_help_that_ends_by_itself_from_disk(tmp_path, recipe, data, teacher):
    """The lead is known in every step; help ends at the latest where the answers end."""
    auto = (
        "--config.objective.align.weight=1", "--config.objective.align.stop=auto", "--config.objective.auto.full=0.1",
        "--config.objective.auto.end=-9",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"align.stop=auto does not say which rows .*--until=0.3"):
        write(recipe, tmp_path / "said", data, teacher, *auto)
    out = write(recipe, tmp_path / "said", data, teacher, *auto, "--until=0.5")
    runs.run(recipe, tmp_path / "run", data, f"--config.teacher.targets={out}", *auto)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    leads = {line["step"]: line["lead"] for line in lines if "lead" in line}
    assert sorted(leads) == [1, 2, 3, 4] and len(set(leads.values())) == 4
    with pytest.raises(UserError, match=r"has the labels of the rows that come first with seed=0 .*not with seed=1"):
        runs.run(recipe, tmp_path / "other", data, f"--config.teacher.targets={out}", *auto, "--config.seed=1")


def test_any_devices_say_the_same(tmp_path, recipe, data, teacher, said):
    """With as many rows a device: on 8, spread otherwise, with workers; a shard at a time, killed between them."""
    for flags in (("--config.mesh.fsdp=4",), ("--config.data.workers=1",)):
        out = write(f"{recipe}:helped", tmp_path / str(len(flags[0])), data, teacher, *HELPED, *flags)
        assert contents(out) == contents(said)


def command(recipe, out, *flags):
    return [sys.executable, "-m", "lmboost.score", f"--config={recipe}", f"--out={out}", f"--rows={ROWS}", *flags]


@pytest.mark.slow
def test_killed_at_random_and_on_any_number_of_processes_it_is_the_same(tmp_path, recipe, data, teacher):
    """One process of four devices, killed five times; two of two, four of one."""
    flags = (data, teacher, *HELPED)
    runs.finish(start(command(f"{recipe}:helped", tmp_path / "whole", *flags), 4))
    whole = contents(tmp_path / "whole")
    for wait in (0.0, 1.0, 2.0, 3.0, 4.0):
        process = start(command(f"{recipe}:helped", tmp_path / "killed", *flags), 4)
        until = time.monotonic() + 300
        while not (tmp_path / "killed.partial").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(wait)
        process.kill()
        process.communicate()
    runs.finish(start(command(f"{recipe}:helped", tmp_path / "killed", *flags), 4))
    assert contents(tmp_path / "killed") == whole
    for processes in (2, 4):
        port = f"--coordinator=127.0.0.1:{19_000 + processes + hash(str(tmp_path)) % 9000}"
        several = [
            start(
                command(
                    f"{recipe}:helped", tmp_path / str(processes), *flags, port, f"--num_processes={processes}",
                    f"--process_id={i}",
                ),
                4 // processes,
            )
            for i in range(processes)
        ]  # fmt: skip
        for process in several:
            runs.finish(process)
        assert contents(tmp_path / str(processes)) == whole


def start(arguments, devices):
    return subprocess.Popen(
        arguments, env=runs.environment(devices), cwd=runs.ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_from_disk_goes_on_bitwise(tmp_path, recipe, data, said):
    """From its own checkpoint, also where the directory has moved, while states are read and when they are not."""
    shutil.copytree(said, tmp_path / "moved")
    flags = (data, *HELPED)
    whole = runs.run(f"{recipe}:helped", tmp_path / "whole", *flags, f"--config.teacher.targets={said}")
    for steps in ((4,), (6, 8), (2, 4)):
        for step in steps:  # what came after is lost, as in a kill
            shutil.copytree(tmp_path / "whole", tmp_path / f"{step}", dirs_exist_ok=True)
            for later in checkpoint.Run(tmp_path / f"{step}").steps():
                if later > step:
                    shutil.rmtree(tmp_path / f"{step}" / "checkpoints" / str(later))
        last = runs.run(
            f"{recipe}:helped", tmp_path / f"{step}", *flags, f"--config.teacher.targets={tmp_path / 'moved'}"
        )
        assert_same(last.params, whole.params)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--config.seq_len=16",), r"targets='.*said' is of rows of 32 tokens, but seq_len=16: score again"),
        (("--config.objective.kd.temperature=2",), r"with 1.0 as objective.kd.temperature, but now it is 2.0"),
        (("--config.objective.kd.top_k=4",), r"with 0 as objective.kd.top_k, but now it is 4"),
        (("--config.objective.align.pairs=half:1", "--config.objective.align.final_norm=False"), r"final_norm=True"),
        (("--config.objective.align.stop=0.9",), r"states of the first \d+ rows, which are read before step \d+, but"),
        (("--config.objective.select.k=3",), r"has scores of .*k=10.*, but objective.select asks for .*k=3"),
        (("--config.teacher.random=True",), r"teacher.random=True and teacher.targets=.*leave one out"),
    ],
)
def test_what_the_answers_do_not_have_is_named(tmp_path, recipe, data, said, flags, message):
    with pytest.raises(UserError, match=message):
        runs.run(f"{recipe}:helped", tmp_path / "run", data, f"--config.teacher.targets={said}", *HELPED, *flags)
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.slow
def test_a_run_from_disk_does_not_go_on_with_a_model_in_memory(tmp_path, recipe, data, teacher, said):
    flags = (f"{recipe}:helped", tmp_path / "run", data, *HELPED)
    runs.run(*flags, f"--config.teacher.targets={said}")
    with pytest.raises(UserError, match=r"holds a run of another config:\n  teacher.targets: '.*said' -> ''"):
        runs.run(*flags, teacher)


def test_a_help_that_is_not_in_the_answers_is_named(tmp_path, recipe, data, teacher):
    kd = ("--config.objective.kd.weight=0.5", "--config.objective.kd.stop=0.5")
    out = write(recipe, tmp_path / "said", data, teacher, *kd)
    known = Scored.find(out)
    assert known.parts.groups() == ("labels",) and known.manifest["bytes"] / known.manifest["tokens"] < 64
    for help_, flag in (("align", "align.weight=1"), ("select", "select.candidates=2")):
        with pytest.raises(UserError, match=rf"has nothing for {help_}, but objective.{help_} is on: score with this"):
            runs.run(
                recipe, tmp_path / "run", data, f"--config.teacher.targets={out}", *kd, f"--config.objective.{flag}"
            )  # fmt: skip


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--draws=0",), r"--draws=0: expected 1 to 255"),
        (("--state_bytes=4",), r"--state_bytes=4: expected at least 8"),
        (("--until=2",), r"--until=2.0 is not a fraction"),
        (("--config.teacher.targets=x",), r"teacher.targets='x': this is made here"),
        (("--config.objective.kd.top_p=0.5",), r"objective.kd.top_p=0.5: take objective.kd.top_k"),
        (
            (
                "--config.objective.kd.weight=0",
                "--config.objective.align.weight=0",
                "--config.objective.select.candidates=1",
            ),
            r"the objective asks for no help",
        ),
        (("--dras=3",), r"unknown flag --dras \(did you mean 'draws'\?\)"),
    ],
)
def test_what_cannot_be_asked_is_named(tmp_path, recipe, data, teacher, flags, message):
    with pytest.raises(UserError, match=message):
        write(f"{recipe}:helped", tmp_path / "said", data, teacher, *flags)
    assert not list(tmp_path.iterdir())


def test_data_that_change_while_they_are_scored_are_found(tmp_path, recipe, data, teacher, monkeypatch):
    moved = tmp_path / "data"
    shutil.copytree(data.partition("=")[2], moved)
    path, whole = moved / "manifest.json", score.Work._answers

    def answers_of(*arguments):
        yield from whole(*arguments)
        path.write_text(path.read_text().replace(loader.info(str(moved)).fingerprint, "0" * 64))

    monkeypatch.setattr(score.Work, "_answers", answers_of)
    with pytest.raises(UserError, match=r"data has changed while it was scored"):
        write(f"{recipe}:helped", tmp_path / "said", f"--config.data.train={moved}", teacher)
    assert not (tmp_path / "said").exists()


def test_a_full_disk_loses_nothing(tmp_path, recipe, data, teacher, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(scored, "pack", full)
        with pytest.raises(UserError, match=r"no space left for .*said.partial: free some and run the same command"):
            write(f"{recipe}:helped", tmp_path / "said", data, teacher)
    write(f"{recipe}:helped", tmp_path / "said", data, teacher)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["said"]


def test_states_are_kept_in_the_directions_that_hold_most_of_them(tmp_path, recipe, data, teacher):
    """Half of the teacher's width: the states that come back point where the whole ones do."""
    align = ("--config.objective.align.weight=1",)
    half = Scored.find(write(recipe, tmp_path / "half", data, teacher, *align, "--state_bytes=10"))
    all_ = Scored.find(write(recipe, tmp_path / "all", data, teacher, *align))
    assert [(s.width, s.kept) for s in half.parts.states + all_.parts.states] == [(16, 8), (16, 16)]
    data_set = loader.info(data.partition("=")[2]).fingerprints[0]
    row = int(loader.Loader(data.partition("=")[2], "train", 32).first_rows(1)[0][0])
    one, two = (known.answers(data_set, ["states"])[row] for known in (half, all_))
    layer = half.parts.states[0].layer
    state = lambda found: found[f"state_{layer}"] * found[f"scale_{layer}"].astype(np.float32)[:, None]  # noqa: E731
    found, wanted = state(one) @ half.bases()[str(layer)].T, state(two)
    cosine = (found * wanted).sum(-1) / np.maximum(
        np.linalg.norm(found, axis=-1) * np.linalg.norm(wanted, axis=-1), 1e-9
    )
    assert np.median(cosine) > 0.9
