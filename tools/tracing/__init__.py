"""The commands of tools/trace.py, one a module: NAME, HELP, arguments(parser), run(options)."""
