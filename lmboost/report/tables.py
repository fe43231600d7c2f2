"""The report's tables and remarks, as text: the console, Markdown and the page show the same ones."""

from typing import Any

from lmboost.run import progress

Table = tuple[str, list[list[str]]]  # title; header and rows
TIMES = {  # kinds of goodput.Goodput, as the lines of the table
    "step": "steps", "start": "starting", "restore": "restoring", "compile": "compiling", "data": "waiting for data",
    "evaluate": "evaluating", "save": "saving", "lost": "steps that were lost", "restarting": "between attempts",
}  # fmt: skip


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def tables(report: dict[str, Any]) -> list[Table]:
    """All of them; `report` is what `compare` gives."""
    rows = [report["baseline"], *report["runs"]]
    losses = [["run", *(f"{float(f):.0%}" for f in report["baseline"]["loss_at"]), "final"]]
    costs = [["run", "tokens", "x", "FLOPs", "x", "seconds", "x"]]
    whole = [["run", "FLOPs", "x", "seconds", "x"]]
    for row in rows:
        name = title(report, row)
        losses.append([name, *(_cell(v, "{:.4f}") for v in [*row["loss_at"].values(), row["final"]["val_loss"]])])
        bound = "≤ " if row["reached_by_first_evaluation"] else ""
        tokens = row["tokens_to_target"]
        tokens = "-" if tokens is None else bound + progress.short(tokens)
        costs.append([name, tokens, _cell(row["tokens_fraction"], bound + "{:.2f}"), *_spent(row, "to_target", bound)])
        if row is not report["baseline"]:
            whole.append([name, *_spent(row, "with_helper", bound)])
    target = report["target_loss"]
    found = [
        ("Validation loss after a share of the baseline's tokens, nats per token", losses),
        (f"Cost of the baseline's final loss ({target:.4f}); x is a multiple of the baseline's whole run", costs),
    ]
    if report["helper_flops"] is not None or any(row["answers"] for row in report["runs"]):
        found.append(("The same with what was spent on help before", whole))
    if report["groups"]:
        found.append(_group_table(report))
    return found + ([_time_table(report)] if any("goodput" in row for row in rows) else [])


def _group_table(report: dict[str, Any]) -> Table:
    """Runs of one name as repetitions of one thing."""
    lines = [["runs of one name", "runs", "final loss", "reached", "tokens x", "FLOPs x", "seconds x"]]
    for group in report["groups"]:
        shares = [group[f"{what}_fraction"] for what in ("tokens", "flops", "seconds")]
        reached = f"{group['reached']} of {group['runs']}"
        final = _around(group["final_val_loss"], "{:.4f}")
        lines.append([group["name"], str(group["runs"]), final, reached, *(_around(x, "{:.2f}") for x in shares)])
    return "Means over runs of one name, ± their standard deviation; x of those that reach the baseline's loss", lines


def _around(spread: dict[str, float | None], form: str) -> str:
    deviation = spread["deviation"]
    return _cell(spread["mean"], form) + ("" if deviation is None else f" ± {form.format(deviation)}")


def _spent(row: dict[str, Any], what: str, bound: str) -> list[str]:
    """FLOPs and seconds of a row, each with its multiple of the baseline's, as cells."""
    multiple = {"to_target": "fraction", "with_helper": "with_helper_fraction"}[what]
    cells = []
    for name, form in (("flops", "{:.3g}"), ("seconds", "{:.0f}")):
        cells += [_cell(row[f"{name}_{what}"], bound + form), _cell(row[f"{name}_{multiple}"], bound + "{:.2f}")]
    return cells


def _time_table(report: dict[str, Any]) -> Table:
    """Where each run's time went. Runs of versions that did not write it down have -, idle kinds no line."""
    rows = [report["baseline"], *report["runs"]]
    times = [row.get("goodput") for row in rows]
    lines = [["of the wall clock", *(title(report, row) for row in rows)]]
    for kind, name in TIMES.items():
        shares = [time and time["shares"][kind] for time in times]
        if kind == "step" or any(share and share >= 0.0005 for share in shares):
            lines.append([name, *(_cell(share, "{:.1%}") for share in shares)])
    lines.append(["attempts", *(_cell(time and time["attempts"], "{}") for time in times)])
    lines.append(["hours", *(_cell(time and time["wall_seconds"] / 3600, "{:.2f}") for time in times)])
    return "Where the time went", lines


def title(report: dict[str, Any], row: dict[str, Any]) -> str:
    """A run's name, and whether it is the baseline."""
    return row["name"] + (" (baseline)" if row is report["baseline"] else "")


def notes(report: dict[str, Any], last: int) -> list[str]:
    """What a reader must know beside the tables. last: of how many evaluations a run's end is the mean."""
    final = "last evaluation" if last == 1 else f"mean of the last {last} evaluations"
    found = [
        f"Target: the baseline's final validation loss, {report['target_loss']:.4f} nats per token ({final}). "
        "A run reaches it where its loss first is that low, linearly between evaluations; - is never or not known.",
        f"The baseline's whole run: {progress.short(report['baseline']['total']['tokens'])} tokens"
        + (f", {flops:.3g} FLOPs." if (flops := report["baseline"]["total"]["flops"]) else "."),
    ]
    if (cost := report["helper_flops"]) is not None:
        found.append(f"Training the helper cost {cost:.3g} FLOPs, added to every run but the baseline.")
    for row in report["runs"]:
        if answers := row["answers"]:
            shared = f", which {answers['runs']} of these runs share" if answers["runs"] > 1 else ""
            found.append(f"{row['name']}: what helpers said before the run took {answers['flops']:.3g} FLOPs{shared}.")
    if report["groups"]:
        found.append("Runs of one name are taken for repetitions of one thing, with other seeds.")
    if report["baseline"]["seconds_to_target"] is not None:
        found.append(
            "Seconds are of training steps alone, as the clock had them: they can be compared where the machine was "
            "the same and had nothing else to do."
        )
    rows = [report["baseline"], *report["runs"]]
    if any(row["goodput"]["attempts"] > 1 for row in rows if "goodput" in row):
        found.append(
            "Steps that were lost were trained again after a crash; between attempts is from the last line that one "
            "wrote to the start of the next."
        )
    for row in rows:
        if row["total"]["tokens"] < 0.9 * row["trained_tokens"]:
            share = row["total"]["tokens"] / row["trained_tokens"]
            found.append(
                f"{row['name']}: its last evaluation with a finite loss is at {share:.0%} of the tokens that it "
                "trained on. It may have diverged since."
            )
    fraction = report["baseline"]["tokens_fraction"]
    if fraction and fraction < 0.95:
        found.append(
            f"The baseline itself first touches its final loss at {fraction:.0%} of its tokens: its evaluations are "
            "noisy, or it got worse again. Compare with --last above 1 and more evaluation batches."
        )
    return found
