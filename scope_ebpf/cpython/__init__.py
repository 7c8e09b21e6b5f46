"""What is known of CPython itself: layouts by version, line tables. No kernel, no process."""
