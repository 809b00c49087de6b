"""`minirlhf diagnose`: what went wrong in a run, by the rules of rules.toml.

What a run folder lets us compute again is computed, not guessed from a curve: log pi_ref of logged
replies under the saved reference, their tokens, their scores.
"""

import re
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minirlhf.app.logs import Log, read_log
from minirlhf.app.rules import RULES, Rule, Seen, Sign, first_sign
from minirlhf.backend import to_host
from minirlhf.disk import to_json
from minirlhf.errors import InputError
from minirlhf.rlhf.logprobs import response_sum
from minirlhf.runs import pipeline
from minirlhf.runs.config import flat, load_config
from minirlhf.runs.log import read_jsonl, read_metrics
from minirlhf.runs.session import Session, reopen_session
from minirlhf.train.batches import pad_batch
from minirlhf.train.policy import policy_forward
from minirlhf.train.rollout import Samples

MOST_REPLIES = 240  # logged replies that are scored again
LOGGED = {"step": int, "prompt": str, "ids": list, "tokens": int}  # of a reply, in samples.jsonl
LOGGED |= {"ref_logp_seq": float, "score": float}
TEMPERATURES = [0.1 * tenths for tenths in range(4, 21)]  # at which a log-prob may be taken
COMPARED = """objective/kl objective/scores objective/gold objective/entropy
policy/approxkl_avg policy/clipfrac_avg loss/value_avg response_length/mean
response/repeated_bigrams grad_norm""".split()
APART = 5.0  # standard errors, of its own changes, between means over three steps of two runs


class Finding(NamedTuple):
    rule: str
    severity: str  # error, warning
    onset: int | None  # the step from which it holds
    evidence: str
    cause: str
    knob: str


class Diagnosis(NamedTuple):
    findings: list[Finding]  # the first names the cause; those below may follow from it
    unseen: list[str]  # what could not be seen, a sentence each
    iterations: int  # of PPO that were looked at

    @property
    def status(self) -> int:
        """The exit status: 1 if something is wrong."""
        return int(bool(self.findings))

    def __str__(self) -> str:
        lines = [] if self.findings else [f"nothing found in {self.iterations} iterations of PPO"]
        for number, (rule, severity, onset, seen, cause, knob) in enumerate(self.findings, 1):
            follows = ", perhaps because of 1" * (number > 1)
            lines += [
                f"{number}. {severity} from step {onset}: {rule}{follows} ({RULES[rule].measured})",
                f"   seen:  {seen}",
                f"   cause: {cause}",
                f"   first: {knob}",
            ]
        return "\n".join(lines + [f"not seen: {sentence}" for sentence in self.unseen])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def diagnose(run: Any) -> Diagnosis:
    """The findings in a run, or in a log of another program.

    Args:     run: a Run, its folder, or the path of a log.
    Raises:   InputError: there is no log, or it cannot be read.
    """
    log = read_log(getattr(run, "folder", run))
    seen, signs, unseen = _seen(log), {}, []
    for name, rule in RULES.items():
        if sign := rule.look(seen):
            signs[name] = sign
        elif rule.holds and (lacks := [need for need in rule.needs if not seen.has(need)]):
            lacks = ["its settings" if need == "config" else need for need in lacks]
            unseen.append(f"{name}: without {', '.join(lacks)}")
    if not seen.steps:
        unseen = ["anything: the rules look at PPO, and there is no iteration of it"]
    elif log.folder is None:
        again = (name for name, rule in RULES.items() if not rule.holds)
        unseen.append(f"{', '.join(again)}: made again from a run folder alone")
    else:
        try:
            signs |= dict(_made_again(log.folder))
        except ValueError as error:  # InputError, or ids that are none
            unseen.append(f"what is made again from the folder: {error}")
    own = log.folder is not None
    found = [_finding(RULES[name], *signs[name], own) for name in RULES if name in signs]
    return Diagnosis(found, unseen, len(seen.steps))


