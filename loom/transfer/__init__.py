"""Moving in and out: a reader makes rows of a source, a stage holds them, a writer writes them, a verifier compares."""
