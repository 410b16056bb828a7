"""Studies: every adapter by every policy at every setting, in one loaded model, and what is left of it.

:mod:`.study` reads what is to be run, :mod:`.presets` holds the paper's tables and figures as studies, :mod:`.grid`
spells a study out run by run, :mod:`.preparing` checks it without weights, and :mod:`.running` runs what is left.
"""
