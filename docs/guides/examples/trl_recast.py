"""ReCast under TRL's GRPOTrainer: search wide inside the catalogue, update two rollouts of each group.

    python trl_recast.py --tokenizer data/mine-tokenizer --model runs/mine-warm-start/model --out runs/trl

See docs/guides/trl.md. Shapes: B groups (prompts), G rollouts of a group, L levels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from recast_cli.core.pairs import choose_pairs
from recast_cli.core.sampling import sample
from recast_cli.core.scoring import score_sets
from recast_cli.core.seeding import uniforms
from recast_cli.core.spelling import find_all
from recast_cli.core.trie import Trie
from recast_cli.errors import RecastError, RecipeError
from recast_cli.models import load_model, require_tokenizer
from recast_cli.vocabulary import Vocabulary, encode_prompts

PAIR = 2  # rollouts of a group that the actor sees


def sids_of(texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Codes of the semantic IDs in some texts, each of which may hold several."""
    return [codes for text in texts for codes in find_all(text)]


def kept_hit(completions: list[Any], targets: list[list[str]], **_: Any) -> list[float | None]:
    """Reward that TRL logs: 1 where a kept answer is a target. The advantages come from `choose_pairs`."""
    answers = [find_all(completion[-1]["content"]) for completion in completions]
    return [score_sets(found, sids_of(texts))[0] for found, texts in zip(answers, targets, strict=True)]


class RecastTrainer(GRPOTrainer):
    """GRPOTrainer that is fed the pair of each group, so `num_generations` is 2 and the search width is ours.

    Everything of TRL after the rollout (old and reference log-probs, loss, its divisor, batch sizes) then
    counts kept rollouts. Rows need the columns of `rl_rows`, and every process the whole model.

    Args:
        tokenizer_dir: Folder of `recast build-tokenizer`.
        width: G, rollouts searched for each prompt.
        w_positive, w_negative: Size of the two advantages.

    Raises:
        RecipeError: an option of TRL that would not see pairs.
    """

    def __init__(
        self,
        *,
        tokenizer_dir: Path,
        width: int,
        args: GRPOConfig,
        w_positive: float = 1.0,
        w_negative: float = 1.0,
        **kwargs: Any,
    ) -> None:
        for name, needed in (
            ("num_generations", PAIR),
            ("use_vllm", False),
            ("mask_truncated_completions", False),
        ):
            if (found := getattr(args, name)) != needed:
                raise RecipeError(f"{name} is {found}, needed {needed}", f"set {name}={needed}")
        if (rows := args.per_device_train_batch_size) % PAIR:
            raise RecipeError(
                f"per_device_train_batch_size is {rows}, needed an even number",
                "two rows of a batch are one prompt",
            )
        self.vocabulary = Vocabulary.load(tokenizer_dir / "vocabulary.json")
        self.trie = Trie.load(tokenizer_dir / "trie.npz").to(args.device)
        self.width = width
        self.weights: dict[str, Any] = {"w_positive": w_positive, "w_negative": w_negative}
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir / "model", local_files_only=True)
        super().__init__(
            args=args, reward_funcs=kept_hit, processing_class=tokenizer, rollout_func=self._search, **kwargs
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The one step of TRL that sees a row's target, which `rollout_func` does not."""
        self._inputs = inputs
        batch = super()._generate_and_score_completions(inputs)
        batch["advantages"] = torch.as_tensor(self._pairs.advantages_B2.ravel()).to(batch["advantages"])
        return batch

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: an anchor would count as a hit."""
        raise RecipeError("RecastTrainer cannot evaluate, its rollouts are repaired", "use `recast evaluate`")

    def _search(self, prompts: list[Any], _: GRPOTrainer) -> dict[str, Any]:
        """TRL's `rollout_func`: two answers for each prompt, which comes twice."""
        rows = self._inputs[::PAIR]
        index_B = np.array([row["index"] for row in rows])
        assert [row["index"] for row in self._inputs] == index_B.repeat(PAIR).tolist(), "TRL reordered a pair"
        prompt_ids = encode_prompts(self.processing_class, prompts[::PAIR])
        at = (self.args.seed, self.state.global_step)
        samples = sample(
            self.accelerator.unwrap_model(self.model),
            self.trie,
            self.vocabulary.level_offsets,
            prompt_ids,
            uniforms(*at, index_B, self.width, self.vocabulary.num_levels),
            temperature=self.temperature,
            pad_token_id=self.vocabulary.pad,
        )
        targets = [sids_of(row["targets"]) for row in rows]
        valid_BG = samples.items_BG.numpy() >= 0
        self._pairs = choose_pairs(
            samples.codes_BGL.numpy(), valid_BG, targets, index_B, seed=at[0], step=at[1], **self.weights
        )
        for name, value in self._pairs.signal.items():
            self._metrics["train"][f"signal/{name}"].append(value)

        tokens_B2L = self._pairs.codes_B2L + np.array(self.vocabulary.level_offsets)
        learned_B2L = np.broadcast_to(self._pairs.trainable_B[:, None, None], tokens_B2L.shape)
        flat = (-1, self.vocabulary.num_levels)
        return {
            "prompt_ids": [ids for ids in prompt_ids for _ in range(PAIR)],
            "completion_ids": tokens_B2L.reshape(flat).tolist(),
            "logprobs": None,  # nobody sampled an anchor, so there is no sampling log-prob to correct by
            "env_mask": learned_B2L.reshape(flat).astype(int).tolist(),  # 0: TRL does not learn the token
        }


def rl_rows(tokenizer_dir: Path) -> Dataset:
    """RL rows of a tokenizer folder as TRL reads them: `prompt`, `targets`, `index`."""
    table = pl.read_parquet(tokenizer_dir / "verl" / "rl.parquet").to_dicts()
    truths = [row["reward_model"]["ground_truth"] for row in table]
    return Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "targets": [truth] if isinstance(truth, str) else list(truth),
                "index": row["extra_info"]["index"],
            }
            for row, truth in zip(table, truths, strict=True)
        ]
    )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="ReCast under TRL's GRPOTrainer")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of `recast build-tokenizer`")
    parser.add_argument("--model", type=Path, required=True, help="model that knows it, e.g. a warm start's")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=32, help="prompts of an update")
    parser.add_argument("--width", type=int, default=32, help="rollouts of a group")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--kl-coef", type=float, default=0.001)
    parser.add_argument("--w-negative", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def make_trainer(given: argparse.Namespace) -> RecastTrainer:
    """Trainer of the command line's options."""
    vocabulary = Vocabulary.load(given.tokenizer / "vocabulary.json")
    require_tokenizer(given.model, given.tokenizer)
    config = GRPOConfig(
        output_dir=str(given.out),
        num_generations=PAIR,
        per_device_train_batch_size=PAIR * given.prompts,
        max_completion_length=vocabulary.num_levels,
        max_steps=given.steps,
        learning_rate=given.learning_rate,
        beta=given.kl_coef,
        seed=given.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    return RecastTrainer(
        model=load_model(given.model, vocabulary.vocab_size, str(config.device)),
        args=config,
        train_dataset=rl_rows(given.tokenizer),
        tokenizer_dir=given.tokenizer,
        width=given.width,
        w_negative=given.w_negative,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and leave the model in `OUT/model`."""
    given = arguments(argv)
    trainer = make_trainer(given)
    trainer.train()
    trainer.save_model(str(given.out / "model"))


if __name__ == "__main__":
    try:
        main()
    except RecastError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        raise SystemExit(2) from None
