"""Fuzzing of everything that reads a user's files: ``python -m tests.fuzz --help``.

targets    what is fuzzed: a reader, and how its valid inputs are made
mutation   how a valid input is damaged
examine    one input: what a reader may do with it, and what is a failure
campaign   many inputs in processes with limits of time and memory
corpus/    inputs that once failed, by target; the tests run them all
"""
