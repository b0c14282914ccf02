"""The SID rollout engine: trie-constrained answers of L codes, a whole group per prompt in one pass."""
