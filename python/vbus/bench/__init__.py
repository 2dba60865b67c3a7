"""What vbus measures about itself: one thing changed at a time, both sides in one run, medians of alternating rounds.

A measurement is one module in `measurements`: its plan, its cases and their variants, how a sample is taken, and what
ratios must reach. `harness` runs it: variants alternate, all of them must have done the same work, and are summed up by
`measure`. `machine` says where; `tables`, `plot` and `report` show what came of it. Processes that take part are told
what to do through `children`; where Python in a loop would be what is measured, loops are native (`vbus._core.bench`).
"""
