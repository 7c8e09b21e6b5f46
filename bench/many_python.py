"""A Python among many processes: sleeps ten times a second, for 20 minutes or until its parent ends."""

import ctypes
import signal
import time

SECONDS, PAUSE = 1200, 0.1
PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


def main() -> None:
    """Sleep."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for _ in range(int(SECONDS / PAUSE)):
        time.sleep(PAUSE)


if __name__ == "__main__":
    main()
