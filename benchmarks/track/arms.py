"""The arms of the track: what is changed from a plain run, and which other runs it needs.

An arm is named by what it asks: salt-fifth-0.1 is SALT by the teacher of a fifth until a tenth of the run.
"""

import pathlib
from typing import Any, NamedTuple

from benchmarks.track.setting import Tier

Changes = dict[str, Any]


class Arm(NamedTuple):
    """A way to train the student, or one of its helpers.

    Attributes:
      changes: fields of the config, by their dotted names.
      model: of `Tier.models`.
      teacher: the arm whose run, of the same seed, is teacher.path; empty is none.
      scorer: likewise objective.select.scorer.
      parent: likewise init.path.
      length: of the run, as a multiple of 20 tokens a parameter.
      steps_of: of `Tier.models`, whose parameters these are; empty is its own model's.
      search: whether it searches a cut of the parent instead of training.
      winner: the arm whose search found the run's model, and its start unless `fresh`.
      answers: flags of lmboost.score, where the teacher answers before the run and is not in memory; None if it is.
      shuffled: whether the entries of each of the teacher's tensors are drawn anew from among themselves: a control.
      until: the share of the run after which it stands, its learning rate that of the whole one; other runs are stages
        that go on from it.
      hub: whether the teacher is SmolLM2-135M, whose tokenizer is another one.
      rises: whether the learning rate begins anew where the parent stands, as in a run of the steps that are left.
    """

    changes: Changes = {}
    model: str = "student"
    teacher: str = ""
    scorer: str = ""
    parent: str = ""
    length: float = 1.0
    steps_of: str = ""
    search: bool = False
    winner: str = ""
    fresh: bool = False
    answers: dict[str, Any] | None = None
    shuffled: bool = False
    until: float = 1.0
    rises: bool = False
    hub: bool = False

    @property
    def needs(self) -> list[str]:
        """The arms whose runs come first."""
        return [arm for arm in (self.teacher, self.scorer, self.parent, self.winner) if arm]

    def fits(self, tier: Tier) -> bool:
        """Whether a tier has what it is about."""
        models = {self.model, self.steps_of or self.model, *(ARMS[arm].model for arm in self.needs)}
        return models <= tier.models.keys() and self.hub <= bool(tier.hub_seq_len)


def _fields(prefix: str, **values: Any) -> Changes:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def _optimizer(name: str, **values: Any) -> Changes:
    return _fields("optimizer", name=name, **values)


# The sweeps begin at these, and change one field after the other; the arms that are compared have what they found.
START = {"learning_rate": 4e-3, "schedule": "cosine", "final_fraction": 0.1, "weight_decay": 0.1}
FOUND = {"learning_rate": 8e-3, "schedule": "linear", "final_fraction": 0.0, "weight_decay": 0.0}
MUON, ADAMW = _optimizer("muon", **FOUND), _optimizer("adamw", **FOUND | {"learning_rate": 4e-3})

SIZES = ("tenth", "fifth", "half")
TEACHER = "half"  # of the arms that do not say which


def kd(weight: float = 0.5, stop: float | str = 0.1, handover: str = "linear", **fields: Any) -> Changes:
    return _fields("objective.kd", weight=weight, stop=stop, handover=handover, **fields)


def align(weight: float = 2.0, stop: float | str = 0.1, **fields: Any) -> Changes:
    return _fields("objective.align", weight=weight, stop=stop, **fields)


def both(stop: float | str = 0.1) -> Changes:
    return kd(stop=stop) | align(stop=stop)


STOP = 0.15  # of the run: the best one, by a teacher of half the size
AUTO = align(stop="auto")


def _helped(changes: Changes, size: str = TEACHER, **fields: Any) -> Arm:
    return Arm(MUON | changes, teacher=f"teacher-{size}", **fields)


