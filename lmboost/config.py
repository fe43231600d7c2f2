"""The config tree: every field with its meaning and default, and how a command line fills it.

A recipe in configs/ calls `base()`, sets what it needs and returns the tree. The tree is locked: a field
that does not exist can be neither set in a recipe nor overridden on the command line.
"""

import dataclasses
import importlib.util
import os
import re
import sys
import types
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags

from lmboost import shipped
from lmboost.errors import UserError, nearest, one_of
from lmboost.models.model_config import ModelConfig


def base() -> ConfigDict:
    """All fields of a run, with defaults. Fractions are of `steps` unless said otherwise."""
    c = ConfigDict()
    c.seed = 0  # of the parameters and of the order of the data
    c.steps = 1000  # updates of the parameters, over which fractions of a run are taken
    c.batch_size = 32  # rows that the student trains on in one step, over all devices
    c.seq_len = 512  # tokens of a row
    c.accumulation = 1  # the batch is worked through in this many parts; the result is that of the whole batch

    c.model = model()

    # Where the student starts. Order: own checkpoint in the workdir, resume.path, init.path, random.
    c.resume = ConfigDict({"path": ""})  # a run or checkpoint to go on from: parameters, optimizer, step, data
    c.resume.step = -1  # of a run: which checkpoint; -1 is the last
    c.init = init = ConfigDict()
    init.path = ""  # a run, a checkpoint or hf:DIR whose parameters the student starts with
    init.step = -1  # of a run: which checkpoint; -1 is the last
    # "inherit": layers of a deeper model (Inheritune); "stack": layers, over and over; "expand": each, and behind it
    # copies that add nothing at first, so that the student begins as those layers are (LLaMA Pro); "subnet": layers
    # of a larger model, and of everything in them the first entries, as many as the student has; "continue": the
    # run's optimizer and step, too, so that this one is a stage of it with something changed (lmboost/stages.py)
    init.kind = "copy"
    # "continue", deeper: "stack" (the layers over and over), or behind each layer new ones: "interpose" (copies),
    # "zero" and "identity" (copies, and random ones, that add nothing at first), "random"; their moments begin at zero
    init.grow = ""
    init.layers = ""  # of the parent, counted from 0, as "0-5,8"; empty: the first ones, or all ("stack", "expand")
    init.fresh = ""  # parts that start at random: embedding, positions, final_norm, head (comma between them)

    c.teacher = teacher = ConfigDict()
    teacher.path = ""  # a run directory, a checkpoint, or hf:DIR for one of the Hugging Face Hub; of any tokenizer
    teacher.step = -1  # of a run: which checkpoint; -1 is the last
    teacher.dtype = "bfloat16"  # of its parameters and compute
    # "int8" or "float8": its layers multiply numbers of 8 bits, with a scale for each token and for each output; those
    # of the vocabulary stay in teacher.dtype. Needs qwix: pip install "lmboost[int8]"
    teacher.quantize = "none"
    teacher.random = False  # replace its parameters by random ones: a control, not a method
    # Tokens of its rows, where its tokenizer is another one than the data's: it then reads the same bytes in its own
    # tokens. 0 is as many as the data's first rows have
    teacher.seq_len = 0
    teacher.targets = ""  # a directory by lmboost.score: what the helpers say is read from there, and no helper needed

    c.objective = objective = ConfigDict()
    objective.block_tokens = 0  # tokens, per device, projected to the vocabulary at a time; 0 chooses by its size
    # Projected in blocks of the vocabulary, too, and each one's gradient spread over devices before the next: less
    # memory with a large vocabulary, for a third more FLOPs of the student's head and twice those of the teacher's.
    # Not with kd of some kinds, nor from disk.
    objective.scatter_head = False
    objective.z_loss = 0.0  # weight of log(Z)^2

    # SALT (arXiv 2410.18779): (1 - w) * ce + w * kd while the teacher helps.
    objective.kd = kd = ConfigDict()
    kd.weight = 0.0  # w; 0 is off
    kd.ce_weight = -1.0  # weight of ce beside it; -1 is 1 - w
    # With a teacher of another tokenizer, which has no distribution over the student's tokens, kd compares the
    # likelihoods of chunks of text (ALM, arXiv 2503.20083): then take temperature=100 and temperature_on="both".
    kd.temperature = 1.0
    kd.temperature_on = "teacher"  # or "both": both sides, the term times temperature^2 (of chunks, temperature)
    kd.divergence = "forward"  # KL(teacher || student); "reverse"; "hard": the teacher's best token as label
    kd.top_k = 0  # keep the teacher's k best tokens; 0 is all
    kd.top_p = 1.0  # keep the fewest tokens that hold this probability; 1 is all
    kd.tail = "bucket"  # the other tokens: one bucket on both sides, or "renormalise" the teacher without them
    kd.handover = "hard"  # "linear": w falls to 0; "linear_ratio": w / (1 - w) falls; "constant": to the end (RKD)
    kd.gate = "none"  # "hard": kd only on tokens that the teacher predicts better; "soft": the more, the better
    kd.stop = fraction_or_auto(0.2)  # fraction of the run at which the weight is 0
    kd.decay_from = 0.0  # fraction at which a linear hand-over begins

    # LET (arXiv 2602.05393): a late layer of the teacher guides an early layer of the student.
    objective.align = align = ConfigDict()
    align.weight = 0.0  # 0 is off
    align.scale = "ratio"  # weight is the share of the gradient at the aligned state; "plain": of the loss
    align.pairs = "half:last"  # student:teacher states, comma between pairs; a number of layers, half or last
    align.map = "teacher_to_student"  # interpolate over features; "student_to_teacher", or a learned "projection"
    align.centre = False  # subtract the row's mean state from each side first
    align.final_norm = True  # the teacher's last state is taken after its final norm
    align.stop = fraction_or_auto(0.3)  # fraction of the run at which the weight has fallen linearly to 0

    # stop=auto: help is held while the teacher is ahead on the labels, as much as it is; in nats per token.
    objective.auto = auto = ConfigDict()
    # Of a teacher of another tokenizer it is the lead on the same text, for each of the student's tokens.
    auto.full = 1.0  # lead from which on help has its full weight
    auto.end = 0.25  # lead below which it has ended, for good
    auto.smoothing = 0.95  # of the lead from step to step

    # SALT_DS: train on what is challenging yet learnable for an early checkpoint of the small model. A row's score is
    # the median loss of learnable tokens; of a scorer of another tokenizer it is their loss a byte.
    objective.select = select = ConfigDict()
    select.candidates = 1  # candidate rows for each row of the batch; 1 with fraction 1 is off
    select.fraction = -1.0  # of the candidates that count, at most 1 / candidates; -1 is 1 / candidates
    select.k = 10  # a token is learnable if it is among the scorer's k best
    select.others = "drop"  # other tokens: "drop" them from the median, or count them as "zero"
    select.scorer = ""  # run, checkpoint or hf:DIR that scores; empty is the teacher
    select.scorer_step = -1  # of a run: which checkpoint; -1 is the last
    select.stop = 0.2  # fraction of the run

    # Search of a cut of init.path by lmboost.search ("Where to Begin", arXiv 2510.07227). Choices are given as
    # "FIRST-LAST:STEP,...", as in "64-512:64,768"; empty is the parent's size alone.
    c.search = search = ConfigDict()
    search.params = ""  # the bin that parameters are counted in: "385.1M-425.6M", or "405M+-5%"
    search.granularity = "coarse"  # the first entries of every dimension; "fine": any subset of them
    search.scope = "layerwise"  # each layer has sizes of its own; "uniform": all the same
    search.layers = ""  # choices: how many layers
    search.layer_choice = "any"  # which ones, in their order; "first"
    search.d_model = ""  # choices: features of the residual stream
    search.num_kv_heads = ""  # choices: key/value heads
    search.group_heads = ""  # choices: query heads of each key/value head
    search.head_dim = ""  # choices; with rotary positions their rotated parts must divide that of the largest
    search.mlp_dim = ""  # choices: units of the MLP
    search.sort = "none"  # "activation": the first entries are those with the largest activations on held-out text
    search.method = "evolution"  # "random"
    search.candidates = 512  # that are evaluated, in all
    search.population = 32  # candidates of a generation
    search.elites = 8  # best candidates so far, from which the next generation comes
    search.mutation = 0.15  # probability that a part of a candidate is changed
    search.crossover = 0.5  # share of a generation that has two parents
    search.fresh = 0.1  # share of a generation that is drawn at random
    search.batch = 8  # candidates that are computed at once, on all devices
    search.rows = 32  # of the validation split, seq_len tokens each: the loss on them is a candidate's fitness

    c.optimizer = optimizer = ConfigDict()
    optimizer.name = "adamw"  # adafactor, muon, lion
    optimizer.learning_rate = 3e-4  # at the peak
    optimizer.schedule = "cosine"  # wsd, linear, constant
    optimizer.warmup_steps = 100  # over which the rate rises to its peak
    optimizer.begin = 0  # of a stage: the step at which the schedule begins anew, with its warm-up
    optimizer.final_fraction = 0.1  # learning rate at the end, of the peak
    optimizer.decay_fraction = 0.2  # wsd: fraction of the run that decays
    optimizer.b1 = 0.9  # decay of the first moment (muon: of its momentum; adafactor has none)
    optimizer.b2 = 0.95  # decay of the second moment (lion: of the first; adafactor has one of its own)
    optimizer.eps = 1e-8  # beside the root of the second moment
    optimizer.weight_decay = 0.1  # of matrices; norms and biases have none
    optimizer.decay_embeddings = True  # whether the token and position tables are decayed, too
    optimizer.clip_norm = 1.0  # of the gradient over all parameters; 0 is off

    c.data = data = ConfigDict()
    data.train = ""  # a directory written by lmboost.prepare, or a mixture "DIR1=0.7,DIR2=0.3"
    data.validation = ""  # likewise; empty is the validation split of `train`
    data.skip = ""  # steps whose rows are left out after a loss spike: "1200-1399,2000", as numbered without this field
    data.workers = 0  # processes that read ahead; 0 reads in threads

    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # sizes; -1 takes the devices that are left

    c.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 1000  # steps
    checkpoint.seconds = 0.0  # also when so much time has gone by since the last one; 0 is by steps alone
    checkpoint.keep = 2  # the newest so many
    checkpoint.keep_every = 0  # and for good those of every so many steps; 0 is none
    checkpoint.keep_best = 0  # and the so many with the lowest validation loss, of those that were evaluated
    checkpoint.retry_seconds = 60.0  # after a save that failed
    c.watchdog = ConfigDict({"seconds": 1800.0})  # without progress that end the process with status 76; 0 is never
    c.eval = ConfigDict({"every": 500, "batches": 20})  # steps; 0 is never, batches -1 is the whole split
    c.eval.tasks = ""  # of the lm-evaluation-harness, comma between them: "arc_easy,hellaswag"
    c.eval.tasks_every = 0  # steps; 0 is only at the end
    c.eval.tasks_include = ""  # a directory with tasks of your own (YAML)
    c.log = log = ConfigDict()
    log.every = 10  # steps
    # Where its numbers can be looked at, comma between them: tensorboard, wandb, mlflow, trackio. But for the first one
    # each needs its package, as in pip install "lmboost[wandb]"; metrics.jsonl has every number in any case.
    log.trackers = "tensorboard"
    log.tensorboard = True  # False leaves it out of the trackers: recipes that are older than these say so
    log.project = "lmboost"  # that the run is one of: W&B's and Trackio's project, MLflow's experiment
    log.profile_from = -1  # step at which a profiler trace begins; -1 is none
    log.profile_steps = 5
    c.max_nonfinite = 10  # steps in a row with a non-finite loss or gradient that end the run
    c.lock()
    return c


