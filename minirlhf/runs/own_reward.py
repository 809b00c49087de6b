"""The user's own reward in a run: may its code run, and is it still the one of the beginning?

A run folder may come from somebody else, and a reward is code. What a folder's config.toml names
runs only if its user named it: by --reward, in Python, or when the run began on this machine. Such
names are kept, with the digest of their source, in a file outside of all run folders.
"""

import hashlib
import inspect
import json
import os
import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from minirlhf.disk import read_object, shorten, to_json, write_whole
from minirlhf.errors import InputError
from minirlhf.runs.config import TrainConfig, save_config
from minirlhf.worlds import rewards
from minirlhf.worlds.rewards import Reward, UserReward, name_of, ready_made
from minirlhf.worlds.world import World

TRIED = 4  # texts that a reward is asked about before anything else is done


def fingerprint(reward: Reward) -> str:
    """SHA-256 of a reward's name and of its file or source, which is not run for it; or ""."""
    name = name_of(reward)
    place, _, function = name.rpartition(":")
    try:
        if name.startswith("words:"):
            function, source = "words:", Path(name[len("words:") :]).read_bytes()
        elif ready_made(name):
            function, source = name, b""
        elif place == "python":  # an object that can be called has no source, but its class has
            written = reward if hasattr(reward, "__name__") else type(reward)
            source = inspect.getsource(written).encode()
        else:
            file = place if place.endswith(".py") else rewards.module_file(place)
            source = Path(file).read_bytes()
    except Exception:  # inspect raises what it finds: OSError, TypeError, TokenError, ..
        return ""
    return hashlib.sha256(repr(function).encode() + source).hexdigest()


def sources_gone(config: TrainConfig) -> bool:
    """Can the texts of a run no longer be read, or the file of its reward not be found?"""
    texts = (path for path in (config.corpus, config.pairs) if path)
    named = config.reward.rpartition(":")[0]  # else one of minirlhf's own, or no name
    return not all(map(os.path.exists, texts)) or bool(named and not fingerprint(config.reward))


def _names_file() -> Path:
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(home, "minirlhf/rewards.jsonl")


def remember(name: str, sha256: str) -> None:
    """Keep that the user named this reward."""
    with suppress(OSError, RuntimeError):  # then `resume` asks for the name again
        if not _is_named(name, sha256):
            _names_file().parent.mkdir(parents=True, exist_ok=True)
            with open(_names_file(), "a", encoding="ascii") as file:
                file.write(f"{json.dumps([name, sha256])}\n")


def _is_named(name: str, sha256: str | None) -> bool:
    """Did the user name it on this machine, or can it be no code but minirlhf's own?"""
    if not name or ready_made(name) or name.startswith("python:"):
        return True
    with suppress(OSError, RuntimeError, ValueError):
        return json.dumps([name, sha256]) in _names_file().read_text("ascii").splitlines()
    return False


def refuse_foreign_code(folder: Path, reward: str) -> None:
    """Refuse the reward that the config.toml of a run names, unless its user has named it too."""
    if not _is_named(reward, read_object(folder / "world.json").get("reward_sha256")):
        code = shorten(shlex.quote(reward), 200)
        raise InputError(
            f"{folder}: expected a reward that you named; its own is code that came with the "
            f"folder and would run: if you trust it, add --reward {code}"
        )


def reopened(folder: Path, config: TrainConfig, named: Reward, changed: bool) -> UserReward:
    """The reward that a run began with, `named` anew by its user; another only if `changed`."""
    if not config.reward and (config.pairs or not config.corpus):
        raise InputError(
            f"{folder}: expected a run with a reward of its own, to name it again; it has a reward "
            "model: leave out --reward"
        )
    if not named:
        refuse_foreign_code(folder, config.reward)
    reward = named or config.reward
    began, found = read_object(folder / "world.json").get("reward_sha256"), fingerprint(reward)
    if config.reward and found not in ("", began) and not changed:
        raise InputError(
            f"{name_of(reward)}: expected the reward that the run began with; it has changed: "
            f"restore it, or take it as it is with {_resume(folder, reward)}"
        )
    remember(name_of(reward), found)
    return rewards.load_reward(reward, config.reward_timeout)


def keep_reward(folder: Path, config: TrainConfig, reward: Reward) -> None:
    """A reward that was moved, changed and accepted, or the first, is the run's from here on."""
    world, name, sha256 = read_object(folder / "world.json"), name_of(reward), fingerprint(reward)
    was = config.reward, world.get("reward_sha256")
    if was != (name, sha256) and (sha256 or not config.reward):
        write_whole(folder / "world.json", to_json(world | {"reward_sha256": sha256}))
        save_config(folder / "config.toml", replace(config, reward=name))


def _resume(folder: Path, reward: Reward) -> str:
    """What goes on with a run whose reward has another source now."""
    if name_of(reward).startswith("python:"):
        return f"minirlhf.resume({str(folder)!r}, reward=.., accept_changed_reward=True)"
    return f"`minirlhf resume {shlex.quote(str(folder))} --accept-changed-reward`"


def try_reward(world: World) -> list[str]:
    """Notes on its reward, asked about a few texts: a broken one is told before training."""
    values = world.rewards(*map(list, zip(*world.demonstrations[:TRIED], strict=True)))
    same = f"{world.reward.name}: gave {values[0]:g} to each of the first {len(values)} texts"
    same = same if len(values) > 1 == len(set(values)) else ""
    return [note for note in (world.reward.guessed, same) if note]


def going_on(world: World, folder: Path) -> World:
    """The world, with a reward whose errors say how the run in the folder goes on."""
    if not world.reward:
        return world
    then = f"correct the function and go on with {_resume(folder, world.reward.name)}"
    return replace(world, reward=replace(world.reward, then=then))
