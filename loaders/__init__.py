"""Finds targets, loads and attaches probes, and drains their rings into numpy arrays."""
