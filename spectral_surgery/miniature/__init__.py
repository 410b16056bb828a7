"""The paper in miniature: its tables and figures on the embedded model, with intervals, and which findings hold.

``families.py`` has the four tasks, ``experiment.py`` trains and edits their adapters by ``train`` and ``sweep``,
``effects.py`` makes differences with intervals of the scores, ``findings.py`` says what the paper found and whether
it holds here, ``drawing.py`` and ``page.py`` show it.
"""
