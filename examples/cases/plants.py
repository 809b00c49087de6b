"""Runs with a planted cause, and healthy ones: what `minirlhf diagnose` is measured against.

    python examples/cases/plants.py --only "inverted k3" --seeds 1 2 --out plants

PLANTS has a row for each cause: settings of PPO, or a fault that is put into the package while the
run trains, and the rule that should be named first. A base (reference and reward model) is trained
once for each world and seed; each run is a fork of it. The seed also picks sizes, beta, temperature
and placement of the penalty (VARIANTS), so a cause is met in several settings.
"""

import argparse
import contextlib
import random
import shutil
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from minirlhf.app.diagnose import diagnose
from minirlhf.app.rules import RULES, Seen
from minirlhf.disk import read_object, to_json, write_whole
from minirlhf.fields import with_fields
from minirlhf.nn.sampling import Sampling
from minirlhf.rlhf import kl, objectives
from minirlhf.rlhf.advantages import token_rewards
from minirlhf.runs import pipeline
from minirlhf.runs.config import TrainConfig, load_config, save_config
from minirlhf.runs.log import read_metrics
from minirlhf.runs.own_reward import fingerprint, remember
from minirlhf.runs.session import BEGAN, Score, fork_run, open_session, reopen_session
from minirlhf.train import ppo, recipes
from minirlhf.train.policy import policy_forward
from minirlhf.tree import tree_copy
from minirlhf.worlds.rewards import name_of
from study import Case

OWN = Path(__file__).with_name("own_rewards.py")
SYLLABLES = "ka lo mi tru sen bri no va del ro shi ta".split()
BASE = {
    "workers": 1,
    "stages": "sft,reward",
    "eval_prompts": 16,
    "eval_every": 0,
    "model": {"n_ctx": 64},  # also where replies are cut shorter
    "sft": {"steps": 900},
    "reward_model": {"n_heldout_pairs": 64, "n_normalize": 512},
    "ppo": {"iterations": 24, "batch_size": 48},
}
VARIANTS = (  # of the seed's base, of its PPO
    ({"d_model": 48}, {}),
    ({"d_model": 40}, {"kl_coef": 0.1, "batch_size": 64, "iterations": 20}),
    ({"d_model": 56}, {"temperature": 0.8, "kl_coef": 0.3}),
    ({"d_model": 48}, {"kl_mode": "loss_k2_seq"}),
    ({"d_model": 64, "n_layer": 1}, {"kl_target": 1.5, "kl_horizon": 640.0}),
)
FAST = {"sft": {"steps": 20}, "reward_model": {"n_pairs": 64, "n_heldout_pairs": 8}}
FAST |= {"model": {"d_model": 16}, "ppo": {"iterations": 3, "batch_size": 16}, "eval_prompts": 8}


# -- faults: put into the package while a run trains ---------------------------------------------
def sampler(seed: int):
    """Samples are drawn warmer, colder, or from the likely tokens alone."""
    other = (
        lambda t: Sampling(1.3 * t),
        lambda t: Sampling(0.7 * t),
        lambda t: Sampling(t, 0, 0.8),
    )
    return mock.patch.object(pipeline, "Sampling", other[seed % 3])


def late_sampler(seed: int):
    """Samples are drawn by the policy of some iterations ago, and scored with that of now."""
    real, past = pipeline.sample_as_set, deque(maxlen=6 + seed % 3)

    def late(sample, policy, **known):
        past.append(tree_copy(policy))
        return real(sample, past[0], **known)._replace(hidden=None)

    return mock.patch.object(pipeline, "sample_as_set", late)


def late_rollout(seed: int):
    """The whole rollout, log-probs too, is that of the policy of an iteration or two ago."""
    real_sample, real_score, past = pipeline.sample_as_set, ppo.score_rollout, deque(maxlen=3)

    def sample(draw, policy, **known):
        past.append(tree_copy(policy))
        return real_sample(draw, past[0], **known)

    def score(policy, reference, samples, **known):
        return real_score(past[0], reference, samples, **known)

    return _both((pipeline, "sample_as_set", sample), (ppo, "score_rollout", score))


