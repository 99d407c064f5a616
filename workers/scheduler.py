"""What runs next: the only batching policy. Pure; ``now`` is an argument, in seconds.

There is no prefill phase and no decode phase. A sequence has known tokens (prompt and generated)
and a position up to which steps have been planned; every step hands out one token budget to close
the gap. Sequences that have one token to go decode; the others get what is left, in order of
(priority, arrival). A sequence that finds no free block takes those of the worst sequence behind
it, which starts over later: recomputation changes no token.

``plan`` may run ahead of ``commit``: a decoding row continues from "the token last sampled in this
slot", whose value the plan never needs. Not so under a grammar, which must see a token before it
can say what follows: such a sequence sits out until its last token is committed. Sequences that
wait are ordered like those that run, and the first one that does not fit holds the others back, so
nothing starves. So does one whose prefix is being computed: it soon finds in the prefix cache what
it would compute a second time.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import Counter, deque
from copy import copy
from operator import attrgetter

import msgspec
import numpy as np

from workers.blocks import BlockPool, PageTable, Undo, first_visible, prefix_root
from workers.config import KVConfig, SchedulerConfig
from workers.sequence import Chunk, Columns, Rows, Sequence, Step
from workers.wire import (
    Batch,
    FinishReason,
    GroupLoad,
    Join,
    Load,
    Output,
    Request,
    StepResult,
    Table,
    Wait,
)

_ORDER = attrgetter("order")
POSITION, LAST, CHANGE = range(3)  # columns by slot, see Scheduler


class Scheduler:
    """Requests in, step plans and outputs out. Verbs may not be called concurrently.

    ``revision`` and ``kv_dtype`` start the hash chains of the prefix cache; an ingress that sends
    ``Request.hashes`` must use the same ``prefix_root``.
    """

    def __init__(
        self, config: SchedulerConfig, kv: KVConfig, revision: str = "", kv_dtype: str = ""
    ) -> None:
        # More running sequences than budget would mean some cannot take part in a step.
        num_slots = min(config.max_num_seqs, config.max_num_batched_tokens)
        if num_slots < 1 or config.max_model_len < 2:
            raise ValueError(
                "max_num_seqs and max_num_batched_tokens must be at least 1 and max_model_len at "
                f"least 2, not {config.max_num_seqs}, {config.max_num_batched_tokens} and "
                f"{config.max_model_len}"
            )
        self.config = config
        self.pool = BlockPool(kv)
        self._identity = (revision, kv_dtype)
        self._live: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []  # may run; sorted by order
        self._prefilling: list[Sequence] = []  # running, more than one token behind; sorted
        self._slots: list[Sequence | None] = [None] * num_slots
        self._free_slots = [*range(num_slots)][::-1]
        # POSITION: where the next row starts. LAST: decoding rows start below it (0: not decoding).
        # CHANGE: the position at which the page table must change. All int32[slot].
        self._columns = np.zeros((3, num_slots), np.int32)
        self._steps: deque[Step] = deque()
        self._planned = 0  # number of the newest planned step
        self._rollbacks: int | None = None  # the step that rollback may take back
        self._undo: Undo = self.pool.undo
        self._starved = False
        self._joins: list[Join] = []
        self._tables: list[Table] = []
        self._deadlines: list[tuple[float, int, str]] = []
        self._outputs: list[Output] = []  # for the next commit
        self._arrivals = 0
        self._load = Load(blocks=kv.num_blocks)
        self._finished: Counter[str] = Counter()

    # Requests.

    def add(self, request: Request, now: float) -> list[Output]:
        """Take a request. An answer means that it has ended already: refused, or nothing to do."""
        root = prefix_root(*self._identity, salt=request.salt)
        seq = Sequence.of(request, self._arrivals, self.config, root)
        refusal = seq.refusal(self.config, self.pool)
        if request.id in self._live:
            refusal = f"request {request.id!r} is already running"
        if refusal:
            return [self._terminal(seq, "refused", refusal)]
        if request.emitted and (reason := seq.ended()):
            return [self._terminal(seq, reason)]
        if len(seq.hashes) != seq.prompt // self.pool.block_size:
            seq.hashes = []  # none, or of another block size
        self._arrivals += 1
        self._live[seq.id] = seq
        if request.deadline_ms is not None:
            deadline = now + request.deadline_ms / 1000
            heapq.heappush(self._deadlines, (deadline, seq.order[1], seq.id))
        if not seq.waits:
            insort(self._waiting, seq, key=_ORDER)
        return []

    def abort(self, id: str, now: float) -> list[Output]:
        """End a request now, whatever it is doing. An unknown or ended id is answered with []."""
        self._rollbacks = None
        seq = self._live.get(id)
        return [self._finish(seq, "abort", "the request was aborted")] if seq else []

    def resolve(self, id: str, what: Wait, now: float) -> None:
        """Something a request waits for is there; the last one lets it run."""
        seq = self._live.get(id)
        if seq and what in seq.waits:
            seq.waits.remove(what)
            if not seq.waits:
                insort(self._waiting, seq, key=_ORDER)

    def has_work(self) -> bool:
        """Whether planning or committing can get anything done now."""
        return bool(
            self._steps
            or self._waiting
            or self._outputs
            or len(self._free_slots) < len(self._slots)
        )

    def next_deadline(self) -> float | None:
        """When ``plan`` should be called even without work, as a live request then expires."""
        while self._deadlines and self._deadlines[0][2] not in self._live:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    # A step.

    def plan(self, now: float) -> Batch:
        """The next step. It is legal for it to have no rows: what runs waits for a commit."""
        self._expire(now)
        position, last, change = self._columns
        before = (self._columns.copy(), self._prefilling[:], copy(self._load))
        self._undo.clear()
        self._undo.append((self._restore, before))
        self._joins, self._tables, self._starved = [], [], False
        preemptions = self._load.preemptions

        rows = np.flatnonzero(position < last)
        due = rows[position[rows] >= change[rows]]
        budget = self.config.max_num_batched_tokens - len(rows)
        chunks: list[Chunk] = []
        if len(due) or self._prefilling:
            turns = [seq for slot in due.tolist() if (seq := self._slots[slot])]
            turns += self._prefilling
            if len(due) * self.pool.num_groups > self.pool.num_free:
                turns.sort(key=_ORDER)  # else all that decode get their blocks in any order
            stalled = []
            for seq in turns:
                if seq.slot < 0:
                    continue  # a better one took its blocks
                start = int(position[seq.slot])
                if last[seq.slot]:
                    if self._grow(seq, start, start + 1) == start:
                        stalled.append(seq.slot)
                elif budget:
                    stop = self._grow(seq, start, min(start + budget, len(seq.tokens)))
                    if stop > start:
                        budget -= stop - start
                        chunks.append(Chunk(seq, start, stop))
            if stalled or self._load.preemptions > preemptions:
                rows = np.setdiff1d(np.flatnonzero(position < last), stalled)
        if self._waiting and not self._starved and self._load.preemptions == preemptions:
            self._admit(budget, chunks)
        return self._close(rows, chunks)

    def _grow(self, seq: Sequence, start: int, stop: int) -> int:
        """Blocks for positions from ``start`` up to ``stop``, or as far as they reach.

        For the first position, sequences behind this one are preempted. Returns how far it got:
        ``start`` means not in this step.
        """
        pool, table = self.pool, seq.table
        assert table is not None
        leaves, held = pool.trim(table, start), table.end * pool.block_size
        if stop <= held:
            self._columns[CHANGE, seq.slot] = min(leaves, held)
            return stop
        while not self._starved and pool.room(table) <= start:
            # Blocks that come back with a commit are worth a pause, not a recomputation; and
            # whoever comes after must not take them meanwhile.
            self._starved = pool.num_free + pool.num_parked >= pool.num_groups
            if not self._starved:
                victim = max((other for other in self._slots if other), key=_ORDER)
                self._preempt(victim)
                if victim is seq:
                    return start
        room = held if self._starved else pool.room(table)
        stop = max(start, min(stop, room))
        first = table.end
        for group, blocks in enumerate(pool.extend(table, stop)):
            self._tables.append(Table(seq.slot, group, first, blocks))
        self._columns[CHANGE, seq.slot] = min(leaves, table.end * pool.block_size)
        return stop

    def _admit(self, budget: int, chunks: list[Chunk]) -> None:
        """Let waiting sequences in while slots, budget and blocks last.

        Blocks must suffice for all tokens known, here and in sequences that are still behind, with
        one more for each sequence that runs: else the newcomer would soon be preempted.
        """
        pool = self.pool
        owed = sum(self._owed(seq) for seq in self._prefilling)
        committed = self._planned - len(self._steps)
        filling = self._filling() if budget and self._free_slots else set()
        while self._waiting and self._free_slots and budget:
            seq = self._waiting[0]
            known = len(seq.tokens)
            running = len(self._slots) - len(self._free_slots)
            if seq.barrier > committed or owed + running + pool.num_groups > pool.num_free:
                break  # the second can be seen without looking for a prefix
            pages = known // pool.block_size if pool.config.prefix_caching else 0
            hashes = seq.hash_pages(pages, pool.block_size)
            hit = pool.match(hashes, known)
            if hit < min(pages, (known - 1) // pool.block_size) and hashes[hit] in filling:
                break
            cost = pool.blocks_needed(known) - pool.shared(hashes, hit)
            if cost + owed + running > pool.num_free:
                break
            filling.update(hashes[hit:pages])
            self._undo.append((self._unadmit, (seq, seq.admitted)))
            del self._waiting[0]
            start = hit * pool.block_size
            if not seq.admitted:
                seq.admitted = True
                seq.cached = min(start, seq.prompt)
                self._load.prompt_tokens += seq.prompt
                self._load.prefix_queries += seq.prompt
                self._load.prefix_hits += seq.cached
            seq.table = table = pool.adopt(hashes, hit)
            self._seat(seq)
            self._columns[POSITION, seq.slot] = start
            insort(self._prefilling, seq, key=_ORDER)
            tokens = seq.tokens[:] if seq.sampling.penalised or seq.grammar else []
            self._joins.append(
                Join(seq.slot, seq.sampling, seq.choice, seq.prompt, tokens, seq.grammar)
            )
            for group, blocks in enumerate(table.blocks):
                if blocks:
                    first = table.end - len(blocks)
                    self._tables.append(Table(seq.slot, group, first, blocks[:]))
            stop = self._grow(seq, start, min(start + budget, known))
            budget -= stop - start
            chunks.append(Chunk(seq, start, stop))
            owed += self._owed(seq)

    def _filling(self) -> set[bytes]:
        """Hashes of the pages that steps in flight fill, and of those that sequences before the
        first waiting one will: whoever waits for them waits for nobody behind itself."""
        size, filling = self.pool.block_size, set[bytes]()
        for step in self._steps:
            for seq, first, blocks in step.full_pages:
                filling.update(seq.hashes[first : first + len(blocks[0])])
        for seq in self._prefilling:
            if seq.order < self._waiting[0].order:
                filling.update(seq.hashes[int(self._columns[POSITION, seq.slot]) // size :])
        return filling

    def _owed(self, seq: Sequence) -> int:
        """Blocks that a running sequence's known tokens will still take."""
        assert seq.table is not None
        held = sum(map(len, seq.table.blocks))
        return max(0, self.pool.blocks_needed(len(seq.tokens)) - held)

    def _close(self, rows: Rows, chunks: list[Chunk]) -> Batch:
        """Advance everything that takes part, and write the step down."""
        position, last, _ = self._columns
        size = self.pool.block_size
        self._planned += 1
        step = Step(self._planned)
        starts = position[rows]
        position[rows] = starts + 1
        step.sampling = [*map(self._slots.__getitem__, rows.tolist())]  # type: ignore[list-item]
        for row in np.flatnonzero((starts + 1) % size == 0).tolist():
            start = int(starts[row])
            step.fill(step.sampling[row], start, start + 1, size)
        for chunk in chunks:
            seq = chunk.seq
            step.fill(seq, chunk.start, chunk.stop, size)
            position[seq.slot] = chunk.stop
            if chunk.samples:
                step.sampling.append(seq)
                self._prefilling.remove(seq)
                last[seq.slot] = chunk.stop if seq.grammar else seq.limit - 1
        self._load.batch_tokens = len(rows) + sum(chunk.stop - chunk.start for chunk in chunks)
        self._steps.append(step)
        self._rollbacks = step.number
        self.pool.open_step()
        return step.batch(rows, starts, chunks, self._joins, self._tables)

    def commit(self, batch: Batch, result: StepResult, now: float) -> list[Output]:
        """The oldest planned step has run: take its tokens and publish the pages it filled.

        Tokens of sequences that have ended meanwhile are ignored; preempted ones keep theirs.
        """
        step, load = self._steps.popleft(), self._load
        assert step.number == batch.step == result.step, "steps are committed in order"
        assert result.counts is None, "no step is planned with more than one token per row"
        self._rollbacks = None
        if self.pool.config.prefix_caching:
            for seq, first, blocks in step.full_pages:
                self._publish(seq, first, blocks)
        self.pool.close_step()
        outputs, self._outputs = self._outputs, []
        for row, why in result.errors.items():
            if not (seq := step.sampling[row]).done:
                outputs.append(self._finish(seq, "refused", why))
        emit, new, before = outputs.append, Output, len(outputs)
        for seq, token in zip(step.sampling, result.tokens, strict=True):
            if seq.done:
                continue
            tokens = seq.tokens
            tokens.append(token)
            known = len(tokens)
            if seq.grammar and seq.slot >= 0:
                self._columns[LAST, seq.slot] = known
            if (token in seq.stops or known >= seq.limit) and (reason := seq.ended()):
                emit(self._finish(seq, reason, None, token))
            elif seq.cached:
                emit(new(seq.id, seq.epoch, known - seq.prompt - 1, [token], cached=seq.cached))
                seq.cached = 0
            else:
                emit(new(seq.id, seq.epoch, known - seq.prompt - 1, [token]))
        if result.logprobs:
            by_id = {output.id: output for output in outputs[before:]}
            for row, logprobs in result.logprobs.items():
                if (output := by_id.get(step.sampling[row].id)) is not None:
                    output.logprobs = [logprobs]
        load.generated_tokens += len(outputs) - before
        for id in result.transfers:
            self.resolve(id, "remote_kv", now)
        load.steps += 1
        return outputs

    def _publish(self, seq: Sequence, first: int, blocks: list[list[int]]) -> None:
        size, pages = self.pool.block_size, first + len(blocks[0])
        if len(seq.tokens) < pages * size:
            return  # it ended before its last tokens were known
        hashes = seq.hash_pages(pages, size)
        for group, held in enumerate(blocks):
            for page, block in enumerate(held, first):
                self.pool.publish(group, block, hashes[page])

    def rollback(self, batch: Batch) -> None:
        """Take back the newest step, which was never launched; the state is then as before.

        Only until the next commit or abort. Expired requests stay expired.
        """
        assert self._rollbacks == batch.step, f"step {batch.step} can no longer be taken back"
        self._rollbacks = None
        self._steps.pop()
        self._planned -= 1
        for inverse, args in reversed(self._undo):
            inverse(*args)
        self._undo.clear()

    # Moves of a sequence between waiting and running, and their inverses.

    def _seat(self, seq: Sequence) -> None:
        seq.slot = self._free_slots.pop()
        self._slots[seq.slot] = seq

    def _unseat(self, seq: Sequence) -> None:
        if not self._columns[LAST, seq.slot]:
            self._prefilling.remove(seq)
        self._columns[:, seq.slot] = 0
        self._slots[seq.slot] = None
        self._free_slots.append(seq.slot)
        seq.slot, seq.table = -1, None

    def _preempt(self, seq: Sequence) -> None:
        assert seq.table is not None
        self._undo.append((self._unpreempt, (seq, seq.table, seq.barrier)))
        self.pool.release(seq.table)
        self._unseat(seq)
        seq.barrier = self._planned
        insort(self._waiting, seq, key=_ORDER)
        self._load.preemptions += 1

    def _unpreempt(self, seq: Sequence, table: PageTable, barrier: int) -> None:
        self._waiting.remove(seq)
        self._seat(seq)
        seq.table, seq.barrier = table, barrier

    def _unadmit(self, seq: Sequence, admitted: bool) -> None:
        self._slots[seq.slot] = None
        self._free_slots.append(seq.slot)
        seq.slot, seq.table = -1, None
        if not admitted:
            seq.admitted, seq.cached = False, 0
        insort(self._waiting, seq, key=_ORDER)

    def _restore(self, columns: Columns, prefilling: list[Sequence], load: Load) -> None:
        self._columns = columns
        self._prefilling, self._load = prefilling, load

    # The end.

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number, id = heapq.heappop(self._deadlines)
            seq = self._live.get(id)
            if seq and seq.order[1] == number:
                done = len(seq.tokens) - seq.prompt
                self._outputs.append(
                    self._finish(seq, "timeout", f"the deadline passed after {done} tokens")
                )

    def _finish(
        self, seq: Sequence, reason: FinishReason, detail: str | None = None, *new: int
    ) -> Output:
        """End a live sequence. ``new``: the last of its tokens, if that comes only now."""
        if seq.table is not None:
            self.pool.release(seq.table)
            self._unseat(seq)
        elif not seq.waits:
            self._waiting.remove(seq)
        del self._live[seq.id]
        seq.done = True
        return self._terminal(seq, reason, detail, *new)

    def _terminal(
        self, seq: Sequence, reason: FinishReason, detail: str | None = None, *new: int
    ) -> Output:
        self._finished[reason] += 1
        offset = len(seq.tokens) - seq.prompt - len(new)
        stop = seq.tokens[-1] if reason == "stop" else None
        return Output(seq.id, seq.epoch, offset, [*new], reason, detail, seq.cached, stop)

    # What others may see.

    def load(self) -> Load:
        """What this engine is doing. ``progress_ms`` is the engine's to fill."""
        pool, running = self.pool, len(self._slots) - len(self._free_slots)
        waiting = [seq for seq in self._live.values() if seq.slot < 0]
        behind = sum(
            len(seq.tokens) - int(self._columns[POSITION, seq.slot]) for seq in self._prefilling
        )
        return msgspec.structs.replace(
            self._load,
            running=running,
            waiting=len(waiting),
            queued_tokens=behind + sum(len(seq.tokens) for seq in waiting),
            free=pool.num_free,
            groups=[
                GroupLoad(group.name, used)
                for group, used in zip(pool.config.groups, pool.used, strict=True)
            ],
            finished=dict(self._finished),
        )

    def check(self) -> None:
        """Full audit of scheduler and ledger. Raises AssertionError."""
        running = [seq for seq in self._slots if seq]
        self.pool.check(seq.table for seq in running if seq.table)
        position, last, change = self._columns.tolist()
        assert sorted(self._free_slots) == [s for s, seq in enumerate(self._slots) if not seq]
        assert self._waiting == sorted(self._waiting, key=_ORDER), "waiting is out of order"
        assert self._prefilling == sorted(self._prefilling, key=_ORDER), (
            "prefilling is out of order"
        )
        assert set(self._prefilling) == {seq for seq in running if not last[seq.slot]}
        blocked = [seq for seq in self._live.values() if seq.waits]
        everyone = sorted([*running, *self._waiting, *blocked], key=_ORDER)
        assert everyone == sorted(self._live.values(), key=_ORDER), "a request is lost or double"
        for slot in self._free_slots:
            past = (position[slot], last[slot], change[slot])
            assert not any(past), f"free slot {slot} has a past"
        for seq in everyone:
            assert not seq.done, f"{seq.id} has ended"
            assert (seq.table is not None) == (seq.slot >= 0), f"{seq.id}: table without slot"
            assert len(seq.tokens) < seq.limit, f"{seq.id} should have ended"
        for seq in running:
            assert seq.table is not None
            held = seq.table.end * self.pool.block_size
            assert self._slots[seq.slot] is seq, f"slot {seq.slot}"
            assert position[seq.slot] <= held, f"{seq.id}: {position[seq.slot]} tokens, {held} held"
            due = change[seq.slot]
            assert due <= held, f"{seq.id}: change is stale"
            for group, blocks in zip(self.pool.config.groups, seq.table.blocks, strict=True):
                seen = first_visible(group, due - 1) // self.pool.block_size
                assert seen <= seq.table.end - len(blocks), f"{seq.id}: change is stale"
