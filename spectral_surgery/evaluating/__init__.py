"""Benchmarks and paired comparison: lm-evaluation-harness around one loaded model, and every score beside another.

``records`` (one scored example) and ``standings`` (paired differences) hold what is compared; ``samples`` reads the
harness's own files. ``tasks``, ``row_tasks``, ``sentences`` and ``code_execution`` say what is scored and how,
``suite`` checks a run before weights load, ``variants``, ``harness``, ``scoring`` and ``serving`` run it; ``keys``
says what scores depend on and ``kept`` holds finished ones. :mod:`.evaluation` and :mod:`.comparing` are the two jobs.
"""
