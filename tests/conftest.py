"""Which tests run: fast ones by default, slow and long ones with --runslow, a repeatable draw of the slow with --slow-sample."""

import os
import random
from importlib.metadata import version

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # processes with as many threads as there are cores wait for each other's threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

# Tests build their models. A test that asks a hub by mistake then fails at once, instead of waiting for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# An example that imports or compiles something takes longer the first time: no time limit on single examples.
# CI draws the same examples each time, so that a commit that passed passes again; elsewhere they are drawn anew.
settings.register_profile("sink_circuits", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI")))
settings.load_profile("sink_circuits")


def pytest_addoption(parser):
    group = parser.getgroup("slow tests")
    group.addoption("--runslow", action="store_true", help="run the tests marked slow too")
    group.addoption("--slow-sample", type=int, default=0, metavar="N", help="run N of the slow tests, drawn by --seed")
    group.addoption("--seed", type=int, default=0, metavar="SEED", help="draws --slow-sample (default: 0)")


def pytest_report_header(config):
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformer-lens", "transformers", "torch"))
    if count := config.getoption("--slow-sample"):
        packages += f"; slow tests: {count} drawn with --seed={config.getoption('--seed')}"
    return packages


def pytest_collection_modifyitems(config, items):
    if config.getoption("--runslow"):
        return
    long = {item.nodeid for item in items if item.get_closest_marker("long")}
    slow = sorted(item.nodeid for item in items if item.get_closest_marker("slow") and item.nodeid not in long)
    count = min(config.getoption("--slow-sample"), len(slow))
    left_out = long | set(slow).difference(random.Random(config.getoption("--seed")).sample(slow, count))
    dropped = [item for item in items if item.nodeid in left_out]
    if dropped:
        items[:] = [item for item in items if item.nodeid not in left_out]
        config.hook.pytest_deselected(items=dropped)
