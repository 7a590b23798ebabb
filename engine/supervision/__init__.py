"""What is done about ranks that fail, fall silent or lag behind, whoever runs them.

`policy` decides and does nothing else: `step(state, observations) -> (state, decisions)`. `watch` feeds it what a
backend sees in one call and carries out what it decides, with `slots` to find who stopped first and `stacks` to show
where. `restarts` runs attempts by the same policy; `stragglers` says who is slow, and at what.
"""
