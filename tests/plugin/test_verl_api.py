"""Every symbol of verl and TransferQueue that we touch, so that an upgrade breaks here and not in a run.

What is imported and what is overridden is read from our own source; bodies that ours repeats or relies on are
held by a digest: if one changed, read it against the code named beside it, then take the new digest.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from verl_recast.platform import vllm_cpu

PLUGIN = Path(__file__).parents[2] / "plugins" / "verl_recast"
HOSTS = ("verl", "transfer_queue")
VLLM_IS_HERE = importlib.util.find_spec("vllm") is not None
if VLLM_IS_HERE:
    vllm_cpu.answer_for_vllm()  # verl's modules about vLLM ask for its version when they are imported
NEED_VLLM = ("verl_recast.rollout.vllm_server", "verl_recast.rollout.vllm_trie")


def host_imports() -> Iterator[tuple[str, str]]:
    """(module, name) of everything that the plugin imports from its hosts, also inside functions."""
    for path in sorted(PLUGIN.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in HOSTS:
                yield from ((str(node.module), alias.name) for alias in node.names)


def queue_calls() -> Iterator[str]:
    """Names that are read from `transfer_queue as tq`."""
    for path in sorted(PLUGIN.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tq":
                yield node.attr


def plugin_modules() -> list[str]:
    """All but the CPU engine, which replaces functions of verl when it is imported."""
    found = [module.name for module in pkgutil.walk_packages([str(PLUGIN)], "verl_recast.")]
    return [
        name
        for name in found
        if name != "verl_recast.platform.engine" and (VLLM_IS_HERE or name not in NEED_VLLM)
    ]


def marked(*values: Any, where: str, **options: Any) -> Any:
    """A case that needs vLLM if it is about vLLM's part of a host."""
    return pytest.param(*values, marks=[pytest.mark.vllm] * ("vllm" in where), **options)


def overrides() -> Iterator[tuple[type, type, str]]:
    """(our class, class of the host, method) for every method of the host that ours replaces."""
    for module_name in plugin_modules():
        module = importlib.import_module(module_name)
        for _, ours in inspect.getmembers(module, inspect.isclass):
            if ours.__module__ != module_name:
                continue
            for name in vars(ours):
                theirs = next((base for base in ours.__mro__[1:] if name in vars(base)), None)
                if (
                    theirs is not None
                    and theirs.__module__.split(".")[0] in HOSTS
                    and not name.startswith("__")
                ):
                    yield ours, theirs, name


@pytest.mark.parametrize(
    ("module", "name"), [marked(*found, where=found[0]) for found in sorted(set(host_imports()))]
)
def test_what_is_imported_is_there(module: str, name: str) -> None:
    found = importlib.import_module(module)
    assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize("name", sorted(set(queue_calls())))
def test_what_is_asked_of_the_queue_is_there(name: str) -> None:
    assert callable(getattr(importlib.import_module("transfer_queue"), name))


