"""A server like contexts_asyncio.py on a pool of threads: contexts_threads.py BACK FD PORT THREADS.

One thread waits for requests on all connections and hands each to a ThreadPoolExecutor, whose threads
ask the backend and answer. So a request changes its thread between its first byte and its work.
"""

import http.client
import random
import selectors
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from tests.live.programs.contexts_asyncio import CALLS, HOST, MOST_SLEEP_SECONDS, answer

back = sys.argv[1]
listener = socket.socket(fileno=int(sys.argv[2]))
port = int(sys.argv[3])
kept = threading.local()


def ask(rid, call):
    """One call of the backend."""
    connection = getattr(kept, "connection", None)
    if connection is None or back == "fresh":
        connection = kept.connection = http.client.HTTPConnection(HOST, port)
    connection.request("GET", f"/b/{rid.decode()}/{call}")
    response = connection.getresponse()
    assert response.reason == rid.decode(), (rid, response.reason)
    response.read()
    if back == "fresh":
        connection.close()


def work(connection, rid):
    """One request."""
    try:
        for call in range(CALLS):
            time.sleep(random.random() * MOST_SLEEP_SECONDS)
            ask(rid, call)
        connection.sendall(answer(rid))
    except BaseException as error:
        # nobody waits for its future
        print(repr(error), file=sys.stderr, flush=True)
        raise


def main():
    """Wait for connections and requests."""
    pool = ThreadPoolExecutor(int(sys.argv[4]))
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                selector.register(connection, selectors.EVENT_READ)
                continue
            asking = key.fileobj
            assert isinstance(asking, socket.socket)
            data = asking.recv(65536)
            if data:
                pool.submit(work, asking, data.split(b" ")[1][3:])
            else:
                selector.unregister(asking)
                asking.close()


main()
