# ruff: noqa: E501
"""Bad arguments are refused before anything is read, by a message that names the argument."""

import threading

import pytest
import torch
from strategies import random_ids

import opd_ops
from opd_ops import reference

Z = torch.randn(3, 8)
IDS = torch.tensor([0, 1, 2])
HIDDEN, HEAD = torch.randn(3, 4), torch.randn(8, 4)


def own(student_logp, *values):
    return student_logp, {}


def scalar(student_logp):
    return student_logp.sum(), {}


def constant(student_logp):
    return student_logp.detach(), {}


def odd_log(student_logp):
    return student_logp, {"mean": student_logp.mean()}


LEAF = torch.randn(3, 4, requires_grad=True)
BAD = {
    "ids too large": (IndexError, "token_ids: expected ids in [0, 8)", "token_logp", Z, None, IDS + 6),
    "ids negative": (IndexError, "token_ids: expected ids in [0, 8)", "token_logp", Z, None, IDS - 1),
    "ids in the padding": (IndexError, "[0, 2)", "token_logp", Z, None, IDS, {"valid_vocab": 2}),
    "ids shape": (ValueError, "token_ids: expected shape [3]", "token_logp", Z, None, IDS[:2]),
    "ids dtype": (ValueError, "token_ids: expected int64", "token_logp", Z, None, IDS.int()),
    "ids device": (ValueError, "token_ids: expected a tensor on cpu", "token_logp", Z, None, IDS.to("meta")),
    "logits 1-d": (ValueError, "hidden: expected logits [N, V]", "token_logp", Z[0], None, IDS),
    "logits integer": (ValueError, "hidden: expected logits [N, V]", "token_logp", Z.long(), None, IDS),
    "logits empty rows": (ValueError, "at least one column", "token_logp", Z[:, :0], None, IDS),
    "valid_vocab": (ValueError, "valid_vocab: expected 1 to 8", "token_logp", Z, None, IDS, {"valid_vocab": 9}),
    "valid_vocab 0": (ValueError, "valid_vocab", "token_logp", Z, None, IDS, {"valid_vocab": 0}),
    "temperature 0": (ValueError, "temperature", "token_logp", Z, None, IDS, {"temperature": 0.0}),
    "temperature nan": (ValueError, "temperature", "token_logp", Z, None, IDS, {"temperature": float("nan")}),
    "temperature inf": (ValueError, "temperature", "token_logp", Z, None, IDS, {"temperature": float("inf")}),
    "gather ids 1-d": (ValueError, "ids: expected int64 [N, K]", "gather_logp", Z, None, IDS),
    "gather ids rows": (ValueError, "ids: expected shape [3, 2]", "gather_logp", Z, None, random_ids(0, 2, 2, 8)),
    "divergence": (ValueError, "divergence: expected", "full_kl", Z, None, Z, None, {"divergence": "kl"}),
    "beta 0": (ValueError, "beta: expected", "full_kl", Z, None, Z, None, {"divergence": "jsd", "beta": 0.0}),
    "beta 1": (ValueError, "use divergence=", "full_kl", Z, None, Z, None, {"divergence": "jsd", "beta": 1.0}),
    "teacher rows": (ValueError, "teacher_hidden: expected shape", "full_kl", Z, None, Z[:2], None),
    "teacher columns": (ValueError, "the student has 8 ids and the teacher 7", "full_kl", Z, None, Z[:, :7], None),
    "shared too large": (ValueError, "valid_vocab: expected 1 to 7", "full_kl", Z, None, Z[:, :7], None, {"valid_vocab": 8}),
    "head width": (ValueError, "head: expected [V, 4]", "token_logp", HIDDEN, HEAD[:, :3], IDS),
    "head dtype": (ValueError, "head: expected hidden's dtype", "token_logp", HIDDEN, HEAD.double(), IDS),
    "head device": (ValueError, "head: expected a tensor on cpu", "token_logp", HIDDEN, HEAD.to("meta"), IDS),
    "workspace": (ValueError, "workspace_mib", "token_logp", HIDDEN, HEAD, IDS, {"workspace_mib": 0}),
    "linear ids": (IndexError, "token_ids", "token_logp", HIDDEN, HEAD, IDS + 6),
    "linear vocabularies": (ValueError, "valid_vocab", "full_kl", HIDDEN, HEAD, HIDDEN, HEAD[:7]),
    "linear teacher rows": (ValueError, "teacher_hidden", "full_kl", HIDDEN, HEAD, HIDDEN[:2], HEAD),
    "k 0": (ValueError, "k: expected 1 to 8", "topk_logp", Z, None, 0),
    "k too large": (ValueError, "k: expected 1 to 6", "topk_logp", Z, None, 7, {"valid_vocab": 6}),
    "topk ids": (IndexError, "token_ids", "topk_logp", Z, None, 2, {"token_ids": IDS + 6}),
    "support of one": (ValueError, "renormalise", "support_kl", Z, None, IDS[:, None], Z[:, :1]),
    "bucket": (ValueError, "tail: 'bucket' needs renormalise=False", "support_kl", Z, None, random_ids(0, 3, 2, 8), Z[:, :2], {"tail": "bucket"}),
    "bucket without tail": (ValueError, "teacher_tail_logp", "support_kl", Z, None, random_ids(0, 3, 2, 8), Z[:, :2], {"tail": "bucket", "renormalise": False}),
    "tail": (ValueError, "tail: expected", "support_kl", Z, None, random_ids(0, 3, 2, 8), Z[:, :2], {"tail": "score"}),
    "support ids": (IndexError, "support_ids", "support_kl", Z, None, random_ids(0, 3, 2, 8) + 1, Z[:, :2]),
    "support mask": (ValueError, "support_mask: expected bool", "support_kl", Z, None, random_ids(0, 3, 2, 8), Z[:, :2], {"support_mask": Z[:, :2]}),
    "ids of three dimensions": (ValueError, "token_ids: expected int64 [N] or", "gated_kl", HIDDEN, HEAD, IDS[:, None, None], own),
    "no function": (ValueError, "loss_of: expected a function", "gated_kl", HIDDEN, HEAD, IDS, Z),
    "values rows": (ValueError, "values[1]: expected a tensor [3, ...]", "gated_kl", HIDDEN, HEAD, IDS, own, [IDS, Z[:2]]),
    "values no tensor": (ValueError, "values[0]: expected a tensor", "gated_kl", HIDDEN, HEAD, IDS, own, [1.0]),
    "values device": (ValueError, "values[0]: expected a tensor on cpu", "gated_kl", HIDDEN, HEAD, IDS, own, [IDS.to("meta")]),
    "summed loss": (ValueError, "loss_of: expected a loss [3]", "gated_kl", HIDDEN, HEAD, IDS, scalar),
    "constant loss": (ValueError, "depends on student_logp", "gated_kl", LEAF, HEAD, IDS, constant),
    "summed log": (ValueError, "loss_of: expected 'mean' to be [3, ...]", "gated_kl", HIDDEN, HEAD, IDS, odd_log),
    "weight of the support": (ValueError, "token_weight: expected shape [3]", "support_kl", Z, None, random_ids(0, 3, 2, 8), Z[:, :2], {"token_weight": Z}),
    "weight of the vocabulary": (ValueError, "token_weight: expected shape [3]", "full_kl", Z, None, Z, None, {"token_weight": Z}),
    "full workspace": (ValueError, "workspace_mib", "full_kl", HIDDEN, HEAD, HIDDEN, HEAD, {"workspace_mib": -1}),
}  # fmt: skip


