"""Schedule the next step: admission, chunks of prompts, shared prefixes, memory. Host code only.

It knows nothing of models or tensors, so that a simulator can drive it too. Every sequence becomes a
`LiveSequence` with a slot and an extent of the cache; a shared prefix is one without a sequence.
"""

from collections import deque

import numpy as np

from hpc.arrays import Tokens
from hpc.engine.admission import CHUNK, Gate
from hpc.engine.extents import ALIGN, Extents
from hpc.engine.interface import Source, begin
from hpc.engine.native.scheduled_step import Chunk, LiveSequence, ScheduledStep
from hpc.engine.sequence import Sequence

ESTIMATE_FROM = 64
"""Number of ended sequences from which on their lengths say how much memory the next one reserves."""


class Scheduler:
    """Admits sequences and schedules each step.

    `share`: rows read a prefix of `share_from` tokens or more in place; otherwise it is copied into the extent
    of each. `mixed`: a step may both decode and compute prompts; otherwise prompts go first. `refill`: see `Gate`.
    `long_from`: see `EngineLimits`; the host must know all tokens.
    """

    def __init__(
        self,
        extents: Extents,
        max_seqs: int,
        step_tokens: int,
        share: bool,
        mixed: bool = True,
        refill: float = 0.0,
        share_from: int = 0,
        long_from: int = 0,
    ) -> None:
        self._limits = max_seqs, step_tokens
        self.max_seqs, self.step_tokens = self._limits
        self.waiting: deque[Sequence] = deque()
        self.failed: list[Sequence] = []
        self.rows: list[LiveSequence] = []
        """Sequences, in the order of admission."""
        self._extents = extents
        self.share = share
        self._share_from = share_from
        self._long_from = long_from
        self._mixed = mixed
        self._gate = Gate(refill)
        self._slots = list(range(max_seqs))[::-1]
        self._prefixes: dict[tuple[bool, bytes], LiveSequence] = {}
        self._lengths: deque[int] = deque(maxlen=4096)
        self._usual: int | None = None
        self._isolated = 0

    def admit(self, source: Source) -> list[LiveSequence]:
        """Admit sequences while there is memory and the next step is not full; return the new rows.

        Pulls one request at a time, so that requests that are not needed here can go to another rank.
        """
        new: list[LiveSequence] = []
        if not self._slots or not self._gate.is_open(len(self.rows)):
            return new
        full = False
        pending = sum(len(row.tokens) - row.done for row in self.rows if row.done < len(row.tokens))
        while self._slots and pending < self.step_tokens and len(self.rows) < self._max_rows():
            if not self.waiting:
                self.waiting.extend(begin(source.pull(1)))
            if not self.waiting:
                break
            row = self._place(self.waiting[0])
            if row is None and not self.rows:
                self._drop_prefixes()
                row = self._place(self.waiting[0], share=False)  # together with its prefix it may be just too large
            if row is None and self.rows:
                full = bool(new)  # it gets its place when another has ended
                break
            sequence = self.waiting.popleft()
            if row is None:
                sequence.error = (
                    f"it needs {self._max_tokens(sequence):,} tokens of cache, and there is room for "
                    f"{self._extents.num_tokens:,}; lower max_new_tokens, or give the rank more memory"
                )
                self.failed.append(sequence)
                continue
            self.rows.append(row)
            new.append(row)
            pending += len(row.tokens) - row.done
        if full or len(self.rows) >= self._max_rows():
            self._gate.note_full(len(self.rows))
        return new

    def next(self) -> ScheduledStep:
        """Return the next step: every row that decodes, and prompts while it has fewer than `step_tokens`."""
        plan = ScheduledStep()
        for shared in self._prefixes.values():
            shared.stored = shared.done
        for row in list(self.rows) if self._long_from else ():
            grown = not row.is_long and row.live and row.done >= max(self._long_from, len(row.tokens))
            if grown and (row.done < row.capacity or self._grow(row, plan)):
                self._begin_as_long(row)
        prompts = [row for row in self.rows if row.done < len(row.tokens)]
        if self._mixed or not prompts:
            count = len(self.rows)
            for row in list(self.rows):
                if row.done < len(row.tokens) or row.num_scheduled >= row.limit or not row.capacity:
                    continue
                done = row.done
                if done - row.shared < row.capacity or self._grow(row, plan):
                    plan.rows.append(row)
                    plan.positions.append(done)
                    row.done = done + 1
                    row.num_scheduled += 1
            if len(self.rows) < count:  # rows have been preempted, earlier ones too
                plan.rows = [row for row in plan.rows if row.capacity]
                plan.positions = [row.done - 1 for row in plan.rows]
                prompts = [row for row in prompts if row.capacity]
        left = self.step_tokens
        for row in prompts:
            prefix = row.prefix
            while prefix is not None and prefix.done < row.cut and left > 0:
                left -= self._add(plan, prefix, self._chunk(prefix))
            if prefix is not None and row.done == 0 and not self._begin_behind(row, prefix, plan):
                continue
            while row.done < len(row.tokens) and left > 0:
                left -= self._add(plan, row, self._chunk(row))
        return plan

    def lookahead(self, row: LiveSequence) -> int:
        """Return how many further tokens a decoding row may store and choose in the next step."""
        before_long = self._long_from - row.done if self._long_from and not row.is_long else row.limit
        return min(row.capacity - self._own(row, row.done), row.limit - row.num_scheduled, before_long)

    def advance(self, row: LiveSequence) -> None:
        """Note that a row stores and chooses one further token."""
        row.done += 1
        row.num_scheduled += 1

    def finish(self, row: LiveSequence) -> None:
        """Free the place of a row that has ended."""
        self._lengths.append(row.num_scheduled)
        if len(self._lengths) >= ESTIMATE_FROM and len(self._lengths) % 32 == 0:
            self._usual = int(np.percentile(self._lengths, 95))
        self.clear_isolated()
        self._release(row)

    def preempt(self, row: LiveSequence) -> None:
        """Free the place of a row, which begins anew later and comes to the same end."""
        assert row.sequence is not None
        self._release(row)
        self.waiting.appendleft(Sequence(row.sequence.request, sample=row.sequence.sample))

    def preempt_all(self, isolate: bool) -> None:
        """Preempt all rows; to `isolate`, admit them one at a time, to find which of them fails."""
        count = len(self.rows)
        for row in reversed(list(self.rows)):
            self.preempt(row)
        self._drop_prefixes()
        if isolate and count > 1:
            self._isolated = count

    def clear_isolated(self) -> None:
        """Note that one of the isolated rows has ended or failed."""
        self._isolated = max(0, self._isolated - 1)

    def shrink(self) -> None:
        """Halve the number of rows and of prompt tokens of a step from now on."""
        self.max_seqs = max(1, self.max_seqs // 2)
        self.step_tokens = max(ALIGN, self.step_tokens // 2)

    def reset_limits(self) -> None:
        """Allow a step as much as at first: the request that did not fit is gone."""
        self.max_seqs, self.step_tokens = self._limits

    def _max_rows(self) -> int:
        return 1 if self._isolated else self.max_seqs

    def _max_tokens(self, sequence: Sequence) -> int:
        request = sequence.request
        return len(request.token_ids) + request.sampling.max_new_tokens - 1

    def _own(self, row: LiveSequence, tokens: int) -> int:
        """Return how many of a row's first tokens are in its own extent."""
        return tokens - row.shared

    def _place(self, sequence: Sequence, share: bool = True) -> LiveSequence | None:
        request = sequence.request
        # All samples of a prompt share it but for its last token, whose logits each needs.
        cut = len(request.token_ids) - 1 if request.sampling.n > 1 else request.prefix
        is_long = 0 < self._long_from < len(request.token_ids)
        if not is_long and 0 < self._long_from < len(request.token_ids) + request.sampling.max_new_tokens:
            cut = 0  # computed anew as a long one, it could not go on behind the prefix
        cut = cut if share else 0
        prefix = self._prefix(request.token_ids[:cut], is_long) if cut else None
        if cut and prefix is None:
            return None
        limit = request.sampling.max_new_tokens
        copies = not self.share or cut < self._share_from
        row = LiveSequence(
            request.token_ids,
            0,
            0,
            sequence=sequence,
            prefix=prefix,
            cut=cut,
            copies=copies,
            limit=limit,
            is_long=is_long,
        )
        capacity = self._own(row, len(request.token_ids) + min(limit, self._usual or limit) - 1)
        if prefix is not None:
            prefix.users += 1  # before room is made by dropping prefixes that nobody uses
        start = self._take(capacity)
        if start is None:
            if prefix is not None:
                prefix.users -= 1
            return None
        row.start, row.capacity, row.slot = start, capacity, self._slots.pop()
        return row

    def _prefix(self, tokens: Tokens, is_long: bool) -> LiveSequence | None:
        key = is_long, tokens.tobytes()
        prefix = self._prefixes.pop(key, None)
        if prefix is None:
            start = self._take(len(tokens))
            if start is None:
                return None
            prefix = LiveSequence(tokens, start, len(tokens), is_long=is_long)
        self._prefixes[key] = prefix  # the last used is the last to be dropped
        return prefix

    def _take(self, num_tokens: int) -> int | None:
        start = self._extents.take(num_tokens)
        while start is None and self._drop_prefixes(1):
            start = self._extents.take(num_tokens)
        return start

    def _drop_prefixes(self, count: int | None = None) -> int:
        """Drop up to `count` prefixes that no row uses (None: all), the longest unused first; return how many."""
        unused = [key for key, prefix in self._prefixes.items() if not prefix.users][:count]
        for key in unused:
            prefix = self._prefixes.pop(key)
            self._extents.give(prefix.start, prefix.capacity)
        return len(unused)

    def _begin_as_long(self, row: LiveSequence) -> None:
        """Let a row that has grown too long be computed anew in its place, as one with a longer prompt."""
        assert row.sequence is not None
        generated = np.array(row.sequence.token_ids, dtype=np.int32)
        row.tokens = np.concatenate([row.sequence.request.token_ids, generated])
        row.done, row.is_long = 0, True

    def _begin_behind(self, row: LiveSequence, prefix: LiveSequence, plan: ScheduledStep) -> bool:
        """Let a row begin behind its prefix; return False if the prefix is not computed yet."""
        if (prefix.stored if row.copies else prefix.done) < row.cut:
            return False
        row.done = row.cut
        if row.copies:
            plan.copies.append((prefix.start, row.start, row.cut))
        return True

    def _chunk(self, row: LiveSequence) -> int:
        begin = row.cut if row.sequence else 0
        return min(CHUNK - (row.done - begin) % CHUNK, len(row.tokens) - row.done)

    def _add(self, plan: ScheduledStep, row: LiveSequence, count: int) -> int:
        end = row.done + count
        chooses = row.sequence is not None and end >= len(row.tokens)
        plan.prompts.append(Chunk(row, row.done, count, chooses))
        row.done = end
        row.num_scheduled += chooses
        return count

    def _grow(self, row: LiveSequence, plan: ScheduledStep) -> bool:
        """Enlarge the extent of a row that generates more than was reserved; other rows may be preempted for it."""
        wanted = self._own(row, min(len(row.tokens) + row.limit - 1, row.done + max(row.num_scheduled, ALIGN)))
        if self._extents.extend(row.start, row.capacity, wanted):
            row.capacity = wanted
            return True
        start = self._take(wanted)
        while start is None:
            youngest = self.rows[-1]
            if youngest is row and len(self.rows) > 1:
                self.preempt(row)
                return False
            if youngest is row:
                break
            self.preempt(youngest)
            start = self._take(wanted)
        if start is None:  # alone, and its own old extent is in the way: anew, with all that it may need
            self._usual = None
            self._lengths.clear()
            self.preempt(row)
            return False
        plan.copies.append((row.start, start, self._own(row, row.done)))
        self._extents.give(row.start, row.capacity)
        row.start, row.capacity = start, wanted
        return True

    def _release(self, row: LiveSequence) -> None:
        self.rows.remove(row)
        self._extents.give(row.start, row.capacity)
        self._slots.append(row.slot)
        row.capacity = 0
        if row.prefix is not None:
            row.prefix.users -= 1
