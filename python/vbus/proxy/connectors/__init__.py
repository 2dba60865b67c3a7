"""The guest connectors: the driver side's ends of the environments that host connectors serve."""
