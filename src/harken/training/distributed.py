"""One run on several processes: torchrun (or srun) starts them, each has a device and its own part of every batch.

The batches are those of one process, and so is what is learnt from them: every random draw is made for the whole batch,
the loss is that of the whole batch, and gradients are summed over all parts. Each process holds the similarities of its
own clips with all others alone (open_clip's local loss), so what it needs grows with batch x batch / processes.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor, nn

from harken.engines import n_started
from harken.errors import ConfigError, DataError, HarkenError

Told = TypeVar("Told")
LEFT = ("closed by peer", "reset by peer", "Broken pipe")  # gloo's words for a process that has gone


@dataclass(frozen=True)
class Group:
    """The processes that train one run together: `size` of them, of which this is number `rank`."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def told(self, make: Callable[[], Told]) -> Told:
        """What `make` returns in the first process, in all of them. What it raises there, all raise: an error that is
        not harken's own as a HarkenError elsewhere, for not every other one can be sent.
        """
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_first:
            try:
                box[0] = make()
            except Exception as e:
                error = e
                box[1] = e if isinstance(e, HarkenError) else HarkenError(f"process 0: {type(e).__name__}: {e}")
        dist.broadcast_object_list(box, src=0)
        if (error := error or box[1]) is not None:
            raise error
        result: Told = box[0]
        return result

    def total(self, value: Tensor) -> float:
        """The sum of a number over all processes."""
        value = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return float(value)

    def rows(self, x: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks; gradients find their way back to where rows are from.

        Processes may have different numbers of rows.
        """
        if self.size == 1:
            return x
        counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
        n = [int(c) for c in counts]
        padded = torch.cat([x, x.new_zeros(max(n) - len(x), *x.shape[1:])])
        parts = differentiable.all_gather(padded)  # type: ignore[no-untyped-call]
        return torch.cat([part[:k] for part, k in zip(parts, n, strict=True)])

    def spread(self, items: Sequence[Any], make: Callable[[Sequence[Any]], Tensor]) -> Tensor:
        """`make(items)`, a row for each item, of which every process makes its share."""
        size, extra = divmod(len(items), self.size)
        first = self.rank * size + min(self.rank, extra)
        part = items[first : first + size + (self.rank < extra)]
        made = make(part) if len(part) else None
        if self.size == 1:
            assert made is not None, "nobody asks for nothing"
            return made
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, None if made is None else made.cpu())
        return torch.cat([f for f in found if f is not None])

    def all_told(self, value: Told) -> list[Told]:
        """What each process says, in all of them."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def agree(self, what: str, value: object) -> None:
        """Raises DataError where processes do not have the same `value`."""
        found = self.all_told(value)
        if any(v != found[0] for v in found):
            told = ", ".join(f"process {r}: {v}" for r, v in enumerate(found))
            raise DataError(
                f"the {self.size} processes of this run differ in {what} ({told}). "
                "They must share the folders that `paths` names; mount them on every machine."
            )


def group() -> Group:
    """The processes of this run: those that `joined` met, else this one alone."""
    return Group(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Group()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """Meet the processes that were started together; alone, do nothing. NCCL between GPUs, gloo otherwise.

    Who fails inside has to end its process: that tells the others. Raises HarkenError where another one has ended,
    ConfigError where `device` is a GPU without a number.
    """
    if n_started() == 1:
        yield Group()
        return
    if device.type == "cuda":
        if device.index is None:
            raise ConfigError(
                f"HARKEN_DEVICE={device}: {n_started()} processes were started together, each for a GPU of its own. "
                "Unset it: each takes the one that torchrun's LOCAL_RANK names."
            )
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield group()
    except RuntimeError as e:
        if any(words in str(e) for words in LEFT):
            raise HarkenError(
                "another process of this run has ended, so this one cannot go on. What that one said is the reason; "
                "the last checkpoint is kept."
            ) from e
        raise
    # Only where all went well. NCCL's farewell waits for processes that may be waiting elsewhere. Gloo's, where the
    # error's traceback still holds what `parallel` made, waits for a thread of its own that waits for Python's lock.
    gc.collect()
    dist.destroy_process_group()


def parallel(encode: nn.Module) -> nn.Module:
    """`encode` with gradients averaged over the group's processes while they are computed; alone, as it is."""
    if group().size == 1:
        return encode
    from torch.nn.parallel import DistributedDataParallel

    gc.collect()  # the last run's is a ring of references, and holds its model and gradients
    return DistributedDataParallel(encode)
