"""Core ML: a decoder as a palettized, stateful package, and the means to check that package without a Mac.

Downward: `verify`, `interpreter`, `operations`; `reader`; `package`; `graph`, `linear`, `weights`; `architecture`.
"""
