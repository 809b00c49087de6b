"""The benchmark's own side: the package's ordinary functions as a program like every peer's."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import fields

import devices
import numpy as np
from protocol import Peer, Workload, serve
from workloads import SGEMM_SIZE, gpt_of, tree_of

from minirlhf import __version__
from minirlhf.backend import Array, get_xp, to_device, to_host
from minirlhf.crew import side_by_side
from minirlhf.memory import keep_freed_memory
from minirlhf.nn.sampling import Generation, generate
from minirlhf.nn.transformer import GPTConfig
from minirlhf.runs.metrics import iteration_metrics
from minirlhf.train.batches import Batch
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.policy import policy_forward
from minirlhf.train.ppo import Experience, Iteration, Task, minibatch_gradients, train_ppo
from minirlhf.train.reward_model import RewardModel, score_responses
from minirlhf.train.rollout import Samples
from minirlhf.train.sampler import sample_responses
from minirlhf.train.settings import OptimizerConfig, PPOConfig
from minirlhf.tree import Tree, tree_items, tree_map
from minirlhf.workers import map_over, share_packed

NO_STOP, PAD = -1, 0  # ids: nothing stops early, nothing is padded


class MiniRLHF(Peer):
    parts = (*Peer.parts, "sgemm")
    _at_work: contextlib.ExitStack | None = None  # the workers, which serve every instance

    def __init__(self, workload: Workload, variant: str):
        super().__init__(workload, variant)
        w, s = workload, workload.ppo
        if devices.DEVICE == "cpu":
            self._begin_work(w)
        else:
            devices.arrange()
            os.environ["MINIRLHF_KERNELS"] = "0" if variant == "plain" else "1"
        self.name = f"minirlhf {__version__}"
        self.config = gpt_of(w)
        rates = {f.name: getattr(s, f.name) for f in fields(OptimizerConfig) if hasattr(s, f.name)}
        of_ppo = {f.name: getattr(s, f.name) for f in fields(PPOConfig) if hasattr(s, f.name)}
        self.settings = PPOConfig(
            iterations=1 << 40,  # as many as are asked for
            batch_size=w.batch_size,
            minibatches=1,
            optimizer=OptimizerConfig(schedule="constant", **rates),
            **of_ppo,
        )
        arrays = w.batch()
        self.prompts = arrays["tokens"][:, : w.prompt_len].tolist()
        weights = np.full_like(arrays["returns"], 1 / arrays["returns"].size)
        arrays, weights = there(arrays), there(weights)
        self.batch = self._batch(arrays["tokens"])
        names = ("old_logp", "old_values", "advantages", "returns")
        self.experience = Experience(
            batch=self.batch,
            ref_logp=arrays["old_logp"],
            ref_logits=None,
            weights=weights,
            kl_loss_coef=0.0,
            **{name: arrays[name] for name in names},
        )
        self.rng = np.random.default_rng(w.seed)
        _, self.policy = share_packed(there(tree_of(w.parameters("policy"))))
        self.has_gradient = False

    @classmethod
    def _begin_work(cls, w: Workload) -> None:
        """A worker for each thread."""
        from threadpoolctl import threadpool_limits

        if cls._at_work is None:
            cls._at_work = contextlib.ExitStack()
            cls._at_work.enter_context(threadpool_limits(1))
            cls._at_work.enter_context(side_by_side(w.threads))

    @classmethod
    def dismiss(cls) -> None:
        """Let the workers go."""
        cls._at_work, at_work = None, cls._at_work
        if at_work is not None:
            at_work.close()

    # -- parts

    def sgemm(self) -> None:
        """A product of square matrices, the most that the BLAS does here on all threads."""
        from threadpoolctl import threadpool_limits

        with threadpool_limits(self.workload.threads):
            a, b, out = self._matrices
            np.matmul(a, b, out=out)

    def loss(self) -> Tree:
        return minibatch_gradients(
            self.policy, self.experience, config=self.config, settings=self.settings
        ).gradients

    def sample(self) -> Generation:
        P, R = self.workload.prompt_len, self.workload.response_len
        return generate(
            self.policy["transformer"],
            tokens=self.batch.tokens[:, :P],
            mask=self.batch.mask[:, :P],
            config=self.config,
            max_new=R,
            stop_id=NO_STOP,
            pad_id=PAD,
            rng=self.rng,
        )

    def logprobs(self) -> Array:
        groups = self.batch.groups(size=0, config=self.config)
        f = functools.partial(_logprobs, self.reference, self.config)
        parts = map_over(f, [self.batch.part(rows) for rows in groups])
        if devices.DEVICE != "cpu":  # one group of all rows
            return parts[0]
        logp = np.empty(self.batch.responses.shape, np.float32)
        logp[np.concatenate(groups)] = np.concatenate(parts)
        return logp

    def adamw(self) -> None:
        if not self.has_gradient:
            leaves = [g.reshape(-1) for _, g in tree_items(self.loss())]
            get_xp(*leaves).concatenate(leaves, out=self.optimizer.dflat)
            self.has_gradient = True
        self.optimizer.move(self.optimizer.config.learning_rate, there(np.zeros(2)))

    def update(self) -> None:
        """One step of the optimiser on the fixed batch."""
        opt, same = self.optimizer, {"config": self.config, "settings": self.settings}
        step = minibatch_gradients(opt.params, self.experience, **same)
        opt.step(step.gradients, loss=step.loss, parts=step.parts)

    def iteration(self) -> None:
        iteration_metrics(next(self.loop), settings=self.settings, stop_id=NO_STOP)

    def train(self, sample: Callable[[Tree], Samples]) -> Iterator[Iteration]:
        """The loop of every training, on these responses."""

        def score(samples: Samples) -> np.ndarray:
            ids = (samples.prompt_ids, samples.response_ids)
            return score_responses(self.reward, *ids, pad_id=PAD, device=devices.OURS)

        task = Task(sample, score, NO_STOP)
        same = {"config": self.config, "settings": self.settings, "rng": self.rng}
        return train_ppo(self.optimizer, self.reference, task, **same)

    def draw(self, policy: Tree) -> Samples:
        """Responses of the policy to the workload's prompts."""
        return sample_responses(
            policy,
            self.prompts,
            config=self.config,
            stop_id=NO_STOP,
            pad_id=PAD,
            max_tokens=self.workload.response_len,
            rng=self.rng,
            device=devices.OURS,
        )

    # -- results to compare

    def check(self, part: str) -> dict[str, Array]:
        if part == "loss":
            step = minibatch_gradients(
                self.policy, self.experience, config=self.config, settings=self.settings
            )
            return {"loss": np.float32(float(step.loss)), **_paths(step.gradients)}
        if part == "sample":
            tokens, params = self.sample().tokens, self.policy
            logp = _logprobs(params, self.config, self._batch(tokens))
            return {"tokens": to_host(tokens), "logp": to_host(logp)}
        if part == "logprobs":
            return {"logp": to_host(self.logprobs())}
        if part in ("adamw", "update"):
            getattr(self, part)()
            return _paths(self.optimizer.params)
        given = Samples(self.prompts, to_host(self.batch.responses).tolist(), self.batch)
        turn = next(self.train(lambda policy: given))
        results = {"advantages": turn.experience.advantages, "score": turn.rollout.score}
        return tree_map(to_host, results) | _paths(self.optimizer.params)

    # -- from the folder

    @functools.cached_property
    def loop(self) -> Iterator[Iteration]:
        return self.train(self.draw)

    @functools.cached_property
    def optimizer(self) -> Optimizer:
        made = Optimizer(self.policy, self.settings.optimizer, total_steps=1)
        self.policy = made.params  # one copy, which it moves, as in PyTorch
        return made

    @functools.cached_property
    def reference(self) -> Tree:
        return share_packed(there(tree_of(self.workload.parameters("reference"))))[1]

    @functools.cached_property
    def reward(self) -> RewardModel:
        _, shared = share_packed(there(tree_of(self.workload.parameters("reward"))))
        return RewardModel(shared, self.config)

    @functools.cached_property
    def _matrices(self) -> list[Array]:
        shape = (SGEMM_SIZE, SGEMM_SIZE)
        return [self.rng.standard_normal(shape).astype(np.float32) for _ in range(3)]

    def _batch(self, tokens: Array) -> Batch:
        mask = there(np.ones(tokens.shape, np.float32))
        return Batch(tokens, mask, self.workload.prompt_len)

    # -- of a GPU

    def wait(self) -> None:
        devices.wait()

    def launches(self, part: str) -> int | None:
        return devices.launched(getattr(self, part))

    def device_memory(self) -> int | None:
        return devices.held() if devices.DEVICE == "cuda" else None


def there(tree: Tree) -> Tree:
    """On the device of the benchmark."""
    if devices.DEVICE == "cpu":
        return tree
    return tree_map(functools.partial(to_device, device=devices.OURS), tree)


def _logprobs(params: Tree, config: GPTConfig, batch: Batch) -> Array:
    return policy_forward(params, batch=batch, config=config, keep=False)[0].logp


def _paths(tree: Tree) -> dict[str, Array]:
    return {f"policy.{path}": to_host(leaf) for path, leaf in tree_items(tree)}


def main() -> None:
    keep_freed_memory()
    serve(MiniRLHF)


if __name__ == "__main__":
    main()
