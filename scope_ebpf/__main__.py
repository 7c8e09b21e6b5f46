"""Lets `python -m scope_ebpf` do what the `scope-ebpf` command does."""

from scope_ebpf.cli.main import main

if __name__ == "__main__":
    main()
