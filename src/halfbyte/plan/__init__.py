"""Predicts a run's memory and time, and recommends options, from names and shapes alone."""
