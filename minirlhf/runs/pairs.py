"""The pairs that a reward model or DPO learns from: given ones, or the annotator's of samples."""

import shlex
from typing import Any

import numpy as np

from minirlhf.errors import InputError
from minirlhf.runs.session import Session
from minirlhf.train.reward_model import Pair
from minirlhf.tree import Tree
from minirlhf.worlds.examples import Texts
from minirlhf.worlds.files import split_pairs


def preference_pairs(session: Session, reference: Tree) -> tuple[list[Pair], list[Pair], Any]:
    """Pairs to learn from, held-out pairs, and the held-out difference of gold (or None)."""
    world, settings = session.world, session.config.reward_model
    if world.pairs is None and world.annotate is None:
        how = f"`minirlhf resume {shlex.quote(str(session.folder))} --reward ..` or train --pairs"
        raise InputError(f"expected a reward or pairs; got none: go on with {how}", resume=None)
    if world.pairs is None:
        train, _ = annotated_pairs(session, reference, world.train_prompts, settings.n_pairs)
        heldout, difference = annotated_pairs(
            session, reference, world.heldout_prompts, settings.n_heldout_pairs
        )
        return train, heldout, difference
    parts = split_pairs(world.pairs, train_prompts=world.train_prompts)
    train, heldout = (_differing_pairs(session, part) for part in parts)
    within = f"in their first {session.world.max_response_tokens} tokens"
    if dropped := len(world.pairs) - len(train) - len(heldout):
        session.note(f"dropped {dropped} of {len(world.pairs)} pairs that are equal {within}")
    if not train:
        raise InputError(
            f"pairs: expected pairs to train on that differ {within}; got none: raise "
            "--max-response-tokens",
            resume=None,
        )
    return train, heldout, None


def _differing_pairs(session: Session, pairs: list[Texts]) -> list[Pair]:
    """The pairs as ids, without those that no longer differ where they are cut."""
    differing = []
    for texts in pairs:
        prompt, *replies = session.example_ids(*texts)
        if len(set(map(bytes, replies))) == len(replies):
            differing.append(Pair(prompt, *replies[:2], tuple(replies[2:])))
    return differing


def annotated_pairs(
    session: Session, reference: Tree, prompts: list[str], n: int
) -> tuple[list[Pair], np.ndarray | None]:
    """n pairs of reference samples, without equal ones, and their difference of gold (or None)."""
    world, rng = session.world, session.rng
    drawn = draw_prompts(prompts, n, rng["pairs"])
    first, second = (session.sample(reference, drawn, rng["pairs"]) for _ in range(2))
    pairs, difference = [], []
    for i, prompt in enumerate(drawn):
        if first.response_ids[i] == second.response_ids[i]:
            continue
        a_wins = world.annotate(prompt, first.responses[i], second.responses[i], rng["annotator"])
        winner, loser = (first, second) if a_wins else (second, first)
        pairs.append(Pair(first.prompt_ids[i], winner.response_ids[i], loser.response_ids[i]))
        if world.gold:
            chosen, rejected = (world.gold(prompt, of.responses[i]) for of in (winner, loser))
            difference.append(chosen - rejected)
    return pairs, np.array(difference) if world.gold else None


def draw_prompts(items: list[str], n: int, rng: np.random.Generator) -> list[str]:
    """n items without repetition, or in whole shuffled rounds if there are fewer than n."""
    rounds = [rng.permutation(len(items)) for _ in range(-(-n // len(items)))]
    return [items[i] for i in np.concatenate(rounds)[:n]]
