"""Fuzzing of what reads input from outside: `python -m tests.fuzz TARGET`; the corpus is replayed by the tests."""
