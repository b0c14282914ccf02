"""One update a batch: the old log-probs are those of the update's own forward pass.
`+actor_rollout_ref.rollout.custom.on_policy=true`.

The first update of a batch meets the policy that its old log-probs belong to. Their ratio to the update's own
is 1 wherever a loss forms it, and only its gradient counts, in which old log-probs are constants. So the
loss's own log-probs, detached, give the same gradient, and the pass over the batch that computes old ones
falls away. A second update would meet another policy: it is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from verl_recast.actor_options import extend_workers, require

OPTION = "on_policy"


def require_one_update(config: Any) -> None:
    """Refuse what asks old log-probs of something else than the ratio of a batch's only update.

    Args:
        config: verl's, whole.

    Raises:
        ValueError: naming the option, the value found and the value needed.
    """
    worker, algorithm = config.actor_rollout_ref, config.algorithm
    actor, batch = worker.actor, config.data.train_batch_size
    correction = algorithm.get("rollout_correction") or {}
    correcting = [name for name in ("rollout_is", "rollout_rs") if correction.get(name) is not None]
    correcting += ["bypass_mode"] * bool(correction.get("bypass_mode"))
    mini, compared = actor.ppo_mini_batch_size, worker.rollout.calculate_log_probs
    alone, first = "False (no log-probs to compare with)", "it comes before"
    prefix, named = "actor_rollout_ref", f"algorithm.rollout_correction.{(correcting or [''])[0]}"
    require(
        OPTION,
        [
            (mini == batch, f"{prefix}.actor.ppo_mini_batch_size", mini, f"data.train_batch_size={batch}"),
            (actor.ppo_epochs == 1, f"{prefix}.actor.ppo_epochs", actor.ppo_epochs, "1"),
            (not compared, f"{prefix}.rollout.calculate_log_probs", compared, alone),
            (not algorithm.use_kl_in_reward, "algorithm.use_kl_in_reward", True, f"False ({first})"),
            (not correcting, named, "set", f"null ({first})"),
        ],
    )


def detach_workers(worker_class: Any) -> None:
    """Make verl's actor take old log-probs from its own forward pass where the rollout config asks for it."""
    extend_workers(worker_class, OPTION, lambda _: None, _detach)


def _detach(_: Any, worker: Any) -> None:
    if worker.loss_fn is not None:  # the reference learns nothing
        require_no_dropout(worker.engine.module)
        worker.set_loss_fn(with_own_log_probs(worker.loss_fn))


def with_own_log_probs(loss: Callable[..., Any]) -> Callable[..., Any]:
    """A loss of verl's whose old log-probs are the detached ones of the forward pass that it is given."""

    def on_policy(model_output: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        from verl.workers.utils.padding import response_from_nested

        own = model_output["log_probs"].detach()
        data = data.copy()
        data["old_log_probs"] = response_from_nested(own, data["response_mask"])
        return loss(*args, model_output=model_output, data=data, **kwargs)

    return on_policy


# Rates of a config; those of heads that a language model does not have are set by default in some.
_RATES = ("dropout", "pdrop", "dropout_prob", "router_jitter_noise")
_UNUSED = ("classifier_", "summary_")


def require_no_dropout(module: torch.nn.Module) -> None:
    """Refuse a model that is another one while it learns.

    Raises:
        ValueError: naming what drops out.
    """
    config = getattr(module, "config", None)
    named = [name for name in dir(config) if name.endswith(_RATES) and not name.startswith(_UNUSED)]
    rates = {name: getattr(config, name) for name in named}
    rates |= {name: each.p for name, each in module.named_modules() if isinstance(each, torch.nn.Dropout)}
    found = next(((name, rate) for name, rate in rates.items() if isinstance(rate, float) and rate > 0), None)
    if found is not None:
        raise ValueError(
            f"rollout.custom.{OPTION}: {found[0]} of the model is {found[1]}, needs 0: old log-probs are of "
            "the model without dropout"
        )
