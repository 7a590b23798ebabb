"""Ahead of time: draw the mini-batches, plan the data movement, pack the rows.

`neighbors` samples items into a trace, item by item or hop by hop; both give the same items.
`plan` turns a trace and the budgets into a movement plan by one of the `policies`.
`packer` executes the plan: one scan of the feature table, one write of the packs.
`rolling` runs the three ahead of a trainer under a disk budget.
"""
