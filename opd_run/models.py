"""A `transformers` model as the method files use it: hidden states and head in one forward call."""

from __future__ import annotations

import contextlib
import functools
import re
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.cache_utils import DynamicCache, DynamicLayer

from opd_run import ranks
from opd_run.compat import Facts, rope_laws
from opd_run.console import RunError


@functools.cache
def _count_steps() -> None:
    """From now on the step of any optimizer counts as a change of its weights (`_version`): fused
    kernels forget it, and copies of weights, here and in an engine, are renewed by it."""

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            torch.autograd.graph.increment_version(group["params"])

    register_optimizer_step_post_hook(count)


class CausalLM(torch.nn.Module):
    """A `transformers` model whose forward pass ends in `read`.

    `read(hidden, head)` gets hidden states [N, D] and the head [V, D], so that a loss never holds
    [N, V]. Where the head is more than a matrix product (bias, soft-capping, scale, adapter) it
    gets logits [N, V] and None instead, which every op of `opd_ops` takes as well. `read` runs
    inside the module's forward, where sharded weights are whole.

    Attributes:
        lm: the `PreTrainedModel`.  plain_head: whether `read` gets the head.
        compute_dtype: autocast type; float32 means no autocast.
        facts: what is known of all models of the run together.
        engine: what samples in its stead (`vllm_sampler`), or None.
        export_dtype: type of the weights in an export; None: as they are.
        refusal: why it cannot be sampled from (`selfcheck`), or nothing.
        role: `student`, `teacher` or `reference`: whose prompt it reads (`Prompt.views`).
        average: of the student with `--teacher ema:DECAY`, its average: saved with it.
    """

    def __init__(self, lm: Any, plain_head: bool, compute_dtype: torch.dtype, facts: Facts) -> None:
        super().__init__()
        _count_steps()
        self.lm, self.plain_head, self.compute_dtype = lm, plain_head, compute_dtype
        self.facts = facts
        # No submodule. Asked for once: 1 % of a token.
        self._decoder: tuple[Any, ...] = (lm.get_decoder(),) if plain_head else ()
        self.engine: Any = None
        self.refusal, self.role = "", "student"
        self.average: tuple[CausalLM, ...] = ()  # no submodule
        self.export_dtype: torch.dtype | None = None
        self._copy: Callable[[], Tensor | None] = lambda: None
        self._copied: Any = None  # of which state of the head
        # Asked now: the average of a student is trained, and takes no gradient later.
        self._head_moves = plain_head and lm.get_output_embeddings().weight.requires_grad

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = next(self.lm.parameters()).device
        return device

    @property
    def head(self) -> Tensor | None:
        """The head [V, D], or None where it is not a plain matrix product.

        Outside of `forward`, a sharded head is put together, by all ranks at once.
        """
        return ranks.whole(self.lm.get_output_embeddings().weight) if self.plain_head else None

    def head_on(self, device: torch.device) -> Tensor | None:
        """The head on `device`, outside of `forward`, as it is now: a later step does not change
        it. One copy, for as long as anyone holds it and no step is made."""
        if not self.plain_head:
            return None
        weight = self.lm.get_output_embeddings().weight
        mine = ranks.part(weight.detach())
        state = weight._version, mine._version  # changes are counted, a sharded head's in its part
        kept = self._copy()
        if kept is not None and kept.device == device and state == self._copied:
            return kept
        whole = ranks.whole(weight.detach())
        head: Tensor = whole.to(device, copy=self._head_moves)
        self._copy, self._copied = weakref.ref(head), state
        return head

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The compute type of `--dtype`; outside of it weights would be cast anew in every call."""
        outer = _CASTS.set({})
        try:
            with self._in_compute_dtype():
                yield
        finally:
            _CASTS.reset(outer)

    def _in_compute_dtype(self) -> torch.autocast:
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, self.compute_dtype, enabled)

    def present(self) -> contextlib.AbstractContextManager[None]:
        """The weights on `device` for the block."""
        return contextlib.nullcontext()

    def new_cache(self, dtype: torch.dtype) -> DynamicCache:
        """An empty key/value cache that keeps keys and values in `dtype`.

        Raises:
            RunError: with this model, a cache gives other numbers than a plain forward pass.
        """
        if self.refusal:
            raise RunError(self.refusal)
        return _TypedCache(dtype, config=self.lm.config)

    def forward(self, read: Callable[..., Any], where: Tensor | None, **inputs: Any) -> Any:
        """`read` at the positions `where`, a mask [B, P+T]; None: the last position of each row."""
        with self._in_compute_dtype():
            if self.plain_head:
                hidden = self._decoder[0](**inputs).last_hidden_state
            else:
                hidden = self.lm(**inputs, logits_to_keep=int(where is None)).logits
            return read(hidden[:, -1] if where is None else hidden[where], self.head)


class ReadAs:
    """A model in another role: the same weights, which read the prompt of that role."""

    def __init__(self, model: Any, role: str) -> None:
        self.model, self.role = model, role

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As of the model."""
        return self.model(*args, **kwargs)


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values in memory that grows by blocks: `DynamicLayer` copies all at every token."""

    block = 64  # tokens
    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        start = self.get_seq_length()
        end = start + keys.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self._room = [keys.new_empty(0), values.new_empty(0)]
        if start == 0 or self._room[0].shape[-2] < end:
            size = end + self.block - end % self.block
            for which, (old, new) in enumerate(((self.keys, keys), (self.values, values))):
                self._room[which] = new.new_empty(*new.shape[:-2], size, new.shape[-1])
                if start:
                    self._room[which][..., :start, :] = old
        for room, new in zip(self._room, (keys, values)):
            room.narrow(-2, start, end - start).copy_(new)
        self.keys, self.values = (room.narrow(-2, 0, end) for room in self._room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        end = self.get_seq_length()
        if end:
            self._room = [room[indices] for room in self._room]
            self.keys, self.values = (room[..., :end, :] for room in self._room)


class _TypedCache(DynamicCache):  # type: ignore[misc]
    # Under autocast, keys and values come out of norm and rotation in float32: kept so, they take
    # twice the memory, for numbers that are cast at use.
    def __init__(self, dtype: torch.dtype, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._dtype = dtype
        self._head: Tensor | None = None
        layers: list[Any] = getattr(self, "layers")  # noqa: B009  (untyped)
        self.layers = [_GrowingLayer() if type(x) is DynamicLayer else x for x in layers]

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._dtype != torch.float32:
            keys, values = keys.to(self._dtype), values.to(self._dtype)
        return super().update(keys, values, *args, **kwargs)

    def to_logits(self, hidden: Tensor, head: Tensor | None) -> Tensor:
        """Logits [n, V]: on a GPU float32, of 16-bit operands too, by a head cast once."""
        if head is None:
            return hidden
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.dtype
        if kind != "cuda" or dtype.itemsize != 2:
            return F.linear(hidden, head)
        if self._head is None:
            self._head = head.detach().to(dtype).T
        return torch.mm(hidden.to(dtype), self._head, out_dtype=torch.float32)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, of linear-attention layers too, whose states `transformers`
        leaves as they are."""
        for layer in self.layers:
            if hasattr(layer, "batch_select_indices"):
                layer.batch_select_indices(indices)
            for name in ("conv_states", "recurrent_states"):
                states = getattr(layer, name, None) or {}
                for each, state in states.items():
                    states[each] = state if state is None else state[indices]


