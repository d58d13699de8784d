"""benchmarks/gradient_variance.py: its sums, and which tokens carry a gradient."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from opd_run.files import TINY

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]
import gradient_variance as found_by  # noqa: E402

FEW = torch.tensor([0.0, 0.0])


def test_sums_give_the_variance_and_the_signal_of_the_docstring():
    each = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).double()
    found = found_by.Found(each.sum(0), [float(g.square().sum()) for g in each], *[FEW] * 5)
    mean = each.mean(0)
    variance = float((each - mean).square().sum()) / 4
    assert found.variance == pytest.approx(variance)
    assert found.signal == pytest.approx(float(mean.square().sum()) - variance / 5)


def test_the_flags_of_every_pair_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    for pair, flags in found_by.PAIRS.items():
        for name, more in found_by.OF_TOKENS.values():
            words = f"{flags} {found_by.SMALL if pair == 'smol' else ''} {more}".split()
            args = importlib.import_module(name).parse_args(words)
            rollouts = args.prompts_per_step * args.rollouts_per_prompt
            assert rollouts == (16 if pair == "smol" else 128)


def test_shares_are_of_the_tokens_that_carry_them():
    """100 tokens: one with 99 of 198, 9 nats above the teacher, at the end of its completion."""
    carried, log_ratio, place = torch.ones(100), torch.full((100,), 0.5), torch.zeros(100)
    carried[7], log_ratio[7], place[7] = 99.0, 9.0, 0.95
    log_ratio[:3] = -1.0
    stray = torch.where(log_ratio < 0, 0.3, 0.0)
    found = found_by.Found(FEW, [], carried, log_ratio, place, torch.full((100,), 0.9), stray)
    row = found.of_tokens()
    assert row["worst"] == row["share_4"] == "0.5" and row["tokens_4"] == "0.01"
    assert (row["share_0"], row["tokens_0"]) == ("0.01515", "0.03")
    assert (row["carried_2"], row["places_2"], row["stray"]) == ("0.01515", "0.03", "0.009")
    assert (row["p99_first"], row["p99_last"], row["top_mass"]) == ("0.5", "9", "0.9")
    accepted = (3 + 96 * torch.tensor(-0.5).exp() + torch.tensor(-9.0).exp()) / 100
    assert float(row["accepted"]) == pytest.approx(float(accepted), abs=1e-4)


def test_places_are_told_before_and_after_training(monkeypatch):
    """The table of what is left has the untrained student first, and no share of an arm in it."""
    of_row = {f"{name}_{i}": f"{i / 10}" for name in ("carried", "places") for i in range(4)}
    row = {"pair": "noisy", "stray": "0.08", **of_row}
    named = ["opd", "tropd", "after ladder-opd", "after ladder-opd"]
    monkeypatch.setattr(found_by, "read", lambda _: [row | {"arm": name} for name in named[:2]])
    shares, left = found_by.place_tables()
    assert shares.count("\n") == 4 and left == "not run"
    monkeypatch.setattr(found_by, "read", lambda _: [row | {"arm": name} for name in named])
    again, left = found_by.place_tables()
    lines = left.splitlines()[2:]
    assert again == shares
    assert [line.split(" | ")[:2] for line in lines] == [["| before", "1"], ["| ladder-opd", "2"]]
    assert lines[1].endswith("| 0.300 ± 0.000 | 0.080 ± 0.000 |")


@pytest.mark.parametrize("arm", ["opd", "opd --objective full", "topk_opd"])
def test_a_loss_has_its_gradient_at_the_tokens(arm, tmp_path):
    """The gradient at the hidden states is that of the tokens of the batch, none is left out."""
    few = tmp_path / "few.jsonl"
    lines = (TINY / "prompts/train.jsonl").read_text().splitlines(keepends=True)
    few.write_text("".join(lines[:4]))
    name, flags = found_by.OF_TOKENS[arm]
    small = "--prompts-per-step 2 --rollouts-per-prompt 2 --micro-batch-tokens 200"
    found = found_by.gradients(name, f"--prompts {few} {small} {flags}", 0, 2)
    row = found.of_tokens()
    num = int(row["num_tokens"])
    assert 2 * 4 * 20 < num == len(found.carried) == len(found.log_ratio) == len(found.place)
    assert sum(float(row[f"share_{i}"]) for i in range(5)) == pytest.approx(1, abs=1e-3)
    assert float((found.carried > 0).float().mean()) > 0.95 and len(found.squares) == 2
    assert float(found.stray.min()) > -1e-5 and 0.01 < float(row["stray"]) < 0.3
    assert 0.7 < float(row["accepted"]) < 1 and 0.9 < float(row["top_mass"]) <= 1
    assert float(found.place.min()) == 0.0 and 0.9 < float(found.place.max()) < 1


def test_what_was_cut_off_goes_on(tmp_path, monkeypatch):
    """A second run measures what is missing and, for the cosine, the first arm; nothing twice."""
    out, measured = tmp_path / "rows.csv", []

    def gradients(name, flags, seed, batches):
        if len(measured) == 8:  # of 12: two arms into the second set of prompts
            raise KeyboardInterrupt
        measured.append((name, seed))
        return found_by.Found(
            torch.ones(3).double(), [2.0, 3.0], *[torch.linspace(0.0, 1.0, 100)] * 5
        )

    monkeypatch.setattr(found_by, "gradients", gradients)
    monkeypatch.setattr(found_by, "token_table", str)
    words = ["gradient_variance.py", "--pair", "smol", "--seeds", "2", "--batches", "2"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        found_by.main()
    first = out.read_text()
    measured[:] = []
    found_by.main()
    assert [seed for _, seed in measured] == [1] * 5 and measured[0][0] == "opd"
    rows = found_by.read(out)
    assert out.read_text().startswith(first) and len(rows) == 12
    assert len({(row["arm"], row["seed"]) for row in rows}) == 12
    measured[:] = []
    found_by.main()
    assert measured == [] and len(found_by.read(out)) == 12
    monkeypatch.setattr(sys, "argv", [*words, "--flags", "--lr 1"])
    with pytest.raises(SystemExit):
        found_by.main()
