"""Core ML packages: from a decoder's weights to files, and from the files back to numbers, without a Mac.

Building: `architecture`, `weights` (what the model holds); `linear`, `decoder` (operations); `layouts`, `single`,
`anemll` (programs, parts); `package` (files). `activations` and `repalettize` look at or change the model before.
Reading back: `toolkit`, `weightfile`, `spec`, `reader`, `bundle`. Running: `operations`, `movements`, `constants`,
`interpreter`, `runner`, `writing`; `device` on a Mac. Judging: `reference`, `figures`, `thresholds`, `matching`,
`verify`, `divergence`; `costs`, `accounting`; `rules`, `lint`.
"""
