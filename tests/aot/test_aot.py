"""What the compiler for TPUs made is read right: what must not be there is seen, and pods, bills and mistakes."""

import json
import re

import pytest

from lmboost import config, sharding
from lmboost.aot import bill, chips, compiler, hlo, step
from lmboost.errors import UserError
from tests.aot.process import python

PROGRAMS = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from lmboost import sharding
from lmboost.aot import compiler, hlo, problems
from lmboost.models.model_config import ModelConfig

log = compiler.compiler_log()
devices = compiler.devices("v5e:2x4")
mesh = sharding.make_mesh(1, 8, 1, devices=devices)
model = ModelConfig(vocab_size=4096, num_layers=6, d_model=256, num_heads=2, num_kv_heads=2, head_dim=128, mlp_dim=1024)

def sharded(shape, *axes, dtype=jnp.bfloat16, mesh=mesh):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

def place(x, *axes, mesh=mesh):
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))

def collectives(fn, *args):
    with jax.set_mesh(mesh):
        return hlo.Program(compiler.compile_text(jax.jit(fn).lower(*args))[1], 8).collectives()

h, table = sharded((32, 512, 256), "fsdp"), sharded((256, 4096), "fsdp")
stack, x = sharded((6, 256, 1024), None, "fsdp"), sharded((2048, 256), "fsdp")

def layers(x, stack, whole):
    if whole:
        stack = place(stack)
    def layer(x, w):
        return jnp.sin(place(x, "fsdp") @ place(w)) @ place(w).T, None
    return jax.lax.scan(layer, x, stack)[0]

out = {}
def found(name, *program):
    cs = collectives(*program)
    out[name] = {
        "logits": [problems.describe(c) for c in cs if problems.moved_logits(c, [model], 1024, mesh)],
        "stacks": [problems.describe(c) for c in cs if problems.moved_stack(c, [model], mesh)],
        "sums": [problems.describe(c) for c in cs if problems.rounded_sum(c, mesh)],
        "gathers": [(c.times, c.bytes) for c in cs if c.kind == "all-gather"],
    }

found("logits", lambda h, w: jnp.sort(place(place(h @ place(w), "fsdp")), axis=0), h, table)
found("head", lambda h, w: jnp.sum(jax.nn.relu(h @ place(w)) ** 2), h, table)
found("stack", lambda x, s: layers(x, s, True), x, stack)
found("layers", lambda x, s: layers(x, s, False), x, stack)

found("rounded", lambda x: place(x.T @ x, "fsdp"), x)
found("largest", lambda x: place(jnp.max(x, axis=0), "fsdp"), x)
found("exact", lambda x: place(jnp.matmul(x.T, x, preferred_element_type=jnp.float32), "fsdp"), x)

out["before"] = compiler.rematerialisations(log)
cube = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=devices)
y = sharded((64, 64, 64), "a", "b", "c", mesh=cube)
twist = lambda y: place(place(jnp.sin(y), ("a", "b", "c"), mesh=cube), None, ("c", "a"), "b", mesh=cube) * 2
with jax.set_mesh(cube):
    jax.jit(twist).lower(y).compile()
out["after"] = compiler.rematerialisations(log)