def padding(seed: int):
    """The mask of the responses covers the padding, too."""
    real = pipeline.sample_as_set

    def padded(sample, policy, **known):
        samples = real(sample, policy, **known)
        mask = samples.batch.mask.copy()
        mask[:, samples.batch.prompt_len :] = 1
        return samples._replace(batch=samples.batch._replace(mask=mask), hidden=None)

    return mock.patch.object(pipeline, "sample_as_set", padded)


def reference_scored(how: str):
    """log pi_ref is taken at another temperature, or from the policy itself."""
    real = ppo.score_rollout

    def patched(seed: int):
        def score(policy, reference, samples, *, settings, **known):
            rollout = real(policy, reference, samples, settings=settings, **known)
            other = with_fields(settings, {"temperature": (0.6, 1.5)[seed % 2]}, "")
            same = {"settings": settings if how == "policy" else other, **known}
            of = policy if how == "policy" else reference
            ref_logp = real(of, of, samples, **same).ref_logp
            kl_full = 0.0 * ref_logp if how == "policy" else rollout.kl_full
            return rollout._replace(ref_logp=ref_logp, kl_full=kl_full)

        return mock.patch.object(ppo, "score_rollout", score)

    return patched


def sign(seed: int):
    """The penalty is paid out instead of being charged."""
    real = ppo.rollout_penalty
    return mock.patch.object(ppo, "rollout_penalty", lambda *of: -real(*of))


def inverted_k3(seed: int):
    """k3 = ratio - 1 - log ratio with the ratio the wrong way round."""
    turned = lambda x: (kl.expm1_minus(x), np.expm1(np.minimum(x, 20.0)))  # noqa: E731
    return mock.patch.dict(kl.ESTIMATORS, {"k3": turned})


def old_recomputed(seed: int):
    """The old log-probs are taken anew at each minibatch: the ratio is 1, the clip never acts."""
    real, update = ppo.minibatch_gradients, ppo.Update

    def gradients(params, experience, *, config, settings):
        known = {"batch": experience.batch, "temperature": settings.temperature, "keep": False}
        out, _ = policy_forward(params, config=config, **known)
        now = experience._replace(old_logp=out.logp)
        return real(params, now, config=config, settings=settings)

    def logged(minibatch, step, applied):
        return update(minibatch._replace(old_logp=step.logp), step, applied)

    return _both((ppo, "minibatch_gradients", gradients), (ppo, "Update", logged))


def score_misplaced(seed: int):
    """The score is paid at the first token, or behind the last one, where it is masked."""

    def rewards(score, kl_token, *, mask, kl_coef):
        paid = token_rewards(0.0 * score, kl_token, mask=mask, kl_coef=kl_coef)
        if seed % 2:
            paid[:, 0] += score
        return paid

    return mock.patch.object(ppo, "token_rewards", rewards)


def score_changes(how: str):
    """The reward becomes another one while the run trains, or was never normalised."""
    real = Score.__call__

    def patched(seed: int):
        calls = [0]

        def score(self, samples):
            found, calls[0] = real(self, samples), calls[0] + 1
            if how == "scale":
                return found * (20.0 if seed % 2 else 0.04)
            return found + 0.1 * calls[0] if seed % 2 else found * (1 + 0.15 * calls[0])

        return mock.patch.object(Score, "__call__", score)

    return patched


def no_value_gradient(seed: int):
    """The value loss reaches nobody."""
    real = objectives.value_loss_backward
    return mock.patch.object(objectives, "value_loss_backward", lambda *of: 0.0 * real(*of))


@contextlib.contextmanager
def _both(*patches: tuple) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        yield


# -- what is planted -----------------------------------------------------------------------------
class Plant(NamedTuple):
    """A cause, and the rule that names it; "" of a healthy run."""

    rule: str
    ppo: dict[str, Any] = {}
    fault: Any = None  # seed -> a context in which the run trains
    worlds: tuple[str, ...] = ("support", "names")  # by turns
    run: dict[str, Any] = {}  # other fields of TrainConfig