def _plain() -> dict[str, Arm]:
    """The optimizers, tuned, and what less or more of the better one brings."""
    lengths = {f"plain-x{length:g}": Arm(MUON, length=length) for length in (0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)}
    return {"plain": Arm(MUON), "adamw": Arm(ADAMW)} | lengths


def _teachers() -> dict[str, Arm]:
    budgets = {"": 1.0, "-short": 0.5, "-long": 2.0}
    return {f"teacher-{size}{n}": Arm(MUON, size, length=length) for size in SIZES for n, length in budgets.items()}


def _stops() -> dict[str, Arm]:
    """Each help alone and both, by each teacher, until each of these fractions of the run."""
    stops = {"tenth": (0.02, 0.05, 0.1), "fifth": (0.05, 0.1, 0.2, 0.4), "half": (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)}
    stops["half-long"] = (0.15, 0.3)
    helps = {"salt": lambda stop: kd(stop=stop), "let": lambda stop: align(stop=stop), "both": both}
    return {
        f"{name}-{size}-{stop:g}": _helped(changes(stop), size)
        for name, changes in helps.items()
        for size in stops
        for stop in stops[size]
    }


def _salt() -> dict[str, Arm]:
    """SALT's weight, hand-over and divergence; RKD, which never ends; its help by tokens."""
    arms = {f"salt-{h}": kd(handover=h) for h in ("hard", "linear_ratio")}
    arms |= {f"salt-hard-{stop:g}": kd(stop=stop, handover="hard") for stop in (0.2, 0.4)}
    arms |= {f"salt-w{weight:g}": kd(weight) for weight in (0.3, 0.7, 0.9)}
    arms |= {"rkd": kd(handover="constant"), "salt-top8": kd(top_k=8), "salt-gate": kd(gate="hard")}
    arms |= {"salt-gate-0.4": kd(stop=0.4, gate="hard"), "salt-soft-gate-0.4": kd(stop=0.4, gate="soft")}
    return {name: _helped(changes) for name, changes in arms.items()}


def _selection() -> dict[str, Arm]:
    """SALT_DS: one of two rows is kept, by a half as long run of the teacher's size.

    Kept without KD it is a control. To keep one of two at random is SALT itself.
    """
    keep = _fields("objective.select", candidates=2, stop=STOP)
    others = {name: keep | {"objective.select.others": name} for name in ("drop", "zero")}
    scorer = f"teacher-{TEACHER}-short"
    arms = {f"salt-ds-{name}": _helped(kd(stop=STOP) | others[name], scorer=scorer) for name in others}
    return arms | {"ds-drop": Arm(MUON | others["drop"], scorer=scorer)}


def _let() -> dict[str, Arm]:
    """LET's six pairings of early, middle and late states, its weight, scale and map."""
    pairs = ("1:last", "half:last", "last:last", "1:1", "half:1", "last:1")
    arms = {f"let-{pair.replace(':', '-')}": align(pairs=pair) for pair in pairs if pair != "half:last"}
    arms |= {f"let-ratio{weight:g}": align(weight) for weight in (0.5, 1.0, 4.0)}
    arms |= {"let-plain0.1": align(0.1, scale="plain"), "let-projection": align(map="projection")}
    arms |= {"let-all": align(pairs="1:1,half:half,last:last"), "let-two": align(pairs="1:half,half:last")}
    arms |= {"let-to-teacher": align(map="student_to_teacher"), "let-centred": align(centre=True)}
    return {name: _helped(changes) for name, changes in arms.items()}


