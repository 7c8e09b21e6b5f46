"""CPython's own tests of asyncio and contextvars, run at a gate: harmless_suite.py MODULE...

Says `ready`, or `ready without` where this interpreter has no such tests; then tells how many tests ran, and
which did not succeed.
"""

import importlib.util
import io
import json
import sys
import unittest
import warnings

warnings.simplefilter("ignore")
try:
    known = importlib.util.find_spec("test.test_asyncio") is not None
except ImportError:
    known = False
print("ready" if known else "ready without", flush=True)
if known and sys.stdin.read(1):
    suite = unittest.defaultTestLoader.loadTestsFromNames(sys.argv[1:])
    talk = io.StringIO()
    result = unittest.TextTestRunner(stream=talk).run(suite)
    failed = [str(case) for case, _ in (*result.failures, *result.errors)]
    told = {"ran": result.testsRun, "failed": failed, "talk": talk.getvalue()[-2000:]}
    print(json.dumps(told), flush=True)
