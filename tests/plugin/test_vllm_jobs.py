"""Real verl jobs whose rollouts come from vLLM's CPU build, through the command line."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import GROUP, PROMPTS, RECIPE, STEPS, Job, succeed, train, weights

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

# verl asks vLLM for memory that it frees between phases, and for CUDA graphs: the CPU build has neither.
OVERRIDES = """
ray_cpus: 16
verl:
  actor_rollout_ref.rollout.name: vllm
  actor_rollout_ref.rollout.enforce_eager: true
  actor_rollout_ref.rollout.logprobs_mode: raw_logprobs
  +actor_rollout_ref.rollout.agent.agent_loop_manager_class: verl_recast.rollout.vllm_loop.VLLMLoopManager
  +actor_rollout_ref.rollout.engine_kwargs.vllm.enable_sleep_mode: false
  +actor_rollout_ref.rollout.engine_kwargs.vllm.logits_processors:
    - "verl_recast.rollout.vllm_trie:TrieLogitsProcessor"
  +actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config:
    recast_tokenizer: "{tokenizer}"
"""


@pytest.fixture(scope="module")
def workspace(artifacts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("vllm_jobs")
    base = RECIPE.format(data=artifacts[0], tokenizer=artifacts[1]).replace("ray_cpus: 8\n", "")
    (folder / "recipe.yaml").write_text(base + OVERRIDES.format(tokenizer=artifacts[1]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        yield folder


@pytest.fixture(scope="module", params=["grpo", "recast"])
def job(request: pytest.FixtureRequest, workspace: Path) -> Job:
    return succeed(train(workspace, request.param, f"method.name={request.param}"))


def test_vllm_answers_with_items_from_the_weights_of_the_step(job: Job, workspace: Path) -> None:
    """At the learning rate of these jobs an old weight in vLLM shows in the second step's log-probs."""
    text = (job.out / "rollouts.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line["rollouts"] == PROMPTS * GROUP
        assert line["invalid"] == 0
    assert len(job.metrics) == STEPS
    for found in job.metrics:
        assert found["training/rollout_probs_diff_valid"] == 1
        assert found["training/rollout_probs_diff_max"] < 1e-5
    start, end = weights(workspace / "warm_start" / "model"), weights(job.out / "model")
    assert max(float((start[name] - end[name]).abs().max()) for name in start) > 1e-3
