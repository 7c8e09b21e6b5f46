"""HTTP over TLS: a server and clients that ask it, and notes of who asked what over which ports.

    tls.py blocking|asyncio CERTIFICATE       a server in a child process, and clients
    tls.py client PORT                        clients of a server that runs already

Several connections take turns in one thread, so that what is next to each other need not belong together.
Answers are longer than a TLS record, and the blocking client reads them in small pieces.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import sys
from typing import Any

CONNECTIONS, REQUESTS = 5, 23
ROUNDS = 2  # of new connections, whose SSL objects may get the addresses of the ones before
BODY_BYTES = 20_011
PIECE_BYTES = 4_001
Note = dict[str, Any]


def request(name: str) -> bytes:
    return f"GET /{name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def answer(asked: bytes) -> bytes:
    name = asked.split()[1].decode()
    body = name.ljust(BODY_BYTES, ".")
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def contexts(certificate: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    client, server = (
        ssl.SSLContext(side) for side in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER)
    )
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    if certificate:
        server.load_cert_chain(certificate)
    return client, server


def length_of(head: bytes) -> int:
    """Of a whole answer, from its head."""
    before, end, _ = head.partition(b"\r\n\r\n")
    size = next(
        line for line in before.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    return len(before) + len(end) + int(size.split(b":")[1])


def serve(listener: socket.socket, context: ssl.SSLContext) -> None:
    """One thread for all connections, as they ask."""
    for _ in range(ROUNDS):
        ends = [
            context.wrap_socket(listener.accept()[0], server_side=True) for _ in range(CONNECTIONS)
        ]
        for _ in range(REQUESTS):
            for end in ends:
                end.sendall(answer(end.recv(1000)))
        for end in ends:
            assert end.recv(1000) == b""
            end.close()


def ask(port: int, context: ssl.SSLContext) -> list[Note]:
    notes = []
    for turn in range(ROUNDS):
        ends = []
        for _ in range(CONNECTIONS):
            plain = socket.create_connection(("127.0.0.1", port))
            ends.append(context.wrap_socket(plain, server_hostname="localhost"))
        for number in range(REQUESTS):
            for place, end in enumerate(ends):
                name = f"{turn}-{place}-{number}"
                end.sendall(request(name))
                got = end.recv(PIECE_BYTES)
                left = length_of(got) - len(got)
                while left:
                    piece = end.recv(PIECE_BYTES)
                    assert piece
                    left -= len(piece)
                notes.append({"name": name, "client": end.getsockname()[1], "server": port})
        for end in ends:
            end.close()
    return notes


async def serve_async(listener: socket.socket, context: ssl.SSLContext) -> None:
    left = CONNECTIONS * ROUNDS
    done = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal left
        for _ in range(REQUESTS):
            writer.write(answer(await reader.readuntil(b"\r\n\r\n")))
            await writer.drain()
        await reader.read()
        writer.close()
        left -= 1
        if not left:
            done.set()

    server = await asyncio.start_server(handle, sock=listener, ssl=context)
    await done.wait()
    server.close()


async def ask_async(port: int, context: ssl.SSLContext) -> list[Note]:
    notes: list[Note] = []

    async def talk(turn: int, place: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        own = writer.get_extra_info("sockname")[1]
        for number in range(REQUESTS):
            name = f"{turn}-{place}-{number}"
            writer.write(request(name))
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(length_of(head) - len(head))
            notes.append({"name": name, "client": own, "server": port})
        writer.close()
        await writer.wait_closed()

    for turn in range(ROUNDS):
        await asyncio.gather(*(talk(turn, place) for place in range(CONNECTIONS)))
    return notes


def gate() -> None:
    print("ready", flush=True)
    sys.stdin.read(1)


def main() -> None:
    kind, argument = sys.argv[1:]
    if kind == "client":
        client, _ = contexts("")
        gate()
        print(json.dumps(ask(int(argument), client)), flush=True)
        return
    client, server = contexts(argument)
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    port = listener.getsockname()[1]
    child = os.fork()
    if child == 0:
        if kind == "blocking":
            serve(listener, server)
        else:
            asyncio.run(serve_async(listener, server))
        os._exit(0)
    gate()
    notes = ask(port, client) if kind == "blocking" else asyncio.run(ask_async(port, client))
    assert os.waitpid(child, 0)[1] == 0
    print(json.dumps(notes), flush=True)


if __name__ == "__main__":
    main()
