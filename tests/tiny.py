"""What several test files need: a model of two blocks, seven letters, ragged batches."""

import numpy as np
from hypothesis import strategies as st

from minirlhf.app.cases import Draw
from minirlhf.backend import to_device, to_host
from minirlhf.exact.enumeration import response_logprobs
from minirlhf.nn.sampling import Sampling, generate
from minirlhf.nn.transformer import GPTConfig, init_transformer
from minirlhf.runs.metrics import iteration_metrics
from minirlhf.train.batches import pad_batch
from minirlhf.train.optimizer import Optimizer
from minirlhf.train.policy import policy_forward
from minirlhf.train.ppo import Iteration, make_experience, ppo_update
from minirlhf.train.reward_model import Pair
from minirlhf.train.rollout import score_rollout
from minirlhf.train.sampler import sample_responses
from minirlhf.tree import tree_map


class Letters:
    """A tokenizer of one letter a token: a .. g are 0 .. 6."""

    bos, sep, eos, pad = 7, 8, 9, 10
    vocab_size = 11

    def prompt_ids(self, text, max_tokens=None):
        return [self.bos, *("abcdefg".index(letter) for letter in text), self.sep]

    def decode(self, ids):
        return "".join("abcdefg"[i] for i in ids if i < 7)


CONFIG = GPTConfig(vocab_size=Letters.vocab_size, n_ctx=12, n_layer=2, n_head=2, d_model=8)


def sampled(params, texts, *, seed, max_tokens=6, temperature=1.0, device="cpu"):
    """`sample_responses` to prompts of letters."""
    letters = Letters()
    samples = sample_responses(
        params,
        [letters.prompt_ids(text) for text in texts],
        config=CONFIG,
        stop_id=letters.eos,
        pad_id=letters.pad,
        max_tokens=max_tokens,
        rng=np.random.default_rng(seed),
        sampling=Sampling(temperature),
        device=device,
    )
    responses = [letters.decode(ids) for ids in samples.response_ids]
    return samples._replace(prompts=list(texts), responses=responses)


def generated(params, batch, *, max_new=6, seed=1, **sampling):
    """`generate` after the prompts of a batch of letters; params of the transformer alone."""
    return generate(
        params,
        tokens=batch.tokens,
        mask=batch.mask,
        config=CONFIG,
        max_new=max_new,
        stop_id=Letters.eos,
        pad_id=Letters.pad,
        rng=np.random.default_rng(seed),
        sampling=Sampling(**sampling),
    )


def make_params(*, seed=0, dtype=np.float64, heads=("value_head",), config=CONFIG):
    """A model whose every parameter matters: the usual start plus noise on all leaves."""
    rng = np.random.default_rng(seed)
    C = config.d_model
    params = {"transformer": init_transformer(config, rng=rng, dtype=np.float64)}
    params.update({head: {"w": np.zeros((C, 1)), "b": np.zeros(1)} for head in heads})
    return tree_map(lambda a: (a + 0.3 * rng.standard_normal(a.shape)).astype(dtype), params)


def make_ids(lengths, *, seed=0, low=0, high=7):
    """One list of random letters for each length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(low, high, size=n).tolist() for n in lengths]


def make_batch(prompts=(3, 1, 4, 2), responses=(2, 5, 1, 4), *, seed=0, dtype=np.float64):
    """Prompts and responses of the given numbers of letters, padded."""
    ids = make_ids([*prompts, *responses], seed=seed)
    n = len(prompts)
    return pad_batch(ids[:n], ids[n:], pad_id=Letters.pad, config=CONFIG, dtype=dtype)


def toy_pairs(n, *, seed):
    """Whoever says "a" is preferred; everything else is noise, the lengths too."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(n):
        prompt, chosen, rejected = make_ids(
            rng.integers(1, 5, size=3), seed=int(rng.integers(2**32)), low=1
        )
        chosen.insert(int(rng.integers(len(chosen) + 1)), 0)
        replies = [*chosen, Letters.eos], [*rejected, Letters.eos]
        pairs.append(Pair([Letters.bos, *prompt], replies))
    return pairs


def toy_rankings(n, *, seed, size=4):
    """The more often a reply says "a", the better it is."""
    rng = np.random.default_rng(seed)
    rankings = []
    for _ in range(n):
        prompt, *rest = make_ids(
            rng.integers(1, 4, size=size + 1), seed=int(rng.integers(2**32)), low=1
        )
        replies = [[*[0] * (size - 1 - i), *ids, Letters.eos] for i, ids in enumerate(rest)]
        rankings.append(Pair([Letters.bos, *prompt], tuple(replies)))
    return rankings


