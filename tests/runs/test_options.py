"""T12: no option is dead. Every field of TrainConfig is turned, and the run must change.

MUTATIONS has a row for each field, found with dataclasses.fields: a new field without a row fails.
(Those of DPO are turned in test_dpo.py.)
A row also says where the change must show, and so where it must not: an option of PPO that changes
the reference would be as wrong as one that changes nothing.
"""

import contextlib
import itertools
import json
from dataclasses import dataclass, field

import numpy as np
import pytest
from tiny_run import (
    VOWELS,
    changed,
    differences,
    leaves,
    metrics,
    outcome,
    resume,
    tiny_config,
    train,
    write_names,
    write_pairs,
)
from tolerances import BATCH_COMPOSITION

import minirlhf
from minirlhf import crew
from minirlhf.backend import cuda_is_available, get_xp
from minirlhf.errors import InputError
from minirlhf.rlhf.kl import KL_MODES
from minirlhf.runs import checkpoint, pipeline
from minirlhf.runs import session as session_module
from minirlhf.runs.config import TrainConfig, load_config
from minirlhf.train import batches, ppo
from minirlhf.worlds.tokens import train_tokenizer

LENGTH = "length.py:length"  # in the folder of the run's files

# What a run leaves behind, by the stage that makes it.
MADE_BY = {
    "sft": ("metrics of sft", "reference/"),
    "reward_model": ("metrics of reward_model", "reward_model/"),
    "ppo": ("metrics of ppo", "policy/", "checkpoint/", "samples.jsonl", "result", "seen: "),
}


@dataclass(frozen=True)
class Turn:
    """Another value of a field, and what else must be set for the field to matter."""

    value: object
    world: str = "names"  # names, pairs or support
    given: dict = field(default_factory=dict)
    shows: str = ""  # the key of the outcome that must change
    only: tuple = ()  # if given, the keys that may change
    first: str = ""  # the first stage that may change; default: the one the field is named after


LLAMA = {"model.block": "llama"}
LEARNS_FAST = {"ppo.optimizer.learning_rate": 0.1, "ppo.epochs": 4}
STEERED = {"ppo.kl_target": 0.02, "ppo.kl_horizon": 50.0}
PENALTY_IN_LOSS = {"ppo.kl_coef": 5.0}
OTHER_SAMPLER = {**LEARNS_FAST, "ppo.sampler_bits": 1, "ppo.importance_cap": 1.01}


def ppo_turn(value, **rest):
    return Turn(value, shows="metrics of ppo", **rest)


def sft_turn(value, **rest):
    return Turn(value, shows="metrics of sft", **rest)


def reward_turn(value, **rest):
    return Turn(value, world="pairs", shows="metrics of reward_model", **rest)


def optimizer_turns(stage, turn):
    """The fields of an optimizer, the same for each stage."""
    peak = {f"{stage}.optimizer.schedule": "linear"}
    values = {
        "learning_rate": turn(3e-3),
        "schedule": turn("cosine"),
        "warmup": turn(3, given={f"{stage}.optimizer.warmup": 0}),
        "floor": turn(0.5, given=peak),
        "beta1": turn(0.5),
        "beta2": turn(0.5),
        "eps": turn(1e-2),
        "weight_decay": turn(1.0, given={f"{stage}.optimizer.weight_decay": 0.0}),
        "max_grad_norm": turn(1e-2),
        "form": turn("tf"),
    }
    return {f"{stage}.optimizer.{name}": value for name, value in values.items()}