@pytest.mark.parametrize("module", [opd_ops, reference], ids=["opd_ops", "reference"])
@pytest.mark.parametrize("case", list(BAD))
def test_refused(module, case):
    error, text, name, *args = BAD[case]
    kwargs = args.pop() if isinstance(args[-1], dict) else {}
    with pytest.raises(error) as caught:
        getattr(module, name)(*args, **kwargs)
    assert text in str(caught.value)


@pytest.mark.parametrize("module", [opd_ops, reference], ids=["opd_ops", "reference"])
def test_ids_known_to_be_in_range_are_not_looked_at(module, monkeypatch):
    """Looking at values waits for a GPU, which a sampler would do at every token."""
    want = module.token_logp(HIDDEN, HEAD, IDS).logp
    monkeypatch.setattr(torch, "aminmax", lambda *args: pytest.fail("looked"))
    assert torch.equal(module.token_logp(HIDDEN, HEAD, IDS, check_ids=False).logp, want)
    with pytest.raises(pytest.fail.Exception, match="looked"):
        module.token_logp(HIDDEN, HEAD, IDS)
    with pytest.raises(ValueError, match="token_ids: expected shape"):
        module.token_logp(HIDDEN, HEAD, IDS[:2], check_ids=False)


@pytest.mark.parametrize("module", [opd_ops, reference], ids=["opd_ops", "reference"])
@pytest.mark.parametrize("head", [HEAD, None], ids=["head", "logits"])
def test_a_bad_id_of_the_last_chunk_is_found_before_the_loss_of_the_first(module, head):
    """On a CPU, where looking costs nothing beside a product."""
    ids, tiny = torch.tensor([0, 1, 8]), {"workspace_mib": 1e-5}
    support, teacher_logp = torch.stack([ids, ids + 1], dim=1), -torch.ones(3, 2)
    hidden = Z if head is None else HIDDEN
    with pytest.raises(IndexError, match=r"token_ids: expected ids in \[0, 8\), got 0 to 8"):
        module.gated_kl(hidden, head, ids, lambda *_: pytest.fail("called"), **tiny)
    with pytest.raises(IndexError, match=r"support_ids: expected ids in \[0, 8\), got 0 to 9"):
        module.support_kl(hidden, head, support, teacher_logp, renormalise=False, **tiny)


