"""Cost of the actor: the same recorded rollouts through stock GRPO and through ReCast, side by side."""
