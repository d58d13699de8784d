"""Games of TextWorld: a prompts file of them, and the environment that `agent_opd.py` plays.

    pip install textworld
    python tools/textworld_games.py --out runs/games --train 32 --test 8
    python forks/agent_opd.py --environment tools/textworld_games.py:Game \\
        --prompts runs/games/train.jsonl --test-prompts runs/games/test.jsonl ...

A row names its game by seed and sizes, from which TextWorld generates and compiles it (seconds).
Compiled games are kept in the folder $OPD_TEXTWORLD [~/.cache/opd-textworld] and made there again
where they are missing, so that a prompts file is all that has to be copied.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # opd_run, without installation

from opd_run.console import RunError, optional

# At import, so that a run with --environment says that it is missing before a weight is read.
try:
    textworld = optional("textworld", "tools/textworld_games.py")
except RunError as error:
    if __name__ == "__main__":
        raise SystemExit(f"error: {error}") from None
    raise

Row = dict[str, Any]
PROMPT = "You are playing a text game. Answer with one of the commands and nothing else.\n"


def game_of(row: Row) -> Path:
    """The compiled game, .z8, of a row; a .json of TextWorld's is beside it. Made if missing.

    Raises:
        RunError: a row of another prompts file, which names no game.
    """
    names = "rooms", "objects", "quest_length", "seed"
    if missing := [name for name in names if name not in row]:
        raise RunError(f"tools/textworld_games.py: a row has no field {' and no '.join(missing)}")
    rooms, objects, quest_length, seed = (int(row[name]) for name in names)
    folder = Path(os.environ.get("OPD_TEXTWORLD") or "~/.cache/opd-textworld").expanduser()
    name = f"{textworld.__version__}-rooms{rooms}-objects{objects}-quest{quest_length}-seed{seed}"
    game = folder / f"{name}.z8"
    if game.exists():
        return game
    folder.mkdir(parents=True, exist_ok=True)
    options = textworld.GameOptions()
    options.seeds = seed
    options.nb_rooms, options.nb_objects, options.quest_length = rooms, objects, quest_length
    with tempfile.TemporaryDirectory(dir=folder) as made:  # several processes may make it
        options.path = str(Path(made) / game.name)
        textworld.generator.compile_game(textworld.generator.make_game(options), options)
        for suffix in (".json", ".z8"):  # in this order: a .z8 that is there is complete
            os.replace(Path(options.path).with_suffix(suffix), game.with_suffix(suffix))
    return game


def command_of(text: str) -> str:
    """What a turn says to the game: its first line, in lower case, without a full stop."""
    lines = text.strip().splitlines()
    return lines[0].lower().strip(" .>") if lines else ""


def heard(feedback: str) -> str:
    """What the game says, without the score line that follows its prompt, and without gaps."""
    text = re.sub(r"\n>[^\n]*$", "", feedback.rstrip())
    return re.sub(r"\n\s*\n+", "\n", text).strip()


class Game:
    """An environment (opd_run/environments.py) whose rows are those of `rows`.

    The game is told the commands that it has said are possible, and no others: other texts of a
    model (`save`, `quit`, a line of any length) do not reach its interpreter, and cost a turn.
    """

    def reset(self, row: Row) -> str:
        """Start the row's game. Returns the room, what is carried and the commands."""
        wanted = ("description", "inventory", "admissible_commands", "won", "lost")
        infos = textworld.EnvInfos(**dict.fromkeys(wanted, True))
        self.game = textworld.start(str(game_of(row)), infos)
        self.game.seed(int(row["seed"]) + 1)  # of the interpreter; 0 would be the clock
        self.state = self.game.reset()
        return heard(f"{self.state.description}\n{self.state.inventory}\n{self.commands()}")

    def commands(self) -> str:
        """The commands that are possible now, in alphabetical order."""
        return "Commands: " + ", ".join(self.state.admissible_commands)

    def step(self, text: str) -> tuple[str, bool, bool]:
        """Tell the game a turn. Returns its answer, whether it is over, and whether it was won."""
        possible = {command.lower(): command for command in self.state.admissible_commands}
        command = possible.get(command_of(text))
        if command is None:
            return f"That is not one of the commands.\n{self.commands()}", False, False
        self.state, _, done = self.game.step(command)
        if done:
            self.game.close()
            return "", True, bool(self.state.won)
        return f"{heard(self.state.feedback)}\n{self.commands()}", False, False


def rows(num: int, first_seed: int, rooms: int, objects: int, quest_length: int) -> list[Row]:
    """`num` rows whose games have different tasks, by ascending seed; makes the games.

    The prompt ends with the task. `answer`, commands that win, is for a teacher that may know them.

    Raises:
        RunError: sizes this small do not have so many games.
    """
    found: dict[str, Row] = {}  # by prompt
    for seed in range(first_seed, first_seed + 20 * num):
        row: Row = {"rooms": rooms, "objects": objects, "quest_length": quest_length, "seed": seed}
        made = json.loads(game_of(row).with_suffix(".json").read_text())
        row["prompt"] = PROMPT + made["objective"]
        row["answer"] = ", ".join(made["metadata"]["walkthrough"])
        found.setdefault(row["prompt"], row)
        if len(found) == num:
            return list(found.values())
    raise RunError(f"only {len(found)} different games of {20 * num}; {num} were wanted", 2)


def main(argv: Sequence[str] | None = None) -> None:
    """Write train.jsonl and test.jsonl, without a game in common."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the two files")
    for name, default, what in (
        ("train", 32, "games in train.jsonl"),
        ("test", 8, "games in test.jsonl"),
        ("rooms", 1, "rooms of a game"),
        ("objects", 4, "objects of a game"),
        ("quest-length", 1, "commands that win a game, at most"),
        ("first-seed", 0, "seed of the first game; the others' follow it"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} [{default}]")
    args = parser.parse_args(argv)
    for name in ("train", "test", "rooms", "objects", "quest_length"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: at least 1 is expected")
    sizes = args.rooms, args.objects, args.quest_length
    try:
        made = rows(args.train + args.test, args.first_seed, *sizes)
    except RunError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", made[: args.train]), ("test", made[args.train :])):
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
        print(f"{path}: {len(part)} games")


if __name__ == "__main__":
    main()