def _auto() -> dict[str, Arm]:
    """Help that ends by itself: by each teacher, by two that know nothing, at less than the whole length; its rule."""
    arms = {"auto": _helped(AUTO), "auto-salt": _helped(kd(stop="auto")), "auto-both": _helped(both("auto"))}
    budgets = [f"{size}-{budget}" for size in SIZES for budget in ("short", "long")]
    arms |= {f"auto-{size}": _helped(AUTO, size) for size in (*SIZES, *budgets) if size != TEACHER}
    arms["auto-untrained"] = _helped(AUTO | {"teacher.random": True})
    arms["auto-shuffled"] = _helped(AUTO, shuffled=True)
    arms["let-untrained"] = _helped(align() | {"teacher.random": True})
    arms["let-shuffled"] = _helped(align(), shuffled=True)
    arms |= {f"auto-x{x:g}": _helped(AUTO, length=x) for x in (0.6, 0.7, 0.8, 0.9)}
    helps = {"let": AUTO, "salt": kd(stop="auto"), "both": both("auto")}
    rules = ((0.5, 0.0), (2.0, 0.0), (0.5, 0.25), (1.0, 0.25), (2.0, 0.25), (1.0, 0.1), (1.0, 0.5), (2.0, 0.5))
    for size in (*SIZES, "half-long"):
        for full, end in rules:
            rule = _fields("objective.auto", full=full, end=end)
            arms |= {f"auto-{help_}-{size}-{full:g}-{end:g}": _helped(helps[help_] | rule, size) for help_ in helps}
    rule = _fields("objective.auto", full=0.5, end=0.0)
    arms["auto-both-gate"] = _helped(both("auto") | rule | {"objective.kd.gate": "hard"})
    return arms


def _inherited() -> dict[str, Arm]:
    """Two thirds and a half of a model's layers, from what it has learned and from scratch, in as many steps."""
    inherit, stack, expand = (MUON | {"init.kind": kind} for kind in ("inherit", "stack", "expand"))
    half = {"model": "half-depth", "steps_of": "student"}
    return {
        "deep": Arm(MUON, "deep", steps_of="student"),
        "inherit": Arm(inherit, parent="deep"),
        "inherit-x1.4": Arm(inherit, parent="deep", length=1.4),  # the FLOPs of "deep"
        "inherit-half": Arm(inherit, parent="deep", **half),
        "inherit-half-spread": Arm(inherit | {"init.layers": "0,2,5"}, parent="deep", **half),
        "half-depth": Arm(MUON, **half),
        "half-depth-x2": Arm(MUON, length=2.0, **half),
        "plain-x2": Arm(MUON, length=2.0),
        "two-layers": Arm(MUON, "two-layers"),
        "two-layers-long": Arm(MUON, "two-layers", length=2.0),
        "stack": Arm(stack, parent="two-layers"),
        "stack-long": Arm(stack, parent="two-layers-long"),
        "stack-x0.8": Arm(stack, parent="two-layers", length=0.8),
        **{f"stack-long-x{x:g}": Arm(stack, parent="two-layers-long", length=x) for x in (0.6, 0.7, 0.8)},
        "expand": Arm(expand, parent="two-layers"),
        "expand-long": Arm(expand, parent="two-layers-long"),
        "half-width": Arm(MUON, "half-width", steps_of="student"),
    }


