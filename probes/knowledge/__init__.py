"""What a model knows: answers read out of it, candidates of a fact, and how well it had the chance to learn it."""