IN_REWARD, ONE_WORLD = {"kl_mode": "reward_k1"}, ("support",)
PLANTS = {
    "no penalty": Plant("penalty-too-weak", {"kl_coef": 0.0, "kl_target": 0.0}),
    "penalty too small": Plant("penalty-too-weak", {"kl_coef": 0.003, "kl_target": 0.0}),
    "penalty too large": Plant("penalty-too-strong", {"kl_coef": 30.0, "kl_target": 0.0}),
    "k1 as loss": Plant("penalty-gradient", {"kl_mode": "loss_k1"}),
    "k3 in the reward": Plant("penalty-gradient", {"kl_mode": "reward_k3"}),
    "inverted k3": Plant(
        "inverted-k3", {"kl_mode": "loss_k3_tok", "kl_coef": 0.02, "kl_target": 0.0}, inverted_k3
    ),
    "sign of the penalty": Plant("penalty-sign", IN_REWARD, sign),
    "padding counted": Plant("padding-counted", {}, padding),
    "another sampler": Plant("another-sampler", {}, sampler),
    "late samples": Plant("late-samples", {"optimizer": {"learning_rate": 1e-3}}, late_sampler),
    "late rollouts": Plant("ratio-not-one", {}, late_rollout),
    "old log-probs made anew": Plant("ratio-always-one", {}, old_recomputed),
    "reference at another temperature": Plant(
        "reference-logp", {}, reference_scored("temperature")
    ),
    "reference is the policy": Plant("reference-is-policy", {}, reference_scored("policy")),
    "reference moves": Plant("reference-resets", {"reset_reference_every": 3}),
    "score on the wrong token": Plant("score-position", {}, score_misplaced),
    "reward changes": Plant("reward-drift", {}, score_changes("drift")),
    "score not normalised": Plant("reward-scale", {}, score_changes("scale")),
    "reward pays a phrase": Plant("over-optimisation", {}, None, ("phrases",)),
    "reward is length": Plant("pays-length", {}, None, ("length",)),
    "reward pays repetition": Plant("pays-repetition", {}, None, ("repeats",)),
    "replies too short": Plant("missing-eos", {}, None, ONE_WORLD, {"max_response_tokens": 7}),
    "value without gradient": Plant("value-not-learning", {}, no_value_gradient),
    "learning rate too high": Plant("step-too-large", {"optimizer": {"learning_rate": 1e-2}}),
    "too many epochs": Plant("step-too-large", {"epochs": 30}),
}
PLANTS |= {
    f"healthy: {name}": Plant("", {**recipes.recipe(name)["ppo"], **more})
    for name, more in {
        "ppo": {},
        "grpo": {"kl_target": 0.0},
        "dr-grpo": {"kl_target": 0.0},
        "rloo": {"kl_mode": "reward_k1"},
        "gspo": {"kl_target": 0.0},
    }.items()
}
PLANTS["healthy: stronger penalty"] = Plant("", {"kl_coef": 0.6, "kl_target": 0.0})


# -- running -------------------------------------------------------------------------------------
def base(world: str, seed: int, out: Path, fast: bool) -> Path:
    """The run that a seed's forks in a world begin with; trained if it is not there yet."""
    folder = out / f"base-{world}-{seed}"
    if (folder / "reward_model").exists():
        return folder
    sizes, settings = VARIANTS[seed % len(VARIANTS)]
    config = with_fields(TrainConfig(), BASE, "")
    config = with_fields(config, {"model": sizes, "ppo": settings}, "")
    config = with_fields(config, {"seed": seed, "out": folder}, "")
    config = with_fields(config, names(seed, out) if world == "names" else {}, "")
    config = with_fields(config, FAST if fast else {}, "")
    pipeline.run_stages(open_session(config))
    return folder


def names(seed: int, out: Path) -> dict[str, Any]:
    """Made-up names, and a reward of the user's own that has an end: `different_vowels`."""
    draw, path = random.Random(seed), out / f"names-{seed}.txt"
    made = {"".join(draw.choices(SYLLABLES, k=draw.randint(2, 4))) for _ in range(500)}
    path.write_text("\n".join(sorted(made)) + "\n", encoding="utf-8")
    sft = {"steps": 400, "batch_size": 32}
    known = {"vocab_size": 280, "max_response_tokens": 10, "sft": sft}
    return {"corpus": str(path), "reward": f"{OWN}:different_vowels", **known}


