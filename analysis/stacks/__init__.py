"""Stacks of Python threads: their functions and lines, and where time went by them."""