@pytest.mark.parametrize(
    ("ours", "theirs", "name"),
    [
        marked(*found, where=found[1].__module__, id=f"{found[0].__name__}.{found[2]}")
        for found in overrides()
    ],
)
def test_what_is_overridden_takes_what_the_host_gives(ours: type, theirs: type, name: str) -> None:
    stock, mine = vars(theirs)[name], vars(ours)[name]
    if not callable(stock):
        return
    given = list(inspect.signature(stock).parameters.values())
    positional = [p for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keywords = {p.name: None for p in given if p.kind == p.KEYWORD_ONLY}
    taken = inspect.signature(mine)
    taken.bind(*[None] * len(positional), **keywords)  # all by place
    named = {p.name: None for p in positional[1:]}
    taken.bind(None, **named, **keywords)  # and all by name, as verl's callers do


def test_the_trainer_hooks_are_found() -> None:
    """The list above is built from our classes: it must hold what the method stands on."""
    found = {f"{ours.__name__}.{name}" for ours, _, name in overrides()}
    assert found >= {
        "PPOTrainerRecast._balance_batch",
        "PPOTrainerRecast._compute_old_log_prob",
        "PPOTrainerRecast._update_actor",
        "PPOTrainerRecast._val_metrics_update",
        "GroupLoopWorker.generate_sequences",
        "QuickReplayBuffer._sync_metadata_from_transfer_queue",
        "SIDReplica.launch_servers",
        "SIDRolloutAdapter.update_weights",
    }


@pytest.mark.parametrize(
    ("module", "owner", "names"),
    [
        ("verl.workers.rollout.llm_server", "LLMServerClient", ["_acquire_server", "_release_server"]),
        ("verl.single_controller.base.worker", "Worker", ["_query_dispatch_info"]),
        ("verl.workers.rollout.base", "", ["_ROLLOUT_REGISTRY"]),
    ],
)
def test_what_is_reached_by_name_is_there(module: str, owner: str, names: list[str]) -> None:
    """The rest of what the plugin touches: neither imported, nor overridden."""
    found = importlib.import_module(module)
    holder = getattr(found, owner) if owner else found
    assert [name for name in names if not hasattr(holder, name)] == []


def test_what_the_cpu_engine_replaces_is_there() -> None:
    engine = importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
    build = inspect.signature(engine.FSDPEngineWithLMHead._build_fsdp_module)
    assert list(build.parameters) == ["self", "module"]
    mine = inspect.signature(importlib.import_module("verl_recast.platform.micro_batches").prepare)
    mine.bind(**dict.fromkeys(inspect.signature(engine.prepare_micro_batches).parameters))
    stock = importlib.import_module("verl.utils.torch_functional").logprobs_from_logits_v2
    assert list(inspect.signature(stock).parameters) == ["logits", "labels"]


FSDP = "verl.workers.engine.fsdp.transformer_impl"
# (module, object) -> digest of its source; what of ours stands on it
BODIES = {
    # the hook sits between reward and old log-probs
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._step_once"): "efdd4abe161c",
    # trainer.py repeats it
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._update_actor"): "d7009bd8a69d",
    # trainer.py replaces it
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._balance_batch"): "f9b6e887d750",
    # validation.py reads its columns
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._validate"): "f1d58a70e91d",
    # verl_args.py: a padding row has 128 tokens
    ("verl.trainer.ppo.padding_utils", "construct_minimal_padding_template"): "31f96671a074",
    # loss_scale.py: tokens are counted from loss_mask
    ("verl.workers.engine.fsdp.transformer_impl", "FSDPEngine.forward_backward_batch"): "be92c8d155f0",
    # layout.py: which slice of a rank is which mini-batch
    ("verl.workers.engine_workers", "TrainingWorker.train_mini_batch"): "02b50b03fe7d",
    # loss_scale.py: what losses divide by
    ("verl.workers.utils.losses", "ppo_loss"): "d7c0f8772b44",
    # loss_scale.py: what losses divide by
    ("verl.trainer.ppo.core_algos", "agg_loss"): "fd052ff7eb53",
    # masked_actor.py: where logits become log-probs, and the workers whose engines do it
    (
        "verl.workers.engine.fsdp.transformer_impl",
        "FSDPEngineWithLMHead.prepare_model_inputs",
    ): "e7a30a3b61b5",
    (
        "verl.workers.engine.fsdp.transformer_impl",
        "FSDPEngineWithLMHead.prepare_model_outputs",
    ): "5239f536e8f6",
    ("verl.workers.engine_workers", "ActorRolloutRefWorker.init_model"): "d1598903d824",
    # __init__.py: the config is checked before Ray
    ("verl.trainer.main_ppo", "main"): "eb706c4f6622",
    # rollout/vllm_server.py repeats it, with a sender that does not wait for ever
    ("verl.workers.rollout.vllm_rollout", "ServerAdapter.update_weights"): "db65d1f4e062",
}


def source_of(module: str, name: str) -> str:
    found: Any = importlib.import_module(module)
    for attribute in name.split("."):
        found = getattr(found, attribute)
    return inspect.getsource(inspect.unwrap(found))


@pytest.mark.parametrize(("module", "name"), [marked(*found, where=found[0]) for found in BODIES])
def test_bodies_that_ours_stands_on_are_as_they_were(module: str, name: str) -> None:
    found = hashlib.sha256(source_of(module, name).encode()).hexdigest()[:12]
    assert found == BODIES[module, name], f"{module}.{name} changed: read it against what is named in BODIES"
