"""MaxText's training step as its own train_compile makes it, judged by lmboost.aot; run where both are installed.

    python maxtext_peer.py TOPOLOGY OUT.json FIELD=VALUE...

TOPOLOGY is MaxText's name of a pod, fields are those of its base.yml. Writes what `lmboost.aot` writes of a phase.
"""

import importlib.util
import json
import os
import pathlib
import sys

import jax
from maxtext.configs import pyconfig
from maxtext.trainers.pre_train import train, train_compile
from maxtext.utils import maxtext_utils, sharding

from lmboost.aot import bill, hlo
from lmboost.aot.compiler import compile_text, compiler_log, libtpu_version, memory_of

HERE = pathlib.Path(importlib.util.find_spec("maxtext").origin).parent
FIELDS = {
    "run_name": "peer", "enable_checkpointing": False, "dataset_type": "synthetic", "skip_jax_distributed_system": True,
    "compile_topology_num_slices": 1, "base_output_directory": "/nowhere", "opt_type": "adamw",
}  # fmt: skip


def lowered(topology: str, fields: list[str]):
    """(its step before the compiler, number of devices), by the same calls as in train_compile's main."""
    given = [f"{name}={value}" for name, value in FIELDS.items()]
    config = pyconfig.initialize(["", str(HERE / "configs/base.yml"), *given, f"compile_topology={topology}", *fields])
    mesh = train_compile.get_topology_mesh(config)
    args, kwargs, state, _, model = train_compile.get_shaped_inputs(mesh, config)
    params, state = sharding.maybe_update_params_sharding_with_opt(config, state)
    asked = sharding.build_zero1_input_state_mesh_shardings(config, state, params)
    data = sharding.get_input_data_sharding(config, mesh)
    step, inputs, outputs, static, donated = maxtext_utils.get_functional_train_with_signature(
        train.train_step, data, asked, model, config, params
    )
    with jax.set_mesh(mesh), train_compile.axis_rules(config.logical_axis_rules):
        jitted = jax.jit(
            step, in_shardings=inputs, out_shardings=outputs, static_argnums=static, donate_argnums=donated
        )
        return jitted.lower(*args, **kwargs), mesh.size


def main(topology: str, out: str, *fields: str) -> None:
    compiler_log()  # before libtpu is loaded
    jax.config.update("jax_default_prng_impl", "unsafe_rbg")  # as train_compile has it
    os.environ["LIBTPU_INIT_ARGS"] = "--xla_tpu_spmd_rng_bit_generator_unsafe=true"
    before, num_devices = lowered(topology, fields)
    compiled, text = compile_text(before)
    program = hlo.Program(text, num_devices)
    found = {
        "jax": jax.__version__, "libtpu": libtpu_version(), "memory": memory_of(compiled), "cycles": program.cycles(),
        "attention": bill.attention_cycles(program.attentions(), topology.partition("-")[0]),
        "received": sum(one.times * one.bytes for one in program.collectives()),
    }  # fmt: skip
    pathlib.Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