@pytest.mark.parametrize("stumbles", [False, True])
def test_on_a_gpu_bad_ids_raise_at_the_end_or_in_place_of_what_the_loss_raises(stumbles):
    """A GPU looks behind the first product, and is asked for what it saw when all is queued."""
    seen = []

    def look_at_ids():
        seen.append("look")
        return check

    def check():
        seen.append("check")
        raise IndexError

    def loss_of(piece, logp, _):
        seen.append(piece.start)
        if stumbles:
            raise ArithmeticError
        return -logp[:, 0], {}

    arguments = (
        HIDDEN.clone().requires_grad_(),
        HEAD,
        IDS[:, None],
        loss_of,
        8,
        1.0,
        1e-5,
        look_at_ids,
    )
    with pytest.raises(IndexError):
        opd_ops._head.row_loss(*arguments)
    assert seen == ["look", 0, *([] if stumbles else [1, 2]), "check"]


def test_compiled_ops_check_for_themselves():
    """Whoever calls torch.ops directly gets an error too, not a wrong read."""
    ops = torch.ops.opd_ops
    stats = torch.zeros(3, 2)
    ids = IDS[:, None]
    one = torch.zeros(3)
    for text, call in {
        "ids: expected ids in [0, 8), got 8": lambda: ops.gather_logp(
            Z, ids + 6, 8, 1.0, False, False
        ),
        "ids: expected shape": lambda: ops.gather_logp(Z, ids[:2], 8, 1.0, False, False),
        "ids: expected dtype": lambda: ops.gather_logp(Z, ids.int(), 8, 1.0, False, False),
        "valid_vocab: expected 1 to 8, got 9": lambda: ops.gather_logp(
            Z, ids, 9, 1.0, False, False
        ),
        "temperature: expected": lambda: ops.gather_logp(Z, ids, 8, 0.0, False, False),
        "logits: expected float32": lambda: ops.gather_logp(Z.long(), ids, 8, 1.0, False, False),
        "logits: expected [N, V]": lambda: ops.gather_logp(Z[0], ids, 8, 1.0, False, False),
        "stats: expected shape [3, 2]": lambda: ops.gather_logp_backward(
            *(Z, ids, one[:, None], stats[:2], one, None, None, None, 8, 1.0)
        ),
        "grad: expected shape [3, 1]": lambda: ops.gather_logp_backward(
            *(Z, ids, one, stats, one, None, None, None, 8, 1.0)
        ),
        "rows that do not overlap": lambda: ops.gather_logp_backward_out(
            *(Z, ids, one[:, None], stats, one, None, None, None, 8, 1.0, Z[:1].expand(3, 8))
        ),
        "out: expected shape [3, 8]": lambda: ops.gather_logp_backward_out(
            *(Z, ids, one[:, None], stats, one, None, None, None, 8, 1.0, Z[:, :7])
        ),
        "out: expected the type": lambda: ops.gather_logp_backward_out(
            *(Z.half(), ids, one[:, None], stats, one, None, None, None, 8, 1.0, Z.clone())
        ),
        "rows without gaps": lambda: ops.full_kl_backward_out(
            *(Z, Z, torch.zeros(3, 5), one, 8, 1.0, 0, 0.5, torch.zeros(8, 3).t())
        ),
        "teacher_logits: expected [3, at least 8]": lambda: ops.full_kl(
            Z, Z[:, :7], 8, 1.0, 0, 0.5
        ),
        "teacher_logits: float64": lambda: ops.full_kl(Z, Z.double(), 8, 1.0, 0, 0.5),
        "divergence: expected": lambda: ops.full_kl(Z, Z, 8, 1.0, 3, 0.5),
        "beta: expected": lambda: ops.full_kl(Z, Z, 8, 1.0, 2, 1.0),
    }.items():
        with pytest.raises(RuntimeError) as caught:
            call()
        assert text in str(caught.value)


def test_two_python_threads_at_once():
    logits, ids = torch.randn(64, 5000), random_ids(0, 64, 4, 5000)
    expected = opd_ops.gather_logp(logits, None, ids)[0]
    wrong = []

    def work():
        for _ in range(20):
            leaf = logits.clone().requires_grad_()
            got = opd_ops.gather_logp(leaf, None, ids)[0]
            got.sum().backward()
            wrong.extend([] if torch.equal(got, expected) else [got])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
