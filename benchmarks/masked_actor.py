"""What a masked actor changes: ReCast's pairs, optimised over the full vocabulary and over the trie.

The setting of learning.py without verl: the same data and sizes, the core's rollouts and pairs, and one plain
optimiser step a mini-batch (ratio 1, no KL term). So it takes minutes, and the arms differ in nothing else.

    python benchmarks/masked_actor.py

B prompts, G rollouts, R rows (pairs), P padded tokens, L levels, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import learning
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import record
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, AutoTokenizer

from recast_cli.core.contrast import select_pairs
from recast_cli.core.masked_policy import mask_answers
from recast_cli.core.sampling import sample
from recast_cli.core.scoring import score_rollouts
from recast_cli.core.seeding import tie_keys, uniforms
from recast_cli.core.trie import Trie
from recast_cli.vocabulary import Vocabulary, encode_prompts

RESULT = Path(__file__).parent / "results" / "masked_actor.json"
EPOCHS, BATCH, WARM_RATE = 4, 32, 1e-3
STEPS, PROMPTS, GROUP, RATE, WARMUP = 30, 64, 32, 1e-4, 5
METRICS = ("target_log_prob", "ndcg@10", "catalogue_mass", "log_prob_in_catalogue")
# Arm -> weight of the negative, masked.
ARMS = {
    f"w-={weight:g}{' masked' * masked}": (weight, masked)
    for weight in (1.0, 0.25)
    for masked in (False, True)
}


class Study:
    """One seed: its data, tokenizer and start."""

    def __init__(self, out: Path, seed: int) -> None:
        self.seed, self.start = seed, out / "start"
        self.data, self.folder = learning.prepare_inputs(out, seed, users=3000, items=100, sparsity=0.9)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder / "model")
        self.vocabulary = Vocabulary.load(self.folder / "vocabulary.json")
        self.trie, self.offsets = Trie.load(self.folder / "trie.npz"), self.vocabulary.level_offsets

    def ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def train_start(self) -> None:
        """Every code and end token of the learned items, at a constant rate, not to convergence."""
        torch.manual_seed(self.seed)
        rng, model = np.random.default_rng(self.seed), _load(self.folder / "model")
        optimizer = torch.optim.AdamW(model.parameters(), lr=WARM_RATE, weight_decay=0.1)
        windows = [self._window(row) for row in _column(self.folder, "sft", "messages")]
        for _ in range(EPOCHS):
            for chosen in np.array_split(rng.permutation(len(windows)), len(windows) // BATCH):
                tokens_RP, mask_RP = _padded([windows[row][0] for row in chosen])
                labels_RP, _ = _padded([windows[row][1] for row in chosen], fill=-100)
                _step(model, optimizer, model(tokens_RP, attention_mask=mask_RP, labels=labels_RP).loss)
        model.save_pretrained(self.start)

    def _window(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        """Tokens and labels (-100: context) of an SFT row."""
        tokens: list[int] = []
        labels: list[int] = []
        for message in messages:
            (ids,) = self.ids([f"<|sid_begin|>{message['content']}<|sid_end|>"])
            tokens += ids
            learned = message["role"] == "assistant"
            labels += [-100, *(ids[1:] if learned else [-100] * (len(ids) - 1))]
        return tokens, labels

    def train(self, w_negative: float, masked: bool) -> Any:
        """The model after `STEPS` updates on the pairs of each step's groups."""
        model, rows = _load(self.start), pq.read_table(self.folder / "verl" / "rl.parquet").to_pylist()
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
        order = np.random.default_rng(self.seed).permutation(len(rows))
        for step in range(1, STEPS + 1):
            optimizer.param_groups[0]["lr"] = RATE * min(1, step / WARMUP)
            places = np.arange((step - 1) * PROMPTS, step * PROMPTS)
            prompts, codes_RL, advantages_R = self._pairs(
                model, [rows[row] for row in order.take(places, mode="wrap")], step, w_negative
            )
            log_probs_RL = self._log_probs(model, prompts, codes_RL, masked)
            _step(model, optimizer, -(advantages_R[:, None] * log_probs_RL).mean())
        return model

    def _pairs(
        self, model: Any, rows: list[dict[str, Any]], step: int, w_negative: float
    ) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
        """Prompts, codes (R, L) and advantages (R,) of the positive and negative of every trainable group."""
        prompts = encode_prompts(self.tokenizer, [row["prompt"] for row in rows])
        index_B = np.array([row["extra_info"]["index"] for row in rows])
        answers = self.ids([row["reward_model"]["ground_truth"] for row in rows])
        targets_BL = np.array(answers) - np.array(self.offsets)
        draws_BGL = uniforms(self.seed, step, index_B, GROUP, learning.LEVELS)
        rollouts = sample(
            model, self.trie, self.offsets, prompts, draws_BGL, pad_token_id=self.vocabulary.pad
        )
        codes_BGL, valid_BG = rollouts.codes_BGL.numpy(), np.ones((len(rows), GROUP), dtype=bool)
        hits_BG, scores_BG = score_rollouts(codes_BGL, targets_BL[:, None], valid_BG[:, :1], valid_BG)
        keys_BG = tie_keys(self.seed, step, index_B, GROUP)
        selection = select_pairs(hits_BG, scores_BG, keys_BG, valid_BG=valid_BG)
        kept: list[tuple[list[int], np.ndarray, float]] = []
        for b in np.flatnonzero(selection.trainable_B):
            positive, negative = selection.positive_B[b], selection.negative_B[b]
            repaired = positive == selection.anchor_B[b]
            kept.append((prompts[b], targets_BL[b] if repaired else codes_BGL[b, positive], 1.0))
            kept.append((prompts[b], codes_BGL[b, negative], -w_negative))
        chosen, codes, advantages = zip(*kept, strict=True)
        return list(chosen), torch.from_numpy(np.stack(codes)), torch.tensor(advantages)

    def _log_probs(
        self, model: Any, prompts: list[list[int]], codes_RL: torch.Tensor, masked: bool
    ) -> torch.Tensor:
        tokens_RL = codes_RL + torch.tensor(self.offsets)
        tokens_RP, mask_RP = _padded(
            [prompt + tokens for prompt, tokens in zip(prompts, tokens_RL.tolist(), strict=True)]
        )
        logits = model(tokens_RP, attention_mask=mask_RP).logits
        ends_R = torch.arange(len(prompts)) * logits.shape[1] + mask_RP.sum(dim=1)
        first_R, flat = ends_R - learning.LEVELS - 1, logits.view(-1, logits.shape[-1])
        if masked:
            mask_answers(flat, self.trie, self.offsets, first_R, codes_RL)
        places_RL = first_R[:, None] + torch.arange(learning.LEVELS)
        return flat[places_RL].log_softmax(-1).gather(2, tokens_RL[..., None])[..., 0]


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def _column(folder: Path, split: str, name: str) -> list[Any]:
    return pq.read_table(folder / "verl" / f"{split}.parquet")[name].to_pylist()


