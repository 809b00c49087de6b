"""One optimiser for all three stages: parameters in one flat buffer, clip, schedule, AdamW."""

import functools

import numpy as np

from minirlhf.backend import Array, get_xp, to_host
from minirlhf.errors import InputError
from minirlhf.nn import adam
from minirlhf.train.settings import OptimizerConfig
from minirlhf.tree import Tree, tree_items, tree_leaves, tree_map
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

    def step(self, gradients: Tree, *, loss: float) -> dict[str, float]:
        """One update.

        Returns:  grad_norm, the global norm of the gradient before clipping, and the learning rate
                      lr.
        Raises:   NonFiniteError: the loss or a gradient is nan or inf, and the parameters are
                      unchanged; or the update was so large that a parameter is.
        """
        c, learning_rate = self.config, self.learning_rate
        leaves = tree_leaves(tree_map(lambda _, g: g, self.params, gradients))  # buffer's order
        get_xp(*leaves).concatenate([leaf.reshape(-1) for leaf in leaves], out=self.dflat)
        with np.errstate(invalid="ignore", over="ignore"):  # looked for in the next lines
            _, norm = adam.clip_global_norm(self.dflat, c.max_grad_norm or float("inf"))
        norm = float(norm)
        if not (np.isfinite(norm) and np.isfinite(loss)):
            raise NonFiniteError(_where_not_finite(gradients, loss))
        self.move(learning_rate)
        if not np.isfinite(float(self.flat.sum(dtype=np.float64))):
            raise NonFiniteError(_what_overflowed(self.params))
        return {"grad_norm": norm, "lr": learning_rate}

    def move(self, learning_rate: float) -> None:
        """AdamW along `dflat`, piece by piece, by all workers."""
        c, (step, *moments) = self.config, self.state
        rates = {"learning_rate": learning_rate, "beta1": c.beta1, "beta2": c.beta2, "eps": c.eps}
        f = functools.partial(_adamw, step, {**rates, "form": c.form})
        over_pieces(f, self.flat, self.dflat, *moments, *self._decay)
        self.state = self.state._replace(step=step + 1)

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
