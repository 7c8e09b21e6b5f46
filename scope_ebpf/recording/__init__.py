"""Recordings: the format on disk, how they are written and how they are read."""
