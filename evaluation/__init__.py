"""Answers counted: needles in haystacks, questions by type and mode, benchmarks through lmms-eval."""