def _shorter() -> dict[str, Arm]:
    """A larger model's layers, which of them, and how fast these learn, at two fifths of the plain run's length."""
    inherit = MUON | {"init.kind": "inherit"}
    choices = {"": "", "ends": "0-1,4-5", "first3": "0-2,5", "middle": "0,2-3,5", "spread": "0-1,3,5"}
    choices["spread-of-9"] = "0-1,3,5,7-8"  # at micro
    starts = {name: inherit | {"init.layers": layers} for name, layers in choices.items()}
    rates = {
        name: starts["ends"] | {"optimizer.learning_rate": rate} for name, rate in (("slow", 4e-3), ("fast", 1.2e-2))
    }
    long = {"parent": "deep-long", "length": 0.4}
    arms = {
        "deep-long": Arm(MUON, "deep", steps_of="student", length=2.0),
        "inherit-ends": Arm(starts["ends"], parent="deep"),
        "inherit-spread": Arm(starts["spread"], parent="deep"),
        "inherit-spread-of-9": Arm(starts["spread-of-9"], parent="deep"),
        "inherit-long-ends": Arm(starts["ends"], parent="deep-long"),
        "inherit-long-spread": Arm(starts["spread"], parent="deep-long"),
        "inherit-long-spread-x0.3": Arm(starts["spread"], parent="deep-long", length=0.3),
        "inherit-long-spread-x0.5": Arm(starts["spread"], parent="deep-long", length=0.5),
        "inherit-x0.4": Arm(starts[""], parent="deep", length=0.4),
        "inherit-ends-x0.4": Arm(starts["ends"], parent="deep", length=0.4),
        "inherit-long-x0.4": Arm(starts[""], **long),
    }
    arms |= {f"inherit-long-{name}-x0.4": Arm(starts[name], **long) for name in choices if name}
    arms |= {f"inherit-long-ends-{name}-x0.4": Arm(rates[name], **long) for name in rates}
    helped = {"": starts["ends"], "slow-": rates["slow"]}
    arms |= {
        f"inherit-long-ends-{name}salt-x0.4": Arm(start | kd(stop="auto"), teacher="deep-long", **long)
        for name, start in helped.items()
    }
    return arms


def _everything() -> dict[str, Arm]:
    """A start from another model, and help that ends by itself: from a small one that helps, too; from a larger one."""
    stack, inherit = {"init.kind": "stack"}, {"init.kind": "inherit"}
    arms = {"stack-auto": Arm(MUON | stack | AUTO, parent="two-layers", teacher="two-layers")}
    arms["stack-salt"] = Arm(MUON | stack | kd(stop="auto"), parent="two-layers", teacher="two-layers")
    arms["expand-auto"] = Arm(MUON | {"init.kind": "expand"} | AUTO, parent="two-layers", teacher="two-layers")
    arms["auto-two-layers"] = Arm(MUON | AUTO, teacher="two-layers")
    for name, help_ in {"auto": AUTO, "salt": kd(stop="auto"), "both": both("auto")}.items():
        arms[f"inherit-{name}"] = Arm(MUON | inherit | help_, parent="deep", teacher="deep")
    return arms


def _cuts() -> dict[str, Arm]:
    """A large model cut down to the student's size, by search or by its first entries; and the same from scratch.

    Each with and without distillation from the large one, with 2 and with 20 tokens a parameter. The large one has as
    many steps as the student.
    """
    large = {"large": Arm(MUON, "large", steps_of="student")}
    search = {"search": Arm(MUON, parent="large", search=True)}
    distilled = kd(0.7, 1.0, "constant", ce_weight=0.3, temperature=0.9, temperature_on="both")
    starts = {
        "cut": {"winner": "search"},
        "cut-first": {"model": "first", "parent": "large"},
        "cut-shape": {"winner": "search", "fresh": True},
        "small": {},
    }
    shorter = {"cut-x0.4": Arm(MUON, winner="search", length=0.4, steps_of="student")}
    return large | search | shorter | {
        f"{name}{'-kd' if teacher else ''}{'-short' if length < 1 else ''}": Arm(
            MUON | (distilled if teacher else {}) | ({"init.kind": "subnet"} if name == "cut-first" else {}),
            teacher=teacher, length=length, steps_of="student", **start,
        )
        for name, start in starts.items() for teacher in ("", "large") for length in (0.1, 1.0)
        if name != "small" or teacher or length < 1
    }  # fmt: skip


def _disk() -> dict[str, Arm]:
    """The same help by what the teacher has written down, in so many bytes."""
    helps = {"salt": (kd(stop=STOP), {}), "let": (align(stop=STOP), {}), "both": (both(STOP), {})}
    helps |= {"auto": (AUTO, {"until": 0.4}), "salt-draws10": (kd(stop=STOP), {"draws": 10})}
    helps |= {"salt-best10": (kd(stop=STOP, top_k=10), {}), "let-bytes16": (align(stop=STOP), {"state_bytes": 16})}
    return {
        f"disk-{name}": _helped(changes, answers={"until": STOP} | flags) for name, (changes, flags) in helps.items()
    }


