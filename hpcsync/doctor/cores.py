"""Cores of the ranks of each host: too few, bound to too few, or shared by mistake."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from ..wording import ranges
from .base import Finding, System, fail, result, warn
from .facts import Facts
from .mpi import start

# How ranks are left free of cores, for Open MPI 5, Open MPI 4, MPICH and srun.
UNBIND = (
    "export PRTE_MCA_hwloc_default_binding_policy=none OMPI_MCA_hwloc_base_binding_policy=none "
    "HYDRA_BINDING=none SLURM_CPU_BIND=none"
)


def judge(system: System, ranks: Sequence[Facts], hosts: int = 1) -> list[Finding]:
    """Of all ranks of one host, one of ``hosts``."""
    masks = [frozenset(each.cores) for each in ranks]
    together = frozenset().union(*masks)
    around = together.union(*(each.around for each in ranks))
    quota = min((each.quota for each in ranks if each.quota is not None), default=float("inf"))
    room = int(max(1, min(len(around), quota)))
    found = list(_binding(ranks, masks, around, room))
    if not found and len(ranks) > room:
        online = ranks[0].online
        given = len(around) < min(len(ranks), online) and quota >= len(ranks)
        wider = online if given and hosts == 1 and not system.place.job else 0
        found = [_crowded(system, len(ranks), room, hosts, wider)]
    found += _threads(ranks, room)
    return result("cores", found, _describe(masks, ranks[0].online))


def _crowded(system: System, count: int, room: int, hosts: int, wider: int) -> Finding:
    """``wider``: cores that the machine has, if the shell that started the ranks has fewer."""
    return warn(
        "cores.crowded",
        f"{count} ranks on {room} {_cores(room)}: they take turns; start fewer, or give them more",
        f"taskset -cp 0-{wider - 1} $$"
        if wider
        else f"{start(system, room, hosts)} {system.again()}",
    )


def _binding(
    ranks: Sequence[Facts], masks: Sequence[frozenset[int]], around: frozenset[int], room: int
) -> Iterator[Finding]:
    count = len(ranks)
    for mask in sorted(set(masks), key=lambda cores: (len(cores), sorted(cores))):
        inside = sum(other <= mask for other in masks)
        if inside > len(mask) and count <= room and len(mask) < len(around):
            yield fail(
                "cores.shared",
                f"{inside} ranks are bound to {len(mask)} {_cores(len(mask))} "
                f"({ranges(sorted(mask))}) while others of {len(around)} are idle",
                UNBIND,
            )
            return
    narrow = sum(len(mask) == 1 for mask in masks)
    if narrow and count < room:
        yield warn(
            "cores.narrow",
            f"{narrow} of {count} {'rank' if count == 1 else 'ranks'} may use one core only, of "
            f"{room}: its communication thread takes time from computing",
            UNBIND,
        )


def _threads(ranks: Sequence[Facts], room: int) -> Iterator[Finding]:
    count = len(ranks)
    most = max(each.threads for each in ranks)
    if count < 2 or most * count <= max(room, count):
        return
    yield warn(
        "cores.threads",
        f"OMP_NUM_THREADS={most} for each of {count} ranks, on {room} {_cores(room)}: in scripts "
        "that leave it to torch, threads wait for each other",
        f"export OMP_NUM_THREADS={max(1, room // count)}",
    )


def _describe(masks: Sequence[frozenset[int]], online: int) -> str:
    sizes = Counter(map(len, masks))
    kinds = ", ".join(f"{count} x {_may(size, online)}" for size, count in sorted(sizes.items()))
    count = len(masks)
    return f"{count} {'rank' if count == 1 else 'ranks'} on this host: {kinds}"


def _may(size: int, online: int) -> str:
    return f"free on {online} {_cores(online)}" if size >= online else f"{size} {_cores(size)}"


def _cores(count: int) -> str:
    return "core" if count == 1 else "cores"
