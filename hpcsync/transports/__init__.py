"""How chunks get from rank to rank: one transport a module, all behind ``base.Transport``."""
