"""What vbus measures about itself: one thing changed at a time, both sides in one run, medians of alternating rounds.

`signal` is the measurement that there is: its plan, its rows, its verdicts. It tells two processes what to do, through
`children`: `bus_side` serves devices, `driver_side` drives them. `measure` alternates variants, checks that all of them
did the same work, and sums up; `machine` says where; `plot` draws.
"""