def _rounded() -> dict[str, Arm]:
    """The same help by a teacher whose layers multiply numbers of 8 bits."""
    helps = {"salt": kd(stop=STOP), "let": align(stop=STOP)}
    return {
        f"{bits}-{name}": _helped(helps[name] | {"teacher.quantize": bits})
        for bits in ("int8", "float8")
        for name in helps
    }


def _growth() -> dict[str, Arm]:
    """A shallower model that becomes the student after a share of the run: how, when, from what, and with its help."""
    wsd = {"optimizer.schedule": "wsd", "optimizer.decay_fraction": 0.5}
    schedules = {"": MUON, "-wsd": MUON | wsd, "-adamw": ADAMW}
    young = {
        f"young-{small}-{share:g}{schedule}": Arm(changes, small, steps_of="student", until=share)
        for small in ("one-layer", "two-layers") for share in (0.3, 0.5, 0.7) for schedule, changes in schedules.items()
    }  # fmt: skip

    def grown(kind: str, small: str, share: float, schedule: str = "", help: Changes | None = None) -> Arm:
        parent = f"young-{small}-{share:g}{schedule}"
        stage = {"init.kind": "continue", "init.grow": kind}
        return Arm(schedules[schedule] | stage | (help or {}), parent=parent, teacher=parent if help else "")

    kinds = ("stack", "interpose", "zero", "identity", "random")
    arms = {f"grow-{kind}-0.5": grown(kind, "two-layers", 0.5) for kind in kinds}
    arms |= {f"grow-zero-{share:g}": grown("zero", "two-layers", share) for share in (0.3, 0.7)}
    arms |= {f"grow-zero-0.5{schedule}": grown("zero", "two-layers", 0.5, schedule) for schedule in ("-wsd", "-adamw")}
    arms |= {f"grow-one-{kind}-0.5": grown(kind, "one-layer", 0.5) for kind in ("stack", "zero", "identity")}
    helps = {"auto": AUTO, "let": align(stop=0.65), "salt": kd(stop=0.65)}
    arms |= {f"grow-zero-0.5-{n}": grown("zero", "two-layers", 0.5, help=h) for n, h in helps.items()}
    return young | arms | _risen()


def _risen() -> dict[str, Arm]:
    """The same from a shallow run that has come to its end, at a learning rate that rises and falls once more."""
    ages = {(small, share): f"{small}-x{share:g}" for small in ("one-layer", "two-layers") for share in (0.2, 0.3, 0.5)}
    young = {arm: Arm(MUON, small, steps_of="student", length=share) for (small, share), arm in ages.items()}
    adult = {"two-layers-x0.5-adamw": Arm(ADAMW, "two-layers", steps_of="student", length=0.5)}

    def grown(kind: str, parent: str, length: float = 1.0, changes: Changes = MUON, **fields: Any) -> Arm:
        stage = {"init.kind": "continue", "init.grow": kind}
        return Arm(changes | stage, parent=parent, length=length, rises=True, **fields)

    arms = {f"rise-{kind}-0.5": grown(kind, "two-layers-x0.5") for kind in ("stack", "interpose", "zero", "random")}
    arms |= {f"rise-stack-{share:g}": grown("stack", f"two-layers-x{share:g}") for share in (0.2, 0.3)}
    arms |= {f"rise-one-stack-{share:g}": grown("stack", f"one-layer-x{share:g}") for share in (0.3, 0.5)}
    arms["rise-stack-0.5-adamw"] = grown("stack", "two-layers-x0.5-adamw", changes=ADAMW)
    arms["rise-stack-0.5-wsd"] = grown("stack", "young-two-layers-0.5-wsd")
    arms["rise-stack-0.3-x0.8"] = grown("stack", "two-layers-x0.3", 0.8)
    helps = {"auto": AUTO, "let": align(stop=0.65), "salt": kd(stop=0.65)}
    return young | adult | arms | {
        f"rise-stack-0.5-{name}": grown("stack", "two-layers-x0.5", changes=MUON | help_, teacher="two-layers-x0.5")
        for name, help_ in helps.items()
    }  # fmt: skip


