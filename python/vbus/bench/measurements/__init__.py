"""The measurements, one module each: `MEASUREMENT` in a module is what the harness runs."""
