"""Reads SASS, NVIDIA's assembly: instructions, and the loop that multiplies the most."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
TENSOR = re.compile(r"HGMMA|[HIDQ]MMA|UTC\w*MMA")


class Instruction(NamedTuple):
    """One instruction of a kernel."""

    address: int
    predicate: str  # such as "!P0"; "" for none
    opcode: str  # with its suffixes, such as "LDG.E.128"
    operands: str

    @property
    def name(self) -> str:
        """The opcode without suffixes."""
        return self.opcode.split(".")[0]

    @property
    def multiplies(self) -> bool:
        """Whether it is a matrix instruction."""
        return TENSOR.fullmatch(self.name) is not None

    @property
    def target(self) -> int | None:
        """The address that a branch or a call goes to."""
        found = re.search(r"(0x[0-9a-f]+)\s*$", self.operands)
        return int(found[1], 16) if found and self.name in ("BRA", "CALL") else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        conditional = bool(self.predicate) or re.match(r"!?U?P\d", self.operands) is not None
        return conditional or self.name not in ("BRA", "EXIT", "RET", "BRX")


def parse(sass: str) -> list[Instruction]:
    """The instructions of the first function in the text that ``cuobjdump -sass`` prints."""
    first = sass.partition("Function :")[2].partition("Function :")[0] or sass
    return [
        Instruction(int(address, 16), predicate or "", opcode, operands.strip())
        for address, predicate, opcode, operands in _LINE.findall(first)
    ]


def main_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """One iteration of the loop with the most matrix instructions; [] if no loop has any.

    Of nested loops, the inner one counts; of loops with as many matrix instructions, the shortest,
    which is the one without index checks. Where the body branches, the iteration takes the way with
    the most matrix instructions, and of these the shortest: what is rarely done is skipped. A
    called function's instructions follow its call.
    """
    followers = _followers(code)
    called = {i: _called(code, one) for i, one in enumerate(code) if one.name == "CALL"}
    loops = {
        first: body
        for first, body in _loops(followers).items()
        if any(code[i].multiplies for i in body)
    }
    ways = [
        [
            one
            for i in _way(code, followers, called, first, body)
            for one in (code[i], *called.get(i, ()))
        ]
        for first, body in loops.items()
        if not any(other < body for other in loops.values())
    ]
    return min(ways, key=lambda way: (-sum(one.multiplies for one in way), len(way)), default=[])


def _followers(code: Sequence[Instruction]) -> list[list[int]]:
    """Indices of the instructions that may follow each one."""
    index = {one.address: i for i, one in enumerate(code)}
    followers = []
    for i, one in enumerate(code):
        after = [i + 1] if one.falls_through and i + 1 < len(code) else []
        if one.name == "BRA" and one.target in index:
            after.append(index[one.target])
        followers.append(after)
    return followers


def _loops(followers: list[list[int]]) -> dict[int, set[int]]:
    """First instruction of each loop -> its instructions."""
    before: list[list[int]] = [[] for _ in followers]
    for i, after in enumerate(followers):
        for follower in after:
            before[follower].append(i)
    loops: dict[int, set[int]] = {}
    for last, after in enumerate(followers):
        for first in (one for one in after if one <= last):
            reached = _reached(first, followers, set())
            if last in reached:  # else code out of line returns
                body = loops.setdefault(first, {first})
                body |= _reached(last, before, {first}) & reached
    return loops


def _reached(first: int, neighbours: list[list[int]], barred: set[int]) -> set[int]:
    """What is reached from ``first``, itself included, without a step to ``barred``."""
    found = {first}
    waiting = [first]
    while waiting:
        for one in neighbours[waiting.pop()]:
            if one not in found and one not in barred:
                found.add(one)
                waiting.append(one)
    return found


def _called(code: Sequence[Instruction], call: Instruction) -> list[Instruction]:
    """The instructions of a called function, in order up to the one that returns."""
    body = []
    for one in code:
        if call.target is not None and one.address >= call.target:
            body.append(one)
            if one.name == "RET":
                break
    return body


def _way(
    code: Sequence[Instruction],
    followers: list[list[int]],
    called: Mapping[int, Sequence[Instruction]],
    first: int,
    body: set[int],
) -> list[int]:
    """One iteration, from the loop's first instruction to a branch back to it."""
    order = _order(followers, first, body)
    place = {i: n for n, i in enumerate(order)}
    # By instruction: matrix instructions (negative) and all instructions on the best way to it.
    cost = {first: (-int(code[first].multiplies), 1)}
    origin: dict[int, int] = {}
    for i in order:
        for follower in followers[i]:
            if place.get(follower, -1) <= place[i]:
                continue
            length = 1 + len(called.get(follower, ()))
            found = cost[i][0] - code[follower].multiplies, cost[i][1] + length
            if follower not in cost or found < cost[follower]:
                cost[follower] = found
                origin[follower] = i
    i = min((i for i in order if first in followers[i]), key=cost.__getitem__)
    way = [i]
    while i != first:
        i = origin[i]
        way.append(i)
    return way[::-1]


def _order(followers: list[list[int]], first: int, body: set[int]) -> list[int]:
    """The loop's instructions, each before those that may follow it in the same iteration."""
    done: list[int] = []
    seen = {first}
    waiting = [(first, iter(followers[first]))]
    while waiting:
        i, rest = waiting[-1]
        follower = next((one for one in rest if one in body and one not in seen), None)
        if follower is None:
            done.append(i)
            waiting.pop()
        else:
            seen.add(follower)
            waiting.append((follower, iter(followers[follower])))
    return done[::-1]