# Weights of experts and their casts, in a block of `CausalLM.autocast`.
_CASTS: ContextVar[dict[Any, tuple[Tensor, Tensor]] | None] = ContextVar("casts", default=None)


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`. What is trained is cast once in a block without gradients, as autocast
    does for linear layers: else all experts would be cast at every token of a completion."""
    whole, casts = weight if weight._base is None else weight._base, _CASTS.get()
    if casts is None or torch.is_grad_enabled() or not (whole.is_leaf and whole.requires_grad):
        return weight.to(dtype)
    # By the tensor, which lives as long: two layers may lie at one address in turn, when sharded.
    key = id(whole), weight.shape, weight.stride(), weight.storage_offset()
    if key not in casts:
        casts[key] = whole, weight.to(dtype)
    return casts[key][1]


def _grouped_product(one: Tensor, two: Tensor, *more: Any, **named: Any) -> Tensor:
    kind = one.device.type
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        product = torch.ops.aten._grouped_mm(one.to(dtype), _cast(two, dtype), *more, **named)
    return product  # type: ignore[no-any-return]


# The product of experts that are one tensor is not on autocast's list, so that experts trained in
# float32 would be multiplied in float32: https://github.com/pytorch/pytorch/issues/174763.
_AUTOCAST: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
for _key in ("AutocastCPU", "AutocastCUDA"):
    _AUTOCAST.impl("_grouped_mm", _grouped_product, _key)


@torch.no_grad()
def head_is_product(model: Any, valid_vocab: int) -> bool:
    """Whether logits are `hidden @ head.T` and nothing else: no bias, soft-cap, scale, adapter.

    Asked of the model by a forward pass over eight ids, not of a list of architectures.
    """
    head = model.get_output_embeddings()
    decoder = model.get_decoder()
    if decoder is model or type(head) is not torch.nn.Linear or head.bias is not None:
        return False
    # A cap or scale can be invisible at small logits, so the configuration is asked too.
    for key, value in model.config.get_text_config().to_dict().items():
        if re.search(r"logits?_(soft_?cap|scal)", key) and value not in (None, 1, 1.0):
            return False
    ids = torch.arange(8, device=head.weight.device)[None] % valid_vocab
    logits = model(input_ids=ids, use_cache=False).logits.float()
    hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
    if hidden.shape[-1] != head.weight.shape[1]:
        return False
    product = (hidden @ head.weight.T.to(hidden.dtype)).float()
    tolerance = 1e-5 if hidden.dtype == torch.float32 else 2e-2
    return bool(torch.allclose(product, logits, rtol=tolerance, atol=tolerance * 10))


def without_weights(config: Any, **trust: bool) -> Any:
    """A model with this configuration whose weights have shapes and no data."""
    import transformers

    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, **trust)


def num_parameters(config: Any, **trust: bool) -> int:
    """Of a model with this configuration; a tied head is counted once, no weight is made."""
    return sum(weight.numel() for weight in without_weights(config, **trust).parameters())


def rope_boundary(config: Any) -> int:
    """From how many tokens on the longest row of a batch decides how positions are read, of all
    rows (LongRoPE, dynamic scaling); 0: never."""
    config = config.get_text_config()
    laws = [law for law in rope_laws(config) if law.get("rope_type") in ("longrope", "dynamic")]
    name = "original_max_position_embeddings"
    return min((int(law.get(name) or config.max_position_embeddings) for law in laws), default=0)


def pin_longrope(lm: Any, longest: int) -> bool:
    """One set of factors for the whole run, if a sequence of `longest` tokens needs the long ones.

    By itself, a model with LongRoPE takes the factors of the longest row of a batch for all of its
    rows, and goes on from a cache of keys with others. The configuration stays as it is.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    boundary = rope_boundary(lm.config)
    kinds = [each for each in lm.modules() if getattr(each, "rope_type", None) == "longrope"]
    if not kinds or longest <= boundary:
        return False
    for module in kinds:
        factors = ROPE_INIT_FUNCTIONS["longrope"]
        long, _ = factors(module.config, module.inv_freq.device, seq_len=boundary + 1)
        module.original_inv_freq = long
    return True
