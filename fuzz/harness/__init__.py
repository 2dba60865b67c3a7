"""Runs the fuzz targets: finds and builds them, gives them seeds and time, and says how to see a finding again.

A target in Python is a file beside this package with `one(data)`, which raises when something is wrong, and `seeds()`,
which gives valid inputs; one in Rust is a file in `src/bin`. There is nothing else to say about it.
"""
