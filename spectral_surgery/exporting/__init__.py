"""The same adapter in another form: for every server, merged, smaller, weaker. See :mod:`.job`."""
