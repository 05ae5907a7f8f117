"""Several trainer ranks and the engines that they generate with.

`ranks` says what a generation asks of them. `placement` finds out which ranks there are, `rank_consensus` makes them
fail together, and `leader_ranks` with `collective_call` connects them to rank 0 where it alone has an engine.
"""
