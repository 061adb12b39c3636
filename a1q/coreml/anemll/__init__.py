"""The layout that the ANEMLL apps load: embeddings, chunks of layers, a head in parts, and `meta.yaml`.

Downward: `runner`; `parts`; `programs`, `meta`; `names`, `chunks`. The facts about the apps stand in docs/anemll.md.
"""
