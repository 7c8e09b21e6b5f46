"""Traces running Python services from outside their processes, with eBPF."""
