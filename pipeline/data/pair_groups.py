"""Which pairs belong together: those that share a content, or a group that their source gives."""

import numpy as np


def pair_groups(
    pairs: np.ndarray,
    roles: np.ndarray,
    keys: np.ndarray,
    belongs: np.ndarray | None = None,
    given: np.ndarray | None = None,
) -> np.ndarray:
    """Return the group of each row: pairs connected by equal contents, unless `belongs` is 0, or by a `given` group.

    Such pairs are no negatives of each other, and stay in one split. The group's name is the smallest key among the
    second of each pair (its positive), so that a new question to a known answer does not change it.
    """
    names = [key.tobytes().hex() for key in keys]
    parent = {name: name for name in names}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    first_of_pair: dict[int, str] = {}
    joins = [True] * len(names) if belongs is None else belongs.astype(bool).tolist()
    for pair, name, united in zip(pairs.tolist(), names, joins, strict=True):
        if united:
            parent[root(name)] = root(first_of_pair.setdefault(pair, name))
    first_of_group: dict[str, str] = {}
    for group, name in zip([] if given is None else given.tolist(), names, strict=False):
        parent[root(name)] = root(first_of_group.setdefault(group, name))
    smallest: dict[str, str] = {}
    _, second = both_roles(roles)
    for role, name in zip(roles.tolist(), names, strict=True):
        if role == second:
            smallest[root(name)] = min(name, smallest.get(root(name), name))
    return np.array([smallest.get(root(name), name) for name in names])


def both_roles(roles: np.ndarray) -> tuple[str, str]:
    """Return the first and the second of the roles of pairs: anchor and positive, or chosen and rejected."""
    found = np.unique(roles).tolist()
    return found[0], found[-1]
