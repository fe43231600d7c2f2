"""What processes of one run do together, in two real ones with four devices each."""

import socket
import subprocess
import sys

import pytest

from lmboost import config, train
from lmboost.errors import UserError
from lmboost.run import processes
from tests import runs

# Each check runs in both processes; `me` is the number of this one.
CHECKS = '''
import sys
import jax, numpy as np
from jax.sharding import AxisType, Mesh
from lmboost import sharding
from lmboost.run import processes as distributed
from lmboost.errors import Stop, UserError

me, port = int(sys.argv[1]), sys.argv[2]
distributed.start(distributed.Cluster(f"localhost:{port}", num_processes=2, process_id=me))
assert jax.process_count() == 2 and jax.device_count() == 8

# A mesh whose devices are in any order: each process reads its runs of rows, and all of them make up the batch.
order = np.array(jax.devices())[[0, 4, 5, 1, 2, 6, 7, 3]]
mesh = Mesh(order.reshape(4, 2, 1), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
shards, count = sharding.host_share(mesh)
assert count == 8 and shards == ((0, 3, 4, 7), (1, 2, 5, 6))[me], shards
rows = np.arange(16 * 3).reshape(16, 3).astype(np.int32)
local = np.concatenate([rows[2 * shard : 2 * shard + 2] for shard in shards])
everywhere = lambda x, mesh: np.asarray(jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(x))
for batch in (sharding.put_batch({"x": local}, mesh), sharding.put_rows({"x": rows}, mesh)):
    np.testing.assert_array_equal(everywhere(batch["x"], mesh), rows)

# With a tensor axis across the processes both read all rows.
both = np.array(jax.devices()).reshape(2, 4).T
mesh = Mesh(both.reshape(4, 1, 2), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
assert sharding.host_share(mesh) == ((0, 1, 2, 3), 4)
np.testing.assert_array_equal(everywhere(sharding.put_batch({"x": rows}, mesh)["x"], mesh), rows)

# One process's wish is known to both one call later.
wish = distributed.Wish(mesh)
seen = [wish.exchange(me == 1 and step == 2) for step in range(6)]
assert seen == [False, False, False, True, False, False], seen
assert distributed.all_true(True) and not distributed.all_true(me == 0)

# A part that fails in one process ends in both.
for kind, status in ((UserError, 2), (RuntimeError, 1)):
    try:
        with distributed.together("the test"):
            if me == 1:
                raise kind("broken")
        raise AssertionError("no error")
    except (Stop, kind) as error:
        assert str(error) == ("broken" if me else "error: process 1 failed in the test; its own stderr says why.")
        assert me or error.status == status
with distributed.together("the test"):
    pass
print("all well", flush=True)
'''  # fmt: skip


def test_two_processes_agree(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "checks.py").write_text(CHECKS)
    both = [
        subprocess.Popen(
            [sys.executable, tmp_path / "checks.py", str(i), port], env=runs.environment(4), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=200)[0] for process in both]
    assert all("all well" in output for output in outputs), "\n\n".join(outputs)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_processes=2"], "need --coordinator=HOST:PORT"),
        (["--coordinator=here", "--num_processes=2", "--process_id=0"], "--coordinator=here: expected HOST:PORT"),
        (["--coordinator=here:1"], "give the number of processes"),
        (["--coordinator=here:1", "--num_processes=2", "--process_id=2"], "from 0 to one less"),
        (["--coordinator=here:1", "--num_processes=two", "--process_id=0"], "--num_processes=two: .* type int"),
        (["--multihost=yes"], "--multihost=yes: expected true or false"),
        (["--start_timeout=0"], "--start_timeout=0: expected at least 1 second"),
    ],
)
def test_wrong_flags_are_named(recipe, argv, message):
    with pytest.raises(UserError, match=message):
        config.read([f"--config={recipe}", "--workdir=d", *argv], train.Flags)


def test_flags_of_the_cluster_are_beside_the_others(recipe):
    argv = [f"--config={recipe}", "--multihost", "--config.steps=3", "--workdir", "d", "--heartbeat_timeout=7"]
    c, flags = config.read(argv, train.Flags)
    assert flags == train.Flags(config=recipe, workdir="d", multihost=True, heartbeat_timeout=7) and c.steps == 3


def test_alone_nothing_is_asked_of_others(monkeypatch):
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    processes.start(processes.Cluster())
    assert processes.all_true(True) and not processes.all_true(False)
    with pytest.raises(UserError, match="mine"), processes.together("this"):
        raise UserError("mine")
