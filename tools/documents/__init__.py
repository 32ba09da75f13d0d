"""The parts of tools/write_docs.py: what of docs/ is made from the code and the reports."""