apart = mesh_utils.create_hybrid_device_mesh((1, 4), (2, 1), compiler.devices("v5e:2x2", 2))
apart = jax.sharding.Mesh(apart, ("slice", "chip"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
z = sharded((512, 512), "slice", "chip", mesh=apart)
with jax.set_mesh(apart):
    text = compiler.compile_text(jax.jit(lambda z: place(z, None, "chip", mesh=apart) * 2).lower(z))[1]
out["between"] = [(c.kind, c.bytes) for c in hlo.Program(text, 8).collectives()]
json.dump(out, sys.stdout)
"""


KERNELS = """
import dataclasses, json, sys
import jax, jax.numpy as jnp
from lmboost import sharding
from lmboost.aot import compiler, hlo
from lmboost.models import attention

compiler.compiler_log()
out = []
for pod, tokens, kind, window in json.loads(sys.argv[1]):
    def loss(q, k, v, segment_ids):
        y = attention.attend(q, k, v, segment_ids, "splash", attention.Rule(window))
        return jnp.sum(y.astype(jnp.float32) ** 2)

    mesh = sharding.make_mesh(1, 1, 1, devices=compiler.devices(pod)[:1])
    like = lambda *shape, kind=kind: jax.ShapeDtypeStruct(shape, kind, sharding=sharding.replicated(mesh))
    given = like(2, tokens, 4, 128), like(2, tokens, 2, 128), like(2, tokens, 2, 128), like(2, tokens, kind="int32")
    with jax.set_mesh(mesh):
        _, text = compiler.compile_text(jax.jit(jax.grad(loss, (0, 1, 2))).lower(*given))
    out.append([dataclasses.astuple(one) for one in hlo.Program(text, 1).attentions()])
json.dump(out, sys.stdout)
"""


@pytest.mark.slow
def test_splash_attention_compiles_in_the_blocks_that_are_chosen():
    pytest.importorskip("libtpu")
    pods = [(pod, 2048, "bfloat16", 0) for pod in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")]
    others = [("v5e:2x2", 2048, "float32", 0), ("v5e:2x2", 1536, "bfloat16", 600)]
    done = python("-c", KERNELS, json.dumps(pods + others))
    assert done.returncode == 0, done.stderr
    *large, small = json.loads(done.stdout)
    for found in large:  # kernel, heads, tokens, block, blocks, times
        assert sorted(found) == [[kernel, 8, 2048, 1024, 3, 1] for kernel in ("dkv", "dq", "fwd")]
    assert {tuple(one[3:5]) for one in small} == {(512, 6)}


@pytest.fixture(scope="module")
def programs():
    """What is found in small programs that do, and do not, what must not be done."""
    pytest.importorskip("libtpu")
    done = python("-c", PROGRAMS, TPU_MIN_LOG_LEVEL="3")  # what a user may have set must not hide anything
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_teacher_of_other_tokens_reads_rows_of_its_own():
    recipe = "configs/let_1p4b.py:tiny"
    c = config.load_recipe(recipe)
    c.teacher.seq_len = 96
    run = step.make_run(c, step.teacher_of(c, recipe), 8)
    text = step.lower(c, run, sharding.make_mesh(), run.spans[0]).as_text()
    assert f"tensor<{c.batch_size}x96xi32>" in text and f"tensor<{c.batch_size}x{c.seq_len}xi32>" in text


def test_a_full_rematerialisation_is_seen(programs):
    assert programs["before"] == []
    assert programs["after"]
    assert all("cannot go from sharding" in line for line in programs["after"])


def test_logits_that_are_moved_are_seen(programs):
    assert programs["logits"]["logits"]
    assert not programs["head"]["logits"]
    assert programs["head"]["gathers"]


def test_layers_that_are_moved_in_one_piece_are_seen(programs):
    assert programs["stack"]["stacks"]
    assert not programs["layers"]["stacks"]


def test_sums_in_bfloat16_are_seen(programs):
    assert programs["rounded"]["sums"]
    assert not programs["exact"]["sums"] and not programs["largest"]["sums"]


def test_bytes_count_with_the_loop_around_them(programs):
    gathers = programs["layers"]["gathers"]
    assert {times for times, _ in gathers} == {6}
    assert sum(received for _, received in gathers) == 256 * 1024 * 2 * 7 // 8


def test_what_slices_exchange_is_seen(programs):
    assert programs["between"] == [["all-gather between slices", 512 * 512 * 2 // 2 // 4]]


def test_no_log_is_no_clean_log(tmp_path):
    with pytest.raises(RuntimeError, match="no log"):
        compiler.rematerialisations(str(tmp_path))


TEXT = """\
HloModule step

%piece (p: bf16[8,64]) -> bf16[64,64] {
  %p = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=3, replica_groups=[4,8]<=[32], dimensions={0}
}

%condition (c: (s32[], bf16[8,64])) -> pred[] {
  %limit = s32[] constant(30)
  %c = (s32[], bf16[8,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (b: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %b = (s32[], bf16[8,64]{1,0}) parameter(0)
  %x = bf16[8,64]{1,0} get-tuple-element(%b), index=1
  %one = bf16[64,64]{1,0} fusion(%x), kind=kCustom, calls=%piece
  %two = bf16[64,64]{1,0} fusion(%x), kind=kCustom, calls=%piece
  %i2 = s32[] get-tuple-element(%b), index=0
  ROOT %t = (s32[], bf16[8,64]{1,0}) tuple(%i2, %x)
}

ENTRY %main (a: bf16[8,64], s: f32[128]) -> f32[128] {
  %a = bf16[8,64]{1,0} parameter(0)
  %s = f32[128]{0} parameter(1)
  %peeled = bf16[64,64]{1,0} fusion(%a), kind=kCustom, calls=%piece
  %first = s32[] constant(1)
  %copied = s32[] copy(%first)
  %start = (s32[], bf16[8,64]{1,0}) tuple(%copied, %a)
  %loop = (s32[], bf16[8,64]{1,0}) while(%start), condition=%condition, body=%body
  %r1 = f32[128]{0} all-reduce(%s), channel_id=1, replica_groups=mesh['x'=4,'y'=8] {'x'}, to_apply=%add
  ROOT %r2 = f32[128]{0} all-reduce(%r1), channel_id=1, replica_groups={}, to_apply=%add
}
"""


def test_pieces_of_one_collective_count_once_and_loops_as_often_as_they_turn():
    peeled, gather, *reduces = hlo.Program(TEXT, 32).collectives()
    assert (gather.kind, gather.group, gather.times, gather.bytes) == ("all-gather", 8, 29, 64 * 64 * 2 * 7 // 8)
    assert peeled.times == 1 and peeled.bytes == gather.bytes  # the loop's first turn, taken out of it
    assert [(r.kind, r.group, r.times, r.bytes) for r in reduces] == [
        ("all-reduce", 4, 1, 2 * 128 * 4 * 3 // 4),
        ("all-reduce", 32, 1, 2 * 128 * 4 * 31 // 32),
    ]


def test_elements_of_tuples_in_the_newer_notation():
    """libtpu of jax 0.12 names them without an instruction."""
    text = re.sub(r"  %\w+ = \S+ get-tuple-element\(.*\n", "", TEXT)
    for name, element in (("%i,", "%c#0,"), ("%x", "%b#1"), ("%i2", "%b#0"), ("all-reduce(%s)", "all-reduce(%loop#1)")):
        assert name in text
        text = text.replace(name, element)
    old, new = hlo.Program(TEXT, 32).collectives(), hlo.Program(text, 32).collectives()
    assert [(one.kind, one.times) for one in new] == [(one.kind, one.times) for one in old]
    assert new[2].operands == (hlo.Array("bf16", (8, 64)),)


def test_cycles_count_with_the_loop_around_them():
    said = ', backend_config={"estimated_cycles":"7","x":{}}'
    text = TEXT.replace("kind=kCustom, calls=%piece", "kind=kCustom, calls=%piece" + said)
    text = text.replace("dimensions={0}", "dimensions={0}" + said.replace("7", "1000"))  # inside of what is fused
    text = text.replace("copy(%first)", "copy(%first)" + said.replace("7", str(2**63 - 1)))  # on a sparse core
    assert hlo.Program(text, 32).cycles() == 7 + 29 * 2 * 7


@pytest.mark.parametrize(
    "name, found",
    [
        ("v5e:4x4", "v5e:4x4"), ("v5e-256", "v5e:16x16"), ("v5litepod-8", "v5e:2x4"), ("v5p-128", "v5p:4x4x4"),
        ("v6e-256", "v6e:16x16"), ("v4-128", "v4:4x4x4"), ("tpu7x-64", "tpu7x:4x4x4"),
    ],
)  # fmt: skip
def test_pods_by_their_size(name, found):
    assert chips.topology(name) == found


@pytest.mark.parametrize(
    "name, says",
    [
        ("v5e:16x15", "did you mean 'v5e:16x16'"), ("v5e-100", "of v5e there are pods of 1, 4, 8, 16"),
        ("v5p-7", "of v5p there are pods of 8, 16"), ("v9-8", "give CHIP:SHAPE, as in v5e:16x16, or CHIP-SIZE"),
    ],
)  # fmt: skip
def test_pods_that_do_not_exist(name, says):
    with pytest.raises(UserError, match=says):
        chips.topology(name)


def test_a_bill():
    chip = chips.CHIPS["v5e"]
    phase = {
        "cycles": 2e9,
        "attention": 1e9,
        "flops": 8 * 197e12,
        "collectives": {"all-gather": 100e9, "all-reduce": 300e9},
    }
    one = bill.of_phase(phase, chip, 8)
    assert one == bill.Bill(2.0, 1.0, 2.0) and one.seconds == 2.0 and one.mfu == 0.5
    assert one.bound == "memory and vector units"
    assert one._replace(network=3.0).bound == "network" and one._replace(matmuls=1.5).bound == "matrix units"


def test_cycles_of_attention():
    small, large = hlo.Attention("fwd", 8, 2048, 512, 10, 1), hlo.Attention("fwd", 8, 2048, 1024, 3, 2)
    known = bill.SCORES["v5e"]
    assert bill.attention_cycles([small], "v5e") == 8 * 10 * known[512][0]
    assert bill.attention_cycles([large], "v5e") == 2 * 8 * 3 * 4 * known[1024][0]
    assert bill.attention_cycles([small, large], "v5e") == sum(
        bill.attention_cycles([x], "v5e") for x in (small, large)
    )
    assert set(bill.SCORES) == set(chips.CHIPS)


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4), ("[2,16]<=[4,8]T(1,0)", 16), ("{}", 32),
        ("mesh['x'=2,'y'=4,'z'=4] {'x','z'}", 8), ("mesh['x'=16,'y'=1,'z'=2], device_ids=([2,16]T(1,0)) {'x'}", 16),
    ],
)  # fmt: skip
def test_groups_in_every_notation(groups, size):
    assert hlo.group_size(f"all-reduce(%x), replica_groups={groups}, to_apply=%add", 32) == size


def test_groups_that_cannot_be_read_are_an_error():
    with pytest.raises(ValueError, match="which devices take part"):
        hlo.group_size("all-reduce(%x), replica_groups=everyone, to_apply=%add", 32)


def test_a_loop_that_cannot_be_counted_is_an_error():
    for known, unknown in (("constant(30)", "parameter(1)"), ("constant(1)", "parameter(2)")):
        with pytest.raises(ValueError, match="how often"):
            hlo.Program(TEXT.replace(known, unknown), 32).collectives()


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--topology=v5e:16x15"], "did you mean 'v5e:16x16'?"),
        (["--topology=v5e:2x4", "--slices=two"], "--slices=two"),
        (["--topology=v5e:2x4", "--phases=last"], "--phases='last' is not known"),
        (["--topology=v5e:2x4", "--teacher=gpt3"], "there is no model 'gpt3'"),
        (["--topology=v5e:2x4", "--config.mesh.fsdp=3"], "mesh.fsdp=3"),
        (["--topology=v5e:2x4", "--config.batch_size=6"], "batch_size=6 is not a multiple"),
    ],
)
def test_mistakes_are_told(flags, says):
    pytest.importorskip("libtpu")
    done = python("-m", "lmboost.aot", "--config=configs/salt_2p8b.py:tiny", *flags)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_recipe_that_does_not_say_its_teacher_needs_one(recipe):
    searched = "configs/subnet_smollm2.py"
    c = config.load_recipe(searched)
    with pytest.raises(UserError, match="--teacher=PRESET"):
        step.teacher_of(c, searched)
    assert step.teacher_of(c, searched, "smollm2-1.7b").d_model == 2048
    assert step.teacher_of(config.load_recipe(recipe), recipe) is None


def test_what_does_not_fit_is_told_with_what_to_do():
    pytest.importorskip("libtpu")
    flags = ("--topology=v5e:2x2", "--config.batch_size=8", "--config.accumulation=1", "--phases=first")
    done = python("-m", "lmboost.aot", "--config=configs/salt_8p6b.py", "--config.mesh.fsdp=4", *flags)
    assert done.returncode == 2, done.stderr
    assert "does not fit into the 16 GiB of a v5e chip" in done.stderr
    assert "model.remat" in done.stderr
    sizes = [float(size) for size in re.findall(r"\n  ([\d.]+) GiB  [a-z]\w+\[[\d,]+\]  \S+", done.stderr)]
    assert len(sizes) == 5 and sizes == sorted(sizes, reverse=True) and sizes[0] > 1
