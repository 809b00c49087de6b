"""Hypothesis profiles (HYPOTHESIS_PROFILE=dev or ci), markers that skip, and fixtures for all."""

import importlib.util
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: two workers on two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from fakegpu import fakegpu
from hypothesis import HealthCheck, settings

from minirlhf.backend import array_module, cuda_is_available

# No deadline and no "too slow": a busy machine is not a wrong gradient.
PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=25, **PATIENT)
settings.register_profile("ci", max_examples=200, derandomize=True, print_blob=True, **PATIENT)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_collection_modifyitems(items):
    peers = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    needs = {
        "gpu": (cuda_is_available(), "no NVIDIA GPU that cupy can use"),
        "peers": (peers, "torch and transformers are not installed: pip install -e '.[peers]'"),
    }
    for item in items:
        for marker, (present, reason) in needs.items():
            if item.get_closest_marker(marker) and not present:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory):
    """Which rewards were named is remembered in no user's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def names(tmp_path_factory):
    """A file of names to train on, which no test changes."""
    from tiny_run import write_names

    return write_names(tmp_path_factory.mktemp("names") / "names.txt")


@pytest.fixture(
    scope="module",  # Hypothesis calls a test many times, and refuses fixtures made once a call
    params=["numpy", "fakegpu", pytest.param("cupy", marks=pytest.mark.gpu)],
)
def xp_name(request):
    return request.param


@pytest.fixture(scope="module")
def xp(xp_name):
    """Each array module in turn: `xp.asarray(host)` moves there, `to_host(array)` back."""
    if xp_name == "fakegpu":
        return fakegpu
    return array_module("cuda" if xp_name == "cupy" else "cpu")
