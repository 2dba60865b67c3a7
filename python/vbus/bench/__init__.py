"""Benchmarks: each changes one thing, holds the rest, and runs both sides in one go."""
