"""Redis's requests: commands and their arguments in heads, and the columns that tell of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.protocols import redis_commands as table
from scope_ebpf.protocols import redis_names, resp
from scope_ebpf.protocols.contract import QUEUE_ACTION, REQUEST_SCHEMA
from scope_ebpf.protocols.heads import Heads, Numbers
from scope_ebpf.protocols.masking import TOKEN_PATTERN
from scope_ebpf.protocols.resp import Items, Mask, Rows, ascii_text, nulls, padded, pieces

_MAX_DETAIL: Final = 1000
_MAX_COMMANDS: Final = 6


@dataclass(frozen=True)
class Requests:
    """Commands of some heads and their arguments; those of one head, and of one command, follow
    each other.

    - `data`: the heads' bytes, with room behind; `arguments`: bulk strings, names of commands included
    - `command`, `position`: of each argument: which command, and its place there, the name being 0
    - `options`: of each argument: which word of OPTIONS it is, or -1
    - `head`, `name`, `count`, `first`, `seen`: of each command: its head, its id or -1, how many
      arguments it says that it has, its first in `arguments`, and how many are there
    - `keys`: of each command: places of its first and last key, 0 for none
    """

    data: NDArray[np.uint8]
    arguments: Items
    command: Numbers
    position: Numbers
    options: Numbers
    head: Rows
    name: Numbers
    count: Numbers
    first: Numbers
    seen: Numbers
    keys: tuple[Numbers, Numbers]

    def argument(self, place: Numbers) -> tuple[Numbers, Mask]:
        """For each command the argument at a place, and whether all of it is there."""
        there = (place > 0) & (place < self.seen)
        row = np.where(there, self.first + place, 0)
        if not len(self.arguments):
            return row, there
        return row, there & self.arguments.whole[row]


def read_requests(heads: Heads, items: Items) -> Requests:
    """The commands among the items of some heads."""
    data = padded(heads)
    heading = items.top & (items.kind == resp.ARRAY)
    # what is within a reply of another kind belongs to no command
    belongs = np.cumsum(items.top) - 1
    is_argument = (items.kind == resp.BULK) & ~items.top & heading[items.top][belongs]
    arguments = items.take(is_argument)
    command = (np.cumsum(heading) - 1)[is_argument]
    start = items.order[heading]
    position = arguments.order - start[command] - 1
    seen = np.bincount(command, minlength=len(start))
    first = np.cumsum(seen) - seen
    name = np.full(len(start), -1, np.int64)
    leads = np.flatnonzero((position == 0) & arguments.whole)
    name[command[leads]] = table.NAMES.find(data, arguments.begin[leads], arguments.end[leads])
    options = np.full(len(arguments), -1, np.int64)
    possible = np.flatnonzero(
        (position >= table.OPTIONS_FROM[name[command]])
        & (~table.CONTAINER[name[command]] | (position == 1))
        & arguments.whole
    )
    options[possible] = table.OPTIONS.find(data, arguments.begin[possible], arguments.end[possible])
    none = np.zeros(len(start), np.int64)
    found = Requests(
        data, arguments, command, position, options, items.head[heading], name,
        items.number[heading], first, seen, (none, none),
    )  # fmt: skip
    return replace(found, keys=_key_places(found))


def _key_places(found: Requests) -> tuple[Numbers, Numbers]:
    """Places of the first and last key of each command."""
    begin, end = table.FIRST_KEY[found.name], table.LAST_KEY[found.name]
    end = np.where(end < 0, found.count + end, end)
    counts_at = table.COUNTS_KEYS_AT[found.name]
    row, there = found.argument(counts_at)
    if there.any():
        items = found.arguments
        size = items.end[row] - items.begin[row]
        digits = found.data[items.begin[row, None] + np.arange(2)].astype(np.int64) - ord("0")
        right = (digits >= 0) & (digits <= 9)
        good = there & (size >= 1) & (size <= 2) & right[:, 0] & ((size == 1) | right[:, 1])
        number = np.where(size == 1, digits[:, 0], 10 * digits[:, 0] + digits[:, 1])
        begin = np.where(good & (number > 0), counts_at + 1, begin)
        end = np.where(good, counts_at + number, end)
    streams = np.flatnonzero(
        (found.options == table.STREAMS_ID) & table.READS_STREAMS[found.name[found.command]]
    )
    if len(streams):
        command, place = found.command[streams], found.position[streams]
        begin[command] = place + 1
        end[command] = place + (found.count[command] - 1 - place) // 2
    return begin, end


def is_key(found: Requests) -> Mask:
    """Which arguments are keys, queue names or channels."""
    begin, end = found.keys[0][found.command], found.keys[1][found.command]
    step = table.KEY_STEP[found.name[found.command]]
    place = found.position
    keys: Mask = (begin > 0) & (place >= begin) & (place <= end) & ((place - begin) % step == 0)
    return keys


def parse_requests(heads: Heads) -> pl.DataFrame:
    """Columns of REQUEST_SCHEMA."""
    count = len(heads)
    items, _, _ = resp.walk(heads, np.arange(count))
    found = read_requests(heads, items)
    text = ascii_text(found.data)
    commands = np.bincount(found.head, minlength=count)
    operations, details = _operations(found, text, count), _details(found, count)
    inline = np.flatnonzero((commands == 0) & (heads.lengths > 0))
    if len(inline):
        lines = heads.take(inline).text().str.strip_chars()
        words = lines.str.extract(r"^([A-Za-z]+)", 1).str.to_uppercase()
        operations = operations.scatter(inline, words)
        details = details.scatter(inline, lines)
    waits = np.zeros(count, np.bool_)
    waits[found.head[_waits(found)]] = True
    columns: dict[str, pl.Series | NDArray[np.generic]] = {
        "operation": operations,
        "detail": details.str.head(_MAX_DETAIL),
        "requests": np.maximum(commands, 1),
        "answered": np.ones(count, np.bool_),
        "waits": waits,
        **_queues(found, text, count),
        "defines": nulls(count),
        "uses": nulls(count),
    }
    return pl.DataFrame(
        [pl.Series(name, columns[name]).cast(dtype) for name, dtype in REQUEST_SCHEMA.items()]
    )


def _operations(found: Requests, text: str, count: int) -> pl.Series:
    """`GET product:?`, `PIPELINE LPUSH, LTRIM`, `MULTI HSET, RPUSH`: one for each head."""
    arguments, commands = found.arguments, len(found.head)
    # the last place of each list is that of -1, for none
    names = pl.Series([*table.COMMANDS, None], dtype=pl.String).gather(
        np.where(found.name < 0, len(table.COMMANDS), found.name)
    )
    unknown = (found.name < 0) & (found.seen > 0)
    if unknown.any():
        unknown[unknown] = arguments.whole[found.first[unknown]]
        theirs = pieces(text, arguments, np.where(unknown, found.first, 0), unknown)
        theirs = theirs.str.replace_all(TOKEN_PATTERN, "?").str.to_uppercase().str.head(24)
        names = names.zip_with(names.is_not_null(), theirs)
    names = names.fill_null("?")
    # what stands behind the name: a subcommand, the first digits of a script's hash, a key
    second, there = found.argument(np.ones(commands, np.int64))
    option = found.options[second] if len(arguments) else np.zeros(commands, np.int64)
    shown = there & table.CONTAINER[found.name] & (option >= 0)
    subcommands = pl.Series([*table.OPTION_WORDS, None], dtype=pl.String).gather(
        np.where(shown, option, len(table.OPTION_WORDS))
    )
    shas = pieces(text, arguments, second, there & table.EVAL_SHA[found.name]).str.head(8)
    row, there = found.argument(found.keys[0])
    queue = np.zeros(commands, np.bool_)
    rows = np.flatnonzero(there & (table.ACTION[found.name] > 0))
    begin = arguments.begin[row[rows]]
    queue[rows] = redis_names.are_queues(found.data, begin, arguments.end[row[rows]] - begin)
    key = pl.col("key")
    frame = pl.DataFrame(
        {
            "head": found.head,
            "name": names,
            "subcommand": subcommands,
            "sha": shas.str.replace_all(TOKEN_PATTERN, "?"),
            "key": pieces(text, arguments, row, there),
            "queue": queue,
        }
    ).with_columns(pl.when("queue").then(key).otherwise(redis_names.fold(key)).alias("key"))
    several = np.bincount(found.head, minlength=count)[found.head] > 1
    single = frame.filter(~several).select(
        "head",
        pl.concat_str("name", "subcommand", "sha", "key", separator=" ", ignore_nulls=True).alias(
            "operation"
        ),
    )
    inner = pl.col("name").filter(~(pl.col("multi") & pl.col("name").is_in(["MULTI", "EXEC"])))
    pipelines = (
        frame.filter(several)
        .with_columns((pl.col("name").first().over("head") == "MULTI").alias("multi"))
        .group_by("head", maintain_order=True)
        .agg(inner.unique(maintain_order=True).head(_MAX_COMMANDS), pl.col("multi").first())
        .select(
            "head",
            pl.concat_str(
                pl.when("multi").then(pl.lit("MULTI")).otherwise(pl.lit("PIPELINE")),
                pl.col("name").list.join(", "),
                separator=" ",
            )
            .str.strip_chars_end()
            .alias("operation"),
        )
    )
    both = pl.concat([single, pipelines])
    places = np.full(count, len(both), np.int64)
    places[both["head"].to_numpy()] = np.arange(len(both))
    return pl.concat([both["operation"], nulls(1).alias("operation")]).gather(places)


def _details(found: Requests, count: int) -> pl.Series:
    """The commands as they were sent: arguments after spaces, commands after `; `."""
    arguments, nothing = found.arguments, nulls(count)
    if not len(arguments):
        return nothing
    size = arguments.end - arguments.begin
    same_head = np.append(arguments.head[1:] == arguments.head[:-1], False)
    last_of_command = np.append(found.command[1:] != found.command[:-1], False) & same_head
    # each with room for what comes behind it
    room = size + 1 + last_of_command
    letters = found.data[resp.ranges(arguments.begin, room)]
    ends = np.cumsum(room)
    letters[ends - 1] = ord(" ")
    letters[ends[last_of_command] - 2] = ord(";")
    text = ascii_text(letters)
    lasts = np.flatnonzero(~same_head)
    stops = (ends[lasts] - 1).tolist()
    begins = [0, *(stop + 1 for stop in stops[:-1])]
    texts = [text[begin:stop] for begin, stop in zip(begins, stops, strict=True)]
    return nothing.scatter(arguments.head[lasts], pl.Series(texts, dtype=pl.String))


def _waits(found: Requests) -> Mask:
    """Which commands may wait for somebody else."""
    waits: Mask = table.WAITS[found.name]
    blocking = (found.options == table.BLOCK_ID) & table.READS_STREAMS[found.name[found.command]]
    waits[found.command[blocking]] = True
    return waits


def _queues(found: Requests, text: str, count: int) -> dict[str, pl.Series]:
    """What each head does to a queue: its first push, or else its first of another action."""
    action = table.ACTION[found.name]
    rows = np.flatnonzero(action > 0)
    heads, pushes = found.head[rows], action[rows] == table.PUSH
    # backwards, so that the first stays; pushes after all others
    chosen = np.full(count, -1, np.int64)
    chosen[heads[::-1]] = rows[::-1]
    chosen[heads[pushes][::-1]] = rows[pushes][::-1]
    acts = chosen >= 0
    if not acts.any():
        return {
            "queue_action": nulls(count).cast(QUEUE_ACTION),
            "queue": nulls(count),
            "element": nulls(count),
        }
    key, has_key = found.argument(found.keys[0])
    # An element where there is one and no other: `LPUSH key element`, not `LPUSH key a b`.
    gives = (action == table.PUSH) | (action == table.PUBLISH)
    one = np.where(found.name == table.ZADD, 4, np.where(found.name == table.XADD, 5, 3))
    element, has_element = found.argument(found.count - 1)
    has_element &= gives & (found.count == one)
    has_element &= np.bincount(found.head[gives], minlength=count)[found.head] == 1
    at = np.maximum(chosen, 0)
    kinds = pl.Series([None, *QUEUE_ACTION.categories], dtype=QUEUE_ACTION)
    return {
        "queue_action": kinds.gather(np.where(acts, action[at], 0)),
        "queue": pieces(text, found.arguments, key[at], acts & has_key[at]),
        "element": pieces(text, found.arguments, element[at], acts & has_element[at]),
    }
