"""What the next step computes: admission, chunks of prompts, shared prefixes, memory. Host code alone.

Knows nothing of models or tensors, so that a simulator can drive it too. Every sequence becomes a
`Row` with a slot and an extent of the cache; a shared prefix is a row without a sequence.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from hpc.arrays import Tokens
from hpc.engine.admission import CHUNK, Gate
from hpc.engine.extents import ALIGN, Extents
from hpc.engine.interface import Source, begin
from hpc.engine.sequence import Sequence

ESTIMATE_FROM = 64
"""Ended sequences that must be known before their lengths say how much memory the next reserves."""


@dataclass(slots=True, eq=False)
class LiveSequence:
    """A sequence, or a shared prefix, that has a place in the cache."""

    tokens: Tokens
    """The prompt."""
    start: int
    """Its extent in the cache, which holds the positions from `cut` on."""
    room: int
    """Tokens that the extent holds."""
    slot: int = -1
    sequence: Sequence | None = None
    prefix: "LiveSequence | None" = None
    cut: int = 0
    copies: bool = False
    """It has what it shares in its own extent too."""
    done: int = 0
    """Positions that are stored, or will be by the steps under way."""
    stored: int = 0
    """Of a prefix, the positions that were stored when the step under way began."""
    launched: int = 0
    """Tokens that have been chosen, or will be by the steps under way; 0 while it has prompt tokens left."""
    limit: int = 0
    """Most tokens that it generates."""
    users: int = 0
    """Rows that read this prefix."""
    endings: frozenset[int] = frozenset()
    """Tokens at which it ends."""
    stop: tuple[str, ...] = ()
    """Texts at which it ends."""

    @property
    def shared(self) -> int:
        """Of its first tokens, how many it reads in the extent of its prefix."""
        return 0 if self.copies else self.cut

    @property
    def live(self) -> bool:
        """Whether it still has its place."""
        return self.room > 0


@dataclass(slots=True)
class Chunk:
    """Neighbouring tokens of a row that a step computes."""

    row: LiveSequence
    position: int
    count: int
    chooses: bool
    """Whether the next token is chosen after its last one."""


@dataclass
class ScheduledStep:
    """A step: copies in the cache (source, target, tokens) first, then all else at once."""

    rows: list[LiveSequence] = field(default_factory=list)
    """They decode: the newest token of each is computed, and the next one chosen."""
    positions: list[int] = field(default_factory=list)
    """Of these tokens."""
    prompts: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def chunks(self) -> list[Chunk]:
        """All that is computed."""
        decoding = zip(self.rows, self.positions, strict=True)
        return [Chunk(row, position, 1, True) for row, position in decoding] + self.prompts


class Scheduler:
    """Which rows live, and what each step computes.

    `share`: rows read a prefix of `share_from` tokens or more where it lies; otherwise it is copied into
    each one's extent. `mixed`: a step may both decode and compute prompts; otherwise prompts go first.
    `refill`: see `Gate`.
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
        self._mixed = mixed
        self._gate = Gate(refill)
        self._slots = list(range(max_seqs))[::-1]
        self._prefixes: dict[bytes, LiveSequence] = {}
        self._lengths: deque[int] = deque(maxlen=4096)
        self._usual: int | None = None
        self._suspects = 0

    def admit(self, source: Source) -> list[LiveSequence]:
        """Give places to sequences while there is room and the next step is not full; return the new rows.

        Takes one request at a time, so that what is not needed here can go to another rank.
        """
        new: list[LiveSequence] = []
        if not self._slots or not self._gate.is_open(len(self.rows)):
            return new
        full = False
        pending = sum(len(row.tokens) - row.done for row in self.rows if row.done < len(row.tokens))
        while self._slots and pending < self.step_tokens and len(self.rows) < self._most_rows():
            if not self.waiting:
                self.waiting.extend(begin(source.pull(1)))
            if not self.waiting:
                break
            row = self._place(self.waiting[0])
            if row is None and not self.rows:
                self._drop_prefixes()
                row = self._place(self.waiting[0], share=False)  # beside its prefix it may be just too large
            if row is None and self.rows:
                full = bool(new)  # it gets its place when another has ended
                break
            sequence = self.waiting.popleft()
            if row is None:
                sequence.error = (
                    f"it needs {self._most_tokens(sequence):,} tokens of cache, and there is room for "
                    f"{self._extents.num_tokens:,}; lower max_new_tokens, or give the rank more memory"
                )
                self.failed.append(sequence)
                continue
            self.rows.append(row)
            new.append(row)
            pending += len(row.tokens) - row.done
        if full or len(self.rows) >= self._most_rows():
            self._gate.note_full(len(self.rows))
        return new

    def next(self) -> ScheduledStep:
        """Return the next step: every row that decodes, and prompts while it has fewer than `step_tokens`."""
        plan = ScheduledStep()
        for shared in self._prefixes.values():
            shared.stored = shared.done
        prompts = [row for row in self.rows if not row.launched]
        if self._mixed or not prompts:
            count = len(self.rows)
            for row in list(self.rows):
                if not 0 < row.launched < row.limit or not row.room:
                    continue
                done = row.done
                if done - row.shared < row.room or self._grow(row, plan):
                    plan.rows.append(row)
                    plan.positions.append(done)
                    row.done = done + 1
                    row.launched += 1
            if len(self.rows) < count:  # rows have given way to others, earlier ones too
                plan.rows = [row for row in plan.rows if row.room]
                plan.positions = [row.done - 1 for row in plan.rows]
                prompts = [row for row in prompts if row.room]
        room = self.step_tokens
        for row in prompts:
            prefix = row.prefix
            while prefix is not None and prefix.done < row.cut and room > 0:
                room -= self._add(plan, prefix, self._chunk(prefix))
            if prefix is not None and row.done == 0 and not self._begin_behind(row, prefix, plan):
                continue
            while row.done < len(row.tokens) and room > 0:
                room -= self._add(plan, row, self._chunk(row))
        return plan

    def spare(self, row: LiveSequence) -> int:
        """Return how many tokens more than planned a row that decodes may store and choose in the next step."""
        return min(row.room - self._own(row, row.done), row.limit - row.launched)

    def advance(self, row: LiveSequence) -> None:
        """Note that a row stores and chooses a token more."""
        row.done += 1
        row.launched += 1

    def finish(self, row: LiveSequence) -> None:
        """Take back the place of a row that has ended."""
        self._lengths.append(row.launched)
        if len(self._lengths) >= ESTIMATE_FROM and len(self._lengths) % 32 == 0:
            self._usual = int(np.percentile(self._lengths, 95))
        self.excuse()
        self._release(row)

    def restart(self, row: LiveSequence) -> None:
        """Take back the place of a row, which begins anew when it is its turn: to the same end."""
        assert row.sequence is not None
        self._release(row)
        self.waiting.appendleft(Sequence(row.sequence.request, sample=row.sequence.sample))

    def restart_all(self, alone: bool) -> None:
        """Let all rows begin anew, and `alone`: one at a time, to find which of them fails."""
        count = len(self.rows)
        for row in reversed(list(self.rows)):
            self.restart(row)
        self._drop_prefixes()
        if alone and count > 1:
            self._suspects = count

    def excuse(self) -> None:
        """Note that one of those that are tried alone is through."""
        self._suspects = max(0, self._suspects - 1)

    def halve(self) -> None:
        """Let a step have half as many rows and tokens from now on."""
        self.max_seqs = max(1, self.max_seqs // 2)
        self.step_tokens = max(ALIGN, self.step_tokens // 2)

    def restore(self) -> None:
        """Let a step have as much as at first: what did not fit is gone."""
        self.max_seqs, self.step_tokens = self._limits

    def _most_rows(self) -> int:
        return 1 if self._suspects else self.max_seqs

    def _most_tokens(self, sequence: Sequence) -> int:
        request = sequence.request
        return len(request.token_ids) + request.sampling.max_new_tokens - 1

    def _own(self, row: LiveSequence, tokens: int) -> int:
        """Return how many of a row's first tokens are in its own extent."""
        return tokens - row.shared

    def _place(self, sequence: Sequence, share: bool = True) -> LiveSequence | None:
        request = sequence.request
        # All samples of a prompt share it but for its last token, whose logits each needs.
        cut = len(request.token_ids) - 1 if request.sampling.n > 1 else request.prefix
        cut = cut if share else 0
        prefix = self._prefix(request.token_ids[:cut]) if cut else None
        if cut and prefix is None:
            return None
        limit = request.sampling.max_new_tokens
        copies = not self.share or cut < self._share_from
        row = LiveSequence(
            request.token_ids, 0, 0, sequence=sequence, prefix=prefix, cut=cut, copies=copies, limit=limit
        )
        room = self._own(row, len(request.token_ids) + min(limit, self._usual or limit) - 1)
        if prefix is not None:
            prefix.users += 1  # before room is made by dropping prefixes that nobody uses
        start = self._take(room)
        if start is None:
            if prefix is not None:
                prefix.users -= 1
            return None
        row.start, row.room, row.slot = start, room, self._slots.pop()
        return row

    def _prefix(self, tokens: Tokens) -> LiveSequence | None:
        key = tokens.tobytes()
        prefix = self._prefixes.pop(key, None)
        if prefix is None:
            start = self._take(len(tokens))
            if start is None:
                return None
            prefix = LiveSequence(tokens, start, len(tokens))
        self._prefixes[key] = prefix  # the last used is the last to be dropped
        return prefix

    def _take(self, num_tokens: int) -> int | None:
        start = self._extents.take(num_tokens)
        while start is None and self._drop_prefixes(1):
            start = self._extents.take(num_tokens)
        return start

    def _drop_prefixes(self, most: int | None = None) -> int:
        """Give up prefixes that no row uses, the longest unused first; return how many."""
        unused = [key for key, prefix in self._prefixes.items() if not prefix.users][:most]
        for key in unused:
            prefix = self._prefixes.pop(key)
            self._extents.give(prefix.start, prefix.room)
        return len(unused)

    def _begin_behind(self, row: LiveSequence, prefix: LiveSequence, plan: ScheduledStep) -> bool:
        """Let a row begin where its prefix ends, if that is computed."""
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
        row.launched += chooses
        return count

    def _grow(self, row: LiveSequence, plan: ScheduledStep) -> bool:
        """Make room for a row that generates more than was thought; another may have to give way."""
        wanted = self._own(row, min(len(row.tokens) + row.limit - 1, row.done + max(row.launched, ALIGN)))
        if self._extents.extend(row.start, row.room, wanted):
            row.room = wanted
            return True
        start = self._take(wanted)
        while start is None:
            youngest = self.rows[-1]
            if youngest is row and len(self.rows) > 1:
                self.restart(row)
                return False
            if youngest is row:
                break
            self.restart(youngest)
            start = self._take(wanted)
        if start is None:  # alone, and its own old extent is in the way: anew, with all that it may need
            self._usual = None
            self._lengths.clear()
            self.restart(row)
            return False
        plan.copies.append((row.start, start, self._own(row, row.done)))
        self._extents.give(row.start, row.room)
        row.start, row.room = start, wanted
        return True

    def _release(self, row: LiveSequence) -> None:
        self.rows.remove(row)
        self._extents.give(row.start, row.room)
        self._slots.append(row.slot)
        row.room = 0
        if row.prefix is not None:
            row.prefix.users -= 1
