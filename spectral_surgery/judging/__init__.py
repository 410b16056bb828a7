"""The judging half of refine: per-row scores in, a verdict in sentences out. No model, no torch.

``trials`` (what was scored) -> ``rule`` (what is asked for, how surely it is met) -> ``choosing`` (finalists,
confirmation) -> ``claims`` (the winner beside its rivals) -> ``verdict``; ``replaying`` measures the error rate,
``ledger`` counts earlier verdicts on the same rows.
"""
