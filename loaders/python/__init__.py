"""Live CPython processes, looked at from outside: interpreters, threads, frames, tasks."""