# support has a reward model, and a gold reward; or another reward on the same reference
REWARDS = {"phrases": f"{OWN}:phrases", "length": "length", "repeats": f"{OWN}:repeats"}


def plant_run(name: str, seed: int, out: Path, *, fast: bool = False) -> Path:
    """Train the run of a cause and a seed; its folder."""
    plant = PLANTS[name]
    world = plant.worlds[(seed + list(PLANTS).index(name)) % len(plant.worlds)]
    start = base("names" if world == "names" else "support", seed, out, fast)
    folder = out / f"{name.replace(':', '').replace(' ', '-')}-{seed}"
    if (folder / "result.json").exists():
        return folder
    settings = with_fields(load_config(start / "config.toml").ppo, plant.ppo, "ppo")
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
    fork_run(start, folder, ppo=settings, eval_every=0)
    reward = {"reward": name_of(REWARDS[world])} if world in REWARDS else {}
    if reward:  # its scale is made anew
        shutil.rmtree(folder / "reward_model")
        outline = read_object(folder / "world.json")
        remember(reward["reward"], digest := fingerprint(reward["reward"]))
        write_whole(folder / "world.json", to_json(outline | {"reward_sha256": digest}))
    config = with_fields(load_config(folder / "config.toml"), plant.run | reward, "")
    for path in (folder / "config.toml", folder / BEGAN):
        save_config(path, config)
    with plant.fault(seed) if plant.fault else contextlib.nullcontext(), np.errstate(all="ignore"):
        pipeline.run_stages(reopen_session(folder))
    return folder


# -- measuring -----------------------------------------------------------------------------------
class Told(NamedTuple):
    """What `diagnose` said of a run."""

    cause: str
    seed: int
    expected: str  # the rule that should be first; "" of a healthy run
    found: list[tuple[str, int]]  # (rule, the row in which it speaks while the run trains)
    gold_fell: int | None  # the row in which that shows, where there is a gold reward

    @property
    def first(self) -> str:
        return self.found[0][0] if self.found else ""

    @property
    def right(self) -> bool:
        return self.first == self.expected


def told(name: str, seed: int, folder: Path) -> Told:
    """What `diagnose` says of the run in a folder."""
    rows = [row for row in read_metrics(folder) if row["stage"] == "ppo"]
    fell = RULES["over-optimisation"].look(Seen(rows))
    found = [(f.rule, f.onset + RULES[f.rule].rows - 1) for f in diagnose(folder).findings]
    return Told(name, seed, PLANTS[name].rule, found, fell and fell[0] + 1)


def measure(case: Case) -> list[Told]:
    """Every cause under every seed of a case; of a fast one, some causes in tiny runs."""
    out, fast = case.out / "runs", case.fast
    out.mkdir(parents=True, exist_ok=True)
    names = list(PLANTS)[::10] if fast else list(PLANTS)
    bases = [(world, seed) for world in ("support", "names") for seed in case.seeds]
    case._each(_base, [(*of, out, fast) for of in bases], "references and reward models")
    jobs = [(name, seed, out, fast) for seed in case.seeds for name in names]
    return case._each(_plant_and_tell, jobs, "runs")


def _base(job: tuple) -> None:
    base(*job)


def _plant_and_tell(job: tuple[str, int, Path, bool]) -> Told:
    name, seed, out, fast = job
    return told(name, seed, plant_run(name, seed, out, fast=fast))


def main() -> None:
    """Train some of the runs, and say what `diagnose` finds in each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(PLANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--out", type=Path, default=Path("runs/plants"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in PLANTS:
            if any(part in name for part in options.only):
                said = told(name, seed, plant_run(name, seed, options.out))
                print(f"{name}, seed {seed}: {'right' if said.right else 'WRONG'} {said.found}")


if __name__ == "__main__":
    main()
