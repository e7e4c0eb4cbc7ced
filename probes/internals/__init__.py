"""Parts of a model that probes share: states at chosen tokens, parameters in blocks, moments of states."""
