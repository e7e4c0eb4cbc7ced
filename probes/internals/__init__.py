"""What happens inside a model: states at chosen tokens, parameters in blocks, moments of states."""
