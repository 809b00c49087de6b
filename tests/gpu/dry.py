"""`pytest -p dry`: what is marked gpu runs on the stand-in, with the kernels on it."""

import os

os.environ["MINIRLHF_BENCH_DEVICE"] = "stand-in"

import devices

from minirlhf import backend

backend.cuda_is_available = lambda: True
devices.arrange()