@st.composite
def ragged(draw, *, max_B=3, max_T=5):
    """(rng, mask): responses of 1 to T tokens, padded on the right."""
    B, T = draw(st.integers(1, max_B)), draw(st.integers(1, max_T))
    lengths = draw(st.lists(st.integers(1, T), min_size=B, max_size=B))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng, (np.arange(T) < np.array(lengths)[:, None]).astype(np.float64)


def with_junk(x, mask, *, junk=(np.nan, np.inf, -np.inf, 1e30)):
    """A copy of x whose padding holds the worst there is."""
    x = x.copy()
    x[mask == 0] = np.resize(junk, int((mask == 0).sum()))
    return x


def moved(value, move):
    """`value` with every array in it, through dicts, lists and tuples, given to `move`."""
    if isinstance(value, np.ndarray):
        return move(value)
    if isinstance(value, dict):
        return {key: moved(item, move) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(item, move) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(moved(item, move) for item in value)
    return value


def ppo_step(device, *, settings, dtype=np.float64, kl_coef=0.3):
    """Sample, score, learn once on `device`; everything comes back to the host.

    Returns:
        response ids, mask, parameters after the update (flat), metrics.
    """

    def on_device(tree):
        return tree_map(lambda array: to_device(array, device), tree)

    heads = ("value_head",) if settings.has_critic else ()
    policy = on_device(make_params(seed=1, dtype=dtype, heads=heads))
    reference = on_device(make_params(seed=2, dtype=dtype, heads=()))
    optimizer = Optimizer(policy, settings.optimizer, total_steps=8)
    samples = sampled(
        optimizer.params,
        ["abc", "d", "ga", "bbbb", "", "ce"],
        seed=3,
        max_tokens=5,
        temperature=settings.temperature,
        device=device,
    )
    samples = samples._replace(batch=samples.batch._replace(mask=samples.batch.mask.astype(dtype)))
    if settings.importance != "none":  # another policy has sampled
        other = on_device(make_params(seed=5, dtype=dtype))
        out, _ = policy_forward(other, batch=samples.batch, config=CONFIG)
        samples = samples._replace(hidden=None, sampler_logp=out.logp)
    rollout = score_rollout(
        optimizer.params,
        reference,
        samples,
        score=lambda samples: np.array(
            [
                text.count("a") - 0.1 * len(ids)
                for text, ids in zip(samples.responses, samples.response_ids, strict=True)
            ]
        ),
        config=CONFIG,
        settings=settings,
    )
    known = {"settings": settings, "kl_coef": kl_coef, "stop_id": Letters.eos}
    experience = make_experience(rollout, **known)
    updates = ppo_update(
        optimizer, experience, config=CONFIG, settings=settings, rng=np.random.default_rng(4)
    )
    iteration = Iteration(rollout, experience, updates, kl_coef, kl_coef, reference)
    metrics = iteration_metrics(iteration, settings=settings, stop_id=Letters.eos)
    mask = to_host(rollout.batch.response_mask)
    return samples.response_ids, mask, to_host(optimizer.flat), metrics


def tilt(tree, ref_log_probs, rewards, *, kl_coef):
    """pi*(y|x) = ref(y|x) exp(r / beta) / Z(x), no tree: log Pr*(x, y) (M,), log Z (n_prompts,)."""
    logp = response_logprobs(tree, ref_log_probs) + rewards / kl_coef
    prompt = tree.prompt[tree.leaf_node]
    of_prompts = [logp[prompt == x] for x in range(tree.n_prompts)]
    top = np.array([at.max() for at in of_prompts])
    sums = [np.exp(at - most).sum() for at, most in zip(of_prompts, top, strict=True)]
    log_sum = np.log(sums) + np.log(tree.n_prompts)
    return (logp - top[prompt]) - log_sum[prompt], top + log_sum


class HypothesisDraw(Draw):
    """Hypothesis draws sizes, settings and the seed of the generator that draws the entries."""

    def __init__(self, draw):
        super().__init__(np.random.default_rng(draw(st.integers(0, 2**32 - 1))))
        self.draw = draw

    def integer(self, low, high):
        return self.draw(st.integers(low, high))

    def pick(self, options):
        return self.draw(st.sampled_from(options))


def map_arrays(f, value):
    """f of every array in nested dicts, lists, tuples and named tuples; the rest as it is."""
    if isinstance(value, dict):
        return {key: map_arrays(f, x) for key, x in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_arrays(f, x) for x in value))
    if isinstance(value, list | tuple):
        return type(value)(map_arrays(f, x) for x in value)
    return f(value) if hasattr(value, "dtype") else value


def arrays_in(value):
    found = []
    map_arrays(found.append, value)
    return found
