"""Studies: every adapter by every policy at every setting, in one loaded model, and what is left of it.

:mod:`.study` reads what is to be run, :mod:`.presets` holds the paper's tables and figures as studies, :mod:`.grid`
spells a study out run by run and :mod:`.preparing` checks it without weights. :mod:`.bench` measures and scores in the
loaded model, :mod:`.scores` says what that means by task, :mod:`.folder` keeps it. :mod:`.running` runs what is left,
in this process or on the workers of :mod:`.workers`.
"""