MUTATIONS = {
    "seed": Turn(1, shows="metrics of sft"),
    "vocab_size": Turn(270, shows="tiktoken.json"),
    "max_prompt_tokens": Turn(4, world="pairs", shows="reference/model.safetensors"),
    "max_response_tokens": Turn(5, shows="samples.jsonl"),
    "eval_prompts": Turn(9, shows="result", first="ppo"),
    "eval_every": Turn(1, shows="metrics of ppo", only=("metrics of ppo", "metrics")),
    "checkpoint_every": Turn(2, shows="seen: checkpoints", only=("seen: checkpoints",)),
    "snapshots": Turn(2, shows="snapshots.jsonl", only=("snapshots.jsonl",)),
    "encoding": Turn("stand-in", shows="tiktoken.json"),
    "corpus_unit": Turn("document", world="verses", shows="metrics of sft"),
    "reward": Turn(LENGTH, shows="metrics of ppo", first="reward_model"),
    "model.n_layer": Turn(2, shows="reference/config.json"),
    "model.n_head": Turn(4, shows="reference/config.json"),
    "model.d_model": Turn(12, shows="reference/config.json"),
    "model.n_ctx": Turn(99, shows="reference/config.json"),
    "model.ln_eps": Turn(0.1, shows="metrics of sft"),
    "model.block": Turn("llama", shows="metrics of sft"),
    "model.n_kv_head": Turn(1, given=LLAMA, shows="reference/config.json"),
    "model.d_ff": Turn(12, given=LLAMA, shows="reference/config.json"),
    "model.rope_theta": Turn(100.0, given=LLAMA, shows="metrics of sft"),
    "model.tied": Turn(False, given=LLAMA, shows="reference/config.json"),
    "sft.steps": sft_turn(7),
    "sft.batch_size": sft_turn(5),
    **optimizer_turns("sft", sft_turn),
    "reward_model.init": reward_turn("reference"),
    "reward_model.n_layer": reward_turn(2),
    "reward_model.n_pairs": Turn(40, world="support", shows="metrics of reward_model"),
    "reward_model.n_heldout_pairs": Turn(20, world="support", shows="metrics of reward_model"),
    "reward_model.n_normalize": Turn(
        30, world="pairs", shows="reward_model/config.json", first="reward_model"
    ),
    "reward_model.epochs": reward_turn(3),
    "reward_model.batch_size": reward_turn(7),
    "reward_model.margin": reward_turn(0.5),
    "reward_model.label_smoothing": reward_turn(0.2),
    **optimizer_turns("reward_model", reward_turn),
    "ppo.iterations": ppo_turn(4),
    "ppo.batch_size": ppo_turn(10),
    "ppo.epochs": ppo_turn(3),
    "ppo.minibatches": ppo_turn(3),
    "ppo.micro_batch_size": ppo_turn(5),  # another order of summation: the last digits
    "ppo.temperature": ppo_turn(0.6, first="reward_model"),  # whose scale is of such samples
    "ppo.kl_coef": ppo_turn(0.0),
    "ppo.kl_target": ppo_turn(0.02, given={"ppo.kl_horizon": 50.0}),
    "ppo.kl_horizon": ppo_turn(500.0, given=STEERED),
    "ppo.gamma": ppo_turn(0.8),
    "ppo.lam": ppo_turn(0.5),
    "ppo.whiten_advantages": ppo_turn(False),
    "ppo.whiten_rewards": ppo_turn(True),
    "ppo.clip": ppo_turn("book", given=LEARNS_FAST),
    "ppo.clip_eps": ppo_turn(0.05, given=LEARNS_FAST),
    "ppo.clip_eps_high": ppo_turn(0.6, given=LEARNS_FAST),
    "ppo.dual_clip": ppo_turn(1.1, given=LEARNS_FAST),
    "ppo.value_clip_eps": ppo_turn(0.05, given=LEARNS_FAST),
    "ppo.vf_coef": ppo_turn(0.5),
    "ppo.ent_coef": ppo_turn(0.1),
    "ppo.aggregation": ppo_turn("seq-mean-token-sum", world="pairs"),
    "ppo.samples_per_prompt": ppo_turn(2),
    "ppo.advantages": ppo_turn("group", given={"ppo.samples_per_prompt": 3}),
    "ppo.ratio": ppo_turn("sequence", given=LEARNS_FAST),
    "ppo.sampler_bits": ppo_turn(3),
    "ppo.importance": ppo_turn("tis", given=OTHER_SAMPLER),
    "ppo.importance_cap": ppo_turn(1.001, given={**OTHER_SAMPLER, "ppo.importance": "tis"}),
    "ppo.reset_reference_every": ppo_turn(1),
    "ppo.target_kl": ppo_turn(1e-6),
    "ppo.missing_eos_penalty": ppo_turn(1.0),
    "ppo.score_clip": ppo_turn(0.1),
    **optimizer_turns("ppo", ppo_turn),
}
ELSEWHERE = {  # fields with a test of their own, below
    "out": "test_out_is_where_the_run_lies",
    "halt_on": "test_a_run_stops_where_a_rule_of_halt_on_holds_and_goes_on",
    "device": "test_device_chooses_the_array_module",
    "stages": "test_a_part_of_the_stages_is_run_and_resume_does_the_rest",
    "workers": "test_workers_change_who_computes_and_no_result",
    "threads": "test_threads_are_limited_while_the_stages_run",
    "init": "test_a_run_starts_from_the_weights_and_the_tokenizer_of_init",
    "corpus": "test_the_corpus_and_the_pairs_are_read",
    "pairs": "test_the_corpus_and_the_pairs_are_read",
    "reward_timeout": "test_a_reward_may_be_given_a_time",
    "columns": "test_the_columns_that_are_named_are_read",
    "max_text_mb": "test_of_a_large_corpus_a_part_is_kept",
    "ppo.kl_mode": "test_every_kl_mode_is_another_training",
    "log": "test_the_metrics_have_a_mirror",
}
EVERY_VALUE = {  # the further values of a choice, each unlike the default and unlike each other
    "ppo.clip": ("book", "none"),
    "ppo.aggregation": ("seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"),
    "ppo.optimizer.schedule": ("cosine", "constant"),
    "ppo.advantages": ("group", "group-mean", "leave-one-out", "batch"),
    "ppo.ratio": ("sequence", "clipped-weight"),
    "ppo.importance": ("tis", "mis"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The texts that the runs read."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "length.py").write_text("def length(text):\n    return len(text)\n")
    verse = folder / "verses.txt"
    verse.write_text("rain\nfalls down\n\nsun\ncomes up\n\nwind\ngoes by\n\nsnow\nlies on\n" * 2)
    return {
        "folder": folder,
        "names": {"corpus": write_names(folder / "names.txt"), "reward": VOWELS},
        "pairs": {"pairs": write_pairs(folder / "pairs.jsonl"), "vocab_size": 280},
        "verses": {"corpus": str(verse), "reward": VOWELS, "corpus_unit": "line"},
        "support": {},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory, files):
    """(world, changes) -> what the run left behind; each run happens once."""
    done = {}

    def of(world, changes):
        key = world, tuple(sorted(changes.items()))
        if key not in done:
            out = tmp_path_factory.mktemp("run") / "run"
            config = changed(tiny_config(out), {**files[world], **changes})
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(files["folder"])
                done[key] = observed(config, patch)
        return done[key]

    return of


def observed(config, patch):
    """The outcome of a run, and what the folder does not tell."""
    saves, sizes = [], set()
    save_state, policy_forward = checkpoint.save_state, ppo.policy_forward

    def count(folder, arrays, meta):
        saves.append(meta["done"])
        save_state(folder, arrays, meta)

    def look(params, *, batch, **constants):
        sizes.add(batch.tokens.shape[0])
        return policy_forward(params, batch=batch, **constants)

    patch.setattr(checkpoint, "save_state", count)
    patch.setattr(ppo, "policy_forward", look)
    patch.setattr(
        session_module.tokens,
        "load_tokenizer_by_name",
        lambda name: train_tokenizer(["kalo mitru brisen"] * 3, vocab_size=265),
    )
    train(config)
    seen = {"seen: checkpoints": saves, "seen: rows in a forward": sorted(sizes)}
    return {**outcome(config.out), **seen}


def default_value(path):
    return dict(leaves(TrainConfig()))[path]


def test_every_field_is_turned():
    fields = {path for path, _ in leaves(TrainConfig()) if not path.startswith("dpo.")}
    tested = MUTATIONS.keys() | ELSEWHERE.keys()
    assert fields == tested, "a new option needs a row in MUTATIONS"
    assert not MUTATIONS.keys() & ELSEWHERE.keys()
    assert all(name in globals() for name in ELSEWHERE.values())


@pytest.mark.parametrize("path", MUTATIONS)
def test_turning_it_changes_the_run(run, path):
    turn = MUTATIONS[path]
    base = run(turn.world, turn.given)
    found = differences(base, run(turn.world, {**turn.given, path: turn.value}))
    assert turn.shows in found, f"{path} = {turn.value!r} changes only {found}"
    assert not turn.only or set(found) <= set(turn.only)
    stage = turn.first or path.partition(".")[0]
    if stage in MADE_BY:
        earlier = [keys for name, keys in MADE_BY.items() if name != stage]
        earlier = earlier[: list(MADE_BY).index(stage)]
        too_early = [key for key in found for keys in earlier if key.startswith(keys)]
        assert not too_early, f"{path} changes what comes before it: {too_early}"


@pytest.mark.parametrize("path", EVERY_VALUE)
def test_every_choice_is_another_run(run, path):
    turn = MUTATIONS[path]
    values = default_value(path), *EVERY_VALUE[path]
    runs = [run(turn.world, {**turn.given, path: value}) for value in values]
    for i, one in enumerate(runs):
        for other, value in zip(runs[:i], values, strict=False):
            assert differences(one, other), f"{path}: {values[i]} is the same as {value}"


def test_every_kl_mode_is_another_training(run):
    runs = {mode: run("names", {**PENALTY_IN_LOSS, "ppo.kl_mode": mode}) for mode in KL_MODES}
    for one, other in itertools.combinations(runs, 2):
        found = differences(runs[one], runs[other])
        assert "metrics of ppo" in found, f"{one} is {other}"
        # rho (k3 + k3') = rho k2', so these two differ in what they report and not in what they do
        if {one, other} != {"loss_rho_k2", "loss_rho_k3"}:
            assert "policy/model.safetensors" in found, f"{one} learns what {other} learns"


@pytest.mark.parametrize("mode", KL_MODES)
def test_beta_is_live_in_every_kl_mode(run, mode):
    runs = [run("names", {"ppo.kl_coef": beta, "ppo.kl_mode": mode}) for beta in (0.0, 5.0)]
    assert "policy/model.safetensors" in differences(*runs)


def test_without_beta_all_kl_modes_are_one(run):
    policies = {
        run("names", {"ppo.kl_coef": 0.0, "ppo.kl_mode": mode})["policy/model.safetensors"]
        for mode in KL_MODES
    }
    assert len(policies) == 1


def test_micro_batches_bound_memory_and_change_no_result(run):
    """T8: the same updates from parts of a minibatch, up to rounding."""
    whole, parts = (run("pairs", {"ppo.micro_batch_size": size}) for size in (0, 4))
    assert max(parts["seen: rows in a forward"]) <= 4 < max(whole["seen: rows in a forward"])
    tolerance = 10 * BATCH_COMPOSITION[np.float32]
    samples = [
        [json.loads(line) for line in r["samples.jsonl"].splitlines()] for r in (parts, whole)
    ]
    texts = [[(s["prompt"], s["response"]) for s in rows] for rows in samples]
    assert texts[0] == texts[1]
    for ours, theirs in [
        *zip(parts["metrics of ppo"], whole["metrics of ppo"], strict=True),
        *zip(*samples, strict=True),
    ]:
        for name, value in ours.items():
            if isinstance(value, float):
                assert value == pytest.approx(theirs[name], abs=tolerance, rel=1e-2), name


# --- fields that need a look of their own


def test_out_is_where_the_run_lies(tmp_path, files):
    config = changed(tiny_config(tmp_path / "a/b"), files["names"])
    session_module.open_session(config)
    assert load_config(tmp_path / "a/b/config.toml") == config


def test_device_chooses_the_array_module(tmp_path, files):
    config = changed(tiny_config(tmp_path / "run", device="cuda"), files["names"])
    if cuda_is_available():
        array = session_module.open_session(config).on_device({"w": np.zeros(2)})["w"]
        assert get_xp(array).__name__ == "cupy"
    else:
        with pytest.raises(InputError, match="--device cuda"):
            session_module.open_session(config)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("threads, limit", [(1, 1), (3, 3), (0, None)])
def test_threads_are_limited_while_the_stages_run(tmp_path, files, monkeypatch, threads, limit):
    seen = []

    @contextlib.contextmanager
    def watched(*, limits):
        seen.append(limits)
        yield
        seen.append("over")

    monkeypatch.setattr(pipeline, "threadpool_limits", watched)
    monkeypatch.setattr(pipeline, "reference_stage", lambda run: seen.append("stage") or 1 / 0)
    config = changed(tiny_config(tmp_path / "run", threads=threads), files["names"])
    with pytest.raises(ZeroDivisionError):
        train(config)
    assert seen == [limit, "stage"]


def test_workers_change_who_computes_and_no_result(tmp_path, files, monkeypatch):
    monkeypatch.setattr(batches, "MICRO_BATCH_TOKENS", 16)  # several groups, so all have work
    monkeypatch.setattr(batches, "MICRO_BATCH_FLOATS", 0)
    crews, original = [], crew._Processes

    def watched(n):
        crews.append(n)
        return original(n)

    monkeypatch.setattr(crew, "_Processes", watched)
    results = {}
    for n in (1, 2, 3):
        config = changed(tiny_config(tmp_path / str(n), workers=n), files["pairs"])
        train(config)
        results[n] = outcome(config.out)
    assert set(crews) == {1, 2}  # beside this process
    tolerance = 10 * BATCH_COMPOSITION[np.float32]
    for n in (2, 3):
        assert results[n]["samples.jsonl"] is not None
        for stage in ("sft", "reward_model", "ppo"):
            ours, one = (r[f"metrics of {stage}"] for r in (results[n], results[1]))
            for a, b in zip(ours, one, strict=True):
                for name, value in a.items():
                    if isinstance(value, float):
                        assert value == pytest.approx(b[name], abs=tolerance, rel=1e-2), name


@pytest.mark.parametrize("stages, made", [("sft", ["reference"]), ("sft,reward", None)])
def test_a_part_of_the_stages_is_run_and_resume_does_the_rest(run, files, tmp_path, stages, made):
    out = tmp_path / "run"
    config = changed(tiny_config(out, stages=stages), files["names"])
    assert train(config) is None
    made = made or ["reference", "reward_model"]
    assert [n for n in ("reference", "reward_model", "policy") if (out / n).exists()] == made
    assert load_config(out / "config.toml").stages == stages
    resume(out)
    found = differences(outcome(out), run("names", {}))
    assert found == ["seen: checkpoints", "seen: rows in a forward"]  # which only `run` looks at


def test_the_corpus_and_the_pairs_are_read(tmp_path, files):
    names, pairs = files["names"], files["pairs"]
    opened = {
        name: session_module.open_session(changed(tiny_config(tmp_path / name), chosen)).world
        for name, chosen in {
            "names": names,
            "pairs": pairs,
            "both": {"corpus": names["corpus"], "pairs": pairs["pairs"]},
            "neither": {},
        }.items()
    }
    assert len({tuple(world.demonstrations) for world in opened.values()}) == 4
    assert [world.pairs is None for world in opened.values()] == [True, False, False, True]


def test_a_run_stops_where_a_rule_of_halt_on_holds_and_goes_on(tmp_path):
    halts = {"halt_on": ("penalty-gradient",), "ppo.kl_mode": "loss_k1"}
    config = changed(tiny_config(tmp_path / "run"), halts)
    with pytest.raises(InputError, match="stopped at step 0 by --halt-on penalty-gradient"):
        minirlhf.train(config, progress=False)
    assert not (config.out / "result.json").exists()
    assert minirlhf.resume(config.out, progress=False).result


def test_a_reward_may_be_given_a_time(tmp_path, files):
    (tmp_path / "slow.py").write_text("import time\ndef f(text): time.sleep(0.1); return len(text)")
    config = changed(
        tiny_config(tmp_path / "run"), {**files["names"], "reward": f"{tmp_path}/slow.py:f"}
    )
    with pytest.raises(InputError, match="longer than --reward-timeout 0.01"):
        session_module.open_session(changed(config, {"reward_timeout": 0.01}))
    assert not (tmp_path / "run").exists()
    assert session_module.open_session(changed(config, {"reward_timeout": 60.0})).world.reward


def test_the_columns_that_are_named_are_read(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("prompt,response,title\n" + "".join(f"p{i},r{i},t{i}\n" for i in range(9)))
    opened = [
        session_module.open_session(
            tiny_config(tmp_path / name, corpus=str(path), reward=VOWELS, columns=columns)
        ).world
        for name, columns in (("a", ()), ("b", ("prompt=title",)))
    ]
    assert [world.train_prompts[0][0] for world in opened] == ["p", "t"]


def test_of_a_large_corpus_a_part_is_kept(tmp_path):
    path = tmp_path / "c.txt"
    path.write_text("".join(f"p{i} text of line {i}\n" for i in range(5000)))
    sizes = []
    for mb in (1, 2):
        config = tiny_config(tmp_path / str(mb), corpus=str(path), reward=VOWELS, max_text_mb=mb)
        world = session_module.open_session(config).world
        sizes.append(len(world.demonstrations) + len(world.heldout_demonstrations))
    assert sizes[0] < sizes[1] == 5000  # a row counts for 300 characters more than it has


def test_a_run_starts_from_the_weights_and_the_tokenizer_of_init(run, tmp_path, files):
    base = run("names", {})
    reference = tmp_path / "reference"
    reference.mkdir()
    for key, content in base.items():
        if key.startswith("reference/"):
            (tmp_path / key).write_bytes(content)
    config = changed(tiny_config(tmp_path / "run"), files["names"] | {"init": str(reference)})
    train(changed(config, {"model.d_model": 12}))
    got = outcome(tmp_path / "run")
    same = {"config", "generation_config", "tokenizer", "tokenizer_config"}
    assert not {f"reference/{name}.json" for name in same} & set(differences(base, got))
    first, before = (of["metrics of sft"][0]["heldout/loss_sft"] for of in (got, base))
    assert first < before  # it has learnt such names before


@pytest.mark.parametrize("kind, made", [("csv", "metrics.csv"), ("tensorboard", "tensorboard")])
def test_the_metrics_have_a_mirror(run, files, tmp_path, kind, made):
    """And no number is another one; test_mirrors.py reads it."""
    base, config = run("names", {}), changed(tiny_config(tmp_path / "run"), files["names"])
    train(changed(config, {"log": kind}))
    assert (config.out / made).exists()
    found = differences(outcome(config.out), base)
    assert found == ["seen: checkpoints", "seen: rows in a forward"]  # which only `run` looks at


def test_options_that_contradict_each_other_are_refused(tmp_path, files):
    names, pairs = files["names"], files["pairs"]
    for choice in ({"corpus": names["corpus"]}, {"reward": VOWELS, "pairs": pairs["pairs"]}):
        with pytest.raises(InputError, match="expected either"):
            session_module.open_session(changed(tiny_config(tmp_path / "run"), choice))
    assert not (tmp_path / "run").exists()


def test_early_stop_skips_updates(run):
    """target_kl: an iteration ends after the update that went too far."""
    all_updates, few = (
        [row["policy/updates"] for row in run("names", changes)["metrics of ppo"]]
        for changes in ({}, {"ppo.target_kl": 1e-6})
    )
    assert set(all_updates) == {4} and max(few) < 4


def test_the_world_suggests_lengths_where_none_are_set(tmp_path, files):
    config = changed(tiny_config(tmp_path / "run"), {**files["names"], "max_response_tokens": 0})
    opened = session_module.open_session(config)
    world = opened.world
    assert opened.gpt.n_ctx == world.max_prompt_tokens + world.max_response_tokens
    assert opened.longest[1] == world.max_response_tokens > 0
    assert metrics(tmp_path / "run") == []
