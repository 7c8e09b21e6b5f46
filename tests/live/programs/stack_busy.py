"""Two threads that never stop: one counts, one goes up and down its stack. A third one waits in C."""

import sys
import threading
import time


def count():
    number = 0
    while True:
        number += 1


def climb(depth):
    return climb(depth - 1) + 1 if depth else 0


def churn():
    depth = 0
    while True:
        depth = (depth * 7 + 3) % 41
        climb(depth)


for target in (count, churn):
    threading.Thread(target=target, name=target.__name__, daemon=True).start()
threading.Thread(target=time.sleep, args=(1000,), name="asleep", daemon=True).start()
print("ready", flush=True)
sys.stdin.read(1)
