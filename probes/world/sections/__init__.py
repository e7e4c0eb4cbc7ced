"""The sections of the corpus, one a file. The random streams in use: people's statements 1, sums 2; the next section takes 4."""
