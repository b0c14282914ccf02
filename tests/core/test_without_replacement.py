"""Distinct samples against the exact probabilities of drawing items one after another."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from tiny_models import CODES, OFFSETS, PAD, PROMPTS, SIZES, plain_log_probs, plain_trie_log_probs, tiny

from recast_cli.core.seeding import hash64
from recast_cli.core.trie import Trie
from recast_cli.core.without_replacement import DistinctSamples, sample_distinct

# Uneven branches; codes 1 and 4 of level 1 come twice: each place needs noise of its own.
FEW = np.array([[0, 1, 0], [0, 1, 2], [0, 4, 1], [1, 0, 0], [3, 1, 2], [3, 4, 0]])


def keys(num_prompts: int, seed: int = 3) -> np.ndarray:
    return hash64(seed, 1, np.arange(num_prompts))


def draw(model, trie: Trie, prompts=PROMPTS, num_rollouts: int = 8, **options) -> DistinctSamples:
    options = {"keys_B": keys(len(prompts)), "pad_token_id": PAD, **options}
    return sample_distinct(model, trie, OFFSETS, prompts, num_rollouts=num_rollouts, **options)


def item_probs(model, prompt: list[int], catalogue: np.ndarray, temperature: float) -> np.ndarray:
    return np.array(
        [
            np.exp(sum(plain_trie_log_probs(model, prompt, codes, catalogue, temperature)))
            for codes in catalogue
        ]
    )


def ordered_probs(probs: np.ndarray, num_draws: int) -> dict[tuple[int, ...], float]:
    """Every ordered draw without replacement: each item by its share of what is left."""
    out = {}
    for order in itertools.permutations(range(len(probs)), num_draws):
        left, out[order] = 1.0, 1.0
        for item in order:
            out[order] *= probs[item] / left
            left -= probs[item]
    return out


@pytest.mark.parametrize(("temperature", "closed"), [(4.0, []), (1.5, [2])])
def test_ordered_draws_have_exact_probabilities(model, temperature: float, closed: list[int]) -> None:
    """Chi-square over every ordered triple at level 0.001, and each inclusion within 4.5 standard errors."""
    num_draws, prompt = 20_000, PROMPTS[1]
    trie = Trie.from_codes(FEW, SIZES)
    open_rows = [row for row in range(len(FEW)) if row not in closed]
    found = draw(
        model,
        trie,
        [prompt] * num_draws,
        3,
        temperature=temperature,
        exclusion=trie.exclusion([closed] * num_draws),
        token_budget=1 << 18,
    )
    probs = item_probs(model, prompt, FEW[open_rows], temperature)
    assert probs.sum() == pytest.approx(1, abs=1e-5) and probs.max() > 2 * probs.min()
    expected = {
        tuple(open_rows[i] for i in order): num_draws * p for order, p in ordered_probs(probs, 3).items()
    }
    counts = Counter(map(tuple, found.items_BG.tolist()))
    assert set(counts) <= set(expected) and min(expected.values()) > 5
    statistic = sum((counts[order] - count) ** 2 / count for order, count in expected.items())
    assert statistic < chi2.ppf(0.999, df=len(expected) - 1)
    for row in open_rows:
        share = sum(count for order, count in expected.items() if row in order) / num_draws
        observed = float((found.items_BG == row).any(dim=1).double().mean())
        assert observed == pytest.approx(share, abs=4.5 * np.sqrt(share * (1 - share) / num_draws))


def test_perturbed_log_probs_are_the_log_probs_plus_gumbel_noise(model) -> None:
    """Of all items: noise = perturbed - log-prob has the mean and variance of independent Gumbel draws."""
    num_draws, prompt, trie = 20_000, PROMPTS[1], Trie.from_codes(FEW, SIZES)
    found = draw(model, trie, [prompt] * num_draws, len(FEW), temperature=4.0, token_budget=1 << 18)
    order_BG = found.items_BG.argsort(dim=1)
    noise_BN = (found.perturbed_BG - found.trie_log_probs_BGL.double().sum(-1)).gather(1, order_BG).numpy()
    error = np.sqrt(np.pi**2 / 6 / num_draws)  # of a mean
    assert noise_BN.mean(axis=0) == pytest.approx(np.euler_gamma, abs=4.5 * error)
    # the fourth central moment of a Gumbel is 5.4 squared variances: the variance's error is 2.1 / sqrt(n)
    assert noise_BN.var(axis=0) == pytest.approx(np.pi**2 / 6, rel=4.5 * 2.1 / np.sqrt(num_draws))
    correlation = np.corrcoef(noise_BN.T) - np.eye(len(FEW))
    assert np.abs(correlation).max() < 4.5 / np.sqrt(num_draws)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_equal_a_plain_forward(model, trie: Trie, temperature: float) -> None:
    found = draw(model, trie, temperature=temperature)
    for row, place in itertools.product(range(4), range(8)):
        codes = found.codes_BGL[row, place]
        plain = plain_log_probs(model, PROMPTS[row], codes, temperature)
        full = torch.stack([plain[level, OFFSETS[level] + code] for level, code in enumerate(codes)])
        among = torch.tensor(plain_trie_log_probs(model, PROMPTS[row], codes, CODES, temperature))
        torch.testing.assert_close(found.log_probs_BGL[row, place], full, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.trie_log_probs_BGL[row, place], among, atol=1e-5, rtol=0)
        assert CODES[found.items_BG[row, place]].tolist() == codes.tolist()
    assert all(len(set(items)) == 8 for items in found.items_BG.tolist())
    assert bool((found.perturbed_BG.diff(dim=1) <= 0).all())


def test_as_many_as_the_catalogue_gives_every_open_item_once(model, trie: Trie) -> None:
    closed = [[0, 5, 6], [], list(range(20)), [24]]
    found = draw(model, trie, num_rollouts=30, exclusion=trie.exclusion(closed))
    for row, items in enumerate(found.items_BG.tolist()):
        num_open = 25 - len(closed[row])
        assert sorted(items[:num_open]) == [item for item in range(25) if item not in closed[row]]
        assert items[num_open:] == [-1] * (30 - num_open)
        missing = slice(num_open, None)
        assert (found.codes_BGL[row, missing] == -1).all()
        assert found.log_probs_BGL[row, missing].isnan().all()
        assert found.trie_log_probs_BGL[row, missing].isnan().all()
        assert (found.perturbed_BG[row, missing] == -torch.inf).all()
        assert found.log_probs_BGL[row, :num_open].isfinite().all()


def test_draws_depend_neither_on_the_batch_nor_on_how_many(model, trie: Trie) -> None:
    together = draw(model, trie)
    apart = draw(model, trie, token_budget=1)
    assert torch.equal(together.items_BG, apart.items_BG)
    torch.testing.assert_close(together.log_probs_BGL, apart.log_probs_BGL, atol=1e-5, rtol=0)
    order = [2, 0, 3, 1]
    turned = draw(model, trie, [PROMPTS[row] for row in order], keys_B=keys(4)[order])
    assert torch.equal(turned.items_BG, together.items_BG[order])
    assert torch.equal(draw(model, trie, num_rollouts=3).items_BG, together.items_BG[:, :3])
    assert not torch.equal(draw(model, trie, keys_B=keys(4, seed=4)).items_BG, together.items_BG)


def test_no_rollouts_no_prompts_and_wrong_arguments(model, trie: Trie) -> None:
    assert draw(model, trie, num_rollouts=0).codes_BGL.shape == (4, 0, 3)
    assert draw(model, trie, []).items_BG.shape == (0, 8)
    with pytest.raises(ValueError, match="4 prompts, found 3 keys and 8 rollouts"):
        draw(model, trie, keys_B=keys(3))
    with pytest.raises(ValueError, match="temperature must be positive and finite, found 0"):
        draw(model, trie, temperature=0)
    broken = tiny()
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits that are not finite"):
        draw(broken, trie)
