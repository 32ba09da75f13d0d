"""``python -m hpcsync.doctor``: what is wrong with this place, and the command that mends it.

    place (which rank am I) -> checks of this rank, node, job -> one report on rank 0
                               \\-> probes: children that may crash or hang, with a time limit

Starts with the standard library alone: torch, MPI and h5py are met in children only. Each check
says PASS, WARN or FAIL in a line; what is no PASS has a code of its own and a command.
"""
