"""Scores of the benchmarks: pure functions of a prediction and the right answers, one module a benchmark."""
