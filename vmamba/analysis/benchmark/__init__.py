"""Speed and memory of models: what `vmamba benchmark` runs.

:mod:`.jobs` says what is measured, :mod:`.steps` makes the call that is timed, :mod:`.meters` times it, :mod:`.turns`
lets models take turns, :mod:`.results` keeps what came out, :mod:`.environment` what it depends on.
"""