def _padded(rows: list[list[int]], fill: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the right and the mask of what is none, both (R, P)."""
    longest = max(map(len, rows))
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows]), torch.tensor(mask)


def _step(model: Any, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def run_seed(out: Path, seed: int) -> dict[str, pl.DataFrame]:
    """Per-user values of the start and of every arm."""
    study = Study(out, seed)
    study.train_start()
    tables = {"warm start": learning.users_of(study.start, study.data, study.folder, out / "start.parquet")}
    for arm, (w_negative, masked) in ARMS.items():
        folder = out / arm.replace(" ", "-")
        study.train(w_negative, masked).save_pretrained(folder)
        tables[arm] = learning.users_of(folder, study.data, study.folder, out / f"{folder.name}.parquet")
        print(f"seed {seed} {arm}: {learning.difference(tables, arm, 'target_log_prob')}", flush=True)
    return tables


def main() -> None:
    parser = record.parser(__doc__, RESULT)
    parser.add_argument("--out", type=Path, default=Path("runs/masked_actor"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, facts = record.before(), {"seeds": arguments.seeds}
    found = [run_seed(arguments.out / f"seed-{seed}", seed) for seed in arguments.seeds]
    pooled = {name: pl.concat([tables[name] for tables in found]) for name in ("warm start", *ARMS)}
    facts |= {
        name: {arm: {metric: value(arm, metric) for metric in METRICS} for arm in ARMS}
        for name, value in {
            "difference": lambda arm, metric: learning.difference(pooled, arm, metric),
            "per_seed": lambda arm, metric: [learning.difference(tables, arm, metric) for tables in found],
        }.items()
    }
    record.write(arguments.result, start, facts)
    for arm, metrics in facts["difference"].items():
        print(f"{arm:14}", {name: [round(x, 4) for x in interval] for name, interval in metrics.items()})


if __name__ == "__main__":
    main()
