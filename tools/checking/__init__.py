"""The commands of tools/checkpoint.py."""
