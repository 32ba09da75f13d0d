"""``python -m hpcsync.preflight``: which nodes of a job are slow or wrong, and what links cost.

compute.py   what each rank computes and moves in memory
turns.py     who exchanges with whom, and when: pure
wire.py      messages between two ranks, timed and checked
survey.py    both of them over the job, level by level
judge.py     which nodes to name: pure
report.py    tables and JSON
"""
