"""The tiny support desk, its policies and rewards as vectors over all of its replies.

    desk = Desk()
    p = desk.optimum(desk.proxy, beta=0.5)      (M,) ref exp(r / beta) / Z, a probability a reply
    desk.describe(p)["gold"]                    what it is worth, exactly

A policy is p (M,), a reward is r (M,), features are (M, F): M replies, EOS included where there is
one. The reference is the chain that writes the demonstrations, or any other policy.
"""

import dataclasses
from functools import cached_property

import numpy as np
from numpy.random import Generator

from minirlhf.exact.enumeration import all_responses, response_logprobs
from minirlhf.exact.ground_truth import TokenWorld
from minirlhf.exact.tiny import ANS, EOS, MAX_TOKENS, TOKENS, make_tiny_world, token_counts
from minirlhf.train.reward_model import Pair
from other_optima import best_of_n


class Desk:
    """Everything about the desk that does not depend on a policy.

    Args:     max_tokens: of a reply; 6 has 137,257 of them, 3 has 400.
              ref_log_probs: (N, V) of the reference; None: the chain.
    """

    def __init__(self, *, max_tokens: int = MAX_TOKENS, ref_log_probs: np.ndarray | None = None):
        self.world = make_tiny_world(
            max_tokens=max_tokens, n_demonstrations=1, rng=np.random.default_rng(0)
        )
        self.tree = self.world.tree
        self.ref_log_probs = self.world.demonstrator if ref_log_probs is None else ref_log_probs
        self.ref_logp = response_logprobs(self.tree, self.ref_log_probs)  # (M,) [nats]
        self.ref = np.exp(self.ref_logp)
        self.gold, self.proxy = self.world.gold, self.world.rewards
        self.responses = all_responses(self.tree)

    # -- replies and their features --------------------------------------------------------------
    @cached_property
    def counts(self) -> np.ndarray:
        """How often each token but EOS stands in each reply: (M, 7), in the order of TOKENS[1:]."""
        return token_counts(self.responses.tokens, self.responses.mask)[:, 1:].astype(np.float64)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(M,) tokens of each reply, EOS not counted."""
        return self.counts.sum(axis=1)

    @cached_property
    def rich_features(self) -> np.ndarray:
        """Counts, [count >= 1] and (length - 4)+: enough to see that the gold reward saturates."""
        too_long = np.maximum(self.lengths - 4, 0)[:, None]
        return np.concatenate([self.counts, self.counts > 0, too_long], axis=1)

    @cached_property
    def n_repeats(self) -> np.ndarray:
        """(M,) tokens that are equal to the one before them."""
        tokens, mask = self.responses.tokens, self.responses.mask
        return ((tokens[:, 1:] == tokens[:, :-1]) & (mask[:, 1:] > 0)).sum(axis=1)

    @cached_property
    def bigrams(self) -> tuple[np.ndarray, np.ndarray]:
        """(replies, pairs), each (K,): reply k holds this pair of neighbours, at least once."""
        first, second = self.responses.tokens[:, :-1], self.responses.tokens[:, 1:]
        reply, t = np.nonzero((self.responses.mask[:, 1:] > 0) & (second != EOS))
        pair = first[reply, t] * len(TOKENS) + second[reply, t]
        return np.divmod(np.unique(reply * len(TOKENS) ** 2 + pair), len(TOKENS) ** 2)

    def reply(self, leaf: int) -> str:
        """The tokens of a reply by name, EOS left out, like "ANS DET"."""
        tokens, mask = self.responses.tokens[leaf], self.responses.mask[leaf]
        return " ".join(TOKENS[token] for token in tokens[mask > 0] if token != EOS)

    def leaf(self, reply: str) -> int:
        """The number of the reply with these tokens: the inverse of `reply`."""
        ids = [TOKENS.index(name) for name in reply.split()]
        row = np.full(self.responses.tokens.shape[1], EOS)
        row[: len(ids)] = ids
        padded = np.where(self.responses.mask > 0, self.responses.tokens, EOS)
        (leaf,) = np.flatnonzero((padded == row).all(axis=1))
        return int(leaf)

    # -- policies --------------------------------------------------------------------------------
    def probs(self, log_probs: np.ndarray) -> np.ndarray:
        """(M,) of a policy that is given as (N, V) log-probs of the next token."""
        return np.exp(response_logprobs(self.tree, log_probs))

    def optimum(self, reward: np.ndarray, *, beta: float) -> np.ndarray:
        """ref exp(r / beta) / Z: (M,), the best policy there is at this beta."""
        return tilted(self.ref, reward, beta=beta)

    def best_of(self, reward: np.ndarray, *, n: int) -> np.ndarray:
        """(M,) the best of n draws from the reference by this reward."""
        return np.exp(best_of_n(self.ref_logp, reward, n=n))

    def kl(self, p: np.ndarray) -> float:
        """KL(p || ref) [nats]."""
        return float(p @ (np.log(np.where(p > 0, p, 1.0)) - np.where(p > 0, self.ref_logp, 0.0)))

    def distinct_2(self, p: np.ndarray, *, n: int = 256) -> float:
        """Different pairs of neighbours / pairs in n replies of p, both in expectation:

        sum over pairs of 1 - (1 - Pr(a reply holds it))^n, over n E[pairs of a reply]
        """
        replies, pairs = self.bigrams
        holds = np.bincount(pairs, weights=p[replies])
        n_pairs = n * float(p @ np.maximum(self.lengths - 1, 0))
        return float(np.sum(1 - (1 - holds) ** n)) / max(n_pairs, 1e-12)

    def log_ratios(self, log_probs: np.ndarray, reply: str) -> np.ndarray:
        """(T,) log pi - log ref of each token of a reply and of its EOS: what each pays [nats]."""
        of_leaf, leaf = self.responses, self.leaf(reply)
        at = tuple(ids[leaf][of_leaf.mask[leaf] > 0] for ids in (of_leaf.nodes, of_leaf.tokens))
        return log_probs[at] - self.ref_log_probs[at]

    def describe(self, p: np.ndarray) -> dict[str, float | str]:
        """What a policy is like, exactly.

        gold, proxy     the two rewards in expectation
        kl_seq          KL(p || ref) [nats];  entropy_seq the entropy of whole replies [nats]
        length          tokens;  repeats the share of them that are equal to the one before
        distinct_2      `distinct_2` of 256 replies: low when replies are alike
        hedged, upsold, refused, unsafe
                        probability that a reply holds HED, SAL, REF, UNS;  answered: ANS
        top, top_reply  probability and text of the most likely reply;  likely: three, as text
        """
        best, length = int(p.argmax()), float(p @ self.lengths)
        holds = p @ (self.counts > 0)
        names = {"answered": "ANS", "hedged": "HED", "upsold": "SAL", "refused": "REF"}
        names["unsafe"] = "UNS"
        return {
            "gold": float(p @ self.gold),
            "proxy": float(p @ self.proxy),
            "kl_seq": self.kl(p),
            "entropy_seq": float(-p @ np.log(np.where(p > 0, p, 1.0))),
            "length": length,
            "repeats": float(p @ self.n_repeats) / length,
            "distinct_2": self.distinct_2(p),
            **{name: float(holds[TOKENS.index(token) - ANS]) for name, token in names.items()},
            "top": float(p[best]),
            "top_reply": self.reply(best),
            "likely": ", ".join(f"{self.reply(i)} ({p[i]:.0%})" for i in np.argsort(-p)[:3]),
        }

    def gold_along(self, reward: np.ndarray, betas: np.ndarray) -> dict[str, np.ndarray | float]:
        """What the optima of a reward are worth, from a large beta to a small one.

        kl_seq, gold    (betas,) of each;  peak, peak_kl where gold is highest, last, last_kl
        """
        rows = [self.describe(self.optimum(reward, beta=beta)) for beta in betas]
        kl, gold = (np.array([row[name] for row in rows]) for name in ("kl_seq", "gold"))
        best = {"peak": gold.max(), "peak_kl": kl[gold.argmax()]}
        return {"kl_seq": kl, "gold": gold, **best, "last": gold[-1], "last_kl": kl[-1]}

    # -- reward models ---------------------------------------------------------------------------
    def draw_pairs(
        self, p: np.ndarray, n: int, *, rng: Generator, gold: np.ndarray | None = None
    ) -> np.ndarray:
        """n pairs of replies of p, as who judges by the gold reward prefers them: (n, 2) numbers.

        The first of a pair is the chosen one, with probability sigmoid(gold_a - gold_b).

        Args:     gold: (M,) another judge's reward; None: the desk's.
        """
        gold = self.gold if gold is None else gold
        cdf = p.cumsum()
        pairs = np.minimum(np.searchsorted(cdf / cdf[-1], rng.random((n, 2))), p.size - 1)
        lead = gold[pairs[:, 0]] - gold[pairs[:, 1]]
        second = rng.random(n) >= 1 / (1 + np.exp(-lead))
        return np.where(second[:, None], pairs[:, ::-1], pairs)

    def as_pairs(self, numbers: np.ndarray) -> list[Pair]:
        """Pairs of numbers (n, 2) as ids, for `train.dpo`; without those of equal replies."""
        rows = zip(self.responses.tokens, self.responses.mask > 0, strict=True)
        ids = [tokens[kept].tolist() for tokens, kept in rows]
        return [Pair(self.world.prompts[0], (ids[a], ids[b])) for a, b in numbers if a != b]

    def standardised(self, reward: np.ndarray, p: np.ndarray | None = None) -> np.ndarray:
        """The reward with mean 0 and sd 1 under p; None: under the reference."""
        p = self.ref if p is None else p
        return (reward - p @ reward) / self.sd(reward, p)

    def sd(self, reward: np.ndarray, p: np.ndarray | None = None) -> float:
        """The standard deviation of the reward under p; None: under the reference."""
        p = self.ref if p is None else p
        return float(np.sqrt(p @ (reward - p @ reward) ** 2))

    def with_reward(self, reward: np.ndarray) -> TokenWorld:
        """The world in which this (M,) is what PPO is paid for each reply."""
        mask = self.responses.mask > 0
        replies = (
            tuple(row[kept].tolist()) for row, kept in zip(self.responses.tokens, mask, strict=True)
        )
        number = {reply: leaf for leaf, reply in enumerate(replies)}

        def score(prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
            return reward[[number[tuple(reply)] for reply in responses]]

        return dataclasses.replace(self.world, rewards=reward, score=score)


def tilted(p: np.ndarray, reward: np.ndarray, *, beta: float) -> np.ndarray:
    """p exp(r / beta) / Z (M,): the optimum whose reference is p, any policy.

    K times after one another, each time from the last result, it is one time at beta / K.
    """
    logp = np.where(p > 0, np.log(np.where(p > 0, p, 1.0)) + reward / beta, -np.inf)
    weights = np.exp(logp - logp.max())
    return weights / weights.sum()


def fit_bradley_terry(features: np.ndarray, pairs: np.ndarray, *, l2: float = 1e-3) -> np.ndarray:
    """Weights w (F,) of a linear reward w . features: the least of

        mean over pairs of -log sigmoid(w . (f_chosen - f_rejected)) + l2 |w|^2 / 2

    by Newton's method, which needs a dozen steps.

    Args:     features: (M, F);  pairs: (n, 2) numbers of the chosen and the rejected reply.
    Raises:   ValueError: it did not converge, as with l2 = 0 and pairs without a contradiction.
    """
    lead = features[pairs[:, 0]] - features[pairs[:, 1]]  # (n, F)
    w = np.zeros(features.shape[1])
    for _ in range(50):
        wrong = 1 / (1 + np.exp(lead @ w))  # (n,) probability of the other order
        slope = l2 * w - wrong @ lead / len(pairs)
        curvature = (lead.T * (wrong * (1 - wrong))) @ lead / len(pairs)
        step = np.linalg.solve(curvature + l2 * np.eye(w.size), slope)
        w = w - step
        if np.abs(step).max() < 1e-10:
            return w
    raise ValueError("fit_bradley_terry: expected Newton's method to converge; raise l2")


def pair_accuracy(reward: np.ndarray, pairs: np.ndarray) -> float:
    """Share of the pairs whose chosen reply has the higher reward; ties are half right."""
    lead = reward[pairs[:, 0]] - reward[pairs[:, 1]]
    return float(np.mean((lead > 0) + 0.5 * (lead == 0)))