# Fields that may differ between two starts of one run: they do not change what is computed.
FREE = (
    "mesh", "checkpoint", "watchdog", "log", "data.workers", "max_nonfinite", "resume", "eval",
    "objective.block_tokens", "objective.scatter_head", "search",
)  # fmt: skip


def model(config: ModelConfig | None = None, **changes) -> ConfigDict:
    """A ModelConfig as a config subtree."""
    return ConfigDict(dataclasses.asdict(dataclasses.replace(config or ModelConfig(), **changes)))


def shrink(c: ConfigDict) -> None:
    """Makes a recipe's run last seconds on a CPU; its model is the recipe's to shrink (presets.tiny)."""
    c.update({"steps": 8, "batch_size": 8, "seq_len": 64, "optimizer": {"warmup_steps": 2}})
    c.update({"checkpoint": {"every": 4}, "eval": {"every": 4, "batches": 2}, "log": {"every": 1}})


def fraction_or_auto(default: float) -> FieldReference:
    """A field that holds a fraction of the run, or the word "auto"."""
    return FieldReference(default, field_type=object)


DEFINE = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}


def required(give: str) -> dataclasses.Field:
    """A flag that must be given; `give` says what."""
    return dataclasses.field(metadata={"give": give})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of a verb that takes a recipe, beside those of its fields. A verb that has more of them adds fields."""

    config: str = required("a recipe, as in --config=configs/quickstart.py:plain")
    workdir: str = required("the directory that the run writes to")
    traceback: bool = False  # of a user error; errors.run_verb sees to it


def load(argv: Sequence[str]) -> tuple[ConfigDict, str]:
    """(config, workdir) of `--config=FILE[:VARIANT] --config.a.b=VALUE ... --workdir=DIR`; see `read`."""
    tree, given = read(argv, Flags)
    return tree, given.workdir


def read(argv: Sequence[str], kind: type[Flags]) -> tuple[ConfigDict, Any]:
    """The recipe's tree with the fields that the command line sets, and the other flags, as one of `kind`.

    Values take the type of the field's default. Raises a UserError on an unknown flag or field, naming the nearest
    known one, a value of another type, a flag that is missing, or a recipe that does not load.
    """
    own, fields = flags.FlagValues(), flags.FlagValues()
    overrides, rest = [], []
    for argument in argv:
        (overrides if argument.lstrip("-").startswith(("config.", "noconfig.")) else rest).append(argument)
    for field in dataclasses.fields(kind):
        default = None if field.default is dataclasses.MISSING else field.default
        typed, *_ = get_args(field.type) or [field.type]  # of `float | None`, the first
        DEFINE[typed](field.name, default, "", flag_values=own)
    _parse(own, rest)
    for field in dataclasses.fields(kind):
        if "give" in field.metadata and not own[field.name].value:
            raise UserError(f"--{field.name} is missing: give {field.metadata['give']}.")
    tree = load_recipe(own.config)
    values = flatten(tree)
    overrides = [_checked(argument, values) for argument in overrides]
    config_flags.DEFINE_config_dict("config", tree, flag_values=fields, sys_argv=["", *overrides])
    _parse(fields, overrides)
    return tree, kind(**{name: own[name].value for name in own})


def _parse(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Sets flags as absl does; what it says against one becomes a UserError."""
    try:
        left = values(["", *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        near = nearest(error.flagname, [*values, "help", *(f"config.{name}" for name in flatten(base()))])
        raise UserError(f"unknown flag --{error.flagname}{near}.") from error
    except flags.IllegalFlagValueError as error:  # "flag --NAME=VALUE: " and what int() or float() said
        given = str(error).removeprefix("flag ").removesuffix(f": {error.__context__}")
        flag = values[given[2:].partition("=")[0]]
        expected = "true or false" if flag.boolean else f"a value of type {flag.flag_type()}"
        default = "" if flag.default is None else f", as the default {flag.default!r}"
        raise UserError(f"{given}: expected {expected}{default}.") from error
    except (flags.Error, ValueError) as error:
        raise UserError(f"{error}.") from error
    if left:
        raise UserError(f"unexpected argument {left[0]!r}: flags are given as --name=value.")


def _checked(argument: str, values: dict[str, Any]) -> str:
    """A field's flag, by the name that the field has now. A UserError without such a field, or without a value."""
    flag, equals, value = argument.partition("=")
    field = modern(flag.split("config.", 1)[1])
    if field not in values:
        raise UserError(f"{flag}: the config has no field {field!r}{nearest(field, values)}.")
    if not isinstance(values[field], bool) and (not equals or "noconfig." in flag):  # absl would take the next argument
        kind = type(values[field]).__name__
        raise UserError(f"{flag}: {field} is of type {kind}; give its value, as in --config.{field}=VALUE.")
    if modern(flag) != flag:
        print(f"{flag} is now {modern(flag)}", file=sys.stderr)
    return modern(flag) + equals + value


def modern(name: str) -> str:
    """The name that a field has now, of one in a command line, a manifest.json or a search.json of any age."""
    return re.sub(r"\b(teacher|init|resume)\.from$", r"\1.path", name)


def load_recipe(recipe: str) -> ConfigDict:
    """The config tree of "FILE.py[:VARIANT]", a file or a recipe of ours; a UserError where it does not load."""
    path, _, variant = os.path.expanduser(recipe).partition(":")
    path = shipped.recipe(path, f"--config={recipe}")
    try:
        module = load_module(path)
        tree = module.get_config(variant) if variant else module.get_config()
        if not isinstance(tree, ConfigDict):
            raise TypeError(f"get_config() returns {tree!r}, and not a config.")
        return tree
    except (AttributeError, ImportError, KeyError, SyntaxError, TypeError) as error:
        message = str(error).strip("\"'").replace("\\n", " ").replace("\\'", "'").replace("\n", " ")
        raise UserError(f"--config={recipe} does not load: {message}") from error


def load_module(path: str) -> types.ModuleType:
    """A recipe's file as a module. It may import the recipes beside it, as a script may."""
    spec = importlib.util.spec_from_file_location("lmboost_recipe", path)
    module = importlib.util.module_from_spec(spec)
    beside = os.path.dirname(os.path.abspath(path))
    sys.path.insert(0, beside)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(beside)
    return module


def of_manifest(values: dict[str, Any], where: str) -> ConfigDict:
    """The config in a manifest; a UserError, beginning with `where`, where it is none."""
    try:
        return ConfigDict(values)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: its config is damaged ({error}). Put back the manifest that was written.") from error


def flatten(tree: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of every leaf."""
    out = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {prefix + key: value}
    return out


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """What two configs of one run may not differ in, as lines "field: old -> new".

    A field that the old one does not have, as it was written before there was such a field, has its default; one that
    it has under an older name is that field.
    """
    a, b = flatten(base()) | {modern(name): value for name, value in flatten(old).items()}, flatten(new)
    names = [n for n in sorted({*a, *b}) if not any(n == f or n.startswith(f + ".") for f in FREE)]
    return [f"{n}: {a.get(n)!r} -> {b.get(n)!r}" for n in names if a.get(n) != b.get(n)]


def variants(variant: str, known: Iterable[str]) -> set[str]:
    """The words of a recipe's variant, as {"rkd", "tiny"} of "rkd,tiny".

    Raises a UserError where a word is not one of `known`, or where more than one besides "tiny" is given: these
    are arms of one comparison, and a run is one of them.
    """
    known = list(known)
    words = {one_of("variant", word.strip(), known) for word in variant.split(",") if word.strip()}
    if len(arms := words - {"tiny"}) > 1:
        raise UserError(
            f"variant={variant!r} names several arms ({', '.join(sorted(arms))}): give one, and tiny or not."
        )
    return words
