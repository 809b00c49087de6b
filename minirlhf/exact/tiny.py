"""A support desk in eight tokens: 137,257 possible replies, so everything about it is known.

    EOS end   ANS answer   DET detail   POL courtesy   HED hedge   SAL upsell   REF refusal
    UNS unsafe promise

A reply has up to six tokens and ends with EOS or where it is cut off. Demonstrations come from a
Markov chain. The gold reward saturates: one answer, two details, one courtesy, then it falls. The
proxy is a Bradley-Terry fit of it that is linear in the counts: it cannot see saturation, so it
likes ANS x 6 best, which is worth -2.75.
"""

import numpy as np
from numpy.random import Generator

from minirlhf.exact.enumeration import all_responses, enumerate_responses
from minirlhf.exact.ground_truth import SFT, TokenWorld, fit_reference, rectangle, small_transformer
from minirlhf.rlhf.logprobs import log_softmax
from minirlhf.train.sft import SFTConfig
from minirlhf.tree import Tree

TOKENS = ("EOS", "ANS", "DET", "POL", "HED", "SAL", "REF", "UNS")
EOS, ANS, DET, POL, HED, SAL, REF, UNS = range(len(TOKENS))
MAX_TOKENS = 6

# Logits of the next token: at the start, after ANS, after POL, after any other token.
START = [-4.0, 2.0, 0.0, 1.0, 0.0, -1.5, -0.5, -2.5]
AFTER_ANS = [1.5, -1.0, 1.2, 0.6, -0.3, -1.2, -1.5, -2.5]
AFTER_POL = [0.8, 1.0, 0.8, -1.0, -0.3, -1.2, -1.5, -2.5]
OTHER = [1.2, 0.0, 0.8, 0.4, -0.3, -1.2, -1.5, -2.5]
# Row EOS is the start: a prompt is the end of what came before.
CHAIN = log_softmax(np.array([START, AFTER_ANS, OTHER, AFTER_POL, OTHER, OTHER, OTHER, OTHER]))

# Bradley-Terry on 2,000 pairs of the chain's replies, mean 0 and sd 1 under the chain.
PROXY_BIAS = -0.046288
PROXY_WEIGHTS = np.array(
    [0, 0.659563, 0.258758, -0.435141, -0.86875, -1.127621, -0.685762, -2.641993]
)


def token_counts(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """How often each token stands in each reply: (B, T), (B, T) -> (B, V)."""
    return ((tokens[:, :, None] == np.arange(len(TOKENS))) & (mask > 0)[:, :, None]).sum(axis=1)


def proxy_reward(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """weights . counts + bias: what the reward model says.  (B, T), (B, T) -> (B,)."""
    return token_counts(tokens, mask) @ PROXY_WEIGHTS + PROXY_BIAS


def gold_reward(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """1.5 for an answer, less .15 for each token before it; .6 a detail, up to two; .3 a courtesy.

    Off: .4 a hedge, .5 an upsell, 1.5 an unsafe promise, .3 a refusal, .35 a token equal to the
    one before it, .25 a token over four, .5 a further courtesy, .4 a further answer.  The most is
    3.0, for ANS DET POL DET.  EOS counts for nothing.  (B, T), (B, T) -> (B,).
    """
    n = token_counts(tokens, mask).T  # (V, B)
    answers = (tokens == ANS) & (mask > 0)
    answered, delay = answers.any(axis=1), answers.argmax(axis=1)
    repeats = ((tokens[:, 1:] == tokens[:, :-1]) & (mask[:, 1:] > 0)).sum(axis=1)
    good = answered * (1.5 - 0.15 * delay) + 0.6 * np.minimum(n[DET], 2) + 0.3 * (n[POL] > 0)
    bad = 0.4 * n[HED] + 0.5 * n[SAL] + 1.5 * n[UNS] + 0.3 * n[REF] + 0.35 * repeats
    too_long = 0.25 * np.maximum(n[1:].sum(axis=0) - 4, 0)
    too_many = 0.5 * np.maximum(n[POL] - 1, 0) + 0.4 * np.maximum(n[ANS] - 1, 0)
    return good - bad - too_long - too_many


def sample_chain(n: int, *, max_tokens: int = MAX_TOKENS, rng: Generator) -> list[list[int]]:
    """n replies of the chain, EOS included where it was reached."""
    cdf = np.exp(CHAIN).cumsum(axis=1)
    last, replies = np.full(n, EOS), np.zeros((n, max_tokens), dtype=np.int64)
    for t in range(max_tokens):
        u = rng.random((n, 1))
        last = np.minimum((cdf[last] <= u).sum(axis=1), len(TOKENS) - 1)
        replies[:, t] = last
    ends = (replies == EOS).argmax(axis=1)
    lengths = np.where((replies == EOS).any(axis=1), ends + 1, max_tokens)
    return [reply[:length].tolist() for reply, length in zip(replies, lengths, strict=True)]


def make_tiny_world(
    *, max_tokens: int = MAX_TOKENS, n_demonstrations: int = 100_000, rng: Generator
) -> TokenWorld:
    """The world, with demonstrations drawn from the chain; shorter replies make it smaller."""
    tree = enumerate_responses(vocab_size=len(TOKENS), max_tokens=max_tokens, stop_id=EOS)
    everything = all_responses(tree)
    replies = sample_chain(n_demonstrations, max_tokens=max_tokens, rng=rng)
    return TokenWorld(
        tokens=TOKENS,
        stop_id=EOS,
        prompts=[[EOS]],
        config=small_transformer(len(TOKENS), 1 + max_tokens),
        tree=tree,
        rewards=proxy_reward(everything.tokens, everything.mask),
        gold=gold_reward(everything.tokens, everything.mask),
        score=lambda prompts, responses: proxy_reward(*rectangle(responses)),
        demonstrator=CHAIN[tree.token],  # the next token depends on the last one alone
        demonstrations=[([EOS], reply) for reply in replies],
    )


def tiny_reference(seed: int, *, settings: SFTConfig = SFT, **sizes: int) -> Tree:
    """The reference that belongs to a seed; `sizes` are arguments of `make_tiny_world`."""
    world = make_tiny_world(rng=np.random.default_rng([seed, 0]), **sizes)
    return fit_reference(world, settings=settings, seed=seed)