def _hub() -> dict[str, Arm]:
    """A model of 135M parameters and another tokenizer, which the student never passes."""
    helps = {"let": align(stop=STOP)} | {f"let-{stop:g}": align(stop=stop) for stop in (0.05, 0.1)}
    helps |= {"alm": kd(stop=STOP, temperature=100.0, temperature_on="both")}
    return {f"smollm2-{name}": Arm(MUON | changes, hub=True) for name, changes in helps.items()}


def _adamw() -> dict[str, Arm]:
    """The papers' own comparison is with AdamW."""
    arms = {"salt": kd(stop=STOP), "let": align(stop=STOP), "both": both(STOP), "auto": AUTO}
    return {f"adamw-{name}": Arm(ADAMW | arms[name], teacher=f"teacher-{TEACHER}") for name in arms}


def _sweeps(name: str) -> dict[str, Arm]:
    """The optimizers' fields: the rate from 4e-3, then one at a time at 8e-3, then what was good together."""
    start = _optimizer(name, **START)
    arms = {f"lr{rate:g}": {"learning_rate": rate} for rate in (2e-3, 4e-3, 8e-3, 1.6e-2)}
    one = {
        "beta0.95": {"b1": 0.95}, "beta0.98": {"b1": 0.98}, "beta2-0.95": {"b2": 0.95}, "beta2-0.99": {"b2": 0.99},
        "decay0": {"weight_decay": 0.0}, "decay0.3": {"weight_decay": 0.3}, "final0": {"final_fraction": 0.0},
        "linear0": {"schedule": "linear", "final_fraction": 0.0}, "warmup2": {"warmup_steps": 53},
        "warmup10": {"warmup_steps": 266}, "clip0": {"clip_norm": 0.0},
    }  # fmt: skip
    arms |= {k: {"learning_rate": 8e-3} | changes for k, changes in one.items()}
    arms |= {
        f"linear0-decay{decay:g}-lr{rate:g}": FOUND | {"weight_decay": decay, "learning_rate": rate}
        for decay, rate in ((0.0, 4e-3), (0.0, 8e-3), (0.0, 1.2e-2), (0.03, 1.2e-2), (0.03, 4e-3), (0.03, 8e-3))
    }
    return {f"{name}-{k}": Arm(start | _fields("optimizer", **changes)) for k, changes in arms.items()}


ARMS: dict[str, Arm] = {
    **_plain(), **_teachers(), "salt": _helped(kd(stop=STOP)), "let": _helped(align(stop=STOP)),
    "both": _helped(both(STOP)), **_stops(), **_salt(), **_selection(), **_let(), **_auto(), **_inherited(),
    **_shorter(), **_everything(), **_cuts(), **_disk(), **_rounded(), **_growth(), **_hub(), **_adamw(),
    **_sweeps("adamw"), **_sweeps("muon"),
}  # fmt: skip
# These have not read the rows in the others' order, but for what becomes the student.
NEEDED = {name for arm in ARMS.values() if arm.changes.get("init.kind") != "continue" for name in arm.needs}

LINE = "line.json"  # in the workdir of a run that is finished: what came out of it


def asked(arm: str) -> dict[str, Any]:
    """What an arm is, as its line has it: what of it is not as in a plain `Arm`.

    That of a run which is finished must be the arm's of today.
    """
    return {name: value for name, value in ARMS[arm]._asdict().items() if value != Arm._field_defaults[name]}


def workdir_of(out: pathlib.Path, tier: str, arm: str, seed: int) -> pathlib.Path:
    """Where a run of an arm is."""
    return out / tier / arm / str(seed)
