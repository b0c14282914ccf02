"""What repair, contrast and drop add to a step: seconds between reward and old log-probs, in a real verl job.

    python benchmarks/hook_overhead.py

64 prompts of 32 rollouts, a small model on the CPU; the hook's work depends on the number of rollouts and not
on the model. It reads one prompt of each group, writes the anchors, completes the pairs and clears the rest.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import record

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "plugin")]

from jobs import RECIPE, Job, recast, succeed  # noqa: E402
from plugin_artifacts import write_artifacts  # noqa: E402

RESULT = Path(__file__).parent / "results" / "hook_overhead.json"
PROMPTS, GROUP = 64, 32


def timings(steps: int) -> list[dict[str, float]]:
    """`timing_s/*` of each step but the first, which compiles and connects."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, tokenizer = write_artifacts(folder)
        (folder / "recipe.yaml").write_text(RECIPE.format(data=data, tokenizer=tokenizer), encoding="utf-8")
        sizes = [f"rl.steps={steps}", f"rl.prompts_per_step={PROMPTS}", f"rl.group_size={GROUP}"]
        done = recast(folder, "train", "recipe.yaml", "out=run", "rl.save_every=-1", *sizes, timeout=1200)
        metrics = succeed(Job(*done, folder / "run")).metrics[1:]
    prefix = "timing_s/"
    return [{k[len(prefix) :]: v for k, v in each.items() if k.startswith(prefix)} for each in metrics]


def main() -> None:
    parser = record.parser(__doc__, RESULT)
    parser.add_argument("--steps", type=int, default=11)
    args = parser.parse_args()

    start = record.before()
    found = timings(args.steps)
    hook = sorted(step["recast_hook"] for step in found)
    share = statistics.median(step["recast_hook"] / step["step"] for step in found)
    median = statistics.median(hook)
    print(
        f"hook: {median:.3f} s a step ({hook[0]:.3f} to {hook[-1]:.3f}, {len(hook)} steps), "
        f"{1e6 * median / (PROMPTS * GROUP):.0f} us a rollout, {share:.1%} of the step"
    )
    facts = {"prompts": PROMPTS, "group": GROUP, "median_s": median, "share_of_step": share, "timings": found}
    record.write(args.result, start, facts)


if __name__ == "__main__":
    main()
