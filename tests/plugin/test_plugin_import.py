"""What the plugin does to a process, seen from fresh ones."""

from __future__ import annotations

from fresh import run_fresh

IMPORT_VERL = """
import sys, time, json
started = time.perf_counter()
import verl
seconds = time.perf_counter() - started
import torch.distributed as dist
with open(sys.argv[1], "w") as out:
    init = dist.init_process_group.__module__
    json.dump({"seconds": seconds, "modules": sorted(sys.modules), "init": init}, out)
"""

USE_EVERYTHING = """
import sys, json, os
import verl
from verl.plugin.platform import get_platform
platform = get_platform()

from verl.trainer.ppo import core_algos
estimator = core_algos.get_adv_estimator_fn("recast")
from verl.trainer.ppo.v1 import trainer_sync
from verl.trainer.ppo.v1.trainer_base import get_trainer_cls
from verl.workers.rollout.replica import RolloutReplicaRegistry
from verl.workers.rollout.base import get_rollout_class
from verl.workers.engine import EngineRegistry

def name(thing):
    return f"{thing.__module__}.{thing.__qualname__}"

found = {
    "platform": name(type(platform)),
    "estimator": name(estimator),
    "trainer": name(get_trainer_cls("recast")),
    "stock_trainer": name(get_trainer_cls("sync")),
    "replica": name(RolloutReplicaRegistry.get("recast_sid")),
    "rollout": name(get_rollout_class("recast_sid", "async")),
}
if platform.device_name == "cpu":
    found["engines"] = [name(EngineRegistry.get_engine_cls("language_model", b)) for b in ("fsdp", "fsdp2")]
with open(sys.argv[1], "w") as out:
    json.dump(found, out)
"""

PROCESS_GROUP = """
import sys, json, os, socket
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
import verl
import torch
import torch.distributed as dist
from verl.utils import distributed
found = []
for name in ("initialize_global_process_group", "initialize_global_process_group_ray"):
    getattr(distributed, name)()
    total = torch.ones(2)
    dist.all_reduce(total)
    found.append({"backend": dist.get_backend_config(), "sum": total.tolist()})
    distributed.destroy_global_process_group()
with open(sys.argv[1], "w") as out:
    json.dump(found, out)
"""


def test_a_process_that_does_not_use_it_is_left_as_it_was() -> None:
    bare, bare_process = run_fresh(IMPORT_VERL, VERL_USE_EXTERNAL_PLUGINS="none")
    plugged, plugged_process = run_fresh(IMPORT_VERL)
    print(f"import verl: {bare['seconds']:.2f} s without the plugin, {plugged['seconds']:.2f} s with it")
    assert (plugged_process.stdout, plugged_process.stderr) == (bare_process.stdout, bare_process.stderr)
    assert plugged["init"] == bare["init"]  # torch.distributed is not touched
    added = set(plugged["modules"]) - set(bare["modules"])
    assert "verl_recast.import_hooks" in added
    assert not {name for name in added if name.partition(".")[0] in ("torch", "ray", "verl", "transformers")}
    # Only the platform registry is loaded by `import verl` itself: no piece of ours but its own may follow.
    ours = {name for name in added if name.startswith(("verl_recast", "recast_cli"))}
    assert ours <= {
        "verl_recast",
        "verl_recast.actor_options",
        "verl_recast.band",
        "verl_recast.import_hooks",
        "verl_recast.platform",
        "verl_recast.platform.cpu",
    }


def test_every_piece_registers_with_verl_on_the_cpu_platform() -> None:
    found, process = run_fresh(USE_EVERYTHING, VERL_PLATFORM="cpu")
    assert process.returncode == 0, process.stderr[-2000:]
    assert found == {
        "platform": "verl_recast.platform.cpu.PlatformCPU",
        "estimator": "verl_recast.estimator.recast_advantage",
        "trainer": "verl_recast.trainer.PPOTrainerRecast",
        "stock_trainer": "verl.trainer.ppo.v1.trainer_sync.PPOTrainerSync",
        "replica": "verl_recast.rollout.replica.SIDReplica",
        "rollout": "verl_recast.rollout.replica.SIDRolloutAdapter",
        "engines": ["verl_recast.platform.engine.CPUEngine"] * 2,
    }


def test_verls_own_process_group_initialisers_work_on_the_cpu_platform() -> None:
    found, process = run_fresh(PROCESS_GROUP, VERL_PLATFORM="cpu")
    assert process.returncode == 0, process.stderr[-2000:]
    assert found == [{"backend": "cpu:gloo", "sum": [1.0, 1.0]}] * 2
