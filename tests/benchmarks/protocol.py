"""What the programs of the benchmark share: a workload's folder and the answers to the parent.

One JSON object a line on stdin, one a line on stdout:

    {"do": "hello"}                                   -> {}, once the libraries are imported
    {"do": "open", "folder": F, "variant": "eager"}   -> {"name": ..., "threads": ...}
    {"do": "check", "part": P}                        -> {"file": F/....npz}, or null and a "note"
    {"do": "time", "part": P, "repeats": n}           -> {"seconds": [s1, ..., sn]}
    {"do": "run", "part": P, "repeats": n}            -> {"done": n}, untimed
    {"do": "launches", "part": P}                     -> {"n": ...} kernels that a GPU is sent
    {"do": "device_memory"}                           -> {"bytes": ...} most that it has held

A peer is a class whose methods are the parts. Each part has an instance of its own, and so does
each check, which starts from the folder's parameters.
"""

import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WARM_UP_CALLS = 2  # compilation, and memory the allocator keeps


@dataclass(frozen=True)
class PPOSettings:
    clip_eps: float
    value_clip_eps: float
    vf_coef: float
    kl_coef: float
    gamma: float
    lam: float
    epochs: int
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    max_grad_norm: float


@dataclass(frozen=True)
class Workload:
    """workload.json and the folder it came from."""

    folder: Path
    name: str
    vocab_size: int
    d_model: int
    n_layer: int
    n_head: int
    prompt_len: int
    response_len: int
    batch_size: int
    threads: int
    seed: int
    ppo: PPOSettings
    block: str = "gpt2"
    d_ff: int = 0  # 0: 4 d_model

    @classmethod
    def load(cls, folder: Path) -> "Workload":
        fields = json.loads((folder / "workload.json").read_text())
        return cls(**fields | {"folder": folder, "ppo": PPOSettings(**fields["ppo"])})

    def batch(self) -> dict[str, np.ndarray]:
        """The fixed batch: tokens (B, P+R), and (B, R) what the loss holds constant."""
        names = ("tokens", "old_logp", "old_values", "advantages", "returns")
        with np.load(self.folder / "arrays.npz") as file:
            return {name: file[name] for name in names}

    def parameters(self, owner: str) -> dict[str, np.ndarray]:
        """The parameters of the policy, the reference or the reward model by their paths in it."""
        prefix = f"{owner}."
        with np.load(self.folder / "arrays.npz") as file:
            names = [name for name in file.files if name.startswith(prefix)]
            return {name.removeprefix(prefix): file[name] for name in names}


class Peer:
    """One implementation at work on one workload: a subclass's methods are the parts."""

    name: str
    parts = ("loss", "sample", "logprobs", "adamw", "update", "iteration")

    def __init__(self, workload: Workload, variant: str):
        self.workload, self.variant, self.is_warm = workload, variant, False

    def check(self, part: str) -> dict[str, np.ndarray] | str:
        """The results of a part from the initial state, or why there are none."""
        raise NotImplementedError

    def run(self, part: str, repeats: int) -> None:
        for _ in range(repeats):
            getattr(self, part)()

    def wait(self) -> None:
        """Until a GPU has done all that it was sent."""

    def launches(self, part: str) -> int | None:
        """Kernels that a call sends to the GPU; None: nobody can tell."""

    def device_memory(self) -> int | None:
        """Most bytes that the GPU has held for all that this program does."""

    def seconds(self, part: str, repeats: int) -> list[float]:
        """The time of each of `repeats` calls."""
        laps = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            getattr(self, part)()
            self.wait()
            laps.append(time.perf_counter() - start)
        return laps


class Session:
    """Answers to the requests of one parent."""

    def __init__(self, peer_class: type[Peer]):
        self.peer_class = peer_class
        self.peers: dict[str, Peer] = {}  # one for each part that was timed or run

    def answer(self, request: dict) -> dict:
        if request["do"] == "hello":
            return {}
        if request["do"] == "open":
            self.workload = Workload.load(Path(request["folder"]))
            self.variant = request["variant"]
            return {"name": self.new_peer().name, "threads": self.workload.threads}
        if request["do"] == "device_memory":
            return {"bytes": next(iter(self.peers.values())).device_memory()}
        part = request["part"]
        if part not in self.peer_class.parts:
            raise ValueError(f"part: expected one of {self.peer_class.parts}; got {part!r}")
        if request["do"] == "check":
            return self.check(part)
        if part not in self.peers:
            self.peers[part] = self.new_peer()
        peer = self.peers[part]
        if request["do"] == "run":
            peer.run(part, request["repeats"])
            return {"done": request["repeats"]}
        if not peer.is_warm:
            peer.run(part, WARM_UP_CALLS)
            peer.is_warm = True
        if request["do"] == "launches":
            return {"n": peer.launches(part)}
        return {"seconds": peer.seconds(part, request["repeats"])}

    def new_peer(self) -> Peer:
        return self.peer_class(self.workload, self.variant)

    def check(self, part: str) -> dict:
        results = self.new_peer().check(part)
        if isinstance(results, str):
            return {"file": None, "note": results}
        program = Path(sys.argv[0]).stem
        file = self.workload.folder / f"{program}-{self.variant}-{part}.npz"
        np.savez(file, **results)
        return {"file": str(file)}


def serve(peer_class: type[Peer]) -> None:
    """Answer the parent until its end of stdin; what libraries print goes to stderr."""
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        session = Session(peer_class)
        for line in sys.stdin:
            try:
                answer = session.answer(json.loads(line))
            except Exception as error:
                traceback.print_exc()
                sentence = " ".join(str(error).split()) or "no message"
                answer = {"error": f"{type(error).__name__}: {sentence[:300]}"}
            print(json.dumps(answer), file=answers)
