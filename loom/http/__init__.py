"""What every request passes: the application, parsing, answers, problems, headers, idempotency keys, waiting."""
