"""Child of test_loss_equality: gradients that verl's own worker computes, under torchrun with any ranks.

`python -m torch.distributed.run --nproc_per_node=R engine_gradients.py CASES.pt OUT.pt MODEL_FOLDER`

CASES.pt holds a list of dicts: `columns` (name -> list of tensors, one for each row in rank-major order),
`extra` (what the trainer sends beside the rows), `actor` (fields of verl's actor config to set). It may hold
`tokenizer`, a folder to whose catalogue this case and all after it are masked, `share`, from which case on
prompts are shared, `on_policy`, and `infer`. OUT.pt gets, for each case, the gradient before every optimiser
step, or with `infer` the log-probs and entropies of every token, then the tokens that each call of the model
read.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

os.environ["VERL_PLATFORM"] = "cpu"

import torch
import verl
from hydra import compose, initialize_config_dir
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss

from verl_recast.catalogue import Catalogue
from verl_recast.masked_actor import mask_engine
from verl_recast.on_policy import with_own_log_probs
from verl_recast.shared_engine import share_engine


def actor_and_model(model: str) -> tuple[Any, Any]:
    """verl's own configuration, composed as a launch script does."""
    fp32 = "{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
    overrides = [
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.model.use_remove_padding=False",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.optim.lr=0",  # every mini-batch is met by the same parameters
        "actor_rollout_ref.actor.optim.weight_decay=0",
        "actor_rollout_ref.actor.optim.clip_grad=1e9",
        "actor_rollout_ref.actor.use_torch_compile=False",
        "actor_rollout_ref.actor.fsdp_config.model_dtype=fp32",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
        f"+actor_rollout_ref.actor.fsdp_config.mixed_precision={fp32}",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.actor.use_kl_loss=False",
        "actor_rollout_ref.actor.entropy_coeff=0",
        "trainer.device=cpu",
    ]
    folder = os.path.join(os.path.dirname(verl.__file__), "trainer", "config")
    with initialize_config_dir(folder, version_base=None):
        config = compose("ppo_trainer", overrides=overrides).actor_rollout_ref
    model_config = omega_conf_to_dataclass(config.model)
    actor = omega_conf_to_dataclass(config.actor)
    actor.model_config = model_config
    return actor, model_config


def whole(gradient: torch.Tensor) -> torch.Tensor:
    """FSDP2 leaves each rank its shard."""
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def main() -> None:
    cases_file, out, model = sys.argv[1:]
    torch.set_num_threads(1)
    actor, model_config = actor_and_model(model)
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model_config,
            engine_config=actor.engine,
            optimizer_config=actor.optim,
            checkpoint_config=actor.checkpoint,
        )
    )
    worker.reset()
    engine, found = worker.engine, []
    step = engine.optimizer_step

    def recorded_step() -> Any:
        gradients = [whole(p.grad) for p in engine.module.parameters() if p.grad is not None]
        found[-1].append(torch.cat([gradient.flatten() for gradient in gradients]).clone())
        return step()

    engine.optimizer_step = recorded_step
    read: list[int] = []
    engine.module.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    rank, ranks, masked = torch.distributed.get_rank(), torch.distributed.get_world_size(), False
    for case in torch.load(cases_file):
        for name, value in case["actor"].items():
            object.__setattr__(actor, name, value)
        loss = partial(ppo_loss, config=actor)
        worker.set_loss_fn(with_own_log_probs(loss) if case.get("on_policy") else loss)
        folder = case.get("tokenizer")
        if folder and not masked:
            mask_engine(engine, Catalogue.load(folder))
            masked = True
        if case.get("share"):
            share_engine(engine)
        read.clear()
        share = len(case["columns"]["input_ids"]) // ranks
        columns = {
            name: torch.nested.as_nested_tensor(rows[rank * share : (rank + 1) * share], layout=torch.jagged)
            for name, rows in case["columns"].items()
        }
        found.append([])
        data = tu.get_tensordict(columns, dict(case["extra"]))
        if case.get("infer"):
            output = worker.infer_batch(data)
            found[-1] += [output[name].unbind() for name in ("log_probs", "entropy")]
            found[-1].append(torch.tensor(read))
        else:
            worker.train_mini_batch(data)
    if rank == 0:
        torch.save(found, out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
