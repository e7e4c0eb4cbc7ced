"""What a model knows: its answers, the right candidate against the others, and how that depends on exposure."""
