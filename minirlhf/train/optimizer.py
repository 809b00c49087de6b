"""One optimiser for all three stages: parameters in one flat buffer, clip, schedule, AdamW."""

import functools

import numpy as np

from minirlhf.backend import Array, fused, get_xp, to_host
from minirlhf.errors import InputError
from minirlhf.nn import adam
from minirlhf.train.settings import OptimizerConfig
from minirlhf.tree import Tree, tree_items, tree_map
from minirlhf.workers import over_pieces, share, share_packed


class NonFiniteError(InputError):
    """A loss, a gradient or a parameter is nan or inf."""


class Optimizer:
    """Owns the parameters: `params` are views into one buffer that `step` updates in place."""

    def __init__(self, params: Tree, config: OptimizerConfig, *, total_steps: int):
        self.config = config
        self.total_steps = total_steps
        self.flat, self.params = share_packed(params)  # the workers see every update
        self.dflat = share(self.flat)  # the last gradient, clipped
        self.state = adam.AdamWState(0, *(share(x) for x in adam.init_adamw(self.flat)[1:]))
        self.skipped = 0  # updates that the schedule counts although they were not made
        decay = config.weight_decay
        self._decay = (share(decay * adam.decay_mask(params)),) if decay else ()

    @property
    def updates(self) -> int:
        """Updates so far, those that were skipped among them."""
        return self.state.step + self.skipped

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        c = self.config
        return adam.scheduled_lr(
            self.updates,
            peak=c.learning_rate,
            total=self.total_steps,
            warmup=c.warmup,
            kind=c.schedule,
            floor=c.floor,
        )

    def step(
        self, gradients: Tree, *, loss: Array | float, parts: dict[str, Array] | None = None
    ) -> dict[str, float]:
        """One update. All numbers are fetched at its end: a GPU with kernels is waited for once.

        Args:     loss: ().
                  parts: numbers () to fetch with those of the update.
        Returns:  parts; grad_norm, the global norm of the gradient before clipping; and the
                      learning rate lr.
        Raises:   NonFiniteError: the loss or a gradient is nan or inf, and nothing is changed; or
                      the update was so large that a parameter is.
        """
        xp, c, learning_rate = get_xp(self.flat), self.config, self.learning_rate
        leaves: list[Array] = []  # in the buffer's order
        tree_map(lambda _, g: leaves.append(g.reshape(-1)), self.params, gradients)
        xp.concatenate(leaves, out=self.dflat)
        with np.errstate(invalid="ignore", over="ignore"):  # looked for in the next lines
            _, norm = adam.clip_global_norm(self.dflat, c.max_grad_norm or float("inf"))
        parts = parts or {}
        numbers = xp.stack([xp.asarray(x) for x in (norm, loss, *parts.values())])
        self.move(learning_rate, numbers[:2])
        numbers = to_host(xp.stack([*numbers, self.flat.sum(dtype=np.float64)]))  # the one wait
        norm, loss, *told, total = numbers.tolist()
        if not (np.isfinite(norm) and np.isfinite(loss)):
            raise NonFiniteError(_where_not_finite(gradients, loss))
        if not np.isfinite(total):
            raise NonFiniteError(_what_overflowed(self.params))
        self.state = self.state._replace(step=self.state.step + 1)
        return dict(zip(parts, told, strict=True)) | {"grad_norm": norm, "lr": learning_rate}

    def move(self, learning_rate: float, numbers: Array) -> None:
        """AdamW along `dflat`; nothing is changed where one of the numbers is nan or inf."""
        c, (step, *moments) = self.config, self.state
        rates = {"learning_rate": learning_rate, "beta1": c.beta1, "beta2": c.beta2, "eps": c.eps}
        same = {"numbers": numbers, "step": step, "rates": {**rates, "form": c.form}}
        move_if_finite(self.flat, self.dflat, *moments, *self._decay, **same)

    def skip(self, n_updates: int) -> None:
        """Let the learning rate go on as if n_updates had been made."""
        self.skipped += n_updates

    def state_tree(self) -> Tree:
        """What a checkpoint must hold, as host arrays, which the next update may overwrite."""
        return {
            "flat": to_host(self.flat),
            "mean": to_host(self.state.mean),
            "var": to_host(self.state.var),
            "step": np.array(self.state.step),
            "skipped": np.array(self.skipped),
        }

    def load_state_tree(self, tree: Tree) -> None:
        """Go on from a checkpoint's `state_tree`."""
        xp = get_xp(self.flat)
        self.flat[...] = xp.asarray(tree["flat"])
        self.skipped = int(tree["skipped"])
        moments = share(xp.asarray(tree["mean"])), share(xp.asarray(tree["var"]))
        self.state = adam.AdamWState(int(tree["step"]), *moments)


@fused
def move_if_finite(flat: Array, *others: Array, numbers: Array, step: int, rates: dict) -> None:
    """Piece by piece, by all workers. What is asked here on a CPU, on a GPU its kernel asks."""
    if get_xp(numbers).isfinite(numbers).all():
        over_pieces(functools.partial(_adamw, step, rates), flat, *others)


def _adamw(
    step: int, rates: dict, flat: Array, dflat: Array, mean: Array, var: Array, decay: Array = 0.0
) -> None:
    adam.adamw_step(flat, dflat, adam.AdamWState(step, mean, var), weight_decay=decay, **rates)


def _where_not_finite(gradients: Tree, loss: float) -> str:
    bad = [path for path, g in tree_items(gradients) if not np.isfinite(to_host(g)).all()]
    what = f"the gradient of {bad[0]}" if bad else "the gradient's norm"
    if not np.isfinite(loss):
        what = f"the loss ({loss})" + (f" and {what}" if bad else "")
    return (
        f"training: expected a finite loss and gradient; {what} is not finite: "
        "lower the learning rate, or look at the rewards and the data"
    )


def _what_overflowed(params: Tree) -> str:
    bad = [path for path, p in tree_items(params) if not np.isfinite(to_host(p)).all()]
    return (
        f"training: expected finite parameters; the update made {bad[0] if bad else 'their sum'} "
        "nan or inf: lower the learning rate"
    )
