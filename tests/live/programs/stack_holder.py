"""A thread that blocks in a call from C that does not give the GIL away, as some extensions do."""

import ctypes
import os
import threading

reader, writer = os.pipe()
libc = ctypes.PyDLL(None)
buffer = ctypes.create_string_buffer(1)


def hold():
    libc.read(reader, buffer, 1)


print("ready", flush=True)
threading.Thread(target=hold, name="holder", daemon=True).start()
while True:
    pass
