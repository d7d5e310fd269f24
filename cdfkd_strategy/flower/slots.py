"""Which header belongs to which client, and whose teacher is still fresh enough: pure functions over plain mappings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def client_order(key: str) -> tuple[bool, int, str]:
    """Sort key of client keys: partition ids by number, other keys after them by name."""
    return (not key.isdigit(), len(key), key)


def live_clients(trained_in: Mapping[str, int], server_round: int, max_age: int) -> list[str]:
    """The clients whose teacher may be used in this round, sorted.

    Args:
        trained_in: client key -> round of its last good upload.
        server_round: the round in progress.
        max_age: rounds; 0 accepts only teachers of this round.
    """
    return sorted((key for key, trained in trained_in.items() if server_round - trained <= max_age), key=client_order)


def assign_slots(slots: Mapping[str, int], live: Iterable[str]) -> dict[str, int]:
    """Give every live client a header slot.

    A client keeps its slot for the whole run. A new client takes the lowest slot whose client is not live any more
    (that client loses it; the header goes on from where it is), and only then a new slot at the end. A slot whose client is not live and that nobody needs
    stays with its client, whose header rests there until it returns.

    Args:
        slots: client key -> slot, from 0 without gaps.
        live: keys of the clients whose teachers are used.

    Returns:
        A new mapping, from 0 without gaps, at least as long as ``slots``.
    """
    live = sorted(live, key=client_order)
    assigned = dict(slots)
    free = sorted(slot for key, slot in slots.items() if key not in set(live))
    for key in live:
        if key in assigned:
            continue
        if free:
            slot = free.pop(0)
            del assigned[next(old for old, taken in assigned.items() if taken == slot)]
            assigned[key] = slot
        else:
            assigned[key] = len(assigned)
    return assigned
