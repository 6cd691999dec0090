"""A whole machine under memory pressure, with tmemfs as its only swap: see __main__.py."""