def _seen(log: Log) -> Seen:
    """The rows of PPO; where a log has the KL as a mean over tokens alone, the sum made of it."""
    seen = Seen([], load_config(log.folder / "config.toml") if log.folder else None)
    for row in log.stages.get("ppo", []):
        if "objective/kl_token" in row and "response_length/mean" in row:
            row = {"objective/kl": row["objective/kl_token"] * row["response_length/mean"]} | row
        if any(name.partition("/")[0] not in ("step", "eval", "heldout") for name in row):
            seen.add(row["step"], row)  # none between two steps of training
    return seen


def _finding(rule: Rule, onset: int, says: str, own: bool = True) -> Finding:
    """Logs of other programs have no flags of ours: the plain name stays."""
    knob = rule.knob if own else re.sub(r"--[\w.-]+, ", "", rule.knob)
    return Finding(rule.name, rule.severity, onset, says, rule.cause, knob)


# -- made again from a run folder ----------------------------------------------------------------
def _made_again(path: Path) -> Iterator[tuple[str, Sign]]:
    """(rule, its sign) of what logged replies are under the saved reference and reward model."""
    rows = read_jsonl(path / "samples.jsonl", LOGGED)
    rows = rows[:: len(rows) // MOST_REPLIES + 1]
    if not rows:
        return
    session, steps = reopen_session(path, look=True), [row["step"] for row in rows]
    logged = {name: np.array([row[name] for row in rows]) for name in LOGGED if name != "ids"}
    ids = [row["ids"] for row in rows]
    own = np.array(list(map(len, ids)))
    if (own != logged["tokens"]).any():
        shown = {"tokens counted": logged["tokens"], "tokens of the reply": own}
        yield "padding-counted", first_sign(steps, shown, own != logged["tokens"])
    some = Samples([session.prompt_ids(row["prompt"]) for row in rows], ids, None)
    if not session.config.ppo.reset_reference_every:
        if sign := _reference(session, some, steps, logged["ref_logp_seq"]):
            yield "reference-logp", sign
    if session.world.reward is None:  # else it would run code of the user's
        again = session.score_with(pipeline.reward_stage(session, {}))(some)
        off = np.abs(logged["score"] - again)
        if np.median(off) > RULES["reference-logp"].limits["nats"]:
            shown = {"logged score": logged["score"], "of the saved reward model": again}
            yield "reward-drift", first_sign(steps, shown, off > np.median(off) / 2)


def _reference(session: Session, some: Samples, steps: list, logged: np.ndarray) -> Sign | None:
    """Is log pi_ref of logged replies that of the saved reference, at the run's temperature?"""
    reference = pipeline.reference_stage(session)
    batch = pad_batch(*some[:2], pad_id=session.tokenizer.pad, config=session.gpt)

    def made(temperature: float) -> np.ndarray:
        parts = np.zeros(len(logged))
        for rows in batch.groups(size=32, config=session.gpt):
            part = batch.part(rows)
            same = {"batch": part, "config": session.gpt, "keep": False}
            logp = policy_forward(reference, temperature=temperature, **same)[0].logp
            parts[rows] = to_host(response_sum(logp, mask=part.response_mask))
        return parts

    again = made(session.config.ppo.temperature)
    off, nats = np.abs(logged - again), RULES["reference-logp"].limits["nats"]
    if np.median(off) < nats:
        return None
    step, says = first_sign(steps, {"logged log pi_ref": logged, "made again": again}, off > nats)
    others = {t: float(np.median(np.abs(logged - made(t)))) for t in TEMPERATURES}
    best = min(others, key=others.get)
    if others[best] < np.median(off) / 5:
        says += f"; it is that of temperature {best:g}, not {session.config.ppo.temperature:g}"
    return step, says


# -- while a run trains --------------------------------------------------------------------------
def check_names(halt_on: tuple[str, ...]) -> None:
    """Refuse, by InputError, what names no rule."""
    for name in halt_on:
        if name not in {"any", *RULES}:
            raise InputError(
                f"--halt-on: expected any, or some of {', '.join(RULES)}; got {name!r}: correct it"
            )


def watched(session: Session) -> Callable[[int, str, dict[str, Any]], None]:
    """A `watch` that warns once of each rule, and stops the run for those of halt_on."""
    check_names(session.config.halt_on)
    before, seen, left = session.watch, Seen([], session.config), dict(RULES)

    def look() -> Iterator[Finding]:
        for name, rule in [*left.items()]:
            if sign := rule.look(seen):
                del left[name]
                yield _finding(rule, *sign)

    def watch(step: int, stage: str, values: dict[str, Any]) -> None:
        before(step, stage, values)
        if stage != "ppo":
            return
        if step and not seen.steps:
            for row in read_metrics(session.folder):
                if row["stage"] == "ppo" and row["step"] < step:
                    seen.add(row["step"], row)
            list(look())  # has been said by then
        seen.add(step, values)
        if len(seen.steps) % (1 + len(seen.steps) // 200):  # of a long run not at each step
            return
        for found in look():
            text = f"{found.rule}: {found.cause} ({found.evidence})"
            session.say(f"{found.severity} at step {step}: {text}")
            if {"any", found.rule} & {*session.config.halt_on}:
                anew = f"minirlhf train --config {session.folder / 'config.toml'} --out NEW"
                how = f"{found.knob}, in a new run (`{anew}`)"
                said = f"stopped at step {step} by --halt-on {text}: {how}"
                session.stop = InputError(said, status=1)

    return watch


# -- the command ---------------------------------------------------------------------------------
def diagnose_command(logs: tuple[Path, ...] = (), *, json: bool = False, diff: bool = False) -> int:
    """What went wrong in a run, with evidence. Exit status 1: something did.

    Args:
        logs: Run folder, or a log of TRL, verl, OpenRLHF.
        json: As JSON.
        diff: Of two: where the second left the first.
    """
    if len(logs) != 1 + diff:
        raise InputError(f"diagnose: expected RUN, or --diff A B; got {len(logs)}: name a run")
    if diff:
        lines = difference(*logs)
        print(to_json({"differences": lines}).decode() if json else "\n".join(lines))
        return 0
    found = diagnose(*logs)
    rows = [finding._asdict() for finding in found.findings]
    print(to_json({"findings": rows, "unseen": found.unseen}).decode() if json else found)
    return found.status


def difference(a: Path, b: Path) -> list[str]:
    """Where run b left run a, in words: settings; metrics, in the order in which they part."""
    one, two = (_seen(read_log(path)) for path in (a, b))
    was, now = (dict(flat(seen.config)) if seen.config else {} for seen in (one, two))
    changed = [name for name in was if name in now and was[name] != now[name] and name != "out"]
    n, parted = min(len(one.steps), len(two.steps)), []
    for metric in COMPARED if n > 1 else ():
        x, y = one.few(metric)[:n], two.few(metric)[:n]
        noise = sum(np.mean(np.diff(seen[metric][:n]) ** 2) for seen in (one, two)) / 2
        with np.errstate(all="ignore"):  # nan: a log lacks it, or nothing ever changes
            off = np.abs(y - x) / np.sqrt(noise / 3)
        if (off > APART).any():
            i = int((off > APART).argmax())
            says = f"{metric} {x[i]:.4g} and {y[i]:.4g}, {off[i]:.0f} standard errors apart"
            parted.append((i, -off[i], f"from step {one.steps[i]} {says}"))
    lines = [f"{name}: {was[name]!r} and {now[name]!r}" for name in changed]
    lines += [says for *_, says in sorted(parted)]
    says = f"no metric is {APART:g} standard errors apart in {n} steps of PPO"
    return lines + [says] * (not parted)
