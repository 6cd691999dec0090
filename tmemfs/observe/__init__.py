"""Statistics: one registry, and the texts that are made from it. Nothing here scans slots or segments.

registry     every metric once: name, kind, unit, help, how it is read. A new statistic is an entry there
metric       what a metric is
snapshot     where in the running daemon each figure is
report       the control files that report (prometheus: the format of one of them)
"""
