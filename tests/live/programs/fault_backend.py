"""A server that answers, dies, resets, stalls or keeps silent, as its request asks.

    fault_backend.py PORT|PATH

It says `listening` and the port when it does. One thread per connection.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import threading
import time

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
FOREVER = 1000


def serve(end: socket.socket) -> None:
    data = b""
    while received := end.recv(4096):
        data += received
        while b"\r\n\r\n" in data:
            head, _, data = data.partition(b"\r\n\r\n")
            path = head.split()[1].decode()
            if path == "/die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif path == "/silent":
                time.sleep(FOREVER)
            elif path == "/reset":
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.close()
                return
            end.sendall(ANSWER)
            if path == "/last":
                time.sleep(FOREVER)
            if path == "/closing":
                end.close()
                return
    end.close()


def main() -> None:
    place = sys.argv[1]
    if place.isdigit():
        listener = socket.create_server(("127.0.0.1", int(place)))
        print("listening", listener.getsockname()[1], flush=True)
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(place)
        listener.listen()
        print("listening", 0, flush=True)
    while True:
        end, _ = listener.accept()
        threading.Thread(target=serve, args=(end,), daemon=True).start()


if __name__ == "__main__":
    main()
